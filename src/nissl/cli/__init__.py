"""The command line: ``nissl audit``, ``trace``, ``steer``, ``edit``, ``neurons``, ``decode``, ``methods``, ``sites``, ``papers``, ``reproduce``."""

from __future__ import annotations

import ctypes
import importlib
import json
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nissl.cli import language, neurons, recordings, vision
from nissl.cli.answers import plain, split_names
from nissl.errors import FinishedRunError, InputError, NisslError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Find out which explanations of a network can be believed.",
)

_Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="demo, package.module:factory, timm:NAME, torchvision:NAME, hf:FOLDER, or lm:FOLDER, lm:FILE.gguf, lm:smollm2.",
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""
_MARKS = {
    "believe": ("✓", "green"),
    "with care": ("~", "yellow"),
    "undecided": ("?", "cyan"),
    "do not believe": ("✗", "red"),
}


@app.command()
def audit(
    model: _Model = "demo",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="demo, a folder of pictures, FILE.npz, package.module:factory, or FILE.txt with a prompt a line.",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Keys, separated by commas, such as 'ig(steps=64),gradcam'.")
    ] = None,
    checks: Annotated[str, typer.Option(help="'all', or names separated by commas.")] = "all",
    examples: Annotated[int | None, typer.Option(help="How many examples; 10 of the demo's, all of your own.")] = None,
    budget: Annotated[int, typer.Option(help="Rows that a method may ask for each example; 0 lifts the limit.")] = 96,
    target: Annotated[str, typer.Option(help="'predicted' or 'label': which class is explained.")] = "predicted",
    out: Annotated[Path, typer.Option(help="Run folder: report.html, scores.zarr, trust.parquet, run.json.")] = Path(
        "runs/audit"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in the folder.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default where the model is.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a batch; measured by default.")] = None,
    as_json: _Json = False,
) -> None:
    """Audit explanations of a model on some inputs."""
    from nissl.trust.audit import Shown

    if target not in ("predicted", "label"):
        raise InputError(f"--target {target!r}: choose 'predicted' or 'label'")
    if model.startswith("lm:"):
        if target == "label":
            raise InputError("--target label: prompts have no labels; what the model predicts next is explained")
        network, given, shown = language.prompts_to_audit(model.removeprefix("lm:"), data, examples, device)
        _audit(network, given, None, shown, methods, checks, budget, out, resume, seed, batch_size, as_json)
        return
    if data is None and model == "demo" and examples is None:
        examples = 10
    loaded, inputs, network = vision.load(model, data, examples, seed, device)
    if network.device.type == "cpu" and _keep_freed_memory():
        network.batch_bytes = 2**23
    targets: Any = None
    if target == "label":
        if inputs.labels is None:
            raise InputError(f"--target label: {data or 'demo'} has no labels")
        targets = inputs.labels
    masks = inputs.masks if inputs.masks is not None else _masks(inputs)
    shown = Shown(images=inputs.images, names=inputs.names, class_names=loaded.class_names, masks=masks)
    _audit(network, inputs.inputs, targets, shown, methods, checks, budget, out, resume, seed, batch_size, as_json)


def _audit(
    network: Any, inputs: Any, targets: Any, shown: Any, methods: str | None, checks: str, budget: int, out: Path,
    resume: bool, seed: int, batch_size: int | None, as_json: bool,
) -> None:  # fmt: skip
    from nissl.trust.audit import audit as run

    try:
        result = run(
            network, inputs, targets,
            methods=None if methods is None else split_names(methods), checks=checks, budget=budget or None, shown=shown, out=out,
            resume=resume, seed=seed, command=shlex.join(["nissl", *sys.argv[1:]]),
            runner_options={"batch_size": batch_size, "progress": not as_json},
        )  # fmt: skip
    except FinishedRunError:  # to resume it is to have what it found
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        if as_json:
            print(json.dumps({k: v for k, v in record.items() if k not in ("settings", "finished")}, allow_nan=False))
        else:
            Console().print(Text(f"the run is finished; report: {record['report']}"))
        return
    if as_json:
        print(json.dumps(result.summary(), allow_nan=False, default=str))
        return
    console = Console()
    console.print(_verdict_table(result))
    console.print(_reasons(result))
    console.print()
    console.print(
        f"{result.meta['seconds']:.0f} s, {result.meta['rows']} rows asked, {result.meta['reused']} of them answered from memory"
    )
    console.print(f"report: {result.report}")


@app.command()
def methods(as_json: _Json = False) -> None:
    """List the attribution methods."""
    from nissl.attribution import METHODS
    from nissl.runner.scores import parameters_of

    rows = [
        {
            "method": key,
            "title": cls.title,
            "paper": cls.paper,
            "gradients": cls.differentiates,
            "parameters": parameters_of(cls()),
        }
        for key, cls in METHODS.items()
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("method", "title", "paper", "gradients", "parameters", title=f"{len(rows)} methods")
    for r in rows:
        parameters = ", ".join(f"{k}={v!r}" for k, v in r["parameters"].items())
        table.add_row(r["method"], r["title"], r["paper"], "yes" if r["gradients"] else "no", Text(parameters))
    Console().print(table)


@app.command()
def sites(
    model: _Model = "demo",
    data: Annotated[str | None, typer.Option("--data", "-d", help="Examples to learn shapes from; not needed.")] = None,
    pattern: Annotated[str, typer.Argument(help="A glob such as 'features.*' or '*:pattern'.")] = "*",
    as_json: _Json = False,
) -> None:
    """List the sites of a model."""
    from nissl.network import Network
    from nissl.sources import load_data, load_model

    loaded = load_model(model)
    network = Network(loaded.module, name=loaded.name)
    if data is None and model == "demo":
        data = "demo"
    inputs = None if data is None else load_data(data, loaded, 1).inputs
    found = network.sites(pattern, inputs)
    if as_json:
        print(
            json.dumps([{"address": s.address, "role": s.role, "shape": s.shape, "n_units": s.n_units} for s in found])
        )
        return
    table = Table("site", "role", "shape of a row", "units", title=f"{loaded.name}: {len(found)} sites")
    for s in found:
        shape = "" if s.shape is None else " × ".join(map(str, s.shape))
        table.add_row(Text(s.address), s.role, shape, "" if s.n_units is None else str(s.n_units))
    Console().print(table)
    if inputs is None:
        Console(stderr=True).print("shapes appear with --data: they are known once an input was seen")


@app.command()
def papers(as_json: _Json = False) -> None:
    """List the 59 papers and where each one lives."""
    from nissl.papers import PAPERS

    if as_json:
        keys = ("slug", "title", "year", "room", "object", "study", "status")
        print(json.dumps([{k: getattr(p, k) for k in keys} for p in PAPERS]))
        return
    table = Table("slug", "year", "room", "title", "object", "status", title=f"{len(PAPERS)} papers")
    for p in PAPERS:
        table.add_row(p.slug, str(p.year), p.room, Text(p.title), p.object or "", p.status)
    Console().print(table)


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="A paper's slug; see `nissl papers`.")],
    quick: Annotated[bool, typer.Option("--quick", help="A small variant, in seconds.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
    as_json: _Json = False,
) -> None:
    """Run the study of a paper: its claim, measured."""
    from nissl.papers import paper

    entry = paper(slug)
    if entry.study is None:
        raise InputError(f"{slug} has no study yet; `nissl papers` lists those that have")
    claims = importlib.import_module(entry.study).run(quick=quick, seed=seed, progress=not as_json)
    if as_json:
        told = {"slug": slug, "title": entry.title, "quick": quick, "seed": seed, "claims": claims}
        print(json.dumps(plain(told), allow_nan=False))
        return
    table = Table("claim", "paper", "ours", "interval", "baseline", "holds", title=entry.title)
    for c in claims:
        held = Text("holds", style="green") if c["holds"] else Text("does not hold", style="red")
        table.add_row(
            Text(str(c["claim"])), *(Text(_number(c[k])) for k in ("paper", "ours", "interval", "baseline")), held
        )
    Console().print(table)


for command in (language.trace, language.steer, language.edit, neurons.neurons):
    app.command()(command)
app.command()(recordings.decode)
for command in (vision.concepts, vision.paths):
    app.command()(command)


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_number(v) for v in value) + "]"
    return str(value)


def _masks(data: Any) -> Any:
    """Masks of the objects' boxes, on the grid of the inputs."""
    if data.boxes is None or not isinstance(data.inputs, torch.Tensor) or data.inputs.ndim != 4:
        return None
    import numpy as np

    height, width = data.inputs.shape[-2:]
    y, x = np.mgrid[:height, :width] + 0.5
    left, upper, right, lower = (data.boxes[:, i, None, None] for i in range(4))
    return (x >= left) & (x < right) & (y >= upper) & (y < lower)


_COLUMNS = {
    "faithfulness": "insertion\n− deletion",
    "randomisation_similarity": "random\nweights",
    "gridpg": "GridPG",
    "difull": "DiFull",
    "logit_similarity": "other\nclass",
}


def _verdict_table(result: Any) -> Table:
    """Narrow enough for a terminal of 80 columns; all figures are in the report."""
    names = [f for f in _COLUMNS if f in result.table]
    table = Table(
        title=f"{result.meta['model']}, {result.meta['n_examples']} examples", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        pad_edge=False,
    )  # fmt: skip
    table.add_column("method")
    table.add_column("verdict", no_wrap=True)
    for f in names:
        table.add_column(_COLUMNS[f], justify="right")
    table.add_column("rows", justify="right")
    for method, row in result.table.iterrows():
        mark, colour = _MARKS.get(row["verdict"], ("", ""))
        values = [f"{row[f]:.2f}" if row[f] == row[f] else "–" for f in names]
        table.add_row(Text(str(method)), Text(f"{mark} {row['verdict']}", style=colour), *values, str(row["forward"]))
    return table


def _reasons(result: Any) -> Table:
    """What decided, and for which methods."""
    decided: dict[str, list[str]] = {}
    for method, row in result.table.iterrows():
        for reason in row["reasons"][:1]:
            decided.setdefault(str(reason).partition(":")[0], []).append(str(method))
    table = Table.grid(padding=(0, 2, 0, 0))
    for what, methods in decided.items():
        table.add_row(Text(what), Text(", ".join(methods)))
    return table


def main() -> None:
    """Entry point: errors that nissl raises on purpose are one line, not a traceback."""
    warnings.showwarning = _show_warning
    try:
        app()
    except NisslError as error:
        Console(stderr=True).print(Text(f"nissl: {error}", style="red"), soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command with --resume goes on where it stopped")
        raise SystemExit(130) from None


def _keep_freed_memory() -> bool:
    """Have glibc keep large freed blocks for the next batch instead of giving each back to the system; whether it does.

    Every activation of a batch is tens of megabytes: given back and asked for again, it costs a page fault every 4 KiB,
    a third of the time of a gradient. Only here, where the process is nissl's own and batches are alike: blocks of ever
    new sizes, as in generation, would leave gaps that are never given back.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**30))


def _show_warning(message: Any, category: Any, filename: Any, lineno: Any, file: Any = None, line: Any = None) -> None:
    Console(stderr=True).print(Text(f"warning: {message}", style="yellow"), soft_wrap=True)


if __name__ == "__main__":
    main()
