"""Fel et al.: CRAFT, Concept recursive activation factorization for explainability (2023).

Measured on planted activations and planted pictures, whose truth is known; on Fashion-MNIST with a small network that is
trained here, where Debian's package dataset-fashion-mnist is installed; and on the twenty photographs of the demo network. The
thresholds below were written down before the first run.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor, nn

from nissl.attribution import Saliency
from nissl.concepts.craft import Craft
from nissl.concepts.sobol import sobol_design, total_indices
from nissl.errors import MissingExtraError
from nissl.network import Network
from nissl.sources import load_data, load_model
from nissl.sources.fashion import fashion_mnist
from nissl.studies.claims import at_least, at_most, stated
from nissl.studies.snmf import matched
from nissl.studies.training import fit
from nissl.trust.statistics import bootstrap

COSINE = 0.98
LEAST_COSINE = 0.95
AHEAD_OF_KMEANS = 0.08
AHEAD_OF_PCA = 0.2
UNUSED = 0.03
ERRORS = {32: 0.1, 512: 0.03}
"""Largest error of the estimator by number of points."""
GLYPH_MASS = 0.6
RECONSTRUCTION = 0.5
STABLE = 0.8
RANDOM_ORDERS = 20


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One seed of planted data, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over seeds or images), ``baseline`` and
        ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(1 if quick else 5)]
    table = pd.DataFrame([on_planted(s) for s in seeds])
    console.print("planted concepts", table)
    nmf, kmeans, pca = (table[k].to_numpy() for k in ("nmf", "kmeans", "pca"))
    claims = [
        at_least("planted concepts: mean cosine with those found", "-", nmf, COSINE, float(kmeans.mean()), seed),
        stated(f"planted concepts: least cosine, at least {LEAST_COSINE:g}", "-", bootstrap(table["least"]), 0.0,
               bool(np.all(table["least"] >= LEAST_COSINE))),
        at_least("planted concepts: cosine minus that of k-means", "-", nmf - kmeans, AHEAD_OF_KMEANS, 0.0, seed),
        at_least("planted concepts: cosine minus that of PCA", "-", nmf - pca, AHEAD_OF_PCA, 0.0, seed),
        stated("planted importance: the three concepts that are used rank first, share of seeds, all", "-",
               bootstrap(table["first"]), 1 / 20, bool(table["first"].all())),
        stated(f"planted importance: largest index of an unused concept, at most {UNUSED:g}", "0",
               bootstrap(table["unused"]), None, bool((table["unused"] <= UNUSED).all())),
        stated("planted importance: sign of the concept that lowers the output is negative, share of seeds, all", "-",
               bootstrap(table["negative"]), 0.5, bool(table["negative"].all())),
        *_estimator(seeds, console),
    ]  # fmt: skip
    glyphs = pd.concat([on_glyphs(s, 240 if quick else 600, 20 if quick else 120) for s in seeds], ignore_index=True)
    console.print("planted pictures", glyphs)
    mass = np.asarray(glyphs["mass"]).reshape(len(seeds), 4).min(1)
    claims += [
        stated(f"planted pictures: share of a concept's map on its glyph, least of four glyphs, at least {GLYPH_MASS:g}",
               "maps show concepts", bootstrap(mass), float(np.mean(glyphs["area"])), bool((mass >= GLYPH_MASS).all())),
        at_least("planted pictures: share of a saliency map of the coefficient on the glyph", "maps show concepts",
                 glyphs["saliency"], 0.0, float(np.mean(glyphs["area"])), seed),
    ]  # fmt: skip
    claims += _faithful("planted pictures", glyphs, seed)
    if quick:
        return claims
    for what, measure in (("Fashion-MNIST", _on_fashion), ("EfficientNet-Lite0", _on_photographs)):
        try:
            claims += measure(seed, progress, console)
        except MissingExtraError as error:
            warnings.warn(f"the claims on {what} are not measured: {error}", stacklevel=2)
    return claims


def _estimator(seeds: list[int], console: Console) -> list[dict[str, Any]]:
    table = pd.concat([on_estimator(s) for s in seeds], ignore_index=True)
    console.print("largest errors of total indices", table.groupby(["points", "n"]).max(numeric_only=True))
    claims = []
    for n, most in ERRORS.items():
        sobol, random = (
            np.asarray(table.loc[(table["points"] == points) & (table["n"] == n), "error"])
            for points in ("sobol", "random")
        )
        claim = f"total indices: largest error with {n} scrambled Sobol points, at most {most:g}"
        claims.append(stated(claim, "-", bootstrap(sobol), float(random.mean()), bool((sobol <= most).all())))
    return claims


def _faithful(what: str, table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Claims about rows with the columns deletion, insertion (Sobol minus random) and those minus TCAV, and stability."""
    fits = table.drop_duplicates(["seed", "class"])
    return [
        at_most(f"{what}: concept deletion, area in Sobol order minus that of {RANDOM_ORDERS} random orders, logits",
                "more faithful", fits["deletion"], 0.0, 0.0, seed),
        at_least(f"{what}: concept insertion, the same", "more faithful", fits["insertion"], 0.0, 0.0, seed),
        at_most(f"{what}: concept deletion, area in Sobol order minus that in TCAV order, logits",
                "more faithful than TCAV", fits["deletion_tcav"], 0.0, 0.0, seed),
        at_least(f"{what}: concept insertion, the same", "more faithful than TCAV", fits["insertion_tcav"], 0.0, 0.0, seed),
        stated(f"{what}: relative error of the factorisation, below {RECONSTRUCTION:g} in every fit", "-",
               bootstrap(fits["error"]), 1.0, bool((fits["error"] < RECONSTRUCTION).all())),
        at_least(f"{what}: cosine of the concepts of two fits", "-", fits["stability"], STABLE, 0.0, seed),
    ]  # fmt: skip


# ---------------------------------------------------------------- what is measured


def on_planted(seed: int) -> dict[str, float]:
    """Planted concepts found by CRAFT, k-means and PCA, and the importance of those that a linear head uses."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    a, concepts, head = planted(seed)
    net = _linear(concepts, head)
    images = torch.from_numpy(a)[:, :, None, None]
    craft = Craft("0", len(concepts), patch_size=1, random_state=seed, progress=False).fit(net, images)
    cosine = matched(concepts, craft.components_)
    a = a.astype(np.float64)
    means: Any = KMeans(len(concepts), n_init=3, random_state=seed).fit(a)  # pyright: ignore[reportArgumentType]
    rivals = {
        "kmeans": matched(concepts, means.cluster_centers_),
        "pca": matched(concepts, np.asarray(PCA(len(concepts)).fit(a).components_), signed=False),
    }
    found = craft.importances(images[:60], 0)
    index = matched(concepts, craft.components_, index=True)
    mean, sign = found.mean.numpy()[index], found.sign.numpy()[index]
    return {
        "seed": seed, "nmf": float(cosine.mean()), "least": float(cosine.min()),
        **{name: float(c.mean()) for name, c in rivals.items()},
        "first": float(mean[:3].min() > mean[3:].max()), "unused": float(mean[3:].max()), "negative": float(sign[2] < 0),
    }  # fmt: skip


def on_estimator(seed: int) -> pd.DataFrame:
    """Largest error of the total indices of two functions whose indices are known, by points and their number."""
    weights = torch.tensor([4, 3, 2, 1, 0.5, 0.2, 0.1, 0, 0, 0])
    linear = weights.square() / weights.square().sum()
    functions = [
        (3, lambda m: m[..., 0] * m[..., 1] + m[..., 2], torch.tensor([4 / 19, 4 / 19, 12 / 19])),
        (10, lambda m: m @ weights.double(), linear),
    ]
    rows = []
    for points in ("sobol", "halton", "random"):
        for n in ERRORS:
            error = max(
                float((total_indices(f(sobol_design(r, n, points, seed))) - true).abs().max())
                for r, f, true in functions
            )
            rows.append({"seed": seed, "points": points, "n": n, "error": error})
    return pd.DataFrame(rows)


def on_glyphs(seed: int, n: int = 600, per_class: int = 120) -> pd.DataFrame:
    """Pictures whose classes are pairs of glyphs: where the concepts of a trained network lie, and their order.

    Returns
    -------
    DataFrame
        A row a glyph; the columns on orders are those of the seed.
    """
    x, y, where = glyph_pictures(n, seed)
    net = _trained(x, y, 4, seed, epochs=12)
    x, y, where = glyph_pictures(4 * per_class, seed + 1000)
    craft = Craft("5", 6, patch_size=12, overlap=0.5, random_state=seed, progress=False).fit(net, x)
    some = slice(0, 40)
    maps = craft.maps(x[some], None).to_numpy()
    share = _share(maps, where[some].numpy())
    best = share.argmax(1)
    slopes = craft.attribute(x[some], Saliency(), sorted(set(best.tolist())))
    faithful = _orders(craft, x[some], y[some], 6, seed)
    again = Craft("5", 6, patch_size=12, overlap=0.5, random_state=seed + 1, progress=False).fit(net, x)
    rows = []
    for g, j in enumerate(best):
        own = _share(slopes.sel(concept=[j]).to_numpy().sum(2), where[some].numpy())[g, 0]
        rows.append({"seed": seed, "class": 0, "glyph": g, "concept": int(j), "mass": share[g, j], "saliency": own,
                     "area": float(where[some, g][where[some, g].any((1, 2))].float().mean()), **faithful,
                     "error": craft.reconstruction_error_, "stability": _stability(craft, again)})  # fmt: skip
    return pd.DataFrame(rows)


def _share(maps: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Share of the mass of each concept's map that lies on each glyph, over the pictures that hold it: (glyphs, concepts)."""
    held = where.any((2, 3)).astype(float)
    on = np.einsum("njyx,ngyx->gj", maps, where.astype(float))
    return on / np.maximum(np.einsum("njyx,ng->gj", maps, held), 1e-30)


def _orders(craft: Craft, x: Tensor, y: Any, r: int, seed: int) -> dict[str, float]:
    """Areas of concept deletion and insertion in Sobol order, minus those of random orders and of the TCAV order."""
    rng = np.random.default_rng(seed)
    score, slope = craft.tcav(x, y)
    orders = {
        "sobol": craft.importances(x, y).order,
        "tcav": torch.from_numpy(np.lexsort((-slope.numpy(), -score.numpy()))),
        **{f"random {i}": torch.from_numpy(rng.permutation(r)) for i in range(RANDOM_ORDERS)},
    }
    curves = craft.curves(x, orders, y)
    found: dict[str, float] = {}
    for kind in ("deletion", "insertion"):
        area = {name: float(getattr(c, f"{kind}_area").mean()) for name, c in curves.items()}
        chance = float(np.mean([a for name, a in area.items() if name.startswith("random")]))
        found |= {kind: area["sobol"] - chance, f"{kind}_tcav": area["sobol"] - area["tcav"]}
    return found


def _stability(a: Craft, b: Craft) -> float:
    return float(matched(a.components_, b.components_).mean())


def _on_fashion(seed: int, progress: bool, console: Console) -> list[dict[str, Any]]:
    table = on_fashion(seed, progress)
    console.print("Fashion-MNIST", table)
    return _faithful("Fashion-MNIST, sneaker, bag and shirt", table, seed)


def on_fashion(seed: int, progress: bool = False, classes: tuple[int, ...] = (7, 8, 6)) -> pd.DataFrame:
    """Orders of concepts of classes of Fashion-MNIST, in a small network trained on 12,000 pictures."""
    x, y = fashion_pictures("train", 12_000)
    net = _trained(x, y, 10, seed, epochs=4)
    x, y = fashion_pictures("test", 10_000)
    rows = []
    for c in classes:
        images = x[y == c][:300]
        fits = [
            Craft("5", 6, patch_size=12, random_state=seed + i, progress=progress).fit(net, images, target=c)
            for i in range(2)
        ]
        rows.append({"seed": seed, "class": c, **_orders(fits[0], images[:60], c, 6, seed),
                     "error": fits[0].reconstruction_error_, "stability": _stability(*fits)})  # fmt: skip
    return pd.DataFrame(rows)


def _on_photographs(seed: int, progress: bool, console: Console) -> list[dict[str, Any]]:
    """The demo network: twenty photographs of as many classes are too few for concepts of a class, so that orders only."""
    model = load_model("demo")
    data = load_data("demo", model)
    net = Network(model.module)
    assert isinstance(data.inputs, Tensor)
    craft = Craft("_swish#2", 10, patch_size=64, random_state=seed, progress=progress).fit(net, data.inputs)
    found = _orders(craft, data.inputs, None, 10, seed)
    console.print("EfficientNet-Lite0", {**found, "error": craft.reconstruction_error_})
    return [
        stated(
            f"EfficientNet-Lite0, 20 photographs of 20 classes: {kind} of concepts, area in one Sobol order for all minus "
            f"that of {RANDOM_ORDERS} random orders, logits",
            "more faithful", found[kind], 0.0, better * found[kind] > 0,
        )
        for kind, better in (("deletion", -1), ("insertion", 1))
    ]  # fmt: skip


# ---------------------------------------------------------------- networks and data


def planted(
    seed: int, n: int = 600, d: int = 64, r: int = 6, noise: float = 0.05
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nonnegative activations (n, d) of known concepts (r, d), and the weight of each for an output (r,)."""
    rng = np.random.default_rng(seed)
    concepts = rng.uniform(0.5, 1.5, (r, d)) * (rng.random((r, d)) < 0.25)
    use = rng.exponential(size=(n, r)) * (rng.random((n, r)) < 0.35)
    a = (use @ concepts + noise * rng.standard_normal((n, d))).clip(0)
    return a.astype(np.float32), concepts, np.array([3, 1.5, -1] + [0] * (r - 3), dtype=float)


def _linear(concepts: np.ndarray, weights: np.ndarray) -> Network:
    """A network whose output is the weighted use of the concepts; its first site holds the activations themselves."""
    head = nn.Linear(concepts.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight[0] = torch.from_numpy(np.linalg.pinv(concepts) @ weights)
    return Network(nn.Sequential(nn.ReLU(), nn.Flatten(), head))


def glyph_pictures(n: int, seed: int, side: int = 32, size: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Grey pictures with two glyphs each, a plus, a ring, bars or a block; a class is a pair, and pairs share glyphs.

    Returns
    -------
    images : Tensor (n, 1, side, side)
    classes : Tensor (n,)
        Pairs (0, 1), (1, 2), (2, 3), (3, 0).
    where : Tensor of bool (n, 4, side, side)
        The square that holds each glyph.
    """
    rng = np.random.default_rng(seed)
    p = np.arange(size) - size // 2
    far = np.maximum(np.abs(p[:, None]), np.abs(p))
    glyphs = np.stack([
        (np.abs(p[:, None]) <= 1) | (np.abs(p) <= 1),
        (far >= 3) & (far <= 4),
        np.broadcast_to((p[:, None] % 3) == 0, (size, size)),
        far <= 3,
    ]).astype(np.float32)  # fmt: skip
    x = 0.1 * rng.standard_normal((n, side, side)).astype(np.float32)
    classes = np.arange(n) % 4
    where = np.zeros((n, 4, side, side), dtype=bool)
    half = side // 2
    for i, c in enumerate(classes):
        # one in the left half and one in the right, so that they never meet
        for g, left in zip(rng.permutation([c, (c + 1) % 4]), (0, half), strict=True):
            top, start = rng.integers(0, side - size + 1), left + rng.integers(0, half - size + 1)
            x[i, top : top + size, start : start + size] += glyphs[g]
            where[i, g, top : top + size, start : start + size] = True
    return torch.from_numpy(x)[:, None], torch.from_numpy(classes), torch.from_numpy(where)


def _trained(x: Tensor, y: Tensor, n_classes: int, seed: int, epochs: int) -> Network:
    """A small convolutional network trained on pictures; the site "5" is its last activation with positions."""

    def make() -> nn.Sequential:
        widths = (x.shape[1], 16, 32, 48)
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, stride=1 if a == widths[0] else 2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], n_classes))

    def loss_of(module: nn.Sequential, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(x[rows]), y[rows])

    return Network(fit(make, loss_of, len(x), epochs=epochs, batch=40, rate=3e-3, seed=seed))


def fashion_pictures(part: Literal["train", "test"], n: int) -> tuple[Tensor, Tensor]:
    """The first n pictures (n, 1, 28, 28) in [0, 1] of Fashion-MNIST, and their classes."""
    images, labels = fashion_mnist(part)
    return torch.from_numpy(images[:n, None] / np.float32(255)), torch.from_numpy(labels[:n])


def plot_estimator(table: pd.DataFrame, ax: Any = None) -> Any:
    """Picture of the largest error of total indices by kind and number of points, from rows of `on_estimator`."""
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(5, 3), layout="constrained")
    for points, colour in (("random", "#7f7f7f"), ("halton", "#d55e00"), ("sobol", "#0072b2")):
        of = table[table["points"] == points]
        ax.loglog(
            list(ERRORS),
            [np.mean(of.loc[of["n"] == n, "error"]) for n in ERRORS],
            "o-",
            color=colour,
            label=points,
            base=2,
        )
    ax.set_xlabel("points")
    ax.set_ylabel("largest error of a total index")
    ax.legend(frameon=False)
    return ax
