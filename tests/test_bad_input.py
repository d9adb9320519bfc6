"""Bad input: what it raises, what it says, and that it leaves nothing behind.

Each case either raises one of nissl's own errors, with a message that says what was given or what is expected, or works
with a result that is known. Afterwards modules, hooks, weights, inputs, random generators, files and paths are as before.

The cases run in a process of their own, this file run as a script: the other tests check types at every call, users do
not, and it is the code itself that has to notice. ``python tests/test_bad_input.py out.json ig`` runs the cases whose
name holds ``ig`` and prints those that are wrong; with TRACE=1 in the environment, tracebacks too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from filelock import FileLock
from torch import Tensor, nn

from bad_input import (
    CASES,
    CNN,
    MLP,
    SETTINGS,
    Counter,
    Does,
    NoBackward,
    Odd,
    Overwrites,
    Tied,
    Words,
    World,
    bad,
    broken,
    command,
    good,
    normed,
    ragged,
    returns,
    run,
    write_files,
    yields,
)
from nissl import Ablate, Add, Answer, Apply, Network, Pass, Patch, Runner, Scale, Set, Target, audit, target
from nissl.attribution import METHODS, method
from nissl.errors import (
    BusyError,
    GradientError,
    InputError,
    NisslError,
    NonFiniteError,
    RuleError,
    RunFolderError,
    SiteError,
    TargetError,
)
from nissl.papers import PAPERS, paper
from nissl.report import plot, write_report
from nissl.runner import explained
from nissl.sources import load_data, load_model
from nissl.trust import agreement, faithfulness, groundtruth, sanity, statistics
from nissl.trust.audit import Shown
from nissl.trust.run_folder import RunFolder, load_run

# Cases are listed below by what they are about, in functions, so that a long table stays readable.


def network_cases() -> None:
    bad("network of nothing", InputError, "torch module.*None", lambda w: Network(None))
    bad("network of a number", InputError, "torch module.*3", lambda w: Network(3))
    bad("network of a class", InputError, "not from.*Linear", lambda w: Network(nn.Linear))
    bad("network of a network", InputError, "already", lambda w: Network(w.net))
    bad("network on an unknown device", InputError, "warp", lambda w: Network(w.mlp, device="warp"))
    bad("network on no device", InputError, "3.5", lambda w: Network(w.mlp, device=3.5))  # pyright: ignore
    if not torch.cuda.is_available():
        bad("network on a missing device", InputError, "cuda", lambda w: Network(w.mlp, device="cuda"))
    bad("network with a type by name", InputError, "dtype.*float32", lambda w: Network(w.mlp, dtype="float32"))  # pyright: ignore
    bad("network with whole numbers", InputError, "dtype.*int64", lambda w: Network(w.mlp, dtype=torch.int64))
    bad("autocast by name", InputError, "autocast.*bfloat16", lambda w: Network(w.mlp, autocast="bfloat16"))  # pyright: ignore
    bad("dimensions as one word", InputError, "dims.*feature", lambda w: Network(w.mlp, dims="feature"))
    bad("dimensions as a number", InputError, "dims.*3", lambda w: Network(w.mlp, dims=3))  # pyright: ignore
    bad("dimensions twice", InputError, "dims.*twice", lambda w: Network(w.mlp, dims=("time", "time")))
    bad("network without weights yet", InputError, "run it once", lambda w: Network(nn.LazyLinear(3)))

    def unfitted(w: World) -> Any:
        from sklearn.linear_model import LogisticRegression

        return Network(LogisticRegression()).run(Pass(w.x))

    bad("estimator that is not fitted", InputError, "fitted", unfitted)
    bad("function that fails", InputError, "failed.*division", lambda w: Network(lambda x: 1 / 0).run(Pass(w.x)))
    bad("function that gives text", TargetError, "numbers", lambda w: Network(lambda x: ["a"] * len(x)).run(Pass(w.x)))
    bad(
        "function that gives one row",
        TargetError,
        r"\(1, 6\) for 4 rows",
        lambda w: Network(lambda x: x[:1]).run(Pass(w.x)),
    )
    bad("function that gives nothing", TargetError, "numbers", lambda w: Network(lambda x: None).run(Pass(w.x)))
    bad("gradient of a function", GradientError, "no gradients",
        lambda w: Network(lambda x: x).run(Pass(w.x, of=0, wrt=["input"])))  # fmt: skip

    # ---- outputs
    for name, function, says in (
        ("a tuple", lambda o, x: (o, x), "several things.*output="),
        ("a mapping", lambda o, x: {"a": o, "b": x}, "several things.*'a'.*output="),
        ("nothing", lambda o, x: None, "NoneType"),
        ("a list of numbers", lambda o, x: [1.0, 2.0], "several things"),
        ("an array", lambda o, x: o.detach().numpy(), "ndarray"),
        ("a scalar", lambda o, x: o.sum(), r"shape \(\) for 4 rows"),
        ("too few rows", lambda o, x: o[:2], r"\(2, 3\) for 4 rows"),
        ("rows last", lambda o, x: o.T, r"\(3, 4\) for 4 rows"),
    ):
        bad(f"model that returns {name}", TargetError, says,
            lambda w, f=function: w.network(lambda: Does(f)).run(Pass(w.x)))  # fmt: skip
    pair = lambda: Does(lambda o, x: (o, x))  # noqa: E731
    bad("output that is not there", TargetError, "output=5", lambda w: w.network(pair, output=5).run(Pass(w.x)))
    bad("output by an unknown key", TargetError, "output='a'", lambda w: w.network(pair, output="a").run(Pass(w.x)))
    bad("output by a function that fails", TargetError, "division",
        lambda w: w.network(pair, output=lambda o: 1 / 0).run(Pass(w.x)))  # fmt: skip
    good("model that returns a tuple, output named",
         lambda w: (w.network(pair, output=1).run(Pass(w.x)).output, w.x))  # fmt: skip
    bad("model that raises", InputError, "Does.*failed.*KeyError.*own trouble",
        lambda w: w.network(lambda: Does(broken)).run(Pass(w.x)))  # fmt: skip
    bad("inputs of the wrong width", InputError, r"failed.*\(4, 5\)", lambda w: w.net.run(Pass(torch.zeros(4, 5))))
    bad("inputs of too many parts", InputError, "failed", lambda w: w.net.run(Pass((w.x, w.x))))
    bad("inputs with a wrong name", InputError, "failed.*pixels", lambda w: w.net.run(Pass({"pixels": w.x})))
    bad(
        "whole numbers for a linear layer",
        InputError,
        "failed.*int64",
        lambda w: w.net.run(Pass(torch.ones(4, 6).long())),
    )
    bad("token ids out of range", InputError, "failed.*range",
        lambda w: w.network(Words).run(Pass(torch.full((2, 5), 99))))  # fmt: skip

    def after_a_bad_one(w: World) -> tuple[Any, Any]:
        with contextlib.suppress(InputError):
            w.net.run(Pass(torch.zeros(4, 5)))
        return [s.shape for s in w.net.sites()], [None] * 4

    good("sites after inputs that failed", after_a_bad_one)

    # ---- gradients
    for name, function in (
        ("detaches", lambda o, x: o.detach()),
        ("takes an argmax", lambda o, x: o.argmax(1, keepdim=True)),
        ("rounds", lambda o, x: (o > 0).float()),
    ):
        bad(f"gradient of a model that {name}", GradientError, "differentiable",
            lambda w, f=function: w.network(lambda: Does(f)).run(Pass(w.x, of=0, wrt=["input"])))  # fmt: skip
    bad("gradient past torch.no_grad", GradientError, "differentiable",
        lambda w: w.network(lambda: Does(torch.no_grad()(lambda o, x: o * x[:, :3]))).run(Pass(w.x, of=0, wrt=["input"])))  # fmt: skip
    bad("backward that raises", GradientError, "KeyError.*no way back",
        lambda w: w.network(lambda: Does(lambda o, x: NoBackward.apply(o))).run(Pass(w.x, of=0, wrt=["input"])))  # fmt: skip
    bad("gradient at token ids", SiteError, "whole numbers",
        lambda w: w.network(Words).run(Pass(w.ids, of=0, wrt=["input"])))  # fmt: skip
    bad("gradient behind the target", GradientError, "behind the target",
        lambda w: w.net.run(Pass(w.x, of=target.unit("0", 1), wrt=["2"])))  # fmt: skip
    bad("rules that find no ReLU", RuleError, "ReLU",
        lambda w: method("guided").attribute(w.network(lambda: nn.Sequential(nn.Linear(6, 3), nn.GELU())), w.x, 0))  # fmt: skip

    # ---- threads
    def two_threads(w: World) -> Any:
        entered, go_on = threading.Event(), threading.Event()

        def waits(o: Tensor, x: Tensor) -> Tensor:
            entered.set()
            go_on.wait(20)
            return o

        net = w.network(lambda: Does(waits))
        first = threading.Thread(target=net.run, args=(Pass(w.x),))
        first.start()
        entered.wait(20)
        try:
            return Network(net.module).run(Pass(w.x))
        finally:
            go_on.set()
            first.join()

    bad("two threads", BusyError, "another thread", two_threads)
    bad("edit that asks the network", BusyError, "inside an edit",
        lambda w: w.net.run(Pass(w.x, edits=[Apply("0", lambda t: w.net.run(Pass(w.x)).output)])))  # fmt: skip

    # ---- what must work
    def grads(w: World, net: Network, x: Any = None, **options: Any) -> Tensor:
        return net.run(Pass(w.x if x is None else x, of=1, wrt=["input"], **options)).gradients["input"]

    def plain(w: World, module: nn.Module, x: Tensor | None = None) -> Tensor:
        leaf = (w.x if x is None else x).detach().clone().requires_grad_()
        return torch.autograd.grad(module(leaf)[:, 1].sum(), leaf)[0]

    def frozen(w: World) -> tuple[Any, Any]:
        m = w.module(lambda: MLP().requires_grad_(False))
        return grads(w, Network(m)), plain(w, m)

    good("frozen parameters", frozen)
    good("gradient under the user's no_grad", lambda w: (torch.no_grad()(lambda: grads(w, w.net))(), plain(w, w.mlp)))
    good("gradient under the user's inference mode",
         lambda w: (torch.inference_mode()(lambda: grads(w, w.net))().clone(), plain(w, w.mlp)))  # fmt: skip
    good("input that wants gradients",
         lambda w: (grads(w, w.net, w.watch(w.x.clone().requires_grad_())), plain(w, w.mlp)))  # fmt: skip

    def overwrites(w: World) -> tuple[Any, Any]:
        m = w.module(Overwrites)
        answer = Network(m).run(Pass(w.x, read=["first", "input"], of=1, wrt=["input", "first"]))
        copy = w.x.clone()
        hidden = m.first(2 * copy)
        out = m.last((hidden + 1).clamp(min=0))
        w_in, w_out = m.first.weight, m.last.weight
        live = (hidden + 1 > 0).float() * w_out[1]
        got = torch.cat([answer.output, answer.reads["first"], answer.reads["input"], answer.gradients["first"],
                         answer.gradients["input"]], 1)  # fmt: skip
        return got, torch.cat([out, hidden, copy, live, 2 * live @ w_in], 1).detach()

    good("operations in place", overwrites)

    def evaluation(w: World) -> tuple[Any, Any]:
        m = w.module(normed)
        got = grads(w, Network(m))
        weight = m[3].weight[1] * m[1].weight / (m[1].running_var + m[1].eps).sqrt()
        return got, (weight @ m[0].weight).detach().expand(4, -1)

    good("batch norm and dropout in training mode", evaluation)

    def counts(w: World) -> tuple[Any, Any]:
        m = w.module(Counter)
        net = Network(m)
        return torch.stack([net.run(Pass(w.x)).output for _ in range(2)]), m.layer(w.x).detach().expand(2, 4, 3)  # pyright: ignore

    good("model that replaces its buffers", counts)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        good(f"weights in {dtype}".replace("torch.", ""),
             lambda w, d=dtype: ((m := w.module(lambda: MLP().to(d))) and Network(m).run(Pass(w.x)).output, m(w.x.to(d)).detach()))  # fmt: skip
    good("array in half precision",
         lambda w: (w.net.run(Pass(w.x.half().numpy())).output, w.mlp(w.x.half().float()).detach()))  # fmt: skip
    good("array of the other byte order",
         lambda w: (w.net.run(Pass(w.watch(w.x.numpy().astype(">f4")))).output, w.mlp(w.x).detach()))  # fmt: skip

    def read_only(w: World) -> tuple[Any, Any]:
        a = w.x.numpy().copy()
        a.flags.writeable = False
        m = w.module(Overwrites)
        return Network(m).run(Pass(w.watch(a))).output, m(w.x.clone()).detach()

    good("array that may not be written to, and a model that writes", read_only)
    good("rows that share memory",
         lambda w: ((m := w.module(Overwrites)) and Network(m).run(Pass(w.watch(w.x[:1].expand(4, 6)))).output,
                    m(w.x[:1].repeat(4, 1)).detach()))  # fmt: skip


def pass_cases() -> None:
    for name, inputs, says in (
        ("None", None, "tensor.*NoneType"),
        ("text", "some text", "tensor.*str"),
        ("a number", 3, "tensor.*int"),
        ("a list of numbers", [1.0, 2.0], "no tensor"),
        ("an empty list", [], "no tensor"),
        ("an empty mapping", {}, "no tensor"),
        ("a scalar", torch.tensor(1.0), "rows"),
        ("no rows", torch.zeros(0, 6), "0 rows"),
        ("words", np.array(["a", "b"]), "no numbers"),
        ("objects", np.array([{}, None]), "no numbers"),
        ("parts that disagree", (torch.zeros(2, 6), torch.zeros(3, 6)), "disagree.*2.*3"),
        ("a sparse tensor", torch.eye(6).to_sparse(), "sparse"),
        ("a tensor without data", torch.zeros(4, 6, device="meta"), "meta"),
        ("a file", io.StringIO("x"), "StringIO"),
        ("a generator", (i for i in range(3)), "generator"),
    ):
        bad(f"inputs: {name}", InputError, says, lambda w, i=inputs: w.net.run(Pass(i)))

    def closed(w: World) -> Any:
        with np.load(w.folder / "data.npz") as archive:
            pass
        return Pass(archive)

    bad("inputs: a closed archive", InputError, "cannot be read", closed)

    def objects(w: World) -> Any:
        with (w.folder / "objects.npz").open("rb") as file, np.load(file) as archive:
            return Pass(archive)

    bad("inputs: an archive of objects", InputError, "cannot be read", objects)
    bad("edits that are text", InputError, "Set, Add", lambda w: Pass(w.x, edits=["0"]))  # pyright: ignore
    bad("edits that are a number", InputError, "edits.*3", lambda w: Pass(w.x, edits=3))  # pyright: ignore
    bad("sites that are a number", InputError, "read.*3", lambda w: Pass(w.x, read=3))  # pyright: ignore
    bad("a site that is a number", SiteError, "string.*int", lambda w: Pass(w.x, read=[3]))  # pyright: ignore
    bad("a site that is empty", SiteError, "not a site address", lambda w: Pass(w.x, read=[""]))
    bad("call number 0", SiteError, "counted from #1", lambda w: Pass(w.x, read=["0#0"]))
    bad("gradient of nothing", InputError, "of=", lambda w: Pass(w.x, wrt=["input"]))
    bad("rules by name", InputError, "rules.*str", lambda w: Pass(w.x, rules="lrp"))  # pyright: ignore
    bad("run on inputs", InputError, "takes a Pass.*Tensor", lambda w: w.net.run(w.x))  # pyright: ignore
    for name, address, says in (
        ("unknown", "layer", "no module 'layer'"),
        ("second call of one", "0#2", "fewer calls"),
        ("attention without any", "0:pattern", "did not reach"),
        ("element of a tensor", "0:out.5", "one tensor here"),
        ("unknown input", "input:pixels", r"inputs are \['0'\]"),
    ):
        bad(f"site: {name}", SiteError, says,
            lambda w, a=address: w.net.run(Pass(w.x, read=[a])))  # fmt: skip
    bad("site: nearly right", SiteError, "did you mean.*'feature'",
        lambda w: w.network(lambda: nn.Sequential(OrderedDict(feature=nn.ReLU()))).run(Pass(w.x, read=["features"])))  # fmt: skip
    bad("site: called twice", SiteError, "several times.*layer#1, layer#2",
        lambda w: w.network(Tied).run(Pass(w.x, read=["layer"])))  # fmt: skip
    bad("site: never called", SiteError, "did not reach.*idle", lambda w: w.network(Tied).run(Pass(w.x, read=["idle"])))
    bad("sites: a pattern that is a number", InputError, "pattern.*3", lambda w: w.net.sites(3))  # pyright: ignore
    bad("sites: inputs that fail", InputError, "failed", lambda w: w.net.sites(inputs=torch.zeros(4, 5)))
    good("sites: a pattern that matches nothing", lambda w: (w.net.sites("[", w.x), []))

    bad(
        "weights: unknown",
        InputError,
        "no weight '0.weigth'.*0.weight",
        lambda w: w.net.changed({"0.weigth": torch.ones(8, 6)}),
    )
    bad(
        "weights: wrong shape",
        InputError,
        r"\(8, 6\), \(6, 8\)",
        lambda w: w.net.changed({"0.weight": torch.ones(6, 8)}),
    )
    bad("weights: a number", InputError, "0.weight.*float", lambda w: w.net.changed({"0.weight": 1.0}))  # pyright: ignore
    bad("weights: a list", InputError, "mapping.*list", lambda w: w.net.changed([torch.ones(8, 6)]))  # pyright: ignore
    good("weights: other ones",
         lambda w: (w.net.changed({"2.weight": torch.zeros(3, 8)}).run(Pass(w.x)).output, w.mlp[2].bias.detach().expand(4, 3)))  # fmt: skip
    good("weights: none", lambda w: (w.net.changed({}).run(Pass(w.x)).output, w.mlp(w.x).detach()))


def edit_cases() -> None:
    def edited(make: Callable[[World], Any]) -> Callable[[World], Any]:
        return lambda w: w.net.run(Pass(w.x, edits=[make(w)]))

    rows: list[tuple[str, type[NisslError], str, Callable[[World], Any]]] = [
        ("unknown site", SiteError, "no module 'nope'", lambda w: Set("nope", 0)),
        ("site that is a number", SiteError, "string", lambda w: Set(3, 0)),  # pyright: ignore
        ("text", InputError, "number or tensor.*str", lambda w: Set("0", "a")),
        ("nothing", InputError, "number or tensor.*NoneType", lambda w: Add("0", None)),
        ("a ragged list", InputError, "number or tensor", lambda w: Scale("0", [[1.0], [1.0, 2.0]])),
        ("a vector of the wrong width", InputError, "8 units.*has 5", lambda w: Set("0", torch.ones(5))),
        ("wrong rows", InputError, "3 rows, the pass has 4", lambda w: Add("0", torch.ones(3, 8))),
        ("wrong width in rows", InputError, r"\(4, 5\) does not fit.*\(4, 8\)", lambda w: Add("0", torch.ones(4, 5))),
        ("too many dimensions", InputError, "does not fit", lambda w: Set("0", torch.ones(4, 8, 2))),
        ("unit out of range", SiteError, "8 units, unit 8", lambda w: Set("0", 0, units=8)),
        ("unit below range", SiteError, "8 units", lambda w: Set("0", 0, units=[-9])),
        ("half a unit", InputError, "units=.*float", lambda w: Set("0", 0, units=1.5)),
        ("unit by name", InputError, "units=.*'a'", lambda w: Set("0", 0, units="a")),
        ("unit mask of the wrong size", SiteError, r"shape \(8,\).*\(3,\)", lambda w: Set("0", 0, units=[True] * 3)),
        ("positions where there are none", SiteError, "no positions", lambda w: Set("0", 0, positions=[0])),
        ("examples by number", InputError, "examples= takes a bool mask", lambda w: Set("0", 0, examples=[0, 1])),
        ("examples of the wrong length", InputError, "3 rows, the pass has 4", lambda w: Set("0", 0, examples=[True] * 3)),
        ("mask of numbers", InputError, "where= takes a bool mask", lambda w: Set("0", 0, where=torch.ones(4, 8).long())),
        ("mask of wrong rows", InputError, "where has 3 rows", lambda w: Set("0", 0, where=torch.ones(3, 8) > 0)),
        ("mask of the wrong width", InputError, r"where.*\(4, 5\).*\(4, 8\)", lambda w: Set("0", 0, where=torch.ones(4, 5) > 0)),
        ("mask of too many dimensions", InputError, "where", lambda w: Set("0", 0, where=torch.ones(4, 8, 2) > 0)),
        ("mask that is a scalar", InputError, "where", lambda w: Set("0", 0, where=True)),
        ("examples that are a matrix", InputError, "examples", lambda w: Set("0", 0, examples=torch.ones(4, 2) > 0)),
        ("unknown ablation", InputError, "how='max'.*'zero'", lambda w: Ablate("0", "max")),  # pyright: ignore
        ("mean of nothing", InputError, "needs reference=", lambda w: Ablate("0", "mean")),
        ("mean of an array", InputError, "reference.*ndarray", lambda w: Ablate("0", "mean", reference=np.ones((2, 8)))),  # pyright: ignore
        ("mean of no rows", InputError, "reference.*rows", lambda w: Ablate("0", "mean", reference=torch.ones(0, 8))),
        ("draw from no rows", InputError, "reference.*rows", lambda w: Ablate("0", "resample", reference=torch.ones(0, 8))),
        ("reference that is a scalar", InputError, "reference.*rows", lambda w: Ablate("0", "mean", reference=torch.ones(()))),
        ("reference of the wrong width", InputError, "does not fit", lambda w: Ablate("0", "mean", reference=torch.ones(2, 5))),
        ("reference of whole numbers", InputError, "reference.*int64",
         lambda w: Ablate("0", "mean", reference=torch.ones(2, 8).long())),
        ("patch from an answer that did not read", SiteError, "no activation of '0'", lambda w: Patch("0", Answer())),
        ("patch from a tensor", InputError, "Answer.*Tensor", lambda w: Patch("0", w.x)),
        ("no function", InputError, "function is needed.*int", lambda w: Apply("0", 3)),  # pyright: ignore
        ("function that changes the shape", InputError, r"keep shape \(4, 8\).*\(4, 3\)", lambda w: Apply("0", lambda t: t[:, :3])),
        ("function that gives nothing", InputError, "keep shape.*NoneType", lambda w: Apply("0", lambda t: None)),  # pyright: ignore
        ("function that raises", InputError, "edit at '0'.*KeyError.*trouble", lambda w: Apply("0", lambda t: {}["trouble"])),
    ]  # fmt: skip
    for name, error, says, make in rows:
        bad(f"edit: {name}", error, says, edited(make))
    for name, edit in (("set to a half", Set("input", 0.5)), ("scaled by a half", Scale("input", 0.5))):
        bad(
            f"edit: token ids {name}",
            InputError,
            "whole numbers",
            lambda w, e=edit: w.network(Words).run(Pass(w.ids, edits=[e])),
        )
    good("edit: a unit counted from the end",
         lambda w: (w.net.run(Pass(w.x, edits=[Set("2", 5.0, units=-1)])).output[:, 2], torch.full((4,), 5.0)))  # pyright: ignore  # fmt: skip
    good("edit: one row", lambda w: (
        w.net.run(Pass(w.x, edits=[Add("2", 1.0, examples=[False, True, False, False])])).output,
        w.mlp(w.x).detach() + torch.tensor([0.0, 1, 0, 0])[:, None]))  # fmt: skip


def target_cases() -> None:
    def asked(make: Callable[[], Any]) -> Callable[[World], Any]:
        return lambda w: w.net.run(Pass(w.x, of=make()))

    rows: list[tuple[str, type[NisslError], str, Callable[[], Any]]] = [
        ("class that is a float", TargetError, "whole numbers", lambda: 1.5),
        ("classes that are floats", TargetError, "whole numbers.*float32", lambda: torch.ones(4)),
        ("class that is True", TargetError, "whole numbers.*bool", lambda: True),
        ("class by name", TargetError, "whole numbers.*str", lambda: "cat"),
        ("class that is nothing", TargetError, "whole numbers", lambda: target.class_logit(None)),
        ("class out of range", TargetError, "class 3 does not exist.*0 to 2", lambda: 3),
        ("class below 0", TargetError, "class -1 does not exist", lambda: -1),
        ("one class out of range", TargetError, "class 7 does not exist", lambda: [0, 1, 7, 2]),
        ("wrong number of classes", TargetError, "2 entries for 4 rows", lambda: [0, 1]),
        ("no classes", TargetError, "whole numbers", lambda: []),
        ("no whole classes", TargetError, "0 entries", lambda: torch.zeros(0).long()),
        ("classes in a table", TargetError, r"\(4, 3\)", lambda: torch.ones(4, 3).long()),
        ("difference out of range", TargetError, "class 9", lambda: target.logit_difference(0, 9)),
        ("probability out of range", TargetError, "class 9", lambda: target.probability(9)),
        ("log-probability below 0", TargetError, "class -2", lambda: target.log_probability(-2)),
        ("position by name", TargetError, "position.*'a'", lambda: target.class_logit(0, position="a")),  # pyright: ignore
        ("half a position", TargetError, "position.*1.5", lambda: target.top_class(position=1.5)),  # pyright: ignore
        ("position without steps", TargetError, "n_steps", lambda: target.top_class(position=1)),
        ("loss without a function", TargetError, "function of.*int", lambda: target.loss(3, [0] * 4)),  # pyright: ignore
        ("loss with words", TargetError, "labels", lambda: target.loss(nn.functional.cross_entropy, ["a"] * 4)),
        ("loss with too few labels", TargetError, "2 entries", lambda: target.loss(nn.functional.cross_entropy, [0, 1])),
        ("loss that is a mean", TargetError, r"one scalar a row.*\(\)", lambda: target.loss(nn.functional.cross_entropy, [0] * 4)),
        ("loss that raises", TargetError, "loss.*IndexError",
         lambda: target.loss(functools.partial(nn.functional.cross_entropy, reduction="none"), [99] * 4)),
        ("function that raises", TargetError, "ZeroDivisionError", lambda: lambda o: 1 / 0),
        ("function that gives a table", TargetError, r"shape \(4,\); it gave \(4, 3\)", lambda: lambda o: o),
        ("function that gives nothing", TargetError, "it gave NoneType", lambda: lambda o: None),
        ("values that are numbers", TargetError, "values.*tensors", lambda: Target(lambda o, v: o[:, 0], (1,))),  # pyright: ignore
        ("no function", TargetError, "function.*int", lambda: Target(3)),  # pyright: ignore
        ("unit without an index", TargetError, "1 indices.*0 were given", lambda: target.unit("0")),
        ("half a unit", TargetError, "whole numbers.*1.5", lambda: target.unit("0", 1.5)),  # pyright: ignore
        ("unit out of range", TargetError, "index 8.*size 8", lambda: target.unit("0", 8)),
        ("unit below 0", TargetError, "index -1", lambda: target.unit("0", -1)),
        ("unit of no site", SiteError, "no module 'nope'", lambda: target.unit("nope", 0)),
        ("unit of a number", SiteError, "string", lambda: target.unit(3, 0)),  # pyright: ignore
        ("channel out of range", TargetError, "class 99|channel 99", lambda: target.channel("0", 99)),
        ("channel by name", TargetError, "whole number.*'a'", lambda: target.channel("0", "a")),  # pyright: ignore
    ]  # fmt: skip
    for name, error, says, make in rows:
        bad(f"target: {name}", error, says, asked(make))
    bad("target: a class of a map", TargetError, r"\(4, 4, 8, 8\).*position=",
        lambda w: w.network(lambda: nn.Conv2d(3, 4, 3, padding=1)).run(Pass(w.images, of=0)))  # fmt: skip
    bad("target: position out of range", TargetError, "position 9.*4 steps",
        lambda w: w.network(nn.Identity).run(Pass(w.x.reshape(2, 4, 3), of=target.class_logit(0, position=9))))  # fmt: skip
    bad("target: probability of whole numbers", TargetError, "probability",
        lambda w: w.network(nn.Identity).run(Pass(w.ids, of=target.probability(0))))  # fmt: skip
    good("target: last position",
         lambda w: (w.network(nn.Identity).run(Pass(w.x.reshape(2, 4, 3), of=target.class_logit(1, position=-1))).scalar,
                    w.x.reshape(2, 4, 3)[:, -1, 1]))  # fmt: skip
    good("target: the only output",
         lambda w: (w.network(lambda: nn.Linear(6, 1)).run(Pass(w.x, of=target.top_class())).scalar.shape,
                    (4,)))  # pyright: ignore  # fmt: skip


COUNT = (0, -1, 2.5, True, "4", None)
OPTIONAL_COUNT = (0, -1, 2.5, True, "4")
SHARE = (-0.1, float("nan"), float("inf"), "0.5", None)
FLAG = ("no", 1, None)
NAME = ("nope", 3, None)
BASELINE = (
    "nope", None, float("nan"), float("inf"), True, {}, torch.full((6,), float("nan")), torch.ones(5), torch.ones(0, 6),
    np.array(["a"] * 6), torch.ones(2, 1, 6),
)  # fmt: skip
WRONG: dict[str, tuple[Any, ...]] = {
    "steps": COUNT, "samples": COUNT, "n_masks": COUNT, "cells": COUNT, "n_samples": (*COUNT, 3),
    "n_channels": OPTIONAL_COUNT, "window": OPTIONAL_COUNT, "stride": OPTIONAL_COUNT, "windows": OPTIONAL_COUNT,
    "size": OPTIONAL_COUNT, "superpixels": OPTIONAL_COUNT, "noise": SHARE, "p": (*SHARE, 0, 1), "residual": (*SHARE, 1),
    "discard": (*SHARE, 1), "kernel_width": (*SHARE, 0), "alpha": (0, -1, float("nan"), "1"), "epsilon": SHARE,
    "gamma": SHARE, "low": (1.0, "a", float("nan")), "high": (1.0, "a", float("nan")), "upsample": FLAG, "softmax": FLAG,
    "centred": FLAG, "quadrature": NAME, "what": NAME, "composite": NAME, "linear_model": NAME, "fusion": NAME,
    "regions": OPTIONAL_COUNT, "division": ("nope", 3), "consistency": SHARE, "collaboration": SHARE, "confidence": SHARE,
    "effectiveness": SHARE, "search": NAME, "pending": (*COUNT, 1), "k": OPTIONAL_COUNT, "evidence": ("nope", 3),
    "features": (3, True), "prior": (3, None), "passes": OPTIONAL_COUNT,
    "merging": NAME, "gather": NAME, "max_tokens": (*COUNT, 1), "query": ("nope", 1.5, True, 99), "layer": (3, True, "", "nope"), "baseline": BASELINE,
}  # fmt: skip
"""Values that no parameter of that name can have, for every parameter of every method."""


def method_cases() -> None:
    def attribute(w: World, key: str, **parameters: Any) -> xr.DataArray:
        made = METHODS[key](**parameters)
        if key in ("rollout", "flow", "attention"):
            return made.attribute(w.network(Attends), w.x.reshape(4, 2, 3), 0)
        if "layer" in parameters or "upsample" in parameters:
            return made.attribute(w.cnn, w.images, 0)
        if key == "scorecam" and "baseline" in parameters:
            return made.attribute(w.cnn, w.images, 0)
        return made.attribute(w.net, w.x, 0)

    for key, cls in METHODS.items():
        for field in dataclasses.fields(cls):
            for value in WRONG.get(field.name, ()):
                shown = (
                    f"{type(value).__name__} {tuple(value.shape)}"
                    if isinstance(value, (Tensor, np.ndarray))
                    else repr(value)
                )
                error, says = InputError, field.name
                if field.name == "layer" and key != "attention":  # a site, and not the number of a pattern
                    error, says = SiteError, "string|not a site address|no module"
                bad(f"{key}({field.name}={shown})", error, says,
                    lambda w, k=key, p={field.name: value}: attribute(w, k, **p))  # fmt: skip

    for name, spec, says in (
        ("empty", "", "named like"),
        ("nothing", None, "named like.*None"),
        ("a number", 3, "named like.*3"),
        ("a class", METHODS["ig"], "named like"),
        ("unknown", "salency", "did you mean saliency"),
        ("by title", "Grad-CAMM", "gradcam"),
        ("open bracket", "ig(", "named like|no specification"),
        ("no name", "ig(4)", "name=value"),
        ("twice", "ig(steps=1, steps=2)", "once|name=value"),
        ("unpacked", "ig(**{})", "once"),
        ("unknown parameter", "ig(step=3)", "no parameter 'step'; did you mean 'steps'"),
        ("parameter of another", "saliency(steps=3)", "no parameter 'steps'"),
        ("a call", "ig(steps=__import__('os').getpid())", "literal"),
        ("arithmetic", "ig(steps=2**9**9)", "literal"),
        ("a null byte", "ig(baseline='\0')", "no specification"),
        ("deep brackets", "ig(steps=" + "(" * 500 + ")" * 500 + ")", "no specification"),
        ("deep minus", "ig(steps=" + "-" * 5000 + "1)", "no specification|literal"),
        ("a mapping by a list", "ig(baseline={[]: 1})", "literal"),
        ("two calls", "ig(steps=1)(steps=2)", "name=value|no specification"),
    ):
        bad(f"method: {name}", InputError, says, lambda w, s=spec: method(s))  # pyright: ignore
    for key in METHODS:
        for budget in (0, -1, 2.5, True, "8", None):
            bad(
                f"{key}.at_budget({budget!r})",
                InputError,
                "budget|passes",
                lambda w, k=key, b=budget: METHODS[k]().at_budget(b),
            )  # pyright: ignore

    # ---- methods where they cannot work
    for key in ("gradcam", "gradcam++", "layercam", "scorecam", "ablationcam"):
        bad(f"{key} without maps", InputError, "no map", lambda w, k=key: method(k).attribute(w.net, w.x, 0))
    for key in sorted({"rollout", "flow", "attention"} & METHODS.keys()):
        bad(f"{key} without attention", InputError, "no attention", lambda w, k=key: method(k).attribute(w.net, w.x, 0))
    bad("superpixels of a table", InputError, "image", lambda w: method("lime(superpixels=8)").attribute(w.net, w.x, 0))
    bad("blur of a table", InputError, "blur", lambda w: method("ig(baseline='blur')").attribute(w.net, w.x, 0))
    bad("window smaller than stride", InputError, "gaps", lambda w: method("occlusion(window=2, stride=3)"))
    bad("patches and superpixels", InputError, "one of them", lambda w: method("lime(size=2, superpixels=9)"))
    bad(
        "blur of token ids",
        InputError,
        "token ids",
        lambda w: method("occlusion(baseline='blur')").attribute(w.network(Words), w.ids, 0),
    )
    bad(
        "half a token id",
        InputError,
        "whole numbers",
        lambda w: method("occlusion(baseline=0.5)").attribute(w.network(Words), w.ids, 0),
    )
    bad("gradients of images of whole numbers", InputError, "whole numbers.*no embedding",
        lambda w: method("saliency").attribute(w.network(lambda: nn.Sequential(nn.Flatten())), torch.ones(2, 3, 4, 4).long(), 0))  # fmt: skip
    bad("occlusion of images of whole numbers", InputError, "floating point",
        lambda w: method("occlusion").attribute(w.network(lambda: nn.Sequential(nn.Flatten())), torch.ones(2, 3, 4, 4).long(), 0))  # fmt: skip
    bad("features of unnamed dimensions", InputError, "dims=",
        lambda w: method("occlusion").attribute(w.network(nn.Flatten), torch.ones(2, 3, 2, 2, 2), 0))  # fmt: skip
    for key, cls in METHODS.items():
        if cls.differentiates:
            bad(f"{key} of a function", GradientError, "no gradients",
                lambda w, k=key: method(k).attribute(Network(lambda x: x.sum((2, 3))), w.images, 0))  # fmt: skip

    # ---- methods at the edge of what they can do; the network is linear, so all is known
    def linear(w: World, shape: tuple[int, ...], outputs: int = 3) -> tuple[Network, Tensor, Tensor]:
        x = w.watch(torch.linspace(-1, 2, 2 * int(np.prod(shape))).reshape(2, *shape))
        net = w.network(lambda: nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), outputs)))
        weight = net.module[1].weight.detach()[outputs - 1].reshape(shape)  # pyright: ignore
        return net, x, weight * x

    complete = ("ixg", "ig(steps=2)", "deeplift", "occlusion", "kernelshap(n_samples=4000)", "shapley(n_samples=4000)")
    for name, shape in (
        ("one pixel", (3, 1, 1)),
        ("a strip of pixels", (1, 1, 5)),
        ("grey pixels", (1, 2, 3)),
        ("one feature", (1,)),
    ):
        for spec in complete:
            if spec.startswith(("kernelshap", "shapley")) and name == "a strip of pixels":
                continue

            def exact(w: World, shape: tuple[int, ...] = shape, spec: str = spec) -> tuple[Any, Any]:
                net, x, right = linear(w, shape)
                found = method(spec).attribute(net, x, 2)
                got = torch.from_numpy(found.sum("channel").values if "channel" in found.dims else found.values)
                return got, right.sum(1) if len(shape) == 3 else right

            good(f"{spec} of {name}", exact)
    for spec in (*complete, "saliency", "smoothgrad(samples=2)", "vargrad(samples=2)", "gradshap(samples=2)", "rise(n_masks=4)",
                 "lime(n_samples=8, size=2)", "edge", "random"):  # fmt: skip

        def extents(w: World, spec: str = spec) -> tuple[Any, Any]:
            net, x, _ = linear(w, (3, 4, 7))
            found = method(spec).attribute(net, x, 0)
            return ({k: found.sizes[k] for k in ("example", "y", "x")}, bool(np.isfinite(found.values).all())), (
                {"example": 2, "y": 4, "x": 7}, True)  # fmt: skip

        good(f"{spec} of images that are not square", extents)

    def single(w: World) -> tuple[Any, Any]:
        net, x, right = linear(w, (4,), outputs=1)
        return torch.from_numpy(method("ixg").attribute(net, x).values), right

    good("the only output is explained", single)
    bad(
        "second of one output",
        TargetError,
        "0 to 0",
        lambda w: method("ixg").attribute(*linear(w, (4,), outputs=1)[:2], 1),
    )

    # ---- runner
    for value in (0, -1, 2.5, True, "8"):
        bad(f"batch size {value!r}", InputError, f"batch_size.*{value!r}", lambda w, v=value: Runner(v))  # pyright: ignore
    for value in (-1, 2.5, True, "8", None):
        bad(f"memory {value!r}", InputError, f"memory.*{value!r}", lambda w, v=value: Runner(memory=v))  # pyright: ignore
    bad("answers kept in a file", RunFolderError, "cannot be made", lambda w: Runner(folder=w.folder / "file.txt"))
    bad("answers kept in a number", InputError, "folder.*3", lambda w: Runner(folder=3))  # pyright: ignore

    ig = METHODS["ixg"]()
    rows: list[tuple[str, type[NisslError], str, Callable[[World], Any]]] = [
        ("no method", InputError, "no method", lambda w: Runner().attribute({}, w.net, w.x)),
        ("method by name", InputError, "not a method", lambda w: Runner().attribute({"ig": "ig"}, w.net, w.x)),  # pyright: ignore
        ("class of methods", InputError, "not a method", lambda w: Runner().attribute(METHODS["ig"], w.net, w.x)),  # pyright: ignore
        ("a module for a network", InputError, "Network is needed.*Sequential", lambda w: ig.attribute(w.mlp, w.x)),
        ("NaN", InputError, r"NaN or infinity in examples \[1\]", lambda w: ig.attribute(w.net, spoiled(w.x, float("nan")))),
        ("infinity", InputError, r"NaN or infinity in examples \[1\]", lambda w: ig.attribute(w.net, spoiled(w.x, float("inf")))),
        ("no rows", InputError, "0 rows", lambda w: ig.attribute(w.net, w.x[:0])),
        ("wrong number of targets", TargetError, "3 entries for 4", lambda w: ig.attribute(w.net, w.x, [0, 1, 2])),
        ("target out of range", TargetError, "class 3", lambda w: ig.attribute(w.net, w.x, 3)),
        ("target below 0", TargetError, "class -1", lambda w: ig.attribute(w.net, w.x, -1)),
        ("target that is a float", TargetError, "whole numbers", lambda w: ig.attribute(w.net, w.x, 0.0)),
        ("unknown site", SiteError, "no module", lambda w: ig.attribute(w.net, w.x, 0, site="nope")),
        ("site that is a number", SiteError, "string", lambda w: ig.attribute(w.net, w.x, 0, site=3)),  # pyright: ignore
        ("runner that is none", InputError, "Runner.*int", lambda w: ig.attribute(w.net, w.x, 0, runner=3)),  # pyright: ignore
        ("seed by name", InputError, "seed.*'a'", lambda w: ig.attribute(w.net, w.x, 0, seed="a")),  # pyright: ignore
        ("half a seed", InputError, "seed.*1.5", lambda w: ig.attribute(w.net, w.x, 0, seed=1.5)),  # pyright: ignore
        ("nonsense yielded", NisslError, "odd yielded int; methods yield Passes", lambda w: Odd(yields(3)).attribute(w.net, w.x)),
        ("nothing yielded", NisslError, "odd yielded NoneType", lambda w: Odd(yields(None)).attribute(w.net, w.x)),
        ("nonsense in a list", NisslError, "odd yielded str", lambda w: Odd(yields(["a"])).attribute(w.net, w.x)),
        ("a pair of nonsense", NisslError, "odd yielded", lambda w: Odd(yields((1, 2))).attribute(w.net, w.x)),
        ("nonsense returned", NisslError, "odd returned int.*explained", lambda w: Odd(returns(3)).attribute(w.net, w.x)),
        ("nothing returned", NisslError, "odd returned NoneType", lambda w: Odd(returns(None)).attribute(w.net, w.x)),
        ("no generator", NisslError, "odd.*generator.*NoneType", lambda w: Odd(lambda q: None).attribute(w.net, w.x)),
        ("scores of different shapes", InputError, "different shapes", lambda w: Odd(ragged).attribute(w.net, w.x)),
        ("model that gives NaN", NonFiniteError, "all sites are finite",
         lambda w: ig.attribute(w.network(lambda: Does(lambda o, x: o / 0 * 0)), w.x, 0)),
        ("layer that gives NaN", NonFiniteError, "first appears at site '1'",
         lambda w: ig.attribute(w.network(lambda: nn.Sequential(nn.ReLU(), nn.Threshold(9.0, float("nan")), nn.ReLU())), w.x, 0)),
        ("target that gives NaN", NonFiniteError, "NaN or infin", lambda w: Odd(returns(None)).attribute(w.net, w.x, lambda o: o[:, 0] / 0)),
        ("model that raises", InputError, "own trouble", lambda w: ig.attribute(w.network(lambda: Does(broken)), w.x, 0)),
        ("dimensions that do not fit", InputError, r"dims.*does not fit.*\(6,\)",
         lambda w: ig.attribute(Network(w.mlp, dims=("y", "x")), w.x, 0)),
    ]  # fmt: skip
    for name, error, says, act in rows:
        bad(f"attribute: {name}", error, says, act)

    def shared(w: World) -> tuple[Any, Any]:
        runner = Runner()
        a, b = (ig.attribute(w.net, w.x, 1, runner=runner) for _ in range(2))
        return a.values, torch.from_numpy(b.values)

    good("the same question twice", shared)

    def nothing(q: Any) -> Any:
        answers = yield []
        return explained(q, torch.full((6,), float(len(answers))), ("feature",))

    good("a method that asks nothing", lambda w: (Odd(nothing).attribute(w.net, w.x).values, np.zeros((4, 6))))


def spoiled(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 2] = value
    return x


class Attends(nn.Module):
    """One head of attention over two tokens of three features."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(3, 1, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(1))


def check_cases() -> None:
    checks: dict[str, Any] = {
        "curves": faithfulness.RegionCurves, "subsets": faithfulness.Subsets, "completeness": faithfulness.Completeness,
        "max_sensitivity": faithfulness.MaxSensitivity, "randomisation": sanity.WeightRandomisation,
        "logit": sanity.RandomLogit, "invariance": sanity.InputInvariance,
    }  # fmt: skip
    ixg = METHODS["ixg"]()

    def evaluate(w: World, name: str, scores: Any = None, **parameters: Any) -> Any:
        return checks[name](**parameters).evaluate(w.net, w.x, w.scores if scores is None else scores, 0, method=ixg)

    baselines = tuple(b for b in BASELINE if b is not None)
    for name, parameters in {
        "curves": {"steps": (*COUNT, 1), "size": OPTIONAL_COUNT, "baseline": baselines},
        "subsets": {"samples": (*COUNT, 2), "shares": ((), (0,), (1.5,), 0.5, "abc", ("a",), None, (float("nan"),)),
                    "size": OPTIONAL_COUNT, "baseline": baselines},
        "completeness": {"baseline": BASELINE},
        "max_sensitivity": {"samples": COUNT, "radius": (*SHARE, 0)},
        "randomisation": {"stages": COUNT, "independent": FLAG, "seed": ("a", 1.5, None)},
        "invariance": {"shift": (float("nan"), float("inf"), "a", None, 0)},
    }.items():  # fmt: skip
        for key, values in parameters.items():
            for value in values:
                shown = (
                    f"{type(value).__name__} {tuple(value.shape)}"
                    if isinstance(value, (Tensor, np.ndarray))
                    else repr(value)
                )
                bad(f"check {name}({key}={shown})", InputError, key,
                    lambda w, n=name, p={key: value}: evaluate(w, n, **p))  # fmt: skip

    one = xr.DataArray(np.ones((4, 6)), dims=("example", "feature"))
    for name, cls in checks.items():
        rows: list[tuple[str, type[NisslError], str, Callable[[World, Any], Any]]] = [
            ("scores that are an array", InputError, "DataArray", lambda w, c: c().evaluate(w.net, w.x, np.ones((4, 6)), 0, method=ixg)),
            ("scores of too few", InputError, "4 examples.*scores of 3", lambda w, c: c().evaluate(w.net, w.x, one[:3], 0, method=ixg)),
            ("scores of other dimensions", InputError, "first dimension", lambda w, c: c().evaluate(w.net, w.x, one.T, 0, method=ixg)),
            ("scores with NaN", InputError, "scores.*NaN", lambda w, c: c().evaluate(w.net, w.x, one * np.nan, 0, method=ixg)),
            ("scores that are words", InputError, "scores.*numbers",
             lambda w, c: c().evaluate(w.net, w.x, one.astype(str), 0, method=ixg)),
            ("a module for a network", InputError, "Network is needed", lambda w, c: c().evaluate(w.mlp, w.x, one, 0, method=ixg)),
            ("a target out of range", TargetError, "class 5", lambda w, c: c().evaluate(w.net, w.x, one, 5, method=ixg)),
            ("NaN in the inputs", InputError, "NaN", lambda w, c: c().evaluate(w.net, w.x * float("nan"), one, 0, method=ixg)),
            ("a method by name", InputError, "method.*'ixg'", lambda w, c: c().evaluate(w.net, w.x, one, 0, method="ixg")),
        ]  # fmt: skip
        for what, error, says, act in rows:
            bad(f"check {name}: {what}", error, says, lambda w, a=act, c=cls: a(w, c))
        if cls.reruns:
            bad(
                f"check {name}: no method",
                InputError,
                "method=",
                lambda w, c=cls: c().evaluate(w.net, w.x, w.scores, 0),
            )
    for name in ("curves", "subsets"):
        bad(f"check {name}: scores of another shape", InputError, "do not fit",
            lambda w, n=name: evaluate(w, n, xr.DataArray(np.ones((4, 2, 3)), dims=("example", "a", "b"))))  # fmt: skip
        bad(f"check {name}: tokens that are not there", InputError, "5 tokens have scores.*6|do not fit",
            lambda w, n=name: evaluate(w, n, xr.DataArray(np.ones((4, 5)), dims=("example", "token"))))  # fmt: skip
        bad(f"check {name}: too many features", InputError, "9.*6|do not fit",
            lambda w, n=name: evaluate(w, n, xr.DataArray(np.ones((4, 9)), dims=("example", "feature"))))  # fmt: skip
    for name in ("max_sensitivity", "randomisation", "logit", "invariance"):
        bad(f"check {name}: scores of another size", InputError, "5.*6|6.*5",
            lambda w, n=name: evaluate(w, n, xr.DataArray(np.ones((4, 5)), dims=("example", "feature"))))  # fmt: skip
    bad("randomisation without weights", InputError, "no weights",
        lambda w: sanity.WeightRandomisation().evaluate(w.network(nn.Identity), w.x, w.scores, 0, method=ixg))  # fmt: skip
    good("completeness of a linear model", lambda w: (
        faithfulness.Completeness().evaluate(n := w.network(lambda: nn.Linear(6, 3)), w.x, ixg.attribute(n, w.x, 1), 1)["completeness_gap"].to_numpy(),
        np.zeros(4)))  # fmt: skip
    good("curves of one feature", lambda w: (
        faithfulness.RegionCurves().evaluate(w.network(lambda: nn.Linear(1, 2)), w.x[:, :1],
                                             xr.DataArray(np.ones((4, 1)), dims=("example", "feature")), lambda o: o[:, 0]
                                             )["insertion_normalised"].to_numpy(), np.full(4, 0.5)))  # fmt: skip


def ground_truth_cases() -> None:
    ig = {"ixg": METHODS["ixg"]()}
    y = [0, 1, 2, 0]

    def asked(w: World, images: Any = None, labels: Any = y, methods: Any = ig, **options: Any) -> Any:
        return groundtruth.ground_truth(w.cnn, w.images if images is None else images, labels, methods, **options)

    for key, values in {
        "n": (0, 1, -2, 2.5, True, "2"), "n_grids": COUNT, "heads": OPTIONAL_COUNT, "budget": OPTIONAL_COUNT,
        "picture": COUNT, "confidence": (-1, 2, float("nan"), "a", None), "settings": ("gridpg", ("nope",), (), 3, None),
        "layers": ("input", 3), "seed": ("a", 1.5, None),
    }.items():  # fmt: skip
        for value in values:
            bad(f"ground truth: {key}={value!r}", InputError, key, lambda w, p={key: value}: asked(w, **p))
    rows: list[tuple[str, type[NisslError], str, Callable[[World], Any]]] = [
        ("unknown layer", SiteError, "no module 'nope'", lambda w: asked(w, layers=("nope",))),
        ("a module for a network", InputError, "Network is needed", lambda w: groundtruth.ground_truth(w.mlp, w.images, y, ig)),  # pyright: ignore
        ("no methods", InputError, "mapping", lambda w: asked(w, methods={})),
        ("methods in a list", InputError, "mapping", lambda w: asked(w, methods=["ixg"])),
        ("method by name", InputError, "not a method", lambda w: asked(w, methods={"ixg": "ixg"})),
        ("runner that is none", InputError, "Runner.*int", lambda w: asked(w, runner=3)),
        ("one image", InputError, r"images must be.*channels", lambda w: asked(w, images=w.images[0])),
        ("no images", InputError, "0 rows", lambda w: asked(w, images=w.images[:0])),
        ("NaN", InputError, "NaN", lambda w: asked(w, images=w.images * float("nan"))),
        ("too few labels", InputError, "4 class indices", lambda w: asked(w, labels=[0, 1])),
        ("labels that are floats", InputError, "class indices.*float", lambda w: asked(w, labels=[0.5, 1, 2, 0])),
        ("labels that are words", InputError, "class indices", lambda w: asked(w, labels=list("abca"))),
        ("labels that are wrong", InputError, "none of the 4 images", lambda w: asked(w, labels=[9, 9, 9, 9])),
        ("too few classes", InputError, "needs images of 4 classes|needs images of 3 classes", lambda w: asked(w, labels=None)),
        ("a network for tables", InputError, "failed", lambda w: groundtruth.ground_truth(w.net, w.images, y, ig)),
        ("a single output", InputError, "grids need classes",
         lambda w: groundtruth.ground_truth(w.network(lambda: CNN(1)), w.images, y, ig)),
        ("grids of tables", InputError, r"channels, height, width", lambda w: groundtruth.make_grids(w.x, y)),
        ("grids of too few classes", InputError, "classes", lambda w: groundtruth.make_grids(w.images, [0, 0, 0, 0])),
        ("grids of one cell", InputError, "n must", lambda w: groundtruth.make_grids(w.images, y, 1)),
        ("grids of no images", InputError, "class", lambda w: groundtruth.make_grids(w.images[:0], [])),
        ("shares of an odd map", InputError, "cannot be cut", lambda w: groundtruth.localization(torch.ones(2, 5, 5), 2)),
        ("shares of a table", InputError, "maps must be", lambda w: groundtruth.localization(torch.ones(2, 5), 2)),
        ("shares of text", InputError, "last dimensions", lambda w: groundtruth.localization("a", 2)),
        ("shares of NaN", InputError, "NaN", lambda w: groundtruth.localization(torch.full((2, 4, 4), float("nan")), 2)),
        ("shares in half a cell", InputError, "n must", lambda w: groundtruth.localization(torch.ones(2, 4, 4), 1.5)),  # pyright: ignore
        ("shares in no cells", InputError, "n must", lambda w: groundtruth.localization(torch.ones(2, 4, 4), 0)),
        ("shares at no size", InputError, "size", lambda w: groundtruth.localization(torch.ones(2, 4, 4), 2, size=(0, 4))),
        ("even kernel", InputError, "odd", lambda w: groundtruth.smooth(torch.ones(1, 4, 4), 2)),
        ("no kernel", InputError, "kernel", lambda w: groundtruth.smooth(torch.ones(1, 4, 4), 0)),
        ("half a kernel", InputError, "kernel", lambda w: groundtruth.smooth(torch.ones(1, 4, 4), 1.5)),  # pyright: ignore
        ("smoothed by name", InputError, "base.*'ixg'", lambda w: groundtruth.Smoothed("ixg")),  # pyright: ignore
        ("bins that fall", InputError, "bins", lambda w: groundtruth.aggatt(torch.ones(2, 4, 4), 2, 0, bins=(0, 0.9, 0.5, 1))),
        ("head out of range", InputError, "head", lambda w: groundtruth.aggatt(torch.ones(2, 4, 4), 2, 7)),
        ("masks of another number", InputError, "one a map", lambda w: groundtruth.pointing_game(np.ones((2, 4, 4)), np.ones((3, 4, 4)))),
        ("masks that are boxes", InputError, "boxes_to_masks", lambda w: groundtruth.pointing_game(np.ones((2, 4, 4)), np.ones((2, 4)))),
        ("masks that are empty", InputError, "empty", lambda w: groundtruth.pointing_game(np.ones((2, 4, 4)), np.zeros((2, 4, 4)))),
        ("scores with NaN", InputError, "NaN", lambda w: groundtruth.pointing_game(np.full((2, 4, 4), np.nan), np.ones((2, 4, 4)))),
        ("tolerance below 0", InputError, "tolerance", lambda w: groundtruth.pointing_game(np.ones((2, 4, 4)), np.ones((2, 4, 4)), -1)),
        ("tolerance by name", InputError, "tolerance",
         lambda w: groundtruth.pointing_game(np.ones((2, 4, 4)), np.ones((2, 4, 4)), "a")),  # pyright: ignore
        ("energy in empty masks", InputError, "empty", lambda w: groundtruth.energy_pointing_game(np.ones((2, 4, 4)), np.zeros((2, 4, 4)))),
        ("boxes of three numbers", InputError, r"\(example, 4\)", lambda w: groundtruth.boxes_to_masks(np.ones((2, 3)), 4, 4)),
        ("boxes that are words", InputError, "boxes", lambda w: groundtruth.boxes_to_masks([["a"] * 4], 4, 4)),
    ]  # fmt: skip
    for name, error, says, act in rows:
        bad(f"ground truth: {name}", error, says, act)


def number_cases() -> None:
    """Agreement and statistics."""
    maps = np.arange(24.0).reshape(2, 3, 4)
    a = agreement
    s = statistics
    rows: list[tuple[str, str, Callable[[], Any]]] = [
        ("no maps", "empty", lambda: a.agreement({})),
        ("maps in a list", "mapping.*list", lambda: a.agreement([maps])),  # pyright: ignore
        ("an unknown measure", "'cosine'.*spearman", lambda: a.agreement({"a": maps}, "cosine")),
        ("a measure that is a number", "measure.*3", lambda: a.agreement({"a": maps}, 3)),  # pyright: ignore
        ("a measure that gives one number", "measure.*2", lambda: a.agreement({"a": maps}, lambda x, y: np.ones(5))),
        ("maps of different shape", "differ in shape", lambda: a.agreement({"a": maps, "b": maps[:1]})),
        ("maps with NaN", "'a'.*NaN", lambda: a.agreement({"a": maps * np.nan})),
        ("maps of words", "numbers", lambda: a.spearman(np.array([["a"]]), np.array([["b"]]))),
        ("maps that are ragged", "a must be numbers", lambda: a.spearman([[1.0], [1.0, 2.0]], [[1.0], [1.0, 2.0]])),
        ("one number", r"shape \(n_examples, ...\)", lambda: a.spearman(1.0, 1.0)),
        ("empty maps", "entries", lambda: a.spearman(np.ones((0, 3)), np.ones((0, 3)))),
        ("pairs of different shape", "differ in shape", lambda: a.kendall(maps, maps[:, :2])),
        ("one place", "max_entries", lambda: a.kendall(maps, maps, max_entries=1)),
        ("half a place", "max_entries", lambda: a.kendall(maps, maps, max_entries=2.5)),  # pyright: ignore
        ("no fraction", "fraction", lambda: a.top_k(maps, maps, 0)),
        ("two fractions", "fraction", lambda: a.top_k(maps, maps, 2)),
        ("fraction that is NaN", "fraction", lambda: a.top_k(maps, maps, float("nan"))),
        ("fraction by name", "fraction", lambda: a.top_k(maps, maps, "a")),  # pyright: ignore
        ("similarity of tables", "height, width", lambda: a.ssim(maps[0], maps[0])),
        ("similarity of small maps", "3 × 3", lambda: a.ssim(maps[:, :2], maps[:, :2])),
        ("even window", "odd", lambda: a.ssim(maps, maps, window=4)),
        ("half a window", "window", lambda: a.ssim(maps, maps, window=3.5)),  # pyright: ignore
        ("bootstrap of words", "numbers", lambda: s.bootstrap(["a", "b"])),
        ("bootstrap of one number", "axis", lambda: s.bootstrap(3.0)),
        ("bootstrap of infinity", "infinite", lambda: s.bootstrap([1.0, np.inf])),
        ("bootstrap of a mode", "'mode'", lambda: s.bootstrap([1.0, 2.0], "mode")),  # pyright: ignore
        ("no resamples", "n_resamples", lambda: s.bootstrap([1.0, 2.0], n_resamples=0)),
        ("half a resample", "n_resamples", lambda: s.bootstrap([1.0, 2.0], n_resamples=2.5)),  # pyright: ignore
        ("level above 1", "level", lambda: s.bootstrap([1.0, 2.0], level=2)),
        ("level by name", "level", lambda: s.bootstrap([1.0, 2.0], level="a")),  # pyright: ignore
        ("seed below 0", "seed", lambda: s.bootstrap([1.0, 2.0], seed=-1)),
        ("seed by name", "seed", lambda: s.bootstrap([1.0, 2.0], seed="a")),  # pyright: ignore
        ("pairs without partners", "pairs", lambda: s.paired_test([1.0, 2.0], [1.0])),
        ("pairs that do not broadcast", "broadcast", lambda: s.paired_test(np.ones((2, 3)), np.ones((4, 3)))),
        ("pairs of words", "numbers", lambda: s.paired_test(["a"], ["b"])),
        ("an unknown side", "'up'", lambda: s.paired_test([1.0], [2.0], "up")),  # pyright: ignore
        ("no permutations", "n_permutations", lambda: s.paired_test([1.0], [2.0], n_permutations=0)),
        ("half a permutation", "n_permutations", lambda: s.paired_test([1.0], [2.0], n_permutations=2.5)),  # pyright: ignore
        ("p above 1", r"\[0, 1\]", lambda: s.holm([0.5, 2])),
        ("p below 0", r"\[0, 1\]", lambda: s.benjamini_hochberg([-0.1])),
        ("p that is a word", "numbers", lambda: s.holm(["a"])),
        ("area of a point", "2 points", lambda: s.area([1.0])),
        ("x that falls", "increase", lambda: s.area([1.0, 2.0], [1.0, 0.0])),
        ("x that stands", "increase", lambda: s.area([1.0, 2.0], [1.0, 1.0])),
        ("x of another length", "x has the shape", lambda: s.area([1.0, 2.0], [1.0, 2.0, 3.0])),
        ("x with NaN", "increase", lambda: s.area([1.0, 2.0], [0.0, np.nan])),
    ]  # fmt: skip
    for name, says, act in rows:
        bad(f"numbers: {name}", InputError, says, lambda w, a=act: a())
    good(
        "numbers: a constant map agrees with nothing",
        lambda w: (bool(np.isnan(a.spearman(maps, maps * 0)).all()), True),
    )
    good("numbers: one example has no interval", lambda w: (
        (float((i := s.bootstrap([3.0])).value), bool(np.isnan(i.low)), int(i.n)), (3.0, True, 1)))  # fmt: skip
    good("numbers: no examples", lambda w: (bool(np.isnan(s.bootstrap(np.ones((0,))).value)), True))


def audit_cases() -> None:
    fast: dict[str, Any] = {"methods": ["ixg"], "checks": ["curves"], "runner_options": {"progress": False}}

    def audited(w: World, **options: Any) -> Any:
        return audit(
            options.pop("network", w.net),
            options.pop("inputs", w.x),
            options.pop("targets", None),
            **{**fast, **options},
        )

    for key, values in {"budget": OPTIONAL_COUNT, "sanity_examples": COUNT, "seed": ("a", 1.5, None, -1)}.items():
        for value in values:
            bad(f"audit: {key}={value!r}", InputError, key, lambda w, p={key: value}: audited(w, **p))
    rows: list[tuple[str, type[NisslError], str, Callable[[World], dict[str, Any]]]] = [
        ("no methods", InputError, "no method", lambda w: {"methods": []}),
        ("no named methods", InputError, "no method", lambda w: {"methods": {}}),
        ("a method twice", InputError, "'ixg' is named twice", lambda w: {"methods": ["ixg", "ixg"]}),
        ("a method twice, once as an object", InputError, "named twice", lambda w: {"methods": ["ixg", METHODS["ixg"]()]}),
        ("an unknown method", InputError, "did you mean saliency", lambda w: {"methods": ["salency"]}),
        ("a method that is a number", InputError, "3", lambda w: {"methods": [3]}),
        ("methods that are a number", InputError, "methods.*3", lambda w: {"methods": 3}),
        ("a bad parameter", InputError, "steps", lambda w: {"methods": ["ig(steps=0)"]}),
        ("no checks", InputError, "no check", lambda w: {"checks": []}),
        ("an unknown check", InputError, "did you mean.*curves", lambda w: {"checks": ["curve"]}),
        ("checks that are a number", InputError, "checks.*3", lambda w: {"checks": 3}),
        ("a check that is a number", InputError, "no check 3", lambda w: {"checks": [3]}),
        ("a check twice", InputError, "'curves' is named twice", lambda w: {"checks": ["curves", "curves"]}),
        ("a network of nothing", InputError, "torch module", lambda w: {"network": None}),
        ("NaN", InputError, r"NaN or infinity in examples \[1\]", lambda w: {"inputs": spoiled(w.x, float("nan"))}),
        ("no rows", InputError, "0 rows", lambda w: {"inputs": w.x[:0]}),
        ("text", InputError, "str", lambda w: {"inputs": "text"}),
        ("inputs that do not fit", InputError, "failed", lambda w: {"inputs": torch.ones(4, 5)}),
        ("a target out of range", TargetError, "class 3", lambda w: {"targets": [0, 1, 3, 0]}),
        ("a target below 0", TargetError, "class -1", lambda w: {"targets": -1}),
        ("a target that is a float", TargetError, "whole numbers", lambda w: {"targets": 0.5}),
        ("too few targets", TargetError, "2 entries for 4", lambda w: {"targets": [0, 1]}),
        ("gradients of a function", InputError, "needs gradients", lambda w: {"network": lambda x: x}),
        ("a model that raises", InputError, "own trouble", lambda w: {"network": w.module(lambda: Does(broken))}),
        ("a model that gives NaN", NonFiniteError, "NaN", lambda w: {"network": w.module(lambda: Does(lambda o, x: o * float("nan")))}),
        ("a model that gives a tuple", TargetError, "several things", lambda w: {"network": w.module(lambda: Does(lambda o, x: (o, x)))}),
        ("too few names", InputError, "names has 1 entries for 4", lambda w: {"shown": Shown(names=["a"])}),
        ("too many masks", InputError, "masks has 5", lambda w: {"shown": Shown(masks=np.ones((5, 2, 2), bool))}),
        ("shown that is a number", InputError, "Shown.*int", lambda w: {"shown": 3}),
        ("images of numbers", InputError, r"images.*uint8", lambda w: {"shown": Shown(images=np.ones((4, 2, 2, 3)))}),
        ("images without colours", InputError, r"images.*\(4, 2, 2\)", lambda w: {"shown": Shown(images=np.ones((4, 2, 2), np.uint8))}),
        ("masks of a table", InputError, "masks.*height", lambda w: {"shown": Shown(masks=np.ones((4, 6), bool))}),
        ("masks that are empty", InputError, "empty", lambda w: {"shown": Shown(masks=np.zeros((4, 2, 2), bool))}),
        ("names that are a number", InputError, "names.*3", lambda w: {"shown": Shown(names=3)}),  # pyright: ignore
        ("class names that are one word", InputError, "class_names", lambda w: {"shown": Shown(class_names="abc")}),
        ("a runner that is none", InputError, "Runner.*int", lambda w: {"runner": 3}),
        ("unknown options of a runner", InputError, "runner_options.*speed", lambda w: {"runner_options": {"speed": 9}}),
        ("bad options of a runner", InputError, "batch_size", lambda w: {"runner_options": {"batch_size": 0}}),
        ("settings that are a number", InputError, "VerdictSettings.*int", lambda w: {"settings": 3}),
        ("a run folder that is a file", RunFolderError, "is a file", lambda w: {"out": w.folder / "file.txt"}),
        ("a run folder in a file", RunFolderError, "cannot be written", lambda w: {"out": w.folder / "file.txt" / "run"}),
        ("a run folder with other things", RunFolderError, "thesis.tex", lambda w: {"out": w.folder / "runs" / "foreign"}),
        ("a run folder of other settings", RunFolderError, "other settings", lambda w: {"out": w.folder / "runs" / "unfinished", "resume": True}),
        ("a cut run folder", RunFolderError, "run.json cannot be read", lambda w: {"out": w.folder / "runs" / "cut_json", "resume": True}),
        ("a run folder that is a number", InputError, "int 3", lambda w: {"out": 3}),
        ("a bad target, and a folder", TargetError, "class 9", lambda w: {"out": w.folder / "new", "targets": 9}),
        ("a bad method, and a folder", InputError, "no method", lambda w: {"out": w.folder / "new", "methods": ["nope"]}),
        ("a bad option, and a folder", InputError, "batch_size", lambda w: {"out": w.folder / "new", "runner_options": {"batch_size": 0}}),
        ("bad images, and a folder", InputError, "images", lambda w: {"out": w.folder / "new", "shown": Shown(images=np.ones((4, 2, 2, 3)))}),
    ]  # fmt: skip
    for name, error, says, options in rows:
        bad(f"audit: {name}", error, says, lambda w, o=options: audited(w, **o(w)))
    good("audit: one example of one output", lambda w: (
        list(audit(w.network(lambda: nn.Linear(6, 1)), w.x[:1], **fast).table.index), ["ixg", "random", "edge"]))  # fmt: skip
    good("audit: one pixel", lambda w: (
        list(audit(w.network(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2))), w.images[:2, :, :1, :1], **fast).table.index),
        ["ixg", "random", "edge"]))  # fmt: skip


def folder_cases() -> None:
    def run(w: World, name: str, settings: Any = SETTINGS, resume: bool = True) -> RunFolder:
        return RunFolder(w.folder / "runs" / name if isinstance(name, str) else name, settings, resume)

    def busy(w: World) -> Any:
        first = run(w, "unfinished")
        try:
            return run(w, "unfinished")
        finally:
            first.close()

    def kept(name: str) -> Callable[[World], Any]:
        def act(w: World) -> Any:
            folder = run(w, name)
            try:
                return folder.kept("ig-0")
            finally:
                folder.close()

        return act

    rows: list[tuple[str, type[NisslError], str, Callable[[World], Any]]] = [
        ("a file", RunFolderError, "is a file", lambda w: run(w, "../file.txt")),
        ("in a file", RunFolderError, "cannot be written", lambda w: run(w, "../file.txt/run")),
        ("where nothing can be made", RunFolderError, "cannot be written", lambda w: RunFolder("/proc/nissl-run", SETTINGS, False)),
        ("a number", InputError, "int 3", lambda w: RunFolder(3, SETTINGS, False)),  # pyright: ignore
        ("nothing", InputError, "NoneType", lambda w: RunFolder(None, SETTINGS, False)),  # pyright: ignore
        ("a null byte", RunFolderError, "cannot", lambda w: RunFolder("a\0b", SETTINGS, False)),
        ("a name that is too long", RunFolderError, "cannot", lambda w: RunFolder("a" * 5000, SETTINGS, False)),
        ("other things", RunFolderError, "thesis.tex", lambda w: run(w, "foreign")),
        ("somebody's home", RunFolderError, "holds other things", lambda w: RunFolder(w.folder, SETTINGS, False)),
        ("busy", RunFolderError, "another run", busy),
        ("cut run.json", RunFolderError, "run.json cannot be read.*delete", lambda w: run(w, "cut_json")),
        ("run.json with a list", RunFolderError, "no record of a run", lambda w: run(w, "list_json")),
        ("run.json that is a folder", RunFolderError, "run.json", lambda w: run(w, "nested")),
        ("run.json that is a folder, anew", RunFolderError, "run.json", lambda w: run(w, "nested", resume=False)),
        ("other settings", RunFolderError, "other settings.*seed", lambda w: run(w, "unfinished", {**SETTINGS, "seed": 1})),
        ("settings that are no text", InputError, "settings", lambda w: run(w, "new", {"x": object()})),
        ("settings in a list", InputError, "settings", lambda w: run(w, "new", [1])),
        ("cut scores of a job", RunFolderError, "ig-0.npz cannot be read.*delete", kept("cut_kept")),
        ("empty scores of a job", RunFolderError, "ig-0.npz cannot be read", kept("short_kept")),
        ("pickled scores of a job", RunFolderError, "ig-0.npz cannot be read", kept("pickled_kept")),
        ("other arrays of a job", RunFolderError, "ig-0.npz cannot be read", kept("other_kept")),
        ("odd facts of a job", RunFolderError, "ig-0.npz cannot be read", kept("odd_kept")),
        ("load: nothing there", RunFolderError, "no finished run", lambda w: load_run(w.folder / "nothing")),
        ("load: a file", RunFolderError, "no finished run", lambda w: load_run(w.folder / "file.txt")),
        ("load: an empty folder", RunFolderError, "no finished run", lambda w: load_run(w.folder / "empty")),
        ("load: a number", InputError, "int 3", lambda w: load_run(3)),  # pyright: ignore
        ("load: unfinished", RunFolderError, "not finished", lambda w: load_run(w.folder / "runs" / "unfinished")),
        ("load: cut run.json", RunFolderError, "no finished run", lambda w: load_run(w.folder / "runs" / "cut_json")),
        ("load: run.json with a list", RunFolderError, "no finished run", lambda w: load_run(w.folder / "runs" / "list_json")),
        ("load: no scores", RunFolderError, "no finished run", lambda w: load_run(w.folder / "runs" / "no_scores")),
        ("load: bad scores", RunFolderError, "no finished run", lambda w: load_run(w.folder / "runs" / "bad_scores")),
        ("load: no figures", RunFolderError, "no finished run", lambda w: load_run(w.folder / "runs" / "no_figures")),
        ("load: cut figures", RunFolderError, "no finished run", lambda w: load_run(w.folder / "runs" / "cut_figures")),
    ]  # fmt: skip
    for name, error, says, act in rows:
        bad(f"run folder: {name}", error, says, act)
    good("run folder: finished", lambda w: (load_run(w.folder / "runs" / "done")[0]["ig"].values, np.ones((2, 3))))


def report_cases() -> None:
    grid = xr.DataArray(np.arange(18.0).reshape(2, 3, 3), dims=("example", "y", "x"))

    @functools.cache
    def result() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module, x = MLP(), torch.randn(2, 6)
        return audit(module, x, methods=["ixg"], checks=["curves"], runner_options={"progress": False})

    rows: list[tuple[str, type[NisslError], str, Callable[[World], Any]]] = [
        ("no folder", RunFolderError, "cannot be written", lambda w: write_report(result(), w.folder / "nowhere" / "a.html")),
        ("a folder", RunFolderError, "cannot be written", lambda w: write_report(result(), w.folder / "empty")),
        ("in a file", RunFolderError, "cannot be written", lambda w: write_report(result(), w.folder / "file.txt" / "a.html")),
        ("where nothing can be made", RunFolderError, "cannot be written", lambda w: write_report(result(), "/proc/a.html")),
        ("no path", InputError, "NoneType", lambda w: write_report(result(), None)),  # pyright: ignore
        ("an empty path", RunFolderError, "cannot be written", lambda w: write_report(result(), "")),
        ("an open file", InputError, "StringIO", lambda w: write_report(result(), io.StringIO())),  # pyright: ignore
        ("shown below 0", InputError, "shown", lambda w: write_report(result(), w.folder / "a.html", -1)),
        ("half shown", InputError, "shown", lambda w: write_report(result(), w.folder / "a.html", 1.5)),  # pyright: ignore
        ("shown by name", InputError, "shown", lambda w: write_report(result(), w.folder / "a.html", "a")),  # pyright: ignore
        ("no result", InputError, "AuditResult.*NoneType", lambda w: write_report(None, w.folder / "a.html")),  # pyright: ignore
        ("scores for a result", InputError, "AuditResult.*DataArray", lambda w: write_report(grid, w.folder / "a.html")),  # pyright: ignore
        ("unknown kind", InputError, "sound",
         lambda w: write_report(dataclasses.replace(result(), input_kind="sound"), w.folder / "a.html")),
        ("too few examples", InputError, "describes only",
         lambda w: write_report(dataclasses.replace(result(), examples=result().examples[:1]), w.folder / "a.html")),
        ("scores of another method", InputError, "not in result.table",
         lambda w: write_report(dataclasses.replace(result(), scores={"nope": grid}), w.folder / "a.html")),
        ("plot of an array", InputError, "DataArray.*ndarray", lambda w: plot(np.ones((2, 3, 3)))),  # pyright: ignore
        ("plot of nothing", InputError, "DataArray.*NoneType", lambda w: plot(None)),  # pyright: ignore
        ("plot of other dimensions", InputError, "cannot be drawn", lambda w: plot(grid.rename(x="z"))),
        ("plot of example 9", InputError, "example 9.*0 to 1", lambda w: plot(grid, example=9)),
        ("plot of example -1", InputError, "example -1", lambda w: plot(grid, example=-1)),
        ("plot of half an example", InputError, "example.*0.5", lambda w: plot(grid, example=0.5)),  # pyright: ignore
        ("plot over too few inputs", InputError, "inputs has examples 0 to 0", lambda w: plot(grid, np.ones((1, 3, 3, 3)), 1)),
        ("plot over a number", InputError, "inputs.*3", lambda w: plot(grid, 3)),
        ("plot over grey images", InputError, r"\(H, W, 3\)", lambda w: plot(grid, np.ones((2, 3, 3)))),
        ("plot over images that are normalised", InputError, "0 to 1", lambda w: plot(grid, np.full((2, 3, 3, 3), -2.0))),
        ("plot over words", InputError, "image|numbers", lambda w: plot(grid, np.full((2, 3, 3, 3), "a"))),
        ("plot over another number of channels", InputError, "channels",
         lambda w: plot(grid.rename(y="channel", x="time"), np.ones((2, 5, 3)))),
        ("plot over more tokens", InputError, "tokens", lambda w: plot(grid[:, 0].rename(x="token"), [list("abcd")] * 2)),
        ("plot of words", InputError, "numbers", lambda w: plot(grid.astype(str))),
    ]  # fmt: skip
    for name, error, says, act in rows:
        bad(f"report: {name}", error, says, act)
    good("report: NaN is drawn as nothing", lambda w: (len(plot(grid * np.nan).axes), 1))
    for slug in ("nope", "", "difulll"):
        bad(
            f"paper {slug!r}",
            InputError,
            "no paper.*difull" if slug == "difulll" else "no paper",
            lambda w, s=slug: paper(s),
        )
    for slug in (None, 3, ["difull"]):
        bad(f"paper {slug!r}", InputError, "short name", lambda w, s=slug: paper(s))  # pyright: ignore


def source_cases() -> None:
    rows: list[tuple[str, str, Any]] = [
        ("empty", "names no model", ""),
        ("unknown", "names no model", "nope"),
        ("nothing", "NoneType", None),
        ("a number", "int 3", 3),
        ("no such module", "no module 'nowhere'", "nowhere:net"),
        ("no such name", "nothing called 'nett'.*net", "mine:nett"),
        ("syntax error", "importing syntax failed: SyntaxError", "syntax:net"),
        ("module that exits", "importing exits failed: SystemExit", "exits:net"),
        ("needs arguments", "needs arguments.*what", "mine:needs"),
        ("makes a number", "made 3", "mine:number"),
        ("is text", "is a str", "mine:text"),
        ("fails", "OSError.*no such disk", "mine:fails"),
        ("exits", "SystemExit", "mine:leaves"),
        ("not fitted", "not fitted", "mine:unfitted"),
        ("unknown option", "unknown option 'fast'", "mine:net?fast"),
        ("no classes", "unknown option 'classes=0'", "mine:net?classes=0"),
        ("classes of a factory", "weights=FILE only", "mine:net?classes=3"),
        ("no file named", "names no file", "mine:net?weights="),
        ("no such file", "no such file", "mine:net?weights=nothing.pt"),
        ("weights in a csv", "read from", "mine:net?weights=list.csv"),
        ("weights that are text", "text.pt.*broken|cannot be read", "mine:net?weights=text.pt"),
        ("weights that would run code", "would have to run code", "mine:net?weights=pickle.pt"),
        ("cut weights", "cut.pt.*(broken|cannot be read)", "mine:net?weights=cut.pt"),
        ("weights in a list", "holds list", "mine:net?weights=list.pt"),
        ("weights that are a number", "no tensor", "mine:net?weights=number.pt"),
        ("cut safetensors", "cannot be read", "mine:net?weights=cut.safetensors"),
        ("text in safetensors", "cannot be read", "mine:net?weights=text.safetensors"),
        ("weights with NaN", "1.bias holds NaN", "mine:net?weights=nan.safetensors"),
        ("weights of another shape", r"1.bias \(4,\) instead of \(3,\)", "mine:net?weights=shape.safetensors"),
        ("weights that lack one", "1 missing: 1.weight", "mine:net?weights=missing.safetensors"),
        ("no transformers folder", "nothing", "hf:nothing"),
        ("an empty transformers folder", "empty", "hf:empty"),
    ]  # fmt: skip
    for name, says, spec in rows:
        bad(f"model: {name}", InputError, says, lambda w, s=spec: load_model(s))

    def loaded(model: str) -> Any:
        path = list(sys.path)
        try:
            return load_model(model)
        finally:  # it leaves the current folder there, on purpose; these cases are about what comes after
            sys.path[:] = path

    def data(spec: Any, model: str = "mine:net", **options: Any) -> Callable[[World], Any]:
        return lambda w: load_data(spec, loaded(model), **options)

    more: list[tuple[str, str, Callable[[World], Any]]] = [
        ("missing", "no file or folder", data("nothing.npz")),
        ("nothing", "NoneType", data(None)),
        ("a number", "int 3", data(3)),
        ("a null byte", "cannot be looked up|no file", data("a\0b")),
        ("text", "neither a folder", data("file.txt")),
        ("text in npz", "text.npz.*broken", data("text.npz")),
        ("cut npz", "cut.npz.*broken", data("cut.npz")),
        ("npz with objects", "could run code", data("objects.npz")),
        ("npz without x", "no key x", data("no_x.npz")),
        ("npz without rows", "at least one row", data("no_rows.npz")),
        ("npz with a scalar", "at least one row", data("scalar.npz")),
        ("npz with words", "expected numbers", data("words.npz")),
        ("npz with NaN", "1 of 4 examples hold NaN.*'1'", data("nan.npz")),
        ("npz with huge numbers", "too large", data("huge.npz")),
        ("too few labels", r"shape \(4,\), got \(2,\)", data("y_few.npz")),
        ("label out of range", "label 9.*0 to 2", data("y_high.npz", "mine:three")),
        ("label below 0", "label -1", data("y_negative.npz")),
        ("half a label", "indices or names", data("y_half.npz")),
        ("label that is NaN", "indices or names", data("y_nan.npz")),
        ("labels that are names", "'a'.*no class", data("y_names.npz")),
        ("labels in a table", "argmax", data("y_hot.npz")),
        ("masks of another shape", r"masks must be.*\(2, 8, 8\)", data("masks_shape.npz", "mine:seen")),
        ("masks that are empty", "empty", data("masks_empty.npz", "mine:seen")),
        ("boxes that leave the picture", "leaves the picture", data("boxes.npz", "mine:seen")),
        ("an empty folder", "no pictures", data("empty", "mine:seen")),
        ("a broken picture", "a.png.*cannot be read", data("broken", "mine:seen")),
        ("a cut picture", "cut.png.*cannot be read", data("cut.png", "mine:seen")),
        ("a table without columns", "columns file and label", data("table", "mine:seen")),
        ("a table with a row twice", "there twice", data("twice", "mine:seen")),
        ("a table with a stranger", "no picture of this folder", data("stranger", "mine:seen")),
        ("a label in some names", "has none", data("some", "mine:seen")),
        ("pictures in two places", "one place", data("both", "mine:seen")),
        ("a factory that fails", "no such disk", data("mine:fails")),
        ("a factory that makes a number", "made a int", data("mine:number")),
        ("a factory that makes no rows", "at least one row", data("mine:empty")),
        ("no examples", "n must", data("data.npz", n=0)),
        ("examples below 0", "n must", data("data.npz", n=-1)),
        ("half an example", "n must", data("data.npz", n=1.5)),
        ("True examples", "n must", data("data.npz", n=True)),
        ("examples by name", "n must", data("data.npz", n="2")),
        ("too many examples", "holds 4 examples, n = 9", data("data.npz", n=9)),
        ("a seed below 0", "seed", data("data.npz", n=2, seed=-1)),
        ("half a seed", "seed", data("data.npz", n=2, seed=1.5)),
        ("a seed by name", "seed", data("data.npz", n=2, seed="a")),
        ("no size", "size", data("whole.png", "mine:seen", size=0)),
        ("a size by name", "size", data("whole.png", "mine:seen", size="a")),
        ("half a size", "size", data("whole.png", "mine:seen", size=2.5)),
        ("a size of three numbers", "size", data("whole.png", "mine:seen", size=(1, 2, 3))),
        ("a mean of two numbers", "mean", data("whole.png", "mine:seen", mean=(1, 2))),
        ("a mean that is NaN", "mean", data("whole.png", "mine:seen", mean=float("nan"))),
        ("a deviation of 0", "std", data("whole.png", "mine:seen", std=0)),
        ("a deviation by name", "std", data("whole.png", "mine:seen", std="a")),
        ("a module for a model", "LoadedModel.*Sequential", lambda w: load_data("data.npz", w.mlp)),  # pyright: ignore
    ]  # fmt: skip
    for name, says, act in more:
        bad(f"data: {name}", InputError, says, act)
    for name in ("whole", "grey", "alpha", "pixel"):
        good(f"data: a picture, {name}",
             lambda w, n=name: (tuple(load_data(f"{n}.png", load_model("mine:seen"), size=(6, 9)).inputs.shape), (1, 3, 6, 9)))  # pyright: ignore  # fmt: skip
    good("data: one's own weights",
         lambda w: (load_model("mine:net?weights=good.safetensors").module(w.x).detach(), (w.x.sum(1, keepdim=True) + 1).expand(4, 3)))  # fmt: skip


def command_cases() -> None:
    own = "--model mine:net --data data.npz"
    for name, says, words in (
        ("audit of an unknown model", "names no model", "audit --model nope --data data.npz"),
        ("audit without data", "--data", "audit --model mine:net"),
        ("audit of missing data", "nothing.npz", "audit --model mine:net --data nothing.npz"),
        ("audit of cut data", "broken", "audit --model mine:net --data cut.npz"),
        ("audit of pickled data", "could run code", "audit --model mine:net --data objects.npz"),
        ("audit with pickled weights", "run code", "audit --model mine:net?weights=pickle.pt --data data.npz"),
        ("audit of a model that raises", "own trouble", "audit --model mine:raises --data data.npz --methods ixg"),
        ("audit of data that do not fit", "failed", "audit --model mine:net --data pixels.npz --methods ixg"),
        ("audit of no examples", "n must", f"audit {own} --examples 0"),
        ("audit of too many examples", "n = 9", f"audit {own} --examples 9"),
        ("audit with an unknown method", "saliency", f"audit {own} --methods salency"),
        ("audit with no method", "no method", f"audit {own} --methods ,"),
        ("audit with a bad parameter", "steps", f"audit {own} --methods ig(steps=0)"),
        ("audit with an open bracket", "specification|named like", f"audit {own} --methods ig(steps=3"),
        ("audit with an unknown check", "curves", f"audit {own} --checks curve"),
        ("audit with no check", "check", f"audit {own} --checks ,"),
        ("audit with a negative budget", "budget", f"audit {own} --budget -1"),
        ("audit with no batch", "batch_size", f"audit {own} --batch-size 0 --methods ixg"),
        ("audit on an unknown device", "warp", f"audit {own} --device warp"),
        ("audit of an unknown target", "predicted", f"audit {own} --target best"),
        ("audit of labels out of range", "class 9|label 9", "audit --model mine:net --data y_high.npz --target label"),
        ("audit with a seed below 0", "seed", f"audit {own} --seed -1"),
        ("audit into a file", "is a file", f"audit {own} --methods ixg --checks curves --out file.txt"),
        ("audit into a folder of other things", "thesis.tex", f"audit {own} --methods ixg --checks curves --out runs/foreign"),
        ("audit goes on with a cut run", "run.json", f"audit {own} --methods ixg --checks curves --resume --out runs/cut_json"),
        ("audit goes on with another run", "other settings",
         f"audit {own} --methods ixg --checks curves --resume --out runs/unfinished"),
        ("sites of an unknown model", "names no model", "sites --model nope"),
        ("sites with cut data", "broken", "sites --model mine:net --data cut.npz"),
        ("sites with data that do not fit", "failed", "sites --model mine:net --data pixels.npz"),
        ("reproduce nothing", "no paper", "reproduce nope"),
        *[("reproduce what has no study", "no study yet", f"reproduce {p.slug}") for p in PAPERS if p.study is None][:1],
    ):  # fmt: skip
        command(name, says, words)
    command("with an unknown command", "No such command", "explain", lines=None)
    command("with an unknown option", "No such option", "audit --fast", lines=None)
    command("with half a budget", "budget", f"audit {own} --budget 1.5", lines=None)


def main(out: str, wanted: str = "") -> None:
    """Run the cases whose name holds `wanted` and write what is wrong with each."""
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        here = Path.cwd()
        write_files(here)
        for name, case in CASES.items():
            if wanted in name:
                found[name] = run(case, here)
                if found[name]:
                    print(name, *found[name], sep="\n    ")
        os.chdir("/")
    Path(out).write_text(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What is wrong with each case; of several workers of pytest one runs them for all."""
    own = tmp_path_factory.getbasetemp()
    out = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "bad input.json"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            done = subprocess.run([sys.executable, __file__, str(out)], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def list_cases() -> Iterable[str]:
    for some in (network_cases, pass_cases, edit_cases, target_cases, method_cases, check_cases, ground_truth_cases,
                 number_cases, audit_cases, folder_cases, report_cases, source_cases, command_cases):  # fmt: skip
        some()
    return CASES


def test_wrong_values_are_listed_for_every_parameter_of_every_method() -> None:
    assert {f.name for cls in METHODS.values() for f in dataclasses.fields(cls)} <= set(WRONG)


@pytest.mark.parametrize("name", list_cases())
def test_bad_input(name: str, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[name] == []


if __name__ == "__main__":
    main(*sys.argv[1:])
