import numpy as np
import pytest
import torch
import xarray as xr

from nissl.errors import InputError
from nissl.intervention import (
    DiffMeanSteering,
    NeuronSteering,
    RandomSteering,
    answer_log_probs,
    code_language,
    concept_bias,
    generate,
    margin,
    perplexity,
    plot_margins,
    plot_probe_accuracy,
    steer,
    steered_divergence,
)
from nissl.intervention.contrast import Activations
from nissl.network import LanguageModel, Pass, Rollout
from nissl.runner import Runner


class Letters:
    """A tokenizer of one letter a token."""

    chat_template = pad_token_id = eos_token_id = None
    alphabet = "abcdefghijklmnopqrstuvwxyz ,.-'ABCDEFGHIJKLMNOPQRSTUVWXYZ\n"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [max(self.alphabet.find(c), 0) for c in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(self.alphabet[i] for i in ids)


@pytest.fixture(scope="module")
def net():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(Letters.alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        return LanguageModel(LlamaForCausalLM(config), Letters())


@pytest.fixture(scope="module")
def quiet():
    return Runner(progress=False)


@pytest.fixture(scope="module")
def toward_x(net, quiet):
    """Steering along what the unembedding reads for the letter x."""
    row = net.weight("unembed")[net.token("x")].detach()
    ends = row[None, None].expand(1, 3, 32)
    read = Activations(torch.ones(2, 3, 32), ends, 0 * ends)
    return DiffMeanSteering(net, layers=[2], alpha=3.0, runner=quiet).fit(read)


def by_hand(net, prompt, answer, edits=()):
    ids = net.tokenizer(prompt)["input_ids"]
    more = net.tokenizer(answer)["input_ids"]
    logits = net.run(Pass(net.encode([ids + more], keep=0), edits)).output[0]
    log_p = logits[len(ids) - 1 : -1].log_softmax(-1)
    return float(log_p[torch.arange(len(more)), more].sum())


def test_log_probabilities_of_answers(net, toward_x, quiet):
    prompts, answers = ["hello", "abc de"], ["x", "y", "xy z", "q r"]
    plain, lengths = answer_log_probs(net, prompts, answers, runner=quiet)
    assert lengths.tolist() == [[1, 1, 4, 3]] * 2
    steered, _ = answer_log_probs(net, prompts, answers, toward_x, runner=quiet)
    for i, p in enumerate(prompts):
        for j, a in enumerate(answers):
            assert plain[i, j] == pytest.approx(by_hand(net, p, a), abs=1e-4)
            over = toward_x.edits(net.encode([p])).over(len(a))
            assert steered[i, j] == pytest.approx(by_hand(net, p, a, over), abs=1e-4)
    each, _ = answer_log_probs(net, prompts, answers[2:], each=True, runner=quiet)
    np.testing.assert_allclose(each[:, 0], [plain[0, 2], plain[1, 3]], atol=1e-5)
    assert (steered[:, 0] > plain[:, 0]).all()


def test_answers_of_one_token_cost_one_pass(net):
    runner = Runner(progress=False)
    answer_log_probs(net, ["hello"], ["x", "y", "z"], runner=runner)
    assert runner.cost("answers").forward - runner.cost("answers").reused == 1


def test_margin_is_the_log_odds_of_two_sets(net, toward_x, quiet):
    prompts = ["hello", "abc de"]
    found = margin(net, prompts, ["x", "yz"], ["q"], runner=quiet)
    for i, p in enumerate(prompts):
        good = np.exp(by_hand(net, p, "x")) + np.exp(by_hand(net, p, "yz"))
        assert found[i] == pytest.approx(np.log(good) - by_hand(net, p, "q"), abs=1e-4)
    assert (
        margin(net, prompts, ["x"], ["q"], toward_x, runner=quiet) > margin(net, prompts, ["x"], ["q"], runner=quiet)
    ).all()
    zero = margin(net, prompts, ["x", "yz"], ["q"], toward_x, alpha=0, runner=quiet)
    assert np.array_equal(zero, found)


def test_perplexity(net, quiet):
    found = perplexity(net, ["hello", "abc", "a"], ["x", "yz q", ""], runner=quiet)
    assert found[0] == pytest.approx(np.exp(-by_hand(net, "hello", "x")), rel=1e-4)
    assert found[1] == pytest.approx(np.exp(-by_hand(net, "abc", "yz q") / 4), rel=1e-4)
    assert np.isnan(found[2])


def test_divergence(net, toward_x):
    prompts = ["hello", "abc de"]
    found = steered_divergence(net, prompts, toward_x)
    for i, prompt in enumerate(prompts):
        inputs = net.encode([prompt])
        p, q = (net.run(Pass(inputs, e)).output[0, -1].double().softmax(-1) for e in ((), toward_x.edits(inputs).edits))
        assert found[i] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4)
    assert (steered_divergence(net, prompts, toward_x, alpha=0) == 0).all()


def test_generation_is_that_of_rollouts(net, toward_x, quiet):
    prompts = ["hello", "abc de", "z"]
    found = generate(net, prompts, toward_x, samples=2, max_tokens=5, temperature=1.0, seed=4, runner=quiet)
    for i, p in enumerate(prompts):
        inputs = net.encode([p])
        rollout = Rollout(inputs, *toward_x.edits(inputs), samples=2, max_tokens=5, temperature=1.0, seed=4)
        assert found[i] == [net.decode(row) for row in net.run(rollout).tokens[0]]
    many = generate(net, prompts, samples=40, max_tokens=2, temperature=1.0, runner=quiet)  # several batches
    assert [len(row) for row in many] == [40] * 3
    assert many[2] == generate(net, prompts[2:], samples=40, max_tokens=2, temperature=1.0, runner=quiet)[0]


def test_shares_of_concepts(net, toward_x, quiet):
    def classify(text):
        return "x" if "x" in text else "other"

    options = {"n_repeats": 16, "max_tokens": 4, "seed": 1, "runner": quiet}
    plain = concept_bias(net, ["hello", "abc de"], classify, **options)
    assert plain.index.tolist() == ["hello", "abc de"]
    np.testing.assert_allclose(plain.sum(axis=1), 1.0)
    texts = generate(net, ["hello"], samples=16, max_tokens=4, temperature=1.0, seed=1, runner=quiet)[0]
    assert plain.loc["hello"].get("x", 0.0) == np.mean(["x" in t for t in texts])
    steered = concept_bias(net, ["hello", "abc de"], classify, steering=toward_x, alpha=30.0, **options)
    assert (steered["x"] == 1.0).all()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Here:\n```cpp\nint x;\n```", "c++"),
        ("```C++\n", "c++"),
        ("```python\n#include <x>", "python"),
        ("```rust\nfn main() {}\n```", "none"),
        ("```\ndef f(x):\n    return x\n```", "python"),
        ("#include <iostream>\nint main() { std::cout << 1; }", "c++"),
        ("long f(int n) {\n    return n;\n}", "c++"),
        ("public static void main(String[] args) { System.out.println(1); }", "java"),
        ("function f(x)\n    println(x)\nend", "julia"),
        ("const f = x => { console.log(x) }", "javascript"),
        ("I like tea.", "none"),
    ],
)
def test_languages_of_code(text, language):
    assert code_language(text) == language


# ---------------------------------------------------------------- before and after


def test_steer_from_examples(net, quiet):
    result = steer(net, ["xxx", "xx"], ["qqq"], ["hello", "abc"], 0.3, layers=[1], max_tokens=6, runner=quiet)
    assert result.layers == (1,)
    assert result.strength == 0.3
    site = net.anatomy.site("resid_post", 1)

    def states(text):
        return net.run(Pass(net.encode([text]), read=[site])).reads[site][0]

    difference = (states("xxx").mean(0) + states("xx").mean(0)) / 2 - states("qqq").mean(0)
    length = (states("hello")[-1].norm() + states("abc")[-1].norm()) / 2
    value = result.steering.edits(net.encode(["hello"])).edits[0].value[0, 0]
    torch.testing.assert_close(value, 0.3 * length * difference / difference.norm(), atol=1e-5, rtol=1e-4)
    assert result.before == tuple(t[0] for t in generate(net, ["hello", "abc"], max_tokens=6, runner=quiet))
    assert result.after == tuple(
        t[0] for t in generate(net, ["hello", "abc"], result.steering, max_tokens=6, runner=quiet)
    )
    expected = (
        np.mean([by_hand(net, "hello", "xxx") / 3, by_hand(net, "hello", "xx") / 2]) - by_hand(net, "hello", "qqq") / 3
    )
    assert result.margin_before[0] == pytest.approx(expected, abs=1e-4)
    np.testing.assert_allclose(result.kl, steered_divergence(net, ["hello", "abc"], result.steering))
    np.testing.assert_allclose(result.perplexity_after, perplexity(net, ["hello", "abc"], result.after, runner=quiet))
    assert list(result.table.index) == ["hello", "abc"]


def test_steer_calibrates_and_clusters_where_it_can(net, quiet):
    result = steer(net, ["xyz"] * 2 + ["zyx"] * 2, ["qrs"] * 2 + ["srq"] * 2, ["hello"], kl=0.05, max_tokens=2,
                   contexts=["aa", "ab", "ba", "bb"], n_clusters=2, runner=quiet)  # fmt: skip
    assert type(result.steering).__name__ == "GACT"
    assert result.steering.clusters_.n_clusters == 2
    from nissl.intervention import NEUTRAL

    assert steered_divergence(net, NEUTRAL, result.steering).mean() == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"toward": []}, "toward must be texts"),
        ({"away": [""]}, "away must be texts"),
        ({"prompts": []}, "prompts must be texts"),
        ({"n_clusters": 3}, "give contexts="),
        ({"contexts": ["a", "b"]}, "a contrast needs"),
        ({"strength": float("inf")}, "alpha must be"),
        ({"toward": ["qq"]}, "same activations"),
    ],
)
def test_steering_without_what_it_needs(net, quiet, change, message):
    arguments = {"toward": ["xx"], "away": ["qq"], "prompts": ["hello"], "runner": quiet, **change}
    with pytest.raises(InputError, match=message):
        steer(net, **arguments)


def test_bad_questions(net):
    with pytest.raises(InputError, match="are needed"):
        answer_log_probs(net, [], ["a"])
    with pytest.raises(InputError, match="as many with each"):
        answer_log_probs(net, ["a"], ["a", "b"], each=True)
    with pytest.raises(InputError, match="positive and negative"):
        margin(net, ["a"], [], ["b"])
    with pytest.raises(InputError, match="one text for each prompt"):
        perplexity(net, ["a"], [])
    with pytest.raises(InputError, match="no prompt"):
        generate(net, [])
    with pytest.raises(InputError, match="samples"):
        generate(net, ["a"], samples=0)


def test_a_strength_that_is_out_of_reach_is_not_used(net):
    dead = NeuronSteering(net, 0, 0, peak=0.0)
    with pytest.raises(InputError, match="no strength gives"):
        dead.calibrate(["hello"])
    assert dead.alpha is None


def test_random_directions_are_calibrated_alike(net, quiet):
    read = Activations(torch.ones(2, 3, 32), torch.ones(1, 3, 32), torch.zeros(1, 3, 32))
    a, b, c = (RandomSteering(net, layers=[0, 1], seed=s, kl=0.05, runner=quiet).fit(read) for s in (1, 1, 2))
    assert torch.equal(a.units_, b.units_)
    assert not torch.equal(a.units_, c.units_)
    from nissl.intervention import NEUTRAL

    for s in (a, c):
        assert steered_divergence(net, NEUTRAL, s).mean() == pytest.approx(0.05, rel=0.06)


# ---------------------------------------------------------------- pictures


def test_pictures_show_the_numbers(tmp_path):
    accuracy = xr.DataArray(
        [0.5, 0.9, 0.7], dims="layer", coords={"layer": [0, 1, 2], "majority": ("layer", [0.5] * 3)}
    )
    figure = plot_probe_accuracy(accuracy, steered=[1], path=tmp_path / "a.png")
    lines = figure.axes[0].lines
    np.testing.assert_allclose(lines[0].get_ydata(), accuracy)
    np.testing.assert_allclose(lines[1].get_ydata(), 0.5)
    figure = plot_margins({"none": [1.0, 2.0], "one": [2.0, 5.0]}, "none", path=tmp_path / "b.png")
    points, mean = figure.axes[0].lines[1:]
    assert list(points.get_xdata()) == [1.0, 3.0]
    assert list(mean.get_xdata()) == [2.0]
    assert all((tmp_path / f).stat().st_size < 100_000 for f in ("a.png", "b.png"))
    with pytest.raises(InputError, match="is none of"):
        plot_margins({"one": [1.0]}, "none")
