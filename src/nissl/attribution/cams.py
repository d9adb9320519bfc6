"""Class activation maps, weighted sums of a layer's channels: Grad-CAM, Grad-CAM++, Layer-, Score- and Ablation-CAM."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from nissl.arguments import at_least, flag
from nissl.attribution.base import Method
from nissl.attribution.masking import Baseline, baseline_of, check_baseline, masked
from nissl.errors import InputError
from nissl.network import Site
from nissl.network.site import parse
from nissl.network.trace import Trace
from nissl.runner import Asking, Explained, Question, chunks, explained


@dataclass(frozen=True, eq=False)
class CAM(Method):
    """What class activation maps share: where the map is taken and how it is laid out.

    Parameters
    ----------
    layer : str, optional
        Site whose channels are summed; ``"input"`` is allowed. By default the site that is asked about (ML-Att), and
        where that is the input, `last_map`.
    upsample : bool, default True
        Interpolate (bilinear, half-pixel) to the input's size where scores are asked at the input; the layer's own
        resolution otherwise.
    """

    layer: str | None = None
    upsample: bool = True

    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        flag("upsample", self.upsample)

    @abstractmethod
    def channel_sum(self, q: Question, maps: list[Map], place: Map) -> Asking[Tensor]:
        """The weighted sum of the channels of `place`, before its positive part: (1, positions...)."""

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        maps = maps_of(q)
        place = map_at(q, maps, self.layer)
        cam = yield from self.channel_sum(q, maps, place)
        cam, dims = lay_out(q, maps, place, cam.relu(), self.upsample)
        return explained(q, cam[0], dims=dims)


@dataclass(frozen=True, eq=False)
class GradCAM(CAM):
    """Channels weighted by their gradients, averaged over positions: ReLU(Σ_c mean_p(∂y/∂A_c) A_c).

    Parameters
    ----------
    layer : str, optional
        Site whose channels are summed; ``"input"`` is allowed. By default the site that is asked about (ML-Att), and
        where that is the input, `last_map`.
    upsample : bool, default True
        Interpolate (bilinear, half-pixel) to the input's size where scores are asked at the input.

    References
    ----------
    Selvaraju, Cogswell, Das, Vedantam, Parikh, Batra: Grad-CAM (2017).
    """

    name: ClassVar[str] = "gradcam"
    title: ClassVar[str] = "Grad-CAM"
    paper: ClassVar[str] = "Selvaraju et al. 2017"
    differentiates: ClassVar[bool] = True

    def channel_sum(self, q: Question, maps: list[Map], place: Map) -> Asking[Tensor]:
        """See `CAM.channel_sum`."""
        a, g = yield from activation_and_gradient(q, place)
        return channels(g.flatten(2).mean(2), a)


@dataclass(frozen=True, eq=False)
class GradCAMPlusPlus(CAM):
    """Channels weighted by their positive gradients, each position with its own coefficient.

    Parameters
    ----------
    layer : str, optional
        Site whose channels are summed; ``"input"`` is allowed. By default the site that is asked about (ML-Att), and
        where that is the input, `last_map`.
    upsample : bool, default True
        Interpolate (bilinear, half-pixel) to the input's size where scores are asked at the input.

    Notes
    -----
    The paper differentiates exp(y), for which its coefficients have the closed form g² / (2g² + Σ_p A_p g³) with
    g = ∂y/∂A. They are written here as 1 / (2 + g Σ_p A_p), which does not underflow where gradients are small. The
    common factor exp(y) of all weights is left out: it would overflow for large logits and only scales the map.

    References
    ----------
    Chattopadhay, Sarkar, Howlader, Balasubramanian: Grad-CAM++ (2018).
    """

    name: ClassVar[str] = "gradcam++"
    title: ClassVar[str] = "Grad-CAM++"
    paper: ClassVar[str] = "Chattopadhay et al. 2018"
    differentiates: ClassVar[bool] = True

    def channel_sum(self, q: Question, maps: list[Map], place: Map) -> Asking[Tensor]:
        """See `CAM.channel_sum`."""
        a, g = yield from activation_and_gradient(q, place)
        a_sum = a.flatten(2).sum(2).reshape(*a.shape[:2], *[1] * (a.ndim - 2))
        denominator = 2 + g * a_sum
        alpha = 1 / torch.where(denominator == 0, 1, denominator)
        return channels((alpha * g.relu()).flatten(2).sum(2), a)


@dataclass(frozen=True, eq=False)
class LayerCAM(CAM):
    """Every position weighted by its own positive gradient: ReLU(Σ_c ReLU(∂y/∂A_c) A_c).

    Parameters
    ----------
    layer : str, optional
        Site whose channels are summed; ``"input"`` is allowed. By default the site that is asked about (ML-Att), and
        where that is the input, `last_map`.
    upsample : bool, default True
        Interpolate (bilinear, half-pixel) to the input's size where scores are asked at the input.

    References
    ----------
    Jiang, Zhang, Hou, Cheng, Wei: LayerCAM (2021).
    """

    name: ClassVar[str] = "layercam"
    title: ClassVar[str] = "Layer-CAM"
    paper: ClassVar[str] = "Jiang et al. 2021"
    differentiates: ClassVar[bool] = True

    def channel_sum(self, q: Question, maps: list[Map], place: Map) -> Asking[Tensor]:
        """See `CAM.channel_sum`."""
        a, g = yield from activation_and_gradient(q, place)
        return (g.relu() * a).sum(1)


@dataclass(frozen=True, eq=False)
class ScoreCAM(CAM):
    """Channels weighted by the score of the input seen through them; needs no gradient.

    Each channel is interpolated to the input's positions, scaled to [0, 1] and multiplied with the input; its weight is
    the softmax, over channels, of the target's scalar for these masked inputs.

    Parameters
    ----------
    layer : str, optional
        Site whose channels are summed; ``"input"`` is allowed. By default the site that is asked about (ML-Att), and
        where that is the input, `last_map`.
    upsample : bool, default True
        Interpolate (bilinear, half-pixel) to the input's size where scores are asked at the input.
    n_channels : int, optional
        Only the channels that vary most over positions; all by default.
    softmax : bool, default True
        As in the paper. With False the scalar is the weight itself; with ``target.probability(y)`` for a target that is
        what the authors' program computes.
    baseline : str, number or Tensor, default "zero"
        What shows where the mask is 0.

    Notes
    -----
    A channel that is constant over positions masks nothing and has weight 0. Token ids are masked at their embedding.

    References
    ----------
    Wang, Wang, Du, Yang, Zhang, Ding, Mardziel, Hu: Score-CAM (2020).
    """

    n_channels: int | None = None
    softmax: bool = True
    baseline: Baseline = "zero"

    name: ClassVar[str] = "scorecam"
    title: ClassVar[str] = "Score-CAM"
    paper: ClassVar[str] = "Wang et al. 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_channels is not None:
            at_least("n_channels", self.n_channels, 1)
        flag("softmax", self.softmax)
        check_baseline(self.baseline)

    def at_budget(self, passes: int) -> ScoreCAM:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_channels=max(min(self.n_channels or passes, passes - 1), 1))

    def channel_sum(self, q: Question, maps: list[Map], place: Map) -> Asking[Tensor]:
        """See `CAM.channel_sum`."""
        shown = q.at(q.network, differentiable=True, site=None)  # the input, or the embedding of token ids
        x = shown.input if shown.at_input else (yield from shown.value())
        b = yield from baseline_of(self.baseline, shown, x)
        if len(b) != 1:
            raise InputError(f"Score-CAM shows one baseline behind its masks, {len(b)} were given")
        window = map_at(shown, maps, shown.site)
        a = (yield q.ask(read=[place.site], scalar=False)).reads[place.site].movedim(place.axis, 1)
        spread = a.flatten(2).amax(2)[0] - a.flatten(2).amin(2)[0]
        order = most(spread, self.n_channels)
        scores = torch.zeros(len(order), dtype=a.dtype, device=a.device)
        for s in chunks(len(order)):
            mask, _ = lay_out(shown, maps, place, a[0, order[s]], upsample=True)
            if tuple(mask.shape[1:]) != window.positions:
                raise InputError(
                    f"Score-CAM masks the input with the maps of {place.site!r}, but those have positions "
                    f"{tuple(mask.shape[1:])} and the input {window.positions}: choose another layer="
                )
            flat = mask.flatten(1)
            low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
            unit = ((flat - low) / torch.where(high > low, high - low, 1)).reshape(mask.shape)
            answer = yield shown.ask(masked(x, b, unit.unsqueeze(window.axis)))
            scores[s] = answer.scalar.to(scores)
        live = spread[order] > 0
        if self.softmax:
            scores = scores.masked_fill(~live, -math.inf).softmax(0) if live.any() else torch.zeros_like(scores)
        return channels((scores * live)[None], a[:, order])


@dataclass(frozen=True, eq=False)
class AblationCAM(CAM):
    """Channels weighted by the share of the score that is lost without them, (y - y_without) / |y|; no gradient.

    Parameters
    ----------
    layer : str, optional
        Site whose channels are summed; ``"input"`` is allowed. By default the site that is asked about (ML-Att), and
        where that is the input, `last_map`.
    upsample : bool, default True
        Interpolate (bilinear, half-pixel) to the input's size where scores are asked at the input.
    n_channels : int, optional
        Only the channels that are largest in the mean absolute activation; all by default.

    Notes
    -----
    The paper divides by y, which turns the map around for a negative logit; its size is taken here. A channel is
    switched off by setting it to 0.

    References
    ----------
    Desai, Ramaswamy: Ablation-CAM (2020).
    """

    n_channels: int | None = None

    name: ClassVar[str] = "ablationcam"
    title: ClassVar[str] = "Ablation-CAM"
    paper: ClassVar[str] = "Desai & Ramaswamy 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_channels is not None:
            at_least("n_channels", self.n_channels, 1)

    def at_budget(self, passes: int) -> AblationCAM:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, n_channels=max(min(self.n_channels or passes, passes - 1), 1))

    def channel_sum(self, q: Question, maps: list[Map], place: Map) -> Asking[Tensor]:
        """See `CAM.channel_sum`."""
        answer = yield q.ask(read=[place.site])
        a, y = answer.reads[place.site].movedim(place.axis, 1), answer.scalar
        order = most(a.flatten(2).abs().mean(2)[0], self.n_channels)
        there = replace(q, site=place.site)
        without = torch.zeros(len(order), dtype=y.dtype, device=y.device)
        for s in chunks(len(order)):
            keep = torch.ones(s.stop - s.start, a.shape[1], dtype=a.dtype, device=a.device)
            keep[torch.arange(len(keep)), order[s]] = 0
            ablated = a * keep.reshape(*keep.shape, *[1] * (a.ndim - 2))
            answer = yield there.ask(ablated.movedim(1, place.axis))
            without[s] = answer.scalar
        weights = (y - without) / y.abs().clamp_min(torch.finfo(y.dtype).tiny)
        return channels(weights[None], a[:, order])


# ---------------------------------------------------------------- maps


@dataclass(frozen=True)
class Map:
    """A site whose activation has channels at positions.

    Attributes
    ----------
    site : str
    role : str
        As in `nissl.network.Site`.
    axis : int
        Of the channels, rows included.
    positions : tuple of int
        Extents of the other axes.
    dims : tuple of str
        Their names: ``("y", "x")``, ``("time",)``, ``("token",)`` …
    patterns : int
        Attention patterns that the network has come by before this site.
    alone : bool
        Whether nothing but this activation is put out there.
    """

    site: str
    role: str
    axis: int
    positions: tuple[int, ...]
    dims: tuple[str, ...]
    patterns: int
    alone: bool = True


def maps_of(q: Question) -> list[Map]:
    """Every site that is a map, in the order in which they are reached; of several inputs, the one asked about.

    Which axis holds the channels is what modules know of it: convolutions and their norms name their number of channels
    and, where two axes fit, have them first; linear layers, embeddings and layer norms last. Whatever else is reached
    (activations, pools, blocks, inputs of modules) follows the module before it.
    """
    trace = q.network.trace_of(q.ask(scalar=False))
    known = _MAPS.setdefault(trace, {})
    if q.input_name not in known:
        known[q.input_name] = _maps_in(trace, q)
    return known[q.input_name]


_MAPS: WeakKeyDictionary[Trace, dict[str, list[Map]]] = WeakKeyDictionary()
"""By trace and input: the examples of one shape share a trace."""


def _maps_in(trace: Trace, q: Question) -> list[Map]:
    found: list[Map] = []
    patterns, count, last = 0, 0, False
    for site in trace.sites(q.network):
        shape = site.shape or ()
        if site.role == "pattern":
            patterns += 1
            continue
        if len(shape) not in (2, 3, 4):
            continue
        if site.role == "input":
            if q.network.input_key(site.address, q.inputs) != q.input_name:
                continue
            dims = q.network.dims_of(site.address, shape)
            axis = next((i for i, d in enumerate(dims) if d in ("channel", "unit")), 0)
            dims = dims[:axis] + dims[axis + 1 :]
            alone = True
        else:
            where = parse(site.address)
            put_out = tree_leaves(trace.shapes[where.part, where.module, where.call or 1])
            alone = sum(isinstance(t, Tensor) for t in put_out) == 1
            told, told_last = told_channels(q.network.get_module(where.module), site)
            ends = [i for i in (0, len(shape) - 1) if shape[i] == (told or count)]
            wanted = last if told_last is None else told_last
            axis = ends[0] if len(ends) == 1 else len(shape) - 1 if wanted else 0
            dims = (("time",) if axis == 0 else ("token",), ("y", "x"), ("z", "y", "x"))[len(shape) - 2]
        count, last = shape[axis], axis > 0
        positions = shape[:axis] + shape[axis + 1 :]
        found.append(Map(site.address, site.role, axis + 1, positions, dims, patterns, alone))
    return found


def told_channels(module: nn.Module | None, site: Site) -> tuple[int | None, bool | None]:
    """How many channels a module says it puts out, and whether on the last axis; None where it does not say."""
    if parse(site.address).part != "out":
        return None, None
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.out_channels, False
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, False
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features, False
    if isinstance(module, nn.Linear):
        return module.out_features, True
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, True
    weight = getattr(module, "weight", None)
    if site.role == "norm" and isinstance(weight, Tensor) and weight.ndim == 1:
        return len(weight), True
    return None, None


def map_at(q: Question, maps: Sequence[Map], layer: str | None = None) -> Map:
    """The map at `layer`; by default at the question's site, and for the input `last_map`.

    Raises
    ------
    InputError
        There is no map, or `layer` and an inner site of the question name two places.
    """
    if layer is None and q.at_input:
        return last_map(q, maps)
    place = q.network.locate(q.site if layer is None else layer)
    # Gradients of token ids are asked at their embedding, which nobody chose; any other inner site was chosen.
    free = q.at_input or (q.is_tokens and q.network.embedding_site(q.inputs) == q.site)
    if layer is not None and not free and str(place) != str(parse(q.site)):
        raise InputError(f"layer={layer!r} and site={q.site!r} name two places; give one of them")
    if place.part == "input":
        same = q.network.input_key(str(place), q.inputs) == q.input_name
        found = next((m for m in maps if same and m.role == "input"), None)
    else:
        found = next((m for m in maps if m.site == str(place)), None)
    if found is None:
        known = [m.site for m in maps if ":in" not in m.site][-5:]
        raise InputError(f"the activation at {str(place)!r} has no channels at positions; maps are at {known}")
    return found


def last_map(q: Question, maps: Sequence[Map]) -> Map:
    """The last site with channels and at least two positions, of modules that put out nothing else.

    Of several outputs (a map and its pooled vector) it is not known which one the network goes on with.
    Where the last map is one of tokens and the network has attention, it is the last norm before the last attention
    pattern: behind it only the token that is read out has a gradient.
    """
    large = [m for m in maps if m.alone and math.prod(m.positions) > 1 and parse(m.site).part != "in"]
    if not large:
        raise InputError(
            f"no site of {q.network.name} has channels at several positions: there is no map to show. Class activation "
            "maps are for images, series and tokens; choose another method"
        )
    if large[-1].dims == ("token",):
        behind = large[-1].patterns
        norms = [m for m in large if m.role == "norm" and m.dims == ("token",) and m.patterns < behind]
        return norms[-1] if norms else large[-1]
    return large[-1]


def activation_and_gradient(q: Question, place: Map) -> Asking[tuple[Tensor, Tensor]]:
    """Activation and gradient at a map, channels first: each (1, channels, positions...)."""
    answer = yield q.ask(read=[place.site], wrt=[place.site])
    a, g = answer.reads[place.site], answer.gradients[place.site]
    return a.movedim(place.axis, 1), g.movedim(place.axis, 1)


def channels(weights: Tensor, a: Tensor) -> Tensor:
    """Weighted sum (1, positions...) of channels (1, channels, positions...)."""
    return torch.einsum("nc,nc...->n...", weights, a)


def most(size: Tensor, n: int | None) -> Tensor:
    """Indices of the n largest entries (all where n is None), in their own order."""
    return torch.arange(len(size), device=size.device) if n is None else size.topk(min(n, len(size))).indices.sort()[0]


# ---------------------------------------------------------------- layout


def lay_out(
    q: Question, maps: Sequence[Map], place: Map, cam: Tensor, upsample: bool
) -> tuple[Tensor, tuple[str, ...]]:
    """Maps (n, positions...) as they lie on the input, and the names of their dimensions.

    At an inner site, and over token ids, they stay as they are. At other inputs the tokens of image patches are laid
    out as their grid, without class and register tokens, and maps are interpolated to the input's size if `upsample`
    is set.
    """
    shown = next((m for m in maps if q.at_input and m.role == "input"), None)
    if shown is None or shown.dims == ("token",):
        return cam, place.dims
    if place.dims == ("token",):
        grid = token_grid(maps, place.positions[0], len(shown.positions))
        if grid is None:
            return cam, place.dims
        cam = cam[:, -math.prod(grid) :].reshape(len(cam), *grid)
    elif len(place.positions) != len(shown.positions):
        return cam, place.dims
    return (resize(cam, shown.positions) if upsample else cam), shown.dims


def token_grid(maps: Sequence[Map], n_tokens: int, n_dims: int = 2, extra: int = 8) -> tuple[int, ...] | None:
    """Rows and columns of the patches behind tokens, or None where the tokens are no grid of patches.

    The grid is that of the convolution that cuts the patches, or else the largest square; up to `extra` tokens (class,
    distillation, registers) may stand before the patches.
    """
    convs = [m.positions for m in maps if m.role == "conv" and len(m.positions) == n_dims]
    fitting = [p for p in convs if 1 < math.prod(p) <= n_tokens <= math.prod(p) + extra]
    if fitting:
        return fitting[-1]
    side = math.isqrt(n_tokens)
    return (side, side) if n_dims == 2 and side > 1 and n_tokens - side * side <= extra else None


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (n, positions...) interpolated linearly, with half-pixel centres, to positions of the given extents."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    return F.interpolate(maps[:, None], size=tuple(size), mode=mode, align_corners=False)[:, 0]
