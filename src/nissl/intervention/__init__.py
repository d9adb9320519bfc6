"""Changing networks: what happens when units, directions or weights are changed."""

from nissl.intervention.act import ACT, NeuronSteering
from nissl.intervention.calibration import Calibrated, calibrate, divergence
from nissl.intervention.contrast import Activations, Contrast, read_contrast
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
from nissl.intervention.latent import Clusters, Probes, act_shift, fit_logistic, mixed
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
    "ACT", "GACT", "NEUTRAL", "Activations", "Calibrated", "Clusters", "Contrast", "DiffMeanSteering", "DirectionSteering",
    "NeuronSteering", "Probes", "RandomSteering", "Refinement", "SteerResult", "Steering", "SteeringEdits", "act_shift",
    "answer_log_probs", "calibrate", "code_language", "concept_bias", "divergence", "fit_logistic", "generate", "margin",
    "mixed", "perplexity", "plot_margins", "plot_probe_accuracy", "read_contrast", "steer", "steered_divergence",
]  # fmt: skip
