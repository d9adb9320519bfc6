"""Tokens by hand, the network against itself where it must not differ, codes against counting, circuits that are set by hand."""

import warnings
from math import log

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks
from torch import nn

import nissl
from nissl.attribution import IntegratedGradients
from nissl.errors import InputError
from nissl.recordings.spikes import (
    Neuroformer,
    NeuroformerDecoder,
    SpikeTokenizer,
    Stream,
    contrastive_loss,
    plot_connectivity,
    spike_agreement,
    spike_table,
)
from nissl.recordings.spikes.neuroformer import nucleus
from nissl.recordings.training import train
from nissl.seeds import seeded

TINY = {"n_features": 16, "n_heads": 2, "n_state": 1, "n_history": 2, "n_stimulus": 1, "n_behaviour": 1, "dropout": 0.0}


def counts(n_bins=40, n_neurons=5, seed=0, rate=0.4):
    return np.random.default_rng(seed).poisson(rate, (n_bins, n_neurons))


def network(tokenizer, seed=0, scale=10.0, **settings):
    """With weights ten times as large as at the start, so that what should matter does."""
    with seeded(seed):
        model = Neuroformer(tokenizer, **(TINY | settings))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
                p.mul_(scale if p.ndim > 1 else 1.0)
    return model.eval()


# ---------------------------------------------------------------- tokens


def test_tokens_by_hand():
    t = SpikeTokenizer(3, window=2, past=3, block=7, past_block=5)
    X = np.array([[1, 0, 2], [0, 1, 0], [0, 0, 0], [0, 0, 0], [2, 2, 1]])
    w = t.windows(X)
    sos, eos, pad = 3, 4, 5
    assert (t.sos, t.eos, t.pad, t.n_ids) == (sos, eos, pad, 6)
    assert (t.time_eos, t.time_pad, t.n_times) == (3, 4, 5)
    assert w.ids.tolist() == [
        [sos, 0, 2, 2, 1, eos, pad],
        [sos, eos, pad, pad, pad, pad, pad],
        [sos, 0, 0, 1, 1, 2, eos],
    ]
    assert w.times.tolist() == [[0, 0, 0, 0, 1, 3, 4], [0, 3, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 3]]
    # three bins before: bins -1 to 1, of which three of four spikes are kept, and bins 1 to 3
    assert w.past_ids.tolist() == [[sos, eos, pad, pad, pad], [sos, 2, 2, 1, eos], [sos, 1, eos, pad, pad]]
    assert w.past_times.tolist() == [[0, 3, 4, 4, 4], [0, 1, 1, 2, 3], [0, 0, 3, 4, 4]]
    assert w.first.tolist() == [0, 2, 4]
    assert w.length.tolist() == [2, 2, 1]
    assert w.cut.tolist() == [[0, 0], [0, 1], [0, 0]]


@pytest.mark.parametrize("window", [1, 3, 5])
def test_tokens_are_the_counts_they_are_made_of(window):
    X = counts(33)
    t = SpikeTokenizer(5, window, past=4)
    w = t.windows(X)
    back = t.decode(w.ids, w.times)
    for i, a in enumerate(w.first):
        np.testing.assert_array_equal(back[i][: w.length[i]], X[a : a + w.length[i]])
        past = t.decode(w.past_ids[i : i + 1], w.past_times[i : i + 1], 4)[0]
        wanted = np.concatenate([np.zeros((4, 5)), X])[a : a + 4]
        np.testing.assert_array_equal(past, wanted)
    whole = w[w.length == window]
    ids, times, cut = t.encode(back[w.length == window])
    assert not cut.any()
    assert torch.equal(ids, whole.ids[:, : ids.shape[1]])
    assert torch.equal(times, whole.times[:, : ids.shape[1]])


def test_no_window_crosses_the_border_of_a_trial():
    X, groups = counts(20), np.repeat([7, 3, 7], [9, 4, 7])
    t = SpikeTokenizer(5, 3, 4)
    w = t.windows(X, groups)
    parts = [t.windows(X[a:b]) for a, b in ((0, 9), (9, 13), (13, 20))]
    assert w.first.tolist() == [0, 3, 6, 9, 12, 13, 16, 19]
    assert w.trial.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    for name in ("ids", "past_ids"):
        rows = [r[r != t.pad].tolist() for r in getattr(w, name)]
        assert rows == [r[r != t.pad].tolist() for p in parts for r in getattr(p, name)]


def test_samples_of_a_stream_are_older_than_the_end_of_the_window():
    values = np.arange(10.0)[:, None]
    every_second = Stream(values, last=3, times=2 * np.arange(10))
    assert every_second.before(np.array([1.0, 2.0, 2.5, 9.0]))[..., 0].tolist() == [
        [0, 0, 0],
        [0, 0, 0],
        [0, 0, 1],
        [2, 3, 4],
    ]
    assert Stream(values, 2, lag=3).before(np.array([6.0]))[..., 0].tolist() == [[1, 2]]
    w = SpikeTokenizer(5, 4).windows(counts(8), streams={"a": Stream(values, 2), "film": Stream(np.zeros((8, 6, 7)))})
    assert w.streams["a"][..., 0].tolist() == [[2, 3], [6, 7]]
    assert w.streams["film"].shape == (2, 1, 6, 7)
    assert w[1:].streams["a"][..., 0].tolist() == [[6, 7]]
    with pytest.raises(InputError, match="no sample before bin 4"):
        SpikeTokenizer(5, 4).windows(counts(8), streams={"a": Stream(values, times=4 + np.arange(10))})


# ---------------------------------------------------------------- the network


def test_the_published_size():
    model = Neuroformer(SpikeTokenizer(2023), streams={"frames": (3, 30, 40), "behaviour": (1, 3)})
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(28.2, abs=0.3)


def test_more_padding_changes_nothing():
    t = SpikeTokenizer(5, 2, 2)
    w = t.windows(counts(24), streams={"a": Stream(np.random.default_rng(0).normal(size=(24, 2)), 3)})
    model = network(t, streams={"a": (3, 2)}, heads={"y": 2}, align=("spikes", "a"))
    wide = nn.functional.pad
    more = {
        "ids": wide(w.ids, (0, 6), value=t.pad), "times": wide(w.times, (0, 6), value=t.time_pad),
        "past_ids": wide(w.past_ids, (0, 9), value=t.pad), "past_times": wide(w.past_times, (0, 9), value=t.time_pad),
    } | w.streams  # fmt: skip
    a, b = model(**w.inputs), model(**more)
    n = w.ids.shape[1]
    spoken = t.spoken(w.ids)
    torch.testing.assert_close(a.ids[spoken], b.ids[:, :n][spoken])
    torch.testing.assert_close(a.behaviour["y"], b.behaviour["y"])
    torch.testing.assert_close(a.pooled["spikes"], b.pooled["spikes"])
    y = {"y": torch.randn(12, 2)}
    for name, value in model.loss(w.inputs, y).items():
        torch.testing.assert_close(value, model.loss(more, y)[name])


def test_spikes_to_come_are_not_seen_and_those_before_are():
    t = SpikeTokenizer(5, 2, 2)
    w = t.windows(counts(24, rate=0.8))[5:6]
    model = network(t)
    out = model(**w.inputs).ids
    for s in range(1, w.ids.shape[1] - 1):
        other = w.ids.clone()
        other[0, s] = (other[0, s] + 1) % 5
        changed = model(**(w.inputs | {"ids": other})).ids
        torch.testing.assert_close(out[:, :s], changed[:, :s])
        assert (out[:, s:] - changed[:, s:]).abs().max() > 1e-3
    for key, by in (("past_ids", 1), ("past_times", 1)):
        past = w.inputs[key].clone()
        past[0, 1] = (past[0, 1] + by) % (5 if key == "past_ids" else 2)
        assert (out - model(**(w.inputs | {key: past})).ids).abs().max() > 1e-3
    later = w.times.clone()
    later[0, 1] = 1 - later[0, 1]
    assert (out - model(**(w.inputs | {"times": later})).ids)[:, 1:].abs().max() > 1e-3


def test_streams_matter_and_may_be_absent():
    t = SpikeTokenizer(5, 2, 2)
    g = np.random.default_rng(0)
    w = t.windows(
        counts(24), streams={"a": Stream(g.normal(size=(24, 2)), 3), "film": Stream(g.normal(size=(24, 6, 7)), 4)}
    )
    model = network(t, streams={"film": (4, 6, 7), "a": (3, 2)}, heads={"y": 1}, kernel=(2, 3, 3))
    out = model(**w.inputs)
    assert set(out.pooled) == {"spikes", "a", "film"}
    for name in ("a", "film"):
        without = {k: v for k, v in w.inputs.items() if k != name}
        assert (model(**without).ids - out.ids).abs().max() > 1e-3
        for axis in range(1, w.streams[name].ndim):  # each code of place: the order of samples, variables, rows matters
            flipped = w.inputs | {name: w.streams[name].flip(axis)}
            assert (model(**flipped).ids - out.ids).abs().max() > 1e-4, (name, axis)
    with pytest.raises(InputError, match="no stream 'b'"):
        model(**w.inputs, b=torch.zeros(12, 1, 1))


def test_losses_by_hand():
    t = SpikeTokenizer(4, 2, 2)
    w = t.windows(counts(16, 4), streams={"a": Stream(np.random.default_rng(0).normal(size=(16, 1)))})
    y, c = torch.randn(8), torch.randint(3, (8,), generator=torch.Generator().manual_seed(0))
    model = network(t, streams={"a": (1, 1)}, heads={"y": 1, "c": 3}, align=("spikes", "a"), temperature=0.3)
    found = model.loss(w.inputs, {"y": y, "c": c})
    found = {k: v.detach() for k, v in found.items()}
    cut = w.inputs | {"ids": w.ids[:, :-1], "times": w.times[:, :-1]}
    with torch.no_grad():
        out = model(**cut)
    ids = times = 0.0
    n = 0
    for i in range(8):
        for s in range(w.ids.shape[1] - 1):
            if w.ids[i, s + 1] != t.pad:
                ids -= float(out.ids[i, s].log_softmax(0)[w.ids[i, s + 1]])
                times -= float(out.times[i, s].log_softmax(0)[w.times[i, s + 1]])
                n += 1
    assert float(found["id"]) == pytest.approx(0.75 * 0.6 * ids / n, rel=1e-4)
    assert float(found["time"]) == pytest.approx(0.75 * 0.4 * times / n, rel=1e-4)
    assert float(found["y"]) == pytest.approx(float((out.behaviour["y"][:, 0] - y).square().mean()), rel=1e-4)
    assert float(found["c"]) == pytest.approx(
        -float(out.behaviour["c"].log_softmax(1)[torch.arange(8), c].mean()), rel=1e-4
    )
    a, b = (
        nn.functional.normalize(out.pooled[k] @ model.project.weight.T, dim=1).detach().numpy() for k in ("spikes", "a")
    )
    s = a @ b.T / 0.3
    wanted = np.mean([-s[i, i] + np.log(np.exp(s[i]).sum()) for i in range(8)])
    assert float(found["contrast"]) == pytest.approx(wanted / 4, rel=1e-4)
    alone = network(t, streams={"a": (1, 1)}).loss(w.inputs)
    assert set(alone) == {"id", "time"}


def test_contrast_is_zero_for_pairs_far_apart_and_log_n_for_equal_rows():
    assert float(contrastive_loss(torch.eye(6), torch.eye(6), 0.01)) == pytest.approx(0, abs=1e-5)
    assert float(contrastive_loss(torch.ones(6, 3), torch.ones(6, 3))) == pytest.approx(log(6), abs=1e-5)


def test_codes_sum_to_one_over_all_sentences():
    """Of the windows that a block can hold, two neurons in two bins, up to two spikes: the probabilities of all token lists sum to 1."""
    t = SpikeTokenizer(2, 2, 1)
    model = network(t, scale=3.0)
    with torch.no_grad():  # SOS and PAD are never written
        nn.init.zeros_(model.norm.weight)
        nn.init.ones_(model.norm.bias)
        model.id_head.weight[[t.sos, t.pad]] = -100.0 / 16
    past = t.encode(np.array([[[1, 0]]]), past=True)[:2]

    def probability(tokens):
        ids = torch.tensor([[t.sos, *(k for k, _ in tokens), t.eos]])
        times = torch.tensor([[0, *(b for _, b in tokens), t.time_eos]])
        with torch.no_grad():
            inputs = {"ids": ids, "times": times, "past_ids": past[0], "past_times": past[1]}
            return float(torch.exp(sum(model._log_probabilities(inputs)).sum()))

    words = [(k, b) for k in range(2) for b in range(2)]
    none, one, two = (
        probability(()),
        sum(probability((a,)) for a in words),
        sum(probability((a, b)) for a in words for b in words),
    )
    # the logits are the same everywhere, so that the number of spikes is geometric
    assert one == pytest.approx(none * (1 - none), rel=1e-4)
    assert two == pytest.approx(none * (1 - none) ** 2, rel=1e-4)
    w = t.windows(np.array([[1, 0], [0, 1], [0, 0], [0, 0]]))
    assert model.nats(w)[1] == pytest.approx(-log(none), rel=1e-4)


def test_nothing_is_drawn_outside_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(20_000, 1)[:, [2, 0, 3, 1]]
    for top_p, wanted in ((1.0, [0.15, 0.5, 0.05, 0.3]), (0.79, [0, 0.625, 0, 0.375]), (0.85, [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
                          (0.1, [0, 1, 0, 0])):  # fmt: skip
        drawn = nucleus(logits, top_p, torch.Generator().manual_seed(0))
        share = np.bincount(drawn.numpy(), minlength=4) / 20_000
        np.testing.assert_allclose(share, wanted, atol=0.015)
        assert (share[np.array(wanted) == 0] == 0).all()


# ---------------------------------------------------------------- a circuit that is set by hand


class Follower(Neuroformer):
    """Writes 0 with probability .8 if 1 was there before and with .1 if not; then 1 in half of the windows."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, **TINY)
        self.id_head, self.time_head = nn.Identity(), nn.Linear(5, 3, bias=False)

    def _contexts(self, past_ids, past_times, streams):
        return [(self.history, past_ids, None)], {}

    def _encoded(self, ids, times):
        return ids[..., None]

    def _fused(self, x, contexts):
        before, ids = contexts[0][1], x[..., 0]
        p = torch.where((before == 1).any(1), 0.8, 0.1)[:, None]
        p = torch.where(ids == self.tokenizer.sos, p, 0.0)
        q = torch.where(ids == 1, 0.0, (1 - p) / 2)
        zero = torch.zeros_like(p)
        return torch.stack([p, q, zero, 1 - p - q, zero], -1).log().clamp(min=-200)


def test_taking_a_source_out_costs_what_it_costs():
    t = SpikeTokenizer(2, 1, 1)
    X = np.array([[0, 1], [1, 1], [1, 0], [0, 1], [0, 0], [1, 1]])
    w = t.windows(X)
    A = Follower(t).eval().connectivity(w)
    assert A.dims == ("target", "source")
    assert float(A[0, 1]) == pytest.approx(log(0.8 / 0.1), rel=1e-5)
    # neuron 1 before neuron 1: in window 1 after a 0 of this window, which tells all; nowhere else
    assert float(A[1, 1]) == pytest.approx(0, abs=1e-6)
    assert float(A[0, 0]) == pytest.approx(0, abs=1e-6)  # window 2: 0 and 1 before; without 0 the 1 is still there
    assert float(A[1, 0]) == pytest.approx(0, abs=1e-6)  # window 3: only 0 before, which says nothing
    never = Follower(t).eval().connectivity(w[:1])
    assert np.isnan(never).all()


def test_dropping_a_source_is_as_if_it_had_never_fired():
    t = SpikeTokenizer(4, 2, 2)
    X = counts(20, 4, rate=0.7)
    w, model = t.windows(X), network(t)
    A, n = np.zeros((4, 4)), np.zeros((4, 4))
    for i in range(len(w)):
        one = w[i : i + 1]
        with torch.no_grad():
            whole = model._log_probabilities(one.inputs)[0][0]
        past = t.decode(one.past_ids, one.past_times, 2)
        for source in np.flatnonzero(past.any((0, 1))):
            without = past.copy()
            without[:, :, source] = 0
            ids, times, _ = t.encode(without, past=True)
            with torch.no_grad():
                fall = whole - model._log_probabilities(one.inputs | {"past_ids": ids, "past_times": times})[0][0]
            for k, target in enumerate(one.ids[0, 1:].tolist()):
                if target < 4:
                    A[target, source] += float(fall[k])
                    n[target, source] += 1
    found = model.connectivity(w, batch_size=3)
    np.testing.assert_allclose(found, A / n, atol=1e-5)
    assert np.abs(A).max() > 1e-3


def test_attention_is_shared_out_by_pairs():
    t = SpikeTokenizer(4, 2, 2)
    w, model = t.windows(counts(20, 4, rate=0.7)), network(t)
    A, n, over = np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4))
    with torch.no_grad():
        for i in range(len(w)):
            one = w[i : i + 1].inputs
            ids, past = one["ids"][0], one["past_ids"][0]
            there = past != t.pad
            tokens = (
                model.id_code(past)
                + model.past_place[: len(past)]
                + model.time_code(one["past_times"][0][:, None].float())
            )[there]
            x = model._encoded(one["ids"][:, :-1], one["times"][:, :-1])
            maps = []
            for block in model.history:
                a = block.attention(x, tokens[None])[0].max(0).values
                maps.append(a / a.sum(1, keepdim=True))
                x = block(x, tokens[None])
            rollout = maps[0] / 2 + maps[1] / 2
            for s, target in enumerate(ids[1:].tolist()):
                for j, source in enumerate(past[there].tolist()):
                    if target < 4 and source < 4:
                        A[target, source] += float(rollout[s, j])
                        over[target, source] += float(rollout[s, j]) * int(there.sum())
                        n[target, source] += 1
    np.testing.assert_allclose(model.connectivity(w, "raw attention", batch_size=3), A / n, atol=1e-5)
    np.testing.assert_allclose(model.connectivity(w, "attention", batch_size=3), over / n, atol=1e-4)
    with torch.no_grad():
        for block in model.history:
            block.query.weight.zero_()
            block.query.bias.zero_()
    np.testing.assert_allclose(model.connectivity(w, "attention"), 1, atol=1e-5)  # even attention shows nothing
    assert np.ptp(model.connectivity(w, "raw attention").values) > 0.02
    without = network(t, n_history=0)
    with pytest.raises(InputError, match="n_history"):
        without.connectivity(w, "attention")


def test_what_is_generated_follows_what_was_generated():
    t = SpikeTokenizer(2, 1, 1)
    model = Follower(t)
    w = t.windows(np.zeros((60, 2)), np.repeat([0, 1], 30))
    found = model.generate(w, samples=30, top_p=1.0)
    assert found.shape == (30, 60, 1, 2)
    assert found.max() == 1
    chains = found[:, :, 0].reshape(30, 2, 30, 2)
    before, now = chains[:, :, :-1, 1] == 1, chains[:, :, 1:, 0]
    assert now[before].mean() == pytest.approx(0.8, abs=0.05)
    assert now[~before].mean() == pytest.approx(0.1, abs=0.04)
    assert not model.training or model.train(False)
    np.testing.assert_array_equal(found, model.generate(w, samples=30, top_p=1.0))
    assert not np.array_equal(found, model.generate(w, samples=30, top_p=1.0, seed=1))
    # a real past that is empty all the time
    assert model.generate(w, samples=30, top_p=1.0, true_past=True)[..., 0].mean() == pytest.approx(0.1, abs=0.04)
    # the first window is told of what was there
    told = t.windows(np.tile([[0, 1]], (3, 1)))[1:2]
    assert model.generate(told, samples=3000, top_p=1.0)[..., 0].mean() == pytest.approx(0.8, abs=0.06)
    table = spike_table(found, w)
    assert len(table) == found.sum()
    row = table.iloc[7]
    assert found[row["sample"], row["window"], 0, row["neuron"]] == 1
    assert set(table["trial"]) == {0, 1}
    with pytest.raises(InputError, match="follow one another"):
        model.generate(w[::2])


def test_windows_of_several_bins_are_told_of_the_bins_before():
    t = SpikeTokenizer(3, window=2, past=3, block=12)
    w, model = t.windows(counts(13, 3), np.repeat([0, 1], [8, 5])), network(t, scale=4.0)
    seen = []
    real = model._sampled

    def spied(inputs, length, *rest):
        seen.append((t.decode(inputs["past_ids"], inputs["past_times"], 3), length))
        return real(inputs, length, *rest)

    model._sampled = spied
    found = model.generate(w, samples=2)
    first = np.concatenate([np.zeros((2, 3, 3), int), found[:, :4].reshape(2, 8, 3)], 1)
    for k, (past, length) in enumerate(seen):
        rows = past.reshape(2, -1, 3, 3)
        np.testing.assert_array_equal(rows[:, 0], first[:, 2 * k : 2 * k + 3])
        assert length.tolist() == [[2, 2] * 2, [2, 2] * 2, [2, 1] * 2, [2] * 2][k]
    assert not found[:, w.length == 1, 1].any()
    assert found.sum(-1).max() > 0


def test_agreement_by_hand():
    true = np.array([[[1, 0, 2]], [[0, 0, 0]], [[0, 1, 0]], [[0, 0, 0]]])
    made = np.array([[[1, 1, 0]], [[0, 0, 0]], [[0, 0, 0]], [[0, 1, 0]]])
    found = spike_agreement(true, made)
    assert found["precision"].tolist() == [0.5, 1, 0, 0]
    assert found["recall"].tolist() == [0.5, 1, 0, 0]
    assert found["f1"].tolist() == [0.5, 1, 0, 0]
    assert found["r"][0] == pytest.approx(1)
    assert found["r"][1] == pytest.approx(np.corrcoef([0, 0, 1, 0], [1, 0, 0, 1])[0, 1])
    assert np.isnan(found["r"][2])
    both = spike_agreement(true, np.stack([true, made]))
    assert both["precision"].tolist() == [0.75, 1, 0.5, 0.5]


# ---------------------------------------------------------------- learning


@pytest.fixture(scope="module")
def trained():
    """A pair: neuron 1 follows neuron 0; neuron 2 fires by chance."""
    g = np.random.default_rng(0)
    X = np.zeros((1200, 3))
    X[:, 0], X[:, 2] = g.random(1200) < 0.5, g.random(1200) < 0.5
    X[1:, 1] = g.random(1199) < np.where(X[:-1, 0] > 0, 0.9, 0.1)
    decoder = NeuroformerDecoder(
        1, 1, **(TINY | {"n_features": 32, "n_history": 1}), pretrain_epochs=12, epochs=15, batch_size=50, learning_rate=5e-3,
        weight_decay=0.0, progress=False,
    )  # fmt: skip
    return decoder.pretrain(X[:900]), X


def test_it_learns_a_circuit_and_shows_it(trained):
    decoder, X = trained
    w = SpikeTokenizer(3, 1, 1).windows(X)[901:]
    entropy = -(0.9 * log(0.9) + 0.1 * log(0.1))
    found = decoder.pretrained_.nats(w)
    assert 2 * log(2) + entropy - 0.1 < found.mean() < 2 * log(2) + entropy + 0.12  # 3 log 2 = 2.08 without the past
    A = decoder.pretrained_.connectivity(w)
    assert float(A[1, 0]) > 1.2
    others = np.abs(A.values[~np.eye(3, dtype=bool)])
    assert (others > 0.5).sum() == 1
    attention = decoder.pretrained_.connectivity(w, "attention")
    assert int(attention.values[1].argmax()) == 0
    assert len(plot_connectivity({"found": A, "attention": attention}, order=[2, 0, 1]).axes) == 4


def test_a_decoder_is_tuned_from_what_was_pretrained(trained):
    pretrained, X = trained
    y = np.stack([2 * X[:, 0] - X[:, 2], X[:, 1]], 1)
    decoder = clone(pretrained).set_params(pretrained=pretrained.pretrained_, epochs=30, tune="all")
    assert not hasattr(decoder, "pretrained_")
    before = {k: v.clone() for k, v in pretrained.pretrained_.state_dict().items()}
    decoder.fit(X[:200], y[:200])
    assert decoder.predict(X).shape == (1200, 2)
    assert decoder.score(X[900:], y[900:]) > 0.9
    for k, v in pretrained.pretrained_.state_dict().items():
        assert torch.equal(v, before[k])
    head = clone(decoder).set_params(tune="head", pretrained=pretrained.pretrained_, epochs=2).fit(X[:200], y[:200])
    for k, v in head.model_.state_dict().items():
        assert k.startswith("heads.") or torch.equal(v, before[k])
    again = clone(decoder).set_params(pretrained=pretrained.pretrained_).fit(X[:200], y[:200])
    np.testing.assert_array_equal(again.predict(X[:50]), decoder.predict(X[:50]))
    one = head.fit(X[:200], y[:200, 0])
    assert one.predict(X[:50]).shape == (50,)
    with pytest.raises(InputError, match="differs in"):
        clone(decoder).set_params(n_history=3, pretrained=pretrained.pretrained_).fit(X[:200], y[:200])
    with pytest.raises(InputError, match="reads"):
        clone(decoder).set_params(pretrained=pretrained.pretrained_).fit(X[:200, :2], y[:200])


def test_windows_give_each_of_their_bins_the_same(trained):
    X, groups = counts(23, 4), np.repeat([0, 1], [10, 13])
    decoder = NeuroformerDecoder(4, 2, **TINY, epochs=1, batch_size=8, progress=False)
    found = decoder.fit(X, X[:, 0], groups).predict(X, groups)
    assert found.shape == (23,)
    for a, b in ((0, 4), (4, 8), (8, 10), (10, 14), (14, 18), (18, 22)):
        assert np.ptp(found[a:b]) == 0
    assert len(np.unique(found)) == 7
    with pytest.warns(UserWarning, match="raise block=4"):
        clone(decoder).set_params(block=4).fit(X, X[:, 0])


def test_a_contrast_brings_windows_and_their_stream_together():
    g = np.random.default_rng(0)
    state = g.integers(3, size=400)
    X = g.poisson(np.array([[2.0, 0.1, 0.1], [0.1, 2.0, 0.1], [0.1, 0.1, 2.0]])[state])
    t = SpikeTokenizer(3, 1, 1)
    w = t.windows(X, streams={"state": Stream(np.eye(3)[state] * 2)})
    with seeded(0):
        model = Neuroformer(
            t, streams={"state": (1, 3)}, align=("spikes", "state"), align_before=True, temperature=0.1, **TINY
        )
    names = list(w.inputs)
    train(model, tuple(v[:300] for v in w.inputs.values()), lambda b, g: {"contrast": model.loss(dict(zip(names, b, strict=True)))["contrast"]},
          epochs=6, batch_size=30, learning_rate=5e-3, progress=False)  # fmt: skip
    v = model.latents(w[300:])
    for name in ("spikes", "state"):
        np.testing.assert_allclose(np.linalg.norm(v[name], axis=1), 1, atol=1e-5)
    nearest = (v["spikes"] @ v["state"].T).argmax(1)
    assert (state[300:][nearest] == state[300:]).mean() > 0.75  # a third by chance


def test_the_audit_reads_a_network_of_frames():
    t = SpikeTokenizer(3, 1, 1)
    g = np.random.default_rng(0)
    w = t.windows(counts(6, 3), streams={"film": Stream(g.normal(size=(6, 6, 6)), 2)})
    model = network(t, scale=4.0, streams={"film": (2, 6, 6)}, heads={"y": 1}, kernel=(1, 3, 3))

    class OfFilm(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, film):
            rest = {k: v[:1].expand(len(film), -1) for k, v in w.inputs.items() if k != "film"}
            return self.inner(film=film, **rest).behaviour["y"]

    net, x = nissl.Network(OfFilm(), dims=("frame", "y", "x")), w.streams["film"][:2]
    scores = IntegratedGradients(steps=64).attribute(net, x, target=0)
    total = net.run(nissl.Pass(x)).output - net.run(nissl.Pass(torch.zeros_like(x))).output
    np.testing.assert_allclose(scores.sum(("frame", "y", "x")), total[:, 0], rtol=0.05, atol=1e-3)


def test_cost_grows_with_the_length_of_what_is_told_and_not_with_its_square():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    t = SpikeTokenizer(5, 1, 1)
    model = network(t, streams={"a": (4, 1)})
    w = t.windows(np.ones((2, 5)))

    def cost(past, samples):
        inputs = w.inputs | {
            "past_ids": torch.zeros(2, past, dtype=torch.long),
            "past_times": torch.zeros(2, past, dtype=torch.long),
        }
        # fused attention is not counted
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs, a=torch.zeros(2, samples, 1))
        return counter.get_total_flops()

    by_past, by_samples = [cost(p, 10) for p in (100, 200, 300)], [cost(10, s) for s in (100, 200, 300)]
    for c in (by_past, by_samples):
        assert c[2] - c[1] == c[1] - c[0] > 0
    # attention of 13 queries of 16 features, and keys and values, for two rows, in two blocks
    assert by_past[1] - by_past[0] == 2 * 2 * 100 * (2 * 16 * 32 + 4 * 16 * w.ids.shape[1]) + 2 * 100 * (
        2 * 8 + 2 * 8 * 16
    )


# ---------------------------------------------------------------- what is refused


def test_scikit_learn():
    decoder = NeuroformerDecoder()
    for check in ("check_no_attributes_set_in_init", "check_get_params_invariance", "check_set_params", "check_estimator_cloneable",
                  "check_estimator_repr", "check_valid_tag_types", "check_estimators_unfitted"):  # fmt: skip
        getattr(estimator_checks, check)("NeuroformerDecoder", decoder)  # the others fit to numbers that are no counts
    with pytest.raises(NotFittedError):
        decoder.predict(counts())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SpikeTokenizer(0), "n_neurons"),
        (lambda: SpikeTokenizer(3, block=2), "block"),
        (lambda: SpikeTokenizer(3).windows(np.full((5, 3), 0.5)), "whole numbers"),
        (lambda: SpikeTokenizer(3).windows(-np.ones((5, 3))), "Negative"),
        (lambda: SpikeTokenizer(3).windows(np.ones((5, 4))), "expecting 3"),
        (lambda: SpikeTokenizer(3).windows(np.full((5, 3), np.nan)), "NaN"),
        (lambda: SpikeTokenizer(3).windows(np.ones((5, 3)), groups=[1, 2]), "groups"),
                (lambda: SpikeTokenizer(3).encode(np.ones((2, 9, 3))), "at most 5 bins"),
        (lambda: Stream(np.ones((2, 2, 2, 2))), "n_variables"),
        (lambda: Stream(np.array([1, np.nan])), "NaN"),
        (lambda: Stream(np.ones(3), times=[0, 2, 1]), "rising"),
        (lambda: Stream(np.ones(3), last=0), "last"),
        (lambda: Neuroformer(SpikeTokenizer(3), n_features=7), "even"),
        (lambda: Neuroformer(SpikeTokenizer(3), n_features=10, n_heads=4), "n_heads"),
        (lambda: Neuroformer(SpikeTokenizer(3), align=("spikes",)), "two or more"),
        (lambda: Neuroformer(SpikeTokenizer(3), align=("spikes", "a")), "two or more"),
        (lambda: Neuroformer(SpikeTokenizer(3), streams={"ids": (1, 1)}), "called 'ids'"),
        (lambda: Neuroformer(SpikeTokenizer(3), streams={"a": (1,)}), "height"),
        (lambda: Neuroformer(SpikeTokenizer(3), streams={"a": (2, 9, 9)}), "smaller than the kernel"),
        (lambda: Neuroformer(SpikeTokenizer(3), temperature=0), "temperature"),
        (lambda: Neuroformer(SpikeTokenizer(3), heads={"y": 0}), "heads"),
        (lambda: spike_agreement(np.ones((2, 1, 3)), np.ones((3, 1, 3))), "for each sample"),
        (lambda: plot_connectivity({}), "no map"),
        (lambda: plot_connectivity({"a": np.ones((2, 3))}), "square"),
        (lambda: plot_connectivity({"a": np.ones((2, 2))}, order=[0, 0]), "once"),
        (lambda: NeuroformerDecoder(tune="x").fit(counts(), counts()[:, 0]), "tune"),
        (lambda: NeuroformerDecoder(validation=1).fit(counts(), counts()[:, 0]), "validation"),
        (lambda: NeuroformerDecoder().fit(counts(), None), "requires y"),
        (lambda: NeuroformerDecoder().fit(counts(), np.ones(3)), "as many as there are bins"),
        (lambda: NeuroformerDecoder().fit(counts(), np.full(40, np.nan)), "NaN"),
        (lambda: NeuroformerDecoder().fit(np.full((9, 2), 0.5), np.ones(9)), "whole numbers"),
        (lambda: NeuroformerDecoder(window=0).pretrain(counts()), "window"),
    ],
)  # fmt: skip
def test_what_is_refused(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_more_that_is_refused():
    t = SpikeTokenizer(5, 2)
    w, model = t.windows(counts()), network(t)
    for call, words in (
        (lambda: model.generate(w, top_p=0.0), "top_p"),
        (lambda: model.generate(w, temperature=0), "temperature"),
        (lambda: model.generate(w, samples=0), "samples"),
        (lambda: model.loss(w.inputs, {"y": torch.ones(20)}), "no head"),
        (lambda: model(**(w.inputs | {"ids": torch.zeros(20, 101, dtype=torch.long), "times": torch.zeros(20, 101, dtype=torch.long)})), "101 tokens"),
        (lambda: spike_table(np.ones((1, 3, 2, 5)), w), "counts must be"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            call()
    film = {"film": Stream(np.ones((40, 6, 6)))}
    decoder = NeuroformerDecoder(2, **TINY, kernel=(1, 3, 3), epochs=1, batch_size=40, progress=False)
    decoder.fit(counts(), counts()[:, 0], streams=film)
    assert decoder.predict(counts(), streams=film).shape == (40,)
    with pytest.raises(InputError, match="as in fit"):
        decoder.predict(counts())


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NeuroformerDecoder(2, 2, **TINY, epochs=1, pretrain_epochs=1, progress=False).pretrain(counts()).fit(
            counts(), counts()[:, 0]
        )
