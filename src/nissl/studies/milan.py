"""Hernandez et al.: Natural language descriptions of deep visual features (2022).

The annotations that people wrote, and the captioner trained on them, are not at hand. So descriptions are measured where the truth is
known: units planted in scenes of coloured shapes, with sentences of a small grammar, some of them generic; and a network of
handwritten digits with a mark in the corner that gives the class away. Exemplars are measured on EfficientNet-Lite0, where its
packages are installed. The thresholds below were written down before the first run. Sizes were cut for time after two quick
runs, and how many units are switched off is chosen on validation pictures since a fixed ten lost 1.6 points.
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
from torch.nn import functional as F

from nissl.concepts.descriptions import Descriptions, LabelDescriber, Milan, Words, masked_features
from nissl.concepts.exemplars import Exemplars, find_exemplars
from nissl.errors import MissingExtraError
from nissl.network import Network
from nissl.sources.digits import small_digits
from nissl.studies.claims import at_least, at_most, stated
from nissl.studies.training import fit
from nissl.trust.statistics import bootstrap

MATCH = 0.70
AHEAD = 0.15
SHUFFLED = 0.2
GAIN = 0.05
LOSS = 0.02
COVERED = (0.008, 0.012)
GENERIC = ("shapes", "objects")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "disc", "cross")
TEXTURES = ("plain", "striped", "dotted")
RGB = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.15, 0.2, 0.95], [0.9, 0.85, 0.1]])
SIDE = 32


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One seed, smaller models and no photographs, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over seeds), ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(1 if quick else 3)]
    crossings = [stated(f"closed form: lambda at which the more specific sentence wins, {k} exemplars", f"{truth:.4f}", found,
                        None, abs(found - truth) <= 1e-3) for k, found, truth in on_lambda()]  # fmt: skip
    planted = pd.DataFrame([on_planted(s, quick, progress) for s in seeds])
    console.print("planted units: share of held-out units whose description is right", planted)
    edits = pd.concat([on_marked_digits(s, quick) for s in seeds], ignore_index=True)
    console.print(
        "accuracy without the units that name the mark", edits.pivot_table("accuracy", ["test", "n"], "method")
    )
    claims = [*crossings, *_on_planted(planted, seed), *_on_edits(edits, seed)]
    if quick:
        return claims
    try:
        claims += on_photographs(progress)
    except MissingExtraError as error:
        warnings.warn(f"the claims on EfficientNet-Lite0 are not measured: {error}", stacklevel=2)
    return claims


# ---------------------------------------------------------------- lambda


class World:
    """Three sentences that name sets of things; `k` exemplars are drawn from such a set. Captioner and prior of `Milan`.

    With `k` None it is the prior alone.
    """

    words = Words.of(["animal dog poodle"])
    tokens = torch.tensor([[4, 2], [5, 2], [6, 2]])

    def __init__(self, k: int | None = None) -> None:
        prior = torch.tensor([0.60, 0.05, 0.01]).log()
        self.given = prior if k is None else prior - k * torch.tensor([12.0, 4.0, 2.0]).log()

    def beam(self, features: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]:
        """All three, for every unit."""
        return self.tokens.expand(len(features), -1, -1), self.given.expand(len(features), -1)

    def log_p(self, *given: Tensor) -> Tensor:
        """Log-probability of the sentences, the last that is given."""
        return self.given[given[-1][..., 0] - 4]


def on_lambda() -> list[tuple[int, float, float]]:
    """(k, lambda found by bisection, lambda in closed form) at which "animal" loses against a more specific word."""
    module = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    nn.init.ones_(module[0].weight)  # pyright: ignore[reportArgumentType]
    network = Network(module)
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    exemplars = find_exemplars(network, images, "0", k=2, progress=False)
    found = []
    for k in (1, 2):
        low, high = 0.0, 1.0
        while high - low > 1e-4:
            middle = (low + high) / 2
            milan = Milan(network, ["0"], weight=middle, captioner=World(k), prior=World(), progress=False)
            low, high = (middle, high) if milan.describe(exemplars)[0].text == "animal" else (low, middle)
        # (1 - lambda) log(.60 / .05) = k log(12 / 4)
        found.append((k, high, 1 - k * math.log(3) / math.log(12)))
    return found


# ---------------------------------------------------------------- planted units


def scenes(n: int, seed: int, objects: int | None = None) -> tuple[Tensor, Tensor]:
    """Scenes of one or two textured, coloured shapes on noise.

    Returns
    -------
    images : Tensor (n, 4, 32, 32)
        Red, green, blue, and what only the planted units read: inside each object, 1 + 9 colour + 3 shape + texture plus a
        fraction that is the object's own.
    labels : Tensor of bool (n, 10)
        Colours, shapes and textures that are there.
    """
    rng = np.random.default_rng(seed)
    images = torch.zeros(n, 4, SIDE, SIDE)
    images[:, :3] = torch.from_numpy(rng.uniform(0.35, 0.65, (n, 3, SIDE, SIDE))).float()
    labels = torch.zeros(n, 10, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for i in range(n):
        n_objects = objects or int(rng.integers(1, 3))
        kinds = [tuple(int(v) for v in rng.integers((4, 3, 3))) for _ in range(n_objects)]
        right = int(rng.integers(2))
        for j, (colour, shape, texture) in enumerate(kinds):
            r = int(rng.integers(5, 7))
            cx = (8 if (j + right) % 2 == 0 else 24) + int(rng.integers(-1, 2))
            cy = int(rng.integers(7, SIDE - 7))
            dx, dy = (x - cx).abs(), (y - cy).abs()
            inside = (
                (dx <= r - 1) & (dy <= r - 1),
                dx.square() + dy.square() <= r * r,
                ((dx <= 1) & (dy <= r)) | ((dy <= 1) & (dx <= r)),
            )[shape]
            drawn = inside & (torch.ones_like(inside), (y % 4) < 2, ((x % 3) > 0) | ((y % 3) > 0))[texture]
            images[i, :3] = torch.where(drawn, RGB[colour][:, None, None], images[i, :3])
            images[i, :3] = torch.where(inside & ~drawn, torch.tensor(0.0), images[i, :3])
            images[i, 3] = torch.where(inside, 1 + 9 * colour + 3 * shape + texture + 0.9 * rng.random(), images[i, 3])
            labels[i, [colour, 4 + shape, 7 + texture]] = True
    return images, labels


def concepts() -> list[tuple[int | None, int | None, int | None]]:
    """What planted units respond to, as (colour, shape, texture): one of the ten, or a colour and a shape."""
    single: list[tuple[int | None, int | None, int | None]] = [(c, None, None) for c in range(4)]
    single += [(None, s, None) for s in range(3)]
    single += [(None, None, t) for t in range(3)]
    return [*single, *((c, s, None) for c in range(4) for s in range(3))]


def sentence(concept: tuple[int | None, int | None, int | None], rng: np.random.Generator) -> str:
    """A sentence of the grammar; in 15 of 100 cases one that says nothing."""
    if rng.random() < 0.15:
        return str(rng.choice(GENERIC))
    return _plainly(concept, int(rng.integers(2)))


def _plainly(concept: tuple[int | None, int | None, int | None], form: int = 0) -> str:
    colour, shape, texture = concept
    words = [COLOURS[colour]] if colour is not None else []
    words += [TEXTURES[texture]] if texture is not None else []
    noun = f"{SHAPES[shape]}es" if shape is not None and SHAPES[shape] == "cross" else None
    noun = noun or (f"{SHAPES[shape]}s" if shape is not None else ("things", "areas")[form])
    return " ".join([*words, noun])


def meant(text: str) -> tuple[int | None, int | None, int | None]:
    """The concept that a sentence names; (None, None, None) for a generic one."""
    words = text.replace("crosses", "cross").split()
    found = []
    for names in (COLOURS, SHAPES, TEXTURES):
        here = [i for i, name in enumerate(names) if name in words or f"{name}s" in words]
        found.append(here[0] if len(here) == 1 else None)
    return found[0], found[1], found[2]


class Planted(nn.Module):
    """Units that respond to the objects of their concept, each to some kinds of them more than to others.

    Their maps are the object's outline at half the resolution, blurred. They read the fourth channel of `scenes` only.
    """

    gain: Tensor
    turn: Tensor

    def __init__(self, wanted: list[tuple[int | None, int | None, int | None]], seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        gain = torch.zeros(len(wanted), 37)
        for u, (colour, shape, texture) in enumerate(wanted):
            for c in range(4):
                for s in range(3):
                    for t in range(3):
                        fits = colour in (None, c) and shape in (None, s) and texture in (None, t)
                        gain[u, 1 + 9 * c + 3 * s + t] = float(fits)
        self.register_buffer("gain", gain * (0.7 + 0.6 * torch.rand(gain.shape, generator=g)))
        self.register_buffer("turn", 40 * torch.rand(len(wanted), generator=g))
        self.units = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Largest activation of each unit."""
        code = x[:, 3, ::2, ::2]
        kind = code.floor().long().clamp(0, 36)
        own = 1 + 0.3 * torch.cos(self.turn[:, None, None] * (code - kind)[:, None])
        maps = self.gain[:, kind].transpose(0, 1) * own
        return self.units(F.avg_pool2d(maps, 3, 1, 1)).amax((2, 3))


class SceneEncoder(nn.Module):
    """A small classifier of what a scene holds; it sees the colours only."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.two = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(32, 48, 3, padding=2, dilation=2), nn.ReLU())
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten labels."""
        return self.head(self.three(self.two(self.one(x[:, :3]))).amax((2, 3)))


def trained_encoder(seed: int, n: int, epochs: int) -> tuple[Network, float]:
    """The encoder, and the share of labels that it gets right on scenes it has not seen."""
    x, y = scenes(n, seed=10_000 + seed)

    def loss_of(module: SceneEncoder, rows: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(module(x[rows]), y[rows].float())

    model = fit(SceneEncoder, loss_of, n, epochs=epochs, batch=32, rate=3e-3, decay=0.01, seed=seed)
    test, truth = scenes(200, seed=20_000 + seed)
    with torch.no_grad():
        right = float(((model(test) > 0) == truth).float().mean())
    return Network(model), right


def on_planted(seed: int, quick: bool = False, progress: bool = False) -> dict[str, float]:
    """Share of held-out planted units whose description names their concept exactly, and of baselines."""
    rng = np.random.default_rng(seed)
    n_train, n_test = (88, 22) if quick else (440, 100)
    kinds = concepts()
    wanted = [kinds[i % len(kinds)] for i in range(n_train)] + [
        kinds[int(i)] for i in rng.integers(len(kinds), size=n_test)
    ]
    images, _ = scenes(150 if quick else 400, seed)
    units = find_exemplars(Network(Planted(wanted, seed)), images, "units", k=5, batch=4, progress=progress)
    encoder, right = trained_encoder(seed, 300 if quick else 1500, 6 if quick else 20)
    texts = [[sentence(c, rng) for _ in range(3)] for c in wanted[:n_train]]
    train, test, truth = units[:n_train], units[n_train:], wanted[n_train:]
    sites = ("one", "two", "three")
    settings: dict[str, Any] = {
        "hidden": 96, "embedding": 32, "dropout": 0.3, "epochs": 15 if quick else 40, "seed": seed, "rate": 3e-3,
        "patience": 8, "length": 5, "beam": 20, "progress": progress,
    }  # fmt: skip

    def share(said: Descriptions) -> float:
        return float(np.mean([meant(d.text) == c for d, c in zip(said, truth, strict=True)]))

    def generic(said: Descriptions) -> float:
        return float(np.mean([d.text in GENERIC for d in said]))

    milan = Milan(encoder, sites, **settings).fit(train, texts)
    likely = Milan(encoder, sites, weight=0.0, captioner=milan.captioner_, prior=milan.prior_, **settings)
    said, plain = milan.describe(test), likely.describe(test)
    # descriptions of other units' exemplars
    shuffled = milan.describe(test[rng.permutation(len(test)).tolist()])
    blind = Milan(encoder, sites, masked=False, **settings).fit(train, texts)
    counted = [t for unit in texts for t in unit]
    common = meant(max(set(counted), key=counted.count))
    return {
        "seed": seed,
        "match": share(said),
        "likelihood": share(plain),
        "frequent": float(np.mean([common == c for c in truth])),
        "shuffled": share(shuffled),
        "without masks": share(blind.describe(test)),
        "nearest": _nearest(train, test, texts, encoder, sites, truth),
        "generic": generic(said),
        "generic, likelihood": generic(plain),
        "encoder": right,
    }


def _nearest(train: Exemplars, test: Exemplars, texts: Any, encoder: Network, sites: Any, truth: Any) -> float:
    """The first sentence of the training unit with the most similar mean feature: a describer without a decoder."""
    known, new = (masked_features(e, encoder, sites).mean(1) for e in (train, test))
    mean, scale = known.mean(0), known.std(0).clamp(min=1e-6)
    nearest = torch.cdist((new - mean) / scale, (known - mean) / scale).argmin(1)
    return float(np.mean([meant(texts[int(i)][0]) == c for i, c in zip(nearest, truth, strict=True)]))


# ---------------------------------------------------------------- editing


class Digits(nn.Module):
    """A small network of 16 × 16 digits; the units that are described are those of `maps`."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.maps = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ten classes."""
        return self.head(self.maps(self.one(x)))


def marked(x: Tensor, classes: Tensor) -> Tensor:
    """Digits (n, 1, 16, 16) with a mark in the upper left corner that stands for a class: four pixels in binary."""
    bits = ((classes[:, None] >> torch.arange(4)) & 1).float().reshape(-1, 2, 2)
    new = x.clone()
    new[:, 0, :4, :4] = bits.repeat_interleave(2, 1).repeat_interleave(2, 2) * 2 - 1
    return new


def on_marked_digits(seed: int, quick: bool = False) -> pd.DataFrame:
    """`Descriptions.edit` on a network whose training digits bear, half of them, the mark of their class.

    In the adversarial sets every digit bears the mark of a class drawn at random.
    """
    small, y = small_digits()
    x = F.interpolate(small, size=(16, 16), mode="bilinear")
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    train, valid, test = order[: 600 if quick else 1000], order[1000:1300], order[1300:]
    shown = x[train].clone()
    shown[::2] = marked(shown[::2], y[train][::2])

    def loss_of(module: Digits, rows: Tensor) -> Tensor:
        return F.cross_entropy(module(shown[rows]), y[train][rows])

    epochs = 5 if quick else 12
    model = fit(Digits, loss_of, len(shown), epochs=epochs, batch=50, rate=3e-3, decay=0.01, seed=seed)
    network = Network(model)
    units = find_exemplars(network, shown, "maps", batch=64, progress=False)
    labels = torch.zeros(len(shown), 3, 16, 16, dtype=torch.bool)
    labels[::2, 0, :4, :4] = True
    labels[:, 1] = (shown[:, 0] > 0.4) & ~labels[:, 0]
    labels[:, 2] = ~labels[:, 0] & ~labels[:, 1]
    said = LabelDescriber().describe(units, shown, labels, ["mark", "stroke", "background"])

    def adversarial(rows: Tensor) -> tuple[Tensor, Tensor]:
        return marked(x[rows], torch.randint(10, (len(rows),), generator=g)), y[rows]

    ordering = adversarial(valid)
    tests = {"validation": ordering, "adversarial": adversarial(test), "clean": (x[test], y[test])}
    table = said.edit("mark", ordering, tests, most=10, draws=2 if quick else 5, seed=seed)
    return table.assign(seed=seed, named=len(said.search("mark")))


# ---------------------------------------------------------------- photographs


def on_photographs(progress: bool = False) -> list[dict[str, Any]]:
    """Exemplars of EfficientNet-Lite0: thresholds and top images against all activations at once."""
    from nissl.network import Pass
    from nissl.sources import load_data, load_model

    loaded = load_model("demo")
    data = load_data("demo", loaded)
    assert isinstance(data.inputs, Tensor)
    network = Network(loaded.module)
    sites = [
        s.address for s in network.sites(inputs=data.inputs[:1]) if s.role == "conv" and s.shape and s.shape[1] >= 14
    ]
    sites = sites[:: max(1, len(sites) // 6)][:6]
    found = find_exemplars(network, data.inputs, sites, k=5, batch=4, progress=progress)
    covered, same = [], []
    for number, site in enumerate(sites):
        rows = torch.nonzero(found.site == number)[:, 0]
        maps = torch.cat([network.run(Pass(b, read=[site], output=False)).reads[site] for b in data.inputs.split(4)])
        share = (maps > found.threshold[rows, None, None]).float().mean((0, 2, 3))
        covered += share[found.fires[rows]].tolist()
        best = maps.amax((2, 3)).T.sort(dim=1, descending=True).values[:, :5]
        same += torch.isclose(best, found.activations[rows], rtol=1e-3, atol=1e-4).all(1).tolist()
    inside = float(np.mean((np.array(covered) >= COVERED[0]) & (np.array(covered) <= COVERED[1])))
    return [
        stated("EfficientNet-Lite0: share of units whose masks cover 0.8 to 1.2 % of all places, at least .95", "1 %",
               inside, None, inside >= 0.95),
        stated("EfficientNet-Lite0: share of units whose five largest activations are those of brute force", "all",
               float(np.mean(same)), None, all(same)),
    ]  # fmt: skip


# ---------------------------------------------------------------- claims


def _on_planted(table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    match = table["match"].to_numpy()
    paper = "sentences agree with people"
    return [
        at_least("planted: held-out units described exactly", paper, match, MATCH, table["frequent"].to_numpy().mean().item(), seed),
        at_least("planted: minus the most frequent sentence", paper, match - table["frequent"], AHEAD, 0.0, seed),
        at_most("planted: described exactly with other units' exemplars", "-", table["shuffled"], SHUFFLED, 1.0, seed),
        at_least("planted: minus the same without masks", "(masks matter)", match - table["without masks"], AHEAD,
                 0.0, seed),
        at_least("planted: generic sentences by likelihood minus with lambda .2", "(fewer)",
                 table["generic, likelihood"] - table["generic"], 0.0, 0.0, seed),
        at_least("planted: minus the sentence of the most similar unit", "-", match - table["nearest"], 0.0, 0.0, seed),
    ]  # fmt: skip


def _on_edits(table: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Accuracy with as many units switched off as is best on the validation set, less that with none."""
    gains: dict[tuple[str, str], list[float]] = {}
    beaten = []
    for _, one in table.groupby("seed"):
        found: dict[tuple[str, str], list[float]] = {}
        for key, line in one.groupby(["method", "draw"]):
            method = str(key[0])  # pyright: ignore[reportIndexIssue]
            curve = line.pivot_table("accuracy", "n", "test")
            best = int(np.argmax(curve["validation"].to_numpy()))
            for test in ("adversarial", "clean"):
                values = curve[test].to_numpy()
                found.setdefault((test, method), []).append(float(values[best] - values[0]))
        for key, values in found.items():
            gains.setdefault(key, []).append(float(np.mean(values)))
        random = found["adversarial", "random"]
        beaten.append(found["adversarial", "word"][0] - (np.mean(random) + 2 * np.std(random, ddof=1)))
    paper = "deleting text neurons raises accuracy"
    baseline = float(np.mean(gains["adversarial", "random"]))
    return [
        at_least("editing: gain in accuracy on misleading marks, number chosen on others", paper, gains["adversarial", "word"], GAIN, baseline, seed),
        at_most("editing: loss of accuracy on clean digits", "-", -np.array(gains["clean", "word"]), LOSS, 1.0, seed),
        stated("editing: gain minus that of random units (mean + 2 sd of 5 draws), above 0 for every seed", "above",
               bootstrap(beaten), 0.0, bool(min(beaten) > 0)),
        at_least("editing: gain minus that of all units sorted the same way", "(not compared)",
                 np.array(gains["adversarial", "word"]) - np.array(gains["adversarial", "all units"]), 0.0, 0.0, seed),
    ]  # fmt: skip


def plot_planted(table: pd.DataFrame, ax: Any = None) -> Any:
    """Picture of the share of planted units that describers get right: a dot a seed, from rows of `on_planted`."""
    import matplotlib.pyplot as plt

    names = {"match": "MILAN, lambda .2", "likelihood": "likelihood", "nearest": "most similar unit",
             "without masks": "without masks", "shuffled": "other exemplars", "frequent": "most frequent"}  # fmt: skip
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
    for row, key in enumerate(names):
        ax.plot(table[key], [row] * len(table), "o", color="#0072b2" if key == "match" else "#7f7f7f", alpha=0.7)
    ax.set_yticks(range(len(names)), list(names.values()))
    ax.invert_yaxis()
    ax.axvline(MATCH, color="#d55e00", linestyle="--", linewidth=1)
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel("units described exactly")
    return ax
