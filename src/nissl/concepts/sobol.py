"""Total Sobol indices: how much of the variance of an output each factor has a part in."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nissl.arguments import at_least
from nissl.errors import InputError

POINTS = ("sobol", "halton", "random")


def sobol_design(n_factors: int, n_points: int, points: str = "sobol", seed: int = 42) -> Float[Tensor, "r_1 n r"]:
    """Masks A and C_1 … C_r of the total Sobol indices in [0, 1]; C_i is A with the column i of an independent B.

    Parameters
    ----------
    n_factors : int
    n_points : int
        A power of 2 for "sobol".
    points : {"sobol", "halton", "random"}, default "sobol"
        Scrambled Sobol points; unscrambled Halton points, whose columns of large primes are collinear while points are few;
        independent ones.
    seed : int, default 42
        Of the scrambling and of "random".

    Returns
    -------
    Tensor (n_factors + 1, n_points, n_factors), float64

    Raises
    ------
    InputError
        Numbers out of range, or another kind of points.
    """
    from scipy.stats import qmc

    at_least("n_factors", n_factors, 1)
    at_least("n_design", n_points, 2)
    if points not in POINTS:
        raise InputError(f"points must be one of {', '.join(POINTS)}; got {points!r}")
    if points == "sobol":
        if n_points & (n_points - 1):
            raise InputError(f"n_design must be a power of 2 for Sobol points, got {n_points}")
        p = qmc.Sobol(2 * n_factors, seed=seed).random(n_points)  # pyright: ignore[reportCallIssue]
    elif points == "halton":
        p = qmc.Halton(2 * n_factors, scramble=False).random(n_points)
    else:
        p = np.random.default_rng(seed).random((n_points, 2 * n_factors))
    a, b = torch.from_numpy(p).split(n_factors, 1)
    own = torch.eye(n_factors, dtype=torch.bool)[:, None]
    return torch.cat([a[None], torch.where(own, b, a)])


def total_indices(y: Tensor) -> Tensor:
    """Total Sobol indices by the Jansen estimator.

    Parameters
    ----------
    y : Tensor (..., r + 1, n_points)
        Outputs for A and C_1 … C_r of `sobol_design`.

    Returns
    -------
    Tensor (..., r)
        NaN where the output does not vary beyond rounding.

    References
    ----------
    Jansen (1999). Analysis of variance designs for model output. Computer Physics Communications 117, 35-43.
    """
    y = y.double()
    a, c = y[..., :1, :], y[..., 1:, :]
    variance = a.var(-1)
    rounding = (8 * torch.finfo(torch.float32).eps * y.abs().amax((-2, -1))[..., None]).square()
    return torch.where(variance > rounding, (a - c).square().mean(-1) / (2 * variance), torch.nan)
