"""Batch norms in evaluation mode as what they are then: a number times and a number plus for each channel.

Behind a convolution both go into its weights, which saves a pass over its output, and another one on the way back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_leaves, tree_map

Folds = dict[nn.Module, nn.Module]
"""Convolution to the batch norm that alone takes what it gives."""

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ATTRIBUTES: Any = Tensor
_PROPERTIES = (
    Tensor.dim, Tensor.size, *(getattr(_ATTRIBUTES, name).__get__ for name in ("shape", "ndim", "dtype", "device")),
)  # fmt: skip
"""What may be asked of a convolution's output without looking at its numbers."""


def find_folds(modules: Iterable[nn.Module], call: Callable[[], Any]) -> Folds:
    """Convolutions whose output goes into one batch norm and nowhere else, seen in one forward pass.

    Parameters
    ----------
    modules : iterable of Module
        All modules of the network.
    call : function
        Runs the network on one row.
    """
    modules = list(modules)
    layers: list[nn.Module] = [m for m in modules if isinstance(m, _LAYERS) and m._parameters.get("weight") is not None]
    if not layers or not any(isinstance(m, _NORMS) for m in modules):
        return {}
    with _Watch(modules, layers) as watch:
        call()
    return {a: b for a, b in watch.folds.items() if a not in watch.refused}


def affine_norms(folds: Folds, memory_format: torch.memory_format) -> AbstractContextManager[Any]:
    """While it holds, batch norms with kept statistics are part of the convolution before them, or an `addcmul`.

    An `addcmul` where there is no convolution, behind a gradient on a processor in the format channels last: there the
    backward pass of PyTorch's batch norm takes several times as long as that of a product. The result is the same up to
    rounding. A convolution whose own output, or a norm whose input, somebody wants to see or change (that has a hook)
    stays as it is. Backward rules need to see the norms themselves; where another function mode holds, nothing is
    changed.
    """
    if _get_current_function_mode() is not None or torch.is_autocast_enabled():
        return nullcontext()
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        folds = {}
    folds = {a: b for a, b in folds.items() if not _seen(a) and not _seen(b, before=True)}
    affine = torch.is_grad_enabled() and memory_format is torch.channels_last
    return _AffineNorms(folds, affine) if folds or affine else nullcontext()


def _seen(module: nn.Module, before: bool = False) -> bool:
    """Whether somebody else sees what a module gives (or takes)."""
    hooks = module._forward_pre_hooks if before else module._forward_hooks
    return bool(hooks or module._backward_hooks or module._backward_pre_hooks)


class _Watch(TorchFunctionMode):
    """Sees which batch norm takes the output of each convolution, and refuses those that are used otherwise."""

    def __init__(self, modules: list[nn.Module], layers: list[nn.Module]) -> None:
        super().__init__()
        self.folds: Folds = {}
        self.refused: set[nn.Module] = set()
        self._modules = modules
        self._layers = layers
        self._by_weight: dict[int, nn.Module] = {}
        self._made: dict[int, tuple[Tensor, nn.Module]] = {}  # holds the tensors, so that no two have the same id
        self._hooks = ExitStack()

    def __enter__(self) -> Any:
        for m in self._modules:
            self._hooks.callback(m.register_forward_pre_hook(self._takes, with_kwargs=True).remove)
            self._hooks.callback(m.register_forward_hook(self._gives).remove)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def _among(self, values: Any) -> list[tuple[Tensor, nn.Module]]:
        return [self._made[id(v)] for v in tree_leaves(values) if id(v) in self._made]

    def _takes(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for _, layer in self._among((args, kwargs)):
            if not isinstance(module, _NORMS) or self.folds.setdefault(layer, module) is not module:
                self.refused.add(layer)

    def _gives(self, module: nn.Module, args: Any, output: Any) -> None:
        self.refused.update(layer for _, layer in self._among(output) if layer is not module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm and func not in _PROPERTIES:
            self.refused.update(layer for _, layer in self._among((args, kwargs)))
        out = func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            if not self._by_weight:  # only now: the weights may be others while the network runs
                for m in self._layers:
                    if self._by_weight.setdefault(id(m.weight), m) is not m:
                        self.refused.update((m, self._by_weight[id(m.weight)]))
            layer = self._by_weight.get(id(_argument(1, "weight", args, kwargs)))
            if layer is not None:
                self._made[id(out)] = out, layer
        return out


class _AffineNorms(TorchFunctionMode):
    """Hands out what a convolution with its norm gives, and takes it back where the norm is called.

    What the network gets from the convolution is another tensor over the same memory, so that it can be told from what
    the norm gives; if it is put to any other use (where the numbers decide what is computed), the convolution runs
    again as it is.
    """

    def __init__(self, folds: Folds, affine: bool) -> None:
        super().__init__()
        self._folds = folds
        self._affine = affine
        self._by_weight: dict[int, nn.Module] = {}
        self._handed_out: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._handed_out and func not in _PROPERTIES:
            if func is F.batch_norm and (known := _folded(args[0])) is not None:
                folded, norm, _ = known
                if _argument(1, "running_mean", args, kwargs) is norm.running_mean:
                    return folded
            args, kwargs = tree_map(_unfold, (args, kwargs))
        if func is F.batch_norm and self._affine:
            return _batch_norm(*args, **kwargs)
        if self._folds and func in _CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        return func(*args, **kwargs)

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        if not self._by_weight:  # only now: the weights may be others while the network runs
            self._by_weight = {id(a.weight): b for a, b in self._folds.items()}
        weight = _argument(1, "weight", args, kwargs)
        norm: Any = self._by_weight.get(id(weight))
        plain = partial(func, *args, **kwargs)
        if norm is None or norm.training or norm.running_mean is None or norm.running_var is None:
            return plain()
        bias = _argument(2, "bias", args, kwargs)
        trains = torch.is_grad_enabled()
        held = [norm.running_mean, norm.running_var, norm.weight, norm.bias, weight, bias]
        if any(t is not None and ((trains and t.requires_grad) or t.dtype != args[0].dtype) for t in held):
            return plain()
        scale, shift = _scale_and_shift(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        folded = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        rest = {k: v for k, v in kwargs.items() if k not in ("weight", "bias")}
        folded = func(args[0], folded, shift if bias is None else torch.addcmul(shift, bias, scale), *args[3:], **rest)
        handed_out: Any = folded.view_as(folded)
        handed_out.nissl_folded = folded, norm, plain
        key = id(handed_out)
        self._handed_out[key] = weakref.ref(handed_out, lambda _: self._handed_out.pop(key, None))
        return handed_out


def _folded(value: Any) -> tuple[Tensor, Any, Callable[[], Tensor]] | None:
    return getattr(value, "nissl_folded", None) if isinstance(value, Tensor) else None


def _unfold(value: Any) -> Any:
    """What the convolution alone gives, in place of a folded output."""
    known = _folded(value)
    return value if known is None else known[2]()


def _argument(place: int, name: str, args: Any, kwargs: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _scale_and_shift(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    held = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if (
        training or running_mean is None or running_var is None or input.ndim != 4 or input.device.type != "cpu"
        or not input.requires_grad or not input.is_contiguous(memory_format=torch.channels_last)
        or any(t.requires_grad or t.dtype != input.dtype for t in held)
    ):  # fmt: skip
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale, shift = _scale_and_shift(running_mean, running_var, weight, bias, eps)
    return torch.addcmul(shift[:, None, None], input, scale[:, None, None])
