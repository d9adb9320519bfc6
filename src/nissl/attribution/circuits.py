"""Circuits: edges between components, and features of a dictionary, scored by one backward pass and tried by ablation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from nissl.arguments import at_least, instance
from nissl.attribution.patching import pairs_of
from nissl.errors import InputError, blame
from nissl.network import Add, Answer, Apply, LanguageModel, Network, Pass, RelP, Rules, Target
from nissl.network.edit import Edit
from nissl.network.passes import Inputs
from nissl.network.site import parse
from nissl.network.target import as_target
from nissl.runner import Asking, Job, Runner
from nissl.runner.scores import parameters_of


@dataclass(frozen=True, eq=False)
class Graph:
    """Components of a language model and the edges between them.

    Attributes
    ----------
    senders, receivers : dict of name to address
        What is written to the residual stream: ``embed``, ``attn.0``, ``mlp.0``, …; where it is read: ``attn.0``,
        ``mlp.0``, …, ``logits`` (the inputs of the norms in front).
    exists : bool array (receiver, sender)
        Which sender comes before which receiver.
    """

    senders: dict[str, str]
    receivers: dict[str, str]
    exists: np.ndarray

    @classmethod
    def of(cls, network: LanguageModel) -> Graph:
        """The graph of a language model.

        Raises
        ------
        SiteError
            The model lacks a part; says which.
        """
        instance("network", network, LanguageModel)
        a = network.anatomy
        parts = [(f"{p}.{i}", p, i) for i in range(a.n_layers) for p in ("attn", "mlp")]
        # what enters the first block: token embeddings, scaled or with positions added where the family does so
        senders = {"embed": a.site("resid_pre", 0), **{name: a.site(f"{p}_out", i) for name, p, i in parts}}
        receivers = {**{name: a.site(f"{p}_in", i) for name, p, i in parts}, "logits": a.site("final")}
        exists = np.tril(np.ones((len(receivers), len(senders)), bool))
        if a.parallel:  # attention and MLP of a block read the same stream
            exists[np.arange(1, 2 * a.n_layers, 2), np.arange(1, 2 * a.n_layers, 2)] = False
        return cls(
            {k: str(parse(s)) for k, s in senders.items()}, {k: str(parse(s)) for k, s in receivers.items()}, exists
        )


@dataclass(frozen=True, eq=False)
class EdgePatching:
    """Scores of edges: coefficient at the receiver's input times the difference of the sender's output.

    An estimate of how the scalar changes when one receiver, and no other, is given the sender's output of the other run.
    All edges are scored at the cost of two forward passes and one backward pass.

    Parameters
    ----------
    rules : Rules or None, default RelP(attention=False)
        Backward rules; None is the plain gradient (edge attribution patching).
    direction : {"denoising", "noising"}, default "denoising"

    References
    ----------
    Syed, Rager, Conmy: Attribution patching outperforms automated circuit discovery (2023). Rezaei Jafari, Eberle,
    Khakzar, Nanda: RelP (2025).
    """

    rules: Rules | None = field(default_factory=lambda: RelP(attention=False))
    direction: str = "denoising"

    name: ClassVar[str] = "edges"
    title: ClassVar[str] = "Edge patching"
    paper: ClassVar[str] = "Syed et al. 2023"

    def __post_init__(self) -> None:
        _checked(self.direction, self.rules)

    def attribute(
        self, network: LanguageModel, clean: Any, corrupted: Any, target: Any, *, runner: Runner | None = None
    ) -> xr.DataArray:
        """Scores of every edge.

        Parameters
        ----------
        network : LanguageModel
        clean, corrupted : str, list of prompts, or inputs
            Pair by pair, all of one length.
        target : Target
        runner : Runner, optional

        Returns
        -------
        xarray.DataArray
            (example, receiver, sender), summed over positions; NaN where there is no edge.
        """
        graph = Graph.of(network)
        runs = _Runs(network, clean, corrupted, target, self.direction)
        runner, values, attrs = _driven(self, network, runner, lambda: self._scores(runs, graph))
        table = torch.where(torch.from_numpy(graph.exists), values.double(), torch.nan)
        coords = {"receiver": list(graph.receivers), "sender": list(graph.senders)}
        return xr.DataArray(
            table.numpy(), coords, ("example", "receiver", "sender"), self.name, {**attrs, "target": runs.of.name}
        )

    def _scores(self, runs: _Runs, graph: Graph) -> Asking[Tensor]:
        senders, receivers = list(graph.senders.values()), list(graph.receivers.values())
        base, other = yield from runs.both(senders, receivers, self.rules)
        change = torch.stack([other.reads[s] - base.reads[s] for s in senders], 1).flatten(2)
        coefficients = torch.stack([base.gradients[s] for s in receivers], 1).flatten(2)
        return (coefficients @ change.mT).cpu()


def edge_circuit(
    network: LanguageModel,
    clean: Any,
    corrupted: Any,
    target: Any,
    scores: xr.DataArray,
    sizes: Sequence[int] | None = None,
    *,
    ablate: str = "corrupted",
    runner: Runner | None = None,
) -> xr.Dataset:
    """Faithfulness and completeness as edges are added to a circuit in order of their size.

    The network runs on the clean prompts. Each receiver gets the sum of what its senders put out in this very pass,
    except over edges that are not in the circuit: there the sender's ablated output stands in its place.

    Parameters
    ----------
    network : LanguageModel
    clean, corrupted, target
        As for `EdgePatching.attribute`.
    scores : xarray.DataArray (example, receiver, sender) or (receiver, sender)
        Edges enter the circuit by the absolute value of their mean score.
    sizes : sequence of int, optional
        Numbers of edges; by default 0, all, and ten between in equal ratios.
    ablate : {"corrupted", "mean", "zero"}, default "corrupted"
        What stands in place of a sender outside the circuit: its output on the corrupted prompt, the mean of that over the
        examples (position by position), or zero.
    runner : Runner, optional

    Returns
    -------
    xarray.Dataset
        ``circuit`` and ``complement`` (example, size): the target with only the circuit, and with everything else;
        ``faithfulness`` and ``completeness`` (size): (m(C) - m(nothing)) / (m(all) - m(nothing)) of means over examples,
        for the circuit and for its complement. High faithfulness and low completeness are good.
    """
    graph = Graph.of(network)
    runs = _Runs(network, clean, corrupted, target, "noising")
    table = np.abs(scores.mean("example").values if "example" in scores.dims else scores.values)
    if table.shape != graph.exists.shape:
        raise InputError(f"scores of shape {table.shape}; this network has {graph.exists.shape} receivers and senders")
    places = np.argwhere(graph.exists)
    order = places[np.argsort(-table[graph.exists], kind="stable")]

    def masks(size: int, within: bool) -> np.ndarray:
        kept = ~graph.exists if within else np.ones_like(graph.exists)
        kept = kept.copy()
        kept[tuple(order[:size].T)] = within
        return kept

    def asking(sizes: list[int]) -> Asking[list[Tensor]]:
        senders = list(graph.senders.values())
        found = yield Pass(runs.source, read=senders, of=runs.of)
        held = {s: _standing(found.reads[s], ablate) for s in senders}
        passes = [
            Pass(runs.base, _rerouted(graph, masks(n, within), held), of=runs.of)
            for within in (True, False)
            for n in sizes
        ]
        answers = yield passes
        return [a.scalar for a in answers]

    if ablate not in ("corrupted", "mean", "zero"):
        raise InputError(f"ablate={ablate!r}: choose 'corrupted', 'mean' or 'zero'")
    return _curve("edges", network, len(order), sizes, asking, runner)


def _rerouted(graph: Graph, kept: np.ndarray, held: Mapping[str, Tensor]) -> list[Edit]:
    """Edits that take away what comes over edges outside the circuit, as it is in this pass, and put `held` there."""
    live: dict[str, Tensor] = {}

    def keep(site: str) -> Callable[[Tensor], Tensor]:
        def function(t: Tensor) -> Tensor:
            live[site] = t
            return t

        return function

    def without(sites: list[str]) -> Callable[[Tensor], Tensor]:
        return lambda t: t - torch.stack([live[s] for s in sites]).sum(0)

    senders = list(graph.senders.values())
    edits = [Apply(s, keep(s)) for s in senders]
    for i, receiver in enumerate(graph.receivers.values()):
        removed = [s for j, s in enumerate(senders) if not kept[i, j]]
        if removed:
            edits.append(Apply(receiver, without(removed)))
            edits.append(Add(receiver, torch.stack([held[s] for s in removed]).sum(0)))
    return edits


def _standing(t: Tensor, ablate: str) -> Tensor:
    if ablate == "zero":
        return torch.zeros_like(t)
    return t.mean(0, keepdim=True).expand_as(t) if ablate == "mean" else t


# ---------------------------------------------------------------- features of a dictionary


@runtime_checkable
class Dictionary(Protocol):
    """What sparse feature circuits need: activations to features and back.

    `nissl.concepts.SemiNMF`, `nissl.concepts.SAE`, or any object with these two functions of tensors.
    """

    def encode(self, x: Tensor) -> Tensor:
        """Features (..., n_features) of activations (..., n_units)."""
        ...

    def decode(self, weights: Tensor) -> Tensor:
        """Activations (..., n_units) from features (..., n_features)."""
        ...


@dataclass(frozen=True, eq=False)
class FeaturePatching:
    """Scores of a dictionary's features and of what it leaves over, site by site.

    At each site the activation is decode(f) + error. A feature's coefficient is the gradient at the site, under the rules,
    taken through the decoder; its score is that times the change of the feature, and the error's score its own product.
    With a linear decoder the scores of a position sum to that of the whole activation.

    Parameters
    ----------
    dictionaries : mapping of site to Dictionary
        Addresses such as ``net.anatomy.site("mlp_out", 5)``.
    rules : Rules or None, default RelP(attention=False)
    direction : {"denoising", "noising"}, default "denoising"

    References
    ----------
    Marks, Rager, Michaud, Belinkov, Bau, Mueller: Sparse feature circuits (2025). Rezaei Jafari, Eberle, Khakzar, Nanda:
    RelP (2025).
    """

    dictionaries: Mapping[str, Any]
    rules: Rules | None = field(default_factory=lambda: RelP(attention=False))
    direction: str = "denoising"

    name: ClassVar[str] = "features"
    title: ClassVar[str] = "Sparse feature patching"
    paper: ClassVar[str] = "Marks et al. 2025"

    def __post_init__(self) -> None:
        _checked(self.direction, self.rules)
        if not isinstance(self.dictionaries, Mapping) or not self.dictionaries:
            raise InputError("dictionaries must map sites to dictionaries, one at least")
        for site, d in self.dictionaries.items():
            if not isinstance(d, Dictionary):
                raise InputError(f"the dictionary for {site!r} has no encode and decode: {type(d).__name__}")

    def attribute(
        self, network: Network, clean: Any, corrupted: Any, target: Any, *, runner: Runner | None = None
    ) -> dict[str, xr.DataArray]:
        """Scores of features at each site.

        Returns
        -------
        dict of site to xarray.DataArray
            (example, position, feature); feature -1, the last one, is the error.
        """
        runs = _Runs(network, clean, corrupted, target, self.direction)
        _, found, attrs = _driven(self, network, runner, lambda: self._scores(runs))
        made = {}
        for site, values in found.items():
            n, t, k = values.shape
            coords = {"example": np.arange(n), "position": np.arange(-t, 0), "feature": [*range(k - 1), -1]}
            made[site] = xr.DataArray(values.cpu().numpy(), coords, ("example", "position", "feature"), site,
                                      {**attrs, "target": runs.of.name})  # fmt: skip
        return made

    def _scores(self, runs: _Runs) -> Asking[dict[str, Tensor]]:
        sites = {str(parse(s)): d for s, d in self.dictionaries.items()}
        base, other = yield from runs.both(list(sites), list(sites), self.rules)
        found = {}
        for site, dictionary in sites.items():
            x, y, c = base.reads[site], other.reads[site], base.gradients[site]
            f, g = _encoded(site, dictionary, x), _encoded(site, dictionary, y)
            with torch.enable_grad():
                leaf = f.detach().requires_grad_()
                (coefficient,) = torch.autograd.grad(dictionary.decode(leaf), leaf, c.to(f))
            rest = (y - dictionary.decode(g).to(y)) - (x - dictionary.decode(f).to(x))
            found[site] = torch.cat([coefficient * (g - f), (c * rest).sum(-1, keepdim=True).to(f)], -1).detach()
        return found


def feature_circuit(
    network: Network,
    clean: Any,
    corrupted: Any,
    target: Any,
    dictionaries: Mapping[str, Dictionary],
    scores: Mapping[str, xr.DataArray],
    sizes: Sequence[int] | None = None,
    *,
    runner: Runner | None = None,
) -> xr.Dataset:
    """Faithfulness and completeness as features are added to a circuit in order of their size.

    The network runs on the clean prompts. Features and errors that are not in the circuit are set to their mean over all
    clean and corrupted prompts, position by position.

    Parameters
    ----------
    network : Network
    clean, corrupted, target
        As for `FeaturePatching.attribute`; several pairs of one length.
    dictionaries : mapping of site to Dictionary
    scores : mapping of site to xarray.DataArray
        What `FeaturePatching.attribute` gave. Units, features and errors, enter by the absolute value of their score,
        summed over positions and averaged over examples, and stay at all positions.
    sizes : sequence of int, optional
        Numbers of units; by default 0, all, and ten between in equal ratios.
    runner : Runner, optional

    Returns
    -------
    xarray.Dataset
        See `edge_circuit`.
    """
    runs = _Runs(network, clean, corrupted, target, "noising")
    sites = {str(parse(s)): d for s, d in dictionaries.items()}
    if set(sites) != set(scores):
        raise InputError(f"scores are of {sorted(scores)}, dictionaries of {sorted(sites)}")
    strength = [np.abs(scores[s].sum("position").mean("example").values) for s in sites]
    bounds = np.cumsum([0, *map(len, strength)])
    order = np.argsort(-np.concatenate(strength), kind="stable")

    def edits(size: int, within: bool, means: Mapping[str, tuple[Tensor, Tensor]]) -> list[Edit]:
        kept = np.full(bounds[-1], not within)
        kept[order[:size]] = within
        found = []
        for i, (site, dictionary) in enumerate(sites.items()):
            mask = torch.from_numpy(kept[bounds[i] : bounds[i + 1]])
            if not bool(mask.all()):
                found.append(Apply(site, _restricted(dictionary, mask, *means[site])))
        return found

    def asking(sizes_: list[int]) -> Asking[list[Tensor]]:
        answers = yield [Pass(i, read=list(sites), output=False) for i in (runs.base, runs.source)]
        means = {}
        for site, dictionary in sites.items():
            x = torch.cat([a.reads[site] for a in answers])
            f = _encoded(site, dictionary, x)
            means[site] = f.mean(0), (x - dictionary.decode(f).to(x)).mean(0)
        passes = [Pass(runs.base, edits(n, w, means), of=runs.of) for w in (True, False) for n in sizes_]
        answers = yield passes
        return [a.scalar for a in answers]

    return _curve("units", network, len(order), sizes, asking, runner)


def _restricted(dictionary: Dictionary, kept: Tensor, mean: Tensor, mean_error: Tensor) -> Callable[[Tensor], Tensor]:
    """The activation with features and error outside the circuit at their means."""

    def function(x: Tensor) -> Tensor:
        f = dictionary.encode(x)
        error = x - dictionary.decode(f).to(x) if bool(kept[-1]) else mean_error.to(x)
        f = torch.where(kept[:-1].to(f.device), f, mean.to(f))
        return dictionary.decode(f).to(x) + error

    return function


def _encoded(site: str, dictionary: Dictionary, x: Tensor) -> Tensor:
    with blame(InputError, f"the dictionary does not fit {site!r}, whose activations are {tuple(x.shape)}"):
        f = dictionary.encode(x)
        back = dictionary.decode(f)
    if back.shape != x.shape:
        raise InputError(f"the dictionary for {site!r} gives back {tuple(back.shape)} for activations {tuple(x.shape)}")
    return f


# ---------------------------------------------------------------- what both share


def _checked(direction: str, rules: Any) -> None:
    if direction not in ("denoising", "noising"):
        raise InputError(f"direction={direction!r}: choose 'denoising' or 'noising'")
    if rules is not None:
        instance("rules", rules, Rules)


class _Runs:
    """All pairs as two batches of one length: the run that is changed, and the other."""

    def __init__(self, network: Network, clean: Any, corrupted: Any, target: Any, direction: str) -> None:
        if corrupted is None:
            raise InputError("circuits need corrupted prompts beside the clean ones")
        if target is None:
            raise InputError("say with target= which scalar is explained")
        pairs = pairs_of(network, clean, corrupted)
        lengths = {next(v.shape[1] for v in a.values() if isinstance(v, Tensor)) for a, _ in pairs}
        if len(lengths) > 1:
            raise InputError(
                f"circuits take prompts of one length, got {sorted(lengths)} tokens; PromptPairs.by_length sorts them"
            )
        one, two = (_stacked([p[i] for p in pairs]) for i in (0, 1))
        self.base, self.source = (two, one) if direction == "denoising" else (one, two)
        self.of: Target = as_target(target).rows(len(pairs))

    def both(self, read: list[str], wrt: list[str], rules: Rules | None) -> Asking[list[Answer]]:
        """Both runs read, the base differentiated."""
        found = yield [
            Pass(self.base, read=read, of=self.of, wrt=wrt, rules=rules), Pass(self.source, read=read, output=False),
        ]  # fmt: skip
        return found


def _stacked(rows: list[Any]) -> Inputs:
    return {k: torch.cat([r[k] for r in rows]) if isinstance(v, Tensor) else v for k, v in rows[0].items()}


def _driven(method: Any, network: Network, runner: Runner | None, start: Callable[[], Any]) -> Any:
    """Runner, what the generator returned, and the facts for ``attrs``."""
    runner = Runner(memory=2**28) if runner is None else runner
    instance("runner", runner, Runner)
    before = dict(runner.cost(method.name).__dict__)
    ((_, found),) = runner.drive([Job(method.name, 0, network, start)], 1, method.title)
    spent = {k: v - before[k] for k, v in runner.cost(method.name).__dict__.items()}
    parameters = {k: v for k, v in parameters_of(method).items() if k != "dictionaries"}
    return runner, found, {
        "method": type(method).__name__,
        "parameters": json.dumps(parameters, sort_keys=True),
        "paper": method.paper,
        "forward_passes": int(spent["forward"]),
        "backward_passes": int(spent["backward"]),
        "seconds": round(float(spent["seconds"]), 3),
        "network": network.name,
        "fingerprint": network.fingerprint(),
    }  # fmt: skip


def _curve(
    name: str,
    network: Network,
    most: int,
    sizes: Sequence[int] | None,
    asking: Callable[[list[int]], Asking[list[Tensor]]],
    runner: Runner | None,
) -> xr.Dataset:
    given = np.geomspace(1, most, 11).round().astype(int).tolist() if sizes is None else list(sizes)
    for n in given:
        at_least("sizes", n, 0)
        if n > most:
            raise InputError(f"sizes: {n} {name} were asked for, there are {most}")
    wanted = sorted({0, most, *(int(n) for n in given)})
    runner = Runner(memory=2**28) if runner is None else runner
    instance("runner", runner, Runner)
    ((_, found),) = runner.drive([Job("circuit", 0, network, lambda: asking(wanted))], 1, "circuits")
    table = torch.stack(found, 1).double().cpu().numpy().reshape(-1, 2, len(wanted))
    within, without = table[:, 0], table[:, 1]
    nothing, everything = within[:, 0].mean(), within[:, -1].mean()
    share = (table.mean(0) - nothing) / (everything - nothing)
    return xr.Dataset(
        {
            "circuit": (("example", "size"), within),
            "complement": (("example", "size"), without),
            "faithfulness": (("size",), share[0]),
            "completeness": (("size",), share[1]),
        },
        {"size": wanted},
        {"units": name, "nothing": float(nothing), "everything": float(everything)},
    )
