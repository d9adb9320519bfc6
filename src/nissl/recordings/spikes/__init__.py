"""Spikes: filters, communities, bi-clusters and generative models of populations of neurons."""

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
    "DiscriminativeKalmanFilter",
    "ExtendedKalmanFilterDecoder",
    "KalmanFilterDecoder",
    "NadarayaWatson",
    "UnscentedKalmanFilterDecoder",
    "angle_error",
    "normalised_rmse",
    "plot_decoded",
]
