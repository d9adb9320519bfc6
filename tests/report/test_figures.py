"""Pictures and chart geometry against planted values."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image
from report_sample import sample

from nissl.errors import InputError
from nissl.report import figures as fig
from nissl.report import plot

LIGHT = np.array([0.299, 0.587, 0.114])


def grid(rows: list[list[float]]) -> xr.DataArray:
    return xr.DataArray(np.array([rows]), dims=("example", "y", "x"))


def positions_to_values(ticks: list[dict], positions: np.ndarray) -> np.ndarray:
    """Undo an axis by the line through its first and last tick."""
    at, value = np.array([(t["at"], t["value"]) for t in ticks]).T
    return value[0] + (np.asarray(positions) - at[0]) / (at[-1] - at[0]) * (value[-1] - value[0])


def points(path: str) -> np.ndarray:
    return np.array([[float(v) for v in p.split()] for p in re.split("[ML]", path.rstrip("Z")) if p])


def test_strength_of_signed_scores_keeps_zero_sign_and_order() -> None:
    values = np.array([-4.0, -1.0, 0.0, 2.0, 4.0])
    assert np.allclose(fig.strength(values, clip=100.0), values / 4)


def test_strength_of_positive_scores_starts_at_the_lowest() -> None:
    assert np.allclose(fig.strength(np.array([3.0, 4.0, 5.0]), clip=100.0), [0, 0.5, 1])


def test_strength_clips_an_outlier() -> None:
    values = np.append(np.linspace(-1, 1, 999), 1000.0)
    s = fig.strength(values, clip=99.0)
    assert s[-1] == 1
    assert s[900] == pytest.approx(values[900] / np.percentile(np.abs(values), 99))


def test_strength_of_a_sparse_map_uses_its_maximum() -> None:
    values = np.zeros(1000)
    values[3], values[5] = 2.0, 1.0
    assert fig.strength(values)[[3, 5]].tolist() == [1.0, 0.5]


@pytest.mark.parametrize("values", [[2.0, 2.0], [0.0, 0.0], [np.nan, np.nan], [np.inf, 1.0]])
def test_strength_without_an_order_is_zero(values: list[float]) -> None:
    assert fig.strength(np.array(values)).tolist() == [0, 0]


def test_missing_scores_are_see_through() -> None:
    assert fig.paint(np.array([[np.nan, 1.0, -1.0]]))[0, :, 3].tolist() == [0, 235, 235]


@pytest.mark.parametrize("clip", [0.0, 101.0])
def test_clip_out_of_range(clip: float) -> None:
    with pytest.raises(InputError, match="percentile"):
        fig.strength(np.ones(3), clip)


def test_colours_tell_the_sign_and_darken_with_strength() -> None:
    values = np.linspace(-1, 1, 41)[None]
    rgba = fig.paint(values, clip=100.0)[0].astype(float)
    assert (rgba[21:, 0] > rgba[21:, 2]).all()
    assert (rgba[:20, 2] > rgba[:20, 0]).all()
    alpha = rgba[:, 3:] / 255
    light = (rgba[:, :3] * alpha + 255 * (1 - alpha)) @ LIGHT
    assert (np.diff(light[20:]) < 0).all()
    assert (np.diff(light[:21]) > 0).all()


def test_overlay_of_a_constant_map_is_the_pale_grey_photograph() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    expected = 255 - 0.5 * (255 - image @ LIGHT)
    assert np.abs(fig.overlay(image, np.ones((2, 2)), photo=0.5) - expected[..., None]).max() <= 0.5 + 1e-9


def test_overlay_colours_the_place_with_the_score() -> None:
    values = np.zeros((8, 8))
    values[2, 5] = 1.0
    out = fig.overlay(np.full((8, 8, 3), 128, np.uint8), values).astype(int)
    assert np.unravel_index((out[..., 0] - out[..., 2]).argmax(), (8, 8)) == (2, 5)


def test_floats_and_channels_first_are_the_same_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (fig.rgb(np.moveaxis(image / 255, -1, 0)) == image).all()


@pytest.mark.parametrize("image", [np.zeros((4, 4)), np.full((4, 4, 3), 1.5), np.full((4, 4, 3), np.nan)])
def test_what_is_no_image(image: np.ndarray) -> None:
    with pytest.raises(InputError, match="image"):
        fig.rgb(image)


def test_resizing_keeps_constants_and_the_mean() -> None:
    assert np.allclose(fig.resized(np.full((4, 6), 2.5), (12, 3)), 2.5)
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    small = fig.resized(ramp, (16, 16))
    assert small.mean() == pytest.approx(0.5, abs=1e-3)
    assert (np.diff(small, axis=1) > 0).all()


def test_lossless_uri_gives_the_pixels_back() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    head, _, body = fig.data_uri(pixels, quality=None).partition(",")
    assert head == "data:image/webp;base64"
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(body))).convert("RGBA")) == pixels).all()


def test_large_pictures_are_reduced() -> None:
    body = fig.data_uri(np.zeros((400, 1000, 3), np.uint8), longest=200).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(body))).size == (200, 80)


def test_channels_are_summed_with_their_signs() -> None:
    scores = xr.DataArray(np.array([[[[1.0]], [[-3.0]]]]), dims=("example", "channel", "y", "x"))
    assert fig.map_of(scores).tolist() == [[-2.0]]


def test_a_missing_channel_stays_missing() -> None:
    scores = xr.DataArray(np.array([[[[1.0]], [[np.nan]]]]), dims=("example", "channel", "y", "x"))
    assert np.isnan(fig.map_of(scores)).all()


def test_dimensions_are_put_in_order() -> None:
    scores = xr.DataArray(np.arange(6.0).reshape(3, 2, 1), dims=("time", "channel", "example"))
    assert fig.map_of(scores).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_unknown_dimensions_and_examples() -> None:
    with pytest.raises(InputError, match="cannot be drawn"):
        fig.kind_of(xr.DataArray(np.zeros((1, 2)), dims=("example", "voxel")))
    with pytest.raises(InputError, match="0 to 0"):
        fig.map_of(grid([[1.0]]), 1)


def test_mean_curves_are_means_inside_their_band() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal((7, 5))
    rows = [("a", "c", i, float(x), y[i, x]) for i in range(7) for x in range(5)]
    out = fig.mean_curves(pd.DataFrame(rows, columns=["method", "check", "example", "x", "y"]))
    assert np.allclose(out["mean"], y.mean(0))
    assert (out["low"] < out["mean"]).all()
    assert (out["mean"] < out["high"]).all()
    assert (out["n"] == 7).all()


def test_curves_on_different_places_are_interpolated_but_not_extended() -> None:
    rows = [("a", "c", 0, x, 2 * x) for x in (0.0, 1.0, 2.0)] + [("a", "c", 1, x, 2 * x + 1) for x in (0.5, 1.5)]
    out = fig.mean_curves(pd.DataFrame(rows, columns=["method", "check", "example", "x", "y"])).set_index("x")
    assert out["mean"].to_dict() == pytest.approx({0.0: 0.0, 0.5: 1.5, 1.0: 2.5, 1.5: 3.5, 2.0: 4.0})
    assert out["n"].to_dict() == {0.0: 1, 0.5: 2, 1.0: 2, 1.5: 2, 2.0: 1}


def test_values_that_are_not_finite_are_left_out() -> None:
    rows = [("a", "c", i, 0.0, y) for i, y in enumerate([1.0, 3.0, np.nan, np.inf])]
    out = fig.mean_curves(pd.DataFrame(rows, columns=["method", "check", "example", "x", "y"]))
    assert out[["mean", "n"]].to_numpy().tolist() == [[2.0, 2]]


def test_no_curves() -> None:
    empty = pd.DataFrame(columns=["method", "check", "example", "x", "y"])
    assert fig.mean_curves(empty).empty
    assert fig.curve_chart([("a", "own", fig.mean_curves(empty))], "x", "y") is None


def test_a_curve_lies_where_its_axes_say() -> None:
    x = np.array([0.0, 0.3, 0.9])
    y = np.array([-1.0, 2.0, 0.5])
    frame = pd.DataFrame({"x": x, "mean": y, "low": y - 0.2, "high": y + 0.2})
    chart = fig.curve_chart([("a", "own", frame)], "x", "y")
    assert chart is not None
    drawn = points(chart["lines"][0]["line"])
    assert np.allclose(positions_to_values(chart["x_ticks"], drawn[:, 0]), x, atol=0.005)
    assert np.allclose(positions_to_values(chart["y_ticks"], drawn[:, 1]), y, atol=0.02)
    band = positions_to_values(chart["y_ticks"], points(chart["lines"][0]["band"])[:, 1])
    assert np.allclose(band, np.concatenate([y - 0.2, (y + 0.2)[::-1]]), atol=0.02)


def test_a_gap_breaks_the_line() -> None:
    y = np.array([0.0, np.nan, 1.0, 2.0])
    frame = pd.DataFrame({"x": np.arange(4.0), "mean": y, "low": y, "high": y})
    chart = fig.curve_chart([("a", "own", frame)], "x", "y")
    assert chart is not None
    assert chart["lines"][0]["line"].count("M") == 2


def test_boxes_are_quartiles_and_few_values_get_none() -> None:
    values = {"a": np.array([0.0, 1.0, 2.0, 3.0, 4.0, 100.0]), "b": np.array([1.0, np.nan]), "c": np.array([np.nan])}
    chart = fig.box_chart(values, {"a": "A", "b": "B", "c": "C"}, chance=0.5, ceiling=None)
    assert chart is not None
    a, b, c = chart["rows"]
    v = values["a"]
    expected = [0, *np.percentile(v, [25, 50, 75]), 4]  # 100 lies beyond 1.5 boxes
    assert np.allclose(positions_to_values(chart["ticks"], a["box"]), expected, atol=0.05)
    assert positions_to_values(chart["ticks"], a["mean"]) == pytest.approx(v.mean(), abs=0.05)
    assert len(a["points"]) == 6
    assert b["box"] is None
    assert len(b["points"]) == 1
    assert c["mean"] is None
    assert positions_to_values(chart["ticks"], chart["marks"][0]["x"]) == pytest.approx(0.5, abs=0.05)
    assert [m["kind"] for m in chart["marks"]] == ["chance"]


def test_matrix_cells_hold_its_values() -> None:
    m = pd.DataFrame([[1.0, -0.4], [np.nan, 1.0]], ["a", "b"], ["a", "b"])
    chart = fig.matrix_chart(m, {"a": "A"})
    one = chart["cells"][1]
    assert (one["value"], one["strength"], one["sign"], one["names"]) == (-0.4, 0.4, "neg", ("A", "b"))
    assert chart["cells"][2]["strength"] == 0
    assert [c["self"] for c in chart["cells"]] == [True, False, False, True]


def test_cost_bars_are_square_roots() -> None:
    table = pd.DataFrame({"forward": [100, 3], "backward": [0, 1]}, index=["a", "b"])
    chart = fig.cost_chart(table, {"a": "A", "b": "B"})
    assert chart is not None
    a, b = chart["rows"]
    assert (b["forward"] + b["backward"]) / a["forward"] == pytest.approx(0.2, abs=0.002)
    assert b["forward"] / a["forward"] == pytest.approx(np.sqrt(0.03), abs=0.002)
    assert fig.cost_chart(table[["forward"]], {}) is None


def test_bars_show_the_strongest_first() -> None:
    chart = fig.bar_chart(np.array([0.1, -2.0, np.nan, 1.0]), ["a", "b", "c", "d"], None, most=3)
    assert [r["name"] for r in chart["rows"]] == ["b", "d", "a"]
    assert [r["sign"] for r in chart["rows"]] == ["neg", "pos", "pos"]
    assert chart["rows"][1]["length"] == pytest.approx(chart["rows"][0]["length"] / 2, abs=0.1)
    assert chart["rows"][0]["x"] + chart["rows"][0]["length"] == pytest.approx(chart["zero"], abs=0.1)


def test_a_signal_is_drawn_in_its_row() -> None:
    signal = np.stack([np.zeros(50), np.sin(np.arange(50))])
    flat, wave = (points(p) for p in fig.signal_paths(signal, 100.0, 20.0))
    assert (flat[:, 1] == 10).all()
    assert wave[:, 1].min() >= 20
    assert wave[:, 1].max() <= 40
    assert np.corrcoef(wave[:, 1], signal[1])[0, 1] < -0.999  # down is larger on a screen


@pytest.mark.parametrize("kind", ["image", "token", "feature", "series"])
@pytest.mark.parametrize("with_inputs", [True, False])
def test_plot(kind: str, with_inputs: bool) -> None:
    result = sample(kind, n=2)
    scores = result.scores["ig"].rename("$hostile_{name")
    figure = plot(scores, result.inputs if with_inputs else None, example=1)
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    assert Image.open(file).size[0] > 50
    values = fig.map_of(scores, 1)
    axes = figure.axes[0]
    if kind in ("token", "feature"):
        n = len(result.inputs[1]) if with_inputs else len(values)
        widths = [patch.get_width() for patch in axes.patches]  # pyright: ignore[reportAttributeAccessIssue]
        assert np.allclose(widths, values[:n])
    else:
        shown = np.asarray(axes.images[0].get_array())
        expected = fig.overlay(result.inputs[1], values) if kind == "image" and with_inputs else fig.paint(values)
        assert (shown == expected).all()


def test_plot_refuses_what_does_not_fit() -> None:
    series, tokens = sample("series", n=2), sample("token", n=2)
    with pytest.raises(InputError, match="channels"):
        plot(series.scores["ig"], series.inputs[:, :3])
    with pytest.raises(InputError, match="tokens"):
        plot(tokens.scores["ig"].isel(token=slice(4)), tokens.inputs)
    with pytest.raises(InputError, match="example 5"):
        plot(tokens.scores["ig"], tokens.inputs, example=5)
    with pytest.raises(InputError, match="inputs has"):
        plot(tokens.scores["ig"], tokens.inputs[:1], example=1)
