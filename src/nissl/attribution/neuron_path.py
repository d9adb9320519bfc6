"""Paths of neurons through the blocks of a vision transformer, by their joint influence on a class (Wang et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from nissl.arguments import at_least, flag, instance
from nissl.errors import GradientError, InputError
from nissl.network import Edit, Network, Pass, Scale, Set, target
from nissl.network.site import parse
from nissl.runner import Asking, Question, Runner, chunks, make_questions

Selection = Literal["class", "patches", "all"]


def hidden_sites(network: Network, inputs: Any) -> list[str]:
    """Sites of the hidden layers of a transformer's feed-forward parts, from the first block to the last.

    The input of every linear layer that leads back from a wider layer to the width of the linear layer before it, once
    for each block: two linear layers d → h and h → d with h > d that run one after the other.

    Parameters
    ----------
    network : Network
    inputs : what the network takes
        One row is run.

    Raises
    ------
    InputError
        There is no such pair: name the sites by hand.
    """
    reached = [parse(s.address) for s in network.sites("*", inputs)]
    outputs = [(a, network.get_module(a.module)) for a in reached if a.part == "out"]
    linear = [(str(a), m) for a, m in outputs if isinstance(m, torch.nn.Linear)]
    found = [
        f"{name}:in"
        for (_, wide), (name, narrow) in pairwise(linear)
        if wide.in_features == narrow.out_features and wide.out_features == narrow.in_features > narrow.out_features
    ]
    if not found:
        raise InputError(
            f"{network.name} has no feed-forward parts (a linear layer to a wider one and another back); name the "
            "hidden sites by hand: NeuronPath(sites=[...])"
        )
    return found


@dataclass(frozen=True, eq=False)
class Paths:
    """A path of neurons for each example.

    Attributes
    ----------
    sites : tuple of str
        Hidden sites, one a block.
    units : Tensor (n_examples, n_layers, width)
        The chosen units of each block, best first.
    influence : Tensor (n_examples,)
        Joint influence of the whole path.
    value : Tensor (n_examples,)
        F of each example, nothing changed.
    scores : list of DataArray (example, unit)
        Of every candidate of a block, given the units chosen before it.
    tokens : {"class", "patches", "all"}
        At which tokens the units are meant.
    n_units : tuple of int
        Units of each block.
    passes : dict of str to int
        Forward and backward passes an example.
    """

    sites: tuple[str, ...]
    units: Tensor
    influence: Tensor
    value: Tensor
    scores: list[xr.DataArray]
    tokens: Selection
    n_units: tuple[int, ...]
    passes: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.units)

    def edits(self, factor: float = 0.0, n_tokens: int | None = None) -> list[Edit]:
        """Edits that multiply the units of each example's path: 0 removes them, 2 doubles them.

        Parameters
        ----------
        factor : float, default 0
        n_tokens : int, optional
            Tokens at the hidden sites; needed for ``tokens="patches"``.
        """
        return [self._at(layer, self._mask(layer), Scale, factor, n_tokens) for layer in range(len(self.sites))]

    def keep_only(
        self, share: float = 1.0, depth: int | None = None, seed: int = 0, n_tokens: int | None = None
    ) -> list[Edit]:
        """Edits that set units off the path to 0 in the first blocks.

        Parameters
        ----------
        share : float, default 1
            Probability with which each of them goes.
        depth : int, optional
            Number of blocks; all by default.
        seed : int, default 0
        """
        if not 0 <= share <= 1:
            raise InputError(f"share must be from 0 to 1, got {share!r}")
        generator = torch.Generator().manual_seed(seed)
        edits = []
        for layer in range(len(self.sites) if depth is None else depth):
            off = ~self._mask(layer)
            off &= torch.rand(off.shape, generator=generator) < share
            edits.append(self._at(layer, off, Scale, 0.0, n_tokens))
        return edits

    def shared(self, examples: Sequence[int] | None = None) -> Tensor:
        """The most frequent unit of each block over some examples, (n_layers, width); of equals the lowest."""
        units = self.units if examples is None else self.units[list(examples)]
        return units.mode(0).values

    def profile(self, labels: Any) -> xr.DataArray:
        """How often each unit is on the path of a class's examples, as a share: (class, layer, unit)."""
        labels = np.asarray(labels)
        if labels.shape != (len(self),):
            raise InputError(f"labels must be one for each of {len(self)} examples, got shape {labels.shape}")
        classes = np.unique(labels)
        counts = np.full((len(classes), len(self.sites), max(self.n_units)), np.nan)
        for layer, n in enumerate(self.n_units):
            on = self._mask(layer).numpy()
            for i, c in enumerate(classes):
                counts[i, layer, :n] = on[labels == c].mean(0)
        return xr.DataArray(
            counts,
            dims=("class", "layer", "unit"),
            coords={"class": classes, "layer": list(self.sites)},
            name="profile",
        )

    def _mask(self, layer: int) -> Tensor:
        mask = torch.zeros(len(self), self.n_units[layer], dtype=torch.bool)
        return mask.scatter_(1, self.units[:, layer], torch.ones_like(self.units[:, layer], dtype=torch.bool))

    def _at(self, layer: int, mask: Tensor, kind: Any, value: float, n_tokens: int | None) -> Edit:
        return kind(self.sites[layer], value, where=mask[:, None], positions=_positions(self.tokens, n_tokens))

    def plot(self, labels: Any = None) -> Any:
        """Which units the paths go through: one line an example, coloured by its label.

        Returns
        -------
        matplotlib.figure.Figure
        """
        import matplotlib.pyplot as plt
        from matplotlib.lines import Line2D

        figure, axes = plt.subplots(figsize=(1.2 * len(self.sites) + 2, 4), layout="constrained")
        classes = np.zeros(len(self)) if labels is None else np.asarray(labels)
        colours = {c: f"C{i % 10}" for i, c in enumerate(np.unique(classes))}
        jitter = np.random.default_rng(0).uniform(-0.06, 0.06, len(self))
        for i, path in enumerate(self.units[:, :, 0].tolist()):
            axes.plot(np.arange(len(path)) + jitter[i], path, color=colours[classes[i]], alpha=0.4, lw=1)
        if labels is not None:
            axes.legend([Line2D([], [], color=v) for v in colours.values()], list(colours), title="class",
                        bbox_to_anchor=(1, 1), loc="upper left")  # fmt: skip
        axes.set(xlabel="block", ylabel="unit of the hidden layer", xticks=range(len(self.sites)))
        return figure


def _positions(tokens: Selection, n_tokens: int | None) -> Any:
    if tokens == "all":
        return None
    if tokens == "class":
        return [0]
    if n_tokens is None:
        raise InputError("tokens='patches' leaves out the class token: say how many tokens there are, n_tokens=")
    return list(range(1, n_tokens))


@dataclass(frozen=True, eq=False)
class NeuronPath:
    """The path, one neuron a block, whose units together influence the class most, found block by block.

    The joint influence of a set S of units integrates the gradient of the class probability F while all of them go
    together from 0 to what they are, everything else at the selected tokens of their layers held as it is:

        JAS(S) = (Σ_s w_s) (Σ_s ḡ_s),    ḡ_s = (1/m) Σ_k ∂F/∂a_s at a = (k/m) w,  k = 0 … m-1

    with w the units as they are. Without the cross terms it is Σ_s w_s ḡ_s, the integrated gradients of the set, which
    sum to what the class loses when the set is set to 0.

    Parameters
    ----------
    steps : int, default 20
        m, points of the integral.
    cross_terms : bool, default True
        As printed in the paper. They reward units that are large and have no influence; see Notes.
    exact : bool, default False
        Score every candidate by a pass in which only it (and the path so far) is scaled, as the definition says; by
        default, and in the authors' program, all candidates of a block are scaled together, so that one sweep scores
        them all.
    width : int, default 1
        Units a block.
    tokens : {"class", "patches", "all"}, default "class"
        The class token (the first one), all but it, or all tokens (networks without a class token).
    sites : sequence of str, optional
        Hidden sites (n, tokens, units), one a block; by default `hidden_sites`.
    midpoint : bool, default False
        Points (k + ½)/m instead of k/m: closer to the integral, not what the paper does.

    Notes
    -----
    With two layers and the cross terms, a unit of the second layer that is large and influences nothing can beat the
    one that belongs to the path, because the path's gradients are multiplied with its activation.
    The cost is one clean pass, and m forward and backward passes for each block and once for the whole path.

    References
    ----------
    Wang et al.: Discovering influential neuron path in vision transformers (2025).
    """

    steps: int = 20
    cross_terms: bool = True
    exact: bool = False
    width: int = 1
    tokens: Selection = "class"
    sites: Sequence[str] | None = None
    midpoint: bool = False

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        at_least("width", self.width, 1)
        for name in ("cross_terms", "exact", "midpoint"):
            flag(name, getattr(self, name))
        if self.tokens not in ("class", "patches", "all"):
            raise InputError(f"tokens={self.tokens!r}: choose 'class', 'patches' or 'all'")
        if self.exact and self.width > 1:
            raise InputError("exact=True scores single candidates; it goes with width=1")

    def find(
        self, network: Network, inputs: Any, of: Any = None, *, runner: Runner | None = None, seed: int = 0
    ) -> Paths:
        """Search a path for each example.

        Parameters
        ----------
        network : Network
        inputs : Tensor, array, tuple or mapping
            Examples first.
        of : class indices, Target or callable, optional
            F: the softmax probability of a class (one for all or one an example; each example's top class by default), or
            the scalar of a Target as it is.
        runner : Runner, optional

        Raises
        ------
        InputError
            No feed-forward parts, sites whose activations are not (n, tokens, units), or width above their units.
        GradientError
            The network has no gradients.
        """
        questions, sites, runner = self._asked(network, inputs, of, runner, seed)
        found: list[_Found] = runner.collect(
            network, [partial(self._search, q, sites) for q in questions], "paths of neurons", "neuron_path"
        )
        n_units = tuple(len(s) for s in found[0].scores)
        scores = [
            xr.DataArray(torch.stack([f.scores[i] for f in found]).cpu().numpy(), dims=("example", "unit"), name=site)
            for i, site in enumerate(sites)
        ]
        sweeps = 1 + (sum(n_units) if self.exact else len(sites))
        return Paths(
            sites, torch.stack([f.units for f in found]).cpu(), torch.stack([f.influence for f in found]).cpu(),
            torch.stack([f.value for f in found]).cpu(), scores, self.tokens, n_units,
            {"forward": 1 + sweeps * self.steps, "backward": sweeps * self.steps},
        )  # fmt: skip

    def influence(
        self,
        network: Network,
        inputs: Any,
        units: Tensor,
        of: Any = None,
        *,
        runner: Runner | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Joint influence of given units, (n_examples,).

        Parameters
        ----------
        network, inputs, of, runner
            As in `find`.
        units : Tensor of int (n_examples, n_layers, width)
            Such as another method's choice.
        """
        questions, sites, runner = self._asked(network, inputs, of, runner, seed)
        units = torch.as_tensor(units)
        if units.ndim != 3 or units.shape[:2] != (len(questions), len(sites)):
            raise InputError(
                f"units must be (examples, layers, width) with {len(questions)} examples and {len(sites)} layers, got "
                f"shape {tuple(units.shape)}"
            )
        starts = [partial(self._joint_of, q, sites, u) for q, u in zip(questions, units, strict=True)]
        return torch.stack(runner.collect(network, starts, "influence of paths", "neuron_path")).cpu()

    def _asked(
        self, network: Network, inputs: Any, of: Any, runner: Runner | None, seed: int
    ) -> tuple[list[Question], tuple[str, ...], Runner]:
        instance("network", network, Network)
        if not network.differentiable:
            raise GradientError(f"{network.name} has no gradients, which a path is found by")
        questions = make_questions(network, inputs, of, seed)
        sites = tuple(hidden_sites(network, questions[0].inputs) if self.sites is None else self.sites)
        if not sites:
            raise InputError("sites is empty: name at least one hidden site")
        for s in sites:
            network.locate(s)
        return questions, sites, Runner() if runner is None else runner

    def _clean(self, q: Question, sites: tuple[str, ...]) -> Asking[tuple[_Path, Tensor]]:
        if q.target.name == "class_logit":
            q = q.about(target.probability(int(q.target.values[0])))
        clean = yield q.ask(read=sites)
        reads = [clean.reads[s] for s in sites]
        for site, t in zip(sites, reads, strict=True):
            if t.ndim != 3:
                raise InputError(f"{site!r} holds {tuple(t.shape[1:])} for each example; needed is (tokens, units)")
            if self.width > t.shape[2]:
                raise InputError(f"width={self.width}, but {site!r} has {t.shape[2]} units")
        return _Path(q, sites, reads, self.tokens, self._points(reads[0])), clean.scalar[0]

    def _search(self, q: Question, sites: tuple[str, ...]) -> Asking[_Found]:
        path, value = yield from self._clean(q, sites)
        units: list[Tensor] = []
        scores: list[Tensor] = []
        for layer in range(len(sites)):
            scores.append((yield from (self._each if self.exact else self._together)(path, units, layer)))
            units.append(scores[-1].topk(self.width).indices)
        influence = yield from self._joint(path, units)
        return _Found(torch.stack(units), influence, value, scores)

    def _joint_of(self, q: Question, sites: tuple[str, ...], units: Tensor) -> Asking[Tensor]:
        path, _ = yield from self._clean(q, sites)
        return (yield from self._joint(path, list(units.to(path.clean[0].device))))

    def _joint(self, path: _Path, units: list[Tensor]) -> Asking[Tensor]:
        """Joint influence of the units of all blocks, summed over tokens."""
        grads = yield from path.gradients([path.scaled(i, u) for i, u in enumerate(units)])
        w, g = (torch.cat([t[i][:, u] for i, u in enumerate(units)], 1) for t in (path.clean, grads))
        return (w.sum(1) * g.sum(1) if self.cross_terms else (w * g).sum(1)).sum()

    def _points(self, like: Tensor) -> Tensor:
        return (torch.arange(self.steps, device=like.device) + (0.5 if self.midpoint else 0.0)).to(
            like.dtype
        ) / self.steps

    def _together(self, path: _Path, units: list[Tensor], layer: int) -> Asking[Tensor]:
        """Scores of all candidates of a block, from one sweep in which the whole block is scaled."""
        values = [path.scaled(i, u) for i, u in enumerate(units)]
        grads = yield from path.gradients([*values, path.scaled(layer, None)])
        return self._score(path, units, grads, path.clean[layer], grads[layer])

    def _each(self, path: _Path, units: list[Tensor], layer: int) -> Asking[Tensor]:
        """Scores of all candidates of a block, each from a sweep in which only it is scaled."""
        scores = []
        for i in range(path.clean[layer].shape[1]):
            one = torch.tensor([i], device=path.clean[layer].device)
            values = [path.scaled(j, u) for j, u in enumerate(units)]
            grads = yield from path.gradients([*values, path.scaled(layer, one)])
            scores.append(self._score(path, units, grads, path.clean[layer][:, one], grads[layer][:, one])[0])
        return torch.stack(scores)

    def _score(self, path: _Path, units: list[Tensor], grads: list[Tensor], w: Tensor, g: Tensor) -> Tensor:
        """Joint influence of the path so far with each candidate, summed over tokens: (n_candidates,)."""
        w_path = sum((path.clean[i][:, u].sum(1, keepdim=True) for i, u in enumerate(units)), w.new_zeros(len(w), 1))
        g_path = sum((grads[i][:, u].sum(1, keepdim=True) for i, u in enumerate(units)), w.new_zeros(len(w), 1))
        if self.cross_terms:
            return ((g + g_path) * (w + w_path)).sum(0)
        each = [(path.clean[i][:, u] * grads[i][:, u]).sum() for i, u in enumerate(units)]
        return (w * g).sum(0) + sum(each, w.new_zeros(()))


@dataclass(frozen=True, eq=False)
class _Found:
    """What the search says of one example."""

    units: Tensor
    influence: Tensor
    value: Tensor
    scores: list[Tensor]


class _Path:
    """The sweep of one example: hidden layers set to scaled values, the gradients there averaged over the points."""

    def __init__(
        self, q: Question, sites: tuple[str, ...], reads: list[Tensor], tokens: Selection, points: Tensor
    ) -> None:
        self.q, self.sites, self.reads, self.points = q, sites, reads, points
        n_tokens = reads[0].shape[1]
        self.at = slice(None) if tokens == "all" else slice(0, 1) if tokens == "class" else slice(1, None)
        self.positions = _positions(tokens, n_tokens)
        self.clean = [t[0, self.at] for t in reads]
        """(n_selected, n_units) of each block."""

    def scaled(self, layer: int, units: Tensor | None) -> Tensor:
        """Values (n_points, n_tokens, n_units): some units (None: all) go from 0 to what they are."""
        value = self.reads[layer].repeat(len(self.points), 1, 1)
        alpha = self.points[:, None, None]
        if units is None:
            return value * alpha
        value[:, :, units] *= alpha
        return value

    def gradients(self, values: list[Tensor]) -> Asking[list[Tensor]]:
        """Gradient at each of the first blocks under these values, mean over points: (n_selected, n_units) each."""
        sites = self.sites[: len(values)]
        passes = []
        for rows in chunks(len(self.points)):
            edits = [Set(s, v[rows], positions=self.positions) for s, v in zip(sites, values, strict=True)]
            n = rows.stop - rows.start
            inputs = {k: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in self.q.inputs.items()}
            passes.append(Pass(inputs, edits, of=self.q.target, wrt=sites))
        answers = yield passes
        return [torch.cat([a.gradients[s][:, self.at] for a in answers]).mean(0) for s in sites]


def activation_path(
    network: Network, inputs: Any, sites: Sequence[str] | None = None, width: int = 1, runner: Runner | None = None
) -> Tensor:
    """The units of largest activation at the class token of each block: the simplest rival, (n, n_layers, width)."""
    questions = make_questions(network, inputs, lambda output: output.flatten(1)[:, 0])
    chosen = tuple(hidden_sites(network, questions[0].inputs) if sites is None else sites)

    def ask(q: Question) -> Asking[Tensor]:
        answer = yield q.ask(read=chosen, scalar=False)
        return torch.stack([answer.reads[s][0, 0].topk(width).indices for s in chosen])

    runner = Runner() if runner is None else runner
    return torch.stack(runner.collect(network, [partial(ask, q) for q in questions], "activations", "activation")).cpu()
