"""Sentences of a trace: places, tokens, answers, likeness, tags."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nissl.attribution.sentences import (
    TAGS,
    TfidfEmbedder,
    Trace,
    boxed,
    by_tag,
    cosines,
    default_embedder,
    exact,
    final_answer,
    label_by_rules,
    last_number,
    normal,
    split_sentences,
)
from nissl.errors import InputError


def texts(found):
    return [s.text for s in found]


def words(vocabulary, **special):
    made = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["?", *vocabulary, *special.values()])}, unk_token="?")
    )
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


# ---------------------------------------------------------------- cutting


def test_sentences_end_with_marks_before_white_space_and_at_empty_lines():
    text = "First we add 3.5 and 2. Is it right?\nYes it is!  A heading without end\n\nThe value is 5.5. And then"
    found = split_sentences(text)
    assert texts(found) == [
        "First we add 3.5 and 2.", "Is it right?", "Yes it is!", "A heading without end", "The value is 5.5.",
    ]  # fmt: skip
    assert all(text[s.start : s.end] == s.text for s in found)
    assert texts(split_sentences(text, keep_tail=True))[-1] == "The value is 5.5. And then"  # a tail of 8 characters


def test_short_pieces_join_the_next_and_the_last_joins_the_one_before():
    assert texts(split_sentences("So. We have 12 apples. Yes.")) == ["So. We have 12 apples. Yes."]
    assert texts(split_sentences("Wait. No. We have 12 apples. It is an even number.")) == [
        "Wait. No. We have 12 apples.", "It is an even number.",
    ]  # fmt: skip
    assert texts(split_sentences("a b. c d. e f.", shortest=1)) == ["a b.", "c d.", "e f."]
    assert texts(split_sentences("No. ")) == ["No."]
    assert split_sentences("   \n\n ") == split_sentences("") == []


def test_only_what_lies_between_think_tags_is_cut():
    text = "Question one. <think>\nWe begin here now. Then we end it.\n</think>\nThe answer is 3."
    found = split_sentences(text)
    assert texts(found) == ["We begin here now.", "Then we end it."]
    assert text[found[0].start :].startswith("We begin")
    assert texts(split_sentences("It goes on here. And it ends.</think> The answer is 3.")) == [
        "It goes on here.", "And it ends.",
    ]  # fmt: skip


@given(st.text(alphabet="ab .?!\n", max_size=60), st.integers(1, 12), st.booleans())
def test_sentences_are_places_in_order_that_leave_only_white_space_out(text, shortest, keep_tail):
    found = split_sentences(text, shortest=shortest, keep_tail=keep_tail)
    at = 0
    for s in found:
        assert s.text == text[s.start : s.end] == s.text.strip() != ""
        assert not text[at : s.start].strip()
        at = s.end
    assert len(found) < 2 or all(len(s.text) >= shortest for s in found)
    if keep_tail:
        assert not text[at:].strip()


def test_prefixes_are_cut_by_place_even_where_sentences_are_equal():
    text = "We add one more. We add one more. We add one more."
    trace = Trace.of(text, prompt="Q: ")
    assert [trace.prefix(i) for i in range(4)] == ["Q: " + text[:n] for n in (0, 16, 33, 50)]
    with pytest.raises(InputError, match="no prefix 4"):
        trace.prefix(4)


def test_a_trace_needs_two_sentences_and_a_text():
    with pytest.raises(InputError, match="has 1 sentence"):
        Trace.of("Only this one.")
    with pytest.raises(InputError, match="shortest"):
        split_sentences("a", shortest=0)


# ---------------------------------------------------------------- tokens


def test_tokens_belong_to_the_sentence_of_their_first_visible_character():
    tokenizer = words(["Q:", "so", "we", "add", ".", "it", "is", "two", "<s>"], bos_token="<b>", eos_token="<e>")
    trace = Trace.of("so we add . it is two .", prompt="Q: ", shortest=5)
    found = trace.tokens(tokenizer)
    assert found.spans == ((1, 5), (5, 9))
    assert found.prefix(0) == found.ids[:1]
    assert found.prefix(1) == found.ids[:5]
    assert found.prefix(2) == found.ids
    assert np.allclose(found.means().numpy(), [[0] + [0.25] * 4 + [0] * 4, [0] * 5 + [0.25] * 4])


def test_byte_level_tokens_with_leading_and_lonely_spaces():
    # single characters: the space before a sentence is a token of its own, and belongs to what follows
    text = "ab. cd!\n\nef."
    vocabulary = {c: i for i, c in enumerate(sorted(set(text)))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    trace = Trace.of(text, shortest=1)
    found = trace.tokens(PreTrainedTokenizerFast(tokenizer_object=made))
    assert found.spans == ((0, 3), (3, 7), (7, 12))


def test_a_tokenizer_without_places_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="fast tokenizer"):
        Trace.of("One is here now. Two is here now.").tokens(Slow())


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{3} no, \boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{a{b}c}", "a{b}c"),
        ("The answer is 1,204.50. Done.", "1204.5"),
        ("Answer: $-7$", "-7"),
        ("the final answer is blue. Then more.", "blue"),
        ("answer is 4 .", "4"),
        ("we have 3 and 4", None),
        (r"open \boxed{3", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_answers_have_one_spelling():
    assert normal("007") == normal("7.0") == normal(" $7$ ") == normal(r"\text{7}.") == "7"
    assert normal("0.50") == "0.5"
    assert normal("0") == normal("-0.0").lstrip("-") == "0"
    assert normal("$ $") is None
    assert last_number("first 3, then 1,000.") == "1000"
    assert last_number("none") is None
    assert boxed("none") is None


# ---------------------------------------------------------------- likeness


def test_cosines_are_those_of_the_vectors_and_empty_texts_are_like_nothing():
    vectors = {"a": [1.0, 0.0], "b": [3.0, 4.0], "c": [0.0, -2.0]}
    asked = []

    def embed(given):
        asked.append(given)
        return np.array([vectors[t] for t in given])

    found = cosines(embed, ["a", "b", "a", " "], ["c", "b", ""])
    assert np.allclose(found, [[0, 0.6, 0], [-0.8, 1, 0], [0, 0.6, 0], [0, 0, 0]])
    assert asked == [["a", "b", "c"]]  # equal texts once
    assert cosines(embed, [""], [" "]).tolist() == [[0.0]]


def test_an_embedder_that_gives_something_else_is_named():
    with pytest.raises(InputError, match="one finite vector a text"):
        cosines(lambda t: np.zeros(3), ["a"], ["b"])
    with pytest.raises(InputError, match="one finite vector a text"):
        cosines(lambda t: np.full((len(t), 2), np.nan), ["a"], ["b"])
    with pytest.raises(InputError, match="embedder failed: ZeroDivisionError"):
        cosines(lambda t: 1 / 0, ["a"], ["b"])


def test_tfidf_tells_other_words_from_other_spellings():
    embed = TfidfEmbedder()
    found = cosines(
        embed,
        [
            "So we add three and four.",
            "Now we add three and four.",
            "So we add two and one.",
            "The weather is fine today.",
        ],
        ["So we add three and four."],
    )[:, 0]
    assert found[0] == 1
    assert found[1] > embed.threshold > found[2] > 0.2 > found[3]
    assert cosines(embed, ["..."], ["..."]).shape == (1, 1)
    assert cosines(exact, ["a", "b"], ["a"]).ravel().tolist() == [1, 0]
    assert default_embedder() is default_embedder()


# ---------------------------------------------------------------- tags


def test_rules_label_the_clear_cases():
    cases = {
        "The problem asks for the number of ways.": "problem setup",
        "Let's try a different approach to this.": "plan generation",
        "Recall the formula for the area of a disc.": "fact retrieval",
        "3 * 4 = 12 and 12 + 5 = 17.": "active computation",
        "Wait, I made a mistake there.": "uncertainty management",
        "Therefore there are 17 of them.": "result consolidation",
        "Double-check it with small numbers.": "self-checking",
        r"The answer is \boxed{17}.": "final answer",
        "Zebras.": "unknown",
    }
    assert label_by_rules(list(cases)) == list(cases.values())
    assert set(cases.values()) == set(TAGS)


def test_importance_by_tag_is_within_each_trace():
    tables = [
        pd.DataFrame({"tag": ["plan generation", "unknown", "unknown", "unknown"], "x": [9.0, 1, 1, 1]}),
        pd.DataFrame({"tag": ["plan generation", "unknown", "unknown", "unknown"], "x": [90.0, 10, 10, np.nan]}),
        pd.DataFrame({"tag": ["unknown", "unknown"], "x": [1.0, 1.0]}),
    ]
    found = by_tag(tables, "x")
    assert list(found.index) == ["plan generation", "unknown"]
    assert found.loc["plan generation", "n"] == 2
    assert found.loc["plan generation", "z"] == pytest.approx((3**0.5 + 2**0.5) / 2)
    assert found.loc["unknown", "z"] < 0
    with pytest.raises(InputError, match="no column 'y'"):
        by_tag(tables, "y")
