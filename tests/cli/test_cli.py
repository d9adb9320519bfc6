"""The command line as a user meets it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from nissl import cli
from nissl.attribution import METHODS
from nissl.papers import PAPERS

MODEL = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model of one's own and four pictures as an array."""
    (tmp_path / "mine.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.random((4, 3, 28, 28), dtype=np.float32), y=np.array([0, 1, 2, 0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["nissl", *words])
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    else:
        code = 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_audit_of_ones_own_model_prints_one_json_object(here, monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "audit", "--model", "mine:net", "--data", "data.npz", "--examples", "4",
        "--methods", "ig(steps=4),gradcam,random", "--checks", "curves,randomisation", "--out", "run", "--json",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert set(found["verdicts"]) == {"ig(steps=4)", "gradcam", "random", "edge"}
    assert found["verdicts"]["random"] == "do not believe"
    assert found["figures"]["gradcam"]["faithfulness"]["value"] is not None
    assert found["cost"]["ig(steps=4)"]["backward"] == 4
    assert (here / found["report"]).is_file()


def test_audit_ends_with_a_table_and_where_the_report_is(here, monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "audit", "--model", "mine:net", "--data", "data.npz", "--methods", "ixg", "--checks", "curves",
        "--target", "label", "--out", "run",
    )  # fmt: skip
    assert code == 0
    assert "do not believe" in out
    assert "report.html" in out


def test_resuming_a_finished_run_prints_what_it_found(here, monkeypatch, capsys):
    words = (
        "audit",
        "--model",
        "mine:net",
        "--data",
        "data.npz",
        "--methods",
        "ixg",
        "--checks",
        "curves",
        "--out",
        "run",
    )
    _, first, _ = run(monkeypatch, capsys, *words, "--json")
    code, again, _ = run(monkeypatch, capsys, *words, "--json", "--resume")
    assert code == 0
    assert json.loads(again) == json.loads(first)
    code, out, _ = run(monkeypatch, capsys, *words, "--resume")
    assert code == 0
    assert "report.html" in out


def test_the_table_fits_a_terminal_of_80_columns(here, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(
        monkeypatch, capsys, "audit", "--model", "mine:net", "--data", "data.npz", "--methods", "smoothgrad(samples=2),ixg",
        "--checks", "curves,randomisation,logit", "--out", "run",
    )  # fmt: skip
    assert code == 0
    for name in ("smoothgrad(samples=2)", "ixg", "random", "edge"):
        # one line each, nothing cut
        (row,) = [line for line in out.splitlines() if line.strip().startswith(f"{name} ")]
        assert "…" not in row
        assert any(v in row for v in ("believe", "with care", "undecided"))
    (why,) = [line for line in out.splitlines() if line.startswith("a baseline ")]
    assert why.split()[-2:] == ["random,", "edge"]


def test_methods_and_papers_and_sites_as_json(here, monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "methods", "--json")
    assert {m["method"] for m in json.loads(out)} == set(METHODS)
    _, out, _ = run(monkeypatch, capsys, "papers", "--json")
    listed = json.loads(out)
    assert len(listed) == len(PAPERS) == 59
    assert set(listed[0]) == {"slug", "title", "year", "room", "object", "study", "status"}
    _, out, _ = run(monkeypatch, capsys, "sites", "--model", "mine:net", "--data", "data.npz", "--json")
    assert {"address": "0", "role": "conv", "shape": [6, 26, 26], "n_units": 6} in json.loads(out)
    for command in ("methods", "papers"):
        code, out, _ = run(monkeypatch, capsys, command)
        assert code == 0
        assert out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["audit", "--model", "mine:nothing", "--data", "data.npz"], "nothing"),
        (["audit", "--model", "mine:net"], "--data"),
        (["audit", "--model", "mine:net", "--data", "data.npz", "--methods", "salency"], "saliency"),
        (["audit", "--model", "mine:net", "--data", "data.npz", "--checks", "curve"], "curves"),
        (["audit", "--model", "mine:net", "--data", "data.npz", "--examples", "9"], "9"),
        (["audit", "--model", "mine:net", "--data", "data.npz", "--device", "warp"], "warp"),
        (["audit", "--model", "mine:net", "--data", "data.npz", "--target", "best"], "predicted"),
        (["reproduce", "no-such-paper"], "no-such-paper"),
        (["reproduce", "diffroar"], "no study yet"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(here, monkeypatch, capsys, words, says):
    code, _, err = run(monkeypatch, capsys, *words, *(["--out", "run"] if words[0] == "audit" else []))
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert not (here / "run" / "report.html").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_the_command_keeps_memory_that_was_freed():
    """The second large block costs no page faults; without the setting it costs as many as the first."""
    program = """
import resource, sys
import numpy as np
from typer.testing import CliRunner

from nissl import cli

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = np.empty(2**26, dtype=np.uint8)
    block.fill(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    cli._keep_freed_memory()
print(faults(), faults())
"""

    def run(mode):
        done = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True, check=True)
        return [int(n) for n in done.stdout.split()]

    kept, given_back = run("keep"), run("as it is")
    assert kept[1] < kept[0] / 10
    assert given_back[1] > given_back[0] / 2


def test_a_study_s_numpy_values_are_plain_json(monkeypatch):
    found = [
        {"claim": "c", "paper": "-", "ours": np.float32(0.5), "interval": None, "baseline": np.nan, "holds": np.True_}
    ]
    monkeypatch.setattr("nissl.studies.lima.run", lambda **_: found)
    printed = CliRunner().invoke(cli.app, ["reproduce", "lima", "--quick", "--json"])
    assert printed.exit_code == 0, printed.output
    (claim,) = json.loads(printed.stdout)["claims"]
    assert claim == {"claim": "c", "paper": "-", "ours": 0.5, "interval": None, "baseline": None, "holds": True}
