"""The report: an audit as one HTML file that works offline, prints, and can be mailed.

Charts are SVG written by our own template. Altair would need a megabyte of scripts in every file and draws nothing
without them; matplotlib's SVG is ten times larger, fixes its colours and turns text into outlines. Ours follows the
reader's theme, can be searched, read aloud and copied, and is there when scripts are forbidden.

All text is hostile until escaped: class names come from data. Jinja escapes it in HTML and SVG; JSON and CSV have their
own escapes below; and a content security policy lets the page load nothing and run only the script it was made with.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd
import xarray as xr
from markupsafe import Markup

from nissl.arguments import as_path, at_least
from nissl.errors import InputError
from nissl.report import figures as fig
from nissl.report.page import write_html

VERDICTS = {
    "believe": "believe",
    "with care": "care",
    "undecided": "undecided",
    "do not believe": "not",
}
BASELINES = ("random", "edge")
_AXES = {
    "insertion": ("share of the input shown", "score of the target"),
    "deletion": ("share of the input removed", "score of the target"),
    "randomisation": ("share of layers randomised", "similarity to the true map"),
    "sensitivity_n": ("number of features removed", "correlation"),
}
_MAP_LENGTH = 168  # pixels; tiles are 100 to 170 wide
_MOST_CHANNELS = 24


@runtime_checkable
class Audited(Protocol):
    """What a report is made of; `nissl.trust.audit.AuditResult` has it.

    Attributes
    ----------
    table : DataFrame
        Index: method. Columns: title, verdict, reasons (list of str); for each figure F any of F, F_low, F_high, F_p;
        optionally notes (list of str or str), and for one example forward, backward (passes) and seconds.
    figures : DataFrame
        Columns method, check, figure, example (-1: not of one example), value.
    figure_info : dict
        Figure to {"check", "title", "better": "higher", "lower" or None, "chance", "ceiling", "help"}.
    curves : DataFrame
        Columns method, check, example, x, y.
    scores : dict of str to DataArray
        Dimensions as in `nissl.report.figures.map_of`.
    inputs : ndarray or list
        Images (n, H, W, 3) uint8; lists of tokens; features (n, features); recordings (n, channel, time).
    input_kind : {"image", "token", "feature", "series"}
    examples : DataFrame
        Columns name, label, predicted, probability; one row for each input.
    agreement : dict of str to DataFrame
        Measure to a square matrix, method by method.
    pictures : list of dict
        {"method", "check", "title", "caption", "image": (h, w) floats or (h, w, 3) uint8}.
    meta : dict
        What is needed to repeat the audit: model, data, seed, fingerprint, versions, n_examples, budget, started,
        seconds, command ... ``axes`` may name the axes of curves: {check: (x, y)}; ``notes`` (list of str) stand below
        the verdicts.
    """

    table: pd.DataFrame
    figures: pd.DataFrame
    figure_info: dict[str, dict[str, Any]]
    curves: pd.DataFrame
    scores: dict[str, xr.DataArray]
    inputs: Any
    input_kind: str
    examples: pd.DataFrame
    agreement: dict[str, pd.DataFrame]
    pictures: list[dict[str, Any]]
    meta: dict[str, Any]


def write_report(result: Audited, path: str | os.PathLike[str], shown: int = 12) -> Path:
    """Write an audit as one HTML file.

    The file appears whole or not at all, and replaces an older one only when it is complete.

    Parameters
    ----------
    result : AuditResult
        See `Audited`.
    path : path-like
        The HTML file; its folder must exist.
    shown : int, default 12
        Maps are drawn for the first `shown` examples. Figures and curves are about all examples, always.

    Returns
    -------
    Path
        Where the report is.

    Raises
    ------
    InputError
        Parts of the result do not fit each other.
    RunFolderError
        The file cannot be written. Nothing is left behind.
    """
    path = as_path("the report", path)
    at_least("shown", shown, 0)
    _check(result)
    write_html(path, render(result, shown))
    return path


def render(result: Audited, shown: int = 12) -> str:
    """The report as text; see `write_report`."""
    script = template("report.js")
    return (
        environment()
        .get_template("report.html")
        .render(
            css=Markup(template("report.css")),
            js=Markup(script),
            js_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            data=Markup(json_text(result)),
            **_page(result, shown),
        )
    )


def template(name: str) -> str:
    """A file of the package."""
    return (resources.files("nissl.report") / "templates" / name).read_text("utf-8")


@cache
def environment() -> jinja2.Environment:
    """Jinja with everything escaped and nothing silently missing; kept, because compiling takes longer than filling."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, p_value=p_value, count=count, short=short, csv=csv_uri, tick=tick, hundredths=hundredths
    )
    return environment


def number(value: Any) -> str:
    """Three significant digits, integers whole, for people; "–" where there is no number."""
    if isinstance(value, (int, np.integer)):
        return f"{value:,}".replace("-", "−")
    v = _float(value)
    if not np.isfinite(v):
        return "–" if np.isnan(v) else ("∞" if v > 0 else "−∞")
    size = abs(v)
    if v == 0:
        text = "0"
    elif size >= 1000:
        text = f"{v:,.0f}" if size < 1e7 else f"{v:.2e}"
    elif size >= 0.001:
        text = f"{v:.{max(0, 2 - int(np.floor(np.log10(size))))}f}" if size >= 1 else f"{v:.3f}"
    else:
        text = f"{v:.1e}"
    return text.replace("-", "−")


def tick(value: float) -> str:
    """A number beside an axis: no more digits than it needs."""
    return f"{value:g}".replace("-", "−")


def hundredths(value: float) -> str:
    """A number in a narrow cell: ".42", "−.07", "1"."""
    if np.isnan(value):
        return "–"
    text = f"{abs(value):.2f}"
    text = text[1:] if text.startswith("0.") else f"{abs(value):.0f}"
    return ("−" if value < 0 and text != ".00" else "") + text


def p_value(value: Any) -> str:
    """A p value as text: "p < .001", "p = .012", or nothing."""
    v = _float(value)
    if np.isnan(v):
        return ""
    return "p < .001" if v < 0.001 else "p = 1" if v >= 0.9995 else f"p = {v:.3f}".replace("0.", ".")


def count(value: Any) -> str:
    """A number of passes: "12,400"."""
    v = _float(value)
    return f"{v:,.0f}" if np.isfinite(v) else "–"


def short(text: Any, most: int = 17) -> str:
    """Text cut to fit beside a chart; the whole is in the title beside it."""
    words = " ".join(str(text).split())
    return words if len(words) <= most else words[: most - 1] + "…"


def csv_uri(frame: pd.DataFrame) -> str:
    """A table as a CSV data URI. Text that a spreadsheet would run as a formula gets a quote before it."""

    def safe(v: Any) -> Any:
        return "'" + v if isinstance(v, str) and v[:1] in ("=", "+", "-", "@", "\t", "\r") else v

    plain = frame.map(safe).rename(columns=safe)
    return "data:text/csv;charset=utf-8," + quote(plain.to_csv(index=False), safe="", errors="replace")


def json_text(result: Audited) -> str:
    """The result as JSON that is safe inside a script element; numbers are not rounded, NaN is null.

    Scores of images and recordings are not in it, only their dimensions and attributes: they are in the run folder.
    """
    scores = {
        key: {"dims": list(s.dims), "shape": list(s.shape), "attrs": s.attrs}
        | ({"values": s.to_numpy()} if result.input_kind in ("token", "feature") else {})
        for key, s in result.scores.items()
    }
    content = {
        "table": result.table.rename_axis("method").reset_index(),
        "figures": result.figures,
        "figure_info": result.figure_info,
        "curves": result.curves,
        "examples": result.examples,
        "agreement": {k: m.rename_axis("method").reset_index() for k, m in result.agreement.items()},
        "scores": scores,
        "input_kind": result.input_kind,
        "meta": result.meta,
    }
    text = json.dumps(_plain(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _plain(value: Any) -> Any:
    """Anything as what JSON can hold; tables become {column: list}."""
    if isinstance(value, pd.DataFrame):
        return {str(c): _plain(value[c].tolist()) for c in value.columns}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return None if value is pd.NA or value is pd.NaT else str(value)


def _float(value: Any) -> float:
    """A number, NaN for what is missing."""
    return float("nan") if value is None or value is pd.NA else float(value)


def _texts(value: Any) -> list[str]:
    """Reasons or notes: a list of text, one text, or nothing."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, Iterable):
        return [str(v) for v in value]
    return []


def _check(result: Audited) -> None:
    """Raise when parts of the result are missing or do not fit each other."""
    if not isinstance(result, Audited):
        raise InputError(f"a report is made of an AuditResult, got {type(result).__name__}")
    need = {
        "table": (result.table, ["title", "verdict", "reasons"]),
        "figures": (result.figures, ["method", "check", "figure", "example", "value"]),
        "curves": (result.curves, ["method", "check", "example", "x", "y"]),
        "examples": (result.examples, ["name", "label", "predicted", "probability"]),
    }
    for name, (frame, columns) in need.items():
        missing = [c for c in columns if c not in frame.columns]
        if missing and len(frame):
            raise InputError(f"result.{name} needs the columns {columns}; {missing} are missing")
    if missing := [c for c in need["table"][1] if c not in result.table.columns]:
        raise InputError(f"result.table needs the columns {missing}")
    if not result.table.index.is_unique:
        raise InputError("result.table has two rows for one method")
    if unknown := set(result.table["verdict"]) - set(VERDICTS):
        raise InputError(f"unknown verdicts {sorted(map(str, unknown))}; known are {list(VERDICTS)}")
    if result.input_kind not in fig.KIND_DIMS:
        raise InputError(f"input_kind {result.input_kind!r} is unknown; known are {list(fig.KIND_DIMS)}")
    n = len(result.inputs)
    if len(result.examples) < n:
        raise InputError(f"{n} inputs, but result.examples describes only {len(result.examples)}")
    for key, s in result.scores.items():
        if key not in result.table.index:
            raise InputError(f"scores of {key!r}, which is not in result.table")
        if fig.kind_of(s) != result.input_kind:
            raise InputError(
                f"scores of {key!r} lie on {tuple(s.dims)}, but the inputs are of kind {result.input_kind!r}"
            )
        if s.sizes["example"] < n:
            raise InputError(f"{n} inputs, but {key!r} has scores of {s.sizes['example']} examples")


def _page(result: Audited, shown: int) -> dict[str, Any]:
    """Everything the template shows, methods in the order of their verdicts."""
    order = sorted(range(len(result.table)), key=lambda i: list(VERDICTS).index(result.table["verdict"].iloc[i]))
    table = result.table.iloc[order]
    keys = [str(k) for k in table.index]
    names = dict(zip(table.index, table["title"].astype(str), strict=True))
    examples = _examples(result, min(shown, len(result.inputs)))
    cells = {k: _cells(result, k, examples) for k in table.index}
    for example in examples:
        example["data"] = _example_data(result, table, cells, example)
    columns = _columns(table, result.figure_info)
    curves = fig.mean_curves(result.curves)
    methods = [
        {
            "id": f"m{i}",
            "key": keys[i],
            "title": names[k],
            "verdict": row["verdict"],
            "mark": VERDICTS[row["verdict"]],
            "rank": list(VERDICTS).index(row["verdict"]),
            "reasons": _texts(row["reasons"]),
            "notes": _texts(row.get("notes")),
            "cost": {c: _float(row[c]) for c in ("forward", "backward", "seconds") if c in table.columns},
            "baseline": k in BASELINES,
            "values": [column["values"][i] for column in columns],
            "cells": cells[k],
            "curves": _curve_figures(curves, k, names, result.meta),
            "data": _summary(cells[k] or [], "example", [e["name"] for e in examples]),
        }
        for i, (k, row) in enumerate(table.iterrows())
    ]
    seen = set(result.figures["figure"]) if len(result.figures) else set()
    return {
        "result_kind": result.input_kind,
        "meta": result.meta,
        "facts": _facts(result.meta),
        "notes": _texts(result.meta.get("notes")),
        "examples": examples,
        "columns": columns,
        "methods": methods,
        "n_examples": int(result.meta.get("n_examples") or len(result.examples)),
        "costs": [c for c in ("forward", "backward", "seconds") if c in table.columns],
        "tally": [(v, VERDICTS[v], int((table["verdict"] == v).sum())) for v in VERDICTS],
        "verdicts": VERDICTS,
        "boxes": [_box_figure(result, table.index, names, f) for f in result.figure_info if f in seen],
        "matrices": [
            {"title": k, "chart": fig.matrix_chart(m, names), "data": m.rename_axis("method").reset_index()}
            for k, m in result.agreement.items()
        ],
        "cost_chart": fig.cost_chart(table, names),
        "cost_data": table[[c for c in ("forward", "backward", "seconds") if c in table.columns]]
        .rename_axis("method")
        .reset_index(),
        "pictures": _pictures(result.pictures, names),
    }


def _columns(table: pd.DataFrame, info: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns of the verdict table, one for each figure that the table has, each with all methods' values."""
    columns = []
    for figure, about in info.items():
        if figure not in table.columns:
            continue
        v, low, high, p = (
            np.array([_float(x) for x in table[c]]) if c in table.columns else np.full(len(table), np.nan)
            for c in (figure, f"{figure}_low", f"{figure}_high", f"{figure}_p")
        )
        chance, ceiling = (_float(about.get(c)) for c in ("chance", "ceiling"))
        span = np.concatenate([v, low, high, [chance]])
        span = span[np.isfinite(span)]
        start, stop = (span.min(), span.max()) if span.size else (0.0, 1.0)
        width = (stop - start) or 1.0
        where = np.stack([v, low, high, np.full(len(v), chance)]) - start
        at = np.round(where / width * 88 + 6, 1)
        best = {"higher": np.nanmax, "lower": np.nanmin}.get(about.get("better") or "")
        top = best(v[np.isfinite(v)]) if best is not None and np.isfinite(v).any() else np.nan
        columns.append(
            {
                "key": figure,
                "title": str(about.get("title") or figure),
                "check": str(about.get("check", "")),
                "better": about.get("better"),
                "help": str(about.get("help", "")),
                "chance": chance,
                "ceiling": ceiling,
                "values": [
                    {"value": v[i], "low": low[i], "high": high[i], "p": p[i], "best": v[i] == top,
                     "at": [None if np.isnan(a) else float(a) for a in at[:, i]]}
                    for i in range(len(v))
                ],
            }
        )  # fmt: skip
    return columns


def _examples(result: Audited, n: int) -> list[dict[str, Any]]:
    """The first n examples: what is known of them, and their input ready to be drawn."""
    kind = result.input_kind
    rows = result.examples.iloc[:n].to_dict("records")
    examples = []
    for i, row in enumerate(rows):
        shown: dict[str, Any] = {}
        if kind == "image":
            image = fig.rgb(np.asarray(result.inputs[i]))
            height, width = fig.fitted(image.shape[0], image.shape[1], 256)
            grey = np.asarray(image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
            shown = {"height": height, "width": width, "photo": fig.data_uri(image), "grey": fig.data_uri(grey)}
        elif kind == "series":
            shown = {"signal": np.asarray(result.inputs[i], dtype=np.float64)}
        elif kind == "token":
            tokens = [fig.clean_text(t) for t in result.inputs[i]]
            # Words need a space between them; pieces of a tokenizer bring their own.
            shown = {"tokens": tokens, "gap": "" if any(t != t.strip() for t in tokens) else " "}
        else:
            shown = {"features": np.asarray(result.inputs[i], dtype=np.float64)}
        known = {k: "" if pd.isna(v) else v for k, v in row.items() if np.ndim(v) == 0}
        examples.append(
            {
                "number": i,
                "wrong": "" not in (known["label"], known["predicted"]) and known["label"] != known["predicted"],
            }
            | {k: known.get(k, "") for k in ("name", "label", "predicted", "probability")}
            | shown
        )
    return examples


def _cells(result: Audited, method: Any, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """One method's scores on each example, ready to be drawn, with a summary in numbers; None without scores."""
    if method not in result.scores:
        return None
    scores = result.scores[method]
    cells = []
    for example in examples:
        values = fig.map_of(scores, example["number"])
        finite = values[np.isfinite(values)]
        cell: dict[str, Any] = {
            "sum": float(finite.sum()),
            "lowest": float(finite.min()) if finite.size else np.nan,
            "highest": float(finite.max()) if finite.size else np.nan,
            "share positive": float((finite > 0).mean()) if finite.size else np.nan,
            "resolution": " × ".join(map(str, values.shape)),
            "blank": not fig.strength(values).any(),
            "missing": int(values.size - finite.size),
        }
        if result.input_kind == "image":
            height, width = fig.fitted(example["height"], example["width"], _MAP_LENGTH)
            cell["map"] = fig.data_uri(fig.paint(fig.resized(values, (height, width))), _MAP_LENGTH, quality=60)
        elif result.input_kind == "token":
            if len(values) < len(example["tokens"]):
                raise InputError(
                    f"example {example['number']} has {len(example['tokens'])} tokens, {method!r} scores {len(values)}"
                )
            part = values[: len(example["tokens"])]
            cell["tokens"] = [
                {
                    "text": t,
                    "value": float(v),
                    "strength": round(0.62 * abs(float(s)), 3),
                    "sign": "neg" if s < 0 else "pos",
                }
                for t, v, s in zip(example["tokens"], part, fig.strength(part), strict=True)
            ]
        elif result.input_kind == "feature":
            names = fig.names_along(scores, "feature", len(values))
            cell["bars"] = fig.bar_chart(values, names, example["features"])
        else:
            cell["series"] = _series(scores, values, example["signal"])
        cells.append(cell)
    return cells


def _series(scores: xr.DataArray, values: np.ndarray, signal: np.ndarray) -> dict[str, Any]:
    """Channel by time scores under the recording; only the strongest channels where there are many."""
    if signal.shape[0] != values.shape[0]:
        raise InputError(f"scores have {values.shape[0]} channels, the recording has the shape {signal.shape}")
    weight = np.nansum(np.abs(values), axis=1)
    keep = np.sort(np.argsort(-weight, kind="stable")[:_MOST_CHANNELS])
    row = max(10.0, min(26.0, 220.0 / len(keep)))
    colour = fig.paint(values)[keep]
    if colour.shape[1] > 400:
        colour = fig.paint(fig.resized(values, (values.shape[0], 400)))[keep]
    names = fig.names_along(scores, "channel", len(values))
    return {
        "map": fig.data_uri(colour, longest=4096, quality=None),
        "paths": fig.signal_paths(signal[keep], 300.0, row),
        "row": row,
        "height": round(row * len(keep), 1),
        "names": [names[i] for i in keep],
        "of": len(values),
    }


def _summary(cells: Sequence[Mapping[str, Any]], by: str, names: Sequence[Any]) -> pd.DataFrame:
    """Maps in numbers, one row each."""
    columns = ["lowest", "highest", "sum", "share positive", "resolution"]
    return pd.DataFrame([{by: n} | {c: cell[c] for c in columns} for n, cell in zip(names, cells, strict=False)])


def _example_data(
    result: Audited, table: pd.DataFrame, cells: Mapping[Any, Any], example: Mapping[str, Any]
) -> pd.DataFrame:
    """All methods' scores of one example: every score of tokens and features, else the maps in numbers."""
    i = example["number"]
    keys = [k for k in table.index if cells[k] is not None]
    if result.input_kind in ("token", "feature") and keys:
        maps = {str(k): fig.map_of(result.scores[k], i) for k in keys}
        if result.input_kind == "token":
            first: list[Any] = example["tokens"]
        else:
            first = fig.names_along(result.scores[keys[0]], "feature", len(maps[str(keys[0])]))
        return pd.DataFrame({result.input_kind: first} | {k: v[: len(first)] for k, v in maps.items()})
    return _summary([cells[k][i] for k in keys], "method", [str(table.loc[k, "title"]) for k in keys])


def _curve_figures(
    curves: pd.DataFrame, method: Any, names: Mapping[Any, str], meta: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One method's curves, each beside those of the two baselines."""
    drawn = []
    for check in curves.loc[curves["method"] == method, "check"].unique():
        rows = curves.loc[curves["check"] == check, :]
        lines = [
            (names[key], "own" if key == method else str(key), rows.loc[rows["method"] == key, :])
            for key in (*(b for b in BASELINES if b != method and b in names), method)
        ]
        x_label, y_label = meta.get("axes", {}).get(check) or _AXES.get(str(check), ("x", "y"))
        chart = fig.curve_chart(lines, str(x_label), str(y_label))
        data = rows.loc[rows["method"].isin([method, *BASELINES]), :].drop(columns="check")
        drawn.append({"title": str(check).replace("_", " "), "chart": chart, "data": data})
    return drawn


def _box_figure(result: Audited, order: pd.Index, names: Mapping[Any, str], figure: str) -> dict[str, Any]:
    """One figure of all methods, box by box."""
    rows = result.figures[result.figures["figure"] == figure]
    about = result.figure_info[figure]
    values = {k: rows.loc[rows["method"] == k, "value"].to_numpy(dtype=float) for k in order}
    chance, ceiling = (None if np.isnan(v) else v for v in (_float(about.get(c)) for c in ("chance", "ceiling")))
    chart = fig.box_chart({k: v for k, v in values.items() if len(v)}, names, chance, ceiling)
    return {
        "title": str(about.get("title") or figure),
        "check": str(about.get("check", "")),
        "better": about.get("better"),
        "help": str(about.get("help", "")),
        "chart": chart,
        "data": rows[["method", "example", "value"]],
    }


def _pictures(pictures: Sequence[Mapping[str, Any]], names: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Extra pictures, grouped by check in the order they came."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for picture in pictures:
        image = np.asarray(picture["image"])
        if image.ndim == 2:
            height, width = fig.fitted(image.shape[0], image.shape[1], 256)
            pixels = fig.paint(fig.resized(image, (height, width)))
            if max(image.shape) <= 64:  # small grids are cells, not a smooth field
                pixels = np.kron(fig.paint(image), np.ones((256 // max(image.shape),) * 2 + (1,), np.uint8))
        else:
            pixels = fig.rgb(image)
        groups.setdefault(str(picture.get("check", "")), []).append(
            {
                "title": str(picture.get("title", "")),
                "caption": str(picture.get("caption", "")),
                "method": names.get(picture.get("method"), str(picture.get("method") or "")),
                "uri": fig.data_uri(pixels, 256),
                "shape": " × ".join(map(str, image.shape[:2])),
                "data": pd.DataFrame(image) if image.ndim == 2 and image.size <= 1024 else None,
            }
        )
    return [{"check": check, "pictures": items} for check, items in groups.items()]


def _facts(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is needed to repeat the audit, as names and text."""
    return [(str(k).replace("_", " "), _fact(v)) for k, v in meta.items() if k not in ("command", "axes", "notes")]


def _fact(value: Any) -> str:
    """A value of meta as text, a table line by line."""
    if isinstance(value, Mapping):
        return "\n".join(
            f"{k} {v if isinstance(v, str) else json.dumps(_plain(v), ensure_ascii=False)}" for k, v in value.items()
        )
    return value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)
