"""Decoders of a moving state from spikes: the discriminative Kalman filter, and Kalman, extended and unscented filters beside it.

All of them share one model of the state and one filter (`nissl.recordings.state_space`); they differ in what an observation says.
The generative ones learn x given the state. The discriminative one learns the state given x by any regression, which is the easier
of the two where there are many more neurons than dimensions, and turns it round by Bayes' rule.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh
from scipy.optimize import minimize_scalar
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted, check_random_state

from nissl.arguments import at_least, flag, is_number, is_whole
from nissl.errors import InputError, blame
from nissl.recordings.arrays import as_bins
from nissl.recordings.state_space import (
    Filtered,
    Rule,
    StateModel,
    covariance,
    information,
    information_filter,
    root,
    symmetrised,
    update,
)

RIDGE = 1e-9
"""What is added to the diagonal of a learnt covariance, as a share of its mean: a neuron that never fires has no noise."""
OFTEN = 0.05
"""Share of the steps in which a guard may act without a warning."""
LEFT_OUT = 1000
"""Rows on which a bandwidth is chosen; each is left out once."""
BLOCK = 2**22
"""Entries of a matrix of distances that are held at once."""


class NadarayaWatson(RegressorMixin, BaseEstimator):
    """Regression by a weighted mean of neighbours: f(x) = Σ wᵢ zᵢ / Σ wᵢ with wᵢ = exp(−‖x − xᵢ‖² / 2s²).

    Parameters
    ----------
    bandwidth : float, optional
        s, in units of `X`. Default: the one with the least squared error when every row is left out once (of 1,000 rows drawn at
        random where there are more).
    random_state : int, default 0

    Attributes
    ----------
    bandwidth_ : float
    n_features_in_ : int

    References
    ----------
    Nadaraya (1964). On estimating regression. Theory of Probability and its Applications 9, 141-142.
    Watson (1964). Smooth regression analysis. Sankhya A 26, 359-372.
    """

    def __init__(self, bandwidth: float | None = None, random_state: int = 0) -> None:
        self.bandwidth = bandwidth
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        """Several outputs at once."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> NadarayaWatson:
        """Keep the rows and choose the bandwidth.

        Parameters
        ----------
        X : array (n, n_features)
        y : array (n,) or (n, n_outputs)

        Raises
        ------
        InputError
            Arrays that do not fit, fewer than two rows, a bandwidth that is not positive.
        """
        if self.bandwidth is not None and not (is_number(self.bandwidth) and self.bandwidth > 0):
            raise InputError(f"bandwidth must be a number above 0, got {self.bandwidth!r}")
        X = as_bins(X)
        y = _states(y, len(X))
        if len(X) < 2:
            raise InputError(f"neighbours need at least 2 rows, got n_samples = {len(X)}")
        self.n_features_in_ = X.shape[1]
        self.X_, self.y_ = X, y.reshape(len(y), -1)
        self._flat = y.ndim == 1
        self.bandwidth_ = float(self._best() if self.bandwidth is None else self.bandwidth)
        return self

    def _best(self) -> float:
        """Bandwidth of least error when a row is left out: the best of a grid over all distances, refined."""
        n = len(self.X_)
        rows = np.arange(n)
        if n > LEFT_OUT:
            rows = np.sort(check_random_state(self.random_state).permutation(n)[:LEFT_OUT])
        distance = _squared(self.X_[rows], self.X_)
        distance[np.arange(len(rows)), rows] = np.inf
        near = distance.min(1)
        typical = float(np.mean(distance[np.isfinite(distance)]))
        if typical == 0:
            return 1.0
        distance -= near[:, None]

        def loss(log_s2: float) -> float:
            w = np.exp(distance * (-0.5 * np.exp(-log_s2)))
            return float(np.square(w @ self.y_ / w.sum(1)[:, None] - self.y_[rows]).sum())

        grid = np.log(typical) + np.linspace(np.log(1e-4), np.log(10), 14)
        i = int(np.argmin([loss(g) for g in grid]))
        bounds = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
        found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-2})
        return float(np.exp(found.x / 2))  # pyright: ignore[reportAttributeAccessIssue]

    def predict(self, X: Any) -> np.ndarray:
        """Weighted means (n,) or (n, n_outputs). Far from all rows it is the value of the nearest ones, never NaN."""
        check_is_fitted(self)
        X = as_bins(X, neurons=self.n_features_in_)
        found = np.empty((len(X), self.y_.shape[1]))
        step = max(1, BLOCK // len(self.X_))
        for i in range(0, len(X), step):
            d = _squared(X[i : i + step], self.X_)
            w = np.exp((d.min(1)[:, None] - d) / (2 * self.bandwidth_**2))
            found[i : i + step] = w @ self.y_ / w.sum(1)[:, None]
        return found[:, 0] if self._flat else found


class _StateDecoder(RegressorMixin, BaseEstimator, ABC):
    """What the filters share: checks, trials, lag, the model of the state, prediction at once and step by step."""

    lag: int
    stationary: bool
    state_model: StateModel | None
    A_: np.ndarray
    Gamma_: np.ndarray
    S_: np.ndarray
    mean_: np.ndarray

    def __sklearn_tags__(self) -> Any:
        """NaN in `X` means that nothing was recorded; states may have several dimensions."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.input_tags.allow_nan = True
        return tags

    def fit(self, X: Any, y: Any, groups: Any = None) -> Any:
        """Learn the motion of the state and what observations say of it.

        Parameters
        ----------
        X : array (n_bins, n_neurons) or DataArray ("bin", "neuron")
            In the order of time. Bins with NaN are left out of the learning of observations.
        y : array (n_bins, d) or (n_bins,)
            States.
        groups : array (n_bins,), optional
            Trials: wherever the value changes, a new one begins. Nothing is paired across. Default: one trial.

        Raises
        ------
        InputError
            Arrays or parameters that do not fit; too few bins; states that do not vary.
        """
        self._check()
        X = as_bins(X, missing=True)
        z = _states(y, len(X))
        starts = _starts(groups, len(X))
        if len(X) < 3:
            raise InputError(f"a filter needs at least 3 bins, got n_samples = {len(X)}")
        flat, z = z.ndim == 1, z.reshape(len(z), -1)
        model = self.state_model or StateModel.fit(z, starts, self.stationary)
        if model.A.shape[0] != z.shape[1]:
            raise InputError(f"state_model has {model.A.shape[0]} dimensions and y {z.shape[1]}")
        x, z, trial = _paired(X, z - model.mean, starts, self.lag)
        kept = ~np.isnan(x).any(1)
        if kept.sum() < 3:
            raise InputError(
                f"only {int(kept.sum())} bins have both an observation and a state; n_samples must be larger"
            )
        self.n_features_in_ = X.shape[1]
        self.A_, self.Gamma_, self.S_, self.mean_, self._flat = model.A, model.Gamma, model.S, model.mean, flat
        self._fit_observations(x[kept], z[kept], trial[kept])
        self.reset()
        return self

    def _check(self) -> None:
        at_least("lag", self.lag, 0)
        flag("stationary", self.stationary)
        if self.state_model is not None and not isinstance(self.state_model, StateModel):
            raise InputError(f"state_model must be made by StateModel(...), got {type(self.state_model).__name__}")

    @abstractmethod
    def _fit_observations(self, x: np.ndarray, z: np.ndarray, trial: np.ndarray) -> None:
        """Learn what x (n, n_neurons) says of z (n, d), centred; `trial` numbers the trials."""

    @abstractmethod
    def _informed(self, X: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """J, h of bins (..., n_times, n_neurons), the first of which may begin a trial, and how often a guard acted."""

    def _rule(self) -> Rule:
        return update

    def predict(self, X: Any, groups: Any = None, return_cov: bool = False) -> Any:
        """Mean of the state at every bin, given the observations up to `lag` bins before it.

        Parameters
        ----------
        X : array (n_bins, n_neurons)
            NaN: not recorded.
        groups : array (n_bins,), optional
            Trials, each of which is filtered from its own start; all go through the filter together.
        return_cov : bool, default False

        Returns
        -------
        means : array (n_bins, d) or (n_bins,)
            The first `lag` bins of a trial have the mean of the training states.
        covs : array (n_bins, d, d)
            If `return_cov`.

        Raises
        ------
        InputError
            Other neurons than in fit, infinity, groups that do not fit.
        NotFittedError
            Before fit.
        """
        check_is_fitted(self)
        flag("return_cov", return_cov)
        X = as_bins(X, neurons=self.n_features_in_, missing=True)
        starts = _starts(groups, len(X))
        lengths = np.diff(np.append(starts, len(X)))
        trials, times = len(starts), int(max(lengths.max() - self.lag, 0))
        d = len(self.mean_)
        means = np.broadcast_to(self.mean_, (len(X), d)).copy()
        covs = np.broadcast_to(self.S_, (len(X), d, d)).copy()
        if times:
            # Shorter trials are filled up with their last bin, and what is found there is thrown away: J stays shared.
            at = np.minimum(np.arange(times), lengths[:, None] - 1) + starts[:, None]
            J, h, n_guarded = self._informed(X[at], True)
            if n_guarded > OFTEN * trials * times:
                warnings.warn(
                    f"the guard {getattr(self, 'guard', None)!r} acted in {n_guarded} of {trials * times} steps: a regression that "
                    "knows less than the prior; use robust=True or covariance='constant'",
                    stacklevel=2,
                )
            found = self._filtered(J, h)
            real = np.arange(times) < (lengths - self.lag)[:, None]
            place = (at + self.lag)[real]
            means[place], covs[place] = found.means[real] + self.mean_, found.covs[real]
        out = means[:, 0] if self._flat else means
        return (out, covs) if return_cov else out

    def _filtered(self, J: np.ndarray, h: np.ndarray) -> Filtered:
        return information_filter(J, h, self.A_, self.Gamma_, np.zeros(len(self.mean_)), self.S_, rule=self._rule())

    def reset(self) -> None:
        """Forget what was observed by `step`: the next bin begins a trial."""
        check_is_fitted(self, "S_")
        self._now: tuple[np.ndarray, np.ndarray] | None = None

    def step(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Take in one bin, online.

        Parameters
        ----------
        x : array (n_neurons,)
            NaN: not recorded.

        Returns
        -------
        mean : array (d,)
        cov : array (d, d)
            Of the state `lag` bins after `x`: what `predict` returns in that row.

        Raises
        ------
        InputError
            Another number of neurons, or infinity.
        """
        check_is_fitted(self)
        x = np.asarray(x, dtype=np.float64)
        if x.shape != (self.n_features_in_,) or np.isinf(x).any():
            raise InputError(
                f"x must be {self.n_features_in_} finite numbers or NaN, one a neuron; got the shape {x.shape}"
            )
        J, h, _ = self._informed(x[None], self._now is None)
        if self._now is None:
            m, M = np.zeros(len(self.mean_)), self.S_
        else:
            m, M = self.A_ @ self._now[0], self.A_ @ self._now[1] @ self.A_.T + self.Gamma_
        m, P, _ = self._rule()(m, M, J[0], h[0])
        self._now = m, P
        return m + self.mean_, P.copy()


class _FeatureFilter(_StateDecoder):
    """Filters that learn x = c + B phi(z) + noise, with features phi of the state, by least squares."""

    B_: np.ndarray
    Lambda_: np.ndarray
    offset_: np.ndarray

    def _features(self, z: np.ndarray) -> np.ndarray:
        return z

    def _fit_observations(self, x: np.ndarray, z: np.ndarray, trial: np.ndarray) -> None:
        phi = self._features(z)
        middle, self.offset_ = phi.mean(0), x.mean(0)
        self.B_ = np.linalg.lstsq(phi - middle, x - self.offset_, rcond=None)[0].T
        self.offset_ = self.offset_ - self.B_ @ middle
        left = x - self.offset_ - phi @ self.B_.T
        self.Lambda_ = _raised(left.T @ left / len(left), x)
        whole, h, _ = information(np.eye(len(self.B_)), self.B_, self.Lambda_)
        self._J, self._gain = whole[0], h

    def _informed(self, X: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray, int]:
        e = X - self.offset_
        if np.isnan(e).any():
            J, h, _ = information(e, self.B_, self.Lambda_)
        else:
            J, h = np.broadcast_to(self._J, (X.shape[-2], *self._J.shape)), e @ self._gain
        return J, h, 0


class KalmanFilterDecoder(_FeatureFilter):
    """Kalman filter: x = H (z − mean) + c + N(0, Λ), learnt by least squares; the baseline of the discriminative filter.

    Parameters
    ----------
    lag : int, default 0
        Bin t of `X` observes the state of bin t + lag.
    stationary : bool, default False
        Take the stationary covariance of the learnt dynamics as the prior, instead of the covariance of the states.
    state_model : StateModel, optional
        Known motion of the state. Default: learnt in fit.

    Attributes
    ----------
    A_, Gamma_, S_ : array (d, d)
        Transition, its noise, and the prior.
    mean_ : array (d,)
        Mean of the states.
    B_ : array (n_neurons, d)
        Observation map H.
    offset_ : array (n_neurons,)
    Lambda_ : array (n_neurons, n_neurons)
        Its noise; 10⁻⁹ of the mean variance is added to its diagonal, for neurons that never fire.

    Notes
    -----
    Single missing neurons are left out of a step and the others used. The cost of a step does not grow with the neurons beyond one
    product with the observation.

    References
    ----------
    Wu et al. (2006). Bayesian population decoding of motor cortical activity using a Kalman filter. Neural Computation 18, 80-118.

    See Also
    --------
    DiscriminativeKalmanFilter, ExtendedKalmanFilterDecoder, UnscentedKalmanFilterDecoder
    nissl.recordings.state_space.kalman_filter : the mathematics, for known matrices.

    Examples
    --------
    >>> import numpy as np
    >>> from nissl.recordings.spikes import KalmanFilterDecoder
    >>> rng = np.random.default_rng(0)
    >>> z = np.cumsum(rng.normal(size=(500, 2)), 0) * 0.1
    >>> x = z @ rng.normal(size=(2, 30)) + rng.normal(size=(500, 30))
    >>> bool(KalmanFilterDecoder().fit(x[:400], z[:400]).score(x[400:], z[400:]) > 0.5)
    True
    """

    def __init__(self, lag: int = 0, *, stationary: bool = False, state_model: StateModel | None = None) -> None:
        self.lag = lag
        self.stationary = stationary
        self.state_model = state_model


class _NonlinearFilter(_FeatureFilter):
    """Features of the state, and their derivatives."""

    features: str

    def __init__(
        self,
        features: str = "quadratic",
        lag: int = 0,
        *,
        stationary: bool = False,
        state_model: StateModel | None = None,
    ) -> None:
        self.features = features
        self.lag = lag
        self.stationary = stationary
        self.state_model = state_model

    def _check(self) -> None:
        super()._check()
        if self.features not in ("linear", "quadratic", "tuning"):
            raise InputError(f"features={self.features!r}: choose 'linear', 'quadratic' or 'tuning'")

    def _features(self, z: np.ndarray) -> np.ndarray:
        """(..., d) to (..., k)."""
        if self.features == "linear":
            return z
        if self.features == "tuning":
            return np.concatenate([z, np.linalg.norm(z, axis=-1, keepdims=True)], -1)
        i, j = np.triu_indices(z.shape[-1])
        return np.concatenate([z, z[..., i] * z[..., j]], -1)

    def _slopes(self, z: np.ndarray) -> np.ndarray:
        """Derivatives (..., k, d)."""
        d = z.shape[-1]
        one = np.broadcast_to(np.eye(d), (*z.shape, d))
        if self.features == "linear":
            return one
        if self.features == "tuning":
            norm = np.linalg.norm(z, axis=-1, keepdims=True)
            return np.concatenate([one, (z / np.where(norm > 0, norm, 1.0))[..., None, :]], -2)
        i, j = np.triu_indices(d)
        return np.concatenate([one, z[..., i, None] * np.eye(d)[j] + z[..., j, None] * np.eye(d)[i]], -2)

    def _informed(self, X: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray, int]:
        J, h, n = super()._informed(X, first)
        return (
            np.broadcast_to(J, (*X.shape[:-1], *J.shape[-2:])),
            h,
            n,
        )  # covariances depend on the mean: none are shared


class ExtendedKalmanFilterDecoder(_NonlinearFilter):
    """Extended Kalman filter: x = c + B φ(z − mean) + N(0, Λ), linearised at the predicted state.

    Parameters
    ----------
    features : {"quadratic", "tuning", "linear"}, default "quadratic"
        φ(z): z and all products of two of its entries; z and its length (cosine tuning with speed, for velocities); or z alone,
        which is the Kalman filter. B, c and Λ are learnt by least squares.
    lag, stationary, state_model
        As of `KalmanFilterDecoder`, whose attributes it has; `B_` is (n_neurons, n_features).

    References
    ----------
    Jazwinski (1970). Stochastic processes and filtering theory.

    See Also
    --------
    UnscentedKalmanFilterDecoder : points instead of derivatives.
    """

    def _rule(self) -> Rule:
        def extended(m: np.ndarray, M: np.ndarray, J: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
            D = self._slopes(m)
            T = D.swapaxes(-1, -2)
            gradient = (T @ (h - (J @ self._features(m)[..., None])[..., 0])[..., None])[..., 0]
            R = symmetrised(T @ J @ D)
            return update(m, M, R, gradient + (R @ m[..., None])[..., 0])

        return extended


class UnscentedKalmanFilterDecoder(_NonlinearFilter):
    """Unscented Kalman filter: x = c + B φ(z − mean) + N(0, Λ), with moments from 2d + 1 points around the predicted state.

    Parameters
    ----------
    features, lag, stationary, state_model
        As of `ExtendedKalmanFilterDecoder`.

    Notes
    -----
    Points lie at m and m ± √(d + κ) columns of the Cholesky factor of the covariance, with κ = max(3 − d, 0) and the weights
    κ / (d + κ) and 1 / 2(d + κ).

    References
    ----------
    Julier & Uhlmann (1997). New extension of the Kalman filter to nonlinear systems. SPIE 3068.
    Li et al. (2009). Unscented Kalman filter for brain-machine interfaces. PLoS ONE 4, e6243.

    See Also
    --------
    ExtendedKalmanFilterDecoder
    """

    def _rule(self) -> Rule:
        def unscented(m: np.ndarray, M: np.ndarray, J: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
            d = m.shape[-1]
            kappa = max(3 - d, 0)
            L = root(M).swapaxes(-1, -2) * np.sqrt(d + kappa)
            moves = np.concatenate([np.zeros((*m.shape[:-1], 1, d)), L, -L], -2)
            w = np.full(2 * d + 1, 0.5 / (d + kappa))
            w[0] = kappa / (d + kappa)
            phi = self._features(m[..., None, :] + moves)
            middle = (w[:, None] * phi).sum(-2)
            phi = phi - middle[..., None, :]
            weighted = w[:, None] * phi
            C, cross = phi.swapaxes(-1, -2) @ weighted, moves.swapaxes(-1, -2) @ weighted
            # B'(B C B' + Λ)⁻¹ = (I + J C)⁻¹ B'Λ⁻¹: all of it in the size of the features
            inner = np.linalg.solve(
                np.eye(C.shape[-1]) + J @ C, np.concatenate([J, h[..., None] - J @ middle[..., None]], -1)
            )
            gain, change = inner[..., :-1], inner[..., -1:]
            P = symmetrised(M - cross @ gain @ cross.swapaxes(-1, -2))
            return m + (cross @ change)[..., 0], P, np.full(m.shape[:-1], np.nan)

        return unscented


class DiscriminativeKalmanFilter(_StateDecoder):
    """Discriminative Kalman filter: a regression f(x) ≈ E[z | x] with its error Q(x) ≈ Cov[z | x], filtered over time.

    Parameters
    ----------
    regressor : scikit-learn regressor, optional
        Gaussian process, neural network, ridge … Cloned, never changed. Default: `NadarayaWatson`.
    covariance : {"constant", "kernel"} or function, default "constant"
        Q: the mean of r r' over residuals r of held-out bins; their mean over neighbours (`NadarayaWatson` of r r'); or a function of
        `X` (n, n_neurons) that returns (n, d, d).
    guard : {"web", "cap", "repo"}, default "web"
        What is done in steps in which Q⁻¹ − S⁻¹ is not positive definite. With the sources: "web" (page of the author) drops S⁻¹;
        "cap" (simulations) shrinks Q to S in the directions in which it is wider; "repo" (scripts on monkeys) drops S⁻¹ and gives
        f the weight Q⁻¹ + S⁻¹. They differ in the mean too.
    robust : bool, default False
        Drop S⁻¹ in all steps, as if every state were as likely before.
    lag : int, default 0
        Bin t of `X` observes the state of bin t + lag.
    holdout : float or int, default 0.3
        Share of the bins, the last ones (whole trials where there are several), from whose residuals Q is learnt. A whole number k of
        at least 2 takes the residuals of a cross-validation over k blocks of time instead. f is then fitted on all bins.
    stationary : bool, default False
        S from the learnt dynamics, S = A S A' + Γ, instead of the covariance of the states.
    state_model : StateModel, optional
        Known motion of the state. Default: learnt in fit.

    Attributes
    ----------
    A_, Gamma_, S_ : array (d, d)
    mean_ : array (d,)
    Q_ : array (d, d)
        Mean of r r' of the held-out bins.
    regressor_ : the fitted regressor, of z − mean
    n_fallback_ : int
        Held-out bins in which the guard acted. `predict` warns where it acts in over 5 % of the steps.

    Notes
    -----
    z_t = A z_{t-1} + N(0, Γ), z ~ N(0, S). The first bin gives N(f, Q). Then M = A Σ A' + Γ, Σ⁻¹ ← M⁻¹ + Q⁻¹ − S⁻¹ and
    μ ← Σ (M⁻¹ A μ + Q⁻¹ f). A bin with a missing neuron is skipped (μ ← A μ, Σ ← M), since a regression needs all of them.
    With Q wider than S, f still counts while S⁻¹ takes its shrinkage away, so that μ can run off: a kernel Q should be compared with
    `robust` on data of its own.

    References
    ----------
    Burkhart, Brandman, Franco, Hochberg & Harrison (2020). The discriminative Kalman filter for Bayesian filtering with nonlinear and
    nongaussian observation models. Neural Computation 32, 969-1017.
    Burkhart (2018). A discriminative approach to Bayesian filtering with applications to human neural decoding. Brown University.

    See Also
    --------
    KalmanFilterDecoder : the same with a linear model of x given z.
    NadarayaWatson : a regression.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.linear_model import Ridge
    >>> from nissl.recordings.spikes import DiscriminativeKalmanFilter
    >>> rng = np.random.default_rng(0)
    >>> z = np.cumsum(rng.normal(size=(500, 2)), 0) * 0.1
    >>> x = z @ rng.normal(size=(2, 30)) + rng.normal(size=(500, 30))
    >>> decoder = DiscriminativeKalmanFilter(Ridge()).fit(x[:400], z[:400])
    >>> mean, cov = decoder.step(x[400])
    >>> mean.shape, cov.shape
    ((2,), (2, 2))
    """

    def __init__(
        self,
        regressor: Any = None,
        covariance: str | Callable[[np.ndarray], np.ndarray] = "constant",
        *,
        guard: str = "web",
        robust: bool = False,
        lag: int = 0,
        holdout: float = 0.3,
        stationary: bool = False,
        state_model: StateModel | None = None,
    ) -> None:
        self.regressor = regressor
        self.covariance = covariance
        self.guard = guard
        self.robust = robust
        self.lag = lag
        self.holdout = holdout
        self.stationary = stationary
        self.state_model = state_model

    def _check(self) -> None:
        super()._check()
        flag("robust", self.robust)
        if self.guard not in ("web", "cap", "repo"):
            raise InputError(f"guard={self.guard!r}: choose 'web', 'cap' or 'repo'")
        if not callable(self.covariance) and self.covariance not in ("constant", "kernel"):
            raise InputError(f"covariance={self.covariance!r}: choose 'constant', 'kernel' or give a function")
        whole = is_whole(self.holdout) and self.holdout >= 2
        if not whole and not (is_number(self.holdout) and 0 < self.holdout < 1):
            raise InputError(
                f"holdout must be a share between 0 and 1, or a number of blocks from 2, got {self.holdout!r}"
            )
        if self.regressor is not None and not (hasattr(self.regressor, "fit") and hasattr(self.regressor, "predict")):
            raise InputError(f"regressor must have fit and predict, got {self.regressor!r:.60}")

    def _fit_observations(self, x: np.ndarray, z: np.ndarray, trial: np.ndarray) -> None:
        def new() -> Any:
            return NadarayaWatson() if self.regressor is None else clone(self.regressor)

        y = z[:, 0] if self._flat else z
        left, at = np.empty_like(z), np.zeros(len(z), dtype=bool)
        with blame(InputError, "the regressor failed"):
            for held in _blocks(trial, self.holdout):
                learnt = new().fit(x[~held], y[~held])
                left[held], at[held] = (
                    z[held] - _states(learnt.predict(x[held]), int(held.sum())).reshape(-1, z.shape[1]),
                    True,
                )
            self.regressor_ = new().fit(x, y)
        left = left[at]
        products = left[:, :, None] * left[:, None, :]
        self.Q_ = _raised(products.mean(0), z)
        self._kernel = None
        if self.covariance == "kernel":
            self._kernel = NadarayaWatson().fit(x[at], products.reshape(len(left), -1))
        self._prior = np.linalg.inv(self.S_)
        self._shared = None if callable(self.covariance) or self._kernel is not None else self._measured(self.Q_[None])
        self.n_fallback_ = (
            int(at.sum() * self._shared[3][0]) if self._shared else int(self._measured(self._errors(x[at]))[3].sum())
        )

    def _errors(self, x: np.ndarray) -> np.ndarray:
        """Q of bins, (n, d, d)."""
        d = len(self.S_)
        if self._kernel is not None:  # a mean over few neighbours is singular: a little of the constant one is added
            return self._kernel.predict(x).reshape(-1, d, d) + 1e-6 * self.Q_
        assert callable(self.covariance)
        with blame(InputError, "the function covariance failed"):
            found = self.covariance(x)
        return covariance(np.broadcast_to(found, (len(x), d, d)), d, "what covariance returned")

    def _measured(self, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For each Q: what is added to the precision, the weight of f, Q⁻¹, and whether the guard acted."""
        inverse = symmetrised(np.linalg.inv(Q))
        if self.robust:
            return inverse, inverse, inverse, np.zeros(len(Q), dtype=bool)
        J, weight = inverse - self._prior, inverse.copy()
        acted = np.linalg.eigvalsh(J)[:, 0] <= 0
        if acted.any():
            J[acted] = inverse[acted]
            if self.guard == "repo":
                weight[acted] = inverse[acted] + self._prior
            elif self.guard == "cap":
                for i in np.flatnonzero(acted):
                    w, V = eigh(Q[i], self.S_)  # V' S V = 1 and V' Q V = w: S⁻¹ = V V', Q⁻¹ = V w⁻¹ V'
                    weight[i], J[i] = (V / np.minimum(w, 1)) @ V.T, (V * np.maximum(1 / w - 1, 0)) @ V.T
        return symmetrised(J), symmetrised(weight), inverse, acted

    def _informed(self, X: np.ndarray, first: bool) -> tuple[np.ndarray, np.ndarray, int]:
        lead, d = X.shape[:-1], len(self.S_)
        rows = X.reshape(-1, X.shape[-1])
        seen = ~np.isnan(rows).any(1)
        f = np.zeros((len(rows), d))
        if seen.any():
            f[seen] = np.asarray(self.regressor_.predict(rows[seen] if not seen.all() else rows)).reshape(-1, d)
        if self._shared and seen.all():  # the same J for every trial, so that covariances are computed once
            J, weight, inverse, acted = (np.broadcast_to(v, (lead[-1], *v.shape[1:])) for v in self._shared)
            count = int(acted.any()) * (len(rows) - first * len(rows) // lead[-1])
        elif self._shared:
            J, weight, inverse, acted = (np.broadcast_to(v, (*lead, *v.shape[1:])) for v in self._shared)
            count = int(acted.any()) * int(seen.sum())
        else:
            Q = np.broadcast_to(self.Q_, (len(rows), d, d)).copy()
            if seen.any():
                Q[seen] = self._errors(rows[seen])
            J, weight, inverse, acted = (v.reshape(*lead, *v.shape[1:]) for v in self._measured(Q))
            count = int((acted.ravel() & seen)[:].sum())
        if first:  # N(f, Q) whatever the prior and the guard: the prior N(0, S) is taken out again
            J, weight = J.copy(), weight.copy()
            J[..., 0, :, :], weight[..., 0, :, :] = inverse[..., 0, :, :] - self._prior, inverse[..., 0, :, :]
        h = (weight @ f.reshape(*lead, d)[..., None])[..., 0]
        if not seen.all():
            J, missing = J.copy(), ~seen.reshape(lead)
            J[missing], h[missing] = 0.0, 0.0
        return J, h, count


def normalised_rmse(Z: ArrayLike, predicted: ArrayLike) -> float:
    """Root mean square error over that of the mean of `Z`: 0 is exact, 1 is as good as the mean. Arrays (n_bins, d)."""
    z, p = _pair(Z, predicted)
    spread = np.square(z - z.mean(0)).sum()
    if spread == 0:
        raise InputError("Z does not vary")
    return float(np.sqrt(np.square(z - p).sum() / spread))


def angle_error(Z: ArrayLike, predicted: ArrayLike, fast: bool = False) -> float:
    """Mean absolute angle, in radians from 0 to π, between two-dimensional velocities (n_bins, 2); chance is π / 2.

    `fast` takes only the bins in which the true speed lies above its median: the angle of a hand at rest means nothing.
    """
    z, p = _pair(Z, predicted)
    if z.shape[1] != 2:
        raise InputError(f"angles are taken of velocities with two dimensions, got {z.shape[1]}")
    speed = np.linalg.norm(z, axis=1)
    angle = np.abs(np.angle((p[:, 0] + 1j * p[:, 1]) * (z[:, 0] - 1j * z[:, 1])))
    return float(angle[speed > np.median(speed)].mean() if fast else angle.mean())


def plot_decoded(Z: ArrayLike, decoded: dict[str, Any], bins: slice | None = None) -> Any:
    """States over time and what decoders make of them, one panel a dimension.

    Parameters
    ----------
    Z : array (n_bins, d)
    decoded : dict of name to means (n_bins, d), or to (means, covs) as of ``predict(return_cov=True)``
        Covariances are drawn as bands of two standard deviations.
    bins : slice, optional
        Which ones; default all.

    Returns
    -------
    matplotlib Figure
    """
    from matplotlib.figure import Figure

    bins = bins or slice(None)
    z = np.asarray(Z, dtype=np.float64).reshape(len(np.asarray(Z)), -1)
    figure = Figure(figsize=(9, 2.2 * z.shape[1] + 0.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(z.shape[1], sharex=True))
    at = np.arange(len(z))[bins]
    for k, ax in enumerate(axes):
        ax.plot(at, z[bins, k], color="0.6", lw=2.5, label="true")
        for i, (name, found) in enumerate(decoded.items()):
            means, covs = found if isinstance(found, tuple) else (found, None)
            mean = _pair(z, means)[1][bins, k]
            ax.plot(at, mean, color=f"C{i}", lw=1, label=name)
            if covs is not None:
                sd = 2 * np.sqrt(np.asarray(covs)[bins, k, k])
                ax.fill_between(at, mean - sd, mean + sd, color=f"C{i}", alpha=0.2, lw=0)
        ax.set_ylabel(f"dimension {k + 1}")
    axes[-1].set_xlabel("bin")
    axes[0].legend(ncols=len(decoded) + 1, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _pair(Z: ArrayLike, predicted: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    z, p = (np.asarray(v, dtype=np.float64) for v in (Z, predicted))
    if z.shape != p.shape or not z.size or z.ndim not in (1, 2):
        raise InputError(f"states and predictions must have one shape (n_bins, d), got {z.shape} and {p.shape}")
    return z.reshape(len(z), -1), p.reshape(len(p), -1)


def _states(y: Any, n: int, name: str = "y") -> np.ndarray:
    """States (n,) or (n, d) as float64."""
    if y is None:
        raise InputError(f"{name} is missing: requires y to be passed, but the target y is None")
    found = np.asarray(y)
    if found.ndim not in (1, 2) or len(found) != n:
        raise InputError(f"{name} must be ({n},) or ({n}, d), as many as there are bins; got the shape {found.shape}")
    return as_bins(found.reshape(n, -1), name).reshape(found.shape)


def _starts(groups: Any, n: int) -> np.ndarray:
    """First bins of the trials."""
    if groups is None:
        return np.array([0])
    found = np.asarray(groups)
    if found.shape != (n,):
        raise InputError(f"groups must hold one value for each of {n} bins, got the shape {found.shape}")
    return np.concatenate([[0], np.flatnonzero(found[1:] != found[:-1]) + 1])


def _paired(X: np.ndarray, z: np.ndarray, starts: np.ndarray, lag: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations of bins t with the states of bins t + lag of the same trial, and the number of the trial."""
    trial = np.zeros(len(X), dtype=int)
    trial[starts[1:]] = 1
    trial = np.cumsum(trial)
    t = np.arange(max(len(X) - lag, 0))
    t = t[trial[t] == trial[t + lag]]
    return X[t], z[t + lag], trial[t]


def _blocks(trial: np.ndarray, holdout: float) -> list[np.ndarray]:
    """Masks of the bins that are held out: the last share, or one block of time after the other; trials stay whole."""
    n, trials = len(trial), np.unique(trial)
    whole = is_whole(holdout)
    wanted = int(holdout) if whole else 2
    # bins are numbered by their trial's first one, so that a cut never runs through a trial
    place = np.arange(n) if len(trials) < wanted else np.searchsorted(trial, trial)
    if not whole:
        cut = place[min(n - 1, max(1, int(np.ceil((1 - holdout) * n))))]
        if cut == 0:
            cut = place[-1]
        return [place >= cut] if (place >= cut).sum() < n else [np.arange(n) >= max(1, int((1 - holdout) * n))]
    if n < wanted:
        raise InputError(f"holdout={holdout} blocks need at least as many bins, got n_samples = {n}")
    block = np.minimum(place * wanted // n, wanted - 1)
    return [block == b for b in np.unique(block)]


def _raised(M: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A learnt covariance with `RIDGE` of the mean variance of the data on its diagonal."""
    return symmetrised(M) + RIDGE * max(float(like.var(0).mean()), 1e-300) * np.eye(len(M))


def _squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances (n, m) of rows."""
    return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T, 0)
