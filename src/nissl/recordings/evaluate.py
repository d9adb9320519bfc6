"""How well trials can be decoded: cross-validation, chance by permuted labels, intervals, and decoders compared in pairs.

A decoder that searches its own parameters in ``fit`` (GridSearchCV, AugmentedGrid) is fitted within each training set: its evaluation
here is nested.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import Progress
from scipy.stats import norm
from sklearn.base import clone
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from nissl.arguments import at_least
from nissl.errors import InputError, blame
from nissl.recordings.arrays import as_labels
from nissl.trust.statistics import Interval, bootstrap, holm, paired_test

RESAMPLES = 2000


class BlockedKFold:
    """Folds that are runs of trials in the order they were recorded, so that slow drifts do not leak into the test.

    Parameters
    ----------
    n_splits : int, default 5
    gap : int, default 0
        Trials left out of the training set on either side of the test block.
    """

    def __init__(self, n_splits: int = 5, gap: int = 0) -> None:
        at_least("n_splits", n_splits, 2)
        at_least("gap", gap, 0)
        self.n_splits = n_splits
        self.gap = gap

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Number of folds."""
        return self.n_splits

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of indices (train, test)."""
        n = len(X)
        if n < self.n_splits:
            raise InputError(f"{n} trials cannot be split into {self.n_splits} blocks")
        for test in np.array_split(np.arange(n), self.n_splits):
            near = np.arange(max(test[0] - self.gap, 0), min(test[-1] + self.gap + 1, n))
            yield np.setdiff1d(np.arange(n), near), test


def splits(
    y: Any, split: str = "stratified", n_splits: int = 5, *, groups: Any = None, gap: int = 0, seed: int = 0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds as pairs of indices (train, test), checked: all classes are in each training set, no trial is tested twice.

    Parameters
    ----------
    y : array (n_trials,)
    split : {"stratified", "grouped", "blocked"}, default "stratified"
        Shuffled with equal shares of classes; whole groups (sessions, subjects) together; runs of trials in their order.
    n_splits : int, default 5
    groups : array (n_trials,), optional
        For "grouped".
    gap : int, default 0
        For "blocked": trials left out beside the test block.
    seed : int, default 0

    Raises
    ------
    InputError
        One class, fewer trials of a class than folds, fewer groups than folds, or a training set without some class.
    """
    y = np.asarray(y)
    y = as_labels(y, len(y))
    at_least("n_splits", n_splits, 2)
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"all {len(y)} labels are {classes[0]!r}: there is nothing to tell apart")
    if counts.min() < n_splits:
        raise InputError(
            f"class {classes[counts.argmin()]!r} has {counts.min()} trials, fewer than {n_splits} folds: take fewer folds"
        )
    if split == "stratified":
        found = StratifiedKFold(n_splits, shuffle=True, random_state=seed).split(np.zeros(len(y)), y)
    elif split == "blocked":
        found = BlockedKFold(n_splits, gap).split(y)
    elif split == "grouped":
        if groups is None:
            raise InputError("split='grouped' needs groups, one for each trial")
        groups = as_labels(groups, len(y), "groups")
        if len(np.unique(groups)) < n_splits:
            raise InputError(f"{len(np.unique(groups))} groups cannot be split into {n_splits} folds")
        found = StratifiedGroupKFold(n_splits, shuffle=True, random_state=seed).split(np.zeros(len(y)), y, groups)
    else:
        raise InputError(f"split must be 'stratified', 'grouped' or 'blocked', got {split!r}")
    found = [(np.asarray(a), np.asarray(b)) for a, b in found if len(b)]
    for f, (train, _) in enumerate(found):
        missing = sorted(set(classes.tolist()) - set(y[train].tolist()))
        if missing:
            raise InputError(
                f"the training set of fold {f + 1} has no trial of class {missing[0]!r}: take another split"
            )
    return found


@dataclass(frozen=True, eq=False)
class Decoded:
    """What one decoder gave.

    Attributes
    ----------
    name : str
    metric : str
        "auc", "accuracy" or "balanced accuracy".
    score : Interval
        Mean over folds (AUC) or over trials, with the 95 % bootstrap interval over trials. The fitted decoders are held fixed: the
        interval says what other test trials would change, not other training trials.
    folds : array (n_folds,)
    predicted : array (n_trials,)
        Predictions of trials outside of the training set.
    values : array (n_trials,) or None
        Decision values; two classes only.
    fold : array of int (n_trials,)
        The fold that tested each trial, -1 for none.
    confusion : array (n_classes, n_classes)
        Rows are true classes.
    chance : float
        Mean score under permuted labels.
    chance_band : tuple (low, high)
        The middle 95 % of these.
    p : float
        Share of permutations that score as high, the unpermuted labels among them.
    smallest_p : float
        The smallest p that this number of permutations can give.
    permutation : str
        "predictions" (labels permuted within test folds against the predictions there), "refit" (the whole procedure again) or "none".
    chosen : list
        ``best_params_`` of each fold where the decoder searches.
    seconds : float
    """

    name: str
    metric: str
    score: Interval
    folds: np.ndarray
    predicted: np.ndarray
    values: np.ndarray | None
    fold: np.ndarray
    confusion: np.ndarray
    chance: float
    chance_band: tuple[float, float]
    p: float
    smallest_p: float
    permutation: str
    chosen: list[Any] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Decoders side by side on the same folds."""

    decoded: dict[str, Decoded]
    y: np.ndarray
    classes: np.ndarray
    metric: str
    folds: list[tuple[np.ndarray, np.ndarray]]

    @property
    def best(self) -> str:
        """The decoder of the highest score."""
        return max(self.decoded, key=lambda name: float(self.decoded[name].score.value))

    def table(self) -> pd.DataFrame:
        """One row a decoder: score, interval, chance, p and Holm's p over the decoders."""
        rows = {
            n: {"score": float(d.score.value), "low": float(d.score.low), "high": float(d.score.high), "chance": d.chance,
                "p": d.p, "smallest_p": d.smallest_p, "seconds": d.seconds}
            for n, d in self.decoded.items()
        }  # fmt: skip
        found = pd.DataFrame.from_dict(rows, orient="index")
        found["p_holm"] = holm(found["p"].to_numpy())
        return found


def evaluate(
    decoders: Mapping[str, Any], X: Any, y: Any, *, folds: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    split: str = "stratified", n_splits: int = 5, groups: Any = None, gap: int = 0,
    metric: str | None = None,
    permutations: int = 1000, refit: bool = False, seed: int = 0, progress: bool = True,
) -> Evaluation:  # fmt: skip
    """Cross-validate decoders on the same folds.

    Parameters
    ----------
    decoders : dict of name to scikit-learn classifier
        Cloned for each fold.
    X : array (n_trials, ...)
    y : array (n_trials,)
    folds : sequence of (train, test), optional
        Instead of `split`, `n_splits`, `groups` and `gap`; see `splits`.
    metric : {"auc", "accuracy", "balanced accuracy"}, optional
        AUC by default where there are two classes, else accuracy.
    permutations : int, default 1000
        Of the labels, for chance and p; 0 leaves them out.
    refit : bool, default False
        Permute the labels of everything and run the whole procedure again for each permutation, within groups where they are
        given. Exact and slow. By default labels are permuted within each test fold against the predictions made there.
    seed : int, default 0
    progress : bool, default True

    Returns
    -------
    Evaluation

    References
    ----------
    Ojala, M. & Garriga, G. (2010). Permutation tests for studying classifier performance. JMLR 11, 1833-1863.
    Phipson, B. & Smyth, G. K. (2010). Permutation p-values should never be zero. SAGMB 9(1), 39.
    """
    y = as_labels(y, len(X))
    if not decoders:
        raise InputError("there is no decoder to evaluate")
    at_least("permutations", permutations, 0)
    at_least("seed", seed, 0)
    if folds is None:
        folds = splits(y, split, n_splits, groups=groups, gap=gap, seed=seed)
    folds = [(np.asarray(a), np.asarray(b)) for a, b in folds]
    classes = np.unique(y)
    kind = metric or ("auc" if len(classes) == 2 else "accuracy")
    if kind not in ("auc", "accuracy", "balanced accuracy"):
        raise InputError(f"metric must be 'auc', 'accuracy' or 'balanced accuracy', got {metric!r}")
    if kind == "auc" and len(classes) != 2:
        raise InputError(f"AUC is of two classes, y has {len(classes)}: take metric='accuracy'")
    if kind == "auc" and any(len(np.unique(y[test])) < 2 for _, test in folds):
        raise InputError(
            "a test fold holds one class only: AUC cannot be had there; take metric='accuracy' or another split"
        )
    found = {}
    with Progress(console=Console(stderr=True), disable=not progress, transient=True) as bar:
        task = bar.add_task("decoding", total=len(decoders) * (1 + permutations * refit))
        for name, decoder in decoders.items():
            start = time.perf_counter()
            bar.update(task, description=name)
            predicted, values, fold, chosen = _cross_validate(name, decoder, X, y, folds, classes, kind)
            seconds = time.perf_counter() - start
            bar.advance(task)
            used = fold >= 0
            right = (predicted == y).astype(float)
            at = [np.flatnonzero(fold == f) for f in range(len(folds))]

            def score(labels: np.ndarray, p: np.ndarray = predicted, v: Any = values, at: Any = at) -> np.ndarray:
                return np.array([_score(labels[i], p[i], None if v is None else v[i], classes, kind) for i in at])

            per_fold = score(y)
            interval = _interval(kind, y, predicted, values, at, right[used], per_fold, classes, seed)
            g = np.random.default_rng(seed)
            null = np.empty(permutations)
            for k in range(permutations):
                if refit:
                    labels = _permuted(y, groups, g)
                    p, v, _, _ = _cross_validate(name, decoder, X, labels, folds, classes, kind)
                    null[k] = _total(score(labels, p, v), kind, p, labels, used)
                    bar.advance(task)
                    continue
                labels = y.copy()
                for i in at:
                    labels[i] = g.permutation(y[i])
                null[k] = _total(score(labels), kind, predicted, labels, used)
            value = float(interval.value)
            found[name] = Decoded(
                name, kind, interval, per_fold, predicted, values, fold,
                confusion_matrix(y[used], predicted[used], labels=classes),
                float(np.nanmean(null)) if permutations else np.nan,
                (float(np.quantile(null, 0.025)), float(np.quantile(null, 0.975))) if permutations else (np.nan, np.nan),
                float((1 + (null >= value - 1e-12).sum()) / (1 + permutations)) if permutations else np.nan,
                1 / (1 + permutations) if permutations else np.nan,
                "none" if not permutations else "refit" if refit else "predictions", chosen, seconds,
            )  # fmt: skip
    return Evaluation(found, y, classes, kind, folds)


def _permuted(y: np.ndarray, groups: Any, g: np.random.Generator) -> np.ndarray:
    if groups is None:
        return g.permutation(y)
    labels = y.copy()
    for group in np.unique(groups):
        i = np.flatnonzero(np.asarray(groups) == group)
        labels[i] = g.permutation(y[i])
    return labels


def _cross_validate(
    name: str, decoder: Any, X: Any, y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], classes: np.ndarray, metric: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, list[Any]]:  # fmt: skip
    predicted, fold = np.empty_like(y), np.full(len(y), -1)
    values = np.full(len(y), np.nan) if len(classes) == 2 else None
    predicted[:] = y[0]
    chosen = []
    for f, (train, test) in enumerate(folds):
        with blame(InputError, f"decoder {name!r} failed in fold {f + 1}"):
            fitted: Any = clone(decoder)
            fitted.fit(X[train], y[train])
            predicted[test] = fitted.predict(X[test])
            if values is not None:
                values[test] = decision(fitted, X[test], predicted[test], classes)
        fold[test] = f
        if hasattr(fitted, "best_params_"):
            chosen.append(fitted.best_params_)
    return predicted, values, fold, chosen


def decision(fitted: Any, X: Any, predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Values that rise with the second class: of decision_function, else of predict_proba, else whether it is predicted."""
    if hasattr(fitted, "decision_function"):
        return np.asarray(fitted.decision_function(X), dtype=float).ravel()
    if hasattr(fitted, "predict_proba"):
        return np.asarray(fitted.predict_proba(X), dtype=float)[:, 1]
    return (predicted == classes[1]).astype(float)


def _score(y: np.ndarray, predicted: np.ndarray, values: np.ndarray | None, classes: np.ndarray, metric: str) -> float:
    right = predicted == y
    if metric == "accuracy":
        return float(right.mean())
    if metric == "balanced accuracy":
        return float(np.mean([right[y == c].mean() for c in classes if (y == c).any()]))
    assert values is not None
    second = y == classes[1]
    order = _ranks(values)
    n1, n0 = second.sum(), (~second).sum()
    if not n1 or not n0:
        return np.nan  # permuted labels of one class
    return float((order[second].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _total(per_fold: np.ndarray, metric: str, predicted: np.ndarray, y: np.ndarray, used: np.ndarray) -> float:
    return float((predicted == y)[used].mean()) if metric == "accuracy" else float(np.nanmean(per_fold))


def _interval(
    metric: str, y: np.ndarray, predicted: np.ndarray, values: np.ndarray | None, at: list[np.ndarray], right: np.ndarray,
    per_fold: np.ndarray, classes: np.ndarray, seed: int,
) -> Interval:  # fmt: skip
    """Over trials: BCa of the mean accuracy; percentiles of the mean of folds, classes resampled apart, otherwise."""
    if metric == "accuracy":
        return bootstrap(right, n_resamples=RESAMPLES, seed=seed)
    g, drawn = np.random.default_rng(seed), np.zeros(RESAMPLES)
    for i in at:
        mine, label = values[i] if values is not None else None, y[i]
        if metric == "auc":
            assert mine is not None
            one, zero = mine[label == classes[1]], mine[label == classes[0]]
            above = (one[:, None] > zero).astype(float) + 0.5 * (one[:, None] == zero)
            w1 = g.multinomial(len(one), np.full(len(one), 1 / len(one)), RESAMPLES) / len(one)
            w0 = g.multinomial(len(zero), np.full(len(zero), 1 / len(zero)), RESAMPLES) / len(zero)
            drawn += ((w1 @ above) * w0).sum(1) / len(at)
            continue
        present = [c for c in classes if (label == c).any()]
        for c in present:
            hit = (predicted[i] == c)[label == c]
            drawn += g.binomial(len(hit), hit.mean(), RESAMPLES) / len(hit) / len(present) / len(at)
    low, high = np.quantile(drawn, [0.025, 0.975])
    n = np.array(len(right))
    return Interval(np.array(per_fold.mean()), np.array(low), np.array(high), n, np.array(0))


def compare(
    evaluation: Evaluation, reference: str | None = None, n_permutations: int = 10_000, seed: int = 0
) -> pd.DataFrame:
    """Decoders against one of them, on the same trials.

    Parameters
    ----------
    evaluation : Evaluation
    reference : str, optional
        The best by default.
    n_permutations : int, default 10000
        Of the sign-flip test over trials (right or wrong); the training sets overlap, so that p is of these fitted decoders.
    seed : int, default 0

    Returns
    -------
    DataFrame
        A row a decoder: ``difference`` of accuracies (its own minus the reference's), ``low``, ``high`` (bootstrap over trials), ``p``
        (two-sided), ``p_holm``, ``smallest_p``.
    """
    name = evaluation.best if reference is None else reference
    if name not in evaluation.decoded:
        raise InputError(f"there is no decoder {name!r}; choose one of {', '.join(evaluation.decoded)}")
    base = evaluation.decoded[name]
    used = base.fold >= 0
    rows = {}
    for other, d in evaluation.decoded.items():
        if other == name:
            continue
        a, b = ((v.predicted == evaluation.y)[used].astype(float) for v in (d, base))
        test, interval = paired_test(a, b, "two-sided", n_permutations, seed), bootstrap(a - b, seed=seed)
        rows[other] = {"difference": float(test.difference), "low": float(interval.low), "high": float(interval.high),
                       "p": float(test.p), "smallest_p": float(test.smallest_p)}  # fmt: skip
    columns = ["difference", "low", "high", "p", "smallest_p"]
    found = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    found["p_holm"] = holm(found["p"].to_numpy()) if len(found) else []
    return found


def compare_over_sets(
    a: Any, b: Any, alternative: Literal["greater", "less", "two-sided"] = "greater",
    test: Literal["permutation", "wilcoxon"] = "permutation", seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Mean difference and p of paired scores over subjects or sessions: sign flips, or Wilcoxon's signed ranks.

    Parameters
    ----------
    a, b : arrays (n_sets,)
    alternative : {"greater", "less", "two-sided"}, default "greater"
        "greater": a above b.
    test : {"permutation", "wilcoxon"}, default "permutation"
    seed : int, default 0
    """
    found = paired_test(a, b, alternative, seed=seed)
    if test == "permutation":
        return float(found.difference), float(found.p)
    if test != "wilcoxon":
        raise InputError(f"test must be 'permutation' or 'wilcoxon', got {test!r}")
    from scipy.stats import wilcoxon

    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if not difference.any():
        return 0.0, 1.0
    return float(found.difference), float(cast(Any, wilcoxon(difference, alternative=alternative))[1])


def stouffer(p: Any, weights: Any = None) -> float:
    """One p of several independent one-sided ones, by Stouffer's sum of normal deviates.

    Parameters
    ----------
    p : array (n_sets,)
        In (0, 1].
    weights : array (n_sets,), optional
        Equal by default; √n of subjects is usual.
    """
    p = np.asarray(p, dtype=float)
    w = np.ones_like(p) if weights is None else np.asarray(weights, dtype=float)
    if p.ndim != 1 or not p.size or w.shape != p.shape or not ((p > 0) & (p <= 1)).all() or not (w > 0).all():
        raise InputError("p must be one or more values in (0, 1], with as many weights above 0")
    z = norm.isf(np.minimum(p, 1 - 1e-16)) @ w / np.sqrt(w @ w)
    return float(norm.sf(z))
