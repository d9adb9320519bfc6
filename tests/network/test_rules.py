"""Backward rules against reference answers of peers, conservation laws and exact identities."""

import copy
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nissl import Network, Pass
from nissl.errors import InputError, RuleError
from nissl.network.rules import AttnLRP, Deconvolution, Guided, LRPRules, RelP, Rescale, Rules, unmark
from nissl.network.rules.mode import stabilised

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


def tiny(family: str, attention: str = "eager", **config) -> nn.Module:
    """A small random language or vision model, in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "attn_implementation": attention}
    if family == "llama":
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**common, intermediate_size=24, vocab_size=11, num_key_value_heads=1, **config)
        )
    elif family == "gpt2":
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=11, attn_implementation=attention)
        )
    elif family == "bert":
        made = transformers.BertModel(transformers.BertConfig(**common, intermediate_size=24, vocab_size=11))
    else:
        made = transformers.ViTForImageClassification(
            transformers.ViTConfig(**common, intermediate_size=24, image_size=8, patch_size=4)
        )
    return frozen(made)


def run_tiny(family: str, net: nn.Module, x: Tensor) -> Tensor:
    if family == "vit":
        return net(pixel_values=x).logits
    out = net(inputs_embeds=x)
    # Entries of a normalised state sum to zero: weigh them.
    return out.last_hidden_state[:, 0] * torch.arange(16) if family == "bert" else out.logits[:, -1]


def tiny_input(family: str) -> Tensor:
    torch.manual_seed(6)
    return torch.randn(2, 3, 8, 8).double() if family == "vit" else torch.randn(2, 5, 16).double()


class Residual(nn.Module):
    """A bottleneck with batch norm, ReLU in place, groups, stride, and a sum written over its first term."""

    def __init__(self, n_in: int, n: int, stride: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n, 3, stride=stride, padding=1, groups=2, bias=bias), nn.BatchNorm2d(n),
            nn.ReLU(inplace=True), nn.Conv2d(n, n, 3, padding="same", bias=bias), nn.BatchNorm2d(n),
        )  # fmt: skip
        self.side = nn.Conv2d(n_in, n, 1, stride=stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.side(x)
        return F.relu(out, inplace=True)


def residual_net(zero_shift: bool = True, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=not zero_shift), nn.ReLU(inplace=True), Residual(8, 12, 2), Residual(12, 12),
        nn.AvgPool2d(2), nn.Conv2d(12, 8, 2, dilation=1, bias=not zero_shift), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3, bias=not zero_shift),
    )  # fmt: skip
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 2)
            if not zero_shift:
                m.running_mean.normal_()
                m.bias.data.normal_()
        if isinstance(m, nn.Conv2d):  # weights mostly positive, so that every unit has positive contributions
            share = 1.0 if m.kernel_size == (1, 1) else 0.75
            m.weight.data = torch.where(torch.rand_like(m.weight) < share, m.weight.abs(), m.weight)
    return frozen(net)


# ---------------------------------------------------------------- conservation


@pytest.mark.parametrize(
    ("rules", "tolerance"),
    [
        (LRPRules("epsilon", epsilon=1e-12), 1e-8),
        (LRPRules("epsilon_plus", epsilon=1e-12), 1e-8),
        (LRPRules("epsilon_gamma", epsilon=1e-12), 1e-8),
        (LRPRules("epsilon_plus_flat", epsilon=1e-12), 1e-8),
        (LRPRules("epsilon_plus_wsquare", epsilon=1e-12), 1e-8),
        (LRPRules("epsilon_gamma_box", epsilon=1e-12, low=(-9.0, -8.0, -7.0), high=9.0), 1e-8),
        (RelP(), 1e-12),
        (AttnLRP(), 1e-12),
    ],
    ids=lambda v: repr(v),
)
def test_relevance_is_conserved_in_residual_networks_without_shifts(rules: Rules, tolerance: float) -> None:
    net = residual_net()
    x = torch.randn(4, 3, 16, 16).double()
    y, g, _ = modified(rules, net, x, lambda out: out[:, 1].sum())
    relevance = (g if rules.relevance_at_input else x * g).sum((1, 2, 3))
    assert gap(relevance, y[:, 1]) < tolerance


def test_alpha_beta_is_conserved_where_every_unit_has_contributions_of_both_signs() -> None:
    torch.manual_seed(2)
    net = frozen(nn.Sequential(
        nn.Conv2d(3, 30, 3, bias=False), nn.ReLU(), nn.Conv2d(30, 30, 3, bias=False), nn.ReLU(),
        nn.ConvTranspose2d(30, 10, 2, stride=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(10, 2, bias=False),
    ))  # fmt: skip
    x = torch.rand(3, 3, 9, 9).double()
    rules = LRPRules("epsilon_alpha2_beta1", epsilon=1e-13)
    y, g, _ = modified(rules, net, x, lambda out: out[:, 0].sum())
    assert gap((x * g).sum((1, 2, 3)), y[:, 0]) < 1e-8


def test_conservation_of_relp_needs_each_of_its_four_rules() -> None:
    """No biases, RMS norms, gated layers: relevance of the input embeddings sums to the logit."""
    net, x = tiny("llama", rms_norm_eps=1e-12, initializer_range=0.4), tiny_input("llama")

    def defect(rules: Rules) -> float:
        y, g, _ = modified(rules, lambda e: run_tiny("llama", net, e), x, lambda out: out[:, 0].sum())
        return gap((x * g).sum((1, 2)), y[:, 0])

    # Norms of this family are computed in float32.
    assert defect(RelP()) < 1e-5
    for name in ("norm", "identity", "half", "attention"):
        assert defect(RelP(**{name: False})) > 0.01, name


def test_relp_with_every_rule_off_is_the_gradient() -> None:
    net, x = tiny("llama"), tiny_input("llama")
    off = RelP(norm=False, identity=False, half=False, attention=False)
    _, g, _ = modified(off, lambda e: run_tiny("llama", net, e), x)
    _, plain, _ = modified(None, lambda e: run_tiny("llama", net, e), x)
    assert gap(g, plain) < 1e-12


def test_relp_on_two_units_by_hand() -> None:
    g, u = torch.tensor([[2.0]]).double(), torch.tensor([[3.0]]).double()
    _, c, _ = modified(RelP(), lambda v: F.silu(v[:, :1]) * v[:, 1:], torch.cat([g, u], 1))
    assert torch.allclose(c, torch.tensor([[1.3212, 0.8808]]).double(), atol=1e-4)
    # RMS-norm readout: with the scale constant the score is its weight over the norm.
    x = torch.tensor([[3.0, 4.0]]).double()
    _, c, _ = modified(RelP(), lambda v: F.rms_norm(v, (2,), eps=0.0)[:, 0], x)
    assert torch.allclose(c, torch.tensor([[2**0.5 / 5, 0.0]]).double())


# ---------------------------------------------------------------- rescale


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x)) * F.gelu(self.b(x)) / 2 + self.a(x) * self.b(x).sigmoid())


class MaskedAttention(nn.Module):
    """Fused attention under a mask, and additive attention with a key that is shut out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.score, self.out = nn.Linear(6, 12), nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        scores = self.score(torch.tanh(h)).transpose(1, 2)
        shut = torch.tensor([False, False, True, False, False])
        return self.out(torch.matmul(scores.masked_fill(shut, -float("inf")).softmax(-1), h)[:, 0])


def rescale_nets() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(3)
    return {
        "mlp": (nn.Sequential(nn.Linear(6, 9), nn.ReLU(True), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 3)), (6,)),
        "tanh": (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Hardswish(), nn.Linear(9, 3)), (6,)),
        "gated": (GatedMLP(), (6,)),
        "cnn": (nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU6(True), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(6, 6, 3, padding=1), nn.SiLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
            (2, 12, 12)),
        "attention": (MaskedAttention(), (5, 6)),
        "norms": (nn.Sequential(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.RMSNorm(8), nn.Linear(8, 4),
            nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 3)), (6,)),
    }  # fmt: skip


def paired(x: Tensor, b: Tensor) -> Tensor:
    return torch.stack([x, b], 1).flatten(0, 1)


@pytest.mark.parametrize("name", rescale_nets())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rescale_is_complete(name: str, dtype: torch.dtype) -> None:
    net, shape = rescale_nets()[name]
    net = frozen(net).to(dtype)
    x, b = torch.randn(5, *shape).to(dtype), torch.randn(5, *shape).to(dtype)
    b[0] = x[0]  # no change at all: plain gradient, nothing divided by zero
    b[1] = x[1] + 1e-7
    b[2] = x[2] + 1e-3
    y, g, _ = modified(Rescale(), net, paired(x, b), lambda out: out[:, 2].sum())
    change = y[0::2, 2] - y[1::2, 2]
    total = (g[0::2] * (x - b)).flatten(1).sum(1)
    assert torch.isfinite(g).all()
    assert (total - change).abs().max() < (1e-13 if dtype == torch.float64 else 3e-6)
    # Baseline rows do not leak into the rows that count.
    x2 = paired(x, b)
    assert torch.equal(modified(Rescale(), net, x2[:4], lambda out: out[0::2, 2].sum())[1][0::2], g[0:4:2])


@pytest.mark.parametrize("name", ["gated", "attention", "norms"])
def test_rescale_where_nothing_changes_is_the_gradient(name: str) -> None:
    net, shape = rescale_nets()[name]
    net = frozen(net)
    x = torch.randn(4, *shape).double()
    _, g, _ = modified(Rescale(), net, paired(x, x))
    _, plain, _ = modified(None, net, x)
    assert gap(g[0::2], plain) < 1e-12


def test_rescale_of_softmax_is_that_of_its_parts() -> None:
    """By hand: exp with its own slope, the product with 1 / sum by the means over the pair."""
    x, b = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.tensor([[0.0, 0.3, 0.5]]).double()
    weights = torch.tensor([2.0, -1.0, 3.0]).double()
    _, g, _ = modified(Rescale(), lambda v: (v.softmax(-1) * weights).sum(1), paired(x, b))
    e, e0 = x.exp(), b.exp()
    s, s0 = e.sum(), e0.sum()
    slope = torch.where(x == b, e, (e - e0) / torch.where(x == b, 1, x - b))
    # d(e/s) = de (1/s + 1/s0)/2 + (e + e0)/2 d(1/s), and d(1/s) = -ds / (s s0)
    expected = slope * (weights * (1 / s + 1 / s0) / 2 - (weights * (e + e0) / 2).sum() / (s * s0))
    assert gap(g[:1], expected) < 1e-14
    far = paired(torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]]))  # more than single precision can hold
    _, g, _ = modified(Rescale(), lambda v: v.softmax(-1)[:, 0], far)
    assert torch.isfinite(g).all()
    assert abs(float((g[0] * (far[0] - far[1])).sum()) - 1) < 1e-6


@pytest.mark.parametrize("pool_last", [False, True])
def test_rescale_agrees_with_captum(pool_last: bool) -> None:
    """The peer is not complete itself where a ReLU and a max pooling are neighbours, so a convolution lies between."""
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(4)
    parts = [nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)] if pool_last else [nn.MaxPool2d(2), nn.Conv2d(4, 4, 2)]
    net = frozen(nn.Sequential(
        nn.Conv2d(2, 4, 3), *([nn.ReLU()] if pool_last else []), *parts, *([] if pool_last else [nn.ReLU()]),
        nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3),
    ))  # fmt: skip
    x, b = torch.randn(3, 2, 12, 12).double(), torch.randn(3, 2, 12, 12).double()
    _, g, _ = modified(Rescale(), net, paired(x, b), lambda out: out[:, 1].sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer says that it sets hooks
        reference = captum.DeepLift(net).attribute(x.clone(), b, target=1)
    assert gap(g[0::2] * (x - b), reference) < 1e-12


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: x.transpose(0, 1).tanh().transpose(0, 1), "transpose"),
        (lambda x: x.softmax(0), "softmax"),
        (lambda x: F.group_norm(x, 2), "group_norm"),
        (lambda x: x / x.norm(dim=-1, keepdim=True), "div"),
        (lambda x: x.reshape(-1, 2).tanh(), "tanh"),
        (lambda x: x.flip(0), "flip"),
        (lambda x: x @ x.T, "matmul"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_rescale_raises_where_pairs_are_lost_or_there_is_no_rule(f, name: str) -> None:
    with pytest.raises(RuleError, match=f"'{name}'.*Rescale"):
        modified(Rescale(), f, torch.randn(4, 4).double())
    with pytest.raises(RuleError, match="pairs"):
        modified(Rescale(), torch.tanh, torch.randn(3, 4).double())


# ---------------------------------------------------------------- outputs stay; fused calls equal their parts

ALL_RULES = [
    LRPRules("epsilon"), LRPRules("epsilon_plus"), LRPRules("epsilon_plus_flat"), LRPRules("epsilon_alpha2_beta1"),
    LRPRules("epsilon_gamma_box", low=-5, high=5), RelP(), RelP(attention=False), AttnLRP(), Guided(), Deconvolution(),
    Rescale(),
]  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return F.relu(self.layer(x, x, x, attn_mask=mask)[0])


def zoo() -> dict[str, tuple]:
    torch.manual_seed(7)
    nets = {
        "cnn": (residual_net(False), torch.randn(2, 3, 16, 16).double()),
        "transposed": (frozen(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU6(True),
            nn.GroupNorm(3, 6), nn.Hardswish(True), nn.LeakyReLU(0.1, True), nn.InstanceNorm2d(6, affine=True),
            nn.Upsample(scale_factor=2), nn.PReLU(), nn.AvgPool2d(2))), torch.randn(2, 4, 5, 5).double()),
        "sequence": (frozen(nn.Sequential(nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"), nn.GELU("tanh"),
            nn.MaxPool1d(2), nn.Conv1d(6, 6, 2, dilation=2), nn.ReLU(), nn.Dropout(0.5))),
            torch.randn(2, 3, 12).double()),
        "encoder layer": (frozen(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)),
            torch.randn(2, 5, 16).double()),
        "attention": (frozen(Attention()), torch.randn(2, 5, 16).double()),
    }  # fmt: skip
    for family in ("vit", "gpt2", "bert", "llama"):
        net = tiny(family, "sdpa")
        nets[family] = (lambda x, family=family, net=net: run_tiny(family, net, x), tiny_input(family))
    return nets


def test_no_rule_set_changes_an_output() -> None:
    seen = 0
    for name, (net, x) in zoo().items():
        with torch.no_grad():
            expected = net(x)
        for rules in ALL_RULES:
            given = x.clone().requires_grad_()
            if isinstance(rules, (Guided, Deconvolution)) and name in ("vit", "gpt2", "bert", "llama"):
                with pytest.raises(RuleError, match="ReLU"), rules.mode():
                    net(given)
                continue
            with rules.mode():
                y = net(given)
            assert gap(y, expected) < 1e-12, (name, rules)
            assert given.grad is None
            seen += 1
    assert seen == 9 * 11 - 4 * 2


@pytest.mark.parametrize("family", ["gpt2", "bert", "vit", "llama"])
@pytest.mark.parametrize("rules", [RelP(), AttnLRP(), LRPRules("epsilon")], ids=repr)
def test_fused_attention_has_the_relevance_of_its_parts(family: str, rules: Rules) -> None:
    x = tiny_input(family)
    nets = [tiny(family, attention) for attention in ("eager", "sdpa")]
    found = [modified(rules, lambda v, n=n: run_tiny(family, n, v), x)[1] for n in nets]
    assert gap(found[0], found[1]) < 1e-6
    assert found[0].abs().max() > 0


def written_out_norm(x: Tensor, eps: float, centre: bool) -> Tensor:
    if centre:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def test_fused_norms_have_the_gradient_of_their_parts() -> None:
    torch.manual_seed(8)
    x, w, b = torch.randn(3, 6).double(), torch.randn(6).double(), torch.randn(6).double()
    c = torch.randn(3, 6).double()

    def of(y: Tensor) -> Tensor:
        return (y.reshape(c.shape) * c).sum()

    pairs = [
        (lambda v: F.layer_norm(v, (6,), w, b, 1e-3), lambda v: written_out_norm(v, 1e-3, True) * w + b),
        (lambda v: F.rms_norm(v, (6,), w, 1e-3), lambda v: written_out_norm(v, 1e-3, False) * w),
        (
            lambda v: F.group_norm(v[:, :, None], 2, w, b, 1e-3),
            lambda v: written_out_norm(v.reshape(3, 2, 3), 1e-3, True).reshape(3, 6) * w + b,
        ),
        (
            lambda v: F.instance_norm(v.reshape(3, 2, 3), eps=1e-3),
            lambda v: written_out_norm(v.reshape(3, 2, 3), 1e-3, True),
        ),
        (lambda v: F.normalize(v, dim=-1), lambda v: v / v.norm(dim=-1, keepdim=True)),
        (
            lambda v: (v - v.mean(-1, keepdim=True)) / (v.std(-1, keepdim=True) + 1e-3),
            lambda v: (v - v.mean(-1, keepdim=True)) * (torch.var(v, -1, keepdim=True).sqrt() + 1e-3).reciprocal(),
        ),
    ]
    for i, (fused, parts) in enumerate(pairs):
        for rules in (RelP(), AttnLRP(), LRPRules("epsilon")):
            y, g, met = modified(rules, fused, x, of)
            y_parts, g_parts, met_parts = modified(rules, parts, x, of)
            assert gap(y.reshape(-1), y_parts.reshape(-1)) < 1e-12, i
            assert gap(g, g_parts) < 1e-12, (i, rules)
            assert met["norm"] == met_parts["norm"] == 1
            assert gap(g, modified(None, fused, x, of)[1]) > 1e-3, i


def test_attention_heads_in_one_call_equal_attention_written_out() -> None:
    torch.manual_seed(9)
    layer = frozen(nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 5, 8).double()

    def parts(v: Tensor) -> Tensor:
        q, k, u = F.linear(v, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
        q, k, u = (t.reshape(2, 5, 2, 4).transpose(1, 2) for t in (q, k, u))
        pattern = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return layer.out_proj((pattern @ u).transpose(1, 2).reshape(2, 5, 8))

    for rules in (RelP(), RelP(attention=False), AttnLRP(), LRPRules("epsilon")):
        for needed in (True, False):
            y, g, met = modified(rules, lambda v, n=needed: layer(v, v, v, need_weights=n)[0], x)
            y_parts, g_parts, met_parts = modified(rules, parts, x)
            assert gap(y, y_parts) < 1e-12
            assert gap(g, g_parts) < 1e-12
            assert met["softmax"] == met_parts["softmax"] == 1


def test_grouped_causal_and_masked_attention() -> None:
    torch.manual_seed(10)
    x = torch.randn(2, 4, 5, 3).double()
    shift = torch.randn(5, 5).double()

    def parts(v: Tensor, mask: Tensor, scale: float) -> Tensor:
        k = v[:, :2].repeat_interleave(2, 1)
        return ((v @ k.transpose(-1, -2)) * scale + mask).softmax(-1) @ k

    causal = torch.zeros(5, 5).double().masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    calls = [
        ({"is_causal": True, "enable_gqa": True}, causal, 3**-0.5),
        ({"attn_mask": shift, "enable_gqa": True, "scale": 0.3}, shift, 0.3),
    ]
    for arguments, mask, scale in calls:
        for rules in (AttnLRP(), RelP()):
            fused = modified(
                rules, lambda v, a=arguments: F.scaled_dot_product_attention(v, v[:, :2], v[:, :2], **a), x
            )
            apart = modified(rules, lambda v, m=mask, s=scale: parts(v, m, s), x)
            assert gap(fused[0], apart[0]) < 1e-12
            assert gap(fused[1], apart[1]) < 1e-12


# ---------------------------------------------------------------- activations, gates, products


def test_activations_hand_on_their_ratio() -> None:
    x = torch.tensor([[-2.0, -0.5, -1e-9, 0.0, 1e-9, 0.7, 7.0]]).double()
    slopes = {F.silu: 0.5, F.gelu: 0.5, torch.tanh: 1.0, F.hardswish: 0.5, F.elu: 1.0, F.mish: 0.6, F.softsign: 1.0}
    for f, slope in slopes.items():
        y, g, met = modified(AttnLRP(), f, x)
        far = x.abs() > 1e-6
        assert gap(g[far], (y / x)[far]) < 1e-12
        assert torch.allclose(g[~far], torch.tensor(slope).double(), atol=1e-5)
        assert met["activation"] == 1
    for f in (F.relu, F.leaky_relu):
        assert torch.equal(modified(AttnLRP(), f, x)[1], modified(None, f, x)[1])


def test_activations_written_in_primitives_are_the_activation() -> None:
    x = torch.tensor([[-2.0, -0.5, 0.3, 0.7, 3.0]]).double()
    written = {
        "gelu": (lambda v: 0.5 * v * (1 + torch.erf(v / 2**0.5)), F.gelu),
        "gelu tanh": (
            lambda v: 0.5 * v * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * torch.pow(v, 3.0)))),
            lambda v: F.gelu(v, approximate="tanh"),
        ),
        "silu": (lambda v: v * torch.sigmoid(v), F.silu),
        "silu from exp": (lambda v: v / (1 + torch.exp(-v)), F.silu),
        "mish": (lambda v: v * torch.tanh(F.softplus(v)), F.mish),
        "squared relu": (lambda v: F.relu(v) ** 2, lambda v: F.relu(v).square()),
        "glu": (lambda v: v[:, :2] * torch.sigmoid(v[:, 2:4]), lambda v: F.glu(v[:, :4])),
    }
    for name, (primitives, whole) in written.items():
        y, g, _ = modified(AttnLRP(), primitives, x)
        y_whole, g_whole, _ = modified(AttnLRP(), whole, x)
        assert gap(y, y_whole) < 1e-12, name
        assert gap(g, g_whole) < 1e-12, name


def test_gates_are_constant_also_through_views_and_norms_of_them() -> None:
    x = torch.randn(2, 6).double()
    gate = torch.sigmoid(x[:, 3:])
    for f in (
        lambda v: v[:, :3] * torch.sigmoid(v[:, 3:]).view(2, 3).contiguous(),
        lambda v: torch.sigmoid(v[:, 3:]).mul_(v[:, :3]),
        lambda v: v[:, :3].clone().mul_(torch.sigmoid(v[:, 3:])),
        lambda v: torch.addcmul(torch.zeros(2, 3).double(), v[:, :3], torch.sigmoid(v[:, 3:])),
    ):
        _, g, _ = modified(AttnLRP(), f, x)
        assert torch.equal(g, torch.cat([gate, torch.zeros_like(gate)], 1))


def test_products_give_half_to_each_factor() -> None:
    a = torch.randn(2, 3, 4).double()
    for f in (
        lambda v: v[:, :, :2] * v[:, :, 2:],
        lambda v: v @ v.transpose(1, 2),
        lambda v: torch.einsum("bij,bkj->bik", v, v),
        lambda v: torch.baddbmm(torch.zeros(2, 3, 3).double(), v, v.transpose(1, 2)),
    ):
        y, g, _ = modified(AttnLRP(), f, a)
        assert gap(g, modified(None, f, a)[1] / 2) < 1e-12
        assert gap((a * g).sum(), y.sum()) < 1e-12


def test_bilinear_layers_are_products() -> None:
    torch.manual_seed(11)
    layer = frozen(nn.Bilinear(3, 4, 5, bias=False))
    x = torch.randn(6, 7).double()
    y, g, met = modified(RelP(), lambda v: layer(v[:, :3], v[:, 3:]), x)
    assert gap((x * g).sum(1), y.sum(1)) < 1e-12
    assert met["product"] == 1
    with torch.no_grad():
        assert gap(y, layer(x[:, :3], x[:, 3:])) < 1e-12


def test_writing_in_place_equals_writing_elsewhere() -> None:
    torch.manual_seed(12)
    w = torch.randn(6, 6).double()

    def in_place(x: Tensor) -> Tensor:
        h = F.linear(x, w)
        h.tanh_()
        h += x
        h *= 2
        h.mul_(F.linear(x, w))
        out = torch.zeros_like(h)
        out[:, :3] = h[:, :3]
        out[:, 3:] = h[:, 3:]
        F.relu6(F.hardtanh_(out, -3, 3), True)
        return F.leaky_relu(out, 0.1, True) - x

    def elsewhere(x: Tensor) -> Tensor:
        h = (torch.tanh(F.linear(x, w)) + x) * 2 * F.linear(x, w)
        return F.leaky_relu(F.relu6(F.hardtanh(h, -3, 3)), 0.1) - x

    x = torch.randn(4, 6).double()
    for rules in ALL_RULES:  # without rules torch refuses: tanh needs its result, which is written over
        y, g, _ = modified(rules, in_place, x)
        y2, g2, _ = modified(rules, elsewhere, x)
        assert gap(y, y2) < 1e-12, rules
        assert gap(g, g2) < 1e-12, rules


def test_what_a_rule_needs_survives_being_written_over() -> None:
    """A layer's output is changed in place by functions that do not keep zeros."""
    torch.manual_seed(13)
    conv = frozen(nn.Conv2d(2, 4, 3))

    def f(x: Tensor, copies: bool) -> Tensor:
        y = conv(x)
        z = y.clone() if copies else y
        return z.add_(5.0).tanh_().flatten(1)

    x = torch.randn(2, 2, 6, 6).double()
    for rules in ALL_RULES[:5]:
        found = [modified(rules, lambda v, c=c: f(v, c), x)[1] for c in (False, True)]
        assert gap(found[0], found[1]) < 1e-12, rules


# ---------------------------------------------------------------- layers


def test_every_layer_follows_the_epsilon_rule() -> None:
    torch.manual_seed(14)
    w = torch.randn(4, 4).double()
    bias = torch.randn(4).double()
    x = torch.randn(3, 4).double()
    rules, eps = LRPRules("epsilon", epsilon=0.3), 0.3
    for f in (
        lambda v: F.linear(v, w),
        lambda v: v @ w.T,
        lambda v: torch.addmm(torch.zeros(4).double(), v, w.T),
        lambda v: torch.einsum("ij,kj->ik", v, w),
        lambda v: (w @ v.T).T,
        lambda v: F.conv1d(v[:, :, None], w[:, :, None])[:, :, 0],
    ):
        y, g, _ = modified(rules, f, x)
        y = y.detach()
        assert gap(g, (y / (y + eps * torch.where(y >= 0, 1.0, -1.0))) @ w) < 1e-12
    y, g, _ = modified(rules, lambda v: torch.addmm(bias, v, w.T), x)
    assert gap(g, (y / (y + eps * torch.where(y >= 0, 1.0, -1.0))).detach() @ w) < 1e-12


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma", "epsilon_plus_flat"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
        nn.Conv1d(4, 8, 2, dilation=2, groups=4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_batch_norm_is_merged_into_the_layer_before_it(name: str, layer: nn.Module) -> None:
    torch.manual_seed(15)
    layer, x = frozen(copy.deepcopy(layer)), torch.randn(2, 4, 9).double()
    n = layer.out_channels
    norm = frozen(nn.BatchNorm1d(n))
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.normal_(), norm.bias.normal_()
    merged = copy.deepcopy(layer)
    scale = norm.weight / (norm.running_var + norm.eps) ** 0.5
    if isinstance(layer, nn.ConvTranspose1d):
        for i in range(layer.groups):  # inputs of group i make outputs of group i
            part = slice(i * 4 // layer.groups, (i + 1) * 4 // layer.groups)
            merged.weight[part] *= scale.reshape(layer.groups, -1)[i][None, :, None]
    else:
        merged.weight.mul_(scale[:, None, None])
    merged.bias.copy_((layer.bias - norm.running_mean) * scale + norm.bias)
    y, g, met = modified(LRPRules(name), nn.Sequential(layer, norm), x, lambda out: out.square().sum())
    y2, g2, _ = modified(LRPRules(name), merged, x, lambda out: out.square().sum())
    assert gap(y, y2) < 1e-12
    assert gap(g, g2) < 1e-9
    assert met["layer"] + met["first"] == 1


def test_an_unmarked_tensor_is_not_merged_past() -> None:
    torch.manual_seed(16)
    conv, norm = frozen(nn.Conv1d(2, 3, 2)), frozen(nn.BatchNorm1d(3))
    norm.running_mean.normal_()
    x = torch.randn(2, 2, 5).double().requires_grad_()
    with LRPRules("epsilon_plus").mode():
        h = conv(x)
        unmark(h)
        y = norm(h)
    g = torch.autograd.grad(y.sum(), h)[0]
    assert gap(g, (norm.weight / (norm.running_var + norm.eps) ** 0.5)[:, None].expand_as(g)) < 1e-12


def test_a_layer_whose_input_was_written_over_is_not_merged_with_its_norm() -> None:
    torch.manual_seed(21)
    conv, norm = frozen(nn.Conv1d(2, 3, 2)), frozen(nn.BatchNorm1d(3))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 2, 5).double()

    def f(v: Tensor, late: bool) -> Tensor:
        h = v * 1
        y = conv(h)
        if late:
            h.add_(1)
        else:
            unmark(y)
        return norm(y)

    rules = LRPRules("epsilon_plus")
    assert torch.equal(modified(rules, lambda v: f(v, True), x)[1], modified(rules, lambda v: f(v, False), x)[1])
    assert gap(modified(rules, lambda v: norm(conv(v)), x)[1], modified(rules, lambda v: f(v, False), x)[1]) > 1e-3


def test_stabiliser_keeps_signs_and_counts_zero_as_positive() -> None:
    y = torch.tensor([-2.0, -0.0, 0.0, 3.0])
    assert stabilised(y, 0.5).tolist() == [-2.5, 0.5, 0.5, 3.5]


def test_normalisation_inside_the_network_moves_no_relevance_before_a_special_first_layer() -> None:
    torch.manual_seed(17)
    conv = frozen(nn.Conv2d(3, 4, 3))
    mean, std = torch.randn(3, 1, 1).double(), torch.rand(3, 1, 1).double() + 0.5
    x = torch.randn(2, 3, 6, 6).double()

    def in_place(v: Tensor) -> Tensor:
        v = v.clone()
        v.sub_(mean).div_(std)
        return conv(v)

    for name in ("epsilon_plus_flat", "epsilon_plus_wsquare"):
        _, expected, _ = modified(LRPRules(name), conv, (x - mean) / std)
        for f in (lambda v: conv((v - mean) / std), in_place):
            assert gap(modified(LRPRules(name), f, x)[1], expected) < 1e-12
        # Parallel first layers: each has the special rule, and a path around them has input times gradient.
        _, both, met = modified(LRPRules(name), lambda v: conv(v) + 2 * conv(v.flip(0)).flip(0), x)
        assert gap(both, 3 * modified(LRPRules(name), conv, x)[1]) < 1e-12
        assert met["first"] == 2
        _, around, _ = modified(LRPRules(name), lambda v: (v * v.tanh()).sum() + 0 * conv(v).sum(), x)
        assert gap(around, x * torch.tanh(x)) < 1e-12


# ---------------------------------------------------------------- never silent


def test_operations_without_a_rule_raise_once_relevance_reaches_them() -> None:
    x = torch.randn(2, 6).double()
    for rules in (LRPRules("epsilon_plus"), RelP(), AttnLRP(), Rescale()):
        given = x.clone().requires_grad_()
        with rules.mode():
            y = torch.sort(given, -1).values
        with pytest.raises(RuleError, match=f"'sort'.*{rules.name}"):
            torch.autograd.grad(y.sum(), given)
        # What relevance does not reach may be anything.
        y, g, _ = modified(rules, lambda v: v * 2 + torch.sort(v, -1).values.detach(), x)
        assert torch.equal(g, torch.full_like(x, 2))


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: x.exp(), "exp"),
        (lambda x: x.var(-1), "var"),
        (lambda x: (x * x).sum(-1).sqrt(), "sqrt"),
        (lambda x: x.softmax(-1) @ torch.randn(6, 2).double(), "softmax"),
        (lambda x: x.log_softmax(-1), "log_softmax"),
        (lambda x: 1 / x, "rdiv"),
        (lambda x: x / x.roll(1), "div"),
        (lambda x: torch.fft.rfft(x).real, "fft_rfft"),
        (lambda x: x.cumprod(-1), "cumprod"),
        (lambda x: x.clone().cumprod_(-1), "cumprod"),
    ],
)
def test_scales_and_gates_that_are_used_as_signals_raise(f, name: str) -> None:
    with pytest.raises(RuleError, match=name):
        modified(RelP(), f, torch.rand(2, 6).double())


def test_recurrent_layers_in_one_call_raise_at_once() -> None:
    for layer in (nn.LSTM(3, 4), nn.GRU(3, 4), nn.RNN(3, 4, nonlinearity="relu"), nn.LSTMCell(3, 4)):
        x = torch.randn(5, 3).double().requires_grad_()
        for rules in (RelP(), LRPRules(), Guided()):
            with pytest.raises(RuleError, match="many layers in one call"), rules.mode():
                frozen(layer)(x)


def test_guided_rules_raise_where_there_is_no_relu() -> None:
    x = torch.randn(2, 3).double().requires_grad_()
    for rules in (Guided(), Deconvolution()):
        with pytest.raises(RuleError, match="ReLU"), rules.mode():
            torch.tanh(x)
        with pytest.raises(ValueError, match="the network's own"), rules.mode():
            raise ValueError("the network's own")
        with pytest.raises(RuleError, match="ReLU"), rules.mode():
            F.multi_head_attention_forward(
                x[:, None], x[:, None], x[:, None], 3, 1, torch.randn(9, 3).double(), None, None, None, False, 0.0,
                torch.randn(3, 3).double(), None, training=False,
            )  # fmt: skip


@pytest.mark.parametrize(
    "f", [F.relu, F.relu6, lambda x: x.clamp(min=0), lambda x: F.hardtanh(x, 0, 6), lambda x: F.threshold(x, 0, 0)]
)
def test_guided_and_deconvolution_by_hand(f) -> None:
    x = torch.tensor([[-1.0, 2.0, 3.0, 8.0]]).double()
    c = torch.tensor([[1.0, 1.0, -1.0, 1.0]]).double()
    cut = float(f(torch.tensor(8.0)) < 8)
    guided = modified(Guided(), f, x, lambda y: (y * c).sum())[1]
    assert guided.tolist() == [[0.0, 1.0, 0.0, 1.0 - cut]]
    assert modified(Deconvolution(), f, x, lambda y: (y * c).sum())[1].tolist() == [[1.0, 1.0, 0.0, 1.0]]


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g):
        return g


class Hidden(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(x)


class MemoryEfficientSwish(Hidden):
    pass


def test_autograd_functions_of_the_network_raise_unless_their_module_is_an_activation() -> None:
    torch.manual_seed(19)
    w = torch.randn(3, 3).double()
    x = torch.randn(2, 3).double()
    with pytest.raises(RuleError, match="Swish"):
        modified(RelP(), lambda v: Swish.apply(v) @ w, x)

    def gradient(activation: nn.Module) -> Tensor:
        torch.manual_seed(20)
        net = Network(nn.Sequential(nn.Linear(3, 3), activation).double())
        return net.run(Pass(x, of=0, wrt="input", rules=RelP())).gradients["input"]

    with pytest.raises(RuleError, match="Swish"):
        gradient(Hidden())
    assert gap(gradient(MemoryEfficientSwish()), gradient(nn.SiLU())) < 1e-12


# ---------------------------------------------------------------- what was met; sets as values; the kernel


def test_a_llama_has_its_norms_softmaxes_activations_and_products() -> None:
    x = tiny_input("llama")
    for attention in ("eager", "sdpa"):
        net = tiny("llama", attention)
        for rules in (RelP(), AttnLRP(), LRPRules("epsilon")):
            _, _, met = modified(rules, lambda e, n=net: run_tiny("llama", n, e), x)
            assert [met[k] for k in ("norm", "softmax", "activation", "product")] == [5, 2, 2, 2]


def test_rule_sets_are_values() -> None:
    again = [
        LRPRules("epsilon"), LRPRules("epsilon_plus"), LRPRules("epsilon_plus_flat"), LRPRules("epsilon_alpha2_beta1"),
        LRPRules("epsilon_gamma_box", low=-5, high=5), RelP(), RelP(attention=False), AttnLRP(), Guided(),
        Deconvolution(), Rescale(),
    ]  # fmt: skip
    assert again == ALL_RULES
    assert len({*again, *ALL_RULES}) == len(ALL_RULES)
    assert len({repr(r) for r in ALL_RULES}) == len(ALL_RULES)
    assert [r.group for r in ALL_RULES] == [1] * 10 + [2]
    assert [r.relevance_at_input for r in ALL_RULES[:6]] == [False, False, True, False, True, False]
    assert LRPRules("epsilon_gamma_box", low=np.array([0.0, 1.0]), high=[2.0, 3]).high == (2.0, 3.0)
    wide = LRPRules("epsilon_gamma_box", low=torch.zeros(1, 3, 1, 1), high=torch.ones(1, 3, 1, 1))
    assert (wide.low, wide.high) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="one number a channel"):
        LRPRules("epsilon_gamma_box", low=torch.zeros(2, 3), high=1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"composite": "nothing"},
        {"epsilon": 0.0},
        {"gamma": -1.0},
        {"composite": "epsilon_gamma_box"},
        {"composite": "epsilon_gamma_box", "low": 1.0, "high": 1.0},
        {"composite": "epsilon_gamma_box", "low": (0.0, 3.0), "high": 1.0},
        {"composite": "epsilon_gamma_box", "low": (0.0, 0.0), "high": (1.0, 1.0, 1.0)},
        {"composite": "epsilon_gamma_box", "low": "dark", "high": "bright"},
        {"low": 0.0, "high": 1.0},
        {"merging": "never"},
    ],
)
def test_bad_parameters_are_refused(arguments: dict) -> None:
    with pytest.raises(InputError):
        LRPRules(**arguments)


def test_box_has_bounds_for_each_channel() -> None:
    torch.manual_seed(18)
    conv, x = frozen(nn.Conv2d(2, 3, 3)), torch.rand(2, 2, 5, 5).double()
    low, high = (-1.0, -2.0), (2.0, 3.0)
    rules = LRPRules("epsilon_gamma_box", low=low, high=high, epsilon=1e-9)
    y, r, _ = modified(rules, conv, x)
    y = y.detach()
    bounds = [torch.tensor(v).double().reshape(1, 2, 1, 1).expand_as(x) for v in (low, high)]
    w = conv.weight
    parts = [(x, w), (bounds[0], w.clamp(min=0)), (bounds[1], w.clamp(max=0))]
    z = F.conv2d(*parts[0]) - F.conv2d(*parts[1]) - F.conv2d(*parts[2])
    back = [v * F.conv_transpose2d(y / z, u) for v, u in parts]
    assert gap(r, back[0] - back[1] - back[2]) < 1e-6
    with pytest.raises(RuleError, match="channels"):
        modified(LRPRules("epsilon_gamma_box", low=(0.0,) * 3, high=1.0), conv, x)


def test_weights_and_network_are_left_as_they_were() -> None:
    net, x = residual_net(False), torch.randn(2, 3, 16, 16).double()
    before = copy.deepcopy(net.state_dict())
    for rules in ALL_RULES:
        modified(rules, net, x)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_with_double(dtype: torch.dtype) -> None:
    net, x = residual_net(False), torch.randn(2, 3, 16, 16).double()
    other = copy.deepcopy(net).to(dtype)
    bound = 1e-4 if dtype == torch.float32 else 0.2
    for rules in (LRPRules("epsilon", epsilon=0.1), AttnLRP(), RelP()):
        exact = modified(rules, net, x)[1]
        found = modified(rules, other, x.to(dtype))[1]
        assert found.dtype == dtype
        assert gap(found.double(), exact) < bound


def test_network_takes_gradients_under_rules_at_any_site() -> None:
    net = Network(residual_net(False))
    x = torch.randn(4, 3, 16, 16).double()
    plain = modified(LRPRules("epsilon_plus"), net.module, x, lambda out: out[:, 1].sum())
    answer = net.run(Pass(x, of=1, wrt=["input"], rules=LRPRules("epsilon_plus")))
    assert gap(answer.gradients["input"], plain[1]) < 1e-12
    assert torch.equal(answer.output, plain[0])
    # Relevance at an inner site flows on from there: taken at both, the sum over the site is what arrives.
    sites = ["2.body.0", "2", "input"]
    bias_free = Network(residual_net())
    answer = bias_free.run(Pass(x, of=1, wrt=sites, read=["2"], rules=LRPRules("epsilon_plus", epsilon=1e-12)))
    total = (answer.reads["2"] * answer.gradients["2"]).sum((1, 2, 3))
    assert gap(total, answer.scalar) < 1e-8
    pairs = Pass(paired(x, torch.zeros_like(x)), of=1, wrt=["input"], rules=Rescale())
    gradients = net.run(pairs)
    change = gradients.scalar[0::2] - gradients.scalar[1::2]
    assert gap((gradients.gradients["input"][0::2] * x).sum((1, 2, 3)), change) < 1e-12
