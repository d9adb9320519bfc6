"""Layer-wise relevance propagation for any network: LRP composites, RelP and AttnLRP are settings of one mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nissl.errors import RuleError
from nissl.network import expand
from nissl.network.rules import affine as layers
from nissl.network.rules.mode import (
    AVERAGE_POOLS,
    CONVOLUTIONS,
    DENSE,
    LINEAR,
    MAX_POOLS,
    RANK,
    REARRANGING,
    Call,
    Handler,
    RuleMode,
    mark_of,
    put_mark,
    redirect,
    stabilised,
)

# Inputs closer to zero than this take the activation's slope there: f(x)/x at x = ±1e-6.
NEAR_ZERO = 1e-6


@dataclass(frozen=True)
class Policy:
    """What each kind of operation does with relevance.

    Attributes
    ----------
    name : str
    norm : bool
        Hold the scale of a normalisation constant; else plain gradient.
    softmax : bool
        Hold softmax constant; else plain gradient.
    activation : bool
        Activations hand on x f(x)/x with f(x)/x constant, and gates are constant; else plain gradient.
    product : bool
        Elementwise products of two activations give half to each; else plain gradient.
    matmul : bool
        The same for matrix products of two activations.
    dense, convolution : str
        ``plain``, ``epsilon``, ``plus``, ``alpha_beta`` or ``gamma``.
    first : str or None
        ``flat`` or ``box`` at the first layer.
    pool : bool
        Normalise average pooling by its own output.
    gamma, epsilon : float
    low, high : number or tuple, optional
        Box of the first layer.
    """

    name: str
    norm: bool = True
    softmax: bool = True
    activation: bool = True
    product: bool = True
    matmul: bool = True
    dense: str = "plain"
    convolution: str = "plain"
    first: str | None = None
    pool: bool = False
    gamma: float = 0.25
    epsilon: float = 1e-6
    low: layers.Box | None = None
    high: layers.Box | None = None

    def holds(self, kind: str | None) -> bool:
        """Whether a factor of this kind is constant where it meets a signal."""
        if kind == "norm":
            return self.norm
        return self.softmax if kind == "softmax" else self.activation


class RelevanceMode(RuleMode):
    """Hands relevance back by a policy."""

    handlers: dict[str, Handler] = {}  # noqa: RUF012 filled below, never changed

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.name)
        self.policy = policy

    # ---------------------------------------------------------------- between the input and the first layer

    def handle(self, call: Call) -> Any:
        """Answer a call; at the input, turn gradients into relevance where a special first layer asks for it."""
        if self.policy.first is not None and call.name not in _RAW_SAFE:
            call = self._leave_input(call)
        return super().handle(call)

    def _raw(self, t: Tensor) -> bool:
        # A view or copy of the input stays raw through later changes in place, unlike the other marks.
        mark = getattr(t, "_nissl_mark", None)
        return self.policy.first is not None and (t.is_leaf or (mark is not None and mark.raw))

    def _leave_input(self, call: Call) -> Call:
        """From raw tensors on, relevance is tensor times gradient."""
        for t in {id(t): t for t in call.carriers if self._raw(t)}.values():
            call = call.with_(t, redirect(t.detach(), (t, t.detach())))
        return call

    def write(self, call: Call, target: Tensor) -> Any:
        """Write into a tensor: raw or held only if all of it is."""
        values = [t for t in call.carriers if t is not target]
        raw_value = any(self._raw(t) for t in values)
        raw_target = target.requires_grad and self._raw(target)
        if raw_target and not raw_value and values:
            raise RuleError(f"{self.name}: the network writes an activation into its own input, which has no rule")
        raw = raw_value and (raw_target or not target.requires_grad)
        if raw_value and not raw:
            call = self._leave_input(call)
        kinds = [self._kind(t) for t in (*values, *([target] if target.requires_grad else []))]
        out = call.run()
        put_mark(target, kinds[0] if kinds and all(kinds) else None, raw)
        return out

    def _write(self, target: Tensor, out: Tensor) -> Tensor:
        was_raw_view = target._is_view() and target.requires_grad and self._raw(target)
        mark = mark_of(out)
        if was_raw_view and not (mark is not None and mark.raw):
            raise RuleError(f"{self.name}: the network writes an activation over a part of its own input")
        return super()._write(target, out)

    # ---------------------------------------------------------------- linear operations

    def linear(self, call: Call) -> Any:
        """Rearranging, adding, scaling: the plain gradient, which is in proportion to the parts."""
        carriers = call.carriers
        if self.policy.first is not None and call.name in _RAW_SAFE:
            raw = [self._raw(t) for t in carriers]
            if all(raw) and (call.name in REARRANGING or len(carriers) == 1):
                return self._raw_linear(call)
            if any(raw):
                call = self._leave_input(call)
        out = call.run()
        kinds = [self._kind(t) for t in carriers]
        if all(kinds):
            kind = min(kinds, key=RANK.__getitem__)
            self.each(out, lambda t: _held(t, kind))
        return out

    def _raw_linear(self, call: Call) -> Any:
        """Before the first layer: relevance moves with its pixel, whatever the pixel is scaled by."""
        out = call.run()
        if call.name not in REARRANGING:
            x = call.carriers[0]
            out = redirect(out, (x.expand_as(out), 1.0))
        self.each(out, _mark_raw)
        return out

    def layer(self, call: Call) -> Any:
        """Convolutions, dense layers and matrix products."""
        policy = self.policy
        if len(call.carriers) > 1 or policy.dense == "plain":
            return self._matrix_product(self._leave_input(call))
        a = layers.affine(call)
        if a is None:
            return self._without_weight(self._leave_input(call))
        with torch.no_grad():
            value = call.run()
        out = self._propagate(a, value)
        if a.outputs is not None:
            put_mark(out, affine=a)
        return out

    def _propagate(self, a: layers.Affine, value: Tensor) -> Tensor:
        policy = self.policy
        first = self._raw(a.x)
        rule = policy.first if first else policy.convolution if a.kind == "convolution" else policy.dense
        self.met["first" if first else a.kind] += 1
        match rule:
            case "epsilon":
                return layers.epsilon(a, value, policy.epsilon)
            case "plus":
                return layers.plus(a, value, policy.epsilon)
            case "alpha_beta":
                return layers.alpha_beta(a, value, policy.epsilon)
            case "gamma":
                return layers.gamma(a, value, policy.epsilon, policy.gamma)
            case "flat":
                return layers.flat(a, value, policy.epsilon)
            case "box":
                assert policy.low is not None and policy.high is not None
                return layers.box(a, value, policy.epsilon, policy.low, policy.high)
        raise AssertionError(rule)

    def _without_weight(self, call: Call) -> Any:
        """Layers of which only the bias, or only a weight, carries relevance."""
        if call.name in ("addmm", "addmv", "baddbmm") and call.carriers[0] is call.get("input", 0):
            return call.run()
        if call.name == "linear" and call.carriers[0] is call.get("bias", 2):
            return call.run()
        if call.name == "linear" and call.carriers[0] is call.get("weight", 1):
            return self._matrix_product(call)
        if call.name in ("einsum", "bilinear", "tensordot", "inner"):
            y = call.run()
            return redirect(y, (y, y.detach() / stabilised(y.detach(), self.policy.epsilon)))
        return self.unknown(call)

    def _matrix_product(self, call: Call) -> Any:
        """Products of which no factor, or several, are weights."""
        carriers = call.carriers
        if len(carriers) == 1:
            return call.run()
        if call.name in ("matmul", "rmatmul", "inner", "tensordot") or (call.name == "einsum" and len(carriers) == 2):
            return self._times(call, self.policy.matmul, "matmul")
        with self:
            if call.name in ("addmm", "baddbmm"):
                names = ("mat1", "mat2") if call.name == "addmm" else ("batch1", "batch2")
                left, right = (call.get(k, i + 1) for i, k in enumerate(names))
                beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
                return call.get("input", 0) * beta + torch.matmul(left, right) * alpha
            if call.name == "linear":
                y = torch.matmul(call.get("input", 0), call.get("weight", 1).transpose(-1, -2))
                bias = call.get("bias", 2)
                return y if bias is None else y + bias
        if call.name == "bilinear" and call.get("weight", 2) not in carriers:
            return self._bilinear(call)
        return self.unknown(call)

    def _bilinear(self, call: Call) -> Any:
        left, right, weight, bias = (call.get(k, i) for i, k in enumerate(("input1", "input2", "weight", "bias")))
        with self:
            y = torch.einsum("...i,oij,...j->...o", left, weight, right)
            return y if bias is None else y + bias

    def average_pool(self, call: Call) -> Any:
        """Average pooling, normalised by its own output where the policy says so."""
        y = call.run()
        if not self.policy.pool:
            return y
        value = y.detach()
        return redirect(value, (y, value / stabilised(value, self.policy.epsilon)))

    def batch_norm(self, call: Call) -> Any:
        """An affine map; part of the layer before it where there is one."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        x, mean, var, weight, bias, training, _, eps = (
            call.get(k, i, d) for i, (k, d) in enumerate(zip(names, (*[None] * 5, False, 0.1, 1e-5), strict=True))
        )
        if training or mean is None or len(call.carriers) != 1:
            return self.unknown(self._leave_input(call))
        if self._raw(x):
            return self._raw_linear(call)
        mark = mark_of(x)
        if mark is None or mark.affine is None:
            return call.run()
        with torch.no_grad():
            value = call.run()
            scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
            shift = -mean * scale if bias is None else bias - mean * scale
        key = "first" if self._raw(mark.affine.x) else mark.affine.kind
        self.met[key] -= 1  # counted when the layer ran, and once more below
        self.met["batch norm"] += 1
        return self._propagate(mark.affine.scaled(scale, shift), value)

    # ---------------------------------------------------------------- activations, gates, products

    def _kind(self, t: Tensor) -> str | None:
        mark = mark_of(t)
        return None if mark is None else mark.held

    def homogeneous(self, call: Call) -> Any:
        """ReLU and its like: f(x)/x is the derivative."""
        self.met["activation"] += 1
        return call.run()

    def activation(self, call: Call) -> Any:
        """Identity rule: x f(x)/x with f(x)/x constant."""
        self.met["activation"] += 1
        return self._identity(call)

    def power(self, call: Call) -> Any:
        """Powers: positive ones as activations, negative and varying ones as scales of a normalisation."""
        x, exponent = call.args[0], call.get("exponent", 1, 2) if call.name == "pow" else 2
        if len(call.carriers) > 1 or not isinstance(x, Tensor) or x is not call.carriers[0]:
            return self.scale(call)
        kind = self._kind(x)
        if not self.policy.norm:
            return call.run()
        if isinstance(exponent, (int, float)) and exponent >= 1 and kind is None:
            return self._identity(call)
        return self.scale(call)

    def _identity(self, call: Call) -> Any:
        if not self.policy.activation:
            out = call.run()
        elif len(call.carriers) != 1 or not isinstance(call.args[0] if call.args else call.carriers[0], Tensor):
            return self.unknown(call)
        else:
            x = call.carriers[0]
            with torch.no_grad():
                value = call.run()
                point = x.detach()
                if point.dtype in (torch.float16, torch.bfloat16):
                    point = point.float()
                point = torch.where(point.abs() < NEAR_ZERO, torch.where(point < 0, -NEAR_ZERO, NEAR_ZERO), point)
                ratio = (call.with_(x, point).run() / point).to(value.dtype)
            out = redirect(value, (x, ratio))
        kind = _GATES.get(call.name)
        if kind is not None:
            _held(out, kind)
        return out

    def scale(self, call: Call) -> Any:
        """Functions that make up the scale of a normalisation: constant in a product or quotient, else an error."""
        out = call.run()
        if self.policy.norm:
            out = self.each(out, lambda t: self.blocked(t, call))
        self.each(out, lambda t: _held(t, "norm"))
        return out

    def moments(self, call: Call) -> Any:
        """``var_mean`` and ``std_mean``: the spread is a scale, the mean is linear."""
        spread, mean = call.run()
        if self.policy.norm:
            spread = self.blocked(spread, call)
        return _held(spread, "norm"), mean

    def exponential(self, call: Call) -> Any:
        """Exp and its like are parts of gates: constant in a product or quotient, else an error."""
        out = call.run()
        if self.policy.activation:
            out = self.blocked(out, call)
        return _held(out, "gate")

    def softmax(self, call: Call) -> Any:
        """Constant where it weighs something, or the plain gradient."""
        self.met["softmax"] += 1
        out = call.run()
        return _held(self.blocked(out, call), "softmax") if self.policy.softmax else out

    def product(self, call: Call) -> Any:
        """Products: with a constant linear, with a gate the gate is constant, of two signals half to each."""
        if len(call.carriers) == 1:
            return self.linear(call)
        return self._times(self._leave_input(call), self.policy.product, "product")

    def _times(self, call: Call, half: bool, counted: str) -> Any:
        left, right = call.carriers[:2]
        kinds = self._kind(left), self._kind(right)
        ranks = RANK[kinds[0]], RANK[kinds[1]]
        if ranks[0] != ranks[1]:
            gate, kind, rest = (left, kinds[0], kinds[1]) if ranks[0] > ranks[1] else (right, kinds[1], kinds[0])
            if kind != "softmax":
                self.met[str(kind)] += 1
            out = call.with_(gate, gate.detach()).run() if self.policy.holds(kind) else call.run()
            return out if rest is None else _held(out, rest)
        if kinds[0] in ("norm", "softmax"):
            out = self.unknown(call) if self.policy.holds(kinds[0]) else call.run()
            return _held(out, kinds[0])
        y = call.run()
        self.met[counted] += 1
        # With both factors at half their gradient, each factor times its gradient is half of the product's relevance.
        out = redirect(y.detach(), (y, 0.5)) if half else y
        return out if kinds[0] is None else _held(out, kinds[0])

    def quotient(self, call: Call) -> Any:
        """Quotients: linear in the numerator; the denominator is the scale of a normalisation, else there is no rule."""
        if call.kwargs.get("rounding_mode") is not None:
            return self.unknown(self._leave_input(call))
        above, below = call.pair()
        if call.name in ("rdiv", "reciprocal"):
            above, below = (below if call.name == "rdiv" else 1), above
        if not (isinstance(below, Tensor) and below.requires_grad):
            return self.linear(call)
        call = self._leave_input(call)
        kind = self._kind(below)
        numerator = self._kind(above) if isinstance(above, Tensor) and above.requires_grad else None
        if isinstance(above, Tensor) and above.requires_grad and RANK[kind] > RANK[numerator]:
            if kind != "softmax":
                self.met[str(kind)] += 1
            if not self.policy.holds(kind):
                return call.run()
            out = call.with_(below, below.detach()).run()
            return out if numerator is None else _held(out, numerator)
        if kind is None:
            return self.unknown(call)
        out = self.unknown(call) if self.policy.holds(kind) else call.run()
        return _held(out, kind)

    def clamp(self, call: Call) -> Any:
        """Limits: of a held scale it stays held, of a signal it is an activation."""
        kinds = [self._kind(t) for t in call.carriers]
        if len(kinds) == 1 and kinds[0] is not None:
            return _held(call.run(), kinds[0])
        return self.activation(call)

    def maximum(self, call: Call) -> Any:
        """Maxima follow the gradient, to the winner."""
        out = call.run()
        kinds = [self._kind(t) for t in call.carriers]
        if all(kinds):
            self.each(out, lambda t: _held(t, kinds[0]))
        return out

    def unknown(self, call: Call) -> Any:
        """An error once relevance arrives; what comes from held tensors stays held."""
        out = super().unknown(call)
        kinds = [self._kind(t) for t in call.carriers]
        if all(kinds):
            self.each(out, lambda t: _held(t, kinds[0]))
        return out

    # ---------------------------------------------------------------- fused calls

    def attention(self, call: Call) -> Any:
        """``scaled_dot_product_attention``, written out."""
        with self:
            return expand.scaled_dot_product_attention(*call.args, **call.kwargs)

    def heads(self, call: Call) -> Any:
        """``multi_head_attention_forward``, written out."""
        with self:
            return expand.multi_head_attention(*call.args, **call.kwargs)

    def gated_linear(self, call: Call) -> Any:
        """``glu``: one half times the sigmoid of the other."""
        with self:
            signal, gate = call.get("input", 0).chunk(2, call.get("dim", 1, -1))
            return signal * torch.sigmoid(gate)

    def multiply_add(self, call: Call) -> Any:
        """``addcmul``."""
        with self:
            start, left, right = (call.get(k, i) for i, k in enumerate(("input", "tensor1", "tensor2")))
            return start + left * right * call.kwargs.get("value", 1)

    def lerp(self, call: Call) -> Any:
        """``start + weight (end - start)``."""
        with self:
            start, end, weight = (call.get(k, i) for i, k in enumerate(("input", "end", "weight")))
            return start + (end - start) * weight

    def _normalised(self, x: Tensor, dims: tuple[int, ...], eps: float, centre: bool) -> Tensor:
        """(x - mean) / scale with the scale constant."""
        kept = x.dtype
        if kept in (torch.float16, torch.bfloat16):
            x = x.float()
        if centre:
            x = x - x.mean(dims, keepdim=True)
        scale = torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)
        self.met["norm"] += 1
        return (x * scale).to(kept)

    def layer_norm(self, call: Call) -> Any:
        """``layer_norm`` and ``rms_norm``, written out."""
        if not self.policy.norm or len(call.carriers) != 1:
            return call.run() if not self.policy.norm else self.unknown(call)
        x, shape, weight = (call.get(k, i) for i, k in enumerate(("input", "normalized_shape", "weight")))
        centre = call.name == "layer_norm"
        bias = call.get("bias", 3) if centre else None
        eps = call.get("eps", 4, 1e-5) if centre else call.get("eps", 3)
        if eps is None:
            eps = torch.finfo(x.dtype).eps
        y = self._normalised(x, tuple(range(-len(shape), 0)), eps, centre)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def group_norm(self, call: Call) -> Any:
        """``group_norm`` and ``instance_norm``, written out."""
        if not self.policy.norm or len(call.carriers) != 1:
            return call.run() if not self.policy.norm else self.unknown(call)
        x = call.get("input", 0)
        if call.name == "group_norm":
            groups = call.get("num_groups", 1)
            weight, bias, eps = call.get("weight", 2), call.get("bias", 3), call.get("eps", 4, 1e-5)
        else:
            if not call.get("use_input_stats", 5, True):
                return call.run()
            groups = x.shape[1]
            weight, bias, eps = call.get("weight", 3), call.get("bias", 4), call.get("eps", 7, 1e-5)
        y = self._normalised(x.reshape(x.shape[0], groups, -1), (-1,), eps, centre=True).reshape(x.shape)
        per_channel = (-1, *[1] * (x.ndim - 2))
        y = y if weight is None else y * weight.reshape(per_channel)
        return y if bias is None else y + bias.reshape(per_channel)

    def normalize(self, call: Call) -> Any:
        """``normalize``: division by a norm."""
        if not self.policy.norm:
            return call.run()
        x, p, dim, eps = (
            call.get(k, i, d) for i, (k, d) in enumerate((("input", None), ("p", 2.0), ("dim", 1), ("eps", 1e-12)))
        )
        self.met["norm"] += 1
        return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)


def _held(t: Tensor, kind: str | None) -> Tensor:
    """Mark a result as the factor of a product that is held constant there."""
    put_mark(t, held=kind)
    return t


def _mark_raw(t: Tensor) -> Tensor:
    put_mark(t, raw=True)
    return t


# Activations that are gates where they multiply a signal: x (1 + tanh(...)) is then x f(x)/x of GELU as it should be.
_GATES = {"tanh": "tanh", "erf": "tanh", "sigmoid": "gate", "hardsigmoid": "gate", "softmax": "softmax"}
_M = RelevanceMode
_GROUPS: list[tuple[Handler, str]] = [
    (_M.activation, "silu gelu tanh erf sigmoid hardsigmoid softplus mish elu celu selu softsign tanhshrink hardswish"),
    (_M.activation, "relu6 hardtanh hardshrink softshrink threshold logsigmoid log_sigmoid sin"),
    (_M.homogeneous, "relu leaky_relu prelu rrelu abs"),
    (_M.clamp, "clamp clamp_min clamp_max"),
    (_M.power, "pow square"),
    (_M.scale, "rsqrt sqrt std var norm reciprocal"),
    (_M.moments, "var_mean std_mean"),
    (_M.exponential, "exp expm1 exp2 rpow"),
    (_M.softmax, "softmax"),
    (_M.product, "mul"),
    (_M.quotient, "div rdiv"),
    (_M.maximum, "max min amax amin maximum minimum"),
    (_M.batch_norm, "batch_norm"),
    (_M.attention, "scaled_dot_product_attention"),
    (_M.heads, "multi_head_attention_forward"),
    (_M.layer_norm, "layer_norm rms_norm"),
    (_M.group_norm, "group_norm instance_norm"),
    (_M.normalize, "normalize"),
    (_M.gated_linear, "glu"),
    (_M.multiply_add, "addcmul"),
    (_M.lerp, "lerp"),
]
RelevanceMode.handlers = {
    **dict.fromkeys(LINEAR, _M.linear),
    **dict.fromkeys(MAX_POOLS, _M.maximum),
    **dict.fromkeys(AVERAGE_POOLS, _M.average_pool),
    **dict.fromkeys(CONVOLUTIONS | DENSE, _M.layer),
    **{name: handler for handler, names in _GROUPS for name in names.split()},
}
# Calls that say themselves what they do with a raw input.
_RAW_SAFE = (
    REARRANGING
    | CONVOLUTIONS
    | DENSE
    | {"add", "sub", "rsub", "neg", "mul", "div", "rdiv", "batch_norm", "multi_head_attention_forward"}
    | {"scaled_dot_product_attention"}
)
