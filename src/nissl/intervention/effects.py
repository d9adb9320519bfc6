"""What steering does: odds of answers, shares of concepts in what is generated, fluency; before and after."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from nissl.arguments import at_least, instance, items
from nissl.errors import InputError
from nissl.intervention.calibration import divergence
from nissl.intervention.contrast import Activations, Contrast, quiet, sites_of, states_of, token_ids
from nissl.intervention.steering import GACT, DiffMeanSteering, Steering, SteeringEdits
from nissl.network import LanguageModel, Pass, Rollout, Target
from nissl.runner import Asking, Runner

# ---------------------------------------------------------------- probabilities of given answers


def _answer_log_probability(output: Float[Tensor, "n step token"], answer: Int[Tensor, "n length"]) -> Tensor:
    """Log probability of an answer whose tokens but the last stand at the end of the input."""
    logits = output[:, -answer.shape[1] :].float()
    return logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0].sum(1)


def answer_log_probs(
    network: LanguageModel,
    prompts: Sequence[Any],
    answers: Sequence[Any],
    steering: Steering | None = None,
    *,
    alpha: float | None = None,
    each: bool = False,
    runner: Runner | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities of answers after prompts, steered from the last token of the prompt on.

    Parameters
    ----------
    network : LanguageModel
    prompts : sequence of str, token ids or chats
    answers : sequence
        Texts or token ids that are scored after every prompt; with `each`, one for each prompt.
    steering : Steering, optional
    alpha : float, optional
        Another strength than the steering's own.
    each : bool, default False
    runner : Runner, optional

    Returns
    -------
    log_probs : ndarray (n_prompts, n_answers), nats
        Of the whole answer; (n_prompts, 1) with `each`. Answers of one token cost one pass together.
    lengths : ndarray of the same shape
        Tokens of the answer.
    """
    instance("network", network, LanguageModel)
    prompts, answers = items("prompts", prompts), items("answers", answers)
    if not prompts or not answers or (each and len(prompts) != len(answers)):
        raise InputError(f"prompts and answers are needed, as many with each=; got {len(prompts)} and {len(answers)}")
    told = [token_ids(network, a, special=False) for a in answers]

    def ask(prompt: Any, mine: list[list[int]]) -> Asking[np.ndarray]:
        ids = token_ids(network, prompt)
        edits = SteeringEdits()
        if steering is not None:
            choice = yield from steering.choose(network.encode([ids]))
            edits = steering.edits_of(choice, alpha)
        found = yield [
            Pass(
                network.encode([ids + a[:-1]], keep=len(a)),
                edits.over(len(a) - 1),
                of=Target(_answer_log_probability, (torch.tensor([a]),), name="log probability of the answer"),
            )
            for a in mine
        ]
        return np.array([float(f.scalar) for f in found])

    starts = [partial(ask, p, [told[i]] if each else told) for i, p in enumerate(prompts)]
    rows = quiet(runner).collect(network, starts, "scoring answers", "answers")
    lengths = np.array([len(a) for a in told])
    shape = (len(prompts), 1) if each else (len(prompts), len(told))
    return np.stack(rows), np.broadcast_to(lengths[:, None] if each else lengths, shape)


def margin(
    network: LanguageModel,
    prompts: Sequence[Any],
    positive: Sequence[Any],
    negative: Sequence[Any],
    steering: Steering | None = None,
    *,
    alpha: float | None = None,
    runner: Runner | None = None,
) -> Float[np.ndarray, " prompt"]:
    """Log odds of one set of answers against another after each prompt: log P(any positive) − log P(any negative), nats.

    The tokens of no answer may begin with those of another of its own set, or that one is counted twice. Parameters as for
    `answer_log_probs`.
    """
    positive, negative = items("positive", positive), items("negative", negative)
    if not positive or not negative:
        raise InputError("positive and negative answers are needed")
    p, _ = answer_log_probs(network, prompts, [*positive, *negative], steering, alpha=alpha, runner=runner)
    k = len(positive)
    return np.logaddexp.reduce(p[:, :k], axis=1) - np.logaddexp.reduce(p[:, k:], axis=1)


def perplexity(
    network: LanguageModel, prompts: Sequence[Any], texts: Sequence[Any], *, runner: Runner | None = None
) -> Float[np.ndarray, " prompt"]:
    """Perplexity of each text after its prompt, under the network as it is: how fluent steered text still is.

    NaN for an empty text. Parameters as for `answer_log_probs`.
    """
    prompts, texts = items("prompts", prompts), items("texts", texts)
    if len(prompts) != len(texts):
        raise InputError(f"one text for each prompt is needed; got {len(texts)} for {len(prompts)}")
    found = np.full(len(texts), np.nan)
    full = [i for i, t in enumerate(texts) if len(t)]
    if full:
        log_p, length = answer_log_probs(
            network, [prompts[i] for i in full], [texts[i] for i in full], each=True, runner=runner
        )
        found[full] = np.exp(-log_p / length)[:, 0]
    return found


def steered_divergence(
    network: LanguageModel, prompts: Sequence[Any], steering: Steering, *, alpha: float | None = None
) -> Float[np.ndarray, " prompt"]:
    """KL divergence, nats, of the steered from the unsteered distribution of the token after each prompt."""
    inputs = network.encode(list(items("prompts", prompts)))
    plain, steered = (network.run(Pass(inputs, e)) for e in ((), steering.edits(inputs, alpha).edits))
    assert plain.output is not None
    assert steered.output is not None
    return divergence(plain.output[:, -1], steered.output[:, -1]).cpu().numpy()


# ---------------------------------------------------------------- what is generated


def generate(
    network: LanguageModel,
    prompts: Sequence[Any],
    steering: Steering | None = None,
    *,
    alpha: float | None = None,
    samples: int = 1,
    runner: Runner | None = None,
    **settings: Any,
) -> list[list[str]]:
    """New texts for each prompt, under steering.

    Parameters
    ----------
    network : LanguageModel
    prompts : sequence of str, token ids or chats
    steering : Steering, optional
    alpha : float, optional
        Another strength than the steering's own.
    samples : int, default 1
    runner : Runner, optional
    **settings
        See `Rollout`.

    Returns
    -------
    list of list of str
        For each prompt its samples.
    """
    instance("network", network, LanguageModel)
    at_least("samples", samples, 1)
    prompts = items("prompts", prompts)
    if not prompts:
        raise InputError("no prompt was given")
    size = max(1, 64 // samples)  # rows that are generated together: enough to keep a processor busy
    settings = {"samples": samples, **settings}

    def ask(some: Sequence[Any]) -> Any:
        inputs = network.encode(list(some))
        edits = SteeringEdits()
        if steering is not None:
            choice = yield from steering.choose(inputs)
            edits = steering.edits_of(choice, alpha)
        answer = yield Rollout(inputs, *edits, **settings)
        assert answer.tokens is not None
        return [[network.continuation(s, settings.get("stop", ())) for s in row] for row in answer.tokens]

    starts = [partial(ask, prompts[i : i + size]) for i in range(0, len(prompts), size)]
    return [row for texts in quiet(runner).collect(network, starts, "generating", "generation") for row in texts]


_TAGS = {
    "c++": "c++", "cpp": "c++", "cc": "c++", "cxx": "c++", "c": "c", "python": "python", "py": "python", "python3": "python",
    "java": "java", "julia": "julia", "jl": "julia", "javascript": "javascript", "js": "javascript",
}  # fmt: skip
_SIGNS: dict[str, str] = {
    "c++": r"#include\s*<|std::|\bcout\s*<<|\busing\s+namespace\b|\btemplate\s*<|"
    r"^(?:int|long|bool|double|float|void|char|struct)\s+\w+\s*[({]",
    "java": r"\bpublic\s+(?:static|class)\b|\bSystem\.out\.|\bimport\s+java\.|\bString\[\]",
    "julia": r"^\s*end\s*$|\bprintln\(|^\s*using\s+[A-Z]\w*\s*$",
    "javascript": r"\bconsole\.log\(|\b(?:const|let|var)\s+\w+\s*=|=>\s*\{|\bfunction\s+\w+\s*\([^)]*\)\s*\{",
    "python": r"^\s*def\s+\w+\(.*\).*:\s*$|^\s*(?:import|from)\s+\w+|\bprint\(|^\s*(?:for|while|if)\s.*:\s*$|\bself\b",
}


def code_language(text: str) -> str:
    """Programming language of a text: the tag of its first fenced block, else the language with most typical signs.

    Returns
    -------
    {"c++", "c", "python", "java", "julia", "javascript", "none"}
        ``none`` where nothing tells, and for tags of other languages.
    """
    for tag in re.findall(r"```[ \t]*([\w+#]+)", text):
        return _TAGS.get(tag.lower(), "none")
    counts = {name: len(re.findall(sign, text, flags=re.MULTILINE)) for name, sign in _SIGNS.items()}
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "none"


def concept_bias(
    network: LanguageModel,
    prompts: Sequence[Any],
    classify: Callable[[str], str] = code_language,
    *,
    n_repeats: int = 25,
    temperature: float = 1.0,
    max_tokens: int = 64,
    steering: Steering | None = None,
    alpha: float | None = None,
    prefix: str = "",
    seed: int = 0,
    runner: Runner | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Shares of concepts in what a model generates.

    Parameters
    ----------
    network : LanguageModel
    prompts : sequence of str, token ids or chats
    classify : callable, default `code_language`
        Names the concept of a text.
    n_repeats : int, default 25
        Texts for each prompt.
    temperature : float, default 1.0
    max_tokens : int, default 64
    steering, alpha
        See `generate`.
    prefix : str, optional
        Set before each text when it is classified, such as the "```" in which the prompts end.
    seed : int, default 0
    runner : Runner, optional
    **settings
        See `Rollout`.

    Returns
    -------
    DataFrame
        One row a prompt, one column a concept, shares that add up to 1. ``table.mean()`` is the share over all texts,
        ``table.idxmax(axis=1).value_counts(normalize=True)`` that of prompts by their commonest concept.
    """
    texts = generate(
        network, prompts, steering, alpha=alpha, samples=n_repeats, temperature=temperature, max_tokens=max_tokens,
        seed=seed, runner=runner, **settings,
    )  # fmt: skip
    counts = [pd.Series([classify(prefix + t) for t in row]).value_counts(normalize=True) for row in texts]
    names = [p if isinstance(p, str) else f"prompt {i}" for i, p in enumerate(prompts)]
    table = pd.DataFrame(counts).fillna(0.0)
    table = table[table.mean().sort_values(ascending=False).index]
    return pd.DataFrame(
        table.to_numpy(), index=pd.Index(names, name="prompt"), columns=pd.Index(table.columns, name="concept")
    )


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True, eq=False)
class SteerResult:
    """What `steer` did.

    Attributes
    ----------
    prompts : tuple of str
    before, after : tuple of str
        What the model writes, unsteered and steered.
    margin_before, margin_after : ndarray (n_prompts,)
        How much more probable the examples to steer toward are than those to steer away from, when they follow the prompt:
        mean log probability a token, nats.
    kl : ndarray (n_prompts,)
        Divergence of the steered from the unsteered distribution of the next token, nats.
    perplexity_before, perplexity_after : ndarray (n_prompts,)
        Of the texts, under the unsteered model.
    strength : float
        In units of the mean activation length of each layer.
    layers : tuple of int
    steering : Steering
        To go on with, or to save.
    """

    prompts: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    margin_before: Float[np.ndarray, " prompt"]
    margin_after: Float[np.ndarray, " prompt"]
    kl: Float[np.ndarray, " prompt"]
    perplexity_before: Float[np.ndarray, " prompt"]
    perplexity_after: Float[np.ndarray, " prompt"]
    strength: float
    layers: tuple[int, ...]
    steering: Steering

    @property
    def table(self) -> pd.DataFrame:
        """One row a prompt."""
        columns = ("before", "after", "margin_before", "margin_after", "kl", "perplexity_before", "perplexity_after")
        return pd.DataFrame({c: getattr(self, c) for c in columns}, index=pd.Index(self.prompts, name="prompt"))


def steer(
    network: LanguageModel,
    toward: Sequence[str],
    away: Sequence[str],
    prompts: Sequence[str],
    strength: float | None = None,
    *,
    contexts: Sequence[str] | None = None,
    kl: float = 0.1,
    layers: Sequence[int] | None = None,
    n_clusters: int | None = None,
    max_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    runner: Runner | None = None,
) -> SteerResult:
    """Steer a model toward some example texts and away from others, and show what changes.

    Parameters
    ----------
    network : LanguageModel
    toward, away : sequence of str
        Examples. One of each is enough.
    prompts : sequence of str
        What the model goes on from.
    strength : float, optional
        In units of the mean activation length of each steered layer; negative steers the other way. By default it is
        calibrated: see `kl`.
    contexts : sequence of str, optional
        Prompts to which the examples are the answers, one for each pair (toward[i], away[i]). With them G-ACT clusters the
        differences and chooses a direction for each prompt; without them there is one direction, the difference of means
        over all tokens of the examples.
    kl : float, default 0.1
        How much the next token after neutral prose is to change, in nats, where no strength is given.
    layers : sequence of int, optional
        See `GACT` and `DiffMeanSteering`.
    n_clusters : int, optional
        See `GACT`; only with contexts.
    max_tokens, temperature, seed
        See `Rollout`.
    runner : Runner, optional

    Raises
    ------
    InputError
        Nothing to steer toward, away from or on; contexts and examples that do not pair.
    """
    instance("network", network, LanguageModel)
    lists = {"toward": items("toward", toward), "away": items("away", away), "prompts": items("prompts", prompts)}
    for name, texts in lists.items():
        if not texts or not all(isinstance(t, str) and t for t in texts):
            raise InputError(f"{name} must be texts, at least one and none empty; got {texts!r:.80}")
    toward, away, prompts = lists["toward"], lists["away"], lists["prompts"]
    options: dict[str, Any] = {"layers": layers, "alpha": strength, "kl": kl, "seed": seed, "runner": runner}
    if contexts is not None:
        steering: DiffMeanSteering | GACT = GACT(network, n_clusters=n_clusters, **options)
        steering.fit(Contrast(contexts, toward, away))
    else:
        if n_clusters not in (None, 1):
            raise InputError("clusters are made from answers to prompts: give contexts=, one for each pair of examples")
        sites = sites_of(network, "resid_post")

        def read(texts: Sequence[str], mean: bool) -> Tensor:
            ids = [token_ids(network, t) for t in texts]
            return states_of(network, [(network.encode([i]), len(i) if mean else 1) for i in ids], sites, runner)

        positive, negative = (read(texts, mean=True).mean(0, keepdim=True) for texts in (toward, away))
        steering = DiffMeanSteering(network, **options)
        steering.fit(Activations(read(prompts, mean=False), positive, negative))
    k = len(toward)
    margins, texts = [], []
    for used in (None, steering):
        log_p, lengths = answer_log_probs(network, prompts, [*toward, *away], used, runner=runner)
        rate = log_p / lengths
        margins.append(rate[:, :k].mean(1) - rate[:, k:].mean(1))
        found = generate(
            network, prompts, used, max_tokens=max_tokens, temperature=temperature, seed=seed, runner=runner
        )
        texts.append(tuple(row[0] for row in found))
    assert steering.alpha is not None
    return SteerResult(
        prompts, texts[0], texts[1], margins[0], margins[1], steered_divergence(network, prompts, steering),
        perplexity(network, prompts, texts[0], runner=runner), perplexity(network, prompts, texts[1], runner=runner),
        steering.alpha, tuple(steering.layers_), steering,
    )  # fmt: skip


# ---------------------------------------------------------------- pictures

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#777777"  # Okabe & Ito (2008)


def plot_probe_accuracy(accuracy: xr.DataArray, steered: Sequence[int] = (), path: str | Path | None = None) -> Figure:
    """Accuracy of the probes by layer, with the share of the largest cluster, and the steered layers marked.

    Parameters
    ----------
    accuracy : DataArray (layer,)
        From `GACT.probe_accuracy`.
    steered : sequence of int
    path : path, optional
        Where to save the picture.
    """
    figure = Figure(figsize=(6, 3), layout="constrained")
    ax = figure.subplots()
    layers = accuracy["layer"].to_numpy()
    for i in steered:
        ax.axvspan(i - 0.5, i + 0.5, color="#56B4E9", alpha=0.25, linewidth=0)
    ax.plot(layers, accuracy.to_numpy(), color=_BLUE, marker="o", markersize=3, label="probe, held-out prompts")
    ax.plot(layers, accuracy["majority"].to_numpy(), color=_GREY, linestyle="--", label="largest cluster")
    ax.set(xlabel="layer" + (" (shaded: steered)" if len(steered) else ""), ylabel="accuracy", ylim=(0, 1.03))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def plot_margins(
    margins: Mapping[str, Sequence[float] | np.ndarray], before: str, path: str | Path | None = None
) -> Figure:
    """Change of the log odds on each prompt, one line of points a method, with their means.

    Parameters
    ----------
    margins : mapping of name to (n_prompts,)
    before : str
        The name of the unsteered one, from which changes are counted.
    path : path, optional
        Where to save the picture.
    """
    if before not in margins:
        raise InputError(f"before={before!r} is none of {list(margins)}")
    base = np.asarray(margins[before])
    names = [name for name in margins if name != before]
    figure = Figure(figsize=(6, 0.8 + 0.4 * len(names)), layout="constrained")
    ax = figure.subplots()
    ax.axvline(0, color=_GREY, linewidth=1)
    for row, name in enumerate(names):
        change = np.asarray(margins[name]) - base
        ax.plot(change, np.full(len(change), row), "o", color=_BLUE, alpha=0.5, markersize=4, linestyle="none")
        ax.plot(change.mean(), row, marker="D", color=_ORANGE, markersize=7, linestyle="none")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("change of the log odds, nats (diamond: mean)")
    return _saved(figure, path)


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
