"""CRAFT beside its published algorithm, made from scikit-learn's factorisation and plain loops over images."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor, nn

import nissl
from benchmarks.measure import Case
from benchmarks.subject import Subject
from nissl.concepts.craft import Craft
from nissl.studies.snmf import matched

IMAGES, CHANNELS, SIDE, CONCEPTS = 300, 512, 7, 10
EXPLAINED = 30
"""Images over which importance is estimated."""
POINTS = 32


def activations() -> tuple[Tensor, nn.Module]:
    """Activations (n, channels, y, x) of concepts that each place uses few of, and a network that begins with them."""
    rng = np.random.default_rng(0)
    concepts = rng.uniform(0.5, 1.5, (CONCEPTS, CHANNELS)) * (rng.random((CONCEPTS, CHANNELS)) < 0.25)
    # an image shows some concepts, a place of it some of those
    shown = rng.random((IMAGES, 1, 1, CONCEPTS)) < 0.4
    use = (
        rng.exponential(size=(IMAGES, SIDE, SIDE, CONCEPTS))
        * (rng.random((IMAGES, SIDE, SIDE, CONCEPTS)) < 0.5)
        * shown
    )
    a = (use @ concepts + 0.3 * rng.standard_normal((IMAGES, SIDE, SIDE, CHANNELS))).clip(0)
    head = nn.Linear(CHANNELS, 100)
    with torch.no_grad():
        weights = torch.from_numpy(rng.standard_normal((100, CHANNELS)) / CHANNELS)
        weights[0] = torch.from_numpy(np.linalg.pinv(concepts) @ (4 * 0.7 ** np.arange(CONCEPTS)))
        head.weight.copy_(weights)
    module = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    return torch.from_numpy(a.astype(np.float32)).movedim(-1, 1).contiguous(), module.requires_grad_(False)


def published(x: Tensor, module: Any, batch: int) -> dict[str, Any]:
    """Factorisation, coefficients and importance as the authors' release has them."""
    from sklearn.decomposition import NMF

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NMF says where it has not converged
        a = torch.cat([module[0](rows).mean((2, 3)) for rows in x.split(batch)]).numpy()
        model = NMF(CONCEPTS, random_state=0)
        u = model.fit_transform(a)
        w = model.components_.astype(np.float32)
        some = torch.cat([module[0](rows) for rows in x[:EXPLAINED].split(batch)]).movedim(1, -1).numpy()
        use = model.transform(some.reshape(-1, CHANNELS)).reshape(EXPLAINED, SIDE, SIDE, CONCEPTS)
        points = qmc.Halton(2 * CONCEPTS, scramble=False).random(POINTS).astype(np.float32)
        left, right = points[:, :CONCEPTS], points[:, CONCEPTS:]
        mixed = [np.where(np.arange(CONCEPTS) == i, right, left) for i in range(CONCEPTS)]
        masks = np.concatenate([left, right, *mixed])
        indices = []
        for image in use:
            y = []
            for some_masks in np.array_split(masks, len(masks) // batch):
                perturbed = (image[None] * some_masks[:, None, None]) @ w
                y.append(module[1:](torch.from_numpy(perturbed).movedim(-1, 1))[:, 0])
            y = torch.cat(y).numpy().reshape(CONCEPTS + 2, POINTS)
            indices.append(((y[0] - y[2:]) ** 2).mean(1) / (2 * y[0].var(ddof=1)))
    error = float(np.linalg.norm(a - u @ w) / np.linalg.norm(a))
    return {"error": error, "components": w, "importance": np.mean(indices, 0)}


def craft(s: Subject) -> Case:
    x, module = activations()
    network = nissl.Network(module)

    def ours(n_init: int, points: str = "sobol") -> dict[str, Any]:
        model = Craft("0", CONCEPTS, patch_size=SIDE, n_init=n_init, random_state=0, progress=False).fit(network, x)
        mean = model.importances(x[:EXPLAINED], 0, n_design=POINTS, points=points).mean.numpy()
        return {"error": model.reconstruction_error_, "components": model.components_, "importance": mean}

    def theirs() -> dict[str, Any]:
        return published(x, module, s.batch)

    def differences() -> dict[str, tuple[float, float]]:
        # with the peer's points, whose columns go to the concepts in another order: 32 points leave that much open
        a, b = ours(3, "halton"), theirs()
        order = matched(b["components"], a["components"], index=True)
        return {
            "reconstruction error, above the peer's": (max(a["error"] / b["error"] - 1, 0.0), 1e-3),
            "concepts, 1 - least cosine": (float(1 - matched(b["components"], a["components"]).min()), 0.02),
            "importance": (float(np.abs(a["importance"][order] - b["importance"]).max()), 0.1),
        }

    return Case(
        "CRAFT", "scikit-learn", 0.5,
        {"nissl": lambda: ours(3), "nissl, one start": lambda: ours(1), "scikit-learn": theirs},
        differences, module,
        note="from activations on: the network below is the same for both; nissl takes the best of three starts",
    )  # fmt: skip
