"""Packaged and shared recordings are read as they are described; what is missing is said."""

import numpy as np
import pytest

from nissl.errors import InputError, MissingExtraError
from nissl.sources import recordings


def read(function, *args):
    try:
        return function(*args)
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("SelfRegulationSCP1", (268, 6, 896)),
        ("Blink", (500, 4, 510)),
        ("FingerMovements", (316, 28, 50)),
        ("KDD_Example", (40, 4, 100)),
    ],
)
def test_trial_sets(name, shape):
    X, y = read(recordings.trial_set, name)
    assert X.dims == ("trial", "channel", "time")
    assert X.shape == shape
    assert len(y) == len(X)
    assert len(np.unique(y)) == 2
    assert X.attrs["sampling_rate"] > 0


def test_shared_recordings():
    X, events = read(recordings.p300)
    assert X.shape == (16, 46804)
    assert np.bincount(events[:, 1]).tolist() == [0, 640, 128]
    Y, velocity, target = read(recordings.monkey_m1, "test")
    assert (Y.shape, velocity.shape, target.shape) == ((1818, 71), (1818, 2), (1818,))
    assert read(recordings.mouse_v1).shape == (7200, 140)


def test_what_is_not_there():
    with pytest.raises(InputError, match="there is no set 'Motor'"):
        recordings.trial_set("Motor")


def test_a_missing_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(recordings.DATA_FOLDER[0], str(tmp_path))
    with pytest.raises(MissingExtraError, match="NISSL_DATA"):
        recordings.p300()
