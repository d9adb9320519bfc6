import numpy as np
import pytest
import torch

from nissl.errors import InputError
from nissl.intervention import ACT, Activations, Contrast, NeuronSteering, read_contrast
from nissl.network import LanguageModel, Pass
from nissl.runner import Runner

HEADS, WIDTH, LAYERS = 4, 8, 2


@pytest.fixture(scope="module")
def net():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40, hidden_size=HEADS * WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None,
        )  # fmt: skip
        return LanguageModel(LlamaForCausalLM(config))


def planted(n=30):
    """Two kinds of pairs; head 1 of layer 0 tells the first kind apart, head 2 of layer 1 the second, no other does."""
    g = torch.Generator().manual_seed(0)
    positive, negative = (0.3 * torch.randn(n, LAYERS, HEADS * WIDTH, generator=g) for _ in range(2))
    kind = torch.arange(n) % 2
    for layer, head in ((0, 1), (1, 2)):
        for sign, side in ((1, positive), (-1, negative)):
            side[kind == layer, layer, head * WIDTH] += 3.0 * sign
    return Activations(positive, positive, negative, role="z"), kind


@pytest.fixture(scope="module")
def act(net):
    return ACT(net, n_clusters=2, n_heads=1, alpha=2.0, direction="mean").fit(planted()[0])


def test_only_the_heads_that_tell_are_steered(act):
    steered = (act.vectors_ != 0).any(-1).reshape(LAYERS, HEADS, 2)
    assert steered.sum() == 2
    assert steered[0, 1].any()
    assert steered[1, 2].any()
    assert steered[0, 1].int().argmax() != steered[1, 2].int().argmax()  # each for a cluster of its own
    best = act.accuracy_.amax(1).reshape(LAYERS, HEADS)
    assert best[0, 1] == best[1, 2] == 1.0


def test_vectors_are_mean_differences_or_the_probes_own_weights(net, act):
    read, kind = planted()
    c = int((act.vectors_ != 0).any(-1)[1].int().argmax())  # the cluster of head 1 in layer 0: the first kind
    difference = (read.positive - read.negative)[kind == 0, 0, WIDTH : 2 * WIDTH]
    torch.testing.assert_close(act.vectors_[1, c], difference.mean(0))
    probe = ACT(net, n_clusters=2, n_heads=1, alpha=2.0).fit(read)
    chosen = (probe.vectors_ != 0).any(-1)
    assert torch.equal(probe.vectors_[chosen], probe.theta_[chosen])


def test_edits_follow_the_equation(net, act):
    inputs = net.encode([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    sites = net.anatomy.sites("z")
    plain = net.run(Pass(inputs, read=sites))
    edits = act.edits(inputs)
    assert [e.site for e in edits.edits] == act.sites == sites
    steered = net.run(Pass(inputs, edits.edits[:1], read=sites))
    z, moved = plain.reads[sites[0]], steered.reads[sites[0]]
    assert torch.equal(z[:, :-1], moved[:, :-1])  # the prompt's last token only
    for row in range(2):
        for head in range(HEADS):
            a = z[row, -1, head * WIDTH : (head + 1) * WIDTH]
            expected = a.clone()
            for c in range(2):
                p = torch.sigmoid(act.theta_[head, c] @ a)
                expected += 2.0 * (1 - p) * act.vectors_[head, c]
            torch.testing.assert_close(
                moved[row, -1, head * WIDTH : (head + 1) * WIDTH], expected, atol=1e-5, rtol=1e-5
            )


def test_beta_keeps_pushing_what_is_positive_already(net):
    read, _ = planted()
    inputs = net.encode([[3, 1, 4]])
    site = net.anatomy.site("z", 0)
    moves = []
    for beta in (0.0, 0.5):
        act = ACT(net, n_clusters=2, n_heads=1, alpha=1.0, beta=beta, direction="mean").fit(read)
        plain, moved = (net.run(Pass(inputs, e, read=[site])).reads[site] for e in ((), act.edits(inputs).edits[:1]))
        moves.append((moved - plain)[0, -1])
        v = act.vectors_[:HEADS].sum(1).flatten()
    torch.testing.assert_close(moves[1] - moves[0], 0.5 * v, atol=1e-5, rtol=1e-5)


def test_act_on_texts_reads_heads_and_bad_input_says_so(net):
    contrast = Contrast([[1, 2], [3, 4], [5, 6], [7, 8]], [[9, 3]] * 4, [[10, 3]] * 4)
    quiet = Runner(progress=False)
    act = ACT(net, n_clusters=1, alpha=1.0, runner=quiet).fit(contrast)
    read = read_contrast(net, contrast, role="z", runner=quiet)
    assert read.positive.shape == (4, LAYERS, HEADS * WIDTH)
    assert torch.equal(act.theta_, ACT(net, n_clusters=1, alpha=1.0).fit(read).theta_)
    with pytest.raises(InputError, match="at 'z'"):
        act.fit(Activations(read.prompt, read.positive, read.negative))
    for options in ({"n_heads": 0}, {"n_clusters": 0}, {"beta": float("inf")}):
        with pytest.raises(InputError):
            ACT(net, **options)


# ---------------------------------------------------------------- one neuron


def test_the_static_neuron_is_the_most_active_one(net):
    carriers = [[3, 4], [5, 6, 7]]
    found = NeuronSteering.find(net, 11, carriers=carriers, alpha=1.0)
    a = []
    for c in carriers:
        sites = net.anatomy.sites("neurons")
        answer = net.run(Pass(net.encode([[*c, 11]]), read=sites))
        a.append(torch.stack([answer.reads[s][0, -1] for s in sites]))
    mean = (a[0] + a[1]) / 2
    layer, unit = np.unravel_index(int(mean.abs().argmax()), mean.shape)
    assert (found.layer, found.unit) == (layer, unit)
    assert found.peak == pytest.approx(float(mean[layer, unit]))
    by_effect = NeuronSteering.find(net, 11, by="effect", carriers=carriers)
    writes = torch.stack([net.weight("unembed")[11] @ net.weight("down", i) for i in range(LAYERS)])
    assert (by_effect.layer, by_effect.unit) == np.unravel_index(int((mean * writes).argmax()), mean.shape)


@pytest.mark.parametrize("how", ["add", "clamp", "scale"])
def test_a_neuron_is_moved_at_all_positions(net, how):
    steering = NeuronSteering(net, 1, 5, peak=-3.0, how=how, alpha=2.0)
    inputs = net.encode([[1, 2, 3]])
    site = net.anatomy.site("neurons", 1)
    edits = steering.edits(inputs)
    assert edits.edits == edits.then == edits.over(4)
    plain, moved = (net.run(Pass(inputs, e, read=[site])).reads[site] for e in ((), edits.edits))
    expected = plain.clone()
    a = plain[..., 5]
    expected[..., 5] = {"add": a - 6.0, "clamp": torch.full_like(a, -6.0), "scale": 3.0 * a}[how]
    torch.testing.assert_close(moved, expected)


def test_neurons_that_are_not_there(net):
    for options, message in (
        ({"layer": 2, "unit": 0}, "layer must be below 2"),
        ({"layer": 0, "unit": 48}, "unit must be below 48"),
        ({"layer": -1, "unit": 0}, "at least 0"),
        ({"layer": 0, "unit": 0, "peak": float("nan")}, "peak must be"),
    ):
        with pytest.raises(InputError, match=message):
            NeuronSteering(net, **options)
    with pytest.raises(InputError, match="at least one carrier"):
        NeuronSteering.find(net, 3, carriers=[])
    with pytest.raises(InputError, match="carrier ends in"):
        NeuronSteering.find(net, "C++", carriers=["{} is"])
