"""Query and value neurons: which MLP neurons write an answer, and what made those neurons fire."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from nissl.arguments import as_path, at_least, flag, instance, is_whole
from nissl.errors import InputError
from nissl.network import LanguageModel, Pass, Set
from nissl.network.passes import Inputs, n_rows, rows_of
from nissl.runner import Asking, Job, Runner
from nissl.runner.scores import parameters_of

_ROWS = 16  # prompts read at once: all layers of all neurons are held for them
_TOKENS = 4096  # rows of the unembedding multiplied at once
_LARGE = 60.0  # changes of a logit beyond this are summed with care for overflow


@dataclass(frozen=True, eq=False)
class QueryValueAttribution:
    """Value scores of MLP neurons by the logit lens, and query scores by the keys of the best value neurons.

    A *value* neuron writes the answer: v = m W_down[:, k] at the last position, scored by how much log p(answer) grows
    when v is added to the residual stream h that enters the MLP, both read through the final norm and the unembedding.
    The norm's scale is held at that of the final residual stream. A *query* component is what made a value neuron fire:
    its share of q · c among all components c of the residual stream before that MLP (embedding, attention and MLP
    outputs, neurons), where q is the exact key of the neuron, so that q · x_norm = m. In a gated MLP with
    pre-activations a and b, q = ½ act(a)/a · b · w_gate + ½ act(a) · w_up; otherwise q = act(a)/a · w_in.

    Parameters
    ----------
    top : int, default 30
        Value neurons whose keys are followed back, for each example.
    count : int, default 300
        Best value neurons of an example that are counted per layer (`value_count`).
    layers : int, sequence of int or None, default None
        Layers whose neurons are scored one by one: these; or that many with the largest mean `value_layer`; or all.
        Others have NaN in `value`. The cost grows with their number times the vocabulary.
    attention : bool, default False
        Also score attention's value channels, one for each head channel and source position.

    Notes
    -----
    Exact over the whole vocabulary. With several prompts the cost is shared: the product of unembedding and W_down is
    made once a layer. A key whose components cancel (their sum is below 1e-3 of the sum of their sizes) has no shares; it
    is skipped and counted in ``attrs["skipped"]``.

    References
    ----------
    Yang et al.: ACE: Attribution-controlled knowledge editing for multi-hop factual recall (2025).
    Yu, Ananiadou: Neuron-level knowledge attribution in large language models (2024).

    Examples
    --------
    >>> scores = QueryValueAttribution(layers=4).attribute(net, "The capital of France is")  # doctest: +SKIP
    >>> scores["value_layer"].argmax("layer")  # doctest: +SKIP
    """

    top: int = 30
    count: int = 300
    layers: int | Sequence[int] | None = None
    attention: bool = False

    name: ClassVar[str] = "query-value"
    title: ClassVar[str] = "Query-value attribution"
    paper: ClassVar[str] = "Yang et al. 2025"

    def __post_init__(self) -> None:
        at_least("top", self.top, 1)
        at_least("count", self.count, 1)
        flag("attention", self.attention)
        if is_whole(self.layers):
            at_least("layers", self.layers, 1)

    def attribute(
        self, network: LanguageModel, inputs: Any, target: Any = None, *, runner: Runner | None = None
    ) -> xr.Dataset:
        """Scores at the last position of each prompt.

        Parameters
        ----------
        network : LanguageModel
        inputs : str, list, or mapping
            Prompts, or what `network.encode` made of them (left-padded, one output position).
        target : str, int, sequence of these, or None
            The answer's token, one for all prompts or one each; a text that is one token, or its id. None is the token
            that the network predicts.
        runner : Runner, optional

        Returns
        -------
        xarray.Dataset
            ``value`` (example, layer, unit): growth of log p(answer) by each neuron's output. ``value_layer`` and
            ``attention_layer`` (example, layer): by the whole MLP and attention output. ``value_count`` (example, layer).
            ``query_layer`` (example, component): shares of the top value neurons' keys, weighted by their scores;
            components are ``embed``, ``attn.0``, ``mlp.0``, … ``query`` (example, layer, unit): the same for neurons.
            ``top_layer``, ``top_unit``, ``top_score`` (example, rank) and ``share`` (example, rank, component). With
            `attention`, ``attention_value`` (example, layer, source, channel).

        Raises
        ------
        InputError
            No language model, no such token, no such layer.
        SiteError
            The model lacks a part that is needed; says which.
        """
        instance("network", network, LanguageModel)
        runner = Runner() if runner is None else runner
        instance("runner", runner, Runner)
        placed = network.place(inputs if isinstance(inputs, Mapping) else network.encode(inputs))
        n = n_rows(placed)
        job = Job(self.name, 0, network, lambda: self._scores(network, placed, target, n))
        before = dict(runner.cost(self.name).__dict__)
        ((_, found),) = runner.drive([job], 1, "query and value neurons")
        spent = {k: v - before[k] for k, v in runner.cost(self.name).__dict__.items()}
        found.attrs = {
            **found.attrs,
            "method": type(self).__name__,
            "parameters": json.dumps(parameters_of(self), sort_keys=True),
            "paper": self.paper,
            "forward_passes": int(spent["forward"]),
            "backward_passes": int(spent["backward"]),
            "seconds": round(float(spent["seconds"]), 3),
            "network": network.name,
            "fingerprint": network.fingerprint(),
        }
        return found

    def _scores(self, network: LanguageModel, inputs: Inputs, target: Any, n: int) -> Asking[xr.Dataset]:
        anatomy = network.anatomy
        state = yield from _read(network, inputs, self.attention)
        tokens = _answers(network, target, state.logits)
        lens = _Lens(network, state)
        layer_scores = [lens.gain(state.mid[:, i], state.mlp[:, i], tokens) for i in range(anatomy.n_layers)]
        value_layer = torch.stack(layer_scores, 1)
        attention_layer = torch.stack(
            [lens.gain(state.pre[:, i], state.attn[:, i], tokens) for i in range(anatomy.n_layers)], 1
        )
        chosen = self._chosen(anatomy.n_layers, value_layer)
        value = torch.full_like(state.neurons, torch.nan)
        for i in chosen:
            directions = state.behind[i](network.weight("down", i).detach())
            value[:, i] = lens.gains(
                state.mid[:, i], state.neurons[:, i] / state.behind_scale[:, i, None], directions, tokens
            )
        k = min(self.top, len(chosen) * value.shape[2])
        best = value.flatten(1).nan_to_num(nan=-torch.inf).topk(k, dim=1)
        top_layer, top_unit = best.indices // value.shape[2], best.indices % value.shape[2]
        share, query, query_layer, skipped = _queries(network, state, top_layer, top_unit, best.values)
        ranked = value.flatten(1).nan_to_num(nan=-torch.inf).topk(min(self.count, len(chosen) * value.shape[2]), dim=1)
        counted = torch.nn.functional.one_hot(ranked.indices // value.shape[2], anatomy.n_layers).sum(1)
        data: dict[str, Any] = {
            "value": (("example", "layer", "unit"), value),
            "value_layer": (("example", "layer"), value_layer),
            "attention_layer": (("example", "layer"), attention_layer),
            "value_count": (("example", "layer"), counted),
            "query_layer": (("example", "component"), query_layer),
            "query": (("example", "layer", "unit"), query),
            "top_layer": (("example", "rank"), top_layer),
            "top_unit": (("example", "rank"), top_unit),
            "top_score": (("example", "rank"), best.values),
            "share": (("example", "rank", "component"), share),
        }
        if self.attention:
            found = [_channels(network, state, lens, i, tokens) for i in range(anatomy.n_layers)]
            data["attention_value"] = (("example", "layer", "source", "channel"), torch.stack(found, 1))
        coords = {"example": np.arange(n), "layer": np.arange(anatomy.n_layers), "component": components(anatomy.n_layers),
                  "answer": ("example", network.strings(tokens.tolist()) if network.tokenizer is not None
                             else [str(t) for t in tokens.tolist()])}  # fmt: skip
        return xr.Dataset(
            {key: (dims, t.cpu().numpy()) for key, (dims, t) in data.items()}, coords, {"skipped": int(skipped)}
        )

    def _chosen(self, n_layers: int, value_layer: Float[Tensor, "n layer"]) -> list[int]:
        """Layers whose neurons are scored."""
        if self.layers is None:
            return list(range(n_layers))
        if is_whole(self.layers):
            return sorted(value_layer.mean(0).topk(min(int(self.layers), n_layers)).indices.tolist())  # pyright: ignore
        return checked_layers(self.layers, n_layers)


def components(n_layers: int) -> list[str]:
    """Names of what the residual stream is a sum of."""
    return ["embed", *(f"{part}.{i}" for i in range(n_layers) for part in ("attn", "mlp"))]


def checked_layers(layers: Any, n_layers: int) -> list[int]:
    """Layers as a sorted list without repeats; InputError where one does not exist."""
    given = (
        list(layers) if isinstance(layers, (Sequence, np.ndarray, range)) and not isinstance(layers, str) else [layers]
    )
    if not given or not all(is_whole(i) and i in range(-n_layers, n_layers) for i in given):
        raise InputError(f"layers must be whole numbers from 0 to {n_layers - 1}, at least one; got {layers!r}")
    return sorted({int(i) % n_layers for i in given})


def top_layers(
    scores: xr.Dataset, query: int = 6, value: int = 3, margin: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The query layers and the value layers that many questions agree on.

    Parameters
    ----------
    scores : xarray.Dataset
        What `QueryValueAttribution.attribute` returned, for the more questions the better.
    query, value : int, default 6, 3
        How many of each (the paper's numbers for GPT-J).
    margin : int, default 0
        Layers at the end that are no value layers. What is written at the subject reaches the last position only
        through attention of layers behind, so an editor must leave some.

    Returns
    -------
    (tuple of int, tuple of int)
        Query layers: largest mean query score of the MLP output, among layers before the last value layer that are not
        value layers themselves. Value layers: those that hold most of the best value neurons. Both ascending.

    Raises
    ------
    InputError
        More layers asked for than there are.
    """
    at_least("query", query, 1)
    at_least("value", value, 1)
    at_least("margin", margin, 0)
    n_layers = scores.sizes["layer"]
    if query + value + margin > n_layers:
        raise InputError(
            f"{query} query and {value} value layers, and a margin of {margin}, were asked for; the model has "
            f"{n_layers} layers"
        )
    counts = scores["value_count"].mean("example").values
    # counts are whole numbers: equal ones are ordered by the score of the whole MLP
    order = np.lexsort((scores["value_layer"].mean("example").values, counts))[::-1]
    values = sorted([int(i) for i in order if i < n_layers - margin][:value])
    mlp = scores["query_layer"].sel(component=[f"mlp.{i}" for i in range(n_layers)]).mean("example").values
    free = [i for i in range(max(values)) if i not in values]
    queries = sorted(sorted(free, key=lambda i: -mlp[i])[:query])
    if not queries:
        raise InputError(f"the value layers {values} leave no layer before them for queries")
    return tuple(queries), tuple(values)


def plot_query_value(scores: xr.Dataset, path: str | Path | None = None) -> Figure:
    """Value and query scores by layer, means over examples.

    Parameters
    ----------
    scores : xarray.Dataset
        What `QueryValueAttribution.attribute` returned.
    path : path, optional
        Where to save the picture.
    """
    mean = scores.mean("example")
    layers = mean["layer"].values
    parts = {p: mean["query_layer"].sel(component=[f"{p}.{i}" for i in layers]).values for p in ("mlp", "attn")}
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    pairs = (
        (above, mean["value_layer"].values, mean["attention_layer"].values, "value score (nats)"),
        (below, parts["mlp"], parts["attn"], "query score (nats)"),
    )
    for ax, mlp, attention, label in pairs:
        ax.axhline(0, color="#777777", linewidth=0.8)
        ax.bar(layers - 0.2, mlp, 0.4, color="#0072B2", label="MLP")  # Okabe & Ito (2008)
        ax.bar(layers + 0.2, attention, 0.4, color="#E69F00", label="attention")
        ax.set_ylabel(label)
    above.legend(frameon=False)
    below.set_xlabel("layer")
    if path is not None:
        figure.savefig(as_path("path", path), dpi=110)
    return figure


# ---------------------------------------------------------------- what is read


@dataclass(eq=False)
class _Slope:
    """A normalisation with its scale taken out: x -> g * (x - mean of x, if centred), and its bias."""

    g: Tensor
    centred: bool
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The linear part applied to a vector (d,) or to columns (d, k)."""
        x = x - x.mean(0) if self.centred else x
        return self.g.reshape(-1, *[1] * (x.ndim - 1)) * x

    def back(self, q: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """The transposed linear part applied to rows."""
        q = q * self.g
        return q - q.mean(-1, keepdim=True) if self.centred else q

    def scale(self, x: Float[Tensor, "n d"], out: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """The scale s with which out = (linear part of x) / s + bias."""
        linear = self(x.T).T
        along = (linear * (out - self.bias)).sum(1)
        # where nothing comes in, the scale does not matter
        return torch.where(along == 0, 1.0, linear.square().sum(1) / torch.where(along == 0, 1.0, along))

    @classmethod
    def of(cls, out: Float[Tensor, "3 d"], probe: Float[Tensor, "3 d"]) -> _Slope:
        """From what a norm makes of p, -p and a constant vector."""
        bias = (out[0] + out[1]) / 2
        centred = bool((out[2] - bias).abs().max() <= 1e-4 * (out[0] - bias).abs().max())
        x = probe[0] - probe[0].mean() if centred else probe[0]
        return cls((out[0] - bias) / x, centred, bias)


@dataclass(eq=False)
class _State:
    """Activations at the last position (n, n_layers, …), and the norms of the network."""

    pre: Tensor
    mid: Tensor
    attn: Tensor
    mlp: Tensor
    mlp_in: Tensor
    normed: Tensor
    neurons: Tensor
    up: Tensor
    gate: Tensor | None
    act: Tensor | None
    final: Tensor
    normed_final: Tensor
    logits: Tensor
    behind_scale: Tensor
    norm: list[_Slope]
    behind: list[_Slope]
    final_norm: _Slope
    pattern: list[Tensor]
    v: list[Tensor]


def _read(network: LanguageModel, inputs: Inputs, attention: bool) -> Asking[_State]:
    """Everything that is needed of the prompts, and of the norms, which are probed with three vectors."""
    a = network.anatomy
    layers = range(a.n_layers)
    roles = ["resid_pre", "attn_out", "mlp_out", "resid_post", "mlp_in", "neurons", "up", *(["gate", "act"] * a.gated)]
    sites = {role: a.sites(role) for role in roles}
    sites["normed"] = [f"{s}:in" for s in sites["up"]]
    sites["down"] = [s.removesuffix(":in") for s in sites["neurons"]]
    if attention:
        sites |= {"pattern": a.sites("pattern"), "v": a.sites("v")}
    # a model without a final norm unembeds the last block's output as it is
    has_norm = "final_norm" not in a.missing
    final = a.site("final") if has_norm else sites["resid_post"][-1]
    normed_final = a.site("final_norm") if has_norm else final
    unembed = a.site("unembed")  # before a soft cap, if there is one
    read = list(dict.fromkeys([*(s for found in sites.values() for s in found), final, normed_final, unembed]))
    held: dict[str, list[Tensor]] = {s: [] for s in read}
    for start in range(0, n_rows(inputs), _ROWS):
        answer = yield Pass(rows_of(inputs, slice(start, start + _ROWS)), read=read, output=False)
        for s in read:
            whole = s in sites.get("pattern", ()) or s in sites.get("v", ())
            t = answer.reads[s]
            held[s].append(t if whole or t.ndim == 2 else t[:, -1])
    last = {s: torch.cat(t) for s, t in held.items()}
    stacked = {
        role: torch.stack([last[s] for s in found], 1) for role, found in sites.items() if role not in ("pattern", "v")
    }

    d = stacked["resid_pre"].shape[-1]
    probe = torch.ones(3, d, dtype=stacked["resid_pre"].dtype, device=network.device)
    probe[:, ::2] *= -1
    probe[1] *= -1
    probe[2] = 1
    probe *= 100  # far above the epsilon of any norm
    row = {k: v[:1, -1:].expand(3, 2) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    if "position_ids" in row:
        row["position_ids"] = torch.arange(2, device=network.device).expand(3, -1)
    own = [s for i in layers if (s := sites["down"][i]) != sites["mlp_out"][i]]
    edits = [Set(s, probe[:, None]) for s in (*sites["mlp_in"], *own, *([final] if has_norm else []))]
    wanted = [*sites["normed"], *sites["mlp_out"], *([normed_final] if has_norm else [])]
    answer = yield Pass(row, edits, read=wanted)
    ones = _Slope(torch.ones_like(probe[0]), False, torch.zeros_like(probe[0]))

    def slope(site: str) -> _Slope:
        return _Slope.of(answer.reads[site][:, -1], probe)

    behind = [slope(sites["mlp_out"][i]) if sites["down"][i] in own else ones for i in layers]
    return _State(
        stacked["resid_pre"],
        stacked["resid_post"] - stacked["mlp_out"],
        stacked["attn_out"],
        stacked["mlp_out"],
        stacked["mlp_in"],
        stacked["normed"],
        stacked["neurons"],
        stacked["up"],
        stacked.get("gate"),
        stacked.get("act"),
        last[final],
        last[normed_final],
        last[unembed],
        torch.stack([behind[i].scale(stacked["down"][:, i], stacked["mlp_out"][:, i]) for i in layers], 1),
        [slope(s) for s in sites["normed"]],
        behind,
        slope(normed_final) if has_norm else ones,
        [last[s] for s in sites.get("pattern", ())],
        [last[s] for s in sites.get("v", ())],
    )


def _answers(network: LanguageModel, target: Any, logits: Float[Tensor, "n v"]) -> Int[Tensor, " n"]:
    """Ids of the answers."""
    n, size = logits.shape
    if target is None:
        return logits.argmax(1)
    many = [target] if isinstance(target, str) or is_whole(target) else list(target)
    ids = [network.token(t) if isinstance(t, str) else int(t) for t in many]
    if len(ids) not in (1, n):
        raise InputError(f"{len(ids)} answers were given for {n} prompts; give one, or one each")
    if not all(0 <= i < size for i in ids):
        raise InputError(f"answers must be token ids from 0 to {size - 1}; got {ids}")
    return torch.tensor(ids * (n if len(ids) == 1 else 1), device=logits.device)


# ---------------------------------------------------------------- values


class _Lens:
    """Logits of a residual stream x: those at the end plus U A (x - x_final) / s, the scale s of the norm held fixed."""

    def __init__(self, network: LanguageModel, state: _State) -> None:
        self.unembedding = network.weight("unembed").detach()
        self.slope = state.final_norm
        self.state = state
        self.scale = self.slope.scale(state.final, state.normed_final)

    def logits(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        change = self.slope((x - self.state.final).T) / self.scale
        return self.state.logits + (self.unembedding @ change).T

    def gain(
        self, base: Float[Tensor, "n d"], added: Float[Tensor, "n d"], tokens: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Growth of log p(answer): log p(answer | base + added) - log p(answer | base)."""
        at = tokens[:, None]
        with_it, without = (self.logits(x).log_softmax(1).gather(1, at)[:, 0] for x in (base + added, base))
        return with_it - without

    def gains(
        self,
        base: Float[Tensor, "n d"],
        sizes: Float[Tensor, "n k"],
        directions: Float[Tensor, "d k"],
        tokens: Int[Tensor, " n"],
    ) -> Float[Tensor, "n k"]:
        """The same for each of k directions by itself, added with the sizes of each example."""
        columns = self.slope(directions)
        return log_gains(self.logits(base), self.unembedding, columns, sizes / self.scale[:, None], tokens)


def log_gains(
    logits: Float[Tensor, "n v"],
    unembedding: Float[Tensor, "v d"],
    directions: Float[Tensor, "d k"],
    sizes: Float[Tensor, "n k"],
    tokens: Int[Tensor, " n"],
) -> Float[Tensor, "n k"]:
    """Gain at a token, log softmax(logits + size U direction) - log softmax(logits), of each of k directions by itself.

    Parameters
    ----------
    logits : Tensor (n, v)
    unembedding : Tensor (v, d)
    directions : Tensor (d, k)
    sizes : Tensor (n, k)
        Factor of each direction in each example.
    tokens : Tensor (n,), long
    """
    p = logits.softmax(1)
    found = unembedding[tokens] @ directions * sizes
    # log sum p exp(x) = log1p(sum p expm1(x)): small changes keep their precision
    total = torch.zeros_like(sizes)
    longest = torch.zeros((), dtype=p.dtype, device=p.device)
    for start in range(0, len(unembedding), _TOKENS):
        rows = unembedding[start : start + _TOKENS]
        longest = torch.maximum(longest, rows.norm(dim=1).max())
        changes = rows @ directions
        for i in range(len(sizes)):
            total[i] += p[i, start : start + _TOKENS] @ torch.expm1(changes * sizes[i])
    found = found - total.log1p()
    large = sizes.abs() * directions.norm(dim=0) * longest > _LARGE
    for i, k in large.nonzero().tolist():  # exp may overflow: summed with care, in float64
        before = logits[i].double()
        after = before + (unembedding @ directions[:, k]).double() * sizes[i, k].double()
        found[i, k] = (after.log_softmax(0) - before.log_softmax(0))[tokens[i]].to(found.dtype)
    return found


def _channels(
    network: LanguageModel, state: _State, lens: _Lens, layer: int, tokens: Int[Tensor, " n"]
) -> Float[Tensor, "n source unit"]:
    """Value scores of attention's channels: pattern times value through the output projection, one a source."""
    a = network.anatomy
    v = state.v[layer].unflatten(-1, (a.n_kv_heads, a.d_head)).repeat_interleave(a.n_heads // a.n_kv_heads, 2)
    weights = state.pattern[layer][:, :, -1]  # (n, head, source)
    parts = (weights.transpose(1, 2)[..., None] * v).flatten(2)
    directions = network.weight("o", layer).detach()
    n, sources, units = parts.shape
    found = [lens.gains(state.pre[:, layer], parts[:, t], directions, tokens) for t in range(sources)]
    return torch.stack(found, 1).reshape(n, sources, units)


# ---------------------------------------------------------------- queries


def keys(network: LanguageModel, state: _State, layer: int, example: Tensor, unit: Tensor) -> Float[Tensor, "k d"]:
    """Exact keys of neurons of a layer in the space of its normalised input: key · input is the neuron's value."""

    def ratio(above: Tensor, below: Tensor) -> Tensor:
        zero = below.abs() < 1e-6
        return torch.where(zero, 0.0, above / torch.where(zero, 1.0, below))

    at = (example, layer, unit)
    rows = network.weight("up", layer).detach()[unit]
    if state.gate is None or state.act is None:
        return ratio(state.neurons[at], state.up[at])[:, None] * rows
    gates = network.weight("gate", layer).detach()[unit]
    slope = ratio(state.act[at], state.gate[at]) * state.up[at]
    return (slope[:, None] * gates + state.act[at][:, None] * rows) / 2


def _queries(
    network: LanguageModel, state: _State, top_layer: Tensor, top_unit: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Shares of each top neuron's key, and query scores of neurons and components."""
    a = network.anatomy
    n, rank = top_layer.shape
    # (n, component, d): embedding, then attention and MLP of each layer
    parts = torch.cat([state.pre[:, :1], torch.stack([state.attn, state.mlp], 2).flatten(1, 2)], 1)
    share = torch.zeros(n, rank, parts.shape[1], dtype=parts.dtype, device=parts.device)
    query = torch.zeros_like(state.neurons)
    size = torch.zeros(n, rank, dtype=parts.dtype, device=parts.device)
    back = torch.zeros(n, rank, parts.shape[-1], dtype=parts.dtype, device=parts.device)
    for layer in top_layer.unique().tolist():
        example, place = (top_layer == layer).nonzero(as_tuple=True)
        back[example, place] = state.norm[layer].back(keys(network, state, layer, example, top_unit[example, place]))
    products = torch.einsum("nrd,ncd->nrc", back, parts)
    index = torch.arange(parts.shape[1], device=parts.device)
    # components before the MLP of layer L: the embedding, 2 L outputs, and attention of L unless it runs in parallel
    seen = index < (2 * top_layer + (1 if a.parallel else 2))[..., None]
    products = products * seen
    size = products.sum(2)
    usable = size.abs() > 1e-3 * products.abs().sum(2)
    share = torch.where(usable[..., None], products / torch.where(usable, size, 1.0)[..., None], 0.0)
    weight = torch.where(usable, scores, 0.0)
    query_layer = torch.einsum("nr,nrc->nc", weight, share)
    each = torch.where(usable, weight / torch.where(usable, size, 1.0), 0.0)
    for layer in range(int(top_layer.max())):
        pulled = torch.einsum("nr,nrd->nd", each * (top_layer > layer), back)
        written = state.behind[layer](network.weight("down", layer).detach())
        query[:, layer] = pulled @ written * state.neurons[:, layer] / state.behind_scale[:, layer, None]
    return share, query, query_layer, int((~usable).sum())
