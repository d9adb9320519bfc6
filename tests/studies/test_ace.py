import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from rich.console import Console

from language_families import tiny
from nissl.network import Pass, Set, target
from nissl.studies import ace


@pytest.fixture(scope="module")
def claims():
    return ace.run(quick=True, seed=1, progress=False)


def test_the_quick_study_measures_the_planted_network(claims):
    assert len(claims) == 10
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)
    assert all(c["holds"] for c in claims)
    assert all(c["claim"].startswith("planted") for c in claims)


def test_the_planted_network_answers_everything():
    for seed in (0, 5):
        net = ace.planted(seed)
        assert net.answers(net.network) == {q: net.answer(*q) for q in net.questions()}
        assert len(net.questions()) == 120
        assert set(net.facts.values()) == set(range(20))  # every entity is the object of some fact


def test_an_outcome_tells_what_broke():
    net = ace.planted(0)
    fact = next(f for f, o in net.facts.items() if o != f[0])
    new = next(o for o in range(20) if o not in (net.facts[fact], fact[0]))
    untouched = ace.outcome(net, net.network, fact, new)
    assert (untouched.single, untouched.first, untouched.second) == (False, False, False)
    assert untouched.others == untouched.same_answer == 1


def test_what_must_be_exact_is():
    assert ace._exact("c", "p", [1.0, 1.0], 1.0)["holds"]
    assert not ace._exact("c", "p", [1.0, 0.99], 1.0)["holds"]
    assert ace._exact("c", "p", [True, False], 1.0)["ours"] == 0.5


def test_zeroing_compares_with_as_many_neurons_of_the_same_layers():
    net = tiny("llama")
    values = np.full((2, 3, 48), np.nan)
    generator = np.random.default_rng(0)
    values[:, 1:] = generator.normal(size=(2, 2, 48))
    scores = xr.Dataset({"value": (("example", "layer", "unit"), values)})
    prompts, tokens = ["w1 w2 w3", "w4"], torch.tensor([5, 9])
    found = ace.zeroing(net, prompts, scores, tokens, seed=0, n=6)
    assert found.shape == (2, 2)
    # the first column by hand, one prompt at a time
    for e in range(2):
        best = np.argsort(-np.nan_to_num(values[e], nan=-np.inf), axis=None)[:6]
        edits = [
            Set(net.anatomy.site("neurons", layer), 0.0, units=[int(b % 48) for b in best if b // 48 == layer])
            for layer in (1, 2)
            if any(b // 48 == layer for b in best)
        ]
        of = target.log_probability(tokens[e : e + 1], position=-1)
        inputs = net.encode(prompts[e])
        loss = net.run(Pass(inputs, of=of)).scalar - net.run(Pass(inputs, edits, of=of)).scalar
        assert found[e, 0] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    again = ace.zeroing(net, prompts, scores, tokens, seed=0, n=6)
    other = ace.zeroing(net, prompts, scores, tokens, seed=1, n=6)
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(found[:, 0], other[:, 0])
    assert not np.array_equal(found[:, 1], other[:, 1])


def test_claims_about_a_language_model_follow_from_its_table(monkeypatch):
    net = tiny("llama")
    rows = [
        {"method": m, "subject": s, "new": "x", "success": m != "pmet", "before": 0.0, "after": 1.0, "kept": 0.9,
         "neighbours": {"ace": 0.2, "pmet": 0.9, "fine-tune": 0.1}[m], "chains": {"ace": 1.0, "pmet": 0.0}.get(m, 1.0)}
        for s in ("a", "b", "c") for m in ("ace", "pmet", "fine-tune")
    ]  # fmt: skip
    monkeypatch.setattr(ace, "edits", lambda *_, **__: pd.DataFrame(rows))
    countries = [(("France", "Paris", "French"), " w5"), (("Italy", "Rome", "Italian"), " w7")]
    monkeypatch.setattr(ace, "known", lambda *_, **__: countries)
    found = ace.on_language_model(net, 0, Console(quiet=True), False, query=1, value=1)
    by_name = {c["claim"].split(": ", 1)[0] + c["claim"].rsplit(",", 1)[-1]: c for c in found}
    assert by_name
    success = [c for c in found if "new answer is the most probable" in c["claim"]]
    assert [c["holds"] for c in success] == [True, False, True]
    chains = [c for c in found if "two-hop" in c["claim"]]
    assert [c["holds"] for c in chains] == [True, False]  # ahead of PMET, equal to fine-tuning
    neighbours = [c for c in found if "other countries" in c["claim"]]
    assert [c["holds"] for c in neighbours] == [False, True]
    json.dumps(found)
