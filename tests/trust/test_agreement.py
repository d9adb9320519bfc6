from functools import partial

import numpy as np
import pytest
from scipy import stats
from skimage.metrics import structural_similarity

from nissl.errors import InputError
from nissl.trust.agreement import MEASURES, agreement, agreement_matrix, kendall, spearman, ssim, top_k


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


@pytest.mark.parametrize("name", MEASURES)
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
    assert matrix["flat"].isna().all()
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
        lambda m: agreement(m, "pearson"),
        lambda m: agreement({"a": m["a"], "b": m["b"][:2]}),
        lambda m: agreement({"a": m["a"], "b": m["b"] * np.inf}, "top-k"),
    ],
)
def test_bad_input_raises(maps, call):
    with np.errstate(invalid="ignore"), pytest.raises(InputError):
        call(maps)
