"""LIME, KernelSHAP and Shapley values on games whose values are known."""

from itertools import permutations

import captum.attr
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from nissl.attribution.shapley import LIME, KernelSHAP, ShapleySampling, exact_shapley, kernel_coalitions, subsets
from nissl.errors import InputError
from nissl.network import Network
from nissl.runner import CHUNK, Runner

BOTH = pytest.mark.parametrize("method", [KernelSHAP, ShapleySampling])


def pairwise(n: int, seed: int = 0) -> tuple[Network, np.ndarray]:
    """Game a·z + Σ_{i<j} b_ij z_i z_j on inputs z of ones; a player's value is a_i + Σ_j b_ij / 2."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n), np.triu(rng.normal(size=(n, n)), 1)
    net = Network(lambda z: (z @ a + np.einsum("ri,ij,rj->r", z, b, z))[:, None], dtype=torch.float64)
    return net, a + (b.sum(0) + b.sum(1)) / 2


def threefold(n: int, seed: int = 0) -> Network:
    """A game with interactions of all orders up to three."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(6, n))
    return Network(lambda z: np.sum((z @ w.T + 0.3) ** 3, 1, keepdims=True), dtype=torch.float64)


def by_definition(worth, n: int) -> np.ndarray:
    """Mean contribution over all orders, in plain loops."""
    values, orders = np.zeros(n), list(permutations(range(n)))
    for order in orders:
        z, before = np.zeros(n), worth(np.zeros((1, n)))[0, 0]
        for i in order:
            z[i] = 1
            now = worth(z[None])[0, 0]
            values[i] += now - before
            before = now
    return values / len(orders)


@BOTH
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_small_games_are_exact(method, n):
    net = threefold(n)
    runner = Runner(progress=False)
    s = method(n_samples=64).attribute(net, torch.ones(1, n), 0, runner=runner)
    np.testing.assert_allclose(s[0], by_definition(net.module.predict, n), rtol=1e-9, atol=1e-9)
    assert s.completeness_gap[0] < 1e-9
    assert s.attrs["forward_passes"] == 2**n


def test_exact_values_of_the_glove_game():
    """One left and two right gloves: the left one's value is 2/3."""
    z = subsets(3)
    np.testing.assert_allclose(exact_shapley(z, (z[:, 0] & (z[:, 1] | z[:, 2])).astype(float)), [2 / 3, 1 / 6, 1 / 6])


@BOTH
@pytest.mark.parametrize(("n", "n_samples"), [(12, 101), (25, 160), (40, 300)])
def test_games_of_pairs_are_exact_from_few_samples(method, n, n_samples):
    net, expected = pairwise(n)
    s = method(n_samples=n_samples).attribute(net, torch.ones(1, n), 0, seed=1)
    np.testing.assert_allclose(s[0], expected, atol=1e-8)
    assert s.attrs["forward_passes"] <= n_samples


@BOTH
def test_more_samples_come_closer(method):
    n = 10
    net = threefold(n)
    exact = method(n_samples=1024).attribute(net, torch.ones(1, n), 0)
    errors = [
        np.mean([np.abs(method(n_samples=k).attribute(net, torch.ones(1, n), 0, seed=s) - exact) for s in range(4)])
        for k in (40, 600)
    ]
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.1 * np.abs(exact).mean()


@BOTH
@pytest.mark.parametrize("budget", [1, 5, 9, 33, 90])
def test_values_are_complete_at_any_budget(method, budget):
    n = 30
    net, _ = pairwise(n)
    runner = Runner(progress=False)
    s = method().at_budget(budget).attribute(net, torch.ones(1, n), 0, runner=runner)
    ends = net.module.predict(np.stack([np.zeros(n), np.ones(n)]))[:, 0]
    np.testing.assert_allclose(s.sum(), ends[1] - ends[0], rtol=1e-9)
    assert s.completeness_gap[0] < 1e-9
    assert runner.cost(method.name).forward <= max(budget, 4)


def test_kernel_coalitions_carry_the_shapley_kernel():
    """Weights of each size sum to its mass, whether a size is asked in full or drawn."""
    for n, n_samples in ((5, 32), (6, 64), (9, 100), (30, 2000)):
        present, weights = kernel_coalitions(n, n_samples, np.random.default_rng(0))
        assert len(present) <= n_samples - 2
        assert len(present) >= n_samples - 3 or len(present) == 2**n - 2
        sizes = present.sum(1)
        assert sizes.min() >= 1
        assert sizes.max() <= n - 1
        mass = 1 / (np.arange(1, n) * (n - np.arange(1, n)))
        found = np.bincount(sizes, weights, minlength=n)[1:]
        np.testing.assert_allclose(found, mass / mass.sum(), atol=0.03 if len(present) < 2**n - 2 else 1e-12)
        np.testing.assert_allclose(weights.sum(), 1)
        codes = {row.tobytes() for row in present}
        assert all((~row).tobytes() in codes for row in present)
    inner, weights = kernel_coalitions(6, 64, np.random.default_rng(0))
    assert len({row.tobytes() for row in inner}) == 62


def test_background_rows_are_averaged():
    """For a linear model a Shapley value is w (x - mean of the background)."""
    generator = torch.Generator().manual_seed(0)
    x, background = torch.randn(2, 8, generator=generator).double(), torch.randn(50, 8, generator=generator).double()
    model = nn.Linear(8, 3).double().requires_grad_(False)
    for method in (KernelSHAP(n_samples=40, baseline=background), ShapleySampling(n_samples=40, baseline=background)):
        s = method.attribute(Network(model), x, 2)
        np.testing.assert_allclose(s, model.weight[2] * (x - background.mean(0)), atol=1e-9)


def test_kernelshap_agrees_with_captum():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)).double().requires_grad_(False)
    x = torch.randn(1, 8).double()
    mine = KernelSHAP().attribute(Network(model), x, 1)
    theirs = captum.attr.KernelShap(model).attribute(x, target=1, n_samples=4000)
    assert np.abs(mine.values - theirs.numpy()).max() < 0.1 * np.abs(mine).max()


def test_patches_share_their_value():
    """Scores of an image lie on its pixels; they sum to f(x) - f(0) in each patch and over all."""
    torch.manual_seed(0)
    layer = nn.Linear(3 * 6 * 6, 1).double().requires_grad_(False)
    x = torch.rand(1, 3, 6, 6).double()
    net = Network(nn.Sequential(nn.Flatten(), layer))
    contributions = (layer.weight.reshape(3, 6, 6) * x[0]).sum(0)
    for method in (KernelSHAP(size=2), ShapleySampling(size=2, n_samples=60)):
        s = method.attribute(net, x, 0)[0]
        assert s.dims == ("y", "x")
        patches = contributions.reshape(3, 2, 3, 2).sum((1, 3))
        np.testing.assert_allclose(s.values.reshape(3, 2, 3, 2).sum((1, 3)), patches, atol=1e-9)
        np.testing.assert_allclose(s.values[:2, :2], float(patches[0, 0] / 4), atol=1e-9)


@pytest.mark.parametrize("n_samples", [64, 400])
def test_lime_of_a_linear_model_without_penalty_is_weight_times_difference(n_samples):
    torch.manual_seed(0)
    n = 6 if n_samples == 64 else 20
    layer = nn.Linear(n, 2).double().requires_grad_(False)
    x = torch.randn(1, n).double()
    s = LIME(n_samples=n_samples, alpha=1e-9, baseline=0.25).attribute(Network(layer), x, 1)
    np.testing.assert_allclose(s[0], layer.weight[1] * (x[0] - 0.25), atol=1e-7)
    assert s.surrogate_r2[0] > 1 - 1e-9
    assert s.attrs["forward_passes"] == n_samples


def test_lime_weighs_coalitions_by_cosine_distance():
    """The fit equals weighted least squares by hand, on all coalitions of a game with interactions."""
    n, width = 5, 0.4
    net = threefold(n)
    s = LIME(n_samples=32, kernel_width=width, alpha=1e-9).attribute(net, torch.ones(1, n), 0)
    z = subsets(n).astype(float)
    cosine = np.array([0 if not row.any() else row.sum() / np.linalg.norm(row) / np.sqrt(n) for row in z])
    w = np.exp(-((1 - cosine) ** 2) / width**2)
    design = np.concatenate([z, np.ones((len(z), 1))], 1)
    y = net.module.predict(z)[:, 0]
    fitted = np.linalg.solve(design.T @ (design * w[:, None]), design.T @ (w * y))
    np.testing.assert_allclose(s[0], fitted[:n], rtol=1e-6)
    missing = w @ (y - design @ fitted) ** 2 / (w @ (y - w @ y / w.sum()) ** 2)
    np.testing.assert_allclose(s.surrogate_r2[0], 1 - missing, rtol=1e-6)


def test_lasso_leaves_out_what_does_not_matter():
    w = np.zeros(15)
    w[[2, 9]] = 3.0, -2.0
    net = Network(lambda z: (z @ w)[:, None], dtype=torch.float64)
    s = LIME(linear_model="lasso").attribute(net, torch.ones(1, 15), 0)[0].values
    assert np.flatnonzero(s).tolist() == [2, 9]
    np.testing.assert_allclose(s[[2, 9]], [3, -2], atol=0.2)


def test_lime_takes_superpixels_of_images():
    image = torch.zeros(1, 1, 24, 24)
    image[..., 12:] = 1.0
    net = Network(lambda a: a[:, 0, :, 12:].sum((1, 2))[:, None] + 0 * a[:, 0, :, :12].sum((1, 2))[:, None])
    s = LIME(superpixels=16).attribute(net, image, 0)[0]
    assert s.dims == ("y", "x")
    assert s.shape == (24, 24)
    np.testing.assert_allclose(s[:, :12], 0, atol=1e-2)
    np.testing.assert_allclose(s[:, 12:], 1, atol=0.1)


def test_a_black_box_decoder_is_explained():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6))
    model = LogisticRegression().fit(x, x[:, 1] - x[:, 4] > 0)
    net = Network(model, dtype=torch.float64)
    for method in (KernelSHAP(), ShapleySampling(), LIME()):
        s = method.attribute(net, x[:3], 1)
        scale = np.abs(s).mean("example")
        assert set(scale.argsort().values[-2:].tolist()) == {1, 4}


@pytest.mark.parametrize("method", [LIME(n_samples=90), KernelSHAP(n_samples=90), ShapleySampling(n_samples=90)])
def test_coalitions_repeat_with_their_seed_and_come_in_chunks(method):
    n = 12
    net = threefold(n)
    sizes = []
    run = net.run
    net.run = lambda p: (sizes.append(p.n), run(p))[1]
    one = method.attribute(net, torch.ones(1, n), 0, seed=1)
    assert max(sizes) <= CHUNK
    np.testing.assert_array_equal(one, method.attribute(net, torch.ones(1, n), 0, seed=1))
    assert np.abs(one - method.attribute(net, torch.ones(1, n), 0, seed=2)).max() > 0


def test_an_answer_that_never_changes_gives_zero():
    net = Network(lambda z: np.ones((len(z), 1)))
    for method in (LIME(n_samples=40), KernelSHAP(n_samples=40), ShapleySampling(n_samples=40)):
        s = method.attribute(net, torch.rand(1, 9), 0)
        np.testing.assert_allclose(s, 0, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        (LIME, {"n_samples": 3}),
        (LIME, {"kernel_width": 0.0}),
        (LIME, {"alpha": 0.0}),
        (KernelSHAP, {"size": 0}),
        (KernelSHAP, {"size": 4, "superpixels": 9}),
        (ShapleySampling, {"baseline": "grey"}),
    ],
)
def test_parameters_that_are_refused(method, bad):
    with pytest.raises(InputError):
        method(**bad)


def test_superpixels_of_a_table_are_refused():
    with pytest.raises(InputError, match="an image"):
        KernelSHAP(superpixels=9).attribute(pairwise(5)[0], torch.ones(1, 5), 0)
