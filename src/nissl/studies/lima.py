"""Chen et al.: Less is more: efficient black-box attribution via minimal interpretable subset selection (2025).

Measured on games whose answer is known (36 regions that are there or not), on the number of passes and the time, and, where the
demo's packages are installed, on photographs with EfficientNet-Lite0: about 25 superpixels, all methods ranked on the same
ones. Insertion and deletion are part of what the search maximises; sensitivity-n is not. The thresholds were written down before
the first run. The photographs are shown at 128 pixels, which the network bears, to keep the study within minutes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console
from torch import Tensor, nn

from nissl.attribution.cams import GradCAM
from nissl.attribution.hsic import HSIC
from nissl.attribution.masking import positions_only
from nissl.attribution.perturbation import RISE, Occlusion
from nissl.attribution.shapley import LIME
from nissl.attribution.subsets import LiMA, Ranking, average_highest_confidence
from nissl.errors import MissingExtraError
from nissl.network import Network, Pass, target
from nissl.runner import Runner
from nissl.seeds import seeded
from nissl.sources import load_data, load_model
from nissl.studies.claims import at_least, at_most, stated
from nissl.trust.faithfulness import Subsets
from nissl.trust.statistics import bootstrap

REGIONS = 36
PLANTED_INSERTION = 0.945
FROM_GREEDY = 0.005
PASSES = 0.72
AHEAD_OF_LINEAR = 0.01
AHEAD_OF_OCCLUSION = 0.02
FROM_GREEDY_B = 0.01
RATIO, LOWEST_RATIO = 0.95, 0.632
FEWER = {49: 1.5, 64: 1.6}
"""How many times fewer passes than greedy search, by number of regions."""
SLOTS = 0.9
PHOTOS, WRONG, SIZE = 8, 2, 128


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        Few games and no photographs, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over games or photographs), ``baseline`` and
        ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    lima = LiMA(regions=REGIONS)
    a = pd.concat([on_game(planted(s)[0], lima, s) for s in range(seed, seed + (1 if quick else 10))])
    b = pd.concat([on_game(interacting(s), lima, s) for s in range(seed, seed + (1 if quick else 20))])
    console.print("planted game", a.groupby("method")[["insertion", "deletion", "passes"]].mean())
    console.print("interaction game", b.groupby("method")[["insertion", "deletion", "passes"]].mean())
    placed = np.array([well_placed(s, lima) for s in range(seed, seed + (1 if quick else 10))])
    claims = [*planted_claims(a, placed, seed), *interaction_claims(b, seed)]
    claims += ratio_claims(LiMA(regions=12, pending=4), range(seed, seed + (1 if quick else 20)), seed)
    claims += pass_claims(quick)
    if quick:
        return claims
    try:
        photographs = load_photographs()
    except MissingExtraError as error:
        warnings.warn(f"the claims on photographs are not measured: {error}", stacklevel=2)
        return claims
    return claims + on_photographs(*photographs, seed, progress, console)


# ---------------------------------------------------------------- games


class Game(nn.Module):
    """Logits of three classes as a function of which regions are there, (n, m) of 0 and 1."""

    def __init__(self, first: Any, weights: Tensor, bias: Tensor, embedding: Tensor) -> None:
        super().__init__()
        self.first = first
        self.other = nn.Linear(weights.shape[1], 2).requires_grad_(False)
        self.other.weight.copy_(weights)
        self.other.bias.copy_(bias)
        self.embed = nn.Linear(weights.shape[1], len(embedding), bias=False).requires_grad_(False)
        self.embed.weight.copy_(embedding)

    def forward(self, s: Tensor) -> Tensor:  # noqa: D102
        # the features of regions have no part in the answer, but can be read
        unused = 0 * self.embed(s).sum(1, keepdim=True)
        return torch.cat([self.first(s)[:, None], self.other(s)], 1) + unused


def planted(seed: int, m: int = REGIONS) -> tuple[Game, np.ndarray]:
    """Four strong regions, one of two, both of two for class 0; three that mislead to class 1; a little noise.

    Returns
    -------
    game : Game
    places : ndarray (11,)
        The regions, in that order.
    """
    rng = np.random.default_rng(seed)
    places = rng.permutation(m)[:11]
    own, other = rng.normal(0, 0.05, m), rng.normal(0, 0.05, (2, m))
    own[places[:4]] += (2.5, 2.0, 1.5, 1.0)
    other[0, places[8:]] += (2.5, 2.0, 1.5)
    weights = torch.from_numpy(own).float()
    either, both = places[4:6].tolist(), places[6:8].tolist()

    def first(s: Tensor) -> Tensor:
        return s @ weights - 3 + 2 * s[:, either].amax(1) + 2 * s[:, both].prod(1)

    return Game(first, _float(other), torch.zeros(2), _float(rng.normal(size=(16, m)))), places


def interacting(seed: int, m: int = REGIONS) -> Game:
    """Class 0 by single regions and random pairs, class 1 by single regions; all logits but the third are 0 when all are there."""
    rng = np.random.default_rng(seed)
    w, other = rng.normal(0, 0.5, m), rng.normal(0, 0.5, m)
    pairs = np.triu(rng.normal(size=(m, m)) * (rng.random((m, m)) < 4 / m), 1)
    single, joint, whole = _float(w), _float(pairs), float(w.sum() + pairs.sum())

    def first(s: Tensor) -> Tensor:
        return s @ single + ((s @ joint) * s).sum(1) - whole

    weights = np.stack([other, np.zeros(m)])
    return Game(first, _float(weights), torch.tensor([-other.sum(), -2.0]).float(), _float(rng.normal(size=(16, m))))


def _float(a: np.ndarray) -> Tensor:
    return torch.from_numpy(a).float()


def on_game(game: Game, method: LiMA, seed: int) -> pd.DataFrame:
    """Insertion and deletion of a method, greedy search, occlusion, a linear surrogate at equal passes and chance."""
    m = game.other.in_features
    net, x = Network(game), torch.ones(1, m)
    greedy = replace(method, search="greedy")
    linear = LIME(n_samples=method.cost(m), kernel_width=1e6, alpha=1e-3)
    rows = []
    for name, ranked in (("ours", method), ("greedy", greedy)):
        runner = Runner(progress=False)
        r = ranked.rankings(net, x, 0, runner=runner)[0]
        rows.append((name, r.insertion_area, r.deletion_area, runner.cost(ranked.name).forward))
    runner = Runner(progress=False)
    maps = runner.attribute({"occlusion": Occlusion(), "linear": linear}, net, x, target.probability(0), seed=seed)
    orders = {k: np.argsort(-v.values[0], kind="stable") for k, v in maps.items()}
    orders["random"] = np.random.default_rng((seed, 1)).permutation(m)  # the game is made from seed itself
    for name, order in orders.items():
        r = LiMA(regions=m).rankings(net, x, 0, orders=[order.tolist()], runner=Runner(progress=False))[0]
        rows.append((name, r.insertion_area, r.deletion_area, runner.cost(name).forward))
    return pd.DataFrame(rows, columns=["method", "insertion", "deletion", "passes"]).assign(seed=seed)


def well_placed(seed: int, method: LiMA) -> tuple[bool, bool]:
    """Whether the strong regions and one of two come first in the planted game, and the misleading ones last."""
    game, places = planted(seed)
    order = method.rankings(Network(game), torch.ones(1, REGIONS), 0, runner=Runner(progress=False))[0].order
    first, last = set(order[:8].tolist()), set(order[-3:].tolist())
    strong, either, misleading = (set(places[s].tolist()) for s in (slice(0, 4), slice(4, 6), slice(8, 11)))
    return strong <= first and bool(either & first), len(misleading & last) >= 2


def _column(table: pd.DataFrame, method: str, figure: str) -> np.ndarray:
    return table.loc[table["method"] == method, figure].to_numpy()


def planted_claims(a: pd.DataFrame, placed: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Claims on the planted game."""
    ours, greedy = _column(a, "ours", "insertion"), _column(a, "greedy", "insertion")
    apart = bootstrap(ours - greedy, seed=seed)
    share = _column(a, "ours", "passes") / _column(a, "greedy", "passes")
    return [
        at_least("planted game: insertion area", "(best)", ours, PLANTED_INSERTION,
                 float(_column(a, "occlusion", "insertion").mean()), seed),
        stated(f"planted game: insertion minus that of greedy search, at most {FROM_GREEDY:g} away", "(comparable)", apart, 0.0,
               abs(float(apart.value)) <= FROM_GREEDY),
        at_most("passes as a share of greedy search, 36 regions", "1.42 times fewer", share, PASSES, 1.0, seed),
        stated("planted game: share of games with the strong regions first", "(finds them)", float(placed[:, 0].mean()),
               None, bool(placed[:, 0].all())),
        stated("planted game: share of games with the misleading regions last", "(finds them)", float(placed[:, 1].mean()),
               None, bool(placed[:, 1].all())),
    ]  # fmt: skip


def interaction_claims(b: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Claims on the interaction game."""
    ours = {f: _column(b, "ours", f) for f in ("insertion", "deletion")}
    apart = bootstrap(ours["insertion"] - _column(b, "greedy", "insertion"), seed=seed)
    return [
        at_least("interaction game: insertion minus that of a linear surrogate", "(ahead)",
                 ours["insertion"] - _column(b, "linear", "insertion"), AHEAD_OF_LINEAR, 0.0, seed),
        at_least("interaction game: insertion minus that of occlusion", "(ahead)",
                 ours["insertion"] - _column(b, "occlusion", "insertion"), AHEAD_OF_OCCLUSION, 0.0, seed),
        at_most("interaction game: deletion minus that of a linear surrogate", "(ahead)",
                ours["deletion"] - _column(b, "linear", "deletion"), 0.0, 0.0, seed),
        stated(f"interaction game: insertion minus that of greedy search, at most {FROM_GREEDY_B:g} away", "(comparable)",
               apart, 0.0, abs(float(apart.value)) <= FROM_GREEDY_B),
    ]  # fmt: skip


def ratio_claims(method: LiMA, seeds: Sequence[int], seed: int) -> list[dict[str, Any]]:
    """F of the first 1 to 4 of 12 regions as a share of the exhaustive optimum; no bound is promised."""
    quiet = Runner(progress=False)
    ratios = np.array(
        [method.ratios(Network(interacting(s, 12)), torch.ones(1, 12), 0, runner=quiet)[0] for s in seeds]
    )
    return [
        at_least("F of the first 1 to 4 of 12 regions, share of the optimum", "1 - 1/e (if submodular)", ratios.mean(1),
                 RATIO, 0.0, seed),
        stated(f"the lowest of these shares, at least {LOWEST_RATIO:g}", "1 - 1/e (if submodular)", float(ratios.min()),
               None, bool(ratios.min() >= LOWEST_RATIO)),
    ]  # fmt: skip


# ---------------------------------------------------------------- passes and time


def pass_claims(quick: bool) -> list[dict[str, Any]]:
    """How many times fewer passes than greedy search and, on a convolutional network, how much less time; batch slots used."""
    with seeded(0):
        width, side = (4, 12) if quick else (24, 24)
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        net = Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10)))
        x = torch.rand(2, 3, side, side)
    claims = []
    for m, times in list(FEWER.items())[: 1 if quick else None]:
        spent: dict[str, int] = {}
        used, seconds = 0.0, {"greedy": np.inf, "bidirectional": np.inf}
        for search in list(seconds) * (1 if quick else 3):  # the shortest time of three is the least disturbed
            runner = Runner(batch_size=16, memory=0, progress=False, tune=False)
            method = LiMA(regions=m, division="grid", search=search)  # pyright: ignore[reportArgumentType]
            start = time.process_time()
            scores = method.attribute(net, x, 0, runner=runner)
            seconds[search] = min(seconds[search], time.process_time() - start)
            spent[search], used = scores.attrs["forward_passes"], runner.slots[0] / runner.slots[1]
        fewer, faster = (d["greedy"] / d["bidirectional"] for d in (spent, seconds))
        claims.append(stated(f"{m} regions: times fewer passes than greedy search, at least {times:g}", f"{times:g}", fewer,
                             1.0, fewer >= times))  # fmt: skip
        if not quick:
            # the formula is exact, a clock is not
            claims.append(stated(f"{m} regions: times less processor time, at least 0.9 of that", "1.6", faster, 1.0,
                                 faster >= 0.9 * times))  # fmt: skip
        claims.append(
            stated(f"{m} regions: share of batch slots used, at least {SLOTS:g}", "-", used, None, used >= SLOTS)
        )
    return claims


# ---------------------------------------------------------------- photographs


def load_photographs(size: int = SIZE) -> tuple[Network, Tensor, np.ndarray]:
    """The demo network, its photographs and their classes; `MissingExtraError` without the demo's packages."""
    model = load_model("demo")
    data = load_data("demo", model, size=size)
    assert isinstance(data.inputs, Tensor)
    assert data.labels is not None
    return Network(model.module), data.inputs, data.labels.numpy()


def by_region(scores: xr.DataArray, rankings: Sequence[Ranking]) -> list[list[int]]:
    """Orders of the regions of rankings by the mean score of each."""
    orders = []
    for s, r in zip(scores.values, rankings, strict=True):
        labels = positions_only(r.regions.labels, r.regions.dims)[0].cpu().numpy().ravel()
        mean = np.bincount(labels, s.ravel(), r.regions.n) / np.bincount(labels, minlength=r.regions.n)
        orders.append([int(i) for i in np.argsort(-mean, kind="stable")])
    return orders


def painted(rankings: Sequence[Ranking]) -> xr.DataArray:
    """Maps of m minus position, so that all methods are judged by their orders alone."""
    maps = [positions_only(r.regions.spread(r.values()), r.regions.dims)[0].cpu().numpy() for r in rankings]
    return xr.DataArray(np.stack(maps), dims=("example", "y", "x"))


def on_photographs(
    net: Network, x: Tensor, labels: np.ndarray, seed: int, progress: bool, console: Console
) -> list[dict[str, Any]]:
    """LiMA against RISE, HSIC (both at equal passes) and Grad-CAM on the same superpixels."""
    predicted = np.concatenate([_output(net, few).argmax(1).numpy() for few in x.split(4)])
    right, wrong = (np.flatnonzero((predicted == labels) == same)[:n] for same, n in ((True, PHOTOS), (False, WRONG)))
    lima, runner = LiMA(regions=25, division="superpixels"), Runner(memory=0, progress=progress)
    start = time.process_time()
    ours = lima.rankings(net, x[right], labels[right], runner=runner)
    seconds, used = time.process_time() - start, runner.slots[0] / runner.slots[1]
    passes = round(runner.cost("lima").forward / len(right))
    rivals: dict[str, Any] = {
        "rise": RISE(n_masks=passes),
        "hsic": HSIC(n_masks=passes, regions=25, division="superpixels"),
        "gradcam": GradCAM(),
    }
    maps = Runner(memory=0, progress=progress).attribute(rivals, net, x[right], labels[right], seed=seed)
    ranked = {"lima": ours}
    for name, scores in maps.items():
        orders = by_region(scores, ours)
        ranked[name] = lima.rankings(
            net, x[right], labels[right], orders=orders, runner=Runner(memory=0, progress=progress)
        )
    shared = Runner(progress=progress)  # all methods are judged by the same random sets
    check = Subsets(baseline="zero")
    table = pd.concat([
        pd.DataFrame({
            "method": name,
            "insertion": [r.insertion_area for r in found],
            "deletion": [r.deletion_area for r in found],
            "sensitivity_n": check.evaluate(net, x[right], painted(found), labels[right], seed=seed, runner=shared)[
                "sensitivity_n"
            ],
        })
        for name, found in ranked.items()
    ])  # fmt: skip
    console.print(f"{len(right)} photographs, {passes} passes each, {seconds:.0f} s", table.groupby("method").mean())
    claims = [stated(f"photographs: share of batch slots used, at least {SLOTS:g}", "-", used, None, used >= SLOTS)]
    for rival in rivals:
        for figure, sign in (("insertion", 1), ("deletion", -1), ("sensitivity_n", 1)):
            ahead = sign * (_column(table, "lima", figure) - _column(table, rival, figure))
            found = bootstrap(ahead, seed=seed)
            paper = {"insertion": "+36 % on average", "deletion": "+40 % on average"}.get(
                figure, "(not part of the search)"
            )
            how = "above" if sign > 0 else "below"
            claims.append(stated(f"photographs: mean {figure}, how far {how} that of {rival}", paper, found, 0.0,
                                 bool(found.value >= 0)))  # fmt: skip
    return claims + wrong_claims(net, x[wrong], labels[wrong], passes, seed, progress)


def wrong_claims(
    net: Network, x: Tensor, labels: np.ndarray, passes: int, seed: int, progress: bool
) -> list[dict[str, Any]]:
    """Highest probability of the true class on part of a photograph that is not recognised, against RISE."""
    if not len(x):
        return []
    lima = LiMA(regions=25, division="superpixels")
    ours = lima.rankings(net, x, labels, runner=Runner(memory=0, progress=progress))
    rise = RISE(n_masks=passes).attribute(net, x, labels, seed=seed, runner=Runner(memory=0, progress=progress))
    orders = by_region(rise, ours)
    theirs = lima.rankings(net, x, labels, orders=orders, runner=Runner(memory=0, progress=progress))
    whole = float(np.mean([r.insertion[-1] for r in ours]))
    high, low = (float(average_highest_confidence(r)[0][-1]) for r in (ours, theirs))
    return [
        stated(f"{len(x)} photographs not recognised: average highest confidence of the true class, above RISE",
               "+86 %", high, low, high > low),
        stated("and above that of the whole photograph", "-", high, whole, high > whole),
    ]  # fmt: skip


def _output(net: Network, x: Tensor) -> Tensor:
    output = net.run(Pass(x)).output
    assert output is not None
    return output
