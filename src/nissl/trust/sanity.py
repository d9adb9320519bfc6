"""Sanity: scores must change when the network, or the class that is explained, changes, and only then."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import at_least, flag, is_number
from nissl.errors import InputError, NonFiniteError
from nissl.network import Network, target
from nissl.network.passes import Inputs
from nissl.runner import Asking, Explained, Question
from nissl.trust.check import Check, Explainer, Figure, Measured, on, positions, similarity, sizes


def layers_with_weights(network: Network) -> list[list[str]]:
    """Names of the weights of each layer, from the input to the output (in order of registration)."""
    layers: dict[str, list[str]] = {}
    for name, value in network.module.named_parameters():
        if value.numel() > 1:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
    return list(layers.values())


def shuffled(network: Network, names: list[str], seed: int = 0) -> Network:
    """The network with the entries of some weights in random order: scale and distribution stay, what was learned goes."""
    generator = torch.Generator().manual_seed(seed)
    own = network.weights()
    changed: dict[str, Tensor] = {}
    for name in names:
        w = own[name]
        order = torch.randperm(w.numel(), generator=generator).to(w.device)
        changed[name] = w.reshape(-1)[order].reshape(w.shape)
    return network.changed(changed)


@dataclass(frozen=True, eq=False)
class WeightRandomisation(Check):
    """Compare scores with those of the same method on the network with shuffled weights.

    Parameters
    ----------
    stages : int, default 1
        1: all weights at once. k: also the top 1/k, 2/k … of the layers (cascading).
    independent : bool, default False
        Also shuffle each of the k groups of layers alone.
    seed : int, default 0

    Notes
    -----
    Similarity is the Spearman rank correlation of the absolute maps. Scores that stay alike (close to 1) cannot depend
    on what the network has learned.

    References
    ----------
    Adebayo, Gilmer, Muelly, Goodfellow, Hardt, Kim: Sanity checks for saliency maps (2018).
    """

    stages: int = 1
    independent: bool = False
    seed: int = 0
    _networks: dict[int, tuple[Network, list[tuple[float, Network]], list[tuple[float, Network]]]] = field(
        default_factory=dict, repr=False
    )

    name: ClassVar[str] = "randomisation"
    reruns: ClassVar[bool] = True
    figures: ClassVar[dict[str, Figure]] = {
        "randomisation_similarity": Figure(
            "randomisation",
            "Similarity after randomising weights",
            "Rank correlation with the map of shuffled weights.",
            "lower",
            0.0,
        ),
    }

    def __post_init__(self) -> None:
        at_least("stages", self.stages, 1)
        at_least("seed", self.seed, 0)
        flag("independent", self.independent)

    def networks(self, network: Network) -> tuple[list[tuple[float, Network]], list[tuple[float, Network]]]:
        """(share of layers shuffled, network) for the cascade and for single groups; made once for a network."""
        if id(network) not in self._networks:
            layers = layers_with_weights(network)
            if not layers:
                raise InputError(f"{network.name} has no weights to randomise")
            cascade, single = [], []
            edges = np.linspace(0, len(layers), min(self.stages, len(layers)) + 1).round().astype(int)
            for low, high in itertools.pairwise(edges):
                top = [n for layer in layers[len(layers) - high :] for n in layer]
                group = [n for layer in layers[len(layers) - high : len(layers) - low] for n in layer]
                cascade.append((high / len(layers), shuffled(network, top, self.seed)))
                if self.independent:
                    single.append(((low + high) / 2 / len(layers), shuffled(network, group, self.seed)))
            self._networks[id(network)] = (network, cascade, single)
        return self._networks[id(network)][1:]

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        if method is None or not q.network.differentiable:
            return Measured({"randomisation_similarity": float("nan")})
        here = sizes(scores)
        cascade, single = self.networks(q.network)
        curves, maps = {}, {}
        alike = [1.0]
        for _, other in cascade:
            again = yield from _again(q, other, method)
            alike.append(float("nan") if again is None else similarity(here, sizes(again).to(here)))
            if again is not None:
                maps["randomised"] = positions(again).cpu().numpy()
        if len(cascade) > 1:
            curves["randomisation"] = (np.array([0.0, *(s for s, _ in cascade)]), np.array(alike))
        if single:
            alone = []
            for _, other in single:
                again = yield from _again(q, other, method)
                alone.append(float("nan") if again is None else similarity(here, sizes(again).to(here)))
            curves["randomisation_independent"] = (np.array([s for s, _ in single]), np.array(alone))
        return Measured({"randomisation_similarity": alike[-1]}, curves, maps)


def _again(q: Question, other: Network, method: Explainer) -> Asking[Explained | None]:
    """Scores of the method on another network; None where that has no finite answer."""
    try:
        return (yield from on(other, method.explain(q.at(other, method.differentiates, None))))
    except NonFiniteError:
        return None


@dataclass(frozen=True, eq=False)
class RandomLogit(Check):
    """Compare scores with those for another class.

    The class is drawn at random (with the example's seed) among the others.

    References
    ----------
    Sixt, Granz, Landgraf: When explanations lie: why many modified BP attributions fail (2020).
    """

    name: ClassVar[str] = "logit"
    reruns: ClassVar[bool] = True
    figures: ClassVar[dict[str, Figure]] = {
        "logit_similarity": Figure(
            "logit", "Similarity for another class", "Rank correlation with the map for a random other class.", "lower"
        ),
    }

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        nothing = Measured({"logit_similarity": float("nan")})
        if method is None or q.target.name not in ("class_logit", "top_class", "probability", "log_probability"):
            return nothing
        answer = yield q.ask()
        if answer.output is None or answer.output.ndim != 2 or answer.output.shape[1] < 2:
            return nothing
        n = answer.output.shape[1]
        y = int(answer.output.argmax(1)) if q.target.name == "top_class" else int(q.target.values[0])
        other = (y + 1 + int(torch.randint(n - 1, (1,), generator=q.generator("logit")))) % n
        again = yield from method.explain(q.about(target.class_logit(other)).at(q.network, method.differentiates, None))
        return Measured({"logit_similarity": similarity(sizes(scores, True), sizes(again, True).to(sizes(scores)))})


class _Shifted(Network):
    """A network whose input is moved by a constant and moved back inside: the same function of the same picture.

    It moves the input as it calls the module, so that sites keep their names.
    """

    def __init__(self, network: Network, shift: float) -> None:
        self.__dict__.update(network.__dict__)
        self.shift = shift

    def call(self, inputs: Inputs) -> Any:
        """See `Network.call`."""
        first = self.input_key("input", inputs)
        return super().call({**inputs, first: inputs[first] - self.shift})

    def fingerprint(self) -> str:
        """See `Network.fingerprint`."""
        return f"{super().fingerprint()}-{self.shift}"


@dataclass(frozen=True, eq=False)
class InputInvariance(Check):
    """Compare scores with those for the shifted input of a network that takes the shift back.

    Parameters
    ----------
    shift : float, default 0.5
        As a share of the input's range, the same for all entries. Both networks compute the same function of the same
        example, so scores should be the same; methods with a zero baseline or a product with the input differ.

    References
    ----------
    Kindermans et al.: The (un)reliability of saliency methods (2017).
    """

    shift: float = 0.5
    _networks: dict[tuple[int, float], tuple[Network, Network]] = field(default_factory=dict, repr=False)

    name: ClassVar[str] = "invariance"
    reruns: ClassVar[bool] = True
    figures: ClassVar[dict[str, Figure]] = {
        "input_invariance": Figure(
            "invariance", "Input invariance", "Rank correlation with the map for a shifted input that means the same."
        ),
    }

    def __post_init__(self) -> None:
        if not (is_number(self.shift) and self.shift != 0):
            raise InputError(f"shift must be a number other than 0, got {self.shift!r}")

    def measure(self, q: Question, scores: Explained, method: Explainer | None = None) -> Asking[Measured]:
        """See `Check.measure`."""
        single = [k for k in q.inputs if k.isdigit()] == [q.input_name]
        if method is None or not q.network.differentiable or not q.input.is_floating_point() or not single:
            return Measured({"input_invariance": float("nan")})
        # one shift for all examples, in round numbers, so that they share a network and its batches
        shift = float(np.round(self.shift * 2.0 ** np.round(np.log2(float(q.input.max() - q.input.min()) + 1e-12)), 6))
        network = self._shifted(q.network, shift)
        moved = q.with_input(q.input + shift).at(network, method.differentiates, None)
        again = yield from on(network, method.explain(moved))
        return Measured({"input_invariance": similarity(sizes(scores, True), sizes(again, True).to(sizes(scores)))})

    def _shifted(self, network: Network, shift: float) -> Network:
        key = (id(network), shift)
        if key not in self._networks:
            self._networks[key] = (network, _Shifted(network, shift))
        return self._networks[key][1]
