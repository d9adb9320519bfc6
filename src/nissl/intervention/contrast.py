"""Contrasts: answers of two kinds to the same prompts, and what they look like inside a language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from nissl.arguments import instance, items
from nissl.errors import InputError
from nissl.network import LanguageModel, Pass
from nissl.network.passes import Inputs
from nissl.network.site import parse
from nissl.runner import Asking, Runner


@dataclass(frozen=True, eq=False)
class Contrast:
    """Prompts, each with answers of the wanted kind and of the other.

    Parameters
    ----------
    prompts : sequence of str, or of token ids
    positive, negative : sequence
        For each prompt one answer, or a list of answers; each a text or a list of token ids. An answer follows its prompt
        directly: begin it with a space or line break where one is due.

    Raises
    ------
    InputError
        No prompt, columns of different length, or a prompt without an answer of each kind.
    """

    prompts: Sequence[Any]
    positive: Sequence[Any]
    negative: Sequence[Any]

    def __post_init__(self) -> None:
        put = object.__setattr__
        for name in ("prompts", "positive", "negative"):
            put(self, name, items(name, getattr(self, name)))
        sizes = {name: len(getattr(self, name)) for name in ("prompts", "positive", "negative")}
        if len(set(sizes.values())) > 1 or not self.prompts:
            raise InputError(f"a contrast needs prompts and, for each, positive and negative answers; got {sizes}")
        for name in ("positive", "negative"):
            put(self, name, tuple(_answers(a, name, i) for i, a in enumerate(getattr(self, name))))

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def __getitem__(self, index: slice) -> Contrast:
        """Some of the prompts."""
        return Contrast(self.prompts[index], self.positive[index], self.negative[index])


def _answers(given: Any, name: str, i: int) -> tuple[Any, ...]:
    if isinstance(given, str) or (isinstance(given, Sequence) and given and all(isinstance(t, int) for t in given)):
        given = (given,)
    found = items(f"{name} answers of prompt {i}", given)
    if not found or not all(len(a) for a in found):
        raise InputError(f"prompt {i} has an empty {name} answer, or none")
    return found


@dataclass(frozen=True, eq=False)
class Activations:
    """What a contrast looks like inside a network.

    Attributes
    ----------
    prompt : Tensor (n_prompts, n_layers, d)
        At the last token of each prompt by itself: what is known when an answer begins.
    positive, negative : Tensor (n, n_layers, d)
        At the last token of prompt and answer, or averaged over the answer; mean over the answers of a prompt.
    role : str
        Where in each layer; see `Anatomy`.
    """

    prompt: Float[Tensor, "m layer d"]
    positive: Float[Tensor, "n layer d"]
    negative: Float[Tensor, "n layer d"]
    role: str = "resid_post"


def read_contrast(
    network: LanguageModel,
    contrast: Contrast,
    *,
    role: str = "resid_post",
    pool: Literal["last", "mean"] = "last",
    runner: Runner | None = None,
) -> Activations:
    """Activations of a contrast in all layers.

    Several steering methods can be fitted on one reading.

    Parameters
    ----------
    network : LanguageModel
    contrast : Contrast
    role : str, default "resid_post"
    pool : {"last", "mean"}, default "last"
        The answer's last token, or the mean over its tokens. The last one also carries what that token is: let all answers
        end alike, or use the mean.
    runner : Runner, optional

    Raises
    ------
    InputError
        A prompt or answer that cannot be encoded, or one too long.
    """
    instance("network", network, LanguageModel)
    instance("contrast", contrast, Contrast)
    if pool not in ("last", "mean"):
        raise InputError(f"pool={pool!r}: choose 'last' or 'mean'")
    sites = sites_of(network, role)
    rows: list[tuple[Inputs, int]] = []
    owners: list[tuple[int, int, int]] = []  # prompt, kind, number of answers of that kind
    for i, prompt in enumerate(contrast.prompts):
        ids = token_ids(network, prompt)
        rows.append((network.encode([ids]), 1))
        owners.append((i, 0, 1))
        for kind, answers in ((1, contrast.positive[i]), (2, contrast.negative[i])):
            for answer in answers:
                more = token_ids(network, answer, special=False)
                rows.append((network.encode([ids + more]), len(more) if pool == "mean" else 1))
                owners.append((i, kind, len(answers)))
    read = states_of(network, rows, sites, runner)
    found = read.new_zeros(3, len(contrast), *read.shape[1:])
    for row, (i, kind, n) in zip(read, owners, strict=True):
        found[kind, i] += row / n
    return Activations(found[0], found[1], found[2], role)


def token_ids(network: LanguageModel, text: Any, special: bool = True) -> list[int]:
    """Token ids of one prompt (text, ids or chat), or, without `special`, of a text that follows one."""
    return network.encode([text], special=special)["input_ids"][0].tolist()


def sites_of(network: LanguageModel, role: str) -> list[str]:
    """Sites of a role in all layers, spelled as answers name them."""
    return [str(parse(s)) for s in network.anatomy.sites(role)]


def states_of(
    network: LanguageModel, rows: Sequence[tuple[Inputs, int]], sites: list[str], runner: Runner | None
) -> Float[Tensor, "n layer d"]:
    """Activation of each row, averaged over its last positions; rows of one length share a batch."""

    def ask(inputs: Inputs, last: int) -> Asking[Tensor]:
        answer = yield Pass(inputs, read=sites, output=False)
        return torch.stack([answer.reads[s][0, -last:].float().mean(0) for s in sites])

    starts = [partial(ask, *row) for row in rows]
    return torch.stack(quiet(runner).collect(network, starts, "reading activations", "steering"))


def quiet(runner: Runner | None) -> Runner:
    """The given runner, or one that keeps few answers: activations of whole prompts are large and asked once."""
    return runner or Runner(memory=2**26)
