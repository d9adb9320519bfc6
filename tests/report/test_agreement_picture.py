"""The picture of an agreement: every number where it belongs, the truth in a column of its own."""

import io

import numpy as np
import pytest

from nissl.errors import InputError
from nissl.report import agreement_figure
from nissl.trust.agreement import compare_maps


def numbers(axis) -> np.ndarray:
    found = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axis.texts}
    rows, columns = (max(k[i] for k in found) + 1 for i in (0, 1))
    return np.array([[found[i, j] for j in range(columns)] for i in range(rows)])


def test_cells_hold_the_means_and_the_truth_stands_beside():
    rng = np.random.default_rng(0)
    maps = {"a": rng.random((5, 8)), "b": rng.random((5, 8)), "flat": np.ones((5, 8))}
    found = compare_maps(maps, ("kendall", "spearman"), truth=rng.random((5, 8)))
    figure = agreement_figure(found, "spearman", title="T")
    matrix, truth = figure.axes
    assert numbers(matrix)[0, 1] == f"{float(found['mean'].sel(measure='spearman', method_a='a', method_b='b')):.2f}"
    assert numbers(matrix)[2].tolist() == ["–", "–", "–"]  # undefined is not zero
    assert numbers(truth)[1, 0] == f"{float(found['truth_mean'].sel(measure='spearman', method_a='b')):.2f}"
    assert [t.get_text() for t in matrix.get_xticklabels()] == ["a", "b", "flat"]
    assert [t.get_text() for t in truth.get_xticklabels()] == ["truth"]
    assert matrix.get_title(loc="left") == "T"
    held = io.BytesIO()
    figure.savefig(held, format="png")
    assert 1000 < len(held.getvalue()) < 100_000
    assert len(agreement_figure(compare_maps(maps)).axes) == 1


def test_other_things_are_refused():
    with pytest.raises(InputError, match="spearman"):
        agreement_figure(compare_maps({"a": np.random.default_rng(0).random((2, 4))}, ("spearman",)), "kendall")
    with pytest.raises(InputError, match="compare_maps"):
        agreement_figure(compare_maps({"a": np.random.default_rng(0).random((2, 4))})[["value"]])
