"""The commands about vision models, on tiny networks in a folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "report"))
from nissl.cli import app, vision
from nissl.errors import MissingExtraError, NisslError
from report_browser import Browser

HOSTILE = "<script>alert(1)</script>"
MODEL = f"""
import torch
from torch import nn
from nissl.models.vit import VisionTransformer
from nissl.sources.models import LoadedModel

def chain():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                      nn.Linear(48, 3))
    with torch.no_grad():  # class 1 for bright pictures, class 0 for dark ones, never class 2
        m[6].weight.copy_(m[6].weight[1].abs() * torch.tensor([[-0.1], [1.0], [0.0]]))
        m[6].bias.copy_(torch.tensor([1.0, 0.0, -9.0]))
        for i in (0, 2):
            m[i].weight.abs_()
            m[i].bias.zero_()
        bright = m(torch.full((1, 3, 16, 16), 0.5))[0, 1]
        m[6].weight.div_(bright)
        m[6].bias[0] += 0.1
    return LoadedModel(m, "tiny", ["{HOSTILE}", "b", "c"])

def vit():
    torch.manual_seed(0)
    return LoadedModel(VisionTransformer(16, 4, 3, 3, 16, 2, 2, 24), "vit", ["{HOSTILE}", "b", "c"])
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with networks and 24 pictures, half of them dark."""
    (tmp_path / "nets.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    x = rng.random((24, 3, 16, 16), dtype=np.float32) * np.where(np.arange(24) % 2, 1.0, 0.4)[:, None, None, None]
    np.savez(tmp_path / "data.npz", x=(x + np.where(np.arange(24) % 2, 0.3, 0)[:, None, None, None]).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


def run(*words):
    result = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def opens(browser: Browser, page: Path) -> list[str]:
    """What headless Chromium complains of."""
    browser.open(page.as_uri())
    return browser.complaints() + [u for u in browser.requests() if not u.startswith(("file:", "about:"))]


CONCEPTS = ("concepts", "--model", "nets:chain", "--data", "data.npz", "--n", 3)
PATHS = ("paths", "--data", "data.npz")


def test_concepts_of_a_class_are_written(browser, here):
    found = json.loads(run(*CONCEPTS, "--below", "1", "--out", "new/c.html", "--json").stdout)
    assert found["layer"] == "3"  # the last activation with places that is not negative
    (group,) = found["groups"]
    assert group["pictures"] == 12
    assert len(group["concepts"]) == 3
    assert [a["order"] for a in group["areas"]] == ["Sobol", "TCAV", "20 random orders, mean"]
    assert group["below"][0]["layer"] == "1"
    page = (here / "new" / "c.html").read_text()
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 3
    assert opens(browser, here / "new" / "c.html") == []


def test_hostile_names_are_escaped(here):
    run(*CONCEPTS, "--classes", "0", "--out", "c.html")
    page = (here / "c.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_causal_paths_of_a_chain(browser, here):
    found = json.loads(run(*PATHS, "--model", "nets:chain", "--classes", "1", "--out", "p.html", "--json").stdout)
    assert found["method"] == "causal"
    (row,) = found["classes"]
    # every path to the class is positive, so that nothing is left without the graph
    assert row["still in the class without the graph"] == 0
    assert row["logit with the graph alone, share"] > 0.5
    assert opens(browser, here / "p.html") == []


def test_neuron_paths_of_a_transformer(here):
    found = json.loads(run(*PATHS, "--model", "nets:vit", "--out", "p.html", "--json").stdout)
    assert found["method"] == "neuron"
    assert sum(r["pictures"] for r in found["classes"]) == 24
    assert "<script" not in (here / "p.html").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((*CONCEPTS, "--layer", "nowhere"), "nowhere"),
        ((*CONCEPTS, "--layer", "6"), "are negative"),
        ((*CONCEPTS, "--classes", "c"), "none of the 24 pictures"),
        ((*CONCEPTS, "--classes", "9"), "outside the classes"),
        ((*CONCEPTS, "--patch", "99"), "hold no crop"),
        ((*PATHS, "--model", "nets:chain", "--classes", "c"), "none of the 24 pictures"),
        ((*PATHS, "--model", "nets:chain", "--layer", "nowhere"), "nowhere"),
        ((*PATHS, "--model", "nets:vit", "--method", "causal"), "not a chain"),
        ((*PATHS, "--model", "nets:chain", "--method", "neuron"), "feed-forward"),
        ((*PATHS, "--model", "nets:chain", "--method", "luck"), "--method"),
        (PATHS, "--data without --model"),
    ],
)
def test_bad_words_raise_and_write_nothing(here, words, says):
    with pytest.raises(NisslError, match=says):
        CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert not list(here.rglob("*.html"))


def test_without_a_model_and_data_it_says_what_is_needed(here, monkeypatch):
    monkeypatch.setenv("NISSL_FASHION_MNIST", str(here))
    with pytest.raises(MissingExtraError, match=r"--model and --data.*advertorch"):
        vision._shipped()
