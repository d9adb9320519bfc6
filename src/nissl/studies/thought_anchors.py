"""Bogdan, Macar, Nanda, Conmy: Thought Anchors: Which LLM reasoning steps matter? (2025).

Truth comes from a task in which it is known which steps matter. A small transformer, trained on the spot for each seed,
writes ledgers: six letters get values, two of them (named in the prompt) are then added to a total one after the other, in an
order that the model chooses, and the total is the answer. The two sentences that give these letters their values
matter; the other four, which look the same and stand among them in places that change from ledger to ledger, cannot.
Where the packaged SmolLM2 is installed, suppression and receiver heads are also run on short texts. The thresholds below
were written down before the first run.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy.stats import rankdata
from torch.nn import functional as F

from nissl.attribution.resampling import Resampling, answer_kl
from nissl.attribution.sentences import Trace, exact
from nissl.attribution.thoughts import AttentionSuppression, ReceiverHeads, ablate_heads
from nissl.errors import MissingExtraError
from nissl.network import LanguageModel, Pass
from nissl.runner import Runner
from nissl.seeds import seeded
from nissl.studies.claims import at_least, at_most, stated
from nissl.trust.statistics import bootstrap

ACCURACY = 0.95
BLACK_BOX = 0.9
"""Share of pairs (a sentence that matters, one that does not) that resampling must rank right; chance is one half."""
WHITE_BOX = 0.75
"""The same for receiver heads and suppression."""
EXACT_WITHIN = 0.25
"""Mean distance in nats from the importance that follows from the task."""
SHARE_OF_ANCHORS = 0.5
ABLATION = 0.1
CODE_WORD = 0.75
RELIABLE = 0.5

LETTERS = "abcdef"
VALUES = 4
STEPS = 5
_WORDS = (
    "<pad>", "<end>", "use", ":", "set", "after", "begin", "at", "answer", "is", ".", *LETTERS, *map(str, range(10)),
    *(f"{c}={v}" for c in LETTERS for v in range(1, VALUES + 1)),
)  # fmt: skip
_ID = {w: i for i, w in enumerate(_WORDS)}
_PROMPT = 4
"""Tokens of a prompt: "use b e :"."""
_FIRST_STEP = _PROMPT + 3 * len(LETTERS) + 4
TOTALS = [_FIRST_STEP + 4 * t + 2 for t in range(STEPS)]
"""Places of the totals, which follow from what stands before them."""
SETS = range(len(LETTERS))
"""The sentences that give letters their values."""


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One small model and few ledgers, in seconds; nothing on SmolLM2.
    seed : int, default 0
    progress : bool, default True
        Show progress and the models' accuracies (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over ledgers, seeds together),
        ``baseline`` (what knowing nothing gives) and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    found: dict[str, list[float]] = {}
    for s in [seed + i for i in range(1 if quick else 3)]:
        network = trained(s, steps=350 if quick else 500)
        accuracy = totals_right(network, written(200, np.random.default_rng(s + 1000)), [])
        console.print(f"ledgers, seed {s}: {accuracy:.1%} of the totals right")
        found.setdefault("accuracy", []).append(accuracy)
        measured = on_ledgers(
            network,
            n=20 if quick else 48,
            sampled=4 if quick else 8,
            samples=100,
            seed=s,
            progress=progress,
        )
        for name, values in measured.items():
            found.setdefault(name, []).extend(values)
    claims = [
        at_least("the models know the totals of unseen ledgers", "(precondition)", found["accuracy"], ACCURACY, 0.1, seed),
        at_least("resampling importance ranks what matters above what does not (pairs)", "few sentences steer the answer",
               found["resampling"], BLACK_BOX, 0.5, seed),
        at_least("counterfactual importance ranks what matters above what does not (pairs)", "few sentences steer the answer",
               found["counterfactual"], BLACK_BOX, 0.5, seed),
        at_most("resampling importance against the task's own, mean distance in nats", "(control)", found["distance"],
                EXACT_WITHIN, float(np.mean(found["distance of 0"])), seed),
        at_least("share of resampling importance that goes to the two that matter among six", "disproportionate",
               found["share"], SHARE_OF_ANCHORS, 1 / 3, seed),
        at_least("receiver heads rank what matters above what does not (pairs)", "receiver heads attend to anchors",
               found["receiver"], WHITE_BOX, 0.5, seed),
        at_least("receiver heads minus the other heads of their layers (pairs)", "receiver heads attend to anchors",
               found["receiver - others"], 0.0, 0.0, seed),
        at_least("suppression ranks what matters above what does not (pairs)", "masking anchors changes later sentences",
               found["suppression"], WHITE_BOX, 0.5, seed),
        at_least("resampling and suppression agree (rank correlation within a ledger)", "methods agree (case study)",
               found["agreement"], 0.0, 0.0, seed),
        at_least("forced-answer importance: computing steps minus sentences that give values", "favours computations",
               found["forced: steps - values"], 0.0, 0.0, seed),
        at_least("share of totals lost without receiver heads, minus without others of their layers", "larger",
               found["ablation"], ABLATION, 0.0, seed),
    ]  # fmt: skip
    if not quick:
        try:
            claims += on_smollm2(seed, progress)
        except MissingExtraError as error:
            warnings.warn(f"the claims on SmolLM2 are not measured: {error}", stacklevel=2)
    return claims


# ---------------------------------------------------------------- the task


def written(n: int, rng: np.random.Generator) -> np.ndarray:
    """Token ids (n, n_tokens) of ledgers as the task writes them."""
    letters = len(LETTERS)
    used = np.stack([rng.permutation(letters)[:2] for _ in range(n)])
    values = rng.integers(1, VALUES + 1, (n, letters))
    chosen = np.take_along_axis(used, rng.integers(0, 2, (n, STEPS)), 1)
    totals = np.take_along_axis(values, chosen, 1).cumsum(1) % 10
    a, zero, first = _ID["a"], _ID["0"], _ID["a=1"]

    def words(text: str) -> list[np.ndarray]:
        return [np.full(n, _ID[w]) for w in text.split()]

    columns = [*words("use"), a + used[:, 0], a + used[:, 1], *words(":")]
    for i in range(letters):
        columns += [*words("set"), first + VALUES * i + values[:, i] - 1, *words(".")]
    columns += words("begin at 0 .")
    for t in range(STEPS):
        columns += [*words("after"), a + chosen[:, t], zero + totals[:, t], *words(".")]
    return np.stack([*columns, *words("answer is"), zero + totals[:, -1], *words(". <end>")], 1)


def tokenizer() -> Any:
    """A word-level tokenizer for ledgers, made in memory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel(dict(_ID), unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def trained(seed: int, steps: int = 500, rate: float = 4e-3) -> LanguageModel:
    """A two-layer transformer of the Llama family trained on ledgers; some 20 s on one core."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(_WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=_ID["<end>"],
        pad_token_id=_ID["<pad>"],
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    with seeded(seed):
        model = LlamaForCausalLM(config)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    # Totals can be known and are what is hard; the rest is chance, which only has to be calibrated.
    weight = torch.full((written(1, rng).shape[1] - 1,), 0.2)
    weight[: _PROMPT - 1] = 0
    weight[[t - 1 for t in TOTALS]] = 1
    for _ in range(steps):
        ids = torch.from_numpy(written(32, rng))
        logits = model(ids).logits[:, :-1]
        loss = (F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * weight).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return LanguageModel(model.eval(), tokenizer(), name="ledger transformer")


def trace_of(ids: np.ndarray) -> Trace:
    """A written ledger as a Trace; the prompt is apart."""
    words = [_WORDS[i] for i in ids if _WORDS[i] != "<end>"]
    return Trace.of(" ".join(words[_PROMPT:]), prompt=" ".join(words[:_PROMPT]) + " ", shortest=5)


def used_of(ids: np.ndarray) -> list[int]:
    """The letters that the prompt names, as numbers: these sentences of the ledger matter."""
    return [int(i) - _ID["a"] for i in ids[1:3]]


def totals_right(network: LanguageModel, ids: np.ndarray, edits: Sequence[Any]) -> float:
    """Share of the totals of written ledgers that the model predicts, under edits."""
    output = network.run(Pass(network.encode(ids.tolist(), keep=0), list(edits))).output
    assert output is not None
    places = torch.tensor(TOTALS)
    return float((output[:, places - 1].argmax(-1).cpu() == torch.from_numpy(ids)[:, places]).float().mean())


def exact_importance(ids: np.ndarray, smoothing: float, samples: int) -> np.ndarray:
    """Resampling importance of the sentences that give values, in nats, as it follows from the task.

    Values and choices are drawn evenly; the expected counts of `samples` texts are smoothed as those of texts are.
    """
    used = used_of(ids)
    said = [int(i - _ID["a=1"]) % VALUES + 1 for i in ids[_PROMPT + 1 : _PROMPT + 3 * len(LETTERS) : 3]]
    binomial = np.array([1.0])
    for _ in range(STEPS):
        binomial = np.convolve(binomial, [0.5, 0.5])
    k = np.arange(STEPS + 1)

    def answers(known: int) -> np.ndarray:
        """Distribution of the answer when the first `known` letters have their values."""
        options = [[said[c]] if c < known else list(range(1, VALUES + 1)) for c in used]
        total = np.zeros(10)
        for x in options[0]:
            for y in options[1]:
                np.add.at(total, (k * x + (STEPS - k) * y) % 10, binomial)
        return total / total.sum() * samples

    each = np.stack([answers(i) for i in range(len(LETTERS) + 1)])
    return answer_kl(each[:-1], each[1:], smoothing)


# ---------------------------------------------------------------- what is measured


def on_ledgers(
    network: LanguageModel, n: int, sampled: int, samples: int, seed: int, progress: bool = False
) -> dict[str, list[float]]:
    """All methods on unseen ledgers in which both letters are used at least twice; one value a ledger.

    Receiver heads are found on one half of the ledgers and judged on the other. Attention and suppression depend on where
    a sentence stands, so their scores are compared with the mean over ledgers at the same place.
    """
    ids = written(4 * n, np.random.default_rng(seed + 2000))
    places = [_FIRST_STEP + 4 * t + 1 for t in range(STEPS)]
    often = np.stack([(ids[:, places] == ids[:, i, None]).sum(1) for i in (1, 2)], 1).min(1) >= 2
    ids = ids[often][:n]
    traces, used = [trace_of(row) for row in ids], [used_of(row) for row in ids]
    runner = Runner(memory=0, progress=progress)
    found: dict[str, list[float]] = {}

    method = ReceiverHeads(k=2, skip=0)  # two layers: the first one already looks values up
    blocks = [method.blocks(network, t, runner) for t in traces]
    half = len(traces) // 2
    received = method.fit(blocks[:half])
    vertical = np.stack([method.vertical(b)[..., SETS] for b in blocks[half:]])
    vertical = vertical - vertical.mean(0)  # (ledgers, layers, heads, letters)
    layers, heads = np.array(received.heads).T
    own = vertical[:, layers, heads].mean(1)
    rest = [
        (layer, h)
        for layer in set(layers.tolist())
        for h in range(vertical.shape[2])
        if (layer, h) not in received.heads
    ]
    others = np.stack([[pairs(vertical[i, a, b], u) for a, b in rest] for i, u in enumerate(used[half:])]).mean(1)
    found["receiver"] = [pairs(v, u) for v, u in zip(own, used[half:], strict=True)]
    found["receiver - others"] = [a - b for a, b in zip(found["receiver"], others, strict=True)]

    hide = AttentionSuppression(temperature=1.0)
    effect = [hide.centred(hide.matrix(network, t, runner)) for t in traces]
    columns = np.stack([m.mean("target", skipna=True).to_numpy()[: len(LETTERS)] for m in effect])
    columns = columns - columns.mean(0)
    found["suppression"] = [pairs(c, u) for c, u in zip(columns, used, strict=True)]

    resampling = Resampling(
        samples=samples, embed=exact, smoothing=1.0, temperature=1.0, top_p=1.0, max_tokens=60, seed=seed, resamples=0
    )
    for i in range(sampled):
        bank = resampling.bank(network, traces[i], runner=runner)
        forced = resampling.bank(network, traces[i], force="answer is ", runner=runner)
        table = resampling.importance(bank, forced)
        kl = table["resampling_kl"].to_numpy()[: len(LETTERS)]
        found.setdefault("resampling", []).append(pairs(kl, used[i]))
        different = table["counterfactual_kl"].to_numpy()[: len(LETTERS)]
        found.setdefault("counterfactual", []).append(pairs(different, used[i]))
        truth = exact_importance(ids[i], resampling.smoothing, samples)
        found.setdefault("distance", []).append(float(np.abs(kl - truth).mean()))
        found.setdefault("distance of 0", []).append(float(truth.mean()))
        found.setdefault("share", []).append(float(kl[used[i]].sum() / kl.sum()))
        found.setdefault("agreement", []).append(float(np.corrcoef(rankdata(kl), rankdata(columns[i]))[0, 1]))
        at_once = table["forced_kl"].to_numpy()
        steps = slice(len(LETTERS) + 1, len(LETTERS) + 1 + STEPS)
        # Early on a forced answer is often none at all: what was not measured is left out.
        values, computing = (x[np.isfinite(x)] for x in (at_once[used[i]], at_once[steps]))
        gap = computing.mean() - values.mean() if len(values) and len(computing) else np.nan
        found.setdefault("forced: steps - values", []).append(float(gap))

    held_out = written(100, np.random.default_rng(seed + 3000))
    lost = ablate_heads(
        network, received.heads, lambda edits: totals_right(network, held_out, edits), controls=5, seed=seed
    )
    controls = lost["score"].iloc[2:]
    found["ablation"] = [float(controls.mean() - lost["score"]["heads"])]
    return found


def pairs(scores: np.ndarray, matter: Sequence[int]) -> float:
    """Share of pairs (one that matters, one that does not) that scores rank right; ties and NaN count half."""
    others = [i for i in range(len(scores)) if i not in matter]
    gap = scores[list(matter)][:, None] - scores[others]
    return float(np.where(np.isnan(gap) | (gap == 0), 0.5, gap > 0).mean())


_CODE = (
    ("The visitors arrived early. ", "They put their coats in the hall. ", "Someone had lit a fire. ",
     "The code word for today is {word}. ", "After that they had some tea. ", "The rain did not stop. ",
     "A dog barked in the yard. ", "Then the guard asked for it again. ", "They said that the code word is {word}."),
    ("The ship left the harbour at noon. ", "The sea was calm and grey. ", "Two sailors mended a net. ",
     "The captain named the new boat {word}. ", "The cook made a soup of beans. ", "Some birds followed them. ",
     "At night the wind turned. ", "A child asked about the new boat. ", "It was told that the name is {word}."),
)  # fmt: skip
_RARE = ("Zanzibar", "Obsidian")


def on_smollm2(seed: int = 0, progress: bool = False) -> list[dict[str, Any]]:
    """A rare word that a text of nine sentences brings up and repeats, and receiver heads over these texts."""
    network = LanguageModel.load("smollm2")
    runner = Runner(memory=0, progress=progress)
    hide, method = AttentionSuppression(), ReceiverHeads()
    right, blocks = [], []
    for text in _CODE:
        for word in _RARE:
            trace = Trace.of("".join(text).format(word=word), prompt="Here is a short story. ")
            row = hide.centred(hide.matrix(network, trace, runner)).sel(target=8).to_numpy()
            right.append(float(np.nanargmax(row) == 3))
            blocks.append(method.blocks(network, trace, runner))
    found = method.fit(blocks)
    return [
        at_least("SmolLM2: hiding the sentence that brings a rare word up moves its repetition most", "masking anchors "
               "changes later sentences", right, CODE_WORD, 1 / 8, seed),
        stated("SmolLM2: kurtosis of heads in even and odd texts, correlation", "reliable", bootstrap([found.reliability]),
             0.0, found.reliability > RELIABLE),
    ]  # fmt: skip


# ---------------------------------------------------------------- claims
