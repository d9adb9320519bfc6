"""Scores from a search for the subset of regions that carries a decision: LiMA and SMDL.

Both rank the regions of an input by greedy search over one set function F of four terms. With softmax networks F is
neither monotone nor submodular, so no bound such as 1 - 1/e is promised: `LiMA.ratios` measures how near the optimum is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nissl.arguments import at_least, instance, is_number, is_whole, items
from nissl.attribution.base import Method
from nissl.attribution.masking import (
    Baseline,
    Features,
    as_scores,
    baseline_of,
    check_baseline,
    dims_of,
    masked,
    positions_only,
    roles_of,
)
from nissl.attribution.regions import Division, divide, given_regions, grid, mean_by_cell, prior_patches
from nissl.errors import InputError, TargetError
from nissl.network import Network
from nissl.network.passes import as_inputs, n_rows
from nissl.runner import CHUNK, Asking, Explained, Question, Runner, explained, make_questions

Search = Literal["greedy", "lazy", "bidirectional"]
TERMS = ("consistency", "collaboration", "confidence", "effectiveness")
"""Terms of the set function, in the order of the columns of `Ranking.terms`."""
_TIE = 1e-7
"""Share of the sum of weights below which float32 answers cannot tell two values of F apart."""

# ---------------------------------------------------------------- the set function


def entropy_confidence(log_p: np.ndarray) -> np.ndarray:
    """1 - H(p) / ln K of log-probabilities (n, K)."""
    return 1 + (np.exp(log_p) * log_p).sum(1) / math.log(log_p.shape[1])


def evidential_confidence(output: Tensor) -> np.ndarray:
    """1 - K / Σ α with α = exp(o clipped to ±10) + 1, of the outputs (n, K) of an evidential network."""
    if output.ndim != 2 or output.shape[1] < 2:
        raise InputError(f"an evidential network must give (n_rows, n_classes), it gave {tuple(output.shape)}")
    alpha = output.double().clamp(-10, 10).exp() + 1
    return (1 - alpha.shape[1] / alpha.sum(1)).cpu().numpy()


def evidential_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Loss of an evidential network, one for each row: digamma(Σ α) - digamma(α_y), α as in `evidential_confidence`.

    References
    ----------
    Sensoy, Kaplan, Kandemir: Evidential deep learning to quantify classification uncertainty (2018).
    """
    alpha = output.clamp(-10, 10).exp() + 1
    return torch.digamma(alpha.sum(1)) - torch.digamma(alpha.gather(1, labels[:, None])[:, 0])


def angles(features: Tensor) -> np.ndarray:
    """Angle between each two rows, as a share of π."""
    unit = F.normalize(features.double(), dim=1)
    return ((unit @ unit.T).clamp(-1, 1).arccos() / math.pi).cpu().numpy()


def effectiveness(kept: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Sum over the members of each subset of the distance to the nearest other member; 0 for a single one.

    Parameters
    ----------
    kept : ndarray, bool (n, m)
    distance : ndarray (m, m)
    """
    away = distance + np.diag(np.full(len(distance), np.inf))
    nearest = np.where(kept[:, None, :], away, np.inf).min(2)
    return np.where(kept & np.isfinite(nearest), nearest, 0.0).sum(1)


@dataclass(frozen=True, eq=False)
class Values:
    """Subsets and what the set function says of them.

    Attributes
    ----------
    kept, removed : ndarray (n, K), float64
        Log-probabilities of all classes with only the subset, and with everything but the subset.
    terms : ndarray (n, 4)
        See `TERMS`.
    total : ndarray (n,)
        F.
    odds : ndarray (n,)
        Decides where F is saturated: weighted log-odds of the class with and without the subset.
    """

    kept: np.ndarray
    removed: np.ndarray
    terms: np.ndarray
    total: np.ndarray
    odds: np.ndarray


@dataclass(frozen=True, eq=False)
class SetFunction:
    """F(S) = λ · (consistency, collaboration, confidence, effectiveness) for one example; made by `LiMA.set_function`.

    Attributes
    ----------
    q : Question
    x, baseline : Tensor (1, ...), (n, ...)
        Of several baselines the mean probability is taken.
    regions : Features
    y : int
        The class.
    position : int or None
        Step of an output (n, steps, K).
    probabilities : bool
        Whether the network puts out probabilities, not logits.
    weights : ndarray (4,)
    ends : ndarray (2, K)
        Log-probabilities of the whole input and of the baseline.
    evidence : Network or None
    distance : ndarray (m, m) or None
    """

    q: Question
    x: Tensor
    baseline: Tensor
    regions: Features
    y: int
    position: int | None
    probabilities: bool
    weights: np.ndarray
    ends: np.ndarray
    evidence: Network | None = None
    distance: np.ndarray | None = None

    @property
    def m(self) -> int:
        """Number of regions."""
        return self.regions.n

    def each(self, chosen: Sequence[int], others: Sequence[int]) -> np.ndarray:
        """Subsets, bool (len(others), m): the chosen regions and one of the others."""
        kept = np.zeros((len(others), self.m), dtype=bool)
        kept[:, list(chosen)] = True
        kept[np.arange(len(others)), list(others)] = True
        return kept

    def evaluate(self, kept: np.ndarray) -> Asking[Values]:
        """F of subsets, bool (n, m): two passes each, and one of the evidential network if there is one."""
        n = len(kept)
        log_p = yield from self.log_probabilities(np.concatenate([kept, ~kept]))
        certain = yield from self._evidence(kept)
        return self.values(kept, log_p[:n], log_p[n:], certain)

    def values(self, kept: np.ndarray, with_: np.ndarray, without: np.ndarray, certain: np.ndarray | None) -> Values:
        """F of subsets from the log-probabilities with them and without them."""
        terms = np.zeros((len(kept), 4))
        terms[:, 0] = np.exp(with_[:, self.y])
        terms[:, 1] = -np.expm1(without[:, self.y])
        terms[:, 2] = entropy_confidence(with_) if certain is None else certain
        if self.distance is not None:
            terms[:, 3] = effectiveness(kept, self.distance)
        odds = self.weights[0] * _odds(with_, self.y) - self.weights[1] * _odds(without, self.y)
        return Values(with_, without, terms, terms @ self.weights, odds)

    def log_probabilities(self, present: np.ndarray) -> Asking[np.ndarray]:
        """Log-probabilities (n, K), float64, with only some regions present, bool (n, m)."""
        found = []
        for few in present_rows(present, len(self.baseline)):
            rows = variants(self.x, self.baseline, self.regions, few)
            answer = yield self.q.ask(rows, scalar=False)
            log_p = log_probabilities(answer.output, self.position, self.probabilities)
            log_p = log_p.reshape(len(few), len(self.baseline), -1)
            found.append((log_p.logsumexp(1) - math.log(len(self.baseline))).cpu().numpy())
        return np.concatenate(found)

    def _evidence(self, kept: np.ndarray) -> Asking[np.ndarray | None]:
        if self.evidence is None:
            return None
        found = []
        for few in present_rows(kept, len(self.baseline)):
            rows = variants(self.x, self.baseline, self.regions, few)
            answer = yield [(self.evidence, self.q.ask(rows, scalar=False))]  # pyright: ignore[reportReturnType]
            found.append(evidential_confidence(answer[0].output).reshape(len(few), -1).mean(1))
        return np.concatenate(found)

    def best(self, values: Values, sign: int = 1) -> int:
        """Row with the largest F (the smallest for sign -1); ties go by log-odds, then to the lowest row."""
        total, odds = sign * values.total, sign * values.odds
        near = total >= total.max() - _TIE * self.weights.sum()
        odds = np.where(near, odds, -np.inf)
        # equal inputs in different rows of a batch differ by rounding
        return int(np.argmax(odds >= odds.max() - 1e-5 * (1 + abs(odds.max()))))


def present_rows(present: np.ndarray, n_baselines: int) -> Sequence[Tensor]:
    """Feature masks in chunks that ask at most CHUNK rows."""
    return torch.from_numpy(present).split(max(CHUNK // n_baselines, 1))


def variants(x: Tensor, baseline: Tensor, regions: Features, present: Tensor) -> Tensor:
    """X with only some regions present, (n * n_baselines, ...)."""
    masks = regions.masks(present.to(x.device))
    if len(baseline) == 1:
        return masked(x, baseline, masks)
    rows = baseline.repeat(len(present), *[1] * (x.ndim - 1))
    return masked(x, rows, masks.repeat_interleave(len(baseline), 0))


def log_probabilities(output: Tensor | None, position: int | None, probabilities: bool) -> Tensor:
    """Log-probabilities (n, K), float64, of logits or probabilities."""
    assert output is not None
    table = (output if position is None else output[:, position]).double()
    # a probability of 0 is one below the smallest number; the rest is rounding of tables that sum to about 1
    return (table.clamp_min(1e-300).log() if probabilities else table).log_softmax(1)


def _odds(log_p: np.ndarray, y: int) -> np.ndarray:
    others = np.delete(log_p, y, axis=1)
    top = others.max(1, keepdims=True)
    return log_p[:, y] - top[:, 0] - np.log(np.exp(others - top).sum(1))


# ---------------------------------------------------------------- the searches


@dataclass(frozen=True, eq=False)
class Ranking:
    """Regions of one example in order of importance, and what is known of every prefix of that order.

    Attributes
    ----------
    order : ndarray (k,) of int
        Regions, the most important first.
    n_forward : int
        How many of them the search put there from the front.
    regions : Features
    target : int
        The class.
    share : ndarray (m + 1,)
        Share of the positions in the first i regions.
    insertion, deletion : ndarray (m + 1,)
        Probability of the class with only the first i regions, and with all but them. NaN where k < m ends the search.
    probabilities : ndarray (m + 1, K)
        Of all classes along the insertion, so that a second class can be followed.
    terms : ndarray (m + 1, 4)
        `TERMS` of the first i regions; NaN where they were not asked for.
    total : ndarray (m + 1,)
        F of the first i regions.
    """

    order: np.ndarray
    n_forward: int
    regions: Features
    target: int
    share: np.ndarray
    insertion: np.ndarray
    deletion: np.ndarray
    probabilities: np.ndarray
    terms: np.ndarray
    total: np.ndarray

    @property
    def insertion_area(self) -> float:
        """Area under the insertion curve over the share of positions."""
        return float(np.trapezoid(self.insertion, self.share))

    @property
    def deletion_area(self) -> float:
        """Area under the deletion curve over the share of positions."""
        return float(np.trapezoid(self.deletion, self.share))

    @property
    def best_prefix(self) -> int:
        """How many regions, at least one, give the class its highest probability; the fewest of equals."""
        return int(np.nanargmax(self.insertion[1:])) + 1

    @property
    def best_total(self) -> int:
        """How many regions give F its highest value."""
        return int(np.nanargmax(self.total[1:])) + 1

    def highest(self, share: float = 1.0) -> tuple[float, float]:
        """Highest probability of the class among prefixes of at most that share of positions, and the share it takes.

        Where not even the first region is so small, that of the baseline.
        """
        if not (is_number(share) and 0 < share <= 1):
            raise InputError(f"share must lie above 0 and be at most 1, got {share!r}")
        fits = np.flatnonzero((self.share <= share + 1e-9) & np.isfinite(self.insertion))
        at = int(fits[1:][self.insertion[fits[1:]].argmax()]) if len(fits) > 1 else 0
        return float(self.insertion[at]), float(self.share[at])

    def values(self) -> Tensor:
        """Score of each region: m minus its position in the order; 0 for those that were not chosen."""
        scores = torch.zeros(self.regions.n)
        scores[torch.from_numpy(self.order)] = self.regions.n - torch.arange(len(self.order), dtype=torch.float)
        return scores

    def mask(self, n: int | None = None) -> np.ndarray:
        """Positions of the first n regions, bool; by default of `best_prefix`."""
        first = np.zeros(self.regions.n, dtype=bool)
        first[self.order[: self.best_prefix if n is None else n]] = True
        here = self.regions.spread(torch.from_numpy(first).to(self.regions.labels.device))
        return positions_only(here, self.regions.dims)[0].cpu().numpy()


def ranking_of(f: SetFunction, order: Sequence[int], n_forward: int, known: dict[int, Values]) -> Ranking:
    """Order and known prefixes (by their size, one row each) put together."""
    m, classes = f.m, f.ends.shape[1]
    prefix = np.zeros((m + 1, m), dtype=bool)
    for i, r in enumerate(order):
        prefix[i + 1 :, r] = True
    sizes = torch.bincount(f.regions.labels.reshape(-1), minlength=m).cpu().numpy()
    probabilities = np.full((m + 1, classes), np.nan)
    deletion, total, terms = np.full(m + 1, np.nan), np.full(m + 1, np.nan), np.full((m + 1, 4), np.nan)
    for i, v in known.items():
        probabilities[i], deletion[i] = np.exp(v.kept[0]), np.exp(v.removed[0, f.y])
        terms[i], total[i] = v.terms[0], v.total[0]
    share = prefix @ sizes / sizes.sum()
    insertion = probabilities[:, f.y].copy()
    return Ranking(
        np.array(order), n_forward, f.regions, f.y, share, insertion, deletion,
        probabilities.astype(np.float32), terms, total,
    )  # fmt: skip


def _ends(f: SetFunction) -> Asking[dict[int, Values]]:
    """F of the empty set and of all regions, from passes that were made already."""
    both = np.array([[False], [True]]).repeat(f.m, 1)
    certain = yield from f._evidence(both[1:])
    # nothing is certain without evidence
    certain = None if certain is None else np.concatenate([[0.0], certain])
    v = f.values(both, f.ends[::-1], f.ends, certain)
    return {0: _row(v, 0), f.m: _row(v, 1)}


def _row(v: Values, i: int) -> Values:
    s = slice(i, i + 1)
    return Values(v.kept[s], v.removed[s], v.terms[s], v.total[s], v.odds[s])


def greedy(f: SetFunction, k: int | None = None) -> Asking[Ranking]:
    """Append the region that gives the largest F, k times or until all are ranked."""
    return (yield from bidirectional(f, f.m, k))


def bidirectional(f: SetFunction, pending: int = 8, k: int | None = None) -> Asking[Ranking]:
    """Grow the most important regions from the front and the least important ones from the back at once.

    Parameters
    ----------
    f : SetFunction
    pending : int
        How many of the worst candidates for the front are tried at the back, while more than these are left.
    k : int, optional
        Stop after so many regions from the front.
    """
    front: list[int] = []
    back: list[int] = []
    rest = list(range(f.m))
    known = yield from _ends(f)
    while len(rest) > 1 and (k is None or len(front) < k):
        v = yield from f.evaluate(f.each(front, rest))
        a = f.best(v)
        known[len(front) + 1] = _row(v, a)
        gone = [a]
        if len(rest) > pending:
            reach = v.total
            if f.distance is not None:  # diversity is that of the list the region would join
                at_back = effectiveness(f.each(back, rest), f.distance)
                reach = reach + f.weights[3] * (at_back - v.terms[:, 3])
            lowest = np.argsort(reach, kind="stable")[:pending]
            lowest = np.sort(lowest[lowest != a])
            if len(lowest):
                last = f.each(back, [rest[i] for i in lowest])
                w = yield from f.evaluate(last)
                i = f.best(w, -1)
                b = int(lowest[i])
                back.append(rest[b])
                gone.append(b)
                # what is left when the back goes is a prefix: its passes were made, with the roles of the two swapped
                certain = None if f.evidence is None else np.full(1, np.nan)
                known[f.m - len(back)] = f.values(~last[i : i + 1], w.removed[i : i + 1], w.kept[i : i + 1], certain)
        front.append(rest[a])
        rest = [r for i, r in enumerate(rest) if i not in gone]
    if k is None or len(front) < k:
        front += rest
    return ranking_of(f, front + back[::-1], len(front), known)


def lazy(f: SetFunction, k: int | None = None) -> Asking[Ranking]:
    """Greedy search that takes old gains as upper bounds and renews only the largest (CELF).

    Equal to `greedy` where F is submodular. With softmax networks it is not: the order can be another one.
    """
    known = yield from _ends(f)
    v = yield from f.evaluate(f.each([], range(f.m)))
    rows = [_row(v, r) for r in range(f.m)]
    gains = v.total - known[0].total
    order: list[int] = []
    fresh = np.ones(f.m, dtype=bool)
    limit = f.m if k is None else k
    while len(order) < min(limit, f.m):
        r = f.best(v) if not order else int(gains.argmax())
        if len(order) == f.m - 1:
            order.append(r)
            break
        if not fresh[r]:
            renewed = yield from f.evaluate(f.each(order, [r]))
            rows[r], gains[r], fresh[r] = renewed, renewed.total[0] - known[len(order)].total[0], True
            continue
        order.append(r)
        known[len(order)] = rows[r]
        gains[r] = -np.inf
        fresh[:] = False
    return ranking_of(f, order, len(order), known)


def measured(f: SetFunction, order: Sequence[int]) -> Asking[Ranking]:
    """The ranking that an order of all regions is, whatever it comes from: its curves and terms, freshly asked."""
    if sorted(order) != list(range(f.m)):
        raise InputError(f"an order must name each of the {f.m} regions once; got {list(order)}")
    rank = np.argsort(np.array(order))
    v = yield from f.evaluate(rank[None] < np.arange(f.m + 1)[:, None])
    return ranking_of(f, [int(r) for r in order], f.m, {i: _row(v, i) for i in range(f.m + 1)})


def search_passes(
    m: int,
    search: Search = "bidirectional",
    pending: int = 8,
    *,
    k: int | None = None,
    effectiveness: bool = False,
    evidence: bool = False,
) -> int:
    """Passes of a search over m regions, rows of the evidential network included.

    Parameters
    ----------
    m : int
        Regions.
    search : {"greedy", "lazy", "bidirectional"}
        Of lazy search the most that it can cost.
    pending, k, effectiveness, evidence
        As in `LiMA`.

    Notes
    -----
    Each round asks 2 rows for every region left, and 2 for every pending one while more than these are left; a single
    last region is not asked about. To this come 2 for the whole input and the baseline, m for the effectiveness, and,
    with an evidential network, 1 for every subset tried and 1 for the whole input. So greedy search costs m (m + 1).
    Bidirectional search saves a few where the best candidate is also among the worst (ties).
    """
    at_least("m", m, 1)
    left, front, subsets = m, 0, 0
    while left > 1 and (k is None or front < k):
        subsets += left
        both = search == "bidirectional" and left > pending
        subsets += pending if both else 0
        left, front = left - (2 if both else 1), front + 1
    return 2 * subsets + 2 + (m if effectiveness else 0) + (subsets + 1 if evidence else 0)


# ---------------------------------------------------------------- the methods


@dataclass(frozen=True, eq=False, kw_only=True)
class LiMA(Method):
    """Regions ranked by bidirectional greedy search for the subset that carries the class.

    Parameters
    ----------
    regions : int, Tensor or array, optional
        About so many regions (by default 49, fewer where there are not as many positions), a map of labels 0, 1, ...,
        or boolean masks that cover each position once; see `given_regions`.
    division : {"superpixels", "grid", "prior"}, optional
        SLIC superpixels, a grid, or cells in the order of `prior`. By default superpixels of images at the input, else a
        grid: patches, segments of each channel of a series, runs of tokens or of features.
    consistency, collaboration, confidence, effectiveness : float, default 20, 5, 0.01, 0
        Weights of the four terms. The effectiveness grows with the size of the subset, the others lie between 0 and 1.
    search : {"bidirectional", "greedy", "lazy"}, default "bidirectional"
        Lazy search can change the order, as F is not submodular.
    pending : int, default 8
        Candidates tried at the back in each round, at least 2.
    k : int, optional
        Stop after so many regions; the others get 0. Not for bidirectional search, which ranks them all.
    evidence : Network, optional
        Trained with `evidential_loss`: the confidence is then 1 minus its uncertainty; by default it is that of the
        entropy of the network's own answer. Ordinary logits are no evidence.
    features : str, optional
        Site whose activations tell regions apart for the effectiveness; by default the input of the last linear layer,
        and the output where there is none.
    prior : str or Method, default "occlusion"
        Map for ``division="prior"``; a key as in `nissl.attribution.method`.
    cells : int, default 10
        Cells of the prior's grid along each side; cells² of them.
    passes : int, optional
        At most so many passes: regions become fewer until the search costs no more (see `search_passes`). Of a prior the
        map gets a quarter. Regions that were given stay as they are.
    baseline : str, number or Tensor, default "zero"
        What stands in for absent regions, in the space of the network's input: 0 is the mean colour after normalisation,
        for black give that colour.

    Notes
    -----
    F(S) = λ · terms, with p the softmax of the network where everything outside a set is the baseline, and V all
    regions: consistency p_y(S); collaboration 1 - p_y(V without S); confidence 1 - H(p(S)) / ln K; effectiveness, the sum over
    members of the angle / π to the nearest other member, between features of the regions shown alone. A region's score
    is m minus its position in the ranking, at all its positions. `rankings` gives order, curves and terms. The scores
    carry ``insertion``, ``deletion`` (areas over the share of positions, read from the search), ``best_prefix``,
    ``highest`` and ``n_regions``. The insertion is part of what is optimised: judge it by other figures too.

    References
    ----------
    Less is more: efficient black-box attribution via minimal interpretable subset selection (2025).
    """

    regions: int | Tensor | np.ndarray | None = None
    division: Division | None = None
    consistency: float = 20.0
    collaboration: float = 5.0
    confidence: float = 0.01
    effectiveness: float = 0.0
    search: Search = "bidirectional"
    pending: int = 8
    k: int | None = None
    evidence: Network | None = None
    features: str | None = None
    prior: str | Method = "occlusion"
    cells: int = 10
    passes: int | None = None
    baseline: Baseline = "zero"

    name: ClassVar[str] = "lima"
    title: ClassVar[str] = "LiMA"
    paper: ClassVar[str] = "Chen et al. 2025"
    positive: ClassVar[bool] = True
    n_regions: ClassVar[int] = 49

    def __post_init__(self) -> None:
        weights = {t: getattr(self, t) for t in TERMS}
        if not all(is_number(w) and w >= 0 for w in weights.values()) or not any(weights.values()):
            raise InputError(f"weights must be numbers, at least 0 and not all 0; got {weights}")
        if self.search not in get_args(Search):
            raise InputError(f"search={self.search!r}: choose {', '.join(map(repr, get_args(Search)))}")
        if self.division is not None and self.division not in get_args(Division):
            raise InputError(f"division={self.division!r}: choose {', '.join(map(repr, get_args(Division)))}")
        given = isinstance(self.regions, (Tensor, np.ndarray))
        if not given and self.regions is not None:
            at_least("regions", self.regions, 1)
        at_least("pending", self.pending, 2)
        at_least("cells", self.cells, 2)
        for optional in ("k", "passes"):
            if getattr(self, optional) is not None:
                at_least(optional, getattr(self, optional), 1)
        if self.k is not None and self.search == "bidirectional":
            raise InputError(f"k={self.k} stops greedy or lazy search; bidirectional search ranks all regions")
        if self.evidence is not None:
            instance("evidence", self.evidence, Network)
        if self.features is not None:
            instance("features", self.features, str)
        check_baseline(self.baseline)
        if not isinstance(self.prior, (str, Method)):
            raise InputError(f"prior must be a method or its key, got {self.prior!r:.60}")
        if self.division == "prior":
            _method(self.prior)
            if not given and self.regions is not None and self.regions > self.cells**2:
                raise InputError(f"regions={self.regions}, but the prior has {self.cells}² cells: give more cells=")

    def at_budget(self, passes: int) -> LiMA:
        """See `Method.at_budget`."""
        at_least("passes", passes, 1)
        return replace(self, passes=passes if self.passes is None else min(self.passes, passes))

    def cost(self, m: int) -> int:
        """Passes of the search over m regions, without a prior map; see `search_passes`."""
        return search_passes(m, self.search, self.pending, k=self.k, effectiveness=self.effectiveness > 0,
                             evidence=self.evidence is not None)  # fmt: skip

    def explain(self, q: Question) -> Asking[Explained]:
        """See `Method.explain`."""
        ranking = yield from self.rank(q)
        f = ranking.regions
        scores, dims = positions_only(f.spread(ranking.values().to(f.labels.device)), f.dims)
        facts: dict[str, float] = {
            "insertion": ranking.insertion_area,
            "deletion": ranking.deletion_area,
            "best_prefix": float(ranking.best_prefix),
            "highest": ranking.highest()[0],
            "n_regions": float(f.n),
        }
        return explained(q, as_scores(scores, f.labels.float()), dims, **facts)

    def rank(self, q: Question) -> Asking[Ranking]:
        """The ranking of one example: a generator like `explain`."""
        f = yield from self.set_function(q)
        if self.search == "bidirectional":
            return (yield from bidirectional(f, self.pending))
        return (yield from (greedy if self.search == "greedy" else lazy)(f, self.k))

    def set_function(self, q: Question) -> Asking[SetFunction]:
        """F for one example, with its regions divided and the ends of the curves known."""
        if self.evidence is not None and not q.at_input:
            raise InputError(f"evidence= is asked about inputs; it cannot be had at {q.site!r}")
        x = yield from q.value()
        b = yield from baseline_of(self.baseline, q, x)
        regions = yield from self._regions(q, x)
        few = torch.cat([x, b])
        found = []
        for rows in few.split(CHUNK):
            answer = yield q.ask(rows, scalar=False)
            found.append(answer.output)
        output = torch.cat(found)
        y, position, table = class_of(q, output)
        probabilities = bool((table[0] >= 0).all()) and abs(float(table[0].double().sum()) - 1) < 1e-4
        log_p = log_probabilities(output, position, probabilities)
        nothing = log_p[1:].logsumexp(0) - math.log(len(b))
        ends = torch.stack([log_p[0], nothing]).cpu().numpy()
        distance = None
        if self.effectiveness > 0:
            distance = yield from self._distance(q, x, b, regions)
        weights = np.array([getattr(self, t) for t in TERMS], dtype=float)
        return SetFunction(q, x, b, regions, y, position, probabilities, weights, ends, self.evidence, distance)

    def _regions(self, q: Question, x: Tensor) -> Asking[Features]:
        dims, shape = dims_of(q, x), tuple(x.shape[1:])
        if isinstance(self.regions, (Tensor, np.ndarray)):
            given = given_regions(self.regions, dims, shape)
            return replace(given, labels=given.labels.to(x.device))
        positions = math.prod(n for n, r in zip(shape, roles_of(dims), strict=True) if r != "together")
        if self.regions is not None and self.regions > positions and self.passes is None:
            raise InputError(f"regions={self.regions}, but there are only {positions} positions to divide")
        n, most = min(self.regions or self.n_regions, positions), None
        if self.division == "prior":
            n = min(n, self.cells**2)
        if self.passes is not None:
            prior = self.passes // 4 if self.division == "prior" else 0
            most = n
            while most > 1 and self.cost(most) > self.passes - prior:
                most -= 1
            n = most
        if self.division != "prior":
            found = divide(q, x, self.division, n, most)
        else:
            cells = grid(dims, shape, self.cells**2)
            method = _method(self.prior)
            if self.passes is not None:
                method = method.at_budget(max(self.passes // 4, 1))
            scores = yield from method.explain(q.at(q.network, method.differentiates, q.site))
            found = prior_patches(cells, mean_by_cell(scores, cells), -(-cells.n // n))
        return replace(found, labels=found.labels.to(x.device))

    def _distance(self, q: Question, x: Tensor, b: Tensor, regions: Features) -> Asking[np.ndarray]:
        site = self.features or q.network.trace_of(q.ask(scalar=False)).last_linear(q.network)
        found = []
        for few in present_rows(np.eye(regions.n, dtype=bool), len(b)):
            answer = yield q.ask(variants(x, b, regions, few), read=[] if site is None else [site], scalar=False)
            seen = answer.output if site is None else answer.reads[site]
            found.append(seen.reshape(len(few), len(b), -1).double().mean(1))
        return angles(torch.cat(found))

    def rankings(
        self,
        network: Network,
        inputs: Any,
        target: Any = None,
        *,
        orders: Sequence[Sequence[int]] | None = None,
        site: str | None = None,
        seed: int = 0,
        runner: Runner | None = None,
    ) -> list[Ranking]:
        """The whole ranking of each example: order, curves, terms.

        Parameters
        ----------
        network, inputs, target, site, seed, runner
            See `Method.attribute`. For a wrong prediction give the true class: the first regions are then what that
            class rests on, and the last ones what misleads the network.
        orders : sequence of sequences of int, optional
            No search: these orders of the regions, one an example, such as another method's, are measured.
        """

        def ask(q: Question) -> Asking[Ranking]:
            if orders is None:
                return (yield from self.rank(q))
            f = yield from self.set_function(q)
            return (yield from measured(f, orders[q.example]))

        if orders is not None and len(orders) != n_rows(as_inputs(inputs)):
            raise InputError(f"orders are {len(orders)}, one an example is needed")
        return self._drive(ask, network, inputs, target, site, seed, runner)

    def ratios(
        self,
        network: Network,
        inputs: Any,
        target: Any = None,
        *,
        sizes: Sequence[int] = (1, 2, 3, 4),
        site: str | None = None,
        seed: int = 0,
        runner: Runner | None = None,
    ) -> np.ndarray:
        """F of the first regions as a share of the largest F of as many regions, found by trying all.

        Parameters
        ----------
        network, inputs, target, site, seed, runner
            See `Method.attribute`.
        sizes : sequence of int, default (1, 2, 3, 4)
            Numbers of regions; all subsets of these sizes are asked, at most 100,000 an example.

        Returns
        -------
        ndarray (n_examples, n_sizes)
        """
        wanted = items("sizes", sizes)
        if not wanted or not all(is_whole(s) and s >= 1 for s in wanted):
            raise InputError(f"sizes must be whole numbers, at least 1; got {sizes!r}")

        def ask(q: Question) -> Asking[np.ndarray]:
            f = yield from self.set_function(q)
            if max(wanted) > f.m or sum(math.comb(f.m, s) for s in wanted) > 100_000:
                raise InputError(f"all subsets of {list(wanted)} of {f.m} regions cannot be tried: take fewer regions")
            ranking = yield from self.rank(q)
            found = []
            for s in wanted:
                members = np.array(list(combinations(range(f.m), s)))
                kept = np.zeros((len(members), f.m), dtype=bool)
                np.put_along_axis(kept, members, True, axis=1)
                ours = int(np.flatnonzero(kept[:, ranking.order[:s]].all(1))[0])
                totals = []
                for few in np.split(kept, _cuts(len(kept))):
                    v = yield from f.evaluate(few)
                    totals.append(v.total)
                totals = np.concatenate(totals)
                found.append(totals[ours] / totals.max())
            return np.array(found)

        return np.array(self._drive(ask, network, inputs, target, site, seed, runner))

    def _drive(
        self, ask: Any, network: Network, inputs: Any, target: Any, site: Any, seed: int, runner: Any
    ) -> list[Any]:
        runner = Runner() if runner is None else runner
        instance("runner", runner, Runner)
        questions = make_questions(network, inputs, target, seed)
        return runner.collect(
            network, [partial(ask, q.at(network, False, site)) for q in questions], self.title, self.name
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class SMDL(LiMA):
    """Regions from a prior map, ranked by plain greedy search for the subset that carries the class.

    Parameters
    ----------
    regions, search, pending, k, evidence, features, prior, cells, passes, baseline
        See `LiMA`. By default 25 regions of four cells each of a 10 × 10 grid, in the order of an occlusion map.
    division : {"prior", "superpixels", "grid"}, default "prior"
    consistency, collaboration, confidence, effectiveness : float, default 1
        With these weights of the paper the effectiveness outweighs the other terms once many regions are chosen: late
        positions go by diversity. The authors' later code takes 0.05.

    Notes
    -----
    The paper's confidence is that of an evidential network (`evidence`, trained with `evidential_loss`). Where none is
    given it is the entropy's. With regions from a prior, other methods must be ranked on the same regions to be compared.

    References
    ----------
    Less is more: fewer interpretable region via submodular subset selection (2024).
    """

    division: Division | None = "prior"
    consistency: float = 1.0
    collaboration: float = 1.0
    confidence: float = 1.0
    effectiveness: float = 1.0
    search: Search = "greedy"

    name: ClassVar[str] = "smdl"
    title: ClassVar[str] = "SMDL"
    paper: ClassVar[str] = "Chen et al. 2024"
    n_regions: ClassVar[int] = 25


# ---------------------------------------------------------------- what is read from rankings


def average_highest_confidence(
    rankings: Sequence[Ranking], shares: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
) -> tuple[np.ndarray, np.ndarray]:
    """Mean highest probability of the class that small parts of the inputs give, and the mean share of positions it takes.

    For wrong predictions, ranked for the true class: what part of the input would have been recognised.

    Parameters
    ----------
    rankings : sequence of Ranking
    shares : sequence of float
        The largest part of the positions allowed.

    Returns
    -------
    highest, share : ndarray (n_shares,)
    """
    if not len(rankings):
        raise InputError("no ranking was given")
    found = np.array([[r.highest(s) for s in shares] for r in rankings])
    return found[..., 0].mean(0), found[..., 1].mean(0)


def plot_ranking(ranking: Ranking, image: Any = None, other: int | None = None, axes: Any = None) -> Any:
    """Picture of a ranking: the regions of `best_prefix` on the image, and the curves.

    Parameters
    ----------
    ranking : Ranking
        Of an image.
    image : array (y, x, 3) or (y, x), optional
    other : int, optional
        A second class whose probability is drawn along the insertion, such as the wrong prediction.
    axes : pair of matplotlib Axes, optional
    """
    import matplotlib.pyplot as plt

    rank = positions_only(ranking.regions.spread(ranking.values()), ranking.regions.dims)[0].cpu().numpy()
    if rank.ndim != 2:
        raise InputError(f"only rankings over images can be shown; here are dimensions {ranking.regions.dims}")
    if axes is None:
        _, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    left, right = axes
    if image is None:
        left.imshow(rank, cmap="viridis")
    else:
        left.imshow(image, cmap="gray" if np.ndim(image) == 2 else None)
        left.imshow(np.where(ranking.mask(), np.nan, 1.0), cmap="gray", alpha=0.75, vmin=0, vmax=1)
    left.contour(ranking.mask(), levels=[0.5], colors="#d55e00", linewidths=1)
    left.set_title(f"{ranking.best_prefix} of {ranking.regions.n} regions: p = {ranking.insertion.max():.2f}")
    left.set_axis_off()
    right.plot(ranking.share, ranking.insertion, color="#0072b2", label="insertion")
    right.plot(ranking.share, ranking.deletion, color="#d55e00", label="deletion")
    if other is not None:
        right.plot(ranking.share, ranking.probabilities[:, other], color="#7f7f7f", label=f"class {other}, insertion")
    right.set_xlabel("share of the positions")
    right.set_ylabel("probability")
    right.set_ylim(0, 1.02)
    right.legend(frameon=False)
    return axes


# ---------------------------------------------------------------- odds and ends


def class_of(q: Question, output: Tensor) -> tuple[int, int | None, Tensor]:
    """The class that is explained, the step of the output where it is, and the table (n, K) of outputs.

    Raises
    ------
    TargetError
        A target that is no class, or an output that is no table of at least two of them.
    """
    t = q.target
    kinds = {"class_logit": 1, "probability": 1, "log_probability": 1, "top_class": 0}
    if t.site is not None or t.name not in kinds:
        raise TargetError(
            f"subsets are searched for by the probability of a class; the target is {t.name!r}: give a class"
        )
    position = int(t.values[-1][0]) if len(t.values) > kinds[t.name] else None
    if output.ndim != (2 if position is None else 3):
        raise TargetError(f"a class needs an output (n_rows, n_classes), this one has the shape {tuple(output.shape)}")
    table = output if position is None else output[:, position]
    if table.shape[1] < 2:
        raise TargetError("the network has one output: its softmax is always 1, so no subset can be told from another")
    y = int(table[0].argmax()) if t.name == "top_class" else int(t.values[0][0])
    if not 0 <= y < table.shape[1]:
        raise TargetError(f"target class {y} does not exist: the output has {table.shape[1]} classes")
    return y, position, table


def _method(prior: Any) -> Method:
    from nissl.attribution import method  # the package imports this file

    return method(prior)


def _cuts(n: int, size: int = 1024) -> list[int]:
    return list(range(size, n, size))
