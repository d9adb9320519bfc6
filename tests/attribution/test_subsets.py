"""LiMA, SMDL and HSIC against exact terms, a second implementation, exhaustive search, planted regions and the cost formula."""

import math
from dataclasses import fields
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.special import digamma
from torch import nn

from nissl.attribution.hsic import HSIC, dependence
from nissl.attribution.perturbation import Occlusion
from nissl.attribution.regions import given_regions, grid, prior_patches
from nissl.attribution.subsets import (
    SMDL,
    LiMA,
    Ranking,
    angles,
    average_highest_confidence,
    effectiveness,
    entropy_confidence,
    evidential_confidence,
    evidential_loss,
    plot_ranking,
    search_passes,
)
from nissl.errors import InputError, NisslError, TargetError
from nissl.network import Network, target
from nissl.runner import CHUNK, Runner


def quiet(**kwargs) -> Runner:
    return Runner(progress=False, tune=False, **kwargs)


def interacting(m: int, seed: int = 0) -> nn.Module:
    """Three classes with interactions between m features, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(m, 16), nn.Tanh(), nn.Linear(16, 3)).double().requires_grad_(False)
        net[0].weight.mul_(3)
        net[2].weight.mul_(6)
    return net


class Table(nn.Module):
    """A game with two classes: the probability of the first is a function of which features are there."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, s: torch.Tensor) -> torch.Tensor:
        p = self.function(s.double())
        return torch.stack([p, 1 - p], 1)


# ---------------------------------------------------------------- terms


def test_confidences_have_their_exact_values():
    np.testing.assert_allclose(entropy_confidence(np.log([[0.7, 0.2, 0.1], [1 / 3] * 3])), [0.270, 0], atol=5e-4)
    o = torch.tensor([[0.0, 0, 0], [10, -10, -10], [99, -99, -99]])
    certain = 1 - 3 / (math.exp(10) + 3 + 2 * math.exp(-10))
    np.testing.assert_allclose(evidential_confidence(o), [0.5, certain, certain], rtol=1e-6)
    assert 1 - certain == pytest.approx(1.36e-4, rel=2e-3)


def test_the_evidential_loss_is_the_difference_of_digammas():
    o = torch.tensor([[0.3, -1.0, 2.0], [12.0, 0, 0]]).double()
    alpha = np.exp(np.clip(o.numpy(), -10, 10)) + 1
    expected = digamma(alpha.sum(1)) - digamma(alpha[[0, 1], [2, 1]])
    np.testing.assert_allclose(evidential_loss(o, torch.tensor([2, 1])), expected, rtol=1e-9)


def test_the_effectiveness_of_features_at_0_60_and_90_degrees():
    at = torch.tensor([0.0, 60, 90]).deg2rad()
    d = angles(torch.stack([at.cos(), at.sin()], 1))
    np.testing.assert_allclose(d * 180, [[0, 60, 90], [60, 0, 30], [90, 30, 0]], atol=1e-4)
    kept = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    np.testing.assert_allclose(effectiveness(kept, d), [2 / 3, 2 / 3, 0, 0], atol=1e-6)


# ---------------------------------------------------------------- regions


def test_a_prior_map_is_cut_into_runs_of_equal_rank():
    cells = grid(("y", "x"), (4, 4), 16)
    falling = torch.arange(15.0, -1, -1)
    assert prior_patches(cells, falling, 4).labels.tolist() == [[i] * 4 for i in range(4)]
    short = prior_patches(cells, falling, 5)
    assert (short.n, torch.bincount(short.labels.reshape(-1)).tolist()) == (4, [5, 5, 5, 1])
    with pytest.raises(InputError, match="finite"):
        prior_patches(cells, torch.full((16,), torch.nan), 4)


def test_grids_have_boxes_of_about_equal_sides():
    g = grid(("channel", "y", "x"), (3, 12, 18), 6)
    assert (g.n, g.labels.shape) == (6, (1, 12, 18))
    assert torch.bincount(g.labels.reshape(-1)).tolist() == [36] * 6
    assert g.labels[0, 0].tolist() == [0] * 6 + [1] * 6 + [2] * 6
    series = grid(("channel", "time"), (2, 10), 5)
    assert series.labels.tolist() == [[0] * 5 + [1] * 5, [2] * 5 + [3] * 5]
    assert grid(("token",), (6,), 4).labels.tolist() == [0, 0, 1, 2, 2, 3]
    assert grid(("feature",), (5,), 1).n == 1


@pytest.mark.parametrize("n", [1, 2, 3, 7, 23, 49, 200])
def test_grids_are_never_larger_than_asked_and_leave_no_label_out(n):
    for dims, shape in ((("channel", "y", "x"), (3, 14, 9)), (("channel", "time"), (5, 40)), (("unit",), (11,))):
        g = grid(dims, shape, n)
        assert g.n <= n
        assert len(g.labels.unique()) == g.n


def test_regions_may_be_given_as_labels_or_as_masks():
    labels = torch.tensor([[0, 0, 1], [2, 2, 1]])
    a = given_regions(labels, ("channel", "y", "x"), (3, 2, 3))
    b = given_regions(labels == torch.arange(3)[:, None, None], ("channel", "y", "x"), (3, 2, 3))
    assert torch.equal(a.labels, labels[None])
    assert torch.equal(b.labels, labels[None])


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 4, dtype=torch.long),  # another shape
        torch.tensor([[0, 0, 2], [2, 2, 0]]),  # 1 is missing
        torch.tensor([[-1, 0, 1], [1, 1, 0]]),
        torch.rand(2, 3),
        torch.ones(2, 2, 3, dtype=torch.bool),  # overlap
        torch.zeros(2, 2, 3, dtype=torch.bool),  # nothing covered
    ],
)
def test_regions_that_do_not_cover_each_position_once_are_refused(bad):
    with pytest.raises(InputError, match="regions"):
        LiMA(regions=bad).attribute(Network(interacting(6)), torch.rand(1, 6), 0, runner=quiet())
    with pytest.raises(InputError, match="regions"):
        given_regions(bad, ("channel", "y", "x"), (3, 2, 3))


# ---------------------------------------------------------------- the searches


def reference(net, m, y, weights, pending, d):
    """The search of the paper, plainly: one subset at a time, nothing batched."""

    def p(s):
        x = torch.zeros(1, m).double()
        x[0, sorted(s)] = 1
        return net(x).softmax(1)[0].numpy()

    def terms(s):
        e = sum(min(d[i, j] for j in s if j != i) for i in s) if len(s) > 1 else 0
        h = 1 + (p(s) * np.log(p(s))).sum() / np.log(3)
        return np.array([p(s)[y], 1 - p(set(range(m)) - s)[y], h, e])

    front, back, rest = [], [], set(range(m))
    while rest:
        if len(rest) == 1:
            front.append(rest.pop())
            break
        value = {r: terms({*front, r}) for r in rest}
        a = max(sorted(rest), key=lambda r: value[r] @ weights)
        if len(rest) > pending:
            at_back = {r: np.append(value[r][:3], terms({*back, r})[3]) @ weights for r in rest}
            lowest = [r for r in sorted(rest, key=lambda r: at_back[r])[:pending] if r != a]
            if lowest:
                b = min(lowest, key=lambda r: terms({*back, r}) @ weights)
                back.append(b)
                rest.remove(b)
        front.append(a)
        rest.remove(a)
    order = front + back[::-1]
    return order, len(front), [terms(set(order[:i])) for i in range(m + 1)], [p(set(order[:i])) for i in range(m + 1)]


@pytest.mark.parametrize(("pending", "weights"), [(4, (20, 5, 0.01, 0)), (2, (1, 1, 1, 1)), (3, (3, 1, 0.5, 0.2))])
def test_the_search_agrees_with_a_plain_implementation(weights, pending):
    m, net = 10, interacting(10, seed=3)
    named = dict(zip(("consistency", "collaboration", "confidence", "effectiveness"), weights, strict=True))
    method = LiMA(pending=pending, features="0", **named)
    for y in (0, 2):
        r = method.rankings(Network(net), torch.ones(1, m).double(), y, runner=quiet())[0]
        d = angles(net[0](torch.eye(m).double()))
        order, n_forward, terms, p = reference(net, m, y, np.array(weights), pending, d)
        assert r.order.tolist() == order
        assert r.n_forward == n_forward
        np.testing.assert_allclose(r.insertion, [q[y] for q in p], atol=1e-9)
        np.testing.assert_allclose(r.probabilities, p, atol=1e-6)
        expected = np.array(terms)
        if not weights[3]:
            expected[:, 3] = 0
        np.testing.assert_allclose(r.terms, expected, atol=1e-9)
        np.testing.assert_allclose(r.total, expected @ weights, atol=1e-8)


def test_greedy_search_is_bidirectional_search_without_its_back():
    net, x = Network(interacting(9)), torch.rand(3, 9).double()
    a = LiMA(search="greedy").rankings(net, x, 1, runner=quiet())
    b = LiMA(pending=9).rankings(net, x, 1, runner=quiet())
    assert [r.order.tolist() for r in a] == [r.order.tolist() for r in b]


@pytest.mark.parametrize("search", ["bidirectional", "greedy", "lazy"])
def test_curves_of_the_search_are_those_of_fresh_passes(search):
    net, x = Network(interacting(12, seed=5)), torch.randn(2, 12).double()
    method = LiMA(search=search, pending=3, effectiveness=0.1)
    found = method.rankings(net, x, [0, 1], runner=quiet())
    fresh = method.rankings(net, x, [0, 1], orders=[r.order.tolist() for r in found], runner=quiet())
    for a, b in zip(found, fresh, strict=True):
        for name in ("insertion", "deletion", "probabilities", "terms", "total", "share"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-6)
    assert found[0].insertion[-1] == pytest.approx(float(net.module(x).softmax(1)[0, 0]), abs=1e-9)


def test_lazy_search_equals_greedy_search_where_coverage_makes_f_submodular():
    rng = np.random.default_rng(0)
    covers = torch.from_numpy(rng.random((14, 40)) < 0.2).double()
    net = Network(Table(lambda s: 0.02 + 0.9 * (s @ covers).clamp_max(1).mean(1)))
    x = torch.ones(1, 14)
    only = {"regions": 14, "collaboration": 0.0, "confidence": 0.0}
    runners = {s: quiet() for s in ("greedy", "lazy")}
    orders = {s: LiMA(search=s, **only).rankings(net, x, 0, runner=r)[0].order.tolist() for s, r in runners.items()}
    covered = {i: covers[orders["greedy"][:i]].amax(0).sum() for i in range(1, 15)}
    assert all(covers[orders["lazy"][:i]].amax(0).sum() == covered[i] for i in covered)
    lazy, greedy = (runners[s].cost("lima").forward for s in ("lazy", "greedy"))
    assert lazy < 0.6 * greedy
    assert greedy == search_passes(14, "greedy") >= lazy


def test_lazy_search_can_miss_what_becomes_valuable_later():
    # 0 is best alone; 1 gains only once 0 is there, more than 2 does, but its old gain is no bound
    net = Network(Table(lambda s: 0.1 + 0.3 * s[:, 0] + 0.1 * s[:, 2] + 0.05 * s[:, 3] + 0.4 * s[:, 0] * s[:, 1]))
    only = {"collaboration": 0.0, "confidence": 0.0}
    order = {s: LiMA(search=s, **only).rankings(net, torch.ones(1, 4), 0, runner=quiet())[0].order.tolist()
             for s in ("greedy", "lazy")}  # fmt: skip
    assert order["greedy"] == [0, 1, 2, 3]
    assert order["lazy"][:2] == [0, 2]


def test_ties_go_to_the_lowest_region():
    flat = Network(Table(lambda s: 0 * s[:, 0] + 0.5))
    assert LiMA(search="greedy").rankings(flat, torch.ones(1, 7), 0, runner=quiet())[0].order.tolist() == list(range(7))


def test_saturated_answers_are_ranked_by_their_log_odds():
    w = torch.tensor([1.0, 5, 3, 2, 4])

    def saturated(s):
        z = 200 + s @ w
        return torch.stack([z, 0 * z], 1)

    net = Network(Wrapped(saturated))
    for search in ("greedy", "bidirectional"):
        r = LiMA(search=search, pending=2).rankings(net, torch.ones(1, 5), 0, runner=quiet())[0]
        assert (r.insertion == 1).all()
        assert r.order.tolist() == [1, 4, 2, 3, 0]


class Wrapped(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_k_stops_the_search_and_the_rest_gets_no_score():
    net, x = Network(interacting(8)), torch.rand(1, 8).double()
    full = LiMA(search="greedy").rankings(net, x, 0, runner=quiet())[0]
    for search in ("greedy", "lazy"):
        runner = quiet()
        r = LiMA(search=search, k=3).rankings(net, x, 0, runner=runner)[0]
        assert len(r.order) == 3
        assert (r.values() == 0).sum() == 5
        assert np.isnan(r.insertion[4:8]).all()
        assert runner.cost("lima").forward <= search_passes(8, search, k=3)
        if search == "greedy":
            assert r.order.tolist() == full.order[:3].tolist()
            assert runner.cost("lima").forward == search_passes(8, search, k=3)


# ---------------------------------------------------------------- cost


def test_the_formula_gives_the_figures_of_the_paper():
    assert [search_passes(m) - 2 for m in (25, 36, 49, 64, 100)] == [504, 938, 1608, 2590, 5866]
    assert [search_passes(m, "greedy") for m in (25, 36, 49, 64, 100)] == [650, 1332, 2450, 4160, 10100]
    assert search_passes(25, "greedy", effectiveness=True, evidence=True) == 650 + 325 + 25
    assert search_passes(1) == 2
    # k (2 m - k + 1) and the two ends
    assert search_passes(25, "greedy", k=7) == 7 * (50 - 7 + 1) + 2


@pytest.mark.parametrize("search", ["greedy", "bidirectional"])
@pytest.mark.parametrize("m", [1, 2, 10])
@pytest.mark.parametrize("terms", [(0.0, False), (0.3, True)])
def test_the_passes_asked_are_those_of_the_formula(search, m, terms):
    effective, evidence = terms
    twin = Network(nn.Linear(m, 3).double().requires_grad_(False)) if evidence else None
    method = LiMA(search=search, pending=3, effectiveness=effective, evidence=twin)
    runner = quiet()
    s = method.attribute(Network(interacting(m)), torch.randn(2, m).double(), 0, runner=runner)
    expected = search_passes(m, search, 3, effectiveness=effective > 0, evidence=evidence)
    assert s.attrs["forward_passes"] == 2 * expected == 2 * method.cost(m)
    assert s.attrs["backward_passes"] == 0


@pytest.mark.parametrize("cls", [LiMA, SMDL])
@pytest.mark.parametrize("budget", [10, 60, 300])
def test_at_budget_takes_as_many_regions_as_the_budget_pays(cls, budget):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Network(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        )
        x = torch.rand(1, 1, 20, 20)
    method = cls().at_budget(budget)
    s = method.attribute(net, x, 0, runner=quiet())
    assert s.attrs["forward_passes"] <= budget
    assert method.at_budget(10_000).passes == budget
    m = int(s.n_regions[0])
    assert method.cost(m) <= budget
    if cls is LiMA:
        tabular = method.attribute(Network(interacting(40)), torch.rand(1, 40).double(), 0, runner=quiet())
        m = int(tabular.n_regions[0])
        assert m == 40 or method.cost(m + 1) > budget


def test_batches_are_filled_across_images_and_little_is_held():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32, 3)]
        net, x = Network(nn.Sequential(*layers).double()), torch.rand(6, 1, 10, 10).double()
    runner = quiet(batch_size=16, memory=0)
    sizes = []

    class Watched(LiMA):
        def explain(self, q):
            asking, answer = super().explain(q), None
            while True:
                try:
                    asked = asking.send(answer)
                except StopIteration as stop:
                    return stop.value
                sizes.append(asked.n)
                answer = yield asked

    Watched(regions=25, division="grid").attribute(net, x, runner=runner)
    assert runner.slots[0] == sum(sizes) == 6 * search_passes(25)
    assert runner.slots[0] >= 0.9 * runner.slots[1]
    assert max(sizes) <= CHUNK


# ---------------------------------------------------------------- known answers


def test_regions_are_seen_in_front_of_the_baseline():
    seen = []

    def record(x):
        seen.append(x.clone())
        return x.flatten(1)[:, :3]

    x, base = torch.rand(1, 3, 4, 4) + 1, -torch.rand(3, 4, 4)
    labels = torch.arange(4).repeat_interleave(4).reshape(4, 4)
    LiMA(regions=labels, baseline=base).attribute(Network(Wrapped(record)), x, 0, runner=quiet())
    rows = torch.cat(seen)
    here = (rows == x).all(1).reshape(-1, 4, 4)  # all channels of a position together
    away = (rows == base[None]).all(1).reshape(-1, 4, 4)
    assert bool((here ^ away).all())
    assert bool((here == here[:, :, :1]).all())  # whole regions, which are rows here
    kept = {tuple(r) for r in here[:, :, 0].int().tolist()}
    assert {(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 1)} <= kept


def test_of_several_baselines_the_mean_probability_is_taken():
    net, x = Network(interacting(5)), torch.rand(1, 5).double()
    bases = torch.rand(3, 5).double()
    runner = quiet()
    r = LiMA(baseline=bases).rankings(net, x, 1, runner=runner)[0]
    assert r.insertion[0] == pytest.approx(float(net.module(bases).softmax(1)[:, 1].mean()), abs=1e-9)
    one = bases.clone()
    one[:, r.order[0]] = x[0, r.order[0]]
    assert r.insertion[1] == pytest.approx(float(net.module(one).softmax(1)[:, 1].mean()), abs=1e-9)
    assert runner.cost("lima").forward == 3 * (search_passes(5) - 2) + 4


def test_what_a_wrong_prediction_rests_on_comes_last():
    """Region 2 speaks for class 0, region 4 louder for class 1; the others say nothing."""
    w = torch.zeros(2, 6)
    w[0, 2], w[1, 4] = 3.0, 5.0
    net = Network(nn.Linear(6, 2, bias=False).requires_grad_(False))
    net.module.weight.copy_(w)
    x = torch.ones(1, 6)
    r = LiMA(pending=2).rankings(net, x, 0, runner=quiet())[0]
    assert (r.order[0], r.order[-1]) == (2, 4)
    assert r.best_prefix == 1
    assert r.mask().tolist() == [False, False, True, False, False, False]
    sure = 1 / (1 + math.exp(-3))
    assert r.highest(0.25) == (pytest.approx(sure), pytest.approx(1 / 6))
    assert r.insertion[-1] == pytest.approx(1 / (1 + math.exp(2)))
    assert r.probabilities[-1, 1] > 0.8  # the second class along the same path
    other = LiMA(pending=2).rankings(net, x, 1, runner=quiet())[0]
    high, share = average_highest_confidence([r, other])
    np.testing.assert_allclose(high, (sure + 1 / (1 + math.exp(-5))) / 2)
    np.testing.assert_allclose(share, 1 / 6)
    assert r.highest(0.1) == (0.5, 0.0)  # no region is so small


def test_areas_go_by_positions_not_by_regions():
    net = Network(Table(lambda s: (1 + s.sum(1)) / 8))
    r = LiMA(regions=torch.tensor([0, 0, 0, 0, 1, 2]), confidence=0.0, search="greedy").rankings(
        net, torch.ones(1, 6), 0, runner=quiet()
    )[0]
    assert r.order.tolist() == [0, 1, 2]
    np.testing.assert_allclose(r.share, [0, 4 / 6, 5 / 6, 1])
    assert r.insertion_area == pytest.approx(r.deletion_area) == pytest.approx(0.5)
    s = LiMA(regions=torch.tensor([0, 0, 0, 0, 1, 2])).attribute(net, torch.ones(1, 6), 0, runner=quiet())
    assert s.values.tolist() == [[3, 3, 3, 3, 2, 1]]
    assert float(s.insertion[0]) == pytest.approx(0.5)


def test_the_ratio_is_that_to_the_best_of_all_subsets():
    m, net = 8, interacting(8, seed=2)
    method = LiMA(pending=3, features="0", effectiveness=0.1)
    ratio = method.ratios(Network(net), torch.ones(1, m).double(), 0, sizes=(2, 3), runner=quiet())
    r = method.rankings(Network(net), torch.ones(1, m).double(), 0, runner=quiet())[0]
    d = angles(net[0](torch.eye(m).double()))
    assert ratio.shape == (1, 2)
    for i, size in enumerate((2, 3)):
        totals = {}
        for s in combinations(range(m), size):
            x, out = torch.zeros(1, m).double(), torch.ones(1, m).double()
            x[0, list(s)], out[0, list(s)] = 1, 0
            p, q = net(x).softmax(1)[0].numpy(), net(out).softmax(1)[0].numpy()
            e = sum(min(d[a, b] for b in s if b != a) for a in s)
            totals[s] = 20 * p[0] + 5 * (1 - q[0]) + 0.01 * (1 + (p * np.log(p)).sum() / np.log(3)) + 0.1 * e
        ours = totals[tuple(sorted(r.order[:size].tolist()))]
        assert ratio[0, i] == pytest.approx(ours / max(totals.values()), abs=1e-9)
        assert r.total[size] == pytest.approx(ours, abs=1e-9)
    assert ratio.max() <= 1


def test_an_evidential_network_takes_the_place_of_the_entropy():
    class Sure(nn.Module):
        def forward(self, x):
            return torch.stack([4 * x[:, 3] - 2, torch.full_like(x[:, 0], -2.0)], 1)

    net = Network(interacting(5))
    method = LiMA(consistency=0, collaboration=0, confidence=1, evidence=Network(Sure()), search="greedy")
    r = method.rankings(net, torch.ones(1, 5).double(), 0, runner=quiet())[0]
    assert r.order[0] == 3
    np.testing.assert_allclose(r.terms[1:, 2], float(evidential_confidence(torch.tensor([[2.0, -2.0]]))[0]), rtol=1e-6)
    with pytest.raises(InputError, match="evidence"):
        method.attribute(net, torch.ones(1, 5).double(), 0, site="0", runner=quiet())


def test_smdl_divides_by_its_prior():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = Network(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 3)))
        x = torch.rand(1, 1, 8, 8)
    occlusion = Occlusion(window=2)
    r = SMDL(cells=4, regions=8, prior=occlusion).rankings(net, x, 0, runner=quiet())[0]
    fall = occlusion.attribute(net, x, 0, runner=quiet()).values[0].reshape(4, 2, 4, 2).mean((1, 3)).ravel()
    rank = np.argsort(np.argsort(-fall, kind="stable")) // 2
    np.testing.assert_array_equal(r.regions.labels[0, ::2, ::2].numpy(), rank.reshape(4, 4))
    assert r.regions.n == 8
    # a map of another resolution is spread over the input first
    assert SMDL(cells=4, prior="gradcam(upsample=False)").rankings(net, x, 0, runner=quiet())[0].regions.n == 16


def test_features_default_to_the_input_of_the_last_linear_layer():
    net, x = Network(interacting(6)), torch.rand(1, 6).double()
    a = LiMA(effectiveness=2.0).rankings(net, x, 0, runner=quiet())[0]
    b = LiMA(effectiveness=2.0, features="1").rankings(net, x, 0, runner=quiet())[0]
    np.testing.assert_array_equal(a.terms, b.terms)
    black_box = Network(lambda s: np.stack([s.sum(1), s[:, 0]], 1))
    c = LiMA(effectiveness=2.0).rankings(black_box, torch.rand(1, 4), 0, runner=quiet())[0]
    assert c.terms[-1, 3] > 0


def test_tables_of_probabilities_are_not_squashed_again():
    net = Network(Table(lambda s: 0.9 * s.mean(1)))
    r = LiMA().rankings(net, torch.ones(1, 4), 0, runner=quiet())[0]
    np.testing.assert_allclose(r.insertion, [0, 0.225, 0.45, 0.675, 0.9], atol=1e-9)


def test_a_position_of_a_sequence_can_be_explained():
    class Steps(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, :3], x[:, 3:6]], 1)

    r = LiMA().rankings(Network(Steps()), torch.ones(1, 6), target.class_logit(1, position=1), runner=quiet())[0]
    assert r.target == 1
    assert r.order[0] == 4


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_colour_and_rgba_images_are_divided_alike(channels):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Network(
            nn.Sequential(nn.Conv2d(channels, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
        )
        x = torch.rand(1, channels, 24, 24)
    s = LiMA(regions=9).attribute(net, x, runner=quiet())
    assert s.dims == ("example", "y", "x")
    assert 4 <= int(s.n_regions[0]) == int(s.max()) == len(np.unique(s))


# ---------------------------------------------------------------- HSIC


def test_dependence_is_the_trace_of_two_centred_kernels():
    rng = np.random.default_rng(0)
    present = rng.random((60, 4)) < 0.5
    y = present[:, 1] * 1.0 + 0.1 * rng.normal(size=60)
    apart = np.abs(y[:, None] - y)
    width = torch.from_numpy(apart[apart > 0]).median().item()
    kernel = np.exp(-(apart**2) / (2 * width**2))
    h = np.eye(60) - 1 / 60
    expected = [np.trace((s[:, None] == s) @ h @ kernel @ h) / 59**2 for s in present.T]
    np.testing.assert_allclose(dependence(torch.from_numpy(present), torch.from_numpy(y)), expected, atol=1e-12)
    assert np.argmax(expected) == 1
    assert float(dependence(torch.from_numpy(present), torch.ones(60)).abs().max()) < 1e-12


def test_hsic_finds_the_region_that_matters_whatever_its_sign():
    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False))
    net.module[1].weight.zero_()
    net.module[1].weight[0].reshape(8, 8)[4:, :4] = -1.0
    runner = quiet()
    s = HSIC(regions=4, n_masks=100).attribute(net, torch.ones(1, 1, 8, 8), 0, runner=runner)
    assert s.values[0][4:, :4].min() > 5 * s.values[0][:4].max()
    assert runner.cost("hsic").forward == 100
    assert HSIC().at_budget(40).n_masks == 40
    assert HSIC(n_masks=10).at_budget(40).n_masks == 10


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"regions": 0}, {"pending": 1}, {"consistency": -1}, {"confidence": float("nan")},
        {"consistency": 0, "collaboration": 0, "confidence": 0}, {"k": 3}, {"search": "greedy", "k": 0},
        {"baseline": "grey"}, {"division": "prior", "prior": "no such method"}, {"cells": 1}, {"passes": 0},
        {"division": "prior", "cells": 3, "regions": 10},
    ],
)  # fmt: skip
def test_parameters_that_are_refused(bad):
    with pytest.raises(InputError):
        LiMA(**bad)


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (LiMA, {"regions": 2.5}), (LiMA, {"regions": True}), (LiMA, {"search": "beam"}), (LiMA, {"division": "sam"}),
        (LiMA, {"evidence": nn.Linear(2, 2)}), (LiMA, {"features": 3}),         (LiMA, {"consistency": "20"}), (LiMA, {"pending": None}), (HSIC, {"division": "prior"}),
    ],
)  # fmt: skip
def test_parameters_of_another_type_are_refused_where_types_are_not_checked(cls, bad):
    # made without __init__, where the tests would check the types before the code can
    method = object.__new__(cls)
    for f in fields(cls):
        object.__setattr__(method, f.name, bad.get(f.name, f.default))
    with pytest.raises(InputError):
        method.__post_init__()


def test_what_cannot_be_explained_says_so_and_changes_nothing():
    net = Network(interacting(6))
    x = torch.rand(2, 6).double()
    before, fingerprint = x.clone(), net.fingerprint()

    def refused(error, match, method, network=net, inputs=x, of: object = 0, **kwargs):
        with pytest.raises(error, match=match):
            method.rankings(network, inputs, of, runner=quiet(), **kwargs)

    refused(TargetError, "one output", LiMA(), Network(nn.Linear(6, 1).double()))
    refused(TargetError, "does not exist", LiMA(), of=7)
    refused(TargetError, "give a class", LiMA(), of=target.logit_difference(0, 1))
    refused(TargetError, "give a class", LiMA(), of=lambda output: output[:, 0])
    refused(TargetError, "n_classes", LiMA(), Network(Wrapped(lambda v: v[:, None, :3])))
    refused(InputError, "only 6 positions", LiMA(regions=7))
    refused(
        InputError,
        "only 4 positions",
        LiMA(regions=9, division="superpixels"),
        Network(nn.Flatten()),
        torch.rand(1, 3, 2, 2),
    )
    refused(InputError, "superpixels", LiMA(division="superpixels"))
    refused(InputError, "NaN", LiMA(), inputs=torch.full((1, 6), torch.nan).double())
    refused(InputError, "does not fit", LiMA(baseline=torch.zeros(5)))
    refused(InputError, "each of the 6 regions", LiMA(), orders=[[0, 1, 2], [0, 1, 2]])
    refused(InputError, "one an example", LiMA(), orders=[[0, 1, 2, 3, 4, 5]])
    refused(NisslError, "nowhere", LiMA(effectiveness=1, features="nowhere"))
    refused(InputError, "evidential", LiMA(evidence=Network(nn.Linear(6, 1).double())))
    with pytest.raises(InputError, match="cannot be tried"):
        LiMA().ratios(net, x, 0, sizes=(7,), runner=quiet())
    with pytest.raises(InputError, match="whole numbers"):
        LiMA().ratios(net, x, 0, sizes=(0,), runner=quiet())
    with pytest.raises(InputError, match="no ranking"):
        average_highest_confidence([])
    assert torch.equal(x, before)
    assert net.fingerprint() == fingerprint


@pytest.mark.parametrize("bad", [{"n_masks": 1}, {"regions": 0}, {"baseline": "grey"}])
def test_parameters_that_hsic_refuses(bad):
    with pytest.raises(InputError):
        HSIC(**bad)


def test_the_picture_shows_regions_and_curves():
    import matplotlib.pyplot as plt

    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    r: Ranking = LiMA(regions=4, division="grid").rankings(net, torch.rand(1, 1, 8, 8), 0, runner=quiet())[0]
    left, right = plot_ranking(r, np.zeros((8, 8)), other=1)
    assert len(right.lines) == 3
    assert "of 4 regions" in left.get_title()
    plt.close(left.figure)
    flat = LiMA().rankings(Network(interacting(4)), torch.rand(1, 4).double(), 0, runner=quiet())[0]
    with pytest.raises(InputError, match="images"):
        plot_ranking(flat)
    with pytest.raises(InputError, match="share"):
        r.highest(0)
