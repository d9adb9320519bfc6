"""Features of a language model: what is read, written, detected and steered, against the same by hand."""

import math

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nissl.concepts import Features, SemiNMF, difference_in_means, plot_features, token_activations, train_sae
from nissl.errors import InputError, SiteError
from nissl.network import Add, LanguageModel, Pass

CONFIG = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip


class Words:
    """A tokenizer of words: word i is token i + 2; 0 begins a text, 1 pads."""

    all_special_ids = (0, 1)
    pad_token_id, eos_token_id = 1, None
    words = tuple(f"w{i}" for i in range(48))

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [self.words.index(w) + 2 for w in text.split()]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f" {self.words[i - 2]}" if i >= 2 else "<s>" * (not skip_special_tokens) for i in ids)


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LanguageModel(LlamaForCausalLM(CONFIG), Words())


TEXTS = ("w1 w2 w3 w4", "w5 w6", "w7 w8 w9 w10 w11", "w1 w9", "w20 w21 w22 w23")


@pytest.fixture(scope="module")
def activations(net):
    return token_activations(net, TEXTS, net.anatomy.site("neurons", 1))


def by_hand(net, text, layer=1):
    """Neurons of a text from the modules themselves."""
    block = net.module.model.layers[layer].mlp
    seen = []
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        net.module(torch.tensor([Words()(text)["input_ids"]]))
        handle.remove()
        x = seen[0][0]
        return torch.nn.functional.silu(block.gate_proj(x)) * block.up_proj(x)


def test_activations_are_those_of_each_text_by_itself(net, activations):
    assert len(activations) == 17
    assert activations.text.tolist() == [0] * 4 + [1] * 2 + [2] * 5 + [3] * 2 + [4] * 4
    assert activations.position.tolist() == [1, 2, 3, 4, 1, 2, 1, 2, 3, 4, 5, 1, 2, 1, 2, 3, 4]
    for i, text in enumerate(TEXTS):
        expected = by_hand(net, text)[1:].numpy()  # the begin of text does not count
        assert activations.values[activations.text == i] == pytest.approx(expected, abs=1e-5)


def test_the_first_token_is_left_out_where_nothing_begins_a_text(net):
    site = net.anatomy.site("neurons", 0)
    ids = [[3, 4, 5], [6, 7]]
    assert token_activations(net, ids, site).position.tolist() == [1, 2, 1]
    assert token_activations(net, ids, site, skip_first=False).position.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(InputError, match=r"texts \[1\] have no token that counts"):
        token_activations(net, [[3, 4], [6]], site)
    with pytest.raises(InputError, match="no text"):
        token_activations(net, [], site)
    with pytest.raises(SiteError):
        token_activations(net, ids, "model.layers.7.mlp")
    with pytest.raises(SiteError, match="no activation vector"):
        token_activations(net, ids, net.anatomy.site("pattern", 0))


def test_activations_can_lie_in_a_file(net, activations, tmp_path):
    kept = token_activations(net, TEXTS, activations.site, file=tmp_path / "a.bin")
    assert isinstance(kept.values, np.memmap)
    assert np.array_equal(kept.values, activations.values)
    assert (tmp_path / "a.bin").stat().st_size == 17 * 64 * 4
    few = {"sparsity": 0.1, "max_iter": 10, "progress": False}
    a, b = (SemiNMF(3, **few).fit(x.values) for x in (kept, activations))
    assert a.components_ == pytest.approx(b.components_, abs=1e-5)


def test_contexts_are_the_tokens_with_the_largest_weights(activations):
    weights = torch.zeros(17)
    weights[8], weights[0], weights[5] = 3.0, 2.0, -1.0
    found = activations.contexts(weights, window=2)
    assert [(c.weight, c.text, c.position, c.before, c.token, c.after) for c in found] == [
        (3.0, 2, 3, " w7 w8", " w9", " w10 w11"),
        (2.0, 0, 1, "<s>", " w1", " w2 w3"),
    ]
    assert str(found[0]) == "3   w7 w8[ w9] w10 w11"
    assert len(activations.contexts(torch.arange(1.0, 18.0), n=4)) == 4
    with pytest.raises(InputError, match="17 tokens"):
        activations.contexts(torch.ones(16))


def test_texts_are_summed_up_and_chosen(activations):
    weights = torch.arange(34.0).reshape(17, 2)
    mean, most = activations.by_text(weights), activations.by_text(weights, "max")
    for i in range(5):
        rows = weights[torch.from_numpy(activations.text == i)]
        assert torch.allclose(mean[i], rows.mean(0))
        assert torch.equal(most[i], rows.amax(0))
    assert torch.equal(activations.by_text(-weights - 1, "max")[1], -weights[4] - 1)  # no zero gets in
    some = activations.of([2, 0])
    assert some.ids == (activations.ids[2], activations.ids[0])
    assert some.text.tolist() == [0] * 5 + [1] * 4
    assert np.array_equal(some.values[:5], activations.values[6:11])
    with pytest.raises(InputError, match="numbered 0 to 4"):
        activations.of([5])


def test_detection_is_that_of_the_definition(net, activations):
    v = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    found = Features(net, 1, v).detection(TEXTS[:2], TEXTS[2:])
    largest = []
    for text in TEXTS:
        a = by_hand(net, text)[1:]
        largest.append((a @ v.T / a.norm(dim=1, keepdim=True) / v.norm(dim=1)).amax(0).double())
    largest = torch.stack(largest)
    positive, negative = largest[:2].mean(0), largest[2:].mean(0)
    assert torch.allclose(found.positive, positive, atol=1e-5)
    assert torch.allclose(found.negative, negative, atol=1e-5)
    usable = (positive > 0) & (negative > 0)
    assert usable.any()
    assert torch.allclose(found.score[usable], (positive / negative).log()[usable], atol=1e-4)
    assert found.score[~usable].isnan().all()
    auc = (largest[:2, None] > largest[None, 2:]).double().mean((0, 1))
    assert torch.equal(found.auc, auc)
    # the same from activations at hand
    again = Features(net, 1, v).detection(activations.of([0, 1]), activations.of([2, 3, 4]))
    assert torch.allclose(again.positive, found.positive, atol=1e-6)


def test_a_planted_feature_detects_and_is_told_by_its_mean(net, activations):
    a, b = activations.of([0, 1]), activations.of([2, 3, 4])
    v = difference_in_means(a, b)
    expected = a.values.mean(0) - b.values.mean(0)
    assert v.numpy() == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    with pytest.raises(InputError, match="same mean"):
        difference_in_means(a, a)
    with pytest.raises(InputError, match="64 and 3 units"):
        difference_in_means(a, np.ones((2, 3)))


MODELS = {
    "llama": (LlamaForCausalLM, CONFIG, 64),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0,
                                         eos_token_id=0), 128),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                               num_attention_heads=4, num_key_value_heads=2, head_dim=8), 64),
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_what_is_written_is_the_down_projection(family):
    cls, config, width = MODELS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = LanguageModel(cls(config))
    features = Features(net, 1, torch.randn(5, width, generator=torch.Generator().manual_seed(1)))
    assert torch.allclose(features.directions.norm(dim=1), torch.ones(5))
    written = features.directions @ net.weight("down", 1).T
    if family == "gemma2":  # a norm of its own stands behind it
        with torch.no_grad():
            written = net.module.model.layers[1].post_feedforward_layernorm(written)
    assert torch.allclose(features.written(), written, atol=1e-5)
    # adding it there is adding the direction to the neurons, where no norm stands between
    inputs = net.encode([[3, 4, 5]])
    steered = net.run(Pass(inputs, [features.edit(2, 1.5, -1)])).output
    by_neurons = net.run(Pass(inputs, [Add(net.anatomy.site("neurons", 1), -1.5 * features.directions[2])])).output
    assert torch.allclose(steered, by_neurons, atol=1e-5) == (family != "gemma2")
    assert not torch.allclose(steered, net.run(Pass(inputs)).output, atol=1e-3)


def test_the_vocabulary_is_that_of_the_final_norm_and_the_unembedding(net):
    features = Features(net, 0, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    for sign in (1, -1):
        v = sign * features.directions[1] @ net.weight("down", 0).T
        with torch.no_grad():
            logits = net.module.lm_head(net.module.model.norm(v / v.norm()))
        top = logits.topk(4)
        found = features.vocabulary(1, sign, 4)
        assert [t for t, _ in found] == net.strings(top.indices)
        assert [x for _, x in found] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert len(features.vocabulary(0)) == 50
    # at the residual stream, the direction itself
    v = torch.randn(32, generator=torch.Generator().manual_seed(2))
    at_stream = Features(net, 1, v, role="resid_post")
    with torch.no_grad():
        best = net.module.lm_head(net.module.model.norm(v)).argmax()
    assert at_stream.vocabulary(0, n=1)[0][0] == net.strings([int(best)])[0]


def test_steering_holds_to_the_divergence(net):
    features = Features(net, 1, torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
    for sign in (1, -1):
        edit, found = features.steer(0, 0.05, sign, prompts=["w1 w2 w3"])
        assert found.reachable
        p = net.run(Pass(net.encode("w1 w2 w3"))).output[0, -1].double().softmax(0)
        q = net.run(Pass(net.encode("w1 w2 w3"), [edit])).output[0, -1].double().softmax(0)
        assert float((p * (p / q).log()).sum()) == pytest.approx(0.05, rel=0.06)
        assert torch.allclose(edit.value, sign * found.alpha * features.written()[0])
    _, out = features.steer(0, 0.05, prompts=["w1"], high=0.01)
    assert not out.reachable
    # it holds in generation, at every new token
    edit, _ = features.steer(0, 2.0, prompts=["w1 w2 w3"])
    assert net.generate("w1 w2 w3", [edit], max_tokens=5) != net.generate("w1 w2 w3", max_tokens=5)


def test_all_dictionaries_serve(net, activations):
    few = {"progress": False}
    model = SemiNMF(3, sparsity=0.1, max_iter=20, **few).fit(activations.values)
    sae = train_sae(activations.values, 6, active=2, steps=5, **few)
    assert len(Features(net, 1, model)) == 3
    assert len(Features(net, 1, sae)) == 6
    assert len(Features(net, 1, model.components_[0])) == 1
    assert Features(net, 1, model).cosines(activations).shape == (17, 3)


def test_what_does_not_fit_is_refused(net, activations):
    with pytest.raises(InputError, match=r"has 64 units, directions of shape \(2, 32\)"):
        Features(net, 1, torch.ones(2, 32))
    with pytest.raises(InputError, match=r"directions \[1\] are zero"):
        Features(net, 1, torch.eye(64)[:2] * torch.tensor([[1.0], [0.0]]))
    with pytest.raises(InputError, match="zero or not finite"):
        Features(net, 1, torch.full((1, 64), math.nan))
    with pytest.raises(InputError, match="role must be one of"):
        Features(net, 1, torch.ones(64), role="pattern")
    with pytest.raises(SiteError, match="layers 0 to 1"):
        Features(net, 2, torch.ones(64))
    features = Features(net, 0, torch.ones(64))
    with pytest.raises(InputError, match="the features are directions at"):
        features.cosines(activations)
    for feature, sign, says in ((1, 1, "features are 0 to 0"), (0, 2, "sign must be")):
        with pytest.raises(InputError, match=says):
            features.edit(feature, 1.0, sign)


def test_the_picture_orders_texts_and_features():
    import matplotlib.pyplot as plt

    weights = np.zeros((6, 3))
    weights[[1, 3], 0] = 2.0  # feature 0 belongs to b, feature 2 to a
    weights[[0, 2], 2] = 1.0
    weights[[4, 5], 1] = 1.0
    ax = plot_features(weights, ["a", "b", "a", "b", "c", "c"], ["zero", "one", "two"], "t")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["two", "zero", "one"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    assert np.array_equal(ax.images[0].get_array(), np.kron(np.eye(3), np.ones(2)))
    plt.close(ax.figure)
    with pytest.raises(InputError, match="a group for each"):
        plot_features(weights, ["a"])


def test_a_feature_of_smollm2_tells_food_weather_and_code(smollm2):
    from nissl.studies.snmf import TOPICS

    texts = [t for name in ("weather", "code") for t in TOPICS[name][:12]]
    found = token_activations(smollm2, texts, smollm2.anatomy.site("neurons", 15))
    model = SemiNMF(8, sparsity=0.02, random_state=0, progress=False).fit(found.values)
    use = found.by_text(torch.from_numpy(model.weights_))
    code = use[12:, None] > use[None, :12]
    assert float(code.double().mean((0, 1)).max()) >= 0.9
