import json

import numpy as np
import pandas as pd
import pytest
import torch

from nissl.studies import difull


@pytest.fixture(scope="module")
def claims():
    return difull.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_digits(claims):
    assert len(claims) == 9
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)
    for c in claims[1:]:
        assert c["interval"][0] <= c["ours"] <= c["interval"][1]


def test_what_must_be_so_is_so(claims):
    by_name = {c["claim"]: c for c in claims}
    assert claims[0]["ours"] >= 0.9
    # nothing outside the cell can have a gradient; interpolation is all that is lost
    for name in ("layercam", "ixg"):
        found = next(c for k, c in by_name.items() if k.startswith(f"digits: {name} at middle"))
        assert found["ours"] > 0.95
        assert found["holds"]
    noise = claims[-1]
    assert noise["baseline"] == 0.25
    assert noise["interval"][0] < 0.25 < noise["interval"][1]


def test_the_same_seed_trains_the_same_network():
    a, b, c = (difull.trained_on_digits(seed, epochs=1) for seed in (3, 3, 4))
    assert a[0].fingerprint() == b[0].fingerprint() != c[0].fingerprint()
    assert torch.equal(a[1], b[1])
    assert len(a[1]) == 450  # unseen: a quarter
    state = torch.random.get_rng_state()
    difull.trained_on_digits(5, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_alike_means_an_interval_within_the_bar():
    assert difull._alike("c", np.linspace(-0.02, 0.02, 20), 0)["holds"]
    assert not difull._alike("c", np.linspace(0.08, 0.14, 20), 0)["holds"]


def test_scores_are_paired_by_seed_and_grid():
    rows = [("m", "gridpg", "input", s, g, h, 100 * s + 10 * g + h) for g in (1, 0) for s in (1, 0) for h in (0, 2)]
    table = pd.DataFrame(rows, columns=["method", "setting", "layer", "seed", "grid", "head", "score"])
    assert difull._scores(table, "m", "gridpg", "input").tolist() == [1, 11, 101, 111]
