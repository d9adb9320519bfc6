"""Occlusion and RISE against linear models, where their answers are known, and against captum."""

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from nissl.attribution.perturbation import RISE, Occlusion, intervals_of
from nissl.errors import InputError
from nissl.network import Network
from nissl.runner import Runner


def linear(*shape: int, seed: int = 0, **kwargs) -> tuple[Network, torch.Tensor, torch.Tensor]:
    """A linear model with weights of that shape, those weights and an input."""
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(shape, generator=generator).double(), torch.randn(1, *shape, generator=generator).double()
    layer = nn.Linear(w.numel(), 1).double().requires_grad_(False)
    layer.weight.copy_(w.reshape(1, -1))
    return Network(nn.Sequential(nn.Flatten(), layer), **kwargs), w, x


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    return (
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)).double().requires_grad_(False)
    )


def test_occlusion_of_a_linear_model_is_weight_times_difference():
    net, w, x = linear(7)
    s = Occlusion(baseline=0.5).attribute(net, x, 0)
    assert s.dims == ("example", "feature")
    np.testing.assert_allclose(s[0], w * (x[0] - 0.5), atol=1e-12)
    assert s.attrs["forward_passes"] == 7 + 1


def test_windows_that_do_not_overlap_keep_their_fall_as_their_sum():
    net, w, x = linear(2, 6, 9)
    s = Occlusion(window=3).attribute(net, x, 0)[0]
    assert s.dims == ("y", "x")
    parts = (w * x[0]).sum(0).reshape(2, 3, 3, 3).sum((1, 3))
    np.testing.assert_allclose(s.values.reshape(2, 3, 3, 3).sum((1, 3)), parts, atol=1e-12)
    np.testing.assert_allclose(s.values[:3, :3], float(parts[0, 0] / 9), atol=1e-12)


def test_windows_cut_at_the_edge_share_over_what_is_left():
    net, w, x = linear(1, 5, 5)
    s = Occlusion(window=3).attribute(net, x, 0)[0].values
    contribution = (w * x[0])[0].numpy()
    np.testing.assert_allclose(s[3:, 3:], contribution[3:, 3:].mean(), atol=1e-12)
    np.testing.assert_allclose(s.sum(), contribution.sum(), atol=1e-12)


def test_occlusion_agrees_with_captum():
    model = convolutional()
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    mine = Occlusion(window=4, stride=2, baseline=0.3).attribute(Network(model), x, [0, 2])
    theirs = captum.attr.Occlusion(model).attribute(
        x, sliding_window_shapes=(3, 4, 4), strides=(3, 2, 2), target=torch.tensor([0, 2]), baselines=0.3
    )
    np.testing.assert_allclose(mine * 16, theirs[:, 0], atol=1e-12)  # captum does not share the fall over the window


def test_series_are_occluded_channel_by_channel():
    net, w, x = linear(3, 8)
    s = Occlusion(window=4).attribute(net, x, 0)[0]
    assert s.dims == ("channel", "time")
    parts = (w * x[0]).reshape(3, 2, 4).mean(2)
    np.testing.assert_allclose(s, parts.repeat_interleave(4, 1), atol=1e-12)


def test_tokens_are_replaced_whole():
    values = torch.tensor([0.0, 3.0, 5.0, 7.0])
    net = Network(lambda ids: values.numpy()[ids].sum(1, keepdims=True))
    s = Occlusion().attribute(net, torch.tensor([[1, 3, 0, 2]]), 0)[0]
    assert s.dims == ("token",)
    assert s.values.tolist() == [3, 7, 0, 5]
    assert Occlusion(baseline=1).attribute(net, torch.tensor([[1, 3, 0, 2]]), 0)[0].values.tolist() == [0, 4, -3, 2]


def test_inner_maps_get_windows_of_five_by_default_two_apart():
    model = convolutional()
    x = torch.rand(1, 3, 18, 18, generator=torch.Generator().manual_seed(1)).double()
    s = Occlusion().attribute(Network(model), x, 1, site="3")
    assert s.dims == ("example", "y", "x")
    assert s.shape == (1, 9, 9)
    a = model[:4](x)
    f = model[4:](a)[0, 1]
    total, times = torch.zeros(9, 9).double(), torch.zeros(9, 9).double()
    for i in (0, 2, 4):
        for j in (0, 2, 4):
            without = a.clone()
            without[:, :, i : i + 5, j : j + 5] = 0
            total[i : i + 5, j : j + 5] += (f - model[4:](without)[0, 1]) / 25
            times[i : i + 5, j : j + 5] += 1
    np.testing.assert_allclose(s[0], total / times, atol=1e-12)


@pytest.mark.parametrize("passes", [2, 10, 60, 500])
def test_occlusion_keeps_to_its_budget(passes):
    net, w, x = linear(1, 14, 14)
    runner = Runner(progress=False)
    s = Occlusion().at_budget(passes).attribute(net, x, 0, runner=runner)
    assert runner.cost("occlusion").forward <= passes
    np.testing.assert_allclose(s.sum(), float((w * x[0]).sum()), rtol=1e-9)


def test_intervals_cover_everything():
    assert intervals_of(5, 2, 2).long().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert intervals_of(3, 3, 2).long().tolist() == [[1, 1, 1]]


def test_a_stride_that_leaves_gaps_is_refused():
    with pytest.raises(InputError, match="gaps"):
        Occlusion(window=2, stride=3)
    net, _, x = linear(1, 14, 14)
    with pytest.raises(InputError, match="give window="):
        Occlusion(stride=2).attribute(net, x, 0)


@pytest.mark.parametrize("centred", [True, False])
def test_rise_of_a_linear_model_on_single_features(centred):
    """E[f(Mx) M_j] / p = (1 - p) w_j x_j, and p times the sum of w x on top where answers are not centred."""
    net, w, x = linear(6)
    n, p = 6000, 0.3
    s = RISE(n_masks=n, p=p, centred=centred).attribute(net, x, 0)[0].values
    c = (w * x[0]).numpy()
    expected = (1 - p) * c + (0 if centred else p * c.sum() + float(net.module[1].bias))
    error = np.abs(c).sum() / np.sqrt(n * p)  # above the standard error of each score
    assert np.abs(s - expected).max() < 4 * error
    assert np.abs(expected).max() > 8 * error


def test_rise_masks_have_mean_p_and_vary_smoothly():
    method = RISE(cells=4, p=0.25)
    masks = method.draw(4000, ("channel", "y", "x"), (3, 20, 13), torch.Generator().manual_seed(0))
    assert masks.shape == (4000, 1, 20, 13)
    assert masks.min() >= 0
    assert masks.max() <= 1
    np.testing.assert_allclose(masks.mean(0), 0.25, atol=0.04)
    # neighbours differ at most by one cell's slope: cells are stretched over (4 + 1) / 4 of their size
    assert masks.diff(dim=2).abs().max() <= 4 / (5 * 5) * 1.001
    assert masks.diff(dim=3).abs().max() <= 4 / (5 * 4) * 1.001


def test_rise_finds_the_place_that_matters():
    net, _, x = linear(1, 28, 28)
    net.module[1].weight.zero_()
    net.module[1].weight.reshape(28, 28)[4:10, 16:24] = 1.0
    s = RISE(n_masks=600).attribute(net, x.abs(), 0, seed=3)[0]
    inside = np.zeros((28, 28), bool)
    inside[4:10, 16:24] = True
    assert s.dims == ("y", "x")
    assert s.values[inside].mean() > 3 * np.abs(s.values[~inside]).mean()


def test_rise_repeats_with_its_seed_and_asks_in_chunks():
    net, _, x = linear(3, 40)
    runner = Runner(progress=False)
    one = RISE(n_masks=70).attribute(net, x, 0, seed=1, runner=runner)
    again, other = (RISE(n_masks=70).attribute(net, x, 0, seed=s) for s in (1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0
    assert one.attrs["forward_passes"] == 70
    assert one.dims == ("example", "channel", "time")


@pytest.mark.parametrize("bad", [{"n_masks": 0}, {"cells": 0}, {"p": 0.0}, {"p": 1.0}, {"baseline": "grey"}])
def test_parameters_that_rise_refuses(bad):
    with pytest.raises(InputError):
        RISE(**bad)


def test_rise_budget():
    assert RISE().at_budget(50).n_masks == 50
    assert RISE(n_masks=10).at_budget(50).n_masks == 10
