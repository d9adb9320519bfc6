"""The study of Neuroformer: every claim on simulated circuits is measured, and what it is compared with is what it says."""

import json

import numpy as np
import pytest

from nissl.recordings.simulate import hub_circuit, lagged_circuit
from nissl.studies import neuroformer


@pytest.fixture(scope="module")
def claims():
    return {c["claim"]: c for c in neuroformer.run(quick=True, seed=0, progress=False)}


def starting(claims, words):
    (found,) = [c for name, c in claims.items() if name.startswith(words)]
    return found


def test_the_quick_study_measures_circuits_and_costs(claims):
    assert len(claims) == 19
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims.values())
    json.dumps(list(claims.values()))


def test_what_a_short_training_must_give(claims):
    assert 1 < starting(claims, "hubs: nats of an unseen window")["ours"] < 8.285 / 6.244  # as good as knowing no past
    assert (
        starting(claims, "hubs: AUC by intervention, at least")["ours"] > 0.75
    )  # the bar of .95 wants a longer training
    assert starting(claims, "hubs: AUC of attention over even attention to the past")["holds"]
    assert starting(claims, "hubs: AUC of attention over even attention of an untrained")["holds"]
    assert not starting(claims, "hubs: AUC of raw attention of an untrained")["holds"]  # even attention is enough
    assert starting(claims, "hubs: nats of a model of rates")["holds"]


def test_cost_is_linear_but_where_frames_attend_to_each_other(claims):
    for what in ("past spikes", "a signal", "frames without"):
        assert starting(claims, f"multiply-adds: exponent of growth with the length of {what}")[
            "ours"
        ] == pytest.approx(1, abs=1e-6)
    assert starting(claims, "multiply-adds: exponent of growth with the length of frames, ")["ours"] > 1.5


def test_baselines_find_the_hubs_and_correlation_is_misled_by_two_lags():
    hubs = hub_circuit(3000, seed=0)
    for found in (neuroformer.correlations(hubs.X, 1), neuroformer.logistic(hubs.X, 1)):
        assert neuroformer.auc(hubs.connectivity, found) > 0.99
    x = hubs.X[:, :2]
    by_hand = np.corrcoef(x[:-1, 1], x[1:, 0])[0, 1]
    assert neuroformer.correlations(x, 1)[0, 1] == pytest.approx(by_hand, abs=2e-3)
    lags = lagged_circuit(5000, seed=0)
    off = ~np.eye(23, dtype=bool)
    precision = {
        f.__name__: neuroformer.average_precision_score(lags.connectivity[off], f(lags.X, 2)[off])
        for f in (neuroformer.correlations, neuroformer.logistic)
    }
    assert precision["correlations"] < 0.87 < 0.97 < precision["logistic"]


def test_exact_rates():
    circuit = hub_circuit(40_000, seed=1)
    np.testing.assert_allclose(neuroformer._rates(circuit), circuit.X.mean(0), atol=0.01)
