"""The audit end to end on small networks: verdicts, records, resuming."""

import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from torch import nn

import nissl
from nissl.attribution import METHODS, IntegratedGradients
from nissl.errors import FinishedRunError, InputError, RunFolderError
from nissl.runner import Runner
from nissl.trust.audit import Shown
from nissl.trust.run_folder import RunFolder, load_run


@pytest.fixture(scope="module")
def planted():
    """A network that looks at three of twelve features only; the others are large and do nothing."""
    module = nn.Linear(12, 2, bias=False)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0, :3] = torch.tensor([2.0, 1.5, 1.0])
        module.weight[1, 3:6] = torch.tensor([1.0, 1.5, 2.0])
    x = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) + 0.2
    return nissl.Network(module), x


def test_a_faithful_method_is_believed_and_ignorant_ones_are_not(planted):
    net, x = planted
    result = nissl.audit(net, x, targets=0, methods=["ixg"], runner=Runner(progress=False))
    assert list(result.table.index) == ["ixg", "random", "edge"]
    assert result.table.verdict["random"] == result.table.verdict["edge"] == "do not believe"
    assert result.table.verdict["ixg"] in ("believe", "with care")
    assert result.table.faithfulness["ixg"] > result.table.faithfulness["random"]
    assert (
        result.table.faithfulness_low["ixg"]
        <= result.table.faithfulness["ixg"]
        <= result.table.faithfulness_high["ixg"]
    )
    assert result.table.forward["ixg"] == 1
    assert result.table.randomisation_similarity["edge"] == 1


def test_an_upside_down_method_is_not_believed(planted):
    net, x = planted

    class Negated(IntegratedGradients):
        name = "negated"
        complete = False

        def explain(self, q):
            found = yield from super().explain(q)
            return nissl.runner.Explained(-found.values, found.dims)

    result = nissl.audit(net, x, targets=0, methods=[Negated()], checks=["curves"], runner=Runner(progress=False))
    assert result.table.verdict["negated"] == "do not believe"


def test_four_examples_decide_nothing_and_say_so(planted):
    net, x = planted
    result = nissl.audit(net, x[:4], targets=0, methods=["ixg"], runner=Runner(progress=False))
    assert result.table.verdict["ixg"] == "undecided"
    assert "examples" in " ".join(result.table.reasons["ixg"])


def test_the_same_seed_gives_the_same_audit(planted):
    net, x = planted
    a, b = (
        nissl.audit(
            net,
            x[:3],
            methods=["smoothgrad", "rise"],
            checks=["curves", "subsets"],
            seed=5,
            runner=Runner(batch_size=k, progress=False),
        )
        for k in (1, 16)
    )
    assert np.allclose(a.figures.value, b.figures.value, atol=1e-5)


def test_targets_are_the_predicted_classes_by_default(planted):
    net, x = planted
    result = nissl.audit(net, x[:3], methods=["ixg"], checks=["curves"], shown=Shown(class_names=["cat", "dog"]))
    best = net.run(nissl.Pass(x[:3])).output.argmax(1)
    assert list(result.examples.label) == [["cat", "dog"][i] for i in best]


def test_a_black_box_is_audited_with_methods_that_need_no_gradient():
    def predict(a):
        z = np.stack([2 * a[:, 0] + a[:, 1], a[:, 2]], 1)
        return np.exp(z) / np.exp(z).sum(1, keepdims=True)

    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    result = nissl.audit(predict, x, budget=32, runner=Runner(progress=False))
    assert set(result.table.index) == {"occlusion", "rise", "lime", "kernelshap", "shapley", "random", "edge"}
    with pytest.raises(InputError, match="needs gradients"):
        nissl.audit(predict, x, methods=["ig"])


@pytest.mark.parametrize("kind", ["image", "series", "token"])
def test_every_kind_of_input(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "image":
        net = nissl.Network(
            nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
        )
        x, keys = torch.rand(3, 3, 28, 28), ["ixg", "gradcam"]
    elif kind == "series":
        net = nissl.Network(nn.Sequential(nn.Conv1d(4, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 60, 3)))
        x, keys = torch.rand(3, 4, 64), ["ixg", "occlusion", "gradcam"]
    else:
        net = nissl.Network(nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(48, 3)))
        x, keys = torch.randint(1, 20, (3, 6)), ["ixg", "occlusion"]
    result = nissl.audit(net, x, methods=keys, out=tmp_path / "run", runner=Runner(progress=False))
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert result.input_kind == kind
    assert np.isfinite(result.table.faithfulness).all()


def test_the_run_folder_holds_everything_and_nothing_half(planted, tmp_path):
    net, x = planted
    result = nissl.audit(
        net,
        x[:3],
        methods=["ixg", "ig(steps=4)"],
        checks=["curves"],
        out=tmp_path / "run",
        runner=Runner(progress=False),
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "report.html",
        "run.json",
        "scores.zarr",
        "trust.parquet",
    ]
    scores, figures, record = load_run(tmp_path / "run")
    assert set(scores) == {"ixg", "ig(steps=4)", "random", "edge"}
    assert np.array_equal(scores["ixg"], result.scores["ixg"])
    assert len(figures) == len(result.figures)
    assert record["verdicts"]["random"] == "do not believe"
    assert json.loads(json.dumps(result.summary(), allow_nan=False))["report"].endswith("report.html")


def test_a_folder_is_used_by_one_run_at_a_time_and_never_overwrites_what_is_no_run(planted, tmp_path):
    held = RunFolder(tmp_path / "run", {"a": 1}, resume=False)
    with pytest.raises(RunFolderError, match="another run"):
        RunFolder(tmp_path / "run", {"a": 1}, resume=False)
    held.close()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RunFolderError, match="holds other things"):
        RunFolder(tmp_path / "mine", {}, resume=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
    again = RunFolder(tmp_path / "run", {"a": 1}, resume=True)
    again.close()
    with pytest.raises(RunFolderError, match="a differ"):
        RunFolder(tmp_path / "run", {"a": 2}, resume=True)


def test_a_killed_run_resumes_and_asks_no_finished_pass_again(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time, torch, nissl
            from torch import nn
            from nissl.runner import Runner
            out, log, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
            class Slow(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.layer = nn.Linear(8, 3)
                def forward(self, x):
                    with open(log, "a") as f:
                        f.write("\\n".join(str(row.tolist()) for row in x) + "\\n")
                    time.sleep(pause)
                    return self.layer(x)
            torch.manual_seed(0)
            net = nissl.Network(Slow())
            x = torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
            result = nissl.audit(net, x, targets=0, methods=["occlusion", "rise"], checks=["curves"], out=out, resume=True,
                                 budget=24, runner_options={"batch_size": 8, "progress": False})
            print(result.table.faithfulness.tolist(), result.table.forward.tolist(), result.meta["rows"])
            """
        )
    )
    log = tmp_path / "log"

    def start(out, pause, log):
        return subprocess.Popen(
            [sys.executable, script, tmp_path / out, log, str(pause)], stdout=subprocess.PIPE, text=True
        )

    whole = start("whole", 0, tmp_path / "whole.log").communicate(timeout=120)[0]
    process = start("run", 0.1, log)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list((tmp_path / "run" / "unfinished").glob("*.npz"))) < 6:
        time.sleep(0.02)
    process.kill()
    process.wait()
    process.stdout.close()
    before = log.read_text().splitlines()
    finished = len(list((tmp_path / "run" / "unfinished").glob("*.npz")))
    assert 6 <= finished < 24, "the run must have been killed half way"
    resumed = start("run", 0, log).communicate(timeout=120)[0]
    after = log.read_text().splitlines()[len(before) :]
    assert resumed == whole
    everything = (tmp_path / "whole.log").read_text().splitlines()
    # six rows tell the prediction of every example, which is asked at each start; an unfinished Pass (24 rows) is lost
    assert len(before) + len(after) <= len(everything) + 6 + 24


def test_a_finished_run_is_not_run_again(planted, tmp_path):
    net, x = planted

    def run(**options):
        runner = Runner(progress=False)
        try:
            return nissl.audit(
                net, x[:3], methods=["ixg"], checks=["curves"], out=tmp_path / "run", runner=runner, **options
            )
        finally:
            asked.append(sum(c.forward for c in runner.costs.values()))

    asked = []
    run(resume=True)  # nothing there yet
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    with pytest.raises(FinishedRunError, match="nothing to resume"):
        run(resume=True)
    assert asked[0] > 0
    assert asked[1] == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == files
    run()
    assert asked[2] == asked[0]


def test_a_run_whose_report_cannot_be_written_can_be_resumed(planted, tmp_path, monkeypatch):
    net, x = planted

    def run(**options):
        return nissl.audit(
            net,
            x[:3],
            methods=["ixg"],
            checks=["curves"],
            out=tmp_path / "run",
            runner=Runner(progress=False),
            **options,
        )

    with monkeypatch.context() as m:
        m.setattr("nissl.trust.audit.write_report", lambda *given: (_ for _ in ()).throw(RunFolderError("full")))
        with pytest.raises(RunFolderError, match="full"):
            run()
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert run(resume=True).report.is_file()


def test_unknown_names_are_errors_with_a_suggestion(planted):
    net, x = planted
    with pytest.raises(InputError, match="saliency"):
        nissl.audit(net, x, methods=["salience"])
    with pytest.raises(InputError, match="curves"):
        nissl.audit(net, x, methods=["ixg"], checks=["curve"])
    with pytest.raises(InputError, match="budget"):
        nissl.audit(net, x, budget=0)


def test_every_method_has_what_a_table_shows():
    for key, cls in METHODS.items():
        assert cls.name == key
        assert cls.title
        assert cls.paper or key in ("random", "edge")
