"""Relevance through convolutions and dense layers: epsilon, z-plus, alpha-beta, gamma, flat and box rules.

All rules are written in gradient form: a layer receives g, where ``y g`` is the relevance of its output y, and hands on
what, times its input, is the relevance of the input. Each rule becomes a sum of linear maps z of parts of the input, with
the gradient ``g y / z`` for z: the backward pass of torch then does the rest.

Sources: Bach et al. 2015 (epsilon, alpha-beta), Montavon et al. 2017 (z-plus, box), Lapuschkin et al. 2019 (flat),
Montavon et al. 2019 (gamma).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nissl.network.rules.mode import CONVOLUTIONS, Call, redirect, stabilised

Box = float | tuple[float, ...]


@dataclass(frozen=True)
class Affine:
    """``y = apply(x, weight, bias)``, linear in x and in (weight, bias).

    Attributes
    ----------
    apply : callable
        (x, weight, bias or None) to y.
    x, weight : Tensor
    bias : Tensor or None
    kind : str
        ``convolution`` or ``dense``.
    channel : int
        Dimension of x that its features lie along.
    outputs : int or None
        Dimension of the weight that the outputs lie along; None where a batch norm cannot be merged into it.
    groups : int
        Groups of a transposed convolution, whose outputs are split over two dimensions of the weight.
    """

    apply: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    kind: str
    channel: int = -1
    outputs: int | None = None
    groups: int = 1

    def scaled(self, scale: Tensor, shift: Tensor) -> Affine:
        """The layer followed by ``y * scale + shift``, with one scale and shift for each output."""
        assert self.outputs is not None
        w = self.weight
        if self.outputs == 1:
            shape = (self.groups, w.shape[0] // self.groups, w.shape[1], *w.shape[2:])
            spread = scale.reshape(self.groups, 1, -1, *[1] * (w.ndim - 2))
            weight = (w.reshape(shape) * spread).reshape(w.shape)
        else:
            weight = w * scale.reshape(-1, *[1] * (w.ndim - 1))
        bias = shift if self.bias is None else self.bias * scale + shift
        return Affine(self.apply, self.x, weight, bias, self.kind, self.channel, self.outputs, self.groups)


def affine(call: Call) -> Affine | None:
    """The affine map that a call is, or None where not exactly one factor carries relevance."""
    if len(call.carriers) != 1:
        return None
    x = call.carriers[0]
    func, name, args, kwargs = call.func, call.name, call.args, dict(call.kwargs)
    if name in CONVOLUTIONS or name == "linear":
        if x is not call.get("input", 0):
            return None
        weight, bias = call.get("weight", 1), call.get("bias", 2)
        rest = args[3:]
        for key in ("input", "weight", "bias"):
            kwargs.pop(key, None)
        if name == "linear":
            return Affine(lambda x, w, b: func(x, w, b), x, weight, bias, "dense", -1, 0)
        transposed = "transpose" in name
        groups = call.get("groups", 6, 1)
        return Affine(
            lambda x, w, b: func(x, w, b, *rest, **kwargs),
            x,
            weight,
            bias,
            "convolution",
            -(weight.ndim - 1),
            1 if transposed else 0,
            groups if transposed else 1,
        )
    if name in ("addmm", "addmv", "baddbmm"):
        bias, left, right = (call.get(k, i) for i, k in enumerate(("input", "mat1", "mat2")))
        if name == "addmv":
            left, right = call.get("mat", 1), call.get("vec", 2)
        if name == "baddbmm":
            left, right = call.get("batch1", 1), call.get("batch2", 2)
        if x is bias:
            return None
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        first = x is left
        weight = (right if first else left) * alpha

        def product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            y = torch.matmul(x, w) if first else torch.matmul(w, x)
            return y if b is None else y + b

        return Affine(product, x, weight, bias * beta, "dense", -1 if first else -2)
    if name in ("matmul", "rmatmul", "inner", "tensordot"):
        left, right = call.pair()
        rest = args[2:]
        weight = right if x is left else left
        if not isinstance(weight, Tensor):
            return None
        if x is left:
            return Affine(lambda x, w, b: _plus(func(x, w, *rest, **kwargs), b), x, weight, None, "dense", -1)
        return Affine(lambda x, w, b: _plus(func(w, x, *rest, **kwargs), b), x, weight, None, "dense", -1)
    if name == "einsum" and len(args) == 3 and isinstance(args[0], str):
        equation, left, right = args
        if x is left:
            return Affine(lambda x, w, b: _plus(func(equation, x, w), b), x, right, None, "dense", -1)
        return Affine(lambda x, w, b: _plus(func(equation, w, x), b), x, left, None, "dense", -1)
    return None


def _plus(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias


def epsilon(a: Affine, y: Tensor, stabiliser: float) -> Tensor:
    """R_i = x_i sum_j w_ij R_j / (y_j + epsilon sign y_j)."""
    z = a.apply(a.x, a.weight, a.bias)
    return redirect(y, (z, y / stabilised(y, stabiliser)))


def plus(a: Affine, y: Tensor, stabiliser: float) -> Tensor:
    """Relevance in proportion to the positive contributions alone."""
    z = _contributions(a, a.weight.clamp(min=0), a.weight.clamp(max=0), _clamp(a.bias, 1))
    return redirect(y, (z, y / stabilised(z.detach(), stabiliser)))


def alpha_beta(a: Affine, y: Tensor, stabiliser: float, alpha: float = 2.0, beta: float = 1.0) -> Tensor:
    """Alpha times the relevance by positive contributions less beta times that by negative ones."""
    positive, negative = a.weight.clamp(min=0), a.weight.clamp(max=0)
    z = _contributions(a, positive, negative, _clamp(a.bias, 1))
    n = _contributions(a, negative, positive, _clamp(a.bias, -1))
    return redirect(
        y,
        (z, alpha * y / stabilised(z.detach(), stabiliser)),
        (n, -beta * y / stabilised(n.detach(), stabiliser)),
    )


def gamma(a: Affine, y: Tensor, stabiliser: float, strength: float) -> Tensor:
    """Contributions of the output's own sign count (1 + gamma) times."""
    up, down = a.weight + strength * a.weight.clamp(min=0), a.weight + strength * a.weight.clamp(max=0)
    bias_up = None if a.bias is None else a.bias + strength * a.bias.clamp(min=0)
    bias_down = None if a.bias is None else a.bias + strength * a.bias.clamp(max=0)
    z = _contributions(a, up, down, bias_up)
    n = _contributions(a, down, up, bias_down)
    return redirect(
        y,
        (z, (y > 0) * y / stabilised(z.detach(), stabiliser)),
        (n, (y < 0) * y / stabilised(n.detach(), stabiliser)),
    )


def flat(a: Affine, y: Tensor, stabiliser: float) -> Tensor:
    """At the input: each output's relevance in equal parts to all inputs it sees. Hands on relevance, not a gradient."""
    ones = redirect(torch.ones_like(a.x), (a.x, 1.0))
    z = a.apply(ones, torch.ones_like(a.weight), None)
    return redirect(y, (z, y / stabilised(z.detach(), stabiliser)))


def box(a: Affine, y: Tensor, stabiliser: float, low: Box, high: Box) -> Tensor:
    """At an input that lies between `low` and `high`. Hands on relevance, not a gradient."""
    x = a.x.detach()
    lowest, highest = _spread(low, x, a.channel), _spread(high, x, a.channel)
    # Each factor of z takes part in proportion to its own value, so the gradient of each source is multiplied by it.
    z = (
        a.apply(redirect(x, (a.x, x)), a.weight, None)
        - a.apply(redirect(lowest, (a.x, lowest)), a.weight.clamp(min=0), None)
        - a.apply(redirect(highest, (a.x, highest)), a.weight.clamp(max=0), None)
    )
    return redirect(y, (z, y / stabilised(z.detach(), stabiliser)))


def _contributions(a: Affine, for_positive: Tensor, for_negative: Tensor, bias: Tensor | None) -> Tensor:
    """Positive inputs times one weight plus negative inputs times another."""
    z = a.apply(a.x.relu(), for_positive, bias)
    # After a ReLU no input is negative, and half of the work falls away.
    if bool((a.x.detach() < 0).any()):
        z = z + a.apply(-(-a.x).relu(), for_negative, None)
    return z


def _clamp(bias: Tensor | None, sign: int) -> Tensor | None:
    if bias is None:
        return None
    return bias.clamp(min=0) if sign > 0 else bias.clamp(max=0)


def _spread(bound: Box, x: Tensor, channel: int) -> Tensor:
    if isinstance(bound, (int, float)):
        return torch.full_like(x, float(bound))
    shape = [1] * x.ndim
    shape[channel] = len(bound)
    return x.new_tensor(bound).reshape(shape).expand_as(x)


