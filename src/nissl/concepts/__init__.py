"""What units encode: factorisations, dictionaries, and what their features stand for."""

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
    "SAE", "Context", "Detection", "Features", "HierarchicalSemiNMF", "Level", "NeuronVocabulary", "Node",
    "SemiNMF", "TokenActivations", "WeightFolder", "clamp", "clamp_curve", "concept_tokens", "difference_in_means",
    "explained_variance", "frequent_tokens", "plot_clamps", "plot_features", "preserved", "token_activations",
    "train_sae",
]  # fmt: skip
