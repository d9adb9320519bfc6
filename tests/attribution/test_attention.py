"""Scores from attention against the same sums computed from weights that the models give out themselves."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nissl.attribution import AttentionFlow, AttentionRollout, AttentionWeights
from nissl.errors import InputError
from nissl.models.text import AttentiveBiLSTM, TextTransformer
from nissl.network import Network, target


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = encoder()
        self.embed, self.head = nn.Embedding(11, 8).double(), nn.Linear(8, 3).double()

    def forward(self, ids):
        return self.head(self.blocks(self.embed(ids))[:, 0])


def weights_of(text: Text, ids: torch.Tensor) -> list[np.ndarray]:
    """(n_rows, heads, queries, keys) of each layer, by asking the attention modules themselves."""
    found = []
    with torch.no_grad():
        h = text.embed(ids)
        for layer in text.blocks.layers:
            found.append(layer.self_attn(h, h, h, need_weights=True, average_attn_weights=False)[1].numpy())
            h = layer(h)
    return found


def rollout(patterns: list[np.ndarray], fusion: str = "mean", residual: float = 0.5) -> np.ndarray:
    """(n_rows, queries, sources) by the definition."""
    flow = np.eye(patterns[0].shape[-1])[None]
    for p in patterns:
        a = getattr(p, fusion)(1)
        a = a / a.sum(-1, keepdims=True)
        flow = ((1 - residual) * a + residual * np.eye(a.shape[-1])) @ flow
    return flow


def tiny_vit(implementation: str, size=16):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    config = ViTConfig(image_size=size, patch_size=4, num_labels=3, attn_implementation=implementation, **shape)
    return ViTForImageClassification(config).double().eval()


IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 1, 9, 0, 3]])


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8])
def test_rollout_of_an_encoder(fusion, residual):
    text = Text().eval()
    scores = AttentionRollout(fusion=fusion, residual=residual).attribute(Network(text), IDS, 1)
    assert scores.dims == ("example", "token")
    expected = rollout(weights_of(text, IDS), fusion, residual)
    np.testing.assert_allclose(scores.values, expected[:, 0], rtol=1e-9)
    np.testing.assert_allclose(scores.values.sum(1), 1, rtol=1e-9)
    assert (scores.attrs["forward_passes"], scores.attrs["backward_passes"]) == (2, 0)


def test_queries():
    text = Text().eval()
    expected, net = rollout(weights_of(text, IDS)), Network(text)
    for query in (0, 3, -1):
        np.testing.assert_allclose(
            AttentionRollout(query=query).attribute(net, IDS, 1).values, expected[:, query], rtol=1e-9
        )
    np.testing.assert_allclose(
        AttentionRollout(query="mean").attribute(net, IDS, 1).values, expected.mean(1), rtol=1e-9
    )
    with pytest.raises(InputError, match="5 tokens"):
        AttentionRollout(query=5).attribute(net, IDS, 1)


def test_discarding_keeps_the_strongest_weights():
    text = Text().eval()
    pattern = weights_of(text, IDS)[0].mean(1)
    only_first = AttentionRollout(discard=0.6, residual=0.0, query=2)
    # of 5 weights the weakest 3 are dropped in each row, in each of three layers
    flow = np.eye(5)[None]
    for p in weights_of(text, IDS):
        a = p.mean(1)
        kept = a * (np.argsort(np.argsort(a, -1), -1) >= 3)
        flow = kept / kept.sum(-1, keepdims=True) @ flow
    np.testing.assert_allclose(only_first.attribute(Network(text), IDS, 1).values, flow[:, 2], rtol=1e-9, atol=1e-15)
    assert pattern.min() > 0


def test_no_class_is_looked_at():
    net = Network(Text().eval())
    np.testing.assert_array_equal(
        AttentionRollout().attribute(net, IDS, 0).values, AttentionRollout().attribute(net, IDS, 2).values
    )


def test_inside_only_the_layers_behind_are_multiplied():
    text = Text().eval()
    scores = AttentionRollout().attribute(Network(text), IDS, 1, site="blocks.layers.0")
    assert scores.dims == ("example", "token")
    np.testing.assert_allclose(scores.values, rollout(weights_of(text, IDS)[1:])[:, 0], rtol=1e-9)
    with pytest.raises(InputError, match=r"behind 'blocks\.layers\.2'"):
        AttentionRollout().attribute(Network(text), IDS, 1, site="blocks.layers.2")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rollout_of_a_vision_transformer(implementation):
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        own = tiny_vit("eager")(image, output_attentions=True).attentions
    expected = rollout([a.numpy() for a in own])[:, 0, 1:].reshape(2, 4, 4)  # what the class token gathers from patches
    net = Network(tiny_vit(implementation))
    scores = AttentionRollout(upsample=False).attribute(net, image, 1)
    assert scores.dims == ("example", "y", "x")
    np.testing.assert_allclose(scores.values, expected, rtol=1e-6)
    large = AttentionRollout().attribute(net, image, 1)
    shown = F.interpolate(torch.from_numpy(expected)[:, None], (16, 16), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(large.values, shown, rtol=1e-6)


def test_patches_without_a_class_token_are_read_by_their_mean():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.cut, self.blocks, self.head = nn.Conv2d(3, 8, 4, 4).double(), encoder(), nn.Linear(8, 2).double()

        def forward(self, v):
            return self.head(self.blocks(self.cut(v).flatten(2).transpose(1, 2)).mean(1))

    torch.manual_seed(1)
    net, image = Network(Pooled().eval()), torch.randn(1, 3, 12, 8, dtype=torch.float64)
    auto, mean, first = (
        AttentionRollout(query=query, upsample=False).attribute(net, image, 1) for query in (None, "mean", 0)
    )
    assert auto.shape == (1, 3, 2)  # the grid of the cut, not the largest square
    np.testing.assert_array_equal(auto.values, mean.values)
    assert np.abs(auto.values - first.values).max() > 1e-6


def test_causal_attention_is_read_from_the_last_token():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        own = model(IDS, output_attentions=True).attentions
    scores = AttentionRollout().attribute(Network(model), {"input_ids": IDS}, target.class_logit(3, position=-1))
    np.testing.assert_allclose(scores.values, rollout([a.numpy() for a in own])[:, -1], rtol=1e-6)


def test_networks_without_one_sequence_of_attention_are_refused():
    with pytest.raises(InputError, match="no attention patterns"):
        AttentionRollout().attribute(Network(nn.Linear(3, 2)), torch.ones(1, 3), 0)
    with pytest.raises(InputError, match="no attention patterns"):
        AttentionRollout().attribute(Network(lambda v: v[:, :2]), np.ones((1, 3), np.float32), 0)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, 2, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, v):
            return self.attention(self.queries.expand(len(v), -1, -1), v, v)[0].mean(1)

    net = Network(Cross().eval(), dims=("token", "unit"))
    with pytest.raises(InputError, match="one token sequence with itself"):
        AttentionRollout().attribute(net, torch.randn(1, 5, 8), 0)


@pytest.mark.parametrize("wrong", [{"residual": 1.0}, {"discard": -0.1}, {"residual": float("nan")}])
def test_wrong_parameters(wrong):
    with pytest.raises(InputError, match="share"):
        AttentionRollout(**wrong)


# ---------------------------------------------------------------- flow and weights


def matrices(n_layers: int, tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, tokens, tokens, generator=generator).double().mul(2).softmax(-1) for _ in range(n_layers)]


def test_rollout_and_flow_in_known_cases():
    for method in (AttentionRollout(), AttentionFlow()):
        identity = [method.fused(torch.eye(5).double()[None])] * 4
        assert method.reaching(identity, 0).tolist() == [1, 0, 0, 0, 0]
        uniform = [method.fused(torch.full((1, 5, 5), 0.2).double())] * 3
        for query in (0, 3, -1):
            assert float(method.reaching(uniform, query).sum()) == pytest.approx(1)
    one = [AttentionRollout().fused(p) for p in matrices(1, 6)]
    for query in (0, 2, -1, None):
        flow, product = (m.reaching(one, query) for m in (AttentionFlow(), AttentionRollout()))
        np.testing.assert_allclose(flow, product, atol=1e-7)


@pytest.mark.parametrize("residual", [0.0, 0.5])
def test_flow_against_another_solver(residual):
    import networkx

    layers = [AttentionFlow(residual=residual).fused(p) for p in matrices(3, 5)]
    graph = networkx.DiGraph()
    for n, layer in enumerate(layers):
        for i, row in enumerate(layer.tolist()):
            for j, capacity in enumerate(row):
                graph.add_edge((n + 1, i), (n, j), capacity=capacity)
    for query in (0, 4):
        flows = np.array([networkx.maximum_flow_value(graph, (3, query), (0, j)) for j in range(5)])
        found = AttentionFlow(residual=residual).reaching(layers, query)
        np.testing.assert_allclose(found, flows / flows.sum(), atol=1e-6)
        assert (found - AttentionRollout().reaching(layers, query)).abs().max() > 0.01  # not the same thing


def test_flow_of_an_encoder_and_its_limit():
    text = Text().eval()
    patterns = [torch.from_numpy(p) for p in weights_of(text, IDS)]
    scores = AttentionFlow().attribute(Network(text), IDS, 1)
    method = AttentionFlow()
    for row in range(2):
        expected = method.reaching([method.fused(p[row]) for p in patterns], 0)
        np.testing.assert_allclose(scores.values[row], expected, atol=1e-9)
    np.testing.assert_allclose(scores.values.sum(1), 1)
    with pytest.raises(InputError, match=r"5 tokens.*max_tokens=4"):
        AttentionFlow(max_tokens=4).attribute(Network(text), IDS, 1)


def test_weights_of_additive_attention():
    torch.manual_seed(0)
    model = AttentiveBiLSTM(11, hidden=3, width=4).double().eval()
    ids = torch.tensor([[1, 5, 2, 7, 0, 0], [3, 3, 9, 1, 4, 8]])
    with torch.no_grad():
        keep = ids != 0
        h, a = model.lstm(model.embedding(ids), keep), model.attention
        scores = torch.tanh(h @ a.hidden.weight.T + a.hidden.bias) @ a.score.weight[0]
        expected = scores.masked_fill(~keep, -torch.inf).softmax(1)
    net = Network(model)
    for method in (AttentionWeights(), AttentionWeights(layer=-1), AttentionWeights(query=0)):
        np.testing.assert_allclose(method.attribute(net, ids, 1).values, expected, rtol=1e-9)
    for wrong in (AttentionWeights(gather="max"), AttentionWeights(query=1), AttentionWeights(layer=1)):
        with pytest.raises(InputError):
            wrong.attribute(net, ids, 1)
    with pytest.raises(InputError, match="one token sequence with itself"):
        AttentionRollout().attribute(net, ids, 1)
    uniform = Network(AttentiveBiLSTM(11, uniform=True).eval())
    np.testing.assert_allclose(AttentionWeights().attribute(uniform, ids, 1).values[1], 1 / 6, rtol=1e-6)


def test_weights_of_an_encoder():
    text = Text().eval()
    net, all_layers = Network(text), np.stack(weights_of(text, IDS))  # (layer, row, head, query, key)
    mean = all_layers.mean((0, 2))
    np.testing.assert_allclose(AttentionWeights().attribute(net, IDS, 1).values, mean[:, 0], rtol=1e-9)
    np.testing.assert_allclose(
        AttentionWeights(gather="max").attribute(net, IDS, 1).values, mean.max(2), rtol=1e-9
    )  # for each query its largest weight
    np.testing.assert_allclose(
        AttentionWeights(layer=1, fusion="max", query=-1).attribute(net, IDS, 1).values,
        all_layers[1].max(1)[:, -1],
        rtol=1e-9,
    )
    np.testing.assert_allclose(AttentionWeights(query="mean").attribute(net, IDS, 1).values, mean.mean(1), rtol=1e-9)


def test_attention_of_the_reference_transformer_leaves_padding_out():
    torch.manual_seed(0)
    model = TextTransformer(11, width=8, heads=2).eval()
    ids = torch.tensor([[1, 5, 2, 7, 0, 0]])
    for method in (AttentionWeights(), AttentionRollout(), AttentionFlow()):
        padded = method.attribute(Network(model), ids, 1).values
        assert not padded[0, 4:].any()
        np.testing.assert_allclose(padded[:, :4], method.attribute(Network(model), ids[:, :4], 1).values, atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"layer": 0.5}, {"gather": "key"}, {"fusion": "median"}, {"query": "first"}], ids=lambda v: next(iter(v))
)
def test_wrong_parameters_of_weights(wrong):
    with pytest.raises((InputError, TypeError)):
        AttentionWeights(**wrong)
