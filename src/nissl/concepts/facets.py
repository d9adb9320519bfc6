"""Facets: the different kinds of picture that one unit answers to, and a synthetic picture of each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import as_path, at_least, instance, is_number
from nissl.concepts.synthesis import MEAN, ActivationMaximisation, Phase
from nissl.errors import InputError, SiteError
from nissl.network import Network, Pass
from nissl.runner import Asking, Runner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Facets:
    """Cluster the images that excite a unit, average each cluster, and raise the unit from each average on.

    Parameters
    ----------
    k : int, default 10
        Clusters. More than there are facets gives twins: see `similarity_`.
    code_site : str, optional
        Where images are compared; by default what the last linear layer takes.
    n_components : int, default 50
        Principal components of the codes; fewer where images or code are smaller.
    embed : {"tsne", "pca"}, default "tsne"
        Where the clusters are looked for: in a map of two dimensions, as published, or among the components themselves.
    n_mean : int, default 15
        Images nearest to the centre of a cluster, in the map, that are averaged.
    phases : sequence of Phase, default MEAN
        Of the ascent; see `ActivationMaximisation`.
    perplexity : float, default 30
        Of t-SNE; at most a third of the images.
    mean, std : float or sequence of float, default 0, 1
        What the network takes is (pixel / 255 - mean) / std.
    tv : bool, default True
    seed : int, default 0
    progress : bool, default True

    Attributes
    ----------
    labels_ : ndarray (n,) of int
    embedding_ : ndarray (n, 2), or (n, n_components) with "pca"
    members_ : list of ndarray
        Numbers of the images that were averaged, the nearest first.
    mean_images_ : Tensor (k, channels, height, width)
    images_, inputs_ : Tensor (k, channels, ...)
        The pictures found; brought to the size of the network's input.
    activations_ : Tensor (k, 2)
        Of the target at the mean image and at the picture found.
    trace_ : Tensor (steps, k)
    similarity_ : ndarray (k, k)
        Cosine between the codes of the pictures.
    agreement_ : float
        Adjusted Rand index with the clusters that the other `embed` gives.

    References
    ----------
    Nguyen, Yosinski & Clune (2016). Multifaceted feature visualization: uncovering the different types of features learned by each
    neuron in deep neural networks.
    """

    def __init__(
        self, k: int = 10, code_site: str | None = None, *, n_components: int = 50, embed: str = "tsne", n_mean: int = 15,
        phases: Sequence[Phase] = MEAN, perplexity: float = 30.0, mean: Any = 0.0, std: Any = 1.0, tv: bool = True,
        seed: int = 0, progress: bool = True,
    ) -> None:  # fmt: skip
        for name, value in (("k", k), ("n_components", n_components), ("n_mean", n_mean)):
            at_least(name, value, 1)
        if embed not in ("tsne", "pca"):
            raise InputError(f"embed must be 'tsne' or 'pca', got {embed!r}")
        if not (is_number(perplexity) and perplexity > 0):
            raise InputError(f"perplexity must be above 0, got {perplexity!r}")
        self.ascent = ActivationMaximisation(phases, mean=mean, std=std, tv=tv, seed=seed, progress=progress)
        self.k, self.code_site, self.n_components, self.embed = k, code_site, n_components, embed
        self.n_mean, self.perplexity, self.seed, self.progress = n_mean, perplexity, seed, progress

    def fit(self, network: Network, target: Any, images: Tensor) -> Facets:
        """Find the facets of a unit.

        Parameters
        ----------
        network : Network
        target : int, Target or callable
            A class, or a scalar of an inner unit such as ``nissl.network.target.unit(site, channel, y, x)``.
        images : Tensor (n, channels, height, width)
            That excite the unit: a class's, or its exemplars. At least five a cluster.

        Raises
        ------
        InputError
            Too few images, or ones that cannot be told apart.
        GradientError
            The unit has no gradient at a mean image.
        """
        instance("network", network, Network)
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise InputError("images must be a tensor (n, channels, height, width)")
        if len(images) < 5 * self.k:
            raise InputError(
                f"{len(images)} images are too few for {self.k} clusters; at least {5 * self.k} are needed"
            )
        site = self.code_site or network.trace_of(Pass(network.place(images[:1].float()))).last_linear(network)
        if site is None:
            raise SiteError(f"{network.name} has no linear layer whose input could be the code; give code_site=")
        network.locate(site)
        runner = Runner(memory=0, progress=self.progress, tune=False)
        codes = self._codes(runner, network, images, site)
        embedding, labels, centres, other = self._cluster(codes)
        members = []
        for j in range(self.k):
            here = np.flatnonzero(labels == j)
            distance = np.linalg.norm(embedding[here] - centres[j], axis=1)
            members.append(here[np.argsort(distance, kind="stable")[: self.n_mean]])
        if small := [j for j, m in enumerate(members) if len(m) < self.n_mean]:
            warnings.warn(
                f"clusters {small} have fewer than {self.n_mean} images; what there is was averaged", stacklevel=2
            )
        means = torch.stack([images[torch.from_numpy(m)].float().mean(0) for m in members])
        found = self.ascent.run(network, target, means)
        new = self._codes(runner, network, found.inputs, site)
        unit = new / np.maximum(np.linalg.norm(new, axis=1, keepdims=True), 1e-12)
        from sklearn.metrics import adjusted_rand_score

        self.labels_, self.embedding_, self.members_, self.mean_images_ = labels, embedding, members, means
        self.images_, self.inputs_, self.activations_, self.trace_ = (
            found.images, found.inputs, found.activations, found.trace,
        )  # fmt: skip
        self.similarity_ = unit @ unit.T
        self.agreement_ = float(adjusted_rand_score(labels, other))
        return self

    def _codes(self, runner: Runner, network: Network, images: Tensor, site: str) -> np.ndarray:
        def ask(part: Tensor) -> Asking[Tensor]:
            answer = yield Pass(part.float(), read=[site], output=False)
            return answer.reads[site].flatten(1).float().cpu()

        starts = [partial(ask, part) for part in images.split(16)]
        return torch.cat(runner.collect(network, starts, "reading codes", "facets")).numpy()

    def _cluster(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Map, labels and centres there, and the labels that the other kind of map gives."""
        from sklearn.cluster import KMeans
        from sklearn.manifold import TSNE

        if float(np.ptp(codes, axis=0).max()) <= 1e-6 * float(np.abs(codes).max()):
            raise InputError(
                "all images have the same code, so that they cannot be told apart; choose another code_site"
            )
        n = len(codes)
        components = _components(codes, self.n_components, self.seed)
        perplexity = min(self.perplexity, (n - 1) / 3)
        # t-SNE starts from the first two components
        start = "pca" if components.shape[1] > 1 else "random"
        flat = TSNE(2, perplexity=perplexity, init=start, random_state=self.seed).fit_transform(components)
        maps = {"tsne": np.asarray(flat, dtype=np.float64), "pca": np.asarray(components, dtype=np.float64)}
        fits = {name: KMeans(self.k, n_init=10, random_state=self.seed).fit(m) for name, m in maps.items()}  # pyright: ignore
        other = "pca" if self.embed == "tsne" else "tsne"
        own = fits[self.embed]
        return (
            maps[self.embed],
            np.asarray(own.labels_),
            np.asarray(own.cluster_centers_),
            np.asarray(fits[other].labels_),
        )


def _components(codes: np.ndarray, n: int, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    return PCA(min(n, len(codes) - 1, codes.shape[1]), random_state=seed).fit_transform(codes)


def group(codes: np.ndarray, k: int, n_components: int = 50, seed: int = 0) -> tuple[np.ndarray, float]:
    """Sort a few images into facets by their codes, as `Facets` does with ``embed="pca"``, without synthetic pictures.

    Returns
    -------
    ndarray (n,) of int, float
        Facet of each image, and the mean silhouette; one facet and NaN where all codes are the same.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(codes, axis=0))
    if distinct < k:
        return np.zeros(len(codes), dtype=np.int64), float("nan")
    components = _components(codes, n_components, seed)
    fitted = KMeans(k, n_init=10, random_state=seed).fit(components)  # pyright: ignore[reportArgumentType]
    labels = np.asarray(fitted.labels_, dtype=np.int64)
    found = len(np.unique(labels))
    return labels, float(silhouette_score(components, labels)) if 1 < found < len(codes) else float("nan")


def plot_facets(facets: Facets, path: str | Path | None = None) -> Figure:
    """Sheet of facets: the mean image of each cluster above the picture that it led to."""
    from matplotlib.figure import Figure

    if not hasattr(facets, "images_"):
        raise InputError("nothing was fitted: call fit(network, target, images) first")
    figure = Figure(figsize=(1.3 * facets.k, 2.9), layout="constrained")
    axes = np.atleast_2d(figure.subplots(2, facets.k, squeeze=False))
    for row, images in enumerate((facets.mean_images_, facets.images_)):
        levels = (images * facets.ascent.std + facets.ascent.mean).clamp(0, 1)
        for j, image in enumerate(levels):
            shown = image if len(image) == 3 else image[:1].expand(3, -1, -1)
            axes[row, j].imshow(shown.permute(1, 2, 0).numpy())
            axes[row, j].set_title(f"{float(facets.activations_[j, row]):.3g}", fontsize=7)
            axes[row, j].axis("off")
    if path is not None:
        figure.savefig(as_path("path", path), dpi=120)
    return figure
