"""Rated sentences, from archives made here in the form of the published one; and from that one where it lies."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nissl.errors import InputError
from nissl.sources import load_sentiment
from nissl.sources.sentiment import SENTIMENT_ARCHIVE, words

FILMS = "1\t2.25\tA fine ''film''.\n2\t-1.5\tDull, dull\tdull!\n\n3\t0.5\tA fine ''film''.\n"
LEXICON = "$:\t-1.5\t0.8\t[-1, -2]\nfine\t1.9\t0.5\t[2, 2]\n"


def packed(files: dict[str, bytes]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w:gz") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return held.getvalue()


def archive(path: Path, films: str = FILMS, lexicon: str = LEXICON, **more: bytes) -> Path:
    inner = packed({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": films.encode(), **more})
    path.write_bytes(packed({
        "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner,
        "vaderSentiment-2.5/vaderSentiment/vader_lexicon.txt": lexicon.encode(),
    }))  # fmt: skip
    return path


def test_sentences_ratings_and_lexicon_are_read(tmp_path):
    found = load_sentiment(archive(tmp_path / "a.tar.gz"))
    assert found.texts == ["A fine ''film''.", "Dull, dull\tdull!"]  # each once, with its first rating
    np.testing.assert_array_equal(found.ratings, [2.25, -1.5])
    assert found.lexicon == {"$:": -1.5, "fine": 1.9}
    assert found.words() == [["a", "fine", "film"], ["dull", "dull", "dull", "!"]]
    assert words("It's a far-fetched 90's film; why?") == ["it's", "a", "far-fetched", "90's", "film", "why", "?"]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.tar.gz"]  # nothing is unpacked


def test_a_missing_archive_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no file 'vaderSentiment-2\.5\.tar\.gz'.*pip download"):
        load_sentiment()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p.write_bytes(b"no archive"),
        lambda p: p.write_bytes(archive(p).read_bytes()[:200]),
        lambda p: p.write_bytes(packed({"other.txt": b"1"})),
        lambda p: archive(p, films="1\tgood\tA film\n"),
        lambda p: archive(p, films="1\t2.0\n"),
        lambda p: archive(p, films="1\tnan\tA film\n"),
        lambda p: archive(p, films="\n"),
        lambda p: archive(p, films="1\t2\t" + "x" * 2**24),
        lambda p: archive(p, lexicon="fine\n"),
    ],
    ids=["no archive", "cut", "another", "words", "columns", "nan", "empty", "huge", "lexicon"],
)
def test_broken_archives_are_refused(tmp_path, make):
    make(tmp_path / "a.tar.gz")
    with pytest.raises(InputError, match=r"a\.tar\.gz"):
        load_sentiment(tmp_path / "a.tar.gz")


def test_unknown_parts_are_refused(tmp_path):
    with pytest.raises(InputError, match="tweets_GroundTruth"):
        load_sentiment(archive(tmp_path / "a.tar.gz"), part="tweets")
    with pytest.raises((InputError, TypeError)):
        load_sentiment(archive(tmp_path / "a.tar.gz"), part="songs")


def test_the_published_archive():
    path = next((p for p in (Path(SENTIMENT_ARCHIVE), Path("data") / SENTIMENT_ARCHIVE) if p.is_file()), None)
    if path is None:
        pytest.skip(f"{SENTIMENT_ARCHIVE} does not lie in the current folder")
    found = load_sentiment(path)
    assert len(found.texts) == 10_603
    assert np.abs(found.ratings).max() <= 4
    assert found.lexicon["good"] == 1.9
    assert [len(load_sentiment(path, part).texts) for part in ("tweets", "products", "editorials")] == [
        4200,
        3697,
        5119,
    ]
