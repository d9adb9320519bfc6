"""Exemplars: the images that a unit fires on most, and where in them it fires."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import as_path, at_least, instance, is_number, is_whole, items
from nissl.errors import InputError, SiteError, blame
from nissl.network import Network, Pass
from nissl.network.site import parse, unit_axis
from nissl.runner import Asking, Job, Runner

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TailQuantile:
    """A high quantile of many streams at once, in memory that does not grow with them.

    Each value is looked at with probability 1, 1/2, 1/4 …: it belongs to as many scales as a coin falls heads in a row. Of each
    scale the `size` largest values are kept. A scale goes as soon as more of its values than that lie above the quantile, and
    the first one that is left answers: the quantile is exact on a random subsample of the stream, whatever its order, and exact
    altogether as long as no scale went. Two of them merge without loss. All streams (units) have the same number of values and
    the same coins, so that all of it is a few operations on one array.

    Parameters
    ----------
    n_units : int
    q : float, default 0.99
        Which quantile; the upper tail 1 - q is what is kept.
    size : int, default 1024
        Values kept a unit and scale. The share of the stream above the estimate is 1 - q with a relative standard error of at
        most 1.5 / √size: 5 % of it for 1024. Memory is at most thirteen times `size` values a unit; 1.5 times with `total`.
    total : int, optional
        How many values a unit there will be, where that is known: one scale is enough then.
    seed : int, default 0
        Of the coins.

    Attributes
    ----------
    scale : int
        The one that answers: it has looked at a share 2^-scale of the stream.
    n : int
        Values a unit it has looked at.
    """

    def __init__(
        self, n_units: int, q: float = 0.99, size: int = 1024, total: int | None = None, seed: int = 0
    ) -> None:
        at_least("n_units", n_units, 1)
        at_least("size", size, 16)
        at_least("seed", seed, 0)
        if total is not None:
            at_least("total", total, 1)
        if not (is_number(q) and 0.5 <= q < 1):
            raise InputError(f"quantile must lie between 0.5 and 1, got {q!r}")
        self.n_units, self.q, self.size, self.total = int(n_units), float(q), int(size), total
        self.scale = 0 if total is None else max(0, math.ceil(math.log2(max(total * (1 - q) / (0.9 * size), 1))))
        self._scales: dict[int, _Scale] = {}
        self._generator = torch.Generator().manual_seed(int(seed))

    @property
    def n(self) -> int:
        """Values a unit that the scale that answers has looked at."""
        return self._scales[self.scale].n if self.scale in self._scales else 0

    def update(self, values: Float[Tensor, "units n"]) -> None:
        """Take up n more values of every unit."""
        if values.shape[0] != self.n_units:
            raise InputError(f"there are {self.n_units} units, values of {values.shape[0]} were given")
        values = values.float().cpu()
        for part in values.split(4 * self.size, 1):
            heads = (-torch.rand(part.shape[1], generator=self._generator).log2()).floor()
            last = self.scale if self.total is not None else int(heads.max())
            for scale in range(self.scale, last + 1):
                chosen = part if scale == 0 else part[:, heads >= scale]
                if chosen.shape[1]:
                    self._scales.setdefault(scale, _Scale()).add(chosen, self.size)
            self._drop()

    def merge(self, other: TailQuantile) -> TailQuantile:
        """The quantile of both streams together; both must be made alike, but for the seed."""
        instance("other", other, TailQuantile)
        if (other.n_units, other.q, other.size, other.total) != (self.n_units, self.q, self.size, self.total):
            raise InputError("only quantiles of equally many units, the same q, size and total can be merged")
        new = TailQuantile(self.n_units, self.q, self.size, self.total)
        new.scale = max(self.scale, other.scale)
        for given in (self, other):
            for scale, held in given._scales.items():
                if scale >= new.scale:
                    new._scales.setdefault(scale, _Scale()).add(held.largest(self.size), self.size, held.n)
        new._drop()
        return new

    def value(self) -> Float[Tensor, " units"]:
        """The quantile: the smallest value looked at above which lies at most a share 1 - q."""
        if not self.n:
            raise InputError("no values were given yet")
        return self._scales[self.scale].largest(self.size)[:, self._above(self.n)].clone()

    def _above(self, n: int) -> int:
        """How many of n values may lie above the quantile."""
        return math.floor((1 - self.q) * n + 1e-9)

    def _drop(self) -> None:
        while self._above(self.n) >= self.size:
            if self.total is not None:
                raise InputError(f"more values came than total={self.total}")
            del self._scales[self.scale]
            self.scale += 1


class _Scale:
    """The largest values of one scale: those kept in order, and those not yet put among them."""

    def __init__(self) -> None:
        self.n, self.parts = 0, []

    def add(self, values: Tensor, size: int, n: int | None = None) -> None:
        self.n += values.shape[1] if n is None else n
        self.parts.append(values.clone())  # a slice would hold all of what it was cut from
        if sum(p.shape[1] for p in self.parts) > 1.5 * size:
            self.largest(size)

    def largest(self, size: int) -> Tensor:
        together = torch.cat(self.parts, 1)
        self.parts = [together.topk(min(size, together.shape[1]), dim=1).values]
        return self.parts[0]


class ImageSource:
    """Images from a tensor, a Dataset, or an iterable of batches; those of a Dataset are read again where they are needed.

    Parameters
    ----------
    images : Tensor or ndarray (n, channels, height, width), Dataset, or iterable of batches
        A Dataset has ``len`` and gives an image (channels, height, width), or a tuple that begins with one, for a number. An
        iterable gives batches (n, channels, height, width) or tuples that begin with them, as a DataLoader does; it is read
        once, and `kept` holds those of its images that are wanted again.
    """

    def __init__(self, images: Any) -> None:
        if isinstance(images, np.ndarray):
            with blame(InputError, "images cannot be read"):
                images = torch.from_numpy(np.ascontiguousarray(images))
        if isinstance(images, Tensor):
            _require_batch(images)
            if not len(images):
                raise InputError("no image was given")
        elif isinstance(images, (str, bytes)) or not (hasattr(images, "__getitem__") or hasattr(images, "__iter__")):
            raise InputError(
                "images must be a tensor (n, channels, height, width), a Dataset or an iterable of such batches, "
                f"got {type(images).__name__}"
            )
        self.images = images
        sized = hasattr(images, "__getitem__") and hasattr(images, "__len__")
        if sized and not len(images):
            raise InputError("no image was given")
        self.indexed = sized and _first(images[0]).ndim == 3
        self.kept: dict[int, Tensor] = {}

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """Every image once, as (number of the first, batch)."""
        if self.indexed:
            for start in range(0, len(self.images), size):
                yield start, self.fetch(range(start, min(start + size, len(self.images))))
            return
        start = 0
        for given in self.images:
            batch = _first(given)
            _require_batch(batch)
            for part in batch.split(size):
                yield start, part
                start += len(part)
        if not start:
            raise InputError("no image was given")

    def fetch(self, ids: Iterable[int]) -> Tensor:
        """Images by number."""
        if isinstance(self.images, Tensor):
            return self.images[list(ids)]
        found = [_first(self.images[i]) if self.indexed else self.kept[i] for i in ids]
        with blame(InputError, "images of one size are needed"):
            batch = torch.stack(found)
        _require_batch(batch)
        return batch

    def keep(self, wanted: set[int], start: int, batch: Tensor) -> None:
        """Hold those images of an iterable that are wanted again."""
        if not self.indexed:
            self.kept = {i: t for i, t in self.kept.items() if i in wanted}
            self.kept |= {start + j: batch[j].clone() for j in range(len(batch)) if start + j in wanted}


def _first(given: Any) -> Tensor:
    """The images of what a Dataset or DataLoader gives."""
    given = given[0] if isinstance(given, (tuple, list)) and given else given
    given = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if not isinstance(given, Tensor):
        raise InputError(f"images must come as tensors, got {type(given).__name__}; convert them in the Dataset")
    return given


def _require_batch(batch: Tensor) -> None:
    if batch.ndim != 4:
        raise InputError(
            f"a batch of images has shape (n, channels, height, width), got {tuple(batch.shape)}; "
            "a grey image has one channel"
        )


def unit_maps(read: Tensor, module: Any = None, skip: int | None = None) -> Float[Tensor, "n units h w"]:
    """An activation as maps: convolutions as they are, tokens on their grid, single units as maps of one place.

    Parameters
    ----------
    read : Tensor (n, units, h, w), (n, h, w, units), (n, tokens, units) or (n, units)
        Which of the first two it is says `module`, by its type.
    skip : int, optional
        Tokens before those of the grid. By default none where the number of tokens is a square, and one, the class token,
        where it is one more.

    Raises
    ------
    SiteError
        Tokens that make no square grid, or another number of dimensions.
    """
    shape = tuple(read.shape)
    if read.ndim == 4:
        return read if unit_axis(module, 4) == 1 else read.permute(0, 3, 1, 2)
    if read.ndim == 2:
        return read[:, :, None, None]
    if read.ndim != 3:
        raise SiteError(f"an activation of shape {shape} has no units with maps: rows, units and places are needed")
    n_tokens = shape[1]
    if skip is None:
        skip = 0 if math.isqrt(n_tokens) ** 2 == n_tokens else 1
    side = math.isqrt(max(n_tokens - skip, 0))
    if not side or side**2 != n_tokens - skip:
        raise SiteError(
            f"{n_tokens} tokens less {skip} make no square grid; say with skip= how many stand before those of the image"
        )
    return read[:, skip:].transpose(1, 2).reshape(shape[0], shape[2], side, side)


@dataclass(frozen=True, eq=False)
class Exemplars:
    """The images that units fire on most; made by `find_exemplars`.

    Units of all sites stand one after the other; `row` says where one is.

    Attributes
    ----------
    sites : tuple of str
    site : Tensor (units,) of int
        Which of the sites.
    unit : Tensor (units,) of int
        Number of the unit there.
    ids : Tensor (units, k) of int
        Numbers of the images, largest activation first; -1 where there were fewer images than k.
    activations : Tensor (units, k)
        Largest activation over places; minus infinity where `ids` is -1.
    threshold : Tensor (units,)
        The quantile of the unit's activations over all places of all images: above it the unit fires.
    fires : Tensor (units,) of bool
        False for a unit whose largest activation does not exceed the threshold, such as a dead one: it has no place
        where it fires, and its masks are empty.
    n_images : int
    network : Network
    source : ImageSource
    profiles : Tensor (units, n_images) or None
        Largest activation over places in every image, where it was asked for.
    """

    sites: tuple[str, ...]
    site: Int[Tensor, " units"]
    unit: Int[Tensor, " units"]
    ids: Int[Tensor, "units k"]
    activations: Float[Tensor, "units k"]
    threshold: Float[Tensor, " units"]
    fires: Bool[Tensor, " units"]
    n_images: int
    network: Network
    source: ImageSource
    skip: int | None = None
    runner: Runner = field(default_factory=lambda: Runner(memory=0))
    profiles: Float[Tensor, "units n"] | None = None

    def __len__(self) -> int:
        """Number of units."""
        return len(self.unit)

    def __getitem__(self, rows: Any) -> Exemplars:
        """Those of some of the units."""
        index = torch.arange(len(self))[rows].reshape(-1)
        names = ("site", "unit", "ids", "activations", "threshold", "fires")
        profiles = None if self.profiles is None else self.profiles[index]
        return replace(self, profiles=profiles, **{name: getattr(self, name)[index] for name in names})

    def row(self, site: str, unit: int) -> int:
        """Where the unit of a site stands."""
        found = torch.nonzero(self.unit == int(unit))[:, 0]
        found = [int(i) for i in found if self.sites[int(self.site[i])] == site]
        if not found:
            raise InputError(f"there is no unit {unit} of {site!r} here; the sites are {list(self.sites)[:10]}")
        return found[0]

    def name(self, row: int) -> str:
        """Site and number of a unit."""
        return f"{self.sites[int(self.site[row])]} {int(self.unit[row])}"

    def images(self, row: int) -> Float[Tensor, "k c h w"]:
        """The images of one unit, as the network takes them; fewer than k where there were fewer."""
        return self.source.fetch(int(i) for i in self.ids[row] if i >= 0).float()

    def masks(self, rows: Any = None, size: tuple[int, int] | None = None) -> Bool[Tensor, "units k h w"]:
        """Where units fire in their exemplars: a second pass over these images only.

        Parameters
        ----------
        rows : int, slice or sequence of int, optional
            Which units; all by default. One mask takes a byte a pixel: 15 exemplars of 224 × 224 are 0.75 MB a unit.
        size : (int, int), optional
            Height and width of the masks; by default those of the images.

        Returns
        -------
        Tensor (units, k, height, width) of bool
            The map, brought bilinearly to that size, exceeds the unit's threshold.

        Raises
        ------
        InputError
            The images were others the second time, as those of a Dataset that crops at random are.
        """
        some = self if rows is None else self[rows]
        wanted = some.ids >= 0
        height, width = size or some.source.fetch([int(some.ids[wanted][0])]).shape[-2:]
        masks = torch.zeros(*some.ids.shape, height, width, dtype=torch.bool)
        for ids, _, reads in some.reads(self.network, some.sites):
            unit, slot = torch.nonzero(torch.isin(some.ids, ids) & some.fires[:, None], as_tuple=True)
            image = torch.searchsorted(ids, some.ids[unit, slot])
            for number, maps in enumerate(reads):
                here = some.site[unit] == number
                u, s = unit[here], slot[here]
                if not len(u):
                    continue
                found = maps[image[here], some.unit[u]].float()
                again, before = found.amax((1, 2)), some.activations[u, s]
                if bool(((again - before).abs() > 0.02 * before.abs() + 1e-3).any()):
                    raise InputError(
                        "the images are not those of the first pass; a Dataset must give the same each time"
                    )
                large = F.interpolate(found[:, None], size=(height, width), mode="bilinear")[:, 0]
                masks[u, s] = large > some.threshold[u, None, None]
        return masks

    def reads(self, network: Network, sites: Sequence[str]) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
        """Every image among these exemplars once: (numbers, ascending; batch; a network's maps at sites)."""
        ids = torch.unique(self.ids[self.ids >= 0])
        parts = ids.split(self.runner.batch_size or 16)
        modules = [network.get_module(parse(s).module) for s in sites]
        skip = self.skip if network is self.network else None

        def ask(part: Tensor) -> Asking[tuple[Tensor, Tensor, list[Tensor]]]:
            batch = self.source.fetch(part.tolist()).float()
            answer = yield Pass(batch, read=sites, output=False)
            return part, batch, [unit_maps(answer.reads[s], m, skip).cpu() for s, m in zip(sites, modules, strict=True)]

        jobs = (Job("exemplars", i, network, lambda p=p: ask(p)) for i, p in enumerate(parts))
        for _, found in self.runner.drive(jobs, len(parts), "reading exemplars"):
            yield found


def find_exemplars(
    network: Network,
    images: Any,
    sites: str | Sequence[str],
    *,
    k: int = 15,
    quantile: float = 0.99,
    places: int = 1024,
    size: int = 1024,
    skip: int | None = None,
    batch: int = 8,
    profiles: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Exemplars:
    """The images that each unit of some sites fires on most, in one pass over any number of images.

    Parameters
    ----------
    network : Network
    images : Tensor or ndarray (n, channels, height, width), Dataset, or iterable of batches
        As `ImageSource` takes them. Of a tensor or a Dataset nothing is held. Of an iterable those images are held that are
        among the exemplars so far: at most k a unit, however many there are.
    sites : str or sequence of str
        Outputs of convolutions, tokens of a transformer (their grid is found; see `unit_maps`), or single units.
    k : int, default 15
    quantile : float, default 0.99
        A unit fires where its activation exceeds this quantile of all places of all images.
    places : int, default 1024
        Places of each map that the quantile looks at, drawn anew for every batch; smaller maps are looked at whole.
    size : int, default 1024
        Values that the quantile keeps a unit: see `TailQuantile`. Memory is at most units × size × 6 bytes where the number of
        images is known, as of a tensor and a Dataset, and nine times that where it is not.
    skip : int, optional
        Tokens before those of the image's grid; found by default.
    batch : int, default 8
        Images at once: their activations at all sites are held together.
    profiles : bool, default False
        Also keep the largest activation of every unit in every image: 4 bytes each, so that memory grows with the images.
    seed : int, default 0
        Of places and thinning.
    progress : bool, default True

    Returns
    -------
    Exemplars

    Raises
    ------
    InputError
        No image, images that the network does not take (grey, RGBA, too small), parameters out of range.
    NonFiniteError
        NaN or infinity on the way.

    References
    ----------
    Bau, Zhou, Khosla, Oliva & Torralba (2017). Network dissection: quantifying interpretability of deep visual representations.
    Hernandez, Schwettmann, Bau, Bagashvili, Torralba & Andreas (2022). Natural language descriptions of deep visual features.

    Examples
    --------
    >>> import torch, nissl
    >>> net = nissl.Network(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
    >>> found = find_exemplars(net, torch.rand(20, 3, 8, 8), "1", k=5)
    >>> found.ids.shape, found.masks(0).shape
    (torch.Size([4, 5]), torch.Size([1, 5, 8, 8]))
    """
    instance("network", network, Network)
    names = (sites,) if isinstance(sites, str) else items("sites", sites)
    if not names or len(set(names)) < len(names):
        raise InputError(f"sites must be named, none of them twice; got {names!r:.80}")
    names = tuple(str(network.locate(s)) for s in names)
    for name, value, low in (("k", k, 1), ("places", places, 1), ("batch", batch, 1), ("seed", seed, 0)):
        at_least(name, value, low)
    if skip is not None:
        at_least("skip", skip, 0)
    TailQuantile(1, quantile, size)  # raises where these are out of range, before anything runs
    source = ImageSource(images)
    modules = [network.get_module(parse(s).module) for s in names]
    generator = torch.Generator().manual_seed(seed)
    runner = Runner(batch, memory=0, progress=progress)

    def ask(pixels: Tensor) -> Asking[list[tuple[Tensor, Tensor]]]:
        answer = yield Pass(pixels, read=names, output=False)
        found = []
        for name, module in zip(names, modules, strict=True):
            flat = unit_maps(answer.reads[name], module, skip).flatten(2)
            n = flat.shape[2]
            some = flat[:, :, torch.randperm(n, generator=generator)[:places].sort().values] if n > places else flat
            found.append((flat.amax(2).float().cpu(), some.transpose(0, 1).flatten(1).float().cpu()))
        return found

    def jobs() -> Iterator[Job]:
        for start, pixels in source.batches(batch):
            yield Job("exemplars", (start, pixels), network, lambda p=pixels: ask(p.float()))

    total = math.ceil(len(images) / batch) if source.indexed else None
    best, ids = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.long)
    tails: list[TailQuantile] = []
    kept: list[Tensor] = []
    n_images = 0
    for job, found in runner.drive(jobs(), total, "looking for exemplars"):
        start, pixels = job.key
        peaks = torch.cat([p for p, _ in found], 1).T
        if not tails:
            best, ids = peaks[:, :0], torch.empty(len(peaks), 0, dtype=torch.long)
            # with the number of images, that of values is known
            sizes = [len(images) * v.shape[1] // len(pixels) if source.indexed else None for _, v in found]
            tails = [
                TailQuantile(p.shape[1], quantile, size, total, seed + i)
                for i, ((p, _), total) in enumerate(zip(found, sizes, strict=True))
            ]
        if profiles:
            kept.append(peaks)
        numbers = torch.arange(start, start + len(pixels)).expand(len(peaks), -1)
        # stable, so that of equal activations the earlier image stays
        best, order = torch.cat([best, peaks], 1).sort(dim=1, descending=True, stable=True)
        best, ids = best[:, :k], torch.cat([ids, numbers], 1).gather(1, order[:, :k])
        for tail, (_, values) in zip(tails, found, strict=True):
            tail.update(values)
        source.keep(set() if source.indexed else set(ids.unique().tolist()), start, pixels)
        n_images += len(pixels)
    if (missing := k - ids.shape[1]) > 0:
        best, ids = F.pad(best, (0, missing), value=-math.inf), F.pad(ids, (0, missing), value=-1)
    for name, tail in zip(names, tails, strict=True):
        if tail.scale == 0 and tail.n * (1 - quantile) < 1 - 1e-9:
            raise InputError(
                f"{name} has {tail.n} places in {n_images} images: too few for the quantile {quantile}; "
                "give more images or a smaller quantile"
            )
    threshold = torch.cat([t.value() for t in tails])
    counts = torch.tensor([t.n_units for t in tails])
    return Exemplars(
        names,
        torch.repeat_interleave(torch.arange(len(names)), counts),
        torch.cat([torch.arange(int(c)) for c in counts]),
        ids.contiguous(),
        best.contiguous(),
        threshold,
        best[:, 0] > threshold,
        n_images,
        network,
        source,
        skip,
        runner,
        torch.cat(kept, 1) if profiles else None,
    )


def plot_exemplars(
    exemplars: Exemplars, row: int, n: int = 8, title: str | None = None, path: str | Path | None = None
) -> Figure:
    """Picture of a unit: its exemplars, dark where the unit does not fire.

    Parameters
    ----------
    exemplars : Exemplars
    row : int
        Which unit; see `Exemplars.row`.
    n : int, default 8
    title : str, optional
        Such as the unit's description; its name by default.
    path : path, optional
        Write the figure there.
    """
    from matplotlib.figure import Figure

    at_least("n", n, 1)
    if not (is_whole(row) and 0 <= row < len(exemplars)):
        raise InputError(f"units stand in rows 0 to {len(exemplars) - 1}; got {row!r}")
    images, masks = exemplars.images(row)[:n], exemplars.masks(row)[0][:n]
    figure = Figure(figsize=(1.3 * len(images), 1.7), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(images)))
    for ax, image, mask, peak in zip(axes, images, masks, exemplars.activations[row], strict=False):
        shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
        shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-12)
        shown = torch.where(mask, shown, 0.3 * shown)
        ax.imshow(shown.permute(1, 2, 0).numpy())
        ax.set_title(f"{float(peak):.2g}", fontsize=7)
        ax.axis("off")
    figure.suptitle(title or exemplars.name(row), fontsize=9)
    if path is not None:
        figure.savefig(as_path("path", path), dpi=120)
    return figure
