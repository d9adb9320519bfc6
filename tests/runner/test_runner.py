"""The Runner merges what may be merged, asks nothing twice, survives faults, and answers as single runs do."""

import sys
import time
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import nissl.runner.runner as runner_module
from nissl.attribution.gradients import IntegratedGradients, SmoothGrad
from nissl.attribution.perturbation import RISE, Occlusion
from nissl.errors import InputError, NisslError, NonFiniteError, TargetError
from nissl.network import Add, Apply, Network, Pass, RelP, Rescale, Set, target
from nissl.runner import Job, Runner, explained
from nissl.runner.runner import tune_format

G = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=G)


class Counted(nn.Module):
    """Notes the rows of every forward call; may run out of memory, or be interrupted."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body or nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.seen: list[int] = []
        self.most = 10**9
        self.error: type[BaseException] = torch.OutOfMemoryError
        self.interrupt_at = 10**9

    def forward(self, x):
        if len(x) > self.most:
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB")
        self.seen.append(len(x))
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        return self.body(x)


def jobs(network: Network, questions, name: str = "job") -> list[Job]:
    """One job a question, which returns its answer; a question may be a list of passes."""

    def start(question):
        return (yield question)

    return [Job(name, i, network, lambda q=q: start(q)) for i, q in enumerate(questions)]


def drive(runner: Runner, work) -> list:
    return [a for _, a in sorted(((j.key, a) for j, a in runner.drive(work)), key=lambda pair: pair[0])]


def quiet(batch_size=None, **kwargs) -> Runner:
    return Runner(batch_size, tune=False, progress=False, **kwargs)


def same(a, b) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for k in left:
        torch.testing.assert_close(left[k], right[k], atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("batch", [1, 5, 8, 24, 100])
def test_compatible_passes_fill_batches(batch):
    m = Counted()
    net = Network(m)
    questions = [
        Pass(X[i : i + 1], Add("body.0", float(1)), read=["body.1"], of=i % 3, wrt=["input"]) for i in range(24)
    ]
    answers = drive(quiet(batch), jobs(net, questions))
    assert sum(m.seen) == 24
    assert len(m.seen) == -(-24 // batch)
    assert max(m.seen) <= batch
    for q, a in zip(questions, answers, strict=True):
        same(a, net.run(q))


def test_a_large_pass_is_split_and_put_together():
    m = Counted()
    question = Pass(X, Set("body.0", torch.randn(24, 5)), read=["body.1"], of=[0, 1, 2] * 8, wrt=["body.0"])
    runner = quiet(7)
    (answer,) = drive(runner, jobs(Network(m), [question]))
    assert max(m.seen) <= 7
    same(answer, Network(m).run(question))


def test_incompatible_passes_are_never_merged():
    m = Counted()
    net = Network(m)
    x = X[:1]
    kinds = [
        Pass(x), Pass(x, read=["body.0"]), Pass(x, read=["body.1"]), Pass(x, Set("body.0", 1.0)), Pass(x, Set("body.0", 2.0)),
        Pass(x, Add("body.0", 1.0)), Pass(x, of=0, wrt=["input"]), Pass(x, of=target.probability(0), wrt=["input"]),
        Pass(x, of=0, wrt=["body.0"]), Pass(x, of=0, wrt=["input"], rules=RelP()),
        Pass(x, Apply("body.0", lambda h: h + 1)), Pass(x, Apply("body.0", lambda h: h + 2)),
    ]  # fmt: skip
    answers = drive(quiet(100), jobs(net, kinds))
    # a pass that sets a whole site is first tried on single rows; the others are one call each
    assert len([n for n in m.seen if n == 1]) == len(m.seen) >= len(kinds)
    for q, a in zip(kinds, answers, strict=True):
        same(a, net.run(q))


def test_rows_of_different_length_are_not_padded():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = []
            self.linear = nn.Linear(1, 2)

        def forward(self, x):
            self.seen.append(tuple(x.shape))
            return self.linear(x.mean(1, keepdim=True))

    m = Mean()
    inputs = [torch.randn(1, length) for length in (3, 5, 3, 5, 5)]
    answers = drive(quiet(8), jobs(Network(m), [Pass(x) for x in inputs]))
    assert sorted(m.seen) == [(2, 3), (3, 5)]
    for x, a in zip(inputs, answers, strict=True):
        torch.testing.assert_close(a.output, m.linear(x.mean(1, keepdim=True)).detach())


def test_groups_of_rows_stay_together():
    m = Counted()
    questions = [Pass(X[2 * i : 2 * i + 2], of=1, wrt=["input"], rules=Rescale()) for i in range(12)]
    answers = drive(quiet(5), jobs(Network(m), questions))
    assert set(m.seen) == {4}
    for q, a in zip(questions, answers, strict=True):
        same(a, Network(m).run(q))
    whole = Pass(X, of=1, wrt=["input"], rules=Rescale())
    for batch in (1, 3):
        m.seen.clear()
        (answer,) = drive(quiet(batch), jobs(Network(m), [whole]))
        assert set(m.seen) == {2}
        same(answer, Network(m).run(whole))


def test_a_generator_may_ask_for_many_passes_or_none_or_another_network():
    net, other = Network(Counted()), Network(nn.Linear(4, 2))

    def ask():
        assert (yield []) == []
        several = yield [Pass(X[:2]), Pass(X[2:3], read=["body.0"])]
        one = yield (other, Pass(X[:1]))
        return several, one

    [(job, (several, one))] = list(quiet(4).drive([Job("a", "key", net, ask)]))
    assert job.key == "key"
    same(several[0], net.run(Pass(X[:2])))
    same(several[1], net.run(Pass(X[2:3], read=["body.0"])))
    same(one, other.run(Pass(X[:1])))


def test_what_is_no_pass_is_refused():
    for wrong in (None, torch.ones(1), [torch.ones(1)]):
        with pytest.raises(NisslError, match="methods yield Passes"):
            drive(quiet(), jobs(Network(nn.Linear(4, 2)), [wrong]))


@pytest.mark.parametrize("batch", [0, -1, 1.5, "8", True])
def test_batch_sizes_are_whole_numbers(batch):
    with pytest.raises((InputError, TypeError)):
        Runner(batch)


# ---------------------------------------------------------------- the cache


def test_a_repeated_pass_is_not_asked_again():
    m = Counted()
    net, runner = Network(m), quiet(8)
    question = Pass(X[:3], Add("body.0", 1.0), read=["body.1"], of=1, wrt=["input"])
    first, twin = drive(
        runner, jobs(net, [question, Pass(X[:3].clone(), Add("body.0", 1.0), ["body.1"], 1, ["input"])])
    )
    assert sum(m.seen) == 3
    (again,) = drive(runner, jobs(net, [question]))
    assert sum(m.seen) == 3
    for a in (first, twin, again):
        same(a, net.run(question))
    cost = runner.cost("job")
    assert (cost.forward, cost.backward, cost.reused) == (9, 9, 6)


def test_passes_that_differ_in_their_target_are_one():
    m = Counted()
    net, runner = Network(m), quiet(8)
    kinds = [0, 1, [0, 1, 2], target.log_probability(1), target.top_class(), lambda out: out.sum(1), None]
    questions = [Pass(X[:3], of=k) for k in kinds[:-1]] + [Pass(X[:3])]
    answers = drive(runner, jobs(net, questions))
    assert m.seen == [3]
    drive(runner, jobs(net, [Pass(X[:3], of=2)]))
    assert m.seen == [3]
    for q, a in zip(questions, answers, strict=True):
        same(a, net.run(q))
    with pytest.raises(TargetError):
        drive(runner, jobs(net, [Pass(X[:3], of=9)]))


def test_functions_that_cannot_be_seen_are_asked_each_time():
    m = Counted()
    runner = quiet(8)
    for k in (1.0, 2.0):
        (a,) = drive(runner, jobs(Network(m), [Pass(X[:2], Apply("body.2", lambda h, k=k: h * 0 + k))]))
        assert torch.equal(a.output, torch.full((2, 3), k))


def test_answers_of_networks_with_other_weights_or_outputs_are_kept_apart():
    m = Counted()
    net, runner = Network(m), quiet(8)
    nets = [net, net.changed({"body.2.bias": torch.ones(3)})]
    nets += [Network(m, output=lambda o: o * 2), Network(m, output=lambda o: o + 1)]
    answers = [drive(runner, jobs(n, [Pass(X[:2])]))[0] for n in nets]
    for n, a in zip(nets, answers, strict=True):
        same(a, n.run(Pass(X[:2])))
    with torch.no_grad():
        m.body[2].bias += 1
    (after,) = drive(runner, jobs(net, [Pass(X[:2])]))
    same(after, net.run(Pass(X[:2])))


def test_memory_of_the_cache_is_bounded():
    m = Counted()
    net, runner = Network(m), quiet(8, memory=3 * 4 * 5)
    questions = [Pass(X[i : i + 1]) for i in range(20)]
    drive(runner, jobs(net, questions))
    assert runner.cache.held <= 60
    m.seen.clear()
    drive(runner, jobs(net, questions[-5:]))
    assert m.seen == []
    drive(runner, jobs(net, questions[:5]))
    assert sum(m.seen) == 5


def test_the_folder_outlives_the_runner(tmp_path):
    m = Counted()
    net = Network(m)
    questions = [Pass(X[i : i + 1], read=["body.0"], of=1, wrt=["input"]) for i in range(4)]
    first = drive(quiet(2, folder=tmp_path), jobs(net, questions))
    m.seen.clear()
    again = drive(quiet(3, folder=tmp_path), jobs(Network(m), questions))
    assert m.seen == []
    for a, b in zip(first, again, strict=True):
        same(a, b)
    work = jobs(net, questions)
    runner = quiet(folder=tmp_path)
    drive(runner, work)
    runner.cache.forget(set.union(*(j.passes for j in work)))
    assert list(tmp_path.iterdir()) == []


def test_cached_answers_do_not_hold_their_batch():
    runner = quiet(24)
    drive(runner, jobs(Network(Counted()), [Pass(X[i : i + 1]) for i in range(24)]))
    kept = list(runner.cache._answers.values())
    assert all(a.output.untyped_storage().nbytes() == a.output.nbytes for a in kept)


# ---------------------------------------------------------------- out of memory


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("most", [1, 3, 7])
def test_batches_are_halved_when_memory_runs_out(error, most):
    m = Counted()
    m.most, m.error = most, error
    net, runner = Network(m), quiet(24)
    questions = [Pass(X[i : i + 2], of=1, wrt=["input"]) for i in range(0, 24, 2)] + [Pass(X + 1, of=2, wrt=["input"])]
    answers = drive(runner, jobs(net, questions))
    assert max(m.seen) <= most
    assert sum(m.seen) == 48
    m.most = 10**9
    for q, a in zip(questions, answers, strict=True):
        same(a, net.run(q))


def test_groups_are_not_split_when_memory_runs_out_and_a_single_one_that_does_not_fit_is_an_error():
    m = Counted()
    m.most = 5
    question = Pass(X, of=1, wrt=["input"], rules=Rescale())
    (answer,) = drive(quiet(24), jobs(Network(m), [question]))
    assert all(n % 2 == 0 for n in m.seen)
    m.most = 1
    with pytest.raises(torch.OutOfMemoryError):
        drive(quiet(24), jobs(Network(m), [Pass(X, of=2, wrt=["input"], rules=Rescale())]))
    m.most = 10**9
    same(answer, Network(m).run(question))


def test_the_failed_attempt_is_not_held_while_halves_are_run():
    class Greedy(nn.Module):
        held: weakref.ref | None = None

        def forward(self, x):
            big = x.clone()
            if len(x) > 2:
                Greedy.held = weakref.ref(big)
                raise torch.OutOfMemoryError("out of memory")
            assert Greedy.held is None or Greedy.held() is None
            return big

    drive(quiet(4), jobs(Network(Greedy()), [Pass(X[:4])]))
    assert Greedy.held is not None


def test_a_black_box_that_runs_out_of_memory_is_halved_too():
    def predict(x):
        if len(x) > 3:
            raise MemoryError
        return x * 2

    (a,) = drive(quiet(24), jobs(Network(predict), [Pass(X)]))
    torch.testing.assert_close(a.output, X * 2)


def test_other_errors_are_passed_on():
    m = Counted()
    m.most, m.error = 1, ValueError
    with pytest.raises(ValueError, match="Tried"):
        drive(quiet(24), jobs(Network(m), [Pass(X)]))


# ---------------------------------------------------------------- cost


def test_costs_are_counted_in_rows_by_method_and_grow_linearly():
    m = Counted()
    net = Network(m)
    seen = {}
    for n in (2, 4, 8):
        runner = quiet(8)
        m.seen.clear()
        methods = {"ig": IntegratedGradients(steps=10), "occ": Occlusion()}
        scores = runner.attribute(methods, net, X[:n], 1)
        seen[n] = sum(m.seen)
        for name in methods:
            cost = runner.cost(name)
            assert scores[name].attrs["forward_passes"] == cost.forward
            assert scores[name].attrs["backward_passes"] == cost.backward
        assert runner.cost("ig").backward == 10 * n
        assert runner.cost("occ").backward == 0
        assert runner.cost("occ").forward == 5 * n
        # baselines are equal for all examples and asked once; all else by the example
        assert sum(c.forward - c.reused for c in runner.costs.values()) == seen[n]
    assert seen[8] - seen[4] == 2 * (seen[4] - seen[2])


def test_a_thousand_steps_need_few_rows_at_a_time():
    class Wide(nn.Module):
        """Measures the rows of inputs that are alive at once."""

        alive = 0
        most = 0

        def forward(self, x):
            Wide.most = max(Wide.most, len(x))
            return (x**2).sum(1, keepdim=True)

    asked: list[int] = []

    @dataclass(frozen=True)
    class Watched(IntegratedGradients):
        def explain(self, q):
            inner = super().explain(q)
            answer = None
            while True:
                try:
                    p = inner.send(answer)
                except StopIteration as stop:
                    return stop.value
                asked.append(sum(x.n for x in p) if isinstance(p, list) else p.n)
                answer = yield p

    runner = quiet(16, memory=0)
    s = runner.attribute(Watched(steps=1000, quadrature="riemann_middle"), Network(Wide()), X[:2], 0)["ig"]
    np.testing.assert_allclose(s.values, X[:2] ** 2, rtol=1e-4, atol=1e-6)
    assert Wide.most <= 16
    assert max(asked) <= 32
    assert runner.cost("ig").backward == 2000


# ---------------------------------------------------------------- seeds


@pytest.mark.parametrize("method", [SmoothGrad(samples=9), RISE(n_masks=20, cells=3)])
def test_scores_hang_on_the_seed_and_not_on_the_batch(method):
    net = Network(Counted(nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))

    def scores(batch, seed, inputs=x):
        return quiet(batch).attribute(method, net, inputs, 1, seed=seed)[method.name].values

    base = scores(64, 0)
    np.testing.assert_array_equal(scores(64, 0), base)
    for batch in (1, 7, 200):
        np.testing.assert_allclose(scores(batch, 0), base, atol=1e-6)
    assert not np.allclose(scores(64, 1), base)
    np.testing.assert_allclose(scores(64, 0, x[:2]), base[:2], atol=1e-6)


# ---------------------------------------------------------------- faults


def test_an_interrupt_closes_generators_and_a_second_call_asks_nothing_again():
    m = Counted()
    net, runner = Network(m), quiet(4)
    m.train()
    closed = []

    def ask(i):
        try:
            out = []
            for k in range(3):
                a = yield Pass(X[i : i + 1] + k, read=["body.0"], of=1, wrt=["input"])
                out.append(a.gradients["input"])
            return torch.cat(out)
        except GeneratorExit:
            closed.append(i)
            raise

    def work():
        return [Job("job", i, net, lambda i=i: ask(i)) for i in range(12)]

    m.interrupt_at = 5
    done = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(j.key for j, _ in runner.drive(work()))
    assert closed
    assert set(closed).isdisjoint(done)
    for module in m.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.requires_grad for p in m.parameters())
    finished = sum(m.seen[:-1])
    m.seen.clear()
    m.interrupt_at = 10**9
    answers = drive(runner, work())
    assert sum(m.seen) == 36 - finished
    expected = drive(quiet(1), work())
    for a, b in zip(answers, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_an_error_in_one_generator_closes_the_others():
    closed = []

    def ask(i):
        try:
            yield Pass(X[i : i + 1])
            if i == 2:
                raise ZeroDivisionError
            yield Pass(X[i : i + 1] + 1)
        except GeneratorExit:
            closed.append(i)
            raise

    net = Network(Counted())
    held = [ask(i) for i in range(5)]
    with pytest.raises(ZeroDivisionError):
        list(quiet(100).drive([Job("job", i, net, lambda i=i: held[i]) for i in range(5)]))
    assert sorted(closed) == [0, 1, 3, 4]


def test_who_stops_listening_closes_the_generators():
    closed = []

    def ask(i):
        try:
            yield Pass(X[i : i + 1])
            yield Pass(X[i : i + 1] + 1, read=["body.0"] if i else [])
        finally:
            closed.append(i)

    # held here, so that they are not closed just by being forgotten
    held = [ask(i) for i in range(3)]
    running = quiet(2).drive([Job("job", i, Network(Counted()), lambda i=i: held[i]) for i in range(3)])
    next(running)
    running.close()
    assert sorted(closed) == [0, 1, 2]


@pytest.mark.parametrize("layer", ["body.0", "body.2"])
def test_nan_is_thrown_into_who_asked_with_its_first_site(layer):
    net = Network(Counted())
    bad = net.changed({f"{layer}.bias": torch.full_like(net.weights()[f"{layer}.bias"], torch.nan)})
    with pytest.raises(NonFiniteError, match=rf"site '{layer}'.*job, 3"):
        drive(quiet(8), [Job("job", 3, bad, lambda: (lambda: (yield Pass(X[:2])))())])

    def careful():
        try:
            yield Pass(X[:1], of=0)
        except NonFiniteError as error:
            answer = yield (net, Pass(X[:1], of=0))
            return str(error), answer

    [(_, (text, answer))] = list(quiet(8).drive([Job("careful", 0, bad, careful)]))
    assert layer in text
    same(answer, net.run(Pass(X[:1], of=0)))


def test_only_who_asked_for_the_bad_row_hears_of_it():
    net = Network(Counted(nn.Sequential(nn.Identity())))
    heard = []

    def ask(i):
        x = X[i : i + 1].clone()
        if i == 2:
            x[0, 0] = torch.nan
        try:
            a = yield Pass(x)
            return a.output
        except NonFiniteError:
            heard.append(i)
            return None

    for batch in (1, 8):
        answers = drive(quiet(batch), [Job("job", i, net, lambda i=i: ask(i)) for i in range(5)])
        assert [a is None for a in answers] == [False, False, True, False, False]
    assert heard == [2, 2]


def test_a_target_that_is_not_finite_is_reported_though_the_output_is():
    net = Network(nn.Identity())

    def log(out):
        return out[:, 0].log()

    with pytest.raises(NonFiniteError, match="'log'"):
        drive(quiet(), jobs(net, [Pass(torch.tensor([[0.0]]), of=log)]))


def test_bad_answers_are_not_kept():
    net, runner = Network(Counted(nn.Identity())), quiet()
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            drive(runner, jobs(net, [Pass(torch.full((1, 4), torch.nan))]))
    assert runner.cache.held == 0


# ---------------------------------------------------------------- progress, format


@pytest.mark.parametrize(("pace", "wanted", "shown"), [(0.1, True, False), (1.0, True, True), (1.0, False, False)])
def test_the_bar_comes_after_two_seconds_to_stderr(pace, wanted, shown, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    now = [0.0]

    def clock():
        now[0] += pace
        return now[0]

    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=clock, perf_counter=time.perf_counter))
    runner = Runner(1, progress=wanted, tune=False)
    list(runner.drive(jobs(Network(Counted()), [Pass(X[i : i + 1]) for i in range(5)]), 5, "explaining"))
    out, err = capsys.readouterr()
    assert out == ""
    assert ("explaining" in err) == shown
    assert sys.stdout is not sys.stderr


@pytest.fixture
def images() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    m = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    )
    return m, torch.randn(80, 3, 12, 12)


@pytest.mark.parametrize("faster", [torch.channels_last, torch.contiguous_format])
def test_tuning_keeps_the_faster_format_and_the_answers(images, faster, monkeypatch):
    m, x = images
    net = Network(m)
    now = [0.0]

    def clock():
        now[0] += 1.0 if net.memory_format is faster else 10.0
        return now[0]

    expected = net.run(Pass(x, Set("2", 0.5, units=1), of=1, wrt=["input", "0"], read=["0"]))
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    tune_format(net, Pass(x))
    assert net.memory_format is faster
    same(net.run(Pass(x, Set("2", 0.5, units=1), of=1, wrt=["input", "0"], read=["0"])), expected)


def test_a_format_that_changes_the_answers_is_not_kept(images, monkeypatch):
    class Strided(nn.Module):
        """Looks at memory where it should look at places."""

        def forward(self, x):
            return torch.as_strided(x, (len(x), 4), (x[0].numel(), 1))

    net = Network(Strided())
    now = [0.0]

    def clock():
        now[0] += 1.0 if net.memory_format is torch.channels_last else 10.0
        return now[0]

    monkeypatch.setattr(runner_module, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    tune_format(net, Pass(images[1]))
    assert net.memory_format is torch.contiguous_format


def test_tuning_that_fails_leaves_the_format_alone(images):
    m, x = images

    class Fails(nn.Module):
        def forward(self, x):
            if x.is_contiguous(memory_format=torch.channels_last):
                raise ZeroDivisionError
            return m(x)

    net = Network(Fails())
    with pytest.raises(InputError, match="ZeroDivisionError"):
        tune_format(net, Pass(x))
    assert net.memory_format is torch.preserve_format


def test_a_network_is_tuned_once_it_is_worth_it(images):
    m, x = images
    counted = Counted(m)
    for tune, n in ((True, 80), (True, 60), (False, 80)):
        counted.seen.clear()
        net = Network(counted)
        answers = drive(Runner(10, tune=tune, progress=False), jobs(net, [Pass(x[i : i + 1]) for i in range(n)]))
        tuned = tune and n > 64
        assert (net.memory_format is not torch.preserve_format) == tuned
        assert sum(counted.seen) == n + (6 * 8 if tuned else 0)
        torch.testing.assert_close(torch.cat([a.output for a in answers]), m(x[:n]).detach(), atol=1e-5, rtol=1e-4)


def test_methods_are_checked():
    net = Network(nn.Linear(4, 2))
    with pytest.raises(InputError, match="no method"):
        Runner().attribute({}, net, X)

    @dataclass(frozen=True)
    class Direct:
        differentiates = False

        def explain(self, q):
            yield q.ask()
            return explained(q, q.input[0])

    s = Runner().attribute(Direct(), net, X[:2])["method"]
    np.testing.assert_array_equal(s.values, X[:2])


def test_collect_gives_results_in_the_order_of_the_generators():
    net, runner = Network(Counted()), quiet(4)

    def ask(i):  # later ones need fewer rounds, so they end first
        for _ in range(5 - i):
            answer = yield Pass(X[i : i + 1], of=i % 3)
        return i, float(answer.scalar)

    found = runner.collect(net, [lambda i=i: ask(i) for i in range(5)], "questions", "named")
    assert [i for i, _ in found] == [0, 1, 2, 3, 4]
    for i, value in found:
        assert value == pytest.approx(float(net.run(Pass(X[i : i + 1])).output[0, i % 3]), abs=1e-6)
    assert set(runner.costs) == {"named"}
    assert runner.collect(net, [], "nothing") == []
