"""Faithfulness checks on networks whose answer is known: a linear model carries each feature by its weight."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import nissl
from nissl.attribution import InputXGradient, IntegratedGradients, Saliency
from nissl.attribution.masking import Features
from nissl.errors import InputError
from nissl.trust.check import by_feature, similarity
from nissl.trust.faithfulness import Completeness, MaxSensitivity, RegionCurves, Subsets, random_subsets


def linear(weights):
    module = nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        module.weight[:] = torch.tensor([weights])
    return nissl.Network(module)


def scores_of(values):
    return xr.DataArray(np.asarray(values, dtype=np.float32), dims=("example", "feature"))


@pytest.fixture
def sums():
    """f(x) = 4 x0 + 3 x1 + 2 x2 + 1 x3 at x = 1: features count 4, 3, 2, 1."""
    return linear([4.0, 3.0, 2.0, 1.0]), torch.ones(1, 4)


def test_curves_of_a_linear_model_are_the_sums_of_its_weights(sums):
    net, x = sums
    found = RegionCurves(steps=4, baseline="zero").evaluate(net, x, scores_of([[4, 3, 2, 1]]), target=0)
    # insertion 0 4 7 9 10, deletion 10 6 3 1 0, at shares 0, 1/4 ... 1
    assert found["insertion"][0] == pytest.approx((0 / 2 + 4 + 7 + 9 + 10 / 2) / 4)
    assert found["deletion"][0] == pytest.approx((10 / 2 + 6 + 3 + 1 + 0) / 4)
    assert found["faithfulness"][0] == pytest.approx(6.25 - 3.75)
    assert found["insertion_normalised"][0] == pytest.approx(0.625)
    assert found["deletion_normalised"][0] == pytest.approx(0.375)
    assert found["flipping"][0] == pytest.approx(np.mean([4, 7, 9, 10]))
    assert found["flipping_gap"][0] == pytest.approx(np.mean([4, 7, 9, 10]) - np.mean([1, 3, 6, 10]))


def test_the_reverse_order_swaps_insertion_and_deletion(sums):
    net, x = sums
    best = RegionCurves(steps=4, baseline="zero").evaluate(net, x, scores_of([[4, 3, 2, 1]]), target=0)
    worst = RegionCurves(steps=4, baseline="zero").evaluate(net, x, scores_of([[1, 2, 3, 4]]), target=0)
    assert worst["faithfulness"][0] == pytest.approx(-best["faithfulness"][0])
    assert worst["flipping_gap"][0] == pytest.approx(-best["flipping_gap"][0])


def test_curves_follow_the_probability_of_a_class():
    module = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        module.weight[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = RegionCurves(steps=2, baseline="zero").evaluate(
        nissl.Network(module), torch.tensor([[2.0, 1.0]]), scores_of([[1, 0]]), target=0
    )

    def p(a, b):
        return float(torch.softmax(torch.tensor([a, b]), 0)[0])

    insertion = np.trapezoid([p(0.0, 0.0), p(2.0, 0.0), p(2.0, 1.0)], [0, 0.5, 1])
    deletion = np.trapezoid([p(2.0, 1.0), p(0.0, 1.0), p(0.0, 0.0)], [0, 0.5, 1])
    assert found["insertion"][0] == pytest.approx(insertion, abs=1e-6)
    assert found["deletion"][0] == pytest.approx(deletion, abs=1e-6)


def test_a_probability_table_is_not_softmaxed_again():
    def predict(a):
        return np.stack([a[:, 0], 1 - a[:, 0]], 1)

    net = nissl.Network(predict)
    found = RegionCurves(steps=1 + 1, baseline="zero").evaluate(
        net, torch.tensor([[0.8, 0.3]]), scores_of([[1, 0]]), target=0
    )
    assert found["insertion"][0] == pytest.approx((0 / 2 + 0.8 + 0.8 / 2) / 2, abs=1e-6)


def test_exact_scores_predict_every_subset(sums):
    net, x = sums
    found = Subsets(samples=20, shares=(0.25, 0.5), baseline="zero").evaluate(
        net, x, scores_of([[4, 3, 2, 1]]), target=0
    )
    assert found["infidelity"][0] == pytest.approx(0, abs=1e-9)
    assert found["sensitivity_n"][0] == pytest.approx(1, abs=1e-6)
    scaled = Subsets(samples=20, shares=(0.25, 0.5), baseline="zero").evaluate(
        net, x, scores_of([[40, 30, 20, 10]]), target=0
    )
    assert scaled["infidelity"][0] == pytest.approx(0, abs=1e-9)
    nothing = Subsets(samples=20, shares=(0.25, 0.5), baseline="zero").evaluate(
        net, x, scores_of([[0, 0, 0, 0]]), target=0
    )
    assert nothing["infidelity"][0] == pytest.approx(1)
    assert np.isnan(nothing["sensitivity_n"][0])


def test_random_subsets_have_their_sizes():
    subsets = random_subsets(
        Features(torch.arange(10), 10, ("feature",)), (0.1, 0.5, 0.99), 7, torch.Generator().manual_seed(0)
    )
    assert subsets.sum(1).tolist() == [1] * 7 + [5] * 7 + [9] * 7
    assert len({tuple(s) for s in subsets[7:14].tolist()}) > 3


def test_subsets_are_shared_by_methods(sums):
    net, x = sums
    runner = nissl.Runner(progress=False)
    for values in ([[4, 3, 2, 1]], [[1, 2, 3, 4]]):
        Subsets(baseline="zero").evaluate(net, x, scores_of(values), target=0, runner=runner)
    cost = runner.cost("subsets")
    assert cost.reused == cost.forward / 2


def test_completeness_is_exact_for_a_linear_model_and_wrong_for_half_of_it(sums):
    net, x = sums
    assert Completeness().evaluate(net, x, scores_of([[4, 3, 2, 1]]), target=0)["completeness_gap"][0] < 1e-6
    assert Completeness().evaluate(net, x, scores_of([[2, 1.5, 1, 0.5]]), target=0)["completeness_gap"][
        0
    ] == pytest.approx(0.5)


def test_max_sensitivity_of_a_constant_map_is_zero_and_of_ixg_is_that_of_its_input(sums):
    net, x = sums
    saliency = Saliency().attribute(net, x, target=0)
    assert MaxSensitivity().evaluate(net, x, saliency, target=0, method=Saliency())["max_sensitivity"][0] == 0
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    scores = InputXGradient().attribute(net, x, target=0)
    found = MaxSensitivity(samples=4, radius=0.1).evaluate(net, x, scores, target=0, method=InputXGradient())
    # |w δ| / |w x| with |δ| at most .1 of the range 3
    most = np.linalg.norm([4 * 0.3, 3 * 0.3, 2 * 0.3, 0.3]) / np.linalg.norm([0, 3, 4, 3])
    assert 0 < found["max_sensitivity"][0] <= most


def test_scores_by_feature_keep_their_sum_at_any_channel_count():
    q_scores = nissl.runner.Explained(torch.rand(3, 8, 8), ("channel", "y", "x"))
    labels = (torch.arange(8)[:, None] // 4 * 2 + torch.arange(8) // 4)[None]
    sums = by_feature(q_scores, Features(labels, 4, ("channel", "y", "x")), (3, 8, 8))
    assert float(sums.sum()) == pytest.approx(float(q_scores.values.sum()), rel=1e-5)
    assert float(sums[3]) == pytest.approx(float(q_scores.values[:, 4:, 4:].sum()), rel=1e-5)


def test_similarity_of_constant_maps():
    flat, ramp = torch.ones(5), torch.arange(5.0)
    assert similarity(flat, flat) == 1
    assert similarity(flat, ramp) == 0
    assert similarity(ramp, ramp**3) == pytest.approx(1)
    assert similarity(ramp, -ramp) == pytest.approx(-1)


def test_a_check_that_runs_the_method_again_needs_it(sums):
    net, x = sums
    with pytest.raises(InputError, match="give method="):
        MaxSensitivity().evaluate(net, x, scores_of([[1, 2, 3, 4]]), target=0)
    with pytest.raises(InputError, match="scores of 2"):
        RegionCurves().evaluate(net, x, scores_of([[1, 2, 3, 4]] * 2), target=0)


def test_faithfulness_of_integrated_gradients_beats_its_negative_on_a_cnn():
    torch.manual_seed(0)
    net = nissl.Network(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    )
    x = torch.rand(3, 3, 28, 28)
    scores = IntegratedGradients(steps=8).attribute(net, x)
    check = RegionCurves(baseline="zero")
    up, down = (check.evaluate(net, x, s)["faithfulness"].mean() for s in (scores, -scores))
    assert up > 0 > down
