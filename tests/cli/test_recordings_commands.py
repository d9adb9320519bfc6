"""``nissl decode``: planted signals are decoded and found, files are read, what cannot be decoded is refused, the page is quiet."""

import json
import sys
import warnings
from pathlib import Path

import mne
import numpy as np
import pytest
from typer.testing import CliRunner

from nissl.cli import app
from nissl.errors import InputError
from nissl.recordings import decoding
from nissl.recordings.decoders import BandPower, TimeWindows, standard_decoders
from nissl.recordings.evaluate import evaluate, splits

sys.path.insert(0, str(Path(__file__).parent / "report"))

NAMES = ["Fz", "C3", "Cz", "C4", "Pz"]
CHANNEL, START, END, RATE = 3, 30, 45, 100.0
"""C4, 0.3 to 0.45 s, tells the classes apart, and nothing else."""


def planted(n: int = 80, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = g.standard_normal((n, len(NAMES), 80))
    X[:, CHANNEL, START:END] += np.where(y == 1, 1.0, -1.0)[:, None]
    return 1e-5 * X, np.array(["left", "right"])[y]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decode")
    X, y = planted()
    np.savez(path / "planted.npz", X=X, y=y, channels=NAMES, sampling_rate=RATE)
    return path


def run(*words: object) -> dict:
    result = CliRunner().invoke(app, ["decode", *map(str, words), "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def told(folder: Path) -> dict:
    return run(folder / "planted.npz", "--decoders", "time windows,linear,band power", "--permutations", 99, "--examples", 10, "--methods", "ixg,occlusion",
               "--out", folder / "planted.html")  # fmt: skip


def test_the_planted_signal_is_decoded_above_chance(told):
    best = told["decoders"][told["best"]]
    assert told["best"] in ("time windows", "linear")
    assert best["score"] > 0.95
    assert best["p"] == best["smallest_p"] == 0.01
    assert best["low"] <= best["score"] <= best["high"]
    assert 0.4 < best["chance"] < 0.6
    assert told["decoders"]["band power"]["score"] < best["score"]
    assert told["classes"] == ["left", "right"]
    assert np.sum(told["confusion"]) == 80


def test_the_explanation_finds_the_planted_channel_and_time(told):
    found = told["explanation"]
    assert found["linear"]
    assert max(found["channels"], key=lambda c: abs(found["channels"][c])) == NAMES[CHANNEL]
    inside = [
        s["channel"] == NAMES[CHANNEL] and START / RATE - 0.1 <= s["time"] <= END / RATE + 0.1
        for s in found["strongest"]
    ]
    assert np.mean(inside) >= 0.9
    assert found["relabelled"] < 0.6


@pytest.mark.parametrize("name", ["tangent space", "band power"])
def test_decoders_that_are_not_linear_are_explained_by_their_answers(name):
    """The planted channel is three times as loud in one class, which these decoders see."""
    g = np.random.default_rng(0)
    y = np.arange(80) % 2
    X = g.standard_normal((80, 4, 60))
    X[y == 1, 2] *= 3
    model = standard_decoders(60.0, 4, 60)[name]
    train, test = splits(y)[0]
    found = decoding.explain_decoder(
        model, X, y, train, test, name=name, examples=4, budget=32, methods=["occlusion"], progress=False
    )
    assert not found.linear
    assert found.verdict != "believe"
    assert found.scores[found.predicted == 1].mean(0).sum(1).argmax() == 2


def test_a_linear_decoder_becomes_the_same_linear_layer():
    import torch

    X, y = planted()
    model = standard_decoders(RATE, 5, 80)["time windows"].fit(X, y)
    answers = decoding._Answers(model, X.mean(0), float(X.std()))
    rows = (X[:10] - X.mean(0)) / X.std()
    layer = decoding.linear_layer(answers, rows)
    assert layer is not None
    assert np.allclose(layer(torch.from_numpy(rows).float()).detach().numpy(), answers(rows), atol=1e-3)
    assert np.allclose(answers(rows)[:, 1], model.decision_function(X[:10]))


def test_all_standard_decoders_run_on_what_they_are_for():
    X, y = planted(60)
    decoders = standard_decoders(RATE, 5, 80)
    found = evaluate(decoders, X, y, n_splits=3, permutations=19, progress=False)
    assert set(found.decoded) == {
        "linear",
        "time windows",
        "band power",
        "CSP",
        "tangent space",
        "augmented covariance",
    }
    assert found.decoded["time windows"].score.value > 0.95


def test_features_are_what_they_say():
    X = np.random.default_rng(0).standard_normal((4, 2, 25))
    found = TimeWindows(5).fit(X).transform(X)
    assert np.allclose(found.reshape(4, 2, 5), X.reshape(4, 2, 5, 5).mean(3))
    t = np.arange(200) / 100
    tone = np.sin(2 * np.pi * 10 * t)[None, None]
    power = BandPower(100.0).fit(tone)
    assert list(power.bands_) == ["delta", "theta", "alpha", "beta", "gamma"]
    assert power.transform(tone)[0].argmax() == 2
    louder = power.transform(3 * tone)[0, 2] - power.transform(tone)[0, 2]
    assert louder == pytest.approx(np.log(9))
    with pytest.raises(InputError, match="no frequency"):
        BandPower(100.0, {"ripple": (80, 200)}).fit(tone)


def test_electrodes_are_known_by_name_or_there_is_no_map():
    info = decoding.electrode_info(["FZ", "c3", "Cz.", "C4"], 100.0)
    assert info is not None
    assert info.ch_names == ["Fz", "C3", "Cz", "C4"]
    assert decoding.electrode_info(["Fz", "C3", "Cz", "A1-Cz"], 100.0) is None
    figure = decoding.plot_importance(
        np.random.default_rng(0).standard_normal((4, 30)), info.ch_names, 100.0, 0.0, info
    )
    assert len(figure.axes) == 3


# ---------------------------------------------------------------- files


def continuous() -> mne.io.RawArray:
    X, y = planted(30)
    gap = 1e-5 * np.random.default_rng(1).standard_normal((30, len(NAMES), 40))
    data = np.concatenate([X, gap], 2).transpose(1, 0, 2).reshape(len(NAMES), -1)
    raw = mne.io.RawArray(data, mne.create_info(NAMES, RATE, "eeg"), verbose="error")
    raw.set_annotations(mne.Annotations(np.arange(30) * 1.2, 0.1, y))
    return raw


def test_epochs_and_continuous_recordings_are_read_by_their_events(tmp_path):
    raw = continuous()
    raw.save(tmp_path / "a_raw.fif", verbose="error")
    events, codes = mne.events_from_annotations(raw, verbose="error")
    epochs = mne.Epochs(raw, events, codes, 0, 0.79, baseline=None, preload=True, verbose="error")
    epochs.save(tmp_path / "a-epo.fif", verbose="error")
    options = (
        "--decoders",
        "time windows",
        "--folds",
        3,
        "--permutations",
        19,
        "--examples",
        0,
        "--out",
        tmp_path / "r.html",
    )
    for file in ("a_raw.fif", "a-epo.fif"):
        told = run(tmp_path / file, "--tmax", 0.79, *options)
        assert told["trials"] == 30
        assert told["channels"] == NAMES
        assert told["classes"] == ["left", "right"]
        assert told["decoders"]["time windows"]["score"] > 0.9
        assert told["explanation"] is None


def test_labels_of_a_file_and_chosen_events(folder, tmp_path):
    X, y = planted()
    three = y.copy()
    three[:15] = "rest"
    np.savez(tmp_path / "x.npz", X=X)
    (tmp_path / "labels.txt").write_text("\n".join(three))
    told = run(tmp_path / "x.npz", "--labels", tmp_path / "labels.txt", "--rate", RATE, "--events", "left,right",
               "--decoders", "time windows", "--examples", 0, "--out", tmp_path / "r.html")  # fmt: skip
    assert told["trials"] == 65
    assert told["classes"] == ["left", "right"]


def test_flat_channels_are_left_out_and_named(tmp_path):
    X, y = planted(40)
    X[:, 1] = 4.0
    np.savez(tmp_path / "x.npz", X=X, y=y, channels=NAMES, sampling_rate=RATE)
    with pytest.warns(UserWarning, match="flat: C3"):
        told = run(tmp_path / "x.npz", "--decoders", "time windows", "--examples", 0, "--out", tmp_path / "r.html")
    assert "C3" not in told["channels"]
    assert told["notes"] == ["x.npz: flat: C3", "flat channels left out: C3"]
    assert "flat channels left out: C3" in (tmp_path / "r.html").read_text()


def test_the_packaged_sets_are_there_by_name():
    from nissl.cli.recordings import DEMO, packaged
    from nissl.errors import MissingExtraError

    try:
        found = packaged(DEMO)
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert decoding.electrode_info(found.channels, found.sampling_rate) is not None


def arrays(path: Path, **changes: object) -> Path:
    X, y = planted(40)
    held = {"X": X, "y": y, "channels": NAMES, "sampling_rate": RATE, **changes}
    np.savez(path / "bad.npz", **{k: np.asarray(v) for k, v in held.items() if v is not None})
    return path / "bad.npz"


BAD = {
    "labels of another length": ({"y": ["a", "b"] * 19}, (), "one label for each of 40 trials"),
    "one class": ({"y": ["a"] * 40}, (), "nothing to tell apart"),
    "fewer trials than folds": ({"y": ["a"] * 37 + ["b"] * 3}, (), "fewer than 5 folds"),
    "unknown event": ({}, ("--events", "left,up"), "no event up|no event 'up'"),
    "all channels flat": ({"X": np.zeros((40, 5, 80))}, (), "every channel is flat"),
    "NaN": ({"X": np.full((40, 5, 80), np.nan)}, (), "NaN"),
    "two dimensions": ({"X": np.random.default_rng(0).random((5, 80))}, (), "shape"),
    "names of channels": ({"channels": ["Fz"]}, (), "1 names of channels for 5"),
    "no rate": ({"sampling_rate": None}, (), "no sampling_rate"),
    "rate 0": ({"sampling_rate": 0.0}, (), "above 0"),
    "no labels": ({"y": None}, (), "--labels"),
    "no trials": ({"X": None}, (), "has no X"),
    "objects": ({"y": np.array([None] * 40)}, (), "cannot be read"),
    "decoder": ({}, ("--decoders", "deep"), "choose from"),
    "split": ({}, ("--split", "random"), "split must be"),
    "groups": ({}, ("--split", "grouped"), "needs groups"),
    "metric": ({}, ("--metric", "f1"), "metric must be"),
    "labels file": ({}, ("--labels", "nowhere.txt"), "no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_nothing_is_written(case, tmp_path):
    changes, options, match = BAD[case]
    with pytest.raises(InputError, match=match):
        run(arrays(tmp_path, **changes), *options, "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_other_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no file"):
        run(tmp_path / "nothing.edf")
    (tmp_path / "text.edf").write_text("no recording")
    with pytest.raises(InputError, match="cannot be read"):
        run(tmp_path / "text.edf", "--out", tmp_path / "r.html")
    raw = continuous()
    raw.set_annotations(None)
    raw.save(tmp_path / "b_raw.fif", verbose="error")
    with pytest.raises(InputError, match="no annotations and no event"):
        run(tmp_path / "b_raw.fif", "--out", tmp_path / "r.html")
    with pytest.raises(InputError, match="8-35"):
        run(tmp_path / "b_raw.fif", "--band", "alpha")
    continuous().save(tmp_path / "c_raw.fif", verbose="error")
    with pytest.raises(InputError, match="below half of 100"):
        run(tmp_path / "c_raw.fif", "--band", "8-80")
    with pytest.raises(InputError, match="there is no set"):
        run("--demo", "nothing")


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_is_quiet_offline_and_no_wider_than_the_window(browser, folder, told, width):
    browser.open((folder / "planted.html").as_uri(), width=width)
    assert browser.complaints() == []
    assert [u for u in browser.requests() if not u.startswith("file:")] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    titles = browser.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent.trim())")
    assert titles[:2] == ["Decoders side by side", f"Confusion of {told['best']}"]
    assert "Can that be believed?" in titles
    assert browser.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.alt)")


def test_names_in_a_file_are_escaped(tmp_path):
    X, y = planted(40)
    bad = "<script>alert(1)</script>"
    names = [*NAMES[:4], bad]
    np.savez(tmp_path / "x.npz", X=X, y=np.where(y == "left", bad, "$right"), channels=names, sampling_rate=RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(
            tmp_path / "x.npz",
            "--decoders",
            "time windows",
            "--examples",
            2,
            "--methods",
            "ixg",
            "--out",
            tmp_path / "r.html",
        )
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
