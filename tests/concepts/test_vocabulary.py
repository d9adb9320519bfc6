"""Neurons decoded to tokens: planted neurons are found, streams equal whole products, clamps do what algebra says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from language_families import tiny
from nissl.concepts.vocabulary import (
    NeuronVocabulary,
    WeightFolder,
    clamp,
    clamp_curve,
    concept_tokens,
    frequent_tokens,
    preserved,
)
from nissl.errors import InputError, SiteError
from nissl.network import Pass, target
from nissl.studies import lm_head_neurons as study


@pytest.fixture(scope="module")
def net():
    return tiny("llama", dtype=torch.float32)


@pytest.mark.parametrize("matrix", ["up", "gate", "down"])
def test_the_stream_equals_the_whole_product(net, matrix):
    found = NeuronVocabulary(matrix=matrix, block=7).decode(net, k=5, progress=False)
    assert dict(found.sizes) == {"layer": 3, "unit": 48, "rank": 5}
    head = net.weight("unembed").double()
    for layer in range(3):
        w = net.weight(matrix, layer).double()
        z = (w.T if matrix == "down" else w) @ head.T
        top = z.topk(5, 1)
        assert np.array_equal(found["token"][layer], top.indices)
        assert np.array_equal(found["opposite"][layer], (-z).topk(5, 1).indices)
        np.testing.assert_allclose(found["logit"][layer], top.values, rtol=1e-5, atol=1e-5)
        p = z.softmax(1)
        np.testing.assert_allclose(found["probability"][layer], p.gather(1, top.indices), atol=1e-6)
        np.testing.assert_allclose(found["entropy"][layer], -(p * p.log()).sum(1), rtol=1e-4, atol=1e-5)
        standard = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, unbiased=False)
        np.testing.assert_allclose(found["z"][layer], standard.gather(1, top.indices), rtol=1e-4)
        w = w.T if matrix == "down" else w
        cosine = z / w.norm(dim=1, keepdim=True) / head.norm(dim=1)
        np.testing.assert_allclose(found["cosine"][layer], cosine.gather(1, top.indices), rtol=1e-4)


def test_the_length_of_a_row_does_not_change_its_tokens(net):
    longer = net.rewritten({("up", 1): 3 * net.weight("up", 1)})
    a, b = (NeuronVocabulary().decode(n, [1], progress=False) for n in (net, longer))
    assert np.array_equal(a["token"], b["token"])
    assert not np.allclose(a["probability"], b["probability"])


def test_chosen_layers_and_units(net):
    whole = NeuronVocabulary().decode(net, progress=False)
    part = NeuronVocabulary().decode(net, [2, 0], k=3, units=[5, 1], progress=False)
    assert part["layer"].values.tolist() == [2, 0]
    assert np.array_equal(part["token"], whole["token"].sel(layer=[2, 0], unit=[5, 1])[..., :3])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2"])
def test_folds_are_what_the_norms_do(family):
    """The input fold reads as the network does: up @ norm(x) is the folded row times x over its size."""
    net = tiny(family, dtype=torch.float32)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    norm = net.get_module(net.anatomy.site("mlp_in", 1).removesuffix(":in"))
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        read = (norm(x) - (0 if bias is None else bias)) @ net.weight("up", 1).T
    y = x - x.mean(1, keepdim=True) if bias is not None else x
    folded = NeuronVocabulary(fold="input").vectors(net, 1)
    torch.testing.assert_close(x @ folded.T / y.square().mean(1, keepdim=True).sqrt(), read, rtol=1e-3, atol=1e-3)
    final = net.get_module(net.anatomy.site("final_norm"))
    rows = net.weight("up", 1)
    with torch.no_grad():
        expected = final(rows) - (0 if bias is None else final.bias)
    torch.testing.assert_close(NeuronVocabulary(fold="final").vectors(net, 1), expected, rtol=1e-3, atol=1e-3)


def test_neurons_of_a_word_are_ranked_by_hand(net):
    head, tokens = net.weight("unembed").double(), [7, 20]
    up = torch.stack([net.weight("up", i) for i in range(3)]).double()
    z = up @ head.T
    ways = {
        "cosine": (z / up.norm(dim=-1, keepdim=True) / head.norm(dim=1))[..., tokens].abs().amax(-1),
        "z": ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, unbiased=False))[..., tokens].abs().amax(-1),
        "probability": z.softmax(-1)[..., tokens].sum(-1),
        "logit": z[..., tokens].amax(-1),
    }
    for by, scores in ways.items():
        found = NeuronVocabulary(block=11).search(net, tokens, by=by, n=6, progress=False)
        order = scores.flatten().topk(6)
        assert [(r.layer, r.unit) for r in found.itertuples()] == [divmod(int(i), 48) for i in order.indices]
        np.testing.assert_allclose(found["score"], order.values, rtol=1e-3)
    best = NeuronVocabulary().search(net, tokens, n=1, progress=False).iloc[0]
    written = net.weight("down", int(best.layer))[:, int(best.unit)].double() @ head[int(best.token)]
    np.testing.assert_allclose(best.write_logit, float(written), rtol=1e-4)


def test_a_word_is_all_its_tokens(net):
    assert concept_tokens(net, "W3") == [6]
    assert concept_tokens(net, "w3", synonyms=["w5"]) == [6, 8]
    with pytest.raises(InputError, match="no token of the vocabulary is 'dog'"):
        concept_tokens(net, "dog")


@pytest.mark.parametrize("site", ["up", "act"])
def test_a_clamp_adds_what_algebra_says(site):
    """At the last MLP, without what lies behind it: (c - u) s W_down for the up site, (c - a) W_down for the other."""
    net = tiny("llama")
    a = net.anatomy
    inputs, unit, role = net.encode("w1 w2 w3"), 11, {"up": "up", "act": "neurons"}[site]
    places = [a.site(r, 2) for r in ("up", "act", "neurons", "resid_post")]
    plain = net.run(Pass(inputs, read=places)).reads
    for c in (-3.0, -0.5, 0.0, 0.7, 4.0):
        changed = net.run(Pass(inputs, clamp(net, 2, unit, c, site=site), read=places[3:])).reads[places[3]]
        by = (c - plain[a.site(role, 2)][..., unit]) * (plain[places[1]][..., unit] if site == "up" else 1)
        expected = by[..., None] * net.weight("down", 2)[:, unit]
        torch.testing.assert_close(changed - plain[places[3]], expected, rtol=1e-5, atol=1e-7)


def test_the_clamp_curve_equals_clamps_one_by_one(net):
    prompts, neurons, tokens = ["w1 w2 w3", "w4 w9"], [(0, 3), (2, 7), (2, 8)], [7, 20]
    found = clamp_curve(net, prompts, tokens, neurons, factors=(-2, 5), reference=["w1 w2 w3 w4 w5 w6"])
    assert len(found) == 2 * 3 * 2
    reference = net.run(Pass(net.encode("w1 w2 w3 w4 w5 w6"), read=net.anatomy.sites("up"))).reads
    for row in found.itertuples():
        std = reference[net.anatomy.site("up", row.layer)][0, :, row.unit].std()
        assert row.value == pytest.approx(row.factor * float(std), rel=1e-5)
        of = target.Target(lambda o: o[:, -1].log_softmax(-1)[:, tokens].logsumexp(1))
        inputs = net.encode(prompts[row.prompt])
        by_hand = net.run(Pass(inputs, clamp(net, row.layer, row.unit, row.value), of=of)).scalar
        assert row.log_probability == pytest.approx(float(by_hand), abs=1e-4)
        assert row.gain == pytest.approx(float(by_hand - net.run(Pass(inputs, of=of)).scalar), abs=1e-4)


def test_redrawn_rows_are_not_preserved(net):
    generator = torch.Generator().manual_seed(3)
    changed = {}
    for layer in range(3):
        up = net.weight("up", layer).clone()
        redrawn = torch.randperm(48, generator=generator)[:19]
        up[redrawn] = torch.randn(19, 32, generator=generator)
        changed["up", layer] = up
    found = preserved(net, net.rewritten(changed))
    by_chance = 1 / 50 * 19 / 48
    assert found.attrs["top1"] == pytest.approx(29 / 48 + by_chance, abs=0.03)
    assert preserved(net, net)["top5"].tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="differ in family"):
        preserved(net, tiny("gpt2"))


def test_a_folder_is_read_slice_by_slice(net, tmp_path):
    net.module.save_pretrained(tmp_path, max_shard_size="20kB")
    net.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    folder = WeightFolder(tmp_path)
    for fold in ("none", "input", "final"):
        a, b = (NeuronVocabulary(fold=fold, block=16).decode(n, progress=False) for n in (net, folder))
        assert np.array_equal(a["token"], b["token"])
    one, other = (NeuronVocabulary().search(n, [7], progress=False) for n in (net, folder))
    assert one[["layer", "unit"]].equals(other[["layer", "unit"]])


def test_tied_weights_are_kept_once(tmp_path):
    net = tiny("gemma", dtype=torch.float32)
    net.module.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    a, b = (NeuronVocabulary().decode(n, progress=False)["token"] for n in (net, WeightFolder(tmp_path)))
    assert np.array_equal(a, b)


def test_wrong_folders(net, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        WeightFolder(tmp_path / "empty")
    net.module.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(InputError, match="cannot be read"):
        WeightFolder(tmp_path / "cut")
    net.module.save_pretrained(tmp_path / "whole")
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.int8)
    save_file(weights, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(InputError, match="quantised"):
        NeuronVocabulary().decode(WeightFolder(tmp_path / "whole"), progress=False)


def test_wrong_arguments(net):
    v = NeuronVocabulary()
    for wrong, error, says in (
        (lambda: NeuronVocabulary(block=0), InputError, "block"),
        (lambda: v.decode(net, [3]), InputError, "0 to 2"),
        (lambda: v.decode(net, []), InputError, "0 to 2"),
        (lambda: v.decode(net, k=51), InputError, "50 tokens"),
        (lambda: v.decode(net, units=[48]), InputError, "0 to 47"),
        (lambda: v.search(net, [50]), InputError, "0 to 49"),
        (lambda: v.search(net, []), InputError, "0 to 49"),
        (lambda: v.search(net, "dog"), InputError, "dog"),
        (lambda: v.search(net, [7], n=0), InputError, "n must"),
        (lambda: NeuronVocabulary(matrix="gate").decode(tiny("gpt2")), SiteError, "'gate'"),
        (lambda: clamp(net, 0, 48, 1.0), InputError, "0 to 47"),
        (lambda: clamp(net, 3, 1, 1.0), SiteError, "0 to 2"),
        (lambda: clamp(net, 0, 1, float("nan")), InputError, "finite"),
        (lambda: clamp_curve(net, [], [7], [(0, 1)]), InputError, "at least one"),
    ):
        with pytest.raises(error, match=says):
            wrong()


def test_frequent_tokens(net):
    found = NeuronVocabulary().decode(net, progress=False)
    top = frequent_tokens(found, 3)
    _, counts = np.unique(found["token"].values[..., 0], return_counts=True)
    assert top["neurons"].tolist() == sorted(counts, reverse=True)[:3]


def test_the_quick_study_finds_what_was_planted():
    claims = study.run(quick=True, progress=False)
    assert all(set(c) == {"claim", "paper", "ours", "interval", "baseline", "holds"} for c in claims)
    json.dumps(claims)
    assert all(c["holds"] for c in claims)
