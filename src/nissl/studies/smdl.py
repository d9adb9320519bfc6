"""Chen et al.: Less is more: fewer interpretable region via submodular subset selection (2024).

Measured on the games of the study of LiMA with plain greedy search; on handwritten digits with a small network and an evidential
twin trained here, where the regions come from an occlusion map and every rival is ranked on the same ones; and, where the demo's
packages are installed, on photographs with EfficientNet-Lite0. Insertion and deletion are part of what the search maximises; the
games, whose answer is planted, are not. The thresholds were written down before the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.attribution.perturbation import RISE, Occlusion
from nissl.attribution.subsets import SMDL, TERMS, Ranking, average_highest_confidence, evidential_loss
from nissl.errors import MissingExtraError
from nissl.network import Network, Pass
from nissl.runner import Asking, Question, Runner, make_questions
from nissl.sources.digits import small_digits
from nissl.studies import lima
from nissl.studies.claims import at_least, at_most, stated
from nissl.studies.training import fit
from nissl.trust.statistics import bootstrap

DELETION_AHEAD = 0.01
HIGHEST = 1.3
"""Times the highest confidence of the true class that the prior map gives, on wrong predictions."""
PHOTOS = 4


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        Few games, few digits and no photographs, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over games or pictures), ``baseline`` and
        ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    method = SMDL(regions=lima.REGIONS, division="grid", consistency=20, collaboration=5, confidence=0.01,
                  effectiveness=0.05, features="embed")  # fmt: skip
    a = pd.concat([lima.on_game(lima.planted(s)[0], method, s) for s in range(seed, seed + (1 if quick else 10))])
    b = pd.concat([lima.on_game(lima.interacting(s), method, s) for s in range(seed, seed + (1 if quick else 20))])
    console.print("planted game", a.groupby("method")[["insertion", "deletion"]].mean())
    console.print("interaction game", b.groupby("method")[["insertion", "deletion"]].mean())
    claims = list(game_claims(a, b, seed))
    small = replace(method, regions=12)
    claims += lima.ratio_claims(small, range(seed, seed + (1 if quick else 20)), seed)
    claims += on_digits(seed, 2 if quick else 20, 4 if quick else 15, progress, console, ablate=not quick)
    if quick:
        return claims
    try:
        net, x, labels = lima.load_photographs()
    except MissingExtraError as error:
        warnings.warn(f"the claims on photographs are not measured: {error}", stacklevel=2)
        return claims
    return claims + on_photographs(net, x, labels, seed, progress, console)


def game_claims(a: pd.DataFrame, b: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    """Claims on the two games."""

    def ahead(table: pd.DataFrame, rival: str, figure: str) -> np.ndarray:
        both = table.pivot_table(figure, "seed", "method")
        return (both["ours"] - both[rival]).to_numpy()

    planted = a.loc[a["method"] == "ours", "insertion"]
    chance = float(a.loc[a["method"] == "occlusion", "insertion"].mean())
    yield at_least("planted game: insertion area", "(best)", planted, lima.PLANTED_INSERTION, chance, seed)
    yield at_least("interaction game: insertion minus that of a linear surrogate", "(ahead)",
                   ahead(b, "linear", "insertion"), lima.AHEAD_OF_LINEAR, 0.0, seed)  # fmt: skip
    yield at_least("interaction game: insertion minus that of occlusion", "(ahead)", ahead(b, "occlusion", "insertion"),
                   lima.AHEAD_OF_OCCLUSION, 0.0, seed)  # fmt: skip
    yield at_most("interaction game: deletion minus that of a linear surrogate", "(ahead)", ahead(b, "linear", "deletion"),
                  -DELETION_AHEAD, 0.0, seed)  # fmt: skip


# ---------------------------------------------------------------- digits


def digit_network() -> nn.Sequential:
    """A small convolutional network for 8 × 8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(x: Tensor, y: Tensor, evidential: bool, seed: int, epochs: int) -> nn.Sequential:
    """`digit_network` trained with cross-entropy or with `evidential_loss`."""

    def loss_of(module: nn.Sequential, rows: Tensor) -> Tensor:
        output = module(x[rows])
        return (evidential_loss(output, y[rows]) if evidential else F.cross_entropy(output, y[rows])).mean()

    return fit(digit_network, loss_of, len(x), epochs=epochs, batch=32, rate=2e-3, seed=seed).requires_grad_(False)


def on_digits(
    seed: int, each: int, epochs: int, progress: bool, console: Console, ablate: bool = True
) -> list[dict[str, Any]]:
    """SMDL with its four terms against its prior map, chance, RISE at equal passes and F of single regions.

    Pictures are those of scikit-learn, 8 × 8; 300 are learnt from, so that some of the rest are misread.
    """
    x, y = small_digits()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    x, y = x[order], y[order]
    net, twin = (Network(train(x[:300], y[:300], e, seed, epochs)) for e in (False, True))
    x, y = x[300:], y[300:]
    predicted = _classes(net, x)
    console.print(f"digits: {float((predicted == y).float().mean()):.1%} of {len(y)} read, "
                  f"twin {float((_classes(twin, x) == y).float().mean()):.1%}")  # fmt: skip
    right, wrong = (torch.nonzero((predicted == y) == same)[:each, 0] for same in (True, False))
    method = SMDL(cells=4, regions=16, evidence=twin, prior=Occlusion(window=2))
    table = {"right": on_same_regions(method, net, x[right], y[right], seed, progress)}
    table["wrong"] = on_same_regions(method, net, x[wrong], y[wrong], seed, progress)
    console.print("digits read", _areas(table["right"]), "digits misread", _areas(table["wrong"]))
    for term in TERMS if ablate else ():
        without = replace(method, **{term: 0.0})
        r = without.rankings(net, x[right], y[right], runner=Runner(memory=0, progress=False))
        console.print(f"without {term}:", _areas({"ours": r}))
    claims = list(same_region_claims("digits", table["right"], seed))
    high = {k: np.array([r.highest()[0] for r in found]) for k, found in table["wrong"].items()}
    mean = {k: float(average_highest_confidence(found)[0][-1]) for k, found in table["wrong"].items()}
    times = mean["ours"] / mean["prior"]
    claims.append(stated(f"digits misread: highest confidence of the true class, times the prior map's, at least {HIGHEST:g}",
                         "1.81", times, 1.0, times >= HIGHEST))  # fmt: skip
    claims.append(at_least("digits misread: highest confidence minus that of RISE", "(above)", high["ours"] - high["rise"],
                           0.0, 0.0, seed))  # fmt: skip
    return claims


def on_same_regions(
    method: SMDL, net: Network, x: Tensor, y: Any, seed: int, progress: bool
) -> dict[str, list[Ranking]]:
    """Rankings of SMDL, its prior, chance, RISE at equal passes and F of single regions, all on SMDL's regions."""
    runner = Runner(memory=0, progress=progress)
    ours = method.rankings(net, x, y, runner=runner)
    passes = round(runner.cost(method.name).forward / len(x))
    rise = RISE(n_masks=passes, cells=method.cells).attribute(
        net, x, y, seed=seed, runner=Runner(memory=0, progress=progress)
    )
    rng = np.random.default_rng(seed)
    orders = {
        "prior": [list(range(r.regions.n)) for r in ours],  # regions are numbered in the order of the prior
        "random": [rng.permutation(r.regions.n).tolist() for r in ours],
        "rise": lima.by_region(rise, ours),
        "single": by_single_regions(method, net, x, y, Runner(memory=0, progress=progress)),
    }
    quiet = Runner(memory=0, progress=progress)
    return {"ours": ours, **{k: method.rankings(net, x, y, orders=o, runner=quiet) for k, o in orders.items()}}


def by_single_regions(method: SMDL, net: Network, x: Tensor, y: Any, runner: Runner) -> list[list[int]]:
    """Orders of the regions by F of each alone: the search without its later steps."""

    def ask(q: Question) -> Asking[list[int]]:
        f = yield from method.set_function(q)
        v = yield from f.evaluate(np.eye(f.m, dtype=bool))
        return [int(i) for i in np.argsort(-v.total, kind="stable")]

    return runner.collect(net, [partial(ask, q) for q in make_questions(net, x, y)], "single regions", "single")


def same_region_claims(what: str, table: dict[str, list[Ranking]], seed: int) -> Iterator[dict[str, Any]]:
    """Insertion and deletion against the rivals on the same regions."""
    for rival in [k for k in table if k != "ours"]:
        for figure, sign, said in (("insertion", 1, "+2.5 %"), ("deletion", -1, "+4.9 %")):
            ours, theirs = (np.array([getattr(r, f"{figure}_area") for r in table[k]]) for k in ("ours", rival))
            found = bootstrap(sign * (ours - theirs), seed=seed)
            yield stated(f"{what}: mean {figure}, how far {'above' if sign > 0 else 'below'} that of {rival}",
                         said if rival == "prior" else "(ahead)", found, 0.0, bool(found.value >= 0))  # fmt: skip


def _areas(table: dict[str, list[Ranking]]) -> pd.DataFrame:
    return pd.DataFrame({
        k: {"insertion": np.mean([r.insertion_area for r in found]), "deletion": np.mean([r.deletion_area for r in found]),
            "highest": np.mean([r.highest()[0] for r in found])}
        for k, found in table.items()
    }).T  # fmt: skip


def _classes(net: Network, x: Tensor) -> Tensor:
    found = []
    for few in x.split(256):
        output = net.run(Pass(few)).output
        assert output is not None
        found.append(output.argmax(1))
    return torch.cat(found)


# ---------------------------------------------------------------- photographs


def on_photographs(
    net: Network, x: Tensor, labels: np.ndarray, seed: int, progress: bool, console: Console
) -> list[dict[str, Any]]:
    """SMDL with the confidence of the entropy on photographs, 7 × 7 cells, two a region."""
    predicted = np.concatenate([_classes(net, few).numpy() for few in x.split(4)])
    right = np.flatnonzero(predicted == labels)[:PHOTOS]
    method = SMDL(cells=7, regions=25, effectiveness=0.05, prior=Occlusion(windows=49))
    table = on_same_regions(method, net, x[right], labels[right], seed, progress)
    console.print(f"{len(right)} photographs", _areas(table))
    return list(same_region_claims("photographs", table, seed))
