"""Relevance methods against captum, against what they promise to conserve, and where they equal simpler ones."""

import captum.attr as captum
import numpy as np
import pytest
import torch
from torch import nn

from nissl.attribution import LRP, DeconvNet, DeepLIFT, GuidedBackprop, InputXGradient, IntegratedGradients, Saliency
from nissl.errors import InputError, RuleError
from nissl.network import Network, target
from nissl.runner import CHUNK, Runner
from nissl.runner.scores import parameters_of

Y = torch.tensor([1, 4, 0])


def cnn(bias: bool = True, inplace: bool = False, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=bias),
            nn.ReLU(inplace),
            pool(2),
            nn.Conv2d(4, 6, 3, bias=bias),
            nn.ReLU(inplace),
            nn.Flatten(),
            nn.Linear(24, 8, bias=bias),
            nn.ReLU(inplace),
            nn.Linear(8, 5, bias=bias),
        )
        .double()
        .eval()
    )


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return module(x).gather(1, Y[:, None])[:, 0].numpy()


# ---------------------------------------------------------------- guided back-propagation and deconvolution


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
@pytest.mark.parametrize(
    ("ours", "theirs"), [(GuidedBackprop, captum.GuidedBackprop), (DeconvNet, captum.Deconvolution)]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_changed_relus_equal_captum(x, ours, theirs, inplace):
    scores = ours().attribute(Network(cnn(inplace=inplace)), x, Y)
    expected = theirs(cnn()).attribute(x.clone().requires_grad_(), target=Y).detach()
    np.testing.assert_allclose(scores.values, expected, rtol=1e-9, atol=1e-15)
    assert np.abs(scores.values - Saliency().attribute(Network(cnn()), x, Y).values).max() > 1e-3


@pytest.mark.parametrize("cls", [GuidedBackprop, DeconvNet])
def test_without_relus_there_is_nothing_to_change(cls):
    smooth = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(RuleError, match="ReLU"):
        cls().attribute(Network(smooth), torch.randn(1, 3), 0)


# ---------------------------------------------------------------- DeepLIFT


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_deeplift_equals_captum(x, baseline):
    """With average pooling: of maxima that lie at different places captum sees only that of the input."""
    scores = DeepLIFT(baseline=baseline).attribute(Network(cnn(pool=nn.AvgPool2d)), x, Y)
    theirs = captum.DeepLift(cnn(pool=nn.AvgPool2d))
    expected = theirs.attribute(x.clone().requires_grad_(), torch.full_like(x, baseline), target=Y).detach()
    np.testing.assert_allclose(scores.values, expected, rtol=1e-6, atol=1e-10)
    assert (scores.attrs["forward_passes"], scores.attrs["backward_passes"]) == (6, 6)


@pytest.mark.parametrize("baseline", [0.0, 0.4, "mean", "blur"])
def test_deeplift_is_complete(x, baseline):
    scores = DeepLIFT(baseline=baseline).attribute(Network(cnn()), x, Y)
    assert scores.completeness_gap.max() < 1e-9
    if isinstance(baseline, float):
        promised = logits(cnn(), x) - logits(cnn(), torch.full_like(x, baseline))
        np.testing.assert_allclose(scores.sum(("channel", "y", "x")), promised, rtol=1e-9)


@pytest.mark.parametrize("site", ["1", "2", "6"])
def test_deeplift_is_complete_at_inner_sites(x, site):
    module = cnn(inplace=True)
    scores = DeepLIFT().attribute(Network(module), x, Y, site=site)
    with torch.no_grad():
        rest = module[int(site) + 1 :]
        zero = rest(torch.zeros_like(cnn()[: int(site) + 1](x))).gather(1, Y[:, None])[:, 0].numpy()
    promised = logits(cnn(), x) - zero
    np.testing.assert_allclose(scores.values.reshape(3, -1).sum(1), promised, rtol=1e-9)


def test_deeplift_averages_over_baselines(x):
    pool = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    module, rows = cnn(), []
    module.register_forward_pre_hook(lambda m, a: rows.append(len(a[0])))
    many = DeepLIFT(baseline=pool).attribute(Network(module), x[:1], Y[:1], runner=Runner(tune=False))
    assert max(rows) <= CHUNK
    each = [DeepLIFT(baseline=pool[i : i + 1]).attribute(Network(module), x[:1], Y[:1]).values for i in range(40)]
    np.testing.assert_allclose(many.values, np.mean(each, 0), rtol=1e-9, atol=1e-13)
    assert many.completeness_gap.item() < 1e-9


def test_deeplift_of_a_product_shares_the_interaction_equally():
    """The product of two inputs has, from zero, only an interaction: half of it to each."""

    class Product(nn.Module):
        def forward(self, v):
            return (v[:, :1] * v[:, 1:]).relu()

    v = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    scores = DeepLIFT().attribute(Network(Product(), dtype=torch.float64), v, 0)
    np.testing.assert_allclose(scores.values, [[6.0, 6.0]], rtol=1e-12)


def test_a_softmax_in_the_target_shows_in_the_gap(x):
    net = Network(cnn())
    assert DeepLIFT().attribute(net, x, target.probability(Y)).completeness_gap.max() > 1e-4


# ---------------------------------------------------------------- LRP


def test_lrp_epsilon_tends_to_input_times_gradient_in_relu_networks(x):
    """With ReLUs, max pooling and any biases the epsilon rule is input times gradient as epsilon goes to 0."""
    net = Network(cnn())
    exact = InputXGradient().attribute(net, x, Y).values
    errors = [np.abs(LRP("epsilon", epsilon=e).attribute(net, x, Y).values - exact).max() for e in (1e-2, 1e-4, 1e-12)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9 * np.abs(exact).max()


def test_lrp_epsilon_equals_captum(x):
    from captum.attr._utils.lrp_rules import EpsilonRule

    class Flat(nn.Module):
        """The same network; captum has no rule for the module Flatten."""

        def __init__(self):
            super().__init__()
            layers = cnn()
            self.below, self.above = layers[:5], layers[6:]
            for m in self.modules():
                if isinstance(m, (nn.Conv2d, nn.Linear)):
                    m.rule = EpsilonRule(epsilon=1e-3)

        def forward(self, v):
            return self.above(self.below(v).flatten(1))

    theirs = captum.LRP(Flat()).attribute(x.clone().requires_grad_(), target=Y).detach()
    ours = LRP("epsilon", epsilon=1e-3).attribute(Network(cnn()), x, Y).values
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box"])
@pytest.mark.parametrize("inplace", [False, True])
def test_relevance_is_conserved_without_biases(x, composite, inplace):
    module = cnn(bias=False, inplace=inplace)
    scores = LRP(composite, epsilon=1e-12).attribute(Network(module), x, Y)
    np.testing.assert_allclose(scores.sum(("channel", "y", "x")), logits(module, x), rtol=1e-6)
    assert scores.conservation_gap.max() < 1e-6
    assert (scores.attrs["forward_passes"], scores.attrs["backward_passes"]) == (3, 3)


def test_what_biases_take_is_reported(x):
    scores = LRP("epsilon_plus").attribute(Network(cnn()), x, Y)
    missing = np.abs(scores.sum(("channel", "y", "x")).values - logits(cnn(), x)) / np.abs(logits(cnn(), x))
    np.testing.assert_allclose(scores.conservation_gap, missing, rtol=1e-9)
    assert scores.conservation_gap.max() > 1e-3


def test_the_flat_rule_shares_without_looking_at_pixels(x):
    """A first layer with one 2 x 2 window: whatever the pixels, each has a twelfth."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    scores = LRP("epsilon_plus_flat", epsilon=1e-12).attribute(Network(module), x[:, :, :2, :2], 1).values
    with torch.no_grad():
        y = module(x[:, :, :2, :2])[:, 1].numpy()
    np.testing.assert_allclose(scores, np.broadcast_to(y[:, None, None, None] / 12, scores.shape), rtol=1e-6)


def test_the_box_is_each_examples_range(x):
    net = Network(cnn())
    automatic = LRP("epsilon_gamma_box").attribute(net, x, Y).values
    for i in range(3):
        low, high = float(x[i].min()), float(x[i].max())
        given = LRP("epsilon_gamma_box", low=low, high=high).attribute(net, x[i : i + 1], Y[i : i + 1]).values
        np.testing.assert_allclose(automatic[i : i + 1], given, rtol=1e-9, atol=1e-14)
    wider = LRP("epsilon_gamma_box", low=-9.0, high=9.0).attribute(net, x, Y).values
    by_channel = LRP("epsilon_gamma_box", low=torch.full((1, 3, 1, 1), -9.0), high=9.0)
    np.testing.assert_array_equal(by_channel.attribute(net, x, Y).values, wider)
    assert parameters_of(by_channel)["low"] == [-9.0, -9.0, -9.0]  # numbers that a record can hold
    assert np.abs(wider - automatic).max() > 1e-6
    # positive images: the box still reaches down to zero
    positive = LRP("epsilon_gamma_box").attribute(net, x.abs() + 1, Y).values
    for i in range(3):
        high = float(x[i].abs().max()) + 1
        given = LRP("epsilon_gamma_box", low=0.0, high=high).attribute(net, x[i : i + 1].abs() + 1, Y[i : i + 1]).values
        np.testing.assert_allclose(positive[i : i + 1], given, rtol=1e-9, atol=1e-14)
    with pytest.raises(InputError, match="zero everywhere"):
        LRP("epsilon_gamma_box").attribute(net, torch.zeros_like(x), Y)


def test_first_layer_rules_belong_to_the_input(x):
    with pytest.raises(InputError, match="'input'"):
        LRP("epsilon_plus_flat").attribute(Network(cnn()), x, Y, site="1")


def test_lrp_inside_is_conserved_too(x):
    module = cnn(bias=False)
    scores = LRP("epsilon_plus", epsilon=1e-12).attribute(Network(module), x, Y, site="1")
    np.testing.assert_allclose(scores.sum(("channel", "y", "x")), logits(module, x), rtol=1e-6)


def test_relp_hands_a_transformers_logit_back_to_its_embeddings():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=0, rms_norm_eps=1e-12,
    )  # fmt: skip
    net = Network(LlamaForCausalLM(config).double().eval())
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    last = target.class_logit(7, position=-1)
    scores = LRP("relp").attribute(net, {"input_ids": ids}, last)
    assert scores.dims == ("example", "token", "unit")
    assert scores.shape == (2, 5, 16)
    assert scores.conservation_gap.max() < 1e-6  # no biases: every rule conserves
    plain = InputXGradient().attribute(net, {"input_ids": ids}, last).values
    for composite in ("relp", "attnlrp"):
        changed = LRP(composite).attribute(net, {"input_ids": ids}, last).values
        assert np.abs(changed - plain).max() > 1e-3 * np.abs(plain).max()


@pytest.mark.parametrize(
    "wrong",
    [{"composite": "gamma"}, {"epsilon": 0.0}, {"composite": "epsilon_gamma_box", "low": 1.0},
     {"composite": "epsilon_gamma_box", "low": 1.0, "high": 0.0}, {"composite": "relp", "epsilon": 0.1}],
)  # fmt: skip
def test_wrong_parameters(wrong):
    with pytest.raises(InputError):
        LRP(**wrong)


def test_all_four_agree_on_a_linear_network():
    """Without nonlinearities and biases there is one answer."""
    torch.manual_seed(0)
    module, v = nn.Linear(5, 3, bias=False).double(), torch.randn(2, 5, dtype=torch.float64)
    expected = (module.weight[1] * v).detach()
    for made in (DeepLIFT(), LRP("epsilon", epsilon=1e-12), InputXGradient(), IntegratedGradients(steps=2)):
        np.testing.assert_allclose(made.attribute(Network(module), v, 1).values, expected, rtol=1e-6)
