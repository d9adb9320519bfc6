"""The Runner drives many method generators at once and turns their Passes into full batches."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import xarray as xr
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from nissl.arguments import at_least, flag
from nissl.errors import InputError, NisslError, NonFiniteError, out_of_memory
from nissl.network import Answer, Network, Pass, Rollout, Target
from nissl.network.passes import Inputs, concatenate, merge, n_rows, rows_of
from nissl.network.target import as_target, class_logit, top_class
from nissl.runner.cache import AnswerCache
from nissl.runner.question import Question
from nissl.runner.scores import Explained, build_scores


@dataclass
class Cost:
    """What a method asked for, in rows.

    Attributes
    ----------
    forward, backward : int
        Rows of Passes asked, and of those with a gradient: the cost by which methods are compared.
    reused : int
        Rows among them that were answered from memory or from another method's identical Pass.
    seconds : float
        Time spent on it, batches shared by rows.
    """

    forward: int = 0
    backward: int = 0
    reused: int = 0
    seconds: float = 0.0

    def __iadd__(self, other: Cost) -> Cost:
        for name, value in other.__dict__.items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass(eq=False)
class Job:
    """One generator to be driven: a method on an example, a check on its scores.

    Attributes
    ----------
    name : str
        Under which its cost is counted.
    key : hashable
        Which job this is, for the caller.
    network : Network
        That answers its Passes; a Pass may be sent to another one by yielding ``(network, Pass)``.
    start : callable
        Makes the generator.
    passes : set of str
        Keys of the answers it was given; filled while it runs, for who wants to drop them from disk afterwards.
    spent : dict of str to Cost
        What it cost, by the names it had; filled while it runs.
    """

    name: str
    key: Any
    network: Network
    start: Callable[[], Generator[Any, Any, Any]]
    passes: set[str] = field(default_factory=set)
    spent: dict[str, Cost] = field(default_factory=dict)


@runtime_checkable
class Explains(Protocol):
    """What `Runner.attribute` drives; every method of nissl.attribution is one."""

    differentiates: ClassVar[bool]

    def explain(self, q: Question) -> Generator[Any, Any, Any]:
        """Yield Passes about one example, receive Answers, return scores."""
        ...


@dataclass(eq=False)
class _Ticket:
    """A Pass under way, split into parts, and who waits for it."""

    network: Network
    question: Pass | Rollout
    key: str | None
    parts: dict[int, Answer] = field(default_factory=dict)
    left: int = 0
    waiting: list[tuple[_Running, int, Target | None]] = field(default_factory=list)
    error: NonFiniteError | None = None


@dataclass(eq=False)
class _Running:
    job: Job
    generator: Generator[Any, Any, Any]
    answers: list[Answer | None] = field(default_factory=list)
    missing: int = 0
    single: bool = True
    error: NonFiniteError | None = None


class Runner:
    """Drives generators that yield Passes.

    Parameters
    ----------
    batch_size : int, optional
        Rows in a batch; where not given, as the network says (`Network.rows_at_once`): 2 MB of input on a CPU, else 8 MB.
    memory : int, default 1 GiB
        Bytes of answers kept for Passes that are asked again.
    folder : path, optional
        Also keep answers there, so that an interrupted run asks no finished Pass again.
    progress : bool, default True
        Show a progress bar with the time left once a run takes over two seconds.
    tune : bool, default True
        Measure the fastest memory format of a network for images once it has been asked for over 64 rows.

    Notes
    -----
    Rows are merged only between Passes that agree in everything but their rows, never padded. The same Pass asked
    twice, by the same or another method, is answered once. When memory runs out the batch is halved and the work goes
    on.
    """

    def __init__(
        self,
        batch_size: int | None = None,
        *,
        memory: int = 2**30,
        folder: str | Path | None = None,
        progress: bool = True,
        tune: bool = True,
    ) -> None:
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise InputError(f"batch_size must be a whole number of rows, at least 1, or None; got {batch_size!r}")
        at_least("memory", memory, 0)
        flag("progress", progress)
        flag("tune", tune)
        self.batch_size = batch_size
        self.cache = AnswerCache(memory, folder)
        self.progress = progress
        self.tune = tune
        self.costs: dict[str, Cost] = {}
        self.slots = [0, 0]
        """Rows run, and rows that the batches run could have held."""

    # ---------------------------------------------------------------- driving

    def drive(self, jobs: Iterable[Job], total: int | None = None, what: str = "passes") -> Iterator[tuple[Job, Any]]:
        """Run jobs; yields (job, what its generator returned) as each is finished.

        Parameters
        ----------
        jobs : iterable of Job
            Started as batches need them, in this order.
        total : int, optional
            Number of jobs, for the progress bar.
        what : str
            Shown beside the bar.
        """
        drive = _Drive(self, iter(jobs))
        with progress_bar(self.progress, total, what) as done:
            try:
                for job, result in drive.run():
                    done()
                    yield job, result
            finally:
                drive.close()

    def collect(
        self,
        network: Network,
        starts: Sequence[Callable[[], Generator[Any, Any, Any]]],
        what: str,
        name: str | None = None,
    ) -> list[Any]:
        """What generators return, in their order: one job each, all about one network.

        Parameters
        ----------
        network : Network
        starts : sequence of callable
            Each makes a generator.
        what : str
            Shown beside the progress bar.
        name : str, optional
            Under which the cost is counted; `what` by default.
        """
        jobs = (Job(name or what, i, network, start) for i, start in enumerate(starts))
        found = {job.key: result for job, result in self.drive(jobs, len(starts), what)}
        return [found[i] for i in range(len(starts))]

    def attribute(
        self,
        methods: Mapping[str, Explains] | Explains,
        network: Network,
        inputs: Any,
        target: Any = None,
        *,
        site: str | None = None,
        seed: int = 0,
    ) -> dict[str, xr.DataArray]:
        """Scores of several methods for the same examples, sharing batches and Passes.

        Parameters
        ----------
        methods : mapping of name to method
        network : Network
        inputs : Tensor, array, tuple or mapping
            Examples first.
        target : Target, class indices, callable or None
            What is explained; None is each example's top class.
        site : str, optional
            Where scores are wanted; by default at the input (for token ids, where a gradient is needed, at their
            embedding).
        seed : int

        Returns
        -------
        dict of name to xarray.DataArray
            First dimension ``example``.

        Raises
        ------
        InputError
            NaN or infinity in the inputs, no method, wrong target.
        NisslError
            A method that yields anything but Passes or returns anything but scores.
        """
        table = dict(methods) if isinstance(methods, Mapping) else {getattr(methods, "name", "method"): methods}
        if not table:
            raise InputError("no method was given")
        for name, method in table.items():
            if isinstance(method, type) or not hasattr(method, "explain"):
                raise InputError(f"{name!r}: {method!r:.60} is not a method; use for instance IntegratedGradients()")
        questions = make_questions(network, inputs, target, seed)
        jobs = (
            Job(name, (name, i), network, lambda m=m, q=q: m.explain(q.at(network, m.differentiates, site)))
            for i, q in enumerate(questions)
            for name, m in table.items()
        )
        before = {name: self.costs.get(name, Cost()).__dict__.copy() for name in table}
        found: dict[str, dict[int, Any]] = {name: {} for name in table}
        for job, result in self.drive(jobs, len(questions) * len(table), "explaining"):
            name, i = job.key
            if not isinstance(result, Explained):
                raise NisslError(f"{name} returned {type(result).__name__}; methods return explained(q, values)")
            found[name][i] = result
        scores = {}
        for name, method in table.items():
            now = self.costs.get(name, Cost())
            spent = {k: v - before[name][k] for k, v in now.__dict__.items()}
            ordered = [found[name][i] for i in range(len(questions))]
            where = questions[0].at(network, method.differentiates, site)
            scores[name] = build_scores(ordered, name, method, where, seed, spent)
        return scores

    def cost(self, name: str) -> Cost:
        """The cost counted under a name."""
        return self.costs.setdefault(name, Cost())


def make_questions(network: Network, inputs: Any, target: Any = None, seed: int = 0) -> list[Question]:
    """One Question for each example, after checking inputs and target.

    Where no target is given, the class that the network predicts for each example is settled here: methods run variants of
    the example, and the question must not move to another class with them.
    """
    if not isinstance(network, Network):
        raise InputError(f"a Network is needed, got {type(network).__name__}; write nissl.Network(model)")
    at_least("seed", seed, 0)
    placed = network.place(inputs)
    for name, value in placed.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = (~torch.isfinite(value).reshape(len(value), -1).all(1)).nonzero()[:, 0].tolist()
            raise InputError(f"input {name!r} holds NaN or infinity in examples {bad[:10]}")
    n = n_rows(placed)
    of = (_predicted(network, placed) if target is None else as_target(target)).rows(n)
    return [
        Question(network, rows_of(placed, slice(i, i + 1)), of[slice(i, i + 1)], seed=seed, example=i) for i in range(n)
    ]


def _predicted(network: Network, inputs: Inputs, rows: int = 16) -> Target:
    """Each example's predicted class; where outputs are no table of classes, the largest output."""
    classes = []
    for start in range(0, n_rows(inputs), rows):
        output = network.run(Pass(rows_of(inputs, slice(start, start + rows)))).output
        if output is None or output.ndim > 2:
            return top_class()
        classes.append(output.argmax(1) if output.ndim == 2 else torch.zeros(len(output), dtype=torch.long))
    return class_logit(torch.cat(classes).cpu())


class _Drive:
    """The state of one `Runner.drive`."""

    def __init__(self, runner: Runner, jobs: Iterator[Job]) -> None:
        self.runner = runner
        self.jobs: Iterator[Job] | None = jobs
        self.running: set[_Running] = set()
        self.ready: deque[tuple[Job, Any]] = deque()
        self.queues: dict[Any, deque[tuple[_Ticket, slice]]] = {}
        self.rows: dict[Any, int] = {}
        self.under_way: dict[str, _Ticket] = {}
        self.fingerprints: dict[int, tuple[Network, str]] = {}
        self.limits: dict[Any, int] = {}
        self.asked: dict[int, int] = {}

    def run(self) -> Iterator[tuple[Job, Any]]:
        while True:
            while self.ready:
                yield self.ready.popleft()
            if self._fill():
                continue
            if not self.rows:
                return
            self._batch(max(self.rows, key=lambda k: self.rows[k]))

    def close(self) -> None:
        for r in self.running:
            r.generator.close()
        self.running.clear()

    def _fill(self) -> bool:
        """Start jobs until some queue can fill a batch; whether a job was started."""
        if self.jobs is None:
            return False
        if self.rows:
            fullest = max(self.rows, key=lambda k: self.rows[k])
            if self.rows[fullest] >= self._limit(fullest) or len(self.running) >= 256:
                return False
        job = next(self.jobs, None)
        if job is None:
            self.jobs = None
            return False
        generator = job.start()
        if not isinstance(generator, Generator):
            raise NisslError(f"{job.name} must start a generator of Passes, it gave {type(generator).__name__}")
        running = _Running(job, generator)
        self.running.add(running)
        self._advance(running, None)
        return True

    def _limit(self, key: Any) -> int:
        network, question = self.queues[key][0][0].network, self.queues[key][0][0].question
        if key not in self.limits:
            wanted = self.runner.batch_size
            self.limits[key] = network.rows_at_once(question) if wanted is None else wanted
        # memory that ran out says something of every question to this network
        return min(self.limits[key], self.limits.get(id(network), 2**31))

    def _advance(self, r: _Running, answer: Any) -> None:
        """Hand a generator its answers until it has to wait."""
        while True:
            started = time.perf_counter()
            error, r.error = r.error, None
            try:
                asked = r.generator.send(answer) if error is None else r.generator.throw(error)
            except StopIteration as stop:
                self._spend(r.job, seconds=time.perf_counter() - started)
                self.running.discard(r)
                self.ready.append((r.job, stop.value))
                return
            self._spend(r.job, seconds=time.perf_counter() - started)
            r.single = not isinstance(asked, list)
            questions = asked if isinstance(asked, list) else [asked]
            r.answers = [None] * len(questions)
            r.missing = len(questions)
            for slot, question in enumerate(questions):
                self._ask(r, slot, question)
            if r.missing:
                return
            answer = r.answers[0] if r.single else r.answers

    def _ask(self, r: _Running, slot: int, asked: Any) -> None:
        network, question = asked if isinstance(asked, tuple) else (r.job.network, asked)
        if not isinstance(question, (Pass, Rollout)):
            raise NisslError(f"{r.job.name} yielded {type(question).__name__}; methods yield Passes or Rollouts")
        self._spend(r.job, forward=question.cost, backward=question.n if question.wrt else 0)
        # A scalar of the output can be taken from an answer that only gives the output: passes that differ in nothing
        # but their target are one pass.
        late = question.of if question.of is not None and not question.wrt and question.of.site is None else None
        if late is not None:
            question = question.without_target()  # pyright: ignore[reportAttributeAccessIssue]  # a Rollout has none
        content = question.content_key()
        key = None if content is None else f"{self._fingerprint(network)}-{content}"
        if key is not None:
            r.job.passes.add(key)
            known = self.runner.cache.get(key)
            if known is not None:
                self._spend(r.job, reused=question.n)
                _hand(_to(known, network.device), r, slot, late)
                return
            if key in self.under_way:
                self._spend(r.job, reused=question.n)
                self.under_way[key].waiting.append((r, slot, late))
                return
        ticket = _Ticket(network, question, key, waiting=[(r, slot, late)])
        ticket.left = question.n
        if key is not None:
            self.under_way[key] = ticket
        group = (id(network), question.merge_key)
        self.queues.setdefault(group, deque()).append((ticket, slice(0, question.n)))
        self.rows[group] = self.rows.get(group, 0) + question.n

    def _spend(self, job: Job, **amounts: float) -> None:
        for costs in (self.runner.costs, job.spent):
            cost = costs.setdefault(job.name, Cost())
            cost += Cost(**amounts)  # pyright: ignore[reportArgumentType]

    def _fingerprint(self, network: Network) -> str:
        # the network is held, so that its id stays its own while this drive lasts
        if id(network) not in self.fingerprints:
            self.fingerprints[id(network)] = (network, network.fingerprint())
        return self.fingerprints[id(network)][1]

    def _batch(self, group: Any) -> None:
        """Answer one batch of a queue."""
        queue = self.queues[group]
        network = queue[0][0].network
        limit = self._limit(group)
        if self.runner.tune and self.asked.get(id(network), 0) > 64:
            self.asked[id(network)] = -(2**62)
            some = merge([ticket.question[slice(0, 8)] for ticket, _ in islice(queue, 8)])
            tune_format(network, some, min(limit, 8))
        parts: list[tuple[_Ticket, slice]] = []
        size = 0
        while queue and size < limit:
            ticket, rows = queue.popleft()
            step = ticket.question.rules.group if ticket.question.rules is not None else 1
            room = max((limit - size) // step * step, 0 if size else step)
            if room == 0:
                queue.appendleft((ticket, rows))
                break
            n = rows.stop - rows.start
            if n > room:
                queue.appendleft((ticket, slice(rows.start + room, rows.stop)))
                rows = slice(rows.start, rows.start + room)
            parts.append((ticket, rows))
            size += rows.stop - rows.start
        self.rows[group] -= size
        if not queue:
            del self.queues[group], self.rows[group]
        self.runner.slots[0] += size
        self.runner.slots[1] += limit
        self.asked[id(network)] = self.asked.get(id(network), 0) + size
        started = time.perf_counter()
        whole = [t.question if s == slice(0, t.question.n) else t.question[s] for t, s in parts]
        answer = self._run(network, whole)
        finite = is_finite(answer)
        each = (time.perf_counter() - started) / size
        at = 0
        for ticket, rows in parts:
            n = rows.stop - rows.start
            ticket.parts[rows.start] = answer[slice(at, at + n)] if len(parts) > 1 else answer
            if not finite:
                ticket.error = ticket.error or self._nonfinite(ticket, rows, ticket.parts[rows.start])
            ticket.left -= n
            at += n
            self._spend(ticket.waiting[0][0].job, seconds=each * n)
            if not ticket.left:
                self._finish(ticket)

    def _run(self, network: Network, parts: list[Any]) -> Answer:
        """Answer a batch; in halves where memory does not hold it."""
        question = merge(parts)
        step = question.rules.group if question.rules is not None else 1
        try:
            return network.run(question)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or question.n <= step:
                raise
        # Only here, behind the handler: the error holds the frames that fill the memory.
        half = max(question.n // 2 // step * step, step)
        self.limits[id(network)] = min(half, self.limits.get(id(network), half))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = [question[slice(0, half)], question[slice(half, question.n)]]
        return concatenate([self._run(network, [part]) for part in halves])

    @staticmethod
    def _nonfinite(ticket: _Ticket, rows: slice, answer: Answer) -> NonFiniteError | None:
        try:
            question = ticket.question[rows]
            ticket.network.require_finite(question.prompt if isinstance(question, Rollout) else question, answer)
        except NonFiniteError as error:
            r = ticket.waiting[0][0]
            return NonFiniteError(f"{error} ({r.job.name}, {r.job.key})")
        return None

    def _finish(self, ticket: _Ticket) -> None:
        answer = concatenate([ticket.parts[k] for k in sorted(ticket.parts)])
        if ticket.key is not None:
            del self.under_way[ticket.key]
            if ticket.error is None:
                # slices share the memory of their batch: kept answers get their own
                answer = answer.clone()
                self.runner.cache.put(ticket.key, answer)
        for r, slot, late in ticket.waiting:
            if ticket.error is None:
                _hand(answer, r, slot, late)
            else:
                r.error = ticket.error
                r.missing -= 1
        for r, _, _ in ticket.waiting:
            if not r.missing and r in self.running:
                r.missing = -1  # a job that waits in two slots goes on once
                self._advance(r, r.answers[0] if r.single else r.answers)


def is_finite(answer: Answer) -> bool:
    """Whether an answer holds no NaN or infinity, by one sum for each tensor."""
    return all(
        bool(torch.isfinite(t.sum(dtype=torch.float64))) for t in answer.tensors().values() if t.is_floating_point()
    )


def _hand(answer: Answer, r: _Running, slot: int, of: Target | None) -> None:
    """Give an answer, with the scalar that is wanted of its output, to who waits for it."""
    if of is not None:
        assert answer.output is not None
        answer = dataclasses.replace(answer, scalar=of(answer.output))
        if not is_finite(answer) and not bool(torch.isfinite(answer.tensors()["scalar"]).all()):
            r.error = NonFiniteError(
                f"target {of.name!r} is NaN or infinite though the output is finite ({r.job.name}, {r.job.key})"
            )
    r.answers[slot] = answer
    r.missing -= 1


def _to(answer: Answer, device: torch.device) -> Answer:
    return answer if all(t.device == device for t in answer.tensors().values()) else answer.each(lambda t: t.to(device))


def tune_format(network: Network, question: Pass, rows: int = 8) -> None:
    """Measure the memory formats of image-like inputs on this machine; keep the fastest that gives the same output."""
    if network.memory_format is not torch.preserve_format:
        return
    inputs = {k: v[:rows] if isinstance(v, Tensor) else v for k, v in question.inputs.items()}
    if not any(isinstance(v, Tensor) and v.ndim == 4 and v.is_floating_point() for v in inputs.values()):
        return
    times: dict[torch.memory_format, float] = {}
    outputs: dict[torch.memory_format, Tensor] = {}
    try:
        for form in (torch.contiguous_format, torch.channels_last):
            network.memory_format = form
            taken = []
            for _ in range(3):
                started = time.perf_counter()
                output = network.run(Pass(inputs)).output
                taken.append(time.perf_counter() - started)
                assert output is not None
                outputs[form] = output
            times[form] = min(taken)
    finally:
        network.memory_format = torch.preserve_format
    same = torch.allclose(outputs[torch.contiguous_format], outputs[torch.channels_last], rtol=1e-3, atol=1e-4)
    faster = times[torch.channels_last] < 0.95 * times[torch.contiguous_format]
    network.memory_format = torch.channels_last if same and faster else torch.contiguous_format


class progress_bar:
    """Progress bar that appears after two seconds."""

    def __init__(self, wanted: bool, total: int | None, what: str) -> None:
        self.wanted, self.total, self.what = wanted, total, what
        self.started = time.monotonic()
        self.count = 0
        self.bar: Progress | None = None

    def __enter__(self) -> Callable[[], None]:
        return self._step

    def _step(self) -> None:
        self.count += 1
        if self.bar is None and self.wanted and time.monotonic() - self.started > 2:
            from rich.console import Console

            self.bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.count)

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.stop()
