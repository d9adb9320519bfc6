import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from nissl.errors import InputError, RunFolderError, SiteError
from nissl.intervention import (
    ACT,
    GACT,
    Activations,
    Contrast,
    DiffMeanSteering,
    NeuronSteering,
    RandomSteering,
    Steering,
    read_contrast,
)
from nissl.network import Apply, LanguageModel, Pass, Rollout
from nissl.runner import Runner

LAYERS, WIDTH = 3, 32


@pytest.fixture(scope="module")
def net():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return LanguageModel(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def contrast():
    """Two kinds of prompts, told by their last token, whose answers differ in different tokens."""
    g = torch.Generator().manual_seed(1)
    prompts, positive, negative = [], [], []
    for i in range(24):
        kind = i % 2
        prompts.append([*torch.randint(20, 50, (3 + i % 3,), generator=g).tolist(), (5, 6)[kind]])
        positive.append([(7, 8)[kind], 3])
        negative.append([[(9, 10)[kind], 3], [(11, 12)[kind], 3]])
    return Contrast(prompts, positive, negative)


@pytest.fixture(scope="module")
def quiet():
    return Runner(progress=False)


@pytest.fixture(scope="module")
def read(net, contrast, quiet):
    return read_contrast(net, contrast, runner=quiet)


@pytest.fixture
def gact(net, read, quiet):
    return GACT(net, alpha=0.5, layers=[0, 2], runner=quiet).fit(read)


def all_ways(net, read, contrast, quiet):
    options = {"alpha": 0.5, "runner": quiet}
    return {
        "gact": GACT(net, layers=[0, 2], **options).fit(read),
        "soft": GACT(net, layers=[0, 2], select="soft", **options).fit(read),
        "anew": GACT(net, layers=[0, 2], reselect=True, **options).fit(read),
        "diffmean": DiffMeanSteering(net, layers=[1], **options).fit(read),
        "random": RandomSteering(net, layers=[1], **options).fit(read),
        "act": ACT(net, n_heads=4, **options).fit(contrast),
        "neuron": NeuronSteering(net, 1, 7, peak=2.0, **options),
    }


# ---------------------------------------------------------------- what is read


def test_activations_are_those_of_the_last_tokens(net, contrast, read):
    sites = [f"model.layers.{i}" for i in range(LAYERS)]

    def at(ids, last=1):
        answer = net.run(Pass(net.encode([ids]), read=sites))
        return torch.stack([answer.reads[s][0, -last:].mean(0) for s in sites])

    for i in (0, 5):
        p = list(contrast.prompts[i])
        torch.testing.assert_close(read.prompt[i], at(p))
        torch.testing.assert_close(read.positive[i], at(p + list(contrast.positive[i][0])))
        both = [at(p + list(a)) for a in contrast.negative[i]]
        torch.testing.assert_close(read.negative[i], (both[0] + both[1]) / 2)
    mean = read_contrast(net, contrast[:1], pool="mean", runner=Runner(progress=False))
    p = list(contrast.prompts[0]) + list(contrast.positive[0][0])
    torch.testing.assert_close(mean.positive[0], at(p, last=2))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (([], [], []), "needs prompts"),
        ((["a"], ["b"], []), "needs prompts"),
        ((["a"], [""], ["c"]), "empty positive answer"),
        ((["a"], ["b"], [[]]), "empty negative answer"),
        (("a", ["b"], ["c"]), "prompts must be a sequence"),
        ((["a"], [3], ["c"]), "positive answers of prompt 0"),
    ],
)
def test_bad_contrasts(columns, message):
    with pytest.raises(InputError, match=message):
        Contrast(*columns)


def test_texts_need_a_tokenizer(net):
    with pytest.raises(InputError, match="no tokenizer"):
        read_contrast(net, Contrast(["a"], ["b"], ["c"]))


# ---------------------------------------------------------------- the planted kinds


def test_clusters_and_probes_find_the_two_kinds_of_prompt(gact, read, contrast):
    labels = gact.clusters_.labels[:, 0]
    kinds = torch.arange(len(contrast)) % 2
    assert max((labels == kinds).float().mean(), (labels != kinds).float().mean()) >= 0.9
    accuracy = gact.probe_accuracy()
    assert accuracy.dims == ("layer",)
    assert accuracy.sizes["layer"] == LAYERS
    assert float(accuracy[0]) > float(accuracy["majority"][0]) + 0.1  # the last token tells
    assert np.allclose(accuracy["majority"], gact.clusters_.shares.amax(1))
    new = Activations(read.prompt[:7], read.positive[:7], read.negative[:7])
    on_new = gact.probe_accuracy(new)
    same = gact.probes_(new.prompt).argmax(-1) == gact.clusters_.labels[:7]
    np.testing.assert_allclose(on_new, same.float().mean(0))
    assert on_new.attrs["prompts"] == 7


def test_held_out_accuracy_is_chance_where_prompts_tell_nothing(net, read, quiet):
    g = torch.Generator().manual_seed(0)
    n = 60
    differences = torch.zeros(n, LAYERS, WIDTH)
    differences[torch.arange(n), :, torch.arange(n) % 2] = 1.0
    prompt = torch.randn(n, LAYERS, WIDTH, generator=g)
    found = GACT(net, n_clusters=2, alpha=1.0, runner=quiet).fit(Activations(prompt, differences, 0 * differences))
    assert (np.abs(found.accuracy_ - 0.5) < 0.25).all()
    assert (found.probes_(prompt).argmax(-1) == found.clusters_.labels).float().mean() > 0.85  # fitted, they know them


def test_the_best_layers_are_steered(net, read, quiet):
    sharp = Activations(
        torch.randn(24, LAYERS, WIDTH, generator=torch.Generator().manual_seed(0)), read.positive, read.negative
    )
    sharp.prompt[:, 1] += 20 * F.one_hot(torch.arange(24) % 2, WIDTH)
    found = GACT(net, n_clusters=2, alpha=1.0, runner=quiet).fit(sharp)
    assert found.layers_ == [1]
    assert GACT(net, n_clusters=1, alpha=1.0, runner=quiet).fit(read).layers_ == [1]  # nothing to choose: the middle


def test_each_prompt_gets_the_direction_of_its_kind(net, gact, contrast, read):
    inputs = net.encode([contrast.prompts[0], contrast.prompts[1]])
    edits = gact.edits(inputs, alpha=1.0)
    for place, layer in enumerate((0, 2)):
        for row in range(2):
            v = gact.clusters_.means[layer, gact.clusters_.labels[row, layer]]
            expected = read.prompt[:, layer].norm(dim=1).mean() * v / v.norm()
            torch.testing.assert_close(edits.edits[place].value[row, 0], expected)
            torch.testing.assert_close(edits.then[place].value[row, 0], expected)


def test_steering_raises_the_odds_of_positive_answers(net, gact, contrast):
    gained = []
    for p, good, bad in zip(contrast.prompts, contrast.positive, contrast.negative, strict=True):
        inputs = net.encode([p])
        plain, steered = (net.run(Pass(inputs, e)).output[0, -1] for e in ((), gact.edits(inputs, alpha=1.0).edits))
        odds = [o[good[0][0]] - torch.stack([o[b[0]] for b in bad]).mean() for o in (plain, steered)]
        gained.append(float(odds[1] - odds[0]))
    assert np.mean(gained) > 0
    assert np.mean(np.array(gained) > 0) > 0.7


# ---------------------------------------------------------------- exactness


@pytest.fixture(scope="module")
def ways(net, read, contrast, quiet):
    return all_ways(net, read, contrast, quiet)


WAYS = ("gact", "soft", "anew", "diffmean", "random", "act", "neuron")


@pytest.mark.parametrize("way", WAYS)
def test_strength_zero_changes_no_bit(net, ways, contrast, way):
    inputs = net.encode(contrast.prompts[:4])
    plain = net.run(Pass(inputs))
    assert torch.equal(net.run(Pass(inputs, ways[way].edits(inputs, alpha=0).edits)).output, plain.output)
    steered = net.run(Pass(inputs, ways[way].edits(inputs).edits))
    assert not torch.allclose(steered.output, plain.output, atol=1e-4)
    a, b = (net.run(Rollout(inputs, *e, max_tokens=6)) for e in (ways[way].edits(inputs, alpha=0), ((), ())))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.log_probs, b.log_probs)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_steered_as_its_prompts_are_alone(net, ways, contrast, way):
    prompts = contrast.prompts[:5]  # of different length and kind
    inputs = net.encode(prompts)
    together = net.run(Pass(inputs, ways[way].edits(inputs).edits)).output
    generated = net.run(Rollout(inputs, *ways[way].edits(inputs), samples=2, max_tokens=5, temperature=1.0, seed=3))
    for i, p in enumerate(prompts):
        one = net.encode([p])
        alone = net.run(Pass(one, ways[way].edits(one).edits)).output
        torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=1e-5)
        single = net.run(Rollout(one, *ways[way].edits(one), samples=2, max_tokens=5, temperature=1.0, seed=3))
        assert torch.equal(single.tokens[0], generated.tokens[i])
        torch.testing.assert_close(single.log_probs[0], generated.log_probs[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_generation_with_a_cache_equals_passes_over_the_whole_text(net, ways, contrast, way):
    inputs = net.encode([contrast.prompts[0]])
    edits = ways[way].edits(inputs)
    answer = net.run(Rollout(inputs, *edits, max_tokens=6))
    new = answer.tokens[0, 0].tolist()
    full = net.encode([[*contrast.prompts[0], *new]], keep=0)
    over = edits.over(len(new))
    logits = net.run(Pass(full, over)).output[0, -len(new) - 1 : -1]
    assert logits.argmax(-1).tolist() == new
    expected = logits.log_softmax(-1)[torch.arange(len(new)), new]
    torch.testing.assert_close(answer.log_probs[0, 0], expected, atol=1e-5, rtol=1e-5)


def test_reselection_follows_each_token(net, ways, contrast, gact):
    inputs = net.encode([contrast.prompts[0]])
    edits = ways["anew"].edits(inputs)
    assert all(e.function is not None for e in edits.then)
    assert ways["anew"].edits(inputs).then[0].function is edits.then[0].function  # the same: Passes can be merged
    h = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    moved = edits.then[0].function(h) - h
    p = gact.probes_.of([0])(h)
    for row in range(2):
        unit = gact.clusters_.directions[0, p[row, 0].argmax()]
        torch.testing.assert_close(moved[row, 0], 0.5 * gact.norms_[0] * unit, atol=1e-5, rtol=1e-4)


def test_one_cluster_is_the_difference_of_means(net, read, quiet, contrast):
    one = GACT(net, n_clusters=1, layers=[0, 1], alpha=0.7, runner=quiet).fit(read)
    single = DiffMeanSteering(net, layers=[0, 1], alpha=0.7, runner=quiet).fit(read)
    inputs = net.encode(contrast.prompts[:3])
    assert torch.equal(
        net.run(Pass(inputs, one.edits(inputs).edits)).output, net.run(Pass(inputs, single.edits(inputs).edits)).output
    )
    direction = (read.positive - read.negative).mean(0)[0]
    torch.testing.assert_close(single.edits(inputs, 1.0).edits[0].value[0, 0],
                               read.prompt[:, 0].norm(dim=1).mean() * F.normalize(direction, dim=0))  # fmt: skip
    assert float(one.probe_accuracy().min()) == 1.0


def test_after_an_error_the_network_is_as_it_was(net, gact, contrast):
    inputs = net.encode(contrast.prompts[:2])
    before, plain = net.fingerprint(), net.run(Pass(inputs)).output

    def fails(h):
        raise RuntimeError("on purpose")

    broken = (*gact.edits(inputs).edits, Apply("model.layers.1", fails))
    for question in (Pass(inputs, broken), Rollout(inputs, broken, (), max_tokens=2)):
        with pytest.raises(InputError, match="on purpose"):
            net.run(question)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in net.module.modules())
    assert net.fingerprint() == before
    assert torch.equal(net.run(Pass(inputs)).output, plain)


# ---------------------------------------------------------------- online


def test_updating_learns_after_predicting_and_leaves_the_network_alone(net, gact, contrast, quiet):
    before = {k: v.clone() for k, v in net.weights().items()}
    first = gact.probes_.weight.clone()
    predicted = gact.probes_(read_contrast(net, contrast[:1], runner=quiet).prompt)
    done = gact.update(contrast[:6])
    assert all(torch.equal(v, before[k]) for k, v in net.weights().items())
    assert torch.equal(done.probabilities[0], predicted[0])
    assert torch.equal(done.labels, gact.clusters_.labels[:6])
    assert not torch.equal(gact.probes_.weight, first)
    assert len(gact.probes_.buffer) == 6


def test_updating_in_two_parts_is_updating_at_once(net, read, quiet):
    def part(a, b):
        return Activations(read.prompt[a:b], read.positive[a:b], read.negative[a:b])

    one, two = (GACT(net, alpha=0.5, runner=quiet).fit(read) for _ in range(2))
    one.update(part(0, 9))
    two.update(part(0, 4))
    two.update(part(4, 9))
    assert torch.equal(one.probes_.weight, two.probes_.weight)


def test_a_shifted_stream_is_learned(net, quiet):
    """The prompts of the two kinds change places; frozen probes are wrong from then on."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.arange(120) % 2
    axes = torch.eye(WIDTH)

    def stream(swapped):
        prompt = (4 * axes[(kinds + swapped) % 2])[:, None] + torch.randn(120, LAYERS, WIDTH, generator=g)
        return Activations(prompt, axes[4 + kinds][:, None].expand(120, LAYERS, WIDTH), torch.zeros(120, LAYERS, WIDTH))

    found = GACT(net, n_clusters=2, alpha=1.0, runner=quiet).fit(stream(0))
    assert float(found.probe_accuracy(stream(1)).max()) < 0.1
    right = found.update(stream(1)).right.float()
    assert right[:10].mean() < 0.3
    assert right[80:].mean() > 0.8


def test_prompts_alone_teach_nothing_unless_it_is_wanted(gact, contrast):
    first = gact.probes_.weight.clone()
    done = gact.update(contrast.prompts[:4])
    assert (done.labels == -1).all()
    assert not done.right.any()
    assert torch.equal(gact.probes_.weight, first)
    done = gact.update(contrast.prompts[:4], pseudo=True)
    sure, own = done.probabilities.max(-1)
    assert torch.equal(done.labels, torch.where(sure > 0.9, own, -1))
    with pytest.raises(InputError, match="batch is empty"):
        gact.update([])


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_steers_alike(net, ways, contrast, way, tmp_path):
    path = ways[way].save(tmp_path / "steering.safetensors")
    loaded = Steering.load(path, net, runner=Runner(progress=False))
    assert type(loaded) is type(ways[way])
    inputs = net.encode(contrast.prompts[:3])
    a, b = (net.run(Rollout(inputs, *s.edits(inputs), max_tokens=4)) for s in (ways[way], loaded))
    assert torch.equal(a.log_probs, b.log_probs)
    assert [p.name for p in tmp_path.iterdir()] == ["steering.safetensors"]
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["nissl.steering"])["network"] == net.name


def test_a_loaded_one_goes_on_learning_where_it_stopped(net, gact, read, tmp_path):
    def part(a, b):
        return Activations(read.prompt[a:b], read.positive[a:b], read.negative[a:b])

    gact.update(part(0, 5))
    loaded = Steering.load(gact.save(tmp_path / "g.safetensors"), net)
    assert isinstance(loaded, GACT)
    gact.update(part(5, 9))
    loaded.update(part(5, 9))
    assert torch.equal(gact.probes_.weight, loaded.probes_.weight)
    assert np.array_equal(gact.probe_accuracy(), loaded.probe_accuracy())


def test_files_that_do_not_fit(net, gact, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    path = gact.save(tmp_path / "g.safetensors")
    other = net.changed({"model.norm.weight": torch.full((WIDTH,), 2.0)})
    with pytest.warns(UserWarning, match="other weights"):
        Steering.load(path, other)
    small = LanguageModel(LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=5, num_attention_heads=2,
    )))  # fmt: skip
    with pytest.raises(InputError, match="3 layers, this one has 5"):
        Steering.load(path, small)
    (tmp_path / "bad").write_bytes(b"no tensors")
    save_file({"a": torch.ones(1)}, tmp_path / "plain")
    for name, message in (("bad", "cannot be read"), ("plain", "no steering"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=message):
            Steering.load(tmp_path / name, net)
    with pytest.raises(RunFolderError, match="cannot be written"):
        gact.save(tmp_path / "no folder" / "x")


# ---------------------------------------------------------------- bad input


def test_what_is_not_fitted_or_calibrated_says_so(net, read, quiet, tmp_path):
    inputs = net.encode([[1, 2]])
    for new in (GACT(net), DiffMeanSteering(net), RandomSteering(net), ACT(net)):
        with pytest.raises(InputError, match="not fitted"):
            new.edits(inputs, alpha=1.0)
        with pytest.raises(InputError, match="not fitted"):
            new.save(tmp_path / "x")
    fitted = DiffMeanSteering(net, runner=quiet).fit(read)  # no tokenizer: no neutral prompts to calibrate on
    assert fitted.alpha is None
    with pytest.raises(InputError, match=r"give alpha=, or call calibrate"):
        fitted.edits(inputs)
    fitted.calibrate([[4, 8, 15], [16, 23]], kl=0.05)
    edits = fitted.edits(net.encode([[4, 8, 15], [16, 23]])).edits
    p, q = (net.run(Pass(net.encode([[4, 8, 15], [16, 23]]), e)).output[:, -1].log_softmax(-1) for e in ((), edits))
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "layers must be"),
        ({"layers": []}, "layers must be"),
        ({"layers": [1, 1]}, "layers must be"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"kl": 0}, "kl must be"),
        ({"seed": -1}, "seed must be"),
        ({"n_clusters": 0}, "n_clusters must be"),
        ({"learning_rate": 0}, "learning_rate must be"),
        ({"buffer": 0}, "buffer must be"),
    ],
)
def test_bad_options(net, options, message):
    with pytest.raises(InputError, match=message):
        GACT(net, **options)


def test_bad_subjects(net, gact, read, contrast, quiet):
    with pytest.raises(SiteError, match="role"):
        GACT(net, role="resid")
    with pytest.raises(InputError, match="at 'resid_post' are expected"):
        gact.fit(Activations(read.prompt, read.positive, read.negative, role="mlp_out"))
    with pytest.raises(InputError, match="2 layers"):
        gact.fit(Activations(read.prompt[:, :2], read.positive[:, :2], read.negative[:, :2]))
    with pytest.raises(InputError, match="needs the prompts"):
        gact.fit(Activations(read.prompt[:3], read.positive, read.negative))
    right = net.encode([[1, 2], [1, 2, 3]], side="right", keep=0)
    with pytest.raises(InputError, match="pad them on the left"):
        gact.edits(right)
