"""Sheets of units: planted detectors, effects known in closed form, duplicates, facets, dead units, and wrong input."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nissl.concepts.descriptions import LabelDescriber, Milan
from nissl.concepts.exemplars import find_exemplars
from nissl.concepts.facets import group
from nissl.concepts.synthesis import Phase
from nissl.concepts.units import as_picture, convolution_sites, cut_before, most_similar, sparseness, unit_sheets
from nissl.errors import InputError, SiteError
from nissl.network import Network

QUIET = {"progress": False, "quantile": 0.9}
# what each unit of the first layer takes of red, green and blue: 3 repeats 0, 4 is dead, 5 has two facets
TAKES = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]])
FEEDS = torch.tensor([[2.0, 0, 0, 0, 5, 0.5], [0, 3, 0, 0, 0, 0.5], [0, 0, 4, -1, 0, 0]])
WORDS = ("red", "green", "blue")


class Planted(nn.Module):
    """Unit u of the first layer sees its colours; the second layer has them in reverse; classes are weighted means of these."""

    def __init__(self):
        super().__init__()
        self.one, self.act = nn.Conv2d(3, 6, 1, bias=False), nn.ReLU()
        self.two = nn.Conv2d(6, 6, 1, bias=False)
        self.out = nn.Linear(6, 3, bias=False)
        self.rows = 0
        with torch.no_grad():
            self.one.weight.copy_(TAKES[:, :, None, None])
            self.two.weight.copy_(torch.eye(6).flip(0)[:, :, None, None])
            self.out.weight.copy_(FEEDS.flip(1))
        self.one.register_forward_hook(self._count)

    def _count(self, module, args, output):
        self.rows += 0 if output.is_meta else len(output)

    def forward(self, x):
        return self.out(self.two(self.act(self.one(x))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        x = self.relu(self.stem(x))
        return self.out((x + self.norm(self.conv(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def labels():
    return torch.arange(30) % 3


@pytest.fixture(scope="module")
def images(labels):
    """A square of one colour in each, of random brightness."""
    g = torch.Generator().manual_seed(0)
    x = torch.zeros(30, 3, 12, 12)
    for i, colour in enumerate(labels.tolist()):
        top, left = torch.randint(0, 9, (2,), generator=g).tolist()
        x[i, colour, top : top + 4, left : left + 4] = 0.5 + 0.5 * torch.rand(4, 4, generator=g)
    return x


@pytest.fixture(scope="module")
def network():
    return Network(Planted())


@pytest.fixture(scope="module")
def sheets(network, images, labels):
    return unit_sheets(network, images, ["act", "two"], labels=labels, class_names=WORDS, **QUIET)


def test_a_detector_has_the_right_exemplars_and_word(sheets, images, labels):
    e = sheets.exemplars
    for unit in range(3):
        row = e.row("act", unit)
        best = images[:, unit].amax((1, 2)).argsort(descending=True, stable=True)[:10]
        assert e.ids[row, :10].tolist() == best.tolist()
        assert (labels[e.ids[row, :10]] == unit).all()
        assert sheets.descriptions[row].text == WORDS[unit]
        assert sheets.active[row] == 10
        # the mask is the square
        assert torch.equal(sheets.masks[row, 0], images[best[0], unit] > 0)
    assert torch.equal(sheets.masks, e.masks())  # a small image has masks of its own size
    table = sheets.table()
    assert table.loc[[0, 1], "text"].tolist() == ["red", "green"]
    assert table.shape[0] == len(sheets) == 12


def test_switching_off_changes_the_classes_it_feeds_by_the_known_amount(sheets, images):
    e = sheets.exemplars
    for row in range(6):
        if not e.fires[row]:
            continue
        here = [int(i) for i, a in zip(e.ids[row], e.activations[row], strict=True) if a > e.threshold[row]]
        activation = torch.einsum("nchw,c->n", images[here], TAKES[row]) / 144
        expected = -FEEDS[:, row] * activation.mean()
        torch.testing.assert_close(sheets.logits[row], expected, atol=1e-6, rtol=1e-4)
        reverse = e.row("two", 5 - row)
        torch.testing.assert_close(sheets.logits[reverse], expected, atol=1e-6, rtol=1e-4)
        mean = torch.einsum("nchw,uc->nu", images[here], TAKES) / 144
        off = mean.clone()
        off[:, row] = 0
        before, after = (m @ FEEDS.T for m in (mean, off))
        change = (after.softmax(1) - before.softmax(1)).mean(0)
        torch.testing.assert_close(sheets.probabilities[row], change, atol=1e-6, rtol=1e-4)
        top = before.argmax(1)
        own = (after - before).gather(1, top[:, None]).mean()
        torch.testing.assert_close(sheets.predicted[row, 0], own, atol=1e-6, rtol=1e-4)
        assert sheets.flips[row] == pytest.approx(float((after.argmax(1) != top).float().mean()))
    # unit 0 feeds class 0 only
    assert sheets.logits[0, 0] < -0.05
    assert sheets.logits[0, 1:].abs().max() < 1e-6
    assert sheets.effect[0] == -sheets.logits[0, 0]


def test_layers_before_the_unit_do_not_run_again(images):
    model = Planted()
    network, options = Network(model), {"exemplars": 10, "facets": 1, "batch": 4, **QUIET}
    found = unit_sheets(network, images, "two", **options)
    assert int(found.active.sum()) == 50
    assert found.cost["switching off"] == len(found.pictures) + 50 == 80
    assert cut_before(network, "two", images) == "act"
    # images, exemplars, exemplars without edits: 30 each; the rest learns what is called and which memory format is fast
    assert 90 <= model.rows < 130
    model.rows = 0
    full = unit_sheets(network, images, "one", **options)
    assert cut_before(network, "one", images) is None
    assert model.rows >= 140
    torch.testing.assert_close(full.logits, found.logits.flip(0), equal_nan=True)


def test_a_residual_block_is_cut_in_front_of_it():
    torch.manual_seed(0)
    network, x = Network(Residual().eval()), torch.rand(12, 3, 16, 16)
    with torch.no_grad():
        network.module.norm.bias.copy_(torch.tensor([0.5, -0.5, 1.0, 0.1]))
    assert convolution_sites(network, x, 2) == ["relu", "norm"]
    assert cut_before(network, "norm", x) == "relu"
    found = unit_sheets(network, x, "norm", exemplars=12, facets=1, units=[2], progress=False)
    here = found.exemplars.ids[0][found.exemplars.activations[0] > found.exemplars.threshold[0]]
    with torch.no_grad():
        before = network.module(x[here])
        kept = network.module.norm.weight[2].clone(), network.module.norm.bias[2].clone()
        network.module.norm.weight[2], network.module.norm.bias[2] = 0.0, 0.0
        after = network.module(x[here])
        network.module.norm.weight[2], network.module.norm.bias[2] = kept
    torch.testing.assert_close(found.logits[0], (after - before).mean(0), atol=1e-5, rtol=1e-4)


def test_a_duplicate_is_the_most_similar_unit(sheets):
    for row, twins in ((0, {(0, 3), (1, 2), (1, 5)}), (1, {(1, 4)}), (3, {(0, 0), (1, 2), (1, 5)})):
        found = {tuple(pair) for pair in sheets.similar[row, : len(twins)].tolist()}
        assert found == twins
        assert sheets.correlation[row, : len(twins)].tolist() == pytest.approx([1.0] * len(twins), abs=1e-5)
        assert sheets.correlation[row, len(twins)] < 0.9
    profiles = sheets.exemplars.profiles.numpy()
    row, (site, unit), r = 5, sheets.similar[5, 1].tolist(), float(sheets.correlation[5, 1])
    other = sheets.exemplars.row(sheets.exemplars.sites[site], unit)
    assert r == pytest.approx(np.corrcoef(profiles[row], profiles[other])[0, 1], abs=1e-5)
    assert int(sheets.similar_image[5, 1]) == int(sheets.exemplars.ids[other, 0])


def test_a_dead_unit_is_said_to_be_dead(sheets):
    row = sheets.exemplars.row("act", 4)
    assert not sheets.exemplars.fires[row]
    assert sheets.silent == ((4,), (1,))
    assert sheets.descriptions[row].text == ""
    assert sheets.active[row] == 0
    assert sheets.logits[row].isnan().all()
    assert not sheets.masks[row].any()
    assert (sheets.similar[row] == -1).all()
    assert (sheets.facet[row] == -1).all()
    assert sheets.selectivity[row] == 0
    shown = sheets.table().loc[row]
    assert not shown["fires"]
    assert shown["most_changed"] == ""


def test_facets_are_the_two_colours_of_a_unit_that_sees_both(sheets, labels):
    row = sheets.exemplars.row("act", 5)
    seen = labels[sheets.exemplars.ids[row]]
    facet = sheets.facet[row]
    assert set(seen.tolist()) == {0, 1}
    assert len({(int(a), int(b)) for a, b in zip(seen, facet, strict=True)}) == 2
    assert facet[0] == 0
    assert sheets.silhouette[row] > 0.5
    apart, s = group(np.array([[0.0, 0], [0, 1], [9, 0], [9, 1]]), 2)
    assert (apart[0] == apart[1]) & (apart[2] == apart[3]) & (apart[0] != apart[2])
    # each point: 1 to its neighbour, (9 + sqrt 82) / 2 to the others
    assert s == pytest.approx(1 - 1 / ((9 + math.sqrt(82)) / 2))
    assert np.isnan(group(np.ones((6, 3)), 2)[1])


def test_selectivity_and_similarity_have_their_known_values(sheets):
    r = torch.tensor([[1.0, 0, 0, 0], [2, 2, 2, 2], [-1, -2, 0, 0], [1, 1, 0, 0]])
    torch.testing.assert_close(sparseness(r), torch.tensor([1.0, 0.0, 0.0, 2 / 3]))
    pairs, correlation = most_similar(sheets.exemplars, torch.tensor([0]), 50)
    assert pairs.shape == (1, 11, 2)
    assert correlation.isnan().sum() == 2  # the dead ones


def test_units_are_chosen_as_the_rule_says(network, images):
    found = unit_sheets(network, images, "act", units=4, exemplars=10, facets=1, **QUIET)
    assert found.exemplars.unit.tolist() == [0, 1, 2, 3]  # 5 answers to two classes of three
    assert found.totals == (6,)
    some = unit_sheets(network, images, ["act", "two"], units={"act": [5, 4], "two": [0]}, facets=1, **QUIET)
    assert [(int(s), int(u)) for s, u in zip(some.exemplars.site, some.exemplars.unit, strict=True)] == [
        (0, 4), (0, 5), (1, 0),
    ]  # fmt: skip
    assert "number" in some.rule
    assert some.descriptions is None


def test_batches_and_datasets_give_what_a_tensor_gives(network, images, labels, sheets):
    pairs = list(zip(images, labels, strict=True))
    batches = unit_sheets(network, iter(images.split(7)), ["act", "two"], facets=1, **QUIET)
    dataset = unit_sheets(network, pairs, ["act", "two"], labels=labels, class_names=WORDS, facets=1, **QUIET)
    for found in (batches, dataset):
        assert torch.equal(found.exemplars.ids, sheets.exemplars.ids)
        torch.testing.assert_close(found.logits, sheets.logits, equal_nan=True)
    assert [d.text for d in dataset.descriptions] == [d.text for d in sheets.descriptions]
    with pytest.raises(InputError, match="read again"):
        unit_sheets(network, iter(images.split(7)), "act", labels=labels, **QUIET)
    with pytest.raises(InputError, match="name sites"):
        unit_sheets(network, iter(images.split(7)), **QUIET)


def test_a_fitted_captioner_may_describe(network, images):
    exemplars = find_exemplars(network, images, "act", k=6, quantile=0.9, progress=False)
    milan = Milan(network, ["one"], hidden=8, embedding=4, epochs=1, beam=2, length=3, held_out=0.0, progress=False)
    milan.fit(exemplars, [["red"], ["green"], ["blue"], ["red"], [], ["red"]])
    found = unit_sheets(network, images, "act", describer=milan, switch_off=False, exemplars=6, facets=1, **QUIET)
    assert found.logits is None
    assert "change" not in found.table()
    assert [bool(d.text) for d in found.descriptions] == [True, True, True, True, False, True]


def test_pictures_of_facets_are_made_on_demand(network, images):
    found = unit_sheets(network, images, "act", units=[4, 5], synthesis=True, phases=[Phase(2)], **QUIET)
    assert set(found.synthesis) == {(1, 0), (1, 1)}
    assert found.synthesis[1, 0].shape == (3, 12, 12)


def test_pictures_are_scaled_back_or_stretched():
    image = torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]], [[0.5, 0.5]]])
    assert as_picture(image).tolist() == [[[0, 0, 128], [255, 0, 128]]]
    assert as_picture(image, 0.5, 0.5)[0, 0].tolist() == [128, 128, 191]
    assert as_picture(image[:1]).shape == (1, 2, 3)


def test_wrong_input_is_named_before_anything_runs(network, images, labels):
    model = network.module
    before = model.rows
    for options, error, text in (
        ({"sites": "tow"}, SiteError, "no module 'tow'; did you mean"),
        ({"labels": labels[:5]}, InputError, "30 images and 5 labels"),
        ({"labels": labels.float()}, InputError, "class indices"),
        ({"labels": labels, "class_names": ["a"]}, InputError, "label 2 has no name"),
        ({"facets": 3}, InputError, "at least 15 exemplars"),
        ({"units": 0}, InputError, "units must be a whole number"),
        ({"units": [1.5]}, InputError, "by their numbers"),
        ({"sites": "act", "units": {"two": [0]}}, InputError, "none of the sites"),
        ({"describer": "words"}, InputError, "LabelDescriber or a fitted Milan"),
        ({"describer": LabelDescriber()}, InputError, "needs labels="),
        ({"pictures": np.zeros((30, 4, 4), np.uint8)}, InputError, "uint8"),
        ({"names": ["a"]}, InputError, "30 images and 1 names"),
    ):
        with pytest.raises(error, match=text):
            unit_sheets(network, images, **{"sites": "two", **options}, **QUIET)
    assert model.rows == before
    with pytest.raises(InputError, match="units 0 to 5; there is no unit 6"):
        unit_sheets(network, images, "two", units=[0, 6], **QUIET)
    with pytest.raises(InputError, match="no image was given"):
        unit_sheets(network, images[:0], "two", **QUIET)
    with pytest.raises(InputError, match=r"\(1, 1, 12, 12\)|\(8, 1, 12, 12\)"):
        unit_sheets(network, images[:, :1], "two", **QUIET)
    with pytest.raises(InputError, match="3 outputs, 4 class names"):
        unit_sheets(network, images, "two", class_names=["a", "b", "c", "d"], **QUIET)
    with pytest.raises(InputError, match=r"outputs \(n, classes\)"):
        unit_sheets(Network(nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())), images, "1", **QUIET)
    with pytest.raises(SiteError, match="no convolution"):
        unit_sheets(Network(nn.Sequential(nn.Flatten(), nn.Linear(432, 2))), images, **QUIET)
