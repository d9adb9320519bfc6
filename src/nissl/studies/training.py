"""The small networks that studies train: one loop, repeatable, that leaves the global generator as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from nissl.seeds import seeded

M = TypeVar("M", bound=nn.Module)


def fit(
    make: Callable[[], M], loss_of: Callable[[M, Tensor], Tensor], n: int, *, epochs: int, batch: int, rate: float,
    decay: float = 0.0, seed: int = 0,
) -> M:  # fmt: skip
    """Train a network by AdamW, examples in a new order each epoch.

    Parameters
    ----------
    make : callable
        Makes the network; its weights are drawn with `seed`.
    loss_of : callable
        ``loss_of(module, rows)``: mean loss of some of the n examples.
    n : int
        Number of examples.
    epochs, batch : int
    rate, decay : float
    seed : int, default 0

    Returns
    -------
    Module
        In evaluation mode.
    """
    with seeded(seed):
        module = make()
        optimiser = torch.optim.AdamW(module.parameters(), rate, weight_decay=decay)
        for _ in range(epochs):
            for rows in torch.randperm(n).split(batch):
                optimiser.zero_grad()
                loss_of(module, rows).backward()
                optimiser.step()
    module.eval()
    return module
