"""Resampling: which sentences of a chain of reasoning move its answer, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from nissl.arguments import at_least, instance, is_number
from nissl.attribution.sentences import (
    THRESHOLD,
    Embedder,
    Trace,
    cosines,
    default_embedder,
    final_answer,
    split_sentences,
)
from nissl.errors import InputError, blame
from nissl.network import LanguageModel, Rollout
from nissl.runner import Asking, Job, Runner

T = TypeVar("T")

Sampler = Callable[[str, int], Sequence[str]]
"""``sampler(prefix, n)`` gives n texts that go on from the prefix."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Continuations of a trace from before each sentence, and from its end.

    Attributes
    ----------
    trace : Trace
    texts : tuple of tuple of str
        ``texts[i]`` goes on from before sentence i; ``texts[len(trace)]`` from the end of the trace.
    answers : tuple of tuple of (str or None)
        What each text concludes; None where it does not.
    force : str
        What was put between prefix and text to have an answer at once; empty where nothing was.
    """

    trace: Trace
    texts: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[str | None, ...], ...]
    force: str = ""

    def counts(self, where: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
        """How often each answer occurs, (S + 1, K), and the answers; of the texts in `where` (S + 1, n) only."""
        flat = np.array([a if a is not None else "" for row in self.answers for a in row])
        vocabulary, place = np.unique(flat, return_inverse=True)
        place = place.reshape(len(self.answers), -1)
        known = place != (np.searchsorted(vocabulary, "") if "" in vocabulary else -1)
        known = known if where is None else known & where
        counts = np.zeros((len(place), len(vocabulary)), dtype=np.int64)
        np.add.at(counts, (np.nonzero(known)[0], place[known]), 1)
        keep = vocabulary != ""
        return counts[:, keep], [str(v) for v in vocabulary[keep]]


def answer_kl(p: Any, q: Any, smoothing: float = 1e-9) -> np.ndarray:
    """KL divergence in nats of answer distribution p from q, from counts.

    Parameters
    ----------
    p, q : array_like, shapes that broadcast to (..., K)
        Counts of each answer. Answers that occur in neither are left out.
    smoothing : float, default 1e-9
        Added to each count. With 1e-9, an answer that q lacks costs about 20 nats times its share in p; 1 is Laplace's
        rule, which few samples bear better.

    Returns
    -------
    ndarray, shape (...)
        At least 0; NaN where p or q has no count.
    """
    p, q = np.broadcast_arrays(np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64))
    seen = (p + q) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = np.where(seen, p + smoothing, 0), np.where(seen, q + smoothing, 0)
        a, b = a / a.sum(-1, keepdims=True), b / b.sum(-1, keepdims=True)
        kl = np.where(seen & (a > 0), a * (np.log(a) - np.log(b)), 0).sum(-1)
    return np.where((p.sum(-1) > 0) & (q.sum(-1) > 0), np.maximum(kl, 0), np.nan)


@dataclass(frozen=True, eq=False)
class Resampling:
    """Go on from before each sentence many times; compare where that ends with where the trace's own sentence leads.

    Let D[i] be the answers of the texts that go on from before sentence i, so that D[i + 1] has the sentence in its
    prefix. Each text of D[i] begins with a sentence of its own; those whose cosine with the trace's sentence is below the
    threshold said something different.

    - resampling importance: KL(D[i] ‖ D[i + 1]);
    - counterfactual importance: KL(different part of D[i] ‖ D[i + 1] and the other part of D[i]);
    - forced-answer importance: KL(D[i] ‖ D[i + 1]) for texts that must give the answer at once.

    Parameters
    ----------
    samples : int, default 100
        Texts from each place.
    threshold : float, optional
        Cosine from which two sentences count as the same. By default the embedder's own, else 0.8.
    smoothing : float, default 1e-9
        See `answer_kl`.
    answer : callable, default `final_answer`
        Text to answer in one spelling, or None.
    embed : callable, optional
        Texts to vectors; by default MiniLM where it is installed, else TF-IDF.
    temperature, top_p, top_k, max_tokens, stop, seed
        Of generation, where a LanguageModel is given; they must be those the trace was written with.
    resamples : int, default 200
        Bootstrap draws behind the intervals; 0 for none.

    References
    ----------
    Bogdan, Macar, Nanda, Conmy: Thought Anchors: Which LLM reasoning steps matter? (2025).
    """

    samples: int = 100
    threshold: float | None = None
    smoothing: float = 1e-9
    answer: Callable[[str], str | None] = final_answer
    embed: Embedder | None = None
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    max_tokens: int = 512
    stop: tuple[int | str, ...] = ()
    seed: int = 44
    resamples: int = 200

    def __post_init__(self) -> None:
        for name, low in (("samples", 1), ("top_k", 0), ("max_tokens", 1), ("seed", 0), ("resamples", 0)):
            at_least(name, getattr(self, name), low)
        if self.threshold is not None and not (is_number(self.threshold) and -1 <= self.threshold <= 1):
            raise InputError(f"threshold is a cosine between -1 and 1, got {self.threshold!r}")
        if not (is_number(self.smoothing) and self.smoothing > 0):
            raise InputError(f"smoothing must be above 0, got {self.smoothing!r}")
        if not callable(self.answer):
            raise InputError(f"answer must be a function of a text, got {type(self.answer).__name__}")

    # ------------------------------------------------------------ texts

    def bank(
        self, source: LanguageModel | Sampler, trace: Trace, *, force: str = "", runner: Runner | None = None
    ) -> Bank:
        r"""Texts that go on from before each sentence.

        Parameters
        ----------
        source : LanguageModel or callable
            A callable ``sampler(prefix, n)`` gives n texts. A LanguageModel is asked for Rollouts, all places together.
        trace : Trace
        force : str, optional
            Put after each prefix, to have an answer at once: the end of thinking and an opened box, for example
            ``"\n</think>\n\nThe final answer is \boxed{"`` with line ends.
        runner : Runner, optional

        Raises
        ------
        InputError
            The sampler gives anything but n texts.
        """
        instance("trace", trace, Trace)
        if isinstance(source, LanguageModel):
            return driven(self.ask(source, trace, force), source, "resampling", runner)
        if not callable(source):
            raise InputError(f"texts come from a LanguageModel or from sampler(prefix, n), got {type(source).__name__}")
        texts = []
        for i in range(len(trace) + 1):
            with blame(InputError, f"the sampler failed before sentence {i}"):
                given = source(trace.prefix(i) + force, self.samples)
            if isinstance(given, str) or len(given) != self.samples or not all(isinstance(t, str) for t in given):
                raise InputError(
                    f"sampler(prefix, {self.samples}) must give {self.samples} texts; it gave {given!r:.80}"
                )
            texts.append(tuple(given))
        return self._answered(trace, texts, force)

    def ask(self, network: LanguageModel, trace: Trace, force: str = "") -> Asking[Bank]:
        """The same as a generator of Rollouts."""
        tokens = trace.tokens(network.tokenizer)
        more = network.encode(force, special=False)["input_ids"][0].tolist() if force else []
        prefixes = [tokens.prefix(i) + more for i in range(len(trace) + 1)]
        if not prefixes[0]:
            raise InputError("nothing stands before the first sentence: give the prompt (Trace.of(text, prompt=...))")
        questions, places = [], []
        for rows, samples, seed in self._parts(network, prefixes):
            questions.append(
                Rollout(
                    network.encode(prefixes[rows]), samples=samples, max_tokens=self.max_tokens, stop=self.stop,
                    temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=seed,
                )
            )  # fmt: skip
            places.append(rows)
        answers = yield questions
        texts: list[list[str]] = [[] for _ in prefixes]
        for rows, found in zip(places, answers, strict=True):
            for i, samples in zip(range(len(prefixes))[rows], found.tokens, strict=True):
                texts[i] += [network.continuation(t, self.stop) for t in samples]
        return self._answered(trace, [tuple(t) for t in texts], force)

    def _parts(self, network: LanguageModel, prefixes: list[list[int]]) -> list[tuple[slice, int, int]]:
        """(prefixes, samples, seed) of each Rollout: neighbours, which are of like length, within 1 GB of cache."""
        a = network.anatomy
        a_token = (
            8 * max(a.n_layers, 1) * (a.n_kv_heads * a.d_head or a.d_model or 1024)
        )  # keys and values, 4 bytes each
        parts, start = [], 0
        while start < len(prefixes):
            stop = start + 1
            rows = max(1, 2**30 // (a_token * (len(prefixes[start]) + self.max_tokens)))
            samples = min(self.samples, rows)
            while stop < len(prefixes) and samples == self.samples:
                if (stop + 1 - start) * samples * a_token * (len(prefixes[stop]) + self.max_tokens) > 2**30:
                    break
                stop += 1
            for j, done in enumerate(range(0, self.samples, samples)):
                parts.append((slice(start, stop), min(samples, self.samples - done), self.seed + 1_000_003 * j))
            start = stop
        return parts

    def _answered(self, trace: Trace, texts: Sequence[tuple[str, ...]], force: str) -> Bank:
        with blame(InputError, "answer= failed on a text"):
            given = {t: self.answer(force + t) for t in set().union(*texts)}
            answers = [[given[t] for t in row] for row in texts]
            # What follows a complete trace need not repeat its answer.
            own = self.answer(trace.text)
        answers[-1] = [own if a is None else a for a in answers[-1]]
        return Bank(trace, tuple(texts), tuple(map(tuple, answers)), force)

    # ------------------------------------------------------------ what they say

    def importance(self, bank: Bank, forced: Bank | None = None, gold: str | None = None) -> pd.DataFrame:
        """How much each sentence moves the answer.

        Parameters
        ----------
        bank : Bank
            Without force.
        forced : Bank, optional
            Of the same trace with force, for the forced-answer importance.
        gold : str, optional
            The right answer, in the spelling of `answer`, for the accuracy forms. Texts without an answer are left out.

        Returns
        -------
        DataFrame
            One row a sentence. ``resampling_kl``, ``counterfactual_kl`` (and ``forced_kl``) in nats, each with its 95 %
            bootstrap interval ``_low``, ``_high``; ``different``, ``same``: texts with an answer whose first sentence
            differs from, or matches, the trace's (an importance with no text on one side is NaN);
            ``different_fraction``, of all texts; ``overdetermined``: 1 − share of distinct first sentences. With `gold`,
            ``resampling_accuracy_kept_minus_removed`` (and ``forced_...``), and
            ``counterfactual_accuracy_removed_minus_kept``: note the paper's opposite sign, positive where the model does
            better without the sentence.
        """
        instance("bank", bank, Bank)
        if bank.force:
            raise InputError("bank= was made with force; give it as forced=")
        n_sentences = len(bank.trace)
        begins = {t: self._first(t) for row in bank.texts[:-1] for t in set(row)}
        firsts = [[begins[t] for t in row] for row in bank.texts[:-1]]
        alike = self._alike(firsts, bank.trace)
        every = np.zeros((n_sentences + 1, len(bank.texts[0])), dtype=bool)
        every[:-1] = ~alike
        different, vocabulary = bank.counts(every)
        everything, _ = bank.counts()
        before, after, different = everything[:-1], everything[1:], different[:-1]
        same = before - different
        columns: dict[str, Any] = {
            "text": [s.text for s in bank.trace.sentences],
            "different": different.sum(1), "same": same.sum(1),
            "different_fraction": (~alike).mean(1),
            "overdetermined": [1 - len(set(row)) / len(row) for row in firsts],
        }  # fmt: skip
        columns |= self._interval(
            "resampling_kl", lambda d, s, a: answer_kl(d + s, a, self.smoothing), different, same, after
        )
        columns |= self._interval(
            "counterfactual_kl", lambda d, s, a: answer_kl(d, a + s, self.smoothing), different, same, after
        )
        if gold is not None:
            right = np.array([v == gold for v in vocabulary], dtype=float)
            columns["resampling_accuracy_kept_minus_removed"] = _share(after, right) - _share(before, right)
            columns["counterfactual_accuracy_removed_minus_kept"] = _share(different, right) - _share(after, right)
        if forced is not None:
            if forced.trace is not bank.trace or not forced.force:
                raise InputError("forced= must be a bank of the same trace, made with force=")
            counts, vocabulary = forced.counts()
            before, after = counts[:-1], counts[1:]
            columns |= self._interval(
                "forced_kl", lambda d, s, a: answer_kl(d, a, self.smoothing), before, np.zeros_like(before), after
            )
            if gold is not None:
                right = np.array([v == gold for v in vocabulary], dtype=float)
                columns["forced_accuracy_kept_minus_removed"] = _share(after, right) - _share(before, right)
        return pd.DataFrame(columns).rename_axis("sentence")

    def moves(self, bank: Bank) -> xr.DataArray:
        """How much each sentence raises the chance that a later one is said, (source, target).

        Share of texts that say the target sentence after the source, minus the share before it; NaN where the target does
        not come later. A text says a sentence if one of its own has a cosine with it of at least the threshold.
        """
        instance("bank", bank, Bank)
        n_sentences = len(bank.trace)
        cut = {t: [s.text for s in split_sentences(t, keep_tail=True)] or [""] for t in set().union(*bank.texts)}
        said = [[cut[t] for t in row] for row in bank.texts]
        flat = [s for row in said for t in row for s in t]
        unique = list(dict.fromkeys(flat))
        place = {s: i for i, s in enumerate(unique)}
        hits = cosines(self.embedder, unique, [s.text for s in bank.trace.sentences]) >= self.cosine
        starts = np.cumsum([0, *(len(t) for row in said for t in row)])[:-1]
        of_text = np.logical_or.reduceat(hits[[place[s] for s in flat]], starts)
        share = of_text.reshape(n_sentences + 1, -1, n_sentences).mean(1)
        return later(share[1:] - share[:-1], "moves")

    @property
    def embedder(self) -> Embedder:
        """What is used: `embed`, or the default."""
        return default_embedder() if self.embed is None else self.embed

    @property
    def cosine(self) -> float:
        """The threshold that is used."""
        return getattr(self.embedder, "threshold", THRESHOLD) if self.threshold is None else self.threshold

    @staticmethod
    def _first(text: str) -> str:
        found = split_sentences(text, keep_tail=True)
        return found[0].text if found else ""

    def _alike(self, firsts: Sequence[Sequence[str]], trace: Trace) -> np.ndarray:
        """Which texts begin with a sentence like the trace's own, (S, n)."""
        unique = list(dict.fromkeys(s for row in firsts for s in row))
        place = {s: i for i, s in enumerate(unique)}
        found = cosines(self.embedder, unique, [s.text for s in trace.sentences]) >= self.cosine
        return np.array([[found[place[s], i] for s in row] for i, row in enumerate(firsts)])

    def _interval(
        self, name: str, kl: Callable[..., np.ndarray], different: np.ndarray, same: np.ndarray, after: np.ndarray
    ) -> dict[str, np.ndarray]:
        """A divergence of counts (S, K) and its percentile interval over texts, drawn anew on both sides."""
        found = {name: kl(different, same, after)}
        if not self.resamples:
            return found
        rng = np.random.default_rng(self.seed)

        def drawn(counts: np.ndarray) -> np.ndarray:
            total = counts.sum(1)
            share = counts / np.maximum(total, 1)[:, None]
            share[total == 0, 0] = 1.0  # no text: nothing is drawn, whatever the shares
            return rng.multinomial(total, share, size=(self.resamples, len(counts)))

        if not different.shape[1]:
            low = high = np.full(len(different), np.nan)
        else:
            one = drawn(np.concatenate([different, same], 1))
            values = kl(*np.split(one, 2, axis=-1), drawn(after))
            known = np.isfinite(values).any(0) & np.isfinite(found[name])
            low, high = np.full((2, len(different)), np.nan)
            if known.any():
                low[known], high[known] = np.nanpercentile(values[:, known], [2.5, 97.5], axis=0)
        return {**found, f"{name}_low": low, f"{name}_high": high}


def _share(counts: np.ndarray, right: np.ndarray) -> np.ndarray:
    total = counts.sum(1)
    return np.where(total > 0, counts @ right / np.maximum(total, 1), np.nan)


def later(values: np.ndarray, name: str) -> xr.DataArray:
    """A (source, target) matrix that is NaN where the target does not come later."""
    n = len(values)
    later = np.triu(np.ones((n, n), dtype=bool), 1)
    return xr.DataArray(np.where(later, values, np.nan), dims=("source", "target"), name=name)


def plain_runner() -> Runner:
    """A Runner that keeps no answers: logits and patterns of long traces are large, and nobody asks for them twice."""
    return Runner(memory=0)


def driven(generator: Asking[T], network: LanguageModel, name: str, runner: Runner | None) -> T:
    """Drive one generator to its end."""
    instance("network", network, LanguageModel)
    runner = plain_runner() if runner is None else runner
    ((_, result),) = runner.drive([Job(name, 0, network, lambda: generator)], None, name)
    return result
