"""Spikes: filters, communities, bi-clusters and generative models of populations of neurons."""

from nissl.recordings.spikes.bicluster import BiClustering, plot_biclusters
from nissl.recordings.spikes.connectome import (
    DifferentialAffinity,
    DynamicConnectome,
    Factors,
    WeightedSBM,
    factorise,
    rank_curve,
)
from nissl.recordings.spikes.filters import (
    DiscriminativeKalmanFilter,
    ExtendedKalmanFilterDecoder,
    KalmanFilterDecoder,
    NadarayaWatson,
    UnscentedKalmanFilterDecoder,
    angle_error,
    normalised_rmse,
    plot_decoded,
)
from nissl.recordings.spikes.neuroformer import Neuroformer, Written, contrastive_loss
from nissl.recordings.spikes.neuroformer_decoder import NeuroformerDecoder, plot_connectivity
from nissl.recordings.spikes.partitions import max_pear, similarity
from nissl.recordings.spikes.tokens import SpikeTokenizer, Stream, Windows, spike_agreement, spike_table

__all__ = [
    "BiClustering",
    "DifferentialAffinity",
    "DiscriminativeKalmanFilter",
    "DynamicConnectome",
    "ExtendedKalmanFilterDecoder",
    "Factors",
    "KalmanFilterDecoder",
    "NadarayaWatson",
    "Neuroformer",
    "NeuroformerDecoder",
    "SpikeTokenizer",
    "Stream",
    "UnscentedKalmanFilterDecoder",
    "WeightedSBM",
    "Windows",
    "Written",
    "angle_error",
    "contrastive_loss",
    "factorise",
    "max_pear",
    "normalised_rmse",
    "plot_biclusters",
    "plot_connectivity",
    "plot_decoded",
    "rank_curve",
    "similarity",
    "spike_agreement",
    "spike_table",
]
