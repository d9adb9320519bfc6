"""Sites: the places in a network where a Pass may read, edit or differentiate."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nissl.errors import SiteError

_ADDRESS = re.compile(
    r"^(?P<module>[^:#]+)(?::(?P<part>in|out|pattern|scores)(?:\.(?P<key>[\w-]+))?)?(?:#(?P<call>\d+))?$"
)
_INPUT = re.compile(r"^input(?::(?P<key>[\w-]+))?$")


@dataclass(frozen=True)
class Address:
    """A parsed site address.

    ``"features.3"`` is the output of that module, ``"features.3:in"`` its input, ``"attn:out.1"`` the second element of
    a tuple output, ``"attn:in.mask"`` a keyword input, ``"attn:pattern"`` the attention pattern computed inside the
    module, ``"attn:scores"`` what the softmax makes it of, ``"input"`` the input of the network, ``"input:pixel_values"`` one of several; ``#2`` picks the second call.
    """

    module: str
    part: str
    key: str | None = None
    call: int | None = None

    def __str__(self) -> str:
        if self.part == "input":
            return "input" if self.key is None else f"input:{self.key}"
        text = self.module
        if self.key is not None or self.part != "out" or self.module == "input":
            text += f":{self.part}"
        if self.key is not None:
            text += f".{self.key}"
        return text if self.call is None else f"{text}#{self.call}"


def parse(text: str) -> Address:
    """Parse a site address; raises SiteError where it is not one."""
    if not isinstance(text, str):
        raise SiteError(f"a site is named by a string such as 'features.3' or 'input', not by {type(text).__name__}")
    if (found := _INPUT.match(text)) and found["key"] not in ("in", "out", "pattern", "scores"):
        return Address("", "input", found["key"])
    if found := _ADDRESS.match(text):
        call = found["call"]
        if call is not None and int(call) < 1:
            raise SiteError(f"{text!r}: calls are counted from #1")
        return Address(found["module"], found["part"] or "out", found["key"], None if call is None else int(call))
    raise SiteError(
        f"{text!r} is not a site address; write 'module.name', 'module.name:in', 'module.name#2' or 'input'"
    )


@dataclass(frozen=True)
class Site:
    """A place in a network.

    Attributes
    ----------
    address : str
        What a Pass calls it.
    role : str
        ``input``, ``conv``, ``linear``, ``norm``, ``activation``, ``pool``, ``embedding``, ``attention``,
        ``pattern``, ``dropout`` or ``block``.
    shape : tuple of int or None
        Shape of one row, without the leading row dimension; None before the network has seen an input.
    n_units : int or None
        Number of units: channels of a convolution, the last dimension elsewhere.
    """

    address: str
    role: str
    shape: tuple[int, ...] | None
    n_units: int | None


def role_of(module: nn.Module) -> str:
    """Role of a module by its type; attention is recognised by name, since it has no common class."""
    name = type(module).__name__.lower()
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(module, (nn.Linear, nn.Bilinear)):
        return "linear"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if "attention" in name or "attn" in name:
        return "attention"
    if "norm" in name:
        return "norm"
    if "pool" in name:
        return "pool"
    if "dropout" in name or "droppath" in name:
        return "dropout"
    if type(module).__module__ == "torch.nn.modules.activation" or "gelu" in name or "swish" in name:
        return "activation"
    return "block"


def unit_axis(module: nn.Module | None, ndim: int) -> int:
    """Axis of the units in an activation of `ndim` dimensions, rows included.

    Convolutions and their norms have units on axis 1, everything with a last feature axis there; where the module does
    not say, four and more dimensions mean an image-like map (axis 1), fewer the last axis.
    """
    if ndim <= 2:
        return ndim - 1
    channels_first = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    if isinstance(module, channels_first):
        return 1
    if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
        return ndim - 1
    return 1 if ndim >= 4 else ndim - 1


def rows_apart(t: Tensor, n: int) -> Tensor:
    """An activation with its rows first: (n * n_tokens, width), as OPT and mixtures of experts keep it, is parted."""
    flat = t.ndim == 2 and n > 0 and t.shape[0] != n and t.shape[0] % n == 0
    return t.reshape(n, -1, t.shape[1]) if flat else t


def select(structure: Any, key: str | None, where: str) -> Tensor:
    """The tensor that a site means inside what a module took or returned."""
    if isinstance(structure, Tensor):
        if key not in (None, "0"):
            raise SiteError(f"{where}: there is one tensor here, no element {key!r}")
        return structure
    items = items_of(structure)
    if not items and not isinstance(structure, (tuple, list, Mapping)):
        raise SiteError(f"{where}: holds {type(structure).__name__}, not a tensor")
    if key is not None:
        value = items.get(key)
        if not isinstance(value, Tensor):
            tensors = [k for k, v in items.items() if isinstance(v, Tensor)]
            raise SiteError(f"{where}: no tensor {key!r} here; there are {tensors}")
        return value
    for value in items.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    for value in items.values():
        if isinstance(value, Tensor):
            return value
    raise SiteError(f"{where}: holds no tensor")


def substitute(structure: Any, key: str | None, old: Tensor, new: Tensor) -> Any:
    """`structure` with the tensor `old` replaced by `new`: only under `key`, or wherever it stands if there is none."""
    if structure is old:
        return new
    changed = {k: new if v is old and key in (None, k) else v for k, v in items_of(structure).items()}
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*changed.values())
    if isinstance(structure, (tuple, list)):
        return type(structure)(changed.values())
    if isinstance(structure, Mapping):
        return type(structure)(**changed) if type(structure) is not dict else changed
    return structure


def items_of(structure: Any) -> dict[str, Any]:
    """What a tuple, list or mapping holds, by the keys that an address uses; nothing for anything else."""
    if isinstance(structure, (tuple, list)):
        return {str(i): v for i, v in enumerate(structure)}
    return dict(structure) if isinstance(structure, Mapping) else {}
