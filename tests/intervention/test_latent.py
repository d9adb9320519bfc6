import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from nissl.errors import InputError
from nissl.intervention.latent import Clusters, Probes, act_shift, fit_logistic, mixed


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_groups(n=20, d=8, layers=3):
    """Differences along one of two axes, other axes in other layers; the second layer is ten times as long."""
    group = torch.arange(n) % 2
    differences = 0.05 * noise(n, layers, d)
    for layer in range(layers):
        differences[torch.arange(n), layer, layer + group] += 2.0
    differences[:, 1] *= 10
    return differences, group


def test_clusters_are_the_groups_and_directions_their_means():
    differences, group = two_groups()
    found = Clusters.of(differences, 2)
    labels = found.labels[:, 0]
    assert (found.labels == labels[:, None]).all()
    assert ((labels == group).all() or (labels == 1 - group).all()).item()
    for c in range(2):
        torch.testing.assert_close(found.means[:, c], differences[labels == c].mean(0))
    assert torch.allclose(found.directions.norm(dim=-1), torch.ones(3, 2))
    torch.testing.assert_close(found.scale, differences.norm(dim=-1).mean(0))
    torch.testing.assert_close(found.shares, torch.full((3, 2), 0.5))


def test_a_new_difference_belongs_to_the_nearest_mean_in_units_of_each_layer():
    differences, _ = two_groups()
    for per_layer in (False, True):
        found = Clusters.of(differences, 2, per_layer=per_layer)
        new = differences[:6] + 0.05 * noise(6, 3, 8, seed=1)
        assert torch.equal(found.nearest(new), found.labels[:6])
        shared = Clusters(found.means, found.scale, found.labels)
        distances = [
            [sum(((new[i, layer] - found.means[layer, c]) / found.scale[layer]).square().sum() for layer in range(3))
             for c in range(2)] for i in range(6)
        ]  # fmt: skip
        assert shared.nearest(new)[:, 0].tolist() == np.argmin(np.array(distances), axis=1).tolist() or per_layer


def test_layers_are_weighed_alike_when_they_are_clustered_together():
    # the long layer says nothing; without a common unit it would decide
    group = torch.arange(20) % 2
    differences = torch.zeros(20, 2, 4)
    differences[torch.arange(20), 0, group] = 1.0
    differences[:, 1] = 100 * torch.tensor([1.0, 0, 0, 0]) + 5 * noise(20, 4)
    labels = Clusters.of(differences, 2).labels[:, 0]
    assert (labels == group).all() or (labels == 1 - group).all()


def test_each_layer_can_have_clusters_of_its_own():
    first, second = torch.arange(20) % 2, (torch.arange(20) // 2) % 2
    differences = 0.01 * noise(20, 2, 4)
    differences[torch.arange(20), 0, first] += 1
    differences[torch.arange(20), 1, second] += 1
    labels = Clusters.of(differences, 2, per_layer=True).labels
    for layer, group in enumerate((first, second)):
        assert (labels[:, layer] == group).all() or (labels[:, layer] == 1 - group).all()


def test_a_cluster_of_one_prompt_is_not_kept():
    differences, _ = two_groups()
    differences[0] = 50.0
    with pytest.warns(UserWarning, match="leave a cluster with one prompt"):
        found = Clusters.of(differences, 2)
    assert found.n_clusters == 1
    torch.testing.assert_close(found.means[:, 0], differences.mean(0))


@pytest.mark.parametrize(("n", "k"), [(3, 1), (20, 2), (60, 3)])
def test_default_number_of_clusters(n, k):
    differences = noise(n, 1, 4)
    assert Clusters.of(differences).n_clusters == k


@pytest.mark.parametrize(
    ("differences", "k", "message"),
    [
        (torch.full((4, 1, 3), torch.nan), 2, "NaN"),
        (torch.ones(4, 1, 3), 5, "5 clusters cannot be made of 4"),
        (torch.ones(4, 1, 3), 0, "at least 1"),
        (torch.stack([torch.ones(4, 3), torch.zeros(4, 3)], 1), 2, r"same activations in layers \[1\]"),
    ],
)
def test_bad_differences(differences, k, message):
    with pytest.raises(InputError, match=message):
        Clusters.of(differences, k)


def by_hand(x, y, k, steps, rate, decay):
    w = np.zeros((k, x.shape[1]))
    for _ in range(steps):
        logits = x @ w.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        w -= rate * 64 / x.shape[1] * ((p - np.eye(k)[y]).T @ x / len(x) + decay * w)
    return w


def test_probes_are_gradient_descent_on_standardised_activations():
    h, y = 5 + 3 * noise(30, 2, 6), torch.stack([torch.arange(30) % 3, torch.arange(30) // 10], 1)
    h[:, 0, :3] += 9 * F.one_hot(y[:, 0], 3)
    probes = Probes.fit(h, y, 3, steps=40, learning_rate=0.01, decay=0.02)
    for layer in range(2):
        a = h[:, layer].double().numpy()
        z = np.c_[(a - a.mean(0)) / a.std(0), np.ones(30)]
        w = by_hand(z, y[:, layer].numpy(), 3, 40, 0.01, 0.02)
        np.testing.assert_allclose(probes.weight[layer].numpy(), w, atol=1e-4)
    assert torch.allclose(probes(h).sum(-1), torch.ones(30, 2))
    assert (probes(h).argmax(-1) == y).float().mean(0)[0] > 0.8
    torch.testing.assert_close(probes.of([1])(h[:, 1:]), probes(h)[:, 1:])


def test_a_feature_that_does_not_vary_changes_nothing():
    h, y = noise(12, 1, 4), torch.arange(12)[:, None] % 2
    h[..., 2] = 7.0
    p = Probes.fit(h, y, 2)(h)
    assert torch.isfinite(p).all()
    other = h.clone()
    other[..., 2] = 0.0
    torch.testing.assert_close(Probes.fit(other, y, 2)(other), p)


def test_online_steps_look_at_the_last_prompts_and_leave_out_layers_without_label():
    h, y = noise(10, 2, 5), torch.arange(10)[:, None].expand(10, 2) % 2
    probes = Probes.fit(h, y.contiguous(), 2, steps=0, buffer=3)
    assert (probes.weight == 0).all()
    seen = probes.features(h)
    w = np.zeros((2, 6))
    for i in range(5):
        label = torch.tensor([i % 2, -1])
        probes.learn(h[i], label)
        held = range(max(0, i - 2), i + 1)
        x, t = seen[list(held), 0].double().numpy(), np.array([j % 2 for j in held])
        logits = x @ w.T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        w -= 0.02 * 64 / 6 * ((p - np.eye(2)[t]).T @ x / len(x) + 0.01 * w)
    np.testing.assert_allclose(probes.weight[0].numpy(), w, atol=1e-5)
    assert (probes.weight[1] == 0).all()
    assert len(probes.buffer) == 3


def test_hard_and_soft_choice():
    directions = torch.eye(4)[None, :3]
    p = torch.tensor([[[0.2, 0.5, 0.3]], [[0.6, 0.0, 0.4]]])
    assert torch.equal(mixed(directions, p), torch.eye(4)[[1, 0]][:, None])
    soft = mixed(directions, p, soft=True)
    expected = torch.tensor([[0.2, 0.5, 0.3, 0.0], [0.6, 0.0, 0.4, 0.0]])
    torch.testing.assert_close(soft[:, 0], expected / expected.norm(dim=1, keepdim=True))


def test_logistic_regressions_equal_scikit_learn():
    positive, negative = noise(40, 3, 5) + 0.7, noise(40, 3, 5, seed=1) * torch.tensor([1.0, 20.0, 0.01])[:, None]
    member = torch.stack([torch.arange(40) % 2 == 0, torch.arange(40) > 12], 1)
    theta = fit_logistic(positive, negative, member)
    for site in range(3):
        for c in range(2):
            m = member[:, c]
            x = torch.cat([positive[m, site], negative[m, site]]).double().numpy()
            y = np.r_[np.ones(m.sum()), np.zeros(m.sum())]
            reference = LogisticRegression(fit_intercept=False, tol=1e-10, max_iter=5000).fit(x, y).coef_[0]
            np.testing.assert_allclose(theta[site, c].numpy(), reference, atol=2e-4)


def test_logistic_regression_of_separable_groups_converges():
    theta = fit_logistic(noise(30, 1, 4) * 50 + 500, noise(30, 1, 4) * 50 - 500, torch.ones(30, 1, dtype=torch.bool))
    assert torch.isfinite(theta).all()
    assert (theta.sum() > 0).item()


def test_act_adds_every_cluster_by_how_far_it_is():
    a, theta, v = noise(2, 3, 5), noise(3, 2, 5, seed=1), noise(3, 2, 5, seed=2)
    shift = act_shift(a, theta, v, beta=0.1)
    for i in range(2):
        for site in range(3):
            expected = sum((1 - torch.sigmoid(theta[site, c] @ a[i, site]) + 0.1) * v[site, c] for c in range(2))
            torch.testing.assert_close(shift[i, site], expected)
