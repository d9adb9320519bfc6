"""How far score maps of different methods agree, example by example.

Agreement is no evidence of truth: methods can agree and all be wrong. It says which methods are interchangeable.
Maps are compared as they are: whether signs count is decided by the caller, who takes absolute values or not, and maps
of different resolution are resized by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import kendalltau, rankdata
from skimage.metrics import structural_similarity

from nissl.errors import InputError


def kendall(a: Any, b: Any, max_entries: int = 10_000, seed: int = 0) -> np.ndarray:
    """Kendall's rank correlation (tau-b, ties handled), in O(d log d) for d entries.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps; each example is flattened to its d entries.
    max_entries : int, default 10000
        Longer maps are compared at this many places, drawn once without replacement with `seed`, the same for all
        examples. The standard error that this adds is at most √(2 / `max_entries`), .014 by default.
    seed : int, default 0

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant (at the places drawn).

    Raises
    ------
    InputError
        Shapes that differ, or scores that are not finite.

    References
    ----------
    Kendall, M. G. (1945). The treatment of ties in ranking problems. Biometrika 33, 239-251.
    Neely, M. et al. (2022). A song of (dis)agreement. arXiv:2205.04559.
    """
    first, second = _pair(a, b)
    if max_entries < 2:
        raise InputError(f"max_entries must be at least 2, got {max_entries}")
    d = first.shape[1]
    if d > max_entries:
        places = np.random.default_rng(seed).choice(d, size=max_entries, replace=False)
        first, second = first[:, places], second[:, places]
    elif d < 2:
        return np.full(len(first), np.nan)
    pairs = zip(first, second, strict=True)
    return np.array([kendalltau(x, y)[0] for x, y in pairs], dtype=np.float64)


def spearman(a: Any, b: Any) -> np.ndarray:
    """Spearman's rank correlation: the correlation of the ranks, ties at their mean rank.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, or scores that are not finite.
    """
    first, second = _pair(a, b)
    return np.einsum("nd,nd->n", _unit_ranks(first), _unit_ranks(second)).clip(-1.0, 1.0)


def top_k(a: Any, b: Any, fraction: float = 0.1) -> np.ndarray:
    """Intersection over union of the entries with the highest scores.

    Each map marks its k = max(1, floor(`fraction` · d)) highest entries. Entries tied at the limit share the places
    left over equally, so the result depends on no order of entries: with w the resulting weights in [0, 1], it is
    Σ min(w_a, w_b) / Σ max(w_a, w_b). Without ties that is the intersection over union of two sets of k entries. Two
    unrelated maps reach about `fraction` / (2 − `fraction`), .05 by default.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.
    fraction : float, default 0.1
        Share of entries that are marked, in (0, 1].

    Returns
    -------
    ndarray, shape (n_examples,)
        In [0, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, scores that are not finite, or a fraction out of range.
    """
    first, second = _pair(a, b)
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must lie in (0, 1], got {fraction}")
    w_a, w_b = _top_weights(first, fraction), _top_weights(second, fraction)
    return np.minimum(w_a, w_b).sum(axis=1) / np.maximum(w_a, w_b).sum(axis=1)


def ssim(a: Any, b: Any, window: int = 7) -> np.ndarray:
    """Structural similarity of two-dimensional maps, each scaled to [0, 1] by its own minimum and maximum.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, height, width)
        Score maps.
    window : int, default 7
        Side of the window in entries, odd. Smaller maps get the largest odd window that fits.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Maps that are not two-dimensional or smaller than 3 × 3, shapes that differ, scores that are not finite, or a
        window that is even or below 3.

    References
    ----------
    Wang, Z. et al. (2004). Image quality assessment. IEEE Trans. Image Process. 13, 600-612.
    """
    shape = np.shape(a)
    if len(shape) != 3 or min(shape[1:]) < 3:
        raise InputError(f"SSIM needs maps (n_examples, height, width) of at least 3 × 3, got the shape {shape}")
    if window < 3 or window % 2 == 0:
        raise InputError(f"window must be odd and at least 3, got {window}")
    first, second = _pair(a, b)
    smaller = min(shape[1:])
    side = min(window, smaller if smaller % 2 else smaller - 1)
    images = zip(_unit_range(first).reshape(shape), _unit_range(second).reshape(shape), strict=True)
    return np.array(
        [
            np.nan
            if np.isnan(x).any() or np.isnan(y).any()
            else structural_similarity(x, y, win_size=side, data_range=1.0)
            for x, y in images
        ],
        dtype=np.float64,
    )


MEASURES: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "spearman": spearman,
    "kendall": kendall,
    "top-k": top_k,
    "ssim": ssim,
}
"""Measures by name. Each takes two stacks of maps (n_examples, ...) and gives (n_examples,)."""


def agreement(maps: Mapping[str, Any], measure: str | Callable[[Any, Any], np.ndarray] = "spearman") -> xr.DataArray:
    """Agreement of every pair of methods on every example.

    Parameters
    ----------
    maps : mapping of method name to array_like, each of shape (n_examples, ...)
    measure : {"spearman", "kendall", "top-k", "ssim"} or callable, default "spearman"
        A symmetric function of two stacks of maps that gives one number per example, such as
        ``functools.partial(top_k, fraction=0.05)``.

    Returns
    -------
    DataArray, dims ("example", "method_a", "method_b")
        Symmetric in the methods. NaN, also on the diagonal, where a map is constant.

    Raises
    ------
    InputError
        No maps, an unknown measure, shapes that differ between methods, or scores that are not finite.

    See Also
    --------
    agreement_matrix : the mean over examples.
    """
    if not maps:
        raise InputError("maps are empty: agreement needs at least one method")
    if isinstance(measure, str) and measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}; there are {', '.join(MEASURES)}")
    names = list(maps)
    stacks = {name: np.asarray(stack) for name, stack in maps.items()}
    shapes = {name: stack.shape for name, stack in stacks.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"maps differ in shape: {shapes}; resize them first")
    for name, stack in stacks.items():
        _flat(stack, f"maps of {name!r}")
    n_examples = len(stacks[names[0]])

    if measure == "spearman":
        # Ranks once for each map, then all pairs in one matrix product per example.
        ranks = np.stack([_unit_ranks(_flat(stack, name)) for name, stack in stacks.items()], axis=1)
        values = (ranks @ ranks.transpose(0, 2, 1)).clip(-1.0, 1.0)
    else:
        compare = MEASURES[measure] if isinstance(measure, str) else measure
        values = np.empty((n_examples, len(names), len(names)))
        for i, j in combinations_with_replacement(range(len(names)), 2):
            values[:, i, j] = values[:, j, i] = compare(stacks[names[i]], stacks[names[j]])
    return xr.DataArray(
        values,
        dims=("example", "method_a", "method_b"),
        coords={"method_a": names, "method_b": names},
        name=measure if isinstance(measure, str) else "agreement",
    )


def agreement_matrix(
    maps: Mapping[str, Any], measure: str | Callable[[Any, Any], np.ndarray] = "spearman"
) -> pd.DataFrame:
    """Mean agreement over the examples on which it is defined, methods × methods.

    Parameters and errors are those of `agreement`, whose values show how many examples stand behind a mean and how much
    they differ.

    Returns
    -------
    DataFrame, index and columns the methods
        NaN where a pair is defined on no example.
    """
    values = agreement(maps, measure)
    names = list(maps)
    present = values.notnull()
    total, count = values.fillna(0.0).sum("example").to_numpy(), present.sum("example").to_numpy()
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return pd.DataFrame(mean, index=names, columns=names)


def _flat(values: Any, name: str) -> np.ndarray:
    """One row of finite float64 scores for each example."""
    try:
        x = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from error
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"{name} must have the shape (n_examples, ...) with entries, got {x.shape}")
    if not np.isfinite(x).all():
        raise InputError(f"{name}: {int((~np.isfinite(x)).sum())} scores are NaN or infinite")
    return x.reshape(len(x), -1)


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two stacks of maps of one shape, flattened."""
    if np.shape(a) != np.shape(b):
        raise InputError(f"maps differ in shape: {np.shape(a)} and {np.shape(b)}; resize them first")
    return _flat(a, "a"), _flat(b, "b")


def _unit_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of each row, centred and of norm 1, so that a dot product is Spearman's correlation. NaN if constant."""
    centred = rankdata(x, axis=1) - (x.shape[1] + 1) / 2
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norm, out=np.full(x.shape, np.nan), where=norm > 0)


def _unit_range(x: np.ndarray) -> np.ndarray:
    """Each row scaled to [0, 1]. NaN if constant."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    return np.divide(x - low, high - low, out=np.full(x.shape, np.nan), where=high > low)


def _top_weights(x: np.ndarray, fraction: float) -> np.ndarray:
    """Weight of each entry among the k highest of its row: 1, 0, or an equal share for ties at the limit."""
    d = x.shape[1]
    k = max(1, int(fraction * d + 1e-9))
    limit = np.partition(x, d - k, axis=1)[:, d - k, None]
    above, tied = x > limit, x == limit
    share = (k - above.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)
    weights = above + tied * share
    weights[x.min(axis=1) == x.max(axis=1)] = np.nan
    return weights
