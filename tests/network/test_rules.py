"""Backward rules against reference answers of peers, conservation laws and exact identities."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nissl.network.rules import AttnLRP, Deconvolution, Guided, LRPRules, Rules

ORACLES = Path(__file__).parents[2] / ".." / "shared" / "oracles"


def frozen(module: nn.Module) -> nn.Module:
    return module.double().eval().requires_grad_(False)


def modified(rules: Rules | None, f, x: Tensor, of=lambda y: y.sum()):
    """(output, modified gradient at x, what was met)."""
    x = x.detach().clone().requires_grad_()
    if rules is None:
        y = f(x)
        return y, torch.autograd.grad(of(y), x)[0], None
    with rules.mode() as mode:
        y = f(x)
    return y, torch.autograd.grad(of(y), x)[0], mode.met


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def oracle(name: str):
    path = ORACLES / name
    if not path.exists():
        pytest.skip(f"reference answers {name} are not beside the repository")
    return np.load(path, allow_pickle=False)


# ---------------------------------------------------------------- reference answers of peers


def peer_cnn(stored) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5),
    )  # fmt: skip
    net.load_state_dict({k[2:]: torch.from_numpy(stored[k]) for k in stored.files if k.startswith("w:")})
    return frozen(net)


PEER_RULES: dict[str, Rules | None] = {
    "gradient": None,
    "guided_backprop": Guided(),
    "deconvnet": Deconvolution(),
    "epsilon_plus": LRPRules("epsilon_plus"),
    "epsilon_plus_flat": LRPRules("epsilon_plus_flat"),
    "epsilon_alpha2_beta1": LRPRules("epsilon_alpha2_beta1"),
    "epsilon_gamma_box": LRPRules("epsilon_gamma_box", low=0, high=1),
}


def peer_relevance(stored, name: str, net: nn.Module, merging: str = "exact"):
    rules = PEER_RULES[name]
    if isinstance(rules, LRPRules):
        box = {"low": float(stored["low"]), "high": float(stored["high"])} if name.endswith("box") else {}
        rules = LRPRules(name, merging=merging, **box)
    x, rows, y = torch.from_numpy(stored["x"]), torch.arange(3), torch.from_numpy(stored["y"])
    logits, g, _ = modified(rules, net, x, lambda out: out[rows, y].sum())
    keeps = rules is None or isinstance(rules, (Guided, Deconvolution)) or rules.relevance_at_input
    return logits, g if keeps else x * g


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", PEER_RULES)
def test_convolutional_network_agrees_with_zennit(name: str, inplace: bool) -> None:
    stored = oracle("zennit-cnn.npz")
    net = peer_cnn(stored)
    for m in net.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = inplace
    if name.startswith("epsilon"):
        # The peer merges a batch norm and leaves one of unit variance behind, which divides by sqrt(1 + eps).
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.div_((1 + m.eps) ** 0.5)
                m.bias.div_((1 + m.eps) ** 0.5)
    _, relevance = peer_relevance(stored, name, net)
    assert gap(relevance, torch.from_numpy(stored[f"rel:{name}"])) < 1e-9


@pytest.mark.parametrize("name", [n for n in PEER_RULES if n.startswith("epsilon")])
def test_merging_as_zennit_does_agrees_and_exact_merging_keeps_the_output(name: str) -> None:
    stored = oracle("zennit-cnn.npz")
    reference, logits = torch.from_numpy(stored[f"rel:{name}"]), torch.from_numpy(stored["logits"])
    _, relevance = peer_relevance(stored, name, peer_cnn(stored), "zennit")
    assert gap(relevance, reference) < 1e-9
    out, relevance = peer_relevance(stored, name, peer_cnn(stored))
    assert gap(out, logits) < 1e-12
    assert 1e-6 < gap(relevance, reference) < 2e-5


def peer_llama(stored, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**json.loads(str(stored["config"])), attn_implementation=attention)
    net = transformers.LlamaForCausalLM(config)
    net.load_state_dict({k[2:]: torch.from_numpy(stored[k]) for k in stored.files if k.startswith("w:")})
    return frozen(net)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama_agrees_with_lxt(attention: str) -> None:
    stored = oracle("lxt-llama.npz")
    net = peer_llama(stored, attention)
    embeds = torch.from_numpy(stored["embeds"])
    logits, g, met = modified(
        AttnLRP(), lambda e: net(inputs_embeds=e).logits[:, -1], embeds, lambda out: out.amax(-1).sum()
    )
    assert gap(logits, torch.from_numpy(stored["logits"])) < 1e-6
    assert gap(embeds * g, torch.from_numpy(stored["relevance"])) < 1e-6
    assert (met["norm"], met["softmax"], met["activation"], met["product"]) == (5, 2, 2, 2)
