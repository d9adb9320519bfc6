"""What units encode: factorisations, dictionaries, and what their features stand for."""

from nissl.concepts.craft import ConceptCurves, ConceptImportance, Craft, plot_concepts, plot_maps
from nissl.concepts.descriptions import (
    Captioner,
    Description,
    Descriptions,
    LabelDescriber,
    Milan,
    Prior,
    Words,
    plot_edit,
)
from nissl.concepts.exemplars import Exemplars, find_exemplars, plot_exemplars
from nissl.concepts.facets import Facets, plot_facets
from nissl.concepts.features import (
    Context,
    Detection,
    Features,
    TokenActivations,
    difference_in_means,
    plot_features,
    token_activations,
)
from nissl.concepts.sae import SAE, explained_variance, train_sae
from nissl.concepts.snmf import HierarchicalSemiNMF, Level, Node, SemiNMF
from nissl.concepts.synthesis import CBR, MEAN, ActivationMaximisation, Phase, Synthesis
from nissl.concepts.units import UnitSheets, unit_sheets
from nissl.concepts.vocabulary import (
    NeuronVocabulary,
    WeightFolder,
    clamp,
    clamp_curve,
    concept_tokens,
    frequent_tokens,
    plot_clamps,
    preserved,
)

__all__ = [
    "CBR", "MEAN", "SAE", "ActivationMaximisation", "Captioner", "ConceptCurves", "ConceptImportance",
    "Context", "Craft", "Description", "Descriptions", "Detection", "Exemplars", "Facets", "Features",
    "HierarchicalSemiNMF", "LabelDescriber", "Level", "Milan", "NeuronVocabulary", "Node", "Phase", "Prior",
    "SemiNMF", "Synthesis", "TokenActivations", "UnitSheets", "WeightFolder", "Words", "clamp", "clamp_curve",
    "concept_tokens", "difference_in_means", "explained_variance", "find_exemplars", "frequent_tokens",
    "plot_clamps", "plot_concepts", "plot_edit", "plot_exemplars", "plot_facets", "plot_features", "plot_maps",
    "preserved", "token_activations", "train_sae", "unit_sheets",
]  # fmt: skip
