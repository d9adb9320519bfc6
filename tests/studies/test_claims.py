"""Claims hold where the figure reaches the bar and its interval the baseline, and only there."""

import json

import numpy as np
import pytest

from nissl.studies.claims import at_least, at_most, stated
from nissl.trust.statistics import bootstrap

NARROW = np.linspace(-0.01, 0.01, 20)


@pytest.mark.parametrize(
    ("values", "least", "baseline", "holds"),
    [(0.9 + NARROW, 0.5, 0.25, True), (0.4 + NARROW, 0.5, 0.25, False), (0.9 + NARROW, 0.5, 0.95, False),
     (np.array([3.0, -1.0] * 5), 0.5, 0.25, False), (np.array([0.9]), 0.5, 0.25, True), (np.array([0.9]), 0.5, 1.0, False),
     (np.ones(4, dtype=np.float32) - 1e-7, 1.0, 0.0, True)],
)  # fmt: skip
def test_at_least(values, least, baseline, holds):
    claim = at_least("c", "p", values, least, baseline)
    assert claim["holds"] is holds
    assert claim["claim"] == f"c, at least {least:g}"
    assert claim["ours"] == pytest.approx(values.mean(), rel=1e-6)
    assert (claim["interval"] is None) is (len(values) == 1)
    json.dumps(claim)


def test_no_bar_is_not_named():
    assert at_least("c", "p", 0.2 + NARROW, 0.0, 0.0)["claim"] == "c"


@pytest.mark.parametrize(
    ("values", "most", "baseline", "holds"),
    [(0.1 + NARROW, 0.2, 0.5, True), (0.3 + NARROW, 0.2, 0.5, False), (0.1 + NARROW, 0.2, 0.1, False)],
)
def test_at_most(values, most, baseline, holds):
    assert at_most("c", "p", values, most, baseline)["holds"] is holds


def test_stated_takes_a_number_or_an_interval():
    assert stated("c", "p", 2, None, True) == {
        "claim": "c", "paper": "p", "ours": 2.0, "interval": None, "baseline": None, "holds": True,
    }  # fmt: skip
    found = bootstrap(0.5 + NARROW)
    assert stated("c", "p", found, 0, False)["interval"] == [found.low, found.high]
