"""EEGFormer: a transformer of single channels that is pretrained through a codebook, and what its codes say of a class.

Windows of each channel are cut into patches of amplitude spectra (or of samples), encoded, replaced by the nearest vectors of a
codebook, and reconstructed from these. The encoder is fine-tuned or probed; sequences of codes, counted as n-grams and fed to naive
Bayes, say which patterns speak for a class, and where.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from scipy.sparse import csr_matrix
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import as_path, at_least, flag, instance, is_number
from nissl.errors import InputError, said
from nissl.recordings.arrays import as_labels, as_rate, as_trials
from nissl.recordings.quantise import VectorQuantizer
from nissl.recordings.transformer import Encoder
from nissl.seeds import seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nissl.recordings.training import History

SIZES = {"small": (6, 512), "base": (8, 1024), "large": (12, 2048)}
"""Encoder layers and codes."""
DOMAINS = ("patch-fft", "fft", "time")
MODES = ("finetune", "probe", "scratch")
FLOOR = 1e-3
"""Added to amplitudes before the logarithm; a channel of white noise with variance 1 has amplitudes around 1."""
_FORMAT = "nissl-eegformer-1"
_MOST_CODES = 2**20  # three of them fit in one int64


# ---------------------------------------------------------------- the network


class EEGFormer(nn.Module):
    """Encoder, codebook and decoder of windows of EEG; every channel goes through them alone, by the same weights.

    Parameters
    ----------
    n_times : int, default 3000
        Samples of a window.
    sampling_rate : float, default 250
        In Hz.
    domain : {"patch-fft", "fft", "time"}, default "patch-fft"
        What patches are cut from: "patch-fft": windows are cut in time, and a patch is the amplitude spectrum of its piece;
        "fft": one spectrum of the whole window is cut along frequency, so that codes have no time; "time": samples.
        Amplitudes leave out phase: responses that are locked to an event want "time".
    patch, stride : int, optional
        Length of a patch, and from one to the next: samples, one second of them unless given; for "fft" bins of frequency, 50 and
        25. `stride` is `patch` where only that is given. What does not fill a patch at the end is left out.
    size : {"small", "base", "large"}, default "small"
        Encoder layers and codes: 6 and 512, 8 and 1024, 12 and 2048.
    n_layers, n_codes : int, optional
        In place of those of `size`.
    n_features, n_heads, n_decoder_layers : int, default 128, 8, 3
    dropout : float, default 0.1
    log : bool, optional
        Logarithm of amplitudes; by default for "patch-fft" only.
    band : (float, float), optional
        Frequencies in Hz that are kept, ends included; all but 0 unless given.
    mask_ratio : float, default 0
        Share of patches that are hidden from the encoder in pretraining.
    update : {"ema", "gradient"}, default "ema"
        How the codebook learns: from running means of what is assigned to it, or by gradient as summaries of the paper have it.
    commitment : float, default 0.25
    revive_after : int or None, default 50
        Codes that so many batches did not use start anew.

    Attributes
    ----------
    n_patches, patch_values : int
        Patches of a window, and numbers in each.

    Notes
    -----
    Amplitudes are taken of channels with mean 0 and variance 1 over the window, and the patches of a window and channel have mean 0
    and variance 1 again: gain and unit of a recording change nothing, and absolute power, which tells slowing and many artefacts, is
    gone. `moments` gives it back to a head.

    See Also
    --------
    EEGFormerClassifier, CodeNgramNB, nissl.recordings.quantise.VectorQuantizer

    References
    ----------
    Chen et al. (2024). EEGFormer: Towards transferable and interpretable large-scale EEG foundation model. arXiv:2401.10278.
    The authors' code is not public: patch length, stride, heads and the weight of the commitment are choices.
    """

    def __init__(
        self, n_times: int = 3000, *, sampling_rate: float = 250.0,
        domain: str = "patch-fft", patch: int | None = None, stride: int | None = None, size: str = "small", n_layers: int | None = None,
        n_codes: int | None = None, n_features: int = 128, n_heads: int = 8, n_decoder_layers: int = 3, dropout: float = 0.1,
        log: bool | None = None, band: Sequence[float] | None = None, mask_ratio: float = 0.0,
        update: str = "ema", commitment: float = 0.25, revive_after: int | None = 50,
    ) -> None:  # fmt: skip
        super().__init__()
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        at_least("n_times", n_times, 2)
        at_least("n_features", n_features, 1)
        rate = as_rate(sampling_rate)
        if domain not in DOMAINS:
            raise InputError(f"domain must be one of {', '.join(DOMAINS)}, got {domain!r}")
        if size not in SIZES:
            raise InputError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        if not is_number(mask_ratio) or not 0 <= mask_ratio < 1:
            raise InputError(f"mask_ratio must be a share in [0, 1), got {mask_ratio!r}")
        if log is not None:
            flag("log", log)
        if domain == "time" and (log or band is not None):
            raise InputError("log and band are of spectra; domain='time' has none")
        self.config: dict[str, Any] = given | {"band": None if band is None else [float(f) for f in band]}
        self.n_times, self.sampling_rate, self.domain = int(n_times), rate, domain
        self.patch = patch or (50 if domain == "fft" else max(2, round(rate)))
        self.stride = stride or (25 if domain == "fft" and patch is None else self.patch)
        for name, value in (("patch", self.patch if patch is None else patch), ("stride", self.stride if stride is None else stride)):  # fmt: skip
            at_least(name, value, 1)
        self.log = domain == "patch-fft" if log is None else log
        self.mask_ratio = float(mask_ratio)
        bins = torch.fft.rfftfreq(self.patch if domain == "patch-fft" else n_times, 1 / rate)
        kept = bins > 0
        if band is not None:
            if len(band) != 2 or not all(map(is_number, band)) or not 0 <= band[0] < band[1]:
                raise InputError(f"band must be two frequencies in Hz, the lower first; got {band!r}")
            kept &= (bins >= band[0]) & (bins <= band[1])
        self._kept: Tensor
        self.register_buffer("_kept", kept.nonzero().flatten(), persistent=False)
        length = int(kept.sum()) if domain == "fft" else n_times
        if length < self.patch or not kept.any():
            what = f"{length} {'bins of frequency' if domain == 'fft' else 'samples'}"
            raise InputError(f"windows of {what} hold no patch of {self.patch}, or no frequency of band={band!r}")
        self.n_patches = (length - self.patch) // self.stride + 1
        self.patch_values = int(kept.sum()) if domain == "patch-fft" else self.patch
        layers, codes = SIZES[size]
        learns: dict[str, Any] = {"update": update, "commitment": commitment, "revive_after": revive_after}
        self.embed = nn.Linear(self.patch_values, n_features)
        self.places = nn.Parameter(0.02 * torch.randn(self.n_patches, n_features))
        self.hidden = nn.Parameter(0.02 * torch.randn(n_features))
        self.encoder = Encoder(layers if n_layers is None else n_layers, n_features, n_heads, dropout=dropout)
        self.quantizer = VectorQuantizer(
            codes if n_codes is None else n_codes, n_features, metric="euclidean", **learns
        )
        if self.quantizer.n_codes > _MOST_CODES:
            raise InputError(f"n_codes must be at most {_MOST_CODES}, got {n_codes}")
        self.decoder_places = nn.Parameter(0.02 * torch.randn(self.n_patches, n_features))
        self.decoder = Encoder(n_decoder_layers, n_features, n_heads, dropout=dropout)
        self.out = nn.Linear(n_features, self.patch_values)

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.parameters())
        return f"EEGFormer({self.domain}, {self.n_patches} patches of {self.patch}, {self.n_codes} codes, {n:,} parameters)"

    @property
    def n_codes(self) -> int:
        """Vectors in the codebook."""
        return self.quantizer.n_codes

    @property
    def pretrained(self) -> bool:
        """Whether the codebook has learnt from data; before that codes mean nothing."""
        return bool(self.quantizer.started)

    @property
    def starts(self) -> np.ndarray:
        """Where patches start (n_patches,): seconds, or Hz for the domain "fft"."""
        first = self.stride * np.arange(self.n_patches)
        return self.frequencies[:, 0] if self.domain == "fft" else first / self.sampling_rate

    @property
    def frequencies(self) -> np.ndarray:
        """In Hz: of the numbers of a patch (patch_values,), or of each patch (n_patches, patch_values) for the domain "fft"."""
        if self.domain == "time":
            raise InputError("patches of the domain 'time' hold samples, no frequencies")
        n = self.n_times if self.domain == "fft" else self.patch
        kept = np.fft.rfftfreq(n, 1 / self.sampling_rate)[self._kept.cpu().numpy()]
        if self.domain == "patch-fft":
            return kept
        return np.lib.stride_tricks.sliding_window_view(kept, self.patch)[:: self.stride]

    # ------------------------------------------------------------ tensors, one batch

    def patches(self, X: Float[Tensor, "n channels times"]) -> Float[Tensor, "n channels patches values"]:
        """What is encoded and reconstructed: patches with mean 0 and variance 1 over those of a window and channel."""
        x = _normalised(X.to(self.embed.weight.dtype), (-1,))
        if self.domain == "time":
            cut = x.unfold(-1, self.patch, self.stride)
        elif self.domain == "patch-fft":
            cut = self._amplitudes(x.unfold(-1, self.patch, self.stride))
        else:
            cut = self._amplitudes(x).unfold(-1, self.patch, self.stride)
        return _normalised(cut, (-2, -1))

    def _amplitudes(self, x: Tensor) -> Tensor:
        found = torch.fft.rfft(x, norm="ortho").abs()[..., self._kept]
        return (found + FLOOR).log() if self.log else found

    def moments(self, X: Float[Tensor, "n channels times"]) -> Float[Tensor, "n channels 2"]:
        """Mean and logarithm of the standard deviation of each channel: what the normalisation takes away."""
        X = X.to(self.embed.weight.dtype)
        return torch.stack([X.mean(-1), X.std(-1, correction=0).clamp_min(1e-30).log()], -1)

    def encode(self, X: Float[Tensor, "n channels times"]) -> Float[Tensor, "n channels patches features"]:
        """The encoder's answer for each patch."""
        return self._encode(self.patches(X))

    def forward(self, X: Float[Tensor, "n channels times"]) -> Float[Tensor, "n channels patches features"]:
        """As `encode`."""
        return self.encode(X)

    def _encode(self, patches: Tensor, hide: Tensor | None = None) -> Tensor:
        tokens = self.embed(patches)
        if hide is not None:
            tokens = torch.where(hide[..., None], self.hidden, tokens)
        return self.encoder((tokens + self.places).flatten(0, 1)).unflatten(0, patches.shape[:2])

    def _decode(self, values: Tensor) -> Tensor:
        return self.out(self.decoder((values + self.decoder_places).flatten(0, 1))).unflatten(0, values.shape[:2])

    def loss(self, X: Float[Tensor, "n channels times"], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """What pretraining minimises: "reconstruction" (mean squared), "commitment", and "codebook" where it learns by gradient.

        Parameters
        ----------
        X : Tensor (n, n_channels, n_times)
        generator : torch.Generator, optional
            On the CPU; draws the hidden patches.
        """
        patches, hide = self.patches(X), None
        if self.mask_ratio:
            hide = (torch.rand(patches.shape[:-1], generator=generator) < self.mask_ratio).to(patches.device)
        found = self.quantizer(self._encode(patches, hide))
        return {"reconstruction": F.mse_loss(self._decode(found.values), patches), **found.losses}

    # ------------------------------------------------------------ arrays, any number of windows

    def codes(self, X: Any) -> np.ndarray:
        """Codes of windows.

        Parameters
        ----------
        X : array (n, n_channels, n_times), DataArray or MNE Epochs

        Returns
        -------
        array of int (n, n_channels, n_patches)
        """
        return self._each(self.as_windows(X), lambda x: self.quantizer.encode(self.encode(x)))

    def distances(self, X: Any) -> np.ndarray:
        """Squared distance of each patch's encoding to the vector of its code: (n, n_channels, n_patches)."""

        def one(x: Tensor) -> Tensor:
            h = self.encode(x)
            return (h - self.quantizer.decode(self.quantizer.encode(h))).square().sum(-1)

        return self._each(self.as_windows(X), one)

    def decode(self, codes: Any) -> np.ndarray:
        """Patches that the decoder makes of codes (n, n_channels, n_patches): (n, n_channels, n_patches, patch_values)."""
        found = as_codes(codes, self.n_codes)
        if found.shape[2] != self.n_patches:
            raise InputError(f"codes have {found.shape[2]} patches, the model {self.n_patches}")
        return self._each(torch.from_numpy(found), lambda c: self._decode(self.quantizer.decode(c)))

    def as_windows(self, X: Any, channels: int | None = None) -> Tensor:
        """Windows, checked, as float32; of `n_times` samples."""
        found = as_trials(X, channels=channels)
        if found.shape[2] != self.n_times:
            raise InputError(f"windows have {found.shape[2]} times, the model takes {self.n_times}")
        with np.errstate(over="ignore"):
            return _finite(torch.from_numpy(found.astype(np.float32)))

    def _each(self, X: Tensor, function: Callable[[Tensor], Tensor], size: int = 64) -> np.ndarray:
        """A function of batches of X, in evaluation mode and without gradients."""
        training, device = self.training, self.embed.weight.device
        self.eval()
        try:
            with torch.inference_mode():
                return torch.cat([function(x.to(device)).cpu() for x in X.split(size)]).numpy()
        finally:
            self.train(training)

    # ------------------------------------------------------------ learning

    def pretrain(
        self, X: Any, *, epochs: int = 100, batch_size: int = 32, learning_rate: float = 1e-4,
        weight_decay: float = 0.01, folder: str | Path | None = None, resume: bool = False,
        device: str | torch.device | None = None, devices: int = 1, seed: int = 0, progress: bool = True,
    ) -> History:  # fmt: skip
        """Learn encoder, codebook and decoder from unlabelled windows, in place.

        Parameters
        ----------
        X : array (n, n_channels, n_times), DataArray or MNE Epochs
            Keep windows of subjects that are tested later out of it.
        epochs, batch_size, learning_rate, weight_decay
            AdamW; the learning rate falls to 0 along a cosine.
        folder, resume, device, devices, seed, progress
            As of `nissl.recordings.training.train`.

        Returns
        -------
        History
            ``parts`` holds the losses by name.
        """
        from nissl.recordings.training import train

        windows = self.as_windows(X)
        if device is not None:
            self.to(device)
        if not self.pretrained:
            with seeded(seed):
                chosen = windows[torch.randperm(len(windows))[: _enough(self, windows)]]
                self.quantizer.start(torch.from_numpy(self._each(chosen, self.encode)))
        return train(
            self, (windows,), lambda batch, g: self.loss(batch[0].to(self.embed.weight.device), g), epochs=epochs,
            batch_size=batch_size, learning_rate=learning_rate, final_learning_rate=0.0, weight_decay=weight_decay,
            folder=folder, resume=resume, device=device, devices=devices, seed=seed, progress=progress,
        )  # fmt: skip

    def fresh(self, seed: int = 0) -> EEGFormer:
        """The same architecture with new weights that `seed` draws, on the CPU."""
        with seeded(seed):
            return type(self)(**self.config)

    def save(self, path: str | Path) -> Path:
        """Write weights and parameters to one safetensors file, whole or not at all.

        Raises
        ------
        InputError
            It cannot be written.
        """
        from safetensors.torch import save_file

        file, part = as_path("path", path), None
        try:
            handle, part = tempfile.mkstemp(prefix=".part-", suffix=".safetensors", dir=file.parent)
            os.close(handle)
            tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
            save_file(tensors, part, {"format": _FORMAT, "config": json.dumps(self.config)})
            os.replace(part, file)
        except OSError as error:
            raise InputError(f"the model cannot be written to {file}: {said(error)}") from error
        finally:
            if part is not None and os.path.exists(part):
                os.unlink(part)
        return file

    @classmethod
    def load(cls, path: str | Path) -> EEGFormer:
        """The model that `save` wrote; nothing is unpickled.

        Raises
        ------
        InputError
            No such file, or none of an EEGFormer.
        """
        from safetensors import SafetensorError, safe_open

        file = as_path("path", path)
        try:
            with safe_open(file, "pt") as held:
                about = held.metadata() or {}
                if about.get("format") != _FORMAT:
                    raise InputError(f"{file} holds no EEGFormer")
                model = cls(**json.loads(about["config"]))
                model.load_state_dict({k: held.get_tensor(k) for k in held.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{file} cannot be read as an EEGFormer: {said(error)}") from error
        return model.eval()


def _normalised(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Mean 0 and variance 1 along axes, 0 where nothing varies but by rounding.

    x is brought to sizes up to 1 first, so that what is added to its variance is small in whatever unit x comes.
    """
    most = x.detach().abs().amax(axes, keepdim=True)
    x = x - x.mean(axes, keepdim=True)
    size = x.detach().abs().amax(axes, keepdim=True)
    varies = size > 1e-6 * most
    x = torch.where(varies, x, 0.0) / torch.where(varies, size, 1.0)
    x = x - x.mean(axes, keepdim=True)  # what rounding left of a mean far from 0
    return x / (x.var(axes, correction=0, keepdim=True) + 1e-10).sqrt()


def _finite(x: Tensor) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise InputError("X holds numbers too large for float32: take another unit")
    return x


def _enough(model: EEGFormer, windows: Tensor) -> int:
    """Windows that hold about 20 patches a code, 32 at least."""
    return max(32, math.ceil(20 * model.n_codes / (windows.shape[1] * model.n_patches)))


def windows_of(
    X: Any, *, seconds: float = 12.0, step: float | None = None, sampling_rate: float | None = None, rate: float = 250.0
) -> xr.DataArray:
    """A continuous recording resampled and cut into windows.

    Parameters
    ----------
    X : array (n_channels, n_times) or DataArray ("channel", "time")
    seconds : float, default 12
        Length of a window.
    step : float, optional
        From one window to the next; `seconds` unless given.
    sampling_rate : float, optional
        Of X, in Hz; by default what its ``attrs`` say.
    rate : float, default 250
        That of the windows, in Hz.

    Returns
    -------
    DataArray ("trial", "channel", "time")
        ``start`` of each window in seconds from the first sample.
    """
    from fractions import Fraction

    from scipy.signal import resample_poly

    attrs = dict(X.attrs) if isinstance(X, xr.DataArray) else {}
    old = as_rate(attrs.get("sampling_rate") if sampling_rate is None else sampling_rate)
    new = as_rate(rate, "rate")
    names = X["channel"].values if isinstance(X, xr.DataArray) and "channel" in X.coords else None
    if isinstance(X, xr.DataArray) and set(X.dims) == {"channel", "time"}:
        X = X.transpose("channel", "time").values
    data = as_trials(np.asarray(X)[None])[0]
    share = Fraction(new / old).limit_denominator(10_000)
    data = data if share == 1 else resample_poly(data, share.numerator, share.denominator, axis=1)
    for name, value in (("seconds", seconds), ("step", seconds if step is None else step)):
        if not is_number(value) or round(value * new) < 1:
            raise InputError(f"{name} must be a number of seconds that holds a sample, got {value!r}")
    n, hop = round(seconds * new), round((seconds if step is None else step) * new)
    if data.shape[1] < n:
        raise InputError(f"the recording of {data.shape[1] / new:g} s holds no window of {seconds:g} s")
    cut = np.lib.stride_tricks.sliding_window_view(data, n, axis=1)[:, ::hop].transpose(1, 0, 2)
    coords: dict[str, Any] = {"time": np.arange(n) / new, "start": ("trial", hop * np.arange(len(cut)) / new)}
    if names is not None:
        coords["channel"] = names
    return xr.DataArray(
        cut.copy(), dims=("trial", "channel", "time"), coords=coords, attrs=attrs | {"sampling_rate": new}
    )


# ---------------------------------------------------------------- classes


class EEGFormerNetwork(nn.Module):
    """Class scores of windows: the encoder, means over patches, a linear layer.

    Parameters
    ----------
    model : EEGFormer
    n_channels, n_classes : int
    pool : {"mean", "concat"}
        Of channels. After "mean" any number of channels is taken.
    moments, quantised : bool
        Of `EEGFormerClassifier`.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self, model: EEGFormer, n_channels: int, n_classes: int, pool: str = "mean", moments: bool = False,
        quantised: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.pool, self.moments, self.quantised = model, pool, moments, quantised
        n = model.places.shape[1] + 2 * moments
        n *= n_channels if pool == "concat" else 1
        self.register_buffer("centre", torch.zeros(n))
        self.register_buffer("scale", torch.ones(n))
        self.head = nn.Linear(n, n_classes)

    def features(self, X: Float[Tensor, "n channels times"]) -> Float[Tensor, "n features"]:
        """What the linear layer takes, before it is centred and scaled."""
        h = self.model.encode(X)
        if self.quantised:
            h = self.model.quantizer.decode(self.model.quantizer.encode(h))
        found = h.mean(2)
        if self.moments:
            found = torch.cat([found, self.model.moments(X)], -1)
        return found.mean(1) if self.pool == "mean" else found.flatten(1)

    def forward(self, X: Float[Tensor, "n channels times"]) -> Float[Tensor, "n classes"]:
        """Logits."""
        return self.head((self.features(X) - self.centre) / self.scale)


class EEGFormerClassifier(ClassifierMixin, BaseEstimator):
    """Classifies windows by a pretrained EEGFormer, or by one that starts from nothing.

    Parameters
    ----------
    model : EEGFormer or mapping, optional
        A model, which is copied and stays as it is; or the parameters of one, besides ``n_times``. One that is not pretrained is
        pretrained by `pretrain`, or else on the windows of `fit`, without their labels.
    mode : {"finetune", "probe", "scratch"}, default "finetune"
        "probe": the encoder is frozen, and the head a logistic regression; "scratch": new weights.
    pool : {"mean", "concat"}, default "mean"
        How the channels of a window are joined; "mean" does not mind their number or order.
    moments : bool, default False
        Give the head mean and log standard deviation of each channel, which the normalisation takes away.
    quantised : bool, default False
        Probe the vectors of the codes in place of the encoder's answers.
    C : float, default 1
        Probe: inverse of the penalty.
    epochs, batch_size, learning_rate, weight_decay
        Of fine-tuning: AdamW; the learning rate falls to 0 along a cosine.
    pretrain_epochs : int, default 100
    pretrain_rate : float, default 1e-4
        Learning rate of pretraining.
    device : str, optional
    folder : path, optional
        For checkpoints, in folders ``pretrain`` and ``fit`` in it.
    resume : bool, default False
        Go on from the checkpoints in `folder`.
    random_state : int, default 0
    progress : bool, default True

    Attributes
    ----------
    classes_ : array
    network_ : EEGFormerNetwork
        From windows to logits: ``nissl.Network(classifier.network_, dims=("channel", "time"))`` explains it.
    model_ : EEGFormer
        That of `network_`.
    pretrained_ : EEGFormer
        After `pretrain`. `clone`, and so cross-validation, forgets it: pass it on as `model` there.
    history_ : History or None
        Of fine-tuning.

    See Also
    --------
    EEGFormer, CodeNgramNB

    References
    ----------
    Chen et al. (2024). EEGFormer: Towards transferable and interpretable large-scale EEG foundation model. arXiv:2401.10278.
    """

    def __init__(
        self, model: EEGFormer | Mapping[str, Any] | None = None, mode: str = "finetune", *, pool: str = "mean",
        moments: bool = False, quantised: bool = False, C: float = 1.0, epochs: int = 50, batch_size: int = 32,
        learning_rate: float = 1e-4, weight_decay: float = 0.01, pretrain_epochs: int = 100,
        pretrain_rate: float = 1e-4, device: str | None = None, folder: str | Path | None = None, resume: bool = False,
        random_state: int = 0, progress: bool = True,
    ) -> None:  # fmt: skip
        self.model = model
        self.mode = mode
        self.pool = pool
        self.moments = moments
        self.quantised = quantised
        self.C = C
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.pretrain_epochs = pretrain_epochs
        self.pretrain_rate = pretrain_rate
        self.device = device
        self.folder = folder
        self.resume = resume
        self.random_state = random_state
        self.progress = progress

    def pretrain(self, X: Any) -> EEGFormerClassifier:
        """Pretrain a copy of the model on unlabelled windows (n, n_channels, n_times), for `fit` to begin with.

        A model that is pretrained already goes on from its weights.
        """
        X = as_trials(X)
        self._check()
        self.pretrained_ = self._pretrain(self._model(X.shape[2]), X)
        return self

    def fit(self, X: Any, y: Any) -> EEGFormerClassifier:
        """Learn from windows (n, n_channels, n_times) and labels (n,)."""
        X = as_trials(X)
        y = as_labels(y, len(X))
        self._check()
        classes, places = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"y holds one class only, {classes[0]!r}: nothing can be told apart")
        model = self._model(X.shape[2])
        if self.mode == "scratch":
            model = model.fresh(self.random_state)
        elif hasattr(self, "pretrained_"):
            model = deepcopy(self.pretrained_)
        elif not model.pretrained:
            model = self._pretrain(model, X)
        windows = model.as_windows(X)
        with seeded(self.random_state):
            network = EEGFormerNetwork(model, X.shape[1], len(classes), self.pool, self.moments, self.quantised)
        network.to(self.device or model.embed.weight.device)
        features = model._each(windows, network.features)
        centre, scale = features.mean(0), features.std(0)
        scale[scale <= 1e-6 * np.abs(centre)] = 1.0
        if self.mode != "probe":  # what is trained on would run away from a scale of before
            learnt = (
                np.arange(len(scale)) % (len(scale) // (X.shape[1] if self.pool == "concat" else 1))
                < model.places.shape[1]
            )
            centre, scale = np.where(learnt, 0.0, centre), np.where(learnt, 1.0, scale)
        network.centre.copy_(torch.from_numpy(centre))
        network.scale.copy_(torch.from_numpy(scale))
        history = None
        if self.mode == "probe":
            self._probe(network, (features - centre) / scale, places)
        else:
            from nissl.recordings.training import train

            parts = (model.embed, model.encoder, network.head)
            parameters = [p for part in parts for p in part.parameters()] + [model.places]
            device = network.head.weight.device

            def loss(batch: tuple[Tensor, ...], generator: torch.Generator) -> dict[str, Tensor]:
                return {"cross-entropy": F.cross_entropy(network(batch[0].to(device)), batch[1].to(device))}

            history = train(
                network, (windows, torch.from_numpy(places.astype(np.int64))), loss, epochs=self.epochs,
                batch_size=self.batch_size, learning_rate=self.learning_rate, final_learning_rate=0.0,
                weight_decay=self.weight_decay, parameters=parameters, folder=self._in_folder("fit"), resume=self.resume,
                device=device, seed=self.random_state, progress=self.progress,
            )  # fmt: skip
        self.classes_, self.n_channels_ = classes, X.shape[1]
        self.network_, self.model_, self.history_ = network.eval(), model, history
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits (n, n_classes); for two classes their difference (n,), above 0 for the second."""
        check_is_fitted(self, "network_")
        found = self.model_._each(self.model_.as_windows(X, self.n_channels_), self.network_).astype(np.float64)
        return found[:, 1] - found[:, 0] if len(self.classes_) == 2 else found

    def predict(self, X: Any) -> np.ndarray:
        """The class of each window."""
        found = self.predict_proba(X).argmax(1)
        return self.classes_[found]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, n_classes)."""
        found = self.decision_function(X)
        return _softmax(np.stack([np.zeros_like(found), found], 1) if found.ndim == 1 else found)

    def _check(self) -> None:
        if self.mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.pool not in ("mean", "concat"):
            raise InputError(f"pool must be 'mean' or 'concat', got {self.pool!r}")
        for name in ("moments", "quantised", "resume", "progress"):
            flag(name, getattr(self, name))
        if self.quantised and self.mode != "probe":
            raise InputError("quantised=True goes with mode='probe'; what is trained on goes around the codebook")
        if not is_number(self.C) or self.C <= 0:
            raise InputError(f"C must be a number above 0, got {self.C!r}")
        at_least("random_state", self.random_state, 0)
        if self.model is not None and not isinstance(self.model, (EEGFormer, Mapping)):
            raise InputError(f"model must be an EEGFormer or its parameters, got {type(self.model).__name__}")

    def _model(self, n_times: int) -> EEGFormer:
        if isinstance(self.model, EEGFormer):
            return deepcopy(self.model)
        with seeded(self.random_state):
            try:
                options: dict[str, Any] = {"n_times": n_times} | dict(self.model or {})
                return EEGFormer(**options)
            except TypeError as error:
                raise InputError(f"model={self.model!r} are no parameters of EEGFormer: {error}") from error

    def _pretrain(self, model: EEGFormer, X: np.ndarray) -> EEGFormer:
        model.pretrain(
            X, epochs=self.pretrain_epochs, batch_size=self.batch_size, learning_rate=self.pretrain_rate,
            folder=self._in_folder("pretrain"), resume=self.resume, device=self.device, seed=self.random_state,
            progress=self.progress,
        )  # fmt: skip
        return model

    def _in_folder(self, name: str) -> Path | None:
        return None if self.folder is None else as_path("folder", self.folder) / name

    def _probe(self, network: EEGFormerNetwork, features: np.ndarray, places: np.ndarray) -> None:
        """The optimum of the penalised cross-entropy as the weights of the head."""
        fitted = LogisticRegression(C=self.C, max_iter=1000).fit(features.astype(np.float64), places)
        weight, bias = fitted.coef_, fitted.intercept_
        if len(weight) == 1:
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        with torch.no_grad():
            network.head.weight.copy_(torch.from_numpy(weight))
            network.head.bias.copy_(torch.from_numpy(bias))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ---------------------------------------------------------------- what codes say


def as_codes(codes: Any, n_codes: int = _MOST_CODES) -> np.ndarray:
    """Codes, checked: whole numbers (n, n_channels, n_patches) from 0 to below `n_codes`, int64."""
    found = as_trials(codes, "codes")
    if (found != np.floor(found)).any() or found.min() < 0 or found.max() >= n_codes:
        raise InputError(f"codes must be whole numbers from 0 to {n_codes - 1}")
    return found.astype(np.int64)


def ngrams(codes: np.ndarray, n: int) -> np.ndarray:
    """One number for each n-gram of codes within a channel: (n_windows, n_channels, n_patches - n + 1)."""
    at_least("n", n, 1)
    if n > 3:
        raise InputError(f"n must be 1, 2 or 3, got {n}")
    if codes.shape[2] < n:
        raise InputError(f"windows of {codes.shape[2]} patches hold no sequence of {n}")
    runs = np.lib.stride_tricks.sliding_window_view(codes, n, axis=2)
    return runs @ (_MOST_CODES ** np.arange(n - 1, -1, -1, dtype=np.int64))


class CodeNgramNB(ClassifierMixin, BaseEstimator):
    """Naive Bayes on counts of n-grams of codes: which sequences of patterns speak for a class, and where they are.

    n-grams are counted within channels, never across. Their probabilities given a class have add-one smoothing over the n-grams that
    the windows of `fit` hold; others say nothing.

    Parameters
    ----------
    model : EEGFormer, optional
        Pretrained; makes codes of windows. Without one, X are the codes themselves (n_windows, n_channels, n_patches).
    n : {1, 2, 3}, default 2

    Attributes
    ----------
    classes_ : array
    ngrams_ : array of int (n_ngrams, n)
    counts_ : array (n_classes, n_ngrams)
    log_odds_ : array (n_classes, n_ngrams)
        w = log p(n-gram | class) − log p(n-gram | other classes).

    Notes
    -----
    Neighbouring n-grams share codes and are not independent, so the probabilities are far too sure: use them to rank. And codes need
    not be physiology: compare them with subject and device before a class is read from them.

    See Also
    --------
    EEGFormer.codes, plot_codes, plot_ngrams

    References
    ----------
    Chen et al. (2024). EEGFormer: Towards transferable and interpretable large-scale EEG foundation model. arXiv:2401.10278.
    """

    def __init__(self, model: EEGFormer | None = None, n: int = 2) -> None:
        self.model = model
        self.n = n

    def fit(self, X: Any, y: Any) -> CodeNgramNB:
        """Count n-grams of windows (n, n_channels, n_times), or of codes without a model; labels (n,)."""
        codes = self._codes(X)
        y = as_labels(y, len(codes))
        classes, places = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise InputError(f"y holds one class only, {classes[0]!r}: nothing can be told apart")
        keys = ngrams(codes, self.n)
        self.keys_ = np.unique(keys)
        counts = self._counts(keys)
        self.naive_bayes_ = MultinomialNB(alpha=1.0).fit(counts, places)
        self.classes_, self.n_channels_, self.n_patches_ = classes, *codes.shape[1:]
        self.ngrams_ = np.stack([self.keys_ // _MOST_CODES**k % _MOST_CODES for k in range(self.n - 1, -1, -1)], 1)
        self.counts_ = self.naive_bayes_.feature_count_
        rest = self.counts_.sum(0) - self.counts_ + 1.0
        self.log_odds_ = self.naive_bayes_.feature_log_prob_ - np.log(rest / rest.sum(1, keepdims=True))
        return self

    def _codes(self, X: Any) -> np.ndarray:
        if self.model is None:
            return as_codes(X)
        instance("model", self.model, EEGFormer)
        if not self.model.pretrained:
            raise InputError("the model is not pretrained, so that its codes mean nothing: model.pretrain(X) first")
        return self.model.codes(X)

    def _known(self, X: Any) -> np.ndarray:
        """Codes of windows like those of `fit`."""
        check_is_fitted(self, "log_odds_")
        codes = self._codes(X)
        if codes.shape[1] != self.n_channels_:
            raise InputError(f"X has {codes.shape[1]} channels, expected {self.n_channels_} as in the data of fit")
        return codes

    def _columns(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place of each n-gram among those of `fit`, and whether it is one of them."""
        at = np.minimum(np.searchsorted(self.keys_, keys), len(self.keys_) - 1)
        return at, self.keys_[at] == keys

    def _counts(self, keys: np.ndarray) -> csr_matrix:
        at, known = self._columns(keys)
        rows = np.broadcast_to(np.arange(len(keys))[:, None, None], keys.shape)
        return csr_matrix(
            (np.ones(int(known.sum())), (rows[known], at[known])), shape=(len(keys), len(self.keys_))
        )  # fmt: skip

    def decision_function(self, X: Any) -> np.ndarray:
        """Joint log-likelihoods (n, n_classes); for two classes their difference (n,), above 0 for the second."""
        counts = self._counts(ngrams(self._known(X), self.n))
        found = counts @ self.naive_bayes_.feature_log_prob_.T + self.naive_bayes_.class_log_prior_
        return found[:, 1] - found[:, 0] if len(self.classes_) == 2 else found

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, n_classes), far too sure of themselves."""
        keys = ngrams(self._known(X), self.n)
        return self.naive_bayes_.predict_proba(self._counts(keys))

    def predict(self, X: Any) -> np.ndarray:
        """The class of each window."""
        found = self.predict_proba(X).argmax(1)
        return self.classes_[found]

    def explain(self, X: Any, label: Any = None) -> xr.DataArray:
        """Relevance of patches: the sum of the log odds of the n-grams that hold a patch.

        Parameters
        ----------
        X : array (n, n_channels, n_times), DataArray or MNE Epochs; codes without a model
        label : optional
            The class that is asked about; by default the one predicted for each window.

        Returns
        -------
        DataArray ("example", "channel", "patch")
            Above 0 where the patch speaks for the class. With a model, ``time`` holds the starts of patches in seconds.

        Raises
        ------
        InputError
            The model is of the domain "fft": its codes run along frequency and have no place in time.
        """
        check_is_fitted(self, "log_odds_")
        if self.model is not None:
            _need_time(self.model)
        keys = ngrams(self._known(X), self.n)
        if label is None:
            rows = self.naive_bayes_.predict_proba(self._counts(keys)).argmax(1)
        else:
            rows = np.full(len(keys), self._row(label))
        at, known = self._columns(keys)
        weights = np.where(known, self.log_odds_[rows[:, None, None], at], 0.0)
        found = np.zeros((*keys.shape[:2], keys.shape[2] + self.n - 1))
        for k in range(self.n):
            found[:, :, k : k + keys.shape[2]] += weights
        coords: dict[str, Any] = {
            "example": np.arange(len(found)), "patch": np.arange(keys.shape[2] + self.n - 1), "target": ("example", self.classes_[rows]),
        }  # fmt: skip
        if isinstance(X, xr.DataArray) and "channel" in X.coords:
            coords["channel"] = X["channel"].values
        if self.model is not None:
            coords["time"] = ("patch", self.model.starts)
        attrs = {
            "method": type(self).__name__, "parameters": json.dumps({"n": self.n}), "paper": "Chen et al. 2024",
            "target": "predicted class" if label is None else str(label), "site": "codes", "forward_passes": len(found),
            "backward_passes": 0, "network": repr(self.model),
        }  # fmt: skip
        return xr.DataArray(
            found, dims=("example", "channel", "patch"), coords=coords, name="code n-grams", attrs=attrs
        )

    def _row(self, label: Any) -> int:
        """Of a class."""
        at = np.flatnonzero(self.classes_ == label)
        if len(at) != 1:
            raise InputError(f"label {label!r} is no class of fit: {', '.join(map(str, self.classes_))}")
        return int(at[0])

    def ngram_table(self, label: Any = None, *, at_least_seen: int = 1) -> pd.DataFrame:
        """n-grams, those that speak for a class first.

        Parameters
        ----------
        label : optional
            The class; by default the second of two.
        at_least_seen : int, default 1
            n-grams that `fit` saw less often are left out.

        Returns
        -------
        DataFrame
            ``ngram`` (tuple of codes), ``log_odds``, ``seen`` in windows of the class, ``elsewhere``.
        """
        check_is_fitted(self, "log_odds_")
        if label is None and len(self.classes_) > 2:
            raise InputError(f"label must be given where there are {len(self.classes_)} classes")
        row = len(self.classes_) - 1 if label is None else self._row(label)
        seen = self.counts_[row].astype(int)
        found = pd.DataFrame(
            {"ngram": [tuple(map(int, g)) for g in self.ngrams_], "log_odds": self.log_odds_[row], "seen": seen,
             "elsewhere": self.counts_.sum(0).astype(int) - seen}
        )  # fmt: skip
        found = found[found["seen"] + found["elsewhere"] >= at_least_seen]
        return found.iloc[np.lexsort((-found["seen"], -found["log_odds"]))].reset_index(drop=True)

    def occurrences(self, X: Any, ngram: Sequence[int]) -> np.ndarray:
        """Where an n-gram is: rows (window, channel, first patch), the most typical first where there is a model.

        Typical is what lies near the codes' vectors: these are the segments to look at.
        """
        codes = self._known(X)
        wanted = np.asarray(ngram, dtype=np.int64)
        if wanted.shape != (self.n,):
            raise InputError(f"ngram must be {self.n} codes, got {ngram!r}")
        runs = np.lib.stride_tricks.sliding_window_view(codes, self.n, axis=2)
        found = np.argwhere((runs == wanted).all(-1))
        if self.model is None or not len(found):
            return found
        far = self.model.distances(X)
        total = sum(far[found[:, 0], found[:, 1], found[:, 2] + k] for k in range(self.n))
        return found[np.argsort(total, kind="stable")]

    def decoded(self, X: Any, ngram: Sequence[int]) -> np.ndarray:
        """Mean of what the decoder makes of an n-gram where it is in X: (n, patch_values), in units of `EEGFormer.patches`."""
        if self.model is None:
            raise InputError("codes without a model cannot be decoded")
        found = self.occurrences(X, ngram)
        if not len(found):
            raise InputError(f"X does not hold the sequence {tuple(ngram)}")
        windows = np.unique(found[:, 0])
        patches = self.model.decode(self.model.codes(as_trials(X)[windows]))
        row = np.searchsorted(windows, found[:, 0])
        return np.stack([patches[row, found[:, 1], found[:, 2] + k].mean(0) for k in range(self.n)])


def _need_time(model: EEGFormer) -> None:
    if model.domain == "fft":
        raise InputError(
            "codes of the domain 'fft' run along frequency and have no place in time; take domain='patch-fft' for that"
        )


# ---------------------------------------------------------------- pictures


def plot_codes(bayes: CodeNgramNB, window: Any, label: Any = None) -> Figure:
    """One window with the codes of its patches, coloured by their relevance.

    Parameters
    ----------
    bayes : CodeNgramNB
        Fitted, with a model.
    window : array (n_channels, n_times) or DataArray ("channel", "time")
    label : optional
        The class that is asked about; by default the one predicted.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    check_is_fitted(bayes, "log_odds_")
    if bayes.model is None:
        raise InputError("codes without a model have no place in time")
    model = bayes.model
    _need_time(model)
    names = list(window["channel"].values) if isinstance(window, xr.DataArray) and "channel" in window.coords else None
    X = as_trials(np.asarray(window)[None], "window")
    scores = bayes.explain(X, label)
    codes, relevance = model.codes(X)[0], scores.values[0]
    names = names or [str(c) for c in range(X.shape[1])]
    most = float(np.abs(relevance).max()) or 1.0
    figure = Figure(figsize=(8.0, 0.9 + 0.75 * X.shape[1]), layout="constrained")
    ax = figure.subplots()
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(-most, most), colormaps["PuOr_r"])
    time = np.arange(X.shape[2]) / model.sampling_rate
    width = min(model.stride, model.patch) / model.sampling_rate
    size = 5 * X[0].std(1, keepdims=True)
    trace = (X[0] - X[0].mean(1, keepdims=True)) / np.where(size > 0, size, 1.0)
    shades = colours.to_rgba(relevance)
    for c in range(X.shape[1]):
        for k, start in enumerate(model.starts):
            ax.add_patch(Rectangle((start, c - 0.5), width, 1.0, facecolor=shades[c, k], edgecolor="white"))  # fmt: skip
            ax.text(start + 0.04 * width, c - 0.44, str(codes[c, k]), fontsize=7, va="top", color="0.1")
        ax.plot(time, c - trace[c].clip(-0.5, 0.5), color="0.1", linewidth=0.6)
    ax.set_yticks(range(X.shape[1]), names)
    ax.set_ylim(X.shape[1] - 0.5, -0.5)
    ax.set_xlim(0, time[-1])
    ax.set_xlabel("time (s)")
    ax.set_ylabel("channel")
    figure.colorbar(colours, ax=ax, label=f"relevance for {scores['target'].values[0]}")
    return figure


def plot_ngrams(bayes: CodeNgramNB, X: Any, label: Any = None, top: int = 3) -> Figure:
    """What the decoder makes of the n-grams that speak most for a class: mean over their places in X.

    Parameters
    ----------
    bayes : CodeNgramNB
        Fitted, with a model.
    X : array (n, n_channels, n_times)
    label : optional
        The class; by default the second of two.
    top : int, default 3
        n-grams, in rows; those that X does not hold are passed over.
    """
    from matplotlib.figure import Figure

    if bayes.model is None:
        raise InputError("codes without a model cannot be decoded")
    at_least("top", top, 1)
    model, table = bayes.model, bayes.ngram_table(label)
    held = set(np.unique(ngrams(model.codes(X), bayes.n)).tolist())
    keys = [sum(c * _MOST_CODES**k for k, c in enumerate(reversed(g))) for g in table["ngram"]]
    table = table[[k in held for k in keys]].head(top)
    figure = Figure(figsize=(2.2 * bayes.n + 1.6, 1.3 * len(table) + 0.6), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(table), bayes.n, sharex=model.domain != "fft", sharey=True, squeeze=False))
    across = np.arange(model.patch) / model.sampling_rate if model.domain == "time" else model.frequencies
    for row, (_, entry) in enumerate(table.iterrows()):
        ngram = cast(tuple[int, ...], entry["ngram"])
        means = bayes.decoded(X, ngram)
        for k, code in enumerate(ngram):
            x = np.arange(model.patch_values) if model.domain == "fft" else across
            axes[row, k].plot(x, means[k], color="#5b3a91", linewidth=1.2)
            axes[row, k].set_title(f"code {code}", fontsize=8, loc="left", pad=2)
            axes[row, k].tick_params(labelsize=7)
        axes[row, -1].set_title(f"{entry['log_odds']:+.1f}", fontsize=8, loc="right", pad=2)
    unit = {"patch-fft": "frequency (Hz)", "fft": "bin of the patch", "time": "time in the patch (s)"}[model.domain]
    for ax in axes[-1]:
        ax.set_xlabel(unit, fontsize=8)
    what = "amplitude" if model.domain != "time" else "signal"
    figure.supylabel(f"decoded {'log ' if model.log else ''}{what}, normalised", fontsize=8)
    return figure
