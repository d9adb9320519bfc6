"""The command ``nissl neurons``: units of an image network on one page, or the neurons of a language model that look for a word."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nissl.cli import language
from nissl.cli.answers import make_parent, plain, show
from nissl.cli.vision import _pictures, load
from nissl.errors import InputError


def neurons(
    concept: Annotated[
        str | None, typer.Option(help="Language: a word, such as 'dog', whose neurons are looked for.")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Language: whose next token may be the word: neurons are clamped there. May be repeated."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Vision: demo, package.module:factory, timm:NAME, torchvision:NAME, hf:FOLDER. With --concept: smollm2, a "
            "folder of a transformers model, or FILE.gguf.",
        ),
    ] = None,
    n: Annotated[int, typer.Option("--n", help="Language: how many neurons.")] = 12,
    by: Annotated[str, typer.Option(help="Language: z, cosine, probability or logit.")] = "z",
    clamped: Annotated[int, typer.Option(help="Language: how many of them are clamped.")] = 5,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="demo, a folder of pictures, FILE.npz, or package.module:factory."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Sites, separated by commas; three convolutions by default. See nissl sites.")
    ] = None,
    units: Annotated[
        str,
        typer.Option(
            help="How many units of each layer at most; or their numbers, separated by commas: '3,17' or '3,'."
        ),
    ] = "64",
    examples: Annotated[int | None, typer.Option(help="How many images; all by default.")] = None,
    exemplars: Annotated[int, typer.Option(help="How many images are shown of each unit.")] = 12,
    facets: Annotated[int, typer.Option(help="Into how many facets they are sorted; 1 leaves them together.")] = 2,
    synthesis: Annotated[
        bool, typer.Option("--synthesis", help="Also draw a picture of each facet, by ascent: minutes a unit.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The page, one HTML file.")] = Path("runs/neurons.html"),
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default where the model is.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Look at units of an image network on one page; with --concept, find a language model's neurons for a word."""
    if concept is not None:
        given = {"--data": data, "--layers": layers, "--examples": examples, "--synthesis": synthesis or None}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{wrong[0]} belongs to image networks; with --concept a language model is asked")
        language.neurons(
            concept=concept, prompt=prompt, model=model or "smollm2", n=n, by=by, clamped=clamped, out=out, device=device,
            as_json=as_json,
        )  # fmt: skip
        return
    if prompt:
        raise InputError("--prompt belongs to language models: say with --concept which word is looked for")
    if (model or "").startswith("lm:") or model == "smollm2" or (model or "").endswith(".gguf"):
        raise InputError(f"--model {model}: of a language model, say with --concept which word is looked for")
    _vision(
        model or "demo", data, _listed(layers), _units(units), examples, exemplars, facets, synthesis, out, seed, device,
        batch_size, as_json,
    )  # fmt: skip


def _vision(
    model: str, data: str | None, layers: list[str] | None, units: int | list[int], examples: int | None, exemplars: int,
    facets: int, synthesis: bool, out: Path, seed: int, device: str | None, batch_size: int, as_json: bool,
) -> None:  # fmt: skip
    from nissl.concepts.units import unit_sheets
    from nissl.report.neurons import write_neurons
    from nissl.sources.images import Preprocess

    loaded, given, network = load(model, data, examples, seed, device)
    x = _pictures(given, data)
    make_parent(out)
    scale: dict[str, Any] = {}
    if isinstance(loaded.preprocess, Preprocess) and given.images is not None:
        scale = {"mean": loaded.preprocess.mean, "std": loaded.preprocess.std}
    found = unit_sheets(
        network, x, layers, labels=given.labels, class_names=loaded.class_names, names=given.names,
        pictures=given.images, units=units, exemplars=exemplars, facets=facets, synthesis=synthesis, batch=batch_size,
        seed=seed, progress=not as_json, **scale,
    )  # fmt: skip
    report = str(write_neurons(found, out, command=shlex.join(["nissl", *sys.argv[1:]]), **scale))
    table = found.table()
    if as_json:
        summary = {
            "model": network.name, "n_images": found.exemplars.n_images, "layers": list(found.exemplars.sites),
            "units": table.to_dict("records"), "cost": found.cost, "report": report,
        }  # fmt: skip
        print(json.dumps(plain(summary), allow_nan=False))
        return
    strongest = table.sort_values("change" if "change" in table else "selectivity", key=abs, ascending=False)
    shown = strongest.head(15).drop(columns=["fires", "facets", "silhouette"]).reset_index(drop=True)
    lead = f"{len(found)} units of {len(found.exemplars.sites)} layers over {found.exemplars.n_images} images; those that matter most:\n"
    show({}, shown, lead, False, report)


def _listed(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [p.strip() for p in text.split(",") if p.strip()]
    if not names:
        raise InputError("--layers names no site; nissl sites lists them")
    return names


def _units(text: str) -> int | list[int]:
    parts = [p.strip() for p in text.split(",")]
    if not all(p.isdecimal() for p in parts if p) or not any(parts):
        raise InputError(f"--units {text!r}: give how many, such as 64, or numbers separated by commas, such as 3,17")
    return int(text) if len(parts) == 1 else [int(p) for p in parts if p]
