"""The commands about vision models: ``nissl concepts`` and ``nissl paths``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor

from nissl.cli.answers import device_of, show, write_report
from nissl.errors import InputError, MissingExtraError, NisslError

if TYPE_CHECKING:
    from nissl.attribution.causal_paths import CausalGraph
    from nissl.attribution.neuron_path import Paths
    from nissl.network import Network
    from nissl.runner import Asking, Runner
    from nissl.sources.data import Data
    from nissl.sources.models import LoadedModel

_Data = Annotated[
    str | None, typer.Option("--data", "-d", help="demo, a folder of pictures, FILE.npz, or package.module:factory.")
]
_Classes = Annotated[str | None, typer.Option(help="Names or indices, separated by commas.")]
_Examples = Annotated[int | None, typer.Option(help="How many pictures.")]
_Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default where the model is.")]
_Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]

ENOUGH = 10
"""Pictures that a class must have to be chosen by itself."""
MEASURED = 40
"""Pictures on which the importance and the order of concepts are measured."""
RANDOM_ORDERS = 20


def concepts(
    model: Annotated[str, typer.Option("--model", "-m", help="As in `nissl audit`.")] = "demo",
    data: _Data = None,
    classes: _Classes = None,
    layer: Annotated[
        str | None, typer.Option(help="Where concepts are read, not negative; the last such layer by default.")
    ] = None,
    below: Annotated[
        list[str] | None, typer.Option(help="An earlier layer, to split the most important concept; may be repeated.")
    ] = None,
    n: Annotated[int, typer.Option("--n", help="How many concepts.")] = 10,
    patch: Annotated[int | None, typer.Option(help="Side of the crops in pixels; 2/7 of the picture's.")] = None,
    examples: _Examples = None,
    out: Annotated[Path | None, typer.Option(help="The report, one HTML file.")] = Path("runs/concepts.html"),
    device: _Device = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Find what a network sees in the pictures of a class, how much each concept matters, and where it is (CRAFT)."""
    from nissl.report.page import Section
    from nissl.runner import Runner

    loaded, given, network = load(model, data, examples, seed, device)
    x, runner = _pictures(given, data), Runner(memory=0, progress=not as_json)
    predicted = _predicted(network, x, runner)
    site = last_nonnegative(network, x[:4]) if layer is None else layer
    if layer is not None:
        network.locate(layer)
    side = patch if patch is not None else max(round(min(x.shape[2:]) * 2 / 7), 1)
    groups = _groups(classes, loaded, predicted)
    sections: list[Section] = []
    summary: dict[str, Any] = {"model": network.name, "layer": site, "groups": []}
    tables = []
    for name, rows in groups:
        parts, found, table = _concepts_of(
            network, x[rows], predicted[rows], None if given.images is None else given.images[rows.numpy()], site, n, side,
            list(below or ()), name, seed, runner, not as_json,
        )  # fmt: skip
        sections += parts
        summary["groups"].append({"class": name, "pictures": len(rows), **found})
        tables.append(table.assign(of=name))
    pooled = "" if groups[0][0] != "all classes" else (
        f"No class has {ENOUGH} pictures, so that concepts are those of all {len(x)} pictures together, each explained for the "
        "class that it is put into: they show that it runs, not what a class is made of. "
    )  # fmt: skip
    lead = pooled + " ".join(
        f"{g['class']}, {g['pictures']} pictures: in the order of Sobol indices the insertion area is "
        f"{g['areas'][0]['insertion']:.3g}, in random orders {g['areas'][2]['insertion']:.3g} on average."
        for g in summary["groups"]
    )
    report = write_report(out, f"What {network.name} sees", "Concepts", lead, sections)
    _close()
    show({**summary, "report": report}, pd.concat(tables), f"{lead}\n", as_json, report)


def _concepts_of(
    network: Network, x: Tensor, y: Tensor, display: Any, site: str, n: int, side: int, below: list[str], name: str, seed: int,
    runner: Runner, progress: bool,
) -> tuple[list[Any], dict[str, Any], pd.DataFrame]:  # fmt: skip
    from nissl.concepts.craft import Craft, plot_concepts, plot_curves
    from nissl.report.page import Part, Section

    craft = Craft(site, n, side, random_state=seed, progress=progress).fit(network, x, runner=runner)
    some = torch.from_numpy(np.unique(np.linspace(0, len(x) - 1, min(len(x), MEASURED)).round().astype(int)))
    found = craft.importances(x[some], y[some], runner=runner)
    score, slope = craft.tcav(x[some], y[some], runner=runner)
    rng = np.random.default_rng(seed)
    orders = {
        "Sobol": found.order,
        "TCAV": torch.from_numpy(np.lexsort((-slope.numpy(), -score.numpy()))),
        **{f"random {i}": torch.from_numpy(rng.permutation(n)) for i in range(RANDOM_ORDERS)},
    }
    curves = craft.curves(x[some], orders, y[some], runner=runner)
    table = pd.DataFrame({
        "concept": np.arange(n), "total Sobol index": found.mean.numpy(),
        "direction": ["raises" if s > 0 else "lowers" for s in found.sign.tolist()], "TCAV": score.numpy(),
    }).sort_values("total Sobol index", ascending=False)  # fmt: skip
    areas = _areas(curves)
    measured = f"Measured on {len(some)} pictures" + (
        f", {len(found.skipped)} of them without an index" if found.skipped else ""
    )
    positions = (
        "Whole pictures are dark where the concept is not."
        if craft.positions_
        else "This layer has no positions, so no maps."
    )
    sections = [
        Section(f"Concepts of {name}", f"Crops that use each concept most, the most important concept first. {positions} "
                f"Layer {site}, {len(craft.places_)} crops of {side} pixels of {len(x)} pictures, relative error of the "
                f"factorisation {craft.reconstruction_error_:.2f}.",
                [Part(plot_concepts(craft, x, found, display=display, n_maps=4 if craft.positions_ else 0),
                      "total Sobol index, and whether the concept raises or lowers the class")]),
        Section(f"Importance for {name}", f"{measured}. Indices of interacting concepts sum to more than 1; they have no sign.",
                [Part(table)]),
        Section(f"Order of the concepts of {name}", "A faithful order lets the class rise early when concepts are put in, and fall early "
                "when they are taken away.", [Part(plot_curves(curves), "logit of the class"), Part(areas)]),
    ]  # fmt: skip
    summary: dict[str, Any] = {
        "crops": len(craft.places_), "error": craft.reconstruction_error_, "concepts": table.to_dict("records"),
        "areas": areas.to_dict("records"), "below": [],
    }  # fmt: skip
    concept = int(found.order[0])
    for where in below:
        few = min(n, 5)
        share = min(1.0, max(0.1, 4 * few / len(craft.places_)))
        split = craft.subconcepts(concept, where, x, share, n_concepts=few)
        strongest = torch.from_numpy(np.unique(split.places_[:, 0])[:5])
        parts = split.importances(x[strongest], y[strongest], n_design=16, runner=runner)
        picture = plot_concepts(split, x, parts, display=display, n_maps=4 if split.positions_ else 0)
        sections.append(Section(f"Concept {concept} of {name}, split at {where}", f"{len(split.places_)} crops that use the concept "
                                "most, factorised at the earlier layer.", [Part(picture, "sub-concepts")]))  # fmt: skip
        summary["below"].append({"layer": where, "concept": concept, "indices": parts.mean.tolist()})
        craft, concept = split, int(parts.order[0])
    return sections, summary, table


def _areas(curves: Any) -> pd.DataFrame:
    rows = []
    for kind in ("Sobol", "TCAV", "random"):
        of = [c for name, c in curves.items() if name.startswith(kind)]
        insertion, deletion = (
            [float(getattr(c, f"{what}_area").mean()) for c in of] for what in ("insertion", "deletion")
        )
        spread = [f"{min(v):.3g} to {max(v):.3g}" if len(of) > 1 else "" for v in (insertion, deletion)]
        rows.append({"order": f"{len(of)} random orders, mean" if len(of) > 1 else kind, "insertion": float(np.mean(insertion)),
                     "deletion": float(np.mean(deletion)), "insertion, range": spread[0], "deletion, range": spread[1]})  # fmt: skip
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- paths


def paths(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="As in `nissl audit`; by default the Fashion-MNIST transformer, or LeNet."),
    ] = None,
    data: _Data = None,
    method: Annotated[str, typer.Option(help="causal (chain of layers), neuron (transformer), or auto.")] = "auto",
    classes: _Classes = None,
    layer: Annotated[
        str | None, typer.Option(help="Layers of the chain, or hidden sites, separated by commas.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="class, patches or all: where a transformer's units are meant.")
    ] = "class",
    examples: _Examples = None,
    out: Annotated[Path | None, typer.Option(help="The report, one HTML file.")] = Path("runs/paths.html"),
    device: _Device = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Find the units that carry a class, layer by layer: causal graphs of a chain, neuron paths of a transformer."""
    from nissl.attribution.neuron_path import hidden_sites
    from nissl.runner import Runner

    if method not in ("auto", "causal", "neuron"):
        raise InputError(f"--method {method!r}: choose 'causal', 'neuron' or 'auto'")
    if model is None:
        if data is not None:
            raise InputError("--data without --model: say with --model which network is to be explained")
        model, data = _shipped()
        shipped_neuron = model.endswith("fashion_model")
        examples = (30 if shipped_neuron else 300) if examples is None else examples
    loaded, given, network = load(model, data, examples, seed, device)
    x, runner = _pictures(given, data), Runner(progress=not as_json)
    names = None if layer is None else [w.strip() for w in layer.split(",") if w.strip()]
    if method == "auto":
        try:
            sites = hidden_sites(network, x[:1])
            shapes = [s.shape for a in sites for s in network.sites(a, x[:1])]
            method = "neuron" if all(s is not None and len(s) == 2 for s in shapes) else "causal"
        except InputError:
            method = "causal"
    predicted = _predicted(network, x, runner)
    right = torch.ones(len(x), dtype=torch.bool) if given.labels is None else predicted == given.labels
    chosen = [(c, (predicted == c).nonzero()[:, 0]) for c in _wanted(classes, loaded, predicted)]
    chosen = [(c, rows[right[rows]]) for c, rows in chosen]
    if empty := [c for c, rows in chosen if not len(rows)]:
        raise InputError(
            f"{network.name} puts none of the {len(x)} pictures rightly into {[_name(loaded, c) for c in empty]}"
        )
    if method == "causal":
        if classes is None:  # the three with most pictures
            chosen = sorted(chosen, key=lambda pair: -len(pair[1]))[:3]
        sections, table, lead = _causal(network, x, predicted, chosen, names, loaded, seed, runner)
    else:
        sections, table, lead = _neuron(network, x, chosen, names, tokens, loaded, seed, runner)
    report = write_report(out, f"Units that carry classes of {network.name}", "Paths", lead, sections)
    _close()
    summary = {"model": network.name, "method": method, "classes": table.to_dict("records"), "report": report}
    show(summary, table, f"{lead}\n", as_json, report)


def _causal(
    network: Network, x: Tensor, predicted: Tensor, chosen: list[tuple[int, Tensor]], layers: list[str] | None,
    loaded: LoadedModel, seed: int, runner: Runner,
) -> tuple[list[Any], pd.DataFrame, str]:  # fmt: skip
    from nissl.attribution.causal_paths import CausalPaths
    from nissl.report.page import Part, Section

    rng, rows, sections = np.random.default_rng(seed), [], []
    for c, mine in chosen:
        halves = (mine[::2], mine[1::2]) if len(mine) > 1 else (mine, mine)
        try:
            graph: CausalGraph = CausalPaths(layers=layers).find(network, x[halves[0]], c, runner=runner)
        except InputError as error:
            raise InputError(f"{error} (on the command line: --layer A,B,...)") from error
        others = (predicted != c).nonzero()[:, 0][:200]
        without = graph.necessary(network)
        chance = [graph.random(rng).necessary(network) for _ in range(5)]

        def kept(net: Network, at: Tensor) -> float:
            return float((_predicted(net, x[at], runner) == predicted[at]).double().mean()) if len(at) else np.nan

        alone = _outputs(graph.sufficient(network), x[halves[1]], runner)[:, c]
        whole = _outputs(network, x[halves[1]], runner)[:, c]
        rows.append({
            "class": _name(loaded, c), "pictures": graph.n,
            "still in the class without the graph": kept(without, halves[1]),
            "without a random graph": float(np.mean([kept(net, halves[1]) for net in chance])),
            "other pictures unchanged without it": kept(without, others),
            "logit with the graph alone, share": float(alone.mean() / whole.mean()),
        })  # fmt: skip
        kept_units = pd.DataFrame([
            {"layer": k.layer, "units": len(k.causes), "of": graph.edges[k.layer].n_inputs, "chosen by": k.by}
            for k in graph.layers
        ])  # fmt: skip
        sections.append(Section(f"Graph of {_name(loaded, c)}", "Units whose edges towards the class were needed: cut, the logit falls. "
                                "The first layer is not tested.",
                                [Part(graph.plot(), "thick edges: large effects"), Part(kept_units)]))  # fmt: skip
    table = pd.DataFrame(rows)
    sections.insert(0, Section("Necessary and sufficient", "A graph is found on every second picture; these figures are those of the "
                               "others (of the same picture where a class has one). Random graphs have as many units in each "
                               "layer; mean of five.", [Part(table)]))  # fmt: skip
    lead = (
        f"Without its graph {table.iloc[:, 2].mean():.0%} of a class's pictures stay in it on average, without a random graph of "
        f"the same size {table.iloc[:, 3].mean():.0%}; of other pictures {table.iloc[:, 4].mean():.0%} keep their class."
    )
    return sections, table, lead


def _neuron(
    network: Network, x: Tensor, chosen: list[tuple[int, Tensor]], sites: list[str] | None, tokens: Any,
    loaded: LoadedModel, seed: int, runner: Runner,
) -> tuple[list[Any], pd.DataFrame, str]:  # fmt: skip
    from nissl.attribution.neuron_path import NeuronPath, Paths
    from nissl.report.page import Part, Section

    rows = torch.cat([r for _, r in chosen])
    y = torch.cat([torch.full((len(r),), c) for c, r in chosen])
    shown = x[rows]
    path = NeuronPath(sites=sites, tokens=tokens).find(network, shown, y, runner=runner, seed=seed)
    shape = network.sites(path.sites[0], shown[:1])[0].shape
    n_tokens = None if shape is None else shape[0]
    solo = [NeuronPath(cross_terms=False, sites=[s], tokens=tokens).find(network, shown, y, runner=runner, seed=seed).units
            for s in path.sites]  # fmt: skip
    rng = np.random.default_rng(seed)
    drawn = torch.stack([torch.from_numpy(rng.integers(0, k, (len(shown), 1))) for k in path.n_units], 1)
    clean = _outputs(network, shown, runner).softmax(1).gather(1, y[:, None])[:, 0]
    change = {}
    for name, units in {
        "path": path.units,
        "best units by themselves": torch.cat(solo, 1),
        "random units": drawn,
    }.items():
        here: Paths = Paths(path.sites, units, path.influence, path.value, path.scores, path.tokens, path.n_units)
        for what, factor in (("removed", 0.0), ("doubled", 2.0)):
            p = _outputs(network, shown, runner, here.edits(factor, n_tokens)).softmax(1).gather(1, y[:, None])[:, 0]
            change[name, what] = (p - clean).numpy()
    effects = pd.DataFrame([
        {"units": name, **{f"{what}, change of probability": float(change[name, what].mean()) for what in ("removed", "doubled")}}
        for name in dict.fromkeys(k[0] for k in change)
    ])  # fmt: skip
    table = pd.DataFrame([
        {"class": _name(loaded, c), "pictures": int((y == c).sum()), "probability": float(clean[y == c].mean()),
         "path removed": float(change["path", "removed"][(y == c).numpy()].mean()),
         "path doubled": float(change["path", "doubled"][(y == c).numpy()].mean()),
         "most frequent path": " \u2192 ".join(map(str, path.shared((y == c).nonzero()[:, 0].tolist())[:, 0].tolist()))}
        for c, _ in chosen
    ])  # fmt: skip
    sections = [
        Section("Effect", f"Mean over {len(shown)} pictures. Best units by themselves: the unit of each block with the largest integrated "
                "gradients, found without regard to the others.", [Part(effects)]),
        Section("Classes", "Change of the class's probability when each picture's own path is set to 0 or doubled.", [Part(table)]),
        Section("Paths", parts=[Part(path.plot(y.numpy()), "one line a picture, coloured by class index")]),
    ]  # fmt: skip
    means = effects.set_index("units").iloc[:, 0]
    lead = (
        f"Removing one unit a block changes the probability of the class by {means['path']:+.3f} on average; the best units by "
        f"themselves by {means['best units by themselves']:+.3f}, random units by {means['random units']:+.3f}."
    )
    return sections, table, lead


# ---------------------------------------------------------------- networks and data of `nissl paths`


def fashion_model() -> LoadedModel:
    """The vision transformer that ships with nissl."""
    from nissl.models.vit import fashion_vit
    from nissl.sources.fashion import FASHION_CLASSES
    from nissl.sources.models import LoadedModel

    return LoadedModel(fashion_vit(), "Fashion-MNIST transformer", list(FASHION_CLASSES))


def fashion_data() -> tuple[Tensor, np.ndarray]:
    """Unseen pictures of Fashion-MNIST and their classes."""
    from nissl.models.vit import fashion_input
    from nissl.sources.fashion import fashion_mnist

    images, labels = fashion_mnist("test")
    return fashion_input(images), labels


def lenet_model() -> LoadedModel:
    """The LeNet that was trained normally."""
    from nissl.sources.digits import load_lenet
    from nissl.sources.models import LoadedModel

    return LoadedModel(load_lenet("clean"), "LeNet", [str(i) for i in range(10)])


def lenet_data() -> tuple[Tensor, np.ndarray]:
    """Digits of MNIST and their classes."""
    from nissl.sources.digits import mnist_digits

    return mnist_digits()


def _shipped() -> tuple[str, str]:
    """The first network whose data are there."""
    from nissl.sources.digits import LENET_ARCHIVE, LENET_PIP
    from nissl.sources.fashion import FASHION_FOLDER, FASHION_HOW

    here = "nissl.cli.vision:"
    if (Path(os.environ.get(*FASHION_FOLDER)) / "t10k-images-idx3-ubyte.gz").is_file():
        return f"{here}fashion_model", f"{here}fashion_data"
    if Path(LENET_ARCHIVE).is_file():
        return f"{here}lenet_model", f"{here}lenet_data"
    raise MissingExtraError(
        f"name a network and pictures with --model and --data. Without them, Fashion-MNIST is needed ({FASHION_HOW}), or MNIST's "
        f"LeNet in the current folder ({LENET_PIP})"
    )


# ---------------------------------------------------------------- what both share


def load(
    model: str, data: str | None, examples: int | None, seed: int, device: str | None
) -> tuple[LoadedModel, Data, Network]:
    """A model, the data that it is to be run on, and its network; the demo's where none is named."""
    from nissl.network import Network
    from nissl.sources import load_data, load_model

    loaded = load_model(model)
    if data is None:
        if model != "demo":
            raise InputError("--model names your own model: say with --data what it is to be run on")
        data = "demo"
    given = load_data(data, loaded, examples, seed)
    return loaded, given, Network(loaded.module, device=device_of(device), name=loaded.name)


def _pictures(given: Data, data: str | None) -> Tensor:
    if not isinstance(given.inputs, Tensor) or given.inputs.ndim != 4:
        raise InputError(f"--data {data or 'demo'}: pictures (n, channels, height, width) are needed")
    return given.inputs


def _outputs(network: Network, x: Tensor, runner: Runner, edits: Any = ()) -> Tensor:
    """Outputs (n, n_classes)."""
    from nissl.network import Pass

    def ask(rows: Tensor) -> Asking[Tensor]:
        return (yield Pass(rows, edits)).output

    parts = (x,) if edits else x.split(16)  # an edit may hold a mask a row: rows stay together
    found = runner.collect(network, [partial(ask, rows) for rows in parts], "outputs")
    if found[0].ndim != 2 or found[0].shape[1] < 2:
        raise InputError(
            f"{network.name} gives {tuple(found[0].shape[1:])} for a picture; at least two classes are needed"
        )
    return torch.cat(found).detach().cpu()


def _predicted(network: Network, x: Tensor, runner: Runner) -> Tensor:
    return _outputs(network, x, runner).argmax(1)


def _wanted(classes: str | None, loaded: LoadedModel, predicted: Tensor) -> list[int]:
    """Indices of the classes asked for; those that occur by default."""
    from nissl.sources.data import labels_of_texts

    if classes is None:
        return predicted.unique().tolist()
    words = [w.strip() for w in classes.split(",") if w.strip()]
    if not words:
        raise InputError("--classes names no class")
    return list(dict.fromkeys(labels_of_texts(words, loaded, words, "--classes").tolist()))


def _groups(classes: str | None, loaded: LoadedModel, predicted: Tensor) -> list[tuple[str, Tensor]]:
    """Name and rows of what concepts are looked for in: classes, or all pictures where no class has enough."""
    if classes is not None:
        found = [(c, (predicted == c).nonzero()[:, 0]) for c in _wanted(classes, loaded, predicted)]
        if empty := [_name(loaded, c) for c, rows in found if not len(rows)]:
            raise InputError(f"{loaded.name} puts none of the {len(predicted)} pictures into {empty}")
        return [(_name(loaded, c), rows) for c, rows in found]
    counts = predicted.bincount()
    if int(counts.max()) >= ENOUGH:
        c = int(counts.argmax())
        return [(_name(loaded, c), (predicted == c).nonzero()[:, 0])]
    return [("all classes", torch.arange(len(predicted)))]


def _name(loaded: LoadedModel, c: int) -> str:
    return f"class {c}" if loaded.class_names is None or c >= len(loaded.class_names) else loaded.class_names[c]


def last_nonnegative(network: Network, x: Tensor) -> str:
    """The last activation with places that is not negative and at which the network can be cut."""
    from nissl.network import Pass
    from nissl.network.part import above

    sites = [s for s in network.sites("*", x[:1]) if s.address != "input" and s.shape is not None and len(s.shape) == 3]
    for s in reversed([s for s in sites if s.role != "pool" and s.shape is not None and s.shape[1] * s.shape[2] > 1]):
        a = network.run(Pass(x, read=[s.address], output=False)).reads[s.address]
        if float(a.min()) < 0 or float(a.max()) == 0:
            continue
        try:
            above(network, s.address, x[:1])
        except NisslError:
            continue
        return s.address
    raise InputError(
        f"{network.name} has no layer with places whose activations are not negative; name one with --layer"
    )


def _close() -> None:
    import matplotlib.pyplot as plt

    plt.close("all")
