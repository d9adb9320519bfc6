"""Which components carry a difference: an approximation chosen on the model at hand, and its best verified by patching."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nissl.arguments import as_path, at_least, instance, is_whole
from nissl.attribution.patching import (
    ActivationPatching,
    AttributionPatching,
    NodeIntegratedGradients,
    Nodes,
    Patching,
    RelevancePatching,
    agreement,
    nodes_of,
    patch,
)
from nissl.errors import InputError, RuleError
from nissl.network import LanguageModel, Network, Pass, RelP
from nissl.network.target import logit_difference
from nissl.runner import Runner

CANDIDATES: dict[str, Patching] = {
    "atp": AttributionPatching(),
    "relp": RelevancePatching(),
    "relp+ah": RelevancePatching(rules=RelP()),
    "ig": NodeIntegratedGradients(steps=5, path="input"),
}
"""Approximations among which `choose_approximation` chooses: attribution patching, RelP without and with its attention
rule, and integrated gradients."""

TRACED = ("resid_pre", "attn_out", "mlp_out", "heads")
"""Kinds of node that `trace` looks at."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Approximations of activation patching beside a sample of the truth.

    Attributes
    ----------
    best : dict of kind to name
        The approximation with the largest correlation, kind by kind.
    table : pandas.DataFrame
        ``method``, and what `agreement` says: a row for each method and kind.
    scores : dict of name to xarray.Dataset
        What each approximation gave.
    truth : xarray.Dataset
        The sample of true effects; nodes that were not patched are NaN.
    refused : dict of name to str
        Approximations whose rules this network does not allow, and why.
    """

    best: dict[str, str]
    table: pd.DataFrame
    scores: dict[str, xr.Dataset]
    truth: xr.Dataset
    refused: dict[str, str]

    @property
    def estimate(self) -> xr.Dataset:
        """Scores of the best approximation of each kind."""
        first = self.scores[next(iter(self.best.values()))]
        return first.assign({kind: self.scores[name][kind] for kind, name in self.best.items()}).assign_attrs(
            method=", ".join(f"{kind}: {name}" for kind, name in self.best.items())
        )


def choose_approximation(
    network: Network,
    clean: Any,
    corrupted: Any = None,
    target: Any = None,
    *,
    kinds: Sequence[str | Nodes] = TRACED,
    candidates: Mapping[str, Patching] | None = None,
    sample: int = 48,
    ablate: str = "mean",
    seed: int = 0,
    runner: Runner | None = None,
) -> Choice:
    """Compare approximations with a random sample of true patches, on this network and these prompts.

    Parameters
    ----------
    network, clean, corrupted, target, kinds, ablate, seed, runner
        See `Patching.attribute`.
    candidates : mapping of name to Patching, optional
        By default `CANDIDATES`.
    sample : int, default 48
        True patches of each kind and pair, drawn among nodes whose activations differ.

    Raises
    ------
    RuleError
        The network allows the rules of no candidate.
    """
    methods = dict(CANDIDATES if candidates is None else candidates)
    at_least("sample", sample, 2)
    runner = Runner(memory=2**28) if runner is None else runner
    direction = {m.direction for m in methods.values()}
    if len(direction) != 1:
        raise InputError(f"candidates must have one direction, got {sorted(direction)}")
    same: dict[str, Any] = dict(kinds=nodes_of(network, kinds), ablate=ablate, seed=seed, runner=runner)
    true = {"patching": ActivationPatching(direction.pop(), sample=sample)}
    refused: dict[str, str] = {}
    try:
        scores = patch({**methods, **true}, network, clean, corrupted, target, **same)
    except RuleError:
        scores = {}
        for name, m in {**methods, **true}.items():
            try:
                scores |= patch({name: m}, network, clean, corrupted, target, **same)
            except RuleError as error:
                refused[name] = str(error)
        if len(scores) == 1:
            raise
    truth = scores.pop("patching")
    table = pd.concat(
        [agreement(s, truth, seed=seed).assign(method=name) for name, s in scores.items()], ignore_index=True
    )
    best = {}
    for kind, rows in table.groupby("kind", sort=False):
        r = rows["r_changed"].fillna(-np.inf)
        best[str(kind)] = str(rows.loc[r.idxmax(), "method"])
    columns = ["kind", "method", *(c for c in table.columns if c not in ("kind", "method"))]
    order = table["kind"].argsort(kind="stable")
    return Choice(best, table.loc[order, columns].reset_index(drop=True), scores, truth, refused)


@dataclass(frozen=True, eq=False)
class TraceResult:
    """The components that carry a difference.

    Attributes
    ----------
    tokens, other_tokens : list of str
        Of the clean and the corrupted prompt; the latter empty where activations were ablated instead.
    answer, wrong : str
        What the difference is between.
    clean, corrupted : float
        Logit of `answer` minus that of `wrong` after each prompt; `corrupted` is NaN where there was none.
    scores : xarray.Dataset
        For each kind the estimates of the approximation that was chosen for it.
    choice : Choice
    top : pandas.DataFrame
        The nodes with the largest estimates of each kind: ``kind``, ``layer``, ``position``, ``token``, ``head``,
        ``estimate``, ``effect`` (by real patching) and ``share`` of the difference between the prompts.
    forward, backward : int
        Passes asked for, in rows.
    seconds : float
    """

    tokens: list[str]
    other_tokens: list[str]
    answer: str
    wrong: str
    clean: float
    corrupted: float
    scores: xr.Dataset
    choice: Choice
    top: pd.DataFrame
    forward: int
    backward: int
    seconds: float

    def plot(self, path: str | Path | None = None) -> Figure:
        """Layer × position pictures of all kinds; written to `path` if given."""
        return plot_nodes(self.scores, tokens=self.tokens, path=path)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the scores, as plain values."""
        table = self.choice.table.astype(object).where(self.choice.table.notna(), None)
        top = self.top.astype(object).where(self.top.notna(), None)
        return {
            "tokens": self.tokens,
            "other_tokens": self.other_tokens,
            "answer": self.answer,
            "wrong": self.wrong,
            "clean": self.clean,
            "corrupted": None if np.isnan(self.corrupted) else self.corrupted,
            "chosen": self.choice.best,
            "agreement": table.to_dict("records"),
            "refused": self.choice.refused,
            "top": top.to_dict("records"),
            "forward_passes": self.forward,
            "backward_passes": self.backward,
            "seconds": round(self.seconds, 3),
        }


def trace(
    network: LanguageModel,
    clean: Any,
    corrupted: Any = None,
    answer: str | int | None = None,
    wrong: str | int | None = None,
    *,
    kinds: Sequence[str] = TRACED,
    top: int = 5,
    sample: int = 48,
    seed: int = 0,
    runner: Runner | None = None,
) -> TraceResult:
    """Find the components that carry the difference between two answers.

    Four approximations are compared with a random sample of true patches on this model and prompt. The best of each kind
    scores all nodes, and the nodes it puts first are patched for real.

    Parameters
    ----------
    network : LanguageModel
    clean : str, token ids or chat
        The prompt to be explained.
    corrupted : str, token ids or chat, optional
        The same prompt with what decides the answer changed, of the same number of tokens: scores say how much of the
        clean answer a node brings back. Without it, nodes are set to their mean over the prompt: scores say what is lost.
    answer, wrong : str or int, optional
        The two answers, each one token. By default what the model predicts after the clean prompt, and after the
        corrupted one (or what it puts second).
    kinds : sequence of str
        See `nodes_of`.
    top : int, default 5
        Nodes of each kind that are patched for real.
    sample : int, default 48
        True patches of each kind by which approximations are compared.
    seed : int, default 0
    runner : Runner, optional

    Raises
    ------
    InputError
        Prompts of different length, the same prompt twice, answers that are not one token or are the same.
    SiteError
        The model lacks a part; says which.
    """
    instance("network", network, LanguageModel)
    at_least("top", top, 1)
    runner = Runner(memory=2**28) if runner is None else runner
    instance("runner", runner, Runner)
    started = time.perf_counter()
    nodes = nodes_of(network, kinds)
    texts = [_prompt(network, p) for p in (clean, corrupted) if p is not None]
    ids = [network.encode([t])["input_ids"][0] for t in texts]
    a, b = _answers(network, texts, answer, wrong)
    target = logit_difference([a], [b], position=-1)
    pair = texts[:1], texts[1:] or None
    before = [sum(getattr(c, k) for c in runner.costs.values()) for k in ("forward", "backward")]
    choice = choose_approximation(network, *pair, target, kinds=nodes, sample=sample, seed=seed, runner=runner)
    scores = choice.estimate
    best = {n.kind: _largest(scores[n.kind].values[0], top) for n in nodes}
    masks = {n.kind: _mask(scores[n.kind].shape[1:], best[n.kind]) for n in nodes}
    true = patch(
        {"patching": ActivationPatching(only=masks)}, network, *pair, target, kinds=nodes, seed=seed, runner=runner
    )["patching"]  # fmt: skip
    m_clean, m_corrupted = float(true["clean"][0]), float(true["corrupted"][0])
    strings = [network.strings(i) for i in ids]
    rows = []
    for n in nodes:
        for where in best[n.kind]:
            effect = float(true[n.kind].values[0][where])
            rows.append({
                "kind": n.kind, "layer": where[0], "position": where[1] - len(ids[0]), "token": strings[0][where[1]],
                "head": where[2] if n.dim else None, "estimate": float(scores[n.kind].values[0][where]), "effect": effect,
                "share": effect / (m_clean - m_corrupted) if corrupted is not None else effect / m_clean,
            })  # fmt: skip
    spent = [sum(getattr(c, k) for c in runner.costs.values()) for k in ("forward", "backward")]
    right, bad = network.strings([a, b])
    return TraceResult(
        tokens=strings[0],
        other_tokens=strings[1] if len(strings) > 1 else [],
        answer=right,
        wrong=bad,
        clean=m_clean,
        corrupted=m_corrupted,
        scores=scores,
        choice=choice,
        top=pd.DataFrame(rows),
        forward=spent[0] - before[0],
        backward=spent[1] - before[1],
        seconds=time.perf_counter() - started,
    )


def _prompt(network: LanguageModel, prompt: Any) -> Any:
    """One prompt, as `encode` takes it in a list."""
    if len(network.encode(prompt if isinstance(prompt, str) else [prompt])["input_ids"]) != 1:
        raise InputError("trace takes one prompt at a time")
    return prompt


def _answers(network: LanguageModel, texts: list[Any], answer: Any, wrong: Any) -> tuple[int, int]:
    """Token ids of both answers."""

    def given(text: Any) -> int | None:
        return text if text is None or is_whole(text) else network.token(text)

    a, b = given(answer), given(wrong)
    if a is None or b is None:
        likely = [network.run(Pass(network.encode([t]))).output for t in texts]
        first = [t[0, -1].topk(2).indices.tolist() for t in likely if t is not None]
        a = first[0][0] if a is None else a
        b = next(i for i in (first[-1][0], *first[0]) if i != a) if b is None else b
    if a == b:
        raise InputError(f"the two answers are the same: {network.strings([a])[0]!r}")
    return int(a), int(b)


def _largest(values: np.ndarray, k: int) -> list[tuple[int, ...]]:
    """Indices of the values of largest size, largest first."""
    order = np.argsort(-np.abs(values), axis=None, kind="stable")[:k]
    return [tuple(int(j) for j in np.unravel_index(i, values.shape)) for i in order]


def _mask(shape: tuple[int, ...], where: list[tuple[int, ...]]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(np.array(where).T)] = True
    return mask


def plot_nodes(
    scores: xr.Dataset, example: int = 0, tokens: Sequence[str] | None = None, path: str | Path | None = None
) -> Figure:
    """Scores of one pair: a layer × position picture of each kind; for heads and neurons the sums over positions.

    Parameters
    ----------
    scores : xarray.Dataset
        What a patching method's `attribute` returned.
    example : int, default 0
    tokens : sequence of str, optional
        Names of the positions, the last ones.
    path : str or path, optional
        Where the picture is written; PNG, SVG or PDF by its ending.

    Returns
    -------
    matplotlib.figure.Figure
    """
    kinds = [str(k) for k in scores.data_vars if scores[k].ndim in (3, 4) and scores[k].dims[-1] != "unit"]
    if not kinds:
        raise InputError(f"nothing to draw: scores hold {list(scores.data_vars)}")
    file = None if path is None else as_path("path", path)
    width = max(3.2, 0.26 * scores.sizes["position"] + 1.4)
    columns = min(len(kinds), 2)
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(width * columns, 3.6 * rows), layout="constrained")
    for i, kind in enumerate(kinds):
        axes = figure.add_subplot(rows, columns, i + 1)
        values = scores[kind].values[example]
        places = ~np.isnan(values).all(axis=(0, *range(2, values.ndim)))
        table = values[:, places] if values.ndim == 2 else np.nansum(values, 1)
        top = float(np.nanmax(np.abs(table), initial=0)) or 1.0
        # blue to red through white stays readable to the colour-blind; equal limits keep zero white
        image = axes.imshow(table, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", origin="lower")
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes.set_title(kind if values.ndim == 2 else f"{kind}, summed over positions", fontsize=10)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("layer" if i % columns == 0 else "")
        if values.ndim == 3:
            axes.set_xlabel(str(scores[kind].dims[-1]))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            continue
        names = list(tokens)[-int(places.sum()) :] if tokens is not None else scores["position"].values[places]
        axes.set_xticks(range(len(names)), [_shown(n) for n in names], rotation=90, fontsize=8)
    if file is not None:
        figure.savefig(file, dpi=90)
    return figure


def _shown(name: Any) -> str:
    """A token as a label: dollar signs would be read as mathematics."""
    return str(name).replace("\n", "\\n").replace("$", r"\$").strip() or "␣"
