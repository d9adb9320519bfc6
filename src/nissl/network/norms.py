"""Batch norms in evaluation mode as what they are then: a number times and a number plus for each channel."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode


def affine_norms(memory_format: torch.memory_format) -> AbstractContextManager[Any]:
    """While it holds, batch norms with kept statistics are written as `addcmul`, where that is faster.

    That is behind a gradient on a processor in the format channels last: there the backward pass of PyTorch's batch norm
    takes several times as long as that of a product. The result is the same up to rounding. Backward rules need to see
    the norms themselves; where another function mode holds, nothing is changed.
    """
    wanted = torch.is_grad_enabled() and memory_format is torch.channels_last
    return _AffineNorms() if wanted and _get_current_function_mode() is None else nullcontext()


class _AffineNorms(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return (_batch_norm if func is F.batch_norm else func)(*args, **kwargs)


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    held = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if (
        training or running_mean is None or running_var is None or input.ndim != 4 or input.device.type != "cpu"
        or not input.requires_grad or not input.is_contiguous(memory_format=torch.channels_last)
        or any(t.requires_grad or t.dtype != input.dtype for t in held)
    ):  # fmt: skip
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    return torch.addcmul(shift[:, None, None], input, scale[:, None, None])
