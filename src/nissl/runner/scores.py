"""Scores: what methods return, as labelled arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from nissl.errors import InputError
from nissl.runner.question import Question


@dataclasses.dataclass(frozen=True)
class Explained:
    """What a method returns for one example.

    Attributes
    ----------
    values : Tensor
        Scores without a row dimension.
    dims : tuple of str
        Names of its dimensions.
    extra : dict of str to float
        Facts such as ``completeness_gap``.
    """

    values: Tensor
    dims: tuple[str, ...]
    extra: dict[str, float] = dataclasses.field(default_factory=dict)


def explained(q: Question, values: Tensor, dims: Sequence[str] | None = None, **extra: float) -> Explained:
    """Scores of one example; dimensions are named after the site where they are not given."""
    values = values.detach()
    names = tuple(dims) if dims is not None else q.network.dims_of(q.site, tuple(values.shape))
    if len(names) != values.ndim:
        raise InputError(f"scores of shape {tuple(values.shape)} need {values.ndim} dimension names, got {names}")
    return Explained(values, names, extra)


def build_scores(
    results: Sequence[Explained], name: str, method: Any, q: Question, seed: int, cost: Mapping[str, int | float]
) -> xr.DataArray:
    """Scores of all examples as one array, first dimension ``example``, with everything needed to repeat them."""
    shapes = {tuple(r.values.shape) for r in results}
    if len(shapes) > 1:
        raise InputError(f"{name}: examples gave scores of different shapes {sorted(shapes)}; explain them one by one")
    values = torch.stack([r.values for r in results]).cpu()
    array = values.float().numpy() if values.dtype in (torch.bfloat16, torch.float16) else values.numpy()
    coords: dict[str, Any] = {"example": np.arange(len(results))}
    for key in results[0].extra:
        coords[key] = ("example", np.array([r.extra.get(key, np.nan) for r in results]))
    return xr.DataArray(
        array,
        dims=("example", *results[0].dims),
        coords=coords,
        name=name,
        attrs={
            "method": type(method).__name__,
            "parameters": json.dumps(parameters_of(method), sort_keys=True),
            "paper": getattr(method, "paper", ""),
            "target": q.target.name,
            "site": q.site,
            "forward_passes": int(cost["forward"]),
            "backward_passes": int(cost["backward"]),
            "reused_passes": int(cost["reused"]),
            "seconds": round(float(cost["seconds"]), 3),
            "seed": seed,
            "network": q.network.name,
            "fingerprint": q.network.fingerprint(),
        },
    )


def parameters_of(method: Any) -> dict[str, Any]:
    """A method's parameters as plain values."""
    if not dataclasses.is_dataclass(method):
        return {}

    def plain(v: Any) -> Any:
        if isinstance(v, (int, float, str, bool)) or v is None:
            return v
        if isinstance(v, (tuple, list)):
            return [plain(x) for x in v]
        if isinstance(v, (Tensor, np.ndarray)):
            return f"{type(v).__name__} {tuple(v.shape)}"
        return repr(v)

    return {f.name: plain(getattr(method, f.name)) for f in dataclasses.fields(method)}
