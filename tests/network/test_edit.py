"""Edits against the activations computed by hand, and what they refuse."""

import pytest
import torch
from torch import nn

from nissl.errors import InputError, SiteError
from nissl.network import Ablate, Add, Answer, Apply, Network, Pass, Patch, Scale, Set

G = torch.Generator().manual_seed(0)
X = torch.randn(3, 4, generator=G)
MAPS = torch.randn(3, 2, 6, 6, generator=G)


def dense() -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)))


def conv() -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)))


def edited(net: Network, edits, x=X) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activation at "0" before and after edits there; the rest of the network must go on with the latter."""
    h = net.module[0](x).detach()
    answer = net.run(Pass(x, edits, read=["0"]))
    torch.testing.assert_close(answer.output, net.module[1:](answer.reads["0"]).detach())
    return h, answer.reads["0"], answer.output


VECTOR = torch.arange(5.0)
FULL = torch.randn(3, 5, generator=G)


@pytest.mark.parametrize(
    ("edit", "by_hand"),
    [
        (Set("0", 2.0), lambda h: torch.full_like(h, 2)),
        (Set("0", VECTOR), lambda h: VECTOR.expand_as(h)),
        (Set("0", FULL), lambda h: FULL),
        (Set("0", FULL[:1]), lambda h: FULL[:1].expand_as(h)),
        (Set("0", FULL.numpy()), lambda h: FULL),
        (Set("0:out", 2.0), lambda h: torch.full_like(h, 2)),
        (Add("0", 1), lambda h: h + 1),
        (Add("0", VECTOR), lambda h: h + VECTOR),
        (Scale("0", FULL), lambda h: h * FULL),
        (Ablate("0"), lambda h: h * 0),
        (Ablate("0", "mean", reference=FULL), lambda h: FULL.mean(0).expand_as(h)),
        (Apply("0", lambda h: h.flip(1)), lambda h: h.flip(1)),
        (Apply("0", lambda h: h.mul_(2)), lambda h: h * 2),
        ([Add("0", 1), Scale("0", 3)], lambda h: (h + 1) * 3),
        ([Scale("0", 3), Add("0", 1)], lambda h: h * 3 + 1),
    ],
)
def test_whole_edits(edit, by_hand):
    h, after, _ = edited(dense(), edit)
    torch.testing.assert_close(after, by_hand(h).to(h))


@pytest.mark.parametrize(
    "units", [[1, 3], torch.tensor([1, 3]), [-4, 3], torch.tensor([False, True, False, True, False])]
)
def test_on_some_units(units):
    h, after, _ = edited(dense(), Set("0", 9.0, units=units))
    expected = h.clone()
    expected[:, [1, 3]] = 9
    torch.testing.assert_close(after, expected)


def test_on_some_examples_and_units():
    h, after, _ = edited(dense(), Scale("0", 0.5, units=2, examples=[True, False, True]))
    expected = h.clone()
    expected[0, 2] /= 2
    expected[2, 2] /= 2
    torch.testing.assert_close(after, expected)


def test_units_of_a_convolution_are_channels_and_positions_may_be_a_mask():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    h, after, _ = edited(conv(), Set("0", 7.0, units=[0, 2], positions=mask), MAPS)
    expected = h.clone()
    for channel in (0, 2):
        expected[:, channel, 1, 2] = 7
        expected[:, channel, 3, 0] = 7
    torch.testing.assert_close(after, expected)
    h, after, _ = edited(conv(), Add("0", torch.tensor([1.0, 2.0, 3.0])), MAPS)
    torch.testing.assert_close(after, h + torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1))


def test_positions_of_a_sequence_are_tokens():
    net = Network(nn.Sequential(nn.Linear(4, 5), nn.Tanh()))
    x = torch.randn(2, 6, 4)
    h = net.module[0](x).detach()
    after = net.run(Pass(x, Set("0", 3.0, positions=[1, -1], units=[0]), read=["0"])).reads["0"]
    expected = h.clone()
    expected[:, 1, 0] = expected[:, 5, 0] = 3
    torch.testing.assert_close(after, expected)


def test_where_is_any_mask_and_leaves_the_rest():
    where = torch.rand(3, 5, generator=G) < 0.5
    h, after, _ = edited(dense(), Set("0", FULL, where=where))
    torch.testing.assert_close(after, torch.where(where, FULL, h))


def test_resampling_takes_a_row_of_the_reference_by_seed():
    net = dense()
    rows = {tuple(edited(net, Ablate("0", "resample", reference=FULL, seed=s))[1][0].tolist()) for s in range(12)}
    assert rows == {tuple(r) for r in FULL.tolist()}
    first, again = (edited(net, Ablate("0", "resample", reference=FULL, seed=5))[1] for _ in range(2))
    assert torch.equal(first, again)


def test_patching_puts_the_activations_of_another_answer_in_place():
    net = dense()
    other = X.flip(0) + 1
    source = net.run(Pass(other, read=["0"]))
    kept = source.reads["0"].clone()
    answer = net.run(Pass(X, Patch("0", source)))
    torch.testing.assert_close(answer.output, source.output)
    half = net.run(Pass(X, Patch("0", source, examples=[True, False, False])))
    torch.testing.assert_close(half.output, torch.cat([source.output[:1], net.run(Pass(X)).output[1:]]))
    assert torch.equal(source.reads["0"], kept)


@pytest.mark.parametrize("make", [lambda v: Set("0", v), lambda v: Apply("0", lambda h: v), lambda v: Set("input", v)])
@pytest.mark.parametrize("grad", [False, True])
def test_a_network_that_works_in_place_does_not_write_to_the_users_value(make, grad):
    class Shift(nn.Module):
        def forward(self, x):
            return x.add_(1)

    net = Network(nn.Sequential(Shift(), Shift(), Shift()))
    x, value = torch.zeros(2, 3), torch.full((2, 3), 5.0)
    edit = make(value)
    answer = net.run(Pass(x, edit, of=0, read=[edit.site], wrt=[edit.site] if grad else ()))
    assert torch.equal(value, torch.full((2, 3), 5.0))
    assert torch.equal(x, torch.zeros(2, 3))
    assert torch.equal(answer.reads[edit.site], value)
    assert torch.equal(answer.output, value + (3 if edit.site == "input" else 2))


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda: Set("0", torch.zeros(4)), InputError),
        (lambda: Set("0", torch.zeros(2, 5)), InputError),
        (lambda: Set("0", torch.zeros(3, 6)), InputError),
        (lambda: Set("0", torch.zeros(3, 5, 1)), InputError),
        (lambda: Set("0", "much"), InputError),
        (lambda: Set("0", 1.0, units=5), SiteError),
        (lambda: Set("0", 1.0, units=[-6]), SiteError),
        (lambda: Set("0", 1.0, units=torch.zeros(4, dtype=torch.bool)), SiteError),
        (lambda: Set("0", 1.0, units=[0.5]), InputError),
        (lambda: Set("0", 1.0, units="first"), InputError),
        (lambda: Set("0", 1.0, positions=0), SiteError),
        (lambda: Set("0", 1.0, examples=[0, 1]), InputError),
        (lambda: Set("0", 1.0, examples=[True]), InputError),
        (lambda: Set("0", 1.0, where=[1.0]), InputError),
        (lambda: Set("0", 1.0, where=torch.ones(2, 5, dtype=torch.bool)), InputError),
        (lambda: Apply("0", lambda h: h[:, :2]), InputError),
        (lambda: Apply("0", lambda h: None), InputError),
        (lambda: Ablate("0", "mean"), InputError),
        (lambda: Patch("0", Answer()), SiteError),
        (lambda: Set("7", 1.0), SiteError),
        (lambda: Set("", 1.0), SiteError),
    ],
)
def test_an_edit_that_does_not_fit_is_an_error(edit, error):
    net = dense()
    with pytest.raises(error):
        net.run(Pass(X, edit()))
    torch.testing.assert_close(net.run(Pass(X)).output, net.module(X).detach())
