"""Decoding specialised feature neurons in LLMs with the final projection layer (2025).

Measured on planted neurons, whose tokens are known, and, where the packaged SmolLM2-135M is installed, on words that
clamped neurons should bring about. The paper's model (Llama 3.1 8B) does not run here: its time is extrapolated from a stack
of its sizes with random weights, mapped from disk. The thresholds below were written down before the first run.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from nissl.concepts.vocabulary import NeuronVocabulary, WeightFolder, clamp_curve, concept_tokens, preserved
from nissl.errors import MissingExtraError
from nissl.network import LanguageModel
from nissl.runner import Runner
from nissl.seeds import seeded
from nissl.studies.claims import stated
from nissl.trust.statistics import bootstrap

TOP1, TOP1_FOLDED, RETRIEVED, AUC, SHUFFLED, FOLD_GAIN, KEPT_WITHIN = 0.9, 0.95, 0.95, 0.93, 0.05, 0.1, 0.03
WORDS_MOVED = 4
"""Of six words, in how many the found neuron must beat 95 % of random ones."""
PAPER_MINUTES = 15.0

WORDS: dict[str, tuple[str, ...]] = {
    "dog": ("My favourite animal is the", "At the park I saw a man walking his", "The animal that barks is called a"),
    "music": ("In the evening we like to listen to", "She plays the piano because she loves", "The band played"),
    "water": ("When you are thirsty you should drink", "Plants need light, air and", "The glass was filled with"),
    "red": ("The colour of a ripe tomato is", "The traffic light turned", "Her dress was"),
    "Monday": ("The first day of the working week is", "The meeting is on", "The shop is closed on"),
    "France": ("The country with the Eiffel Tower is", "Paris is a city in", "The best wine comes from"),
}


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        Planted neurons only, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper``, ``ours``, ``interval`` (95 % bootstrap), ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    n_seeds = 2 if quick else 5
    near = [planted(seed + i, noise=1.0) for i in range(n_seeds)]
    far = [planted(seed + i, noise=2.0) for i in range(n_seeds)]
    claims = [
        _claim("planted neurons: first token right, raw rows", "decodes neurons", [r["top1"] for r in near], TOP1,
               [r["shuffled"] for r in near]),
        _claim("planted neurons: first token right, input norm folded in", "(ours)", [r["folded"] for r in near], TOP1_FOLDED,
               [r["shuffled"] for r in near]),
        _claim("planted neurons: found from their token, by z", "finds neurons", [r["z"] for r in near], RETRIEVED,
               [r["probability"] for r in near]),
        _claim("planted neurons: found from their token, by cosine", "finds neurons", [r["cosine"] for r in near], RETRIEVED,
               [r["probability"] for r in near]),
        _claim("planted against other neurons: area under the curve of the largest z", "(ours)", [r["auc"] for r in near], AUC,
               [0.5] * n_seeds),
        _claim("planted neurons under more noise: what the fold gains", "(ours)",
               [r["folded"] - r["top1"] for r in far], FOLD_GAIN, [0.0] * n_seeds),
    ]  # fmt: skip
    shuffled = bootstrap(np.array([r["shuffled"] for r in near]), seed=seed)
    claims.append(
        stated(f"decoding through a shuffled unembedding stays at most at {SHUFFLED:g}", "(control)", shuffled, 0.0,
             bool(shuffled.value <= SHUFFLED))
    )  # fmt: skip
    kept = bootstrap(np.array([redrawn(seed + i) for i in range(n_seeds)]), seed=seed)
    claims.append(
        stated("40 % of neurons redrawn: share of first tokens preserved, 0.6 within 0.03", "compares models", kept, 1.0,
             bool(abs(kept.value - 0.6) <= KEPT_WITHIN))
    )  # fmt: skip
    if quick:
        return claims
    try:
        network = LanguageModel.load("smollm2")
    except MissingExtraError as error:
        warnings.warn(f"the claims on SmolLM2 are not measured: {error}", stacklevel=2)
        return claims
    moved = {word: clamped(network, word, prompts, seed, progress) for word, prompts in WORDS.items()}
    console.print({w: f"{m['gain']:.2f} nats, random 95 %: {m['random']:.2f}" for w, m in moved.items()})
    ahead = np.array([m["gain"] - m["random"] for m in moved.values()])
    held = int((ahead > 0).sum())
    found = bootstrap((ahead > 0).astype(float), seed=seed)
    claims.append(
        stated(f"SmolLM2: clamping the found neuron beats 95 % of random ones, for at least {WORDS_MOVED} of 6 words", "always (dog)",
             found, 0.05, held >= WORDS_MOVED)
    )  # fmt: skip
    minutes, peak = full_size(progress)
    console.print(f"a stack of Llama 3.1 8B's sizes: {minutes:.0f} minutes extrapolated, {peak:.1f} GB at most")
    claims.append(
        {
            "claim": "decoding all neurons of 8 billion weights on this machine, minutes (extrapolated from one layer)",
            "paper": f"below {PAPER_MINUTES:g}", "ours": minutes, "interval": None, "baseline": None,
            "holds": bool(minutes < PAPER_MINUTES),
        }
    )  # fmt: skip
    return claims


# ---------------------------------------------------------------- planted neurons


def _llama(d: int, v: int, layers: int, neurons: int, seed: int) -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=v, hidden_size=d, intermediate_size=neurons, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.copy_(
            torch.randn(v, d, generator=g) / d**0.5 * (0.2 * torch.randn(v, 1, generator=g)).exp()
        )
        for block in model.model.layers:
            block.post_attention_layernorm.weight.copy_((0.5 * torch.randn(d, generator=g)).exp())
            rows = torch.randn(neurons, d, generator=g) / d**0.5 * (0.5 * torch.randn(neurons, 1, generator=g)).exp()
            block.mlp.up_proj.weight.copy_(rows)
    return LanguageModel(model, name="planted")


def planted(seed: int, noise: float, n_planted: int = 40) -> dict[str, float]:
    """Neurons that read a token's direction in the residual stream, at random lengths; how many decoding finds."""
    d, v, layers, neurons = 128, 2000, 4, 256
    net = _llama(d, v, layers, neurons, seed)
    g = torch.Generator().manual_seed(seed + 1000)
    head = net.weight("unembed")
    tokens = torch.randperm(v, generator=g)[:n_planted]
    at = torch.randperm(layers * neurons, generator=g)[:n_planted]
    ups = [net.weight("up", i).clone() for i in range(layers)]
    for token, where in zip(tokens.tolist(), at.tolist(), strict=True):
        layer, unit = divmod(where, neurons)
        gains = net.weights()[f"model.layers.{layer}.post_attention_layernorm.weight"]
        row = (head[token] / head[token].norm() + noise * torch.randn(d, generator=g) / d**0.5) / gains
        ups[layer][unit] = row / row.norm() * ups[layer][unit].norm()
    net = net.rewritten({("up", i): u for i, u in enumerate(ups)})
    raw, folded = (NeuronVocabulary(fold=f).decode(net, k=1, progress=False) for f in ("none", "input"))
    permuted = net.rewritten({("unembed", None): head[torch.randperm(v, generator=g)]})
    shuffled = NeuronVocabulary().decode(permuted, k=1, progress=False)

    def right(decoded: Any) -> float:
        return float((decoded["token"].values[..., 0].reshape(-1)[at.numpy()] == tokens.numpy()).mean())

    def retrieved(by: Any) -> float:
        best = [NeuronVocabulary().search(net, [t], by=by, n=1, progress=False).iloc[0] for t in tokens.tolist()]
        return float(np.mean([b.layer * neurons + b.unit for b in best] == at.numpy()))

    label = np.zeros(layers * neurons)
    label[at.numpy()] = 1
    return {
        "top1": right(raw), "folded": right(folded), "shuffled": right(shuffled), "z": retrieved("z"), "cosine": retrieved("cosine"),
        "probability": retrieved("probability"), "auc": float(roc_auc_score(label, raw["z"].values[..., 0].reshape(-1))),
    }  # fmt: skip


def redrawn(seed: int) -> float:
    """Share of preserved first tokens where 40 % of the neurons were drawn anew."""
    net = _llama(64, 2000, 2, 400, seed)
    g = torch.Generator().manual_seed(seed + 2000)
    changed = {}
    for layer in range(2):
        up = net.weight("up", layer).clone()
        up[torch.randperm(400, generator=g)[:160]] = torch.randn(160, 64, generator=g) / 8
        changed["up", layer] = up
    return preserved(net, net.rewritten(changed)).attrs["top1"]


# ---------------------------------------------------------------- a real model


def clamped(network: LanguageModel, word: str, prompts: tuple[str, ...], seed: int, progress: bool) -> dict[str, float]:
    """Gain in log probability by the found neuron, and the 95th percentile of 20 random ones, each at its best value."""
    half = range(network.anatomy.n_layers // 2, network.anatomy.n_layers)
    best = NeuronVocabulary().search(network, word, n=1, layers=list(half), progress=False).iloc[0]
    layer = int(best.layer)
    drawn = np.random.default_rng(seed).choice(network.anatomy.d_mlp, 20, replace=False)
    neurons = [(layer, int(best.unit)), *((layer, int(u)) for u in drawn if u != best.unit)]
    curve = clamp_curve(network, prompts, concept_tokens(network, word), neurons, runner=Runner(progress=progress))
    # the best value of each neuron is chosen on its mean gain, for random ones too
    gains = curve.pivot_table("gain", "factor", "unit").max().to_dict()
    own = gains.pop(int(best.unit))
    return {"gain": own, "random": float(np.percentile(list(gains.values()), 95))}


def full_size(progress: bool = True, neurons: int = 1024) -> tuple[float, float]:
    """Minutes for all neurons of a model of Llama 3.1 8B's sizes, from some neurons of one layer; and peak memory in GB.

    One layer and the unembedding, random in bfloat16, are written to a temporary folder (about 3 GB) and mapped from there.
    """
    import resource

    from safetensors.torch import save_file
    from transformers import LlamaConfig

    v, d, d_mlp, layers = 128_256, 4096, 14_336, 32
    config = LlamaConfig(
        vocab_size=v, hidden_size=d, intermediate_size=d_mlp, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config.save_pretrained(folder)
        g = torch.Generator().manual_seed(0)
        weights = {
            "lm_head.weight": torch.empty(v, d, dtype=torch.bfloat16).normal_(generator=g),
            "model.layers.0.mlp.up_proj.weight": torch.empty(d_mlp, d, dtype=torch.bfloat16).normal_(generator=g),
        }
        save_file(weights, folder / "model.safetensors")
        del weights
        network = WeightFolder(folder)
        started = time.perf_counter()
        NeuronVocabulary().decode(network, [0], units=range(neurons), progress=progress)
        seconds = (time.perf_counter() - started) * d_mlp / neurons * layers
    return seconds / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---------------------------------------------------------------- claims


def _claim(claim: str, paper: str, values: list[float], least: float, baseline: list[float]) -> dict[str, Any]:
    found = bootstrap(np.array(values))
    holds = bool(found.value >= least and found.value > np.mean(baseline))
    return stated(f"{claim}, at least {least:g}", paper, found, float(np.mean(baseline)), holds)
