"""The torch function mode that hands every operation of a forward pass to a rule set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nissl.errors import RuleError
from nissl.network.expand import multi_head_attention, scaled_dot_product_attention
from nissl.network.rules import operations as op

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Rewired(torch.autograd.Function):
    """A known value of some tensors, with a backward pass of our own."""

    @staticmethod
    def forward(ctx: Any, backward: Callable[[Tensor], Any], y: Tensor, *xs: Tensor) -> Tensor:  # noqa: D102
        ctx.rule = backward
        ctx.n = len(xs)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        with torch.no_grad():
            found = ctx.rule(grads[0])
        return (None, None, *(found if isinstance(found, tuple) else (found,)))


def rewire(y: Tensor, backward: Callable[[Tensor], Any], *xs: Tensor) -> Tensor:
    """`y`, whose gradient reaches each of `xs` as `backward` says."""
    return Rewired.apply(backward, y.detach(), *xs)  # pyright: ignore[reportReturnType]


def scaled(y: Tensor, factor: Tensor) -> Tensor:
    """`y` itself, whose gradient is multiplied by a factor."""
    return rewire(y, lambda g: g * factor, y)


def stabilised(y: Tensor, epsilon: float) -> Tensor:
    """Y moved away from 0 by epsilon; 0 counts as positive."""
    return y + torch.where(y >= 0, epsilon, -epsilon).to(y.dtype)


def valued(y: Tensor, graph: Tensor) -> Tensor:
    """The value of `y` with the gradient of `graph`."""
    return rewire(y, lambda g: g, graph)


def depends(x: Any) -> bool:
    """Whether a tensor depends on what is differentiated; weights are frozen, so this is whether it needs a gradient."""
    return isinstance(x, Tensor) and x.requires_grad


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    return []


class RuleMode(TorchFunctionMode):
    """Base of all rule modes: sorts operations by kind.

    A rule set overrides the kinds that it treats in its own way. What no method here or there knows raises RuleError as
    soon as a gradient reaches it: a rule set never stays silent.

    Attributes
    ----------
    met : Counter
        How often each kind of operation was met.
    """

    strict = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.met: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors_in([*args, *kwargs.values()])):
            return func(*args, **kwargs)
        name, in_place = op.name_of(func)
        if in_place or kwargs.get("inplace"):
            return self._in_place(name, func, args, kwargs)
        return self.handle(name, func, args, kwargs)

    def _in_place(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in op.STRUCTURE:
            return func(*args, **kwargs)
        # Out of place on a copy, then written back: whoever holds the tensor sees the change, and the rule holds.
        target = args[0] if args else kwargs["input"]
        plain = {**kwargs, "inplace": False} if "inplace" in kwargs else kwargs
        other = getattr(torch, name, None) or getattr(F, name, None) or getattr(Tensor, name, None)
        if "inplace" in kwargs:
            other = func
        elif name in ("imul", "itruediv"):
            other = torch.mul if name == "imul" else torch.div
        if other is None:
            raise RuleError(f"{self.name} cannot handle the in-place operation {name!r}")
        copy = target.clone()
        rest = args[1:] if args else ()
        if not args:
            plain = {k: v for k, v in plain.items() if k != "input"}
        result = self.handle(name, other, (copy, *rest), plain)
        return target.copy_(result)

    def handle(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One out-of-place operation with a dependent argument."""
        if name in op.RECURRENT:
            raise RuleError(
                f"{self.name} has no rule for the fused recurrent layer {name!r}; write it out step by step"
            )
        if name in op.STRUCTURE:
            return self.structure(name, func, args, kwargs)
        if name in op.LAYERS:
            self.met["layer"] += 1
            return self.layer(name, func, args, kwargs)
        if name == "batch_norm":
            self.met["batch_norm"] += 1
            return self.batch_norm(func, args, kwargs)
        if name in op.ACTIVATIONS:
            self.met["activation"] += 1
            return self.activation(name, func, args, kwargs)
        if name in op.PRODUCTS:
            return self._product(name, func, args, kwargs)
        if name in op.ADDED_PRODUCTS:
            return self._added_product(name, func, args, kwargs)
        if name in op.DIVISIONS:
            return self.division(name, func, args, kwargs)
        if name in op.GATES:
            self.met["gate"] += 1
            return self.gate(name, func, args, kwargs)
        if name in op.SOFTMAX:
            self.met["softmax"] += 1
            return self.softmax(func, args, kwargs)
        if name in op.SCALES:
            return self.scale(name, func, args, kwargs)
        if name in op.AVERAGE_POOLS:
            self.met["average_pool"] += 1
            return self.average_pool(func, args, kwargs)
        if name in op.NORMS:
            self.met["norm"] += 1
            return self.norm(name, func, args, kwargs)
        if name == "scaled_dot_product_attention":
            with self:
                return scaled_dot_product_attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            with self:
                return multi_head_attention(*args, **kwargs)
        return self.unknown(name, func, args, kwargs)

    # ---------------------------------------------------------------- kinds; plain gradients unless a set says otherwise

    def structure(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Views, sums, choices."""
        return func(*args, **kwargs)

    def layer(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Linear layers and convolutions with constant weights."""
        return func(*args, **kwargs)

    def batch_norm(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Batch norm with fixed statistics: an affine map."""
        return func(*args, **kwargs)

    def activation(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Elementwise functions."""
        return func(*args, **kwargs)

    def gate(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Sigmoids and the like."""
        return func(*args, **kwargs)

    def softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Softmax."""
        return func(*args, **kwargs)

    def scale(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Roots, deviations and norms."""
        return func(*args, **kwargs)

    def average_pool(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Average pooling."""
        return func(*args, **kwargs)

    def norm(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Fused normalisations."""
        return func(*args, **kwargs)

    def product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Products of two dependent tensors."""
        return func(*args, **kwargs)

    def linear_map(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Products of a dependent tensor with a constant one that mix entries (matmul, einsum)."""
        return func(*args, **kwargs)

    def division(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Quotients."""
        return func(*args, **kwargs)

    def unknown(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Anything else: allowed as long as no gradient reaches it."""
        out = func(*args, **kwargs)
        if not self.strict:
            return out

        def refuse(g: Tensor) -> Any:
            raise RuleError(
                f"relevance reached the operation {name!r}, for which {self.name} has no rule; "
                "use another rule set, or explain a site behind it"
            )

        def guard(t: Any) -> Any:
            return rewire(t, refuse, t) if depends(t) and t.is_floating_point() else t

        if isinstance(out, Tensor):
            return guard(out)
        if isinstance(out, tuple):
            guarded = [guard(t) for t in out]
            return type(out)(guarded) if hasattr(out, "n_fields") else tuple(guarded)
        return [guard(t) for t in out] if isinstance(out, list) else out

    def _product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        dependent = [t for t in tensors_in([*args, *kwargs.values()]) if t.requires_grad]
        if len(dependent) >= 2:
            self.met["product"] += 1
            return self.product(name, func, args, kwargs)
        if name in ("mul", "multiply", "rmul", "imul"):
            return self.structure(name, func, args, kwargs)
        self.met["linear_map"] += 1
        return self.linear_map(name, func, args, kwargs)

    def _added_product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", kwargs.get("value", 1))
        added, a, b = args[:3]
        multiply = {"addmm": torch.mm, "addbmm": None, "baddbmm": torch.bmm, "addmv": torch.mv, "addcmul": torch.mul}[
            name
        ]
        if multiply is None:
            return self.unknown(name, func, args, kwargs)
        value = func(*(t.detach() for t in args[:3]), **kwargs)
        with self:
            graph = beta * added + alpha * multiply(a, b)
        return valued(value, graph)

    def activation_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook for modules that are one activation written in several operations."""
        if len(args) != 1 or not depends(args[0]) or not isinstance(output, Tensor) or output.shape != args[0].shape:
            return output
        self.met["activation"] += 1

        def plain(x: Tensor) -> Tensor:
            return type(module).forward(module, x)

        return self.activation(type(module).__name__.lower(), plain, args, {})

    def inspect(self, scalar: Tensor) -> None:
        """Raise RuleError where the network holds an autograd.Function of its own, which no mode sees inside."""
        if not self.strict or scalar.grad_fn is None:
            return
        seen, todo = set(), [scalar.grad_fn]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            own = getattr(type(node), "_forward_cls", None)
            if own is not None and own is not Rewired:
                raise RuleError(f"{self.name} cannot see into the network's own autograd.Function {own.__name__}")
            todo += [n for n, _ in node.next_functions if n is not None]

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None:
            self.finished()

    def finished(self) -> None:
        """Called when the forward pass is over, and after every expansion within it."""


def is_activation_module(module: nn.Module) -> bool:
    """Whether a module is one activation by its name, written out in its forward."""
    if type(module).__module__.startswith("torch.nn.") or next(module.children(), None) is not None:
        return False
    name = type(module).__name__.lower()
    has_weights = next(module.parameters(), None) is not None
    return not has_weights and any(k in name for k in ("gelu", "silu", "swish", "mish", "activation"))
