"""The study of the dynamic connectome: every claim is measured, and its figures follow from what was planted."""

import json

import numpy as np
import pytest

from nissl.recordings.simulate import planted_groups
from nissl.studies import dynamic_connectome


@pytest.fixture(scope="module")
def claims():
    return dynamic_connectome.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim(claims):
    assert len(claims) == 12
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    assert claims[0]["ours"] <= 0.01
    assert claims[1]["ours"] >= 0.95
    assert claims[3]["ours"] <= 1e-9
    assert claims[4]["holds"]
    assert claims[5]["holds"]


def test_groups_are_planted_where_they_are_said_to_be():
    s = planted_groups(3000, 9, seed=0)
    for k in range(3):
        for animal in range(4):
            for part in range(3):
                x = s.X[animal][s.active[part]][:, s.labels == k]
                together = np.corrcoef(x.T)[np.triu_indices(3, 1)].mean()
                assert together == pytest.approx(0.75 if s.animals[k, animal] and part == k else 0, abs=0.2)


def test_regions_that_share_a_signal_agree_between_people():
    g = np.random.default_rng(0)
    shared = np.repeat(np.cumsum(g.normal(size=(7, 400, 5)), 1), 4, 2)
    found = dynamic_connectome.on_people(shared + 0.5 * g.normal(size=shared.shape), 0)
    assert found["halves"] > found["surrogate"]
    assert found["homologous"] > found["others"]
