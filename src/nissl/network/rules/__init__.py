"""Backward rules: how gradients flow through any torch module, without changing it."""

from nissl.network.rules.mode import RuleMode, is_activation_module, unmark
from nissl.network.rules.sets import (
    COMPOSITES,
    AttnLRP,
    Deconvolution,
    Guided,
    LRPRules,
    RelP,
    Rescale,
    Rules,
)

__all__ = [
    "COMPOSITES", "AttnLRP", "Deconvolution", "Guided", "LRPRules", "RelP", "Rescale", "RuleMode", "Rules",
    "is_activation_module", "unmark",
]  # fmt: skip
