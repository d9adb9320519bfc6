"""Edits: what a Pass changes at a site on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from nissl.arguments import at_least
from nissl.errors import InputError, SiteError, blame
from nissl.network.site import parse

if TYPE_CHECKING:
    from nissl.network.passes import Answer


@dataclass(frozen=True, eq=False)
class Edit:
    """One change at one site; made by `Set`, `Add`, `Scale`, `Ablate`, `Patch` or `Apply`.

    Attributes
    ----------
    site : str
        Address of the site.
    kind : {"set", "add", "scale", "apply"}
    value : Tensor or None
        A scalar; a vector with one entry for each unit; or a tensor whose first dimension is rows (n_rows or 1), the
        others broadcasting against the site.
    function : callable or None
        For ``apply``: maps the activation (rows first) to one of the same shape, each row by itself.
    units, positions : Tensor or None
        Indices on the unit axis; indices on the first other axis (token, time), or a bool mask of the other axes.
    rows : Tensor or None
        Bool (n_rows,): which rows are edited.
    where : Tensor or None
        Bool, rows first, broadcasting against the site: which entries are edited.
    """

    site: str
    kind: Literal["set", "add", "scale", "apply"]
    value: Tensor | None = None
    function: Callable[[Tensor], Tensor] | None = None
    units: Tensor | None = None
    positions: Tensor | None = None
    rows: Tensor | None = None
    where: Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether the edit sets every entry of the site."""
        return self.kind == "set" and all(m is None for m in (self.units, self.positions, self.rows, self.where))

    def spread(self, n: int) -> Edit:
        """The same edit with row-wise parts spelled out for n rows, and its site in its plain spelling."""
        value, rows, where = self.value, self.rows, self.where
        if value is not None and value.ndim >= 2:
            value = _expand(value, n, self.site, "value")
        if rows is not None and rows.shape[0] != n:
            raise InputError(f"edit at {self.site!r}: examples= speaks of {rows.shape[0]} rows, the pass has {n}")
        if where is not None:
            where = _expand(where, n, self.site, "where")
        return replace(self, site=str(parse(self.site)), value=value, rows=rows, where=where)

    def __getitem__(self, index: slice) -> Edit:
        """Rows of a spread edit."""
        value = self.value[index] if self.value is not None and self.value.ndim >= 2 else self.value
        return replace(
            self,
            value=value,
            rows=None if self.rows is None else self.rows[index],
            where=None if self.where is None else self.where[index],
        )

    def apply(self, t: Shaped[Tensor, "n ..."], axis: int) -> Shaped[Tensor, "n ..."]:
        """The activation `t` (rows first, units on `axis`) after the edit."""
        n = t.shape[0]
        if self.kind == "apply":
            assert self.function is not None
            with blame(InputError, f"edit at {self.site!r}: the function failed"):
                new = self.function(t)
            if not isinstance(new, Tensor) or new.shape != t.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise InputError(f"edit at {self.site!r}: the function must keep shape {tuple(t.shape)}, it gave {got}")
            new = new if new is t else new.clone()  # it may keep what it returned, and the network may write over it
        else:
            value = self._fit(t, axis)
            if self.kind == "set":
                # the network may write over what it is given; the value belongs to the user
                new = value.expand_as(t).clone()
            elif self.kind == "add":
                new = t + value
            else:
                new = t * value
        mask = self._mask(t, axis, n)
        return new if mask is None else torch.where(mask, new, t)

    def _fit(self, t: Tensor, axis: int) -> Tensor:
        assert self.value is not None
        whole = not (t.is_floating_point() or t.is_complex())
        if whole and self.value.is_floating_point() and bool((self.value != self.value.round()).any()):
            raise InputError(
                f"edit at {self.site!r}: the activation holds whole numbers ({t.dtype}), the value does not"
            )
        # A stubbed module hands on a tensor without data (see Network.run); what is set there keeps its own device.
        device = self.value.device if t.is_meta else t.device
        value = self.value.to(device=device, dtype=t.dtype if not self.value.is_complex() else None)
        if value.ndim == 1:
            if value.shape[0] != t.shape[axis]:
                raise InputError(
                    f"edit at {self.site!r}: a vector needs one entry for each of the {t.shape[axis]} units, "
                    f"it has {value.shape[0]}"
                )
            shape = [1] * t.ndim
            shape[axis] = -1
            value = value.reshape(shape)
        elif value.ndim >= 2:
            value = _after_rows(value, t.ndim)
        self._require_fit("value", self.value, value, t)
        return value

    def _require_fit(self, name: str, given: Tensor, spread: Tensor, t: Tensor) -> None:
        try:
            fits = torch.broadcast_shapes(spread.shape, t.shape) == t.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InputError(
                f"edit at {self.site!r}: {name} of shape {tuple(given.shape)} does not fit an activation of shape "
                f"{tuple(t.shape)} (rows first)"
            )

    def _mask(self, t: Tensor, axis: int, n: int) -> Tensor | None:
        mask: Tensor | None = None

        def both(more: Tensor) -> Tensor:
            return more if mask is None else mask & more

        if self.where is not None:
            where = _after_rows(self.where.to(t.device), t.ndim)
            self._require_fit("where", self.where, where, t)
            mask = both(where)
        if self.rows is not None:
            mask = both(self.rows.to(t.device).reshape(n, *[1] * (t.ndim - 1)))
        if self.units is not None:
            mask = both(_index_mask(self.units, t, axis, self.site, "unit"))
        if self.positions is not None:
            others = [d for d in range(1, t.ndim) if d != axis]
            if self.positions.dtype == torch.bool and self.positions.ndim == len(others):
                shape = [1] * t.ndim
                for d, size in zip(others, self.positions.shape, strict=True):
                    if size != t.shape[d]:
                        raise SiteError(
                            f"edit at {self.site!r}: positions mask of shape {tuple(self.positions.shape)} does not "
                            f"fit an activation of shape {tuple(t.shape)}"
                        )
                    shape[d] = size
                mask = both(self.positions.to(t.device).reshape(shape))
            elif others:
                mask = both(_index_mask(self.positions, t, others[0], self.site, "position"))
            else:
                raise SiteError(f"edit at {self.site!r}: an activation of shape {tuple(t.shape)} has no positions")
        return mask

    @property
    def kind_key(self) -> tuple[Any, ...]:
        """What must agree for two edits to be made in one batch."""

        def exact(x: Tensor | None) -> Any:
            return None if x is None else (x.dtype, tuple(x.shape), x.cpu().numpy().tobytes())

        value = self.value
        shape = None if value is None else exact(value) if value.ndim < 2 else tuple(value.shape[1:])
        where = None if self.where is None else tuple(self.where.shape[1:])
        return (self.site, self.kind, self.function, shape, exact(self.units), exact(self.positions),
                self.rows is not None, where)  # fmt: skip


def _expand(value: Tensor, n: int, site: str, name: str) -> Tensor:
    if value.shape[0] == n:
        return value
    if value.shape[0] == 1:
        return value.expand(n, *value.shape[1:])
    raise InputError(f"edit at {site!r}: {name} has {value.shape[0]} rows, the pass has {n}; give 1 or {n}")


def _after_rows(value: Tensor, ndim: int) -> Tensor:
    if value.ndim > ndim:
        return value
    return value.reshape(value.shape[0], *[1] * (ndim - value.ndim), *value.shape[1:])


def _index_mask(index: Tensor, t: Tensor, axis: int, site: str, what: str) -> Tensor:
    size = t.shape[axis]
    if index.dtype != torch.bool:
        if index.numel() and (int(index.max()) >= size or int(index.min()) < -size):
            raise SiteError(f"edit at {site!r}: there are {size} {what}s, {what} {int(index.max())} is not one of them")
        mask = torch.zeros(size, dtype=torch.bool, device=t.device)
        mask[index.to(t.device)] = True
    elif index.shape == (size,):
        mask = index.to(t.device)
    else:
        raise SiteError(f"edit at {site!r}: a {what} mask needs shape ({size},), it has {tuple(index.shape)}")
    shape = [1] * t.ndim
    shape[axis] = size
    return mask.reshape(shape)


def _where(site: str, units: Any, positions: Any, examples: Any, where: Any) -> dict[str, Any]:
    def index(x: Any, name: str) -> Tensor | None:
        if x is None:
            return None
        try:
            t = torch.as_tensor(x)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"edit at {site!r}: {name}= takes indices or a bool mask, got {x!r}") from error
        if t.is_floating_point():
            raise InputError(f"edit at {site!r}: {name}= takes indices or a bool mask, got {t.dtype}")
        return t.reshape(-1) if t.ndim == 0 else t

    rows = index(examples, "examples")
    if rows is not None and (rows.dtype != torch.bool or rows.ndim != 1):
        raise InputError(f"edit at {site!r}: examples= takes a bool mask with one entry a row")
    mask = index(where, "where")
    if mask is not None and (mask.dtype != torch.bool or isinstance(where, bool)):
        raise InputError(f"edit at {site!r}: where= takes a bool mask, rows first")
    return {"units": index(units, "units"), "positions": index(positions, "positions"), "rows": rows, "where": mask}


def _value(site: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"edit at {site!r}: a number or tensor is needed, got {type(value).__name__}") from error
    return tensor.detach()


def Set(
    site: str, value: Any, *, units: Any = None, positions: Any = None, examples: Any = None, where: Any = None
) -> Edit:
    """Replace the activation by `value`."""
    return Edit(site, "set", _value(site, value), **_where(site, units, positions, examples, where))


def Add(
    site: str, value: Any, *, units: Any = None, positions: Any = None, examples: Any = None, where: Any = None
) -> Edit:
    """Add `value` to the activation."""
    return Edit(site, "add", _value(site, value), **_where(site, units, positions, examples, where))


def Scale(
    site: str, factor: Any, *, units: Any = None, positions: Any = None, examples: Any = None, where: Any = None
) -> Edit:
    """Multiply the activation by `factor`."""
    return Edit(site, "scale", _value(site, factor), **_where(site, units, positions, examples, where))


def Ablate(
    site: str,
    how: Literal["zero", "mean", "resample"] = "zero",
    *,
    reference: Answer | Tensor | None = None,
    seed: int = 0,
    units: Any = None,
    positions: Any = None,
    examples: Any = None,
    where: Any = None,
) -> Edit:
    """Switch units off.

    Parameters
    ----------
    how : {"zero", "mean", "resample"}
        Set to zero; to the mean over the rows of `reference`; or to a row of it drawn with `seed`.
    reference : Answer or Tensor (n_reference, ...), optional
        Activations at this site for ``mean`` and ``resample``.
    """
    if how == "zero":
        value = torch.tensor(0.0)
    elif how in ("mean", "resample"):
        if reference is None:
            raise InputError(f"ablating {site!r} by {how} needs reference=, activations of this site (rows first)")
        acts = reference if isinstance(reference, Tensor) else _read(reference, site, "reference")
        if acts.ndim == 0 or len(acts) == 0:
            raise InputError(f"reference for {site!r} has shape {tuple(acts.shape)}; at least 1 is needed, rows first")
        if how == "mean":
            if not (acts.is_floating_point() or acts.is_complex()):
                raise InputError(f"reference for {site!r} holds whole numbers ({acts.dtype}), which have no mean")
            value = acts.mean(0, keepdim=True)
        else:
            at_least("seed", seed, 0)
            row = int(torch.randint(acts.shape[0], (1,), generator=torch.Generator().manual_seed(seed)))
            value = acts[row : row + 1]
    else:
        raise InputError(f"how={how!r} is not a way to ablate; choose 'zero', 'mean' or 'resample'")
    return Edit(site, "set", value.detach(), **_where(site, units, positions, examples, where))


def Patch(
    site: str, source: Answer, *, units: Any = None, positions: Any = None, examples: Any = None, where: Any = None
) -> Edit:
    """Put the activation that another Answer read at this site in its place."""
    return Edit(site, "set", _read(source, site, "source").detach(), **_where(site, units, positions, examples, where))


def Apply(
    site: str,
    function: Callable[[Tensor], Tensor],
    *,
    units: Any = None,
    positions: Any = None,
    examples: Any = None,
    where: Any = None,
) -> Edit:
    """Replace the activation by a function of it, each row by itself."""
    if not callable(function):
        raise InputError(f"edit at {site!r}: a function is needed, got {type(function).__name__}")
    return Edit(site, "apply", None, function, **_where(site, units, positions, examples, where))


def _read(answer: Any, site: str, name: str) -> Tensor:
    reads = getattr(answer, "reads", None)
    if not isinstance(reads, Mapping):
        raise InputError(f"{name} for {site!r} must be an Answer that read this site, got {type(answer).__name__}")
    if site not in reads:
        raise SiteError(f"the answer holds no activation of {site!r}; it read {sorted(reads)}")
    return reads[site]
