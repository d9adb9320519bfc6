"""The study of Du-IN: the quick one finds the planted units, claims are judged as stated, missing recordings are said."""

import json

import numpy as np
import pytest
from rich.console import Console

from nissl.errors import MissingExtraError
from nissl.recordings.eeg.du_in import Stage
from nissl.recordings.simulate import planted_units
from nissl.studies import du_in as study

GOOD = {"same": 0.7, "used": 20, "explained": (0.4, 0.0), "ranked": True, "read": 0.95, "hidden": 0.7,
        "mae": 0.8, "vqvae": 0.7, "vqvae+vq": 0.5, "scratch": 0.6, "band powers": 0.2}  # fmt: skip


def test_the_quick_study_finds_the_units_and_their_channels():
    claims = study.run(quick=True, seed=0, progress=False)
    assert len(claims) == 5
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    assert all(c["holds"] for c in claims[:3]), claims
    json.dumps(claims)


def test_claims_hold_and_fail_as_their_figures_say():
    good = study.on_units([GOOD] * 3, 0) + study.on_decoding([GOOD] * 3)
    assert all(c["holds"] for c in good)
    once = [GOOD, GOOD | {"ranked": False}, GOOD | {"ranked": False}]
    assert not study.on_units(once, 0)[3]["holds"]
    for change, at in (({"same": 0.5}, 0), ({"used": 3}, 1), ({"explained": (0.1, 0.2)}, 2), ({"hidden": 0.5}, 4)):
        claims = study.on_units([GOOD, GOOD, GOOD | change] if at != 0 and at != 4 else [GOOD | change] * 3, 0)
        assert [c["holds"] for c in claims] == [k != at for k in range(5)]
    assert not study.on_decoding([GOOD | {"scratch": 0.76}] * 3)[0]["holds"]
    assert study.on_decoding([GOOD, GOOD, GOOD | {"scratch": 0.9}])[0]["holds"]  # the median
    assert not study.on_decoding([GOOD, GOOD, GOOD | {"scratch": 0.16}])[1]["holds"]


def test_decoders_of_every_variant_are_scored():
    units = planted_units(48, n_channels=5, n_patches=4, seed=0)
    model = study.decoder("mae", 0, (1, 1, 1)).pretrain(units.X[:12])
    assert model.classifier == Stage(1, 3, 16, 1e-3, 5e-5, 0.05)
    found = study.decode(model, units, slice(12, 36), slice(36, None), 0, Console(quiet=True))
    assert set(found) == {"mae", "vqvae", "vqvae+vq", "scratch", "band powers"}
    assert all(0 <= v <= 1 for v in found.values())


def test_band_powers_are_of_each_patch():
    units = planted_units(12, n_channels=5, n_patches=4, seed=0)
    powers = study._patch_powers(units).fit_transform(units.X)
    assert powers.shape == (12, 4 * 5 * 3)
    alone = study._patch_powers(units).fit_transform(units.X[:, 2:3, 20:40])
    assert np.allclose(powers.reshape(12, 4, 5, 3)[:, 1, 2], alone)


def test_missing_recordings_are_said_and_left_out(monkeypatch):
    def missing(*_):
        raise MissingExtraError("not here")

    monkeypatch.setattr(study, "trial_set", missing)
    monkeypatch.setattr(study, "read_units", lambda *_: (None, GOOD))
    monkeypatch.setattr(study, "decode", lambda *_: {})
    with pytest.warns(UserWarning, match="not here"):
        assert len(study.run(progress=False)) == 10
