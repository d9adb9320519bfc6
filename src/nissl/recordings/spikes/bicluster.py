"""Bi-clustering of spike counts: neurons into groups that one latent path drives, bins into states of one linear dynamics.

The number of groups and of states is inferred by a Gibbs sampler (`nissl.recordings.spikes.gibbs`). One sweep draws Pólya-Gamma
variables, all paths at once, the states and dynamics of a sticky HDP-HMM, each neuron's loading and dispersion, and the groups of a
mixture of finite mixtures. Its cost is linear in neurons × bins.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment, minimize_scalar
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from nissl.arguments import at_least, flag, is_number
from nissl.errors import InputError
from nissl.recordings.arrays import as_bins
from nissl.recordings.extras import need
from nissl.recordings.spikes.gibbs import START_CLUSTERS, Chain, choose_labels, smoothed, start_labels
from nissl.recordings.spikes.partitions import max_pear, similarity
from nissl.recordings.spikes.polya_gamma import log_likelihood
from nissl.runner.runner import progress_bar

POISSON = 100.0
"""Dispersion that stands for Poisson counts: their variance is mean (1 + mean / 100). With a larger one the chain moves too slowly."""
PATHS = 200
"""Draws of paths that are kept, over all chains."""
LEAST_BINS = 10
TRACES = ("log_likelihood_trace", "n_clusters_trace", "n_states_trace")


class BiClustering(BaseEstimator):
    """Groups of neurons and states of time, by a Bayesian model of counts with latent paths [1]_.

    The log-rate of neuron i of group j in bin t is ``d[i] + mu[j, t] + c[i] x[j, t]``. The paths of all groups together follow
    ``h[t] = A[s] h[t-1] + b[s] + N(0, Q[s])``, where s = ``s[t]`` is the state of the bin; one sequence of states for all groups.

    Parameters
    ----------
    n_latent : int, default 2
        Dimensions of x, the path of a group beside its mean course mu.
    max_states : int, default 10
        States of the weak limit of the HDP; 1 has no states.
    max_clusters : int, optional
        Largest number of groups; half the neurons by default; 1 has no groups.
    likelihood : {"negbin", "poisson"}, default "negbin"
        Counts are negative binomial, each neuron with a dispersion of its own, or of dispersion `POISSON`.
    n_iter : int, default 1000
        Sweeps of each chain.
    burn_in : float, default 0.25
        Share of the sweeps that is left out.
    thin : int, default 1
        Every so many sweeps are kept.
    n_chains : int, default 2
    init : {"waic", "kmeans", "one"}, default "waic"
        Where chains start: at the groups that short chains end at, from k-means with the fewest groups, 1 to 8, that predict as well as
        any; at 8 groups of k-means; or with all neurons in one. Expectation-maximisation comes between.
    cluster_prior : float, default 0.2
        The number of components is geometric with this chance to stop.
    holdout : float, default 0.0
        Share of the counts that is hidden from the chains, for `heldout_loglik_`. Counts that are NaN are hidden always.
    random_state : int, RandomState or None, default 0
        The same number gives the same chains.
    progress : bool, default True
        Show progress when a fit takes over two seconds.

    Attributes
    ----------
    neuron_labels_, state_labels_ : arrays of int (n_neurons,), (n_bins,)
        The partitions of largest posterior expected adjusted Rand index.
    neuron_similarity_, state_similarity_ : arrays (n_neurons, n_neurons), (n_bins, n_bins)
        Share of draws in which two are together.
    n_clusters_trace_, n_states_trace_, log_likelihood_trace_ : arrays (n_chains, n_draws)
    rate_ : array (n_bins, n_neurons)
        Posterior mean of the expected count, also where counts are missing.
    dispersion_ : array (n_neurons,)
        Posterior mean.
    latents_ : array (3, n_clusters, n_bins, 1 + n_latent)
        Mean, 2.5 % and 97.5 % quantile of the paths of the groups in `neuron_labels_`, matched between draws. The first is the mean
        course of the group's log-rates.
    heldout_loglik_, heldout_baseline_ : float
        Mean log posterior predictive probability of a count that `holdout` hid; the same for each neuron's mean with a dispersion
        of maximal likelihood. NaN where nothing was hidden.
    samples_ : dict of array
        Draws (n_chains, n_draws, ...) of "neuron_labels", "state_labels", "d", "c", "dispersion".
    acceptance_ : float
        Share of proposed groups and loadings that were accepted.
    n_features_in_ : int

    Notes
    -----
    Every step of the chain leaves the posterior as it is, so there is no approximate mode. What is approximate is the model's weak
    limit of `max_states`, the truncation at `max_clusters`, and the tail of the Pólya-Gamma series (4e-5 of its variance). Chains
    seldom open or merge groups of many neurons: compare starts, and look at `diagnostics`.

    References
    ----------
    .. [1] Wei: Bayesian bi-clustering of neural spiking activity with latent structures (2023).

    See Also
    --------
    nissl.recordings.simulate.biclusters : counts with known groups and states
    """

    def __init__(
        self,
        n_latent: int = 2,
        *,
        max_states: int = 10,
        max_clusters: int | None = None,
        likelihood: str = "negbin",
        n_iter: int = 1000,
        burn_in: float = 0.25,
        thin: int = 1,
        n_chains: int = 2,
        init: str = "waic",
        cluster_prior: float = 0.2,
        holdout: float = 0.0,
        random_state: Any = 0,
        progress: bool = True,
    ) -> None:
        self.n_latent = n_latent
        self.max_states = max_states
        self.max_clusters = max_clusters
        self.likelihood = likelihood
        self.n_iter = n_iter
        self.burn_in = burn_in
        self.thin = thin
        self.n_chains = n_chains
        self.init = init
        self.cluster_prior = cluster_prior
        self.holdout = holdout
        self.random_state = random_state
        self.progress = progress

    def fit(self, X: Any, y: Any = None) -> BiClustering:
        """Sample the posterior.

        Parameters
        ----------
        X : array (n_bins, n_neurons) or DataArray ("bin", "neuron")
            Counts; NaN where nothing was recorded.
        y : ignored

        Raises
        ------
        InputError
            Parameters out of range; counts that are negative or not whole; fewer than 10 bins; a neuron without a spike.
        """
        self._check()
        counts = as_counts(X)
        T, n = counts.shape
        most = max(n // 2, 1) if self.max_clusters is None else min(self.max_clusters, n)
        seed = np.random.SeedSequence(int(check_random_state(self.random_state).randint(2**31 - 1)))
        hide, *streams = (np.random.default_rng(child) for child in seed.spawn(self.n_chains + 1))
        given = np.ascontiguousarray(counts.T)
        hidden = (hide.random((n, T)) < self.holdout) & ~np.isnan(given)
        seen = np.where(hidden, np.nan, given)
        if not (np.nansum(seen, axis=1) > 0).all():
            raise InputError(
                f"holdout={self.holdout} hides every spike of a neuron; hide less, or leave out rare neurons"
            )
        kept = _Kept(given, hidden)
        start = round(self.burn_in * self.n_iter)
        n_draws = -(-(self.n_iter - start) // self.thin)
        every = -(-n_draws * self.n_chains // PATHS)
        accepted = []
        dispersion = POISSON if self.likelihood == "poisson" else None
        with progress_bar(self.progress, self.n_chains * self.n_iter, "sampling groups and states") as step:
            labels = self._start(seen, most, dispersion, hide)
            for g in streams:
                chain = Chain(
                    seen,
                    self.n_latent,
                    self.max_states,
                    most,
                    g,
                    cluster_prior=self.cluster_prior,
                    dispersion=dispersion,
                )
                chain.start(labels)
                chain.start_states()
                kept.chains.append([])
                for i in range(self.n_iter):
                    chain.sweep()
                    if i >= start and (i - start) % self.thin == 0:
                        kept.add(chain, path=len(kept.chains[-1]) % every == 0)
                    step()
                accepted += chain.accepted
        self._summarise(kept)
        self.acceptance_ = float(np.mean(accepted)) if accepted else 1.0
        self.heldout_baseline_ = _baseline(given, hidden, self.likelihood == "poisson")
        self.n_features_in_ = n
        return self

    def _start(self, seen: np.ndarray, most: int, dispersion: float | None, g: np.random.Generator) -> np.ndarray:
        if self.init == "one" or most == 1:
            return np.zeros(len(seen), dtype=np.int64)
        if self.init == "kmeans":
            return start_labels(smoothed(seen), min(most, START_CLUSTERS), int(g.integers(2**31)))
        return choose_labels(seen, self.n_latent, most, g, dispersion)

    def to_inference_data(self) -> Any:
        """The draws as ArviZ has them: variables (chain, draw, ...) for its diagnostics and plots.

        Raises
        ------
        MissingExtraError
            ArviZ is not installed.
        """
        check_is_fitted(self)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # arviz announces its next release when it is imported
            arviz = need("arviz")
        traces = {name: getattr(self, f"{name}_") for name in TRACES}
        samples = {
            **self.samples_,
            "neuron_label": self.samples_["neuron_labels"],
            "state_label": self.samples_["state_labels"],
        }
        del samples["neuron_labels"], samples["state_labels"]
        dims = {"neuron_label": ["neuron"], "state_label": ["bin"], "d": ["neuron"], "c": ["neuron", "latent"],
                "dispersion": ["neuron"]}  # fmt: skip
        return arviz.from_dict(posterior={**traces, **samples}, dims=dims)

    def diagnostics(self) -> Any:
        """Split R-hat and effective sample sizes of what labels do not change, as a table of ArviZ.

        Only d and the dispersions of neurons, the numbers of groups and states and the log-likelihood are compared: loadings and labels
        mean something else in every draw.
        """
        data = self.to_inference_data()
        import arviz

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trace that never moves has no R-hat: NaN says so
            return arviz.summary(data, var_names=[*TRACES, "dispersion"], kind="diagnostics")

    def _summarise(self, kept: _Kept) -> None:
        likelihood, n_clusters, n_states, z, s, d, c, r = (
            np.array([[draw[i] for draw in chain] for chain in kept.chains]) for i in range(8)
        )
        n = z.shape[0] * z.shape[1]
        self.log_likelihood_trace_, self.n_clusters_trace_, self.n_states_trace_ = likelihood, n_clusters, n_states
        self.samples_ = {"neuron_labels": z, "state_labels": s, "d": d, "c": c, "dispersion": r}
        z, s = z.reshape(n, -1), s.reshape(n, -1)
        self.neuron_similarity_, self.state_similarity_ = similarity(z), similarity(s)
        self.neuron_labels_ = max_pear(z, self.neuron_similarity_)
        self.state_labels_ = max_pear(s, self.state_similarity_)
        self.rate_ = (kept.rate / n).T
        self.dispersion_ = r.reshape(n, -1).mean(0)
        self.heldout_loglik_ = float(kept.predicted.mean() - np.log(n)) if len(kept.predicted) else float("nan")
        self.latents_ = align(kept.paths, self.neuron_labels_)

    def _check(self) -> None:
        for name, value, low in (
            ("n_latent", self.n_latent, 1),
            ("max_states", self.max_states, 1),
            ("n_iter", self.n_iter, 1),
            ("thin", self.thin, 1),
            ("n_chains", self.n_chains, 1),
        ):
            at_least(name, value, low)
        if self.max_clusters is not None:
            at_least("max_clusters", self.max_clusters, 1)
        if self.likelihood not in ("negbin", "poisson"):
            raise InputError(f"likelihood={self.likelihood!r}: choose 'negbin' or 'poisson'")
        if self.init not in ("waic", "kmeans", "one"):
            raise InputError(f"init={self.init!r}: choose 'waic', 'kmeans' or 'one'")
        for name, number in (("burn_in", self.burn_in), ("holdout", self.holdout)):
            if not is_number(number) or not 0 <= number < 1:
                raise InputError(f"{name} must be a share from 0 to below 1, got {number!r}")
        if not is_number(self.cluster_prior) or not 0 < self.cluster_prior < 1:
            raise InputError(f"cluster_prior must be between 0 and 1, got {self.cluster_prior!r}")
        if round(self.burn_in * self.n_iter) >= self.n_iter:
            raise InputError(f"burn_in={self.burn_in} leaves no sweep of n_iter={self.n_iter}")
        flag("progress", self.progress)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.positive_only = True
        return tags


def as_counts(X: Any, name: str = "X") -> np.ndarray:
    """Counts (n_bins, n_neurons), checked: whole, not negative, NaN where missing, a spike of each neuron, at least 10 bins."""
    counts = as_bins(X, name, missing=True)
    if len(counts) < LEAST_BINS:
        raise InputError(f"{name} has {len(counts)} bins; at least {LEAST_BINS} are needed")
    with np.errstate(invalid="ignore"):
        for what, wrong in (("negative", counts < 0), ("not whole", counts != np.round(counts))):
            wrong &= ~np.isnan(counts)
            if wrong.any():
                t, i = np.argwhere(wrong)[0]
                raise InputError(f"{name} must hold counts; it is {what} at bin {t}, neuron {i}: {counts[t, i]:g}")
    silent = np.flatnonzero(~(np.nansum(counts, axis=0) > 0))
    if len(silent):
        raise InputError(f"{len(silent)} neurons never spike: {silent[:10].tolist()}; leave them out")
    return counts


class _Kept:
    """Draws that are kept: all of the labels and loadings, some of the paths, and running means of the rest."""

    def __init__(self, counts: np.ndarray, hidden: np.ndarray) -> None:
        self.counts, self.hidden = counts, hidden
        self.chains: list[list[tuple[Any, ...]]] = []
        self.paths: list[tuple[np.ndarray, ...]] = []
        self.rate = np.zeros(counts.shape)
        self.predicted = np.full(int(hidden.sum()), -np.inf)

    def add(self, chain: Chain, path: bool) -> None:
        log_rate = chain.log_rate()
        self.rate += np.exp(log_rate)
        if len(self.predicted):
            found = np.empty_like(log_rate)
            log_likelihood(np.where(self.hidden, self.counts, np.nan), log_rate, chain.r, found)
            self.predicted = np.logaddexp(self.predicted, found[self.hidden])
        traces = chain.log_likelihood(), int(chain.z.max()) + 1, len(np.unique(chain.s))
        draws = (chain.z, chain.s.astype(np.int16), chain.d, chain.c, chain.r)
        self.chains[-1].append((*traces, *(a.copy() for a in draws)))
        if path:
            self.paths.append((chain.z.copy(), chain.paths().astype(np.float32), chain.d.copy(), chain.c.copy()))


def identify(
    path: np.ndarray, d: np.ndarray, c: np.ndarray, reference: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """The same log-rates of one group in coordinates that are fixed.

    Paths have mean 0 over time, loadings c mean 0 over neurons, and x is rotated: onto the axes of its own covariance, largest first, or
    as near as can be to a reference.

    Parameters
    ----------
    path : array (n_bins, 1 + p)
        mu and x.
    d, c : arrays (n,), (n, p)
        Loadings of the group's neurons.
    reference : array (n_bins, p), optional

    Returns
    -------
    path, d, c : arrays
    """
    centre = path.mean(0)
    d, path = d + centre[0] + c @ centre[1:], path - centre
    mean = c.mean(0)
    mu, c = path[:, 0] + path[:, 1:] @ mean, c - mean
    x = path[:, 1:]
    if reference is None:
        _, _, turn = np.linalg.svd(x, full_matrices=False)
        R = turn.T
    else:
        u, _, v = np.linalg.svd(x.T @ reference)
        R = u @ v
    return np.concatenate([mu[:, None], x @ R], 1), d, c @ R


def align(draws: list[tuple[np.ndarray, ...]], labels: np.ndarray) -> np.ndarray:
    """Mean, 2.5 % and 97.5 % quantile of the paths of given groups over draws whose labels and axes differ.

    Parameters
    ----------
    draws : list of (z, paths, d, c)
        Labels (n_neurons,), paths (J, n_bins, 1 + p) and loadings of each draw.
    labels : array of int (n_neurons,)

    Returns
    -------
    array (3, n_groups, n_bins, 1 + p)
        NaN for a group that no draw has a counterpart of.
    """
    n_groups = int(labels.max()) + 1
    one = np.eye(n_groups)[labels]
    reference: dict[int, np.ndarray] = {}
    found: list[list[np.ndarray]] = [[] for _ in range(n_groups)]
    for z, paths, d, c in draws:
        shared = one.T @ np.eye(len(paths))[z]
        for group, own in zip(*linear_sum_assignment(-shared), strict=True):
            if shared[group, own] > 0:
                members = z == own
                path, _, _ = identify(paths[own].astype(np.float64), d[members], c[members], reference.get(int(group)))
                reference.setdefault(int(group), path[:, 1:])
                found[group].append(path)
    empty = np.full((3, *draws[0][1].shape[1:]), np.nan)
    return np.stack(
        [np.stack([np.mean(f, 0), *np.quantile(f, (0.025, 0.975), axis=0)]) if f else empty for f in found], axis=1
    )


def _baseline(counts: np.ndarray, hidden: np.ndarray, poisson: bool) -> float:
    """Mean log-probability of hidden counts under each neuron's mean, with the dispersion of largest likelihood."""
    if not hidden.any():
        return float("nan")
    seen = np.where(hidden, np.nan, counts)
    log_rate = np.repeat(np.log(np.nanmean(seen, axis=1, keepdims=True)), counts.shape[1], axis=1)
    found, r = np.empty_like(log_rate), np.full(len(counts), POISSON)

    def cost(u: float, i: int) -> float:
        here = np.empty((1, counts.shape[1]))
        log_likelihood(seen[i : i + 1], log_rate[i : i + 1], np.array([np.exp(u)]), here)
        return -float(here.sum())

    if not poisson:
        r = np.exp([minimize_scalar(cost, bounds=(-5, 8), args=(i,), method="bounded").x for i in range(len(counts))])  # pyright: ignore[reportAttributeAccessIssue]
    log_likelihood(np.where(hidden, counts, np.nan), log_rate, r, found)
    return float(found[hidden].mean())


def plot_biclusters(model: BiClustering, X: Any) -> Any:
    """Counts with neurons sorted by group, the states of the bins above them, and the mean course of each group.

    Parameters
    ----------
    model : BiClustering
        Fitted.
    X : array (n_bins, n_neurons)
        The counts it was fitted on.

    Returns
    -------
    matplotlib Figure
    """
    import matplotlib.pyplot as plt

    check_is_fitted(model)
    counts = as_bins(X, neurons=model.n_features_in_, missing=True)
    order = np.argsort(model.neuron_labels_, kind="stable")
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, figsize=(8, 6), sharex=True, height_ratios=(0.3, 3, 2), layout="constrained"
    )
    top.imshow(model.state_labels_[None], aspect="auto", cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    top.set(yticks=[], ylabel="state")
    image = middle.imshow(np.log1p(counts[:, order].T), aspect="auto", cmap="Greys", interpolation="nearest")
    for edge in np.flatnonzero(np.diff(model.neuron_labels_[order])):
        middle.axhline(edge + 0.5, color="C3", linewidth=1)
    middle.set(ylabel="neurons by group")
    figure.colorbar(image, ax=middle, label="log(1 + count)")
    t = np.arange(len(counts))
    for group in range(model.latents_.shape[1]):
        mean, low, high = model.latents_[:, group, :, 0]
        bottom.plot(t, mean, color=f"C{group}", label=f"group {group}")
        bottom.fill_between(t, low, high, color=f"C{group}", alpha=0.2, linewidth=0)
    bottom.set(xlabel="bin", ylabel="mean course of log-rates")
    bottom.legend(fontsize="small")
    return figure
