"""The best decoder of a recording, explained: which channels and times its answers rest on, and whether that can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sklearn.base import clone
from torch import nn

from nissl.arguments import at_least
from nissl.errors import InputError
from nissl.network import Network, Pass
from nissl.recordings.arrays import as_labels, as_trials
from nissl.recordings.evaluate import Evaluation
from nissl.recordings.extras import need
from nissl.runner import Runner, make_questions
from nissl.trust.audit import AuditResult, audit, resolve_methods

ORDER = ("believe", "with care", "undecided", "do not believe")
"""Verdicts, the best first."""
NO_METHOD = ("random", "edge")
"""Baselines of the audit."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a decoder's answers on unseen trials rest on.

    Attributes
    ----------
    decoder, method, verdict : str
        What was explained, by which method of the audit, and what the audit says of the method.
    scores : array (n_examples, n_channels, n_times)
        Of the predicted class; above 0 where the signal, rather than the mean of all trials, speaks for it.
    importance : array (n_channels, n_times)
        Mean over the examples.
    examples : array of int (n_examples,)
        Numbers of the trials.
    predicted : array (n_examples,)
    linear : bool
        The decoder's answers are affine in the trial, and a linear layer with the same answers was explained: exact gradients.
    relabelled : float
        Mean rank correlation of the sizes of the scores with those that the same method gives for the same decoder fitted on
        permuted labels. Near 0 says that the scores come of the labels, near 1 that they come of the trials alone.
    audit : AuditResult
    """

    decoder: str
    method: str
    verdict: str
    scores: np.ndarray
    importance: np.ndarray
    examples: np.ndarray
    predicted: np.ndarray
    linear: bool
    relabelled: float
    audit: AuditResult


def explain_decoder(
    decoder: Any, X: Any, y: Any, train: np.ndarray, test: np.ndarray, *, name: str = "decoder", examples: int = 12,
    budget: int | None = 96, methods: Any = None, seed: int = 0, progress: bool = True,
) -> Explanation:  # fmt: skip
    """Fit a decoder on some trials and audit explanations of its answers on others, channels × times as features.

    What is covered becomes the mean of the training trials.

    Parameters
    ----------
    decoder : scikit-learn classifier of trials
        Cloned.
    X : array (n_trials, n_channels, n_times)
    y : array (n_trials,)
    train, test : arrays of int
        As of one fold of `nissl.recordings.evaluate.splits`.
    name : str
    examples : int, default 12
        Trials of `test` that are explained, as many of each class as there are.
    budget : int or None, default 96
        Rows that a method may ask for each example.
    methods : optional
        Of `nissl.audit`.
    seed : int, default 0
    progress : bool, default True
    """
    X = as_trials(X)
    y = as_labels(y, len(X))
    at_least("examples", examples, 1)
    train, test = np.asarray(train), np.asarray(test)
    centre = X[train].mean(0)
    scale = float(X[train].std()) or 1.0  # float32 and the methods' steps want numbers around one
    g = np.random.default_rng(seed)
    classes = np.unique(y[train])
    drawn = [g.permutation(test[y[test] == c]) for c in classes]
    turns = [d[i] for i in range(max(len(d) for d in drawn)) for d in drawn if i < len(d)]
    chosen = np.sort(np.array(turns[:examples]))
    inputs = ((X[chosen] - centre) / scale).astype(np.float32)

    def network_of(labels: np.ndarray) -> tuple[Network, bool]:
        fitted: Any = clone(decoder)
        fitted.fit(X[train], labels)
        answers = _Answers(fitted, centre, scale)
        layer = linear_layer(answers, inputs)
        return Network(answers if layer is None else layer, dims=("channel", "time"), name=name), layer is not None

    network, linear = network_of(y[train])
    runner = Runner(progress=progress)
    result = audit(network, inputs, methods=methods, budget=budget, seed=seed, runner=runner)
    best, verdict = best_method(result)
    scores = np.asarray(result.scores[best].transpose("example", "channel", "time"))
    answer = network.run(Pass(torch.from_numpy(inputs))).output
    assert answer is not None
    predicted = classes[answer.argmax(1).numpy()]
    other, _ = network_of(g.permutation(y[train]))
    key = resolve_methods(methods, network, make_questions(network, inputs, None, seed)[0], budget)[best]
    again = runner.attribute({best: key}, other, inputs, seed=seed)
    null = np.asarray(again[best].transpose("example", "channel", "time"))
    pairs = [spearmanr(np.abs(a).ravel(), np.abs(b).ravel())[0] for a, b in zip(scores, null, strict=True)]
    relabelled = float(np.nanmean(np.asarray(pairs, dtype=float)))
    return Explanation(name, best, verdict, scores, scores.mean(0), chosen, predicted, linear, relabelled, result)


class _Answers:
    """Decision values of all classes for centred and scaled trials."""

    def __init__(self, fitted: Any, centre: np.ndarray, scale: float) -> None:
        self.fitted, self.centre, self.scale = fitted, centre, scale

    def __call__(self, rows: Any) -> np.ndarray:
        trials = np.asarray(rows, dtype=np.float64) * self.scale + self.centre
        if hasattr(self.fitted, "decision_function"):
            value = np.asarray(self.fitted.decision_function(trials))
        else:
            value = np.log(np.maximum(self.fitted.predict_proba(trials), 1e-12))
        return np.stack([-value, value], 1) if value.ndim == 1 else value


def linear_layer(answers: Any, examples: np.ndarray) -> nn.Module | None:
    """The linear layer that gives the same answers, where these are affine in the trial; None where they are not.

    Affinity is tried on sums of the examples; weights are the answers to unit trials, minus the answer to nothing.
    """
    shape = examples.shape[1:]
    nothing = answers(np.zeros((1, *shape)))
    a, b = answers(examples) - nothing, answers(examples[::-1]) - nothing
    both = answers(examples + 2.0 * examples[::-1]) - nothing
    if np.abs(both - a - 2 * b).max() > 1e-6 * max(np.abs(a).max(), np.abs(both).max()):
        return None
    units = int(np.prod(shape))
    weights = np.concatenate(
        [answers(np.eye(units)[i : i + 256].reshape(-1, *shape)) - nothing for i in range(0, units, 256)]
    )
    layer = nn.Linear(units, weights.shape[1])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights.T))
        layer.bias.copy_(torch.from_numpy(nothing[0]))
    return nn.Sequential(nn.Flatten(), layer)


def best_method(result: AuditResult) -> tuple[str, str]:
    """The method of the best verdict, and of those the one whose insertion and deletion lie furthest apart."""

    def apart(name: str) -> float:
        value = result.table.loc[name].get("faithfulness", np.nan)
        return -float(value) if np.isfinite(value) else np.inf

    verdicts = {str(m): str(v) for m, v in result.table["verdict"].items() if m not in NO_METHOD}
    best = min(verdicts, key=lambda m: (ORDER.index(verdicts[m]), apart(m)))
    return best, verdicts[best]


# ---------------------------------------------------------------- pictures


def plot_decoders(evaluation: Evaluation) -> Figure:
    """Scores with intervals, and beneath them the middle 95 % under permuted labels."""
    found = sorted(evaluation.decoded.values(), key=lambda d: float(d.score.value))
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(found)), layout="constrained")
    ax = figure.subplots()
    for i, d in enumerate(found):
        if np.isfinite(d.chance):
            ax.plot(d.chance_band, [i, i], color="0.75", linewidth=9, solid_capstyle="butt",
                    label="permuted labels, middle 95 %" if i == 0 else None)  # fmt: skip
        ax.plot([float(d.score.low), float(d.score.high)], [i, i], color="#5b3a91", linewidth=1.6)
        ax.plot(float(d.score.value), i, "o", color="#5b3a91", label="score, 95 % interval" if i == 0 else None)
    ax.set_yticks(range(len(found)), [d.name for d in found])
    metric = "AUC" if evaluation.metric == "auc" else evaluation.metric
    ax.set_xlabel(f"{metric} on trials outside of the training set")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_confusion(confusion: Any, classes: Any) -> Figure:
    """Trials by true class (rows) and predicted class."""
    confusion = np.asarray(confusion)
    n = len(classes)
    figure = Figure(figsize=(2.4 + 0.55 * n, 1.9 + 0.5 * n), layout="constrained")
    ax = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Purples", vmin=0, vmax=1)
    for i in range(n):
        for j in range(n):
            ax.text(
                j, i, str(confusion[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.6 else "black"
            )
    names = [_plain(c) for c in classes]
    ax.set_xticks(range(n), names)
    ax.set_yticks(range(n), names)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true")
    return figure


def plot_importance(
    importance: np.ndarray, channels: Sequence[str], sampling_rate: float, start: float = 0.0, positions: Any = None
) -> Figure:
    """Channels × times as a raster and, where positions of the electrodes are known, a map of the scalp.

    Parameters
    ----------
    importance : array (n_channels, n_times)
    channels : sequence of str
    sampling_rate : float
        In Hz.
    start : float, default 0
        Time of the first sample, in s.
    positions : MNE Info, optional
        See `electrode_info`.
    """
    importance = np.asarray(importance, dtype=float)
    n, times = importance.shape
    height = min(1.6 + 0.2 * n, 9.0)
    figure = Figure(figsize=(10 if positions is not None else 7.2, max(height, 3.2)), layout="constrained")
    left, ax = figure.subplots(1, 2, width_ratios=[1, 1.7]) if positions is not None else (None, figure.subplots())
    limit = float(np.nanpercentile(np.abs(importance), 99.5)) or 1.0
    end = start + times / sampling_rate
    image = ax.imshow(importance, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="nearest",
                      extent=(start, end, n - 0.5, -0.5))  # fmt: skip
    ax.set_yticks(range(n), [_plain(c) for c in channels], fontsize=max(4, min(8, round(220 / n))))
    ax.set_xlabel("time in the trial (s)")
    figure.colorbar(image, ax=ax, label="speaks for the predicted class", shrink=0.8)
    if left is not None:
        mne = need("mne")
        total = importance.sum(1)
        top = float(np.abs(total).max()) or 1.0
        mne.viz.plot_topomap(total, positions, axes=left, show=False, cmap="PuOr_r", vlim=(-top, top), contours=4)
        left.set_title("sum over the trial", fontsize=9)
    return figure


def _plain(value: Any) -> str:
    return str(value).replace("$", r"\$")


def electrode_info(channels: Sequence[str], sampling_rate: float) -> Any | None:
    """MNE Info with positions of the electrodes in the extended 10-20 system, or None where a name is not of it."""
    mne = need("mne")
    names = mne.channels.get_builtin_montages()
    montage = mne.channels.make_standard_montage("colin27_1005" if "colin27_1005" in names else "standard_1005")
    known = {n.lower(): n for n in montage.ch_names}
    names = [known.get(str(c).strip(" .").lower()) for c in channels]
    if len(names) < 4 or None in names or len(set(names)) < len(names):
        return None
    info = mne.create_info([str(n) for n in names], sampling_rate, "eeg", verbose="error")
    info.set_montage(montage, verbose="error")
    return info


def without_flat_channels(X: np.ndarray) -> np.ndarray:
    """Which channels (n_channels,) move in any trial at all; InputError where none does."""
    moves = np.ptp(X, axis=2).max(0) > 0
    if not moves.any():
        raise InputError("every channel is flat in every trial: there is no signal to decode")
    return moves
