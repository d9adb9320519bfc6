"""State spaces are held to the joint Gaussian of all states and observations, written down whole and conditioned."""

import numpy as np
import pytest

from nissl.errors import InputError
from nissl.recordings.state_space import StateModel, ffbs, kalman_filter, rts_smoother

D, N, T = 2, 3, 6


def spd(rng, n, *lead):
    a = rng.normal(size=(*lead, n, n))
    return a @ a.swapaxes(-1, -2) + 0.3 * np.eye(n)


@pytest.fixture(params=[False, True], ids=["constant", "timed"])
def system(request):
    rng = np.random.default_rng(0)
    lead = (T,) if request.param else ()
    A = 0.5 * rng.normal(size=(*lead, D, D))
    return dict(A=A, Gamma=spd(rng, D, *lead), H=rng.normal(size=(*lead, N, D)), Lambda=spd(rng, N, *lead),
                mean=rng.normal(size=D), cov=spd(rng, D))  # fmt: skip


def joint(s, x, upto=T):
    """Posterior mean (T, D) and covariance (T D, T D) of all states given x[:upto], and the log-likelihood of x[:upto]."""
    A, Gamma, H, Lambda = (np.broadcast_to(s[k], (T, *s[k].shape[-2:])) for k in ("A", "Gamma", "H", "Lambda"))
    m, C = np.zeros((T, D)), np.zeros((T, D, T, D))
    m[0], C[0, :, 0] = s["mean"], s["cov"]
    for t in range(1, T):
        m[t] = A[t] @ m[t - 1]
        C[t, :, :t] = np.einsum("ij,jsk->isk", A[t], C[t - 1, :, :t])
        C[:t, :, t] = C[t, :, :t].transpose(1, 2, 0)
        C[t, :, t] = A[t] @ C[t - 1, :, t - 1] @ A[t].T + Gamma[t]
    C = C.reshape(T * D, T * D)
    big, noise = np.zeros((T * N, T * D)), np.zeros((T * N, T * N))
    for t in range(T):
        big[t * N : t * N + N, t * D : t * D + D] = H[t]
        noise[t * N : t * N + N, t * N : t * N + N] = Lambda[t]
    seen = ~np.isnan(x.ravel()) & (np.arange(T * N) < upto * N)
    big, y = big[seen], x.ravel()[seen]
    V = big @ C @ big.T + noise[np.ix_(seen, seen)]
    e, K = y - big @ m.ravel(), C @ big.T @ np.linalg.inv(V)
    score = -(e @ np.linalg.solve(V, e) + np.linalg.slogdet(2 * np.pi * V)[1]) / 2
    return (m.ravel() + K @ e).reshape(T, D), C - K @ big @ C, score


def observed(missing):
    x = np.random.default_rng(1).normal(size=(4, T, N))
    if missing:
        x[0, 2, 1], x[1, 3], x[2, 0, :2], x[3, -1] = np.nan, np.nan, np.nan, np.nan
    return x


@pytest.mark.parametrize("missing", [False, True])
def test_filter_smoother_and_likelihood_are_those_of_the_joint_gaussian(system, missing):
    x = observed(missing)
    found = kalman_filter(x, **system)
    means, covs = rts_smoother(found, system["A"])
    for i in range(len(x)):
        m, C, score = joint(system, x[i])
        np.testing.assert_allclose(means[i], m, atol=1e-10)
        np.testing.assert_allclose(found.log_likelihood[i], score, atol=1e-9)
        for t in range(T):
            at = slice(t * D, t * D + D)
            np.testing.assert_allclose(covs[i, t], C[at, at], atol=1e-10)
            past, V, _ = joint(system, x[i], t + 1)
            np.testing.assert_allclose(found.means[i, t], past[t], atol=1e-10)
            np.testing.assert_allclose(found.covs[i, t], V[at, at], atol=1e-10)
            before, V, _ = joint(system, x[i], t)
            np.testing.assert_allclose(found.predicted_means[i, t], before[t], atol=1e-10)
            np.testing.assert_allclose(found.predicted_covs[i, t], V[at, at], atol=1e-10)


def test_draws_have_the_mean_and_the_covariance_over_times_of_the_posterior(system):
    x = observed(True)[:2]
    draws = ffbs(kalman_filter(x, **system), system["A"], 40_000, seed=0)
    assert draws.shape == (40_000, 2, T, D)
    for i in range(2):
        m, C, _ = joint(system, x[i])
        flat = draws[:, i].reshape(-1, T * D)
        sd = np.sqrt(np.diag(C))
        assert (np.abs(flat.mean(0) - m.ravel()) < 5 * sd / 200).all()
        assert (np.abs(np.cov(flat.T) - C) < 0.03 * np.outer(sd, sd)).all()
    np.testing.assert_array_equal(
        draws[:5, 0, 0], ffbs(kalman_filter(x, **system), system["A"], 40_000, seed=0)[:5, 0, 0]
    )


def test_a_state_without_noise_of_its_own_is_filtered():
    s = dict(A=np.array([[1.0, 1.0], [0, 1]]), Gamma=np.zeros((2, 2)), H=np.eye(2)[:1], Lambda=np.eye(1), mean=np.zeros(2),
             cov=100 * np.eye(2))  # fmt: skip
    x = 3 + 2 * np.arange(50.0)[:, None]
    assert kalman_filter(x, **s).means[-1] == pytest.approx([101, 2], abs=0.05)


def test_dynamics_are_learnt_and_not_transposed():
    rng = np.random.default_rng(0)
    A = np.array([[0.9, 0.3], [-0.2, 0.8]])
    z = np.zeros((40_000, 2))
    for t in range(1, len(z)):
        z[t] = A @ z[t - 1] + rng.normal(size=2) * [1, 0.5]
    model = StateModel.fit(z + 7, stationary=True)
    np.testing.assert_allclose(model.A, A, atol=0.015)
    np.testing.assert_allclose(model.Gamma, np.diag([1, 0.25]), atol=0.03)
    np.testing.assert_allclose(model.S, model.A @ model.S @ model.A.T + model.Gamma, atol=1e-10)
    np.testing.assert_allclose(model.mean, 7, atol=0.3)


def test_there_is_no_transition_across_trials():
    z = np.array([[0.0], [1], [0.5], [100], [50], [25]])
    model = StateModel.fit(z, np.array([0, 3]))
    c = z[:, 0] - z.mean()
    a = (c[[1, 2, 4, 5]] @ c[[0, 1, 3, 4]]) / (c[[0, 1, 3, 4]] @ c[[0, 1, 3, 4]])
    assert model.A[0, 0] == pytest.approx(a)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(x=np.zeros(3)), "x must be"),
        (dict(x=np.full((T, N), np.inf)), "x must be"),
        (dict(A=np.eye(3)), "A must be"),
        (dict(H=np.zeros((D, N))), "H must be"),
        (dict(Lambda=np.zeros((N, N))), "Lambda must be positive definite"),
        (dict(Gamma=-np.eye(D)), "Gamma must be positive semidefinite"),
        (dict(cov=np.array([[1.0, 0.5], [0, 1]])), "symmetric"),
        (dict(mean=np.array([0, np.nan])), "mean must be finite"),
        (dict(A="b"), "matrix of numbers"),
        (dict(H=np.full((N, D), np.nan)), "finite"),
    ],
)
def test_bad_inputs(change, words):
    rng = np.random.default_rng(0)
    good = dict(x=np.zeros((T, N)), A=np.eye(D), Gamma=np.eye(D), H=rng.normal(size=(N, D)), Lambda=np.eye(N), mean=np.zeros(D),
                cov=np.eye(D))  # fmt: skip
    with pytest.raises(InputError, match=words):
        kalman_filter(**(good | change))


def test_bad_models_and_draws():
    with pytest.raises(InputError, match="transitions"):
        StateModel.fit(np.zeros((2, 2)))
    with pytest.raises(InputError, match="do not vary"):
        StateModel.fit(np.stack([np.arange(9.0), np.ones(9)], 1))
    with pytest.raises(InputError, match="without end"):
        StateModel.fit(1.1 ** np.arange(60.0)[:, None], stationary=True)
    with pytest.raises(InputError, match="square"):
        StateModel(np.zeros((2, 3)), np.eye(2), np.eye(2))
    found = kalman_filter(
        np.zeros((3, 1)), np.eye(1), np.zeros((1, 1)), np.eye(1), np.eye(1), np.zeros(1), np.zeros((1, 1))
    )
    with pytest.raises(InputError, match="singular"):
        rts_smoother(found, np.eye(1))
    with pytest.raises(InputError, match="n_samples"):
        ffbs(found, np.eye(1), 0)
