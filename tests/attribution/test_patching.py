import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from language_families import tiny
from nissl.attribution.patching import (
    ActivationPatching,
    AttributionPatching,
    NodeIntegratedGradients,
    Nodes,
    RelevancePatching,
    agreement,
    agreement_gain,
    nodes_of,
    patch,
)
from nissl.errors import InputError, SiteError
from nissl.network import Network, Pass, RelP, Set, target
from nissl.runner import Runner

CLEAN, CORRUPTED = "w1 w2 w3 w4 w5 w6", "w1 w2 w9 w4 w8 w6"
ALL = ("resid_pre", "attn_out", "mlp_out", "heads", "neurons")
DIFFERENCE = target.logit_difference(7, 9, position=-1)
quiet = Runner(progress=False, memory=0)

# By hand: module of the layer, and whether its input or its output is the site.
PLACES = {
    "llama": {
        "resid_pre": ("model.layers.{}", "in"),
        "attn_out": ("model.layers.{}.self_attn", "out"),
        "mlp_out": ("model.layers.{}.mlp", "out"),
        "heads": ("model.layers.{}.self_attn.o_proj", "in"),
        "neurons": ("model.layers.{}.mlp.down_proj", "in"),
    },
    "gpt2": {
        "resid_pre": ("transformer.h.{}", "in"),
        "attn_out": ("transformer.h.{}.attn", "out"),
        "mlp_out": ("transformer.h.{}.mlp", "out"),
        "heads": ("transformer.h.{}.attn.c_proj", "in"),
        "neurons": ("transformer.h.{}.mlp.c_proj", "in"),
    },
}


def by_hand(net, prompt, places, change=None, gradient=False):
    """Logit difference, activations and gradients with plain torch hooks; `change(kind, layer, t)` edits."""
    held, handles = {}, []

    def keep(kind, layer, t):
        t = t if change is None else change(kind, layer, t)
        if gradient:
            t = t if t.requires_grad else t.detach().requires_grad_()
            t.retain_grad()
        held[kind, layer] = t
        return t

    for kind, (name, part) in places.items():
        for layer in range(net.anatomy.n_layers):
            module = net.module.get_submodule(name.format(layer))

            def before(m, args, kwargs, kind=kind, layer=layer):
                if args:
                    return (keep(kind, layer, args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": keep(kind, layer, kwargs["hidden_states"])}

            def after(m, args, out, kind=kind, layer=layer):
                if isinstance(out, tuple):
                    return (keep(kind, layer, out[0]), *out[1:])
                return keep(kind, layer, out)

            if part == "in":
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(after))
    try:
        with torch.enable_grad() if gradient else torch.no_grad():
            ids = torch.tensor([net.tokenizer(prompt)["input_ids"]])
            logits = net.module(input_ids=ids).logits[0, -1]
            value = logits[7] - logits[9]
            if gradient:
                value.backward()
    finally:
        for h in handles:
            h.remove()
    net.module.zero_grad()
    grads = {k: t.grad for k, t in held.items()} if gradient else {}
    return value.item(), {k: t.detach() for k, t in held.items()}, grads


def parts_of(net, kind, units):
    return {"heads": net.anatomy.n_heads, "neurons": units}.get(kind, 1)


@pytest.mark.parametrize("family", PLACES)
def test_patching_equals_hooks_by_hand(family):
    net, places = tiny(family), PLACES[family]
    only = {"neurons": np.random.default_rng(0).random((3, 6, 48)) < 0.03}
    only |= {k: np.ones((3, 6, 4) if k == "heads" else (3, 6), bool) for k in ALL[:-1]}
    scores = ActivationPatching(only=only).attribute(net, CLEAN, CORRUPTED, DIFFERENCE, kinds=ALL, runner=quiet)
    _, clean, _ = by_hand(net, CLEAN, places)
    base, _, _ = by_hand(net, CORRUPTED, places)
    for kind in ALL:
        for where in zip(*np.nonzero(only[kind]), strict=True):

            def change(k, layer, t, where=where, kind=kind):
                if (k, layer) != (kind, where[0]):
                    return t
                n = parts_of(net, kind, t.shape[-1])
                new, other = t.clone().reshape(1, 6, n, -1), clean[k, layer].reshape(1, 6, n, -1)
                part = where[2] if len(where) > 2 else 0
                new[0, where[1], part] = other[0, where[1], part]
                return new.reshape(t.shape)

            value, _, _ = by_hand(net, CORRUPTED, places, change)
            assert scores[kind].values[0][where] == pytest.approx(value - base, abs=1e-10)
    assert np.isnan(scores["neurons"].values[0][~only["neurons"]]).all()
    assert scores["corrupted"].item() == pytest.approx(base)
    assert scores.attrs["forward_passes"] <= 2 + sum(m.sum() for m in only.values())


@pytest.mark.parametrize("family", PLACES)
def test_attribution_patching_equals_autograd_by_hand(family):
    net, places = tiny(family), PLACES[family]
    _, clean, _ = by_hand(net, CLEAN, places)
    m, corrupted, grads = by_hand(net, CORRUPTED, places, gradient=True)
    scores = AttributionPatching().attribute(net, CLEAN, CORRUPTED, DIFFERENCE, kinds=ALL, runner=quiet)
    for kind in ALL:
        expected = []
        for layer in range(3):
            product = grads[kind, layer] * (clean[kind, layer] - corrupted[kind, layer])
            expected.append(product.reshape(6, parts_of(net, kind, product.shape[-1]), -1).sum(-1))
        found = scores[kind].values[0]
        assert np.allclose(found, torch.stack(expected).numpy().reshape(found.shape), atol=1e-12, rtol=1e-10)
    assert scores["corrupted"].item() == pytest.approx(m)
    assert (scores.attrs["forward_passes"], scores.attrs["backward_passes"]) == (2, 1)


def test_directions_are_each_others_mirror():
    net = tiny("llama")
    there = ActivationPatching("noising").attribute(net, CLEAN, CORRUPTED, DIFFERENCE, runner=quiet)
    back = ActivationPatching().attribute(net, CORRUPTED, CLEAN, DIFFERENCE, runner=quiet)
    xr.testing.assert_allclose(there["mlp_out"].drop_vars(["clean", "corrupted"]),
                               back["mlp_out"].drop_vars(["clean", "corrupted"]))  # fmt: skip
    assert there["clean"].item() == back["corrupted"].item()
    assert there.attrs["direction"] == "noising"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "opt"])
def test_skipping_earlier_layers_changes_nothing(family):
    net = tiny(family)
    kinds = nodes_of(net, ("resid_pre", "attn_out", "mlp_out", "heads"))
    slow = [Nodes(n.kind, n.sites, n.parts, n.dim) for n in kinds]
    fast, full = (
        ActivationPatching().attribute(net, CLEAN, CORRUPTED, DIFFERENCE, kinds=k, runner=quiet) for k in (kinds, slow)
    )
    tolerance = 1e-5 if family == "gemma2" else 1e-10  # Gemma 2 runs in float32
    for k in fast.data_vars:
        assert np.allclose(fast[k], full[k], atol=tolerance * float(np.abs(full[k]).max()), rtol=0)
        assert float(np.abs(full[k]).max()) > 0


def test_the_whole_residual_stream_carries_the_whole_difference():
    net = tiny("llama")
    scores = ActivationPatching().attribute(net, "w1 w2 w3", "w1 w2 w5", DIFFERENCE, runner=quiet)
    gap = (scores["clean"] - scores["corrupted"]).item()
    # only the last token differs, so all of the difference passes through the last position, at every layer
    assert np.allclose(scores["resid_pre"][0, :, -1], gap, atol=1e-10)
    assert (scores["resid_pre"][0, :, :-1] == 0).all()
    assert scores["first_difference"].item() == -1


def test_nodes_that_do_not_differ_are_not_run():
    net = tiny("llama")
    scores = ActivationPatching().attribute(net, CLEAN, CORRUPTED, DIFFERENCE, runner=quiet)
    assert scores["first_difference"].item() == -4
    for kind in ("resid_pre", "attn_out", "mlp_out"):
        assert (scores[kind][0, :, :2] == 0).all()
    # resid_pre of layer 0 differs at the two changed tokens only
    assert scores.attrs["forward_passes"] == 2 + (2 + 2 * 4) + 2 * 3 * 4


def test_pairs_of_several_lengths():
    net = tiny("gpt2")
    clean, corrupted = [CLEAN, "w1 w2 w3"], [CORRUPTED, "w4 w2 w3"]
    of = target.logit_difference([7, 3], [9, 4], position=-1).rows(2)
    for method in (ActivationPatching(), RelevancePatching(), NodeIntegratedGradients(steps=3, path="input")):
        both = method.attribute(net, clean, corrupted, of, kinds=("resid_pre", "heads"), runner=quiet)
        assert both["resid_pre"].dims == ("example", "layer", "position")
        assert both["heads"].dims == ("example", "layer", "position", "head")
        assert both["position"].values.tolist() == [-6, -5, -4, -3, -2, -1]
        short = method.attribute(
            net, clean[1], corrupted[1], of[slice(1, 2)], kinds=("resid_pre", "heads"), runner=quiet
        )
        for kind in both.data_vars:
            assert np.isnan(both[kind].values[1, :, :3]).all()
            assert np.allclose(both[kind].values[1, :, 3:], short[kind].values[0], atol=1e-12)
        assert both["first_difference"].values.tolist() == [-4, -3]


# ---------------------------------------------------------------- known answers


class Readout(nn.Module):
    """w · x √d / |x| at the last position."""

    def __init__(self, w):
        super().__init__()
        self.stream, self.w = nn.Identity(), nn.Parameter(w)

    def forward(self, x):
        x = self.stream(x)[:, -1]
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True)) @ self.w)[:, None]


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.0, 0.5), (0.2, 2.0)])
def test_relevance_sees_through_a_norm(a, b):
    d = 16
    e = torch.eye(d, dtype=torch.float64)
    net = Network(Readout(e[0] - e[1]), dtype=torch.float64)
    clean, corrupted = a * e[0][None, None], b * e[1][None, None]
    methods = {"truth": ActivationPatching(), "atp": AttributionPatching(), "relp": RelevancePatching()}
    kinds = [Nodes("stream", ("stream",))]
    found = patch(methods, net, clean, corrupted, target.class_logit(0), kinds=kinds, runner=quiet)
    values = {k: v["stream"].item() for k, v in found.items()}
    root = d**0.5
    assert values["truth"] == pytest.approx(2 * root, abs=1e-9)
    assert values["atp"] == pytest.approx(root * a / b, abs=1e-9)
    assert values["relp"] == pytest.approx(root * (1 + a / b), abs=1e-9)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Identity(), nn.Identity()

    def forward(self, x):
        return (nn.functional.silu(self.gate(x[..., 0])) * self.up(x[..., 1])).sum(1)


def test_relevance_of_a_gate_is_shared_between_its_factors():
    net = Network(Gate(), dtype=torch.float64)
    x = torch.tensor([[[[2.0, 3.0]]]], dtype=torch.float64)
    kinds = [Nodes("gate", ("gate",)), Nodes("up", ("up",))]
    scores = RelevancePatching("noising").attribute(
        net, x, None, target.class_logit(0), kinds=kinds, ablate="zero", runner=quiet
    )  # fmt: skip
    f = 2 * 3 / (1 + np.exp(-2.0))
    # ablation to zero: score = - coefficient * value; the coefficients are 1.3212 and 0.8808
    assert -scores["gate"].item() / 2 == pytest.approx(1.5 / (1 + np.exp(-2.0)), abs=1e-9)
    assert -scores["up"].item() / 3 == pytest.approx(1 / (1 + np.exp(-2.0)), abs=1e-9)
    assert -(scores["gate"] + scores["up"]).item() == pytest.approx(f, abs=1e-9)


def test_relevance_is_conserved_with_all_rules_and_with_none_fewer():
    net = tiny("llama")
    embed = [Nodes("embed", (net.anatomy.site("embed"),))]
    prompts = [CLEAN, "w11 w2 w30 w4", "w5 w6 w7 w8 w12"]

    def gap(rules):
        scores = AttributionPatching(rules=rules).attribute(
            net, prompts, None, DIFFERENCE, kinds=embed, ablate="zero", runner=quiet
        )
        total = -scores["embed"].sum(["layer", "position"]).values
        return np.abs(total - scores["clean"].values) / np.abs(scores["clean"].values)

    assert gap(RelP()).max() <= 1e-5  # transformers computes norms in float32, whatever the model's type
    for fewer in ("norm", "identity", "half", "attention"):
        assert gap(RelP(**{fewer: False})).max() >= 0.1
    assert gap(None).max() >= 0.1


def test_the_attention_rule_is_off_as_in_the_authors_code():
    assert RelevancePatching().rules == RelP(attention=False)
    net = tiny("llama")
    with_it = RelevancePatching(rules=RelP()).attribute(net, CLEAN, CORRUPTED, DIFFERENCE, runner=quiet)
    without = RelevancePatching().attribute(net, CLEAN, CORRUPTED, DIFFERENCE, runner=quiet)
    assert not np.allclose(with_it["resid_pre"], without["resid_pre"])
    assert with_it["clean"].item() == without["clean"].item()  # forward values are the same


def test_integrated_gradients_are_exact_for_one_position():
    net = tiny("gpt2")
    kinds = ("resid_pre", "attn_out", "mlp_out")
    truth = ActivationPatching().attribute(net, "w3", "w5", DIFFERENCE, kinds=kinds, runner=quiet)
    found = NodeIntegratedGradients(steps=400).attribute(net, "w3", "w5", DIFFERENCE, kinds=kinds, runner=quiet)
    for k in kinds:
        assert np.allclose(found[k], truth[k], atol=2e-3 * float(np.abs(truth[k]).max()))
    assert found.attrs["backward_passes"] == 400 * 9


def test_integrated_gradients_from_the_input_are_complete_there():
    net = tiny("llama")
    scores = NodeIntegratedGradients(steps=400, path="input").attribute(
        net, CLEAN, CORRUPTED, DIFFERENCE, kinds=("resid_pre",), runner=quiet
    )
    total = scores["resid_pre"][0, 0].sum().item()  # before the first layer this is the embedding
    assert total == pytest.approx((scores["clean"] - scores["corrupted"]).item(), rel=2e-3)
    assert scores.attrs["backward_passes"] == 400


def test_ablation_without_a_corrupted_prompt():
    net = tiny("llama")
    site = net.anatomy.site("mlp_out", 1)
    for how in ("mean", "zero"):
        scores = ActivationPatching().attribute(net, CLEAN, None, DIFFERENCE, ablate=how, runner=quiet)
        inputs = net.encode(CLEAN)
        before = net.run(Pass(inputs, read=[site], of=DIFFERENCE))
        value = before.reads[site].clone()
        value[:, 3] = value[:, 1:].mean(1) if how == "mean" else 0
        after = net.run(Pass(inputs, [Set(site, value)], of=DIFFERENCE))
        assert scores["mlp_out"].values[0, 1, 3] == pytest.approx((after.scalar - before.scalar).item(), abs=1e-10)
        assert np.isnan(scores["corrupted"].item())
        assert scores["clean"].item() == pytest.approx(before.scalar.item())


def test_a_sample_of_the_truth():
    net = tiny("llama")
    full = ActivationPatching().attribute(net, CLEAN, CORRUPTED, DIFFERENCE, kinds=("heads",), runner=quiet)["heads"]
    some, same, other = (
        ActivationPatching(sample=10).attribute(
            net, CLEAN, CORRUPTED, DIFFERENCE, kinds=("heads",), seed=s, runner=quiet
        )["heads"].values
        for s in (0, 0, 1)
    )  # fmt: skip
    assert np.isfinite(some).sum() == 10
    assert np.array_equal(some, same, equal_nan=True)
    assert not np.array_equal(np.isfinite(some), np.isfinite(other))
    assert np.allclose(some[np.isfinite(some)], full.values[np.isfinite(some)], atol=1e-12)
    assert np.isnan(some[0, :, :2]).all()  # nothing to patch there


# ---------------------------------------------------------------- agreement


def dataset(values, first=-3):
    values = np.asarray(values, float)
    n, _, t = values.shape
    coords = {"example": np.arange(n), "position": np.arange(-t, 0), "first_difference": ("example", np.full(n, first))}
    return xr.Dataset({"mlp_out": (("example", "layer", "position"), values)}, coords)


def test_agreement_is_pearson_with_and_without_the_beginning():
    g = np.random.default_rng(0)
    x = g.normal(size=(12, 4, 5))
    y = x + g.normal(size=x.shape)
    x[:, :, :2], y[:, :, :2] = 0, 0
    y[0, 0, 4] = np.nan
    row = agreement(dataset(x), dataset(y)).iloc[0]
    kept = np.isfinite(y)
    assert row["r"] == pytest.approx(np.corrcoef(x[kept], y[kept])[0, 1])
    late = kept & (np.arange(5) >= 2)
    assert row["r_changed"] == pytest.approx(np.corrcoef(x[late], y[late])[0, 1])
    assert (row["n"], row["n_changed"]) == (kept.sum(), late.sum()) == (239, 143)
    assert row["low"] < row["r"] < row["high"]
    by_example = [np.corrcoef(x[i][late[i]], y[i][late[i]])[0, 1] for i in range(12)]
    assert row["high_changed"] - row["low_changed"] < np.ptp(by_example)


def test_agreement_of_one_example_and_of_nothing():
    g = np.random.default_rng(1)
    x = g.normal(size=(1, 6, 7))
    row = agreement(dataset(x), dataset(-2 * x)).iloc[0]
    assert row[["r", "low", "high"]].tolist() == pytest.approx([-1, -1, -1])
    flat = agreement(dataset(np.zeros((2, 3, 4))), dataset(g.normal(size=(2, 3, 4)))).iloc[0]
    assert np.isnan(flat["r"])
    with pytest.raises(InputError, match="other pairs"):
        agreement(dataset(x), dataset(x[:, :3]))
    with pytest.raises(InputError, match="no kind"):
        agreement(dataset(x), dataset(x).rename(mlp_out="attn_out"))


# ---------------------------------------------------------------- bad input


def test_what_cannot_be_patched_is_refused():
    net = tiny("llama")
    method = AttributionPatching()
    with pytest.raises(InputError, match="3 tokens, the corrupted one 2"):
        method.attribute(net, "w1 w2 w3", "w1 w2", DIFFERENCE, runner=quiet)
    with pytest.raises(InputError, match="the same"):
        method.attribute(net, "w1 w2", "w1 w2", DIFFERENCE, runner=quiet)
    with pytest.raises(InputError, match="go in pairs"):
        method.attribute(net, ["w1 w2", "w1 w3"], ["w1 w2"], DIFFERENCE, runner=quiet)
    with pytest.raises(InputError, match="empty"):
        method.attribute(net, "", "w1", DIFFERENCE, runner=quiet)
    with pytest.raises(InputError, match="target="):
        method.attribute(net, "w1 w2", "w1 w3", runner=quiet)
    padded = net.encode(["w1 w2 w3", "w1"])
    with pytest.raises(InputError, match="padded"):
        method.attribute(net, padded, padded, DIFFERENCE, runner=quiet)
    with pytest.raises(InputError, match="choose some"):
        ActivationPatching().attribute(net, "w1 w2", "w1 w3", DIFFERENCE, kinds=["neurons"], runner=quiet)
    only = {"mlp_out": np.ones((2, 2), bool)}
    with pytest.raises(InputError, match=r"only\['mlp_out'\]"):
        ActivationPatching(only=only).attribute(net, "w1 w2", "w1 w3", DIFFERENCE, kinds=["mlp_out"], runner=quiet)
    with pytest.raises(SiteError, match="roles are"):
        nodes_of(net, ("brain",))
    with pytest.raises(InputError, match="each once"):
        nodes_of(net, ("heads", "heads"))
    with pytest.raises(InputError, match="no anatomy"):
        nodes_of(Network(nn.Linear(2, 2)), ("mlp_out",))
    for wrong in (dict(direction="sideways"), dict(sample=0)):
        with pytest.raises(InputError):
            ActivationPatching(**wrong)
    for wrong in (dict(steps=0), dict(path="curve")):
        with pytest.raises(InputError):
            NodeIntegratedGradients(**wrong)
    with pytest.raises(InputError, match="dim"):
        Nodes("x", ("a",), parts=2)


def test_gain_is_the_difference_of_correlations_on_the_same_resamples():
    g = np.random.default_rng(2)
    truth = g.normal(size=(10, 3, 4))
    good, bad = truth + 0.1 * g.normal(size=truth.shape), truth + 2 * g.normal(size=truth.shape)
    row = agreement_gain(dataset(good), dataset(bad), dataset(truth)).iloc[0]
    r = [agreement(dataset(x), dataset(truth)).iloc[0]["r_changed"] for x in (good, bad)]
    assert row["gain"] == pytest.approx(r[0] - r[1])
    assert 0 < row["low"] < row["gain"] < row["high"]
    same = agreement_gain(dataset(good), dataset(good), dataset(truth)).iloc[0]
    assert (same["gain"], same["low"], same["high"]) == (0, 0, 0)
