"""Spikes as sentences: each spike is a token (neuron, time bin), a window of spikes is what is written after the window before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from nissl.arguments import at_least, instance
from nissl.errors import InputError
from nissl.recordings.arrays import as_bins


@dataclass(frozen=True, eq=False)
class Stream:
    """Samples of another modality beside the spikes: frames of a film, the speed of a ball, the size of a pupil.

    Parameters
    ----------
    values : array (n_samples, n_variables) or, for frames, (n_samples, height, width)
        Scaled to about unit variance.
    last : int, default 1
        Samples that are given with a window: the last ones before its end.
    times : array (n_samples,), optional
        When each sample is known, in bins of the spikes, rising. Default: sample i with bin i.
    lag : float, default 0
        Bins by which samples must be older than the end of a window. With the length of a window, all of them lie before it.

    Raises
    ------
    InputError
        Arrays of another shape, NaN, times that do not rise.
    """

    values: Any
    last: int = 1
    times: Any = None
    lag: float = 0.0

    def __post_init__(self) -> None:
        """Check and keep arrays."""
        values = np.asarray(self.values)
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim not in (2, 3) or values.dtype.kind not in "biuf" or not values.size:
            raise InputError(
                f"values of a Stream must be numbers (n_samples, n_variables) or (n_samples, height, width), got {values.shape} {values.dtype}"
            )
        at_least("last", self.last, 1)
        times = np.arange(len(values), dtype=np.float64) if self.times is None else np.asarray(self.times, np.float64)
        if times.shape != (len(values),) or not np.isfinite(times).all() or (np.diff(times) < 0).any():
            raise InputError(f"times must be one rising number of bins for each of {len(values)} samples, got the shape {times.shape}")  # fmt: skip
        if not np.isfinite(values).all():
            raise InputError("values of a Stream hold NaN or infinity")
        object.__setattr__(self, "values", values.astype(np.float32))
        object.__setattr__(self, "times", times)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a window is given: (last, n_variables) or (last, height, width)."""
        return (self.last, *self.values.shape[1:])

    def before(self, ends: np.ndarray, name: str = "this stream") -> Tensor:
        """The last samples before each of `ends` (in bins): (n, last, ...). The first sample is repeated where there are fewer."""
        newest = np.searchsorted(self.times, ends - self.lag, side="left") - 1
        if (newest < 0).any():
            raise InputError(f"{name} has no sample before bin {ends[newest < 0][0] - self.lag:g}, its first is at {self.times[0]:g}")  # fmt: skip
        at = np.maximum(newest[:, None] - np.arange(self.last)[::-1], 0)
        return torch.from_numpy(self.values[at])


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens of windows of a recording, each with those of the time before it and with its samples of other modalities.

    Attributes
    ----------
    ids, times : Tensor of int (n, n_tokens)
        Neuron and bin, from the start of the window, of each spike; SOS before them, EOS after them, then PAD.
    past_ids, past_times : Tensor of int (n, n_past)
        The same of the bins before the window.
    streams : dict of name and Tensor (n, last, ...)
    first, length : array of int (n,)
        First bin and number of bins.
    trial : array of int (n,)
        Number of the trial.
    cut : array of int (n, 2)
        Spikes, the earliest ones, that found no place in the window and in its past.
    """

    ids: Tensor
    times: Tensor
    past_ids: Tensor
    past_times: Tensor
    first: np.ndarray
    length: np.ndarray
    trial: np.ndarray
    cut: np.ndarray
    streams: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.ids)

    def __getitem__(self, rows: Any) -> Windows:
        """Some windows: a slice or an array of numbers or of True and False."""
        at = np.arange(len(self))[rows]
        t = torch.from_numpy(at)
        return Windows(
            self.ids[t], self.times[t], self.past_ids[t], self.past_times[t], self.first[at], self.length[at],
            self.trial[at], self.cut[at], {k: v[t] for k, v in self.streams.items()},
        )  # fmt: skip

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All tensors by name, as `Neuroformer.forward` takes them."""
        own = {"ids": self.ids, "times": self.times, "past_ids": self.past_ids, "past_times": self.past_times}
        return own | self.streams


@dataclass(frozen=True)
class SpikeTokenizer:
    """Turns counts of spikes into tokens and back.

    Spikes are listed by bin, and in a bin by the number of the neuron; a count of c gives c equal tokens. So one set of counts has
    exactly one list.

    Parameters
    ----------
    n_neurons : int
    window, past : int, default 5
        Bins of a window, and of the time before it that it is told of.
    block, past_block : int, default 100 and 700
        Tokens of each at most, SOS and EOS among them. Where there are more spikes, the last ones are kept.

    Notes
    -----
    Neurons have the numbers 0 to n_neurons - 1; `sos`, `eos` and `pad` come after them. Bins are numbered from 0, `time_eos` and
    `time_pad` come after them; SOS has the bin 0.

    References
    ----------
    Antoniades, Yu, Canzano, Wang & Smith (2024). Neuroformer: multimodal and multitask generative pretraining for brain data. ICLR.

    Examples
    --------
    >>> import numpy as np
    >>> from nissl.recordings.spikes import SpikeTokenizer
    >>> tokens = SpikeTokenizer(3, window=2, past=2).windows(np.array([[1, 0, 2], [0, 0, 0], [0, 1, 0], [1, 0, 0]]))
    >>> tokens.ids.tolist(), tokens.past_ids.tolist()
    ([[3, 0, 2, 2, 4], [3, 1, 0, 4, 5]], [[3, 4, 5, 5, 5], [3, 0, 2, 2, 4]])
    """

    n_neurons: int
    window: int = 5
    past: int = 5
    block: int = 100
    past_block: int = 700

    def __post_init__(self) -> None:
        """Check."""
        for name, low in (("n_neurons", 1), ("window", 1), ("past", 1), ("block", 3), ("past_block", 3)):
            at_least(name, getattr(self, name), low)

    @property
    def sos(self) -> int:
        """Starts a sentence."""
        return self.n_neurons

    @property
    def eos(self) -> int:
        """Ends it, and so carries the number of spikes."""
        return self.n_neurons + 1

    @property
    def pad(self) -> int:
        """Fills it up."""
        return self.n_neurons + 2

    @property
    def n_ids(self) -> int:
        """Words for neurons, SOS, EOS and PAD."""
        return self.n_neurons + 3

    @property
    def time_eos(self) -> int:
        """The time of EOS."""
        return max(self.window, self.past)

    @property
    def time_pad(self) -> int:
        """The time of PAD."""
        return self.time_eos + 1

    @property
    def n_times(self) -> int:
        """Words for bins, EOS and PAD."""
        return self.time_eos + 2

    def windows(self, X: Any, groups: Any = None, streams: Mapping[str, Stream] | None = None) -> Windows:
        """All windows of a recording, one after the other; the last one of a trial may be shorter.

        Parameters
        ----------
        X : array (n_bins, n_neurons) or DataArray ("bin", "neuron")
            Counts of spikes.
        groups : array (n_bins,), optional
            Trials: no window and no past crosses the border of one.
        streams : dict of name and Stream, optional

        Raises
        ------
        InputError
            Counts that are no whole numbers, another number of neurons, streams that begin too late.
        """
        X = as_counts(X, self.n_neurons)
        starts = trial_starts(groups, len(X))
        ends = np.append(starts[1:], len(X))
        first = np.concatenate([np.arange(a, b, self.window) for a, b in zip(starts, ends, strict=True)])
        trial = np.searchsorted(starts, first, side="right") - 1
        stop = np.minimum(first + self.window, ends[trial])
        bins, neurons = _spikes(X)
        ids, times, cut = self._tokens(bins, neurons, first, first, stop, self.block)
        before = first - self.past
        past_ids, past_times, past_cut = self._tokens(
            bins, neurons, before, np.maximum(before, starts[trial]), first, self.past_block
        )
        given: dict[str, Tensor] = {}
        for name, stream in (streams or {}).items():
            instance(f"streams[{name!r}]", stream, Stream)
            given[name] = stream.before(stop, f"streams[{name!r}]")
        return Windows(
            ids, times, past_ids, past_times, first, stop - first, trial, np.stack([cut, past_cut], 1), given
        )

    def encode(self, counts: Any, past: bool = False) -> tuple[Tensor, Tensor, np.ndarray]:
        """Tokens of separate windows.

        Parameters
        ----------
        counts : array of int (n, n_bins, n_neurons)
        past : bool, default False
            Whether the block is that of the past.

        Returns
        -------
        ids, times : Tensor (n, n_tokens)
            As many as the longest needs.
        cut : array of int (n,)
            Spikes left out.
        """
        counts = np.asarray(counts)
        if counts.ndim != 3 or counts.shape[1] > self.time_eos:
            raise InputError(f"counts must be (n, n_bins, n_neurons) with at most {self.time_eos} bins, got {counts.shape}")  # fmt: skip
        n, n_bins, _ = counts.shape
        bins, neurons = _spikes(as_counts(counts.reshape(n * n_bins, -1), self.n_neurons))
        start = n_bins * np.arange(n)
        return self._tokens(bins, neurons, start, start, start + n_bins, self.past_block if past else self.block)

    def _tokens(
        self, bins: np.ndarray, neurons: np.ndarray, origin: np.ndarray, start: np.ndarray, stop: np.ndarray, block: int
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Of the spikes from `start` to before `stop`; times count from `origin`."""
        low, high = np.searchsorted(bins, start), np.searchsorted(bins, stop)
        kept = np.minimum(high - low, block - 2)
        row = np.repeat(np.arange(len(kept)), kept)
        place = np.arange(len(row)) - np.repeat(np.cumsum(kept) - kept, kept)
        spike = (high - kept)[row] + place
        width = int(kept.max(initial=0)) + 2
        ids = np.full((len(kept), width), self.pad)
        times = np.full((len(kept), width), self.time_pad)
        ids[:, 0], times[:, 0] = self.sos, 0
        ids[row, place + 1], times[row, place + 1] = neurons[spike], bins[spike] - origin[row]
        end = np.arange(len(kept)), kept + 1
        ids[end], times[end] = self.eos, self.time_eos
        return torch.from_numpy(ids), torch.from_numpy(times), high - low - kept

    def decode(self, ids: Tensor, times: Tensor, n_bins: int | None = None) -> np.ndarray:
        """Counts (n, n_bins, n_neurons) of tokens; what comes after EOS is left out. `n_bins` is `window` unless given."""
        n_bins = self.window if n_bins is None else n_bins
        where = np.asarray(ids), np.asarray(times)
        counts = np.zeros((len(ids), n_bins, self.n_neurons), dtype=np.int64)
        open_ = (where[0] == self.eos).cumsum(1) == 0
        row, place = np.nonzero(open_ & (where[0] < self.n_neurons) & (where[1] < n_bins))
        np.add.at(counts, (row, where[1][row, place], where[0][row, place]), 1)
        return counts

    def spoken(self, ids: Tensor) -> Tensor:
        """Where a token stands after which something is to be predicted: SOS and spikes, not EOS and PAD."""
        return (ids != self.pad) & (ids != self.eos)


def as_counts(X: Any, n_neurons: int | None = None) -> np.ndarray:
    """Counts of spikes (n_bins, n_neurons), checked: whole numbers from 0, as int64."""
    X = as_bins(X, neurons=n_neurons)
    if (X < 0).any() or (np.round(X) != X).any():
        raise InputError(
            "X must hold counts of spikes: whole numbers from 0; Negative values in data or fractions were given"
        )
    return X.astype(np.int64)


def trial_starts(groups: Any, n: int) -> np.ndarray:
    """First bins of the trials."""
    if groups is None:
        return np.array([0])
    found = np.asarray(groups)
    if found.shape != (n,):
        raise InputError(f"groups must hold one value for each of {n} bins, got the shape {found.shape}")
    return np.concatenate([[0], np.flatnonzero(found[1:] != found[:-1]) + 1])


def _spikes(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bin and neuron of each spike, in order."""
    bins, neurons = np.nonzero(X)
    times = X[bins, neurons]
    return np.repeat(bins, times), np.repeat(neurons, times)


def spike_agreement(true: Any, generated: Any) -> dict[str, np.ndarray]:
    """How well generated spikes agree with real ones.

    Parameters
    ----------
    true : array of int (n_windows, n_bins, n_neurons)
    generated : array of int (n_windows, n_bins, n_neurons) or (n_samples, n_windows, n_bins, n_neurons)

    Returns
    -------
    dict
        ``precision``, ``recall``, ``f1`` (n_windows,) of the sets of neurons that fire in a window, mean of samples: 1 where both sets
        are empty, 0 where one of them is. ``r`` (n_neurons,): correlation over all bins of the counts with the mean of the samples;
        NaN where one of them does not vary.
    """
    real, found = np.asarray(true), np.asarray(generated)
    if found.ndim == 3:
        found = found[None]
    if real.ndim != 3 or found.ndim != 4 or found.shape[1:] != real.shape:
        raise InputError(f"true must be (n_windows, n_bins, n_neurons) and generated the same for each sample, got {real.shape} and {np.shape(generated)}")  # fmt: skip
    fires, written = real.any(1), found.any(2)
    both, n_real, n_written = (fires & written).sum(-1), fires.sum(-1) + 0 * written.sum(-1), written.sum(-1)

    def share(of: np.ndarray) -> np.ndarray:
        none = (n_real == 0) & (n_written == 0)
        return np.where(none, 1.0, both / np.maximum(of, 1)).mean(0)

    a, b = real.reshape(-1, real.shape[-1]).astype(float), found.mean(0).reshape(-1, real.shape[-1])
    a, b = a - a.mean(0), b - b.mean(0)
    spread = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    r = np.divide((a * b).sum(0), spread, out=np.full(len(spread), np.nan), where=spread > 0)
    return {"precision": share(n_written), "recall": share(n_real), "f1": share((n_real + n_written) / 2), "r": r}


def spike_table(counts: Any, windows: Windows) -> pd.DataFrame:
    """Spikes of generated windows, one row each: sample, trial, window, bin of the recording, neuron.

    Parameters
    ----------
    counts : array of int (n_samples, n_windows, n_bins, n_neurons)
        As `Neuroformer.generate` gives it.
    windows : Windows
        Those that were generated.
    """
    counts = np.asarray(counts)
    if counts.ndim != 4 or counts.shape[1] != len(windows):
        raise InputError(f"counts must be (n_samples, {len(windows)}, n_bins, n_neurons), got {counts.shape}")
    sample, window, place, neuron = np.nonzero(counts)
    rows = pd.DataFrame({
        "sample": sample, "trial": windows.trial[window], "window": window, "bin": windows.first[window] + place, "neuron": neuron,
    })  # fmt: skip
    return rows.loc[rows.index.repeat(counts[sample, window, place, neuron])].reset_index(drop=True)
