"""Activation patching and its approximations: attribution patching, relevance patching, integrated gradients on nodes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from nissl.arguments import at_least, instance, is_whole
from nissl.errors import InputError
from nissl.network import LanguageModel, Network, Pass, RelP, Rules, Set, Target
from nissl.network.passes import Answer, Inputs, as_inputs, n_rows, rows_of
from nissl.network.site import parse
from nissl.network.target import as_target
from nissl.runner import Asking, Job, Runner, chunks
from nissl.runner.scores import parameters_of

KINDS = ("resid_pre", "attn_out", "mlp_out")
"""Kinds of node that are scored by default."""

_ROWS = 64  # patched rows asked for at once
_SPLIT = {"heads": ("z", "head"), "neurons": ("neurons", "unit")}  # kind: role, dimension


@dataclass(frozen=True)
class Nodes:
    """One kind of node: a site in each layer, and how its units make up nodes.

    Attributes
    ----------
    kind : str
        Name of the kind.
    sites : tuple of str
        Addresses, one a layer; activations (n_rows, n_positions, n_units).
    parts : int, default 1
        Into how many nodes of equal size the units are split: 1 takes the whole vector, the number of heads gives heads,
        the number of units single neurons.
    dim : str, optional
        Name of the dimension of the parts.
    residual : tuple of str, default ()
        Sites of the residual stream before each layer, through which everything from earlier layers reaches it. With them
        a patched pass skips the layers before the patch.
    """

    kind: str
    sites: tuple[str, ...]
    parts: int = 1
    dim: str | None = None
    residual: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("sites", "residual"):
            object.__setattr__(self, name, tuple(str(parse(s)) for s in getattr(self, name)))
        at_least("parts", self.parts, 1)
        if not self.sites:
            raise InputError(f"nodes {self.kind!r} need a site in each layer, at least one")
        if (self.dim is None) != (self.parts == 1):
            raise InputError(f"nodes {self.kind!r}: dim names the parts of a site, so it goes with parts > 1")
        if self.residual and len(self.residual) != len(self.sites):
            raise InputError(f"nodes {self.kind!r}: residual needs one site a layer, {len(self.sites)}")

    def split(self, t: Tensor) -> Tensor:
        """Activations (..., n_units) as (..., parts, n_units / parts)."""
        if t.shape[-1] % self.parts:
            raise InputError(f"nodes {self.kind!r}: {t.shape[-1]} units cannot be split into {self.parts} equal parts")
        return t.reshape(*t.shape[:-1], self.parts, -1)


def nodes_of(network: Network, kinds: Sequence[str | Nodes] = KINDS) -> tuple[Nodes, ...]:
    """Nodes of a language model by kind.

    Parameters
    ----------
    network : Network
        A LanguageModel, unless all kinds are given as Nodes.
    kinds : sequence of str or Nodes
        Roles of the anatomy, such as ``resid_pre``, ``attn_out``, ``mlp_out``; ``heads`` (their outputs before the
        output projection) and ``neurons`` (of the MLPs, one by one).

    Raises
    ------
    InputError
        No kind, one given twice, or a network without anatomy.
    SiteError
        The model lacks the role.
    """
    instance("network", network, Network)
    if isinstance(kinds, (str, Nodes)):
        kinds = (kinds,)
    found = []
    for kind in kinds:
        if isinstance(kind, Nodes):
            found.append(kind)
            continue
        anatomy = getattr(network, "anatomy", None)
        if anatomy is None:
            raise InputError(
                f"{network.name} has no anatomy: give Nodes({kind!r}, sites) with the addresses of its sites"
            )
        role, dim = _SPLIT.get(kind, (kind, None))
        parts = {"heads": anatomy.n_heads, "neurons": anatomy.d_mlp}.get(kind, 1)
        residual = () if "resid_pre" in anatomy.missing else anatomy.sites("resid_pre")
        found.append(Nodes(kind, tuple(anatomy.sites(role)), parts, dim, tuple(residual)))
    names = [n.kind for n in found]
    if not found or len(set(names)) < len(names):
        raise InputError(f"give kinds of nodes, each once; got {names}")
    return tuple(found)


@dataclass(frozen=True, eq=False)
class PairQuestion:
    """What is asked about one pair: how the scalar of one run changes when activations of the other are put into it.

    Attributes
    ----------
    network : Network
    base, source : dict of name to Tensor (1, ...)
        The run that is patched into, and the one that activations are taken from; for `source` also ``"mean"`` (over the
        base run's positions but the first) or ``"zero"``.
    target : Target
        For one row.
    nodes : tuple of Nodes
    seed, example : int
    """

    network: Network
    base: Inputs
    source: Inputs | str
    target: Target
    nodes: tuple[Nodes, ...]
    seed: int = 0
    example: int = 0

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site of every kind."""
        return tuple(dict.fromkeys(s for n in self.nodes for s in n.sites))

    def repeated(self, n: int) -> Inputs:
        """The base inputs as n equal rows."""
        return {k: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) else v for k, v in self.base.items()}

    def runs(
        self, *more: str, start: str | None = None, gradient: bool = False, rules: Rules | None = None
    ) -> Asking[tuple[Answer, dict[str, Tensor], Tensor, float]]:
        """Both runs: answer of the base, activations of the source, and the scalar of both (NaN without a source).

        Parameters
        ----------
        more : str
            Further sites to read in the base run.
        start : str, optional
            One to read in both.
        gradient : bool
            Differentiate at every site of the base run, by the rules.
        """
        sites = self.sites
        shared = [*sites, *([] if start is None else [start])]
        read = list(dict.fromkeys([*shared, *more]))
        base = Pass(self.base, read=read, of=self.target, wrt=sites if gradient else (), rules=rules)
        if isinstance(self.source, str):
            found = yield base
            acts, scalar = {s: _ablated(found.reads[s], self.source) for s in read}, np.nan
        else:
            wanted = list(dict.fromkeys(shared))
            found, other = yield [base, Pass(self.source, read=wanted, of=self.target)]
            acts, scalar = other.reads, float(other.scalar[0])
        for s in sites:
            if found.reads[s].ndim != 3 or found.reads[s].shape != acts[s].shape:
                raise InputError(
                    f"{s!r} holds {tuple(found.reads[s].shape)} in one run and {tuple(acts[s].shape)} in the other; "
                    "patching needs (rows, positions, units), the same in both"
                )
        assert found.scalar is not None
        return found, acts, found.scalar[0], scalar


def _ablated(t: Tensor, how: str) -> Tensor:
    if how == "zero":
        return torch.zeros_like(t)
    # The first position often has activations hundreds of times as large, whatever the text.
    return t[:, min(1, t.shape[1] - 1) :].mean(1, keepdim=True).expand_as(t)


@dataclass(frozen=True, eq=False)
class Effects:
    """What a method found for one pair.

    Attributes
    ----------
    values : dict of kind to Tensor (n_layers, n_positions, n_parts)
    base, source : float
        The scalar of both runs.
    """

    values: dict[str, Tensor]
    base: float
    source: float


@dataclass(frozen=True, eq=False)
class Patching(ABC):
    """How much the scalar of one run changes when a node's activation is taken from another run.

    Methods share one interface and one unit, that of the target: score = m(base with the node patched) - m(base), the
    true value or an estimate of it.

    Parameters
    ----------
    direction : {"denoising", "noising"}, default "denoising"
        Denoising puts clean activations into the corrupted run, noising corrupted ones into the clean run.
    """

    direction: str = "denoising"

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        if self.direction not in ("denoising", "noising"):
            raise InputError(f"direction={self.direction!r}: choose 'denoising' or 'noising'")

    @abstractmethod
    def effects(self, q: PairQuestion) -> Asking[Effects]:
        """Scores for one pair: a generator that yields Passes."""

    def attribute(
        self,
        network: Network,
        clean: Any,
        corrupted: Any = None,
        target: Any = None,
        *,
        kinds: Sequence[str | Nodes] = KINDS,
        ablate: str = "mean",
        seed: int = 0,
        runner: Runner | None = None,
    ) -> xr.Dataset:
        """Scores of every node.

        Parameters
        ----------
        network : Network
        clean, corrupted : str, list of prompts, or inputs
            Pair by pair, aligned token by token. Without `corrupted`, activations of the clean run are ablated: the
            estimate is of m(node ablated) - m(clean).
        target : Target
            For the rows of `clean`, such as ``target.logit_difference(a, b, position=-1)``; `PromptPairs.target` makes it.
        kinds : sequence of str or Nodes
            See `nodes_of`.
        ablate : {"mean", "zero"}, default "mean"
            What takes the place of activations where there is no corrupted run: their mean over the prompt's positions
            after the first, or zero.
        seed : int, default 0
        runner : Runner, optional

        Returns
        -------
        xarray.Dataset
            For each kind scores (example, layer, position) and, for heads and neurons, a last dimension ``head`` or
            ``unit``, in units of the target. Positions count from the end, -1 is the last; where prompts differ in length
            the missing ones are NaN. Coordinates ``clean`` and ``corrupted`` are the target of both runs, and
            ``first_difference`` is the first position at which the inputs differ. ``attrs`` hold method, parameters,
            cost in passes, seed and fingerprint.

        Raises
        ------
        InputError
            Pairs of different length, padded rows, or nothing that can be patched.
        """
        return patch(
            {self.name: self}, network, clean, corrupted, target, kinds=kinds, ablate=ablate, seed=seed, runner=runner
        )[self.name]


@dataclass(frozen=True, eq=False)
class ActivationPatching(Patching):
    """The true effect: a pass for each node, whose activation is set to what it is in the other run.

    Parameters
    ----------
    direction : {"denoising", "noising"}, default "denoising"
    sample : int, optional
        Patch only so many nodes of each kind and pair, drawn at random among those whose activations differ; the others
        are NaN.
    only : mapping of kind to bool array, optional
        Patch only these nodes, (layer, position[, part]) or with examples first; needed for ``neurons``, unless
        `sample` is given. The others are NaN.

    Notes
    -----
    Nodes with equal activations in both runs are not patched: their effect is exactly 0. A patched pass sets the whole
    residual stream before the layer of the node to what it was in the base run, which lets the network skip all layers
    before. Cost: two forward passes, and one for each node.

    References
    ----------
    Vig et al.: Investigating gender bias in language models using causal mediation analysis (2020). Meng, Bau, Andonian,
    Belinkov: Locating and editing factual associations in GPT (2022).
    """

    sample: int | None = None
    only: Mapping[str, Any] | None = None

    name: ClassVar[str] = "patching"
    title: ClassVar[str] = "Activation patching"
    paper: ClassVar[str] = "Vig et al. 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample is not None:
            at_least("sample", self.sample, 1)
        if self.only is not None and not isinstance(self.only, Mapping):
            raise InputError(f"only must map kinds to bool arrays, got {type(self.only).__name__}")

    def effects(self, q: PairQuestion) -> Asking[Effects]:
        """See `Patching.effects`."""
        found, acts, base, source = yield from q.runs(*(s for n in q.nodes for s in n.residual))
        values: dict[str, Tensor] = {}
        for nodes in q.nodes:
            here = torch.stack([nodes.split(found.reads[s][0]) for s in nodes.sites])
            there = torch.stack([nodes.split(acts[s][0]) for s in nodes.sites])
            differs = (here != there).any(-1)
            chosen = self._chosen(q, nodes, differs).to(differs.device)
            effect = torch.full(differs.shape, torch.nan, dtype=base.dtype, device=base.device)
            effect[chosen] = 0.0
            for layer, site in enumerate(nodes.sites):
                where = (differs[layer] & chosen[layer]).nonzero()
                if not len(where):
                    continue
                before = []
                if nodes.residual and nodes.residual[layer] != site:
                    before = [Set(nodes.residual[layer], found.reads[nodes.residual[layer]])]
                passes = []
                for rows in chunks(len(where), _ROWS):
                    at = where[rows]
                    value = here[layer].repeat(len(at), 1, 1, 1)
                    index = torch.arange(len(at), device=at.device), at[:, 0], at[:, 1]
                    value[index] = there[layer][index[1:]]
                    edits = [*before, Set(site, value.flatten(2))]
                    passes.append(Pass(q.repeated(len(at)), edits, of=q.target))
                answers = yield passes
                effect[layer][where[:, 0], where[:, 1]] = torch.cat([a.scalar for a in answers]) - base
            values[nodes.kind] = effect
        return Effects(values, float(base), source)

    def _chosen(self, q: PairQuestion, nodes: Nodes, differs: Tensor) -> Tensor:
        """Which nodes are wanted, (n_layers, n_positions, n_parts)."""
        chosen = torch.ones(differs.shape, dtype=torch.bool)
        if self.only is not None:
            given = torch.as_tensor(np.asarray(self.only.get(nodes.kind, False)))
            if given.dtype != torch.bool:
                raise InputError(f"only[{nodes.kind!r}] must be a bool array, got {given.dtype}")
            given = given[..., None] if given.ndim and nodes.parts == 1 else given
            given = given[q.example] if given.ndim == 4 else given
            if given.ndim and given.shape != differs.shape:
                raise InputError(
                    f"only[{nodes.kind!r}] has shape {tuple(given.shape)}, needed is {tuple(differs.shape)}"
                )
            chosen &= given
        elif nodes.dim == "unit" and self.sample is None:
            raise InputError(
                f"patching each of {differs[0, 0].numel() * differs.shape[0]} neurons at each position takes too long: "
                "choose some with only= or sample="
            )
        if self.sample is not None:
            free = (chosen & differs.cpu()).flatten().nonzero()[:, 0]
            salt = int.from_bytes(nodes.kind.encode()[:6], "big")
            drawn = np.random.default_rng([q.seed, q.example, salt]).permutation(len(free))[: self.sample]
            chosen = torch.zeros(differs.numel(), dtype=torch.bool)
            chosen[free[torch.as_tensor(drawn, dtype=torch.long)]] = True
            chosen = chosen.reshape(differs.shape)
        return chosen


@dataclass(frozen=True, eq=False)
class AttributionPatching(Patching):
    """First-order estimate: gradient in the base run times the difference of activations, summed over a node's units.

    Cost: two forward passes and one backward pass for all nodes.

    Parameters
    ----------
    direction : {"denoising", "noising"}, default "denoising"
    rules : Rules, optional
        Backward rules; with `RelP` rules this is relevance patching.

    References
    ----------
    Nanda: Attribution patching (2023). Syed, Rager, Conmy: Attribution patching outperforms automated circuit discovery
    (2023).
    """

    rules: Rules | None = None

    name: ClassVar[str] = "atp"
    title: ClassVar[str] = "Attribution patching"
    paper: ClassVar[str] = "Nanda 2023"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rules is not None:
            instance("rules", self.rules, Rules)

    def effects(self, q: PairQuestion) -> Asking[Effects]:
        """See `Patching.effects`."""
        found, acts, base, source = yield from q.runs(gradient=True, rules=self.rules)
        values = {n.kind: _first_order(n, found.gradients, found.reads, acts) for n in q.nodes}
        return Effects(values, float(base), source)


@dataclass(frozen=True, eq=False)
class RelevancePatching(AttributionPatching):
    """RelP: attribution patching whose backward pass follows relevance propagation instead of the local gradient.

    The backward rules are `nissl.network.RelP`: constant scales in norms, x f(x) / x with a constant ratio in
    activations, half of the gradient for each factor of a gate. Forward values do not change. Cost: two forward passes and
    one backward pass, as for attribution patching.

    Parameters
    ----------
    direction : {"denoising", "noising"}, default "denoising"
    rules : Rules, default RelP(attention=False)
        The attention rule (constant patterns) is off, as in the authors' released code; `RelP()` turns it on.

    References
    ----------
    Rezaei Jafari, Eberle, Khakzar, Nanda: RelP: Faithful and efficient circuit discovery via relevance patching (2025).
    """

    rules: Rules | None = field(default_factory=lambda: RelP(attention=False))

    name: ClassVar[str] = "relp"
    title: ClassVar[str] = "Relevance patching (RelP)"
    paper: ClassVar[str] = "Rezaei Jafari et al. 2025"


@dataclass(frozen=True, eq=False)
class NodeIntegratedGradients(Patching):
    """Integrated gradients on nodes: the gradient averaged on the way from the base's activation to the source's.

    Parameters
    ----------
    direction : {"denoising", "noising"}, default "denoising"
    steps : int, default 10
        Points on the path, in the middles of equal parts.
    path : {"node", "input"}, default "node"
        ``node`` moves the activations of one site at a time, at all positions, which takes `steps` passes for each site;
        ``input`` moves the embeddings and takes `steps` passes for all nodes together.

    References
    ----------
    Marks et al.: Sparse feature circuits (2025), for ``node``. Hanna, Pezzelle, Belinkov: Have faith in faithfulness
    (2024), for ``input``.
    """

    steps: int = 10
    path: str = "node"

    name: ClassVar[str] = "ig"
    title: ClassVar[str] = "Integrated gradients on nodes"
    paper: ClassVar[str] = "Marks et al. 2025"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)
        if self.path not in ("node", "input"):
            raise InputError(f"path={self.path!r}: choose 'node' or 'input'")

    def effects(self, q: PairQuestion) -> Asking[Effects]:
        """See `Patching.effects`."""
        start = _embedding(q) if self.path == "input" else None
        more = [] if start else [s for n in q.nodes for s in n.residual]
        found, acts, base, source = yield from q.runs(*more, start=start)
        mean: dict[str, Tensor] = {}

        def between(site: str) -> Tensor:
            here, there = found.reads[site], acts[site]
            alpha = (torch.arange(self.steps, device=here.device, dtype=here.dtype) + 0.5) / self.steps
            return here + alpha.reshape(-1, *[1] * (here.ndim - 1)) * (there - here)

        if start is not None:
            edits = [Set(start, between(start))]
            answer = yield Pass(q.repeated(self.steps), edits, of=q.target, wrt=q.sites)
            mean = {s: g.mean(0, keepdim=True) for s, g in answer.gradients.items()}
        else:
            for nodes in q.nodes:
                for layer, site in enumerate(nodes.sites):
                    edits = [Set(site, between(site))]
                    if nodes.residual and nodes.residual[layer] != site:
                        before = nodes.residual[layer]
                        edits.insert(0, Set(before, found.reads[before]))
                    answer = yield Pass(q.repeated(self.steps), edits, of=q.target, wrt=[site])
                    mean[site] = answer.gradients[site].mean(0, keepdim=True)
        values = {n.kind: _first_order(n, mean, found.reads, acts) for n in q.nodes}
        return Effects(values, float(base), source)


def _embedding(q: PairQuestion) -> str:
    """Where the path of integrated gradients begins: the embedding of tokens, or the input itself."""
    anatomy = getattr(q.network, "anatomy", None)
    if anatomy is not None and "embed" not in anatomy.missing:
        return str(parse(anatomy.site("embed")))
    key = q.network.input_key("input", q.base)
    if q.base[key].is_floating_point():
        return "input"
    raise InputError(f"{q.network.name} has no embedding that nissl recognises; use path='node'")


def _first_order(nodes: Nodes, gradients: Mapping[str, Tensor], base: Mapping[str, Tensor], acts: Any) -> Tensor:
    """Gradient times difference for each node, (n_layers, n_positions, n_parts), in float32 or better."""

    def one(site: str) -> Tensor:
        g, a, b = (t[0].float() if t.dtype.itemsize < 4 else t[0] for t in (gradients[site], acts[site], base[site]))
        return nodes.split(g * (a - b)).sum(-1)

    return torch.stack([one(s) for s in nodes.sites])


# ---------------------------------------------------------------- several methods at once


def patch(
    methods: Mapping[str, Patching],
    network: Network,
    clean: Any,
    corrupted: Any = None,
    target: Any = None,
    *,
    kinds: Sequence[str | Nodes] = KINDS,
    ablate: str = "mean",
    seed: int = 0,
    runner: Runner | None = None,
) -> dict[str, xr.Dataset]:
    """Scores of several patching methods for the same pairs, sharing batches and passes; see `Patching.attribute`."""
    if not methods or not all(isinstance(m, Patching) for m in methods.values()):
        raise InputError(f"methods must map names to patching methods such as RelevancePatching(), got {methods!r:.60}")
    nodes = nodes_of(network, kinds)
    at_least("seed", seed, 0)
    runner = Runner(memory=2**28) if runner is None else runner
    instance("runner", runner, Runner)
    pairs = pairs_of(network, clean, corrupted, ablate)
    if target is None:
        raise InputError(
            "say with target= which scalar is explained, such as target.logit_difference(a, b, position=-1)"
        )
    of = as_target(target).rows(len(pairs))

    def question(method: Patching, i: int) -> PairQuestion:
        a, b = pairs[i]
        base, source = (b, a) if method.direction == "denoising" and not isinstance(b, str) else (a, b)
        assert not isinstance(base, str)
        return PairQuestion(network, base, source, of[slice(i, i + 1)], nodes, seed, i)

    jobs = [
        Job(name, (name, i), network, lambda m=m, i=i: m.effects(question(m, i)))
        for i in range(len(pairs))
        for name, m in methods.items()
    ]
    before = {name: dict(runner.cost(name).__dict__) for name in methods}
    found = {job.key: effects for job, effects in runner.drive(jobs, len(jobs), "patching")}
    fingerprint = network.fingerprint()
    made = {}
    for name, method in methods.items():
        spent = {k: v - before[name][k] for k, v in runner.cost(name).__dict__.items()}
        made[name] = _dataset(method, nodes, pairs, [found[name, i] for i in range(len(pairs))])
        made[name].attrs = {
            "method": type(method).__name__,
            "title": method.title,
            "parameters": json.dumps(_parameters(method), sort_keys=True),
            "paper": method.paper,
            "direction": method.direction if corrupted is not None else f"{ablate} ablation",
            "target": of.name,
            "forward_passes": int(spent["forward"]),
            "backward_passes": int(spent["backward"]),
            "reused_passes": int(spent["reused"]),
            "seconds": round(float(spent["seconds"]), 3),
            "seed": seed,
            "network": network.name,
            "fingerprint": fingerprint,
        }
    return made


def _parameters(method: Patching) -> dict[str, Any]:
    return {**parameters_of(method), **({"only": "given"} if getattr(method, "only", None) is not None else {})}


def pairs_of(
    network: Network, clean: Any, corrupted: Any = None, ablate: str = "mean"
) -> list[tuple[Inputs, Inputs | str]]:
    """Inputs of one row for each pair, clean and corrupted (or how to ablate), checked to be aligned."""
    if ablate not in ("mean", "zero"):
        raise InputError(f"ablate={ablate!r}: choose 'mean' or 'zero'")
    one = _rows(network, clean, "clean")
    if corrupted is None:
        return [(a, ablate) for a in one]
    other = _rows(network, corrupted, "corrupted")
    if len(one) != len(other):
        raise InputError(f"{len(one)} clean and {len(other)} corrupted prompts: they go in pairs")
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        n, m = (next(v for v in x.values() if isinstance(v, Tensor)).shape[1] for x in (a, b))
        if n != m:
            raise InputError(
                f"pair {i}: the clean prompt has {n} tokens, the corrupted one {m}; patching goes position by position, so "
                "both need the same number"
            )
        if not any(isinstance(v, Tensor) and not torch.equal(v, b[k]) for k, v in a.items()):
            raise InputError(f"pair {i}: clean and corrupted are the same")
    return list(zip(one, other, strict=True))


def _rows(network: Network, given: Any, name: str) -> list[Inputs]:
    """Inputs of one row each: prompts are encoded one by one, so that nothing is padded."""
    is_inputs = isinstance(given, (Mapping, Tensor)) or (
        isinstance(given, np.ndarray) and given.dtype.kind in "biuf" and given.ndim > 1
    )
    if isinstance(network, LanguageModel) and not isinstance(given, Mapping):
        if isinstance(given, str) or (len(given) and is_whole(given[0])):
            given = [given]
        return [network.place(network.encode([p.tolist() if isinstance(p, Tensor) else p])) for p in given]
    if not is_inputs:
        raise InputError(f"{name} must be inputs of {network.name}, rows first; got {type(given).__name__}")
    inputs = network.place(as_inputs(given))
    for key, v in inputs.items():
        if isinstance(v, Tensor) and v.ndim < 2:
            raise InputError(f"{name}: input {key!r} has shape {tuple(v.shape)}; (rows, positions, ...) is needed")
        if key == "attention_mask" and not bool(v.bool().all()):
            raise InputError(f"{name} holds padded rows: give the prompts themselves, or rows of one length")
    return [rows_of(inputs, slice(i, i + 1)) for i in range(n_rows(inputs))]


def _first_difference(a: Inputs, b: Inputs | str) -> int:
    """The first position at which inputs differ, counted from the end."""
    if isinstance(b, str):
        return -next(v for v in a.values() if isinstance(v, Tensor)).shape[1]
    differs = [(v != b[k])[0].reshape(v.shape[1], -1).any(1) for k, v in a.items() if isinstance(v, Tensor)]
    either = torch.stack(differs).any(0)
    return int(either.nonzero()[0, 0]) - len(either)


def _dataset(method: Patching, nodes: tuple[Nodes, ...], pairs: list[Any], found: list[Effects]) -> xr.Dataset:
    lengths = [next(iter(e.values.values())).shape[1] for e in found]
    longest = max(lengths)
    data = {}
    for n in nodes:
        first = found[0].values[n.kind]
        kept = torch.float32 if first.dtype.itemsize < 4 else first.dtype
        table = torch.full((len(found), first.shape[0], longest, n.parts), torch.nan, dtype=kept)
        for i, e in enumerate(found):
            table[i, :, longest - lengths[i] :] = e.values[n.kind].to(table)
        whole = table.numpy() if n.dim else table[..., 0].numpy()
        data[n.kind] = (("example", "layer", "position", *([n.dim] if n.dim else [])), whole)
    swapped = method.direction == "denoising" and not isinstance(pairs[0][1], str)
    clean, corrupted = ("source", "base") if swapped else ("base", "source")
    coords: dict[str, Any] = {
        "example": np.arange(len(found)),
        "position": np.arange(-longest, 0),
        "clean": ("example", np.array([getattr(e, clean) for e in found])),
        "corrupted": ("example", np.array([getattr(e, corrupted) for e in found])),
        "first_difference": ("example", np.array([_first_difference(*p) for p in pairs])),
    }
    return xr.Dataset(data, coords)


# ---------------------------------------------------------------- agreement with the truth


def agreement(
    scores: xr.Dataset, truth: xr.Dataset, *, n_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Pearson correlation of estimates with true effects, kind by kind.

    Parameters
    ----------
    scores, truth : xarray.Dataset
        What `attribute` gave for the same pairs; nodes that are NaN in one of them are left out.
    n_resamples : int, default 2000
    level : float, default 0.95
    seed : int, default 0

    Returns
    -------
    pandas.DataFrame
        A row for each kind: ``r``, ``low``, ``high`` over all nodes; ``r_changed``, ``low_changed``, ``high_changed``
        without positions before the first difference, where both are 0 for certain and flatter every method; ``n`` and
        ``n_changed`` nodes. Intervals are percentiles over resampled examples; with one example, over resampled places
        (layer, position), which says less.

    Raises
    ------
    InputError
        No kind in common, or scores of other pairs.
    """
    rows = []
    for kind, x, y, masks in _shared(scores, truth, n_resamples):
        row: dict[str, Any] = {"kind": kind}
        for suffix, mask in masks.items():
            sums = _sums(x, y, mask)
            low, high = _interval(lambda draw, sums=sums: _r(draw @ sums), len(sums), n_resamples, level, seed)
            row |= {f"r{suffix}": float(_r(sums.sum(0))), f"low{suffix}": low, f"high{suffix}": high}
            row[f"n{suffix}"] = int(sums[:, 0].sum())
        rows.append(row)
    return pd.DataFrame(rows)


def agreement_gain(
    scores: xr.Dataset,
    baseline: xr.Dataset,
    truth: xr.Dataset,
    *,
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How much higher one estimate's correlation with the truth is than another's, kind by kind.

    Parameters
    ----------
    scores, baseline, truth : xarray.Dataset
        Of the same pairs.
    n_resamples, level, seed
        See `agreement`; both correlations are taken on the same resamples.

    Returns
    -------
    pandas.DataFrame
        ``kind``, ``gain``, ``low``, ``high``, without positions before the first difference.
    """
    rows = []
    others = {k: x for k, x, _, _ in _shared(baseline, truth, n_resamples)}
    for kind, x, y, masks in _shared(scores, truth, n_resamples):
        if kind not in others:
            continue
        mask = masks["_changed"] & np.isfinite(x) & np.isfinite(others[kind])
        a, b = _sums(x, y, mask), _sums(others[kind], y, mask)
        low, high = _interval(
            lambda draw, a=a, b=b: _r(draw @ a) - _r(draw @ b), len(a), n_resamples, level, seed
        )  # fmt: skip
        rows.append({"kind": kind, "gain": float(_r(a.sum(0)) - _r(b.sum(0))), "low": low, "high": high})
    return pd.DataFrame(rows)


def _shared(scores: xr.Dataset, truth: xr.Dataset, n_resamples: int) -> Any:
    """Kind, estimates, truth, and masks of all nodes and of those at changed positions."""
    at_least("n_resamples", n_resamples, 1)
    kinds = [str(k) for k in scores.data_vars if k in truth.data_vars]
    if not kinds:
        raise InputError(f"scores hold {list(scores.data_vars)}, the truth {list(truth.data_vars)}: no kind in common")
    late = (truth["first_difference"] <= truth["position"]).transpose("example", "position").values
    for kind in kinds:
        x, y = scores[kind].values.astype(float), truth[kind].values.astype(float)
        if x.shape != y.shape:
            raise InputError(f"{kind}: scores of shape {x.shape} and truth of shape {y.shape} are of other pairs")
        changed = np.broadcast_to(late.reshape(len(late), 1, -1, *[1] * (x.ndim - 3)), x.shape)
        yield kind, x, y, {"": np.ones(x.shape, bool), "_changed": changed}


def _sums(x: np.ndarray, y: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """For each group of nodes n, Σx, Σy, Σx², Σy², Σxy, from which correlations of any resample follow."""
    kept = mask & np.isfinite(x) & np.isfinite(y)
    if not kept.any():
        return np.zeros((1, 6))
    # brought to one scale first, so that the sums lose no digits
    a, b = ((t - t[kept].mean()) / (t[kept].std() or 1.0) for t in (x, y))
    a, b = np.where(kept, a, 0.0), np.where(kept, b, 0.0)
    # groups are examples; with one example they are its places
    shape = (len(x), -1) if len(x) > 1 else (x.shape[1] * x.shape[2], -1)
    a, b, kept = (t.reshape(shape) for t in (a, b, kept))
    return np.stack([kept.sum(1), a.sum(1), b.sum(1), (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)], 1)


def _r(sums: np.ndarray) -> Any:
    n, sx, sy, sxx, syy, sxy = np.moveaxis(sums, -1, 0)
    spread_x, spread_y = n * sxx - sx**2, n * syy - sy**2
    flat = (spread_x <= 1e-12 * n * sxx) | (spread_y <= 1e-12 * n * syy)  # nothing but rounding is left
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(flat, np.nan, (n * sxy - sx * sy) / np.sqrt(spread_x.clip(0) * spread_y.clip(0)))


def _interval(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, n_resamples: int, level: float, seed: int
) -> tuple[float, float]:
    """Percentiles of a statistic of how often each group was drawn."""
    if n < 2:
        return np.nan, np.nan
    found = statistic(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples))
    found = found[np.isfinite(found)]
    if not len(found):
        return np.nan, np.nan
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
