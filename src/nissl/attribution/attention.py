"""Scores from attention: its weights, and how much of each token reaches the one that is read out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from nissl.arguments import at_least, flag, is_number, is_whole
from nissl.attribution.base import Method
from nissl.attribution.cams import Map, lay_out, map_at, maps_of
from nissl.errors import InputError
from nissl.network.site import parse
from nissl.runner import Asking, Explained, Question, explained


@dataclass(frozen=True, eq=False)
class AttentionRollout(Method):
    """Product over layers of attention patterns, each mixed with the identity for the residual stream.

    Parameters
    ----------
    fusion : {"mean", "max", "min"}, default "mean"
        How the heads of a layer are joined.
    residual : float in [0, 1), default 0.5
        Share of the identity in each layer.
    discard : float in [0, 1), default 0
        Share of the weakest weights of each query that are set to zero.
    query : int or "mean", optional
        Token whose sources are shown, or the mean over all. By default the last token where attention is causal, the
        mean where the tokens are patches without a class token, and the first token otherwise.
    upsample : bool, default True
        Patches of an image are interpolated (bilinear, half-pixel) to its size.

    Notes
    -----
    Needs no gradient and looks at no class: the same map for every target. At an inner site only the patterns behind it
    are multiplied. Before class and register tokens are cut off, scores sum to 1. All patterns must be of one token
    sequence with itself: windows, pooled tokens and cross-attention have no rollout.

    References
    ----------
    Abnar, Zuidema: Quantifying attention flow in transformers (2020).
    """

    fusion: Literal["mean", "max", "min"] = "mean"
    residual: float = 0.5
    discard: float = 0.0
    query: int | Literal["mean"] | None = None
    upsample: bool = True

    name: ClassVar[str] = "rollout"
    title: ClassVar[str] = "Attention rollout"
    paper: ClassVar[str] = "Abnar & Zuidema 2020"
    class_sensitive: ClassVar[bool] = False
    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)
        for name in ("residual", "discard"):
            if not (is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1):
                raise InputError(f"{name} must be a share, at least 0 and below 1; got {getattr(self, name)!r}")

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        patterns = yield from patterns_of(q)
        tokens = patterns[0].shape[-1]
        if any(tuple(p.shape[1:]) != (tokens, tokens) for p in patterns):
            shapes = [tuple(p.shape) for p in patterns]
            raise InputError(
                f"{self.name} needs patterns of one token sequence with itself (heads, tokens, tokens), got {shapes}"
            )
        layers = [self.fused(p) for p in patterns]
        return on_tokens(q, self.reaching(layers, query_of(q, self.query, patterns)), self.upsample)

    def reaching(self, layers: list[Tensor], query: int | None) -> Tensor:
        """How much of each token reaches the query, (tokens,); None is the mean over all queries."""
        flow = layers[0]
        for layer in layers[1:]:
            flow = layer @ flow
        return flow.mean(0) if query is None else flow[query]

    def fused(self, pattern: Tensor) -> Tensor:
        """One layer's flow (tokens, tokens) from its pattern (heads, queries, keys); rows sum to 1."""
        joined = join(pattern, self.fusion)
        weakest = int(self.discard * joined.shape[1])
        if weakest:
            joined = joined.scatter(1, joined.topk(weakest, 1, largest=False).indices, 0)
        total = joined.sum(1, keepdim=True)
        joined = joined / torch.where(total > 0, total, 1)
        flow = (1 - self.residual) * joined + self.residual * torch.eye(len(joined)).to(joined)
        return flow / flow.sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class AttentionFlow(AttentionRollout):
    """Largest flow that can reach the token that is read out from each token, through all layers of attention.

    Parameters
    ----------
    fusion, residual, discard, query, upsample
        As in `AttentionRollout`.
    max_tokens : int, default 128
        Longer sequences raise InputError: each token costs a maximum flow over layers × tokens² edges.

    Notes
    -----
    The capacity of the edge from token j of a layer to token i of the next is how much i attends to j, mixed with the
    identity as in rollout. Scores are normalised to sum 1. For one layer they equal rollout. Capacities are rounded to
    2⁻²⁸. The mean over all queries takes tokens² maximum flows.

    References
    ----------
    Abnar, Zuidema: Quantifying attention flow in transformers (2020).
    """

    max_tokens: int = 128

    name: ClassVar[str] = "flow"
    title: ClassVar[str] = "Attention flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("max_tokens", self.max_tokens, 1)

    def reaching(self, layers: list[Tensor], query: int | None) -> Tensor:
        """See `AttentionRollout.reaching`."""
        tokens = len(layers[0])
        if tokens > self.max_tokens:
            raise InputError(
                f"attention flow over {tokens} tokens takes {tokens} maximum flows of {len(layers) * tokens**2} edges "
                f"each; max_tokens={self.max_tokens} forbids it: raise it, or use rollout"
            )
        graph = layered(np.stack([layer.double().cpu().numpy() for layer in layers]))
        top = len(layers) * tokens
        queries = range(tokens) if query is None else [query % tokens]
        flows = np.array([[maximum_flow(graph, top + i, j).flow_value for j in range(tokens)] for i in queries], float)
        scores = (flows / flows.sum(1, keepdims=True)).mean(0)
        return torch.from_numpy(scores).to(layers[0])


def layered(layers: np.ndarray) -> csr_array:
    """Graph of attention (layers, queries, keys), whole capacities: node l·tokens + i is token i before layer l."""
    n_layers, tokens, _ = layers.shape
    capacities = np.rint(layers * 2**28).astype(np.int32)
    layer, i, j = np.nonzero(capacities)
    size = (n_layers + 1) * tokens
    nodes = ((layer + 1) * tokens + i, layer * tokens + j)
    return csr_array((capacities[layer, i, j], nodes), shape=(size, size))


@dataclass(frozen=True, eq=False)
class AttentionWeights(Method):
    """Attention weights as they are, joined over heads and layers.

    Parameters
    ----------
    layer : int, optional
        Which attention pattern, in the order of the forward pass; -1 is the last. By default the mean of all.
    fusion : {"mean", "max", "min"}, default "mean"
        How heads are joined.
    gather : {"query", "max"}, default "query"
        What a token's score is: how much the query attends to it; or, as in some comparisons of explanations, the
        largest weight that the token itself gives to any other.
    query, upsample
        As in `AttentionRollout`. Attention with a single query, such as the additive attention that pools an LSTM's
        states, has no choice.

    Notes
    -----
    Weights say what a layer mixes, not what the output owes to it, and look at no class (Jain & Wallace 2019).

    References
    ----------
    Bahdanau, Cho, Bengio: Neural machine translation by jointly learning to align and translate (2015). Neely et al.: A
    song of (dis)agreement (2022).
    """

    layer: int | None = None
    fusion: Literal["mean", "max", "min"] = "mean"
    gather: Literal["query", "max"] = "query"
    query: int | Literal["mean"] | None = None
    upsample: bool = True

    name: ClassVar[str] = "attention"
    title: ClassVar[str] = "Attention weights"
    paper: ClassVar[str] = "Bahdanau et al. 2015"
    class_sensitive: ClassVar[bool] = False
    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)
        if self.layer is not None and not is_whole(self.layer):
            raise InputError(f"layer must be the number of an attention pattern or None; got {self.layer!r}")
        if self.gather not in ("query", "max"):
            raise InputError(f"gather={self.gather!r}: choose 'query' or 'max'")

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        patterns = yield from patterns_of(q)
        if self.layer is not None:
            if not -len(patterns) <= self.layer < len(patterns):
                raise InputError(f"layer={self.layer}: there are {len(patterns)} attention patterns")
            patterns = [patterns[self.layer]]
        if len({tuple(p.shape[1:]) for p in patterns}) > 1:
            shapes = [tuple(p.shape) for p in patterns]
            raise InputError(
                f"attention patterns differ in shape, {shapes} (heads, queries, keys): choose one, layer=…"
            )
        weights = torch.stack([join(p, self.fusion) for p in patterns]).mean(0)
        if self.gather == "max":
            if weights.shape[0] != weights.shape[1]:
                raise InputError(f"gather='max' needs a query for each key, here are {tuple(weights.shape)}")
            return on_tokens(q, weights.amax(1), self.upsample)
        query = query_of(q, self.query, patterns)
        return on_tokens(q, weights.mean(0) if query is None else weights[query], self.upsample)


def _check(method: AttentionRollout | AttentionWeights) -> None:
    if method.fusion not in ("mean", "max", "min"):
        raise InputError(f"fusion={method.fusion!r}: choose 'mean', 'max' or 'min'")
    if method.query is not None and method.query != "mean" and not is_whole(method.query):
        raise InputError(f"query must be the number of a token, 'mean' or None; got {method.query!r}")
    flag("upsample", method.upsample)


def join(pattern: Tensor, fusion: str) -> Tensor:
    """One pattern (queries, keys) from those of all heads (heads, queries, keys)."""
    return pattern.mean(0) if fusion == "mean" else getattr(pattern, f"a{fusion}")(0)


def patterns_of(q: Question) -> Asking[list[Tensor]]:
    """Attention patterns (heads, queries, keys) behind the question's site, in order."""
    sites = pattern_sites(q)
    answer = yield q.ask(read=sites, scalar=False)
    found = [answer.reads[s] for s in sites]
    if any(len(p) != 1 for p in found):
        shapes = {s: tuple(p.shape) for s, p in zip(sites, found, strict=True)}
        raise InputError(f"attention patterns of one row are needed, not of windows; got {shapes}")
    return [p[0] for p in found]


def query_of(q: Question, wanted: int | str | None, patterns: list[Tensor]) -> int | None:
    """Which query is read out; None for the mean of all. See `AttentionRollout`."""
    queries, tokens = patterns[0].shape[1:]
    if wanted == "mean":
        return None
    if wanted is not None:
        if not -queries <= int(wanted) < queries:
            raise InputError(f"query={wanted}: there are {queries} tokens")
        return int(wanted)
    if queries != tokens:
        return 0 if queries == 1 else None
    if not any(p.triu(1).any() for p in patterns):
        return tokens - 1
    as_patches, dims = _laid_out(q, torch.zeros(1, tokens), upsample=False)
    return None if dims != ("token",) and as_patches.numel() == tokens else 0


def on_tokens(q: Question, scores: Tensor, upsample: bool) -> Explained:
    """Scores of tokens as they lie on the input."""
    values, dims = _laid_out(q, scores[None], upsample)
    return explained(q, values[0], dims=dims)


def _laid_out(q: Question, scores: Tensor, upsample: bool) -> tuple[Tensor, tuple[str, ...]]:
    tokens = scores.shape[-1]
    maps = maps_of(q)
    if not q.at_input and map_at(q, maps).positions != (tokens,):
        raise InputError(f"{q.site!r} has positions {map_at(q, maps).positions}, the attention behind it {tokens}")
    return lay_out(q, maps, Map(q.site, "pattern", 2, (tokens,), ("token",), 0), scores, upsample)


def pattern_sites(q: Question) -> list[str]:
    """Attention patterns behind the question's site, in order.

    Raises
    ------
    InputError
        There are none.
    """
    trace = q.network.trace_of(q.ask(scalar=False))
    start = trace.position(parse(q.site))
    if start is None:
        raise InputError(f"the forward pass does not come by {q.site!r}")
    sites = [s.address for s in trace.sites(q.network) if s.role == "pattern"]
    behind = [s for s in sites if (trace.position(parse(s)) or 0) > start]
    if not behind:
        where = "" if q.at_input else f" behind {q.site!r}"
        raise InputError(f"{q.network.name} has no attention patterns{where}: this is for networks with attention")
    return behind
