"""One chain of the bi-clustering sampler: loadings, the paths that new groups are proposed with, and the sweep.

Every step leaves the posterior of the model as it is. Three things differ from the authors' sampler, whose steps do not:

- A neuron's group and loading are proposed together from Laplace's approximation and accepted by the exact ratio.
- A new group's path is proposed from the neuron's own counts, and weighed by what the model, its dynamics integrated out, says of it.
- Centring, rotation and labels are matched in the draws that are kept (`nissl.recordings.spikes.bicluster`), never in the chain.

References
----------
.. [1] Neal: Markov chain sampling methods for Dirichlet process mixture models. JCGS (2000), algorithm 8.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter1d
from sklearn.cluster import KMeans

from nissl.recordings.spikes import polya_gamma, switching
from nissl.recordings.spikes.partitions import in_order, log_coefficients
from nissl.recordings.spikes.polya_gamma import compiled
from nissl.recordings.spikes.switching import Dynamics, Prior

START_DISPERSION = 10.0
EM_STEPS = 10
START_CLUSTERS = 8
"""Largest number of groups that the start chooses among."""
GAMMA = 1.0
"""Of the Dirichlet distribution of the mixture's weights."""
STEP = 0.01
"""Variance of the steps of a proposed path."""
DECAY = 0.95
"""How much of a proposed path's x remains in the next bin."""
SMOOTH, ENERGY = 3.0, 6.0
"""Bins by which counts, and the energy of paths, are smoothed before k-means."""
START_SWEEPS = 30
AS_WELL = 3.0
"""Standard errors; they leave out the chance of the chain itself, which is as large. Settled on `simulate.biclusters`, seeds 10 to 13."""

# ---------------------------------------------------------------- loadings


@compiled
def draw_loadings(y, omega, h, r, z, noise, d, c):
    """Draw each neuron's (d, c) given its Pólya-Gamma variables, in place; the prior is N(0, I). Zero `noise` gives the mean."""
    p = c.shape[1]
    q = p + 1
    V, m, row = np.empty((q, q)), np.empty(q), np.ones(q)
    for i in range(y.shape[0]):
        V[:] = np.eye(q)
        m[:] = 0.0
        first, log_r = z[i] * q, math.log(r[i])
        for t in range(y.shape[1]):
            w = omega[i, t]
            if w > 0.0:
                row[1:] = h[t, first + 1 : first + q]
                seen = 0.5 * (y[i, t] - r[i]) + w * (log_r - h[t, first])
                for u in range(q):
                    m[u] += seen * row[u]
                    for v in range(u + 1):
                        V[u, v] += w * row[u] * row[v]
        switching.cholesky(V)
        beta = solve(V, m, noise[i])
        d[i] = beta[0]
        c[i] = beta[1:]


@compiled
def solve(L, m, noise):
    """(L Lᵀ)⁻¹ m + L⁻ᵀ noise, L lower."""
    q = len(m)
    x = np.empty(q)
    for u in range(q):
        x[u] = m[u]
        for v in range(u):
            x[u] -= L[u, v] * x[v]
        x[u] /= L[u, u]
    for u in range(q - 1, -1, -1):
        x[u] += noise[u]
        for v in range(u + 1, q):
            x[u] -= L[v, u] * x[v]
        x[u] /= L[u, u]
    return x


@compiled
def log_joint(y, path, r, beta):
    """Log-probability of a neuron's counts and loading (d, c) given its path (T, 1 + p); terms of the counts alone left out."""
    found = -0.5 * (beta * beta).sum() - 0.5 * len(beta) * math.log(2.0 * math.pi)
    log_r = math.log(r)
    for t in range(len(y)):
        if not math.isnan(y[t]):
            psi = beta[0] + path[t, 0] - log_r
            for u in range(1, len(beta)):
                psi += beta[u] * path[t, u]
            found += y[t] * psi - (y[t] + r) * polya_gamma.softplus(psi)
    return found


@compiled
def laplace(y, paths, r):
    """Laplace's approximation of the loading of one neuron in each of several groups.

    Parameters
    ----------
    y : array (T,)
    paths : array (n_groups, T, 1 + p)
    r : float

    Returns
    -------
    log_marginal : array (n_groups,)
        Log-probability of the counts, the loading integrated out; terms of the counts alone left out.
    mode : array (n_groups, 1 + p)
    factor : array (n_groups, 1 + p, 1 + p)
        Lower factor of the negative Hessian at the mode.
    """
    J, T, q = paths.shape
    marginal, modes, factors = np.empty(J), np.zeros((J, q)), np.zeros((J, q, q))
    log_r, row, quiet = math.log(r), np.ones(q), np.zeros(q)
    total, offset, n = 0.0, 0.0, 0
    for t in range(T):
        if not math.isnan(y[t]):
            total += y[t]
            n += 1
    for j in range(J):
        offset = 0.0
        for t in range(T):
            offset += paths[j, t, 0] / T
        beta = np.zeros(q)
        beta[0] = math.log(total / max(n, 1) + 0.05) - offset
        value = log_joint(y, paths[j], r, beta)
        H, slope = np.empty((q, q)), np.empty(q)
        for _ in range(50):
            H[:] = np.eye(q)
            slope[:] = -beta
            for t in range(T):
                if not math.isnan(y[t]):
                    psi = beta[0] + paths[j, t, 0] - log_r
                    for u in range(1, q):
                        row[u] = paths[j, t, u]
                        psi += beta[u] * row[u]
                    share = 1.0 / (1.0 + math.exp(-psi))
                    curve = (y[t] + r) * share * (1.0 - share)
                    for u in range(q):
                        slope[u] += (y[t] - (y[t] + r) * share) * row[u]
                        for v in range(u + 1):
                            H[u, v] += curve * row[u] * row[v]
            switching.cholesky(H)
            step = solve(H, slope, quiet)
            factors[j] = H
            gain = (step * slope).sum()
            if gain < 1e-8:
                break
            size = 1.0
            while size > 1e-6:
                new = log_joint(y, paths[j], r, beta + size * step)
                if new > value:
                    break
                size *= 0.5
            if size <= 1e-6:
                break
            beta += size * step
            value = new
        modes[j] = beta
        log_det = 0.0
        for u in range(q):
            log_det += math.log(factors[j, u, u])
        marginal[j] = value + 0.5 * q * math.log(2.0 * math.pi) - log_det
    return marginal, modes, factors


def _log_gaussian(x: np.ndarray, mode: np.ndarray, factor: np.ndarray) -> float:
    """Log-density at `x` of the Gaussian with the precision whose lower factor is given (what is above the diagonal is not read)."""
    off = np.tril(factor).T @ (x - mode)
    return float(np.log(factor.diagonal()).sum() - 0.5 * off @ off - 0.5 * len(x) * math.log(2 * math.pi))


# ---------------------------------------------------------------- paths of new groups


@compiled
def smooth(y, r, step):
    """Gaussian about the most likely course that neurons' log-rates, less their means, have in common: a random walk seen through counts.

    Parameters
    ----------
    y : array (n, T)
    r : array (n,)
    step : float
        Variance of the walk's steps.

    Returns
    -------
    mode, diagonal, below : arrays (T,)
        Mean, and the factor of the precision, which is tridiagonal; ``below[t]`` stands left of ``diagonal[t]``.
    """
    n, T = y.shape
    base = np.empty(n)
    for i in range(n):
        total, seen = 0.0, 0
        for t in range(T):
            if not math.isnan(y[i, t]):
                total += y[i, t]
                seen += 1
        base[i] = math.log(total / max(seen, 1) + 0.05) - math.log(r[i])
    x, diagonal, below, u = np.zeros(T), np.empty(T), np.zeros(T), np.empty(T)
    for _ in range(15):
        for t in range(T):
            slope = -x[t] if t == 0 else (x[t - 1] - x[t]) / step
            curve = 1.0 if t == 0 else 1.0 / step
            if t + 1 < T:
                slope += (x[t + 1] - x[t]) / step
                curve += 1.0 / step
            for i in range(n):
                if not math.isnan(y[i, t]):
                    share = 1.0 / (1.0 + math.exp(-(base[i] + x[t])))
                    slope += y[i, t] - (y[i, t] + r[i]) * share
                    curve += (y[i, t] + r[i]) * share * (1.0 - share)
            if t:
                below[t] = -1.0 / step / diagonal[t - 1]
                curve -= below[t] * below[t]
                slope -= below[t] * u[t - 1]
            diagonal[t] = math.sqrt(curve)
            u[t] = slope / diagonal[t]
        largest = 0.0
        for t in range(T - 1, -1, -1):
            if t + 1 < T:
                u[t] -= below[t + 1] * u[t + 1]
            u[t] /= diagonal[t]
            largest = max(largest, abs(u[t]))
        x += u * min(1.0, 2.0 / max(largest, 1e-300))
        if largest < 1e-6:
            break
    return x, diagonal, below


class NewPath:
    """Distribution that the path (T, 1 + p) of a new group is proposed from; it knows the counts (n, T) of its neurons only."""

    def __init__(self, y: np.ndarray, r: np.ndarray, p: int) -> None:
        self.mode, self.diagonal, self.below = smooth(y, r, STEP)
        self.p = p

    def draw(self, g: np.random.Generator) -> np.ndarray:
        """A path."""
        T = len(self.mode)
        found = np.empty((T, self.p + 1))
        left = g.standard_normal(T)
        for t in range(T - 1, -1, -1):
            if t + 1 < T:
                left[t] -= self.below[t + 1] * left[t + 1]
            left[t] /= self.diagonal[t]
        found[:, 0] = self.mode + left
        found[:, 1:] = autoregressive(g.standard_normal((T, self.p)))
        return found

    def log_density(self, path: np.ndarray) -> float:
        """Log-density of a path."""
        off = path[:, 0] - self.mode
        white = self.diagonal * off
        white[:-1] += self.below[1:] * off[1:]
        x = path[:, 1:]
        start = STEP / (1 - DECAY**2)
        steps = x[1:] - DECAY * x[:-1]
        return float(
            np.log(self.diagonal).sum()
            - 0.5 * white @ white
            - 0.5 * (x[0] @ x[0] / start + (steps**2).sum() / STEP)
            - 0.5 * self.p * (math.log(start) + (len(x) - 1) * math.log(STEP))
            - 0.5 * path.size * math.log(2 * math.pi)
        )


def autoregressive(noise: np.ndarray) -> np.ndarray:
    """Stationary first-order autoregressions, one a column of standard normal numbers (T, p)."""
    found = np.sqrt(STEP) * noise
    found[0] /= math.sqrt(1 - DECAY**2)
    for t in range(1, len(found)):
        found[t] += DECAY * found[t - 1]
    return found


# ---------------------------------------------------------------- one chain


class Chain:
    """State of the sampler, and one `sweep` of it.

    Attributes
    ----------
    y : array (n_neurons, n_bins)
        Counts, NaN where nothing was seen.
    z, s : arrays of int (n_neurons,), (n_bins,)
        Groups 0 ... J - 1, all with neurons, and states.
    d, c, r : arrays (n_neurons,), (n_neurons, p), (n_neurons,)
    h : array (n_bins, J (p + 1))
        Paths; block j is (mu, x) of group j.
    dynamics : Dynamics
    accepted : list of float
        Share of neurons whose proposed group and loading were accepted, one a sweep.
    """

    def __init__(
        self,
        y: np.ndarray,
        p: int,
        n_states: int,
        max_clusters: int,
        g: np.random.Generator,
        *,
        cluster_prior: float = 0.2,
        dispersion: float | None = None,
        prior: Prior | None = None,
    ) -> None:
        self.y, self.p, self.L, self.max_clusters, self.g = y, p, n_states, max_clusters, g
        self.prior = Prior() if prior is None else prior
        n, T = y.shape
        self.log_v = log_coefficients(n, GAMMA, cluster_prior)
        self.fixed = dispersion is not None
        self.r = np.full(n, START_DISPERSION if dispersion is None else float(dispersion))
        self.d, self.c = np.zeros(n), np.zeros((n, p))
        self.omega = np.zeros((n, T))
        self.weights = np.full(n_states, 1 / n_states)
        self.transition = np.full((n_states, n_states), 1 / n_states)
        self.s = np.zeros(T, dtype=np.int64)
        self.accepted: list[float] = []

    def start(self, z: np.ndarray) -> None:
        """Fit from groups `z` by expectation-maximisation with random-walk dynamics; all bins are in one state."""
        n, q, seen = len(self.y), self.p + 1, ~np.isnan(self.y)
        self.z = in_order(z).astype(np.int64)
        self.d = np.log(np.where(seen, self.y, 0).sum(1) / np.maximum(seen.sum(1), 1) + 0.05)
        self.c = 0.5 * self.g.standard_normal((n, self.p))
        self.s[:] = 0
        self.h = np.zeros((self.y.shape[1], (int(self.z.max()) + 1) * q))
        for step in range(EM_STEPS):
            k = self.h.shape[1]
            walk = np.broadcast_to(np.eye(k), (self.L, k, k)).copy()
            self.dynamics = Dynamics(walk, np.zeros((self.L, k)), walk / STEP, np.full(self.L, -k * math.log(STEP)))
            self.augment(drawn=False)
            self.draw_path(drawn=False)
            self.augment(drawn=False)
            self.draw_loadings(drawn=False)
            if EM_STEPS // 2 <= step < EM_STEPS - 1 and self.z.max() > 0:
                self._reassign()

    def start_states(self) -> None:
        """Bins in two states by k-means on the smoothed log-energy of the paths' levels; then paths and dynamics that go with them."""
        if self.L > 1 and len(self.s) > 2:
            energy = (self.h - self.h.mean(0)) ** 2
            level = np.log(gaussian_filter1d(energy.sum(1), ENERGY) + 1e-9)[:, None]
            self.s = KMeans(2, n_init=4, random_state=int(self.g.integers(2**31))).fit_predict(level).astype(np.int64)  # pyright: ignore[reportArgumentType]
            self.transition, self.weights = switching.draw_transitions(self.s, self.weights, self.prior, self.g)
        for _ in range(EM_STEPS):
            self.draw_dynamics()
            self.augment()
            self.draw_path()
        self.draw_dynamics()

    def _reassign(self) -> None:
        """Each neuron to its most likely group; groups that are left empty go, with their paths."""
        q, paths = self.p + 1, self.paths()
        for i in range(len(self.y)):
            marginal, modes, _ = laplace(self.y[i], paths, self.r[i])
            self.z[i] = int(marginal.argmax())
            self.d[i], self.c[i] = modes[self.z[i], 0], modes[self.z[i], 1:]
        left, self.z = np.unique(self.z, return_inverse=True)
        self.h = np.ascontiguousarray(self.h.reshape(len(self.h), -1, q)[:, left].reshape(len(self.h), -1))

    def paths(self) -> np.ndarray:
        """Paths (J, n_bins, 1 + p), one block a group."""
        return np.ascontiguousarray(self.h.reshape(len(self.h), -1, self.p + 1).transpose(1, 0, 2))

    def log_rate(self) -> np.ndarray:
        """Log-rates (n_neurons, n_bins)."""
        return log_rates(self.paths(), self.z, self.d, self.c)

    def sweep(self) -> None:
        """One draw of everything given the rest."""
        self.augment()
        self.draw_path()
        self.draw_states()
        self.draw_dynamics()
        self.augment()
        self.draw_loadings()
        if not self.fixed:
            polya_gamma.draw_dispersion(self.y, self.log_rate(), self.r, self.g)
        if self.max_clusters > 1:
            self.draw_clusters()
            self.draw_dynamics()

    def augment(self, drawn: bool = True) -> None:
        """Pólya-Gamma variables, or their means."""
        polya_gamma.augment(self.y, self.log_rate(), self.r, drawn, self.g, self.omega)

    def draw_path(self, drawn: bool = True) -> None:
        """All paths at once, or their mean."""
        T, k = len(self.s), self.h.shape[1]
        D, E, e = np.zeros((T, k, k)), np.zeros((T, k, k)), np.zeros((T, k))
        A, b, P, _ = self.dynamics
        switching.add_dynamics(A, b, P, self.s, D, E, e)
        switching.add_counts(self.y, self.omega, self.d, self.c, self.r, self.z, D, e)
        self.h = switching.draw_path(D, E, e, self.g.standard_normal((T, k)) * drawn)

    def draw_states(self) -> None:
        """States, their transitions and their weights."""
        if self.L > 1:
            steps = switching.log_steps(self.h, *self.dynamics)
            self.s = switching.draw_states(steps, self.transition, self.g.random(len(self.s)))
            self.transition, self.weights = switching.draw_transitions(self.s, self.weights, self.prior, self.g)

    def draw_dynamics(self) -> None:
        """Dynamics of every state."""
        self.dynamics = switching.draw_dynamics(self.h, self.s, self.L, self.prior, self.g)

    def draw_loadings(self, drawn: bool = True) -> None:
        """Loadings (d, c) of every neuron, or their means."""
        noise = self.g.standard_normal((len(self.y), self.p + 1)) * drawn
        draw_loadings(self.y, self.omega, self.h, self.r, self.z, noise, self.d, self.c)

    def draw_clusters(self) -> None:
        """Group and loading of each neuron in turn, the dynamics integrated out: Neal's algorithm 8 with one auxiliary group."""
        paths, moved = self.paths(), 0
        for i in self.g.permutation(len(self.y)):
            paths, accepted = self._draw_cluster(int(i), paths)
            moved += accepted
        self.h = np.ascontiguousarray(paths.transpose(1, 0, 2).reshape(len(self.s), -1))
        self.accepted.append(moved / len(self.y))

    def _draw_cluster(self, i: int, paths: np.ndarray) -> tuple[np.ndarray, bool]:
        # The auxiliary group always comes last. Where neuron i is alone, its own group is that one.
        y, r, J = self.y[i], float(self.r[i]), len(paths)
        sizes = np.bincount(self.z, minlength=J).astype(float)
        sizes[self.z[i]] -= 1
        alone = sizes[self.z[i]] == 0
        new = NewPath(self.y[i : i + 1], self.r[i : i + 1], self.p)
        if alone:
            order = np.r_[np.delete(np.arange(J), self.z[i]), self.z[i]]
            paths, sizes = np.ascontiguousarray(paths[order]), sizes[order]
            self.z = np.argsort(order)[self.z]
            J -= 1
        elif self.max_clusters > J:
            paths = np.concatenate([paths, new.draw(self.g)[None]])
        prior = np.log(sizes[:J] + GAMMA)
        if len(paths) > J:
            opened = math.log(GAMMA) + self.log_v[J + 1] - self.log_v[J]
            prior = np.r_[prior, opened + self._log_evidence_ratio(paths) - new.log_density(paths[-1])]
        marginal, modes, factors = laplace(y, paths, r)
        score = prior + marginal
        p = np.exp(score - score.max())
        chosen = min(int(np.searchsorted(np.cumsum(p), self.g.random() * p.sum())), len(p) - 1)
        beta = solve(factors[chosen], np.zeros(self.p + 1), self.g.standard_normal(self.p + 1)) + modes[chosen]
        old = np.r_[self.d[i], self.c[i]]
        gain = [
            log_joint(y, paths[j], r, x) - marginal[j] - _log_gaussian(x, modes[j], factors[j])
            for j, x in ((chosen, beta), (self.z[i] if not alone else J, old))
        ]
        accepted = bool(math.log(max(self.g.random(), 1e-300)) < gain[0] - gain[1])
        if accepted:
            self.z[i], self.d[i], self.c[i] = chosen, beta[0], beta[1:]
        if self.z[i] != J:
            paths = paths[:J]
        return paths, accepted

    def _log_evidence_ratio(self, paths: np.ndarray) -> float:
        """Log-density of the last path given the others, the dynamics integrated out."""
        T, q = len(self.s), self.p + 1
        h = np.ascontiguousarray(paths.transpose(1, 0, 2).reshape(T, -1))
        number, M = switching.moments(h, self.s, self.L)
        k = h.shape[1]
        found = switching.log_evidence(number, M, h[0], self.prior)
        if k > q:
            kept = np.r_[0 : k - q, k : 2 * k - q, 2 * k]
            found -= switching.log_evidence(number, M[:, kept][:, :, kept], h[0, : k - q], self.prior)
        return found

    def log_likelihood(self) -> float:
        """Of the counts that were seen."""
        found = np.empty_like(self.y)
        polya_gamma.log_likelihood(self.y, self.log_rate(), self.r, found)
        return float(found.sum())


def log_rates(paths: np.ndarray, z: np.ndarray, d: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Log-rates (n_neurons, n_bins) of neurons with loadings (d, c) on the paths (J, n_bins, 1 + p) of their groups."""
    found = np.empty((len(z), paths.shape[1]))
    for j in range(len(paths)):
        own = z == j
        found[own] = d[own, None] + paths[j, :, 0] + c[own] @ paths[j, :, 1:].T
    return found


def smoothed(y: np.ndarray) -> np.ndarray:
    """Log-counts of neurons, smoothed over time and standardised; missing ones are the neuron's mean."""
    mean = np.nanmean(y, axis=1, keepdims=True)
    rows = gaussian_filter1d(np.log1p(np.where(np.isnan(y), mean, y)), SMOOTH, axis=1)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(rows.std(1, keepdims=True), 1e-12)


def start_labels(rows: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """k-means of `smoothed` rows, of at most as many groups as there are different ones."""
    n_clusters = min(n_clusters, len(np.unique(rows, axis=0)))
    return KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(rows)  # pyright: ignore[reportArgumentType]


def choose_labels(
    y: np.ndarray,
    p: int,
    most: int,
    g: np.random.Generator,
    dispersion: float | None = None,
    n_sweeps: int = START_SWEEPS,
) -> np.ndarray:
    """Groups that short chains of one state end at, from k-means with the fewest groups that predict as well as any.

    What a chain predicts is measured by the widely applicable information criterion [1]_. As well as any: the best is better by less
    than `AS_WELL` standard errors of the difference over counts.

    Parameters
    ----------
    y : array (n_neurons, n_bins)
    p : int
    most : int
        Largest number of groups.
    g : numpy Generator
    dispersion : float, optional
    n_sweeps : int, default 30
        Of each chain; the first third is left out.

    Returns
    -------
    array of int (n_neurons,)

    References
    ----------
    .. [1] Watanabe: Asymptotic equivalence of Bayes cross validation and widely applicable information criterion. JMLR (2010).
    """
    rows, seed = smoothed(y), int(g.integers(2**31))
    labels, scores, now = [], [], np.empty_like(y)
    for j in range(1, min(most, START_CLUSTERS) + 1):
        chain = Chain(y, p, 1, j, g, dispersion=dispersion)
        chain.start(start_labels(rows, j, seed))
        chain.draw_dynamics()
        n, likelihood, mean, spread = 0, np.full(y.shape, -np.inf), np.zeros(y.shape), np.zeros(y.shape)
        for i in range(n_sweeps):
            chain.sweep()
            if i >= n_sweeps // 3:
                polya_gamma.log_likelihood(y, chain.log_rate(), chain.r, now)
                n += 1
                likelihood = np.logaddexp(likelihood, now)
                off = now - mean
                mean += off / n
                spread += off * (now - mean)
        labels.append(chain.z.copy())
        scores.append((likelihood - math.log(n) - spread / max(n - 1, 1))[~np.isnan(y)])
    best = int(np.argmax([score.sum() for score in scores]))
    for z, score in zip(labels, scores, strict=True):
        less = scores[best] - score
        if less.sum() <= AS_WELL * math.sqrt(less.size) * less.std():
            return z
    return labels[best]
