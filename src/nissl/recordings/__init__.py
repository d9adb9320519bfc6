"""What a recording says: signals of trials and spikes in bins, decoders and encoders of them as scikit-learn estimators."""

from nissl.recordings.arrays import as_bins, as_labels, as_rate, as_trials

__all__ = ["as_bins", "as_labels", "as_rate", "as_trials"]
