"""A run on disk: a folder with everything needed to repeat it, written so that no moment of it is half a file."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import torch
import xarray as xr
from filelock import FileLock, Timeout

from nissl.arguments import as_path
from nissl.errors import FinishedRunError, InputError, RunFolderError
from nissl.runner import Cost, Explained
from nissl.trust.check import Measured


class RunFolder:
    """``run.json``, ``scores.zarr``, ``trust.parquet``, ``report.html`` and, while it runs, what is finished so far.

    Parameters
    ----------
    path : path
        Made where it does not exist.
    settings : mapping
        Everything the result depends on; a run is resumed only under equal settings.
    resume : bool
        Go on with an interrupted run instead of starting anew.

    Raises
    ------
    InputError
        `path` is no path, or `settings` hold more than JSON can.
    RunFolderError
        The folder cannot be written, holds something that is no run, is in use by another run, or was made
        under other settings than those to be resumed.
    FinishedRunError
        The run to be resumed is finished.
    """

    def __init__(self, path: str | os.PathLike[str], settings: Mapping[str, Any], resume: bool) -> None:
        self.path = as_path("a run folder", path)
        try:
            self.settings = json.loads(json.dumps(dict(settings), sort_keys=True))
        except (TypeError, ValueError) as error:
            raise InputError(f"settings must be a mapping of plain values, as JSON has them: {error}") from error
        self.partial = self.path / "unfinished"
        self._lock: FileLock | None = None
        try:
            if self.path.exists() and not self.path.is_dir():
                raise RunFolderError(f"{self.path} is a file; a run needs a folder of its own")
            existing = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
            foreign = [
                n
                for n in existing
                if n not in ("run.json", "scores.zarr", "trust.parquet", "report.html", "unfinished", ".lock")
            ]
            if foreign and "run.json" not in existing:
                raise RunFolderError(
                    f"{self.path} holds other things ({', '.join(foreign[:3])}); give a new or empty folder"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunFolderError(f"another run is writing to {self.path}") from error
        except RunFolderError:
            raise
        except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
            raise RunFolderError(f"the run folder {str(self.path)[:200]!r} cannot be written: {error}") from error
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, resume: bool) -> None:
        held = self._held() if resume else None
        if held is not None and held.get("settings") != self.settings:
            old = held.get("settings") or {}
            differ = sorted(k for k in {*old, *self.settings} if old.get(k) != self.settings.get(k))
            raise RunFolderError(
                f"{self.path} was run with other settings ({', '.join(differ) or 'unknown'} differ); "
                "give the same, or another folder, or do not resume"
            )
        if held is not None and held.get("finished"):
            raise FinishedRunError(
                f"the run in {self.path} is finished, there is nothing to resume; nissl.trust.run_folder.load_run reads it, "
                "and without resume it is run anew"
            )
        if held is None:
            self._clear()
            self.write_json({"settings": self.settings, "finished": False})
        try:
            self.partial.mkdir(exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{self.partial} cannot be made: {error}") from error

    def _held(self) -> dict[str, Any] | None:
        file = self.path / "run.json"
        if not file.exists():
            return None
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read ({error}); delete it to start anew") from error
        if not isinstance(held, dict):
            raise RunFolderError(f"{file} is no record of a run; delete it to start anew")
        return held

    def _clear(self) -> None:
        for name in ("scores.zarr", "unfinished"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("run.json", "trust.parquet", "report.html"):
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise RunFolderError(f"{self.path / name} cannot be written anew: {error}") from error

    def close(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.release()
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock = None

    # ---------------------------------------------------------------- while it runs

    def keep(self, name: str, scores: Explained, measured: Measured, costs: Mapping[str, Cost]) -> None:
        """Keep what a finished job found, and its costs by name."""
        arrays = {"scores": scores.values.detach().cpu().numpy()}
        arrays |= {f"x {k}": v[0] for k, v in measured.curves.items()} | {
            f"y {k}": v[1] for k, v in measured.curves.items()
        }
        arrays |= {f"map {k}": v for k, v in measured.maps.items()}
        spent = {k: dataclasses.asdict(c) for k, c in costs.items()}
        facts = {"dims": scores.dims, "extra": scores.extra, "figures": measured.figures, "cost": spent}
        buffer = io.BytesIO()
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        np.savez(buffer, allow_pickle=False, **arrays)
        write_atomically(self.partial / f"{name}.npz", buffer.getvalue())

    def kept(self, name: str) -> tuple[Explained, Measured, dict[str, Cost]] | None:
        """What a job found before the run was interrupted, or None."""
        file = self.partial / f"{name}.npz"
        if not file.exists():
            return None
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as z:
                facts = json.loads(z["facts"].tobytes())
                facts["cost"] = {k: Cost(**c) for k, c in facts["cost"].items()}
                curves = {k[2:]: (z[k], z[f"y {k[2:]}"]) for k in z.files if k.startswith("x ")}
                maps = {k[4:]: z[k] for k in z.files if k.startswith("map ")}
                scores = Explained(torch.from_numpy(z["scores"]), tuple(facts["dims"]), facts["extra"])
            return scores, Measured(facts["figures"], curves, maps), facts["cost"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile) as error:
            raise RunFolderError(f"{file} cannot be read ({error!r}); delete it and resume") from error

    # ---------------------------------------------------------------- at the end

    def write_json(self, record: Mapping[str, Any]) -> None:
        """Write ``run.json``."""
        write_atomically(self.path / "run.json", json.dumps(record, indent=1, default=str).encode())

    def finish(self, scores: Mapping[str, xr.DataArray], figures: pd.DataFrame, record: Mapping[str, Any]) -> None:
        """Write scores, figures and the record; drop what was kept for resuming."""
        target, temporary = self.path / "scores.zarr", self.path / "unfinished" / "scores.zarr"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for name, array in scores.items():
                array.to_dataset(name="scores").to_zarr(temporary, group=name, mode="a", consolidated=False)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            buffer = io.BytesIO()
            figures.to_parquet(buffer, index=False)
        except OSError as error:
            raise RunFolderError(f"scores cannot be written to {self.path}: {error}") from error
        write_atomically(self.path / "trust.parquet", buffer.getvalue())
        self.write_json({**record, "settings": self.settings, "finished": True})
        shutil.rmtree(self.partial, ignore_errors=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunFolderError(f"{path} cannot be written: {error}") from error


def load_run(path: str | os.PathLike[str]) -> tuple[dict[str, xr.DataArray], pd.DataFrame, dict[str, Any]]:
    """Scores by method, figures and record of a finished run.

    Raises
    ------
    InputError
        `path` is no path.
    RunFolderError
        No finished run there.
    """
    folder = as_path("a run folder", path)
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not record.get("finished"):
            raise RunFolderError(f"the run in {folder} was not finished; run it again with resume=True")
        figures = pd.read_parquet(folder / "trust.parquet")
        names = sorted(p.name for p in (folder / "scores.zarr").iterdir() if p.is_dir())
        scores = {n: xr.open_zarr(folder / "scores.zarr", group=n, consolidated=False)["scores"].load() for n in names}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{folder} holds no finished run: {error}") from error
    return scores, figures, record
