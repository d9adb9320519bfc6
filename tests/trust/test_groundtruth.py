import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
import xarray as xr
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional as F

from nissl.attribution import (
    METHODS,
    GradCAM,
    InputXGradient,
    IntegratedGradients,
    LayerCAM,
    Method,
    Occlusion,
    RandomScores,
    Saliency,
)
from nissl.errors import InputError, NisslError, SiteError
from nissl.network import Guided, Network, Pass
from nissl.network.part import Part, above
from nissl.runner import Runner, explained
from nissl.trust.groundtruth import (
    DiFull,
    DiPart,
    GridPG,
    Smoothed,
    aggatt,
    boxes_to_masks,
    cut,
    energy_pointing_game,
    filled_cell,
    ground_truth,
    localization,
    make_grids,
    map_sites,
    pointing_figures,
    pointing_game,
    smooth,
    stitch,
)


class CNN(nn.Module):
    """Three convolutions with batch norm and biases, a global pool, random weights."""

    def __init__(self, padding_mode="zeros", n_classes=6, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = []
        for a, b, stride in ((3, 8, 1), (8, 12, 2), (12, 16, 2)):
            conv = nn.Conv2d(a, b, 3, stride=stride, padding=1, padding_mode=padding_mode)
            norm = nn.BatchNorm2d(b)
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.bias, 0, 0.3)
            nn.init.normal_(conv.bias, 0, 0.3)
            layers += [conv, norm, nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(16, n_classes)
        self.eval()

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self, from_input=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, padding=1), "b": nn.Conv2d(4, 4, 3, padding=1)})
        self.join = nn.Identity()
        self.head = nn.Linear(4, 5)
        self.from_input = from_input
        self.act = nn.ReLU()
        self.eval()

    def forward(self, x):
        y = self.act(self.stem(x))
        y = self.join(self.act(self.block["b"](self.act(self.block["a"](y))) + y))
        out = self.head(y.mean((2, 3)))
        return out + x.mean((1, 2, 3))[:, None] if self.from_input else out


class Flat(nn.Module):
    """A classifier that takes a map of one size only."""

    def __init__(self, adaptive=False):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(2) if adaptive else nn.AvgPool2d(4)
        self.head = nn.Linear(20, 6)
        self.eval()

    def forward(self, x):
        return self.head(self.pool(self.act(self.conv(x))).flatten(1))


class Colours(nn.Module):
    """Class c is the mean of channel c: what is responsible is known."""

    def __init__(self, n_classes=6, scale=100):
        super().__init__()
        self.conv = nn.Conv2d(n_classes, n_classes, 1, bias=False)
        self.act = nn.ReLU()
        self.head = nn.Linear(n_classes, n_classes, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(n_classes)[..., None, None])
            self.head.weight.copy_(scale * torch.eye(n_classes))
        self.eval()

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def images(n=6, size=16, seed=0, channels=3):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def colour_images(n=12, n_classes=6, size=8):
    x = torch.zeros(n, n_classes, size, size)
    y = torch.arange(n) % n_classes
    x[torch.arange(n), y] = torch.rand(n, size, size, generator=torch.Generator().manual_seed(0)) + 0.5
    return x, y


def untouched(module):
    return not any(
        "forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks or m.training for m in module.modules()
    ) and all(p.requires_grad and p.grad is None for p in module.parameters())


def explain(method, setting, x, head, classes):
    """Scores (example, y, x) of a method at the input of a network on grids."""
    runner = Runner(progress=False, tune=False)
    scores = runner.attribute({"m": method}, setting, setting.with_head(x, head), classes)["m"]
    return scores.sum("channel") if "channel" in scores.dims else scores


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("site", ["input", "features.0", "features.3:in", "features.5", "features", "head:in"])
def test_a_part_gives_what_the_whole_gives(site):
    module, x = CNN(), images()
    net = Network(module)
    part = above(net, site, x)
    answer = net.run(Pass(x, read=[site], of=2, wrt=[site]))
    a = answer.reads[site].clone().requires_grad_()
    kept = a.detach().clone()
    out = part(a)
    torch.testing.assert_close(out, answer.output)
    (g,) = torch.autograd.grad(out[:, 2].sum(), a)
    torch.testing.assert_close(g, answer.gradients[site])
    assert torch.equal(a, kept)
    assert untouched(module)


def test_a_part_between_two_sites_and_its_order():
    net, x = Network(CNN()), images()
    reads = net.run(Pass(x, read=["features.2", "features.5"])).reads
    part = Part(net, "features.2", "features.5")
    torch.testing.assert_close(part(reads["features.2"]), reads["features.5"])
    torch.testing.assert_close(Part(net, "features.2", "features.2")(reads["features.2"]), reads["features.2"])
    with pytest.raises(InputError, match="lies before"):
        Part(net, "features.5", "features.2")
    with pytest.raises(SiteError, match=r"features\.99"):
        Part(net, "features.99")


def test_a_part_runs_only_what_lies_above():
    class Counting(nn.Identity):
        def forward(self, x):
            ran.append(x.shape)
            return x

    ran = []
    module = nn.Sequential(Counting(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    net, x = Network(module), images(4, 4)
    part = above(net, "1", x)
    ran.clear()
    part(net.run(Pass(x, read=["1"])).reads["1"])
    assert len(ran) == 1  # by the whole network, not by the part


def test_residual_blocks_are_cut_at_their_ends_only():
    net, x = Network(Residual()), images()
    with pytest.raises(InputError, match="cannot be cut"):
        above(net, "block.a", x)
    torch.testing.assert_close(
        above(net, "join", x)(net.run(Pass(x, read=["join"])).reads["join"]), net.run(Pass(x)).output
    )
    with pytest.raises(InputError, match="cannot be cut"):
        above(Network(Residual(from_input=True)), "join", x)
    assert untouched(net.module)


def test_calls_of_a_shared_module_are_told_apart():
    net, x = Network(Residual()), images()
    with pytest.raises(SiteError, match="called 3 times"):
        above(net, "act", x)
    torch.testing.assert_close(
        above(net, "act#1", x)(net.run(Pass(x, read=["act#1"])).reads["act#1"]), net.run(Pass(x)).output
    )


def test_parts_work_under_rule_sets():
    net, x = Network(CNN()), images()
    part = Network(above(net, "features.2", x))
    whole = net.run(Pass(x, read=["features.2"], of=1, wrt=["features.2"], rules=Guided()))
    alone = part.run(Pass(whole.reads["features.2"], of=1, wrt=["input"], rules=Guided()))
    torch.testing.assert_close(alone.gradients["input"], whole.gradients["features.2"])
    plain = part.run(Pass(whole.reads["features.2"], of=1, wrt=["input"]))
    assert not torch.allclose(alone.gradients["input"], plain.gradients["input"])


def test_a_part_that_raises_leaves_nothing_behind():
    module = CNN()
    net = Network(module)
    part = above(net, "features.2", images())
    with pytest.raises(InputError, match=r"failed on inputs.*5 channels"):
        part(torch.zeros(2, 5, 16, 16))
    assert untouched(module)
    with pytest.raises(InputError, match="seen no input"):
        above(Network(CNN()), "features.2")
    assert net.run(Pass(images())).output.shape == (6, 6)


# ---------------------------------------------------------------- grids


def test_grids_hold_the_images_of_distinct_classes():
    x = images(24)
    y = torch.arange(24) % 8
    made = make_grids(x, y, 2, seed=3)
    assert made.images.shape == (6, 3, 32, 32)
    torch.testing.assert_close(cut(made.images, 2), x[made.sources])
    torch.testing.assert_close(stitch(cut(made.images, 2)), made.images)
    assert all(len(set(row)) == 4 for row in made.labels.tolist())
    assert torch.equal(made.labels, y[made.sources])
    assert len(set(made.sources.flatten().tolist())) == 24
    assert made.notes == ()
    torch.testing.assert_close(made.images[0, :, 16:, :16], x[made.sources[0, 2]])  # row by row
    assert torch.equal(make_grids(x, y, 2, seed=3).sources, made.sources)
    assert not torch.equal(make_grids(x, y, 2, seed=4).sources, made.sources)


def test_corners_repeat_a_class_with_another_image():
    y = torch.arange(24) % 8
    made = make_grids(images(24), y, 2, n_grids=4, repeat_corners=True)
    assert torch.equal(made.labels[:, 0], made.labels[:, -1])
    assert (made.sources[:, 0] != made.sources[:, -1]).all()
    assert all(len(set(row)) == 3 for row in made.labels.tolist())


def test_too_few_images_are_used_again_and_that_is_said():
    made = make_grids(images(5), torch.arange(5), 2, n_grids=4)
    assert len(made.images) == 4
    assert "up to" in made.notes[0]
    same = make_grids(images(5), torch.arange(5), 2, n_grids=1, repeat_corners=True)
    assert torch.equal(same.sources[:, 0], same.sources[:, -1])
    assert "same image" in same.notes[0]
    with pytest.raises(InputError, match="4 classes, there are 3"):
        make_grids(images(6), torch.arange(6) % 3, 2)
    with pytest.raises(InputError, match="labels"):
        make_grids(images(6), torch.arange(5), 2)


# ---------------------------------------------------------------- scores


def test_localization_of_known_maps():
    for n in (2, 3):
        maps = np.zeros((3, n * 8, n * 8))
        maps[0, :8, :8] = 1
        maps[1] = 0.3
        maps[2] = -1
        score = localization(maps, n)
        assert score.dims == ("example", "head")
        np.testing.assert_allclose(score[0], np.eye(n * n)[0])
        np.testing.assert_allclose(score[1], 1 / n**2)
        np.testing.assert_allclose(score[2], 0)


def test_interpolation_costs_what_it_must():
    # s coarse pixels a side, each u fine ones: the border carries u / 8 pixels a side into the neighbour
    corner = 1 - 1 / 8 / 7
    centre = 1 - 2 / 8 / 7
    for n in (2, 3):
        assert filled_cell(n, 0, (7 * n, 7 * n), (224 * n, 224 * n)) == pytest.approx(corner**2, abs=2e-4)
    assert filled_cell(3, 4, (21, 21), (672, 672)) == pytest.approx(centre**2, abs=2e-4)
    assert filled_cell(2, 3, (64, 64), (64, 64)) == 1


def test_localization_by_head_takes_the_right_cell():
    maps = np.zeros((2, 2, 3, 8, 8))
    maps[:, 0, :, :4, :4] = 1
    maps[:, 1, 0, 4:, 4:] = 2
    maps[:, 1, 1, :4, :4] = 1
    maps[:, 1, 2, :4, :4] = -1  # channels are summed before the sign is looked at
    scores = xr.DataArray(maps, dims=("example", "head", "channel", "y", "x"), coords={"head": [0, 3]})
    np.testing.assert_allclose(localization(scores, 2), 1)
    flipped = scores.assign_coords(head=[3, 0])
    np.testing.assert_allclose(localization(flipped, 2), 0)
    with pytest.raises(InputError, match="no cells"):
        localization(scores.assign_coords(head=[0, 4]), 2)
    with pytest.raises(InputError, match="cannot be cut"):
        localization(np.ones((1, 9, 9)), 2)


def test_smoothing_is_a_gaussian_blur():
    x = torch.randn(3, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blurred = smooth(x, 9)
    for a, b in zip(blurred, x, strict=True):
        np.testing.assert_allclose(a, gaussian_filter(b.numpy(), 9 / 4, mode="constant", radius=4), atol=1e-12)
    named = xr.DataArray(x.numpy(), dims=("example", "y", "x"))
    np.testing.assert_allclose(smooth(named, 9), blurred)
    np.testing.assert_allclose(smooth(x, 1), x)
    with pytest.raises(InputError, match="odd"):
        smooth(x, 8)


def test_a_smoothed_method_smooths_signed_sums():
    net, x = Network(CNN()), images(3)
    raw = InputXGradient().attribute(net, x, 1).sum("channel")
    made = Smoothed(InputXGradient(), 5).attribute(net, x, 1)
    np.testing.assert_allclose(made, smooth(torch.from_numpy(raw.values), 5), atol=1e-6)
    assert Smoothed(Saliency()).differentiates
    assert not Smoothed(RandomScores()).class_sensitive


def test_aggatt_sorts_and_bins():
    maps = np.zeros((100, 4, 4))
    share = np.linspace(0, 1, 100)
    maps[:, 0, 0], maps[:, 3, 3] = share, 1 - share
    order = np.random.default_rng(0).permutation(100)
    found = aggatt(maps[order], 2, 0)
    assert found["count"].values.tolist() == [2, 3, 45, 45, 3, 2]
    best = np.sort(share)[::-1]
    edges = [0, 2, 5, 50, 95, 98, 100]
    expected = [best[a:b].mean() for a, b in pairwise(edges)]
    np.testing.assert_allclose(found["score"], expected)
    np.testing.assert_allclose(found[:, 0, 0], expected)
    np.testing.assert_allclose(share[order][found["example"].values[2]], best[2 + 3 + 45 // 2], atol=1e-12)
    assert found.attrs["limit"] <= found.max()
    # ties: the larger sum inside first
    same = np.zeros((4, 4, 4))
    same[:, 0, 0] = [1, 3, 2, 4]
    with pytest.warns(UserWarning, match="too few"):
        tied = aggatt(same, 2, 0, bins=(0, 0.25, 0.5, 0.51, 0.75, 1))
    assert tied["example"].values.tolist() == [3, 1, 2, 0]
    with pytest.raises(InputError, match="bins"):
        aggatt(same, 2, 0, bins=(0, 0.5))


def test_the_common_limit_leaves_little_above_it():
    maps = np.ones((10, 10, 10))
    maps[:, 0, 0] = 1000
    found = aggatt(maps, 2, 0, bins=(0, 1), clip=0.005)
    assert found.attrs["limit"] == 1000  # one pixel of 1000 holds far more than .5 % of the sum
    maps[:, 0, 0] = 1.2
    above_limit = (found * 0 + maps.mean(0)).values
    limit = aggatt(maps, 2, 0, bins=(0, 1), clip=0.02).attrs["limit"]
    assert limit == 1
    assert above_limit[above_limit > limit].sum() <= 0.02 * above_limit.sum()


def test_pointing_games_on_planted_objects():
    masks = boxes_to_masks([[2, 3, 6, 5], [0, 0, 4, 4], [0, 0, 4, 4]], 20, 20)
    assert masks[0].sum() == 8
    assert masks[0][3:5, 2:6].all()
    maps = np.zeros((3, 20, 20))
    maps[0, 4, 3] = 2  # inside
    maps[0, 10, 10] = 1
    maps[1, 3, 8] = 1  # five pixels from the box
    maps[2] = 1
    np.testing.assert_allclose(pointing_game(maps, masks, tolerance=0), [1, 0, 16 / 400])
    np.testing.assert_allclose(pointing_game(maps, masks, tolerance=5)[:2], [1, 1])
    np.testing.assert_allclose(pointing_game(maps, masks, tolerance=4.9)[:2], [1, 0])
    np.testing.assert_allclose(energy_pointing_game(maps, masks), [2 / 3, 0, 16 / 400])
    np.testing.assert_allclose(energy_pointing_game(-maps, masks), 0)
    named = {
        "a": xr.DataArray(maps, dims=("example", "y", "x")),
        "b": xr.DataArray(np.zeros((3, 4)), dims=("example", "f")),
    }
    rows = pointing_figures(named, masks)
    assert len(rows) == 6
    assert {r[2] for r in rows} == {"pointing", "energy_pointing"}
    for wrong in ([[0, 0, 1, 1]], np.zeros((3, 20, 20)), np.ones((2, 20, 20))):
        with pytest.raises(InputError):
            pointing_game(maps, wrong)


# ---------------------------------------------------------------- the three settings


@pytest.mark.parametrize("layer", ["input", "middle", "final", "features.2"])
def test_settings_compute_what_they_say(layer):
    module, x = CNN(), images(8)
    net = Network(module)
    assert map_sites(net, x[:1]) == {"input": "input", "middle": "features.5", "final": "features"}
    grids = stitch(x.unflatten(0, (2, 4)))
    site = map_sites(net).get(layer, layer)
    whole = grids if site == "input" else net.run(Pass(grids, read=[site])).reads[site]
    single = x if site == "input" else net.run(Pass(x, read=[site])).reads[site]

    pg = GridPG(net, 2, layer)
    torch.testing.assert_close(pg.at_layer(grids), whole)
    torch.testing.assert_close(pg.run(Pass(pg.with_head(whole, 0))).output, net.run(Pass(grids)).output)

    full = DiFull(net, 2, layer, head=1)
    assert full.heads == (0, 3)
    torch.testing.assert_close(full.at_layer(grids), stitch(single.unflatten(0, (2, 4))))
    each = net.run(Pass(x)).output.unflatten(0, (2, 4))
    a = full.at_layer(grids)
    torch.testing.assert_close(full.run(Pass(a)).output, each[:, 1])
    mixed = full.run(Pass({"0": a, "1": torch.tensor([3, 0])})).output
    torch.testing.assert_close(mixed, torch.stack([each[0, 3], each[1, 0]]))

    part = DiPart(net, 2, layer)
    torch.testing.assert_close(part.at_layer(grids), whole)
    last = net.run(Pass(grids, read=["features"])).reads["features"]
    expected = module.head(last[:, :, 4:, :4].mean((2, 3)))
    torch.testing.assert_close(part.run(Pass(part.with_head(whole, 2))).output, expected)
    with pytest.raises(InputError, match="0 to 3"):
        part.run(Pass(part.with_head(whole, 4)))
    assert untouched(module)


def test_networks_on_grids_have_their_own_fingerprints():
    net = Network(CNN())
    made = [
        GridPG(net, 2, inputs=images(1)), GridPG(net, 2, "final"), GridPG(net, 3), DiFull(net, 2), DiPart(net, 2),
        DiFull(net, 2, head=1), DiFull(net, 2, "final"),
        DiFull(net.changed({"head.bias": torch.ones(6)}), 2),
    ]  # fmt: skip
    assert len({m.fingerprint() for m in made}) == len(made)
    assert DiFull(net, 2).fingerprint() == made[3].fingerprint()


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_classifier_of_fixed_size_is_slid_over_the_grid(adaptive):
    module, x = Flat(adaptive), images(4, 8)
    net = Network(module)
    grid = stitch(x[None])
    last = module.act(module.conv(grid))
    # the same as a convolution: the pool of each window is a mean over its quarters
    weight = module.head.weight.reshape(6, 5, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3) / 16
    expected = F.conv2d(last, weight, module.head.bias).mean((2, 3))
    for layer in ("input", "final"):
        pg = GridPG(net, 2, layer, inputs=x[:1])
        torch.testing.assert_close(pg.run(Pass(pg.at_layer(grid))).output, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_put_on_a_grid_is_said():
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5)).eval()
    net, x = Network(flat), images(4, 8)
    with pytest.raises(InputError, match="final map"):
        GridPG(net, 2, inputs=x[:1])
    full = DiFull(net, 2)  # needs nothing but the cell
    torch.testing.assert_close(full.run(Pass(full.with_head(stitch(x[None]), 2))).output, flat(x[2:3]))
    valid = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    with pytest.raises(InputError, match="not 2 times"):
        DiPart(Network(valid), 2, inputs=x[:1])
    with pytest.raises(InputError, match="images"):
        DiFull(Network(nn.Linear(3, 2)), 2, inputs=torch.zeros(1, 3))
    with pytest.raises(InputError, match="seen no input"):
        DiFull(Network(CNN()), 2)
    with pytest.raises(InputError, match="cell"):
        DiFull(net, 2, head=4)


def test_the_final_map_lies_before_pools_and_the_middle_before_it():
    torch.manual_seed(0)
    convs = [m for i in range(6) for m in (nn.Conv2d(4 if i else 3, 4, 3, padding=1), nn.ReLU())]
    pooled = nn.Sequential(*convs, nn.MaxPool2d(2))
    vgg = nn.Sequential(pooled, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(16, 5)).eval()
    assert map_sites(Network(vgg), images(1, 8)) == {"input": "input", "middle": "0.7", "final": "0.11"}
    assert map_sites(Network(Residual()), images(1)) == {"input": "input", "middle": "act#1", "final": "join"}


# ---------------------------------------------------------------- exact behaviour


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("layer", ["input", "middle", "final"])
def test_difull_with_one_image_in_all_cells(n, layer):
    # weights and activations are the same in every cell, gradients outside the cell are exactly zero
    net = Network(CNN())
    grid = images(1).repeat(1, 1, n, n)
    setting = DiFull(net, n, layer, inputs=images(1))
    a = setting.at_layer(grid)
    side = a.shape[-1] // n
    methods = [
        Saliency(),
        InputXGradient(),
        IntegratedGradients(8),
        LayerCAM(layer="input"),
        Occlusion(window=side, stride=side),
    ]
    seen = []
    a, classes = a.repeat(3, 1, 1, 1), torch.arange(3)
    for head in (0, n * n - 1):
        for m in methods:
            score = localization(explain(m, setting, a, head, classes), n)[:, head].values
            assert ((np.abs(score - 1) < 1e-6) | (score == 0)).all(), (m.name, head, score)
            seen += score.tolist()
        cam = localization(explain(GradCAM(layer="input"), setting, a, head, classes), n).values
        assert ((np.abs(cam - 1 / n**2) < 1e-6).all(1) | ~cam.any(1)).all()
        seen += (n**2 * cam.max(1)).tolist()
    assert np.mean(seen) > 0.7  # empty maps are allowed, and rare


@pytest.mark.parametrize("key", ["smoothgrad", "vargrad", "gradshap", "guided", "deconv", "deeplift", "lrp"])
def test_no_gradient_leaves_the_cell(key):
    net, x = Network(CNN()), images(4)
    setting = DiFull(net, 2, inputs=x[:1])
    made = METHODS[key]()
    for head in (0, 3):
        score = localization(explain(made, setting, stitch(x[None]), head, 2), 2)
        assert score[0, head] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("layer", ["input", "middle", "final"])
def test_gridpg_with_equal_cells_and_circular_padding_is_uniform(layer):
    net = Network(CNN("circular"))
    setting = GridPG(net, 2, layer, inputs=images(1))
    a = setting.at_layer(images(1).repeat(1, 1, 2, 2)).repeat(3, 1, 1, 1)
    for m in (Saliency(), InputXGradient(), IntegratedGradients(8), GradCAM(layer="input"), LayerCAM(layer="input")):
        score = localization(explain(m, setting, a, 0, torch.arange(3)), 2).values
        assert ((np.abs(score - 0.25) < 1e-5).all(1) | ~score.any(1)).all(), m.name
        assert score.any(), m.name


# ---------------------------------------------------------------- broken explainers


@dataclass(frozen=True, eq=False)
class Activity(Method):
    """Sum of activations, whatever the class."""

    name: ClassVar[str] = "activity"

    def explain(self, q):
        x = yield from q.value()
        return explained(q, x[0].abs())


@dataclass(frozen=True, eq=False)
class Mirrored(InputXGradient):
    """The right map, left and right exchanged."""

    def explain(self, q):
        found = yield from super().explain(q)
        return explained(q, found.values.flip(-1))


def test_broken_explainers_are_caught():
    x, y = colour_images(24)
    net = Network(Colours())
    setting = DiFull(net, 2, inputs=x[:1])
    made = make_grids(x, y, 2, n_grids=200, repeat_corners=True)
    noise = explain(RandomScores(), setting, made.images, 0, made.labels[:, 0])
    assert float(localization(noise, 2)[:, 0].mean()) == pytest.approx(0.25, abs=0.02)
    activity = explain(Activity(), setting, made.images[:50], 0, made.labels[:50, 0])
    assert float(localization(activity, 2)[:, 0].mean()) == pytest.approx(0.25, abs=0.02)
    for head in (0, 3):
        right = explain(InputXGradient(), setting, made.images[:20], head, made.labels[:20, head])
        np.testing.assert_allclose(localization(right, 2)[:, head], 1)
        mirrored = explain(Mirrored(), setting, made.images[:20], head, made.labels[:20, head])
        assert float(localization(mirrored, 2)[:, head].max()) <= 0.1
    other = explain(LayerCAM(layer="input"), setting, made.images[:20], 3, made.labels[:20, 3])
    assert not localization(other, 2)[:, 0].any()


# ---------------------------------------------------------------- all of it


def test_ground_truth_of_a_network_whose_truth_is_known():
    x, y = colour_images(24)
    net = Network(Colours())
    methods = {"ixg": InputXGradient(), "gradcam": GradCAM(), "noise": RandomScores(), "activity": Activity()}
    runner = Runner(progress=False, tune=False)
    found = ground_truth(
        net, x, y, methods, n_grids=5, heads=None, layers=("input", "final"), confidence=0.9, runner=runner
    )
    assert found.notes == []
    assert found.chance == 0.25
    assert found.sites == {"input": "input", "final": "act"}
    per = 4 + 2 + 2  # heads of the three settings
    assert len(found.table) == 4 * 2 * 5 * per
    mean = found.summary().set_index(["method", "setting", "layer"])["score"]
    for setting in ("gridpg", "difull", "dipart"):
        assert mean["ixg", setting, "input"] == pytest.approx(1)
        assert mean["noise", setting, "input"] == pytest.approx(0.25, abs=0.05)
        assert mean["activity", setting, "input"] == pytest.approx(0.25, abs=0.05)
    assert mean["gradcam", "gridpg", "final"] == pytest.approx(1)  # only the right cell has the class's channel
    # the other corner has it too, and the pooled gradient does not know which corner it came from
    assert mean["gradcam", "difull", "final"] == pytest.approx(0.5, abs=0.1)
    rows = found.rows
    assert {(r[0], r[2]) for r in rows} == {(m, s) for m in methods for s in ("gridpg", "difull", "dipart")}
    assert all(r[1] == "ground_truth" and r[4] == pytest.approx(1) for r in rows if r[0] == "ixg")
    assert found.cost.loc["ixg", "backward"] == 5 * per * 2
    assert found.cost.loc["noise", "forward"] == 0
    pictures = found.pictures
    assert {p["method"] for p in pictures} == set(methods)
    assert all(p["image"].ndim == 2 for p in pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bins = found.aggatt("ixg", "gridpg", "input", 1)
    assert float(bins[0, :, bins.shape[2] // 2 :].sum() / bins[0].sum()) == pytest.approx(1)


def test_ground_truth_costs_what_it_says_and_repeats_itself():
    x, y = colour_images(24)
    net = Network(Colours())
    tables = []
    for _ in range(2):
        runner = Runner(progress=False, tune=False)
        found = ground_truth(net, x, y, {"ixg": InputXGradient(), "ig": IntegratedGradients(50)}, n_grids=4, budget=5,
                             confidence=0.5, runner=runner, seed=3)  # fmt: skip
        tables.append(found.table)
    assert len(found.table) == 2 * 3 * 4
    assert sorted(found.table.query("setting == 'gridpg' and method == 'ixg'")["head"]) == [0, 1, 2, 3]
    assert set(found.table.query("setting == 'difull'")["head"]) == {0, 3}
    assert found.cost.loc["ixg", "forward"] == 12
    assert found.cost.loc["ig", "backward"] == 12 * 5
    np.testing.assert_array_equal(tables[0]["score"], tables[1]["score"])


@dataclass(frozen=True, eq=False)
class Failing(InputXGradient):
    def explain(self, q):
        yield q.ask(gradient=True)
        raise NisslError("not here")


def test_what_had_to_be_relaxed_is_said():
    x, y = colour_images(6)
    net = Network(Colours(scale=4))  # probabilities of about .9
    wrong = y.clone()
    wrong[0] = 3
    runner = Runner(progress=False, tune=False)
    methods = {"ixg": InputXGradient(), "failing": Failing()}
    with pytest.warns(UserWarning, match="ground truth") as told:
        found = ground_truth(net, x, wrong, methods, n_grids=2, settings=("gridpg", "difull"), runner=runner)
    assert len(told) == len(found.notes)
    assert any("5 images are used" in s for s in found.notes)
    assert any("same image in both corners" in s for s in found.notes)
    assert any("failing is not evaluated in GridPG at input: not here" in s for s in found.notes)
    assert found.table.query("method == 'failing'")["score"].isna().all()
    assert found.table.query("method == 'ixg'")["score"].notna().all()
    summary = found.summary().set_index(["method", "setting"])
    assert np.isnan(summary.loc[("failing", "gridpg"), "score"])

    x, y = colour_images(24)
    with pytest.warns(UserWarning, match="no labels"):
        ground_truth(net, x, None, {"ixg": InputXGradient()}, n_grids=1, confidence=0, runner=runner)
    dense = nn.Linear(6 * 64, 6, bias=False)  # the same classifier without a map
    with torch.no_grad():
        dense.weight.copy_(torch.eye(6).repeat_interleave(64, 1))
    flat = Network(nn.Sequential(nn.Flatten(), dense).eval())
    with pytest.warns(UserWarning, match="GridPG at input is left out"):
        found = ground_truth(
            flat, x, y, {"ixg": InputXGradient()}, n_grids=2, settings=("gridpg", "difull"), runner=runner
        )
    assert set(found.table["setting"]) == {"difull"}
    assert (found.table["score"] == 1).all()
    with pytest.raises(InputError, match="no ground truth"):
        ground_truth(flat, x, y, {"ixg": InputXGradient()}, settings=("gridpg",), runner=runner)


def test_ground_truth_refuses_what_makes_no_sense():
    x, y = colour_images(12)
    net = Network(Colours())
    ixg = {"ixg": InputXGradient()}
    runner = Runner(progress=False, tune=False)
    for kwargs in (
        {"settings": ("nonsense",)}, {"settings": "gridpg"}, {"layers": "final"}, {"n": 1}, {"n_grids": 0},
        {"heads": 0}, {"confidence": 2}, {"n": 3},
    ):  # fmt: skip
        with pytest.raises(InputError):
            ground_truth(net, x, y, ixg, runner=runner, **kwargs)
    with pytest.raises(SiteError):
        ground_truth(net, x, y, ixg, layers=("nowhere",), runner=runner)
    with pytest.raises(InputError, match="methods must be"):
        ground_truth(net, x, y, {}, runner=runner)
    with pytest.raises(InputError, match="none of the"):
        ground_truth(net, x, (y + 1) % 6, ixg, runner=runner)
    with pytest.raises(InputError, match="NaN"):
        ground_truth(net, x * torch.nan, y, ixg, runner=runner)
    with pytest.raises(InputError, match="labels"):
        ground_truth(net, x, y[:3], ixg, runner=runner)
    assert untouched(net.module)


def test_exports():
    import nissl.trust

    assert {"GridPG", "DiFull", "DiPart"} <= set(nissl.trust.__all__)
    assert nissl.trust.DiFull is DiFull
