"""The study of blind spots: known level sets come out, every claim is measured, networks are compared source by source."""

import json

import pytest
import torch
from torch import nn

from nissl.network import Network
from nissl.studies import blind_spots


@pytest.fixture(scope="module")
def claims():
    return blind_spots.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim(claims):
    assert len(claims) == 2 + 2 * 4 + 3
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    assert claims[0]["holds"], claims[0]
    assert claims[1]["holds"], claims[1]
    kept = [c for c in claims if "share of ends whose confidence" in c["claim"]]
    assert [c["ours"] for c in kept] == [1, 1]
    assert all(c["holds"] for c in kept)


def test_two_networks_that_are_one_do_not_differ():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = net.module(x).argmax(1)
    table = blind_spots.on_pair(net, net, x, y, 0, 4, 2, 10, False)
    assert len(table) == 8
    assert table["index"].nunique() == 4
    a, b = (
        table[table["network"] == n].drop(columns=["network", "random"]).reset_index(drop=True)
        for n in ("clean", "robust")
    )
    assert ((a - b).abs().to_numpy() < 1e-6).all()
    differences = [c for c in blind_spots._claims("same", table, 0) if "robust minus clean" in c["claim"]]
    assert len(differences) == 3
    assert all(abs(c["ours"]) < 1e-6 and not c["holds"] for c in differences)
