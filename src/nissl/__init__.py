"""nissl: which explanations of a network can be believed, with the evidence."""

__version__ = "0.1.0"

from nissl import errors
from nissl.network import (
    Ablate,
    Add,
    Answer,
    Apply,
    Edit,
    LanguageModel,
    Network,
    Pass,
    Patch,
    Rollout,
    Scale,
    Set,
    Site,
    Target,
    target,
)
from nissl.runner import Runner
from nissl.trust.audit import AuditResult, audit

__all__ = [
    "Ablate", "Add", "Answer", "Apply", "AuditResult", "Edit", "LanguageModel", "Network", "Pass", "Patch", "Rollout", "Runner", "Scale", "Set",
    "Site", "Target", "audit", "errors", "target",
]  # fmt: skip
