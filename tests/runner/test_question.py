"""How a method words its Passes about one example."""

import pytest
import torch
from torch import nn

from nissl.errors import InputError, SiteError
from nissl.network import Network, RelP, target
from nissl.runner import CHUNK, Question, chunks, make_questions
from nissl.runner.question import resolve_site

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net() -> Network:
    torch.manual_seed(0)
    return Network(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def test_one_question_an_example(net):
    questions = make_questions(net, X, [2, 0, 1], seed=5)
    assert [q.example for q in questions] == [0, 1, 2]
    assert [int(q.target.values[0]) for q in questions] == [2, 0, 1]
    for q, x in zip(questions, X, strict=True):
        assert torch.equal(q.input, x[None])
        assert q.seed == 5
        assert q.at_input
        assert not q.is_tokens


def test_variants_go_to_the_site(net):
    q = make_questions(net, X, 1)[0]
    variants = torch.randn(6, 4)
    p = q.ask(variants, gradient=True, read=["1"])
    assert (p.n, p.wrt, p.read, p.edits) == (6, ("input",), ("1",), ())
    assert torch.equal(p.inputs["0"], variants)
    inner = Question(net, q.inputs, q.target, "0")
    p = inner.ask(torch.randn(6, 5), gradient=True)
    assert (p.n, p.wrt, len(p.edits)) == (6, ("0",), 1)
    assert torch.equal(p.inputs["0"], X[:1].expand(6, 4))
    assert q.ask(scalar=False).of is None
    assert q.ask(rules=RelP(), gradient=True).rules == RelP()
    assert int(q.ask(target=target.class_logit(2)).of.values[0]) == 2


def test_the_value_at_the_site_is_asked_only_inside_the_network(net):
    q = make_questions(net, X, 1)[0]
    with pytest.raises(StopIteration) as stop:
        next(q.value())
    assert torch.equal(stop.value.value, X[:1])
    inner = Question(net, q.inputs, q.target, "0")
    asking = inner.value()
    answer = net.run(next(asking))
    with pytest.raises(StopIteration) as stop:
        asking.send(answer)
    torch.testing.assert_close(stop.value.value, net.module[0](X[:1]).detach())


def test_scalars_are_asked_in_chunks(net):
    q = make_questions(net, X, 1)[0]
    variants = torch.randn(2 * CHUNK + 3, 4)
    asking = q.scalars(variants)
    passes = next(asking)
    assert [p.n for p in passes] == [CHUNK, CHUNK, 3]
    with pytest.raises(StopIteration) as stop:
        asking.send([net.run(p) for p in passes])
    torch.testing.assert_close(stop.value.value, net.module(variants)[:, 1].detach())
    assert [(s.start, s.stop) for s in chunks(70, 32)] == [(0, 32), (32, 64), (64, 70)]


def test_random_numbers_hang_on_seed_example_and_salt_only(net):
    def draw(seed, example, salt):
        q = Question(net, {"0": X}, target.top_class(), "input", seed, example)
        return tuple(torch.rand(3, generator=q.generator(salt)).tolist())

    settings = [(0, 0, ""), (1, 0, ""), (0, 1, ""), (0, 0, "a"), (10, 1, ""), (1, 10, "")]
    drawn = {s: draw(*s) for s in settings}
    assert len(set(drawn.values())) == len(settings)
    assert all(draw(*s) == v for s, v in drawn.items())


def test_token_ids_are_differentiated_at_their_embedding():
    net = Network(nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 2)))
    q = make_questions(net, torch.tensor([[1, 2]]), 0)[0]
    assert q.is_tokens
    assert q.at(net, True, None).site == "0"
    assert q.at(net, False, None).site == "input"
    assert q.at(net, True, "1").site == "1"
    whole = Network(nn.Sequential(nn.Flatten()))
    with pytest.raises(InputError, match="no embedding"):
        resolve_site(whole, {"0": torch.tensor([[1, 2]])}, None, True)
    with pytest.raises(SiteError):
        q.at(net, True, "9")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_inputs_that_are_not_finite_name_the_examples(net, bad):
    x = X.clone()
    x[1, 2] = bad
    with pytest.raises(InputError, match=r"examples \[1\]"):
        make_questions(net, x)
