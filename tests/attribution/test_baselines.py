"""Controls that know nothing of the network."""

import numpy as np
import torch
from scipy.ndimage import sobel as scipy_sobel
from torch import nn

from nissl.attribution.baselines import EdgeDetector, RandomScores
from nissl.network import Network


def network(n: int, seed: int = 0, **kwargs) -> Network:
    torch.manual_seed(seed)
    return Network(nn.Sequential(nn.Flatten(), nn.Linear(n, 2)), **kwargs)


def test_random_scores_depend_on_seed_and_example_only():
    x = torch.rand(2, 3, 8, 8)
    s = RandomScores().attribute(network(192), x, 0, seed=4)
    assert s.dims == ("example", "y", "x")
    assert s.shape == (2, 8, 8)
    np.testing.assert_array_equal(s, RandomScores().attribute(network(192, seed=1), x + 1, 1, seed=4))
    assert np.abs(s - RandomScores().attribute(network(192), x, 0, seed=5)).min() > 0
    assert np.abs(s[0].values - s[1].values).min() > 0
    assert (s.attrs["forward_passes"], s.attrs["backward_passes"]) == (0, 0)


def test_random_scores_are_standard_normal():
    s = RandomScores().attribute(network(10_000), torch.rand(1, 10_000), 0)
    assert abs(float(s.mean())) < 0.04
    assert abs(float(s.std()) - 1) < 0.03


def test_edges_of_an_image_are_its_sobel_gradient():
    x = torch.rand(1, 3, 9, 11)
    s = EdgeDetector().attribute(network(297), x, 0)
    grey = x[0].mean(0).numpy()
    expected = np.hypot(*(scipy_sobel(grey, axis, mode="nearest") / 8 for axis in (0, 1)))
    assert s.dims == ("example", "y", "x")
    np.testing.assert_allclose(s[0], expected, atol=1e-6)
    assert s.attrs["forward_passes"] == 0


def test_edges_of_a_series_are_its_central_difference():
    x = torch.rand(1, 2, 16)
    s = EdgeDetector().attribute(network(32), x, 0)[0]
    padded = np.pad(x[0].numpy(), ((0, 0), (1, 1)), mode="edge")
    np.testing.assert_allclose(s, np.abs(padded[:, 2:] - padded[:, :-2]) / 2, atol=1e-6)


def test_rare_tokens_stand_out():
    net = Network(lambda ids: np.ones((len(ids), 2)))
    s = EdgeDetector().attribute(net, torch.tensor([[7, 2, 7, 7, 5]]), 0)[0]
    np.testing.assert_allclose(s, [1 / 3, 1, 1 / 3, 1 / 3, 1])


def test_features_and_embedded_tokens_stand_out_from_their_mean():
    s = EdgeDetector().attribute(network(3), torch.tensor([[1.0, 2.0, 6.0]]), 0)[0]
    assert s.values.tolist() == [2, 1, 3]
    tokens = torch.tensor([[[0.0, 0.0], [6.0, 8.0]]])
    s = EdgeDetector().attribute(network(4, dims=("token", "unit")), tokens, 0)[0]
    assert s.dims == ("token",)
    assert s.values.tolist() == [5, 5]


def test_an_edge_map_of_one_value_is_zero():
    assert not EdgeDetector().attribute(network(16), torch.ones(1, 1, 4, 4), 0).any()
