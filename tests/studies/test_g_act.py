import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from nissl.intervention import GACT, Refinement
from nissl.network import LanguageModel
from nissl.studies import g_act


@pytest.fixture(scope="module")
def claims():
    return g_act.run(quick=True, seed=0, progress=False)


def test_every_planted_claim_holds(claims):
    assert len(claims) == 8
    for c in claims:
        assert set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"}
        assert c["holds"], c
        assert c["interval"][0] - 1e-9 <= c["ours"] <= c["interval"][1] + 1e-9
    json.dumps(claims)


@pytest.mark.parametrize("seed", [5, 6])
def test_the_planted_families_without_drift(seed):
    found = g_act.planted(seed)
    assert found["purity"] >= 0.97
    assert found["none"] < 0.1 > found["random"]
    assert found["frozen"] >= 0.9
    assert found["frozen"] >= found["single"] + 0.25
    assert found["frozen"] >= found["act"] + 0.3
    assert abs(found["frozen"] - found["oracle"]) <= 0.06
    assert found["accuracy frozen"] > found["majority"] + 0.4


@pytest.mark.parametrize("seed", [5, 6])
def test_online_probes_follow_a_drift(seed):
    found = g_act.planted(seed, drift=1.0)
    assert found["accuracy online"] >= found["accuracy frozen"] + 0.12
    assert found["late online"] >= found["late frozen"] + 0.25
    assert found["online"] > found["frozen"]


def test_with_one_cluster_it_is_the_single_direction_and_seeds_repeat():
    one = g_act.planted(3, n_clusters=1)
    assert one["frozen"] == one["online"] == one["single"]
    assert one["accuracy frozen"] == 1.0
    assert g_act.planted(4) == g_act.planted(4) != g_act.planted(5)


def found_for(change, random, shares, fluency, online, frozen):
    base = np.zeros(12)
    margins = {"none": base, "G-ACT": base + change, "difference of means": base + 1.0, "ACT": base}
    table = pd.DataFrame(shares, index=["c++", "python"]).T
    refinement = Refinement(
        torch.tensor([[[0.9, 0.1]]]).expand(12, 4, 2), torch.tensor(online).long()[None].expand(12, 4)
    )
    config_free = GACT.__new__(GACT)
    accuracy = xr.DataArray(frozen, dims="layer", coords={"majority": ("layer", [0.9] * 4)})
    return g_act.CodeStudy(margins, np.array(random), config_free, refinement, accuracy, table, fluency, {}, {})


def test_claims_about_code_hold_only_where_they_should():
    spread = np.linspace(-0.1, 0.1, 12)
    good = found_for(2 + spread, [0.1] * 19 + [0.5], {"none": [0, 1], "G-ACT": [0.5, 0.5]},
                     {"none": np.ones(12), "G-ACT": np.full(12, 1.2)}, [0, 0, 0, 0], [0.5, 0.6, 0.7, 0.8])  # fmt: skip
    assert [c["holds"] for c in g_act.code_claims(good, 0)] == [True] * 9
    bad = found_for(-0.5 + spread, [0.1] * 20, {"none": [0.5, 0.5], "G-ACT": [0.5, 0.5]},
                    {"none": np.ones(12), "G-ACT": np.full(12, 3.0)}, [1, 1, 1, 1], [0.5, 0.6, 0.7, 0.8])  # fmt: skip
    assert [c["holds"] for c in g_act.code_claims(bad, 0)] == [
        False,
        False,
        True,
        False,
        False,
        False,
        False,
        False,
        False,
    ]
    assert good.summary().loc["G-ACT", "prompts on which it rises"] == 12
    json.dumps(g_act.code_claims(bad, 0))


def test_the_code_study_runs_on_a_small_model():
    """The whole path on a random model, which has nothing to show: what it measures is finite and of the right shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Characters:
        chat_template = pad_token_id = eos_token_id = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [ord(c) % 128 for c in text][:40]}

        def decode(self, ids, skip_special_tokens=False):
            return "".join(map(chr, ids))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=4, eos_token_id=None,
                             num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, bos_token_id=None)  # fmt: skip
        network = LanguageModel(LlamaForCausalLM(config), Characters())
    found = g_act.on_code(network, n_random=2, n_repeats=2, max_tokens=3, kl=0.02)
    assert set(found.margins) | set(found.failed) == {
        "none", "G-ACT", "G-ACT, as far as ACT", "difference of means", "ACT", "static neuron", "static neuron by effect",
    }  # fmt: skip
    assert all(m.shape == (12,) and np.isfinite(m).all() for m in found.margins.values())
    assert found.refinement.labels.shape == (12, 4)
    assert found.random.shape == (2,)
    np.testing.assert_allclose(found.shares.sum(axis=1), 1.0)
    assert len(g_act.code_claims(found, 0)) in (9, 10)


@pytest.mark.slow
def test_smollm2_is_steered_toward_cpp(smollm2):
    found = g_act.on_code(smollm2, n_random=20, n_repeats=2, max_tokens=16)
    change = found.change("G-ACT")
    assert (change > 0).sum() >= g_act.RISES_ON
    assert change.mean() > np.quantile(found.random, g_act.RANDOM_QUANTILE)
