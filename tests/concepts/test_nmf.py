"""Nonnegative factorisation: planted parts are found, as well as by scikit-learn; exact least squares and its gradient."""

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import NMF

from nissl.concepts.nmf import NonnegativeProjection, exact_nonnegative_least_squares, nmf
from nissl.errors import InputError
from nissl.studies.craft import planted
from nissl.studies.snmf import matched


def least_squares(a, w):
    return exact_nonnegative_least_squares(a @ w.T, w @ w.T)


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_parts_are_found(seed):
    a, parts, _ = planted(seed)
    found = nmf(torch.from_numpy(a), 6, seed=seed, progress=False)
    cosine = matched(parts, found.components.numpy())
    assert cosine.mean() >= 0.98
    assert cosine.min() >= 0.95
    assert float(found.components.min()) >= 0
    assert float(found.coefficients.min()) >= 0
    assert torch.allclose(found.components.norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("shape", [(300, 40, 5), (50, 200, 8), (60, 12, 12)])
def test_the_error_is_that_of_scikit_learn_and_true(shape):
    n, d, r = shape
    rng = np.random.default_rng(0)
    a = (rng.random((n, r)) ** 2 @ rng.random((r, d)) ** 2 + 0.3 * rng.random((n, d))).astype(np.float32)
    found = nmf(torch.from_numpy(a), r, tol=1e-5, max_iter=2000, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = NMF(r, max_iter=500, random_state=0).fit(a).reconstruction_err_ ** 2
    true = ((a.astype(float) - found.coefficients.double().numpy() @ found.components.double().numpy()) ** 2).sum()
    assert found.loss == pytest.approx(true, rel=1e-3)
    assert found.energy == pytest.approx((a.astype(float) ** 2).sum(), rel=1e-6)
    assert true <= 1.01 * theirs
    assert found.loss <= 1.001 * min(found.losses)


def test_seeds_and_starts():
    a = torch.from_numpy(planted(0)[0])
    one, again, other = (nmf(a, 6, seed=s, progress=False) for s in (3, 3, 4))
    assert torch.equal(one.components, again.components)
    assert not torch.equal(one.components, other.components)
    assert len(one.losses) == 3
    assert len(nmf(a, 6, n_init=1, progress=False).losses) == 1


def test_least_squares_are_those_of_lawson_and_hanson():
    rng = np.random.default_rng(0)
    for r, d in ((1, 3), (6, 20), (20, 64)):
        w = rng.random((r, d))
        a = rng.standard_normal((200, d)) + 0.5
        exact = np.array([nnls(w.T, row)[0] for row in a])
        found = least_squares(torch.from_numpy(a), torch.from_numpy(w)).numpy()
        assert np.abs(found - exact).max() < 1e-9 * exact.max()
        assert ((found > 0) == (exact > 0)).mean() > 0.999


def test_least_squares_of_parts_that_are_alike_or_zero():
    rng = np.random.default_rng(0)
    w = rng.random((8, 30)).cumsum(0)
    w[3], w[5] = w[2], 0
    a = rng.random((100, 30))
    found = least_squares(torch.from_numpy(a), torch.from_numpy(w)).numpy()
    exact = np.array([nnls(w.T, row)[0] for row in a])
    loss = lambda u: ((a - u @ w) ** 2).sum(1)  # noqa: E731
    assert (loss(found) <= loss(exact) * (1 + 1e-6) + 1e-12).all()
    assert (found[:, 5] == 0).all()
    assert (found >= 0).all()


def test_rows_split_into_chunks_and_no_rows():
    w = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    a = torch.rand(2**17 + 5, 9, generator=torch.Generator().manual_seed(1))
    whole = least_squares(a, w)
    assert torch.equal(whole[-7:], least_squares(a[-7:], w))
    assert least_squares(a[:0], w).shape == (0, 4)


def test_the_implicit_gradient_is_that_of_central_differences():
    rng = np.random.default_rng(0)
    w, a, v = rng.random((7, 25)), rng.standard_normal((12, 25)) + 0.4, rng.standard_normal((12, 7))

    def scalar(x):
        return sum(float(nnls(w.T, row)[0] @ g) for row, g in zip(x, v, strict=True))

    x = torch.from_numpy(a).requires_grad_()
    u = NonnegativeProjection.apply(x, torch.from_numpy(w))
    (u * torch.from_numpy(v)).sum().backward()
    assert 0.2 < float((u > 0).double().mean()) < 0.9
    step = 1e-5
    direct = np.zeros_like(a)
    for k in range(25):
        shift = np.zeros(25)
        shift[k] = step
        for i in range(12):
            ends = [nnls(w.T, a[i] + s * shift)[0] for s in (1, -1)]
            assert ((ends[0] > 0) == (ends[1] > 0)).all()  # the support stays
            direct[i, k] = (ends[0] - ends[1]) @ v[i] / (2 * step)
    assert np.abs(x.grad.numpy() - direct).max() < 1e-6
    assert scalar(a) == pytest.approx(float((u.detach() * torch.from_numpy(v)).sum()))


def test_the_projection_keeps_precision_and_gives_parts_no_gradient():
    w = torch.rand(3, 5, requires_grad=True)
    a = torch.rand(4, 5, requires_grad=True)
    u = NonnegativeProjection.apply(a, w)
    assert u.dtype == torch.float32
    u.sum().backward()
    assert a.grad is not None
    assert w.grad is None


@pytest.mark.parametrize(
    ("a", "settings", "says"),
    [
        (torch.rand(5, 4) - 0.5, {}, "negative"),
        (torch.zeros(5, 4), {}, "all zero"),
        (torch.full((5, 4), torch.nan), {}, "finite"),
        (torch.rand(5), {}, "matrix"),
        (torch.rand(0, 4), {}, "matrix"),
        (torch.rand(5, 4), {"rank": 5}, "rank 5"),
        (torch.rand(5, 4), {"rank": 0}, "rank"),
        (torch.rand(5, 4), {"n_init": 0}, "n_init"),
        (torch.rand(5, 4), {"tol": -1.0}, "tol"),
        (torch.rand(5, 4), {"seed": -1}, "seed"),
    ],
)
def test_bad_input(a, settings, says):
    with pytest.raises(InputError, match=says):
        nmf(a, **{"rank": 2, "progress": False, **settings})
