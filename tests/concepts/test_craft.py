"""CRAFT: crops, planted concepts, exact importances, maps of known places, recursion, and what it refuses."""

import dataclasses
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn

from nissl.attribution import RISE, GradCAM, Occlusion, Saliency
from nissl.concepts.craft import Craft, plot_concepts, plot_maps
from nissl.concepts.sobol import sobol_design, total_indices
from nissl.errors import InputError, NisslError, SiteError
from nissl.network import Network, Pass
from nissl.runner import Runner
from nissl.studies.craft import glyph_pictures, planted
from nissl.studies.snmf import matched

QUIET = {"progress": False}


def small(seed=0, channels=3, classes=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(
            nn.Sequential(
                nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 3, stride=2), nn.ReLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, classes),
            )
        )  # fmt: skip


def some(n=12, channels=3, side=20, seed=0):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def linear(concepts, weights):
    """A head that reads off the use of the concepts, with weights; its site "0" is the activation itself."""
    head = nn.Linear(concepts.shape[1], 1, bias=False)
    head.weight.data[0] = torch.from_numpy(np.linalg.pinv(concepts) @ weights)
    return Network(nn.Sequential(nn.ReLU(), nn.Flatten(), head))


@pytest.fixture(scope="module")
def fitted():
    images = some()
    return Craft("3", 4, patch_size=8, **QUIET).fit(small(), images), images


# ---------------------------------------------------------------- factorisation


def test_crops_are_a_grid_without_padding():
    images = some(3, side=25)
    craft = Craft("3", 2, patch_size=10, **QUIET).fit(small(), images)
    starts = [0, 8]  # stride int(0.8 * 10); 16 + 10 is past the edge
    assert craft.places_.tolist() == [list(p) for p in itertools.product(range(3), starts, starts)]
    crops = craft.crops(images, 1, n=5)
    order = np.argsort(-craft.crop_coefficients_[:, 1], kind="stable")[:5]
    for crop, (i, y, x) in zip(crops, craft.places_[order], strict=True):
        assert torch.equal(crop, images[i, :, y : y + 10, x : x + 10])


def test_activations_are_those_of_resized_crops_pooled():
    images = some(4)
    net = small()
    craft = Craft("3", 3, patch_size=8, overlap=0.0, tol=1e-7, max_iter=3000, **QUIET).fit(net, images)
    rows = []
    for i, y, x in craft.places_:
        crop = nn.functional.interpolate(images[i : i + 1, :, y : y + 8, x : x + 8], size=(20, 20), mode="bilinear")
        rows.append(net.module[:4](crop).mean((2, 3))[0].detach().double().numpy())
    a = np.stack(rows)
    residual = np.linalg.norm(a - craft.crop_coefficients_ @ craft.components_)
    assert craft.reconstruction_error_ == pytest.approx(residual / np.linalg.norm(a), rel=1e-3)
    # the factors are those of this matrix: coefficients are its least-squares fit
    exact = np.array([nnls(craft.components_.T.astype(float), row)[0] for row in a])
    assert np.abs(exact - craft.crop_coefficients_).max() < 0.02 * exact.max()


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_concepts_and_their_importance(seed):
    """The card's bars, fixed beforehand: cosine .98 and .95; used concepts first, the others at most .03, the third negative."""
    a, concepts, weights = planted(seed)
    images = torch.from_numpy(a)[:, :, None, None]
    craft = Craft("0", 6, patch_size=1, random_state=seed, **QUIET).fit(linear(concepts, weights), images)
    cosine = matched(concepts, craft.components_)
    assert cosine.mean() >= 0.98
    assert cosine.min() >= 0.95
    found = craft.importances(images[:60], 0)
    index = matched(concepts, craft.components_, index=True)
    assert set(found.order[:3].tolist()) == set(index[:3].tolist())
    assert found.mean[index[3:]].max() <= 0.03
    assert np.sign(found.sign[index[:3]].numpy()).tolist() == [1, 1, -1]
    assert found.forward == 60 * (1 + 32 * 7)


def test_importances_of_a_linear_head_are_exact():
    a, concepts, weights = planted(3)
    images = torch.from_numpy(a)[:30, :, None, None]
    net = linear(concepts, weights)
    craft = Craft("0", 6, patch_size=1, **QUIET).fit(net, images)
    u = craft.transform(images)[:, 0, 0]
    c = craft.components_ @ net.module[2].weight.data[0].numpy()
    share = (c * u) ** 2
    exact = share / share.sum(1, keepdims=True)
    found = craft.importances(images, 0, n_design=256)
    used = share.sum(1) > 1e-6
    assert np.abs(found.per_image.numpy()[used] - exact[used]).max() < 0.05


def test_coefficients_of_whole_images(fitted):
    craft, images = fitted
    u = craft.transform(images)
    a = craft.network_.module[:4](images).detach().double().numpy()
    assert u.shape == (12, 8, 8, 4)
    for i, y, x in ((0, 0, 0), (5, 3, 7), (11, 7, 2)):
        assert u[i, y, x] == pytest.approx(nnls(craft.components_.T.astype(float), a[i, :, y, x])[0], abs=1e-5)


def test_a_site_without_positions():
    net = Network(nn.Sequential(*small().module[:7], nn.ReLU(), nn.Linear(16, 3)))
    images = some()
    craft = Craft("7", 3, patch_size=8, **QUIET).fit(net, images)
    assert not craft.positions_
    assert craft.transform(images).shape == (12, 3)
    assert craft.importances(images).per_image.shape == (12, 3)
    assert craft.attribute(images[:2], Saliency()).shape == (2, 3, 3, 20, 20)
    with pytest.raises(InputError, match="no positions"):
        craft.maps(images)


def test_only_images_of_the_class_are_used():
    images = some(30)
    net = small(seed=3)
    classes = net.run(Pass(images)).output.argmax(1)
    c = int(classes.mode().values)
    if (classes == c).all():
        images[::2] *= -3
        classes = net.run(Pass(images)).output.argmax(1)
    assert 1 < int((classes == c).sum()) < 30
    craft = Craft("3", 3, patch_size=8, **QUIET).fit(net, images, target=c)
    kept = set((classes == c).nonzero()[:, 0].tolist())
    assert set(craft.places_[:, 0].tolist()) == kept
    assert set(craft.dropped_) == set(range(30)) - kept


def test_seeds_and_runners(fitted):
    craft, images = fitted
    again = clone(craft).fit(craft.network_, images)
    assert np.array_equal(craft.components_, again.components_)
    batches = clone(craft).fit(craft.network_, images, runner=Runner(batch_size=3, progress=False))
    assert batches.reconstruction_error_ == pytest.approx(craft.reconstruction_error_, rel=1e-2)
    with pytest.raises(NotFittedError):
        clone(craft).transform(images)


def test_grey_images_and_two_classes():
    images = some(channels=1)
    net = small(channels=1, classes=1)
    craft = Craft("3", 3, patch_size=8, **QUIET).fit(net, images)
    assert craft.importances(images).mean.shape == (3,)  # one class: the only output


# ---------------------------------------------------------------- importance


@pytest.mark.parametrize(("n", "most"), [(32, 0.1), (512, 0.03)])
def test_total_indices_of_known_functions(n, most):
    for seed in range(5):
        m = sobol_design(3, n, seed=seed)
        found = total_indices(m[..., 0] * m[..., 1] + m[..., 2])
        assert found.numpy() == pytest.approx([4 / 19, 4 / 19, 12 / 19], abs=most)


def test_the_design_exchanges_one_column():
    for points in ("sobol", "halton", "random"):
        m = sobol_design(4, 16, points, seed=1)
        assert m.shape == (5, 16, 4)
        assert bool(((m >= 0) & (m <= 1)).all())
        for i in range(4):
            same = m[i + 1] == m[0]
            assert bool(same[:, [j for j in range(4) if j != i]].all())
            assert not bool(same[1:, i].any())
    assert torch.equal(sobol_design(4, 16, seed=1), sobol_design(4, 16, seed=1))
    assert not torch.equal(sobol_design(4, 16, seed=1), sobol_design(4, 16, seed=2))


def test_halton_points_fail_for_many_concepts():
    # the card's measurement: the 16th of 20 concepts, true index .321, comes out as .022 and .123
    weights = torch.full((20,), ((1 - 0.321) / 19) ** 0.5).double()
    weights[15] = 0.321**0.5
    for n, expected in ((32, 0.022), (128, 0.123)):
        halton = float(total_indices(sobol_design(20, n, "halton") @ weights)[15])
        assert halton == pytest.approx(expected, abs=0.02)
        sobol = [float(total_indices(sobol_design(20, n, seed=s) @ weights)[15]) for s in range(20)]
        # a ratio of two estimates, which lies somewhat too high for few points
        assert np.mean(sobol) == pytest.approx(0.321, abs=2 / n)


def test_images_whose_output_does_not_vary_are_skipped():
    a, concepts, weights = planted(0)
    images = torch.from_numpy(a)[:50, :, None, None]
    images[3] = 0
    craft = Craft("0", 6, patch_size=1, **QUIET).fit(linear(concepts, weights), images)
    found = craft.importances(images, 0)
    assert 3 in found.skipped
    assert bool(found.per_image[3].isnan().all())
    assert bool(torch.isfinite(found.mean).all())
    with pytest.raises(InputError, match="does not depend"):
        craft.importances(images[3:4], 0)


def test_masks_are_answered_by_the_rest_of_the_network(fitted):
    craft, images = fitted
    u = torch.from_numpy(craft.transform(images)).movedim(-1, 1)
    masks = sobol_design(4, 8, seed=42).reshape(-1, 4).float()
    w = torch.from_numpy(craft.components_)
    rest = craft.network_.module[4:]
    y = torch.stack([rest(torch.einsum("mr,ryx,rd->mdyx", masks, u[i], w))[:, 2] for i in range(12)])
    expected = total_indices(y.detach().reshape(12, 5, 8))
    assert craft.importances(images, 2, n_design=8).per_image.numpy() == pytest.approx(expected.numpy(), abs=1e-3)


def test_deletion_and_insertion_follow_the_order(fitted):
    craft, images = fitted
    each = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i)) for i in range(12)])
    curves = craft.curves(images, {"one": [2, 0, 3, 1], "each": each}, target=1)
    u = torch.from_numpy(craft.transform(images)).movedim(-1, 1)
    w = torch.from_numpy(craft.components_)

    def of(i, kept):
        part = u[i : i + 1].clone()
        part[:, [j for j in range(4) if j not in kept]] = 0
        return float(craft.network_.module[4:](torch.einsum("nryx,rd->ndyx", part, w))[0, 1].detach())

    for name, order in (("one", [[2, 0, 3, 1]] * 12), ("each", each.tolist())):
        for i in (0, 7):
            deletion = [of(i, order[i][k:]) for k in range(5)]
            insertion = [of(i, order[i][:k]) for k in range(5)]
            assert curves[name].deletion[i].tolist() == pytest.approx(deletion, abs=1e-5)
            assert curves[name].insertion[i].tolist() == pytest.approx(insertion, abs=1e-5)
            area = np.trapezoid(deletion, dx=0.25)
            assert float(curves[name].deletion_area[i]) == pytest.approx(area, abs=1e-5)


def test_derivatives_along_concepts(fitted):
    craft, images = fitted
    score, slope = craft.tcav(images, 1)
    x = craft.network_.module[:4](images).detach().requires_grad_()
    craft.network_.module[4:](x)[:, 1].sum().backward()
    direct = x.grad.sum((2, 3)) @ torch.from_numpy(craft.components_).T
    assert slope.numpy() == pytest.approx(direct.mean(0).numpy(), abs=1e-5)
    assert score.numpy() == pytest.approx((direct > 0).double().mean(0).numpy())


# ---------------------------------------------------------------- maps


class Glyphs(nn.Module):
    """A detector for each glyph, by its picture; scores are the pooled answers."""

    def __init__(self, templates):
        super().__init__()
        t = templates - templates.mean((1, 2), keepdim=True)
        t = t / t.norm(dim=(1, 2), keepdim=True)
        self.filters = nn.Conv2d(1, len(t), 9, padding=4)
        self.filters.weight.data = t[:, None]
        self.filters.bias.data.fill_(-2.0)
        self.fire = nn.ReLU()

    def forward(self, x):
        return self.fire(self.filters(x)).amax((2, 3))


def detector(images, where):
    """Detectors made of the mean picture of each glyph."""
    held = [[i for i in range(len(images)) if where[i, g].any()] for g in range(4)]
    means = [torch.stack([images[i, 0][where[i, g]].reshape(9, 9) for i in held[g]]).mean(0) for g in range(4)]
    return Glyphs(torch.stack(means))


def test_maps_lie_on_the_glyph():
    """Each glyph has a channel of its own, so that the truth of every map is known."""
    images, _, where = glyph_pictures(60, 0)
    net = Network(detector(images, where))
    # large crops keep the glyphs nearly at their size
    craft = Craft("fire", 4, patch_size=28, overlap=0.9, **QUIET).fit(net, images)
    assert matched(np.eye(4), craft.components_).min() > 0.95
    maps = craft.maps(images, None).to_numpy()
    direct = matched(np.eye(4), craft.components_, index=True)
    held = where.any((2, 3)).numpy()
    for g, j in enumerate(direct):
        mine = maps[held[:, g], j]
        assert (mine * where[held[:, g], g].numpy()).sum() >= 0.6 * mine.sum()  # the card's bar
        peak = mine.reshape(len(mine), -1).argmax(1)
        assert where[held[:, g], g].reshape(len(mine), -1)[torch.arange(len(mine)), torch.from_numpy(peak)].all()
    # through the coefficients: the gradient reaches no further than the filter around the places that fire
    slopes = craft.attribute(images[:10], Saliency(), [int(direct[0])]).to_numpy()[:, 0, 0]
    a = net.run(Pass(images[:10], read=["fire"], output=False)).reads["fire"]
    reach = nn.functional.max_pool2d(a.amax(1, keepdim=True), 9, 1, 4)[:, 0] > 0
    assert slopes[~reach.numpy()].max() == 0
    assert slopes.max() > 0


def test_quantiles_keep_the_strongest_places(fitted):
    craft, images = fitted
    whole = craft.maps(images, None).to_numpy()
    assert whole.shape == (12, 4, 20, 20)
    kept = craft.maps(images, 0.9).to_numpy()
    each = craft.maps(images, 0.9, each=True).to_numpy()
    assert (kept[kept > 0] == whole[kept > 0]).all()
    for j in range(4):
        assert np.quantile(whole[:, j], 0.9) <= kept[:, j][kept[:, j] > 0].min()
    assert ((each > 0).mean((2, 3)) <= 0.11).all()


def test_any_method_explains_coefficients(fitted):
    craft, images = fitted
    encoder = craft.encoder()
    u = craft.transform(images)
    assert encoder.run(Pass(images)).output.numpy() == pytest.approx(u.mean((1, 2)), abs=1e-5)
    scores = craft.attribute(images[:3], Saliency(), [2, 0])
    assert scores.dims == ("example", "concept", "channel", "y", "x")
    assert scores.concept.values.tolist() == [2, 0]
    # by hand: central differences of the mean coefficient
    x = images[:1].double()
    layers = nn.Sequential(*small().module[:4]).double()

    def mean(v):
        a = layers(v)[0].detach().flatten(1).T.numpy()
        return np.mean([nnls(craft.components_.T.astype(float), row)[0][2] for row in a])

    for c, y, z in ((0, 4, 4), (1, 10, 13), (2, 17, 6)):
        ends = []
        for s in (1, -1):
            v = x.clone()
            v[0, c, y, z] += s * 1e-4
            ends.append(mean(v))
        slope = abs(ends[0] - ends[1]) / 2e-4
        assert float(scores[0, 0, c, y, z]) == pytest.approx(slope, rel=2e-2, abs=1e-5)
    assert craft.attribute(images[:2], GradCAM("activation"), [1]).shape == (2, 1, 20, 20)
    assert craft.attribute(images[:2], RISE(n_masks=20), [1]).shape == (2, 1, 20, 20)


def test_concepts_are_features_of_the_rest(fitted):
    craft, images = fitted
    u = torch.from_numpy(craft.transform(images[:2])).movedim(-1, 1)
    scores = Occlusion(window=8).attribute(craft.decoder(), u, target=0)
    assert scores.dims == ("example", "concept", "y", "x")
    all_of_it = craft.curves(images[:2], {"o": [0, 1, 2, 3]}, 0)["o"].deletion
    assert float(scores[1, 0, 0, 0]) * 64 == pytest.approx(float(all_of_it[1, 0] - all_of_it[1, 1]), rel=1e-3)


# ---------------------------------------------------------------- recursion


def test_a_concept_that_lumps_two_things_is_split():
    """A late unit fires for either of two glyphs; the layer before tells them apart."""
    images, _, where = glyph_pictures(80, 1)
    early = detector(images, where)
    late = nn.Conv2d(4, 2, 1, bias=False)
    late.weight.data = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 0]])[:, :, None, None]
    net = Network(nn.Sequential(early.filters, early.fire, late, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()))
    # pictures of a plus and a block, of which one is taken away
    both = torch.arange(80)[where[:, 0].any(2).any(1) & where[:, 3].any(2).any(1)]
    x = images[both].clone()
    for g, rows in ((0, slice(0, None, 2)), (3, slice(1, None, 2))):
        x[rows, 0] = x[rows, 0].masked_fill(where[both, g][rows], 0)
    craft = Craft("3", 1, patch_size=28, overlap=0.9, **QUIET).fit(net, x)
    assert craft.components_[0, 0] > 0.99  # both glyphs are one direction
    below = craft.subconcepts(0, "1", x, share=0.4, n_concepts=2)
    cosine = matched(np.eye(4)[[0, 3]], below.components_)
    assert cosine.min() > 0.9
    top = np.argsort(-craft.crop_coefficients_[:, 0], kind="stable")[: round(0.4 * len(craft.places_))]
    assert np.array_equal(below.places_, craft.places_[top])
    assert below.transform(x).shape == (len(x), 32, 32, 2)


# ---------------------------------------------------------------- what it refuses


def copy_of(craft):
    return {k: (v.copy() if isinstance(v, np.ndarray) else v) for k, v in vars(craft).items()}


@pytest.mark.parametrize(
    ("settings", "images", "says"),
    [
        ({"patch_size": 21}, some(), "no crop of 21"),
        ({"patch_size": 0}, some(), "patch_size"),
        ({"n_concepts": 13}, some(), "13 concepts"),
        ({"n_concepts": 2}, some(1, side=8), "2 concepts"),
        ({"n_concepts": 0}, some(), "n_concepts"),
        ({"overlap": 1.0}, some(), "overlap"),
        ({"site": "2"}, some(), "negative"),
        ({"site": "nowhere"}, some(), "nowhere"),
        ({"site": "input"}, some() - 1, "negative"),
        ({}, torch.zeros(4, 3, 20, 20), "same for all crops"),
        ({}, some()[0], "n, channels"),
        ({}, some()[:0], "n, channels"),
        ({}, (255 * some()).to(torch.uint8), "floating"),
        ({}, "pictures", "floating"),
        ({}, torch.full((4, 3, 20, 20), torch.nan), "NaN"),
        ({}, some(channels=4), "failed on inputs"),
        ({}, some(channels=1), "failed on inputs"),
    ],
)
def test_bad_fits_raise_and_change_nothing(settings, images, says):
    net = small()
    before = {k: v.clone() for k, v in net.module.state_dict().items()}
    craft = Craft(**{"site": "3", "n_concepts": 2, "patch_size": 8, **QUIET, **settings})
    state = dict(vars(craft))
    with pytest.raises(NisslError, match=says):
        craft.fit(net, images)
    assert vars(craft) == state
    assert all(torch.equal(v, before[k]) for k, v in net.module.state_dict().items())


def test_silent_sites_and_sites_that_are_no_cut():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x):
            return self.out((x + self.b(self.a(x))).mean((2, 3)))

    with pytest.raises(InputError, match="cannot be cut"):
        Craft("b", 2, patch_size=8, **QUIET).fit(Network(Residual()), some())
    dead = small()
    dead.module[2].weight.data.zero_()
    dead.module[2].bias.data.fill_(-1)
    with pytest.raises(InputError, match="zero for all crops"):
        Craft("3", 2, patch_size=8, **QUIET).fit(dead, some())
    tokens = Network(nn.Sequential(nn.Flatten(2), nn.ReLU(), nn.Flatten(), nn.Linear(1200, 2)))
    with pytest.raises(SiteError, match="channels"):
        Craft("1", 2, patch_size=8, **QUIET).fit(tokens, some())
    never = small()
    never.module[8].bias.data[3] = -100
    with pytest.raises(InputError, match="none of the 12 images"):
        Craft("3", 2, patch_size=8, **QUIET).fit(never, some(), target=3)
    with pytest.raises(InputError, match="class 9"):
        Craft("3", 2, patch_size=8, **QUIET).fit(small(), some(), target=9)


def test_networks_without_gradients():
    module = small().module

    def predict(x):
        return module(torch.from_numpy(x)).detach().numpy()

    with pytest.raises(SiteError, match="no module"):
        Craft("3", 2, patch_size=8, **QUIET).fit(Network(predict), some())


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda c, x: c.importances(x, 0, n_design=33), "power of 2"),
        (lambda c, x: c.importances(x, 0, n_design=1), "n_design"),
        (lambda c, x: c.importances(x, 0, points="grid"), "points"),
        (lambda c, x: c.importances(x, 9), "class 9"),
        (lambda c, x: c.transform(x[0]), "n, channels"),
        (lambda c, x: c.maps(x, 1.0), "quantile"),
        (lambda c, x: c.crops(x, 4), "concepts are 0 to 3"),
        (lambda c, x: c.crops(x[:2], 0, 48), "not those that were fitted"),
        (lambda c, x: c.attribute(x, Saliency(), [-1]), "concepts are 0 to 3"),
        (lambda c, x: c.curves(x, {}), "orders"),
        (lambda c, x: c.curves(x, {"a": [0, 1, 2, 2]}), "once"),
        (lambda c, x: c.curves(x, {"a": [0.0, 1.0, 2.0, 3.0]}), "once"),
        (lambda c, x: c.curves(x, {"a": torch.zeros(3, 4, dtype=torch.long)}), "once"),
        (lambda c, x: c.subconcepts(0, "3", x), "before"),
        (lambda c, x: c.subconcepts(0, "5", x), "lies before"),
        (lambda c, x: c.subconcepts(0, "1", x, share=0.0), "share"),
        (lambda c, x: c.subconcepts(0, "1", x, patch_size=4), "cannot be set"),
        (lambda c, x: c.subconcepts(0, "1", x[:3], n_concepts=2), "not those that were fitted"),
        (lambda c, x: c.subconcepts(0, "1", x, n_concepts=7), "7 concepts"),
        (lambda c, x: plot_maps(c, x[:2], []), "concepts"),
        (lambda c, x: plot_concepts(c, x, display=np.zeros((2, 20, 20))), "display"),
    ],
)
def test_bad_questions_raise_and_change_nothing(fitted, ask, says):
    craft, images = fitted
    before, held = copy_of(craft), images.clone()
    with pytest.raises(NisslError, match=says):
        ask(craft, images)
    assert torch.equal(images, held)
    now = vars(craft)
    assert now.keys() == before.keys()
    assert all(np.array_equal(now[k], v) if isinstance(v, np.ndarray) else now[k] is v for k, v in before.items())


def test_pictures(fitted):
    craft, images = fitted
    importance = craft.importances(images, 0)
    lowered = dataclasses.replace(importance, sign=-importance.sign.abs())
    figure = plot_concepts(craft, images, lowered, n=3, n_crops=4)
    assert len(figure.axes) == 12
    label = figure.axes[0].get_ylabel()
    assert f"concept {int(importance.order[0])}" in label
    assert "lowers" in label
    plt.close(figure)
    figure = plot_concepts(craft, images, display=np.zeros((12, 20, 20, 3), np.uint8), n=9)
    assert len(figure.axes) == 4 * 6
    plt.close(figure)
    figure = plot_maps(craft, images[:3], [0, 2])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["concept 0", "concept 2"]
    assert [len(ax.images) for ax in figure.axes] == [3, 3, 3]
    plt.close(figure)
