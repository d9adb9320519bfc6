import json

import numpy as np
import pandas as pd
import pytest
import torch

from nissl.network import Pass, RelP
from nissl.studies import relp


@pytest.fixture(scope="module")
def claims():
    return relp.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_random_transformers(claims):
    assert len(claims) == 7
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)
    for c in claims[2:]:
        assert c["interval"][0] <= c["ours"] <= c["interval"][1]


def test_what_must_be_so_is_so(claims):
    assert claims[0]["holds"]  # conservation is an identity
    assert claims[0]["ours"] <= 1e-9
    assert claims[1]["holds"]
    assert claims[-1]["holds"]
    assert claims[-2]["holds"]  # what does not know the other prompt cannot agree with patching


@pytest.mark.parametrize("fewer", ["norm", "identity", "half", "attention"])
def test_each_rule_is_needed_for_conservation(fewer):
    assert relp.conservation_gap(3, RelP()) <= 1e-9
    assert relp.conservation_gap(3, RelP(**{fewer: False})) >= 0.1
    assert relp.conservation_gap(3, None) >= 0.1


def test_random_transformers_have_the_planted_scales():
    network, nodes = relp.random_network(0, 3, planted=True)
    weights = {k: float(v.std()) for k, v in network.weights().items()}
    assert weights["embed.weight"] == pytest.approx(0.3, rel=0.1)
    assert weights["layers.0.mlp.down.weight"] == pytest.approx(20 * 128**-0.5, rel=0.1)
    assert weights["layers.1.mlp.down.weight"] == pytest.approx(128**-0.5, rel=0.1)
    assert weights["layers.1.mlp.gate.weight"] == pytest.approx(1.5 * 48**-0.5, rel=0.1)
    assert [n.kind for n in nodes] == list(relp.KINDS)
    clean, corrupted = relp.random_pairs(0, 5)
    assert ((clean != corrupted).nonzero()[:, 1].reshape(5, 2) == torch.tensor([3, 6])).all()
    # causal: what comes later changes nothing before
    read = ["layers.2"]
    a, b = (network.run(Pass(x, read=read)).reads["layers.2"] for x in (clean, corrupted))
    assert torch.allclose(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])


def test_claims_follow_from_the_table():
    rows = [
        {"kind": k, "method": m, "seed": s, "r": r + 0.01 * s}
        for k in relp.KINDS
        for s in range(4)
        for m, r in {"relp": 0.9, "atp": 0.8 if k == "mlp_out" else 0.95, "gradient x activation": 0.1}.items()
    ]
    found = list(relp._gains(pd.DataFrame(rows), "here", {"resid_pre": 0.03, "mlp_out": 0.02}, 0))
    assert [c["holds"] for c in found] == [False, True, True, True, True]
    assert found[2]["ours"] == pytest.approx(0.1)
    assert found[2]["baseline"] == pytest.approx(np.mean([0.8, 0.81, 0.82, 0.83]))


def test_the_same_seed_gives_the_same_claims():
    a, b = (relp.on_random(1, planted=True, n_layers=2, pairs=3) for _ in range(2))
    assert a.equals(b)
