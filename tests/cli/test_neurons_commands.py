"""``nissl neurons`` for image networks, on a tiny network in a folder."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from nissl.cli import app
from nissl.errors import InputError, SiteError

MODEL = """
import torch
from torch import nn
from nissl.sources.models import LoadedModel

def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()]
    return LoadedModel(nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), "tiny", ["<i>a", "b", "c"])
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a network and twelve pictures."""
    (tmp_path / "mine.py").write_text(MODEL)
    x = np.random.default_rng(0).random((12, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(12) % 3)
    np.savez(tmp_path / "grey.npz", x=x[:, :1], y=np.arange(12) % 3)
    np.savez(tmp_path / "flat.npz", x=x.reshape(12, -1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def run(*words):
    found = CliRunner().invoke(app, ["neurons", *map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_units_of_ones_own_network_as_one_json_object_and_one_page(here):
    words = [
        "--model",
        "mine:net",
        "--data",
        "data.npz",
        "--units",
        4,
        "--exemplars",
        5,
        "--facets",
        1,
        "--out",
        "new/n.html",
    ]
    found = json.loads(run(*words, "--json"))
    assert found["layers"] == ["1", "3"]
    assert found["n_images"] == 12
    assert len(found["units"]) == 8
    assert found["cost"]["exemplars"] >= 12
    assert {u["text"] for u in found["units"]} <= {"<i>a", "b", "c", ""}
    page = (here / found["report"]).read_text()
    assert "data:image/webp" in page
    assert "<i>a" not in page
    assert "lifetime sparseness" in page
    assert "new/n.html" in run(*words).replace("\n", "")


def test_layers_units_and_examples_are_chosen(here):
    words = ["--model", "mine:net", "--data", "data.npz", "--layers", "2,3", "--exemplars", 3, "--facets", 1, "--json"]
    found = json.loads(run(*words, "--units", "3,1", "--examples", 6))
    assert [(u["site"], u["unit"]) for u in found["units"]] == [("2", 1), ("2", 3), ("3", 1), ("3", 3)]
    assert found["n_images"] == 6


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["--model", "mine:net"], InputError, "say with --data"),
        (["--layers", "9"], SiteError, "no module '9'"),
        (["--layers", ","], InputError, "names no site"),
        (["--units", "1,99"], InputError, "no unit 99"),
        (["--units", "many"], InputError, "--units 'many'"),
        (["--data", "grey.npz"], InputError, "1, 16, 16"),
        (["--data", "flat.npz"], InputError, "pictures"),
        (["--data", "none.npz"], InputError, "no file"),
        (["--prompt", "The"], InputError, "--concept"),
        (["--concept", "dog", "--layers", "1"], InputError, "--layers belongs to image networks"),
        (["--model", "smollm2"], InputError, "--concept"),
    ],
)
def test_what_does_not_fit_is_named(words, error, text, here):
    given = words if "--model" in words else ["--model", "mine:net", *words]
    given = (
        given if "--data" in words or words[0] == "--model" or "--concept" in words else [*given, "--data", "data.npz"]
    )
    found = CliRunner().invoke(app, ["neurons", "--facets", "1", *given])
    assert isinstance(found.exception, error), found.output
    assert text in str(found.exception)
    assert not (here / "runs" / "neurons.html").exists()
