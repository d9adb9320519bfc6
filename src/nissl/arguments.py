"""What arguments may be: checks that say what was given and what is expected."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nissl.errors import InputError


def is_whole(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite real number; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def at_least(name: str, value: object, low: int) -> None:
    """Raise InputError unless `value` is a whole number of at least `low`."""
    if not (is_whole(value) and value >= low):  # pyright: ignore[reportOperatorIssue]
        raise InputError(f"{name} must be a whole number, at least {low}; got {value!r}")


def flag(name: str, value: object) -> None:
    """Raise InputError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name} must be True or False, got {value!r}")


def instance(name: str, value: object, kind: type) -> None:
    """Raise InputError unless `value` is of a class."""
    if not isinstance(value, kind):
        raise InputError(f"{name} must be made by {kind.__name__}(...), got {type(value).__name__} {value!r:.60}")


def items(name: str, value: Any) -> tuple[Any, ...]:
    """What a sequence holds; InputError where it is none."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise InputError(f"{name} must be a sequence, got {value!r:.60}")
    return tuple(value)


def as_path(name: str, value: object) -> Path:
    """The path that a string or path object means; InputError for anything else."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name} must be a path, got {type(value).__name__} {value!r:.60}")
    return Path(value)


def as_images(name: str, value: Any) -> Tensor:
    """Finite floating images (n, channels, y, x) as a float32 tensor on the CPU; InputError otherwise."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor) or value.ndim != 4 or 0 in value.shape or not value.is_floating_point():
        got = f"{tuple(value.shape)} {value.dtype}" if hasattr(value, "shape") else type(value).__name__
        raise InputError(f"{name} must be floating point, (n, channels, y, x), as the network takes them; got {got}")
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"{name} hold NaN or infinity")
    return value.detach().float().cpu()
