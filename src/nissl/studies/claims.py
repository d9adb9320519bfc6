"""How the claims of a study are written down: what the paper says, what was found, and whether it holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from nissl.trust.statistics import bootstrap

ROUNDING = 1e-6
"""A mean of exact ones may fall short of 1 by this much."""


def stated(claim: str, paper: str, found: Any, baseline: float | None, holds: bool) -> dict[str, Any]:
    """A claim as `nissl reproduce` prints it.

    Parameters
    ----------
    claim, paper : str
        What is claimed, and what the paper says of it.
    found : Interval or number
        An interval over one value, and a bare number, are printed without an interval.
    baseline : float or None
        What knowing nothing gives.
    holds : bool
    """
    several = hasattr(found, "low") and found.n > 1
    return {
        "claim": claim,
        "paper": paper,
        "ours": float(getattr(found, "value", found)),
        "interval": [float(found.low), float(found.high)] if several else None,
        "baseline": None if baseline is None else float(baseline),
        "holds": bool(holds),
    }


def at_least(claim: str, paper: str, values: Any, least: float, baseline: float, seed: int = 0) -> dict[str, Any]:
    """A mean that should be at least `least` (0: no bar is named) and, with its interval, above the baseline."""
    found = bootstrap(np.asarray(values, dtype=float), seed=seed)
    low = float(found.low) if found.n > 1 else float(found.value)
    holds = bool(found.value >= least - ROUNDING and low > baseline)
    return stated(f"{claim}, at least {least:g}" if least else claim, paper, found, baseline, holds)


def at_most(claim: str, paper: str, values: Any, most: float, baseline: float, seed: int = 0) -> dict[str, Any]:
    """A mean that should be at most `most` and, with its interval, below the baseline."""
    found = bootstrap(np.asarray(values, dtype=float), seed=seed)
    high = float(found.high) if found.n > 1 else float(found.value)
    return stated(f"{claim}, at most {most:g}", paper, found, baseline, bool(found.value <= most and high < baseline))
