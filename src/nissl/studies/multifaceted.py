"""Nguyen, Yosinski & Clune: Multifaceted feature visualization (2016).

The paper shows pictures and gives no table. So the claim is measured on a unit that was built to have four facets, whose truth is
known. The thresholds below were written down before the first run; the claim without denoising was added after a look at the one
with it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.concepts.facets import Facets
from nissl.concepts.synthesis import ActivationMaximisation, Phase
from nissl.network import Network
from nissl.studies.claims import at_least, at_most

CLUSTERS = 0.95
PURITY = 0.9
DISTINCT = 4
RANDOM = 3.2
RISE = 1.5
MIXED = 0.7
SIDE = 16
PHASES = (Phase(60, weight=(0.4, 0.4)), Phase(20, weight=(0.4, 2.0)))
"""As the paper's first and last, with fewer steps. Its weights were set for images of 227 pixels; on 16 they smooth more."""


class OrUnit(nn.Module):
    """A unit that answers to any of four templates, each held down by the others, and a code of random rectified features.

    Output 0 is Σ_f softplus(s_f - inhibition Σ_{g≠f} relu(s_g) - bias) with s_f the match of template f, at steepness 6.
    """

    templates: Tensor
    mix: Tensor

    def __init__(self, seed: int, inhibition: float = 0.5, bias: float = 0.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        rough = F.interpolate(torch.randn(4, 1, 5, 5, generator=g), size=(SIDE, SIDE), mode="bicubic")[:, 0].flatten(1)
        self.register_buffer("templates", torch.linalg.qr((rough - rough.mean(1, keepdim=True)).T)[0].T)
        self.register_buffer("mix", torch.randn(64, SIDE * SIDE, generator=g) / SIDE)
        self.inhibition, self.bias = inhibition, bias
        self.code = nn.ReLU()

    def match(self, x: Tensor) -> Tensor:
        """Match of each template, (n, 4)."""
        return (x - 0.5).flatten(1) @ self.templates.T

    def forward(self, x: Tensor) -> Tensor:
        """The unit, and the sum of the code, (n, 2)."""
        s = self.match(x)
        others = s.relu().sum(1, keepdim=True) - s.relu()
        unit = F.softplus(s - self.inhibition * others - self.bias, beta=6).sum(1)
        return torch.stack([unit, self.code((x - 0.5).flatten(1) @ self.mix.T).sum(1)], 1)


def planted(model: OrUnit, seed: int, each: int = 60) -> tuple[Tensor, np.ndarray]:
    """Images of the four facets, with noise, and which facet each has."""
    g = torch.Generator().manual_seed(1000 + seed)
    facet = torch.arange(4).repeat_interleave(each)
    strength = 2 + 2 * torch.rand(len(facet), 1, generator=g)
    flat = 0.5 + strength * model.templates[facet] + 0.08 * torch.randn(len(facet), SIDE * SIDE, generator=g)
    return flat.clamp(0, 1).reshape(-1, 1, SIDE, SIDE), facet.numpy()


def purity(model: OrUnit, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Share of each picture's squared match that is its best template's, and which template that is."""
    power = model.match(images).clamp(min=0).square()
    return (power.amax(1) / power.sum(1).clamp(min=1e-12)).numpy(), power.argmax(1).numpy()


def on_planted(seed: int, inhibition: float = 0.5, draws: int = 5) -> dict[str, float]:
    """How well the facets of one planted unit are separated, by the method and from noise."""
    model = OrUnit(seed, inhibition)
    images, truth = planted(model, seed)
    network = Network(model)
    found = Facets(4, "code", phases=PHASES, n_components=10, seed=seed, progress=False).fit(network, 0, images)
    pure, which = purity(model, found.inputs_)
    rough = ActivationMaximisation(PHASES, tv=False, seed=seed, progress=False).run(network, 0, found.mean_images_)
    rough_pure, rough_which = purity(model, rough.inputs)
    cluster = sum(np.bincount(truth[found.labels_ == j]).max() for j in range(4)) / len(truth)
    ascent = ActivationMaximisation(PHASES, seed=seed, progress=False)
    start = 0.5 + 0.1 * torch.randn(4 * draws, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    noisy = purity(model, ascent.run(network, 0, start.clamp(0, 1)).inputs)[1].reshape(draws, 4)
    return {
        "seed": seed,
        "inhibition": inhibition,
        "clusters": float(cluster),
        "purity": float(pure.min()),
        "mean purity": float(pure.mean()),
        "distinct": float(len(set(which.tolist()))),
        "random": float(np.mean([len(set(row.tolist())) for row in noisy])),
        "rise": (found.activations_[:, 1] / found.activations_[:, 0]).min().item(),
        "rise without tv": (rough.activations[:, 1] / rough.activations[:, 0]).min().item(),
        "purity without tv": float(rough_pure.min()),
        "distinct without tv": float(len(set(rough_which.tolist()))),
        "agreement": found.agreement_,
    }


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One seed, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper``, ``ours``, ``interval`` (95 % bootstrap over seeds), ``baseline`` and ``holds``.
    """
    seeds = [seed + i for i in range(1 if quick else 5)]
    table = pd.DataFrame([on_planted(s, draws=2 if quick else 5) for s in seeds])
    additive = pd.DataFrame([on_planted(s, 0.0, draws=1) for s in seeds])
    Console(stderr=True, quiet=not progress).print(table, additive)
    paper = "uncovers the different facets"
    return [
        at_least("planted OR-unit: purity of the clusters", paper, table["clusters"], CLUSTERS, 0.25, seed),
        at_least("planted OR-unit: least purity of a picture", paper, table["purity"], PURITY, 0.25, seed),
        at_least(
            "planted OR-unit: distinct facets of 4",
            paper,
            table["distinct"],
            DISTINCT,
            table["random"].to_numpy().mean().item(),
            seed,
        ),
        at_most("planted OR-unit: distinct facets of 4 from noise", "fewer", table["random"], RANDOM, 4.0, seed),
        at_least("planted OR-unit: activation after over before, the least", "-", table["rise"], RISE, 1.0, seed),
        at_least("the same without denoising", "-", table["rise without tv"], RISE, 1.0, seed),
        at_most("additive unit: mean purity (the method's limit)", "-", additive["mean purity"], MIXED, 1.0, seed),
    ]
