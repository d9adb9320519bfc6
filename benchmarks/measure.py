"""Time, rows and memory of contenders that do the same work."""

from __future__ import annotations

import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]

SAME = 1e-3
"""Results are the same: float32 sums in another order, through some fifty layers with kinks."""


@dataclass
class Case:
    """Work that nissl and a peer both do.

    Attributes
    ----------
    name, peer : str
    aim : float or None
        Largest wanted ratio of times nissl / peer.
    contenders : dict of name to function
        ``nissl`` (as users get it), the peer under its name, and variants such as ``nissl, contiguous`` (in the memory
        format of the peer).
    differences : function
        Name to (largest difference between the results, largest one allowed).
    module : nn.Module
        The network, on which rows are counted.
    note : str
        Where definitions differ.
    once : bool
        A run takes minutes: it is counted, timed and compared in one, without warming up.
    extra : function
        What else the runs have shown.
    """

    name: str
    peer: str
    aim: float | None
    contenders: dict[str, Callable[[], Any]]
    differences: Callable[[], dict[str, tuple[float, float]]]
    module: nn.Module
    note: str = ""
    once: bool = False
    extra: Callable[[], dict[str, Any]] = dict


@dataclass
class Result:
    """What was measured of a case, as it is written to JSON."""

    name: str
    peer: str
    aim: float | None
    note: str
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of the processor with one thread, which other work on the machine hardly changes; else the same as `wall`."""
    wall: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    """MiB that a run adds at its peak to a process that holds the network and the inputs."""
    skipped: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def time(self, contenders: dict[str, Callable[[], Any]], repeats: int) -> None:
        """Let contenders take turns and keep their times."""
        times = alternate(contenders, repeats)
        self.wall = times.wall
        self.seconds = times.processor if torch.get_num_threads() == 1 else times.wall

    @property
    def equal(self) -> bool:
        return all(found <= allowed for found, allowed in self.differences.values())

    def ratio(self, contender: str = "nissl", what: Callable[[list[float]], float] = min) -> float | None:
        """Time of a contender over the peer's."""
        if self.peer not in self.seconds or contender not in self.seconds:
            return None
        return what(self.seconds[contender]) / what(self.seconds[self.peer])

    @property
    def median_ratio(self) -> float | None:
        return self.ratio(what=statistics.median)

    @property
    def memory_ratio(self) -> float | None:
        if self.peer not in self.memory or "nissl" not in self.memory:
            return None
        return self.memory["nissl"] / self.memory[self.peer]

    @property
    def met(self) -> bool | None:
        ratio = self.ratio()
        return None if ratio is None or self.aim is None else ratio <= self.aim


def relative(a: Any, b: Any) -> float:
    """Largest difference between two arrays, as a share of the largest entry of the second."""
    a, b = (np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v, dtype=np.float64) for v in (a, b))
    if a.shape != b.shape:
        raise ValueError(f"results of shape {a.shape} and {b.shape} cannot be compared")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))


def count_rows(module: nn.Module, work: Callable[[], Any]) -> int:
    """Rows that went through the network while `work` ran; the same ruler for every contender."""
    rows = 0

    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    try:
        work()
    finally:
        handle.remove()
    return rows


@dataclass
class Times:
    """Seconds of each run of each contender: of the processor, and of the clock on the wall."""

    processor: dict[str, list[float]]
    wall: dict[str, list[float]]


def alternate(contenders: dict[str, Callable[[], Any]], repeats: int) -> Times:
    """Time contenders that take turns, so that a busy machine slows all of them alike."""
    times = Times({name: [] for name in contenders}, {name: [] for name in contenders})
    for i in range(repeats):
        order = list(contenders) if i % 2 == 0 else list(contenders)[::-1]
        for name in order:
            gc.collect()
            wall, processor = time.perf_counter(), time.process_time()
            contenders[name]()
            times.processor[name].append(time.process_time() - processor)
            times.wall[name].append(time.perf_counter() - wall)
    return times


def held() -> float:
    """Largest memory of this process so far, in MiB: since `peak` last set the mark back where there is /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        return _status("VmHWM")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _status(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def peak(work: Callable[[], Any]) -> float:
    """MiB that `work` adds at its peak to the memory of this process (Linux; of a fresh process elsewhere)."""
    if Path("/proc/self/status").exists():
        gc.collect()
        # "5" sets the high-water mark back to what is held now. getrusage would do worse: its maximum outlives exec,
        # so that a child of a large parent starts with the parent's.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    else:
        before = held()
    work()
    return held() - before


def peak_in_child(case: str, contender: str, examples: int, threads: int) -> float:
    """`peak` of one contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks", "--child", case, contender]
    command += ["--examples", str(examples), "--threads", str(threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {contender!r} in {case!r} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak"])


def measure(case: Case, repeats: int, memory: Callable[[str], float] | None) -> Result:
    """Compare results, count rows, time, and take the peak memory of each contender."""
    result = Result(case.name, case.peer, case.aim, case.note)

    def counted(name: str, work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            result.rows[name] = count_rows(case.module, work)

        return run

    if case.once:
        result.time({name: counted(name, work) for name, work in case.contenders.items()}, 1)
        result.differences = case.differences()
    else:
        result.differences = case.differences()
        for name, work in case.contenders.items():
            counted(name, work)()
        result.time(case.contenders, repeats)
        if memory is not None:
            result.memory = {name: memory(name) for name in case.contenders}
    result.extra = case.extra()
    return result
