"""The part of a network between two of its sites, as a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nissl.errors import BusyError, InputError, NisslError, SiteError
from nissl.network.forward import stub
from nissl.network.network import Network
from nissl.network.passes import Inputs, rows_of
from nissl.network.site import Address, select, substitute
from nissl.network.trace import trace


class _Reached(BaseException):
    """Ends a forward pass at the end of a part; never seen by users."""


class Part(nn.Module):
    """What a network computes from the activation at one site to that at another.

    Parameters
    ----------
    network : Network
        Its module is shared, not copied. Nothing is frozen and no mode is set: put the part into a Network for that.
    start : str, default "input"
        Site whose activation the part takes.
    end : str, optional
        Site whose activation it gives; by default the network's output.
    inputs : Tensor, array, tuple or mapping, optional
        What the network takes; one row is run to learn what is called, and to check the cut. By default the row that
        the network has seen first.

    Raises
    ------
    InputError
        The network cannot be cut at `start`: something behind the site also needs what lies before it, as inside a
        residual block. Or no input is known.
    SiteError
        There is no such site, or it is not reached.

    Notes
    -----
    Modules before `start` do not run: they hand on tensors without data, so that anything else that depended on them
    would fail. That the part gives what the whole network gives is checked on one row when it is made.
    """

    def __init__(self, network: Network, start: str = "input", end: str | None = None, inputs: Any = None) -> None:
        super().__init__()
        self.module = network.module
        self._start = network.locate(start)
        self._end = None if end is None else network.locate(end)
        for address in (self._start, self._end):
            if address is not None and address.part in ("pattern", "scores"):
                raise InputError(f"{address} is an attention pattern; a network is cut at activations")
        # not a child: a Network is no module, and what it holds of the module must not be registered twice
        object.__setattr__(self, "network", network)
        if inputs is None and network._example is None:
            raise InputError(f"{network.name} has seen no input yet: give inputs=, one example is enough")
        self._example: Inputs = rows_of(network.place(network._example if inputs is None else inputs), slice(0, 1))
        self._stubs: tuple[nn.Module, ...] = ()
        if self._start.part != "input" or self._end is not None:
            with network._quiet(gradients=False):
                self._learn()

    network: Network

    def extra_repr(self) -> str:
        """What part it is."""
        return f"{self._start} -> {'output' if self._end is None else self._end}"

    def forward(self, x: Tensor) -> Tensor:
        """Activation at `end` (or the output) from the activation at `start`, rows first."""
        if not self.network._lock.acquire(blocking=False):
            raise BusyError(f"{self.network.name} is answering another question; give each thread a copy of its own")
        try:
            # a network may write over what it is given
            return self._run(x.clone())
        finally:
            self.network._lock.release()

    def _run(self, x: Tensor) -> Tensor:
        n, at_input = x.shape[0], self._start.part == "input"
        inputs = {
            k: (v.expand(n, *v.shape[1:]) if at_input else v.new_empty((n, *v.shape[1:]), device="meta"))
            if isinstance(v, Tensor)
            else v
            for k, v in self._example.items()
        }
        if at_input:
            inputs[self.network.input_key(str(self._start), inputs)] = x
        if self._end is not None and self._end == self._start:
            return x
        reached: list[Tensor] = []

        def finish(t: Tensor) -> Tensor:
            reached.append(t)
            raise _Reached

        with ExitStack() as stack:
            if not at_input:
                stack.enter_context(stub(self.network, self._trace, self._stubs, n))
                self._hook(stack, self._start, lambda t: x)
            if self._end is not None:
                self._hook(stack, self._end, finish)
            try:
                output = self.network.call(inputs)
            except _Reached:
                return reached[0]
        if self._end is not None:
            raise SiteError(f"the forward pass did not reach {str(self._end)!r}")
        return self.network._tensor(output)

    def _hook(self, stack: ExitStack, address: Address, change: Callable[[Tensor], Tensor]) -> None:
        """Change the activation at an address while the stack is open, before any other hook sees it."""
        module = self.network.get_module(address.module)
        assert module is not None
        calls = 0

        def wanted() -> bool:
            nonlocal calls
            calls += 1
            return address.call is None or address.call == calls

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not wanted():
                return None
            held = {**{str(i): v for i, v in enumerate(args)}, **kwargs}
            old = select(held, address.key, str(address))
            new = change(old)
            return substitute(args, address.key, old, new), substitute(kwargs, address.key, old, new)

        def behind(module: nn.Module, args: Any, output: Any) -> Any:
            if not wanted():
                return None
            old = select(output, address.key, str(address))
            return substitute(output, address.key, old, change(old))

        if address.part == "in":
            handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        else:
            handle = module.register_forward_hook(behind, prepend=True)
        stack.callback(handle.remove)

    def _learn(self) -> None:
        """See on one row what is called before the start, and that the part gives what the whole network gives."""
        places = [a for a in (self._start, self._end) if a is not None]
        seen: dict[Address | None, Tensor] = {}

        def keep(address: Address | None, t: Tensor) -> Tensor:
            seen[address] = t.clone()
            return t

        def whole(module: nn.Module, args: Any, output: Any) -> None:
            if self._end is None:
                keep(None, self.network._tensor(output))

        row = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self._example.items()}
        with ExitStack() as stack:
            for address in places:
                if address.part == "input":
                    keep(address, row[self.network.input_key(str(address), row)])
                else:
                    self._hook(stack, address, partial(keep, address))
            stack.callback(self.module.register_forward_hook(whole).remove)
            self._trace = trace(self.network, row)
        for address in places:
            calls = 1 if address.part == "input" else self._trace.n_calls(address)
            if address not in seen:
                raise SiteError(f"{self.network.name} did not reach {str(address)!r}, it has {calls} calls")
            if address.call is None and calls > 1:
                raise SiteError(f"{str(address)!r} is called {calls} times; say which call, as in '{address}#1'")
        if self._end is not None and (self._trace.position(self._end) or 0) < (self._trace.position(self._start) or 0):
            raise InputError(f"{str(self._end)!r} lies before {str(self._start)!r}")
        if self._start.part == "input":
            return
        self._stubs = self._trace.before(self._start, self.network)
        expected, found, error = seen[self._end], None, None
        try:
            found = self._run(seen[self._start].clone())
        except (RuntimeError, NotImplementedError, ValueError, TypeError, NisslError) as problem:
            error = problem
        alike = found is not None and not found.is_meta and found.shape == expected.shape
        if found is None or not alike or not torch.allclose(found, expected, rtol=1e-4, atol=1e-6):
            raise InputError(
                f"{self.network.name} cannot be cut at {str(self._start)!r}: something behind it also needs what lies "
                "before it, as inside a residual block; choose the end of a block"
            ) from error


def above(network: Network, site: str, inputs: Any = None) -> Part:
    """What a network computes from the activation at a site to its output, as a module; see `Part`.

    Parameters
    ----------
    network : Network
    site : str
        ``"input"`` or an inner site at which the network can be cut.
    inputs : optional
        What the network takes, if it has seen no input yet; one row is enough.

    Returns
    -------
    Part
        ``forward(x)``: output (n_rows, ...) from the activation x (n_rows, ...). Differentiable with respect to x.

    Raises
    ------
    InputError
        The network cannot be cut there.
    """
    return Part(network, site, None, inputs)
