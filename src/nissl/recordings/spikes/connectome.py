"""Which neurons act together, when, and in which animals: affinities over time, their factors, and communities in each of these.

Affinity is co-variation of activity. It is neither a synapse nor a cause.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.cluster import KMeans
from sklearn.utils.validation import check_is_fitted

from nissl.arguments import at_least, flag, is_number, is_whole
from nissl.errors import InputError
from nissl.recordings.arrays import as_bins

BORDER = 3
"""Standard deviations of the kernel that are discarded at either end, where the derivative sees less than the kernel."""
STABLE = 0.9
"""Similarity of restarts from which a number of components is taken to be stable."""
MOST_BLOCKS = 12
"""Number of blocks up to which spectral starts are tried."""
GAIN = 1e-9
"""Nats by which a description must shorten for a move to be made."""


class DifferentialAffinity(TransformerMixin, BaseEstimator):
    """How much each pair of neurons rises and falls together, over time.

    Parameters
    ----------
    sigma : float, default 2
        Standard deviation, in bins, of the Gaussian with whose derivative traces are convolved.
    kind : {"product", "geometric"}, default "product"
        max(0, gᵢ gⱼ) of rates of change g of unit mean square, or its square root.
    block : int, default 5
        Bins that are averaged.
    anti : bool, default False
        max(0, −gᵢ gⱼ) instead: one rises while the other falls.
    min_snr : float, default 0
        Neurons are missing in an animal where the variance of their smoothed trace, over that of what smoothing took away, is lower.
        Without a bar, a dead neuron's noise counts as much as an active one's trace.

    Attributes
    ----------
    n_neurons_ : int
    pairs_ : array of int (2, n_pairs)
        Neurons i < j of each pair, in the order of ``numpy.triu_indices``.

    Notes
    -----
    Independent Gaussian traces have the affinity 1/π (product) or .338 (geometric), not 0: a background. Traces may be scaled and
    shifted without effect. The formulas are nissl's own: of the paper only the idea was at hand.

    References
    ----------
    Dyballa, Lang, Haslund-Gourley, Yemini & Zucker (2024). Learning dynamic representations of the functional connectome in
    neurobiological networks. ICLR.

    See Also
    --------
    DynamicConnectome : the whole of it.
    """

    def __init__(
        self, sigma: float = 2.0, kind: str = "product", block: int = 5, *, anti: bool = False, min_snr: float = 0.0
    ) -> None:
        self.sigma = sigma
        self.kind = kind
        self.block = block
        self.anti = anti
        self.min_snr = min_snr

    def fit(self, X: Any, y: Any = None) -> DifferentialAffinity:
        """Check the parameters and count the neurons.

        Parameters
        ----------
        X : array (n_animals, n_times, n_neurons) or a list of arrays (n_times, n_neurons)
            Traces on one time axis. NaN in a whole column: the neuron was not found in that animal.
        y : ignored

        Raises
        ------
        InputError
            Parameters out of range; traces of different shapes, too short, or with NaN in parts of a column.
        """
        for name, value, low in (("sigma", self.sigma, 0.0), ("min_snr", self.min_snr, -1.0)):
            if not (is_number(value) and value > low) or value < 0:
                raise InputError(f"{name} must be a number {'above' if low == 0 else 'from'} 0, got {value!r}")
        if self.kind not in ("product", "geometric"):
            raise InputError(f"kind={self.kind!r}: choose 'product' or 'geometric'")
        at_least("block", self.block, 1)
        flag("anti", self.anti)
        X = as_animals(X)
        if X.shape[2] < 2:
            raise InputError("pairs need at least 2 neurons, got 1")
        self._blocks(X.shape[1])
        self.n_neurons_ = X.shape[2]
        self.pairs_ = np.array(np.triu_indices(self.n_neurons_, 1))
        return self

    def _blocks(self, n_times: int) -> tuple[int, int]:
        cut = int(np.ceil(BORDER * self.sigma))
        n = (n_times - 2 * cut) // self.block
        if n < 1:
            raise InputError(
                f"{n_times} times are too few: {cut} are discarded at either end (sigma={self.sigma}) and {self.block} make a block"
            )
        return cut, n

    def times(self, n_times: int) -> np.ndarray:
        """Middle of each block, in bins of the traces."""
        cut, n = self._blocks(n_times)
        return cut + self.block * np.arange(n) + (self.block - 1) / 2

    def transform(self, X: Any) -> np.ndarray:
        """Affinities of pairs, float32.

        Returns
        -------
        array (n_blocks, n_animals, n_pairs)
            NaN where a neuron is missing. Bins that fill no block at the end are left out.

        Raises
        ------
        InputError
            As in fit; another number of neurons.
        """
        check_is_fitted(self)
        X = as_animals(X)
        if X.shape[2] != self.n_neurons_:
            raise InputError(f"X has {X.shape[2]} neurons, expected {self.n_neurons_} as in fit")
        return self._pairwise(self._rates(X))

    def _rates(self, X: np.ndarray) -> np.ndarray:
        """Rates of change of unit mean square (n_animals, n_blocks · block, n_neurons), NaN where missing or too noisy."""
        cut, n = self._blocks(X.shape[1])
        inside = slice(cut, cut + n * self.block)
        g = gaussian_filter1d(X, self.sigma, axis=1, order=1)[:, inside]
        rms = np.sqrt(np.square(g).mean(1, keepdims=True))
        still = rms[:, 0] <= 1e-12 * np.abs(X).max(1, initial=1e-300)
        if self.min_snr:
            smooth = gaussian_filter1d(X, self.sigma, axis=1)
            still |= smooth[:, inside].var(1) < self.min_snr * (X - smooth)[:, inside].var(1)
        if still.any():
            warnings.warn(
                f"{int(still.sum())} traces do not change, or lie below min_snr, and are taken as missing", stacklevel=3
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(still[:, None], np.nan, g / rms)

    def _pairwise(self, g: np.ndarray) -> np.ndarray:
        i, j = self.pairs_
        out = np.empty((g.shape[1] // self.block, len(g), len(i)), dtype=np.float32)
        for a, trace in enumerate(g):
            blocks = trace.reshape(-1, self.block, self.n_neurons_)
            up, down = np.maximum(blocks, 0), np.maximum(-blocks, 0)
            if self.kind == "geometric":
                up, down = np.sqrt(up), np.sqrt(down)
            # max(0, g h) = g⁺ h⁺ + g⁻ h⁻, so that the mean over a block is a product of matrices; roots likewise
            second = (down, up) if self.anti else (up, down)
            whole = up.swapaxes(1, 2) @ second[0] + down.swapaxes(1, 2) @ second[1]
            out[:, a] = whole[:, i, j] / self.block
        return out


@dataclass(frozen=True, eq=False)
class Factors:
    """A non-negative factorisation of a tensor (n_times, n_animals, n_pairs).

    Attributes
    ----------
    weights : array (rank,)
        From large to small.
    times, animals, pairs : arrays (n_times, rank), (n_animals, rank), (n_pairs, rank)
        Columns of norm 1, or 0 where a component is dead.
    losses : array (n_sweeps + 1,)
        Squared error over what was observed, from the start on.
    """

    weights: np.ndarray
    times: np.ndarray
    animals: np.ndarray
    pairs: np.ndarray
    losses: np.ndarray

    def tensor(self) -> np.ndarray:
        """The tensor that the factors make."""
        return np.einsum("r,tr,wr,pr->twp", self.weights, self.times, self.animals, self.pairs, optimize=True)


def factorise(
    tensor: np.ndarray, rank: int, *, max_iter: int = 500, tol: float = 1e-6, seed: int = 0,
    start: Sequence[np.ndarray] | None = None,
) -> Factors:  # fmt: skip
    """Non-negative factors of a tensor by hierarchical alternating least squares, over the entries that are there.

    Parameters
    ----------
    tensor : array (n_times, n_animals, n_pairs)
        At least 0; NaN is missing.
    rank : int
    max_iter : int, default 500
        Sweeps over all modes and components.
    tol : float, default 1e-6
        The fit ends when the loss falls by a smaller share in a sweep.
    seed : int, default 0
    start : three arrays (n, rank), optional
        Default: uniform random numbers, scaled to the tensor.

    Raises
    ------
    InputError
        A tensor of another shape, with negative numbers or infinity, or a slice of it without an entry; parameters out of range.

    Notes
    -----
    Every component of every mode is set to its least-squares value, cut off at 0, given all others: the loss never rises. What a sweep
    needs of the tensor are two products with it.

    References
    ----------
    Cichocki & Phan (2009). Fast local algorithms for large scale nonnegative matrix and tensor factorizations. IEICE E92-A.
    """
    at_least("rank", rank, 1)
    at_least("max_iter", max_iter, 1)
    if not (is_number(tol) and tol >= 0):
        raise InputError(f"tol must be a number from 0, got {tol!r}")
    A, mask = _observed(tensor)
    T, W, P = A.shape
    if start is None:
        g = np.random.default_rng(seed)
        found = [g.random((n, rank)) for n in A.shape]
        scale = (A.sum() / max(np.einsum("tr,wr,pr->", *found), 1e-300)) ** (1 / 3)
        t, w, p = (f * scale for f in found)
    else:
        t, w, p = (np.array(f, dtype=np.float64) for f in start)
        if [f.shape for f in (t, w, p)] != [(n, rank) for n in A.shape] or min(f.min() for f in (t, w, p)) < 0:
            raise InputError(f"start must be three arrays {[(n, rank) for n in A.shape]} of numbers from 0")
    flat, energy = A.reshape(T * W, P), float(np.square(A).sum())

    def gram_of_pairs() -> np.ndarray:
        """Σₚ m p pᵀ: (1 or n_times, 1 or n_animals, rank, rank)."""
        if mask is None:
            return (p.T @ p)[None, None]
        return (mask.reshape(-1, P) @ _outer(p)).reshape(*mask.shape[:2], rank, rank)

    def squares(f: np.ndarray, whole: bool) -> np.ndarray:
        """Products f fᵀ of each row, or their sum where a mask does not differ between rows."""
        return (f.T @ f)[None] if whole else _outer(f).reshape(len(f), rank, rank)

    losses = []
    product, gram = (flat @ p).reshape(T, W, rank), gram_of_pairs()
    for sweep in range(max_iter + 1):
        right = np.einsum("twr,wr->tr", product, w)
        left = (gram * squares(w, gram.shape[1] == 1)[None]).sum(1)
        losses.append(max(energy - 2 * float((t * right).sum()) + float((_applied(t, left) * t).sum()), 0.0))
        if sweep == max_iter or losses[-1] <= 1e-14 * energy:
            break
        if sweep and losses[-2] - losses[-1] <= tol * losses[-2]:
            break
        _descend(t, right, left)
        _descend(w, np.einsum("twr,tr->wr", product, t), (gram * squares(t, gram.shape[0] == 1)[:, None]).sum(0))
        both = np.einsum("tr,wr->twr", t, w).reshape(T * W, rank)
        if mask is None:
            left = ((t.T @ t) * (w.T @ w))[None]
        else:
            tt = squares(t, len(mask) == 1)
            left = np.einsum("trs,wrs->twrs", tt, _outer(w).reshape(W, rank, rank)).reshape(-1, rank * rank)
            left = (mask.reshape(-1, P).T @ left).reshape(P, rank, rank)
        _descend(p, flat.T @ both, left)
        product, gram = (flat @ p).reshape(T, W, rank), gram_of_pairs()
    norms = [np.linalg.norm(f, axis=0) for f in (t, w, p)]
    weights = np.prod(norms, axis=0)
    order = np.argsort(-weights, kind="stable")
    t, w, p = ((f / np.where(n > 0, n, 1.0))[:, order] for f, n in zip((t, w, p), norms, strict=True))
    return Factors(weights[order], t, w, p, np.array(losses))


def _observed(tensor: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Tensor with 0 where nothing is known, and a mask, with one time where it is the same in all, or None."""
    A = np.asarray(tensor)
    if A.ndim != 3 or not A.size or A.dtype.kind not in "fiu":
        raise InputError(f"the tensor must be numbers (n_times, n_animals, n_pairs), got {A.dtype} {A.shape}")
    A = A.astype(np.float64)
    seen = ~np.isnan(A)
    if np.isinf(A).any() or (A < 0).any():
        raise InputError("the tensor must hold finite numbers from 0; NaN is missing")
    for axis, name in enumerate(("time", "animal", "pair")):
        none = ~seen.any(tuple(k for k in range(3) if k != axis))
        if none.any():
            raise InputError(
                f"nothing was observed of {int(none.sum())} {name}s, the first is number {int(np.argmax(none))}"
            )
    if seen.all():
        return A, None
    same = bool((seen == seen[:1]).all())
    return np.where(seen, A, 0.0), (seen[:1] if same else seen).astype(np.float64)


def _outer(f: np.ndarray) -> np.ndarray:
    return (f[:, :, None] * f[:, None, :]).reshape(len(f), -1)


def _applied(f: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return f @ gram[0] if len(gram) == 1 else np.einsum("nr,nrs->ns", f, gram)


def _descend(f: np.ndarray, right: np.ndarray, gram: np.ndarray) -> None:
    """Set the columns of f, one after the other and in place, to their best values from 0; gram (1 or n, rank, rank)."""
    for r in range(f.shape[1]):
        own = gram[:, r, r]
        now = f @ gram[0, :, r] if len(gram) == 1 else np.einsum("ns,ns->n", f, gram[:, :, r])
        step = np.where(own > 0, (right[:, r] - now) / np.where(own > 0, own, 1.0), 0.0)
        f[:, r] = np.maximum(f[:, r] + step, 0.0)


def similarity(a: Factors, b: Factors) -> np.ndarray:
    """Product of the cosines in all modes of components that are paired best, (rank of a,); those without a partner have 0."""
    cosines = (a.times.T @ b.times) * (a.animals.T @ b.animals) * (a.pairs.T @ b.pairs)
    rows, columns = linear_sum_assignment(-cosines)
    found = np.zeros(len(cosines))
    found[rows] = cosines[rows, columns]
    return found


def stability(fits: Sequence[Factors]) -> float:
    """Mean `similarity` over all pairs of fits: 1 if restarts agree."""
    if len(fits) < 2:
        raise InputError("stability needs at least 2 fits")
    return float(np.mean([similarity(a, b).mean() for a, b in combinations(fits, 2)]))


def rank_curve(
    tensor: np.ndarray, ranks: Sequence[int] = range(1, 13), n_restarts: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Error and stability of several numbers of components.

    Returns
    -------
    DataFrame
        ``rank``; ``error``, least over restarts, as a share of the tensor's energy; ``stability``; ``chosen``, True for the largest rank
        whose stability is at least .9 (the most stable one, if there is none).
    """
    at_least("n_restarts", n_restarts, 2)
    ranks = list(ranks)
    if not ranks:
        raise InputError("ranks is empty")
    energy, rows = float(np.nansum(np.square(tensor, dtype=np.float64))), []
    for rank in ranks:
        fits = [factorise(tensor, rank, seed=seed + k) for k in range(n_restarts)]
        rows.append({"rank": rank, "error": min(f.losses[-1] for f in fits) / energy, "stability": stability(fits)})
    stable = np.array([r["stability"] for r in rows])
    chosen = int(np.flatnonzero(stable >= STABLE)[-1]) if (stable >= STABLE).any() else int(np.argmax(stable))
    return pd.DataFrame([r | {"chosen": k == chosen} for k, r in enumerate(rows)])


class WeightedSBM(ClusterMixin, BaseEstimator):
    """Communities of a weighted graph: the stochastic block model with the shortest description.

    Parameters
    ----------
    nested : bool, default True
        Group the blocks again by the mean weights between them, until that finds no fewer.
    n_starts : int, default 3
        Of the spectral starts with 1 to 12 blocks, how many are refined.
    random_state : int, default 0

    Attributes
    ----------
    labels_ : array of int (n_nodes,)
    levels_ : list of such arrays
        From the finest, `labels_`, to the coarsest.
    n_blocks_ : int
    description_length_ : float
        Of the finest level, in nats, up to a constant of the unit of weights.

    Notes
    -----
    Between two blocks with n possible pairs, m edges and total weight W, whether there is an edge is described by
    −log m! (n − m)! / (n + 1)! and the weights, exponential with an unknown rate, by −log b Γ(m + 1) / (b + W)^(m + 1), b being the mean
    weight of the graph. The partition costs log N + log C(N − 1, B − 1) + log N! / Π n_r!. Nodes are moved, blocks merged and split
    while that shortens the description. Entries that are exactly 0 are no edges.

    There is no correction for degrees.

    References
    ----------
    Peixoto (2018). Nonparametric weighted stochastic block models. Physical Review E 97, 012306.
    Aicher, Jacobs & Clauset (2015). Learning latent block structure in weighted networks. Journal of Complex Networks 3, 221-248.
    """

    def __init__(self, nested: bool = True, n_starts: int = 3, random_state: int = 0) -> None:
        self.nested = nested
        self.n_starts = n_starts
        self.random_state = random_state

    def fit(self, W: Any, y: Any = None) -> WeightedSBM:
        """Find the communities.

        Parameters
        ----------
        W : array (n_nodes, n_nodes)
            Symmetric, from 0; the diagonal is ignored.
        y : ignored

        Raises
        ------
        InputError
            A matrix that is not square, symmetric and from 0, or parameters out of range.
        """
        flag("nested", self.nested)
        at_least("n_starts", self.n_starts, 1)
        W = as_bins(W, "W")
        if W.shape[0] != W.shape[1] or W.min() < 0 or np.abs(W - W.T).max() > 1e-6 * max(W.max(), 1e-300):
            raise InputError(f"W must be symmetric with weights from 0, got a matrix {W.shape} that is not")
        W = (W + W.T) / 2
        self.n_features_in_ = len(W)
        self.labels_, self.description_length_ = _partition(W, self.n_starts, self.random_state)
        self.n_blocks_ = int(self.labels_.max()) + 1
        self.levels_ = [self.labels_]
        while self.nested and (B := int(self.levels_[-1].max()) + 1) > 2:
            _, pairs, total = _sums(W, self.levels_[-1], B)
            upper, _ = _partition(
                np.where(pairs > 0, total / np.maximum(pairs, 1), 0.0), self.n_starts, self.random_state
            )
            if upper.max() + 1 >= B:
                break
            self.levels_.append(upper[self.levels_[-1]])
        return self


def description_length(W: np.ndarray, labels: np.ndarray) -> float:
    """Nats that a partition of a weighted graph needs, see `WeightedSBM`; labels from 0 without gaps."""
    W = np.where(np.eye(len(W), dtype=bool), 0.0, W)
    B = int(labels.max()) + 1
    edges, pairs, total = _sums(W, labels, B)
    b = _mean_weight(W)
    upper = np.triu_indices(B)
    return float(
        _cost(pairs[upper], edges[upper], total[upper], b).sum() + _partition_cost(np.bincount(labels, minlength=B))
    )


def _mean_weight(W: np.ndarray) -> float:
    return float(W[W > 0].mean()) if (W > 0).any() else 1.0


def _sums(W: np.ndarray, labels: np.ndarray, B: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges, possible pairs and weights between blocks (B, B); pairs within a block count once."""
    one = np.eye(B)[labels]
    W = np.where(np.eye(len(W), dtype=bool), 0.0, W)
    n = one.sum(0)
    edges, total, pairs = one.T @ (W > 0) @ one, one.T @ W @ one, np.outer(n, n) - np.diag(n)
    half = np.where(np.eye(B, dtype=bool), 0.5, 1.0)
    return edges * half, pairs * half, total * half


def _cost(n: np.ndarray, m: np.ndarray, w: np.ndarray, b: float) -> np.ndarray:
    """Of edges and weights between two blocks."""
    return gammaln(n + 2) - gammaln(n - m + 1) - 2 * gammaln(m + 1) - np.log(b) + (m + 1) * np.log(b + w)


def _partition_cost(sizes: np.ndarray) -> Any:
    """Of blocks of these sizes (..., B); empty ones do not count."""
    N, B = sizes.sum(-1), (sizes > 0).sum(-1)
    choose = gammaln(N) - gammaln(B) - gammaln(N - B + 1)
    return np.log(N) + choose + gammaln(N + 1) - gammaln(sizes + 1).sum(-1)


def _partition(W: np.ndarray, n_starts: int, seed: int) -> tuple[np.ndarray, float]:
    """The labels with the shortest description that was found, and its length."""
    W = np.where(np.eye(len(W), dtype=bool), 0.0, W)
    starts = [_spectral(W, B, seed) for B in range(1, min(MOST_BLOCKS, len(W)) + 1)]
    lengths = [description_length(W, s) for s in starts]
    best, least = starts[0], lengths[0]
    for i in np.argsort(lengths, kind="stable")[:n_starts]:
        labels, length = starts[i], lengths[i]
        while True:
            labels = _compact(_merged(W, _moved(W, labels)))
            labels = _split(W, labels, seed)
            now = description_length(W, labels)
            if now >= length - GAIN:
                break
            length = now
        if length < least - GAIN:
            best, least = labels, length
    return _compact(best), float(least)


def _compact(labels: np.ndarray) -> np.ndarray:
    """Labels from 0 in the order in which they first appear."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _spectral(W: np.ndarray, B: int, seed: int) -> np.ndarray:
    """K-means of the leading eigenvectors of the normalised graph."""
    if B == 1 or len(W) <= B:
        return np.zeros(len(W), dtype=int) if B == 1 else np.arange(len(W))
    root = np.sqrt(np.maximum(W.sum(1), 1e-12))
    vectors = np.linalg.eigh(W / np.outer(root, root))[1][:, -B:]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if len(np.unique(vectors.round(12), axis=0)) < B:
        return np.zeros(len(W), dtype=int)
    return _compact(KMeans(B, n_init=3, random_state=seed).fit_predict(vectors))  # pyright: ignore[reportArgumentType]


def _moved(W: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Move one node after the other to the block that shortens the description most, a new one included, until none does."""
    labels, b, edge = labels.copy(), _mean_weight(W), (W > 0).astype(np.float64)
    moving = True
    while moving:
        moving = False
        B = int(labels.max()) + 2  # the last one is empty
        one = np.eye(B)[labels]
        edges, _, total = _sums(W, labels, B)
        sizes = one.sum(0)
        for i in range(len(W)):
            r = labels[i]
            k, w = edge[i] @ one, W[i] @ one
            for M, v in ((edges, k), (total, w)):  # without the node
                M[r] -= v
                M[:, r] -= v
                M[r, r] += v[r]
            sizes[r] -= 1
            pairs = np.outer(sizes, sizes) - np.diag(sizes * (sizes + 1) / 2)
            more = pairs + sizes
            np.maximum(total, 0, out=total)  # rounding
            delta = (_cost(more, edges + k, total + w, b) - _cost(pairs, edges, total, b)).sum(1)
            delta += _partition_cost(sizes + np.eye(B))
            delta[sizes == 0] = np.where(
                np.arange(B)[sizes == 0] == np.flatnonzero(sizes == 0)[0], delta[sizes == 0], np.inf
            )
            s = int(np.argmin(delta))
            if sizes[r] == 0:
                s = s if delta[s] < delta[sizes == 0].min() - GAIN else r
            elif delta[s] >= delta[r] - GAIN:
                s = r
            moving |= s != r
            labels[i] = s
            one[i, r], one[i, s] = 0.0, 1.0
            for M, v in ((edges, k), (total, w)):
                M[s] += v
                M[:, s] += v
                M[s, s] -= v[s]
            sizes[s] += 1
            if s == B - 1:
                break  # another empty block is needed
        labels = _compact(labels)
    return labels


def _merged(W: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Merge the two blocks that are best merged, while that shortens the description."""
    while (B := int(labels.max()) + 1) > 1:
        now = description_length(W, labels)
        tried = [np.where(labels == s, r, labels) for r, s in combinations(range(B), 2)]
        tried = [_compact(t) for t in tried]
        lengths = [description_length(W, t) for t in tried]
        i = int(np.argmin(lengths))
        if lengths[i] >= now - GAIN:
            break
        labels = tried[i]
    return labels


def _split(W: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Split blocks in two by their own spectrum, with moves afterwards, where that shortens the description."""
    least = description_length(W, labels)
    for r in range(int(labels.max()) + 1):
        at = np.flatnonzero(labels == r)
        if len(at) < 4:
            continue
        tried = labels.copy()
        tried[at[_spectral(W[np.ix_(at, at)], 2, seed) == 1]] = labels.max() + 1
        tried = _compact(tried)
        if tried.max() > labels.max() and (now := description_length(W, tried)) < least - GAIN:
            labels, least = tried, now
    return labels


class DynamicConnectome(BaseEstimator):
    """Groups of neurons that act together, with the times and animals in which they do.

    Parameters
    ----------
    rank : int, optional
        Number of components. Default: the largest one up to 8 whose restarts agree (`rank_curve`).
    affinity : DifferentialAffinity, optional
        Default ``DifferentialAffinity()``.
    n_restarts : int, default 10
        Of the factorisation; the best is kept, all give `stability_`.
    min_animals : int, default 1
        Pairs that were observed in fewer animals are left out: those seen in one cannot tell animal from pair.
    random_state : int, default 0

    Attributes
    ----------
    factors_ : Factors
    time_factors_, animal_factors_, pair_factors_ : arrays (n_blocks, rank), (n_animals, rank), (n_pairs, rank)
        Pairs that were left out have 0.
    weights_ : array (rank,)
    times_ : array (n_blocks,)
        Middle of the blocks, in bins.
    communities_ : list of arrays of int (n_neurons,)
        One a component, from `WeightedSBM`.
    hierarchies_ : list of lists
        All levels of them.
    explained_ : float
        Share of the tensor's energy.
    stability_ : float
        NaN with one restart.

    Notes
    -----
    One component is usually background, since independent traces have an affinity above 0: see `surrogate_test`.

    References
    ----------
    Dyballa, Lang, Haslund-Gourley, Yemini & Zucker (2024). Learning dynamic representations of the functional connectome in
    neurobiological networks. ICLR.

    Examples
    --------
    >>> from nissl.recordings.simulate import planted_groups
    >>> from nissl.recordings.spikes import DynamicConnectome
    >>> s = planted_groups(n_times=200, n_neurons=12, seed=0)
    >>> model = DynamicConnectome(rank=4, n_restarts=2).fit(s.X)
    >>> model.pair_factors_.shape, model.affinity_matrix(0).shape
    ((66, 4), (12, 12))
    """

    def __init__(
        self,
        rank: int | None = None,
        affinity: DifferentialAffinity | None = None,
        *,
        n_restarts: int = 10,
        min_animals: int = 1,
        random_state: int = 0,
    ) -> None:
        self.rank = rank
        self.affinity = affinity
        self.n_restarts = n_restarts
        self.min_animals = min_animals
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> DynamicConnectome:
        """Affinities, their factors and communities.

        Parameters
        ----------
        X : array (n_animals, n_times, n_neurons) or a list of arrays (n_times, n_neurons)
            As of `DifferentialAffinity.fit`.
        y : ignored

        Raises
        ------
        InputError
            Parameters or traces that do not fit; no pair that was observed often enough.
        """
        at_least("n_restarts", self.n_restarts, 1)
        at_least("min_animals", self.min_animals, 1)
        if self.rank is not None:
            at_least("rank", self.rank, 1)
        if self.affinity is not None and not isinstance(self.affinity, DifferentialAffinity):
            raise InputError(f"affinity must be made by DifferentialAffinity(...), got {type(self.affinity).__name__}")
        if not is_whole(self.random_state):
            raise InputError(f"random_state must be a whole number, got {self.random_state!r}")
        X = as_animals(X)
        settings = {} if self.affinity is None else self.affinity.get_params()
        self.affinity_ = DifferentialAffinity(**settings).fit(X)
        self._rates = self.affinity_._rates(X)
        tensor = self.affinity_._pairwise(self._rates)
        self.kept_ = (~np.isnan(tensor[0])).sum(0) >= self.min_animals
        if not self.kept_.any():
            raise InputError(f"no pair of neurons was observed in min_animals={self.min_animals} of {len(X)} animals")
        tensor = tensor[:, :, self.kept_]
        rank = self.rank
        if rank is None:
            self.rank_curve_ = rank_curve(tensor, range(1, 9), max(2, min(self.n_restarts, 5)), self.random_state)
            rank = int(self.rank_curve_["rank"].to_numpy()[int(np.argmax(self.rank_curve_["chosen"].to_numpy()))])
        fits = [factorise(tensor, rank, seed=self.random_state + k) for k in range(self.n_restarts)]
        best = min(fits, key=lambda f: float(f.losses[-1]))
        pairs = np.zeros((len(self.kept_), rank))
        pairs[self.kept_] = best.pairs
        self.factors_ = best
        self.time_factors_, self.animal_factors_, self.pair_factors_, self.weights_ = (
            best.times,
            best.animals,
            pairs,
            best.weights,
        )
        self.times_ = self.affinity_.times(X.shape[1])
        self.explained_ = float(1 - best.losses[-1] / np.nansum(np.square(tensor, dtype=np.float64)))
        self.stability_ = stability(fits) if len(fits) > 1 else float("nan")
        blocks = [WeightedSBM(random_state=self.random_state).fit(self.affinity_matrix(r)) for r in range(rank)]
        self.communities_, self.hierarchies_ = [b.labels_ for b in blocks], [b.levels_ for b in blocks]
        return self

    def affinity_matrix(self, component: int) -> np.ndarray:
        """The pair factor of a component as a symmetric matrix (n_neurons, n_neurons) with zeros on the diagonal."""
        check_is_fitted(self, "pair_factors_")
        if not is_whole(component) or not 0 <= component < len(self.weights_):
            raise InputError(f"component must be a number from 0 to {len(self.weights_) - 1}, got {component!r}")
        n = self.affinity_.n_neurons_
        M = np.zeros((n, n))
        M[tuple(self.affinity_.pairs_)] = self.pair_factors_[:, component]
        return M + M.T

    def strongest(self, component: int) -> np.ndarray:
        """Neurons (indices) of the community with the largest mean weight inside; empty where all communities are single neurons."""
        M, labels = self.affinity_matrix(component), self.communities_[component]
        sizes = np.bincount(labels)
        inside = [
            M[np.ix_(labels == k, labels == k)].sum() / (n * (n - 1)) if n > 1 else 0.0 for k, n in enumerate(sizes)
        ]
        return np.flatnonzero(labels == int(np.argmax(inside))) if max(inside) > 0 else np.array([], dtype=int)

    def surrogate_test(self, n_surrogates: int = 19) -> np.ndarray:
        """Whether components hold more than affinities of traces that have nothing to do with each other.

        Every trace of every animal is shifted in a circle by an amount of its own, and all is factorised again, once. A component is
        measured by what of it varies over times and over pairs alike, λ‖t − mean‖‖p − mean‖, and compared with the largest of each
        surrogate, so that the p-values hold for all components together.

        Parameters
        ----------
        n_surrogates : int, default 19
            With 19, the smallest p is .05.

        Returns
        -------
        array (rank,)
            p-values.
        """
        check_is_fitted(self, "factors_")
        at_least("n_surrogates", n_surrogates, 1)
        g = np.random.default_rng(self.random_state)
        animals, times, n = self._rates.shape
        null = np.empty(n_surrogates)
        for k in range(n_surrogates):
            shift = g.integers(times, size=(animals, 1, n))
            shifted = np.take_along_axis(self._rates, (np.arange(times)[None, :, None] + shift) % times, 1)
            tensor = self.affinity_._pairwise(shifted)[:, :, self.kept_]
            null[k] = _varying(factorise(tensor, len(self.weights_), max_iter=200, tol=1e-5, seed=k)).max()
        return (1 + (null >= _varying(self.factors_)[:, None]).sum(1)) / (1 + n_surrogates)

    def plot(self, share: float = 0.1) -> Any:
        """The connectome over time: for each component its graph, time course and animals.

        Parameters
        ----------
        share : float, default 0.1
            Share of the pairs, the heaviest, that is drawn. Neurons lie on a circle, sorted and coloured by community.

        Returns
        -------
        matplotlib Figure
        """
        check_is_fitted(self, "factors_")
        if not (is_number(share) and 0 < share <= 1):
            raise InputError(f"share must be a number from 0 to 1, got {share!r}")
        import matplotlib
        from matplotlib.collections import LineCollection
        from matplotlib.figure import Figure

        rank, n = len(self.weights_), self.affinity_.n_neurons_
        figure = Figure(figsize=(10, 1.9 * rank), layout="constrained")
        axes = figure.subplots(rank, 3, squeeze=False, width_ratios=[1, 3.5, 1])
        colours = matplotlib.colormaps["tab10"]
        i, j = self.affinity_.pairs_
        for r, (graph, course, animals) in enumerate(axes):
            labels, p = self.communities_[r], self.pair_factors_[:, r]
            angle = np.empty(n)
            angle[np.argsort(labels, kind="stable")] = np.linspace(0, 2 * np.pi, n, endpoint=False)
            place = np.stack([np.cos(angle), np.sin(angle)], 1)
            heavy = np.argsort(-p)[: max(1, int(share * len(p)))]
            lines = np.stack([place[i[heavy]], place[j[heavy]]], 1)
            strength = p[heavy] / max(p.max(), 1e-300)
            graph.add_collection(
                LineCollection(list(lines), colors=[(0.2, 0.2, 0.2, a) for a in 0.6 * strength], linewidths=1.0)
            )
            graph.scatter(*place.T, c=[colours(k % 10) for k in labels], s=14, zorder=2)
            graph.set(aspect="equal", xticks=[], yticks=[], title=f"component {r}", xlim=(-1.2, 1.2), ylim=(-1.2, 1.2))
            graph.set_axis_off()
            course.fill_between(self.times_, self.time_factors_[:, r] * self.weights_[r], color="0.4", lw=0)
            course.set(ylim=(0, None), yticks=[], xlabel="bin" if r == rank - 1 else "")
            animals.bar(np.arange(len(self.animal_factors_)), self.animal_factors_[:, r], color="0.4")
            animals.set(
                yticks=[], xticks=np.arange(len(self.animal_factors_)), xlabel="animal" if r == rank - 1 else ""
            )
        return figure


def _varying(factors: Factors) -> np.ndarray:
    """What of each component varies over times and pairs."""
    spread = [np.linalg.norm(f - f.mean(0), axis=0) for f in (factors.times, factors.pairs)]
    return factors.weights * spread[0] * spread[1]


def as_animals(X: Any) -> np.ndarray:
    """Traces of animals (n_animals, n_times, n_neurons), checked: columns are whole or wholly NaN, and no animal is empty."""
    if isinstance(X, (str, bytes)) or not hasattr(X, "__len__") or not len(X):
        raise InputError(f"X must be traces (n_times, n_neurons) of one or more animals, got {type(X).__name__}")
    found = [as_bins(x, f"the traces of animal {k}", missing=True) for k, x in enumerate(X)]
    if len({x.shape for x in found}) > 1:
        raise InputError(
            f"animals must share times and neurons (NaN: not found), got {sorted({x.shape for x in found})}"
        )
    out = np.stack(found)
    gaps = np.isnan(out)
    if (gaps.any(1) & ~gaps.all(1)).any():
        animal, neuron = np.argwhere(gaps.any(1) & ~gaps.all(1))[0]
        raise InputError(
            f"neuron {neuron} of animal {animal} has NaN at some times; fill them in, or set the whole column to NaN"
        )
    return out
