"""Recordings are checked once: what does not fit is said, what fits comes back as float64 in one order."""

import numpy as np
import pytest
import xarray as xr

from nissl.errors import InputError
from nissl.recordings import as_bins, as_labels, as_rate, as_trials


def test_dimensions_come_in_one_order():
    x = np.arange(24.0).reshape(2, 3, 4)
    named = xr.DataArray(x, dims=("trial", "channel", "time")).transpose("time", "trial", "channel")
    np.testing.assert_array_equal(as_trials(named), x)
    assert as_trials(x.astype("int16")).dtype == np.float64
    np.testing.assert_array_equal(as_bins(xr.DataArray(x[0].T, dims=("neuron", "bin"))), x[0])


def test_epochs_of_mne():
    mne = pytest.importorskip("mne")
    x = np.random.default_rng(0).normal(size=(3, 2, 50))
    epochs = mne.EpochsArray(x, mne.create_info(["Cz", "Pz"], 100.0, "eeg"), verbose="error")
    np.testing.assert_allclose(as_trials(epochs), x)


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (np.zeros((2, 3)), "shape"),
        (np.zeros((0, 3, 4)), "empty"),
        (np.full((2, 3, 4), np.nan), "channel concerned is number 0"),
        ([["a", "b"]], "real numbers"),
        (np.zeros((2, 3, 4), dtype=complex), "real numbers"),
        ([[[1.0, 2.0]], [[1.0]]], "real numbers"),
        (xr.DataArray(np.zeros((2, 3, 4)), dims=("a", "channel", "time")), "dimensions"),
    ],
)
def test_bad_trials(X, words):
    with pytest.raises(InputError, match=words):
        as_trials(X)


def test_other_channels_than_in_fit():
    with pytest.raises(InputError, match="5 channels, expected 6"):
        as_trials(np.zeros((2, 5, 7)), channels=6)
    with pytest.raises(InputError, match="7 times, expected 8"):
        as_trials(np.zeros((2, 5, 7)), channels=5, times=8)
    with pytest.raises(InputError, match="4 features, but it is expecting 3"):
        as_bins(np.zeros((9, 4)), neurons=3)


@pytest.mark.parametrize("y", [np.zeros((3, 1)), np.zeros(4), np.array([0.0, 1.0, np.nan])])
def test_bad_labels(y):
    with pytest.raises(InputError):
        as_labels(y, 3)


@pytest.mark.parametrize("rate", [0, -1.0, np.nan, np.inf, "128", None, True])
def test_bad_rates(rate):
    with pytest.raises(InputError, match="sampling_rate"):
        as_rate(rate)
