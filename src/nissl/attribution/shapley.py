"""Scores from coalitions of features: LIME, KernelSHAP and Shapley values from permutations.

All three play one game: features are present or absent, and a coalition is worth what the network says when the others
are replaced by the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from math import comb
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import at_least, is_number
from nissl.attribution.base import Method
from nissl.attribution.masking import (
    Baseline,
    Features,
    as_scores,
    baseline_of,
    check_baseline,
    dims_of,
    features_of,
    scalars_under,
)
from nissl.errors import InputError
from nissl.runner import CHUNK, Asking, Explained, Question, explained


@dataclass(frozen=True, eq=False)
class Game:
    """A coalition game whose players are the features of the activation x.

    Attributes
    ----------
    q : Question
    x : Tensor (1, ...)
    baseline : Tensor (n, ...)
        What stands in for absent features; of several rows the mean answer is taken.
    features : Features
    """

    q: Question
    x: Tensor
    baseline: Tensor
    features: Features

    @property
    def n(self) -> int:
        """Number of players."""
        return self.features.n

    def worth(self, present: np.ndarray) -> Asking[np.ndarray]:
        """What coalitions, bool (n_coalitions, n), are worth: (n_coalitions,) float64."""
        found = []
        for rows in torch.from_numpy(present).split(CHUNK):
            masks = self.features.masks(rows.to(self.x.device))
            found.append((yield from scalars_under(self.q, self.x, self.baseline, masks)).numpy())
        return np.concatenate(found)

    def explained(self, scores: np.ndarray, **extra: float) -> Explained:
        """Scores of the players, each shared equally among the positions of its feature."""
        shared, dims = self.features.share(torch.from_numpy(scores))
        return explained(self.q, as_scores(shared, self.x), dims, **extra)


def game_of(q: Question, baseline: Baseline, size: int | None, superpixels: int | None) -> Asking[Game]:
    """The game of a question; see `features_of` for its players."""
    x = yield from q.value()
    b = yield from baseline_of(baseline, q, x)
    return Game(q, x, b, features_of(q, x, size, superpixels))


@dataclass(frozen=True, eq=False)
class LIME(Method):
    """Coefficients of a linear model of which features are present, fitted around the example.

    Parameters
    ----------
    n_samples : int, default 1000
        Coalitions asked; where there are no more, all of them.
    kernel_width : float, default 0.25
        σ of the weight exp(-D² / σ²) of a coalition, D its cosine distance from the example.
    linear_model : {"ridge", "lasso"}, default "ridge"
    alpha : float, optional
        Penalty, as in scikit-learn: by default 1 for ridge, 0.01 for lasso (in units of the target).
    size, superpixels : int, optional
        The features; see `features_of`. By default about 64 superpixels of an image at the input, else what
        `features_of` gives.
    baseline : str, number or Tensor, default "zero"
        What stands in for absent features.

    Notes
    -----
    Each feature is present with probability 1/2; the whole example is always among the coalitions. ``surrogate_r2`` is
    the weighted share of variance that the linear model explains: where it is low, the scores do not describe the
    network.

    References
    ----------
    Ribeiro, Singh, Guestrin: "Why should I trust you?" Explaining the predictions of any classifier (2016).
    """

    n_samples: int = 1000
    kernel_width: float = 0.25
    linear_model: Literal["ridge", "lasso"] = "ridge"
    alpha: float | None = None
    size: int | None = None
    superpixels: int | None = None
    baseline: Baseline = "zero"

    name: ClassVar[str] = "lime"
    title: ClassVar[str] = "LIME"
    paper: ClassVar[str] = "Ribeiro et al. 2016"

    def __post_init__(self) -> None:
        _check(self)
        if not (is_number(self.kernel_width) and self.kernel_width > 0):
            raise InputError(f"kernel_width must be above 0, got {self.kernel_width!r}")
        if self.linear_model not in ("ridge", "lasso"):
            raise InputError(f"linear_model={self.linear_model!r}: choose 'ridge' or 'lasso'")
        if self.alpha is not None and not (is_number(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha must be above 0, got {self.alpha!r}")

    def at_budget(self, passes: int) -> LIME:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_samples=max(min(self.n_samples, passes), 4))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        from sklearn.linear_model import Lasso, Ridge

        x = yield from q.value()
        superpixels = self.superpixels
        if superpixels is None and self.size is None and q.at_input and dims_of(q, x) == ("channel", "y", "x"):
            superpixels = 64
        game = yield from game_of(q, self.baseline, self.size, superpixels)
        if _few(game.n, self.n_samples):
            present = subsets(game.n)
        else:
            rng = np.random.default_rng(q.generator("coalitions").initial_seed())
            present = rng.random((self.n_samples, game.n)) < 0.5
            present[0] = True
        worth = yield from game.worth(present)
        distance = 1 - np.sqrt(present.mean(1))  # cosine distance of a 0/1 vector from all ones
        weights = np.exp(-((distance / self.kernel_width) ** 2))
        alpha = self.alpha if self.alpha is not None else 1.0 if self.linear_model == "ridge" else 0.01
        model = (Ridge if self.linear_model == "ridge" else Lasso)(alpha=alpha)
        model.fit(present.astype(float), worth, sample_weight=weights)
        fitted = model.predict(present.astype(float))
        return game.explained(np.asarray(model.coef_), surrogate_r2=_r2(worth, fitted, weights))


@dataclass(frozen=True, eq=False)
class KernelSHAP(Method):
    """Shapley values as the weighted least-squares fit of an additive game.

    Parameters
    ----------
    n_samples : int, default 1000
        Coalitions asked, the empty and the whole one included. Where all 2^n fit, all are asked and values are exact.
    size, superpixels : int, optional
        The players; see `features_of`.
    baseline : str, number or Tensor, default "zero"
        What stands in for absent features; for the mean over background data give a tensor of several rows (each
        coalition then costs so many rows).

    Notes
    -----
    Coalition sizes that the budget covers are asked in full; of the others coalitions are drawn with the Shapley
    kernel, each with its complement, which makes values exact for games of single features and pairs once there are
    more complementary pairs than features. The fit is constrained to f(x) - f(baseline), so values are complete
    whatever the number of samples. With fewer coalitions than features the fit is the one nearest to an equal split.
    ``surrogate_r2`` is the weighted share of variance that the additive game explains; what the network does in
    interactions is missing from it.

    References
    ----------
    Lundberg, Lee: A unified approach to interpreting model predictions (2017). Covert, Lee: Improving KernelSHAP:
    practical Shapley value estimation via linear regression (2021).
    """

    n_samples: int = 1000
    size: int | None = None
    superpixels: int | None = None
    baseline: Baseline = "zero"

    name: ClassVar[str] = "kernelshap"
    title: ClassVar[str] = "KernelSHAP"
    paper: ClassVar[str] = "Lundberg & Lee 2017"
    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def at_budget(self, passes: int) -> KernelSHAP:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_samples=max(min(self.n_samples, passes), 4))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        game = yield from game_of(q, self.baseline, self.size, self.superpixels)
        rng = np.random.default_rng(q.generator("coalitions").initial_seed())
        inner, weights = kernel_coalitions(game.n, self.n_samples, rng)
        ends = np.array([[False], [True]]).repeat(game.n, 1)
        worth = yield from game.worth(np.concatenate([ends, inner]))
        nothing, everything, y = worth[0], worth[1], worth[2:] - worth[0]
        equal = (everything - nothing) / game.n
        values = np.full(game.n, equal)
        if len(inner):
            # deviations from the equal split sum to 0, so only the centred presence of a feature matters
            centred = inner - inner.mean(1, keepdims=True)
            root = np.sqrt(weights)
            target = y - inner.sum(1) * equal
            values += np.linalg.lstsq(centred * root[:, None], target * root, rcond=1e-10)[0]
        gap = _gap(values, everything - nothing)
        return game.explained(values, completeness_gap=gap, surrogate_r2=_r2(y, inner @ values, weights))


@dataclass(frozen=True, eq=False)
class ShapleySampling(Method):
    """Shapley values: a feature's mean contribution when features join in random order.

    Parameters
    ----------
    n_samples : int, default 1000
        Coalitions asked, the empty and the whole one included. Where all 2^n fit, all are asked and values are exact.
    size, superpixels : int, optional
        The players; see `features_of`.
    baseline : str, number or Tensor, default "zero"
        What stands in for absent features; see `KernelSHAP`.

    Notes
    -----
    Orders come in pairs, one the reverse of the other, which makes values exact for games of single features and pairs
    from the first pair on. Complete for every number of samples. Where `n_samples` does not suffice for one such pair,
    features join in blocks of consecutive places in the order, and share their block's contribution.

    References
    ----------
    Štrumbelj, Kononenko: An efficient explanation of individual classifications using game theory (2010). Mitchell,
    Cooper, Frank, Holmes: Sampling permutations for Shapley value estimation (2022).
    """

    n_samples: int = 1000
    size: int | None = None
    superpixels: int | None = None
    baseline: Baseline = "zero"

    name: ClassVar[str] = "shapley"
    title: ClassVar[str] = "Shapley values"
    paper: ClassVar[str] = "Štrumbelj & Kononenko 2010"
    complete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)

    def at_budget(self, passes: int) -> ShapleySampling:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_samples=max(min(self.n_samples, passes), 4))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        game = yield from game_of(q, self.baseline, self.size, self.superpixels)
        n = game.n
        if _few(n, self.n_samples):
            present = subsets(n)
            worth = yield from game.worth(present)
            values = exact_shapley(present, worth)
            return game.explained(values, completeness_gap=_gap(values, worth[-1] - worth[0]))
        budget = (self.n_samples - 2) // 2  # inner coalitions of all orders; their reverses cost as many
        block = -(-n // (budget + 1))
        cuts = np.arange(block, n, block)
        rng = np.random.default_rng(q.generator("orders").initial_seed())
        place = rng.permuted(np.tile(np.arange(n), (max(budget // len(cuts), 1), 1)), axis=1)
        place = np.concatenate([place, n - 1 - place])
        joined = place[:, None] < cuts[:, None]
        ends = np.array([[False], [True]]).repeat(n, 1)
        worth = yield from game.worth(np.concatenate([ends, joined.reshape(-1, n)]))
        path = np.pad(worth[2:].reshape(len(place), len(cuts)), ((0, 0), (1, 1)))
        path[:, 0], path[:, -1] = worth[0], worth[1]
        share = np.diff(path) / np.diff(np.concatenate([[0], cuts, [n]]))
        values = np.take_along_axis(share, place // block, 1).mean(0)
        return game.explained(values, completeness_gap=_gap(values, worth[1] - worth[0]))


def subsets(n: int) -> np.ndarray:
    """All coalitions of n players, bool (2^n, n); the empty one first, the whole one last."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def exact_shapley(present: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """Shapley values from the worth of all 2^n coalitions (in any order)."""
    n = present.shape[1]
    # a coalition of s others comes before a player in s! (n - s - 1)! of the n! orders
    weight = np.array([1 / (n * comb(n - 1, s)) for s in range(n)])
    size = present.sum(1)[:, None]
    return worth @ np.where(present, weight[size - 1], -weight[np.minimum(size, n - 1)])


def kernel_coalitions(n: int, n_samples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coalitions and weights by the Shapley kernel, without the empty and the whole one.

    Returns
    -------
    present : ndarray, bool (n_coalitions, n)
        At most ``n_samples - 2``, closed under complement.
    weights : ndarray (n_coalitions,)
        Sum to 1 for two players or more.
    """
    sizes = np.arange(1, n)
    mass = 1 / (sizes * (n - sizes))  # of all coalitions of a size together
    mass = mass / mass.sum()
    parts, weights = [np.zeros((0, n), dtype=bool)], [np.zeros(0)]
    budget, left, smallest = n_samples - 2, 1.0, 1
    all_fit = _few(n, n_samples)
    # from the outside in: sizes that the budget covers are asked in full
    while smallest <= n // 2:
        level = mass[[smallest - 1]] if 2 * smallest == n else mass[[smallest - 1, n - smallest - 1]]
        count = comb(n, smallest) * len(level)
        if not all_fit and count > budget * level.sum() / left:
            break
        members = np.array(list(combinations(range(n), smallest)))
        some = np.zeros((len(members), n), dtype=bool)
        np.put_along_axis(some, members, True, axis=1)
        parts += [some, ~some][: len(level)]
        weights.append(np.full(count, level.sum() / count))
        budget, left, smallest = budget - count, left - level.sum(), smallest + 1
    pairs = budget // 2
    if smallest <= n // 2 and pairs:
        inside = slice(smallest - 1, n - smallest)
        size = rng.choice(sizes[inside], pairs, p=mass[inside] / mass[inside].sum())
        some = rng.random((pairs, n)).argsort(1).argsort(1) < size[:, None]
        parts += [some, ~some]
        weights.append(np.full(2 * pairs, left / (2 * pairs)))
    return np.concatenate(parts), np.concatenate(weights)


def _few(n: int, n_samples: int) -> bool:
    return n < 32 and 2**n <= n_samples


def _check(method: LIME | KernelSHAP | ShapleySampling) -> None:
    at_least("n_samples", method.n_samples, 4)
    for name in ("size", "superpixels"):
        if getattr(method, name) is not None:
            at_least(name, getattr(method, name), 1)
    if method.size is not None and method.superpixels is not None:
        raise InputError("size= makes patches and superpixels= makes superpixels: give one of them")
    check_baseline(method.baseline)


def _gap(values: np.ndarray, promised: float) -> float:
    """|sum of values - promised| / |promised|; see `completeness_gap`."""
    return float(abs(values.sum() - promised) / max(abs(promised), 1e-12))


def _r2(y: np.ndarray, fitted: np.ndarray, weights: np.ndarray) -> float:
    """Weighted share of the variance of y that is fitted; 1 where y does not vary at all."""
    if not len(y):
        return 1.0
    total = np.average((y - np.average(y, weights=weights)) ** 2, weights=weights)
    missing = np.average((y - fitted) ** 2, weights=weights)
    return float(1 - missing / total) if total > 1e-24 else 1.0
