import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

from language_families import tiny
from nissl.attribution.circuits import (
    EdgePatching,
    FeaturePatching,
    Graph,
    edge_circuit,
    feature_circuit,
)
from nissl.attribution.patching import AttributionPatching, Nodes
from nissl.concepts import SAE, SemiNMF
from nissl.errors import InputError
from nissl.network import Add, Pass, RelP, Set, target
from nissl.runner import Runner

CLEAN = ["w1 w2 w3 w4 w5", "w6 w7 w8 w9 w10", "w11 w12 w13 w14 w15"]
CORRUPTED = ["w1 w20 w3 w4 w25", "w6 w21 w8 w9 w26", "w11 w22 w13 w14 w27"]
OF = target.logit_difference([7, 8, 9], [10, 11, 12], position=-1)
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma3_text", "qwen3", "opt"]
quiet = Runner(progress=False, memory=0)


def scalars(net, prompts, edits=()):
    return net.run(Pass(net.encode(prompts), edits, of=OF)).scalar.double()


def test_edges_lead_from_earlier_to_later_components():
    sequential, parallel = Graph.of(tiny("llama")), Graph.of(tiny("gpt_neox"))
    for graph in (sequential, parallel):
        assert list(graph.senders) == ["embed", "attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2", "mlp.2"]
        assert list(graph.receivers) == ["attn.0", "mlp.0", "attn.1", "mlp.1", "attn.2", "mlp.2", "logits"]
        assert graph.exists.sum(1).tolist()[0::2] == [1, 3, 5, 7]
    assert sequential.exists.sum(1).tolist()[1::2] == [2, 4, 6]
    assert parallel.exists.sum(1).tolist()[1::2] == [1, 3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_circuits_of_everything_and_of_nothing(family):
    net = tiny(family)
    scores = EdgePatching(rules=None).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    found = edge_circuit(net, CLEAN, CORRUPTED, OF, scores, sizes=[5], runner=quiet)
    most = int(Graph.of(net).exists.sum())
    assert found["size"].values.tolist() == [0, 5, most]
    clean, corrupted = scalars(net, CLEAN).numpy(), scalars(net, CORRUPTED).numpy()
    # with every edge cut, each component receives, and so puts out, what it does on the corrupted prompts
    assert np.allclose(found["circuit"].sel(size=0), corrupted, atol=1e-5)
    assert np.allclose(found["circuit"].sel(size=most), clean, atol=1e-5)
    assert np.allclose(found["complement"].sel(size=0), clean, atol=1e-5)
    assert np.allclose(found["complement"].sel(size=most), corrupted, atol=1e-5)
    assert found["faithfulness"].values[[0, -1]] == pytest.approx([0, 1])
    assert found["completeness"].values[[0, -1]] == pytest.approx([1, 0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_single_edge_equals_the_change_of_its_receiver(family):
    """Where one edge alone is cut, its sender puts out what it does on the clean prompt."""
    net = tiny(family)
    graph = Graph.of(net)
    everything = net.encode(CLEAN), net.encode(CORRUPTED)
    reads = [net.run(Pass(i, read=list(graph.senders.values()))).reads for i in everything]
    for receiver, sender in [(6, 0), (3, 2), (1, 1)]:
        scores = np.zeros(graph.exists.shape)
        scores[receiver, sender] = 1
        table = xr.DataArray(scores, dims=("receiver", "sender"))
        found = edge_circuit(net, CLEAN, CORRUPTED, OF, table, sizes=[1], runner=quiet)
        site = list(graph.senders.values())[sender]
        edit = Add(list(graph.receivers.values())[receiver], reads[1][site] - reads[0][site])
        assert np.allclose(found["complement"].sel(size=1), scalars(net, CLEAN, [edit]), atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_edge_scores_sum_to_the_score_of_what_the_receiver_takes(family):
    """Gradient times difference is linear, and a receiver's input is the sum of its senders (and of constants)."""
    net = tiny(family)
    graph = Graph.of(net)
    scores = EdgePatching(rules=None).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    kinds = [Nodes(name, (site,)) for name, site in graph.receivers.items()]
    nodes = AttributionPatching().attribute(net, CLEAN, CORRUPTED, OF, kinds=kinds, runner=quiet)
    size = float(np.nanmax(np.abs(scores)))
    for name in graph.receivers:
        total = nodes[name].sum(["layer", "position"]).values
        assert np.allclose(scores.sel(receiver=name).sum("sender"), total, atol=1e-5 * size)
    assert (np.isnan(scores.values).all(0) == ~graph.exists).all()
    assert scores.attrs["forward_passes"] == 2 * scores.attrs["backward_passes"] == 6


def test_single_edges_are_predicted_where_the_change_is_small():
    net = tiny("gpt2")  # its norms keep float64, which small steps need
    graph = Graph.of(net)
    scores = EdgePatching(rules=None, direction="noising").attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    step = 1e-4
    reads = [net.run(Pass(net.encode(p), read=list(graph.senders.values()))).reads for p in (CLEAN, CORRUPTED)]
    for receiver, sender in [("logits", "embed"), ("mlp.1", "attn.0"), ("attn.2", "mlp.0")]:
        site = graph.senders[sender]
        edit = Add(graph.receivers[receiver], step * (reads[1][site] - reads[0][site]))
        slope = ((scalars(net, CLEAN, [edit]) - scalars(net, CLEAN)) / step).numpy()
        found = scores.sel(receiver=receiver, sender=sender).values
        assert np.allclose(found, slope, rtol=5e-3, atol=1e-3 * np.abs(slope).max())


def test_rules_change_the_scores_and_ablations_the_circuit():
    net = tiny("llama")
    with_rules = EdgePatching().attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    plain = EdgePatching(rules=None).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    assert not np.allclose(with_rules.fillna(0), plain.fillna(0))
    curves = [
        edge_circuit(net, CLEAN, CORRUPTED, OF, plain, [8], ablate=how, runner=quiet)
        for how in ("corrupted", "mean", "zero")
    ]
    assert len({round(float(c["faithfulness"].sel(size=8)), 6) for c in curves}) == 3
    assert np.allclose(curves[1]["circuit"].sel(size=28), curves[2]["circuit"].sel(size=28))
    small = Runner(batch_size=2, progress=False, memory=0)  # a batch that splits the pass
    again = edge_circuit(net, CLEAN, CORRUPTED, OF, plain, [8], runner=small)
    assert np.allclose(again["circuit"], curves[0]["circuit"], atol=1e-9)


# ---------------------------------------------------------------- features


class Orthogonal:
    """A dictionary of k orthonormal directions, each with its negative: exact on their span, the rest is error."""

    def __init__(self, d, k, seed=0):
        g = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0][:, :k]
        self.W_enc = torch.cat([q, -q], 1)
        self.W_dec = self.W_enc.T

    def encode(self, x):
        return torch.relu(x @ self.W_enc)

    def decode(self, weights):
        return weights @ self.W_dec


@pytest.mark.parametrize("rules", [None, RelP(attention=False)])
def test_features_and_error_sum_to_the_node(rules):
    net = tiny("llama")
    sites = net.anatomy.sites("mlp_out")
    dictionaries = {sites[0]: Orthogonal(32, 10), sites[2]: Orthogonal(32, 32, seed=1)}
    scores = FeaturePatching(dictionaries, rules).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    nodes = AttributionPatching(rules=rules).attribute(net, CLEAN, CORRUPTED, OF, kinds=["mlp_out"], runner=quiet)
    for site, layer in ((sites[0], 0), (sites[2], 2)):
        assert np.allclose(scores[site].sum("feature"), nodes["mlp_out"][:, layer], atol=1e-10)
        assert scores[site]["feature"].values[-1] == -1
    assert np.allclose(scores[sites[2]].sel(feature=-1), 0, atol=1e-10)  # a complete dictionary leaves no error
    assert np.abs(scores[sites[0]].sel(feature=-1)).max() > 1e-3


def test_a_feature_circuit_by_hand():
    net = tiny("llama")
    site = net.anatomy.site("mlp_out", 1)
    sae = Orthogonal(32, 6)
    scores = FeaturePatching({site: sae}).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    found = feature_circuit(net, CLEAN, CORRUPTED, OF, {site: sae}, scores, [1, 4], runner=quiet)
    assert np.allclose(found["circuit"].sel(size=13), scalars(net, CLEAN), atol=1e-9)
    assert np.allclose(found["complement"].sel(size=0), scalars(net, CLEAN), atol=1e-9)
    x, y = (net.run(Pass(net.encode(p), read=[site])).reads[site] for p in (CLEAN, CORRUPTED))
    both = torch.cat([x, y])
    f = torch.relu(both @ sae.W_enc)
    error = both - f @ sae.W_dec
    strength = scores[site].sum("position").mean("example").values
    kept = np.argsort(-np.abs(strength), kind="stable")[:4]
    inside = torch.zeros(13, dtype=torch.bool)
    inside[torch.as_tensor(kept.copy())] = True
    value = torch.where(inside[:-1], f[:3], f.mean(0)) @ sae.W_dec + (error[:3] if inside[-1] else error.mean(0))
    assert np.allclose(found["circuit"].sel(size=4), scalars(net, CLEAN, [Set(site, value)]), atol=1e-9)
    assert found["faithfulness"].values[[0, -1]] == pytest.approx([0, 1])


def test_features_of_a_factorisation():
    net = tiny("llama")
    site = net.anatomy.site("neurons", 1)
    acts = net.run(Pass(net.encode(CLEAN + CORRUPTED), read=[site])).reads[site].flatten(0, 1).float()
    snmf = SemiNMF(n_components=5, max_iter=30, progress=False).fit(acts)
    scores = FeaturePatching({site: snmf}).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    node = AttributionPatching(rules=RelP(attention=False)).attribute(
        net, CLEAN, CORRUPTED, OF, kinds=[Nodes("n", (site,))], runner=quiet
    )
    assert scores[site].shape == (3, 5, 6)
    assert np.allclose(scores[site].sum("feature"), node["n"][:, 0], atol=1e-3 * float(np.abs(node["n"]).max()))


def test_features_of_an_autoencoder_from_a_file(tmp_path):
    g = torch.Generator().manual_seed(0)
    weights = {"W_enc": torch.randn(32, 40, generator=g), "b_enc": torch.randn(40, generator=g),
               "W_dec": torch.randn(40, 32, generator=g), "b_dec": torch.randn(32, generator=g)}  # fmt: skip
    save_file(weights, tmp_path / "sae.safetensors")
    net = tiny("llama")
    site = net.anatomy.site("mlp_out", 1)
    scores = FeaturePatching({site: SAE.load(tmp_path / "sae.safetensors", 32)}, None).attribute(
        net, CLEAN, CORRUPTED, OF, runner=quiet
    )
    node = AttributionPatching().attribute(net, CLEAN, CORRUPTED, OF, kinds=["mlp_out"], runner=quiet)["mlp_out"][:, 1]
    assert scores[site].sizes["feature"] == 41
    # the autoencoder works in float32
    assert np.allclose(scores[site].sum("feature"), node, atol=1e-4 * float(np.abs(scores[site]).max()))


def test_what_cannot_be_a_circuit_is_refused():
    net = tiny("llama")
    site = net.anatomy.site("mlp_out", 1)
    with pytest.raises(InputError, match=r"does not fit .*activations are \(3, 5, 32\)"):
        FeaturePatching({site: Orthogonal(16, 4)}).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    with pytest.raises(InputError, match="no encode"):
        FeaturePatching({site: torch.nn.Linear(3, 3)})
    with pytest.raises(InputError, match="one at least"):
        FeaturePatching({})
    with pytest.raises(InputError, match="one length"):
        EdgePatching().attribute(net, ["w1 w2", "w1"], ["w3 w2", "w4"], OF[slice(0, 2)], runner=quiet)
    with pytest.raises(InputError, match="corrupted prompts"):
        EdgePatching().attribute(net, CLEAN, None, OF, runner=quiet)
    with pytest.raises(InputError, match="direction"):
        EdgePatching(direction="up")
    scores = EdgePatching(rules=None).attribute(net, CLEAN, CORRUPTED, OF, runner=quiet)
    with pytest.raises(InputError, match="28"):
        edge_circuit(net, CLEAN, CORRUPTED, OF, scores, [29], runner=quiet)
    with pytest.raises(InputError, match="ablate"):
        edge_circuit(net, CLEAN, CORRUPTED, OF, scores, ablate="noise", runner=quiet)
    with pytest.raises(InputError, match="receivers and senders"):
        edge_circuit(net, CLEAN, CORRUPTED, OF, scores[:, :2], runner=quiet)
