"""The study of EEGFormer: every claim is measured, and what it counts is what it says."""

import json

import numpy as np
import pytest

from nissl.errors import MissingExtraError
from nissl.sources.recordings import p300
from nissl.studies import eegformer


@pytest.fixture(scope="module")
def claims():
    return eegformer.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_planted_data(claims):
    assert len(claims) == 9
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so_with_little_training(claims):
    found = {c["claim"].split(": ")[1].split(",")[0]: c["ours"] for c in claims}
    assert found["perplexity of the codes"] >= 4
    assert found["error of the reconstruction over that of the mean spectrum"] < 0.95
    assert found["AUC of pairs of codes"] >= 0.8


def test_majority_and_pointing_by_hand():
    codes, motifs = np.array([[0, 0, 1]]), np.array([[2, 2, 3]])
    assert [eegformer.majority(codes, motifs, c) for c in (0, 1, 5)] == [2, 3, -1]
    test = eegformer.planted_grammar(6, seed=0)
    exact = eegformer.pointed(test.planted.astype(float), test)
    assert exact == {"found": 1.0, "found, chance": pytest.approx(0.1)}
    assert eegformer.pointed(-test.planted.astype(float), test)["found"] == 0.0


def test_windows_of_the_p300_set_do_not_overlap_between_the_halves(monkeypatch):
    try:
        X, events = p300()
    except MissingExtraError as error:
        pytest.skip(str(error))
    seen = []

    def pretrained(X, *given, **options):
        seen.append(X)
        raise RuntimeError("enough")

    monkeypatch.setattr(eegformer, "pretrained", pretrained)
    for some in (events, events[100:]):  # the first half of all ends with a run, that of the rest in the middle of one
        with pytest.raises(RuntimeError, match="enough"):
            eegformer.on_p300(X.values, some, 0, False)
        before = some[:, 0] + 128 <= some[len(some) // 2, 0]
        assert len(seen[-1]) == before.sum()
        assert seen[-1].shape[1:] == (16, 128)
    assert len(seen[-1]) < len(some) // 2
