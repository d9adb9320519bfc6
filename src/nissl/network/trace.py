"""What one forward pass calls: modules, order, shapes, attention patterns."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nissl.errors import SiteError
from nissl.network.forward import without_data
from nissl.network.passes import Inputs
from nissl.network.site import Address, Site, items_of, role_of, rows_apart, select, unit_axis

if TYPE_CHECKING:
    from nissl.network.network import Network


class Trace:
    """Record of one forward pass of one row.

    Attributes
    ----------
    events : list of (part, module name, call)
        ``in`` when a call begins, ``out`` when it ends, ``scores`` and ``pattern`` when an attention appears.
    outputs : dict of module to what each of its calls returned, without data
    names : dict of name to the name under which the module's events are noted
        Another one only for further names of a shared module.
    embedding : str or None
        Site of the embedding that the first integer input goes through.
    """

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.events: list[tuple[str, str, int]] = []
        self.shapes: dict[tuple[str, str, int], Any] = {}
        self.outputs: dict[nn.Module, list[Any]] = {}
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.embedding: str | None = None

    def position(self, address: Address) -> int | None:
        """Where in the order of events a site lies; None where it was not reached or is the input."""
        if address.part == "input":
            return -1
        try:
            return self.events.index((address.part, self.names[address.module], address.call or 1))
        except ValueError:
            return None

    def n_calls(self, address: Address) -> int:
        """How often a place inside the network was come by."""
        name = self.names[address.module]
        return sum(part == address.part and event == name for part, event, _ in self.events)

    def before(self, address: Address, network: Network) -> tuple[nn.Module, ...]:
        """Outermost modules that, with all they contain, are not called again once the site is reached.

        Only those that return nothing but tensors: a number in an output may depend on the input.
        """
        at = self.position(address)
        if at is None or at < 0:
            return ()
        last = {network.get_module(name): i for i, (part, name, _) in enumerate(self.events) if part == "out" and name}
        chosen: dict[nn.Module, None] = {}
        inside: set[nn.Module] = set()
        # a module ends after those that it calls, so the outermost come first when this is read backwards
        for module in sorted((m for m in last if m is not None), key=last.__getitem__, reverse=True):
            ended = all(last.get(m, -1) <= at for m in module.modules())
            leaves = tree_leaves(self.outputs[module])
            if ended and module not in inside and all(v is None or isinstance(v, Tensor) for v in leaves):
                chosen[module] = None
                inside.update(module.modules())
        return tuple(chosen)

    def last_linear(self, network: Network) -> str | None:
        """Input of the linear layer that is reached last, where what was seen has become a code; None without one."""
        entered = [(name, call) for part, name, call in self.events if part == "in" and name]
        for name, call in reversed(entered):
            if isinstance(network.get_module(name), nn.Linear):
                several = ("in", name, 2) in self.shapes
                return str(Address(name, "in", None, call if several else None))
        return None

    def sites(self, network: Network) -> list[Site]:
        """Every site that was reached, in order."""
        keys = list(self.inputs)
        found = [Site("input" if i == 0 else f"input:{k}", "input", self.inputs[k], None) for i, k in enumerate(keys)]
        for part, name, call in self.events:
            if not name:
                continue
            structure = self.shapes[part, name, call]
            several = (part, name, 2) in self.shapes
            address = Address(name, part, None, call if several else None)
            module = network.get_module(name)
            try:
                t = rows_apart(select(structure, None, str(address)), 1)
            except SiteError:
                continue
            axis = unit_axis(module if part == "out" else None, t.ndim)
            role = part if part in ("scores", "pattern") else role_of(module) if module is not None else "block"
            found.append(Site(str(address), role, tuple(t.shape[1:]), t.shape[axis] if t.ndim > 1 else None))
            if part == "out":
                for key, v in items_of(structure).items():
                    if isinstance(v, Tensor) and v is not t:
                        extra = Address(name, "out", key, call if several else None)
                        found.append(Site(str(extra), role, tuple(v.shape[1:]), v.shape[-1] if v.ndim > 1 else None))
        return found


def trace(network: Network, inputs: Inputs) -> Trace:
    """Run one row and record what is called."""
    record = Trace({name: network._names[module] for name, module in network._modules.items()})
    record.inputs = {k: tuple(v.shape[1:]) for k, v in inputs.items() if isinstance(v, Tensor)}
    whole = next((v for v in inputs.values() if isinstance(v, Tensor) and not v.is_floating_point()), None)
    counts: dict[tuple[str, nn.Module], int] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        counts["in", module] = call = counts.get(("in", module), 0) + 1
        record.events.append(("in", name, call))
        held = {**{str(i): v for i, v in enumerate(args)}, **kwargs}
        record.shapes["in", name, call] = without_data(held)
        if record.embedding is None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and whole is not None:
            ids = next((v for v in held.values() if isinstance(v, Tensor)), None)
            if ids is not None and ids.shape == whole.shape and torch.equal(ids, whole):
                record.embedding = name

    def leave(module: nn.Module, args: Any, output: Any, name: str) -> None:
        counts["out", module] = call = counts.get(("out", module), 0) + 1
        record.events.append(("out", name, call))
        record.shapes["out", name, call] = kept = without_data(output)
        record.outputs.setdefault(module, []).append(kept)

    def attention(module: nn.Module, part: str, t: Tensor) -> Tensor:
        name = network._names[module]
        counts[part, module] = call = counts.get((part, module), 0) + 1
        record.events.append((part, name, call))
        record.shapes[part, name, call] = without_data(t)
        return t

    with ExitStack() as stack:
        for module, name in network._names.items():
            handles = (
                module.register_forward_pre_hook(lambda m, a, k, name=name: enter(m, a, k, name), with_kwargs=True),
                module.register_forward_hook(lambda m, a, out, name=name: leave(m, a, out, name)),
            )
            for handle in handles:
                stack.callback(handle.remove)
        stack.enter_context(network.attention(network._names, attention))
        network.call(inputs)
    return record
