"""The study of the discriminative Kalman filter: every claim is measured, and the planted system is what it says."""

import json
import warnings

import numpy as np
import pytest

from nissl.errors import MissingExtraError
from nissl.sources.recordings import monkey_m1
from nissl.studies import dkf


@pytest.fixture(scope="module")
def claims():
    return dkf.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_planted_data(claims):
    assert len(claims) == 8
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    exact, robust, few, many, ordered, falls, blind, learnt = claims
    assert exact["ours"] <= 1e-9
    assert robust["ours"] < 1
    assert few["ours"] <= 0.82
    assert many["ours"] <= 0.86
    assert all(c["holds"] for c in (ordered, falls, blind, learnt))


def test_more_bins_are_of_the_same_system():
    s = dkf.mixed_states(20_000, 6, 2, seed=0)
    more = dkf.after(s, 0, 20_000)
    assert not np.array_equal(more.Z, s.Z)
    np.testing.assert_allclose(more.X.T @ more.X / 20_000, s.X.T @ s.X / 20_000, atol=0.8)
    np.testing.assert_allclose(more.Z.T @ more.Z / 20_000, np.eye(2), atol=0.15)


def test_the_monkey():
    try:
        x, v, _ = monkey_m1("train")
        x2, v2, _ = monkey_m1("test")
    except MissingExtraError as error:
        pytest.skip(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kalman = dkf.KalmanFilterDecoder().fit(np.sqrt(x), v)
        found = kalman.predict(np.sqrt(x2))
    assert dkf.normalised_rmse(v2, found) < 0.8
