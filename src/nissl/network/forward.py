"""One forward pass with hooks at the asked sites, and none left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nissl.errors import SiteError
from nissl.network.edit import Edit
from nissl.network.passes import Pass
from nissl.network.rules import RuleMode, is_activation_module, unmark
from nissl.network.site import Address, parse, rows_apart, select, substitute, unit_axis

if TYPE_CHECKING:
    from nissl.network.network import Network
    from nissl.network.trace import Trace


class Stop(BaseException):
    """Ends a forward pass whose last wanted site has been read; never seen by users."""


class Forward:
    """Runs one Pass forward and keeps what was captured on the way."""

    def __init__(self, network: Network, question: Pass, copies: bool) -> None:
        self.network = network
        self.question = question
        self.copies = copies
        self.reads: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.sources: dict[str, Tensor] = {}
        self.mode: RuleMode | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._calls: dict[tuple[nn.Module | None, str], int] = {}
        of = question.of
        self._source = None if of is None else of.site
        self._edits: dict[str, list[Edit]] = {}
        for e in question.edits:
            self._edits.setdefault(e.site, []).append(e)
        asked = [*self._edits, *question.read, *question.wrt, *([self._source] if self._source else [])]
        self.addresses: dict[str, Address] = {s: parse(s) for s in dict.fromkeys(asked)}
        self._reached: set[str] = set()
        self._gradients = set(question.wrt)

    def run(self) -> Any:
        """The module's output; None when the pass could stop early."""
        question, network = self.question, self.network
        self._may_stop = not question.output and question.of is None and self._single_calls()
        inputs = dict(question.inputs)
        for site, address in self.addresses.items():
            if address.part == "input":
                key = network.input_key(site, inputs)
                inputs[key] = self.capture(site, inputs[key], None)
        with ExitStack() as stack:
            # by the module itself: one that is shared has several names, and its calls are counted once
            by_module: dict[tuple[nn.Module | None, str], list[Address]] = {}
            for address in self.addresses.values():
                if address.part != "input":
                    by_module.setdefault((network.get_module(address.module), address.part), []).append(address)
            rules = question.rules
            if rules is not None:
                self.mode = rules.mode()
                for module in network.modules():
                    if is_activation_module(module):
                        stack.callback(module.register_forward_hook(self.mode.activation_module).remove)
            for (module, part), addresses in by_module.items():
                assert module is not None
                if part == "out":
                    handle = module.register_forward_hook(self._out_hook(addresses))
                elif part == "in":
                    handle = module.register_forward_pre_hook(self._in_hook(addresses), with_kwargs=True)
                else:
                    continue
                stack.callback(handle.remove)
            if self.mode is not None:
                stack.enter_context(self.mode)
            attending = {
                module: None for module, part in by_module if part in ("pattern", "scores") and module is not None
            }
            if attending:
                stack.enter_context(network.attention(attending, self._attention))
            try:
                return network.call(inputs)
            except Stop:
                return None

    def _single_calls(self) -> bool:
        """Whether no asked place is come by again after it was captured, so that stopping hides no ambiguity."""
        trace = self.network.trace_of(self.question)
        return all(a.part == "input" or a.call is not None or trace.n_calls(a) == 1 for a in self.addresses.values())

    def _out_hook(self, addresses: list[Address]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            call = self._count(module, "out")
            for a in addresses:
                if self._wanted(a, call):
                    old = select(output, a.key, str(a))
                    output = substitute(output, a.key, old, self.capture(str(a), old, module))
            self._stop()
            return output

        return hook

    def _in_hook(self, addresses: list[Address]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._count(module, "in")
            for a in addresses:
                if self._wanted(a, call):
                    held = {**{str(i): v for i, v in enumerate(args)}, **kwargs}
                    old = select(held, a.key, str(a))
                    new = self.capture(str(a), old, None)
                    args, kwargs = substitute(args, a.key, old, new), substitute(kwargs, a.key, old, new)
            self._stop()
            return args, kwargs

        return hook

    def _attention(self, module: nn.Module, part: str, t: Tensor) -> Tensor:
        call = self._count(module, part)
        for a in self.addresses.values():
            if a.part == part and self.network.get_module(a.module) is module and self._wanted(a, call):
                t = self.capture(str(a), t, None)
        self._stop()
        return t

    def _count(self, module: nn.Module, part: str) -> int:
        self._calls[module, part] = call = self._calls.get((module, part), 0) + 1
        return call

    @staticmethod
    def _wanted(address: Address, call: int) -> bool:
        # without a number the first call is taken; `check_reached` complains if others follow
        return call == (address.call or 1)

    def _stop(self) -> None:
        if self._may_stop and len(self._reached) == len(self.addresses):
            raise Stop

    def capture(self, site: str, t: Tensor, module: nn.Module | None) -> Tensor:
        """Edit, keep and differentiate the activation at a site; what the network goes on with."""
        by_row = rows_apart(t, self.question.n)
        return self._capture(site, t, module) if by_row is t else self._capture(site, by_row, module).reshape(t.shape)

    def _capture(self, site: str, t: Tensor, module: nn.Module | None) -> Tensor:
        self._reached.add(site)
        for e in self._edits.get(site, ()):
            t = e.apply(t, unit_axis(module, t.ndim))
            if e.kind == "set" and self.network.memory_format is torch.channels_last and t.ndim == 4:
                t = t.contiguous(memory_format=torch.channels_last)
        if site in self._gradients:
            if not (t.is_floating_point() or t.is_complex()):
                raise SiteError(
                    f"{site!r} holds whole numbers ({t.dtype}), which have no gradient; "
                    "differentiate at the embedding instead"
                )
            unmark(t)
            if not t.requires_grad:
                t = t.detach().requires_grad_()
            elif self.addresses[site].part == "in":
                # What a module takes may also go past it, as in a residual stream: the gradient is that of its input alone.
                t = t.view_as(t)
            self.leaves[site] = t
        if site in self.question.read:
            self.reads[site] = t
        if site == self._source:
            self.sources[site] = t
        if self.copies:
            return t.clone()
        if not t.is_inference():
            self._versions.append((t, t._version))
        return t

    def overwritten(self) -> bool:
        """Whether the network wrote in place over something that was captured."""
        return any(t._version != version for t, version in self._versions)

    def check_reached(self) -> None:
        """Raise SiteError for asked sites that the forward pass did not come by, or came by several times."""
        for site, a in self.addresses.items():
            n = self._calls.get((self.network.get_module(a.module), a.part), 0)
            if a.part != "input" and a.call is None and n > 1:
                raise SiteError(
                    f"{site!r} is called several times in one forward pass; say which call: "
                    f"{', '.join(str(replace(a, call=i)) for i in range(1, n + 1))}"
                )
        if missing := [s for s in self.addresses if s not in self._reached]:
            calls = {
                s: self._calls.get((self.network.get_module(a.module), a.part), 0)
                for s in missing
                if (a := self.addresses[s]).part != "input"
            }
            if any(calls.values()):
                raise SiteError(f"the forward pass has fewer calls than asked for: {calls} (site: calls)")
            raise SiteError(f"the forward pass did not reach {missing}")


@contextmanager
def stub(network: Network, trace: Trace, modules: tuple[nn.Module, ...], n: int) -> Iterator[None]:
    """Let modules return tensors without data, shaped as they returned them before, instead of running."""
    with ExitStack() as stack:
        for module in modules:
            shapes = iter(trace.outputs[module])

            def forward(*args: Any, shapes: Iterator[Any] = shapes, **kwargs: Any) -> Any:
                return tree_map(
                    lambda v: v.expand(n, *v.shape[1:]) if isinstance(v, Tensor) and v.ndim else v, next(shapes)
                )

            had = module.__dict__.get("forward")
            module.__dict__["forward"] = forward
            stack.callback(_unstub, module, had)
        yield


def _unstub(module: nn.Module, had: Any) -> None:
    if had is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = had


def without_data(structure: Any) -> Any:
    """A structure of tensors on the meta device: shapes only."""
    return tree_map(lambda v: torch.empty_like(v, device="meta") if isinstance(v, Tensor) else v, structure)
