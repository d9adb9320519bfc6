"""Files and objects of recordings to the arrays of `nissl.recordings.arrays`, and back to MNE.

Signals become ``xarray.DataArray`` with the dimensions ``("channel", "time")`` or ``("trial", "channel", "time")``. Coordinates
of channels: their names, ``type`` and ``unit``, and ``x``, ``y``, ``z`` in m where positions are known; ``time`` in seconds.
Spikes become ``("bin", "neuron")``. ``attrs``: ``sampling_rate`` in Hz, ``units``, ``source``.

Only files that are named are read. Nothing is fetched, nothing unpickled.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from nissl.arguments import as_path, is_number
from nissl.errors import InputError, blame
from nissl.recordings.arrays import TRIALS, as_labels, as_rate
from nissl.recordings.extras import need

READERS = {".fif": "read_raw_fif", ".fif.gz": "read_raw_fif", ".edf": "read_raw_edf", ".bdf": "read_raw_bdf",
           ".gdf": "read_raw_gdf", ".vhdr": "read_raw_brainvision"}  # fmt: skip
"""Suffixes of files of signals, and the functions of ``mne.io`` that read them."""

SCALES = {
    "V": 1.0,
    "mV": 1e-3,
    "µV": 1e-6,
    "μV": 1e-6,
    "uV": 1e-6,
    "nV": 1e-9,
    "T": 1.0,
    "pT": 1e-12,
    "fT": 1e-15,
    "T/m": 1.0,
}
"""Units of signals and what they are in V, T and T/m, which MNE computes in."""

DATA_TYPES = ("eeg", "ecog", "seeg", "dbs", "mag", "grad", "csd")
"""Types of channels that are signals of a brain."""

EPOCHS = ("-epo.fif", "_epo.fif", "-epo.fif.gz", "_epo.fif.gz")
"""How names of files of trials end."""


# ---------------------------------------------------------------- signals from arrays


def signals(
    data: Any,
    sampling_rate: float,
    channels: Sequence[str] | np.ndarray | None = None,
    *,
    units: str = "unknown",
    start: float = 0.0,
    times: Any = None,
    types: Sequence[str] | np.ndarray | None = None,
    positions: Any = None,
    source: str = "array",
) -> xr.DataArray:
    """Signals with names, out of plain arrays.

    Parameters
    ----------
    data : array (n_channels, n_times) or (n_trials, n_channels, n_times)
    sampling_rate : float
        In Hz.
    channels : sequence of str, optional
        Different names; "channel 1", ... if not given.
    units : str, default "unknown"
        Of all channels, such as "µV".
    start : float, default 0
        Time of the first sample in seconds.
    times : array (n_times,), optional
        Times of the samples in seconds, instead of `start`. They must agree with `sampling_rate`.
    types : sequence of str, optional
        Types of the channels as MNE calls them, "eeg" if not given.
    positions : array (n_channels, 3), optional
        Of electrodes or sensors, in m.
    source : str

    Returns
    -------
    DataArray ("channel", "time") or ("trial", "channel", "time")

    Raises
    ------
    InputError
        Shape, names, rate and times that do not fit each other, or infinite values.

    Warns
    -----
    UserWarning
        Flat channels and channels with NaN, by name.
    """
    rate = as_rate(sampling_rate)
    found = np.asarray(data)
    if found.dtype.kind not in "fiub" or found.ndim not in (2, 3) or not found.size:
        raise InputError(
            "data must be real numbers (n_channels, n_times) or (n_trials, n_channels, n_times), "
            f"got {found.dtype} of shape {found.shape}"
        )
    found = found.astype(np.float64, copy=False)
    n, n_times = found.shape[-2:]
    names = [f"channel {i + 1}" for i in range(n)] if channels is None else [str(c) for c in channels]
    if len(names) != n:
        raise InputError(f"{len(names)} names of channels for {n} channels")
    _different(names, "channels")
    kinds = ["eeg"] * n if types is None else [str(t) for t in types]
    if len(kinds) != n:
        raise InputError(f"{len(kinds)} types of channels for {n} channels")
    if times is None:
        if not is_number(start):
            raise InputError(f"start must be a number of seconds, got {start!r}")
        times = start + np.arange(n_times) / rate
    else:
        times = np.asarray(times, dtype=np.float64)
        if times.shape != (n_times,):
            raise InputError(f"times have the shape {times.shape}, expected ({n_times},)")
        _check_times(times, rate)
    coords: dict[str, Any] = {
        "channel": names,
        "time": times,
        "type": ("channel", kinds),
        "unit": ("channel", [units] * n),
    }
    if positions is not None:
        places = np.asarray(positions, dtype=np.float64)
        if places.shape != (n, 3):
            raise InputError(f"positions must have the shape ({n}, 3), got {places.shape}")
        coords |= {axis: ("channel", places[:, i]) for i, axis in enumerate("xyz")}
    _say_what_is_wrong(found, names, source)
    attrs = {"sampling_rate": rate, "units": units, "source": source}
    return xr.DataArray(found, dims=TRIALS[-found.ndim :], coords=coords, attrs=attrs)


def _different(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    twice = list(dict.fromkeys(n for n in names if n in seen or seen.add(n)))
    if twice:
        raise InputError(f"{what} have the same name: {', '.join(twice)}")


def _check_times(times: np.ndarray, rate: float) -> None:
    """That times of samples are those of a steady rate: half a sample of drift, or a gap of as much, is an error."""
    if not np.isfinite(times).all():
        raise InputError("times hold NaN or infinity")
    if len(times) < 2:
        return
    steps = np.diff(times)
    if (steps <= 0).any():
        raise InputError(f"times must rise; sample {int(np.argmax(steps <= 0)) + 1} does not come after the one before")
    usual = float(np.median(steps))
    gap = steps > 1.5 * usual
    if gap.any():
        i = int(np.argmax(gap))
        raise InputError(
            f"{int(gap.sum())} gaps in the times of the samples; the first is from {times[i]:g} to {times[i + 1]:g} s"
        )
    drift = np.abs(times - times[0] - np.arange(len(times)) / rate).max() * rate
    if drift > 0.5:
        actual = (len(times) - 1) / (times[-1] - times[0])
        raise InputError(f"sampling_rate is {rate:g} Hz but the times of the samples are those of {actual:.6g} Hz")


def _say_what_is_wrong(data: np.ndarray, names: Sequence[str], source: str) -> None:
    axes = tuple(i for i in range(data.ndim) if i != data.ndim - 2)
    infinite = np.asarray(np.isinf(data).any(axes))
    if infinite.any():
        raise InputError(f"{source}: infinite values in {_named(names, infinite)}")
    missing = np.asarray(np.isnan(data).any(axes))
    flat = ~missing & (np.ptp(data, axis=-1).reshape(-1, len(names)).max(0) == 0)
    if missing.any():
        warnings.warn(f"{source}: NaN in {_named(names, missing)}", stacklevel=3)
    if flat.any() and data.shape[-1] > 1:
        warnings.warn(f"{source}: flat: {_named(names, flat)}", stacklevel=3)


def _named(names: Sequence[str], which: np.ndarray) -> str:
    return ", ".join(n for n, w in zip(names, which, strict=True) if w)


# ---------------------------------------------------------------- signals from files and MNE


def read_raw(source: Any, picks: str | Sequence[str] = "data", *, sampling_rate: float | None = None) -> xr.DataArray:
    """A continuous recording from a file, or from an MNE Raw.

    Parameters
    ----------
    source : path or mne.io.Raw
        FIF, EDF, BDF, GDF or BrainVision (.vhdr), by its suffix. MNE reads it.
    picks : str or sequence of str, default "data"
        "data": all channels of `DATA_TYPES` that are not marked bad; a type such as "eeg"; "all"; or names of channels.
    sampling_rate : float, optional
        The rate that the recording must have, in Hz; another one is an error.

    Returns
    -------
    DataArray ("channel", "time")
        Electric channels in µV, magnetic ones in T or T/m; what has no known unit keeps its numbers and the unit
        "unknown". ``attrs["units"]`` is "mixed" where channels differ. Samples count from the start of the data.

    Raises
    ------
    InputError
        No such file or format, missing channels, another sampling rate, no channel left, or what MNE cannot read.
    MissingExtraError
        MNE is not installed.

    Warns
    -----
    UserWarning
        Flat channels, channels with NaN, channels marked bad, channels that were resampled because the rates of a
        file differ, and what MNE warns of; all by name.
    """
    return _read(*_open(source), picks, sampling_rate)


def _open(source: Any) -> tuple[Any, str]:
    """An MNE Raw and what to call it."""
    mne = need("mne")
    if isinstance(source, mne.io.BaseRaw):
        return source, "Raw"
    file = as_path("source", source)
    name = file.name
    if name.lower().endswith(EPOCHS):
        raise InputError(f"{name} holds trials: use read_epochs")
    suffix = ".fif.gz" if name.lower().endswith(".fif.gz") else file.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{name}: unknown format; files of {', '.join(READERS)} can be read")
    if not file.is_file():
        raise InputError(f"there is no file {str(file)!r}")
    if suffix in (".edf", ".bdf"):
        _say_mixed_rates(file)
    return _by_mne(lambda: getattr(mne.io, READERS[suffix])(file, verbose="warning"), name), name


def _read(raw: Any, name: str, picks: str | Sequence[str], sampling_rate: float | None = None) -> xr.DataArray:
    rate = float(raw.info["sfreq"])
    if sampling_rate is not None and abs(as_rate(sampling_rate) - rate) > 1e-6 * rate:
        raise InputError(f"{name} has a sampling rate of {rate:g} Hz, not of {sampling_rate:g} Hz")
    chosen = _chosen(raw, picks, name)
    with blame(InputError, f"{name} cannot be read"):
        data = raw.get_data(picks=chosen)
    return _from_mne(raw, chosen, data, 0.0, name)


def read_epochs(source: Any, picks: str | Sequence[str] = "data") -> tuple[xr.DataArray, np.ndarray]:
    """Trials from a FIF file, or from MNE Epochs, with their labels.

    Parameters
    ----------
    source : path (-epo.fif) or mne.Epochs
    picks : str or sequence of str, default "data"
        As of `read_raw`.

    Returns
    -------
    X : DataArray ("trial", "channel", "time")
    y : array of str (n_trials,)
        Names of the events.

    See Also
    --------
    read_raw : For units, errors and warnings.
    """
    mne = need("mne")
    epochs, name = source, "Epochs"
    if not isinstance(source, mne.BaseEpochs):
        file = as_path("source", source)
        name = file.name
        if not name.lower().endswith(EPOCHS):
            raise InputError(f"{name}: files of trials end with -epo.fif; use read_raw and epochs_from for others")
        if not file.is_file():
            raise InputError(f"there is no file {str(file)!r}")
        epochs = _by_mne(lambda: mne.read_epochs(file, verbose="warning"), name)
    chosen = _chosen(epochs, picks, name)
    with blame(InputError, f"{name} cannot be read"):
        data = epochs.get_data(picks=chosen)
    if not len(data):
        raise InputError(f"{name} has no trial")
    names = {code: label for label, code in epochs.event_id.items()}
    y = np.array([names[code] for code in epochs.events[:, 2]])
    return _from_mne(epochs, chosen, data, float(epochs.tmin), name), y


def _by_mne(read: Any, name: str) -> Any:
    """What MNE reads, its warnings with the file's name in front."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with blame(InputError, f"{name} cannot be read"):
            found = read()
    for message in dict.fromkeys(
        " ".join(str(w.message).split()) for w in heard if issubclass(w.category, RuntimeWarning)
    ):
        warnings.warn(f"{name}: {message}", stacklevel=3)
    return found


def _say_mixed_rates(file: Path) -> None:
    """EDF and BDF files may have a rate for each channel, which MNE makes the highest of them all."""
    with file.open("rb") as f:
        head = f.read(256)
        try:
            n = int(head[252:256])
            f.seek(256 + n * 216)
            samples = [int(f.read(8)) for _ in range(n)]
            f.seek(256)
            names = [f.read(16).decode("latin1").strip() for _ in range(n)]
        except ValueError as error:
            raise InputError(f"{file.name} cannot be read: it has a broken header") from error
    kept = [(c, s) for c, s in zip(names, samples, strict=True) if "annotations" not in c.lower()]
    top = max((s for _, s in kept), default=0)
    slower = [c for c, s in kept if s != top]
    if slower:
        warnings.warn(
            f"{file.name}: sampling rates differ; these channels are slower, and resampled to the highest rate: "
            f"{', '.join(slower)}",
            stacklevel=3,
        )


def _chosen(recording: Any, picks: str | Sequence[str], name: str) -> list[int]:
    names, types = list(recording.ch_names), recording.get_channel_types()
    if isinstance(picks, str):
        kinds = {"data": DATA_TYPES, "all": tuple(set(types))}.get(picks, (picks,))
        bad = set(recording.info["bads"]) if picks != "all" else set()
        chosen = [i for i, t in enumerate(types) if t in kinds and names[i] not in bad]
        left = [names[i] for i, t in enumerate(types) if t in kinds and names[i] in bad]
        if not chosen:
            raise InputError(
                f"{name} has no channel of the kind {picks!r}; it has the types {', '.join(sorted(set(types)))}"
            )
        if left:
            warnings.warn(f"{name}: marked bad, and left out: {', '.join(left)}", stacklevel=3)
        return chosen
    wanted = [str(p) for p in picks]
    _different(wanted, "picks")
    missing = [p for p in wanted if p not in names]
    if missing or not wanted:
        raise InputError(f"{name} has no channel {', '.join(missing) or '(none asked for)'}; it has {', '.join(names)}")
    return [names.index(p) for p in wanted]


def _from_mne(recording: Any, chosen: list[int], data: np.ndarray, start: float, name: str) -> xr.DataArray:
    constants = need("mne.io.constants").FIFF
    known = {constants.FIFF_UNIT_V: "V", constants.FIFF_UNIT_T: "T", constants.FIFF_UNIT_T_M: "T/m"}
    written = (
        getattr(recording, "_orig_units", None) or {}
    )  # MNE calls everything volts; files say "n/a" where they are none
    infos = [recording.info["chs"][i] for i in chosen]
    units = [
        "unknown" if written.get(c["ch_name"], "V") not in SCALES else known.get(int(c["unit"]), "unknown")
        for c in infos
    ]
    scale = np.array([1e6 if u == "V" else 1.0 for u in units])
    units = ["µV" if u == "V" else u for u in units]
    places = np.array([c["loc"][:3] for c in infos])
    places[~np.isfinite(places).all(1) | (places == 0).all(1)] = np.nan
    types = recording.get_channel_types()
    X = signals(
        data * scale[:, None],
        float(recording.info["sfreq"]),
        [c["ch_name"] for c in infos],
        units="unknown",
        start=start,
        types=[types[i] for i in chosen],
        positions=None if np.isnan(places).all() else places,
        source=name,
    )
    X.attrs["units"] = units[0] if len(set(units)) == 1 else "mixed"
    return X.assign_coords(unit=("channel", units))


# ---------------------------------------------------------------- trials


def epochs_from(
    recording: Any,
    events: Any = None,
    tmin: float = 0.0,
    tmax: float = 1.0,
    baseline: tuple[float, float] | None = None,
    *,
    band: tuple[float, float] | None = None,
    event_id: Mapping[str, int] | None = None,
    picks: str | Sequence[str] = "data",
) -> tuple[xr.DataArray, np.ndarray]:
    """Trials around events of a continuous recording.

    Parameters
    ----------
    recording : DataArray ("channel", "time"), or what `read_raw` takes
    events : array of int (n_events, 2) or (n_events, 3), optional
        Sample, counted from the start of the data, and code; of three columns, those of MNE: the sample as MNE
        counts it, ``raw.first_samp`` being the first, what was before, and the code. None: the annotations of the file or the
        Raw, else its stimulus channel.
    tmin, tmax : float, default 0 and 1
        Seconds from the event to the first and to the last sample, both included.
    baseline : (float, float), optional
        Seconds; each channel's mean over them is taken away from the trial.
    band : (float, float), optional
        Band-pass in Hz, by MNE, before trials are cut: a filter on single trials would have edges.
    event_id : mapping of str to int, optional
        Names of the codes to keep; all codes, named by their numbers, if not given.
    picks : str or sequence of str, default "data"
        As of `read_raw`; a DataArray is taken whole.

    Returns
    -------
    X : DataArray ("trial", "channel", "time")
        With the coordinate ``sample`` of the events.
    y : array of str (n_trials,)

    Raises
    ------
    InputError
        Events outside of the recording, codes that do not occur, times that do not rise, no trial left.

    Warns
    -----
    UserWarning
        Trials that reach over the ends of the recording, which are left out; channels with NaN, flat channels.
    """
    if not (is_number(tmin) and is_number(tmax) and tmin < tmax):
        raise InputError(f"tmin must be below tmax, got {tmin!r} and {tmax!r}")
    first, names = 0, None
    if isinstance(recording, xr.DataArray):
        X = _checked(recording, 2)
        if events is None:
            raise InputError("events must be given where the recording is an array")
    else:
        raw, called = _open(recording)
        X, first = _read(raw, called, picks), int(raw.first_samp)
        if events is None:
            events, names = _events(raw, called)
    table = np.asarray(events)
    if table.ndim != 2 or table.shape[1] not in (2, 3) or table.dtype.kind not in "iu" or not len(table):
        raise InputError(
            f"events must be whole numbers (n_events, 2) or (n_events, 3), got {table.dtype} of shape {table.shape}"
        )
    at, code = table[:, 0].astype(np.int64), table[:, -1].astype(np.int64)
    if table.shape[1] == 3:
        at = at - first
    id_of = dict(event_id if event_id is not None else names or {str(c): int(c) for c in np.unique(code)})
    absent = [f"{n} ({c})" for n, c in id_of.items() if c not in code]
    if absent:
        raise InputError(
            f"no event has the code of {', '.join(absent)}; there are {', '.join(map(str, np.unique(code)))}"
        )
    keep = np.isin(code, list(id_of.values()))
    at, code = at[keep], code[keep]
    rate, n_times = float(X.attrs["sampling_rate"]), X.sizes["time"]
    if band is not None:
        if len(band) != 2 or not all(is_number(b) for b in band) or not 0 < band[0] < band[1] < rate / 2:
            raise InputError(f"band must rise from above 0 to below half of {rate:g} Hz, got {band!r}")
        X = X.copy(data=need("mne").filter.filter_data(X.values, rate, *band, verbose="error"))
    out = (at < 0) | (at >= n_times)
    if out.any():
        raise InputError(
            f"{int(out.sum())} of {len(at)} events lie outside of the recording of {n_times} samples; the first is at sample {int(at[out][0])}"
        )
    low, high = round(tmin * rate), round(tmax * rate)
    inside = (at + low >= 0) & (at + high < n_times)
    if not inside.any():
        raise InputError(f"no trial from {tmin:g} to {tmax:g} s lies within the recording of {n_times / rate:g} s")
    if not inside.all():
        warnings.warn(
            f"{int((~inside).sum())} of {len(at)} trials reach over the ends of the recording and are left out; "
            f"the first is at sample {int(at[~inside][0])}",
            stacklevel=2,
        )
        at, code = at[inside], code[inside]
    times = np.arange(low, high + 1) / rate
    cut = X.values[:, at[:, None] + np.arange(low, high + 1)].transpose(1, 0, 2)
    if baseline is not None:
        if len(baseline) != 2 or not all(is_number(b) for b in baseline):
            raise InputError(f"baseline must be two numbers of seconds, got {baseline!r}")
        half = 0.5 / rate
        over = (times >= baseline[0] - half) & (times <= baseline[1] + half)
        if not baseline[0] <= baseline[1] or baseline[0] < times[0] - half or baseline[1] > times[-1] + half:
            raise InputError(f"baseline {baseline!r} is not within the trial from {times[0]:g} to {times[-1]:g} s")
        cut = cut - cut[:, :, over].mean(-1, keepdims=True)
    _say_what_is_wrong(cut, [str(c) for c in X.channel.values], "the trials")
    named = {c: n for n, c in id_of.items()}
    coords = {k: v for k, v in X.coords.items() if v.dims == ("channel",)}
    coords |= {"time": times, "sample": ("trial", at)}
    return xr.DataArray(cut, dims=TRIALS, coords=coords, attrs=dict(X.attrs)), np.array([named[c] for c in code])


def _events(raw: Any, name: str) -> tuple[Any, dict[str, int] | None]:
    """Of the annotations, else of a stimulus channel."""
    mne = need("mne")
    found, names = mne.events_from_annotations(raw, verbose="error")
    if len(found):
        return found, names
    if "stim" in raw.get_channel_types():
        with blame(InputError, f"events of {name}"):
            found = mne.find_events(raw, verbose="error")
    if not len(found):
        raise InputError(f"{name} has no annotations and no event in a stimulus channel; give events")
    return found, None


def _checked(X: Any, ndim: int) -> xr.DataArray:
    """Signals that were made elsewhere: dimensions in order, a rate, and times that agree with it."""
    dims = TRIALS[-ndim:]
    if not isinstance(X, xr.DataArray) or set(X.dims) != set(dims):
        raise InputError(
            f"there must be a DataArray with the dimensions {dims}, got {getattr(X, 'dims', type(X).__name__)}"
        )
    if "sampling_rate" not in X.attrs or "channel" not in X.coords:
        raise InputError("a recording has the coordinate channel and attrs['sampling_rate']; make it with signals(...)")
    X = X.transpose(*dims)
    rate = as_rate(X.attrs["sampling_rate"])
    _different([str(c) for c in X.channel.values], "channels")
    if "time" in X.coords:
        _check_times(np.asarray(X.time.values, dtype=np.float64), rate)
    return X


# ---------------------------------------------------------------- to MNE


def to_raw(X: xr.DataArray) -> Any:
    """A continuous recording ("channel", "time") as an MNE RawArray in V, with positions where they are known.

    Positions are those of the array, else those of the extended 10-20 system where all EEG names are of it.
    InputError where `X` is no recording; a warning where units are unknown.
    """
    X = _checked(X, 2)
    info, scale = _info(X)
    return need("mne").io.RawArray(X.values * scale[:, None], info, verbose="error")


def to_epochs(X: xr.DataArray, y: Any = None) -> Any:
    """Trials ("trial", "channel", "time") and labels as an MNE EpochsArray in V, with positions as of `to_raw`."""
    X = _checked(X, 3)
    info, scale = _info(X)
    labels = ["1"] * len(X) if y is None else [str(label) for label in as_labels(y, len(X))]
    ids = {label: i + 1 for i, label in enumerate(sorted(set(labels)))}
    at = np.arange(len(X)) if "sample" not in X.coords else np.asarray(X.coords["sample"].values)
    if len(np.unique(at)) < len(at):
        at = np.arange(len(X))
    events = np.stack([at, np.zeros(len(X), dtype=np.int64), [ids[label] for label in labels]], 1)
    start = float(X.time.values[0]) if "time" in X.coords else 0.0
    return need("mne").EpochsArray(X.values * scale[:, None], info, events, start, ids, proj=False, verbose="error")


def _info(X: xr.DataArray) -> tuple[Any, np.ndarray]:
    mne = need("mne")
    names = [str(c) for c in X.channel.values]
    types = [str(t) for t in X.coords["type"].values] if "type" in X.coords else ["eeg"] * len(names)
    units = (
        [str(u) for u in X.coords["unit"].values]
        if "unit" in X.coords
        else [str(X.attrs.get("units", "unknown"))] * len(names)
    )
    unknown = np.array([u not in SCALES for u in units])
    if unknown.any():
        warnings.warn(
            f"units are not known, numbers are kept and will be called V or T: {_named(names, unknown)}", stacklevel=3
        )
    with blame(InputError, "types of channels"):
        info = mne.create_info(names, float(X.attrs["sampling_rate"]), types, verbose="error")
    montage = None
    if {"x", "y", "z"} <= set(X.coords):
        places = np.stack([X.coords[a].values for a in "xyz"], 1)
        for channel, place in zip(info["chs"], places, strict=True):
            if np.isfinite(place).all():
                channel["loc"][:3] = place
    elif any(t == "eeg" for t in types):
        known = mne.channels.get_builtin_montages()  # MNE renames it
        standard = mne.channels.make_standard_montage("colin27_1005" if "colin27_1005" in known else "standard_1005")
        montage = (
            standard if all(n in standard.ch_names for n, t in zip(names, types, strict=True) if t == "eeg") else None
        )
    if montage is not None:
        info.set_montage(montage, verbose="error")
    return info, np.array([SCALES.get(u, 1.0) for u in units])


# ---------------------------------------------------------------- arrays on disk


def save_npz(file: str | os.PathLike[str], X: xr.DataArray, y: Any = None) -> None:
    """Trials or a continuous recording as numpy arrays, written whole or not at all.

    Keys: ``X``, ``sampling_rate``, ``start`` (s), ``channels``, ``types``, ``units`` (one a channel), ``positions`` (m) where known,
    and ``y`` where labels are given.
    """
    path = as_path("file", file)
    if path.suffix != ".npz":
        raise InputError(f"{path.name}: the name must end with .npz")
    X = _checked(X, 3 if "trial" in X.dims else 2)
    n = X.sizes["channel"]
    held: dict[str, np.ndarray] = {
        "X": X.values,
        "sampling_rate": np.array(float(X.attrs["sampling_rate"])),
        "start": np.array(float(X.time.values[0]) if "time" in X.coords else 0.0),
        "channels": np.array([str(c) for c in X.channel.values]),
        "types": np.array([str(t) for t in X.coords["type"].values]) if "type" in X.coords else np.array(["eeg"] * n),
        "units": np.array([str(u) for u in X.coords["unit"].values])
        if "unit" in X.coords
        else np.array([str(X.attrs.get("units", "unknown"))] * n),
    }
    if {"x", "y", "z"} <= set(X.coords):
        held["positions"] = np.stack([X.coords[a].values for a in "xyz"], 1)
    if y is not None:
        labels = as_labels(y, X.sizes.get("trial", 0))
        held["y"] = labels.astype(str) if labels.dtype.kind == "O" else labels
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as f:
            part = Path(f.name)
            np.savez(f, **held)  # pyright: ignore[reportArgumentType]
        part.replace(path)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def read_npz(
    file: str | os.PathLike[str], sampling_rate: float | None = None
) -> tuple[xr.DataArray, np.ndarray | None]:
    """A recording that `save_npz` wrote, or an .npz with at least ``X`` and ``sampling_rate``; and its labels, if any.

    Other keys are those of `save_npz`, ``times`` instead of ``start``, and ``groups`` of trials (session, subject), which
    become the coordinate ``group``. `sampling_rate` goes before that of the file. Pickled objects are not read. Errors and
    warnings as of `signals`.
    """
    path = as_path("file", file)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}")
    with (
        blame(InputError, f"{path.name} cannot be read as arrays without pickled objects"),
        np.load(path, allow_pickle=False) as f,
    ):
        held = {key: f[key] for key in f.files}
    if sampling_rate is not None:
        held["sampling_rate"] = np.array(as_rate(sampling_rate))
    for key in ("X", "sampling_rate"):
        if key not in held:
            raise InputError(f"{path.name} has no {key}; it has {', '.join(held) or 'nothing'}")
    if held["sampling_rate"].size != 1:
        raise InputError(f"{path.name}: sampling_rate must be one number, got {held['sampling_rate'].shape}")
    X = held["X"]
    units = [str(u) for u in np.atleast_1d(held.get("units", "unknown"))]
    with blame(InputError, f"{path.name} cannot be read"):
        found = signals(
            X,
            held["sampling_rate"].item(),
            held.get("channels"),
            units=units[0],
            start=held["start"].item() if "start" in held else 0.0,
            times=held.get("times"),
            types=held.get("types"),
            positions=held.get("positions"),
            source=path.name,
        )
    if len(units) > 1:
        if len(units) != found.sizes["channel"]:
            raise InputError(f"{path.name}: {len(units)} units for {found.sizes['channel']} channels")
        found = found.assign_coords(unit=("channel", units))
        found.attrs["units"] = units[0] if len(set(units)) == 1 else "mixed"
    if "trial" not in found.dims and ("y" in held or "groups" in held):
        raise InputError(
            f"{path.name}: labels are of trials, X (n_trials, n_channels, n_times), here of the shape {X.shape}"
        )
    if "groups" in held:
        found = found.assign_coords(group=("trial", as_labels(held["groups"], found.sizes.get("trial", 0), "groups")))
    y = held.get("y")
    return found, None if y is None else as_labels(y, found.sizes.get("trial", 0))


# ---------------------------------------------------------------- spikes


def spike_times(source: Any) -> tuple[dict[str, np.ndarray], tuple[float, float] | None]:
    """Times of spikes of each neuron, and from when to when was recorded where that is known.

    Parameters
    ----------
    source : path (.nwb), pynwb NWBFile, pynapple TsGroup, neo SpikeTrains or a Segment, mapping of names to times, or sequence of times
        Plain times are in seconds.

    Returns
    -------
    times : dict of str to array (n_spikes,)
        Sorted, in seconds.
    support : (float, float) or None
        In seconds; of pynapple and neo. Of trains with different ends it is what all have.
    """
    if isinstance(source, (str, os.PathLike)):
        file = Path(source)
        if file.suffix.lower() != ".nwb":
            raise InputError(f"{file.name}: spikes are read from .nwb files, or from objects of pynapple and neo")
        if not file.is_file():
            raise InputError(f"there is no file {str(file)!r}")
        nwb = need("pynwb")
        with blame(InputError, f"{file.name} cannot be read"), nwb.NWBHDF5IO(str(file), "r") as io:
            return spike_times(io.read())
    support, pairs = None, None
    if hasattr(source, "units") and hasattr(source, "session_start_time"):  # NWBFile
        if source.units is None or not len(source.units) or "spike_times" not in source.units.colnames:
            raise InputError("the NWB file has no units with spike times")
        units = source.units
        pairs = [(str(units.id[i]), units["spike_times"][i]) for i in range(len(units))]
    elif hasattr(source, "time_support") and hasattr(source, "keys"):  # TsGroup
        pairs = [(str(k), source[k].t) for k in source.keys()]  # noqa: SIM118 - iterating a TsGroup is not over keys in all versions
        starts, ends = np.atleast_1d(source.time_support.start), np.atleast_1d(source.time_support.end)
        support = float(starts[0]), float(ends[-1])
        if len(starts) > 1:
            warnings.warn(f"the recording has {len(starts)} parts; bins between them will hold no spike", stacklevel=2)
    elif hasattr(source, "spiketrains"):  # neo Segment
        return spike_times(list(source.spiketrains))
    elif isinstance(source, Mapping):
        pairs = [(str(k), v) for k, v in source.items()]
    elif isinstance(source, Sequence) or type(source).__name__ == "SpikeTrainList":
        trains = list(source)
        neo = [hasattr(t, "t_stop") and hasattr(t, "rescale") for t in trains]
        if trains and all(neo):
            names = [str(t.name) if t.name else str(i) for i, t in enumerate(trains)]
            pairs = [(n, t.rescale("s").magnitude) for n, t in zip(names, trains, strict=True)]
            starts = [float(t.t_start.rescale("s").item()) for t in trains]
            ends = [float(t.t_stop.rescale("s").item()) for t in trains]
            support = max(starts), min(ends)
            if len(set(starts)) > 1 or len(set(ends)) > 1:
                warnings.warn(
                    f"spike trains have different ends; all have {support[0]:g} to {support[1]:g} s", stacklevel=2
                )
        elif any(neo):
            raise InputError("some of the trains are of neo and some are not")
        else:
            pairs = [(str(i), t) for i, t in enumerate(trains)]
    if not pairs:
        raise InputError(f"spikes must be an .nwb file, or times of neurons in an object of pynwb, pynapple, neo, a dict or a list; got {type(source).__name__}")  # fmt: skip
    _different([n for n, _ in pairs], "neurons")
    return {name: _times(name, t) for name, t in pairs}, support


def _times(name: str, times: Any) -> np.ndarray:
    with blame(InputError, f"times of neuron {name}"):
        found = np.asarray(times, dtype=np.float64)
    if found.ndim != 1:
        raise InputError(f"times of neuron {name} must be flat, got the shape {found.shape}")
    if not np.isfinite(found).all():
        raise InputError(f"times of neuron {name} hold NaN or infinity")
    return np.sort(found)


def spike_counts(
    source: Any, bin_width: float, *, start: float | None = None, stop: float | None = None, trials: Any = None
) -> xr.DataArray:
    """Spikes counted in bins of time.

    Parameters
    ----------
    source
        What `spike_times` takes.
    bin_width : float
        In seconds. A spike at the border of two bins is in the later one.
    start, stop : float, optional
        In seconds; what the source says was recorded, else 0, or the first spike if that is before, to after the last spike.
        A rest that fills no bin is left out.
    trials : array (n_trials, 2), optional
        Start and end of each in seconds, instead of `start` and `stop`. Bins begin at the starts.

    Returns
    -------
    DataArray ("bin", "neuron")
        Coordinates: ``neuron`` (names), ``time`` of the start of each bin in seconds and, with `trials`, ``trial``: the number of
        the trial of each bin, for estimators that take ``groups``. ``attrs``: ``sampling_rate`` (bins per second), ``bin_width``, ``units``.

    Raises
    ------
    InputError
        Bad times, no bin, trials outside of what was recorded.

    Warns
    -----
    UserWarning
        Neurons without a spike in the bins, by name.

    Examples
    --------
    >>> from nissl.recordings.io import spike_counts
    >>> spike_counts({"a": [0.01, 0.02, 0.15], "b": [0.12]}, 0.1, start=0, stop=0.2).values
    array([[2., 0.],
           [1., 1.]])
    """
    if not is_number(bin_width) or bin_width <= 0:
        raise InputError(f"bin_width must be a number of seconds above 0, got {bin_width!r}")
    times, support = spike_times(source)
    for name, value in (("start", start), ("stop", stop)):
        if value is not None and not is_number(value):
            raise InputError(f"{name} must be a number of seconds, got {value!r}")
    fired = [t for t in times.values() if len(t)]
    if trials is None:
        low = start if start is not None else support[0] if support else min(0.0, *(t[0] for t in fired), 0.0)
        last = max((float(t[-1]) for t in fired), default=low)
        high = (
            stop
            if stop is not None
            else support[1]
            if support
            else low + bin_width * (np.floor((last - low) / bin_width) + 1)
        )
        spans = np.array([[low, high]], dtype=np.float64)
    else:
        if start is not None or stop is not None:
            raise InputError("give either trials, or start and stop")
        spans = np.asarray(trials, dtype=np.float64)
        if spans.ndim != 2 or spans.shape[1] != 2 or not len(spans) or not np.isfinite(spans).all():
            raise InputError(f"trials must be finite starts and ends (n_trials, 2), got the shape {spans.shape}")
        outside = (
            (spans[:, 0] < support[0]) | (spans[:, 1] > support[1]) if support else np.zeros(len(spans), dtype=bool)
        )
        if outside.any():
            raise InputError(f"trial {int(np.argmax(outside))} is not within what was recorded, {support[0]:g} to {support[1]:g} s")  # fmt: skip # pyright: ignore[reportOptionalSubscript]
    n_bins = np.floor((spans[:, 1] - spans[:, 0]) / bin_width + 1e-9)
    if (n_bins < 1).any():
        i = int(np.argmax(n_bins < 1))
        raise InputError(f"no bin of {bin_width:g} s fits from {spans[i, 0]:g} to {spans[i, 1]:g} s")
    if n_bins.sum() * len(times) > 1e9:
        raise InputError(
            f"{n_bins.sum():.3g} bins of {bin_width:g} s for {len(times)} neurons are too many; are the times in seconds?"
        )
    n_bins = n_bins.astype(np.int64)
    edges = [low + bin_width * np.arange(n + 1) for (low, _), n in zip(spans, n_bins, strict=True)]
    # Borders are sums of rounded numbers: a spike a billionth of a bin before one belongs to it.
    at = np.concatenate(edges) - 1e-9 * bin_width
    counts = np.empty((len(times), int(n_bins.sum())))
    if len(spans) == 1:
        for row, t in zip(counts, times.values(), strict=True):
            inside = t[np.searchsorted(t, at[0]) : np.searchsorted(t, at[-1])]
            row[:] = np.bincount(np.searchsorted(at, inside, side="right") - 1, minlength=len(row))
    else:  # trials may overlap, so a spike may count twice
        between = np.cumsum(n_bins + 1)[:-1] - 1
        for row, t in zip(counts, times.values(), strict=True):
            row[:] = np.delete(np.diff(np.searchsorted(t, at)), between)
    counts = counts.T
    names = list(times)
    silent = counts.sum(0) == 0
    if silent.any():
        warnings.warn(f"no spike in any bin: {_named(names, silent)}", stacklevel=2)
    coords: dict[str, Any] = {"neuron": names, "time": ("bin", np.concatenate([e[:-1] for e in edges]))}
    if trials is not None:
        coords["trial"] = "bin", np.repeat(np.arange(len(spans)), n_bins)
    attrs = {"sampling_rate": 1 / float(bin_width), "bin_width": float(bin_width), "units": "spikes"}
    return xr.DataArray(counts, dims=("bin", "neuron"), coords=coords, attrs=attrs)


# ---------------------------------------------------------------- quality


def inspect(X: xr.DataArray, *, line: float = 50.0) -> pd.DataFrame:
    """What is wrong with each channel of a recording.

    Parameters
    ----------
    X : DataArray ("channel", "time") or ("trial", "channel", "time")
    line : float, default 50
        Frequency of the mains in Hz.

    Returns
    -------
    DataFrame, one row a channel
        ``flat`` and ``missing`` (shares of trials, or of samples of a continuous recording, for `missing`), ``std``, ``z``: robust
        z of the logarithm of `std` among the channels that are neither (above 3: noisy), and ``line``: power within 1 Hz of the
        mains over that 2 to 5 Hz beside it, per Hz; NaN where the rate is too low or the recording too short.
    """
    from scipy.signal import welch

    X = _checked(X, 3 if "trial" in getattr(X, "dims", ()) else 2)
    if not is_number(line) or line <= 0:
        raise InputError(f"line must be a number of Hz above 0, got {line!r}")
    x = X.values if X.ndim == 3 else X.values[None]
    rate, missing = float(X.attrs["sampling_rate"]), np.isnan(x)
    steps = np.where(np.isnan(np.diff(x)), 1.0, np.diff(x))
    flat = (steps == 0).all(-1).mean(0)
    filled = np.where(missing, 0.0, x)
    n = np.maximum((~missing).sum(-1, keepdims=True), 1)
    centred = np.where(missing, 0.0, x - filled.sum(-1, keepdims=True) / n)
    std = np.sqrt((centred**2).sum(-1).sum(0) / n[..., 0].sum(0))
    good = (std > 0) & (missing.mean((0, 2)) < 1)
    log = np.log(np.where(good, std, 1.0))
    z = np.full(len(std), np.nan)
    if good.any():
        centre = np.median(log[good])
        spread = 1.4826 * np.median(np.abs(log[good] - centre))
        z[good] = (log[good] - centre) / spread if spread > 0 else 0.0
    mains = np.full(len(std), np.nan)
    length = int(min(x.shape[-1], 2 * rate))
    if line + 5 < rate / 2 and length >= rate:
        f, power = welch(centred, rate, nperseg=length)
        near, beside = np.abs(f - line) <= 1, (np.abs(f - line) >= 2) & (np.abs(f - line) <= 5)
        power = power.mean(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mains = np.where(good, power[:, near].mean(-1) / power[:, beside].mean(-1), np.nan)
    table = {"flat": flat, "missing": missing.mean((0, 2)), "std": std, "z": z, "line": mains}
    return pd.DataFrame(table, index=pd.Index([str(c) for c in X.channel.values], name="channel"))
