"""Simulated recordings whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import comb

import numpy as np
import xarray as xr
from scipy.special import xlogy

from nissl.arguments import at_least, is_number, is_whole
from nissl.errors import InputError
from nissl.recordings.arrays import as_bins


@dataclass(frozen=True, eq=False)
class DelayedSources:
    """Trials of two classes that differ in the direction of a delayed influence.

    Attributes
    ----------
    X : array (n_trials, n_channels, n_times)
    y : array of int (n_trials,)
        Class 0: source 0 receives source 1, `delay` samples late; class 1: the reverse.
    mixing : array (n_channels, n_channels)
        From sources to channels, the same in all trials.
    delay : int
        In samples.
    """

    X: np.ndarray
    y: np.ndarray
    mixing: np.ndarray
    delay: int


def delayed_sources(
    n_trials: int = 120, n_channels: int = 4, n_times: int = 384, *, delay: int = 3, strength: float = 0.2, seed: int = 0
) -> DelayedSources:  # fmt: skip
    """White sources in which one of two receives the other late; the covariance at delay 0 is the same in both classes.

    Parameters
    ----------
    n_trials, n_channels, n_times : int
        Classes alternate.
    delay : int, default 3
        In samples.
    strength : float, default 0.2
        Weight of the source that is received, before scaling to unit variance.
    seed : int, default 0
    """
    for name, value, low in (
        ("n_trials", n_trials, 2),
        ("n_channels", n_channels, 2),
        ("n_times", n_times, 2),
        ("delay", delay, 1),
    ):
        at_least(name, value, low)
    if not is_number(strength):
        raise InputError(f"strength must be a number, got {strength!r}")
    g = np.random.default_rng(seed)
    y = np.arange(n_trials) % 2
    white = g.standard_normal((n_trials, n_channels, n_times + delay))
    sources = white[:, :, delay:].copy()
    trial = np.arange(n_trials)
    sources[trial, y] = (sources[trial, y] + strength * white[trial, 1 - y, :n_times]) / np.sqrt(1 + strength**2)
    mixing = g.standard_normal((n_channels, n_channels))
    return DelayedSources(mixing @ sources, y, mixing, delay)


@dataclass(frozen=True, eq=False)
class MixedStates:
    """A moving state whose observations have no mean that depends on it: a coin turns their sign round in every bin.

    Attributes
    ----------
    X : array (n_bins, n_neurons)
    Z : array (n_bins, d)
        States: z_t = A z_{t-1} + N(0, Gamma), z_t ~ N(0, 1).
    A, Gamma : array (d, d)
    B : array (n_neurons, d)
        x = l B z + noise, with l = 1 or -1.
    noise : (float, float)
        Variances of the noise for l = 1 and l = -1; that they differ is all that tells the two apart.
    """

    X: np.ndarray
    Z: np.ndarray
    A: np.ndarray
    Gamma: np.ndarray
    B: np.ndarray
    noise: tuple[float, float]

    def posterior(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean (n, d) and covariance (n, d, d) of the state given one observation each, without the bins before."""
        n, d = self.B.shape
        means, covs, logs = [], [], []
        for sign, v in zip((1, -1), self.noise, strict=True):
            C = np.linalg.inv(np.eye(d) + self.B.T @ self.B / v)
            V = self.B @ self.B.T + v * np.eye(n)
            means.append(sign * X @ self.B @ C / v)
            covs.append(C)
            logs.append(-(np.einsum("ij,ij->i", X, np.linalg.solve(V, X.T).T) + np.linalg.slogdet(V)[1]) / 2)
        w = np.exp(logs - np.max(logs, axis=0))
        w /= w.sum(0)
        m = np.stack(means)
        f = np.einsum("li,lid->id", w, m)
        second = np.einsum("li,ljk->ijk", w, np.stack(covs)) + np.einsum("li,lij,lik->ijk", w, m, m)
        return f, second - f[:, :, None] * f[:, None, :]


def mixed_states(
    n_bins: int = 1500, n_neurons: int = 100, n_dims: int = 4, *, noise: tuple[float, float] = (1.0, 5.0), seed: int = 0
) -> MixedStates:
    """Observations that a Kalman filter cannot use, since E[x z'] = 0, and a regression of z on x can.

    Parameters
    ----------
    n_bins, n_neurons, n_dims : int
    noise : (float, float), default (1, 5)
        Variances for the two signs.
    seed : int, default 0

    References
    ----------
    Burkhart et al. (2020). The discriminative Kalman filter. Neural Computation 32, 969-1017.
    """
    for name, value in (("n_bins", n_bins), ("n_neurons", n_neurons), ("n_dims", n_dims)):
        at_least(name, value, 1)
    if len(noise) != 2 or not all(is_number(v) and v > 0 for v in noise):
        raise InputError(f"noise must be two variances above 0, got {noise!r}")
    g = np.random.default_rng(seed)
    A = 0.95 * np.eye(n_dims) - 0.05
    Gamma = np.eye(n_dims) - A @ A.T
    moves = g.multivariate_normal(np.zeros(n_dims), Gamma, n_bins, method="cholesky")
    Z = np.empty((n_bins, n_dims))
    Z[0] = g.standard_normal(n_dims)
    for t in range(1, n_bins):
        Z[t] = A @ Z[t - 1] + moves[t]
    B = g.normal(0, 0.5, (n_neurons, n_dims))
    positive = g.random(n_bins) < 0.5
    spread = np.sqrt(np.where(positive, *noise))
    X = np.where(positive, 1, -1)[:, None] * (Z @ B.T) + spread[:, None] * g.standard_normal((n_bins, n_neurons))
    return MixedStates(X, Z, A, Gamma, B, noise)


@dataclass(frozen=True, eq=False)
class BiClusters:
    """Counts of neurons in groups that one path drives, in bins in states of one dynamics.

    Attributes
    ----------
    X : array (n_bins, n_neurons)
        Negative binomial counts.
    log_rate : array (n_bins, n_neurons)
    neuron_labels, state_labels : arrays of int (n_neurons,), (n_bins,)
    """

    X: np.ndarray
    log_rate: np.ndarray
    neuron_labels: np.ndarray
    state_labels: np.ndarray


def biclusters(
    n_neurons: int = 24,
    n_bins: int = 300,
    n_clusters: int = 3,
    *,
    segment: int = 50,
    dispersion: float = 10.0,
    step: float = 0.01,
    rate: float = 1.0,
    seed: int = 0,
) -> BiClusters:
    """Two states in turn: in one, every group's pair (mu, x) rotates slowly and grows a little; in the other it is white.

    Parameters
    ----------
    n_neurons, n_bins, n_clusters : int
    segment : int, default 50
        Bins until the state changes.
    dispersion : float, default 10.0
        Of the negative binomial counts: variance = mean (1 + mean / dispersion).
    step : float, default 0.01
        Variance of a step of a path.
    rate : float, default 1.0
        Median count of a bin.
    seed : int, default 0

    See Also
    --------
    nissl.recordings.spikes.BiClustering
    """
    for name, value, low in (("n_neurons", n_neurons, 1), ("n_bins", n_bins, 2), ("n_clusters", n_clusters, 1),
                             ("segment", segment, 1)):  # fmt: skip
        at_least(name, value, low)
    for name, number in (("dispersion", dispersion), ("step", step), ("rate", rate)):
        if not is_number(number) or number <= 0:
            raise InputError(f"{name} must be a number above 0, got {number!r}")
    g = np.random.default_rng(seed)
    state = np.arange(n_bins) // segment % 2
    angle = np.pi / 20
    turn = 1.01 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    A = np.stack([turn, 0.01 * np.eye(2)])
    path = np.empty((n_bins, n_clusters, 2))
    path[0] = np.sqrt(step) * g.standard_normal((n_clusters, 2))
    for t in range(1, n_bins):
        path[t] = path[t - 1] @ A[state[t]].T + np.sqrt(step) * g.standard_normal((n_clusters, 2))
    path -= path.mean(0)
    group = np.arange(n_neurons) * n_clusters // n_neurons
    d, c = np.log(rate) + 0.5 * g.standard_normal(n_neurons), 0.5 * g.standard_normal(n_neurons)
    log_rate = d + path[:, group, 0] + c * path[:, group, 1]
    X = g.poisson(g.gamma(dispersion, np.exp(log_rate) / dispersion)).astype(np.float64)
    return BiClusters(X, log_rate, group, state)


# ---------------------------------------------------------------- what several simulators share

ELECTRODES = {  # seen from above, nose up, in units of the radius of the head
    "F7": (-0.73, 0.53), "F3": (-0.4, 0.52), "Fz": (0.0, 0.5), "F4": (0.4, 0.52), "F8": (0.73, 0.53),
    "FC3": (-0.43, 0.27), "FCz": (0.0, 0.25), "FC4": (0.43, 0.27),
    "T7": (-0.9, 0.0), "C3": (-0.45, 0.0), "Cz": (0.0, 0.0), "C4": (0.45, 0.0), "T8": (0.9, 0.0),
    "CP3": (-0.43, -0.27), "CPz": (0.0, -0.25), "CP4": (0.43, -0.27),
    "P7": (-0.73, -0.53), "P3": (-0.4, -0.52), "Pz": (0.0, -0.5), "P4": (0.4, -0.52), "P8": (0.73, -0.53),
    "O1": (-0.28, -0.86), "O2": (0.28, -0.86),
}  # fmt: skip
"""Electrodes of the 10-20 system that simulated EEG can have, with places on a flat head."""


def _whole(low: int = 1, **values: object) -> None:
    for name, value in values.items():
        at_least(name, value, low)


def _above_zero(**values: object) -> None:
    for name, value in values.items():
        if not is_number(value) or value <= 0:  # pyright: ignore[reportOperatorIssue]
            raise InputError(f"{name} must be a number above 0, got {value!r}")


def _share(**values: object) -> None:
    for name, value in values.items():
        if not is_number(value) or not 0 <= value <= 1:  # pyright: ignore[reportOperatorIssue]
            raise InputError(f"{name} must be a number from 0 to 1, got {value!r}")


def _places(channels: Sequence[str]) -> np.ndarray:
    unknown = [c for c in channels if c not in ELECTRODES]
    if unknown or not len(channels) or len(set(channels)) < len(channels):
        raise InputError(f"channels must be different names out of {', '.join(ELECTRODES)}; got {list(channels)}")
    return np.array([ELECTRODES[c] for c in channels])


def _around(places: np.ndarray, at: str, width: float = 0.45) -> np.ndarray:
    """Weights (n_channels,) of a source under an electrode: 1 there, falling as a Gaussian of the distance."""
    return np.exp(-((places - ELECTRODES[at]) ** 2).sum(1) / (2 * width**2))


def _coloured(g: np.random.Generator, shape: tuple[int, ...], power: np.ndarray) -> np.ndarray:
    """Gaussian noise of variance 1 whose power spectrum over ``rfftfreq(shape[-1])`` is proportional to `power`."""
    n = shape[-1]
    twice = np.full(len(power), 2.0)  # all frequencies but the first, and the last of an even number, count twice
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    gain = np.sqrt(power * n / (twice * power).sum())
    return np.fft.irfft(np.fft.rfft(g.standard_normal(shape)) * gain, n)


def _falling(n_times: int, exponent: float = 1.0) -> np.ndarray:
    """Power 1 / f^exponent over the frequencies of `_coloured`; none at 0."""
    f = np.fft.rfftfreq(n_times)
    return np.concatenate([[0.0], f[1:] ** -exponent])


# ---------------------------------------------------------------- signals


@dataclass(frozen=True, eq=False)
class PlantedUnits:
    """Trials written in a few waveforms, whose order tells the class.

    Attributes
    ----------
    X : array (n_trials, n_channels, n_times)
    y : array of int (n_trials,)
        0 to 5: the order in which the units follow each other.
    units : array of int (n_trials, n_patches)
        The unit of each patch, 0 to 3.
    waveforms : array (4, patch)
    patterns : array (4, n_informative)
        Weights of each unit on the first channels; the others hold noise only.
    rings : array of int (6, 4)
        ``rings[y, unit]`` is the unit that follows most often in class y.
    """

    X: np.ndarray
    y: np.ndarray
    units: np.ndarray
    waveforms: np.ndarray
    patterns: np.ndarray
    rings: np.ndarray


def planted_units(
    n_trials: int = 600, n_channels: int = 10, n_patches: int = 30, *, patch: int = 20, n_informative: int = 4,
    amplitude: float = 1.5, follow: float = 0.9, sampling_rate: float = 200.0, seed: int = 0,
) -> PlantedUnits:  # fmt: skip
    """Four units, one in each patch, each a fixed waveform times a fixed pattern of channels, in noise of power 1/f.

    The unit of the next patch is, with probability `follow`, the next one of the ring of the class, else one of the
    other three. There are six rings of four units, and six classes.

    Parameters
    ----------
    n_trials, n_channels, n_patches : int
        Classes take turns.
    patch : int, default 20
        Samples of a patch.
    n_informative : int, default 4
        Channels that show units: the first ones.
    amplitude : float, default 1.5
        Root mean square of a unit over its channels and samples; that of the noise is 1.
    follow : float, default 0.9
    sampling_rate : float, default 200
        In Hz; waveforms are sums of eight sines of 10 to 60 Hz.
    seed : int, default 0
    """
    _whole(n_trials=n_trials, n_channels=n_channels, n_patches=n_patches, n_informative=n_informative)
    _whole(2, patch=patch)
    _above_zero(amplitude=amplitude, sampling_rate=sampling_rate)
    _share(follow=follow)
    if n_informative > n_channels:
        raise InputError(f"n_informative={n_informative} is above n_channels={n_channels}")
    g = np.random.default_rng(seed)
    t = np.arange(patch) / sampling_rate
    phases = 2 * np.pi * g.random((4, 8, 1))
    waveforms = np.sin(2 * np.pi * g.uniform(10, 60, (4, 8, 1)) * t + phases).sum(1)
    waveforms = (waveforms - waveforms.mean(1, keepdims=True)) / waveforms.std(1, keepdims=True)
    patterns = g.standard_normal((4, n_informative))
    patterns /= np.sqrt((patterns**2).mean(1, keepdims=True))
    orders = [(0, *p) for p in permutations((1, 2, 3))]
    rings = np.empty((6, 4), dtype=np.int64)
    for ring, order in zip(rings, orders, strict=True):
        ring[list(order)] = np.roll(order, -1)
    y = np.arange(n_trials) % 6
    units = np.empty((n_trials, n_patches), dtype=np.int64)
    units[:, 0] = g.integers(0, 4, n_trials)
    strays = g.random((n_trials, n_patches)) >= follow
    shifts = np.where(strays, g.integers(1, 4, (n_trials, n_patches)), 0)
    for k in range(1, n_patches):
        units[:, k] = (rings[y, units[:, k - 1]] + shifts[:, k]) % 4
    n_times = n_patches * patch
    X = _coloured(g, (n_trials, n_channels, n_times), _falling(n_times))
    shown = amplitude * (patterns[:, :, None] * waveforms[:, None])[units]
    X[:, :n_informative] += shown.transpose(0, 2, 1, 3).reshape(n_trials, n_informative, n_times)
    return PlantedUnits(X, y, units, waveforms, patterns, rings)


@dataclass(frozen=True, eq=False)
class PlantedGrammar:
    """Windows whose class is told by the order of two motifs, not by what there is.

    Attributes
    ----------
    X : array (n_windows, n_channels, n_times)
    y : array of int (n_windows,)
        1: 25 Hz before 3 Hz; 0: 3 Hz before 25 Hz.
    motifs : array of int (n_windows, n_channels, n_patches)
        0 none, 1 10 Hz, 2 3 Hz, 3 25 Hz.
    planted : array of bool (n_windows, n_channels, n_patches)
        The patches of the pairs.
    """

    X: np.ndarray
    y: np.ndarray
    motifs: np.ndarray
    planted: np.ndarray


def planted_grammar(
    n_windows: int = 300, n_channels: int = 4, n_patches: int = 6, *, n_pairs: int = 2, amplitude: float = 1.0,
    sampling_rate: float = 100.0, seed: int = 0,
) -> PlantedGrammar:  # fmt: skip
    """Patches of 1 s, each with a motif or none, in noise of power 1/f and variance 1 on each channel.

    A patch holds motif 1 with probability 1/3, else none. On `n_pairs` channels drawn at random two neighbouring
    patches hold the pair of the class, so counts of motifs say nothing about it.

    Parameters
    ----------
    n_windows, n_channels, n_patches : int
        Classes take turns.
    n_pairs : int, default 2
        Channels with a pair.
    amplitude : float, default 1
        Standard deviation of a motif, a sine of random phase under a Hann window.
    sampling_rate : float, default 100
        In Hz, at least 60.
    seed : int, default 0
    """
    _whole(n_windows=n_windows, n_channels=n_channels, n_pairs=n_pairs)
    _whole(2, n_patches=n_patches)
    _above_zero(amplitude=amplitude)
    if not is_number(sampling_rate) or sampling_rate < 60 or sampling_rate != int(sampling_rate):
        raise InputError(f"sampling_rate must be a whole number of Hz, at least 60; got {sampling_rate!r}")
    if n_pairs > n_channels:
        raise InputError(f"n_pairs={n_pairs} is above n_channels={n_channels}")
    g = np.random.default_rng(seed)
    patch = int(sampling_rate)
    y = np.arange(n_windows) % 2
    motifs = (g.random((n_windows, n_channels, n_patches)) < 1 / 3).astype(np.int64)
    channel = g.permuted(np.tile(np.arange(n_channels), (n_windows, 1)), axis=1)[:, :n_pairs]
    start = g.integers(0, n_patches - 1, (n_windows, n_pairs))
    window = np.arange(n_windows)[:, None]
    motifs[window, channel, start] = (2 + y)[:, None]
    motifs[window, channel, start + 1] = (3 - y)[:, None]
    planted = np.zeros(motifs.shape, dtype=bool)
    planted[window, channel, start] = planted[window, channel, start + 1] = True
    t = np.arange(patch) / sampling_rate
    frequency = np.array([0.0, 10.0, 3.0, 25.0])[motifs][..., None]
    wave = np.sin(2 * np.pi * (frequency * t + g.random((*motifs.shape, 1)))) * np.hanning(patch)
    wave *= amplitude / wave.std(-1, keepdims=True)
    X = _coloured(g, (n_windows, n_channels, n_patches * patch), _falling(n_patches * patch))
    X += np.where(motifs[..., None] > 0, wave, 0.0).reshape(X.shape)
    return PlantedGrammar(X, y, motifs, planted)


@dataclass(frozen=True, eq=False)
class MuscleBursts:
    """Segments of clean EEG and of muscle noise, to be mixed.

    Attributes
    ----------
    clean, noise : array (n_segments, n_times)
        Each segment has mean 0 and standard deviation 1.
    envelope : array (n_segments, n_times)
        What the stationary muscle noise was multiplied by, before scaling: 1 in bursts, `rest` elsewhere.
    scale : array (n_segments,)
        What `noise` was divided by: its variance at sample t is ``(envelope / scale)^2``, but for the mean.
    clean_power, noise_power : array (n_times // 2 + 1,)
        Power spectra over `frequencies` that the segments were drawn from, for the variance 1.
    frequencies : array (n_times // 2 + 1,)
        In Hz.
    """

    clean: np.ndarray
    noise: np.ndarray
    envelope: np.ndarray
    scale: np.ndarray
    clean_power: np.ndarray
    noise_power: np.ndarray
    frequencies: np.ndarray


def muscle_bursts(
    n_segments: int = 400, n_times: int = 512, *, sampling_rate: float = 256.0, rest: float = 0.15, seed: int = 0
) -> MuscleBursts:
    """Gaussian EEG of power 1/f from 1 to 80 Hz with a peak at 10 Hz, and muscle noise that comes in two bursts.

    The muscle noise is flat from 20 to 80 Hz and falls as (f / 20 Hz)^2 below. Bursts last 60 to 120 samples and may
    overlap.

    Parameters
    ----------
    n_segments : int
    n_times : int, default 512
        At least 240.
    sampling_rate : float, default 256
        In Hz.
    rest : float, default 0.15
        Amplitude of the muscle noise outside bursts.
    seed : int, default 0
    """
    _whole(n_segments=n_segments)
    _whole(240, n_times=n_times)
    _above_zero(sampling_rate=sampling_rate, rest=rest)
    g = np.random.default_rng(seed)
    f = np.fft.rfftfreq(n_times, 1 / sampling_rate)
    eeg = np.where((f >= 1) & (f <= 80), 1 / np.maximum(f, 1), 0) + np.where(np.abs(f - 10) <= 1, 0.3, 0)
    emg = np.where((f > 0) & (f <= 80), np.minimum(f / 20, 1) ** 2, 0)
    eeg, emg = eeg / eeg.sum(), emg / emg.sum()
    clean = _coloured(g, (n_segments, n_times), eeg)
    clean = (clean - clean.mean(1, keepdims=True)) / clean.std(1, keepdims=True)
    length = g.integers(60, 121, (n_segments, 2, 1))
    start = np.floor(g.random((n_segments, 2, 1)) * (n_times - length + 1))
    t = np.arange(n_times)
    burst = ((t >= start) & (t < start + length)).any(1)
    envelope = np.where(burst, 1.0, rest)
    noise = _coloured(g, (n_segments, n_times), emg) * envelope
    noise -= noise.mean(1, keepdims=True)
    scale = noise.std(1)
    return MuscleBursts(clean, noise / scale[:, None], envelope, scale, eeg, emg, f)


@dataclass(frozen=True, eq=False)
class Oddball:
    """Continuous EEG of an oddball task with a P300 at rare events.

    Attributes
    ----------
    X : DataArray ("channel", "time")
        In µV; ``attrs``: ``sampling_rate``, ``units``, ``source``.
    events : array of int (n_events, 2)
        Sample and code: 1 no target, 2 target.
    topography : array (n_channels,)
        Weight of the P300 on each channel, 1 at Pz.
    waveform : array (n_samples,)
        The P300 at Pz in µV, from the event on.
    """

    X: xr.DataArray
    events: np.ndarray
    topography: np.ndarray
    waveform: np.ndarray


def oddball(
    n_events: int = 240,
    channels: Sequence[str] = ("F7", "F3", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3", "Pz", "P4", "P8", "O1", "O2"),
    *, target_share: float = 0.2, amplitude: float = 6.0, noise: float = 8.0, sampling_rate: float = 128.0,
    interval: float = 0.5, seed: int = 0,
) -> Oddball:  # fmt: skip
    """Events at a steady rhythm; targets add a Gaussian wave 300 ms later, largest at Pz, to noise of power 1/f.

    Parameters
    ----------
    n_events : int
    channels : sequence of str
        Names out of `ELECTRODES`.
    target_share : float, default 0.2
        Probability that an event is a target.
    amplitude, noise : float, default 6 and 8
        Height of the P300 at Pz, and standard deviation of the noise, in µV. Neighbours share noise.
    sampling_rate : float, default 128
        In Hz.
    interval : float, default 0.5
        Seconds between events; the first comes after 1 s, and 1 s follows the last.
    seed : int, default 0
    """
    _whole(n_events=n_events)
    _share(target_share=target_share)
    _above_zero(amplitude=amplitude, noise=noise, sampling_rate=sampling_rate, interval=interval)
    places = _places(channels)
    g = np.random.default_rng(seed)
    target = g.random(n_events) < target_share
    samples = np.round((1 + interval * np.arange(n_events)) * sampling_rate).astype(np.int64)
    n_times = int(samples[-1] + np.ceil(sampling_rate)) + 1
    t = np.arange(int(0.8 * sampling_rate)) / sampling_rate
    waveform = amplitude * np.exp(-((t - 0.3) ** 2) / (2 * 0.06**2))
    topography = _around(places, "Pz")
    wanted = samples[target]
    course = np.bincount(
        (wanted[:, None] + np.arange(len(waveform))).ravel(),
        np.tile(waveform, len(wanted)),
        minlength=n_times,
    )
    X = noise * _shared_noise(g, places, (n_times,)) + topography[:, None] * course[:n_times]
    return Oddball(
        _signals(X, channels, sampling_rate, "simulate.oddball"),
        np.stack([samples, 1 + target], 1),
        topography,
        waveform,
    )


def _shared_noise(g: np.random.Generator, places: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Noise (..., n_channels, n_times) of power 1/f and variance 1; the correlation of two channels falls with distance."""
    distance = ((places[:, None] - places) ** 2).sum(-1)
    root = np.linalg.cholesky(np.exp(-distance / (2 * 0.4**2)) * 0.8 + 0.2 * np.eye(len(places)))
    return root @ _coloured(g, (*shape[:-1], len(places), shape[-1]), _falling(shape[-1]))


def _signals(X: np.ndarray, channels: Sequence[str], sampling_rate: float, source: str) -> xr.DataArray:
    coords = {"channel": list(channels), "time": np.arange(X.shape[-1]) / sampling_rate}
    attrs = {"sampling_rate": float(sampling_rate), "units": "µV", "source": source}
    return xr.DataArray(X, dims=("trial", "channel", "time")[-X.ndim :], coords=coords, attrs=attrs)


@dataclass(frozen=True, eq=False)
class MotorImagery:
    """Trials of two classes in which the rhythm over one hand area or the other is weaker.

    Attributes
    ----------
    X : DataArray ("trial", "channel", "time")
        In µV; ``attrs``: ``sampling_rate``, ``units``, ``source``.
    y : array of str (n_trials,)
        "left": the rhythm under C4 is weaker; "right": that under C3.
    patterns : array (n_channels, 2)
        Weights of the sources under C3 and C4.
    power : array (n_trials, 2)
        Of the rhythm of the two sources, in µV².
    """

    X: xr.DataArray
    y: np.ndarray
    patterns: np.ndarray
    power: np.ndarray


def motor_imagery(
    n_trials: int = 100, channels: Sequence[str] = ("FC3", "FCz", "FC4", "C3", "Cz", "C4", "CP3", "CPz", "CP4"),
    *, duration: float = 3.0, frequency: float = 10.0, bandwidth: float = 4.0, rhythm: float = 6.0, weaker: float = 0.5,
    noise: float = 8.0, sampling_rate: float = 128.0, seed: int = 0,
) -> MotorImagery:  # fmt: skip
    """A rhythm of two sources, under C3 and C4, whose phase is random; imagining a hand weakens that of the other side.

    Parameters
    ----------
    n_trials : int
        Classes take turns.
    channels : sequence of str
        Names out of `ELECTRODES`.
    duration : float, default 3
        Seconds of a trial.
    frequency, bandwidth : float, default 10 and 4
        Centre and width of the rhythm in Hz; it is band-limited noise.
    rhythm, noise : float, default 6 and 8
        Standard deviations in µV, of each source and of the noise of power 1/f on each channel. Neighbours share noise.
    weaker : float, default 0.5
        What the rhythm's amplitude is multiplied by on the side opposite to the hand.
    sampling_rate : float, default 128
        In Hz.
    seed : int, default 0
    """
    _whole(2, n_trials=n_trials)
    _above_zero(duration=duration, frequency=frequency, bandwidth=bandwidth, rhythm=rhythm, noise=noise, weaker=weaker,
                sampling_rate=sampling_rate)  # fmt: skip
    places = _places(channels)
    n_times = int(duration * sampling_rate)
    f = np.fft.rfftfreq(n_times, 1 / sampling_rate) if n_times > 0 else np.zeros(0)
    band = (np.abs(f - frequency) <= bandwidth / 2) & (f > 0)
    if not band.any():
        raise InputError(
            f"no frequency of a trial of {duration:g} s at {sampling_rate:g} Hz is within {bandwidth / 2:g} Hz of {frequency:g} Hz"
        )
    g = np.random.default_rng(seed)
    left = np.arange(n_trials) % 2 == 0
    gain = rhythm * np.where(np.stack([~left, left], 1), weaker, 1.0)
    patterns = np.stack([_around(places, "C3", 0.3), _around(places, "C4", 0.3)], 1)
    sources = gain[:, :, None] * _coloured(g, (n_trials, 2, n_times), band.astype(np.float64))
    X = noise * _shared_noise(g, places, (n_trials, n_times)) + patterns @ sources
    return MotorImagery(
        _signals(X, channels, sampling_rate, "simulate.motor_imagery"),
        np.where(left, "left", "right"),
        patterns,
        gain**2,
    )


# ---------------------------------------------------------------- spikes and traces


@dataclass(frozen=True, eq=False)
class LinearStates:
    """A moving state and linear observations of it, both with Gaussian noise.

    Attributes
    ----------
    X : array (n_bins, n_neurons)
        x_t = H z_t + N(0, Lambda).
    Z : array (n_bins, d)
        z_t = A z_{t-1} + N(0, Gamma), z_t ~ N(0, S).
    A, Gamma, S : array (d, d)
    H : array (n_neurons, d)
    Lambda : array (n_neurons, n_neurons)
    """

    X: np.ndarray
    Z: np.ndarray
    A: np.ndarray
    Gamma: np.ndarray
    S: np.ndarray
    H: np.ndarray
    Lambda: np.ndarray


def linear_states(
    n_bins: int = 400, n_neurons: int = 8, n_dims: int = 3, *, radius: float = 0.95, noise: float = 1.0, seed: int = 0
) -> LinearStates:
    """What a Kalman filter is made for: everything linear and Gaussian, A not symmetric, the state stationary.

    Parameters
    ----------
    n_bins, n_neurons, n_dims : int
    radius : float, default 0.95
        Largest absolute eigenvalue of A, below 1.
    noise : float, default 1
        Mean variance of the observations' noise; it differs between neurons.
    seed : int, default 0
    """
    from scipy.linalg import solve_discrete_lyapunov

    _whole(n_bins=n_bins, n_neurons=n_neurons, n_dims=n_dims)
    _above_zero(noise=noise, radius=radius)
    if radius >= 1:
        raise InputError(f"radius must be below 1, got {radius!r}: the state would run away")
    g = np.random.default_rng(seed)
    A = np.linalg.qr(g.standard_normal((n_dims, n_dims)))[0] + 0.3 * g.standard_normal((n_dims, n_dims))
    A *= radius / np.abs(np.linalg.eigvals(A)).max()
    root = np.eye(n_dims) + 0.3 * np.tril(g.standard_normal((n_dims, n_dims)), -1)
    Gamma = 0.1 * root @ root.T
    S = solve_discrete_lyapunov(A, Gamma)
    H = g.standard_normal((n_neurons, n_dims))
    Lambda = np.diag(noise * g.uniform(0.5, 1.5, n_neurons))
    Z = g.standard_normal((n_bins, n_dims)) @ np.linalg.cholesky(Gamma).T
    Z[0] = np.linalg.cholesky((S + S.T) / 2) @ g.standard_normal(n_dims)
    for t in range(1, n_bins):
        Z[t] += A @ Z[t - 1]
    X = Z @ H.T + g.standard_normal((n_bins, n_neurons)) * np.sqrt(np.diag(Lambda))
    return LinearStates(X, Z, A, Gamma, (S + S.T) / 2, H, Lambda)


def poisson_spikes(rates: np.ndarray, bin_width: float, *, seed: int = 0) -> list[np.ndarray]:
    """Times of spikes of neurons whose rates are known and constant in each bin.

    Parameters
    ----------
    rates : array (n_bins, n_neurons)
        In spikes per second.
    bin_width : float
        In seconds; the first bin starts at 0.
    seed : int, default 0

    Returns
    -------
    list of array (n_spikes,)
        Sorted times in seconds, one array for each neuron.

    See Also
    --------
    nissl.recordings.io.spike_counts : Counts them again.
    """
    rates = as_bins(rates, "rates")
    _above_zero(bin_width=bin_width)
    if (rates < 0).any():
        raise InputError(f"rates must not be negative; neuron {int(np.argwhere(rates < 0)[0][1])} has one")
    g = np.random.default_rng(seed)
    counts = g.poisson(rates * bin_width)
    bins = np.arange(len(rates))
    return [np.sort((np.repeat(bins, n) + g.random(n.sum())) * bin_width) for n in counts.T]


@dataclass(frozen=True, eq=False)
class HubCircuit:
    """Spikes of hubs, their followers and unconnected neurons.

    Attributes
    ----------
    X : array (n_windows, n_neurons)
        1 where a neuron fired in a window, else 0.
    connectivity : array of bool (n_neurons, n_neurons)
        ``connectivity[target, source]``: the target follows the source one window later.
    hubs : array of int (n_hubs,)
    nats : dict of float
        Shortest mean code lengths of a window: "past" known, "no past", and "rates" of single neurons only.
    """

    X: np.ndarray
    connectivity: np.ndarray
    hubs: np.ndarray
    nats: dict[str, float]


def hub_circuit(
    n_windows: int = 5000, *, n_hubs: int = 3, n_followers: int = 4, n_unconnected: int = 5, hub: float = 0.5,
    follow: float = 0.9, stray: float = 0.02, unconnected: float = 0.1, seed: int = 0,
) -> HubCircuit:  # fmt: skip
    """Hubs fire by chance; each has followers that fire one window after it; the other neurons fire by chance.

    Neurons are in random order.

    Parameters
    ----------
    n_windows, n_hubs, n_followers, n_unconnected : int
        `n_followers` of each hub.
    hub, unconnected : float, default 0.5 and 0.1
        Probabilities that a hub and an unconnected neuron fire in a window.
    follow, stray : float, default 0.9 and 0.02
        Probabilities that a follower fires if its hub fired in the window before, and if it did not.
    seed : int, default 0
    """
    _whole(n_windows=n_windows, n_hubs=n_hubs, n_followers=n_followers)
    _whole(0, n_unconnected=n_unconnected)
    _share(hub=hub, follow=follow, stray=stray, unconnected=unconnected)
    g = np.random.default_rng(seed)
    n = n_hubs * (1 + n_followers) + n_unconnected
    place = g.permutation(n)
    hubs, followers, others = np.split(place, [n_hubs, n_hubs * (1 + n_followers)])
    source = np.repeat(np.arange(n_hubs), n_followers)
    fired = g.random((n_windows + 1, n_hubs)) < hub
    X = np.zeros((n_windows, n))
    X[:, hubs] = fired[1:]
    X[:, followers] = g.random((n_windows, len(followers))) < np.where(fired[:-1][:, source], follow, stray)
    X[:, others] = g.random((n_windows, len(others))) < unconnected
    connectivity = np.zeros((n, n), dtype=bool)
    connectivity[followers, hubs[source]] = True

    free = n_hubs * _entropy(hub) + n_unconnected * _entropy(unconnected)
    told = hub * _entropy(follow) + (1 - hub) * _entropy(stray)
    k = np.arange(n_followers + 1)
    pattern = hub * follow**k * (1 - follow) ** k[::-1] + (1 - hub) * stray**k * (1 - stray) ** k[::-1]
    ways = np.array([comb(n_followers, int(i)) for i in k])
    joint = -float((ways * xlogy(pattern, pattern)).sum())
    nats = {
        "past": free + n_hubs * n_followers * told,
        "no past": free + n_hubs * joint,
        "rates": free + n_hubs * n_followers * _entropy(hub * follow + (1 - hub) * stray),
    }
    return HubCircuit(X, connectivity, hubs, nats)


def _entropy(p: float) -> float:
    """Of a coin, in nats."""
    return -float(xlogy(p, p) + xlogy(1 - p, 1 - p))


@dataclass(frozen=True, eq=False)
class LaggedCircuit:
    """Spikes of a circuit in which common input at two lags looks like a connection, and true connections are weak.

    Attributes
    ----------
    X : array (n_bins, n_neurons)
        1 where a neuron fired in a bin, else 0.
    connectivity : array of bool (n_neurons, n_neurons)
        ``connectivity[target, source]``: the target follows the source.
    lags : array of int (n_neurons, n_neurons)
        By how many bins; 0 where there is no connection.
    """

    X: np.ndarray
    connectivity: np.ndarray
    lags: np.ndarray


def lagged_circuit(
    n_bins: int = 5000, *, n_hubs: int = 2, n_early: int = 3, n_late: int = 3, n_drivers: int = 3, n_weak: int = 2,
    hub: float = 0.5, follow: float = 0.9, stray: float = 0.02, weak: float = 0.35, weak_stray: float = 0.1, seed: int = 0,
) -> LaggedCircuit:  # fmt: skip
    """Hubs with early followers, one bin later, and late ones, two bins later; drivers with weak followers, one bin later.

    A late follower fires one bin after the early ones of its hub, which do not reach it. Their correlation is higher than that of a
    driver with its weak follower. Neurons are in random order.

    Parameters
    ----------
    n_bins, n_hubs, n_drivers : int
    n_early, n_late : int
        Followers of each hub.
    n_weak : int
        Followers of each driver.
    hub : float, default 0.5
        Probability that a hub, or a driver, fires in a bin.
    follow, stray : float, default 0.9 and 0.02
        Probabilities that a follower of a hub fires after it, and otherwise.
    weak, weak_stray : float, default 0.35 and 0.1
        The same of followers of drivers.
    seed : int, default 0
    """
    _whole(n_bins=n_bins, n_hubs=n_hubs, n_early=n_early, n_late=n_late)
    _whole(0, n_drivers=n_drivers, n_weak=n_weak)
    _share(hub=hub, follow=follow, stray=stray, weak=weak, weak_stray=weak_stray)
    g = np.random.default_rng(seed)
    sizes = n_hubs, n_hubs * n_early, n_hubs * n_late, n_drivers, n_drivers * n_weak
    hubs, early, late, drivers, weaker = np.split(g.permutation(sum(sizes)), np.cumsum(sizes)[:-1])
    fired = g.random((n_bins + 2, n_hubs + n_drivers)) < hub
    X = np.zeros((n_bins, sum(sizes)))
    lags = np.zeros((sum(sizes),) * 2, dtype=int)
    sources = np.concatenate([hubs, drivers])
    X[:, sources] = fired[2:]
    for targets, lag, first, n_each, high, low in (
        (early, 1, 0, n_early, follow, stray),
        (late, 2, 0, n_late, follow, stray),
        (weaker, 1, n_hubs, n_weak, weak, weak_stray),
    ):
        source = first + np.repeat(np.arange(len(targets) // max(n_each, 1)), n_each)
        told = fired[2 - lag : len(fired) - lag][:, source]
        X[:, targets] = g.random((n_bins, len(targets))) < np.where(told, high, low)
        lags[targets, sources[source]] = lag
    return LaggedCircuit(X, lags > 0, lags)


@dataclass(frozen=True, eq=False)
class PlantedCommunities:
    """Traces of animals in which groups of neurons act together for a while.

    Attributes
    ----------
    X : array (n_animals, n_times, n_neurons)
    labels : array of int (n_neurons,)
        The group of each neuron.
    windows : array of bool (n_groups, n_times)
        When a group acts together.
    animals : array of bool (n_groups, n_animals)
        In which animals.
    """

    X: np.ndarray
    labels: np.ndarray
    windows: np.ndarray
    animals: np.ndarray


def planted_communities(
    n_times: int = 400, group_size: int = 8, animals: Sequence[Sequence[int]] = ((0, 1), (1, 2, 3), (3,)),
    *, n_animals: int = 4, snr: float = 3.0, smooth: float = 5.0, seed: int = 0,
) -> PlantedCommunities:  # fmt: skip
    """Smooth independent traces; group g shares another smooth signal in window g of as many as there are groups.

    Parameters
    ----------
    n_times : int
    group_size : int, default 8
        Neurons of each group.
    animals : sequence of sequences of int
        For each group, the animals in which it acts together. The shared signals of animals are independent.
    n_animals : int, default 4
    snr : float, default 3
        Variance of the shared signal over that of the own one.
    smooth : float, default 5
        Standard deviation, in samples, of the Gaussian that smooths white noise.
    seed : int, default 0
    """
    from scipy.ndimage import gaussian_filter1d

    _whole(group_size=group_size, n_animals=n_animals)
    _above_zero(snr=snr, smooth=smooth)
    n_groups = len(animals)
    _whole(n_times=n_times)
    if not 0 < n_groups <= n_times:
        raise InputError(f"there must be at least one group, and no more than n_times={n_times}; got {n_groups}")
    inside = np.zeros((n_groups, n_animals), dtype=bool)
    for group, members in enumerate(animals):
        if not all(is_whole(a) and 0 <= a < n_animals for a in members):
            raise InputError(f"animals of group {group} must be numbers from 0 to {n_animals - 1}, got {list(members)}")
        inside[group, list(members)] = True
    g = np.random.default_rng(seed)

    def traces(n: int) -> np.ndarray:
        x = gaussian_filter1d(g.standard_normal((n_animals, n_times, n)), smooth, axis=1, mode="wrap")
        return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)

    labels = np.repeat(np.arange(n_groups), group_size)
    windows = np.arange(n_times) * n_groups // n_times == np.arange(n_groups)[:, None]
    active = inside.T[:, None] & windows.T[None]
    X = traces(len(labels)) + np.sqrt(snr) * (traces(n_groups) * active)[:, :, labels]
    return PlantedCommunities(X, labels, windows, inside)


@dataclass(frozen=True, eq=False)
class PlantedGroups:
    """Traces in which each of three groups of neurons acts together in one part of the time and in some animals.

    Attributes
    ----------
    X : array (n_animals, n_times, n_neurons)
    labels : array of int (n_neurons,)
        Group of each neuron.
    active : array of bool (3, n_times)
        When each group acts together.
    animals : array of bool (3, n_animals)
        In which animals.
    """

    X: np.ndarray
    labels: np.ndarray
    active: np.ndarray
    animals: np.ndarray


def planted_groups(
    n_times: int = 400, n_neurons: int = 24, *, snr: float = 3.0, smooth: float = 3.0, seed: int = 0
) -> PlantedGroups:
    """Four animals; groups act in animals 0 and 1, in 1 to 3, and in 3, each in its third of the time; all else is independent.

    Parameters
    ----------
    n_times, n_neurons : int
    snr : float, default 3
        Variance of the shared signal over that of a neuron's own, while its group acts.
    smooth : float, default 3
        Standard deviation, in bins, of the Gaussian by which white noise is smoothed.
    seed : int, default 0
    """
    from scipy.ndimage import gaussian_filter1d

    at_least("n_times", n_times, 30)
    at_least("n_neurons", n_neurons, 6)
    for name, value in (("snr", snr), ("smooth", smooth)):
        if not is_number(value) or value <= 0:
            raise InputError(f"{name} must be a number above 0, got {value!r}")
    g = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        found = gaussian_filter1d(g.standard_normal(shape), smooth, axis=1, mode="wrap")
        return found / found.std()

    animals = np.array([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=bool)
    labels = np.arange(n_neurons) * 3 // n_neurons
    active = np.arange(n_times) * 3 // n_times == np.arange(3)[:, None]
    shared, own = noise(4, n_times, 3), noise(4, n_times, n_neurons)
    on = animals.T[:, None, :] & active.T
    X = own + (np.sqrt(snr) * shared * on)[:, :, labels]
    return PlantedGroups(X, labels, active, animals)
