"""What the kernel costs over PyTorch written by hand, and how cost grows with examples."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nissl
from benchmarks.measure import SAME, Result, relative
from benchmarks.subject import Subject
from nissl.trust.audit import audit


def by_hand(s: Subject, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """A forward and a backward pass as one would write them."""
    x = x.detach().requires_grad_()
    output = s.module(x)
    (gradient,) = torch.autograd.grad(output.gather(1, y[:, None]).sum(), x)
    return output.detach(), gradient


def overhead(s: Subject, repeats: int) -> Result:
    """One Pass with a gradient over the same by hand, in the same memory format; pairs in turns."""
    times = -(-s.batch // s.n)
    x, y = s.x.repeat(times, 1, 1, 1)[: s.batch], s.y.repeat(times)[: s.batch]

    def ours() -> nissl.Answer:
        return s.contiguous.run(nissl.Pass(x, of=y, wrt=["input"]))

    def theirs() -> tuple[Tensor, Tensor]:
        return by_hand(s, x, y)

    answer, (output, gradient) = ours(), theirs()
    differences = {
        "output": (relative(answer.output, output), SAME),
        "gradient": (relative(answer.gradients["input"], gradient), SAME),
    }
    result = Result(
        f"one Pass, batch {s.batch}", "PyTorch by hand", 1.05,
        "forward and backward; ratio: median over pairs, with its quartiles", differences,
    )  # fmt: skip
    result.time({"nissl": ours, "PyTorch by hand": theirs}, repeats)
    pairs = [a / b for a, b in zip(*result.seconds.values(), strict=True)]
    low, middle, high = np.quantile(pairs, [0.25, 0.5, 0.75])
    result.extra = {"median of pairs": float(middle), "quartiles": [float(low), float(high)]}
    return result


def growth(s: Subject, examples: tuple[int, ...] = (2, 4, 8), repeats: int = 1) -> dict[str, Any]:
    """Rows and seconds of a small audit for growing numbers of examples, and the exponents of their growth."""

    def work(n: int) -> int:
        few = s.some(slice(0, n))
        runner = few.runner()
        audit(
            few.contiguous, few.x, few.y, methods=["ixg", "gradcam", "ig(steps=8)"], checks=["curves", "subsets"],
            sanity_examples=n, runner=runner,
        )  # fmt: skip
        return sum(c.forward for c in runner.costs.values())

    rows, seconds = [], []
    for n in examples:
        taken = []
        for _ in range(repeats):
            started = time.process_time()
            found = work(n)
            taken.append(time.process_time() - started)
        rows.append(found)
        seconds.append(min(taken))
    slope = [float(np.polyfit(np.log(examples), np.log(v), 1)[0]) for v in (rows, seconds)]
    return {"examples": list(examples), "rows": rows, "seconds": seconds, "exponent of rows": slope[0],
            "exponent of seconds": slope[1]}  # fmt: skip
