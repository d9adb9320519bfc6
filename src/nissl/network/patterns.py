"""Attention patterns: read and edited where softmax or fused attention computes them, in any module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from nissl.network.expand import multi_head_attention, scaled_dot_product_attention

_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}


class PatternMode(TorchFunctionMode):
    """Hands every attention pattern to a function and lets the network go on with what it returns.

    A pattern is a softmax over the last of at least three dimensions, or the weights inside
    ``scaled_dot_product_attention`` and ``multi_head_attention_forward``, which are expanded for it. It belongs to the
    innermost watched module that is running, and is handed over as (n_rows, n_heads, n_queries, n_keys).

    Parameters
    ----------
    found : callable
        ``found(module, pattern) -> pattern``.
    """

    def __init__(self, found: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self._found = found
        self._running: list[nn.Module] = []

    def watch(self, module: nn.Module) -> RemovableHandle:
        """Hook that notes when the module starts; pair it with `leave` as a forward hook that is always called."""

        def enter(module: nn.Module, args: Any) -> None:
            self._running.append(module)

        return module.register_forward_pre_hook(enter)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook that notes when a watched module ends."""
        if self._running:
            self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **kwargs, each_pattern=self._hand)
        if func is F.multi_head_attention_forward:
            return multi_head_attention(*args, **kwargs, each_pattern=self._hand)
        out = func(*args, **kwargs)
        if func in _SOFTMAX and isinstance(out, Tensor) and out.ndim >= 3:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if dim in (-1, out.ndim - 1):
                return self._hand(out)
        return out

    def _hand(self, pattern: Tensor) -> Tensor:
        shaped = pattern if pattern.ndim >= 4 else pattern[:, None]
        changed = self._found(self._running[-1], shaped)
        return pattern if changed is shaped else changed.reshape(pattern.shape)
