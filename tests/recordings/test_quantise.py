"""The vector quantiser: hand cases, planted centres, straight-through gradients, codes that are revived or stay."""

import pytest
import torch
from torch.nn import functional as F

from nissl.errors import InputError
from nissl.recordings.quantise import VectorQuantizer
from nissl.seeds import seeded


def clusters(n: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(4, 8, generator=g), dim=-1)
    which = torch.randint(4, (n,), generator=g)
    return 3 * (centres[which] + 0.05 * torch.randn(n, 8, generator=g)), which, centres


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_planted_clusters_get_codes_of_their_own(metric, update):
    h, which, centres = clusters()
    with seeded(1):
        q = VectorQuantizer(8, 8, metric=metric, update=update)
        q.train()
        out = q(h)
    pure = sum(int(torch.bincount(which[out.codes == c]).max()) for c in range(8) if (out.codes == c).any())
    assert pure == len(which)
    used = out.codes.unique()
    assert len(used) >= 4
    near = F.normalize(q.decode(used).detach(), dim=-1) @ centres.T
    assert float(near.max(1).values.min()) > 0.97
    assert q.perplexity() >= 3.5


def test_the_moving_average_of_a_hand_case_and_unused_codes_that_stay():
    q = VectorQuantizer(3, 2, decay=0.9)
    q.vectors.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    q.started.fill_(True)
    q.train()
    h = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    out = q(h)
    assert out.codes.tolist() == [0, 1, 0]
    mean = F.normalize((torch.tensor([1.0, 0.0]) + torch.tensor([0.8, 0.6])) / 2, dim=-1)
    wanted = F.normalize(0.9 * torch.tensor([1.0, 0.0]) + 0.1 * mean, dim=-1)
    assert torch.allclose(q.vectors[0], wanted, atol=1e-6)
    assert torch.equal(q.vectors[2], torch.tensor([-1.0, 0.0]))
    assert torch.allclose(q.vectors.norm(dim=-1), torch.ones(3), atol=1e-6)


def test_the_gradient_passes_straight_through():
    q = VectorQuantizer(3, 2, metric="euclidean", commitment=0.25).eval()
    h = torch.randn(5, 2, requires_grad=True)
    out = q(h)
    weights = torch.randn(5, 2)
    (out.values * weights).sum().backward()
    assert torch.equal(h.grad, weights)
    assert torch.allclose(out.values, q.decode(out.codes), atol=1e-6)
    assert torch.allclose(out.losses["commitment"], 0.25 * ((h - q.decode(out.codes)) ** 2).mean())
    distance = torch.cdist(h.detach(), q.vectors)
    assert torch.equal(out.codes, distance.argmin(-1))


def test_the_gradient_of_the_codebook_loss_pulls_only_used_vectors():
    q = VectorQuantizer(3, 2, metric="euclidean", update="gradient").eval()
    q.vectors.data.copy_(torch.tensor([[1.0, 0.0], [5.0, 5.0], [-9.0, 0.0]]))
    out = q(torch.tensor([[2.0, 0.0]]))
    out.losses["codebook"].backward()
    assert torch.equal(q.vectors.grad, torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))


def test_nothing_moves_in_evaluation():
    h, _, _ = clusters()
    q = VectorQuantizer(6, 8, revive_after=1).eval()
    before = {k: v.clone() for k, v in q.state_dict().items()}
    first = q(h).codes
    assert torch.equal(q(h).codes, first)
    assert torch.equal(q.encode(h), first)
    assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_dead_codes_are_named_and_revived():
    h, _, centres = clusters()
    for revive, dead in ((None, 2), (3, 0)):
        q = VectorQuantizer(6, 8, revive_after=revive)
        q.vectors.copy_(F.normalize(torch.cat([centres, -centres.mean(0, keepdim=True).expand(2, 8)]), dim=-1))
        q.started.fill_(True)
        q.train()
        with seeded(0):
            for _ in range(5):
                q(h)
        assert len(q.dead(5)) == dead


def test_a_start_with_fewer_vectors_than_codes_still_differs_everywhere():
    q = VectorQuantizer(16, 4)
    with seeded(0):
        q.start(torch.randn(5, 4))
    assert len(q.vectors.unique(dim=0)) == 16
    assert torch.allclose(q.vectors.norm(dim=-1), torch.ones(16), atol=1e-6)


def test_the_shape_of_tokens_is_kept():
    q = VectorQuantizer(4, 8).eval()
    out = q(torch.randn(2, 3, 8))
    assert out.values.shape == (2, 3, 8)
    assert out.codes.shape == (2, 3)
    assert torch.allclose(out.values.norm(dim=-1), torch.ones(2, 3), atol=1e-5)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"n_codes": 1}, "n_codes"),
        ({"n_features": 0}, "n_features"),
        ({"decay": 1.0}, "decay"),
        ({"commitment": -1.0}, "commitment"),
        ({"revive_after": 0}, "revive_after"),
    ],
)
def test_bad_settings_are_refused(how, says):
    with pytest.raises(InputError, match=says):
        VectorQuantizer(**{"n_codes": 4, "n_features": 2} | how)


def test_a_start_from_nan_is_refused():
    q = VectorQuantizer(4, 2)
    with pytest.raises(InputError, match="NaN"):
        q.start(torch.full((8, 2), torch.nan))
    assert not q.started
