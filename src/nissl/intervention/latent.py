"""The arithmetic of latent steering, on plain arrays: differences become clusters, clusters directions, probes choose."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least
from nissl.errors import InputError

FEW = 50
"""Prompts below which two clusters are made by default, not three."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """Differences of activations, grouped: one mean difference for each layer and cluster.

    Attributes
    ----------
    means : Tensor (n_layers, n_clusters, d)
        Mean difference of each cluster.
    scale : Tensor (n_layers,)
        Mean length of a difference in each layer: the unit in which layers are compared, since late ones are longer.
    labels : Tensor (n, n_layers), long
        Cluster of each difference; the same in all layers unless they were clustered one by one.
    per_layer : bool
    """

    means: Float[Tensor, "layer cluster d"]
    scale: Float[Tensor, " layer"]
    labels: Int[Tensor, "n layer"]
    per_layer: bool = False

    @classmethod
    def of(
        cls,
        differences: Float[Tensor, "n layer d"],
        n_clusters: int | None = None,
        *,
        per_layer: bool = False,
        seed: int = 0,
    ) -> Clusters:
        """Group differences by k-means (10 starts).

        Parameters
        ----------
        differences : Tensor (n, n_layers, d)
            One difference, positive minus negative, for each prompt and layer.
        n_clusters : int, optional
            By default 3; 2 below 50 prompts; 1 below 4. Where a cluster would hold a single prompt there are fewer, with a
            warning: one prompt is no direction.
        per_layer : bool, default False
            Cluster each layer by itself, instead of all layers together.
        seed : int, default 0

        Raises
        ------
        InputError
            NaN or infinity; more clusters than prompts; a layer in which positive and negative do not differ.
        """
        n, n_layers, _ = differences.shape
        if not bool(torch.isfinite(differences).all()):
            raise InputError("the differences of activations hold NaN or infinity")
        if n_clusters is None:
            n_clusters = 1 if n < 4 else 2 if n < FEW else 3
        at_least("n_clusters", n_clusters, 1)
        if n_clusters > n:
            raise InputError(f"{n_clusters} clusters cannot be made of {n} prompts")
        scale = differences.norm(dim=-1).mean(0)
        if bool((scale == 0).any()):
            layers = (scale == 0).nonzero()[:, 0].tolist()
            raise InputError(f"positive and negative answers have the same activations in layers {layers}")
        scaled = (differences / scale[:, None]).double().cpu().numpy()
        groups = [scaled[:, layer] for layer in range(n_layers)] if per_layer else [scaled.reshape(n, -1)]
        k = n_clusters
        while True:
            columns = [_kmeans(x, k, seed) for x in groups]
            if k == 1 or all(np.bincount(c, minlength=k).min() > 1 for c in columns):
                break
            k -= 1
        if k < n_clusters:
            warnings.warn(
                f"{n_clusters} clusters of {n} prompts leave a cluster with one prompt or none; {k} are made",
                stacklevel=2,
            )
        labels = torch.from_numpy(np.stack(columns, axis=1)).to(differences.device).expand(n, n_layers).contiguous()
        member = F.one_hot(labels, k).to(differences.dtype)
        means = torch.einsum("nlk,nld->lkd", member / member.sum(0), differences)
        return cls(means, scale, labels, per_layer)

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return self.means.shape[1]

    @property
    def directions(self) -> Float[Tensor, "layer cluster d"]:
        """Unit vectors along the mean differences."""
        return F.normalize(self.means, dim=-1)

    @property
    def shares(self) -> Float[Tensor, "layer cluster"]:
        """Share of the prompts in each cluster; the largest is what always guessing the same would get right."""
        return F.one_hot(self.labels, self.n_clusters).float().mean(0)

    def nearest(self, differences: Float[Tensor, "m layer d"]) -> Int[Tensor, "m layer"]:
        """The cluster whose centroid is nearest to a difference."""
        centroids = self.means / self.scale[:, None, None]
        distance = (differences[:, :, None] / self.scale[:, None, None] - centroids).square().sum(-1)
        if self.per_layer:
            return distance.argmin(-1)
        return distance.sum(1).argmin(-1)[:, None].expand(-1, len(self.scale)).contiguous()


def _kmeans(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    if k == 1:
        return np.zeros(len(x), dtype=np.int64)
    with warnings.catch_warnings():  # fewer distinct points than clusters: told by the size of the clusters
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        found: Any = KMeans(k, n_init=10, random_state=seed).fit(x)  # pyright: ignore[reportArgumentType]
        return found.labels_.astype(np.int64)


@dataclass(eq=False)
class Probes:
    """A linear softmax probe for each layer: which cluster a prompt belongs to, told from its activation.

    Activations are standardised with the mean and standard deviation of the prompts that the probes were fitted on, and
    get a constant feature for the intercept. Fitting and refining are the same step of gradient descent on the mean
    cross-entropy plus ``decay / 2`` times the squared weights; fitting takes 200 of them over all prompts, from zero, and
    refining one for each arriving prompt, over the last 16. (AdamW moves all weights alike at first and fits more noise.)

    Attributes
    ----------
    weight : Tensor (n_layers, n_clusters, d + 1)
    mean, deviation : Tensor (n_layers, d)
    learning_rate : float
        For 64 features; it is divided by the width over 64, so that a step moves the logits as far at every width.
    decay : float
    buffer : deque of (features, labels)
        The last prompts that were learned online.
    """

    weight: Float[Tensor, "layer cluster features"]
    mean: Float[Tensor, "layer d"]
    deviation: Float[Tensor, "layer d"]
    learning_rate: float = 0.02
    decay: float = 0.01
    buffer: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=16))

    @classmethod
    def fit(
        cls,
        activations: Float[Tensor, "n layer d"],
        labels: Int[Tensor, "n layer"],
        n_clusters: int,
        *,
        steps: int = 200,
        learning_rate: float = 0.02,
        decay: float = 0.01,
        buffer: int = 16,
    ) -> Probes:
        """Fit all layers at once, from zero.

        Parameters
        ----------
        activations : Tensor (n, n_layers, d)
        labels : Tensor (n, n_layers), long
            Cluster of each prompt.
        n_clusters : int
        steps : int, default 200
        learning_rate, decay : float, default 0.02, 0.01
        buffer : int, default 16
            Prompts that an online step looks at.
        """
        mean, deviation = activations.mean(0), activations.std(0, correction=0)
        still = deviation <= 1e-6 * mean.abs().amax(-1, keepdim=True)  # rounding, not variation
        shape = (activations.shape[1], n_clusters, activations.shape[2] + 1)
        deviation = torch.where(still, torch.ones_like(deviation), deviation)
        probes = cls(activations.new_zeros(shape), mean, deviation, learning_rate, decay, deque(maxlen=buffer))
        x = probes.features(activations)
        for _ in range(steps if n_clusters > 1 else 0):
            probes._step(x, labels)
        return probes

    def features(self, activations: Float[Tensor, "n layer d"]) -> Float[Tensor, "n layer features"]:
        """What the probes see of activations."""
        return F.pad((activations - self.mean) / self.deviation, (0, 1), value=1.0)

    def of(self, layers: Sequence[int]) -> Probes:
        """The probes of some layers, without what they hold for learning."""
        layers = list(layers)
        return Probes(self.weight[layers], self.mean[layers], self.deviation[layers], self.learning_rate, self.decay)

    def __call__(self, activations: Float[Tensor, "n layer d"]) -> Float[Tensor, "n layer cluster"]:
        """Probability of each cluster."""
        return torch.einsum("nlf,lkf->nlk", self.features(activations), self.weight).softmax(-1)

    def learn(self, activation: Float[Tensor, "layer d"], label: Int[Tensor, " layer"]) -> None:
        """Put one labelled prompt into the buffer and take one step on what it holds; layers with the label -1 are left out."""
        self.buffer.append((self.features(activation[None])[0], label))
        x, y = (torch.stack(parts) for parts in zip(*self.buffer, strict=True))
        self._step(x, y)

    def _step(self, x: Float[Tensor, "n layer features"], y: Int[Tensor, "n layer"]) -> None:
        error = torch.einsum("nlf,lkf->nlk", x, self.weight).softmax(-1)
        error = (error - F.one_hot(y.clamp_min(0), self.weight.shape[1])) * (y >= 0)[..., None]
        gradient = torch.einsum("nlk,nlf->lkf", error, x) / len(x) + self.decay * self.weight
        self.weight = self.weight - self.learning_rate * 64 / self.weight.shape[-1] * gradient


def mixed(
    directions: Float[Tensor, "layer cluster d"], probabilities: Float[Tensor, "n layer cluster"], soft: bool = False
) -> Float[Tensor, "n layer d"]:
    """The direction of the most probable cluster, or (soft) the probability-weighted mean, at unit length."""
    if not soft:
        choice = F.one_hot(probabilities.argmax(-1), directions.shape[1]).to(directions.dtype)
        return torch.einsum("nlk,lkd->nld", choice, directions)
    return F.normalize(torch.einsum("nlk,lkd->nld", probabilities.to(directions.dtype), directions), dim=-1)


def fit_logistic(
    positive: Float[Tensor, "n site d"],
    negative: Float[Tensor, "n site d"],
    member: Bool[Tensor, "n cluster"],
    *,
    penalty: float = 1.0,
    steps: int = 30,
) -> Float[Tensor, "site cluster d"]:
    """Logistic regressions without intercept, positive against negative, for each site and cluster at once.

    Each minimises the summed log loss over the members of its cluster plus ``penalty / 2`` times the squared length of its
    weights, by Newton steps with halving, in float64.

    Parameters
    ----------
    positive, negative : Tensor (n, n_sites, d)
    member : Tensor (n, n_clusters), bool
        Which prompts each regression sees.
    penalty : float, default 1
    steps : int, default 30
    """
    x = torch.cat([positive, -negative]).double()  # without an intercept a negative is a mirrored positive
    seen = torch.cat([member, member]).double()
    theta = x.new_zeros(x.shape[1], member.shape[1], x.shape[2])
    ridge = penalty * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)

    def loss(t: Tensor) -> Tensor:
        margin = torch.einsum("nsd,skd->nsk", x, t)
        return (seen[:, None] * F.softplus(-margin)).sum(0) + penalty / 2 * t.square().sum(-1)

    now = loss(theta)
    for _ in range(steps):
        p = torch.einsum("nsd,skd->nsk", x, theta).sigmoid()
        gradient = torch.einsum("nsk,nsd->skd", seen[:, None] * (p - 1), x) + penalty * theta
        hessian = torch.einsum("nsk,nsd,nse->skde", seen[:, None] * p * (1 - p), x, x) + ridge
        step = torch.linalg.solve(hessian, gradient)
        size = torch.ones_like(now)
        for _ in range(30):
            new = loss(theta - size[..., None] * step)
            worse = new > now
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        size = torch.where(new > now, 0.0, size)
        theta = theta - size[..., None] * step
        gain = (now - loss(theta)).amax()
        now = loss(theta)
        if float(gain) < 1e-10:
            break
    return theta.to(positive.dtype)


def act_shift(
    activations: Float[Tensor, "*n site d"],
    theta: Float[Tensor, "site cluster d"],
    vectors: Float[Tensor, "site cluster d"],
    beta: float = 0.0,
) -> Float[Tensor, "*n site d"]:
    """What ACT adds at strength 1: every cluster's vector, weighted by how far the activation is from positive.

    Σ_c (1 − sigmoid(θ_c · a) + β) v_c, with one θ and v for each site and cluster.
    """
    far = 1 - torch.einsum("...sd,skd->...sk", activations, theta).sigmoid() + beta
    return torch.einsum("...sk,skd->...sd", far, vectors)
