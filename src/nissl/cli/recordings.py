"""The command about recordings: ``nissl decode``."""

from __future__ import annotations

import json
import shlex
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nissl.cli.answers import make_parent, plain, split_names
from nissl.errors import InputError, blame

DEMO = "FingerMovements"
"""Of the packaged sets it names its electrodes, so that a map of the scalp can be drawn."""
_Out = Annotated[Path, typer.Option(help="The report, one HTML file.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@dataclass(frozen=True, eq=False)
class Recording:
    """Trials with labels and what is known of them.

    Attributes
    ----------
    X : array (n_trials, n_channels, n_times)
    y : array (n_trials,)
    channels : list of str
    sampling_rate : float
        In Hz.
    start : float
        Time of the first sample of a trial, in s.
    groups : array (n_trials,) or None
    source : str
    notes : tuple of str
        What was done to it.
    """

    X: np.ndarray
    y: np.ndarray
    channels: list[str]
    sampling_rate: float
    start: float
    groups: np.ndarray | None
    source: str
    notes: tuple[str, ...] = ()


def decode(
    file: Annotated[
        Path | None,
        typer.Argument(help="Trials or a recording: .npz, FIF, EDF, BDF, GDF or .vhdr; by default a packaged EEG."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels of the trials in FILE: .npy or .txt, one a line.")] = None,
    events: Annotated[
        str | None, typer.Option(help="Events to tell apart, by name or number, separated by commas; all by default.")
    ] = None,
    tmin: Annotated[
        float, typer.Option(help="Of continuous recordings: start of a trial after its event, in s.")
    ] = 0.0,
    tmax: Annotated[float, typer.Option(help="Of continuous recordings: end of a trial after its event, in s.")] = 1.0,
    band: Annotated[
        str | None, typer.Option(help="Of continuous recordings: band-pass such as 8-35, in Hz, before trials are cut.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Sampling rate in Hz, where FILE does not say.")] = None,
    demo: Annotated[str, typer.Option(help="Without FILE: the packaged set, such as SelfRegulationSCP1.")] = DEMO,
    decoders: Annotated[str | None, typer.Option(help="Names separated by commas; all by default.")] = None,
    split: Annotated[str, typer.Option(help="'stratified', 'blocked' in time, or 'grouped'.")] = "stratified",
    folds: Annotated[int, typer.Option(help="Of the cross-validation.")] = 5,
    metric: Annotated[
        str | None, typer.Option(help="'auc', 'accuracy' or 'balanced accuracy'; AUC of two classes, else accuracy.")
    ] = None,
    permutations: Annotated[int, typer.Option(help="Of the labels, for chance and p.")] = 1000,
    refit: Annotated[
        bool, typer.Option("--refit", help="Decode again for every permutation: exact, and slow.")
    ] = False,
    examples: Annotated[int, typer.Option(help="Unseen trials whose decoding is explained; 0 leaves it out.")] = 12,
    budget: Annotated[int, typer.Option(help="Rows that a method may ask for each example; 0 lifts the limit.")] = 256,
    methods: Annotated[str | None, typer.Option(help="Keys of explanation methods, separated by commas.")] = None,
    out: _Out = Path("runs/decode.html"),
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    as_json: _Json = False,
) -> None:
    """Decode labels from a recording, side by side and beside chance, and explain the best decoder."""
    from nissl.recordings.decoders import standard_decoders
    from nissl.recordings.decoding import explain_decoder
    from nissl.recordings.evaluate import compare, evaluate, splits

    started = time.perf_counter()
    recording = checked(packaged(demo)) if file is None else read(file, labels, events, tmin, tmax, band, rate)
    y, notes = recording.y, list(recording.notes)
    cut = splits(y, split, folds, groups=recording.groups, seed=seed)
    made = standard_decoders(recording.sampling_rate, *recording.X.shape[1:], seed=seed)
    if decoders is not None:
        wanted = [n.strip() for n in decoders.split(",") if n.strip()]
        if not wanted or set(wanted) - set(made):
            raise InputError(f"--decoders {decoders!r}: choose from {', '.join(made)}")
        made = {n: made[n] for n in wanted}
    make_parent(out)
    found = evaluate(
        made, recording.X, y, folds=cut, groups=recording.groups, metric=metric,
        permutations=permutations, refit=refit, seed=seed, progress=not as_json,
    )  # fmt: skip
    explained = None
    if examples:
        train, test = cut[0]
        keys = None if methods is None else split_names(methods)
        explained = explain_decoder(
            made[found.best], recording.X, y, train, test, name=found.best, examples=examples, budget=budget or None,
            methods=keys, seed=seed, progress=not as_json,
        )  # fmt: skip
    pairs = compare(found, seed=seed)
    seconds = time.perf_counter() - started
    command = shlex.join(["nissl", *sys.argv[1:]])
    lead = _page(out, recording, found, pairs, explained, split, folds, refit, notes, command)
    if as_json:
        print(json.dumps(_summary(recording, found, explained, out, seconds, seed), allow_nan=False))
        return
    console = Console()
    table = Table("decoder", found.metric, "95 %", "chance", "p (Holm)", title=recording.source)
    for name, row in found.table().sort_values("score", ascending=False).to_dict(orient="index").items():
        table.add_row(Text(str(name)), f"{row['score']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]",
                      _number(row["chance"]), _number(row["p_holm"]))  # fmt: skip
    console.print(table)
    console.print(Text(lead))
    console.print(f"{seconds:.0f} s; report: {out}")


# ---------------------------------------------------------------- reading


def packaged(name: str) -> Recording:
    """A labelled set that comes as a package."""
    from nissl.sources.recordings import trial_set

    X, y = trial_set(name)
    channels = [str(c) for c in X.coords["channel"].values]
    return Recording(X.to_numpy(), y, channels, float(X.attrs["sampling_rate"]), 0.0, None,
                     f"{X.attrs['source']}, {X.attrs['description']}")  # fmt: skip


def read(
    file: Path, labels: Path | None, events: str | None, tmin: float, tmax: float, band: str | None, rate: float | None
) -> Recording:
    """Trials of a file; a continuous recording is cut at its events. What is doubtful is warned of, and noted."""
    from nissl.recordings import io

    if not file.is_file():
        raise InputError(f"there is no file {str(file)!r}")
    given = None if labels is None else _labels(labels)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        if file.suffix == ".npz":
            X, y = io.read_npz(file, rate)
        elif file.name.lower().endswith(io.EPOCHS):
            X, y = io.read_epochs(file)
        else:
            X, y = io.epochs_from(file, tmin=tmin, tmax=tmax, band=None if band is None else _band(band))
        y = y if given is None else given
        if y is None:
            raise InputError(f"{file.name} has no labels y; name a file of them with --labels")
        notes = [str(w.message) for w in heard if issubclass(w.category, UserWarning)]
        filtered = [] if band is None else [f"band-pass {band} Hz before trials were cut"]
        channels = [str(c) for c in X.coords["channel"].values]
        groups = X.coords["group"].to_numpy() if "group" in X.coords else None
        start = float(X.coords["time"].values[0])
        found = checked(
            Recording(X.to_numpy(), y, channels, X.attrs["sampling_rate"], start, groups, file.name,
                      (*notes, *filtered))
        )  # fmt: skip
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if events is None:
        return found
    wanted = [e.strip() for e in events.split(",") if e.strip()]
    have = [str(v) for v in found.y]
    missing = [e for e in wanted if e not in have]
    if missing or not wanted:
        names = ", ".join(sorted(set(have)))
        raise InputError(
            f"--events: there is no event {missing[0] if missing else ''!r} in {file.name}; it has {names}"
        )
    kept = np.isin(have, wanted)
    groups = None if found.groups is None else found.groups[kept]
    return replace(found, X=found.X[kept], y=found.y[kept], groups=groups)


def _labels(file: Path) -> np.ndarray:
    if not file.is_file():
        raise InputError(f"there is no file {str(file)!r} of labels")
    with blame(InputError, f"{str(file)!r} cannot be read as labels"):
        if file.suffix == ".npy":
            return np.load(file, allow_pickle=False)
        return np.array([line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()])


def _band(text: str) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in text.split("-"))
    except ValueError as error:
        raise InputError(f"--band {text!r}: give two frequencies in Hz such as 8-35") from error
    return low, high


def checked(recording: Recording) -> Recording:
    """The recording as the contract wants it, without flat channels."""
    from nissl.recordings.arrays import as_labels, as_rate, as_trials
    from nissl.recordings.decoding import without_flat_channels

    X = as_trials(recording.X)
    y = as_labels(recording.y, len(X), "the labels")
    moves = without_flat_channels(X)
    names, notes = recording.channels, list(recording.notes)
    if not moves.all():
        notes.append(f"flat channels left out: {', '.join(n for n, m in zip(names, moves, strict=True) if not m)}")
    names = [n for n, m in zip(names, moves, strict=True) if m]
    return replace(
        recording,
        X=X[:, moves],
        y=y,
        channels=names,
        sampling_rate=as_rate(recording.sampling_rate),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------- telling


def _number(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.3g}"


def _named(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The names of the rows as the first column."""
    return table.rename_axis(name).reset_index()


def _lead(found: Any, explained: Any) -> str:
    best = found.decoded[found.best]
    p = found.table().loc[found.best, "p_holm"]
    metric = "AUC" if found.metric == "auc" else found.metric
    text = f"{best.name} decodes best: {metric} {float(best.score.value):.3f} [{float(best.score.low):.3f}, {float(best.score.high):.3f}]"
    if np.isfinite(best.chance):
        text += f"; permuted labels give {best.chance:.3f}, p = {p:.3g} (Holm over {len(found.decoded)} decoders)"
        if p > 0.05:
            text += ". That is not above chance: what explains it explains noise"
    if explained is not None:
        text += f". Explained by {explained.method}; the audit says of it: {explained.verdict}"
    return text + "."


def _page(
    out: Path, recording: Recording, found: Any, pairs: pd.DataFrame, explained: Any, split: str, folds: int, refit: bool,
    notes: list[str], command: str,
) -> str:  # fmt: skip
    from nissl.recordings.decoding import electrode_info, plot_confusion, plot_decoders, plot_importance
    from nissl.report.page import Part, Section, write_page

    n, channels, times = recording.X.shape
    classes, counts = np.unique(recording.y, return_counts=True)
    facts = pd.DataFrame(
        {"value": {
            "source": recording.source, "trials": n, "channels": channels,
            "length of a trial": f"{times} samples, {times / recording.sampling_rate:.3g} s at {recording.sampling_rate:g} Hz",
            "classes": ", ".join(f"{c} ({k})" for c, k in zip(classes, counts, strict=True)),
            "cross-validation": f"{folds} folds, {split}",
            **{f"note {i + 1}": note for i, note in enumerate(notes)},
        }}
    )  # fmt: skip
    table = found.table().sort_values("score", ascending=False)
    best = found.decoded[found.best]
    lead = _lead(found, explained)
    how = "the whole procedure runs again on permuted labels" if refit else "labels are permuted within test folds"
    sections = [
        Section("Decoders side by side", f"Each is fitted on the other folds. Chance and p: {how}; the smallest p that can be "
                f"had is {_number(best.smallest_p)}. Intervals are over trials, with the fitted decoders held fixed.",
                [Part(plot_decoders(found), "Scores of the decoders beside chance."),
                 Part(_named(table[["score", "low", "high", "chance", "p", "p_holm", "seconds"]], "decoder"),
                      "p_holm is corrected for the number of decoders.")]),
        Section(f"Confusion of {best.name}", "Trials outside of the training set.",
                [Part(plot_confusion(best.confusion, found.classes), "Rows: true class. Columns: predicted.")]),
    ]  # fmt: skip
    if len(pairs):
        sections.append(
            Section(f"Others against {best.name}", "Difference of accuracy on the same trials (other minus best), 95 % interval, "
                    "sign-flip test, Holm. The best was chosen on these trials: that favours it.",
                    [Part(_named(pairs, "decoder"))])
        )  # fmt: skip
    if explained is not None:
        info = electrode_info(recording.channels, recording.sampling_rate)
        figure = plot_importance(
            explained.importance, recording.channels, recording.sampling_rate, recording.start, info
        )
        verdicts = explained.audit.table[["verdict"]].assign(
            reason=[r[0] if len(r) else "" for r in explained.audit.table["reasons"]]
        )
        where = (
            "Scalp and raster"
            if info is not None
            else "Raster; no scalp map, as not all electrodes have a name of the 10-20 system"
        )
        sections += [
            Section(f"What {best.name} looks at", f"{where}: mean over {len(explained.examples)} unseen trials of the scores of "
                    f"{explained.method}. What is covered becomes the mean of the training trials. Channels that a decoder uses "
                    "need not be near the source: a filter also weighs channels to cancel noise.",
                    [Part(figure, "Above 0: the signal there speaks for the class that is predicted.")]),
            Section("Can that be believed?", _believed(explained), [Part(_named(verdicts, "method"))]),
        ]  # fmt: skip
    sections.append(Section("Recording", "", [Part(_named(facts, "what"))]))
    write_page(out, f"Decoding {recording.source}", sections, eyebrow="nissl decode", lead=lead, command=command)
    return lead


def _believed(explained: Any) -> str:
    text = "The audit of the explanation methods on this decoder"
    if explained.linear:
        text += (
            ", whose answers are linear in the trial: the same answers as a linear layer, so that gradients are exact. "
        )
    else:
        text += ", which gives answers only: without weights to randomise no method can earn more than 'undecided'. "
    return text + (
        f"The decoder fitted on permuted labels gets scores by {explained.method} whose sizes correlate "
        f"{explained.relabelled:.2f} with these; near 0 the map comes of the labels, near 1 of the trials alone."
    )


def _summary(
    recording: Recording, found: Any, explained: Any, out: Path, seconds: float, seed: int
) -> dict[str, Any]:  # fmt: skip
    rows = found.table().to_dict(orient="index")
    best = found.decoded[found.best]
    told: dict[str, Any] = {
        "source": recording.source, "trials": len(recording.X), "channels": recording.channels,
        "sampling_rate": recording.sampling_rate, "classes": [str(c) for c in found.classes], "metric": found.metric,
        "decoders": {str(n): {k: float(v) for k, v in row.items()} for n, row in rows.items()},
        "best": found.best, "confusion": best.confusion.tolist(), "permutation": best.permutation,
        "notes": list(recording.notes), "report": str(out), "seconds": round(seconds, 1), "seed": seed,
        "explanation": None,
    }  # fmt: skip
    if explained is not None:
        size = np.abs(explained.importance)
        top = np.unravel_index(np.argsort(-size, axis=None)[:10], size.shape)
        told["explanation"] = {
            "method": explained.method, "verdict": explained.verdict, "linear": explained.linear,
            "relabelled": explained.relabelled, "trials": explained.examples.tolist(),
            "verdicts": {str(m): str(v) for m, v in explained.audit.table["verdict"].items()},
            "channels": {c: float(v) for c, v in zip(recording.channels, explained.importance.sum(1), strict=True)},
            "strongest": [{"channel": recording.channels[c], "time": recording.start + t / recording.sampling_rate,
                           "score": float(explained.importance[c, t])} for c, t in zip(*top, strict=True)],
        }  # fmt: skip
    return plain(told)
