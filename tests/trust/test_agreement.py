from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.metrics import structural_similarity

from nissl.attribution import InputXGradient, RandomScores, Saliency
from nissl.errors import InputError
from nissl.network import Network
from nissl.trust.agreement import (
    MEASURES,
    AttributionAgreement,
    agreement,
    agreement_matrix,
    compare_maps,
    kendall,
    kendall_top_k,
    nonzero_k,
    pearson,
    spearman,
    ssim,
    tau_ap,
    top_k,
    weighted_tau,
)  # fmt: skip


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 12, 15))
    return {
        "a": base,
        "b": base + rng.normal(size=base.shape),
        "c": rng.normal(size=base.shape).round(0),  # many ties
        "flat": np.zeros(base.shape),
    }


@pytest.mark.parametrize("first", ["a", "c"])
@pytest.mark.parametrize("second", ["b", "c"])
def test_rank_correlations_agree_with_scipy(maps, first, second):
    x, y = maps[first], maps[second]
    pairs = [(p.ravel(), q.ravel()) for p, q in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman(x, y), [stats.spearmanr(p, q).statistic for p, q in pairs], atol=1e-12)
    signs = [(np.sign(p[:, None] - p), np.sign(q[:, None] - q)) for p, q in pairs]
    by_definition = [(s * t).sum() / np.sqrt((s**2).sum() * (t**2).sum()) for s, t in signs]
    np.testing.assert_allclose(kendall(x, y), by_definition, atol=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_identical_maps_agree_fully_and_scale_does_not_matter(maps, name):
    measure = MEASURES[name]
    np.testing.assert_allclose(measure(maps["a"], maps["a"]), 1.0)
    np.testing.assert_allclose(measure(maps["c"], maps["c"]), 1.0)
    np.testing.assert_allclose(measure(maps["a"], 5 * maps["b"] + 3), measure(maps["a"], maps["b"]))
    np.testing.assert_allclose(measure(maps["a"], maps["b"]), measure(maps["b"], maps["a"]))


def test_opposite_and_unrelated_maps(maps):
    a = maps["a"]
    np.testing.assert_allclose(spearman(a, -a), -1.0)
    np.testing.assert_allclose(kendall(a, -a), -1.0)
    np.testing.assert_allclose(spearman(a, np.exp(a)), 1.0)  # ranks only
    np.testing.assert_allclose(kendall(a, np.exp(a)), 1.0)
    np.testing.assert_allclose(top_k(a, -a), 0.0)
    assert (ssim(a, -a) < -0.5).all()
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 30, 40, 40))
    assert abs(spearman(x, y).mean()) < 0.02
    assert abs(kendall(x, y).mean()) < 0.02
    assert top_k(x, y).mean() == pytest.approx(0.1 / 1.9, abs=0.01)
    assert abs(ssim(x, y).mean()) < 0.05


@pytest.mark.parametrize("name", [m for m in MEASURES if m != "kendall-top-k"])  # there ties cost, and agree
def test_constant_maps_give_nan(maps, name):
    x = maps["a"].copy()
    x[2] = 7.0
    for values in (MEASURES[name](x, maps["b"]), MEASURES[name](maps["b"], x), MEASURES[name](x, x)):
        assert np.isnan(values).tolist() == [False, False, True, False]


def test_kendall_of_long_maps_is_a_seeded_sample_near_the_whole():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 200, 200))
    y = x + rng.normal(size=x.shape)  # correlation 1/sqrt(2), so tau = 2/pi · arcsin(1/sqrt(2)) = 1/2
    sampled = kendall(x, y)
    np.testing.assert_allclose(sampled, 0.5, atol=0.03)
    np.testing.assert_allclose(kendall(x, y, max_entries=x[0].size), 0.5, atol=0.015)
    assert (sampled == kendall(x, y)).all()
    assert (sampled != kendall(x, y, seed=1)).all()
    np.testing.assert_allclose(kendall(x, -x), -1.0)


def test_top_k_by_hand():
    a = [[9.0, 8, 7, 6, 0, 0, 0, 0, 0, 0]]
    b = [[9.0, 8, 0, 0, 7, 6, 0, 0, 0, 0]]
    assert top_k(a, b, 0.4)[0] == pytest.approx(2 / 6)
    assert top_k(a, b, 0.2)[0] == 1.0
    assert top_k(a, b, 1.0)[0] == 1.0
    assert top_k(a, b, 0.01)[0] == 1.0  # at least one entry is marked
    # k = 4 with two ranked entries: the other two places are shared by eight ties at 0, 1/4 each
    c = [[9.0, 8, 0, 0, 0, 0, 0, 0, 0, 0]]
    assert top_k(a, c, 0.4)[0] == pytest.approx((2 + 2 / 4) / (4 + 6 / 4))


def test_top_k_of_ties_does_not_depend_on_the_order_of_entries():
    rng = np.random.default_rng(3)
    x, y = rng.integers(0, 4, size=(2, 5, 50)).astype(float)
    order = rng.permutation(50)
    np.testing.assert_allclose(top_k(x, y), top_k(x[:, order], y[:, order]))


def test_ssim_is_skimages_on_scaled_maps(maps):
    def scaled(x):
        return (x - x.min()) / (x.max() - x.min())

    pairs = zip(maps["a"], maps["b"], strict=True)
    theirs = [structural_similarity(scaled(x), scaled(y), data_range=1) for x, y in pairs]
    np.testing.assert_allclose(ssim(maps["a"], maps["b"]), theirs)
    small = np.random.default_rng(0).normal(size=(2, 4, 9))
    np.testing.assert_allclose(ssim(small, small), 1.0)


@pytest.mark.parametrize("name", MEASURES)
def test_all_pairs_equal_single_pairs(maps, name):
    values = agreement(maps, name)
    assert values.dims == ("example", "method_a", "method_b")
    assert values.shape == (4, 4, 4)
    for i in maps:
        for j in maps:
            pair = values.sel(method_a=i, method_b=j).to_numpy()
            np.testing.assert_allclose(pair, MEASURES[name](maps[i], maps[j]), atol=1e-12)
    matrix = agreement_matrix(maps, name)
    assert list(matrix.index) == list(matrix.columns) == list(maps)
    np.testing.assert_allclose(matrix, matrix.T)
    assert matrix.loc["a", "b"] == pytest.approx(MEASURES[name](maps["a"], maps["b"]).mean())
    assert matrix["flat"].isna().all() == (name != "kendall-top-k")
    assert matrix.loc["a", "b"] > matrix.loc["a", "c"]


def test_mean_leaves_out_undefined_examples(maps):
    broken = maps["b"].copy()
    broken[1:] = 0.0
    matrix = agreement_matrix({"a": maps["a"], "b": broken})
    assert matrix.loc["a", "b"] == pytest.approx(spearman(maps["a"], maps["b"])[0])
    assert matrix.loc["b", "b"] == pytest.approx(1.0)


def test_a_measure_of_ones_own(maps):
    matrix = agreement_matrix({"a": maps["a"], "b": maps["b"]}, partial(top_k, fraction=0.3))
    assert matrix.loc["a", "b"] == pytest.approx(top_k(maps["a"], maps["b"], 0.3).mean())


def test_tokens_and_single_entries(maps):
    tokens = np.random.default_rng(0).normal(size=(3, 1))
    assert np.isnan(spearman(tokens, tokens)).all()
    assert np.isnan(kendall(tokens, tokens)).all()
    assert np.isnan(top_k(tokens, tokens)).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda m: spearman(m["a"], m["b"][:, :5]),
        lambda m: kendall(m["a"], np.where(m["b"] > 1, np.nan, m["b"])),
        lambda m: kendall(m["a"], m["b"], max_entries=1),
        lambda m: top_k(m["a"], m["b"], 0.0),
        lambda m: top_k(m["a"], m["b"], 1.1),
        lambda m: spearman(np.zeros((0, 5)), np.zeros((0, 5))),
        lambda m: spearman([["x"]], [["y"]]),
        lambda m: ssim(m["a"][0], m["b"][0]),
        lambda m: ssim(m["a"], m["b"], window=4),
        lambda m: ssim(m["a"][:, :2], m["b"][:, :2]),
        lambda m: agreement({}),
        lambda m: agreement(m, "unheard of"),
        lambda m: agreement({"a": m["a"], "b": m["b"][:2]}),
        lambda m: agreement({"a": m["a"], "b": m["b"] * np.inf}, "top-k"),
    ],
)
def test_bad_input_raises(maps, call):
    with np.errstate(invalid="ignore"), pytest.raises(InputError):
        call(maps)


# ---------------------------------------------------------------- lists with ties


def fagin(x, y, k, penalty):
    """By the definition, pair by pair, with positions of buckets."""

    def place(v):
        return [sum(v > e) + (sum(v == e) + 1) / 2 for e in v]

    def best(p):
        return {i for i, e in enumerate(p) if e in sorted(set(p))[:k]}

    p, q = place(x), place(y)
    top_p, top_q = best(p), best(q)
    pairs = {frozenset((i, j)) for i in top_p for j in top_q if i != j}
    cost = 0.0
    for i, j in map(sorted, pairs):
        a, b = p[i] - p[j], q[i] - q[j]
        cost += 1 if a * b < 0 else penalty if (a == 0) != (b == 0) else 0
    return 1 - 2 * cost / max(len(pairs), 1)


@pytest.mark.parametrize("levels", [3, 6, 1000])
@pytest.mark.parametrize("k", [1, 2, 5, 30])
@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0])
def test_kendall_of_the_top_by_its_definition(levels, k, penalty):
    rng = np.random.default_rng(levels + k)
    x, y = rng.integers(0, levels, (2, 6, 12)).astype(float)
    expected = [fagin(a, b, k, penalty) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(kendall_top_k(x, y, k, penalty), expected, atol=1e-12)
    np.testing.assert_allclose(kendall_top_k(y, x, k, penalty), expected, atol=1e-12)


def test_kendall_of_the_top_in_known_cases():
    def tau(a, b, k):
        return kendall_top_k([a], [b], k)[0]

    assert tau([4, 3, 2, 1], [4, 3, 1, 2], 2) == 1.0
    assert tau([4, 3, 2, 1], [1, 2, 3, 4], 4) == -1.0
    assert tau([1, 1, 1], [1, 1, 1], None) == 1.0
    assert tau([2, 1, 1, 1], [1, 1, 1, 2], None) == 1 - 2 * (1 + 4 * 0.5) / 6
    x = np.random.default_rng(0).random((3, 40))
    y = np.random.default_rng(1).random((3, 40))
    np.testing.assert_allclose(kendall_top_k(x, y, None), kendall(x, y), atol=1e-12)  # no ties, everything
    np.testing.assert_array_equal(kendall_top_k(x, y, 0.25), kendall_top_k(x, y, 10))
    each = kendall_top_k(x, y, np.array([3, 10, 40]))
    assert each.tolist() == [kendall_top_k(x, y, k)[i] for i, k in enumerate((3, 10, 40))]
    assert nonzero_k([[0, 1, 2, 0], [0, 0, 0, 0]], [[1, 1, 1, 0], [1, 2, 3, 4]]).tolist() == [2, 1]


def test_average_precision_correlation():
    """The published form for lists without ties: 2 / (n - 1) · Σ C(i) / (i - 1) - 1, both directions."""

    def one_way(truth, ranking):
        order = np.argsort(-ranking)
        right = [np.mean([truth[j] > truth[order[i]] for j in order[:i]]) for i in range(1, len(order))]
        return 2 * np.mean(right) - 1

    rng = np.random.default_rng(0)
    x, y = rng.permuted(np.tile(np.arange(15.0), (2, 5, 1)), axis=2)
    expected = [(one_way(a, b) + one_way(b, a)) / 2 for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(tau_ap(x, y), expected, atol=1e-12)
    np.testing.assert_allclose(tau_ap(x, -x), -1)
    # an exchange at the top costs more than one at the bottom; for Kendall both are one
    line, top, bottom = [[5.0, 4, 3, 2, 1]], [[4.0, 5, 3, 2, 1]], [[5.0, 4, 3, 1, 2]]
    assert tau_ap(line, top)[0] < tau_ap(line, bottom)[0] < 1
    assert weighted_tau(line, top)[0] < weighted_tau(line, bottom)[0] < 1
    assert kendall(line, top) == kendall(line, bottom)
    # ties in one list: those above count only where there is an order
    assert tau_ap([[2.0, 2, 1]], [[3.0, 2, 1]])[0] == pytest.approx((1.0 + (0 + 1) / 2) / 2)


def test_weighted_tau_by_its_definition():
    rng = np.random.default_rng(3)
    x, y = rng.random((2, 4, 20))

    def one_way(p, q, rank_by, exponent):
        rank = stats.rankdata(-rank_by) - 1
        total = weight = 0.0
        for i, j in combinations(range(len(p)), 2):
            w = (rank[i] + 1) ** -exponent + (rank[j] + 1) ** -exponent
            total, weight = total + w * np.sign((p[i] - p[j]) * (q[i] - q[j])), weight + w
        return total / weight

    for exponent in (0.0, 1.0, 2.0):
        expected = [(one_way(a, b, a, exponent) + one_way(a, b, b, exponent)) / 2 for a, b in zip(x, y, strict=True)]
        np.testing.assert_allclose(weighted_tau(x, y, exponent), expected, atol=1e-10)
    np.testing.assert_allclose(weighted_tau(x, y, 0), kendall(x, y), atol=1e-10)
    np.testing.assert_allclose(pearson(x, y), [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)], atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kendall_top_k(x, x, 0),
        lambda x: kendall_top_k(x, x, 1.5),
        lambda x: kendall_top_k(x, x, np.array([1, 2])),
        lambda x: kendall_top_k(x, x, True),
        lambda x: kendall_top_k(x, x, 2, penalty=2),
        lambda x: kendall_top_k(np.ones((1, 5000)), np.ones((1, 5000))),
        lambda x: tau_ap(np.ones((1, 5000)), np.ones((1, 5000))),
        lambda x: weighted_tau(x, x, -1),
        lambda x: compare_maps({}),
        lambda x: compare_maps({"a": x}, ()),
        lambda x: compare_maps({"a": x}, ("loud",)),
        lambda x: compare_maps({"a": x, "b": x[:, :3]}),
        lambda x: compare_maps({"a": x}, mask=np.zeros_like(x, dtype=bool)),
        lambda x: compare_maps({"a": x}, mask=np.ones_like(x)),
        lambda x: compare_maps({"a": x}, truth=x[:2]),
        lambda x: AttributionAgreement({}),
        lambda x: AttributionAgreement(["ig", "ig"]),
        lambda x: AttributionAgreement("ig"),
    ],
)
def test_bad_arguments_raise(call):
    with pytest.raises(InputError):
        call(np.random.default_rng(0).random((4, 6)))


# ---------------------------------------------------------------- comparisons


def test_means_and_spread_beside_the_truth():
    rng = np.random.default_rng(0)
    base = rng.random((7, 9))
    maps = {"a": base, "b": base + 0.3 * rng.random((7, 9)), "log": np.log(base)}
    truth = base + 0.1 * rng.random((7, 9))
    found = compare_maps(maps, ("kendall", "spearman"), truth=truth)
    assert dict(found.sizes) == {"measure": 2, "example": 7, "method_a": 3, "method_b": 3}
    for m in ("kendall", "spearman"):
        values = found["value"].sel(measure=m, method_a="a", method_b="b").values
        np.testing.assert_allclose(values, MEASURES[m](maps["a"], maps["b"]), atol=1e-12)
        cell = found.sel(measure=m, method_a="a", method_b="b")
        assert float(cell["mean"]) == pytest.approx(values.mean())
        assert float(cell["sd"]) == pytest.approx(values.std(ddof=1))
        assert (int(cell["defined"]), int(cell["undefined"])) == (7, 0)
        to_truth = found["truth_value"].sel(measure=m, method_a="b").values
        np.testing.assert_allclose(to_truth, MEASURES[m](maps["b"], truth), atol=1e-12)
        assert float(found["truth_mean"].sel(measure=m, method_a="b")) == pytest.approx(to_truth.mean())
    np.testing.assert_allclose(found["mean"].sel(method_a="a", method_b="log"), 1.0)  # tau(a, log a) = 1
    opposite = compare_maps({"a": base, "-a": -base})["mean"].sel(method_a="a", method_b="-a")
    np.testing.assert_allclose(opposite, -1.0)


def test_undefined_examples_are_counted_and_never_zero():
    rng = np.random.default_rng(0)
    a = rng.random((5, 6))
    b = a.copy()
    b[[1, 3]] = 0.25  # uniform attention
    found = compare_maps({"a": a, "b": b, "flat": np.ones((5, 6))}, truth=np.ones((5, 6)))
    cell = found.sel(measure="kendall", method_a="a", method_b="b")
    assert (int(cell["defined"]), int(cell["undefined"])) == (3, 2)
    assert float(cell["mean"]) == pytest.approx(1.0)  # a zero for each undefined one would make it .6
    assert np.isnan(found["value"].sel(measure="kendall", method_a="a", method_b="b").values).tolist() == [
        False, True, False, True, False,
    ]  # fmt: skip
    nothing = found.sel(measure="kendall", method_a="a", method_b="flat")
    assert np.isnan(nothing["mean"])
    assert np.isnan(nothing["sd"])
    assert int(nothing["undefined"]) == 5
    assert found["truth_undefined"].values.ravel().tolist() == [5, 5, 5]


def test_padding_is_not_ranked():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 4, 10))
    mask = np.arange(10) < np.array([10, 7, 7, 3])[:, None]
    found = compare_maps({"a": np.where(mask, a, 9.0), "b": np.where(mask, b, 9.0)}, mask=mask)
    values = found["value"].sel(measure="kendall", method_a="a", method_b="b").values
    expected = [kendall(a[i : i + 1, m], b[i : i + 1, m])[0] for i, m in enumerate(mask)]
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_agreement_of_methods_on_a_linear_network():
    """Of a linear network the input times the gradient is known: x w. Its gradient is w for every example."""
    torch.manual_seed(0)
    net = Network(torch.nn.Linear(8, 2))
    x = torch.randn(12, 8)
    w = net.module.weight.detach()
    methods = {"ixg": InputXGradient(), "saliency": Saliency(), "random": RandomScores()}
    truth = (x * w[1]).numpy()
    found = AttributionAgreement(methods).evaluate(net, x, 1, truth=truth, rerun=True, seed=3)
    assert found["scores"].dims == ("method_a", "example", "feature")
    np.testing.assert_allclose(found["scores"].sel(method_a="ixg"), np.abs(truth), rtol=1e-6)
    np.testing.assert_allclose(found["truth_mean"].sel(method_a="ixg"), 1.0)
    expected = kendall(np.abs(truth), np.broadcast_to(w[1].abs().numpy(), truth.shape))
    np.testing.assert_allclose(found["truth_value"].sel(method_a="saliency")[0], expected, atol=1e-12)
    ceiling = found["ceiling_mean"].sel(measure="kendall")
    np.testing.assert_allclose(ceiling.sel(method_a=["ixg", "saliency"]), 1.0)
    assert abs(float(ceiling.sel(method_a="random"))) < 0.3  # another seed, other numbers
    signed = AttributionAgreement(methods, signed=True).evaluate(net, x, 1, truth=truth)
    np.testing.assert_allclose(signed["scores"].sel(method_a="ixg"), truth, rtol=1e-5, atol=1e-7)
    gap = signed["truth_mean"] - found["truth_mean"]
    assert gap.sel(method_a="saliency", measure="kendall").item() < 0  # sizes of weights say nothing of signs
    same = AttributionAgreement(methods).evaluate(net, x, 1, seed=3)
    np.testing.assert_array_equal(same["scores"], found["scores"])
    with pytest.raises(InputError, match="different positions"):
        AttributionAgreement(["gradcam(layer='0', upsample=False)", "random"]).evaluate(
            Network(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 2))),
            torch.rand(2, 1, 8, 8), 1,
        )  # fmt: skip
