"""Wang et al.: Discovering influential neuron path in vision transformers (2025).

The paper's networks are not at hand. Measured on a function whose best pair is known, and on the vision transformer that ships with
nissl, with unseen pictures of Fashion-MNIST where they are at hand. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn

from nissl.attribution.neuron_path import NeuronPath, Paths, activation_path, hidden_sites
from nissl.errors import MissingExtraError
from nissl.models.vit import fashion_input, fashion_vit
from nissl.network import Network, Pass
from nissl.runner import Runner
from nissl.sources.fashion import fashion_mnist
from nissl.studies.claims import at_least, at_most, stated

HIGHER = 0.9
BELOW_RANDOM = 0.03
SAME_UNIT = 0.6
IMAGES, EXACT_IMAGES = 100, 10
RIVALS = ("activation", "independent", "random")


class JointOrSolo(nn.Module):
    """min(a_p1 + a_p2, 1.5) + 0.7 a_q2 of two hidden layers, (p1, r1) and (p2, q2, r2), that the input gives directly."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The function (n, 1) of the five activations (n, 5)."""
        a, b = self.one(x[:, None, :2])[:, 0], self.two(x[:, None, 2:])[:, 0]
        return ((a[:, 0] + b[:, 0]).clamp(max=1.5) + 0.7 * b[:, 1])[:, None]


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        The known function only.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over pictures), ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    claims = on_known_function()
    if quick:
        return claims
    try:
        images, labels = fashion_mnist("test")
    except MissingExtraError as error:
        warnings.warn(f"the claims on pictures are not measured: {error}", stacklevel=2)
        return claims
    for cross in (True, False):
        table, same, cosine = on_pictures(images, labels, cross, seed, progress)
        console.print(f"cross terms: {cross}", table.mean().round(4).to_string())
        claims += _on_pictures("as printed" if cross else "without cross terms", table, same, cosine, seed)
    return claims


def on_known_function() -> list[dict[str, Any]]:
    """What is found where one pair matters more than any other, and a large unit not at all."""
    network = Network(JointOrSolo(), dtype=torch.float64)
    x = torch.tensor([[1.0, 5.0, 1.0, 1.0, 6.0]], dtype=torch.float64)
    found = {}
    for name, options in {"printed": {}, "complete": {"cross_terms": False}}.items():
        method = NeuronPath(steps=500, midpoint=True, sites=["one", "two"], **options)
        path = method.find(network, x, lambda out: out[:, 0], runner=Runner(progress=False))
        removed = network.run(Pass(x, path.edits())).output
        whole = network.run(Pass(x)).output
        assert whole is not None
        assert removed is not None
        found[name] = path.units.flatten().tolist(), float(whole - removed)
    loudest = activation_path(network, x, ["one", "two"]).flatten().tolist()
    return [
        stated("known function: what removing the path costs, without cross terms", "(complete)", found["complete"][1], 0.0,
               found["complete"][0] == [0, 0] and abs(found["complete"][1] - 1.5) < 1e-6),
        stated("known function: what removing the path costs, as printed: it takes a large unit without influence", "(ours)",
               found["printed"][1], 0.0, found["printed"][0] == [0, 2]),
        stated("known function: the units of largest activation are those without influence", "(control)",
               float(loudest == [1, 2]), None, loudest == [1, 2]),
    ]  # fmt: skip


def on_pictures(
    images: np.ndarray, labels: np.ndarray, cross_terms: bool, seed: int, progress: bool
) -> tuple[pd.DataFrame, float, tuple[float, float]]:
    """Figures of each picture; share of units as in the exact search; cosine of profiles within and between classes."""
    network, runner = Network(fashion_vit(), name="fashion ViT"), Runner(progress=progress)
    g = np.random.default_rng(seed)
    drawn = g.permutation(len(images))[: 4 * IMAGES]
    x, y = fashion_input(images[drawn]), torch.from_numpy(np.asarray(labels)[drawn])
    output = network.run(Pass(x)).output
    assert output is not None
    right = (output.argmax(1) == y).nonzero()[:IMAGES, 0]
    x, y = x[right], y[right]
    sites = tuple(hidden_sites(network, x[:1]))
    method = NeuronPath(cross_terms=cross_terms)
    path = method.find(network, x, y, runner=runner, seed=seed)
    solo = [NeuronPath(cross_terms=False, sites=[s]).find(network, x, y, runner=runner, seed=seed).units for s in sites]
    n_units = path.n_units[0]
    others = {
        "activation": activation_path(network, x, sites),
        "independent": torch.cat(solo, 1),
        "random": torch.from_numpy(g.integers(0, n_units, path.units.shape)),
    }
    rows: dict[str, Any] = {}
    for name, units in {"path": path.units, **others}.items():
        here = Paths(sites, units, path.influence, path.value, path.scores, path.tokens, path.n_units)
        rows[f"influence {name}"] = method.influence(network, x, units, y, runner=runner)
        for what, edits in {"removed": here.edits(), "doubled": here.edits(2.0), "kept": here.keep_only()}.items():
            p = network.run(Pass(x, edits)).output
            assert p is not None
            rows[f"{what} {name}"] = p.softmax(1).gather(1, y[:, None])[:, 0] / path.value - 1
    table = pd.DataFrame({k: v.numpy() for k, v in rows.items()})
    exact = NeuronPath(cross_terms=cross_terms, exact=True)
    few = exact.find(network, x[:EXACT_IMAGES], y[:EXACT_IMAGES], runner=runner, seed=seed)
    same = float((few.units == path.units[:EXACT_IMAGES]).double().mean())
    return table, same, _profiles(path, y.numpy(), g)


def _profiles(path: Paths, y: np.ndarray, g: np.random.Generator) -> tuple[float, float]:
    """Mean cosine of the profiles of two halves of a class, and of halves of different classes."""
    half = np.zeros(len(y), dtype=int)
    for c in np.unique(y):
        mine = g.permutation(np.flatnonzero(y == c))
        half[mine[len(mine) // 2 :]] = 1
    profile = path.profile([f"{c}-{h}" for c, h in zip(y, half, strict=True)])
    flat = np.nan_to_num(profile.to_numpy().reshape(profile.sizes["class"], -1))
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    names = [str(n).split("-")[0] for n in profile["class"].values]
    cosine = flat @ flat.T
    same = np.array([[a == b for b in names] for a in names])
    np.fill_diagonal(same, False)
    other = ~same & ~np.eye(len(names), dtype=bool)

    def mean(of: np.ndarray) -> float:
        return float(of.mean()) if of.size else math.nan  # pictures of one class only, or one of each

    return mean(cosine[same]), mean(cosine[other])


def _on_pictures(
    where: str, table: pd.DataFrame, same: float, cosine: tuple[float, float], seed: int
) -> list[dict[str, Any]]:
    def column(name: str) -> np.ndarray:
        return table[name].to_numpy(dtype=float)

    claims = [
        at_least(f"{where}: pictures on which the path has more joint influence than {rival}", "higher on all models",
                 (column("influence path") > column(f"influence {rival}")).astype(float), HIGHER, 0.5, seed)
        for rival in RIVALS
    ]  # fmt: skip
    removed = {n: column(f"removed {n}") for n in ("path", *RIVALS)}
    doubled = {n: column(f"doubled {n}") for n in ("path", *RIVALS)}
    return [
        *claims,
        at_least(f"{where}: probability lost when the path is removed, more than random units", "stronger",
                 removed["random"] - removed["path"], BELOW_RANDOM, 0.0, seed),
        at_most(f"{where}: change when the path is removed minus that of the largest activations", "stronger",
                removed["path"] - removed["activation"], 0.0, 0.0, seed),
        at_least(f"{where}: change when the path is doubled minus that of the largest activations", "stronger",
                 doubled["path"] - doubled["activation"], 0.0, 0.0, seed),
        at_least(f"{where}: probability with nothing but the path at the class token, more than with random units",
                 "few units suffice", column("kept path") - column("kept random"), 0.0, 0.0, seed),
        stated(f"{where}: units as in the exact search, at least {SAME_UNIT:g}", "(ours)", same, 1 / 128, same >= SAME_UNIT),
        stated(f"{where}: cosine of profiles within a class, above that between classes", "classes have profiles", cosine[0],
               cosine[1], cosine[0] > cosine[1]),
    ]  # fmt: skip
