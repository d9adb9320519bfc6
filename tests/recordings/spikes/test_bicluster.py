"""Bi-clustering: each step against a known answer, the whole chain against its prior, planted groups and states, bad inputs."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score

from nissl.errors import InputError
from nissl.recordings.simulate import biclusters
from nissl.recordings.spikes import bicluster, gibbs, partitions, polya_gamma, switching
from nissl.recordings.spikes.bicluster import BiClustering
from nissl.recordings.spikes.switching import Prior


@pytest.mark.parametrize("b", [1.0, 3.5, 20.0])
@pytest.mark.parametrize("z", [0.0, 0.5, 4.0])
def test_polya_gamma_moments(b, z):
    g = np.random.default_rng(0)
    draws = np.array([polya_gamma.draw(b, z, g) for _ in range(20_000)])
    mean = b * np.tanh(z / 2) / (2 * z) if z else b / 4
    variance = b * (np.sinh(z) - z) / (4 * z**3 * np.cosh(z / 2) ** 2) if z else b / 24
    assert draws.mean() == pytest.approx(mean, rel=0.02)
    assert draws.var() == pytest.approx(variance, rel=0.06)


def steps_of(k, L, g):
    A = 0.5 * g.standard_normal((L, k, k))
    b = g.standard_normal((L, k))
    root = g.standard_normal((L, k, k)) + 2 * np.eye(k)
    Q = root @ root.transpose(0, 2, 1)
    return A, b, np.linalg.inv(Q), Q


def test_paths_are_drawn_from_dense_conditioning():
    """Prior moments by the recursion forward in time, then Gaussian conditioning on all counts' pseudo-observations."""
    g = np.random.default_rng(1)
    T, p, n = 6, 1, 3
    A, b, P, Q = steps_of(2, 2, g)
    s = np.array([1, 0, 0, 1, 1, 0])
    y = g.poisson(3.0, (n, T)).astype(float)
    y[0, 2] = np.nan
    omega, d, c, r = (
        g.gamma(2.0, 0.5, (n, T)),
        g.standard_normal(n),
        g.standard_normal((n, p)),
        np.array([2.0, 5.0, 9.0]),
    )
    omega[np.isnan(y)] = 0.0
    mean, cov = np.zeros(2 * T), np.zeros((2 * T, 2 * T))
    cov[:2, :2] = np.eye(2)
    for t in range(1, T):
        now, before = slice(2 * t, 2 * t + 2), slice(2 * t - 2, 2 * t)
        mean[now] = A[s[t]] @ mean[before] + b[s[t]]
        cov[now, : 2 * t] = A[s[t]] @ cov[before, : 2 * t]
        cov[: 2 * t, now] = cov[now, : 2 * t].T
        cov[now, now] = A[s[t]] @ cov[before, before] @ A[s[t]].T + Q[s[t]]
    H, seen, noise = [], [], []
    for i in range(n):
        for t in np.flatnonzero(omega[i]):
            row = np.zeros(2 * T)
            row[2 * t : 2 * t + 2] = 1, c[i, 0]
            H.append(row)
            seen.append((y[i, t] - r[i]) / (2 * omega[i, t]) + np.log(r[i]) - d[i])
            noise.append(1 / omega[i, t])
    H = np.array(H)
    gain = cov @ H.T @ np.linalg.inv(H @ cov @ H.T + np.diag(noise))
    mean, cov = mean + gain @ (np.array(seen) - H @ mean), cov - gain @ H @ cov

    def draw(noise):
        D, E, e = np.zeros((T, 2, 2)), np.zeros((T, 2, 2)), np.zeros((T, 2))
        switching.add_dynamics(A, b, P, s, D, E, e)
        switching.add_counts(y, omega, d, c, r, np.zeros(n, dtype=np.int64), D, e)
        return switching.draw_path(D, E, e, noise).ravel()

    np.testing.assert_allclose(draw(np.zeros((T, 2))), mean, atol=1e-9)
    # a draw is the mean and a linear map of the noise: its covariance is exact, too
    spread = np.array([draw(unit.reshape(T, 2)) - mean for unit in np.eye(2 * T)])
    np.testing.assert_allclose(spread.T @ spread, cov, atol=1e-9)


def test_states_are_drawn_from_all_their_sequences():
    """Marginals and the time index, against the sum over all sequences of four bins."""
    g = np.random.default_rng(2)
    h = g.standard_normal((4, 2))
    A, b, P, Q = steps_of(2, 2, g)
    density = switching.log_steps(h, A, b, P, np.linalg.slogdet(P)[1])
    for t in range(1, 4):
        for j in range(2):
            off = h[t] - A[j] @ h[t - 1] - b[j]
            by_hand = -0.5 * off @ np.linalg.solve(Q[j], off) - 0.5 * np.linalg.slogdet(2 * np.pi * Q[j])[1]
            assert density[t, j] == pytest.approx(by_hand)
    transition = np.array([[0.8, 0.2], [0.4, 0.6]])
    weights, marginal = [], np.zeros((4, 2))
    for s in np.ndindex(2, 2, 2, 2):
        w = np.exp(sum(density[t, s[t]] for t in range(1, 4))) * np.prod(
            [transition[s[t - 1], s[t]] for t in range(1, 4)]
        )
        weights.append(w)
        marginal[np.arange(4), s] += w
    draws = np.array([switching.draw_states(density, transition, g.random(4)) for _ in range(20_000)])
    assert np.abs((draws == 1).mean(0) - marginal[:, 1] / sum(weights)).max() < 0.02


def test_evidence_of_a_path_is_what_its_steps_predict():
    """The evidence is the product of Student predictions: here, the average density over dynamics drawn from the prior."""
    g = np.random.default_rng(3)
    prior = Prior(scale=1.0)
    h = 0.5 * g.standard_normal((4, 1))
    number, M = switching.moments(h, np.zeros(4, dtype=np.int64), 1)
    found = switching.log_evidence(number, M, h[0], prior)
    A, b, P, log_det = switching.draw_dynamics(np.zeros((1, 1)), np.zeros(1, dtype=np.int64), 100_000, prior, g)
    steps = switching.log_steps(h, A, b, P, log_det).sum(0)
    first = -0.5 * h[0] @ h[0] - 0.5 * np.log(2 * np.pi)
    assert found == pytest.approx(np.log(np.exp(steps).mean()) + first, abs=0.03)


def set_partitions(n):
    if n == 0:
        yield []
        return
    for labels in set_partitions(n - 1):
        for j in range(max(labels, default=-1) + 2):
            yield [*labels, j]


def test_partitions_have_probability_one():
    coefficients = partitions.log_coefficients(5)
    every = [np.array(labels) for labels in set_partitions(5)]
    assert len(every) == 52
    assert sum(np.exp(partitions.log_prior(labels, coefficients)) for labels in every) == pytest.approx(1, abs=1e-10)


def test_max_pear_ignores_names():
    g = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 5)
    draws = []
    for _ in range(30):
        labels = g.permutation(3)[truth]
        labels[g.integers(15)] = g.integers(3)
        draws.append(labels)
    np.testing.assert_array_equal(partitions.max_pear(np.array(draws)), truth)


def test_dispersion_is_found():
    g = np.random.default_rng(4)
    rate = np.exp(0.5 * g.standard_normal((1, 2000)) + 1)
    y = g.poisson(g.gamma(5.0, rate / 5.0)).astype(float)
    r, draws = np.ones(1), []
    for _ in range(300):
        polya_gamma.draw_dispersion(y, np.log(rate), r, g)
        draws.append(r[0])
    assert 4 < np.mean(draws[50:]) < 6


def test_identified_paths_have_the_same_rates():
    g = np.random.default_rng(5)
    path, d, c = g.standard_normal((40, 4)), g.standard_normal(6), g.standard_normal((6, 3))
    for reference in (None, g.standard_normal((40, 3))):
        new, d2, c2 = bicluster.identify(path, d, c, reference)
        before = d + path[:, :1] + path[:, 1:] @ c.T
        np.testing.assert_allclose(d2 + new[:, :1] + new[:, 1:] @ c2.T, before, atol=1e-10)
        np.testing.assert_allclose(new.mean(0), 0, atol=1e-10)
        np.testing.assert_allclose(c2.mean(0), 0, atol=1e-10)


TINY = {"n": 4, "T": 12, "p": 1, "L": 2, "J": 2}
PRIOR = Prior(scale=0.05, extra=12.0)  # light tails: rates stay finite, so that moments exist


def forward(chain, g):
    """All of a tiny chain from its prior: groups among those of at most two, weights of states from their symmetric Dirichlet."""
    every = [np.array(z) for z in set_partitions(TINY["n"]) if max(z) < TINY["J"]]
    weight = np.exp([partitions.log_prior(z, chain.log_v) for z in every])
    chain.z = every[g.choice(len(every), p=weight / weight.sum())].astype(np.int64)
    chain.d, chain.c = g.standard_normal(TINY["n"]), g.standard_normal((TINY["n"], TINY["p"]))
    chain.r = g.standard_exponential(TINY["n"])
    L, T, k = TINY["L"], TINY["T"], (int(chain.z.max()) + 1) * 2
    chain.weights = np.maximum(g.dirichlet(np.full(L, PRIOR.gamma / L)), 1e-12)
    own = PRIOR.alpha * chain.weights + PRIOR.kappa * np.eye(L)
    chain.transition = np.array([g.dirichlet(row) for row in own])
    chain.s = np.zeros(T, dtype=np.int64)
    chain.s[0] = g.integers(L)
    for t in range(1, T):
        chain.s[t] = g.choice(L, p=chain.transition[chain.s[t - 1]])
    chain.dynamics = switching.draw_dynamics(np.zeros((1, k)), np.zeros(1, dtype=np.int64), L, PRIOR, g)
    A, b, P, _ = chain.dynamics
    chain.h = g.standard_normal((T, k))
    for t in range(1, T):
        j = chain.s[t]
        chain.h[t] = A[j] @ chain.h[t - 1] + b[j] + np.linalg.cholesky(np.linalg.inv(P[j])) @ chain.h[t]


def counts(chain, g):
    rate = np.exp(np.clip(chain.log_rate(), None, 30))
    chain.y[:] = g.poisson(g.gamma(chain.r[:, None], rate / chain.r[:, None]))


def watched(chain):
    return [chain.d.mean(), chain.d[0] ** 2, chain.c.mean(), chain.c[0, 0] ** 2, np.log(chain.r).mean(),
            np.log(np.abs(chain.h)).mean(), float(chain.z.max()), float((chain.s[1:] == chain.s[:-1]).mean()),
            float(chain.weights.max())]  # fmt: skip


def test_geweke():
    """Draws from the prior, and a chain that draws counts and a sweep in turn, have the same means (|z| < 3.5)."""
    g = np.random.default_rng(6)
    chain = gibbs.Chain(np.zeros((TINY["n"], TINY["T"])), TINY["p"], TINY["L"], TINY["J"], g, prior=PRIOR)
    direct = []
    for _ in range(600):
        forward(chain, g)
        direct.append(watched(chain))
    chained = []
    for _ in range(600):
        counts(chain, g)
        chain.sweep()
        chained.append(watched(chain))
    direct, chained = np.array(direct), np.array(chained)
    batches = chained.reshape(30, 20, -1).mean(1)  # their spread holds the correlation along the chain
    error = np.sqrt(direct.var(0) / len(direct) + batches.var(0, ddof=1) / len(batches))
    z = (direct.mean(0) - chained.mean(0)) / error
    assert np.abs(z).max() < 3.5, z


@pytest.fixture(scope="module")
def planted():
    world = biclusters(seed=0)
    model = BiClustering(1, n_iter=40, n_chains=1, holdout=0.05, progress=False)
    return world, model.fit(world.X)


def test_planted_groups(planted):
    world, model = planted
    assert adjusted_rand_score(world.neuron_labels, model.neuron_labels_) >= 0.9
    assert np.corrcoef(np.log(model.rate_).ravel(), world.log_rate.ravel())[0, 1] >= 0.85
    assert model.heldout_loglik_ > model.heldout_baseline_
    assert model.neuron_similarity_.shape == (24, 24)
    assert model.latents_.shape[2:] == (300, 2)
    assert (model.latents_[1] <= model.latents_[2]).all()


def test_traces_go_to_arviz(planted):
    _, model = planted
    data = model.to_inference_data()
    assert data.posterior["neuron_label"].shape == (1, 30, 24)
    assert "ess_bulk" in model.diagnostics()


def test_picture(planted):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = bicluster.plot_biclusters(planted[1], planted[0].X)
    assert len(figure.axes) == 4
    matplotlib.pyplot.close(figure)


def test_same_seed_same_chain_and_data_stay():
    X = biclusters(6, 40, seed=3).X
    X[3, 2] = np.nan
    before = X.copy()
    model = BiClustering(1, n_iter=6, n_chains=2, max_states=3, likelihood="poisson", progress=False)
    first, again = clone(model).fit(X), clone(model).fit(X)
    np.testing.assert_array_equal(X, before)
    for name, value in first.samples_.items():
        np.testing.assert_array_equal(value, again.samples_[name])
    other = clone(model).set_params(random_state=1).fit(X)
    assert not np.array_equal(other.samples_["d"], first.samples_["d"])
    assert (first.samples_["dispersion"] == bicluster.POISSON).all()
    assert np.isfinite(first.rate_).all()
    with pytest.raises(NotFittedError):
        clone(model).to_inference_data()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda X: X - 5, "negative at bin"),
        (lambda X: X + 0.5, "not whole at bin 0, neuron 0"),
        (lambda X: X * [0, 1, 1, 1], "never spike: \\[0\\]"),
        (lambda X: X[:9], "9 bins; at least 10"),
        (lambda X: X[0], "shape"),
        (lambda X: X * np.where(X.max() == X, np.inf, 1), "infinity"),
        (lambda X: np.where(np.arange(4) == 1, np.nan, X), "never spike: \\[1\\]"),
    ],
)
def test_bad_counts(change, words):
    X = np.random.default_rng(0).poisson(2.0, (20, 4)) + 0.0
    X[0] = 1
    with pytest.raises(InputError, match=words):
        BiClustering(n_iter=2, progress=False).fit(change(X))


@pytest.mark.parametrize(
    "parameters",
    [
        {"n_latent": 0}, {"max_states": 0}, {"max_clusters": 0}, {"likelihood": "gauss"}, {"n_iter": 0}, {"burn_in": 1.0},
        {"thin": 0}, {"n_chains": 0}, {"init": "random"}, {"cluster_prior": 0.0}, {"holdout": -0.1},
        {"n_iter": 1, "burn_in": 0.9},
    ],
)  # fmt: skip
def test_bad_parameters(parameters):
    with pytest.raises(InputError):
        BiClustering(**parameters).fit(np.ones((20, 4)))
