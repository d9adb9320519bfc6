"""Sheets of units: exemplars, words, facets, most similar units, and what switching a unit off does to the classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least, flag, instance, is_whole, items
from nissl.concepts.descriptions import Descriptions, LabelDescriber, Milan
from nissl.concepts.exemplars import Exemplars, ImageSource, find_exemplars
from nissl.concepts.facets import group
from nissl.concepts.synthesis import MEAN, ActivationMaximisation, Phase
from nissl.errors import GradientError, InputError, SiteError
from nissl.network import Ablate, Network, Pass, Set
from nissl.network.part import Part
from nissl.network.site import Site, parse, unit_axis
from nissl.network.target import channel
from nissl.runner import Asking

MASK = 56
"""Pixels of the longer side of a mask."""
APART = 0.25
"""Mean silhouette up to which Kaufman & Rousseeuw (1990) see no structure."""


@dataclass(frozen=True, eq=False)
class UnitSheets:
    """What is known of some units; made by `unit_sheets`. Every tensor has the units of `exemplars` first.

    Attributes
    ----------
    exemplars : Exemplars
        Of the chosen units, with the `profiles` of these.
    masks : Tensor (units, k, height, width) of bool
        Where each unit fires in its exemplars, on a grid of at most 56 × 56.
    selectivity : Tensor (units,)
        Lifetime sparseness of the largest activation in each image: 0 where all images excite alike, 1 where one does.
    descriptions : Descriptions or None
    facet : Tensor (units, k) of int
        Which facet an exemplar belongs to; -1 where the unit does not fire.
    silhouette : Tensor (units,)
        Mean silhouette of the facets; NaN where there is one only.
    similar : Tensor (units, m, 2) of int
        Number of the site and of the unit whose largest activations correlate most over the images; -1 where there is none.
    correlation : Tensor (units, m)
    similar_image : Tensor (units, m) of int
        Number of the image that excites the similar unit most; -1 where there is none.
    active : Tensor (units,) of int
        Exemplars in which the unit fires: over these the changes are means.
    logits, probabilities : Tensor (units, classes) or None
        Mean change of each output, and of its softmax, when the unit is switched off; NaN for a unit that never fires. There are
        no probabilities of a single output.
    predicted : Tensor (units, 2) or None
        The same of the class that is predicted for each image: of its output, and of its probability.
    flips : Tensor (units,) or None
        Share of these images in which another class is predicted then.
    synthesis : dict of (row, facet) to Tensor (channels, height, width)
        Synthetic pictures of facets, as the network takes them; empty unless asked for.
    pictures : dict of int to ndarray of uint8 (height, width, 3)
        The images among the exemplars, by number.
    totals : tuple of int
        Units of each site, chosen or not.
    silent : tuple of tuple of int
        Numbers of those that never fire.
    rule : str
        How units were chosen.
    class_names, names : tuple of str or None
        Of outputs and of images.
    labels : Tensor (n_images,) of int or None
    cost : dict of str to int
        Forward rows asked for each step. Rows of "switching off" run only what lies behind the last place at which the
        network can be cut before the unit.
    """

    exemplars: Exemplars
    masks: Bool[Tensor, "units k h w"]
    selectivity: Float[Tensor, " units"]
    descriptions: Descriptions | None
    facet: Int[Tensor, "units k"]
    silhouette: Float[Tensor, " units"]
    similar: Int[Tensor, "units m two"]
    correlation: Float[Tensor, "units m"]
    similar_image: Int[Tensor, "units m"]
    active: Int[Tensor, " units"]
    logits: Float[Tensor, "units classes"] | None
    probabilities: Float[Tensor, "units classes"] | None
    predicted: Float[Tensor, "units two"] | None
    flips: Float[Tensor, " units"] | None
    synthesis: dict[tuple[int, int], Tensor]
    pictures: dict[int, np.ndarray]
    totals: tuple[int, ...]
    silent: tuple[tuple[int, ...], ...]
    rule: str
    class_names: tuple[str, ...] | None = None
    names: tuple[str, ...] | None = None
    labels: Int[Tensor, " n"] | None = None
    cost: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of units."""
        return len(self.exemplars)

    def class_name(self, index: int) -> str:
        """What an output is called."""
        return f"class {index}" if self.class_names is None else self.class_names[index]

    @property
    def effect(self) -> Float[Tensor, " units"]:
        """Largest mean change of an output, whatever its sign; NaN where none was measured."""
        if self.logits is None:
            return torch.full((len(self),), math.nan)
        return self.logits.abs().amax(1)

    def table(self) -> pd.DataFrame:
        """One row a unit: site, unit, whether it fires, text and score, selectivity, facets, strongest effect."""
        e = self.exemplars
        rows = []
        for i in range(len(self)):
            said = None if self.descriptions is None else self.descriptions[i]
            row = {
                "site": e.sites[int(e.site[i])], "unit": int(e.unit[i]), "fires": bool(e.fires[i]),
                "text": "" if said is None else said.text, "score": math.nan if said is None else said.score,
                "selectivity": float(self.selectivity[i]), "facets": int(self.facet[i].max()) + 1,
                "silhouette": float(self.silhouette[i]), "images": int(self.active[i]),
            }  # fmt: skip
            if self.logits is not None and self.predicted is not None and self.flips is not None:
                change = self.logits[i]
                most = int(change.nan_to_num().abs().argmax())
                row |= {
                    "most_changed": self.class_name(most) if self.active[i] else "", "change": float(change[most]),
                    "predicted_change": float(self.predicted[i, 0]), "flips": float(self.flips[i]),
                }  # fmt: skip
            rows.append(row)
        return pd.DataFrame(rows)


def unit_sheets(
    network: Network,
    images: Any,
    sites: str | Sequence[str] | None = None,
    *,
    labels: Any = None,
    class_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    pictures: np.ndarray | None = None,
    units: Any = 64,
    exemplars: int = 12,
    facets: int = 2,
    similar: int = 6,
    quantile: float = 0.99,
    describer: Any = None,
    code_site: str | None = None,
    switch_off: bool = True,
    synthesis: bool = False,
    phases: Sequence[Phase] = MEAN,
    mean: Any = 0.0,
    std: Any = 1.0,
    batch: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> UnitSheets:
    """Look at units of a network of images from all sides.

    Parameters
    ----------
    network : Network
        Of images; with outputs (n, classes) where units are to be switched off.
    images : Tensor or ndarray (n, channels, height, width), Dataset, or iterable of batches
        As `find_exemplars` takes them.
    sites : str or sequence of str, optional
        By default three layers; see `convolution_sites`.
    labels : Tensor or ndarray (n,) of int, optional
        Class of each image. The classes that occur are the words that units are described by.
    class_names, names : sequence of str, optional
        Of outputs and of images.
    pictures : ndarray of uint8 (n, height, width, 3), optional
        The images as they are shown; by default `images` times `std` plus `mean` where these are given, else stretched.
    units : int, sequence of int or mapping of site to sequence of int, default 64
        How many units of each site at most: of those that fire the most selective, then those that do not. Or their numbers,
        in all sites or in each.
    exemplars : int, default 12
        Images a unit.
    facets : int, default 2
        Clusters that a unit's exemplars are sorted into, where it fires in at least five for each; 1 leaves them together.
    similar : int, default 6
        Most similar units a unit, of all units of the sites.
    quantile : float, default 0.99
        See `find_exemplars`.
    describer : LabelDescriber or fitted Milan, optional
        ``LabelDescriber()`` by default, where there are labels.
    code_site : str, optional
        Where exemplars are compared for facets; by default what the last linear layer takes. Without
        one they are left together.
    switch_off : bool, default True
        Measure what switching units off does.
    synthesis : bool, default False
        Also a synthetic picture of each facet, by `ActivationMaximisation` from the mean of its exemplars: `phases` says how
        many steps, each of them a pass with a gradient.
    mean, std : float or sequence of float, default 0, 1
        What the network takes is (pixel / 255 - mean) / std. For synthesis, and for showing images.
    batch : int, default 8
        Rows at once.
    seed : int, default 0
    progress : bool, default True

    Returns
    -------
    UnitSheets

    Raises
    ------
    InputError
        No image, images that the network does not take, a unit that is not there, too few exemplars for the facets, labels
        that do not fit the images, outputs that are no classes.
    SiteError
        A site that is not there, or has no units with maps.

    Notes
    -----
    Passes over images: one over all of them for exemplars, one more where units are described by labels, two over those among
    the exemplars. Then units × exemplars in which they fire, rows at most, of what lies behind the layer: the activations at
    the last site before it at which the network can be cut are set to those recorded, the unit is ablated to zero, and the
    Runner fills batches across units and images. Memory: 4 bytes a unit of the sites and an image.

    References
    ----------
    Vinje & Gallant (2000). Sparse coding and decorrelation in primary visual cortex during natural vision. Science 287, 1273-1276.
    Kaufman & Rousseeuw (1990). Finding groups in data.
    """
    instance("network", network, Network)
    for name, value in (("exemplars", exemplars), ("facets", facets), ("batch", batch)):
        at_least(name, value, 1)
    at_least("similar", similar, 0)
    at_least("seed", seed, 0)
    flag("switch_off", switch_off)
    flag("synthesis", synthesis)
    if facets > 1 and exemplars < 5 * facets:
        raise InputError(f"{facets} facets need at least {5 * facets} exemplars a unit, got exemplars={exemplars}")
    if describer is not None and not isinstance(describer, (LabelDescriber, Milan)):
        raise InputError(f"describer must be a LabelDescriber or a fitted Milan, got {type(describer).__name__}")
    if code_site is not None:
        network.locate(code_site)
    ascent = ActivationMaximisation(phases, mean=mean, std=std, seed=seed, progress=progress)
    source = ImageSource(images)
    sized = len(images) if source.indexed else None
    said = _labels(labels, sized, class_names, describer)
    if pictures is not None and not (
        isinstance(pictures, np.ndarray) and pictures.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[3] == 3
        and sized in (None, len(pictures))
    ):  # fmt: skip
        raise InputError("pictures must be an array of uint8 (n, height, width, 3), one for each image")
    if names is not None and sized not in (None, len(items("names", names))):
        raise InputError(f"there are {sized} images and {len(names)} names")
    if sites is None:
        if not source.indexed:
            raise InputError("name sites: layers are found on an image, and an iterable of batches is read only once")
        sites = convolution_sites(network, source.fetch([0]).float())
    given = (sites,) if isinstance(sites, str) else items("sites", sites)
    addresses = tuple(str(network.locate(s)) for s in given)
    wanted = _wanted(units, addresses)
    if source.indexed:  # a unit that is not there is named before anything runs
        _require_units(network, source.fetch([0]).float(), addresses, wanted)
    found = find_exemplars(
        network, images, addresses, k=exemplars, quantile=quantile, batch=batch, profiles=True, seed=seed, progress=progress
    )  # fmt: skip
    assert found.profiles is not None
    for what, some in (("labels", said), ("names", names), ("pictures", pictures)):
        if some is not None and len(some) != found.n_images:
            raise InputError(f"there are {found.n_images} images and {len(some)} {what}")
    selectivity = sparseness(found.profiles)
    rows, rule = _choose(found, selectivity, wanted)
    chosen = found[rows]
    runner = chosen.runner
    height, width = found.source.fetch([int(found.ids[0, 0])]).shape[-2:]
    side = MASK / max(height, width, MASK)
    masks = chosen.masks(size=(max(1, round(height * side)), max(1, round(width * side))))
    descriptions = None
    if isinstance(describer, Milan):
        descriptions = describer.describe(chosen)
    elif said is not None:
        classes = said.unique()
        words = [f"class {int(c)}" if class_names is None else str(class_names[int(c)]) for c in classes]
        if len(set(words)) < len(words):  # two classes of one name
            words = [f"{w} ({int(c)})" for w, c in zip(words, classes, strict=True)]
        descriptions = (describer or LabelDescriber()).describe(chosen, images, said[:, None] == classes, words)
    codes, logits, probabilities, predicted, flips = _passes(chosen, code_site, switch_off, facets > 1, batch)
    if class_names is not None and logits is not None and len(class_names) != logits.shape[1]:
        raise InputError(f"the network has {logits.shape[1]} outputs, {len(class_names)} class names were given")
    facet, silhouette = _facets(chosen, codes, facets, seed)
    nearest, correlation = most_similar(found, rows, similar)
    starts = torch.tensor([0, *torch.bincount(found.site, minlength=len(addresses)).cumsum(0)[:-1].tolist()])
    strongest = torch.where(
        nearest[..., 0] >= 0, found.ids[(starts[nearest[..., 0]] + nearest[..., 1]).clamp(min=0), 0], -1
    )
    totals = torch.bincount(found.site, minlength=len(addresses))
    return UnitSheets(
        chosen, masks, selectivity[rows], descriptions, facet, silhouette, nearest, correlation, strongest,
        _fires_in(chosen).sum(1), logits, probabilities, predicted, flips, _synthetic(chosen, facet, ascent) if synthesis else {},
        _shown(chosen, pictures, mean, std), tuple(totals.tolist()),
        tuple(tuple(found.unit[(found.site == i) & ~found.fires].tolist()) for i in range(len(addresses))),
        rule, None if class_names is None else tuple(map(str, class_names)), None if names is None else tuple(map(str, names)),
        said, {name: cost.forward for name, cost in runner.costs.items()},
    )  # fmt: skip


def convolution_sites(network: Network, images: Tensor, n: int = 3) -> list[str]:
    """Layers spread evenly over the depth of a network, the last convolution among them.

    A convolution is taken where its norm and activation have been applied, as far as these are modules that follow it and keep its
    shape: there, zero means off. Where there are fewer than two convolutions with maps, as in a vision transformer, activations
    inside blocks of tokens are taken.

    Raises
    ------
    SiteError
        There is neither.
    """
    found = network.sites("*", images[:1])
    convs = []
    for i, site in enumerate(found):
        if site.role == "conv" and site.shape is not None and len(site.shape) == 3 and math.prod(site.shape[1:]) > 1:
            for after in found[i + 1 :]:
                if after.shape != site.shape or after.role not in ("norm", "activation"):
                    break
                site = after
            convs.append(site.address)
    if len(convs) < 2:
        convs += [s.address for s in found if s.role == "activation" and s.shape is not None and len(s.shape) == 2]
    if not convs:
        raise SiteError(f"{network.name} has no convolution with maps; name the layers whose units are wanted")
    return [convs[i] for i in sorted({math.ceil((j + 1) * len(convs) / n) - 1 for j in range(n)})]


def sparseness(profiles: Float[Tensor, "units n"]) -> Float[Tensor, " units"]:
    """Lifetime sparseness (1 - mean(r)² / mean(r²)) / (1 - 1/n) of responses r, negative ones counted as 0; 0 without any."""
    r, n = profiles.clamp(min=0).double(), profiles.shape[1]
    second = r.square().mean(1)
    share = torch.where(second > 0, r.mean(1).square() / second.where(second > 0, 1.0), 1.0)
    return ((1 - share) / (1 - 1 / max(n, 2))).clamp(0, 1).float()


def most_similar(found: Exemplars, rows: Tensor, n: int) -> tuple[Int[Tensor, "rows m two"], Float[Tensor, "rows m"]]:
    """Units of all sites whose largest activations correlate most with those of some rows, over the images.

    Returns
    -------
    Tensor (rows, m, 2) of int, Tensor (rows, m)
        Site and unit, and the correlation, largest first; m is at most `n`. -1 and NaN where either unit is constant.
    """
    assert found.profiles is not None
    centred = found.profiles.double() - found.profiles.double().mean(1, keepdim=True)
    length = centred.norm(dim=1)
    # rounding of equal values is not a profile
    varies = length > 1e-6 * found.profiles.double().norm(dim=1)
    unit = torch.where(varies[:, None], centred / length.where(varies, 1.0)[:, None], 0.0)
    r = torch.where(varies[rows, None] & varies, unit[rows] @ unit.T, -math.inf)
    r[torch.arange(len(rows)), rows] = -math.inf
    best, index = r.topk(min(n, len(found) - 1), dim=1)
    known = best > -math.inf
    pairs = torch.stack([found.site[index], found.unit[index]], 2)
    return torch.where(known[..., None], pairs, -1), torch.where(known, best.clamp(-1, 1), math.nan).float()


# ---------------------------------------------------------------- which units


def _labels(labels: Any, n: int | None, class_names: Any, describer: Any) -> Tensor | None:
    if labels is None:
        if isinstance(describer, LabelDescriber):
            raise InputError("a LabelDescriber needs labels=, the class of each image")
        return None
    found = torch.as_tensor(labels)
    if (
        found.ndim != 1
        or found.is_floating_point()
        or found.dtype == torch.bool
        or (len(found) and int(found.min()) < 0)
    ):
        raise InputError(f"labels must be class indices (n,), got {found.dtype} of shape {tuple(found.shape)}")
    if n is None:
        raise InputError("labels need images that can be read again: give a tensor or a Dataset")
    if len(found) != n:
        raise InputError(f"there are {n} images and {len(found)} labels")
    if class_names is not None and int(found.max()) >= len(items("class_names", class_names)):
        raise InputError(f"label {int(found.max())} has no name among {len(class_names)} class names")
    return found.long().cpu()


def _wanted(units: Any, sites: Sequence[str]) -> int | dict[str, list[int]]:
    """How many units a site, or their numbers in each."""
    if is_whole(units):
        at_least("units", units, 1)
        return int(units)
    if isinstance(units, Mapping):
        if unknown := [s for s in units if s not in sites]:
            raise InputError(f"units are named of {unknown[0]!r}, which is none of the sites {list(sites)[:10]}")
        table = {str(s): items("units", u) for s, u in units.items()}
        if missing := [s for s in sites if not table.get(s)]:
            raise InputError(f"no unit is named of {missing[0]!r}")
    else:
        table = dict.fromkeys(sites, items("units", units))
    for numbers in table.values():
        if not numbers or not all(is_whole(u) for u in numbers):
            raise InputError(f"units must be named by their numbers, got {numbers!r:.60}")
    return {s: sorted({int(u) for u in numbers}) for s, numbers in table.items()}


def _require_units(network: Network, image: Tensor, sites: Sequence[str], wanted: int | dict[str, list[int]]) -> None:
    if isinstance(wanted, int):
        return
    for site in sites:
        size = _site(network, site, image).n_units or 0
        if bad := [u for u in wanted[site] if not 0 <= u < size]:
            raise InputError(f"{site} has the units 0 to {size - 1}; there is no unit {bad[0]}")


def _site(network: Network, address: str, image: Tensor) -> Site:
    found = next(
        (s for s in network.sites(address, image) if address in (s.address, s.address.partition("#")[0])), None
    )
    if found is None or found.shape is None:
        raise SiteError(f"{network.name} did not reach {address!r} on these images")
    return found


def _choose(
    found: Exemplars, selectivity: Tensor, wanted: int | dict[str, list[int]]
) -> tuple[Int[Tensor, " rows"], str]:
    rows = []
    for i, site in enumerate(found.sites):
        here = torch.nonzero(found.site == i)[:, 0]
        if isinstance(wanted, int):
            order = (selectivity[here] + 2.0 * found.fires[here]).argsort(descending=True, stable=True)
            rows.append(here[order[:wanted].sort().values])
        else:
            if bad := [u for u in wanted[site] if not 0 <= u < len(here)]:
                raise InputError(f"{site} has the units 0 to {len(here) - 1}; there is no unit {bad[0]}")
            rows.append(here[torch.tensor(wanted[site])])
    if isinstance(wanted, int):
        rule = f"at most {wanted} a layer: of the units that fire the most selective, then those that never fire"
    else:
        rule = "named by number"
    return torch.cat(rows), rule


# ---------------------------------------------------------------- what they do


def _fires_in(e: Exemplars) -> Bool[Tensor, "units k"]:
    """In which of its exemplars a unit fires."""
    return (e.ids >= 0) & e.fires[:, None] & (e.activations > e.threshold[:, None])


def _passes(
    e: Exemplars, code_site: str | None, switch_off: bool, codes: bool, batch: int
) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Codes by number of the image; mean changes of outputs, of probabilities, of the predicted class; share of flips."""
    network = e.network
    ids = torch.unique(e.ids[e.ids >= 0]).tolist()
    example = e.source.fetch(ids[:1]).float()
    trace = network.trace_of(Pass(network.place(example)))
    code = code_site or (trace.last_linear(network) if codes else None)
    if not switch_off and code is None:
        return {}, None, None, None, None
    active = _fires_in(e)
    cuts = [cut_before(network, s, example) if switch_off else None for s in e.sites]
    axes = [_axis(network, s, example) for s in e.sites]
    read = [s for s in (*cuts, code) if s is not None]

    def ask(image: int) -> Asking[tuple[Tensor | None, list[tuple[Tensor, ...]]]]:
        x = e.source.fetch([image]).float()
        clean = yield Pass(x, read=read, output=switch_off)
        seen = None if code is None else clean.reads[code].flatten().float().cpu()
        if not switch_off:
            return seen, []
        before = clean.output
        if before is None or before.ndim != 2:
            shape = None if before is None else tuple(before.shape)
            raise InputError(f"switching units off needs outputs (n, classes), got {shape}; or give switch_off=False")
        parts, questions = [], []
        for i, (site, cut, (axis, ndim, n_units)) in enumerate(zip(e.sites, cuts, axes, strict=True)):
            rows = torch.nonzero(((e.ids == image) & active).any(1) & (e.site == i))[:, 0]
            for part in rows.split(batch) if len(rows) else ():
                shape = [len(part)] + [1] * (ndim - 1)
                shape[axis] = n_units
                where = F.one_hot(e.unit[part], n_units).bool().reshape(shape)
                edits = [Ablate(site, where=where)]
                if cut is not None:
                    edits.insert(0, Set(cut, clean.reads[cut].expand(len(part), *clean.reads[cut].shape[1:])))
                questions.append(Pass(x.expand(len(part), *x.shape[1:]), edits))
                parts.append(part)
        answers = (yield questions) if questions else []
        changes = []
        for part, answer in zip(parts, answers, strict=True):
            after, top = answer.output, int(before.argmax(1))
            logit, probability = (after - before).double().cpu(), (after.softmax(1) - before.softmax(1)).double().cpu()
            own = torch.stack([logit[:, top], probability[:, top]], 1)
            changes.append((part, logit, probability, own, (after.argmax(1) != top).double().cpu()))
        return seen, changes

    starts = [lambda i=i: ask(i) for i in ids]
    what = ("switching units off", "switching off") if switch_off else ("reading codes", "codes")
    answers = e.runner.collect(network, starts, *what)
    seen = {i: c for i, (c, _) in zip(ids, answers, strict=True) if c is not None}
    if not switch_off:
        return seen, None, None, None, None
    changes = [c for _, some in answers for c in some]
    n_classes = changes[0][1].shape[1] if changes else 0
    shapes = ((len(e), n_classes), (len(e), n_classes), (len(e), 2), (len(e),))
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for part, *some in changes:
        for total, change in zip(sums, some, strict=True):
            total.index_add_(0, part, change)
    n = active.sum(1).double()
    # 0 / 0 is NaN: nothing was measured
    logits, probabilities, predicted, flips = ((s / n.reshape(-1, *[1] * (s.ndim - 1))).float() for s in sums)
    return seen, logits, probabilities if n_classes > 1 else None, predicted, flips


def _axis(network: Network, address: str, image: Tensor) -> tuple[int, int, int]:
    """Axis of the units at a site, dimensions with rows, and number of units."""
    site = _site(network, address, image)
    assert site.shape is not None
    ndim = len(site.shape) + 1
    axis = unit_axis(network.get_module(parse(address).module), ndim)
    return axis, ndim, site.shape[axis - 1]


def cut_before(network: Network, site: str, image: Tensor, tries: int = 40) -> str | None:
    """The last site before another at which the network can be cut, so that all before it need not run again.

    None where there is no such place within `tries` sites, as in front of the first layer.
    """
    order = network.trace_of(Pass(network.place(image[:1])))
    at = order.position(parse(site))
    places = [(order.position(parse(s.address)), s.address) for s in network.sites("*", image[:1])]
    before = [a for p, a in places if p is not None and at is not None and 0 <= p < at]
    for address in before[: -tries - 1 : -1]:
        try:
            Part(network, address, inputs=image[:1])
        except (InputError, SiteError):  # something behind it needs what lies before it
            continue
        return address
    return None


# ---------------------------------------------------------------- facets and pictures


def _facets(
    e: Exemplars, codes: Mapping[int, Tensor], k: int, seed: int
) -> tuple[Int[Tensor, "units k"], Float[Tensor, " units"]]:
    active = _fires_in(e)
    facet = torch.where(active, 0, -1)
    silhouette = torch.full((len(e),), math.nan)
    if k == 1 or not codes:
        return facet, silhouette
    for row in torch.nonzero(active.sum(1) >= 5 * k)[:, 0].tolist():
        slots = torch.nonzero(active[row])[:, 0]
        some = torch.stack([codes[int(i)] for i in e.ids[row, slots]]).numpy()
        labels, apart = group(some, k, seed=seed)
        # facets are numbered by their strongest exemplar
        first = {label: number for number, label in enumerate(dict.fromkeys(labels.tolist()))}
        facet[row, slots] = torch.tensor([first[label] for label in labels.tolist()])
        silhouette[row] = apart
    return facet, silhouette


def _synthetic(e: Exemplars, facet: Tensor, ascent: ActivationMaximisation) -> dict[tuple[int, int], Tensor]:
    found = {}
    for row in torch.nonzero(e.fires)[:, 0].tolist():
        numbers = [j for j in range(int(facet[row].max()) + 1)]
        means = torch.stack([e.source.fetch(e.ids[row][facet[row] == j].tolist()).float().mean(0) for j in numbers])
        target = channel(e.sites[int(e.site[row])], int(e.unit[row]))
        try:
            images = ascent.run(e.network, target, means).inputs
        except GradientError:  # a unit may be silent at the mean of images that excite it: no ascent starts there
            continue
        found |= {(row, j): image for j, image in zip(numbers, images, strict=True)}
    return found


def _shown(e: Exemplars, pictures: np.ndarray | None, mean: Any, std: Any) -> dict[int, np.ndarray]:
    ids = torch.unique(e.ids[e.ids >= 0]).tolist()
    if pictures is not None:
        return {i: pictures[i] for i in ids}
    return {i: as_picture(e.source.fetch([i])[0].float(), mean, std) for i in ids}


def as_picture(image: Tensor, mean: Any = 0.0, std: Any = 1.0) -> np.ndarray:
    """An image as the network takes it, as uint8 (height, width, 3): scaled back by `mean` and `std`, stretched without them."""
    low, spread = (torch.as_tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (mean, std))
    shown = image.cpu() * spread + low
    if bool((low == 0).all() and (spread == 1).all()):
        shown = (shown - shown.min()) / (shown.max() - shown.min()).clamp(min=1e-12)
    shown = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
    return (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
