"""Tasks for language models: prompts with a known right answer, each beside one that differs in what decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import at_least, flag, instance
from nissl.errors import InputError
from nissl.network import LanguageModel, Pass, Target, target

Texts = tuple[str, ...]


@dataclass(frozen=True)
class PromptPairs:
    """Clean prompts, corrupted ones, and what should and should not come next.

    Attributes
    ----------
    task : str
    clean, corrupted : tuple of str
        Pair by pair; they differ in the words that decide the answer.
    answers : tuple of tuple of str
        For each pair the texts that are right after the clean prompt, one or several, each meant to be one token.
    wrong : tuple of tuple of str
        Texts that are wrong there; where the task is symmetric, what is right after the corrupted prompt.
    kinds : tuple of str
        Template, and order or hops, of each pair.

    Raises
    ------
    InputError
        No pair, an empty prompt, columns of different length, no answer, or a text both right and wrong.
    """

    task: str
    clean: Texts
    corrupted: Texts
    answers: tuple[Texts, ...]
    wrong: tuple[Texts, ...]
    kinds: Texts

    def __post_init__(self) -> None:
        sizes = {f.name: len(getattr(self, f.name)) for f in fields(self) if f.name != "task"}
        if len(set(sizes.values())) > 1 or not self.clean:
            raise InputError(f"{self.task}: one entry a pair is needed in each column, and one pair; got {sizes}")
        if not all(p.strip() for p in (*self.clean, *self.corrupted)):
            raise InputError(f"{self.task}: a prompt is empty")
        for prompt, right, bad in zip(self.clean, self.answers, self.wrong, strict=True):
            if not right or not bad or set(right) & set(bad):
                raise InputError(
                    f"{self.task}: {prompt!r} needs right and wrong answers, none both; got {right}, {bad}"
                )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.clean)

    def __getitem__(self, index: slice | Sequence[int]) -> PromptPairs:
        """Some of the pairs."""
        chosen = range(len(self))[index] if isinstance(index, slice) else [int(i) for i in index]
        columns = {f.name: tuple(getattr(self, f.name)[i] for i in chosen) for f in fields(self) if f.name != "task"}
        return PromptPairs(self.task, **columns)

    def aligned(self, network: LanguageModel, drop: bool = False) -> PromptPairs:
        """The pairs that patching can use with this model's tokenizer.

        Both prompts of a pair must have the same number of tokens, and every answer must be one token.

        Parameters
        ----------
        network : LanguageModel
        drop : bool, default False
            Leave out the others instead of raising.

        Raises
        ------
        InputError
            A pair does not fit (all, if `drop`); says which and why.
        """
        instance("network", network, LanguageModel)
        flag("drop", drop)
        clean, corrupted = _lengths(network, self.clean), _lengths(network, self.corrupted)
        faults: dict[int, str] = {}
        for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)):
            if a != b:
                faults[i] = f"{a} tokens in {self.clean[i]!r}, {b} in {self.corrupted[i]!r}"
                continue
            try:
                for text in (*self.answers[i], *self.wrong[i]):
                    network.token(text)
            except InputError as error:
                faults[i] = str(error)
        kept = [i for i in range(len(self)) if i not in faults]
        if faults and not (drop and kept):
            i, why = next(iter(faults.items()))
            hint = "" if drop else "; drop=True leaves such pairs out"
            raise InputError(
                f"{self.task}: {len(faults)} of {len(self)} pairs do not fit this tokenizer, first pair {i}: {why}{hint}"
            )
        return self[kept]

    def by_length(self, network: LanguageModel) -> list[PromptPairs]:
        """The pairs in groups of one token length, shortest first: each group can be asked as one batch."""
        lengths = _lengths(network, self.clean)
        return [self[[i for i, m in enumerate(lengths) if m == n]] for n in sorted(set(lengths))]

    def target(self, network: LanguageModel, position: int = -1) -> Target:
        """Logit of the right answer minus that of the wrong one, at a position of the output.

        Where a pair has several answers, the log of the odds of the two sets: the difference of the log-sum-exp of their
        logits, which is the logit difference for sets of one.
        """
        right, wrong = _ids(network, self.answers), _ids(network, self.wrong)
        if right.shape[1] == wrong.shape[1] == 1:
            return target.logit_difference(right[:, 0], wrong[:, 0], position=position)
        return Target(_log_odds, (right, wrong, torch.tensor([position])), name="log_odds")

    def differences(self, network: LanguageModel) -> np.ndarray:
        """What the target is after both prompts of each pair, (n_pairs, 2): a model that can do the task is > 0 first."""
        found = np.empty((len(self), 2))
        lengths = np.array(_lengths(network, self.clean))
        for n in np.unique(lengths):
            rows = np.flatnonzero(lengths == n)
            some = self[rows.tolist()]
            for column, prompts in enumerate((some.clean, some.corrupted)):
                answer = network.run(Pass(network.encode(list(prompts)), of=some.target(network)))
                assert answer.scalar is not None
                found[rows, column] = answer.scalar.double().cpu().numpy()
        return found


def _lengths(network: LanguageModel, prompts: Texts) -> list[int]:
    return network.encode(list(prompts))["attention_mask"].sum(1).tolist()


def _ids(network: LanguageModel, texts: tuple[Texts, ...]) -> Tensor:
    """Token ids, (n_pairs, most answers); -1 where a pair has fewer."""
    most = max(map(len, texts))
    rows = [[network.token(t) for t in row] for row in texts]
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows])


def _log_odds(output: Tensor, right: Tensor, wrong: Tensor, position: Tensor) -> Tensor:
    logits = output[torch.arange(len(output), device=output.device), position]

    def of(ids: Tensor) -> Tensor:
        return logits.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf).logsumexp(1)

    return of(right) - of(wrong)


def _pairs(task: str, n: int, seed: int, draw: Callable[[np.random.Generator], tuple[Any, ...]]) -> PromptPairs:
    """`n` different pairs, drawn one by one."""
    at_least("n", n, 1)
    at_least("seed", seed, 0)
    generator = np.random.default_rng(seed)
    rows: dict[Texts, tuple[Any, ...]] = {}
    for _ in range(50 * n + 1000):
        row = draw(generator)
        rows.setdefault(row[:2], row)
        if len(rows) == n:
            return PromptPairs(task, *zip(*rows.values(), strict=True))
    raise InputError(f"{task}: {n} different pairs are wanted, there are about {len(rows)}")


def _choose(generator: np.random.Generator, words: Sequence[Any], k: int = 1) -> list[Any]:
    return [words[i] for i in generator.choice(len(words), k, replace=False)]


# ---------------------------------------------------------------- indirect object identification

NAMES: Texts = (
    "Mary", "John", "Tom", "James", "Dan", "Sarah", "Lisa", "Michael", "David", "Emma", "Anna", "Paul", "Mark", "Kate",
    "Alice", "Bob", "Jack", "Peter", "Laura", "Linda", "Robert", "Susan", "Karen", "Helen", "George", "Henry", "Jane",
    "Eric", "Kevin", "Brian", "Adam", "Simon", "Martin", "Steven", "Rachel", "Julia", "Maria", "Frank", "Scott", "Daniel",
)  # fmt: skip
PLACES: Texts = ("store", "park", "school", "office", "station", "garden", "restaurant", "hospital", "library")
OBJECTS: Texts = ("drink", "book", "ring", "key", "letter", "bag", "ball", "phone", "gift", "pen", "flower", "ticket")
IOI_TEMPLATES: Texts = (
    "When {a} and {b} went to the {place}, {s} gave a {object} to",
    "Then, {a} and {b} went to the {place}. {s} gave a {object} to",
    "After {a} and {b} met at the {place}, {s} handed a {object} to",
    "While {a} and {b} were working at the {place}, {s} gave a {object} to",
    "Friends {a} and {b} found a {object} at the {place}. {s} gave it to",
    "{a} and {b} had a long argument at the {place}. Afterwards {s} sent a {object} to",
)


def indirect_object(
    n: int = 16,
    seed: int = 0,
    order: str = "both",
    templates: Sequence[str] = IOI_TEMPLATES,
) -> PromptPairs:
    """Indirect object identification: two people, one of them gives something to the other.

    The corrupted prompt has the other person give, so its right answer is the wrong one of the clean prompt.

    Parameters
    ----------
    n : int, default 16
    seed : int, default 0
    order : {"both", "ABBA", "BABA"}, default "both"
        Whether the giver is named second (ABBA) or first (BABA) in the beginning; by turns for ``both``.
    templates : sequence of str
        With ``{a}``, ``{b}``, ``{s}`` and, if wanted, ``{place}`` and ``{object}``.

    References
    ----------
    Wang, Variengien, Conmy, Shlegeris, Steinhardt: Interpretability in the wild (2022).
    """
    if order not in ("both", "ABBA", "BABA"):
        raise InputError(f"order={order!r}: choose 'both', 'ABBA' or 'BABA'")
    if missing := [t for t in templates if not all(f"{{{k}}}" in t for k in "abs")] or not templates:
        raise InputError(f"templates need {{a}}, {{b}} and {{s}}; got {missing if templates else 'none'}")
    turn: Iterator[int] = iter(range(10**9))

    def draw(g: np.random.Generator) -> tuple[Any, ...]:
        k = next(turn)
        which = ("ABBA", "BABA")[k % 2] if order == "both" else order
        number = k // 2 % len(templates)
        io, s = _choose(g, NAMES, 2)
        a, b = (io, s) if which == "ABBA" else (s, io)
        words = {"a": a, "b": b, "place": _choose(g, PLACES)[0], "object": _choose(g, OBJECTS)[0]}
        clean, corrupted = (templates[number].format(**words, s=giver) for giver in (s, io))
        return clean, corrupted, (f" {io}",), (f" {s}",), f"{which} {number}"

    return _pairs("indirect object", n, seed, draw)


# ---------------------------------------------------------------- greater than

EVENTS: Texts = ("war", "project", "journey", "dispute", "reign", "study", "siege", "expedition", "programme", "truce")


def greater_than(n: int = 16, seed: int = 0, digits: int = 1) -> PromptPairs:
    """Greater-than: an event that began in one year of a century must end in a later one.

    The corrupted prompt has it begin at the start of the century, so that every answer is as good.

    Parameters
    ----------
    n : int, default 16
    seed : int, default 0
    digits : {1, 2}, default 1
        How many digits of a year one token of the model holds: 1 for models that write numbers digit by digit (Llama,
        SmolLM), then the decade is asked for; 2 for GPT-2, then the year within the century.

    References
    ----------
    Hanna, Liu, Variengien: How does GPT-2 compute greater-than? (2023).
    """
    if digits not in (1, 2):
        raise InputError(f"digits={digits!r}: choose 1 or 2")
    top = 10**digits - 1

    def draw(g: np.random.Generator) -> tuple[Any, ...]:
        (event,), century = _choose(g, EVENTS), int(g.integers(11, 20))
        least = int(g.integers(1, 9) if digits == 1 else g.integers(2, 99))
        last = f"{g.integers(2, 10)}" if digits == 1 else ""
        text = f"The {event} lasted from the year {century}{{}} to the year {century}"
        clean, corrupted = (
            text.format(f"{least}{last}" if digits == 1 else f"{least:02d}"),
            text.format(f"0{last}" if digits == 1 else "01"),
        )
        right = tuple(f"{y:0{digits}d}" for y in range(least + 1, top + 1))
        wrong = tuple(f"{y:0{digits}d}" for y in range(0 if digits == 1 else 1, least))
        return clean, corrupted, right, wrong, f"{digits} digits"

    return _pairs("greater than", n, seed, draw)


# ---------------------------------------------------------------- agreement of subject and verb

NOUNS: Texts = (
    "author", "pilot", "doctor", "teacher", "farmer", "student", "boy", "girl", "manager", "guard", "customer", "officer",
    "dancer", "chef", "driver", "lawyer", "king",
)  # fmt: skip
VERBS: tuple[tuple[str, str], ...] = ((" is", " are"), (" was", " were"), (" has", " have"))
AGREEMENT_TEMPLATES: dict[str, str] = {
    "simple": "The {subject}",
    "prepositional": "The {subject} near the {other}",
    "behind": "The {subject} behind the {other}",
    "relative": "The {subject} that the {other} met",
}


def subject_verb_agreement(
    n: int = 16, seed: int = 0, templates: Sequence[str] = tuple(AGREEMENT_TEMPLATES)
) -> PromptPairs:
    """Subject-verb agreement: the verb follows the subject's number, whatever noun stands in between.

    The corrupted prompt has the subject in the other number. The noun in between is singular or plural at random.

    Parameters
    ----------
    n : int, default 16
    seed : int, default 0
    templates : sequence of {"simple", "prepositional", "behind", "relative"}

    References
    ----------
    Finlayson et al.: Causal analysis of syntactic agreement mechanisms in neural language models (2021).
    """
    if not templates or (unknown := [t for t in templates if t not in AGREEMENT_TEMPLATES]):
        raise InputError(f"templates are {', '.join(AGREEMENT_TEMPLATES)}; got {unknown if templates else 'none'}")
    turn = iter(range(10**9))

    def draw(g: np.random.Generator) -> tuple[Any, ...]:
        name = templates[next(turn) % len(templates)]
        subject, other = _choose(g, NOUNS, 2)
        plural, other_plural = (bool(b) for b in g.integers(2, size=2))
        verbs = _choose(g, VERBS)[0]
        other += "s" * other_plural
        clean, corrupted = (
            AGREEMENT_TEMPLATES[name].format(subject=subject + "s" * p, other=other) for p in (plural, not plural)
        )
        number = "plural" if plural else "singular"
        return clean, corrupted, (verbs[plural],), (verbs[not plural],), f"{name} {number}"

    return _pairs("agreement", n, seed, draw)


# ---------------------------------------------------------------- facts

COUNTRIES: tuple[tuple[str, str, str], ...] = (
    ("France", "Paris", "French"), ("Germany", "Berlin", "German"), ("Italy", "Rome", "Italian"),
    ("Spain", "Madrid", "Spanish"), ("Japan", "Tokyo", "Japanese"), ("England", "London", "English"),
    ("Russia", "Moscow", "Russian"), ("Egypt", "Cairo", "Arabic"), ("Greece", "Athens", "Greek"),
    ("China", "Beijing", "Chinese"), ("Austria", "Vienna", "German"), ("Portugal", "Lisbon", "Portuguese"),
    ("Poland", "Warsaw", "Polish"), ("Sweden", "Stockholm", "Swedish"), ("Norway", "Oslo", "Norwegian"),
    ("Hungary", "Budapest", "Hungarian"), ("Cuba", "Havana", "Spanish"), ("Denmark", "Copenhagen", "Danish"),
    ("Finland", "Helsinki", "Finnish"), ("Iraq", "Baghdad", "Arabic"), ("Peru", "Lima", "Spanish"),
    ("Chile", "Santiago", "Spanish"), ("Syria", "Damascus", "Arabic"), ("Korea", "Seoul", "Korean"),
)  # fmt: skip
"""Country, capital, main language."""

ONE_HOP: dict[str, tuple[str, int, int]] = {
    "capital": ("The capital of {} is", 0, 1),
    "capital city": ("The capital city of {} is called", 0, 1),
    "language": ("The official language of {} is", 0, 2),
    "country": ("{} is the capital of", 1, 0),
}
"""Template, what it names (a column of `COUNTRIES`) and what it asks for."""

TWO_HOPS: dict[str, tuple[str, int, int]] = {
    "language of capital": ("In the country whose capital is {}, people speak", 1, 2),
    "official language of capital": ("The official language of the country whose capital is {} is", 1, 2),
}


def factual_recall(n: int = 16, seed: int = 0, hops: int = 1, distractors: int = 0) -> PromptPairs:
    """Facts about countries, asked directly or over a country that is not named.

    The corrupted prompt asks for another country; its answer is the wrong one of the clean prompt.

    Parameters
    ----------
    n : int, default 16
    seed : int, default 0
    hops : {1, 2}, default 1
        1: capital, language or country; 2: the language of the country with a capital.
    distractors : int, default 0
        True sentences about other countries that stand before both prompts.
    """
    if hops not in (1, 2):
        raise InputError(f"hops={hops!r}: choose 1 or 2")
    at_least("distractors", distractors, 0)
    if distractors > len(COUNTRIES) - 2:
        raise InputError(f"distractors={distractors}: there are {len(COUNTRIES) - 2} other countries")
    templates = list((ONE_HOP if hops == 1 else TWO_HOPS).items())
    turn = iter(range(10**9))

    def draw(g: np.random.Generator) -> tuple[Any, ...]:
        name, (template, given, asked) = templates[next(turn) % len(templates)]
        one, two, *others = _choose(g, COUNTRIES, 2 + distractors)
        while one[asked] == two[asked]:
            one, two, *others = _choose(g, COUNTRIES, 2 + distractors)
        before = "".join(f"{c[1]} is the capital of {c[0]}. " for c in others)
        clean, corrupted = (before + template.format(c[given]) for c in (one, two))
        return clean, corrupted, (f" {one[asked]}",), (f" {two[asked]}",), name

    return _pairs(f"facts over {hops} hop{'s' * (hops > 1)}", n, seed, draw)


# ---------------------------------------------------------------- programming without naming a language

CODING_TASKS: Texts = (
    "sorts a list of numbers", "reverses a string", "counts the words in a text", "computes the factorial of a number",
    "finds the largest element of a list", "checks whether a number is prime", "merges two sorted lists",
    "computes the n-th Fibonacci number", "removes duplicates from a list", "checks whether a word is a palindrome",
    "finds the greatest common divisor of two numbers", "counts the vowels in a string", "transposes a matrix",
    "multiplies two matrices", "searches a sorted list by bisection", "reads a file and prints its lines",
    "converts Celsius to Fahrenheit", "sums the digits of a number", "builds a binary search tree",
    "traverses a graph breadth first", "computes the mean and variance of a list", "parses a date",
    "generates all permutations of a list", "solves a quadratic equation", "simulates a queue with two stacks",
    "finds the shortest path in a graph", "validates an email address", "draws a random sample from a list",
    "writes a table to a file", "computes the distance between two points", "counts how often each letter occurs",
    "converts a number to binary", "finds the longest common prefix of some words", "rotates a list by k places",
    "evaluates a polynomial", "caches the results of a slow function",
)  # fmt: skip
CODING_TEMPLATES: Texts = (
    "Write a function that {}.",
    "Give me a short program that {}.",
    "How do I write code that {}?",
    "Implement a routine that {}. Show only the code.",
)


def coding_prompts(n: int = 36, seed: int = 0) -> list[str]:
    """Programming tasks that name no language, to see which one a model chooses.

    Parameters
    ----------
    n : int, default 36
        At most ``len(CODING_TASKS) * len(CODING_TEMPLATES)``; a task comes again only when all others have come.
    seed : int, default 0
    """
    at_least("n", n, 1)
    at_least("seed", seed, 0)
    most = len(CODING_TASKS) * len(CODING_TEMPLATES)
    if n > most:
        raise InputError(f"n={n}: there are {most} coding prompts")
    generator = np.random.default_rng(seed)
    order, first = (
        generator.permutation(len(CODING_TASKS)),
        generator.integers(len(CODING_TEMPLATES), size=len(CODING_TASKS)),
    )
    return [
        CODING_TEMPLATES[(first[task] + again) % len(CODING_TEMPLATES)].format(CODING_TASKS[task])
        for again in range(len(CODING_TEMPLATES))
        for task in order
    ][:n]
