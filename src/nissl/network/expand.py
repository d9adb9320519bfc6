"""Fused attention calls written out in the operations they stand for.

Rule sets and attention patterns need to see the softmax and the two products inside. The results equal the fused calls
to the precision of the type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.errors import RuleError


def _same(t: Tensor) -> Tensor:
    return t


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    each_scores: Callable[[Tensor], Tensor] = _same,
    each_pattern: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``; scores and attention weights may be replaced on the way."""
    if dropout_p:
        raise RuleError("attention with dropout cannot be written out: run the network in evaluation mode")
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    changed = each_scores(scores)
    pattern = attention_weights(changed, masked=attn_mask is not None or is_causal or changed is not scores)
    return torch.matmul(each_pattern(pattern), value)


def attention_weights(scores: Tensor, masked: bool = True) -> Tensor:
    """Softmax over keys; a query all of whose keys are masked attends to nothing, as in the fused call."""
    pattern = torch.softmax(scores, dim=-1)
    if masked:
        pattern = torch.where(torch.isneginf(scores.detach()).all(-1, keepdim=True), torch.zeros_like(pattern), pattern)
    return pattern


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    each_scores: Callable[[Tensor], Tensor] = _same,
    each_pattern: Callable[[Tensor], Tensor] = _same,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward``, the call behind ``nn.MultiheadAttention``."""
    if training and dropout_p:
        raise RuleError("attention with dropout cannot be written out: run the network in evaluation mode")
    if static_k is not None or static_v is not None or bias_k is not None or bias_v is not None or add_zero_attn:
        raise RuleError(
            "multi-head attention with static keys, key/value biases or an added zero key cannot be written out"
        )
    batched = query.ndim == 3
    if not batched:
        query, key, value = query[:, None], key[:, None], value[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    n_queries, n_rows, width = query.shape
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        assert in_proj_weight is not None
        weights = [*in_proj_weight.chunk(3)]
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))

    def heads(x: Tensor, i: int) -> Tensor:
        weight = weights[i]
        assert weight is not None
        projected = F.linear(x, weight, biases[i])
        return projected.reshape(x.shape[0], n_rows, num_heads, -1).permute(1, 2, 0, 3)

    q, k, v = heads(query, 0), heads(key, 1), heads(value, 2)
    mask = _added_mask(attn_mask, q, num_heads)
    if key_padding_mask is not None:
        padding = _added_mask(key_padding_mask, q, num_heads)
        assert padding is not None
        padding = padding.reshape(n_rows, 1, 1, -1)
        mask = padding if mask is None else mask + padding
    seen: list[Tensor] = []

    def keep(pattern: Tensor) -> Tensor:
        seen.append(each_pattern(pattern))
        return seen[-1]

    causal = is_causal and mask is None
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, each_scores=each_scores, each_pattern=keep)
    out = F.linear(out.permute(2, 0, 1, 3).reshape(n_queries, n_rows, width), out_proj_weight, out_proj_bias)
    pattern: Tensor | None = None
    if need_weights:
        pattern = seen[0].mean(1) if average_attn_weights else seen[0]
        pattern = pattern if batched else pattern[0]
    return (out if batched else out[:, 0]), pattern


def _added_mask(mask: Any, like: Tensor, num_heads: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, -math.inf)
    return mask.reshape(-1, num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
