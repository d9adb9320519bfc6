"""What every check is: a question about scores, put to the network that they explain."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import instance
from nissl.attribution.masking import Features
from nissl.errors import InputError
from nissl.network import Network
from nissl.runner import Asking, Explained, Question, Runner, make_questions


@dataclass(frozen=True)
class Figure:
    """What a number means.

    Attributes
    ----------
    check, title, help : str
    better : {"higher", "lower", None}
    chance : float or None
        Value of scores that know nothing, where that is known beforehand.
    """

    check: str
    title: str
    help: str
    better: str | None = "higher"
    chance: float | None = None


@dataclass
class Measured:
    """What a check found for one example.

    Attributes
    ----------
    figures : dict of name to float
    curves : dict of name to (x, y)
    maps : dict of name to array
        Maps worth looking at, such as the scores of the randomised network.
    """

    figures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    def __or__(self, other: Measured) -> Measured:
        return Measured({**self.figures, **other.figures}, {**self.curves, **other.curves}, {**self.maps, **other.maps})


@runtime_checkable
class Explainer(Protocol):
    """What a check may run again: a method."""

    differentiates: ClassVar[bool]

    def explain(self, q: Question) -> Asking[Explained]: ...  # noqa: D102


class Check(ABC):
    """A test of scores, for one example at a time: a generator like a method's.

    Attributes
    ----------
    name : str
    figures : dict of name to Figure
        What `measure` reports.
    reruns : bool
        Whether the method itself is run again (on other inputs, weights or classes).
    """

    name: ClassVar[str]
    figures: ClassVar[dict[str, Figure]]
    reruns: ClassVar[bool] = False

    @abstractmethod
    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """Figures of one example; `q` asks at the input, `method` is what gave the scores."""

    def evaluate(
        self,
        network: Network,
        inputs: Any,
        scores: xr.DataArray,
        target: Any = None,
        *,
        method: Explainer | None = None,
        seed: int = 0,
        runner: Runner | None = None,
    ) -> pd.DataFrame:
        """Figures for all examples.

        Parameters
        ----------
        network, inputs, target
            What was explained.
        scores : xarray.DataArray
            First dimension ``example``, in the order of the inputs.
        method : Method, optional
            Needed by checks that run the method again.

        Returns
        -------
        pandas.DataFrame
            One row an example, one column a figure.

        Raises
        ------
        InputError
            Scores of another number of examples, that are no finite numbers, or no method where one is needed.
        """
        questions = make_questions(network, inputs, target, seed)
        if not isinstance(scores, xr.DataArray) or scores.dims[:1] != ("example",):
            raise InputError("scores must be an xarray.DataArray whose first dimension is 'example'")
        if len(scores) != len(questions):
            raise InputError(f"there are {len(questions)} examples, but scores of {len(scores)}")
        if scores.dtype.kind not in "biuf" or not np.isfinite(scores.values).all():
            raise InputError(f"scores must be finite numbers; these are {scores.dtype}, or hold NaN or infinity")
        if method is not None and (isinstance(method, type) or not isinstance(method, Explainer)):
            raise InputError(f"method={method!r:.60} is not a method; use for instance IntegratedGradients()")
        if self.reruns and method is None:
            raise InputError(f"{self.name} runs the method again: give method=, for instance IntegratedGradients()")
        dims = tuple(str(d) for d in scores.dims[1:])
        rows = [Explained(torch.as_tensor(np.asarray(s.values)), dims) for s in scores]
        starts = [partial(self.measure, q, s, method) for q, s in zip(questions, rows, strict=True)]
        runner = Runner() if runner is None else runner
        instance("runner", runner, Runner)
        found = [m.figures for m in runner.collect(network, starts, self.name)]
        return pd.DataFrame(found, index=pd.RangeIndex(len(questions), name="example"))


def on(network: Network, asking: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The same questions, put to another network."""
    answer = None
    while True:
        try:
            asked = asking.send(answer)
        except StopIteration as stop:
            return stop.value
        if isinstance(asked, list):
            answer = yield [a if isinstance(a, tuple) else (network, a) for a in asked]
        else:
            answer = yield asked if isinstance(asked, tuple) else (network, asked)


_SUMMED = {("channel", "y", "x"): ("channel",), ("token", "unit"): ("unit",)}


def positions(scores: Explained) -> Tensor:
    """Scores by position: channels of images and units of tokens are summed, the rest stays."""
    summed = [scores.dims.index(d) for d in _SUMMED.get(scores.dims, ())]
    return scores.values.float().sum(summed) if summed else scores.values.float()


def sizes(scores: Explained, signed: bool = False) -> Tensor:
    """Positions as a flat vector, by size where sign does not count."""
    flat = positions(scores).reshape(-1)
    return flat if signed else flat.abs()


def by_feature(scores: Explained, features: Features, shape: tuple[int, ...]) -> Tensor:
    """Sum of the scores over each feature, (n_features,).

    Parameters
    ----------
    scores : Explained
        At the input, or a map of another resolution or with fewer dimensions, which is spread over the input first.
    features : Features
    shape : tuple of int
        Shape of one row of the input.
    """
    s = positions(scores)
    labels = features.labels
    wanted = tuple(labels.shape[1:]) if labels.ndim == 3 else tuple(labels.shape)
    if labels.ndim == 2 and labels.shape[1] == 1:  # tokens with their units
        wanted = (labels.shape[0],)
    if len(wanted) == 2 and s.ndim == 1 and s.shape[0] == wanted[1]:  # one score for each time, all channels alike
        s = s.expand(wanted) / wanted[0]
    if s.ndim != len(wanted):
        raise InputError(f"scores with dimensions {scores.dims} do not fit an input whose rows have shape {shape}")
    if tuple(s.shape) != wanted:
        dims = [d for d in scores.dims if d not in _SUMMED.get(scores.dims, ())]
        for d, got, n in zip(dims, s.shape, wanted, strict=True):
            if got != n and d not in ("x", "y", "time"):  # only neighbours can be interpolated between
                raise InputError(f"{got} {d}s have scores, the input has {n}")
        mode = "bilinear" if s.ndim == 2 else "linear"
        s = F.interpolate(s[None, None], wanted, mode=mode, align_corners=False)[0, 0]
    total = torch.zeros(features.n, dtype=s.dtype, device=s.device)
    return total.index_add_(0, labels.reshape(-1).to(s.device), s.reshape(-1))


def require_alike(a: Tensor, b: Tensor) -> None:
    """Raise InputError where two maps have not the same number of entries."""
    if a.numel() != b.numel():
        raise InputError(f"maps of {a.numel()} and {b.numel()} entries cannot be compared")


def similarity(a: Tensor, b: Tensor) -> float:
    """Spearman rank correlation; a map without variation is like another only if that has none either."""
    require_alike(a, b)
    flat_a, flat_b = bool((a == a[0]).all()), bool((b == b[0]).all())
    if flat_a or flat_b:
        return 1.0 if flat_a and flat_b else 0.0
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(t.detach().cpu().numpy()) for t in (a, b)])
    return float(np.corrcoef(ranks)[0, 1])
