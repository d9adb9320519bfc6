"""Augmented covariance: the covariance of signals beside delayed copies of themselves, and the choice of order and lag.

A trial's channels are stacked with ``order - 1`` copies, each `lag` samples further on. The covariance of the stack holds the
autocovariances R(0), R(lag), ..., R((order - 1) lag) in its blocks. It is symmetric positive definite, so every Riemannian classifier
takes it. Order and lag come from a nested grid search, or from the theory of delay embeddings without a look at the labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from scipy.spatial import KDTree
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from nissl.arguments import at_least, flag, is_whole, items
from nissl.errors import InputError
from nissl.recordings.arrays import as_labels, as_trials
from nissl.recordings.extras import need

SHRINKING = ("oas", "lwf")
"""Estimators that stay positive definite with fewer samples than rows."""
ESTIMATORS = ("cov", "scm", *SHRINKING)
RANK = 1e-10
"""Directions with less than this share of the largest variance count as missing."""


# ---------------------------------------------------------------- mathematics


def embed(X: np.ndarray, order: int, lag: int, legacy: bool = False) -> np.ndarray:
    """Delay embedding: row block k holds the samples from ``k * lag`` on.

    Parameters
    ----------
    X : array (n_trials, n_channels, n_times)
    order, lag : int
        Number of copies; samples between one and the next.
    legacy : bool, default False
        One lag fewer samples where order > 1, as in the authors' code.

    Returns
    -------
    array (n_trials, order * n_channels, n_times - (order - 1) * lag)
    """
    return embed_pairs(X, [(c, k * lag) for k in range(order) for c in range(X.shape[1])],
                       lag if legacy and order > 1 else 0)  # fmt: skip


def embed_pairs(X: np.ndarray, pairs: Sequence[tuple[int, int]], drop: int = 0) -> np.ndarray:
    """Non-uniform embedding: one row a pair (channel, delay), cut to the samples that all have, less `drop`."""
    n = X.shape[2] - max(d for _, d in pairs) - drop
    if n < 2:
        raise InputError(
            f"trials of {X.shape[2]} samples are too short for delays up to {max(d for _, d in pairs)}: {n} samples remain; "
            "take a lower order or lag"
        )
    found = np.empty((len(X), len(pairs), n))
    for row, (channel, delay) in enumerate(pairs):
        found[:, row] = X[:, channel, delay : delay + n]
    return found


def autocovariances(X: np.ndarray, lags: Sequence[int]) -> np.ndarray:
    """R(k) = 1/T sum over t of (x(t) - mean) (x(t + k) - mean)ᵀ of each trial, for each k of `lags`.

    Returns
    -------
    array (n_trials, n_lags, n_channels, n_channels)
    """
    centred = X - X.mean(2, keepdims=True)
    n = X.shape[2]
    if max(lags) >= n:
        raise InputError(f"an autocovariance at lag {max(lags)} needs longer trials than {n} samples")
    later = np.ascontiguousarray(centred.transpose(0, 2, 1))
    found = np.empty((len(X), len(lags), X.shape[1], X.shape[1]))
    for i, k in enumerate(lags):
        np.matmul(centred[:, :, : n - k], later[:, k:], out=found[:, i])
    found /= n
    return found


def assemble(R: np.ndarray) -> np.ndarray:
    """The block-Toeplitz matrix of autocovariances: block (i, j) is R[j - i], and its transpose below the diagonal.

    Parameters
    ----------
    R : array (n_trials, order, n_channels, n_channels)
        Of the lags 0, lag, ..., (order - 1) lag.

    Returns
    -------
    array (n_trials, order * n_channels, order * n_channels)
        Positive semi-definite where R has the 1/T normalisation.
    """
    n, p, c, _ = R.shape
    found = np.empty((n, p, c, p, c))
    for i in range(p):
        for j in range(i, p):
            found[:, i, :, j] = R[:, j - i]
            found[:, j, :, i] = R[:, j - i].transpose(0, 2, 1)
    return found.reshape(n, p * c, p * c)


def shrink(C: np.ndarray, n_samples: int) -> np.ndarray:
    """Covariances shrunk to multiples of the identity by the oracle approximating share, as `sklearn.covariance.oas` has it."""
    p = C.shape[-1]
    mean = np.trace(C, axis1=1, axis2=2) / p
    square = (C**2).mean((1, 2))
    above, below = square + mean**2, (n_samples + 1) * (square - mean**2 / p)
    share = np.minimum(np.divide(above, below, out=np.ones_like(above), where=below > 0), 1.0)
    found = (1 - share)[:, None, None] * C
    found[:, np.arange(p), np.arange(p)] += (share * mean)[:, None]
    return found


def mutual_information(x: np.ndarray, max_delay: int, n_bins: int | None = None) -> np.ndarray:
    """Mutual information in nats between each series and itself later, by histogram.

    Parameters
    ----------
    x : array (n_series, n_times)
    max_delay : int
    n_bins : int, optional
        Of equal width over a series' range; about √(n_times / 5) by default.

    Returns
    -------
    array (n_series, max_delay + 1)
    """
    n = x.shape[1]
    bins = n_bins or max(2, round(np.sqrt(n / 5)))
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    at = np.minimum((bins * (x - low) / np.where(high > low, high - low, 1.0)).astype(int), bins - 1)
    first = np.arange(len(x))[:, None] * bins**2
    found = np.empty((len(x), max_delay + 1))
    for k in range(max_delay + 1):
        cells = first + bins * at[:, : n - k] + at[:, k:]
        p = np.bincount(cells.ravel(), minlength=len(x) * bins**2).reshape(len(x), bins, bins) / (n - k)
        independent = p.sum(2, keepdims=True) * p.sum(1, keepdims=True)
        found[:, k] = (p * np.log(np.divide(p, independent, out=np.ones_like(p), where=p > 0))).sum((1, 2))
    return found


def first_minimum(curve: np.ndarray) -> int:
    """Place of the first local minimum after the start; the last place where the curve only falls."""
    inner = np.flatnonzero((curve[1:-1] <= curve[:-2]) & (curve[1:-1] < curve[2:]))
    return int(inner[0]) + 1 if len(inner) else len(curve) - 1


def _neighbours(Y: np.ndarray, window: int, norm: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Of each point its nearest one that is more than `window` samples away and not equal to it: distance and place.

    The distance is infinite where there is none.
    """
    n = len(Y)
    found = KDTree(Y).query(Y, k=min(2 * window + 3, n), p=norm)
    distance, place = (np.asarray(v) for v in found)
    allowed = (np.abs(place - np.arange(n)[:, None]) > window) & (distance > 0)
    column = allowed.argmax(1)
    row = np.arange(n)
    return np.where(allowed.any(1), distance[row, column], np.inf), place[row, column]


def greedy_embedding(
    trials: Sequence[np.ndarray], max_delay: int = 50, max_dim: int = 30, *, ratio: float = 2.0, share: float = 0.05,
    start: int = 0,
) -> list[tuple[int, int]]:  # fmt: skip
    """Coordinates (channel, delay), chosen one after the other so that near points come apart the most.

    beta of a candidate is the mean of log10 |s(i + delay) - s(j + delay)| / d(i), with j the nearest neighbour of i in the
    embedding so far, outside the Theiler window, and d(i) the distance of the two. The candidate of largest beta says how many
    neighbours are false: apart by more than `ratio` times d(i). Where these are at most `share` of all, or no fewer than before, the
    embedding is large enough.

    Parameters
    ----------
    trials : sequence of arrays (n_channels, n_times)
        Beta and the share of false neighbours are means over them; neighbours are of the same trial.
    max_delay, max_dim : int
    ratio, share : float
    start : int, default 0
        The channel that comes first, at delay 0.

    References
    ----------
    Nichkawde, C. (2013). Optimal state-space reconstruction using derivatives on projected manifold. Phys. Rev. E 87, 022905.
    """
    n = trials[0].shape[1] - max_delay
    windows = [max(first_minimum(m) for m in mutual_information(t, max_delay)) for t in trials]
    delayed = [np.lib.stride_tricks.sliding_window_view(t, n, axis=1) for t in trials]  # channel, delay, time
    chosen, before = [(start, 0)], np.inf
    while len(chosen) < max_dim:
        beta, pairs = np.zeros(delayed[0].shape[:2]), []
        for d, window in zip(delayed, windows, strict=True):
            near, j = _neighbours(np.stack([d[c, k] for c, k in chosen], 1), window)
            i = np.flatnonzero(np.isfinite(near))
            if not len(i):
                continue
            apart = np.abs(d[:, :, i] - d[:, :, j[i]]) / near[i]
            some = apart > 0
            logs = np.log10(apart, out=np.zeros_like(apart), where=some)
            beta += logs.sum(2) / np.maximum(some.sum(2), 1) / len(trials)
            pairs.append(apart)
        if not pairs:
            break
        for c, k in chosen:
            beta[c, k] = -np.inf
        c, k = (int(v) for v in np.unravel_index(beta.argmax(), beta.shape))
        false = float(np.mean([(p[c, k] > ratio).mean() for p in pairs]))
        if false <= share or false >= before:
            break
        chosen.append((c, k))
        before = false
    return chosen


def averaged_false_neighbours(x: np.ndarray, lag: int, dimension: int, window: int = 0) -> float:
    """Cao's E(d): by how much neighbours in `dimension` delays come apart in one more; NaN where none can be found."""
    n = len(x) - dimension * lag
    if n < 3:
        return float("nan")
    Y = np.stack([x[k * lag : k * lag + n] for k in range(dimension + 1)], 1)
    near, j = _neighbours(Y[:, :-1], window, np.inf)
    i = np.flatnonzero(np.isfinite(near))
    return float((np.abs(Y[i] - Y[j[i]]).max(1) / near[i]).mean()) if len(i) else float("nan")


# ---------------------------------------------------------------- estimators


class TimeDelay(TransformerMixin, BaseEstimator):
    """Stacks channels with delayed copies of themselves.

    Parameters
    ----------
    order : int, default 1
        Copies of the channels; 1 leaves the trials as they are.
    lag : int, default 1
        Samples between one copy and the next.
    pairs : sequence of (channel, delay), optional
        A non-uniform embedding, one row a pair, instead of order and lag.
    legacy : bool, default False
        One lag fewer samples where order > 1, as the authors' code has it.

    Attributes
    ----------
    pairs_ : list of (channel, delay)
        One for each row of what `transform` gives.

    See Also
    --------
    AugmentedCovariance, EmbeddingSelector

    References
    ----------
    Carrara, I. & Papadopoulo, T. (2023). Classification of BCI-EEG based on augmented covariance matrix. arXiv:2302.04508.
    """

    def __init__(
        self, order: int = 1, lag: int = 1, pairs: Sequence[tuple[int, int]] | None = None, legacy: bool = False
    ) -> None:
        self.order = order
        self.lag = lag
        self.pairs = pairs
        self.legacy = legacy

    def fit(self, X: Any, y: Any = None) -> TimeDelay:
        """Learn the number of channels of X (n_trials, n_channels, n_times); y is not used."""
        X = as_trials(X)
        at_least("order", self.order, 1)
        at_least("lag", self.lag, 1)
        flag("legacy", self.legacy)
        self.pairs_ = _pairs(self.pairs, self.order, self.lag, X.shape[1])
        self.n_channels_ = X.shape[1]
        embed_pairs(X[:1], self.pairs_, self._dropped)
        return self

    @property
    def _dropped(self) -> int:
        return self.lag if self.legacy and self.pairs is None and self.order > 1 else 0

    def transform(self, X: Any) -> np.ndarray:
        """Embed trials: (n_trials, n_channels, n_times) to (n_trials, order * n_channels, fewer times)."""
        check_is_fitted(self, "pairs_")
        return embed_pairs(as_trials(X, channels=self.n_channels_), self.pairs_, self._dropped)


def _pairs(given: Any, order: int, lag: int, channels: int) -> list[tuple[int, int]]:
    if given is None:
        return [(c, k * lag) for k in range(order) for c in range(channels)]
    found = [items("a pair", p) for p in items("pairs", given)]
    if not found or any(len(p) != 2 or not all(map(is_whole, p)) for p in found):
        raise InputError(f"pairs must be (channel, delay), whole numbers, at least one; got {given!r:.80}")
    if any(not 0 <= c < channels or d < 0 for c, d in found):
        raise InputError(f"pairs must name channels 0 to {channels - 1} and delays of at least 0, got {given!r:.80}")
    if len(set(found)) < len(found):
        raise InputError(f"pairs hold one (channel, delay) twice: {given!r:.80}")
    return [(int(c), int(d)) for c, d in found]


class EmbeddingSelector(BaseEstimator):
    """Order and lag by the theory of delay embeddings; labels are not used.

    Parameters
    ----------
    method : {"mdop", "afnn"}, default "mdop"
        "mdop": greedy embeddings of single trials; order is their mean number of coordinates, lag their mean delay. "afnn": lag is
        the first minimum of the mutual information, order the first maximum of Cao's ratio, both averaged over trials and channels.
    max_delay, max_dim : int, default 30
        The largest ones that are tried.
    ratio : float, default 2
        mdop: neighbours that come apart by more are false.
    max_trials : int or None, default 20
        Trials that are looked at, drawn without return; None takes all.
    random_state : int, default 0

    Attributes
    ----------
    order_, lag_ : int
    pairs_ : list of (channel, delay)
        mdop: the greedy embedding of all trials at once. A mean of delays is no optimum of anything (2 and 20 average to 11): these
        are the delays themselves. afnn: those of order_ and lag_.
    embeddings_ : list of lists of (channel, delay)
        mdop: the embedding of each trial.
    curve_ : array
        afnn: Cao's ratio E(d + 1) / E(d) for d = 1, 2, ... as far as it was needed.
    information_ : array (max_delay + 1,)
        afnn: mean mutual information.

    See Also
    --------
    TimeDelay, AugmentedCovariance

    References
    ----------
    Nichkawde, C. (2013). Optimal state-space reconstruction using derivatives on projected manifold. Phys. Rev. E 87, 022905.
    Cao, L. (1997). Practical method for determining the minimum embedding dimension of a scalar time series. Physica D 110, 43-50.
    """

    def __init__(
        self, method: str = "mdop", max_delay: int = 30, max_dim: int = 30, ratio: float = 2.0,
        max_trials: int | None = 20, random_state: int = 0,
    ) -> None:  # fmt: skip
        self.method = method
        self.max_delay = max_delay
        self.max_dim = max_dim
        self.ratio = ratio
        self.max_trials = max_trials
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> EmbeddingSelector:
        """Choose order and lag from trials (n_trials, n_channels, n_times); y is not used."""
        X = as_trials(X)
        if self.method not in ("mdop", "afnn"):
            raise InputError(f"method must be 'mdop' or 'afnn', got {self.method!r}")
        at_least("max_delay", self.max_delay, 2)
        at_least("max_dim", self.max_dim, 1)
        if self.max_trials is not None:
            at_least("max_trials", self.max_trials, 1)
        if X.shape[2] < 2 * self.max_delay:
            raise InputError(
                f"delays up to {self.max_delay} need trials of {2 * self.max_delay} samples at least, got {X.shape[2]}; "
                "lower max_delay"
            )
        if (X.std(2) == 0).any():
            raise InputError(f"channel {np.argwhere(X.std(2) == 0)[0][1]} is flat in a trial: leave it out first")
        if self.max_trials is not None and len(X) > self.max_trials:
            drawn = np.random.default_rng(self.random_state).choice(len(X), self.max_trials, replace=False)
            X = X[np.sort(drawn)]
        if self.method == "mdop":
            options = {"max_delay": self.max_delay, "max_dim": self.max_dim, "ratio": self.ratio}
            self.embeddings_ = [greedy_embedding([x], **options) for x in X]
            self.order_ = max(1, round(float(np.mean([len(e) for e in self.embeddings_]))))
            delays = [float(np.mean([d for _, d in e[1:]])) for e in self.embeddings_ if len(e) > 1]
            self.lag_ = max(1, round(float(np.mean(delays)))) if delays else 1
            self.pairs_ = greedy_embedding(list(X), **options)
            return self
        series = X.reshape(-1, X.shape[2])
        self.information_ = mutual_information(series, self.max_delay).mean(0)
        self.lag_ = first_minimum(self.information_)
        errors = [self._error(series, d) for d in (1, 2)]
        ratios = [errors[1] / errors[0]]
        for d in range(3, self.max_dim + 2):
            errors.append(self._error(series, d))
            ratios.append(errors[-1] / errors[-2])
            if not ratios[-1] > ratios[-2]:  # NaN too: the trials are too short for more
                break
        self.curve_ = np.array(ratios)
        self.order_ = max(1, int(np.nanargmax(self.curve_)) + 1) if np.isfinite(self.curve_).any() else 1
        self.pairs_ = _pairs(None, self.order_, self.lag_, X.shape[1])
        return self

    def _error(self, series: np.ndarray, dimension: int) -> float:
        return float(np.mean([averaged_false_neighbours(x, self.lag_, dimension, self.lag_) for x in series]))


class AugmentedCovariance(TransformerMixin, BaseEstimator):
    """Covariances of delay-embedded trials.

    Parameters
    ----------
    order, lag : int, default 1
        Of `TimeDelay`. Order 1 is the plain covariance.
    estimator : {"cov", "oas", "lwf", "scm"}, default "cov"
        As pyRiemann names them. "oas" and "lwf" shrink, which short trials and narrow bands need.
    toeplitz : bool, default False
        Assemble the exact block-Toeplitz matrix from autocovariances (1/T); the two differ by O(order * lag / T). "cov", "scm" and
        "oas"; the mean of a channel over its trial is taken off.
    selector : EmbeddingSelector, optional
        Chooses order and lag in `fit`.
    uniform : bool, default True
        With a selector: whether its order and lag are used, or else its pairs, with all channels at delay 0 beside them.
    legacy : bool, default False
        Of `TimeDelay`.

    Attributes
    ----------
    order_, lag_ : int
    pairs_ : list of (channel, delay)
        Of each row of the matrices.
    condition_ : float
        Condition number of the mean matrix of the trials of `fit`.

    Raises
    ------
    InputError
        Fewer samples than rows without shrinkage, or channels that depend on each other (an average reference): reduce them to
        their rank first, by `ChannelRank`.

    See Also
    --------
    TimeDelay, EmbeddingSelector, augmented_classifier

    References
    ----------
    Carrara, I. & Papadopoulo, T. (2023). Classification of BCI-EEG based on augmented covariance matrix. arXiv:2302.04508.
    """

    def __init__(
        self, order: int = 1, lag: int = 1, estimator: str = "cov", toeplitz: bool = False,
        selector: EmbeddingSelector | None = None, uniform: bool = True, legacy: bool = False,
    ) -> None:  # fmt: skip
        self.order = order
        self.lag = lag
        self.estimator = estimator
        self.toeplitz = toeplitz
        self.selector = selector
        self.uniform = uniform
        self.legacy = legacy

    def fit(self, X: Any, y: Any = None) -> AugmentedCovariance:
        """Learn order and lag, where a selector is given, and check trials (n_trials, n_channels, n_times)."""
        self.fit_transform(X, y)
        return self

    def fit_transform(self, X: Any, y: Any = None, **_: Any) -> np.ndarray:
        """`fit`, and the matrices of the same trials."""
        X = as_trials(X)
        if self.estimator not in ESTIMATORS:
            raise InputError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {self.estimator!r}")
        at_least("order", self.order, 1)
        at_least("lag", self.lag, 1)
        for name in ("toeplitz", "uniform", "legacy"):
            flag(name, getattr(self, name))
        if self.toeplitz and (self.estimator == "lwf" or self.legacy or not self.uniform):
            raise InputError("toeplitz=True goes with estimator 'cov', 'scm' or 'oas', uniform=True and legacy=False")
        order, lag, pairs = self.order, self.lag, None
        if self.selector is not None:
            self.selector_ = cast(EmbeddingSelector, clone(self.selector)).fit(X)
            order, lag = self.selector_.order_, self.selector_.lag_
            if not self.uniform:
                now = [(c, 0) for c in range(X.shape[1])]
                pairs = now + [p for p in self.selector_.pairs_ if p not in now]
        _need_rank(X)
        delay = TimeDelay(order, lag, pairs, self.legacy).fit(X)
        n_samples = X.shape[2] - max(d for _, d in delay.pairs_) - delay._dropped
        _need_samples(n_samples, len(delay.pairs_), self.estimator)
        self.order_, self.lag_, self.pairs_, self._delay = order, lag, delay.pairs_, delay
        self.n_channels_, self.n_times_ = X.shape[1:]
        found = self._matrices(X)
        self.condition_ = float(np.linalg.cond(found.mean(0)))
        return found

    def transform(self, X: Any) -> np.ndarray:
        """Covariances (n_trials, n_rows, n_rows), n_rows = order * n_channels."""
        check_is_fitted(self, "pairs_")
        return self._matrices(as_trials(X, channels=self.n_channels_, times=self.n_times_))

    def _matrices(self, X: np.ndarray) -> np.ndarray:
        if not self.toeplitz:
            return np.asarray(
                need("pyriemann.estimation").covariances(self._delay.transform(X), estimator=self.estimator)
            )
        found = assemble(autocovariances(X, [k * self.lag_ for k in range(self.order_)]))
        return shrink(found, X.shape[2]) if self.estimator == "oas" else found


class ChannelRank(TransformerMixin, BaseEstimator):
    """Projects channels that depend on each other, as after an average reference, on as many as their rank.

    Channels of full rank stay as they are.

    Attributes
    ----------
    filters_ : array (rank, n_channels)
        The principal directions of the mean covariance; the identity at full rank.
    """

    def fit(self, X: Any, y: Any = None) -> ChannelRank:
        """Find the rank of trials (n_trials, n_channels, n_times); y is not used."""
        values, vectors = np.linalg.eigh(_mean_covariance(X := as_trials(X)))
        kept = values > RANK * values[-1]
        if values[-1] <= 0:
            raise InputError("all channels are flat")
        self.filters_ = np.eye(X.shape[1]) if kept.all() else vectors[:, kept][:, ::-1].T.copy()
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Project trials to (n_trials, rank, n_times)."""
        check_is_fitted(self, "filters_")
        X = as_trials(X, channels=self.filters_.shape[1])
        return X if len(self.filters_) == X.shape[1] else self.filters_ @ X


def _mean_covariance(X: np.ndarray) -> np.ndarray:
    flat = (X - X.mean(2, keepdims=True)).transpose(1, 0, 2).reshape(X.shape[1], -1)
    return flat @ flat.T / flat.shape[1]


def _need_rank(X: np.ndarray) -> None:
    values = np.linalg.eigvalsh(_mean_covariance(X))
    rank = int((values > RANK * values[-1]).sum()) if values[-1] > 0 else 0
    if rank < X.shape[1]:
        raise InputError(
            f"the {X.shape[1]} channels have rank {rank}, as flat channels or an average reference make them: put ChannelRank() first"
        )


def _need_samples(n: int, rows: int, estimator: str) -> None:
    if estimator not in SHRINKING and n - 1 < rows:
        raise InputError(
            f"{n} samples give no full covariance of {rows} rows: take estimator='oas', or a lower order or lag"
        )
    if estimator not in SHRINKING and n < 2 * rows:
        warnings.warn(
            f"{n} samples for {rows} rows: the covariance is close to singular; estimator='oas' shrinks it",
            stacklevel=4,
        )


def _has(name: str) -> Any:
    return available_if(lambda self: hasattr(self.best_estimator_[-1], name))


class AugmentedGrid(ClassifierMixin, BaseEstimator):
    """A classifier of augmented covariances whose order and lag are searched by cross-validation within the data of `fit`.

    Inside an outer cross-validation the search is nested. Autocovariances are computed once for the whole grid; each pair of order
    and lag is assembled from them, and mapped to the tangent space once for all parameters of the classifier.

    Parameters
    ----------
    classifier : {"svm", "mdm"}, default "svm"
        Tangent space at the mean of the training set and a support vector machine, or minimum distance to the mean.
    orders, lags : sequences of int, default 1 to 10
        Order 1 is the plain covariance; it is tried once.
    estimator : {"oas", "cov", "scm"}, default "oas"
    C, kernels : sequences
        Of the support vector machine.
    cv : int or splitter, default 3
        The inner folds.
    scoring : {"auc", "accuracy"}, optional
        AUC by default where there are two classes.
    random_state : int, default 0

    Attributes
    ----------
    best_params_ : dict
        ``order``, ``lag`` and, for the support vector machine, ``C`` and ``kernel``.
    best_score_ : float
        Mean of the inner folds: too good by the search itself.
    results_ : list of dict
        All that was tried, with ``score``.
    best_estimator_ : Pipeline
    classes_ : array

    See Also
    --------
    augmented_classifier

    References
    ----------
    Carrara, I. & Papadopoulo, T. (2023). Classification of BCI-EEG based on augmented covariance matrix. arXiv:2302.04508.
    """

    def __init__(
        self, classifier: str = "svm", orders: Sequence[int] = tuple(range(1, 11)),
        lags: Sequence[int] = tuple(range(1, 11)), estimator: str = "oas", C: Sequence[float] = (0.5, 1.0, 1.5),
        kernels: Sequence[str] = ("linear", "rbf"), cv: Any = 3, scoring: str | None = None, random_state: int = 0,
    ) -> None:  # fmt: skip
        self.classifier = classifier
        self.orders = orders
        self.lags = lags
        self.estimator = estimator
        self.C = C
        self.kernels = kernels
        self.cv = cv
        self.scoring = scoring
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> AugmentedGrid:
        """Search the grid on trials (n_trials, n_channels, n_times) with labels (n_trials,), and fit the best on all."""
        X = as_trials(X)
        y = as_labels(y, len(X))
        orders, lags = items("orders", self.orders), items("lags", self.lags)
        for name, values in (("orders", orders), ("lags", lags)):
            if not values:
                raise InputError(f"{name} is empty")
            for v in values:
                at_least(f"each of {name}", v, 1)
        if self.classifier not in ("svm", "mdm"):
            raise InputError(f"classifier must be 'svm' or 'mdm', got {self.classifier!r}")
        if self.estimator not in ("oas", "cov", "scm"):
            raise InputError(f"estimator must be 'oas', 'cov' or 'scm', got {self.estimator!r}")
        if self.scoring not in (None, "auc", "accuracy"):
            raise InputError(f"scoring must be 'auc' or 'accuracy', got {self.scoring!r}")
        self.classes_, counts = np.unique(y, return_counts=True)
        if len(self.classes_) < 2:
            raise InputError(f"y holds one class only, {self.classes_[0]!r}: nothing can be told apart")
        if is_whole(self.cv) and counts.min() < self.cv:
            raise InputError(
                f"class {self.classes_[counts.argmin()]!r} has {counts.min()} trials, fewer than {self.cv} inner folds"
            )
        auc = self.scoring == "auc" or (self.scoring is None and len(self.classes_) == 2)
        if auc and len(self.classes_) > 2:
            raise InputError(f"AUC is of two classes, y has {len(self.classes_)}: take scoring='accuracy'")

        rank = ChannelRank().fit(X)
        Z = rank.transform(X)
        grid = sorted({(p, k if p > 1 else 1) for p in orders for k in lags})
        grid = [(p, k) for p, k in grid if self._fits(p, k, Z.shape[1], Z.shape[2])]
        if not grid:
            raise InputError(f"no pair of order and lag fits trials of {Z.shape[2]} samples and {Z.shape[1]} channels")
        needed = sorted({i * k for p, k in grid for i in range(p)})
        R, at = autocovariances(Z, needed), {k: i for i, k in enumerate(needed)}
        inner = StratifiedKFold(self.cv, shuffle=True, random_state=self.random_state) if is_whole(self.cv) else self.cv
        folds = list(inner.split(Z, y))
        heads = self._heads()
        self.results_ = []
        for order, lag in grid:
            matrices = assemble(R[:, [at[i * lag] for i in range(order)]])
            if self.estimator == "oas":
                matrices = shrink(matrices, Z.shape[2])
            scores = np.zeros((len(heads), len(folds)))
            for f, (train, test) in enumerate(folds):
                features = matrices
                if self.classifier == "svm":
                    space = need("pyriemann.tangentspace").TangentSpace().fit(matrices[train])
                    features = space.transform(matrices)
                for h, (_, head) in enumerate(heads):
                    fitted: Any = clone(head)
                    fitted.fit(features[train], y[train])
                    scores[h, f] = self._score(fitted, features[test], y[test], auc)
            self.results_ += [
                {"order": order, "lag": lag, **params, "score": float(s.mean())}
                for (params, _), s in zip(heads, scores, strict=True)
            ]
        best = max(self.results_, key=lambda r: r["score"])  # the first of equals: the lowest order
        self.best_score_ = best["score"]
        self.best_params_ = {k: v for k, v in best.items() if k != "score"}
        head = next(h for p, h in heads if all(best[k] == v for k, v in p.items()))
        covariance = AugmentedCovariance(best["order"], best["lag"], self.estimator, toeplitz=True)
        self.best_estimator_ = _pipeline(covariance, head, self.classifier == "svm").fit(X, y)
        return self

    def _fits(self, order: int, lag: int, channels: int, times: int) -> bool:
        left = times - (order - 1) * lag
        return left >= 2 and (self.estimator == "oas" or left > order * channels)

    def _heads(self) -> list[tuple[dict[str, Any], Any]]:
        if self.classifier == "mdm":
            return [({}, need("pyriemann.classification").MDM())]
        return [({"C": c, "kernel": k}, SVC(C=c, kernel=cast(Any, k))) for k in self.kernels for c in self.C]

    @staticmethod
    def _score(fitted: Any, X: np.ndarray, y: np.ndarray, auc: bool) -> float:
        if not auc:
            return float(accuracy_score(y, fitted.predict(X)))
        value = fitted.decision_function(X) if hasattr(fitted, "decision_function") else fitted.predict_proba(X)[:, 1]
        return float(roc_auc_score(y == fitted.classes_[1], value))

    def predict(self, X: Any) -> np.ndarray:
        """The class of each trial."""
        check_is_fitted(self, "best_estimator_")
        return self.best_estimator_.predict(X)

    @_has("decision_function")
    def decision_function(self, X: Any) -> np.ndarray:
        """Signed distances of the support vector machine."""
        return self.best_estimator_.decision_function(X)

    @_has("predict_proba")
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n_trials, n_classes) of the minimum distance to the mean."""
        return self.best_estimator_.predict_proba(X)


def _pipeline(covariance: AugmentedCovariance, head: Any, tangent: bool) -> Pipeline:
    between = [need("pyriemann.tangentspace").TangentSpace()] if tangent else []
    return make_pipeline(ChannelRank(), covariance, *between, head)


def augmented_classifier(
    classifier: str = "svm", search: str | None = "grid",
    order: int = 1, lag: int = 1, estimator: str = "oas", **options: Any,
) -> Any:  # fmt: skip
    """A ready classifier of trials by augmented covariances.

    Parameters
    ----------
    classifier : {"svm", "mdm"}, default "svm"
        Tangent space and a linear support vector machine, or minimum distance to the mean.
    search : {"grid", "mdop", "afnn", "pairs", None}, default "grid"
        How order and lag are found: `AugmentedGrid`; `EmbeddingSelector`, or its non-uniform embedding ("pairs"); None takes the
        two that are given.
    order, lag : int, default 1
        Without a search.
    estimator : str, default "oas"
        Of `AugmentedCovariance`.
    **options
        Of `AugmentedGrid` or of `EmbeddingSelector`.

    Returns
    -------
    AugmentedGrid or Pipeline
    """
    if classifier not in ("svm", "mdm"):
        raise InputError(f"classifier must be 'svm' or 'mdm', got {classifier!r}")
    if search not in ("grid", "mdop", "afnn", "pairs", None):
        raise InputError(f"search must be 'grid', 'mdop', 'afnn', 'pairs' or None, got {search!r}")
    if search == "grid":
        return AugmentedGrid(classifier, estimator=estimator, **options)
    selector = None
    if search is not None:
        selector = EmbeddingSelector("afnn" if search == "afnn" else "mdop", **options)
    elif options:
        raise InputError(f"{', '.join(options)}: options belong to a search, and search is None")
    covariance = AugmentedCovariance(order, lag, estimator, selector=selector, uniform=search != "pairs")
    if classifier == "mdm":
        return _pipeline(covariance, need("pyriemann.classification").MDM(), tangent=False)
    return _pipeline(covariance, SVC(kernel="linear"), tangent=True)


def plot_augmented(
    matrix: Any, n_channels: int, lag: int = 1, sampling_rate: float | None = None, ax: Any = None
) -> Any:
    """Picture of one augmented covariance, as correlations, with its blocks and their delays.

    Parameters
    ----------
    matrix : array (order * n_channels, order * n_channels)
    n_channels : int
    lag : int, default 1
        In samples.
    sampling_rate : float, optional
        In Hz; delays are in ms then.
    ax : matplotlib Axes, optional

    Returns
    -------
    Axes
    """
    import matplotlib.pyplot as plt

    at_least("n_channels", n_channels, 1)
    matrix = np.asarray(matrix, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] % n_channels:
        raise InputError(f"matrix must be square, a multiple of {n_channels} rows; got {matrix.shape}")
    if ax is None:
        ax = plt.subplots(figsize=(4.6, 4), layout="constrained")[1]
    scale = np.sqrt(np.diag(matrix))
    image = ax.imshow(matrix / np.outer(scale, scale), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    order = len(matrix) // n_channels
    for k in range(1, order):
        ax.axhline(k * n_channels - 0.5, color="0.2", linewidth=0.6)
        ax.axvline(k * n_channels - 0.5, color="0.2", linewidth=0.6)
    ms = sampling_rate is not None
    labels = [
        f"{k * lag * 1000 / sampling_rate:.0f}" if sampling_rate is not None else str(k * lag) for k in range(order)
    ]
    at = (np.arange(order) + 0.5) * n_channels - 0.5
    ax.set_xticks(at, labels)
    ax.set_yticks(at, labels)
    ax.set_xlabel(f"delay of the block ({'ms' if ms else 'samples'})")
    ax.figure.colorbar(image, ax=ax, label="correlation", shrink=0.8)
    return ax
