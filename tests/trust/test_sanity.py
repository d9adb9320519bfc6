"""Sanity checks: what must move, moves; what must not, does not."""

import pytest
import torch
from torch import nn

import nissl
from nissl.attribution import EdgeDetector, GradCAM, InputXGradient, Saliency
from nissl.errors import InputError
from nissl.network import Pass
from nissl.trust.sanity import InputInvariance, RandomLogit, WeightRandomisation, layers_with_weights, shuffled


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    return nissl.Network(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8 * 12 * 12, 5),
        )
    )


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_shuffling_keeps_every_weight_and_touches_only_what_is_named(cnn):
    before = {k: v.clone() for k, v in cnn.module.state_dict().items()}
    other = shuffled(cnn, ["3.weight"], seed=3)
    assert torch.equal(other.weights()["3.weight"].flatten().sort().values, before["3.weight"].flatten().sort().values)
    assert not torch.equal(other.weights()["3.weight"], before["3.weight"])
    assert torch.equal(other.weights()["0.weight"], before["0.weight"])
    assert all(torch.equal(v, before[k]) for k, v in cnn.module.state_dict().items())
    assert other.fingerprint() != cnn.fingerprint() == nissl.Network(cnn.module).fingerprint()


def test_layers_are_listed_from_the_input(cnn):
    assert [layer[0] for layer in layers_with_weights(cnn)] == ["0.weight", "1.weight", "3.weight", "6.weight"]


def test_an_edge_detector_is_unmoved_and_saliency_moves(cnn, x):
    check = WeightRandomisation()
    edge = EdgeDetector().attribute(cnn, x)
    assert check.evaluate(cnn, x, edge, method=EdgeDetector())["randomisation_similarity"].tolist() == pytest.approx(
        [1, 1]
    )
    saliency = Saliency().attribute(cnn, x, target=0)
    moved = check.evaluate(cnn, x, saliency, target=0, method=Saliency())["randomisation_similarity"]
    assert (moved.abs() < 0.6).all()


def test_the_cascade_ends_in_the_fully_shuffled_network(cnn, x):
    check = WeightRandomisation(stages=4, independent=True)
    cascade, single = check.networks(cnn)
    assert [round(s, 2) for s, _ in cascade] == [0.25, 0.5, 0.75, 1.0]
    assert len(single) == 4
    everything = WeightRandomisation().networks(cnn)[0][-1][1]
    q = Pass(x, of=0, wrt=["input"])
    assert torch.allclose(cascade[-1][1].run(q).output, everything.run(q).output)


def test_another_class_gives_another_map_unless_the_network_has_only_one_direction(cnn, x):
    scores = InputXGradient().attribute(cnn, x, target=0)
    different = RandomLogit().evaluate(cnn, x, scores, target=0, method=InputXGradient())["logit_similarity"]
    assert (different < 0.95).all()
    module = nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        module.weight[:] = module.weight[:1] * torch.tensor([[1.0], [2.0], [3.0]])
    net, x = nissl.Network(module), torch.rand(2, 6)
    scores = InputXGradient().attribute(net, x, target=0)
    alike = RandomLogit().evaluate(net, x, scores, target=0, method=InputXGradient())["logit_similarity"]
    assert alike.tolist() == pytest.approx([1, 1])


def test_gradients_are_invariant_to_a_shift_that_the_network_takes_back_and_products_with_the_input_are_not(x):
    torch.manual_seed(0)
    net = nissl.Network(nn.Sequential(nn.Flatten(), nn.Linear(768, 6), nn.Tanh(), nn.Linear(6, 3)))
    saliency = Saliency().attribute(net, x, target=1)
    same = InputInvariance().evaluate(net, x, saliency, target=1, method=Saliency())["input_invariance"]
    assert (same > 0.999).all()
    product = InputXGradient().attribute(net, x, target=1)
    other = InputInvariance().evaluate(net, x, product, target=1, method=InputXGradient())["input_invariance"]
    assert (other < 0.99).all()


def test_methods_that_name_a_layer_find_it_in_the_shifted_network(cnn, x):
    method = GradCAM(layer="3")
    scores = method.attribute(cnn, x, target=1)
    # maps of the same activations and gradients
    same = InputInvariance().evaluate(cnn, x, scores, target=1, method=method)["input_invariance"]
    assert (same > 0.999).all()


def test_a_network_without_weights_cannot_be_randomised():
    net = nissl.Network(nn.ReLU())
    with pytest.raises(InputError, match="no weights"):
        WeightRandomisation().networks(net)
