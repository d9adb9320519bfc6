"""Evaluation of decoders: folds, scores against scikit-learn, chance, intervals and tests with known answers."""

import numpy as np
import pytest
from scipy.stats import wilcoxon
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import GridSearchCV

from nissl.errors import InputError
from nissl.recordings.evaluate import BlockedKFold, compare, compare_over_sets, evaluate, splits, stouffer


def data(n=100, effect=1.5, classes=2, seed=0):
    g = np.random.default_rng(seed)
    y = np.arange(n) % classes
    X = g.standard_normal((n, 4))
    X[:, 0] += effect * y
    return X, y


def test_blocks_are_runs_with_a_gap_on_both_sides():
    folds = list(BlockedKFold(4, gap=2).split(np.zeros(20)))
    assert [t.tolist() for _, t in folds][1] == [5, 6, 7, 8, 9]
    assert folds[1][0].tolist() == [0, 1, 2, *range(12, 20)]
    assert folds[0][0].tolist() == list(range(7, 20))
    assert sorted(np.concatenate([t for _, t in folds])) == list(range(20))


def test_groups_stay_together_and_classes_keep_their_shares():
    y = np.arange(60) % 2
    groups = np.repeat(np.arange(6), 10)
    for train, test in splits(y, "grouped", 3, groups=groups):
        assert not set(groups[train]) & set(groups[test])
    for _, test in splits(y, "stratified", 5):
        assert y[test].mean() == 0.5


def test_blocked_folds_are_not_fooled_by_slow_drift():
    """Labels in long runs and a drift that follows time: shuffled folds decode it, blocks do not."""
    g = np.random.default_rng(0)
    n = 200
    y = np.repeat(np.arange(20) % 2, 10)
    drift = np.repeat(g.standard_normal(20), 10)[:, None] + 0.005 * g.standard_normal((n, 1))
    from sklearn.neighbors import KNeighborsClassifier

    knn = {"knn": KNeighborsClassifier(1)}
    shuffled = evaluate(knn, drift, y, metric="accuracy", permutations=0, progress=False)
    blocked = evaluate(knn, drift, y, split="blocked", n_splits=10, metric="accuracy", permutations=0, progress=False)
    assert shuffled.decoded["knn"].score.value > 0.9
    assert blocked.decoded["knn"].score.value < 0.7


def test_scores_equal_those_of_scikit_learn():
    X, y = data()
    model = LinearDiscriminantAnalysis()
    for metric, of in (("auc", None), ("accuracy", None), ("balanced accuracy", None)):
        found = evaluate({"lda": model}, X, y, metric=metric, permutations=0, progress=False)
        one = found.decoded["lda"]
        per_fold = []
        for train, test in found.folds:
            fitted = LinearDiscriminantAnalysis().fit(X[train], y[train])
            predicted = fitted.predict(X[test])
            per_fold.append({"auc": roc_auc_score(y[test], fitted.decision_function(X[test])),
                             "accuracy": (predicted == y[test]).mean(),
                             "balanced accuracy": balanced_accuracy_score(y[test], predicted)}[metric])  # fmt: skip
            assert of is None
        assert np.allclose(one.folds, per_fold)
        assert one.score.value == pytest.approx(np.mean(per_fold))
        assert one.score.low < one.score.value < one.score.high
        assert one.confusion.sum() == 100
        assert one.confusion.trace() == (one.predicted == y).sum()


def test_auc_with_ties_is_that_of_scikit_learn():
    X, y = data()
    found = evaluate({"none": DummyClassifier()}, X, y, permutations=0, progress=False)
    assert found.decoded["none"].score.value == 0.5
    steps = (X[:, :1] > 0).astype(float)
    found = evaluate({"one": LogisticRegression()}, steps, y, permutations=0, progress=False)
    for (_, test), score in zip(found.folds, found.decoded["one"].folds, strict=True):
        assert score == pytest.approx(roc_auc_score(y[test], steps[test, 0]))


@pytest.mark.parametrize("refit", [False, True])
def test_chance_is_where_it_must_be_and_p_has_its_resolution(refit):
    X, y = data(60)
    found = evaluate({"lda": LinearDiscriminantAnalysis()}, X, y, permutations=49, refit=refit, progress=False)
    one = found.decoded["lda"]
    assert one.smallest_p == 1 / 50
    assert one.p == 1 / 50
    assert 0.4 < one.chance < 0.6
    assert one.chance_band[0] < 0.5 < one.chance_band[1] < one.score.value
    assert one.permutation == ("refit" if refit else "predictions")


def test_p_is_uniform_enough_without_an_effect():
    p = []
    for seed in range(40):
        X, y = data(40, 0.0, seed=seed)
        one = evaluate({"lda": LinearDiscriminantAnalysis()}, X, y, permutations=99, progress=False, seed=seed)
        p.append(one.decoded["lda"].p)
    assert np.mean(np.array(p) <= 0.1) <= 0.25
    assert 0.3 < np.mean(p) < 0.7


def test_a_searching_decoder_is_fitted_in_each_training_set():
    X, y = data()
    search = GridSearchCV(LogisticRegression(), {"C": [0.01, 1.0]}, cv=3)
    found = evaluate({"search": search}, X, y, permutations=0, progress=False)
    assert len(found.decoded["search"].chosen) == 5
    assert all("C" in c for c in found.decoded["search"].chosen)


def test_three_classes_are_scored_by_accuracy():
    X, y = data(90, 3.0, 3)
    found = evaluate(
        {"lda": LinearDiscriminantAnalysis(), "none": DummyClassifier()}, X, y, permutations=99, progress=False
    )
    assert found.metric == "accuracy"
    assert found.best == "lda"
    assert found.decoded["lda"].values is None
    assert found.decoded["lda"].chance == pytest.approx(1 / 3, abs=0.03)
    table = found.table()
    assert table.loc["lda", "p_holm"] == pytest.approx(2 * table.loc["lda", "p"])


def test_decoders_are_compared_in_pairs():
    X, y = data(200)
    decoders = {"lda": LinearDiscriminantAnalysis(), "none": DummyClassifier(), "same": LinearDiscriminantAnalysis()}
    found = compare(evaluate(decoders, X, y, permutations=0, progress=False), "lda")
    assert found.loc["none", "p_holm"] < 0.01
    assert found.loc["none", "high"] < 0
    assert found.loc["same", "difference"] == 0
    assert found.loc["same", "p"] == 1
    alone = evaluate({"lda": LinearDiscriminantAnalysis()}, X, y, permutations=0, progress=False)
    assert len(compare(alone)) == 0


def test_sets_are_compared_and_combined():
    a, b = np.array([0.8, 0.7, 0.9, 0.75, 0.85]), np.array([0.7, 0.65, 0.8, 0.74, 0.8])
    assert compare_over_sets(a, b)[1] == 1 / 32
    difference, p = compare_over_sets(a, b, test="wilcoxon")
    assert difference == pytest.approx((a - b).mean())
    assert p == pytest.approx(wilcoxon(a - b, alternative="greater").pvalue)
    assert compare_over_sets(a, a, test="wilcoxon") == (0.0, 1.0)
    assert stouffer([0.05]) == pytest.approx(0.05)
    assert stouffer([0.5, 0.5]) == pytest.approx(0.5)
    assert stouffer([0.05, 0.05]) == pytest.approx(0.0100, abs=1e-4)
    assert stouffer([0.05, 0.9], [3, 0.001]) == pytest.approx(0.05, abs=1e-3)


X, Y = data(20)
LDA = {"lda": LinearDiscriminantAnalysis()}
BAD = {
    "labels of another length": (lambda: evaluate(LDA, X, Y[:-1]), "label"),
    "one class": (lambda: evaluate(LDA, X, np.zeros(20)), "nothing to tell apart"),
    "few trials": (lambda: evaluate(LDA, X, [0] * 17 + [1] * 3), "fewer than 5 folds"),
    "no decoder": (lambda: evaluate({}, X, Y), "no decoder"),
    "groups missing": (lambda: splits(Y, "grouped"), "needs groups"),
    "few groups": (lambda: splits(Y, "grouped", groups=np.arange(20) % 3), "3 groups"),
    "blocks without a class": (lambda: splits(np.repeat([0, 1], 10), "blocked", 2), "no trial of class"),
    "block of one class": (lambda: evaluate(LDA, X, np.repeat([0, 1], 10), split="blocked"), "one class only"),
    "auc of three": (lambda: evaluate(LDA, X[:18], np.arange(18) % 3, metric="auc"), "two classes"),
    "decoder that fails": (
        lambda: evaluate(LDA, np.full((20, 4), np.nan), Y, progress=False),
        "'lda' failed in fold 1",
    ),
    "reference": (lambda: compare(evaluate(LDA, X, Y, progress=False), "svm"), "no decoder 'svm'"),
    "stouffer": (lambda: stouffer([0.0, 0.5]), "values in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    act, match = BAD[case]
    with pytest.raises(InputError, match=match):
        act()
