"""What the documentation says is run: its Python blocks, its commands, its tables."""

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@dataclass
class Block:
    """Fenced code of a page; `line` is the line of its first statement, `file` the name that its title gives it."""

    line: int
    code: str
    file: str | None = None


def blocks(text: str, language: str) -> list[Block]:
    found = re.finditer(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, flags=re.M | re.S)
    return [Block(text.count("\n", 0, m.start(3)) + 1, m[3], m[2]) for m in found if m[1] == language]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_blocks_are_found_with_their_lines() -> None:
    text = 'a\n```python\nx = 1\ny = 2\n```\n```bash\nls\n```\n\n```python title="b.py"\nz = 3\n```\n'
    assert blocks(text, "python") == [Block(3, "x = 1\ny = 2\n"), Block(11, "z = 3\n", "b.py")]
    assert [b.code for b in blocks(text, "bash")] == ["ls\n"]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(encoding="utf-8"), "python")], ids=name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in order, in one namespace, in an empty folder; those with a title are files there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        if block.file is not None:
            monkeypatch.delitem(sys.modules, Path(block.file).stem, raising=False)
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")
            continue
        # Empty lines in front make a traceback name the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def commands() -> list[str]:
    lines = [line for p in PAGES for b in blocks(p.read_text(encoding="utf-8"), "bash") for line in b.code.splitlines()]
    return sorted({line.partition("#")[0].strip() for line in lines if line.startswith("nissl ")})


@pytest.mark.parametrize("line", commands())
def test_documented_commands_exist(line: str) -> None:
    """Command, options and arguments are parsed as the program parses them; nothing is run."""
    from nissl.cli import app

    group = typer.main.get_group(app)
    _, command, rest = group.resolve_command(
        group.make_context("nissl", [], resilient_parsing=True), shlex.split(line)[1:]
    )
    assert command is not None
    command.make_context(command.name, rest)


def test_the_command_page_names_every_command_and_option_of_the_audit() -> None:
    from nissl.cli import app

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    group = typer.main.get_group(app)
    assert all(f"nissl {name}" in text for name in group.commands)
    for parameter in group.commands["audit"].params:
        assert any(f"`{option}`" in text for option in parameter.opts), parameter.opts


def test_the_readme_example_is_short() -> None:
    (example,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert len(example.code.splitlines()) <= 15


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("**/*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in config, f"{name(page)} is not in mkdocs.yml"


def test_the_methods_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "methods_table.py"))["methods_markdown"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == made, "run `make tables`"
