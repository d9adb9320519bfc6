"""The study of multifaceted visualisation: the planted unit is what it says, every claim is measured."""

import json
import math

import numpy as np
import pytest
import torch

from nissl.studies import multifaceted


@pytest.fixture(scope="module")
def claims():
    return multifaceted.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim(claims):
    assert len(claims) == 7
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    assert all(math.isfinite(c["ours"]) for c in claims)
    json.dumps(claims)


def test_facets_are_separated_and_additive_units_are_not(claims):
    clusters, purity, distinct, noise, _, rise, additive = claims
    assert all(c["holds"] for c in (clusters, purity, distinct, noise, rise, additive))
    assert distinct["ours"] == 4 > distinct["baseline"]


def test_the_unit_is_that_of_the_formula():
    model = multifaceted.OrUnit(2, inhibition=0.7, bias=0.3)
    t = model.templates.numpy().astype(float)
    assert np.allclose(t @ t.T, np.eye(4), atol=1e-5)
    x = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    s = (x.flatten(1).numpy() - 0.5) @ t.T
    up = np.maximum(s, 0)
    inside = s - 0.7 * (up.sum(1, keepdims=True) - up) - 0.3
    assert np.allclose(model(x)[:, 0].numpy(), (np.log1p(np.exp(6 * inside)) / 6).sum(1), atol=1e-4)


def test_planted_images_hold_one_facet_each():
    model = multifaceted.OrUnit(1)
    images, truth = multifaceted.planted(model, 1)
    pure, which = multifaceted.purity(model, images)
    assert images.shape == (240, 1, 16, 16)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert np.bincount(truth).tolist() == [60] * 4
    assert (which == truth).all()
    assert pure.mean() > 0.95
