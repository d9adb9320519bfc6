"""Network: anything that answers Passes."""

from __future__ import annotations

import fnmatch
import hashlib
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from nissl.arguments import items
from nissl.errors import BusyError, GradientError, InputError, NonFiniteError, SiteError, TargetError, blame
from nissl.network.edit import Set
from nissl.network.forward import Forward, stub
from nissl.network.norms import Folds, affine_norms, find_folds
from nissl.network.passes import Answer, Inputs, Pass, as_inputs, is_plain, raw_bytes, rows_of
from nissl.network.patterns import Found, watched_attention
from nissl.network.site import Address, Site, parse, role_of, select
from nissl.network.trace import Trace, trace

_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()
Same = TypeVar("Same", bound="Network")
_LIBRARIES = {"torch", "numpy", "scipy", "sklearn", "builtins"}


class Network:
    """A network that answers Passes.

    Parameters
    ----------
    model : nn.Module, fitted scikit-learn estimator, or callable
        A torch module is used as it is, never copied or altered: it runs in evaluation mode during a Pass and is put
        back afterwards. A scikit-learn classifier or regressor, or any function from an array (n_rows, ...) to an
        array (n_rows, n_outputs), is a black box: it answers Passes without `wrt` and has the one site ``input``.
    output : int, str or callable, optional
        Which part of a structured output is explained: an index, a key, or a function of the output. Needed where
        a model returns several tensors and none is called ``logits``.
    dims : tuple of str, optional
        Names of the input's dimensions after the rows, for Scores: ``("channel", "y", "x")``, ``("channel", "time")``,
        ``("token", "unit")``, ``("feature",)``. Guessed from shape and layers where not given.
    device, dtype : optional
        Where and in which precision floating inputs are handed over; by default what the module's parameters have.
    autocast : torch.dtype, optional
        Run under ``torch.autocast`` with this type.
    name : str, optional
        What reports call it.

    Raises
    ------
    InputError
        `model` is nothing that can answer, or an option is none; nothing was moved then.

    Examples
    --------
    >>> import torch, nissl
    >>> net = nissl.Network(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()))
    >>> answer = net.run(nissl.Pass(torch.ones(4, 3), read=["0"]))
    >>> answer.output.shape, answer.reads["0"].shape
    (torch.Size([4, 2]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        model: Any,
        *,
        output: int | str | Callable[[Any], Tensor] | None = None,
        dims: Sequence[str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(model, Network):
            raise InputError("this is a Network already")
        where = None if device is None else _usable(device)
        for key, value in (("dtype", dtype), ("autocast", autocast)):
            if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
                raise InputError(f"{key}={value!r}: give a floating point type of torch, such as torch.bfloat16")
        names = None if dims is None else items("dims", dims)
        if names is not None and (not all(isinstance(d, str) for d in names) or len(set(names)) < len(names)):
            raise InputError(f"dims={dims!r}: give a name for each dimension, none of them twice")
        self.differentiable = isinstance(model, nn.Module)
        if isinstance(model, nn.Module):
            self.module: nn.Module = model
        elif isinstance(model, type) or not (callable(model) or hasattr(model, "predict")):
            raise InputError(
                f"a Network is made from a torch module, a fitted scikit-learn estimator or a prediction function, "
                f"not from {model!r:.80}"
            )
        else:
            self.module = _Predictor(model)
        if any(nn.parameter.is_lazy(t) for t in (*self.module.parameters(), *self.module.buffers())):
            raise InputError(
                f"{type(model).__name__} has weights without a shape yet: run it once before it is wrapped"
            )
        parameter = next(self.module.parameters(), None)
        if where is not None:
            self.module.to(where)
        self.device = where or (parameter.device if parameter is not None else torch.device("cpu"))
        self.dtype = dtype or (
            parameter.dtype if parameter is not None and parameter.is_floating_point() else torch.get_default_dtype()
        )
        self.autocast = autocast
        self.name: str = name or getattr(model, "__name__", type(model).__name__)
        self.memory_format: torch.memory_format = torch.preserve_format
        self.fold_norms = True
        self.batch_bytes = 2**21 if self.device.type == "cpu" else 2**23
        self.input_dims = names
        self.overrides: dict[str, Tensor] = {}
        self._pick = output
        self._picked = _identity(output) if callable(output) else repr(output)
        self._names = {m: n for n, m in self.module.named_modules()}
        self._modules = dict(self.module.named_modules(remove_duplicate=False))
        self._example: Inputs | None = None
        self._trace: Trace | None = None
        self._traces: dict[Any, Trace] = {}
        self._cuts: dict[str, tuple[nn.Module, ...]] = {}
        self._folds: Folds | None = None  # unknown as yet
        self._copies = False  # whether activations are copied because the network writes over them in place
        with _locks_guard:
            self._lock = _locks.setdefault(self.module, threading.Lock())

    def __repr__(self) -> str:
        return f"Network({self.name}, {sum(p.numel() for p in self.module.parameters()):,} parameters, {self.device})"

    # ---------------------------------------------------------------- questions

    def run(self, question: Pass) -> Answer:
        """Answer one Pass in one batch.

        Raises
        ------
        SiteError
            A site does not exist, was not reached, or is called several times and the address does not say which.
        InputError
            The module, or a function of an edit, failed on these inputs; what it raised is the cause.
        GradientError
            `wrt` on a network without gradients, or the scalar does not depend on the site.
        TargetError
            The target does not fit the output.
        BusyError
            Another thread is using the network.
        """
        if not isinstance(question, Pass):
            raise InputError(f"run takes a Pass, got {type(question).__name__}; write net.run(nissl.Pass(inputs, ...))")
        # inference tensors have no gradients and count no writes; a caller's inference mode must not reach in here
        with self._alone(), torch.inference_mode(False):
            return self._run(question)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads, and edits that ask from inside a pass, away from the module."""
        if not self._lock.acquire(blocking=False):
            raise BusyError(
                f"{self.name} is answering another question, in another thread or from inside an edit; "
                "give each thread a network of its own, or a copy"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _run(self, question: Pass) -> Answer:
        self._check(question)
        answer = None
        if stubs := self._cut(question):
            try:
                answer = self._answer(question, stubs)
            except Exception:  # whatever went wrong, the full pass says what is right, or raises it again
                answer = None
            if answer is not None and any(t.is_meta for t in answer.tensors().values()):
                answer = None
        answer = answer or self._answer(question)
        if answer is None:  # the network wrote over something that was asked for: once more, with copies
            self._copies = True
            answer = self._answer(question)
            assert answer is not None
        if self._example is None:  # inputs on which it fails are no example
            self._example = self.place(rows_of(question.inputs, slice(0, 1)))
        return answer

    def _answer(self, question: Pass, stubs: tuple[nn.Module, ...] = ()) -> Answer | None:
        """The answer of the module; None where it wrote over a site that was asked for and had not been copied."""
        question = self._place(question)  # anew for each attempt: the module may write over its inputs
        if self._folds is None:
            self._folds = self._find_folds(question)
        forward = Forward(self, question, copies=self._copies)
        try:
            with self._quiet(gradients=bool(question.wrt)):
                with stub(self, self.trace_of(question), stubs, question.n) if stubs else nullcontext():
                    output = forward.run()
                return self._collect(question, forward, output)
        except (RuntimeError, InputError) as error:
            if not any(text in str(error) for text in ("in-place operation", "inplace operation")):
                raise
            if self._copies:
                raise GradientError(
                    f"the network changes an activation in place that a gradient needs: {error}"
                ) from error
            return None

    def _find_folds(self, question: Pass) -> Folds:
        row = {k: v.clone() if isinstance(v, Tensor) else v for k, v in rows_of(question.inputs, slice(0, 1)).items()}
        try:
            with self._quiet(gradients=False):
                return find_folds(self.modules(), partial(self.call, row))
        except Exception:  # a network that fails on one row as it is: the pass itself says so, if it fails too
            return {}

    def _collect(self, question: Pass, forward: Forward, output: Any) -> Answer | None:
        tensor = None
        if question.output:
            tensor = self._tensor(output)
            if tensor.ndim == 0 or tensor.shape[0] != question.n:
                raise TargetError(
                    f"{self.name} gave an output of shape {tuple(tensor.shape)} for {question.n} rows; "
                    "the first dimension must be rows"
                )
        forward.check_reached()
        scalar, gradients = None, {}
        if question.of is not None:
            source = tensor if question.of.site is None else forward.sources[question.of.site]
            assert source is not None
            scalar = question.of(source)
        if forward.overwritten():
            return None
        if question.wrt:
            assert scalar is not None
            if not scalar.requires_grad:
                raise GradientError(
                    f"the target does not depend on {list(question.wrt)} in a differentiable way: "
                    "the network detaches, rounds or takes an argmax on the way, or the site lies behind the target"
                )
            if forward.mode is not None:
                forward.mode.inspect(scalar)
            leaves = [forward.leaves[s] for s in question.wrt]
            with blame(GradientError, f"the backward pass of {self.name} failed"):
                found = torch.autograd.grad(scalar.sum(), leaves, allow_unused=True)
            for site, g in zip(question.wrt, found, strict=True):
                if g is None:
                    raise GradientError(f"the target does not depend on site {site!r}: it lies behind the target")
                gradients[site] = g.detach()
        return Answer(
            None if tensor is None else tensor.detach(),
            None if scalar is None else scalar.detach(),
            {s: forward.reads[s].detach() for s in question.read},
            gradients,
        )

    def _tensor(self, output: Any) -> Tensor:
        """The tensor that stands for the output."""
        if self._pick is not None:
            with blame(TargetError, f"output={self._pick!r} does not fit what {self.name} returned"):
                output = self._pick(output) if callable(self._pick) else output[self._pick]
        if isinstance(output, Mapping) and "logits" in output:
            output = output["logits"]
        if isinstance(output, (tuple, list)) and len(output) == 1:
            output = output[0]
        if isinstance(output, Tensor):
            return output
        parts = (
            list(output)
            if isinstance(output, Mapping)
            else (list(range(len(output))) if isinstance(output, (tuple, list)) else type(output).__name__)
        )
        raise TargetError(
            f"{self.name} returns several things ({parts}): say which one is explained, "
            "for instance Network(model, output=0)"
        )

    def _check(self, question: Pass) -> None:
        if question.wrt and not self.differentiable:
            raise GradientError(
                f"{self.name} is a prediction function and has no gradients; "
                "use methods that need none, such as Occlusion, RISE, LIME or KernelSHAP"
            )
        asked = [*question.read, *question.wrt, *(e.site for e in question.edits)]
        if question.of is not None and question.of.site is not None:
            asked.append(question.of.site)
        for address in asked:
            self.locate(address)
            if parse(address).part == "input":
                self.input_key(address, question.inputs)
        inner = [s for s in question.wrt if parse(s).part != "input"]
        if inner and question.rules is not None and question.rules.relevance_at_input:
            raise InputError(
                f"{question.rules.name} has a rule for the first layer and is taken at 'input', not at {inner}"
            )

    def locate(self, address: str) -> Address:
        """Parse an address and make sure that its module exists.

        Raises
        ------
        SiteError
            No such module; names the nearest ones.
        """
        where = parse(address)
        if where.part != "input" and where.module not in self._modules:
            near = _near(where.module, [n for n in self._modules if n])
            hint = f"; did you mean {near}?" if near else "; net.sites() lists them"
            raise SiteError(f"{self.name} has no module {where.module!r}{hint}")
        return where

    def input_key(self, address: str, inputs: Inputs) -> str:
        """Name of the input that an ``input`` address means."""
        key = parse(address).key
        tensors = [k for k, v in inputs.items() if isinstance(v, Tensor)]
        if key is None:
            return tensors[0]
        if key not in tensors:
            raise SiteError(f"{address!r}: the inputs are {tensors}")
        return key

    def modules(self) -> Iterable[nn.Module]:
        """Every module once."""
        return self._names

    def get_module(self, name: str) -> nn.Module | None:
        """The module of that dotted name, or None."""
        return self._modules.get(name)

    # ---------------------------------------------------------------- inputs and state

    def place(self, inputs: Any) -> Inputs:
        """Inputs on the network's device, in its precision and memory format; always new tensors."""
        return {k: self._place_tensor(v) if isinstance(v, Tensor) else v for k, v in as_inputs(inputs).items()}

    def _place_tensor(self, t: Tensor) -> Tensor:
        moved = t.detach().to(device=self.device, dtype=self.dtype if t.is_floating_point() else None)
        if self.memory_format is not torch.preserve_format and moved.ndim == 4 and moved.is_floating_point():
            moved = moved.contiguous(memory_format=self.memory_format)
        # A network may write to its input; what the user handed over must not change.
        return moved.clone() if moved.data_ptr() == t.data_ptr() else moved

    def _place(self, question: Pass) -> Pass:
        def here(t: Tensor) -> Tensor:
            moved = t.to(self.device)
            return moved.clone() if moved.is_inference() else moved

        edits = tuple(e if e.value is None else replace(e, value=here(e.value)) for e in question.edits)
        of = question.of
        if of is not None:
            of = replace(of, values=tuple(map(here, of.values)))
        return question.on(self.place(question.inputs), edits, of)

    @contextmanager
    def _quiet(self, gradients: bool) -> Iterator[None]:
        """Evaluation mode, frozen weights and kept buffers while a question is answered; all as before afterwards."""
        modes = [(m, m.training) for m in self._names]
        trainable = [p for p in self.module.parameters() if p.requires_grad] if gradients else []
        buffers = [(m, dict(m._buffers), {k: b.clone() for k, b in _tensors(m._buffers)}) for m in self._names]
        precision = (
            torch.autocast(self.device.type, dtype=self.autocast) if self.autocast is not None else nullcontext()
        )
        try:
            for m, mode in modes:
                if mode:
                    m.training = False
            for p in trainable:
                p.requires_grad_(False)
            with torch.enable_grad() if gradients else torch.no_grad(), precision:
                yield
        finally:
            for p in trainable:
                p.requires_grad_(True)
            for m, mode in modes:
                if m.training is not mode:
                    m.training = mode
            for m, held, values in buffers:
                if list(map(id, m._buffers.values())) != list(map(id, held.values())):
                    m._buffers.clear()
                    m._buffers.update(held)
                for k, b in _tensors(held):
                    if b.shape != values[k].shape:
                        b.data = values[k]
                    elif not torch.equal(b, values[k]):
                        b.copy_(values[k])

    def call(self, inputs: Inputs) -> Any:
        """Run the module on named inputs; positional ones have digits for names."""
        args = [inputs[k] for k in sorted((k for k in inputs if k.isdigit()), key=int)]
        kwargs = {k: v for k, v in inputs.items() if not k.isdigit()}
        given = {k: f"{tuple(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v) for k, v in inputs.items()}
        with (
            blame(InputError, f"{self.name} failed on inputs {given}"),
            affine_norms((self._folds or {}) if self.fold_norms else {}, self.memory_format),
        ):
            if self.overrides:
                return torch.func.functional_call(self.module, self.overrides, tuple(args), kwargs)
            return self.module(*args, **kwargs)

    # ---------------------------------------------------------------- sites

    def trace_of(self, question: Pass | None = None) -> Trace:
        """Which modules one row calls, in which order, with which shapes; made once for inputs of the same shapes."""
        example = self._example if question is None else rows_of(question.inputs, slice(0, 1))
        if example is None:
            raise SiteError("the network has seen no input yet; run a pass first or give inputs=")
        key = tuple(
            (k, v.dtype, tuple(v.shape[1:])) if isinstance(v, Tensor) else (k, repr(v) if is_plain(v) else id(v))
            for k, v in example.items()
        )
        if key not in self._traces:
            with self._quiet(gradients=False):
                record = trace(self, {k: v.clone() if isinstance(v, Tensor) else v for k, v in example.items()})
            while len(self._traces) >= 64:  # rows of many lengths: the oldest is traced again when it comes back
                del self._traces[next(iter(self._traces))]
            self._traces[key] = record
        self._trace = self._traces[key]
        return self._trace

    def sites(self, pattern: str = "*", inputs: Any = None) -> list[Site]:
        """Sites whose address matches a glob.

        Parameters
        ----------
        pattern : str, default "*"
            Such as ``"features.*"``, ``"*:pattern"``, ``"*:in"``; without ``#`` it matches every call.
        inputs : optional
            What the network takes: one row is run to learn shapes, once for each shape. Not needed once a Pass has
            been run.

        Returns
        -------
        list of Site
            In the order in which they are reached; shapes are None before any input was seen. A module that is called
            several times is listed once for each call.
        """
        if not isinstance(pattern, str):
            raise InputError(f"pattern must be a glob such as 'features.*', got {pattern!r}")
        question = None if inputs is None else Pass(rows_of(self.place(inputs), slice(0, 1)))
        if question is None and self._example is None:
            found = [Site("input", "input", None, None)]
            found += [Site(n, role_of(m), None, _n_units(m)) for n, m in self._modules.items() if n]
            found += [Site(f"{n}:in", role_of(m), None, None) for n, m in self._modules.items() if n]
        else:
            with self._alone():
                found = self.trace_of(question).sites(self)
            if question is not None:
                self._example = question.inputs
        matching = [
            s
            for s in found
            if any(fnmatch.fnmatchcase(address, pattern) for address in (s.address, s.address.partition("#")[0]))
        ]
        for part in (":in", ":scores"):  # listed where they are asked for
            if part not in pattern:
                matching = [s for s in matching if part not in s.address]
        return matching

    def rows_at_once(self, question: Any) -> int:
        """Rows that one batch of such a question may hold, where the user sets no number.

        About `batch_bytes` of input: 8 MB, enough to keep a processor busy; 2 MB on a CPU, where the memory of larger
        activations is given back to the system after each batch and asked for again.
        """
        row = sum(v[0].numel() * v.element_size() for v in question.inputs.values() if isinstance(v, Tensor))
        return int(np.clip(2 ** round(np.log2(self.batch_bytes / max(row, 1))), 4, 1024))

    def attention(self, modules: Iterable[nn.Module], found: Found) -> AbstractContextManager[None]:
        """While it holds, attention scores and patterns inside the modules go through a function; see `Found`."""
        return watched_attention(modules, found)

    def _cut(self, question: Pass) -> tuple[nn.Module, ...]:
        """Modules that need not run, because an edit sets everything that comes out of them.

        A cut is tried with stubs that return tensors without data: if anything but the set site depends on what was cut
        away, the trial fails and the network is never cut there.
        """
        whole = [e.site for e in question.edits if e.whole]
        if not whole or any(parse(s).part == "input" for s in (*question.read, *question.wrt)):
            return ()
        others = {*question.read, *question.wrt, *(e.site for e in question.edits)}
        if question.of is not None and question.of.site is not None:
            others.add(question.of.site)
        order = self.trace_of(question)
        places = {s: order.position(parse(s)) for s in others}
        if any(p is None for p in places.values()):
            return ()
        first = min(others, key=lambda s: places[s] or 0)
        if first not in whole or sum(e.site == first for e in question.edits) > 1:
            return ()
        if first not in self._cuts:
            stubs = order.before(parse(first), self)
            # Positions and masks that every block needs come from embeddings and modules without weights: a second trial
            # lets those run.
            blocks = tuple(
                m for m in stubs if not isinstance(m, nn.Embedding) and next(m.parameters(), None) is not None
            )
            self._cuts[first] = self._tried(first, stubs, question) or (
                self._tried(first, blocks, question) if len(blocks) < len(stubs) else ()
            )
        return self._cuts[first]

    def _tried(self, site: str, stubs: tuple[nn.Module, ...], question: Pass) -> tuple[nn.Module, ...]:
        """The stubs, if one row that is cut short at the site comes out as it does in full."""
        if not stubs:
            return ()
        row = Pass(rows_of(question.inputs, slice(0, 1)), [Set(site, self._first_value(question, site))])
        try:
            full = self._answer(row)
            # A module may keep what it computed as an attribute, for another one to take up: let it be outdated.
            self._answer(Pass({k: _other(v) for k, v in row.inputs.items()}))
            short = self._answer(row, stubs)
        except (
            Exception
        ):  # something behind the site needs what lies before it; the full pass is right, or raises again
            return ()
        if full is None or short is None or full.output is None or short.output is None or short.output.is_meta:
            return ()
        return stubs if torch.allclose(full.output, short.output, rtol=1e-5, atol=1e-6) else ()

    @staticmethod
    def _first_value(question: Pass, site: str) -> Tensor:
        value = next(e.value for e in question.edits if e.site == site)
        assert value is not None
        return value[:1] if value.ndim >= 2 else value

    def embedding_site(self, inputs: Any) -> str | None:
        """Site of the token embedding that integer inputs go through, or None."""
        question = Pass(self.place(inputs))
        with self._alone():
            embedding = self.trace_of(question).embedding
        if self._example is None:
            self._example = rows_of(question.inputs, slice(0, 1))
        return embedding

    def dims_of(self, site: str, shape: Sequence[int]) -> tuple[str, ...]:
        """Names of the dimensions of an activation of that shape (without rows) at a site."""
        k = len(shape)
        where = parse(site)
        if where.part == "input" and self.input_dims is not None:
            if len(self.input_dims) != k:
                raise InputError(f"dims={self.input_dims} does not fit an input whose rows have shape {tuple(shape)}")
            return self.input_dims
        if where.part in ("pattern", "scores"):
            return ("head", "query", "key")[-k:]
        if k == 3:
            return ("channel", "y", "x")
        if k == 2:
            module = None if where.part == "input" else self._modules.get(where.module)
            if module is None:
                return ("channel", "time")
            time_first = isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d))
            return ("channel", "time") if time_first else ("token", "unit")
        if k == 1:
            return ("feature",) if where.part == "input" else ("unit",)
        return tuple(f"dim_{i}" for i in range(k)) if k else ()

    # ---------------------------------------------------------------- other weights

    def changed(self: Same, weights: Mapping[str, Tensor]) -> Same:
        """The same network with other weights; this one stays as it is.

        Parameters
        ----------
        weights : mapping of parameter or buffer name to Tensor
            As in ``module.state_dict()``; the rest is shared.

        Raises
        ------
        InputError
            A weight that the network has not, or of another shape.
        """
        if not isinstance(weights, Mapping):
            raise InputError(f"weights must be a mapping of names to tensors, got {type(weights).__name__}")
        own = {
            **dict(self.module.named_parameters(remove_duplicate=False)),
            **dict(self.module.named_buffers(remove_duplicate=False)),
        }
        for name, value in weights.items():
            if name not in own:
                near = _near(name, list(own))
                raise InputError(f"{self.name} has no weight {name!r}" + (f"; did you mean {near}?" if near else ""))
            if not isinstance(value, Tensor):
                raise InputError(f"weight {name!r} must be a tensor, got {type(value).__name__}")
            if tuple(value.shape) != tuple(own[name].shape):
                raise InputError(f"weight {name!r} has shape {tuple(own[name].shape)}, {tuple(value.shape)} was given")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        moved = {k: v.detach().to(device=own[k].device, dtype=own[k].dtype) for k, v in weights.items()}
        other.overrides = {**self.overrides, **moved}
        return other

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, as this network uses them (not copies)."""
        own = {k: v.detach() for k, v in self.module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
        return {**own, **self.overrides}

    def fingerprint(self) -> str:
        """Hash of architecture and weights: equal for equal networks, also in another process."""
        digest = hashlib.sha256()
        if isinstance(self.module, _Predictor):
            digest.update(self.module.identity.encode())
        else:
            digest.update(repr(self.module).encode())
            for name, value in sorted(self.weights().items()):
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                if value.numel():
                    digest.update(raw_bytes(value))
        digest.update(f"{self.dtype}{self.autocast}{self._picked}".encode())
        return digest.hexdigest()

    def first_nonfinite(self, question: Pass) -> str | None:
        """The first site, in order of the forward pass, at which NaN or infinity appears under this Pass."""
        placed = self._place(question)
        found: list[str] = []

        def check(address: str, structure: Any) -> None:
            if found:
                return
            try:
                t = select(structure, None, address)
            except SiteError:
                return
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                found.append(address)

        first = self.input_key("input", placed.inputs)
        check("input", placed.inputs[first])
        with self._alone(), self._quiet(gradients=False), ExitStack() as stack:
            for module, name in self._names.items():
                if name:
                    handle = module.register_forward_hook(lambda m, a, out, name=name: check(name, out))
                    stack.callback(handle.remove)
            Forward(self, placed, copies=self._copies).run()
        return found[0] if found else None

    def require_finite(self, question: Pass, answer: Answer) -> None:
        """Raise NonFiniteError, naming the first site, where an answer holds NaN or infinity."""
        for name, t in answer.tensors().items():
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                site = self.first_nonfinite(question)
                if site:
                    where = f"it first appears at site {site!r}"
                elif name.startswith("gradient "):
                    where = "the forward pass is finite: it appears in the backward pass"
                else:
                    where = "all sites are finite: it first appears in what the network makes of them"
                raise NonFiniteError(f"{self.name} answered with NaN or infinity ({name}); {where}")


class _Predictor(nn.Module):
    """A prediction function as a module without weights or gradients."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)
        for name in ("predict_proba", "decision_function", "predict"):
            if hasattr(model, name):
                self.predict: Callable[[Any], Any] = getattr(model, name)
                break
        else:
            self.predict = model
        self.is_estimator = self.predict is not model
        self.identity = _identity(model)

    def forward(self, x: Tensor) -> Tensor:
        array = x.detach().cpu().numpy()
        if self.is_estimator and array.ndim > 2:
            array = array.reshape(len(array), -1)
        hint = " (is it fitted?)" if self.is_estimator else ""
        with blame(InputError, f"the prediction function failed on an array of shape {array.shape}{hint}"):
            out = self.predict(array)
        out = out if isinstance(out, Tensor) else np.asarray(out)
        if isinstance(out, np.ndarray) and out.dtype.kind not in "biuf":
            raise TargetError(
                f"the prediction function must return numbers, it returned {out.dtype}; use predict_proba"
            )
        t = torch.as_tensor(out, device=x.device)
        if t.ndim == 0 or t.shape[0] != x.shape[0]:
            raise TargetError(f"the prediction function gave shape {tuple(t.shape)} for {x.shape[0]} rows")
        return t.to(x.dtype) if x.is_floating_point() else t


def _usable(device: Any) -> torch.device:
    """The device, if there is one of that name on this machine."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # each backend has an error of its own for what it cannot do
        raise InputError(f"device={device!r} cannot be used here: {' '.join(str(error).split())[:200]}") from error
    if found.type == "meta":
        raise InputError("device='meta' holds no numbers to compute with")
    return found


def _identity(model: Any) -> str:
    """A name for a function or estimator that another process would give it too, where its state can be hashed."""
    import joblib

    try:
        return str(joblib.hash(_state(model, set())))
    except Exception:  # not hashable: unique to this object, so answers are not shared with others
        return uuid.uuid4().hex


def _state(value: Any, seen: set[int]) -> Any:
    """Code and everything it refers to, in place of a function; anything else as it is."""
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, tuple(_state(c, seen) for c in value.co_consts)
    if not isinstance(value, FunctionType):
        return value
    if id(value) in seen:
        return value.__qualname__
    seen.add(id(value))
    if value.__module__.partition(".")[0] in _LIBRARIES:
        return value.__module__, value.__qualname__
    kept = [c.cell_contents for c in value.__closure__ or ()]
    used = [value.__globals__[k] for k in _names_in(value.__code__) if k in value.__globals__]
    parts = [*kept, *used, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return value.__qualname__, _state(value.__code__, seen), [_state(p, seen) for p in parts]


def _names_in(code: CodeType) -> list[str]:
    """Names that code, and code within it, refers to."""
    inner = [n for c in code.co_consts if isinstance(c, CodeType) for n in _names_in(c)]
    return sorted({*code.co_names, *inner})


def _n_units(module: nn.Module) -> int | None:
    for name in ("out_channels", "out_features", "num_features", "embedding_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def _tensors(held: Mapping[str, Tensor | None]) -> list[tuple[str, Tensor]]:
    return [(k, b.detach()) for k, b in held.items() if b is not None]


def _other(value: Any) -> Any:
    """Another input of the same form."""
    if not isinstance(value, Tensor):
        return value
    return 1 - value / 2 if value.is_floating_point() else value.flip(-1)


def _near(name: str, names: list[str], k: int = 3) -> list[str]:
    import difflib

    return difflib.get_close_matches(name, names, k, 0.5)
