"""Nonnegative matrix factorisation of many rows into few parts, and exact nonnegative least squares, differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nissl.arguments import at_least, is_number
from nissl.concepts.snmf import nonnegative_least_squares
from nissl.errors import InputError
from nissl.runner.runner import progress_bar

OVERSAMPLING = 10
"""Dimensions of the sketch beyond the rank."""
SWEEPS = 2
"""Coordinate sweeps for one product with the activations, which costs more than they do."""


@dataclass(frozen=True, eq=False)
class Factorisation:
    """A ≈ U W with U, W ≥ 0.

    Attributes
    ----------
    coefficients : Tensor (n, rank)
        U.
    components : Tensor (rank, d)
        W, rows of norm 1 (zero where a component explains nothing).
    loss : float
        ‖A − U W‖².
    energy : float
        ‖A‖².
    losses : list of float
        Loss of each start, before the best is finished.
    n_iter : int
        Iterations of the best start on the sketch and on the activations themselves.
    """

    coefficients: Tensor
    components: Tensor
    loss: float
    energy: float
    losses: list[float]
    n_iter: int


def nmf(
    a: Tensor,
    rank: int,
    *,
    n_init: int = 3,
    max_iter: int = 200,
    tol: float = 1e-4,
    seed: int = 42,
    progress: bool = True,
) -> Factorisation:
    """Nonnegative matrix factorisation by hierarchical alternating least squares; best of several starts.

    Parameters
    ----------
    a : Tensor (n, d), nonnegative
    rank : int
        At most min(n, d).
    n_init : int, default 3
        Starts: the first from the singular vectors (NNDSVD, zeros filled with the mean), the others at random.
    max_iter : int, default 200
        Iterations of a start, and again of the finish.
    tol : float, default 1e-4
        A start ends when an iteration lowers the loss by less than this share of it.
    seed : int, default 42
    progress : bool, default True

    Returns
    -------
    Factorisation

    Raises
    ------
    InputError
        Entries that are negative or not finite; all zero; a rank out of range.

    Notes
    -----
    All starts run on a sketch A ≈ Q B with rank + 10 rows of B, so that an iteration costs (n + d) (rank + 10) rank instead
    of n d rank; only the best one is then finished on A itself. Its loss is that of A.

    References
    ----------
    Cichocki & Phan (2009). Fast local algorithms for large scale nonnegative matrix and tensor factorizations.
    Boutsidis & Gallopoulos (2008). SVD based initialization: a head start for nonnegative matrix factorization.
    Erichson, Mendible, Wihlborn & Kutz (2018). Randomized nonnegative matrix factorization.
    """
    for name, value in (("n_init", n_init), ("max_iter", max_iter)):
        at_least(name, value, 1)
    at_least("seed", seed, 0)
    if not (is_number(tol) and tol >= 0):
        raise InputError(f"tol must be a number, at least 0; got {tol!r}")
    if a.ndim != 2 or 0 in a.shape or not bool(torch.isfinite(a).all()):
        raise InputError(f"a matrix of finite numbers is needed, got shape {tuple(a.shape)}")
    if float(a.min()) < 0:
        raise InputError(f"the matrix has negative entries (the least is {float(a.min()):.3g})")
    at_least("rank", rank, 1)
    if rank > min(a.shape):
        raise InputError(f"rank {rank} is more than a matrix of shape {tuple(a.shape)} has")
    energy = float(a.double().square().sum())
    if energy == 0:
        raise InputError("the matrix is all zero")
    generator = torch.Generator().manual_seed(seed)
    q, b = _sketch(a, min(rank + OVERSAMPLING, *a.shape), generator)
    best: tuple[float, Tensor, Tensor, int] | None = None
    losses = []
    with progress_bar(progress, n_init + 1, "factorising") as step:
        for start in range(n_init):
            u, w = _nndsvd(q, b, rank, float(a.mean())) if start == 0 else _random(a, rank, generator)
            found = _hals(lambda x: (x @ b.T) @ q.T, lambda x: (x @ q) @ b, u, w, energy, max_iter, tol)
            losses.append(found[0])
            if best is None or found[0] < best[0]:
                best = found
            step()
        assert best is not None
        _, u, w, n_iter = _hals(lambda x: x @ a.T, lambda x: x @ a, best[1], best[2], energy, max_iter, tol)
        step()
    # from the residual itself: the sum of its parts loses digits where little is left
    pairs = zip(a.split(4096), u.split(4096, 1), strict=True)
    loss = sum(float((part - few.T @ w).square().sum(dtype=torch.float64)) for part, few in pairs)
    norm = w.norm(dim=1, keepdim=True)
    return Factorisation((u * norm).T.contiguous(), w / norm.clamp(min=1e-30), loss, energy, losses, best[3] + n_iter)


def _sketch(a: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Q (n, k) with orthonormal columns and B = Qᵀ A (k, d)."""
    y = a @ torch.randn(a.shape[1], k, generator=generator).to(a)
    for _ in range(2):  # power iterations: the spectrum of activations falls slowly
        y = a @ torch.linalg.qr(a.T @ torch.linalg.qr(y)[0])[0]
    q = torch.linalg.qr(y)[0]
    return q, q.T @ a


def _nndsvd(q: Tensor, b: Tensor, rank: int, fill: float) -> tuple[Tensor, Tensor]:
    """Uᵀ (rank, n) and W (rank, d) from the singular vectors: of each pair the heavier of its positive and negative parts."""
    left, s, right = torch.linalg.svd(b, full_matrices=False)
    left, right = (q @ left[:, :rank]).T, right[:rank]
    pairs = [(left.clamp(min=0), right.clamp(min=0)), ((-left).clamp(min=0), (-right).clamp(min=0))]
    weights = torch.stack([u.norm(dim=1) * w.norm(dim=1) for u, w in pairs])
    heavier = (weights[0] >= weights[1])[:, None]
    u, w = (torch.where(heavier, x, y) for x, y in zip(*pairs, strict=True))
    size = (s[:rank] * weights.amax(0)).sqrt()[:, None]
    u, w = (size * x / x.norm(dim=1, keepdim=True).clamp(min=1e-30) for x in (u, w))
    return torch.where(u > 0, u, fill), torch.where(w > 0, w, fill)


def _random(a: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    size = (float(a.mean()) / rank) ** 0.5
    return tuple(size * torch.rand(rank, n, generator=generator).to(a) for n in a.shape)  # pyright: ignore


def _hals(
    onto_rows: Any, onto_columns: Any, u: Tensor, w: Tensor, energy: float, max_iter: int, tol: float
) -> tuple[float, Tensor, Tensor, int]:
    """Alternate coordinate sweeps over Uᵀ (rank, n) and W (rank, d) until the loss settles.

    `onto_rows` gives W Aᵀ, `onto_columns` Uᵀ A.
    """
    loss, n_iter = energy, 0
    for n_iter in range(1, max_iter + 1):
        u = _sweeps(u, onto_rows(w), w @ w.T)
        p, gram = onto_columns(u), u @ u.T
        w = _sweeps(w, p, gram)
        # in double: the three parts nearly cancel where little is left
        new = energy - 2 * float((p.double() * w).sum()) + float((gram.double() * (w.double() @ w.double().T)).sum())
        done = loss - new <= tol * max(new, 0.0)
        loss = new
        if done and n_iter > 1:
            break
    return max(loss, 0.0), u, w, n_iter


def _sweeps(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Lower ½ tr(xᵀ q x) − tr(pᵀ x) over x ≥ 0, one row of x (a component) after the other."""
    x = x.clone()
    size = q.diagonal().clamp(min=1e-30).tolist()
    for _ in range(SWEEPS):
        for j in range(len(x)):
            torch.clamp(x[j] + (p[j] - q[j] @ x) / size[j], min=0, out=x[j])
    return x


def exact_nonnegative_least_squares(p: Tensor, q: Tensor) -> Tensor:
    """Coefficients u ≥ 0 that minimise ½‖a − u W‖² of each row, from P = A Wᵀ (m, r) and Q = W Wᵀ (r, r).

    Block principal pivoting on all rows at once, in double precision: exact, with exact zeros.

    Returns
    -------
    Tensor (m, r), float64

    References
    ----------
    Kim & Park (2011). Fast nonnegative matrix factorization: an active-set-like method and comparisons. SIAM J. Sci.
    Comput. 33, 3261-3281.
    """
    p, q = p.detach().double(), _regular(q)
    found = [_pivot(rows, q) for rows in p.split(max(2**21 // max(len(q), 1) ** 2, 1))]
    return torch.cat(found) if found else p


def _regular(q: Tensor) -> Tensor:
    """Q with a ridge far below rounding of float32, so that components that are zero or alike can be solved for."""
    q = q.detach().double()
    return q + 1e-12 * q.diagonal().mean().clamp(min=1e-30) * torch.eye(len(q), dtype=q.dtype, device=q.device)


def _solve(passive: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """Q_PP⁻¹ p_P on the set P of each row, 0 elsewhere: (m, r)."""
    keep = passive.to(q.dtype)
    system = q * keep[:, :, None] * keep[:, None] + torch.diag_embed(1 - keep)
    return torch.linalg.solve(system, p * keep) * keep


def _pivot(p: Tensor, q: Tensor) -> Tensor:
    m, r = p.shape
    slack = 1e-11 * p.abs().amax(1, keepdim=True)
    x, dual = torch.zeros_like(p), -p
    passive = torch.zeros_like(p, dtype=torch.bool)
    fewest = torch.full((m,), r + 1, device=p.device)
    patience = torch.full((m,), 3, device=p.device)
    rows = torch.arange(m, device=p.device)
    for _ in range(20 * r + 20):
        inside = passive[rows]
        wrong = torch.where(inside, x[rows] < -slack[rows] / q.diagonal().mean(), dual[rows] < -slack[rows])
        count = wrong.sum(1)
        rows, wrong, count = rows[count > 0], wrong[count > 0], count[count > 0]
        if not len(rows):
            return x.clamp(min=0)
        better = count < fewest[rows]
        fewest[rows] = torch.where(better, count, fewest[rows])
        patience[rows] = torch.where(better, 3, patience[rows] - 1)
        # exchanging all at once may go round in circles; the last one alone (Murty) cannot
        last = r - 1 - wrong.flip(1).to(torch.uint8).argmax(1)
        alone = torch.zeros_like(wrong).scatter_(1, last[:, None], True)
        passive[rows] ^= torch.where((patience[rows] >= 0)[:, None], wrong, alone)
        x[rows] = _solve(passive[rows], q, p[rows])
        dual[rows] = torch.where(passive[rows], 0.0, x[rows] @ q - p[rows])
    # rows that rounding keeps from settling
    x[rows] = nonnegative_least_squares(p[rows], q, steps=5000, tol=1e-12)
    return x.clamp(min=0)


class NonnegativeProjection(torch.autograd.Function):
    """Coefficients u(a) ≥ 0 of activations on fixed components, with the gradient by implicit differentiation.

    With the support P = {i : u_i > 0} and strict complementarity, du_P/da = (W_P W_Pᵀ)⁻¹ W_P, and 0 outside of P.
    ``NonnegativeProjection.apply(a, w)``: (m, r) from a (m, d) and w (r, d); w gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor) -> Tensor:
        """Solve the least-squares problems."""
        w = w.double()
        u = exact_nonnegative_least_squares(a.double() @ w.T, w @ w.T)
        ctx.save_for_backward(u > 0, w)
        return u.to(a.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Differentiate the conditions of optimality."""
        passive, w = ctx.saved_tensors
        (g,) = gradients
        q = _regular(w @ w.T)
        size = max(2**21 // max(len(q), 1) ** 2, 1)
        solved = [_solve(s, q, v) for s, v in zip(passive.split(size), g.double().split(size), strict=True)]
        return (torch.cat(solved) @ w).to(g.dtype), None
