"""Scores carry names, dimensions and everything needed to repeat them."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from nissl.errors import InputError
from nissl.network import Network
from nissl.runner import Runner, explained
from nissl.runner.scores import parameters_of


@dataclass(frozen=True, eq=False)
class Halved:
    """Half the input as its scores."""

    share: float = 0.5
    where: tuple = (1, "a", None)
    baseline: torch.Tensor | None = None
    dims: tuple | None = None
    paper = "nobody 2000"
    differentiates = False

    def explain(self, q):
        yield q.ask()
        return explained(q, self.share * q.input[0], self.dims, gap=float(q.example))


def test_what_an_array_of_scores_says():
    net = Network(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), name="tiny")
    x = torch.randn(2, 3, 2, 2)
    method = Halved(baseline=torch.zeros(4))
    s = Runner().attribute(method, net, x, 1, seed=7)["method"]
    assert s.dims == ("example", "channel", "y", "x")
    np.testing.assert_allclose(s.values, x.numpy() / 2)
    np.testing.assert_array_equal(s.coords["gap"], [0, 1])
    assert s.coords["gap"].dims == ("example",)
    attrs = dict(s.attrs)
    assert attrs.pop("seconds") >= 0
    assert json.loads(attrs.pop("parameters"))["share"] == 0.5
    assert attrs == {
        "method": "Halved", "paper": "nobody 2000", "target": "class_logit", "site": "input", "forward_passes": 2,
        "backward_passes": 0, "reused_passes": 0, "seed": 7, "network": "tiny", "fingerprint": net.fingerprint(),
    }  # fmt: skip


def test_parameters_are_plain_values():
    found = parameters_of(Halved(baseline=torch.zeros(4, 2)))
    assert found["where"] == [1, "a", None]
    assert found["baseline"] == "Tensor (4, 2)"
    assert json.loads(json.dumps(found)) == found


def test_dimensions_must_fit():
    net = Network(nn.Linear(4, 2))
    with pytest.raises(InputError, match="dimension names"):
        Runner().attribute(Halved(dims=("y", "x")), net, torch.randn(1, 4))


def test_examples_of_different_shape_are_refused():
    @dataclass(frozen=True)
    class Growing(Halved):
        def explain(self, q):
            yield q.ask()
            return explained(q, torch.ones(q.example + 1))

    with pytest.raises(InputError, match="different shapes"):
        Runner().attribute(Growing(), Network(nn.Linear(4, 2)), torch.randn(2, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_of_scores(dtype):
    net = Network(nn.Linear(4, 2).to(dtype))
    s = Runner().attribute(Halved(), net, torch.randn(1, 4))["method"]
    assert s.dtype == (np.float64 if dtype == torch.float64 else np.float32)
