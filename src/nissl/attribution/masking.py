"""The one notion of absence: what stands in for a feature that is taken away, and what the features are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least, is_number
from nissl.errors import InputError
from nissl.runner import CHUNK, Asking, Question

Baseline = str | int | float | Tensor | np.ndarray
"""``"zero"``, ``"mean"``, ``"blur"``, ``"noise"``, a number (a token id for token inputs), or a tensor like the input
(one row, or several to draw from or to average over)."""

Role = Literal["place", "single", "together"]
"""What a dimension means for features: ``place``, neighbours belong together (y, x, time); ``single``, each entry is a
feature of its own (tokens, tabular features, recording channels); ``together``, no entry is a feature of its own (the
channels of an image, the units of a token)."""

_KINDS = ("zero", "mean", "blur", "noise")


def check_baseline(baseline: Baseline) -> None:
    """Raise InputError where a baseline is none."""
    if isinstance(baseline, str) and baseline not in _KINDS:
        raise InputError(f"baseline={baseline!r}: choose {', '.join(map(repr, _KINDS))}, a number or a tensor")
    if isinstance(baseline, np.ndarray) and baseline.dtype.kind not in "biuf":
        raise InputError(f"baseline: an array of {baseline.dtype} holds no numbers")
    if not isinstance(baseline, (str, Tensor, np.ndarray)) and not is_number(baseline):
        raise InputError(
            f"baseline must be a name, a number or a tensor, got {type(baseline).__name__} {baseline!r:.60}"
        )


def dims_of(q: Question, x: Tensor) -> tuple[str, ...]:
    """Names of the dimensions of one row of the activation x (1, ...) at the question's site; ids are tokens."""
    shape = tuple(x.shape[1:])
    if x.is_floating_point() or (q.at_input and q.network.input_dims is not None):
        return q.network.dims_of(q.site, shape)
    if len(shape) == 1:
        return ("token",)
    raise InputError(
        f"whole numbers in rows of shape {shape} are no token ids; hand images and recordings over as floating point"
    )


def roles_of(dims: Sequence[str]) -> tuple[Role, ...]:
    """What each dimension means for features; see `Role`."""
    if not dims or any(d.startswith("dim_") for d in dims):
        raise InputError(
            f"rows with {len(dims)} dimensions have no known features; "
            "name the dimensions, for instance Network(model, dims=('channel', 'time', 'y', 'x'))"
        )
    shared = set()
    if {"x", "y", "z"} & set(dims):
        shared.add("channel")
    if "token" in dims:
        shared.add("unit")
    if "head" in dims:
        shared |= {"query", "key"}
    return tuple("together" if d in shared else "place" if d in ("x", "y", "z", "time") else "single" for d in dims)


def default_sizes(dims: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Extent of a feature on each dimension: about 14 × 14 patches of an image, 32 segments of a series, else 1."""
    spatial = [n for d, n in zip(dims, shape, strict=True) if d in ("x", "y", "z")]
    side = max(round(min(spatial, default=1) / 14), 1)
    length = {"time": 32}
    return tuple(
        side if d in ("x", "y", "z") else max(round(n / length[d]), 1) if d in length else 1
        for d, n in zip(dims, shape, strict=True)
    )


def baseline_of(baseline: Baseline, q: Question, x: Tensor, rows: int = 1) -> Asking[Tensor]:
    """What stands in for the activation x (1, ...) at the question's site: (n, ...), on x's device.

    ``zero`` is 0; ``mean`` the mean over the positions (of each channel of an image or series, of each unit of tokens;
    the overall mean where there are no positions); ``blur`` a Gaussian blur over the positions with a standard
    deviation of a tenth of their extent; ``noise`` uniform noise between each example's smallest and largest value,
    `rows` of them. For token ids a baseline is an id; 0 is the default one.
    """
    return _stand_in(baseline, q, x, rows)
    yield  # a generator, so that methods write the same whether a baseline needs a Pass or not


def _stand_in(baseline: Baseline, q: Question, x: Tensor, rows: int) -> Tensor:
    if isinstance(baseline, (Tensor, np.ndarray)):
        b = torch.as_tensor(baseline).to(device=x.device, dtype=x.dtype)
        b = b[None] if b.ndim == x.ndim - 1 else b
        if b.ndim != x.ndim or b.shape[1:] != x.shape[1:] or len(b) == 0:
            raise InputError(
                f"a baseline of shape {tuple(b.shape)} does not fit {q.site!r}: rows have shape {tuple(x.shape[1:])}"
            )
        if b.is_floating_point() and not bool(torch.isfinite(b).all()):
            raise InputError("the baseline holds NaN or infinity")
        return b
    if isinstance(baseline, (int, float)):
        if not x.is_floating_point() and baseline != int(baseline):
            raise InputError(f"baseline={baseline!r}: the input holds whole numbers, give one of them")
        return torch.full_like(x, baseline)
    if not x.is_floating_point():
        if baseline != "zero":
            raise InputError(
                f"baseline={baseline!r} makes no sense for token ids; give the id of a mask or padding token"
            )
        return torch.zeros_like(x)
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "noise":
        low, high = x.min(), x.max()
        noise = torch.rand(rows, *x.shape[1:], generator=q.generator("baseline")).to(x)
        return low + noise * (high - low)
    positions = [i + 1 for i, d in enumerate(dims_of(q, x)) if d in ("x", "y", "z", "time", "token")]
    if baseline == "mean":
        return x.mean(positions or list(range(1, x.ndim)), keepdim=True).expand_as(x)
    if not positions:
        raise InputError(
            f"blur needs positions to blur over; rows have shape {tuple(x.shape[1:])}: use 'mean' or 'zero'"
        )
    return blur(x, dims=positions)


def blur(x: Tensor, share: float = 0.1, dims: Sequence[int] | None = None) -> Tensor:
    """Gaussian blur of (n, ...) over the dimensions `dims` (by default all after the channels); edges are mirrored.

    The standard deviation is `share` of the smallest extent among them, as in blur-based insertion and deletion.
    """
    dims = tuple(range(2, x.ndim)) if dims is None else tuple(dims)
    if not dims:
        raise InputError(
            f"blur needs positions to blur over; rows have shape {tuple(x.shape[1:])}: use 'mean' or 'zero'"
        )
    extent = min(x.shape[d] for d in dims)
    sigma = max(share * extent, 0.5)
    radius = min(int(3 * sigma + 0.5), extent - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for d in dims:
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
    dims : tuple of str
        Names of the dimensions of `labels`.
    """

    labels: Tensor
    n: int
    dims: tuple[str, ...]

    def masks(self, present: Tensor) -> Tensor:
        """Entry masks (n_rows, *labels.shape) from feature masks (n_rows, n): 1 where the feature is present."""
        return present[:, self.labels]

    def spread(self, scores: Tensor) -> Tensor:
        """Scores (..., n) laid out over the entries."""
        return scores[..., self.labels]

    def share(self, scores: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """Scores (n,), each shared equally among the positions of its feature, and the names of their dimensions.

        Sums are kept, so scores of patches of different size can be compared position by position.
        """
        counts = torch.bincount(self.labels.reshape(-1), minlength=self.n).to(scores.device)
        return positions_only(self.spread(scores / counts), self.dims)


def positions_only(scores: Tensor, dims: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Scores without the dimensions of size 1 whose entries go together, and the names of those that are left."""
    kept = [i for i, role in enumerate(roles_of(dims)) if role != "together"]
    return scores.reshape([scores.shape[i] for i in kept]), tuple(dims[i] for i in kept)


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
    All channels of an image go together; those of a series (channel × time) do not. All units of a token go together,
    and all entries of an attention head's pattern.

    References
    ----------
    Achanta et al.: SLIC superpixels compared to state-of-the-art superpixel methods (2012).
    """
    shape, dims = tuple(x.shape[1:]), dims_of(q, x)
    roles = roles_of(dims)
    if size is not None:
        at_least("size", size, 1)
    if superpixels is not None:
        if superpixels < 2 or dims[-2:] != ("y", "x") or len(dims) > 3:
            raise InputError(f"superpixels={superpixels!r}: at least 2 are needed, and an image; here are {dims}")
        image = x[0].reshape(-1, *shape[-2:]).detach().cpu().double().numpy().transpose(1, 2, 0)
        labels = _superpixels(image, superpixels).reshape(*[1] * (len(shape) - 2), *shape[-2:])
        return Features(torch.from_numpy(labels).to(x.device), int(labels.max()) + 1, dims)
    labels, n = torch.zeros([1] * len(shape), dtype=torch.long), 1
    for d, (role, extent, default) in enumerate(zip(roles, shape, default_sizes(dims, shape), strict=True)):
        if role == "together":
            continue
        parts = torch.arange(extent) // ((size or default) if role == "place" else 1)
        count = int(parts[-1]) + 1
        labels = labels * count + parts.reshape([-1 if i == d else 1 for i in range(len(shape))])
        n *= count
    return Features(labels.to(x.device), n, dims)


def _superpixels(image: np.ndarray, n: int) -> np.ndarray:
    """SLIC labels 0, 1, ... of an image (height, width, channels); more compact where texture would leave few."""
    from skimage.segmentation import slic

    span = float(np.ptp(image)) or 1.0
    image = (image - image.min()) / span
    labels = np.zeros(image.shape[:2], dtype=np.int64)
    # three channels are compared as colours, whose lightness runs to 100; any other number of them from 0 to 1
    contrast = 1.0 if image.shape[-1] == 3 else 0.01
    for compactness in (10, 40, 160, 640):
        found = slic(image, n_segments=n, compactness=compactness * contrast, start_label=0, channel_axis=-1)
        labels = np.unique(found, return_inverse=True)[1].reshape(image.shape[:2])
        if labels.max() + 1 >= min(n, labels.size) / 2:
            break
    return labels


def masked(x: Tensor, baseline: Tensor, masks: Tensor) -> Tensor:
    """X where the mask is 1, the baseline where it is 0; whole numbers (token ids) are chosen, not mixed.

    Parameters
    ----------
    x, baseline : Tensor (1, ...)
    masks : Tensor (n_rows, ...)
        Broadcast against x.
    """
    if masks.dtype == torch.bool:
        return torch.where(masks, x, baseline)
    if not x.is_floating_point():
        return torch.where(masks >= 0.5, x, baseline)
    m = masks.to(x.dtype)
    return baseline + m * (x - baseline)


def scalars_under(q: Question, x: Tensor, baseline: Tensor, masks: Tensor) -> Asking[Tensor]:
    """The scalar for x where masks are 1 and the baseline elsewhere, (n_masks,), float64 on the CPU.

    Parameters
    ----------
    x : Tensor (1, ...)
    baseline : Tensor (n, ...)
        Of several rows the mean answer is taken: absence is then the expectation over them.
    masks : Tensor (n_masks, ...)
        Broadcast against x.
    """
    rows = len(baseline)
    found = []
    for few in masks.split(max(CHUNK // rows, 1)):
        many = masked(x, baseline.repeat(len(few), *[1] * (x.ndim - 1)), few.repeat_interleave(rows, 0))
        scalars = yield from q.scalars(many)
        found.append(scalars.cpu().double().reshape(len(few), rows).mean(1))
    return torch.cat(found)


def as_scores(values: Tensor, x: Tensor) -> Tensor:
    """Values on the device of the activation x and in its precision, at least float32."""
    return values.to(torch.promote_types(x.dtype, torch.float32)).to(x.device)
