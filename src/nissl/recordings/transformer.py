"""Attention blocks that the sequence models of recordings share: pre- or post-norm, own or foreign keys, readable weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least
from nissl.errors import InputError


def sinusoid(positions: int | Tensor, n_features: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of positions, the wavelengths in a geometric row from 2 pi to 2 pi `longest`.

    Parameters
    ----------
    positions : int or Tensor (...)
        A number n stands for 0 .. n - 1.
    n_features : int
        Even: the first half are sines, the second cosines.
    longest : float, default 10000

    Returns
    -------
    Tensor (..., n_features)
    """
    at_least("n_features", n_features, 2)
    if n_features % 2:
        raise InputError(f"n_features must be even (as many sines as cosines), got {n_features}")
    places = torch.arange(positions) if isinstance(positions, int) else positions
    half = n_features // 2
    rates = longest ** (-torch.arange(half, device=places.device) / half)
    angles = places[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each beside a residual connection.

    Pre-norm: ``x + attend(norm x)`` and ``x + feed(norm x)``; post-norm: ``norm(x + attend x)`` and ``norm(x + feed x)``. With a
    `context` the keys and values come from it, as they are; else from the (normalised) tokens themselves.

    Parameters
    ----------
    n_features : int
        Features of a token.
    n_heads : int
    head_features : int, optional
        Of the queries, keys and values of one head; ``n_features // n_heads`` unless given.
    hidden : int, optional
        Width of the feed-forward layer; four times `n_features` unless given.
    dropout : float, default 0
        On attention weights, on what attention adds, and on what the feed-forward layer adds.
    norm_first : bool, default True
        Pre-norm; False: post-norm.
    qkv_bias : bool, default True
    """

    def __init__(
        self, n_features: int, n_heads: int, *, head_features: int | None = None, hidden: int | None = None,
        dropout: float = 0.0, norm_first: bool = True, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least("n_features", n_features, 1)
        at_least("n_heads", n_heads, 1)
        if head_features is None and n_features % n_heads:
            raise InputError(f"n_features={n_features} is no multiple of n_heads={n_heads}; give head_features")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {dropout!r}")
        head = n_features // n_heads if head_features is None else head_features
        width = 4 * n_features if hidden is None else hidden
        self.n_heads = n_heads
        self.dropout = dropout
        self.norm_first = norm_first
        self.query = nn.Linear(n_features, n_heads * head, bias=qkv_bias)
        self.key_value = nn.Linear(n_features, 2 * n_heads * head, bias=qkv_bias)
        self.out = nn.Linear(n_heads * head, n_features)
        self.feed = nn.Sequential(
            nn.Linear(n_features, width), nn.GELU(), nn.Linear(width, n_features), nn.Dropout(dropout)
        )
        self.norm_attention = nn.LayerNorm(n_features)
        self.norm_feed = nn.LayerNorm(n_features)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Tokens in, tokens out: (batch, n_tokens, n_features).

        Parameters
        ----------
        x : Tensor (batch, n_tokens, n_features)
        context : Tensor (batch, n_context, n_features), optional
        mask : Tensor of bool, optional
            True where a query may attend; broadcast to (batch, n_heads, n_tokens, n_context). A query that may attend nowhere
            gets zeros from attention.
        causal : bool, default False
            A token attends to itself and to those before it, besides what `mask` allows.
        """
        first = self.norm_attention(x) if self.norm_first else x
        q, k, v = self._heads(first, first if context is None else context)
        allowed = _allowed(q, k, mask, causal)
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
        if allowed is not None:
            mixed = mixed.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        mixed = F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
        if self.norm_first:
            x = x + mixed
            return x + self.feed(self.norm_feed(x))
        x = self.norm_attention(x + mixed)
        return self.norm_feed(x + self.feed(x))

    def attention(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Weights (batch, n_heads, n_tokens, n_context) that `forward` mixes values by, without dropout.

        Rows sum to 1, or to 0 where a query may attend nowhere.
        """
        first = self.norm_attention(x) if self.norm_first else x
        q, k, _ = self._heads(first, first if context is None else context)
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
        allowed = _allowed(q, k, mask, causal)
        if allowed is None:
            return scores.softmax(-1)
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        return weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)

    def _heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.query(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.n_heads, -1)).unbind(-3)
        return q, k.transpose(1, 2), v.transpose(1, 2)


def _allowed(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Where queries may attend; None: everywhere."""
    if mask is not None and mask.dtype != torch.bool:
        raise InputError(f"mask must hold True where a query may attend, got numbers of {mask.dtype}")
    if not causal:
        return mask
    before = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    return before if mask is None else before & mask


class Encoder(nn.Module):
    """Blocks one after the other, and a last layer norm where they are pre-norm; parameters as of `Block`.

    Parameters
    ----------
    n_layers : int
    n_features, n_heads : int
    head_features, hidden, dropout, norm_first, qkv_bias
        As of `Block`.
    """

    def __init__(
        self, n_layers: int, n_features: int, n_heads: int, *, head_features: int | None = None,
        hidden: int | None = None, dropout: float = 0.0, norm_first: bool = True, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least("n_layers", n_layers, 0)
        self.blocks = nn.ModuleList(
            Block(
                n_features, n_heads, head_features=head_features, hidden=hidden, dropout=dropout,
                norm_first=norm_first, qkv_bias=qkv_bias,
            )
            for _ in range(n_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(n_features) if norm_first else nn.Identity()

    def forward(self, x: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """(batch, n_tokens, n_features) in and out; `mask` and `causal` as of `Block.forward`."""
        for block in self.blocks:
            x = block(x, mask=mask, causal=causal)
        return self.norm(x)
