"""What every attribution method is: parameters and a generator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import xarray as xr

from nissl.arguments import at_least, instance
from nissl.network import Network
from nissl.runner import Asking, Explained, Question, Runner


class Method(ABC):
    """A way to give scores to the units of a site.

    A method is a frozen dataclass of its parameters with one generator, `explain`, for one example: it yields Passes,
    receives Answers and returns scores. It knows nothing of devices, batches or caches.
    """

    name: ClassVar[str]
    """Short key, as on the command line."""
    title: ClassVar[str]
    """Name in the literature."""
    paper: ClassVar[str]
    """Source."""
    differentiates: ClassVar[bool] = False
    """Whether it asks for gradients; at token ids it is then taken at their embedding."""
    complete: ClassVar[bool] = False
    """Whether its scores promise to sum to f(x) - f(baseline); it then reports ``completeness_gap``."""
    class_sensitive: ClassVar[bool] = True
    """Whether the scores are said to depend on which class is explained."""
    positive: ClassVar[bool] = False
    """Whether only size is meant, not sign."""

    @abstractmethod
    def explain(self, q: Question) -> Asking[Explained]:
        """Scores for one example: a generator that yields Passes and returns `explained(q, values)`."""

    def at_budget(self, passes: int) -> Method:
        """The same method asking for about that many rows an example; methods of fixed cost stay as they are.

        Raises
        ------
        InputError
            `passes` is no whole number, or below 1.
        """
        at_least("passes", passes, 1)
        return self

    def attribute(
        self,
        network: Network,
        inputs: Any,
        target: Any = None,
        *,
        site: str | None = None,
        seed: int = 0,
        runner: Runner | None = None,
    ) -> xr.DataArray:
        """Scores for all examples.

        Parameters
        ----------
        network : Network
        inputs : Tensor, array, tuple or mapping
            Examples first.
        target : Target, class indices (one for all or one an example), callable or None
            What is explained; None is each example's top class.
        site : str, optional
            Where scores are wanted (ML-Att); by default the input.
        seed : int, default 0
        runner : Runner, optional
            To share batches, cache and costs with other calls.

        Returns
        -------
        xarray.DataArray
            First dimension ``example``; ``attrs`` hold method, parameters, target, cost, seed and fingerprint.
        """
        runner = Runner() if runner is None else runner
        instance("runner", runner, Runner)
        return runner.attribute({self.name: self}, network, inputs, target, site=site, seed=seed)[self.name]
