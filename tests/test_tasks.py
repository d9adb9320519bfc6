import re

import pytest
import torch

from language_families import tiny, word_tokenizer
from nissl.errors import InputError
from nissl.network import LanguageModel, Pass
from nissl.sources import tasks
from nissl.sources.tasks import PromptPairs

GENERATORS = [
    tasks.indirect_object,
    tasks.greater_than,
    lambda n, seed: tasks.greater_than(n, seed, digits=2),
    tasks.subject_verb_agreement,
    tasks.factual_recall,
    lambda n, seed: tasks.factual_recall(n, seed, hops=2, distractors=2),
]


@pytest.mark.parametrize("make", GENERATORS)
def test_pairs_are_seeded_distinct_and_differ_in_few_words(make):
    a, b, c = make(30, 1), make(30, 1), make(30, 2)
    assert a == b != c
    assert len(a) == len(set(zip(a.clean, a.corrupted, strict=True))) == 30
    for clean, corrupted in zip(a.clean, a.corrupted, strict=True):
        one, other = clean.split(), corrupted.split()
        assert len(one) == len(other)
        assert sum(x != y for x, y in zip(one, other, strict=True)) == 1


def test_the_indirect_object_is_who_does_not_give():
    pairs = tasks.indirect_object(48, seed=3)
    assert set(pairs.kinds) == {f"{order} {i}" for order in ("ABBA", "BABA") for i in range(len(tasks.IOI_TEMPLATES))}
    for clean, corrupted, (io,), (s,), kind in zip(
        pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, pairs.kinds, strict=True
    ):
        named = [w for w in re.findall(r"\w+", clean) if w in tasks.NAMES]
        assert len(named) == 3
        assert (named[0] == named[2]) == kind.startswith("BABA")
        assert f" {named[2]}" == s
        assert {f" {n}" for n in named} == {io, s}
        # the other one gives in the corrupted prompt, so the answers change places
        assert [w for w in re.findall(r"\w+", corrupted) if w in tasks.NAMES] == [*named[:2], io.strip()]


def test_orders_of_the_indirect_object():
    assert all(k.startswith("ABBA") for k in tasks.indirect_object(6, order="ABBA").kinds)
    with pytest.raises(InputError, match="ABBA"):
        tasks.indirect_object(order="AABB")
    with pytest.raises(InputError, match=r"\{a\}"):
        tasks.indirect_object(templates=["{a} gave a book to"])


@pytest.mark.parametrize("digits", [1, 2])
def test_later_years_are_greater(digits):
    pairs = tasks.greater_than(40, seed=0, digits=digits)
    for clean, corrupted, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, strict=True):
        first, end = re.findall(r"\d+", clean)
        begin = int(first[2:][:digits])
        assert first[:2] == end
        assert right
        assert all(len(y) == digits for y in (*right, *wrong))
        assert min(map(int, right)) == begin + 1
        assert max(map(int, right)) == 10**digits - 1
        assert max(map(int, wrong)) == begin - 1
        # the corrupted year is the earliest, so that nothing is ruled out
        assert int(re.findall(r"\d+", corrupted)[0][2:][:digits]) <= min(map(int, wrong))


def test_the_verb_agrees_with_the_first_noun():
    pairs = tasks.subject_verb_agreement(60, seed=0)
    seen = set()
    for clean, corrupted, (right,), (wrong,), kind in zip(
        pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, pairs.kinds, strict=True
    ):
        subject = clean.split()[1]
        assert (right in (" are", " were", " have")) == subject.endswith("s") == kind.endswith("plural")
        assert corrupted.split()[1].endswith("s") != subject.endswith("s")
        assert corrupted.split()[2:] == clean.split()[2:]
        assert (right, wrong)[:: -1 if subject.endswith("s") else 1] in tasks.VERBS
        seen.add((kind, clean.split()[-1].endswith("s")))
    assert len(seen) > 10  # structures, numbers, and both numbers of the noun in between
    with pytest.raises(InputError, match="simple"):
        tasks.subject_verb_agreement(templates=["passive"])


@pytest.mark.parametrize("hops", [1, 2])
def test_facts_are_those_of_the_table(hops):
    pairs = tasks.factual_recall(60, seed=0, hops=hops)
    for prompt, (answer,) in [
        *zip(pairs.clean, pairs.answers, strict=True),
        *zip(pairs.corrupted, pairs.wrong, strict=True),
    ]:
        (row,) = [c for c in tasks.COUNTRIES if re.search(rf"\b({c[0]}|{c[1]})\b", prompt)]
        assert answer.strip() in row
        if hops == 2:
            assert row[0] not in prompt  # the country itself is not named
            assert answer.strip() == row[2]


def test_distractors_are_true_and_about_others():
    pairs = tasks.factual_recall(12, seed=0, distractors=3)
    for clean, corrupted, (answer,) in zip(pairs.clean, pairs.corrupted, pairs.answers, strict=True):
        *said, question = clean.split(". ")
        assert corrupted.split(". ")[:-1] == said
        assert len(said) == 3
        for sentence in said:
            capital, country = sentence.split(" is the capital of ")
            assert (country, capital) in {c[:2] for c in tasks.COUNTRIES}
            assert country not in question
            assert answer.strip() != country
    with pytest.raises(InputError, match="distractors"):
        tasks.factual_recall(distractors=100)


def test_more_prompts_than_there_are():
    with pytest.raises(InputError, match="different pairs"):
        tasks.subject_verb_agreement(5000, templates=["simple"])


def test_coding_prompts_name_no_language():
    prompts = tasks.coding_prompts(100, seed=1)
    assert len(set(prompts)) == 100
    assert prompts == tasks.coding_prompts(100, seed=1) != tasks.coding_prompts(100, seed=2)
    assert tasks.coding_prompts(10, seed=1) == prompts[:10]
    languages = r"\b(Python|Java|JavaScript|C\+\+|Rust|Ruby|Go|Julia|Haskell|Perl|SQL|def|import|lambda)\b"
    assert not any(re.search(languages, p) for p in prompts)
    with pytest.raises(InputError, match="coding prompts"):
        tasks.coding_prompts(10_000)


def test_pairs_are_checked():
    def pair(**changed):
        columns = dict(clean=("a",), corrupted=("b",), answers=((" x",),), wrong=((" y",),), kinds=("k",))
        return PromptPairs("t", **{**columns, **changed})

    assert len(pair()) == 1
    for wrong, text in [
        (dict(clean=("a", "b")), "one entry"),
        (dict(clean=(" ",)), "empty"),
        (dict(answers=((),)), "needs right and wrong"),
        (dict(wrong=((" x",),)), "needs right and wrong"),
        (dict(clean=(), corrupted=(), answers=(), wrong=(), kinds=()), "one pair"),
    ]:
        with pytest.raises(InputError, match=text):
            pair(**wrong)


def test_some_of_the_pairs():
    pairs = tasks.indirect_object(8)
    assert pairs[2:4].clean == pairs.clean[2:4]
    assert pairs[[5, 1]].answers == (pairs.answers[5], pairs.answers[1])
    with pytest.raises(InputError, match="one pair"):
        pairs[8:]


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def words():
    """A tiny model whose tokens are words; names, verbs and punctuation are in its vocabulary."""
    net = tiny("gpt2")
    vocabulary = ["the", "a", "b", "c", "x", "y", "gave", "to", "took", "."]
    return LanguageModel(net.module, word_tokenizer(vocabulary))


def pairs(**changed):
    columns = dict(
        clean=("a gave x to", "the b took", "a gave y to"),
        corrupted=("b gave x to", "the c took", "c gave y to"),
        answers=((" b",), (" x", " y"), (" c",)),
        wrong=((" a",), (" c",), (" a",)),
        kinds=("gave", "took", "gave"),
    )
    return PromptPairs("t", **{**columns, **changed})


def test_aligned_pairs_stay(words):
    assert pairs().aligned(words) == pairs()
    groups = pairs().by_length(words)
    assert [g.clean for g in groups] == [("the b took",), ("a gave x to", "a gave y to")]


def test_pairs_that_do_not_fit_the_tokenizer_are_named_or_dropped(words):
    longer = pairs(corrupted=("b gave x to", "the c c took", "c gave y to"))
    with pytest.raises(InputError, match="1 of 3 pairs do not fit this tokenizer, first pair 1: 3 tokens"):
        longer.aligned(words)
    assert longer.aligned(words, drop=True) == longer[[0, 2]]
    several = pairs(answers=((" b",), (" x", " x y"), (" c",)))
    with pytest.raises(InputError, match=r"pair 1: ' x y' is 2 tokens"):
        several.aligned(words)
    with pytest.raises(InputError, match="2 of 2"):
        several[[1, 1]].aligned(words, drop=True)


def test_the_target_is_the_logit_difference_or_the_log_odds(words):
    some = pairs()
    logits = [words.run(Pass(words.encode(p))).output[0, -1] for p in some.clean]
    ids = {w: words.token(f" {w}") for w in "abcxy"}
    expected = [
        logits[0][ids["b"]] - logits[0][ids["a"]],
        torch.logaddexp(logits[1][ids["x"]], logits[1][ids["y"]]) - logits[1][ids["c"]],
        logits[2][ids["c"]] - logits[2][ids["a"]],
    ]
    found = some.differences(words)
    assert found.shape == (3, 2)
    assert found[:, 0] == pytest.approx([e.item() for e in expected])
    assert some.target(words).name == "log_odds"
    single = some[[0, 2]]
    assert single.target(words).name == "logit_difference"
    assert single.differences(words)[:, 0] == pytest.approx(found[[0, 2], 0])
    # all rows of one group at once
    (together,) = single.by_length(words)
    answer = words.run(Pass(words.encode(list(together.clean)), of=together.target(words)))
    assert answer.scalar.tolist() == pytest.approx(found[[0, 2], 0].tolist())


@pytest.mark.slow
def test_smollm2_can_do_the_tasks(smollm2):
    for make in (tasks.indirect_object, tasks.greater_than, tasks.factual_recall):
        some = make(16, seed=0).aligned(smollm2, drop=True)
        difference = some.differences(smollm2)
        assert len(some) >= 12
        assert (difference[:, 0] > 0).mean() >= 0.75
        assert (difference[:, 0] > difference[:, 1]).mean() >= 0.9
