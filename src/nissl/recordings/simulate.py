"""Simulated recordings whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nissl.arguments import at_least, is_number
from nissl.errors import InputError


@dataclass(frozen=True, eq=False)
class DelayedSources:
    """Trials of two classes that differ in the direction of a delayed influence.

    Attributes
    ----------
    X : array (n_trials, n_channels, n_times)
    y : array of int (n_trials,)
        Class 0: source 0 receives source 1, `delay` samples late; class 1: the reverse.
    mixing : array (n_channels, n_channels)
        From sources to channels, the same in all trials.
    delay : int
        In samples.
    """

    X: np.ndarray
    y: np.ndarray
    mixing: np.ndarray
    delay: int


def delayed_sources(
    n_trials: int = 120, n_channels: int = 4, n_times: int = 384, *, delay: int = 3, strength: float = 0.2, seed: int = 0
) -> DelayedSources:  # fmt: skip
    """White sources in which one of two receives the other late; the covariance at delay 0 is the same in both classes.

    Parameters
    ----------
    n_trials, n_channels, n_times : int
        Classes alternate.
    delay : int, default 3
        In samples.
    strength : float, default 0.2
        Weight of the source that is received, before scaling to unit variance.
    seed : int, default 0
    """
    for name, value, low in (
        ("n_trials", n_trials, 2),
        ("n_channels", n_channels, 2),
        ("n_times", n_times, 2),
        ("delay", delay, 1),
    ):
        at_least(name, value, low)
    if not is_number(strength):
        raise InputError(f"strength must be a number, got {strength!r}")
    g = np.random.default_rng(seed)
    y = np.arange(n_trials) % 2
    white = g.standard_normal((n_trials, n_channels, n_times + delay))
    sources = white[:, :, delay:].copy()
    trial = np.arange(n_trials)
    sources[trial, y] = (sources[trial, y] + strength * white[trial, 1 - y, :n_times]) / np.sqrt(1 + strength**2)
    mixing = g.standard_normal((n_channels, n_channels))
    return DelayedSources(mixing @ sources, y, mixing, delay)
