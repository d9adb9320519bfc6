"""The benchmarks compare like with like: on a small network every case finds equal results, and its rulers are right."""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
CASES = {
    "attribution": ["integrated_gradients", "smoothgrad", "grad_cam", "occlusion"],
    "checks": ["deletion", "infidelity_captum", "infidelity_quantus", "randomisation"],
    "relevance": ["lrp"],
    "snmf": ["snmf"],
    "recordings": ["kalman", "factorisation", "bicluster_path"],
}
NEEDS = {
    "recordings": ["filterpy", "tensorly"],
    "attribution": ["captum"],
    "checks": ["captum", "quantus"],
    "relevance": ["zennit"],
}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def imported(name):
    for package in NEEDS.get(name, []):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own deprecations
        return importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def subject():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    x = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return imported("subject").Subject(net, x, net(x).argmax(1), layer="3")


@pytest.mark.parametrize(("module", "case"), [(m, c) for m, cases in CASES.items() for c in cases])
@pytest.mark.filterwarnings("ignore")
def test_results_are_those_of_the_peer(subject, module, case):
    made = getattr(imported(module), case)(subject)
    differences = made.differences()
    assert differences
    assert all(found <= allowed for found, allowed in differences.values()), differences
    assert {"nissl", made.peer} <= set(made.contenders)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_result_is_seen(subject, monkeypatch):
    module = imported("attribution")
    monkeypatch.setattr(module, "STEPS", 3)
    made = module.integrated_gradients(subject)
    scores = type(subject).scores
    monkeypatch.setattr(type(subject), "scores", lambda *given: 1.01 * scores(*given))
    ((found, allowed),) = made.differences().values()
    assert found == pytest.approx(0.01, rel=1e-3)
    assert found > allowed


def test_a_pass_gives_what_is_written_by_hand(subject):
    result = imported("kernel").overhead(subject, 1)
    assert result.equal
    assert set(result.differences) == {"output", "gradient"}


def test_rows_are_counted_at_the_network(subject):
    measure = imported("measure")
    rows = measure.count_rows(subject.module, lambda: [subject.module(subject.x) for _ in range(3)])
    assert rows == 6
    assert not subject.module._forward_pre_hooks


def test_peak_memory_is_what_was_added():
    measure = imported("measure")
    # 64 MiB held at once, and again after they were given back
    found = [measure.peak(lambda: torch.ones(2**24).sum()) for _ in range(2)]
    assert all(60 < f < 80 for f in found), found


def test_ratios_are_of_the_shortest_runs():
    result = imported("measure").Result("a", "peer", 0.5, "")
    result.seconds = {"nissl": [3.0, 1.0, 5.0], "peer": [4.0, 8.0, 4.0]}
    result.memory = {"nissl": 3.0, "peer": 2.0}
    assert (result.ratio(), result.median_ratio, result.memory_ratio, result.met) == (0.25, 0.75, 1.5, True)
