"""Steering: what is added to the activations of a language model so that it prefers one kind of answer to another."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import as_path, at_least, flag, instance, is_number, items
from nissl.errors import InputError, RunFolderError
from nissl.intervention.calibration import calibrate
from nissl.intervention.contrast import Activations, Contrast, read_contrast, sites_of, states_of, token_ids
from nissl.intervention.latent import Clusters, Probes, mixed
from nissl.network import Add, Apply, Edit, LanguageModel, Pass
from nissl.network.passes import Inputs
from nissl.runner import Asking, Runner

NEUTRAL: tuple[str, ...] = (
    "The weather in the mountains changes quickly, and",
    "My grandmother used to tell me that",
    "The museum opens at nine in the morning and",
    "After the meeting they walked back to",
    "In the middle of the town there is",
    "She opened the letter and read that",
    "The train from the north was late because",
    "I think that",
)
"""Prompts on which strength is measured where none are given: plain prose."""

Self = TypeVar("Self", bound="Steering")


# ---------------------------------------------------------------- edits


class SteeringEdits(NamedTuple):
    """Edits for ``Rollout(inputs, *edits)``, or, with `over`, for a Pass over prompt and answer.

    Attributes
    ----------
    edits : tuple of Edit
        For the pass over the prompts.
    then : tuple of Edit
        For each pass over a new token.
    """

    edits: tuple[Edit, ...] = ()
    then: tuple[Edit, ...] = ()

    def over(self, n_tokens: int) -> tuple[Edit, ...]:
        """Edits for a Pass over prompts that are followed by an answer of so many tokens: the same as in generation."""
        last = torch.arange(-n_tokens - 1, 0)
        return tuple(
            t if e.positions is None else replace(t, positions=last) for e, t in zip(self.edits, self.then, strict=True)
        )


class Steering(ABC):
    """Base of everything that steers a language model.

    Attributes
    ----------
    network : LanguageModel
        That it was fitted on; its weights are never changed.
    alpha : float or None
        Strength; None until it is calibrated.
    """

    role: str = "resid_post"

    def __init__(
        self, network: LanguageModel, alpha: float | None, kl: float, seed: int, runner: Runner | None
    ) -> None:
        instance("network", network, LanguageModel)
        if alpha is not None:
            _strength(alpha)
        if not (is_number(kl) and kl > 0):
            raise InputError(f"kl must be a positive number (nats), got {kl!r}")
        at_least("seed", seed, 0)
        self.network = network
        self.alpha = None if alpha is None else float(alpha)
        self.kl = float(kl)
        self.seed = seed
        self.runner = runner

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """Where the edits are made."""

    @abstractmethod
    def choose(self, inputs: Inputs) -> Asking[Any]:
        """What is decided about these prompts before they are steered; a generator of Passes."""

    @abstractmethod
    def edits_of(self, choice: Any, alpha: float | None = None) -> SteeringEdits:
        """Edits of a strength, after `choose`."""

    def edits(self, inputs: Inputs, alpha: float | None = None) -> SteeringEdits:
        """Edits for these prompts.

        Parameters
        ----------
        inputs : mapping
            As `LanguageModel.encode` gives them; padded on the left, if at all.
        alpha : float, optional
            Another strength than the object's own. At 0 nothing changes.

        Raises
        ------
        InputError
            Not fitted, not calibrated, or prompts padded on the right.
        """
        return self.edits_of(self._chosen(inputs), alpha)

    def _chosen(self, inputs: Inputs) -> Any:
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise InputError("steering begins at the last token of the prompts: pad them on the left (net.encode does)")
        asking = self.choose(inputs)
        answer: Any = None
        while True:
            try:
                question = asking.send(answer)
            except StopIteration as stop:
                return stop.value
            assert isinstance(question, Pass)
            answer = self.network.run(question)

    def calibrate(self: Self, prompts: Sequence[Any] = NEUTRAL, kl: float | None = None) -> Self:
        """Set `alpha` so that the next token after `prompts` changes by a given amount.

        Parameters
        ----------
        prompts : sequence
            Neutral ones; 8 sentences by default.
        kl : float, optional
            Mean Kullback-Leibler divergence of the steered from the unsteered distribution, in nats; by default the
            object's own, 0.1.

        Raises
        ------
        InputError
            No strength reaches it.
        """
        prompts = list(items("prompts", prompts))
        choice = self._chosen(self.network.encode(prompts))

        def edit_at(alpha: float) -> tuple[Edit, ...]:
            return self.edits_of(choice, alpha).edits

        self.alpha = float(calibrate(self.network, prompts, edit_at, kl=self.kl if kl is None else kl))
        return self

    def _ready(self: Self) -> Self:
        """Calibrate after fitting, where no strength was given and the network can read the neutral prompts."""
        if self.alpha is None and self.network.tokenizer is not None:
            self.calibrate()
        return self

    def _alpha(self, alpha: float | None) -> float:
        if alpha is None:
            alpha = self.alpha
        if alpha is None:
            raise InputError("the strength is not known yet: give alpha=, or call calibrate(prompts)")
        return _strength(alpha)

    # ---------------------------------------------------------------- on disk

    @abstractmethod
    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Parameters that `__init__` takes and what fitting found."""

    def _restore(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027  (not every kind has something to take up)
        """Take up what fitting found; nothing where the parameters say it all."""

    def save(self, path: str | Path) -> Path:
        """Write it to one safetensors file, parameters as JSON in its header; nothing is pickled.

        Raises
        ------
        InputError
            Not fitted.
        RunFolderError
            The file cannot be written; an older one stays then.
        """
        parameters, tensors = self._state()
        target = as_path("path", path)
        facts = {
            "class": type(self).__name__, "parameters": parameters, "alpha": self.alpha, "role": self.role,
            "network": self.network.name, "fingerprint": self.network.fingerprint(),
        }  # fmt: skip
        held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        try:
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                part = Path(folder) / "part"
                save_file(held, part, {"nissl.steering": json.dumps(facts)})
                os.replace(part, target)
        except OSError as error:
            raise RunFolderError(f"{target} cannot be written: {error}") from error
        return target

    @staticmethod
    def load(path: str | Path, network: LanguageModel, runner: Runner | None = None) -> Steering:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            Not such a file, or it was fitted on a network of another shape. Other weights of the same shape only warn.
        """
        source = as_path("path", path)
        instance("network", network, LanguageModel)
        try:
            with safe_open(source, "pt") as file:
                header = (file.metadata() or {}).get("nissl.steering")
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            if header is None:
                raise InputError(f"{source} holds tensors, but no steering that nissl saved")
            facts = json.loads(header)
            kind = {c.__name__: c for c in _kinds(Steering)}[facts["class"]]
            new = kind(network, **facts["parameters"], runner=runner)
            new.alpha = facts["alpha"]
            new._restore(tensors)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{source} cannot be read as a saved steering: {error}") from error
        if facts["fingerprint"] != network.fingerprint():
            warnings.warn(
                f"{source.name} was fitted on {facts['network']} with other weights than {network.name}", stacklevel=2
            )
        return new


def _kinds(kind: type) -> Iterable[type]:
    for c in kind.__subclasses__():
        yield c
        yield from _kinds(c)


def _strength(alpha: Any) -> float:
    if not is_number(alpha):
        raise InputError(f"alpha must be a number, got {alpha!r}")
    return float(alpha)


# ---------------------------------------------------------------- directions in the residual stream


class DirectionSteering(Steering):
    """Base of steering that adds one vector a layer: ``alpha`` times the layer's mean activation length times a direction.

    It is added from the last token of the prompt on, to that token and to every new one.
    """

    def __init__(
        self,
        network: LanguageModel,
        *,
        layers: Sequence[int] | None = None,
        alpha: float | None = None,
        kl: float = 0.1,
        role: str = "resid_post",
        pool: Literal["last", "mean"] = "last",
        seed: int = 0,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(network, alpha, kl, seed, runner)
        self._all = sites_of(network, role)
        if layers is not None:
            layers = [int(i) for i in items("layers", layers)]
            if not layers or len(set(layers)) < len(layers) or not all(0 <= i < len(self._all) for i in layers):
                raise InputError(f"layers must be different numbers from 0 to {len(self._all) - 1}, got {layers}")
        self.layers = layers
        self.role = role
        self.pool: Literal["last", "mean"] = pool
        self.layers_: list[int] = []
        self.norms_: Tensor = torch.empty(0)

    @abstractmethod
    def fit(self, contrast: Contrast | Activations) -> DirectionSteering:
        """Find the directions.

        Parameters
        ----------
        contrast : Contrast or Activations
            Texts, or what `read_contrast` made of them at the same role.

        Raises
        ------
        InputError
            Nothing to tell apart, or activations of another role or network.
        """

    def _read(self, contrast: Contrast | Activations) -> Activations:
        if isinstance(contrast, Contrast):
            contrast = read_contrast(self.network, contrast, role=self.role, pool=self.pool, runner=self.runner)
        instance("contrast", contrast, Activations)
        if contrast.role != self.role or contrast.prompt.shape[1] != len(self._all):
            raise InputError(
                f"activations of {contrast.prompt.shape[1]} layers at {contrast.role!r} were given; "
                f"{len(self._all)} at {self.role!r} are expected"
            )
        return contrast

    def _settle(self, prompt: Float[Tensor, "n layer d"], ranked: Sequence[int]) -> None:
        """Note the length of activations and the layers that are steered: those given, or the best quarter."""
        self.norms_ = prompt.norm(dim=-1).mean(0)
        best = sorted(ranked[: max(1, len(self._all) // 4)])
        self.layers_ = list(self.layers) if self.layers is not None else best

    def _middle(self) -> list[int]:
        """Layers from the middle outwards."""
        centre = (len(self._all) - 1) / 2
        return sorted(range(len(self._all)), key=lambda i: abs(i - centre))

    @property
    def sites(self) -> list[str]:
        """Where the edits are made."""
        return [self._all[i] for i in self.layers_]

    def choose(self, inputs: Inputs) -> Asking[Tensor]:
        """Unit directions for each prompt, (n or 1, n_steered_layers, d); asks for the unsteered activations if need be."""
        if not self.layers_:
            raise InputError(f"this {type(self).__name__} is not fitted: call fit(contrast)")
        if not self._looks:
            return self._directions(None)
        answer = yield Pass(inputs, read=self.sites, output=False)
        return self._directions(torch.stack([answer.reads[s][:, -1].float() for s in self.sites], dim=1))

    @property
    def _looks(self) -> bool:
        """Whether the direction depends on the prompt."""
        return False

    @abstractmethod
    def _directions(self, states: Float[Tensor, "n layer d"] | None) -> Float[Tensor, "m layer d"]:
        """Direction of each layer for each prompt, of length 1."""

    def edits_of(self, choice: Tensor, alpha: float | None = None) -> SteeringEdits:
        """Edits of a strength, after `choose`."""
        lengths = self._alpha(alpha) * self.norms_[self.layers_]
        values = choice * lengths[:, None]
        edits = [Add(site, values[:, i : i + 1], positions=[-1]) for i, site in enumerate(self.sites)]
        return SteeringEdits(tuple(edits), tuple(replace(e, positions=None) for e in edits))

    def _common(self) -> dict[str, Any]:
        return {"layers": self.layers_, "kl": self.kl, "role": self.role, "pool": self.pool, "seed": self.seed}


class DiffMeanSteering(DirectionSteering):
    """Difference of means: one direction a layer, from the negative to the positive answers.

    Parameters
    ----------
    network : LanguageModel
    layers : sequence of int, optional
        Which are steered; by default a quarter, around the middle.
    alpha : float, optional
        Strength, in units of the layer's mean activation length. By default it is calibrated after fitting, on `NEUTRAL`.
    kl : float, default 0.1
        What it is calibrated to, in nats; see `Steering.calibrate`.
    role : str, default "resid_post"
    pool : {"last", "mean"}, default "last"
        See `read_contrast`.
    seed : int, default 0
    runner : Runner, optional

    References
    ----------
    Marks, Tegmark: The geometry of truth (2023). Rimsky et al.: Steering Llama 2 via contrastive activation addition (2024).
    """

    means_: Tensor = torch.empty(0)

    def fit(self, contrast: Contrast | Activations) -> DiffMeanSteering:
        """See `DirectionSteering.fit`."""
        read = self._read(contrast)
        self.means_ = Clusters.of(read.positive - read.negative, 1).means
        self._settle(read.prompt, self._middle())
        return self._ready()

    def _directions(self, states: Tensor | None) -> Tensor:
        return F.normalize(self.means_[self.layers_, 0], dim=-1)[None]

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _fitted(self)
        return self._common(), {"means": self.means_, "norms": self.norms_}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.means_, self.norms_ = tensors["means"], _as_wide(tensors["norms"], self._all)
        self.layers_ = list(self.layers or [])


class RandomSteering(DirectionSteering):
    """A random direction in each layer: what steering does that knows nothing. Parameters as for `DiffMeanSteering`."""

    units_: Tensor = torch.empty(0)

    def fit(self, contrast: Contrast | Activations) -> RandomSteering:
        """Draw directions; the contrast only gives the length of activations."""
        read = self._read(contrast)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(read.prompt.shape[1:], generator=generator)
        self.units_ = F.normalize(drawn, dim=-1).to(read.prompt.device)
        self._settle(read.prompt, self._middle())
        return self._ready()

    def _directions(self, states: Tensor | None) -> Tensor:
        return self.units_[self.layers_][None]

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        _fitted(self)
        return self._common(), {"units": self.units_, "norms": self.norms_}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.units_, self.norms_ = tensors["units"], _as_wide(tensors["norms"], self._all)
        self.layers_ = list(self.layers or [])


# ---------------------------------------------------------------- G-ACT


@dataclass(frozen=True, eq=False)
class Refinement:
    """What `GACT.update` did; predictions were made before the item was learned.

    Attributes
    ----------
    probabilities : Tensor (n, n_layers, n_clusters)
    labels : Tensor (n, n_layers), long
        What was learned; -1 where nothing was.
    """

    probabilities: Float[Tensor, "n layer cluster"]
    labels: Int[Tensor, "n layer"]

    @property
    def right(self) -> Bool[Tensor, "n layer"]:
        """Whether the cluster predicted is the one that was learned afterwards; False where nothing was."""
        return self.probabilities.argmax(-1) == self.labels


class GACT(DirectionSteering):
    """Gradient-refined adaptive activation steering.

    The differences between positive and negative answers are clustered into a few directions. A linear probe in each layer
    tells from the last token of a prompt which of them it needs; that one is added there, from this token on. The probes
    go on learning while prompts arrive (`update`); the model never changes.

    Parameters
    ----------
    network : LanguageModel
    n_clusters : int, optional
        By default 3; 2 below 50 prompts; 1 below 4.
    layers : sequence of int, optional
        Which are steered; by default the quarter in which the probes are most often right on held-out prompts (ties: the
        lower cross-entropy). Probes are fitted in all layers.
    alpha : float, optional
        Strength, in units of the layer's mean activation length. By default it is calibrated after fitting, on `NEUTRAL`.
    kl : float, default 0.1
        What it is calibrated to, in nats; see `Steering.calibrate`.
    select : {"hard", "soft"}, default "hard"
        The direction of the most probable cluster, or the mean weighted by probability, at equal length.
    reselect : bool, default False
        Choose anew at every generated token, from an activation that earlier layers have steered, instead of once from the
        unsteered prompt.
    per_layer : bool, default False
        Cluster each layer by itself.
    learning_rate : float, default 0.02
        Of the probes; see `Probes`.
    buffer : int, default 16
        Prompts that an online step looks at.
    role : str, default "resid_post"
    pool : {"last", "mean"}, default "last"
        See `read_contrast`.
    seed : int, default 0
    runner : Runner, optional

    Attributes
    ----------
    clusters_ : Clusters
        ``clusters_.directions`` is (n_layers, n_clusters, d).
    probes_ : Probes
        Cluster numbers are arbitrary: they belong to these clusters and no others.
    accuracy_ : xarray.DataArray (layer,)
        Of the probes on held-out prompts.
    layers_ : list of int
        The layers that are steered.

    References
    ----------
    Steering conceptual bias via transformer latent-subspace activation (2025). Only its abstract was to be had; what it does
    not say (loss, number of clusters, learning rate, strength) is chosen here.
    """

    def __init__(
        self,
        network: LanguageModel,
        *,
        n_clusters: int | None = None,
        layers: Sequence[int] | None = None,
        alpha: float | None = None,
        kl: float = 0.1,
        select: Literal["hard", "soft"] = "hard",
        reselect: bool = False,
        per_layer: bool = False,
        learning_rate: float = 0.02,
        buffer: int = 16,
        role: str = "resid_post",
        pool: Literal["last", "mean"] = "last",
        seed: int = 0,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(network, layers=layers, alpha=alpha, kl=kl, role=role, pool=pool, seed=seed, runner=runner)
        if n_clusters is not None:
            at_least("n_clusters", n_clusters, 1)
        if select not in ("hard", "soft"):
            raise InputError(f"select={select!r}: choose 'hard' or 'soft'")
        flag("reselect", reselect)
        flag("per_layer", per_layer)
        at_least("buffer", buffer, 1)
        if not (is_number(learning_rate) and learning_rate > 0):
            raise InputError(f"learning_rate must be a positive number, got {learning_rate!r}")
        self.n_clusters = n_clusters
        self.select: Literal["hard", "soft"] = select
        self.reselect = reselect
        self.per_layer = per_layer
        self.learning_rate = float(learning_rate)
        self.buffer = buffer
        self.clusters_: Clusters | None = None
        self.probes_: Probes | None = None
        self.accuracy_: xr.DataArray | None = None
        self._functions: dict[tuple[int, float], Callable[[Tensor], Tensor]] = {}

    def fit(self, contrast: Contrast | Activations) -> GACT:
        """See `DirectionSteering.fit`."""
        read = self._read(contrast)
        if len(read.prompt) != len(read.positive):
            raise InputError(
                f"G-ACT needs the prompts of its answers: {len(read.prompt)} prompts, {len(read.positive)} pairs"
            )
        clusters = Clusters.of(read.positive - read.negative, self.n_clusters, per_layer=self.per_layer, seed=self.seed)
        self.accuracy_, loss = self._held_out(read.prompt, clusters)
        self.clusters_, self.probes_ = clusters, self._probes(read.prompt, clusters.labels, clusters.n_clusters)
        ranked = np.lexsort((loss, -self.accuracy_.to_numpy())).tolist() if clusters.n_clusters > 1 else self._middle()
        self._settle(read.prompt, ranked)
        return self._ready()

    def _probes(self, prompt: Tensor, labels: Tensor, n_clusters: int) -> Probes:
        return Probes.fit(prompt, labels, n_clusters, learning_rate=self.learning_rate, buffer=self.buffer)

    def _held_out(self, prompt: Float[Tensor, "n layer d"], clusters: Clusters) -> tuple[xr.DataArray, np.ndarray]:
        """Accuracy and cross-entropy of probes in each layer; every fifth of the prompts is held out in turn."""
        n = len(prompt)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))
        p = prompt.new_ones(n, prompt.shape[1], clusters.n_clusters)
        for fold in range(min(5, n) if clusters.n_clusters > 1 else 0):
            out = order[fold::5]
            left = torch.ones(n, dtype=torch.bool)
            left[out] = False
            p[out] = self._probes(prompt[left], clusters.labels[left], clusters.n_clusters)(prompt[out])
        true = p.gather(-1, clusters.labels[..., None])[..., 0]
        right = (p.argmax(-1) == clusters.labels).float()
        loss = -true.clamp_min(1e-12).log().mean(0)
        return self._accuracy(right, clusters.labels, clusters.n_clusters), loss.cpu().numpy()

    def _accuracy(self, right: Tensor, labels: Tensor, n_clusters: int) -> xr.DataArray:
        share = F.one_hot(labels, n_clusters).float().mean(0).amax(-1)
        return xr.DataArray(
            right.mean(0).cpu().numpy(),
            dims=("layer",),
            coords={"layer": np.arange(right.shape[1]), "majority": ("layer", share.cpu().numpy())},
            name="probe accuracy",
            attrs={"method": type(self).__name__, "clusters": n_clusters, "prompts": len(right), "seed": self.seed},
        )

    def probe_accuracy(self, contrast: Contrast | Activations | None = None) -> xr.DataArray:
        """How often the probe of each layer finds the cluster of a prompt.

        Parameters
        ----------
        contrast : Contrast or Activations, optional
            Other prompts than those fitted on, labelled by the nearest cluster of their differences. By default the fitted
            ones, each fifth predicted by probes that were fitted on the rest.

        Returns
        -------
        xarray.DataArray, dims ("layer",)
            With ``majority`` beside it: the share of the largest cluster, which always guessing it would reach.
        """
        clusters, probes = self._fit()
        if contrast is None:
            assert self.accuracy_ is not None
            return self.accuracy_
        read = self._read(contrast)
        labels = clusters.nearest(read.positive - read.negative)
        return self._accuracy((probes(read.prompt).argmax(-1) == labels).float(), labels, clusters.n_clusters)

    def update(self, batch: Contrast | Activations | Sequence[Any], *, pseudo: bool = False) -> Refinement:
        """Learn from arriving prompts, in their order; each is predicted before it is learned.

        Parameters
        ----------
        batch : Contrast, Activations or sequence of prompts
            With answers the label is the cluster whose mean difference is nearest. Prompts alone teach nothing, unless:
        pseudo : bool, default False
            Learn a probe's own prediction where it is more than 0.9 sure.

        Returns
        -------
        Refinement
        """
        clusters, probes = self._fit()
        flag("pseudo", pseudo)
        if isinstance(batch, (Contrast, Activations)):
            read = self._read(batch)
            states, given = read.prompt, clusters.nearest(read.positive - read.negative)
        else:
            prompts = items("batch", batch)
            if not prompts:
                raise InputError("the batch is empty")
            rows = [(self.network.encode([token_ids(self.network, p)]), 1) for p in prompts]
            states = states_of(self.network, rows, self._all, self.runner)
            given = torch.full(states.shape[:2], -1, device=states.device)
        probabilities, labels = [], []
        for state, label in zip(states, given, strict=True):
            p = probes(state[None])[0]
            if pseudo:
                sure, own = p.max(-1)
                label = torch.where((label < 0) & (sure > 0.9), own, label)
            probabilities.append(p)
            labels.append(label)
            if clusters.n_clusters > 1 and bool((label >= 0).any()):
                probes.learn(state, label)
        return Refinement(torch.stack(probabilities), torch.stack(labels))

    def _fit(self) -> tuple[Clusters, Probes]:
        _fitted(self)
        assert self.clusters_ is not None
        assert self.probes_ is not None
        return self.clusters_, self.probes_

    @property
    def _looks(self) -> bool:
        return self._fit()[0].n_clusters > 1

    def _directions(self, states: Float[Tensor, "n layer d"] | None) -> Float[Tensor, "m layer d"]:
        clusters, probes = self._fit()
        units = clusters.directions[self.layers_]
        if states is None:
            return units[:, 0][None]
        return mixed(units, probes.of(self.layers_)(states), self.select == "soft")

    def edits_of(self, choice: Tensor, alpha: float | None = None) -> SteeringEdits:
        """Edits of a strength, after `choose`."""
        once = super().edits_of(choice, alpha)
        if not (self.reselect and self._looks):
            return once
        strength = self._alpha(alpha)
        return SteeringEdits(once.edits, tuple(Apply(self._all[i], self._anew(i, strength)) for i in self.layers_))

    def _anew(self, layer: int, alpha: float) -> Callable[[Tensor], Tensor]:
        """Steering of one layer by each position's own activation; one function each, so that Passes can be merged."""

        def steered(h: Tensor) -> Tensor:
            clusters, probes = self._fit()
            states = h.detach().float().flatten(0, -2)[:, None]
            units = mixed(clusters.directions[[layer]], probes.of([layer])(states), self.select == "soft")
            return h + (alpha * self.norms_[layer] * units).reshape(h.shape).to(h.dtype)

        return self._functions.setdefault((layer, alpha), steered)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        clusters, probes = self._fit()
        assert self.accuracy_ is not None
        parameters = {
            **self._common(), "n_clusters": self.n_clusters, "select": self.select, "reselect": self.reselect,
            "per_layer": self.per_layer, "learning_rate": self.learning_rate, "buffer": self.buffer,
        }  # fmt: skip
        tensors = {
            "means": clusters.means, "scale": clusters.scale, "labels": clusters.labels, "weight": probes.weight,
            "mean": probes.mean, "deviation": probes.deviation, "norms": self.norms_,
            "accuracy": torch.from_numpy(self.accuracy_.to_numpy()),
        }  # fmt: skip
        if probes.buffer:
            x, y = (torch.stack(parts) for parts in zip(*probes.buffer, strict=True))
            tensors |= {"buffer features": x, "buffer labels": y}
        return parameters, tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        t = tensors
        self.norms_, self.layers_ = _as_wide(t["norms"], self._all), list(self.layers or [])
        self.clusters_ = Clusters(t["means"], t["scale"], t["labels"], self.per_layer)
        held = zip(t.get("buffer features", ()), t.get("buffer labels", ()), strict=True)
        self.probes_ = Probes(
            t["weight"], t["mean"], t["deviation"], self.learning_rate, buffer=deque(held, maxlen=self.buffer)
        )
        hits = t["accuracy"][None]
        self.accuracy_ = self._accuracy(hits, t["labels"], self.clusters_.n_clusters)
        self.accuracy_.attrs["prompts"] = len(t["labels"])


def _fitted(steering: Any) -> None:
    if not steering.layers_:
        raise InputError(f"this {type(steering).__name__} is not fitted: call fit(contrast)")


def _as_wide(norms: Tensor, sites: Sequence[str]) -> Tensor:
    if len(norms) != len(sites):
        raise InputError(f"it was fitted on a network with {len(norms)} layers, this one has {len(sites)}")
    return norms
