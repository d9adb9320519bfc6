"""The report as a file: whole, harmless, true to its data."""

import copy
import csv
import io
import json
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from report_sample import Result, sample

from nissl.errors import InputError, RunFolderError
from nissl.report import html, write_report

KINDS = ["image", "token", "feature", "series"]
ATTACKS = [
    "<img src=x onerror=alert(1)>",
    "</script><script>window.hurt=1</script>",
    "</style></title></svg></textarea><svg onload=alert(1)>",
    "\" onmouseover='alert(1)' x=\"",
    "{{ 7 * 7 }}{% raw %}",
    "<!--<script>",
    "日本語 \u202eright to left\u202c 🧠 \x00",
]
HOSTILE = [" ".join(ATTACKS), "W" * 3000]


class Page(HTMLParser):
    """Tags with their attributes, text by element, in the order of the file."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.data = ""
        self._in_data = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_data = tag == "script" and dict(attrs).get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data
        self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False

    def structure(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(attrs)) for tag, attrs in self.tags]


def renamed(result: Result, text: str) -> Result:
    """The result with `text` wherever a name from outside may stand."""
    r = copy.deepcopy(result)
    mark: Callable[[Any], str] = lambda name: f"{text}{name}"  # noqa: E731
    r.table["title"] = r.table["title"].map(mark)
    r.table["reasons"] = [[mark("why"), mark("more")] for _ in r.table.index]
    r.table["notes"] = [mark("note") for _ in r.table.index]
    keep = {k: k if k in ("edge", "random") else mark(k) for k in r.table.index}
    r.table = r.table.rename(index=keep)
    figures = {f: mark(f) for f in r.figure_info}
    ends = ("", "_low", "_high", "_p")
    r.table = r.table.rename(columns={f + end: new + end for f, new in figures.items() for end in ends})
    r.figure_info = {
        figures[f]: about | {c: mark(about[c]) for c in ("title", "check", "help")}
        for f, about in r.figure_info.items()
    }
    r.figures = r.figures.assign(
        method=r.figures["method"].map(keep),
        figure=r.figures["figure"].map(figures),
        check=r.figures["check"].map(mark),
    )
    r.curves = r.curves.assign(method=r.curves["method"].map(keep), check=r.curves["check"].map(mark))
    r.scores = {keep[k]: s for k, s in r.scores.items()}
    if r.input_kind in ("feature", "series"):
        dim = "feature" if r.input_kind == "feature" else "channel"
        r.scores = {
            k: s.assign_coords({dim: [mark(i) for i in range(s.sizes[dim])]}) if dim in s.dims else s
            for k, s in r.scores.items()
        }
    if r.input_kind == "token":
        r.inputs = [[mark(t) for t in tokens] for tokens in r.inputs]
    for column in ("name", "label", "predicted"):
        r.examples[column] = r.examples[column].map(mark)
    r.agreement = {mark(k): m.rename(index=keep, columns=keep) for k, m in r.agreement.items()}
    r.pictures = [p | {c: mark(p[c]) for c in ("check", "title", "caption")} | {"method": "other"} for p in r.pictures]
    r.meta = {k: mark(v) if isinstance(v, str) else v for k, v in r.meta.items()} | {text: text, "list": [text]}
    # Half of a character, as broken tokens have it; tables cannot hold it, lists can.
    r.meta["half"] = "\ud800"
    if r.input_kind == "token":
        r.inputs[0][0] += "\ud800"
    r.meta["notes"] = [mark("note")]
    r.meta["axes"] = {mark("insertion"): (text, text)}
    return r


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    made = {kind: sample(kind, n=4, methods=4) for kind in KINDS}
    for result in made.values():
        result.pictures = result.pictures[::6]
    return made


@pytest.fixture(scope="module")
def tiny() -> Result:
    return sample("feature", n=2, methods=3)


@pytest.fixture(scope="module")
def rendered(results: dict[str, Result]) -> dict[str, str]:
    return {kind: html.render(result) for kind, result in results.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_one_piece(rendered: dict[str, str], kind: str) -> None:
    page = Page(rendered[kind])
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
                assert value is not None
                assert value.startswith("data:") or value[1:] in ids, f"{tag} {name} {value[:80]}"
            if name == "style":
                assert value is None or "url(" not in value
    assert "url(" not in rendered[kind].split("</style>")[0]
    assert "@import" not in rendered[kind]


def test_the_file_is_the_page(results: dict[str, Result], rendered: dict[str, str], tmp_path: Path) -> None:
    path = write_report(results["image"], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text("utf-8") == rendered["image"]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_unique_and_pictures_have_names(rendered: dict[str, str], kind: str) -> None:
    page = Page(rendered[kind])
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        if tag == "img":
            assert attrs.get("alt")
        if tag == "svg":
            assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, HOSTILE[0]) for kind in KINDS] + [("token", HOSTILE[1])], ids=[*KINDS, "long"]
)
def test_hostile_names_stay_text(results: dict[str, Result], kind: str, text: str, tmp_path: Path) -> None:
    small = copy.deepcopy(results[kind])
    small.inputs, small.examples, small.pictures = small.inputs[:2], small.examples[:2], small.pictures[:1]
    path = write_report(renamed(small, text), tmp_path / "report.html")
    page = Page(path.read_bytes().decode("utf-8"))
    harmless = Page(html.render(renamed(small, "x" * 20 + " ")))
    assert page.structure() == harmless.structure()
    assert text in "".join(page.texts)  # it is there, not dropped


def test_the_json_is_the_data(results: dict[str, Result]) -> None:
    for text in HOSTILE:
        result = renamed(results["token"], text)
        result.figures.loc[0, "value"] = np.nan
        body = html.json_text(result)
        assert "<" not in body
        found = json.loads(body)
        assert json.loads(Page(f'<script id="data">{body}</script>').data) == found
        assert found["table"]["method"] == list(result.table.index)
        assert found["figures"]["value"][0] is None
        assert found["figures"]["value"][1:4] == result.figures["value"][1:4].tolist()
        assert found["curves"]["y"] == result.curves["y"].tolist()
        key = next(iter(result.scores))
        assert found["scores"][key]["values"] == result.scores[key].values.tolist()


def cells(page: str) -> dict[str, list[tuple[str, str]]]:
    """Method to (exact value, shown text) of its row in the verdict table."""
    body = re.search(r'<table class="verdicts".*?<tbody>(.*?)</tbody>', page, re.S)
    assert body is not None
    rows = {}
    for key, row in re.findall(r'<tr data-method="([^"]*)"(.*?)</tr>', body[1], re.S):
        found = re.findall(r'<t[hd][^>]*data-v="([^"]*)"[^>]*>(.*?)</t[hd]>', row, re.S)
        rows[key] = [(exact, " ".join(unescape(re.sub("<[^>]*>", " ", shown)).split())) for exact, shown in found]
    return rows


def test_numbers_in_the_table_equal_the_data(results: dict[str, Result], rendered: dict[str, str]) -> None:
    result = results["image"]
    rows = cells(rendered["image"])
    assert set(rows) == set(result.table.index)
    for key, row in result.table.iterrows():
        found = rows[str(key)]
        assert found[0][0] == row["title"]
        assert row["verdict"] in found[1][1]
        assert all(reason in found[1][1] for reason in row["reasons"])
        for figure, (exact, shown) in zip(result.figure_info, found[2:6], strict=True):
            if np.isnan(row[figure]):
                assert (exact, shown) == ("nan", "–")
                continue
            assert float(exact) == row[figure]
            assert html.number(row[figure]) in shown
            assert f"[{html.number(row[figure + '_low'])}, {html.number(row[figure + '_high'])}]" in shown
        assert "p < .001" in found[2][1] or "p = .300" in found[2][1]
        assert [float(exact) for exact, _ in found[6:]] == [row["forward"], row["backward"], row["seconds"]]


def test_methods_come_in_the_order_of_their_verdicts() -> None:
    result = sample("feature", n=2, methods=6)
    result.table = result.table.iloc[::-1]
    shown = [result.table.loc[k, "verdict"] for k in cells(html.render(result))]
    assert shown == sorted(shown, key=list(html.VERDICTS).index)


def test_csv_beside_a_figure_is_its_data(results: dict[str, Result], rendered: dict[str, str]) -> None:
    result = results["image"]
    links = [a for _, a in Page(rendered["image"]).tags if (a.get("href") or "").startswith("data:text/csv")]
    boxes = [a for a in links if (a["download"] or "").startswith("figure-")]
    assert len(boxes) == len(result.figure_info)
    text = unquote((boxes[0]["href"] or "").partition(",")[2])
    found = pd.read_csv(io.StringIO(text))
    expected = result.figures[result.figures["figure"] == "faithfulness"]["value"]
    assert np.array_equal(found["value"], expected)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@sum", "\tx"])
def test_csv_holds_no_formula(text: str) -> None:
    uri = html.csv_uri(pd.DataFrame({text: [text, 'a,"b"\nc'], "v": [-1.5, 2.0]}))
    rows = list(csv.reader(io.StringIO(unquote(uri.partition(",")[2]))))
    assert rows[:2] == [["'" + text, "v"], ["'" + text, "-1.5"]]
    assert rows[2] == ['a,"b"\nc', "2.0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"), (-0.5, "−0.500"), (12.345, "12.3"), (123.4, "123"), (12345.6, "12,346"), (0.0, "0"),
        (3e-5, "3.0e−05"), (float("nan"), "–"), (None, "–"), (7, "7"), (float("inf"), "∞"), (9.999, "10.00"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert html.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0004, "p < .001"), (0.0123, "p = .012"), (1.0, "p = 1"), (float("nan"), ""), (0.001, "p = .001")],
)
def test_p_values_for_people(value: float, text: str) -> None:
    assert html.p_value(value) == text


def test_paths_that_cannot_be_written(tiny: Result, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path, reason in [
        (tmp_path, "directory"),
        (tmp_path / "no" / "report.html", "No such file"),
        (file / "report.html", "Not a directory"),
        (tmp_path / ("n" * 300), "too long"),
    ]:
        with pytest.raises(RunFolderError, match=reason):
            write_report(tiny, path)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


def test_a_failed_write_leaves_the_old_report(tiny: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html.os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left"):
        write_report(tiny, path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_report(tiny, path)
    assert path.read_text("utf-8").startswith("<!doctype html>")


def broken(result: Result, change: Callable[[Result], None]) -> Result:
    r = copy.deepcopy(result)
    change(r)
    return r


def set_(r: Any, name: str, value: Any) -> None:
    setattr(r, name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: set_(r, "table", r.table.drop(columns="verdict")), "verdict"),
        (lambda r: r.table.__setitem__("verdict", "maybe"), "maybe"),
        (lambda r: set_(r, "table", pd.concat([r.table, r.table])), "two rows"),
        (lambda r: set_(r, "figures", r.figures.drop(columns="value")), "value"),
        (lambda r: set_(r, "input_kind", "video"), "video"),
        (lambda r: set_(r, "input_kind", "token"), "lie on"),
        (lambda r: set_(r, "examples", r.examples[:1]), "describes only 1"),
        (lambda r: r.scores.update(other=r.scores["ig"]), "other"),
        (lambda r: r.scores.update(ig=r.scores["ig"][:2]), "2 examples"),
    ],
)
def test_parts_that_do_not_fit(
    results: dict[str, Result], change: Callable[[Result], None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        write_report(broken(results["image"], change), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_channels_that_do_not_fit(results: dict[str, Result], tmp_path: Path) -> None:
    tokens = broken(results["token"], lambda r: r.inputs[0].extend(["more"] * 99))
    with pytest.raises(InputError, match="tokens"):
        write_report(tokens, tmp_path / "report.html")
    series = broken(results["series"], lambda r: set_(r, "inputs", r.inputs[:, :2]))
    with pytest.raises(InputError, match="channels"):
        write_report(series, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_audit_with_almost_nothing_in_it(results: dict[str, Result], kind: str) -> None:
    def strip(r: Result) -> None:
        r.curves, r.figures = r.curves.iloc[:0], r.figures.iloc[:0]
        r.agreement, r.pictures, r.meta = {}, [], {}
        r.scores.pop("ig")
        r.table = r.table[["title", "verdict", "reasons"]]
        r.examples = r.examples.assign(label=None, predicted="", probability=np.nan)

    page = html.render(broken(results[kind], strip))
    assert "There are no scores of this method" in page
    assert 'id="agreement"' not in page
    assert 'id="truth"' not in page
    assert 'id="checks"' not in page


def test_no_methods_and_no_examples(tiny: Result) -> None:
    none = broken(tiny, lambda r: set_(r, "table", r.table.iloc[:0]))
    none.scores = {}
    assert "0 methods explained" in html.render(none)
    assert 'id="side"' not in html.render(tiny, shown=0)


def test_only_the_first_examples_are_drawn(results: dict[str, Result]) -> None:
    page = html.render(results["image"], shown=2)
    assert page.count('<article class="example">') == 2
    assert "The first 2 of 4 examples." in page


def test_flat_and_missing_maps_say_so(results: dict[str, Result]) -> None:
    def spoil(r: Result) -> None:
        r.scores["edge"] = r.scores["edge"] * 0
        r.scores["random"][0, 5, 7] = np.nan

    text = " ".join(Page(html.render(broken(results["image"], spoil), shown=1)).texts)
    assert text.count("the same everywhere") == 2  # under the method and side by side
    assert "1 scores missing" in text


def test_twelve_methods_on_twelve_images_fit_in_a_mail(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photos = rng.integers(0, 256, (12, 28, 28, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    path = write_report(sample("image", 12, 12, photos=photos), tmp_path / "report.html")
    assert path.stat().st_size < 8e6
