"""Changing networks: what happens when units, directions or weights are changed."""

from nissl.intervention.act import ACT, NeuronSteering
from nissl.intervention.calibration import Calibrated, calibrate, divergence
from nissl.intervention.contrast import Activations, Contrast, read_contrast
from nissl.intervention.editing import (
    ACE,
    EDITORS,
    MEMIT,
    PMET,
    ROME,
    Chain,
    Edited,
    Editor,
    FineTune,
    Request,
    apply_delta,
    edit,
    key_covariances,
    locality,
    multi_hop,
    probabilities,
    read_delta,
    rewrite,
    solve,
)
from nissl.intervention.effects import (
    SteerResult,
    answer_log_probs,
    code_language,
    concept_bias,
    generate,
    margin,
    perplexity,
    plot_margins,
    plot_probe_accuracy,
    steer,
    steered_divergence,
)
from nissl.intervention.feedback import (
    LanguageSubject,
    NeurofeedbackAxis,
    Subject,
    accessible_axes,
    cohens_d,
    control,
    control_precision,
    effects,
    final_accuracy,
    ideal_observer,
    labels_of,
    plot_reports,
    report,
    sentence_states,
    surface_observer,
)
from nissl.intervention.latent import Clusters, Probes, act_shift, fit_logistic, mixed
from nissl.intervention.level_sets import (
    LevelSetTraversal,
    Traversal,
    distances,
    hull,
    plot_star,
    plot_triangle,
    segment,
    triangle_metrics,
    width,
)
from nissl.intervention.steering import (
    GACT,
    NEUTRAL,
    DiffMeanSteering,
    DirectionSteering,
    RandomSteering,
    Refinement,
    Steering,
    SteeringEdits,
)

__all__ = [
    "ACE", "ACT", "EDITORS", "GACT", "MEMIT", "NEUTRAL", "PMET", "ROME", "Activations", "Calibrated", "Chain",
    "Clusters", "Contrast", "DiffMeanSteering", "DirectionSteering", "Edited", "Editor", "FineTune",
    "LanguageSubject", "LevelSetTraversal", "NeurofeedbackAxis", "NeuronSteering", "Probes", "RandomSteering",
    "Refinement", "Request", "SteerResult", "Steering", "SteeringEdits", "Subject", "Traversal",
    "accessible_axes", "act_shift", "answer_log_probs", "apply_delta", "calibrate", "code_language",
    "cohens_d", "concept_bias", "control", "control_precision", "distances", "divergence", "edit", "effects",
    "final_accuracy", "fit_logistic", "generate", "hull", "ideal_observer", "key_covariances", "labels_of",
    "locality", "margin", "mixed", "multi_hop", "perplexity", "plot_margins", "plot_probe_accuracy",
    "plot_reports", "plot_star", "plot_triangle", "probabilities", "read_contrast", "read_delta", "report",
    "rewrite", "segment", "sentence_states", "solve", "steer", "steered_divergence", "surface_observer",
    "triangle_metrics", "width",
]  # fmt: skip
