"""Augmented covariances: exact matrices, planted delays, embeddings of known systems, what cannot be done."""

import numpy as np
import pytest
from pyriemann.estimation import TimeDelayCovariances, covariances
from sklearn.covariance import oas
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import StratifiedKFold, cross_val_score

from nissl.errors import InputError
from nissl.recordings.eeg import augmented_covariance as module
from nissl.recordings.eeg.augmented_covariance import (
    AugmentedCovariance,
    AugmentedGrid,
    ChannelRank,
    EmbeddingSelector,
    TimeDelay,
    augmented_classifier,
    plot_augmented,
)
from nissl.recordings.simulate import delayed_sources


def white(n=6, c=3, t=100, seed=0):
    return np.random.default_rng(seed).standard_normal((n, c, t))


# ---------------------------------------------------------------- matrices


def test_order_one_is_the_plain_covariance_bit_for_bit():
    X = white()
    for name in ("cov", "scm", "oas", "lwf"):
        assert np.array_equal(AugmentedCovariance(1, 7, name).fit_transform(X), covariances(X, estimator=name))


@pytest.mark.parametrize(("order", "lag"), [(1, 5), (2, 1), (3, 4), (5, 2)])
@pytest.mark.parametrize("legacy", [False, True])
def test_shape_and_content_of_the_embedding(order, lag, legacy):
    X = white()
    before = X.copy()
    found = TimeDelay(order, lag, legacy=legacy).fit(X).transform(X)
    n = 100 - (order - 1) * lag - (lag if legacy and order > 1 else 0)
    assert found.shape == (6, order * 3, n)
    for k in range(order):
        assert np.array_equal(found[:, 3 * k : 3 * k + 3], X[:, :, k * lag : k * lag + n])
    assert np.array_equal(X, before)
    assert not np.shares_memory(found, X)


def test_non_uniform_embedding_stacks_the_pairs():
    X = white()
    found = TimeDelay(pairs=[(2, 0), (0, 9), (2, 4)]).fit(X).transform(X)
    assert np.array_equal(found[:, 1], X[:, 0, 9:])
    assert np.array_equal(found[:, 2], X[:, 2, 4:95])


def test_the_block_at_the_true_delay_is_the_largest():
    X = white(4, 2, 2000)
    X[:, 1, 6:] = X[:, 0, :-6]  # channel 1 follows channel 0 by 6 samples
    found = AugmentedCovariance(5, 2).fit_transform(X).mean(0).reshape(5, 2, 5, 2)
    size = np.array([[found[i, 0, j, 1] for j in range(5)] for i in range(5)])
    at = {(j - i) for i, j in np.argwhere(size > 0.8)}
    assert at == {3}
    assert abs(size[np.subtract.outer(np.arange(5), np.arange(5)) != -3]).max() < 0.2


def test_the_toeplitz_matrix_equals_direct_sums():
    X = white(3, 2, 40)
    order, lag = 4, 3
    found = AugmentedCovariance(order, lag, toeplitz=True).fit_transform(X)
    for x, matrix in zip(X - X.mean(2, keepdims=True), found, strict=True):
        for i in range(order):
            for j in range(order):
                for a in range(2):
                    for b in range(2):
                        d = (j - i) * lag
                        s = sum(x[a, t] * x[b, t + d] for t in range(40) if 0 <= t + d < 40) / 40
                        assert abs(matrix[2 * i + a, 2 * j + b] - s) < 1e-12
    assert np.linalg.eigvalsh(found).min() > 0


def test_toeplitz_and_embedded_covariance_differ_by_the_border_only():
    X = white(3, 2, 4000)
    a = AugmentedCovariance(4, 3, "scm", toeplitz=True).fit_transform(X)
    b = AugmentedCovariance(4, 3, "scm").fit_transform(X)
    assert np.abs(a - b).max() < 3 * 4 * 3 / 4000 * 4


def test_shrinkage_is_that_of_scikit_learn():
    X = white(3, 2, 40)
    plain = AugmentedCovariance(3, 2, "scm", toeplitz=True).fit_transform(X)
    found = module.shrink(plain, 40)
    for x, f, p in zip(X, found, plain, strict=True):
        mean, square = np.trace(p) / 6, (p**2).mean()
        share = min(1, (square + mean**2) / (41 * (square - mean**2 / 6)))
        assert np.allclose(f, (1 - share) * p + share * mean * np.eye(6), atol=1e-14)
        one = module.shrink((x - x.mean(1, keepdims=True)) @ (x - x.mean(1, keepdims=True)).T[None] / 40, 40)[0]
        assert np.allclose(one, oas(x.T)[0], atol=1e-12)


def test_pyriemann_agrees_where_trials_end_in_zeros():
    """It rolls trials around their ends; with zeros there nothing comes around, and its blocks run the other way."""
    X = white(4, 3, 120)
    X[:, :, -10:] = 0
    X[:, :, :-10] -= X[:, :, :-10].mean(2, keepdims=True)  # it takes the mean off
    theirs = TimeDelayCovariances(delays=4, estimator="scm").transform(X).reshape(4, 4, 3, 4, 3)
    R = np.stack([X[:, :, : 120 - k] @ X[:, :, k:].transpose(0, 2, 1) / 120 for k in range(4)], 1)
    ours = module.assemble(R).reshape(4, 4, 3, 4, 3)
    assert np.allclose(theirs[:, ::-1, :, ::-1], ours, atol=1e-12)


# ---------------------------------------------------------------- planted delays


@pytest.fixture(scope="module")
def planted():
    found = delayed_sources(seed=0)
    return found.X, found.y


def auc(model, X, y):
    return cross_val_score(model, X, y, cv=StratifiedKFold(5, shuffle=True, random_state=0), scoring="roc_auc").mean()


def test_the_planted_delay_is_seen_only_by_orders_that_cover_it(planted):
    X, y = planted
    for order, lag in ((2, 3), (4, 1)):
        assert auc(augmented_classifier(search=None, order=order, lag=lag), X, y) >= 0.97
    for order, lag in ((1, 1), (2, 1), (2, 4)):
        assert 0.35 <= auc(augmented_classifier(search=None, order=order, lag=lag), X, y) <= 0.65
    assert auc(augmented_classifier("mdm", search=None, order=2, lag=3), X, y) >= 0.97


def test_the_nested_grid_finds_the_planted_delay_and_nothing_in_shuffled_labels(planted):
    X, y = planted
    grid = AugmentedGrid(orders=[1, 2, 3], lags=[1, 3, 4], C=[1.0], kernels=["linear"])
    scores, chosen = [], []
    for train, test in StratifiedKFold(4, shuffle=True, random_state=1).split(X, y):
        fitted = AugmentedGrid(**grid.get_params()).fit(X[train], y[train])
        chosen.append(fitted.best_params_)
        scores.append(float((fitted.predict(X[test]) == y[test]).mean()))
    assert all((c["order"], c["lag"]) in ((2, 3), (3, 3)) for c in chosen)
    assert np.mean(scores) >= 0.95
    shuffled = np.random.default_rng(0).permutation(y)
    assert 0.3 <= auc(grid, X, shuffled) <= 0.7


def test_the_grid_scores_as_pipelines_on_the_same_folds_do(planted):
    """Cached autocovariances give the scores of the estimators that compute everything again."""
    X, y = planted[0][:60], planted[1][:60]
    found = AugmentedGrid(orders=[1, 2], lags=[2, 3], C=[1.0], kernels=["linear"]).fit(X, y)
    assert [(r["order"], r["lag"]) for r in found.results_] == [(1, 1), (2, 2), (2, 3)]
    for r in found.results_:
        model = augmented_classifier(search=None, order=r["order"], lag=r["lag"])
        model.set_params(augmentedcovariance__toeplitz=True)
        direct = cross_val_score(model, X, y, cv=StratifiedKFold(3, shuffle=True, random_state=0), scoring="roc_auc")
        assert r["score"] == pytest.approx(direct.mean(), abs=1e-9)


def test_grid_of_mdm_gives_probabilities_and_no_decision_function(planted):
    X, y = planted[0][:60], planted[1][:60]
    fitted = AugmentedGrid("mdm", orders=[2], lags=[3]).fit(X, y)
    assert np.allclose(fitted.predict_proba(X).sum(1), 1)
    assert not hasattr(fitted, "decision_function")
    assert fitted.best_params_ == {"order": 2, "lag": 3}


# ---------------------------------------------------------------- choice of order and lag


def lorenz(n, dt=0.02):
    def slope(s):
        return np.array([10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]])

    s, out = np.ones(3), []
    for _ in range(n + 500):
        for _ in range(4):
            h = dt / 4
            a = slope(s)
            b = slope(s + h / 2 * a)
            c = slope(s + h / 2 * b)
            s = s + h / 6 * (a + 2 * b + 2 * c + slope(s + h * c))
        out.append(s)
    return np.array(out)[500:].T


def test_mutual_information_of_known_systems():
    x = lorenz(2000)[:1]
    assert 8 <= module.first_minimum(module.mutual_information(x, 30)[0]) <= 11
    g = np.random.default_rng(0)
    phases = g.uniform(0, 2 * np.pi, (20, 1))
    sine = np.sin(2 * np.pi * np.arange(1000) / 40 + phases) + 0.1 * g.standard_normal((20, 1000))
    assert 8 <= module.first_minimum(module.mutual_information(sine, 30).mean(0)) <= 12
    noise = module.mutual_information(g.standard_normal((1, 20000)), 3, n_bins=4)[0]
    assert noise[0] > 0.7
    assert noise[1:].max() < 0.01


def test_caos_ratio_settles_at_the_dimension_of_the_lorenz_system():
    """It stands above .9 from three delays on; the first maximum, which the rule takes, comes at three or more."""
    selector = EmbeddingSelector("afnn").fit(lorenz(2000)[None, :1])
    assert 8 <= selector.lag_ <= 11
    assert selector.curve_[1] < 0.6
    assert selector.curve_[2:].min() > 0.9
    assert selector.order_ == np.argmax(selector.curve_) + 1 >= 3


def test_the_greedy_embedding_of_a_sine_starts_with_a_delay_that_unfolds_it():
    t = np.arange(1000)
    x = np.sin(2 * np.pi * t / 40.3)[None] + 1e-4 * np.random.default_rng(0).standard_normal((1, 1000))
    chosen = module.greedy_embedding([x], 30)
    assert chosen[0] == (0, 0)
    assert 5 <= chosen[1][1] % 20 <= 15  # a quarter of a period, or three


def test_the_greedy_choice_equals_a_plain_search_over_all_candidates():
    x = lorenz(250)[[0, 2]]
    max_delay, n = 12, 250 - 12
    chosen = module.greedy_embedding([x], max_delay, max_dim=3, share=0.0)
    window = max(module.first_minimum(m) for m in module.mutual_information(x, max_delay))
    for step in range(1, len(chosen)):
        Y = np.stack([x[c, d : d + n] for c, d in chosen[:step]], 1)
        distance = np.linalg.norm(Y[:, None] - Y[None], axis=2)
        near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= window
        distance[near] = np.inf
        j = distance.argmin(1)
        best = {}
        for c in range(2):
            for d in range(max_delay + 1):
                if (c, d) not in chosen[:step]:
                    apart = np.abs(x[c, d : d + n] - x[c, j + d]) / distance[np.arange(n), j]
                    best[c, d] = np.log10(apart[apart > 0]).mean()
        assert max(best, key=best.__getitem__) == chosen[step]


def test_the_selector_sees_no_label_and_takes_the_same_trials_for_the_same_seed(planted):
    X, y = planted
    a = EmbeddingSelector(max_trials=5, max_delay=10).fit(X, y)
    b = EmbeddingSelector(max_trials=5, max_delay=10).fit(X, y[::-1])
    assert (a.order_, a.lag_, a.pairs_, a.embeddings_) == (b.order_, b.lag_, b.pairs_, b.embeddings_)
    assert len(a.embeddings_) == 5


@pytest.mark.parametrize("search", ["mdop", "afnn", "pairs"])
def test_pipelines_with_a_selector_run(planted, search):
    X, y = planted[0][:40], planted[1][:40]
    model = augmented_classifier(search=search, max_trials=4, max_delay=8).fit(X, y)
    assert model.predict(X).shape == (40,)
    covariance = model["augmentedcovariance"]
    assert covariance.condition_ >= 1
    if search == "pairs":
        assert covariance.pairs_[:4] == [(0, 0), (1, 0), (2, 0), (3, 0)]


# ---------------------------------------------------------------- what cannot be done


def test_an_average_reference_is_named_and_reduced():
    X = white(10, 4, 200)
    X -= X.mean(1, keepdims=True)
    with pytest.raises(InputError, match="rank 3"):
        AugmentedCovariance(2, 1).fit(X)
    reduced = ChannelRank().fit(X)
    assert reduced.transform(X).shape == (10, 3, 200)
    back = reduced.filters_.T @ reduced.transform(X)
    assert np.allclose(back, X)
    AugmentedCovariance(2, 1).fit(reduced.transform(X))
    full = white()
    assert np.array_equal(ChannelRank().fit(full).transform(full), full)


def test_too_few_samples_are_named():
    X = white(6, 5, 30)
    with pytest.raises(InputError, match=r"24 samples give no full covariance of 35 rows.*oas"):
        AugmentedCovariance(7, 1).fit(X)
    with pytest.warns(UserWarning, match="close to singular"):
        AugmentedCovariance(4, 1).fit(X)
    found = AugmentedCovariance(7, 1, "oas").fit_transform(X)
    assert np.linalg.eigvalsh(found).min() > 0


BAD = {
    "order 0": (lambda: AugmentedCovariance(0).fit(white()), "order"),
    "order 1.5": (lambda: TimeDelay().set_params(order=1.5).fit(white()), "order"),
    "lag 0": (lambda: TimeDelay(2, 0).fit(white()), "lag"),
    "too long a delay": (lambda: TimeDelay(3, 60).fit(white()), "too short"),
    "no pair": (lambda: TimeDelay(pairs=[]).fit(white()), "pairs"),
    "a channel that is not there": (lambda: TimeDelay(pairs=[(3, 0)]).fit(white()), "channels 0 to 2"),
    "a pair twice": (lambda: TimeDelay(pairs=[(0, 1), (0, 1)]).fit(white()), "twice"),
    "estimator": (lambda: AugmentedCovariance(estimator="mean").fit(white()), "estimator"),
    "toeplitz with lwf": (lambda: AugmentedCovariance(estimator="lwf", toeplitz=True).fit(white()), "toeplitz"),
    "method": (lambda: EmbeddingSelector("grid").fit(white()), "method"),
    "short trials": (lambda: EmbeddingSelector(max_delay=60).fit(white()), "max_delay"),
    "flat channel": (lambda: EmbeddingSelector().fit(white() * [[1], [0], [1]]), "flat"),
    "flat channel of covariances": (lambda: AugmentedCovariance().fit(white() * [[1], [0], [1]]), "flat"),
    "all flat": (lambda: ChannelRank().fit(white() * 0), "flat"),
    "NaN": (lambda: AugmentedCovariance().fit(white() * np.nan), "NaN"),
    "one class": (lambda: AugmentedGrid().fit(white(), np.zeros(6)), "one class"),
    "few trials": (lambda: AugmentedGrid().fit(white(), [0, 0, 0, 0, 1, 1]), "fewer than 3"),
    "labels": (lambda: AugmentedGrid().fit(white(), [0, 1]), "label"),
    "empty grid": (lambda: AugmentedGrid(orders=[]).fit(white(), [0, 1] * 3), "empty"),
    "no pair fits": (lambda: AugmentedGrid(orders=[3], lags=[99]).fit(white(), [0, 1] * 3), "no pair"),
    "auc of three": (lambda: AugmentedGrid(scoring="auc", cv=2).fit(white(), [0, 1, 2] * 2), "two classes"),
    "classifier": (lambda: augmented_classifier("lda"), "classifier"),
    "search": (lambda: augmented_classifier(search="random"), "search"),
    "options": (lambda: augmented_classifier(search=None, orders=[1]), "orders"),
    "picture": (lambda: plot_augmented(np.eye(5), 2), "square"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    act, match = BAD[case]
    with pytest.raises(InputError, match=match):
        act()


def test_other_trials_than_those_of_fit_are_refused():
    fitted = AugmentedCovariance(2).fit(white())
    with pytest.raises(InputError, match="channels"):
        fitted.transform(white(c=2))
    with pytest.raises(InputError, match="times"):
        fitted.transform(white(t=90))
    with pytest.raises(NotFittedError):
        AugmentedCovariance().transform(white())
    with pytest.raises(NotFittedError):
        AugmentedGrid().predict(white())


def test_picture_names_delays_in_ms():
    ax = plot_augmented(AugmentedCovariance(3, 4).fit_transform(white())[0], 3, 4, sampling_rate=200.0)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "20", "40"]
    assert "ms" in ax.get_xlabel()
