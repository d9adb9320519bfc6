"""Rao, Böhle, Schiele: Better understanding differences in attribution methods via systematic evaluations (2023).

Measured on small networks trained on the spot on scikit-learn's digits, one for each seed, and, where the ``demo`` extra is
installed, on EfficientNet-Lite0 with photographs. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.attribution import GradCAM, InputXGradient, LayerCAM, Occlusion, RandomScores, Saliency
from nissl.errors import MissingExtraError
from nissl.network import Network
from nissl.runner import Runner
from nissl.seeds import seeded
from nissl.sources.digits import small_digits
from nissl.studies.claims import at_least, stated
from nissl.trust.groundtruth import GroundTruth, Smoothed, ground_truth
from nissl.trust.statistics import bootstrap

ACCURACY = 0.9
PERFECT = 0.95
AHEAD_OF_GRADCAM = 0.25
GRADCAM_FINAL = 0.4
GAIN_BY_SMOOTHING = 0.05
ALIKE = 0.1
CHANCE_WITHIN = 0.02
"""How far the blurred noise may be from chance."""

LAYERS = ("input", "middle", "final")


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One network on digits and few grids, in seconds; no photographs.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over grids, seeds together),
        ``baseline`` (what a map that knows nothing, or no difference, gives) and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(1 if quick else 3)]
    accuracies, found = [], []
    for s in seeds:
        network, x, y, accuracy = trained_on_digits(s, epochs=6 if quick else 12)
        accuracies.append(accuracy)
        found.append(on_digits(network, x, y, n_grids=16 if quick else 34, seed=s, progress=progress))
        console.print(f"digits, seed {s}: {accuracy:.1%} correct", found[-1].summary())
    digits = pd.concat([g.table.assign(seed=s) for g, s in zip(found, seeds, strict=True)])
    claims = [
        at_least("digits: the networks classify unseen digits correctly", "(precondition)", accuracies, ACCURACY, 0.1)
    ]
    claims += list(_difull(digits, "digits", "middle", ("layercam", "ixg"), seed))
    claims += [
        at_least(
            "digits: Grad-CAM at the final layer finds the cell (GridPG)", "high",
            _scores(digits, "gradcam", "gridpg", "final"), GRADCAM_FINAL, 0.25, seed,
        ),
        at_least(
            "digits: Grad-CAM at the final layer minus random scores (GridPG)", "above",
            _scores(digits, "gradcam", "gridpg", "final") - _scores(digits, "random", "gridpg", "final"), 0.0, 0.0, seed,
        ),
    ]  # fmt: skip
    claims += list(_smoothing(digits, "digits", seed))
    if not quick:
        try:
            photographs = on_photographs(seed=seed, progress=progress)
        except MissingExtraError as error:
            warnings.warn(f"the claims on photographs are not measured: {error}", stacklevel=2)
            return claims
        console.print("EfficientNet-Lite0, photographs", photographs.summary())
        table = photographs.table.assign(seed=seed)
        claims += list(_difull(table, "EfficientNet-Lite0", "input", ("layercam", "ixg"), seed))
        final, at_input = _scores(table, "gradcam", "gridpg", "final"), _scores(table, "ixg", "gridpg", "input")
        claims.append(
            at_least("EfficientNet-Lite0: Grad-CAM at the final layer minus IxG at the input (GridPG)", "above",
                   final - at_input, 0.0, 0.0, seed)
        )  # fmt: skip
        # Above the final map this network is linear: there IxG is IntGrad.
        claims.append(_alike("EfficientNet-Lite0: IntGrad and Grad-CAM, both at the final layer (GridPG)",
                             _scores(table, "ixg", "gridpg", "final") - final, seed))  # fmt: skip
        claims += list(_smoothing(table, "EfficientNet-Lite0", seed))
    return claims


# ---------------------------------------------------------------- what is measured


class SmallCNN(nn.Sequential):
    """Three blocks of convolution, batch norm and ReLU, a global pool and a linear layer; no dropout."""

    def __init__(self, n_classes: int = 10) -> None:
        blocks: list[nn.Module] = []
        for a, b in ((1, 16), (16, 32), (32, 64)):
            blocks += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
            blocks += [nn.MaxPool2d(2)] if b < 64 else []
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, n_classes))


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits, enlarged from 8 to 16 pixels a side and standardised; and their classes."""
    x, y = small_digits()
    x = F.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
    return (x - x.mean()) / x.std(), y


def trained_on_digits(seed: int, epochs: int) -> tuple[Network, Tensor, Tensor, float]:
    """A network trained on three quarters of the digits; the others with their classes, and its accuracy on them."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[: 3 * len(x) // 4], order[3 * len(x) // 4 :]
    with seeded(seed):
        model = SmallCNN()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs=epochs, steps_per_epoch=-(-len(train) // 64))
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=generator)].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    return Network(model, name="small CNN"), x[test], y[test], accuracy


def on_digits(network: Network, x: Tensor, y: Tensor, n_grids: int, seed: int, progress: bool = False) -> GroundTruth:
    """All methods at all layers in GridPG and DiFull; smoothing with about half a cell."""
    methods = {
        "saliency": Saliency(), "ixg": InputXGradient(), "s-ixg": Smoothed(InputXGradient(), 9), "gradcam": GradCAM(),
        "layercam": LayerCAM(), "occlusion": Occlusion(window=4), "random": RandomScores(),
        "s-random": Smoothed(RandomScores(), 9),
    }  # fmt: skip
    return ground_truth(
        network, x, y, methods, settings=("gridpg", "difull"), layers=LAYERS, n_grids=n_grids, seed=seed,
        runner=Runner(progress=progress),
    )  # fmt: skip


def on_photographs(n_grids: int = 12, seed: int = 0, progress: bool = False) -> GroundTruth:
    """EfficientNet-Lite0 and the 20 photographs of the demo; smoothing with about half a cell."""
    from nissl.sources.data import load_data
    from nissl.sources.models import load_model

    model = load_model("demo")
    data = load_data("demo", model)
    assert isinstance(data.inputs, Tensor)
    methods = {
        "saliency": Saliency(), "ixg": InputXGradient(), "s-ixg": Smoothed(InputXGradient(), 129), "gradcam": GradCAM(),
        "layercam": LayerCAM(), "random": RandomScores(), "s-random": Smoothed(RandomScores(), 129),
    }  # fmt: skip
    with warnings.catch_warnings():  # few photographs, few very confident: known, and said in the result's notes
        warnings.filterwarnings("ignore", "ground truth: ")
        return ground_truth(
            Network(model.module, name=model.name), data.inputs, data.labels, methods, layers=LAYERS, n_grids=n_grids,
            seed=seed, runner=Runner(progress=progress),
        )  # fmt: skip


# ---------------------------------------------------------------- claims


def _scores(table: pd.DataFrame, method: str, setting: str, layer: str) -> np.ndarray:
    """Scores of one method in order of seed and grid, so that methods are paired."""
    chosen = table[(table["method"] == method) & (table["setting"] == setting) & (table["layer"] == layer)]
    return chosen.pivot_table("score", ["seed", "grid"], aggfunc="mean")["score"].to_numpy()


def _alike(claim: str, difference: np.ndarray, seed: int) -> dict[str, Any]:
    found = bootstrap(difference, seed=seed)
    holds = bool(np.abs([found.low, found.high]).max() <= ALIKE)
    return stated(f"{claim}: difference within ± {ALIKE:g}", "close", found, 0.0, holds)


def _difull(table: pd.DataFrame, where: str, layer: str, methods: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    gradcam = _scores(table, "gradcam", "difull", layer)
    for m in methods:
        values = _scores(table, m, "difull", layer)
        yield at_least(f"{where}: {m} at {layer} stays in the cell (DiFull)", "(nearly) 1", values, PERFECT, 0.25, seed)
        claim = f"{where}: {m} minus Grad-CAM, both at {layer} (DiFull)"
        yield at_least(claim, "clearly above", values - gradcam, AHEAD_OF_GRADCAM, 0.0, seed)


def _smoothing(table: pd.DataFrame, where: str, seed: int) -> Iterator[dict[str, Any]]:
    gain = _scores(table, "s-ixg", "gridpg", "input") - _scores(table, "ixg", "gridpg", "input")
    yield at_least(
        f"{where}: smoothing helps IxG at the input (GridPG), gain", "clearly", gain, GAIN_BY_SMOOTHING, 0.0, seed
    )
    # The honest control: blurring alone must not find anything.
    found = bootstrap(_scores(table, "s-random", "gridpg", "input"), seed=seed)
    holds = bool(abs(found.value - 0.25) <= CHANCE_WITHIN)
    claim = f"{where}: smoothed random scores stay at chance (GridPG), within ± {CHANCE_WITHIN:g}"
    yield stated(claim, "(control)", found, 0.25, holds)
