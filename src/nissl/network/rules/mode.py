"""The torch function mode that hands every operation of a forward pass to a rule set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from nissl.errors import RuleError
from nissl.network.expand import multi_head_attention, scaled_dot_product_attention
from nissl.network.rules import operations as op


class Rewired(torch.autograd.Function):
    """A known value of some tensors, with a backward pass of our own."""

    # The value comes in a list so that autograd does not take it for an input: an input handed on as it is becomes a
    # view, over which a network could not write in place.
    @staticmethod
    def forward(ctx: Any, backward: Callable[[Tensor], Any], y: list[Tensor], *xs: Tensor) -> Tensor:  # noqa: D102
        ctx.rule = backward
        return y[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # noqa: D102
        with torch.no_grad():
            found = ctx.rule(grads[0])
        return (None, None, *(found if isinstance(found, tuple) else (found,)))


def rewire(y: Tensor, backward: Callable[[Tensor], Any], *xs: Tensor) -> Tensor:
    """`y`, whose gradient reaches each of `xs` as `backward` says.

    The network may write over the result in place, and with it over `y`: `backward` must not read `y` itself.
    """
    return Rewired.apply(backward, [y.detach()], *xs)  # pyright: ignore[reportReturnType]


def scaled(y: Tensor, factor: Tensor | float) -> Tensor:
    """`y` itself, whose gradient is multiplied by a factor."""
    return rewire(y, lambda g: g * factor, y)


def stabilised(y: Tensor, epsilon: float) -> Tensor:
    """Y moved away from 0 by epsilon; 0 counts as positive."""
    return y + torch.where(y >= 0, epsilon, -epsilon).to(y.dtype)


def valued(y: Tensor, graph: Tensor) -> Tensor:
    """The value of `y` with the gradient of `graph`."""
    return rewire(y, lambda g: g, graph)


@dataclass(slots=True)
class Mark:
    """What a rule set remembers of a tensor until it is used.

    Attributes
    ----------
    version : int
        The tensor's version when marked; a later change in place makes `held` and `layer` void.
    held : str or None
        ``tanh``, ``gate``, ``norm`` or ``softmax``: a factor that is constant where it multiplies or divides a signal.
    raw : bool
        No layer has come between the input and this tensor.
    layer : object
        The layer that made it.
    """

    version: int
    held: str | None = None
    raw: bool = False
    layer: Any = None


# Which of two factors is the gate of the other: the one that ranks higher. Signals have rank 0.
RANK: dict[str | None, int] = {None: 0, "tanh": 1, "gate": 2, "norm": 3, "softmax": 3}


def mark_of(t: Tensor) -> Mark | None:
    """The mark of a tensor, if it has one that still holds."""
    mark = getattr(t, "_nissl_mark", None)
    return mark if mark is not None and mark.version == t._version else None


def held_as(t: Any) -> str | None:
    """As which kind of factor a tensor is held constant in products."""
    mark = mark_of(t) if isinstance(t, Tensor) else None
    return None if mark is None else mark.held


def put_mark(t: Tensor, held: str | None = None, raw: bool = False, layer: Any = None) -> None:
    """Mark a tensor, in place of an earlier mark."""
    if held is not None or raw or layer is not None or hasattr(t, "_nissl_mark"):
        t._nissl_mark = Mark(t._version, held, raw, layer)  # pyright: ignore[reportAttributeAccessIssue]


def hold(out: Any, kind: str | None) -> Any:
    """Mark a result as a factor that is held constant in products."""
    each(out, lambda t: put_mark(t, held=kind) or t)
    return out


def unmark(t: Tensor) -> None:
    """Forget which layer made a tensor, so that a batch norm behind it is not merged past it.

    For tensors at which a gradient is wanted: relevance then flows through them.
    """
    mark = getattr(t, "_nissl_mark", None)
    if mark is not None:
        mark.layer = None


def each(out: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor of a result that carries relevance."""
    if isinstance(out, Tensor):
        return change(out) if out.requires_grad else out
    if isinstance(out, (tuple, list)):
        parts = [each(v, change) for v in out]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    return out


def replaced(args: Any, old: Tensor, new: Tensor) -> Any:
    """Arguments with one tensor replaced wherever it occurs."""
    if args is old:
        return new
    if type(args) in (tuple, list):
        return type(args)(replaced(v, old, new) for v in args)
    return {k: replaced(v, old, new) for k, v in args.items()} if type(args) is dict else args


def argument(args: Any, kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def operands(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The two operands of a binary operation."""
    first = argument(args, kwargs, 0, "input")
    if len(args) > 1:
        return first, args[1]
    return first, next((kwargs[k] for k in ("other", "mat2", "vec", "vec2", "tensor") if k in kwargs), None)


def depends(x: Any) -> bool:
    """Whether a tensor depends on what is differentiated; weights are frozen, so it is whether it needs a gradient."""
    return isinstance(x, Tensor) and x.requires_grad


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    return []


def carriers(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments that depend on what is differentiated."""
    return [t for t in tensors_in([*args, *kwargs.values()]) if t.requires_grad]


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
        name, in_place, switch, base = op.operation(func)
        asks = name.startswith(("get_", "set_", "delete_")) and name not in op.REARRANGING
        if asks or name in op.SILENT or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        carrying = carriers(args, kwargs)
        if not carrying:
            return func(*args, **kwargs)
        for t in carrying:
            self._own(t.grad_fn)
        if name in op.SEALED or name.startswith("quantized"):
            raise RuleError(
                f"{name!r} is many layers in one call, into which {self.name} cannot see; "
                "use a network in plain operations, or no rules"
            )
        if in_place:
            target = args[0]
            if name in ("copy", "setitem"):
                return self.write(func, args, kwargs, target)
            if base is None:
                out = func(*args, **kwargs)
                return self.overwrite(target, self.refuse(target, name)) if out is target else out
            return self._overwritten(target, name, base, args, kwargs)
        if switch is not None and argument(args, kwargs, switch, "inplace", False):
            target = argument(args, kwargs, 0, "input")
            if len(args) > switch:
                args = (*args[:switch], False, *args[switch + 1 :])
            else:
                kwargs = {**kwargs, "inplace": False}
            return self._overwritten(target, name, func, args, kwargs)
        return self.handle(name, func, args, kwargs)

    def _overwritten(self, target: Tensor, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """An operation in place, done on a copy: whoever holds the tensor sees the change, and the rule holds."""
        copy, mark = target.clone(), mark_of(target)
        raw = bool(getattr(getattr(target, "_nissl_mark", None), "raw", False))
        put_mark(copy, mark.held if mark else None, raw, mark.layer if mark else None)
        return self.overwrite(
            target, self.handle(name, func, replaced(args, target, copy), replaced(kwargs, target, copy))
        )

    def write(self, func: Any, args: Any, kwargs: dict[str, Any], target: Tensor) -> Any:
        """``target[...] = value`` and ``target.copy_(value)``."""
        return func(*args, **kwargs)

    def overwrite(self, target: Tensor, out: Tensor) -> Tensor:
        """In place: what was computed out of place goes into the tensor, with its mark."""
        mark = mark_of(out)
        target.copy_(out)
        put_mark(target, mark.held if mark else None, bool(mark and mark.raw))
        return target

    def handle(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One out-of-place operation with a dependent argument."""
        if name in op.STRUCTURE:
            return self.structure(name, func, args, kwargs)
        if name in op.LAYERS:
            return self.layer(name, func, args, kwargs)
        if name == "batch_norm":
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
            return self.gate(name, func, args, kwargs)
        if name in op.EXPONENTIALS:
            return self.exponential(name, func, args, kwargs)
        if name in op.POWERS:
            return self.power(name, func, args, kwargs)
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
        if name == "glu":
            with self:
                signal, gate = argument(args, kwargs, 0, "input").chunk(2, argument(args, kwargs, 1, "dim", -1))
                return signal * torch.sigmoid(gate)
        if name == "lerp":
            with self:
                start, end, weight = (argument(args, kwargs, i, k) for i, k in enumerate(("input", "end", "weight")))
                return start + (end - start) * weight
        if name == "bilinear" and not depends(argument(args, kwargs, 2, "weight")):
            with self:
                left, right, weight = (
                    argument(args, kwargs, i, k) for i, k in enumerate(("input1", "input2", "weight"))
                )
                bias = argument(args, kwargs, 3, "bias")
                # Two steps: a product of two activations, seen by the rules as such, and a linear map of it.
                pairs = left.unsqueeze(-1) * right.unsqueeze(-2)
                return torch.nn.functional.linear(pairs.flatten(-2), weight.flatten(1), bias)
        return self.unknown(name, func, args, kwargs)

    # ------------------------------------------------------------ kinds; plain gradients unless a set says otherwise

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

    def exponential(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Exponentials, the parts of gates that are written out."""
        return func(*args, **kwargs)

    def power(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Powers."""
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
        return each(out, lambda t: self.refuse(t, name)) if self.strict else out

    def refuse(self, y: Tensor, name: str, why: str = "") -> Tensor:
        """`y`, at which no gradient may arrive."""

        def raising(g: Tensor) -> Any:
            raise RuleError(
                f"relevance reached the operation {name!r}{why}, for which {self.name} has no rule; "
                "use another rule set, or explain a site behind it"
            )

        return rewire(y, raising, y)

    def _product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(carriers(args, kwargs)) >= 2:
            return self.product(name, func, args, kwargs)
        if name == "mul":
            return self.structure(name, func, args, kwargs)
        return self.linear_map(name, func, args, kwargs)

    def _added_product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        keys = {
            "addmm": ("input", "mat1", "mat2"),
            "baddbmm": ("input", "batch1", "batch2"),
            "addmv": ("input", "mat", "vec"),
            "addcmul": ("input", "tensor1", "tensor2"),
        }[name]
        added, a, b = (argument(args, kwargs, i, k) for i, k in enumerate(keys))
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", kwargs.get("value", 1))
        if name != "addcmul" and not depends(added) and not (depends(a) and depends(b)):
            return self.linear_map(name, func, args, kwargs)
        with torch.no_grad():
            value = func(*args, **kwargs)
        with self:
            graph = added * beta + (torch.mul if name == "addcmul" else torch.matmul)(a, b) * alpha
        return valued(value, graph)

    def activation_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook for modules that are one activation written in several operations."""
        if len(args) != 1 or not depends(args[0]) or not isinstance(output, Tensor) or output.shape != args[0].shape:
            return output

        def plain(x: Tensor) -> Tensor:
            return type(module).forward(module, x)

        return self.activation(type(module).__name__.lower(), plain, args, {})

    def _own(self, node: Any) -> None:
        made_by = getattr(node, "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
        if made_by is not None and made_by is not Rewired:
            raise RuleError(
                f"the network holds an autograd.Function of its own, {made_by.__name__}, into which {self.name} "
                "cannot see; switch to plain operations (memory-efficient activations often have an option)"
            )

    def inspect(self, scalar: Tensor) -> None:
        """Raise RuleError where the network holds an autograd.Function of its own, which no mode sees inside."""
        seen, todo = set(), [scalar.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            self._own(node)
            todo += [n for n, _ in node.next_functions]

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
