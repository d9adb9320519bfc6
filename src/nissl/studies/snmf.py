"""Shafran et al.: Decomposing MLP activations into interpretable features via semi-nonnegative matrix factorization (2025)."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

# ---------------------------------------------------------------- planted structure


def planted(
    seed: int, n: int = 800, d: int = 300, k: int = 10, size: int = 12, shared: int = 4, active: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations made of known features.

    Each feature is a group of `size` neurons with entries ±U(.5, 1.5), `shared` of them also in the group before it; each
    token uses `active` features with weights U(.5, 1.5). Gaussian noise of a quarter of the standard deviation is added.

    Returns
    -------
    activations : ndarray (n, d), float32
    features : ndarray (k, d)
    weights : ndarray (n, k)
    """
    rng = np.random.default_rng(seed)
    order, at = rng.permutation(d), 0
    features, group = np.zeros((k, d)), order[:0]
    for feature in features:
        old = rng.choice(group, shared, replace=False) if len(group) else group
        new = order[at : at + size - len(old)]
        at += len(new)
        group = np.concatenate([old, new])
        feature[group] = _entries(rng, size)
    weights = np.zeros((n, k))
    for row in weights:
        row[rng.choice(k, active, replace=False)] = rng.uniform(0.5, 1.5, active)
    return _noisy(rng, weights @ features), features, weights


def planted_families(
    seed: int, n: int = 800, d: int = 300, families: tuple[int, ...] = (3, 3, 4), size: int = 12, shared: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations made of features in families: neighbours in a family share neurons, with the same entries.

    Each token uses two features of one family.

    Returns
    -------
    activations : ndarray (n, d), float32
    features : ndarray (k, d)
    parent : ndarray (k,) of int
        The family of each feature.
    """
    rng = np.random.default_rng(seed)
    parent = np.repeat(np.arange(len(families)), families)
    order, at = rng.permutation(d), 0
    features = np.zeros((len(parent), d))
    for j, feature in enumerate(features):
        fresh = size
        if j and parent[j] == parent[j - 1]:
            old = rng.choice(np.flatnonzero(features[j - 1]), shared, replace=False)
            feature[old] = features[j - 1][old]
            fresh -= shared
        feature[order[at : at + fresh]] = _entries(rng, fresh)
        at += fresh
    weights = np.zeros((n, len(parent)))
    for row in weights:
        children = np.flatnonzero(parent == rng.integers(len(families)))
        row[rng.choice(children, 2, replace=False)] = rng.uniform(0.5, 1.5, 2)
    return _noisy(rng, weights @ features), features, parent


def _entries(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([-1.0, 1.0], n) * rng.uniform(0.5, 1.5, n)


def _noisy(rng: np.random.Generator, clean: np.ndarray) -> np.ndarray:
    return (clean + 0.25 * clean.std() * rng.standard_normal(clean.shape)).astype(np.float32)


@overload
def matched(
    planted: np.ndarray, found: np.ndarray, signed: bool = True, index: Literal[False] = False
) -> np.ndarray: ...
@overload
def matched(planted: np.ndarray, found: np.ndarray, signed: bool = True, *, index: Literal[True]) -> np.ndarray: ...
def matched(planted: np.ndarray, found: np.ndarray, signed: bool = True, index: bool = False) -> np.ndarray:
    """Cosine of each planted feature with the one it is paired with, in the pairing with the largest sum.

    Parameters
    ----------
    planted, found : ndarray (k, d)
    signed : bool, default True
        Whether a feature that points the other way is wrong.
    index : bool, default False
        Give the number of the partner instead of the cosine.
    """
    from scipy.optimize import linear_sum_assignment

    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (planted, found)]
    cosine = unit[0] @ unit[1].T
    cosine = cosine if signed else np.abs(cosine)
    rows, columns = linear_sum_assignment(-cosine)
    return columns if index else cosine[rows, columns]
