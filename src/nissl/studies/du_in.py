"""Zheng et al.: Du-IN: discrete units-guided mask modeling for decoding speech from intracranial neural signals (2024).

The paper's recordings of twelve patients are not public. Measured on trials written in four planted units whose order tells the
class, and on packaged EEG with labels. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from rich.console import Console
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import normalized_mutual_info_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from nissl.errors import MissingExtraError
from nissl.recordings.decoders import BandPower
from nissl.recordings.eeg.du_in import DuIN, Stage
from nissl.recordings.simulate import PlantedUnits, planted_units
from nissl.sources.recordings import trial_set
from nissl.studies.claims import at_least, stated

SAME, USED = 0.6, 4
RANKED = 2
FOUND, ORACLE = 0.6, 0.9
GAIN = 0.05
REAL, NULL = 0.75, (0.4, 0.65)
UNLABELLED, LABELLED, TEST = 600, 90, 240
FEW = 40
INFORMATIVE = 4
SETS = {"SelfRegulationSCP1": 64, "SelfRegulationSCP2": 64, "FingerMovements": 10}
"""Samples of a patch."""
NET = {"patch": 20, "n_regions": 8, "filters": (32, 32, 8), "strides": (2, 1, 1), "n_layers": 2, "decoder_layers": 1,
       "n_heads": 4, "head_features": 16, "n_codes": 32, "code_features": 16}  # fmt: skip


def decoder(variant: str, seed: int, epochs: tuple[int, int, int], **options: Any) -> DuIN:
    """The small network of this study; `epochs` are those of the three stages."""
    first, second, third = epochs
    return DuIN(
        variant, random_state=seed, progress=False, **(NET | options),  # pyright: ignore[reportArgumentType]
        tokenizer=Stage(first, 1, 16, 2e-3, 1e-4, 0.01), masked=Stage(second, 1, 16, 3e-3, 1e-4, 0.01),
        classifier=Stage(third, 3, 16, 1e-3, 5e-5, 0.05),
    )  # fmt: skip


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        Stage 1 and 2 of one seed on fewer and shorter trials; no decoder, no recording.
    seed : int, default 0
    progress : bool, default True
        Show the figures behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval``, ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    if quick:
        units = planted_units(180, n_patches=12, seed=seed)
        return on_units([read_units(units, slice(0, 120), slice(120, 180), seed, (22, 4, 1), console)[1]], seed)
    found = []
    for s in range(seed, seed + 3):
        units = planted_units(UNLABELLED + LABELLED + TEST, seed=s)
        unlabelled = slice(0, UNLABELLED)
        labelled, test = slice(UNLABELLED, UNLABELLED + LABELLED), slice(UNLABELLED + LABELLED, None)
        model, read = read_units(units, unlabelled, test, s, (6, 40, 40), console)
        found.append(read | decode(model, units, labelled, test, s, console))
    claims = on_units(found, seed) + on_decoding(found)
    for name in SETS:
        try:
            claims += on_recording(name, seed, console)
        except MissingExtraError as error:
            warnings.warn(f"the claim on {name} is not measured: {error}", stacklevel=2)
    return claims


def read_units(
    units: PlantedUnits, unlabelled: slice, test: slice, seed: int, epochs: tuple[int, int, int], console: Console
) -> tuple[DuIN, dict[str, Any]]:
    """Pretrain on some trials; what codes, reconstruction, channel weights and masked prediction are worth on others."""
    model = decoder("mae", seed, epochs).pretrain(units.X[unlabelled])
    X, truth = units.X[test], units.units[test]
    codes, made = model.codes(X), model.reconstruct(X)
    wrong = (X - made).var((0, 2)) / X.var((0, 2))
    own, planted = model.codes(units.X[unlabelled]), units.units[unlabelled]
    table = np.zeros((NET["n_codes"], 4), dtype=int)  # type: ignore[call-overload]
    np.add.at(table, (own.ravel(), planted.ravel()), 1)
    unit_of = table.argmax(1)
    weights = model.channel_weights().to_numpy()[0]
    found = {
        "same": float(normalized_mutual_info_score(truth.ravel(), codes.ravel())),
        "used": len(np.unique(codes)),
        "explained": (float(1 - wrong[:INFORMATIVE].mean()), float(1 - wrong[INFORMATIVE:].mean())),
        "ranked": set(weights.argsort()[::-1][:INFORMATIVE]) == set(range(INFORMATIVE)),
        "read": float((unit_of[codes] == truth).mean()),
        "hidden": float((unit_of[model.masked_codes(X, seed=seed)] == truth).mean()),
    }
    console.print(f"seed {seed}:", found)
    return model, found


def decode(
    model: DuIN, units: PlantedUnits, labelled: slice, test: slice, seed: int, console: Console
) -> dict[str, Any]:
    """Accuracy on unseen trials of decoders that start from each stage and from nothing, and of band powers."""
    X, y, X_test, y_test = units.X[labelled], units.y[labelled], units.X[test], units.y[test]
    found = {}
    for variant in ("mae", "vqvae", "vqvae+vq", "scratch"):
        one = DuIN(**(model.get_params() | {"variant": variant, "pretrained": model.pretrained_}))
        found[variant] = float(one.fit(X, y).score(X_test, y_test))
        if variant == "mae":
            w = one.channel_weights().to_numpy()[0]
            console.print("weights after fit rank", sorted(w.argsort()[::-1][:INFORMATIVE].tolist()))
    bands = make_pipeline(_patch_powers(units), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    found["band powers"] = float(bands.fit(X, y).score(X_test, y_test))
    console.print(f"seed {seed}:", {k: round(v, 3) for k, v in found.items()})
    return found


def _patch_powers(units: PlantedUnits) -> Any:
    """Band powers of each patch of 0.1 s, one after the other."""

    def cut(X: np.ndarray) -> np.ndarray:
        n, c, t = X.shape
        return X.reshape(n, c, t // 20, 20).transpose(0, 2, 1, 3).reshape(n, -1, 20)

    return make_pipeline(
        FunctionTransformer(cut), BandPower(200.0, {"low": (1, 25), "middle": (25, 45), "high": (45, 75)})
    )


def on_units(found: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The claims on stages 1 and 2."""
    inside, outside = np.array([f["explained"] for f in found]).T
    ranked = sum(f["ranked"] for f in found)
    needed = min(RANKED, len(found))
    return [
        at_least("stage 1: mutual information of codes and planted units, normalised", "(ours)", [f["same"] for f in found],
                 SAME, 0.0, seed),
        stated(f"stage 1: least number of codes in use, at least {USED}", "(ours)", min(f["used"] for f in found), None,
               min(f["used"] for f in found) >= USED),
        stated("stage 1: explained variance of the channels with units, above 0 and above that of the others", "(ours)",
               float(inside.mean()), float(outside.mean()), bool(((inside > 0) & (inside > outside)).all())),
        stated(f"channel weights: seeds in which the four channels with units rank first, at least {needed} of {len(found)}",
               "largest on speech areas", ranked, None, ranked >= needed),
        at_least("stage 2: units of hidden patches named rightly", f"(ours; both neighbours allow {ORACLE:g})",
                 [f["hidden"] for f in found], FOUND, 0.25, seed),
    ]  # fmt: skip


def on_decoding(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims on stage 3."""
    chance = 1 / 6
    gain = float(np.median([f["mae"] - f["scratch"] for f in found]))
    both = min(min(f["mae"], f["scratch"]) for f in found)
    means = {k: float(np.mean([f[k] for f in found])) for k in ("mae", "vqvae", "vqvae+vq", "scratch", "band powers")}
    return [
        stated(f"stage 3, {LABELLED} labels: accuracy minus that from scratch, median of seeds, at least {GAIN:g}", "+.064",
               gain, 0.0, gain >= GAIN),
        stated("stage 3: least accuracy of both, above chance", "(ours)", both, chance, both > chance),
        stated("stage 3: accuracy from the masked model above that from the autoencoder", ".627 against .582",
               means["mae"], means["vqvae"], means["mae"] > means["vqvae"]),
        stated("stage 3: accuracy from quantised tokens below that from scratch", ".442 against .563",
               means["vqvae+vq"], means["scratch"], means["vqvae+vq"] < means["scratch"]),
        stated("stage 3: accuracy above that of discriminant analysis of band powers", "(ours)",
               means["mae"], means["band powers"], means["mae"] > means["band powers"]),
    ]  # fmt: skip


def on_recording(name: str, seed: int, console: Console) -> list[dict[str, Any]]:
    """A packaged set, from scratch; of the first one also with few labels, with and without pretraining."""
    (X, y), (X_test, y_test) = trial_set(name), trial_set(name, "test")
    patch = SETS[name]
    net = {"patch": patch, "strides": (4, 2, 1) if patch == 64 else (1, 1, 1)}
    scores = [
        float(decoder("scratch", s, (1, 1, 40), **net).fit(X, y).score(X_test, y_test)) for s in range(seed, seed + 3)
    ]
    console.print(name, "from scratch", np.round(scores, 3))
    mean = float(np.mean(scores))
    if name != "SelfRegulationSCP1":
        inside = NULL[0] <= mean <= NULL[1]
        return [
            stated(
                f"{name}: accuracy from scratch within {NULL[0]:g} to {NULL[1]:g}",
                "(nearly no signal)",
                mean,
                0.5,
                inside,
            )
        ]
    claims = [at_least(f"{name}: accuracy from scratch", "(linear: .89)", scores, REAL, 0.5, seed)]
    few: dict[str, list[float]] = {"mae": [], "scratch": []}
    for s in range(seed, seed + 3):
        model = decoder("mae", s, (15, 15, 40), **net).pretrain(X)
        g = np.random.default_rng(s)
        some = np.concatenate([g.permutation(np.flatnonzero(y == k))[: FEW // 2] for k in np.unique(y)])
        for variant, scored in few.items():
            one = DuIN(**(model.get_params() | {"variant": variant, "pretrained": model.pretrained_}))
            scored.append(float(one.fit(X[some], y[some]).score(X_test, y_test)))
    console.print(name, f"{FEW} labels", {k: np.round(v, 3) for k, v in few.items()})
    gain = float(np.mean(few["mae"]) - np.mean(few["scratch"]))
    claims.append(
        stated(f"{name}, {FEW} labels: accuracy minus that from scratch, above 0", "+.064", gain, 0.0, gain > 0)
    )
    return claims
