"""Regions scored by the dependence of the output on their presence: HSIC attribution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nissl.arguments import at_least
from nissl.attribution.base import Method
from nissl.attribution.masking import Baseline, as_scores, baseline_of, check_baseline, scalars_under
from nissl.attribution.regions import divide
from nissl.errors import InputError
from nissl.runner import CHUNK, Asking, Explained, Question, explained


@dataclass(frozen=True, eq=False)
class HSIC(Method):
    """Dependence between the presence of a region and the target, over random subsets of regions.

    Parameters
    ----------
    n_masks : int, default 500
        Random subsets; each region is present with probability 1/2.
    regions : int, default 49
        About so many regions.
    division : {"superpixels", "grid"}, default "grid"
    baseline : str, number or Tensor, default "zero"
        What stands in for absent regions.

    Notes
    -----
    The Hilbert-Schmidt independence criterion tr(K H L H) / (n - 1)², K equality of presence, L a Gaussian kernel of the
    target whose width is the median distance, H the centring. It has no sign. A region's score is shared equally among
    its positions. Asks `n_masks` rows.

    References
    ----------
    Novello, Fel, Vigouroux: Making sense of dependence: efficient black-box explanations using dependence measure (2022).
    """

    n_masks: int = 500
    regions: int = 49
    division: Literal["superpixels", "grid"] = "grid"
    baseline: Baseline = "zero"

    name: ClassVar[str] = "hsic"
    title: ClassVar[str] = "HSIC attribution"
    paper: ClassVar[str] = "Novello et al. 2022"
    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least("n_masks", self.n_masks, 2)
        at_least("regions", self.regions, 1)
        if self.division not in ("superpixels", "grid"):
            raise InputError(f"division={self.division!r}: choose 'superpixels' or 'grid'")
        check_baseline(self.baseline)

    def at_budget(self, passes: int) -> HSIC:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_masks=max(min(self.n_masks, passes), 2))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        x = yield from q.value()
        b = yield from baseline_of(self.baseline, q, x)
        regions = divide(q, x, self.division, self.regions, None)
        regions = replace(regions, labels=regions.labels.to(x.device))
        present = torch.rand(self.n_masks, regions.n, generator=q.generator("masks")) < 0.5
        y = []
        for few in present.split(CHUNK):
            scalars = yield from scalars_under(q, x, b, regions.masks(few.to(x.device)))
            y.append(scalars)
        scores, dims = regions.share(dependence(present, torch.cat(y)).to(x.device))
        return explained(q, as_scores(scores, x), dims)


def dependence(present: Tensor, y: Tensor) -> Tensor:
    """Hilbert-Schmidt independence criterion of each column of `present` and y.

    Parameters
    ----------
    present : Tensor, bool (n, m)
    y : Tensor (n,)
    """
    apart = (y[:, None] - y[None]).double().abs()
    width = apart[apart > 0].median() if bool((apart > 0).any()) else torch.ones(())
    kernel = torch.exp(-0.5 * (apart / width) ** 2)
    centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    sign = present.double() * 2 - 1  # equality of presence is (1 + s s') / 2, of which the centring leaves s s' / 2
    return ((centred @ sign) * sign).sum(0) / (2 * (len(y) - 1) ** 2)
