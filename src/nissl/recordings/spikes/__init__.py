"""Spikes: filters, communities, bi-clusters and generative models of populations of neurons."""

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

__all__ = [
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
    "normalised_rmse",
    "plot_decoded",
    "rank_curve",
]
