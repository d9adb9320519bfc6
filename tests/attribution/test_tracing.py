import json

import numpy as np
import pytest
import torch
from torch import nn

from language_families import tiny
from nissl.attribution.patching import (
    ActivationPatching,
    AttributionPatching,
    NodeIntegratedGradients,
    Nodes,
    RelevancePatching,
    agreement,
)
from nissl.attribution.tracing import CANDIDATES, choose_approximation, plot_nodes, trace
from nissl.errors import InputError, RuleError
from nissl.network import Network, Pass, RelP, target
from nissl.runner import Runner

CLEAN, CORRUPTED = "w1 w2 w3 w4 w5 w6", "w1 w2 w9 w4 w8 w6"
quiet = Runner(progress=False, memory=0)


class Normed(nn.Module):
    """Two streams, one behind a norm where only RelP is right, one linear."""

    def __init__(self):
        super().__init__()
        self.bent, self.straight, self.w = nn.Identity(), nn.Identity(), nn.Parameter(torch.zeros(16))

    def forward(self, x):
        bent = self.bent(x[..., :16])
        normed = (bent * torch.rsqrt(bent.square().mean(-1, keepdim=True)))[..., 0]
        return (normed + self.straight(x[..., 16:])[..., 0]).sum(1, keepdim=True)


def test_the_approximation_that_agrees_best_is_chosen_for_each_kind():
    net = Network(Normed(), dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.zeros(6, 8, 32, dtype=torch.float64) for _ in range(2))
    # clean activations lie along the axis that is read, with sizes that say nothing; corrupted ones across it
    clean[..., 0] = 1.0
    corrupted[..., 1] = torch.rand(6, 8, generator=g) + 0.05
    clean[..., 0] *= torch.where(torch.rand(6, 8, generator=g) < 0.5, -1, 1)
    clean[..., 16] = torch.randn(6, 8, generator=g)
    kinds = [Nodes("bent", ("bent",)), Nodes("straight", ("straight",))]
    candidates = {"atp": AttributionPatching(), "reversed": _Reversed()}
    choice = choose_approximation(
        net, clean, corrupted, target.class_logit(0), kinds=kinds, candidates=candidates, sample=8, runner=quiet
    )
    assert choice.best == {"bent": "atp", "straight": "atp"}
    table = choice.table.set_index(["kind", "method"])
    assert table.loc[("straight", "atp"), "r"] == pytest.approx(1)
    assert table.loc[("straight", "reversed"), "r"] == pytest.approx(-1)
    assert np.array_equal(choice.estimate["bent"], choice.scores["atp"]["bent"])
    assert np.isfinite(choice.truth["bent"].values).sum() == 48


class _Reversed(AttributionPatching):
    def effects(self, q):
        found = yield from super().effects(q)
        return type(found)({k: -v for k, v in found.values.items()}, found.base, found.source)


def test_the_choice_is_that_of_the_table_and_the_sample_is_the_truth():
    net = tiny("llama")
    of = target.logit_difference(7, 9, position=-1)
    choice = choose_approximation(net, CLEAN, CORRUPTED, of, kinds=("mlp_out", "heads"), sample=9, runner=quiet)
    assert set(choice.table["method"]) == set(CANDIDATES)
    for kind, rows in choice.table.groupby("kind"):
        assert choice.best[kind] == rows.loc[rows["r_changed"].idxmax(), "method"]
    full = ActivationPatching().attribute(net, CLEAN, CORRUPTED, of, kinds=("mlp_out", "heads"), runner=quiet)
    for kind in ("mlp_out", "heads"):
        seen = np.isfinite(choice.truth[kind].values)
        assert seen.sum() == 9
        assert np.allclose(choice.truth[kind].values[seen], full[kind].values[seen], atol=1e-10)
        again = agreement(choice.scores["relp"], choice.truth)
        row = choice.table[(choice.table["method"] == "relp") & (choice.table["kind"] == kind)].iloc[0]
        assert row["r"] == again.set_index("kind").loc[kind, "r"]


class Refusing(nn.Module):
    """A cumulative product, for which no relevance rule is known."""

    def __init__(self):
        super().__init__()
        self.stream = nn.Identity()

    def forward(self, x):
        return torch.cumprod(self.stream(x).sum(-1), 1)[:, -1:]


def test_rules_that_a_network_does_not_allow_are_left_out_and_named():
    net = Network(Refusing(), dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    clean, corrupted = torch.rand(2, 1, 6, 3, generator=g, dtype=torch.float64)
    kinds = [Nodes("stream", ("stream",))]
    methods = {"atp": AttributionPatching(), "relp": RelevancePatching(), "ig": NodeIntegratedGradients(steps=4)}
    choice = choose_approximation(
        net, clean, corrupted, target.class_logit(0), kinds=kinds, candidates=methods, sample=6, runner=quiet
    )
    assert list(choice.refused) == ["relp"]
    assert "cumprod" in choice.refused["relp"]
    assert set(choice.scores) == {"atp", "ig"}
    with pytest.raises(RuleError):
        choose_approximation(
            net, clean, corrupted, target.class_logit(0), kinds=kinds, candidates={"relp": RelevancePatching(rules=RelP())},
            sample=6, runner=quiet,
        )  # fmt: skip


@pytest.mark.parametrize("corrupted", [CORRUPTED, None])
def test_a_trace_is_verified_by_real_patches(corrupted, tmp_path):
    net = tiny("llama")
    found = trace(net, CLEAN, corrupted, "w10", "w20", top=3, sample=8, runner=Runner(progress=False))
    assert (found.answer, found.wrong) == ("w10", "w20")
    assert found.tokens == CLEAN.split()
    of = target.logit_difference(net.token("w10"), net.token("w20"), position=-1)
    assert found.clean == pytest.approx(net.run(Pass(net.encode(CLEAN), of=of)).scalar.item())
    full = ActivationPatching().attribute(
        net, CLEAN, corrupted, of, kinds=("resid_pre", "attn_out", "mlp_out", "heads"), runner=quiet
    )
    assert found.top.groupby("kind").size().to_dict() == dict.fromkeys(found.scores.data_vars, 3)
    for row in found.top.itertuples():
        place = {
            "layer": row.layer,
            "position": row.position,
            **({"head": int(row.head)} if row.kind == "heads" else {}),
        }
        assert row.effect == pytest.approx(full[row.kind].isel(example=0, layer=row.layer).sel(
            {k: v for k, v in place.items() if k == "position"}).values.reshape(-1)[place.get("head", 0)], abs=1e-10)  # fmt: skip
        assert row.token == found.tokens[row.position]
        gap = found.clean - found.corrupted if corrupted else found.clean
        assert row.share == pytest.approx(row.effect / gap)
    for kind, rows in found.top.groupby("kind"):
        sizes = np.sort(np.abs(found.scores[kind].values), axis=None)[::-1]
        assert np.allclose(rows["estimate"].abs(), sizes[:3])
    assert found.forward > found.backward > 0
    assert np.isnan(found.corrupted) == (corrupted is None)
    json.dumps(found.to_dict(), allow_nan=False)
    found.plot(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 1000


def test_answers_are_what_the_model_says_where_none_are_given():
    net = tiny("llama")
    found = trace(net, CLEAN, CORRUPTED, kinds=("mlp_out",), sample=4, runner=quiet)
    first, second = (net.run(Pass(net.encode(p))).output[0, -1].argmax().item() for p in (CLEAN, CORRUPTED))
    assert found.answer == net.strings([first])[0]
    if first != second:
        assert found.wrong == net.strings([second])[0]
    ranked = net.run(Pass(net.encode(CLEAN))).output[0, -1].topk(2).indices.tolist()
    alone = trace(net, CLEAN, kinds=("mlp_out",), sample=4, runner=quiet)
    assert [alone.answer, alone.wrong] == net.strings(ranked)


def test_what_cannot_be_traced_is_refused():
    net = tiny("llama")
    with pytest.raises(InputError, match="6 tokens, the corrupted one 2"):
        trace(net, CLEAN, "w1 w2", runner=quiet)
    with pytest.raises(InputError, match="are the same"):
        trace(net, CLEAN, CLEAN, "w1", "w2", runner=quiet)
    with pytest.raises(InputError, match="answers are the same"):
        trace(net, CLEAN, CORRUPTED, "w1", "w1", runner=quiet)
    with pytest.raises(InputError, match="single one is needed"):
        trace(net, CLEAN, CORRUPTED, "w1 w2", "w1", runner=quiet)
    with pytest.raises(InputError, match="is empty"):
        trace(net, "", runner=quiet)
    with pytest.raises(InputError, match="top must be"):
        trace(net, CLEAN, CORRUPTED, top=0, runner=quiet)


def test_pictures_show_kinds_and_tokens(tmp_path):
    net = tiny("gpt2")
    of = target.logit_difference([7, 3], [9, 4], position=-1).rows(2)
    scores = AttributionPatching().attribute(
        net, [CLEAN, "w1 w2 $x"], [CORRUPTED, "w4 w2 $x"], of, kinds=("resid_pre", "heads"), runner=quiet
    )
    figure = plot_nodes(scores, example=1, tokens=["w1", "w2", "$x"], path=tmp_path / "p.svg")
    axes = [a for a in figure.axes if a.get_title()]
    assert [a.get_title() for a in axes] == ["resid_pre", "heads, summed over positions"]
    assert len(axes[0].get_xticklabels()) == 3  # positions that this prompt does not have are left out
    image = axes[0].get_images()[0].get_array()
    assert np.allclose(image, scores["resid_pre"].values[1, :, 3:])
    assert (tmp_path / "p.svg").read_text(encoding="utf-8").startswith("<?xml")
    with pytest.raises(InputError, match="nothing to draw"):
        plot_nodes(scores[[]])


@pytest.mark.slow
def test_smollm2_finds_the_name_that_was_given(smollm2):
    clean = "When John and Mary went to the store, John gave a drink to"
    corrupted = "When John and Mary went to the store, Mary gave a drink to"
    found = trace(smollm2, clean, corrupted, " Mary", " John", kinds=("resid_pre", "heads"), sample=16)
    assert found.clean > 0 > found.corrupted
    # the information enters at the changed name and leaves at the last position
    truth = found.top[found.top["kind"] == "resid_pre"]
    assert (truth["share"] > 0.7).all()
    assert found.choice.table.query("kind == 'resid_pre'")["r"].max() > 0.7
