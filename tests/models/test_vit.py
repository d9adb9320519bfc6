"""The vision transformer that ships with nissl, and how it is trained."""

import numpy as np
import pytest
import torch

import nissl
from nissl.attribution import hidden_sites
from nissl.errors import InputError
from nissl.models import vit


def test_the_transformer_that_ships_reads_its_weights():
    module = vit.fashion_vit()
    assert vit.WEIGHTS.stat().st_size < 2_000_000
    net = nissl.Network(module)
    x = vit.fashion_input(np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8))
    answer = net.run(nissl.Pass(x, read=["blocks.1:pattern"]))
    assert answer.output.shape == (3, 10)
    assert answer.reads["blocks.1:pattern"].shape == (3, 4, 50, 50)
    assert hidden_sites(net, x) == [f"blocks.{i}.fc2:in" for i in range(4)]


def test_it_knows_fashion():
    from nissl.errors import MissingExtraError
    from nissl.sources.fashion import fashion_mnist

    try:
        images, labels = fashion_mnist("test")
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert vit.accuracy(vit.fashion_vit(), images[:500], labels[:500]) > 0.8


def test_training_lowers_the_loss_and_repeats():
    g = np.random.default_rng(0)
    labels = g.integers(0, 2, 64)
    images = g.integers(0, 60, (64, 28, 28), dtype=np.uint8)
    images[labels == 1, 8:20, 8:20] += 180
    state = torch.random.get_rng_state()
    one, two = (vit.train(images, labels, epochs=6, batch=16, progress=False) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert vit.accuracy(one, images, labels) == 1.0
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_input():
    with pytest.raises(InputError, match="patch"):
        vit.VisionTransformer(patch=5)
    with pytest.raises(InputError, match="uint8"):
        vit.fashion_input(np.zeros((2, 28, 28)))
    with pytest.raises(InputError, match="epochs"):
        vit.train(np.zeros((2, 28, 28), np.uint8), np.zeros(2, int), epochs=0)
