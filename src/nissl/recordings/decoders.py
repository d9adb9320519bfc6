"""Standard decoders of trials, for a comparison side by side: time windows, band powers, spatial filters, covariances."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

from nissl.arguments import at_least
from nissl.errors import InputError
from nissl.recordings.arrays import as_rate, as_trials
from nissl.recordings.eeg.augmented_covariance import AugmentedGrid, ChannelRank
from nissl.recordings.extras import need

BANDS: dict[str, tuple[float, float]] = {
    "delta": (1, 4), "theta": (4, 8), "alpha": (8, 13), "beta": (13, 30), "gamma": (30, 80)
}  # fmt: skip
"""Frequency bands in Hz."""
ROWS, ORDERS, LAGS = 60, (1, 2, 4), (1, 4)
"""Of the augmented covariance here: pairs of order and lag that make more rows are left out, for time."""


class TimeWindows(TransformerMixin, BaseEstimator):
    """Means of each channel in windows of time, one after the other.

    Parameters
    ----------
    n_windows : int, default 10
        At most one a sample.
    """

    def __init__(self, n_windows: int = 10) -> None:
        self.n_windows = n_windows

    def fit(self, X: Any, y: Any = None) -> TimeWindows:
        """Learn the number of channels and times of X (n_trials, n_channels, n_times)."""
        X = as_trials(X)
        at_least("n_windows", self.n_windows, 1)
        self.n_channels_, self.n_times_ = X.shape[1:]
        n = min(self.n_windows, self.n_times_)
        self.starts_ = np.linspace(0, self.n_times_, n, endpoint=False).astype(int)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Means (n_trials, n_channels * n_windows)."""
        check_is_fitted(self, "starts_")
        X = as_trials(X, channels=self.n_channels_, times=self.n_times_)
        lengths = np.diff([*self.starts_, self.n_times_])
        return (np.add.reduceat(X, self.starts_, axis=2) / lengths).reshape(len(X), -1)


class BandPower(TransformerMixin, BaseEstimator):
    """Logarithm of the power of each channel in frequency bands, by the Hann-windowed periodogram.

    Parameters
    ----------
    sampling_rate : float
        In Hz.
    bands : mapping of name to (low, high), optional
        In Hz; `BANDS` by default. Bands that hold no frequency of the trials are left out.

    Attributes
    ----------
    bands_ : dict
        Those that are used.
    """

    def __init__(self, sampling_rate: float, bands: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.sampling_rate = sampling_rate
        self.bands = bands

    def fit(self, X: Any, y: Any = None) -> BandPower:
        """Learn which bands trials (n_trials, n_channels, n_times) have."""
        X = as_trials(X)
        rate = as_rate(self.sampling_rate)
        self.n_channels_, self.n_times_ = X.shape[1:]
        f = np.fft.rfftfreq(self.n_times_, 1 / rate)
        held = {k: (f >= low) & (f < high) for k, (low, high) in (BANDS if self.bands is None else self.bands).items()}
        self.bands_ = {k: v for k, v in held.items() if v.any()}
        if not self.bands_:
            raise InputError(f"trials of {self.n_times_ / rate:g} s at {rate:g} Hz hold no frequency of any band")
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Logarithms (n_trials, n_channels * n_bands)."""
        check_is_fitted(self, "bands_")
        X = as_trials(X, channels=self.n_channels_, times=self.n_times_)
        window = np.hanning(X.shape[2] + 2)[1:-1]
        spectrum = np.abs(np.fft.rfft((X - X.mean(2, keepdims=True)) * window)) ** 2
        power = np.stack([spectrum[:, :, k].mean(2) for k in self.bands_.values()], 2)
        # A band without any power, as in a covered channel, has the least that a float holds beside the others.
        least = np.finfo(float).eps * max(float(power.max()), np.finfo(float).tiny)
        return np.log(np.maximum(power, least)).reshape(len(X), -1)


def standard_decoders(sampling_rate: float, n_channels: int, n_times: int, seed: int = 0) -> dict[str, Any]:
    """Decoders of trials by name, not fitted.

    Parameters
    ----------
    sampling_rate : float
        In Hz.
    n_channels, n_times : int
        Of the trials.
    seed : int, default 0

    Returns
    -------
    dict of name to scikit-learn classifier
        ``linear`` (logistic regression on every sample), ``time windows`` (shrinkage discriminant on means), ``band power``
        (the same on logarithms of power), ``CSP`` (spatial filters), ``tangent space`` (covariances and logistic regression),
        ``augmented covariance`` (nested grid).
    """
    rate = as_rate(sampling_rate)

    def lda() -> Any:
        return LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")

    estimation, filters, tangent = (need(f"pyriemann.{m}") for m in ("estimation", "spatialfilters", "tangentspace"))
    orders = [p for p in ORDERS if p == 1 or p * n_channels <= ROWS]
    lags = [k for k in LAGS if (max(orders) - 1) * k <= n_times // 4] or [1]
    return {
        "linear": make_pipeline(_Flat(), StandardScaler(), LogisticRegression(C=0.01, max_iter=1000)),
        "time windows": make_pipeline(TimeWindows(), lda()),
        "band power": make_pipeline(BandPower(rate), lda()),
        "CSP": make_pipeline(
            ChannelRank(), estimation.Covariances("oas"), filters.CSP(nfilter=min(6, n_channels)), lda()
        ),
        "tangent space": make_pipeline(
            ChannelRank(), estimation.Covariances("oas"), tangent.TangentSpace(), LogisticRegression(max_iter=1000),
        ),
        "augmented covariance": AugmentedGrid(orders=orders, lags=lags, C=[1.0], kernels=["linear"], random_state=seed),
    }  # fmt: skip


class _Flat(TransformerMixin, BaseEstimator):
    """Every sample of every channel as a feature."""

    def fit(self, X: Any, y: Any = None) -> _Flat:
        """Learn the number of channels and times."""
        self.shape_ = as_trials(X).shape[1:]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Trials as rows."""
        check_is_fitted(self, "shape_")
        X = as_trials(X, channels=self.shape_[0], times=self.shape_[1])
        return X.reshape(len(X), -1)
