"""Divisions of an input into regions: superpixels, grids, cells in the order of a prior map, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least
from nissl.attribution.masking import Features, dims_of, features_of, positions_only, roles_of
from nissl.errors import InputError
from nissl.runner import Explained, Question

Division = Literal["superpixels", "grid", "prior"]


def grid(dims: Sequence[str], shape: Sequence[int], n: int) -> Features:
    """At most n boxes of about equal sides: patches of an image, segments of each channel of a series, runs of tokens."""
    labels, count, left = torch.zeros([1] * len(shape), dtype=torch.long), 1, n
    roles = roles_of(dims)
    order = [i for role in ("single", "place") for i, r in enumerate(roles) if r == role]
    places = [i for i in order if roles[i] == "place"]
    for i in order:
        parts = min(shape[i], left)
        if i in places:
            later = [shape[j] for j in places[places.index(i) :]]
            side = (math.prod(later) / left) ** (1 / len(later))
            parts = max(min(parts, int(shape[i] / side + 1e-9)), 1)
        along = torch.arange(shape[i]) * parts // shape[i]
        labels = labels * parts + along.reshape([-1 if j == i else 1 for j in range(len(shape))])
        count, left = count * parts, left // parts
    return Features(labels, count, tuple(dims))


def superpixels(q: Question, x: Tensor, n: int, most: int | None = None) -> Features:
    """As near to n SLIC superpixels as can be had, never more than `most`; a grid where SLIC makes no so few.

    SLIC gives fewer than it is asked for, on real pictures by a third: several requests are tried.
    """
    wanted = {int(n * share) for share in (0.5, 0.75, 1, 1.25, 1.5, 2)[0 if most else 2 :]}
    found = [features_of(q, x, superpixels=w) for w in sorted(wanted) if w >= 2]
    fit = [f for f in found if most is None or f.n <= most]
    return min(fit, key=lambda f: abs(f.n - n)) if fit else grid(dims_of(q, x), x.shape[1:], n)


def prior_patches(cells: Features, scores: Tensor, per_region: int) -> Features:
    """Cells in falling order of a score, every `per_region` of them one region; the last region may be shorter.

    Parameters
    ----------
    cells : Features
    scores : Tensor (n_cells,)
    per_region : int
    """
    at_least("per_region", per_region, 1)
    if scores.shape != (cells.n,) or not bool(torch.isfinite(scores).all()):
        raise InputError(f"{cells.n} cells need as many finite scores, got a tensor of shape {tuple(scores.shape)}")
    rank = torch.argsort(torch.argsort(scores, descending=True, stable=True))
    return Features((rank // per_region)[cells.labels], -(-cells.n // per_region), cells.dims)


def given_regions(given: Any, dims: Sequence[str], shape: Sequence[int]) -> Features:
    """Regions from a map of labels 0, 1, ..., or from boolean masks (n_regions, ...), over the positions of a site.

    Raises
    ------
    InputError
        A map of another shape, a label that is missing, or masks that do not cover each position exactly once.
    """
    wide = [1 if r == "together" else s for r, s in zip(roles_of(dims), shape, strict=True)]
    positions = [s for r, s in zip(roles_of(dims), shape, strict=True) if r != "together"]
    labels = torch.as_tensor(given).cpu()
    if labels.dtype == torch.bool:
        if list(labels.shape[1:]) != positions or not bool((labels.sum(0) == 1).all()):
            raise InputError(
                f"regions: masks of shape {tuple(labels.shape)} must cover each of the positions {positions} exactly once"
            )
        labels = labels.long().argmax(0)
    if labels.is_floating_point() or list(labels.shape) != positions:
        raise InputError(
            f"regions: a map of whole numbers of shape {tuple(positions)} is needed, "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    found, n = labels.unique(), int(labels.max()) + 1
    if len(found) != n or int(found[0]) != 0:
        raise InputError(f"regions: labels must be 0 to {n - 1} and each must occur; found {found.tolist()[:20]}")
    return Features(labels.long().reshape(wide), n, tuple(dims))


def divide(q: Question, x: Tensor, division: Division | None, n: int, most: int | None) -> Features:
    """Regions without a prior: superpixels of images at the input where nothing else is said, else a grid."""
    dims = dims_of(q, x)
    image = q.at_input and dims == ("channel", "y", "x")
    if division == "superpixels" or (division is None and image):
        return superpixels(q, x, n, most)
    return grid(dims, x.shape[1:], n)


def mean_by_cell(scores: Explained, cells: Features) -> Tensor:
    """Mean score of each cell, from a map of any resolution."""
    s = scores.values.double()
    together = [i for i, role in enumerate(roles_of(scores.dims)) if role == "together"]
    s = s.sum(together) if together else s
    labels = positions_only(cells.labels, cells.dims)[0].to(s.device)
    if s.shape != labels.shape and s.ndim == labels.ndim == 2:
        s = F.interpolate(s[None, None], labels.shape, mode="bilinear", align_corners=False)[0, 0]
    if s.shape != labels.shape:
        raise InputError(f"a prior map of shape {tuple(s.shape)} does not fit positions {tuple(labels.shape)}")
    flat = labels.reshape(-1)
    total = torch.zeros(cells.n, dtype=s.dtype, device=s.device).index_add_(0, flat, s.reshape(-1))
    return (total / torch.bincount(flat, minlength=cells.n)).cpu()
