"""What a recording is in memory: arrays of trials, or of bins, that are checked once and in one way.

EEG, MEG and intracranial signals: ``(n_trials, n_channels, n_times)``. Spikes: ``(n_bins, n_neurons)``. Estimators take numpy arrays
and hand back numpy arrays, as scikit-learn's do; `nissl.recordings.io` reads files to ``xarray.DataArray`` with the dimensions
``("trial", "channel", "time")`` or ``("bin", "neuron")``, names as coordinates and, in ``attrs``, ``sampling_rate`` (Hz) and ``units``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy.sparse import issparse

from nissl.arguments import is_number
from nissl.errors import InputError

TRIALS = ("trial", "channel", "time")
BINS = ("bin", "neuron")


def as_trials(X: Any, name: str = "X", *, channels: int | None = None, times: int | None = None) -> np.ndarray:
    """Signals of trials, checked.

    Parameters
    ----------
    X : array (n_trials, n_channels, n_times), DataArray with the dimensions of `TRIALS` in any order, or MNE Epochs
    name : str
        What errors call it.
    channels, times : int, optional
        How many there must be: those of the data an estimator was fitted on.

    Returns
    -------
    array of float64 (n_trials, n_channels, n_times)

    Raises
    ------
    InputError
        Another shape, no trial, no numbers, NaN or infinity; names the first channel concerned.
    """
    if hasattr(X, "get_data") and hasattr(X, "ch_names"):
        X = X.get_data()
    found = _numbers(X, name, TRIALS, "(n_trials, n_channels, n_times)")
    for what, n, wanted in (("channels", found.shape[1], channels), ("times", found.shape[2], times)):
        if wanted is not None and n != wanted:
            raise InputError(f"{name} has {n} {what}, expected {wanted} as in the data of fit")
    return found


def as_bins(X: Any, name: str = "X", *, neurons: int | None = None, missing: bool = False) -> np.ndarray:
    """Activity in bins of time, checked: ``(n_bins, n_neurons)``, float64; errors as of `as_trials`.

    NaN is let through where `missing` is True: nothing was recorded there. Infinity never is.
    """
    found = _numbers(X, name, BINS, "(n_bins, n_neurons)", missing)
    if neurons is not None and found.shape[1] != neurons:
        raise InputError(
            f"{name} has {found.shape[1]} features, but it is expecting {neurons} features as input, as in fit"
        )
    return found


def as_labels(y: Any, n: int, name: str = "y") -> np.ndarray:
    """Labels, one a trial: a flat array of `n` numbers or names without a missing one."""
    found = np.asarray(y)
    if found.shape != (n,):
        raise InputError(f"{name} must hold one label for each of {n} trials, got an array of shape {found.shape}")
    if found.dtype.kind == "f" and not np.isfinite(found).all():
        raise InputError(f"{name} holds NaN or infinity")
    return found


def as_rate(sampling_rate: Any, name: str = "sampling_rate") -> float:
    """A sampling rate in Hz: a finite number above zero."""
    if not is_number(sampling_rate) or not 0 < float(sampling_rate) < np.inf:
        raise InputError(f"{name} must be a number of Hz above 0, got {sampling_rate!r}")
    return float(sampling_rate)


def _numbers(X: Any, name: str, dims: tuple[str, ...], shape: str, missing: bool = False) -> np.ndarray:
    if isinstance(X, xr.DataArray):
        if set(X.dims) != set(dims):
            raise InputError(f"{name} has the dimensions {X.dims}, expected {dims}")
        X = X.transpose(*dims)
    try:
        if issparse(X):
            raise TypeError("sparse arrays are not taken; use toarray()")
        found = np.asarray(X)
        if found.dtype.kind not in "fiub":
            raise TypeError(
                f"{'Complex data not supported: ' if found.dtype.kind == 'c' else ''}its type is {found.dtype}"
            )
        found = found.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array of real numbers {shape}, got {type(X).__name__}: {error}") from error
    if found.ndim != len(dims):
        raise InputError(f"{name} must have the shape {shape}, got {found.shape}. Reshape your data.")
    if not found.size:
        what = (
            f"0 feature(s) (shape={found.shape}) while a minimum of 1 is required."
            if len(found)
            else f"shape {found.shape}"
        )
        raise InputError(f"{name} is empty: {what}")
    wrong = np.isinf(found) if missing else ~np.isfinite(found)
    if wrong.any():
        places, what = np.argwhere(wrong), "infinity" if missing else "NaN or infinity"
        raise InputError(
            f"{name} holds {what} at {len(places)} places; the first {dims[1]} concerned is number {places[0][1]}"
        )
    return found
