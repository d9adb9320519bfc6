"""Heat maps as pixels, charts as geometry, and `plot` for one map without a report.

The functions that end in ``_chart`` return plain numbers and path strings; ``templates/parts.html`` draws them as SVG.
That keeps all text in an escaping template and all colours in one style sheet, so charts follow the reader's theme.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from nissl.arguments import is_whole
from nissl.errors import InputError

# Stops from weak to strong. Hues from Okabe & Ito (2008): orange and blue stay apart in every kind of colour blindness,
# and both get darker as they get stronger, so the order survives in grey.
_POSITIVE = np.array([[230, 159, 0], [213, 94, 0], [158, 42, 14]], dtype=float)
_NEGATIVE = np.array([[86, 180, 233], [0, 114, 178], [9, 61, 122]], dtype=float)

KIND_DIMS: dict[str, tuple[str, ...]] = {
    "image": ("y", "x"),
    "token": ("token",),
    "feature": ("feature",),
    "series": ("channel", "time"),
}


def map_of(scores: xr.DataArray, example: int = 0) -> np.ndarray:
    """Scores of one example as an array without channels.

    Parameters
    ----------
    scores : DataArray, dims ("example", "channel", "y", "x"), ("example", "y", "x"), ("example", "token"), \
("example", "feature") or ("example", "channel", "time")
        Channels of an image are summed, sign and all; channels of a recording are kept.
    example : int, default 0

    Returns
    -------
    ndarray, shape (y, x), (token,), (feature,) or (channel, time)

    Raises
    ------
    InputError
        Unknown dimensions, or an example that is not there.
    """
    kind = kind_of(scores)
    n = scores.sizes["example"]
    if not (is_whole(example) and 0 <= example < n):
        raise InputError(f"example {example} does not exist; the scores have examples 0 to {n - 1}")
    one = scores.isel(example=example)
    if kind == "image" and "channel" in one.dims:
        one = one.sum("channel", skipna=False)
    return one.transpose(*KIND_DIMS[kind]).to_numpy().astype(np.float64)


def kind_of(scores: xr.DataArray) -> str:
    """What scores lie on, told from their dimensions: "image", "token", "feature" or "series"."""
    if not isinstance(scores, xr.DataArray) or scores.dtype.kind not in "biuf":
        what = f"one of {scores.dtype}" if isinstance(scores, xr.DataArray) else type(scores).__name__
        raise InputError(f"scores must be an xarray.DataArray of numbers, got {what}")
    dims = set(map(str, scores.dims))
    if "example" in dims:
        for kind, wanted in KIND_DIMS.items():
            optional = {"channel"} if kind == "image" else set()
            if dims - {"example"} - optional == set(wanted) - optional:
                return kind
    raise InputError(
        f"scores with the dimensions {tuple(scores.dims)} cannot be drawn; expected 'example' and one of "
        "('y', 'x'), ('channel', 'y', 'x'), ('token',), ('feature',), ('channel', 'time')"
    )


def strength(values: np.ndarray, clip: float = 99.0) -> np.ndarray:
    """Scores on the scale of their picture: -1 to 1 when some are negative, else 0 to 1.

    Signed scores are divided by the `clip`-th percentile of their absolute values, so 0 stays 0. Scores without a
    negative run from their lowest to the `clip`-th percentile: many methods add a constant that means nothing. The
    maximum is used where the percentile is no higher than the lowest, as in a sparse map.

    Parameters
    ----------
    values : ndarray, any shape
        NaN and infinite values become 0.
    clip : float, default 99.0
        Percentile, above 0 and at most 100.

    Returns
    -------
    ndarray of float64, the shape of `values`
        All 0 for a constant map: it ranks nothing.
    """
    if not 0 < clip <= 100:
        raise InputError(f"clip is a percentile above 0 and at most 100, got {clip}")
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape)
    shown = values[finite]
    if shown.min() == shown.max():
        return np.zeros(values.shape)
    low = 0.0 if shown.min() < 0 else float(shown.min())
    size = np.abs(shown - low)
    top = float(np.percentile(size, clip)) or float(size.max())
    return np.clip(np.where(finite, values - low, 0.0) / top, -1.0, 1.0)


def paint(values: np.ndarray, clip: float = 99.0) -> np.ndarray:
    """A heat map as colour with transparency: orange raises the target, blue lowers it, strength is opacity.

    What is weak is see-through, so one picture serves on white, on black and over a photograph.

    Parameters
    ----------
    values : ndarray, shape (y, x)
    clip : float, default 99.0
        See `strength`.

    Returns
    -------
    ndarray of uint8, shape (y, x, 4)
        Red, green, blue, opacity.
    """
    values = np.asarray(values)
    if values.ndim != 2:
        raise InputError(f"a heat map has two dimensions, got shape {values.shape}")
    s = strength(values, clip)
    size = np.abs(s)
    stops = np.linspace(0, 1, len(_POSITIVE))
    warm, cold = (np.stack([np.interp(size, stops, c) for c in ramp.T], axis=-1) for ramp in (_POSITIVE, _NEGATIVE))
    rgb = np.where(s[..., None] < 0, cold, warm)
    # Opacity in 32 steps: invisible to the eye, and noise maps compress to half.
    alpha = np.round(size**0.8 * 31) / 31 * 235
    return np.concatenate([rgb, alpha[..., None]], axis=-1).round().astype(np.uint8)


def overlay(image: np.ndarray, values: np.ndarray, clip: float = 99.0, photo: float = 0.55) -> np.ndarray:
    """A heat map over a pale grey photograph.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
    values : ndarray, shape (y, x)
        Any resolution; interpolated to that of the image.
    clip : float, default 99.0
    photo : float, default 0.55
        How strong the photograph is, from 0 (white) to 1.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)
    """
    image = rgb(image)
    grey = image @ np.array([0.299, 0.587, 0.114])
    base = 255 - photo * (255 - np.repeat(grey[..., None], 3, axis=-1))
    colour = paint(resized(values, image.shape[:2]), clip).astype(np.float64)
    alpha = colour[..., 3:] / 255
    return (base * (1 - alpha) + colour[..., :3] * alpha).round().astype(np.uint8)


def resized(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A map at another resolution: bilinear where it grows, area averages where it shrinks; NaN counts as 0."""
    clean = np.nan_to_num(np.asarray(values, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    if clean.shape == shape:
        return clean.astype(np.float64)
    # Pillow's bilinear filter widens with the reduction, which makes it an area average when shrinking.
    picture = Image.fromarray(clean).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.float64)


def fitted(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width scaled so that the longer one is at most `longest`."""
    ratio = min(1.0, longest / max(height, width))
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def data_uri(pixels: np.ndarray, longest: int = 256, quality: int | None = 80) -> str:
    """Pixels as a WebP data URI.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (H, W), (H, W, 3) or (H, W, 4)
    longest : int, default 256
        Larger pictures are reduced to this length of the longer side.
    quality : int or None, default 80
        None keeps every pixel as it is, which small grids need: lossy WebP shares colours between neighbours.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    height, width = fitted(pixels.shape[0], pixels.shape[1], longest)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", lossless=quality is None, quality=80 if quality is None else quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def mean_curves(curves: pd.DataFrame) -> pd.DataFrame:
    """Mean over examples of each method's curves, with a 95 % bootstrap band.

    Parameters
    ----------
    curves : DataFrame
        Columns method, check, example, x, y. Examples that were measured at different places are interpolated at all of
        them (at most 64), never beyond their own range. Values that are not finite are left out.

    Returns
    -------
    DataFrame
        Columns method, check, x, mean, low, high, n; low and high are NaN where fewer than two examples have a value.
    """
    # Inside the function, because nissl.trust may import this package while it is itself being imported.
    from nissl.trust.statistics import bootstrap

    columns = ["method", "check", "x", "mean", "low", "high", "n"]
    curves = curves.loc[np.isfinite(curves["x"].astype(float)) & np.isfinite(curves["y"].astype(float)), :]
    parts = []
    for _, rows in curves.groupby(["method", "check"], sort=False):
        method, check = rows["method"].iloc[0], rows["check"].iloc[0]
        wide = rows.pivot_table(index="x", columns="example", values="y", aggfunc="mean")
        x, y = wide.index.to_numpy(dtype=float), wide.to_numpy(dtype=float)
        if np.isnan(y).any():
            grid = x if len(x) <= 64 else np.linspace(x.min(), x.max(), 64)
            known = [np.isfinite(column) for column in y.T]
            y = np.stack(
                [np.interp(grid, x[k], column[k], np.nan, np.nan) for k, column in zip(known, y.T, strict=True)], axis=1
            )
            x = grid
        band = bootstrap(y)
        parts.append(
            pd.DataFrame(
                {"method": method, "check": check, "x": x, "mean": band.value, "low": band.low, "high": band.high}
            ).assign(n=np.isfinite(y).sum(axis=1))
        )
    return pd.concat(parts, ignore_index=True).loc[:, columns] if parts else pd.DataFrame(columns=pd.Index(columns))


def curve_chart(lines: Sequence[tuple[str, str, pd.DataFrame]], x_label: str, y_label: str) -> dict[str, Any] | None:
    """Geometry of curves with bands.

    Parameters
    ----------
    lines : sequence of (name, style, DataFrame)
        The frame has the columns x, mean, low, high; the style is a class of the style sheet. Later lines lie on top.
    x_label, y_label : str

    Returns
    -------
    dict or None
        None when there is nothing to draw.
    """
    lines = [line for line in lines if len(line[2])]
    if not lines:
        return None
    everything = pd.concat([frame[["x", "mean", "low", "high"]] for _, _, frame in lines]).to_numpy(dtype=float)
    left, right, top, bottom = 38.0, 312.0, 8.0, 170.0
    x_ticks, x_of = _axis(everything[:, 0], left, right)
    y_ticks, y_of = _axis(everything[:, 1:], bottom, top)
    drawn = []
    for name, style, frame in lines:
        x, mean, low, high = frame[["x", "mean", "low", "high"]].to_numpy(dtype=float).T
        has = np.isfinite(low) & np.isfinite(high)
        edge = np.concatenate([x[has], x[has][::-1]])
        rim = np.concatenate([low[has], high[has][::-1]])
        drawn.append(
            {
                "name": name,
                "style": style,
                "line": _path(x_of(x), y_of(mean)),
                "band": _path(x_of(edge), y_of(rim)) + "Z" if has.sum() > 1 else "",
                "dots": [] if len(x) > 1 else [(float(x_of(x)[0]), float(y_of(mean)[0]))],
            }
        )
    frame = {"left": left, "right": right, "top": top, "bottom": bottom, "width": 320, "height": 208}
    return frame | {"x_ticks": x_ticks, "y_ticks": y_ticks, "x_label": x_label, "y_label": y_label, "lines": drawn}


def box_chart(
    values: Mapping[str, np.ndarray], names: Mapping[str, str], chance: float | None, ceiling: float | None
) -> dict[str, Any] | None:
    """Geometry of one horizontal box for each method, with its points, and lines for chance and ceiling.

    Boxes span the quartiles, whiskers reach the last point within 1.5 box lengths, and the diamond is the mean. Fewer
    than 5 values get no box: quartiles of so few would be read as more than they are.

    Parameters
    ----------
    values : mapping of method to ndarray, shape (n_examples,)
    names : mapping of method to what is written beside its box
    chance, ceiling : float or None
    """
    clean = {key: v[np.isfinite(v)] for key, v in values.items()}
    pool = [v for v in clean.values() if len(v)]
    if not pool:
        return None
    marks = [(kind, float(at)) for kind, at in (("chance", chance), ("ceiling", ceiling)) if at is not None]
    left, right, top, step = 118.0, 342.0, 18.0, 24.0
    ticks, x_of = _axis(np.concatenate([*pool, np.array([at for _, at in marks])]), left, right, bins=4)
    rows = []
    for i, (key, v) in enumerate(clean.items()):
        row: dict[str, Any] = {"name": names[key], "y": top + step * (i + 0.5), "points": [], "box": None, "mean": None}
        if len(v):
            row["points"] = x_of(v).round(1).tolist()
            row["mean"] = float(x_of(np.array([v.mean()]))[0].round(1))
        if len(v) >= 5:
            q1, q2, q3 = np.percentile(v, [25, 50, 75])
            reach = 1.5 * (q3 - q1)
            ends = np.array([v[v >= q1 - reach].min(), q1, q2, q3, v[v <= q3 + reach].max()])
            row["box"] = x_of(ends).round(1).tolist()
        rows.append(row)
    lines = [{"kind": kind, "x": float(x_of(np.array([at]))[0].round(1))} for kind, at in marks]
    bottom = top + step * len(rows)
    return {
        "left": left, "right": right, "top": top, "bottom": bottom, "width": 354, "height": bottom + 22,
        "ticks": ticks, "rows": rows, "marks": lines,
    }  # fmt: skip


def matrix_chart(matrix: pd.DataFrame, names: Mapping[str, str]) -> dict[str, Any]:
    """Geometry of a square matrix with values from -1 to 1: hue is the sign, opacity the size, numbers are printed."""
    left, cell = 118.0, 30.0
    keys = list(matrix.index)
    values = matrix.to_numpy(dtype=float)
    cells = [
        {
            "x": left + j * cell,
            "y": i * cell,
            "value": float(v),
            "strength": 0.0 if np.isnan(v) else float(np.clip(abs(v), 0, 1).round(3)),
            "sign": "neg" if v < 0 else "pos",
            "self": keys[i] == matrix.columns[j],
            "names": (names.get(keys[i], str(keys[i])), names.get(matrix.columns[j], str(matrix.columns[j]))),
        }
        for (i, j), v in np.ndenumerate(values)
    ]
    size = cell * len(keys)
    labels = [{"name": names.get(k, str(k)), "at": (i + 0.5) * cell} for i, k in enumerate(keys)]
    return {"cells": cells, "labels": labels, "left": left, "cell": cell, "size": size, "width": left + size + 2}


def cost_chart(table: pd.DataFrame, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Geometry of stacked bars, forward and backward passes of each method.

    The axis is that of the square root: costs of 1 and 1,000 passes are both visible, and bars still start at 0.
    """
    if not {"forward", "backward"} <= set(table.columns):
        return None
    forward, backward = table[["forward", "backward"]].astype(float).fillna(0.0).to_numpy().T
    top_cost = float((forward + backward).max(initial=0.0))
    if top_cost <= 0:
        return None
    left, right, step = 118.0, 306.0, 22.0
    width = right - left
    first, both = (np.sqrt(v / top_cost) * width for v in (forward, forward + backward))
    rows = [
        {
            "name": names[key], "y": i * step, "forward": round(float(first[i]), 1),
            "backward": round(float(both[i] - first[i]), 1), "counts": (float(forward[i]), float(backward[i])),
        }
        for i, key in enumerate(table.index)
    ]  # fmt: skip
    return {"left": left, "right": right, "step": step, "rows": rows, "width": 360, "height": step * len(rows) + 4}


def bar_chart(scores: np.ndarray, names: Sequence[str], inputs: np.ndarray | None, most: int = 12) -> dict[str, Any]:
    """Geometry of the `most` strongest features, as bars to both sides of 0, strongest first."""
    order = np.argsort(-np.nan_to_num(np.abs(scores)), kind="stable")[:most]
    top = float(np.nanmax(np.abs(scores), initial=0.0)) or 1.0
    signed = bool(np.nanmin(scores, initial=0.0) < 0)
    left, right, step = 118.0, 300.0, 18.0
    zero = (left + right) / 2 if signed else left
    reach = right - zero
    rows = [
        {
            "name": names[k], "y": i * step, "value": float(scores[k]),
            "input": None if inputs is None else float(inputs[k]),
            "x": round(zero + min(0.0, reach * v), 1), "length": round(reach * abs(v), 1),
            "sign": "neg" if v < 0 else "pos",
        }
        for i, k in enumerate(order) for v in [float(np.nan_to_num(scores[k])) / top]
    ]  # fmt: skip
    return {"rows": rows, "zero": zero, "step": step, "width": 340, "height": step * len(rows), "of": len(scores)}


def signal_paths(signal: np.ndarray, width: float, row: float) -> list[str]:
    """Each channel of a recording as a path in its own row, all channels on one scale.

    Parameters
    ----------
    signal : ndarray, shape (channel, time)
    width, row : float
        Width of the picture and height of one channel.
    """
    centred = signal - np.nanmean(np.where(np.isfinite(signal), signal, np.nan), axis=1, keepdims=True)
    top = float(np.nanpercentile(np.abs(centred), 99.5)) or 1.0
    x = (np.arange(signal.shape[1]) + 0.5) * width / signal.shape[1]
    # One point for each half pixel is all that can be seen.
    keep = np.unique(np.linspace(0, signal.shape[1] - 1, min(signal.shape[1], int(2 * width))).astype(int))
    y = np.clip(centred / top, -1.2, 1.2) * -0.42 * row + row * (np.arange(len(signal))[:, None] + 0.5)
    return [_path(x[keep], channel[keep]) for channel in y]


def plot(scores: xr.DataArray, inputs: Any = None, example: int = 0) -> Figure:
    """One example's scores as a matplotlib figure.

    Parameters
    ----------
    scores : DataArray
        As methods return them; see `map_of` for the dimensions.
    inputs : array_like or list, optional
        What the scores are about: images (n, H, W, 3) or (n, 3, H, W), uint8 or floats from 0 to 1; lists of tokens;
        features (n, features); recordings (n, channel, time).
    example : int, default 0

    Returns
    -------
    Figure
        Not known to pyplot: show it by returning it in a notebook, or keep it with ``figure.savefig(path)``.

    Raises
    ------
    InputError
        Scores that cannot be drawn, no such example, or inputs that do not fit the scores.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> figure = plot(xr.DataArray(np.eye(4)[None], dims=("example", "y", "x")))
    >>> len(figure.axes)
    1
    """
    kind = kind_of(scores)
    values = map_of(scores, example)
    if inputs is not None and not hasattr(inputs, "__len__"):
        raise InputError(f"inputs must hold what each example is, got {inputs!r:.60}")
    if inputs is not None and not 0 <= example < len(inputs):
        raise InputError(f"example {example} does not exist; inputs has examples 0 to {len(inputs) - 1}")
    shown = None if inputs is None else inputs[example]
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    title = f"{scores.name or 'scores'}, example {example}"
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    if kind == "image":
        if shown is None:
            axes.imshow(paint(values), interpolation="nearest")
        else:
            axes.imshow(overlay(np.asarray(shown), values))
        axes.set_axis_off()
    elif kind == "series":
        signal = None if shown is None else np.asarray(shown, dtype=np.float64)
        if signal is not None and signal.shape[0] != values.shape[0]:
            raise InputError(f"scores have {values.shape[0]} channels, the input has the shape {signal.shape}")
        extent = (0.0, float(values.shape[1] if signal is None else signal.shape[1]), values.shape[0] - 0.5, -0.5)
        axes.imshow(paint(values), aspect="auto", interpolation="nearest", extent=extent)
        if signal is not None:
            top = np.nanmax(np.abs(signal)) or 1.0
            axes.plot((np.arange(len(signal)) - 0.45 * signal.T / top), color="0.2", linewidth=0.6)
        axes.set(xlabel="time", ylabel="channel")
    else:
        names = (
            names_along(scores, kind, len(values)) if shown is None or kind == "feature" else [str(t) for t in shown]
        )
        if len(names) > len(values):
            raise InputError(f"the input has {len(names)} tokens, the scores only {len(values)}")
        values = values[: len(names)]
        figure.set_size_inches(4.8, max(1.6, 0.22 * len(values) + 0.8))
        colours = [tuple(_NEGATIVE[1] / 255) if v < 0 else tuple(_POSITIVE[1] / 255) for v in values]
        axes.barh(np.arange(len(values)), values, color=colours)
        axes.set_yticks(np.arange(len(values)), [name.replace("$", r"\$") for name in names], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_xlabel("score")
    return figure


def names_along(scores: xr.DataArray, dim: str, n: int) -> list[str]:
    """Names along a dimension: its coordinate, or numbers."""
    if dim in scores.coords:
        return [clean_text(v) for v in scores.coords[dim].to_numpy()]
    return [str(i) if dim == "channel" else f"{dim} {i}" for i in range(n)]


def clean_text(value: Any) -> str:
    """A name as text that can be encoded: halves of surrogate pairs, as broken tokens have them, become "?"."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def rgb(image: np.ndarray) -> np.ndarray:
    """An image as uint8 (H, W, 3); floats from 0 to 1 and channels first are accepted."""
    if image.ndim == 3 and image.shape[-1] != 3 and image.shape[0] == 3:
        image = np.moveaxis(image, 0, -1)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise InputError(f"an image has the shape (H, W, 3) or (3, H, W), got {image.shape}")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind not in "biuf":
        raise InputError(f"an image holds numbers, got {image.dtype}")
    if not np.isfinite(image).all() or image.min() < 0 or image.max() > 1:
        raise InputError("an image of floats has values from 0 to 1; undo the normalisation of the network first")
    return (image * 255).round().astype(np.uint8)


def _axis(
    values: np.ndarray, start: float, stop: float, bins: int = 5
) -> tuple[list[dict[str, Any]], Callable[[np.ndarray], np.ndarray]]:
    """Ticks at round numbers that enclose `values`, and the function from values to positions."""
    shown = values[np.isfinite(values)]
    low, high = (float(shown.min()), float(shown.max())) if shown.size else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    at = MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    first, last = float(at[0]), float(at[-1])

    def place(v: np.ndarray) -> np.ndarray:
        return start + (np.asarray(v, dtype=np.float64) - first) / (last - first) * (stop - start)

    at = np.where(np.abs(at) < 1e-12 * (last - first), 0.0, at)
    return [{"at": round(x, 1), "value": v} for x, v in zip(place(at).tolist(), at.tolist(), strict=True)], place


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """An SVG path through points, broken where one is missing."""
    words, pen = [], "M"
    for a, b in zip(np.round(x, 1).tolist(), np.round(y, 1).tolist(), strict=True):
        if np.isfinite(a) and np.isfinite(b):
            words.append(f"{pen}{a:g} {b:g}")
            pen = "L"
        else:
            pen = "M"
    return "".join(words)
