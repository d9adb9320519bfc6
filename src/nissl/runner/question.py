"""What a method is asked about one example, and how it words its Passes."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from nissl.errors import InputError
from nissl.network import Network, Pass, Rules, Set, Target
from nissl.network.passes import Inputs
from nissl.network.site import parse

T = TypeVar("T")
Asking = Generator[Pass | list[Pass], Any, T]
"""A generator that yields a Pass and receives its Answer (or lists of both), and returns T."""

CHUNK = 32
"""Rows that a method asks for at once: enough to fill batches, few enough to hold in memory."""


@dataclass(frozen=True, eq=False)
class Question:
    """One example, the scalar to be explained and the site whose units get scores.

    Attributes
    ----------
    network : Network
        For what is known without asking: roles, dimensions, whether it has gradients. Methods never run it themselves.
    inputs : dict of name to Tensor (1, ...)
        One row, on the network's device.
    target : Target
        For that row.
    site : str
        Where the scores are wanted; ``"input"`` or any other site (ML-Att).
    seed : int
        Of this example and method; `generator` starts from it.
    example : int
        Number of the example in the run.
    """

    network: Network
    inputs: Inputs
    target: Target
    site: str = "input"
    seed: int = 0
    example: int = 0

    @property
    def input_name(self) -> str:
        """Name of the input that ``site`` (or ``"input"``) means."""
        return self.network.input_key(self.site if self.at_input else "input", self.inputs)

    @property
    def at_input(self) -> bool:
        """Whether the scores are wanted at the network's input."""
        return parse(self.site).part == "input"

    @property
    def input(self) -> Tensor:
        """The input tensor itself, (1, ...)."""
        return self.inputs[self.input_name]

    @property
    def is_tokens(self) -> bool:
        """Whether the input is whole numbers: token ids, which can be replaced but not scaled or differentiated."""
        return not self.input.is_floating_point()

    def generator(self, salt: str = "") -> torch.Generator:
        """A random generator that depends on seed, example and salt only; on the CPU, so devices agree."""
        digest = hashlib.blake2b(f"{self.seed}|{self.example}|{salt}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def value(self) -> Asking[Tensor]:
        """Activation at the site, (1, ...): ``x = yield from q.value()``."""
        if self.at_input:
            return self.input
        answer = yield Pass(self.inputs, read=[self.site], output=False)
        return answer.reads[self.site]

    def ask(
        self,
        value: Tensor | None = None,
        *,
        gradient: bool = False,
        read: Sequence[str] = (),
        wrt: Sequence[str] = (),
        rules: Rules | None = None,
        target: Target | None = None,
        scalar: bool = True,
    ) -> Pass:
        """A Pass about this example.

        Parameters
        ----------
        value : Tensor (n, ...), optional
            n variants of the activation at the site, one row each; by default the example as it is.
        gradient : bool
            Differentiate at the site.
        read, wrt : sequence of str
            Further sites to read or differentiate.
        rules : Rules, optional
        target : Target, optional
            Another scalar than the question's.
        scalar : bool, default True
            Whether the scalar is wanted at all.
        """
        inputs, edits = self.inputs, ()
        if value is not None:
            n = value.shape[0]
            inputs = {k: _repeat(v, n) for k, v in self.inputs.items()}
            if self.at_input:
                inputs[self.input_name] = value
            else:
                edits = (Set(self.site, value),)
        of = (target or self.target) if scalar or gradient or wrt else None
        wanted = [*([self.site] if gradient else []), *wrt]
        return Pass(inputs, edits, read=read, of=of, wrt=wanted, rules=rules)

    def at(self, network: Network, differentiable: bool, site: str | None) -> Question:
        """The same question about another network or site; see `resolve_site`."""
        return replace(self, network=network, site=resolve_site(network, self.inputs, site, differentiable))

    def with_input(self, value: Tensor) -> Question:
        """The same question about another input tensor (1, ...)."""
        return replace(self, inputs={**self.inputs, self.input_name: value})

    def about(self, target: Target) -> Question:
        """The same question about another target."""
        return replace(self, target=target.rows(1))

    def scalars(self, values: Tensor, target: Target | None = None) -> Asking[Tensor]:
        """The scalar for n variants of the activation at the site, (n,), asked in chunks."""
        answers = yield [self.ask(chunk, target=target) for chunk in values.split(CHUNK)]
        return torch.cat([a.scalar for a in answers])


def _repeat(v: Any, n: int) -> Any:
    return v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) else v


def chunks(n: int, size: int = CHUNK) -> Iterator[slice]:
    """Consecutive slices that cover n rows."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def resolve_site(network: Network, inputs: Inputs, site: str | None, differentiable: bool) -> str:
    """The site where scores are wanted; for token ids a method that differentiates goes to their embedding."""
    site = "input" if site is None else site
    network.locate(site)
    if parse(site).part == "input" and differentiable:
        tensor = inputs[network.input_key(site, inputs)]
        if not tensor.is_floating_point():
            embedding = network.embedding_site(inputs)
            if embedding is None:
                raise InputError(
                    f"the input holds whole numbers ({tensor.dtype}) and goes through no embedding layer: it has no "
                    "gradient; name a site inside the network (site=...), or use a method that needs no gradients"
                )
            return embedding
    return site
