"""Thought Anchors: which sentences of a written chain of reasoning steer the rest of it.

Three methods that know nothing of each other: resampling (`Resampling`), attention that many later sentences pay to few
earlier ones (`ReceiverHeads`), and hiding a sentence from what follows (`AttentionSuppression`). `ThoughtAnchors` joins them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.stats import kurtosis, rankdata
from torch import Tensor

from nissl.arguments import at_least, flag, instance, is_number
from nissl.attribution.resampling import Resampling, Sampler, driven, later, plain_runner
from nissl.attribution.sentences import Trace, TracedTokens, label_by_rules
from nissl.errors import InputError, blame
from nissl.network import Ablate, Edit, LanguageModel, Pass, Set
from nissl.runner import Asking, Runner
from nissl.runner.scores import parameters_of

# ---------------------------------------------------------------- receiver heads


@dataclass(frozen=True, eq=False)
class Received:
    """What `ReceiverHeads` found.

    Attributes
    ----------
    kurtosis : DataArray (layer, head)
        Mean over traces; NaN in the layers that are left out.
    heads : tuple of (int, int)
        Layer and head of the receiver heads, the most peaked first.
    scores : list of ndarray (S,)
        For each trace, what these heads pay to each sentence from at least `min_distance` later ones; NaN for the last
        sentences.
    reliability : float
        Correlation over heads of the kurtosis of even and odd traces; NaN with fewer than two traces.
    """

    kurtosis: xr.DataArray
    heads: tuple[tuple[int, int], ...]
    scores: list[np.ndarray]
    reliability: float


@dataclass(frozen=True, eq=False)
class ReceiverHeads:
    """Attention heads whose attention from later sentences gathers on few earlier ones, and those sentences.

    Parameters
    ----------
    k : int, default 20
        Number of receiver heads.
    min_distance : int, default 4
        Attention counts from at least so many sentences later. At least 1 is taken: within a sentence half of the block
        is masked.
    skip : int, default 1
        First layers left out: their kurtosis is unstable.
    control_depth : bool, default False
        Replace the attention of each later sentence by its ranks, divided by their number, so that sentences with much
        before them do not count less.
    memory : int, default 256 MiB
        Bytes of attention patterns read at once; each layer is reduced to sentences before the next ones are read.

    References
    ----------
    Bogdan, Macar, Nanda, Conmy: Thought Anchors: Which LLM reasoning steps matter? (2025).
    """

    k: int = 20
    min_distance: int = 4
    skip: int = 1
    control_depth: bool = False
    memory: int = 2**28

    def __post_init__(self) -> None:
        for name, low in (("k", 1), ("min_distance", 0), ("skip", 0), ("memory", 1)):
            at_least(name, getattr(self, name), low)
        flag("control_depth", self.control_depth)

    def blocks(self, network: LanguageModel, trace: Trace, runner: Runner | None = None) -> np.ndarray:
        """Mean attention between sentences, (n_layers, n_heads, S queries, S keys)."""
        return driven(self.ask(network, trace), network, "receiver heads", runner)

    def ask(self, network: LanguageModel, trace: Trace) -> Asking[np.ndarray]:
        """The same as a generator of Passes."""
        instance("trace", trace, Trace)
        tokens = trace.tokens(network.tokenizer)
        sites = network.anatomy.sites("pattern")
        inputs = network.encode([tokens.ids])
        at_once = max(1, self.memory // (4 * network.anatomy.n_heads * len(tokens.ids) ** 2))
        means = tokens.means().to(network.device)
        blocks = []
        for start in range(0, len(sites), at_once):
            read = sites[start : start + at_once]
            answer = yield Pass(inputs, read=read, output=False)
            blocks += [means @ answer.reads[s][0].float() @ means.T for s in read]
        return torch.stack(blocks).cpu().numpy()

    def vertical(self, blocks: Any) -> np.ndarray:
        """Mean attention that each sentence gets from at least `min_distance` later ones, (..., S); NaN for the last.

        Parameters
        ----------
        blocks : array_like (..., S queries, S keys)
        """
        a = _square(blocks)
        n = a.shape[-1]
        apart = np.subtract.outer(np.arange(n), np.arange(n))
        if self.control_depth:
            earlier = np.where(apart > 0, a, np.nan)
            with np.errstate(invalid="ignore"):
                a = rankdata(earlier, axis=-1, nan_policy="omit") / np.maximum((apart > 0).sum(-1), 1)[:, None]
        far = apart >= max(self.min_distance, 1)
        count = far.sum(0)
        total = np.where(far, a, 0).sum(-2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def fit(self, blocks: Sequence[Any]) -> Received:
        """Find the receiver heads of some traces and score their sentences.

        Parameters
        ----------
        blocks : sequence of array_like (n_layers, n_heads, S, S)
            One for each trace; traces may differ in length. Shares of attention, which `blocks` gives.

        Raises
        ------
        InputError
            No trace, different models, or traces too short for `min_distance`.
        """
        arrays = [_square(b) for b in blocks]
        if not arrays or any(a.ndim != 4 or a.shape[:2] != arrays[0].shape[:2] for a in arrays):
            raise InputError(
                "receiver heads are found from blocks (n_layers, n_heads, S, S) of one or more traces of one model; got "
                f"shapes {[a.shape for a in arrays]}"
            )
        vertical = [self.vertical(a) for a in arrays]
        shortest = min(int(np.isfinite(v[0, 0]).sum()) for v in vertical)
        if shortest < 3:
            raise InputError(
                f"a trace has {shortest} sentences with another one {self.min_distance} later; at least 3 are needed: "
                "give longer traces, or a smaller min_distance="
            )
        each = np.stack([_kurtosis(v) for v in vertical])
        each[:, : self.skip] = np.nan
        known = np.isfinite(each)
        count = known.sum(0)
        mean = np.where(count > 0, np.where(known, each, 0).sum(0) / np.maximum(count, 1), np.nan)
        order = np.argsort(np.where(np.isfinite(mean), -mean, np.inf), axis=None, kind="stable")
        order = order[: min(self.k, int(np.isfinite(mean).sum()))]
        if not len(order):
            raise InputError(f"no head is left: the model has {mean.shape[0]} layers and skip={self.skip}")
        heads = tuple((int(i), int(j)) for i, j in zip(*np.unravel_index(order, mean.shape), strict=True))
        layers, numbers = np.array(heads).T
        return Received(
            xr.DataArray(mean, dims=("layer", "head"), name="kurtosis"),
            heads,
            [v[layers, numbers].mean(0) for v in vertical],
            _correlation(each[::2], each[1::2]),
        )


def _square(blocks: Any) -> np.ndarray:
    a = np.asarray(blocks, dtype=np.float64)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2] or not np.isfinite(a).all():
        raise InputError(f"attention between sentences is finite and (..., S, S); got shape {a.shape}")
    return a


def _kurtosis(v: np.ndarray) -> np.ndarray:
    """Excess kurtosis over the sentences that have a score; NaN for a constant row."""
    v = v[..., np.isfinite(v[0, 0])]
    flat = np.ptp(v, axis=-1) <= 1e-12 * np.abs(v).max(-1)
    found = kurtosis(np.where(flat[..., None], np.arange(v.shape[-1]), v), axis=-1)
    return np.where(flat, np.nan, found)


def _correlation(even: np.ndarray, odd: np.ndarray) -> float:
    if not len(even) or not len(odd):
        return float("nan")
    a, b = even.mean(0).ravel(), odd.mean(0).ravel()
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 2 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(np.corrcoef(a[known], b[known])[0, 1])


def head_edits(network: LanguageModel, heads: Sequence[tuple[int, int]]) -> list[Edit]:
    """Edits that switch heads off: their slices of what goes into the output projection are set to zero.

    Parameters
    ----------
    network : LanguageModel
    heads : sequence of (layer, head)
    """
    a = network.anatomy
    for layer, head in heads:
        if not (0 <= layer < a.n_layers and 0 <= head < a.n_heads):
            raise InputError(
                f"{network.name} has layers 0 to {a.n_layers - 1} and heads 0 to {a.n_heads - 1}; no {layer, head}"
            )
    edits = []
    for layer in sorted({layer for layer, _ in heads}):
        units = [u for at, h in heads if at == layer for u in range(h * a.d_head, (h + 1) * a.d_head)]
        edits.append(Ablate(a.site("z", layer), units=units))
    return edits


def ablate_heads(
    network: LanguageModel,
    heads: Sequence[tuple[int, int]],
    score: Callable[[list[Edit]], float],
    *,
    controls: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """What switching heads off does to a score, beside equally many random other heads of the same layers.

    Parameters
    ----------
    network : LanguageModel
    heads : sequence of (layer, head)
        Receiver heads, for example.
    score : callable
        Edits to a number, such as the share of problems answered right under them.
    controls : int, default 5
        Random sets.
    seed : int, default 0

    Returns
    -------
    DataFrame
        Rows ``none``, ``heads``, and ``control 0`` onwards; columns ``score`` and ``heads`` (which were off).

    Raises
    ------
    InputError
        A layer has not as many other heads as are switched off.
    """
    at_least("controls", controls, 0)
    chosen = sorted({(int(layer), int(head)) for layer, head in heads})
    rng = np.random.default_rng(seed)
    sets: dict[str, list[tuple[int, int]]] = {"none": [], "heads": chosen}
    for c in range(controls):
        drawn = []
        for layer in sorted({layer for layer, _ in chosen}):
            own = [h for at, h in chosen if at == layer]
            others = [h for h in range(network.anatomy.n_heads) if h not in own]
            if len(others) < len(own):
                raise InputError(
                    f"layer {layer} has {len(own)} of the heads and only {len(others)} others: no control; take fewer heads"
                )
            drawn += [(layer, int(h)) for h in np.sort(rng.choice(others, len(own), replace=False))]
        sets[f"control {c}"] = drawn
    rows = {name: {"score": float(score(head_edits(network, off))), "heads": off} for name, off in sets.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["score", "heads"])


# ---------------------------------------------------------------- attention suppression


@dataclass(frozen=True, eq=False)
class AttentionSuppression:
    """Hide one sentence from all that follows, in all heads and layers, and see which predictions change.

    The scores of its keys are set to minus infinity before the softmax. The first token of all stays visible, because the
    first query has nothing else.

    Parameters
    ----------
    temperature : float, default 0.6
        Of both distributions.
    epsilon : float, default 1e-9
        Added to a divergence before its logarithm.
    top_p : float, optional
        Compare only the tokens that hold this probability on either side (the paper: 0.9999, at most 100 of them), others
        getting a logit of -1e9. By default all tokens are compared: a token that is missing on one side makes the
        divergence huge.
    most : int, default 100
    predictions : {"from", "of"}, default "from"
        A sentence's predictions are those made from its tokens, as in the paper, or those of its tokens, which are made one
        position earlier.

    References
    ----------
    Bogdan, Macar, Nanda, Conmy: Thought Anchors: Which LLM reasoning steps matter? (2025).
    """

    temperature: float = 0.6
    epsilon: float = 1e-9
    top_p: float | None = None
    most: int = 100
    predictions: Literal["from", "of"] = "from"

    def __post_init__(self) -> None:
        for name in ("temperature", "epsilon"):
            if not (is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise InputError(f"top_p must lie above 0 and at most at 1, or be None; got {self.top_p!r}")
        at_least("most", self.most, 1)
        if self.predictions not in ("from", "of"):
            raise InputError(f"predictions={self.predictions!r}: choose 'from' or 'of'")

    def matrix(self, network: LanguageModel, trace: Trace, runner: Runner | None = None) -> xr.DataArray:
        """Mean log divergence of each later sentence when an earlier one is hidden, (source, target).

        NaN where the target does not come later. `centred` takes out how easily each target is moved at all.
        """
        return driven(self.ask(network, trace), network, "suppression", runner)

    def ask(self, network: LanguageModel, trace: Trace) -> Asking[xr.DataArray]:
        """The same as a generator of Passes."""
        instance("trace", trace, Trace)
        tokens = trace.tokens(network.tokenizer)
        kl = yield from self.divergences(network, tokens)
        means = tokens.means().numpy()
        if self.predictions == "of":
            means = np.pad(means[:, 1:], ((0, 0), (0, 1)))  # the first token of all, which nothing predicts, falls out
        return later(np.log(kl + self.epsilon) @ means[:, -kl.shape[1] :].T, "suppression")

    def divergences(self, network: LanguageModel, tokens: TracedTokens) -> Asking[np.ndarray]:
        """KL divergence in nats of the predictions when each sentence is hidden, (S, T'), at least 0.

        T' positions are compared: from the token before the first sentence to the last token.
        """
        n_sentences, n_tokens = len(tokens.spans), len(tokens.ids)
        keep = min(n_tokens, n_tokens - tokens.spans[0][0] + 1)
        hidden = torch.zeros(n_sentences + 1, n_tokens, dtype=torch.bool)  # in row 0 nothing is
        for row, (a, b) in zip(hidden[1:], tokens.spans, strict=True):
            row[max(a, 1) : b] = True
        sites = network.anatomy.sites("scores")
        inputs = network.encode([tokens.ids], keep=keep)
        rows = network.rows_at_once(Pass(inputs))
        baseline = torch.empty(0)
        found = []
        for start in range(0, n_sentences + 1, rows):
            # Equal batches give equal rounding, so that what is not touched differs by exactly nothing.
            part = hidden[start : start + rows]
            asked = torch.cat([part, hidden[:1].expand(min(rows, n_sentences + 1) - len(part), -1)])
            where = asked[:, None, None, :]
            answer = yield Pass(
                {k: v.expand(len(asked), -1) if isinstance(v, Tensor) else v for k, v in inputs.items()},
                [Set(s, -torch.inf, where=where) for s in sites],
            )
            logits = answer.output[: len(part), -keep:].float() / self.temperature
            if start == 0:
                baseline, logits = logits[0], logits[1:]
            found += [self._kl(baseline, hiding) for hiding in logits]
        kl = torch.stack(found).double().cpu().numpy()
        return np.maximum(kl, 0)

    def _kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(p ‖ q) at each token from logits (T, V)."""
        if self.top_p is not None:
            keep = self._likely(p) | self._likely(q)
            p, q = (torch.where(self._likely(x), x, -1e9).where(keep, -torch.inf) for x in (p, q))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum(-1)

    def _likely(self, logits: Tensor) -> Tensor:
        assert self.top_p is not None
        top, order = logits.softmax(-1).topk(min(self.most, logits.shape[-1]), -1)
        kept = (top.cumsum(-1) - top < self.top_p) | (self.top_p == 1)
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, kept)

    @staticmethod
    def centred(matrix: xr.DataArray) -> xr.DataArray:
        """The matrix minus each target's mean over its sources."""
        return matrix - matrix.mean("source", skipna=True)


# ---------------------------------------------------------------- together


@dataclass(frozen=True, eq=False)
class Thoughts:
    """What is known of the sentences of a trace.

    Attributes
    ----------
    trace : Trace
    table : DataFrame
        One row a sentence: ``text``, ``tag``, and what the methods say (see `Resampling.importance`); ``receiver``: what
        receiver heads pay to it; ``suppression``: mean over later sentences of the centred log divergence when it is
        hidden.
    matrices : dict of str to DataArray (source, target)
        ``moves`` (see `Resampling.moves`), ``suppression`` (centred).
    received : Received or None
    meta : dict
        Parameters, seed, model and its fingerprint, cost, seconds.
    """

    trace: Trace
    table: pd.DataFrame
    matrices: dict[str, xr.DataArray]
    received: Received | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def anchors(self, n: int = 3, by: str | None = None) -> pd.DataFrame:
        """The `n` sentences of largest importance; by default by the first measure that the table has."""
        by = next((c for c in MEASURES if c in self.table.columns), None) if by is None else by
        if by not in self.table.columns:
            raise InputError(f"the table has no column {by!r}; it has {list(self.table.columns)}")
        return self.table.sort_values(by, ascending=False, kind="stable").head(n)


MEASURES: Mapping[str, str] = {
    "counterfactual_kl": "counterfactual importance",
    "resampling_kl": "resampling importance",
    "forced_kl": "forced-answer importance",
    "receiver": "receiver-head attention",
    "suppression": "effect of hiding it",
}
"""Columns that say how important a sentence is, and their names."""


@dataclass(frozen=True, eq=False)
class ThoughtAnchors:
    """Which sentences of a chain of reasoning matter, by resampling, receiver heads and attention suppression.

    Parameters
    ----------
    resampling : Resampling or None
        None leaves the method out; so with the other two.
    receivers : ReceiverHeads or None
    suppression : AttentionSuppression or None
    force : str, optional
        Also measure the forced-answer importance; see `Resampling.bank`.
    label : callable
        Sentences to tags; see `label_by_rules`, which is the default, for what it is worth.

    Examples
    --------
    >>> from nissl.attribution import ThoughtAnchors, Trace
    >>> steps = ["The coin decides. ", "Say we got heads. ", "The answer is 1."]
    >>> trace = Trace.of("".join(steps), prompt="Flip a coin. ")
    >>> def sampler(prefix, n):
    ...     tail = steps[2] if prefix.rstrip().endswith("heads.") else "It came down tails. The answer is 0."
    ...     return ["The coin decides. " + tail] * n if prefix.endswith("coin. ") else [tail] * n
    >>> found = ThoughtAnchors().analyse(sampler, trace)
    >>> found.anchors(1, by="resampling_kl").text.item()
    'Say we got heads.'

    References
    ----------
    Bogdan, Macar, Nanda, Conmy: Thought Anchors: Which LLM reasoning steps matter? (2025).
    """

    resampling: Resampling | None = field(default_factory=Resampling)
    receivers: ReceiverHeads | None = field(default_factory=ReceiverHeads)
    suppression: AttentionSuppression | None = field(default_factory=AttentionSuppression)
    force: str = ""
    label: Callable[[Sequence[str]], Sequence[str]] = label_by_rules

    def analyse(
        self,
        source: LanguageModel | Sampler,
        trace: Trace,
        *,
        network: LanguageModel | None = None,
        heads: Received | None = None,
        gold: str | None = None,
        runner: Runner | None = None,
    ) -> Thoughts:
        """Measure one trace.

        Parameters
        ----------
        source : LanguageModel or callable
            Where texts come from. A LanguageModel is also looked into; with a callable, the methods that look inside are
            left out unless `network` is given.
        trace : Trace
        network : LanguageModel, optional
            The model to look into, where `source` is a callable.
        heads : Received, optional
            Receiver heads found on many traces; by default they are found on this one alone, which is a noisy choice.
        gold : str, optional
            The right answer, for accuracies.
        runner : Runner, optional
        """
        started = time.perf_counter()
        instance("trace", trace, Trace)
        network = source if isinstance(source, LanguageModel) else network
        runner = plain_runner() if runner is None else runner
        with blame(InputError, "label= failed"):
            tags = list(self.label([s.text for s in trace.sentences]))
        if len(tags) != len(trace):
            raise InputError(f"label= must give one tag a sentence, {len(trace)}; it gave {len(tags)}")
        table = pd.DataFrame({"text": [s.text for s in trace.sentences], "tag": tags}).rename_axis("sentence")
        matrices: dict[str, xr.DataArray] = {}
        received = None
        meta: dict[str, Any] = {}
        if self.resampling is not None:
            bank = self.resampling.bank(source, trace, runner=runner)
            forced = self.resampling.bank(source, trace, force=self.force, runner=runner) if self.force else None
            table = table.join(self.resampling.importance(bank, forced, gold).drop(columns="text"))
            matrices["moves"] = self.resampling.moves(bank)
            used = {"answer": _name(self.resampling.answer), "embed": _name(self.resampling.embedder)}
            meta["resampling"] = {**parameters_of(self.resampling), **used, "threshold": self.resampling.cosine}
        if network is not None and self.receivers is not None:
            blocks = self.receivers.blocks(network, trace, runner)
            received = self.receivers.fit([blocks]) if heads is None else heads
            layers, numbers = np.array(received.heads).T
            table["receiver"] = self.receivers.vertical(blocks)[layers, numbers].mean(0)
            meta["receivers"] = {**parameters_of(self.receivers), "heads": [list(h) for h in received.heads]}
        if network is not None and self.suppression is not None:
            matrices["suppression"] = self.suppression.centred(self.suppression.matrix(network, trace, runner))
            table["suppression"] = matrices["suppression"].mean("target", skipna=True).to_numpy()
            meta["suppression"] = parameters_of(self.suppression)
        if network is not None:
            meta |= {"model": network.name, "fingerprint": network.fingerprint()}
        costs = [runner.cost(n) for n in ("resampling", "receiver heads", "suppression")]
        meta |= {"forward_passes": sum(c.forward for c in costs), "seconds": round(time.perf_counter() - started, 3)}
        return Thoughts(trace, table, matrices, received, meta)


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
