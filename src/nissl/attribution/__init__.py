"""Which units are responsible: methods that score the units of a site."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from typing import Any

from nissl.attribution.attention import AttentionFlow, AttentionRollout, AttentionWeights
from nissl.attribution.base import Method
from nissl.attribution.baselines import EdgeDetector, RandomScores
from nissl.attribution.cams import AblationCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from nissl.attribution.causal_paths import CausalGraph, CausalMap, CausalPaths
from nissl.attribution.circuits import (
    EdgePatching,
    FeaturePatching,
    Graph,
    edge_circuit,
    feature_circuit,
)
from nissl.attribution.gradients import (
    ExpectedGradients,
    InputXGradient,
    IntegratedGradients,
    Saliency,
    SmoothGrad,
    VarGrad,
)
from nissl.attribution.hsic import HSIC
from nissl.attribution.neuron_path import NeuronPath, Paths, activation_path, hidden_sites
from nissl.attribution.patching import (
    ActivationPatching,
    AttributionPatching,
    NodeIntegratedGradients,
    Nodes,
    Patching,
    RelevancePatching,
    agreement,
    agreement_gain,
    nodes_of,
    patch,
)
from nissl.attribution.perturbation import RISE, Occlusion
from nissl.attribution.query_value import QueryValueAttribution, plot_query_value, top_layers
from nissl.attribution.relevance import LRP, DeconvNet, DeepLIFT, GuidedBackprop
from nissl.attribution.resampling import Bank, Resampling, answer_kl
from nissl.attribution.sentences import (
    MiniLMEmbedder,
    Sentence,
    TfidfEmbedder,
    Trace,
    by_tag,
    final_answer,
    label_by_rules,
    last_number,
    split_sentences,
)
from nissl.attribution.shapley import LIME, KernelSHAP, ShapleySampling
from nissl.attribution.subsets import (
    SMDL,
    LiMA,
    Ranking,
    average_highest_confidence,
    evidential_loss,
    plot_ranking,
    search_passes,
)
from nissl.attribution.thoughts import (
    AttentionSuppression,
    Received,
    ReceiverHeads,
    ThoughtAnchors,
    Thoughts,
    ablate_heads,
    head_edits,
)
from nissl.attribution.tracing import Choice, TraceResult, choose_approximation, plot_nodes, trace
from nissl.errors import InputError

__all__ = [
    "HSIC", "LIME", "LRP", "METHODS", "RISE", "SMDL", "AblationCAM", "ActivationPatching", "AttentionFlow",
    "AttentionRollout", "AttentionSuppression", "AttentionWeights", "AttributionPatching", "Bank",
    "CausalGraph", "CausalMap", "CausalPaths", "Choice", "DeconvNet", "DeepLIFT", "EdgeDetector",
    "EdgePatching", "ExpectedGradients", "FeaturePatching", "GradCAM", "GradCAMPlusPlus", "Graph",
    "GuidedBackprop", "InputXGradient", "IntegratedGradients", "KernelSHAP", "LayerCAM", "LiMA", "Method",
    "MiniLMEmbedder", "NeuronPath", "NodeIntegratedGradients", "Nodes", "Occlusion", "Patching", "Paths",
    "QueryValueAttribution", "RandomScores", "Ranking", "Received", "ReceiverHeads", "RelevancePatching",
    "Resampling", "Saliency", "ScoreCAM", "Sentence", "ShapleySampling", "SmoothGrad", "TfidfEmbedder",
    "ThoughtAnchors", "Thoughts", "Trace", "TraceResult", "VarGrad", "ablate_heads", "activation_path",
    "agreement", "agreement_gain", "answer_kl", "average_highest_confidence", "by_tag", "choose_approximation",
    "edge_circuit", "evidential_loss", "feature_circuit", "final_answer", "head_edits", "hidden_sites",
    "label_by_rules", "last_number", "method", "nodes_of", "patch", "plot_nodes", "plot_query_value",
    "plot_ranking", "search_passes", "split_sentences", "top_layers", "trace",
]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Saliency, InputXGradient, IntegratedGradients, SmoothGrad, VarGrad, ExpectedGradients,
        GuidedBackprop, DeconvNet, DeepLIFT, LRP,
        GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM, AblationCAM,
        Occlusion, RISE, HSIC,
        LiMA, SMDL,
        LIME, KernelSHAP, ShapleySampling,
        AttentionRollout, AttentionFlow, AttentionWeights,
        RandomScores, EdgeDetector,
    )
}  # fmt: skip
"""Every method by its key."""

_SPEC = re.compile(r"^\s*(?P<key>[^()\s]+)\s*(?:\((?P<parameters>.*)\))?\s*$", re.DOTALL)


def method(name_or_spec: str | Method) -> Method:
    """A method by its key, with its parameters if some differ from the defaults.

    Parameters
    ----------
    name_or_spec : str or Method
        ``"ig"``, ``"ig(steps=64, baseline='blur')"``; a Method is handed back as it is. Parameters are Python literals;
        nothing is evaluated.

    Raises
    ------
    InputError
        No such method or parameter (near ones are named), or text that is no specification.

    Examples
    --------
    >>> from nissl.attribution import method
    >>> method("ig(steps=64)").steps
    64
    """
    if isinstance(name_or_spec, Method):
        return name_or_spec
    if not isinstance(name_or_spec, str) or not (found := _SPEC.match(name_or_spec)):
        raise InputError(f"a method is named like 'ig' or 'ig(steps=64)'; got {name_or_spec!r}")
    key = found["key"].lower()
    if key not in METHODS:
        # Classes and titles are suggested too, for who knows a method by its name in the literature.
        names = {alias.lower(): k for k, cls in METHODS.items() for alias in (k, cls.__name__, cls.title)}
        near = dict.fromkeys(names[n] for n in difflib.get_close_matches(key, names, 3, 0.5))
        hint = f"did you mean {', '.join(near)}? There are" if near else "there are"
        raise InputError(f"no method {found['key']!r}; {hint} {', '.join(METHODS)}")
    cls = METHODS[key]
    known = list(inspect.signature(cls).parameters)
    parameters = _parameters(name_or_spec, found["parameters"] or "")
    if unknown := [p for p in parameters if p not in known]:
        near = difflib.get_close_matches(unknown[0], known, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"{key} has no parameter {unknown[0]!r}; {hint}It takes {', '.join(known) or 'none'}")
    return cls(**parameters)


def _parameters(spec: str, text: str) -> dict[str, Any]:
    """Keyword arguments written as Python literals."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: brackets or signs nested too deep
        call = None
    if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
        raise InputError(f"{spec!r} is no specification of a method: parameters are written name=value")
    found: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in found:
            raise InputError(f"{spec!r} is no specification of a method: each parameter is written once, name=value")
        try:
            found[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            raise InputError(
                f"{spec!r}: the value of {keyword.arg} must be a literal (number, string, True, None, tuple)"
            ) from error
    return found
