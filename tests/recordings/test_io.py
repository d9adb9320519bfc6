"""Files written on the fly come back as they were; what is wrong with a recording is said by name."""

import sys
import warnings
from datetime import UTC, datetime

import numpy as np
import pytest
import xarray as xr

from nissl.errors import InputError, MissingExtraError
from nissl.recordings import as_bins, as_trials, io, simulate

mne = pytest.importorskip("mne")

RATE = 100.0


@pytest.fixture
def raw():
    """Three EEG channels in V, one of a stimulus, 10 s, with a montage and three annotations."""
    g = np.random.default_rng(0)
    data = np.concatenate([1e-5 * g.standard_normal((3, 1000)), np.zeros((1, 1000))])
    data[3, [100, 300, 600]] = [1, 2, 1]
    info = mne.create_info(["Cz", "Pz", "Oz", "STI"], RATE, ["eeg", "eeg", "eeg", "stim"])
    made = mne.io.RawArray(data, info, verbose="error")
    places = {"Cz": [0, 0, 0.1], "Pz": [0, -0.05, 0.09], "Oz": [0, -0.09, 0.02]}
    made.set_montage(mne.channels.make_dig_montage(places, coord_frame="head"))
    made.set_annotations(mne.Annotations([1.0, 3.0, 6.0], [0.0] * 3, ["left", "right", "left"]))
    return made


def edf(path, digital, labels, samples, unit="uV", physical=(-100, 100)):
    """A minimal EDF file of one record of 1 s; `digital` holds one array of int16 for each signal."""
    n = len(labels)

    def field(values, width):
        return "".join(str(v).ljust(width)[:width] for v in values)

    head = field(["0", "X", "X", "01.01.20", "00.00.00"], 8)[:8]
    head = (
        "0".ljust(8) + "X".ljust(80) + "X".ljust(80) + "01.01.20" + "00.00.00" + str(256 * (n + 1)).ljust(8) + " " * 44
    )
    head += "1".ljust(8) + "1".ljust(8) + str(n).ljust(4)
    head += (
        field(labels, 16)
        + " " * 80 * n
        + field([unit] * n, 8)
        + field([physical[0]] * n, 8)
        + field([physical[1]] * n, 8)
    )
    head += field([-32768] * n, 8) + field([32767] * n, 8) + " " * 80 * n + field(samples, 8) + " " * 32 * n
    path.write_bytes(head.encode("ascii") + b"".join(np.asarray(d, dtype="<i2").tobytes() for d in digital))
    return path


def brainvision(folder, data, names, rate):
    """Text header, markers and float32 samples in µV."""
    data.T.astype("<f4").tofile(folder / "a.eeg")
    lines = ["Brain Vision Data Exchange Header File Version 1.0", "[Common Infos]", "Codepage=UTF-8", "DataFile=a.eeg",
             "MarkerFile=a.vmrk", "DataFormat=BINARY", "DataOrientation=MULTIPLEXED", f"NumberOfChannels={len(names)}",
             f"SamplingInterval={1e6 / rate:g}", "[Binary Infos]", "BinaryFormat=IEEE_FLOAT_32", "[Channel Infos]"]  # fmt: skip
    lines += [f"Ch{i + 1}={name},,1,µV" for i, name in enumerate(names)]
    (folder / "a.vhdr").write_text("\n".join(lines) + "\n", encoding="utf8")
    marks = ["Brain Vision Data Exchange Marker File, Version 1.0", "[Common Infos]", "Codepage=UTF-8", "DataFile=a.eeg",
             "[Marker Infos]", "Mk1=Stimulus,S  1,51,1,0", "Mk2=Stimulus,S  2,151,1,0"]  # fmt: skip
    (folder / "a.vmrk").write_text("\n".join(marks) + "\n", encoding="utf8")
    return folder / "a.vhdr"


# ---------------------------------------------------------------- signals


def test_fif(raw, tmp_path):
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    X = io.read_raw(tmp_path / "a_raw.fif", sampling_rate=100)
    assert X.dims == ("channel", "time")
    assert X.attrs == {"sampling_rate": 100.0, "units": "µV", "source": "a_raw.fif"}
    assert list(X.channel.values) == ["Cz", "Pz", "Oz"]
    assert set(X.type.values) == {"eeg"}
    np.testing.assert_allclose(X.values, 1e6 * raw.get_data()[:3], rtol=1e-5)
    np.testing.assert_allclose(
        np.stack([X[a] for a in "xyz"], 1), [c["loc"][:3] for c in raw.info["chs"][:3]], atol=1e-7
    )
    np.testing.assert_allclose(X.time, np.arange(1000) / 100)
    X, y = io.epochs_from(tmp_path / "a_raw.fif", tmin=-0.1, tmax=0.5)
    assert y.tolist() == ["left", "right", "left"]
    assert X.sample.values.tolist() == [100, 300, 600]


def test_edf(tmp_path):
    digital = np.random.default_rng(0).integers(-32768, 32768, (2, 128))
    X = io.read_raw(edf(tmp_path / "a.edf", digital, ["C3", "C4"], [128, 128]))
    assert X.attrs["sampling_rate"] == 128
    assert X.attrs["units"] == "µV"
    np.testing.assert_allclose(X.values, (digital + 32768) / 65535 * 200 - 100, atol=1e-6)


def test_edf_without_a_unit_says_no_unit(tmp_path):
    digital = np.random.default_rng(0).integers(-32768, 32768, (1, 128))
    X = io.read_raw(edf(tmp_path / "a.edf", digital, ["C3"], [128], unit=""))
    assert X.attrs["units"] == "unknown"
    np.testing.assert_allclose(X.values, (digital + 32768) / 65535 * 200 - 100, atol=1e-6)


def test_edf_of_two_rates(tmp_path):
    g = np.random.default_rng(0)
    file = edf(tmp_path / "a.edf", [g.integers(-99, 99, 128), g.integers(-99, 99, 64)], ["C3", "resp"], [128, 64])
    with pytest.warns(UserWarning, match=r"a\.edf: sampling rates differ.*: resp"):
        X = io.read_raw(file)
    assert X.shape == (2, 128)


def test_edf_with_doubled_names(tmp_path):
    digital = np.random.default_rng(0).integers(-99, 99, (2, 128))
    with pytest.warns(UserWarning, match="not unique.*C3"):
        X = io.read_raw(edf(tmp_path / "a.edf", digital, ["C3", "C3"], [128, 128]))
    assert list(X.channel.values) == ["C3-0", "C3-1"]


def test_brainvision(tmp_path):
    data = np.random.default_rng(0).normal(0, 20, (2, 300))
    X = io.read_raw(brainvision(tmp_path, data, ["Fz", "Pz"], 250.0))
    assert X.attrs == {"sampling_rate": 250.0, "units": "µV", "source": "a.vhdr"}
    np.testing.assert_allclose(X.values, data, rtol=1e-5)
    X, y = io.epochs_from(tmp_path / "a.vhdr", tmin=-0.1, tmax=0.2)
    np.testing.assert_allclose(X.values[1], data[:, 125:201], rtol=1e-5)
    assert len(set(y)) == 2


def test_epochs_are_those_of_mne(raw):
    events, ids = mne.events_from_annotations(raw, verbose="error")
    theirs = mne.Epochs(raw, events, ids, -0.2, 0.53, baseline=(-0.2, 0), picks="eeg", preload=True, verbose="error")
    X, y = io.epochs_from(raw, tmin=-0.2, tmax=0.53, baseline=(-0.2, 0))
    np.testing.assert_allclose(X.values, 1e6 * theirs.get_data(), atol=1e-9)
    np.testing.assert_allclose(X.time, theirs.times)
    again, labels = io.read_epochs(theirs)
    np.testing.assert_allclose(again, X, atol=1e-9)
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_allclose(as_trials(X), X.values)


def test_events_of_an_array_and_of_a_cut_raw(raw):
    X = io.read_raw(raw)
    trials, y = io.epochs_from(X, np.array([[100, 1], [300, 2], [600, 1]]), 0, 0.1, event_id={"rare": 2})
    np.testing.assert_array_equal(trials.values[0], X.values[:, 300:311])
    assert y.tolist() == ["rare"]
    late = raw.copy().crop(
        2.0
    )  # MNE's samples count from the start of the recording, columns of two from that of the data
    assert late.first_samp == 200
    by_mne, _ = io.epochs_from(late, np.array([[300, 0, 2]]), 0, 0.1)
    ours, _ = io.epochs_from(late, np.array([[100, 2]]), 0, 0.1)
    named, y = io.epochs_from(late, None, 0, 0.1, event_id=None)
    np.testing.assert_allclose(by_mne.values, trials.values)
    np.testing.assert_allclose(ours.values, trials.values)
    np.testing.assert_allclose(named.values[:1], trials.values)
    assert y.tolist() == ["right", "left"]


def test_events_of_a_stimulus_channel(raw):
    raw.set_annotations(None)
    X, y = io.epochs_from(raw, tmin=0, tmax=0.1)
    assert y.tolist() == ["1", "2", "1"]
    assert X.sample.values.tolist() == [100, 300, 600]


def test_files_of_trials(raw, tmp_path):
    X, y = io.epochs_from(raw, tmin=-0.1, tmax=0.4)
    io.to_epochs(X, y).save(tmp_path / "a-epo.fif", verbose="error")
    again, labels = io.read_epochs(tmp_path / "a-epo.fif")
    np.testing.assert_allclose(again.values, X.values, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(again.time, X.time)
    np.testing.assert_array_equal(labels, y)
    with pytest.raises(InputError, match="read_epochs"):
        io.read_raw(tmp_path / "a-epo.fif")


def test_round_trip_with_positions(raw):
    X = io.read_raw(raw)
    back = io.to_raw(X)
    np.testing.assert_allclose(back.get_data(), raw.get_data()[:3], rtol=1e-12)
    np.testing.assert_allclose([c["loc"][:3] for c in back.info["chs"]], [c["loc"][:3] for c in raw.info["chs"][:3]])


def test_a_scalp_map_of_names_only():
    import matplotlib.pyplot as plt

    made = simulate.oddball(20, seed=0)
    info = io.to_raw(made.X).info
    assert info.get_montage() is not None
    image, _ = mne.viz.plot_topomap(made.topography, info, show=False)
    assert image is not None
    plt.close("all")


def test_a_p300_comes_out():
    made = simulate.oddball(600, seed=1)
    X, y = io.epochs_from(made.X, made.events, -0.1, 0.45, baseline=(-0.1, 0))
    wave = (X.values[y == "2"].mean(0) - X.values[y == "1"].mean(0))[:, np.abs(X.time.values - 0.3) < 0.02].mean(1)
    assert np.corrcoef(wave, made.topography)[0, 1] > 0.9


def test_units_are_kept_honest(raw):
    with pytest.warns(UserWarning, match="units are not known.*a, b"):
        back = io.to_raw(io.signals(np.eye(2), 10, ["a", "b"]))
    np.testing.assert_array_equal(back.get_data(), np.eye(2))
    assert io.to_raw(io.signals(np.eye(2), 10, ["a", "b"], units="mV")).get_data().max() == 1e-3
    info = mne.create_info(["Cz", "M1"], RATE, ["eeg", "mag"])
    both = io.read_raw(mne.io.RawArray(1e-6 * np.random.default_rng(0).normal(size=(2, 100)), info, verbose="error"))
    assert both.attrs["units"] == "mixed"
    assert both.unit.values.tolist() == ["µV", "T"]


def test_npz(tmp_path, raw):
    X, y = io.epochs_from(raw, tmin=-0.1, tmax=0.4)
    io.save_npz(tmp_path / "a.npz", X, y)
    again, labels = io.read_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.values, X.values)
    np.testing.assert_array_equal(labels, y)
    np.testing.assert_allclose(again.time, X.time)
    for name in ("channel", "type", "unit", "x", "y", "z"):
        np.testing.assert_array_equal(again[name].values, X[name].values)
    assert again.attrs == {"sampling_rate": 100.0, "units": "µV", "source": "a.npz"}
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]
    np.savez(tmp_path / "b.npz", X=np.arange(6.0).reshape(2, 3), sampling_rate=5)
    plain, none = io.read_npz(tmp_path / "b.npz")
    assert none is None
    assert list(plain.channel.values) == ["channel 1", "channel 2"]


def test_nothing_is_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("unpickled",))

    np.savez(tmp_path / "a.npz", X=np.array([Trap()], dtype=object), sampling_rate=5)
    with pytest.raises(InputError, match="pickle"):
        io.read_npz(tmp_path / "a.npz")


def test_what_is_wrong_is_said_by_name(raw):
    raw._data[1] = 0.0
    with pytest.warns(UserWarning, match="flat: Pz$"):
        io.read_raw(raw)
    raw._data[0, 5] = np.nan
    with pytest.warns(UserWarning, match="NaN in Cz$"):
        io.read_raw(raw, ["Cz", "Oz"])
    raw.info["bads"] = ["Cz", "Pz"]
    with pytest.warns(UserWarning, match="marked bad.*: Cz, Pz"):
        assert io.read_raw(raw).channel.values.tolist() == ["Oz"]


def test_trials_over_the_ends_are_left_out(raw):
    X = io.read_raw(raw)
    with pytest.warns(UserWarning, match="2 of 3 trials reach over the ends.*sample 0"):
        trials, y = io.epochs_from(X, np.array([[0, 1], [500, 2], [999, 1]]), -0.1, 0.5)
    assert y.tolist() == ["2"]
    assert trials.shape == (1, 3, 61)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampling_rate": 0}, "above 0"),
        ({"data": np.zeros(3)}, "n_channels, n_times"),
        ({"data": np.zeros((0, 3))}, "n_channels, n_times"),
        ({"data": np.array([["a"]])}, "real numbers"),
        ({"data": np.array([[1.0, np.inf], [1.0, 2.0]])}, "infinite values in channel 1"),
        ({"channels": ["a"]}, "1 names"),
        ({"channels": ["a", "a"]}, "same name: a"),
        ({"types": ["eeg"]}, "1 types"),
        ({"positions": np.zeros((2, 2))}, "positions"),
        ({"times": np.arange(4.0)}, "shape"),
        ({"times": np.arange(50) / 12}, "those of 12 Hz"),
        ({"times": np.arange(50) / 10.2}, "those of 10.2 Hz"),
        ({"times": np.arange(50)[::-1] / 10}, "must rise"),
        ({"times": np.concatenate([np.arange(25), np.arange(27, 52)]) / 10}, "1 gaps.*2.4 to 2.7"),
        ({"times": np.full(50, np.nan)}, "NaN"),
    ],
)
def test_bad_signals(options, words):
    given = {"data": np.random.default_rng(0).normal(size=(2, 50)), "sampling_rate": 10.0} | options
    with pytest.raises(InputError, match=words):
        io.signals(given.pop("data"), given.pop("sampling_rate"), **given)


def test_slow_drift_of_the_clock_is_a_wrong_rate():
    times = np.arange(1000) / 10.01  # .1 % off: one sample after 1000
    with pytest.raises(InputError, match=r"those of 10\.01 Hz"):
        io.signals(np.random.default_rng(0).normal(size=(1, 1000)), 10.0, times=times)
    io.signals(np.random.default_rng(0).normal(size=(1, 1000)), 10.01, times=times)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"events": np.array([[1000, 1]])}, "1 of 1 events lie outside.*sample 1000"),
        ({"events": np.array([[-1, 1]])}, "lie outside"),
        ({"events": np.array([[100.0, 1.0]])}, "whole numbers"),
        ({"events": np.zeros((0, 2), dtype=int)}, "whole numbers"),
        ({"events": np.array([1, 2])}, "whole numbers"),
        ({"events": None}, "must be given"),
        ({"event_id": {"a": 9}}, r"a \(9\)"),
        ({"tmin": 1.0}, "below tmax"),
        ({"tmax": 99.0}, "no trial"),
        ({"baseline": (-1.0, 0.0)}, "not within the trial"),
        ({"baseline": (0.2, 0.1)}, "not within the trial"),
    ],
)
def test_bad_events(options, words):
    X = io.signals(np.random.default_rng(0).normal(size=(2, 1000)), RATE)
    given = {"events": np.array([[500, 1]]), "tmin": -0.1, "tmax": 0.5} | options
    with pytest.raises(InputError, match=words):
        io.epochs_from(X, **given)


def test_bad_files(tmp_path, raw):
    for name, words in (("a.edf", "no file"), ("a.txt", "unknown format"), ("a", "unknown format")):
        with pytest.raises(InputError, match=words):
            io.read_raw(tmp_path / name)
    for name in ("a.edf", "b.fif", "c.vhdr", "d.gdf"):
        (tmp_path / name).write_bytes(b"no recording" * 50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(InputError, match=f"{name}"):
                io.read_raw(tmp_path / name)
    with pytest.raises(InputError, match="has no channel Fz; it has Cz"):
        io.read_raw(raw, ["Fz", "Cz"])
    with pytest.raises(InputError, match="no channel of the kind 'mag'"):
        io.read_raw(raw, "mag")
    with pytest.raises(InputError, match="100 Hz, not of 128"):
        io.read_raw(raw, sampling_rate=128)
    with pytest.raises(InputError, match="must be a path"):
        io.read_raw(3)
    for held, words in (({"X": np.eye(2)}, "no sampling_rate"), ({"X": np.eye(2), "sampling_rate": np.ones(2)}, "one number"),
                        ({"X": np.ones((2, 3, 4)), "sampling_rate": 2, "y": np.ones(3)}, "one label"),
                        ({"X": np.eye(2), "sampling_rate": 2, "units": ["a", "b", "c"]}, "3 units")):  # fmt: skip
        np.savez(tmp_path / "x.npz", **held)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(InputError, match=words):
                io.read_npz(tmp_path / "x.npz")
    with pytest.raises(InputError, match=r"\.npz"):
        io.save_npz(tmp_path / "x.npy", io.read_raw(raw))
    with pytest.raises(InputError, match="DataArray"):
        io.to_raw(io.epochs_from(raw, tmax=0.1)[0])
    with pytest.raises(InputError, match="sampling_rate"):
        io.to_raw(xr.DataArray(np.eye(2), dims=("channel", "time")))


def test_mne_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "mne", None)
    with pytest.raises(MissingExtraError, match=r"nissl\[recordings\]"):
        io.read_raw("a.edf")


# ---------------------------------------------------------------- spikes

TIMES = {"3": [0.1, 0.2, 1.5], "7": [0.5, 0.6]}
COUNTS = [[2, 0], [0, 2], [0, 0], [1, 0]]


def nwb(path, times):
    pynwb = pytest.importorskip("pynwb")
    file = pynwb.NWBFile("test", "test", datetime(2020, 1, 1, tzinfo=UTC))
    for name, t in times.items():
        file.add_unit(spike_times=t, id=int(name))
    with pynwb.NWBHDF5IO(str(path), "w") as f:
        f.write(file)
    return path


def test_plain_times():
    found = io.spike_counts(TIMES, 0.5, start=0, stop=2)
    np.testing.assert_array_equal(found.values, COUNTS)
    assert found.dims == ("bin", "neuron")
    assert found.attrs == {"sampling_rate": 2.0, "bin_width": 0.5, "units": "spikes"}
    np.testing.assert_array_equal(found.time, [0, 0.5, 1, 1.5])
    np.testing.assert_array_equal(io.spike_counts(list(TIMES.values()), 0.5), COUNTS)
    np.testing.assert_array_equal(as_bins(found), COUNTS)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_nwb(tmp_path):
    found = io.spike_counts(nwb(tmp_path / "a.nwb", TIMES), 0.5, stop=2)
    np.testing.assert_array_equal(found.values, COUNTS)
    assert list(found.neuron.values) == ["3", "7"]
    (tmp_path / "b.nwb").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"b\.nwb cannot be read"):
        io.spike_counts(tmp_path / "b.nwb", 0.5)


def test_pynapple():
    nap = pytest.importorskip("pynapple")
    group = nap.TsGroup({int(k): nap.Ts(np.array(v)) for k, v in TIMES.items()}, time_support=nap.IntervalSet(0, 2))
    found = io.spike_counts(group, 0.5)
    np.testing.assert_array_equal(found.values, COUNTS)
    np.testing.assert_array_equal(found.values, group.count(0.5).values)
    assert list(found.neuron.values) == ["3", "7"]


def test_neo():
    neo = pytest.importorskip("neo")
    pq = pytest.importorskip("quantities")
    trains = [neo.SpikeTrain(1000 * np.array(v) * pq.ms, t_stop=2000 * pq.ms, name=k) for k, v in TIMES.items()]
    np.testing.assert_array_equal(io.spike_counts(trains, 0.5).values, COUNTS)
    segment = neo.Segment()
    segment.spiketrains.extend(trains)
    found = io.spike_counts(segment, 0.5)
    np.testing.assert_array_equal(found.values, COUNTS)
    assert list(found.neuron.values) == ["3", "7"]
    shorter = neo.SpikeTrain([0.1] * pq.s, t_stop=1 * pq.s, name="x")
    with pytest.warns(UserWarning, match="different ends; all have 0 to 1 s"):
        assert len(io.spike_counts([*trains, shorter], 0.5)) == 2


def test_trials_of_spikes():
    found = io.spike_counts(TIMES, 0.25, trials=np.array([[0.1, 0.6], [1.5, 2.3]]))
    np.testing.assert_array_equal(found.values, [[2, 0], [0, 1], [1, 0], [0, 0], [0, 0]])
    np.testing.assert_array_equal(found.trial, [0, 0, 1, 1, 1])
    np.testing.assert_allclose(found.time, [0.1, 0.35, 1.5, 1.75, 2.0])
    twice = io.spike_counts(TIMES, 0.5, trials=np.array([[0.0, 1.0], [0.0, 2.0]]))  # trials may overlap
    np.testing.assert_array_equal(twice.values, COUNTS[:2] + COUNTS)


def test_a_spike_on_a_border_is_in_the_later_bin():
    edges = 0.1 * np.arange(1000)  # as floats, none of them exact
    np.testing.assert_array_equal(io.spike_counts([edges], 0.1, stop=100), 1)
    np.testing.assert_array_equal(io.spike_counts([np.array([k / 10 for k in range(1000)])], 0.1, stop=100), 1)


def test_simulated_spikes_are_all_counted():
    rates = np.random.default_rng(0).uniform(0, 40, (200, 7))
    times = simulate.poisson_spikes(rates, 0.02, seed=1)
    found = io.spike_counts(times, 0.02, start=0, stop=4)
    np.testing.assert_array_equal(found.sum("bin"), [len(t) for t in times])
    expected = np.stack([np.histogram(t, 0.02 * np.arange(201))[0] for t in times], 1)
    np.testing.assert_array_equal(found.values, expected)


def test_silent_neurons_are_named():
    with pytest.warns(UserWarning, match="no spike in any bin: b$"):
        io.spike_counts({"a": [0.1], "b": []}, 0.1, stop=1)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ({"a": [0.1, np.nan]}, {}, "neuron a hold NaN"),
        ({"a": [[0.1]]}, {}, "flat"),
        ({"a": ["x"]}, {}, "neuron a"),
        ({}, {}, "spikes must be"),
        ([], {}, "spikes must be"),
        (3, {}, "spikes must be"),
        ("a.txt", {}, r"\.nwb"),
        ("a.nwb", {}, "no file"),
        (TIMES, {"bin_width": 0.0}, "bin_width"),
        (TIMES, {"stop": -1.0}, "no bin"),
        (TIMES, {"start": np.nan}, "start"),
        (TIMES, {"trials": np.array([[0.0, 0.1]])}, "no bin"),
        (TIMES, {"trials": np.zeros(2)}, "trials"),
        (TIMES, {"trials": np.array([[0.0, 1.0]]), "stop": 1.0}, "either"),
        ({"a": [1e9]}, {"bin_width": 0.001}, "in seconds"),
    ],
)
def test_bad_spikes(source, options, words):
    with pytest.raises(InputError, match=words):
        io.spike_counts(source, **({"bin_width": 0.5} | options))


# ---------------------------------------------------------------- quality


def test_inspect_finds_what_is_planted():
    g = np.random.default_rng(0)
    x = g.standard_normal((10, 5000))
    x[2] = 4.0
    x[3, :1250] = np.nan
    x[4] *= 20
    x[5] += 3 * np.sin(2 * np.pi * 50 * np.arange(5000) / 250)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        X = io.signals(x, 250.0)
    table = io.inspect(X)
    assert table.flat.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert table.missing["channel 4"] == 0.25
    assert table["std"]["channel 1"] == pytest.approx(x[0].std())
    assert table["std"]["channel 4"] == pytest.approx(x[3, 1250:].std())
    assert table.index[table.z > 3].tolist() == ["channel 5", "channel 6"]
    assert table.index[table.line > 10].tolist() == ["channel 6"]
    assert np.isnan(table.z["channel 3"])
    assert io.inspect(X, line=124.0).line.isna().all()


def test_inspect_takes_trials():
    X = io.signals(np.random.default_rng(0).normal(size=(4, 3, 300)), 128.0)
    X[0, 1] = 2.0
    table = io.inspect(X)
    assert table.flat.tolist() == [0, 0.25, 0]
    with pytest.raises(InputError, match="sampling_rate"):
        io.inspect(X.drop_attrs())
    with pytest.raises(InputError, match="line"):
        io.inspect(X, line=0.0)
