"""What every command does with its answer: a device, a table or JSON on the terminal, a page on disk."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nissl.errors import InputError


def device_of(name: str | None) -> torch.device | None:
    """The device of that name; raises InputError where it cannot be used here."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def split_names(text: str) -> list[str]:
    """Names separated by commas that are not inside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def make_parent(path: Path) -> None:
    """Make the folder that a file is to be in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {path.parent} cannot be made: {error.strerror or error}") from error


def write_report(out: Path | None, title: str, eyebrow: str, lead: str, sections: list[Any]) -> str | None:
    """Write a page where one is wanted, and return its path as text."""
    from nissl.report.page import write_page

    if out is None:
        return None
    make_parent(out)
    command = shlex.join(["nissl", *sys.argv[1:]])
    return str(write_page(out, title, sections, eyebrow=eyebrow, lead=lead, command=command))


def show(summary: dict[str, Any], table: pd.DataFrame, lead: str, as_json: bool, report: str | None) -> None:
    """Print an answer: a summary as JSON, or a sentence, a table and where the report is."""
    from nissl.report.page import cell

    if as_json:
        print(json.dumps(plain(summary), allow_nan=False))
        return
    console = Console()
    if lead:
        console.print(Text(lead))
    shown = Table(*map(str, table.columns))
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(cell(v)) for v in row))
    console.print(shown)
    if report is not None:
        console.print(f"report: {report}")


def plain(value: Any) -> Any:
    """Values that JSON has."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
