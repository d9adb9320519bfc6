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
from nissl.recordings.eeg.du_in import (
    DuIN,
    DuINClassifier,
    DuINMasked,
    DuINTokenizer,
    Pretrained,
    RegionEncoder,
    Stage,
    plot_units,
)

__all__ = [
    "AugmentedCovariance",
    "AugmentedGrid",
    "ChannelRank",
    "DuIN",
    "DuINClassifier",
    "DuINMasked",
    "DuINTokenizer",
    "EmbeddingSelector",
    "Pretrained",
    "RegionEncoder",
    "Stage",
    "TimeDelay",
    "augmented_classifier",
    "plot_augmented",
    "plot_units",
]
