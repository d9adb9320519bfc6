"""Fashion-MNIST, read from the files in which it is published."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Literal

import numpy as np

from nissl.arguments import as_path
from nissl.errors import InputError, MissingExtraError, said

FASHION_FOLDER = "NISSL_FASHION_MNIST", "/usr/share/datasets/fashion-mnist"
"""Environment variable that names the folder, and where Debian's package puts it."""
FASHION_HOW = (
    "install Debian's dataset-fashion-mnist, or unpack it (dpkg-deb -x FILE.deb DIR) and name the folder in "
    f"{FASHION_FOLDER[0]}"
)
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def fashion_mnist(
    part: Literal["train", "test"] = "train", folder: str | Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels of Fashion-MNIST. Nothing is fetched.

    Parameters
    ----------
    part : {"train", "test"}, default "train"
        60,000 or 10,000 pictures.
    folder : path, optional
        Holds ``train-images-idx3-ubyte.gz`` and its like; by default what `FASHION_FOLDER` says.

    Returns
    -------
    images : array of uint8 (n, 28, 28)
    labels : array of int64 (n,)
        Entries of `FASHION_CLASSES`.

    Raises
    ------
    MissingExtraError
        No such file; says how to get it.
    InputError
        A broken one.

    References
    ----------
    Xiao, Rasul, Vollgraf: Fashion-MNIST (2017).
    """
    if part not in ("train", "test"):
        raise InputError(f"part={part!r}: choose 'train' or 'test'")
    where = as_path("folder", os.environ.get(*FASHION_FOLDER) if folder is None else folder)
    name = "train" if part == "train" else "t10k"
    images = _idx(where / f"{name}-images-idx3-ubyte.gz", 3)
    labels = _idx(where / f"{name}-labels-idx1-ubyte.gz", 1).astype(np.int64)
    if images.shape[1:] != (28, 28) or len(images) != len(labels) or labels.max(initial=0) > 9:
        raise InputError(f"{str(where)!r} holds {images.shape} pictures and {labels.shape} labels: no Fashion-MNIST")
    return images, labels


def _idx(file: Path, ndim: int) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, 8 for bytes, number of dimensions, their sizes (big-endian)."""
    if not file.is_file():
        raise MissingExtraError(f"there is no file {str(file)!r}; {FASHION_HOW}")
    try:
        data = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{str(file)!r} is no gzip file, or a broken one: {said(error)}") from error
    start = 4 + 4 * ndim
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4")) if len(data) >= start else ()
    if data[:4] != bytes([0, 0, 8, ndim]) or len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise InputError(f"{str(file)!r} is no IDX file of bytes with {ndim} dimensions, or a broken one")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
