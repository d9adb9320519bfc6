"""The study of LiMA: games are what they say, rivals are ranked on the same regions, every claim is measured."""

import json

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from nissl.attribution.subsets import LiMA, search_passes
from nissl.network import Network
from nissl.runner import Runner
from nissl.studies import lima


@pytest.fixture(scope="module")
def claims():
    return lima.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_without_photographs(claims):
    assert len(claims) == 13
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    by_name = {c["claim"]: c for c in claims}
    assert all(c["holds"] for name, c in by_name.items() if name.startswith(("planted", "passes", "49", "64")))
    area = by_name["planted game: insertion area, at least 0.945"]
    assert area["ours"] > 0.945 > area["baseline"]
    assert by_name["passes as a share of greedy search, 36 regions, at most 0.72"]["ours"] == pytest.approx(940 / 1332)
    fewer = next(c["ours"] for name, c in by_name.items() if name.startswith("49 regions: times fewer"))
    assert fewer == pytest.approx(search_passes(49, "greedy") / search_passes(49), rel=0.01)


def test_the_planted_game_is_what_it_says():
    game, places = lima.planted(4)
    assert len(set(places.tolist())) == 11
    base = torch.zeros(1, 36)

    def gain(*regions):
        s = base.clone()
        s[0, list(regions)] = 1
        return (game(s) - game(base))[0].numpy()

    for place, worth in zip(places[:4], (2.5, 2, 1.5, 1), strict=True):
        assert gain(place)[0] == pytest.approx(worth, abs=0.25)
    for either in (places[4:5], places[5:6], places[4:6]):
        assert gain(*either)[0] == pytest.approx(2, abs=0.3)
    assert gain(places[6])[0] == pytest.approx(0, abs=0.25)
    assert gain(*places[6:8])[0] == pytest.approx(2, abs=0.35)
    for place, worth in zip(places[8:], (2.5, 2, 1.5), strict=True):
        assert gain(place)[1] == pytest.approx(worth, abs=0.25)
    assert float(game(base)[0, 0]) == -3


def test_the_interaction_game_is_zero_where_all_regions_are_there():
    game = lima.interacting(2)
    np.testing.assert_allclose(game(torch.ones(1, 36)), [[0, 0, -2]], atol=1e-5)
    s = (torch.rand(50, 36, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    z = game(s)[:, 0].double()
    design = torch.cat([s, torch.ones(50, 1)], 1).double()
    assert float((design @ torch.linalg.lstsq(design, z).solution - z).std()) > 0.3  # not linear


def test_misplaced_regions_are_noticed():
    blind = LiMA(regions=36, consistency=0, collaboration=0, confidence=1)
    assert lima.well_placed(0, LiMA(regions=36)) == (True, True)
    assert lima.well_placed(0, blind) != (True, True)


def test_other_maps_are_ranked_on_the_same_regions():
    labels = torch.tensor([[0, 0, 1], [2, 2, 1]])
    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(6, 2)))
    rankings = LiMA(regions=labels).rankings(net, torch.rand(1, 1, 2, 3), 0, runner=Runner(progress=False))
    scores = xr.DataArray(np.array([[[1.0, 2, 5], [9, 0, 1]]]), dims=("example", "y", "x"))
    assert lima.by_region(scores, rankings) == [[2, 1, 0]]
    again = LiMA(regions=labels).rankings(
        net, torch.rand(1, 1, 2, 3), 0, orders=[[2, 1, 0]], runner=Runner(progress=False)
    )
    assert lima.painted(again).values.tolist() == [[[1, 1, 2], [3, 3, 2]]]


def test_photographs_are_measured_on_any_network():
    """The part on photographs, on a small network with pictures that it does and does not recognise."""
    from rich.console import Console

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 6, 5, 2),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
        ]
        net = Network(nn.Sequential(*layers, nn.Linear(54, 3)))
        x = torch.rand(3, 3, 32, 32)
    labels = lima._output(net, x).argmax(1).numpy()
    labels[2] = (labels[2] + 1) % 3
    found = lima.on_photographs(net, x, labels, 0, False, Console(quiet=True))
    assert len(found) == 1 + 9 + 2
    assert all(np.isfinite(c["ours"]) for c in found)
    json.dumps(found)
