"""Pass and Answer: the one question that methods put to networks, and what comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nissl.arguments import items
from nissl.errors import InputError, blame
from nissl.network.edit import Edit
from nissl.network.rules import Rules
from nissl.network.site import parse
from nissl.network.target import Target, as_target

Inputs = dict[str, Any]
"""Inputs by name: ``"0"``, ``"1"`` … for positional ones, keywords otherwise; tensors have rows first."""


def as_inputs(inputs: Any) -> Inputs:
    """Inputs by name from a tensor, an array, a tuple of them (positional) or a mapping (keywords).

    Values that are not tensors or arrays are passed on to the network as they are.

    Raises
    ------
    InputError
        Nothing to run on, or tensors that disagree in their number of rows.
    """
    if isinstance(inputs, (Tensor, np.ndarray)):
        named: Inputs = {"0": inputs}
    elif isinstance(inputs, Mapping):
        with blame(InputError, "inputs cannot be read"):  # a mapping may be a file, such as an archive of numpy's
            named = {str(k): v for k, v in inputs.items()}
    elif isinstance(inputs, (tuple, list)):
        named = {str(i): v for i, v in enumerate(inputs)}
    else:
        raise InputError(
            f"inputs must be a tensor, an array, a tuple or a mapping of them, got {type(inputs).__name__}"
        )
    for name, value in named.items():
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc":
                raise InputError(f"input {name!r}: an array of {value.dtype} holds no numbers")
            # torch takes native, contiguous and writable arrays only
            value = named[name] = torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), ["C", "W"]))
        if isinstance(value, Tensor) and value.ndim == 0:
            raise InputError(f"input {name!r} is a scalar; the first dimension must be rows (examples)")
        if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_meta):
            kind = "on the meta device, without data" if value.is_meta else f"sparse ({value.layout})"
            raise InputError(f"input {name!r} is {kind}; an ordinary tensor is needed")
    sizes = {name: v.shape[0] for name, v in named.items() if isinstance(v, Tensor)}
    if not sizes:
        raise InputError("inputs hold no tensor")
    if len(set(sizes.values())) > 1:
        raise InputError(f"inputs disagree in their number of rows: {sizes}")
    if 0 in sizes.values():
        raise InputError("inputs are empty: 0 rows")
    return named


def raw_bytes(t: Tensor) -> memoryview:
    """The numbers of a tensor as bytes, in row-major order."""
    flat = t.detach().cpu().reshape(-1)
    if flat.stride(0) != 1:  # repeated entries; contiguous() leaves single ones as they are
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8).numpy().data


def is_plain(value: Any) -> bool:
    """Whether an input that is no tensor is said in full by its repr."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def n_rows(inputs: Inputs) -> int:
    """Number of rows."""
    return next(v.shape[0] for v in inputs.values() if isinstance(v, Tensor))


def rows_of(inputs: Inputs, index: slice) -> Inputs:
    """Some rows."""
    return {k: v[index] if isinstance(v, Tensor) else v for k, v in inputs.items()}


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass on n rows, under edits, that reads sites and may differentiate a scalar of each row.

    Parameters
    ----------
    inputs : Tensor, array, tuple or mapping
        What the network takes; rows (examples) come first in every tensor.
    edits : sequence of Edit
        Changes made on the way, in this order at each site.
    read : sequence of str
        Sites whose activations are wanted, after the edits there.
    of : Target, class indices, callable or None
        One scalar a row.
    wrt : sequence of str
        Sites at which the gradient of the scalar is wanted, after the edits there.
    rules : Rules, optional
        Backward rules; None is plain differentiation.
    output : bool, default True
        False when the output is not needed: the pass may stop after the last site it reads.
    """

    inputs: Inputs
    edits: tuple[Edit, ...] = ()
    read: tuple[str, ...] = ()
    of: Target | None = None
    wrt: tuple[str, ...] = ()
    rules: Rules | None = None
    output: bool = True
    n: int = field(init=False)

    def __init__(
        self,
        inputs: Any,
        edits: Sequence[Edit] | Edit = (),
        read: Sequence[str] = (),
        of: Any = None,
        wrt: Sequence[str] = (),
        rules: Rules | None = None,
        output: bool = True,
    ) -> None:
        put = object.__setattr__
        put(self, "inputs", as_inputs(inputs))
        put(self, "n", n_rows(self.inputs))
        edits = (edits,) if isinstance(edits, Edit) else items("edits", edits)
        if wrong := [e for e in edits if not isinstance(e, Edit)]:
            raise InputError(f"edits must be made by Set, Add, Scale, Ablate, Patch or Apply; got {wrong[0]!r}")
        put(self, "edits", tuple(e.spread(self.n) for e in edits))
        for name, value in (("read", read), ("wrt", wrt)):
            sites = (value,) if isinstance(value, str) else items(name, value)
            put(self, name, tuple(dict.fromkeys(str(parse(s)) for s in sites)))
        if rules is not None and not isinstance(rules, Rules):
            raise InputError(f"rules must be a rule set such as LRPRules() or None, got {type(rules).__name__}")
        if self.wrt and of is None:
            raise InputError("wrt= asks for a gradient, but of= names no scalar to differentiate")
        if rules is not None and self.n % rules.group:
            raise InputError(f"{rules.name} takes rows in groups of {rules.group}, {self.n} were given")
        put(self, "of", None if of is None else _target(of).rows(self.n))
        put(self, "rules", rules)
        put(self, "output", bool(output) or (self.of is not None and self.of.site is None))

    def on(self, inputs: Inputs, edits: tuple[Edit, ...], of: Target | None) -> Pass:
        """The same question on other inputs, edits and target of the same form."""
        return _build(inputs, edits, of, self)

    def __getitem__(self, index: slice) -> Pass:
        """Some rows of the pass."""
        return _build(
            rows_of(self.inputs, index),
            tuple(e[index] for e in self.edits),
            None if self.of is None else self.of[index],
            self,
        )

    def joined(self, passes: Sequence[Pass]) -> Pass:
        """One pass with the rows of all, this one among them; they must agree in `merge_key`."""
        return _join(passes)

    @property
    def cost(self) -> int:
        """Forward rows."""
        return self.n

    def without_target(self) -> Pass:
        """The same pass, giving only output and reads."""
        return Pass(self.inputs, self.edits, self.read, rules=self.rules)

    @property
    def merge_key(self) -> tuple[Any, ...]:
        """What must agree for two passes to be answered in one batch."""
        signature = tuple(
            (k, v.dtype, tuple(v.shape[1:]), v.device)
            if isinstance(v, Tensor)
            else (k, repr(v) if is_plain(v) else id(v))
            for k, v in self.inputs.items()
        )
        edits = tuple(e.kind_key for e in self.edits)
        return (
            signature,
            edits,
            self.read,
            None if self.of is None else self.of.kind,
            self.wrt,
            self.rules,
            self.output,
        )

    def content_key(self) -> str | None:
        """Hash of everything the answer depends on but the network; None where a function or object hides it."""
        digest = hashlib.sha256()

        def put(*values: Any) -> None:
            for v in values:
                if isinstance(v, Tensor):
                    v = v.detach()
                    if v.ndim and v.shape[0] > 1 and v.stride(0) == 0:  # repeated rows are hashed once
                        put("repeat", v.shape[0], v[:1])
                        continue
                    digest.update(f"{v.dtype}{tuple(v.shape)}".encode())
                    digest.update(raw_bytes(v))
                else:
                    digest.update(repr(v).encode())
                digest.update(b"|")

        for name, value in self.inputs.items():
            if not isinstance(value, Tensor) and not is_plain(value):
                return None
            put(name, value)
        for e in self.edits:
            if e.function is not None:
                return None
            put(e.site, e.kind, e.value, e.units, e.positions, e.rows, e.where)
        put(self.read, self.wrt, self.rules, self.output)
        if self.of is not None:
            function = self.of.function
            if function.__module__ != "nissl.network.target":
                return None
            put(function.__qualname__, self.of.site, *self.of.values)
        return digest.hexdigest()


def _target(of: Any) -> Target:
    """A target whose site, if it has one, is in its plain spelling."""
    target = as_target(of)
    return target if target.site is None else replace(target, site=str(parse(target.site)))


def _build(inputs: Inputs, edits: tuple[Edit, ...], of: Target | None, like: Pass) -> Pass:
    """A pass like another with other rows; skips the checks that `like` has passed."""
    new = object.__new__(Pass)
    put = object.__setattr__
    for name in ("read", "wrt", "rules", "output"):
        put(new, name, getattr(like, name))
    put(new, "inputs", inputs)
    put(new, "edits", edits)
    put(new, "of", of)
    put(new, "n", n_rows(inputs))
    return new


def merge(questions: Sequence[Any]) -> Any:
    """One question with the rows of all, Passes or Rollouts; they must agree in `merge_key`."""
    return questions[0] if len(questions) == 1 else questions[0].joined(questions)


def _join(passes: Sequence[Pass]) -> Pass:
    first = passes[0]
    inputs = {
        k: torch.cat([p.inputs[k] for p in passes]) if isinstance(v, Tensor) else v for k, v in first.inputs.items()
    }
    edits = []
    for i, e in enumerate(first.edits):
        parts = [p.edits[i] for p in passes]
        changed: dict[str, Any] = {}
        if e.value is not None and e.value.ndim >= 2:
            changed["value"] = torch.cat([x.value for x in parts if x.value is not None])
        for name in ("rows", "where"):
            if getattr(e, name) is not None:
                changed[name] = torch.cat([getattr(x, name) for x in parts])
        edits.append(Edit(**{**e.__dict__, **changed}))
    of = first.of
    if of is not None and of.values:
        columns = zip(*(p.of.values for p in passes if p.of is not None), strict=True)
        of = Target(of.function, tuple(torch.cat(c) for c in columns), of.site, of.name)
    return _build(inputs, tuple(edits), of, first)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a network says to a Pass; every tensor has rows first and is detached.

    Attributes
    ----------
    output : Tensor or None
        The network's output; None when the pass did not want it.
    scalar : Tensor (n_rows,) or None
    reads, gradients : dict of site to Tensor
    tokens, log_probs : Tensor (n_rows, n_samples, max_tokens) or None
        What a Rollout generated; see there.
    """

    output: Tensor | None = None
    scalar: Tensor | None = None
    reads: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    log_probs: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> Answer:
        """The answer with a function of every tensor."""

        def maybe(t: Tensor | None) -> Tensor | None:
            return None if t is None else function(t)

        return Answer(
            maybe(self.output),
            maybe(self.scalar),
            {k: function(v) for k, v in self.reads.items()},
            {k: function(v) for k, v in self.gradients.items()},
            maybe(self.tokens),
            maybe(self.log_probs),
        )

    def clone(self) -> Answer:
        """A copy in memory of its own."""
        return self.each(lambda t: t.clone())

    def __getitem__(self, index: slice) -> Answer:
        """Some rows of the answer."""
        return self.each(lambda t: t[index])

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        named = {"output": self.output, "scalar": self.scalar, "tokens": self.tokens, "log_probs": self.log_probs}
        named |= {f"read {k}": v for k, v in self.reads.items()} | {
            f"gradient {k}": v for k, v in self.gradients.items()
        }
        return {k: v for k, v in named.items() if v is not None}

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(v.numel() * v.element_size() for v in self.tensors().values())


def concatenate(answers: Sequence[Answer]) -> Answer:
    """Rows of several answers to one pass, in order."""
    if len(answers) == 1:
        return answers[0]

    def cat(parts: list[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else torch.cat([p for p in parts if p is not None])

    first = answers[0]
    return Answer(
        cat([a.output for a in answers]),
        cat([a.scalar for a in answers]),
        {k: torch.cat([a.reads[k] for a in answers]) for k in first.reads},
        {k: torch.cat([a.gradients[k] for a in answers]) for k in first.gradients},
        cat([a.tokens for a in answers]),
        cat([a.log_probs for a in answers]),
    )
