"""Passes take inputs as they come, split into rows and merge back without loss, and have a key for their content."""

import numpy as np
import pytest
import torch
from torch import nn

from nissl.errors import InputError, SiteError
from nissl.network import Add, Answer, Apply, Guided, Network, Pass, Rescale, Set, target
from nissl.network.passes import as_inputs, concatenate, merge, raw_bytes

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=G)


def net() -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def test_inputs_get_names():
    x, y = torch.ones(2, 1), np.ones((2, 3))
    assert list(as_inputs(x)) == ["0"]
    assert list(as_inputs((x, y))) == ["0", "1"]
    named = as_inputs({"ids": x, "mask": y, "use_cache": False})
    assert list(named) == ["ids", "mask", "use_cache"]
    assert named["use_cache"] is False
    assert isinstance(named["mask"], torch.Tensor)


@pytest.mark.parametrize("array", [
    np.broadcast_to(np.arange(3.0), (2, 3)), np.ones((2, 3))[::-1, ::-1], np.ones((2, 3)).astype(">f8"),
    np.asfortranarray(np.random.default_rng(0).random((2, 3))), np.ones((2, 3), np.uint8), np.ones((2, 3), bool),
])  # fmt: skip
def test_arrays_of_any_make_are_taken_and_left_alone(array):
    kept = array.copy()
    t = as_inputs(array)["0"]
    np.testing.assert_array_equal(t.numpy(), kept)
    Network(nn.Identity()).run(Pass(array))
    np.testing.assert_array_equal(array, kept)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ((), "no tensor"),
        ({}, "no tensor"),
        ({"a": 3}, "no tensor"),
        ([1, 2, 3], "no tensor"),
        ("text", "str"),
        (3.0, "float"),
        (None, "NoneType"),
        (torch.ones(0, 3), "0 rows"),
        (torch.tensor(1.0), "scalar"),
        ((torch.ones(2), torch.ones(3)), "disagree"),
        (np.array(["a", "b"]), "no numbers"),
        (np.array([None]), "no numbers"),
    ],
)
def test_what_cannot_be_run_on_is_refused(inputs, says):
    with pytest.raises(InputError, match=says):
        Pass(inputs)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"wrt": ["input"]}, InputError),
        ({"read": ["a#0"]}, SiteError),
        ({"of": 0, "wrt": ["input"], "rules": Rescale(), "read": ["0"], "edits": ()}, None),
        ({"of": [0, 1]}, ValueError),
        ({"edits": Set("0", torch.ones(5, 5))}, InputError),
    ],
)
def test_a_pass_that_makes_no_sense_is_refused(arguments, error):
    if error is None:
        Pass(X, **arguments)
        with pytest.raises(InputError, match="groups of 2"):
            Pass(X[:3], **arguments)
        return
    with pytest.raises(error):
        Pass(X, **arguments)


def test_sites_are_kept_once_in_plain_spelling():
    p = Pass(X, Set("0:out", 1.0), read=["1", "1:out", "1"], of=target.unit("2:out", 1), wrt="0")
    assert p.read == ("1",)
    assert p.wrt == ("0",)
    assert p.edits[0].site == "0"
    answer = net().run(p)
    torch.testing.assert_close(answer.scalar, answer.output[:, 1])


def question(x: torch.Tensor, seed: int) -> Pass:
    g = torch.Generator().manual_seed(seed)
    n = len(x)
    return Pass(
        x,
        [Add("0", torch.randn(n, 5, generator=g)), Set("1", 0.5, where=torch.rand(n, 5, generator=g) < 0.3),
         Add("0", 1.0, examples=torch.rand(n, generator=g) < 0.5)],
        read=["0", "1"], of=torch.randint(3, (n,), generator=g), wrt=["input", "0"],
    )  # fmt: skip


def same(a: Answer, b: Answer) -> None:
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for k in left:
        torch.testing.assert_close(left[k], right[k])


def test_rows_merge_and_split_without_loss():
    network, parts = net(), [question(X[:1], 1), question(X[1:4], 2), question(X[4:], 3)]
    assert len({p.merge_key for p in parts}) == 1
    whole = merge(parts)
    assert whole.n == 6
    apart = [network.run(p) for p in parts]
    together = network.run(whole)
    same(concatenate(apart), together)
    same(network.run(whole[slice(1, 4)]), apart[1])
    same(together[slice(1, 4)], apart[1])
    assert together.nbytes == sum(a.nbytes for a in apart)


def test_what_may_not_share_a_batch_has_another_merge_key():
    def f(h):
        return h

    def g(h):
        return h

    base = {"inputs": X, "edits": [Set("0", 1.0)], "read": ["0"], "of": 1}
    others = [
        {"inputs": X.double()}, {"inputs": torch.randn(6, 5)}, {"inputs": {"0": X, "flag": True}}, {"edits": []},
        {"edits": [Set("0", 2.0)]}, {"edits": [Set("1", 1.0)]}, {"edits": [Add("0", 1.0)]},
        {"edits": [Set("0", 1.0, units=1)]}, {"edits": [Set("0", 1.0, examples=[True] * 6)]}, {"read": ["1"]},
        {"of": target.probability(1)}, {"of": None}, {"wrt": ["input"]}, {"wrt": ["input"], "rules": Guided()},
        {"edits": [Apply("0", f)]}, {"edits": [Apply("0", g)]},
    ]  # fmt: skip
    keys = [Pass(**base).merge_key, *(Pass(**{**base, **other}).merge_key for other in others)]
    assert len(set(keys)) == len(keys)
    assert Pass(**{**base, "inputs": X + 1, "of": 2}).merge_key == keys[0]


def test_content_decides_the_content_key():
    base = {"inputs": X, "edits": [Set("0", torch.ones(6, 5))], "read": ["0"], "of": 1, "wrt": ["0"]}
    others = [
        {"inputs": X + 1e-6}, {"inputs": (X, X)}, {"inputs": {"x": X}}, {"edits": [Set("0", torch.zeros(6, 5))]},
        {"edits": [Set("0", torch.ones(6, 5), units=0)]}, {"read": []}, {"of": 2}, {"of": target.probability(1)},
        {"wrt": ["input"]}, {"rules": Guided()}, {"edits": [Add("0", torch.ones(6, 5))]},
    ]  # fmt: skip
    keys = [Pass(**base).content_key(), *(Pass(**{**base, **o}).content_key() for o in others)]
    assert len(set(keys)) == len(keys)
    assert Pass(**{**base, "inputs": X.clone()}).content_key() == keys[0]


def test_no_content_key_where_something_cannot_be_seen():
    assert Pass(X, Apply("0", torch.relu)).content_key() is None
    assert Pass(X, of=lambda out: out.sum(1)).content_key() is None
    # the repr of a large tensor leaves its middle out
    past = torch.zeros(1, 5000)
    other = past.clone()
    other[0, 2500] = 1
    a, b = (Pass({"x": X, "past": (t,)}) for t in (past, other))
    assert a.content_key() is None
    assert a.merge_key != b.merge_key
    plain = Pass({"x": X, "flags": (True, None, "a", 2)})
    assert plain.content_key() is not None


@pytest.mark.parametrize("t", [torch.ones(3, 4).t(), torch.ones(1).expand(5), torch.tensor(3), torch.ones(2, 0),
                               torch.ones(2, dtype=torch.bfloat16), torch.tensor([True, False])])  # fmt: skip
def test_raw_bytes_are_the_numbers_in_order(t):
    assert bytes(raw_bytes(t)) == bytes(t.contiguous().flatten().clone().view(torch.uint8).tolist())
