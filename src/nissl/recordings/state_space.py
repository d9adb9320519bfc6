"""Linear-Gaussian state spaces: filter, smoother and sampler, batched over trials, with missing observations.

A state z_t of few dimensions moves by z_t = A z_{t-1} + N(0, Gamma) and is seen as x_t = H z_t + N(0, Lambda). What an observation
says about the state is kept as information: a matrix J = H' Lambda^-1 H and a vector h = H' Lambda^-1 x, both of the size of the state.
So a step costs as much for a thousand neurons as for ten, a missing observation is J = 0, h = 0, and a filter that gets J and h from
elsewhere (`nissl.recordings.spikes.filters`) runs through the same few lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import solve_discrete_lyapunov

from nissl.arguments import at_least, flag
from nissl.errors import InputError

SYMMETRIC = 1e-8
"""A covariance may differ from its transpose by this share of its largest entry."""


@dataclass(frozen=True, eq=False)
class Filtered:
    """What a filter knows at each time of the state, from the observations up to that time.

    Attributes
    ----------
    means : array (..., n_times, d)
    covs : array (..., n_times, d, d)
        A read-only view where all trials share them.
    predicted_means, predicted_covs : arrays of the same shapes
        From the observations before that time; of the first time, the prior.
    log_likelihood : array (...)
        Of the observations that are there, natural logarithm; NaN where a filter has no likelihood.
    """

    means: np.ndarray
    covs: np.ndarray
    predicted_means: np.ndarray
    predicted_covs: np.ndarray
    log_likelihood: np.ndarray


@dataclass(frozen=True, eq=False)
class StateModel:
    """How a state moves: z_t - mean = A (z_{t-1} - mean) + N(0, Gamma), and z_t ~ N(mean, S).

    Parameters
    ----------
    A, Gamma, S : array (d, d)
    mean : array (d,), optional
        Default zeros.

    Raises
    ------
    InputError
        Shapes that do not fit, NaN, or covariances that are not symmetric or not positive (S: definite, Gamma: semidefinite).
    """

    A: np.ndarray
    Gamma: np.ndarray
    S: np.ndarray
    mean: np.ndarray = None  # type: ignore[assignment]  # __post_init__ fills it in

    def __post_init__(self) -> None:
        A = _matrix(self.A, "A")
        d = len(A)
        mean = np.zeros(d) if self.mean is None else np.asarray(self.mean, dtype=np.float64)
        if A.shape != (d, d) or mean.shape != (d,) or not np.isfinite(mean).all():
            raise InputError(f"A must be square and mean of its size, got {A.shape} and {mean.shape}")
        for name, value in (("A", A), ("Gamma", covariance(self.Gamma, d, "Gamma", definite=False)),
                            ("S", covariance(self.S, d, "S")), ("mean", mean)):  # fmt: skip
            object.__setattr__(self, name, value)

    @classmethod
    def fit(cls, Z: np.ndarray, starts: np.ndarray | None = None, stationary: bool = False) -> StateModel:
        """Learn the model from states by least squares.

        Parameters
        ----------
        Z : array (n_bins, d)
            In the order of time.
        starts : array of int, optional
            Bins at which a trial begins; there is no transition across them. Default: the first bin only.
        stationary : bool, default False
            Solve S = A S A' + Gamma instead of taking the covariance of `Z`.

        Raises
        ------
        InputError
            Fewer transitions than dimensions, a dimension that does not vary, or dynamics that grow where a stationary S is wanted.
        """
        flag("stationary", stationary)
        mean = Z.mean(0)
        z = Z - mean
        later = np.ones(len(z), dtype=bool)
        later[0 if starts is None else starts] = False
        now = np.flatnonzero(later)
        d = z.shape[1]
        if len(now) < d + 1:
            raise InputError(
                f"the dynamics of {d} dimensions need at least {d + 1} transitions, got {len(now)}; n_samples = {len(z)}"
            )
        A = np.linalg.lstsq(z[now - 1], z[now], rcond=None)[0].T
        left = z[now] - z[now - 1] @ A.T
        Gamma, S = left.T @ left / len(now), z.T @ z / len(z)
        if np.linalg.eigvalsh(S)[0] <= 1e-12 * np.trace(S):
            raise InputError(
                "the states do not vary in every dimension; leave out those that are constant or follow from others"
            )
        if stationary:
            if np.abs(np.linalg.eigvals(A)).max() >= 1:
                raise InputError(
                    "the dynamics that were learnt grow without end, so that no stationary S exists; use stationary=False"
                )
            S = solve_discrete_lyapunov(A, Gamma)
        return cls(A, Gamma, symmetrised(S), mean)


def kalman_filter(x: Any, A: Any, Gamma: Any, H: Any, Lambda: Any, mean: Any, cov: Any) -> Filtered:
    """Filter observations of a linear-Gaussian state space.

    Parameters
    ----------
    x : array (..., n_times, n)
        Leading axes are trials. NaN: missing, single entries or whole times.
    A, Gamma : array (d, d) or (n_times, d, d)
        Transition into each time and its noise; the entry of the first time is not used.
    H, Lambda : array (n, d) and (n, n), or one for each time
        Observation and its noise, which must be positive definite.
    mean, cov : array (d,) and (d, d)
        Of the state at the first time, before its observation.

    Returns
    -------
    Filtered

    Raises
    ------
    InputError
        Shapes that do not fit, infinity, or a covariance that is not symmetric and positive definite.

    References
    ----------
    Kalman (1960). A new approach to linear filtering and prediction problems. Journal of Basic Engineering 82, 35-45.

    See Also
    --------
    rts_smoother : with the observations after each time too.
    ffbs : draws of the whole path.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim < 2 or 0 in x.shape or np.isinf(x).any():
        raise InputError(f"x must be finite numbers or NaN, (..., n_times, n); got the shape {x.shape}")
    times, n = x.shape[-2:]
    mean = np.asarray(mean, dtype=np.float64)
    if mean.ndim != 1 or not np.isfinite(mean).all():
        raise InputError(f"mean must be finite, (d,), got the shape {mean.shape}")
    d = len(mean)
    A, Gamma = (
        _timed(A, (d, d), times, "A"),
        covariance(_timed(Gamma, (d, d), times, "Gamma"), d, "Gamma", definite=False),
    )
    H, Lambda = _timed(H, (n, d), times, "H"), covariance(_timed(Lambda, (n, n), times, "Lambda"), n, "Lambda")
    cov = covariance(cov, d, "cov", definite=False)
    J, h, constant = information(x, H, Lambda)
    return information_filter(J, h, A, Gamma, mean, cov, constant)


def information(x: np.ndarray, H: np.ndarray, Lambda: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What observations say of the state.

    Parameters
    ----------
    x : array (..., n_times, n)
        NaN where nothing was seen.
    H, Lambda : array (n, d) and (n, n), or one for each time

    Returns
    -------
    J : array (n_times, d, d), or (..., n_times, d, d) where something is missing
        H' Lambda^-1 H of what was seen.
    h : array (..., n_times, d)
        H' Lambda^-1 x.
    constant : array (..., n_times)
        x' Lambda^-1 x + log det (2 pi Lambda): the part of the likelihood without the state.
    """
    times, (n, d) = x.shape[-2], H.shape[-2:]
    seen = ~np.isnan(x)
    if H.ndim == 2 and Lambda.ndim == 2 and seen.all():
        J, h, constant = _seen(x, H, Lambda)
        return np.broadcast_to(J, (times, d, d)), h, constant
    if seen.all():
        H, Lambda = np.broadcast_to(H, (times, n, d)), np.broadcast_to(Lambda, (times, n, n))
        L = np.linalg.cholesky(Lambda)
        W, v = np.linalg.solve(L, H), np.linalg.solve(L, x[..., None])[..., 0]
        logdet = 2 * np.log(np.diagonal(L, axis1=-2, axis2=-1)).sum(-1) + n * np.log(2 * np.pi)
        return W.swapaxes(-1, -2) @ W, np.einsum("tnd,...tn->...td", W, v), np.square(v).sum(-1) + logdet
    J, h, constant = np.zeros((*x.shape[:-1], d, d)), np.zeros((*x.shape[:-1], d)), np.zeros(x.shape[:-1])
    if H.ndim == 2 and Lambda.ndim == 2:  # one solution for each pattern of what is missing
        patterns, which = np.unique(seen.reshape(-1, n), axis=0, return_inverse=True)
        which = which.reshape(x.shape[:-1])
        for i, p in enumerate(patterns):
            at = which == i
            if p.any():  # where nothing was seen, nothing is known
                J[at], h[at], constant[at] = _seen(x[at][:, p], H[p], Lambda[np.ix_(p, p)])
        return J, h, constant
    for t in range(times):
        J[..., t : t + 1, :, :], h[..., t : t + 1, :], constant[..., t : t + 1] = information(
            x[..., t : t + 1, :], H if H.ndim == 2 else H[t], Lambda if Lambda.ndim == 2 else Lambda[t]
        )
    return J, h, constant


def _seen(x: np.ndarray, H: np.ndarray, Lambda: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    L = np.linalg.cholesky(Lambda)
    W, v = np.linalg.solve(L, H), np.linalg.solve(L, x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)
    logdet = 2 * np.log(np.diagonal(L)).sum() + len(L) * np.log(2 * np.pi)
    return W.T @ W, v @ W, np.square(v).sum(-1) + logdet


def update(m: np.ndarray, M: np.ndarray, J: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
    """Bayes' rule for a Gaussian state: N(m, M) times exp(h' z - z' J z / 2), normalised.

    Parameters
    ----------
    m, M : arrays (..., d) and (..., d, d)
        Predicted mean and covariance.
    J, h : arrays (..., d, d) and (..., d)
        J may have negative eigenvalues as long as M^-1 + J has none.

    Returns
    -------
    mean, cov : arrays (..., d) and (..., d, d)
        cov = (M^-1 + J)^-1, mean = cov (M^-1 m + h).
    logdet : array (...)
        log det (I + M J).

    Raises
    ------
    InputError
        M^-1 + J is not positive definite.
    """
    L = root(M)
    try:
        C = np.linalg.cholesky(np.eye(M.shape[-1]) + L.swapaxes(-1, -2) @ J @ L)
    except np.linalg.LinAlgError:
        raise InputError(
            "an observation would make the covariance of the state negative: its information is below minus that of the prediction"
        ) from None
    R = np.linalg.solve(C, L.swapaxes(-1, -2))
    P = R.swapaxes(-1, -2) @ R
    mean = m + _times(P, h - _times(J, m))
    return mean, P, 2 * np.log(np.diagonal(C, axis1=-2, axis2=-1)).sum(-1)


Rule = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, Any]]


def information_filter(
    J: np.ndarray, h: np.ndarray, A: np.ndarray, Gamma: np.ndarray, mean: np.ndarray, cov: np.ndarray,
    constant: np.ndarray | None = None, rule: Rule = update,
) -> Filtered:  # fmt: skip
    """The filter, given what every observation says of the state.

    Parameters
    ----------
    J : array (n_times, d, d) or (..., n_times, d, d)
        Without the leading axes, covariances are computed once for all trials.
    h : array (..., n_times, d)
    A, Gamma : array (d, d) or (n_times, d, d)
    mean, cov : array (d,) and (d, d)
        Prior of the first time.
    constant : array (..., n_times), optional
        See `information`; without it there is no likelihood. Only for the linear `rule`.
    rule : function, default `update`
        Takes the predicted mean and covariance, J and h. Filters of non-linear observations pass their own; J and h are then of the
        size of the features of the state.
    """
    times, d, lead = h.shape[-2], len(mean), h.shape[:-2]
    means, predicted = np.empty((*lead, times, d)), np.empty((*lead, times, d))
    shape = (*J.shape[:-3], times, d, d)
    covs, predicted_covs, score = np.empty(shape), np.empty(shape), np.zeros(lead)
    m, P = np.broadcast_to(mean, (*lead, d)), np.broadcast_to(cov, (*J.shape[:-3], d, d))
    for t in range(times):
        if t:
            F, G = A if A.ndim == 2 else A[t], Gamma if Gamma.ndim == 2 else Gamma[t]
            m, P = m @ F.T, F @ P @ F.T + G
        predicted[..., t, :], predicted_covs[..., t, :, :] = m, P
        if constant is not None:
            e = h[..., t, :] - _times(J[..., t, :, :], m)
            at = (m * (e + h[..., t, :])).sum(-1)
        m, P, logdet = rule(m, P, J[..., t, :, :], h[..., t, :])
        means[..., t, :], covs[..., t, :, :] = m, P
        if constant is not None:
            score = score - (constant[..., t] - at - (e * _times(P, e)).sum(-1) + logdet) / 2
    if constant is None:
        score = np.full(lead, np.nan)
    every = (*lead, times, d, d)
    return Filtered(
        means, np.broadcast_to(covs, every), predicted, np.broadcast_to(predicted_covs, every), np.asarray(score)
    )


def rts_smoother(filtered: Filtered, A: Any) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances of the state given all observations (Rauch, Tung & Striebel 1965).

    Parameters
    ----------
    filtered : Filtered
        Of `kalman_filter`.
    A : array (d, d) or (n_times, d, d)
        As it was given to the filter.

    Returns
    -------
    means : array (..., n_times, d)
    covs : array (..., n_times, d, d)

    Raises
    ------
    InputError
        A of another shape, or a predicted covariance that is singular: noise of the state without which the past is certain.
    """
    times, d = filtered.means.shape[-2:]
    G = _gains(filtered, _timed(A, (d, d), times, "A"))
    means, covs = filtered.means.copy(), filtered.covs.copy()
    for t in range(times - 2, -1, -1):
        g = G[..., t, :, :]
        means[..., t, :] += _times(g, means[..., t + 1, :] - filtered.predicted_means[..., t + 1, :])
        covs[..., t, :, :] += (
            g @ (covs[..., t + 1, :, :] - filtered.predicted_covs[..., t + 1, :, :]) @ g.swapaxes(-1, -2)
        )
    return means, symmetrised(covs)


def ffbs(filtered: Filtered, A: Any, n_samples: int = 1, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Draw paths of the state from their joint posterior: filter forwards, sample backwards.

    Parameters
    ----------
    filtered : Filtered
        Of `kalman_filter`.
    A : array (d, d) or (n_times, d, d)
    n_samples : int, default 1
    seed : int or Generator, default 0

    Returns
    -------
    array (n_samples, ..., n_times, d)

    Raises
    ------
    InputError
        As of `rts_smoother`.

    References
    ----------
    Carter & Kohn (1994). On Gibbs sampling for state space models. Biometrika 81, 541-553.
    """
    at_least("n_samples", n_samples, 1)
    rng = np.random.default_rng(seed)
    times, d = filtered.means.shape[-2:]
    G = _gains(filtered, _timed(A, (d, d), times, "A"))
    spread = filtered.covs.copy()
    spread[..., :-1, :, :] -= G @ filtered.predicted_covs[..., 1:, :, :] @ G.swapaxes(-1, -2)
    noise = _times(root(symmetrised(spread)), rng.standard_normal((n_samples, *filtered.means.shape)))
    z = filtered.means + noise
    for t in range(times - 2, -1, -1):
        z[..., t, :] += _times(G[..., t, :, :], z[..., t + 1, :] - filtered.predicted_means[..., t + 1, :])
    return z


def _gains(filtered: Filtered, A: np.ndarray) -> np.ndarray:
    """P A' M^-1 from each time but the last to the next one."""
    F = A if A.ndim == 2 else A[1:]
    try:
        return np.linalg.solve(filtered.predicted_covs[..., 1:, :, :], F @ filtered.covs[..., :-1, :, :]).swapaxes(
            -1, -2
        )
    except np.linalg.LinAlgError:
        raise InputError(
            "a predicted covariance is singular; give every dimension of the state some noise (Gamma)"
        ) from None


def root(M: np.ndarray) -> np.ndarray:
    """L with L L' = M of symmetric positive semidefinite matrices (..., d, d): Cholesky, or by eigenvectors where M is singular."""
    try:
        return np.linalg.cholesky(M)
    except np.linalg.LinAlgError:
        w, V = np.linalg.eigh(M)
        return V * np.sqrt(np.maximum(w, 0))[..., None, :]


def symmetrised(M: np.ndarray) -> np.ndarray:
    """Mean of matrices (..., d, d) and their transposes."""
    return (M + M.swapaxes(-1, -2)) / 2


def covariance(value: Any, d: int, name: str, definite: bool = True) -> np.ndarray:
    """A covariance, or a stack of them, checked: (..., d, d), symmetric, positive definite, or semidefinite up to rounding."""
    M = _matrix(value, name)
    if M.shape[-2:] != (d, d):
        raise InputError(f"{name} must be ({d}, {d}), got {M.shape}")
    scale = np.abs(M).max()
    if np.abs(M - M.swapaxes(-1, -2)).max() > SYMMETRIC * scale:
        raise InputError(f"{name} must be symmetric")
    M = symmetrised(M)
    least = np.linalg.eigvalsh(M)[..., 0].min()
    if least < -SYMMETRIC * scale or (definite and least <= 0):
        raise InputError(
            f"{name} must be positive {'' if definite else 'semi'}definite, its least eigenvalue is {least:.3g}"
        )
    return M


def _matrix(value: Any, name: str) -> np.ndarray:
    try:
        M = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a matrix of numbers, got {type(value).__name__}") from error
    if M.ndim < 2 or not M.size or not np.isfinite(M).all():
        raise InputError(f"{name} must be a matrix of finite numbers, got the shape {M.shape}")
    return M


def _timed(value: Any, shape: tuple[int, int], times: int, name: str) -> np.ndarray:
    M = _matrix(value, name)
    if M.shape not in (shape, (times, *shape)):
        raise InputError(f"{name} must be {shape}, or {(times, *shape)} with one for each time; got {M.shape}")
    return M


def _times(M: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Matrices (..., d, k) times vectors (..., k), broadcast."""
    return (M @ v[..., None])[..., 0]
