"""The commands about language models: ``nissl trace``, ``steer``, ``edit``, ``neurons``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import typer
from rich.console import Console

from nissl.cli.answers import device_of, make_parent, show, write_report
from nissl.errors import InputError

if TYPE_CHECKING:
    from nissl.network import LanguageModel

_Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a folder of a transformers model, or FILE.gguf.")]
_Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda; by default the processor.")]
_Out = Annotated[Path | None, typer.Option(help="The report, one HTML file.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
_Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def trace(
    prompt: Annotated[str, typer.Option(help="The prompt to be explained.")],
    against: Annotated[
        str | None,
        typer.Option(help="The same prompt, changed in what decides the answer; it must have as many tokens."),
    ] = None,
    answer: Annotated[
        str | None, typer.Option(help="One token, such as ' Mary'; by default what is predicted.")
    ] = None,
    wrong: Annotated[str | None, typer.Option(help="The other answer; by default what --against brings about.")] = None,
    model: _Model = "smollm2",
    top: Annotated[int, typer.Option(help="Components of each kind that are verified by real patching.")] = 5,
    out: _Out = Path("runs/trace.html"),
    device: _Device = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Find the components that carry the difference between two answers."""
    from nissl.attribution.tracing import trace as run
    from nissl.report.page import Part, Section, Tokens
    from nissl.runner import Runner

    network = _load(model, device)
    found = run(
        network, prompt, against, answer, wrong, top=top, seed=seed,
        runner=Runner(memory=2**28, progress=not as_json),
    )  # fmt: skip
    table = found.top.assign(token=[_visible(t) for t in found.top["token"]])
    chosen = ", ".join(f"{kind}: {name}" for kind, name in found.choice.best.items())
    lead = (
        f"{found.answer!r} is {found.clean:.2f} above {found.wrong!r} after this prompt"
        + ("" if against is None else f" and {found.corrupted:.2f} after the other one")
        + ". The pictures say how much of that each component carries; the table holds true effects."
    )
    by_kind = [
        Part(
            table[table["kind"] == kind].drop(columns="kind").dropna(axis=1, how="all"),
            f"{kind}, largest estimates first",
        )
        for kind in dict.fromkeys(table["kind"])
    ]
    report = write_report(
        out, f"What makes {network.name} say {found.answer.strip()!r}?", "Trace", lead,
        [
            Section("Prompt", parts=[Part(Tokens(found.tokens), "the prompt that is explained")]
                    + ([Part(Tokens(found.other_tokens), "the one it is held against")] if found.other_tokens else [])),
            Section("Layer by position", f"Estimates by the approximation that agrees best with true patches here ({chosen}); "
                    "logits, red speaks for the first answer.", [Part(found.plot(), "estimated effect of each component")]),
            Section("Verified", "Effect: what patching this component really does, in logits. Share: of the difference.", by_kind),
            Section("Which approximation", "Correlation of each approximation with a random sample of true patches.",
                    [Part(found.choice.table)]),
            Section("Cost", parts=[Part(f"{found.forward} rows forward and {found.backward} backward, {found.seconds:.1f} s")]),
        ],
    )  # fmt: skip
    show({**found.to_dict(), "report": report}, table, f"{lead}\n", as_json, report)


def steer(
    toward: Annotated[list[str], typer.Option(help="A text to steer toward; may be given several times.")],
    away: Annotated[list[str], typer.Option(help="A text to steer away from; may be given several times.")],
    prompt: Annotated[list[str], typer.Option(help="What the model goes on from; may be given several times.")],
    strength: Annotated[
        float | None, typer.Option(help="In units of the mean length of activations; by default from --kl.")
    ] = None,
    kl: Annotated[float, typer.Option(help="How much the next token of neutral prose may change, in nats.")] = 0.1,
    max_tokens: Annotated[int, typer.Option(help="New tokens.")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    model: _Model = "smollm2",
    out: _Out = Path("runs/steer.html"),
    save: Annotated[Path | None, typer.Option(help="File for the direction, safetensors, to be used again.")] = None,
    device: _Device = None,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Steer a model toward some texts and away from others, while it writes."""
    from nissl.intervention import steer as run
    from nissl.report.page import Part, Section
    from nissl.runner import Runner

    network = _load(model, device)
    found = run(
        network, toward, away, prompt, strength, kl=kl, max_tokens=max_tokens, temperature=temperature, seed=seed,
        runner=Runner(progress=not as_json),
    )  # fmt: skip
    table = found.table.reset_index()
    numbers = table.drop(columns=["before", "after"])
    lead = (
        f"Layers {_ranges(found.layers)} were moved by {found.strength:.3g} of their mean length. The margin of the texts to steer "
        f"toward over the others went from {found.margin_before.mean():.2f} to {found.margin_after.mean():.2f} nats a token; "
        f"perplexity from {found.perplexity_before.mean():.1f} to {found.perplexity_after.mean():.1f}."
    )
    report = write_report(
        out, f"{network.name}, steered", "Steer", lead,
        [
            Section("Texts", parts=[Part(table[["prompt", "before", "after"]])]),
            Section("Measured", "Margin: mean log probability a token of the texts to steer toward minus that of the others. Perplexity "
                    "is that of the unsteered model: where it grows much, the strength is too large.", [Part(numbers)]),
        ],
    )  # fmt: skip
    if save is not None:
        found.steering.save(save)
    summary = {"strength": found.strength, "layers": list(found.layers), "prompts": table.to_dict("records")}
    show({**summary, "report": report}, table.drop(columns=numbers.columns[1:]), f"{lead}\n", as_json, report)


def edit(
    prompt: Annotated[str, typer.Option(help="Text up to the answer, such as 'The capital of France is'.")],
    subject: Annotated[str, typer.Option(help="What the fact is about, as it stands in the prompt.")],
    target: Annotated[str, typer.Option(help="The new answer, such as 'Rome'.")],
    method: Annotated[str, typer.Option(help="ace, pmet, memit, rome or fine-tune.")] = "ace",
    chain: Annotated[
        list[str] | None, typer.Option(help="A prompt over several hops whose last hop is the fact; may be repeated.")
    ] = None,
    model: _Model = "smollm2",
    delta: Annotated[Path, typer.Option(help="Where the change is written or read, as safetensors.")] = Path(
        "runs/edit.safetensors"
    ),
    undo: Annotated[
        bool, typer.Option("--undo", help="Show that the change in --delta can be taken back, instead of making one.")
    ] = False,
    out: _Out = Path("runs/edit.html"),
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Change a fact that a model knows; the change is a file of its own, and can be taken back."""
    from nissl.intervention import apply_delta
    from nissl.intervention import edit as run
    from nissl.report.page import Part, Section
    from nissl.runner import Runner

    network = _load(model, device)
    if undo:
        changed = apply_delta(network, delta)
        back = apply_delta(changed, delta, undo=True)
        same = back.fingerprint() == network.fingerprint()
        texts = [{"weights": name, "continues": n.generate(prompt, max_tokens=8)[0][0]}
                 for name, n in (("edited", changed), ("undone", back))]  # fmt: skip
        lead = f"Without the edit the weights are {'those of before, bit for bit' if same else 'NOT those of before'}."
        show({"undone": same, "texts": texts}, pd.DataFrame(texts), lead, as_json, None)
        return
    make_parent(delta)
    found = run(
        network, prompt, subject, target, method, chains=tuple(chain or ()), runner=Runner(progress=not as_json)
    )  # fmt: skip
    found.save(delta)
    before, after = (float(v) for v in found.probabilities[0])
    probes = [prompt, *(chain or ())]
    texts = pd.DataFrame(
        {
            "prompt": probes, "before": [t[0] for t in network.generate(probes, max_tokens=8)],
            "after": [t[0] for t in found.network.generate(probes, max_tokens=8)],
        }
    )  # fmt: skip
    kept = found.locality
    lead = (
        f"The probability of {target!r} went from {before:.3g} to {after:.3g}. Of {kept['n']:.0f} unrelated prompts, "
        f"{kept['kept']:.0%} keep their most probable next token."
    )
    log = pd.DataFrame(found.log)
    report = write_report(
        out, f"{network.name}: {subject} changed to {target}", "Edit", lead,
        [
            Section("Texts", parts=[Part(texts)]),
            Section("Written", f"{found.method} wrote {', '.join(found.after)}.", [Part(log)] if len(log) else []),
            Section("Undo", parts=[Part(f"The change is in {delta}, apart from the model: without it, the model is as before. "
                                        "nissl edit --undo shows that; in Python, apply_delta(network, path, undo=True).")]),
        ],
    )  # fmt: skip
    summary = {
        "method": found.method, "before": before, "after": after, "success": bool(found.success[0]), "locality": kept,
        "layers": {k: list(v) for k, v in found.layers.items()}, "delta": str(delta), "texts": texts.to_dict("records"),
    }  # fmt: skip
    show({**summary, "report": report}, texts, f"{lead}\n", as_json, report)


def neurons(
    concept: Annotated[str, typer.Option(help="A word, such as 'dog'.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Whose next token may be the word: neurons are clamped there. May be repeated."),
    ] = None,
    model: _Model = "smollm2",
    n: Annotated[int, typer.Option("--n", help="How many neurons.")] = 12,
    by: Annotated[str, typer.Option(help="z, cosine, probability or logit.")] = "z",
    clamped: Annotated[int, typer.Option(help="How many of them are clamped.")] = 5,
    out: _Out = Path("runs/neurons.html"),
    device: _Device = None,
    as_json: _Json = False,
) -> None:
    """Find the neurons of a language model that look for a word, and clamp them."""
    from nissl.concepts.vocabulary import NeuronVocabulary, clamp_curve, concept_tokens, plot_clamps
    from nissl.report.page import Part, Section
    from nissl.runner import Runner

    network = _load(model, device)
    vocabulary = NeuronVocabulary()
    table = vocabulary.search(network, concept, by=by, n=n, progress=not as_json)
    words = []
    for layer, unit, sign in zip(table["layer"], table["unit"], table["sign"], strict=True):
        decoded = vocabulary.decode(network, [int(layer)], 8, units=[int(unit)], progress=False)
        side = "token" if sign > 0 else "opposite"
        words.append(" ".join(_visible(t) for t in network.strings(decoded[side].values[0, 0])))
    table = table.assign(tokens=words)
    sections = [
        Section("Neurons", f"Ranked by {by}; sign -1: the neuron's opposite looks for the word. write_logit: what one unit of the "
                "neuron adds to the word directly.", [Part(table)])
    ]  # fmt: skip
    summary: dict[str, Any] = {"concept": concept, "neurons": table.to_dict("records")}
    if prompt:
        chosen = [(int(a), int(b)) for a, b in zip(table["layer"][:clamped], table["unit"][:clamped], strict=True)]
        curve = clamp_curve(
            network, prompt, concept_tokens(network, concept), chosen, runner=Runner(progress=not as_json)
        )
        means = curve.pivot_table(["value", "gain"], ["layer", "unit", "factor"]).reset_index()
        best = means.sort_values("gain", ascending=False).drop_duplicates(["layer", "unit"]).reset_index(drop=True)
        sections.append(
            Section("Clamped", "Gain in the log probability of the word while the neuron is held at a value, in standard deviations "
                    "of its own; mean over the prompts.", [Part(plot_clamps(curve), "gain by value held"), Part(best)])
        )  # fmt: skip
        summary["clamped"] = best.to_dict("records")
    report = write_report(out, f"Neurons of {network.name} that look for {concept!r}", "Neurons", "", sections)
    show({**summary, "report": report}, table, "", as_json, report)


def prompts_to_audit(source: str, data: str | None, examples: int | None, device: str | None) -> tuple[Any, Any, Any]:
    """A language model as a classifier of the next token, prompts for it, and how the report shows them.

    Raises
    ------
    InputError
        The file cannot be read or holds no prompt; or too few of them.
    """
    from nissl.sources.tasks import indirect_object
    from nissl.trust.audit import Shown

    if data is None:
        prompts = list(indirect_object(n=10 if examples is None else examples).clean)
    else:
        try:
            lines = Path(data).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--data {data}: a text file with a prompt a line is needed: {error}") from error
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"--data {data} holds no prompt; write one a line")
        if examples is not None and not 1 <= examples <= len(prompts):
            raise InputError(f"--examples {examples}: {data} holds {len(prompts)} prompts")
        prompts = prompts[:examples]
    network = _load(source, device).next_token()
    inputs = network.encode(prompts)
    tokens = [
        [
            "" if hidden == 0 else _visible(word)
            for word, hidden in zip(network.strings(ids), mask.tolist(), strict=True)
        ]
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    vocabulary = network.strings(range(network.weight("unembed").shape[0]))
    return network, inputs, Shown(tokens=tokens, names=prompts, class_names=[_visible(w) for w in vocabulary])


def _load(model: str, device: str | None) -> LanguageModel:
    from nissl.network import LanguageModel

    where = device_of(device)
    with Console(stderr=True).status(f"reading {model}"):
        return LanguageModel.load(model, device=where)


def _visible(token: Any) -> str:
    """A token as it is shown: spaces and line ends can be seen, long ones are cut."""
    text = str(token).replace(" ", "␣").replace("\n", "⏎")
    return text if len(text) <= 20 else f"{text[:19]}…"


def _ranges(layers: Any) -> str:
    """Numbers with runs drawn together: 3 to 5, 9."""
    found: list[list[int]] = []
    for i in sorted(layers):
        if found and i == found[-1][-1] + 1:
            found[-1].append(i)
        else:
            found.append([i])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in found)
