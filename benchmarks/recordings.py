"""Decoders and factorisations of recordings beside filterpy and tensorly."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from torch import nn

from benchmarks.measure import Case, relative
from benchmarks.subject import Subject
from nissl.recordings.simulate import biclusters, mixed_states
from nissl.recordings.spikes import DiscriminativeKalmanFilter, KalmanFilterDecoder, factorise, switching
from nissl.recordings.spikes.gibbs import Chain
from nissl.recordings.state_space import kalman_filter

TRIALS, BINS, NEURONS, STATES = 10, 100, 100, 4
SHAPE, SWEEPS = (100, 5, 1000), 100


def kalman(s: Subject) -> Case:
    """Filtering of trials with known matrices, and the latency of one online step."""
    from filterpy.kalman import KalmanFilter

    g = np.random.default_rng(0)
    A = 0.95 * np.eye(STATES) - 0.05
    Gamma, H = np.eye(STATES) - A @ A.T, g.normal(size=(NEURONS, STATES)) * 0.5
    Lambda = np.diag(g.uniform(1, 5, NEURONS))
    x = g.normal(size=(TRIALS, BINS, NEURONS)) + g.normal(size=(TRIALS, BINS, STATES)) @ H.T

    def ours() -> Any:
        return kalman_filter(x, A, Gamma, H, Lambda, np.zeros(STATES), np.eye(STATES))

    def theirs() -> tuple[np.ndarray, np.ndarray]:
        means, covs = np.empty((TRIALS, BINS, STATES)), np.empty((TRIALS, BINS, STATES, STATES))
        for i in range(TRIALS):
            peer = KalmanFilter(dim_x=STATES, dim_z=NEURONS)
            peer.F, peer.Q, peer.H, peer.R = A, Gamma, H, Lambda
            peer.x, peer.P = np.zeros((STATES, 1)), np.eye(STATES)
            for t in range(BINS):
                if t:
                    peer.predict()
                peer.update(x[i, t][:, None])
                means[i, t], covs[i, t] = peer.x[:, 0], peer.P
        return means, covs

    def differences() -> dict[str, tuple[float, float]]:
        found, (means, covs) = ours(), theirs()
        return {"means": (relative(found.means, means), 1e-9), "covariances": (relative(found.covs, covs), 1e-9)}

    def steps() -> dict[str, Any]:
        planted = mixed_states(1000, NEURONS, STATES, seed=0)
        found = {}
        for decoder in (KalmanFilterDecoder(), DiscriminativeKalmanFilter(robust=True)):
            decoder.fit(planted.X, planted.Z)
            took = []
            for row in planted.X[:300]:
                start = time.process_time()
                decoder.step(row)
                took.append(1000 * (time.process_time() - start))
            found[type(decoder).__name__] = f"{np.median(took):.3f}, 95 %: {np.quantile(took, 0.95):.3f}"
        return {"milliseconds of the processor a step, median": found}

    return Case(
        "Kalman filter", "filterpy", 1.0, {"nissl": ours, "filterpy": theirs}, differences, nn.Identity(),
        note=f"{TRIALS} trials of {BINS} bins, {NEURONS} neurons, {STATES} states; filterpy takes one trial after the other",
        extra=steps,
    )  # fmt: skip


def factorisation(s: Subject) -> Case:
    """Non-negative factors of a whole tensor from one start, as many sweeps on both sides."""
    import tensorly
    from tensorly.decomposition import non_negative_parafac_hals

    g = np.random.default_rng(0)
    planted = [np.abs(g.normal(size=(n, 3))) * (g.random((n, 3)) < 0.5) + 0.01 for n in SHAPE]
    tensor = np.einsum("tr,wr,pr->twp", *planted)
    tensor = np.maximum(tensor + 0.05 * tensor.std() * g.normal(size=SHAPE), 0)
    start = [g.random((n, 3)) for n in SHAPE]

    def ours() -> float:
        return float(factorise(tensor, 3, start=start, max_iter=SWEEPS, tol=0.0).losses[-1])

    def theirs() -> float:
        peer = tensorly.cp_tensor.CPTensor((np.ones(3), [f.copy() for f in start]))
        found = non_negative_parafac_hals(tensor, 3, n_iter_max=SWEEPS, init=peer, tol=0.0)
        return float(np.square(tensor - tensorly.cp_to_tensor(found)).sum())

    return Case(
        "non-negative factors", "tensorly", 1.0, {"nissl": ours, "tensorly": theirs},
        lambda: {"loss": (relative(ours(), theirs()), 1e-3)}, nn.Identity(),
        note=f"{SHAPE}, 3 components, {SWEEPS} sweeps; tensorly repeats the update of a mode several times in each sweep",
    )  # fmt: skip


def bicluster_path(s: Subject) -> Case:
    """Mean of all paths given Pólya-Gamma variables, beside a banded solver; and how the time of a sweep grows with the data."""
    from scipy.linalg import solveh_banded

    T, k, L = 1000, 6, 2
    g = np.random.default_rng(0)
    A = 0.9 * np.eye(k) + 0.02 * g.standard_normal((L, k, k))
    b, P = 0.1 * g.standard_normal((L, k)), np.broadcast_to(100 * np.eye(k), (L, k, k)).copy()
    states = np.arange(T) // 100 % L
    y, omega = g.poisson(2.0, (30, T)).astype(float), g.gamma(2.0, 0.5, (30, T))
    d, c, r, z = g.standard_normal(30), g.standard_normal((30, 1)), np.full(30, 5.0), np.arange(30) % 3

    def blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        D, E, e = np.zeros((T, k, k)), np.zeros((T, k, k)), np.zeros((T, k))
        switching.add_dynamics(A, b, P, states, D, E, e)
        switching.add_counts(y, omega, d, c, r, z, D, e)
        return D, E, e

    D, E, e = blocks()
    band = np.zeros((2 * k, T * k))
    for u in range(k):
        for v in range(u + 1):
            band[u - v, v::k] = D[:, u, v]
        for v in range(k):
            band[k + u - v, v : (T - 1) * k : k] = E[1:, u, v]

    def ours() -> np.ndarray:
        return switching.draw_path(D.copy(), E.copy(), e, np.zeros((T, k)))

    def theirs() -> np.ndarray:
        return solveh_banded(band, e.ravel(), lower=True).reshape(T, k)

    def growth() -> dict[str, Any]:
        def seconds(n_neurons: int, n_bins: int) -> float:
            world = biclusters(n_neurons, n_bins, seed=0)
            chain = Chain(world.X.T.copy(), 1, 2, 4, np.random.default_rng(0))
            chain.start(world.neuron_labels)
            took = []
            for _ in range(6):
                start = time.process_time()
                chain.sweep()
                took.append(time.process_time() - start)
            return min(took[1:])

        few, more_neurons, more_bins = seconds(24, 500), seconds(96, 500), seconds(24, 2000)
        return {"exponent of a sweep's time": {"neurons": f"{np.log(more_neurons / few) / np.log(4):.2f}",
                                               "bins": f"{np.log(more_bins / few) / np.log(4):.2f}"}}  # fmt: skip

    return Case(
        "paths of bi-clusters", "scipy", 1.0, {"nissl": ours, "scipy": theirs},
        lambda: {"mean path": (relative(ours(), theirs()), 1e-9)}, nn.Identity(),
        note=f"{T} bins, {k} dimensions; scipy's banded Cholesky gives no draw", extra=growth,
    )  # fmt: skip
