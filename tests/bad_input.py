"""What the cases of test_bad_input are about, and how their outcomes are judged.

A World holds everything that a case may touch and says afterwards what is not as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import random
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from nissl import Network, Pass
from nissl.attribution import Method
from nissl.errors import NisslError
from nissl.runner import Explained, explained
from nissl.trust.check import Measured
from nissl.trust.run_folder import RunFolder

# ---------------------------------------------------------------- what must not change


def _hash(t: Tensor) -> str:
    t = t.detach().cpu()
    data = t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""
    return f"{t.dtype} {tuple(t.shape)} {hashlib.blake2b(data, digest_size=8).hexdigest()}"


def state_of(thing: Any) -> Any:
    """Everything of a module, tensor or array that a question may not change."""
    if isinstance(thing, nn.Module):
        modules = [
            (
                name,
                m.training,
                sorted(m.__dict__),
                {k: list(v) for k, v in m.__dict__.items() if k.endswith("_hooks") and isinstance(v, dict)},
                [(k, id(b), None if b is None else _hash(b)) for k, b in m._buffers.items()],
            )
            for name, m in thing.named_modules()
        ]
        weights = [(k, id(p), p.requires_grad, p.grad is None, _hash(p)) for k, p in thing.named_parameters()]
        return modules, weights
    if isinstance(thing, Tensor):
        return thing.requires_grad, thing.grad is None, thing._version, _hash(thing)
    return thing.dtype, thing.shape, thing.flags.writeable, thing.tobytes()


def surroundings() -> dict[str, Any]:
    """What the process is like outside of models and files."""
    return {
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "default type": torch.get_default_dtype(),
        "torch's generator": _hash(torch.get_rng_state()),
        "numpy's generator": str(np.random.get_state()),  # noqa: NPY002  it is about the old generator, which is global
        "python's generator": hash(random.getstate()),
        "function modes": torch._C._len_torch_function_stack(),
        "working directory": os.getcwd(),
        "search path": list(sys.path),
        "threads": threading.active_count(),
    }


def files_of(folder: Path) -> dict[str, Any]:
    """Every file below a folder, with its content."""
    found: dict[str, Any] = {}
    for where, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(where, name), folder)] = "folder"
        for name in files:
            file = os.path.join(where, name)
            seen = os.stat(file)
            found[os.path.relpath(file, folder)] = _content(file, seen.st_ino, seen.st_size, seen.st_mtime_ns)
    return found


@functools.cache
def _content(file: str, *seen: int) -> str:
    """Hash of a file, read again only where it was written since."""
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()


class World:
    """What the cases are about, made anew for each; all of it is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watched: list[tuple[str, Any, Any]] = []
        g = torch.Generator().manual_seed(1)
        self.x = self.watch(torch.randn(4, 6, generator=g), "x")
        self.images = self.watch(torch.randn(4, 3, 8, 8, generator=g), "images")
        self.ids = self.watch(torch.randint(11, (3, 5), generator=g), "ids")
        self.mlp = self.module(MLP)
        self.net = Network(self.mlp)

    def watch(self, thing: Any, name: str = "thing") -> Any:
        self.watched.append((name, thing, state_of(thing)))
        return thing

    def module(self, make: Callable[[], nn.Module]) -> Any:
        """A module with weights of its own, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            module = make()
        return self.watch(module, type(module).__name__)

    def network(self, make: Callable[[], nn.Module], **options: Any) -> Network:
        return Network(self.module(make), **options)

    @functools.cached_property
    def cnn(self) -> Network:
        return self.network(CNN)

    @functools.cached_property
    def scores(self) -> xr.DataArray:
        return xr.DataArray(self.watch(np.arange(24.0).reshape(4, 6), "scores"), dims=("example", "feature"))

    def changes(self) -> list[str]:
        """What is not as it was."""
        return [f"{name} was changed" for name, thing, before in self.watched if state_of(thing) != before]

    def unable(self) -> list[str]:
        """Whether the network answers as if nothing had happened."""
        with torch.no_grad():
            expected = self.mlp(self.x)
        answered = self.net.run(Pass(self.x)).output
        return [] if torch.equal(answered, expected) else ["the network no longer answers as it did"]  # pyright: ignore


# ---------------------------------------------------------------- modules


def MLP() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def CNN(outputs: int = 3, channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, outputs)
    )


class Words(nn.Module):
    """Token ids to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


class Tied(nn.Module):
    """One linear layer called twice, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())


class Does(nn.Module):
    """A linear layer, and then whatever a function does with its output and the input."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x), x)


class Counter(nn.Module):
    """Counts its calls in a buffer, which it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.layer(x) * self.calls


class Overwrites(nn.Module):
    """Writes over its input and over activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        h = self.first(x)
        h += 1
        return self.last(self.relu(h))


class NoBackward(torch.autograd.Function):
    """The identity, whose backward fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise KeyError("no way back")


def broken(out: Tensor, x: Tensor) -> Tensor:
    raise KeyError("the model's own trouble")


def normed() -> nn.Module:
    """Batch norm and dropout, left in training mode, with statistics that have been learned."""
    m = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    m(torch.randn(64, 6))
    return m.train()


# ---------------------------------------------------------------- methods and generators that are wrong


@dataclasses.dataclass(frozen=True, eq=False)
class Odd(Method):
    """Does what the function does."""

    function: Callable[..., Any] = lambda q: None

    name = "odd"
    title = "Odd"
    paper = "none"

    def explain(self, q: Any) -> Any:
        return self.function(q)


def yields(thing: Any) -> Callable[[Any], Any]:
    def explain(q: Any) -> Any:
        yield thing

    return explain


def returns(thing: Any) -> Callable[[Any], Any]:
    def explain(q: Any) -> Any:
        yield q.ask()
        return thing

    return explain


def ragged(q: Any) -> Any:
    answer = yield q.ask()
    return explained(q, answer.output[0].repeat(1 + q.example), ("feature",))


# ---------------------------------------------------------------- files

FACTORIES = """
import torch
from torch import nn

def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 3))

def seen():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )

def three():
    from nissl.sources import LoadedModel
    return LoadedModel(net(), "three", n_classes=3)

class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("the model's own trouble")

def needs(what):
    return nn.Identity()

def number():
    return 3

def fails():
    raise OSError("no such disk")

def leaves():
    raise SystemExit(3)

def unfitted():
    from sklearn.linear_model import LogisticRegression
    return LogisticRegression()

raises = Raises()
text = "some text"
empty = lambda: (torch.zeros(0, 6), None)
"""


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (open, (str(self.file), "w"))


def write_files(folder: Path) -> None:
    """Good and bad files of every kind."""
    from PIL import Image
    from safetensors.torch import save_file

    (folder / "mine.py").write_text(FACTORIES)
    (folder / "syntax.py").write_text("def net(:\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "file.txt").write_text("some text")
    (folder / "text.npz").write_text("some text")
    (folder / "text.pt").write_text("some text")
    (folder / "text.safetensors").write_text("some text")
    (folder / "list.csv").write_text("a,b\n1,2\n")

    weights = nn.Linear(6, 3).state_dict()
    good = {f"1.{k}": torch.ones_like(v) for k, v in weights.items()}
    save_file(good, folder / "good.safetensors")
    data = (folder / "good.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-7])
    save_file({**good, "1.bias": torch.full((3,), float("nan"))}, folder / "nan.safetensors")
    save_file({**good, "1.bias": torch.ones(4)}, folder / "shape.safetensors")
    save_file({"1.bias": torch.ones(3)}, folder / "missing.safetensors")
    torch.save({"w": Payload(folder / "executed")}, folder / "pickle.pt")
    torch.save(good, folder / "whole.pt")
    data = (folder / "whole.pt").read_bytes()
    (folder / "cut.pt").write_bytes(data[: len(data) // 2])
    torch.save({"1.weight": 3}, folder / "number.pt")
    torch.save([1, 2], folder / "list.pt")

    rng = np.random.default_rng(0)
    x = rng.random((4, 6), dtype=np.float32)
    np.savez(folder / "data.npz", x=x, y=np.array([0, 1, 2, 0]))
    np.savez(folder / "pixels.npz", x=rng.random((3, 3, 8, 8), dtype=np.float32), y=np.array([0, 1, 2]))
    np.savez(folder / "no_x.npz", y=np.array([0, 1]))
    np.savez(folder / "no_rows.npz", x=x[:0])
    np.savez(folder / "scalar.npz", x=np.float32(3))
    np.savez(folder / "words.npz", x=np.array([["a", "b"]]))
    np.savez(folder / "objects.npz", x=np.array([Payload(folder / "executed"), 1], dtype=object))
    np.savez(folder / "nan.npz", x=np.where(np.arange(24).reshape(4, 6) == 7, np.nan, x))
    np.savez(folder / "huge.npz", x=x.astype(np.float64) * 1e300)
    for name, y in {
        "few": [0, 1], "high": [0, 1, 2, 9], "negative": [0, 1, 2, -1], "half": [0.5, 1, 2, 0], "nan": [np.nan, 1, 2, 0],
        "names": ["a", "b", "c", "d"], "hot": np.eye(4),
    }.items():  # fmt: skip
        np.savez(folder / f"y_{name}.npz", x=x, y=np.array(y))
    np.savez(folder / "masks_shape.npz", x=np.zeros((2, 3, 8, 8), np.float32), masks=np.ones((2, 4, 4)))
    np.savez(folder / "masks_empty.npz", x=np.zeros((2, 3, 8, 8), np.float32), masks=np.zeros((2, 8, 8)))
    np.savez(folder / "boxes.npz", x=np.zeros((1, 3, 8, 8), np.float32), boxes=np.array([[0, 0, 99, 4]]))
    data = (folder / "data.npz").read_bytes()
    (folder / "cut.npz").write_bytes(data[: len(data) // 2])

    picture = Image.fromarray(rng.integers(0, 255, (9, 13, 3), dtype=np.uint8))
    for name in ("empty", "broken", "table", "twice", "stranger", "some", "both", "both/cat"):
        (folder / name).mkdir()
    (folder / "broken" / "a.png").write_bytes(b"\x89PNG some text")
    for name, table in (
        ("table", "a,b\n1,2\n"), ("twice", "file,label\na.png,0\na.png,1\n"), ("stranger", "file,label\nb.png,0\n"),
    ):  # fmt: skip
        picture.save(folder / name / "a.png")
        (folder / name / "labels.csv").write_text(table)
    for name in ("some/a_1.png", "some/b.png", "both/a.png", "both/cat/b.png"):
        picture.save(folder / name)
    picture.save(folder / "whole.png")
    data = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    picture.convert("L").save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.new("RGB", (1, 1), (255, 0, 0)).save(folder / "pixel.png")

    write_runs(folder / "runs")


SETTINGS = {"seed": 0, "data": ["a"]}


def write_runs(runs: Path) -> None:
    """Run folders in every state in which a kill, or somebody's hand, may leave them."""
    scores = xr.DataArray(np.ones((2, 3)), dims=("example", "feature"))
    figures = pd.DataFrame({"method": ["ig"], "value": [1.0]})
    record: dict[str, Any] = {"verdicts": {}}
    for name in ("done", "no_scores", "cut_figures", "no_figures", "bad_scores"):
        run = RunFolder(runs / name, SETTINGS, resume=False)
        run.finish({"ig": scores}, figures, record)
        run.close()
    for name in (
        "unfinished", "cut_json", "list_json", "cut_kept", "pickled_kept", "other_kept", "odd_kept", "short_kept",
    ):  # fmt: skip
        run = RunFolder(runs / name, SETTINGS, resume=False)
        run.keep("ig-0", Explained(torch.ones(3), ("feature",)), Measured({"insertion": 1.0}), {})
        run.close()

    for folder in ("no_scores", "bad_scores"):
        for file in sorted((runs / folder / "scores.zarr").rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    (runs / "no_scores" / "scores.zarr").rmdir()
    (runs / "bad_scores" / "scores.zarr" / "ig").mkdir()
    (runs / "bad_scores" / "scores.zarr" / "ig" / "zarr.json").write_text("{")
    file = runs / "cut_figures" / "trust.parquet"
    file.write_bytes(file.read_bytes()[:100])
    (runs / "no_figures" / "trust.parquet").unlink()
    file = runs / "cut_json" / "run.json"
    file.write_bytes(file.read_bytes()[:9])
    (runs / "list_json" / "run.json").write_text("[1, 2]")

    def kept(name: str) -> Path:
        return runs / name / "unfinished" / "ig-0.npz"

    kept("cut_kept").write_bytes(kept("cut_kept").read_bytes()[:200])
    np.savez(kept("pickled_kept"), facts=np.array([Payload(runs.parent / "executed")], dtype=object))
    np.savez(kept("other_kept"), something=np.ones(3))
    odd = np.frombuffer(b"[1, 2]", dtype=np.uint8)
    np.savez(kept("odd_kept"), facts=odd, scores=np.ones(3))
    kept("short_kept").write_bytes(b"")

    (runs / "foreign").mkdir()
    (runs / "foreign" / "thesis.tex").write_text("years of work")
    (runs / "nested").mkdir()
    (runs / "nested" / "run.json").mkdir()


# ---------------------------------------------------------------- cases


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: what is done, and what is to be said of what came out."""

    name: str
    act: Callable[[World], Any]
    judge: Callable[[Any], list[str]]
    fails: bool


CASES: dict[str, Case] = {}


def put(name: str, act: Callable[[World], Any], judge: Callable[[Any], list[str]], fails: bool) -> None:
    if name in CASES:
        raise ValueError(f"two cases are called {name!r}")
    CASES[name] = Case(name, act, judge, fails)


def bad(name: str, error: type[NisslError], says: str, act: Callable[[World], Any]) -> None:
    """A case that raises exactly this error with a message that matches."""

    def judge(outcome: Any) -> list[str]:
        if not isinstance(outcome, BaseException):
            return [f"it gave {outcome!r:.200} instead of {error.__name__}"]
        text = str(outcome)
        wrong = []
        if type(outcome) is not error:
            wrong.append(f"{type(outcome).__name__} instead of {error.__name__}: {text:.300}")
        if not re.search(says, text):
            wrong.append(f"{text!r:.300} does not match {says!r}")
        return wrong

    put(name, act, judge, fails=True)


def as_array(numbers: Any) -> np.ndarray:
    return numbers.detach().double().numpy() if isinstance(numbers, Tensor) else np.asarray(numbers, dtype=float)


def good(name: str, act: Callable[[World], tuple[Any, Any]]) -> None:
    """A case that works: what it gives, and what is right."""

    def judge(outcome: Any) -> list[str]:
        if isinstance(outcome, BaseException):
            return [f"{type(outcome).__name__}: {outcome}"[:600]]
        got, right = outcome
        try:
            if isinstance(right, (Tensor, np.ndarray, float)):
                np.testing.assert_allclose(as_array(got), as_array(right), rtol=1e-4, atol=1e-5)
            elif got != right:
                return [f"it gave {got!r:.200}; right is {right!r:.200}"]
        except AssertionError as error:
            return [str(error)]
        return []

    put(name, act, judge, fails=False)


def command(name: str, says: str, words: str, lines: int | None = 1) -> None:
    """A command line that ends with exit code 2 and one line, not with a traceback."""

    def act(w: World) -> tuple[Any, str, str]:
        from nissl import cli

        out, err = io.StringIO(), io.StringIO()
        before, filters = sys.argv, warnings.showwarning
        sys.argv = ["nissl", *words.split()]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
                code: Any = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.argv, warnings.showwarning = before, filters
        return code, out.getvalue(), err.getvalue()

    def judge(outcome: Any) -> list[str]:
        if isinstance(outcome, BaseException):
            return [f"a traceback: {type(outcome).__name__}: {outcome}"[:600]]
        code, out, err = outcome
        wrong = [] if code == 2 else [f"exit code {code} instead of 2"]
        wrong += [] if re.search(says, err) else [f"{err!r:.300} does not match {says!r}"]
        wrong += [] if lines is None or len(err.strip().splitlines()) == lines else [f"several lines: {err!r:.400}"]
        return wrong + ([f"something on standard output: {out!r:.200}"] if out else [])

    put(f"nissl {name}", act, judge, fails=True)


# ---------------------------------------------------------------- running them


def run(case: Case, folder: Path) -> list[str]:
    """What is wrong with a case: what it gave, and what it changed."""
    w = World(folder)
    around, files = surroundings(), files_of(folder)
    outcome: Any
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = case.act(w)
    except Exception as error:
        outcome = error
    wrong = case.judge(outcome)
    if wrong and isinstance(outcome, BaseException) and os.environ.get("TRACE"):
        traceback.print_exception(outcome)
    if isinstance(outcome, BaseException):
        outcome.__traceback__ = None
    for name, value in surroundings().items():
        if value != around[name] and (case.fails or name != "search path"):
            wrong.append(f"{name} changed")
    after = files_of(folder)
    wrong += [
        f"{name} appeared, went or changed" for name in sorted({*files, *after}) if files.get(name) != after.get(name)
    ]
    wrong += w.changes()
    try:
        wrong += w.unable()
    except Exception as error:
        wrong.append(f"the network answers no longer: {type(error).__name__}: {error}")
    return wrong
