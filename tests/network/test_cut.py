"""A Pass that sets a whole site runs only what lies behind it, where that gives the same answer, and never another."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nissl.network import Add, LanguageModel, Network, Pass, Set, target


class Counted(nn.Module):
    """A linear layer that counts its calls."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.linear = nn.Linear(i, o)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x))


def calls(module: nn.Module) -> list[int]:
    return [m.calls for m in module.modules() if isinstance(m, Counted)]


def run_both(net: Network, question: Pass):
    """The answer as it comes, and the one of the full pass, with the number of calls that each took."""
    net.run(question)  # tries the cut
    for m in net.module.modules():
        if isinstance(m, Counted):
            m.calls = 0
    short = net.run(question)
    taken = calls(net.module)
    full = net._answer(question)
    return short, full, taken


def same(short, full) -> None:
    a, b = short.tensors(), full.tensors()
    assert a.keys() == b.keys()
    for k in a:
        assert not a[k].is_meta
        torch.testing.assert_close(a[k], b[k], atol=1e-6, rtol=1e-5, msg=k)


def chain(depth: int = 5, width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Counted(width, width) for _ in range(depth)), nn.Linear(width, 3))


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
V = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("site", ["2", "3:in", "2.linear"])
def test_what_lies_before_a_set_site_is_not_run(site):
    net = Network(chain())
    question = Pass(X, Set(site, V), read=["4", site], of=1, wrt=[site, "4"])
    short, full, taken = run_both(net, question)
    same(short, full)
    expected = [0, 0, 1, 1, 1] if site == "2.linear" else [0, 0, 0, 1, 1]
    assert taken == expected
    assert all("forward" not in m.__dict__ for m in net.module.modules())


@pytest.mark.parametrize(
    "question",
    [
        Pass(X, [Set("2", V), Add("3", 1.0)], of=0, wrt=["2"]),
        Pass(X, [Set("3", V), Set("1", 2.0)], read=["1"]),
        Pass(X, Set("2", V), of=target.unit("3", 1), wrt=["2"]),
        Pass(X, Set("2", V[:1]), read=["5"]),
        Pass(X, Set("2", torch.arange(4.0)), output=False, read=["3"]),
        Pass(X, Set("2:out", 0.5)),
    ],
)
def test_with_other_edits_reads_and_targets(question):
    short, full, taken = run_both(Network(chain()), question)
    same(short, full)
    assert taken[0] == 0


@pytest.mark.parametrize(
    "question",
    [
        Pass(X, Set("2", V, units=[0])),
        Pass(X, Set("2", V, examples=[True] * 5 + [False])),
        Pass(X, [Set("2", V), Add("0", 1.0)], read=["1"]),
        Pass(X, Set("2", V), read=["0"]),
        Pass(X, Set("2", V), read=["input"]),
        Pass(X, [Add("2", 1.0), Set("2", V)]),
        Pass(X, Add("2", V)),
    ],
)
def test_where_something_before_is_wanted_everything_runs(question):
    short, full, taken = run_both(Network(chain()), question)
    same(short, full)
    assert taken[0] == 1


class Residual(nn.Module):
    """The second block's input goes around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = Counted(4, 4), Counted(4, 4), Counted(4, 4)

    def forward(self, x):
        h = self.a(x)
        return self.c(h + self.b(h))


class FromInput(Residual):
    def forward(self, x):
        return self.c(self.b(self.a(x))) + x


class Stashed(Residual):
    """A skip connection by an attribute, which a stubbed module would leave outdated."""

    def forward(self, x):
        self.a.kept = self.a.linear(x)
        self.a(x)
        return self.c(self.b(x)) + self.a.kept


class StashedInside(Residual):
    class Keeper(Counted):
        def forward(self, x):
            self.kept = x * 2
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.a = self.Keeper(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x))) + self.a.kept


class Branching(Residual):
    def forward(self, x):
        h = self.a(x)
        out = self.c(self.b(h))
        return out if float(h.sum()) > 0 else -out


class Number(Residual):
    """What lies before hands on a number that depends on the input."""

    class Scaled(Counted):
        def forward(self, x):
            h = super().forward(x)
            return h, float(x.abs().mean())

    def __init__(self) -> None:
        super().__init__()
        self.a = self.Scaled(4, 4)

    def forward(self, x):
        h, k = self.a(x)
        return self.c(self.b(h)) * k


class Reused(Residual):
    """The first layer is called again behind the site."""

    def forward(self, x):
        return self.c(self.a(self.b(self.a(x))))


@pytest.mark.parametrize("kind", [Residual, FromInput, Stashed, StashedInside, Branching, Number, Reused])
@pytest.mark.parametrize("site", ["b", "a.linear"])
def test_networks_that_cannot_be_cut_there_stay_right(kind, site):
    net = Network(kind())
    if kind in (Stashed, Reused) and site == "a.linear":
        site += "#1"
    for x, v in ((X, V), (X.flip(0) * 3, V * 2), (X[:2], V[:2])):
        question = Pass(x, Set(site, v), read=["b"], of=1)
        short, full, _ = run_both(net, question)
        same(short, full)


class Heads(nn.Module):
    """Two heads; the second one leaves the trunk early and is not part of the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.late, self.one, self.two = Counted(4, 4), Counted(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        h = self.trunk(x)
        return self.one(self.late(h)), self.two(h)


def test_a_read_that_hangs_on_what_was_cut_away_brings_back_the_full_pass():
    net = Network(Heads(), output=0)
    for extra in ({}, {"read": ["two"]}, {"read": ["two"], "of": 1, "wrt": ["late"]}, {"of": target.unit("two", 1)}):
        short, full, taken = run_both(net, Pass(X, Set("late", V), **extra))
        same(short, full)
        assert taken[0] == 1


def test_a_call_is_counted_right_where_a_shared_layer_was_cut_away():
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.shared = Counted(4, 4)
            self.blocks = nn.ModuleList([nn.Sequential(self.shared, Counted(4, 4)) for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    net = Network(Three())
    for sites in (["shared#2"], ["shared#3"], ["shared#2", "shared#3"]):
        short, full, _ = run_both(net, Pass(X, Set("blocks.0", V), read=sites))
        same(short, full)


def test_nested_blocks_are_cut_at_every_depth():
    torch.manual_seed(0)
    inner = [nn.Sequential(Counted(4, 4), nn.Sequential(Counted(4, 4), Counted(4, 4))) for _ in range(3)]
    net = Network(nn.Sequential(*inner))
    for site, skipped in (("0", 3), ("1.1", 6), ("1.1.0", 5), ("2.0", 7)):
        short, full, taken = run_both(net, Pass(X, Set(site, V), of=0, wrt=[site]))
        same(short, full)
        assert taken == [0] * skipped + [1] * (9 - skipped)


def test_an_inner_module_whose_input_is_written_over():
    class Over(nn.Module):
        def forward(self, x):
            return x.mul_(2)

    torch.manual_seed(0)
    net = Network(nn.Sequential(Over(), Counted(4, 4), Over(), Counted(4, 4), Over()))
    x = X.clone()
    for question in (Pass(x, Set("1", V), read=["1", "3"], of=0, wrt=["1"]), Pass(x, Set("1", V), read=["0"])):
        short, full, _ = run_both(net, question)
        same(short, full)
        assert torch.equal(x, X)
    value = V.clone()
    net.run(Pass(x, Set("1", value)))
    assert torch.equal(value, V)


def test_an_in_place_first_operation_is_not_run_on_the_pass_itself_while_a_cut_is_tried():
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x.mul_(3)
            return self.b(self.a(x)) + x

    net = Network(Skip())
    expected = net.module.b(V) + 3 * X
    torch.testing.assert_close(net.run(Pass(X, Set("a", V))).output, expected.detach())


@pytest.mark.parametrize("site", ["transformer.h.0", "transformer.h.1", "transformer.h.0.mlp", "transformer.wte"])
def test_a_language_model(site):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=3, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    ).eval()
    net = Network(model)
    ids, v = torch.randint(11, (3, 5)), torch.randn(3, 5, 8)
    seen = []
    model.transformer.h[0].attn.register_forward_hook(lambda *_: seen.append(1))
    for extra in ({}, {"attention_mask": torch.tensor([[1] * 5, [1] * 5, [0, 0, 1, 1, 1]])}):
        question = Pass({"input_ids": ids, **extra}, Set(site, v), of=target.class_logit(2, position=-1), wrt=[site])
        short, full, _ = run_both(net, question)
        same(short, full)
        if not extra:  # the mask is made where the embedding is, so with one everything runs
            seen.clear()
            net.run(question)
            assert bool(seen) == (site in ("transformer.h.0.mlp", "transformer.wte"))


def test_rows_of_other_lengths_meet_stubs_of_their_own():
    torch.manual_seed(0)
    net = Network(nn.Sequential(Counted(4, 4), Counted(4, 4), nn.Linear(4, 2)))
    for n, t in ((2, 3), (1, 5), (4, 3), (3, 1)):
        question = Pass(torch.randn(n, t, 4), Set("1", torch.randn(n, t, 4)))
        short, full, taken = run_both(net, question)
        same(short, full)
        assert taken == [0, 0]


def test_changed_weights_are_cut_like_the_original():
    net = Network(chain())
    other = net.changed({"4.linear.weight": torch.eye(4)})
    for n in (net, other):
        short, full, taken = run_both(n, Pass(X, Set("3", V)))
        same(short, full)
        assert taken == [0, 0, 0, 0, 1]


def test_a_language_model_skips_the_blocks_before_a_set_residual_stream():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    net = LanguageModel(LlamaForCausalLM(config).eval())
    inputs = net.encode([[1, 2, 3, 4], [7, 8]])  # with padding, so that there is a mask
    site = net.anatomy.site("resid_pre", 2)
    value = net.run(Pass(inputs, read=[site])).reads[site]
    question = Pass(inputs, [Set(site, value), Add(net.anatomy.site("mlp_out", 2), torch.ones(16))],
                    of=target.class_logit(3, position=-1), wrt=[net.anatomy.site("mlp_out", 2)])  # fmt: skip
    net.run(question)  # tries the cut
    called = []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, i=i: called.append(i))
        for i, layer in enumerate(net.module.model.layers)
    ]
    short = net.run(question)
    for handle in handles:
        handle.remove()
    assert called == [2, 3]
    same(short, net._answer(question))
