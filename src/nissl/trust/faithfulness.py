"""Faithfulness under the model: whether the features with high scores carry the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import at_least, is_number, items
from nissl.attribution.gradients import completeness_gap
from nissl.attribution.masking import Baseline, Features, baseline_of, check_baseline, features_of, masked
from nissl.errors import InputError
from nissl.network import Target, target
from nissl.runner import CHUNK, Asking, Explained, Question
from nissl.trust.check import Check, Explainer, Figure, Measured, by_feature, positions, require_alike


def default_baseline(q: Question) -> Baseline:
    """What stands in for a removed feature when nobody says: a blur for images, the mean for series and features."""
    if not q.input.is_floating_point():
        return "zero"
    return "blur" if q.input.ndim == 4 else "mean" if q.input.ndim == 3 else "zero"


def readout(q: Question) -> Asking[tuple[Target, bool]]:
    """The scalar that curves follow, and whether it is a probability.

    For a class of a classifier it is that class's probability: the softmax of its logits, or the output itself where it
    is a table of probabilities already. For any other target it is the target.
    """
    if q.target.name not in ("class_logit", "top_class"):
        return q.target, False
    answer = yield q.ask()
    output = answer.output
    if output is None or output.ndim != 2 or output.shape[1] < 2:
        return q.target, False
    y = int(output.argmax(1)) if q.target.name == "top_class" else int(q.target.values[0])
    row = output[0].double()
    if bool((row >= 0).all()) and abs(float(row.sum()) - 1) < 1e-4:
        return target.class_logit(y), True
    return target.probability(y), True


def _check_removal(size: int | None, baseline: Baseline | None) -> None:
    if size is not None:
        at_least("size", size, 1)
    if baseline is not None:
        check_baseline(baseline)


@dataclass(frozen=True, eq=False)
class RegionCurves(Check):
    """Insertion and deletion of features in the order of their scores, and pixel flipping by region.

    Parameters
    ----------
    steps : int, default 10
        Points of a curve beside its start; each inserts or deletes the same number of features.
    size : int, optional
        Side of the regions; see `features_of`.
    baseline : str or Tensor, optional
        What stands in for what is absent; a blur for images, the mean of each channel for series, 0 elsewhere.

    Notes
    -----
    With one baseline for both, insertion read backwards is deletion of the least relevant first, so flipping in both
    orders costs nothing more. Areas are means of the curve over the share of features (trapezoidal rule). Normalised
    areas measure the curve from f(baseline) (0) to f(x) (1).

    References
    ----------
    Petsiuk, Das, Saenko: RISE (2018). Samek et al.: Evaluating the visualization of what a deep neural network has learned
    (2017).
    """

    steps: int = 10
    size: int | None = None
    baseline: Baseline | None = None

    name: ClassVar[str] = "curves"
    figures: ClassVar[dict[str, Figure]] = {
        "faithfulness": Figure("curves", "Insertion − deletion", "Area under insertion minus area under deletion."),
        "insertion": Figure("curves", "Insertion", "Mean output while features come back, most relevant first."),
        "deletion": Figure("curves", "Deletion", "Mean output while features go, most relevant first.", "lower"),
        "insertion_normalised": Figure(
            "curves", "Insertion, normalised", "Insertion area from f(baseline) = 0 to f(x) = 1."
        ),
        "deletion_normalised": Figure(
            "curves", "Deletion, normalised", "Deletion area from f(baseline) = 0 to f(x) = 1.", "lower"
        ),
        "flipping": Figure(
            "curves", "Region flipping", "Mean fall of the target when regions go, most relevant first (AOPC)."
        ),
        "flipping_gap": Figure(
            "curves", "Flipping gap", "AOPC of the most relevant first minus AOPC of the least relevant first."
        ),
    }

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 2)
        _check_removal(self.size, self.baseline)

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        x = q.input
        b = yield from baseline_of(default_baseline(q) if self.baseline is None else self.baseline, q, x)
        features = features_of(q, x, self.size)
        order = torch.argsort(by_feature(scores, features, tuple(x.shape[1:])), descending=True, stable=True)
        counts = torch.from_numpy(np.linspace(0, features.n, min(self.steps, features.n) + 1).round()).long()
        rank = torch.empty_like(order)
        rank[order] = torch.arange(features.n, device=order.device)
        first = (rank[None] < counts.to(rank.device)[:, None]).to(x.device)  # the k most relevant features
        of, probability = yield from readout(q)
        # f(x) and f(baseline) are ends of both curves
        masks = features.masks(torch.cat([first, ~first[1:-1]]))
        answers = yield [q.ask(masked(x, b, m), target=of) for m in masks.split(CHUNK)]
        y = torch.cat([a.scalar for a in answers]).double().cpu().numpy()
        if of is q.target or not probability:
            logit = y
        else:
            output = torch.cat([a.output for a in answers])
            logit = q.target.rows(1)[slice(0, 1)].rows(len(output))(output).double().cpu().numpy()
        return curves_measured(y, logit, counts.numpy() / features.n)


def curves_measured(y: np.ndarray, logit: np.ndarray, share: np.ndarray) -> Measured:
    """Figures from the readouts of n + 1 insertion steps followed by the n - 1 inner deletion steps."""
    n = len(share)

    def split(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return v[:n], np.concatenate([v[n - 1 : n], v[n:], v[:1]])

    insertion, deletion = split(y)
    start, end = y[0], y[n - 1]
    span = end - start if abs(end - start) > 1e-12 else np.nan
    area_in, area_de = (float(np.trapezoid(c, share)) for c in (insertion, deletion))
    falling, rising = split(logit)[1], split(logit)[0][::-1]
    flipping = float(np.mean(logit[n - 1] - falling[1:]))
    least = float(np.mean(logit[n - 1] - rising[1:]))
    return Measured(
        {
            "faithfulness": area_in - area_de,
            "insertion": area_in,
            "deletion": area_de,
            "insertion_normalised": float((area_in - start) / span),
            "deletion_normalised": float((area_de - start) / span),
            "flipping": flipping,
            "flipping_gap": flipping - least,
        },
        {"insertion": (share, insertion), "deletion": (share, deletion)},
    )


@dataclass(frozen=True, eq=False)
class Subsets(Check):
    """Infidelity and sensitivity-n: whether sums of scores predict what removing a set of features does.

    Parameters
    ----------
    samples : int, default 12
        Random sets of each size.
    shares : tuple of float, default (.1, .3, .5, .7, .9)
        Sizes of the sets, as shares of the features.
    size, baseline
        See `RegionCurves`.

    Notes
    -----
    The sets depend on the example only, so all methods share their Passes. ``infidelity`` is normalised: the scores
    are scaled to fit best, and the squared error is a share of the mean squared change of the output (1: no better
    than predicting no change). ``sensitivity_n`` is the Pearson correlation within each size, averaged over sizes.

    References
    ----------
    Yeh, Hsieh, Suggala, Inouye, Ravikumar: On the (in)fidelity and sensitivity of explanations (2019). Ancona, Ceolini,
    Öztireli, Gross: Towards better understanding of gradient-based attribution methods (2018).
    """

    samples: int = 12
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    size: int | None = None
    baseline: Baseline | None = None

    name: ClassVar[str] = "subsets"
    figures: ClassVar[dict[str, Figure]] = {
        "infidelity": Figure(
            "subsets", "Infidelity", "Squared error of predicted falls, best scaling; 1 is no prediction.", "lower", 1.0
        ),
        "sensitivity_n": Figure(
            "subsets", "Sensitivity-n", "Correlation of summed scores with the fall of the target.", "higher", 0.0
        ),
    }

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 3)
        shares = items("shares", self.shares)
        if not shares or not all(is_number(s) and 0 < s < 1 for s in shares):
            raise InputError(f"shares must lie between 0 and 1, got {self.shares}")
        _check_removal(self.size, self.baseline)

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        x = q.input
        b = yield from baseline_of(default_baseline(q) if self.baseline is None else self.baseline, q, x)
        features = features_of(q, x, self.size)
        removed = random_subsets(features, self.shares, self.samples, q.generator("subsets"))
        sums = by_feature(scores, features, tuple(x.shape[1:])).double().cpu()
        rows = torch.cat([torch.zeros(1, features.n, dtype=torch.bool), removed])
        masks = features.masks(~rows.to(x.device))
        f = yield from q.scalars(masked(x, b, masks))
        fall = (f[0] - f[1:]).double().cpu()
        predicted = removed.double() @ sums
        scale = float(predicted @ fall / (predicted @ predicted).clamp_min(1e-300))
        error = (scale * predicted - fall).square().mean() / fall.square().mean().clamp_min(1e-300)
        by_size = [_pearson(p, a) for p, a in zip(predicted.split(self.samples), fall.split(self.samples), strict=True)]
        shares = np.array(self.shares)
        defined = [r for r in by_size if not np.isnan(r)]
        return Measured(
            {"infidelity": float(error), "sensitivity_n": float(np.mean(defined)) if defined else float("nan")},
            {"sensitivity_n": (shares, np.array(by_size))},
        )


def random_subsets(features: Features, shares: tuple[float, ...], samples: int, generator: torch.Generator) -> Tensor:
    """Bool (len(shares) * samples, n_features): random sets of each size, at least one and not all features."""
    counts = [min(max(round(s * features.n), 1), max(features.n - 1, 1)) for s in shares]
    ranks = torch.rand(len(counts) * samples, features.n, generator=generator).argsort(1).argsort(1)
    return ranks < torch.tensor(counts).repeat_interleave(samples)[:, None]


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else float("nan")


@dataclass(frozen=True, eq=False)
class Completeness(Check):
    """Whether the scores sum to f(x) - f(baseline).

    Parameters
    ----------
    baseline : str or Tensor, default "zero"
        Used where the method did not report its own gap (against its own baseline).
    """

    baseline: Baseline = "zero"

    name: ClassVar[str] = "completeness"
    figures: ClassVar[dict[str, Figure]] = {
        "completeness_gap": Figure(
            "completeness", "Completeness gap", "|Σ scores − (f(x) − f(baseline))| as a share of the latter.", "lower"
        ),
    }

    def __post_init__(self) -> None:
        check_baseline(self.baseline)

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        gap = scores.extra.get("completeness_gap")
        if gap is None:
            b = yield from baseline_of(self.baseline, q, q.input)
            gap = yield from completeness_gap(q, q.input, b, scores.values)
        return Measured({"completeness_gap": gap})


@dataclass(frozen=True, eq=False)
class MaxSensitivity(Check):
    """Largest relative change of the scores when the input is changed by a little noise.

    Parameters
    ----------
    samples : int, default 1
        Noisy copies of an example. Each runs the method again, and the interval is over examples: more of these say
        more than more copies of one.
    radius : float, default 0.02
        Half-width of the uniform noise, as a share of the input's range.

    References
    ----------
    Yeh et al.: On the (in)fidelity and sensitivity of explanations (2019).
    """

    samples: int = 1
    radius: float = 0.02

    name: ClassVar[str] = "max_sensitivity"
    reruns: ClassVar[bool] = True
    figures: ClassVar[dict[str, Figure]] = {
        "max_sensitivity": Figure(
            "max_sensitivity", "Max-sensitivity", "Largest relative change of the map under small input noise.", "lower"
        ),
    }

    def __post_init__(self) -> None:
        at_least("samples", self.samples, 1)
        if not (is_number(self.radius) and self.radius > 0):
            raise InputError(f"radius must be a number above 0, got {self.radius!r}")

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        x = q.input
        if not x.is_floating_point() or method is None:
            return Measured({"max_sensitivity": float("nan")})
        noise = torch.rand(self.samples, *x.shape[1:], generator=q.generator("radius")).to(x) * 2 - 1
        noisy = x + noise * (self.radius * (x.max() - x.min()))
        here = positions(scores)
        largest = 0.0
        for row in noisy.split(1):
            other = yield from method.explain(q.with_input(row).at(q.network, method.differentiates, None))
            require_alike(here, positions(other))
            change = (positions(other).to(here) - here).norm() / here.norm().clamp_min(1e-12)
            largest = max(largest, float(change))
        return Measured({"max_sensitivity": largest})
