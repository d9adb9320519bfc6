"""Targets: which scalar of an answer is explained, one for each row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from nissl.arguments import is_whole
from nissl.errors import TargetError, blame


@dataclass(frozen=True, eq=False)
class Target:
    """A scalar for each row: ``function(tensor, *values) -> (n_rows,)``.

    Parameters
    ----------
    function : callable
        Gets the network's output (or the activation at `site`) and the values, each with n_rows entries.
    values : tuple of Tensor
        Per-row parameters (class indices, labels); one entry stands for all rows.
    site : str, optional
        Explain a scalar of this site instead of the output.
    name : str
        What it is called in Scores and reports.
    """

    function: Callable[..., Tensor]
    values: tuple[Tensor, ...] = ()
    site: str | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TargetError(f"a target needs a function of the output, got {type(self.function).__name__}")
        if not all(isinstance(v, Tensor) and v.ndim for v in self.values):
            raise TargetError(
                f"the values of target {self.name!r} must be tensors, one entry a row; got {self.values!r:.80}"
            )

    def __call__(self, tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, " n"]:
        """The scalar of each row.

        Raises
        ------
        TargetError
            The target does not fit the tensor, or does not give one scalar a row.
        """
        n = tensor.shape[0]
        values = [v.to(tensor.device) for v in self.rows(n).values]
        with blame(TargetError, f"target {self.name!r} failed on a tensor of shape {tuple(tensor.shape)}"):
            scalar = self.function(tensor, *values)
        if not isinstance(scalar, Tensor) or scalar.shape != (n,):
            shape = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
            raise TargetError(f"target {self.name!r} must give one scalar a row, shape ({n},); it gave {shape}")
        return scalar

    def rows(self, n: int) -> Target:
        """The same target with every value spelled out for n rows."""
        if all(v.shape[0] == n for v in self.values):
            return self
        for v in self.values:
            if v.shape[0] not in (1, n):
                raise TargetError(f"target {self.name!r} has {v.shape[0]} entries for {n} rows; give 1 or {n}")
        return Target(self.function, tuple(v.expand(n, *v.shape[1:]) for v in self.values), self.site, self.name)

    def __getitem__(self, index: slice | Tensor) -> Target:
        """Rows of the target; its values must be spelled out first (see `rows`)."""
        return Target(self.function, tuple(v[index] for v in self.values), self.site, self.name)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must agree for two targets to be answered in one batch."""
        return (self.function, self.site, tuple((v.dtype, tuple(v.shape[1:])) for v in self.values))


def _classes(y: Any, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(f"{name}: classes must be whole numbers, got {type(y).__name__}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim > 1:
        raise TargetError(
            f"{name}: classes must be whole numbers, one for all rows or one a row, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(-1).long()


def _table(output: Tensor, position: Tensor | None = None) -> Tensor:
    """The (n_rows, n_classes) table of an output."""
    if position is not None:
        if output.ndim != 3:
            raise TargetError(
                f"position= picks a step of an output (n_rows, n_steps, n_classes); this one has shape "
                f"{tuple(output.shape)}"
            )
        steps = output.shape[1]
        if int(position.min()) < -steps or int(position.max()) >= steps:
            raise TargetError(f"position {int(position[0])} does not exist: the output has {steps} steps")
        return output[torch.arange(len(output), device=output.device), position]
    if output.ndim == 1:
        return output[:, None]
    if output.ndim != 2:
        raise TargetError(
            f"the output has shape {tuple(output.shape)}; a class needs (n_rows, n_classes): "
            "give position= for sequences, or a callable as target"
        )
    return output


def _pick(table: Tensor, y: Tensor) -> Tensor:
    if int(y.min()) < 0 or int(y.max()) >= table.shape[1]:
        raise TargetError(
            f"target class {int(y.max() if int(y.min()) >= 0 else y.min())} does not exist: "
            f"the output has {table.shape[1]} classes, 0 to {table.shape[1] - 1}"
        )
    return table.gather(1, y[:, None])[:, 0]


def _class_logit(output: Tensor, y: Tensor, *position: Tensor) -> Tensor:
    return _pick(_table(output, *position), y)


def _logit_difference(output: Tensor, a: Tensor, b: Tensor, *position: Tensor) -> Tensor:
    table = _table(output, *position)
    return _pick(table, a) - _pick(table, b)


def _log_probability(output: Tensor, y: Tensor, *position: Tensor) -> Tensor:
    return _pick(_table(output, *position).log_softmax(1), y)


def _probability(output: Tensor, y: Tensor, *position: Tensor) -> Tensor:
    return _pick(_table(output, *position).softmax(1), y)


def _top_class(output: Tensor, *position: Tensor) -> Tensor:
    return _table(output, *position).amax(1)


def _unit(activation: Tensor, *index: Tensor) -> Tensor:
    if len(index) != activation.ndim - 1:
        raise TargetError(
            f"a unit of this site is named by {activation.ndim - 1} indices (row shape "
            f"{tuple(activation.shape[1:])}), {len(index)} were given"
        )
    for i, size in zip(index, activation.shape[1:], strict=True):
        if int(i.max()) >= size or int(i.min()) < 0:
            raise TargetError(f"unit index {int(i.max())} is outside a dimension of size {size}")
    return activation[(torch.arange(len(activation), device=activation.device), *index)]


def _unit_mean(activation: Tensor, channel: Tensor) -> Tensor:
    flat = activation.flatten(2).mean(2) if activation.ndim > 2 else activation
    return _pick(flat, channel)


def _position(position: int | None) -> tuple[Tensor, ...]:
    return () if position is None else (_whole("position", position),)


def _whole(name: str, value: Any) -> Tensor:
    if not is_whole(value):
        raise TargetError(f"{name}: whole numbers are needed, got {value!r}")
    return torch.tensor([int(value)])


def class_logit(y: Any, position: int | None = None) -> Target:
    """Output entry of class `y` (one for all rows, or one a row); `position` picks a step of a sequence."""
    return Target(_class_logit, (_classes(y, "class_logit"), *_position(position)), name="class_logit")


def top_class(position: int | None = None) -> Target:
    """Each row's largest output."""
    return Target(_top_class, _position(position), name="top_class")


def logit_difference(a: Any, b: Any, position: int | None = None) -> Target:
    """Output of class `a` minus output of class `b`."""
    values = (_classes(a, "logit_difference"), _classes(b, "logit_difference"), *_position(position))
    return Target(_logit_difference, values, name="logit_difference")


def log_probability(y: Any, position: int | None = None) -> Target:
    """Log of the softmax probability of class `y`."""
    return Target(_log_probability, (_classes(y, "log_probability"), *_position(position)), name="log_probability")


def probability(y: Any, position: int | None = None) -> Target:
    """Softmax probability of class `y`."""
    return Target(_probability, (_classes(y, "probability"), *_position(position)), name="probability")


def loss(function: Callable[[Tensor, Tensor], Tensor], labels: Any) -> Target:
    """A loss for each row: `function(output, labels) -> (n_rows,)`, for instance cross-entropy without reduction."""
    if not callable(function):
        raise TargetError(f"loss needs a function of (output, labels), got {type(function).__name__}")
    with blame(TargetError, "the labels of a loss must be numbers"):
        values = torch.as_tensor(labels)
    return Target(function, (values if values.ndim else values[None],), name="loss")


def unit(site: str, *index: int) -> Target:
    """An inner unit: the activation at `site` at `index` of each row."""
    return Target(_unit, tuple(_whole("unit", i) for i in index), site=site, name=f"unit {site}{list(index)}")


def channel(site: str, index: int) -> Target:
    """Mean activation of channel `index` (axis 1) at `site`."""
    return Target(_unit_mean, (_whole("channel", index),), site=site, name=f"channel {site}[{index}]")


def as_target(target: Any) -> Target:
    """A Target from what users pass: a Target, class indices, a callable, or None for each row's top class."""
    if isinstance(target, Target):
        return target
    if target is None:
        return top_class()
    if callable(target):
        function: Any = target
        return Target(function, name=getattr(target, "__name__", "custom"))
    return class_logit(target)
