"""Behaviour from spikes by a pretrained Neuroformer, as a scikit-learn estimator; and the picture of a circuit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from nissl.arguments import as_path, is_number
from nissl.errors import InputError
from nissl.recordings.arrays import as_bins
from nissl.recordings.extras import need
from nissl.recordings.spikes.neuroformer import Neuroformer
from nissl.recordings.spikes.tokens import SpikeTokenizer, Stream, Windows, as_counts
from nissl.seeds import seeded

WARM_UP = 0.05
"""Share of the epochs over which the learning rate rises."""
BETAS, CLIP = (0.9, 0.95), 1.0
"""Of AdamW; norm to which gradients are scaled down."""
BEHAVIOUR = "behaviour"
"""Name of the one head."""


class NeuroformerDecoder(RegressorMixin, BaseEstimator):
    """A network that learns to write spikes (`pretrain`), then to read a behaviour off them with few labels (`fit`).

    Parameters
    ----------
    window, past : int, default 5
        Bins of a window, and of the time before it that it is told of.
    block, past_block : int, default 100 and 700
        Tokens of each at most; see `SpikeTokenizer`.
    n_features, n_heads, n_state, n_history, n_stimulus, n_behaviour, dropout, kernel, align
        Of the network; see `Neuroformer`. The defaults are the paper's: 28 million parameters, which want a GPU.
    tune : {"behaviour", "all", "head"}, default "behaviour"
        What `fit` does: all weights by the loss of the behaviour, all weights by all losses, or the linear head alone.
    pretrain_epochs, epochs : int, default 250
    batch_size : int, default 160
        Windows.
    learning_rate : float, default 1e-4
        Rises over the first twentieth of the epochs, then falls to 0 along a cosine.
    weight_decay : float, default 0.1
        The paper's 1.0 spares embeddings, this one does not.
    validation : float, default 0.1
        Share of the windows, the last ones, that are held out; the weights of the epoch that did best there are kept. Windows drawn
        at random would be neighbours of those trained on. 0: none, and the last weights are kept.
    patience : int, optional
        Stop after this many epochs that were no better.
    pretrained : Neuroformer, optional
        In place of `pretrain`. ``pretrained_`` of another decoder, for cross-validation, in which estimators are cloned and forget.
    random_state : int, default 0
    device : str or device, optional
        Default: the CPU.
    progress : bool, default True
    folder : path, optional
        Where checkpoints go after every epoch, in ``pretrain`` and ``fit``.
    resume : bool, default False
        Go on from them.

    Attributes
    ----------
    pretrained_ : Neuroformer
        After `pretrain`.
    pretrain_history_, history_ : History
        Losses.
    model_ : Neuroformer
        After `fit`.
    tokenizer_ : SpikeTokenizer
    n_features_in_ : int
        Neurons.

    Notes
    -----
    The behaviour of a window is the mean over its bins, and all of its bins are given the same prediction. It is standardised for
    training. Training needs the extra `training`; prediction does not.

    References
    ----------
    Antoniades, Yu, Canzano, Wang & Smith (2024). Neuroformer: multimodal and multitask generative pretraining for brain data. ICLR.

    See Also
    --------
    Neuroformer : the network: generation, connectivity, latents.
    DiscriminativeKalmanFilter, KalmanFilterDecoder : decoders that know of motion.

    Examples
    --------
    >>> import numpy as np
    >>> from nissl.recordings.spikes import NeuroformerDecoder
    >>> rng = np.random.default_rng(0)
    >>> X = rng.poisson(0.3, (200, 6))
    >>> decoder = NeuroformerDecoder(1, 1, n_features=16, n_heads=2, n_state=1, n_history=1, pretrain_epochs=2, epochs=2, progress=False)
    >>> decoder.pretrain(X).fit(X[:100], X[:100, 0]).predict(X).shape
    (200,)
    """

    def __init__(
        self, window: int = 5, past: int = 5, *, block: int = 100, past_block: int = 700, n_features: int = 256,
        n_heads: int = 8, n_state: int = 6, n_history: int = 6, n_stimulus: int = 6, n_behaviour: int = 4,
        dropout: float = 0.2, kernel: Sequence[int] = (3, 5, 5), align: Sequence[str] = (), tune: str = "behaviour",
        pretrain_epochs: int = 250, epochs: int = 250, batch_size: int = 160, learning_rate: float = 1e-4,
        weight_decay: float = 0.1, validation: float = 0.1, patience: int | None = None,
        pretrained: Neuroformer | None = None, random_state: int = 0, device: Any = None, progress: bool = True,
        folder: str | Path | None = None, resume: bool = False,
    ) -> None:  # fmt: skip
        self.window = window
        self.past = past
        self.block = block
        self.past_block = past_block
        self.n_features = n_features
        self.n_heads = n_heads
        self.n_state = n_state
        self.n_history = n_history
        self.n_stimulus = n_stimulus
        self.n_behaviour = n_behaviour
        self.dropout = dropout
        self.kernel = kernel
        self.align = align
        self.tune = tune
        self.pretrain_epochs = pretrain_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.validation = validation
        self.patience = patience
        self.pretrained = pretrained
        self.random_state = random_state
        self.device = device
        self.progress = progress
        self.folder = folder
        self.resume = resume

    def __sklearn_tags__(self) -> Any:
        """Counts; several outputs at once."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        tags.input_tags.positive_only = True
        return tags

    def pretrain(self, X: Any, groups: Any = None, streams: Mapping[str, Stream] | None = None) -> NeuroformerDecoder:
        """Learn to write spikes; no labels.

        Parameters
        ----------
        X : array (n_bins, n_neurons) or DataArray ("bin", "neuron")
            Counts of spikes in the order of time.
        groups : array (n_bins,), optional
            Trials; no window crosses the border of one.
        streams : dict of name and Stream, optional
            Other modalities that the spikes are written from.

        Raises
        ------
        InputError
            Parameters, counts or streams that do not fit.
        MissingExtraError
            Lightning is not installed.
        """
        self._check()
        X = as_counts(X)
        tokenizer = self._tokenizer(X)
        windows = self._windows(tokenizer, X, groups, streams)
        model = self._network(tokenizer, windows, {})
        history = self._train(model, windows, None, self.pretrain_epochs, lambda b, y: model.loss(b), None, "pretrain")
        self.pretrained_, self.pretrain_history_ = model, history
        return self

    def fit(
        self, X: Any, y: Any, groups: Any = None, streams: Mapping[str, Stream] | None = None
    ) -> NeuroformerDecoder:
        """Learn a behaviour, from the pretrained weights where there are some.

        Parameters
        ----------
        X : array (n_bins, n_neurons) or DataArray ("bin", "neuron")
        y : array (n_bins,) or (n_bins, n_outputs)
        groups, streams
            As of `pretrain`.

        Raises
        ------
        InputError
            As of `pretrain`; another number of neurons, or other settings, than those of the pretrained network.
        """
        self._check()
        X = as_counts(X)
        if y is None:
            raise InputError("y is missing: requires y to be passed, but the target y is None")
        target = np.asarray(y)
        if target.ndim not in (1, 2) or len(target) != len(X):
            raise InputError(f"y must be ({len(X)},) or ({len(X)}, n_outputs), as many as there are bins; got the shape {target.shape}")  # fmt: skip
        z = as_bins(target.reshape(len(target), -1), "y")
        tokenizer = self._tokenizer(X)
        windows = self._windows(tokenizer, X, groups, streams)
        model = self._network(tokenizer, windows, {BEHAVIOUR: z.shape[1]})
        start = self.pretrained if self.pretrained is not None else getattr(self, "pretrained_", None)
        if start is not None:
            _copy(start, model)
        z = np.add.reduceat(z, windows.first) / windows.length[:, None]
        center, scale = z.mean(0), z.std(0)
        scale[scale == 0] = 1.0
        wanted = torch.from_numpy(((z - center) / scale).astype(np.float32)).to(self._device())

        def loss(inputs: dict[str, Tensor], y: Tensor) -> dict[str, Tensor]:
            found = model.loss(inputs, {BEHAVIOUR: y})
            return found if self.tune == "all" else {BEHAVIOUR: found[BEHAVIOUR]}

        head = list(model.heads.parameters()) if self.tune == "head" else None
        self.history_ = self._train(model, windows, wanted, self.epochs, loss, head, "fit")
        self.model_, self.tokenizer_ = model, tokenizer
        self.n_features_in_ = tokenizer.n_neurons
        self._center, self._scale, self._flat = center, scale, target.ndim == 1
        return self

    def predict(self, X: Any, groups: Any = None, streams: Mapping[str, Stream] | None = None) -> np.ndarray:
        """The behaviour in each bin, (n_bins,) or (n_bins, n_outputs): that of the window it is in.

        Parameters
        ----------
        X, groups, streams
            As of `fit`.
        """
        check_is_fitted(self, "model_")
        windows = self._windows(self.tokenizer_, as_counts(X, self.n_features_in_), groups, streams)
        if set(windows.streams) != set(self.model_.shapes):
            raise InputError(f"streams must be {list(self.model_.shapes)} as in fit, got {list(windows.streams)}")
        found = self.model_.decode(windows, self.batch_size)[BEHAVIOUR] * self._scale + self._center
        found = np.repeat(found, windows.length, 0)
        return found[:, 0] if self._flat else found

    # ---------------------------------------------------------------- what the three share

    def _check(self) -> None:
        if self.tune not in ("behaviour", "all", "head"):
            raise InputError(f"tune={self.tune!r}: choose 'behaviour', 'all' or 'head'")
        if not is_number(self.validation) or not 0 <= self.validation < 1:
            raise InputError(f"validation must be a share from 0 to below 1, got {self.validation!r}")
        if self.pretrained is not None and not isinstance(self.pretrained, Neuroformer):
            raise InputError(f"pretrained must be a Neuroformer, got {type(self.pretrained).__name__}")

    def _device(self) -> torch.device:
        return torch.device("cpu" if self.device is None else self.device)

    def _tokenizer(self, X: np.ndarray) -> SpikeTokenizer:
        return SpikeTokenizer(X.shape[1], self.window, self.past, self.block, self.past_block)

    def _windows(self, tokenizer: SpikeTokenizer, X: Any, groups: Any, streams: Any) -> Windows:
        windows = tokenizer.windows(X, groups, streams)
        lost, spikes = windows.cut.sum(0), np.asarray(X).sum()
        for name, n in zip(("block", "past_block"), lost, strict=True):
            if n:
                warnings.warn(f"{n} of {int(spikes)} spikes find no place: raise {name}={getattr(tokenizer, name)}", stacklevel=3)  # fmt: skip
        return windows

    def _network(self, tokenizer: SpikeTokenizer, windows: Windows, heads: dict[str, int]) -> Neuroformer:
        with seeded(self.random_state):
            return Neuroformer(
                tokenizer, streams={k: tuple(v.shape[1:]) for k, v in windows.streams.items()}, heads=heads,
                n_features=self.n_features, n_heads=self.n_heads, n_state=self.n_state, n_history=self.n_history,
                n_stimulus=self.n_stimulus, n_behaviour=self.n_behaviour, dropout=self.dropout, kernel=self.kernel,
                align=self.align,
            ).to(self._device())  # fmt: skip

    def _train(
        self, model: Neuroformer, windows: Windows, y: Tensor | None, epochs: int,
        loss: Callable[..., dict[str, Tensor]], parameters: Any, name: str,
    ) -> Any:  # fmt: skip
        train = need("nissl.recordings.training", "training").train
        names, n = list(windows.inputs), len(windows)
        held = round(self.validation * n) if n > 1 else 0
        data = [v.to(self._device()) for v in windows.inputs.values()]
        if y is not None:
            data.append(y)

        def losses(batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return loss(dict(zip(names, batch, strict=False)), batch[-1])

        def validate(_: Any) -> float:
            total = 0.0
            for i in range(n - held, n, self.batch_size):
                batch = tuple(t[i : i + self.batch_size] for t in data)
                total += len(batch[0]) * sum(float(v) for v in losses(batch).values())
            return -total / held

        return train(
            model, tuple(t[: n - held] for t in data), lambda batch, g: losses(batch), epochs=epochs,
            batch_size=self.batch_size, learning_rate=self.learning_rate, final_learning_rate=0.0,
            warm_up=int(WARM_UP * epochs), weight_decay=self.weight_decay, betas=BETAS, clip=CLIP, parameters=parameters,
            validate=validate if held else None, patience=self.patience if held else None,
            folder=None if self.folder is None else as_path("folder", self.folder) / name, resume=self.resume,
            seed=self.random_state, device=self._device(), progress=self.progress,
        )  # fmt: skip


def _copy(start: Neuroformer, model: Neuroformer) -> None:
    """All weights but those of heads."""
    if start.tokenizer != model.tokenizer:
        raise InputError(f"the pretrained network reads {start.tokenizer}, this one {model.tokenizer}")
    given, own = start.state_dict(), model.state_dict()
    wanted = {k for k in own if not k.startswith("heads.")}
    other = sorted(k for k in wanted ^ {k for k in given if not k.startswith("heads.")})
    other += sorted(k for k in wanted & set(given) if own[k].shape != given[k].shape)
    if other:
        raise InputError(f"the pretrained network has other sizes or streams than this one; it differs in {other[0]} and {len(other) - 1} more")  # fmt: skip
    model.load_state_dict(own | {k: given[k] for k in wanted})


def plot_connectivity(maps: Mapping[str, Any], order: Any = None) -> Any:
    """Maps of a circuit side by side: targets down, sources across.

    Parameters
    ----------
    maps : dict of title and array (n_neurons, n_neurons)
        As of `Neuroformer.connectivity`, and the truth where it is known. Each has its own scale; NaN is grey.
    order : array of int, optional
        Neurons from left to right and top to bottom.

    Returns
    -------
    matplotlib Figure
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    if not maps:
        raise InputError("there is no map to draw")
    arrays = {title: np.asarray(m, dtype=np.float64) for title, m in maps.items()}
    n = len(next(iter(arrays.values())))
    for title, m in arrays.items():
        if m.shape != (n, n):
            raise InputError(f"maps must be square and of one size, {title!r} is {m.shape}")
    at = np.arange(n) if order is None else np.asarray(order)
    if sorted(at.tolist()) != list(range(n)):
        raise InputError(f"order must hold each of {n} neurons once")
    figure = Figure(figsize=(3.4 * len(arrays), 3.5), layout="constrained")
    grey = colormaps["RdBu_r"].with_extremes(bad="0.85")
    for ax, (title, m) in zip(np.atleast_1d(figure.subplots(1, len(arrays))), arrays.items(), strict=True):
        shown = np.ma.masked_invalid(m[np.ix_(at, at)])
        high = float(np.abs(shown).max()) if shown.count() else 1.0
        image = ax.imshow(shown, cmap=grey, vmin=-(high or 1.0), vmax=high or 1.0, interpolation="nearest")
        ax.set(title=title, xlabel="source")
        figure.colorbar(image, ax=ax, shrink=0.7)
    figure.axes[0].set_ylabel("target")
    return figure
