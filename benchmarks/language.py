"""Language models: RelP beside attribution patching, generation under edits beside plain generation."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import SAME, Case, relative
from benchmarks.subject import Subject
from nissl.attribution.patching import AttributionPatching, RelevancePatching, patch
from nissl.network import Add, LanguageModel, Pass, Rollout
from nissl.network.target import logit_difference
from nissl.runner import Runner

CLEAN = "When Steven and Henry went to the school, Henry gave a key to"
CORRUPTED = "When Steven and Henry went to the school, Steven gave a key to"
NEW_TOKENS = 24


@cache
def model() -> LanguageModel:
    """SmolLM2-135M-Instruct from its package."""
    return LanguageModel.load("smollm2")


def question(net: LanguageModel) -> tuple[list[str], list[str], Any]:
    """A clean and a corrupted prompt, and the logit difference between the two names."""
    return [CLEAN], [CORRUPTED], logit_difference([net.token(" Steven")], [net.token(" Henry")], position=-1)


def relp(s: Subject) -> Case:
    """The rules' price: the same two forward passes and one backward pass, with and without them."""
    net = model()
    asked = question(net)

    def run(method: Any) -> Any:
        return patch({"m": method}, net, *asked, runner=Runner(progress=False, memory=0))["m"]

    def first_order() -> Tensor:
        """Attribution patching by hand: hooks at the blocks' inputs, autograd, the difference of activations."""
        kept: list[Tensor] = []
        layers = net.module.model.layers  # pyright: ignore[reportAttributeAccessIssue]
        hooks = [b.register_forward_pre_hook(lambda m, a: kept.append(a[0])) for b in layers]
        try:
            with torch.no_grad():
                net.module(**net.encode(CLEAN))
            clean, kept[:] = list(kept), []
            embeds = net.module.get_input_embeddings()(net.encode(CORRUPTED)["input_ids"]).detach().requires_grad_()
            inputs = {k: v for k, v in net.encode(CORRUPTED).items() if k != "input_ids"}
            logits = net.module(inputs_embeds=embeds, **inputs).logits[:, -1]
            scalar = logits[0, net.token(" Steven")] - logits[0, net.token(" Henry")]
            grads = torch.autograd.grad(scalar, kept)
        finally:
            for h in hooks:
                h.remove()
        return torch.stack([(g * (c - k)).sum(-1)[0] for g, c, k in zip(grads, clean, kept, strict=True)]).detach()

    def differences() -> dict[str, tuple[float, float]]:
        ours = run(AttributionPatching())["resid_pre"].values[0]
        return {"attribution patching by hand": (relative(torch.as_tensor(ours), first_order()), SAME)}

    return Case(
        "RelP", "attribution patching", 1.3,
        {"nissl": lambda: run(RelevancePatching()), "attribution patching": lambda: run(AttributionPatching())},
        differences, net.module, "both by nissl: the ratio is the price of the rules",
    )  # fmt: skip


def generation(s: Subject) -> Case:
    """Batched greedy generation with a steering edit at every token beside transformers' generate without one."""
    net = model()
    prompts = [
        "The capital of France is",
        "Once upon a time there was",
        "My favourite animal is the",
        "In the evening we like to",
    ]
    inputs = net.encode(prompts)
    site = net.anatomy.site("resid_post", 15)
    nothing = torch.zeros(net.anatomy.d_model)
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def ours() -> Tensor:
        answer = net.run(Rollout(inputs, Add(site, nothing), max_tokens=NEW_TOKENS))
        assert answer.tokens is not None
        return answer.tokens[:, 0]

    def theirs() -> Tensor:
        with torch.no_grad():
            found = net.module.generate(  # pyright: ignore[reportCallIssue]
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **fixed
            )
        return found[:, inputs["input_ids"].shape[1] :]

    def differences() -> dict[str, tuple[float, float]]:
        a, b = ours(), theirs()
        known = a >= 0  # ours stops at the end of a text
        return {"tokens": (float((a != b)[known].float().mean()), 0.0)}

    return Case("Generation under an edit", "generate", 1.1, {"nissl": ours, "generate": theirs}, differences, net.module,
                "the edit adds zero, so that both write the same")  # fmt: skip


def gradients(s: Subject) -> dict[str, Any]:
    """Memory of gradients at every site of all layers: run in a process of its own by ``python -m benchmarks``."""
    import resource

    net = model()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    roles = ("resid_pre", "attn_out", "mlp_out", "z", "pattern", "gate", "up", "neurons", "resid_post")
    places = [site for role in roles for site in net.anatomy.sites(role)]
    inputs = net.encode([CLEAN] * 8)
    answer = net.run(Pass(inputs, of=question(net)[2].rows(8), wrt=places))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"sites": len(answer.gradients), "MiB": (after - before) / 1024, "aim": 3072}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(gradients(None))  # pyright: ignore[reportArgumentType]
