"""Neely, Schouten, Bleeker, Lucic: A song of (dis)agreement (2022).

Measured on a synthetic task whose truth is known, with a BiLSTM with additive attention and a small transformer, and on
rated sentences of film reviews where their archive lies in the current folder. The thresholds below were written down
before the first run, but for `SAME_ORDER`.

DeepLIFT comes twice. ``deeplift`` keeps its promise that scores sum to the change of the output, through gates, attention
and norms. ``deeplift-run`` is what the authors' tool (Captum) computes on these networks: it has rules for nonlinearities
that are modules of their own only, of which there are none here, so what is left is the gradient times the difference to
the baseline. It was added, with the check of the order of methods, when a trial run showed that the complete one behaves
differently.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console
from torch import Tensor, nn

from nissl.attribution import (
    LIME,
    AttentionFlow,
    AttentionRollout,
    AttentionWeights,
    DeepLIFT,
    ExpectedGradients,
    IntegratedGradients,
    Method,
    RandomScores,
)
from nissl.attribution.masking import Baseline, baseline_of
from nissl.errors import InputError
from nissl.models.text import AttentiveBiLSTM, TextTransformer, Vocabulary, train_classifier
from nissl.network import Network
from nissl.runner import Asking, Explained, Question, Runner, explained
from nissl.sources.sentiment import load_sentiment
from nissl.studies.claims import stated
from nissl.trust.agreement import AttributionAgreement, kendall
from nissl.trust.faithfulness import RegionCurves
from nissl.trust.statistics import bootstrap

ACCURACY = {"synthetic": 0.75, "sentiment": 0.7}
IG_GRADSHAP = 0.65
DEEP_PAIR = 0.45
ABOVE_IG_DEEPLIFT = 0.15
RANDOM = 0.06
ATTENTION_AT_MOST = 0.55
TRUE_ENOUGH = 0.45
DEEP_PAIR_BILSTM = 0.6
FARTHER_FROM_TRUTH = 0.1
RERUN = 0.6
SAME_ORDER = 0.8
ATTENTION_APART = 0.2
UNIFORM = 0.03

ATTENTION = ("attention", "rollout", "flow")
COMPARED = ("ig", "gradshap", "lime", "deeplift-run", "deepshap-run")
"""The five attributions of the paper, as its authors ran them."""


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One seed, smaller networks, few and short texts, in seconds; no film reviews.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over texts, seeds together),
        ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    claims: list[dict[str, Any]] = []
    size = Size(10, 16, 10, 150, 200, 16, 64, 1) if quick else Size(16, 32, 60, 400, 800, 32, 1000, 3)
    for kind in ("BiLSTM", "transformer"):
        runs = [on_polarity(kind, size, seed + i, progress, rerun=not i) for i in range(size.seeds)]
        both = pool(runs)
        for line in table(both):
            console.print(f"{kind}, mean over texts and seeds", line.to_string(), sep="\n", soft_wrap=True)
        claims += list(_synthetic(kind, runs, both, seed))
    if quick:
        return claims
    try:
        films = load_sentiment()
    except InputError as error:
        warnings.warn(f"the claims on film reviews are not measured: {error}", stacklevel=2)
        return claims
    task = film_task(films.words(), films.ratings, films.lexicon, seed)
    for kind in ("BiLSTM", "transformer"):
        runs = [on_films(kind, task, seed + i, progress=progress) for i in range(2)]
        both = pool(runs)
        for line in table(both):
            console.print(f"{kind}, mean over texts and seeds", line.to_string(), sep="\n", soft_wrap=True)
        claims += list(_sentiment(kind, runs, both, seed))
    return claims


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Size:
    """How much is done: tokens in a text, units, texts explained, training steps of both networks, batch, LIME, seeds."""

    tokens: int
    width: int
    texts: int
    lstm_steps: int
    transformer_steps: int
    batch: int
    samples: int
    seeds: int


@dataclass(frozen=True, eq=False)
class PlainDeepLIFT(Method):
    """Gradient times the difference to a baseline: DeepLIFT by a tool that has a rule for none of the network's parts."""

    baseline: Baseline = "zero"

    name: ClassVar[str] = "deeplift-run"
    title: ClassVar[str] = "DeepLIFT as run"
    paper: ClassVar[str] = "Neely et al. 2022"
    differentiates: ClassVar[bool] = True

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        b = yield from baseline_of(self.baseline, q, x)
        answer = yield q.ask(gradient=True)
        return explained(q, (answer.gradients[q.site] * (x - b.mean(0)))[0])


@dataclass(frozen=True, eq=False)
class Run:
    """One network trained and explained.

    Attributes
    ----------
    found : Dataset
        Agreements; see `AttributionAgreement.evaluate`.
    accuracy : float
    faithfulness : DataFrame
        Insertion minus deletion, texts × methods: what the audit says of the same scores.
    uniform : float or None
        Accuracy of a network whose attention is uniform.
    """

    found: xr.Dataset
    accuracy: float
    faithfulness: pd.DataFrame
    uniform: float | None = None


def polarity_task(n: int, seed: int, tokens: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Texts of which each token's true weight is known.

    Of 60 ids, 1 starts every text and 2 negates what follows; 12 have a polarity of .3 to 1.5, 12 one of -.3 to -1.5,
    the others none. The label is the sign of the sum.

    Returns
    -------
    tuple of Tensor
        Ids (n, tokens), labels (n,), true weights (n, tokens).
    """
    generator = torch.Generator().manual_seed(seed)
    polarity = torch.zeros(60)
    polarity[3:15], polarity[15:27] = torch.linspace(0.3, 1.5, 12), -torch.linspace(0.3, 1.5, 12)
    ids = torch.randint(3, 60, (n, tokens), generator=generator)
    ids[torch.rand(n, tokens, generator=generator) < 0.1] = 2
    ids[:, 0] = 1
    weights = polarity[ids]
    weights[:, 1:] *= torch.where(ids[:, :-1] == 2, -1.0, 1.0)
    return ids, (weights.sum(1) > 0).long(), weights


def methods_for(model: Any, kind: str, tokens: int, background: Tensor, samples: int) -> dict[str, Method]:
    """The methods of the paper, complete DeepLIFT beside them, and random scores.

    Absent is the embedding of the padding token, as in the paper; for Deep-SHAP it is each of the background texts.
    """
    with torch.no_grad():
        absent = model.embedding(torch.zeros(1, tokens, dtype=torch.long))
        texts = model.embedding(background)
    found: dict[str, Method] = {
        "ig": IntegratedGradients(steps=50, baseline=absent), "gradshap": ExpectedGradients(samples=5, baseline=absent),
        "lime": LIME(n_samples=samples, baseline=0), "deeplift": DeepLIFT(baseline=absent),
        "deepshap": DeepLIFT(baseline=texts), "deeplift-run": PlainDeepLIFT(absent),
        "deepshap-run": PlainDeepLIFT(texts), "attention": AttentionWeights(),
    }  # fmt: skip
    if kind == "transformer":
        found |= {"rollout": AttentionRollout(), "flow": AttentionFlow()}
    return found | {"random": RandomScores()}


def measure(
    kind: str, model: nn.Module, ids: Tensor, labels: Tensor, texts: int, background: Tensor, samples: int, seed: int,
    truth: np.ndarray, progress: bool, rerun: bool = False,
) -> Run:  # fmt: skip
    """Accuracy on all texts; explanations, agreement and the audit's curves on the first of them."""
    with torch.no_grad():
        accuracy = float((model(ids).argmax(1) == labels).float().mean())
    network, few = Network(model, name=kind), ids[:texts]
    inputs = {"ids": few, "mask": few != 0}
    runner = Runner(progress=progress, tune=False)
    methods = methods_for(model, kind, ids.shape[1], background, samples)
    found = AttributionAgreement(methods).evaluate(
        network, inputs, mask=few.numpy() != 0, truth=truth, rerun=rerun, seed=seed, runner=runner
    )
    signed = runner.attribute(methods, network, inputs, seed=seed)  # answered from the runner's memory
    curves = {name: RegionCurves().evaluate(network, inputs, s, runner=runner) for name, s in signed.items()}
    return Run(found, accuracy, pd.DataFrame({name: c["faithfulness"] for name, c in curves.items()}))


def on_polarity(kind: str, size: Size, seed: int, progress: bool = False, rerun: bool = False) -> Run:
    """Train a network on the synthetic task and explain new texts."""
    ids, labels, _ = polarity_task(40_000, 3 * seed, size.tokens)
    test, y, weights = polarity_task(2000, 3 * seed + 1, size.tokens)
    background, _, _ = polarity_task(8, 3 * seed + 2, size.tokens)

    def make() -> nn.Module:
        if kind == "BiLSTM":
            return AttentiveBiLSTM(60, width=size.width, hidden=size.width)
        return TextTransformer(60, width=size.width, length=size.tokens)

    steps, rate = (size.lstm_steps, 5e-3) if kind == "BiLSTM" else (size.transformer_steps, 3e-3)
    model = train_classifier(
        make, ids, labels, steps=steps, batch=4 * size.batch, rate=rate, seed=seed, progress=progress
    )
    truth = weights[: size.texts].numpy()
    return measure(kind, model, test, y, size.texts, background, size.samples, seed, truth, progress, rerun)


@dataclass(frozen=True, eq=False)
class FilmTask:
    """Sentences of film reviews, positive or negative, in words of a vocabulary; and what people say of single words."""

    ids: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    words: Vocabulary
    ratings: np.ndarray


def film_task(
    texts: list[list[str]], ratings: np.ndarray, lexicon: dict[str, float], seed: int, length: int = 32
) -> FilmTask:
    """Sentences rated above 1 or below -1, a fifth of them kept for the test."""
    clear = np.flatnonzero(np.abs(ratings) > 1)
    clear = clear[np.random.default_rng(seed).permutation(len(clear))]
    test, train = clear[: len(clear) // 5], clear[len(clear) // 5 :]
    words = Vocabulary.of([texts[i] for i in train])
    (x, y), (test_x, test_y) = (
        (words.encode([texts[i] for i in rows], length), torch.from_numpy((ratings[rows] > 0).astype(np.int64)))
        for rows in (train, test)
    )
    return FilmTask(x, y, test_x, test_y, words, np.array([lexicon.get(w, 0.0) for w in words.words]))


def on_films(
    kind: str, task: FilmTask, seed: int, texts: int = 40, steps: int | None = None, progress: bool = False
) -> Run:
    """Train a network on film reviews and explain unseen ones; the 'truth' beside is people's rating of each word."""

    def make(uniform: bool = False) -> Callable[[], nn.Module]:
        n = len(task.words.words)
        if kind == "BiLSTM":
            return lambda: AttentiveBiLSTM(n, width=48, hidden=48, uniform=uniform)
        return lambda: TextTransformer(n, width=48, layers=2, length=task.ids.shape[1])

    def train(uniform: bool = False) -> nn.Module:
        return train_classifier(
            make(uniform), task.ids, task.labels, steps=steps or 450, batch=64, rate=3e-3, decay=0.1, seed=seed,
            progress=progress,
        )  # fmt: skip

    background = task.ids[torch.randperm(len(task.ids), generator=torch.Generator().manual_seed(seed))[:8]]
    rated = task.ratings[task.test[:texts].numpy()]
    found = measure(kind, train(), task.test, task.test_labels, texts, background, 1000, seed, rated, progress)
    if kind != "BiLSTM":
        return found
    control = train(uniform=True)
    with torch.no_grad():
        uniform = (control(task.test).argmax(1) == task.test_labels).float().mean()
    return Run(found.found, found.accuracy, found.faithfulness, float(uniform))


def pool(runs: Sequence[Run]) -> xr.Dataset:
    """Agreements of all texts of all seeds, and the audit's verdict beside (method_a, example)."""
    values = xr.concat([r.found[["value", "truth_value"]] for r in runs], dim="example").sel(
        measure="kendall", drop=True
    )
    curves = np.concatenate([r.faithfulness.to_numpy().T for r in runs], axis=1)
    both = values.assign(faithfulness=(("method_a", "example"), curves))
    ceilings = [r.found["ceiling_mean"].sel(measure="kendall").to_numpy() for r in runs if "ceiling_mean" in r.found]
    return both.assign(ceiling=("method_a", np.mean(ceilings, axis=0))) if ceilings else both


def with_others(both: xr.Dataset) -> xr.DataArray:
    """Of each text and method, the mean agreement with the other methods, random scores apart."""
    named = [m for m in both["method_a"].values if m != "random"]
    pairs = both["value"].sel(method_b=named)
    return pairs.where(pairs["method_a"] != pairs["method_b"]).mean("method_b")


def table(both: xr.Dataset) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean agreements; and beside them what they cannot say: truth, the audit's curves, agreement with a re-run."""
    mean = pd.DataFrame(both["value"].mean("example").to_numpy(), both["method_a"].values, both["method_b"].values)
    others = with_others(both)
    beside = {
        "agreement with the others": others.mean("example"), "sd": others.std("example"),
        "with the truth": both["truth_value"].mean("example"),
        "insertion - deletion": both["faithfulness"].mean("example"),
    }  # fmt: skip
    if "ceiling" in both:
        beside["with its re-run"] = both["ceiling"]
    rest = pd.DataFrame({k: np.asarray(v) for k, v in beside.items()}, both["method_a"].values)
    return mean.round(2), rest.round(2)


def order_by_truth(both: xr.Dataset, seed: int, resamples: int = 1000) -> tuple[float, float, float]:
    """Kendall's tau, over methods, of their agreement with the others and with the truth; and its 95 % interval."""
    named = [m for m in both["method_a"].values if m != "random"]
    figures = [a.sel(method_a=named).transpose("method_a", "example") for a in (with_others(both), both["truth_value"])]
    stack = np.stack([a.to_numpy() for a in figures])
    n = stack.shape[2]
    drawn = [np.arange(n), *np.random.default_rng(seed).integers(0, n, (resamples, n))]
    means = np.nanmean(stack[:, :, np.array(drawn)], axis=3)  # (2, methods, 1 + resamples)
    taus = kendall(means[0].T, means[1].T)
    low, high = np.quantile(taus[1:], [0.025, 0.975])
    return float(taus[0]), float(low), float(high)


# ---------------------------------------------------------------- claims


def _claim(
    claim: str, paper: str, values: Any, baseline: float, seed: int, *, least: float | None = None,
    most: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A mean that should be at least `least` and above the baseline with its interval, or at most `most` with it."""
    found = bootstrap(np.asarray(values, dtype=float), seed=seed)
    several = bool(found.n > 1)
    low, high = (float(found.low), float(found.high)) if several else (float(found.value), float(found.value))
    if least is not None:
        claim, holds = f"{claim}, at least {least:g}", bool(found.value >= least and low > baseline)
    else:
        claim, holds = f"{claim}, at most {most:g}", bool(most is not None and high <= most)
    return stated(claim, paper, found, baseline, holds)


def _pair(both: xr.Dataset, a: str, b: str) -> np.ndarray:
    return both["value"].sel(method_a=a, method_b=b).to_numpy()


def _attention(both: xr.Dataset) -> np.ndarray:
    """Of each text, the mean agreement of attention with the paper's attributions."""
    shown = [m for m in ATTENTION if m in both["method_a"]]
    return both["value"].sel(method_a=shown, method_b=list(COMPARED)).mean(("method_a", "method_b")).to_numpy()


def _random(where: str, both: xr.Dataset, seed: int) -> dict[str, Any]:
    """Random scores agree with nothing: the mean over methods of the size of the mean agreement."""
    others = [m for m in both["method_a"].values if m != "random"]
    values = both["value"].sel(method_a=others, method_b="random")
    found = _claim(f"{where}: agreement with random scores, mean size", "(control)", values.mean("method_a"), 0.0, seed,
                   most=RANDOM)  # fmt: skip
    size = float(np.abs(values.mean("example")).mean())
    return found | {"ours": size, "holds": size <= RANDOM}


def _synthetic(kind: str, runs: Sequence[Run], both: xr.Dataset, seed: int) -> Iterator[dict[str, Any]]:
    where = f"synthetic, {kind}"
    yield _claim(f"{where}: new texts are classified correctly", "(precondition)", [r.accuracy for r in runs], 0.5, seed,
                 least=ACCURACY["synthetic"])  # fmt: skip
    yield _claim(f"{where}: IG and Grad-SHAP agree", ".50 to .97", _pair(both, "ig", "gradshap"), 0.0, seed,
                 least=IG_GRADSHAP)  # fmt: skip
    for suffix, note in (("-run", " as run"), ("", ", complete")):
        lift, shap = f"deeplift{suffix}", f"deepshap{suffix}"
        deep, across = _pair(both, lift, shap), _pair(both, "ig", lift)
        yield _claim(f"{where}: DeepLIFT and Deep-SHAP{note} agree", ".45 to .48", deep, 0.0, seed, least=DEEP_PAIR)
        for name, family in (("IG and Grad-SHAP", _pair(both, "ig", "gradshap")), ("DeepLIFT and Deep-SHAP", deep)):
            yield _claim(f"{where}: {name} agree more than IG and DeepLIFT{note}", "yes (BiLSTM .07 to .24)",
                         family - across, 0.0, seed, least=ABOVE_IG_DEEPLIFT)  # fmt: skip
    yield _random(where, both, seed)
    yield _claim(f"{where}: attention and attributions", ".05 to .25", _attention(both), 0.0, seed,
                 most=ATTENTION_AT_MOST)  # fmt: skip
    for name in ("ig", "lime"):
        yield _claim(f"{where}: {name} and the truth", "(not measured)", both["truth_value"].sel(method_a=name), 0.0, seed,
                     least=TRUE_ENOUGH)  # fmt: skip
    for name in ("gradshap", "lime"):
        yield _claim(f"{where}: {name} and its re-run", "(ceiling)", [float(both["ceiling"].sel(method_a=name))], 0.0, seed,
                     least=RERUN)  # fmt: skip
    tau, low, high = order_by_truth(both, seed)
    yield {
        "claim": f"{where}: order of methods by agreement with the others and by truth, Kendall, at most {SAME_ORDER:g}",
        "paper": "agreement is no test of truth", "ours": tau, "interval": [low, high], "baseline": 0.0,
        "holds": high <= SAME_ORDER,
    }  # fmt: skip
    if kind != "BiLSTM":
        return
    truth = both["truth_value"]
    for suffix, note in (("-run", " as run"), ("", ", complete")):
        values = _pair(both, f"deeplift{suffix}", f"deepshap{suffix}")
        yield _claim(f"{where}: the pair DeepLIFT, Deep-SHAP{note} agrees", "agreement is no test of truth", values, 0.0,
                     seed, least=DEEP_PAIR_BILSTM)  # fmt: skip
        for name in ("deeplift", "deepshap"):
            farther = truth.sel(method_a="ig") - truth.sel(method_a=f"{name}{suffix}")
            yield _claim(f"{where}: yet {name}{note} is farther from the truth than IG", "agreement is no test of truth",
                         farther, 0.0, seed, least=FARTHER_FROM_TRUTH)  # fmt: skip


def _sentiment(kind: str, runs: Sequence[Run], both: xr.Dataset, seed: int) -> Iterator[dict[str, Any]]:
    where, published = f"films, {kind}", {"BiLSTM": ".11 to .14", "transformer": ".05 to .14"}[kind]
    yield _claim(f"{where}: unseen sentences are classified correctly", ".83 (SST-2, BiLSTM)", [r.accuracy for r in runs],
                 0.5, seed, least=ACCURACY["sentiment"])  # fmt: skip
    uniform = [abs(r.accuracy - r.uniform) for r in runs if r.uniform is not None]
    if uniform:
        yield _claim(f"{where}: difference of accuracy under uniform attention", ".003 (SST-2)", uniform, 0.0, seed,
                     most=UNIFORM)  # fmt: skip
    attention = _attention(both)
    yield _claim(f"{where}: attention and attributions", published, attention, 0.0, seed, most=ATTENTION_AT_MOST)
    yield _claim(f"{where}: IG and Grad-SHAP agree more than attention and attributions",
                 {"BiLSTM": ".85", "transformer": ".41"}[kind], _pair(both, "ig", "gradshap") - attention, 0.0, seed,
                 least=ATTENTION_APART)  # fmt: skip
    yield _random(where, both, seed)
