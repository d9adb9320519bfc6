"""Partitions: the prior of a mixture of finite mixtures, and one partition out of many draws.

References
----------
.. [1] Miller, Harrison: Mixture models with a prior on the number of components. JASA (2018).
.. [2] Fritsch, Ickstadt: Improved criteria for clustering based on the posterior similarity matrix. Bayesian Analysis (2009).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform
from scipy.special import gammaln, logsumexp

from nissl.errors import InputError

CANDIDATES = 100
"""Draws whose partitions `max_pear` looks at, evenly spaced."""


def log_coefficients(n: int, gamma: float = 1.0, stop: float = 0.2, n_components: int = 2000) -> np.ndarray:
    """Logarithm of V(t) of a mixture of finite mixtures, t = 0, ..., n + 1 [1]_.

    A partition of `n` items into t sets has the prior probability V(t) times the product over sets of gamma (gamma + 1) ...
    (gamma + size - 1).

    Parameters
    ----------
    n : int
    gamma : float, default 1.0
        Of the symmetric Dirichlet distribution of the weights.
    stop : float, default 0.2
        The number of components K = 1, 2, ... is geometric: ``stop * (1 - stop) ** (K - 1)``.
    n_components : int, default 2000
        Where the sum over K ends.

    Returns
    -------
    array (n + 2,)
        V(0) is that of no set, -inf where n > 0.
    """
    K = np.arange(1, n_components + 1)
    prior = np.log(stop) + (K - 1) * np.log1p(-stop) + gammaln(gamma * K) - gammaln(gamma * K + n)
    found = np.full(n + 2, -np.inf)
    for t in range(1, n + 2):
        k = K[t - 1 :]
        found[t] = logsumexp(gammaln(k + 1) - gammaln(k - t + 1) + prior[t - 1 :])
    return found


def log_prior(labels: np.ndarray, coefficients: np.ndarray, gamma: float = 1.0) -> float:
    """Log-probability of a partition under the prior of `log_coefficients`."""
    sizes = np.unique(labels, return_counts=True)[1]
    return float(coefficients[len(sizes)] + (gammaln(gamma + sizes) - gammaln(gamma)).sum())


def similarity(draws: Any) -> np.ndarray:
    """Share of draws in which two items are together.

    Parameters
    ----------
    draws : array of int (n_draws, n_items)
        Labels; they need not mean the same in two draws.

    Returns
    -------
    array (n_items, n_items)
    """
    draws = _draws(draws)
    n_items = draws.shape[1]
    found = np.zeros((n_items, n_items))
    for labels in draws:
        one = np.eye(labels.max() + 1, dtype=np.float32)[labels]
        found += one @ one.T
    return found / len(draws)


def expected_rand(labels: np.ndarray, together: np.ndarray) -> float:
    """Adjusted Rand index that a partition is expected to have with the draws behind a similarity matrix [2]_."""
    i, j = np.triu_indices(len(labels), 1)
    same, p = labels[i] == labels[j], together[i, j]
    if not len(p):
        return 1.0
    chance = same.sum() * p.sum() / len(p)
    most = (same.sum() + p.sum()) / 2
    return float(((p[same]).sum() - chance) / (most - chance)) if abs(most - chance) > 1e-12 else 1.0


def max_pear(draws: Any, together: np.ndarray | None = None) -> np.ndarray:
    """The partition of largest posterior expected adjusted Rand index [2]_.

    Candidates are the draws and the cuts of the average-linkage tree of the similarity matrix.

    Parameters
    ----------
    draws : array of int (n_draws, n_items)
    together : array (n_items, n_items), optional
        `similarity` of the draws.

    Returns
    -------
    array of int (n_items,)
        Labels 0, 1, ... in the order of their first items.
    """
    draws = _draws(draws)
    together = similarity(draws) if together is None else together
    few = draws[:: max(1, len(draws) // CANDIDATES)]
    candidates = np.unique(np.array([in_order(d) for d in few]), axis=0)
    n_items = draws.shape[1]
    if n_items > 1:
        distance = squareform(np.clip(1 - together, 0, None), checks=False)
        cuts = cut_tree(linkage(distance, "average"), n_clusters=range(1, min(n_items, int(draws.max()) + 3) + 1)).T
        candidates = np.unique(np.concatenate([candidates, [in_order(c) for c in cuts]]), axis=0)
    scores = [expected_rand(c, together) for c in candidates]
    return candidates[int(np.argmax(scores))]


def in_order(labels: np.ndarray) -> np.ndarray:
    """The same partition with labels 0, 1, ... in the order of their first items."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _draws(draws: Any) -> np.ndarray:
    found = np.asarray(draws)
    if found.ndim != 2 or not found.size or found.dtype.kind not in "iu" or found.min() < 0:
        raise InputError(f"draws must hold whole labels (n_draws, n_items) from 0 on, got {found.shape} {found.dtype}")
    return found
