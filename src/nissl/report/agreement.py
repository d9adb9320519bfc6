"""The agreement of methods as a matrix, with the truth in a column beside it."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from nissl.errors import InputError


def agreement_figure(found: xr.Dataset, measure: str | None = None, title: str | None = None) -> Figure:
    """Matrix of mean agreements; to its right, where the truth is known, each method's agreement with that.

    Parameters
    ----------
    found : Dataset
        What `nissl.trust.AttributionAgreement.evaluate` or `nissl.trust.compare_maps` gave.
    measure : str, optional
        By default the first.
    title : str, optional

    Returns
    -------
    matplotlib.figure.Figure
        ``.savefig(path)`` writes it. Orange is agreement, blue its opposite; the numbers stand in the cells.

    Raises
    ------
    InputError
        Not such a Dataset, or a measure that it lacks.
    """
    if not isinstance(found, xr.Dataset) or "mean" not in found or "method_a" not in found["mean"].dims:
        raise InputError("agreement_figure draws what AttributionAgreement.evaluate or compare_maps returns")
    measures = [str(m) for m in found["measure"].values]
    measure = measures[0] if measure is None else measure
    if measure not in measures:
        raise InputError(f"no measure {measure!r} here; there are {', '.join(measures)}")
    names = [str(m) for m in found["method_a"].values]
    matrix = found["mean"].sel(measure=measure).transpose("method_a", "method_b").to_numpy()
    truth = found["truth_mean"].sel(measure=measure).to_numpy()[:, None] if "truth_mean" in found else None
    n = len(names)
    cell = 0.62
    figure = Figure(figsize=(cell * (n + (2 if truth is not None else 0)) + 1.9, cell * n + 1.5), layout="constrained")
    axes = [figure.subplots()] if truth is None else list(figure.subplots(1, 2, sharey=True, width_ratios=[n, 1]))
    drawn = [(matrix, names)] + ([] if truth is None else [(truth, ["truth"])])
    for axis, (values, columns) in zip(axes, drawn, strict=True):
        axis.imshow(np.ma.masked_invalid(values), cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axis.set_yticks(range(n), names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        for (i, j), value in np.ndenumerate(values):
            text, colour = (
                ("–", "black")
                if np.isnan(value)
                else (f"{round(value, 2) + 0.0:.2f}", "white" if abs(value) > 0.7 else "black")
            )
            axis.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    axes[0].set_title(title or f"Mean agreement ({measure})", loc="left", fontsize=10)
    return figure
