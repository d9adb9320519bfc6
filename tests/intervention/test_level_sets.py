"""Level-set traversal: exact on linear networks, spheres stay spheres, what is rejected stays, what lies between."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from nissl.errors import GradientError, InputError, NisslError
from nissl.intervention.level_sets import (
    LevelSetTraversal,
    distances,
    hull,
    hull_weights,
    orthogonal,
    plot_star,
    plot_triangle,
    segment,
    triangle_metrics,
    width,
)
from nissl.network import Network

FREE = {"adv_step": 0.0, "jitter": 0.0, "bounds": None, "p_thresh": 1.0, "progress": False}
SHAPE = (1, 4, 4)


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def linear(seed=0, gain=1.0):
    """Two classes; class 0 has the logit w·x + b, the other 0."""
    w = gain * (noise(16, seed=seed) - 0.5)
    layer = nn.Linear(16, 2)
    layer.weight.data = torch.stack([w, torch.zeros(16)])
    layer.bias.data = torch.tensor([-0.5 * float(w.sum()), 0.0])
    return Network(nn.Sequential(nn.Flatten(), layer)), w


class Ball(nn.Module):
    def forward(self, x):
        inside = 2 - x.flatten(1).square().sum(1)
        return torch.stack([inside, torch.zeros_like(inside)], 1)


def curved(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.Tanh(), nn.Linear(30, 3))
        module[3].weight.data *= 8
    return Network(module)


def by_class(net, n=200, seed=3, classes=3):
    x = noise(n, *SHAPE, seed=seed)
    said = net.module(x).argmax(1)
    return [x[said == c] for c in range(classes)]


def test_a_linear_network_is_walked_exactly():
    net, w = linear(gain=4.0)
    groups = by_class(net, classes=2)
    source, target = groups[0][:6], groups[1][:6]
    found = LevelSetTraversal(step_size=0.1, n_iter=60, **FREE).traverse(net, source, target)
    p = torch.eye(16).double() - torch.outer(w, w).double() / w.double().square().sum()
    way = (target - source).flatten(1).double() @ p
    expected = source.flatten(1).double() + (1 - 0.9**60) * way
    assert (found.images.flatten(1) - expected).abs().max() < 1e-5
    assert (found.confidence - found.p0[:, None]).abs().max() < 1e-5
    assert bool(found.accepted.all())
    assert found.target_class.tolist() == [1] * 6
    assert (found.target_confidence - (1 - found.p0)).abs().max() < 1e-5
    assert (found.forward, found.backward) == (6 * 61 + 12, 6 * 61)


def test_level_sets_of_a_ball_are_spheres_and_drift_falls_with_the_step():
    net = Network(Ball())
    a, b = noise(16, seed=1) - 0.5, noise(16, seed=2) - 0.5
    source, target = ((r * v / v.norm()).reshape(1, *SHAPE) for r, v in ((1.0, a), (1.7, b)))
    radius = {}
    for step in (0.1, 0.01):
        n = round(4 / step)
        end = LevelSetTraversal(step_size=step, n_iter=n, **FREE).traverse(net, source, target).images.flatten()
        cosine = float(end @ target.flatten() / (end.norm() * target.norm()))
        assert cosine == pytest.approx(1, abs=0.01)
        radius[step] = float(end.norm())
    assert radius[0.01] > 1
    assert 5 <= (radius[0.1] - 1) / (radius[0.01] - 1) <= 20
    narrow = LevelSetTraversal(step_size=0.1, n_iter=60, **{**FREE, "p_thresh": 0.01}).traverse(net, source, target)
    assert float(narrow.confidence.min()) > float(narrow.p0[0]) - 0.01
    assert not bool(narrow.accepted.all())


def test_every_iteration_is_that_of_the_paper():
    """The loop as it is published, with two forward passes an iteration, one row at a time in double precision."""
    net = curved()
    module = nn.Sequential(*net.module).double()
    groups = by_class(Network(nn.Sequential(*curved().module)))
    source, target = groups[0][:3], groups[1][:3]
    walk = LevelSetTraversal(step_size=0.05, n_iter=25, p_thresh=0.05, adv_step=0.01, jitter=0.0, progress=False)
    found = walk.traverse(curved(), source, target)
    for i in range(3):
        x, goal, delta = source[i : i + 1].double(), target[i : i + 1].double(), 0.0
        p0 = float(module(x).softmax(1)[0, 0].detach())
        taken = []
        for _ in range(25):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(module(x), torch.tensor([0])), x)
            x = x.detach()
            v = goal - x
            v = v - g * (g * v).sum() / (g * g).sum()
            delta = (delta + 0.005 * g).clamp(-0.01, 0.01)
            candidate = (x + 0.05 * v - delta).clamp(0, 1)
            ok = p0 - float(module(candidate).softmax(1)[0, 0].detach()) < 0.05
            x = candidate if ok else x
            taken.append(ok)
        assert found.accepted[i].tolist() == taken
        assert (found.images[i] - x[0]).abs().max() < 1e-4
    assert bool(found.accepted.any())


def test_what_is_rejected_stays_and_the_level_is_kept():
    net = curved()
    groups = by_class(net)
    source, target = groups[0][:8], groups[1][:8]
    walk = LevelSetTraversal(step_size=0.2, n_iter=40, p_thresh=0.02, adv_step=0.0, progress=False)
    found = walk.traverse(net, source, target, snapshots=40)
    rejected = ~found.accepted[:, 1:]
    assert bool(rejected.any())
    moved = (found.path[:, 1:] != found.path[:, :-1]).flatten(2).any(2)
    assert not bool((moved & rejected).any())
    assert torch.equal(found.path[:, -1], found.images)
    assert bool(
        (found.confidence[:, 1:][found.accepted] > (found.p0[:, None] - 0.02).expand(-1, 40)[found.accepted]).all()
    )
    assert float(found.images.min()) >= 0
    assert float(found.images.max()) <= 1
    p = net.module(found.images).softmax(1).detach()
    assert torch.allclose(p[:, 0], found.confidence[:, -1], atol=1e-5)
    assert torch.allclose(p[torch.arange(8), found.target_class], found.target_confidence, atol=1e-5)


def test_batches_do_not_couple_rows_and_wrong_sources_are_left_out():
    net = curved()
    groups = by_class(net)
    source = torch.cat([groups[0][:2], groups[2][:1], groups[0][2:3]])
    target = groups[1][:4]
    walk = LevelSetTraversal(n_iter=15, jitter=0.0, progress=False)
    together = walk.traverse(net, source, target, 0)
    assert together.kept.tolist() == [0, 1, 3]
    for k, i in enumerate(together.kept.tolist()):
        alone = walk.traverse(net, source[i : i + 1], target[i : i + 1], 0)
        assert torch.allclose(alone.images[0], together.images[k], atol=1e-6)
    again = LevelSetTraversal(n_iter=15, seed=1, progress=False)
    assert torch.equal(again.traverse(net, source, target).images, again.traverse(net, source, target).images)


def test_directions_where_the_gradient_vanishes():
    v = noise(3, 2, 2, 2) - 0.5
    g = noise(3, 2, 2, 2, seed=1).double() - 0.5
    g[1] *= 1e-200  # its square is 0
    g[2] = 0
    found = orthogonal(v, g)
    assert torch.allclose(found[2], v[2].double())
    for i in (0, 1):
        direction = (g[i] / g[i].abs().max()).flatten()
        assert abs(float(found[i].flatten() @ direction)) < 1e-12
        part = v[i].double().flatten() - found[i].flatten()
        assert float((part @ direction).abs() / (part.norm() * direction.norm())) == pytest.approx(1)


# ---------------------------------------------------------------- what lies between


def test_triangles_of_a_linear_network():
    net, _ = linear(gain=3.0)
    source, a, b = (noise(4, *SHAPE, seed=s) for s in (5, 6, 7))
    p, weights = hull(net, source, a, b, 0)
    assert p.shape == (4, 66)
    assert torch.allclose(weights.sum(1), torch.ones(66))
    assert len({tuple(row) for row in (weights * 10).round().int().tolist()}) == 66
    logits = torch.stack([net.module(x)[:, 0] for x in (source, a, b)], 1).detach()
    assert torch.allclose(p, (logits @ weights.T).sigmoid(), atol=1e-6)
    metrics = triangle_metrics(p, weights)
    assert torch.allclose(metrics["source"], logits[:, 0].sigmoid().double(), atol=1e-6)
    assert torch.allclose(metrics["mean"], p.double().mean(1))
    line = segment(net, source, a, 0)
    other = segment(net, source, b, 0)
    edges = torch.cat([line, other], 1).double()  # the source is on both
    assert torch.allclose(metrics["edge_mean"], edges.mean(1), atol=1e-6)
    assert torch.allclose(metrics["edge_drop"], edges.amin(1) - metrics["source"], atol=1e-6)
    assert torch.allclose(metrics["share_0.1"], (p.double() > metrics["source"][:, None] - 0.1).double().mean(1))


def test_a_triangle_that_is_one_point():
    net = curved()
    x = noise(2, *SHAPE)
    p, weights = hull(net, x, x, x, 1, n=4)
    p = p[:, :1].expand_as(p)  # mixtures of one image differ from it by rounding
    metrics = triangle_metrics(p, weights)
    assert metrics["share_0"].tolist() == [0, 0]
    assert metrics["share_0.1"].tolist() == metrics["share_0.3"].tolist() == [1, 1]
    assert torch.allclose(metrics["mean"], metrics["source"])
    assert hull_weights(4).shape == (15, 3)


def test_distances():
    a = noise(3, 3, 12, 12)
    b = a.clone()
    b[1] += 0.25
    b[2, 0, 0, 0] = a[2, 0, 0, 0] + 0.5
    found = distances(b, a)
    assert found["rmse"].numpy() == pytest.approx([0, 0.25, 0.5 / math.sqrt(432)], abs=1e-6)
    assert found["linf"].numpy() == pytest.approx([0, 0.25, 0.5], abs=1e-6)
    assert found["ssim"][0] == pytest.approx(1)
    assert found["ssim"][1] < found["ssim"][2] < 1


def test_width_goes_orthogonal_to_the_path():
    net, w = linear(gain=3.0)
    x = noise(2, *SHAPE)
    along = torch.stack([w.reshape(SHAPE), noise(*SHAPE, seed=9)])
    found = width(net, x, along, 0, radii=(0.0, 1.0), n_directions=64, quantiles=(0.0, 1.0))
    p = net.module(x).softmax(1)[:, 0].detach().double()
    # along the gradient: nothing orthogonal to it changes the confidence
    assert torch.allclose(found[0], p[0].expand(2, 2), atol=1e-6)
    assert torch.allclose(found[1, 0], p[1].expand(2), atol=1e-6)
    assert found[1, 1, 0] < p[1] - 0.02 < p[1] + 0.02 < found[1, 1, 1]


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": 2.0}, "step_size"),
        ({"n_iter": 0}, "n_iter"),
        ({"p_thresh": 0.0}, "p_thresh"),
        ({"adv_step": -1.0}, "adv_step"),
        ({"jitter": math.nan}, "jitter"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_parameters(settings, says):
    with pytest.raises(InputError, match=says):
        LevelSetTraversal(**settings)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, t: (s[0], t, None), "channels"),
        (lambda s, t: (s, t[:1], None), "differ"),
        (lambda s, t: (s * 3 - 1, t, None), "outside"),
        (lambda s, t: (s.clone().fill_(math.nan), t, None), "NaN"),
        (lambda s, t: ((s * 255).to(torch.uint8), t, None), "floating"),
        (lambda s, t: (s, s, None), "class of their source"),
        (lambda s, t: (s, t, 2), "none of the 2 sources"),
        (lambda s, t: (s, t, 7), "classes must be 0 to 2"),
        (lambda s, t: (s, t, [0, 0, 0]), "one for each of 2"),
        (lambda s, t: (s, t, 0.5), "whole numbers"),
        (lambda s, t: (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), None), "failed on inputs"),
    ],
)
def test_bad_walks_raise_and_change_nothing(change, says):
    net = curved()
    groups = by_class(net)
    source, target, y = change(groups[0][:2], groups[1][:2])
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    held = source.clone(), target.clone()
    with pytest.raises(NisslError, match=says):
        LevelSetTraversal(n_iter=3, progress=False).traverse(net, source, target, y)
    assert all(torch.equal(v, before[k]) for k, v in net.module.state_dict().items())
    assert torch.equal(source.nan_to_num(), held[0].nan_to_num())
    assert torch.equal(target, held[1])


def test_networks_that_cannot_be_walked():
    x = noise(2, *SHAPE)
    walk = LevelSetTraversal(n_iter=3, progress=False)
    one = Network(nn.Sequential(nn.Flatten(), nn.Linear(16, 1)))
    with pytest.raises(InputError, match="two classes"):
        walk.traverse(one, x, x)
    with pytest.raises(GradientError, match="no gradients"):
        walk.traverse(Network(lambda a: np.zeros((len(a), 2))), x, x)
    with pytest.raises(InputError, match="snapshots"):
        walk.traverse(curved(), x, x, snapshots=4)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda n, x: segment(n, x, x[:1], 0), "go together"),
        (lambda n, x: segment(n, x, x, 0, n=0), "n must"),
        (lambda n, x: segment(n, x, x, 9), "class 9"),
        (lambda n, x: triangle_metrics(torch.rand(2, 66), hull_weights(4)), "hull"),
        (lambda n, x: distances(x, x[:1]), "compared"),
        (lambda n, x: distances(x[..., :2], x[..., :2]), "3 × 3"),
        (lambda n, x: width(n, x, x, 0, radii=(-1.0,)), "radii"),
        (lambda n, x: width(n, x, x, 0, quantiles=(2.0,)), "quantiles"),
        (lambda n, x: width(n, x, x, 0, n_directions=0), "n_directions"),
        (lambda n, x: plot_star(x, x, np.zeros((2, 3))), "one source"),
        (lambda n, x: plot_triangle(np.zeros(5), hull_weights(4)), "hull"),
    ],
)
def test_bad_questions(ask, says):
    with pytest.raises(NisslError, match=says):
        ask(curved(), noise(2, *SHAPE))


def test_pictures():
    net = curved()
    source, ends = noise(1, *SHAPE), noise(5, *SHAPE, seed=1)
    p = segment(net, source.expand(5, *SHAPE), ends, 0)
    ax = plot_star(source[0], ends, p, list("abcde"))
    assert len(ax.artists) == 6
    assert [t.get_text() for t in ax.texts] == list("abcde")
    assert len(ax.collections[0].get_segments()) == 50
    assert ax.collections[0].get_array()[0] == pytest.approx(float(p[0, :2].mean()), abs=1e-6)
    plt.close(ax.figure)
    values, weights = hull(net, source, ends[:1], ends[1:2], 0)
    ax = plot_triangle(values[0], weights, "title")
    assert ax.get_title() == "title"
    plt.close(ax.figure)
