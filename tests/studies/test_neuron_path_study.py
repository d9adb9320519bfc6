"""The quick study finds the pair that is known; the part on pictures runs on made-up ones."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from nissl.models import vit
from nissl.studies import neuron_path as study


def test_the_known_pair_is_found():
    claims = study.run(quick=True, progress=False)
    assert [c["holds"] for c in claims] == [True, True, True]
    assert claims[0]["ours"] == pytest.approx(1.5)
    json.dumps(claims)


def test_the_part_on_pictures_runs(monkeypatch):
    monkeypatch.setattr(study, "IMAGES", 6)
    monkeypatch.setattr(study, "EXACT_IMAGES", 1)
    monkeypatch.setattr(study, "NeuronPath", lambda **o: _few_steps(**o))
    torch.manual_seed(0)
    module = vit.VisionTransformer(patch=14, width=8, depth=2, heads=2, hidden=12)
    monkeypatch.setattr(study, "fashion_vit", module.eval)
    images = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    with torch.no_grad():
        labels = module(vit.fashion_input(images)).argmax(1).numpy()
    table, same, cosine = study.on_pictures(images, labels, True, 0, False)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 6
    assert 0 <= same <= 1
    assert all(-1 <= c <= 1 or np.isnan(c) for c in cosine)
    claims = study._on_pictures("here", table, same, (0.5, 0.1), 0)
    assert len(claims) == 9
    json.dumps(claims)


def _few_steps(**options):
    from nissl.attribution.neuron_path import NeuronPath

    return NeuronPath(**{**options, "steps": 2})
