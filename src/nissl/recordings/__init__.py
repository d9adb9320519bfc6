"""What a recording says: signals of trials and spikes in bins, decoders and encoders of them as scikit-learn estimators."""

from nissl.recordings.arrays import as_bins, as_labels, as_rate, as_trials
from nissl.recordings.io import (
    epochs_from,
    inspect,
    read_epochs,
    read_npz,
    read_raw,
    save_npz,
    signals,
    spike_counts,
    spike_times,
    to_epochs,
    to_raw,
)

__all__ = [
    "as_bins",
    "as_labels",
    "as_rate",
    "as_trials",
    "epochs_from",
    "inspect",
    "read_epochs",
    "read_npz",
    "read_raw",
    "save_npz",
    "signals",
    "spike_counts",
    "spike_times",
    "to_epochs",
    "to_raw",
]
