"""Batch norms written as products: the same answers, the faster gradient, and only where nobody needs the norm itself."""

import pytest
import torch
from torch import nn

import nissl
from nissl.network import LRPRules


class Net(nn.Module):
    """Two convolutions with batch norms; notes what made the output of each norm."""

    def __init__(self, **options):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, eps=1e-3, **options)
        self.depth, self.last = nn.Conv2d(5, 5, 3, groups=5), nn.BatchNorm2d(5, affine=False)
        for m in (self.norm, self.last):
            if m.running_mean is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.1, 2.0)
        if self.norm.weight is not None:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.made = []

    def forward(self, x):
        h = self.norm(self.conv(x))
        y = self.last(self.depth(torch.relu(h)))
        self.made = [type(t.grad_fn).__name__ for t in (h, y)]
        return y.square().mean((2, 3))


@pytest.fixture
def x():
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(memory_format=torch.channels_last, **options):
    torch.manual_seed(1)
    net = nissl.Network(Net(**options).double())
    net.memory_format = memory_format
    return net


def gradient(net, x, **options):
    return net.run(nissl.Pass(x, read=["norm"], of=nissl.target.class_logit(2), wrt=["input", "norm"], **options))


@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_the_answer_is_that_of_the_norm(x, options):
    net = network(**options)
    found = gradient(net, x)
    assert net.module.made == ["AddcmulBackward0"] * 2
    x = x.clone().requires_grad_(True)
    module = net.module.eval()
    module(x)[:, 2].sum().backward()
    torch.testing.assert_close(found.gradients["input"], x.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.output, module(x).detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.reads["norm"], module.norm(module.conv(x)).detach(), rtol=1e-12, atol=1e-14)


def test_changed_weights_are_the_ones_that_count(x):
    net = network()
    other = net.changed({"norm.weight": torch.full((5,), 2.0, dtype=torch.float64)})
    other.memory_format = torch.channels_last
    found = gradient(other, x).output
    assert net.module.made == ["AddcmulBackward0"] * 2
    with torch.no_grad():
        net.module.eval().norm.weight.fill_(2.0)
        torch.testing.assert_close(found, net.module(x))


def test_rules_see_the_norms(x):
    net = network()
    answer = gradient(net, x, rules=LRPRules("epsilon"))
    plain = network(torch.preserve_format)
    assert "AddcmulBackward0" not in net.module.made
    torch.testing.assert_close(
        answer.gradients["input"], gradient(plain, x, rules=LRPRules("epsilon")).gradients["input"]
    )


def test_elsewhere_norms_stay_what_they_are(x):
    net = network(torch.contiguous_format)
    gradient(net, x)
    assert net.module.made == ["NativeBatchNormBackward0"] * 2
    net = network(track_running_stats=False)  # statistics of the batch itself
    gradient(net, x)
    assert net.module.made == ["NativeBatchNormBackward0", "AddcmulBackward0"]
    net.run(nissl.Pass(x))  # no gradient
    assert net.module.made == ["NoneType"] * 2
