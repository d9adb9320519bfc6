"""Rezaei Jafari, Eberle, Khakzar, Nanda: RelP: Faithful and efficient circuit discovery via relevance patching (2025).

Measured on random transformers, planted to have the scales of GPT-2 and not, and, where the packaged model is installed, on
SmolLM2-135M with indirect objects and subject-verb agreement. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from rich.console import Console
from torch import Tensor, nn

from nissl.attribution.patching import (
    KINDS,
    ActivationPatching,
    AttributionPatching,
    NodeIntegratedGradients,
    Nodes,
    Patching,
    RelevancePatching,
    agreement,
    agreement_gain,
    patch,
)
from nissl.errors import MissingExtraError
from nissl.network import LanguageModel, Network, RelP, target
from nissl.runner import Runner
from nissl.sources.tasks import PromptPairs, indirect_object, subject_verb_agreement
from nissl.trust.statistics import bootstrap

CONSERVED = 1e-9
NOT_CONSERVED = 0.1
GAIN_PLANTED = {"resid_pre": 0.03, "mlp_out": 0.02}
GAIN_DEEP = {"resid_pre": 0.15, "mlp_out": 0.15}
NO_GAIN_IN_ATTENTION = 0.02
"""The paper's attention outputs: .979 with attribution patching, .962 with RelP."""
REAL = 0.8
KINDS_WON = 2

PAPER = {"resid_pre": "GPT-2: .753 to .968", "attn_out": "GPT-2: .979 to .962", "mlp_out": "GPT-2: .195 to .992"}
METHODS: dict[str, Patching] = {
    "atp": AttributionPatching(),
    "relp": RelevancePatching(),
    "relp+ah": RelevancePatching(rules=RelP()),
    "ln-rule": RelevancePatching(rules=RelP(identity=False, half=False, attention=False)),
}


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        Two small random transformers and few pairs, in seconds; no SmolLM2.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over seeds, or over prompts),
        ``baseline`` (what attribution patching, or a broken rule set, gives) and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(2 if quick else 5)]
    claims = list(_conservation(seeds))
    sizes = {"n_layers": 4, "pairs": 6} if quick else {"n_layers": 8, "pairs": 24}
    planted = pd.concat([on_random(s, planted=True, progress=progress, **sizes) for s in seeds])
    console.print("random transformers with the scales of GPT-2, mean Pearson with patching", _wide(planted))
    claims += list(_gains(planted, "random transformers with the scales of GPT-2", GAIN_PLANTED, seed))
    if quick:
        return claims
    deep = pd.concat([on_random(s, planted=False, n_layers=12, progress=progress) for s in seeds])
    console.print("random transformers of 12 layers, mean Pearson with patching", _wide(deep))
    claims += list(_gains(deep, "random transformers of 12 layers", GAIN_DEEP, seed))
    try:
        model = LanguageModel.load("smollm2")
    except MissingExtraError as error:
        warnings.warn(f"the claims on SmolLM2 are not measured: {error}", stacklevel=2)
        return claims
    for pairs in (indirect_object(16, seed), subject_verb_agreement(16, seed)):
        found, truth, kept = on_model(model, pairs, seed=seed, progress=progress)
        where = f"SmolLM2, {kept.task}"
        tables = [agreement(s, truth, seed=seed).assign(method=name) for name, s in found.items()]
        table = pd.concat(tables, ignore_index=True)
        console.print(f"{where}: Pearson with patching, {len(kept)} pairs", table.round(3).to_string())
        claims += list(_on_model(where, table, found, truth, seed))
    return claims


# ---------------------------------------------------------------- what is measured


class _RMSNorm(nn.Module):
    """Root mean square normalisation without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class _Attention(nn.Module):
    """Causal attention without biases."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _RMSNorm()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        x = self.norm(x)
        q, k, v = (f(x).reshape(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        pattern = torch.softmax(scores.masked_fill(later, -torch.inf), -1)
        return self.o((pattern @ v).transpose(1, 2).reshape(n, t, d))


class _MLP(nn.Module):
    """Gated MLP (SwiGLU) without biases."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.norm = _RMSNorm()
        self.gate, self.up, self.down = (
            nn.Linear(d, width, False),
            nn.Linear(d, width, False),
            nn.Linear(width, d, False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class _Block(nn.Module):
    """Attention and MLP, one after the other."""

    def __init__(self, d: int, heads: int, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = _Attention(d, heads), _MLP(d, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class RandomTransformer(nn.Module):
    """A transformer with random weights, in float64.

    Parameters
    ----------
    planted : bool
        Scales as in GPT-2, whose first MLP writes most of the embedding: small token embeddings, and a first
        down-projection 20 times as large; gates and ups 1.5 times as large (otherwise 2).
    """

    def __init__(self, seed: int, n_layers: int, planted: bool, d: int = 48, heads: int = 4, width: int = 128) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(40, d), nn.Parameter(torch.empty(10, d))
        self.layers = nn.ModuleList(_Block(d, heads, width) for _ in range(n_layers))
        self.norm, self.unembed = _RMSNorm(), nn.Linear(d, 40, bias=False)
        self.double()
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                scale = p.shape[-1] ** -0.5
                if name in ("embed.weight", "positions"):
                    scale = 0.3 if planted or name == "positions" else 1.0
                elif ".gate" in name or ".up" in name:
                    scale *= 1.5 if planted else 2.0
                elif planted and name == "layers.0.mlp.down.weight":
                    scale *= 20
                p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (n, n_tokens, 40) of token ids (n, n_tokens)."""
        x = self.embed(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.unembed(self.norm(x))


def random_network(seed: int, n_layers: int, planted: bool) -> tuple[Network, tuple[Nodes, ...]]:
    """A random transformer and its three kinds of node."""
    network = Network(RandomTransformer(seed, n_layers, planted).eval(), name="random transformer")
    names = {"resid_pre": "layers.{}:in", "attn_out": "layers.{}.attention", "mlp_out": "layers.{}.mlp"}
    return network, tuple(Nodes(k, tuple(name.format(i) for i in range(n_layers))) for k, name in names.items())


def random_pairs(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Token ids (n, 10) that differ at positions 3 and 6."""
    g = torch.Generator().manual_seed(seed)
    clean = torch.randint(40, (n, 10), generator=g)
    corrupted = clean.clone()
    shift = torch.randint(1, 40, (n, 2), generator=g)
    corrupted[:, [3, 6]] = (clean[:, [3, 6]] + shift) % 40
    return clean, corrupted


def on_random(seed: int, planted: bool, n_layers: int = 8, pairs: int = 24, progress: bool = False) -> pd.DataFrame:
    """Pearson with true patching of every method, for each kind, on one random transformer."""
    network, nodes = random_network(seed, n_layers, planted)
    clean, corrupted = random_pairs(seed, pairs)
    of = target.logit_difference(1, 2, position=-1)
    methods = {**METHODS, "ig": NodeIntegratedGradients(), "truth": ActivationPatching()}
    runner = Runner(progress=progress)
    found = patch(methods, network, clean, corrupted, of, kinds=nodes, runner=runner, seed=seed)
    truth = found.pop("truth")
    # what knows of activations but not of the other prompt: the estimate of setting a node to zero, turned round
    zeroed = AttributionPatching().attribute(network, corrupted, None, of, kinds=nodes, ablate="zero", runner=runner)
    found["gradient x activation"] = truth.copy(data={k: -zeroed[k].values for k in truth.data_vars})
    g = np.random.default_rng(seed)
    found["random"] = truth.copy(data={k: g.normal(size=truth[k].shape) for k in truth.data_vars})
    tables = [agreement(s, truth, n_resamples=1).assign(method=name, seed=seed) for name, s in found.items()]
    return pd.concat(tables, ignore_index=True)


def conservation_gap(seed: int, rules: RelP | None, n_layers: int = 4) -> float:
    """Largest relative difference between the sum of relevance over the embeddings and the scalar, over 8 prompts."""
    network, _ = random_network(seed, n_layers, planted=False)
    clean, _ = random_pairs(seed, 8)
    kinds = [Nodes("embed", ("layers.0:in",))]
    scores = AttributionPatching(rules=rules).attribute(
        network, clean, None, target.logit_difference(1, 2, position=-1), kinds=kinds, ablate="zero",
        runner=Runner(progress=False),
    )  # fmt: skip
    total, scalar = -scores["embed"].sum(["layer", "position"]).values, scores["clean"].values
    return float((np.abs(total - scalar) / np.abs(scalar)).max())


def on_model(
    model: LanguageModel, pairs: PromptPairs, sample: int = 64, seed: int = 0, progress: bool = False
) -> tuple[dict[str, xr.Dataset], xr.Dataset, PromptPairs]:
    """Every method beside a sample of true patches of each kind and pair, on pairs that the model gets right."""
    kept = pairs.aligned(model, drop=True)
    difference = kept.differences(model)
    kept = kept[np.flatnonzero(difference[:, 0] > difference[:, 1]).tolist()]
    methods = {
        **METHODS, "ig": NodeIntegratedGradients(steps=10, path="input"), "truth": ActivationPatching(sample=sample),
    }  # fmt: skip
    found = patch(
        methods, model, list(kept.clean), list(kept.corrupted), kept.target(model), seed=seed,
        runner=Runner(progress=progress, memory=2**28),
    )  # fmt: skip
    return found, found.pop("truth"), kept


# ---------------------------------------------------------------- claims


def _conservation(seeds: list[int]) -> Iterator[dict[str, Any]]:
    whole = max(conservation_gap(s, RelP()) for s in seeds)
    broken = [
        min(conservation_gap(s, RelP(**{name: False})) for s in seeds)
        for name in ("norm", "identity", "half", "attention")
    ]
    yield _row(f"relevance is conserved with all four rules, largest relative gap at most {CONSERVED:g}", "LRP's axiom",
               whole, None, min(broken), whole <= CONSERVED)  # fmt: skip
    yield _row(f"and with any rule left out it is not: gap at least {NOT_CONSERVED:g}", "(control)",
               min(broken), None, whole, min(broken) >= NOT_CONSERVED)  # fmt: skip


def _gains(table: pd.DataFrame, where: str, bars: dict[str, float], seed: int) -> Iterator[dict[str, Any]]:
    """RelP minus attribution patching on each seed."""

    def r(method: str, kind: str) -> np.ndarray:
        rows = table[(table["method"] == method) & (table["kind"] == kind)]
        return np.array([v for _, v in sorted(zip(rows["seed"], rows["r"], strict=True))], float)

    def against(other: str, kind: str) -> tuple[float, list[float], float]:
        found = bootstrap(r("relp", kind) - r(other, kind), seed=seed)
        return float(found.value), [float(found.low), float(found.high)], float(r(other, kind).mean())

    for kind in KINDS:
        value, interval, baseline = against("atp", kind)
        if kind in bars:
            claim = f"{where}: RelP minus attribution patching, {kind}, at least {bars[kind]:g}"
            yield _row(claim, PAPER[kind], value, interval, baseline, value >= bars[kind] and interval[0] > 0)
        else:
            claim = f"{where}: RelP is no gain, {kind}, at most {NO_GAIN_IN_ATTENTION:g}"
            yield _row(claim, PAPER[kind], value, interval, baseline, value <= NO_GAIN_IN_ATTENTION)
    for kind in bars:
        value, interval, baseline = against("gradient x activation", kind)
        claim = f"{where}: RelP minus gradient x activation without the difference, {kind}"
        yield _row(claim, "(control)", value, interval, baseline, interval[0] > 0)


def _on_model(
    where: str, table: pd.DataFrame, found: dict[str, xr.Dataset], truth: xr.Dataset, seed: int
) -> Iterator[dict[str, Any]]:
    rows = {(str(row["method"]), str(row["kind"])): row for row in table.to_dict("records")}
    for kind in ("resid_pre", "mlp_out"):
        row = rows["relp", kind]
        claim = f"{where}: Pearson of RelP with patching, {kind}, at least {REAL:g}"
        yield _row(claim, PAPER[kind], row["r_changed"], [row["low_changed"], row["high_changed"]],
                   rows["atp", kind]["r_changed"], row["r_changed"] >= REAL)  # fmt: skip
    for kind in KINDS:
        row, atp = rows["ig", kind], rows["atp", kind]["r_changed"]
        yield _row(f"{where}: Pearson of integrated gradients on nodes with patching, {kind}, above attribution patching",
                   "(comparison)", row["r_changed"], [row["low_changed"], row["high_changed"]], atp, row["r_changed"] > atp)  # fmt: skip
    won = agreement_gain(found["relp"], found["atp"], truth, seed=seed).to_dict("records")
    for row in won:
        claim = f"{where}: RelP minus attribution patching, {row['kind']}, above 0"
        yield _row(claim, PAPER[row["kind"]], row["gain"], [row["low"], row["high"]],
                   rows["atp", row["kind"]]["r_changed"], row["low"] > 0)  # fmt: skip
    n_won = sum(row["gain"] > 0 for row in won)
    yield _row(f"{where}: kinds on which RelP is above attribution patching, at least {KINDS_WON}", "2 of 3", n_won, None,
               0, n_won >= KINDS_WON)  # fmt: skip
    for row in agreement_gain(found["relp+ah"], found["relp"], truth, seed=seed).to_dict("records"):
        claim = f"{where}: the attention rule does not help RelP, {row['kind']} (difference)"
        yield _row(claim, "off in the authors' code", row["gain"], [row["low"], row["high"]],
                   rows["relp", row["kind"]]["r_changed"], row["low"] <= 0)  # fmt: skip
    relp = found["relp"].attrs
    passes = (relp["forward_passes"] + relp["backward_passes"]) / truth.sizes["example"]
    yield _row(f"{where}: passes of RelP for each pair", "2 forward, 1 backward", passes, None,
               truth.attrs["forward_passes"] / truth.sizes["example"], passes == 3)  # fmt: skip


def _row(claim: str, paper: str, ours: float, interval: Any, baseline: Any, holds: bool) -> dict[str, Any]:
    return {
        "claim": claim, "paper": paper, "ours": float(ours), "interval": interval, "baseline": baseline,
        "holds": bool(holds),
    }  # fmt: skip


def _wide(table: pd.DataFrame) -> str:
    return table.pivot_table("r", "method", "kind", aggfunc="mean")[list(KINDS)].round(3).to_string()
