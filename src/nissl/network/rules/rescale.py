"""DeepLIFT's rescale rule on pairs of rows (input, baseline): finite differences in place of derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nissl.errors import RuleError
from nissl.network.rules.mode import (
    AVERAGE_POOLS,
    CONVOLUTIONS,
    DENSE,
    LINEAR,
    MAX_POOLS,
    Call,
    Handler,
    RuleMode,
    redirect,
    routed,
)


def _both(of_pairs: Tensor) -> Tensor:
    """One entry a pair to one a row."""
    return of_pairs.repeat_interleave(2, 0)


def _mean(t: Tensor) -> Tensor:
    """Mean of each pair, at both of its rows."""
    t = t.detach()
    return _both((t[0::2] + t[1::2]) / 2)


class RescaleMode(RuleMode):
    """Multipliers between the rows of each pair. Rows must stay in the first dimension."""

    handlers: dict[str, Handler] = {}  # noqa: RUF012 filled below, never changed

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._rows: int | None = None

    def handle(self, call: Call) -> Any:
        """Answer a call, and see to it that its result has pairs of rows."""
        if self._rows is None:
            self._rows = call.carriers[0].shape[0] if call.carriers[0].ndim else 1
            if self._rows % 2:
                raise RuleError(f"{self.name} takes rows in pairs (input, baseline); got {self._rows} rows")
        out = super().handle(call)
        return self.each(out, lambda t: t if self._paired(t) else self._unpaired(t, call))

    def _paired(self, t: Tensor) -> bool:
        return t.ndim > 0 and t.shape[0] == self._rows

    def _unpaired(self, t: Tensor, call: Call) -> Tensor:
        return self.blocked(t, Call(call.func, f"{call.name}` (which moves rows out of the first dimension)", *_a(call)))

    def moving(self, call: Call) -> Any:
        """Transpositions: fine where rows stay first."""
        out, x = call.run(), call.carriers[0]
        stays = out.ndim > 0 and out.shape[0] == x.shape[0] and out.stride(0) == x.stride(0)
        return out if stays else self._unpaired(out, call)

    def layer(self, call: Call) -> Any:
        """Layers are linear; products of two activations take the mean of each over the pair."""
        if call.name == "batch_norm":
            plain = not call.get("training", 5, False) and call.get("running_mean", 1) is not None
            return call.run() if plain and len(call.carriers) == 1 else self.unknown(call)
        if len(call.carriers) == 1:
            mixes = call.name in ("matmul", "rmatmul", "addmm", "addmv", "einsum", "tensordot", "inner")
            if mixes and not self._keeps_rows(call):
                return self.unknown(call)
            return call.run()
        if call.name == "matmul" and all(t.ndim >= 3 for t in call.carriers):
            return self.product(call)
        return self.unknown(call)

    def _keeps_rows(self, call: Call) -> bool:
        """Whether the rows of the one carrier are not summed over or moved."""
        x = call.carriers[0]
        if call.name == "einsum":
            equation = call.args[0]
            if len(call.args) != 3 or "." in equation or "->" not in equation:
                return False
            sides = equation.replace(" ", "").split("->")
            own = sides[0].split(",")[0 if x is call.args[1] else 1]
            other = sides[0].split(",")[1 if x is call.args[1] else 0]
            return bool(sides[1]) and sides[1][0] == own[0] and own[0] not in other
        first = call.pair()[0] if call.name not in ("addmm", "addmv") else call.args[1]
        if call.name == "rmatmul":
            return x.ndim >= 3
        return call.name in ("matmul", "addmm", "inner") and (x is first or x.ndim >= 3)

    def product(self, call: Call) -> Any:
        """Products: of two activations, each is multiplied by the pair's mean of the other, which is complete."""
        if len(call.carriers) == 1:
            return call.run()
        left, right = call.pair()
        value = call.run()
        if not (isinstance(value, Tensor) and left.ndim == right.ndim == value.ndim and self._paired(value)):
            return self.unknown(call)
        if not (self._paired(left) and self._paired(right)):
            return self.unknown(call)
        self.met["product"] += 1
        terms = call.func(left, _mean(right)), call.func(_mean(left), right)
        return redirect(value.detach(), (terms[0], 1.0), (terms[1], 1.0))

    def quotient(self, call: Call) -> Any:
        """Division by a constant; no other."""
        below = call.pair()[1] if call.name == "div" else call.args[0]
        constant = not (isinstance(below, Tensor) and below.requires_grad) and not call.kwargs.get("rounding_mode")
        return call.run() if constant else self.unknown(call)

    def elementwise(self, call: Call) -> Any:
        """Activations: (f(x) - f(b)) / (x - b), and the derivative where x and b all but agree."""
        x = call.carriers[0]
        others = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, Tensor) and v is not x]
        if len(call.carriers) > 1 or not self._paired(x) or any(v.ndim and v.shape[0] == x.shape[0] for v in others):
            return self.unknown(call)
        if call.name == "pow" and call.args[0] is not x:
            return self.unknown(call)
        self.met["activation"] += 1
        with torch.no_grad():
            value = call.run()
        above, below = x.detach()[0::2], x.detach()[1::2]
        step = above - below
        # Below this, rounding spoils the quotient more than curvature spoils the derivative.
        flat = step.abs() <= torch.finfo(x.dtype).eps ** (2 / 3) * torch.maximum(above.abs(), below.abs())
        slope = (value[0::2] - value[1::2]) / torch.where(flat, 1, step)
        if bool(flat.any()):
            with torch.enable_grad():
                middle = ((above + below) / 2).requires_grad_()
                (derivative,) = torch.autograd.grad(call.with_(x, middle).run().sum(), middle)
            slope = torch.where(flat, derivative, slope)
        return redirect(value, (x, _both(slope)))

    def max_pool(self, call: Call) -> Any:
        """Max pooling: the change of the maximum goes to the winners of both rows, over their own change."""
        x = call.carriers[0]
        adaptive = call.name.startswith("adaptive")
        n_dims, position = int(call.name[-2]), 2 if adaptive else 6
        wants_indices = call.get("return_indices", position, False)
        if x.ndim != n_dims + 2 or not self._paired(x):
            return self.unknown(call)
        self.met["max pool"] += 1
        kwargs = {k: v for k, v in call.kwargs.items() if k != "return_indices"}
        with torch.no_grad():
            value, indices = getattr(F, f"{call.name}_with_indices")(*call.args[:position], **kwargs)
        shape = x.shape
        step = (x.detach()[0::2] - x.detach()[1::2]).flatten(2)
        y, y_baseline = value[0::2].flatten(2), value[1::2].flatten(2)
        top = torch.maximum(y, y_baseline)
        at, at_baseline = indices[0::2].flatten(2), indices[1::2].flatten(2)
        gained, lost = top - y_baseline, y - top

        def route(g: Tensor) -> Tensor:
            g = g[0::2].flatten(2)
            moved = torch.zeros_like(step).scatter_add_(2, at, g * gained).scatter_add_(2, at_baseline, g * lost)
            plain = torch.zeros_like(step).scatter_add_(2, at, g)
            still = step == 0
            return _both(torch.where(still, plain, moved / torch.where(still, 1, step))).reshape(shape)

        out = routed(value, x, route)
        return (out, indices) if wants_indices else out


def _a(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return call.args, call.kwargs


_M = RescaleMode
_GROUPS: list[tuple[Handler, str]] = [
    (_M.elementwise, "relu leaky_relu prelu rrelu relu6 hardtanh hardswish hardsigmoid hardshrink softshrink threshold"),
    (_M.elementwise, "silu gelu tanh sigmoid softplus mish elu celu selu softsign tanhshrink logsigmoid erf sin cos"),
    (_M.elementwise, "exp expm1 exp2 log log1p sqrt square pow abs clamp clamp_min clamp_max atan"),
    (_M.product, "mul"),
    (_M.quotient, "div rdiv"),
    (_M.moving, "transpose permute movedim t get_T get_mT adjoint"),
]
# May move or mix rows in a way that their shape does not tell.
_MAY_MIX = {"flip", "flipud", "rot90", "roll", "cumsum", "index_select", "gather", "index", "scatter", "index_add"} | {
    "scatter_add", "index_copy", "masked_scatter", "take", "take_along_dim", "as_strided", "cat", "stack", "get_H",
}  # fmt: skip
RescaleMode.handlers = {
    **dict.fromkeys(LINEAR - _MAY_MIX, _M.plain),
    **dict.fromkeys(AVERAGE_POOLS, _M.plain),
    **dict.fromkeys(CONVOLUTIONS | DENSE | {"batch_norm"}, _M.layer),
    **dict.fromkeys(MAX_POOLS, _M.max_pool),
    "cat": _M.plain,
    **{name: handler for handler, names in _GROUPS for name in names.split()},
}
