"""Neurofeedback: axes, labels, effect sizes by hand, and the paradigm on a tiny model and on a stand-in."""

import json

import numpy as np
import pytest
import torch
import transformers
from sklearn.utils.estimator_checks import check_estimator
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from language_families import tiny
from nissl.errors import InputError
from nissl.intervention.feedback import (
    LanguageSubject,
    NeurofeedbackAxis,
    cohens_d,
    control,
    effects,
    final_accuracy,
    ideal_observer,
    labels_of,
    report,
    sentence_states,
    surface_observer,
)
from nissl.network import LanguageModel, Pass
from nissl.studies import neurofeedback as study

SENTENCES = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10 w11", "w12 w13 w14", "w15 w16", "w17 w18", "w19 w20 w1"]


@pytest.fixture(scope="module")
def net():
    """A tiny model whose tokenizer parts words, digits and signs, as real ones do."""
    base = tiny("llama", dtype=torch.float32)
    words = [
        "<pad>",
        "<end>",
        "<unk>",
        "[",
        "Score",
        ":",
        "{",
        "}",
        "]",
        " ",
        "\n",
        "0",
        "1",
        *(f"w{i}" for i in range(1, 21)),
    ]
    words += ["2", "3", "4", "5", "6", "system", "user", "assistant"]
    model = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Split(Regex(r"w\d+|[A-Za-z]+|\d|\s|[^\w\s]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    return LanguageModel(base.module, tokenizer)


def test_an_axis_is_an_estimator():
    check_estimator(NeurofeedbackAxis("pc", 1), on_skip=None)


def test_components_and_regression_by_hand():
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 5)) * [5, 3, 1, 1, 1] + 7
    first, second = (NeurofeedbackAxis("pc", i).fit(x) for i in (1, 2))
    _, s, v = np.linalg.svd(x - x.mean(0))
    np.testing.assert_allclose(np.abs(first.direction_ @ v[0]), 1)
    np.testing.assert_allclose(np.abs(second.direction_ @ v[1]), 1)
    np.testing.assert_allclose(first.explained_variance_ratio_, s[0] ** 2 / (s**2).sum())
    scores = first.decision_function(x)
    np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-12)
    y = x[:, 2] > 7
    lr = NeurofeedbackAxis("lr").fit(x, y)
    assert np.abs(lr.direction_).argmax() == 2
    assert (lr.predict(x) == y).mean() > 0.95
    assert lr.decision_function(x).std() == pytest.approx(1)


def test_labels():
    scores = np.array([-3.0, -2, -1, -0.5, 0, 1, 2, 3, 4, 5])
    assert labels_of(scores).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert labels_of(scores, 6).tolist() == [1, 1, 2, 3, 4, 4, 5, 5, 6, 6]
    assert set(labels_of(scores, 4)) == {1, 2, 3, 4}
    for wrong in (3, 10, 0):
        with pytest.raises(InputError, match="levels"):
            labels_of(scores, wrong)


def test_the_effect_size_by_hand():
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([0.0, 1, 1, 2, 1])
    pooled = ((a - 3) ** 2).sum() / 8 + ((b - 1) ** 2).sum() / 8
    d, half = cohens_d(a, b)
    assert d == pytest.approx((3 - 1) / np.sqrt(pooled))
    assert half == pytest.approx(1.96 * np.sqrt(10 / 25 + d**2 / 20))
    assert cohens_d(b, a)[0] == pytest.approx(-d)


def test_the_report_in_one_pass_equals_a_prompt_for_each_item(net):
    subject = LanguageSubject(net, SENTENCES, layers=[1])
    scores = np.linspace(-1, 1, 8)
    found = report(subject, scores, n_orders=2, n_items=5, seed=3)
    labels = labels_of(scores)
    for o in range(2):
        order = found["item"].values[o]
        for k in range(5):
            text = subject._text(subject._shown(order[: k + 1], labels, 2))
            prompt = text[: text.rindex("{") + 1]
            logits = net.run(Pass(net.encode(prompt))).output[0, -1, [net.token("0"), net.token("1")]]
            assert bool(logits.argmax() == labels[order[k]]) == bool(found["correct"][o, k])
            expected = -logits.log_softmax(-1)[labels[order[k]]]
            assert float(found["cross_entropy"][o, k]) == pytest.approx(float(expected), abs=1e-3)
    assert found["item"].values[0].tolist() == np.random.default_rng(3).permutation(8)[:5].tolist()


def test_states_are_means_over_the_sentence_alone(net):
    subject = LanguageSubject(net, SENTENCES, layers=[0, 2])
    states = sentence_states(subject)
    assert states.shape == (8, 2, 32)
    text = subject._text(
        [("system", "You are a helpful assistant."), ("user", "Say something."), ("assistant", SENTENCES[2])]
    )
    n = len(net.tokenizer(SENTENCES[2])["input_ids"])
    site = net.anatomy.site("resid_post", 2)
    whole = net.run(Pass(net.encode(text), read=[site])).reads[site][0]
    np.testing.assert_allclose(states[2, 1], whole[-n:].mean(0), rtol=1e-4, atol=1e-5)


def test_turning_goals_round_negates_the_effect(net):
    """Swapping high and low is what the labels' design turns on; and without examples nothing differs but the digit."""
    subject = LanguageSubject(net, SENTENCES, layers=[1])
    states = sentence_states(subject)[:, 0]
    axes = {f"pc{i}": [NeurofeedbackAxis("pc", i).fit(states)] for i in (1, 2)}
    scores = {k: a[0].decision_function(states) for k, a in axes.items()}
    found = control(subject, axes, scores, "pc1", n_examples=3, n_runs=3)
    table = effects(found)
    assert table["target"].tolist() == [True, False]
    turned = effects(found.rename(high="low", low="high"))
    np.testing.assert_allclose(turned["d"], -table["d"])
    none = control(subject, axes, scores, "pc1", n_examples=0, n_runs=3)
    np.testing.assert_allclose(none["high"], none["low"], atol=1e-5)
    written = control(subject, axes, scores, "pc1", n_examples=2, n_runs=2, mode="explicit", levels=6)
    assert np.isfinite(written["high"]).all()


def test_observers_know_what_is_there():
    random = np.random.default_rng(1)
    states = random.normal(size=(300, 4))
    axis = NeurofeedbackAxis("pc", 1).fit(states)
    scores = axis.decision_function(states)
    assert ideal_observer(states[:200], scores[:200], states[200:], scores[200:]) > 0.9
    texts = [f"good film {i}" if s >= 0 else f"bad film {i}" for i, s in enumerate(scores)]
    reported = report(study.StandIn(states, np.eye(4)), scores, n_orders=3)
    assert surface_observer(texts, scores, reported, [100])[100] > 0.95
    at = final_accuracy(reported)
    assert at["low"] < at["accuracy"] < at["high"]


def test_wrong_arguments(net):
    subject = LanguageSubject(net, SENTENCES, layers=[1])
    scores = np.linspace(-1, 1, 8)
    axes = {"pc1": [NeurofeedbackAxis("pc", 1).fit(np.random.default_rng(0).normal(size=(8, 32)))]}
    for wrong, says in (
        (lambda: LanguageSubject(net, []), "not empty"),
        (lambda: LanguageSubject(net, ["w1", " "]), r"\[1\]"),
        (lambda: LanguageSubject(net, ["a [Score: {1}]"]), "Score"),
        (lambda: report(subject, scores, n_orders=0), "n_orders"),
        (lambda: report(subject, scores, n_items=9), "n_items"),
        (lambda: report(subject, scores * np.nan), "finite"),
        (lambda: control(subject, axes, {"pc1": scores}, "pc2"), "pc2"),
        (lambda: control(subject, axes, {"pc1": scores}, "pc1", n_examples=8), "held out"),
        (lambda: cohens_d([1.0], [2.0]), "at least 2"),
    ):
        with pytest.raises(InputError, match=says):
            wrong()
    with pytest.raises(ValueError, match="two classes"):
        NeurofeedbackAxis("lr").fit(np.ones((3, 2)), [0, 0, 0])
    with pytest.raises(ValueError, match="index"):
        NeurofeedbackAxis("pc", 3).fit(np.random.default_rng(0).normal(size=(3, 2)))


def test_the_quick_study_says_what_was_built_in():
    claims = study.run(quick=True, progress=False)
    json.dumps(claims)
    # which late axes count as accessible hangs on the number of orders, and is left to the whole study
    assert [c["claim"] for c in claims[:-1] if not c["holds"]] == []
