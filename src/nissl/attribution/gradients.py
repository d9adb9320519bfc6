"""Scores from gradients: saliency, input x gradient, integrated gradients, SmoothGrad, VarGrad, expected gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import at_least, is_number
from nissl.attribution.base import Method
from nissl.attribution.masking import Baseline, baseline_of, check_baseline
from nissl.errors import InputError
from nissl.runner import Asking, Explained, Question, chunks, explained


@dataclass(frozen=True, eq=False)
class Saliency(Method):
    """Absolute gradient of the target.

    References
    ----------
    Simonyan, Vedaldi, Zisserman: Deep inside convolutional networks (2013).
    """

    name: ClassVar[str] = "saliency"
    title: ClassVar[str] = "Saliency"
    paper: ClassVar[str] = "Simonyan et al. 2013"
    differentiates: ClassVar[bool] = True
    positive: ClassVar[bool] = True

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        answer = yield q.ask(gradient=True)
        return explained(q, answer.gradients[q.site][0].abs())


@dataclass(frozen=True, eq=False)
class InputXGradient(Method):
    """Activation times gradient: the first-order estimate of switching a unit to zero.

    References
    ----------
    Shrikumar, Greenside, Shcherbina, Kundaje: Not just a black box (2016).
    """

    name: ClassVar[str] = "ixg"
    title: ClassVar[str] = "Input × gradient"
    paper: ClassVar[str] = "Shrikumar et al. 2016"
    differentiates: ClassVar[bool] = True

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        answer = yield q.ask(gradient=True)
        return explained(q, (x * answer.gradients[q.site])[0])


@dataclass(frozen=True, eq=False)
class IntegratedGradients(Method):
    """Gradient averaged on the straight path from a baseline, times the difference to it.

    Parameters
    ----------
    steps : int, default 32
        Points on the path: the number of gradients.
    quadrature : {"gausslegendre", "riemann_middle", "riemann_left", "riemann_right", "riemann_trapezoid"}
    baseline : str or Tensor, default "zero"

    Notes
    -----
    Complete: scores sum to f(x) - f(baseline) up to the quadrature. ``completeness_gap`` is what is missing, as a share
    of |f(x) - f(baseline)|.

    References
    ----------
    Sundararajan, Taly, Yan: Axiomatic attribution for deep networks (2017).
    """

    steps: int = 32
    quadrature: str = "gausslegendre"
    baseline: Baseline = "zero"

    name: ClassVar[str] = "ig"
    title: ClassVar[str] = "Integrated gradients"
    paper: ClassVar[str] = "Sundararajan et al. 2017"
    differentiates: ClassVar[bool] = True
    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        path(1, self.quadrature)
        check_baseline(self.baseline)

    def at_budget(self, passes: int) -> IntegratedGradients:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, steps=max(min(self.steps, passes), 1))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        b = yield from baseline_of(self.baseline, q, x)
        alphas, weights = (torch.tensor(a).to(x) for a in path(self.steps, self.quadrature))
        mean = torch.zeros_like(x)
        for s in chunks(self.steps):
            a = alphas[s].reshape(-1, *[1] * (x.ndim - 1))
            answer = yield q.ask(b + a * (x - b), gradient=True)
            mean += torch.tensordot(weights[s], answer.gradients[q.site], 1)
        scores = (x - b) * mean
        gap = yield from completeness_gap(q, x, b, scores)
        return explained(q, scores[0], completeness_gap=gap)


@dataclass(frozen=True, eq=False)
class SmoothGrad(Method):
    """Gradients of noisy copies of the input, averaged.

    Parameters
    ----------
    samples : int, default 25
    noise : float, default 0.15
        Standard deviation of the Gaussian noise, as a share of the range max(x) - min(x).
    what : {"saliency", "gradient", "ixg"}, default "saliency"
        What is averaged: the absolute gradient, the signed one, or the noisy input times the signed one.

    References
    ----------
    Smilkov, Thorat, Kim, Viégas, Wattenberg: SmoothGrad (2017).
    """

    samples: int = 25
    noise: float = 0.15
    what: Literal["saliency", "gradient", "ixg"] = "saliency"

    name: ClassVar[str] = "smoothgrad"
    title: ClassVar[str] = "SmoothGrad"
    paper: ClassVar[str] = "Smilkov et al. 2017"
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 1)
        if not (is_number(self.noise) and self.noise >= 0):
            raise InputError(f"noise must be a share of the input's range, at least 0; got {self.noise!r}")
        if self.what not in ("saliency", "gradient", "ixg"):
            raise InputError(f"what={self.what!r}: choose 'saliency', 'gradient' or 'ixg'")

    def at_budget(self, passes: int) -> SmoothGrad:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, samples=max(min(self.samples, passes), 1))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        total = torch.zeros_like(x[0])
        generator = q.generator("noise")
        for s in chunks(self.samples):
            noisy = with_noise(x, s.stop - s.start, self.noise, generator)
            answer = yield q.ask(noisy, gradient=True)
            g = answer.gradients[q.site]
            total += (g.abs() if self.what == "saliency" else g * noisy if self.what == "ixg" else g).sum(0)
        return explained(q, total / self.samples)


@dataclass(frozen=True, eq=False)
class VarGrad(SmoothGrad):
    """Variance of the gradient over noisy copies of the input.

    References
    ----------
    Adebayo, Gilmer, Goodfellow, Kim: Local explanation methods for deep neural networks lack sensitivity (2018).
    """

    samples: int = 25
    noise: float = 0.15
    what: Literal["saliency", "gradient", "ixg"] = "gradient"

    name: ClassVar[str] = "vargrad"
    title: ClassVar[str] = "VarGrad"
    paper: ClassVar[str] = "Adebayo et al. 2018"
    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("samples", self.samples, 2)

    def at_budget(self, passes: int) -> VarGrad:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, samples=max(min(self.samples, passes), 2))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        mean, squares, seen = torch.zeros_like(x[0]), torch.zeros_like(x[0]), 0
        generator = q.generator("noise")
        for s in chunks(self.samples):
            noisy = with_noise(x, s.stop - s.start, self.noise, generator)
            answer = yield q.ask(noisy, gradient=True)
            g = answer.gradients[q.site]
            g = g.abs() if self.what == "saliency" else g * noisy if self.what == "ixg" else g
            # chunks are joined by their means, which keeps small variances exact in float32
            n, here = len(g), g.mean(0)
            delta = here - mean
            squares += (g - here).square().sum(0) + delta.square() * (seen * n / (seen + n))
            mean += delta * (n / (seen + n))
            seen += n
        return explained(q, squares / (seen - 1))


@dataclass(frozen=True, eq=False)
class ExpectedGradients(Method):
    """GradientSHAP: integrated gradients with one random point on the path to each of many baselines.

    Parameters
    ----------
    samples : int, default 32
    baseline : str or Tensor (n_baselines, ...), default "noise"
        One of its rows is drawn for each sample.

    References
    ----------
    Erion, Janizek, Sturmfels, Lundberg, Lee: Improving performance of deep learning models with axiomatic attribution
    priors and expected gradients (2021). Lundberg, Lee: A unified approach to interpreting model predictions (2017).
    """

    samples: int = 32
    baseline: Baseline = "noise"

    name: ClassVar[str] = "gradshap"
    title: ClassVar[str] = "Expected gradients (GradientSHAP)"
    paper: ClassVar[str] = "Erion et al. 2021"
    differentiates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 1)
        check_baseline(self.baseline)

    def at_budget(self, passes: int) -> ExpectedGradients:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, samples=max(min(self.samples, passes), 1))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        pool = yield from baseline_of(self.baseline, q, x, rows=self.samples)
        generator = q.generator("path")
        order = torch.randint(len(pool), (self.samples,), generator=generator).to(x.device)
        alphas = torch.rand(self.samples, generator=generator).to(x)
        total = torch.zeros_like(x[0])
        for s in chunks(self.samples):
            b = pool[order[s]]
            a = alphas[s].reshape(-1, *[1] * (x.ndim - 1))
            answer = yield q.ask(b + a * (x - b), gradient=True)
            total += ((x - b) * answer.gradients[q.site]).sum(0)
        return explained(q, total / self.samples)


@lru_cache(maxsize=32)
def path(steps: int, quadrature: str) -> tuple[np.ndarray, np.ndarray]:
    """Points in [0, 1] and weights that sum to 1."""
    k = np.arange(steps)
    even = np.full(steps, 1 / steps)
    if quadrature == "gausslegendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if quadrature == "riemann_middle":
        return (k + 0.5) / steps, even
    if quadrature == "riemann_left":
        return k / steps, even
    if quadrature == "riemann_right":
        return (k + 1) / steps, even
    if quadrature == "riemann_trapezoid":
        if steps == 1:
            return np.array([0.5]), even
        weights = np.full(steps, 1 / (steps - 1))
        weights[[0, -1]] /= 2
        return k / (steps - 1), weights
    raise InputError(
        f"quadrature={quadrature!r}: choose 'gausslegendre', 'riemann_middle', 'riemann_left', 'riemann_right' "
        "or 'riemann_trapezoid'"
    )


def completeness_gap(q: Question, x: Tensor, baseline: Tensor, scores: Tensor) -> Asking[float]:
    """|sum of scores - (f(x) - f(baseline))| / |f(x) - f(baseline)|."""
    at_x, at_b = yield [q.ask(x), q.ask(baseline)]
    promised = float(at_x.scalar.double().mean() - at_b.scalar.double().mean())
    missing = abs(float(scores.double().sum()) - promised)
    return missing / max(abs(promised), 1e-12)


def with_noise(x: Tensor, n: int, share: float, generator: torch.Generator) -> Tensor:
    """N copies of x with Gaussian noise of a standard deviation that is a share of its range."""
    noise = torch.randn(n, *x.shape[1:], generator=generator).to(x)
    return x + noise * (share * (x.max() - x.min()))
