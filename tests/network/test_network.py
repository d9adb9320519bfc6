"""A Network answers like torch does by hand, whatever the module, and leaves the module as it found it."""

import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from nissl.errors import BusyError, GradientError, InputError, NonFiniteError, SiteError, TargetError
from nissl.network import Add, Apply, Network, Pass, Scale, Set, target


class Two(nn.Module):
    """Two inputs, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x, y=None, *, scale=1.0):
        h = self.a(x) if y is None else self.a(x) * torch.tanh(self.b(y))
        return self.head(h) * scale


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, 2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        out, (h, _) = self.lstm(x)
        return self.head(out[:, -1] + h[-1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Packed(nn.Module):
    """Returns a tuple or a mapping with other things beside the logits."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(4, 5), nn.Linear(5, 3), kind

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.kind(h, self.head(h))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.SiLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 3),
    )  # fmt: skip


TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
ZOO = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,), {}, ["0", "1:in"]),
    "cnn": (cnn, (3, 10, 10), {}, ["0", "1", "4:in", "7"]),
    "lstm": (Recurrent, (4, 3), {}, ["lstm", "lstm:out.0", "head:in"]),
    "encoder": (Encoder, (4, 8), {}, ["encoder.layers.0", "encoder.layers.1.linear1", "encoder.layers.1.self_attn"]),
    "tuple": (lambda: Packed(lambda h, y: (h, y)), (4,), {"output": 1}, ["body"]),
    "dict": (lambda: Packed(lambda h, y: {"hidden": h, "logits": y}), (4,), {}, ["body", "head:in"]),
    "key": (lambda: Packed(lambda h, y: OrderedDict(h=h, y=y)), (4,), {"output": "y"}, ["body"]),
    "picked": (lambda: Packed(lambda h, y: [h, [y]]), (4,), {"output": lambda o: o[1][0]}, ["body"]),
    "vit": (lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **TINY)), (3, 8, 8),
            {}, ["vit.layernorm", "classifier:in"]),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=8)),
             "input_ids", {}, ["transformer.wte", "transformer.h.0", "transformer.h.1.mlp.c_proj:in"]),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, vocab_size=11, **TINY)), "input_ids", {},
              ["model.embed_tokens", "model.layers.0", "model.layers.1.mlp.down_proj:in"]),
    "bert": (lambda: BertForSequenceClassification(BertConfig(vocab_size=11, num_labels=3, **TINY)), "input_ids", {},
             ["bert.embeddings", "bert.encoder.layer.0", "classifier:in"]),
}  # fmt: skip


def by_hand(module: nn.Module, sites, call, pick) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
    """Output, scalar, activations and gradients with nothing but torch: hooks that retain what they see."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def first(v):
        while not isinstance(v, torch.Tensor):
            v = v[0]
        return v

    for site in sites:
        name, _, part = site.partition(":")
        m = module.get_submodule(name)
        if part == "in":
            handles.append(m.register_forward_pre_hook(lambda m, a, s=site: seen.__setitem__(s, first(a))))
        else:
            handles.append(m.register_forward_hook(lambda m, a, out, s=site: seen.__setitem__(s, first(out))))
    output = pick(call())
    for h in handles:
        h.remove()
    table = output if output.ndim == 2 else output[:, -1]
    scalar = table[torch.arange(len(table)), torch.tensor([0, 2, 1])]
    return output, scalar, seen, dict(zip(seen, torch.autograd.grad(scalar.sum(), list(seen.values())), strict=True))


@pytest.mark.parametrize("kind", ZOO)
def test_answers_equal_torch_by_hand(kind):
    make, shape, options, sites = ZOO[kind]
    torch.manual_seed(0)
    model = make().eval()
    net = Network(model, **options)
    x = IDS if isinstance(shape, str) else torch.randn(3, *shape)
    key = shape if isinstance(shape, str) else None
    leaf = x if key else x.clone().requires_grad_()
    pick = net._tensor
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that hooks keep it from its fast path
        plain = [s for s in sites if kind != "cnn" or s != "1"]  # the batch norm's output is written over
        output, scalar, reads, grads = by_hand(model, plain, lambda: model(**{key: leaf}) if key else model(leaf), pick)
    position = -1 if output.ndim == 3 else None
    of = target.class_logit([0, 2, 1], position=position)
    answer = net.run(Pass({key: x} if key else x, read=sites, of=of, wrt=sites if key else [*sites, "input"]))
    torch.testing.assert_close(answer.output, output.detach())
    torch.testing.assert_close(answer.scalar, scalar.detach())
    for s in plain:
        torch.testing.assert_close(answer.reads[s], reads[s].detach(), msg=s)
        torch.testing.assert_close(answer.gradients[s], grads[s], msg=s)
    if not key:
        (g,) = torch.autograd.grad(_scalar(pick(model(leaf))).sum(), leaf)
        torch.testing.assert_close(answer.gradients["input"], g, atol=1e-6, rtol=1e-4)
    # all sites in one pass say what each says by itself
    for s in sites:
        alone = net.run(Pass({key: x} if key else x, read=[s], of=of, wrt=[s]))
        torch.testing.assert_close(alone.gradients[s], answer.gradients[s], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(alone.reads[s], answer.reads[s], atol=1e-6, rtol=1e-4)
    # and without gradients, where torch may go another way
    torch.testing.assert_close(net.run(Pass({key: x} if key else x)).output, output.detach(), atol=1e-5, rtol=1e-4)


def _scalar(output: torch.Tensor) -> torch.Tensor:
    return output[torch.arange(len(output)), torch.tensor([0, 2, 1])]


def test_inputs_by_place_and_by_name():
    torch.manual_seed(0)
    m = Two()
    net, x, y = Network(m), torch.randn(2, 3), torch.randn(2, 2)
    torch.testing.assert_close(net.run(Pass(x)).output, m(x).detach())
    torch.testing.assert_close(net.run(Pass((x, y))).output, m(x, y).detach())
    named = net.run(Pass({"x": x, "y": y, "scale": 2.0}, of=0, wrt=["input", "input:y"], read=["input:x"]))
    torch.testing.assert_close(named.output, 2 * m(x, y).detach())
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    ga, gb = torch.autograd.grad(2 * m(a, b)[:, 0].sum(), (a, b))
    torch.testing.assert_close(named.gradients["input"], ga)
    torch.testing.assert_close(named.gradients["input:y"], gb)
    assert torch.equal(named.reads["input:x"], x)
    with pytest.raises(SiteError, match="'x', 'y'"):
        net.run(Pass({"x": x, "y": y}, read=["input:z"]))


def test_an_edit_reaches_only_the_input_it_names():
    class Attend(nn.Module):
        def forward(self, q, k, v=None):
            return q + 10 * k + 100 * v

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Attend()

        def forward(self, x):
            return self.attend(x, x, v=x)

    net, x = Network(Self()), torch.ones(1, 2)
    for key, expected in (("0", 110), ("1", 101), ("v", 11)):
        assert torch.equal(net.run(Pass(x, Set(f"attend:in.{key}", 0.0))).output, torch.full((1, 2), float(expected)))


def test_sites_have_role_shape_and_units():
    net = Network(cnn())
    before = {s.address: s for s in net.sites()}
    assert before["0"].role == "conv"
    assert before["0"].shape is None
    assert before["0"].n_units == 4
    found = {s.address: s for s in net.sites(inputs=torch.randn(2, 3, 10, 10))}
    assert list(found)[:3] == ["input", "0", "1"]
    assert found["input"].shape == (3, 10, 10)
    assert (found["0"].role, found["0"].shape, found["0"].n_units) == ("conv", (4, 8, 8), 4)
    assert (found["9"].role, found["9"].shape, found["9"].n_units) == ("linear", (3,), 3)
    assert [s.address for s in net.sites("4*")] == ["4"]
    assert [s.address for s in net.sites("[01]:in")] == ["0:in", "1:in"]
    assert net.sites("nothing.*") == []


def test_elements_of_tuples_and_mappings_are_sites():
    net = Network(nn.Sequential(OrderedDict(a=Packed(lambda h, y: (h, y)))), output=1)
    x = torch.randn(2, 4)
    assert [s.address for s in net.sites("a:out*", x)] == ["a:out.1"]
    answer = net.run(Pass(x, read=["a:out.1", "a"]))
    assert answer.reads["a:out.1"].shape == (2, 3)
    assert answer.reads["a"].shape == (2, 5)
    assert torch.equal(net.run(Pass(x, Set("a:out.1", 1.0))).output, torch.ones(2, 3))
    named = Network(nn.Sequential(OrderedDict(a=Packed(lambda h, y: {"h": h, "y": y}))), output="y")
    assert [s.address for s in named.sites("a:out*", x)] == ["a:out.y"]
    assert torch.equal(named.run(Pass(x, Set("a:out.y", 1.0))).output, torch.ones(2, 3))


class Shared(nn.Module):
    """One module under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(3, 3)
        self.two = self.one
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.one(self.two(torch.tanh(self.one(x)))))


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize("part", ["", ":in"])
def test_each_call_of_a_shared_module_is_a_site(name, part):
    m = Shared()
    net, x = Network(m), torch.randn(2, 3)
    a = m.one(x)
    b = m.one(torch.tanh(a))
    c = m.one(b)
    expected = (x, torch.tanh(a), b) if part else (a, b, c)
    calls = [f"{name}{part}#{i}" for i in (1, 2, 3)]
    listed = ", ".join(calls)
    for question in (Pass(x, read=[name + part]), Pass(x, read=[name + part], output=False), Pass(x, Set(name + part, 0.0)),
                     Pass(x, of=0, wrt=[name + part])):  # fmt: skip
        with pytest.raises(SiteError, match=listed):
            net.run(question)
    answer = net.run(Pass(x, read=calls))
    for call, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(answer.reads[call], value.detach())
    if not part:
        second = net.run(Pass(x, Add(calls[1], 1.0))).output
        torch.testing.assert_close(second, m.head(m.one(b + 1)).detach())
        assert [s.address for s in net.sites("one")] == ["one#1", "one#2", "one#3"]
    with pytest.raises(SiteError, match="fewer calls"):
        net.run(Pass(x, read=[f"{name}{part}#4"]))


def test_two_names_of_a_shared_module_count_the_same_calls():
    m, x = Shared(), torch.randn(2, 3)
    answer = Network(m).run(Pass(x, read=["one#1", "two#2", "one#3"]))
    a = m.one(x)
    b = m.one(torch.tanh(a))
    for site, value in {"one#1": a, "two#2": b, "one#3": m.one(b)}.items():
        torch.testing.assert_close(answer.reads[site], value.detach())


# ---------------------------------------------------------------- in place


class InPlace(nn.Module):
    """Writes over what its first layer gave, in one of many ways."""

    def __init__(self, how) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(3, 3), nn.Linear(3, 2), how

    def forward(self, x):
        h = self.first(x)
        return self.last(self.how(h))


def iadd(h):
    h += 1
    return h


def slice_assign(h):
    h[:, 0] = h[:, 1] * 2
    return h


WAYS = {"iadd": iadd, "relu": lambda h: F.relu(h, inplace=True), "mul": lambda h: h.mul_(2), "slice": slice_assign,
        "view": lambda h: h.view(-1).clamp_(min=0).view(h.shape), "exp": lambda h: h.exp_()}  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_what_is_written_over_afterwards_is_read_and_differentiated_right(how):
    def on_a_copy(h):
        return WAYS[how](h.clone())

    m, x = InPlace(WAYS[how]), torch.randn(4, 3)
    reference = InPlace(on_a_copy)
    leaf = reference.first(x).detach().requires_grad_()
    out = reference.last(on_a_copy(leaf))
    (g,) = torch.autograd.grad(out[:, 1].sum(), leaf)
    for question in (
        Pass(x, read=["first"], of=1, wrt=["first", "input"]), Pass(x, read=["first"], of=1, wrt=["first"]),
        Pass(x, read=["first"], of=1, wrt=["input"]), Pass(x, read=["first"], of=1),
    ):  # fmt: skip
        answer = Network(m).run(question)
        torch.testing.assert_close(answer.reads["first"], leaf.detach())
        torch.testing.assert_close(answer.output, out.detach())
        if "first" in question.wrt:
            torch.testing.assert_close(answer.gradients["first"], g)
        if "input" in question.wrt:
            torch.testing.assert_close(answer.gradients["input"], g @ m.first.weight.detach())
    torch.testing.assert_close(Network(m).run(Pass(x, of=target.unit("first", 2))).scalar, leaf.detach()[:, 2])


@pytest.mark.parametrize("read", [(), ("input",), ("0",), ("1",)])
def test_a_first_operation_in_place_leaves_the_users_input_and_runs_once(read):
    class Shift(nn.Module):
        def forward(self, x):
            return x.add_(1)

    net = Network(nn.Sequential(Shift(), Shift(), Shift()))
    x = torch.zeros(2, 3)
    answer = net.run(Pass(x, read=read))
    assert torch.equal(x, torch.zeros(2, 3))
    assert torch.equal(answer.output, torch.full((2, 3), 3.0))
    for site in read:
        assert float(answer.reads[site][0, 0]) == {"input": 0, "0": 1, "1": 2}[site]
    array = np.zeros((2, 3), np.float32)
    net.run(Pass(array, of=0, wrt=["input"]))
    assert (array == 0).all()


# ---------------------------------------------------------------- gradients at edits


def test_the_gradient_at_an_edited_site_is_that_of_the_edit():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net, x, v = Network(m), torch.randn(2, 3), torch.randn(2, 4)

    def rest(h):
        return m[1:](h)[:, 1].sum()

    leaf = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(rest(leaf), leaf)
    torch.testing.assert_close(net.run(Pass(x, Set("0", v), of=1, wrt=["0"])).gradients["0"], g)
    leaf = v.clone().requires_grad_()
    (g,) = torch.autograd.grad(rest(m[0](x).detach() + leaf), leaf)
    torch.testing.assert_close(net.run(Pass(x, Add("0", v), of=1, wrt=["0"])).gradients["0"], g)
    # above the scaled site the gradient below it is scaled too
    a = net.run(Pass(x, Scale("0", 3.0), of=1, wrt=["input", "0"]))
    torch.testing.assert_close(a.gradients["input"], 3 * a.gradients["0"] @ m[0].weight.detach())
    one_row = net.run(Pass(x, Set("0", v[:1]), of=1, wrt=["0"])).gradients["0"]
    assert one_row.shape == (2, 4)


def test_a_target_that_does_not_depend_on_the_site_is_an_error():
    net, x = Network(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))), torch.randn(2, 3)
    for question in (
        Pass(x, of=target.unit("0", 1), wrt=["1"]),
        Pass(x, Set("0", 1.0), of=0, wrt=["input"]),
        Pass(x, of=lambda out: torch.ones(2), wrt=["input"]),
        Pass(x, of=lambda out: out.argmax(1).float(), wrt=["input"]),
    ):
        with pytest.raises(GradientError):
            net.run(question)


def test_under_a_callers_inference_mode_gradients_are_the_same():
    net, x = Network(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))), torch.randn(2, 3)
    expected = net.run(Pass(x, of=0, wrt=["input", "0"]))
    with torch.inference_mode():
        inside = net.run(Pass(torch.as_tensor(x) * 1, of=0, wrt=["input", "0"]))
    with torch.no_grad():
        quiet = net.run(Pass(x, of=0, wrt=["input", "0"]))
    for answer in (inside, quiet):
        for site in ("input", "0"):
            torch.testing.assert_close(answer.gradients[site], expected.gradients[site])


def test_weights_get_no_gradients():
    m = nn.Linear(3, 2)
    Network(m).run(Pass(torch.randn(2, 3), of=0, wrt=["input"]))
    assert all(p.grad is None for p in m.parameters())


# ---------------------------------------------------------------- the module stays as it was


class Restless(nn.Module):
    """Changes everything it can while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("data", torch.zeros(3))
        self.register_buffer("late", None)
        self.register_buffer("gone", torch.ones(2))
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
        self.fail = False

    def forward(self, x):
        self.count += 1
        self.last = x.detach().mean(0)
        self.data.data.add_(1)
        self.late = torch.ones(4)
        self.gone = None
        self.register_buffer("fresh", torch.ones(1))
        self.inner.train()
        h = self.inner[0](x)
        if self.fail:
            raise RuntimeError("planted")
        self.inner.eval()
        out = self.inner[1:](h)
        self.train()
        return out


def snapshot(module: nn.Module) -> list:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
             "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")  # fmt: skip
    state = []
    for name, m in module.named_modules():
        state.append((name, m.training, [len(getattr(m, h)) for h in hooks], "forward" in m.__dict__))
        state.append([(k, id(b), None if b is None else b.tolist()) for k, b in m._buffers.items()])
        state.append(
            [(k, id(p), p.requires_grad, p.tolist(), p.grad) for k, p in m._parameters.items() if p is not None]
        )
    state.append(len(torch.overrides._get_current_function_mode_stack()))
    state.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    return state


def planted(*args):
    raise ZeroDivisionError("planted")


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ZeroDivisionError("planted")


X3 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
RAISING = {
    "edit": (Pass(X3, Apply("inner.0", planted)), InputError),
    "target": (Pass(X3, of=planted, read=["inner.0"]), TargetError),
    "target that does not fit": (Pass(X3, of=9, wrt=["inner.0"]), TargetError),
    "backward": (Pass(X3, of=lambda out: BadBackward.apply(out).sum(1), wrt=["inner.0"]), GradientError),
    "no gradient": (Pass(X3, of=lambda out: torch.ones(4), wrt=["inner.0"]), GradientError),
    "site": (Pass(X3, read=["inner.9"]), SiteError),
    "unreached": (Pass(X3, read=["inner.3", "inner.0:pattern"], of=0, wrt=["inner.0"]), SiteError),
    "edit that does not fit": (Pass(X3, Set("inner.1", torch.ones(7))), InputError),
    "interrupt": (Pass(X3, Apply("inner.3", lambda h: (_ for _ in ()).throw(KeyboardInterrupt()))), KeyboardInterrupt),
    "forward": (Pass(X3, read=["inner.0"], of=0, wrt=["inner.0"]), InputError),
    "none": (Pass(X3, Scale("inner.1", 2.0), read=["inner.0"], of=0, wrt=["inner.0"]), None),
    "stopped early": (Pass(X3, read=["inner.0"], output=False), None),
}


@pytest.mark.parametrize("fault", RAISING)
@pytest.mark.parametrize("cut", [False, True])
def test_after_any_pass_the_module_is_as_before(fault, cut):
    torch.manual_seed(0)
    m = Restless()
    m.train()
    m.inner[1].eval()
    m.inner[0].bias.requires_grad_(False)
    net = Network(m)
    question, error = RAISING[fault]
    if cut:
        edits = [Set("inner.0", 1.0), *question.edits]
        question = Pass(X3, edits, question.read, question.of, question.wrt, output=question.output)
    m.fail = fault == "forward"
    before, x = snapshot(m), X3.clone()
    for _ in range(2):
        if error is None:
            net.run(question)
        else:
            with pytest.raises(error) as raised:
                net.run(question)
            if fault in ("edit", "target", "backward"):  # the user's own error is the cause of ours
                assert isinstance(raised.value.__cause__, ZeroDivisionError)
        assert snapshot(m) == before
        assert torch.equal(X3, x)
    m.fail = False
    net.sites()
    net.first_nonfinite(Pass(X3))
    assert snapshot(m) == before
    assert net.run(Pass(X3)).output.shape == (4, 2)
    assert snapshot(m) == before


def test_dropout_and_batch_norm_are_run_in_evaluation_mode():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    answer = Network(m).run(Pass(X3))
    torch.testing.assert_close(answer.output, m.eval()(X3).detach())


def test_weights_that_were_frozen_stay_frozen_and_others_train_on():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    m[0].weight.requires_grad_(False)
    Network(m).run(Pass(X3, of=0, wrt=["0"]))
    m(X3).sum().backward()
    assert m[0].weight.grad is None
    assert m[0].bias.grad is not None


# ---------------------------------------------------------------- threads


def test_networks_are_made_in_many_threads_and_share_the_lock_of_their_module():
    modules = [nn.Linear(3, 2) for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        nets = list(pool.map(lambda i: Network(modules[i % 4]), range(64)))
    assert {id(n._lock) for n in nets} == {id(n._lock) for n in nets[:4]}
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda n: n.run(Pass(X3, of=0, wrt=["input"])).output, nets[:4]))
    for n, out in zip(nets, outputs, strict=False):
        torch.testing.assert_close(out, n.module(X3).detach())


def test_one_network_in_two_threads_is_busy():
    inside, go_on = threading.Event(), threading.Event()

    def wait(h):
        inside.set()
        assert go_on.wait(10)
        return h

    m = nn.Sequential(nn.Linear(3, 2))
    net, other = Network(m), Network(m)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(net.run, Pass(X3, Apply("0", wait)))
        assert inside.wait(10)
        for call in (lambda: net.run(Pass(X3)), lambda: other.run(Pass(X3)), lambda: net.sites(inputs=X3),
                     lambda: net.first_nonfinite(Pass(X3)), lambda: net.embedding_site(X3)):  # fmt: skip
            with pytest.raises(BusyError):
                call()
        go_on.set()
        torch.testing.assert_close(slow.result(10).output, m(X3).detach())
    net.run(Pass(X3))


def test_a_pass_from_inside_an_edit_is_refused_and_does_not_block():
    net = Network(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(BusyError):
        net.run(Pass(X3, Apply("0", lambda h: net.run(Pass(X3)).output)))
    net.run(Pass(X3))


# ---------------------------------------------------------------- other weights


def test_changed_weights_leave_the_original():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    net, w = Network(m), torch.randn(2, 4)
    before, print_before, kept = net.run(Pass(X3, of=0, wrt=["0"])), net.fingerprint(), snapshot(m)
    other = net.changed({"2.weight": w, "1.running_mean": torch.ones(4)})
    by_hand = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    by_hand.load_state_dict({**m.state_dict(), "2.weight": w, "1.running_mean": torch.ones(4)})
    answer = other.run(Pass(X3, Add("0", 1.0), of=0, wrt=["0"]))
    expected = Network(by_hand).run(Pass(X3, Add("0", 1.0), of=0, wrt=["0"]))
    torch.testing.assert_close(answer.output, expected.output)
    torch.testing.assert_close(answer.gradients["0"], expected.gradients["0"])
    assert other.fingerprint() not in (print_before, "")
    assert net.fingerprint() == print_before
    assert snapshot(m) == kept
    again = net.run(Pass(X3, of=0, wrt=["0"]))
    assert torch.equal(again.output, before.output)
    assert torch.equal(again.gradients["0"], before.gradients["0"])
    back = other.changed({"2.weight": m[2].weight, "1.running_mean": m[1].running_mean})
    assert back.fingerprint() == print_before
    assert torch.equal(other.weights()["2.weight"], w)
    assert torch.equal(net.weights()["2.weight"], m[2].weight)


def test_weights_that_do_not_fit_are_refused():
    net = Network(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(InputError, match=r"0\.weight"):
        net.changed({"0.weigth": torch.ones(2, 3)})
    with pytest.raises(InputError, match=r"\(2, 3\)"):
        net.changed({"0.weight": torch.ones(3, 2)})


def test_fingerprints_tell_networks_apart_and_know_equal_ones():
    def make(seed=0, act=nn.Tanh):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 2), act())

    same = [Network(make()), Network(make()), Network(make().train())]
    assert len({n.fingerprint() for n in same}) == 1
    pair = Packed(lambda h, y: (h, y))
    others = [Network(make(1)), Network(make(0, nn.ReLU)), Network(make(), dtype=torch.float64),
              Network(pair, output=0), Network(pair, output=1), Network(pair, output=lambda o: o[0]),
              Network(pair, output=lambda o: o[1])]  # fmt: skip
    assert len({n.fingerprint() for n in [*same, *others]}) == 1 + len(others)
    m = make()
    net = Network(m)
    first = net.fingerprint()
    with torch.no_grad():
        m[0].bias[0] += 1e-3
    assert net.fingerprint() != first


# ---------------------------------------------------------------- black boxes

RNG = np.random.default_rng(0)
TABLE, LABELS = RNG.normal(size=(40, 3)), RNG.integers(0, 3, 40)


def test_estimators_answer_without_gradients():
    for model, f in (
        (LogisticRegression().fit(TABLE, LABELS), "predict_proba"),
        (make_pipeline(StandardScaler(), LogisticRegression()).fit(TABLE, LABELS), "predict_proba"),
        (LinearRegression().fit(TABLE, LABELS), "predict"),
    ):
        net = Network(model)
        expected = getattr(model, f)(TABLE[:5])
        answer = net.run(
            Pass(TABLE[:5], Set("input", 0.0, units=1, examples=[False] * 4 + [True]), of=0, read=["input"])
        )
        np.testing.assert_allclose(answer.output[:4], expected[:4], rtol=1e-5)
        changed = TABLE[4:5].copy()
        changed[0, 1] = 0
        np.testing.assert_allclose(answer.output[4:], getattr(model, f)(changed), rtol=1e-5)
        assert [s.address for s in net.sites()] == ["input"]
        with pytest.raises(GradientError, match="no gradients"):
            net.run(Pass(TABLE[:2], of=0, wrt=["input"]))


def test_functions_answer_and_their_faults_are_named():
    net = Network(lambda x: np.stack([x.sum((1, 2)), x[:, 0, 0]], 1))
    x = RNG.normal(size=(4, 2, 3)).astype(np.float32)
    np.testing.assert_allclose(net.run(Pass(x, of=1)).scalar, x[:, 0, 0])
    with pytest.raises(InputError, match="is it fitted"):
        Network(LogisticRegression()).run(Pass(TABLE))
    with pytest.raises(TargetError, match="2 rows"):
        Network(lambda x: np.ones(3)).run(Pass(TABLE[:2]))
    with pytest.raises(TargetError, match="numbers"):
        Network(lambda x: np.array(["cat"] * len(x))).run(Pass(TABLE[:2]))
    for nothing in (LogisticRegression, 3, "model"):
        with pytest.raises(InputError):
            Network(nothing)


def test_bound_methods_of_two_models_are_two_networks():
    models = [LogisticRegression(C=c).fit(TABLE, LABELS) for c in (1.0, 0.01)]
    a, b = (Network(m.predict_proba).fingerprint() for m in models)
    assert a != b
    assert Network(models[0].predict_proba).fingerprint() == a


def test_a_function_is_known_by_what_it_refers_to():
    def make(k):
        def f(x):
            return np.stack([sum(v for v in (x[:, 0], k * x[:, 1])), x[:, 0]], 1)

        return f

    assert Network(make(1)).fingerprint() == Network(make(1)).fingerprint()
    assert Network(make(1)).fingerprint() != Network(make(2)).fingerprint()


# ---------------------------------------------------------------- what else can be wrong


def test_the_output_must_be_said_where_there_are_several():
    x = torch.randn(2, 4)
    with pytest.raises(TargetError, match="output=0"):
        Network(Packed(lambda h, y: (h, y))).run(Pass(x))
    for wrong in (2, "logits"):
        with pytest.raises(TargetError, match="does not fit"):
            Network(Packed(lambda h, y: (h, y)), output=wrong).run(Pass(x))
    with pytest.raises(TargetError, match="rows"):
        Network(Packed(lambda h, y: y.sum())).run(Pass(x))
    with pytest.raises(InputError, match="Network already"):
        Network(Network(nn.Linear(1, 1)))


def test_a_misspelt_site_names_its_neighbours():
    with pytest.raises(SiteError, match=r"encoder\.layers\.0"):
        Network(Encoder()).run(Pass(torch.randn(1, 4, 8), read=["encoder.layer.0"]))


def test_whole_numbers_have_no_gradient():
    net = Network(nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2)))
    ids = torch.tensor([[1, 2]])
    with pytest.raises(SiteError, match="whole numbers"):
        net.run(Pass(ids, of=0, wrt=["input"]))
    assert net.embedding_site(ids) == "0"
    assert net.run(Pass(ids, of=0, wrt=["0"])).gradients["0"].shape == (1, 2, 4)


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_the_first_site_with_nan_is_named(layer):
    torch.manual_seed(0)
    net = Network(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)))
    bad = net.changed({f"{layer}.bias": torch.full_like(net.weights()[f"{layer}.bias"], torch.nan)})
    question = Pass(X3, of=0)
    with pytest.raises(NonFiniteError, match=f"first appears at site '{layer}'"):
        bad.require_finite(question, bad.run(question))
    net.require_finite(question, net.run(question))


def test_nan_of_the_backward_pass_is_told_apart():
    net = Network(nn.Sequential(nn.Linear(1, 1, bias=False)))
    question = Pass(torch.zeros(1, 1), of=lambda out: out[:, 0].abs().sqrt(), wrt=["input"])
    with pytest.raises(NonFiniteError, match="backward"):
        net.require_finite(question, net.run(question))


def test_precision_is_that_of_the_weights_or_as_asked():
    m = nn.Linear(3, 2).double()
    assert Network(m).run(Pass(X3)).output.dtype == torch.float64
    half = Network(nn.Linear(3, 2), autocast=torch.bfloat16).run(Pass(X3))
    assert half.output.dtype == torch.bfloat16
