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


def network(memory_format=torch.channels_last, kind=Net, **options):
    torch.manual_seed(1)
    net = nissl.Network(kind(**options).double())
    net.memory_format = memory_format
    return net


def folds(net, x):
    """Names of the convolutions that take up the norm behind them."""
    net.run(nissl.Pass(x))
    names = {m: n for n, m in net.module.named_modules()}
    return {names[a]: names[b] for a, b in net._folds.items()}


def gradient(net, x, **options):
    return net.run(nissl.Pass(x, read=["norm"], of=nissl.target.class_logit(2), wrt=["input", "norm"], **options))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("options", [{}, {"affine": False}])
def test_folded_norms_give_the_answer_of_the_norm(x, options, memory_format):
    net = network(memory_format, **options)
    found = gradient(net, x)
    assert folds(net, x) == {"conv": "norm", "depth": "last"}
    gradient(net, x)
    assert net.module.made == ["ConvolutionBackward0"] * 2
    x = x.clone().requires_grad_(True)
    module = net.module.eval()
    module(x)[:, 2].sum().backward()
    same(found.gradients["input"], x.grad)
    same(found.output, module(x).detach())
    same(found.reads["norm"], module.norm(module.conv(x)).detach())
    same(net.run(nissl.Pass(x.detach())).output, module(x).detach())


def test_a_convolution_that_is_looked_at_or_changed_stays_what_it_is(x):
    net = network()
    assert folds(net, x)
    module = net.module.eval()
    conv = module.conv(x).detach()
    same(net.run(nissl.Pass(x, read=["conv"])).reads["conv"], conv)
    same(net.run(nissl.Pass(x, read=["norm:in"])).reads["norm:in"], conv)
    with torch.no_grad():
        doubled = module.last(module.depth(torch.relu(module.norm(2 * conv)))).square().mean((2, 3))
    same(net.run(nissl.Pass(x, [nissl.Scale("conv", 2.0)])).output, doubled)
    seen = []
    handle = module.conv.register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    net.run(nissl.Pass(x))
    handle.remove()
    same(seen[0], conv)


def test_a_lone_norm_is_a_product(x):
    class Before(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)
            self.norm.running_mean.normal_()

        def forward(self, x):
            h = self.norm(x)
            self.made = type(h.grad_fn).__name__
            return self.conv(h).square().mean((2, 3))

    net = network(kind=Before)
    found = net.run(nissl.Pass(x, of=nissl.target.class_logit(1), wrt=["input"]))
    assert net.module.made == "AddcmulBackward0"
    assert not net._folds
    x = x.clone().requires_grad_(True)
    net.module.eval()(x)[:, 1].sum().backward()
    same(found.gradients["input"], x.grad)


class Odd(nn.Module):
    """A convolution whose output may be used otherwise than by the norm behind it."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.wrapped = nn.Sequential(self.conv)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.1, 2.0)

    def forward(self, x):
        c = self.wrapped(x) if self.use == "wrapped" else self.conv(x)
        if self.use == "residual":
            return (self.norm(c) + c).mean((2, 3))
        if self.use == "size":
            return self.norm(c).mean((2, 3)) / c.shape[-1]
        if self.use == "twice":
            return (self.norm(c) + self.norm(self.conv(torch.relu(x)))).mean((2, 3))
        if self.use == "bare":
            return (self.norm(c) + self.conv(torch.relu(x))).mean((2, 3))
        if self.use == "by the numbers" and x.sum() > 1e3:
            return (self.norm(c) * c.sigmoid() + c).mean((2, 3))
        return self.norm(c).mean((2, 3))


@pytest.mark.parametrize(
    ("use", "folded"),
    [("residual", False), ("size", True), ("twice", True), ("bare", False), ("wrapped", False), ("plain", True),
     ("by the numbers", True)],
)  # fmt: skip
def test_only_outputs_that_nothing_else_uses_are_folded(x, use, folded):
    net = network(kind=Odd, use=use)
    assert bool(folds(net, x)) is folded
    module = net.module.eval()
    for inputs in (x, x + 100):
        with torch.no_grad():
            expected = module(inputs)
        same(net.run(nissl.Pass(inputs)).output, expected)
        same(net.run(nissl.Pass(inputs, of=nissl.target.class_logit(0), wrt=["input"])).output, expected)
    assert not module.conv._forward_hooks
    assert not module.norm._forward_pre_hooks


def test_convolutions_that_share_a_weight_are_left_alone(x):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    net[3].weight = net[0].weight
    net[4].running_mean.fill_(3.0)
    found = nissl.Network(net.double())
    assert folds(found, x) == {}
    with torch.no_grad():
        same(found.run(nissl.Pass(x)).output, net.eval()(x))


def test_signals_and_volumes():
    for conv, norm, size in ((nn.Conv1d, nn.BatchNorm1d, (7,)), (nn.Conv3d, nn.BatchNorm3d, (5, 5, 5))):
        net = nn.Sequential(conv(2, 4, 3, stride=2, bias=False), norm(4)).double()
        net[1].running_mean.normal_()
        x = torch.randn(3, 2, *size, dtype=torch.float64)
        found = nissl.Network(net)
        assert folds(found, x) == {"0": "1"}
        with torch.no_grad():
            same(found.run(nissl.Pass(x)).output, net.eval()(x))


def test_changed_weights_are_the_ones_that_count(x):
    net = network()
    assert folds(net, x)
    other = net.changed({"norm.weight": torch.full((5,), 2.0, dtype=torch.float64)})
    found = gradient(other, x).output
    assert net.module.made == ["ConvolutionBackward0"] * 2
    with torch.no_grad():
        net.module.eval().norm.weight.fill_(2.0)
        same(found, net.module(x))
        net.module.conv.weight.data.mul_(2.0)  # counted by no version
        same(net.run(nissl.Pass(x)).output, net.module(x))


def test_rules_see_the_norms(x):
    net = network()
    answer = gradient(net, x, rules=LRPRules("epsilon"))
    assert not {"AddcmulBackward0", "ConvolutionBackward0"} & set(net.module.made)
    plain = network(torch.preserve_format)
    torch.testing.assert_close(
        answer.gradients["input"], gradient(plain, x, rules=LRPRules("epsilon")).gradients["input"]
    )


def test_statistics_of_the_batch_stay_what_they_are(x):
    net = network(track_running_stats=False)
    gradient(net, x)
    assert net.module.made == ["NativeBatchNormBackward0", "ConvolutionBackward0"]
    with torch.no_grad():
        same(net.run(nissl.Pass(x)).output, net.module.eval()(x))


def test_folding_can_be_switched_off(x):
    net = network(torch.contiguous_format)
    net.fold_norms = False
    gradient(net, x)
    assert net.module.made == ["NativeBatchNormBackward0"] * 2
    with torch.no_grad():
        assert torch.equal(net.run(nissl.Pass(x)).output, net.module.eval()(x))
