"""Causal paths: planted chains are found, cutting by activations equals cutting weights, repair, maps, bad input."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nissl
from nissl.attribution.causal_paths import CausalMap, CausalPaths, chain_of
from nissl.errors import InputError
from nissl.runner import Runner
from nissl.studies.causal_paths import PlantedChain, planted_images

QUIET = Runner(progress=False)


@pytest.mark.parametrize("n", [5, 20, 100])
def test_planted_chains_are_found(n):
    right = 0
    for seed in range(5):
        net = nissl.Network(PlantedChain(seed))
        graph = CausalPaths().find(net, planted_images(seed, 0, n), 0, runner=QUIET)
        right += graph.at("fc3").causes.tolist() == [0, 1, 2] and graph.at("fc2").causes.tolist() == [0, 1, 2, 3]
        assert (
            1.0 < float(graph.at("fc3").total_effect.mean(0)[12]) < 3.0
        )  # the inhibitor raises the logit: not a cause
    assert right >= 4


def test_decoys_fire_most():
    net = nissl.Network(PlantedChain(0))
    reads = net.run(nissl.Pass(planted_images(0, 0, 100), read=["fc3:in", "fc2:in"])).reads
    assert not {0, 1, 2} & set(reads["fc3:in"].mean(0).topk(3).indices.tolist())
    assert not {0, 1, 2, 3} & set(reads["fc2:in"].mean(0).topk(4).indices.tolist())


def test_the_paired_test_needs_an_effect_size():
    for seed in range(3):
        net, images = nissl.Network(PlantedChain(seed)), planted_images(seed, 0, 100)
        loose = CausalPaths(test="paired").find(net, images, 0, runner=QUIET).at("fc3").causes.tolist()
        assert {0, 1, 2} < set(loose)
        strict = CausalPaths(test="paired", min_effect=0.02).find(net, images, 0, runner=QUIET)
        assert strict.at("fc3").causes.tolist() == [0, 1, 2]
        assert strict.at("fc2").causes.tolist() == [0, 1, 2, 3]
        corrected = CausalPaths(test="paired", correction="bh").find(net, images, 0, runner=QUIET)
        assert set(corrected.at("fc3").causes.tolist()) <= set(loose)


def test_the_graph_is_necessary_and_sufficient():
    net, images = nissl.Network(PlantedChain(1)), planted_images(1, 0, 100)
    before = {k: v.clone() for k, v in net.weights().items()}
    graph = CausalPaths().find(net, images, 0, runner=QUIET)
    clean = net.run(nissl.Pass(images)).output
    without = graph.necessary(net).run(nissl.Pass(images)).output
    alone = graph.sufficient(net).run(nissl.Pass(images)).output
    assert float((clean.argmax(1) == 0).double().mean()) == 1.0
    assert float((without.argmax(1) == 0).double().mean()) <= 0.1
    assert 1.1 < float(alone[:, 0].mean() / clean[:, 0].mean()) < 1.4  # above 1: the inhibitor is gone
    for k, v in net.weights().items():
        assert torch.equal(v, before[k])


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(4, 5, 2, dilation=2, padding="same")
        self.fc1, self.fc2 = nn.Linear(5 * 3 * 3, 7), nn.Linear(7, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv3(F.relu(self.conv2(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_cutting_by_activations_is_cutting_weights(value):
    torch.manual_seed(3)
    module = ConvNet().double().eval()
    net = nissl.Network(module)
    x = torch.randn(40, 2, 8, 8, dtype=torch.float64)
    label = int(module(x).argmax(1).mode().values)
    graph = CausalPaths(value=value).find(net, x, label, runner=QUIET)
    x = x[module(x).argmax(1) == label]
    assert graph.n == len(x)
    clean = module(x)[:, label].detach()
    torch.testing.assert_close(graph.logits, clean)
    reached = [c for c in graph.layers if c.total_effect is not None]
    if value == 0:
        assert [c.layer for c in graph.layers] == ["conv1", "conv2", "conv3", "fc1", "fc2"]
    for c in reached:
        layer = module.get_submodule(c.layer)
        for i in range(c.total_effect.shape[1]):
            kept = layer.weight.detach().clone()
            with torch.no_grad():
                for e in c.effects.tolist():
                    if c.layer == "fc1":
                        layer.weight[e, 9 * i : 9 * i + 9] = value
                    elif c.layer == "conv2":  # two groups of three inputs and two outputs
                        if i // 3 == e // 2:
                            layer.weight[e, i % 3] = value
                    else:
                        layer.weight[e, i] = value
                change = module(x)[:, label] - clean
                layer.weight.copy_(kept)
            if c.layer == "conv2" and value:
                continue  # an edge between groups cannot be set to anything but 0
            torch.testing.assert_close(c.total_effect[:, i], change, rtol=1e-9, atol=1e-9)
    assert graph.at("fc2").total_effect.numpy() == pytest.approx(
        ((value - module.fc2.weight[label]) * F.relu(module.fc1(_flat(module, x)))).detach().numpy(), abs=1e-9
    )


def _flat(module, x):
    h = F.relu(module.conv3(F.relu(module.conv2(F.relu(module.norm(module.conv1(x)))))))
    return h.flatten(1)


def test_masked_weights_are_the_edges():
    torch.manual_seed(4)
    module = ConvNet().double().eval()
    net = nissl.Network(module)
    for e in chain_of(net, torch.randn(1, 2, 8, 8).double()):
        w = e.weight(net)
        assert w.shape[:2] == (e.n_outputs, e.n_inputs)
        keep = torch.rand(e.n_outputs, e.n_inputs) < 0.5
        other = net.changed({f"{e.name}.weight": e.masked(net, keep)})
        torch.testing.assert_close(e.weight(other), w * keep.reshape(*keep.shape, *[1] * (w.ndim - 2)))


def test_a_shortcut_is_cut_and_the_rest_kept():
    """Class 0 reads inputs 0 and 1; input 2 is a shortcut to it that wrong images carry."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.eye(4))
        module[0].bias.zero_()
        module[2].weight.copy_(torch.tensor([[1.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.5]]))
        module[2].bias.zero_()
    net = nissl.Network(module)
    g = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.rand(60, 4, generator=g)
    right = noise * torch.tensor([1.0, 1.0, 0.0, 1.0]) + torch.tensor([1.0, 1.0, 0.0, 0.0])
    wrong = noise * torch.tensor([0.0, 0.0, 1.0, 1.0]) + torch.tensor(
        [0.0, 0.0, 1.0, 1.0]
    )  # class 1, with the shortcut
    honest = noise + torch.tensor([0.0, 0.0, 0.0, 1.0])
    found, good = (CausalPaths().find(net, x, 0, runner=QUIET) for x in (wrong, right))
    assert found.at("2").causes.tolist() == [2]
    assert good.at("2").causes.tolist() == [0, 1]
    fixed = found.repaired(net, good)

    def share(net, x, c):
        return float((net.run(nissl.Pass(x)).output.argmax(1) == c).double().mean())

    assert [share(net, wrong, 1), share(fixed, wrong, 1)] == [0.0, 1.0]
    assert share(fixed, right, 0) == share(net, right, 0) == 1.0
    assert share(fixed, honest, 1) == 1.0
    half = found.repaired(net, good, factor=0.5)
    assert float(half.weights()["2.weight"][0, 2]) == 1.5


def test_stability_counts_causes_that_come_back():
    net, images = nissl.Network(PlantedChain(2)), planted_images(2, 0, 50)
    graph = CausalPaths().find(net, images, 0, runner=QUIET)
    found = graph.stability(net, images, "fc3", [0.0, 0.01, 2.0], draws=3, runner=QUIET)
    assert found["jaccard"].shape == (3, 3)
    assert (found["jaccard"][0] == 1).all()
    assert (found["appearance"][0, :3] == 1).all()
    assert float(found["jaccard"][2].mean()) < 1  # no longer a cut


def test_causal_maps_show_where_causes_act():
    """Unit 0 of the first layer sees the left half, unit 1 the right one; class 0 reads unit 0, class 1 unit 1."""

    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.fc = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, 2)
            with torch.no_grad():
                for layer in (self.conv1, self.conv2, self.fc):
                    layer.weight.zero_()
                    layer.bias.zero_()
                self.conv1.weight[[0, 1], [0, 1]] = 1.0
                self.conv2.weight[[0, 1], [0, 1], 1, 1] = 1.0
                self.fc.weight.copy_(torch.eye(2))

        def forward(self, x):
            return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean((2, 3)))

    net = nissl.Network(Halves())
    g = torch.Generator().manual_seed(0)
    images = 0.1 * torch.rand(30, 2, 8, 8, generator=g)
    images[:, 0, :, :4] += 8.0
    graph = CausalPaths().find(net, images, 0, runner=QUIET)
    assert graph.at("conv2").causes.tolist() == [0]
    method = CausalMap({0: graph}, "conv2")
    scores = method.attribute(net, images[:2], 0, runner=QUIET)
    assert scores.dims == ("example", "y", "x")
    assert float(scores[0].sum()) > 0
    assert float(scores[0, :, :4].sum() / scores[0].sum()) > 0.9
    with pytest.raises(InputError, match="no graph"):
        method.attribute(net, images[:2], 1, runner=QUIET)


def test_scores_and_the_picture():
    net = nissl.Network(PlantedChain(0))
    graph = CausalPaths().find(net, planted_images(0, 0, 20), 0, runner=QUIET)
    scores = graph.scores()
    assert scores.sel(layer="fc2").notnull().sum() == 24
    assert scores.sel(layer="fc3").notnull().sum() == 14
    assert np.asarray(scores.sel(layer="fc3"))[:3] == pytest.approx(graph.at("fc3").total_effect.mean(0)[:3].numpy())
    figure = graph.plot()
    assert len(figure.axes[0].lines) == sum(len(c.causes) * len(c.effects) for c in graph.layers)
    import matplotlib.pyplot as plt

    plt.close(figure)


def test_bad_input():
    net, images = nissl.Network(PlantedChain(0)), planted_images(0, 0, 20)
    with pytest.raises(InputError, match="not a chain"):
        CausalPaths(layers=["fc1", "fc3"]).find(net, images, 0)
    with pytest.raises(InputError, match="are no linear layers"):
        CausalPaths(layers=["nothing"]).find(net, images, 0)
    with pytest.raises(InputError, match="none of the 20 images"):
        CausalPaths().find(net, planted_images(0, 1, 20), 0)
    with pytest.raises(InputError, match="label"):
        CausalPaths().find(net, images, -1)
    with pytest.raises(InputError, match="runs no linear"):
        CausalPaths().find(nissl.Network(nn.Flatten()), images, 0)
    with pytest.raises(InputError, match="pads by"):
        CausalPaths().find(
            nissl.Network(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten())),
            torch.rand(2, 1, 4, 4), 0,
        )  # fmt: skip
    graph = CausalPaths().find(net, images, 0, runner=QUIET)
    with pytest.raises(InputError, match="factor"):
        graph.repaired(net, graph, factor=2)
    with pytest.raises(InputError, match="no layer"):
        graph.at("fc9")
    with pytest.raises(InputError, match="two-dimensional"):
        CausalMap({0: graph}, "fc2")
    with pytest.raises(InputError, match="at least one"):
        CausalMap({}, "fc2")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())
