"""Rollouts: cached generation equals generation from scratch, with and without edits, in any batch."""

import pytest
import torch

from language_families import FAMILIES, tiny
from nissl.errors import InputError, SiteError
from nissl.network import Add, Apply, Pass, Rollout, Scale, Set
from nissl.runner import Job, Runner

PROMPTS = ["w1 w2 w3 w4 w5", "w9 w8", "w7 w7 w1"]


def from_scratch(net, prompt, n, edits=(), then=()):
    """Greedy generation, the whole text anew for each token; edits of the prompt hold at its positions."""
    ids = net.encode(prompt)["input_ids"][0].tolist()
    start, found = len(ids), []
    for _ in range(n):

        def both(t, edits=edits, then=then):
            t = t.clone()
            for e in edits:
                t[:, :start] += e
            for e in then:
                t[:, start:] += e
            return t

        site = net.anatomy.site("resid_post", 1)
        output = net.run(Pass(net.encode([ids]), Apply(site, both))).output
        found.append(int(output[0, -1].argmax()))
        ids.append(found[-1])
        if found[-1] in net.end_ids:
            break
    return found


def tokens_of(answer, row=0, sample=0):
    found = answer.tokens[row, sample]
    return found[found >= 0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_generation_from_scratch(family):
    net = tiny(family)
    answer = net.run(Rollout(net.encode(PROMPTS), max_tokens=6))
    for i, p in enumerate(PROMPTS):
        assert tokens_of(answer, i) == from_scratch(net, p, 6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_edits_hold_in_the_prompt_and_then_at_new_tokens(family):
    net = tiny(family)
    site = net.anatomy.site("resid_post", 1)
    v, w = torch.randn(2, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2
    plain = net.run(Rollout(net.encode(PROMPTS), max_tokens=6)).tokens
    for edits, then, expected in (
        ([Add(site, v)], None, ((v,), (v,))),
        ([Add(site, v)], (), ((v,), ())),
        ([], [Add(site, w)], ((), (w,))),
        ([Add(site, v)], [Add(site, w)], ((v,), (w,))),
    ):
        answer = net.run(Rollout(net.encode(PROMPTS), edits, then, max_tokens=6))
        for i, p in enumerate(PROMPTS):
            assert tokens_of(answer, i) == from_scratch(net, p, 6, *expected)
        assert not torch.equal(answer.tokens, plain)


def test_an_edit_that_names_positions_is_of_the_prompt():
    net = tiny("llama")
    site = net.anatomy.site("resid_post", 1)
    value = torch.ones(32, dtype=torch.float64) * 3
    kinds = [Add(site, value, positions=[-1]), Set(site, torch.ones(1, 5, 32)), Scale(site, 2.0, where=torch.ones(1, 5, 1, dtype=torch.bool))]  # fmt: skip
    for e in kinds:
        assert Rollout(net.encode(PROMPTS[0]), e).following.edits == ()
    for e in (Add(site, value), Add(site, torch.ones(1, 1, 32)), Scale(site, 2.0, units=[3])):
        assert len(Rollout(net.encode(PROMPTS[0]), e).following.edits) == 1
    edited = net.run(Rollout(net.encode(PROMPTS[0]), kinds[0], max_tokens=4))
    assert tokens_of(edited) != tokens_of(net.run(Rollout(net.encode(PROMPTS[0]), max_tokens=4)))


def test_samples_do_not_depend_on_the_batch_and_follow_the_seed():
    net = tiny("llama")
    settings = {"samples": 5, "max_tokens": 8, "temperature": 1.0}
    together = net.run(Rollout(net.encode(PROMPTS), seed=3, **settings))
    for i, p in enumerate(PROMPTS):
        alone = net.run(Rollout(net.encode(p), seed=3, **settings))
        assert torch.equal(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[i], rtol=1e-4, atol=1e-4)
    assert len({tuple(s.tolist()) for s in together.tokens[0]}) > 1
    assert not torch.equal(net.run(Rollout(net.encode(PROMPTS), seed=4, **settings)).tokens, together.tokens)


def test_what_is_drawn_follows_the_distribution():
    net = tiny("llama")
    inputs = net.encode(PROMPTS[0])
    p = (net.run(Pass(inputs)).output[0, -1].float() / 3.0).softmax(-1)
    drawn = net.run(Rollout(inputs, samples=4000, max_tokens=1, temperature=3.0))
    shares = torch.bincount(drawn.tokens[0, :, 0], minlength=50) / 4000
    assert float((shares - p).abs().max()) < 4 * float((p * (1 - p) / 4000).sqrt().max())
    top = net.run(Rollout(inputs, samples=500, max_tokens=1, temperature=3.0, top_k=3)).tokens.unique()
    assert set(top.tolist()) == set(p.topk(3).indices.tolist())
    order = p.argsort(descending=True)
    n = int((p[order].cumsum(0) < 0.5).sum()) + 1
    nucleus = net.run(Rollout(inputs, samples=2000, max_tokens=1, temperature=3.0, top_p=0.5)).tokens.unique()
    assert set(nucleus.tolist()) <= set(order[:n].tolist())
    # the log probability is that of the model itself
    model = net.run(Pass(inputs)).output[0, -1].float().log_softmax(-1)
    torch.testing.assert_close(drawn.log_probs[0, :, 0], model[drawn.tokens[0, :, 0]])


def test_it_stops_at_tokens_and_texts():
    net = tiny("llama")
    whole = tokens_of(net.run(Rollout(net.encode(PROMPTS[0]), max_tokens=8)))
    third = whole[2]
    first = whole.index(third)
    answer = net.run(Rollout(net.encode(PROMPTS[0]), max_tokens=8, stop=[third]))
    assert tokens_of(answer) == whole[: first + 1]
    assert bool((answer.tokens[0, 0, first + 1 :] == -1).all())
    assert bool((answer.log_probs[0, 0, first + 1 :] == 0).all())
    word = net.strings([third])[0]
    text = net.generate(PROMPTS[0], max_tokens=8, stop=word)[0][0]
    assert word not in text
    assert net.decode(whole[:first]).strip() == text.strip()
    pieces = list(net.stream(PROMPTS[0], max_tokens=8))
    assert "".join(pieces) == net.generate(PROMPTS[0], max_tokens=8)[0][0]
    assert len(pieces) > 1


def test_the_runner_merges_rollouts_and_answers_repeated_ones_from_memory():
    net = tiny("llama")
    runner = Runner(progress=False)

    def asking(prompt):
        answers = yield [Rollout(net.encode(prompt), max_tokens=4), Pass(net.encode(prompt))]
        return answers[0].tokens, answers[1].output

    prompts = ["w1 w2", "w3 w4", "w1 w2"]
    jobs = [Job("roll", i, net, lambda p=p: asking(p)) for i, p in enumerate(prompts)]
    found = {job.key: result for job, result in runner.drive(jobs)}
    for i, p in enumerate(prompts):
        assert found[i][0][0, 0].tolist() == from_scratch(net, p, 4)
    assert runner.costs["roll"].reused == 2  # the third job's two questions
    assert runner.costs["roll"].forward == 3 * (4 + 1)


def test_wrong_rollouts_leave_nothing_behind():
    net = tiny("gpt2")
    inputs = net.encode(PROMPTS[0])
    for wrong, error, says in (
        (lambda: Rollout(inputs, samples=0), InputError, "samples"),
        (lambda: Rollout(inputs, max_tokens=0), InputError, "max_tokens"),
        (lambda: Rollout(inputs, temperature=-1.0), InputError, "temperature"),
        (lambda: Rollout(inputs, temperature=float("nan")), InputError, "temperature"),
        (lambda: Rollout(inputs, top_p=0.0), InputError, "top_p"),
        (lambda: Rollout(inputs, stop=""), InputError, "stop"),
        (lambda: Rollout(torch.ones(1, 3)), InputError, "net.encode"),
        (lambda: net.run(Rollout(inputs, max_tokens=64)), InputError, "context of 64"),
        (lambda: net.run(Rollout(net.encode(["w1", "w1 w2"], side="right", keep=0))), InputError, "on the left"),
        (lambda: net.run(Rollout(inputs, Add("nowhere", 1.0))), SiteError, "nowhere"),
        (lambda: net.run(Rollout(inputs, Add("transformer.h.0", torch.ones(31)))), InputError, "32 units"),
        (lambda: list(net.stream(PROMPTS)), InputError, "one prompt"),
    ):
        with pytest.raises(error, match=says):
            wrong()
        assert not any(m._forward_hooks or m._forward_pre_hooks or m.training for m in net.modules())
        assert net._lock.acquire(blocking=False)
        net._lock.release()
