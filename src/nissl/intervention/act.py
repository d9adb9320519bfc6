"""What G-ACT is measured against: ACT on attention heads, and the perturbation of one static neuron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least, instance, is_number, items
from nissl.errors import InputError
from nissl.intervention.contrast import Activations, Contrast, read_contrast, sites_of, token_ids
from nissl.intervention.latent import Clusters, act_shift, fit_logistic
from nissl.intervention.steering import Steering, SteeringEdits
from nissl.network import Add, Apply, LanguageModel, Pass, Scale, Set
from nissl.network.passes import Inputs
from nissl.runner import Asking, Runner

CARRIERS: tuple[str, ...] = ("This is {}", "We use {}", "The word {}", "I am learning {}")
"""Short texts in which a static neuron is looked for; the token stands at their end."""


class ACT(Steering):
    """Adaptive activation steering of attention heads.

    Differences between positive and negative answers are clustered; in each head and cluster a logistic probe tells them
    apart. In the heads whose probes do this best on held-out prompts, a ← a + Σ_c α (1 − p_c(a) + β) v_c: all clusters
    are added, each the more the farther the activation is from its positive side.

    Parameters
    ----------
    network : LanguageModel
    n_clusters : int, optional
        By default 3; 2 below 50 prompts; 1 below 4.
    alpha : float, optional
        Strength; 12 in the paper, for LLaMA-7B. By default it is calibrated after fitting, on `NEUTRAL`.
    beta : float, default 0.0
    n_heads : int, default 24
        Heads that are steered for each cluster, over all layers.
    direction : {"probe", "mean"}, default "probe"
        v_c: the weights θ_c of the probe, or the mean difference.
    kl : float, default 0.1
    pool : {"last", "mean"}, default "last"
        See `read_contrast`.
    seed : int, default 0
    runner : Runner, optional

    Attributes
    ----------
    theta_, vectors_ : Tensor (n_layers * n_heads, n_clusters, d_head)
        Probes; and v_c, zero where a head is not steered for a cluster.
    accuracy_ : Tensor (n_layers * n_heads, n_clusters)
        Of the probes on a held-out fifth of each cluster.

    References
    ----------
    Wang et al.: Adaptive activation steering: a tuning-free LLM truthfulness improvement method (2025).
    """

    role: str = "z"

    def __init__(
        self,
        network: LanguageModel,
        *,
        n_clusters: int | None = None,
        alpha: float | None = None,
        beta: float = 0.0,
        n_heads: int = 24,
        direction: Literal["probe", "mean"] = "probe",
        kl: float = 0.1,
        pool: Literal["last", "mean"] = "last",
        seed: int = 0,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(network, alpha, kl, seed, runner)
        if n_clusters is not None:
            at_least("n_clusters", n_clusters, 1)
        at_least("n_heads", n_heads, 1)
        if not is_number(beta):
            raise InputError(f"beta must be a number, got {beta!r}")
        if direction not in ("probe", "mean"):
            raise InputError(f"direction={direction!r}: choose 'probe' or 'mean'")
        self._all = sites_of(network, self.role)
        self.n_clusters = n_clusters
        self.beta = float(beta)
        self.n_heads = n_heads
        self.direction: Literal["probe", "mean"] = direction
        self.pool: Literal["last", "mean"] = pool
        self.theta_: Tensor = torch.empty(0)
        self.vectors_: Tensor = torch.empty(0)
        self.accuracy_: Tensor = torch.empty(0)
        self._functions: dict[tuple[int, float], Callable[[Tensor], Tensor]] = {}

    def fit(self, contrast: Contrast | Activations) -> ACT:
        """Cluster, fit the probes and choose the heads; activations must have been read at the role ``z``."""
        if isinstance(contrast, Contrast):
            contrast = read_contrast(self.network, contrast, role=self.role, pool=self.pool, runner=self.runner)
        instance("contrast", contrast, Activations)
        if contrast.role != self.role or contrast.positive.shape[1] != len(self._all):
            raise InputError(f"ACT needs activations of {len(self._all)} layers at 'z', got those at {contrast.role!r}")
        clusters = Clusters.of(contrast.positive - contrast.negative, self.n_clusters, seed=self.seed)
        k, heads = clusters.n_clusters, self.network.anatomy.n_heads
        positive, negative = (
            t.unflatten(-1, (heads, -1)).flatten(1, 2) for t in (contrast.positive, contrast.negative)
        )
        member = F.one_hot(clusters.labels[:, 0], k).bool()
        held = self._held_out(member)
        tried = fit_logistic(positive, negative, member & ~held)
        right = [(torch.einsum("nsd,skd->nsk", s * x, tried) > 0).float() for s, x in ((1, positive), (-1, negative))]
        weights = held.float() / held.sum(0).clamp_min(1)
        self.accuracy_ = torch.einsum("nsk,nk->sk", (right[0] + right[1]) / 2, weights)
        self.theta_ = fit_logistic(positive, negative, member)
        share = member.float() / member.sum(0)
        v = self.theta_ if self.direction == "probe" else torch.einsum("nsd,nk->skd", positive - negative, share)
        # Heads with equal accuracy on few held-out prompts: the one with the wider margin goes first.
        margin = torch.einsum("nsd,skd,nk->sk", positive - negative, tried, weights)
        rank = self.accuracy_ + 1e-3 * margin / margin.abs().amax().clamp_min(1e-12)
        chosen = torch.zeros_like(rank, dtype=torch.bool)
        chosen.scatter_(0, rank.topk(min(self.n_heads, len(rank)), dim=0).indices, True)
        self.vectors_ = v * chosen[..., None]
        self._functions.clear()
        return self._ready()

    def _held_out(self, member: Tensor) -> Tensor:
        """A fifth of each cluster, at least one prompt."""
        order = torch.randperm(len(member), generator=torch.Generator().manual_seed(self.seed))
        place = member[order].cumsum(0)  # place of each prompt within its cluster
        held = torch.zeros_like(member)
        held[order] = member[order] & (place <= (member.sum(0) / 5).ceil().clamp_min(1))
        return held if bool((held.sum(0) < member.sum(0)).all()) else torch.zeros_like(member)

    @property
    def sites(self) -> list[str]:
        """Where the edits are made."""
        return [self._all[i] for i in self._steered()]

    def _steered(self) -> list[int]:
        if not len(self.vectors_):
            raise InputError("this ACT is not fitted: call fit(contrast)")
        per_layer = self.vectors_.unflatten(0, (len(self._all), -1))
        return (per_layer != 0).flatten(1).any(1).nonzero()[:, 0].tolist()

    def choose(self, inputs: Inputs) -> Asking[None]:
        """Nothing: what is added depends on each activation itself."""
        yield from ()
        return None

    def edits_of(self, choice: Any = None, alpha: float | None = None) -> SteeringEdits:
        """Edits of a strength."""
        strength = self._alpha(alpha)
        edits = [Apply(self._all[i], self._shift(i, strength), positions=[-1]) for i in self._steered()]
        return SteeringEdits(tuple(edits), tuple(replace(e, positions=None) for e in edits))

    def _shift(self, layer: int, alpha: float) -> Callable[[Tensor], Tensor]:
        """One function for each layer and strength, so that Passes can be merged."""
        heads = len(self.theta_) // len(self._all)
        rows = slice(layer * heads, (layer + 1) * heads)
        theta, vectors, beta = self.theta_[rows], self.vectors_[rows], self.beta

        def shifted(z: Float[Tensor, "*n units"]) -> Float[Tensor, "*n units"]:
            a = z.float().unflatten(-1, (heads, -1))
            return z + (alpha * act_shift(a, theta, vectors, beta)).flatten(-2).to(z.dtype)

        return self._functions.setdefault((layer, alpha), shifted)

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        self._steered()
        parameters = {
            "n_clusters": self.n_clusters, "beta": self.beta, "n_heads": self.n_heads, "direction": self.direction,
            "kl": self.kl, "pool": self.pool, "seed": self.seed,
        }  # fmt: skip
        return parameters, {"theta": self.theta_, "vectors": self.vectors_, "accuracy": self.accuracy_}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        heads, width = len(self._all) * self.network.anatomy.n_heads, self.network.anatomy.d_head
        if tensors["theta"].shape[::2] != (heads, width):
            raise InputError(
                f"it was fitted on {tensors['theta'].shape[0]} heads of width {tensors['theta'].shape[2]}, this network "
                f"has {heads} of width {width}"
            )
        self.theta_, self.vectors_, self.accuracy_ = (tensors[k] for k in ("theta", "vectors", "accuracy"))


class NeuronSteering(Steering):
    """Perturbation of one MLP neuron at all positions, prompt and answer.

    Parameters
    ----------
    network : LanguageModel
    layer, unit : int
    peak : float
        What the neuron does at the token it stands for: the unit of strength, with its sign.
    how : {"add", "clamp", "scale"}, default "add"
        a + alpha · peak; or alpha · peak; or a · (1 + alpha). Only with ``add`` and ``scale`` is nothing changed at 0.
    alpha : float, optional
        By default it is to be calibrated; see `Steering.calibrate`.
    kl : float, default 0.1
    runner : Runner, optional
    """

    role: str = "neurons"

    def __init__(
        self,
        network: LanguageModel,
        layer: int,
        unit: int,
        peak: float = 1.0,
        *,
        how: Literal["add", "clamp", "scale"] = "add",
        alpha: float | None = None,
        kl: float = 0.1,
        runner: Runner | None = None,
    ) -> None:
        super().__init__(network, alpha, kl, 0, runner)
        self._all = sites_of(network, self.role)
        for name, value, size in (("layer", layer, len(self._all)), ("unit", unit, network.anatomy.d_mlp)):
            at_least(name, value, 0)
            if value >= size:
                raise InputError(f"{name} must be below {size}, got {value}")
        if not is_number(peak):
            raise InputError(f"peak must be a number, got {peak!r}")
        if how not in ("add", "clamp", "scale"):
            raise InputError(f"how={how!r}: choose 'add', 'clamp' or 'scale'")
        self.layer, self.unit, self.peak = layer, unit, float(peak)
        self.how: Literal["add", "clamp", "scale"] = how

    @classmethod
    def find(
        cls,
        network: LanguageModel,
        token: str | int,
        *,
        by: Literal["activation", "effect"] = "activation",
        carriers: Sequence[Any] = CARRIERS,
        **options: Any,
    ) -> NeuronSteering:
        """The neuron that answers to a token.

        Parameters
        ----------
        network : LanguageModel
        token : str or int
            A text, whose last token is looked at, or a token id.
        by : {"activation", "effect"}, default "activation"
            Largest mean |activation| at the token; or largest mean of activation times what the neuron writes to the
            token's own logit (its first, if it has several).
        carriers : sequence
            Texts with ``{}`` where the token goes, at their end; or, for a token id, lists of ids that it is put behind.
        **options
            As for the class.
        """
        if by not in ("activation", "effect"):
            raise InputError(f"by={by!r}: choose 'activation' or 'effect'")
        rows = [_carried(network, c, token) for c in items("carriers", carriers)]
        if not rows:
            raise InputError("at least one carrier is needed")
        sites = sites_of(network, cls.role)
        asked = [network.run(Pass(network.encode([ids]), read=sites, output=False)) for ids in rows]
        a = torch.stack([torch.stack([r.reads[s][0, -1].float() for s in sites]) for r in asked]).mean(0)
        score = a.abs()
        if by == "effect":
            first = token if isinstance(token, int) else token_ids(network, token, special=False)[0]
            row = network.weight("unembed")[first].float()
            score = a * torch.stack([row @ network.weight("down", i).float() for i in range(len(sites))])
        best = int(score.argmax())
        layer, unit = divmod(best, a.shape[1])
        return cls(network, layer, unit, float(a[layer, unit]), **options)

    @property
    def sites(self) -> list[str]:
        """Where the edit is made."""
        return [self._all[self.layer]]

    def choose(self, inputs: Inputs) -> Asking[None]:
        """Nothing: the neuron is the same for all prompts."""
        yield from ()
        return None

    def edits_of(self, choice: Any = None, alpha: float | None = None) -> SteeringEdits:
        """Edits of a strength."""
        strength, (site,) = self._alpha(alpha), self.sites
        if self.how == "scale":
            edit = Scale(site, 1 + strength, units=[self.unit])
        else:
            edit = (Add if self.how == "add" else Set)(site, strength * self.peak, units=[self.unit])
        return SteeringEdits((edit,), (edit,))

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        parameters = {"layer": self.layer, "unit": self.unit, "peak": self.peak, "how": self.how, "kl": self.kl}
        return parameters, {"peak": torch.tensor([self.peak])}


def _carried(network: LanguageModel, carrier: Any, token: str | int) -> list[int]:
    if isinstance(carrier, str):
        if not carrier.endswith("{}"):
            raise InputError(f"a carrier ends in {{}}, where the token goes; got {carrier!r}")
        if isinstance(token, int):
            return [*token_ids(network, carrier[:-2].rstrip()), token]
        return token_ids(network, carrier[:-2] + token)
    after = [token] if isinstance(token, int) else token_ids(network, token, special=False)
    return [*token_ids(network, carrier), *after]
