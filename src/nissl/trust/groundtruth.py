"""Ground truth from the user's own network and images: grids in which it is known where scores can and cannot be.

Images of several classes are put on an n × n grid. `GridPG` shows the grid to the plain network; in `DiFull` each head
sees its own cell only, so that scores elsewhere are provably wrong; in `DiPart` it sees its part of the last map of
features. Each of the three is a Network whose input is the activation at a layer: every method runs on it unchanged.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from einops import rearrange
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least, instance, is_number, is_whole, items
from nissl.attribution.base import Method
from nissl.errors import InputError, NisslError, blame
from nissl.network import Network, Pass, target
from nissl.network.part import Part, above
from nissl.network.site import Address, parse, role_of
from nissl.runner import Asking, Explained, Job, Question, Runner
from nissl.trust.statistics import bootstrap

LEAST = 1e-7
"""Sum of positive scores up to which a map counts as empty and scores 0."""

# ---------------------------------------------------------------- grids


@dataclass(frozen=True, eq=False)
class Grids:
    """Images on grids; cells are numbered row by row.

    Attributes
    ----------
    images : Tensor (n_grids, channels, n * height, n * width)
    labels : Tensor (n_grids, n * n)
        Class of each cell.
    sources : Tensor (n_grids, n * n)
        Which of the given images is in each cell.
    n : int
    notes : tuple of str
        What had to be done with too few images.
    """

    images: Tensor
    labels: Tensor
    sources: Tensor
    n: int
    notes: tuple[str, ...] = ()


def make_grids(
    images: Tensor,
    labels: Any,
    n: int = 2,
    *,
    n_grids: int | None = None,
    repeat_corners: bool = False,
    seed: int | torch.Generator = 0,
) -> Grids:
    """Grids of images of distinct classes.

    Parameters
    ----------
    images : Tensor (n_images, channels, height, width)
    labels : class indices (n_images,)
    n : int, default 2
        Cells on a side.
    n_grids : int, optional
        By default as many as can be made without using an image twice.
    repeat_corners : bool, default False
        Give the last cell the class of the first (another image of it), so that scores that find a class but not its
        place are caught.
    seed : int or torch.Generator, default 0

    Returns
    -------
    Grids
        Images are used again, in a new order, once too few are unused; if no class has two images, the same image is in
        both corners. `notes` says so.

    Raises
    ------
    InputError
        Fewer classes than a grid needs, or labels that do not fit.

    References
    ----------
    Rao, Böhle, Schiele: Better understanding differences in attribution methods via systematic evaluations (2023).
    """
    at_least("n", n, 2)
    if n_grids is not None:
        at_least("n_grids", n_grids, 1)
    y = _labels(labels, len(images))
    if images.ndim != 4:
        raise InputError(f"images must be (n_images, channels, height, width), got shape {tuple(images.shape)}")
    n_classes = n * n - repeat_corners
    rows = {c: np.flatnonzero(y == c) for c in np.unique(y)}
    if len(rows) < n_classes:
        raise InputError(
            f"a {n} × {n} grid needs images of {n_classes} classes, there are {len(rows)}: "
            "give more images, or a smaller n"
        )
    if not isinstance(seed, torch.Generator):
        at_least("seed", seed, 0)
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def shuffled(items: Sequence[Any] | np.ndarray) -> list[Any]:
        return [items[int(i)] for i in torch.randperm(len(items), generator=generator)]

    fresh = {c: shuffled(r) for c, r in rows.items()}
    used = np.zeros(len(y), dtype=int)
    chosen: list[list[int]] = []
    n_same = 0
    while n_grids is None or len(chosen) < n_grids:
        able = [c for c in fresh if fresh[c]]
        if len(able) < n_classes:
            if n_grids is None:
                break
            fresh = {c: shuffled(r) for c, r in rows.items()}
            able = list(fresh)
        if repeat_corners:
            twice = [c for c in able if len(fresh[c]) > 1] or [c for c in able if len(rows[c]) > 1] or able
            corner = shuffled(twice)[0]
            drawn = [corner, *shuffled([c for c in able if c != corner])[: n_classes - 1]]
        else:
            drawn = shuffled(able)[:n_classes]
        cells = [int(fresh[c].pop()) for c in drawn]
        if repeat_corners:
            others = shuffled([i for i in rows[drawn[0]] if i != cells[0]])
            cells.append(int(fresh[drawn[0]].pop() if fresh[drawn[0]] else (others or cells)[0]))
            n_same += cells[0] == cells[-1]
        used[cells] += 1
        chosen.append(cells)
    notes = []
    if used.max() > 1 + (n_same > 0):
        notes.append(f"{len(y)} images make {len(chosen)} grids: single images are in up to {used.max()} cells")
    if n_same:
        notes.append(
            f"{n_same} of {len(chosen)} grids show the same image in both corners: no class has two images left"
        )
    sources = torch.tensor(chosen)
    return Grids(stitch(images[sources.to(images.device)]), torch.from_numpy(y)[sources], sources, n, tuple(notes))


def _labels(labels: Any, n_images: int) -> np.ndarray:
    y = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if y.shape != (n_images,) or y.dtype.kind not in "iu":
        raise InputError(f"labels must be {n_images} class indices, got {y.dtype} of shape {y.shape}")
    return y.astype(np.int64)


def stitch(cells: Tensor) -> Tensor:
    """Grids (n_rows, channels, n * h, n * w) from cells (n_rows, n * n, channels, h, w)."""
    return rearrange(cells, "b (r s) c h w -> b c (r h) (s w)", r=round(cells.shape[1] ** 0.5))


def cut(grids: Tensor, n: int) -> Tensor:
    """Cells (n_rows, n * n, channels, h, w) of grids; the inverse of `stitch`.

    Raises
    ------
    InputError
        The sides of the grids are no multiples of n.
    """
    if grids.shape[-2] % n or grids.shape[-1] % n:
        raise InputError(f"a map of {grids.shape[-2]} × {grids.shape[-1]} cannot be cut into {n} × {n} equal cells")
    return rearrange(grids, "b c (r h) (s w) -> b (r s) c h w", r=n, s=n)


# ---------------------------------------------------------------- networks on grids


def map_sites(network: Network, inputs: Any = None) -> dict[str, str]:
    """Where ``"input"``, ``"middle"`` and ``"final"`` are in a network for images.

    Parameters
    ----------
    network : Network
    inputs : optional
        What the network takes, if it has seen no input yet.

    Returns
    -------
    dict of name to site
        ``final`` is the last map of features (several positions, not behind a pool) at which the network can be cut;
        ``middle`` the place before it that is nearest to two thirds of the convolutions. Left out where there is none.
    """
    if inputs is not None:
        network.sites(inputs=inputs)
    trace = network.trace_of()
    found: list[tuple[int, str]] = []  # convolutions so far, site
    n_convs, inner = 0, ""
    for i, (part, name, call) in enumerate(trace.events):
        if part != "out":
            inner = ""
            continue
        inner = inner or name  # the first of the modules that end here together made the activation
        n_convs += isinstance(network.get_module(name), nn.modules.conv._ConvNd)
        ends = i + 1 == len(trace.events) or trace.events[i + 1][0] != "out" or not trace.events[i + 1][1]
        shape = trace.shapes[part, name, call]
        module = network.get_module(inner)
        if not ends or not name or not isinstance(shape, Tensor) or module is None:
            continue
        if shape.ndim == 4 and shape.shape[2] * shape.shape[3] > 1 and role_of(module) not in ("pool", "dropout"):
            found.append((n_convs, str(Address(name, "out", None, call if (part, name, 2) in trace.shapes else None))))
    places = {"input": "input"}
    final = next((i for i in reversed(range(len(found))) if can_be_cut(network, found[i][1])), None)
    if final is not None:
        places["final"] = found[final][1]
        # of places between the same convolutions, the last
        near = sorted(range(final), key=lambda i: (abs(found[i][0] / n_convs - 2 / 3) if n_convs else 0.0, -i))
        middle = next(
            (found[i][1] for i in near if found[i][0] < found[final][0] and can_be_cut(network, found[i][1])), None
        )
        if middle is not None:
            places["middle"] = middle
    return places


def can_be_cut(network: Network, site: str) -> bool:
    """Whether what lies above a site can be run alone."""
    try:
        above(network, site)
    except InputError:
        return False
    return True


class _OnGrid(nn.Module):
    """What the modules of the three settings share."""

    def __init__(self, network: Network, n: int, layer: str, head: int) -> None:
        super().__init__()
        self.module = network.module
        self.n, self.layer, self.head = n, layer, head
        # Weights that are laid over a module are not in its state: they must show in the fingerprint.
        self._base = network.fingerprint() if network.overrides else ""
        self._parts: dict[str, Part] = {}  # not registered: they hold the same module

    def extra_repr(self) -> str:
        """Everything in which two networks on the same weights may differ."""
        parts = ", ".join(f"{k}: {p.extra_repr()}" for k, p in self._parts.items())
        return f"n={self.n}, layer={self.layer!r}, head={self.head}, {parts} {self._base}"

    def own_cell(self, x: Tensor, head: Tensor | None) -> Tensor:
        """The cell of each row's head, (n_rows, channels, h, w)."""
        cells = cut(x, self.n)
        if head is None:
            return cells[:, self.head]
        if bool((head < 0).any()) or bool((head >= self.n**2).any()):
            raise InputError(f"heads are numbered 0 to {self.n**2 - 1}, got {head.tolist()[:8]}")
        return cells[torch.arange(len(x), device=x.device), head.to(x.device)]


class _Plain(_OnGrid):
    def forward(self, x: Tensor) -> Tensor:
        return self._parts["all"](x)


class _Sliding(_OnGrid):
    def __init__(self, network: Network, n: int, layer: str, head: int, window: tuple[int, int]) -> None:
        super().__init__(network, n, layer, head)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        a = self._parts["below"](x)
        windows = a.unfold(2, self.window[0], 1).unfold(3, self.window[1], 1)
        out = self._parts["above"](rearrange(windows, "b c r s h w -> (b r s) c h w"))
        return out.reshape(len(x), -1, *out.shape[1:]).mean(1)


class _Full(_OnGrid):
    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        return self._parts["above"](self.own_cell(x, head))


class _Partial(_OnGrid):
    def forward(self, x: Tensor, head: Tensor | None = None) -> Tensor:
        return self._parts["above"](self.own_cell(self._parts["below"](x), head))


class GridNetwork(Network, ABC):
    """A network on grids of images: what `GridPG`, `DiFull` and `DiPart` share.

    Parameters
    ----------
    network : Network
        For images of shape (channels, height, width). Its module is shared, not copied.
    n : int, default 2
        Cells on a side.
    layer : str, default "input"
        Where the input of this network is in the given one: ``"input"``, ``"middle"``, ``"final"`` (see `map_sites`)
        or a site at which it can be cut.
    head : int, default 0
        The head that answers where the input names none.
    final : str, optional
        Site of the last map of features; by default that of `map_sites`.
    inputs : optional
        What the network takes, if it has seen no input yet; one image is enough.

    Raises
    ------
    InputError
        The network takes no images, cannot be cut at the layer or at its last map, or cannot run on a grid.

    References
    ----------
    Böhle, Fritz, Schiele: Convolutional dynamic alignment networks (2021). Rao, Böhle, Schiele: Better understanding
    differences in attribution methods via systematic evaluations (2023).
    """

    key: ClassVar[str]
    """Short name, as in tables."""
    corners: ClassVar[bool] = True
    """Whether only the heads of the first and the last cell are scored, on grids whose corners share a class."""
    by_cell: ClassVar[bool] = False
    """Whether the activation at the layer is that of each cell by itself."""

    def __init__(
        self,
        network: Network,
        n: int = 2,
        layer: str = "input",
        *,
        head: int = 0,
        final: str | None = None,
        inputs: Any = None,
    ) -> None:
        at_least("n", n, 2)
        if not isinstance(network, Network):
            raise InputError(f"a Network is needed, got {type(network).__name__}; write nissl.Network(model)")
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < n * n:
            raise InputError(f"head must be a cell, 0 to {n * n - 1}; got {head!r}")
        if inputs is not None:
            network.sites(inputs=inputs)
        example = _one_image(network)
        places = map_sites(network) if layer in ("middle", "final") or (final is None and self._needs_final()) else {}
        site = places.get(layer) if layer in ("middle", "final") else str(network.locate(layer))
        final = places.get("final") if final is None else str(network.locate(final))
        if site is None or (final is None and self._needs_final()):
            raise InputError(
                f"{type(self).__name__} needs a {layer if site is None else 'final'} map of features at which "
                f"{network.name} can be cut, and there is none"
            )
        self.base = network
        self.n = n
        self.site = site
        module = self._build(network, n, site, final or "", head, example)
        dims = network.input_dims if site == "input" else None
        super().__init__(
            module, dims=dims, device=network.device, dtype=network.dtype, autocast=network.autocast,
            name=f"{type(self).__name__}({network.name}, {n} × {n}, {layer})",
        )  # fmt: skip
        self.differentiable = network.differentiable
        self.memory_format = network.memory_format
        grid = example.repeat(1, 1, n, n)
        self.run(Pass(self.at_layer(grid)))

    @classmethod
    def _needs_final(cls) -> bool:
        return True

    @abstractmethod
    def _build(self, network: Network, n: int, site: str, final: str, head: int, example: Tensor) -> _OnGrid:
        """The module."""

    @property
    def heads(self) -> tuple[int, ...]:
        """Cells whose heads are scored."""
        return (0, self.n**2 - 1) if self.corners else tuple(range(self.n**2))

    def with_head(self, x: Tensor, head: int) -> dict[str, Tensor]:
        """Inputs for one head: the activation at the layer, and, where heads differ, which one answers."""
        return {"0": x} if self.key == "gridpg" else {"0": x, "1": torch.full((len(x),), head, device=x.device)}

    def at_layer(self, grids: Tensor, runner: Runner | None = None) -> Tensor:
        """The activation at the layer, (n_grids, channels, n * h, n * w), for grids of images.

        In `DiFull` every cell goes through the network by itself; otherwise the grid does.
        """
        x = self.base.place(grids)["0"]
        if self.site == "input":
            return x
        pieces = cut(x, self.n).flatten(0, 1) if self.by_cell else x
        below = _frozen(self.base, Part(self.base, "input", self.site))

        def read(piece: Tensor) -> Asking[Tensor]:
            answer = yield Pass(piece)
            return answer.output

        runner = Runner(progress=False, tune=False) if runner is None else runner
        a = torch.cat(runner.collect(below, [partial(read, p[None]) for p in pieces], "activations"))
        return stitch(a.unflatten(0, (len(x), -1))) if self.by_cell else a


class GridPG(GridNetwork):
    """The plain network on a grid of images; the target is the class of one cell.

    Where the classifier takes a map of fixed size, it is slid over the grid's map of features and its outputs are
    averaged, as a convolution of that size would be; it is recognised by another output for a map that is repeated.
    """

    key: ClassVar[str] = "gridpg"
    corners: ClassVar[bool] = False

    def _build(self, network: Network, n: int, site: str, final: str, head: int, example: Tensor) -> _OnGrid:
        rest = above(network, final)
        a = network.run(Pass(example, read=[final], output=False)).reads[final]
        if _takes_any_size(network, rest, a, n):
            plain = _Plain(network, n, site, head)
            plain._parts["all"] = Part(network, site, None, example.repeat(1, 1, n, n))
            return plain
        sliding = _Sliding(network, n, site, head, (a.shape[2], a.shape[3]))
        sliding._parts.update(below=Part(network, site, final), above=rest)
        return sliding


def _takes_any_size(network: Network, rest: Part, a: Tensor, n: int) -> bool:
    """Whether the classifier makes of a map that is repeated n × n times what it makes of the map."""
    classifier = _frozen(network, rest)
    once = classifier.run(Pass(a)).output
    try:
        again = classifier.run(Pass(a.repeat(1, 1, n, n))).output
    except (RuntimeError, ValueError):
        return False
    assert once is not None
    assert again is not None
    scale = float(once.abs().max()) or 1.0
    return again.shape == once.shape and bool(torch.allclose(once, again, rtol=1e-3, atol=1e-3 * scale))


class DiFull(GridNetwork):
    """One head for each cell, connected to nothing but its cell: scores elsewhere are provably wrong.

    Inputs are the grid (or the activation at the layer) and, if wanted, the number of the head for each row. A perfect
    score says that a method respects what is connected, not that it explains well: read it together with `GridPG`.
    """

    key: ClassVar[str] = "difull"
    by_cell: ClassVar[bool] = True

    @classmethod
    def _needs_final(cls) -> bool:
        return False

    def _build(self, network: Network, n: int, site: str, final: str, head: int, example: Tensor) -> _OnGrid:
        module = _Full(network, n, site, head)
        module._parts["above"] = above(network, site)
        return module


class DiPart(GridNetwork):
    """One head for each cell, connected to its cell of the last map of features, which is that of the whole grid."""

    key: ClassVar[str] = "dipart"

    def _build(self, network: Network, n: int, site: str, final: str, head: int, example: Tensor) -> _OnGrid:
        module = _Partial(network, n, site, head)
        module._parts.update(below=Part(network, site, final), above=above(network, final))
        below = _frozen(network, Part(network, "input", final))
        one, grid = (below.run(Pass(x)).output for x in (example, example.repeat(1, 1, n, n)))
        assert one is not None
        assert grid is not None
        if (grid.shape[2], grid.shape[3]) != (n * one.shape[2], n * one.shape[3]):
            raise InputError(
                f"a grid's map at {final!r} is {grid.shape[2]} × {grid.shape[3]}, not {n} times the {one.shape[2]} × "
                f"{one.shape[3]} of one image: its parts belong to no cell. Use images whose sides are multiples of "
                "the network's stride"
            )
        return module


SETTINGS: dict[str, type[GridNetwork]] = {s.key: s for s in (GridPG, DiFull, DiPart)}
"""The three settings by name."""


def _frozen(network: Network, part: Part) -> Network:
    """A part of a network as a Network of its own."""
    return Network(part, device=network.device, dtype=network.dtype, autocast=network.autocast)


def _one_image(network: Network) -> Tensor:
    """One row of what the network has seen."""
    if network._example is None:
        raise InputError(f"{network.name} has seen no input yet: give inputs=, one image is enough")
    values = list(network._example.values())
    if len(values) != 1 or values[0].ndim != 4 or not values[0].is_floating_point():
        shapes = {k: tuple(v.shape[1:]) if isinstance(v, Tensor) else v for k, v in network._example.items()}
        raise InputError(f"grids are made of images (channels, height, width); {network.name} takes {shapes}")
    return values[0]


# ---------------------------------------------------------------- scores


def _maps(scores: Any) -> xr.DataArray:
    """Scores as maps (..., y, x): channels are summed."""
    if isinstance(scores, (Tensor, np.ndarray)):
        array = scores.detach().cpu().numpy() if isinstance(scores, Tensor) else scores
        names = ("example", "head", "channel", "y", "x")
        if array.ndim not in (3, 4):
            raise InputError(f"maps must be (example, y, x) or (example, channel, y, x), got shape {array.shape}")
        scores = xr.DataArray(array, dims=names[:1] + names[-(array.ndim - 1) :])
    if not isinstance(scores, xr.DataArray) or scores.dims[-2:] != ("y", "x"):
        got = scores.dims if isinstance(scores, xr.DataArray) else type(scores).__name__
        raise InputError(f"maps must have the last dimensions y and x, got {got}")
    if scores.dtype.kind not in "biuf" or not np.isfinite(scores.values).all():
        raise InputError(f"maps must be finite numbers; these are {scores.dtype}, or hold NaN or infinity")
    return scores.sum("channel") if "channel" in scores.dims else scores


def _upsample(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Maps (..., y, x) at another resolution, bilinear with half-pixel centres."""
    if size is None or tuple(maps.shape[-2:]) == tuple(size):
        return maps
    for side in items("size", size):
        at_least("size", side, 1)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).reshape(*maps.shape[:-2], *size)


def cell_shares(maps: Tensor, n: int, size: tuple[int, int] | None = None) -> Tensor:
    """Share of the positive scores in each cell of a grid.

    Parameters
    ----------
    maps : Tensor (..., y, x)
    n : int
        Cells on a side.
    size : (height, width), optional
        Resolution to which the whole grid is interpolated first (bilinear, half-pixel centres), as the authors do.

    Returns
    -------
    Tensor (..., n * n)
        In [0, 1]; all 0 for a map whose positive scores sum to at most `LEAST`.
    """
    at_least("n", n, 1)
    positive = _upsample(maps, size).clamp_min(0)
    if positive.shape[-2] % n or positive.shape[-1] % n:
        raise InputError(f"maps of {tuple(positive.shape[-2:])} cannot be cut into {n} × {n} cells; give size=")
    inside = rearrange(positive.double(), "... (r h) (s w) -> ... (r s) h w", r=n, s=n).sum((-2, -1))
    total = inside.sum(-1, keepdim=True)
    return torch.where(total > LEAST, inside / total.clamp_min(LEAST), 0.0)


def localization(scores: Any, n: int, size: tuple[int, int] | None = None) -> xr.DataArray:
    """Share of the positive scores that lies in the right cell.

    Parameters
    ----------
    scores : DataArray, Tensor or array (example[, head][, channel], y, x)
        Of grids. Channels are summed, sign kept. With a dimension ``head``, its coordinate says which cell is right.
    n : int
        Cells on a side.
    size : (height, width), optional
        Resolution of the grid, to which coarser maps are interpolated; see `cell_shares`.

    Returns
    -------
    DataArray (example, head)
        In [0, 1]. Without a dimension ``head`` in the scores: what the map would score for each of the cells. A uniform
        map gets 1 / n²; an empty one 0.
    """
    maps = _maps(scores)
    values = torch.from_numpy(np.asarray(maps.values, dtype=np.float64))
    shares = cell_shares(values, n, size).numpy()
    leading = maps.dims[:-2]
    if "head" in leading:
        heads = np.asarray(maps.coords["head"].values if "head" in maps.coords else np.arange(maps.sizes["head"]))
        if heads.min() < 0 or heads.max() >= n * n:
            raise InputError(f"heads {heads.tolist()} are no cells of a {n} × {n} grid")
        shares = np.moveaxis(shares, leading.index("head"), -2)
        shares = shares[..., np.arange(len(heads)), heads]
        leading = (*(d for d in leading if d != "head"), "head")
    else:
        heads, leading = np.arange(n * n), (*leading, "head")
    return xr.DataArray(shares, dims=leading, coords={"head": heads})


def filled_cell(n: int, head: int, map_size: tuple[int, int], size: tuple[int, int]) -> float:
    """The `localization` of a map of `map_size` that is 1 in the whole right cell and 0 elsewhere.

    Below 1 where the map is interpolated to `size`, because its border is carried into other cells: with maps that fill
    the cell no more can be had at that resolution. Maps with their peak away from the border can be above it.
    """
    one = torch.zeros(1, n * n, 1, map_size[0] // n, map_size[1] // n, dtype=torch.float64)
    one[:, head] = 1
    return float(cell_shares(stitch(one)[0, 0], n, size)[head])


def smooth(scores: Any, kernel: int) -> Any:
    """Maps blurred with a Gaussian of `kernel` × `kernel` pixels and standard deviation kernel / 4; borders are zero.

    Parameters
    ----------
    scores : DataArray or Tensor (..., y, x)
        Signed: smooth before positive parts are taken. Smoothing and the sum over channels commute.
    kernel : int
        Odd number of pixels; about half a cell is a good size where neighbouring signs fluctuate.

    Returns
    -------
    Of the type that was given, same size.
    """
    at_least("kernel", kernel, 1)
    if kernel % 2 == 0:
        raise InputError(f"the kernel must have an odd number of pixels, got {kernel}")
    if isinstance(scores, xr.DataArray):
        values = smooth(torch.from_numpy(np.asarray(_last_two(scores).values)), kernel).numpy()
        return scores.copy(data=values)
    offsets = torch.arange(kernel, dtype=scores.dtype, device=scores.device) - (kernel - 1) / 2
    weights = torch.exp(-0.5 * (offsets / (kernel / 4)) ** 2)
    weights = weights / weights.sum()
    flat = scores.reshape(-1, 1, *scores.shape[-2:])
    flat = F.conv2d(flat, weights[None, None, :, None], padding=(kernel // 2, 0))
    return F.conv2d(flat, weights[None, None, None], padding=(0, kernel // 2)).reshape(scores.shape)


def _last_two(scores: xr.DataArray) -> xr.DataArray:
    if scores.dims[-2:] != ("y", "x"):
        raise InputError(f"maps must have the last dimensions y and x, got {scores.dims}")
    return scores


@dataclass(frozen=True, eq=False)
class Smoothed(Method):
    """A method whose maps are blurred: S-IxG is ``Smoothed(InputXGradient(), K)``.

    Parameters
    ----------
    base : Method
    kernel : int, default 17
        See `smooth`; channels are summed first.

    References
    ----------
    Rao, Böhle, Schiele: Better understanding differences in attribution methods via systematic evaluations (2023).
    """

    base: Method
    kernel: int = 17

    name: ClassVar[str] = "smoothed"
    title: ClassVar[str] = "Smoothed map"
    paper: ClassVar[str] = "Rao et al. 2023"

    def __post_init__(self) -> None:
        if not isinstance(self.base, Method):
            raise InputError(f"base must be a method such as InputXGradient(), got {self.base!r:.60}")
        smooth(torch.zeros(1, 1), self.kernel)
        for name in ("differentiates", "class_sensitive", "positive"):
            object.__setattr__(self, name, getattr(self.base, name))

    def at_budget(self, passes: int) -> Smoothed:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, base=self.base.at_budget(passes))

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        scores = yield from self.base.explain(q)
        return Explained(smooth(_one_map(scores), self.kernel), ("y", "x"))


def _one_map(scores: Explained) -> Tensor:
    """Scores of one example as a map (y, x): channels are summed."""
    if scores.dims == ("channel", "y", "x"):
        return scores.values.float().sum(0)
    if scores.dims == ("y", "x"):
        return scores.values.float()
    raise InputError(f"a map needs scores with dimensions (channel, y, x) or (y, x), got {scores.dims}")


BINS = (0.0, 0.02, 0.05, 0.5, 0.95, 0.98, 1.0)


def aggatt(
    scores: Any,
    n: int,
    head: int,
    *,
    size: tuple[int, int] | None = None,
    bins: Sequence[float] = BINS,
    clip: float = 0.005,
) -> xr.DataArray:
    """Mean maps over a whole data set (AggAtt), from the best localised examples to the worst.

    Parameters
    ----------
    scores : DataArray, Tensor or array (example[, channel], y, x)
        Of one head.
    n, head : int
        Cells on a side; the right cell.
    size : (height, width), optional
        Resolution to which maps are interpolated.
    bins : sequence of float
        Edges, as shares of the examples sorted by their score (ties: larger sum inside first).
    clip : float, default 0.005
        Share of the summed scores that may lie above the common limit of the colour scale.

    Returns
    -------
    DataArray (bin, y, x)
        Mean positive maps. Coordinates: ``low``, ``high`` (edges), ``count``, ``score`` (mean), ``example`` (that at
        the middle of the bin). ``attrs["limit"]`` is the common upper end of the colour scale. Bins that are empty
        because there are few examples are left out, with a warning.
    """
    maps = _maps(scores)
    if maps.ndim != 3:
        raise InputError(f"AggAtt takes the maps of one head, (example, y, x); got {maps.dims}")
    at_least("n", n, 1)
    if not is_whole(head) or not 0 <= head < n * n:
        raise InputError(f"head must be a cell, 0 to {n * n - 1}; got {head!r}")
    edges = np.asarray(bins, dtype=float)
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or (np.diff(edges) <= 0).any():
        raise InputError(f"bins must rise from 0 to 1, got {list(bins)}")
    values = _upsample(torch.from_numpy(np.asarray(maps.values, dtype=np.float64)), size).clamp_min(0)
    score = cell_shares(values, n)[:, head].numpy()
    inside = cut(values[:, None], n)[:, head].sum((1, 2, 3)).numpy()
    order = np.lexsort((-inside, -score))
    at = np.round(edges * len(order)).astype(int)
    kept = [i for i in range(len(edges) - 1) if at[i + 1] > at[i]]
    if len(kept) < len(edges) - 1:
        gone = ", ".join(f"{edges[i]:.0%}-{edges[i + 1]:.0%}" for i in range(len(edges) - 1) if i not in kept)
        warnings.warn(f"{len(order)} maps are too few for the bins {gone}: they are left out", stacklevel=2)
    groups = [order[at[i] : at[i + 1]] for i in kept]
    means = np.stack([values[g].mean(0).numpy() for g in groups])
    ordered = np.sort(means, axis=None)
    above_limit = np.cumsum(ordered[::-1])[::-1] - ordered  # mass strictly above each value
    limit = ordered[np.argmax(above_limit <= clip * ordered.sum())]
    coords = {
        "low": ("bin", edges[kept]),
        "high": ("bin", edges[[i + 1 for i in kept]]),
        "count": ("bin", np.array([len(g) for g in groups])),
        "score": ("bin", np.array([score[g].mean() for g in groups])),
        "example": ("bin", np.array([g[len(g) // 2] for g in groups])),
    }
    return xr.DataArray(means, dims=("bin", "y", "x"), coords=coords, attrs={"limit": float(limit), "head": head})


# ---------------------------------------------------------------- pointing games


def _masks(masks: Any, maps: xr.DataArray) -> tuple[np.ndarray, Tensor]:
    """Masks (example, y, x) and the maps at their resolution."""
    m = np.asarray(masks.cpu() if isinstance(masks, Tensor) else masks)
    if m.ndim == 2 and m.shape[1] == 4:
        raise InputError("these are boxes: turn them into masks with boxes_to_masks(boxes, height, width)")
    if m.ndim != 3 or maps.ndim != 3 or len(m) != maps.shape[0]:
        raise InputError(f"masks must be (example, y, x), one a map; got {m.shape} for maps of shape {maps.shape}")
    m = m != 0
    if not m.any((1, 2)).all():
        raise InputError(f"the masks of examples {np.flatnonzero(~m.any((1, 2))).tolist()[:10]} are empty")
    values = torch.from_numpy(np.asarray(maps.values, dtype=np.float64))
    return m, _upsample(values, (m.shape[1], m.shape[2]))


def boxes_to_masks(boxes: Any, height: int, width: int) -> np.ndarray:
    """Masks (example, height, width) of boxes (example, 4): left, upper, right, lower, in pixels, ends excluded."""
    with blame(InputError, "boxes must be numbers"):
        b = np.asarray(boxes, dtype=float)
    if b.ndim != 2 or b.shape[1] != 4:
        raise InputError(f"boxes must be (example, 4), got shape {b.shape}")
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    left, upper, right, lower = (b[:, i, None, None] for i in range(4))
    return (x > left) & (x < right) & (y > upper) & (y < lower)


def pointing_game(scores: Any, masks: Any, tolerance: float = 15) -> np.ndarray:
    """Whether the highest score lies in the object, or at most `tolerance` pixels from it.

    Parameters
    ----------
    scores : DataArray, Tensor or array (example[, channel], y, x)
        Channels are summed; maps are interpolated to the size of the masks.
    masks : array (example, y, x)
        Not 0 where the object is.
    tolerance : float, default 15

    Returns
    -------
    ndarray (n_examples,)
        1 or 0; where several positions are highest, the share of them that hits.

    References
    ----------
    Zhang, Lin, Brandt, Shen, Sclaroff: Top-down neural attention by excitation backprop (2016).
    """
    if not (is_number(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance must be a number of pixels, at least 0; got {tolerance!r}")
    m, values = _masks(masks, _maps(scores))
    v = values.numpy()
    hit = np.stack([np.asarray(distance_transform_edt(~one)) <= tolerance for one in m])
    highest = v == v.max((1, 2), keepdims=True)
    return (highest & hit).sum((1, 2)) / highest.sum((1, 2))


def energy_pointing_game(scores: Any, masks: Any) -> np.ndarray:
    """Share of the positive scores that lies in the object; 0 for an empty map. Chance is the mask's share.

    Parameters
    ----------
    scores, masks
        As in `pointing_game`.

    Returns
    -------
    ndarray (n_examples,)

    References
    ----------
    Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu: Score-CAM (2020).
    """
    m, values = _masks(masks, _maps(scores))
    positive = values.clamp_min(0).numpy()
    total = positive.sum((1, 2))
    return np.where(total > LEAST, (positive * m).sum((1, 2)) / np.maximum(total, LEAST), 0.0)


def pointing_figures(scores: Mapping[str, xr.DataArray], masks: Any) -> list[tuple[str, str, str, int, float]]:
    """Both pointing games for several methods, as rows (method, check, figure, example, value); maps only."""
    rows = []
    for name, s in scores.items():
        if s.dims[-2:] == ("y", "x"):
            for figure, values in (
                ("pointing", pointing_game(s, masks)),
                ("energy_pointing", energy_pointing_game(s, masks)),
            ):
                rows += [(name, "pointing", figure, i, float(v)) for i, v in enumerate(values)]
    return rows


# ---------------------------------------------------------------- all of it


@dataclass(eq=False)
class GroundTruth:
    """What `ground_truth` found.

    Attributes
    ----------
    table : DataFrame
        Tidy: method, setting, layer, grid, head, score, empty (no positive score at all), natural (the method's own
        place). Score is NaN where a method could not be run; `notes` say why.
    n : int
        Cells on a side.
    chance : float
        1 / n²: what a uniform map gets.
    filled : DataFrame
        setting, layer, filled: what a map gets at that resolution that fills the right cell evenly, see `filled_cell`.
    sites : dict of layer to site
    maps : dict of (method, setting, layer, head) to DataArray (example, y, x)
        Signed maps, reduced to at most `picture` pixels a side, for `aggatt`; examples are numbers of grids.
    cost : DataFrame
        Rows asked by each method, forward and backward, and seconds.
    notes : list of str
        What had to be relaxed or left out.
    """

    table: pd.DataFrame
    n: int
    chance: float
    filled: pd.DataFrame
    sites: dict[str, str]
    maps: dict[tuple[str, str, str, int], xr.DataArray]
    cost: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"GroundTruth(chance {self.chance:.3g}, {len(self.notes)} notes)\n{self.summary().to_string(index=False)}"
        )

    def summary(self, seed: int = 0) -> pd.DataFrame:
        """Mean score by method, setting and layer, its interval over grids; chance, empty maps, filled cell."""
        keys = ["method", "setting", "layer"]
        of_grids = self.table.pivot_table("score", keys, "grid", "mean", dropna=False, sort=False)
        of_grids = of_grids.loc[list(dict.fromkeys(zip(*(self.table[k] for k in keys), strict=True)))]
        found = bootstrap(of_grids.to_numpy(), seed=seed)
        summary = of_grids.index.to_frame(index=False).assign(
            score=found.value, low=found.low, high=found.high, grids=found.n, chance=self.chance
        )
        empty = self.table.groupby(keys, as_index=False)["empty"].mean()
        return summary.merge(empty, on=keys, how="left").merge(self.filled, on=keys[1:], how="left")

    @property
    def rows(self) -> list[tuple[str, str, str, int, float]]:
        """(method, check, figure, grid, value) for verdicts: each method at its own place, mean over heads."""
        own = self.table[self.table["natural"]]
        mean = own.groupby(["method", "setting", "grid"], sort=False)["score"].mean()
        return [(str(m), "ground_truth", str(s), int(g), float(v)) for (m, s, g), v in mean.items()]  # pyright: ignore

    def aggatt(self, method: str, setting: str, layer: str, head: int, **options: Any) -> xr.DataArray:
        """Mean maps of one head; see `aggatt`."""
        key = (method, setting, layer, head)
        if key not in self.maps:
            raise InputError(f"there are no maps for {key}; there are {list(self.maps)[:6]} ...")
        maps = self.maps[key]
        side = max(maps.shape[1] // self.n, maps.shape[2] // self.n, 1) * self.n
        return aggatt(maps, self.n, head, size=(side, side), **options)

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """AggAtt of the first cell's head, each method at its own place: method, check, title, caption, image."""
        made = []
        own = self.table[self.table["natural"] & (self.table["head"] == 0)]
        for method, setting, layer in dict.fromkeys(zip(own["method"], own["setting"], own["layer"], strict=True)):
            if (method, setting, layer, 0) not in self.maps:
                continue
            with warnings.catch_warnings():  # captions say how many maps each picture is the mean of
                warnings.simplefilter("ignore")
                bins = self.aggatt(method, setting, layer, 0)
            for one in bins:
                made.append(
                    {
                        "method": method,
                        "check": "ground_truth",
                        "title": f"{SETTINGS[setting].__name__}, first cell",
                        "caption": f"mean of {int(one['count'])} maps, {float(one['low']):.0%} to "
                        f"{float(one['high']):.0%} from the best; score {float(one['score']):.2f}",
                        "image": np.minimum(one.values, bins.attrs["limit"]),
                    }
                )
        return made


def natural_layer(method: Method) -> str:
    """Where a method is at home: class activation maps at their layer or the final map, all others at the input."""
    base = method.base if isinstance(method, Smoothed) else method
    if not hasattr(base, "layer"):
        return "input"
    return base.layer or "final"  # pyright: ignore[reportAttributeAccessIssue]


def ground_truth(
    network: Network,
    images: Any,
    labels: Any,
    methods: Mapping[str, Method],
    *,
    settings: Sequence[str] = ("gridpg", "difull", "dipart"),
    layers: Sequence[str] | None = None,
    n: int = 2,
    n_grids: int = 12,
    heads: int | None = 1,
    confidence: float = 0.99,
    budget: int | None = None,
    picture: int = 64,
    runner: Runner | None = None,
    seed: int = 0,
) -> GroundTruth:
    """How well methods find the right cell on grids of the user's own images, with the user's own network.

    Parameters
    ----------
    network : Network
        A classifier of images.
    images : Tensor (n_images, channels, height, width)
    labels : class indices (n_images,) or None
        None: what the network predicts.
    methods : mapping of name to Method
    settings : names, default all of `SETTINGS`
    layers : names or sites, optional
        Places at which every method is evaluated: ``"input"``, ``"middle"``, ``"final"`` or sites. Each method is
        always evaluated at its own place, see `natural_layer`; by default only there.
    n : int, default 2
        Cells on a side.
    n_grids : int, default 12
    heads : int or None, default 1
        Heads scored in each grid, in turn; None for all of them, as in the paper. At equal cost more grids tell more.
    confidence : float, default 0.99
        Only images that are classified correctly with at least this probability are used. Lowered, with a note, in
        steps to 0 where too few are left to fill the grids; wrong ones are never used.
    budget : int, optional
        Rows that a method may ask for one map (`Method.at_budget`).
    picture : int, default 64
        Side to which the maps that are kept are reduced.
    runner : Runner, optional
        To share batches and memory.
    seed : int, default 0

    Returns
    -------
    GroundTruth

    Raises
    ------
    InputError
        No setting can be had with this network and these images; says why for each.

    Notes
    -----
    Cost: ``n_grids × heads`` maps for each method, setting and layer. A row of GridPG and DiPart costs n² images, one
    of DiFull one. With the defaults and a method of k rows: 36 k rows, as expensive as 108 k images. Building the
    networks takes some 10 rows more for each setting and layer, finding ``middle`` and ``final`` three or more each.
    """
    table, places_wanted, runner = _check(
        network, methods, settings, layers, n, n_grids, heads, confidence, budget, seed, picture, runner
    )
    x, y, notes = _known_images(network, images, labels, confidence, n_grids * n * n, runner)
    network.sites(inputs=x[:1])
    places = map_sites(network)
    grids: dict[bool, Grids] = {}
    built: dict[tuple[str, str], GridNetwork] = {}
    activations: dict[tuple[str, str], Tensor] = {}
    failed: list[str] = []
    wanted = sorted({where for m in table.values() for where in places_wanted(m)}, key=lambda s: s != "input")
    for key in settings:
        setting = SETTINGS[key]
        for layer in wanted:
            try:
                if setting.corners not in grids:
                    grids[setting.corners] = make_grids(
                        x, y, n, n_grids=n_grids, repeat_corners=setting.corners, seed=seed
                    )
                    notes += [s for s in grids[setting.corners].notes if s not in notes]
                site = places.get(layer) if layer in ("middle", "final") else layer
                if site is None:
                    raise InputError(f"{network.name} has no {layer} map of features at which it can be cut")
                made = setting(network, n, site, final=places.get("final"))
                activations[key, layer] = made.at_layer(grids[setting.corners].images, runner)
                built[key, layer] = made
            except InputError as error:
                failed.append(f"{setting.__name__} at {layer} is left out: {error}")
    if not built:
        raise InputError("no ground truth can be had: " + "; ".join(failed))
    notes += failed

    size = (n * x.shape[2], n * x.shape[3])
    asked: dict[tuple[str, str, str, int, int], Job] = {}
    for (key, layer), made in built.items():
        for g in range(n_grids):
            k = len(made.heads) if heads is None else min(heads, len(made.heads))
            for j in range(k):
                head = made.heads[(g * k + j) % len(made.heads)]
                of = target.class_logit(int(grids[made.corners].labels[g, head])).rows(1)
                x_head = made.with_head(activations[key, layer][g : g + 1], head)
                q = Question(made, x_head, of, seed=seed, example=g * n * n + head)
                for name, m in table.items():
                    if layer in places_wanted(m):
                        job = Job(_cost_name(name), (name, key, layer, g, head), made, lambda m=m, q=q: _explain(m, q))
                        asked[job.key] = job
    before = {name: replace(runner.cost(_cost_name(name))) for name in table}
    scored: dict[tuple[str, str, str, int, int], tuple[float, bool]] = {}
    kept: dict[tuple[str, str, str, int], dict[int, np.ndarray]] = {}
    for job, result in runner.drive(asked.values(), len(asked), "ground truth"):
        name, key, layer, g, head = job.key
        if isinstance(result, NisslError):
            note = f"{name} is not evaluated in {SETTINGS[key].__name__} at {layer}: {result}"
            notes += [note] if note not in notes else []
            scored[job.key] = float("nan"), False
            continue
        shares = cell_shares(result, n, size)
        scored[job.key] = float(shares[head]), not bool(shares.any())
        small = (min(picture, result.shape[0]), min(picture, result.shape[1]))
        kept.setdefault((name, key, layer, head), {})[g] = F.adaptive_avg_pool2d(result[None], small)[0].cpu().numpy()

    columns = ["method", "setting", "layer", "grid", "head", "score", "empty", "natural"]
    rows = [(*k, *scored[k], k[2] == natural_layer(table[k[0]])) for k in asked]
    cost = {name: runner.cost(_cost_name(name)) for name in table}
    spent = [
        (name, c.forward - before[name].forward, c.backward - before[name].backward, c.seconds - before[name].seconds)
        for name, c in cost.items()
    ]
    filled = [
        (
            key,
            layer,
            float(np.mean([filled_cell(n, h, (a.shape[2], a.shape[3]), size) for h in built[key, layer].heads])),
        )
        for (key, layer), a in activations.items()
        if (key, layer) in built
    ]
    for note in notes:
        warnings.warn(f"ground truth: {note}", stacklevel=2)
    return GroundTruth(
        table=pd.DataFrame(rows, columns=columns),
        n=n,
        chance=1 / n**2,
        filled=pd.DataFrame(filled, columns=["setting", "layer", "filled"]),
        sites={layer: made.site for (_, layer), made in built.items()},
        maps={k: _stacked(v) for k, v in kept.items()},
        cost=pd.DataFrame(spent, columns=["method", "forward", "backward", "seconds"]).set_index("method"),
        notes=notes,
    )


def _cost_name(name: str) -> str:
    return f"ground truth {name}"


def _stacked(maps: dict[int, np.ndarray]) -> xr.DataArray:
    numbers = sorted(maps)
    return xr.DataArray(np.stack([maps[g] for g in numbers]), dims=("example", "y", "x"), coords={"example": numbers})


def _explain(method: Method, q: Question) -> Asking[Tensor | NisslError]:
    """The map of a method at the input of a network on grids; what it raised where it cannot be run there."""
    if isinstance(method, Smoothed) and hasattr(method.base, "layer"):
        method = replace(method, base=replace(method.base, layer="input"))  # pyright: ignore[reportArgumentType]
    elif hasattr(method, "layer"):
        method = replace(method, layer="input")  # pyright: ignore[reportArgumentType]
    try:
        return _one_map((yield from method.explain(q)))
    except NisslError as error:  # handed on: it becomes a note, and the score of this method is missing
        return error


def _check(
    network: Any, methods: Any, settings: Any, layers: Any, n: int, n_grids: int, heads: int | None, confidence: float,
    budget: int | None, seed: int, picture: int, runner: Runner | None,
) -> tuple[dict[str, Method], Any, Runner]:  # fmt: skip
    """Arguments that are wrong are found before anything is run."""
    if not isinstance(network, Network):
        raise InputError(f"a Network is needed, got {type(network).__name__}; write nissl.Network(model)")
    if not isinstance(methods, Mapping) or not methods:
        raise InputError("methods must be a mapping of names to methods, for instance {'ixg': InputXGradient()}")
    for name, m in methods.items():
        if not isinstance(m, Method):
            raise InputError(f"{name!r}: {m!r:.60} is not a method; use for instance IntegratedGradients()")
    if not settings or not set(items("settings", settings)) <= set(SETTINGS):
        raise InputError(f"settings={settings!r}: choose among {', '.join(SETTINGS)}")
    layers = items("layers", layers or ())
    for layer in layers:
        if layer not in ("middle", "final"):
            network.locate(layer)
    at_least("n", n, 2)
    at_least("n_grids", n_grids, 1)
    at_least("seed", seed, 0)
    at_least("picture", picture, 1)
    for name, value in (("heads", heads), ("budget", budget)):
        if value is not None:
            at_least(name, value, 1)
    if not (is_number(confidence) and 0 <= confidence <= 1):
        raise InputError(f"confidence must be a probability, got {confidence!r}")
    table = {k: m if budget is None else m.at_budget(budget) for k, m in methods.items()}
    extra = tuple(str(parse(s)) for s in layers)
    runner = Runner() if runner is None else runner
    instance("runner", runner, Runner)

    def places(m: Method) -> tuple[str, ...]:
        return tuple(dict.fromkeys((natural_layer(m), *extra)))

    return table, places, runner


def _known_images(
    network: Network, images: Any, labels: Any, confidence: float, wanted: int, runner: Runner
) -> tuple[Tensor, np.ndarray, list[str]]:
    """Images that the network knows, their classes, and what had to be relaxed for that."""
    x = network.place(images)
    if len(x) != 1 or next(iter(x.values())).ndim != 4:
        raise InputError(f"images must be one tensor (n_images, channels, height, width), got {list(x)}")
    x = next(iter(x.values()))
    if not bool(torch.isfinite(x).all()):
        raise InputError("images hold NaN or infinity")
    given = None if labels is None else _labels(labels, len(x))

    def predict(row: Tensor) -> Asking[Tensor]:
        answer = yield Pass(row)
        return answer.output

    output = torch.cat(runner.collect(network, [partial(predict, r[None]) for r in x], "predicting", "ground truth"))
    output = output.double().cpu()
    if output.ndim != 2 or output.shape[1] < 2:
        raise InputError(f"grids need classes: outputs (n_images, n_classes), got shape {tuple(output.shape)}")
    is_probability = bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-4).all())
    p, best = (output if is_probability else output.softmax(1)).max(1)
    y = best.numpy() if given is None else given
    notes = ["no labels were given: the predicted classes are taken"] if given is None else []
    right = np.where(best.numpy() == y, p.numpy(), -1.0)  # probability of the images that are classified correctly
    steps = [confidence, *(t for t in (0.9, 0.75, 0.5, 0.0) if t < confidence)]
    least = next((t for t in steps if (right >= t).sum() >= wanted), steps[-1])
    rows, sure = np.flatnonzero(right >= least), int((right >= confidence).sum())
    if len(rows) > sure:
        notes.append(
            f"{sure} of {len(x)} images are classified correctly with a probability of at least {confidence:g}, too "
            f"few for {wanted} cells: {least:g} is asked for, {len(rows)} images are used"
        )
    if not len(rows):
        raise InputError(
            f"{network.name} classifies none of the {len(x)} images correctly; are the labels its classes?"
        )
    return x[torch.from_numpy(rows).to(x.device)], y[rows], notes
