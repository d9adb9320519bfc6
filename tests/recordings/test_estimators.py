"""What every estimator of trials does: clone, refit, leave its data alone, refuse what is none, work in a pipeline."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mne
import numpy as np
import pytest
import xarray as xr
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from nissl.errors import InputError
from nissl.recordings.eeg.augmented_covariance import (
    AugmentedCovariance,
    AugmentedGrid,
    ChannelRank,
    EmbeddingSelector,
    TimeDelay,
)
from nissl.recordings.eeg.du_in import DuIN, Stage
from nissl.recordings.eeg.eegformer import EEGFormerClassifier


@dataclass
class Subject:
    """An estimator of trials and what it holds after `fit` that must be the same each time.

    Attributes
    ----------
    make : function
        The estimator, small enough for 24 trials × 3 channels × 120 times.
    learned : function
        Of a fitted one: an array that depends on the data.
    """

    make: Callable[[], Any]
    learned: Callable[[Any], Any]


SUBJECTS: dict[str, Subject] = {  # append yours
    "TimeDelay": Subject(lambda: TimeDelay(2, 3), lambda e: e.pairs_),
    "ChannelRank": Subject(ChannelRank, lambda e: e.filters_),
    "AugmentedCovariance": Subject(lambda: AugmentedCovariance(2, 3), lambda e: e.condition_),
    "AugmentedCovariance, selector": Subject(
        lambda: AugmentedCovariance(selector=EmbeddingSelector(max_trials=3, max_delay=8)), lambda e: [e.order_, e.lag_]
    ),
    "EmbeddingSelector, mdop": Subject(
        lambda: EmbeddingSelector(max_trials=3, max_delay=8), lambda e: [e.order_, e.lag_]
    ),
    "EmbeddingSelector, afnn": Subject(
        lambda: EmbeddingSelector("afnn", max_trials=3, max_delay=8), lambda e: e.information_
    ),
    "AugmentedGrid, svm": Subject(
        lambda: AugmentedGrid(orders=[1, 2], lags=[1], C=[1.0]), lambda e: [r["score"] for r in e.results_]
    ),
    "AugmentedGrid, mdm": Subject(
        lambda: AugmentedGrid("mdm", orders=[1, 2], lags=[1]), lambda e: [r["score"] for r in e.results_]
    ),
    "EEGFormerClassifier": Subject(
        lambda: EEGFormerClassifier(
            {
                "sampling_rate": 60.0,
                "patch": 40,
                "n_features": 4,
                "n_layers": 1,
                "n_decoder_layers": 1,
                "n_heads": 1,
                "n_codes": 4,
            },
            "probe",
            pool="concat",
            moments=True,
            pretrain_epochs=1,
            progress=False,
        ),
        lambda e: e.network_.head.weight.detach().numpy(),
    ),
    "DuIN": Subject(
        lambda: DuIN(
            patch=20,
            n_regions=4,
            filters=(8, 4),
            kernels=(5, 3),
            strides=(2, 1),
            n_layers=1,
            decoder_layers=1,
            n_heads=2,
            head_features=4,
            n_codes=8,
            code_features=4,
            dropout=0.0,
            validation=0,
            progress=False,
            tokenizer=Stage(2, 1, 8, 3e-3, 1e-3, 0.01),
            masked=Stage(2, 1, 8, 3e-3, 1e-3, 0.01),
            classifier=Stage(12, 1, 8, 3e-3, 1e-3, 0.01),
        ),
        lambda e: e.channel_weights(),
    ),
}
NAMES = list(SUBJECTS)


@pytest.fixture
def trials() -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    y = np.arange(24) % 2
    X = g.standard_normal((24, 3, 120))
    X[y == 1, 0] *= 2
    return X, y


def answer(estimator: Any, X: Any) -> np.ndarray | None:
    for name in ("predict", "transform"):
        if hasattr(estimator, name):
            return np.asarray(getattr(estimator, name)(X))
    return None


@pytest.mark.parametrize("name", NAMES)
def test_clone_has_the_parameters_and_nothing_learned(name, trials):
    estimator = SUBJECTS[name].make().fit(*trials)
    copy = clone(estimator)
    assert copy is not estimator
    assert str(copy.get_params()) == str(estimator.get_params())
    assert not [k for k in vars(copy) if k.endswith("_") and not k.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_fit_again_gives_the_same_and_leaves_data_and_parameters_alone(name, trials):
    X, y = trials
    before, labels = X.copy(), y.copy()
    estimator = SUBJECTS[name].make()
    parameters = str(estimator.get_params())
    assert estimator.fit(X, y) is estimator
    first, told = np.asarray(SUBJECTS[name].learned(estimator)), answer(estimator, X)
    estimator.fit(X, y)
    assert np.array_equal(first, np.asarray(SUBJECTS[name].learned(estimator)))
    other = clone(estimator).fit(X, y)
    assert np.array_equal(first, np.asarray(SUBJECTS[name].learned(other)))
    if told is not None:
        assert np.array_equal(told, answer(estimator, X))  # type: ignore[arg-type]
        assert np.array_equal(told, answer(other, X))  # type: ignore[arg-type]
    assert np.array_equal(X, before)
    assert np.array_equal(y, labels)
    assert str(estimator.get_params()) == parameters


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_trials_is_refused(name, trials):
    X, y = trials
    broken = X.copy()
    broken[3, 1, 5] = np.nan
    for bad, match in ((broken, "NaN"), (X[0], "shape"), (X[:0], "empty"), (np.full(X.shape, "a"), "numbers")):
        with pytest.raises(InputError, match=match):
            SUBJECTS[name].make().fit(bad, y[: len(bad)])
    if is_classifier(SUBJECTS[name].make()):
        for bad in (y[:-1], np.where(y == 1, np.nan, 0.0), np.zeros(len(y))):
            with pytest.raises(InputError):
                SUBJECTS[name].make().fit(X, bad)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(SUBJECTS[n].make(), "predict") or
                                  hasattr(SUBJECTS[n].make(), "transform")])  # fmt: skip
def test_before_fit_nothing_is_answered_and_after_it_no_other_channels(name, trials):
    X, y = trials
    with pytest.raises(NotFittedError):
        answer(SUBJECTS[name].make(), X)
    with pytest.raises(InputError, match="channels"):
        answer(SUBJECTS[name].make().fit(X, y), X[:, :2])


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(SUBJECTS[n].make(), "predict") or
                                  hasattr(SUBJECTS[n].make(), "transform")])  # fmt: skip
def test_works_in_a_pipeline_and_in_cross_validation(name, trials):
    X, y = trials
    estimator = SUBJECTS[name].make()
    if not is_classifier(estimator):
        flat = FunctionTransformer(lambda a: np.log(np.square(a).reshape(len(a), -1).mean(1, keepdims=True)))
        estimator = make_pipeline(estimator, flat, LogisticRegression())
    assert cross_val_score(make_pipeline(estimator), X, y, cv=3, error_score="raise").mean() > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_data_arrays_and_epochs_are_the_trials_they_hold(name, trials):
    X, y = trials
    expected = np.asarray(SUBJECTS[name].learned(SUBJECTS[name].make().fit(X, y)))
    array = xr.DataArray(X, dims=("trial", "channel", "time")).transpose("channel", "trial", "time")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MNE, about how the epochs are made here
        epochs = mne.EpochsArray(X, mne.create_info(3, 100.0, "eeg"), verbose="error")
    for given in (array, epochs):
        found = SUBJECTS[name].make().fit(given, y)
        assert np.allclose(expected, np.asarray(SUBJECTS[name].learned(found)))
