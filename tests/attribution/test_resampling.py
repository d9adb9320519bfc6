"""Resampling against a sampler whose conditional answer distributions are known (planted check A)."""

import numpy as np
import pytest
import torch
from test_sentences import words
from transformers import LlamaConfig, LlamaForCausalLM

from nissl.attribution.resampling import Bank, Resampling, answer_kl
from nissl.attribution.sentences import Trace, exact
from nissl.errors import InputError
from nissl.network import LanguageModel
from nissl.runner import Runner

# S1 is fixed; S2 chooses plan A (0.9) or B (0.1); S3 is filler; S4 is said with 0.9 after A and 0.1 after B.
FIRST = "The task is to find the number."
PLAN = {p: [f"{w} we take plan {p} for this." for w in ("Now", "Here", "Then")] for p in "AB"}
FILLER = [f"{w} we go on a little." for w in ("Well", "Good", "Fine")]
FOURTH, OTHER = "The double of two is useful.", "Something else is useful here."
TRUTH = {"A": np.array([0.95, 0.05]), "B": np.array([0.2, 0.8])}  # of the answers "4" and "7"
BEFORE_PLAN = 0.9 * TRUTH["A"] + 0.1 * TRUTH["B"]

TRACE = Trace.of(" ".join([FIRST, PLAN["A"][0], FILLER[0], FOURTH, "The answer is 4."]), prompt="Q. ")


def kl(p, q):
    return float((p * np.log(p / q)).sum())


class Sampler:
    """Draws what is not yet in the prefix."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, prefix, n):
        return [self.one(prefix) for _ in range(n)]

    def one(self, prefix):
        rng, new = self.rng, []
        if FIRST not in prefix:
            new.append(FIRST)
        plan = next((p for p in "AB" if any(s in prefix for s in PLAN[p])), None)
        if plan is None:
            plan = "A" if rng.random() < 0.9 else "B"
            new.append(PLAN[plan][rng.integers(3)])
        if not any(s in prefix for s in FILLER):
            new.append(FILLER[rng.integers(3)])
        if FOURTH not in prefix:
            new.append(FOURTH if rng.random() < (0.9 if plan == "A" else 0.1) else OTHER)
        if "answer" not in prefix:
            new.append(f"The answer is {'47'[int(rng.random() >= TRUTH[plan][0])]}.")
        return " " + " ".join(new)


def embed(texts):
    """Meaning as one of a few directions, with a little of the wording in it."""
    meanings = [[FIRST], PLAN["A"], PLAN["B"], FILLER, [FOURTH], [OTHER]]
    vectors = np.zeros((len(texts), len(meanings) + 2))
    for i, t in enumerate(texts):
        k = next((k for k, m in enumerate(meanings) if t in m), len(meanings))
        vectors[i, k] = 1
        vectors[i, -1] = 0.02 * (len(t) % 5)
    return vectors


METHOD = Resampling(samples=4000, embed=embed, threshold=0.8, resamples=50)


@pytest.fixture(scope="module")
def bank():
    return METHOD.bank(Sampler(), TRACE)


def test_counterfactual_and_resampling_importance_are_the_known_ones(bank):
    table = METHOD.importance(bank, gold="4")
    assert kl(TRUTH["B"], TRUTH["A"]) == pytest.approx(1.906, abs=1e-3)
    assert table["counterfactual_kl"][1] == pytest.approx(kl(TRUTH["B"], TRUTH["A"]), rel=0.1)
    assert table["resampling_kl"][1] == pytest.approx(kl(BEFORE_PLAN, TRUTH["A"]), abs=0.03)
    assert table["resampling_kl"][[0, 2, 3]].max() < 0.01
    assert table["counterfactual_kl"][[0, 2]].isna().all()
    assert list(table["different"][[0, 2]]) == [0, 0]
    assert table["different_fraction"][1] == pytest.approx(0.1, abs=0.02)
    assert table["overdetermined"][0] == 1 - 1 / 4000
    assert table["overdetermined"][2] == 1 - 3 / 4000
    low, value, high = (table[f"counterfactual_kl{x}"][1] for x in ("_low", "", "_high"))
    assert low < value < high
    assert low < kl(TRUTH["B"], TRUTH["A"]) < high


def test_signs_of_the_accuracies_are_as_named(bank):
    table = METHOD.importance(bank, gold="4")
    assert table["resampling_accuracy_kept_minus_removed"][1] == pytest.approx(0.95 - BEFORE_PLAN[0], abs=0.02)
    assert table["counterfactual_accuracy_removed_minus_kept"][1] == pytest.approx(0.2 - 0.95, abs=0.06)


def test_what_is_wrong_would_be_seen(bank):
    """Each of these mistakes gives another number than the one that the test above asks for."""
    known = kl(TRUTH["B"], TRUTH["A"])
    reverse = kl(TRUTH["A"], TRUTH["B"])
    assert abs(reverse - known) > 0.1 * known
    everything = METHOD.importance(bank)["resampling_kl"][1]  # no filter
    assert abs(everything - known) > 0.1 * known
    shuffled = Bank(TRACE, (*bank.texts[:1], *bank.texts[:-1]), (*bank.answers[:1], *bank.answers[:-1]))
    assert not METHOD.importance(shuffled)["counterfactual_kl"][1] > 0.5 * known


def test_hundred_texts_are_enough_to_tell_the_plan():
    method = Resampling(samples=100, embed=embed, threshold=0.8, resamples=0)
    tables = [method.importance(method.bank(Sampler(seed), TRACE)) for seed in range(20)]
    counterfactual = np.array([t["counterfactual_kl"][1] for t in tables])
    resampling = np.array([t["resampling_kl"][1] for t in tables])
    assert np.nanmedian(counterfactual) >= 1.2
    assert np.nanmedian(counterfactual) >= 10 * np.median(resampling)
    assert max(t["resampling_kl"][2] for t in tables) <= 0.1


def test_sentences_move_later_ones_as_known(bank):
    moves = METHOD.moves(bank)
    assert moves.dims == ("source", "target")
    assert float(moves[1, 3]) == pytest.approx(0.9 - 0.82, abs=0.03)
    assert abs(float(moves[0, 3])) < 0.03
    assert abs(float(moves[2, 3])) < 0.03
    assert np.isnan(moves.to_numpy()[np.tril_indices(5)]).all()
    assert np.isfinite(moves.to_numpy()[np.triu_indices(5, 1)]).all()


def test_moves_against_a_plain_count():
    method = Resampling(samples=30, embed=exact, resamples=0)
    bank = method.bank(Sampler(3), TRACE)

    def share(i, j):
        return np.mean([TRACE.sentences[j].text in t for t in bank.texts[i]])

    moves = method.moves(bank)
    for i in range(5):
        for j in range(i + 1, 5):
            assert float(moves[i, j]) == pytest.approx(share(i + 1, j) - share(i, j))


def test_forced_answers_are_asked_with_the_force_and_compared(bank):
    asked = []

    def sampler(prefix, n):
        asked.append(prefix)
        # all that is known is the plan: without it 4 or 7, with it always 4
        return ["4}"] * n if "plan A" in prefix else ["4}", "7}"] * (n // 2)

    method = Resampling(samples=10, embed=embed, resamples=20)
    forced = method.bank(sampler, TRACE, force=r" So \boxed{")
    assert all(p.endswith(r" So \boxed{") for p in asked)
    assert asked[1] == "Q. " + FIRST + r" So \boxed{"
    table = method.importance(method.bank(Sampler(), TRACE), forced, gold="4")
    expected = 0.5 * np.log(0.5 / 1) + 0.5 * np.log(0.5 / (1e-9 / 10))
    assert table["forced_kl"].round(6).tolist() == pytest.approx([0, expected, 0, 0, 0], rel=1e-4)
    assert table["forced_accuracy_kept_minus_removed"].tolist() == [0, 0.5, 0, 0, 0]
    with pytest.raises(InputError, match="made with force"):
        method.importance(forced)
    with pytest.raises(InputError, match="same trace"):
        method.importance(bank, bank)


def test_divergence_by_hand():
    assert answer_kl([1, 1], [1, 1]) == 0
    assert answer_kl([8, 2], [5, 5], 1e-12) == pytest.approx(0.8 * np.log(1.6) + 0.2 * np.log(0.4))
    assert np.isnan(answer_kl([0, 0], [1, 1]))
    assert np.isnan(answer_kl([1, 1], [0, 0]))
    # what neither has is left out, also from Laplace's rule
    assert answer_kl([3, 1, 0], [1, 3, 0], 1) == answer_kl([3, 1], [1, 3], 1)
    assert answer_kl([3, 1], [1, 3], 1) == pytest.approx(4 / 6 * np.log(2) + 2 / 6 * np.log(0.5))
    rng = np.random.default_rng(0)
    p, q = rng.integers(0, 5, (2, 7, 4)) + 1
    assert np.allclose(answer_kl(p, q), [answer_kl(a, b) for a, b in zip(p, q, strict=True)])


def test_texts_without_answers_are_left_out_and_counted():
    answers = {"x": None, "y": "1", "z": "2"}
    trace = Trace.of("One is here now. Two is here now.")
    texts = (("x", "y", "z"), ("x", "x", "x"), ("y", "y", "z"))
    bank = Bank(trace, texts, tuple(tuple(answers[t] for t in row) for row in texts))
    counts, vocabulary = bank.counts()
    assert vocabulary == ["1", "2"]
    assert counts.tolist() == [[1, 1], [0, 0], [2, 1]]
    table = Resampling(embed=exact, resamples=5).importance(bank)
    assert table["resampling_kl"].isna().all()
    assert table["different"].tolist() == [2, 0]
    empty = Bank(trace, texts, tuple((None,) * 3 for _ in texts))
    assert Resampling(embed=exact, resamples=5).importance(empty)["resampling_kl"].isna().all()


def test_wrong_samplers_and_parameters_are_named():
    method = Resampling(samples=3)
    with pytest.raises(InputError, match="must give 3 texts"):
        method.bank(lambda prefix, n: ["a"], TRACE)
    with pytest.raises(InputError, match="must give 3 texts"):
        method.bank(lambda prefix, n: "abc", TRACE)
    with pytest.raises(InputError, match="sampler failed before sentence 0"):
        method.bank(lambda prefix, n: 1 / 0, TRACE)
    with pytest.raises(InputError, match="answer= failed"):
        Resampling(samples=3, answer=lambda t: 1 / 0).bank(Sampler(), TRACE)  # type: ignore
    for wrong in ({"samples": 0}, {"threshold": 2.0}, {"smoothing": 0.0}, {"resamples": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Resampling(**wrong)


# ---------------------------------------------------------------- a language model


@pytest.fixture(scope="module")
def network():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=12, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    return LanguageModel(model.eval(), words(["Q", "one", "two", "three", "is", "answer", ".", "4", "7", "so"]))


LM_TRACE = Trace.of("one is two . so answer is 4 .", prompt="Q ", shortest=5)


def test_a_language_model_is_asked_from_the_tokens_before_each_sentence(network):
    method = Resampling(samples=5, max_tokens=6, temperature=1.0, top_p=1.0, seed=3)
    bank = method.bank(network, LM_TRACE)
    tokens = LM_TRACE.tokens(network.tokenizer)
    assert [len(tokens.prefix(i)) for i in range(3)] == [1, 5, 10]
    for i in range(3):
        alone = network.generate([tokens.prefix(i)], samples=5, max_tokens=6, temperature=1.0, top_p=1.0, seed=3)[0]
        assert list(bank.texts[i]) == alone
    assert method.bank(network, LM_TRACE).texts == bank.texts
    other = Resampling(samples=5, max_tokens=6, temperature=1.0, top_p=1.0, seed=4).bank(network, LM_TRACE)
    assert other.texts != bank.texts


def test_forced_tokens_stand_before_the_answer(network):
    method = Resampling(samples=2, max_tokens=3, temperature=0.0)
    bank = method.bank(network, LM_TRACE, force="answer is ")
    tokens = LM_TRACE.tokens(network.tokenizer)
    ids = network.tokenizer("answer is", add_special_tokens=False)["input_ids"]
    assert bank.texts[1][0] == network.generate([tokens.prefix(1) + ids], max_tokens=3)[0][0]


def test_many_samples_are_split_to_fit_memory_and_all_there(network):
    method = Resampling(samples=7, max_tokens=4, temperature=1.0)
    prefixes = [[1] * n for n in (3, 5, 9)]
    assert method._parts(network, prefixes) == [(slice(0, 3), 7, 44)]
    a = network.anatomy
    a_token = 8 * a.n_layers * a.n_kv_heads * a.d_head
    long = Resampling(samples=7, max_tokens=2**30 // (a_token * 3))
    parts = long._parts(network, prefixes)
    assert [(p.start, p.stop, n) for p, n, _ in parts] == [(i, i + 1, n) for i in range(3) for n in (2, 2, 2, 1)]
    assert len({seed for _, _, seed in parts[:4]}) == 4


def test_without_prompt_there_is_nothing_to_go_on_from(network):
    with pytest.raises(InputError, match="give the prompt"):
        Resampling(samples=2).bank(network, Trace.of("one is two . so answer is 4 .", shortest=5))


def test_cost_is_counted(network):
    runner = Runner(progress=False)
    Resampling(samples=2, max_tokens=3).bank(network, LM_TRACE, runner=runner)
    assert runner.cost("resampling").forward == 3 * (1 + 2 * 2)
