"""Query and value neurons against formulas written out, an analytic lens, and a network whose chains are planted."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from language_families import FAMILIES, tiny
from nissl.attribution import QueryValueAttribution, plot_query_value, top_layers
from nissl.attribution import query_value as qv
from nissl.errors import InputError
from nissl.network import LanguageModel, Network, Pass, RelP, target
from nissl.runner import Runner
from nissl.studies.ace import planted

# Llama's norms round to float32 even in a float64 model: hence the tolerances
IDS = [[3, 7, 11, 4, 9], [8, 2, 2, 30, 1]]


@pytest.fixture(scope="module", params=FAMILIES)
def net(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def scores(net):
    return QueryValueAttribution(top=5, count=7).attribute(net, IDS, [6, 17], runner=Runner(progress=False))


def reads(net, *roles):
    a = net.anatomy
    sites = [a.site(r) if r in ("final", "final_norm") else a.site(r, i) for r, i in roles]
    answer = net.run(Pass(net.encode(IDS), read=sites))
    return [answer.reads[s][:, -1] for s in sites]


def frozen(net, final):
    """The final norm as published for each family, with the scale of `final`; logits of any x, written out."""
    norm = net.get_module(net.anatomy.site("final_norm"))
    U = net.module.get_output_embeddings().weight.detach()
    if net.config.model_type in ("gpt2", "gpt_neox", "opt"):
        s = (final.var(correction=0) + norm.eps).sqrt()
        return lambda x: U @ ((x - x.mean()) / s * norm.weight + norm.bias).detach()
    gemma = net.config.model_type.startswith("gemma")
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    s = (final.square().mean() + eps).sqrt()
    return lambda x: U @ (x / s * (norm.weight + gemma)).detach()


def test_value_scores_are_the_lens_written_out(net, scores):
    for layer in (0, 2):
        post, mlp, m, final, pre, attn = reads(
            net, ("resid_post", layer), ("mlp_out", layer), ("neurons", layer), ("final", None), ("resid_pre", layer),
            ("attn_out", layer),
        )  # fmt: skip
        for e, token in enumerate((6, 17)):
            logits = frozen(net, final[e])

            def p(x, logits=logits, token=token):
                return logits(x).log_softmax(0)[token]

            h = post[e] - mlp[e]
            found = scores.isel(example=e, layer=layer)
            np.testing.assert_allclose(found.value_layer, p(post[e]) - p(h), rtol=3e-5, atol=2e-6)
            np.testing.assert_allclose(found.attention_layer, p(pre[e] + attn[e]) - p(pre[e]), rtol=3e-5, atol=2e-6)
            if "sandwich" in _kind(net):
                continue
            W = net.weight("down", layer).detach()
            by_hand = [float(p(h + m[e, k] * W[:, k]) - p(h)) for k in range(W.shape[1])]
            np.testing.assert_allclose(found.value, by_hand, rtol=3e-5, atol=2e-6)


def _kind(net):
    return "sandwich" if net.config.model_type.startswith(("gemma2", "gemma3")) else "plain"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_norm_behind_the_mlp_scales_what_neurons_write(family):
    net = tiny(family)
    found = QueryValueAttribution().attribute(net, IDS, 6, runner=Runner(progress=False))
    layer = 1
    m, post, mlp, final = reads(
        net, ("neurons", layer), ("resid_post", layer), ("mlp_out", layer), ("final", None)
    )  # fmt: skip
    norm = net.module.model.layers[layer].post_feedforward_layernorm
    W, logits = net.weight("down", layer).detach(), frozen(net, final[0])
    s = ((W @ m[0]).square().mean() + norm.eps).sqrt()
    written = [((1 + norm.weight) * m[0, k] * W[:, k] / s).detach() for k in range(W.shape[1])]
    torch.testing.assert_close(sum(written), mlp[0], rtol=3e-5, atol=2e-6)
    h = post[0] - mlp[0]
    by_hand = [float(logits(h + v).log_softmax(0)[6] - logits(h).log_softmax(0)[6]) for v in written]
    np.testing.assert_allclose(found.value[0, layer], by_hand, rtol=3e-5, atol=2e-6)


def test_keys_give_the_neurons_and_components_the_residual_stream(net):
    state = _state(net)
    a = net.anatomy
    unit = torch.arange(a.d_mlp)
    for layer in range(a.n_layers):
        example = torch.ones_like(unit)
        keys = qv.keys(net, state, layer, example, unit)
        m = (keys * state.normed[1, layer]).sum(1)
        bias = getattr(net.get_module(a.site("up", layer)), "bias", None)
        if bias is not None:  # a constant input, which no component of the residual stream is
            m = m + state.neurons[1, layer] / state.up[1, layer] * bias.detach()
        torch.testing.assert_close(m, state.neurons[1, layer], rtol=3e-5, atol=2e-6)
        parts = [state.pre[1, 0], *(p for i in range(layer) for p in (state.attn[1, i], state.mlp[1, i]))]
        parts += [] if a.parallel else [state.attn[1, layer]]
        torch.testing.assert_close(sum(parts), state.mlp_in[1, layer], rtol=3e-5, atol=2e-6)


def _state(net):
    generator = qv._read(net, net.place(net.encode(IDS)), False)
    question = next(generator)
    while True:
        try:
            question = generator.send(net.run(question))
        except StopIteration as stop:
            return stop.value


def test_keys_are_relevance_gradients(net):
    """The kernel's rules (constant norms, halves for products, identity for activations) give the same keys."""
    state, a, layer = _state(net), net.anatomy, 1
    site = a.site("mlp_in", layer)
    for unit in (0, 9):
        back = state.norm[layer].back(qv.keys(net, state, layer, torch.tensor([0]), torch.tensor([unit])))[0]
        scale = state.norm[layer].scale(state.mlp_in[:, layer], state.normed[:, layer])[0]
        neuron = target.unit(a.site("neurons", layer), len(IDS[0]) - 1, unit)
        answer = net.run(Pass(net.encode(IDS[:1]), of=neuron, wrt=[site], rules=RelP()))
        torch.testing.assert_close(back / scale, answer.gradients[site][0, -1], rtol=3e-5, atol=2e-6)


def test_query_scores_add_up(net, scores):
    a = net.anatomy
    assert scores.attrs["skipped"] <= 1
    shares = scores.share.sum("component").values
    assert ((abs(shares - 1) < 1e-5) | (shares == 0)).all()
    assert (shares == 0).sum() == scores.attrs["skipped"]
    np.testing.assert_allclose(scores.query_layer, (scores.share * scores.top_score).sum("rank"), rtol=3e-5, atol=2e-6)
    # neurons of a layer and its bias make up the layer's output
    for layer in range(a.n_layers - 1):
        bias = getattr(net.get_module(a.matrix("down", layer)[0].removesuffix(".weight")), "bias", None)
        if bias is None:
            whole = scores.query_layer.sel(component=f"mlp.{layer}")
            np.testing.assert_allclose(scores["query"].sel(layer=layer).sum("unit"), whole, rtol=3e-5, atol=2e-6)
    assert not scores["query"].sel(layer=a.n_layers - 1).any()


def test_top_neurons_and_counts(scores):
    values = scores.value.values.reshape(2, -1)
    for e in range(2):
        best = np.sort(values[e])[::-1]
        np.testing.assert_array_equal(scores.top_score[e], best[:5])
        np.testing.assert_array_equal(
            scores.value.values[e, scores.top_layer[e], scores.top_unit[e]], scores.top_score[e]
        )
        counted = (scores.value.values[e] >= best[6]).sum(1)
        np.testing.assert_array_equal(scores.value_count[e], counted)


# ---------------------------------------------------------------- the lens by itself


def test_the_gain_of_a_known_direction():
    """h = 0, two tokens, U = 1, v = (1, 0): I = log sigmoid(1) - log 1/2."""
    found = qv.log_gains(torch.zeros(1, 2), torch.eye(2), torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([0]))
    assert found[0, 0].item() == pytest.approx(math.log(1 / (1 + math.exp(-1))) - math.log(0.5), abs=1e-6)
    assert found[0, 0].item() == pytest.approx(0.3799, abs=1e-4)
    assert found[0, 1].item() == pytest.approx(math.log(1 / (1 + math.exp(1))) - math.log(0.5), abs=1e-6)


def test_huge_changes_do_not_overflow():
    g = torch.Generator().manual_seed(0)
    logits, U, D = (torch.randn(*s, generator=g) for s in ((2, 9), (9, 4), (4, 3)))
    sizes = torch.tensor([[0.1, 300.0, -400.0], [0.0, 1e-4, 50.0]])
    found = qv.log_gains(logits, U, D, sizes, torch.tensor([2, 5]))
    assert torch.isfinite(found).all()
    for e, t in ((0, 2), (1, 5)):
        for k in range(3):
            after = logits[e].double() + sizes[e, k].double() * (U @ D[:, k]).double()
            true = (after.log_softmax(0) - logits[e].double().log_softmax(0))[t]
            assert found[e, k].item() == pytest.approx(true.item(), rel=2e-4, abs=1e-8)
    assert found[1, 0] == 0


# ---------------------------------------------------------------- planted chains


def test_planted_chains_are_found():
    net = planted(seed=3)
    asked = [q for q in net.questions() if q[2] is not None]
    found = QueryValueAttribution(top=1, count=1).attribute(
        net.network, [net.prompt(*q) for q in asked], runner=Runner(progress=False)
    )
    assert (found.top_layer == 1).all()
    facts = list(net.facts)
    for e, (s, r, b) in enumerate(asked):
        assert int(found.top_unit[e, 0]) == facts.index((net.facts[s, r], b))
    assert abs(found.value.sel(layer=0)).max() < 1e-12
    shares = found.share[:, 0].to_pandas()
    np.testing.assert_allclose(shares["mlp.0"], 0.5, atol=1e-7)
    np.testing.assert_allclose(shares["embed"], 0.5, atol=1e-7)
    assert abs(shares[["attn.0", "attn.1", "mlp.1"]].to_numpy()).max() < 1e-7
    # the query neuron is that of the first hop
    query = found["query"].sel(layer=0).argmax("unit").values
    assert query.tolist() == [facts.index((s, r)) for s, r, _ in asked]
    mlp = found.query_layer.sel(component=["mlp.0", "mlp.1"]).mean("example")
    assert mlp.argmax("component") == 0


def test_output_columns_are_no_keys():
    """What the authors' notebooks take as keys of neurons, columns of W_down, knows nothing of what made them fire."""
    net = planted(seed=0)
    W_in, W_out = net.network.weight("up", 1), net.network.weight("down", 1)
    written = net.network.weight("down", 0)
    assert (W_out.T @ written).abs().max() == 0
    assert (W_in @ written).abs().max() > 0


def test_attention_channels_are_single_summands():
    net = tiny("llama")
    found = QueryValueAttribution(attention=True, layers=[0]).attribute(
        net, IDS, [6, 17], runner=Runner(progress=False)
    )
    assert found.attention_value.shape == (2, 3, 5, 32)
    a, layer, e = net.anatomy, 1, 1
    sites = [a.site("pattern", layer), a.site("v", layer)]
    answer = net.run(Pass(net.encode(IDS), read=sites))
    pre, final, attn = reads(net, ("resid_pre", layer), ("final", None), ("attn_out", layer))
    logits, written = frozen(net, final[e]), net.weight("o", layer).detach()
    total = torch.zeros_like(attn[e])
    for source in range(5):
        for unit in range(32):
            head, channel = divmod(unit, a.d_head)
            value = answer.reads[sites[1]][e, source, head // 2 * a.d_head + channel]
            v = answer.reads[sites[0]][e, head, -1, source] * value * written[:, unit]
            total += v
            if unit % 7 == 0:
                gain = logits(pre[e] + v).log_softmax(0)[17] - logits(pre[e]).log_softmax(0)[17]
                assert float(found.attention_value[e, layer, source, unit]) == pytest.approx(
                    float(gain), rel=3e-5, abs=1e-6
                )
    torch.testing.assert_close(total, attn[e])


# ---------------------------------------------------------------- what is asked and refused


def test_layers_and_targets():
    net = tiny("llama")
    runner = Runner(progress=False)
    found = QueryValueAttribution(layers=1, top=3).attribute(net, IDS, runner=runner)
    scored = [i for i in range(3) if not np.isnan(found.value.values[:, i]).any()]
    assert scored == [int(found.value_layer.mean("example").argmax("layer"))]
    assert np.isnan(np.delete(found.value.values, scored, 1)).all()
    chosen = QueryValueAttribution(layers=(0, -1)).attribute(net, IDS, runner=runner)
    assert [bool(np.isfinite(chosen.value.values[:, i]).all()) for i in range(3)] == [True, False, True]
    predicted = net.run(Pass(net.encode(IDS))).output[:, -1].argmax(1).tolist()
    assert found.answer.values.tolist() == net.strings(predicted)
    by_name = QueryValueAttribution().attribute(net, ["w4 w1", "w9 w2"], " w3", runner=runner)
    assert by_name.answer.values.tolist() == ["w3", "w3"]
    again = QueryValueAttribution().attribute(net, net.encode(["w4 w1", "w9 w2"]), net.token("w3"), runner=runner)
    xr.testing.assert_equal(by_name, again)


def test_prompts_of_different_length_are_scored_as_if_alone():
    net = tiny("llama")
    method, runner = QueryValueAttribution(top=4), Runner(progress=False)
    together = method.attribute(net, ["w1 w2 w3 w4", "w5"], "w3", runner=runner)
    for e, text in enumerate(["w1 w2 w3 w4", "w5"]):
        alone = method.attribute(net, text, "w3", runner=runner)
        np.testing.assert_allclose(together.value[e], alone.value[0], rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(together.query_layer[e], alone.query_layer[0], rtol=3e-5, atol=2e-6)


def test_layers_many_questions_agree_on():
    n = 6
    component = qv.components(n)
    query = xr.DataArray(np.zeros((2, len(component))), dims=("example", "component"), coords={"component": component})
    for layer, value in enumerate((1, 5, 3, 4, 0, 9)):
        query.loc[{"component": f"mlp.{layer}"}] = value
        query.loc[{"component": f"attn.{layer}"}] = 100
    count = xr.DataArray(np.array([[0, 0, 0, 8, 5, 5]] * 2), dims=("example", "layer"))
    whole = xr.DataArray(np.array([[9, 0, 0, 0, 1, 2.0]] * 2), dims=("example", "layer"))
    data = xr.Dataset({"query_layer": query, "value_count": count, "value_layer": whole})
    assert top_layers(data, query=2, value=2) == ((1, 2), (3, 5))
    assert top_layers(data, query=4, value=1) == ((0, 1, 2), (3,))
    assert top_layers(data, query=2, value=2, margin=1) == ((1, 2), (3, 4))
    with pytest.raises(InputError, match="the model has 6 layers"):
        top_layers(data, query=5, value=2)


def test_bad_questions():
    net = tiny("llama")
    method = QueryValueAttribution()
    with pytest.raises(Exception, match="LanguageModel"):  # the check of types comes first in the tests
        method.attribute(Network(torch.nn.Linear(2, 2)), torch.ones(1, 2))
    with pytest.raises(InputError, match="3 answers were given for 2 prompts"):
        method.attribute(net, IDS, [1, 2, 3])
    with pytest.raises(InputError, match="token ids from 0 to 49"):
        method.attribute(net, IDS, 50)
    with pytest.raises(InputError, match="from 0 to 2"):
        QueryValueAttribution(layers=[3]).attribute(net, IDS)
    for wrong in ({"top": 0}, {"count": 0}, {"layers": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            QueryValueAttribution(**wrong)


def test_an_edited_network_is_scored_with_its_own_weights():
    net = tiny("llama")
    runner = Runner(progress=False)
    W = net.weight("down", 2).detach().clone()
    W[:, 5] = 0
    changed: LanguageModel = net.rewritten({("down", 2): W})
    before, after = (QueryValueAttribution().attribute(x, IDS, [6, 17], runner=runner) for x in (net, changed))
    assert (after.value.values[:, 2, 5] == 0).all()
    assert (before.value.values[:, 2, 5] != 0).all()


def test_the_picture_shows_the_means(tmp_path):
    net = tiny("llama")
    found = QueryValueAttribution().attribute(net, IDS, [6, 17], runner=Runner(progress=False))
    figure = plot_query_value(found, tmp_path / "layers.png")
    above, below = figure.axes
    heights = [b.get_height() for b in above.containers[0]]
    np.testing.assert_allclose(heights, found.value_layer.mean("example"))
    np.testing.assert_allclose(
        [b.get_height() for b in below.containers[1]],
        found.query_layer.sel(component=["attn.0", "attn.1", "attn.2"]).mean("example"),
    )
    assert (tmp_path / "layers.png").stat().st_size > 1000
