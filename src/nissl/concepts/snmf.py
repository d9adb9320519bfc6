"""Semi-nonnegative matrix factorisation: activations as sparse groups of neurons and the tokens that use them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least, flag, is_number, is_whole, items
from nissl.errors import InputError, blame
from nissl.runner.runner import progress_bar

FLOOR = 1e-6
"""Smallest entry of the weights at the start: an entry that is exactly 0 would stay so."""
RIDGE = 1e-6
DEAD = 1e-12
"""A feature is dead if it carries less than this share of the activations' energy."""
TWIN = 0.95
"""Two features with a larger cosine are one; the weaker is as good as dead."""
SETTLED = 50
"""Iterations after which dead features and twins are looked for, again and again: a new feature needs some to settle."""
RESEEDS = 3
"""How often one feature is started anew in one fit."""


class SemiNMF(TransformerMixin, BaseEstimator):
    """Activations A ≈ G Z, tokens × neurons: signed sparse features Z, and weights G ≥ 0 with which tokens use them.

    Parameters
    ----------
    n_components : int, default 100
        Number of features.
    sparsity : float or None, default 0.01
        Share of the neurons that a feature keeps, those with the largest absolute values (winner takes all); None keeps
        all. Too small a share leaves features dead; see `dead_`.
    init : {"random", "kmeans"}, default "random"
        Weights at the start: uniform, or the memberships found by 15 steps of k-means.
    max_iter : int, default 500
    tol : float, default 1e-4
        Relative: the loss has improved when it fell by this share since the last improvement.
    atol : float, default 0
        The same in absolute terms; the larger of both counts.
    patience : int, default 50
        Iterations without improvement after which the fit ends.
    n_init : int, default 1
        Restarts; the one with the lowest loss is kept.
    reseed : bool, default True
        Start features anew from tokens that are explained badly where they are dead, or point where a stronger one does;
        looked for every 50 iterations. False is the algorithm as it was published.
    chunk : int, default 2048
        Tokens that are worked on at once.
    random_state : int, default 42
    progress : bool, default True
        Show progress when a fit takes over two seconds.

    Attributes
    ----------
    components_ : ndarray (n_components, n_neurons), float32
        Z, one feature a row, signed.
    weights_ : ndarray (n_tokens, n_components), float32
        G ≥ 0 of the tokens that were fitted; columns have norm 1 up to the last update, the scale lies in `components_`.
    loss_ : float
        ‖A − G Z‖², the lowest that was reached; components and weights are those of that iteration.
    energy_ : float
        ‖A‖², to which the loss compares.
    loss_curve_ : list of float
        Loss after each iteration of the restart that was kept.
    n_iter_ : int
        The iteration that was kept, counted from 1.
    dead_ : ndarray of int
        Features that explain nothing.
    n_reseeded_ : int
        How often a dead feature was started anew.

    Notes
    -----
    One iteration, with G (n, k), F = Zᵀ (d, k), q = ⌈sparsity · d⌉: F = Aᵀ G (Gᵀ G + 10⁻⁶ I)⁻¹; the q largest entries of
    each column of F are kept; columns of G are scaled to norm 1 and those of F inversely; with P = A F, Q = Fᵀ F and
    X± = (|X| ± X) / 2, G is multiplied by √((P⁺ + G Q⁻) / (P⁻ + G Q⁺ + ε)). Without sparsity the loss never rises; with it
    it may. ε is 10⁻⁶ times the mean square of A, so that a fit does not depend on the unit of the activations.

    All of it goes through the activations once, in chunks: the loss follows from P, Q and Gᵀ G, and A F only reads the
    rows that the sparse F has. Activations in a ``numpy.memmap`` are read chunk by chunk and never held whole; others are
    held once more in float32. The arrays beside them are (n, k) twice, (d, k) and (k, k).

    References
    ----------
    Shafran, Ronen, Fahn, Ravfogel, Geiger & Geva (2025). Decomposing MLP activations into interpretable features via
    semi-nonnegative matrix factorization.
    Ding, Li & Jordan (2010). Convex and semi-nonnegative matrix factorizations. IEEE TPAMI 32, 45-55.

    Examples
    --------
    >>> import torch
    >>> from nissl.concepts import SemiNMF
    >>> model = SemiNMF(4, sparsity=0.2, max_iter=50).fit(torch.randn(200, 30))
    >>> model.components_.shape, int((model.components_ != 0).sum(1).max())
    ((4, 30), 6)
    """

    def __init__(
        self,
        n_components: int = 100,
        *,
        sparsity: float | None = 0.01,
        init: str = "random",
        max_iter: int = 500,
        tol: float = 1e-4,
        atol: float = 0.0,
        patience: int = 50,
        n_init: int = 1,
        reseed: bool = True,
        chunk: int = 2048,
        random_state: int = 42,
        progress: bool = True,
    ) -> None:
        self.n_components = n_components
        self.sparsity = sparsity
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.atol = atol
        self.patience = patience
        self.n_init = n_init
        self.reseed = reseed
        self.chunk = chunk
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> SemiNMF:
        """Factorise activations.

        Parameters
        ----------
        X : Tensor, ndarray or numpy.memmap (n_tokens, n_neurons)
            Activations after the nonlinearity, one row a token.
        y : ignored

        Raises
        ------
        InputError
            Parameters out of range; activations that are no matrix, not finite, all zero, or fewer than features.
        """
        self._check()
        tokens = _Tokens(X, self.chunk)
        if self.n_components > tokens.n:
            raise InputError(
                f"{self.n_components} features cannot be found in {tokens.n} tokens; give more activations"
            )
        if tokens.energy == 0:
            raise InputError("the activations are all zero")
        best: _Fit | None = None
        with progress_bar(self.progress, self.n_init * self.max_iter, "factorising") as step:
            for restart in range(self.n_init):
                generator = torch.Generator().manual_seed(self.random_state + restart)
                fit = _Fit(self, tokens, generator)
                fit.run(step)
                if best is None or fit.loss < best.loss:
                    best = fit
        assert best is not None
        self.n_features_in_ = tokens.d
        self.components_ = best.features.cpu().numpy()
        self.weights_ = torch.cat([g.T for g in best.weights]).cpu().numpy()
        self.loss_ = best.loss
        self.energy_ = tokens.energy
        self.loss_curve_ = best.curve
        self.n_iter_ = best.iteration
        self.dead_ = best.dead(best.features, best.gram).nonzero()[:, 0].cpu().numpy()
        self.n_reseeded_ = int(best.reseeded.sum())
        return self

    def transform(self, X: Any) -> Any:
        """Weights G ≥ 0 of other tokens, for the features found: the nonnegative least-squares fit of each token.

        Parameters
        ----------
        X : Tensor or ndarray (n_tokens, n_neurons)

        Returns
        -------
        Tensor or ndarray (n_tokens, n_components)
            Of the kind of `X`.
        """
        check_is_fitted(self)
        tokens = _Tokens(X, self.chunk)
        if tokens.d != self.n_features_in_:
            raise InputError(
                f"X has {tokens.d} features, but SemiNMF is expecting {self.n_features_in_} features as input"
            )
        weights = torch.cat([self.encode(a.T) for a in tokens])
        return weights if isinstance(X, Tensor) else weights.cpu().numpy()

    def inverse_transform(self, X: Any) -> Any:
        """Activations G Z from weights (n_tokens, n_components), of the kind of `X`."""
        check_is_fitted(self)
        return self.decode(X) if isinstance(X, Tensor) else np.asarray(X, dtype=np.float32) @ self.components_

    @property
    def directions(self) -> Tensor:
        """The features (n_components, n_neurons) as a tensor; what one unit of each weight adds to the activation."""
        check_is_fitted(self)
        return torch.from_numpy(self.components_)

    def encode(self, x: Tensor) -> Tensor:
        """Weights (..., n_components) ≥ 0 of activations (..., n_neurons)."""
        z = self.directions.to(x.device)
        if x.shape[-1] != z.shape[1]:
            raise InputError(f"the features are of {z.shape[1]} neurons, activations of {x.shape[-1]} were given")
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        return nonnegative_least_squares(flat @ z.T, z @ z.T).reshape(*x.shape[:-1], len(z))

    def decode(self, weights: Tensor) -> Tensor:
        """Activations (..., n_neurons) from weights (..., n_components)."""
        z = self.directions.to(weights)
        if weights.shape[-1] != len(z):
            raise InputError(f"there are {len(z)} features, weights of {weights.shape[-1]} were given")
        return weights @ z

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        assert tags.transformer_tags is not None
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _check(self) -> None:
        for name in ("n_components", "max_iter", "patience", "n_init", "chunk"):
            at_least(name, getattr(self, name), 1)
        at_least("random_state", self.random_state, 0)
        flag("reseed", self.reseed)
        flag("progress", self.progress)
        s = self.sparsity
        if s is not None and not (is_number(s) and 0 < s <= 1):
            raise InputError(f"sparsity is the share of neurons that a feature keeps, above 0 and at most 1; got {s!r}")
        for name in ("tol", "atol"):
            value = getattr(self, name)
            if not (is_number(value) and value >= 0):
                raise InputError(f"{name} must be a number, at least 0; got {value!r}")
        if self.init not in ("random", "kmeans"):
            raise InputError(f"init must be 'random' or 'kmeans', got {self.init!r}")


class _Tokens:
    """Activations in chunks of tokens, each (neurons, tokens) in float32, so that a sparse feature reads whole rows."""

    def __init__(self, X: Any, chunk: int) -> None:
        if isinstance(X, (np.memmap, Tensor)):
            source: Any = X.detach() if isinstance(X, Tensor) else X
            if source.ndim != 2 or 0 in source.shape:
                raise InputError(f"activations must be a matrix (tokens, neurons), got shape {tuple(source.shape)}")
        else:
            with blame(InputError, "activations must be a matrix (tokens, neurons) of numbers"):
                source = check_array(X, dtype=[np.float32, np.float64])  # pyright: ignore[reportArgumentType]
        self.n, self.d = int(source.shape[0]), int(source.shape[1])
        self.source, self.rows = source, [slice(i, min(i + chunk, self.n)) for i in range(0, self.n, chunk)]
        self.parts = None if isinstance(source, np.memmap) else [self._read(rows) for rows in self.rows]
        self.device = source.device if isinstance(source, Tensor) else torch.device("cpu")
        self.energy = sum(float(part.double().square().sum()) for part in self)
        if not math.isfinite(self.energy):
            raise InputError("activations hold NaN or infinity")

    def _read(self, rows: slice) -> Tensor:
        part = self.source[rows]
        part = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part, dtype=np.float32))
        return part.float().T.contiguous()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts) if self.parts is not None else map(self._read, self.rows)

    def columns(self, index: Tensor) -> Tensor:
        """Some tokens, (len(index), neurons)."""
        picked = self.source[index.to(self.device) if isinstance(self.source, Tensor) else index.cpu().numpy()]
        return picked.float() if isinstance(picked, Tensor) else torch.from_numpy(np.array(picked, dtype=np.float32))


class _Fit:
    """One start of the factorisation; weights are kept as (features, tokens) chunk by chunk."""

    def __init__(self, model: SemiNMF, tokens: _Tokens, generator: torch.Generator) -> None:
        self.model, self.tokens, self.generator = model, tokens, generator
        self.k, d = model.n_components, tokens.d
        self.keep = d if model.sparsity is None else max(1, math.ceil(model.sparsity * d - 1e-9))
        self.epsilon = 1e-6 * tokens.energy / (tokens.n * d)
        self.loss = math.inf
        self.curve: list[float] = []
        self.iteration = 0
        self.reseeded = torch.zeros(self.k, dtype=torch.long)

    def run(self, step: Any) -> None:
        """Iterate until nothing improves any more; the best solution is kept in `features`, `weights` and `gram`."""
        m, tokens = self.model, self.tokens
        g = list(self._memberships() if m.init == "kmeans" else self._uniform())
        for part in g:
            part.clamp_(min=FLOOR)
        product = sum_of(w @ a.T for w, a in zip(g, tokens, strict=True))
        gram = sum_of(self._gram(w) for w in g)
        self.weights = [w.clone() for w in g]
        reference, waited = math.inf, 0
        for iteration in range(1, m.max_iter + 1):
            features, index = self._features(product, gram)
            norm = gram.diagonal().sqrt().clamp(min=1e-8)
            norm = norm.float()[:, None]
            features = features * norm
            exact = self._gram(features)
            q = exact.float()
            negative, positive = (q.abs() - q) / 2, (q.abs() + q) / 2
            product, gram, cross = torch.zeros_like(product), torch.zeros_like(gram), 0.0
            for w, a in zip(g, tokens, strict=True):
                w.div_(norm)
                p = self._project(features, index, a)
                w.mul_(factor(p, w, negative, positive, self.epsilon))
                product.addmm_(w, a.T)
                gram += self._gram(w)
                cross += inner(p, w)
            loss = max(tokens.energy - 2 * cross + inner(exact, gram), 0.0)
            self.curve.append(loss)
            step()
            if loss < self.loss:
                self.loss, self.iteration, self.features, self.gram = loss, iteration, features, gram.clone()
                for kept, w in zip(self.weights, g, strict=True):
                    kept.copy_(w)
            if reference - loss > max(m.atol, m.tol * reference) or math.isinf(reference):
                reference, waited = loss, 0
            else:
                waited += 1
            if waited >= m.patience:
                break
            if m.reseed and iteration % SETTLED == 0 and iteration + SETTLED <= m.max_iter:
                dead = self.dead(features, gram) | twins(exact, gram.diagonal())
                dead &= (self.reseeded < RESEEDS).to(dead.device)
                if bool(dead.any()):
                    product, gram = self._start_anew(dead, features, g)
                    waited = 0

    # ---------------------------------------------------------------- steps

    def _gram(self, w: Tensor) -> Tensor:
        """Inner products of the rows, in float64; computed so too where the loss has to fall in every iteration."""
        w = w.double() if self.keep == self.tokens.d else w
        return (w @ w.T).double()

    def _features(self, product: Tensor, gram: Tensor) -> tuple[Tensor, Tensor | None]:
        """Least-squares features (k, d), sparse; and where their entries are, if they are few."""
        ridge = RIDGE * torch.eye(self.k, dtype=torch.float64, device=gram.device)
        full = torch.linalg.solve(gram + ridge, product.double()).float()
        if self.keep == self.tokens.d:
            return full, None
        index = full.abs().topk(self.keep, dim=1).indices
        sparse = torch.zeros_like(full).scatter_(1, index, full.gather(1, index))
        return sparse, index if self.keep <= self.tokens.d // 8 else None

    def _project(self, features: Tensor, index: Tensor | None, a: Tensor) -> Tensor:
        """Features times activations, (k, tokens)."""
        if index is None:
            return features @ a
        # a weighted sum of the few rows of `a` that a feature has
        return F.embedding_bag(index, a, per_sample_weights=features.gather(1, index), mode="sum")

    def dead(self, features: Tensor, gram: Tensor) -> Tensor:
        """Which features carry no energy, bool (k,)."""
        return features.square().sum(1) * gram.diagonal() <= DEAD * self.tokens.energy

    def _start_anew(self, dead: Tensor, features: Tensor, g: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Give dead features the residuals of tokens that are explained badly; the new product and Gram matrix."""
        tokens, which = self.tokens, dead.nonzero()[:, 0]
        residual = torch.cat([(a - features.T @ w).square().sum(0) for w, a in zip(g, tokens, strict=True)]).cpu()
        picked = torch.multinomial(residual.double() + 1e-300, len(which), generator=self.generator)
        used = torch.cat(g, 1)[:, picked.to(dead.device)]
        seeds = tokens.columns(picked) - used.T @ features
        if self.keep < tokens.d:
            index = seeds.abs().topk(self.keep, dim=1).indices
            seeds = torch.zeros_like(seeds).scatter_(1, index, seeds.gather(1, index))
        seeds = seeds / seeds.norm(dim=1, keepdim=True).clamp(min=1e-30)
        for w, a in zip(g, tokens, strict=True):
            w[which] = (seeds @ (a - features.T @ w)).clamp(min=0)
        norms = sum_of(w[which].square().sum(1) for w in g).sqrt().clamp(min=1e-30)
        for w in g:
            w[which] = (w[which] / norms[:, None]).clamp(min=FLOOR)
        self.reseeded[which.cpu()] += 1
        return sum_of(w @ a.T for w, a in zip(g, tokens, strict=True)), sum_of(self._gram(w) for w in g)

    # ---------------------------------------------------------------- starts

    def _uniform(self) -> Iterator[Tensor]:
        for rows in self.tokens.rows:
            drawn = torch.rand(rows.stop - rows.start, self.k, generator=self.generator)
            yield drawn.T.contiguous().to(self.tokens.device)

    def _memberships(self, steps: int = 15) -> Iterator[Tensor]:
        """One-hot memberships after Lloyd's iteration from random tokens."""
        tokens, k = self.tokens, self.k
        centres = tokens.columns(torch.randperm(tokens.n, generator=self.generator)[:k])
        for _ in range(steps):
            sums, counts = torch.zeros_like(centres), torch.zeros(k, device=centres.device)
            for a in tokens:
                label = nearest(centres, a)
                sums.index_add_(0, label, a.T)
                counts += torch.bincount(label, minlength=k)
            empty = (counts == 0).nonzero()[:, 0]
            centres = sums / counts.clamp(min=1)[:, None]
            if len(empty):
                centres[empty] = tokens.columns(torch.randperm(tokens.n, generator=self.generator)[: len(empty)])
        for a in tokens:
            yield F.one_hot(nearest(centres, a), k).T.float().contiguous()


def nearest(centres: Tensor, a: Tensor) -> Tensor:
    """Index of the nearest centre (k, d) to each column of `a` (d, n)."""
    return (centres.square().sum(1)[:, None] - 2 * centres @ a).argmin(0)


def twins(gram: Tensor, weight: Tensor) -> Tensor:
    """Features that point where a stronger one does, bool (k,), from their inner products and squared weights."""
    norm = gram.diagonal().sqrt().clamp(min=1e-30)
    energy = gram.diagonal() * weight
    same = gram / norm / norm[:, None] > TWIN
    stronger = energy[None, :] > energy[:, None]
    return (same & stronger).any(1)


def factor(p: Tensor, w: Tensor, negative: Tensor, positive: Tensor, epsilon: float) -> Tensor:
    """What weights `w` (k, n) are multiplied by: √((P⁺ + Q⁻ w) / (P⁻ + Q⁺ w + ε)), with P = Z Aᵀ and Q = Z Zᵀ."""
    above = torch.addmm(p.clamp(min=0), negative, w)
    below = torch.addmm(p.clamp(max=0).neg_(), positive, w).add_(epsilon)
    return above.div_(below).sqrt_()


def inner(a: Tensor, b: Tensor) -> float:
    """Sum of the products of all entries, added up in float64."""
    return float((a * b).sum(dtype=torch.float64))


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """Sum of tensors, one held at a time."""
    total = next(parts).clone()
    for part in parts:
        total += part
    return total


def nonnegative_least_squares(p: Tensor, q: Tensor, steps: int = 300, tol: float = 1e-6) -> Tensor:
    """Weights w ≥ 0 that minimise ‖a − w Z‖² of each row, from P = A Zᵀ (n, k) and Q = Z Zᵀ (k, k).

    Accelerated projected gradient with restart. It solves the problem of the multiplicative update with fixed features,
    faster, and gives exact zeros.

    References
    ----------
    Beck & Teboulle (2009). A fast iterative shrinkage-thresholding algorithm. SIAM J. Imaging Sciences 2, 183-202.
    O'Donoghue & Candès (2015). Adaptive restart for accelerated gradient schemes. Found. Comput. Math. 15, 715-732.
    """
    rate = 1 / torch.linalg.matrix_norm(q, 2).clamp(min=1e-30)
    w = y = (p / q.diagonal().clamp(min=1e-30)).clamp(min=0) / q.shape[0]
    t = torch.ones(len(p), 1, device=p.device)
    for _ in range(steps):
        gradient = torch.addmm(p, y, q, beta=-1)
        new = (y - rate * gradient).clamp(min=0)
        change = new - w
        restart = ((y - new) * change).sum(1, keepdim=True) > 0  # the step goes against the momentum
        t = torch.where(restart, 1.0, t)
        after = (1 + (1 + 4 * t * t).sqrt()) / 2
        y = new + torch.where(restart, 0.0, (t - 1) / after) * change
        w, t = new, after
        if float(change.abs().amax()) <= tol * max(float(w.amax()), 1e-30):
            break
    return w


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a hierarchy.

    Attributes
    ----------
    weights : ndarray (n_below, n_components)
        W ≥ 0: how the features below (the tokens, at the first level) are made of those of this level.
    components : ndarray (n_components, n_neurons)
        The features of this level, signed.
    loss : float
        ‖below − W · components‖², as a share of the squares of what is below.
    """

    weights: np.ndarray
    components: np.ndarray
    loss: float


@dataclass(frozen=True)
class Node:
    """A feature in a hierarchy and the features of the level below that it is made for.

    Attributes
    ----------
    level, feature : int
        Level counted from 0 (the one next to the tokens), and row of its `components`.
    weight : float
        Its weight as a share of its parent's largest one; 1 for the root.
    children : tuple of Node
    """

    level: int
    feature: int
    weight: float
    children: tuple[Node, ...] = ()

    def __str__(self) -> str:
        below = [line for c in self.children for line in str(c).splitlines()]
        return "\n".join([f"level {self.level} feature {self.feature} ({self.weight:.2f})", *(f"  {b}" for b in below)])


class HierarchicalSemiNMF(BaseEstimator):
    """Features of features: the features of each level are factorised again.

    Parameters
    ----------
    ranks : sequence of int, default (400, 200, 100, 50)
        Number of features of each level, the first next to the tokens; each smaller than the one before.
    sparsity : float, None or sequence of them, default 0.01
        Share of neurons that a feature keeps, for all levels or for each.
    init, max_iter, tol, patience, n_init, random_state, progress
        As in `SemiNMF`, for each level.

    Attributes
    ----------
    levels_ : list of Level
    models_ : list of SemiNMF
        The factorisation of each level.

    Notes
    -----
    The first level is A ≈ W₁ H₁; then Hᵢ ≈ Wᵢ₊₁ Hᵢ₊₁. The levels are not tuned together afterwards: joint gradient steps
    would not keep W ≥ 0.

    References
    ----------
    Shafran et al. (2025), as in `SemiNMF`.
    Trigeorgis, Bousmalis, Zafeiriou & Schuller (2017). A deep matrix factorization method for learning attribute
    representations. IEEE TPAMI 39, 417-429.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (400, 200, 100, 50),
        *,
        sparsity: float | Sequence[float | None] | None = 0.01,
        init: str = "random",
        max_iter: int = 500,
        tol: float = 1e-4,
        patience: int = 50,
        n_init: int = 1,
        random_state: int = 42,
        progress: bool = True,
    ) -> None:
        self.ranks = ranks
        self.sparsity = sparsity
        self.init = init
        self.max_iter = max_iter
        self.tol = tol
        self.patience = patience
        self.n_init = n_init
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> HierarchicalSemiNMF:
        """Factorise activations (n_tokens, n_neurons), and the features again and again.

        Raises
        ------
        InputError
            Ranks that do not fall, sparsity not one for each level, and as in `SemiNMF.fit`.
        """
        ranks = items("ranks", self.ranks)
        if not ranks or not all(is_whole(r) and r >= 1 for r in ranks) or list(ranks) != sorted(set(ranks))[::-1]:
            raise InputError(f"ranks must be whole numbers that fall from level to level, got {ranks}")
        shares = self.sparsity
        if shares is None or isinstance(shares, (int, float)):
            shares = (shares,) * len(ranks)
        shares = items("sparsity", shares)
        if len(shares) != len(ranks):
            raise InputError(f"sparsity must be one number or one for each of the {len(ranks)} levels, got {shares}")
        models: list[SemiNMF] = []
        levels: list[Level] = []
        below = X
        for rank, share in zip(ranks, shares, strict=True):
            model = SemiNMF(
                rank, sparsity=share, init=self.init, max_iter=self.max_iter, tol=self.tol, patience=self.patience,
                n_init=self.n_init, random_state=self.random_state, progress=self.progress,
            ).fit(below)  # fmt: skip
            models.append(model)
            levels.append(Level(model.weights_, model.components_, model.loss_ / model.energy_))
            below = model.components_
        self.models_, self.levels_ = models, levels
        self.n_features_in_ = models[0].n_features_in_
        return self

    def activations(self, level: int) -> np.ndarray:
        """How strongly each token uses the features of a level: W₁ … W_level, (n_tokens, n_components)."""
        self._require(level)
        product = self.levels_[0].weights
        for below in self.levels_[1 : level + 1]:
            product = product @ below.weights
        return product

    def tree(self, level: int, feature: int, tau: float = 0.5, max_children: int = 3) -> Node:
        """What a feature is made for, level by level.

        Parameters
        ----------
        level, feature : int
            The root; levels are counted from 0.
        tau : float, default 0.5
            A feature of the level below is a child if its weight is at least this share of the largest one.
        max_children : int, default 3
            The strongest are kept. A node with fewer than two is a leaf.
        """
        self._require(level)
        if not (is_number(tau) and 0 < tau < 1):
            raise InputError(f"tau must be a number between 0 and 1, got {tau!r}")
        at_least("max_children", max_children, 1)
        n = len(self.levels_[level].components)
        if not (is_whole(feature) and 0 <= feature < n):
            raise InputError(f"level {level} has the features 0 to {n - 1}, got {feature!r}")
        return self._node(level, int(feature), 1.0, tau, max_children)

    def _node(self, level: int, feature: int, weight: float, tau: float, most: int) -> Node:
        if level == 0:
            return Node(level, feature, weight)
        column = self.levels_[level].weights[:, feature]
        share = column / max(float(column.max()), 1e-30)
        chosen = [int(j) for j in np.argsort(-share, kind="stable")[:most] if share[j] >= tau]
        if len(chosen) < 2:
            return Node(level, feature, weight)
        return Node(level, feature, weight, tuple(self._node(level - 1, j, float(share[j]), tau, most) for j in chosen))

    def _require(self, level: int) -> None:
        check_is_fitted(self)
        if not (is_whole(level) and 0 <= level < len(self.levels_)):
            raise InputError(f"the levels are 0 to {len(self.levels_) - 1}, got {level!r}")
