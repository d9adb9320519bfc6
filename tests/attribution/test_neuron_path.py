"""Paths of neurons: closed forms of the joint influence, the search against single candidates, edits, bad input."""

import pytest
import torch
from torch import nn

import nissl
from nissl.attribution.neuron_path import NeuronPath, Paths, activation_path, hidden_sites
from nissl.errors import GradientError, InputError, SiteError

PAIR = torch.tensor([[2.0, 3.0]])


class Hidden(nn.Module):
    """A function of hidden layers that the input gives directly: one token each."""

    def __init__(self, sizes, function):
        super().__init__()
        self.sizes, self.function = sizes, function
        self.layers = nn.ModuleList(nn.Identity() for _ in sizes)

    def forward(self, x):
        parts = [layer(p[:, None]) for layer, p in zip(self.layers, x.split(self.sizes, 1), strict=True)]
        return self.function(*(p[:, 0] for p in parts))[:, None]


def influence(function, sizes, x, **options):
    net = nissl.Network(Hidden(sizes, function), dtype=torch.float64)
    sites = [f"layers.{i}" for i in range(len(sizes))]
    return NeuronPath(sites=sites, **options).find(net, x.double(), lambda out: out[:, 0])


@pytest.mark.parametrize(
    ("function", "cross", "complete"),
    [(lambda a, b: a[:, 0] * b[:, 0], 11.875, 5.70), (lambda a, b: a[:, 0] - 2 * b[:, 0], -5.0, -4.0)],
)
def test_joint_influence_of_two_units_in_closed_form(function, cross, complete):
    for options, expected in (({"cross_terms": True}, cross), ({"cross_terms": False}, complete)):
        found = influence(function, [1, 1], PAIR, steps=20, **options)
        assert float(found.influence) == pytest.approx(expected, rel=1e-9)
    assert found.passes == {"forward": 61, "backward": 60}


def joint_or_solo(a, b):
    return (a[:, 0] + b[:, 0]).clamp(max=1.5) + 0.7 * b[:, 1]


X = torch.tensor([[1.0, 5.0, 1.0, 1.0, 6.0]])  # p1, r1 | p2, q2, r2: both r influence nothing


@pytest.mark.parametrize(("exact", "second"), [(True, [1.5, 1.2, 0.5]), (False, [1.5, 1.45, 0.75])])
def test_without_cross_terms_the_pair_that_matters_is_found(exact, second):
    """Single candidates are given what their removal costs; candidates that are scaled together share it."""
    found = influence(joint_or_solo, [2, 3], X, steps=2000, midpoint=True, cross_terms=False, exact=exact)
    assert found.units.flatten().tolist() == [0, 0]
    assert found.scores[0].to_numpy()[0] == pytest.approx([0.5, 0.0], abs=2e-3)
    assert found.scores[1].to_numpy()[0] == pytest.approx(second, abs=2e-3)
    # what is lost when the pair is removed is what it was given
    net = nissl.Network(Hidden([2, 3], joint_or_solo), dtype=torch.float64)
    lost = net.run(nissl.Pass(X.double())).output - net.run(nissl.Pass(X.double(), found.edits())).output
    assert float(lost) == pytest.approx(float(found.influence), abs=2e-3)


def test_with_cross_terms_a_large_unit_without_influence_wins():
    found = influence(joint_or_solo, [2, 3], X, steps=2000, midpoint=True)
    assert found.scores[1].to_numpy()[0] == pytest.approx([3.0, 2.9, 5.25], abs=5e-3)
    assert found.units.flatten().tolist() == [0, 2]


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(Block(8, 12) for _ in range(depth))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nissl.Network(Transformer().double())


@pytest.fixture
def images():
    return torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_hidden_sites_are_the_inputs_of_second_layers(net, images):
    assert hidden_sites(net, images) == [f"blocks.{i}.fc2:in" for i in range(3)]


def by_hand(module, x, y, steps):
    """The search for one image, written with hooks on the module."""
    tokens = []
    for block in module.blocks:
        handle = block.fc2.register_forward_pre_hook(lambda m, args: tokens.append(args[0][:, 0].detach()))
        handle.remove_later = handle.remove
        tokens.append(handle)
    with torch.no_grad():
        module(x)
    for t in tokens:
        if not isinstance(t, torch.Tensor):
            t.remove()
    clean = [t[0] for t in tokens if isinstance(t, torch.Tensor)]

    def gradients(values):
        total = [torch.zeros_like(v) for v in values]
        for k in range(steps):
            leaves = [(v(k / steps) if callable(v) else v).requires_grad_() for v in values_at(values, k / steps)]
            handles = []
            for block, leaf in zip(module.blocks, leaves, strict=False):

                def put(m, args, leaf=leaf):
                    return (torch.cat([leaf[None, None], args[0][:, 1:]], 1),)

                handles.append(block.fc2.register_forward_pre_hook(put))
            p = module(x).softmax(1)[0, y]
            for handle in handles:
                handle.remove()
            for t, g in zip(total, torch.autograd.grad(p, leaves), strict=True):
                t += g / steps
        return total

    def values_at(values, alpha):
        out = []
        for i, unit in enumerate(values_units):
            v = clean[i].clone()
            if unit is None:
                v = v * alpha
            else:
                v[unit] = v[unit] * alpha
            out.append(v)
        return out

    path, scores = [], []
    for layer in range(len(clean)):
        values_units = [*path, None]
        g = gradients([clean[i] for i in range(layer + 1)])
        w_path = sum(clean[i][u] for i, u in enumerate(path))
        g_path = sum(g[i][u] for i, u in enumerate(path))
        scores.append((g[layer] + g_path) * (clean[layer] + w_path))
        path.append(int(scores[-1].argmax()))
    return path, scores


def test_the_search_is_the_one_of_the_paper(net, images):
    y = [2, 0, 1]
    found = NeuronPath(steps=5).find(net, images, y)
    for i in range(3):
        path, scores = by_hand(net.module.eval(), images[i : i + 1], y[i], 5)
        assert found.units[i, :, 0].tolist() == path
        for mine, theirs in zip(found.scores, scores, strict=True):
            assert mine.to_numpy()[i] == pytest.approx(theirs.numpy(), rel=1e-9, abs=1e-12)
    expected = net.run(nissl.Pass(images)).output.softmax(1)[range(3), y]
    torch.testing.assert_close(found.value, expected)


@pytest.mark.parametrize("tokens", ["class", "patches", "all"])
def test_complete_influence_is_what_removing_the_path_costs(net, images, tokens):
    method = NeuronPath(steps=300, midpoint=True, cross_terms=False, tokens=tokens, width=2)
    found = method.find(net, images, 1)
    clean = net.run(nissl.Pass(images, read=found.sites))
    # all else at the selected tokens is held as it is
    where = {"class": [0], "patches": list(range(1, 7)), "all": list(range(7))}[tokens]
    held = []
    for layer, site in enumerate(found.sites):
        value = clean.reads[site].clone()
        for i, units in enumerate(found.units[:, layer]):
            value[i][:, units] = 0
        held.append(nissl.Set(site, value, positions=where))
    lost = found.value - net.run(nissl.Pass(images, held)).output.softmax(1)[:, 1]
    torch.testing.assert_close(found.influence, lost, rtol=1e-3, atol=1e-6)


def test_edits_touch_the_path_at_its_tokens_only(net, images):
    found = NeuronPath(steps=2, width=2).find(net, images, 1)
    clean = net.run(nissl.Pass(images, read=found.sites[:1])).reads[found.sites[0]]
    removed = net.run(nissl.Pass(images, found.edits(), read=found.sites[:1])).reads[found.sites[0]]
    doubled = net.run(nissl.Pass(images, found.edits(2.0), read=found.sites[:1])).reads[found.sites[0]]
    kept = net.run(nissl.Pass(images, found.keep_only(), read=found.sites[:1])).reads[found.sites[0]]
    for i in range(3):
        on = torch.zeros(12, dtype=torch.bool)
        on[found.units[i, 0]] = True
        torch.testing.assert_close(removed[i, 0], clean[i, 0].masked_fill(on, 0.0))
        torch.testing.assert_close(doubled[i, 0], torch.where(on, 2 * clean[i, 0], clean[i, 0]))
        torch.testing.assert_close(kept[i, 0], clean[i, 0].masked_fill(~on, 0.0))
        for other in (removed, doubled, kept):
            torch.testing.assert_close(other[i, 1:], clean[i, 1:])
    assert len(found.keep_only(depth=1)) == 1
    half = found.keep_only(share=0.5, seed=3)[0].where
    assert 0.2 < float(half.double().mean()) < 0.6


def test_influence_of_given_units_is_that_of_the_search(net, images):
    method = NeuronPath(steps=3, width=2)
    found = method.find(net, images, 1)
    torch.testing.assert_close(method.influence(net, images, found.units, 1), found.influence)
    others = (found.units + 1) % 12
    assert (method.influence(net, images, others, 1) != found.influence).all()
    with pytest.raises(InputError, match="units must be"):
        method.influence(net, images, found.units[:1], 1)


def test_profiles_count_units_of_a_class(net, images):
    found = NeuronPath(steps=2).find(net, images, 1)
    profile = found.profile(["a", "b", "a"])
    assert profile.dims == ("class", "layer", "unit")
    assert (profile.sum("unit") == 1).all()
    assert float(profile.sel({"class": "b"})[0, int(found.units[1, 0, 0])]) == 1
    assert found.shared([1]).tolist() == found.units[1].tolist()
    figure = found.plot(["a", "b", "a"])
    assert len(figure.axes[0].lines) == 3
    import matplotlib.pyplot as plt

    plt.close(figure)


def test_activation_path_takes_the_largest(net, images):
    path = activation_path(net, images)
    reads = net.run(nissl.Pass(images, read=["blocks.1.fc2:in"])).reads["blocks.1.fc2:in"]
    assert path[:, 1, 0].tolist() == reads[:, 0].argmax(1).tolist()


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [({"steps": 0}, InputError, "steps"), ({"width": 0}, InputError, "width"),
     ({"exact": True, "width": 2}, InputError, "width=1")],
)  # fmt: skip
def test_bad_parameters(options, error, says):
    with pytest.raises(error, match=says):
        NeuronPath(**options)


def test_bad_networks(net, images):
    with pytest.raises(InputError, match="feed-forward"):
        NeuronPath().find(nissl.Network(nn.Sequential(nn.Flatten(), nn.Linear(30, 3)).double()), images, 1)
    with pytest.raises(GradientError):
        NeuronPath(sites=["x"]).find(nissl.Network(lambda x: x.reshape(len(x), -1)), images, 1)
    with pytest.raises(SiteError):
        NeuronPath(sites=["blocks.9.fc2:in"]).find(net, images, 1)
    with pytest.raises(InputError, match="tokens, units"):
        NeuronPath(sites=["head"]).find(net, images, 1)
    with pytest.raises(InputError, match="width=99"):
        NeuronPath(width=99).find(net, images, 1)
    with pytest.raises(InputError, match="empty"):
        NeuronPath(sites=[]).find(net, images, 1)
    found = NeuronPath(steps=1, tokens="patches").find(net, images, 1)
    assert isinstance(found, Paths)
    with pytest.raises(InputError, match="n_tokens"):
        found.edits()
    with pytest.raises(InputError, match="share"):
        found.keep_only(share=2, n_tokens=7)
    with pytest.raises(InputError, match="labels"):
        found.profile([1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.module.modules())
