"""Attention scores and patterns: read and edited where softmax or fused attention computes them, in any module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nissl.network.expand import multi_head_attention, scaled_dot_product_attention

Found = Callable[[nn.Module, str, Tensor], Tensor]
"""``found(module, part, tensor) -> tensor``; part is ``scores`` or ``pattern``, both (n_rows, n_heads, queries, keys)."""

_SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax}


@contextmanager
def watched_attention(modules: Iterable[nn.Module], found: Found) -> Iterator[None]:
    """Hand scores and patterns that appear inside the modules to a function, and go on with what it returns.

    A pattern is a softmax over the last of at least three dimensions, or the weights inside
    ``scaled_dot_product_attention`` and ``multi_head_attention_forward``, which are written out for it; scores are what
    the softmax takes. They belong to the innermost of the modules that is running.
    """
    mode = _AttentionMode(found)
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(mode.enter).remove)
            stack.callback(module.register_forward_hook(mode.leave, always_call=True).remove)
        stack.enter_context(mode)
        yield


class _AttentionMode(TorchFunctionMode):
    def __init__(self, found: Found) -> None:
        super().__init__()
        self._found = found
        self._running: list[nn.Module] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._running:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **kwargs, each_scores=self._scores, each_pattern=self._pattern)
        if func is F.multi_head_attention_forward:
            return multi_head_attention(*args, **kwargs, each_scores=self._scores, each_pattern=self._pattern)
        if func in _SOFTMAX:
            scores = args[0] if args else kwargs["input"]
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(scores, Tensor) and scores.ndim >= 3 and dim in (-1, scores.ndim - 1):
                scores = self._scores(scores)
                args, kwargs = (scores, *args[1:]) if args else args, kwargs if args else {**kwargs, "input": scores}
                return self._pattern(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _scores(self, t: Tensor) -> Tensor:
        return self._hand("scores", t)

    def _pattern(self, t: Tensor) -> Tensor:
        return self._hand("pattern", t)

    def _hand(self, part: str, t: Tensor) -> Tensor:
        shaped = t if t.ndim >= 4 else t[:, None]
        changed = self._found(self._running[-1], part, shaped)
        return t if changed is shaped else changed.reshape(t.shape)
