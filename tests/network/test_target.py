"""Targets against the same scalars written by hand; each misfit is an error."""

import pytest
import torch
from torch.nn import functional as F

from nissl.errors import TargetError
from nissl.network import target as t
from nissl.network.target import Target, as_target

Y = torch.tensor([2, 0, 1, 3])
B = torch.tensor([1, 1, 0, 0])
OUT = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()
SEQ = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)).double()
ROWS = torch.arange(4)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (t.class_logit(Y), OUT[ROWS, Y]),
        (t.class_logit(2), OUT[:, 2]),
        (t.class_logit([2, 0, 1, 3]), OUT[ROWS, Y]),
        (t.top_class(), OUT.max(1).values),
        (t.logit_difference(Y, B), OUT[ROWS, Y] - OUT[ROWS, B]),
        (t.logit_difference(Y, 4), OUT[ROWS, Y] - OUT[:, 4]),
        (t.log_probability(Y), -F.cross_entropy(OUT, Y, reduction="none")),
        (t.probability(3), OUT.softmax(1)[:, 3]),
        (t.loss(lambda out, y: F.cross_entropy(out, y, reduction="none"), Y), F.cross_entropy(OUT, Y, reduction="none")),
        (t.loss(lambda out, y: (out.sum(1) - y) ** 2, 3), (OUT.sum(1) - 3) ** 2),
    ],
)  # fmt: skip
def test_scalars_of_a_table(target, expected):
    torch.testing.assert_close(target(OUT), expected)
    rows = target.rows(4)
    torch.testing.assert_close(rows[slice(1, 3)](OUT[1:3]), expected[1:3])


@pytest.mark.parametrize("position", [0, 4, -1])
def test_scalars_of_a_step_of_a_sequence(position):
    table = SEQ[:, position]
    torch.testing.assert_close(t.class_logit(Y, position=position)(SEQ), table[ROWS, Y])
    torch.testing.assert_close(t.top_class(position=position)(SEQ), table.max(1).values)
    torch.testing.assert_close(t.log_probability(Y, position)(SEQ), table.log_softmax(1)[ROWS, Y])
    torch.testing.assert_close(t.logit_difference(Y, B, position)(SEQ), table[ROWS, Y] - table[ROWS, B])


def test_one_output_a_row_is_class_0():
    torch.testing.assert_close(t.class_logit(0)(OUT[:, 1]), OUT[:, 1])


def test_inner_units():
    maps = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(t.unit("c", 2, 0, 1)(maps), maps[:, 2, 0, 1])
    torch.testing.assert_close(t.channel("c", 1)(maps), maps[:, 1].mean((1, 2)))
    torch.testing.assert_close(t.channel("c", 1)(maps[:, :, 0, 0]), maps[:, 1, 0, 0])


def test_what_users_pass_becomes_a_target():
    torch.testing.assert_close(as_target(None)(OUT), OUT.amax(1))
    torch.testing.assert_close(as_target(2)(OUT), OUT[:, 2])
    torch.testing.assert_close(as_target(Y)(OUT), OUT[ROWS, Y])
    torch.testing.assert_close(as_target(Y.numpy())(OUT), OUT[ROWS, Y])
    own = as_target(lambda out: out.sum(1))
    torch.testing.assert_close(own(OUT), OUT.sum(1))
    assert as_target(own) is own


def test_targets_of_one_kind_may_share_a_batch():
    assert t.class_logit(1).kind == t.class_logit(Y).kind
    assert t.class_logit(1).kind != t.probability(1).kind
    assert t.unit("a", 1).kind != t.unit("b", 1).kind
    assert t.class_logit(1).kind != t.class_logit(1, position=0).kind


@pytest.mark.parametrize(
    ("make", "output", "says"),
    [
        (lambda: t.class_logit(5), OUT, "0 to 4"),
        (lambda: t.class_logit(-1), OUT, "-1 does not exist"),
        (lambda: t.class_logit([0, 1]), OUT, "2 entries for 4 rows"),
        (lambda: t.class_logit(0), SEQ, "position="),
        (lambda: t.class_logit(0, position=6), SEQ, "6 steps"),
        (lambda: t.class_logit(0, position=-7), SEQ, "6 steps"),
        (lambda: t.class_logit(0, position=1), OUT, "n_steps"),
        (lambda: t.class_logit(1.5), OUT, "whole numbers"),
        (lambda: t.class_logit(True), OUT, "whole numbers"),
        (lambda: t.class_logit("cat"), OUT, "whole numbers"),
        (lambda: t.unit("a", 1, 1), OUT, "1 indices"),
        (lambda: t.unit("a", 9), OUT, "9"),
        (lambda: t.channel("a", 9), OUT, "9"),
        (lambda: t.loss(F.cross_entropy, Y), OUT, "one scalar a row"),
        (lambda: Target(lambda out: out), OUT, r"\(4, 5\)"),
        (lambda: Target(lambda out: 3.0), OUT, "float"),
    ],
)
def test_a_target_that_does_not_fit_is_an_error(make, output, says):
    with pytest.raises(TargetError, match=says):
        make()(output)
