"""Addresses are parsed, said back and refused as written; what a place holds is found and replaced by key."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from nissl.errors import SiteError
from nissl.network.site import Address, items_of, parse, role_of, select, substitute, unit_axis


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("input", Address("", "input")),
        ("input:pixel_values", Address("", "input", "pixel_values")),
        ("input:0", Address("", "input", "0")),
        ("a.b.3", Address("a.b.3", "out")),
        ("a.b:in", Address("a.b", "in")),
        ("a:in.mask#3", Address("a", "in", "mask", 3)),
        ("a:out.1", Address("a", "out", "1")),
        ("a#2", Address("a", "out", None, 2)),
        ("a:pattern", Address("a", "pattern")),
        ("input:in", Address("input", "in")),
        ("input:out", Address("input", "out")),
    ],
)
def test_an_address_is_parsed_and_said_back(text, address):
    assert parse(text) == address
    assert str(address) == text
    assert parse(str(address)) == address


def test_the_output_may_be_spelled_out():
    assert parse("a.b:out") == parse("a.b")
    assert str(parse("a:out#2")) == "a#2"


@pytest.mark.parametrize("text", ["", ":in", "a#0", "a#x", "a:back", "a:in.", "a#"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(SiteError):
        parse(text)


def test_roles_are_known_by_type_and_name():
    class MySelfAttention(nn.Module):
        pass

    class RMSNorm(nn.Module):
        pass

    expected = {
        nn.Conv1d(1, 1, 1): "conv", nn.Linear(1, 1): "linear", nn.Embedding(2, 1): "embedding",
        nn.MultiheadAttention(2, 1): "attention", MySelfAttention(): "attention", nn.LayerNorm(2): "norm",
        nn.BatchNorm2d(2): "norm", RMSNorm(): "norm", nn.MaxPool2d(2): "pool", nn.Dropout(): "dropout",
        nn.GELU(): "activation", nn.ReLU(): "activation", nn.Sequential(): "block",
    }  # fmt: skip
    assert {m: role_of(m) for m in expected} == expected


@pytest.mark.parametrize(
    ("module", "ndim", "axis"),
    [
        (nn.Conv2d(1, 1, 1), 4, 1), (nn.Conv1d(1, 1, 1), 3, 1), (nn.BatchNorm1d(1), 3, 1), (nn.Linear(1, 1), 4, 3),
        (nn.Linear(1, 1), 2, 1), (nn.LayerNorm(1), 3, 2), (None, 3, 2), (None, 4, 1), (None, 2, 1), (nn.ReLU(), 4, 1),
    ],
)  # fmt: skip
def test_units_lie_on_the_channels_of_maps_and_on_the_last_axis_elsewhere(module, ndim, axis):
    assert unit_axis(module, ndim) == axis


Pair = namedtuple("Pair", "left right")


@pytest.mark.parametrize("kind", [tuple, list, Pair._make, lambda v: OrderedDict(zip("ab", v, strict=True)),
                                  lambda v: BaseModelOutput(last_hidden_state=v[0], hidden_states=v[1])])  # fmt: skip
def test_one_element_is_replaced_and_the_structure_kept(kind):
    x, y, new = torch.ones(1), torch.zeros(1), torch.ones(1) * 3
    held = kind([x, y])
    changed = substitute(held, None, y, new)
    assert type(changed) is type(held)
    keys = list(items_of(held))
    assert select(changed, keys[0], "here") is x
    assert select(changed, keys[1], "here") is new
    assert select(held, keys[1], "here") is y


def test_a_key_tells_apart_what_is_the_same_tensor():
    x, new = torch.ones(1), torch.zeros(1)
    assert [t is new for t in substitute((x, x, x), "1", x, new)] == [False, True, False]
    assert [t is new for t in substitute((x, x, x), None, x, new)] == [True, True, True]


def test_without_a_key_the_first_floating_tensor_is_meant():
    ids, values = torch.arange(2), torch.rand(2)
    assert select((None, ids, values), None, "here") is values
    assert select({"ids": ids}, None, "here") is ids
    assert select(values, None, "here") is values


@pytest.mark.parametrize(
    ("held", "key"),
    [(torch.ones(1), "1"), ((None,), None), ((torch.ones(1),), "1"), ({}, None), (object(), None), (3, None)],
)
def test_where_no_tensor_is_an_error_says_so(held, key):
    with pytest.raises(SiteError, match=r"layer\.7"):
        select(held, key, "layer.7")
