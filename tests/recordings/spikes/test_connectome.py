"""Affinities against integrals, factors against planted ones and tensorly, communities against planted ones and formulas by hand."""

from math import comb, factorial, lgamma, log

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from sklearn.metrics import normalized_mutual_info_score as nmi

from nissl.errors import InputError
from nissl.recordings.simulate import planted_groups
from nissl.recordings.spikes import DifferentialAffinity, DynamicConnectome, WeightedSBM, factorise, rank_curve
from nissl.recordings.spikes.connectome import _moved, description_length, similarity, stability


def planted_tensor(seed, noise=0.05, missing=0.1):
    g = np.random.default_rng(seed)
    factors = [np.abs(g.normal(size=(n, 3))) * (g.random((n, 3)) < 0.5) for n in (60, 5, 276)]
    factors[1][factors[1].sum(1) == 0] = 0.5
    factors[1][:, factors[1].sum(0) == 0] = 0.5
    clean = np.einsum("tr,wr,pr->twp", *factors)
    spread = noise * np.sqrt(np.square(clean).mean())
    tensor = np.maximum(clean + spread * g.normal(size=clean.shape), 0)
    hidden = g.random(clean.shape) < missing
    return np.where(hidden, np.nan, tensor), clean, factors, hidden, spread


def two_levels(seed, between=0.3, sizes=(15,) * 4):
    g = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    W = np.triu(g.exponential(np.where(labels[:, None] == labels, 1.0, between)), 1)
    return W + W.T, labels


@pytest.mark.parametrize("phi", [0, np.pi / 4, np.pi / 2, np.pi])
def test_affinity_of_sines_is_the_integral(phi):
    t = np.arange(200 * 12) * 2 * np.pi / 200
    x = np.stack([np.sin(t), 3 * np.sin(t + phi) + 5], 1)
    a = DifferentialAffinity(2, block=200).fit_transform(x[None])
    assert a.shape == (11, 1, 1)
    assert a.mean() == pytest.approx((np.cos(phi) * (np.pi - phi) + np.sin(phi)) / np.pi, abs=0.01)
    b = DifferentialAffinity(2, block=200, anti=True).fit_transform(x[None])
    assert b.mean() == pytest.approx((-np.cos(phi) * phi + np.sin(phi)) / np.pi, abs=0.01)


def test_affinity_by_hand_and_of_independent_traces():
    x = np.random.default_rng(0).normal(size=(2, 4000, 4))
    for kind, mean in (("product", 1 / np.pi), ("geometric", 0.338)):
        model = DifferentialAffinity(0.5, kind, block=4)
        a = model.fit_transform(x)
        assert a.mean() == pytest.approx(mean, abs=0.01)
        g = model._rates(x)
        assert np.square(g).mean(1) == pytest.approx(1)
        for k, (i, j) in enumerate(model.pairs_.T):
            product = np.maximum(g[1, :, i] * g[1, :, j], 0) ** (1 if kind == "product" else 0.5)
            np.testing.assert_allclose(a[:, 1, k], product.reshape(-1, 4).mean(1), atol=1e-5)
    np.testing.assert_allclose(
        DifferentialAffinity(block=4).fit_transform(5 * x - 3),
        DifferentialAffinity(block=4).fit_transform(x),
        atol=1e-4,
    )


def test_missing_dead_and_noisy_neurons():
    s = planted_groups(120, 6, seed=0)
    x = s.X.copy()
    x[1, :, 2] = np.nan
    a = DifferentialAffinity().fit(x)
    out = a.transform(x)
    hit = (a.pairs_ == 2).any(0)
    assert np.isnan(out[:, 1, hit]).all()
    assert np.isfinite(out[:, 1, ~hit]).all()
    assert np.isfinite(out[:, 0]).all()
    x[0, :, 1] = 7.0
    with pytest.warns(UserWarning, match="1 traces do not change"):
        assert np.isnan(DifferentialAffinity().fit_transform(x)[:, 0, 0]).all()
    x[0, :, 1] = np.random.default_rng(0).normal(size=120)
    with pytest.warns(UserWarning, match="min_snr"):
        out = DifferentialAffinity(min_snr=1.0).fit_transform(x)
    assert np.isnan(out[:, 0, 0]).all()
    assert np.isfinite(out[:, 2]).all()


@pytest.mark.parametrize("seed", range(3))
def test_planted_factors_are_found_behind_noise_and_gaps(seed):
    tensor, clean, factors, hidden, spread = planted_tensor(seed)
    found = min((factorise(tensor, 3, seed=k) for k in range(5)), key=lambda f: f.losses[-1])
    assert (np.diff(found.losses) <= 1e-9 * found.losses[0]).all()
    unit = [f / np.linalg.norm(f, axis=0) for f in factors]
    cosines = [a.T @ b for a, b in zip(unit, (found.times, found.animals, found.pairs), strict=True)]
    best = np.argmax(np.prod(cosines, axis=0), axis=1)
    assert sorted(best) == [0, 1, 2]
    assert min(c[np.arange(3), best].min() for c in cosines) >= 0.95
    # Half of the noise is cut off at 0 where the clean tensor is 0, so that hidden entries are compared with the clean ones.
    assert np.sqrt(np.square(found.tensor() - clean)[hidden].mean()) < 1.5 * spread


def test_the_loss_is_what_the_factors_leave_under_every_kind_of_mask():
    g = np.random.default_rng(0)
    full = g.random((6, 4, 9))
    some, whole = full.copy(), full.copy()
    some[g.random(full.shape) < 0.2] = np.nan
    whole[:, 1, :4] = np.nan
    for tensor in (full, some, whole):
        for n in (1, 7):
            found = factorise(tensor, 3, max_iter=n, tol=0)
            assert len(found.losses) == n + 1
            assert found.losses[-1] == pytest.approx(np.nansum(np.square(tensor - found.tensor())), rel=1e-9)
            assert (np.diff(found.losses) <= 1e-9 * found.losses[0]).all()
        assert np.linalg.norm(found.pairs, axis=0) == pytest.approx(1)
        # the least-squares conditions: a weight that is not at its border has no gradient, one that is has none downwards
        found = factorise(tensor, 2, max_iter=20_000, tol=0)
        left = np.nan_to_num(found.tensor() - tensor)
        for f, formula, others in ((found.times, "twp,wr,pr->tr", (found.animals, found.pairs)),
                                   (found.animals, "twp,tr,pr->wr", (found.times, found.pairs)),
                                   (found.pairs, "twp,tr,wr->pr", (found.times, found.animals))):  # fmt: skip
            gradient = np.einsum(formula, left, *others)
            assert np.abs(gradient[f > 1e-6]).max() < 1e-5
            assert gradient.min() > -1e-5


def test_tensorly_ends_at_the_same_loss():
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import non_negative_parafac_hals

    tensor, *_ = planted_tensor(0, missing=0)
    start = [np.random.default_rng(1).random((n, 3)) for n in tensor.shape]
    ours = factorise(tensor, 3, start=start, max_iter=2000, tol=1e-12)
    peer = tensorly.cp_tensor.CPTensor((np.ones(3), [f.copy() for f in start]))
    theirs = non_negative_parafac_hals(tensor, 3, n_iter_max=200, init=peer, tol=1e-12)
    loss = np.square(tensor - tensorly.cp_to_tensor(theirs)).sum()
    assert ours.losses[-1] == pytest.approx(loss, rel=1e-3)


def test_similarity_pairs_components_and_stability_picks_the_rank():
    tensor, *_ = planted_tensor(0, missing=0)
    a = factorise(tensor, 3, seed=0)
    turned = type(a)(a.weights, a.times[:, [2, 0, 1]], a.animals[:, [2, 0, 1]], a.pairs[:, [2, 0, 1]], a.losses)
    assert similarity(a, turned) == pytest.approx(1)
    assert stability([a, turned]) == pytest.approx(1)
    curve = rank_curve(tensor, range(1, 5), 3)
    assert curve["rank"][curve["chosen"]].tolist() == [3]
    assert (np.diff(curve["error"][:3]) < 0).all()


def test_description_length_by_hand():
    g = np.random.default_rng(0)
    W = np.triu(g.exponential(size=(7, 7)) * (g.random((7, 7)) < 0.6), 1)
    W = W + W.T
    labels = np.array([0, 0, 1, 1, 1, 2, 0])
    b = W[W > 0].mean()
    total = log(7) + log(comb(6, 2)) + log(factorial(7) / (factorial(3) * factorial(3) * factorial(1)))
    for r in range(3):
        for s in range(r, 3):
            pairs = [W[i, j] for i in range(7) for j in range(i) if sorted((labels[i], labels[j])) == [r, s]]
            n, m, w = len(pairs), sum(p > 0 for p in pairs), sum(pairs)
            total += -log(factorial(m) * factorial(n - m) / factorial(n + 1))
            total += -(lgamma(m + 1) + log(b) - (m + 1) * log(b + w))
    assert description_length(W, labels) == pytest.approx(total)


def test_moves_end_where_no_single_move_shortens_the_description():
    W, _ = two_levels(0, 0.5, (6, 5, 4))
    labels = _moved(W, np.random.default_rng(0).integers(3, size=15))
    least = description_length(W, labels)
    for i in range(15):
        for s in range(labels.max() + 2):
            tried = labels.copy()
            tried[i] = s
            assert description_length(W, np.unique(tried, return_inverse=True)[1]) >= least - 1e-6


def test_planted_communities_and_none():
    scores, ones = [], []
    for seed in range(3):
        W, labels = two_levels(seed)
        scores.append(nmi(labels, WeightedSBM(random_state=seed).fit_predict(W)))
        flat = np.triu(np.random.default_rng(seed).exponential(size=(60, 60)), 1)
        ones.append(WeightedSBM().fit(flat + flat.T).n_blocks_)
    assert np.sum(np.array(scores) >= 0.95) >= 2
    assert np.sum(np.array(ones) == 1) >= 2


def test_edges_alone_and_levels():
    g = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 12)
    chance = np.where(labels[:, None] == labels, 0.9, np.where(labels[:, None] // 2 == labels // 2, 0.4, 0.03))
    W = np.triu(g.random((48, 48)) < chance, 1).astype(float)
    model = WeightedSBM().fit(W + W.T)
    assert adjusted_rand_score(labels, model.labels_) == 1
    assert model.description_length_ == pytest.approx(description_length(W + W.T, model.labels_))
    for fine, coarse in zip(model.levels_, model.levels_[1:], strict=False):
        assert coarse.max() < fine.max()
        assert all(len(set(coarse[fine == k])) == 1 for k in range(fine.max() + 1))
    assert len(WeightedSBM(nested=False).fit(W + W.T).levels_) == 1
    assert WeightedSBM().fit(np.zeros((5, 5))).n_blocks_ == 1


@pytest.fixture(scope="module")
def whole():
    s = planted_groups(seed=0)
    return s, DynamicConnectome(4, DifferentialAffinity(block=20), n_restarts=5).fit(s.X)


def test_planted_groups_times_and_animals(whole):
    s, model = whole
    window = s.active[:, model.times_.astype(int)]
    ranked = 0
    for k in range(3):
        mine = np.array([roc_auc_score(window[k], f) for f in model.time_factors_.T])
        mine *= [adjusted_rand_score(s.labels == k, np.isin(np.arange(24), model.strongest(r))) for r in range(4)]
        r = int(np.argmax(mine))
        assert roc_auc_score(window[k], model.time_factors_[:, r]) >= 0.9
        assert adjusted_rand_score(s.labels == k, np.isin(np.arange(24), model.strongest(r))) >= 0.8
        ranked += model.animal_factors_[s.animals[k], r].min() > model.animal_factors_[~s.animals[k], r].max()
    assert ranked >= 2  # a group that acts in three of four animals may share one with another group
    assert 0 < model.explained_ < 1
    assert -1e-9 <= model.stability_ <= 1 + 1e-9


def test_surrogates_tell_groups_from_nothing(whole):
    _, model = whole
    p = model.surrogate_test(19)
    assert (p <= 0.05).sum() >= 3
    g = np.random.default_rng(0)
    nothing = planted_groups(seed=1).X[
        :, g.permutation(400)
    ]  # no shared time course is left once each trace is shuffled
    nothing = np.stack([np.stack([np.roll(x[:, k], int(g.integers(400))) for k in range(24)], 1) for x in nothing])
    assert DynamicConnectome(2, n_restarts=2).fit(nothing).surrogate_test(19).min() > 0.05


def test_pairs_fold_back_and_few_animals_are_left_out(whole):
    s, model = whole
    M = model.affinity_matrix(1)
    np.testing.assert_array_equal(M[np.triu_indices(24, 1)], model.pair_factors_[:, 1])
    np.testing.assert_array_equal(M, M.T)
    assert not np.diag(M).any()
    x = s.X.copy()
    x[:3, :, 0] = np.nan
    few = DynamicConnectome(2, n_restarts=1, min_animals=2).fit(x)
    assert not few.affinity_matrix(0)[0].any()
    assert np.isnan(few.stability_)
    assert DynamicConnectome(2, n_restarts=1).fit(x).affinity_matrix(0)[0].any()


def test_same_seed_same_result_and_data_are_left_alone(whole):
    s, model = whole
    before = s.X.copy()
    again = clone(model).fit(list(s.X))
    np.testing.assert_array_equal(again.pair_factors_, model.pair_factors_)
    np.testing.assert_array_equal(s.X, before)


def test_the_rank_is_chosen():
    s = planted_groups(240, 12, seed=0)
    model = DynamicConnectome(n_restarts=2).fit(s.X)
    assert len(model.weights_) == model.rank_curve_["rank"][model.rank_curve_["chosen"]].iloc[0]


def test_picture(whole):
    figure = whole[1].plot(share=0.2)
    assert len(figure.axes) == 12
    assert len(figure.axes[0].collections[0].get_segments()) == int(0.2 * 276)


X = planted_groups(60, 6, seed=0).X
HALF = X.copy()
HALF[0, :5, 1] = np.nan


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DifferentialAffinity(0).fit(X), "sigma"),
        (lambda: DifferentialAffinity(kind="sum").fit(X), "kind"),
        (lambda: DifferentialAffinity(block=0).fit(X), "block"),
        (lambda: DifferentialAffinity(min_snr=-1).fit(X), "min_snr"),
        (lambda: DifferentialAffinity(10).fit(X), "too few"),
        (lambda: DifferentialAffinity().fit(X[:, :, :1]), "2 neurons"),
        (lambda: DifferentialAffinity().fit([]), "one or more"),
        (lambda: DifferentialAffinity().fit([X[0], X[1, :50]]), "share times"),
        (lambda: DifferentialAffinity().fit(HALF), "neuron 1 of animal 0"),
        (lambda: DifferentialAffinity().fit(X * np.inf), "infinity"),
        (lambda: DifferentialAffinity().fit(X[0, 0]), "shape"),
        (lambda: DifferentialAffinity().fit(X).transform(X[:, :, :4]), "4 neurons, expected 6"),
        (lambda: factorise(-np.ones((2, 2, 2)), 1), "from 0"),
        (lambda: factorise(np.ones((2, 2)), 1), "n_times, n_animals, n_pairs"),
        (lambda: factorise(np.full((2, 2, 2), np.nan), 1), "nothing was observed"),
        (lambda: factorise(np.ones((2, 2, 2)), 0), "rank"),
        (lambda: factorise(np.ones((2, 2, 2)), 1, tol=-1), "tol"),
        (lambda: factorise(np.ones((2, 2, 2)), 1, start=[np.ones((2, 2))] * 3), "start"),
        (lambda: rank_curve(np.ones((2, 2, 2)), []), "empty"),
        (lambda: stability([]), "2 fits"),
        (lambda: WeightedSBM().fit(np.ones((3, 4))), "symmetric"),
        (lambda: WeightedSBM().fit(np.triu(np.ones((3, 3)))), "symmetric"),
        (lambda: WeightedSBM().fit(-np.ones((3, 3))), "from 0"),
        (lambda: WeightedSBM(n_starts=0).fit(np.ones((3, 3))), "n_starts"),
        (lambda: DynamicConnectome(0).fit(X), "rank"),
        (lambda: DynamicConnectome(1, min_animals=9).fit(X), "min_animals"),
        (lambda: DynamicConnectome(1, n_restarts=1).fit(X).affinity_matrix(3), "component"),
        (lambda: DynamicConnectome(1, n_restarts=1).fit(X).plot(share=2), "share"),
        (lambda: planted_groups(10), "n_times"),
        (lambda: planted_groups(snr=0), "snr"),
    ],
)  # fmt: skip
def test_bad_inputs(call, words):
    with pytest.raises(InputError, match=words):
        call()


def test_before_fit():
    for call in (
        lambda m: m.affinity_matrix(0),
        lambda m: m.surrogate_test(),
        lambda m: m.plot(),
        lambda m: m.strongest(0),
    ):
        with pytest.raises(NotFittedError):
            call(DynamicConnectome())
    with pytest.raises(NotFittedError):
        DifferentialAffinity().transform(X)
