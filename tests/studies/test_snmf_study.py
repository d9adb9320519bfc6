"""The study of semi-NMF: every claim is measured, planted data are what they say, pairings and verdicts are right."""

import json

import numpy as np
import pandas as pd
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from nissl.concepts import HierarchicalSemiNMF
from nissl.network import Add, LanguageModel, Pass
from nissl.studies import snmf


@pytest.fixture(scope="module")
def claims():
    return snmf.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_claim_on_planted_data(claims):
    assert len(claims) == 6
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)


def test_what_must_be_so_is_so(claims):
    recovered, ahead, ahead_of_nmf, _, rise, families = claims
    assert recovered["ours"] >= 0.93 > recovered["baseline"] + 0.25
    assert recovered["holds"]
    assert ahead["holds"]
    assert ahead_of_nmf["holds"]
    assert rise["ours"] <= 1e-6
    assert families["ours"] >= 9


def test_planted_features_are_what_they_say():
    a, z, w = snmf.planted(3)
    assert (a.shape, z.shape, w.shape) == ((800, 300), (10, 300), (800, 10))
    assert a.dtype == np.float32
    assert ((z != 0).sum(1) == 12).all()
    shared = [int(((z[j] != 0) & (z[j + 1] != 0)).sum()) for j in range(9)]
    assert shared == [4] * 9
    assert ((np.abs(z[z != 0]) >= 0.5) & (np.abs(z[z != 0]) <= 1.5)).all()
    assert ((w > 0).sum(1) == 4).all()
    noise = a - w @ z
    assert noise.std() == pytest.approx(0.25 * (w @ z).std(), rel=0.02)
    assert np.array_equal(snmf.planted(3)[0], a)
    assert not np.array_equal(snmf.planted(4)[0], a)


def test_families_share_neurons_and_tokens():
    _, z, parent = snmf.planted_families(0)
    assert parent.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    for i in range(10):
        for j in range(i):
            both = (z[i] != 0) & (z[j] != 0)
            assert both.any() if i == j + 1 and parent[i] == parent[j] else parent[i] == parent[j] or not both.any()
            assert np.array_equal(z[i][both], z[j][both])


def test_features_are_paired_once_each():
    z = np.eye(3)
    found = np.array([[-0.5, 0, -2.0], [0.1, 3, 0], [1, 0, 0]])
    assert snmf.matched(z, found, index=True).tolist() == [2, 1, 0]
    cosine = snmf.matched(z, found)
    assert cosine[0] == 1
    assert cosine[2] == pytest.approx(-2 / np.hypot(2, 0.5))
    assert snmf.matched(z, found, signed=False)[2] == -cosine[2]


def test_families_must_go_to_different_parents():
    parent = np.array([0, 0, 1, 1])
    z = np.eye(4)

    def model(label):
        levels = [type("L", (), {"components": z})(), type("L", (), {"weights": np.eye(2)[label]})()]
        found = HierarchicalSemiNMF((4, 2))
        found.levels_ = levels
        return found

    assert snmf.assigned(model([1, 1, 0, 0]), z, parent) == 4
    assert snmf.assigned(model([1, 1, 1, 0]), z, parent) == 3
    assert snmf.assigned(model([0, 0, 0, 0]), z, parent) == 2


def test_the_likelihood_is_that_of_whole_passes():
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=17,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        net = LanguageModel(LlamaForCausalLM(config))
    texts = [[3, 4, 5, 6], [7, 8]]
    edit = Add(net.anatomy.site("mlp_out", snmf.LAYER), torch.linspace(-2, 2, 32))
    gain = snmf.Likelihood(net, texts)(edit)
    for ids, found in zip(texts, gain, strict=True):
        means = []
        for edits in ((), (edit,)):
            log_p = net.run(Pass(net.encode([ids], keep=0), edits)).output[0].log_softmax(-1)
            means.append(float(np.mean([log_p[i, ids[i + 1]] for i in range(len(ids) - 1)])))
        assert found == pytest.approx(means[1] - means[0], abs=1e-5)
    assert np.abs(gain).max() > 1e-4


def test_topics_have_forty_sentences_each():
    assert {k: len(set(v)) for k, v in snmf.TOPICS.items()} == {"food": 40, "weather": 40, "code": 40}


def test_the_picture_shows_every_method():
    import matplotlib.pyplot as plt

    table = pd.DataFrame({k: [0.5, 0.6] for k in ("snmf", "sae", "nmf", "svd", "dense", "kmeans")})
    ax = snmf.plot_recovery(table)
    assert len(ax.get_yticklabels()) == 6
    plt.close(ax.figure)
