"""Simulated recordings have the statistics that they state."""

import numpy as np
import pytest
from scipy.special import xlogy
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import adjusted_rand_score

from nissl.errors import InputError
from nissl.recordings import simulate

EVERY = {
    "delayed_sources": {"n_trials": 4},
    "mixed_states": {"n_bins": 20},
    "biclusters": {"n_bins": 20},
    "planted_units": {"n_trials": 6},
    "planted_grammar": {"n_windows": 4},
    "muscle_bursts": {"n_segments": 3},
    "oddball": {"n_events": 5},
    "motor_imagery": {"n_trials": 4},
    "linear_states": {"n_bins": 20},
    "hub_circuit": {"n_windows": 20},
    "lagged_circuit": {"n_bins": 20},
    "planted_communities": {"n_times": 60},
}


def first(made):
    return np.asarray(made.clean if hasattr(made, "clean") else made.X)


@pytest.mark.parametrize("name", EVERY)
def test_a_seed_gives_the_same_and_another_seed_something_else(name):
    make = getattr(simulate, name)
    a, b, c = (first(make(**EVERY[name], seed=s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert np.isfinite(a).all()


def test_delayed_sources_differ_only_in_the_sign_of_a_delay():
    made = simulate.delayed_sources(400, n_times=500, delay=3, seed=0)
    sources = np.linalg.solve(made.mixing, made.X)

    def covariance(y, lag):
        x = sources[made.y == y]
        return np.einsum("nit,njt->ij", x[..., lag:], x[..., : x.shape[-1] - lag]) / (len(x) * (x.shape[-1] - lag))

    for lag in (0, 1, 2, 4):  # standard error .0032, 96 differences
        assert np.abs(covariance(0, lag) - covariance(1, lag)).max() < 0.02
    late = 0.2 / np.sqrt(1.04)
    assert covariance(0, 3)[0, 1] == pytest.approx(late, abs=0.015)
    assert covariance(1, 3)[1, 0] == pytest.approx(late, abs=0.015)
    assert abs(covariance(0, 3)[1, 0]) < 0.015


def test_mixed_states_have_no_linear_trace():
    made = simulate.mixed_states(20_000, 5, seed=0)
    np.testing.assert_allclose(np.cov(made.Z.T), np.eye(4), atol=0.25)
    assert np.abs(made.X.T @ made.Z / len(made.X)).max() < 0.15
    V = made.B @ made.B.T
    np.testing.assert_allclose(made.X.T @ made.X / len(made.X), V + 3 * np.eye(5), atol=0.35)


def test_biclusters_have_the_variance_of_their_rates():
    made = simulate.biclusters(40, 2000, dispersion=10.0, segment=20, seed=0)
    rate = np.exp(made.log_rate)
    assert (made.X - rate).mean() == pytest.approx(0, abs=4 * np.sqrt((rate + rate**2 / 10).mean() / made.X.size))
    assert ((made.X - rate) ** 2 / (rate + rate**2 / 10)).mean() == pytest.approx(1, abs=0.1)
    assert set(made.state_labels[:40]) == {0, 1}
    assert np.bincount(made.neuron_labels).tolist() == [14, 13, 13]


def test_units_follow_their_ring():
    made = simulate.planted_units(600, seed=0)
    assert made.X.shape == (600, 10, 600)
    assert len({tuple(r) for r in made.rings}) == 6
    for ring in made.rings:  # one cycle through all four
        at, seen = 0, []
        for _ in range(4):
            seen.append(at)
            at = ring[at]
        assert at == 0
        assert sorted(seen) == [0, 1, 2, 3]
    followed = made.rings[made.y[:, None], made.units[:, :-1]] == made.units[:, 1:]
    assert followed.mean() == pytest.approx(0.9, abs=0.01)  # standard error .0023
    strays = (made.units[:, 1:] - made.rings[made.y[:, None], made.units[:, :-1]])[~followed] % 4
    np.testing.assert_allclose(np.bincount(strays, minlength=4)[1:] / len(strays), 1 / 3, atol=0.05)
    for y in range(6):  # no class has units of its own
        np.testing.assert_allclose(np.bincount(made.units[made.y == y].ravel()) / 3000, 0.25, atol=0.03)


def test_units_are_on_the_informative_channels_only():
    made = simulate.planted_units(120, seed=1)
    np.testing.assert_allclose(made.X[:, 4:].var(), 1, atol=0.03)
    patches = made.X.reshape(120, 10, 30, 20).transpose(0, 2, 1, 3)
    for unit in range(4):
        mean = patches[made.units == unit].mean(0)
        np.testing.assert_allclose(mean[:4], 1.5 * np.outer(made.patterns[unit], made.waveforms[unit]), atol=0.25)
        assert np.abs(mean[4:]).max() < 0.25
    spectrum = (np.abs(np.fft.rfft(made.X[:, 4:])) ** 2).mean((0, 1))[1:-1]
    slope = np.polyfit(np.log(np.arange(1, len(spectrum) + 1)), np.log(spectrum), 1)[0]
    assert slope == pytest.approx(-1, abs=0.1)


def test_grammar_is_in_the_order_not_in_the_counts():
    made = simulate.planted_grammar(2000, seed=0)
    counts = np.stack([(made.motifs == m).sum((1, 2)) for m in range(4)], 1)
    np.testing.assert_array_equal(counts[:, 2:], 2)
    assert abs(counts[made.y == 0, 1].mean() - counts[made.y == 1, 1].mean()) < 0.3  # standard error .09
    assert (made.planted.sum((1, 2)) == 4).all()
    np.testing.assert_array_equal(made.planted, made.motifs >= 2)
    first, second = made.motifs[:, :, :-1], made.motifs[:, :, 1:]
    np.testing.assert_array_equal(((first == 3) & (second == 2)).any((1, 2)), made.y == 1)
    rest = made.motifs[~made.planted]
    assert (rest == 1).mean() == pytest.approx(1 / 3, abs=0.01)


def test_motifs_have_their_frequency():
    made = simulate.planted_grammar(400, amplitude=3.0, seed=0)
    patches = made.X.reshape(400, 4, 6, 100)
    power = np.abs(np.fft.rfft(patches, axis=-1)) ** 2
    quiet = power[made.motifs == 0].mean(0)
    for motif, frequency in ((1, 10), (2, 3), (3, 25)):  # patches of 1 s: bins of 1 Hz
        assert np.argmax(power[made.motifs == motif].mean(0)[1:] - quiet[1:]) + 1 == frequency
        assert patches[made.motifs == motif].var(-1).mean() == pytest.approx(
            9 + patches[made.motifs == 0].var(-1).mean(), rel=0.1
        )
    assert made.X.shape == (400, 4, 600)


def test_muscle_bursts():
    made = simulate.muscle_bursts(1500, seed=0)
    for x in (made.clean, made.noise):
        np.testing.assert_allclose(x.mean(1), 0, atol=1e-12)
        np.testing.assert_allclose(x.std(1), 1)
    found = (np.abs(np.fft.rfft(made.clean)) ** 2).mean(0)
    keep = made.clean_power > 0
    np.testing.assert_allclose(found[keep] / found.sum(), made.clean_power[keep], rtol=0.3)
    assert found[~keep].sum() < 1e-9 * found.sum()
    assert made.clean_power[made.frequencies == 10] == pytest.approx(4 * made.clean_power[made.frequencies == 40] * 4)
    burst = made.envelope == 1
    stationary = made.noise * made.scale[:, None] / made.envelope
    assert stationary[burst].var() == pytest.approx(1, abs=0.1)
    assert stationary[~burst].var() == pytest.approx(1, abs=0.1)
    assert (burst.sum(1) >= 60).all()
    assert (burst.sum(1) <= 240).all()
    # of two independent signals: correlation a / sqrt(1 + a^2) after mixing at an amplitude ratio of a
    ratio = 10**0.2
    mixed = ratio * made.clean + made.noise
    r = np.mean([np.corrcoef(x, m)[0, 1] for x, m in zip(made.clean, mixed, strict=True)])
    assert r == pytest.approx(ratio / np.sqrt(1 + ratio**2), abs=0.01)


def test_the_p300_of_an_oddball():
    made = simulate.oddball(3000, seed=0)
    samples, codes = made.events.T
    assert set(codes) == {1, 2}
    assert (codes == 2).mean() == pytest.approx(0.2, abs=0.03)
    assert made.X.attrs == {"sampling_rate": 128.0, "units": "µV", "source": "simulate.oddball"}
    cut = np.stack([made.X.values[:, s : s + 64] for s in samples])  # to the next event
    wave = cut[codes == 2].mean(0) - cut[codes == 1].mean(0)
    true = made.topography[:, None] * made.waveform[:64]
    assert np.abs(wave - true).max() < 1.5  # µV; standard error .37, 1024 values, earlier targets in both
    assert np.argmax(made.waveform) == 38  # 300 ms
    assert made.X.channel.values[np.argmax(made.topography)] == "Pz"
    quiet = made.X.values - 0
    assert quiet[0].std() == pytest.approx(8, rel=0.1)  # F7, far from Pz


def test_the_rhythms_of_motor_imagery():
    made = simulate.motor_imagery(200, seed=0)
    assert made.X.dims == ("trial", "channel", "time")
    sources = np.linalg.pinv(made.patterns) @ made.X.values
    power = np.abs(np.fft.rfft(sources)) ** 2
    f = np.fft.rfftfreq(sources.shape[-1], 1 / 128)
    band = power[..., (f >= 8) & (f <= 12)].sum(-1)
    left = made.y == "left"
    assert band[left, 1].mean() < 0.6 * band[~left, 1].mean()
    assert band[~left, 0].mean() < 0.6 * band[left, 0].mean()
    assert band[left, 0].mean() == pytest.approx(band[~left, 1].mean(), rel=0.1)
    other = power[..., (f > 20) & (f < 40)].sum(-1)
    assert other[left].mean() == pytest.approx(other[~left].mean(), rel=0.1)
    np.testing.assert_array_equal(made.power[left][0], [36, 9])
    feature = np.log(band)
    half = LinearDiscriminantAnalysis().fit(feature[:100], made.y[:100])
    assert half.score(feature[100:], made.y[100:]) > 0.75


def test_linear_states_are_stationary():
    made = simulate.linear_states(40_000, 4, radius=0.8, seed=0)
    np.testing.assert_allclose(made.A @ made.S @ made.A.T + made.Gamma, made.S, atol=1e-10)
    assert np.abs(np.linalg.eigvals(made.A)).max() == pytest.approx(0.8)
    assert np.abs(made.A - made.A.T).max() > 0.1
    scale = made.S.diagonal().max()
    np.testing.assert_allclose(np.cov(made.Z.T), made.S, atol=0.06 * scale)
    found = made.Z[1:].T @ made.Z[:-1] @ np.linalg.inv(made.Z[:-1].T @ made.Z[:-1])
    np.testing.assert_allclose(found, made.A, atol=0.04)
    np.testing.assert_allclose(np.cov((made.X - made.Z @ made.H.T).T), made.Lambda, atol=0.06)


def test_spikes_have_their_rates():
    rates = np.stack([np.tile([2.0, 20.0], 500), np.zeros(1000)], 1)
    times = simulate.poisson_spikes(rates, 0.1, seed=0)
    assert [len(t) for t in times] == [pytest.approx(1100, abs=4 * np.sqrt(1100)), 0]
    counts = np.bincount((times[0] / 0.1).astype(int), minlength=1000)
    assert counts[0::2].mean() == pytest.approx(0.2, abs=0.08)
    assert counts[1::2].mean() == pytest.approx(2, abs=0.25)
    assert counts[1::2].var() == pytest.approx(2, abs=0.5)
    assert (np.diff(times[0]) >= 0).all()


def test_hubs_and_their_followers():
    made = simulate.hub_circuit(20_000, seed=0)
    X, C = made.X, made.connectivity
    assert X.shape == (20_000, 20)
    assert C.sum() == 12
    np.testing.assert_array_equal(C[:, made.hubs].sum(0), 4)
    target, source = np.nonzero(C)
    before, now = X[:-1, source] > 0, X[1:, target]
    assert now[before].mean() == pytest.approx(0.9, abs=0.01)
    assert now[~before].mean() == pytest.approx(0.02, abs=0.005)
    assert X[:, made.hubs].mean() == pytest.approx(0.5, abs=0.01)
    free = ~C.any(1) & ~C.any(0)
    assert free.sum() == 5
    assert X[:, free].mean() == pytest.approx(0.1, abs=0.01)


def test_the_shortest_codes_of_the_hub_circuit():
    made = simulate.hub_circuit(40_000, seed=1)
    # the figures of the method's card
    assert made.nats["past"] == pytest.approx(6.244, abs=0.001)
    assert made.nats["no past"] == pytest.approx(8.285, abs=0.001)
    assert made.nats["rates"] == pytest.approx(11.984, abs=0.001)
    # and by counting: entropies of what was drawn
    p = made.X.mean(0)
    assert -(xlogy(p, p) + xlogy(1 - p, 1 - p)).sum() == pytest.approx(made.nats["rates"], abs=0.05)
    total = sum(-xlogy(q, q) - xlogy(1 - q, 1 - q) for q in p[~made.connectivity.any(1)])
    for hub in made.hubs:
        words = made.X[:, made.connectivity[:, hub]] @ 2 ** np.arange(4)
        q = np.bincount(words.astype(int), minlength=16) / len(words)
        total -= xlogy(q, q).sum()
    assert total == pytest.approx(made.nats["no past"], abs=0.05)


def test_a_lagged_circuit():
    made = simulate.lagged_circuit(30_000, seed=0)
    assert made.X.shape == (30_000, 23)
    assert made.connectivity.sum() == 18
    rates = {}
    for lag in (1, 2):
        for target, source in np.argwhere(made.lags == lag):
            now, before = made.X[lag:, target], made.X[:-lag, source] > 0
            rates.setdefault(lag, []).append((now[before].mean(), now[~before].mean()))
    np.testing.assert_allclose(rates[2], [(0.9, 0.02)] * 6, atol=0.015)
    weak = [r for r in rates[1] if r[0] < 0.6]
    assert len(weak) == 6
    np.testing.assert_allclose(weak, [(0.35, 0.1)] * 6, atol=0.015)
    # early and late followers of a hub go together one bin apart, more than a driver and its follower
    hub = made.connectivity.sum(0).argmax()
    early, late = (np.flatnonzero(made.lags[:, hub] == k)[0] for k in (1, 2))
    driver, follower = next((s, t) for t, s in np.argwhere(made.lags == 1) if made.connectivity[:, s].sum() == 2)
    spurious = np.corrcoef(made.X[:-1, early], made.X[1:, late])[0, 1]
    real = np.corrcoef(made.X[:-1, driver], made.X[1:, follower])[0, 1]
    assert spurious > 0.7 > 0.4 > real > 0.2


def test_communities_act_in_their_windows_and_animals():
    made = simulate.planted_communities(1200, seed=0)
    assert made.X.shape == (4, 1200, 24)
    assert (made.windows.sum(0) == 1).all()
    for group in range(3):
        for animal in range(4):
            for window in range(3):
                x = made.X[animal][made.windows[window]][:, made.labels == group]
                mean = (np.corrcoef(x.T).sum() - 8) / 56
                if window == group and made.animals[group, animal]:
                    assert mean > 0.6  # 3 / (3 + 1) is stated
                else:
                    assert abs(mean) < 0.2
    x = made.X[0][made.windows[0]]
    strong = np.corrcoef(x.T)[: len(made.labels), : len(made.labels)].mean(1) > 0.15
    assert adjusted_rand_score(made.labels == 0, strong) == 1


BAD = [
    ("planted_units", {"n_trials": 0}, "n_trials"),
    ("planted_units", {"n_informative": 11}, "n_informative"),
    ("planted_units", {"follow": 1.5}, "follow"),
    ("planted_units", {"amplitude": np.nan}, "amplitude"),
    ("planted_grammar", {"n_patches": 1}, "n_patches"),
    ("planted_grammar", {"n_pairs": 5}, "n_pairs"),
    ("planted_grammar", {"sampling_rate": 50.0}, "sampling_rate"),
    ("planted_grammar", {"sampling_rate": 100.5}, "whole number"),
    ("muscle_bursts", {"n_times": 100}, "n_times"),
    ("muscle_bursts", {"rest": 0.0}, "rest"),
    ("oddball", {"channels": ("Pz", "Xx")}, "channels must"),
    ("oddball", {"channels": ("Pz", "Pz")}, "channels must"),
    ("oddball", {"channels": ()}, "channels must"),
    ("oddball", {"target_share": -0.1}, "target_share"),
    ("oddball", {"interval": 0}, "interval"),
    ("motor_imagery", {"n_trials": 1}, "n_trials"),
    ("motor_imagery", {"frequency": 90.0}, "no frequency"),
    ("motor_imagery", {"duration": 1e-9}, "no frequency"),
    ("linear_states", {"radius": 1.0}, "run away"),
    ("linear_states", {"noise": -1.0}, "noise"),
    ("hub_circuit", {"hub": 2.0}, "hub"),
    ("lagged_circuit", {"weak": 2.0}, "weak"),
    ("lagged_circuit", {"n_late": 0}, "n_late"),
    ("hub_circuit", {"n_unconnected": -1}, "n_unconnected"),
    ("planted_communities", {"animals": ((0, 4),)}, "animals of group 0"),
    ("planted_communities", {"animals": ()}, "at least one group"),
    ("planted_communities", {"snr": 0}, "snr"),
]


@pytest.mark.parametrize(("name", "options", "words"), BAD, ids=[f"{n}-{next(iter(o))}" for n, o, _ in BAD])
def test_bad_parameters(name, options, words):
    with pytest.raises(InputError, match=words):
        getattr(simulate, name)(**options)


@pytest.mark.parametrize(
    ("rates", "width", "words"),
    [
        (np.array([[1.0, -1.0]]), 0.1, "neuron 1"),
        (np.array([[np.nan]]), 0.1, "NaN"),
        (np.ones((3, 1)), 0.0, "bin_width"),
        (np.ones(3), 0.1, "shape"),
    ],
)
def test_bad_rates(rates, width, words):
    with pytest.raises(InputError, match=words):
        simulate.poisson_spikes(rates, width)
