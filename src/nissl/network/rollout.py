"""Rollout: generation under edits, the second kind of question that methods put to a language model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nissl.errors import InputError
from nissl.network.edit import Edit
from nissl.network.forward import Forward
from nissl.network.passes import Answer, Inputs, Pass, merge

if TYPE_CHECKING:
    from nissl.network.language import LanguageModel


@dataclass(frozen=True, eq=False)
class Rollout:
    """Generation from n prompts under edits, with a key-value cache.

    Parameters
    ----------
    inputs : Tensor or mapping
        What `LanguageModel.encode` gives: prompts that end in their last token (padded on the left, if at all).
    edits : sequence of Edit
        Changes in the pass over the prompts.
    then : sequence of Edit, optional
        Changes in each pass over a new token, where every site has one position. By default those of `edits` that hold at
        every position: neither ``positions=`` nor a value or mask by position.
    samples : int, default 1
        Continuations of each prompt.
    max_tokens : int, default 32
        New tokens at most.
    temperature : float, default 0.0
        0 takes the most probable token.
    top_p, top_k : float, int
        Draw from the most probable tokens only: as many as hold this probability together, or this many (0: all).
    stop : sequence of int or str
        A token that ends a continuation, besides the model's own; or a text whose appearance does.
    seed : int, default 0

    Notes
    -----
    The answer holds ``tokens`` (n, samples, max_tokens), -1 after the end, and ``log_probs`` of the same shape: log
    probabilities of these tokens at temperature 1, 0 after the end. What is drawn for a prompt depends on its tokens and the
    seed, not on the batch that it is in.
    """

    prompt: Pass
    following: Pass
    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[int | str, ...]
    seed: int

    def __init__(
        self,
        inputs: Any,
        edits: Sequence[Edit] | Edit = (),
        then: Sequence[Edit] | Edit | None = None,
        *,
        samples: int = 1,
        max_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: Sequence[int | str] | int | str = (),
        seed: int = 0,
    ) -> None:
        edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
        if then is None:
            then = tuple(e for e in edits if not _by_position(e))
        stop = (stop,) if isinstance(stop, (int, str)) else tuple(stop)
        if "" in stop:
            raise InputError("stop=: an empty text would end every continuation at once")
        for name, value, least in (("samples", samples, 1), ("max_tokens", max_tokens, 1), ("top_k", top_k, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number, at least {least}; got {value!r}")
        if not temperature >= 0 or temperature == float("inf"):
            raise InputError(f"temperature must be 0 (most probable token) or a positive number; got {temperature!r}")
        if not 0 < top_p <= 1:
            raise InputError(f"top_p must lie above 0 and at most at 1; got {top_p!r}")
        put = object.__setattr__
        put(self, "prompt", Pass(inputs, edits, read=()))
        if "input_ids" not in self.prompt.inputs:
            raise InputError("a Rollout takes token ids by name; write Rollout(net.encode(prompts), ...)")
        put(self, "following", Pass(self.prompt.inputs, then))
        for name, value in (
            ("samples", samples), ("max_tokens", max_tokens), ("temperature", float(temperature)),
            ("top_p", float(top_p)), ("top_k", top_k), ("stop", stop), ("seed", int(seed)),
        ):  # fmt: skip
            put(self, name, value)

    # ---------------------------------------------------------------- what a Runner asks of a question

    of = None
    wrt = ()
    rules = None
    output = True

    @property
    def inputs(self) -> Inputs:
        """The prompts."""
        return self.prompt.inputs

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Edits of both kinds of pass."""
        return self.prompt.edits + self.following.edits

    @property
    def read(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.prompt.n

    @property
    def cost(self) -> int:
        """Forward rows at most: each prompt, and each new token of each sample."""
        return self.n * (1 + self.samples * (self.max_tokens - 1))

    @property
    def settings(self) -> tuple[Any, ...]:
        """All that is no tensor."""
        return (self.samples, self.max_tokens, self.temperature, self.top_p, self.top_k, self.stop, self.seed)

    @property
    def merge_key(self) -> tuple[Any, ...]:
        """What must agree for two rollouts to be answered in one batch."""
        return ("rollout", self.prompt.merge_key, self.following.merge_key, self.settings)

    def content_key(self) -> str | None:
        """Hash of everything the answer depends on but the network; None where a function hides it."""
        keys = self.prompt.content_key(), self.following.content_key()
        if None in keys:
            return None
        return hashlib.blake2b(repr(("rollout", keys, self.settings)).encode(), digest_size=16).hexdigest()

    def __getitem__(self, index: slice) -> Rollout:
        """Some prompts."""
        return self._with(self.prompt[index], self.following[index])

    def joined(self, others: Sequence[Rollout]) -> Rollout:
        """One rollout with the prompts of all; they must agree in `merge_key`."""
        return self._with(merge([r.prompt for r in others]), merge([r.following for r in others]))

    def _with(self, prompt: Pass, following: Pass) -> Rollout:
        new = object.__new__(Rollout)
        new.__dict__.update({**self.__dict__, "prompt": prompt, "following": following})
        return new

    def seeds(self) -> list[int]:
        """A seed for each prompt, from its own tokens."""
        ids, mask = self.inputs["input_ids"], self.inputs.get("attention_mask")
        found = []
        for i, row in enumerate(ids):
            own = row if mask is None else row[mask[i].bool()]
            digest = hashlib.blake2b(f"{self.seed}|{own.tolist()}".encode(), digest_size=8).digest()
            found.append(int.from_bytes(digest, "big") >> 1)
        return found


def _by_position(e: Edit) -> bool:
    wide = e.value is not None and e.value.ndim >= 3 and e.value.shape[1] > 1
    return e.positions is not None or wide or e.where is not None


def steps(network: LanguageModel, question: Rollout) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate token by token; yields (tokens, log_probs), each (n * samples,), -1 and 0 for rows that have ended.

    The caller holds the network's lock and its quiet state (see `LanguageModel.run`).
    """
    n, samples = question.n, question.samples
    inputs = network.place(question.inputs)
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    if not bool(mask[:, -1].bool().all()):
        raise InputError("generation goes on from the last position: pad prompts on the left (net.encode does)")
    longest = network.context_length
    if longest and ids.shape[1] + question.max_tokens - 1 > longest:
        raise InputError(
            f"{ids.shape[1]} prompt tokens and {question.max_tokens} new ones exceed the context of {longest}; "
            "shorten the prompt or lower max_tokens="
        )
    first = {**inputs, "attention_mask": mask, "use_cache": True}
    if network.takes("logits_to_keep"):
        first["logits_to_keep"] = 1
    output = _forward(network, question.prompt.on(first, question.prompt.edits, None))
    cache = output["past_key_values"]
    logits = network.logits_of(output)[:, -1].float()
    edits = question.following.edits
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        logits, mask = logits.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
        edits = tuple(_repeated(e, samples) for e in edits)
    positions = mask.sum(1, keepdim=True)
    generators = [
        torch.Generator().manual_seed((seed + 0x9E3779B97F4A7C15 * s) % 2**63) for seed in question.seeds() for s in range(samples)
    ]  # fmt: skip
    stop_ids = torch.tensor(
        sorted({*network.end_ids, *(s for s in question.stop if isinstance(s, int))}),
        dtype=torch.long,
        device=ids.device,
    )
    texts = tuple(s for s in question.stop if isinstance(s, str))
    going = torch.ones(n * samples, dtype=torch.bool, device=ids.device)
    written: list[Tensor] = []
    for step in range(question.max_tokens):
        token = _draw(logits, question, generators)
        log_prob = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        written.append(torch.where(going, token, -1))
        yield written[-1], torch.where(going, log_prob, 0.0)
        going = going & ~torch.isin(token, stop_ids)
        if texts:
            going = going & ~_ended(network, written, texts).to(going.device)
        if step + 1 == question.max_tokens or not bool(going.any()):
            return
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        following: Inputs = {
            "input_ids": token[:, None], "attention_mask": mask, "position_ids": positions + step,
            "past_key_values": cache, "use_cache": True,
        }  # fmt: skip
        following = {k: v for k, v in following.items() if network.takes(k)}
        output = _forward(network, Pass(following, edits))
        logits = network.logits_of(output)[:, -1].float()


def _forward(network: LanguageModel, question: Pass) -> Any:
    forward = Forward(network, question, copies=network._copies)
    output = forward.run()
    forward.check_reached()
    return output


def _repeated(e: Edit, times: int) -> Edit:
    """An edit for `times` copies of each row, side by side."""

    def each(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.repeat_interleave(times, 0)

    value = each(e.value) if e.value is not None and e.value.ndim >= 2 else e.value
    return replace(e, value=value, rows=each(e.rows), where=each(e.where))


def _draw(
    logits: Float[Tensor, "rows vocabulary"], question: Rollout, generators: list[torch.Generator]
) -> Int[Tensor, " rows"]:
    """The next token of each row: its own uniform number through the distribution function of the kept tokens."""
    if question.temperature == 0:
        return logits.argmax(-1)
    k = min(question.top_k or logits.shape[-1], logits.shape[-1])
    top, order = (logits / question.temperature).topk(k, dim=-1)  # sorted, most probable first
    weights = top.softmax(-1, dtype=torch.float64)
    total = weights.cumsum(-1)
    weights = torch.where(total - weights < question.top_p, weights, 0.0)
    total = weights.cumsum(-1)
    drawn = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    at = torch.searchsorted(total, (drawn * total[:, -1])[:, None], right=True).clamp(max=k - 1)
    return order.gather(1, at)[:, 0]


def _ended(network: LanguageModel, written: list[Tensor], texts: tuple[str, ...]) -> Bool[Tensor, " rows"]:
    """Rows in whose newest text one of `texts` appears; looks at no more tokens than could hold it."""
    longest = max(map(len, texts)) + 1
    tail = torch.stack(written[-longest:], 1)
    found = [any(t in network.decode(row[row >= 0]) for t in texts) for row in tail]
    return torch.tensor(found)


def answer(network: LanguageModel, question: Rollout) -> Answer:
    """The whole generation as an Answer."""
    n, samples, most = question.n, question.samples, question.max_tokens
    tokens = torch.full((n * samples, most), -1, dtype=torch.long, device=network.device)
    log_probs = torch.zeros(n * samples, most, device=network.device)
    for i, (token, log_prob) in enumerate(steps(network, question)):
        tokens[:, i], log_probs[:, i] = token, log_prob
    return Answer(tokens=tokens.reshape(n, samples, most), log_probs=log_probs.reshape(n, samples, most))
