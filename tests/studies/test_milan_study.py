"""The study of MILAN: every claim is measured, what is planted is what it says, verdicts follow from the tables."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from nissl.concepts.exemplars import find_exemplars
from nissl.network import Network
from nissl.studies import milan


@pytest.fixture(scope="module")
def claims():
    return milan.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim(claims):
    assert len(claims) == 12
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    assert all(math.isfinite(c["ours"]) for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    assert claims[0]["holds"]
    assert claims[1]["holds"]
    frequent, shuffled = claims[3], claims[4]
    assert frequent["ours"] >= milan.AHEAD
    assert shuffled["holds"]


def test_scenes_are_what_they_say():
    images, labels = milan.scenes(40, 3)
    assert images.shape == (40, 4, 32, 32)
    code = images[:, 3]
    kinds = code.floor().long()
    for i in range(40):
        here = [int(k) - 1 for k in kinds[i].unique() if k > 0]
        expected = torch.zeros(10, dtype=torch.bool)
        for k in here:
            expected[[k // 9, 4 + k // 3 % 3, 7 + k % 3]] = True
        assert torch.equal(labels[i], expected)
        for k in here:
            inside = kinds[i] == k + 1
            colour = milan.RGB[k // 9][:, None]
            drawn = (images[i, :3][:, inside] == colour).all(0)
            assert drawn.float().mean() > 0.3
            assert bool(drawn.all()) == (k % 3 == 0)  # plain ones have no gaps
    assert torch.equal(milan.scenes(40, 3)[0], images)


def test_planted_units_fire_on_their_concept_alone():
    images, _ = milan.scenes(60, 1)
    wanted = [(0, None, None), (None, 1, None), (None, None, 2), (2, 0, None)]
    found = find_exemplars(Network(milan.Planted(wanted, 0)), images, "units", k=3, progress=False)
    masks = found.masks()
    for row, (colour, shape, texture) in enumerate(wanted):
        for slot in range(3):
            kinds = images[found.ids[row, slot], 3].floor().long()[masks[row, slot]]
            kinds = kinds[kinds > 0] - 1
            assert len(kinds) > 5
            fits = torch.ones(len(kinds), dtype=torch.bool)
            for part, value in ((kinds // 9, colour), (kinds // 3 % 3, shape), (kinds % 3, texture)):
                fits &= value is None or part == value
            assert fits.float().mean() > 0.95


def test_sentences_name_their_concept():
    rng = np.random.default_rng(0)
    assert len(set(milan.concepts())) == 22
    for concept in milan.concepts():
        said = [milan.sentence(concept, rng) for _ in range(200)]
        generic = [t in milan.GENERIC for t in said]
        assert 0.05 < np.mean(generic) < 0.28
        assert all(milan.meant(t) == ((None, None, None) if g else concept) for t, g in zip(said, generic, strict=True))
    assert milan.meant("red crosses") == (0, 2, None)
    assert milan.meant("red green things") == (None, None, None)


def test_marks_stand_for_classes():
    x = torch.rand(10, 1, 16, 16)
    classes = torch.arange(10)
    new = milan.marked(x, classes)
    corner = new[:, 0, 0:4:2, 0:4:2].reshape(10, 4) > 0
    assert torch.equal((corner.long() << torch.arange(4)).sum(1), classes)
    assert torch.equal(new[:, :, 4:], x[:, :, 4:])
    assert torch.equal(new[:, :, :, 4:], x[:, :, :, 4:])


def test_edits_are_judged_where_validation_is_best():
    rows = []
    for method, draw, values in (
        ("word", 0, {"validation": [0.5, 0.9, 0.8], "adversarial": [0.5, 0.7, 0.99], "clean": [0.9, 0.89, 0.5]}),
        ("all units", 0, {"validation": [0.5, 0.6, 0.9], "adversarial": [0.5, 0.6, 0.8], "clean": [0.9, 0.9, 0.9]}),
        ("random", 0, {"validation": [0.5, 0.4, 0.4], "adversarial": [0.5, 0.9, 0.9], "clean": [0.9, 0.8, 0.7]}),
        ("random", 1, {"validation": [0.5, 0.6, 0.4], "adversarial": [0.5, 0.54, 0.9], "clean": [0.9, 0.8, 0.7]}),
    ):
        for test, accuracies in values.items():
            rows += [
                {"seed": 0, "method": method, "draw": draw, "n": n, "test": test, "accuracy": a}
                for n, a in enumerate(accuracies)
            ]
    gain, loss, beaten, sorted_all = milan._on_edits(pd.DataFrame(rows), 0)
    assert gain["ours"] == pytest.approx(0.2)
    assert gain["baseline"] == pytest.approx(0.02)
    assert gain["holds"]
    assert loss["ours"] == pytest.approx(0.01)
    assert beaten["ours"] == pytest.approx(0.2 - (0.02 + 2 * np.std([0, 0.04], ddof=1)))
    assert sorted_all["ours"] == pytest.approx(-0.1)
    assert not sorted_all["holds"]


def test_the_picture_shows_every_describer():
    import matplotlib.pyplot as plt

    keys = ("match", "likelihood", "nearest", "without masks", "shuffled", "frequent")
    ax = milan.plot_planted(pd.DataFrame({k: [0.5, 0.6] for k in keys}))
    assert len(ax.get_yticklabels()) == 6
    plt.close(ax.figure)
