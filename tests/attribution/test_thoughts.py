"""Receiver heads and suppression against planted attention, formulas and computations by hand."""

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.stats import kurtosis
from test_resampling import LM_TRACE
from test_sentences import words
from transformers import LlamaConfig, LlamaForCausalLM

from nissl.attribution.resampling import Resampling
from nissl.attribution.sentences import Trace, exact
from nissl.attribution.thoughts import (
    AttentionSuppression,
    ReceiverHeads,
    ThoughtAnchors,
    ablate_heads,
    head_edits,
)
from nissl.errors import InputError
from nissl.network import LanguageModel, Pass
from nissl.runner import Runner

# ---------------------------------------------------------------- planted heads (check B)


def planted(seed=0, traces=8, layers=6, heads=8, n=30, share=0.3):
    """Causal attention that decays at random, and head (4, 2) that always looks at sentences 7 and 15."""
    rng = np.random.default_rng(seed)
    apart = np.subtract.outer(np.arange(n), np.arange(n))
    found = []
    for _ in range(traces):
        rate = rng.uniform(0.1, 1, (layers, heads, 1, 1))
        a = np.where(apart >= 0, np.exp(-rate * apart), 0) * rng.lognormal(0, 0.3, (layers, heads, n, n))
        a /= a.sum(-1, keepdims=True)
        for j in (7, 15):
            a[4, 2, j + 1 :] *= 1 - share / 2
            a[4, 2, j + 1 :, j] += share / 2
        found.append(a)
    return found


def test_the_planted_head_and_its_sentences_are_found():
    found = ReceiverHeads(k=1).fit(planted())
    assert found.heads == ((4, 2),)
    assert found.kurtosis.dims == ("layer", "head")
    assert np.isnan(found.kurtosis[0]).all()
    for scores in found.scores:
        assert set(np.argsort(np.where(np.isnan(scores), -1, scores))[-2:]) == {7, 15}
        assert np.isnan(scores[-4:]).all()
        assert np.isfinite(scores[:-4]).all()
    ordered = np.sort(found.kurtosis.to_numpy()[1:].ravel())
    gap = ordered[-1] - ordered[-2]
    near = np.sort(ReceiverHeads(k=1, min_distance=0).fit(planted()).kurtosis.to_numpy()[1:].ravel())
    assert gap > near[-1] - near[-2]


def test_a_model_without_receiver_head_has_none_that_stands_out():
    with_head, without = (ReceiverHeads(k=1).fit(planted(share=s)).kurtosis.to_numpy()[1:] for s in (0.3, 0.0))
    assert np.argmax(without) != 3 * 8 + 2 or without.max() < 0.5 * with_head.max()


@pytest.mark.parametrize("min_distance", [0, 1, 4])
def test_vertical_scores_and_kurtosis_by_hand(min_distance):
    rng = np.random.default_rng(1)
    blocks = [rng.random((3, 2, n, n)) for n in (12, 9)]
    method = ReceiverHeads(k=3, min_distance=min_distance, skip=1)
    found = method.fit(blocks)
    far = max(min_distance, 1)
    expected = np.full((2, 3, 2), np.nan)
    for t, b in enumerate(blocks):
        n = b.shape[-1]
        for layer in range(3):
            for h in range(2):
                v = [np.mean([b[layer, h, q, j] for q in range(j + far, n)]) for j in range(n - far)]
                assert np.allclose(method.vertical(b)[layer, h, : n - far], v)
                expected[t, layer, h] = kurtosis(v)
    assert np.allclose(found.kurtosis[1:], expected.mean(0)[1:])
    order = np.argsort(-expected.mean(0)[1:].ravel())[:3]
    assert found.heads == tuple((int(i) // 2 + 1, int(i) % 2) for i in order)
    own = np.mean([method.vertical(blocks[0])[i, j] for i, j in found.heads], 0)
    assert np.allclose(found.scores[0], own, equal_nan=True)


def test_depth_is_controlled_by_ranks_within_each_row():
    rng = np.random.default_rng(2)
    a = rng.random((6, 6))
    method = ReceiverHeads(min_distance=1, control_depth=True)
    ranks = np.full((6, 6), np.nan)
    for q in range(1, 6):
        ranks[q, :q] = (np.argsort(np.argsort(a[q, :q])) + 1) / q
    assert np.allclose(method.vertical(a)[:5], np.nanmean(ranks[:, :5], 0))
    assert np.allclose(method.vertical(a * np.arange(1, 7)[:, None])[:5], method.vertical(a)[:5])


def test_reliability_is_the_correlation_of_even_and_odd_traces():
    blocks = planted(traces=4)
    each = [ReceiverHeads(k=1, skip=0).fit([b]).kurtosis.to_numpy() for b in blocks]
    expected = np.corrcoef((each[0] + each[2]).ravel(), (each[1] + each[3]).ravel())[0, 1]
    found = ReceiverHeads(k=1, skip=0).fit(blocks)
    assert found.reliability == pytest.approx(expected)
    assert np.isnan(ReceiverHeads(k=1).fit(blocks[:1]).reliability)


def test_constant_attention_has_no_kurtosis_and_wrong_blocks_are_refused():
    flat = np.tril(np.ones((2, 2, 8, 8)))
    flat[1, 0] = np.random.default_rng(0).random((8, 8))
    found = ReceiverHeads(k=20).fit([flat])
    assert found.heads == ((1, 0),)
    assert np.isnan(found.kurtosis[1, 1])
    with pytest.raises(InputError, match="at least 3 are needed"):
        ReceiverHeads().fit([flat[..., :6, :6]])
    with pytest.raises(InputError, match="of one model"):
        ReceiverHeads().fit([flat, flat[:1]])
    with pytest.raises(InputError, match="no head is left"):
        ReceiverHeads(skip=2).fit([flat])
    with pytest.raises(InputError, match="finite"):
        ReceiverHeads().fit([flat[..., :4]])
    with pytest.raises(InputError, match="k must be"):
        ReceiverHeads(k=0)


# ---------------------------------------------------------------- a small model


VOCABULARY = ["Q", "one", "two", "three", "is", "answer", ".", "4", "7", "so", "we", "go"]
LONG = Trace.of(
    "one is two . so we go on . two is three . so we go . three is 4 . so answer is 4 .", prompt="Q so ", shortest=5
)


@pytest.fixture(scope="module")
def network():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=16, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return LanguageModel(LlamaForCausalLM(config).eval(), words(VOCABULARY))


def test_blocks_are_the_mean_attention_between_sentences(network):
    tokens = LONG.tokens(network.tokenizer)
    with torch.no_grad():
        network.module.set_attn_implementation("eager")
        patterns = network.module(torch.tensor([tokens.ids]), output_attentions=True).attentions
        network.module.set_attn_implementation("sdpa")
    expected = np.array(
        [
            [[[p[0, h, a:b, c:d].mean().item() for c, d in tokens.spans] for a, b in tokens.spans] for h in range(4)]
            for p in patterns
        ]
    )
    for memory in (1, 2**28):  # a layer at a time, and all at once
        runner = Runner(progress=False)
        found = ReceiverHeads(memory=memory).blocks(network, LONG, runner)
        assert np.allclose(found, expected, atol=1e-6)
        assert runner.cost("receiver heads").forward == (3 if memory == 1 else 1)


def by_hand(network, trace, temperature=1.0):
    """KL at each token from plain forward passes with an own attention mask in every layer."""
    tokens = trace.tokens(network.tokenizer)
    n = len(tokens.ids)
    found = []
    with torch.no_grad():

        def logits(hidden):
            mask = torch.full((n, n), float("-inf")).triu(1)
            mask[:, hidden] = float("-inf")
            out = network.module(torch.tensor([tokens.ids]), attention_mask=mask[None, None]).logits[0] / temperature
            return out.log_softmax(-1)

        base = logits([])
        for a, b in tokens.spans:
            other = logits(list(range(max(a, 1), b)))
            found.append((base.exp() * (base - other)).sum(-1).numpy())
    return tokens, np.array(found)


@pytest.mark.parametrize(
    "trace", [LONG, Trace(LONG.prompt[:0], LONG.text, LONG.sentences)], ids=["prompt", "no prompt"]
)
def test_suppression_against_masks_by_hand(network, trace):
    tokens, kl = by_hand(network, trace, 0.6)
    found = AttentionSuppression().matrix(network, trace, Runner(progress=False))
    assert found.dims == ("source", "target")
    n = len(trace)
    for s in range(n):
        for r in range(n):
            if r <= s:
                assert np.isnan(found[s, r])
            else:
                a, b = tokens.spans[r]
                assert float(found[s, r]) == pytest.approx(np.log(kl[s, a:b] + 1e-9).mean(), abs=2e-2)
    assert float(found.max()) > -5  # hiding does something here


def test_predictions_of_a_sentence_are_made_one_token_earlier(network):
    tokens, kl = by_hand(network, LONG)
    found = AttentionSuppression(temperature=1.0, predictions="of").matrix(network, LONG, Runner(progress=False))
    a, b = tokens.spans[4]
    assert float(found[1, 4]) == pytest.approx(np.log(kl[1, a - 1 : b - 1] + 1e-9).mean(), abs=2e-2)


@pytest.mark.parametrize("batch", [None, 1, 3])
def test_what_comes_before_a_hidden_sentence_differs_by_exactly_nothing(network, batch):
    tokens = LONG.tokens(network.tokenizer)
    method = AttentionSuppression()
    (result,) = [r for _, r in _drive(network, method.divergences(network, tokens), batch)]
    assert result.shape == (6, len(tokens.ids) - 1)  # from the last token of the prompt
    for row, (a, _) in zip(result, tokens.spans, strict=True):
        assert (row[: a - 1] == 0).all()
        assert (row[a - 1 :] > 0).any() or a == tokens.spans[-1][0]


def _drive(network, generator, batch):
    from nissl.runner import Job

    return list(Runner(batch, progress=False, memory=0).drive([Job("x", 0, network, lambda: generator)]))


def test_only_likely_tokens_are_compared_where_wanted():
    torch.manual_seed(0)
    p, q = torch.randn(2, 5, 40) * 3
    everything = AttentionSuppression()._kl(p, q)
    assert torch.allclose(AttentionSuppression(top_p=1.0)._kl(p, q), everything, atol=1e-5)
    few = AttentionSuppression(top_p=0.9, most=3)
    found = few._kl(p, q)
    for t in range(5):
        tops = [set(), set()]
        for side, x in zip(tops, (p[t], q[t]), strict=True):
            total = 0.0
            for i in x.argsort(descending=True)[:3]:
                if total >= 0.9:
                    break
                side.add(int(i))
                total += float(x.softmax(-1)[i])
        union = sorted(tops[0] | tops[1])
        a, b = (
            torch.tensor([float(x[i]) if i in side else -1e9 for i in union]).log_softmax(-1)
            for side, x in zip(tops, (p[t], q[t]), strict=True)
        )
        assert float(found[t]) == pytest.approx(float((a.exp() * (a - b)).sum()), rel=1e-4)


def test_centring_takes_out_each_targets_mean():
    matrix = xr.DataArray([[np.nan, 1.0, 2.0], [np.nan, np.nan, 6.0], [np.nan] * 3], dims=("source", "target"))
    found = AttentionSuppression.centred(matrix)
    assert found.sel(target=2).to_numpy()[:2].tolist() == [-2, 2]
    assert found.sel(target=1).to_numpy()[0] == 0


def test_wrong_parameters_are_named():
    for wrong in ({"temperature": 0.0}, {"epsilon": -1.0}, {"top_p": 2.0}, {"most": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AttentionSuppression(**wrong)


# ---------------------------------------------------------------- switching heads off


def test_heads_are_switched_off_before_the_output_projection(network):
    inputs = network.encode([LONG.tokens(network.tokenizer).ids], keep=0)
    off = network.run(Pass(inputs, head_edits(network, [(1, 2), (1, 0), (2, 3)]))).output
    changed = {}
    for layer, heads in ((1, (0, 2)), (2, (3,))):
        w = network.weight("o", layer).clone()
        for h in heads:
            w[:, network.anatomy.head(h)] = 0
        changed["o", layer] = w
    assert torch.allclose(off, network.rewritten(changed).run(Pass(inputs)).output, atol=1e-5)
    with pytest.raises(InputError, match="heads 0 to 3"):
        head_edits(network, [(0, 4)])


def test_controls_are_others_of_the_same_layers(network):
    asked = []

    def score(edits):
        asked.append(edits)
        return len(edits)

    found = ablate_heads(network, [(1, 2), (1, 0), (2, 3)], score, controls=4, seed=1)
    assert list(found.index) == ["none", "heads", *(f"control {i}" for i in range(4))]
    assert found["score"].tolist() == [0, 2, 2, 2, 2, 2]
    for off in found["heads"].iloc[2:]:
        assert [layer for layer, _ in off] == [1, 1, 2]
        assert {h for layer, h in off if layer == 1} == {1, 3}
        assert not set(off) & {(1, 2), (1, 0), (2, 3)}
    with pytest.raises(InputError, match="take fewer heads"):
        ablate_heads(network, [(1, 0), (1, 1), (1, 2)], score)


# ---------------------------------------------------------------- together


def test_all_methods_on_one_trace(network):
    method = ThoughtAnchors(
        resampling=Resampling(samples=6, max_tokens=8, embed=exact, temperature=1.0, resamples=10),
        receivers=ReceiverHeads(k=2, min_distance=2),
        force="answer is ",
    )
    runner = Runner(progress=False)
    found = method.analyse(network, LONG, gold="4", runner=runner)
    assert list(found.table["text"]) == [s.text for s in LONG.sentences]
    assert found.table["tag"].iloc[-1] == "final answer"
    assert set(found.matrices) == {"moves", "suppression"}
    assert found.received is not None
    suppressed = found.matrices["suppression"].mean("target", skipna=True).to_numpy()
    assert np.allclose(found.table["suppression"], suppressed, equal_nan=True)
    assert np.allclose(found.table["receiver"], found.received.scores[0], equal_nan=True)
    assert found.meta["forward_passes"] == sum(c.forward for c in runner.costs.values())
    assert found.meta["fingerprint"] == network.fingerprint()
    best = found.anchors(2, by="suppression")
    assert list(best.index) == list(np.argsort(-np.nan_to_num(suppressed, nan=-np.inf))[:2])
    with pytest.raises(InputError, match="no column 'x'"):
        found.anchors(by="x")
    again = method.analyse(network, LONG, heads=found.received, runner=Runner(progress=False))
    assert again.table["receiver"].equals(found.table["receiver"])


def test_parts_can_be_left_out_and_labels_must_fit(network):
    only = ThoughtAnchors(resampling=None, receivers=None).analyse(network, LM_TRACE)
    assert list(only.table.columns) == ["text", "tag", "suppression"]
    black = ThoughtAnchors(resampling=Resampling(samples=2, embed=exact)).analyse(
        lambda p, n: ["so we go ."] * n, LM_TRACE
    )
    assert set(black.matrices) == {"moves"}
    with pytest.raises(InputError, match="one tag a sentence, 2; it gave 1"):
        ThoughtAnchors(label=lambda s: ["x"]).analyse(network, LM_TRACE)
    with pytest.raises(InputError, match="label= failed"):
        ThoughtAnchors(label=lambda s: 1 / 0).analyse(network, LM_TRACE)  # type: ignore


# ---------------------------------------------------------------- the packaged model


@pytest.mark.slow
def test_hiding_a_code_word_moves_its_repetition_most(smollm2):
    from nissl.studies.thought_anchors import _CODE

    trace = Trace.of("".join(_CODE[0]).format(word="Zanzibar"), prompt="Here is a short story. ")
    tokens = trace.tokens(smollm2.tokenizer)
    assert smollm2.decode(tokens.ids[slice(*tokens.spans[3])]).strip() == trace.sentences[3].text
    method = AttentionSuppression()
    row = method.centred(method.matrix(smollm2, trace, Runner(progress=False))).sel(target=8).to_numpy()
    assert np.nanargmax(row) == 3
