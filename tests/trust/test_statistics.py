import numpy as np
import pytest
from scipy import stats

from nissl.errors import InputError
from nissl.trust.statistics import area, benjamini_hochberg, bootstrap, holm, paired_test


def test_bootstrap_of_the_mean_agrees_with_scipys_bca():
    x = np.random.default_rng(0).exponential(size=40)
    ours = bootstrap(x, n_resamples=20_000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="BCa", rng=1).confidence_interval
    assert float(ours.value) == pytest.approx(x.mean())
    width = theirs.high - theirs.low
    assert abs(float(ours.low) - theirs.low) < 0.03 * width
    assert abs(float(ours.high) - theirs.high) < 0.03 * width
    # the correction for skewness is there: a normal interval would be symmetric
    assert float(ours.high) - x.mean() > 1.15 * (x.mean() - float(ours.low))


def test_bootstrap_of_the_median_agrees_with_scipys_percentile():
    x = np.random.default_rng(3).normal(size=41)
    ours = bootstrap(x, "median", n_resamples=5000)
    theirs = stats.bootstrap((x,), np.median, n_resamples=5000, method="percentile", rng=1).confidence_interval
    assert float(ours.value) == np.median(x)
    assert abs(float(ours.low) - theirs.low) < 0.08
    assert abs(float(ours.high) - theirs.high) < 0.08


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    x = np.random.default_rng(5).normal(size=(2000, 30))
    for level in (0.8, 0.95):
        interval = bootstrap(x, n_resamples=1000, level=level)
        covered = ((interval.low <= 0) & (interval.high >= 0)).mean()
        assert abs(covered - level) < 0.03


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_row_does_not_depend_on_its_neighbours_and_drops_nan(statistic):
    x = np.random.default_rng(1).normal(size=(2, 3, 9))
    x[0, 1, [0, 4]] = np.nan
    x[1, 2] = np.nan
    many = bootstrap(x, statistic)
    assert many.value.shape == many.low.shape == many.high.shape == (2, 3)
    assert many.n.tolist() == [[9, 7, 9], [9, 9, 0]]
    assert many.dropped.tolist() == [[0, 2, 0], [0, 0, 9]]
    alone = bootstrap(np.delete(x[0, 1], [0, 4]), statistic)
    np.testing.assert_allclose(
        [many.value[0, 1], many.low[0, 1], many.high[0, 1]], [alone.value, alone.low, alone.high]
    )
    assert np.isnan([many.value[1, 2], many.low[1, 2], many.high[1, 2]]).all()


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_bootstrap_edges(statistic):
    one = bootstrap([0.3], statistic)
    assert float(one.value) == 0.3
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    constant = bootstrap(np.full((2, 7), 0.1), statistic)  # exact, so that thresholds compare as expected
    assert (constant.value == 0.1).all()
    assert (constant.low == 0.1).all()
    assert (constant.high == 0.1).all()
    empty = bootstrap(np.zeros((2, 0)), statistic)
    assert np.isnan(empty.value).all()
    assert empty.n.tolist() == [0, 0]


def test_bootstrap_seed_moves_the_interval_only():
    x = np.random.default_rng(2).normal(size=20)
    a, b, c = bootstrap(x, seed=1), bootstrap(x, seed=1), bootstrap(x, seed=2)
    assert (a.low, a.high) == (b.low, b.high)
    assert a.low != c.low
    assert a.value == c.value


def test_bootstrap_is_equivariant_to_scale_and_shift():
    x = np.random.default_rng(4).gamma(2, size=15)
    a, b = bootstrap(x), bootstrap(-3 * x + 100)
    np.testing.assert_allclose([b.value, b.low, b.high], [-3 * v + 100 for v in (a.value, a.high, a.low)], rtol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: bootstrap(1.0),
        lambda: bootstrap([1.0, np.inf]),
        lambda: bootstrap(["a", "b"]),
        lambda: bootstrap([1.0, 2.0], n_resamples=0),
        lambda: bootstrap([1.0, 2.0], level=1.0),
        lambda: paired_test([1.0, 2.0], [1.0]),
        lambda: paired_test(np.zeros((2, 4)), np.zeros((3, 4))),
        lambda: paired_test([1.0], [-np.inf]),
        lambda: paired_test([1.0], [0.0], n_permutations=0),
        lambda: holm([0.5, 1.5]),
        lambda: benjamini_hochberg([-0.1]),
        lambda: area([1.0]),
        lambda: area([1.0, 2.0], [0.0, 0.0]),
        lambda: area([1.0, 2.0], [0.0, 0.5, 1.0]),
    ],
)
def test_bad_input_raises(call):
    with pytest.raises(InputError):
        call()


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_exact_test_agrees_with_scipy(alternative):
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9, 12):
        a, b = rng.normal(0.3, size=n), rng.normal(size=n)
        ours = paired_test(a, b, alternative)
        flips = 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1) - 1
        means, mean = (flips * (a - b)).mean(axis=1), (a - b).mean()
        by_hand = {
            "greater": means >= mean - 1e-12,
            "less": means <= mean + 1e-12,
            "two-sided": abs(means) >= abs(mean) - 1e-12,
        }
        assert float(ours.p) == pytest.approx(by_hand[alternative].mean())
        if n > 1:
            scipys = stats.permutation_test(
                (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", alternative=alternative
            )
            assert float(ours.p) == pytest.approx(scipys.pvalue)


def test_sampled_test_is_near_the_exact_one_and_on_the_side_of_wilcoxon():
    rng = np.random.default_rng(1)
    d = rng.normal(0.35, size=16)
    patterns = 2.0 * ((np.arange(2**16)[:, None] >> np.arange(16)) & 1) - 1
    exact = (patterns @ d >= d.sum() - 1e-12).mean()
    assert float(paired_test(d, 0 * d).p) == pytest.approx(exact, abs=4 * np.sqrt(exact / 10_000))
    up, down = paired_test(d, 0 * d), paired_test(d, 0 * d, "less")
    assert up.p < 0.2 < 0.8 < down.p
    assert stats.wilcoxon(d, alternative="greater").pvalue < 0.2
    assert stats.wilcoxon(d, alternative="less").pvalue > 0.8


def test_hand_example_with_ties_and_the_smallest_p():
    # d = (1, 1, 2): sums 4 2 2 0 0 -2 -2 -4; the observed 4 is reached by 1 of 8 patterns
    test = paired_test([1.0, 1.0, 2.0], [0.0, 0.0, 0.0])
    assert float(test.p) == 1 / 8 == float(test.smallest_p)
    # d = (1, 1, -2): observed 0; patterns with a sum of at least 0: 5 of 8
    assert float(paired_test([1.0, 1.0, -2.0], [0.0, 0.0, 0.0]).p) == 5 / 8
    assert float(paired_test([1.0, 1.0, 2.0], [0.0, 0.0, 0.0], "two-sided").p) == 2 / 8
    assert float(paired_test(np.ones(8), np.ones(8)).p) == 1.0  # equal everywhere: no evidence at all
    # differences equal but for rounding are ties
    assert float(paired_test([0.3, 0.1], [0.0, 0.0]).p) == float(paired_test([0.1 + 0.2, 0.1], [0.0, 0.0]).p) == 0.25


def test_smallest_p_is_attained_and_limited_by_the_patterns():
    for n in (1, 4, 12):
        test = paired_test(np.arange(1.0, n + 1), np.zeros(n))
        assert float(test.p) == float(test.smallest_p) == 0.5**n
    test = paired_test(np.ones(40), np.zeros(40), n_permutations=99)
    assert float(test.p) == float(test.smallest_p) == 0.01
    assert float(paired_test(np.ones(1), np.zeros(1), "two-sided").smallest_p) == 1.0
    assert float(paired_test(np.ones(13), np.zeros(13), n_permutations=10**5).smallest_p) == 0.5**13


def test_pairs_with_nan_are_dropped_and_rows_are_independent():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.5, size=(4, 20)), rng.normal(size=20)
    a[1, 6:] = np.nan
    a[2, :] = np.nan
    a[3, 0] = np.nan
    many = paired_test(a, b)
    assert many.n.tolist() == [20, 6, 0, 19]
    assert many.dropped.tolist() == [0, 14, 20, 1]
    few = paired_test(a[1, :6], b[:6])
    assert many.p[1] == few.p
    assert many.difference[1] == pytest.approx(float(few.difference))
    assert many.smallest_p[1] == 1 / 64
    assert np.isnan(many.p[2])
    assert np.isnan(many.difference[2])
    assert many.smallest_p[2] == 1.0
    assert many.p[0] == paired_test(a[0], b).p


@pytest.mark.parametrize("n", [8, 25])
def test_p_is_uniform_under_the_null(n):
    x = np.random.default_rng(7).normal(size=(3000, n))
    p = paired_test(x, np.zeros(n), n_permutations=2000).p
    for level in (0.01, 0.05, 0.25, 0.5, 0.9):
        assert abs((p <= level).mean() - level) < 3.5 * np.sqrt(level * (1 - level) / 3000) + 0.5**n


def test_holm_against_a_hand_example():
    # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04 -> running maximum .02 .03 .06 .06
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([[0.5, np.nan], [0.02, 0.9]]), [[1.0, np.nan], [0.06, 1.0]])
    assert holm([]).shape == (0,)


def test_holm_bounds_the_chance_of_any_false_finding():
    p = np.random.default_rng(0).uniform(size=(2000, 10))
    false = np.mean([(holm(row) < 0.05).any() for row in p])
    assert abs(false - (1 - 0.995**10)) < 0.015


def test_benjamini_hochberg_agrees_with_scipy():
    p = np.random.default_rng(0).uniform(size=25) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    with_gap = np.insert(p, 4, np.nan)
    np.testing.assert_allclose(np.delete(benjamini_hochberg(with_gap), 4), stats.false_discovery_control(p))
    assert np.isnan(benjamini_hochberg(with_gap)[4])
    assert (benjamini_hochberg(p) <= holm(p) + 1e-15).all()


def test_area():
    x = np.array([2.0, 3.0, 7.0, 12.0])
    np.testing.assert_allclose(area(np.full((2, 4), 0.7), x), 0.7)
    np.testing.assert_allclose(area(x, x), 7.0)  # a straight line: the middle of the axis
    assert float(area([0.0, 1.0, 0.0])) == 0.5
    curves = np.random.default_rng(0).normal(size=(3, 4))
    np.testing.assert_allclose(area(curves, x), np.trapezoid(curves, x, axis=-1) / 10)
    assert np.isnan(area([[0.0, np.nan, 1.0], [0.0, 0.5, 1.0]])).tolist() == [True, False]


def test_no_rows_and_no_examples():
    assert bootstrap(np.zeros((0, 5))).value.shape == (0,)
    assert paired_test(np.zeros((0, 5)), np.zeros(5)).p.shape == (0,)
    none = paired_test(np.zeros((2, 0)), np.zeros(0))
    assert np.isnan(none.p).all()
    assert none.n.tolist() == [0, 0]
