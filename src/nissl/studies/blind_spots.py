"""Balasubramanian et al.: Exploring geometry of blind spots in vision models (2023).

Measured on networks whose level sets are known; on handwritten digits (8 × 8, scikit-learn) with a clean and an adversarially
trained network made here; and, where their weights are at hand, on the clean and the adversarially trained LeNet of
advertorch with twenty MNIST digits; on four photographs with the demo network. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.errors import InputError, MissingExtraError
from nissl.intervention.level_sets import LevelSetTraversal, distances, hull, segment, triangle_metrics
from nissl.network import Network, Pass
from nissl.sources import load_data, load_model
from nissl.sources.digits import load_lenet, mnist_digits, small_digits
from nissl.studies.claims import at_least, at_most, stated
from nissl.studies.training import fit
from nissl.trust.statistics import bootstrap

EXACT = 1e-5
DRIFT = (5.0, 20.0)
"""Ratio of the drifts off a sphere at steps of .1 and .01; in proportion to the step it is 10."""
P_THRESH = 0.1
SOURCES, TARGETS = 20, 5


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        Known level sets and few digits, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over sources), ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(1 if quick else 5)]
    plane, ratio = np.array([on_plane(s) for s in seeds]), np.array([on_sphere(s) for s in seeds])
    claims = [
        stated(f"linear network: distance of the end from the target's projection on the level plane, at most {EXACT:g}",
               "-", bootstrap(plane), None, bool((plane <= EXACT).all())),
        stated(f"spheres: drift at step .1 over that at step .01, {DRIFT[0]:g} to {DRIFT[1]:g}", "-", bootstrap(ratio), 1.0,
               bool(((ratio >= DRIFT[0]) & (ratio <= DRIFT[1])).all())),
    ]  # fmt: skip
    pairs = [digit_pair(s, quick) for s in (seeds[:1] if quick else seeds[:3])]
    tables = [
        on_pair(
            clean, robust, x, y, s, 6 if quick else SOURCES, 2 if quick else TARGETS, 60 if quick else 200, progress
        )
        for s, (clean, robust, x, y) in zip(seeds, pairs, strict=False)
    ]
    table = pd.concat(tables, ignore_index=True)
    console.print("digits of scikit-learn", table.groupby("network").mean(numeric_only=True))
    claims += _claims("digits", table, seed)
    if quick:
        return claims
    try:
        clean, robust, x, y = lenet_pair(seed)
    except (MissingExtraError, InputError) as error:
        warnings.warn(f"the claims on the MNIST pair are not measured: {error}", stacklevel=2)
    else:
        table = on_pair(clean, robust, x, y, seed, SOURCES, TARGETS, 200, progress)
        console.print("MNIST", table.groupby("network").mean(numeric_only=True))
        claims += _claims("MNIST LeNet", table, seed)
    try:
        found = on_photographs(progress=progress)
    except MissingExtraError as error:
        warnings.warn(f"the claims on EfficientNet-Lite0 are not measured: {error}", stacklevel=2)
        return claims
    console.print("EfficientNet-Lite0", found)
    name = "EfficientNet-Lite0, four photographs into each other"
    return [
        *claims,
        stated(f"{name}: share of ends whose confidence is less than {P_THRESH:g} below the source's, all", "stays high",
               bootstrap(found["kept_level"], seed=seed), 0.0, bool(np.all(found["kept_level"] == 1))),
        at_most(f"{name}: distance (RMSE) of end and target minus that of source and target", "end looks like the target",
                found["rmse"] - found["rmse_start"], 0.0, 0.0, seed),
        at_least(f"{name}: mean confidence between source and end minus that between source and target",
                 "stays high (star)", found["segment"] - found["straight"], 0.0, 0.0, seed),
    ]  # fmt: skip


def _claims(what: str, table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Claims from rows of `on_pair`; differences between networks are over the sources that both classify right."""
    means: Any = table.groupby(["seed", "index", "network"]).mean(numeric_only=True)
    both = means.unstack("network").dropna()

    def column(name: str, network: str) -> np.ndarray:
        return np.asarray(both[name, network], dtype=float)

    claims = []
    for network in ("clean", "robust"):
        kept = column("kept_level", network)
        name = f"{what}, {network}"
        claims += [
            stated(f"{name}: share of ends whose confidence is less than {P_THRESH:g} below the source's, all",
                   "stays high", bootstrap(kept, seed=seed), float(column("straight_end", network).mean()), bool(kept.min() == 1)),
            at_most(f"{name}: distance (RMSE) of end and target minus that of source and target", "end looks like the target",
                    column("rmse", network) - column("rmse_start", network), 0.0, 0.0, seed),
            at_least(f"{name}: mean confidence between source and end minus that between source and target",
                     "stays high (star)", column("segment", network) - column("straight", network), 0.0, 0.0, seed),
            at_least(f"{name}: mean confidence between source and end minus that on random ways of the same length",
                     "-", column("segment", network) - column("random", network), 0.0, 0.0, seed),
        ]  # fmt: skip
    for name, label, paper in (
        ("rmse", "distance of end and target", "robust .03-.05, normal .01 (from memory)"),
        ("mean", "mean confidence in the triangle", "robust above normal"),
        ("share_0.1", "share of the triangle less than .1 below the source", "robust above normal"),
    ):
        gap = column(name, "robust") - column(name, "clean")
        claims.append(at_least(f"{what}: {label}, robust minus clean", paper, gap, 0.0, 0.0, seed))
    return claims


# ---------------------------------------------------------------- what is measured


def on_plane(seed: int, d: int = 25) -> float:
    """Largest difference, in a pixel, between the end of a walk in a linear network and the formula."""
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.standard_normal(d))
    layer = nn.Linear(d, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([w, torch.zeros(d)]))
    x, goal = (torch.from_numpy(rng.standard_normal(d)) for _ in range(2))
    x, goal = x * torch.sign(x @ w), -goal * torch.sign(goal @ w)  # on either side of the boundary
    walk = LevelSetTraversal(0.1, 60, 1.0, 0.0, 0.0, None, seed, False)
    source, target = (v.float().reshape(1, 1, 5, 5) for v in (x, goal))
    found = walk.traverse(Network(nn.Sequential(nn.Flatten(), layer)), source, target)
    way = goal - x
    expected = x + (1 - 0.9**60) * (way - w * (w @ way) / (w @ w))
    return float((found.images.flatten() - expected).abs().max())


class _Ball(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inside = 2 - x.flatten(1).square().sum(1)
        return torch.stack([inside, torch.zeros_like(inside)], 1)


def on_sphere(seed: int) -> float:
    """Drift off a sphere at steps of .1 over that at steps of .01, without correction."""
    rng = np.random.default_rng(seed)
    source, target = (
        torch.from_numpy(v / np.linalg.norm(v)).float().reshape(1, 1, 2, 5) for v in rng.random((2, 10)) - 0.5
    )
    drift = []
    for step in (0.1, 0.01):
        walk = LevelSetTraversal(step, round(6 / step), 1.0, 0.0, 0.0, None, seed, False)
        drift.append(float(walk.traverse(Network(_Ball()), source, 1.7 * target).images.norm()) - 1)
    return drift[0] / drift[1]


def on_pair(
    clean: Network,
    robust: Network,
    x: Tensor,
    y: Tensor,
    seed: int,
    sources: int,
    targets: int,
    n_iter: int,
    progress: bool,
) -> pd.DataFrame:
    """Walks from sources to targets of other classes in two networks: a row a network, source and pair of ends."""
    rng = np.random.default_rng(seed)
    right = np.ones(len(x), dtype=bool)
    for net in (clean, robust):
        output = net.run(Pass(x)).output
        assert output is not None
        right &= (output.argmax(1) == y).numpy()
    chosen = rng.permutation(np.flatnonzero(right))[:sources]
    goals = [rng.permutation(np.flatnonzero(right & (y != y[i]).numpy()))[:targets] for i in chosen]
    start, label = x[np.repeat(chosen, targets)], y[np.repeat(chosen, targets)]
    goal = x[np.concatenate(goals)]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for name, net in (("clean", clean), ("robust", robust)):
        walk = LevelSetTraversal(n_iter=n_iter, p_thresh=P_THRESH, seed=seed, progress=progress)
        found = walk.traverse(net, start, goal, label)
        way = (found.images - start).flatten(1)
        noise = torch.randn(way.shape, generator=generator)
        noise = (noise / noise.norm(dim=1, keepdim=True) * way.norm(dim=1, keepdim=True)).reshape(start.shape)
        straight = segment(net, start, goal, label)
        measured = {
            "kept_level": (found.confidence[:, -1] > found.p0 - P_THRESH).float(),
            "target_confidence": found.target_confidence,
            "rmse": distances(found.images, goal)["rmse"],
            "rmse_start": distances(start, goal)["rmse"],
            "segment": segment(net, start, found.images, label).mean(1),
            "straight": straight.mean(1),
            "straight_end": straight[:, -1],
            "random": segment(net, start, (start + noise).clamp(0, 1), label).mean(1),
        }
        each = {k: v.reshape(-1, targets).mean(1).numpy() for k, v in measured.items()}
        first, second = torch.triu_indices(targets, targets, 1)
        ends = found.images.reshape(-1, targets, *x.shape[1:])
        a, b = (t.flatten(0, 1) for t in (ends[:, first], ends[:, second]))
        again = np.repeat(chosen, len(first))
        metrics = triangle_metrics(*hull(net, x[again], a, b, y[again]))
        each |= {k: v.reshape(-1, len(first)).mean(1).numpy() for k, v in metrics.items()}
        rows.append(pd.DataFrame({"seed": seed, "network": name, "index": chosen, **each}))
    return pd.concat(rows, ignore_index=True)


def on_photographs(n: int = 4, n_iter: int = 100, progress: bool = False) -> pd.DataFrame:
    """The demo network: the first n photographs that it recognises, each walked towards each of the others."""
    model = load_model("demo")
    data = load_data("demo", model)
    preprocess: Any = model.preprocess
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    assert isinstance(data.inputs, Tensor)
    net = Network(nn.Sequential(_Normalise(mean, std), model.module))
    x, y = (data.inputs * std + mean).clamp(0, 1), data.labels
    assert y is not None
    output = net.run(Pass(x)).output
    assert output is not None
    chosen = (output.argmax(1) == y).nonzero()[:n, 0]
    first, second = (~torch.eye(len(chosen), dtype=torch.bool)).nonzero().unbind(1)
    start, goal, label = x[chosen[first]], x[chosen[second]], y[chosen[first]]
    walk = LevelSetTraversal(step_size=0.03, n_iter=n_iter, p_thresh=P_THRESH, progress=progress)
    found = walk.traverse(net, start, goal, label)
    return pd.DataFrame({
        "source": chosen[first].numpy(), "target": chosen[second].numpy(),
        "kept_level": (found.confidence[:, -1] > found.p0 - P_THRESH).float().numpy(),
        "confidence": found.confidence[:, -1].numpy(), "target_confidence": found.target_confidence.numpy(),
        "rmse": distances(found.images, goal)["rmse"].numpy(), "rmse_start": distances(start, goal)["rmse"].numpy(),
        "segment": segment(net, start, found.images, label).mean(1).numpy(),
        "straight": segment(net, start, goal, label).mean(1).numpy(),
    })  # fmt: skip


class _Normalise(nn.Module):
    """Preprocessing as a part of the network."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


# ---------------------------------------------------------------- networks and data


def digit_pair(seed: int, quick: bool = False) -> tuple[Network, Network, Tensor, Tensor]:
    """A clean and an adversarially trained network for the 8 × 8 digits of scikit-learn, and the digits held out."""
    x, y = small_digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1400], order[1400:]
    nets = [_trained(x[train], y[train], seed, attack, 6 if quick else 30) for attack in (0.0, 0.15)]
    return nets[0], nets[1], x[test], y[test]


def _trained(x: Tensor, y: Tensor, seed: int, attack: float, epochs: int) -> Network:
    """A small network, trained on pictures changed by projected gradient ascent within `attack` (largest change of a pixel)."""

    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip

    def loss_of(module: nn.Sequential, rows: Tensor) -> Tensor:
        shown = x[rows]
        for _ in range(5 if attack else 0):
            shown = shown.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(module(shown), y[rows]), shown)
            shown = (shown.detach() + attack / 3 * g.sign()).clamp(x[rows] - attack, x[rows] + attack).clamp(0, 1)
        return F.cross_entropy(module(shown.detach()), y[rows])

    return Network(fit(make, loss_of, len(x), epochs=epochs, batch=64, rate=3e-3, seed=seed))


def lenet_pair(seed: int = 0) -> tuple[Network, Network, Tensor, Tensor]:
    """The clean and the adversarially trained LeNet, and two MNIST digits of each class."""
    images, labels = mnist_digits()
    g = np.random.default_rng(seed)
    rows = np.concatenate([g.permutation(np.flatnonzero(labels == c))[:2] for c in range(10)])
    clean, robust = (Network(load_lenet(kind)) for kind in ("clean", "robust"))
    return clean, robust, images[rows], torch.from_numpy(labels[rows])
