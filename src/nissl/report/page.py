"""A report of a few sections in one file: text, tables, tokens and pictures, for everything that is not an audit."""

from __future__ import annotations

import base64
import io
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from nissl.arguments import as_path
from nissl.errors import InputError, RunFolderError


@dataclass(frozen=True, eq=False)
class Part:
    """One part of a section.

    Parameters
    ----------
    content : str, pandas.DataFrame, matplotlib Figure or Tokens
    caption : str
        Below it; for pictures also what who does not see them is told.
    """

    content: Any
    caption: str = ""

    @property
    def kind(self) -> str:
        """Which form it has on the page."""
        for kind, name in ((str, "text"), (pd.DataFrame, "table"), (Figure, "picture"), (Tokens, "tokens")):
            if isinstance(self.content, kind):
                return name
        raise InputError(f"a page holds texts, tables, pictures and tokens, not {type(self.content).__name__}")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Words with a score each, drawn as a shade behind them.

    Parameters
    ----------
    words : sequence of str
    scores : array (n_words,), optional
        Signed; shades are relative to the largest size. Without them words are only listed.
    """

    words: Sequence[str]
    scores: Any = None

    @property
    def shades(self) -> list[tuple[str, float, str]]:
        """Word, strength from 0 to 1, and ``pos`` or ``neg``."""
        scores = np.zeros(len(self.words)) if self.scores is None else np.asarray(self.scores, float)
        if scores.shape != (len(self.words),):
            raise InputError(f"{len(self.words)} words need as many scores, got an array of shape {scores.shape}")
        top = float(np.nanmax(np.abs(scores), initial=0)) or 1.0
        rows = zip(self.words, np.nan_to_num(scores) / top, strict=True)
        return [(str(w).replace("\n", "\u23ce"), round(abs(float(s)), 3), "neg" if s < 0 else "pos") for w, s in rows]


@dataclass(frozen=True, eq=False)
class Section:
    """A heading, what it is about, and parts."""

    title: str
    about: str = ""
    parts: Sequence[Part] = field(default_factory=tuple)


def write_page(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    eyebrow: str = "",
    lead: str = "",
    command: str = "",
) -> Path:
    """Write a page that opens offline: no script, nothing fetched, all text escaped, light and dark.

    Parameters
    ----------
    path : path-like
        The HTML file; its folder must exist.
    title, lead, eyebrow : str
        What was asked; the answer in a sentence or two; what kind of page it is.
    sections : sequence of Section
    command : str
        That makes the page again.

    Raises
    ------
    RunFolderError
        The file cannot be written. Nothing is left behind.
    InputError
        A part that a page cannot hold.
    """
    from nissl.report.html import environment, template

    path = as_path("the report", path)
    names = {f"s{i}": s.title for i, s in enumerate(sections)}
    text = environment().get_template("page.html").render(
        css=Markup(template("report.css")), title=title, eyebrow=eyebrow, lead=lead, sections=sections, names=names,
        command=command, picture=_data_uri, cell=cell,
    )  # fmt: skip
    write_html(path, text)
    return path


def _data_uri(figure: Figure) -> str:
    held = io.BytesIO()
    figure.savefig(held, format="png", dpi=130)
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def write_html(path: Path, page: str) -> None:
    """Write a page; the file appears whole or not at all, and replaces an older one only when it is complete.

    Raises
    ------
    RunFolderError
        The file cannot be written. Nothing is left behind.
    """
    part = path.parent / f".report-{secrets.token_hex(8)}.part"
    try:
        file = part.open("xb")
        try:
            with file:
                # names from data may hold halves of surrogate pairs, which no encoding has
                file.write(page.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink()
            raise
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        why = getattr(error, "strerror", None) or str(error)
        raise RunFolderError(
            f"the report cannot be written to {path}: {why}; give a file in a folder that exists and can be written to"
        ) from error


def cell(value: Any) -> str:
    """A value of a table as text."""
    if value is None or (isinstance(value, (float, np.floating)) and not np.isfinite(value)):
        return "\u2013"
    if isinstance(value, (float, np.floating)):
        return f"{float(value):.3g}"
    return str(value)
