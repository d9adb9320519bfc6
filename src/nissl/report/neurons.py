"""Units of an image network on one page: pick a layer and a unit; see exemplars, words, facets, similar units and effects."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from nissl.arguments import as_path, instance
from nissl.concepts.units import APART, UnitSheets, as_picture
from nissl.report.figures import data_uri
from nissl.report.html import environment, template
from nissl.report.page import cell, write_html

_CLASSES = 5
"""Classes shown at each end of what switching a unit off does."""


def neurons_page(result: UnitSheets, *, command: str = "", longest: int = 128, mean: Any = 0.0, std: Any = 1.0) -> str:
    """Sheets of units as one HTML page that works offline.

    Choosing a layer and a unit shows that unit; the arrow keys go through the list, ``#layer/unit`` in the address leads to one.
    Every picture is stored once, masks as one bit a place. Without scripts a table of all units is there. All text is escaped.

    Parameters
    ----------
    result : UnitSheets
    command : str
        That makes the page again.
    longest : int, default 128
        Pixels of the longer side of pictures.
    mean, std : float or sequence of float, default 0, 1
        Scaling of synthetic pictures, as for `unit_sheets`.

    Returns
    -------
    str
    """
    instance("result", result, UnitSheets)
    data = json.dumps(_data(result, longest, mean, std), allow_nan=False, separators=(",", ":"))
    script = template("neurons.js")
    e = result.exemplars
    return environment().get_template("neurons.html").render(
        css=Markup(template("report.css")), js=Markup(script),
        js_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=Markup(data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")),
        model=e.network.name, sites=e.sites, n_units=len(result), n_images=e.n_images, table=result.table(), cell=cell,
        rule=result.rule, cost=result.cost, command=command, apart=APART, described=result.descriptions is not None,
        switched=result.logits is not None,
    )  # fmt: skip


def write_neurons(result: UnitSheets, path: str | os.PathLike[str], **options: Any) -> Path:
    """Write `neurons_page`, which takes the options, to a file, whole or not at all.

    Raises
    ------
    RunFolderError
        The file cannot be written.
    """
    path = as_path("the report", path)
    write_html(path, neurons_page(result, **options))
    return path


def _data(result: UnitSheets, longest: int, mean: Any, std: Any) -> dict[str, Any]:
    """What the page's script draws: numbers, texts and pictures."""
    e = result.exemplars
    ids = sorted(result.pictures)
    place = {image: i for i, image in enumerate(ids)}
    rows = {(int(s), int(u)): i for i, (s, u) in enumerate(zip(e.site, e.unit, strict=True))}
    used = {c for i in range(len(result)) for c in _ends(result, i)}
    if result.labels is not None:
        used |= {int(result.labels[i]) for i in ids}
    return {
        "model": e.network.name, "n_images": e.n_images, "mask": list(result.masks.shape[2:]), "apart": APART,
        "layers": [
            {"site": s, "total": t, "silent": list(q)}
            for s, t, q in zip(e.sites, result.totals, result.silent, strict=True)
        ],
        "classes": {c: result.class_name(c) for c in sorted(used)},
        "pictures": [
            {
                "src": data_uri(result.pictures[i], longest, 72), "name": f"image {i}" if result.names is None else result.names[i],
                "id": i, "label": None if result.labels is None else int(result.labels[i]),
            }
            for i in ids
        ],
        "units": [_unit(result, i, place, rows, longest, mean, std) for i in range(len(result))],
    }  # fmt: skip


def _unit(
    result: UnitSheets,
    i: int,
    place: dict[int, int],
    rows: dict[tuple[int, int], int],
    longest: int,
    mean: Any,
    std: Any,
) -> dict[str, Any]:
    e = result.exemplars
    said = None if result.descriptions is None else result.descriptions[i]
    kept = int((e.ids[i] >= 0).sum())
    similar = [
        {
            "site": int(s),
            "unit": int(u),
            "r": _number(r),
            "row": rows.get((int(s), int(u))),
            "picture": place.get(int(image)),
        }
        for (s, u), r, image in zip(result.similar[i], result.correlation[i], result.similar_image[i], strict=True)
        if s >= 0
    ]
    return {
        "site": int(e.site[i]), "unit": int(e.unit[i]), "fires": bool(e.fires[i]), "threshold": _number(e.threshold[i]),
        "text": "" if said is None else said.text, "score": _number(math.nan if said is None else said.score),
        "others": [] if said is None else [[text, _number(score)] for text, score in said.others[:4]],
        "selectivity": _number(result.selectivity[i]), "effect": _number(result.effect[i]),
        "exemplars": [
            [place[int(e.ids[i, j])], _number(e.activations[i, j]), int(result.facet[i, j])] for j in range(kept)
        ],
        "masks": base64.b64encode(np.packbits(result.masks[i, :kept].numpy()).tobytes()).decode(),
        "silhouette": _number(result.silhouette[i]), "images": int(result.active[i]),
        "predicted": None if result.predicted is None else [_number(v) for v in result.predicted[i]],
        "flips": None if result.flips is None else _number(result.flips[i]),
        "changes": [
            [c, _number(result.logits[i, c]), None if result.probabilities is None else _number(result.probabilities[i, c])]
            for c in _ends(result, i)
            if result.logits is not None
        ],
        "similar": similar,
        "synthesis": {
            j: data_uri(as_picture(image, mean, std), longest)
            for (row, j), image in result.synthesis.items()
            if row == i
        },
    }  # fmt: skip


def _ends(result: UnitSheets, i: int) -> list[int]:
    """Classes whose output rises or falls most without a unit, those that fall first."""
    if result.logits is None or not result.active[i]:
        return []
    change = result.logits[i]
    order = change.argsort(stable=True).tolist()
    down = [c for c in order[:_CLASSES] if change[c] < 0]
    up = [c for c in order[-_CLASSES:] if change[c] > 0]
    return down + up


def _number(value: Tensor | float) -> float | None:
    """Four significant digits; None where there is no number."""
    v = float(value)
    return float(f"{v:.4g}") if math.isfinite(v) else None
