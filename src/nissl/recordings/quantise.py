"""Vector quantisation: the nearest of a few learnt vectors in place of a continuous one."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, broadcast, is_available, is_initialized
from torch.nn import functional as F

from nissl.arguments import at_least
from nissl.errors import InputError


class Quantized(NamedTuple):
    """What a quantiser makes of vectors.

    Attributes
    ----------
    values : Tensor (..., n_features)
        The chosen vectors; their gradient goes to what was quantised, as it is (straight-through).
    codes : Tensor of int64 (...)
    losses : dict of Tensor
        "commitment", and "codebook" where the vectors are trained by gradient; both times their weight.
    """

    values: Tensor
    codes: Tensor
    losses: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """A codebook of vectors, started by k-means on the first batch, moved towards what is assigned to it.

    Cosine: what is quantised is brought to length 1 and so are the vectors, always; the nearest has the largest cosine. Euclidean:
    the nearest by distance. In training with ``update="ema"`` each vector that was used moves to the mean m of what was assigned
    to it: v becomes ``decay * v + (1 - decay) * m`` (cosine: both brought to length 1 again); unused ones stay. With
    ``update="gradient"`` the loss "codebook" pulls them. In evaluation nothing moves.

    Parameters
    ----------
    n_codes, n_features : int
    metric : {"cosine", "euclidean"}, default "cosine"
    update : {"ema", "gradient"}, default "ema"
    decay : float, default 0.99
    commitment : float, default 1
        Weight of the mean squared distance that pulls what is quantised to its vector.
    revive_after : int, optional
        A vector that this many training batches did not use is replaced by a random vector of the batch.
    rounds : int, default 10
        Of k-means at the start.

    References
    ----------
    van den Oord, Vinyals, Kavukcuoglu. Neural Discrete Representation Learning. NeurIPS 2017.
    Zheng et al. Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial Neural signals. NeurIPS 2024.
    """

    vectors: Tensor
    started: Tensor
    idle: Tensor
    counts: Tensor

    def __init__(
        self, n_codes: int, n_features: int, *, metric: Literal["cosine", "euclidean"] = "cosine",
        update: Literal["ema", "gradient"] = "ema", decay: float = 0.99, commitment: float = 1.0,
        revive_after: int | None = None, rounds: int = 10,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least("n_codes", n_codes, 2)
        at_least("n_features", n_features, 1)
        at_least("rounds", rounds, 1)
        if revive_after is not None:
            at_least("revive_after", revive_after, 1)
        if metric not in ("cosine", "euclidean"):
            raise InputError(f'metric must be "cosine" or "euclidean", got {metric!r}')
        if update not in ("ema", "gradient"):
            raise InputError(f'update must be "ema" or "gradient", got {update!r}')
        if not 0 <= decay < 1:
            raise InputError(f"decay must be in [0, 1), got {decay!r}")
        if not commitment >= 0:
            raise InputError(f"commitment must not be negative, got {commitment!r}")
        self.metric, self.update = metric, update
        self.decay, self.commitment = decay, commitment
        self.revive_after, self.rounds = revive_after, rounds
        vectors = self._scaled(torch.randn(n_codes, n_features))
        if update == "gradient":
            self.vectors = nn.Parameter(vectors)
        else:
            self.register_buffer("vectors", vectors)
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("idle", torch.zeros(n_codes, dtype=torch.int64))  # training batches since last used
        self.register_buffer("counts", torch.zeros(n_codes))  # running mean of the shares of use

    @property
    def n_codes(self) -> int:
        """Vectors in the codebook."""
        return self.vectors.shape[0]

    def forward(self, h: Tensor) -> Quantized:
        """Vectors (..., n_features) to the nearest of the codebook; in training the codebook moves (see the class)."""
        flat = self._scaled(h.reshape(-1, self.vectors.shape[1]))
        if self.training and not self.started:
            self.start(flat.detach())
        codes = self._nearest(flat)
        chosen = self._codebook()[codes]
        losses = {"commitment": self.commitment * F.mse_loss(flat, chosen.detach())}
        if self.update == "gradient":
            losses["codebook"] = F.mse_loss(chosen, flat.detach())
        values = flat + (chosen - flat).detach()
        if self.training:
            self._move(flat.detach(), codes)
        return Quantized(values.view(h.shape), codes.view(h.shape[:-1]), losses)

    def encode(self, h: Tensor) -> Tensor:
        """Codes (...) of vectors (..., n_features); nothing moves."""
        return self._nearest(self._scaled(h))

    def decode(self, codes: Tensor) -> Tensor:
        """Vectors (..., n_features) of codes (...)."""
        return self._codebook()[codes]

    def perplexity(self) -> float:
        """Exponential of the entropy of the codes' shares of use in the last training batches; 1: one code does it all."""
        share = self.counts / self.counts.sum().clamp_min(1e-12)
        return float(torch.special.entr(share).sum().exp())

    def dead(self, after: int = 100) -> Tensor:
        """Codes (n_dead,) that the last `after` training batches did not use."""
        return (self.idle >= after).nonzero().flatten()

    @torch.no_grad()
    def start(self, h: Tensor) -> None:
        """Set the codebook to the centres of k-means on `h`, (..., n_features), drawn by torch's generator.

        Where there are fewer vectors than codes, the rest are vectors drawn again, moved by a tenth of the standard deviation. Centres that end
        without a member are drawn again.
        """
        flat = self._scaled(h.reshape(-1, self.vectors.shape[1])).to(self.vectors)
        if not flat.isfinite().all():
            raise InputError("the codebook cannot start from NaN or infinity: look at what is quantised")
        jitter = 0.1 * flat.std()
        n, k = len(flat), self.n_codes
        picks = torch.randperm(n, device=flat.device)[: min(n, k)]
        centres = flat[picks]
        if k > n:
            more = flat[torch.randint(n, (k - n,), device=flat.device)]
            centres = self._scaled(torch.cat([centres, more + jitter * torch.randn_like(more)]))
        for _ in range(self.rounds):
            codes = self._nearest(flat, centres)
            mean, used = _means(flat, codes, k)
            again = flat[torch.randint(n, (k,), device=flat.device)] + jitter * torch.randn_like(centres)
            centres = self._scaled(torch.where(used[:, None], mean, again))
        if _several():
            broadcast(centres, 0)
        self.vectors.data.copy_(centres)
        self.started.fill_(True)

    @torch.no_grad()
    def _move(self, flat: Tensor, codes: Tensor) -> None:
        k = self.n_codes
        n = torch.zeros(k, device=flat.device).index_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
        total = torch.zeros_like(self.vectors, dtype=torch.float32).index_add_(0, codes, flat.float())
        if _several():
            all_reduce(n)
            all_reduce(total)
        used = n > 0
        if self.update == "ema":
            mean = self._scaled(total / n.clamp_min(1)[:, None])
            moved = self._scaled(self.decay * self.vectors + (1 - self.decay) * mean.to(self.vectors))
            self.vectors.data.copy_(torch.where(used[:, None], moved, self.vectors))
        self.counts.lerp_(n / n.sum().clamp_min(1), 1 - self.decay)
        self.idle.add_(1).masked_fill_(used, 0)
        if self.revive_after is not None and bool((self.idle >= self.revive_after).any()):
            drawn = flat[torch.randint(len(flat), (k,), device=flat.device)].to(self.vectors)
            if _several():
                broadcast(drawn, 0)
            gone = self.idle >= self.revive_after
            self.vectors.data.copy_(torch.where(gone[:, None], drawn, self.vectors))
            self.idle.masked_fill_(gone, 0)

    def _codebook(self) -> Tensor:
        """The vectors; brought to length 1 where a gradient step may have changed that."""
        return self._scaled(self.vectors) if self.update == "gradient" else self.vectors

    def _scaled(self, h: Tensor) -> Tensor:
        return F.normalize(h, dim=-1) if self.metric == "cosine" else h

    def _nearest(self, h: Tensor, vectors: Tensor | None = None) -> Tensor:
        v = (self._codebook() if vectors is None else vectors).detach().to(h)
        close = h.detach() @ v.T
        if self.metric == "euclidean":
            close = close - 0.5 * (v * v).sum(-1)  # up to a term of h alone: minus half the squared distance
        return close.argmax(-1)


def _means(flat: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean of the vectors of each code (k, n_features), and whether it has any (k,)."""
    n = torch.zeros(k, device=flat.device, dtype=flat.dtype).index_add_(0, codes, torch.ones_like(flat[:, 0]))
    total = flat.new_zeros(k, flat.shape[1]).index_add_(0, codes, flat)
    return total / n.clamp_min(1)[:, None], n > 0


def _several() -> bool:
    """Whether several devices train together."""
    return is_available() and is_initialized()
