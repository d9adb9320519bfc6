"""Memory of one gradient at every site of every layer of SmolLM2-135M.

    python -m benchmarks.gradient_memory

One clean and one corrupted prompt of the same length; RelP and attribution patching over the residual stream, attention and MLP
outputs, queries, keys, values, heads, gates and MLP neurons. The aim is that the process, model and all, stays within 3 GiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

from benchmarks.language import CLEAN, CORRUPTED, model
from benchmarks.measure import ROOT, held, peak
from nissl.attribution.patching import AttributionPatching, RelevancePatching, patch
from nissl.network.target import logit_difference
from nissl.runner import Runner

KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "heads", "gate", "up", "neurons")
AIM = 3.0
"""GiB."""


def one(method: str, tokens: int) -> dict[str, float | int | str]:
    """One method in this process; the prompt is lengthened by a sentence before it until it has `tokens` tokens."""
    torch.set_num_threads(1)
    net = model()
    before = "It was raining again. " * max((tokens - len(net.encode(CLEAN)["input_ids"][0])) // 5, 0)
    clean, corrupted = before + CLEAN, before + CORRUPTED
    target = logit_difference([net.token(" Steven")], [net.token(" Henry")], position=-1)
    chosen = {"relp": RelevancePatching, "atp": AttributionPatching}[method]()
    started = time.process_time()
    added = peak(
        lambda: patch(
            {"m": chosen}, net, [clean], [corrupted], target, kinds=KINDS, runner=Runner(progress=False, memory=0)
        )
    )
    return {
        "method": method,
        "tokens": int(net.encode(clean)["input_ids"].shape[1]),
        "layers": net.anatomy.n_layers,
        "GiB": round(held() / 1024, 3),
        "GiB added": round(added / 1024, 3),
        "seconds": round(time.process_time() - started, 1),
    }


def main() -> None:
    """Each method at two lengths, in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "TOKENS"), help="only one run, as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], int(given.one[1]))))
        return
    met = True
    for method in ("atp", "relp"):
        for tokens in (20, 200):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gradient_memory", "--one", method, str(tokens)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(found))
            met &= found["GiB"] <= AIM
    print(f"within {AIM:g} GiB: {'yes' if met else 'no'}")


if __name__ == "__main__":
    main()
