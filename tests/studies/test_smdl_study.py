"""The study of SMDL: digits are learnt, rivals share the regions of the prior, every claim is measured."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from nissl.attribution.perturbation import Occlusion
from nissl.attribution.subsets import SMDL, evidential_confidence
from nissl.network import Network
from nissl.runner import Runner
from nissl.studies import smdl


@pytest.fixture(scope="module")
def claims():
    return smdl.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_without_photographs(claims):
    assert len(claims) == 16
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    by_name = {c["claim"]: c for c in claims}
    assert by_name["planted game: insertion area, at least 0.945"]["holds"]
    assert by_name["digits: mean insertion, how far above that of random"]["ours"] > 0.05
    assert by_name["digits: mean deletion, how far below that of random"]["ours"] > 0.05


def test_an_evidential_twin_learns_to_read_and_to_be_unsure():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long()
    twin = smdl.train(x[:600], y[:600], True, 0, 12)
    with torch.no_grad():
        read, nothing = twin(x[600:1000]), twin(torch.zeros(1, 1, 8, 8))
    assert (read.argmax(1) == y[600:1000]).float().mean() > 0.7
    assert evidential_confidence(nothing)[0] < evidential_confidence(read).mean() - 0.1
    assert evidential_confidence(read)[(read.argmax(1) == y[600:1000]).numpy()].mean() > 0.5


def test_rivals_are_ranked_on_the_regions_of_the_prior():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).requires_grad_(False))
    x, y = torch.rand(2, 1, 8, 8), np.array([0, 2])
    method = SMDL(cells=4, regions=16, prior=Occlusion(window=2), effectiveness=0.0)
    table = smdl.on_same_regions(method, net, x, y, 0, False)
    assert set(table) == {"ours", "prior", "random", "rise", "single"}
    for i, r in enumerate(table["prior"]):
        # the fall of the logit orders the cells; the prior's order is that of the labels
        fall = (net.module[1].weight[y[i]].reshape(8, 8) * x[i, 0]).reshape(4, 2, 4, 2).sum((1, 3)).reshape(-1)
        assert torch.equal(r.regions.labels[0, ::2, ::2].reshape(-1)[fall.argsort(descending=True)], torch.arange(16))
        assert r.order.tolist() == list(range(16))
        for name in ("ours", "random", "rise", "single"):
            assert torch.equal(table[name][i].regions.labels, r.regions.labels)
            assert sorted(table[name][i].order.tolist()) == list(range(16))
    orders = smdl.by_single_regions(method, net, x, y, Runner(progress=False))
    for i, order in enumerate(orders):
        assert order[0] == table["ours"][i].order[0]  # the first step of the search
    assert len(list(smdl.same_region_claims("w", table, 0))) == 8
