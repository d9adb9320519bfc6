"""The kernel: networks answer Passes; sites, edits, targets and backward rules say what is asked."""

from nissl.network import target
from nissl.network.anatomy import ROLES, Anatomy
from nissl.network.edit import Ablate, Add, Apply, Edit, Patch, Scale, Set
from nissl.network.language import LanguageModel
from nissl.network.network import Network
from nissl.network.passes import Answer, Pass
from nissl.network.rollout import Rollout
from nissl.network.rules import AttnLRP, Deconvolution, Guided, LRPRules, RelP, Rescale, Rules
from nissl.network.site import Site
from nissl.network.target import Target

__all__ = [
    "ROLES", "Ablate", "Add", "Anatomy", "Answer", "Apply", "AttnLRP", "Deconvolution", "Edit", "Guided", "LRPRules",
    "LanguageModel", "Network", "Pass", "Patch", "RelP", "Rescale", "Rollout", "Rules", "Scale", "Set", "Site", "Target", "target",
]  # fmt: skip
