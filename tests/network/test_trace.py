"""A trace says what one row calls, in which order, and what need not run before a site."""

import torch
from torch import nn

from nissl.network import Network
from nissl.network.site import parse
from nissl.network.trace import trace


class Tree(nn.Module):
    """Two blocks that share an inner layer, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 3)
        self.one = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.two = nn.Sequential(self.one[0], nn.ReLU())
        self.head = nn.Linear(3, 2)

    def forward(self, ids):
        return self.head(self.two(self.one(self.embed(ids))).mean(1))


IDS = torch.tensor([[1, 2, 3]])


def test_events_are_in_order_of_the_forward_pass():
    record = trace(Network(Tree()), {"0": IDS})
    assert [f"{part} {name} {call}" for part, name, call in record.events if name] == [
        "in embed 1", "out embed 1", "in one 1", "in one.0 1", "out one.0 1", "in one.1 1", "out one.1 1", "out one 1",
        "in two 1", "in one.0 2", "out one.0 2", "in two.1 1", "out two.1 1", "out two 1", "in head 1", "out head 1",
    ]  # fmt: skip
    assert record.embedding == "embed"
    assert record.position(parse("input")) == -1
    assert record.position(parse("one")) < record.position(parse("two:in")) < record.position(parse("head"))
    assert record.position(parse("one.0#2")) == record.position(parse("two.0#2"))
    assert record.position(parse("one.0#3")) is None
    assert record.n_calls(parse("two.0")) == 2
    assert record.n_calls(parse("head:in")) == 1


def test_before_a_site_are_the_outermost_modules_that_have_ended_for_good():
    net = Network(Tree())
    record = trace(net, {"0": IDS})

    def before(site: str) -> set[str]:
        return {net._names[m] for m in record.before(parse(site), net)}

    # the layer inside `one` is called again by `two`: neither may be cut away before that
    assert before("one") == {"embed", "one.1"}
    assert before("two") == {"embed", "one", "two"}
    assert before("head:in") == {"embed", "one", "two"}
    assert before("input") == set()
    assert before("head:pattern") == set()


def test_a_module_that_returns_numbers_is_never_cut_away():
    class Number(nn.Module):
        def forward(self, x):
            return x, float(x.mean())

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number, self.last = Number(), nn.Linear(3, 2)

        def forward(self, x):
            h, mean = self.number(x)
            return self.last(h) + mean

    net = Network(Uses())
    record = trace(net, {"0": torch.ones(1, 3)})
    assert record.before(parse("last"), net) == (net.module.last,)


def test_each_shape_and_each_flag_is_traced_by_itself():
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, deep=True):
            return self.b(self.a(x)) if deep else self.a(x)

    net = Network(Flagged())
    x = torch.ones(1, 3)
    assert {s.address for s in net.sites("*", {"x": x, "deep": False})} == {"input", "a"}
    assert {s.address for s in net.sites("*", {"x": x, "deep": True})} == {"input", "a", "b"}
    assert {s.address: s.shape for s in net.sites("*", {"x": torch.ones(1, 4, 3), "deep": False})}["a"] == (4, 3)


def test_an_embedding_of_other_numbers_is_not_that_of_the_input():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.token = nn.Embedding(8, 3), nn.Embedding(8, 3)

        def forward(self, ids):
            return self.position(torch.arange(ids.shape[1])[None]) + self.token(ids)

    net = Network(Positions())
    assert net.embedding_site(torch.tensor([[3, 1, 2]])) == "token"
    assert net.embedding_site(torch.tensor([[3, 1, 2, 5]])) == "token"


def test_the_last_linear_layer_is_the_one_reached_last():
    record = trace(Network(Tree()), {"0": IDS})
    assert record.last_linear(Network(Tree())) == "head:in"

    class Backwards(nn.Module):
        """Registers its layers in the other order than it runs them, the last one twice."""

        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.b(self.a(x)))

    net = Network(Backwards())
    assert trace(net, {"0": torch.ones(1, 3)}).last_linear(net) == "b:in#2"
    none = Network(nn.Tanh())
    assert trace(none, {"0": torch.ones(1, 3)}).last_linear(none) is None
