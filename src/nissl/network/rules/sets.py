"""The rule sets: guided, deconvolution, layer-wise relevance propagation, RelP, AttnLRP, DeepLIFT's rescale."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nissl.errors import InputError, RuleError
from nissl.network.rules import operations as op
from nissl.network.rules.mode import RuleMode, depends, rewire, scaled, stabilised, tensors_in, valued

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
        x = args[0] if args else kwargs["input"]
        is_relu = name in op.RELU or (name in ("clamp", "clamp_min", "clip") and _low(args, kwargs) == 0)
        is_relu = is_relu or (name in ("hardtanh",) and _low(args, kwargs, -1.0) == 0)
        if not is_relu:
            return func(*args, **kwargs)
        self.met["relu"] += 1
        y = func(*_detached(args), **kwargs)
        if not self.masked:
            return rewire(y, lambda g: g.clamp(min=0), x)
        passes = (x.detach() > 0) & (x.detach() == y)  # x == y: not cut off from above (ReLU6)
        return rewire(y, lambda g: g.clamp(min=0) * passes, x)

    def unknown(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name.startswith(("native_multi", "transformer_encoder", "quantized")):
            raise RuleError(f"{self.name} cannot see the activations inside the fused call {name!r}")
        return func(*args, **kwargs)

    def finished(self) -> None:
        self.depth -= 1
        if self.depth == 0 and not self.met["relu"]:
            raise RuleError(f"{self.name} changes ReLUs only, and the forward pass met none")


def _low(args: Any, kwargs: dict[str, Any], default: Any = None) -> Any:
    low = args[1] if len(args) > 1 else kwargs.get("min_val", kwargs.get("min", default))
    return low if isinstance(low, (int, float)) else default


def _detached(args: Any) -> Any:
    return tuple(
        a.detach() if isinstance(a, Tensor) else _detached(a) if isinstance(a, (tuple, list)) else a for a in args
    )


class _ConservingMode(RuleMode):
    """What LRP, RelP and AttnLRP share: identity rule, half rule, constant scales, expanded norms."""

    constant_softmax = False

    def activation(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in (*op.RELU, "leaky_relu", "abs", "absolute"):
            return func(*args, **kwargs)  # f(x) / x is the gradient
        x = args[0] if args else kwargs["input"]
        rest = args[1:] if args else ()
        other = {k: v for k, v in kwargs.items() if k != "input"}
        flat = x.detach()
        y = func(flat, *rest, **other)
        tiny = 1e-6 if x.dtype in (torch.float64, torch.float32) else 1e-3
        ratio = torch.where(flat.abs() > tiny, y / stabilised(flat, 1e-30 if x.dtype == torch.float64 else 1e-20), 0.0)
        near = flat.abs() <= tiny
        if bool(near.any()):  # the limit of f(x) / x at 0 is the slope there (where f(0) = 0)
            with torch.enable_grad():
                z = flat.clone().requires_grad_()
                slope = torch.autograd.grad(func(z, *rest, **other).sum(), z)[0]
            ratio = torch.where(near, slope, ratio)
        return rewire(y, lambda g: g * ratio, x)

    def gate(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*_detached(args), **kwargs)

    def softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return func(*_detached(args), **kwargs) if self.constant_softmax else func(*args, **kwargs)

    def scale(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "rsqrt":
            self.met["norm"] += 1
        return func(*_detached(args), **{k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()})

    def product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        return scaled(out, torch.tensor(0.5, dtype=out.dtype, device=out.device))

    def division(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        first, second = (args[1], args[0]) if name in ("rtruediv", "rdiv") else (args[0], args[1])
        if depends(second):
            second = second.detach()
        if depends(first):
            return self.structure("mul", torch.div, (first, second), kwargs)
        return torch.div(first, second, **kwargs)

    def norm(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        y = func(*_detached(args), **{k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()})
        return valued(y, _norm_graph(name, x, args, kwargs))


def _norm_graph(name: str, x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """A normalisation with its scale held constant."""

    def arg(i: int, key: str, default: Any = None) -> Any:
        return args[i] if len(args) > i else kwargs.get(key, default)

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

    References
    ----------
    Rezaei Jafari, Eberle, Khakzar, Nanda: RelP (2025).
    """

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        mode = _ConservingMode(self.name)
        mode.constant_softmax = True
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
        return _ConservingMode(self.name)


@dataclass(frozen=True)
class LRPRules(Rules):
    """Composites of layer-wise relevance propagation for convolutional networks.

    Parameters
    ----------
    composite : str, default "epsilon_plus"
        ``epsilon`` everywhere, or ``epsilon`` for dense layers and for convolutions z+ (``epsilon_plus``), alpha-beta
        (``epsilon_alpha2_beta1``) or gamma (``epsilon_gamma``); ``_flat``, ``_wsquare`` and ``_box`` name the rule of the first layer.
    epsilon : float, default 1e-6
        Also the stabiliser of all other rules.
    gamma : float, default 0.25
    low, high : float, optional
        Smallest and largest possible input, for the box rule.
    merging : {"zennit", "exact"}, default "zennit"
        Batch norm behind a convolution or dense layer is merged with it. zennit leaves a batch norm of unit variance
        behind, which still divides by sqrt(1 + eps): 5e-6 for torch's default eps, 5e-4 for the 1e-3 of some networks.
        The default repeats that, so that numbers agree; ``exact`` leaves the forward pass as it is.

    Notes
    -----
    Average pooling is normalised by its output, max
    pooling follows the gradient; biases take part in all rules. Rules for what transformers add are those of AttnLRP.

    References
    ----------
    Bach et al. (2015); Montavon et al.: Layer-wise relevance propagation, an overview (2019); Kohlbrenner et al. (2020).
    """

    composite: str = "epsilon_plus"
    epsilon: float = 1e-6
    gamma: float = 0.25
    low: float | None = None
    high: float | None = None
    merging: str = "zennit"

    def __post_init__(self) -> None:
        if self.merging not in ("zennit", "exact"):
            raise InputError(f"merging={self.merging!r}: choose 'zennit' or 'exact'")
        if self.composite not in COMPOSITES:
            raise InputError(f"composite={self.composite!r}: choose among {', '.join(COMPOSITES)}")
        if not self.epsilon > 0 or not self.gamma >= 0:
            raise InputError(f"epsilon must be above 0 and gamma at least 0; got {self.epsilon}, {self.gamma}")
        if self.composite.endswith("_box"):
            if self.low is None or self.high is None or not self.low < self.high:
                raise InputError(
                    f"the box rule needs the smallest and largest possible input, low < high; got {self.low}, {self.high}"
                )

    @property
    def relevance_at_input(self) -> bool:
        """Whether the gradient at the input is the relevance itself."""
        return self.composite.endswith(("_flat", "_wsquare", "_box"))

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _LRPMode(self)


_MARK = "_nissl_layer"


def unmark(t: Tensor) -> None:
    """Forget which layer made a tensor, so that a batch norm behind it is not merged past it."""
    if hasattr(t, _MARK):
        delattr(t, _MARK)


class _LRPMode(_ConservingMode):
    def __init__(self, rules: LRPRules) -> None:
        super().__init__(f"LRP {rules.composite}")
        self.rules = rules
        self.first = True

    def structure(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        arithmetic = name in ("add", "radd", "sub", "subtract", "rsub", "mul", "multiply", "rmul", "div")
        if self.first and self.rules.relevance_at_input and arithmetic:
            dependent = [t for t in tensors_in([*args, *kwargs.values()]) if t.requires_grad]
            if len(dependent) == 1:  # normalisation inside the network: the same picture in other numbers
                y = func(*_detached(args), **kwargs)
                if y.shape == dependent[0].shape:
                    return rewire(y, lambda g: g, dependent[0])
        return func(*args, **kwargs)

    def average_pool(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        y = func(*args, **kwargs)
        return scaled(y, y.detach() / stabilised(y.detach(), self.rules.epsilon))

    def linear_map(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.first = False
        y = func(*args, **kwargs)
        return scaled(y, y.detach() / stabilised(y.detach(), self.rules.epsilon))

    def layer(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        held = dict(zip(("input", "weight", "bias"), args[:3], strict=False)) | kwargs
        x, w, b = held.pop("input"), held.pop("weight"), held.pop("bias", None)
        rest = args[3:]
        if depends(w) or depends(b):
            return self.unknown(name, func, args, kwargs)

        def apply(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            return func(x, w, b, *rest, **held)

        first, self.first = self.first, False
        y = apply(x.detach(), w, b)
        out = self._ruled(name, apply, x, w, b, y, first)
        if not name.startswith("conv_transpose"):
            setattr(out, _MARK, (name, apply, x, w, b, first))
        return out

    def batch_norm(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        keys = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        held = dict(zip(keys, args, strict=False)) | kwargs
        t, mean, var = held["input"], held["running_mean"], held["running_var"]
        if held.get("training", False) or mean is None or var is None:
            return self.unknown("batch_norm", func, args, kwargs)
        mark = getattr(t, _MARK, None)
        if mark is None:
            return func(*args, **kwargs)
        name, apply, x, w, b, first = mark
        scale = (var + held.get("eps", 1e-5)).rsqrt()
        if held.get("weight") is not None:
            scale = scale * held["weight"]
        shift = -mean * scale if held.get("bias") is None else held["bias"] - mean * scale
        merged_w = w * scale.reshape(-1, *[1] * (w.ndim - 1))
        merged_b = shift if b is None else b * scale + shift
        y = func(*_detached(args), **{k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()})
        value = y / (1 + held.get("eps", 1e-5)) ** 0.5 if self.rules.merging == "zennit" else y
        return self._ruled(name, apply, x, merged_w, merged_b, value, first, y)

    def _ruled(
        self,
        name: str,
        apply: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        y: Tensor,
        first: bool,
        z: Tensor | None = None,
    ) -> Tensor:
        """The value y with the composite's rule; z is what the layer gives where that is not y."""
        composite, eps = self.rules.composite, self.rules.epsilon
        flat = x.detach()

        def sent(terms: list[tuple[Tensor, Tensor, Tensor | None]], mask: Tensor | None = None) -> Any:
            """Backward function of R -> coefficients: R over the summed outputs of the terms, sent back through each."""

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
            return rewire(y, self._first(apply, flat, w, b, y, sent), x)
        if name == "linear" or composite == "epsilon":
            factor = y / stabilised(y if z is None else z, eps)
            return rewire(y, lambda g: _vjp(apply, flat, w, b, g * factor), x)
        positive, negative = flat.clamp(min=0), flat.clamp(max=0)
        one_sided = bool((flat >= 0).all())
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
                return found[0] if one_sided else torch.where(flat >= 0, found[0], found[1])

            return coefficient

        if composite.startswith("epsilon_plus"):
            plus = pair(w_plus, b_plus, w_minus)
            return rewire(y, lambda g: plus(y * g), x)
        if composite.startswith("epsilon_alpha2_beta1"):
            plus, minus = pair(w_plus, b_plus, w_minus), pair(w_minus, b_minus, w_plus)
            return rewire(y, lambda g: 2 * plus(y * g) - minus(y * g), x)
        gamma = self.rules.gamma
        up, down = w + gamma * w_plus, w + gamma * w_minus
        b_up, b_down = (None, None) if b is None else (b + gamma * b.clamp(min=0), b + gamma * b.clamp(max=0))
        rising, falling = pair(up, b_up, down, y > 0), pair(down, b_down, up, y < 0)
        return rewire(y, lambda g: rising(y * g) + falling(y * g), x)

    def _first(self, apply: Any, x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, sent: Any) -> Any:
        """Rule of the first layer: gives back the relevance of the input itself."""
        zero = None if b is None else torch.zeros_like(b)
        eps = self.rules.epsilon
        if self.rules.composite.endswith(("_flat", "_wsquare")):
            weights = torch.ones_like(w) if self.rules.composite.endswith("_flat") else w.square()
            send = sent([(torch.ones_like(x), weights, zero)])
            return lambda g: send(y * g)[0]
        assert self.rules.low is not None and self.rules.high is not None
        low, high = torch.full_like(x, self.rules.low), torch.full_like(x, self.rules.high)
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


def _vjp(apply: Any, x: Tensor, w: Tensor, b: Tensor | None, g: Tensor) -> Tensor:
    with torch.enable_grad():
        z = x.clone().requires_grad_()
        return torch.autograd.grad(apply(z, w, b), z, g)[0]


@dataclass(frozen=True)
class Rescale(Rules):
    """DeepLIFT's rescale rule: slopes between an input and its baseline instead of gradients.

    Rows come in pairs (x, baseline). The gradients at the rows of x are DeepLIFT's multipliers, complete up to rounding:
    their product with x - baseline sums to f(x) - f(baseline).

    References
    ----------
    Shrikumar, Greenside, Kundaje: Learning important features through propagating activation differences (2017).
    """

    group: ClassVar[int] = 2

    def mode(self) -> RuleMode:
        """See `Rules.mode`."""
        return _RescaleMode(self.name)


class _RescaleMode(RuleMode):
    def handle(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in op.MAX_POOLS:
            self.met["max_pool"] += 1
            return self.max_pool(func, args, kwargs)
        if name in op.ELEMENTWISE and sum(map(depends, tensors_in([*args, *kwargs.values()]))) == 1:
            self.met["activation"] += 1
            return self.activation(name, func, args, kwargs)
        if name in ("max", "min", "amax", "amin", "maximum", "minimum", "fmax", "fmin"):
            return self.unknown(name, func, args, kwargs)
        return super().handle(name, func, args, kwargs)

    def _pairs(self, t: Tensor, name: str) -> tuple[Tensor, Tensor]:
        if t.shape[0] % 2:
            raise RuleError(
                f"{self.name}: the pairs of input and baseline are lost before {name!r} (shape {tuple(t.shape)})"
            )
        return t[0::2], t[1::2]

    def activation(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        at = next(i for i, a in enumerate(args) if depends(a)) if any(map(depends, args)) else -1
        if at < 0:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
            at = 0
        x = args[at]

        def f(z: Tensor) -> Tensor:
            return func(*args[:at], z, *args[at + 1 :], **kwargs)

        flat = x.detach()
        with torch.enable_grad():
            z = flat.clone().requires_grad_()
            y = f(z)
            slope = torch.autograd.grad(y.sum(), z)[0]
        y = y.detach()
        (x1, x0), (y1, y0) = self._pairs(flat, name), self._pairs(y, name)
        dx = x1 - x0
        small = dx.abs() < 1e-7
        m = torch.where(small, slope[0::2], (y1 - y0) / torch.where(small, 1.0, dx))
        return rewire(y, lambda g: g * m.repeat_interleave(2, 0), x)

    gate = activation

    def max_pool(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        rest = args[1:] if args else ()
        other = {k: v for k, v in kwargs.items() if k != "input"}

        def pool(z: Tensor) -> Tensor:
            out = func(z, *rest, **other)
            return out[0] if isinstance(out, tuple) else out

        y = pool(x.detach())
        x1, x0 = self._pairs(x.detach(), "max_pool")
        y1, y0 = self._pairs(y, "max_pool")

        def back(g: Tensor) -> Tensor:
            g1 = g[0::2]
            top = torch.maximum(y1, y0)

            def send(z: Tensor, s: Tensor) -> Tensor:
                with torch.enable_grad():
                    leaf = z.clone().requires_grad_()
                    return torch.autograd.grad(pool(leaf), leaf, s)[0]

            routed = send(x1, g1 * (top - y0)) + send(x0, g1 * (y1 - top))
            dx = x1 - x0
            small = dx.abs() < 1e-7
            m = torch.where(small, send(x1, g1), routed / torch.where(small, 1.0, dx))
            return torch.stack([m, torch.zeros_like(m)], 1).flatten(0, 1)

        return rewire(y, back, x)

    def product(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        places = [i for i, a in enumerate(args) if depends(a)]
        if len(places) != 2 or kwargs or any(args[i].shape[0] % 2 for i in places):
            return self.unknown(name, func, args, kwargs)
        i, j = places
        y = func(*_detached(args))
        if y.shape[0] != args[i].shape[0] or y.shape[0] != args[j].shape[0]:
            return self.unknown(name, func, args, kwargs)
        # Δ(ab) = Δa mean(b) + Δb mean(a): exact, whatever the bilinear operation
        mean = {k: _pair_mean(args[k].detach()) for k in places}

        def send(at: int, other: int, g: Tensor) -> Tensor:
            values = list(_detached(args))
            values[other] = mean[other]
            with torch.enable_grad():
                values[at] = values[at].clone().requires_grad_()
                return torch.autograd.grad(func(*values), values[at], g)[0]

        return rewire(y, lambda g: (send(i, j, g), send(j, i, g)), args[i], args[j])

    def softmax(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.unknown("softmax", func, args, kwargs)

    def scale(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.unknown(name, func, args, kwargs)

    def norm(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return self.unknown(name, func, args, kwargs)

    def division(self, name: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        second = args[0] if name in ("rtruediv", "rdiv") else args[1]
        return self.unknown(name, func, args, kwargs) if depends(second) else func(*args, **kwargs)


def _pair_mean(t: Tensor) -> Tensor:
    return ((t[0::2] + t[1::2]) / 2).repeat_interleave(2, 0)
