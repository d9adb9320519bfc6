"""The rule sets: guided, deconvolution, layer-wise relevance propagation, RelP, AttnLRP, DeepLIFT's rescale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import is_number
from nissl.errors import InputError, RuleError
from nissl.network.rules import operations as op
from nissl.network.rules.mode import (
    RANK,
    RuleMode,
    argument,
    carriers,
    depends,
    each,
    held_as,
    hold,
    mark_of,
    operands,
    put_mark,
    replaced,
    rewire,
    scaled,
    stabilised,
    valued,
)

COMPOSITES = (
    "epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_plus_wsquare", "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat", "epsilon_gamma", "epsilon_gamma_box",
)  # fmt: skip


class Rules(ABC):
    """A set of backward rules.

    Rules change how gradients flow and leave every value of the forward pass as it is. They work in gradient form: the
    relevance of an activation x is x times the modified gradient at x, except at the input under rule sets with a
    special first layer (`relevance_at_input`), where the gradient is the relevance itself.

    Attributes
    ----------
    name : str
    group : int
        Rows come in groups of so many; 2 for pairs of input and baseline.
    relevance_at_input : bool
    """

    group: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """What errors and reports call it."""
        return type(self).__name__

    @property
    def relevance_at_input(self) -> bool:
        """Whether the gradient at the input is the relevance itself."""
        return False

    @abstractmethod
    def mode(self) -> RuleMode:
        """A fresh mode for one forward pass."""


@dataclass(frozen=True)
class Guided(Rules):
    """Guided backpropagation: through a ReLU pass only positive gradients, where its input was positive.

    References
    ----------
    Springenberg, Dosovitskiy, Brox, Riedmiller: Striving for simplicity (2015).
    """

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _ReluMode(self.name, masked=True)


@dataclass(frozen=True)
class Deconvolution(Rules):
    """Deconvolution: through a ReLU pass only positive gradients, whatever its input was.

    References
    ----------
    Zeiler, Fergus: Visualizing and understanding convolutional networks (2014).
    """

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _ReluMode(self.name, masked=False)


class _ReluMode(RuleMode):
    strict = False

    def __init__(self, name: str, masked: bool) -> None:
        super().__init__(name)
        self.masked = masked
        self.depth = 0

    def __enter__(self) -> Any:
        self.depth += 1
        return super().__enter__()

    def activation(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not _is_relu(name, args, kwargs):
            return func(*args, **kwargs)
        self.met["relu"] += 1
        x = argument(args, kwargs, 0, "input")
        with torch.no_grad():
            y = func(*args, **kwargs)
        if not self.masked:
            return rewire(y, lambda g: g.clamp(min=0), x)
        passes = (x.detach() > 0) & (x.detach() == y)  # x == y: not cut off from above (ReLU6)
        return rewire(y, lambda g: g.clamp(min=0) * passes, x)

    def unknown(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def finished(self) -> None:
        self.depth -= 1
        if self.depth == 0 and not self.met["relu"]:
            raise RuleError(f"{self.name} changes ReLUs only, and the forward pass met none")


def _is_relu(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    if name in op.RELU:
        return True
    if name == "threshold":
        return argument(args, kwargs, 1, "threshold") == 0 and argument(args, kwargs, 2, "value") == 0
    low = None
    if name == "hardtanh":
        low = argument(args, kwargs, 1, "min_val", -1.0)
    elif name in ("clamp", "clamp_min"):
        low = argument(args, kwargs, 1, "min")
    return isinstance(low, (int, float)) and low == 0


# Inputs of an activation closer to zero than this take the ratio f(x) / x there.
_NEAR_ZERO = 1e-6


class _ConservingMode(RuleMode):
    """What LRP, RelP and AttnLRP share: identity rule, half rule, constant gates and scales, expanded norms.

    Gates and scales are constant where they multiply or divide a signal. What is not used so stays what it is: a
    sigmoid then follows the identity rule, and relevance that reaches a scale (the root of a variance, say) raises.

    Parameters
    ----------
    name : str
    norm, identity, half, attention : bool
        Which rules are on; where one is off, the plain gradient flows. `attention` holds softmax constant.
    """

    def __init__(
        self, name: str, norm: bool = True, identity: bool = True, half: bool = True, attention: bool = True
    ) -> None:
        super().__init__(name)
        self.norms, self.identity, self.half, self.attention = norm, identity, half, attention

    def _constant(self, kind: str | None) -> bool:
        return {"norm": self.norms, "softmax": self.attention}.get(str(kind), self.identity)

    def structure(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        kinds = [held_as(t) for t in carriers(args, kwargs)]
        return hold(out, min(kinds, key=RANK.__getitem__)) if all(kinds) else out

    def activation(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        carrying = carriers(args, kwargs)
        if name in op.LIMITS and len(carrying) == 1 and held_as(carrying[0]):
            return hold(func(*args, **kwargs), held_as(carrying[0]))
        if name in op.HOMOGENEOUS or not self.identity:  # f(x) / x is the gradient
            out = func(*args, **kwargs)
        else:
            out = self._ratio(name, func, args, kwargs)
        return hold(out, "tanh") if name in ("tanh", "erf") else out

    def _ratio(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Identity rule: x f(x) / x with f(x) / x constant."""
        carrying = carriers(args, kwargs)
        if len(carrying) != 1 or (args and args[0] is not carrying[0]):
            return self.unknown(name, func, args, kwargs)
        x = carrying[0]
        with torch.no_grad():
            y = func(*args, **kwargs)
            point = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
            near = torch.where(point < 0, -_NEAR_ZERO, _NEAR_ZERO).to(point.dtype)
            point = torch.where(point.abs() < _NEAR_ZERO, near, point)
            ratio = (func(*replaced(args, x, point), **replaced(kwargs, x, point)) / point).to(y.dtype)
        return rewire(y, lambda g: g * ratio, x)

    def gate(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.met["gate"] += 1
        out = self._ratio(name, func, args, kwargs) if self.identity else func(*args, **kwargs)
        return hold(out, "gate")

    def exponential(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        return hold(self.refuse(out, name) if self.identity else out, "gate")

    def power(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, exponent = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "exponent", 2)
        growing = isinstance(exponent, (int, float)) and exponent >= 1
        if growing and depends(x) and held_as(x) is None:
            return self._ratio(name, func, args, kwargs) if self.norms and self.identity else func(*args, **kwargs)
        return self.scale(name, func, args, kwargs)

    def scale(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if name in ("var_mean", "std_mean"):
            spread, mean = out
            return hold(self.refuse(spread, name) if self.norms else spread, "norm"), mean
        return hold(each(out, lambda t: self.refuse(t, name)) if self.norms else out, "norm")

    def softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        return hold(self.refuse(out, "softmax"), "softmax") if self.attention else out

    def unknown(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = super().unknown(name, func, args, kwargs)
        kinds = [held_as(t) for t in carriers(args, kwargs)]
        return hold(out, kinds[0]) if all(kinds) else out

    def product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        first, second = carriers(args, kwargs)[:2]
        kinds = held_as(first), held_as(second)
        if RANK[kinds[0]] != RANK[kinds[1]]:
            if RANK[kinds[0]] < RANK[kinds[1]]:
                first, kinds = second, (kinds[1], kinds[0])
            return self._gated(func, args, kwargs, first, *kinds)
        if kinds[0] in ("norm", "softmax"):
            out = self.unknown(name, func, args, kwargs) if self._constant(kinds[0]) else func(*args, **kwargs)
            return hold(out, kinds[0])
        if len(carriers(args, kwargs)) > 2:
            return self.unknown(name, func, args, kwargs)
        self.met["product" if name == "mul" else "matrix_product"] += 1
        out = func(*args, **kwargs)
        # With both factors at half their gradient, the relevance of each is half of the product's.
        if self.half and (name == "mul" or self.halves_matrices):
            out = scaled(out, 0.5)
        return hold(out, kinds[0]) if kinds[0] else out

    halves_matrices = True

    def _gated(
        self, func: Any, args: Any, kwargs: dict[str, Any], gate: Tensor, kind: str | None, signal: str | None
    ) -> Any:
        """A product or quotient in which one factor is a gate or a scale; `signal` is the kind of the other."""
        if kind == "norm":
            self.met["norm"] += 1
        if self._constant(kind):
            args, kwargs = replaced(args, gate, gate.detach()), replaced(kwargs, gate, gate.detach())
        out = func(*args, **kwargs)
        return hold(out, signal) if signal else out

    def division(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        above, below = operands(args, kwargs)
        if name == "rdiv":
            above, below = below, above
        if kwargs.get("rounding_mode") is not None:
            return self.unknown(name, func, args, kwargs)
        if not depends(below):
            return self.structure(name, func, args, kwargs)
        kind, signal = held_as(below), held_as(above)
        if depends(above) and RANK[kind] > RANK[signal]:
            return self._gated(func, args, kwargs, below, kind, signal)
        if kind is None or self._constant(kind):
            return self.unknown(name, func, args, kwargs)
        return hold(func(*args, **kwargs), kind)

    def norm(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.norms:
            return func(*args, **kwargs)
        if len(carriers(args, kwargs)) != 1:
            return self.unknown(name, func, args, kwargs)
        with torch.no_grad():
            y = func(*args, **kwargs)
        return valued(y, _norm_graph(name, argument(args, kwargs, 0, "input"), args, kwargs))


def _norm_graph(name: str, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A normalisation with its scale held constant."""

    def arg(i: int, key: str, default: Any = None) -> Any:
        return args[i] if len(args) > i else kwargs.get(key, default)

    kept = x.dtype
    if kept in (torch.float16, torch.bfloat16):
        return _norm_graph(name, x.float(), args, kwargs).to(kept)
    if name == "normalize":
        p, dim, eps = arg(1, "p", 2.0), arg(2, "dim", 1), arg(3, "eps", 1e-12)
        return x / x.detach().norm(p, dim, keepdim=True).clamp_min(eps)
    if name in ("layer_norm", "rms_norm"):
        shape = arg(1, "normalized_shape")
        dims = tuple(range(-len(shape), 0))
        weight, bias = arg(2, "weight"), arg(3, "bias") if name == "layer_norm" else None
        if name == "layer_norm":
            eps = arg(4, "eps", 1e-5)
            centred = x - x.mean(dims, keepdim=True)
            out = centred * (centred.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
        else:
            eps = arg(3, "eps")
            eps = torch.finfo(x.dtype).eps if eps is None else eps
            out = x * (x.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
        out = out if weight is None else out * weight
        return out if bias is None else out + bias
    groups = arg(1, "num_groups") if name == "group_norm" else x.shape[1]
    weight = arg(2, "weight") if name == "group_norm" else arg(3, "weight")
    bias = arg(3, "bias") if name == "group_norm" else arg(4, "bias")
    eps = arg(4, "eps", 1e-5) if name == "group_norm" else arg(7, "eps", 1e-5)
    if name == "instance_norm" and not arg(5, "use_input_stats", True):
        mean, var = arg(1, "running_mean"), arg(2, "running_var")
        shape = (1, -1, *[1] * (x.ndim - 2))
        out = (x - mean.reshape(shape)) * (var.reshape(shape) + eps).rsqrt()
    else:
        grouped = x.reshape(x.shape[0], groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        out = (centred * (centred.detach().square().mean(2, keepdim=True) + eps).rsqrt()).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


@dataclass(frozen=True)
class RelP(Rules):
    """Relevance patching: softmax and norms constant, identity rule for activations, halves for products.

    Linear layers keep the plain gradient. With all four rules on and no biases, relevance is conserved.

    Parameters
    ----------
    norm : bool, default True
        LN-rule: the scale of a normalisation is constant.
    identity : bool, default True
        Activations f hand on x f(x) / x with f(x) / x constant, and gates are constant.
    half : bool, default True
        Products of two activations give half to each.
    attention : bool, default True
        AH-rule: softmax is constant, so relevance goes through the values alone. The authors' released code leaves it
        off; then softmax and the matrix products around it keep the plain gradient.

    References
    ----------
    Rezaei Jafari, Eberle, Khakzar, Nanda: RelP (2025).
    """

    norm: bool = True
    identity: bool = True
    half: bool = True
    attention: bool = True

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        mode = _ConservingMode(self.name, self.norm, self.identity, self.half, self.attention)
        mode.halves_matrices = self.attention
        return mode


@dataclass(frozen=True)
class AttnLRP(Rules):
    """AttnLRP in gradient form: halves for every product, softmax by its gradient (its Taylor rule), norms constant.

    References
    ----------
    Achtibat et al.: AttnLRP (2024).
    """

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _ConservingMode(self.name, attention=False)


@dataclass(frozen=True)
class LRPRules(Rules):
    """Composites of layer-wise relevance propagation for convolutional networks.

    Parameters
    ----------
    composite : str, default "epsilon_plus"
        ``epsilon`` everywhere, or ``epsilon`` for dense layers and for convolutions z+ (``epsilon_plus``), alpha-beta
        (``epsilon_alpha2_beta1``) or gamma (``epsilon_gamma``); ``_flat``, ``_wsquare`` and ``_box`` name the
        rule of the first layer.
    epsilon : float, default 1e-6
        Also the stabiliser of all other rules.
    gamma : float, default 0.25
    low, high : float or sequence or tensor with one number a channel, optional
        Smallest and largest possible input of the first layer, for the box rule.
    merging : {"exact", "zennit"}, default "exact"
        Batch norm behind a convolution or dense layer is merged with it. zennit leaves a batch norm of unit variance
        behind, which still divides by sqrt(1 + eps): 5e-6 for torch's default eps, 5e-4 for the 1e-3 of some networks.
        ``exact`` leaves the forward pass as it is; ``zennit`` repeats the division, so that numbers agree, and is the
        only setting that changes what a network gives out.

    Notes
    -----
    Average pooling is normalised by its output, max pooling follows the gradient; biases take part in all rules.
    Normalisations, gates, softmax and products of activations are treated as in RelP.

    References
    ----------
    Bach et al. (2015); Montavon et al.: Layer-wise relevance propagation (2019); Kohlbrenner et al. (2020).
    """

    composite: str = "epsilon_plus"
    epsilon: float = 1e-6
    gamma: float = 0.25
    low: Any = None
    high: Any = None
    merging: str = "exact"

    def __post_init__(self) -> None:
        if self.merging not in ("zennit", "exact"):
            raise InputError(f"merging={self.merging!r}: choose 'zennit' or 'exact'")
        if self.composite not in COMPOSITES:
            raise InputError(f"composite={self.composite!r}: choose among {', '.join(COMPOSITES)}")
        if not (is_number(self.epsilon) and self.epsilon > 0 and is_number(self.gamma) and self.gamma >= 0):
            raise InputError(f"epsilon must be above 0 and gamma at least 0; got {self.epsilon}, {self.gamma}")
        if not self.composite.endswith("_box"):
            if not (self.low is None and self.high is None):
                raise InputError(f"low= and high= belong to composites with _box, not to {self.composite}")
            return
        low, high = _bounds(self.low), _bounds(self.high)
        if len(low) != len(high) and 1 not in (len(low), len(high)):
            raise InputError(f"low has {len(low)} channels and high has {len(high)}")
        n = max(len(low), len(high))
        pairs = zip(low * (n // len(low)), high * (n // len(high)), strict=True)
        if not all(a < b for a, b in pairs):
            raise InputError(
                f"the box rule needs the smallest and largest possible input, low < high; got {self.low}, {self.high}"
            )
        for name, bounds in (("low", low), ("high", high)):
            object.__setattr__(self, name, bounds[0] if len(bounds) == 1 else bounds)

    @property
    def name(self) -> str:
        """What errors and reports call it."""
        return f"LRP {self.composite}"

    @property
    def relevance_at_input(self) -> bool:
        """Whether the gradient at the input is the relevance itself."""
        return self.composite.endswith(("_flat", "_wsquare", "_box"))

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _LRPMode(self)


def _bounds(value: Any) -> tuple[float, ...]:
    if hasattr(value, "tolist"):
        # one number a channel may come in the shape that broadcasts over images, (1, channels, 1, 1)
        along = max(value.shape, default=1) == math.prod(value.shape)
        value = value.reshape(-1).tolist() if along and value.ndim > 1 else value.tolist()
    values = (value,) if isinstance(value, (int, float)) else value
    if not isinstance(values, (tuple, list)) or not values or not all(isinstance(v, (int, float)) for v in values):
        raise InputError(f"the box rule needs low= and high=, a number or one number a channel; got {value!r}")
    return tuple(float(v) for v in values)


# Operations that say themselves what they do with a tensor before the first layer.
_RAW = op.REARRANGING | op.LAYERS | {"add", "sub", "rsub", "neg", "mul", "div", "batch_norm", "glu", "lerp"}
_ARITHMETIC = op.words("add sub rsub neg mul div")


class _LRPMode(_ConservingMode):
    """Composites: `_ConservingMode` with rules for layers, the first layer, batch norm and average pooling.

    With a special first layer, what lies between the input and that layer is raw: relevance stays with its pixel,
    whatever the pixel is scaled by. A raw tensor that goes anywhere else than into a layer has relevance tensor times
    gradient.
    """

    def __init__(self, rules: LRPRules) -> None:
        super().__init__(rules.name)
        self.rules = rules
        self.special = rules.relevance_at_input

    def _raw(self, t: Tensor) -> bool:
        # Unlike the other marks, this one outlives changes in place: a view or copy of the input stays one.
        mark = getattr(t, "_nissl_mark", None)
        return self.special and t.requires_grad and (t.is_leaf or (mark is not None and mark.raw))

    def handle(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.special and name not in _RAW:
            args, kwargs = self._leave_input(args, kwargs)
        return super().handle(name, func, args, kwargs)

    def _leave_input(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        for t in {id(t): t for t in carriers(args, kwargs) if self._raw(t)}.values():
            value = t.detach().clone()
            signal = rewire(value.clone(), lambda g, value=value: g * value, t)
            args, kwargs = replaced(args, t, signal), replaced(kwargs, t, signal)
        return args, kwargs

    def structure(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self.special:
            return super().structure(name, func, args, kwargs)
        carrying = carriers(args, kwargs)
        if not all(self._raw(t) for t in carrying) or (name not in op.REARRANGING and len(carrying) > 1):
            return super().structure(name, func, *self._leave_input(args, kwargs))
        out = func(*args, **kwargs)
        if name in _ARITHMETIC:
            out = rewire(out.detach(), lambda g: g, carrying[0].expand_as(out))
        each(out, lambda t: put_mark(t, raw=True) or t)
        return out

    def write(self, func: Any, args: Any, kwargs: dict[str, Any], target: Tensor) -> Any:
        values = [t for t in carriers(args, kwargs) if t is not target]
        raw, raw_target = any(self._raw(t) for t in values), self._raw(target)
        if raw_target and values and not raw:
            raise RuleError(f"{self.name}: the network writes an activation into its own input, which has no rule")
        raw = raw and (raw_target or not target.requires_grad)
        if not raw:
            args, kwargs = self._leave_input(args, kwargs) if not raw_target else (args, kwargs)
        kinds = [held_as(t) for t in (*values, *([target] if target.requires_grad else []))]
        out = func(*args, **kwargs)
        put_mark(target, kinds[0] if kinds and all(kinds) else None, raw or raw_target)
        return out

    def overwrite(self, target: Tensor, out: Tensor) -> Tensor:
        mark = mark_of(out)
        if self._raw(target) and target._is_view() and not (mark is not None and mark.raw):
            raise RuleError(f"{self.name}: the network writes an activation over a part of its own input")
        return super().overwrite(target, out)

    def division(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        below = operands(args, kwargs)[1 if name == "div" else 0]
        if self.special and depends(below):
            args, kwargs = self._leave_input(args, kwargs)
        return super().division(name, func, args, kwargs)

    def product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return super().product(name, func, *self._leave_input(args, kwargs))

    def average_pool(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        y = func(*args, **kwargs)
        return scaled(y, y.detach() / stabilised(y.detach(), self.rules.epsilon))

    def linear_map(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.met["linear_map"] += 1
        y = func(*args, **kwargs)
        return scaled(y, y.detach() / stabilised(y.detach(), self.rules.epsilon))

    def layer(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        held = dict(zip(("input", "weight", "bias"), args[:3], strict=False)) | kwargs
        x, w, b = held.pop("input"), held.pop("weight"), held.pop("bias", None)
        rest = args[3:]
        if depends(w) or depends(b):
            if name != "linear":
                return self.unknown(name, func, *self._leave_input(args, kwargs))
            with self:
                y = torch.matmul(x, w.transpose(-1, -2))
                return y if b is None else y + b

        def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return func(x, w, b, *rest, **held)

        self.met["first" if self._raw(x) else "layer"] += 1
        y = apply(x, w, b)
        out = self._ruled(name, apply, x, w, b, y.detach(), graph=y)
        groups = argument(args, kwargs, 6, "groups", 1) if name.startswith("conv_transpose") else None
        put_mark(out, layer=(name, apply, x, x._version, w, b, groups))
        return out

    def batch_norm(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        keys = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        held = dict(zip(keys, args, strict=False)) | kwargs
        t, mean, var = held["input"], held["running_mean"], held["running_var"]
        if held.get("training", False) or mean is None or var is None:
            return self.unknown("batch_norm", func, *self._leave_input(args, kwargs))
        if len(carriers(args, kwargs)) > 1:
            return self.unknown("batch_norm", func, *self._leave_input(args, kwargs))
        if self._raw(t):
            out = rewire(func(*args, **kwargs).detach(), lambda g: g, t)
            put_mark(out, raw=True)
            return out
        mark = mark_of(t)
        if mark is None or mark.layer is None:
            return func(*args, **kwargs)
        name, apply, x, version, w, b, groups = mark.layer
        if x._version != version:
            return func(*args, **kwargs)
        scale = (var + held.get("eps", 1e-5)).rsqrt()
        if held.get("weight") is not None:
            scale = scale * held["weight"]
        shift = -mean * scale if held.get("bias") is None else held["bias"] - mean * scale
        if groups is None:
            merged_w = w * scale.reshape(-1, *[1] * (w.ndim - 1))
        else:  # transposed: outputs lie along the second dimension, group after group along the first
            split = w.reshape(groups, -1, *w.shape[1:])
            merged_w = (split * scale.reshape(groups, 1, -1, *[1] * (w.ndim - 2))).reshape(w.shape)
        merged_b = shift if b is None else b * scale + shift
        with torch.no_grad():
            y = func(*args, **kwargs)
        value = y / (1 + held.get("eps", 1e-5)) ** 0.5 if self.rules.merging == "zennit" else y
        return self._ruled(name, apply, x, merged_w, merged_b, value, y)

    def _ruled(
        self,
        name: str,
        apply: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        y: Tensor,
        z: Tensor | None = None,
        graph: Tensor | None = None,
    ) -> Tensor:
        """The value y with the composite's rule; z is what the layer gives where that is not y, graph y as torch has it."""
        composite, eps = self.rules.composite, self.rules.epsilon
        out, first, dense = y.clone(), self._raw(x), name == "linear"  # the network may write over `out`, not over y
        flat = x.detach()  # may be written over as well: the backward pass reads no values of it, only copies

        def sent(terms: list[tuple[Tensor, Tensor, Tensor | None]], mask: Tensor | None = None) -> Any:
            """Backward function of R: R over the summed outputs of the terms, sent back through each."""

            def send(relevance: Tensor) -> list[Tensor]:
                outs, ins = [], []
                with torch.enable_grad():
                    for xi, wi, bi in terms:
                        z = xi.clone().requires_grad_()
                        ins.append(z)
                        outs.append(apply(z, wi, bi))
                share = relevance / stabilised(sum(o.detach() for o in outs), eps)  # pyright: ignore
                if mask is not None:
                    share = share * mask
                return [torch.autograd.grad(o, z, share)[0] for o, z in zip(outs, ins, strict=True)]

            return send

        if first and self.rules.relevance_at_input:
            return rewire(out, self._first(apply, flat.clone(), w, b, y, sent), x)
        if dense or composite == "epsilon":
            factor = y / stabilised(y if z is None else z, eps)
            return rewire(out, lambda g: g * factor, apply(x, w, b) if graph is None else graph)
        positive, negative = flat.clamp(min=0), flat.clamp(max=0)
        is_positive = flat >= 0
        one_sided = bool(is_positive.all())  # as after a ReLU: half of the work falls away
        zero = None if b is None else torch.zeros_like(b)
        w_plus, w_minus = w.clamp(min=0), w.clamp(max=0)
        b_plus, b_minus = (None, None) if b is None else (b.clamp(min=0), b.clamp(max=0))

        def pair(
            first_w: Tensor, first_b: Any, second_w: Tensor, mask: Tensor | None = None
        ) -> Callable[[Tensor], Tensor]:
            """x+ through the first weights and x- through the second: coefficient of x by its sign."""
            terms = [(positive, first_w, first_b)] + ([] if one_sided else [(negative, second_w, zero)])
            send = sent(terms, mask)

            def coefficient(relevance: Tensor) -> Tensor:
                found = send(relevance)
                return found[0] if one_sided else torch.where(is_positive, found[0], found[1])

            return coefficient

        if composite.startswith("epsilon_plus"):
            plus = pair(w_plus, b_plus, w_minus)
            return rewire(out, lambda g: plus(y * g), x)
        if composite.startswith("epsilon_alpha2_beta1"):
            plus, minus = pair(w_plus, b_plus, w_minus), pair(w_minus, b_minus, w_plus)
            return rewire(out, lambda g: 2 * plus(y * g) - minus(y * g), x)
        gamma = self.rules.gamma
        up, down = w + gamma * w_plus, w + gamma * w_minus
        b_up, b_down = (None, None) if b is None else (b + gamma * b.clamp(min=0), b + gamma * b.clamp(max=0))
        rising, falling = pair(up, b_up, down, y > 0), pair(down, b_down, up, y < 0)
        return rewire(out, lambda g: rising(y * g) + falling(y * g), x)

    def _first(self, apply: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, sent: Any) -> Any:
        """Rule of the first layer: gives back the relevance of the input itself."""
        zero = None if b is None else torch.zeros_like(b)
        eps = self.rules.epsilon
        if self.rules.composite.endswith(("_flat", "_wsquare")):
            weights = torch.ones_like(w) if self.rules.composite.endswith("_flat") else w.square()
            send = sent([(torch.ones_like(x), weights, zero)])
            return lambda g: send(y * g)[0]
        low, high = (self._spread(v, x, w) for v in (self.rules.low, self.rules.high))
        w_plus, w_minus = w.clamp(min=0), w.clamp(max=0)
        b_plus, b_minus = (None, None) if b is None else (b.clamp(min=0), b.clamp(max=0))

        def box(g: Tensor) -> Tensor:
            z = apply(x, w, b) - apply(low, w_plus, b_plus) - apply(high, w_minus, b_minus)
            share = y * g / stabilised(z, eps)
            return (
                x * _vjp(apply, x, w, b, share)
                - low * _vjp(apply, low, w_plus, b_plus, share)
                - high * _vjp(apply, high, w_minus, b_minus, share)
            )

        return box

    @staticmethod
    def _spread(bound: Any, x: Tensor, w: Tensor) -> Tensor:
        """A bound in the shape of the input; of several channels, along that dimension."""
        if not isinstance(bound, tuple):
            return torch.full_like(x, bound)
        channel = x.ndim + 1 - w.ndim  # the last one of a dense layer, that before the picture of a convolution
        if x.shape[channel] != len(bound):
            raise RuleError(f"the box has {len(bound)} channels and the first layer takes {x.shape[channel]}")
        return x.new_tensor(bound).reshape(-1, *[1] * (x.ndim - channel - 1)).expand_as(x)


def _vjp(apply: Any, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        return torch.autograd.grad(apply(z, w, b), z, g)[0]


@dataclass(frozen=True)
class Rescale(Rules):
    """DeepLIFT's rescale rule: slopes between an input and its baseline instead of gradients.

    Rows come in pairs (x, baseline). The gradients at the rows of x are DeepLIFT's multipliers, complete up to
    rounding: their product with x - baseline sums to f(x) - f(baseline).

    Notes
    -----
    DeepLIFT has no rule for products of two activations, softmax and layer norms. A product ab gives each factor the
    mean of the other over the pair; softmax and layer norms are written out in elementwise functions, sums and
    products. Both keep scores complete. Captum's DeepLift differs there: it takes plain gradients of what is no module
    of its own (LSTM gates, attention) and is not complete.

    References
    ----------
    Shrikumar, Greenside, Kundaje: Learning important features through propagating activation differences (2017).
    """

    group: ClassVar[int] = 2

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _RescaleMode(self.name)


# May move or mix rows in ways that the shape does not tell.
_MAY_MIX = op.words(
    """
    flip flipud rot90 roll cumsum index_select gather index scatter scatter_add index_add index_copy
    masked_scatter take take_along_dim as_strided stack get_H max min amax amin maximum minimum
    """
)
_MOVING = op.words("transpose permute movedim t get_T get_mT adjoint")


class _RescaleMode(RuleMode):
    """Multipliers between the two rows of each pair; rows must stay in the first dimension."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.rows: int | None = None

    def handle(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.rows is None:
            first = carriers(args, kwargs)[0]
            self.rows = first.shape[0] if first.ndim else 1
            if self.rows % 2:
                raise RuleError(f"{self.name} takes rows in pairs (input, baseline); got {self.rows} rows")
        out = self._handle(name, func, args, kwargs)
        where = " (which moves rows out of the first dimension)"
        return each(out, lambda t: t if self._paired(t) else self.refuse(t, name, where))

    def _handle(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in op.MAX_POOLS:
            return self.max_pool(name, func, args, kwargs)
        if name in op.ELEMENTWISE:
            return self.activation(name, func, args, kwargs)
        if name in _MOVING:
            out, x = func(*args, **kwargs), carriers(args, kwargs)[0]
            stays = out.ndim and out.shape[0] == x.shape[0] and out.stride(0) == x.stride(0)
            return out if stays else self.refuse(out, name, " (which moves rows out of the first dimension)")
        if name in _MAY_MIX:
            return self.unknown(name, func, args, kwargs)
        return super().handle(name, func, args, kwargs)

    def _paired(self, t: Tensor) -> bool:
        return t.ndim > 0 and t.shape[0] == self.rows

    def activation(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        carrying = carriers(args, kwargs)
        x = carrying[0]
        others = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t is not x]
        if len(carrying) > 1 or not self._paired(x) or any(t.ndim and t.shape[0] == self.rows for t in others):
            return self.unknown(name, func, args, kwargs)
        self.met["activation"] += 1
        with torch.no_grad():
            y = func(*args, **kwargs)
        above, below = x.detach()[0::2], x.detach()[1::2]
        step = above - below
        # Nearer than this, rounding spoils the quotient more than curvature spoils the derivative.
        near = step.abs() <= torch.finfo(x.dtype).eps ** (2 / 3) * torch.maximum(above.abs(), below.abs())
        slope = (y[0::2] - y[1::2]) / torch.where(near, 1, step)
        if bool(near.any()):
            with torch.enable_grad():
                middle = ((above + below) / 2).requires_grad_()
                inner = func(*replaced(args, x, middle), **replaced(kwargs, x, middle))
                (derivative,) = torch.autograd.grad(inner.sum(), middle)
            slope = torch.where(near, derivative, slope)
        slope = slope.repeat_interleave(2, 0)
        return rewire(y, lambda g: g * slope, x)

    gate = activation

    def max_pool(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x = argument(args, kwargs, 0, "input")
        position = 2 if name.startswith("adaptive") else 6
        if x.ndim != int(name[-2]) + 2 or not self._paired(x):
            return self.unknown(name, func, args, kwargs)
        self.met["max_pool"] += 1
        rest = {k: v for k, v in kwargs.items() if k != "return_indices"}
        with torch.no_grad():
            y, indices = getattr(F, f"{name}_with_indices")(*args[:position], **rest)
        shape = x.shape
        step = (x.detach()[0::2] - x.detach()[1::2]).flatten(2)
        above, below = y[0::2].flatten(2), y[1::2].flatten(2)
        top = torch.maximum(above, below)
        gained, lost = top - below, above - top
        at, at_baseline = indices[0::2].flatten(2), indices[1::2].flatten(2)

        def back(g: Tensor) -> Tensor:
            # What the maximum gained goes to its winner, what it lost to the baseline's, each over its own change.
            g = g[0::2].flatten(2)
            moved = torch.zeros_like(step).scatter_add_(2, at, g * gained).scatter_add_(2, at_baseline, g * lost)
            plain = torch.zeros_like(step).scatter_add_(2, at, g)
            still = step == 0
            return torch.where(still, plain, moved / torch.where(still, 1, step)).repeat_interleave(2, 0).reshape(shape)

        out = rewire(y, back, x)
        return (out, indices) if argument(args, kwargs, position, "return_indices", False) else out

    def batch_norm(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        fixed = (
            not argument(args, kwargs, 5, "training", False) and argument(args, kwargs, 1, "running_mean") is not None
        )
        if not fixed or len(carriers(args, kwargs)) > 1:
            return self.unknown("batch_norm", func, args, kwargs)
        return func(*args, **kwargs)

    def layer(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(carriers(args, kwargs)) > 1 or not depends(argument(args, kwargs, 0, "input")):
            return self.unknown(name, func, args, kwargs)
        return func(*args, **kwargs)

    def linear_map(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        keeps = self._keeps_rows(name, args, kwargs, carriers(args, kwargs)[0])
        return func(*args, **kwargs) if keeps else self.unknown(name, func, args, kwargs)

    @staticmethod
    def _keeps_rows(name: str, args: Any, kwargs: dict[str, Any], x: Tensor) -> bool:
        """Whether a product with a constant leaves the rows of x where they are."""
        if name == "einsum":
            if len(args) != 3 or not isinstance(args[0], str) or "." in args[0] or "->" not in args[0]:
                return False
            inputs, result = args[0].replace(" ", "").split("->")
            own, other = inputs.split(",") if x is args[1] else inputs.split(",")[::-1]
            return result[:1] == own[0] and own[0] not in other
        first = argument(args, kwargs, 1, "mat1") if name.startswith("add") else argument(args, kwargs, 0, "input")
        return x.ndim >= 3 or (name in ("matmul", "addmm") and x is first)

    def product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        first, second = operands(args, kwargs)
        with torch.no_grad():
            y = func(*args, **kwargs)
        fits = (
            name in ("mul", "matmul")
            and first.ndim == second.ndim == y.ndim
            and all(map(self._paired, (first, second, y)))
        )
        if not fits or (name == "matmul" and y.ndim < 3):
            return self.unknown(name, func, args, kwargs)
        self.met["product"] += 1
        # The change of ab is that of a times the mean of b over the pair, plus that of b times the mean of a: exactly.
        return rewire(y, lambda g: (g, g), func(first, _pair_mean(second)), func(_pair_mean(first), second))

    def softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, dim = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "dim")
        if not self._paired(x) or dim is None or dim % x.ndim == 0:
            return self.unknown("softmax", func, args, kwargs)
        # Written out as exponentials, a sum, its reciprocal and a product, each of which has its own exact slope. Both
        # rows of a pair are shifted alike; double precision lets them differ by hundreds.
        wide = x.double()
        wide = wide.masked_fill(wide.isneginf(), -1e30)
        top = wide.detach().amax(dim, keepdim=True)
        top = torch.maximum(top[0::2], top[1::2]).repeat_interleave(2, 0)
        with self:
            e = torch.exp(wide - top)
            return (e * torch.reciprocal(e.sum(dim, keepdim=True))).to(kwargs.get("dtype") or x.dtype)

    def scale(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.unknown(name, func, args, kwargs)

    def exponential(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.unknown(name, func, args, kwargs)

    def norm(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, shape = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "normalized_shape")
        if name not in ("layer_norm", "rms_norm") or not self._paired(x) or len(shape) >= x.ndim:
            return self.unknown(name, func, args, kwargs)
        dims = tuple(range(-len(shape), 0))
        rest = ["weight", "bias", "eps"] if name == "layer_norm" else ["weight", "eps"]
        given = {key: argument(args, kwargs, i + 2, key) for i, key in enumerate(rest)}
        weight, bias = given["weight"], given.get("bias")
        if depends(weight) or depends(bias):
            return self.unknown(name, func, args, kwargs)
        eps = given["eps"]
        if eps is None:
            eps = 1e-5 if name == "layer_norm" else torch.finfo(x.dtype).eps
        with self:  # written out, as in softmax
            centred = x - x.mean(dims, keepdim=True) if name == "layer_norm" else x
            y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
            y = y if weight is None else y * weight
            return y if bias is None else y + bias

    def division(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        below = operands(args, kwargs)[1] if name == "div" else args[0]
        constant = not depends(below) and kwargs.get("rounding_mode") is None
        return func(*args, **kwargs) if constant else self.unknown(name, func, args, kwargs)


def _pair_mean(t: Tensor) -> Tensor:
    t = t.detach()
    return ((t[0::2] + t[1::2]) / 2).repeat_interleave(2, 0)
