import json

import numpy as np
import pytest
import torch

from nissl.attribution.resampling import answer_kl
from nissl.studies import thought_anchors as study


@pytest.fixture(scope="module")
def claims():
    return study.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_ledgers(claims):
    assert len(claims) == 11
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_all_three_methods_rank_what_matters_above_what_cannot(claims):
    by_word = {
        w: next(c for c in claims if c["claim"].startswith(w))
        for w in ("the models", "resampling", "receiver", "suppression")
    }
    assert by_word["the models"]["ours"] > 0.9
    assert by_word["resampling"]["ours"] >= 0.8
    assert by_word["receiver"]["ours"] >= study.WHITE_BOX
    assert by_word["suppression"]["ours"] >= study.WHITE_BOX


def test_ledgers_add_up():
    ids = study.written(200, np.random.default_rng(0))
    for row in ids:
        words = [study._WORDS[i] for i in row]
        values = {w[0]: int(w[2]) for w in words if "=" in w}
        assert list(values) == list(study.LETTERS)
        total, seen = 0, set()
        for t in study.TOTALS:
            assert words[t - 2] == "after"
            total = (total + values[words[t - 1]]) % 10
            assert int(words[t]) == total
            seen.add(words[t - 1])
        assert seen <= set(words[1:3])
        assert words[-5:] == ["answer", "is", str(total), ".", "<end>"]
        assert {study.LETTERS[i] for i in study.used_of(row)} == set(words[1:3])
        trace = study.trace_of(row)
        assert len(trace) == len(study.LETTERS) + 1 + study.STEPS + 1
        assert trace.tokens(study.tokenizer()).ids == row[:-1].tolist()


def test_exact_importance_is_that_of_many_ledgers():
    """Against answers of ledgers drawn with the first letters' values fixed."""
    (row,) = study.written(1, np.random.default_rng(5))
    found = study.exact_importance(row, 1.0, 100)
    used = study.used_of(row)
    unused = [i for i in study.SETS if i not in used]
    assert found[unused] == pytest.approx(0, abs=1e-12)
    said = [int(study._WORDS[row[study._PROMPT + 1 + 3 * i]][2]) for i in study.SETS]
    first, second = sorted(used)
    rng = np.random.default_rng(0)
    values = rng.integers(1, study.VALUES + 1, (400_000, 2))
    steps = rng.binomial(study.STEPS, 0.5, 400_000)
    answers = (steps * values[:, 0] + (study.STEPS - steps) * values[:, 1]) % 10
    one = values[:, 0] == said[first]
    both = one & (values[:, 1] == said[second])
    counts = [np.bincount(answers[w], minlength=10) for w in (np.full(len(one), True), one, both)]
    scaled = [100 * c / c.sum() for c in counts]  # answers that one side lacks cost what the smoothing says
    assert found[first] == pytest.approx(float(answer_kl(scaled[0], scaled[1], 1.0)), abs=0.02)
    assert found[second] == pytest.approx(float(answer_kl(scaled[1], scaled[2], 1.0)), abs=0.03)


def test_pairs_count_order_and_halve_ties():
    assert study.pairs(np.array([3.0, 1, 2, 0]), [0, 2]) == 1
    assert study.pairs(np.array([0.0, 1, 2, 3]), [0]) == 0
    assert study.pairs(np.array([1.0, 1, np.nan, 0]), [0]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_the_same_seed_trains_the_same_model_and_leaves_the_generator_alone():
    state = torch.random.get_rng_state()
    a, b, c = (study.trained(s, steps=2) for s in (1, 1, 2))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()
    assert torch.equal(torch.random.get_rng_state(), state)
