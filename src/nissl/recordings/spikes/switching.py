"""Linear dynamics that switch: paths drawn at once, states of a sticky HDP-HMM, matrices drawn or integrated out.

A path h of `T` bins in `k` dimensions starts at N(0, I) and goes on by ``h[t] = A[s] h[t-1] + b[s] + N(0, Q[s])`` with s = ``s[t]``:
**the state of a bin governs the step into it**. The state of bin 0 governs nothing.

References
----------
.. [1] Fox, Sudderth, Jordan, Willsky: A sticky HDP-HMM with application to speaker diarization. Annals of Applied Statistics (2011).
.. [2] Rue: Fast sampling of Gaussian Markov random fields. JRSS B (2001).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import multigammaln  # pyright: ignore[reportAttributeAccessIssue]

from nissl.recordings.spikes.polya_gamma import compiled


@dataclass(frozen=True)
class Prior:
    """Matrix-normal inverse-Wishart prior of the dynamics: [A, b] | Q has mean [I, 0] and column precision I.

    Attributes
    ----------
    scale : float, default 0.01
        The scale matrix of Q is this times the identity.
    extra : float, default 2.0
        Degrees of freedom beyond the dimensions of the path.
    alpha, gamma, kappa : float
        Concentration of a row of transitions, of the weights of states, and what staying has more.
    """

    scale: float = 0.01
    extra: float = 2.0
    alpha: float = 5.0
    gamma: float = 5.0
    kappa: float = 10.0


class Dynamics(NamedTuple):
    """A (L, k, k), b (L, k), precision Q⁻¹ (L, k, k) and log det Q⁻¹ (L,) of L states."""

    A: np.ndarray
    b: np.ndarray
    precision: np.ndarray
    log_det: np.ndarray


# ---------------------------------------------------------------- paths


@compiled
def cholesky(M):
    """Lower factor of a positive definite matrix, in place; above the diagonal stays what was there."""
    for j in range(M.shape[0]):
        for p in range(j):
            M[j, j] -= M[j, p] * M[j, p]
        M[j, j] = math.sqrt(M[j, j])
        for i in range(j + 1, M.shape[0]):
            for p in range(j):
                M[i, j] -= M[i, p] * M[j, p]
            M[i, j] /= M[j, j]


@compiled
def add_dynamics(A, b, P, s, D, E, e):
    """Add what the dynamics say of a path to its precision (diagonal blocks `D`, blocks (t, t - 1) `E`) and information `e`."""
    L, k, _ = A.shape
    PA, APA, Pb, APb = np.zeros((L, k, k)), np.zeros((L, k, k)), np.zeros((L, k)), np.zeros((L, k))
    for j in range(L):
        for u in range(k):
            for w in range(k):
                Pb[j, u] += P[j, u, w] * b[j, w]
                for v in range(k):
                    PA[j, u, v] += P[j, u, w] * A[j, w, v]
        for u in range(k):
            for w in range(k):
                APb[j, u] += A[j, w, u] * Pb[j, w]
                for v in range(k):
                    APA[j, u, v] += A[j, w, u] * PA[j, w, v]
    for u in range(k):
        D[0, u, u] += 1.0
    for t in range(1, len(s)):
        j = s[t]
        for u in range(k):
            e[t, u] += Pb[j, u]
            e[t - 1, u] -= APb[j, u]
            for v in range(k):
                D[t, u, v] += P[j, u, v]
                D[t - 1, u, v] += APA[j, u, v]
                E[t, u, v] = -PA[j, u, v]


@compiled
def add_counts(y, omega, d, c, r, z, D, e):
    """Add what counts say of the path: neuron i sees block ``z[i]`` through (1, c[i])."""
    p = c.shape[1]
    loading = np.ones(p + 1)
    for i in range(y.shape[0]):
        loading[1:] = c[i]
        first, log_r = z[i] * (p + 1), math.log(r[i])
        for t in range(y.shape[1]):
            w = omega[i, t]
            if w > 0.0:
                seen = 0.5 * (y[i, t] - r[i]) + w * (log_r - d[i])
                for u in range(p + 1):
                    e[t, first + u] += seen * loading[u]
                    for v in range(p + 1):
                        D[t, first + u, first + v] += w * loading[u] * loading[v]


@compiled
def draw_path(D, E, e, noise):
    """A draw from the Gaussian with block-tridiagonal precision; its mean where `noise` is zero.

    Parameters
    ----------
    D : array (T, k, k)
        Diagonal blocks; holds their factors afterwards.
    E : array (T, k, k)
        Block (t, t - 1); E[0] is not read. Holds factors afterwards.
    e : array (T, k)
        Precision times mean.
    noise : array (T, k)
        Standard normal numbers.

    Returns
    -------
    array (T, k)
    """
    T, k = e.shape
    h = np.empty((T, k))
    for t in range(T):
        if t:
            for u in range(k):  # E[t] becomes E[t] L[t-1]^-T
                for v in range(k):
                    total = E[t, u, v]
                    for w in range(v):
                        total -= E[t, u, w] * D[t - 1, v, w]
                    E[t, u, v] = total / D[t - 1, v, v]
            for u in range(k):
                for v in range(u + 1):
                    total = 0.0
                    for w in range(k):
                        total += E[t, u, w] * E[t, v, w]
                    D[t, u, v] -= total
        cholesky(D[t])
        for u in range(k):
            total = e[t, u]
            if t:
                for w in range(k):
                    total -= E[t, u, w] * h[t - 1, w]
            for w in range(u):
                total -= D[t, u, w] * h[t, w]
            h[t, u] = total / D[t, u, u]
    for t in range(T - 1, -1, -1):
        for u in range(k - 1, -1, -1):
            total = h[t, u] + noise[t, u]
            if t + 1 < T:
                for w in range(k):
                    total -= E[t + 1, w, u] * h[t + 1, w]
            for w in range(u + 1, k):
                total -= D[t, w, u] * h[t, w]
            h[t, u] = total / D[t, u, u]
    return h


# ---------------------------------------------------------------- states


@compiled
def log_steps(h, A, b, P, log_det):
    """Log-density of the step into each bin under each state (T, L); 0 for bin 0, into which there is no step."""
    T, k = h.shape
    L = len(b)
    found, off = np.zeros((T, L)), np.empty(k)
    for t in range(1, T):
        for j in range(L):
            for u in range(k):
                total = h[t, u] - b[j, u]
                for w in range(k):
                    total -= A[j, u, w] * h[t - 1, w]
                off[u] = total
            square = 0.0
            for u in range(k):
                total = 0.0
                for w in range(k):
                    total += P[j, u, w] * off[w]
                square += off[u] * total
            found[t, j] = 0.5 * (log_det[j] - square - k * math.log(2.0 * math.pi))
    return found


@compiled
def draw_states(log_density, transition, uniform):
    """States drawn by filtering forward and sampling backward; all states are as likely in bin 0.

    Parameters
    ----------
    log_density : array (T, L)
    transition : array (L, L)
        Rows sum to 1.
    uniform : array (T,)
        Uniform random numbers.
    """
    T, L = log_density.shape
    forward, s = np.empty((T, L)), np.empty(T, np.int64)
    for t in range(T):
        top = log_density[t].max()
        total = 0.0
        for j in range(L):
            prior = 1.0
            if t:
                prior = 0.0
                for i in range(L):
                    prior += forward[t - 1, i] * transition[i, j]
            forward[t, j] = max(prior, 1e-300) * math.exp(log_density[t, j] - top)
            total += forward[t, j]
        forward[t] /= total
    weight = np.empty(L)
    for t in range(T - 1, -1, -1):
        total = 0.0
        for j in range(L):
            weight[j] = forward[t, j] * (transition[j, s[t + 1]] if t + 1 < T else 1.0)
            total += weight[j]
        left = uniform[t] * total
        s[t] = L - 1
        for j in range(L):
            left -= weight[j]
            if left < 0.0:
                s[t] = j
                break
    return s


def draw_transitions(
    s: np.ndarray, weights: np.ndarray, prior: Prior, g: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Transition rows (L, L) and weights of states (L,) of the sticky HDP-HMM, its weak limit of L states [1]_."""
    L = len(weights)
    counts = np.zeros((L, L))
    np.add.at(counts, (s[:-1], s[1:]), 1)
    own = prior.alpha * weights + prior.kappa * np.eye(L)
    tables = np.zeros((L, L))
    for i, j in np.argwhere(counts):
        seated = np.arange(int(counts[i, j]))
        tables[i, j] = (g.random(len(seated)) < own[i, j] / (own[i, j] + seated)).sum()
    # tables that are there only because states stay say nothing of the weights
    share = prior.kappa / (prior.kappa + prior.alpha * weights)
    tables[np.diag_indices(L)] -= g.binomial(tables.diagonal().astype(int), share)
    weights = np.maximum(g.dirichlet(prior.gamma / L + tables.sum(0)), 1e-12)
    own = prior.alpha * weights + prior.kappa * np.eye(L)
    rows = np.maximum(g.standard_gamma(own + counts), 1e-300)
    return rows / rows.sum(1, keepdims=True), weights


# ---------------------------------------------------------------- dynamics


@compiled
def moments(h, s, L):
    """Of the steps of each state: their number and the sums of (h', h', 1)(h', h', 1)ᵀ, h' after and before (L, 2k + 1, 2k + 1)."""
    T, k = h.shape
    number, found, row = np.zeros(L), np.zeros((L, 2 * k + 1, 2 * k + 1)), np.ones(2 * k + 1)
    for t in range(1, T):
        row[:k], row[k : 2 * k] = h[t], h[t - 1]
        number[s[t]] += 1.0
        M = found[s[t]]
        for u in range(2 * k + 1):
            for v in range(u + 1):
                M[u, v] += row[u] * row[v]
    for j in range(L):
        for u in range(2 * k + 1):
            for v in range(u):
                found[j, v, u] = found[j, u, v]
    return number, found


def _posterior(M: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision of the columns, mean of [A, b] and scale of Q after steps with the moments `M`."""
    k = M.shape[1] // 2
    start = np.eye(k, k + 1)
    columns = M[:, k:, k:] + np.eye(k + 1)
    cross = M[:, :k, k:] + start
    mean = np.linalg.solve(columns, cross.transpose(0, 2, 1)).transpose(0, 2, 1)
    left = scale * np.eye(k) + M[:, :k, :k] + start @ start.T - mean @ cross.transpose(0, 2, 1)
    return columns, mean, (left + left.transpose(0, 2, 1)) / 2


def draw_dynamics(h: np.ndarray, s: np.ndarray, L: int, prior: Prior, g: np.random.Generator) -> Dynamics:
    """Dynamics of `L` states given path and states; those that govern no step come from the prior."""
    k = h.shape[1]
    number, M = moments(h, s, L)
    columns, mean, left = _posterior(M, prior.scale)
    freedom = k + prior.extra + number
    # Wishart by Bartlett: Q⁻¹ = C C' with C = F T, F F' = left⁻¹, T lower with chi and normal numbers
    T = np.tril(g.standard_normal((L, k, k)), -1)
    T[:, np.arange(k), np.arange(k)] = np.sqrt(g.chisquare(freedom[:, None] - np.arange(k)))
    F = np.linalg.inv(np.linalg.cholesky(left)).transpose(0, 2, 1)
    C = F @ T
    precision = C @ C.transpose(0, 2, 1)
    root_Q = np.linalg.inv(C).transpose(0, 2, 1)
    root_columns = np.linalg.inv(np.linalg.cholesky(columns))
    Ab = mean + root_Q @ g.standard_normal((L, k, k + 1)) @ root_columns
    log_det = 2 * (np.log(F[:, range(k), range(k)]) + np.log(T[:, range(k), range(k)])).sum(1)
    return Dynamics(np.ascontiguousarray(Ab[:, :, :k]), np.ascontiguousarray(Ab[:, :, k]), precision, log_det)


def log_evidence(number: np.ndarray, M: np.ndarray, first: np.ndarray, prior: Prior) -> float:
    """Log-density of a path given its states, the dynamics integrated out.

    Parameters
    ----------
    number, M : arrays (L,), (L, 2k + 1, 2k + 1)
        As of `moments`.
    first : array (k,)
        The path in bin 0.
    prior : Prior
    """
    k = len(first)
    columns, _, left = _posterior(M, prior.scale)
    nu = k + prior.extra
    per_state = (
        -0.5 * number * k * math.log(math.pi)
        + multigammaln((nu + number) / 2, k)
        - multigammaln(nu / 2, k)
        + 0.5 * nu * k * math.log(prior.scale)
        - 0.5 * (nu + number) * np.linalg.slogdet(left)[1]
        - 0.5 * k * np.linalg.slogdet(columns)[1]
    )
    return float(per_state[number > 0].sum() - 0.5 * first @ first - 0.5 * k * math.log(2 * math.pi))
