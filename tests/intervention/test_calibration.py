"""Strengths hold their promise: measured again by hand, on a model, and out of reach where they are."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nissl.errors import InputError
from nissl.intervention import Calibrated, calibrate, divergence
from nissl.network import Add, LanguageModel, Pass, Scale


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3,
        )  # fmt: skip
        return LanguageModel(LlamaForCausalLM(config))


PROMPTS = ([1, 2, 3], [4, 5], [7])


def by_hand(net, edits):
    """Mean divergence over prompts, each by itself, in float64."""
    found = []
    for prompt in PROMPTS:
        p = net.run(Pass(net.encode([prompt]))).output[0, -1].double().softmax(0)
        q = net.run(Pass(net.encode([prompt]), edits)).output[0, -1].double().softmax(0)
        found.append(float((p * (p / q).log()).sum()))
    return sum(found) / len(found)


def test_divergence_is_that_of_the_definition():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    # 0.5 ln 2 + 0.25 ln 0.5
    assert float(divergence(p.log(), q.log() + 3)) == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert float(divergence(p.log(), p.log())) == 0
    # a token that is impossible before does not count; one that becomes impossible is infinitely far
    assert float(divergence(torch.tensor([0.0, -math.inf]), torch.tensor([0.0, 0.0]))) == pytest.approx(math.log(2))
    assert float(divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -math.inf]))) == math.inf


@pytest.mark.parametrize("kl", [1e-3, 0.025, 0.1, 0.5])
@pytest.mark.parametrize("role", ["neurons", "resid_post"])
def test_the_strength_gives_the_divergence(net, kl, role):
    site = net.anatomy.site(role, 0)
    v = torch.randn(64 if role == "neurons" else 32, generator=torch.Generator().manual_seed(1))
    found = calibrate(net, PROMPTS, lambda a: [Add(site, a * v)], kl=kl)
    assert found.reachable
    assert found.reason == ""
    assert found.kl == pytest.approx(kl, rel=0.05)
    assert by_hand(net, [Add(site, found.alpha * v)]) == pytest.approx(kl, rel=0.06)
    assert float(found) == found.alpha


def test_a_narrow_tolerance_takes_few_passes(net):
    site = net.anatomy.site("neurons", 1)
    v = torch.randn(64, generator=torch.Generator().manual_seed(2))
    asked = []
    found = calibrate(net, PROMPTS, lambda a: asked.append(a) or Add(site, a * v), kl=0.1, tolerance=1e-3)
    assert found.kl == pytest.approx(0.1, rel=1e-3)
    assert len(asked) < 15


def test_what_cannot_be_reached_is_said(net):
    site = net.anatomy.site("neurons", 0)
    v = torch.randn(64, generator=torch.Generator().manual_seed(1))
    # the smallest strength overshoots
    over = calibrate(net, PROMPTS, lambda a: Add(site, (a + 50) * v), kl=1e-3)
    assert not over.reachable
    assert over.kl > 1e-3
    assert "even 0.001 gives" in over.reason
    # the largest does not suffice
    under = calibrate(net, PROMPTS, lambda a: Add(site, a * v), kl=0.1, high=1e-2)
    assert not under.reachable
    assert under.alpha == 1e-2
    assert "gives only" in under.reason
    # nothing lies between two strengths
    jump = calibrate(net, PROMPTS, lambda a: Add(site, (a > 3) * 1000 * v), kl=1e-3)
    assert not jump.reachable
    assert "jumps" in jump.reason
    for found in (over, under, jump):
        with pytest.raises(InputError, match="no strength gives a divergence"):
            float(found)


def test_an_overflow_is_an_overshoot(net):
    site = net.anatomy.site("resid_post", 1)
    found = calibrate(net, PROMPTS, lambda a: Scale(site, 1 + a if a < 2 else math.inf), kl=0.05)
    assert isinstance(found, Calibrated)
    assert math.isfinite(found.kl)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kl": 0.0}, "kl must be a number above 0"),
        ({"kl": float("nan")}, "kl must be"),
        ({"low": 2.0, "high": 1.0}, "low must be below high"),
        ({"tolerance": -1}, "tolerance"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_parameters_are_refused(net, wrong, says):
    with pytest.raises(InputError, match=says):
        calibrate(net, PROMPTS, lambda a: Add("model.layers.0", a), **wrong)


def test_no_edits_are_refused(net):
    with pytest.raises(InputError, match="gave no edits"):
        calibrate(net, PROMPTS, lambda a: [])
