"""The report in a browser: no complaint, no request, sorting, themes, no sideways scrolling."""

from pathlib import Path

import numpy as np
import pytest
from report_sample import Result, sample
from test_html import HOSTILE, KINDS, renamed

from nissl.report import write_report
from report_browser import Browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Result, str]]:
    folder: Path = tmp_path_factory.mktemp("pages")
    made = {kind: sample(kind, *((6, 6) if kind == "image" else (2, 3))) for kind in KINDS}
    return {k: (r, write_report(r, folder / f"{k}.html").as_uri()) for k, r in made.items()}


def order(browser: Browser) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('#table tbody tr')].map(r => r.dataset.method)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [360, 1280])
def test_quiet_and_no_wider_than_the_window(
    browser: Browser, pages: dict[str, tuple[Result, str]], kind: str, width: int
) -> None:
    url = pages[kind][1]
    browser.open(url, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert browser.requests() == [url]


def test_the_policy_stops_what_is_put_in(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    browser.open(pages["image"][1])
    browser.evaluate(
        """(() => { const s = document.createElement('script'); s.textContent = 'window.hurt = 1';
        document.body.append(s);
        const i = new Image(); i.src = 'http://localhost:9/x.png'; document.body.append(i); })()"""
    )
    complaints = " ".join(browser.complaints())
    assert "script-src" in complaints
    assert "img-src" in complaints
    assert browser.evaluate("window.hurt === undefined")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_do_nothing(
    browser: Browser, pages: dict[str, tuple[Result, str]], text: str, tmp_path: Path
) -> None:
    small = pages["token"][0]
    browser.open(write_report(renamed(small, text), tmp_path / "r.html").as_uri(), width=360)
    assert browser.complaints() == []
    assert browser.evaluate("window.hurt === undefined && !document.querySelector('img[onerror], svg[onload]')")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 360
    found = browser.evaluate("JSON.parse(document.getElementById('data').textContent).examples.name[0]")
    assert found == f"{text}{small.examples['name'][0]}"


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("column", ["faithfulness", "max_sensitivity", "seconds"])
def test_the_address_sorts_the_table(
    browser: Browser, pages: dict[str, tuple[Result, str]], column: str, down: bool
) -> None:
    result, url = pages["image"]
    browser.open(f"{url}#sort={column}:{'desc' if down else 'asc'}")
    expected = result.table.sort_values(column, ascending=not down, na_position="last", kind="stable")
    assert order(browser) == list(expected.index)
    head = browser.evaluate(f"document.querySelector('th[data-key={column}]').getAttribute('aria-sort')")
    assert head == ("descending" if down else "ascending")
    assert browser.evaluate("document.querySelectorAll('th[aria-sort]').length") == 1
    if column == "max_sensitivity":
        assert np.isnan(result.table.loc[order(browser)[-1], column])


def test_a_click_sorts_and_another_turns_it_round(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    result, url = pages["image"]
    browser.open(url)
    for ascending in (False, True):
        browser.evaluate("document.querySelector('th[data-key=gridpg] button').click()")
        browser.evaluate("new Promise(done => setTimeout(done, 50))")
        assert order(browser) == list(result.table.sort_values("gridpg", ascending=ascending).index)
    assert browser.evaluate("location.hash") == "#sort=gridpg:asc"
    browser.evaluate("location.hash = '#sort=%E0%A4%A:asc'")  # no such column, not even text
    browser.evaluate("new Promise(done => setTimeout(done, 50))")
    assert order(browser) == list(result.table.sort_values("gridpg").index)
    assert browser.complaints() == []


def test_names_sort_as_words(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    result, url = pages["image"]
    browser.open(f"{url}#sort=method:asc")
    titles = [result.table.loc[k, "title"] for k in order(browser)]
    assert titles == sorted(result.table["title"], key=str.lower)


def test_themes(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    def light() -> float:
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        return float(np.mean([int(v) for v in colour[4:-1].split(",")]))

    for dark in (False, True):
        browser.open(pages["image"][1], dark=dark)
        assert (light() < 60) == dark
        browser.evaluate("document.getElementById('theme').click()")
        assert (light() < 60) != dark
        browser.evaluate("document.getElementById('theme').click()")
        assert (light() < 60) == dark


def test_the_slider_fades_the_photograph(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    browser.open(pages["image"][1])
    browser.evaluate("(p => { p.value = 10; p.dispatchEvent(new Event('input')); })(document.getElementById('photo'))")
    assert browser.evaluate("getComputedStyle(document.querySelector('.map .photo')).opacity") == "0.1"
    assert browser.complaints() == []


def test_maps_are_painted(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    """Every picture decodes, and every reference inside the page leads somewhere."""
    browser.open(pages["image"][1])
    script = """Promise.all([...document.querySelectorAll('img, image')].map(async (e) => {
        const i = new Image(); i.src = e.getAttribute('src') || e.getAttribute('href');
        await i.decode(); return i.width; }))"""
    widths = browser.evaluate(script)
    assert len(widths) == 2 * 6 + 6 * 6 + len(pages["image"][0].pictures)
    assert min(widths) > 16
    script = (
        "[...document.querySelectorAll('use')].every(u => document.getElementById(u.getAttribute('href').slice(1)))"
    )
    assert browser.evaluate(script)


def test_it_reads_without_scripts(browser: Browser, pages: dict[str, tuple[Result, str]]) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(pages["image"][1])
        root = browser.send("DOM.getDocument")["root"]["nodeId"]
        rows = browser.send("DOM.querySelectorAll", nodeId=root, selector="#table tbody tr")["nodeIds"]
        idle = browser.send("DOM.querySelectorAll", nodeId=root, selector="button[hidden]")["nodeIds"]
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert len(rows) == 6
    assert len(idle) == 2  # the theme and the JSON button, which would do nothing
