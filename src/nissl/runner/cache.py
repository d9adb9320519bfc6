"""Answers kept in bounded memory and, if wanted, in a zarr folder."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import zarr

from nissl.arguments import as_path
from nissl.errors import RunFolderError
from nissl.network import Answer
from nissl.network.passes import raw_bytes


class AnswerCache:
    """Answers by content key.

    Parameters
    ----------
    memory : int, default 1 GiB
        Bytes kept in memory; the least recently used go first.
    folder : path, optional
        Where answers are also kept on disk, each as a zarr array that is moved into place when it is complete.
    """

    def __init__(self, memory: int = 2**30, folder: str | Path | None = None) -> None:
        self.memory = memory
        self.held = 0
        self.folder = None if folder is None else as_path("folder", folder)
        self._answers: OrderedDict[str, Answer] = OrderedDict()
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                raise RunFolderError(f"the answer folder {self.folder} cannot be made: {error}") from error

    def get(self, key: str) -> Answer | None:
        """The answer, or None."""
        if key in self._answers:
            self._answers.move_to_end(key)
            return self._answers[key]
        if self.folder is not None and (self.folder / key).is_dir():
            answer = _load(self.folder / key)
            self._keep(key, answer)
            return answer
        return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer."""
        self._keep(key, answer)
        if self.folder is not None and not (self.folder / key).exists():
            _save(self.folder / key, answer)

    def forget(self, keys: set[str]) -> None:
        """Drop answers from disk; memory drops them by itself."""
        if self.folder is not None:
            for key in keys:
                shutil.rmtree(self.folder / key, ignore_errors=True)

    def _keep(self, key: str, answer: Answer) -> None:
        size = answer.nbytes
        if size > self.memory or key in self._answers:
            return
        self._answers[key] = answer
        self.held += size
        while self.held > self.memory:
            _, old = self._answers.popitem(last=False)
            self.held -= old.nbytes


def _save(path: Path, answer: Answer) -> None:
    temporary = tempfile.mkdtemp(prefix=".part-", dir=path.parent)
    try:
        # one array of bytes: what a zarr array costs is its files, not its size
        held = answer.tensors()
        data = np.concatenate([np.frombuffer(raw_bytes(t), np.uint8) for t in held.values()] or [np.zeros(0, np.uint8)])
        names = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in held.items()]
        zarr.create_array(
            temporary, data=data, chunks=(max(len(data), 1),), filters=None, compressors=None,
            attributes={"tensors": names}, overwrite=True,
        )  # fmt: skip
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if path.exists():  # another run was faster; its answer is the same
            return
        raise RunFolderError(f"an answer cannot be written to {path.parent}: {error}") from error


def _load(path: Path) -> Answer:
    try:
        array = zarr.open_array(path, mode="r")
        data = torch.from_numpy(np.asarray(array[...]))
        tensors, at = {}, 0
        for name, dtype, shape in array.attrs["tensors"]:  # pyright: ignore
            kind = getattr(torch, str(dtype))
            end = at + math.prod(shape) * kind.itemsize
            tensors[str(name)] = data[at:end].clone().view(kind).reshape(shape)  # cloned: whole numbers of bytes apart
            at = end
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise RunFolderError(
            f"the stored answer {path} cannot be read ({error!r}); delete that folder and resume"
        ) from error
    return Answer(
        tensors.pop("output", None),
        tensors.pop("scalar", None),
        {k.removeprefix("read "): v for k, v in tensors.items() if k.startswith("read ")},
        {k.removeprefix("gradient "): v for k, v in tensors.items() if k.startswith("gradient ")},
        tensors.pop("tokens", None),
        tensors.pop("log_probs", None),
    )
