"""Editing of facts: the algebra of the update, a network whose chains are planted, gradients, files, refusals."""

import os

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from language_families import FAMILIES, tiny, word_tokenizer
from nissl.errors import InputError, SiteError
from nissl.intervention import (
    ACE,
    MEMIT,
    PMET,
    ROME,
    Chain,
    FineTune,
    Request,
    apply_delta,
    edit,
    editing,
    key_covariances,
    locality,
    multi_hop,
    probabilities,
    read_delta,
    solve,
)
from nissl.network import Add, LanguageModel, Pass, target
from nissl.runner import Runner
from nissl.studies.ace import outcome, planted, planted_edit

RUNNER = Runner(progress=False)
REQUEST = Request("w1 {} w2", "w3 w4", "w9")
FAST = {"contexts": 0, "unrelated": ("w5 w6", "w7", "w8 w9 w10")}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(d, seed=0):
    x = rand(3 * d, d, seed=seed)
    return x.T @ x / (3 * d)


def covariances(net):
    return {i: spd(net.anatomy.d_mlp, seed=i) for i in range(net.anatomy.n_layers)}


def drive(net, generator):
    """Answer a generator's questions by hand."""
    answer = None
    while True:
        try:
            asked = generator.send(answer)
        except StopIteration as stop:
            return stop.value
        many = asked if isinstance(asked, list) else [asked]
        answer = [(q[0].run(q[1]) if isinstance(q, tuple) else net.run(q)) for q in many]
        answer = answer if isinstance(asked, list) else answer[0]


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize("preserve", [0.0, 1.7, 500.0])
def test_one_key(preserve):
    """Δk' = R (k^T C^-1 k') / (lambda + k^T C^-1 k)."""
    C, k, other, R = spd(6), rand(6, 1, seed=1), rand(6, 1, seed=2), rand(4, 1, seed=3)
    change = solve(k, R, C, preserve)
    inverse = torch.linalg.inv(C)
    expected = R @ (k.T @ inverse @ other) / (preserve + k.T @ inverse @ k)
    torch.testing.assert_close(change @ other, expected, rtol=1e-10, atol=1e-12)
    if preserve == 0:
        torch.testing.assert_close(change @ k, R, rtol=1e-10, atol=1e-12)


def test_many_keys_as_published_and_as_least_squares():
    K, R, C, lam = rand(7, 3, seed=1), rand(4, 3, seed=2), spd(7), 2.5
    change = solve(K, R, C, lam)
    torch.testing.assert_close(change, R @ K.T @ torch.linalg.inv(K @ K.T + lam * C), rtol=1e-9, atol=1e-11)
    # keys of ordinary text in the same least-squares problem, asked to map to 0
    root = torch.linalg.cholesky(C) * lam**0.5
    both, wanted = torch.cat([K, root], 1), torch.cat([R, torch.zeros(4, 7, dtype=R.dtype)], 1)
    least = torch.linalg.lstsq(both.T, wanted.T).solution.T
    torch.testing.assert_close(change, least, rtol=1e-9, atol=1e-11)


def test_preserved_keys_move_less():
    C = torch.diag(torch.tensor([100.0, 1.0, 1.0], dtype=torch.float64))
    k, R = torch.ones(3, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    change = solve(k, R, C, 0.1)[0]
    assert abs(change[0]) < 0.02 * abs(change[1])


def test_a_ridge_makes_a_singular_covariance_usable():
    x = rand(2, 5)
    C, k, R = x.T @ x / 2, rand(5, 1, seed=4), rand(3, 1, seed=5)
    with pytest.raises(InputError, match=r"singular.*ridge"):
        solve(k, R, C - 1e-9 * torch.eye(5), 1.0)
    change = solve(k, R, C, 1.0, ridge=1e-3)
    full = C + 1e-3 * C.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(change, R @ k.T @ torch.linalg.inv(k @ k.T + full), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residuals": rand(3, 1)}, "2 keys of size 4|residuals"),
        ({"covariance": spd(3)}, "covariance"),
        ({"preserve": -1.0}, "at least 0"),
        ({"preserve": float("nan")}, "at least 0"),
        ({"keys": torch.full((4, 2), torch.nan, dtype=torch.float64)}, "NaN"),
        ({"keys": torch.ones(4, 2, dtype=torch.float64), "preserve": 0.0}, "linearly dependent"),
    ],
)
def test_bad_systems(change, message):
    good = {"keys": rand(4, 2), "residuals": rand(3, 2, seed=1), "covariance": spd(4), "preserve": 1.0}
    with pytest.raises(Exception, match=message):
        solve(**{**good, **change})


def test_covariance_is_the_mean_outer_product_of_keys():
    net = tiny("llama")
    texts = ["w1 w2 w3 w4 w5", "w6 w7 w8", "", "w9 w10 w11 w12 w13"]
    found = key_covariances(net, [0, -1], texts, tokens=12, length=4, runner=RUNNER)
    assert sorted(found) == [0, 2]
    ids = net.encode(" ".join(texts))["input_ids"][0].tolist()
    rows = [ids[i : i + 4] for i in (0, 4, 8)]
    for layer, C in found.items():
        site = net.anatomy.site("neurons", layer)
        k = net.run(Pass(net.encode(rows), read=[site])).reads[site].flatten(0, 1)
        torch.testing.assert_close(C, k.T @ k / 12, rtol=1e-9, atol=1e-12)
        assert C.dtype == torch.float64
    with pytest.raises(InputError, match="13 tokens; at least 128"):
        key_covariances(net, [0], texts, runner=RUNNER)


# ---------------------------------------------------------------- planted chains


@pytest.mark.parametrize(
    ("early", "late", "row"),
    [(True, None, (True, True, False)), (False, "single", (True, False, False)), (True, "chain", (True, True, True))],
    ids=["early", "late", "both"],
)
def test_only_both_stages_change_every_chain(early, late, row):
    for seed in range(2):
        net, generator = planted(seed), np.random.default_rng(seed)
        facts = list(net.facts)
        for i in generator.choice(len(facts), 5, replace=False):
            fact = facts[i]
            new = int(generator.choice([o for o in range(20) if o not in (net.facts[fact], fact[0])]))
            before = net.answers(net.network)
            changed, _ = planted_edit(net, fact, new, early=early, late=late)
            found = outcome(net, changed, fact, new)
            assert (found.single, found.first, found.second) == row
            assert net.answers(net.network) == before
            if late == "single":
                assert found.same_answer == 0  # every other question with the old answer breaks
            else:
                assert found.others == 1


# ---------------------------------------------------------------- places


def test_the_last_token_of_the_subject_is_found_under_padding():
    net = tiny("llama")
    found = editing.place(net, REQUEST, ["w7 w8 "])
    assert [net.strings(r) for r in found.rows] == [["w1", "w3", "w4", "w2"], ["w7", "w8", "w1", "w3", "w4", "w2"]]
    assert found.at == (2, 4)
    inputs, at = found.encoded(net, answer=True)
    assert [net.strings(inputs["input_ids"][i, p : p + 1])[0] for i, p in enumerate(at)] == ["w4", "w4"]
    assert net.strings(found.target) == ["w9"]
    assert found.weights.tolist() == [0.5, 0.5]
    chained = editing.chain_places(net, Request("{} w2", "w3", "w9", chains=("w5 w6",)))
    assert chained[0].at == (1,)


def test_weights_of_contexts_sum_to_one():
    rows = [[1]] * 6
    w = editing.Place(rows, (0,) * 6, (1,)).weights
    torch.testing.assert_close(w, torch.tensor([0.5, *[0.1] * 5]))
    assert editing.Place(rows[:1], (0,), (1,)).weights.tolist() == [1.0]


def test_a_request_from_a_prompt_that_names_its_subject():
    found = Request.of("Paris? The capital of Paris is", "Paris", "Rome")
    assert found.prompt == "Paris? The capital of {} is"
    assert found.target == " Rome"
    assert found.text == "Paris? The capital of Paris is"
    assert Request("{} is", "a", " b").target == " b"
    with pytest.raises(InputError, match="does not occur"):
        Request.of("The capital of France is", "Spain", "Rome")


@pytest.mark.parametrize(
    "wrong", [{"prompt": "no place"}, {"prompt": "{} and {}"}, {"subject": " "}, {"target": ""}, {"chains": ("",)}]
)
def test_bad_requests(wrong):
    with pytest.raises(InputError, match=r"prompt|subject|target|chains"):
        Request(**{"prompt": "{} is", "subject": "a", "target": "b", **wrong})


# ---------------------------------------------------------------- the search for values


def test_the_first_step_follows_the_gradient_by_hand():
    net = tiny("llama")
    where = editing.place(net, REQUEST, ["w7 w8 "])
    a, layer = net.anatomy, 1
    sites = [a.site("attn_out", layer), a.site("mlp_out", layer)]
    inputs, at = where.encoded(net, answer=True)
    module = net.module
    delta = torch.zeros(2, 32, dtype=torch.float64, requires_grad=True)
    added = []

    def add(which):
        def hook(m, args, out):
            t = out[0] if isinstance(out, tuple) else out
            mask = torch.zeros(*t.shape[:2], 1, dtype=t.dtype)
            mask[torch.arange(len(at)), at] = 1
            added.append(t.detach()[0, at[0]].clone())
            t = t + mask * delta[which]
            return (t, *out[1:]) if isinstance(out, tuple) else t

        return hook

    handles = [net.get_module(s).register_forward_hook(add(i)) for i, s in enumerate(sites)]
    logits = module(**inputs).logits[:, -1]
    for h in handles:
        h.remove()
    label = torch.full((2,), where.target[0])
    torch.nn.functional.cross_entropy(logits, label).backward()
    # Adam's first step is the learning rate against the sign
    start = torch.stack(added)
    step = -0.01 * delta.grad / (delta.grad.abs() + 1e-8)
    step = step * (0.75 * start.norm(dim=1) / step.norm(dim=1)).clamp(max=1)[:, None]
    found = drive(net, editing.search(net, where, sites, a.site("resid_pre", layer), steps=1, rate=0.01, kl=0.0))
    torch.testing.assert_close(found.start, start[1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.value - found.start, step[1], rtol=1e-4, atol=1e-7)
    assert found.losses[0] == pytest.approx(torch.nn.functional.cross_entropy(logits.detach(), label).item(), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_searched_value_gives_the_answer_and_keeps_its_bound(family):
    net = tiny(family)
    where = editing.place(net, REQUEST)
    sites = [net.anatomy.site("attn_out", 1), net.anatomy.site("mlp_out", 1)]
    found = drive(
        net, editing.search(net, where, sites, net.anatomy.site("resid_pre", 1), clamp=5.0, decay=0.0, steps=12)
    )
    assert found.losses[-1] < found.losses[0]
    bounded = drive(net, editing.search(net, where, sites, clamp=0.1, steps=8))
    change = (bounded.value - bounded.start).norm() / bounded.start.norm()
    assert change <= 0.1 + 1e-6


def test_what_is_recorded_before_the_site_changes_nothing():
    net = tiny("llama")
    where = editing.place(net, REQUEST, ["w7 w8 "])
    sites = [net.anatomy.site("attn_out", 1), net.anatomy.site("mlp_out", 1)]
    short = drive(net, editing.search(net, where, sites, net.anatomy.site("resid_pre", 1), steps=4))
    full = drive(net, editing.search(net, where, sites, None, steps=4))
    torch.testing.assert_close(short.value, full.value, rtol=1e-6, atol=1e-8)


def test_the_divergence_is_that_of_distributions():
    p, q = rand(3, 5).log_softmax(1), rand(3, 5, seed=1)
    expected = torch.nn.functional.kl_div(q.log_softmax(1), p, log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(editing.divergence(q[:, None], p), expected)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize(("divisor", "share"), [("root", 3**0.5), ("share", 3.0), ("none", 1.0)])
def test_residuals_are_divided_among_the_layers_that_are_left(divisor, share):
    net = tiny("llama")
    where = editing.place(net, REQUEST, ["w7 w8 "])
    site, C = net.anatomy.site("resid_post", 2), covariances(net)
    wanted, log = rand(1, 32, seed=9), []
    changed = drive(
        net,
        editing.rewrite(net, [2, 0, 1], [where], wanted, site, C, preserve=3.0, divisor=divisor, ridge=0.0, log=log),
    )
    assert [d["layer"] for d in log] == [0, 1, 2]
    # the first write, from the original's keys
    inputs, at = where.encoded(net)
    neurons = net.anatomy.site("neurons", 0)
    answer = net.run(Pass(inputs, read=[neurons, site]))
    rows = torch.arange(2)
    k = answer.reads[neurons][rows, at].mean(0)
    R = wanted[0] - answer.reads[site][0, at[0]]
    expected = torch.outer(R / share, k) @ torch.linalg.inv(torch.outer(k, k) + 3.0 * C[0])
    torch.testing.assert_close(changed.weight("down", 0) - net.weight("down", 0), expected, rtol=1e-6, atol=1e-9)
    assert log[0]["residual"] == pytest.approx(R.norm().item(), rel=1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.startswith(("gemma2", "gemma3"))])
def test_rome_inserts_exactly_in_every_family(family):
    net = tiny(family)
    where = editing.place(net, REQUEST)
    site = net.anatomy.site("mlp_out", 1)
    wanted = rand(1, 32, seed=3)
    C = {1: spd(48)}
    changed = drive(net, editing.rewrite(net, [1], [where], wanted, site, C, preserve=0.0, divisor="none", ridge=0.0))
    inputs, at = where.encoded(net)
    got = changed.run(Pass(inputs, read=[site])).reads[site][0, at[0]]
    torch.testing.assert_close(got.double(), wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [ACE, PMET, MEMIT, ROME, FineTune])
def test_every_editor_changes_the_fact_and_not_the_original(method):
    net = tiny("llama")
    before = {k: v.clone() for k, v in net.weights().items()}
    given = {} if method is FineTune else {"covariances": covariances(net)}
    options = (
        {"rate": 0.02}
        if method is FineTune
        else {"clamp": 4.0, "decay": 0.0, "preserve": 1e-3, "steps": 12, "rate": 1.0}
    )
    layers = {ACE: {"query_layers": (0,), "value_layers": (1,)}, PMET: {"layers": (0, 1)}, MEMIT: {"layers": (0, 1)},
              ROME: {"layer": 1}, FineTune: {"layer": 1}}[method]  # fmt: skip
    found = method(**FAST, **options, **layers).fit(net, REQUEST, runner=RUNNER, **given)
    assert found.probabilities[0, 1] > 3 * found.probabilities[0, 0]
    assert all(torch.equal(v, before[k]) for k, v in net.weights().items())
    written = {0, 1} if method in (ACE, PMET, MEMIT) else {1}
    assert set(found.deltas) == {net.anatomy.matrix("down", i)[0] for i in written}
    for name, delta in found.deltas.items():
        torch.testing.assert_close(net.weights()[name] + delta, found.network.weights()[name])
    assert found.locality["n"] == 3
    assert isinstance(found.network, LanguageModel)
    p, _ = probabilities(found.network, [REQUEST.text], [REQUEST.target])
    assert p[0].item() == pytest.approx(found.probabilities[0, 1].item())


def test_ace_finds_its_layers_and_writes_chains_into_the_value_layers():
    net = tiny("llama")
    request = Request("w1 {} w2", "w3 w4", "w9", chains=("w20 w21 w22",))
    editor = ACE(**FAST, n_query=1, n_value=1, steps=12, rate=1.0, clamp=4.0, decay=0.0, preserve=1e-3)
    found = editor.fit(net, request, covariances=covariances(net), runner=RUNNER)
    assert list(found.layers) == ["query", "value"]
    assert max(found.layers["query"]) < max(found.layers["value"]) < 2  # the last layer is left out
    assert [d["group"] for d in found.log] == ["query", "value"]
    plain = editor.fit(net, Request("w1 {} w2", "w3 w4", "w9"), covariances=covariances(net), runner=RUNNER)

    def chained(n):
        return probabilities(n, ["w20 w21 w22"], ["w9"])[0].item()

    assert chained(found.network) > max(chained(net), chained(plain.network))


def test_several_facts_are_written_together():
    net = tiny("llama")
    requests = [REQUEST, Request("w5 {} w6", "w7", "w11")]
    found = ROME(**FAST, layer=1, steps=12, rate=1.0, clamp=4.0, decay=0.0).fit(
        net, requests, covariances=covariances(net), runner=RUNNER
    )
    assert found.probabilities.shape == (2, 2)
    assert (found.probabilities[:, 1] > 3 * found.probabilities[:, 0]).all()


def test_targets_of_several_tokens():
    net = tiny("llama")
    request = Request("w1 {} w2", "w3 w4", "w9 w12")
    found = FineTune(**FAST, layer=1, rate=0.02, steps=40).fit(net, request, runner=RUNNER)
    ids = net.encode([[*net.encode(request.text)["input_ids"][0].tolist(), net.token("w9")]], keep=2)
    log_p = found.network.run(Pass(ids)).output.log_softmax(-1)[0]
    expected = log_p[0, net.token("w9")] + log_p[1, net.token("w12")]
    assert found.probabilities[0, 1].log().item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.probabilities[0, 1] > found.probabilities[0, 0]


def test_the_gradient_of_a_matrix_comes_from_its_input_and_output():
    """What fine-tuning takes for the gradient is what autograd gives for the parameter."""
    net = tiny("gpt2")
    a = net.anatomy
    inputs, _ = editing.place(net, REQUEST, ["w7 w8 "]).encoded(net, answer=True)
    down = a.site("neurons", 1).removesuffix(":in")
    label = net.token("w9")
    of = target.loss(editing.answer_loss, torch.full((2, 1), label))
    answer = net.run(Pass(inputs, read=[f"{down}:in"], of=of, wrt=[down]))
    found = torch.einsum("nto,nti->oi", answer.gradients[down], answer.reads[f"{down}:in"])
    parameter = net.get_module(down).weight
    logits = net.module(**inputs).logits[:, -1]
    expected = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, torch.full((2,), label), reduction="sum"), parameter
    )
    torch.testing.assert_close(found, expected[0].T, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------- files


def test_an_edit_is_saved_applied_and_undone_bit_for_bit(tmp_path):
    net = tiny("gpt2", dtype=torch.float32)
    found = FineTune(**FAST, layer=1, steps=3).fit(net, REQUEST, runner=RUNNER)
    path = found.save(tmp_path / "edit.safetensors")
    assert os.listdir(tmp_path) == ["edit.safetensors"]
    same = tiny("gpt2", dtype=torch.float32)
    applied = apply_delta(same, path)
    assert applied.fingerprint() == found.network.fingerprint() != net.fingerprint()
    back = apply_delta(applied, path, undo=True)
    assert back.fingerprint() == net.fingerprint()
    assert all(torch.equal(v, net.weights()[k]) for k, v in back.weights().items())
    _, _, about = read_delta(path)
    assert about["method"] == "fine-tune"
    assert about["requests"][0]["subject"] == "w3 w4"
    with pytest.raises(InputError, match="carries it already"):
        apply_delta(applied, path)
    with pytest.raises(InputError, match="does not carry it"):
        apply_delta(same, path, undo=True)
    with pytest.raises(InputError, match="other weights"):
        apply_delta(tiny("gpt2", seed=1, dtype=torch.float32), path)
    with pytest.raises(InputError, match="no such weight"):
        apply_delta(tiny("llama"), path)


def test_a_file_that_cannot_be_written_or_read_leaves_nothing(tmp_path):
    net = tiny("llama")
    found = FineTune(**FAST, layer=1, steps=1).fit(net, REQUEST, runner=RUNNER)
    with pytest.raises(InputError, match="cannot be written"):
        found.save(tmp_path / "missing" / "edit.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        found.save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        apply_delta(net, tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no edit written by nissl"):
        apply_delta(net, tmp_path / "other.safetensors")


# ---------------------------------------------------------------- measures


def test_locality_counts_and_measures_what_moved():
    net = tiny("llama")
    prompts = ["w1 w2", "w3", "w4 w5 w6"]
    assert locality(net, net, prompts) == {"kept": 1.0, "divergence": 0.0, "n": 3}
    changed = net.rewritten({("down", 2): -net.weight("down", 2)})
    found = locality(net, changed, prompts)
    p, q = (
        torch.stack([n.run(Pass(n.encode(t))).output[0, -1] for t in prompts]).log_softmax(1) for n in (net, changed)
    )
    assert found["kept"] == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert found["divergence"] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)


def test_chains_count_if_any_wording_is_answered():
    net = tiny("llama")
    said = net.generate(["w1 w2", "w3"], max_tokens=8)
    first = [s[0].split()[0] for s in said]
    other = next(w for w in ("w40", "w41", "w42") if w not in said[0][0])
    chains = [
        Chain(("w1 w2",), (first[0],)), Chain(("w1 w2",), (other,)), Chain(("w1 w2", "w3"), (other, first[1].upper())),
        Chain(("w1 w2",), (first[0][:-1] or "x",)),
    ]  # fmt: skip
    assert multi_hop(net, chains, runner=RUNNER) == [True, False, True, False]
    later = said[0][0].split()[-1]
    with_shots = net.generate("w9 w1 w2", max_tokens=8)[0][0]
    assert multi_hop(net, [Chain(("w1 w2",), (with_shots.split()[-1],))], shots="w9 ", runner=RUNNER) == [True]
    assert later
    with pytest.raises(InputError, match="no chain"):
        multi_hop(net, [])
    with pytest.raises(InputError, match="tuple"):
        Chain((), ("a",))


# ---------------------------------------------------------------- what is refused


def test_tied_and_quantised_matrices_are_refused():
    net = tiny("llama")
    layers = net.module.model.layers
    layers[1].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    with pytest.raises(InputError, match="tied to"):
        FineTune(**FAST, layer=2).fit(net, REQUEST, runner=RUNNER)
    net = tiny("llama")
    weight = net.module.model.layers[1].mlp.down_proj.weight
    net.module.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantised"):
        FineTune(**FAST, layer=1).fit(net, REQUEST, runner=RUNNER)


def test_tied_embeddings_do_not_matter():
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         tie_word_embeddings=True)  # fmt: skip
    net = LanguageModel(LlamaForCausalLM(config).eval(), word_tokenizer())
    found = FineTune(**FAST, layer=1, steps=1).fit(net, REQUEST, runner=RUNNER)
    assert len(found.after) == 1


def test_a_model_without_a_known_mlp_says_what_is_missing():
    net = tiny("llama")
    object.__setattr__(net.anatomy, "matrices", {k: v for k, v in net.anatomy.matrices.items() if k != "down"})
    with pytest.raises(SiteError, match="no matrix of its own for 'down'"):
        FineTune(**FAST).fit(net, REQUEST, runner=RUNNER)


def test_bad_editors_and_arguments():
    net = tiny("llama")
    for wrong in (
        {"steps": 0},
        {"rate": 0.0},
        {"clamp": -1.0},
        {"decay": float("nan")},
        {"contexts": -1},
        {"preserve": -2.0},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            PMET(**wrong)
    with pytest.raises(InputError, match="overlap"):
        ACE(query_layers=(0, 1), value_layers=(1,), **FAST).fit(net, REQUEST)
    with pytest.raises(InputError, match="must come last"):
        ACE(query_layers=(2,), value_layers=(1,), **FAST).fit(net, REQUEST)
    with pytest.raises(InputError, match="no layers"):
        PMET(layers=(0, 1), **FAST).fit(net, REQUEST, covariances={0: spd(48)})
    with pytest.raises(InputError, match="from 0 to 2"):
        ROME(layer=5, **FAST).fit(net, REQUEST)
    with pytest.raises(InputError, match="takes no texts"):
        FineTune(**FAST).fit(net, REQUEST, texts=["a"])
    with pytest.raises(InputError, match="at least one"):
        FineTune(**FAST).fit(net, [])
    with pytest.raises(InputError, match="choose ace"):
        edit(net, "w1 w2", "w1", "w3", method="lora")
    with pytest.raises(InputError, match="no_such"):
        edit(net, "w1 w2", "w1", "w3", method="rome", no_such=1)
    with pytest.raises(InputError, match="does not occur"):
        edit(net, "w1 w2", "w7", "w3")


def test_edit_takes_a_prompt_and_a_subject():
    net = tiny("llama")
    found = edit(net, "w1 w3 w4 w2", "w3 w4", "w9", method="fine-tune", layer=1, rate=0.02, runner=RUNNER, **FAST)
    assert found.requests == (Request("w1 {} w2", "w3 w4", " w9"),)
    assert found.probabilities[0, 1] > found.probabilities[0, 0]
    again = edit(net, "w1 {} w2", "w3 w4", "w9", method=FineTune(layer=1, rate=0.02, **FAST), runner=RUNNER)
    assert again.network.fingerprint() == found.network.fingerprint()


def test_a_nonzero_addition_is_differentiated_where_it_is_added():
    """The kernel's promise that the search rests on: wrt a site that an edit adds to is the edit's gradient."""
    net = tiny("gpt2")  # its norms compute in float64
    site, delta = net.anatomy.site("mlp_out", 1), rand(32, seed=4)
    inputs = net.encode([[3, 4, 5]])
    mask = torch.tensor([[[False], [True], [False]]])
    of = target.log_probability(7, position=-1)

    def at(d, wrt=()):
        return net.run(Pass(inputs, [Add(site, d.expand(1, 1, -1), where=mask)], of=of, wrt=wrt))

    gradient = at(delta, [site]).gradients[site][0, 1]
    for i in (0, 17):
        h = torch.zeros(32, dtype=torch.float64)
        h[i] = 1e-5
        slope = (at(delta + h).scalar - at(delta - h).scalar) / 2e-5
        assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


@pytest.mark.slow
def test_smollm2_moves_a_capital(smollm2):
    found = edit(smollm2, "The capital of France is", "France", "Rome", method="fine-tune", contexts=2, runner=RUNNER)
    assert found.success == (True,)
    assert found.locality["kept"] >= 0.8
