"""The study of AT-AT: the exact answer is exact, its quick form measures what it says, real EEG is cut as stated."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console

from nissl.errors import MissingExtraError
from nissl.recordings.eeg import WienerFilter, cc, mix, rrmse_time
from nissl.recordings.simulate import muscle_bursts
from nissl.sources.recordings import p300
from nissl.studies import at_at as study


@pytest.fixture(scope="module")
def claims():
    return study.run(quick=True, seed=0, progress=False)


def test_the_quick_study_measures_every_planted_claim(claims):
    assert len(claims) == 3 * 8 + 2 + 2
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)
    sure = [c for c in claims if "leak" in c["claim"] or "AUC" in c["claim"] or "parameters" in c["claim"]]
    assert len(sure) == 7
    assert all(c["holds"] for c in sure), [c for c in sure if not c["holds"]]


def test_the_posterior_mean_is_that_of_conditioning_and_best():
    data = muscle_bursts(25, 256, seed=3)
    y = mix(data.clean, data.noise, -2.0)
    found = study.posterior_mean(y, data, -2.0)
    # by another way: samples of the two spectra, and the regression of clean on noisy at one sample
    g = np.random.default_rng(0)
    twice = np.r_[1, np.full(127, 2), 1]

    def draw(power, n):
        gain = np.sqrt(power * 256 / (twice * power).sum())
        return np.fft.irfft(np.fft.rfft(g.standard_normal((n, 256))) * gain)

    clean = draw(data.clean_power, 12000)
    noise = draw(data.noise_power, 12000) * data.envelope[0] / data.scale[0] * 10**0.2
    mixed = clean + noise
    weights = np.linalg.solve(mixed.T @ mixed + 1e-3 * np.eye(256), mixed.T @ clean[:, 100])
    assert weights @ y[0] == pytest.approx(found[0, 100], abs=0.15)
    wiener = WienerFilter(-2.0, n_times=256).fit(data.clean, data.noise).transform(y)
    assert cc(found, data.clean).mean() > cc(wiener, data.clean).mean() + 0.03
    assert rrmse_time(found, data.clean).mean() < rrmse_time(wiener, data.clean).mean()


def test_plain_convolutions_see_as_far_as_stated():
    model = study.PlainConvolutions().eval()
    x = torch.randn(1, 301, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    model.double()(x)[0, 150].backward()
    assert x.grad is not None
    reach = x.grad[0].nonzero()[:, 0]
    assert (reach.min(), reach.max()) == (90, 210)


def test_claims_of_bounds_hold_when_they_should():
    values = np.array([0.1, 0.2, 0.3, 0.2])
    assert study._low("a", "b", values, 0.2, 0.0, 0)["holds"]
    assert not study._low("a", "b", values, 0.2, 0.0, 0, strictly=True)["holds"]
    assert not study._low("a", "b", 0 * values, 0.0, 0.0, 0, strictly=True)["holds"]
    assert study._low("a", "b", values, 0.0, 0.0, 0, strictly=True)["holds"]
    assert not study._high("a", "b", values, 0.1, 0.0, 0)["holds"]


def test_bursts_at_128_hz_are_those_of_256_hz():
    noise = study.resampled_bursts(20, 0)
    assert noise.shape == (20, 512)
    power = (np.abs(np.fft.rfft(noise)) ** 2).mean(0)
    f = np.fft.rfftfreq(512, 1 / 128)
    assert power[(f > 22) & (f < 55)].mean() > 20 * power[f < 4].mean()


def test_windows_of_a_recording_are_whole_and_not_wild():
    X = np.random.default_rng(0).standard_normal((3, 512 * 10))
    X[1, 600:700] *= 50
    found = study.windows(X, 512)
    assert found.shape == (9, 3, 512)
    assert np.array_equal(found[0], X[:, :512])
    assert np.array_equal(found[1], X[:, 1024:1536])


def test_filters_of_nothing_have_no_advantage_over_components_on_real_eeg():
    try:
        recording = p300()[0][:, :8192]
    except MissingExtraError as error:
        pytest.skip(str(error))
    X = recording.copy(data=study.low_pass(recording.values, 128.0, 40.0))
    claims = study._with_ica(X, {"AT-AT": lambda y: y}, 0, Console(quiet=True))
    assert len(claims) == 4
    oracle = next(c for c in claims if "likest" in c["claim"] and "-7" in c["claim"])
    assert oracle["ours"] < -0.1


def test_missing_recordings_are_said_and_left_out(monkeypatch):
    def missing(*_):
        raise MissingExtraError("not here")

    monkeypatch.setattr(study, "p300", missing)
    monkeypatch.setattr(study, "on_planted", lambda *_: [])
    with pytest.warns(UserWarning, match="not here"):
        assert study.run(progress=False) == []
