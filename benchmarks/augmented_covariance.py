"""Augmented covariances beside pyRiemann's covariances of delayed copies."""

from __future__ import annotations

import numpy as np
from torch import nn

from benchmarks.measure import Case, relative
from benchmarks.subject import Subject
from nissl.recordings.eeg.augmented_covariance import assemble, autocovariances

TRIALS, CHANNELS, TIMES, ORDER = 60, 16, 500, 6


def augmented_covariance(s: Subject) -> Case:
    """The same matrices: pyRiemann rolls trials around their ends, so they end in zeros here; its blocks run backwards."""
    from pyriemann.estimation import TimeDelayCovariances

    X = np.random.default_rng(0).standard_normal((TRIALS, CHANNELS, TIMES))
    X[:, :, -ORDER:] = 0
    X[:, :, :-ORDER] -= X[:, :, :-ORDER].mean(2, keepdims=True)

    def ours() -> np.ndarray:
        return assemble(autocovariances(X, range(ORDER)))

    def theirs() -> np.ndarray:
        return TimeDelayCovariances(delays=ORDER, estimator="scm").transform(X)

    def differences() -> dict[str, tuple[float, float]]:
        shape = (TRIALS, ORDER, CHANNELS, ORDER, CHANNELS)
        return {"matrices": (relative(ours().reshape(shape), theirs().reshape(shape)[:, ::-1, :, ::-1]), 1e-10)}

    return Case(
        "augmented covariances", "pyriemann", 1.0, {"nissl": ours, "pyriemann": theirs}, differences, nn.Identity(),
        note="nissl: the exact block-Toeplitz variant; trials end in zeros and have mean 0, where both are the same",
    )  # fmt: skip
