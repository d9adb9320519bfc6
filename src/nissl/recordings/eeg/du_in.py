"""Du-IN: discrete units of several channels together, masked modelling of them, and a decoder that starts from there.

Channels are mixed to a few region signals, which are cut into patches; a patch is a token. Stage 1 is an autoencoder with a codebook
between its halves: it gives each patch a code. Stage 2 hides half of the patches and predicts their codes from the others. Stage 3
puts a small head on the encoder and trains all of it on labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import as_path, at_least, instance, is_number, is_whole, items
from nissl.errors import InputError, RunFolderError
from nissl.recordings.arrays import as_labels, as_rate, as_trials
from nissl.recordings.quantise import Quantized, VectorQuantizer
from nissl.recordings.transformer import Encoder, sinusoid
from nissl.seeds import seeded

VARIANTS = ("mae", "vqvae", "vqvae+vq", "scratch")
"""Where the decoder starts: from the masked model, from the autoencoder, from its quantised tokens, from nothing."""
AT_ONCE = 256
"""Trials in one batch where nothing is trained."""


# ---------------------------------------------------------------- modules


class RegionFusion(nn.Module):
    """The channels of a subject, standardised and mixed to a few region signals.

    Parameters
    ----------
    n_channels : int
        Of the subject with the most; the others are filled with channels that are not `present`.
    n_regions : int, default 16
    n_subjects : int, default 1

    Attributes
    ----------
    mean, scale : Tensor (n_subjects, n_channels)
        Of the signals; 0 and 1 until `measure` is called.
    present : Tensor of bool (n_subjects, n_channels)
    """

    mean: Tensor
    scale: Tensor
    present: Tensor

    def __init__(self, n_channels: int, n_regions: int = 16, n_subjects: int = 1) -> None:
        super().__init__()
        for name, value in (("n_channels", n_channels), ("n_regions", n_regions), ("n_subjects", n_subjects)):
            at_least(name, value, 1)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(n_subjects, n_channels, n_regions), std=0.02))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(n_regions)) for _ in range(n_subjects))
        self.register_buffer("mean", torch.zeros(n_subjects, n_channels))
        self.register_buffer("scale", torch.ones(n_subjects, n_channels))
        self.register_buffer("present", torch.ones(n_subjects, n_channels, dtype=torch.bool))

    def measure(self, x: Tensor, subject: Tensor, first: int = 0) -> None:
        """Take mean, scale and presence of channels from the trials x (n, n_channels, n_times) of the subjects from `first` on.

        A channel that is flat in all trials of a subject is absent.
        """
        for s in range(first, len(self.mean)):
            own = x[subject == s].double().transpose(0, 1).flatten(1)
            self.mean[s], self.scale[s] = own.mean(1), own.std(1, correction=0)
            self.present[s] = own.amax(1) > own.amin(1)
            self.scale[s, ~self.present[s]] = 1.0

    def extend(self, n_more: int) -> None:
        """Add subjects, whose weights are drawn anew."""
        more = RegionFusion(self.weight.shape[1], self.weight.shape[2], n_more).to(self.weight.device)
        self.weight = nn.Parameter(torch.cat([self.weight.data, more.weight.data]))
        self.bias.extend(more.bias)
        for name in ("mean", "scale", "present"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(more, name)]))

    def standardise(self, x: Tensor, subject: Tensor) -> Tensor:
        """Signals (n, n_channels, n_times) of mean 0 and variance 1; those of absent channels are 0."""
        z = (x - self.mean[subject, :, None]) / self.scale[subject, :, None]
        return z.masked_fill(~self.present[subject, :, None], 0.0)

    def forward(self, x: Tensor, subject: Tensor) -> Tensor:
        """Region signals (n, n_regions, n_times) of raw ones (n, n_channels, n_times)."""
        mixed = self.weight[subject].transpose(1, 2) @ self.standardise(x, subject)
        return mixed + torch.stack(list(self.bias))[subject, :, None]

    def channel_weights(self) -> Tensor:
        """Mean absolute weight of each channel (n_subjects, n_channels); 0 where it is absent."""
        return self.weight.detach().abs().mean(2) * self.present


class RegionEncoder(nn.Module):
    """Signals to tokens: channels are mixed, cut into patches, each convolved alone, and seen by a post-norm transformer.

    Parameters
    ----------
    n_channels : int
    n_subjects : int, default 1
    patch : int, default 100
        Samples of a patch.
    n_regions : int, default 16
    filters, kernels, strides : sequence of int
        Of the convolutions; ``(128, 128, 16)``, ``(19, 3, 3)`` and ``(10, 1, 1)`` by default. A token has
        ``filters[-1] * patch / prod(strides)`` features.
    n_layers, n_heads, head_features : int, default 8, 8, 64
    dropout : float, default 0.2
    """

    def __init__(
        self, n_channels: int, *, n_subjects: int = 1, patch: int = 100, n_regions: int = 16,
        filters: Sequence[int] = (128, 128, 16), kernels: Sequence[int] = (19, 3, 3), strides: Sequence[int] = (10, 1, 1),
        n_layers: int = 8, n_heads: int = 8, head_features: int = 64, dropout: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least("patch", patch, 1)
        layers = [items(name, v) for name, v in (("filters", filters), ("kernels", kernels), ("strides", strides))]
        if len({len(v) for v in layers}) != 1 or not layers[0]:
            raise InputError(f"filters, kernels and strides must be of one length, got {[len(v) for v in layers]}")
        for name, values in zip(("filters", "kernels", "strides"), layers, strict=True):
            for v in values:
                at_least(f"each of {name}", v, 1)
        if any(k % 2 == 0 for k in kernels):
            raise InputError(f"kernels must be odd, so that a patch keeps its place; got {tuple(kernels)}")
        if patch % prod(strides):
            raise InputError(f"patch={patch} is no multiple of the product of the strides {tuple(strides)}")
        self.patch = patch
        self.filters, self.kernels, self.strides = tuple(filters), tuple(kernels), tuple(strides)
        self.n_features = filters[-1] * (patch // prod(strides))
        if self.n_features % 2:
            raise InputError(
                f"a token would have {self.n_features} features, {filters[-1]} filters times {patch // prod(strides)} "
                "steps; their number must be even"
            )
        self.fusion = RegionFusion(n_channels, n_regions, n_subjects)
        convolutions, before = [], n_regions
        for f, k, s in zip(filters, kernels, strides, strict=True):
            convolutions += [nn.Conv1d(before, f, k, s, padding=(k - 1) // 2), nn.BatchNorm1d(f)]
            before = f
        self.convolutions = nn.Sequential(*convolutions)
        options = {"head_features": head_features, "hidden": 2 * self.n_features, "dropout": dropout}
        self.mixer = Encoder(n_layers, self.n_features, n_heads, norm_first=False, **options)

    def tokens(self, x: Tensor, subject: Tensor | None = None) -> Tensor:
        """Tokens (n, n_patches, n_features) before they see each other, of raw signals (n, n_channels, n_times)."""
        if x.shape[-1] % self.patch:
            raise InputError(f"{x.shape[-1]} samples are no whole number of patches of {self.patch}")
        patches = self.fusion(x, _subjects(x, subject)).unflatten(2, (-1, self.patch)).transpose(1, 2)
        return self.convolutions(patches.flatten(0, 1)).flatten(1).unflatten(0, (len(x), -1))

    @torch.no_grad()
    def calibrate(self, x: Tensor, subject: Tensor | None = None) -> None:
        """Start the running statistics of batch norm from signals (n, n_channels, n_times).

        They would start at variance 1, thousands of times that of what the small first weights give, and evaluation would be
        wrong for the first hundred steps.
        """
        norms = [m for m in self.convolutions if isinstance(m, nn.BatchNorm1d)]
        before = [(m.momentum, m.training) for m in norms]
        for m in norms:
            m.momentum, m.training = 1.0, True
        self.tokens(x, subject)
        for m, (momentum, training) in zip(norms, before, strict=True):
            m.momentum, m.training = momentum, training

    def mix(self, tokens: Tensor) -> Tensor:
        """Tokens (n, n_patches, n_features) that have seen where they are and each other."""
        return self.mixer(tokens + sinusoid(tokens.shape[1], self.n_features).to(tokens))

    def forward(self, x: Tensor, subject: Tensor | None = None) -> Tensor:
        """Tokens (n, n_patches, n_features) of raw signals (n, n_channels, n_times); `subject` (n,) is 0 unless given."""
        return self.mix(self.tokens(x, subject))


class DuINTokenizer(nn.Module):
    """Stage 1: an autoencoder whose tokens are vectors of a codebook; called, it gives the quantised tokens.

    Parameters
    ----------
    encoder : RegionEncoder
    n_codes, code_features : int, default 2048, 64
    decoder_layers, n_heads, head_features : int, default 4, 8, 64
    dropout : float, default 0.2
    commitment, decay : float, default 1, 0.99
        Of `VectorQuantizer`.
    revive_after : int or None, default 100
        A code that so many batches did not use starts again; None leaves it, as the paper does.

    See Also
    --------
    DuIN, nissl.recordings.quantise.VectorQuantizer
    """

    def __init__(
        self, encoder: RegionEncoder, *, n_codes: int = 2048, code_features: int = 64, decoder_layers: int = 4,
        n_heads: int = 8, head_features: int = 64, dropout: float = 0.2, commitment: float = 1.0, decay: float = 0.99,
        revive_after: int | None = 100,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = encoder
        d = encoder.n_features
        self.to_code = nn.Sequential(nn.Linear(d, d), nn.Tanh(), nn.Linear(d, code_features))
        self.quantizer = VectorQuantizer(
            n_codes, code_features, decay=decay, commitment=commitment, revive_after=revive_after
        )
        self.from_code = nn.Sequential(nn.LayerNorm(code_features), nn.Linear(code_features, d))
        options = {"head_features": head_features, "hidden": 2 * d, "dropout": dropout}
        self.decoder = Encoder(decoder_layers, d, n_heads, norm_first=False, **options)
        n_subjects, n_channels, n_regions = encoder.fusion.weight.shape
        width, step = encoder.patch // prod(encoder.strides), prod(encoder.strides)
        f, first = encoder.filters[0], max(encoder.kernels[0], step)
        self.deconvolutions = nn.Sequential(
            _grown(d, f, 3, 1), _grown(f, f, 3, 1), _grown(f, f, width, width), _grown(f, f, 9, 1),
            _grown(f, n_regions, first, step), nn.Conv1d(n_regions, n_regions, 1),
        )  # fmt: skip
        # Not as small as the first layer: else the commitment alone moves the encoder at first, to one code for all.
        self.out = nn.Parameter(nn.init.normal_(torch.empty(n_subjects, n_regions, n_channels), std=n_regions**-0.5))
        self.out_bias = nn.ParameterList(nn.Parameter(torch.zeros(n_channels)) for _ in range(n_subjects))

    def features(self, x: Tensor, subject: Tensor | None = None) -> Tensor:
        """What is quantised (n, n_patches, code_features), before it is brought to length 1."""
        return self.to_code(self.encoder(x, subject))

    def codes(self, x: Tensor, subject: Tensor | None = None) -> Tensor:
        """Codes (n, n_patches) of raw signals (n, n_channels, n_times)."""
        return self.quantizer.encode(self.features(x, subject))

    def quantise(self, x: Tensor, subject: Tensor | None = None) -> Quantized:
        """What the codebook makes of the patches; in training it moves."""
        return self.quantizer(self.features(x, subject))

    def forward(self, x: Tensor, subject: Tensor | None = None) -> Tensor:
        """Quantised tokens (n, n_patches, n_features)."""
        return self.from_code(self.quantise(x, subject).values)

    def decode(self, values: Tensor, subject: Tensor | None = None) -> Tensor:
        """Standardised signals (n, n_channels, n_times) of vectors of the codebook (n, n_patches, code_features)."""
        s = _subjects(values, subject)
        tokens = self.from_code(values)
        mixed = self.decoder(tokens + sinusoid(tokens.shape[1], tokens.shape[2]).to(tokens))
        regions = self.deconvolutions(mixed.transpose(1, 2))
        return self.out[s].transpose(1, 2) @ regions + torch.stack(list(self.out_bias))[s, :, None]

    def loss(self, x: Tensor, subject: Tensor | None = None) -> dict[str, Tensor]:
        """Mean squared error over the channels that are there, and the commitment."""
        s = _subjects(x, subject)
        found = self.quantise(x, s)
        fusion = self.encoder.fusion
        wrong = (self.decode(found.values, s) - fusion.standardise(x, s)).square().mean(2)
        there = fusion.present[s].to(wrong)
        return {"reconstruction": (wrong * there).sum() / there.sum(), **found.losses}


class DuINMasked(nn.Module):
    """Stage 2: predicts the codes of hidden patches from the others.

    Parameters
    ----------
    encoder : RegionEncoder
    n_codes : int, default 2048
    share : float, default 0.5
        Of the patches that are hidden; the rest are hidden in a second run.
    """

    def __init__(self, encoder: RegionEncoder, n_codes: int = 2048, share: float = 0.5) -> None:
        super().__init__()
        at_least("n_codes", n_codes, 2)
        if not is_number(share) or not 0 < share < 1:
            raise InputError(f"the share of hidden patches must be above 0 and below 1, got {share!r}")
        self.encoder = encoder
        self.share = share
        self.hidden = nn.Parameter(torch.ones(encoder.n_features))
        self.head = nn.Linear(encoder.n_features, n_codes)

    def draw(self, n: int, n_patches: int, generator: torch.Generator) -> Tensor:
        """Which patches are hidden (n, n_patches): of each row the same number, at random."""
        places = torch.rand(n, n_patches, generator=generator).argsort(1).argsort(1)
        return places < min(max(1, round(self.share * n_patches)), n_patches - 1)

    def logits(self, x: Tensor, hidden: Tensor, subject: Tensor | None = None) -> Tensor:
        """Scores of the codes (n, n_patches, n_codes), each from the run in which its patch was hidden.

        Parameters
        ----------
        x : Tensor (n, n_channels, n_times)
        hidden : Tensor of bool (n, n_patches)
            Hidden in the first run; the others are hidden in the second.
        subject : Tensor of int (n,), optional
        """
        tokens = self.encoder.tokens(x, subject)
        runs = torch.cat([hidden, ~hidden])
        seen = torch.where(runs[..., None], self.hidden, tokens.repeat(2, 1, 1))
        first, second = self.encoder.mix(seen).chunk(2)
        return self.head(torch.where(hidden[..., None], first, second))

    def loss(
        self, x: Tensor, codes: Tensor, generator: torch.Generator, subject: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy of the codes (n, n_patches), over all patches."""
        hidden = self.draw(len(codes), codes.shape[1], generator).to(x.device)
        logits = self.logits(x, hidden, subject)
        return {"cross-entropy": F.cross_entropy(logits.flatten(0, 1), codes.flatten())}


class DuINClassifier(nn.Module):
    """Stage 3: a small head on all tokens of a trial.

    Parameters
    ----------
    body : RegionEncoder or DuINTokenizer
        Gives the tokens. The codebook of a tokenizer stays as it is.
    n_patches, n_classes : int
    hidden : int, default 128
        Width of the head.
    sigmoid : bool, default False
        Squash the scores before the softmax, as the authors' code does: with K classes the loss cannot fall below
        log(K - 1 + e) - 1 then (3.14 nats of 4.11 for 61 words).
    """

    def __init__(
        self, body: RegionEncoder | DuINTokenizer, n_patches: int, n_classes: int, *, hidden: int = 128, sigmoid: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        at_least("n_patches", n_patches, 1)
        at_least("n_classes", n_classes, 2)
        self.body: Any = body
        self.n_patches, self.sigmoid = n_patches, sigmoid
        features = n_patches * self.encoder.n_features
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, n_classes))

    @property
    def encoder(self) -> RegionEncoder:
        """What makes tokens of signals."""
        return self.body.encoder if isinstance(self.body, DuINTokenizer) else self.body

    def train(self, mode: bool = True) -> DuINClassifier:
        """Training mode, without the codebook."""
        super().train(mode)
        if isinstance(self.body, DuINTokenizer):
            self.body.quantizer.eval()
        return self

    def forward(self, x: Tensor, subject: Tensor | None = None) -> Tensor:
        """Scores (n, n_classes) of raw signals (n, n_channels, n_times)."""
        scores = self.head(self.body(x, subject).flatten(1))
        return scores.sigmoid() if self.sigmoid else scores

    def loss(
        self, x: Tensor, y: Tensor, generator: torch.Generator, subject: Tensor | None = None, shift: float = 0.1
    ) -> dict[str, Tensor]:
        """Cross-entropy of the classes y (n,), each trial moved at random by at most `shift` of its length."""
        s = _subjects(x, subject)
        return {"cross-entropy": F.cross_entropy(self(self.moved(x, s, shift, generator), s), y)}

    def moved(self, x: Tensor, subject: Tensor, shift: float, generator: torch.Generator) -> Tensor:
        """Trials (n, n_channels, n_times), each moved in time; what comes in is the mean of the channel."""
        n, _, t = x.shape
        most = int(shift * t)
        if not most:
            return x
        by = torch.randint(-most, most + 1, (n, 1), generator=generator).to(x.device)
        source = torch.arange(t, device=x.device) - by
        inside = (source >= 0) & (source < t)
        found = x.gather(2, source.clamp(0, t - 1)[:, None].expand(x.shape))
        return torch.where(inside[:, None], found, self.encoder.fusion.mean[subject, :, None])


def _grown(n_in: int, n_out: int, kernel: int, stride: int) -> nn.ConvTranspose1d:
    """A transposed convolution that makes a signal exactly `stride` times as long."""
    odd = (kernel - stride) % 2
    return nn.ConvTranspose1d(n_in, n_out, kernel, stride, padding=(kernel - stride + odd) // 2, output_padding=odd)


def _subjects(x: Tensor, subject: Tensor | None) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device) if subject is None else subject


# ---------------------------------------------------------------- estimator


@dataclass(frozen=True)
class Stage:
    """How one stage is trained; passed on to `nissl.recordings.training.train`.

    Attributes
    ----------
    epochs : int
    warm_up : int
        Epochs over which the learning rate rises.
    batch_size : int
        Trials or crops.
    learning_rate, final_learning_rate : float
        Falls from one to the other along a cosine.
    weight_decay : float
    """

    epochs: int
    warm_up: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float
    weight_decay: float


@dataclass(frozen=True, eq=False)
class Pretrained:
    """What `DuIN.pretrain` learns; give it to other decoders as ``DuIN(pretrained=...)``, which copies keep.

    Attributes
    ----------
    tokenizer : DuINTokenizer
    masked : DuINMasked or None
        None for the variants that do without.
    subjects : array (n_subjects,)
    history : dict
        ``"tokenizer"`` and ``"masked"``: what training measured.
    """

    tokenizer: DuINTokenizer
    masked: DuINMasked | None
    subjects: np.ndarray
    history: dict[str, Any]


class DuIN(ClassifierMixin, BaseEstimator):
    """Decodes trials by an encoder that was pretrained on discrete units of the same kind of signals.

    `pretrain` learns from trials or long segments without labels, `fit` from trials with labels. `fit` alone pretrains on its own
    trials first. Signals are standardised by channel and subject, as in the data that were first seen of a subject. Training needs the extra
    `training`; what is trained is plain torch.

    Parameters
    ----------
    variant : {"mae", "vqvae", "vqvae+vq", "scratch"}, default "mae"
        Where the decoder starts: from the masked model, from the autoencoder, from the autoencoder with its quantised tokens, from
        random weights.
    patch : int, default 100
        Samples of a patch; the paper's are 100 ms. Trials must be a whole number of patches.
    n_regions, filters, kernels, strides, n_layers, n_heads, head_features, dropout
        Of `RegionEncoder`.
    decoder_layers : int, default 4
    n_codes, code_features : int, default 2048, 64
    revive_after : int or None, default 100
        A code that so many batches did not use starts again.
    mask : float, default 0.5
        Share of the patches that stage 2 hides at once.
    crop : int, optional
        Samples of the random pieces that pretraining cuts out of its segments; all whole patches of a segment unless given.
    shift : float, default 0.1
        Trials are moved in time by up to this share of their length while the decoder is trained.
    validation : float, default 0.1
        Share of the trials of each class by which the best epoch is chosen, the earliest of equals; 0 takes the last epoch.
    tokenizer, masked, classifier : Stage
        How the three stages are trained; the authors' numbers by default.
    sigmoid : bool, default False
        See `DuINClassifier`.
    pretrained : Pretrained, optional
        Of another decoder with the same architecture, in place of `pretrain`.
    folder : path, optional
        Where checkpoints are written, a folder for each stage.
    resume : bool, default False
        Go on from the checkpoints in `folder`.
    device : str, optional
        Such as ``"cuda"``; the CPU unless given.
    devices : int, default 1
    random_state : int, default 0
    progress : bool, default True

    Attributes
    ----------
    classes_ : array (n_classes,)
    subjects_ : array (n_subjects,)
        In the order of `channel_weights`.
    pretrained_ : Pretrained
        After `pretrain`.
    base_ : Pretrained or None
        What `fit` started from.
    classifier_ : DuINClassifier
        Raw signals (n, n_channels, n_times) to scores: what `nissl.network.Network` takes.
    history_ : dict of History
        ``"tokenizer"``, ``"masked"``, ``"classifier"``.

    See Also
    --------
    DuINTokenizer, DuINMasked, DuINClassifier, plot_units

    References
    ----------
    Zheng, H. et al. (2024). Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial Neural signals. NeurIPS.
    """

    def __init__(
        self, variant: Literal["mae", "vqvae", "vqvae+vq", "scratch"] = "mae", *, patch: int = 100, n_regions: int = 16,
        filters: Sequence[int] = (128, 128, 16), kernels: Sequence[int] = (19, 3, 3), strides: Sequence[int] = (10, 1, 1),
        n_layers: int = 8, decoder_layers: int = 4, n_heads: int = 8, head_features: int = 64, dropout: float = 0.2,
        n_codes: int = 2048, code_features: int = 64, revive_after: int | None = 100, mask: float = 0.5,
        crop: int | None = None, shift: float = 0.1, validation: float = 0.1,
        tokenizer: Stage = Stage(400, 80, 32, 3e-4, 5e-5, 0.01), masked: Stage = Stage(400, 40, 64, 3e-4, 5e-5, 0.05),
        classifier: Stage = Stage(200, 20, 32, 2e-4, 5e-6, 0.05), sigmoid: bool = False, pretrained: Pretrained | None = None,
        folder: Any = None, resume: bool = False, device: str | None = None, devices: int = 1, random_state: int = 0,
        progress: bool = True,
    ) -> None:  # fmt: skip
        self.variant = variant
        self.patch = patch
        self.n_regions = n_regions
        self.filters = filters
        self.kernels = kernels
        self.strides = strides
        self.n_layers = n_layers
        self.decoder_layers = decoder_layers
        self.n_heads = n_heads
        self.head_features = head_features
        self.dropout = dropout
        self.n_codes = n_codes
        self.code_features = code_features
        self.revive_after = revive_after
        self.mask = mask
        self.crop = crop
        self.shift = shift
        self.validation = validation
        self.tokenizer = tokenizer
        self.masked = masked
        self.classifier = classifier
        self.sigmoid = sigmoid
        self.pretrained = pretrained
        self.folder = folder
        self.resume = resume
        self.device = device
        self.devices = devices
        self.random_state = random_state
        self.progress = progress

    def pretrain(self, X: Any, subject: Any = None) -> DuIN:
        """Learn units and their order from signals without labels.

        Parameters
        ----------
        X : array (n_segments, n_channels, n_times), DataArray or Epochs
            Trials or long segments, of all subjects; subjects with fewer channels are filled with channels of zeros.
        subject : array (n_segments,), optional
            Whose signals they are; one subject unless given. In an epoch each subject is seen equally often.
        """
        self._check()
        if self.variant == "scratch":
            raise InputError("the variant 'scratch' is not pretrained")
        segments = as_trials(X)
        names, subject = _named(subject, len(segments), "subject")
        self.channels_ = _channel_names(X, segments.shape[1])
        self.pretrained_ = self._pretrain(segments, subject, names)
        self.history_ = dict(self.pretrained_.history)
        return self

    def fit(self, X: Any, y: Any, subject: Any = None) -> DuIN:
        """Train the decoder.

        Parameters
        ----------
        X : array (n_trials, n_channels, n_times), DataArray or Epochs
        y : array (n_trials,)
        subject : array (n_trials,), optional
            May hold subjects that were not there when pretraining: their channels get weights of their own.
        """
        self._check()
        trials = as_trials(X)
        y = as_labels(y, len(trials))
        subject_names = subject
        names, subject = _named(subject, len(trials), "subject")
        given = self.pretrained if self.pretrained is not None else getattr(self, "pretrained_", None)
        base = None if self.variant == "scratch" else given
        if base is not None:
            self._suits(base, trials.shape[1])
            if subject_names is None:
                names = base.subjects
                if len(names) > 1:
                    raise InputError(
                        f"say whose trials they are: subject is one of {', '.join(map(str, names))}, or a new one"
                    )
        n_times = trials.shape[2]
        if n_times % self.patch:
            raise InputError(
                f"trials of {n_times} samples are no whole number of patches of {self.patch}: cut them to "
                f"{n_times // self.patch * self.patch}, or take another patch"
            )
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"y holds one class only, {self.classes_[0]!r}: nothing can be told apart")
        held = self._held_out(labels)
        if base is None and self.variant != "scratch":
            base = self._pretrain(trials, subject, names)
        self.channels_ = _channel_names(X, trials.shape[1])
        self.base_ = base
        self.n_channels_, self.n_times_ = trials.shape[1:]
        x = torch.from_numpy(trials).float()
        with seeded(3 * self.random_state + 2):
            body, self.subjects_, own = self._body(base, x, subject, names)
            places = torch.from_numpy(own[subject])
            model = DuINClassifier(body, n_times // self.patch, len(self.classes_), sigmoid=self.sigmoid)
        model.to(self.device or "cpu")
        answers = torch.from_numpy(labels)

        def loss(batch: tuple[Tensor, ...], generator: torch.Generator) -> dict[str, Tensor]:
            signals, right, whose = batch
            return model.loss(signals, right, generator, whose, self.shift)

        def accuracy(_: nn.Module) -> float:
            return float((_by_batch(model, model, x[held], places[held]).argmax(1) == answers[held]).double().mean())

        weights = [] if base is None else [v.cpu().numpy() for v in body.state_dict().values()]
        told = (trials, subject, labels, *weights)
        data = tuple(v[~held].to(self.device or "cpu") for v in (x, answers, places))
        history = self._train("classifier", model, data, loss, accuracy if held.any() else None, told)
        self.classifier_ = model
        self.history_ = {**(base.history if base is not None else {}), "classifier": history}
        return self

    def predict_proba(self, X: Any, subject: Any = None) -> np.ndarray:
        """Probabilities (n_trials, n_classes)."""
        check_is_fitted(self, "classifier_")
        x = as_trials(X, channels=self.n_channels_, times=self.n_times_)
        places = _places(subject, self.subjects_, len(x))
        scores = _by_batch(self.classifier_, self.classifier_, torch.from_numpy(x).float(), places)
        return scores.double().softmax(1).numpy()

    def predict(self, X: Any, subject: Any = None) -> np.ndarray:
        """The class of each trial."""
        check_is_fitted(self, "classifier_")
        return self.classes_[self.predict_proba(X, subject).argmax(1)]

    def codes(self, X: Any, subject: Any = None) -> np.ndarray:
        """Code of each patch, by stage 1: int (n_trials, n_patches)."""
        base, x, s = self._given(X, subject)
        return _by_batch(base.tokenizer, base.tokenizer.codes, x, s).numpy()

    def masked_codes(self, X: Any, subject: Any = None, seed: int = 0) -> np.ndarray:
        """Code of each patch as predicted from other patches while it was hidden, by stage 2: int (n_trials, n_patches)."""
        base, x, s = self._given(X, subject)
        if base.masked is None:
            raise InputError(f"the variant {self.variant!r} has no stage 2")
        model = base.masked
        hidden = model.draw(len(x), x.shape[2] // self.patch, torch.Generator().manual_seed(seed))
        return _by_batch(model, lambda a, b, c: model.logits(a, c, b).argmax(2), x, s, hidden).numpy()

    def reconstruct(self, X: Any, subject: Any = None) -> np.ndarray:
        """Signals (n_trials, n_channels, n_times) as stage 1 writes them in its codes, in the units of X."""
        base, x, s = self._given(X, subject)
        stage, fusion = base.tokenizer, base.tokenizer.encoder.fusion

        def written(a: Tensor, b: Tensor) -> Tensor:
            z = stage.decode(stage.quantizer.decode(stage.codes(a, b)), b)
            found = z * fusion.scale[b, :, None] + fusion.mean[b, :, None]
            return found.masked_fill(~fusion.present[b, :, None], 0.0)

        return _by_batch(stage, written, x, s).numpy()

    def units(self, X: Any, subject: Any = None) -> xr.DataArray:
        """Mean signal of the patches of each code that X uses, most used first.

        Returns
        -------
        DataArray ("code", "channel", "time")
            Standardised; the coordinate ``patches`` counts them.
        """
        base, x, s = self._given(X, subject)
        codes = torch.from_numpy(self.codes(X, subject)).flatten()
        z = _by_batch(base.tokenizer, base.tokenizer.encoder.fusion.standardise, x, s)
        patches = z.unflatten(2, (-1, self.patch)).transpose(1, 2).flatten(0, 1)
        counts = codes.bincount(minlength=self.n_codes)
        total = torch.zeros(len(counts), *patches.shape[1:]).index_add_(0, codes, patches)
        used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        mean = (total[used] / counts[used, None, None]).numpy()
        coords = {"code": used.numpy(), "channel": self.channels_, "patches": ("code", counts[used].numpy())}
        return xr.DataArray(mean, dims=("code", "channel", "time"), coords=coords, name="units")

    def channel_weights(self) -> xr.DataArray:
        """Mean absolute weight of each channel in the region signals: ("subject", "channel").

        Of the decoder after `fit`, before it of the last pretrained stage. 0: absent.
        """
        if hasattr(self, "classifier_"):
            fusion, subjects = self.classifier_.encoder.fusion, self.subjects_
        elif hasattr(self, "pretrained_"):
            base = self.pretrained_
            fusion, subjects = (base.masked or base.tokenizer).encoder.fusion, base.subjects
        else:
            raise NotFittedError("call pretrain or fit first")
        coords = {"subject": subjects, "channel": self.channels_}
        return xr.DataArray(fusion.channel_weights().cpu().numpy(), coords=coords, dims=("subject", "channel"))

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` was called."""
        return hasattr(self, "classifier_")

    # what the stages share

    def _check(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"variant must be one of {', '.join(VARIANTS)}; got {self.variant!r}")
        at_least("patch", self.patch, 1)
        at_least("random_state", self.random_state, 0)
        for name in ("shift", "validation"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise InputError(f"{name} must be a share from 0 to below 1, got {value!r}")
        for name in ("tokenizer", "masked", "classifier"):
            instance(name, getattr(self, name), Stage)
        if self.pretrained is not None:
            instance("pretrained", self.pretrained, Pretrained)
        if self.crop is not None:
            at_least("crop", self.crop, self.patch)
            if self.crop % self.patch:
                raise InputError(f"crop={self.crop} is no whole number of patches of {self.patch}")

    def _encoder(self, n_channels: int, n_subjects: int) -> RegionEncoder:
        return RegionEncoder(
            n_channels, n_subjects=n_subjects, patch=self.patch, n_regions=self.n_regions, filters=self.filters,
            kernels=self.kernels, strides=self.strides, n_layers=self.n_layers, n_heads=self.n_heads,
            head_features=self.head_features, dropout=self.dropout,
        )  # fmt: skip

    def _pretrain(self, segments: np.ndarray, subject: np.ndarray, names: np.ndarray) -> Pretrained:
        """Stages 1 and 2 on segments of subjects 0, 1, ..., whose names are given."""
        n, n_channels, n_times = segments.shape
        crop = self.crop or n_times // self.patch * self.patch
        if not crop or crop > n_times:
            raise InputError(f"segments of {n_times} samples are shorter than {'a patch' if not crop else 'crop'}")
        if crop < 2 * self.patch:
            raise InputError(f"pieces of {crop} samples hold one patch of {self.patch}: no other says what is hidden")
        device = torch.device(self.device or "cpu")
        x, s = torch.from_numpy(segments).float().to(device), torch.from_numpy(subject).to(device)
        pieces = np.repeat(np.arange(n), n_times // crop)
        most = np.bincount(subject[pieces]).max()
        # Subjects equally often, so that batch norm sees the same mixture in each batch.
        rows = torch.from_numpy(
            np.concatenate([np.resize(pieces[subject[pieces] == k], most) for k in range(len(names))])
        )
        data, history = (rows.to(device),), {}

        def cut(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            start = torch.randint(0, n_times - crop + 1, (len(rows), 1), generator=generator).to(device)
            at = (start + torch.arange(crop, device=device))[:, None].expand(-1, n_channels, -1)
            return x[rows].gather(2, at), s[rows]

        with seeded(3 * self.random_state):
            tokenizer = DuINTokenizer(
                self._encoder(n_channels, len(names)), n_codes=self.n_codes, code_features=self.code_features,
                decoder_layers=self.decoder_layers, n_heads=self.n_heads, head_features=self.head_features,
                dropout=self.dropout, revive_after=self.revive_after,
            )  # fmt: skip
            masked = DuINMasked(self._encoder(n_channels, len(names)), self.n_codes, self.mask)
            fusion = tokenizer.encoder.fusion.to(device)
            fusion.measure(x, s)
            if not fusion.present.any(1).all():
                raise InputError(
                    f"all channels are flat of subject {str(names[~fusion.present.any(1).cpu().numpy()][0])!r}"
                )
            masked.encoder.fusion.load_state_dict(
                {**masked.encoder.fusion.state_dict(), **dict(fusion.named_buffers())}
            )
            tokenizer.to(device)
            masked.to(device)
            first = cut(rows[torch.randperm(len(rows)).to(device)][:AT_ONCE], torch.Generator().manual_seed(0))
            for stage in (tokenizer, masked):
                stage.encoder.calibrate(*first)
            self._start(tokenizer, rows, cut)
        told = (segments, subject)
        loss = self._seen(lambda rows, g: tokenizer.loss(*cut(rows, g)))
        history["tokenizer"] = self._train("tokenizer", tokenizer, data, loss, None, told)
        if self.variant != "mae":
            return Pretrained(tokenizer, None, names, history)

        def predict(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            signals, whose = cut(rows, generator)
            with torch.no_grad():  # the tokenizer is in evaluation mode: its codes and statistics stay
                codes = tokenizer.codes(signals, whose)
            return masked.loss(signals, codes, generator, whose)

        history["masked"] = self._train("masked", masked, data, self._seen(predict), None, told)
        return Pretrained(tokenizer, masked, names, history)

    @staticmethod
    def _seen(loss: Any) -> Any:
        return lambda batch, generator: loss(batch[0], generator)

    @torch.no_grad()
    def _start(self, tokenizer: DuINTokenizer, rows: Tensor, cut: Any) -> None:
        """k-means on the patches of enough pieces: one batch may have fewer patches than there are codes."""
        generator = torch.Generator().manual_seed(self.random_state)
        order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        tokenizer.train()
        found: list[Tensor] = []
        for some in order.split(self.tokenizer.batch_size):
            found.append(tokenizer.features(*cut(some, generator)).flatten(0, 1))
            if sum(map(len, found)) >= 4 * self.n_codes:
                break
        tokenizer.quantizer.start(torch.cat(found))

    def _train(
        self,
        stage: str,
        model: nn.Module,
        data: tuple[Tensor, ...],
        loss: Any,
        validate: Any,
        told: tuple[np.ndarray, ...],
    ) -> Any:
        folder = None if self.folder is None else as_path("folder", self.folder) / stage
        if folder is not None:
            self._claim(folder, stage, told)
        how = asdict(getattr(self, stage))
        seed = 3 * self.random_state + ("tokenizer", "masked", "classifier").index(stage)
        return _training().train(
            model, data, loss, **how, validate=validate, folder=folder, resume=self.resume, seed=seed,
            device=self.device, devices=self.devices, progress=self.progress,
        )  # fmt: skip

    def _claim(self, folder: Any, stage: str, told: tuple[np.ndarray, ...]) -> None:
        """Write down which data and parameters a folder is of; another run is refused, as it would go on from foreign weights."""
        digest = hashlib.sha256()
        for array in told:
            digest.update(np.ascontiguousarray(array).tobytes() + str(array.shape).encode())
        apart = {"pretrained", "folder", "resume", "device", "devices", "progress"}
        if stage != "classifier":
            apart |= {"variant", "classifier", "shift", "validation", "sigmoid"}
        if stage == "tokenizer":
            apart |= {"masked", "mask"}
        parameters = {k: repr(v) for k, v in self.get_params(deep=False).items() if k not in apart}
        mine = {"data": digest.hexdigest(), "parameters": parameters}
        file = folder / "run.json"
        if file.exists() and self.resume:
            if json.loads(file.read_text()) != mine:
                raise RunFolderError(f"{folder} is of a run with other data or parameters; give another folder")
        elif not (folder / "last.ckpt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(mine))

    def _held_out(self, labels: np.ndarray) -> np.ndarray:
        """Which trials choose the epoch (n_trials,): a share of each class, at least one."""
        held = np.zeros(len(labels), dtype=bool)
        if self.validation == 0:
            return held
        g = np.random.default_rng(self.random_state)
        for k, n in enumerate(np.bincount(labels)):
            if n < 2:
                raise InputError(
                    f"class {str(self.classes_[k])!r} has one trial: none is left to choose the epoch by; add trials, or set validation=0"
                )
            some = min(max(1, round(self.validation * n)), n - 1)
            held[g.permutation(np.flatnonzero(labels == k))[:some]] = True
        return held

    def _suits(self, base: Pretrained, n_channels: int) -> None:
        fusion = base.tokenizer.encoder.fusion
        if fusion.weight.shape[1] != n_channels:
            raise InputError(f"X has {n_channels} channels, expected {fusion.weight.shape[1]} as when pretraining")
        wanted = self._encoder(n_channels, len(base.subjects)).state_dict()
        given = base.tokenizer.encoder.state_dict()
        if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in given.items()}:
            raise InputError("what was pretrained has another architecture than the parameters say")
        if self.variant == "mae" and base.masked is None:
            raise InputError("what was pretrained has no stage 2: take variant='vqvae', or pretrain with variant='mae'")

    def _body(
        self, base: Pretrained | None, x: Tensor, subject: np.ndarray, names: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray]:
        """Where the decoder starts, all subjects it knows, and the place of each of `names` among them."""
        if base is None:
            body, known = self._encoder(x.shape[1], len(names)), names[:0]
        else:
            start: Any = base.tokenizer if self.variant == "vqvae+vq" else base.tokenizer.encoder
            if self.variant == "mae":
                assert base.masked is not None
                start = base.masked.encoder
            body, known = deepcopy(start).cpu(), base.subjects
        fusion = (body.encoder if isinstance(body, DuINTokenizer) else body).fusion
        more = names[~np.isin(names, known)]
        if base is not None and len(more):
            fusion.extend(len(more))
        subjects = np.concatenate([known, more]) if len(known) else more
        own = np.array([int(np.flatnonzero(subjects == v)[0]) for v in names])
        if len(more):
            fusion.measure(x, torch.from_numpy(own[subject]), first=len(known))
        if not fusion.present.any(1).all():
            raise InputError(f"all channels are flat of subject {str(subjects[~fusion.present.any(1).numpy()][0])!r}")
        if base is None:
            some = torch.randperm(len(x))[:AT_ONCE]
            encoder: Any = body
            encoder.calibrate(x[some], torch.from_numpy(own[subject])[some])
        return body, subjects, own

    def _given(self, X: Any, subject: Any) -> tuple[Pretrained, Tensor, Tensor]:
        base = getattr(self, "base_", None) or getattr(self, "pretrained_", None)
        if base is None:
            raise NotFittedError("there are no codes: call pretrain, or fit with another variant than 'scratch'")
        x = as_trials(X, channels=base.tokenizer.encoder.fusion.weight.shape[1])
        if x.shape[2] % self.patch:
            raise InputError(f"X has {x.shape[2]} samples, no whole number of patches of {self.patch}")
        return base, torch.from_numpy(x).float(), _places(subject, base.subjects, len(x))


def _training() -> Any:
    from nissl.recordings import training  # needs Lightning, which reading a trained model does not

    return training


def _named(subject: Any, n: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Names of subjects, and of each trial the number of its subject."""
    if subject is None:
        return np.array([0]), np.zeros(n, dtype=np.int64)
    return np.unique(as_labels(subject, n, name), return_inverse=True)


def _places(subject: Any, known: np.ndarray, n: int) -> Tensor:
    if subject is None:
        if len(known) > 1:
            raise InputError(f"say whose trials they are: subject is one of {', '.join(map(str, known))}")
        return torch.zeros(n, dtype=torch.int64)
    subject = as_labels(subject, n, "subject")
    unknown = subject[~np.isin(subject, known)]
    if len(unknown):
        raise InputError(f"subject {str(unknown[0])!r} is unknown; known are {', '.join(map(str, known))}")
    return torch.from_numpy(np.array([int(np.flatnonzero(known == v)[0]) for v in subject]))


def _channel_names(X: Any, n: int) -> np.ndarray:
    if hasattr(X, "ch_names"):
        return np.array(X.ch_names)
    if isinstance(X, xr.DataArray) and "channel" in X.coords:
        return np.asarray(X.coords["channel"])
    return np.arange(n)


@torch.no_grad()
def _by_batch(module: nn.Module, function: Any, *rows: Tensor) -> Tensor:
    """A function of a module, asked a few trials at a time where the module is; the answer is on the CPU."""
    device = next(module.parameters()).device
    batches = zip(*(r.split(AT_ONCE) for r in rows), strict=True)
    return torch.cat([function(*(r.to(device) for r in some)).cpu() for some in batches])


# ---------------------------------------------------------------- picture


def plot_units(
    model: DuIN, X: Any, subject: Any = None, *, trial: int = 0, n_channels: int = 4, n_codes: int = 6,
    sampling_rate: float | None = None,
) -> Any:  # fmt: skip
    """Picture of a trial in units: signals with what the codes make of them, weights of the channels, means of the codes.

    Parameters
    ----------
    model : DuIN
        Pretrained.
    X : array (n_trials, n_channels, n_times)
        The means are over all of them.
    subject : array (n_trials,), optional
    trial : int, default 0
    n_channels, n_codes : int, default 4, 6
        Channels of the largest weights, and the most used codes.
    sampling_rate : float, optional
        In Hz; time is in samples without.

    Returns
    -------
    Figure
    """
    import matplotlib.pyplot as plt

    instance("model", model, DuIN)
    trials = as_trials(X)
    if not is_whole(trial) or not 0 <= trial < len(trials):
        raise InputError(f"trial must be a number from 0 to {len(trials) - 1}, got {trial!r}")
    at_least("n_channels", n_channels, 1)
    at_least("n_codes", n_codes, 1)
    own = None if subject is None else np.asarray(subject)[[trial]]
    units, codes = model.units(trials, subject), model.codes(trials[[trial]], own)[0]
    made = model.reconstruct(trials[[trial]], own)[0]
    weights = model.channel_weights()
    place = 0 if own is None else int(np.flatnonzero(weights.subject.to_numpy() == own[0])[0])
    weight = weights.to_numpy()[place]
    shown = np.sort(weight.argsort()[::-1][:n_channels])
    rate = 1.0 if sampling_rate is None else as_rate(sampling_rate)
    time, unit = np.arange(trials.shape[2]) / rate, "samples" if sampling_rate is None else "s"

    figure = plt.figure(figsize=(10, 5.4), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    above, below = rows
    ax, bars = above.subplots(1, 2, width_ratios=(4, 1))
    step = 6 * float(np.median(trials[trial, shown].std(1))) or 1.0
    for k, c in enumerate(shown):
        signal = trials[trial, c]
        ax.plot(time, signal - signal.mean() - k * step, color="0.65", linewidth=0.8)
        ax.plot(time, made[c] - signal.mean() - k * step, color="C0", linewidth=1.0)
    colours = {int(c): plt.get_cmap("tab20")(k % 20) for k, c in enumerate(units.code.to_numpy())}
    top = 0.8 * step
    for k, code in enumerate(codes):
        start, end = (v * model.patch / rate for v in (k, k + 1))
        ax.axvspan(start, end, color=colours[int(code)], alpha=0.25, linewidth=0)
        if len(codes) <= 40:
            ax.text((start + end) / 2, top, str(code), ha="center", fontsize=6)
    ax.set_yticks(-step * np.arange(len(shown)), [str(model.channels_[c]) for c in shown])
    ax.set(xlabel=f"time ({unit})", xlim=(0, len(time) / rate), ylim=(-step * (len(shown) - 0.3), 1.1 * step))
    ax.set_title("A trial (grey), in its codes (blue)")
    bars.barh(np.arange(len(weight)), weight, color="C0")
    bars.set_yticks(np.arange(len(weight)), [str(c) for c in model.channels_], fontsize=7)
    bars.invert_yaxis()
    bars.set(xlabel="weight", title="Channels")
    some = units[:n_codes]
    most = float(np.abs(some).max()) or 1.0
    panels = below.subplots(1, len(some), sharey=True, squeeze=False)[0]
    for panel, unit_mean in zip(panels, some, strict=True):
        panel.imshow(unit_mean, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        panel.set_title(f"code {int(unit_mean.code)}, {int(unit_mean.patches)} patches", fontsize=8)
        panel.set_xlabel("sample")
    panels[0].set_ylabel("channel")
    return figure
