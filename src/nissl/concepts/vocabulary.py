"""Neurons of a language model read through its own vocabulary: what each one looks for, and which ones look for a word."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from nissl.arguments import as_path, at_least
from nissl.errors import InputError, MissingExtraError
from nissl.network import Anatomy, LanguageModel, Pass, Set, Target
from nissl.network.anatomy import anatomy_of
from nissl.network.edit import Edit
from nissl.runner import Asking, Runner

_WAYS = ("cosine", "z", "probability", "logit")


class WeightFolder:
    """Weights of a language model on disk, read slice by slice; no more of them is held than is asked for.

    Parameters
    ----------
    folder : path
        As transformers writes it: ``config.json`` and safetensors, in one file or several.

    Attributes
    ----------
    anatomy : Anatomy
    tokenizer
        None where the folder holds none.

    Raises
    ------
    InputError
        The folder cannot be read.
    MissingExtraError
        transformers is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise MissingExtraError("language models need transformers: pip install 'nissl[language]'") from error
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        try:
            config = transformers.AutoConfig.from_pretrained(self.folder, local_files_only=True)
            with torch.device("meta"):
                self._module: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
            index = self.folder / "model.safetensors.index.json"
            names = (
                json.loads(index.read_text())["weight_map"]
                if index.is_file()
                else dict.fromkeys(self._module.state_dict(), "model.safetensors")
            )
            self._files = {f: safe_open(self.folder / f, "pt") for f in sorted(set(names.values()))}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise InputError(f"{self.folder} cannot be read as a folder of weights: {error}") from error
        self._where = {name: f for f, held in self._files.items() for name in held.keys()}  # noqa: SIM118
        self.anatomy: Anatomy = anatomy_of(self._module)
        self.tokenizer: Any = None
        if any(self.folder.glob("tokenizer*")):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    def matrix(self, role: str, layer: int | None = None) -> Matrix:
        """A weight matrix, to be sliced."""
        name, turned = self.anatomy.matrix(role, layer)
        if name not in self._where and role == "unembed":  # tied to the embedding, and kept once
            name, turned = self.anatomy.matrix("embed")
        if name not in self._where:
            raise InputError(f"{self.folder} holds no weight {name!r}")
        kept = self._files[self._where[name]].get_slice(name)
        if kept.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise InputError(f"{name} is quantised ({kept.get_dtype()}); weights in floating point are needed")
        shape = tuple(kept.get_shape())
        return Matrix(lambda rows: kept[:, rows].T if turned else kept[rows], shape[::-1] if turned else shape)

    def norm(self, site: str) -> nn.Module:
        """The norm module at a site, with its weights."""
        name = site.partition(":")[0]
        module = self._module.get_submodule(name).to_empty(device="cpu")
        module.load_state_dict(
            {k: self._files[self._where[f"{name}.{k}"]].get_tensor(f"{name}.{k}") for k in module.state_dict()}
        )
        return module.float()


@dataclass(frozen=True)
class Matrix:
    """Rows of a weight matrix (d_out, d_in), read when they are asked for."""

    read: Callable[[slice], Tensor]
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Float[Tensor, "rows d"]:
        """Rows in float32."""
        return self.read(rows).float()

    def rows(self, index: Tensor) -> Float[Tensor, "rows d"]:
        """Chosen rows, each read by itself."""
        return torch.cat([self[slice(int(i), int(i) + 1)] for i in index.reshape(-1)])


def _matrix(network: Any, role: str, layer: int | None = None) -> Matrix:
    if isinstance(network, WeightFolder):
        return network.matrix(role, layer)
    if not isinstance(network, LanguageModel):
        raise InputError(f"a LanguageModel or a WeightFolder is needed, got {type(network).__name__}")
    weight = network.weight(role, layer)
    return Matrix(lambda rows: weight[rows], tuple(weight.shape))


def _gains(network: Any, site: str, width: int) -> tuple[Float[Tensor, " d"], bool]:
    """Gains of the norm at a site, in any of its forms, and whether it takes the mean away."""
    if isinstance(network, WeightFolder):
        norm = network.norm(site)
        weight = norm
    else:
        name = site.partition(":")[0]
        norm = network.get_module(name)
        assert norm is not None
        own = {k.removeprefix(f"{name}."): v for k, v in network.weights().items() if k.startswith(f"{name}.")}
        weight = lambda x: torch.func.functional_call(norm, own, (x.to(next(iter(own.values()), x)),))  # noqa: E731
    # mean 0 and root mean square 1 pass every norm as they are, but for gains and biases: so the form need not be known
    probe = torch.ones(1, width)
    probe[:, 1::2] = -1
    with torch.no_grad():
        gains = (weight(probe).float() - weight(-probe).float())[0] / 2 * probe[0]
        centred = bool(torch.allclose(weight(probe + 1).float(), weight(probe).float(), atol=1e-4))
    return gains.cpu(), centred


@dataclass(frozen=True)
class NeuronVocabulary:
    """Decodes MLP neurons to tokens, from the weights alone.

    A neuron's row of the up projection lies in the residual stream; multiplied by the unembedding it gives a logit for
    every token, as a final hidden state would. Blocks of the vocabulary are streamed past each layer, so that memory holds
    one layer and one block.

    Parameters
    ----------
    matrix : {"up", "gate", "down"}, default "up"
        Which vector of a neuron is read: what it looks for (up, gate) or what it writes (down).
    fold : {"none", "input", "final"}, default "none"
        The raw row; the row times the gains of the norm before the MLP, which is what it reads in the residual stream; or
        the row taken through the final norm.
    block : int, default 2048
        Tokens in a block of the vocabulary.

    Notes
    -----
    In a gated MLP the sign of an up row is arbitrary: -up with -down is the same network. `decode` therefore gives tokens
    from both ends, and `search` the sign.

    References
    ----------
    Decoding specialised feature neurons in LLMs with the final projection layer (2025). Its abstract names the rows of the up
    projection; ranking by z is ours, since long rows win otherwise.
    """

    matrix: Literal["up", "gate", "down"] = "up"
    fold: Literal["none", "input", "final"] = "none"
    block: int = 2048
    _FOLDS: ClassVar[tuple[str, ...]] = ("none", "input", "final")

    def __post_init__(self) -> None:
        if self.matrix not in ("up", "gate", "down"):
            raise InputError(f"matrix={self.matrix!r}: choose 'up', 'gate' or 'down'")
        if self.fold not in self._FOLDS:
            raise InputError(f"fold={self.fold!r}: choose one of {', '.join(self._FOLDS)}")
        at_least("block", self.block, 1)

    # ---------------------------------------------------------------- neurons to tokens

    def decode(
        self,
        network: LanguageModel | WeightFolder,
        layers: Sequence[int] | None = None,
        k: int = 10,
        *,
        units: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> xr.Dataset:
        """Tokens of every neuron.

        Parameters
        ----------
        network : LanguageModel or WeightFolder
        layers : sequence of int, optional
            All by default.
        k : int, default 10
            Tokens kept of each neuron, from either end.
        units : sequence of int, optional
            Neurons of each layer; all by default.
        device : optional
            Where to compute; by default where the model is.
        progress : bool, default True

        Returns
        -------
        xarray.Dataset
            ``token``, ``logit``, ``probability``, ``cosine``, ``z`` (logit in standard deviations over the vocabulary) by
            (layer, unit, rank); ``opposite``, the tokens of the other sign; ``entropy`` of the distribution, in nats, by
            (layer, unit).

        Raises
        ------
        SiteError
            The family keeps no such matrix of its own (fused projections).
        InputError
            Wrong layers, units or k; quantised weights.
        """
        layers = self._layers(network, layers)
        head = _matrix(network, "unembed")
        at_least("k", k, 1)
        if k > head.shape[0]:
            raise InputError(f"k={k}, but the vocabulary has {head.shape[0]} tokens")
        found: list[dict[str, np.ndarray]] = []
        for layer in track(layers, "decoding neurons", disable=not progress, transient=True):
            rows = self.vectors(network, layer, units).to(_device(network, device))
            found.append(_stream(rows, head, k, self.block))
        values = {name: np.stack([f[name] for f in found]) for name in found[0]}
        chosen = np.arange(values["entropy"].shape[1]) if units is None else np.asarray(units)
        dims = {name: ("layer", "unit", "rank")[: v.ndim] for name, v in values.items()}
        return xr.Dataset(
            {name: (dims[name], v) for name, v in values.items()},
            coords={"layer": list(layers), "unit": chosen, "rank": np.arange(k)},
            attrs={"matrix": self.matrix, "fold": self.fold, "method": "NeuronVocabulary"},
        )

    def vectors(
        self, network: LanguageModel | WeightFolder, layer: int, units: Sequence[int] | None = None
    ) -> Float[Tensor, "unit d"]:
        """The vector of each neuron of a layer in the residual stream, float32."""
        if self.matrix == "down":  # columns: what the neuron writes
            whole = _matrix(network, "down", layer)
            rows = whole[slice(0, whole.shape[0])].T
        else:
            kept = _matrix(network, self.matrix, layer)
            rows = kept[slice(0, kept.shape[0])]
        if units is not None:
            index = torch.as_tensor(np.asarray(units), dtype=torch.long)
            if index.ndim != 1 or not len(index) or int(index.min()) < 0 or int(index.max()) >= len(rows):
                raise InputError(f"units must be numbers from 0 to {len(rows) - 1}, got {units!r:.80}")
            rows = rows[index.to(rows.device)]
        if self.fold == "none":
            return rows
        site = network.anatomy.site("mlp_in", layer) if self.fold == "input" else network.anatomy.site("final")
        gains, centred = _gains(network, site, rows.shape[1])
        gains = gains.to(rows.device)
        if self.fold == "input":
            rows = rows * gains
            return rows - rows.mean(1, keepdim=True) if centred else rows
        rows = rows - rows.mean(1, keepdim=True) if centred else rows
        return rows / rows.square().mean(1, keepdim=True).sqrt() * gains

    @staticmethod
    def _layers(network: Any, layers: Sequence[int] | None) -> list[int]:
        n = network.anatomy.n_layers
        if layers is None:
            return list(range(n))
        wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not -n <= i < n]
        if wrong or not len(layers):
            raise InputError(f"layers must be numbers from 0 to {n - 1}, got {list(layers)!r:.80}")
        return [i % n for i in layers]

    # ---------------------------------------------------------------- tokens to neurons

    def search(
        self,
        network: LanguageModel | WeightFolder,
        concept: str | Sequence[int],
        *,
        by: str = "z",
        n: int = 20,
        layers: Sequence[int] | None = None,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Neurons that look for a word.

        Parameters
        ----------
        network : LanguageModel or WeightFolder
        concept : str or sequence of int
            A word, of which `concept_tokens` makes tokens; or tokens.
        by : {"z", "cosine", "probability", "logit"}, default "z"
            Ranked by. z (the logit of the concept's best token, in standard deviations over the vocabulary) and cosine do
            not prefer long rows; cosine is drawn to neurons along the mean of all tokens, which fit every word a little.
            Probability is summed over the concept's tokens.
        n : int, default 20
        layers : sequence of int, optional
        progress : bool, default True

        Returns
        -------
        pandas.DataFrame
            Best first: ``layer``, ``unit``, ``score``, ``sign`` (-1 where the neuron's opposite looks for the word; only
            with cosine and z), ``token`` of the concept that fits best, ``write_logit`` (what one unit of the neuron adds
            to that token's logit directly, final norm aside).
        """
        if by not in _WAYS:
            raise InputError(f"by={by!r}: choose one of {', '.join(_WAYS)}")
        at_least("n", n, 1)
        tokens = torch.tensor(concept_tokens(network, concept) if isinstance(concept, str) else list(concept))
        head = _matrix(network, "unembed")
        if not len(tokens) or int(tokens.min()) < 0 or int(tokens.max()) >= head.shape[0]:
            raise InputError(f"tokens must be numbers from 0 to {head.shape[0] - 1}, got {concept!r:.80}")
        columns = head.rows(tokens)
        moments = _moments(head, self.block) if by == "z" else None
        rows: list[pd.DataFrame] = []
        for layer in track(self._layers(network, layers), "searching neurons", disable=not progress, transient=True):
            vectors = self.vectors(network, layer).to(columns.device)
            logits = vectors @ columns.T
            if by == "cosine":
                scores = logits / (vectors.norm(dim=1, keepdim=True) * columns.norm(dim=1)).clamp(min=1e-30)
            elif by == "z":
                assert moments is not None
                mean, covariance = moments
                spread = ((vectors @ covariance) * vectors).sum(1, keepdim=True).clamp(min=1e-30).sqrt()
                scores = (logits - (vectors @ mean)[:, None]) / spread
            elif by == "probability":
                scores = (logits.double() - _log_normaliser(vectors, head, self.block)[:, None]).exp()
            else:
                scores = logits
            signed = by in ("cosine", "z")
            size, best = (scores.abs() if signed else scores).max(1)
            total = scores.sum(1) if by == "probability" else size
            top = total.topk(min(n, len(total)))
            at = best[top.indices]
            sign = scores[top.indices, at].sign().long() if signed else torch.ones_like(at)
            written = (_written(network, layer, top.indices) * columns[at]).sum(1)
            rows.append(
                pd.DataFrame(
                    {
                        "layer": layer, "unit": top.indices.tolist(), "score": top.values.double().tolist(),
                        "sign": sign.tolist(), "token": tokens[at].tolist(), "write_logit": written.tolist(),
                    }
                )
            )  # fmt: skip
        table = pd.concat(rows).sort_values("score", ascending=False, kind="stable").head(n).reset_index(drop=True)
        if network.tokenizer is not None:
            table.insert(5, "text", [network.tokenizer.decode([t]) for t in table["token"]])
        return table


def _written(network: Any, layer: int, units: Tensor) -> Float[Tensor, "unit d"]:
    whole = _matrix(network, "down", layer)
    return whole[slice(0, whole.shape[0])].T[units]


def _device(network: Any, device: Any) -> torch.device:
    return torch.device(device) if device is not None else getattr(network, "device", torch.device("cpu"))


def _blocks(head: Matrix, size: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, head.shape[0], size):
        yield start, head[slice(start, min(start + size, head.shape[0]))].to(device)


def _stream(rows: Float[Tensor, "unit d"], head: Matrix, k: int, size: int) -> dict[str, np.ndarray]:
    """Top tokens from both ends, moments and entropy of every row's logits, the vocabulary block by block."""
    n, device = len(rows), rows.device
    best = [torch.full((n, 0), 0.0, device=device) for _ in range(2)]
    ids = [torch.zeros((n, 0), dtype=torch.long, device=device) for _ in range(2)]
    lengths = torch.zeros(head.shape[0], device=device)
    highest = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    # sums of exp(z - highest), of that times z, of z and of z squared
    mass, weighted, first, second = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(4))
    for start, block in _blocks(head, size, device):
        lengths[start : start + len(block)] = block.norm(dim=1)
        z = rows @ block.T
        for side, signed in enumerate((z, -z)):
            top = signed.topk(min(k, z.shape[1]), dim=1)
            values = torch.cat([best[side], top.values], 1)
            tokens = torch.cat([ids[side], top.indices + start], 1)
            kept = values.topk(min(k, values.shape[1]), dim=1)
            best[side], ids[side] = kept.values, tokens.gather(1, kept.indices)
        peak = torch.maximum(highest, z.amax(1).double())
        e = (z - peak.float()[:, None]).exp_()
        shrink = (highest - peak).exp()
        mass = mass * shrink + e.sum(1, dtype=torch.float64)
        weighted = weighted * shrink + (e * z).sum(1, dtype=torch.float64)
        highest = peak
        first += z.sum(1, dtype=torch.float64)
        second += z.square().sum(1, dtype=torch.float64)
    v = head.shape[0]
    log_mass, mean = highest + mass.log(), first / v
    spread = (second / v - mean.square()).clamp(min=1e-30).sqrt()
    logits, tokens = best[0], ids[0]
    cosine = logits / (rows.norm(dim=1, keepdim=True) * lengths[tokens]).clamp(min=1e-30)
    found = {
        "token": tokens, "logit": logits, "probability": (logits.double() - log_mass[:, None]).exp(), "cosine": cosine,
        "z": (logits.double() - mean[:, None]) / spread[:, None], "opposite": ids[1],
        "entropy": log_mass - weighted / mass,
    }  # fmt: skip
    return {name: t.cpu().numpy() for name, t in found.items()}


def _log_normaliser(rows: Float[Tensor, "unit d"], head: Matrix, size: int) -> Float[Tensor, " unit"]:
    parts = [(rows @ block.T).double().logsumexp(1) for _, block in _blocks(head, size, rows.device)]
    return torch.stack(parts).logsumexp(0)


def _moments(head: Matrix, size: int) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Mean and covariance of the unembedding's rows: of every neuron's logits without computing them."""
    d = head.shape[1]
    total, products = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for _, block in _blocks(head, size, torch.device("cpu")):
        total += block.sum(0, dtype=torch.float64)
        products += (block.T @ block).double()
    mean = total / head.shape[0]
    return mean.float(), (products / head.shape[0] - torch.outer(mean, mean)).float()


def concept_tokens(network: Any, word: str, synonyms: Sequence[str] = ()) -> list[int]:
    """Tokens that are a word: in any case, with or without a space before it, its plural, or a synonym.

    Raises
    ------
    InputError
        No token of the vocabulary is this word; or there is no tokenizer.
    """
    if network.tokenizer is None:
        raise InputError("words need a tokenizer; give token ids instead")
    words = {w.strip().lower() for w in (word, *synonyms)} - {""}
    words |= {w + s for w in words for s in ("s", "es")}
    texts = network.tokenizer.batch_decode([[i] for i in range(len(network.tokenizer))])
    found = [i for i, text in enumerate(texts) if text.strip().lower() in words]
    if not found:
        raise InputError(f"no token of the vocabulary is {word!r}; give a shorter word, a synonym, or token ids")
    return found


# ---------------------------------------------------------------- clamping


def clamp(
    network: LanguageModel,
    layer: int,
    unit: int,
    value: float,
    *,
    site: Literal["up", "act"] = "up",
    positions: Any = None,
) -> Edit:
    """Hold a neuron at a value, in a Pass or in every step of a Rollout.

    Parameters
    ----------
    network : LanguageModel
    layer, unit : int
    value : float
    site : {"up", "act"}, default "up"
        ``up``: what the up projection gives; its gate still acts. ``act``: what the down projection takes, gate or not.
    positions : optional
        All by default, in prompts and at new tokens.
    """
    address = network.anatomy.site(_site(site), layer)
    at_least("unit", unit, 0)
    if unit >= network.anatomy.d_mlp:
        raise InputError(f"layer {layer} has neurons 0 to {network.anatomy.d_mlp - 1}, not {unit}")
    if not math.isfinite(value):
        raise InputError(f"a neuron is held at a finite value, got {value}")
    return Set(address, float(value), units=[unit], positions=positions)


def _site(site: str) -> str:
    if site not in ("up", "act"):
        raise InputError(f"site={site!r}: choose 'up' (before the gate acts) or 'act' (what the down projection takes)")
    return "up" if site == "up" else "neurons"


def _mass(output: Tensor, tokens: Tensor) -> Tensor:
    """Log of the probability that the next token is one of some."""
    return output[:, -1].log_softmax(-1).gather(1, tokens).logsumexp(1)


def clamp_curve(
    network: LanguageModel,
    prompts: Sequence[str],
    tokens: Sequence[int],
    neurons: Sequence[tuple[int, int]],
    *,
    factors: Sequence[float] = (-20, -10, -5, -2, -1, 1, 2, 5, 10, 20),
    site: Literal["up", "act"] = "up",
    reference: Sequence[str] | None = None,
    runner: Runner | None = None,
) -> pd.DataFrame:
    """Log probability of a concept while neurons are held at values, each by itself.

    Parameters
    ----------
    network : LanguageModel
    prompts : sequence of str
        Whose next token may be the concept.
    tokens : sequence of int
        The concept; see `concept_tokens`.
    neurons : sequence of (layer, unit)
    factors : sequence of float
        Values, in standard deviations of the neuron over the tokens of `reference`.
    site : {"up", "act"}
        See `clamp`.
    reference : sequence of str, optional
        Texts over which a neuron's spread is taken; by default the prompts.
    runner : Runner, optional

    Returns
    -------
    pandas.DataFrame
        ``layer``, ``unit``, ``factor``, ``value``, ``prompt`` (number), ``log_probability`` and ``gain`` over no clamp.
    """
    if not len(neurons) or not len(prompts) or not len(factors):
        raise InputError("clamp_curve needs at least one prompt, one neuron and one value")
    for layer, unit in neurons:
        clamp(network, layer, unit, 0.0, site=site)
    d, role = network.anatomy.d_mlp, _site(site)
    of = Target(_mass, (torch.tensor([list(tokens)]),), name="concept")
    by_layer: dict[int, list[int]] = {}
    for layer, unit in neurons:
        by_layer.setdefault(layer, []).append(unit)

    def spread(text: str) -> Asking[dict[int, Tensor]]:
        places = {layer: network.anatomy.site(role, layer) for layer in by_layer}
        answer = yield Pass(network.encode(text), read=list(places.values()), output=False)
        return {layer: answer.reads[s][0][:, by_layer[layer]] for layer, s in places.items()}

    def effect(i: int, scales: dict[int, Tensor]) -> Asking[list[dict[str, Any]]]:
        inputs = network.encode(prompts[i])
        asked, rows = [Pass(inputs, of=of)], []
        for layer, units in by_layer.items():
            address = network.anatomy.site(role, layer)
            for unit, scale in zip(units, scales[layer].tolist(), strict=True):
                where = torch.zeros(1, 1, d, dtype=torch.bool)
                where[..., unit] = True
                for factor in factors:
                    value = factor * scale
                    # a value and a mask by row: clamps of all neurons of a layer are one batch
                    asked.append(Pass(inputs, Set(address, torch.full((1, 1, 1), value), where=where), of=of))
                    rows.append({"layer": layer, "unit": unit, "factor": factor, "value": value, "prompt": i})
        answers = yield asked
        base = float(answers[0].scalar)
        for row, a in zip(rows, answers[1:], strict=True):
            row["log_probability"] = float(a.scalar)
            row["gain"] = float(a.scalar) - base
        return rows

    runner = Runner() if runner is None else runner
    texts = list(prompts) if reference is None else list(reference)
    read: list[dict[int, Tensor]] = runner.collect(network, [partial(spread, t) for t in texts], "passes", "spread")
    scales = {layer: torch.cat([r[layer] for r in read]).float().std(0) for layer in by_layer}
    starts = [partial(effect, i, scales) for i in range(len(prompts))]
    return pd.DataFrame([row for rows in runner.collect(network, starts, "clamping neurons", "clamp") for row in rows])


def preserved(a: LanguageModel | WeightFolder, b: LanguageModel | WeightFolder, vocabulary: NeuronVocabulary | None = None,
              layers: Sequence[int] | None = None) -> pd.DataFrame:  # fmt: skip
    """How much of the map of neurons two networks share, such as a model and its fine-tuned copy.

    Each network is decoded through its own unembedding.

    Returns
    -------
    pandas.DataFrame
        By layer: ``top1``, the share of neurons with the same first token, and ``top5``, the mean overlap of the first
        five; the attribute ``attrs["top1"]`` is the share over all layers.

    Raises
    ------
    InputError
        The networks differ in shape: only copies of one model can be compared neuron by neuron.
    """
    vocabulary = NeuronVocabulary() if vocabulary is None else vocabulary
    for name in ("family", "n_layers", "d_model", "d_mlp"):
        if getattr(a.anatomy, name) != getattr(b.anatomy, name):
            raise InputError(
                f"the networks differ in {name} ({getattr(a.anatomy, name)} and {getattr(b.anatomy, name)}): "
                "only copies of one model can be compared neuron by neuron"
            )
    one, other = (vocabulary.decode(n, layers, k=5) for n in (a, b))
    first = (one["token"][..., 0] == other["token"][..., 0]).mean("unit")
    shared = (one["token"].values[..., :, None] == other["token"].values[..., None, :]).any(-1).mean((-2, -1))
    table = pd.DataFrame({"layer": one["layer"].values, "top1": first.values, "top5": shared})
    table.attrs["top1"] = float(first.mean())
    return table


def frequent_tokens(decoded: xr.Dataset, n: int = 10) -> pd.DataFrame:
    """Tokens that come first for the most neurons; a few that top very many were hardly trained."""
    tokens, counts = np.unique(decoded["token"].values[..., 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:n]
    return pd.DataFrame({"token": tokens[order], "neurons": counts[order]})


def plot_clamps(curve: pd.DataFrame, path: str | Path | None = None) -> Figure:
    """Gain of a concept by the value at which each neuron is held, mean over prompts.

    Parameters
    ----------
    curve : pandas.DataFrame
        What `clamp_curve` returned.
    path : str or path, optional
        Where the picture is written; PNG, SVG or PDF by its ending.

    Returns
    -------
    matplotlib.figure.Figure
    """
    means = curve.pivot_table("gain", ["layer", "unit", "factor"]).reset_index()
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colours, markers = (
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
        "osD^vP",
    )  # Okabe & Ito (2008)
    for i, ((layer, unit), rows) in enumerate(means.groupby(["layer", "unit"], sort=False)):  # pyright: ignore
        rows = rows.sort_values("factor")
        style = {"color": colours[i % 6], "marker": markers[i % 6], "ms": 4}
        axes.plot(rows["factor"], rows["gain"], label=f"layer {layer}, unit {unit}", **style)
    axes.axhline(0, color="#777777", lw=0.8)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("value held, in standard deviations")
    axes.set_ylabel("gain in log probability (nats)")
    axes.legend(fontsize=8, frameon=False)
    if path is not None:
        figure.savefig(as_path("path", path), dpi=90)
    return figure
