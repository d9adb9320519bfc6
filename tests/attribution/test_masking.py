"""Features and baselines: divisions known by hand."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from nissl.attribution.masking import (
    Features,
    baseline_of,
    blur,
    check_baseline,
    features_of,
    masked,
    roles_of,
    scalars_under,
)
from nissl.errors import InputError
from nissl.network import Network
from nissl.runner import CHUNK, Job, Question, Runner, make_questions


def flat_sum(**kwargs):
    return Network(lambda a: a.reshape(len(a), -1).sum(1, keepdims=True), **kwargs)


def question(x, **kwargs) -> Question:
    return make_questions(flat_sum(**kwargs), x, 0)[0]


def drained(generator):
    """What a generator that asks nothing returns."""
    with pytest.raises(StopIteration) as stop:
        next(generator)
    return stop.value.value


def test_patches_of_an_image_are_square_and_share_their_channels():
    q = question(torch.rand(1, 3, 28, 42))
    f = features_of(q, q.input)
    assert (f.n, f.labels.shape, f.dims) == (14 * 21, (1, 28, 42), ("channel", "y", "x"))
    assert f.labels[0, :2, :2].eq(0).all()
    assert f.labels[0, 2, 0] == 21
    assert features_of(q, q.input, size=10).n == 3 * 5  # the last ones are cut at the edge


@pytest.mark.parametrize(
    ("shape", "dims", "labels"),
    [
        ((1, 3), None, [0, 1, 2]),
        ((1, 2, 64), None, [[t // 2 + 32 * c for t in range(64)] for c in range(2)]),
        ((1, 3, 4), ("token", "unit"), [[0], [1], [2]]),
        ((1, 2, 3), ("y", "x"), [[0, 1, 2], [3, 4, 5]]),
        ((1, 64, 2), ("time", "channel"), [[t // 2 * 2, t // 2 * 2 + 1] for t in range(64)]),
    ],
)
def test_features_follow_the_names_of_dimensions(shape, dims, labels):
    q = question(torch.rand(shape), dims=dims)
    f = features_of(q, q.input)
    assert f.labels.tolist() == labels
    assert f.n == np.max(labels) + 1


def test_token_ids_are_single_and_whole_numbers_of_images_are_refused():
    q = question(torch.tensor([[5, 7, 7]]))
    f = features_of(q, q.input)
    assert (f.labels.tolist(), f.dims) == ([0, 1, 2], ("token",))
    q = question(torch.ones(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(InputError, match="floating point"):
        features_of(q, q.input)


def test_heads_of_an_attention_pattern_are_features():
    assert roles_of(("head", "query", "key")) == ("single", "together", "together")


@pytest.mark.parametrize("shape", [(1, 2, 2, 2, 2), (1,)])
def test_rows_without_known_features_are_refused(shape):
    q = question(torch.rand(shape))
    with pytest.raises(InputError, match="no known features"):
        features_of(q, q.input)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_superpixels_follow_a_border(channels):
    image = torch.zeros(1, channels, 20, 20)
    image[..., 7:] = 1.0
    q = question(image)
    f = features_of(q, q.input, superpixels=8)
    assert 4 <= f.n <= 12
    left, right = f.labels[0, :, :7].unique().tolist(), f.labels[0, :, 7:].unique().tolist()
    assert not set(left) & set(right)
    noisy = question(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert features_of(noisy, noisy.input, superpixels=64).n >= 32
    with pytest.raises(InputError, match="an image"):
        features_of(question(torch.rand(1, 5)), torch.rand(1, 5), superpixels=8)


def test_shared_scores_keep_their_sum():
    f = Features(torch.tensor([[[0, 0, 1], [0, 2, 2]]]), 3, ("channel", "y", "x"))
    scores, dims = f.share(torch.tensor([6.0, 5.0, 8.0]))
    assert dims == ("y", "x")
    assert scores.tolist() == [[2, 2, 5], [2, 4, 4]]
    assert f.masks(torch.tensor([[True, False, False]])).tolist() == [[[[True, True, False], [True, False, False]]]]


def test_named_baselines():
    x = torch.arange(12.0).reshape(1, 3, 2, 2)
    q = question(x)
    assert drained(baseline_of("zero", q, x)).eq(0).all()
    assert drained(baseline_of("mean", q, x))[0, :, 0, 0].tolist() == [1.5, 5.5, 9.5]
    assert drained(baseline_of(2, q, x)).eq(2).all()
    noise = drained(baseline_of("noise", q, x, rows=50))
    assert noise.shape == (50, 3, 2, 2)
    assert 0 <= noise.min() < 1
    assert 10 < noise.max() <= 11
    tokens = torch.arange(6.0).reshape(1, 3, 2)
    assert (
        drained(baseline_of("mean", question(tokens, dims=("token", "unit")), tokens))[0].tolist() == [[2.0, 3.0]] * 3
    )
    assert drained(baseline_of("mean", question(torch.rand(1, 3)), torch.tensor([[1.0, 2.0, 6.0]]))).eq(3).all()


def test_blur_is_a_gaussian_with_mirrored_edges():
    x = torch.rand(2, 3, 20, 30, dtype=torch.float64)
    expected = gaussian_filter(x.numpy(), 2.0, mode="mirror", truncate=3.0, axes=(2, 3))
    np.testing.assert_allclose(blur(x), expected, atol=1e-12)
    tokens = torch.rand(1, 20, 4)
    b = drained(baseline_of("blur", question(tokens, dims=("token", "unit")), tokens))
    np.testing.assert_allclose(b, gaussian_filter(tokens.numpy(), 2.0, mode="mirror", truncate=3.0, axes=1), atol=1e-6)


@pytest.mark.parametrize("bad", ["grey", float("nan"), float("inf")])
def test_what_is_no_baseline(bad):
    with pytest.raises(InputError, match="baseline"):
        check_baseline(bad)


@pytest.mark.parametrize(
    ("x", "bad", "match"),
    [
        (torch.rand(1, 4), torch.rand(1, 3), "does not fit"),
        (torch.rand(1, 4), torch.rand(0, 4), "does not fit"),
        (torch.rand(1, 4), torch.full((4,), torch.inf), "infinity"),
        (torch.rand(1, 4), "blur", "positions"),
        (torch.tensor([[1, 2]]), "mean", "token ids"),
        (torch.tensor([[1, 2]]), 0.5, "whole numbers"),
    ],
)
def test_baselines_that_do_not_fit(x, bad, match):
    q = question(x)
    with pytest.raises(InputError, match=match):
        next(baseline_of(bad, q, x))


def test_masked_mixes_numbers_and_chooses_ids():
    x, b = torch.tensor([[4.0, 8.0]]), torch.zeros(1, 2)
    assert masked(x, b, torch.tensor([[0.5, 1.0], [0.0, 0.25]])).tolist() == [[2, 8], [0, 2]]
    ids, pad = torch.tensor([[5, 6]]), torch.tensor([[9, 9]])
    assert masked(ids, pad, torch.tensor([[0.4, 0.6]])).tolist() == [[9, 6]]
    assert masked(ids, pad, torch.tensor([[True, False]])).tolist() == [[5, 9]]


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_several_baselines_are_averaged_in_chunks(rows):
    generator = torch.Generator().manual_seed(0)
    net = Network(nn.Linear(5, 2).double())
    net.module.requires_grad_(False)
    x, b = torch.rand(1, 5, generator=generator).double(), torch.rand(rows, 5, generator=generator).double()
    masks = torch.rand(7, 5, generator=generator) < 0.5
    sizes = []

    def job(q):
        asking = scalars_under(q, x, b, masks)
        answer = None
        while True:
            try:
                passes = asking.send(answer)
            except StopIteration as stop:
                return stop.value
            sizes.extend(p.n for p in passes)
            answer = yield passes

    q = make_questions(net, x, 1)[0]
    [(_, found)] = Runner(progress=False).drive([Job("test", 0, net, lambda: job(q))])
    expected = [net.module(torch.where(m, x, b))[:, 1].mean() for m in masks]
    np.testing.assert_allclose(found, torch.stack(expected), atol=1e-12)
    assert max(sizes) <= CHUNK
