"""Attention patterns are found, read, edited and differentiated in every way of writing attention."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nissl.errors import SiteError
from nissl.network import Network, Pass, Scale, Set, target

N, T, D, H = 2, 5, 8, 2


class Attention(nn.Module):
    """One attention layer, written in three ways that compute the same."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.how = nn.Linear(D, 3 * D), nn.Linear(D, D), how

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            p = F.softmax(scores, dim=-1) if self.how == "functional" else scores.softmax(-1)
            y = p @ v
        return self.out(y.transpose(1, 2).flatten(2))


def by_hand(module: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in module.qkv(x).chunk(3, -1))
    return (q @ k.transpose(-1, -2) / math.sqrt(D // H)).softmax(-1), v


@pytest.mark.parametrize("how", ["fused", "functional", "method"])
def test_read_edited_and_differentiated(how):
    net = Network(nn.Sequential(Attention(how), nn.Flatten(), nn.Linear(T * D, 3)))
    x = torch.randn(N, T, D)
    plain = net.module(x).detach()
    p, v = by_hand(net.module[0], x)
    answer = net.run(Pass(x, read=["0:pattern"], of=1, wrt=["0:pattern"]))
    torch.testing.assert_close(answer.reads["0:pattern"], p.detach())
    torch.testing.assert_close(answer.output, plain)

    def rest(pattern):
        y = (pattern @ v).transpose(1, 2).flatten(2)
        return net.module[1:](net.module[0].out(y))

    leaf = p.detach().requires_grad_()
    (g,) = torch.autograd.grad(rest(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(answer.gradients["0:pattern"], g)
    uniform = torch.full((N, H, T, T), 1 / T)
    torch.testing.assert_close(net.run(Pass(x, Set("0:pattern", uniform))).output, rest(uniform).detach())
    without = p.detach().clone()
    without[:, 1] = 0
    head = torch.zeros(1, H, 1, 1, dtype=torch.bool)
    head[:, 1] = True
    cut = net.run(Pass(x, Set("0:pattern", 0.0, where=head)))
    torch.testing.assert_close(cut.output, rest(without).detach())


def test_of_multi_head_attention_and_the_encoder_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True).eval()
    x = torch.randn(N, T, D)
    net = Network(layer)
    answer = net.run(Pass(x, read=["self_attn:pattern"]))
    _, weights = layer.self_attn(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(answer.reads["self_attn:pattern"], weights.detach())
    torch.testing.assert_close(answer.output, layer(x).detach(), atol=1e-5, rtol=1e-5)
    halved = net.run(Pass(x, Scale("self_attn:pattern", 0.5)))
    assert not torch.allclose(halved.output, answer.output)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_of_language_models_agree_with_what_they_return(family, implementation):
    torch.manual_seed(0)
    common = {"attn_implementation": "eager"}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=H, n_embd=D, vocab_size=11, n_positions=16, **common))
        site = "transformer.h.1.attn:pattern"
    elif family == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=16, intermediate_size=16,
            vocab_size=11, max_position_embeddings=16, **common))  # fmt: skip
        site = "model.layers.1.self_attn:pattern"
    else:
        model = BertModel(BertConfig(
            num_hidden_layers=2, num_attention_heads=H, hidden_size=D, intermediate_size=16, vocab_size=11, **common,
        ), add_pooling_layer=False)  # fmt: skip
        site = "encoder.layer.1.attention.self:pattern"
    model.eval()
    ids = torch.randint(11, (N, T))
    expected = model(ids, output_attentions=True).attentions[1].detach()
    model.set_attn_implementation(implementation)
    net = Network(model, output=None if family != "bert" else "last_hidden_state")
    listed = [s.address for s in net.sites("*:pattern", {"input_ids": ids})]
    assert site in listed
    assert len(listed) == 2
    read = net.run(Pass({"input_ids": ids}, read=[site])).reads[site]
    torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-4)


def test_two_patterns_in_one_module_are_told_apart():
    class Twice(nn.Module):
        def forward(self, x):
            return (x @ x.transpose(1, 2)).softmax(-1) @ (2 * x @ x.transpose(1, 2)).softmax(-1) @ x

    net = Network(nn.Sequential(Twice()))
    x = torch.randn(N, T, D)
    for question in (Pass(x, read=["0:pattern"]), Pass(x, read=["0:pattern"], output=False)):
        with pytest.raises(SiteError, match=r"0:pattern#1, 0:pattern#2"):
            net.run(question)
    read = net.run(Pass(x, read=["0:pattern#1", "0:pattern#2"])).reads
    for i, scale in enumerate((1, 2), 1):
        torch.testing.assert_close(read[f"0:pattern#{i}"][:, 0], (scale * x @ x.transpose(1, 2)).softmax(-1))
    assert [s.address for s in net.sites("*:pattern")] == ["0:pattern#1", "0:pattern#2"]


def test_a_softmax_over_classes_is_no_pattern():
    net = Network(nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1)))
    net.run(Pass(torch.ones(1, 3)))
    assert net.sites("*:pattern") == []
    with pytest.raises(SiteError, match="did not reach"):
        net.run(Pass(torch.ones(1, 3), read=["1:pattern"]))


def test_a_pattern_can_be_the_target():
    net = Network(nn.Sequential(Attention("fused")))
    x = torch.randn(N, T, D)
    p, _ = by_hand(net.module[0], x)
    answer = net.run(Pass(x, of=target.unit("0:pattern", 1, 2, 3), wrt=["input"]))
    torch.testing.assert_close(answer.scalar, p[:, 1, 2, 3].detach())
