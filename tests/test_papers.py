"""The registry of papers: complete, unique, true, and in our own words."""

import csv
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from nissl.errors import InputError
from nissl.papers import PAPERS, ROOMS, Paper, paper, papers_markdown

ROOT = Path(__file__).parents[1]
SHARED = ROOT / ".." / "shared"

WORKING = [p for p in PAPERS if p.status == "works"]


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the specification ({name}) does not lie beside the repository")
    return path


def test_there_are_59_papers_with_unique_slugs() -> None:
    assert len(PAPERS) == 59
    assert len({p.slug for p in PAPERS}) == 59
    assert len({p.title for p in PAPERS}) == 59


def test_rows_are_well_formed() -> None:
    for p in PAPERS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", p.slug), p.slug
        assert p.room in ROOMS
        assert 2010 < p.year < 2030
        assert p.about.endswith("."), p.slug
        assert 8 <= len(p.about.split()) <= 45, p.slug
        assert "  " not in p.about, p.slug
        assert "|" not in p.title + p.about, p.slug


def test_rows_equal_the_specification() -> None:
    with shared("papers.tsv").open(encoding="utf-8", newline="") as file:
        rows = [(r["slug"], r["title"], int(r["year"]), r["room"]) for r in csv.DictReader(file, delimiter="\t")]
    assert [(p.slug, p.title, p.year, p.room) for p in PAPERS] == rows


def runs(text: str, n: int = 8) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_sentences_are_our_own() -> None:
    taken = runs(shared("abstracts.md").read_text(encoding="utf-8"))
    copied = {p.slug: run for p in PAPERS for run in runs(p.about) & taken}
    assert copied == {}


def test_the_check_for_copied_sentences_finds_one() -> None:
    abstract = shared("abstracts.md").read_text(encoding="utf-8").splitlines()[6]
    assert runs(" ".join(abstract.split()[5:15])) <= runs(abstract)
    assert runs(" ".join(abstract.split()[5:15]))


def test_some_paper_works() -> None:
    assert WORKING


@pytest.mark.parametrize("row", WORKING, ids=lambda p: p.slug)
def test_a_paper_that_works_has_an_object_and_a_study(row: Paper) -> None:
    assert row.object is not None
    assert row.study is not None
    module, _, name = row.object.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))
    assert callable(importlib.import_module(row.study).run)


def test_a_row_cannot_claim_to_work_without_evidence() -> None:
    with pytest.raises(InputError, match="no object or no study"):
        dataclasses.replace(paper("diffroar"), status="works")
    with pytest.raises(InputError, match="rooms are attribution"):
        dataclasses.replace(paper("diffroar"), room="kitchen")


def test_lookup_names_near_matches() -> None:
    assert paper("relp").year == 2025
    with pytest.raises(InputError, match=r"no paper is called 'difful'.*did you mean difull"):
        paper("difful")
    with pytest.raises(InputError, match="nissl papers"):
        paper("zzzzzzzz")


def test_the_table_is_up_to_date() -> None:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert text == papers_markdown(), "docs/papers.md is behind the registry; run `make tables`"
    assert all(text.count(f"| `{p.slug}`: ") == 1 for p in PAPERS)
