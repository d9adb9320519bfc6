"""Pages of a few sections: everything is escaped, nothing is half written."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nissl.errors import InputError, RunFolderError
from nissl.report.page import Part, Section, Tokens, cell, write_page

HOSTILE = "<script>alert(1)</script>\"'&"


def page(tmp_path, *parts, **more):
    path = write_page(
        tmp_path / "p.html", HOSTILE, [Section(HOSTILE, HOSTILE, parts)], lead=HOSTILE, command=HOSTILE, **more
    )
    return path.read_text()


def test_every_text_is_escaped(tmp_path):
    figure = Figure(figsize=(1, 1))
    found = page(
        tmp_path, Part(HOSTILE, HOSTILE), Part(pd.DataFrame({HOSTILE: [HOSTILE, 1.5]}), HOSTILE), Part(figure, HOSTILE),
        Part(Tokens([HOSTILE, "b"], [1, -2]), HOSTILE),
    )  # fmt: skip
    assert "<script" not in found
    assert found.count("&lt;script&gt;") >= 8
    assert "http" not in found.replace("http-equiv", "")
    assert 'class="neg" style="--s: 1.0"' in found
    assert 'class="pos" style="--s: 0.5"' in found


def test_numbers_are_short_and_missing_ones_a_dash():
    assert [cell(v) for v in (1.23456, np.float32(0.5), 3, None, np.nan, "a")] == ["1.23", "0.5", "3", "–", "–", "a"]


def test_what_a_page_cannot_hold(tmp_path):
    with pytest.raises(InputError, match="not int"):
        page(tmp_path, Part(3))
    with pytest.raises(InputError, match="2 words need as many scores"):
        page(tmp_path, Part(Tokens(["a", "b"], [1])))
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_page(tmp_path / "nowhere" / "p.html", "a", [])
    assert not list(tmp_path.iterdir())
