"""The kernel: networks answer Passes; sites, edits, targets and backward rules say what is asked."""

from nissl.network import target
from nissl.network.edit import Ablate, Add, Apply, Edit, Patch, Scale, Set
from nissl.network.network import Network
from nissl.network.passes import Answer, Pass
from nissl.network.rules import AttnLRP, Deconvolution, Guided, LRPRules, RelP, Rescale, Rules
from nissl.network.site import Site
from nissl.network.target import Target

__all__ = [
    "Ablate", "Add", "Answer", "Apply", "AttnLRP", "Deconvolution", "Edit", "Guided", "LRPRules", "Network", "Pass",
    "Patch", "RelP", "Rescale", "Rules", "Scale", "Set", "Site", "Target", "target",
]  # fmt: skip
