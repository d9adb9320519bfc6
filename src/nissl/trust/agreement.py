"""How far score maps of different methods agree, example by example.

Agreement is no evidence of truth: methods can agree and all be wrong. It says which methods are interchangeable.
Maps are compared as they are: whether signs count is decided by the caller, who takes absolute values or not, and maps
of different resolution are resized by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.stats import kendalltau, rankdata, weightedtau
from skimage.metrics import structural_similarity

from nissl.arguments import at_least, flag, is_number, is_whole
from nissl.attribution import Method, method
from nissl.errors import InputError
from nissl.network import Network
from nissl.runner import Explained, Runner
from nissl.trust.check import positions


def kendall(a: Any, b: Any, max_entries: int = 10_000, seed: int = 0) -> np.ndarray:
    """Kendall's rank correlation (tau-b, ties handled), in O(d log d) for d entries.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps; each example is flattened to its d entries.
    max_entries : int, default 10000
        Longer maps are compared at this many places, drawn once without replacement with `seed`, the same for all
        examples. The standard error that this adds is at most √(2 / `max_entries`), .014 by default.
    seed : int, default 0

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant (at the places drawn).

    Raises
    ------
    InputError
        Shapes that differ, or scores that are not finite.

    References
    ----------
    Kendall, M. G. (1945). The treatment of ties in ranking problems. Biometrika 33, 239-251.
    Neely, M. et al. (2022). A song of (dis)agreement. arXiv:2205.04559.
    """
    first, second = _pair(a, b)
    at_least("max_entries", max_entries, 2)
    at_least("seed", seed, 0)
    d = first.shape[1]
    if d > max_entries:
        places = np.random.default_rng(seed).choice(d, size=max_entries, replace=False)
        first, second = first[:, places], second[:, places]
    elif d < 2:
        return np.full(len(first), np.nan)
    pairs = zip(first, second, strict=True)
    return np.array([kendalltau(x, y)[0] for x, y in pairs], dtype=np.float64)


def spearman(a: Any, b: Any) -> np.ndarray:
    """Spearman's rank correlation: the correlation of the ranks, ties at their mean rank.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, or scores that are not finite.
    """
    first, second = _pair(a, b)
    return np.einsum("nd,nd->n", _unit_ranks(first), _unit_ranks(second)).clip(-1.0, 1.0)


def pearson(a: Any, b: Any) -> np.ndarray:
    """Pearson's correlation of the scores themselves.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, or scores that are not finite.
    """
    first, second = _pair(a, b)
    return np.einsum("nd,nd->n", _unit_scores(first), _unit_scores(second)).clip(-1.0, 1.0)


def kendall_top_k(a: Any, b: Any, k: Any = 0.25, penalty: float = 0.5) -> np.ndarray:
    """Kendall's distance of the k best of two maps, ties handled, as a coefficient.

    Equal scores share a bucket, and the top of a map are the entries in its k best buckets: with ties these may be more
    than k. Every unordered pair of an entry in the top of `a` and one in the top of `b` costs 1 where the two maps rank
    it in opposite orders, `penalty` where it is tied in exactly one of them, and nothing otherwise. The coefficient is
    1 − 2 · (mean cost).

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.
    k : float in (0, 1), int, array of int (n_examples,) or None, default 0.25
        A share of the entries, max(1, floor(share · d)); a number, the same for all examples or one for each; or None
        for all entries. See `nonzero_k` for maps that are mostly zero.
    penalty : float in [0, 1], default 0.5
        For a pair that is tied in one map.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]. Defined for constant maps too: all pairs are tied there, so two constant maps reach 1. Also 1 where
        there is no pair, as when both maps have the same single best entry.

    Raises
    ------
    InputError
        Shapes that differ, scores that are not finite, parameters out of range, or over 4,096 entries in the two tops
        of an example.

    References
    ----------
    Fagin, R., Kumar, R., Mahdian, M., Sivakumar, D., Vee, E. (2004). Comparing and aggregating rankings with ties.
    Neely, M. et al. (2022). A song of (dis)agreement. arXiv:2205.04559.
    """
    first, second = _pair(a, b)
    if not (is_number(penalty) and 0 <= penalty <= 1):
        raise InputError(f"penalty must lie in [0, 1], got {penalty!r}")
    limits = _limits(k, *first.shape).tolist()
    return np.array([_top_tau(*pair, penalty) for pair in zip(first, second, limits, strict=True)], dtype=np.float64)


def nonzero_k(a: Any, b: Any) -> np.ndarray:
    """How many entries of both maps are not zero, the smaller number of the two and at least 1: a `k` for `kendall_top_k`.

    As it differs between pairs of methods, pairs that are to be compared with each other need one k: for instance the
    mean over the pairs with the sparsest method, rounded down.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)

    Returns
    -------
    ndarray of int, shape (n_examples,)
    """
    first, second = _pair(a, b)
    return np.minimum((first != 0).sum(axis=1), (second != 0).sum(axis=1)).clip(1)


def weighted_tau(a: Any, b: Any, exponent: float = 1.0) -> np.ndarray:
    """Kendall's correlation in which exchanges at the top weigh more.

    A pair weighs 1 / (r + 1)^`exponent` + 1 / (s + 1)^`exponent`, r and s the ranks of its entries from 0, the highest
    first; the mean of ranking by `a` and by `b`.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.
    exponent : float, default 1
        At least 0; 0 is Kendall's tau-b.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, scores that are not finite, or an exponent out of range.

    References
    ----------
    Vigna, S. (2015). A weighted correlation index for rankings with ties. WWW.
    """
    first, second = _pair(a, b)
    if not (is_number(exponent) and exponent >= 0):
        raise InputError(f"exponent must be a number, at least 0; got {exponent!r}")

    def weigher(rank: int) -> float:
        return float((rank + 1.0) ** -exponent)

    varies = (np.ptp(first, axis=1) > 0) & (np.ptp(second, axis=1) > 0)
    found = np.full(len(first), np.nan)
    for i in np.flatnonzero(varies):
        found[i] = weightedtau(first[i], second[i], weigher=None if exponent == 1 else weigher)[0]
    return found


def tau_ap(a: Any, b: Any) -> np.ndarray:
    """Average-precision correlation: Kendall's correlation that asks, entry by entry, for what stands above it.

    For each entry of one map that has others above it, the share of those that the other map puts above it too minus
    the share that it puts below (ties count nothing); averaged over these entries, and over both directions.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, scores that are not finite, or over 4,096 entries.

    References
    ----------
    Yilmaz, E., Aslam, J., Robertson, S. (2008). A new rank correlation coefficient for information retrieval. SIGIR.
    Urbano, J., Marrero, M. (2017). The treatment of ties in AP correlation. ICTIR.
    """
    first, second = _pair(a, b)
    _few(first.shape[1])
    found = np.full(len(first), np.nan)
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        order_x, order_y = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
        same = order_x * order_y
        directions = []
        for order in (order_x, order_y):
            above = order < 0
            count = above.sum(axis=1)
            asked = count > 0
            if asked.any():
                directions.append(np.mean((same * above).sum(axis=1)[asked] / count[asked]))
        if len(directions) == 2:
            found[i] = np.mean(directions)
    return found


def top_k(a: Any, b: Any, fraction: float = 0.1) -> np.ndarray:
    """Intersection over union of the entries with the highest scores.

    Each map marks its k = max(1, floor(`fraction` · d)) highest entries. Entries tied at the limit share the places
    left over equally, so the result depends on no order of entries: with w the resulting weights in [0, 1], it is
    Σ min(w_a, w_b) / Σ max(w_a, w_b). Without ties that is the intersection over union of two sets of k entries. Two
    unrelated maps reach about `fraction` / (2 − `fraction`), .05 by default.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, ...)
        Score maps.
    fraction : float, default 0.1
        Share of entries that are marked, in (0, 1].

    Returns
    -------
    ndarray, shape (n_examples,)
        In [0, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Shapes that differ, scores that are not finite, or a fraction out of range.
    """
    first, second = _pair(a, b)
    if not (is_number(fraction) and 0 < fraction <= 1):
        raise InputError(f"fraction must lie in (0, 1], got {fraction!r}")
    w_a, w_b = _top_weights(first, fraction), _top_weights(second, fraction)
    return np.minimum(w_a, w_b).sum(axis=1) / np.maximum(w_a, w_b).sum(axis=1)


def ssim(a: Any, b: Any, window: int = 7) -> np.ndarray:
    """Structural similarity of two-dimensional maps, each scaled to [0, 1] by its own minimum and maximum.

    Parameters
    ----------
    a, b : array_like, shape (n_examples, height, width)
        Score maps.
    window : int, default 7
        Side of the window in entries, odd. Smaller maps get the largest odd window that fits.

    Returns
    -------
    ndarray, shape (n_examples,)
        In [-1, 1]; NaN where a map is constant.

    Raises
    ------
    InputError
        Maps that are not two-dimensional or smaller than 3 × 3, shapes that differ, scores that are not finite, or a
        window that is even or below 3.

    References
    ----------
    Wang, Z. et al. (2004). Image quality assessment. IEEE Trans. Image Process. 13, 600-612.
    """
    shape = _array(a, "a").shape
    if len(shape) != 3 or min(shape[1:]) < 3:
        raise InputError(f"SSIM needs maps (n_examples, height, width) of at least 3 × 3, got the shape {shape}")
    if not is_whole(window) or window < 3 or window % 2 == 0:
        raise InputError(f"window must be odd and at least 3, got {window}")
    first, second = _pair(a, b)
    smaller = min(shape[1:])
    side = min(window, smaller if smaller % 2 else smaller - 1)
    images = zip(_unit_range(first).reshape(shape), _unit_range(second).reshape(shape), strict=True)
    return np.array(
        [
            np.nan
            if np.isnan(x).any() or np.isnan(y).any()
            else structural_similarity(x, y, win_size=side, data_range=1.0)
            for x, y in images
        ],
        dtype=np.float64,
    )


MEASURES: dict[str, Callable[[Any, Any], np.ndarray]] = {
    "spearman": spearman,
    "kendall": kendall,
    "pearson": pearson,
    "kendall-top-k": kendall_top_k,
    "weighted-tau": weighted_tau,
    "tau-ap": tau_ap,
    "top-k": top_k,
    "ssim": ssim,
}
"""Measures by name. Each takes two stacks of maps (n_examples, ...) and gives (n_examples,)."""


def agreement(maps: Mapping[str, Any], measure: str | Callable[[Any, Any], np.ndarray] = "spearman") -> xr.DataArray:
    """Agreement of every pair of methods on every example.

    Parameters
    ----------
    maps : mapping of method name to array_like, each of shape (n_examples, ...)
    measure : {"spearman", "kendall", "pearson", "kendall-top-k", "weighted-tau", "tau-ap", "top-k", "ssim"} or callable
        Default "spearman".
        A symmetric function of two stacks of maps that gives one number per example, such as
        ``functools.partial(top_k, fraction=0.05)``.

    Returns
    -------
    DataArray, dims ("example", "method_a", "method_b")
        Symmetric in the methods. NaN, also on the diagonal, where a map is constant.

    Raises
    ------
    InputError
        No maps, an unknown measure, shapes that differ between methods, or scores that are not finite.

    See Also
    --------
    agreement_matrix : the mean over examples.
    """
    if not isinstance(maps, Mapping):
        raise InputError(f"maps must be a mapping of method names to arrays, got {type(maps).__name__}")
    if not maps:
        raise InputError("maps are empty: agreement needs at least one method")
    if isinstance(measure, str) and measure not in MEASURES:
        raise InputError(f"unknown measure {measure!r}; there are {', '.join(MEASURES)}")
    if not isinstance(measure, str) and not callable(measure):
        raise InputError(f"measure must be a name or a function of two stacks of maps, got {measure!r:.60}")
    names = list(maps)
    stacks = {name: _array(stack, f"maps of {name!r}") for name, stack in maps.items()}
    shapes = {name: stack.shape for name, stack in stacks.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"maps differ in shape: {shapes}; resize them first")
    for name, stack in stacks.items():
        _flat(stack, f"maps of {name!r}")
    n_examples = len(stacks[names[0]])

    if measure == "spearman":
        # Ranks once for each map, then all pairs in one matrix product per example.
        ranks = np.stack([_unit_ranks(_flat(stack, name)) for name, stack in stacks.items()], axis=1)
        values = (ranks @ ranks.transpose(0, 2, 1)).clip(-1.0, 1.0)
    elif measure == "kendall" and _flat(stacks[names[0]], names[0]).shape[1] <= 256:
        # For short maps tau-b of all pairs of methods is one product too: of the orders of all pairs of entries.
        flat = np.stack([_flat(stack, name) for name, stack in stacks.items()], axis=1)
        values = np.stack([_unit_orders(x) @ _unit_orders(x).T for x in flat]).clip(-1.0, 1.0)
    else:
        compare = MEASURES[measure] if isinstance(measure, str) else measure
        values = np.empty((n_examples, len(names), len(names)))
        for i, j in combinations_with_replacement(range(len(names)), 2):
            found = np.asarray(compare(stacks[names[i]], stacks[names[j]]))
            if found.shape != (n_examples,):
                raise InputError(
                    f"measure must give one number an example, shape ({n_examples},); it gave {found.shape}"
                )
            values[:, i, j] = values[:, j, i] = found
    return xr.DataArray(
        values,
        dims=("example", "method_a", "method_b"),
        coords={"method_a": names, "method_b": names},
        name=measure if isinstance(measure, str) else "agreement",
    )


def agreement_matrix(
    maps: Mapping[str, Any], measure: str | Callable[[Any, Any], np.ndarray] = "spearman"
) -> pd.DataFrame:
    """Mean agreement over the examples on which it is defined, methods × methods.

    Parameters and errors are those of `agreement`, whose values show how many examples stand behind a mean and how much
    they differ.

    Returns
    -------
    DataFrame, index and columns the methods
        NaN where a pair is defined on no example.
    """
    values = agreement(maps, measure)
    names = list(maps)
    present = values.notnull()
    total, count = values.fillna(0.0).sum("example").to_numpy(), present.sum("example").to_numpy()
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return pd.DataFrame(mean, index=names, columns=names)


def compare_maps(
    maps: Mapping[str, Any],
    measures: Any = ("kendall",),
    *,
    mask: Any = None,
    truth: Any = None,
) -> xr.Dataset:
    """Agreement of every pair of methods by several measures, with its spread, beside the truth where it is known.

    Parameters
    ----------
    maps : mapping of method name to array_like, each of shape (n_examples, ...)
    measures : sequence of names, or mapping of name to callable, default ("kendall",)
        See `agreement`.
    mask : array_like of bool, shape of a map, optional
        Which entries are ranked; False leaves out, for instance, padding. Examples may differ in number.
    truth : array_like, shape of a map, optional
        How much each entry truly matters. Maps are compared with it as with another method.

    Returns
    -------
    Dataset
        ``value`` (measure, example, method_a, method_b); over the examples on which it is defined ``mean``, ``sd``
        (of n - 1), and the numbers ``defined`` and ``undefined`` of examples (method_a, method_b, measure). With a
        truth also ``truth_value`` (measure, example, method_a), ``truth_mean``, ``truth_sd``, ``truth_undefined``
        (method_a, measure).

    Raises
    ------
    InputError
        As `agreement`; a mask or truth of another shape, an example without any entry.

    Notes
    -----
    A measure is undefined where one map is constant, as under uniform attention. Such examples are counted in
    ``undefined``; they are left out of means and never taken for 0.
    """
    if not isinstance(maps, Mapping) or not maps:
        raise InputError("maps must be a mapping of method names to arrays, with at least one method")
    table = _measures(measures)
    stacks = {name: _array(stack, f"maps of {name!r}") for name, stack in maps.items()}
    key = "truth"
    while key in stacks:
        key += "_"
    if truth is not None:
        stacks[key] = _array(truth, "truth")
    shape = next(iter(stacks.values())).shape
    for name, stack in stacks.items():
        if stack.shape != shape or stack.ndim < 2:
            raise InputError(
                f"maps must have one shape (n_examples, ...): {name!r} has {stack.shape}, the first {shape}"
            )
    keep = np.ones(shape, bool) if mask is None else np.asarray(mask)
    if keep.dtype != bool or keep.shape != shape:
        raise InputError(f"mask must be bool of shape {shape}, got {keep.dtype} of shape {keep.shape}")
    keep = keep.reshape(len(keep), -1)
    counts = keep.sum(axis=1)
    if not counts.all():
        raise InputError(f"mask leaves nothing to rank in examples {np.flatnonzero(counts == 0)[:10].tolist()}")
    names = list(stacks)
    values = np.full((len(table), shape[0], len(names), len(names)), np.nan)
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        some = {n: v.reshape(shape[0], -1)[rows][keep[rows]].reshape(len(rows), count) for n, v in stacks.items()}
        for m, measure in enumerate(table.values()):
            values[m, rows] = agreement(some, measure).to_numpy()
    methods = list(maps)
    n = len(methods)
    variables: dict[str, Any] = {"value": (("measure", "example", "method_a", "method_b"), values[:, :, :n, :n])}
    pairs = ("method_a", "method_b", "measure")
    for name, array in _summary(values[:, :, :n, :n]).items():
        variables[name] = (pairs, array)
    if truth is not None:
        variables["truth_value"] = (("measure", "example", "method_a"), values[:, :, :n, n])
        for name, array in _summary(values[:, :, :n, n]).items():
            if name != "defined":
                variables[f"truth_{name}"] = (("method_a", "measure"), array)
    return xr.Dataset(variables, {"method_a": methods, "method_b": methods, "measure": list(table)})


@dataclass(frozen=True, eq=False)
class AttributionAgreement:
    """How far attribution methods rank the positions of the same examples alike, and how far each is from the truth.

    Agreement is no evidence of truth. Where the truth is known, it stands beside every figure.

    Parameters
    ----------
    methods : mapping of name to Method or specification, or sequence of them
        Such as ``["ig", "lime(baseline=0)", "rollout"]``.
    measures : sequence of names, or mapping of name to callable, default ("kendall",)
        See `agreement`.
    signed : bool, default False
        Rank scores by their sign too. Otherwise by size, as in the paper, because attention has no sign.

    References
    ----------
    Neely, M., Schouten, S. F., Bleeker, M., Lucic, A. (2022). A song of (dis)agreement: evaluating the evaluation of
    explainable artificial intelligence in natural language processing. arXiv:2205.04559.
    """

    methods: Any
    measures: Any = ("kendall",)
    signed: bool = False

    def __post_init__(self) -> None:
        self._table()
        _measures(self.measures)
        flag("signed", self.signed)

    def _table(self) -> dict[str, Method]:
        if isinstance(self.methods, Mapping):
            table = {str(name): method(m) for name, m in self.methods.items()}
        elif isinstance(self.methods, Sequence) and not isinstance(self.methods, str):
            table = {m if isinstance(m, str) else m.name: method(m) for m in self.methods}
            if len(table) < len(self.methods):
                raise InputError("two of the methods have one name: give a mapping of name to method")
        else:
            raise InputError(f"methods must be a mapping or a sequence, got {type(self.methods).__name__}")
        if not table:
            raise InputError("methods are empty: agreement needs at least one")
        return table

    def evaluate(
        self,
        network: Network,
        inputs: Any,
        target: Any = None,
        *,
        site: str | None = None,
        mask: Any = None,
        truth: Any = None,
        rerun: bool = False,
        seed: int = 0,
        runner: Runner | None = None,
    ) -> xr.Dataset:
        """Explain the examples by every method and compare.

        Parameters
        ----------
        network : Network
        inputs : Tensor, array, tuple or mapping
            Examples first.
        target : Target, class indices, callable or None
            What is explained; None is the class that the network predicts for each example, as in the paper.
        site : str, optional
            Where scores are wanted; by default at the input.
        mask : array_like of bool, shape (n_examples, positions...), optional
            Positions that are ranked; leave padding out.
        truth : array_like, shape (n_examples, positions...), optional
            How much each position truly matters; compared as scores are, by its size unless `signed`.
        rerun : bool, default False
            Explain everything twice, with `seed` and `seed` + 1: how far a method that draws random numbers agrees with
            itself is the most that it can agree with another. Twice the cost.
        seed : int, default 0
        runner : Runner, optional

        Returns
        -------
        Dataset
            As of `compare_maps`, and with `rerun` the variables ``ceiling_mean`` and ``ceiling_sd`` (method_a,
            measure). ``scores`` (method_a, example, positions...) holds what was ranked.

        Raises
        ------
        InputError
            Methods whose scores do not lie on the same positions; as `compare_maps` and `Runner.attribute`.
        """
        flag("rerun", rerun)
        table = self._table()
        runner = Runner() if runner is None else runner
        maps, dims = self._maps(table, runner, network, inputs, target, site, seed)
        if truth is not None:
            truth = _array(truth, "truth") if self.signed else np.abs(_array(truth, "truth"))
        found = compare_maps(maps, self.measures, mask=mask, truth=truth)
        found["scores"] = (("method_a", "example", *dims), np.stack(list(maps.values())))
        if rerun:
            again, _ = self._maps(table, runner, network, inputs, target, site, seed + 1)
            pairs = [
                compare_maps({"first": maps[name], "second": again[name]}, self.measures, mask=mask).sel(
                    method_a="first", method_b="second", drop=True
                )
                for name in table
            ]
            both = xr.concat([p[["mean", "sd"]] for p in pairs], dim="method_a").transpose("method_a", "measure")
            found["ceiling_mean"] = (("method_a", "measure"), both["mean"].to_numpy())
            found["ceiling_sd"] = (("method_a", "measure"), both["sd"].to_numpy())
        found.attrs = {"network": network.name, "seed": seed, "signed": int(self.signed)}
        return found

    def _maps(
        self, table: dict[str, Method], runner: Runner, network: Network, inputs: Any, target: Any, site: Any, seed: int
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """One score a position for each method, and the names of the positions' dimensions."""
        scores = runner.attribute(table, network, inputs, target, site=site, seed=seed)
        maps = {}
        for name, s in scores.items():
            values, dims = torch.from_numpy(np.asarray(s.values)), tuple(str(d) for d in s.dims[1:])
            rows = np.stack([positions(Explained(v, dims)).double().numpy() for v in values])
            maps[name] = rows if self.signed else np.abs(rows)
        shapes = {name: m.shape for name, m in maps.items()}
        if len(set(shapes.values())) > 1:
            raise InputError(
                f"the scores of methods lie on different positions: {shapes}; name a site, or choose others"
            )
        known = {"channel", "unit"} if len(next(iter(maps.values())).shape) < scores[name].ndim else set()
        return maps, tuple(str(d) for d in scores[name].dims[1:] if d not in known)


def _measures(measures: Any) -> dict[str, Any]:
    """Names and what `agreement` takes for them."""
    if isinstance(measures, str):
        measures = (measures,)
    if isinstance(measures, Mapping):
        table = dict(measures)
    elif isinstance(measures, Sequence):
        table = {m: m for m in measures}
    else:
        raise InputError(f"measures must be names, or a mapping of name to function; got {type(measures).__name__}")
    if not table:
        raise InputError("measures are empty: name at least one")
    for name, measure in table.items():
        if not callable(measure) and measure not in MEASURES:
            raise InputError(f"unknown measure {name!r}; there are {', '.join(MEASURES)}")
    return table


def _summary(values: np.ndarray) -> dict[str, np.ndarray]:
    """Of values (measure, example, ...) over the examples on which they are defined; measures last."""
    there = ~np.isnan(values)
    n = there.sum(axis=1)
    mean = np.divide(np.where(there, values, 0).sum(axis=1), n, out=np.full(n.shape, np.nan), where=n > 0)
    squares = np.where(there, values - mean[:, None], 0) ** 2
    variance = np.divide(squares.sum(axis=1), n - 1, out=np.full(n.shape, np.nan), where=n > 1)
    found = {"mean": mean, "sd": np.sqrt(variance), "defined": n, "undefined": values.shape[1] - n}
    return {name: np.moveaxis(array, 0, -1) for name, array in found.items()}


def _limits(k: Any, n: int, d: int) -> np.ndarray:
    """How many buckets are the top of each of n examples with d entries."""
    if k is None:
        return np.full(n, d)
    if is_number(k) and not is_whole(k):
        if not 0 < k < 1:
            raise InputError(f"k as a share must lie between 0 and 1, got {k!r}; give a whole number or None for all")
        return np.full(n, max(1, int(k * d + 1e-9)))
    limits = np.asarray(k)
    if limits.dtype.kind not in "iu" or limits.shape not in ((), (n,)) or (limits < 1).any():
        raise InputError(
            f"k must be a share, a whole number of at least 1, or one for each of {n} examples; got {k!r:.60}"
        )
    return np.broadcast_to(limits, (n,))


def _top_tau(x: np.ndarray, y: np.ndarray, k: int, penalty: float) -> float:
    """Coefficient of one pair of maps; see `kendall_top_k`."""
    in_x, in_y = (v >= np.unique(v)[-k:][0] for v in (x, y))
    either = np.flatnonzero(in_x | in_y)
    _few(len(either))
    x, y, in_x, in_y = x[either], y[either], in_x[either], in_y[either]
    counted = np.triu((in_x[:, None] & in_y) | (in_y[:, None] & in_x), 1)
    n = max(int(counted.sum()), 1)
    order_x, order_y = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    opposite = order_x * order_y < 0
    tied_once = (order_x == 0) != (order_y == 0)
    cost = (opposite[counted].sum() + penalty * tied_once[counted].sum()) / n
    return float(1 - 2 * cost)


def _few(entries: int) -> None:
    if entries > 4096:
        raise InputError(f"all pairs of {entries} entries are too many: give a smaller k, smaller maps, or use kendall")


def _flat(values: Any, name: str) -> np.ndarray:
    """One row of finite float64 scores for each example."""
    x = _array(values, name)
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"{name} must have the shape (n_examples, ...) with entries, got {x.shape}")
    if not np.isfinite(x).all():
        raise InputError(f"{name}: {int((~np.isfinite(x)).sum())} scores are NaN or infinite")
    return x.reshape(len(x), -1)


def _array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be numbers: {error}") from error


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two stacks of maps of one shape, flattened."""
    a, b = _array(a, "a"), _array(b, "b")
    if a.shape != b.shape:
        raise InputError(f"maps differ in shape: {a.shape} and {b.shape}; resize them first")
    return _flat(a, "a"), _flat(b, "b")


def _unit_ranks(x: np.ndarray) -> np.ndarray:
    """Ranks of each row, centred and of norm 1, so that a dot product is Spearman's correlation. NaN if constant."""
    centred = rankdata(x, axis=1) - (x.shape[1] + 1) / 2
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norm, out=np.full(x.shape, np.nan), where=norm > 0)


def _unit_orders(x: np.ndarray) -> np.ndarray:
    """Signs of the differences of all pairs of entries of each row, of norm 1: a dot product is tau-b. NaN if constant."""
    i, j = np.triu_indices(x.shape[1], 1)
    orders = np.sign(x[:, i] - x[:, j])
    norm = np.sqrt((orders != 0).sum(axis=1, keepdims=True))
    return np.divide(orders, norm, out=np.full(orders.shape, np.nan), where=norm > 0)


def _unit_scores(x: np.ndarray) -> np.ndarray:
    """Each row centred and of norm 1. NaN if constant."""
    centred = x - x.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    varies = (np.ptp(x, axis=1, keepdims=True) > 0) & (norm > 0)
    return np.divide(centred, norm, out=np.full(x.shape, np.nan), where=varies)


def _unit_range(x: np.ndarray) -> np.ndarray:
    """Each row scaled to [0, 1]. NaN if constant."""
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    return np.divide(x - low, high - low, out=np.full(x.shape, np.nan), where=high > low)


def _top_weights(x: np.ndarray, fraction: float) -> np.ndarray:
    """Weight of each entry among the k highest of its row: 1, 0, or an equal share for ties at the limit."""
    d = x.shape[1]
    k = max(1, int(fraction * d + 1e-9))
    limit = np.partition(x, d - k, axis=1)[:, d - k, None]
    above, tied = x > limit, x == limit
    share = (k - above.sum(axis=1, keepdims=True)) / tied.sum(axis=1, keepdims=True)
    weights = above + tied * share
    weights[x.min(axis=1) == x.max(axis=1)] = np.nan
    return weights
