"""The loop that trains the networks of studies: it learns, repeats, and touches nothing else."""

import torch
from torch import nn
from torch.nn import functional as F

from nissl.studies.training import fit


def test_it_learns_repeats_and_leaves_the_generator():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g)
    y = (x[:, 0] > x[:, 1]).long()
    state = torch.random.get_rng_state()

    def train(seed, epochs=20):
        return fit(
            lambda: nn.Linear(4, 2), lambda m, rows: F.cross_entropy(m(x[rows]), y[rows]), 200,
            epochs=epochs, batch=20, rate=0.05, seed=seed,
        )  # fmt: skip

    one, two, other, untrained = train(1), train(1), train(2), train(1, epochs=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not one.training
    assert float((one(x).argmax(1) == y).double().mean()) > 0.95 > float((untrained(x).argmax(1) == y).double().mean())
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)


def test_every_example_is_seen_once_an_epoch():
    seen = []

    def loss_of(module, rows):
        seen.append(rows)
        return module.weight.sum()

    fit(lambda: nn.Linear(1, 1), loss_of, 10, epochs=3, batch=4, rate=0.1)
    assert [len(r) for r in seen] == [4, 4, 2] * 3
    for epoch in range(3):
        assert sorted(torch.cat(seen[3 * epoch : 3 * epoch + 3]).tolist()) == list(range(10))
