"""Neurofeedback: whether a language model can report, and steer, its own activations along a direction."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from scipy.stats import norm
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted, validate_data

from nissl.arguments import at_least
from nissl.errors import InputError
from nissl.network import LanguageModel, Pass, Rollout
from nissl.runner import Asking, Runner

Mode = Literal["implicit", "explicit"]

SYSTEM = "You are a helpful assistant."
SAY = "Say something."
REPORT = (
    "You will see sentences that you said, each followed by a score of what your own neurons did while you said it, written "
    "[Score: {{{low}}}] to [Score: {{{high}}}]. Work out the rule from the examples and give the score of each new sentence."
)
IMITATE = "Now do not copy the examples, but say something while your neurons do what they did at [Score: {{{level}}}]. Say something."


# ---------------------------------------------------------------- axes and labels


class NeurofeedbackAxis(BaseEstimator):
    """A direction of activations, scored in standard deviations.

    Parameters
    ----------
    kind : {"lr", "pc"}, default "pc"
        Logistic regression on labels with a meaning, or a principal component.
    index : int, default 1
        Which principal component, from 1.

    Attributes
    ----------
    direction_ : ndarray (n_features,)
        Of unit length.
    explained_variance_ratio_ : float
        Share of the variance along the direction.
    offset_, scale_ : float
        ``decision_function`` is (activation @ direction - offset) / scale.

    References
    ----------
    Ji-An et al.: Language models are capable of metacognitive monitoring and control of their internal activations (2025).
    """

    def __init__(self, kind: Any = "pc", index: Any = 1) -> None:
        self.kind = kind
        self.index = index

    def fit(self, X: Any, y: Any = None) -> NeurofeedbackAxis:
        """Find the direction.

        Parameters
        ----------
        X : array (n_samples, n_features)
        y : array (n_samples,), optional
            Two classes; for ``kind="lr"``.
        """
        if self.kind == "lr":
            if y is None:
                raise ValueError("kind='lr' requires y to be passed, but the target y is None")
            X, y = validate_data(self, X, y, dtype=np.float64)
            X, y = np.asarray(X), np.asarray(y)
            if len(np.unique(y)) != 2:
                raise ValueError(f"kind='lr' needs two classes, y has {len(np.unique(y))}")
            model = LogisticRegression(max_iter=1000).fit(X, y)
            weights, self.offset_ = np.asarray(model.coef_)[0], -float(np.asarray(model.intercept_)[0])
        elif self.kind == "pc":
            X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
            most = min(X.shape[0] - 1, X.shape[1])
            if (
                isinstance(self.index, bool)
                or not isinstance(self.index, (int, np.integer))
                or not 1 <= self.index <= most
            ):
                raise ValueError(
                    f"index={self.index!r}: n_samples={X.shape[0]} and {X.shape[1]} features have components 1 to {most}"
                )
            weights = np.asarray(PCA(int(self.index), svd_solver="full").fit(X).components_)[-1]
            self.offset_ = float(X.mean(0) @ weights)
        else:
            raise ValueError(f"kind={self.kind!r}: choose 'lr' or 'pc'")
        length = float(np.linalg.norm(weights)) or 1.0
        self.direction_, self.offset_ = weights / length, self.offset_ / length
        along = X @ self.direction_
        self.scale_ = float(along.std()) or 1.0
        self.explained_variance_ratio_ = float(along.var() / (X.var(0).sum() or 1.0))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores (n_samples,), of unit standard deviation on what the axis was fitted to; 0 is the threshold."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=np.float64)
        return (X @ self.direction_ - self.offset_) / self.scale_

    def predict(self, X: Any) -> np.ndarray:
        """The label 0 or 1."""
        return (self.decision_function(X) >= 0).astype(int)


def labels_of(scores: Any, levels: int = 2) -> Int[np.ndarray, " n"]:
    """Labels of scores: 0 and 1 by sign; or an even number of levels from 1, equal shares on each side of 0."""
    scores = np.asarray(scores, dtype=np.float64)
    if levels == 2:
        return (scores >= 0).astype(int)
    if levels < 4 or levels > 8 or levels % 2:
        raise InputError(f"levels must be 2, 4, 6 or 8; got {levels!r}")
    half, found = levels // 2, np.zeros(len(scores), dtype=int)
    for side, first in ((scores < 0, 1), (scores >= 0, half + 1)):
        if side.any():
            edges = np.quantile(scores[side], np.linspace(0, 1, half + 1)[1:-1])
            found[side] = first + np.searchsorted(edges, scores[side])
    return found


# ---------------------------------------------------------------- who is asked


@runtime_checkable
class Subject(Protocol):
    """Who sees sentences with labels: a language model, or something that stands for one in a test."""

    def guess(self, order: np.ndarray, labels: np.ndarray, levels: int) -> Generator[Any, Any, np.ndarray]:
        """Logits (n_items, levels) of the label of each item in the order, given the items before it and their labels."""
        ...

    def act(
        self, order: np.ndarray, labels: np.ndarray, level: int, levels: int, item: int, mode: Mode, seed: int
    ) -> Generator[Any, Any, np.ndarray]:
        """Activation (n_layers, d) while saying a sentence of a wanted level, after the items in the order."""
        ...


@dataclass(frozen=True, eq=False)
class LanguageSubject:
    """A language model that is shown its own sentences and scores.

    Parameters
    ----------
    network : LanguageModel
        With a chat template; without one, roles are written out.
    sentences : sequence of str
    layers : sequence of int, optional
        Whose residual stream after the block is scored; by default the middle one.
    max_tokens, temperature : int, float
        Of explicit control.
    """

    network: LanguageModel
    sentences: Sequence[str]
    layers: Sequence[int] | None = None
    max_tokens: int = 50
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if not isinstance(self.network, LanguageModel):
            raise InputError(f"a LanguageModel is needed, got {type(self.network).__name__}")
        wrong = [i for i, s in enumerate(self.sentences) if not isinstance(s, str) or not s.strip() or "[Score:" in s]
        if wrong or not len(self.sentences):
            raise InputError(f"sentences must be texts that are not empty and do not hold '[Score:'; see {wrong[:5]}")
        n = self.network.anatomy.n_layers
        object.__setattr__(self, "layers", [n // 2] if self.layers is None else [int(i) for i in self.layers])
        self.sites  # noqa: B018  raises where a layer does not exist

    @property
    def sites(self) -> list[str]:
        """Sites of the layers."""
        assert self.layers is not None
        return [self.network.anatomy.site("resid_post", i) for i in self.layers]

    # ---- text

    def _text(self, turns: Sequence[tuple[str, str]]) -> str:
        tokenizer: Any = self.network.tokenizer
        if getattr(tokenizer, "chat_template", None):
            chat = [{"role": role, "content": content} for role, content in turns]
            return tokenizer.apply_chat_template(chat, tokenize=False)
        return "\n".join(f"{role}: {content}" for role, content in turns)

    def _tokens(self, text: str) -> tuple[list[int], np.ndarray]:
        try:
            tokenizer: Any = self.network.tokenizer
            found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except (NotImplementedError, TypeError, AttributeError) as error:
            raise InputError(
                "neurofeedback needs a fast tokenizer, which tells where in the text tokens lie"
            ) from error
        return list(found["input_ids"]), np.array(found["offset_mapping"]).reshape(-1, 2)

    @staticmethod
    def _span(offsets: np.ndarray, start: int, end: int) -> slice:
        """Tokens that begin inside a stretch of text."""
        inside = np.nonzero((offsets[:, 0] >= start - 1) & (offsets[:, 1] <= end) & (offsets[:, 1] > start))[0]
        if not len(inside):
            raise InputError("a sentence has no token of its own in this tokenizer")
        return slice(int(inside[0]), int(inside[-1]) + 1)

    def _last_message(self, turns: Sequence[tuple[str, str]]) -> tuple[list[int], slice]:
        text = self._text(turns)
        start = text.rindex(turns[-1][1])
        ids, offsets = self._tokens(text)
        return ids, self._span(offsets, start, start + len(turns[-1][1]))

    @staticmethod
    def _digits(levels: int) -> list[int]:
        return [0, 1] if levels == 2 else list(range(1, levels + 1))

    def _shown(self, order: np.ndarray, labels: np.ndarray, levels: int) -> list[tuple[str, str]]:
        digits = self._digits(levels)
        turns = [("system", REPORT.format(low=digits[0], high=digits[-1]))]
        for i in order:
            turns += [("user", SAY), ("assistant", f"{self.sentences[i]} [Score: {{{labels[i]}}}]")]
        return turns

    # ---- questions

    def states(self, index: Sequence[int] | np.ndarray) -> Asking[Float[np.ndarray, "n layer d"]]:
        """Mean activation over the tokens of each sentence, said by itself."""
        found = []
        for i in index:
            ids, span = self._last_message([("system", SYSTEM), ("user", SAY), ("assistant", self.sentences[i])])
            found.append((yield from self._read(ids, span)))
        return np.stack(found)

    def _read(self, ids: list[int], span: slice) -> Asking[Float[np.ndarray, "layer d"]]:
        answer = yield Pass(self.network.encode([ids]), read=self.sites, output=False)
        return torch.stack([answer.reads[s][0, span].float().mean(0) for s in self.sites]).cpu().numpy()

    def guess(self, order: np.ndarray, labels: np.ndarray, levels: int) -> Asking[np.ndarray]:
        """See `Subject`: one pass over all items, of which only the logits of the digits before each label are kept."""
        text = self._text(self._shown(order, labels, levels))
        ids, offsets = self._tokens(text)
        digits = [self._digit(d) for d in self._digits(levels)]
        places, at = [], 0
        for i in order:
            at = text.index(f"[Score: {{{labels[i]}}}]", text.index(str(self.sentences[i]), at)) + len("[Score: {")
            hits = np.nonzero((offsets[:, 0] == at) & (offsets[:, 1] == at + 1))[0]
            if not len(hits) or ids[hits[-1]] != digits[self._digits(levels).index(int(labels[i]))]:
                raise InputError(
                    "this tokenizer merges a label with the brackets around it; reports cannot be read from it"
                )
            places.append(int(hits[-1]) - 1)
        site = self.network.anatomy.site("final_norm")
        answer = yield Pass(self.network.encode([ids]), read=[site], output=False)
        rows = self.network.weight("unembed")[torch.tensor(digits)]
        return (answer.reads[site][0, places] @ rows.T.to(answer.reads[site])).float().cpu().numpy()

    def _digit(self, digit: int) -> int:
        ids, offsets = self._tokens(f"{{{digit}}}")
        hits = [i for i, (a, b) in zip(ids, offsets, strict=True) if (a, b) == (1, 2)]
        if not hits:
            raise InputError(f"this tokenizer has no token for the digit {digit} between brackets")
        return hits[-1]

    def act(
        self, order: np.ndarray, labels: np.ndarray, level: int, levels: int, item: int, mode: Mode, seed: int
    ) -> Generator[Any, Any, np.ndarray]:
        """See `Subject`; implicitly the sentence `item` is put into the model's mouth, explicitly it writes its own."""
        turns = [*self._shown(order, labels, levels), ("user", IMITATE.format(level=level))]
        if mode == "implicit":
            ids, span = self._last_message([*turns, ("assistant", self.sentences[item])])
            return (yield from self._read(ids, span))
        begun, span = self._last_message([*turns, ("assistant", self.sentences[item])])
        prompt = begun[: span.start]
        answer = yield Rollout(
            self.network.encode([prompt]), max_tokens=self.max_tokens, temperature=self.temperature, seed=seed
        )
        written = [t for t in answer.tokens[0, 0].tolist() if t >= 0 and t not in self.network.end_ids]
        if not written:  # it said nothing: what it did at the last token of the prompt
            return (yield from self._read(prompt, slice(len(prompt) - 1, len(prompt))))
        return (yield from self._read([*prompt, *written], slice(len(prompt), len(prompt) + len(written))))


def sentence_states(
    subject: LanguageSubject, index: Sequence[int] | None = None, runner: Runner | None = None
) -> Float[np.ndarray, "n layer d"]:
    """Mean activation over each sentence's tokens, said by itself; for fitting axes and for labels."""
    chosen = range(len(subject.sentences)) if index is None else index
    runner = Runner() if runner is None else runner
    states = runner.collect(
        subject.network, [partial(subject.states, [i]) for i in chosen], "reading sentences", "states"
    )
    return np.concatenate(states)


# ---------------------------------------------------------------- report


def report(
    subject: Subject,
    scores: Float[np.ndarray, " n"],
    *,
    n_orders: int = 100,
    n_items: int | None = None,
    levels: int = 2,
    shuffled: bool = False,
    seed: int = 42,
    network: LanguageModel | None = None,
    runner: Runner | None = None,
) -> xr.Dataset:
    """Ask for the label of the next sentence, given sentences and labels before it.

    Parameters
    ----------
    subject : LanguageSubject or Subject
    scores : ndarray (n,)
        Score of each sentence on an axis; see `labels_of`.
    n_orders : int, default 100
        Random orders.
    n_items : int, optional
        Sentences in each order; all by default.
    levels : int, default 2
    shuffled : bool, default False
        Labels are dealt out at random: the null run.
    seed : int, default 42
    network, runner : optional
        By default the subject's, and a new one.

    Returns
    -------
    xarray.Dataset
        ``correct``, ``cross_entropy`` (nats) and ``item`` by (order, n_shown); n_shown counts the items before.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n = len(scores)
    at_least("n_orders", n_orders, 1)
    n_items = n if n_items is None else n_items
    if scores.ndim != 1 or not np.isfinite(scores).all() or not 1 <= n_items <= n:
        raise InputError(
            f"scores must be finite, one a sentence, and n_items at most {n}; got {scores.shape}, {n_items}"
        )
    labels = labels_of(scores, levels)
    lowest = int(levels > 2)
    orders, used = [], []
    for run in range(n_orders):
        random = np.random.default_rng(seed + run)
        orders.append(random.permutation(n)[:n_items])
        used.append(random.permutation(labels) if shuffled else labels)
    results = _drive(
        subject, network, runner,
        [lambda o=o, y=y: subject.guess(o, y, levels) for o, y in zip(orders, used, strict=True)], "reporting",
    )  # fmt: skip
    logits = np.stack(results)
    truth = np.stack([y[o] - lowest for o, y in zip(orders, used, strict=True)])
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return xr.Dataset(
        {
            "correct": (("order", "n_shown"), logits.argmax(-1) == truth),
            "cross_entropy": (("order", "n_shown"), -np.take_along_axis(log_p, truth[..., None], -1)[..., 0]),
            "label": (("order", "n_shown"), truth + lowest),
            "item": (("order", "n_shown"), np.stack(orders)),
        },
        coords={"order": np.arange(n_orders), "n_shown": np.arange(n_items)},
        attrs={"levels": levels, "shuffled": int(shuffled), "seed": seed},
    )


def final_accuracy(reported: xr.Dataset, last: float = 1 / 6, level: float = 0.95) -> dict[str, float]:
    """Accuracy over the last share of every order, with an interval over distinct items.

    Orders repeat items, so they are averaged for each item first; the interval is Wilson's for that many items. ``balanced``
    is the mean accuracy of the labels.
    """
    n = reported.sizes["n_shown"]
    tail = reported.isel(n_shown=slice(n - max(1, round(n * last)), n))
    table = pd.DataFrame({k: tail[k].values.reshape(-1) for k in ("correct", "item", "label")})
    by_item = np.array([rows["correct"].mean() for _, rows in table.groupby("item")])
    p, k, z = float(by_item.mean()), len(by_item), float(norm.ppf((1 + level) / 2))
    centre, half = p + z**2 / (2 * k), z * np.sqrt(p * (1 - p) / k + z**2 / (4 * k**2))
    return {
        "accuracy": p, "low": (centre - half) / (1 + z**2 / k), "high": (centre + half) / (1 + z**2 / k), "n_items": k,
        "balanced": float(np.mean([rows["correct"].mean() for _, rows in table.groupby("label")])),
    }  # fmt: skip


def accessible_axes(
    reported: Mapping[Any, xr.Dataset], shuffled: Mapping[Any, xr.Dataset] | None = None, last: float = 1 / 6
) -> list[Any]:
    """Axes whose accuracy at the end lies, with its interval, above chance and above the run with shuffled labels.

    Intervals hold at 95 % for all axes together (Bonferroni).
    """
    found, level = [], 1 - 0.05 / max(len(reported), 1)
    for axis, data in reported.items():
        at = final_accuracy(data, last, level)
        null = 0.0 if shuffled is None else final_accuracy(shuffled[axis], last)["accuracy"]
        if at["low"] > max(1 / data.attrs["levels"], null):
            found.append(axis)
    return found


def ideal_observer(
    fit: Float[np.ndarray, "n d"], fit_scores: Any, states: Float[np.ndarray, "m d"], scores: Any
) -> float:
    """Accuracy of a logistic regression that sees the activations themselves: how well the labels can be told at all."""
    model = LogisticRegression(max_iter=1000).fit(fit, labels_of(fit_scores))
    return float((model.predict(states) == labels_of(scores)).mean())


def surface_observer(
    sentences: Sequence[str], scores: Any, reported: xr.Dataset, shown: Sequence[int] | None = None
) -> dict[int, float]:
    """Accuracy of a reader of the words alone (TF-IDF, logistic regression) on the same orders.

    Only what a model does better than this speaks for looking inward.

    Returns
    -------
    dict of number of shown items to accuracy
        On the items that follow.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    labels = labels_of(scores)
    n = reported.sizes["n_shown"]
    shown = [n // 4, n // 2, 3 * n // 4] if shown is None else list(shown)
    words = TfidfVectorizer().fit_transform(list(sentences))
    found: dict[int, float] = {}
    for k in shown:
        right = []
        for order in reported["item"].values:
            seen, coming = order[:k], order[k:]
            if len(np.unique(labels[seen])) < 2:
                right.append(float((labels[coming] == labels[seen][0]).mean()))
                continue
            model = LogisticRegression(max_iter=1000).fit(words[seen], labels[seen])
            right.append(float((model.predict(words[coming]) == labels[coming]).mean()))
        found[k] = float(np.mean(right))
    return found


# ---------------------------------------------------------------- control


def control(
    subject: Subject,
    axes: Mapping[Any, Sequence[NeurofeedbackAxis]],
    scores: Mapping[Any, Float[np.ndarray, " n"]],
    target: Any,
    *,
    n_examples: int = 16,
    mode: Mode = "implicit",
    n_runs: int = 100,
    levels: int = 2,
    seed: int = 42,
    network: LanguageModel | None = None,
    runner: Runner | None = None,
) -> xr.Dataset:
    """Ask for an activation of a wanted label, and measure what comes.

    Each run shows `n_examples` sentences with the labels of the target axis and asks for a level, in four conditions: the
    highest or the lowest level, with labels as they are or turned round. The high goal (S1) is the highest level as it is and
    the lowest turned round; so what a digit does by itself cancels.

    Parameters
    ----------
    subject : LanguageSubject or Subject
    axes : mapping of name to axes
        For each name one fitted axis a layer: all of them are scored.
    scores : mapping of name to ndarray (n,)
        Of the sentences, for labels; at least of the target.
    target : name
    n_examples : int, default 16
    mode : {"implicit", "explicit"}, default "implicit"
        A held-out sentence is put into the model's mouth, the same in all conditions; or it writes its own.
    n_runs : int, default 100
    levels, seed, network, runner
        See `report`.

    Returns
    -------
    xarray.Dataset
        ``high`` and ``low``, scores under the two goals, by (run, layer, affected axis).
    """
    if target not in axes or target not in scores:
        raise InputError(f"target {target!r} must be among the axes {list(axes)} and the scores {list(scores)}")
    if mode not in ("implicit", "explicit"):
        raise InputError(f"mode={mode!r}: choose 'implicit' or 'explicit'")
    at_least("n_runs", n_runs, 1)
    at_least("n_examples", n_examples, 0)
    labels = labels_of(scores[target], levels)
    n, top = len(labels), 1 if levels == 2 else levels
    if n_examples >= n:
        raise InputError(f"n_examples={n_examples}, but there are {n} sentences and one must be held out")
    bottom, turned = top + 1 - levels, (top + (top + 1 - levels)) - labels
    asked = []
    for run in range(n_runs):
        drawn = np.random.default_rng(seed + run).permutation(n)
        order, item = drawn[:n_examples], int(drawn[n_examples])
        asked += [
            lambda o=order, y=y, level=level, i=item, s=seed + run: subject.act(o, y, level, levels, i, mode, s)
            for y, level in ((labels, top), (turned, bottom), (labels, bottom), (turned, top))
        ]
    states = np.stack(_drive(subject, network, runner, asked, "controlling"))
    states = states.reshape(n_runs, 4, *states.shape[1:])
    values = np.stack(
        [
            np.stack([axis.decision_function(states[:, :, k].reshape(-1, states.shape[-1])).reshape(n_runs, 4)
                      for k, axis in enumerate(by_layer)], axis=-1)
            for by_layer in axes.values()
        ],
        axis=-1,
    )  # fmt: skip
    dims = ("run", "layer", "axis")
    return xr.Dataset(
        {"high": (dims, values[:, :2].mean(1)), "low": (dims, values[:, 2:].mean(1))},
        coords={"axis": [str(a) for a in axes], "run": np.arange(n_runs)},
        attrs={"target": str(target), "n_examples": n_examples, "mode": mode, "levels": levels, "seed": seed},
    )


def cohens_d(high: Any, low: Any) -> tuple[float, float]:
    """Effect size with pooled standard deviation, and half of its 95 % interval."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (high, low))
    n1, n0 = len(a), len(b)
    if n1 < 2 or n0 < 2:
        raise InputError(f"an effect size needs at least 2 runs of each goal, got {n1} and {n0}")
    pooled = ((n1 - 1) * a.var(ddof=1) + (n0 - 1) * b.var(ddof=1)) / (n1 + n0 - 2)
    d = float((a.mean() - b.mean()) / np.sqrt(pooled + 1e-10))
    return d, float(1.96 * np.sqrt((n1 + n0) / (n1 * n0) + d**2 / (2 * (n1 + n0))))


def effects(controlled: xr.Dataset) -> pd.DataFrame:
    """Effect of the control on every axis.

    Returns
    -------
    pandas.DataFrame
        ``layer``, ``axis``, ``target`` (bool), ``d`` with ``low`` and ``high`` of its interval, and ``paired`` (mean change
        over its standard deviation: the four conditions of a run share a sentence, which d does not use).
    """
    rows = []
    for k in range(controlled.sizes["layer"]):
        for a, name in enumerate(controlled["axis"].values):
            high, low = (controlled[g].values[:, k, a] for g in ("high", "low"))
            d, half = cohens_d(high, low)
            change = high - low
            rows.append(
                {
                    "layer": k, "axis": str(name), "target": str(name) == controlled.attrs["target"], "d": d, "low": d - half,
                    "high": d + half, "paired": float(change.mean() / (change.std(ddof=1) + 1e-10)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def control_precision(controlled: xr.Dataset) -> Float[np.ndarray, " layer"]:
    """Size of the effect on the target over the mean size on all principal components that were scored, for each layer.

    0 over 0, where nothing moves at all, is NaN.
    """
    table = effects(controlled)
    found = []
    for _, rows in table.groupby("layer"):
        others = rows.loc[rows["axis"].str.startswith("pc") | rows["axis"].str.isdigit(), "d"].abs()
        on_target = float(np.abs(rows["d"].to_numpy()[rows["target"].to_numpy()])[0])
        mean = float(np.mean(others.to_numpy() if len(others) else rows["d"].abs().to_numpy()))
        found.append(on_target / mean if mean > 0 else np.nan)
    return np.array(found)


def _drive(subject: Any, network: Any, runner: Runner | None, starts: Sequence[Any], what: str) -> list[Any]:
    """Results of generators, in order."""
    network = getattr(subject, "network", None) if network is None else network
    if network is None:  # a subject that asks no network
        return [_returned(start()) for start in starts]
    runner = Runner() if runner is None else runner
    return runner.collect(network, starts, what)


def _returned(generator: Generator[Any, Any, Any]) -> Any:
    try:
        next(generator)
    except StopIteration as stop:
        return stop.value
    raise InputError("the subject asks a network: give network=")


def plot_reports(reported: Mapping[Any, xr.Dataset], path: Any = None) -> Any:
    """Accuracy by number of shown items, a line for each axis, smoothed over 5 items.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.figure import Figure

    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe & Ito (2008)
    styles = ("-", "--", "-.", ":")
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, data) in enumerate(reported.items()):
        mean = data["correct"].mean("order").values.astype(float)
        smooth = np.convolve(np.pad(mean, 2, mode="edge"), np.ones(5) / 5, mode="valid")
        axes.plot(data["n_shown"].values, smooth, color=colours[i % 7], ls=styles[i % 4], label=str(name))
    axes.axhline(1 / next(iter(reported.values())).attrs["levels"], color="#777777", lw=0.8)
    axes.set_xlabel("examples shown")
    axes.set_ylabel("accuracy of the report")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    if path is not None:
        figure.savefig(path, dpi=90)
    return figure
