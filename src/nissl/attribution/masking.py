"""The one notion of absence: what stands in for a feature that is taken away, and what the features are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.errors import InputError
from nissl.runner import Asking, Question

Baseline = str | float | Tensor | np.ndarray
"""``"zero"``, ``"mean"``, ``"blur"``, ``"noise"``, a number (a token id for token inputs), or a tensor like the input
(one row, or several to draw from)."""

_KINDS = ("zero", "mean", "blur", "noise")


def check_baseline(baseline: Baseline) -> None:
    """Raise InputError where a baseline is none."""
    if isinstance(baseline, str) and baseline not in _KINDS:
        raise InputError(f"baseline={baseline!r}: choose {', '.join(map(repr, _KINDS))}, a number or a tensor")
    if not isinstance(baseline, (str, int, float, Tensor, np.ndarray)):
        raise InputError(f"baseline must be a name, a number or a tensor, got {type(baseline).__name__}")


def baseline_of(baseline: Baseline, q: Question, x: Tensor, rows: int = 1) -> Asking[Tensor]:
    """What stands in for the activation x (1, ...) at the question's site: (n, ...), on x's device.

    ``zero`` is 0; ``mean`` each channel's mean over its positions (the overall mean where there are none); ``blur`` a
    Gaussian blur over the positions with a standard deviation of a tenth of their extent; ``noise`` uniform noise between
    each example's smallest and largest value, `rows` of them. For token ids a baseline is an id; 0 is the default one.
    """
    return _stand_in(baseline, q, x, rows)
    yield  # a generator, so that methods write the same whether a baseline needs a Pass or not


def _stand_in(baseline: Baseline, q: Question, x: Tensor, rows: int) -> Tensor:
    if isinstance(baseline, (Tensor, np.ndarray)):
        b = torch.as_tensor(baseline).to(device=x.device, dtype=x.dtype)
        b = b[None] if b.ndim == x.ndim - 1 else b
        if b.ndim != x.ndim or b.shape[1:] != x.shape[1:]:
            raise InputError(
                f"a baseline of shape {tuple(b.shape)} does not fit {q.site!r}: rows have shape {tuple(x.shape[1:])}"
            )
        return b
    if isinstance(baseline, (int, float)):
        return torch.full_like(x, baseline)
    if not x.is_floating_point():
        if baseline != "zero":
            raise InputError(
                f"baseline={baseline!r} makes no sense for token ids; give the id of a mask or padding token"
            )
        return torch.zeros_like(x)
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        over = tuple(range(2, x.ndim)) or (1,)
        return x.mean(over, keepdim=True).expand_as(x)
    if baseline == "blur":
        return blur(x)
    low, high = x.min(), x.max()
    noise = torch.rand(rows, *x.shape[1:], generator=q.generator("baseline")).to(x)
    return low + noise * (high - low)


def blur(x: Tensor, share: float = 0.1) -> Tensor:
    """Gaussian blur of (n, channels, positions...) over its positions; edges are mirrored.

    The standard deviation is `share` of the smaller spatial extent, as in blur-based insertion and deletion.
    """
    if x.ndim < 3:
        raise InputError(
            f"blur needs positions to blur over; rows have shape {tuple(x.shape[1:])}: use 'mean' or 'zero'"
        )
    sigma = max(share * min(x.shape[2:]), 0.5)
    radius = min(int(3 * sigma + 0.5), min(x.shape[2:]) - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for d in range(2, x.ndim):
        moved = x.movedim(d, -1)
        flat = moved.reshape(-1, 1, moved.shape[-1])
        smooth = F.conv1d(F.pad(flat, (radius, radius), mode="reflect"), kernel[None, None])
        x = smooth.reshape(moved.shape).movedim(-1, d)
    return x


@dataclass(frozen=True, eq=False)
class Features:
    """A division of a site into the features that are switched on and off together.

    Attributes
    ----------
    labels : Tensor, integer
        Feature of every entry; shape broadcasts to one row of the site.
    n : int
        Number of features.
    """

    labels: Tensor
    n: int

    def masks(self, present: Tensor) -> Tensor:
        """Entry masks (n_rows, *labels.shape) from feature masks (n_rows, n): 1 where the feature is present."""
        return present[:, self.labels]

    def spread(self, scores: Tensor) -> Tensor:
        """Scores (..., n) laid out over the entries."""
        return scores[..., self.labels]


def features_of(q: Question, x: Tensor, size: int | None = None, superpixels: int | None = None) -> Features:
    """The features of the activation x (1, ...).

    Parameters
    ----------
    size : int, optional
        Side of the square patches of an image, or length of the segments of a series. By default images have about
        14 × 14 patches (at least 1 pixel), series about 32 segments, tokens and tabular features are single.
    superpixels : int, optional
        About so many SLIC superpixels of an image instead of patches.

    Notes
    -----
    All channels of an image go together; those of a series (channel × time) do not. All units of a token go together.
    """
    shape = tuple(x.shape[1:])
    dims = q.network.dims_of(q.site, shape) if x.is_floating_point() else ("token",) * len(shape)
    if size is not None and size < 1:
        raise InputError(f"the size of a feature must be at least 1, got {size}")
    if len(shape) == 3:
        height, width = shape[1:]
        if superpixels is not None:
            from skimage.segmentation import slic

            image = x[0].detach().cpu().double().numpy().transpose(1, 2, 0)
            span = float(np.ptp(image)) or 1.0
            labels = slic((image - image.min()) / span, n_segments=superpixels, start_label=0, channel_axis=-1)
            unique, labels = np.unique(labels, return_inverse=True)
            return Features(torch.from_numpy(labels.reshape(1, height, width)).to(x.device), len(unique))
        side = size or max(round(min(height, width) / 14), 1)
        rows, columns = torch.arange(height) // side, torch.arange(width) // side
        n_columns = int(columns[-1]) + 1
        labels = rows[:, None] * n_columns + columns
        return Features(labels[None].to(x.device), int(labels.max()) + 1)
    if len(shape) == 2 and dims[0] == "channel":
        channels, times = shape
        length = size or max(round(times / 32), 1)
        segments = torch.arange(times) // length
        n = int(segments[-1]) + 1
        return Features((torch.arange(channels)[:, None] * n + segments).to(x.device), channels * n)
    if len(shape) == 2:
        return Features(torch.arange(shape[0])[:, None].to(x.device), shape[0])
    if len(shape) == 1:
        return Features(torch.arange(shape[0]).to(x.device), shape[0])
    raise InputError(f"rows of shape {shape} at {q.site!r} have no known features")


def masked(x: Tensor, baseline: Tensor, masks: Tensor) -> Tensor:
    """X where the mask is 1, the baseline where it is 0; whole numbers (token ids) are chosen, not mixed.

    Parameters
    ----------
    x, baseline : Tensor (1, ...)
    masks : Tensor (n_rows, ...)
        Broadcast against x.
    """
    if not x.is_floating_point() or masks.dtype == torch.bool:
        return torch.where(masks.bool(), x, baseline)
    m = masks.to(x.dtype)
    return baseline + m * (x - baseline)
