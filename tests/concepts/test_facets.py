"""Facets and activation maximisation: denoising is scikit-image's, steps are those of the recipe, planted facets come apart."""

import math
import warnings

import numpy as np
import pytest
import torch
from skimage import data
from skimage.restoration import denoise_tv_bregman
from torch import nn

from nissl.concepts.facets import Facets, plot_facets
from nissl.concepts.synthesis import CBR, MEAN, ActivationMaximisation, Phase, denoise, noise, total_variation
from nissl.errors import GradientError, InputError, SiteError, TargetError
from nissl.network import Network
from nissl.studies import multifaceted

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def photograph():
    return torch.from_numpy(data.astronaut()[100:140, 180:230].astype(np.float64)).permute(2, 0, 1)


@pytest.mark.parametrize("weight", [0.001, 0.05, 0.4, 2.0])
def test_denoising_is_that_of_scikit_image(photograph, weight):
    """Equal where both have settled; after 100 sweeps in another order, on average within a fifth of a grey level."""
    image = photograph.permute(1, 2, 0).numpy()
    for iterations, tolerance, most, mean in ((2000, 1e-7, 1e-3, 1e-3), (100, 1e-3, 10, 0.2)):
        theirs = denoise_tv_bregman(
            image, weight, max_num_iter=iterations, eps=tolerance, isotropic=True, channel_axis=-1
        )
        ours = denoise(photograph[None], weight, iterations, tolerance)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours - theirs).max() <= most
        assert np.abs(ours - theirs).mean() <= mean


def test_a_batch_is_denoised_as_its_images_are(photograph):
    batch = torch.stack([photograph, photograph.flip(1), 255 - photograph]).float()
    together = denoise(batch, 0.4, 30, 0.0)
    for one, image in zip(together, batch, strict=True):
        assert torch.allclose(one, denoise(image[None], 0.4, 30, 0.0)[0], atol=1e-3)
    assert (total_variation(denoise(batch, 0.01)) < total_variation(together)).all()
    assert (total_variation(together) < total_variation(batch)).all()


class Linear(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.register_buffer("w", w)

    def forward(self, x):
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


def test_steps_are_those_of_the_recipe():
    """A linear unit: each step moves pixels by step · g / mean|g| in grey levels, in the inner square only, and clips."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, 20, 20, generator=g)
    start = torch.full((2, 1, 20, 20), 0.5)
    inner = torch.zeros(20, 20)
    inner[4:16, 4:16] = 1  # 50 of 227 pixels are 4.4 of 20
    phases = (Phase(4, step=(1.0, 3.0)), Phase(3, margin=50, step=(2.0, 2.0)))
    found = ActivationMaximisation(phases, tv=False, **QUIET).run(Network(Linear(w)), 0, start)
    level = torch.full((1, 20, 20), 127.5)
    for i in range(4):
        level = level + (1 + 2 * i / 4) * w / w.abs().mean()
    for _ in range(3):
        # the mean runs over the masked zeros too
        level = (level + 2 * w * inner / (w * inner).abs().mean()).clamp(0, 255)
    assert torch.allclose(found.images[0], level / 255, atol=1e-5)
    assert torch.equal(found.images[0], found.images[1])
    assert found.activations[:, 1].tolist() == pytest.approx([float((level / 255 * w).sum())] * 2, rel=1e-4)
    assert found.trace.shape == (7, 2)
    assert (found.trace.diff(dim=0) > 0).all()


def test_scaling_of_the_network_is_taken_into_account():
    w = torch.ones(3, 8, 8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
    low, spread = (torch.tensor(v)[:, None, None] for v in (mean, std))
    start = (torch.full((1, 3, 8, 8), 0.5) - low) / spread
    found = ActivationMaximisation((Phase(10),), tv=False, mean=mean, std=std, **QUIET).run(
        Network(Linear(w)), 0, start
    )
    assert torch.allclose((found.images * spread + low) * 255, torch.full((1, 3, 8, 8), 137.5), atol=1e-2)
    grey = noise(2, (3, 50, 50), mean, std) * spread + low
    assert float(grey.mean() * 255) == pytest.approx(175, abs=0.5)
    assert float(grey.std() * 255) == pytest.approx(8, abs=0.3)


def test_the_canvas_grows_and_the_middle_moves_most():
    w = torch.ones(1, 20, 20)
    phases = (Phase(40, scale=1.5, window=0.3, weight=(5.0, 5.0)),)
    found = ActivationMaximisation(phases, tv=False, **QUIET).run(
        Network(Linear(w)), 0, torch.full((1, 1, 20, 20), 0.2)
    )
    assert found.images.shape[-2:] == (30, 30)
    assert found.inputs.shape[-2:] == (20, 20)
    moved = found.images[0, 0] - 0.2
    assert float(moved[12:18, 12:18].mean()) == pytest.approx(40 / 255, abs=1e-4)
    assert float(moved[[0, -1]].mean()) < 0.5 * 40 / 255
    assert sum(p.steps for p in MEAN) == 370
    assert sum(p.steps for p in CBR) == 530


def test_a_flat_softmax_falls_back_to_the_logit():
    w = torch.full((1, 8, 8), 50.0)
    phase = (Phase(3, "probability"),)
    found = ActivationMaximisation(phase, tv=False, **QUIET).run(Network(Linear(w)), 1, torch.full((1, 1, 8, 8), 0.5))
    assert torch.allclose(found.images * 255, torch.full((1, 1, 8, 8), 124.5), atol=1e-3)


# ---------------------------------------------------------------- facets


@pytest.fixture(scope="module")
def planted():
    model = multifaceted.OrUnit(0)
    images, truth = multifaceted.planted(model, 0)
    network = Network(model)
    return model, network, images, truth


def test_planted_facets_come_apart(planted):
    """Bars fixed beforehand: clusters .95, purity .9, four facets of four."""
    model, network, images, truth = planted
    found = Facets(4, "code", phases=multifaceted.PHASES, n_components=10, **QUIET).fit(network, 0, images)
    pure, which = multifaceted.purity(model, found.inputs_)
    assert sum(np.bincount(truth[found.labels_ == j]).max() for j in range(4)) >= 0.95 * len(truth)
    assert pure.min() >= multifaceted.PURITY
    assert len(set(which.tolist())) == 4
    # denoising outweighs the ascent on 16 pixels: how far activations rise without it is told by the test below
    for j, members in enumerate(found.members_):
        assert len(members) == 15
        assert (found.labels_[members] == j).all()
        assert len(set(truth[members].tolist())) == 1
        assert torch.allclose(found.mean_images_[j], images[torch.from_numpy(members)].mean(0))
        centre = found.embedding_[found.labels_ == j].mean(0)
        distance = np.linalg.norm(found.embedding_ - centre, axis=1)
        assert distance[members].max() <= np.sort(distance[found.labels_ == j])[14] + 1e-4
    assert found.agreement_ == pytest.approx(1.0)
    off = found.similarity_[~np.eye(4, dtype=bool)]
    assert np.allclose(np.diag(found.similarity_), 1, atol=1e-5)
    assert off.max() < 0.9
    figure = plot_facets(found)
    assert len(figure.axes) == 8


def test_activations_rise_from_the_means_without_denoising(planted):
    """The bar fixed beforehand, 1.5 times the activation of the mean image."""
    _, network, images, truth = planted
    means = torch.stack([images[truth == f][:15].mean(0) for f in range(4)])
    found = ActivationMaximisation(multifaceted.PHASES, tv=False, **QUIET).run(network, 0, means)
    assert (found.activations[:, 1] >= multifaceted.RISE * found.activations[:, 0]).all()


def test_small_clusters_are_averaged_with_a_warning(planted):
    _, network, images, _ = planted
    some = images[::10]
    facets = Facets(4, "code", phases=(Phase(1),), embed="pca", **QUIET)
    with pytest.warns(UserWarning, match="fewer than 15"):
        facets.fit(network, 0, some)
    assert sorted(np.concatenate(facets.members_).tolist()) == list(range(24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Facets(4, "code", phases=(Phase(1),), embed="pca", n_mean=6, **QUIET).fit(network, 0, some)


def test_the_default_code_is_what_the_last_linear_layer_takes():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 3))
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Facets(2, phases=(Phase(1),), embed="pca", n_components=20, n_mean=3, **QUIET).fit(Network(model), 0, x)
    assert found.embedding_.shape == (40, 12)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change",
    [
        {"k": 0},
        {"n_mean": 0},
        {"n_components": 0},
        {"embed": "umap"},
        {"perplexity": 0.0},
        {"phases": ()},
        {"std": 0.0},
    ],
)
def test_bad_settings_of_facets(change):
    with pytest.raises(InputError):
        Facets(**{"k": 2, **change})


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"objective": "loss"}, {"scale": 0.5}, {"window": -1.0}, {"margin": -1}, {"weight": (0.0, 1.0)}],
)
def test_bad_phases(change):
    with pytest.raises(InputError):
        Phase(**{"steps": 2, **change})


def test_bad_questions(planted):
    _, network, images, _ = planted
    facets = Facets(4, "code", phases=(Phase(1),), embed="pca", n_mean=1, **QUIET)
    with pytest.raises(InputError, match="too few"):
        facets.fit(network, 0, images[:19])
    with pytest.raises(InputError, match="n, channels"):
        facets.fit(network, 0, images[0])
    with pytest.raises(InputError, match="same code"):
        facets.fit(network, 0, images[:1].expand(40, -1, -1, -1))
    with pytest.raises(SiteError, match="code_site"):
        Facets(4, **QUIET).fit(network, 0, images)
    with pytest.raises(TargetError, match="class 7"):
        facets.fit(network, 7, images)
    with pytest.raises(InputError, match="fit"):
        plot_facets(facets)
    assert not hasattr(facets, "labels_")
    ascent = ActivationMaximisation((Phase(1),), **QUIET)
    dead = Network(nn.Sequential(nn.Flatten(), nn.ReLU()))
    with pytest.raises(GradientError, match="no gradient"):
        ascent.run(dead, 0, torch.zeros(1, 1, 4, 4))
    with pytest.raises(GradientError, match="no gradients"):
        ascent.run(Network(lambda x: x.reshape(len(x), -1)), 0, images[:1])
    with pytest.raises(InputError, match="NaN"):
        ascent.run(network, 0, torch.full((1, 1, 16, 16), math.nan))
    with pytest.raises(InputError, match="class as target"):
        ActivationMaximisation(CBR, **QUIET).run(network, lambda y: y[:, 0], images[:1])
