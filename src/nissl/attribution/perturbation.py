"""Scores from switching parts of a site off: occlusion by sliding windows, and RISE's random masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from nissl.arguments import at_least, flag, is_number
from nissl.attribution.base import Method
from nissl.attribution.masking import (
    Baseline,
    as_scores,
    baseline_of,
    check_baseline,
    default_sizes,
    dims_of,
    positions_only,
    roles_of,
    scalars_under,
)
from nissl.errors import InputError
from nissl.runner import Asking, Explained, Question, chunks, explained


@dataclass(frozen=True, eq=False)
class Occlusion(Method):
    """Fall of the target while a window is covered, the window sliding over the site.

    Parameters
    ----------
    window : int, optional
        Side of the square window on an image or map, length on a series or on tokens. By default 1/14 of the image's
        smaller side, 5 on maps inside the network, 1/32 of a series, 1 token. Tabular features, and the channels of a
        series, are covered one by one.
    stride : int, optional
        Step between windows, at most `window`. By default the window's own size, 2 on maps inside the network.
    windows : int, optional
        At most so many windows: stride and window grow until there are no more. Features that are covered one by one
        are never joined.
    baseline : str, number or Tensor, default "zero"
        What covers; of a tensor with several rows the mean answer is taken.

    Notes
    -----
    The fall f(x) - f(covered) is shared equally among the positions under the window, and a position's score is the
    mean over the windows that cover it. Windows that do not overlap so keep their fall as their sum. Windows that reach
    over the edge are cut. Asks one row for each window and one for x.

    References
    ----------
    Zeiler, Fergus: Visualizing and understanding convolutional networks (2014).
    """

    window: int | None = None
    stride: int | None = None
    windows: int | None = None
    baseline: Baseline = "zero"

    name: ClassVar[str] = "occlusion"
    title: ClassVar[str] = "Occlusion"
    paper: ClassVar[str] = "Zeiler & Fergus 2014"

    def __post_init__(self) -> None:
        for name in ("window", "stride", "windows"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.window is not None and self.stride is not None and self.stride > self.window:
            raise InputError(f"stride={self.stride} leaves gaps between windows of {self.window}: some get no score")
        check_baseline(self.baseline)

    def at_budget(self, passes: int) -> Occlusion:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        most = max(passes - 1, 1)
        return replace(self, windows=most if self.windows is None else min(self.windows, most))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        b = yield from baseline_of(self.baseline, q, x)
        dims, shape = dims_of(q, x), tuple(x.shape[1:])
        # a window is a product of one interval for each dimension
        intervals = [
            torch.ones(1, 1, dtype=torch.bool) if role == "together" else intervals_of(n, size, step)
            for role, n, (size, step) in zip(roles_of(dims), shape, self._extent(q, dims, shape), strict=True)
        ]
        counts = [len(i) for i in intervals]
        answer = yield q.ask(x)
        f = float(answer.scalar.double())
        total = torch.zeros([i.shape[1] for i in intervals], dtype=torch.float64)
        for s in chunks(math.prod(counts)):
            index = torch.unravel_index(torch.arange(s.start, s.stop), counts)
            covered = _product([i[k] for i, k in zip(intervals, index, strict=True)])
            scalars = yield from scalars_under(q, x, b, ~covered.to(x.device))
            each = (f - scalars) / covered.flatten(1).sum(1)
            total += torch.tensordot(each, covered.double(), 1)
        times = _product([i.sum(0, keepdim=True) for i in intervals])[0]
        scores, names = positions_only(total / times, dims)
        return explained(q, as_scores(scores, x), names)

    def _extent(self, q: Question, dims: Sequence[str], shape: Sequence[int]) -> list[tuple[int, int]]:
        """Window and stride on each dimension."""
        slides = [d in ("x", "y", "z", "time", "token") for d in dims]
        extents = []
        for d, n, default, slide in zip(dims, shape, default_sizes(dims, shape), slides, strict=True):
            deep_map = not q.at_input and d in ("x", "y", "z")
            window = (self.window or (5 if deep_map else default)) if slide else 1
            stride = (self.stride or (2 if deep_map and self.window is None else window)) if slide else 1
            if stride > window < n:
                raise InputError(f"stride={stride} leaves gaps between windows of {window}: give window= too")
            extents.append((min(window, n), min(stride, window, n)))

        def number() -> int:
            together = [role == "together" for role in roles_of(dims)]
            return math.prod(1 if t else _n_intervals(n, *e) for n, e, t in zip(shape, extents, together, strict=True))

        while self.windows is not None and number() > self.windows:
            grown = [
                (w, s) if not slide or w >= n else (w, s + 1) if s < w else (w + 1, w + 1)
                for (w, s), n, slide in zip(extents, shape, slides, strict=True)
            ]
            if grown == extents:
                break
            extents = grown
        return extents


def _n_intervals(n: int, window: int, stride: int) -> int:
    return -(-max(n - window, 0) // stride) + 1


def intervals_of(n: int, window: int, stride: int) -> Tensor:
    """Bool (n_intervals, n): intervals of length `window` that start every `stride`; the last may be cut."""
    starts = torch.arange(_n_intervals(n, window, stride))[:, None] * stride
    at = torch.arange(n)
    return (at >= starts) & (at < starts + window)


def _product(parts: Sequence[Tensor]) -> Tensor:
    """Outer product, row by row: (n, a), (n, b), ... to (n, a, b, ...)."""
    k = len(parts)
    whole = parts[0].reshape(-1, parts[0].shape[1], *[1] * (k - 1))
    for d in range(1, k):
        whole = whole * parts[d].reshape(-1, *[1] * d, parts[d].shape[1], *[1] * (k - 1 - d))
    return whole


@dataclass(frozen=True, eq=False)
class RISE(Method):
    """Mean of random masks, weighted with what the network still says under each.

    Parameters
    ----------
    n_masks : int, default 1000
    cells : int, default 7
        Cells along each side of an image, or along a series, that are on or off; masks are interpolated between them.
        Tokens, tabular features and the channels of a series are on or off one by one.
    p : float, default 0.5
        Probability that a cell is on.
    centred : bool, default True
        Subtract the mean answer: scores have a sign then, above 0 where presence raises the target. It moves all scores
        by about the same and takes away most of the noise; False is the paper's sum.
    baseline : str, number or Tensor, default "zero"
        What is seen where a mask is 0.

    Notes
    -----
    Score of position λ: Σ_i f(x under M_i) M_i(λ) / (n p). Masks are grids of `cells` bilinearly enlarged to one cell
    more than the site and shifted at random by up to one cell, as in the paper. Asks `n_masks` rows.

    References
    ----------
    Petsiuk, Das, Saenko: RISE: randomized input sampling for explanation of black-box models (2018).
    """

    n_masks: int = 1000
    cells: int = 7
    p: float = 0.5
    centred: bool = True
    baseline: Baseline = "zero"

    name: ClassVar[str] = "rise"
    title: ClassVar[str] = "RISE"
    paper: ClassVar[str] = "Petsiuk et al. 2018"

    def __post_init__(self) -> None:
        at_least("n_masks", self.n_masks, 1)
        at_least("cells", self.cells, 1)
        if not (is_number(self.p) and 0 < self.p < 1):
            raise InputError(f"p must be a probability between 0 and 1, got {self.p!r}")
        flag("centred", self.centred)
        check_baseline(self.baseline)

    def at_budget(self, passes: int) -> RISE:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_masks=max(min(self.n_masks, passes), 1))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        b = yield from baseline_of(self.baseline, q, x)
        dims, generator = dims_of(q, x), q.generator("masks")
        weighted, summed, level = torch.zeros(()), torch.zeros(()), 0.0
        for s in chunks(self.n_masks):
            masks = self.draw(s.stop - s.start, dims, x.shape[1:], generator)
            scalars = yield from scalars_under(q, x, b, masks.to(x.device))
            masks = masks.double()
            weighted = weighted + torch.tensordot(scalars, masks, 1)
            summed = summed + masks.sum(0)
            level += float(scalars.sum()) / self.n_masks
        if self.centred:
            weighted = weighted - level * summed
        scores, names = positions_only(weighted / (self.n_masks * self.p), dims)
        return explained(q, as_scores(scores, x), names)

    def draw(self, n: int, dims: Sequence[str], shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """N masks, float in [0, 1], (n, ...): size 1 on dimensions whose entries go together."""
        roles = roles_of(dims)
        grid_shape = [
            1 if role == "together" else min(self.cells, size) if role == "place" else size
            for role, size in zip(roles, shape, strict=True)
        ]
        masks = (torch.rand(n, *grid_shape, generator=generator) < self.p).float()
        for d, (role, size) in enumerate(zip(roles, shape, strict=True), start=1):
            if role == "place" and size > self.cells:
                enlarge = _enlarge(n, size, self.cells, generator)
                masks = torch.einsum("n...c,nsc->n...s", masks.movedim(d, -1), enlarge).movedim(-1, d)
        return masks


def _enlarge(n: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    """Linear interpolation from cells to positions, (n, size, cells), each row with its own random shift.

    The cells are stretched over one cell more than `size` positions, of which the shift picks `size`.
    """
    cell = -(-size // cells)
    shift = torch.randint(cell, (n, 1), generator=generator)
    at = (torch.arange(size) + shift + 0.5) * cells / ((cells + 1) * cell) - 0.5
    at = at.clamp(0, cells - 1)[..., None]
    return (1 - (at - torch.arange(cells)).abs()).clamp_min(0)
