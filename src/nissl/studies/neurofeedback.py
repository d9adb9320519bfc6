"""Ji-An et al.: Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations (2025).

Measured on a stand-in whose knowledge of itself is known: it sees 8 of its 64 dimensions and learns from labels as a simple
reader would. What the paradigm says of it must be what was built in. On SmolLM2-135M-Instruct with film reviews, where the
package and the archive of vaderSentiment are at hand, the paper's question is put for real; a null is a valid result at that
size. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import Any

import numpy as np
from rich.console import Console

from nissl.errors import InputError, MissingExtraError
from nissl.intervention.feedback import (
    LanguageSubject,
    NeurofeedbackAxis,
    accessible_axes,
    cohens_d,
    control,
    control_precision,
    effects,
    final_accuracy,
    ideal_observer,
    report,
    sentence_states,
    surface_observer,
)
from nissl.network import LanguageModel
from nissl.runner import Runner
from nissl.studies.claims import stated
from nissl.trust.statistics import bootstrap

KNOWN, KNOWN_LR, UNKNOWN, SHUFFLED = 0.88, 0.82, (0.42, 0.60), (0.44, 0.56)
D_FULL, D_UNKNOWN, PRECISE, IMPRECISE = (0.75, 1.3), 0.2, 8.0, 2.0
IDEAL, NULL_WITHIN = 0.8, 0.1
AXES = ("lr", "pc1", "pc2", "pc4", "pc8", "pc16", "pc32")
ACCESSIBLE = ["lr", "pc1", "pc2", "pc4", "pc8"]


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        The stand-in only, one seed, fewer orders.
    seed : int, default 0
    progress : bool, default True

    Returns
    -------
    list of dict
        ``claim``, ``paper``, ``ours``, ``interval``, ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(1 if quick else 5)]
    found = [planted(s, n_orders=15 if quick else 40, n_runs=60 if quick else 100) for s in seeds]
    console.print([{k: round(float(v), 3) for k, v in f.items() if isinstance(v, float)} for f in found])
    claims = [
        _least("stand-in: accuracy of the report at the end, PC 1, 2 and 4, the lowest", "early components best",
               [min(f[f"report {a}"] for a in ("pc1", "pc2", "pc4")) for f in found], KNOWN, [f["report shuffled"] for f in found]),
        _least("stand-in: accuracy of the report at the end, supervised axis", "supervised axes best",
               [f["report lr"] for f in found], KNOWN_LR, [f["report shuffled"] for f in found]),
        _within("stand-in: report of PC 16 and 32, which it cannot see", "late components at chance",
                [f[f"report {a}"] for f in found for a in ("pc16", "pc32")], *UNKNOWN, 0.5),
        _within("stand-in: report under shuffled labels", "(control)", [f["report shuffled"] for f in found], *SHUFFLED, 0.5),
        _within("stand-in: effect of control without examples", "(control)", [f["d0 pc1"] for f in found], -1e-9, 1e-9, 0.0),
        _within("stand-in: effect d of implicit control of PC 1, 256 examples", "grows with examples",
                [f["d256 pc1"] for f in found], *D_FULL, 0.0),
        _least("stand-in: what 256 examples add to d over 16", "grows with examples",
               [f["d256 pc1"] - f["d16 pc1"] for f in found], 0.0, [0.0] * len(found)),
        _within("stand-in: effect d on PC 32", "late components hard", [f["d256 pc32"] for f in found], -D_UNKNOWN, D_UNKNOWN, 0.0),
        _least("stand-in: precision of control of PC 1", "precise on early components",
               [f["precision pc1"] for f in found], PRECISE, [f["precision pc32"] for f in found]),
        _within("stand-in: precision of control of PC 32", "(ours)", [f["precision pc32"] for f in found], 0.0, IMPRECISE, 1.0),
        {
            "claim": "stand-in: the axes found accessible are those it can see", "paper": "a space smaller than the neural one",
            "ours": " / ".join(",".join(f["accessible"]) for f in found), "interval": None, "baseline": ",".join(AXES),
            "holds": all(f["accessible"] == ACCESSIBLE for f in found),
        },
    ]  # fmt: skip
    if quick:
        return claims
    try:
        claims += real(seed, progress)
    except (MissingExtraError, InputError) as error:
        warnings.warn(f"the claims on SmolLM2 are not measured: {error}", stacklevel=2)
    return claims


# ---------------------------------------------------------------- a stand-in whose metacognition is known


class StandIn:
    """Sees the first `known` of its own components and learns by the difference of class means in them.

    Parameters
    ----------
    states : ndarray (n, d)
        Its activations while saying each sentence.
    basis : ndarray (known, d)
        Components that it sees, divided by their standard deviations.
    move : float
        How far it can move itself, in standard deviations.
    """

    def __init__(self, states: np.ndarray, basis: np.ndarray, move: float = 0.5) -> None:
        self.states, self.basis, self.move = states, basis, move
        self.seen = states @ basis.T

    def _learned(self, order: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Direction in what it sees, and the middle between the classes; zero until both were shown."""
        y, z = labels[order], self.seen[order]
        if len(np.unique(y)) < 2:
            return np.zeros(self.seen.shape[1]), np.zeros(self.seen.shape[1])
        one, other = z[y == 1].mean(0), z[y == 0].mean(0)
        return (one - other) * len(order) / (len(order) + 5), (one + other) / 2

    def guess(self, order: np.ndarray, labels: np.ndarray, levels: int) -> Generator[Any, Any, np.ndarray]:
        """See `nissl.intervention.feedback.Subject`."""
        yield from ()
        logits = np.zeros((len(order), 2))
        for k, item in enumerate(order):
            direction, middle = self._learned(order[:k], labels)
            logits[k, 1] = 2 * direction @ (self.seen[item] - middle)
        return logits

    def act(
        self, order: np.ndarray, labels: np.ndarray, level: int, levels: int, item: int, mode: str, seed: int
    ) -> Generator[Any, Any, np.ndarray]:
        """See `nissl.intervention.feedback.Subject`."""
        yield from ()
        direction, _ = self._learned(order, labels)
        length = np.linalg.norm(direction)
        state = self.states[item]
        if length > 0:
            along = direction / length * len(order) / (len(order) + 5)
            state = state + (1 if level else -1) * self.move * along @ np.linalg.pinv(self.basis).T
        return state[None]


def planted(seed: int, n_orders: int, n_runs: int, d: int = 64, known: int = 8) -> dict[str, Any]:
    """What the paradigm says of a stand-in."""
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(d, d)))[0]
    spread = 1 / np.sqrt(np.arange(1, d + 1))
    states = random.normal(size=(1200, d)) * spread @ rotation.T
    # a meaning that lies in the first components, read with some noise
    meaning = (states @ rotation / spread)[:, :4] @ np.array([0.7, 0.5, 0.4, 0.3]) + 0.5 * random.normal(size=1200) > 0
    fit, rest = states[:600], states[600:]
    axes = {"lr": [NeurofeedbackAxis("lr").fit(fit, meaning[:600])]}
    axes |= {f"pc{i}": [NeurofeedbackAxis("pc", i).fit(fit)] for i in range(1, 33)}
    scores = {a: by_layer[0].decision_function(rest) for a, by_layer in axes.items()}
    subject = StandIn(rest, (rotation / spread).T[:known])
    runner = Runner(progress=False)
    reports = {
        a: report(subject, s, n_orders=n_orders, seed=seed, runner=runner) for a, s in scores.items() if a in AXES
    }
    null = {
        a: report(subject, s, n_orders=n_orders, shuffled=True, seed=seed, runner=runner)
        for a, s in scores.items()
        if a in AXES
    }
    found: dict[str, Any] = {f"report {a}": final_accuracy(r)["accuracy"] for a, r in reports.items()}
    found["report shuffled"] = float(np.mean([final_accuracy(r)["accuracy"] for r in null.values()]))
    found["accessible"] = accessible_axes(reports, null)
    for target, n in (("pc1", 0), ("pc1", 16), ("pc1", 256), ("pc32", 256)):
        moved = control(subject, axes, scores, target, n_examples=n, n_runs=n_runs, seed=seed, runner=runner)
        on_target = moved.sel(axis=target).isel(layer=0)
        found[f"d{n} {target}"] = cohens_d(on_target["high"].values, on_target["low"].values)[0]
        if n == 256:
            found[f"precision {target}"] = float(control_precision(moved)[0])
    return found


# ---------------------------------------------------------------- a real model


def real(seed: int, progress: bool, n_fit: int = 200, n_items: int = 40, n_orders: int = 6) -> list[dict[str, Any]]:
    """Film reviews, the middle layer of SmolLM2, sentiment and the first component."""
    from nissl.sources.sentiment import load_sentiment

    console = Console(stderr=True, quiet=not progress)
    network = LanguageModel.load("smollm2")
    data = load_sentiment(part="film")
    texts, ratings = list(data.texts), np.asarray(data.ratings, dtype=float)
    random = np.random.default_rng(seed)
    short = [i for i in random.permutation(len(texts)) if abs(ratings[i]) > 1 and len(texts[i]) < 100][: n_fit + 120]
    sentences, positive = [texts[i].strip() for i in short], ratings[short] > 0
    subject = LanguageSubject(network, sentences)
    runner = Runner(progress=progress)
    states = sentence_states(subject, runner=runner)[:, 0]
    axes = {
        "lr": [NeurofeedbackAxis("lr").fit(states[:n_fit], positive[:n_fit])],
        "pc1": [NeurofeedbackAxis("pc", 1).fit(states[:n_fit])],
    }
    held = LanguageSubject(network, sentences[n_fit:])
    claims = []
    for name, by_layer in axes.items():
        scores = by_layer[0].decision_function(states[n_fit:])
        ideal = ideal_observer(states[:n_fit], by_layer[0].decision_function(states[:n_fit]), states[n_fit:], scores)
        settings = {"n_orders": n_orders, "n_items": n_items, "seed": seed, "runner": runner}
        told, null = (report(held, scores, shuffled=s, **settings) for s in (False, True))
        surface = surface_observer(sentences[n_fit:], scores, told, [n_items // 2])[n_items // 2]
        at, nothing = final_accuracy(told, 0.5), final_accuracy(null, 0.5)
        console.print(f"{name}: reports {at['accuracy']:.2f}, words alone {surface:.2f}, ideal {ideal:.2f}")
        claims += [
            {"claim": f"SmolLM2, {name}: an observer of the activations tells the labels, at least {IDEAL:g}", "paper": "(precondition)",
             "ours": ideal, "interval": None, "baseline": 0.5, "holds": bool(ideal >= IDEAL)},
            {"claim": f"SmolLM2, {name}: reports under shuffled labels, 0.5 within {NULL_WITHIN:g}", "paper": "(control)",
             "ours": nothing["accuracy"], "interval": [nothing["low"], nothing["high"]], "baseline": 0.5,
             "holds": bool(abs(nothing["accuracy"] - 0.5) <= NULL_WITHIN)},
            {"claim": f"SmolLM2, {name}: reports beat chance and a reader of the words alone", "paper": "larger models do",
             "ours": at["accuracy"], "interval": [at["low"], at["high"]], "baseline": surface,
             "holds": bool(at["low"] > 0.5 and at["accuracy"] > surface)},
        ]  # fmt: skip
        moved = control(held, axes, {name: scores}, name, n_examples=16, n_runs=8, seed=seed, runner=runner)
        row = effects(moved).query("target").iloc[0]
        claims.append(
            {"claim": f"SmolLM2, {name}: implicit control moves the axis, 16 examples, effect d", "paper": "larger models do",
             "ours": float(row["d"]), "interval": [float(row["low"]), float(row["high"])], "baseline": 0.0,
             "holds": bool(row["low"] > 0)}
        )  # fmt: skip
    return claims


# ---------------------------------------------------------------- claims


def _least(claim: str, paper: str, values: list[float], least: float, baseline: list[float]) -> dict[str, Any]:
    found = bootstrap(np.array(values))
    holds = bool(found.value >= least and found.value > np.mean(baseline))
    return stated(f"{claim}, at least {least:g}", paper, found, float(np.mean(baseline)), holds)


def _within(claim: str, paper: str, values: list[float], low: float, high: float, baseline: float) -> dict[str, Any]:
    found = bootstrap(np.array(values))
    return stated(f"{claim}, {low:g} to {high:g}", paper, found, baseline, bool(low <= found.value <= high))
