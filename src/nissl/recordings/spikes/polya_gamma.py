"""Counts made Gaussian: Pólya-Gamma variables, and what a negative binomial needs beside them.

A count y ~ NB(dispersion r, mean λ) with ψ = log λ - log r and ω | y ~ PG(y + r, ψ) has, as a function of log λ, the likelihood of a
Gaussian observation (y - r) / (2 ω) + log r with variance 1 / ω [1]_.

References
----------
.. [1] Polson, Scott, Windle: Bayesian inference for logistic models using Pólya-Gamma latent variables. JASA (2013).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from nissl.recordings.extras import need

numba = need("numba")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled by numba when it is first called, kept on disk. Run-time checks around it, which cannot be compiled, go."""
    return numba.njit(cache=True)(inspect.unwrap(function))


TERMS = 8
"""Gamma variables of the series that are drawn one by one. The rest has 4e-5 of the variance; its first two moments are kept."""


@compiled
def mean(b, z):
    """Mean of PG(b, z): b tanh(z / 2) / (2 z)."""
    if abs(z) < 1e-4:
        return b * (0.25 - z * z / 48.0)
    return b * math.tanh(z / 2.0) / (2.0 * z)


@compiled
def variance(b, z):
    """Variance of PG(b, z): b (sinh z - z) / (4 z³ cosh²(z / 2))."""
    z = abs(z)
    if z < 0.05:
        return b * (1.0 / 24.0 - z**2 / 120.0 + 17.0 * z**4 / 13440.0)
    t = math.tanh(z / 2.0)
    return b * (2.0 * t - z * (1.0 - t * t)) / (4.0 * z**3)


@compiled
def draw(b, z, rng):
    """One draw of PG(b, z), b > 0 any real number: a sum of gamma variables whose tail is one of equal mean and variance."""
    square = (z / (2.0 * math.pi)) ** 2
    scale = 1.0 / (2.0 * math.pi**2)
    found = 0.0
    left_mean, left_variance = mean(b, z), variance(b, z)
    for k in range(TERMS):
        weight = scale / ((k + 0.5) ** 2 + square)
        found += weight * rng.standard_gamma(b)
        left_mean -= b * weight
        left_variance -= b * weight * weight
    if left_mean > 0.0 and left_variance > 0.0:
        found += left_variance / left_mean * rng.standard_gamma(left_mean * left_mean / left_variance)
    return found


@compiled
def augment(y, log_rate, r, drawn, rng, out):
    """Pólya-Gamma variables of all counts; 0 where a count is missing.

    Parameters
    ----------
    y : array (n_neurons, n_bins)
        Counts, NaN where nothing was seen.
    log_rate : array (n_neurons, n_bins)
    r : array (n_neurons,)
    drawn : bool
        False takes their means, as expectation-maximisation does.
    rng : numpy Generator
    out : array (n_neurons, n_bins)
    """
    for i in range(y.shape[0]):
        log_r = math.log(r[i])
        for t in range(y.shape[1]):
            if math.isnan(y[i, t]):
                out[i, t] = 0.0
            elif drawn:
                out[i, t] = draw(y[i, t] + r[i], log_rate[i, t] - log_r, rng)
            else:
                out[i, t] = mean(y[i, t] + r[i], log_rate[i, t] - log_r)


@compiled
def softplus(x):
    """log(1 + exp x)."""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


@compiled
def log_nb(y, log_rate, r):
    """Log-probability of a count: lgamma(y + r) - lgamma(r) - lgamma(y + 1) + y ψ - (y + r) log(1 + exp ψ)."""
    psi = log_rate - math.log(r)
    return math.lgamma(y + r) - math.lgamma(r) - math.lgamma(y + 1.0) + y * psi - (y + r) * softplus(psi)


@compiled
def log_likelihood(y, log_rate, r, out):
    """`log_nb` of each count of a matrix; 0 where it is missing."""
    for i in range(y.shape[0]):
        for t in range(y.shape[1]):
            out[i, t] = 0.0 if math.isnan(y[i, t]) else log_nb(y[i, t], log_rate[i, t], r[i])


@compiled
def _dispersion_density(u, n, pairs):
    """Log-density of u = log r, up to a constant: pairs (count, log-rate) of `n` bins, and r ~ Gamma(1, 1)."""
    r = math.exp(u)
    found = u - r - n * math.lgamma(r)
    for t in range(n):
        psi = pairs[t, 1] - u
        found += math.lgamma(pairs[t, 0] + r) + pairs[t, 0] * psi - (pairs[t, 0] + r) * softplus(psi)
    return found


@compiled
def draw_dispersion(y, log_rate, r, rng):
    """A step of slice sampling for each neuron's dispersion, its rates held; prior Gamma(1, 1). `r` is changed in place.

    The Chinese-restaurant-table step holds λ / (r + λ), which changes with r where the mean is the parameter: it is not used.
    """
    n_bins = y.shape[1]
    pairs = np.empty((n_bins, 2))
    for i in range(y.shape[0]):
        n = 0
        for t in range(n_bins):
            if not math.isnan(y[i, t]):
                pairs[n, 0], pairs[n, 1] = y[i, t], log_rate[i, t]
                n += 1
        u = math.log(r[i])
        level = _dispersion_density(u, n, pairs) - rng.standard_exponential()
        low = u - rng.random()
        high = low + 1.0
        while low > -12.0 and _dispersion_density(low, n, pairs) > level:
            low -= 1.0
        while high < 12.0 and _dispersion_density(high, n, pairs) > level:
            high += 1.0
        for _ in range(200):
            new = low + (high - low) * rng.random()
            if _dispersion_density(new, n, pairs) >= level:
                u = new
                break
            if new < u:
                low = new
            else:
                high = new
        r[i] = math.exp(u)
