"""Every method on every kind of input: sizes, finite, repeatable, within budget; or an error that says why not."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

import nissl.attribution
from nissl.attribution import METHODS, Method
from nissl.errors import GradientError, InputError, NisslError, RuleError
from nissl.network import Network
from nissl.runner import CHUNK, Runner

BUDGET = 16


class Tokens(nn.Module):
    """Two transformer layers, read out by their mean; takes ids, vectors where `vocabulary` is 0, or images."""

    def __init__(self, vocabulary: int, patches: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4) if patches else None
        self.embedding = nn.Embedding(vocabulary, 8) if vocabulary else nn.Identity()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.patches is not None:
            x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(self.embedding(x)).mean(1))


def kind(name: str) -> tuple[Network, torch.Tensor, str | None]:
    """Network, two examples and the site that is asked about."""
    torch.manual_seed(0)
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    if name in ("image", "inner map"):
        layers = [nn.Conv2d(3, 4, 3, padding=1), relu, pool, nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
        return Network(model), torch.rand(2, 3, 16, 16), "3" if name == "inner map" else None
    if name in ("table", "inner vector"):
        model = nn.Sequential(nn.Linear(5, 8), relu, nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        return Network(model), torch.randn(2, 5), "1" if name == "inner vector" else None
    if name == "series":
        layers = [nn.Conv1d(2, 4, 5, padding=2), relu, nn.Conv1d(4, 6, 5, padding=2), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))
        return Network(model), torch.randn(2, 2, 40), None
    if name == "ids":
        return Network(Tokens(11)), torch.randint(1, 11, (2, 6)), None
    if name == "vectors of tokens":
        return Network(Tokens(0), dims=("token", "unit")), torch.randn(2, 6, 8), None
    if name == "image in patches":
        return Network(Tokens(0, patches=True)), torch.rand(2, 3, 16, 16), None
    if name == "black box":
        rng = np.random.default_rng(0)
        x = rng.normal(size=(40, 5))
        return Network(KNeighborsClassifier(5).fit(x, (x[:, 0] > 0).astype(int))), torch.randn(2, 5), None
    raise AssertionError(name)


ENTRIES = {
    "image": {"channel": 3, "y": 16, "x": 16},
    "inner map": {"channel": 6, "y": 8, "x": 8},
    "image in patches": {"channel": 3, "y": 16, "x": 16},
    "series": {"channel": 2, "time": 40},
    "ids": {"token": 6, "unit": 8},
    "vectors of tokens": {"token": 6, "unit": 8},
    "table": {"feature": 5},
    "inner vector": {"unit": 8},
    "black box": {"feature": 5},
}
"""What methods that differentiate at every entry give; ids get scores at their embedding."""


def without(dims: dict[str, int], *names: str) -> dict[str, int]:
    return {k: v for k, v in dims.items() if k not in names}


POSITIONS = {
    name: without(dims, "unit") if "token" in dims else without(dims, "channel") if "y" in dims else dims
    for name, dims in ENTRIES.items()
}
"""What methods that switch features off give: channels of an image go together, and units of a token."""

MAPS = {name: without(dims, "channel") for name, dims in POSITIONS.items() if {"x", "time", "token"} & set(dims)}
"""What methods that sum over channels give; without positions there is no map."""

TRANSFORMERS = ("ids", "vectors of tokens", "image in patches")
ATTENTION = ("rollout", "flow", "attention")
CAMS = ("gradcam", "gradcam++", "layercam", "scorecam", "ablationcam")
REFUSED: dict[tuple[str, str], type[NisslError]] = {
    **{(key, k): InputError for key in CAMS for k in ENTRIES if k not in MAPS},
    **{(key, k): InputError for key in ATTENTION for k in ENTRIES if k not in TRANSFORMERS},
    **{(key, "inner vector"): RuleError for key in ("guided", "deconv")},  # no ReLU lies behind it
    **{("deeplift", k): RuleError for k in TRANSFORMERS},  # nn.MultiheadAttention moves rows to the second dimension
}


def expected(key: str, name: str) -> dict[str, int] | type[NisslError]:
    """Sizes of the scores of a method on a kind of input, or the error that says why there are none."""
    if (key, name) in REFUSED:
        return REFUSED[key, name]
    cls = METHODS[key]
    if cls.differentiates and name == "black box":
        return GradientError
    if key in CAMS or key in ATTENTION:
        return MAPS[name]
    return ENTRIES[name] if cls.differentiates else POSITIONS[name]


def counted(net: Network) -> list[int]:
    """Rows of every Pass that the network will answer."""
    sizes: list[int] = []
    run = net.run
    net.run = lambda question: (sizes.append(question.n), run(question))[1]
    return sizes


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("key", METHODS)
def test_every_method_on_every_kind_of_input(key, name):
    net, x, site = kind(name)
    method = METHODS[key]().at_budget(BUDGET)
    wanted = expected(key, name)
    before, fingerprint = x.clone(), net.fingerprint()

    def scores(inputs=x, seed=3, network=net):
        return method.attribute(
            network, inputs, [0, 1][: len(inputs)], site=site, seed=seed, runner=Runner(progress=False, tune=False)
        )

    if isinstance(wanted, type):
        with pytest.raises(wanted):
            scores()
        assert torch.equal(x, before)
        return
    rows = counted(net)
    s = scores()
    assert dict(s.sizes) == {"example": 2, **wanted}
    assert np.isfinite(s).all()
    assert np.abs(s).max() > 0
    if method.positive:
        assert s.min() >= 0

    cost = s.attrs
    assert cost["forward_passes"] - cost["reused_passes"] == sum(rows)
    assert cost["forward_passes"] <= 2 * (BUDGET + 3)  # a few more: x itself, and what completeness is measured with
    assert (cost["backward_passes"] > 0) == method.differentiates
    assert (cost["forward_passes"] == 0) == (key in ("random", "edge") and site is None)
    assert ("completeness_gap" in s.coords) == method.complete

    np.testing.assert_array_equal(scores(), s)  # the same seed
    alone = scores(x[:1])  # examples have nothing to do with each other
    np.testing.assert_allclose(alone[0], s[0], rtol=1e-3, atol=1e-5 * float(np.abs(s[0]).max()))
    assert torch.equal(x, before)
    assert net.fingerprint() == fingerprint


@pytest.mark.parametrize("key", METHODS)
def test_no_method_holds_all_its_rows_at_once(key):
    net, x, _ = kind("image in patches" if key in ATTENTION else "image")
    cls = METHODS[key]
    sizes: list[int] = []

    class Watched(cls):
        def explain(self, q):
            asking, answer = super().explain(q), None
            while True:
                try:
                    asked = asking.send(answer)
                except StopIteration as stop:
                    return stop.value
                sizes.append(sum(p.n for p in asked) if isinstance(asked, list) else asked.n)
                answer = yield asked

    s = Watched().at_budget(100).attribute(net, x[:1], 0, runner=Runner(progress=False, tune=False))
    assert sum(sizes) == s.attrs["forward_passes"]
    assert max(sizes, default=0) <= CHUNK


def concrete(cls: type[Method]) -> set[type[Method]]:
    found = set() if inspect.isabstract(cls) else {cls}
    return found.union(*(concrete(c) for c in cls.__subclasses__()))


def test_every_method_has_its_key():
    for module in pkgutil.iter_modules(nissl.attribution.__path__):
        importlib.import_module(f"nissl.attribution.{module.name}")
    own = {c for c in concrete(Method) if c.__module__.startswith("nissl.attribution.")}
    # what needs something found before, such as causal maps a graph for each class, has no key to be made by
    own = {c for c in own if all(p.default is not p.empty for p in inspect.signature(c).parameters.values())}
    assert set(METHODS.values()) == own
    assert all(key == cls.name for key, cls in METHODS.items())
    assert len({cls.title for cls in METHODS.values()}) == len(METHODS)
