"""The study of augmented covariances: planted claims hold, recordings are cut as stated, the paired AUC is right."""

import json

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from nissl.errors import MissingExtraError
from nissl.studies import augmented_covariance as study


@pytest.fixture(scope="module")
def claims():
    return study.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_planted_claim_and_all_hold(claims):
    assert len(claims) == 5
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    assert all(c["holds"] for c in claims), [c for c in claims if not c["holds"]]
    json.dumps(claims)


def test_the_paired_auc_is_the_difference_of_two():
    g = np.random.default_rng(0)
    second = np.arange(100) % 2 == 1
    a, b = second + g.standard_normal(100), np.round(0.3 * second + g.standard_normal(100))
    (value, low, high), first, other = study.paired_auc(second, a, b)
    assert first == pytest.approx(roc_auc_score(second, a))
    assert other == pytest.approx(roc_auc_score(second, b))
    assert value == pytest.approx(first - other)
    assert low < value < high
    assert study.paired_auc(second, a, a)[0] == (0, 0, 0)


def test_the_p300_halves_are_balanced_and_do_not_overlap_in_time():
    try:
        X, y, X_test, y_test = study.parts("p300", 0)
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert X.shape[1:] == X_test.shape[1:] == (16, 128)
    assert len(y) + len(y_test) == 256
    assert abs(np.mean(np.concatenate([y, y_test]) == 2) - 0.5) < 0.01


def test_a_recording_gives_a_claim_with_an_interval():
    d = study.delayed_sources(60, 3, 128, strength=0.5, seed=0)
    claim = study.on_recording("planted", d.X[:40], d.y[:40], d.X[40:], d.y[40:], 0, Console(quiet=True))
    assert claim["interval"][0] <= claim["ours"] <= claim["interval"][1]
    assert claim["ours"] > 0.1


def test_missing_recordings_are_said_and_left_out(monkeypatch):
    def missing(*_):
        raise MissingExtraError("not here")

    monkeypatch.setattr(study, "parts", missing)
    monkeypatch.setattr(study, "on_planted", lambda *_: [])
    monkeypatch.setattr(study, "nested", lambda *_: [])
    with pytest.warns(UserWarning, match="not here"):
        assert study.run(progress=False) == []
