"""Attention rollout: how much of each token reaches the one that is read out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

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
        if self.fusion not in ("mean", "max", "min"):
            raise InputError(f"fusion={self.fusion!r}: choose 'mean', 'max' or 'min'")
        for name in ("residual", "discard"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be a share, at least 0 and below 1; got {getattr(self, name)!r}")
        if self.query is not None and self.query != "mean" and not isinstance(self.query, int):
            raise InputError(f"query must be the number of a token, 'mean' or None; got {self.query!r}")

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        sites = pattern_sites(q)
        answer = yield q.ask(read=sites, scalar=False)
        patterns = [answer.reads[s] for s in sites]
        tokens = patterns[0].shape[-1]
        if any(len(p) != 1 or tuple(p.shape[2:]) != (tokens, tokens) for p in patterns):
            shapes = {s: tuple(p.shape) for s, p in zip(sites, patterns, strict=True)}
            raise InputError(f"rollout needs patterns of one row and one token sequence with itself, got {shapes}")
        layers = [self.fused(p[0]) for p in patterns]
        flow = layers[0]
        for layer in layers[1:]:
            flow = layer @ flow
        maps = maps_of(q)
        place = Map(q.site, "pattern", 2, (tokens,), ("token",), 0)
        if not q.at_input and map_at(q, maps).positions != (tokens,):
            raise InputError(f"{q.site!r} has positions {map_at(q, maps).positions}, the attention behind it {tokens}")
        as_patches, dims = lay_out(q, maps, place, flow[:1], upsample=False)
        only_patches = dims != ("token",) and as_patches.numel() == tokens
        causal = not any(p.triu(1).any() for p in patterns)
        query = self.query_of(tokens, causal, only_patches)
        scores = flow.mean(0) if query is None else flow[query]
        values, dims = lay_out(q, maps, place, scores[None], self.upsample)
        return explained(q, values[0], dims=dims)

    def fused(self, pattern: Tensor) -> Tensor:
        """One layer's flow (tokens, tokens) from its pattern (heads, queries, keys); rows sum to 1."""
        joined = pattern.mean(0) if self.fusion == "mean" else getattr(pattern, f"a{self.fusion}")(0)
        weakest = int(self.discard * joined.shape[1])
        if weakest:
            joined = joined.scatter(1, joined.topk(weakest, 1, largest=False).indices, 0)
        total = joined.sum(1, keepdim=True)
        joined = joined / torch.where(total > 0, total, 1)
        flow = (1 - self.residual) * joined + self.residual * torch.eye(len(joined)).to(joined)
        return flow / flow.sum(1, keepdim=True)

    def query_of(self, tokens: int, causal: bool, only_patches: bool) -> int | None:
        """Which token is read out; None for the mean of all."""
        if self.query is not None:
            if self.query != "mean" and not -tokens <= self.query < tokens:
                raise InputError(f"query={self.query}: there are {tokens} tokens")
            return None if self.query == "mean" else self.query
        return tokens - 1 if causal else None if only_patches else 0


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
        raise InputError(f"{q.network.name} has no attention patterns{where}: rollout is for transformers")
    return behind
