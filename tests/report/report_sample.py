"""A result with structure, of every kind of input, as an audit would hand it to the report."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from nissl.trust.statistics import bootstrap

TITLES = {
    "ig": "Integrated gradients",
    "gradcam": "Grad-CAM",
    "rise": "RISE",
    "lrp": "LRP-ε",
    "smoothgrad": "SmoothGrad",
    "relp": "RelP",
    "craft": "CRAFT",
    "lima": "LiMA",
    "guided": "Guided back-propagation",
    "saliency": "Saliency",
    "edge": "Edge detector",
    "random": "Random map",
}
INFO: dict[str, dict[str, Any]] = {
    "faithfulness": {
        "check": "faithfulness", "title": "Faithfulness", "better": "higher", "chance": 0.0, "ceiling": None,
        "help": "Area under the insertion curve minus that under the deletion curve.",
    },
    "randomisation_similarity": {
        "check": "sanity", "title": "Randomised weights", "better": "lower", "chance": None, "ceiling": 1.0,
        "help": "Rank correlation of the map with that of a network with random weights.",
    },
    "gridpg": {
        "check": "ground_truth", "title": "GridPG", "better": "higher", "chance": 0.25, "ceiling": 1.0,
        "help": "Share of positive attribution in the cell that shows the class.",
    },
    "max_sensitivity": {
        "check": "stability", "title": "Sensitivity", "better": "lower", "chance": None, "ceiling": None,
        "help": "Largest relative change of the map under small noise.",
    },
}  # fmt: skip
TEXT = "The staining of <b>nerve</b> cells made single neurons visible , which nobody had seen before ."
TOKENS = TEXT.split()


@dataclass
class Result:
    table: pd.DataFrame
    figures: pd.DataFrame
    figure_info: dict[str, dict[str, Any]]
    curves: pd.DataFrame
    scores: dict[str, xr.DataArray]
    inputs: Any
    input_kind: str
    examples: pd.DataFrame
    agreement: dict[str, pd.DataFrame]
    pictures: list[dict[str, Any]] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


def sample(
    kind: str = "image", n: int = 6, methods: int = 4, seed: int = 0, photos: Any = None, sides: Any = None
) -> Result:
    """An audit of `methods` methods, the best first, on n examples; the last two are the baselines."""
    rng = np.random.default_rng(seed)
    keys = [*list(TITLES)[: methods - 2], "edge", "random"]
    skill = np.concatenate([np.linspace(0.75, 0.15, methods - 2), [0.1, 0.0]])
    level = {
        "faithfulness": 0.6 * skill,
        "randomisation_similarity": np.where(np.array(keys) == "edge", 1.0, 0.75 - 0.8 * skill),
        "gridpg": 0.25 + 0.7 * skill,
        "max_sensitivity": 1.3 - skill,
    }
    values = {f: v[:, None] + 0.06 * rng.standard_normal((methods, n)) for f, v in level.items()}
    values["max_sensitivity"][1] = np.nan
    figures = pd.DataFrame(
        [(k, INFO[f]["check"], f, i, values[f][j, i]) for f in INFO for j, k in enumerate(keys) for i in range(n)],
        columns=["method", "check", "figure", "example", "value"],
    )
    verdict = np.select(
        [skill > 0.55, skill > 0.35, skill > 0.14], ["believe", "with care", "undecided"], "do not believe"
    )
    reasons = {
        "believe": [],
        "with care": ["max_sensitivity: the upper end of the interval of its mean is 1.12, above 1"],
        "undecided": ["faithfulness against edge: 6 examples cannot reach significance among 20 tests; 9 are needed"],
        "do not believe": ["faithfulness: not above edge (difference 0.00, p = 1)", "gridpg: not above chance, 0.25"],
    }
    table = pd.DataFrame(
        {"title": [TITLES[k] for k in keys], "verdict": verdict, "reasons": [reasons[v] for v in verdict]},
        index=pd.Index(keys, name="method"),
    )
    for f, v in values.items():
        interval = bootstrap(v)
        table[f], table[f"{f}_low"], table[f"{f}_high"] = interval.value, interval.low, interval.high
    table["faithfulness_p"] = np.where(skill > 0.3, 0.0004, 0.3)
    table["forward"] = (np.array([n, *(rng.integers(2, 400, methods - 1) * n)])).astype(int)
    table["backward"] = table["forward"] * rng.integers(0, 2, methods)
    table["seconds"] = table["forward"] * 0.013

    x = np.linspace(0, 1, 21)
    curves = pd.concat(
        pd.DataFrame({"method": k, "check": check, "example": i, "x": x, "y": np.clip(y + noise, 0, 1)})
        for j, k in enumerate(keys)
        for i in range(n)
        for noise in [0.05 * rng.standard_normal(21)]
        for check, y in (("insertion", x ** (1 - skill[j])), ("deletion", (1 - x) ** (1 + 5 * skill[j])))
    ).reset_index(drop=True)
    inputs, scores = _maps(kind, keys, skill, n, rng, photos, sides)
    labels = ["red fox", "espresso", "tabby", "lighthouse", "horse", "rocket"]
    examples = pd.DataFrame(
        {
            "name": [f"example {i}" for i in range(n)],
            "label": [labels[i % 6] for i in range(n)],
            "predicted": [labels[(i + (i % 5 == 4)) % 6] for i in range(n)],
            "probability": rng.uniform(0.4, 1, n).round(3),
        }
    )
    close = np.clip(np.outer(skill, skill) ** 0.5, 0, 1) * rng.uniform(0.5, 1, (methods, methods))
    close = np.triu(close, 1) + np.triu(close, 1).T + np.eye(methods)
    close[-1, :-1] = close[:-1, -1] = -0.02
    agreement = {m: pd.DataFrame(close**p * np.sign(close), keys, keys) for m, p in (("spearman", 1), ("top-k", 3))}
    yy, xx = np.mgrid[0:96, 0:96] / 96
    pictures = [
        {
            "method": k, "check": "ground_truth", "title": f"{TITLES[k]}, {part}", "caption": "mean of the maps",
            "image": skill[j] * np.exp(-20 * ((yy - 0.25) ** 2 + (xx - 0.25) ** 2)) + 0.05 * rng.normal(size=(96, 96)),
        }
        for j, k in enumerate(keys) for part in ("best", "median", "worst")
    ]  # fmt: skip
    meta = {
        "model": "EfficientNet-Lite0", "data": "six photographs", "seed": seed,
        "fingerprint": "9f2c41d07ab3", "n_examples": n,
        "budget": 2000, "started": "2026-01-05 10:12", "seconds": 312.4,
        "versions": {"nissl": "0.1.0", "torch": "2.6.0"},
        "command": "nissl audit --model demo --data photos/ --out runs/demo",
    }  # fmt: skip
    return Result(table, figures, INFO, curves, scores, inputs, kind, examples, agreement, pictures, meta)


def _maps(
    kind: str, keys: list[str], skill: np.ndarray, n: int, rng: np.random.Generator, photos: Any, sides: Any
) -> Any:
    """Inputs with a planted place that matters, and maps that find it as well as each method's skill."""
    if kind == "image":
        side = 64
        if photos is None:
            yy, xx = np.mgrid[0:side, 0:side]
            centre = rng.integers(20, side - 20, (n, 2))
            distance = (yy - centre[:, 0, None, None]) ** 2 + (xx - centre[:, 1, None, None]) ** 2
            photos = (np.exp(-distance / 150)[..., None] * [230, 180, 90] + 20).astype(np.uint8)
        bright = np.stack([p[..., :3].mean(-1) for p in photos]).astype(float)
        scores = {}
        for j, k in enumerate(keys):
            size = (sides or {}).get(k, bright.shape[1])
            step = bright.shape[1] // size
            signal = bright[:, : size * step, : size * step].reshape(n, size, step, size, step).mean((2, 4))
            signal = (signal - signal.mean((1, 2), keepdims=True)) / signal.std((1, 2), keepdims=True)
            noise = rng.standard_normal(signal.shape)
            values = skill[j] * signal + (1 - skill[j]) * 0.6 * noise
            if k == "edge":
                gy, gx = np.gradient(signal, axis=(1, 2))
                values = np.hypot(gy, gx)
            if k in ("gradcam", "rise"):
                values = np.maximum(values, 0)
            scores[k] = xr.DataArray(values, dims=("example", "y", "x"), name=k)
        first = keys[0]
        scores[first] = scores[first].expand_dims(channel=3).transpose("example", "channel", "y", "x") / 3
        return photos, scores
    if kind == "token":
        inputs = [TOKENS[: 8 + i] for i in range(n)]
        shape, dims = (n, len(TOKENS)), ("example", "token")
    elif kind == "feature":
        inputs, dims = rng.standard_normal((n, 20)), ("example", "feature")
        shape = inputs.shape
    else:
        time = np.linspace(0, 1, 200)
        inputs = np.sin(2 * np.pi * (8 * time + rng.uniform(size=(n, 8, 1)))) + 0.4 * rng.standard_normal((n, 8, 200))
        shape, dims = inputs.shape, ("example", "channel", "time")
    truth = np.zeros(shape)
    truth[..., 3 : 3 + max(2, shape[-1] // 5)] = 1
    made = {k: s * truth + (1 - s) * 0.5 * rng.standard_normal(shape) for k, s in zip(keys, skill, strict=True)}
    return inputs, {k: xr.DataArray(v, dims=dims, name=k) for k, v in made.items()}
