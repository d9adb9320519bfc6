"""Semi-NMF beside its iteration written plainly in numpy, as scikit-learn writes multiplicative updates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.measure import Case, relative
from benchmarks.subject import Subject
from nissl.concepts import SemiNMF

TOKENS, NEURONS, FEATURES = 4096, 1536, 100
"""A layer of SmolLM2-135M and about 400 sentences; the paper's number of features."""
SPARSITY = 0.01
ITERATIONS = 20
SEED = 42


def activations() -> np.ndarray:
    """Sparse features used by few tokens each, and noise."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((FEATURES, NEURONS)) * (rng.random((FEATURES, NEURONS)) < 2 * SPARSITY)
    weights = rng.exponential(size=(TOKENS, FEATURES)) * (rng.random((TOKENS, FEATURES)) < 0.05)
    return (weights @ features + 0.2 * rng.standard_normal((TOKENS, NEURONS))).astype(np.float32)


def plainly(a: np.ndarray, losses: bool = True) -> list[float]:
    """Losses of the iteration as it stands in the paper; only the last one where `losses` is False."""
    n, d = a.shape
    keep = math.ceil(SPARSITY * d)
    start = torch.rand(n, FEATURES, generator=torch.Generator().manual_seed(SEED)).numpy()
    g = np.maximum(start, np.float32(1e-6))
    epsilon = np.float32(1e-6 * np.mean(a**2))
    found = []
    for i in range(ITERATIONS):
        z = np.linalg.solve(g.T @ g + 1e-6 * np.eye(FEATURES, dtype=np.float32), g.T @ a)
        least = np.partition(np.abs(z), d - keep, axis=1)[:, d - keep, None]
        z[np.abs(z) < least] = 0
        c = np.maximum(np.linalg.norm(g, axis=0), 1e-8)
        g, z = g / c, z * c[:, None]
        p, q = a @ z.T, z @ z.T
        above = np.maximum(p, 0) + g @ np.maximum(-q, 0)
        below = np.maximum(-p, 0) + g @ np.maximum(q, 0)
        g = g * np.sqrt(above / (below + epsilon))
        if losses or i == ITERATIONS - 1:
            found.append(float(np.square(a - g @ z).sum(dtype=np.float64)))
    return found


def snmf(s: Subject) -> Case:
    a = activations()
    model = SemiNMF(
        FEATURES, sparsity=SPARSITY, max_iter=ITERATIONS, tol=0.0, patience=ITERATIONS, reseed=False, random_state=SEED,
        progress=False,
    )  # fmt: skip

    def differences() -> dict[str, tuple[float, float]]:
        ours, theirs = np.array(model.fit(a).loss_curve_), np.array(plainly(a))
        # float32 sums in another order, and a neuron that is just in or just out of a feature
        return {"loss of every iteration": (relative(ours / theirs, np.ones(ITERATIONS)), 1e-3)}

    def curve() -> dict[str, Any]:
        return {"loss": {"nissl": model.loss_curve_[-1], "numpy": plainly(a, losses=False)[-1]}}

    return Case(
        "semi-NMF", "numpy", 0.5,
        {"nissl": lambda: model.fit(a), "numpy": lambda: plainly(a),
         "numpy, one loss": lambda: plainly(a, losses=False)},
        differences, nn.Identity(),
        note="no network runs; nissl takes the loss from what it has, numpy from the residual; both in every iteration",
        extra=curve,
    )  # fmt: skip
