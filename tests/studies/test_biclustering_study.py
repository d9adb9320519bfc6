"""The study runs, and says in numbers whether its claims hold."""

import numpy as np

from nissl.recordings.simulate import biclusters
from nissl.studies import biclustering


def test_quick(monkeypatch):
    monkeypatch.setattr(biclustering, "QUICK_SWEEPS", 8)  # what eight sweeps find is not judged here
    monkeypatch.setattr(biclustering, "biclusters", lambda seed: biclusters(8, 60, 2, segment=20, seed=seed))
    claims = biclustering.run(quick=True, progress=False)
    assert len(claims) == 9
    assert all(np.isfinite(c["ours"]) for c in claims)


def test_rivals_find_what_is_plain():
    """Two groups that go up and down in turn, and bins that differ in level."""
    t = np.arange(120)
    wave = np.where(t // 30 % 2, 20.0, 1.0)
    X = np.random.default_rng(0).poisson(np.stack([wave] * 3 + [21 - wave] * 3 + [np.full(120, 5.0)] * 3, 1)) + 0.0
    groups, states = biclustering.rivals(X)
    assert len(set(groups[:3])) == len(set(groups[3:6])) == 1
    assert groups[0] != groups[3]
    assert np.mean((states == states[0]) == (wave == 1)) > 0.9
