"""Sentences with human ratings of their sentiment, read from an archive that the user has downloaded."""

from __future__ import annotations

import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nissl.arguments import as_path
from nissl.errors import InputError, said

SENTIMENT_ARCHIVE = "vaderSentiment-2.5.tar.gz"
SENTIMENT_PIP = "pip download --no-deps --no-binary :all: vaderSentiment==2.5"
"""Downloads the archive (2.4 MB, MIT licence) into the current folder. Nothing in it is installed or run."""

_PARTS = {
    "film": "movieReviewSnippets", "tweets": "tweets", "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}  # fmt: skip
_LARGEST = 2**24
_WORD = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[!?]")


@dataclass(frozen=True, eq=False)
class Sentiment:
    """Rated sentences.

    Attributes
    ----------
    texts : list of str
    ratings : array of float (n,)
        Mean of the people's ratings, from -4 (most negative) to 4.
    lexicon : dict of str to float
        Mean rating of single words, smileys and the like, on the same scale.
    """

    texts: list[str]
    ratings: np.ndarray
    lexicon: dict[str, float]

    def words(self) -> list[list[str]]:
        """Words of each text in lower case, with ``!`` and ``?``."""
        return [words(text) for text in self.texts]


def words(text: str) -> list[str]:
    """Words of a text in lower case, with ``!`` and ``?``; what is joined by hyphens or apostrophes is one word."""
    return _WORD.findall(text.lower().replace("''", " "))


def load_sentiment(
    archive: str | Path = SENTIMENT_ARCHIVE, part: Literal["film", "tweets", "products", "editorials"] = "film"
) -> Sentiment:
    """Sentences and ratings of Hutto & Gilbert (2014), from the source archive of vaderSentiment.

    Parameters
    ----------
    archive : path, default "vaderSentiment-2.5.tar.gz"
        Where the archive lies; ``pip download --no-deps --no-binary :all: vaderSentiment==2.5`` puts it into the
        current folder. Nothing is fetched here.
    part : {"film", "tweets", "products", "editorials"}, default "film"
        10,605 sentences of film reviews, 4,200 tweets, 3,708 of product reviews or 5,190 of newspaper editorials.

    Returns
    -------
    Sentiment
        Each sentence once, in the order of the file, which is sorted: draw before you split.

    Raises
    ------
    InputError
        No such file (says how to get it), another archive, or a broken one.

    References
    ----------
    Hutto, Gilbert: VADER: a parsimonious rule-based model for sentiment analysis of social media text (2014).
    """
    if part not in _PARTS:
        raise InputError(f"part={part!r}: choose among {', '.join(_PARTS)}")
    path = as_path("archive", archive)
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; get it with: {SENTIMENT_PIP}")
    try:
        with tarfile.open(path) as outer:
            inside = _member(outer, "additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=io.BytesIO(inside)) as inner:
                sentences = _member(inner, f"{_PARTS[part]}_GroundTruth.txt").decode("utf-8", "replace").splitlines()
            entries = _member(outer, "vaderSentiment/vader_lexicon.txt").decode("utf-8", "replace").splitlines()
        rated: dict[str, float] = {}
        for _, rating, text in (line.split("\t", 2) for line in sentences if line.strip()):
            rated.setdefault(text.strip(), float(rating))
        lexicon = {word: float(rating) for word, rating, *_ in (line.split("\t") for line in entries if line.strip())}
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} is no archive of vaderSentiment 2.5, or a broken one: {said(error)}"
        ) from error
    if not rated or not np.isfinite(list(rated.values())).all():
        raise InputError(f"{str(path)!r} holds no ratings for {part!r}")
    return Sentiment(list(rated), np.array(list(rated.values())), lexicon)


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    """Contents of the one file whose name ends so; never written to disk."""
    for member in archive:
        if member.isfile() and member.name.endswith(ending):
            if member.size > _LARGEST:
                raise ValueError(f"{member.name} has {member.size} bytes, more than {_LARGEST}")
            file = archive.extractfile(member)
            assert file is not None
            return file.read()
    raise ValueError(f"it holds no {ending}")
