"""EEGFormer: patches by hand, invariances, codes of a planted grammar, n-grams by hand, what cannot be done."""

import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import normalized_mutual_info_score, roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.naive_bayes import MultinomialNB

from nissl.attribution import IntegratedGradients
from nissl.errors import InputError, RunFolderError
from nissl.network import Network
from nissl.recordings.eeg.eegformer import (
    FLOOR,
    CodeNgramNB,
    EEGFormer,
    EEGFormerClassifier,
    as_codes,
    ngrams,
    plot_codes,
    plot_ngrams,
    windows_of,
)
from nissl.recordings.simulate import planted_grammar

SMALL = {"sampling_rate": 100.0, "n_features": 16, "n_layers": 1, "n_decoder_layers": 1, "n_heads": 2, "n_codes": 8}


def made(n_times=600, seed=0, **options):
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return EEGFormer(n_times, **(SMALL | options)).eval()


def white(n=3, c=2, t=600, seed=0):
    return np.random.default_rng(seed).standard_normal((n, c, t))


def tensor(X):
    return torch.from_numpy(X.astype(np.float32))


def normal(x, axes):
    return (x - x.mean(axes, keepdims=True)) / x.std(axes, keepdims=True)


@pytest.fixture(scope="module")
def grammar():
    return [planted_grammar(n, seed=i) for i, n in enumerate((200, 200, 100))]


@pytest.fixture(scope="module")
def learnt(grammar):
    model = made(seed=1, n_features=32, n_layers=2, n_heads=4, n_codes=16, dropout=0.0)
    model.history = model.pretrain(grammar[0].X, epochs=50, learning_rate=5e-3, progress=False)
    return model


# ---------------------------------------------------------------- patches


def test_patches_of_spectra_in_time_by_hand():
    X = white()
    found = made(stride=50).patches(tensor(X)).numpy()
    x = normal(X, -1)
    cut = np.stack([x[..., s : s + 100] for s in range(0, 501, 50)], 2)
    bins = np.exp(-2j * np.pi * np.outer(np.arange(1, 51), np.arange(100)) / 100) / 10
    expected = normal(np.log(np.abs(cut @ bins.T) + FLOOR), (-2, -1))
    assert found.shape == (3, 2, 11, 50)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_patches_of_one_spectrum_run_along_frequency():
    model, X = made(domain="fft"), white()
    assert (model.patch, model.stride, model.n_patches) == (50, 25, (300 - 50) // 25 + 1)
    spectrum = np.abs(np.fft.rfft(X - X.mean(-1, keepdims=True)))[..., 1:]
    expected = normal(np.stack([spectrum[..., 25 * i : 25 * i + 50] for i in range(11)], 2), (-2, -1))
    np.testing.assert_allclose(model.patches(tensor(X)).numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(model.frequencies[3], np.arange(76, 126) / 6)
    np.testing.assert_allclose(model.starts, np.arange(1, 252, 25) / 6)


def test_patches_of_samples_are_the_normalised_samples():
    X = white()
    found = made(domain="time", patch=64).patches(tensor(X)).numpy()
    assert found.shape == (3, 2, 9, 64)
    np.testing.assert_allclose(found, normal(X[..., : 9 * 64].reshape(3, 2, 9, 64), (-2, -1)), atol=1e-5)


def test_a_band_keeps_its_frequencies_and_never_0_Hz():
    model = made(band=(0, 12))
    np.testing.assert_array_equal(model.frequencies, np.arange(1, 13))
    assert model.patches(tensor(white())).shape == (3, 2, 6, 12)


@pytest.mark.parametrize("domain", ["patch-fft", "fft", "time"])
def test_gain_and_unit_change_nothing_and_a_flat_channel_is_all_zero(domain):
    model, X = made(domain=domain), white()
    X[0, 1] = 5.0
    codes = model.codes(X)
    scaled = X.copy()
    scaled[:, 0] *= 2.0
    assert np.array_equal(model.codes(scaled), codes)  # to the last bit: doubling is exact
    volts = model.patches(tensor(1e-6 * X)).numpy()
    np.testing.assert_allclose(volts, model.patches(tensor(X)).numpy(), atol=2e-3)
    assert np.array_equal(volts[0, 1], np.zeros_like(volts[0, 1]))


def test_gradients_are_finite_at_a_flat_channel():
    X = tensor(white())
    X[:, 1] = 0.0
    X.requires_grad_()
    made().encode(X).square().sum().backward()
    assert bool(torch.isfinite(X.grad).all())


def test_moments_are_what_the_normalisation_takes_away():
    X = 3.0 + 2.0 * white()
    found = made().moments(tensor(X)).numpy()
    np.testing.assert_allclose(found, np.stack([X.mean(-1), np.log(X.std(-1))], -1), rtol=1e-4)


# ---------------------------------------------------------------- the network


def test_channels_are_encoded_alone():
    model, X = made().double(), white(4, 5)
    h = model.encode(torch.from_numpy(X))
    order = [3, 0, 4, 2, 1]
    np.testing.assert_allclose(model.encode(torch.from_numpy(X[:, order])).detach(), h[:, order].detach(), atol=1e-12)
    np.testing.assert_allclose(model.encode(torch.from_numpy(X[:, 2:3])).detach(), h[:, 2:3].detach(), atol=1e-12)
    assert np.array_equal(made().codes(X[:, order]), made().codes(X)[:, order])


def test_codes_are_the_nearest_vectors_and_distances_are_theirs():
    model, X = made(), white()
    h, v = model.encode(tensor(X)).detach().numpy(), model.quantizer.vectors.detach().numpy()
    far = np.square(h[..., None, :] - v).sum(-1)
    assert np.array_equal(model.codes(X), far.argmin(-1))
    np.testing.assert_allclose(model.distances(X), far.min(-1), rtol=1e-4)


def test_the_loss_is_what_the_paper_says():
    model, X = made(dropout=0.0, update="gradient"), tensor(white())
    loss = {k: v.detach() for k, v in model.loss(X).items()}
    assert set(loss) == {"reconstruction", "codebook", "commitment"}
    assert set(made().loss(X)) == {"reconstruction", "commitment"}
    distance = model.distances(X.numpy()).mean() / 16
    assert float(loss["codebook"]) == pytest.approx(distance, rel=1e-4)
    assert float(loss["commitment"]) == pytest.approx(0.25 * distance, rel=1e-4)
    decoded = model.decode(model.codes(X.numpy()))
    error = np.square(decoded - model.patches(X).numpy()).mean()
    assert float(loss["reconstruction"]) == pytest.approx(error, rel=1e-3)


def test_hidden_patches_are_drawn_by_the_generator_and_not_seen():
    model, X = made(mask_ratio=0.5, dropout=0.0), tensor(white())
    one, same, other = (
        float(model.loss(X, torch.Generator().manual_seed(s))["reconstruction"].detach()) for s in (0, 0, 1)
    )
    assert one == same != other
    hide = torch.ones(3, 2, 6, dtype=torch.bool)
    a, b = (model._encode(model.patches(x), hide) for x in (X, X.flip(-1)))
    assert torch.equal(a, b)


def test_pretraining_is_the_same_again_and_leaves_the_random_state_alone(grammar):
    X = grammar[0].X[:32]
    state = torch.random.get_rng_state()
    models = [made(seed=3) for _ in range(2)]
    losses = [m.pretrain(X, epochs=2, progress=False).losses for m in models]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert np.array_equal(*losses)
    assert np.array_equal(models[0].codes(X), models[1].codes(X))
    assert models[0].pretrained
    assert not models[0].training
    assert not models[0].fresh().pretrained


def test_a_killed_pretraining_goes_on_where_it_was(grammar, tmp_path):
    X = grammar[0].X[:32]
    whole = made(seed=3, dropout=0.1)
    expected = whole.pretrain(X, epochs=4, batch_size=16, progress=False).losses

    class Killed(Exception):
        pass

    model, steps = made(seed=3, dropout=0.1), []
    original = model.loss

    def loss(*given):
        steps.append(1)
        if len(steps) > 5:
            raise Killed
        return original(*given)

    model.loss = loss
    with pytest.raises(Killed):
        model.pretrain(X, epochs=4, batch_size=16, folder=tmp_path, progress=False)
    again = made(seed=3, dropout=0.1)
    with pytest.raises(RunFolderError):
        again.pretrain(X, epochs=4, batch_size=16, folder=tmp_path, progress=False)
    found = again.pretrain(X, epochs=4, batch_size=16, folder=tmp_path, resume=True, progress=False).losses
    np.testing.assert_array_equal(found, expected)
    assert np.array_equal(again.codes(X), whole.codes(X))


def test_a_saved_model_is_the_same_and_other_files_are_refused(learnt, grammar, tmp_path):
    file = learnt.save(tmp_path / "model.safetensors")
    again = EEGFormer.load(file)
    assert again.pretrained
    assert np.array_equal(again.codes(grammar[2].X), learnt.codes(grammar[2].X))
    assert list(tmp_path.iterdir()) == [file]
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    for name in ("other.safetensors", "missing.safetensors"):
        with pytest.raises(InputError, match="cannot be read"):
            EEGFormer.load(tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        learnt.save(tmp_path / "no folder" / "model.safetensors")


def test_sizes_are_those_of_the_paper():
    for size, layers, codes in (("small", 6, 512), ("base", 8, 1024), ("large", 12, 2048)):
        model = EEGFormer(size=size, n_features=8)
        assert (len(model.encoder.blocks), model.n_codes) == (layers, codes)
        assert (model.n_patches, model.patch_values) == (12, 125)
    assert EEGFormer(n_features=8).places.shape == (12, 8)


# ---------------------------------------------------------------- the planted grammar


def test_codes_follow_the_planted_motifs_and_reconstruct(learnt, grammar):
    unlabelled, _, test = grammar
    codes = learnt.codes(test.X)
    share = np.bincount(codes.ravel(), minlength=16) / codes.size
    assert np.exp(-(share[share > 0] * np.log(share[share > 0])).sum()) >= 4
    assert normalized_mutual_info_score(codes.ravel(), test.motifs.ravel()) >= 0.45
    patches = learnt.patches(tensor(test.X)).numpy()
    mean = learnt.patches(tensor(unlabelled.X)).numpy().mean((0, 1, 2))
    assert np.square(learnt.decode(codes) - patches).mean() < 0.9 * np.square(mean - patches).mean()
    losses = learnt.history.parts
    assert losses["reconstruction"][-1] < losses["reconstruction"][0]


def test_pairs_of_codes_tell_the_class_and_single_ones_do_not(learnt, grammar):
    _, train, test = grammar
    auc = {
        n: roc_auc_score(test.y, CodeNgramNB(learnt, n).fit(train.X, train.y).decision_function(test.X)) for n in (1, 2)
    }
    assert auc[2] >= 0.85
    assert 0.3 <= auc[1] <= 0.7
    bayes = CodeNgramNB(learnt, 2).fit(train.X, train.y)
    found = bayes.explain(test.X, 1).values[test.y == 1]
    planted = test.planted[test.y == 1]
    top = found.reshape(len(found), -1).argmax(1)
    assert planted.reshape(len(found), -1)[np.arange(len(found)), top].mean() >= 0.7


def test_decoded_pairs_have_the_planted_frequencies(learnt, grammar):
    _, train, test = grammar
    bayes = CodeNgramNB(learnt, 2).fit(train.X, train.y)
    best = bayes.ngram_table().loc[0, "ngram"]
    first, second = bayes.decoded(test.X, best)
    near = {f: np.abs(learnt.frequencies - f) <= 1 for f in (3, 25)}
    assert (first - second)[near[25]].mean() > 0 > (first - second)[near[3]].mean()
    places = bayes.occurrences(test.X, best)
    codes, far = learnt.codes(test.X), learnt.distances(test.X)
    assert all(tuple(codes[w, c, p : p + 2]) == best for w, c, p in places)
    total = [far[w, c, p : p + 2].sum() for w, c, p in places]
    assert total == sorted(total)


# ---------------------------------------------------------------- n-grams


def hand_codes(n=30, seed=0):
    g = np.random.default_rng(seed)
    codes = g.integers(0, 3, (n, 2, 5))
    y = np.arange(n) % 2
    codes[y == 1, 0, :2] = [2, 1]
    return codes, y


@pytest.mark.parametrize("n", [1, 2, 3])
def test_log_odds_and_relevance_by_hand(n):
    codes, y = hand_codes()
    bayes = CodeNgramNB(n=n).fit(codes, y)
    count = [Counter(), Counter()]
    for window, label in zip(codes.tolist(), y, strict=True):
        for channel in window:
            for k in range(5 - n + 1):
                count[label][tuple(channel[k : k + n])] += 1
    seen = sorted(set(count[0]) | set(count[1]))
    assert [tuple(g) for g in bayes.ngrams_.tolist()] == seen
    p = [{g: (c[g] + 1) / (sum(c.values()) + len(seen)) for g in seen} for c in count]
    w = {g: np.log(p[1][g] / p[0][g]) for g in seen}
    np.testing.assert_allclose(bayes.log_odds_[1], [w[g] for g in seen])
    np.testing.assert_allclose(bayes.log_odds_[0], [-w[g] for g in seen])
    expected = np.zeros(codes.shape)
    for i, j, k in np.ndindex(30, 2, 5 - n + 1):
        expected[i, j, k : k + n] += w[tuple(codes[i, j, k : k + n].tolist())]
    found = bayes.explain(codes, 1)
    assert found.dims == ("example", "channel", "patch")
    np.testing.assert_allclose(found.values, expected)
    np.testing.assert_allclose(bayes.explain(codes, 0).values, -expected)
    table = bayes.ngram_table()
    assert table["ngram"][0] == max(seen, key=lambda g: w[g])
    np.testing.assert_allclose(table["log_odds"], sorted(w.values(), reverse=True))
    assert [count[1][g] for g in table["ngram"]] == table["seen"].tolist()
    assert [count[0][g] for g in table["ngram"]] == table["elsewhere"].tolist()


def test_probabilities_are_those_of_multinomial_naive_bayes_on_counts():
    codes, y = hand_codes()
    other, _ = hand_codes(seed=1)
    bayes = CodeNgramNB(n=1).fit(codes, y)
    dense = [np.stack([np.bincount(w.ravel(), minlength=3) for w in c]) for c in (codes, other)]
    peer = MultinomialNB().fit(dense[0], y)
    np.testing.assert_allclose(bayes.predict_proba(other), peer.predict_proba(dense[1]))
    joint = peer.predict_joint_log_proba(dense[1])
    np.testing.assert_allclose(bayes.decision_function(other), joint[:, 1] - joint[:, 0])
    assert np.array_equal(bayes.predict(other), peer.predict(dense[1]))


def test_sequences_do_not_cross_channels_and_unseen_ones_say_nothing():
    codes, y = hand_codes()
    bayes = CodeNgramNB(n=2).fit(codes, y)
    other = np.full((1, 2, 5), 9)
    np.testing.assert_array_equal(bayes.explain(other, 1).values, np.zeros((1, 2, 5)))
    assert bayes.decision_function(other)[0] == pytest.approx(0.0)  # as many windows of both classes
    swapped = codes[:, ::-1]
    np.testing.assert_allclose(bayes.explain(swapped, 1).values, bayes.explain(codes, 1).values[:, ::-1])
    assert ngrams(codes, 2).shape == (30, 2, 4)


def test_three_classes_are_each_weighed_against_the_others():
    codes, _ = hand_codes()
    y = np.array(["a", "b", "c"])[np.arange(30) % 3]
    codes[y == "c", 1, 2] = 7
    bayes = CodeNgramNB(n=1).fit(codes, y)
    assert bayes.ngram_table("c").loc[0, "ngram"] == (7,)
    assert bayes.decision_function(codes).shape == (30, 3)
    found = bayes.explain(codes)
    assert found["target"].values.tolist() == bayes.predict(codes).tolist()
    with pytest.raises(InputError, match="label must be given"):
        bayes.ngram_table()


def test_an_estimator_like_others(grammar, learnt):
    codes, y = hand_codes()
    bayes = CodeNgramNB(n=2)
    with pytest.raises(NotFittedError):
        bayes.predict(codes)
    before = codes.copy()
    assert bayes.fit(codes, y) is bayes
    assert np.array_equal(codes, before)
    assert not hasattr(clone(bayes), "classes_")
    assert cross_val_score(CodeNgramNB(n=2), *hand_codes(150), cv=3, scoring="roc_auc").mean() > 0.7
    copy = clone(CodeNgramNB(learnt, 2)).fit(grammar[1].X, grammar[1].y)
    assert copy.model is not learnt
    assert np.array_equal(
        copy.predict(grammar[2].X), CodeNgramNB(learnt).fit(grammar[1].X, grammar[1].y).predict(grammar[2].X)
    )


# ---------------------------------------------------------------- classifier


def louder(n=24, seed=0):
    X, y = white(n, 3, 120, seed), np.arange(n) % 2
    X[y == 1, 0] *= 3
    return X, y


TINY = {
    "patch": 20,
    "sampling_rate": 60.0,
    "n_features": 8,
    "n_layers": 1,
    "n_decoder_layers": 1,
    "n_heads": 2,
    "n_codes": 8,
}


def classifier(mode="finetune", **options):
    given = {
        "model": TINY,
        "moments": True,
        "epochs": 10,
        "pretrain_epochs": 2,
        "learning_rate": 1e-2,
        "progress": False,
    }
    return EEGFormerClassifier(mode=mode, **(given | options))


@pytest.mark.parametrize(
    ("mode", "pool", "least"),
    [("probe", "mean", 0.9), ("probe", "concat", 0.9), ("finetune", "mean", 0.7), ("scratch", "concat", 0.7)],
)
def test_loud_windows_are_told_by_the_moments_only(mode, pool, least):
    """Loudness is not in the patches. Trained on 160 windows of noise, an encoder also learns these by heart."""
    X, y = louder(160)
    test, labels = louder(80, seed=1)
    found = classifier(mode, pool=pool, learning_rate=1e-2).fit(X, np.array(["quiet", "loud"])[y])
    assert (found.predict(test) == np.array(["quiet", "loud"])[labels]).mean() >= least
    p = found.predict_proba(test)
    np.testing.assert_allclose(p.sum(1), 1.0)
    np.testing.assert_allclose(np.log(p[:, 1] / p[:, 0]), found.decision_function(test), atol=1e-4)
    assert roc_auc_score(labels, classifier(mode, pool=pool, moments=False).fit(X, y).decision_function(test)) < 0.65


def test_a_probe_leaves_the_encoder_as_it_was_and_is_the_optimum(learnt, grammar):
    _, train, test = grammar
    before = {k: v.clone() for k, v in learnt.state_dict().items()}
    probe = EEGFormerClassifier(learnt, "probe", progress=False).fit(train.X, train.y)
    assert probe.model_ is not learnt
    for k, v in learnt.state_dict().items():
        assert torch.equal(v, before[k])
        assert torch.equal(probe.model_.state_dict()[k], before[k])
    h = learnt.encode(tensor(train.X)).detach().numpy().astype(np.float64).mean((1, 2))
    from sklearn.linear_model import LogisticRegression

    z = (h - h.mean(0)) / h.std(0)
    peer = LogisticRegression(max_iter=1000).fit(z, train.y)
    t = (learnt.encode(tensor(test.X)).detach().numpy().mean((1, 2)) - h.mean(0)) / h.std(0)
    np.testing.assert_allclose(probe.decision_function(test.X), peer.decision_function(t), atol=2e-2)
    quantised = EEGFormerClassifier(learnt, "probe", quantised=True, progress=False).fit(train.X, train.y)
    expected = learnt.quantizer.vectors.detach().numpy()[learnt.codes(train.X)].mean((1, 2))
    np.testing.assert_allclose(quantised.network_.features(tensor(train.X)).detach(), expected, atol=1e-5)


def test_fine_tuning_starts_from_the_model_and_scratch_from_nothing(learnt, grammar):
    _, train, _ = grammar
    slow = {"epochs": 1, "learning_rate": 1e-9, "progress": False}
    tuned = EEGFormerClassifier(learnt, "finetune", **slow).fit(train.X, train.y)
    fresh = EEGFormerClassifier(learnt, "scratch", **slow).fit(train.X, train.y)
    weight = learnt.embed.weight.detach()
    np.testing.assert_allclose(tuned.model_.embed.weight.detach(), weight, atol=1e-6)
    assert not torch.allclose(fresh.model_.embed.weight, weight, atol=1e-2)
    faster = EEGFormerClassifier(learnt, "finetune", **(slow | {"learning_rate": 1e-3})).fit(train.X, train.y)
    assert not torch.allclose(faster.model_.embed.weight, weight, atol=1e-6)
    assert torch.equal(faster.model_.out.weight, learnt.out.weight)


def test_pretraining_apart_is_what_fit_begins_with():
    X, y = louder()
    one = classifier("probe").pretrain(X)
    assert one.pretrained_.pretrained
    weights = one.pretrained_.embed.weight.clone()
    one.fit(X, y)
    assert torch.equal(one.model_.embed.weight, weights)
    both = classifier("probe").fit(X, y)  # on the windows of fit, without a call of pretrain
    np.testing.assert_array_equal(one.decision_function(X), both.decision_function(X))
    assert not hasattr(clone(one), "pretrained_")


def test_it_is_explained_as_any_network(learnt, grammar):
    _, train, test = grammar
    found = EEGFormerClassifier(learnt, "probe", progress=False).fit(train.X, train.y)
    network = Network(found.network_, dims=("channel", "time"))
    scores = IntegratedGradients(steps=200).attribute(network, test.X[:2].astype(np.float32), 1)
    assert scores.dims == ("example", "channel", "time")
    assert scores.shape == (2, 4, 600)
    assert float(np.abs(scores.values).sum()) > 0


@pytest.mark.parametrize("options", [{"domain": "time"}, {"domain": "patch-fft", "log": False}])
def test_integrated_gradients_are_complete_from_noise_to_the_window(options):
    """A silent window is no smooth baseline of a normalisation, so the path goes from another window."""
    model = made(120, **TINY, **options).double()
    from nissl.recordings.eeg.eegformer import EEGFormerNetwork

    network = EEGFormerNetwork(model, 3, 2).double().eval()
    a, b = (torch.from_numpy(louder(1, seed=s)[0]) for s in (0, 1))
    steps = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    path = (a + steps[:, None, None] * (b - a)).requires_grad_()
    network(path)[:, 1].sum().backward()
    total = float((path.grad.mean(0) * (b - a)[0]).sum())
    with torch.no_grad():
        change = float(network(b)[0, 1] - network(a)[0, 1])
    assert total == pytest.approx(change, rel=0.02, abs=1e-4)


# ---------------------------------------------------------------- windows


def test_a_recording_is_resampled_and_cut():
    t = np.arange(5000) / 500
    x = np.stack([np.sin(2 * np.pi * 4 * t), np.cos(2 * np.pi * 7 * t)])
    recording = xr.DataArray(
        x, dims=("channel", "time"), coords={"channel": ["C3", "C4"]}, attrs={"sampling_rate": 500.0}
    )
    found = windows_of(recording.transpose("time", "channel"), seconds=3, step=2)
    assert found.dims == ("trial", "channel", "time")
    assert found.shape == (4, 2, 750)
    assert found["channel"].values.tolist() == ["C3", "C4"]
    assert found["start"].values.tolist() == [0, 2, 4, 6]
    assert found.attrs["sampling_rate"] == 250
    u = 2 + np.arange(750) / 250
    np.testing.assert_allclose(found.values[1, 0], np.sin(2 * np.pi * 4 * u), atol=0.01)
    same = windows_of(x, seconds=3, sampling_rate=500, rate=500)
    np.testing.assert_array_equal(same.values[1], x[:, 1500:3000])


# ---------------------------------------------------------------- pictures


def test_pictures(learnt, grammar):
    _, train, test = grammar
    bayes = CodeNgramNB(learnt, 2).fit(train.X, train.y)
    figure = plot_codes(bayes, xr.DataArray(test.X[1], dims=("channel", "time"), coords={"channel": list("abcd")}))
    ax = figure.axes[0]
    assert len(ax.patches) == 24
    assert [t.get_text() for t in ax.get_yticklabels()] == list("abcd")
    codes = learnt.codes(test.X[1:2])[0]
    assert [t.get_text() for t in ax.texts] == [str(c) for c in codes.ravel()]
    figure = plot_ngrams(bayes, test.X, top=2)
    assert len(figure.axes) == 4
    best = bayes.ngram_table().loc[0, "ngram"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), bayes.decoded(test.X, best)[0])


def test_codes_without_time_are_not_drawn_on_a_time_axis():
    model = made(domain="fft")
    X, y = white(20), np.arange(20) % 2
    model.pretrain(X, epochs=1, progress=False)
    bayes = CodeNgramNB(model, 1).fit(X, y)
    assert bayes.predict(X).shape == (20,)
    for refused in (lambda: bayes.explain(X), lambda: plot_codes(bayes, X[0])):
        with pytest.raises(InputError, match="no place in time"):
            refused()


# ---------------------------------------------------------------- what cannot be done


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_times": 1}, "n_times"),
        ({"n_times": 99}, "hold no patch of 100"),
        ({"n_times": 60, "domain": "fft"}, "hold no patch of 50"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"domain": "wavelet"}, "domain"),
        ({"size": "huge"}, "size"),
        ({"patch": 0}, "patch"),
        ({"stride": 0}, "stride"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"band": (20.0, 10.0)}, "band"),
        ({"band": (60.0, 70.0)}, "no frequency"),
        ({"domain": "time", "band": (1.0, 10.0)}, "spectra"),
        ({"n_features": 15}, "n_heads"),
        ({"n_codes": 1}, "n_codes"),
        ({"update": "newton"}, "update"),
    ],
)
def test_parameters_that_make_no_model(options, match):
    with pytest.raises((InputError, TypeError), match=match):
        EEGFormer(**({"n_times": 600} | SMALL | options))


def test_windows_that_do_not_fit_the_model():
    model = made()
    wrong = white()
    wrong[1, 0, 3] = np.inf
    for X, match in ((white(t=500), "600"), (white()[0], "shape"), (wrong, "infinity"), (1e300 * white(), "too large")):
        with pytest.raises(InputError, match=match):
            model.codes(X)
    with pytest.raises(InputError, match="patches"):
        model.decode(np.zeros((1, 2, 5), dtype=int))
    with pytest.raises(InputError, match="0 to 7"):
        model.decode(np.full((1, 2, 6), 8))
    with pytest.raises(InputError, match="samples, no frequencies"):
        _ = made(domain="time").frequencies


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "tune"}, "mode"),
        ({"pool": "max"}, "pool"),
        ({"quantised": True}, "probe"),
        ({"C": 0.0, "mode": "probe"}, "C must"),
        ({"model": {"n_time": 3}}, "no parameters of EEGFormer"),
        ({"model": {"n_times": 60} | TINY}, "the model takes 60"),
        ({"epochs": 0, "mode": "scratch"}, "epochs"),
        ({"random_state": -1}, "random_state"),
    ],
)
def test_parameters_that_make_no_classifier(options, match):
    with pytest.raises(InputError, match=match):
        classifier(**options).fit(*louder())


def test_labels_and_channels_that_do_not_fit():
    X, y = louder()
    with pytest.raises(InputError, match="one class only"):
        classifier().fit(X, np.zeros(24))
    with pytest.raises(InputError, match="one label for each"):
        classifier().fit(X, y[:-1])
    with pytest.raises(NotFittedError):
        classifier().predict(X)
    with pytest.raises(InputError, match="2 channels"):
        classifier("probe").fit(X, y).predict(X[:, :2])


def test_codes_that_are_none():
    codes, y = hand_codes()
    for bad, match in (
        (codes + 0.5, "whole numbers"),
        (codes - 1, "whole numbers"),
        (codes[0], "shape"),
        (codes * 2**20, "whole"),
    ):
        with pytest.raises(InputError, match=match):
            as_codes(bad)
    for n, match in ((0, "n must"), (4, "1, 2 or 3")):
        with pytest.raises(InputError, match=match):
            CodeNgramNB(n=n).fit(codes, y)
    with pytest.raises(InputError, match="no sequence of 3"):
        CodeNgramNB(n=3).fit(codes[:, :, :2], y)
    with pytest.raises(InputError, match="not pretrained"):
        CodeNgramNB(made()).fit(white(4), [0, 1, 0, 1])
    bayes = CodeNgramNB(n=2).fit(codes, y)
    with pytest.raises(InputError, match="channels"):
        bayes.predict(codes[:, :1])
    with pytest.raises(InputError, match="no class of fit"):
        bayes.explain(codes, 5)
    with pytest.raises(InputError, match="2 codes"):
        bayes.occurrences(codes, (1, 2, 0))
    with pytest.raises(InputError, match="without a model"):
        bayes.decoded(codes, (1, 2))
    for picture in (lambda: plot_codes(bayes, codes[0]), lambda: plot_ngrams(bayes, codes)):
        with pytest.raises(InputError, match="without a model"):
            picture()


def test_recordings_that_hold_no_window():
    x = np.zeros((2, 100))
    for options, match in (({"sampling_rate": 50.0}, "no window"), ({"sampling_rate": -1.0}, "sampling_rate"),
                           ({"sampling_rate": 50.0, "seconds": 0.0}, "seconds"), ({}, "sampling_rate"),
                           ({"sampling_rate": 50.0, "seconds": 1.0, "step": 0.0}, "step")):  # fmt: skip
        with pytest.raises(InputError, match=match), warnings.catch_warnings():
            windows_of(x, **options)
