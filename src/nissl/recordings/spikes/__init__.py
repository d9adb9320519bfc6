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
from nissl.recordings.spikes.partitions import max_pear, similarity

__all__ = [
    "BiClustering",
    "DifferentialAffinity",
    "DiscriminativeKalmanFilter",
    "DynamicConnectome",
    "ExtendedKalmanFilterDecoder",
    "Factors",
    "KalmanFilterDecoder",
    "NadarayaWatson",
    "UnscentedKalmanFilterDecoder",
    "WeightedSBM",
    "angle_error",
    "factorise",
    "max_pear",
    "normalised_rmse",
    "plot_biclusters",
    "plot_decoded",
    "rank_curve",
    "similarity",
]
