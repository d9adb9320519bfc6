"""The audit: which explanations of a network can be believed, with the evidence."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import platform
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from torch.nn import functional as F

import nissl
from nissl.arguments import at_least, instance, items
from nissl.attribution import METHODS, Method, method
from nissl.errors import InputError
from nissl.network import Network, Pass, target
from nissl.network.target import as_target
from nissl.report import write_report
from nissl.runner import AnswerCache, Explained, Job, Question, Runner, make_questions
from nissl.runner.runner import tune_format
from nissl.runner.scores import build_scores, parameters_of
from nissl.trust.agreement import agreement_matrix
from nissl.trust.check import Check, Figure, Measured, positions
from nissl.trust.faithfulness import Completeness, MaxSensitivity, RegionCurves, Subsets
from nissl.trust.groundtruth import ground_truth, pointing_figures
from nissl.trust.run_folder import RunFolder
from nissl.trust.sanity import InputInvariance, RandomLogit, WeightRandomisation
from nissl.trust.statistics import bootstrap
from nissl.trust.verdict import Claims, VerdictSettings, judge

CHECKS: dict[str, type[Check]] = {
    c.name: c
    for c in (RegionCurves, Subsets, Completeness, MaxSensitivity, WeightRandomisation, RandomLogit, InputInvariance)
}
"""Checks of single examples by name."""

OTHER_CHECKS = ("ground_truth", "pointing", "agreement")
"""Checks over all examples."""

BASELINES = ("random", "edge")
"""Methods that every audit carries."""

_IMAGE_METHODS = ("saliency", "ixg", "ig", "smoothgrad", "guided", "lrp", "gradcam", "layercam", "occlusion", "rise")
_METHODS = ("saliency", "ixg", "ig", "smoothgrad", "gradshap", "occlusion", "kernelshap", "rise")
_BLACK_BOX = ("occlusion", "rise", "lime", "kernelshap", "shapley")

GRIDS = 6
"""Grids for each ground-truth setting in an audit."""

GRID_BUDGET = 8
"""Rows that a method may ask for one grid; a grid costs as much as its cells."""

GROUND_TRUTH = {
    "gridpg": Figure(
        "ground_truth", "GridPG", "Share of positive scores in the cell of the explained class.", "higher"
    ),
    "difull": Figure(
        "ground_truth", "DiFull", "The same where only that cell is connected to the explained output.", "higher"
    ),
    "dipart": Figure(
        "ground_truth", "DiPart", "The same where only that part of the last feature map is connected.", "higher"
    ),
}
POINTING = {
    "pointing": Figure("pointing", "Pointing game", "Whether the highest score lies in the object.", "higher"),
    "energy_pointing": Figure("pointing", "Energy pointing game", "Share of positive scores in the object.", "higher"),
}


@dataclass(eq=False)
class AuditResult:
    """What an audit found.

    Attributes
    ----------
    table : DataFrame
        One row a method: verdict, reasons, every figure with its interval (``F``, ``F_low``, ``F_high``), cost.
    figures : DataFrame
        Tidy: method, check, figure, example (-1: not of one example), value.
    figure_info : dict of figure to dict
        Title, what is better, chance level, one sentence of help.
    curves : DataFrame
        Tidy: method, check, example, x, y.
    scores : dict of method to DataArray
    inputs, input_kind, examples
        What was explained, as it is shown.
    agreement : dict of measure to DataFrame
        Method by method, mean over examples.
    pictures : list of dict
        Further pictures for the report.
    meta : dict
        Everything needed to repeat the audit.
    report : Path or None
    """

    table: pd.DataFrame
    figures: pd.DataFrame
    figure_info: dict[str, dict[str, Any]]
    curves: pd.DataFrame
    scores: dict[str, xr.DataArray]
    inputs: Any
    input_kind: str
    examples: pd.DataFrame
    agreement: dict[str, pd.DataFrame]
    pictures: list[dict[str, Any]]
    meta: dict[str, Any]
    report: Path | None = None

    def __repr__(self) -> str:
        lines = [f"{name}: {row.verdict}" for name, row in self.table.iterrows()]
        return f"AuditResult({self.meta['n_examples']} examples; {', '.join(lines)})"

    def summary(self) -> dict[str, Any]:
        """Verdicts, figures, cost and report as plain values, for machines."""
        names = list(self.figure_info)

        def number(value: Any) -> float | None:
            return None if value is None or not np.isfinite(value) else float(value)

        figures = {
            str(m): {
                f: {k: number(row.get(f"{f}{s}")) for k, s in (("value", ""), ("low", "_low"), ("high", "_high"))}
                for f in names
                if f in row and number(row[f]) is not None
            }
            for m, row in self.table.iterrows()
        }
        forward, backward, seconds = (self.table[k].to_dict() for k in ("forward", "backward", "seconds"))
        cost = {
            str(m): {"forward": int(forward[m]), "backward": int(backward[m]), "seconds": round(float(seconds[m]), 3)}
            for m in self.table.index
        }
        return {
            "verdicts": {str(m): r["verdict"] for m, r in self.table.iterrows()},
            "reasons": {str(m): list(r["reasons"]) for m, r in self.table.iterrows()},
            "figures": figures,
            "cost": cost,
            "report": None if self.report is None else str(self.report),
            "meta": self.meta,
        }


@dataclass(frozen=True, eq=False)
class Shown:
    """How examples are shown: pictures, words, names. All optional.

    Attributes
    ----------
    images : array of uint8 (n, height, width, 3)
    tokens : list of list of str
    names : list of str
    class_names : list of str
    masks : array of bool (n, height, width)
        Where the object is; boxes are turned into masks.

    Raises
    ------
    InputError
        A field has another type or shape, or a mask is empty.
    """

    images: np.ndarray | None = None
    tokens: list[list[str]] | None = None
    names: Sequence[str] | None = None
    class_names: Sequence[str] | None = None
    masks: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "names", "class_names"):
            if getattr(self, name) is not None:
                items(name, getattr(self, name))
        if self.images is not None:
            images = np.asarray(self.images)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
                raise InputError(f"images must be (n, height, width, 3) of uint8, got {images.shape} of {images.dtype}")
        if self.masks is not None:
            masks = np.asarray(self.masks)
            if masks.ndim != 3:
                raise InputError(f"masks must be (n, height, width), got {masks.shape}")
            if not masks.any((1, 2)).all():
                raise InputError(f"masks are empty for examples {np.flatnonzero(~masks.any((1, 2))).tolist()[:10]}")


def default_methods(network: Network, q: Question) -> list[str]:
    """Keys of the methods that an audit takes when none are named."""
    if not network.differentiable:
        return list(_BLACK_BOX)
    if q.input.ndim == 4 and q.input.is_floating_point():
        return list(_IMAGE_METHODS)
    return list(_METHODS)


def resolve_methods(methods: Any, network: Network, q: Question, budget: int | None) -> dict[str, Method]:
    """Methods by name from what users write, baselines added, cut to the budget."""
    if methods is None or methods == "default":
        methods = default_methods(network, q)
    if isinstance(methods, (str, Method)):
        methods = [methods]
    if isinstance(methods, Mapping):
        named = {str(k): method(v) for k, v in methods.items()}
    else:
        named = {}
        for m in items("methods", methods):
            made = method(m)
            key = made.name if not isinstance(m, str) else m.strip()
            if key in named:
                raise InputError(f"method {key!r} is named twice; give a mapping of names to methods")
            named[key] = made
    if not named:
        raise InputError("no method was given")
    for b in BASELINES:
        named.setdefault(b, METHODS[b]())
    if budget is not None:
        named = {k: m.at_budget(budget) for k, m in named.items()}
    for k, m in named.items():
        if m.differentiates and not network.differentiable:
            raise InputError(
                f"{k} needs gradients, which {network.name} has not; leave it out, or use {', '.join(_BLACK_BOX)}"
            )
    return named


def resolve_checks(checks: Any) -> tuple[list[Check], set[str]]:
    """Checks of single examples, and the names of the others."""
    if checks in (None, "all"):
        checks = [*CHECKS, *OTHER_CHECKS]
    if isinstance(checks, (str, Check)):
        checks = [c.strip() for c in checks.split(",")] if isinstance(checks, str) else [checks]
    single: list[Check] = []
    other: set[str] = set()
    for c in items("checks", checks):
        if isinstance(c, Check):
            single.append(c)
        elif c in CHECKS:
            single.append(CHECKS[c]())
        elif c in OTHER_CHECKS:
            other.add(c)
        else:
            known = [*CHECKS, *OTHER_CHECKS]
            near = difflib.get_close_matches(str(c), known, 3, 0.4)
            raise InputError(
                f"there is no check {c!r}; {'did you mean ' + ', '.join(near) if near else 'choose among ' + ', '.join(known)}"
            )
    names = [c.name for c in single]
    if twice := [n for n in names if names.count(n) > 1]:
        raise InputError(f"check {twice[0]!r} is named twice")
    if not single and not other:
        raise InputError("no check was given")
    return single, other


def audit(
    network: Any,
    inputs: Any,
    targets: Any = None,
    *,
    methods: Any = None,
    checks: Any = "all",
    budget: int | None = 96,
    sanity_examples: int = 3,
    shown: Shown | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    runner: Runner | None = None,
    runner_options: Mapping[str, Any] | None = None,
    settings: VerdictSettings | None = None,
    command: str = "",
) -> AuditResult:
    """Find out which explanations of a network can be believed.

    Parameters
    ----------
    network : Network, or what makes one
        A torch module, a fitted scikit-learn classifier or a prediction function.
    inputs : Tensor, array, tuple or mapping
        Examples first; ten or more for verdicts on many methods (docs/verdicts.md says why).
    targets : class indices, Target, callable or None
        What is explained; by default each example's predicted class.
    methods : list of keys or Methods, or mapping of name to Method, optional
        See ``nissl methods``. The baselines ``random`` and ``edge`` are always added.
    checks : "all" or list of names, default "all"
        curves, subsets, completeness, max_sensitivity, randomisation, logit, invariance, ground_truth, pointing, agreement.
    budget : int or None, default 96
        Rows that a method may ask for each example, so that methods are compared at equal cost; None lifts it.
    sanity_examples : int, default 3
        Examples on which methods are run again with other weights, classes and inputs.
    shown : Shown, optional
        Pictures, names and class names for the report; masks for the pointing games.
    out : path, optional
        Run folder; the report is written there.
    resume : bool, default False
        Go on with an interrupted run in `out`; one that is finished raises FinishedRunError and asks nothing again.
    seed : int, default 0
    runner : Runner, optional
    runner_options : mapping, optional
        What a Runner is made with where none is given: ``batch_size``, ``progress`` …
    settings : VerdictSettings, optional
    command : str
        Kept in the record.

    Returns
    -------
    AuditResult

    Raises
    ------
    InputError, TargetError, GradientError, RunFolderError, FinishedRunError
        Before anything is run where that can be known.

    Examples
    --------
    >>> import torch, nissl
    >>> net = nissl.Network(torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)))
    >>> result = nissl.audit(net, torch.randn(4, 6), methods=["ixg"], checks=["curves"])
    >>> list(result.table.index)
    ['ixg', 'random', 'edge']
    """
    started = time.time()
    network = network if isinstance(network, Network) else Network(network)
    shown = Shown() if shown is None else shown
    settings = VerdictSettings() if settings is None else settings
    instance("shown", shown, Shown)
    instance("settings", settings, VerdictSettings)
    if budget is not None:
        at_least("budget", budget, 1)
    at_least("sanity_examples", sanity_examples, 1)
    given, runner = runner, _runner(runner_options) if runner is None else runner
    instance("runner", runner, Runner)
    single, other = resolve_checks(checks)
    questions = make_questions(network, inputs, targets, seed)
    n = len(questions)
    for name in ("images", "tokens", "names", "masks"):
        value = getattr(shown, name)
        if value is not None and len(value) != n:
            raise InputError(f"{name} has {len(value)} entries for {n} examples")
    if shown.images is not None and questions[0].input.ndim != 4:
        shape = tuple(questions[0].input.shape[1:])
        raise InputError(f"images show inputs (channel, height, width); these inputs have rows of shape {shape}")
    table = resolve_methods(methods, network, questions[0], budget)
    questions, examples = _predict(network, questions, targets, shown)
    record = _record(network, questions, table, single, other, budget, sanity_examples, seed, settings)
    folder = None if out is None else RunFolder(out, record, resume)
    try:
        if given is None and folder is not None:
            runner.cache = AnswerCache(runner.cache.memory, folder.partial / "answers")
        tune_format(network, Pass(questions[0].inputs if n == 1 else _stack(questions[:8])))
        found = _examine(network, questions, table, single, sanity_examples, runner, folder)
        result = _result(
            network, questions, table, single, other, found, examples, shown, settings, runner, seed, budget
        )
        result.meta.update(
            model=network.name, n_examples=n, budget=budget, seed=seed, fingerprint=record["fingerprint"],
            sanity_examples=min(sanity_examples, n), checks=record["checks"], methods=record["methods"], command=command,
            started=time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)), seconds=round(time.time() - started, 1),
            versions=record["versions"], memory_format=str(network.memory_format).removeprefix("torch."),
            rows=sum(c.forward for c in runner.costs.values()), reused=sum(c.reused for c in runner.costs.values()),
            batch_fill=round(runner.slots[0] / max(runner.slots[1], 1), 3),
        )  # fmt: skip
        if folder is not None:
            result.report = folder.path / "report.html"
            # the record last: it says that the run is finished
            write_report(dataclasses.replace(result, scores=_drawable(result)), result.report)
            folder.finish(result.scores, result.figures, result.summary())
        return result
    finally:
        if folder is not None:
            folder.close()


def _runner(options: Mapping[str, Any] | None) -> Runner:
    """A Runner without a folder yet: options that are wrong shall leave none behind."""
    known = [k for k in inspect.signature(Runner).parameters if k != "folder"]
    if unknown := [k for k in options or {} if k not in known]:
        raise InputError(f"runner_options has no {unknown[0]!r}; there are {', '.join(known)}")
    return Runner(**(options or {}))


def _stack(questions: Sequence[Question]) -> dict[str, Any]:
    first = questions[0].inputs
    return {k: torch.cat([q.inputs[k] for q in questions]) if isinstance(v, Tensor) else v for k, v in first.items()}


def _predict(
    network: Network, questions: list[Question], targets: Any, shown: Shown
) -> tuple[list[Question], pd.DataFrame]:
    """Settle what is explained for each example, and say what the network makes of it."""
    rows: list[dict[str, Any]] = []
    settled: list[Question] = []
    names = shown.class_names
    wanted = None if targets is None else as_target(targets).rows(len(questions))
    for start in range(0, len(questions), 16):
        some = questions[start : start + 16]
        output = network.run(Pass(_stack(some))).output
        assert output is not None
        is_table = output.ndim == 2 and output.shape[1] > 1
        if is_table:
            is_probability = bool((output >= 0).all()) and bool(((output.sum(1) - 1).abs() < 1e-4).all())
            p = output if is_probability else output.softmax(1)
        for i, q in enumerate(some):
            label, predicted, probability = "", "", float("nan")
            if is_table:
                best = int(output[i].argmax())
                predicted = str(names[best]) if names is not None and best < len(names) else f"class {best}"
                probability = float(p[i, best])
                if wanted is None:
                    q = q.about(target.class_logit(best))
                if q.target.name == "class_logit":
                    y = int(q.target.values[0])
                    label = str(names[y]) if names is not None and 0 <= y < len(names) else f"class {y}"
            q.target(output[i : i + 1]) if q.target.site is None else None  # a target that does not fit fails here
            settled.append(q)
            name = str(shown.names[start + i]) if shown.names is not None else f"example {start + i}"
            rows.append({"name": name, "label": label, "predicted": predicted, "probability": probability})
    return settled, pd.DataFrame(rows)


def _record(
    network: Network, questions: list[Question], table: Mapping[str, Method], single: list[Check], other: set[str],
    budget: int | None, sanity_examples: int, seed: int, settings: VerdictSettings,
) -> dict[str, Any]:  # fmt: skip
    """Everything a result depends on."""
    data = [q.ask(target=None, scalar=True).content_key() for q in questions]
    return {
        "fingerprint": network.fingerprint(),
        "data": data,
        "methods": {k: {"class": type(m).__name__, **parameters_of(m)} for k, m in table.items()},
        "checks": {**{c.name: _public(parameters_of(c)) for c in single}, **{k: {} for k in sorted(other)}},
        "budget": budget,
        "sanity_examples": sanity_examples,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "versions": {"nissl": nissl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def _public(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if not k.startswith("_")}


@dataclass(eq=False)
class _Found:
    scores: Explained
    measured: Measured
    cost: dict[str, float] = field(default_factory=dict)


def _examine(
    network: Network, questions: list[Question], table: Mapping[str, Method], checks: list[Check], sanity_examples: int,
    runner: Runner, folder: RunFolder | None,
) -> dict[tuple[str, int], _Found]:  # fmt: skip
    """Scores and figures of every method on every example; example by example, so that equal Passes meet."""
    found: dict[tuple[str, int], _Found] = {}

    def pipeline(name: str, q: Question, job: Job) -> Generator[Any, Any, tuple[Explained, Measured]]:
        m = table[name]
        scores = yield from m.explain(q.at(network, m.differentiates, None))
        measured = Measured()
        for check in checks:
            if check.reruns and q.example >= sanity_examples:
                continue
            if isinstance(check, Completeness) and not m.complete:
                continue
            if isinstance(check, RandomLogit) and not m.class_sensitive and name not in BASELINES:
                continue
            job.name = f"check {check.name}"  # what checks ask is not the method's cost
            measured |= yield from check.measure(q, scores, m)
        return scores, measured

    def jobs() -> Iterator[Job]:
        for q in questions:
            for name in table:
                kept = None if folder is None else folder.kept(f"{_file(name)}-{q.example}")
                if kept is not None:
                    scores, measured, costs = kept
                    found[name, q.example] = _Found(scores, measured)
                    left[q.example] -= 1
                    for k, cost in costs.items():  # asked before the interruption, and asked for all the same
                        spent = runner.cost(k)
                        spent += cost
                    continue
                job = Job(name, (name, q.example), network, lambda: iter(()))  # pyright: ignore[reportArgumentType]
                job.start = lambda name=name, q=q, job=job: pipeline(name, q, job)
                yield job

    before = {name: dataclasses.asdict(runner.cost(name)) for name in table}
    left = {q.example: len(table) for q in questions}
    passes: dict[int, set[str]] = {}
    for job, (scores, measured) in runner.drive(jobs(), len(questions) * len(table), "auditing"):
        name, i = job.key
        found[job.key] = _Found(scores, measured)
        passes.setdefault(i, set()).update(job.passes)
        left[i] -= 1
        if folder is not None:
            folder.keep(f"{_file(name)}-{i}", scores, measured, job.spent)
            if not left[i]:
                runner.cache.forget(passes.pop(i))
    for name in table:
        now = dataclasses.asdict(runner.cost(name))
        spent = {k: v - before[name][k] for k, v in now.items()}
        found[name, -1] = _Found(found[name, 0].scores, Measured(), spent)
    return found


def _file(name: str) -> str:
    """A method's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else f"%{ord(c):x}" for c in name)


def _result(
    network: Network, questions: list[Question], table: Mapping[str, Method], checks: list[Check], other: set[str],
    found: Mapping[tuple[str, int], _Found], examples: pd.DataFrame, shown: Shown, settings: VerdictSettings,
    runner: Runner, seed: int, budget: int | None,
) -> AuditResult:  # fmt: skip
    info: dict[str, Figure] = {}
    for c in checks:
        info |= c.figures
    by_figure = {f: c.name for c in checks for f in c.figures}
    rows: list[tuple[str, str, str, int, float]] = []
    curves: list[pd.DataFrame] = []
    scores: dict[str, xr.DataArray] = {}
    pictures: list[dict[str, Any]] = []
    n = len(questions)
    for name, m in table.items():
        mine = [found[name, i] for i in range(n)]
        q = questions[0].at(network, m.differentiates, None)
        scores[name] = build_scores([f.scores for f in mine], name, m, q, seed, found[name, -1].cost)
        for i, f in enumerate(mine):
            rows += [(name, by_figure[k], k, i, v) for k, v in f.measured.figures.items()]
            curves += [
                pd.DataFrame({"method": name, "check": k, "example": i, "x": x, "y": y})
                for k, (x, y) in f.measured.curves.items()
            ]
            if i == 0 and "randomised" in f.measured.maps:
                pictures += _pair(name, f.scores, f.measured.maps["randomised"])
    image = questions[0].input.ndim == 4 and questions[0].input.is_floating_point()
    notes: list[str] = []
    if "ground_truth" in other and image and network.differentiable and _has_classes(questions):
        try:
            x = torch.cat([q.input for q in questions])
            with warnings.catch_warnings():  # its notes go into the record
                warnings.simplefilter("ignore")
                truth = ground_truth(
                    network, x, None, table, settings=("gridpg", "difull"), n=settings.grid_side, n_grids=GRIDS,
                    budget=GRID_BUDGET if budget is not None else None, runner=runner, seed=seed,
                )  # fmt: skip
        except InputError as error:  # too few images of different classes, say: the other checks stand without it
            notes.append(f"ground truth was not measured: {error}")
        else:
            rows += truth.rows
            pictures += truth.pictures
            info |= {k: dataclasses.replace(v, chance=truth.chance) for k, v in GROUND_TRUTH.items()}
            notes += truth.notes
    if "pointing" in other and shown.masks is not None:
        rows += pointing_figures(scores, shown.masks)
        info |= POINTING
    figures = pd.DataFrame(rows, columns=["method", "check", "figure", "example", "value"])
    agreement = _agreement(scores, questions[0]) if "agreement" in other else {}
    claims = {k: Claims(m.class_sensitive, m.complete) for k, m in table.items() if k not in settings.baselines}
    verdicts = judge(figures, claims, settings)
    summary = _table(table, figures, info, verdicts, found)
    kind, inputs = _inputs_shown(questions, shown)
    return AuditResult(
        table=summary,
        figures=figures,
        figure_info={
            k: dataclasses.asdict(v) | {"ceiling": None} for k, v in info.items() if k in set(figures["figure"])
        },
        curves=pd.concat(curves, ignore_index=True)
        if curves
        else pd.DataFrame(columns=["method", "check", "example", "x", "y"]),
        scores=scores,
        inputs=inputs,
        input_kind=kind,
        examples=examples,
        agreement=agreement,
        pictures=pictures,
        meta={"axes": _AXES, "notes": notes},
    )


_AXES = {
    "insertion": ("share of features inserted", "output"),
    "deletion": ("share of features removed", "output"),
    "sensitivity_n": ("share of features removed", "correlation"),
    "randomisation": ("share of layers randomised, from the top", "rank correlation"),
    "randomisation_independent": ("depth of the randomised layers, from the top", "rank correlation"),
}


def _pair(name: str, scores: Explained, randomised: np.ndarray) -> list[dict[str, Any]]:
    trained = positions(scores).cpu().numpy()
    if trained.ndim != 2:
        return []
    return [
        {"method": name, "check": "randomisation", "title": title, "caption": "first example", "image": picture}
        for title, picture in (("trained weights", trained), ("randomised weights", randomised))
    ]


def _has_classes(questions: list[Question]) -> bool:
    return all(q.target.name == "class_logit" for q in questions)


def _table(
    table: Mapping[str, Method], figures: pd.DataFrame, info: Mapping[str, Figure], verdicts: pd.DataFrame,
    found: Mapping[tuple[str, int], _Found],
) -> pd.DataFrame:  # fmt: skip
    """One row a method: verdict, figures with intervals, cost."""
    measured = [f for f in info if f in set(figures["figure"])]
    values = {
        f: figures[figures["figure"] == f].pivot(index="method", columns="example", values="value").reindex(list(table))
        for f in measured
    }
    summary = pd.DataFrame(index=pd.Index(list(table), name="method"))
    summary["title"] = [m.title for m in table.values()]
    summary["verdict"] = verdicts["verdict"].reindex(summary.index)
    summary["reasons"] = verdicts["reasons"].reindex(summary.index)
    if "notes" in verdicts:
        summary["notes"] = verdicts["notes"].reindex(summary.index)
    for f, v in values.items():
        interval = bootstrap(v.to_numpy(dtype=float), "median" if f == "completeness_gap" else "mean")
        summary[f], summary[f"{f}_low"], summary[f"{f}_high"] = interval.value, interval.low, interval.high
        if f == "faithfulness" and "faithfulness_p" in verdicts:
            summary[f"{f}_p"] = verdicts["faithfulness_p"].reindex(summary.index)
    n = len({i for _, i in found if i >= 0})
    for key in ("forward", "backward"):
        summary[key] = [round(found[m, -1].cost[key] / n) for m in table]
    summary["seconds"] = [found[m, -1].cost["seconds"] / n for m in table]
    return summary


def _agreement(scores: Mapping[str, xr.DataArray], q: Question) -> dict[str, pd.DataFrame]:
    """Agreement of all methods' maps, brought to one resolution of at most 56 pixels."""
    maps: dict[str, np.ndarray] = {}
    for name, s in scores.items():
        dims = tuple(str(d) for d in s.dims[1:])
        t = torch.stack([positions(Explained(torch.from_numpy(np.asarray(v)), dims)) for v in s.values])
        if t.ndim == 3 and dims[-2:] == ("y", "x"):
            side = (min(56, q.input.shape[-2]), min(56, q.input.shape[-1]))
            t = (
                F.adaptive_avg_pool2d(t[:, None], side)[:, 0]
                if t.shape[-1] >= side[1]
                else (F.interpolate(t[:, None], side, mode="bilinear", align_corners=False)[:, 0])
            )
        maps[name] = t.double().numpy()
    shapes = pd.Series({k: v.shape for k, v in maps.items()})
    usual = shapes.mode().iloc[0]
    maps = {k: v for k, v in maps.items() if v.shape == usual}
    measures = ["spearman", "kendall", "top-k"] + (["ssim"] if len(usual) == 3 and min(usual[1:]) >= 7 else [])
    return {m: agreement_matrix(maps, m) for m in measures}


def _drawable(result: AuditResult) -> dict[str, xr.DataArray]:
    """Scores as pictures: a token's units are summed, scores of time alone stand for every channel."""
    drawn = {}
    for name, s in result.scores.items():
        if s.dims[1:] == ("token", "unit"):
            s = s.sum("unit", keep_attrs=True)
        elif s.dims[1:] == ("time",):
            s = s.expand_dims(channel=np.asarray(result.inputs).shape[1], axis=1)
        drawn[name] = s
    return drawn


def _inputs_shown(questions: list[Question], shown: Shown) -> tuple[str, Any]:
    if shown.images is not None:
        return "image", shown.images
    if shown.tokens is not None:
        return "token", shown.tokens
    x = torch.cat([q.input for q in questions]).cpu()
    if not x.is_floating_point():
        return "token", [[str(int(t)) for t in row.reshape(-1)] for row in x]
    x = x.float()
    if x.ndim == 4:
        rgb = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
        low, high = rgb.amin((1, 2, 3), keepdim=True), rgb.amax((1, 2, 3), keepdim=True)
        return "image", ((rgb - low) / (high - low).clamp_min(1e-12) * 255).byte().permute(0, 2, 3, 1).numpy()
    if x.ndim == 3:
        return "series", x.numpy()
    return "feature", x.reshape(len(x), -1).numpy()
