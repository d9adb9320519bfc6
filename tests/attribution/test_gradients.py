"""Gradient methods against analytic networks, captum, and their own promises."""

import captum.attr as captum
import numpy as np
import pytest
import torch
from torch import nn

from nissl.attribution import (
    ExpectedGradients,
    InputXGradient,
    IntegratedGradients,
    Method,
    Saliency,
    SmoothGrad,
    VarGrad,
)
from nissl.attribution.gradients import path
from nissl.errors import GradientError, InputError
from nissl.network import Network, target
from nissl.runner import CHUNK, Runner

ALL = [Saliency, InputXGradient, IntegratedGradients, SmoothGrad, VarGrad, ExpectedGradients]


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Softplus(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 6, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(24, 5),
        )
        .double()
        .eval()
    )


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


Y = torch.tensor([1, 4, 0])


def linear() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(2)
    return nn.Linear(6, 3).double().eval(), torch.randn(2, 6, dtype=torch.float64)


def spied(network: Network) -> list[int]:
    """Rows of every batch that the network is asked from now on."""
    rows: list[int] = []
    network.module.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    return rows


def test_linear_network_is_explained_exactly():
    module, v = linear()
    net, w = Network(module), module.weight.detach()
    for y in range(3):
        np.testing.assert_allclose(Saliency().attribute(net, v, y).values, w[y].abs().expand(2, 6), rtol=1e-12)
        contribution = (w[y] * v).numpy()
        np.testing.assert_allclose(InputXGradient().attribute(net, v, y).values, contribution, rtol=1e-12)
        for quadrature in ("gausslegendre", "riemann_middle", "riemann_left", "riemann_right", "riemann_trapezoid"):
            ig = IntegratedGradients(steps=3, quadrature=quadrature).attribute(net, v, y)
            np.testing.assert_allclose(ig.values, contribution, rtol=1e-12)
        # a linear network has one gradient, wherever it is taken
        noisy = SmoothGrad(samples=5, what="gradient").attribute(net, v, y)
        np.testing.assert_allclose(noisy.values, w[y].expand(2, 6), rtol=1e-12)
        np.testing.assert_allclose(VarGrad(samples=5).attribute(net, v, y).values, 0, atol=1e-28)
        pool = torch.randn(1, 6, dtype=torch.float64)
        shap = ExpectedGradients(samples=7, baseline=pool).attribute(net, v, y)
        np.testing.assert_allclose(shap.values, w[y] * (v - pool), rtol=1e-12)


def test_saliency_and_ixg_equal_captum(cnn, x):
    net = Network(cnn)
    np.testing.assert_allclose(
        Saliency().attribute(net, x, Y).values,
        captum.Saliency(cnn).attribute(x.clone().requires_grad_(), target=Y).numpy(),
        rtol=1e-10,
    )
    theirs = captum.InputXGradient(cnn).attribute(x.clone().requires_grad_(), target=Y).detach().numpy()
    np.testing.assert_allclose(InputXGradient().attribute(net, x, Y).values, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("quadrature", ["gausslegendre", "riemann_middle", "riemann_left", "riemann_right"])
def test_integrated_gradients_equal_captum(cnn, x, quadrature):
    # captum keeps its steps in float32
    ours = IntegratedGradients(steps=9, quadrature=quadrature).attribute(Network(cnn), x, Y).values
    theirs = captum.IntegratedGradients(cnn).attribute(
        x, torch.zeros_like(x), target=Y, method=quadrature, n_steps=9
    )  # fmt: skip
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-6, atol=1e-8)


def test_integrated_gradients_at_a_layer_equal_captum(cnn, x):
    ours = IntegratedGradients(steps=11).attribute(Network(cnn), x, Y, site="2").values
    at = captum.LayerIntegratedGradients(cnn, cnn[2])
    # captum walks from the layer's activation at the baseline input; ours from zero activation, so give it that one
    start = cnn[:3](torch.zeros_like(x[:1])).detach()
    ours_from_there = IntegratedGradients(steps=11, baseline=start).attribute(Network(cnn), x, Y, site="2").values
    theirs = at.attribute(x, torch.zeros_like(x), target=Y, n_steps=11).detach().numpy()
    np.testing.assert_allclose(ours_from_there, theirs, rtol=1e-6, atol=1e-8)
    assert np.abs(ours - theirs).max() > 1e-3


def test_integrated_gradients_are_complete(cnn, x):
    net = Network(cnn)
    with torch.no_grad():
        for b in (0.0, 0.3):
            promised = (cnn(x) - cnn(torch.full_like(x, b))).gather(1, Y[:, None])[:, 0].numpy()
            scores = IntegratedGradients(steps=64, baseline=b).attribute(net, x, Y)
            np.testing.assert_allclose(scores.sum(("channel", "y", "x")), promised, rtol=1e-8)
            np.testing.assert_allclose(
                scores.completeness_gap,
                np.abs(scores.sum(("channel", "y", "x")) - promised) / np.abs(promised),
                rtol=1e-6, atol=1e-12,
            )  # fmt: skip


def test_the_completeness_gap_shows_a_path_that_is_too_coarse():
    class Step(nn.Module):
        def forward(self, x):
            return torch.sigmoid(40 * (x.sum(1, keepdim=True) - 1))

    net, v = Network(Step(), dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    assert IntegratedGradients(steps=2).attribute(net, v, 0).completeness_gap.item() > 0.5
    assert IntegratedGradients(steps=200).attribute(net, v, 0).completeness_gap.item() < 1e-6


def test_quadratures_integrate_polynomials():
    for k in range(1, 6):
        points, weights = path(k, "gausslegendre")
        for degree in range(2 * k):  # exact up to degree 2k - 1
            assert weights @ points**degree == pytest.approx(1 / (degree + 1), rel=1e-12)
    for name in ("riemann_middle", "riemann_trapezoid"):
        points, weights = path(4, name)
        assert weights.sum() == pytest.approx(1)
        assert weights @ points == pytest.approx(0.5)
    with pytest.raises(InputError, match="gausslegendre"):
        path(3, "simpson")


def test_smoothgrad_and_vargrad_are_mean_and_variance_of_the_same_gradients(cnn, x):
    """70 samples are three chunks; mean and variance must not know of that."""
    net = Network(cnn)
    seen: list[torch.Tensor] = []
    handle = cnn.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach().clone()))
    mean = SmoothGrad(samples=70, noise=0.2, what="gradient").attribute(
        net, x[:1], Y[:1], runner=Runner(tune=False), seed=5
    )  # fmt: skip
    handle.remove()
    noisy = torch.cat(seen).requires_grad_()
    assert noisy.shape[0] == 70
    assert (noisy - x[:1]).std().item() == pytest.approx(0.2 * float(x[0].max() - x[0].min()), rel=0.02)
    g = torch.autograd.grad(cnn(noisy)[:, 1].sum(), noisy)[0].numpy()
    np.testing.assert_allclose(mean.values[0], g.mean(0), rtol=1e-8, atol=1e-12)
    variance = VarGrad(samples=70, noise=0.2).attribute(net, x[:1], Y[:1], seed=5)
    np.testing.assert_allclose(variance.values[0], g.var(0, ddof=1), rtol=1e-8, atol=1e-16)
    absolute = SmoothGrad(samples=70, noise=0.2).attribute(net, x[:1], Y[:1], seed=5)
    np.testing.assert_allclose(absolute.values[0], np.abs(g).mean(0), rtol=1e-8, atol=1e-12)
    products = SmoothGrad(samples=70, noise=0.2, what="ixg").attribute(net, x[:1], Y[:1], seed=5)
    np.testing.assert_allclose(products.values[0], (g * noisy.detach().numpy()).mean(0), rtol=1e-8, atol=1e-12)


def test_smoothgrad_without_noise_is_saliency(cnn, x):
    net = Network(cnn)
    np.testing.assert_allclose(
        SmoothGrad(samples=3, noise=0.0).attribute(net, x, Y).values, Saliency().attribute(net, x, Y).values, rtol=1e-10
    )


def test_expected_gradients_tend_to_integrated_gradients(cnn, x):
    net = Network(cnn)
    many = ExpectedGradients(samples=2000, baseline="zero").attribute(net, x[:1], Y[:1]).values
    exact = IntegratedGradients(steps=64).attribute(net, x[:1], Y[:1]).values
    assert np.abs(many - exact).max() < 0.1 * np.abs(exact).max()


def test_thousand_steps_are_held_chunk_by_chunk(cnn, x):
    net = Network(cnn)
    rows = spied(net)
    scores = IntegratedGradients(steps=1000).attribute(net, x[:1], Y[:1], runner=Runner(tune=False))
    assert max(rows) <= CHUNK
    assert scores.attrs["backward_passes"] == 1000
    assert scores.completeness_gap.item() < 1e-6


@pytest.mark.parametrize(
    ("made", "forward", "backward"),
    [(Saliency(), 3, 3), (InputXGradient(), 3, 3), (IntegratedGradients(steps=7), 3 * 9, 21),
     (SmoothGrad(samples=7), 21, 21), (VarGrad(samples=7), 21, 21), (ExpectedGradients(samples=7), 21, 21)],
)  # fmt: skip
def test_costs_are_counted(cnn, x, made: Method, forward, backward):
    scores = made.attribute(Network(cnn), x, Y)
    assert (scores.attrs["forward_passes"], scores.attrs["backward_passes"]) == (forward, backward)


def test_budgets():
    assert IntegratedGradients(steps=100).at_budget(40).steps == 40  # pyright: ignore
    assert IntegratedGradients(steps=10).at_budget(40).steps == 10  # pyright: ignore
    assert VarGrad().at_budget(1).samples == 2  # pyright: ignore
    assert Saliency().at_budget(40) is not None


@pytest.mark.parametrize("cls", ALL)
def test_inner_sites_have_their_own_units(cnn, x, cls):
    scores = cls().attribute(Network(cnn), x, Y, site="3")
    assert scores.dims == ("example", "channel", "y", "x")
    assert scores.shape == (3, 6, 2, 2)
    assert scores.attrs["site"] == "3"


def test_gradients_at_inner_sites_equal_those_of_the_rest_of_the_network(cnn, x):
    inner = cnn[:4](x).detach().requires_grad_()
    g = torch.autograd.grad(cnn[4:](inner).gather(1, Y[:, None]).sum(), inner)[0]
    np.testing.assert_allclose(Saliency().attribute(Network(cnn), x, Y, site="3").values, g.abs(), rtol=1e-10)


def test_seeds(cnn, x):
    net = Network(cnn)
    for made in (SmoothGrad(samples=4), VarGrad(samples=4), ExpectedGradients(samples=4)):
        a, b, c = (made.attribute(net, x, Y, seed=s).values for s in (3, 3, 4))
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 0
        # an example's noise is its own, whoever stands beside it
        alone = made.attribute(net, x[:1], Y[:1], seed=3).values
        np.testing.assert_allclose(a[:1], alone, rtol=1e-9, atol=1e-12)


def test_tokens_are_explained_at_their_embedding():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.read = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, ids):
            return self.read(self.embed(ids).tanh().mean(1))

    torch.manual_seed(0)
    net = Network(Text().eval())
    for length in (5, 7):  # another length than the one seen first
        ids = torch.randint(0, 9, (2, length))
        scores = IntegratedGradients(steps=50).attribute(net, ids, 1)
        assert scores.dims == ("example", "token", "unit")
        assert scores.shape == (2, length, 4)
        assert scores.completeness_gap.max() < 1e-4


def test_targets(cnn, x):
    net = Network(cnn)
    difference = InputXGradient().attribute(net, x, target.logit_difference(1, 2)).values
    one, two = (InputXGradient().attribute(net, x, y).values for y in (1, 2))
    np.testing.assert_allclose(difference, one - two, rtol=1e-9, atol=1e-13)


def test_black_boxes_have_no_gradient():
    net = Network(lambda v: v @ np.ones((3, 2)))
    for cls in ALL:
        with pytest.raises(GradientError, match="no gradients"):
            cls().attribute(net, np.ones((1, 3)), 0)


@pytest.mark.parametrize(
    "wrong",
    [lambda: IntegratedGradients(steps=0), lambda: IntegratedGradients(quadrature="x"),
     lambda: IntegratedGradients(baseline="black"), lambda: SmoothGrad(noise=-1.0),
     lambda: SmoothGrad(noise=float("nan")), lambda: SmoothGrad(samples=True),
     lambda: VarGrad(samples=1), lambda: ExpectedGradients(samples=0)],
)  # fmt: skip
def test_bad_parameters_raise(wrong):
    with pytest.raises(InputError):
        wrong()
