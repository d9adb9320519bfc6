"""A chain of reasoning as a picture: which sentences matter, and which later ones each of them moves."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup
from matplotlib.figure import Figure

from nissl.arguments import as_path, instance
from nissl.attribution.thoughts import MEASURES, Thoughts
from nissl.errors import InputError
from nissl.report.html import environment, short, template
from nissl.report.page import cell, write_html

_MATRICES = {
    "moves": "how much more often the later sentence is said once this one is (share of texts)",
    "suppression": "how much the predictions of the later sentence change when this one is hidden (log divergence, "
    "against the mean over hidden sentences)",
}
_ROW, _WIDTH = 30, 104  # pixels: height of a sentence, width of the arcs beside them


def thoughts_page(result: Thoughts) -> str:
    """The sentences of a trace as a list with arcs, as one HTML page that works offline.

    Pointing at a sentence, or moving to it with the arrow keys, shows which later sentences it moves; Enter or a click
    keeps it. Without scripts the strongest arcs and a table of all scores are there. All text is escaped.

    Parameters
    ----------
    result : Thoughts

    Returns
    -------
    str

    Raises
    ------
    InputError
        Not a result, or one without any measure.
    """
    instance("result", result, Thoughts)
    measures = {c: title for c, title in MEASURES.items() if c in result.table.columns}
    matrices = {name: m.transpose("source", "target").to_numpy() for name, m in result.matrices.items()}
    if not measures:
        raise InputError(
            f"the table has none of the measures {', '.join(MEASURES)}; it has {list(result.table.columns)}"
        )
    values = {c: result.table[c].to_numpy(dtype=float) for c in measures}
    first = next(iter(measures))
    top = int(np.nanargmax(values[first])) if np.isfinite(values[first]).any() else None
    rows = [
        {"text": s.text, "tag": str(tag), "width": _bar(values[first])[i], "value": cell(values[first][i])}
        for i, (s, tag) in enumerate(zip(result.trace.sentences, result.table["tag"], strict=True))
    ]
    data = {
        "row": _ROW, "width": _WIDTH,
        "texts": [r["text"] for r in rows],
        "values": {c: _listed(v) for c, v in values.items()},
        "bars": {c: _bar(v) for c, v in values.items()},
        "matrices": {name: [_listed(r) for r in m] for name, m in matrices.items()},
    }  # fmt: skip
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    script = template("thoughts.js")
    return environment().get_template("thoughts.html").render(
        css=Markup(template("report.css")), js=Markup(script),
        js_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")),
        rows=rows, measures=measures, top=top, row=_ROW, width=_WIDTH, cell=cell,
        matrices={name: {"title": _MATRICES.get(name, name), "arcs": arcs(m)} for name, m in matrices.items()},
        prompt=result.trace.prompt, table=result.table, meta={k: _said(v) for k, v in result.meta.items()},
    )  # fmt: skip


def write_thoughts(result: Thoughts, path: str | os.PathLike[str]) -> Path:
    """Write `thoughts_page` to a file, whole or not at all.

    Raises
    ------
    RunFolderError
        The file cannot be written.
    """
    path = as_path("the report", path)
    write_html(path, thoughts_page(result))
    return path


def arcs(matrix: np.ndarray, each: int = 2) -> list[dict[str, Any]]:
    """Geometry of the strongest positive entries (source, target): at most `each` a source, the weakest first."""
    top = float(np.nanmax(matrix, initial=0))
    found = []
    for i, row in enumerate(matrix):
        strengths = np.where(np.isfinite(row), row, 0)
        for j in np.argsort(-strengths, kind="stable")[:each]:
            if strengths[j] > 0.05 * top:
                reach = 10 + (_WIDTH - 20) * (abs(j - i) / len(matrix)) ** 0.6
                a, b, x = (i + 0.5) * _ROW, (j + 0.5) * _ROW, _WIDTH - 4 - reach
                path = f"M{_WIDTH - 4} {a:g}C{x:.1f} {a:g} {x:.1f} {b:g} {_WIDTH - 4} {b:g}"
                found.append(
                    {"source": i, "target": int(j), "strength": round(float(strengths[j]) / top, 3), "path": path}
                )
    return sorted(found, key=lambda arc: arc["strength"])


def thoughts_figure(result: Thoughts, matrix: str | None = None) -> Figure:
    """The same in print: importance of each sentence as bars, and a matrix of who moves whom.

    Parameters
    ----------
    result : Thoughts
    matrix : str, optional
        ``"moves"`` or ``"suppression"``; by default the first that the result has.

    Returns
    -------
    matplotlib.figure.Figure
    """
    instance("result", result, Thoughts)
    measures = [c for c in MEASURES if c in result.table.columns]
    matrix = next(iter(result.matrices), None) if matrix is None else matrix
    if not measures or matrix not in result.matrices:
        raise InputError(
            f"there is no measure, or no matrix {matrix!r}; matrices are {', '.join(result.matrices) or 'none'}"
        )
    n = len(result.trace)
    figure = Figure(figsize=(10, 1.4 + 0.24 * n), layout="constrained")
    widths = [1.0] * len(measures) + [2.6]
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    y = np.arange(n)
    for axis, measure in zip(axes, measures, strict=False):
        axis.barh(y, np.nan_to_num(result.table[measure].to_numpy(dtype=float)), color="#5b3a91", height=0.7)
        axis.set_title(MEASURES[measure].replace(" ", "\n", 1), fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
    axes[0].set_yticks(y, [f"{i}  {short(s.text, 34)}" for i, s in enumerate(result.trace.sentences)], fontsize=7)
    values = result.matrices[matrix].transpose("source", "target").to_numpy()
    limit = float(np.nanmax(np.abs(values), initial=0)) or 1.0
    image = axes[-1].imshow(values, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axes[-1].set_title(f"{matrix}: row moves column", fontsize=8)
    axes[-1].set_xlabel("later sentence", fontsize=7)
    axes[-1].set_yticks([])
    axes[-1].tick_params(labelsize=7)
    figure.colorbar(image, ax=axes[-1]).ax.tick_params(labelsize=7)
    for axis in axes:
        axis.set_ylim(n - 0.5, -0.5)
    return figure


def _listed(values: np.ndarray | xr.DataArray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=float)]


def _bar(values: np.ndarray) -> list[float]:
    """Lengths from 0 to 1 of bars from 0; those of negative and missing values are 0."""
    top = float(np.nanmax(values, initial=0))
    return [round(max(float(v), 0) / top, 4) if np.isfinite(v) and top > 0 else 0.0 for v in values]


def _said(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
