"""Muscle noise: mixing and measures by formula, the gate on known signals, the filter on planted bursts and what it refuses."""

import matplotlib as mpl
import mne
import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

from nissl.attribution import IntegratedGradients
from nissl.errors import InputError, RunFolderError
from nissl.network import Network
from nissl.recordings.eeg import artifacts
from nissl.recordings.eeg.artifacts import (
    Autoencoder,
    EMGFilter,
    PatchTransformer,
    TargetedDenoiser,
    WienerFilter,
    cc,
    local_correlation,
    mix,
    plot_artifacts,
    rrmse_spectrum,
    rrmse_time,
)
from nissl.recordings.simulate import muscle_bursts

mpl.use("Agg")

TINY = {
    "n_times": 256, "channels": (8, 8), "kernel": 7, "n_features": 16, "n_layers": 1, "n_heads": 2, "hidden": 32,
    "epochs": (4, 2, 1), "batch_size": 16, "learning_rate": 5e-3, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return muscle_bursts(200, 256, seed=0)


@pytest.fixture(scope="module")
def fitted(data):
    return EMGFilter(**TINY).fit(data.clean, data.noise)


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize(("convention", "power_db"), [("amplitude10", lambda d: 2 * d), ("power", lambda d: d)])
def test_mixtures_have_the_level_of_their_convention(convention, power_db):
    g = np.random.default_rng(0)
    x, n = g.standard_normal((5, 100)), 3 * g.standard_normal((5, 100))
    levels = np.array([-7.0, -3, 0, 2, 5])
    added = mix(x, n, levels, convention) - x
    found = 10 * np.log10((x**2).mean(1) / (added**2).mean(1))
    assert np.allclose(found, power_db(levels))
    assert np.allclose(added / n, (added / n)[:, :1])


def test_the_noisy_correlation_is_that_of_the_formula():
    g = np.random.default_rng(0)
    x, n = g.standard_normal((300, 2000)), g.standard_normal((300, 2000))
    for level, stated in ((2, 0.846), (-7, 0.196)):
        a = 10 ** (level / 10)
        assert a / np.sqrt(1 + a**2) == pytest.approx(stated, abs=1e-3)
        assert cc(mix(x, n, level), x).mean() == pytest.approx(a / np.sqrt(1 + a**2), abs=0.005)


def test_measures_are_those_written_by_hand():
    g = np.random.default_rng(1)
    a, b = g.standard_normal((2, 3, 64)), g.standard_normal((2, 3, 64)) + 1
    expected = [[np.corrcoef(a[i, j], b[i, j])[0, 1] for j in range(3)] for i in range(2)]
    assert np.allclose(cc(a, b), expected)
    assert np.allclose(cc(5 * a + 2, b), expected)
    assert np.allclose(rrmse_time(a, b)[1, 2], np.linalg.norm(a[1, 2] - b[1, 2]) / np.linalg.norm(b[1, 2]))
    assert np.allclose(rrmse_time(1.5 * b, b), 0.5)
    assert np.allclose(rrmse_spectrum(1.5 * b, b), 1.25)  # a power of 1.5² is off by 1.25
    assert np.allclose(rrmse_spectrum(b[..., ::-1], b), 0, atol=1e-9)  # reversed in time: the same spectrum
    assert np.isnan(cc(np.zeros(8), np.arange(8.0)))


def test_local_correlation_is_pearsons_in_each_window():
    g = np.random.default_rng(2)
    a, b = g.standard_normal((2, 90)) + 50, g.standard_normal((2, 90))
    b[:, 20:60] = a[:, 20:60]
    found = local_correlation(torch.from_numpy(a), torch.from_numpy(b), 16).numpy()
    for t in (0, 3, 30, 47, 89):
        here = slice(max(t - 8, 0), t + 8)
        assert np.allclose(found[:, t], [np.corrcoef(a[i, here], b[i, here])[0, 1] for i in range(2)])
    flat = local_correlation(torch.zeros(1, 40), torch.from_numpy(a[:1, :40]).float(), 16)
    assert torch.equal(flat, torch.zeros(1, 40))


def test_the_wiener_filter_is_the_ratio_of_spectra_and_finds_levels(data):
    known = WienerFilter(-2.0, n_times=256).fit(data.clean, data.noise)
    y = mix(data.clean, data.noise, -2.0)
    scaled = (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
    power = [(np.abs(np.fft.rfft(v / v.std(1, keepdims=True))) ** 2).mean(0) for v in (data.clean, data.noise)]
    gain = power[0] / (power[0] + 10**0.4 * power[1] + 1e-30)
    expected = np.fft.irfft(np.fft.rfft(scaled) * gain) * y.std(1, keepdims=True) + y.mean(1, keepdims=True)
    assert np.abs(known.transform(y) - expected).max() < 1e-3
    assert cc(known.transform(y), data.clean).mean() > cc(y, data.clean).mean() + 0.03


def test_the_blind_wiener_filter_finds_the_level_of_a_spectrum_without_scatter(data):
    told = WienerFilter(-2.0, n_times=256).fit(data.clean, data.noise)
    blind = WienerFilter(n_times=256).fit(data.clean, data.noise)
    power = told.clean_power_ + 10**0.4 * told.noise_power_
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random((4, 129)))
    phase[:, 0], phase[:, -1] = 0, 1
    y = np.fft.irfft(np.sqrt(power) * phase)
    assert np.allclose(blind.transform(y), told.transform(y), atol=0.02 * y.std())
    for level in (-7.0, 2.0):
        y = mix(data.clean, data.noise, level)
        assert cc(blind.transform(y), data.clean).mean() > cc(y, data.clean).mean() + 0.03


# ---------------------------------------------------------------- networks


class HalfRight(nn.Module):
    """Gives back the first half of a segment, and an unrelated wave in the second."""

    def forward(self, y):
        n = y.shape[1] // 2
        wave = torch.sin(torch.arange(n) * 1.7).expand(len(y), n)
        return torch.cat([y[:, :n], wave], 1)


class Sevens(nn.Module):
    """A second stage that can be told by its output."""

    def forward(self, y, coarse, mask):
        return torch.full_like(y, 7.0)


def test_the_second_stage_works_where_the_first_disagrees_and_only_there():
    y = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    denoiser = TargetedDenoiser(HalfRight(), Sevens(), window=32)
    found = denoiser.clean(y)
    assert torch.equal(found.output[:, :90], y[:, :90])
    assert torch.equal(found.share[:, :90], torch.zeros(3, 90))
    assert torch.allclose(found.output[:, 150:], torch.tensor(7.0))
    low = found.correlation < 0.8
    mask = denoiser.mask(found.correlation)
    for row in range(3):  # made wider by 8 samples on both sides
        near = {int(t) + d for t in low[row].nonzero() for d in range(-8, 9)}
        assert mask[row].nonzero()[:, 0].tolist() == sorted(t for t in near if 0 <= t < 256)
    steps = found.share.diff(dim=1).abs().max()
    assert 0 < steps < 0.25  # no jump from one stage to the other


def test_the_segment_gate_decides_for_all_of_a_segment():
    y = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    denoiser = TargetedDenoiser(HalfRight(), Sevens(), gate="segment")
    correlation = denoiser.clean(y).correlation
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(y.numpy(), HalfRight()(y).numpy(), strict=True)]
    assert np.allclose(correlation.numpy(), np.array(expected)[:, None], atol=1e-6)
    assert torch.allclose(denoiser(y), torch.tensor(7.0))
    denoiser.threshold.fill_(0.2)
    assert torch.equal(denoiser(y), HalfRight()(y))


def test_the_transformer_starts_as_no_correction_and_sees_the_whole_segment():
    torch.manual_seed(0)
    transformer = PatchTransformer(n_features=16, n_layers=1, n_heads=2, hidden=32)
    y, coarse, mask = torch.randn(2, 64, requires_grad=True), torch.randn(2, 64), torch.ones(2, 64)
    assert torch.equal(transformer(y, coarse, mask), coarse)
    nn.init.normal_(transformer.out.weight)
    transformer(y, coarse, mask)[:, 0].sum().backward()
    assert y.grad is not None
    assert (y.grad.abs() > 0).all()


def test_the_default_networks_are_within_the_budget_of_parameters():
    autoencoder, transformer = Autoencoder(), PatchTransformer()
    convolutions = [(1, 16), (16, 32), (32, 32), (32, 32), (32, 16), (16, 16)]
    by_hand = sum(a * b * 9 + b + 2 * b for a, b in convolutions) + 16 * 9 + 1
    assert sum(p.numel() for p in autoencoder.parameters()) == by_hand
    assert by_hand + sum(p.numel() for p in transformer.parameters()) <= 200_000
    assert autoencoder(torch.zeros(2, 512)).shape == (2, 512)


# ---------------------------------------------------------------- the filter


def test_bursts_are_removed_and_found(data, fitted):
    fresh = muscle_bursts(80, 256, seed=9)
    y = mix(fresh.clean, fresh.noise, -2.0)
    before, after = cc(y, fresh.clean).mean(), cc(fitted.transform(y), fresh.clean).mean()
    assert after > before + 0.1
    assert rrmse_time(fitted.transform(y), fresh.clean).mean() < rrmse_time(y, fresh.clean).mean() - 0.3
    heat = fitted.noise_map(y).values
    burst = fresh.envelope == 1
    assert heat[burst].mean() > heat[~burst].mean() + 0.05


def test_what_is_learned_is_said(data, fitted):
    assert set(fitted.history_) == {"autoencoder", "transformer", "adversarial"}
    assert set(fitted.history_["adversarial"].parts) == {"squared error", "adversary", "discriminator"}
    assert (
        fitted.history_["autoencoder"].parts["squared error"][-1]
        < fitted.history_["autoencoder"].parts["squared error"][0]
    )
    assert fitted.n_parameters_ == sum(p.numel() for p in fitted.network_.parameters())
    assert fitted.n_discriminator_parameters_ > 0
    assert fitted.threshold_ == artifacts.THRESHOLDS[int(fitted.threshold_curve_.argmax())]
    assert not any(m.training for m in fitted.network_.modules())


def test_the_autoencoder_alone_speaks_where_the_second_stage_does_not(data, fitted):
    y = mix(data.clean[:30], data.noise[:30], 0.0)
    stage = fitted.which_stage(y)
    z = torch.from_numpy((y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)).float()
    coarse = fitted.network_.autoencoder(z).numpy() * y.std(1, keepdims=True) + y.mean(1, keepdims=True)
    same = np.isclose(fitted.transform(y), coarse, atol=1e-5)
    assert stage.any()
    assert same[~stage].all()
    assert not same[stage].all()


def test_units_come_back_and_batches_do_not_matter(data, fitted):
    y = mix(data.clean[:12], data.noise[:12], -2.0)
    found = fitted.transform(y)
    assert np.allclose(fitted.transform(2e-5 * y + 3e-4), 2e-5 * found + 3e-4, atol=1e-10)
    assert np.allclose(fitted.transform(y[:1]), found[:1], atol=1e-5)
    assert np.allclose(fitted.transform(y.reshape(3, 4, 256)), found.reshape(3, 4, 256))
    assert np.allclose(fitted.transform(y[0]), found[0], atol=1e-5)


def test_long_and_short_signals_go_through_windows_without_seams(data, fitted, monkeypatch):
    y = np.concatenate(list(mix(data.clean[:5], data.noise[:5], 0.0)))[:1000]
    found = fitted.transform(y)
    assert found.shape == y.shape
    by_hand, weights = np.zeros(1000), np.zeros(1000)
    for start in (0, 128, 256, 384, 512, 640, 744):
        weight = np.sin(np.pi * (np.arange(256) + 0.5) / 256) ** 2
        by_hand[start : start + 256] += weight * fitted.transform(y[start : start + 256])
        weights[start : start + 256] += weight
    assert np.allclose(found, by_hand / weights, atol=1e-5)
    assert fitted.transform(y[:100]).shape == (100,)
    monkeypatch.setattr(artifacts, "ROWS", 3)
    assert np.allclose(fitted.transform(np.stack([y, y])), found, atol=1e-5)


def test_flat_channels_stay_as_they_are(fitted):
    X = np.full((1, 2, 256), 0.1)  # whose mean is not 0.1
    X[0, 1] += np.random.default_rng(0).standard_normal(256)
    assert np.allclose(fitted.transform(X)[0, 0], 0.1, rtol=1e-12)
    assert (fitted.noise_map(X).values[0, 0] == 0).all()
    assert not fitted.which_stage(X)[0, 0].any()


def test_the_same_seed_gives_the_same_filter_and_data_stay_alone(data):
    clean, noise = data.clean[:40].copy(), data.noise[:30].copy()
    short = {**TINY, "epochs": (1, 1, 1)}
    state = torch.random.get_rng_state()
    one = EMGFilter(**short).fit(clean, noise)
    assert torch.equal(state, torch.random.get_rng_state())
    again = clone(one).fit(clean, noise)
    other = EMGFilter(**short, random_state=1).fit(clean, noise)
    y = mix(data.clean[50:55], data.noise[50:55], 0.0)
    assert np.array_equal(one.transform(y), again.transform(y))
    assert not np.allclose(one.transform(y), other.transform(y))
    assert np.array_equal(clean, data.clean[:40])
    assert np.array_equal(noise, data.noise[:30])


def test_training_and_validation_share_no_trial(data):
    trials = list(np.arange(20.0)[:, None, None] * np.ones((20, 3, 4)))
    train, held = artifacts._split(trials, 0.1, np.random.default_rng(0))
    assert len(train) == 54
    assert len(held) == 6
    assert not set(train.flatten().tolist()) & set(held.flatten().tolist())


def test_a_finished_training_is_read_from_its_folder_and_not_overwritten(data, tmp_path):
    short = {**TINY, "epochs": (1, 1, 1), "folder": tmp_path}
    one = EMGFilter(**short).fit(data.clean[:40], data.noise[:40])
    with pytest.raises(RunFolderError, match="resume"):
        EMGFilter(**short).fit(data.clean[:40], data.noise[:40])
    again = EMGFilter(**short, resume=True).fit(data.clean[:40], data.noise[:40])
    assert np.array_equal(one.transform(data.clean[:2]), again.transform(data.clean[:2]))


def test_a_given_autoencoder_and_threshold_are_kept(data, fitted):
    given = fitted.network_.autoencoder
    before = {k: v.clone() for k, v in given.state_dict().items()}
    one = EMGFilter(**{**TINY, "epochs": (1, 1, 0)}, autoencoder=given, threshold=0.5).fit(
        data.clean[:40], data.noise[:40]
    )
    assert set(one.history_) == {"transformer"}
    assert one.threshold_ == 0.5
    assert one.threshold_curve_.size == 0
    after = one.network_.autoencoder.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_a_spectral_loss_is_part_of_the_game(data):
    one = EMGFilter(**{**TINY, "epochs": (1, 1, 1)}, spectral=0.1, gate="segment").fit(data.clean[:40], data.noise[:40])
    assert "spectrum" in one.history_["transformer"].parts


def test_gradients_of_the_autoencoder_can_be_explained(fitted, data):
    network = Network(fitted.network_.autoencoder)
    x = torch.from_numpy(data.clean[:2]).float()
    scores = IntegratedGradients(steps=512).attribute(network, x, lambda out: out[:, 100])
    with torch.no_grad():
        network_out = fitted.network_.autoencoder(torch.cat([x, torch.zeros(1, 256)]))[:, 100]
    assert np.allclose(scores.values.reshape(2, -1).sum(1), (network_out[:2] - network_out[2]).numpy(), atol=0.02)


# ---------------------------------------------------------------- what others bring


def test_mne_objects_are_cleaned_by_their_own_apply_function(data, fitted):
    y = mix(data.clean[:12], data.noise[:12], -2.0).reshape(3, 4, 256) * 1e-5
    info = mne.create_info(4, 256.0, "eeg")
    epochs = mne.EpochsArray(y, info, verbose="error")
    raw = mne.io.RawArray(np.concatenate(list(y), 1), info, verbose="error")
    expected = fitted.transform(y)
    assert np.allclose(fitted.transform(epochs), expected)
    assert np.allclose(fitted.transform(raw), fitted.transform(raw.get_data()))
    for channel_wise in (False, True):
        changed = epochs.copy().apply_function(fitted.transform, channel_wise=channel_wise, verbose="error")
        assert np.allclose(changed.get_data(), expected, atol=1e-10)
        changed = raw.copy().apply_function(fitted.transform, channel_wise=channel_wise, verbose="error")
        assert np.allclose(changed.get_data(), fitted.transform(raw), atol=1e-10)
    wrong = mne.io.RawArray(raw.get_data(), mne.create_info(4, 128.0, "eeg"), verbose="error")
    with pytest.raises(InputError, match="128 Hz"):
        fitted.transform(wrong)


def test_data_arrays_are_taken_and_their_rate_is_looked_at(data, fitted):
    y = mix(data.clean[:6], data.noise[:6], -2.0).reshape(2, 3, 256)
    array = xr.DataArray(y, dims=("trial", "channel", "time"), attrs={"sampling_rate": 256.0})
    assert np.array_equal(fitted.transform(array.transpose("time", "trial", "channel")), fitted.transform(y))
    assert np.array_equal(fitted.transform(array[0]), fitted.transform(y[0]))
    with pytest.raises(InputError, match="500 Hz"):
        fitted.transform(array.assign_attrs(sampling_rate=500.0))
    with pytest.raises(InputError, match="time"):
        fitted.transform(array[0].transpose("time", "channel"))
    heat = fitted.noise_map(y)
    assert heat.dims == ("trial", "channel", "time")
    assert heat.values.min() >= 0
    assert heat.values.max() <= 1


def test_a_frozen_filter_works_in_a_pipeline(fitted):
    g = np.random.default_rng(0)
    y = np.arange(24) % 2
    X = g.standard_normal((24, 2, 256)).cumsum(2)
    X[y == 1, 0] *= 3
    power = FunctionTransformer(lambda a: np.log(np.square(a - a.mean(2, keepdims=True)).mean(2)))
    pipeline = make_pipeline(FrozenEstimator(fitted), power, LogisticRegression())
    assert cross_val_score(pipeline, X, y, cv=3, error_score="raise").mean() > 0.7


def test_the_picture_shows_each_channel(data, fitted):
    import matplotlib.pyplot as plt

    y = mix(data.clean[:2], data.noise[:2], -2.0)
    axes = plot_artifacts(fitted, y, clean=data.clean[:2], channels=["Cz", "T7"])
    assert [a.get_ylabel() for a in axes] == ["Cz", "T7"]
    labels = {line.get_label(): line.get_ydata() for line in axes[1].lines}
    assert np.allclose(labels["cleaned"], fitted.transform(y)[1])
    assert np.allclose(axes[0].images[0].get_array(), fitted.noise_map(y).values[:1])
    plt.close("all")
    for bad in ({"clean": data.clean[:3]}, {"channels": ["Cz"]}, {"axes": axes[:1]}):
        with pytest.raises(InputError):
            plot_artifacts(fitted, y, **bad)


# ---------------------------------------------------------------- bad inputs


def test_before_fit_nothing_is_answered():
    for name in ("transform", "noise_map", "which_stage"):
        with pytest.raises(NotFittedError):
            getattr(EMGFilter(), name)(np.zeros((1, 1, 512)))
    with pytest.raises(NotFittedError):
        WienerFilter().transform(np.zeros((1, 1, 512)))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"n_times": 250}, "n_times"), ({"n_times": 0}, "n_times"), ({"kernel": 8}, "odd"), ({"channels": ()}, "channels"),
        ({"channels": (8, 0)}, "channels"), ({"window": 2}, "window"), ({"gate": "all"}, "gate"),
        ({"threshold": 2.0}, "threshold"), ({"snr_range": (2, -7)}, "snr_range"), ({"snr_range": (2,)}, "snr_range"),
        ({"epochs": (1, 1)}, "epochs"), ({"epochs": (1, 1, -1)}, "epochs"), ({"adversarial": -1}, "adversarial"),
        ({"spectral": np.nan}, "spectral"), ({"validation": 0.0}, "validation"), ({"convention": "dB"}, "convention"),
        ({"sampling_rate": -1}, "sampling_rate"), ({"random_state": None}, "random_state"), ({"batch_size": 0}, "batch_size"),
        ({"autoencoder": np.tanh}, "autoencoder"), ({"n_heads": 3}, "n_heads"), ({"patch": 17}, "patch"),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(data, parameters, match):
    with pytest.raises(InputError, match=match):
        EMGFilter(**TINY).set_params(**parameters).fit(data.clean[:10], data.noise[:10])


def bad_segments(X):
    nan, flat = X.copy(), X.copy()
    nan[3, 5] = np.nan
    flat[2] = 0.1
    return [(nan, "NaN"), (flat, "flat"), (X[:1], "one trial"), (X[:, :100], "fewer"), (X[0], "segments"), (X[:0], "empty"),
            (np.full(X.shape, "a"), "numbers"), (X[None, None], "shape")]  # fmt: skip


@pytest.mark.parametrize("which", ["clean", "noise"])
@pytest.mark.parametrize("make", [lambda: EMGFilter(**TINY), lambda: WienerFilter(n_times=256)])
def test_segments_that_are_none_are_refused(data, make, which):
    good = data.clean[:10]
    for bad, match in bad_segments(good):
        with pytest.raises(InputError, match=match):
            make().fit(**{"clean": good, "noise": good, which: bad})


def test_signals_that_are_none_are_refused(fitted):
    for bad, match in (
        (np.full((1, 256), np.nan), "NaN"),
        (np.zeros((1, 1, 1, 256)), "shape"),
        (np.zeros((0, 256)), "empty"),
    ):
        with pytest.raises(InputError, match=match):
            fitted.transform(bad)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((np.ones(8), np.zeros(8), 0.0), "power"), ((np.ones(8), np.ones(9), 0.0), "fit"), ((np.ones(8), np.ones(8), np.nan), "snr_db"),
        ((np.full(8, np.inf), np.ones(8), 0.0), "clean"), ((1.0, np.ones(8), 0.0), "clean"), ((np.ones(8), np.ones(8), 0.0, "snr"), "convention"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused(arguments, match):
    with pytest.raises(InputError, match=match):
        mix(*arguments)


def test_measures_refuse_other_shapes():
    for measure in (cc, rrmse_time, rrmse_spectrum):
        with pytest.raises(InputError, match="one shape"):
            measure(np.ones(8), np.ones(9))


def test_the_wiener_filter_refuses_a_level_that_is_none(data):
    with pytest.raises(InputError, match="snr_db"):
        WienerFilter(n_times=256).set_params(snr_db="low").fit(data.clean, data.noise)
