"""The commands about language models, on a tiny model in a folder."""

import json

import pytest
import torch
from typer.testing import CliRunner

from language_families import tiny
from nissl.cli import app
from nissl.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    net = tiny("gpt_neox, sequential", dtype=torch.float32)  # its family loads the tokenizer as it was saved
    net.module.save_pretrained(path)
    net.tokenizer.save_pretrained(path)
    return path


def run(*words):
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_trace_prints_and_writes_what_carries_the_answer(folder, tmp_path):
    words = [
        "trace",
        "--model",
        folder,
        "--prompt",
        "w1 w2 w3 w4",
        "--against",
        "w1 w9 w3 w4",
        "--out",
        tmp_path / "new" / "t.html",
    ]
    found = json.loads(run(*words, "--top", 12, "--json").stdout)
    assert found["tokens"] == ["w1", "w2", "w3", "w4"]
    assert {"clean", "corrupted", "chosen", "agreement", "top", "forward_passes", "report"} <= set(found)
    best = [r for r in found["top"] if r["kind"] == "resid_pre"]
    assert len(best) == 12
    # before the first block the prompts differ at one position, and patching it makes one prompt of the other
    (first,) = [r for r in best if (r["layer"], r["position"]) == (0, -3)]
    assert first["share"] == pytest.approx(1, abs=1e-3)
    page = (tmp_path / "new" / "t.html").read_text()
    assert "data:image/png;base64," in page
    assert "<script" not in page
    assert "attn_out" in run(*words).stdout.replace("\n", "")


def test_neurons_are_found_and_clamped(folder, tmp_path):
    words = ["neurons", "--model", folder, "--concept", "w7", "--prompt", "w1 w2", "--n", 4, "--clamped", 2]
    found = json.loads(run(*words, "--out", tmp_path / "n.html", "--json").stdout)
    assert len(found["neurons"]) == 4
    assert len(found["clamped"]) == 2
    assert "w7" in found["neurons"][0]["tokens"]
    assert (tmp_path / "n.html").exists()


def test_steer_and_edit_write_their_reports(folder, tmp_path):
    found = json.loads(
        run("steer", "--model", folder, "--toward", "w1 w2", "--away", "w3 w4", "--prompt", "w5 w6", "--strength", 0.5,
            "--max-tokens", 3, "--out", tmp_path / "s.html", "--json").stdout
    )  # fmt: skip
    assert found["strength"] == 0.5
    assert (tmp_path / "s.html").exists()
    words = ["edit", "--model", folder, "--prompt", "w1 w2 w3", "--subject", "w2", "--target", "w9", "--method", "fine-tune",
             "--delta", tmp_path / "d.safetensors", "--out", tmp_path / "e.html", "--json"]  # fmt: skip
    found = json.loads(run(*words).stdout)
    assert found["after"] > found["before"]
    assert (tmp_path / "d.safetensors").exists()
    undone = json.loads(run(*words, "--undo").stdout)
    assert undone["undone"] is True
    assert undone["texts"][0]["continues"] != undone["texts"][1]["continues"] or found["texts"][0]["before"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trace", "--prompt", "w1 w2", "--against", "w1"], "token"),
        (["trace", "--prompt", ""], "empty"),
        (["trace", "--prompt", "w1", "--answer", "w1 w2"], "token"),
        (["neurons", "--concept", "elephant"], "no token of the vocabulary"),
        (["neurons", "--concept", "w1", "--by", "luck"], "by='luck'"),
        (["edit", "--prompt", "w1 w2", "--subject", "w3", "--target", "w4"], "subject"),
        (["edit", "--prompt", "w1 w2", "--subject", "w1", "--target", "w4", "--undo", "--delta", "nowhere.safetensors"], "nowhere"),
        (["steer", "--toward", "", "--away", "w1", "--prompt", "w2"], "toward"),
    ],
)  # fmt: skip
def test_bad_words_raise_and_write_nothing(folder, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        CliRunner().invoke(app, [*words, "--model", str(folder)], catch_exceptions=False)
    assert not list(tmp_path.rglob("*.html"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="neither 'smollm2'"):
        CliRunner().invoke(app, ["trace", "--prompt", "a", "--model", str(tmp_path / "no")], catch_exceptions=False)


def test_the_audit_takes_prompts(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1 w2 w3 w4\nw5 w6 w7\n\nw9 w8 w7 w6\n")
    found = json.loads(
        run("audit", "--model", f"lm:{folder}", "--data", tmp_path / "prompts.txt", "--methods", "ixg,occlusion,random",
            "--checks", "curves,logit", "--out", tmp_path / "run", "--json").stdout
    )  # fmt: skip
    assert set(found["verdicts"]) == {"ixg", "occlusion", "random", "edge"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "w5" in page


def test_prompts_that_cannot_be_audited(folder, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("w1 w2\n")
    for words, says in (
        (["--data", tmp_path / "no.txt"], "prompt a line"),
        (["--data", tmp_path / "empty.txt"], "holds no prompt"),
        (["--data", tmp_path / "one.txt", "--examples", 2], "holds 1 prompts"),
        (["--data", tmp_path / "one.txt", "--target", "label"], "no labels"),
    ):
        with pytest.raises(InputError, match=says):
            CliRunner().invoke(app, ["audit", "--model", f"lm:{folder}", *map(str, words)], catch_exceptions=False)
