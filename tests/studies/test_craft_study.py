"""The study of CRAFT: every claim is measured, planted data are what they say, comparisons are right."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from nissl.concepts.craft import Craft
from nissl.network import Pass
from nissl.studies import craft


@pytest.fixture(scope="module")
def claims():
    return craft.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_planted_data(claims):
    assert len(claims) == 17
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    # the nine claims on planted activations and on the estimator have known answers
    assert all(c["holds"] for c in claims[:9]), claims
    by_name = {c["claim"]: c for c in claims}
    least = next(c for name, c in by_name.items() if name.startswith("planted pictures: share of a concept's map"))
    assert least["ours"] > 3 * least["baseline"]


def test_planted_concepts_are_what_they_say():
    a, concepts, weights = craft.planted(2)
    assert (a.shape, concepts.shape) == ((600, 64), (6, 64))
    assert a.min() == 0
    assert a.dtype == np.float32
    assert ((concepts == 0) | ((concepts >= 0.5) & (concepts <= 1.5))).all()
    assert weights.tolist() == [3, 1.5, -1, 0, 0, 0]
    net = craft._linear(concepts, weights)
    use = np.abs(np.random.default_rng(0).standard_normal((5, 6)))
    x = torch.from_numpy((use @ concepts).astype(np.float32))[:, :, None, None]
    assert net.run(Pass(x)).output[:, 0].numpy() == pytest.approx(use @ weights, abs=1e-4)


def test_glyphs_are_where_they_are_said_to_be():
    x, y, where = craft.glyph_pictures(16, 0)
    assert x.shape == (16, 1, 32, 32)
    for i in range(16):
        held = set(where[i].any((1, 2)).nonzero()[:, 0].tolist())
        assert held == {int(y[i]), (int(y[i]) + 1) % 4}
        assert int(where[i].sum()) == 2 * 81
        assert int(where[i].sum(0).max()) == 1
        assert float(x[i, 0][~where[i].any(0)].abs().max()) < 0.6
    assert torch.equal(craft.glyph_pictures(16, 0)[0], x)
    assert not torch.equal(craft.glyph_pictures(16, 1)[0], x)


def test_the_share_of_a_map_counts_only_pictures_that_hold_the_glyph():
    maps = np.zeros((2, 1, 2, 2))
    maps[0, 0] = [[3, 1], [0, 0]]
    maps[1, 0] = 100.0
    where = np.zeros((2, 4, 2, 2), dtype=bool)
    where[0, 0, 0, 0] = True
    assert craft._share(maps, where).tolist() == [[0.75], [0], [0], [0]]


def test_orders_are_compared_by_their_areas():
    a, concepts, weights = craft.planted(1)
    images = torch.from_numpy(a)[:60, :, None, None]
    fitted = Craft("0", 6, patch_size=1, progress=False).fit(craft._linear(concepts, weights), images)
    found = craft._orders(fitted, images, 0, 6, 0)
    # the head is linear: what deletion gains insertion gains too
    assert found["deletion"] == pytest.approx(-found["insertion"], abs=1e-3)
    assert found["deletion_tcav"] == pytest.approx(-found["insertion_tcav"], abs=1e-3)
    assert found["insertion"] > 0


def test_the_picture_shows_every_kind_of_points():
    ax = craft.plot_estimator(craft.on_estimator(0))
    assert {line.get_label() for line in ax.lines} == {"sobol", "halton", "random"}
    plt.close(ax.figure)
