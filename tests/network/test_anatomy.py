"""One suite over all families: roles are where the Anatomy says, and add up as they must."""

import pytest
import torch
from torch import nn

from language_families import FAMILIES, tiny
from nissl.errors import SiteError
from nissl.network import ROLES, Add, LanguageModel, Pass, Set, target
from nissl.network.anatomy import anatomy_of

IDS = [[3, 7, 11, 4, 9], [8, 2, 2, 30, 1]]


@pytest.fixture(scope="module", params=FAMILIES)
def net(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def reads(net):
    a = net.anatomy
    places = [a.site(r) for r in ("embed", "final", "final_norm", "unembed")]
    places += [a.site(r, i) for r in ROLES if r in a.places and "{layer}" in a.places[r] for i in range(a.n_layers)]
    answer = net.run(Pass(net.encode(IDS, keep=0), read=places))
    return answer


def at(net, reads, role, layer=None):
    return reads.reads[net.anatomy.site(role, layer)]


def test_sizes(net):
    a = net.anatomy
    kv = 2 if net.config.model_type not in ("gpt2", "gpt_neox", "opt") else 4
    assert (a.n_layers, a.d_model, a.n_heads, a.n_kv_heads, a.d_head, a.d_mlp) == (3, 32, 4, kv, 8, 48)
    assert a.gated == (kv == 2)
    expected = {"gate"} if not a.gated else set()
    if net.config.model_type in ("gpt2", "gpt_neox"):
        expected |= {"q", "k", "v"}  # fused
    if a.parallel:
        expected |= {"resid_mid"}
    assert set(a.missing) == expected


def test_the_residual_stream_is_the_sum_of_what_is_added(net, reads):
    a = net.anatomy
    for i in range(a.n_layers):
        pre, post = at(net, reads, "resid_pre", i), at(net, reads, "resid_post", i)
        torch.testing.assert_close(pre + at(net, reads, "attn_out", i) + at(net, reads, "mlp_out", i), post)
        if not a.parallel:
            torch.testing.assert_close(pre + at(net, reads, "attn_out", i), at(net, reads, "resid_mid", i))
        if i:
            torch.testing.assert_close(pre, at(net, reads, "resid_post", i - 1))
        torch.testing.assert_close(at(net, reads, "attn_in", i), pre)
    torch.testing.assert_close(at(net, reads, "final"), at(net, reads, "resid_post", -1))
    if not getattr(net.config, "final_logit_softcapping", None):
        torch.testing.assert_close(at(net, reads, "unembed"), reads.output)


def test_neurons_are_what_the_down_projection_takes(net, reads):
    for i in range(net.anatomy.n_layers):
        neurons, act = at(net, reads, "neurons", i), at(net, reads, "act", i)
        if net.anatomy.gated:
            torch.testing.assert_close(neurons, act * at(net, reads, "up", i))
        else:
            torch.testing.assert_close(neurons, act)
        assert neurons.shape[-1] == net.anatomy.d_mlp
        if net.config.model_type.startswith(("gemma2", "gemma3")):
            continue  # a norm stands between the projection and the residual stream
        down = net.weight("down", i)
        assert down.shape == (32, 48)
        bias = _bias(net, net.anatomy.matrix("down", i)[0])
        torch.testing.assert_close(neurons @ down.T + bias, at(net, reads, "mlp_out", i))


def _bias(net, name):
    found = net.weights().get(name.replace(".weight", ".bias"))
    return torch.zeros(1, dtype=torch.float64) if found is None else found


def test_patterns_scores_and_heads(net, reads):
    a = net.anatomy
    for i in range(a.n_layers):
        scores, pattern, z = (at(net, reads, r, i) for r in ("scores", "pattern", "z"))
        assert scores.shape == pattern.shape == (2, 4, 5, 5)
        torch.testing.assert_close(scores.softmax(-1), pattern)
        assert bool((pattern.triu(1) == 0).all())
        assert z.shape == (2, 5, a.n_heads * a.d_head)
        if "v" in a.places:  # grouped queries: heads 0 and 1 share the first values
            v = at(net, reads, "v", i).unflatten(-1, (a.n_kv_heads, a.d_head))
            v = v.repeat_interleave(a.n_heads // a.n_kv_heads, 2)
            for h in range(a.n_heads):
                torch.testing.assert_close(pattern[:, h] @ v[:, :, h], z[..., a.head(h)])
        if not net.config.model_type.startswith(("gemma2", "gemma3")):
            out = z @ net.weight("o", i).T + _bias(net, net.anatomy.matrix("o", i)[0])
            torch.testing.assert_close(out, at(net, reads, "attn_out", i))


def test_reading_attention_changes_nothing(net):
    inputs = net.encode(IDS, keep=0)
    plain = net.module(**inputs).logits.detach()
    before = net.module.config._attn_implementation
    answer = net.run(Pass(inputs, read=net.anatomy.sites("pattern")))
    # Gemma 2 keeps the plain attention of transformers, whose softmax is in float32
    torch.testing.assert_close(answer.output, plain, rtol=1e-4, atol=1e-4)
    assert net.module.config._attn_implementation == before


def test_a_pattern_is_edited_and_differentiated(net):
    """The gradient at a pattern is the derivative of what an edit of it does."""
    inputs, site = net.encode(IDS), net.anatomy.site("pattern", 1)
    of = target.class_logit([5, 6], position=-1)
    answer = net.run(Pass(inputs, read=[site], of=of, wrt=[site]))
    direction = torch.randn(
        answer.reads[site].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(net.dtype)
    step = 1e-3  # norms work in float32, also in a float64 model: a smaller step would drown in rounding
    up, down = (net.run(Pass(inputs, Add(site, s * step * direction), of=of)).scalar for s in (1, -1))
    slope = (answer.gradients[site] * direction).flatten(1).sum(1)
    torch.testing.assert_close(
        (up - down) / (2 * step), slope, rtol=5e-3, atol=1e-3 if net.dtype == torch.float64 else 3e-2
    )


def test_masked_scores_stay_masked(net):
    """Minus infinity at a key hides it from every query, also where a query then sees nothing at all."""
    inputs, a = net.encode(IDS), net.anatomy
    where = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    where[..., 0] = True
    edits = [Set(s, -torch.inf, where=where) for s in a.sites("scores")]
    answer = net.run(Pass(inputs, edits, read=a.sites("pattern")))
    for i in range(a.n_layers):
        pattern = answer.reads[a.site("pattern", i)]
        assert bool((pattern[..., 0] == 0).all())
        assert bool((pattern[:, :, 0] == 0).all())
        torch.testing.assert_close(pattern[:, :, 1:].sum(-1), torch.ones(2, 4, 4, dtype=net.dtype))
    assert bool(torch.isfinite(answer.output).all())


def test_a_gradient_between_attention_and_mlp_is_that_of_one_branch(net):
    """At the norm before the MLP, what flows past it is left out: with it, the gradient would be that of attn_out."""
    a, inputs = net.anatomy, net.encode(IDS)
    of = target.class_logit([5, 6], position=-1)
    branch, whole, out = a.site("mlp_in", 1), a.site("attn_out", 1), a.site("mlp_out", 1)
    if a.parallel:
        pytest.skip("in parallel blocks attention does not feed the MLP")
    after = net.run(Pass(inputs, of=of, wrt=[branch, whole])).gradients
    alone = net.run(Pass(inputs, of=of, wrt=[branch])).gradients[branch]
    past = net.run(Pass(inputs, of=of, wrt=[out, a.site("resid_post", 1)])).gradients[a.site("resid_post", 1)]
    torch.testing.assert_close(after[branch], alone)
    torch.testing.assert_close(after[whole], after[branch] + past)


@pytest.mark.parametrize("role", ["resid_pre", "attn_out", "mlp_out", "z", "neurons", "pattern"])
def test_setting_what_was_read_changes_nothing(net, reads, role):
    inputs, site = net.encode(IDS, keep=0), net.anatomy.site(role, 1)
    value = reads.reads[site]
    same = net.run(Pass(inputs, Set(site, value), read=[net.anatomy.site("pattern", 0)])).output
    torch.testing.assert_close(same, reads.output)
    other = net.run(Pass(inputs, Set(site, value.flip(0)))).output
    assert not torch.allclose(other, reads.output)


@pytest.mark.parametrize("layer", [1, 2])
def test_what_lies_before_a_set_residual_stream_is_not_run(net, layer):
    inputs, site = net.encode(IDS), net.anatomy.site("resid_pre", layer)
    value = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(net.dtype)
    calls = []
    handle = net.get_module(site.removesuffix(":in").replace(f".{layer}", ".0")).register_forward_hook(
        lambda *_: calls.append(1)
    )
    try:
        net.run(Pass(inputs, Set(site, value)))  # the first time, the cut is tried and checked
        calls.clear()
        inner = net.get_module(net.anatomy.site("mlp_out", 0))
        inner_calls = []
        second = inner.register_forward_hook(lambda *_: inner_calls.append(1))
        answer = net.run(Pass(inputs, Set(site, value)))
        second.remove()
    finally:
        handle.remove()
    assert not inner_calls
    from nissl.network import Apply

    torch.testing.assert_close(answer.output, net.run(Pass(inputs, Apply(site, lambda t: value))).output)


def test_an_unknown_family_says_what_is_missing():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.mixer(x)

    class Config:
        model_type = "strange"

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = Config()
            self.tokens = nn.Embedding(9, 4)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.lm_head = nn.Linear(4, 9)

        def get_input_embeddings(self):
            return self.tokens

        def forward(self, input_ids):
            x = self.tokens(input_ids)
            for block in self.blocks:
                x = block(x)
            return {"logits": self.lm_head(x)}

    net = LanguageModel(Strange())
    a = net.anatomy
    assert (a.family, a.n_layers) == ("strange", 2)
    assert set(a.places) == {"resid_pre", "resid_post", "unembed"}
    with pytest.raises(SiteError, match=r"strange has no 'mlp_out'.*net\.sites\(\)"):
        a.site("mlp_out", 0)
    with pytest.raises(SiteError, match="no matrix of its own for 'down'"):
        net.weight("down", 0)
    read = net.run(Pass(net.encode([[1, 2, 3]]), read=[a.site("resid_post", 1), "blocks.0.mixer"])).reads
    assert read["blocks.0.mixer"].shape == (1, 3, 4)
    assert anatomy_of(nn.Linear(2, 2)).places == {}


def test_wrong_roles_and_layers():
    a = tiny("llama").anatomy
    for wrong, says in (
        (lambda: a.site("mlp", 0), "no role 'mlp'"),
        (lambda: a.site("mlp_out"), "needs a layer, 0 to 2"),
        (lambda: a.site("mlp_out", 3), "layers 0 to 2, not 3"),
        (lambda: a.site("mlp_out", True), "needs a layer"),
        (lambda: a.site("final", 1), "has no layers"),
        (lambda: a.head(4), "heads 0 to 3"),
    ):
        with pytest.raises(SiteError, match=says):
            wrong()
    assert a.site("mlp_out", -1) == a.site("mlp_out", 2)
