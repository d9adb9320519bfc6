"""The study of xai-agreement: its task, its quick variant, and claims that hold only where they should."""

import json
import warnings

import numpy as np
import pytest
import torch
import xarray as xr

from nissl.attribution import InputXGradient
from nissl.models.text import AttentiveBiLSTM
from nissl.network import Network
from nissl.studies import xai_agreement as study


@pytest.fixture(scope="module")
def claims():
    return study.run(quick=True, progress=False)


def test_the_quick_study_measures_every_synthetic_claim(claims):
    names = [c["claim"] for c in claims]
    assert len(set(names)) == len(names)
    assert len([n for n in names if n.startswith("synthetic, BiLSTM")]) == 21
    assert len([n for n in names if n.startswith("synthetic, transformer")]) == 15
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)
    assert all(c["holds"] for c in claims if "classified correctly" in c["claim"])
    # IG and Grad-SHAP estimate one integral
    for c in claims:
        if c["claim"].endswith("IG and Grad-SHAP agree, at least 0.65"):
            assert c["ours"] > 0.5


def test_the_synthetic_task():
    ids, labels, weights = study.polarity_task(500, seed=1)
    assert ids.shape == weights.shape == (500, 16)
    assert (ids[:, 0] == 1).all()
    assert ids.min() == 1
    assert torch.equal(labels == 1, weights.sum(1) > 0)
    polarity = torch.zeros(60)
    polarity[3:15], polarity[15:27] = torch.linspace(0.3, 1.5, 12), -torch.linspace(0.3, 1.5, 12)
    negated = torch.cat([torch.zeros(500, 1, dtype=torch.bool), ids[:, :-1] == 2], 1)
    torch.testing.assert_close(weights, torch.where(negated, -1, 1) * polarity[ids])
    assert 0.05 < negated.float().mean() < 0.15
    assert torch.equal(study.polarity_task(500, seed=1)[0], ids)


def test_deeplift_as_run_is_what_captum_gives():
    """It has rules for modules only, and here are none with a rule: the gradient is left."""
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model = AttentiveBiLSTM(20, width=6, hidden=5).double().eval()
    ids, absent = torch.randint(1, 20, (3, 7)), model.embedding.weight[:1].detach().expand(7, -1)
    ours = study.PlainDeepLIFT(absent).attribute(Network(model), ids, 1)

    class Embedded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            keep = torch.ones(x.shape[:2], dtype=torch.bool)
            return self.model.head(self.model.attention(self.model.lstm(x, keep), keep))

    x = model.embedding(ids).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer says that it sets hooks
        theirs = captum.DeepLift(Embedded()).attribute(x, absent[None].expand_as(x), target=1)
    np.testing.assert_allclose(ours.values, theirs.detach().numpy(), rtol=1e-9)
    zero = study.PlainDeepLIFT().attribute(Network(model), ids, 1)
    np.testing.assert_allclose(zero, InputXGradient().attribute(Network(model), ids, 1))


def test_film_task_keeps_clear_ratings_and_splits_them():
    rng = np.random.default_rng(0)
    texts = [["good" if i % 2 else "bad", "film", f"w{i}"] for i in range(100)]
    ratings = np.where(np.arange(100) % 2, 1.0, -1.0) * rng.uniform(0.5, 3, 100)
    task = study.film_task(texts, ratings, {"good": 1.9, "bad": -2.5}, seed=0, length=5)
    n = int((np.abs(ratings) > 1).sum())
    assert len(task.ids) + len(task.test) == n
    assert len(task.test) == n // 5
    good = task.words.ids["good"]
    assert torch.equal((task.ids == good).any(1).long(), task.labels)
    assert torch.equal((task.test == good).any(1).long(), task.test_labels)
    assert task.ratings[good] == 1.9
    assert task.ratings[1] == 0


def test_films_are_explained_and_uniform_attention_is_tried():
    rng = np.random.default_rng(0)
    texts = [[str(w) for w in rng.choice(["a", "b", "c", "good", "bad"], 4)] for _ in range(200)]
    ratings = np.array([float(t.count("good") - t.count("bad")) * 1.5 for t in texts])
    task = study.film_task(texts, ratings, {"good": 1.9, "bad": -2.5}, seed=0, length=6)
    found = study.on_films("BiLSTM", task, seed=0, texts=3, steps=10)
    assert 0 <= found.uniform <= 1
    assert list(found.faithfulness) == [str(m) for m in found.found["method_a"].values]
    both = study.pool([found, found])
    assert both.sizes["example"] == 6
    assert not any(
        n.startswith("synthetic") for n in (c["claim"] for c in study._sentiment("BiLSTM", [found], both, 0))
    )


def test_claims_hold_only_where_they_should():
    values = 0.7 + 0.01 * np.sin(np.arange(30))
    assert study._claim("c", "p", values, 0.0, 0, least=0.65)["holds"]
    assert not study._claim("c", "p", values, 0.0, 0, least=0.75)["holds"]
    assert not study._claim("c", "p", values, 0.8, 0, least=0.65)["holds"]
    assert study._claim("c", "p", values, 0.0, 0, most=0.72)["holds"]
    assert not study._claim("c", "p", values, 0.0, 0, most=0.7)["holds"]  # the interval reaches above


@pytest.mark.parametrize("misleading", [False, True])
def test_order_by_truth(misleading):
    rng = np.random.default_rng(0)
    level = np.array([0.9, 0.6, 0.3, 0.0])
    pairs = np.sqrt(level[:, None] * level) + 0.01 * rng.normal(size=(20, 4, 4))
    truth = (level[::-1] if misleading else level) + 0.01 * rng.normal(size=(20, 4))
    both = xr.Dataset(
        {"value": (("example", "method_a", "method_b"), pairs), "truth_value": (("example", "method_a"), truth)},
        {"method_a": ["a", "b", "c", "random"], "method_b": ["a", "b", "c", "random"]},
    )
    tau, low, high = study.order_by_truth(both, 0)
    assert (tau, low, high) == ((-1, -1, -1) if misleading else (1, 1, 1))
