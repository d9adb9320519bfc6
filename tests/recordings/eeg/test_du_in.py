"""Du-IN: identities of its parts, what a hidden patch may not show, several subjects, resuming after a kill, bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import mne
import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch.nn import functional as F

from nissl.attribution import IntegratedGradients
from nissl.errors import InputError, RunFolderError
from nissl.network import Network
from nissl.recordings.eeg.du_in import (
    DuIN,
    DuINClassifier,
    DuINMasked,
    DuINTokenizer,
    RegionEncoder,
    RegionFusion,
    Stage,
    plot_units,
)
from nissl.seeds import seeded

SMALL = {"patch": 10, "n_regions": 3, "filters": (4, 4), "kernels": (3, 3), "strides": (2, 1), "n_layers": 1, "n_heads": 2,
         "head_features": 4, "dropout": 0.1}  # fmt: skip
SHORT = Stage(2, 1, 8, 1e-2, 1e-3, 0.01)


def small(variant: str = "mae", **other: object) -> DuIN:
    stages = {"tokenizer": SHORT, "masked": SHORT, "classifier": SHORT}
    options = SMALL | stages | {"decoder_layers": 1, "n_codes": 6, "code_features": 4, "progress": False} | other
    return DuIN(variant, **options)  # type: ignore[arg-type]


def encoder(n_channels: int = 2, **other: object) -> RegionEncoder:
    with seeded(0):
        return RegionEncoder(n_channels, **(SMALL | other)).eval()  # type: ignore[arg-type]


def tokenizer(n_channels: int = 2, **other: object) -> DuINTokenizer:
    body = encoder(n_channels, **other)
    with seeded(1):
        options = {"n_codes": 6, "code_features": 4, "decoder_layers": 1, "n_heads": 2, "head_features": 4}
        return DuINTokenizer(body, **options).eval()  # type: ignore[arg-type]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def trials() -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(0)
    y = np.array(["left", "right"])[np.arange(16) % 2]
    X = g.standard_normal((16, 2, 40))
    X[y == "right", 0] += 3 * np.sin(np.arange(40))
    return X, y


# ---------------------------------------------------------------- parts


def test_channels_are_standardised_by_subject_and_mixed():
    x = 5 * noise(6, 3, 50) + torch.tensor([1.0, -2.0, 7.0])[:, None]
    whose = torch.tensor([0, 1, 0, 1, 1, 0])
    x[whose == 1, 2] = 4.0  # flat: absent
    fusion = RegionFusion(3, 2, 2)
    fusion.measure(x, whose)
    assert fusion.present.tolist() == [[True, True, True], [True, True, False]]
    z = fusion.standardise(x, whose)
    for s in (0, 1):
        own = z[whose == s].transpose(0, 1).flatten(1).double().numpy()
        assert np.allclose(own.mean(1), 0, atol=1e-5)
        assert np.allclose(own.std(1), [1, 1, 1 - s], atol=1e-5)
    with torch.no_grad():
        fusion.bias[1].copy_(torch.tensor([0.5, -0.5]))
        found = fusion(x, whose)
    W = fusion.weight.detach().numpy()
    for i, s in enumerate(whose.tolist()):
        expected = W[s].T @ z[i].numpy() + (np.array([[0.5], [-0.5]]) if s else 0)
        assert np.allclose(found[i].numpy(), expected, atol=1e-6)
    assert np.allclose(fusion.channel_weights().numpy(), np.abs(W).mean(2) * [[1, 1, 1], [1, 1, 0]])


def test_more_subjects_leave_the_first_as_they_are():
    x = noise(4, 3, 50)
    fusion = RegionFusion(3, 2)
    fusion.measure(x, torch.zeros(4, dtype=torch.int64))
    first, before = fusion(x, torch.zeros(4, dtype=torch.int64)), fusion.weight[0].clone()
    fusion.extend(1)
    fusion.measure(10 * x + 3, torch.ones(4, dtype=torch.int64), first=1)
    assert torch.equal(fusion(x, torch.zeros(4, dtype=torch.int64)), first)
    assert torch.equal(fusion.weight[0], before)
    assert torch.allclose(fusion.scale[1], 10 * fusion.scale[0])
    assert torch.allclose(fusion.standardise(10 * x + 3, torch.ones(4, dtype=torch.int64)),
                          fusion.standardise(x, torch.zeros(4, dtype=torch.int64)), atol=1e-5)  # fmt: skip


def test_a_patch_is_convolved_alone():
    body, x = encoder(), noise(2, 2, 40)
    whole = body.tokens(x)
    assert whole.shape == (2, 4, 20)
    alone = torch.stack([body.tokens(x[..., k * 10 : k * 10 + 10])[:, 0] for k in range(4)], 1)
    assert torch.allclose(whole, alone, atol=1e-6)
    assert not torch.allclose(body(x)[:, 0], body(torch.cat([x[..., :10], 0 * x[..., 10:]], 2))[:, 0], atol=1e-3)


def test_tokens_are_the_convolutions_written_out():
    body, x = encoder(kernels=(5, 3)), noise(1, 2, 20)
    region = (body.fusion.weight[0].detach().T @ x[0]).numpy().astype(float)
    first, norm, second, norm2 = body.convolutions
    for k in range(2):
        h = region[:, k * 10 : k * 10 + 10]
        for conv, bn, width, stride in ((first, norm, 5, 2), (second, norm2, 3, 1)):
            w, b = (v.detach().numpy().astype(float) for v in (conv.weight, conv.bias))
            padded = np.pad(h, ((0, 0), (width // 2, width // 2)))
            steps = range(0, h.shape[1], stride)
            h = np.stack([(w * padded[:, t : t + width]).sum((1, 2)) + b for t in steps], 1) / np.sqrt(1 + bn.eps)
        assert np.allclose(body.tokens(x)[0, k].detach().numpy(), h.ravel(), atol=1e-5)


@pytest.mark.parametrize(("patch", "kernels", "strides"), [
    (10, (3, 3), (2, 1)), (20, (19, 3, 3), (10, 1, 1)), (12, (3, 5), (2, 3)), (8, (1, 1), (8, 1)), (4, (7,), (1,)),
])  # fmt: skip
def test_the_decoder_gives_back_as_many_samples(patch, kernels, strides):
    coder = tokenizer(patch=patch, kernels=kernels, strides=strides, filters=(4,) * len(kernels))
    x = noise(2, 2, 3 * patch)
    assert coder.decode(coder.quantise(x).values).shape == x.shape


def test_the_gradient_of_the_decoder_goes_straight_through_the_codebook():
    coder, h = tokenizer(), noise(2, 4, 4).requires_grad_()
    found = coder.quantizer(h)
    coder.decode(found.values).square().sum().backward()
    v = coder.quantizer.decode(found.codes).requires_grad_()
    (expected,) = torch.autograd.grad(coder.decode(v).square().sum(), v)
    unit = F.normalize(h.detach(), dim=-1)
    # through the normalisation: (I - u uᵀ) g / |h|
    tangent = (expected - (expected * unit).sum(-1, keepdim=True) * unit) / h.detach().norm(dim=-1, keepdim=True)
    assert h.grad is not None
    assert torch.allclose(h.grad, tangent, atol=1e-5)


def test_the_loss_is_over_the_channels_that_are_there():
    coder, x = tokenizer(3, n_subjects=2), noise(2, 3, 40)
    whose = torch.tensor([0, 1])
    coder.encoder.fusion.present[1, 2] = False
    found = coder.loss(x, whose)
    z = coder.encoder.fusion.standardise(x, whose)
    with torch.no_grad():
        wrong = (coder.decode(coder.quantise(x, whose).values, whose) - z).square().mean(2).numpy()
    assert found["reconstruction"].item() == pytest.approx(wrong.ravel()[:5].mean(), rel=1e-5)
    x[1, 2] = 100.0
    assert coder.loss(x, whose)["reconstruction"].item() == found["reconstruction"].item()


def test_each_patch_is_hidden_once():
    model = DuINMasked(encoder(), 6)
    g = torch.Generator().manual_seed(0)
    hidden = model.draw(50, 6, g)
    assert (hidden.sum(1) == 3).all()
    assert (hidden.int() + (~hidden).int() == 1).all()
    assert len({tuple(r) for r in hidden.tolist()}) > 10
    assert (DuINMasked(encoder(), 6, 0.01).draw(9, 6, g).sum(1) == 1).all()
    assert (DuINMasked(encoder(), 6, 0.99).draw(9, 6, g).sum(1) == 5).all()


def test_a_hidden_patch_does_not_tell_its_code():
    model, x = DuINMasked(encoder(), 6).eval(), noise(1, 2, 40)
    hidden = torch.tensor([[True, False, True, False]])
    other = x.clone()
    other[..., 20:30] = noise(1, 2, 10, seed=9)  # patch 2
    before, after = model.logits(x, hidden), model.logits(other, hidden)
    assert torch.equal(before[:, [0, 2]], after[:, [0, 2]])  # hidden together with patch 2
    assert not torch.allclose(before[:, [1, 3]], after[:, [1, 3]], atol=1e-4)  # these saw it
    swapped = model.logits(x, ~hidden)
    assert torch.allclose(before, swapped, atol=1e-6)


def test_the_masked_loss_is_the_cross_entropy_of_every_patch():
    model, x = DuINMasked(encoder(), 6).eval(), noise(3, 2, 40)
    codes = torch.randint(6, (3, 4), generator=torch.Generator().manual_seed(0))
    found = model.loss(x, codes, torch.Generator().manual_seed(5))["cross-entropy"]
    hidden = model.draw(3, 4, torch.Generator().manual_seed(5))
    p = model.logits(x, hidden).softmax(2).detach().numpy()
    expected = -np.log(np.take_along_axis(p, codes.numpy()[..., None], 2)).mean()
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_sigmoid_holds_the_loss_up():
    model = DuINClassifier(encoder(), 4, 5, sigmoid=True)
    with torch.no_grad():
        model.head[2].weight.zero_()
        model.head[2].bias.copy_(torch.tensor([99.0, -99.0, -99.0, -99.0, -99.0]))
    x, y = noise(2, 2, 40), torch.zeros(2, dtype=torch.int64)
    least = np.log(4 + np.e) - 1
    assert model.loss(x, y, torch.Generator())["cross-entropy"].item() == pytest.approx(least, rel=1e-5)
    model.sigmoid = False
    assert model.loss(x, y, torch.Generator())["cross-entropy"].item() < 1e-6


def test_trials_move_by_at_most_the_share_and_the_mean_comes_in():
    model, x = DuINClassifier(encoder(), 4, 2), noise(60, 2, 40)
    model.encoder.fusion.mean.copy_(torch.tensor([[7.0, 8.0]]))
    whose = torch.zeros(60, dtype=torch.int64)
    found = model.moved(x, whose, 0.1, torch.Generator().manual_seed(0)).numpy()
    seen = set()
    for before, after in zip(x.numpy(), found, strict=True):
        fits = []
        for by in range(-40, 41):
            expected = np.tile([[7.0], [8.0]], 40)
            expected[:, max(by, 0) : 40 + min(by, 0)] = before[:, max(-by, 0) : 40 + min(-by, 0)]
            if np.array_equal(expected.astype(np.float32), after):
                fits.append(by)
        assert len(fits) == 1
        seen.update(fits)
    assert seen == set(range(-4, 5))
    assert model.moved(x, whose, 0.0, torch.Generator()) is x


def test_training_the_decoder_leaves_the_codebook():
    model = DuINClassifier(tokenizer(), 4, 2).train()
    before = model.body.quantizer.vectors.clone()
    x = noise(8, 2, 40).requires_grad_()
    model(x).square().sum().backward()
    assert torch.equal(model.body.quantizer.vectors, before)
    assert model.encoder.mixer.training
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# ---------------------------------------------------------------- estimator


def test_stage_two_leaves_stage_one_as_it_is(trials):
    X, _ = trials
    first, both = (small(v).pretrain(X).pretrained_ for v in ("vqvae", "mae"))
    assert first.masked is None
    a, b = first.tokenizer.state_dict(), both.tokenizer.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.allclose(a["quantizer.vectors"].norm(dim=1), torch.ones(6), atol=1e-5)
    again = both.masked
    assert again is not None
    assert not torch.equal(again.encoder.fusion.weight, both.tokenizer.encoder.fusion.weight)
    assert torch.equal(again.encoder.fusion.scale, both.tokenizer.encoder.fusion.scale)


def test_the_variants_start_where_they_say(trials):
    X, y = trials
    base = small().pretrain(X).pretrained_
    assert base.masked is not None
    still = Stage(1, 0, 32, 1e-12, 1e-12, 0.0)  # one step that moves nothing
    starts = {"mae": base.masked.encoder, "vqvae": base.tokenizer.encoder, "vqvae+vq": base.tokenizer.encoder}
    for variant, start in starts.items():
        model = small(variant, pretrained=base, classifier=still).fit(X, y)
        found, expected = dict(model.classifier_.encoder.named_parameters()), dict(start.named_parameters())
        assert all(torch.allclose(found[k], expected[k], atol=1e-9) for k in expected)
        assert isinstance(model.classifier_.body, DuINTokenizer) == (variant == "vqvae+vq")
        assert set(model.history_) == {"tokenizer", "masked", "classifier"}
    plain = small("scratch", pretrained=base, classifier=still).fit(X, y)
    assert not torch.allclose(plain.classifier_.encoder.fusion.weight, base.tokenizer.encoder.fusion.weight, atol=1e-3)
    assert set(plain.history_) == {"classifier"}
    with pytest.raises(NotFittedError, match="no codes"):
        plain.codes(X)


def test_a_copy_keeps_what_was_pretrained_and_fit_leaves_it_alone(trials):
    X, y = trials
    base = small().pretrain(X).pretrained_
    before = {k: v.clone() for k, v in base.tokenizer.state_dict().items()}
    one = small(pretrained=base).fit(X, y)
    two = clone(one).fit(X, y)
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))
    assert np.array_equal(one.codes(X), two.codes(X))
    assert all(torch.equal(v, before[k]) for k, v in base.tokenizer.state_dict().items())
    direct = small().pretrain(X).fit(X, y)
    assert np.array_equal(direct.predict_proba(X), one.predict_proba(X))


def test_what_is_read_of_codes_is_what_the_modules_say(trials):
    X, _ = trials
    model = small().pretrain(1e-6 * X)  # volts
    codes, units = model.codes(1e-6 * X), model.units(1e-6 * X)
    assert codes.shape == (16, 4)
    assert units.dims == ("code", "channel", "time")
    z = ((X - X.mean((0, 2), keepdims=True)) / X.std((0, 2), keepdims=True)).reshape(16, 2, 4, 10).transpose(0, 2, 1, 3)
    for unit in units:
        mine = codes == int(unit.code)
        assert int(unit.patches) == mine.sum()
        assert np.allclose(unit, z[mine].mean(0), atol=1e-4)
    assert int(units.patches.sum()) == codes.size
    assert (np.diff(units.patches) <= 0).all()
    made = model.reconstruct(1e-6 * X)
    stage = model.pretrained_.tokenizer
    with torch.no_grad():
        expected = stage.decode(stage.quantise(torch.from_numpy(1e-6 * X).float()).values).numpy()
    assert np.allclose(1e6 * made, expected * X.std((0, 2), keepdims=True) + X.mean((0, 2), keepdims=True), atol=1e-4)
    hidden = model.masked_codes(1e-6 * X)
    assert hidden.shape == codes.shape
    assert np.array_equal(hidden, model.masked_codes(1e-6 * X))
    weights = model.channel_weights()
    assert model.pretrained_.masked is not None
    W = model.pretrained_.masked.encoder.fusion.weight.detach().numpy()
    assert np.allclose(weights, np.abs(W).mean(2))


def test_subjects_have_channels_of_their_own_and_new_ones_may_come():
    g = np.random.default_rng(0)
    X = g.standard_normal((24, 3, 40))
    whose = np.array(["b"] * 14 + ["a"] * 10)
    X[whose == "a", 2] = 0  # the second subject has two channels
    y = np.arange(24) % 2
    X[y == 1, 0] += 3 * np.sin(np.arange(40))
    array = xr.DataArray(X, dims=("trial", "channel", "time"), coords={"channel": ["x", "y", "z"]})
    model = small(classifier=Stage(6, 1, 8, 1e-2, 1e-3, 0.01)).pretrain(array, subject=whose)
    weights = model.channel_weights()
    assert weights.subject.values.tolist() == ["a", "b"]
    assert weights.channel.values.tolist() == ["x", "y", "z"]
    assert weights.sel(subject="a", channel="z") == 0
    assert (weights.sel(subject="b") > 0).all()
    assert model.reconstruct(X, whose)[whose == "a", 2].any() == False  # noqa: E712
    new = np.where(whose == "b", "c", "a")
    model.fit(X, y, subject=new)
    assert model.subjects_.tolist() == ["a", "b", "c"]
    assert model.channel_weights().shape == (3, 3)
    p = model.predict_proba(X, new)
    assert p.shape == (24, 2)
    assert np.allclose(p.sum(1), 1)
    with pytest.raises(InputError, match="subject 'd' is unknown"):
        model.predict(X, ["d"] * 24)
    with pytest.raises(InputError, match="whose trials"):
        model.predict(X)
    with pytest.raises(InputError, match="subject 'c' is unknown"):
        model.codes(X, new)
    with pytest.raises(InputError, match="whose trials"):
        small(pretrained=model.pretrained_).fit(X, y)


def test_pretraining_sees_subjects_equally_often_and_pieces_of_long_segments(monkeypatch):
    seen = {}

    def caught(self, stage, model, data, loss, validate, told):
        rows = data[0]
        g = torch.Generator().manual_seed(0)
        seen[stage] = rows, loss((rows,), g)

    monkeypatch.setattr(DuIN, "_train", caught)
    X = np.random.default_rng(0).standard_normal((5, 2, 97))
    small(crop=30).pretrain(X, subject=[0, 0, 0, 0, 1])
    rows = seen["tokenizer"][0].numpy()
    assert np.bincount(rows).tolist() == [3, 3, 3, 3, 12]
    assert torch.isfinite(seen["masked"][1]["cross-entropy"])


KILLED = """
import os, signal, sys
import numpy as np
sys.path.insert(0, {tests!r})
from test_du_in import small
from nissl.recordings.eeg import du_in
calls, loss = [], {module}.loss
def dying(self, *a, **k):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(self, *a, **k)
{module}.loss = dying
small(tokenizer=du_in.Stage(5, 1, 8, 1e-2, 1e-3, 0.01), folder={folder!r}).pretrain(np.load({data!r}))
"""


@pytest.mark.parametrize("module", ["DuINTokenizer", "DuINMasked"])
def test_a_killed_pretraining_goes_on_with_the_same_curve(module, tmp_path, trials):
    X, _ = trials
    stage = {"DuINTokenizer": "tokenizer", "DuINMasked": "masked"}[module]
    longer = Stage(5, 1, 8, 1e-2, 1e-3, 0.01)
    np.save(tmp_path / "X.npy", X)
    folder = tmp_path / "run"
    script = KILLED.format(
        tests=str(Path(__file__).parent), module=f"du_in.{module}", folder=str(folder), data=str(tmp_path / "X.npy")
    ).replace("tokenizer=", f"{stage}=")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (folder / stage / "last.ckpt").is_file()
    resumed = small(folder=folder, resume=True, **{stage: longer}).pretrain(X)
    whole = small(**{stage: longer}).pretrain(X)
    for name in ("tokenizer", "masked"):
        assert np.array_equal(resumed.history_[name].losses, whole.history_[name].losses)
    assert len(whole.history_[stage].losses) == 10
    assert np.array_equal(resumed.codes(X), whole.codes(X))
    assert np.array_equal(resumed.masked_codes(X), whole.masked_codes(X))


def test_a_folder_is_of_one_run(tmp_path, trials):
    X, y = trials
    model = small(folder=tmp_path).fit(X, y)
    with pytest.raises(RunFolderError, match="resume"):
        small(folder=tmp_path).fit(X, y)
    again = small(folder=tmp_path, resume=True).fit(X, y)
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    with pytest.raises(RunFolderError, match="other data"):
        small(folder=tmp_path, resume=True).fit(X + 1, y)
    with pytest.raises(RunFolderError, match="other data"):
        small(folder=tmp_path, resume=True, dropout=0.3).fit(X, y)
    with pytest.raises(InputError, match="folder"):
        small(resume=True).fit(X, y)


def test_batch_norm_starts_from_the_signals():
    body, x = encoder(), 5 * noise(12, 2, 40)
    body.calibrate(x)
    assert not body.convolutions[1].training
    tokens = body.tokens(x).detach().unflatten(2, (4, 5))
    assert torch.allclose(
        tokens.var((0, 1, 3)), torch.ones(4), atol=0.35
    )  # but for what eps adds to so small a variance
    again = body.tokens(x).detach().unflatten(2, (4, 5))
    assert torch.equal(tokens, again)


def test_the_decoder_is_a_network_of_the_audit(trials):
    X, y = trials
    model = small("scratch").fit(X, y)
    x = torch.from_numpy(X[:3]).float()
    scores = IntegratedGradients(steps=200).attribute(Network(model.classifier_), x, 1)
    assert scores.dims == ("example", "channel", "time")
    with torch.no_grad():
        gain = (model.classifier_(x) - model.classifier_(0 * x))[:, 1].numpy()
    assert np.allclose(scores.sum(("channel", "time")), gain, atol=2e-3 + 0.01 * np.abs(gain).max())


def test_the_head_says_what_probabilities_are_of(trials):
    X, y = trials
    model = small("scratch", classifier=Stage(12, 1, 8, 2e-2, 1e-3, 0.0), validation=0.0).fit(X, y)
    assert model.classes_.tolist() == ["left", "right"]
    assert (model.predict(X) == y).mean() > 0.9
    with torch.no_grad():
        p = model.classifier_(torch.from_numpy(X).float()).softmax(1).numpy()
    assert np.allclose(model.predict_proba(X), p, atol=1e-6)
    assert model.history_["classifier"].best_epoch is None
    chosen = small("scratch", validation=0.25).fit(X, y)
    assert chosen.history_["classifier"].validation.shape == (2,)


def test_a_picture_of_units(trials):
    X, _ = trials
    model = small().pretrain(xr.DataArray(X, dims=("trial", "channel", "time"), coords={"channel": ["P1", "P2"]}))
    figure = plot_units(model, X, trial=3, sampling_rate=100.0)
    texts = {t.get_text() for ax in figure.get_axes() for t in ax.texts}
    assert {str(c) for c in model.codes(X)[3]} <= texts
    assert figure.get_axes()[0].get_xlabel() == "time (s)"
    widths = [bar.get_width() for bar in figure.get_axes()[1].patches]
    assert np.allclose(widths, model.channel_weights()[0])
    matplotlib.pyplot.close(figure)
    for bad in ({"trial": 16}, {"n_channels": 0}, {"n_codes": 0}, {"sampling_rate": 0.0}):
        with pytest.raises(InputError):
            plot_units(model, X, **bad)


def test_epochs_bring_their_channel_names(trials):
    X, _ = trials
    epochs = mne.EpochsArray(X, mne.create_info(["C3", "C4"], 100.0, "eeg"), verbose="error")
    assert small("vqvae").pretrain(epochs).channel_weights().channel.values.tolist() == ["C3", "C4"]


@pytest.mark.parametrize(("change", "match"), [
    ({"variant": "vae"}, "variant"),
    ({"patch": 0}, "patch"),
    ({"filters": (4, 3)}, "even"),
    ({"strides": (3, 1)}, "strides"),
    ({"kernels": (4, 3)}, "odd"),
    ({"kernels": (3, 3, 3)}, "one length"),
    ({"filters": (4, 0)}, "filters"),
    ({"n_regions": 0}, "n_regions"),
    ({"n_codes": 1}, "n_codes"),
    ({"mask": 1.0}, "hidden"),
    ({"crop": 15}, "crop"),
    ({"crop": 10}, "hidden"),
    ({"crop": 50}, "crop"),
    ({"shift": 1.0}, "shift"),
    ({"validation": -0.1}, "validation"),
    ({"dropout": 1.0}, "dropout"),
    ({"random_state": -1}, "random_state"),
    ({"tokenizer": {"epochs": 3}}, "Stage"),
    ({"masked": Stage(0, 0, 8, 1e-3, 1e-3, 0.0)}, "epochs"),
    ({"pretrained": "a file"}, "Pretrained"),
])  # fmt: skip
def test_parameters_that_cannot_be_are_refused(change, match, trials):
    with pytest.raises(InputError, match=match):
        small().set_params(**change).fit(*trials)


def test_data_that_cannot_be_are_refused(trials):
    X, y = trials
    with pytest.raises(InputError, match="patches of 10: cut them to 30"):
        small().fit(X[..., :37], y)
    with pytest.raises(InputError, match="one class"):
        small().fit(X, np.zeros(16))
    with pytest.raises(InputError, match="'once' has one trial"):
        small().fit(X, np.array(["once", *y[1:]]))
    with pytest.raises(InputError, match="flat"):
        small().fit(np.ones_like(X), y)
    with pytest.raises(InputError, match="flat"):
        small("scratch").fit(np.ones_like(X), y)
    with pytest.raises(InputError, match="shorter"):
        small().pretrain(X[..., :9])
    with pytest.raises(InputError, match="subject"):
        small().pretrain(X, subject=[1, 2])
    with pytest.raises(InputError, match="scratch"):
        small("scratch").pretrain(X)
    with pytest.raises(NotFittedError):
        small().channel_weights()
    base = small("vqvae").pretrain(X).pretrained_
    with pytest.raises(InputError, match="channels"):
        small(pretrained=base).fit(X[:, :1], y)
    with pytest.raises(InputError, match="stage 2"):
        small(pretrained=base).fit(X, y)
    with pytest.raises(InputError, match="architecture"):
        small("vqvae", pretrained=base, n_layers=2).fit(X, y)
    with pytest.raises(InputError, match="samples"):
        small("vqvae").pretrain(X).codes(X[..., :35])
    with pytest.raises(InputError, match="no stage 2"):
        small("vqvae").pretrain(X).masked_codes(X)
