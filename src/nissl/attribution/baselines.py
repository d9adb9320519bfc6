"""Maps that know nothing of the network: what any method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.attribution.base import Method
from nissl.attribution.masking import as_scores, dims_of, positions_only, roles_of
from nissl.runner import Asking, Explained, Question, explained


@dataclass(frozen=True, eq=False)
class RandomScores(Method):
    """Independent standard normal noise, one number for each position.

    Notes
    -----
    Pixels of an image, channels × times of a series, tokens, tabular features each get a number of their own, which
    depends on seed and example only: the network, its weights and the target have no part in it. At the input it asks
    nothing; inside the network one row, to learn the shape.
    """

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random scores"
    paper: ClassVar[str] = "control"
    class_sensitive: ClassVar[bool] = False

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        dims = dims_of(q, x)
        shape = [1 if r == "together" else n for r, n in zip(roles_of(dims), x.shape[1:], strict=True)]
        scores, names = positions_only(torch.randn(shape, generator=q.generator("scores")), dims)
        return explained(q, as_scores(scores, x), names)


@dataclass(frozen=True, eq=False)
class EdgeDetector(Method):
    """How much each position of the input stands out from its neighbours; the network has no part in it.

    Notes
    -----
    Images: size of the Sobel gradient of the mean over the channels. Series: size of the central difference in time,
    for each channel. Token ids: 1 / how often the token occurs in the example. Activations of tokens: distance from
    the mean token. Elsewhere, as for tabular features: distance from the example's mean.

    References
    ----------
    Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim: Sanity checks for saliency maps (2018) compare explanations with an
    edge detector.
    """

    name: ClassVar[str] = "edge"
    title: ClassVar[str] = "Edge detector"
    paper: ClassVar[str] = "Adebayo et al. 2018"
    class_sensitive: ClassVar[bool] = False
    positive: ClassVar[bool] = True

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        dims = dims_of(q, x)
        roles = roles_of(dims)
        row = x[0]
        shared = [i for i, role in enumerate(roles) if role == "together"]
        if not row.is_floating_point():
            scores = 1 / (row[..., None] == row.reshape(-1)).sum(-1).float()
        elif "place" in roles:
            plane = row.mean(shared, keepdim=True) if shared else row
            scores = sobel(plane, [i for i, role in enumerate(roles) if role == "place"])
        elif shared:
            mean = row.mean([i for i in range(row.ndim) if i not in shared], keepdim=True)
            scores = (row - mean).square().sum(shared, keepdim=True).sqrt()
        else:
            scores = (row - row.mean()).abs()
        scores, names = positions_only(scores, dims)
        return explained(q, as_scores(scores, x), names)


def sobel(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Size of the Sobel gradient along some dimensions of an array of any; edges are repeated.

    A derivative is [-1, 0, 1] / 2 along its own dimension and [1, 2, 1] / 4 along the others: a ramp has its slope.
    """
    squares = torch.zeros_like(x)
    for along in dims:
        g = x
        for d in dims:
            kernel = (-0.5, 0.0, 0.5) if d == along else (0.25, 0.5, 0.25)
            g = _correlate(g, kernel, d)
        squares = squares + g.square()
    return squares.sqrt()


def _correlate(x: Tensor, kernel: Sequence[float], d: int) -> Tensor:
    moved = x.movedim(d, -1)
    n = moved.shape[-1]
    padded = F.pad(moved.reshape(1, -1, n), (1, 1), mode="replicate")
    parts = [k * padded[..., i : i + n] for i, k in enumerate(kernel)]
    return sum(parts[1:], parts[0]).reshape(moved.shape).movedim(-1, d)
