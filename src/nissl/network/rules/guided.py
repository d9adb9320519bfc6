"""Guided back-propagation and deconvolution: ReLUs that let only positive gradients through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nissl.errors import RuleError
from nissl.network.rules.mode import Call, RuleMode, resolve, routed


def _is_relu(call: Call) -> bool:
    if call.name in ("relu", "relu6"):
        return True
    if call.name == "hardtanh":
        return call.get("min_val", 1, -1.0) == 0
    if call.name == "clamp":
        low = call.get("min", 1)
        return isinstance(low, (int, float)) and low == 0
    if call.name == "clamp_min":
        low = call.get("min", 1)
        return isinstance(low, (int, float)) and low == 0
    return call.name == "threshold" and call.get("threshold", 1) == 0 and call.get("value", 2) == 0


class GuidedMode(RuleMode):
    """Keeps the positive part of the gradient at every ReLU; with `guided` also the ReLU's own derivative."""

    def __init__(self, name: str, guided: bool) -> None:
        super().__init__(name)
        self._guided = guided
        self._seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if resolve(func).name in ("relu", "relu6"):
            self._seen = True
        return super().__torch_function__(func, types, args, kwargs)

    def handle(self, call: Call) -> Any:
        """Replace the gradient of ReLUs; leave everything else."""
        if not _is_relu(call):
            return call.run()
        self.met["relu"] += 1
        x = call.carriers[0]
        with torch.no_grad():
            value = call.run()
        if not self._guided:
            return routed(value, x, lambda g: g.clamp(min=0))
        # Open where the output follows the input; computed before anything is written over the output.
        low, high = 0.0, _ceiling(call)
        seen = x.detach()
        follows = (seen > low) if high is None else (seen > low) & (seen < high)

        def route(g: Tensor) -> Tensor:
            return g.clamp(min=0) * follows

        return routed(value, x, route)

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        if exc_type is None and not (self._seen or self.met["relu"]):
            raise RuleError(
                f"{self.name} changes the gradient of ReLUs and this network called none "
                "(other activations, or ReLUs hidden in fused calls): the result would be the plain gradient"
            )


def _ceiling(call: Call) -> float | None:
    if call.name == "relu6":
        return 6.0
    if call.name == "hardtanh":
        return call.get("max_val", 2, 1.0)
    if call.name == "clamp":
        return call.get("max", 2)
    return None
