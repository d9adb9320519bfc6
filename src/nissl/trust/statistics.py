"""How sure a figure is: bootstrap intervals, paired permutation tests, corrections for many tests, areas."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from scipy.special import ndtr, ndtri

from nissl.arguments import at_least, is_number
from nissl.errors import InputError

EXACT_UP_TO = 12
"""Pairs up to which `paired_test` goes through all sign patterns."""

_BLOCK = 4_000_000  # numbers held at once; bounds memory, not the result


@dataclass(frozen=True, eq=False)
class Interval:
    """A statistic over examples and its bootstrap interval.

    Attributes
    ----------
    value, low, high : ndarray
        The statistic and the ends of its interval, one for each row (0-d arrays for one row). `value` is NaN
        without examples; `low` and `high` are NaN with fewer than two.
    n, dropped : ndarray of int
        Examples used, and examples left out because they were NaN.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True, eq=False)
class PairedTest:
    """What `paired_test` found.

    Attributes
    ----------
    difference : ndarray
        Mean of a − b over complete pairs; NaN without pairs.
    p : ndarray
        p value of the sign-flip permutation test; NaN without pairs.
    smallest_p : ndarray
        The smallest p that this number of pairs (and of random sign patterns) can give. 1 without pairs.
    n, dropped : ndarray of int
        Complete pairs, and pairs left out because one of the two was NaN.
    """

    difference: np.ndarray
    p: np.ndarray
    smallest_p: np.ndarray
    n: np.ndarray
    dropped: np.ndarray


def bootstrap(
    values: Any,
    statistic: Literal["mean", "median"] = "mean",
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of a mean or median over examples.

    Means get the bias-corrected and accelerated (BCa) interval. Medians get the percentile interval, because the
    jackknife, from which BCa takes its acceleration, is inconsistent for them.

    Parameters
    ----------
    values : array_like, shape (..., n_examples)
        NaN examples are dropped row by row. The same seed gives a row the same interval, whatever rows are beside it.
    statistic : {"mean", "median"}, default "mean"
    n_resamples : int, default 2000
    level : float, default 0.95
        Coverage of the interval, between 0 and 1.
    seed : int, default 0

    Returns
    -------
    Interval
        Fields of shape (...). With one example the interval is NaN: one example says nothing about spread.

    Raises
    ------
    InputError
        Infinite or non-numeric values, no example axis, or parameters out of range.

    References
    ----------
    Efron, B. (1987). Better bootstrap confidence intervals. JASA 82, 171-185.
    """
    x = _numbers(values, "values")
    if statistic not in ("mean", "median"):
        raise InputError(f"statistic must be 'mean' or 'median', got {statistic!r}")
    at_least("n_resamples", n_resamples, 1)
    at_least("seed", seed, 0)
    if not (is_number(level) and 0 < level < 1):
        raise InputError(f"level must lie between 0 and 1, got {level!r}")
    lead = x.shape[:-1]
    rows, counts = _present_first(x.reshape(prod(lead), x.shape[-1]))
    value, low, high = np.full((3, len(rows)), np.nan)
    for n in np.unique(counts[counts > 0]):
        group = counts == n
        data = rows[group, :n]
        # Shifted by its first example, a constant row stays exactly constant under all sums below. Medians need no sum.
        shift = data[:, :1] if statistic == "mean" else np.zeros((len(data), 1))
        centred = data - shift
        point = centred.mean(axis=1) if statistic == "mean" else np.median(centred, axis=1)
        value[group] = point + shift[:, 0]
        if n == 1:
            continue
        drawn = np.random.default_rng(seed).integers(0, n, size=(n_resamples, n))
        resampled = np.sort(_resample(centred, drawn, statistic), axis=1)
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        probabilities = np.broadcast_to(tails, (len(data), 2))
        if statistic == "mean":
            probabilities = _bca(centred, point, resampled, tails)
        low[group], high[group] = (_quantile(resampled, probabilities) + shift).T
    return Interval(
        value.reshape(lead),
        low.reshape(lead),
        high.reshape(lead),
        counts.reshape(lead),
        (x.shape[-1] - counts).reshape(lead),
    )


def paired_test(
    a: Any,
    b: Any,
    alternative: Literal["greater", "less", "two-sided"] = "greater",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Sign-flip permutation test of the mean paired difference.

    Under the null hypothesis the differences a − b are symmetric about 0, so each may change its sign. Up to 12 pairs
    all 2ⁿ sign patterns are tried and p is exact; beyond that `n_permutations` random ones, with
    p = (1 + count) / (1 + n_permutations), which is valid at any number of patterns.

    Parameters
    ----------
    a, b : array_like, shapes that broadcast to (..., n_examples)
        Paired values, for example many methods against one baseline. Pairs with a NaN are dropped.
    alternative : {"greater", "less", "two-sided"}, default "greater"
        "greater": a is above b.
    n_permutations : int, default 10000
    seed : int, default 0

    Returns
    -------
    PairedTest
        Fields of shape (...).

    Raises
    ------
    InputError
        Shapes that do not fit, infinite or non-numeric values, or parameters out of range.

    References
    ----------
    Fisher, R. A. (1935). The Design of Experiments, section 21.
    Phipson, B. & Smyth, G. K. (2010). Permutation p-values should never be zero. SAGMB 9(1), 39.
    """
    first, second = _numbers(a, "a"), _numbers(b, "b")
    if alternative not in ("greater", "less", "two-sided"):
        raise InputError(f"alternative must be 'greater', 'less' or 'two-sided', got {alternative!r}")
    at_least("n_permutations", n_permutations, 1)
    at_least("seed", seed, 0)
    if first.shape[-1] != second.shape[-1]:
        raise InputError(f"a has {first.shape[-1]} examples and b has {second.shape[-1]}; a paired test needs pairs")
    try:
        d = first - second
    except ValueError as error:
        raise InputError(f"shapes {first.shape} and {second.shape} do not broadcast") from error
    lead = d.shape[:-1]
    rows, counts = _present_first(d.reshape(prod(lead), d.shape[-1]))
    rows = np.nan_to_num(rows)  # a dropped pair is a difference of 0: it changes no sum, whatever its sign
    difference = np.divide(rows.sum(axis=1), counts, out=np.full(len(rows), np.nan), where=counts > 0)
    p = np.full(len(rows), np.nan)

    exact = (counts > 0) & (counts <= EXACT_UP_TO)
    if exact.any():
        few = rows[exact, :EXACT_UP_TO]
        bits = np.arange(2 ** few.shape[1])[:, None] >> np.arange(few.shape[1])
        p[exact] = _as_extreme(few, 1.0 - 2.0 * (bits & 1), alternative) / len(bits)
    sampled = counts > EXACT_UP_TO
    if sampled.any():
        many = rows[sampled]
        generator = np.random.default_rng(seed)
        count = np.zeros(len(many))
        block = max(1, _BLOCK // max(many.shape))
        for start in range(0, n_permutations, block):
            size = (min(block, n_permutations - start), many.shape[1])
            signs = 2.0 * generator.integers(0, 2, size=size, dtype=np.int8) - 1.0
            count += _as_extreme(many, signs, alternative)
        p[sampled] = (1 + count) / (1 + n_permutations)

    sides = 2.0 if alternative == "two-sided" else 1.0
    smallest = np.minimum(sides * 0.5**counts, 1.0)
    smallest[sampled] = np.maximum(smallest[sampled], 1 / (1 + n_permutations))
    return PairedTest(
        difference.reshape(lead),
        p.reshape(lead),
        smallest.reshape(lead),
        counts.reshape(lead),
        (d.shape[-1] - counts).reshape(lead),
    )


def holm(p: Any) -> np.ndarray:
    """Holm's step-down correction: adjusted p values that bound the chance of any false finding.

    Parameters
    ----------
    p : array_like, any shape
        All entries are one family. NaN marks a test that was not made: it stays NaN and is not counted.

    Returns
    -------
    ndarray, the shape of `p`

    Raises
    ------
    InputError
        A value outside [0, 1].

    References
    ----------
    Holm, S. (1979). A simple sequentially rejective multiple test procedure. Scand. J. Statist. 6, 65-70.
    """
    flat, order = _family(p)
    m = len(order)
    adjusted = flat.copy()
    adjusted[order] = np.minimum(np.maximum.accumulate(flat[order] * np.arange(m, 0, -1)), 1.0)
    return adjusted.reshape(np.shape(p))


def benjamini_hochberg(p: Any) -> np.ndarray:
    """Benjamini and Hochberg's step-up correction: adjusted p values that bound the share of false findings.

    Parameters
    ----------
    p : array_like, any shape
        All entries are one family. NaN marks a test that was not made: it stays NaN and is not counted.

    Returns
    -------
    ndarray, the shape of `p`

    Raises
    ------
    InputError
        A value outside [0, 1].

    References
    ----------
    Benjamini, Y. & Hochberg, Y. (1995). Controlling the false discovery rate. JRSS B 57, 289-300.
    """
    flat, order = _family(p)
    m = len(order)
    adjusted = flat.copy()
    scaled = flat[order] * m / np.arange(1, m + 1)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted.reshape(np.shape(p))


def area(y: Any, x: Any = None) -> np.ndarray:
    """Area under curves by the trapezoidal rule, divided by the length of the x axis.

    A curve that is constant at c has the area c, whatever its axis.

    Parameters
    ----------
    y : array_like, shape (..., n_points)
        NaN anywhere in a curve makes its area NaN.
    x : array_like, shape (n_points,), optional
        Strictly increasing; equally spaced by default.

    Returns
    -------
    ndarray, shape (...)

    Raises
    ------
    InputError
        Fewer than two points, or an `x` that does not fit or does not increase.
    """
    heights = _numbers(y, "y")
    n = heights.shape[-1]
    if n < 2:
        raise InputError(f"an area needs at least 2 points, got {n}")
    places = np.linspace(0.0, 1.0, n) if x is None else _numbers(x, "x")
    if places.shape != (n,):
        raise InputError(f"x has the shape {places.shape}, y needs ({n},)")
    steps = np.diff(places)
    if not (steps > 0).all():
        raise InputError("x must increase strictly")
    return np.asarray((heights[..., 1:] + heights[..., :-1]) / 2 @ steps / (places[-1] - places[0]))


def _numbers(values: Any, name: str) -> np.ndarray:
    """Float64 with at least one axis; NaN allowed, infinity not."""
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from error
    if x.ndim == 0:
        raise InputError(f"{name} must have an axis of examples, got one number")
    if np.isinf(x).any():
        raise InputError(f"{name} holds {int(np.isinf(x).sum())} infinite numbers; give NaN for what was not measured")
    return x


def _present_first(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move NaN to the end of each row, keep the order of the rest; also the number of non-NaN entries."""
    missing = np.isnan(rows)
    order = np.argsort(missing, axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1), (~missing).sum(axis=1)


def _resample(data: np.ndarray, drawn: np.ndarray, statistic: str) -> np.ndarray:
    """The statistic of each row of `data` (rows, n) for each draw of `drawn` (resamples, n)."""
    n = data.shape[1]
    result = np.empty((len(data), len(drawn)))
    block = max(1, _BLOCK // (n * (1 if statistic == "mean" else len(data))))
    for start in range(0, len(drawn), block):
        part = drawn[start : start + block]
        if statistic == "mean":
            cells = part + n * np.arange(len(part))[:, None]
            weights = np.bincount(cells.ravel(), minlength=part.size).reshape(part.shape)
            result[:, start : start + block] = data @ weights.T / n
        else:
            result[:, start : start + block] = np.median(data[:, part], axis=-1)
    return result


def _bca(data: np.ndarray, mean: np.ndarray, resampled: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """Probabilities (rows, 2) at which BCa reads the sorted bootstrap means."""
    # Equal means that differ in rounding are ties; ties count half, so a constant row has no bias.
    gap = resampled - mean[:, None]
    tie = np.abs(gap) <= 1e-12 * np.abs(data).max(axis=1, keepdims=True)
    below = ((gap < 0) & ~tie).mean(axis=1) + tie.mean(axis=1) / 2
    least = 0.5 / resampled.shape[1]
    bias = ndtri(np.clip(below, least, 1 - least))
    deviation = data - mean[:, None]  # proportional to the jackknife's influence values
    spread = (deviation**2).sum(axis=1) ** 1.5
    acceleration = np.divide((deviation**3).sum(axis=1), 6 * spread, out=np.zeros(len(data)), where=spread > 0)
    z = bias[:, None] + ndtri(tails)
    return ndtr(bias[:, None] + z / (1 - acceleration[:, None] * z))


def _quantile(ordered: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Quantiles of sorted rows, linear between order statistics, at each row's own probabilities."""
    position = probabilities * (ordered.shape[1] - 1)
    lower = np.floor(position).astype(int)
    upper = np.minimum(lower + 1, ordered.shape[1] - 1)
    left, right = np.take_along_axis(ordered, lower, axis=1), np.take_along_axis(ordered, upper, axis=1)
    return left + (position - lower) * (right - left)


def _as_extreme(rows: np.ndarray, signs: np.ndarray, alternative: str) -> np.ndarray:
    """For each row (rows, n), how many sign patterns (patterns, n) give a sum at least as extreme as its own."""
    observed = rows.sum(axis=1, keepdims=True)
    flipped = rows @ signs.T
    if alternative == "less":
        observed, flipped = -observed, -flipped
    elif alternative == "two-sided":
        observed, flipped = np.abs(observed), np.abs(flipped)
    # Sums that are equal but for rounding count as equal; otherwise the identity pattern itself could be missed.
    tolerance = 1e-12 * np.abs(rows).sum(axis=1, keepdims=True)
    return (flipped >= observed - tolerance).sum(axis=1)


def _family(p: Any) -> tuple[np.ndarray, np.ndarray]:
    """Flat p values and the positions of those that are not NaN, in rising order."""
    try:
        flat = np.array(p, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        raise InputError(f"p values must be numbers: {error}") from error
    if ((flat < 0) | (flat > 1)).any():
        raise InputError("p values must lie in [0, 1]")
    return flat, np.argsort(flat, kind="stable")[: int((~np.isnan(flat)).sum())]
