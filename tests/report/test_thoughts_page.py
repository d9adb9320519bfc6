"""The page of a chain of reasoning: text, escapes, and in a browser pointing, keys, choices and themes."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from nissl.attribution.sentences import Trace, label_by_rules
from nissl.attribution.thoughts import MEASURES, Thoughts
from nissl.errors import InputError, RunFolderError
from nissl.report.thoughts import arcs, thoughts_figure, thoughts_page, write_thoughts
from report_browser import Browser

HOSTILE = "<script>window.hurt=1</script> <img src=x onerror='window.hurt=1'> </style>&amp; {{ 7*7 }} \u2028 <!--"
TEXT = (
    f"We begin with nothing at all. {HOSTILE} is a sentence too. Let's try three. Then 3 + 4 = 7. "
    + "A sentence that is far too long for one row of any window that one could open " * 4
    + ". The answer is 7."
)


def result(matrices: bool = True) -> Thoughts:
    trace = Trace.of(TEXT, prompt=f"Q {HOSTILE}\n")
    n = len(trace)
    moved = np.full((n, n), np.nan)
    moved[np.triu_indices(n, 1)] = 0.0
    moved[1, 3], moved[1, 5], moved[2, 5] = 0.5, -0.25, 0.4
    table = pd.DataFrame(
        {
            "text": [s.text for s in trace.sentences], "tag": label_by_rules([s.text for s in trace.sentences]),
            "resampling_kl": [0.0, 2.0, 1.0, np.nan, 0.5, 0.0], "suppression": [-1.0, 0.5, 4.0, 0.0, 0.0, np.nan],
        }
    ).rename_axis("sentence")  # fmt: skip
    m = xr.DataArray(moved, dims=("source", "target"))
    return Thoughts(
        trace, table, {"moves": m, "suppression": -m} if matrices else {}, None, {"model": HOSTILE, "k": {"a": 1}}
    )


def test_text_is_escaped_and_scores_are_there():
    page = thoughts_page(result())
    assert page.count("<script") == 2  # the data and the page's own
    assert "<img" not in page
    assert "window.hurt=1</script>" not in page
    assert "{{" not in page.replace("{{ 7*7 }}", "")
    assert "sentence 1 matters most" in page
    for words in (*[MEASURES[m] for m in ("resampling_kl", "suppression")], "plan generation", "final answer"):
        assert words in page
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert thoughts_page(result()) == page


def test_arcs_join_the_middles_of_their_rows_and_skip_the_weak():
    matrix = np.full((3, 3), np.nan)
    matrix[0, 1], matrix[0, 2], matrix[1, 2] = 1.0, 0.01, -5.0
    (only,) = arcs(matrix)
    assert (only["source"], only["target"], only["strength"]) == (0, 1, 1.0)
    assert only["path"].startswith("M100 15C")
    assert only["path"].endswith(" 100 45")
    assert [a["strength"] for a in arcs(np.triu(np.ones((4, 4)), 1) * np.arange(1, 5)[:, None], each=1)] == [
        0.333,
        0.667,
        1.0,
    ]
    assert arcs(np.full((3, 3), np.nan)) == []


def test_wrong_results_and_places_are_named(tmp_path):
    broken = result()
    del broken.table["resampling_kl"], broken.table["suppression"]
    with pytest.raises(InputError, match="none of the measures"):
        thoughts_page(broken)
    with pytest.raises(RunFolderError, match="folder that exists"):
        write_thoughts(result(), tmp_path / "no" / "x.html")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no matrix 'x'"):
        thoughts_figure(result(), "x")


def test_the_figure_shows_the_numbers():
    figure = thoughts_figure(result(), "suppression")
    bars, other, matrix = figure.axes[:3]
    assert [p.get_width() for p in bars.patches] == [0, 2, 1, 0, 0.5, 0]
    assert [p.get_width() for p in other.patches] == [-1, 0.5, 4, 0, 0, 0]
    shown = matrix.images[0].get_array()
    assert shown[1, 3] == -0.5
    assert shown[2, 5] == -0.4
    assert bool(shown.mask[3, 1])


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_thoughts(result(), tmp_path_factory.mktemp("page") / "t.html").as_uri()


def pressed(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
        code = {"Enter": 13}.get(key, 0)
        browser.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)


def current(browser: Browser) -> str | None:
    return browser.evaluate("document.querySelector('.sentences [aria-current]')?.dataset.i ?? null")


def panel(browser: Browser) -> str:
    return browser.evaluate("document.getElementById('panel').textContent")


@pytest.mark.parametrize("width", [360, 1280])
def test_quiet_and_no_wider_than_the_window(browser: Browser, url: str, width: int):
    browser.open(url, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert browser.requests() == [url]
    assert browser.evaluate("window.hurt === undefined")
    texts = browser.evaluate("[...document.querySelectorAll('.sentences .words')].map(e => e.textContent)")
    assert texts == [s.text for s in result().trace.sentences]


def test_pointing_shows_what_a_sentence_moves(browser: Browser, url: str):
    browser.open(url)
    assert current(browser) is None
    box = browser.evaluate(
        "(({x, y}) => [x + 90, y + 9])(document.querySelector('[data-i=\"1\"]').getBoundingClientRect())"
    )
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    assert current(browser) == "1"
    said = panel(browser)
    assert HOSTILE.split("\u2028")[0] in said
    assert "Moves most: 3 (0.500)" in said
    assert "Is moved most by: none" in said
    assert browser.evaluate("[...document.querySelectorAll('#own path')].map(p => p.getAttribute('class'))") == [
        "own", "own neg",
    ]  # fmt: skip
    opacity = "Number(getComputedStyle(document.querySelector('{}')).opacity)"
    assert (
        browser.evaluate(opacity.format("#own path"))
        > 0.9
        > 0.1
        > browser.evaluate(opacity.format("g[data-matrix] path"))
    )
    shade = "document.querySelector('[data-i=\"{}\"]').style.getPropertyValue('--t')"
    assert [browser.evaluate(shade.format(i)) for i in (3, 5)] == ["1", "0.5"]
    assert float(browser.evaluate(shade.format(2)) or 0) == 0
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=5, y=5)
    assert current(browser) is None
    assert browser.complaints() == []


def test_the_keyboard_goes_through_sentences_keeps_and_lets_go(browser: Browser, url: str):
    browser.open(url)
    browser.evaluate("document.querySelector('[data-i=\"0\"]').focus()")
    for key, expected in (
        ("ArrowDown", "1"),
        ("ArrowDown", "2"),
        ("ArrowUp", "1"),
        ("End", "5"),
        ("ArrowDown", "5"),
        ("Home", "0"),
    ):
        pressed(browser, key)
        assert current(browser) == expected
        assert browser.evaluate("document.activeElement.dataset.i") == expected
    assert browser.evaluate("document.querySelectorAll('.sentences [tabindex=\"0\"]').length") == 1
    pressed(browser, "ArrowDown")
    pressed(browser, "Enter")
    browser.evaluate("document.querySelector('[data-i=\"4\"]').dispatchEvent(new MouseEvent('mouseenter'))")
    assert current(browser) == "1"  # kept
    pressed(browser, "Escape")
    assert current(browser) is None


def test_other_bars_and_arcs_can_be_chosen(browser: Browser, url: str):
    browser.open(url)
    width = "[...document.querySelectorAll('.bar i')].map(e => Number(e.style.getPropertyValue('--w')))"
    assert browser.evaluate(width) == [0, 1, 0.5, 0, 0.25, 0]
    choose = "(s => {{ s.value = '{1}'; s.dispatchEvent(new Event('change')); }})(document.getElementById('{0}'))"
    browser.evaluate(choose.format("measure", "suppression"))
    assert browser.evaluate(width) == [0, 0.125, 1, 0, 0, 0]
    visible = "[...document.querySelectorAll('g[data-matrix]')].map(g => g.style.display !== 'none')"
    assert browser.evaluate(visible) == [True, False]
    browser.evaluate("document.querySelector('[data-i=\"1\"]').click()")
    browser.evaluate(choose.format("matrix", "suppression"))
    assert browser.evaluate(visible) == [False, True]
    assert "Moves most: 5 (0.250)" in panel(browser)
    assert browser.complaints() == []


def test_a_result_without_matrices_and_both_themes(browser: Browser, tmp_path):
    address = write_thoughts(result(matrices=False), tmp_path / "t.html").as_uri()
    for dark in (False, True):
        browser.open(address, dark=dark)
        colour = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
        assert (browser.evaluate(colour) < 100) == dark
        browser.evaluate("document.getElementById('theme').click()")
        assert (browser.evaluate(colour) < 100) != dark
        browser.evaluate("document.querySelector('[data-i=\"2\"]').click()")
        assert "Let's try three." in panel(browser)
        assert browser.complaints() == []
