"""Filters are held to each other where they must agree, to the textbook written by hand, and to planted states."""

import time
import warnings

import numpy as np
import pytest
from scipy.linalg import eigh
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPRegressor
from sklearn.utils.estimator_checks import parametrize_with_checks

from nissl.errors import InputError
from nissl.recordings.simulate import mixed_states
from nissl.recordings.spikes import (
    DiscriminativeKalmanFilter,
    ExtendedKalmanFilterDecoder,
    KalmanFilterDecoder,
    NadarayaWatson,
    UnscentedKalmanFilterDecoder,
    angle_error,
    normalised_rmse,
    plot_decoded,
)
from nissl.recordings.state_space import StateModel, kalman_filter

TIME = "rows are times: what is said of one depends on those before it"
ALWAYS = {
    "check_dtype_object": "arrays of objects are refused, in all of nissl.recordings",
    "check_do_not_raise_errors_in_init_or_set_params": "types are checked at run time in the tests, and only there",
}
EXEMPT = ALWAYS | {"check_methods_subset_invariance": TIME, "check_methods_sample_order_invariance": TIME}
ALL = [
    DiscriminativeKalmanFilter(Ridge()),
    DiscriminativeKalmanFilter(covariance="kernel", robust=True),
    KalmanFilterDecoder(),
    ExtendedKalmanFilterDecoder(),
    UnscentedKalmanFilterDecoder(),
]


@parametrize_with_checks(
    [*ALL, NadarayaWatson()], expected_failed_checks=lambda e: ALWAYS if isinstance(e, NadarayaWatson) else EXEMPT
)
def test_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # data of some checks make the guard act
        check(estimator)


class Known(Ridge):
    """A regression that is known and needs no fit."""

    def __init__(self, f=None):
        self.f = f

    def __sklearn_clone__(self):
        return self

    def fit(self, X, y):
        return self

    def predict(self, X):
        return self.f(X)


@pytest.fixture(scope="module")
def linear():
    """A stationary linear Gaussian system."""
    rng = np.random.default_rng(0)
    A = np.linalg.qr(rng.normal(size=(3, 3)))[0] * 0.9
    S = np.diag([1.0, 2.0, 0.5])
    A = np.linalg.cholesky(S) @ A @ np.linalg.inv(np.linalg.cholesky(S))
    model = StateModel(A, S - A @ S @ A.T, S, np.array([1.0, -2, 0]))
    H, Lambda = rng.normal(size=(8, 3)) * 0.5, np.diag(rng.uniform(0.5, 2, 8))
    z = np.zeros((400, 3))
    z[0] = rng.multivariate_normal(np.zeros(3), S)
    for t in range(1, 400):
        z[t] = A @ z[t - 1] + rng.multivariate_normal(np.zeros(3), model.Gamma)
    x = z @ H.T + rng.multivariate_normal(np.zeros(8), Lambda, 400)
    K = S @ H.T @ np.linalg.inv(H @ S @ H.T + Lambda)
    Q = S - K @ H @ S
    return model, H, Lambda, x, z + model.mean, K, (Q + Q.T) / 2


def discriminative(linear, **settings):
    model, _, _, x, z, K, Q = linear
    known = Known(lambda x: x @ K.T)
    return DiscriminativeKalmanFilter(
        known, lambda x: np.broadcast_to(Q, (len(x), 3, 3)), state_model=model, **settings
    ).fit(x, z)


def test_it_is_the_kalman_filter_where_that_is_right(linear):
    model, H, Lambda, x, z, _, _ = linear
    exact = kalman_filter(x, model.A, model.Gamma, H, Lambda, np.zeros(3), model.S)
    mean, cov = discriminative(linear).predict(x, return_cov=True)
    np.testing.assert_allclose(mean - model.mean, exact.means, atol=1e-9)
    np.testing.assert_allclose(cov, exact.covs, atol=1e-9)
    robust = discriminative(linear, robust=True).predict(x)
    assert np.abs(robust - mean).max() > 0.1
    assert normalised_rmse(z, mean) < normalised_rmse(z, robust)


def test_equations_by_hand(linear):
    model, _, _, x, _, K, _ = linear
    x = x[:20]
    rng = np.random.default_rng(1)
    root = rng.normal(size=(20, 3, 3))
    Q = root @ root.swapaxes(1, 2) * 0.3 + 0.05 * np.eye(3)
    inv = np.linalg.inv
    acts = np.array([np.linalg.eigvalsh(inv(q) - inv(model.S))[0] <= 0 for q in Q])
    assert 3 < acts[1:].sum() < 19

    def by_hand(guard, robust=False):
        f, out = x @ K.T, []
        m, P = f[0], Q[0]
        out.append((m, P))
        for t in range(1, 20):
            M = model.A @ P @ model.A.T + model.Gamma
            q, weight, minus = Q[t], inv(Q[t]), inv(model.S)
            if robust:
                minus = 0
            elif acts[t] and guard == "cap":
                w, V = eigh(q, model.S)
                U = model.S @ V
                weight = inv(U @ np.diag(np.minimum(w, 1)) @ U.T)
            elif acts[t] and guard == "repo":
                weight, minus = inv(q) + inv(model.S), inv(model.S)
            elif acts[t]:
                minus = 0
            P = inv(inv(M) + weight - minus)
            m = P @ (inv(M) @ model.A @ m + weight @ f[t])
            out.append((m, P))
        return np.array([o[0] for o in out]) + model.mean, np.array([o[1] for o in out])

    for guard, robust in (("web", False), ("cap", False), ("repo", False), ("web", True)):
        decoder = DiscriminativeKalmanFilter(
            Known(lambda x: x @ K.T), lambda x: Q[: len(x)], guard=guard, robust=robust, state_model=model, holdout=0.4
        ).fit(x, np.zeros((20, 3)))
        assert decoder.n_fallback_ == (0 if robust else acts[:8].sum())
        context = (
            warnings.catch_warnings()
            if robust
            else pytest.warns(UserWarning, match=rf"acted in {acts[1:].sum()} of 20")
        )
        if not robust and acts[0]:
            context = pytest.warns(UserWarning, match="acted in")
        with context:
            mean, cov = decoder.predict(x, return_cov=True)
        wanted = by_hand(guard, robust)
        np.testing.assert_allclose(mean, wanted[0], atol=1e-9)
        np.testing.assert_allclose(cov, wanted[1], atol=1e-9)


@pytest.mark.parametrize("decoder", ALL, ids=lambda d: f"{type(d).__name__}-{getattr(d, 'covariance', '')}")
@pytest.mark.parametrize("lag", [0, 2])
def test_steps_trials_and_missing_bins(decoder, lag):
    rng = np.random.default_rng(0)
    z = np.cumsum(rng.normal(size=(300, 2)), 0) * 0.1
    x = z @ rng.normal(size=(2, 10)) + rng.normal(size=(300, 10))
    decoder = clone(decoder).set_params(lag=lag)
    trials = np.repeat(np.arange(5), [100, 80, 60, 59, 1])
    decoder.fit(x, z, trials)
    x[0], x[110], x[150, 3] = np.nan, np.nan, np.nan
    mean, cov = decoder.predict(x, trials, return_cov=True)
    assert np.isfinite(mean).all()
    for k in range(5):
        at = np.flatnonzero(trials == k)
        alone, alone_cov = decoder.predict(x[at], return_cov=True)
        np.testing.assert_allclose(mean[at], alone, atol=1e-10)
        np.testing.assert_allclose(cov[at], alone_cov, atol=1e-10)
        np.testing.assert_array_equal(mean[at[:lag]], np.broadcast_to(decoder.mean_, (len(at[:lag]), 2)))
        decoder.reset()
        for t in at[: len(at) - lag]:
            m, P = decoder.step(x[t])
            np.testing.assert_allclose(m, mean[t + lag], atol=1e-10)
            np.testing.assert_allclose(P, cov[t + lag], atol=1e-10)
    t = 110 + lag
    np.testing.assert_allclose(mean[t] - decoder.mean_, decoder.A_ @ (mean[t - 1] - decoder.mean_), atol=1e-10)
    np.testing.assert_allclose(cov[t], decoder.A_ @ cov[t - 1] @ decoder.A_.T + decoder.Gamma_, atol=1e-10)


def test_lag_pairs_within_trials_only():
    x = np.arange(12.0)[:, None] * [1, -1] + np.array([[0, 1.0]] * 12) * np.arange(12)[:, None] ** 2
    seen = {}

    class Spy(Known):
        def fit(self, X, y):
            seen["X"], seen["y"] = X, y
            return self

    z = np.random.default_rng(0).normal(size=12)
    DiscriminativeKalmanFilter(Spy(lambda x: np.zeros(len(x))), lag=2).fit(x, z, np.repeat([0, 1], 6))
    np.testing.assert_array_equal(seen["X"], x[[0, 1, 2, 3, 6, 7, 8, 9]])
    np.testing.assert_allclose(seen["y"], z[[2, 3, 4, 5, 8, 9, 10, 11]] - z.mean())


def test_errors_come_from_bins_that_the_regression_did_not_see():
    rng = np.random.default_rng(0)
    z = np.cumsum(rng.normal(size=(200, 1)), 0) * 0.2
    x = z @ np.ones((1, 60)) + 3 * rng.normal(size=(200, 60))
    for holdout, least in ((0.3, 1), (5, 5)):
        seen = []

        class Spy(Known):
            def fit(self, X, y, seen=seen):
                seen.append(X)
                return Ridge(1e-6).fit(X, y)

        decoder = DiscriminativeKalmanFilter(Spy(), holdout=holdout).fit(x, z)
        *parts, last = seen
        assert len(parts) == least
        assert len(last) == 200
        left = []
        for part in parts:
            held = ~(x[:, None] == part[None]).all(2).any(1)
            assert (np.diff(np.flatnonzero(held)) == 1).all()
            left.append(
                (z - z.mean())[held] - Ridge(1e-6).fit(part, (z - z.mean())[~held]).predict(x[held]).reshape(-1, 1)
            )
        assert decoder.Q_[0, 0] == pytest.approx(np.square(np.concatenate(left)).mean(), rel=1e-6)
        assert sum(map(len, left)) == (60 if holdout == 0.3 else 200)


def test_extended_and_unscented_filters_of_linear_features_are_the_kalman_filter(linear):
    _, _, _, x, z, _, _ = linear
    wanted = KalmanFilterDecoder().fit(x, z).predict(x, return_cov=True)
    for kind in (ExtendedKalmanFilterDecoder, UnscentedKalmanFilterDecoder):
        found = kind("linear").fit(x, z).predict(x, return_cov=True)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("features", ["quadratic", "tuning"])
def test_extended_and_unscented_filters_by_the_book(features):
    rng = np.random.default_rng(0)
    z = np.cumsum(rng.normal(size=(200, 2)), 0) * 0.1

    def phi(z):
        z = np.atleast_2d(z)
        more = [z[:, 0] ** 2, z[:, 0] * z[:, 1], z[:, 1] ** 2] if features == "quadratic" else [np.hypot(*z.T)]
        return np.column_stack([z, *more])

    def slopes(z):
        a, b = z
        if features == "quadratic":
            return np.array([[1, 0], [0, 1], [2 * a, 0], [b, a], [0, 2 * b]])
        return np.array([[1, 0], [0, 1], z / np.hypot(a, b)])

    x = phi(z) @ rng.normal(size=(phi(z).shape[1], 12)) + rng.normal(size=(200, 12))
    ekf, ukf = (c(features).fit(x, z) for c in (ExtendedKalmanFilterDecoder, UnscentedKalmanFilterDecoder))
    design = np.column_stack([np.ones(200), phi(z - z.mean(0))])
    beta = np.linalg.lstsq(design, x, rcond=None)[0]
    np.testing.assert_allclose(ekf.B_, beta[1:].T, atol=1e-8)
    np.testing.assert_allclose(ekf.offset_, beta[0], atol=1e-8)
    g = lambda z: beta[0] + phi(z) @ beta[1:]  # noqa: E731
    m, P, m2, P2 = np.zeros(2), ekf.S_, np.zeros(2), ekf.S_
    found, found2 = ekf.predict(x[:20]) - z.mean(0), ukf.predict(x[:20]) - z.mean(0)
    for t in range(20):
        if t:
            m, P = ekf.A_ @ m, ekf.A_ @ P @ ekf.A_.T + ekf.Gamma_
            m2, P2 = ekf.A_ @ m2, ekf.A_ @ P2 @ ekf.A_.T + ekf.Gamma_
        H = beta[1:].T @ slopes(m if t else np.array([0.0, 0.0]) if features == "quadratic" else np.array([1e-300, 0])) \
            if t or features == "quadratic" else beta[1:].T @ np.array([[1.0, 0], [0, 1], [0, 0]])  # fmt: skip
        K = P @ H.T @ np.linalg.inv(H @ P @ H.T + ekf.Lambda_)
        m, P = m + K @ (x[t] - g(m)[0]), P - K @ H @ P
        np.testing.assert_allclose(found[t], m, atol=1e-8)
        L = np.linalg.cholesky(P2) * np.sqrt(3)
        points = np.vstack([m2, m2 + L.T, m2 - L.T])
        w = np.array([1 / 3, *[1 / 6] * 4])
        y = g(points)
        mid = w @ y
        Pyy = (y - mid).T @ np.diag(w) @ (y - mid) + ukf.Lambda_
        K = (points - m2).T @ np.diag(w) @ (y - mid) @ np.linalg.inv(Pyy)
        m2, P2 = m2 + K @ (x[t] - mid), P2 - K @ Pyy @ K.T
        np.testing.assert_allclose(found2[t], m2, atol=1e-8)


def test_missing_neurons_are_left_out_of_a_kalman_step(linear):
    _, _, _, x, z, _, _ = linear
    decoder = KalmanFilterDecoder().fit(x, z)
    x = x[:50].copy()
    x[5, [1, 4]], x[9, 0] = np.nan, np.nan
    wanted = kalman_filter(
        x - decoder.offset_, decoder.A_, decoder.Gamma_, decoder.B_, decoder.Lambda_, np.zeros(3), decoder.S_
    )
    np.testing.assert_allclose(decoder.predict(x) - decoder.mean_, wanted.means, atol=1e-9)


def test_nadaraya_watson_by_hand_and_far_away():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(50, 2))
    model = NadarayaWatson(0.7).fit(x, y)
    q = rng.normal(size=(5, 3))
    w = np.exp(-np.square(q[:, None] - x).sum(-1) / 2 / 0.49)
    np.testing.assert_allclose(model.predict(q), w @ y / w.sum(1, keepdims=True), atol=1e-12)
    far = np.full((1, 3), 1e4)
    near = np.square(far - x).sum(1).argmin()
    np.testing.assert_allclose(model.predict(far)[0], y[near], atol=1e-6)


def test_the_bandwidth_has_the_least_error_when_rows_are_left_out():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (150, 1))
    y = np.sin(3 * x[:, 0]) + 0.2 * rng.normal(size=150)

    def error(s):
        w = np.exp(-np.square(x - x.T) / 2 / s**2) * (1 - np.eye(150))
        return np.square(w @ y / w.sum(1) - y).sum()

    found = NadarayaWatson().fit(x, y).bandwidth_
    best = min(np.geomspace(0.03, 2, 200), key=error)
    assert error(found) <= 1.001 * error(best)


def test_kernel_covariance_follows_the_noise():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (3000, 1))
    z = np.where(x > 0, 1.0, 0.2) * rng.normal(size=(3000, 1))
    decoder = DiscriminativeKalmanFilter(Known(lambda x: np.zeros(len(x))), "kernel", robust=True).fit(x, z)
    Q = decoder._errors(np.array([[-0.5], [0.5]]))[:, 0, 0]
    assert pytest.approx([0.04, 1], rel=0.5) == Q  # neighbours are wide


@pytest.mark.parametrize(
    "regressor",
    [
        MLPRegressor(hidden_layer_sizes=(10,), activation="tanh", max_iter=50, random_state=0),
        GaussianProcessRegressor(alpha=0.1, random_state=0),
    ],
)
def test_any_regressor(regressor):
    s = mixed_states(300, 20, 2, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few iterations
        decoder = DiscriminativeKalmanFilter(regressor, robust=True).fit(s.X, s.Z)
    again = clone(decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(again.fit(s.X, s.Z).predict(s.X), decoder.predict(s.X))
    assert not hasattr(regressor, "n_features_in_")


def test_planted_mixture():
    s = mixed_states(seed=0)
    f, Q = s.posterior(s.X)
    r = s.Z - f
    assert np.einsum("id,id->", r, np.linalg.solve(Q, r[..., None])[..., 0]) / r.size == pytest.approx(1, abs=0.1)
    model = StateModel(s.A, s.Gamma, np.eye(4))
    known = DiscriminativeKalmanFilter(
        Known(lambda x: s.posterior(x)[0]), lambda x: s.posterior(x)[1], state_model=model
    )
    filtered = known.fit(s.X, s.Z).predict(s.X)
    assert normalised_rmse(s.Z, filtered) < 0.86 * normalised_rmse(s.Z, f)
    more = mixed_states(6000, seed=0)
    blind = KalmanFilterDecoder().fit(more.X[:5000], more.Z[:5000]).predict(more.X[5000:])
    assert normalised_rmse(more.Z[5000:], blind) > 0.95


def test_a_step_takes_less_than_a_millisecond():
    s = mixed_states(1000, 100, 4, seed=0)
    for decoder in (KalmanFilterDecoder(), DiscriminativeKalmanFilter(robust=True)):
        decoder.fit(s.X, s.Z)
        took = []
        for x in s.X[:100]:
            start = time.perf_counter()
            decoder.step(x)
            took.append(time.perf_counter() - start)
        assert np.min(took) < 1e-3


def test_measures():
    z = np.array([[1.0, 0], [0, 2], [-3, 0], [0, -4]])
    turned = np.array([[0.0, 1], [0, 1], [1, 1e-9], [-1, -1]])
    assert angle_error(z, turned) == pytest.approx(np.mean([np.pi / 2, 0, np.pi, np.pi / 4]))
    assert angle_error(z, turned, fast=True) == pytest.approx(np.mean([np.pi, np.pi / 4]))
    assert normalised_rmse(z, z) == 0
    assert normalised_rmse(z, np.broadcast_to(z.mean(0), z.shape)) == pytest.approx(1)


def test_picture():
    z = np.random.default_rng(0).normal(size=(30, 2))
    figure = plot_decoded(z, {"a": z + 1, "b": (z, np.broadcast_to(np.eye(2), (30, 2, 2)))}, slice(5, 20))
    assert len(figure.axes) == 2
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), z[5:20, 1] + 1)
    assert figure.axes[0].lines[0].get_xdata()[0] == 5


X, Z = np.random.default_rng(0).normal(size=(20, 4)), np.random.default_rng(1).normal(size=(20, 2))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(lag=-1), "lag"),
        (dict(lag=19), "observation and a state"),
        (dict(stationary=1), "stationary"),
        (dict(state_model=np.eye(2)), "StateModel"),
        (dict(state_model=StateModel(np.eye(3), np.eye(3), np.eye(3))), "dimensions"),
        (dict(guard="none"), "guard"),
        (dict(robust="yes"), "robust"),
        (dict(covariance="full"), "covariance"),
        (dict(covariance=lambda x: np.zeros((len(x), 2, 2))), "what covariance returned"),
        (dict(covariance=lambda x: 1 / 0), "function covariance failed"),
        (dict(holdout=1.5), "holdout"),
        (dict(holdout=0), "holdout"),
        (dict(holdout=40), "blocks"),
        (dict(regressor="ridge"), "regressor must"),
        (dict(regressor=Ridge("a")), "regressor failed"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(InputError, match=words):
        DiscriminativeKalmanFilter().set_params(**settings).fit(X, Z)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((X[0], Z), "shape"),
        ((X, Z[:5]), "y must be"),
        ((X, np.full((20, 2), np.nan)), "y holds NaN"),
        ((X, None), "requires y"),
        ((np.full((20, 4), np.inf), Z), "infinity"),
        ((np.full((20, 4), np.nan), Z), "only 0 bins"),
        ((X, Z * [1, 0]), "do not vary"),
        ((X[:1], Z[:1]), "n_samples = 1"),
        ((X, Z, np.zeros(3)), "groups"),
        ((X, Z, np.arange(20)), "transitions"),
    ],
)
def test_bad_arrays(arrays, words):
    for decoder in ALL:
        with pytest.raises(InputError, match=words):
            clone(decoder).fit(*arrays)


def test_other_bad_inputs():
    decoder = KalmanFilterDecoder().fit(X, Z)
    with pytest.raises(InputError, match="3 features, but it is expecting 4"):
        decoder.predict(X[:, :3])
    with pytest.raises(InputError, match="4 finite numbers"):
        decoder.step(X[0, :2])
    with pytest.raises(InputError, match="groups"):
        decoder.predict(X, np.zeros(3))
    with pytest.raises(InputError, match="features="):
        ExtendedKalmanFilterDecoder("cubic").fit(X, Z)
    with pytest.raises(InputError, match="bandwidth"):
        NadarayaWatson(0).fit(X, Z)
    with pytest.raises(InputError, match="two dimensions"):
        angle_error(X, X)
    with pytest.raises(InputError, match="one shape"):
        normalised_rmse(X, Z)
    with pytest.raises(InputError, match="does not vary"):
        normalised_rmse(np.ones((3, 1)), np.ones((3, 1)))
    for call in (lambda d: d.predict(X), lambda d: d.step(X[0]), lambda d: d.reset()):
        with pytest.raises(NotFittedError):
            call(KalmanFilterDecoder())
    with pytest.raises(InputError, match="noise"):
        mixed_states(noise=(1.0, 0.0))
