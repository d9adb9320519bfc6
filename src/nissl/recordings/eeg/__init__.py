"""EEG, MEG and intracranial signals: covariances, artefacts, discrete codes."""

from nissl.recordings.eeg.augmented_covariance import (
    AugmentedCovariance,
    AugmentedGrid,
    ChannelRank,
    EmbeddingSelector,
    TimeDelay,
    augmented_classifier,
    plot_augmented,
)

__all__ = [
    "AugmentedCovariance",
    "AugmentedGrid",
    "ChannelRank",
    "EmbeddingSelector",
    "TimeDelay",
    "augmented_classifier",
    "plot_augmented",
]
