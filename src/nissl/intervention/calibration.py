"""Strength of a steering edit, set by how much it changes the next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nissl.arguments import at_least, instance, is_number
from nissl.errors import InputError
from nissl.network import Edit, LanguageModel, Pass


@dataclass(frozen=True)
class Calibrated:
    """What `calibrate` found.

    Attributes
    ----------
    alpha : float
        The strength; where the target is out of reach, the one that came nearest to it.
    kl : float
        Mean Kullback-Leibler divergence at `alpha`, in nats.
    reachable : bool
        Whether `kl` is the wanted one, within the tolerance.
    target : float
        The wanted divergence.
    reason : str
        Why it is out of reach, else empty.
    """

    alpha: float
    kl: float
    reachable: bool
    target: float
    reason: str = ""

    def __float__(self) -> float:
        """The strength; raises InputError where the target is out of reach, so that none is used by mistake."""
        if not self.reachable:
            raise InputError(f"no strength gives a divergence of {self.target:g} nats: {self.reason}")
        return self.alpha


def divergence(base: Tensor, changed: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(changed) from softmax(base) over the last axis, in nats, float64."""
    before, after = base.double().log_softmax(-1), changed.double().log_softmax(-1)
    # a token that is impossible before adds nothing, whatever it is afterwards
    return torch.where(before > -torch.inf, before.exp() * (before - after), 0.0).sum(-1)


def calibrate(
    network: LanguageModel,
    prompts: Any,
    edit_at: Callable[[float], Edit | Sequence[Edit]],
    kl: float = 0.1,
    *,
    low: float = 1e-3,
    high: float = 1e4,
    tolerance: float = 0.05,
    steps: int = 20,
) -> Calibrated:
    """Strength at which edits change the distribution of the next token by a given amount.

    Parameters
    ----------
    network : LanguageModel
    prompts : str or sequence
        As for `LanguageModel.encode`; they go through the network in one batch, padded on the left.
    edit_at : callable
        The edits of a strength.
    kl : float, default 0.1
        Wanted divergence D(plain ‖ edited) at the last token in nats, averaged over the prompts.
    low, high : float, default 0.001, 10000
        Strengths between which is searched.
    tolerance : float, default 0.05
        Allowed distance from `kl`, as a share of it.
    steps : int, default 20
        Strengths tried at most inside the bracket that was found.

    Returns
    -------
    Calibrated
        With ``reachable=False`` if the smallest strength overshoots, the largest does not suffice, or the divergence jumps
        over the target.

    Raises
    ------
    InputError
        Parameters out of range, or `edit_at` gives no edits.

    Notes
    -----
    From 1 the strength is multiplied or divided by 4 until the target lies between two strengths; between them it is
    found by interpolation on logarithmic axes, where the divergence of a small edit is a straight line of slope 2. The
    divergence need not grow with the strength: the answer is one strength that fits, not the only one.

    References
    ----------
    Shafran et al. (2025). Decomposing MLP activations into interpretable features via semi-nonnegative matrix
    factorization. (Features are compared at equal divergence.)
    """
    instance("network", network, LanguageModel)
    if not callable(edit_at):
        raise InputError(f"edit_at must be a function from a strength to edits, got {type(edit_at).__name__}")
    for name, value in (("kl", kl), ("low", low), ("high", high), ("tolerance", tolerance)):
        if not (is_number(value) and value > 0):
            raise InputError(f"{name} must be a number above 0, got {value!r}")
    if not low < high:
        raise InputError(f"low must be below high, got {low:g} and {high:g}")
    at_least("steps", steps, 1)
    inputs = network.encode(prompts)
    base = network.run(Pass(inputs)).output
    assert base is not None
    tried: list[tuple[float, float]] = []

    def divergence_at(alpha: float) -> float:
        edits = edit_at(alpha)
        edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
        if not edits:
            raise InputError(f"edit_at({alpha:g}) gave no edits")
        output = network.run(Pass(inputs, edits)).output
        assert output is not None
        found = float(divergence(base[:, -1], output[:, -1]).mean())
        # so strong that the network overflows: beyond any target
        found = found if math.isfinite(found) else math.inf
        tried.append((alpha, max(found, 0.0)))
        return tried[-1][1]

    def nearest(reason: str) -> Calibrated:
        alpha, found = min(tried, key=lambda t: abs(t[1] - kl))
        fits = abs(found - kl) <= tolerance * kl
        return Calibrated(alpha, found, fits, float(kl), "" if fits else reason)

    alpha = min(max(1.0, low), high)
    found = divergence_at(alpha)
    up = found < kl
    before = alpha, found
    while (found < kl) == up and abs(found - kl) > tolerance * kl:
        if alpha == (high if up else low):
            gives = "even {:g} gives only {:.3g}" if up else "even {:g} gives {:.3g}"
            return nearest(gives.format(alpha, found))
        before = alpha, found
        alpha = min(alpha * 4, high) if up else max(alpha / 4, low)
        found = divergence_at(alpha)
    below, above = (before, (alpha, found)) if up else ((alpha, found), before)
    for _ in range(steps):
        if abs(found - kl) <= tolerance * kl:
            break
        alpha = _between(below, above, kl)
        found = divergence_at(alpha)
        below, above = ((alpha, found), above) if found < kl else (below, (alpha, found))
    return nearest("the divergence jumps over it")


def _between(below: tuple[float, float], above: tuple[float, float], kl: float) -> float:
    """A strength between two, by interpolation of the logarithms, kept off the ends."""
    share = 0.5
    if below[1] > 0 and math.isfinite(above[1]):
        share = math.log(kl / below[1]) / math.log(above[1] / below[1])
    share = min(max(share, 0.1), 0.9)
    return math.exp((1 - share) * math.log(below[0]) + share * math.log(above[0]))
