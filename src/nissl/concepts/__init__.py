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

__all__ = [
    "SAE", "Context", "Detection", "Features", "HierarchicalSemiNMF", "Level", "Node", "SemiNMF", "TokenActivations",
    "difference_in_means", "explained_variance", "plot_features", "token_activations", "train_sae",
]  # fmt: skip
