"""Muscle noise in EEG: mixing it in, measuring what is left, and removing it where an autoencoder says that it is.

AT-AT in two stages. A small convolutional autoencoder cleans everything. Where its output agrees poorly with its input, much was
removed, so much was noise: there, and only there, a small transformer of the whole segment makes the reconstruction. A discriminator
of clean EEG keeps what the transformer writes like EEG. The paper's code is not public: sizes, threshold and weights of losses are a
reconstruction.

Muscle noise overlaps the beta and gamma bands of EEG. No claim about high frequencies should rest on what was cleaned here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from nissl.arguments import as_path, at_least, instance, is_number, is_whole, items
from nissl.errors import InputError
from nissl.recordings.arrays import TRIALS, as_rate, as_trials
from nissl.recordings.extras import need
from nissl.recordings.transformer import Encoder, sinusoid
from nissl.seeds import seeded

DECIBELS = {"amplitude10": 10.0, "power": 20.0}
"""What log10 of a ratio of amplitudes is multiplied by. 2 dB of "amplitude10" are 4 dB of power."""
THRESHOLDS = tuple(round(0.2 + 0.05 * k, 2) for k in range(16))
"""What `EMGFilter` chooses its threshold from: .2 to .95."""
FALLBACK = 0.8
"""The threshold before one is chosen."""
ROUNDING = 1e-12
"""A window that varies by less than this share of its largest value is flat."""
ROWS = 256
"""Windows that go through the networks at once."""


# ---------------------------------------------------------------- mathematics


def mix(
    clean: Any, noise: Any, snr_db: Any, convention: str = "amplitude10"
) -> np.ndarray:  # fmt: skip
    """Clean signals with noise added at a signal-to-noise ratio: y = x + lambda n.

    Parameters
    ----------
    clean, noise : array (..., n_times)
    snr_db : float or array (...)
        In decibels; the ratio is of root mean squares over a segment.
    convention : {"amplitude10", "power"}, default "amplitude10"
        "amplitude10", of EEGdenoiseNet: 10 log10 of the ratio of amplitudes, so -7 dB are -14 dB of power. "power": the usual
        10 log10 of the ratio of powers.

    Returns
    -------
    array (..., n_times)

    Raises
    ------
    InputError
        Shapes that do not fit, no finite numbers, noise without power.

    References
    ----------
    Zhang, H. et al. (2021). EEGdenoiseNet: a benchmark dataset for deep learning solutions of EEG denoising. J. Neural Eng. 18, 056057.
    """
    x, n = _real(clean, "clean"), _real(noise, "noise")
    level = np.asarray(snr_db, dtype=float)
    if not np.isfinite(level).all():
        raise InputError(f"snr_db must be finite decibels, got {snr_db!r}")
    scale = _scale(convention)
    if not (n**2).mean(-1).all():
        raise InputError("noise holds a segment without power: nothing can be scaled to a signal-to-noise ratio")
    try:
        return x + _gain(x, n, level[..., None], scale) * n
    except ValueError as error:
        raise InputError(f"clean {x.shape}, noise {n.shape} and snr_db {level.shape} do not fit: {error}") from error


def _scale(convention: str) -> float:
    if convention not in DECIBELS:
        raise InputError(f"convention must be 'amplitude10' or 'power', got {convention!r}")
    return DECIBELS[convention]


def _gain(x: Any, n: Any, decibels: Any, scale: float) -> Any:
    """What noise is multiplied by, of arrays or tensors (..., n_times): RMS(x) / (RMS(n) 10^(dB / scale))."""
    power = (x**2).mean(-1)[..., None] / (n**2).mean(-1)[..., None]
    return power**0.5 / 10 ** (decibels / scale)


def cc(found: Any, clean: Any) -> np.ndarray:
    """Pearson's correlation of each cleaned segment with the clean one; blind to scale.

    Parameters
    ----------
    found, clean : array (..., n_times)

    Returns
    -------
    array (...)
        NaN where a segment is flat.
    """
    a, b = _pair(found, clean)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    above, below = (a * b).sum(-1), np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def rrmse_time(found: Any, clean: Any) -> np.ndarray:
    """Relative error RMS(found - clean) / RMS(clean) of each segment; shapes as of `cc`."""
    a, b = _pair(found, clean)
    return _relative(a, b)


def rrmse_spectrum(found: Any, clean: Any) -> np.ndarray:
    """Relative error of each segment's periodogram, RMS(P found - P clean) / RMS(P clean); shapes as of `cc`."""
    a, b = (np.abs(np.fft.rfft(v)) ** 2 for v in _pair(found, clean))
    return _relative(a, b)


def _relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    error, size = np.sqrt(((a - b) ** 2).mean(-1)), np.sqrt((b**2).mean(-1))
    return np.divide(error, size, out=np.full(error.shape, np.nan), where=size > 0)


def _real(X: Any, name: str) -> np.ndarray:
    """Finite signals (..., n_times) of any number of axes."""
    X = np.asarray(X)
    if X.ndim == 0:
        raise InputError(f"{name} must have the shape (..., n_times), got a number")
    return as_trials(X.reshape(-1, 1, X.shape[-1]), name).reshape(X.shape)


def _pair(found: Any, clean: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = _real(found, "found"), _real(clean, "clean")
    if a.shape != b.shape:
        raise InputError(f"found {a.shape} and clean {b.shape} must have one shape")
    return a, b


def local_correlation(a: Tensor, b: Tensor, window: int = 64) -> Tensor:
    """Pearson's correlation of two signals around each sample.

    Parameters
    ----------
    a, b : Tensor (n, n_times)
    window : int, default 64
        Samples, half of them before; fewer at the ends. Standard deviations below 1e-6 count as that.

    Returns
    -------
    Tensor (n, n_times)
        Of the type of `a`, from -1 to 1.
    """
    times = torch.arange(a.shape[1], device=a.device)
    low, high = (times - window // 2).clamp(min=0), (times + window - window // 2).clamp(max=a.shape[1])

    def mean(x: Tensor) -> Tensor:
        total = F.pad(x.cumsum(1), (1, 0))
        return (total[:, high] - total[:, low]) / (high - low)

    x, y = (v.double() - v.double().mean(1, keepdim=True) for v in (a, b))
    mx, my = mean(x), mean(y)
    sx, sy = ((mean(v**2) - m**2).clamp(min=0).sqrt().clamp(min=1e-6) for v, m in ((x, mx), (y, my)))
    return ((mean(x * y) - mx * my) / (sx * sy)).clamp(-1, 1).to(a.dtype)


# ---------------------------------------------------------------- networks


class Autoencoder(nn.Module):
    """Convolutions, batch norm, ReLU and max-pooling by 2, then the same with upsampling, and a linear convolution to one channel.

    Parameters
    ----------
    channels : sequence of int, default (16, 32, 32)
        Of each block; as many are pooled.
    kernel : int, default 9
        Odd.
    """

    def __init__(self, channels: Sequence[int] = (16, 32, 32), kernel: int = 9) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for n in channels:
            layers += [*_convolution(width, n, kernel), nn.MaxPool1d(2)]
            width = n
        for n in (*channels[-2::-1], channels[0]):
            layers += [nn.Upsample(scale_factor=2), *_convolution(width, n, kernel)]
            width = n
        self.layers = nn.Sequential(*layers, nn.Conv1d(width, 1, kernel, padding=kernel // 2))

    def forward(self, y: Tensor) -> Tensor:
        """Signals (n, n_times) in and out."""
        return self.layers(y[:, None])[:, 0]


def _convolution(before: int, after: int, kernel: int) -> list[nn.Module]:
    return [nn.Conv1d(before, after, kernel, padding=kernel // 2), nn.BatchNorm1d(after), nn.ReLU()]


class PatchTransformer(nn.Module):
    """Corrects a coarse reconstruction: tokens are patches of the signal, the reconstruction and the mask. Starts as no correction.

    Parameters
    ----------
    patch : int, default 16
        Samples of a token.
    n_features, n_layers, n_heads, hidden : int
        Of `nissl.recordings.transformer.Encoder`.
    """

    def __init__(
        self, patch: int = 16, n_features: int = 64, n_layers: int = 3, n_heads: int = 4, hidden: int = 128
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch, n_features)
        self.encoder = Encoder(n_layers, n_features, n_heads, hidden=hidden)
        self.out = nn.Linear(n_features, patch)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, y: Tensor, coarse: Tensor, mask: Tensor) -> Tensor:
        """Reconstruction (n, n_times) from the signal, the coarse reconstruction and the mask of the same shape."""
        rows = torch.stack([y, coarse, mask.to(y.dtype)], 1)
        tokens = self.embed(rows.unflatten(2, (-1, self.patch)).transpose(1, 2).flatten(2))
        place = sinusoid(tokens.shape[1], tokens.shape[2]).to(tokens)
        return coarse + self.out(self.encoder(tokens + place)).flatten(1)


class Discriminator(nn.Module):
    """Tells clean EEG from reconstructions by the waveform (four strided convolutions) and the log power spectrum.

    Parameters
    ----------
    n_times : int, default 512
        A multiple of 16.
    """

    def __init__(self, n_times: int = 512) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 1
        for n in (16, 32, 32, 16):
            layers += [spectral_norm(nn.Conv1d(width, n, 9, stride=2, padding=4)), nn.LeakyReLU(0.2)]
            width = n
        self.wave = nn.Sequential(*layers, nn.Flatten())
        self.spectrum = nn.Sequential(spectral_norm(nn.Linear(n_times // 2 + 1, 64)), nn.LeakyReLU(0.2))
        self.out = spectral_norm(nn.Linear(width * n_times // 16 + 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n,) of being clean, of segments (n, n_times)."""
        return self.out(torch.cat([self.wave(x[:, None]), self.spectrum(log_power(x))], 1))[:, 0]


def log_power(x: Tensor) -> Tensor:
    """Logarithm of the periodogram (n, n_times // 2 + 1) of segments (n, n_times) under a Hann window."""
    window = torch.hann_window(x.shape[1], device=x.device, dtype=x.dtype)
    return (torch.fft.rfft(x * window).abs().square() / window.square().sum() + 1e-4).log()


@dataclass(frozen=True, eq=False)
class Cleaned:
    """What `TargetedDenoiser` made of segments.

    Attributes
    ----------
    output, coarse : Tensor (n, n_times)
        The reconstruction, and that of the autoencoder alone.
    correlation : Tensor (n, n_times)
        Of the autoencoder's output with its input, around each sample, or of the whole segment.
    share : Tensor (n, n_times)
        The transformer's part of the output, from 0 to 1.
    """

    output: Tensor
    coarse: Tensor
    correlation: Tensor
    share: Tensor


class TargetedDenoiser(nn.Module):
    """An autoencoder, and a transformer where the two ends of the autoencoder correlate less than a threshold.

    Parameters
    ----------
    autoencoder, transformer : Module
    window : int, default 64
        Samples around each one whose correlation counts. The places found are made wider by a quarter of it on both sides.
    gate : {"window", "segment"}, default "window"
        "segment": one correlation decides on a whole segment.
    fade : int, default 8
        Samples over which one stage passes into the other: steps would be broad noise.
    """

    threshold: Tensor
    kernel: Tensor

    def __init__(
        self, autoencoder: nn.Module, transformer: nn.Module, window: int = 64, gate: str = "window", fade: int = 8
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.transformer = transformer
        self.window = window
        self.gate = gate
        cosine = torch.hann_window(2 * (fade // 2) + 3, periodic=False)[1:-1]
        self.register_buffer("kernel", cosine / cosine.sum())
        self.register_buffer("threshold", torch.tensor(FALLBACK))

    def mask(self, correlation: Tensor, threshold: Tensor | None = None) -> Tensor:
        """Where the transformer has to work: (n, n_times) of bool. Another threshold may be given for each segment, (n, 1)."""
        low = correlation < (self.threshold if threshold is None else threshold)
        reach = self.window // 4
        return F.max_pool1d(low[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0

    def judge(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's output and its correlation with the input, both (n, n_times)."""
        coarse = self.autoencoder(y)
        if self.gate == "segment":
            return coarse, local_correlation(coarse, y, 2 * y.shape[1])
        return coarse, local_correlation(coarse, y, self.window)

    def compose(self, y: Tensor, coarse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction, and the transformer's share of it, both (n, n_times), for a mask (n, n_times) of bool."""
        reach = len(self.kernel) // 2
        padded = F.pad(mask[:, None].to(y.dtype), (reach, reach), mode="replicate")
        share = F.conv1d(padded, self.kernel.to(y.dtype)[None, None])[:, 0].clamp(0, 1)
        return coarse + share * (self.transformer(y, coarse, mask) - coarse), share

    def clean(self, y: Tensor, mask: Tensor | None = None) -> Cleaned:
        """Both stages and what decided between them; a `mask` takes the place of the one found."""
        coarse, correlation = self.judge(y)
        output, share = self.compose(y, coarse, self.mask(correlation) if mask is None else mask)
        return Cleaned(output, coarse, correlation, share)

    def forward(self, y: Tensor) -> Tensor:
        """Segments (n, n_times) of mean 0 and standard deviation 1 in, without noise out."""
        return self.clean(y).output


class _Both(nn.Module):
    """The two players of the adversarial training."""

    def __init__(self, denoiser: TargetedDenoiser, discriminator: Discriminator) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.discriminator = discriminator


# ---------------------------------------------------------------- windows


def _rows(X: Any, sampling_rate: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """Signals (..., n_times) of any number of trials and channels as rows (n, n_times), and their shape."""
    told = getattr(X, "attrs", {}).get("sampling_rate")
    if told is None and hasattr(X, "info") and hasattr(X, "ch_names"):
        told = X.info["sfreq"]
    if told is not None and abs(float(told) - sampling_rate) > 1e-3 * sampling_rate:
        raise InputError(
            f"X is sampled at {float(told):g} Hz, the filter is for {sampling_rate:g} Hz: resample X, or fit a filter for it"
        )
    if hasattr(X, "get_data") and hasattr(X, "ch_names"):
        X = X.get_data()
    if isinstance(X, xr.DataArray) and X.ndim == 3:
        X = as_trials(X)
    elif isinstance(X, xr.DataArray) and X.dims[-1:] != ("time",):
        raise InputError(f"X has the dimensions {X.dims}; the last must be 'time'")
    X = np.asarray(X)
    if not 1 <= X.ndim <= 3:
        raise InputError(f"X must have the shape (n_trials, n_channels, n_times), or fewer axes; got {X.shape}")
    shape = X.shape
    return as_trials(X.reshape(-1, 1, shape[-1]))[:, 0], shape


def _segments(X: Any, name: str, n_times: int, sampling_rate: float) -> list[np.ndarray]:
    """Of each row of the first axis its segments (n, n_times), end to end; flat ones are refused."""
    rows, shape = _rows(X, sampling_rate)
    if len(shape) < 2:
        raise InputError(f"{name} must be segments (n, n_times) or trials (n_trials, n_channels, n_times), got {shape}")
    k = shape[-1] // n_times
    if not k:
        raise InputError(f"{name}: {shape[-1]} samples are fewer than n_times={n_times}")
    if shape[0] < 2:
        raise InputError(f"{name} holds one trial; at least 2 are needed, for training and for validation")
    cut = rows[:, : k * n_times].reshape(-1, n_times)
    flat = cut.std(1) <= ROUNDING * np.abs(cut).max(1)
    cut = cut - cut.mean(1, keepdims=True)
    if flat.any():
        raise InputError(f"{name} holds {int(flat.sum())} flat segments of {len(cut)}; leave them out")
    return list((cut / cut.std(1, keepdims=True)).reshape(shape[0], -1, n_times))


def _starts(length: int, n_times: int) -> np.ndarray:
    """Where windows start that overlap by half; the last one ends with the signal."""
    regular = np.arange(0, length - n_times + 1, n_times // 2)
    last = length - n_times
    return regular if regular[-1] == last else np.append(regular, last)


def _overlap_add(windows: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Windows (n, n_windows, n_times) faded into each other: (n, length)."""
    n_times = windows.shape[2]
    weight = np.sin(np.pi * (np.arange(n_times) + 0.5) / n_times) ** 2
    total, weights = np.zeros((len(windows), length)), np.zeros(length)
    for k, start in enumerate(starts):
        total[:, start : start + n_times] += weight * windows[:, k]
        weights[start : start + n_times] += weight
    return total / weights


class _Windowed(TransformerMixin, BaseEstimator, ABC):
    """What both filters share: each channel on its own, in windows that overlap by half and are faded into each other."""

    n_times: int
    sampling_rate: float

    def _through(self, X: Any) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """What `_of_windows` says of windows of mean 0 and standard deviation 1, joined again; of flat ones their own zeros."""
        rows, shape = _rows(X, self.sampling_rate)
        n = self.n_times
        length = max(shape[-1], n)
        if shape[-1] < n:
            rows = np.pad(rows, ((0, 0), (0, n - shape[-1])), mode="reflect" if shape[-1] > 1 else "edge")
        starts = _starts(length, n)
        found: dict[str, list[np.ndarray]] = {}
        step = max(1, ROWS // len(starts))
        for at in range(0, len(rows), step):
            windows = rows[at : at + step, starts[:, None] + np.arange(n)]
            mean = windows.mean(2, keepdims=True)
            scale = windows.std(2, keepdims=True)
            alive = scale > ROUNDING * np.abs(windows).max(2, keepdims=True)
            z = np.divide(windows - mean, scale, out=np.zeros_like(windows), where=alive)
            parts = {
                name: np.where(alive, v.reshape(windows.shape), 0)
                for name, v in self._of_windows(z.reshape(-1, n)).items()
            }
            parts["output"] = parts["output"] * scale + mean
            for name, v in parts.items():
                found.setdefault(name, []).append(_overlap_add(v, starts, length))
        return {name: np.concatenate(v)[:, : shape[-1]].reshape(shape) for name, v in found.items()}, shape

    @abstractmethod
    def _of_windows(self, z: np.ndarray) -> dict[str, np.ndarray]:
        """What is said of windows (n, n_times), by name, the cleaned ones as ``output``."""

    def transform(self, X: Any) -> np.ndarray:
        """Signals without muscle noise.

        Parameters
        ----------
        X : array (n_trials, n_channels, n_times), or fewer axes, the last of which is time; DataArray, MNE Raw or Epochs
            Each channel is cleaned on its own, in windows of the filter's `n_times`; a shorter signal is mirrored at its end.

        Returns
        -------
        array of the shape and in the units of X
            MNE objects are changed by ``raw.copy().apply_function(filter.transform, channel_wise=False)``.

        Raises
        ------
        InputError
            No finite numbers; a DataArray or MNE object of another sampling rate.
        NotFittedError
        """
        check_is_fitted(self)
        return self._through(X)[0]["output"]


# ---------------------------------------------------------------- estimators


class WienerFilter(_Windowed):
    """The best linear filter for stationary EEG and noise: each frequency is scaled by its share of EEG.

    Parameters
    ----------
    snr_db : float, optional
        The level of the noise in all signals. By default it is estimated for each window: two weights of the mean spectra of EEG and
        noise that make the window's periodogram most probable.
    n_times : int, default 512
        Samples of a window.
    sampling_rate : float, default 256
        In Hz, of `fit` and `transform`.
    convention : {"amplitude10", "power"}, default "amplitude10"
        Of `snr_db`, as of `mix`.

    Attributes
    ----------
    clean_power_, noise_power_ : array (n_times // 2 + 1,)
        Mean periodograms of segments of variance 1.

    See Also
    --------
    EMGFilter

    References
    ----------
    Wiener, N. (1949). Extrapolation, interpolation, and smoothing of stationary time series. MIT Press.
    Fevotte, C., Bertin, N. & Durrieu, J.-L. (2009). Nonnegative matrix factorization with the Itakura-Saito divergence. Neural
    Computation 21, 793-830: the updates of the two weights.
    """

    def __init__(
        self, snr_db: float | None = None, n_times: int = 512, sampling_rate: float = 256.0,
        convention: str = "amplitude10",
    ) -> None:  # fmt: skip
        self.snr_db = snr_db
        self.n_times = n_times
        self.sampling_rate = sampling_rate
        self.convention = convention

    def fit(self, clean: Any, noise: Any) -> WienerFilter:
        """Learn the mean spectra; shapes as of `EMGFilter.fit`."""
        at_least("n_times", self.n_times, 16)
        as_rate(self.sampling_rate)
        _scale(self.convention)
        if self.snr_db is not None and not is_number(self.snr_db):
            raise InputError(f"snr_db must be a number of decibels or None, got {self.snr_db!r}")
        self.clean_power_, self.noise_power_ = (
            (np.abs(np.fft.rfft(np.concatenate(_segments(v, name, self.n_times, self.sampling_rate)))) ** 2).mean(0)
            for v, name in ((clean, "clean"), (noise, "noise"))
        )
        return self

    def _of_windows(self, z: np.ndarray) -> dict[str, np.ndarray]:
        spectrum = np.fft.rfft(z)
        tiny = 1e-9 * self.clean_power_.max()
        eeg, emg = self.clean_power_ + tiny, self.noise_power_ + tiny
        if self.snr_db is None:
            power = np.abs(spectrum[:, 1:]) ** 2
            weights = np.full((2, len(z), 1), 0.5)
            for _ in range(50):
                model = weights[0] * eeg[1:] + weights[1] * emg[1:]
                weights *= [((power / model**2 * v[1:]).mean(1) / (v[1:] / model).mean(1))[:, None] for v in (eeg, emg)]
            eeg, emg = weights[0] * eeg, weights[1] * emg
        else:
            emg = emg * 10 ** (-2 * self.snr_db / _scale(self.convention))
        return {"output": np.fft.irfft(spectrum * eeg / (eeg + emg), self.n_times)}


class EMGFilter(_Windowed):
    """Removes muscle noise from EEG, channel by channel, with an autoencoder and a transformer that works where it is needed.

    Training mixes clean EEG and muscle noise anew in each batch. The autoencoder is trained first and then kept. While the transformer
    is trained, the threshold is drawn anew for each segment, so that one network serves all; the threshold is then the one whose output
    correlates best with the clean EEG of validation segments. Last, a discriminator plays against the transformer.

    Parameters
    ----------
    n_times : int, default 512
        Samples of a window; a multiple of 16, of `patch` and of 2 for each block of the autoencoder.
    sampling_rate : float, default 256
        In Hz, of `fit` and `transform`.
    snr_range : (float, float), default (-7, 2)
        Levels of the training mixtures in dB, drawn uniformly.
    convention : {"amplitude10", "power"}, default "amplitude10"
        Of `snr_range`, as of `mix`.
    window, gate
        Of `TargetedDenoiser`.
    threshold : float, optional
        Correlation below which the transformer works; chosen from `THRESHOLDS` unless given. The best one depends on the level.
    channels, kernel
        Of `Autoencoder`.
    patch, n_features, n_layers, n_heads, hidden
        Of `PatchTransformer`.
    autoencoder : Module, optional
        A trained one to keep, in place of training one: windows (n, n_times) of mean 0 and standard deviation 1 in, without noise out.
    epochs : (int, int, int), default (10, 10, 5)
        Of the autoencoder, of the transformer by squared error alone, and of the transformer against the discriminator.
    adversarial, spectral : float, default 0.01 and 0
        Weights of the discriminator's loss, and of the mean absolute difference of log power spectra, beside the squared error.
    batch_size : int, default 32
    learning_rate : float, default 2e-3
        Falls along a cosine to a hundredth of it. That of the discriminator, and of the transformer against it, is 2e-4.
    validation : float, default 0.1
        Share of the trials of `fit` that are not trained on. Weights are those of the epoch whose output correlates best there.
    folder : path, optional
        Where checkpoints are written.
    resume : bool, default False
        Go on from the checkpoints in `folder`.
    device : str, optional
    random_state : int, default 0
    progress : bool, default True

    Attributes
    ----------
    network_ : TargetedDenoiser
        In evaluation mode.
    threshold_ : float
    threshold_curve_ : array (n_thresholds,)
        Mean correlation with clean EEG on validation segments for each of `THRESHOLDS`; empty where one was given.
    n_parameters_ : int
        Of the autoencoder and the transformer: what cleaning needs.
    n_discriminator_parameters_ : int
        Of the discriminator, which only training needs.
    history_ : dict of History
        "autoencoder", "transformer" and "adversarial", as far as they were trained.

    Notes
    -----
    Clean EEG and noise are split into training and validation before they are paired, trial by trial, so that no segment is in both.
    `fit` takes noise where scikit-learn's pipelines give labels: fit first, then put ``FrozenEstimator(filter)`` into the pipeline.

    See Also
    --------
    WienerFilter, mix, plot_artifacts

    References
    ----------
    Removing Neural Signal Artifacts with Autoencoder-Targeted Adversarial Transformers (AT-AT) (2025). A reconstruction: layer sizes,
    threshold and weights of losses are not public.
    """

    def __init__(
        self, n_times: int = 512, sampling_rate: float = 256.0, snr_range: tuple[float, float] = (-7.0, 2.0),
        convention: str = "amplitude10", window: int = 64, gate: str = "window", threshold: float | None = None,
        channels: Sequence[int] = (16, 32, 32), kernel: int = 9, patch: int = 16, n_features: int = 64,
        n_layers: int = 3, n_heads: int = 4, hidden: int = 128, autoencoder: nn.Module | None = None,
        epochs: tuple[int, int, int] = (10, 10, 5), adversarial: float = 0.01, spectral: float = 0.0,
        batch_size: int = 32, learning_rate: float = 2e-3, validation: float = 0.1, folder: str | Path | None = None,
        resume: bool = False, device: str | None = None, random_state: int = 0, progress: bool = True,
    ) -> None:  # fmt: skip
        self.n_times = n_times
        self.sampling_rate = sampling_rate
        self.snr_range = snr_range
        self.convention = convention
        self.window = window
        self.gate = gate
        self.threshold = threshold
        self.channels = channels
        self.kernel = kernel
        self.patch = patch
        self.n_features = n_features
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.hidden = hidden
        self.autoencoder = autoencoder
        self.epochs = epochs
        self.adversarial = adversarial
        self.spectral = spectral
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.validation = validation
        self.folder = folder
        self.resume = resume
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def fit(self, clean: Any, noise: Any) -> EMGFilter:
        """Train on clean EEG and on muscle noise.

        Parameters
        ----------
        clean, noise : array (n, n_times) or (n_trials, n_channels, n_samples), DataArray or MNE Epochs
            Longer signals are cut end to end. Each segment is scaled to standard deviation 1. The two need not be equally many.

        Raises
        ------
        InputError
            Fewer than two trials, trials shorter than `n_times`, flat segments, no finite numbers, or parameters out of range.
        MissingExtraError
            Lightning, of the extra ``training``, is not installed.
        """
        self._check()
        training = need("nissl.recordings.training", "training")
        g = np.random.default_rng(self.random_state)
        (x, x_held), (n, n_held) = (
            _split(_segments(v, name, self.n_times, self.sampling_rate), self.validation, g)
            for v, name in ((clean, "clean"), (noise, "noise"))
        )
        device = torch.device(self.device or "cpu")
        with seeded(self.random_state):
            given = self.autoencoder
            autoencoder = Autoencoder(self.channels, self.kernel) if given is None else deepcopy(given)
            transformer = PatchTransformer(self.patch, self.n_features, self.n_layers, self.n_heads, self.hidden)
            discriminator = Discriminator(self.n_times)
        denoiser = TargetedDenoiser(autoencoder, transformer, self.window, self.gate)
        if self.threshold is not None:
            denoiser.threshold.fill_(self.threshold)
        both = _Both(denoiser, discriminator).to(device)
        x, n, n_held = (v.to(device) for v in (x, n, n_held))
        levels = torch.linspace(*self.snr_range, 10, device=device)[torch.arange(len(x_held)) % 10, None]
        paired = n_held[torch.from_numpy(g.integers(len(n_held), size=len(x_held)))]
        held = _scaled(x_held.to(device), paired, levels, _scale(self.convention))
        self.history_ = {}
        for phase, (part, epochs) in enumerate(
            zip(("autoencoder", "transformer", "adversarial"), self.epochs, strict=True)
        ):
            if not epochs or (part == "autoencoder" and self.autoencoder is not None):
                continue
            self.history_[part] = training.train(
                both, (x,), **self._game(training, part, both, n), epochs=epochs, batch_size=self.batch_size,
                final_learning_rate=None if part == "adversarial" else self.learning_rate / 100,
                validate=_Validation(*held, denoiser, alone=part == "autoencoder"),
                folder=None if self.folder is None else as_path("folder", self.folder) / part, resume=self.resume,
                seed=self.random_state + phase, device=device, progress=self.progress,
            )  # fmt: skip
        both.eval()
        self.threshold_curve_ = np.empty(0)
        if self.threshold is None:
            self.threshold_curve_ = _threshold_curve(denoiser, *held)
            denoiser.threshold.fill_(THRESHOLDS[int(self.threshold_curve_.argmax())])
        self.threshold_ = round(float(denoiser.threshold), 6)
        self.network_ = denoiser.requires_grad_(False)
        self.n_parameters_ = _count(denoiser)
        self.n_discriminator_parameters_ = _count(discriminator)
        return self

    def _check(self) -> None:
        for name in (
            "n_times",
            "window",
            "patch",
            "n_features",
            "n_layers",
            "n_heads",
            "hidden",
            "batch_size",
            "kernel",
        ):
            at_least(name, getattr(self, name), 1)
        at_least("random_state", self.random_state, 0)
        as_rate(self.sampling_rate)
        _scale(self.convention)
        channels = items("channels", self.channels)
        if not channels or not all(is_whole(c) and c > 0 for c in channels):
            raise InputError(f"channels must be whole numbers above 0, at least one; got {self.channels!r}")
        step = int(np.lcm.reduce([16, self.patch, 2 ** len(channels)]))
        if self.n_times % step or self.kernel % 2 == 0:
            raise InputError(
                f"n_times={self.n_times} must be a multiple of {step} (16, the patch, 2 for each block), and kernel={self.kernel} odd"
            )
        if self.window < 4 or self.gate not in ("window", "segment"):
            raise InputError(f"window={self.window} must be at least 4, gate={self.gate!r} 'window' or 'segment'")
        levels = items("snr_range", self.snr_range)
        if len(levels) != 2 or not all(map(is_number, levels)) or levels[0] > levels[1]:
            raise InputError(f"snr_range must be two numbers of dB, the lower one first; got {self.snr_range!r}")
        epochs = items("epochs", self.epochs)
        if len(epochs) != 3 or not all(is_whole(e) and e >= 0 for e in epochs):
            raise InputError(
                f"epochs must be three whole numbers (autoencoder, transformer, adversarial), got {self.epochs!r}"
            )
        for name in ("adversarial", "spectral"):
            if not is_number(getattr(self, name)) or getattr(self, name) < 0:
                raise InputError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        if not is_number(self.validation) or not 0 < self.validation < 1:
            raise InputError(f"validation must be a share between 0 and 1, got {self.validation!r}")
        if self.threshold is not None and not (is_number(self.threshold) and -1 <= self.threshold <= 1.1):
            raise InputError(f"threshold must be a correlation, or 1.1 for everywhere; got {self.threshold!r}")
        if self.autoencoder is not None:
            instance("autoencoder", self.autoencoder, nn.Module)

    def _game(self, training: Any, part: str, both: _Both, noise: Tensor) -> dict[str, Any]:
        """Whose loss is lowered in a part of the training, and by which parameters; each step mixes anew."""
        denoiser, discriminator = both.denoiser, both.discriminator
        scale = _scale(self.convention)
        frozen = part != "autoencoder"
        denoiser.autoencoder.requires_grad_(not frozen)

        def mixture(x: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
            drawn = noise[torch.randint(len(noise), (len(x),), generator=g).to(x.device)]
            low, high = self.snr_range
            levels = (low + (high - low) * torch.rand(len(x), 1, generator=g)).to(x.device)
            return _scaled(x, drawn, levels, scale)

        def autoencoder_loss(batch: tuple[Tensor], g: torch.Generator) -> dict[str, Tensor]:
            y, x = mixture(batch[0], g)
            return {"squared error": F.mse_loss(denoiser.autoencoder(y), x)}

        def targeted(y: Tensor, g: torch.Generator) -> Tensor:
            denoiser.autoencoder.eval()  # batch norm as in use
            with torch.no_grad():
                coarse, correlation = denoiser.judge(y)
                low = THRESHOLDS[0] + (1 - THRESHOLDS[0]) * torch.rand(len(y), 1, generator=g).to(y.device)
                mask = denoiser.mask(correlation, low if self.threshold is None else None)
            return denoiser.compose(y, coarse, mask)[0]

        def transformer_loss(batch: tuple[Tensor], g: torch.Generator) -> dict[str, Tensor]:
            y, x = mixture(batch[0], g)
            found = targeted(y, g)
            losses = {"squared error": F.mse_loss(found, x)}
            if self.spectral:
                losses["spectrum"] = self.spectral * (log_power(found) - log_power(x)).abs().mean()
            if part == "adversarial":
                logits = discriminator(found)
                losses["adversary"] = self.adversarial * F.softplus(-logits).mean()
            return losses

        def discriminator_loss(batch: tuple[Tensor], g: torch.Generator) -> dict[str, Tensor]:
            y, x = mixture(batch[0], g)
            with torch.no_grad():
                found = targeted(y, g)
            real, fake = discriminator(torch.cat([x, found])).chunk(2)
            return {"discriminator": F.softplus(-real).mean() + F.softplus(fake).mean()}

        parameters = list(denoiser.transformer.parameters())
        if part == "autoencoder":
            trained = list(denoiser.autoencoder.parameters())
            return {"loss": autoencoder_loss, "parameters": trained, "learning_rate": self.learning_rate}
        if part == "transformer":
            return {"loss": transformer_loss, "parameters": parameters, "learning_rate": self.learning_rate}
        return {
            "players": [
                training.Player(discriminator_loss, list(discriminator.parameters()), 2e-4, betas=(0.5, 0.999)),
                training.Player(transformer_loss, parameters, 2e-4),
            ]
        }

    def _of_windows(self, z: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            device = self.network_.threshold.device
            found = [
                self.network_.clean(torch.from_numpy(part).float().to(device))
                for part in np.split(z, range(ROWS, len(z), ROWS))
            ]
        parts = {
            "output": [f.output for f in found],
            "share": [f.share for f in found],
            "noise": [1 - f.correlation.clamp(0, 1) for f in found],
        }
        return {name: torch.cat(v).double().cpu().numpy() for name, v in parts.items()}

    def noise_map(self, X: Any) -> xr.DataArray:
        """How noisy each sample was judged: 1 minus the local correlation of the autoencoder's output with its input.

        A heuristic: where EEG is weak, or unlike that of `fit`, the two agree poorly without noise. Flat windows have 0.

        Parameters
        ----------
        X : as of `transform`

        Returns
        -------
        DataArray of the shape of X
            From 0 to 1 (correlations below 0 count as 0), the last dimensions ("trial", "channel", "time").
        """
        check_is_fitted(self)
        found, shape = self._through(X)
        attrs = {"method": "EMGFilter.noise_map", "threshold": self.threshold_, "window": self.window}
        return xr.DataArray(found["noise"], dims=TRIALS[-len(shape) :], attrs=attrs, name="noise map")

    def which_stage(self, X: Any) -> np.ndarray:
        """True where the transformer had a part in the output, False where the autoencoder made it alone; of the shape of X."""
        check_is_fitted(self)
        return self._through(X)[0]["share"] > 0


def _scaled(x: Tensor, n: Tensor, levels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Mixtures, and their clean parts, both divided by the mixture's standard deviation."""
    y = x + _gain(x, n, levels, scale) * n
    size = y.std(1, keepdim=True, correction=0)
    return y / size, x / size


def _split(trials: list[np.ndarray], share: float, g: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Segments of the trials to train on, and of those to validate on."""
    order = g.permutation(len(trials))
    held = min(max(1, round(share * len(trials))), len(trials) - 1)
    train, validate = (
        torch.from_numpy(np.concatenate([trials[i] for i in some])).float() for some in (order[held:], order[:held])
    )
    return train, validate


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of rows (n, n_times): (n,)."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1)


@dataclass(frozen=True, eq=False)
class _Validation:
    """Mean correlation with clean EEG of the autoencoder alone, or of both stages."""

    y: Tensor
    x: Tensor
    denoiser: TargetedDenoiser
    alone: bool

    def __call__(self, model: nn.Module) -> float:
        """Of the held-out segments."""
        stage = self.denoiser.autoencoder if self.alone else self.denoiser
        found = torch.cat([stage(part) for part in self.y.split(ROWS)])
        return float(_correlations(found, self.x).mean())


@torch.no_grad()
def _threshold_curve(denoiser: TargetedDenoiser, y: Tensor, x: Tensor) -> np.ndarray:
    """Mean correlation of the output with clean EEG, for each of `THRESHOLDS`."""
    found = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
    for part, clean in zip(y.split(ROWS), x.split(ROWS), strict=True):
        coarse, correlation = denoiser.judge(part)
        for k, threshold in enumerate(THRESHOLDS):
            mask = denoiser.mask(correlation, torch.full((len(part), 1), threshold, device=part.device))
            found[k] += _correlations(denoiser.compose(part, coarse, mask)[0], clean).double().sum().cpu()
    return (found / len(y)).numpy()


def plot_artifacts(
    emg_filter: EMGFilter, x: Any, *, clean: Any = None, channels: Sequence[str] | None = None, axes: Any = None
) -> Any:
    """Picture of one trial: each channel before and after, its noise map below, and where the transformer worked.

    Parameters
    ----------
    emg_filter : EMGFilter
        Fitted.
    x : array (n_channels, n_times) or (n_times,)
    clean : array of the same shape, optional
        Drawn beside, where it is known.
    channels : sequence of str, optional
    axes : array of matplotlib Axes (n_channels,), optional

    Returns
    -------
    array of Axes (n_channels,)
    """
    import matplotlib.pyplot as plt

    instance("emg_filter", emg_filter, EMGFilter)
    noisy = np.atleast_2d(_real(x, "x"))
    if noisy.ndim != 2:
        raise InputError(f"x must be one trial (n_channels, n_times), got {noisy.shape}")
    truth = None if clean is None else np.atleast_2d(_real(clean, "clean"))
    if truth is not None and truth.shape != noisy.shape:
        raise InputError(f"clean {truth.shape} and x {noisy.shape} must have one shape")
    n = len(noisy)
    names = [str(k) for k in range(n)] if channels is None else list(channels)
    if len(names) != n:
        raise InputError(f"channels must be {n} names, got {len(names)}")
    found, heat, stage = emg_filter.transform(noisy), emg_filter.noise_map(noisy).values, emg_filter.which_stage(noisy)
    time = np.arange(noisy.shape[1]) / emg_filter.sampling_rate
    if axes is None:
        axes = plt.subplots(n, 1, figsize=(8, 0.6 + 1.5 * n), sharex=True, layout="constrained", squeeze=False)[1][:, 0]
    axes = np.atleast_1d(axes)
    if len(axes) != n:
        raise InputError(f"axes must be {n}, one for each channel; got {len(axes)}")
    for k, ax in enumerate(axes):
        low, high = noisy[k].min(), noisy[k].max()
        strip = 0.12 * (high - low)
        ax.plot(time, noisy[k], color="0.7", linewidth=0.7, label="noisy")
        if truth is not None:
            ax.plot(time, truth[k], color="0.1", linewidth=0.9, label="clean")
        ax.plot(time, found[k], color="tab:blue", linewidth=1.1, label="cleaned")
        ax.fill_between(time, 0, 1, where=stage[k], transform=ax.get_xaxis_transform(), color="tab:orange", alpha=0.12,
                        linewidth=0, label="transformer")  # fmt: skip
        image = ax.imshow(heat[k][None], aspect="auto", cmap="Reds", vmin=0, vmax=1,
                          extent=(time[0], time[-1], low - 2 * strip, low - strip))  # fmt: skip
        ax.set_ylim(low - 2 * strip, high + strip)
        ax.set_xlim(time[0], time[-1])
        ax.set_ylabel(names[k])
        ax.figure.colorbar(image, ax=ax, label="noise", ticks=[0, 1])
    axes[0].legend(loc="upper right", fontsize="small", ncols=4)
    axes[-1].set_xlabel("time (s)")
    return axes
