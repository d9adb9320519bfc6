"""Causal paths through a chain of layers, found by cutting edges (Causal analysis for robust interpretability, 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import xarray as xr
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least, flag, instance, is_number
from nissl.attribution.base import Method
from nissl.errors import InputError
from nissl.network import Network, Pass, Set, target
from nissl.network.passes import Inputs, n_rows, rows_of
from nissl.runner import Asking, Explained, Question, Runner, explained

_CONVOLUTIONS: dict[type, Callable[..., Tensor]] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_BYTES = 2**26
"""Of activations that are set in one lot of interventions."""


class Edges:
    """A linear layer or convolution as edges from units that it takes to units that it gives.

    Parameters
    ----------
    name : str
    module : Linear or ConvNd
    n_inputs : int
        Units it takes: channels, or blocks of columns where a flattened map goes into a linear layer.
    """

    def __init__(self, name: str, module: Any, n_inputs: int) -> None:
        self.name, self.n_inputs = name, n_inputs
        self.module: Any = module
        self.n_outputs: int
        if isinstance(module, nn.Linear):
            self.n_outputs, self._columns = module.out_features, module.in_features // n_inputs
        else:
            assert isinstance(module, tuple(_CONVOLUTIONS))
            if module.padding_mode != "zeros":
                raise InputError(
                    f"{name!r} pads by {module.padding_mode!r}; edges are cut in convolutions padded by zeros"
                )
            self.n_outputs, self._columns = module.out_channels, 0

    def weight(self, network: Network) -> Tensor:
        """Weights of all edges, (n_outputs, n_inputs, ...); 0 between groups."""
        w = network.weights()[f"{self.name}.weight"]
        if self._columns:
            return w.unflatten(1, (self.n_inputs, self._columns))
        groups = self.module.groups
        if groups == 1:
            return w
        dense = w.new_zeros(self.n_outputs, self.n_inputs, *w.shape[2:])
        out, into = self.n_outputs // groups, self.n_inputs // groups
        for g in range(groups):
            dense[g * out : (g + 1) * out, g * into : (g + 1) * into] = w[g * out : (g + 1) * out]
        return dense

    def through(self, a: Tensor, units: slice, weight: Tensor) -> Tensor:
        """What each of some input units adds to some outputs, (n, n_units, n_some, ...) for weights (n_some, n_units, ...)."""
        if self._columns:
            blocks = a.unflatten(-1, (self.n_inputs, self._columns))[..., units, :]
            return torch.movedim(torch.einsum("n...uc,ouc->n...uo", blocks, weight), (-2, -1), (1, 2))
        m: Any = self.module
        convolve = _CONVOLUTIONS[next(k for k in _CONVOLUTIONS if isinstance(m, k))]
        some = a[:, units]
        # one group a unit: each goes through its own kernels
        kernels = weight.transpose(0, 1).flatten(0, 1)[:, None]
        added = convolve(some, kernels, None, m.stride, m.padding, m.dilation, some.shape[1])
        return added.unflatten(1, (some.shape[1], len(weight)))

    def masked(self, network: Network, keep: Tensor) -> Tensor:
        """The layer's weight with the edges scaled by `keep` (n_outputs, n_inputs)."""
        own = network.weights()[f"{self.name}.weight"]
        if self._columns:
            return own * keep.to(own).repeat_interleave(self._columns, 1)
        keep = keep.to(own)
        groups = self.module.groups
        if groups > 1:
            out, into = self.n_outputs // groups, self.n_inputs // groups
            keep = torch.cat([keep[g * out : (g + 1) * out, g * into : (g + 1) * into] for g in range(groups)])
        return own * keep.reshape(*keep.shape, *[1] * (own.ndim - 2))


def chain_of(network: Network, inputs: Any, layers: Sequence[str] | None = None) -> list[Edges]:
    """The layers with weights, in the order in which they run, as a chain of edges.

    Parameters
    ----------
    network : Network
    inputs : what the network takes
    layers : sequence of str, optional
        Names of linear layers and convolutions; all that run by default. They must follow one another: the units of one,
        perhaps normalised, pooled or flattened, are the input units of the next.

    Raises
    ------
    InputError
        No such layers, or they are no chain (a shortcut, a transformer): name some that are.
    """
    reached = [s.address for s in network.sites("*", inputs)]
    known = [n for n in dict.fromkeys(reached) if isinstance(network.get_module(n), (nn.Linear, *_CONVOLUTIONS))]
    if layers is not None:
        if missing := [n for n in layers if n not in known]:
            raise InputError(f"{missing} are no linear layers or convolutions that run once; there are {known}")
        known = [n for n in known if n in set(layers)]
    if not known:
        raise InputError(f"{network.name} runs no linear layer or convolution once")
    chain: list[Edges] = []
    for name in known:
        m: Any = network.get_module(name)
        n_inputs = m.in_features if isinstance(m, nn.Linear) else m.in_channels
        if chain:
            before = chain[-1].n_outputs
            if n_inputs != before and not (isinstance(m, nn.Linear) and n_inputs % before == 0):
                raise InputError(
                    f"{chain[-1].name!r} gives {before} units and {name!r} takes {n_inputs}: not a chain; name layers "
                    "that follow one another, layers=[...]"
                )
            n_inputs = before
        chain.append(Edges(name, m, n_inputs))
    return chain


@dataclass(frozen=True, eq=False)
class Causes:
    """What was found at one layer.

    Attributes
    ----------
    layer : str
    causes, effects : Tensor of int
        Units it takes, and gives, that are in the graph. At the first layer of the chain every input is a cause.
    total_effect : Tensor (n_examples, n_inputs) or None
        Logit with the unit's edges cut minus logit; None at the first layer, which is not tested.
    statistic, p : Tensor (n_inputs,) or None
        One-sided: small where the logit falls.
    by : str
        What selected the causes: ``"test"``, or ``"fallback"`` where no unit passed it.
    """

    layer: str
    causes: Tensor
    effects: Tensor
    total_effect: Tensor | None = None
    statistic: Tensor | None = None
    p: Tensor | None = None
    by: str = "test"


@dataclass(frozen=True, eq=False)
class _Clean:
    """The images that are classified right, what was read of them, and their logits."""

    inputs: Inputs
    of: target.Target
    reads: dict[str, Tensor]
    y: Tensor


@dataclass(frozen=True, eq=False)
class CausalPaths:
    """Units whose edges towards a class logit matter, layer by layer from the logit back.

    Starting with the class logit, all edges from one unit to the units already in the graph are set to a value at once, and
    the unit joins the graph if the logit then falls over many images of the class. The units that joined are the next
    layer's targets. Other edges of the unit stay as they are, so this is not ablation.

    Parameters
    ----------
    value : float, default 0
        What the weights of the cut edges become.
    z : float, default 1.65
        A unit joins if its statistic is below -z: one-sided, 5 %.
    test : {"independent", "paired"}, default "independent"
        As published, the images with and without the cut are treated as independent groups, which demands an effect of
        about 2.3 standard deviations of the logit over √n. Paired, any effect that is the same everywhere is significant:
        give `min_effect` with it.
    min_effect : float, default 0
        The mean logit must also fall by this share of it.
    correction : {"none", "bh"}, default "none"
        ``"bh"``: Benjamini-Hochberg over the units of a layer; the paper corrects nothing.
    fallback : float, default 0.001
        Where no unit passes, those join that lower the logit by this share; if there is none either, the search ends.
    layers : sequence of str, optional
        See `chain_of`.

    References
    ----------
    Causal analysis for robust interpretability of neural networks (2024), arXiv 2305.08950.
    """

    value: float = 0.0
    z: float = 1.65
    test: Literal["independent", "paired"] = "independent"
    min_effect: float = 0.0
    correction: Literal["none", "bh"] = "none"
    fallback: float = 0.001
    layers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("value", "z", "min_effect", "fallback"):
            if not is_number(getattr(self, name)):
                raise InputError(f"{name} must be a number, got {getattr(self, name)!r}")
        if self.test not in ("independent", "paired") or self.correction not in ("none", "bh"):
            raise InputError("test is 'independent' or 'paired', correction 'none' or 'bh'")

    def find(self, network: Network, images: Any, label: int, *, runner: Runner | None = None) -> CausalGraph:
        """The causal graph of a class.

        Parameters
        ----------
        network : Network
        images : what the network takes
            Of the class; those that are classified otherwise are dropped.
        label : int
        runner : Runner, optional

        Raises
        ------
        InputError
            No image is classified as `label`, or the layers are no chain.
        """
        instance("network", network, Network)
        at_least("label", label, 0)
        inputs = network.place(images)
        chain = chain_of(network, rows_of(inputs, slice(0, 1)), self.layers)
        if chain[-1].n_outputs <= label:
            raise InputError(f"the last layer {chain[-1].name!r} gives {chain[-1].n_outputs} units, not the classes")
        search = partial(self._search, network, inputs, int(label), chain)
        (graph,) = (Runner() if runner is None else runner).collect(
            network, [search], f"causal paths of class {label}", "causal_paths"
        )
        return graph

    def _clean(self, network: Network, inputs: Inputs, label: int, edges: Sequence[Edges]) -> Asking[_Clean]:
        """What goes in and out of layers on the images that are classified right."""
        of = target.class_logit(label)
        answer = yield Pass(inputs, read=[s for e in edges for s in (f"{e.name}:in", e.name)], of=of)
        right = answer.output.argmax(1) == label
        if not bool(right.any()):
            raise InputError(f"none of the {n_rows(inputs)} images is classified as {label}")
        kept: Inputs = {k: v[right] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        return _Clean(kept, of, {s: t[right] for s, t in answer.reads.items()}, answer.scalar[right])

    def _search(self, network: Network, inputs: Inputs, label: int, chain: list[Edges]) -> Asking[CausalGraph]:
        clean = yield from self._clean(network, inputs, label, chain[1:])
        effects = torch.tensor([label])
        found: list[Causes] = []
        for edges in reversed(chain[1:]):
            found.append((yield from self._causes(network, clean, edges, effects)))
            effects = found[-1].causes
            if not len(effects):
                break
        else:
            found.append(Causes(chain[0].name, torch.arange(chain[0].n_inputs), effects))
        return CausalGraph(label, len(clean.y), tuple(found[::-1]), {e.name: e for e in chain}, clean.y, self)

    def _causes(self, network: Network, clean: _Clean, edges: Edges, effects: Tensor) -> Asking[Causes]:
        """Which units that a layer takes are causes of some that it gives."""
        a, out = clean.reads[f"{edges.name}:in"], clean.reads[edges.name]
        total = yield from self._effects(network, clean.inputs, clean.of, edges, effects, a, out, clean.y)
        return self._select(edges.name, effects, total, clean.y)

    def _effects(
        self,
        network: Network,
        inputs: Inputs,
        of: Any,
        edges: Edges,
        effects: Tensor,
        a: Tensor,
        out: Tensor,
        y: Tensor,
    ) -> Asking[Tensor]:
        """Change of the logit when the edges of each input unit are cut, (n_examples, n_inputs)."""
        w = edges.weight(network)[effects.to(a.device)]
        change = self.value - w  # (n_effects, n_inputs, ...)
        n, width = len(y), edges.n_inputs
        axis = out.ndim - 1 if isinstance(edges.module, nn.Linear) else 1
        total = torch.empty(n, width, dtype=y.dtype, device=y.device)
        lot = max(_BYTES // (out.numel() * out.element_size()), 1)
        for start in range(0, width, lot):
            units = slice(start, min(start + lot, width))
            cut = out[:, None].repeat_interleave(units.stop - start, 1)
            moved = cut.movedim(axis + 1, 2)  # (n, n_units, n_outputs, ...)
            moved[:, :, effects.to(cut.device)] += edges.through(a, units, change[:, units])
            # the whole output is set, so that nothing before the layer runs
            answers = yield [Pass(inputs, [Set(edges.name, one)], of=of) for one in cut.unbind(1)]
            total[:, units] = torch.stack([answer.scalar for answer in answers], 1) - y[:, None]
        return total

    def _select(self, layer: str, effects: Tensor, total: Tensor, y: Tensor) -> Causes:
        change, clean = total.double().cpu(), y.double().cpu()[:, None]
        n, mean = len(clean), change.mean(0)
        relative = mean / clean.mean().abs()
        if n == 1:  # nothing to test: a unit joins if it lowers the logit by a twentieth
            statistic, p = torch.full_like(mean, torch.nan), torch.full_like(mean, torch.nan)
            passed = relative < -0.05
        else:
            spread = change.var(0) if self.test == "paired" else (clean + change).var(0) + clean.var(0)
            # a unit without any effect has no spread either
            statistic = torch.where(mean == 0, 0.0, mean / (spread / n).sqrt())
            p = torch.from_numpy(stats.norm.cdf(statistic.numpy()))
            level = float(stats.norm.cdf(-self.z))
            adjusted = torch.from_numpy(stats.false_discovery_control(p.numpy())) if self.correction == "bh" else p
            passed = (adjusted < level) & (relative < -self.min_effect)
        by = "test"
        if not bool(passed.any()):
            by, passed = "fallback", relative < -self.fallback
        return Causes(layer, passed.nonzero()[:, 0], effects.cpu(), total.cpu(), statistic, p, by)


@dataclass(frozen=True, eq=False)
class CausalGraph:
    """The causal graph of a class.

    Attributes
    ----------
    label : int
    n : int
        Images that were classified right, on which it stands.
    layers : tuple of Causes
        From the first layer that was reached to the last.
    edges : dict of layer to Edges
    logits : Tensor (n,)
    method : CausalPaths
    """

    label: int
    n: int
    layers: tuple[Causes, ...]
    edges: dict[str, Edges] = field(repr=False)
    logits: Tensor = field(repr=False)
    method: CausalPaths = field(repr=False)

    def at(self, layer: str) -> Causes:
        """What was found at a layer."""
        for c in self.layers:
            if c.layer == layer:
                return c
        raise InputError(
            f"the graph of class {self.label} has no layer {layer!r}; it has {[c.layer for c in self.layers]}"
        )

    def mask(self, layer: str) -> Tensor:
        """Which edges of a layer are in the graph, bool (n_outputs, n_inputs)."""
        c, e = self.at(layer), self.edges[layer]
        mask = torch.zeros(e.n_outputs, e.n_inputs, dtype=torch.bool)
        mask[c.effects[:, None], c.causes[None]] = True
        return mask

    def scores(self) -> xr.DataArray:
        """Mean change of the logit for each unit cut, (layer, unit); NaN where nothing was tested."""
        tested = [c for c in self.layers if c.total_effect is not None]
        values = np.full((len(tested), max(c.total_effect.shape[1] for c in tested)), np.nan)  # pyright: ignore
        for i, c in enumerate(tested):
            values[i, : c.total_effect.shape[1]] = c.total_effect.mean(0).numpy()  # pyright: ignore
        coords = {"layer": [c.layer for c in tested]}
        return xr.DataArray(values, dims=("layer", "unit"), coords=coords, name="total effect")

    def sufficient(self, network: Network) -> Network:
        """The network with nothing but the graph's edges; biases stay."""
        return network.changed(
            {f"{c.layer}.weight": self.edges[c.layer].masked(network, self.mask(c.layer)) for c in self.layers}
        )

    def necessary(self, network: Network) -> Network:
        """The network without the graph's edges."""
        return network.changed(
            {f"{c.layer}.weight": self.edges[c.layer].masked(network, ~self.mask(c.layer)) for c in self.layers}
        )

    def repaired(self, network: Network, right: CausalGraph, factor: float = 0.0) -> Network:
        """The network with the edges of this graph that are not in another one multiplied by a factor.

        Parameters
        ----------
        network : Network
        right : CausalGraph
            Of images on which the network is right for the right reason; its edges are spared.
        factor : float, default 0
            From 0 (cut) to 1 (left).
        """
        if not (is_number(factor) and 0 <= factor <= 1):
            raise InputError(f"factor must be from 0 to 1, got {factor!r}")
        weights = {}
        for c in self.layers:
            spared = right.mask(c.layer) if any(o.layer == c.layer for o in right.layers) else torch.tensor(False)
            wrong = self.mask(c.layer) & ~spared
            weights[f"{c.layer}.weight"] = self.edges[c.layer].masked(network, torch.where(wrong, float(factor), 1.0))
        return network.changed(weights)

    def stability(
        self, network: Network, images: Any, layer: str, betas: Sequence[float], draws: int = 10, seed: int = 0,
        runner: Runner | None = None,
    ) -> xr.Dataset:  # fmt: skip
        """How the causes of one layer hold when its edges are set to a small random weight instead of 0.

        Parameters
        ----------
        network : Network
        images : what the network takes
        layer : str
        betas : sequence of float
            The weight is drawn from U(0, beta).
        draws : int, default 10

        Returns
        -------
        xarray.Dataset
            ``jaccard`` with the graph (beta, draw), ``appearance`` (beta, unit): share of draws in which it is a cause.
        """
        at_least("draws", draws, 1)
        c, e = self.at(layer), self.edges[layer]
        if c.total_effect is None:
            raise InputError(f"{layer!r} is the first layer of the chain, whose causes are not tested")
        values = np.random.default_rng(seed).uniform(0, np.asarray(betas, dtype=float)[:, None], (len(betas), draws))
        inputs = network.place(images)

        def again() -> Asking[list[Tensor]]:
            clean = yield from self.method._clean(network, inputs, self.label, [e])
            found = []
            for value in values.flat:
                causes = yield from replace(self.method, value=float(value))._causes(network, clean, e, c.effects)
                found.append(causes.causes)
            return found

        (found,) = (Runner() if runner is None else runner).collect(
            network, [again], f"stability of {layer}", "causal_paths"
        )
        chosen = torch.zeros(len(found), e.n_inputs, dtype=torch.bool)
        for row, causes in zip(chosen, found, strict=True):
            row[causes] = True
        mine = torch.zeros(e.n_inputs, dtype=torch.bool)
        mine[c.causes] = True
        jaccard = ((chosen & mine).sum(1) / (chosen | mine).sum(1).clamp(min=1)).reshape(values.shape).numpy()
        appearance = chosen.reshape(*values.shape, -1).double().mean(1).numpy()
        return xr.Dataset(
            {"jaccard": (("beta", "draw"), jaccard), "appearance": (("beta", "unit"), appearance)},
            coords={"beta": list(betas)},
        )

    def random(self, g: np.random.Generator) -> CausalGraph:
        """A graph of as many units in each layer, drawn at random, that ends at the same class: what chance does."""
        layers, effects = [], torch.tensor([self.label])
        for c in reversed(self.layers):
            n = self.edges[c.layer].n_inputs
            causes = torch.from_numpy(np.sort(g.permutation(n)[: len(c.causes)]))
            layers.append(type(c)(c.layer, causes, effects))
            effects = causes
        return CausalGraph(self.label, self.n, tuple(layers[::-1]), self.edges, self.logits, self.method)

    def plot(self, most: int = 12) -> Any:
        """The graph, from the first layer on the left to the class on the right; thick edges for large effects.

        Parameters
        ----------
        most : int, default 12
            Units that are drawn of a layer, those of the largest effects; the axis says how many there are.

        Returns
        -------
        matplotlib.figure.Figure
        """
        import matplotlib.pyplot as plt

        at_least("most", most, 1)
        figure, axes = plt.subplots(figsize=(2 + 2 * len(self.layers), 4.5), layout="constrained")
        drawn: list[tuple[np.ndarray, np.ndarray]] = []  # units of each layer, and their share of its largest effect
        for c in self.layers:
            units = c.causes.numpy()
            size = np.ones(len(units)) if c.total_effect is None else c.total_effect.mean(0)[c.causes].abs().numpy()
            kept = np.sort(np.argsort(-size, kind="stable")[:most])
            drawn.append((units[kept], size[kept] / max(size.max(initial=0.0), 1e-12)))
        heights = [np.linspace(0, 1, len(units) + 2)[1:-1] for units, _ in drawn] + [np.array([0.5])]
        names = []
        for x, (c, (units, size)) in enumerate(zip(self.layers, drawn, strict=True)):
            for i, s in zip(heights[x], size, strict=True):
                for j in heights[x + 1]:
                    axes.plot([x, x + 1], [i, j], color="C0", lw=0.3 + 2 * s, alpha=0.15 + 0.5 * s, zorder=1)
            for i, unit in zip(heights[x], units.tolist(), strict=True):
                axes.text(x, i, str(unit), ha="center", va="center", fontsize=7, zorder=2,
                          bbox={"boxstyle": "circle,pad=0.2", "fc": "white", "ec": "C0", "lw": 0.8})  # fmt: skip
            more = f"\n{len(units)} of {len(c.causes)} inputs" if len(units) < len(c.causes) else ""
            names.append(f"{c.layer}{more}")
        axes.text(len(self.layers), 0.5, f"class {self.label}", ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round", "fc": "white", "ec": "C1"})  # fmt: skip
        axes.set_xticks([x + 0.5 for x in range(len(self.layers))], names)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(f"Units whose edges carry class {self.label} ({self.n} images)", fontsize=9)
        return figure


@dataclass(frozen=True, eq=False)
class CausalMap(Method):
    """Where the causes at a layer act in one image: activation of each parent through its edge, spread over the image.

    For every effect e and cause p of a convolution, the map of p is convolved with the weights of the edge p → e, turned
    into shares by a softmax over places, averaged over p, and enlarged to the input; effects are summed.

    Parameters
    ----------
    graphs : mapping of class to CausalGraph
        One for each class that is explained.
    layer : str
        A convolution of the chain.
    flip : bool, default False
        Turn the kernel around, as the authors' program does; the layer itself does not.
    """

    graphs: Mapping[int, CausalGraph]
    layer: str
    flip: bool = False

    name: ClassVar[str] = "causal"
    title: ClassVar[str] = "Causal paths"
    paper: ClassVar[str] = "Causal analysis for robust interpretability, 2024"
    positive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        flag("flip", self.flip)
        if not isinstance(self.graphs, Mapping) or not self.graphs:
            raise InputError("graphs must map classes to CausalGraphs, at least one")
        for g in self.graphs.values():
            instance("graphs", g, CausalGraph)
            if self.layer not in g.edges or not isinstance(g.edges[self.layer].module, nn.Conv2d):
                raise InputError(f"{self.layer!r} is no two-dimensional convolution of the chain {list(g.edges)}")

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        if not q.at_input or q.input.ndim != 4:
            raise InputError(f"causal maps are drawn over pictures at the input, not at {q.site!r}")
        label = int(q.target.values[0]) if q.target.name == "class_logit" else -1
        if label not in self.graphs:
            raise InputError(f"there is no graph for {q.target.name} {label}; graphs has {sorted(self.graphs)}")
        graph = self.graphs[label]
        c, e = graph.at(self.layer), graph.edges[self.layer]
        a = (yield q.ask(read=[f"{self.layer}:in"], scalar=False)).reads[f"{self.layer}:in"][0, c.causes]
        w = e.weight(q.network)[c.effects[:, None], c.causes[None]].to(a)  # (n_effects, n_causes, ky, kx)
        if self.flip:
            w = w.flip(-1, -2)
        pad = (w.shape[-2] - 1, w.shape[-1] - 1)
        # one group a cause: each is convolved with its own kernels
        kernels = w.transpose(0, 1).flatten(0, 1)[:, None]
        v = F.conv2d(a[None], kernels, padding=pad, groups=len(c.causes))[0]
        share = v.flatten(1).softmax(1).reshape(len(c.causes), len(c.effects), *v.shape[-2:])
        found = share.mean(0).sum(0)[None, None]
        size = (int(q.input.shape[-2]), int(q.input.shape[-1]))
        return explained(q, F.interpolate(found, size, mode="bilinear", align_corners=False)[0, 0], dims=("y", "x"))
