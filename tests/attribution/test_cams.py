"""Class activation maps against networks whose maps are known, captum, and formulas written out anew."""

import captum.attr as captum
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nissl.attribution import AblationCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from nissl.attribution.cams import last_map, maps_of
from nissl.errors import GradientError, InputError, SiteError
from nissl.network import Network, target
from nissl.runner.runner import make_questions

ALL = [GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM, AblationCAM]
Y = torch.tensor([1, 4])


@pytest.fixture(scope="module")
def cnn() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        )
        .double()
        .eval()
    )


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def inner(cnn: nn.Module, x: torch.Tensor, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Activation behind module i and its gradient for the classes Y."""
    a = cnn[: i + 1](x).detach().requires_grad_()
    return a.detach(), torch.autograd.grad(cnn[i + 1 :](a).gather(1, Y[:, None]).sum(), a)[0]


class Attention(nn.Module):
    """Token ids, or float tokens, to classes by one transformer layer and a class token's read-out."""

    def __init__(self, ids: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8) if ids else nn.Linear(5, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, v):
        return self.head(self.norm(self.blocks(self.embed(v)))[:, 0])


def vit(size: int = 16) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return ViTForImageClassification(ViTConfig(image_size=size, patch_size=4, num_labels=3, **shape)).eval()


def series() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(6, 6, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip


# ---------------------------------------------------------------- values


def test_before_global_pooling_gradcam_is_the_class_activation_map(cnn, x):
    """Behind the last map there is only a mean and a linear layer: the weights are the class's own, over the area."""
    scores = GradCAM(upsample=False).attribute(Network(cnn), x, Y)
    a, _ = inner(cnn, x, 4)
    cam = torch.einsum("nc,ncyx->nyx", cnn[7].weight.detach()[Y], a) / (6 * 4)
    assert scores.dims == ("example", "y", "x")
    np.testing.assert_allclose(scores.values, cam.relu(), rtol=1e-9, atol=1e-15)
    assert scores.values.max() > 0


@pytest.mark.parametrize("layer", ["0", "2", "3"])
def test_gradcam_equals_captum(cnn, x, layer):
    module = nn.Sequential(*[nn.ReLU() if isinstance(m, nn.ReLU) else m for m in cnn])  # captum's hooks and in-place
    ours = GradCAM().attribute(Network(cnn), x, Y, site=layer).values
    theirs = captum.LayerGradCam(module, module[int(layer)]).attribute(x, target=Y, relu_attributions=True)
    np.testing.assert_allclose(ours, theirs.detach()[:, 0], rtol=1e-9, atol=1e-15)


def test_gradcam_plus_plus_is_the_closed_form_for_the_exponential(cnn, x):
    """Written out from its definition by second and third derivatives of exp(y)."""
    ours = GradCAMPlusPlus().attribute(Network(cnn), x, Y, site="2").values
    a, g = inner(cnn, x, 2)
    y = cnn(x).gather(1, Y[:, None]).detach()[..., None, None]
    first, second, third = y.exp() * g, y.exp() * g**2, y.exp() * g**3
    # Σ_p A_p stands beside the derivative at the position itself, as in the paper
    alpha = second / (2 * second + a.sum((2, 3), keepdim=True) * third).where(g != 0, torch.ones_like(g))
    weights = (alpha * first.relu()).sum((2, 3)) / y.exp()[..., 0, 0]
    cam = torch.einsum("nc,ncyx->nyx", weights, a).relu()
    np.testing.assert_allclose(ours, cam, rtol=1e-9, atol=1e-15)
    assert cam.max() > 0


def test_layercam_is_the_positive_gradient_times_activation(cnn, x):
    a, g = inner(cnn, x, 2)
    np.testing.assert_allclose(
        LayerCAM().attribute(Network(cnn), x, Y, site="2").values, (g.relu() * a).sum(1), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize("softmax", [True, False])
def test_scorecam_is_the_weighted_sum_over_masked_inputs(cnn, x, softmax):
    """One channel after the other, with a loop."""
    ours = ScoreCAM(softmax=softmax, upsample=False).attribute(Network(cnn), x, target.class_logit(Y)).values
    a, _ = inner(cnn, x, 4)
    for i in range(2):
        scores, live = [], []
        for channel in a[i]:
            up = F.interpolate(channel[None, None], size=(12, 8), mode="bilinear", align_corners=False)
            live.append(bool(channel.max() > channel.min()))
            mask = (up - up.min()) / (up.max() - up.min()) if live[-1] else torch.zeros_like(up)
            scores.append(float(cnn(x[i : i + 1] * mask)[0, Y[i]].detach()))
        s = np.array(scores)
        w = np.exp(s - s.max()) * live if softmax else s * live
        w = w / w.sum() if softmax else w
        np.testing.assert_allclose(ours[i], np.maximum(np.einsum("c,cyx->yx", w, a[i]), 0), rtol=1e-8, atol=1e-14)


def test_ablationcam_of_a_linear_read_out_is_each_channels_share(cnn, x):
    """Without channel c the logit falls by exactly w_c mean(A_c)."""
    a, _ = inner(cnn, x, 4)
    y = cnn(x).gather(1, Y[:, None]).detach()
    share = cnn[7].weight.detach()[Y] * a.mean((2, 3)) / y.abs()
    ours = AblationCAM(upsample=False).attribute(Network(cnn), x, Y).values
    np.testing.assert_allclose(ours, torch.einsum("nc,ncyx->nyx", share, a).relu(), rtol=1e-8, atol=1e-14)


def test_ablationcam_keeps_its_sign_for_negative_logits(cnn, x):
    """A constant added to the logit changes no map but by a scale."""
    net = Network(cnn)
    high, low = (
        AblationCAM(upsample=False).attribute(net, x, lambda out, c=c: out[:, 1] + c).values for c in (100.0, -100.0)
    )
    assert high.max() > 0
    for a, b in zip(high, low, strict=True):
        np.testing.assert_allclose(a / max(a.max(), 1e-30), b / max(b.max(), 1e-30), rtol=1e-8, atol=1e-12)


def test_dead_channels_are_left_out(x):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        convolution.bias[1:] = -100.0  # never active: constant maps
    dead = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double().eval()
    scores = ScoreCAM(upsample=False).attribute(Network(dead), x, 1)
    np.testing.assert_allclose(scores.values, dead[:2](x)[:, 0].detach(), rtol=1e-9)  # all the weight on the live one
    with torch.no_grad():
        convolution.bias[0] = -100.0
    for cls in ALL:
        np.testing.assert_array_equal(cls().attribute(Network(dead), x, 1).values, 0)


def test_cells_that_hold_the_same_get_the_same(x):
    """Grad-CAM gives a place-blind map where one of four equal cells is read: its known failure."""

    class OneCell(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.read = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)).double()

        def forward(self, grid):
            return self.read(grid[..., :6, :4].relu())

    grid = x[:, :, :6, :4].abs().tile(1, 1, 2, 2)
    for y in range(5):
        blind = GradCAM(layer="input").attribute(Network(OneCell()), grid, y).values
        whole = blind.sum((1, 2))
        cell = blind[:, :6, :4].sum((1, 2))
        np.testing.assert_allclose(cell, whole / 4, rtol=1e-9, atol=1e-15)
        seeing = LayerCAM(layer="input").attribute(Network(OneCell()), grid, y).values
        np.testing.assert_allclose(seeing[:, :6, :4].sum((1, 2)), seeing.sum((1, 2)), rtol=1e-12)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("cls", ALL)
def test_maps_are_interpolated_to_the_input_only_where_that_was_asked(cnn, x, cls):
    net = Network(cnn)
    native = cls(upsample=False).attribute(net, x, Y)
    full = cls().attribute(net, x, Y)
    inside = cls().attribute(net, x, Y, site="4")
    assert native.shape == inside.shape == (2, 6, 4)
    assert full.shape == (2, 12, 8)
    np.testing.assert_allclose(inside.values, native.values, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(
        full.values,
        F.interpolate(torch.from_numpy(native.values)[:, None], (12, 8), mode="bilinear", align_corners=False)[:, 0],
        rtol=1e-9, atol=1e-15,
    )  # fmt: skip


def chosen(module: nn.Module, inputs, **kwargs) -> tuple[str, tuple[int, ...], tuple[str, ...]]:
    q = make_questions(Network(module, **kwargs), inputs, 0)[0]
    place = last_map(q, maps_of(q))
    return place.site, place.positions, place.dims


def test_the_last_map_is_found(cnn, x):
    assert chosen(cnn, x) == ("4", (6, 4), ("y", "x"))
    assert chosen(series(), torch.randn(1, 4, 20)) == ("4", (10,), ("time",))
    # behind the last attention only the class token has a gradient
    assert chosen(Attention(ids=True), torch.arange(6)[None]) == ("blocks.layers.1.norm1", (6,), ("token",))
    assert chosen(vit(), torch.randn(1, 3, 16, 16)) == ("vit.layers.1.layernorm_before", (17,), ("token",))
    # nothing but the input is a map
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(288, 2)).double()
    assert chosen(mlp, x) == ("input", (12, 8), ("y", "x"))


def test_channels_are_found_on_the_last_axis():
    """A network that keeps channels last, as Swin does, and permutes them in the end."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.mix = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 8)
            self.act, self.fold, self.head = nn.GELU(), nn.Identity(), nn.Linear(8, 2)

        def forward(self, v):
            v = self.act(self.mix(self.norm(self.conv(v).permute(0, 2, 3, 1))))
            return self.head(self.fold(v.permute(0, 3, 1, 2)).mean((2, 3)))

    torch.manual_seed(0)
    module, v = Last().eval(), torch.randn(1, 3, 8, 6)
    maps = {m.site: m for m in maps_of(make_questions(Network(module), v, 0)[0])}
    assert {s: (maps[s].axis, maps[s].positions) for s in ("conv", "norm", "mix", "act", "fold")} == {
        "conv": (1, (4, 3)), "norm": (3, (4, 3)), "mix": (3, (4, 3)), "act": (3, (4, 3)), "fold": (1, (4, 3)),
    }  # fmt: skip
    last, first = (GradCAM().attribute(Network(module), v, 1, site=s).values for s in ("act", "fold"))
    np.testing.assert_allclose(last, first, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("cls", ALL)
def test_patches_of_a_transformer_lie_on_the_image(cls):
    net, v = Network(vit()), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = cls().attribute(net, v, 1)
    assert (scores.dims, scores.shape) == (("example", "y", "x"), (2, 16, 16))
    assert cls(upsample=False).attribute(net, v, 1).shape == (2, 4, 4)
    tokens = cls().attribute(net, v, 1, site="vit.layers.1.layernorm_before")
    assert (tokens.dims, tokens.shape) == (("example", "token"), (2, 17))
    np.testing.assert_allclose(
        cls(upsample=False).attribute(net, v, 1).values.reshape(2, 16), tokens.values[:, 1:], rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("cls", ALL)
def test_series_and_tokens(cls):
    torch.manual_seed(0)
    time = cls().attribute(Network(series()), torch.randn(2, 4, 20), 1)
    assert (time.dims, time.shape) == (("example", "time"), (2, 20))
    ids = torch.randint(0, 11, (2, 6))
    words = cls().attribute(Network(Attention(ids=True).eval()), ids, 1)
    assert (words.dims, words.shape) == (("example", "token"), (2, 6))
    named = cls(layer="blocks.layers.0").attribute(Network(Attention(ids=True).eval()), ids, 1)
    assert (named.dims, named.shape) == (("example", "token"), (2, 6))
    vectors = Network(Attention(ids=False).eval(), dims=("token", "unit"))
    assert cls().attribute(vectors, torch.randn(2, 6, 5), 1).dims == ("example", "token")


def test_a_black_box_has_its_input_for_a_map():
    net = Network(lambda v: np.stack([v[:, 0].mean((1, 2)), v[:, 1].mean((1, 2))], 1))
    v = np.random.default_rng(0).random((2, 2, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(  # without a channel the mean of that channel is lost, and nothing else
        AblationCAM().attribute(net, v, 0).values, v[:, 0], rtol=1e-4
    )
    assert ScoreCAM().attribute(net, v, 0).shape == (2, 4, 4)
    with pytest.raises(GradientError):
        GradCAM().attribute(net, v, 0)


# ---------------------------------------------------------------- cost and errors


def test_costs_and_budgets(cnn, x):
    net = Network(cnn)
    for made, cost in (
        (GradCAM(), (2, 2)), (GradCAMPlusPlus(), (2, 2)), (LayerCAM(), (2, 2)), (ScoreCAM(), (14, 0)),
        (AblationCAM(), (14, 0)), (ScoreCAM().at_budget(4), (8, 0)), (AblationCAM().at_budget(4), (8, 0)),
        (ScoreCAM().at_budget(10**6), (14, 0)),
    ):  # fmt: skip
        scores = made.attribute(net, x, Y)
        assert (scores.attrs["forward_passes"], scores.attrs["backward_passes"]) == cost


def test_a_budget_keeps_the_most_active_channels(cnn, x):
    a, _ = inner(cnn, x, 4)
    best = int(a[0].mean((1, 2)).argmax())
    y = int(cnn[7].weight[:, best].argmax())
    one = AblationCAM(n_channels=1, upsample=False).attribute(Network(cnn), x[:1], lambda out: out[:, y] + 50).values[0]
    expected = np.maximum(float(cnn[7].weight[y, best].detach()) * a[0, best].numpy(), 0)
    np.testing.assert_allclose(one / one.max(), expected / expected.max(), rtol=1e-8)


@pytest.mark.parametrize("cls", ALL)
def test_wrong_places_are_named(cnn, x, cls):
    net = Network(cnn)
    with pytest.raises(InputError, match="two places"):
        cls(layer="4").attribute(net, x, Y, site="2")
    with pytest.raises(InputError, match="no channels at positions; maps are at"):
        cls(layer="7").attribute(net, x, Y)
    with pytest.raises(SiteError, match="features"):
        cls(layer="features").attribute(net, x, Y)
    table = Network(nn.Linear(3, 2))
    with pytest.raises(InputError, match="no map to show"):
        cls().attribute(table, torch.randn(2, 3), 0)


def test_wrong_parameters():
    for wrong in (lambda: ScoreCAM(n_channels=0), lambda: AblationCAM(n_channels=0), lambda: ScoreCAM(baseline="no")):
        with pytest.raises(InputError):
            wrong()


def test_scorecam_takes_one_baseline(cnn, x):
    with pytest.raises(InputError, match="one baseline"):
        ScoreCAM(baseline=torch.zeros(2, 3, 12, 8)).attribute(Network(cnn), x, Y)


def test_a_map_beside_its_pooled_vector_is_not_chosen():
    """Wrapped backbones put out both and go on with the vector: the map beside it has no gradient."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

        def forward(self, v):
            a = self.body(v)
            return {"last": a * 1, "pooled": a.mean((2, 3))}

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.backbone, self.head = Backbone(), nn.Linear(4, 2)

        def forward(self, v):
            return self.head(self.backbone(v)["pooled"])

    v = torch.randn(1, 3, 8, 8)
    assert chosen(Wrapped(), v)[0] == "backbone.body"
    assert GradCAM().attribute(Network(Wrapped()), v, 1).shape == (1, 8, 8)
