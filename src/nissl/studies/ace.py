"""Yang et al.: ACE: Attribution-controlled knowledge editing for multi-hop factual recall (2025).

Measured on a planted network whose facts and chains are known exactly, and, where the packaged model is installed, on
SmolLM2-135M. The thresholds below were written down before the first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nissl.intervention.editing import Place, rewrite
from nissl.network import LanguageModel, Pass
from nissl.runner import Job, Runner

N_ENTITIES = 20
RELATIONS = ("a", "b")


@dataclass(frozen=True, eq=False)
class Planted:
    """A network of two blocks that holds facts about entities in both, and answers questions over one and two hops.

    A prompt has three tokens: an entity, a relation, and ``id`` (one hop) or a second relation (two hops). Attention of
    block 0 brings entity and relation to the last position. MLP 0 ("E") has one neuron for each fact (s, r): it writes the
    object o as an intermediate result. MLP 1 ("D") has one for each (o, id), which writes the answer o, and one for each
    fact (o, r), which writes the answer of the second hop: every fact is stored twice.

    Attributes
    ----------
    network : LanguageModel
    facts : dict of (entity, relation) to entity
    """

    network: LanguageModel
    facts: dict[tuple[int, int], int]

    def prompt(self, entity: int, relation: int, second: int | None = None) -> list[int]:
        """Token ids of a question; `second` is the relation of the second hop."""
        return [
            entity,
            N_ENTITIES + relation,
            N_ENTITIES + len(RELATIONS) + (len(RELATIONS) if second is None else second),
        ]

    def answer(self, entity: int, relation: int, second: int | None = None, facts: Any = None) -> int:
        """The right answer under these facts."""
        facts = self.facts if facts is None else facts
        hop = facts[entity, relation]
        return hop if second is None else facts[hop, second]

    def questions(self) -> list[tuple[int, int, int | None]]:
        """Every question over one and two hops."""
        n = range(len(RELATIONS))
        return [(s, r, b) for s in range(N_ENTITIES) for r in n for b in (None, *n)]

    def answers(self, network: LanguageModel) -> dict[tuple[int, int, int | None], int]:
        """What a network answers to every question."""
        asked = self.questions()
        output = network.run(Pass(network.encode([self.prompt(*q) for q in asked]))).output
        assert output is not None
        return dict(zip(asked, output[:, -1].argmax(-1).tolist(), strict=True))


def planted(seed: int = 0) -> Planted:
    """The planted network: a GPT-2 without norms, all weights written by hand.

    Every fact is the second hop of some chain; objects are drawn with `seed`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    n, k = N_ENTITIES, len(RELATIONS)
    generator = np.random.default_rng(seed)
    # each relation is a permutation, so that every fact is the second hop of k chains
    facts = {(s, r): int(o) for r in range(k) for s, o in enumerate(generator.permutation(n))}
    # directions: entity as subject, as intermediate result, as answer; first relation; second slot
    e, i, out, first, second = 0, n, 2 * n, 3 * n, 3 * n + k
    d = 3 * n + 2 * k + 1
    config = GPT2Config(
        vocab_size=n + 2 * k + 1, n_embd=d, n_inner=n * (k + 1), n_layer=2, n_head=1, n_positions=8,
        activation_function="relu", tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.requires_grad_(False).zero_()
    body: Any = model.transformer
    one = torch.eye(d)
    embedding = body.wte.weight
    embedding[:n] = one[e : e + n]
    embedding[n : n + k] = one[first : first + k]
    embedding[n + k :] = one[second : second + k + 1]
    body.ln_f = nn.Identity()
    for block in body.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        block.mlp.c_fc.bias.fill_(-1.5)
    attention, E, D = body.h[0].attn, body.h[0].mlp, body.h[1].mlp
    # queries and keys are 0, so the pattern is the mean of three tokens; subjects and first relations are handed on
    handed = torch.cat([torch.ones(n), torch.zeros(2 * n), torch.ones(k), torch.zeros(k + 1)])
    attention.c_attn.weight[:, 2 * d :] = 3 * torch.diag(handed)
    attention.c_proj.weight[:] = one
    # GPT-2 keeps its matrices inputs first
    for j, ((s, r), o) in enumerate(facts.items()):
        E.c_fc.weight[:, j] = one[e + s] + one[first + r]
        E.c_proj.weight[j] = 2 * one[i + o]
        D.c_fc.weight[:, j] = one[i + s] + one[second + r]
        D.c_proj.weight[j] = 2 * one[out + o]
    for o in range(n):
        D.c_fc.weight[:, n * k + o] = one[i + o] + one[second + k]
        D.c_proj.weight[n * k + o] = 2 * one[out + o]
    model.lm_head.weight[:n] = 10 * one[out : out + n]
    return Planted(LanguageModel(model, name="planted"), facts)


# ---------------------------------------------------------------- the planted table


def planted_edit(
    net: Planted, fact: tuple[int, int], new: int, *, early: bool, late: str | None
) -> tuple[LanguageModel, tuple[int, int]]:
    """Write a fact with given residuals: new minus old output, with C = 1.

    Parameters
    ----------
    net : Planted
    fact : (entity, relation)
    new : int
        Its new object.
    early : bool
        Write block 0 at the one-hop prompt.
    late : {None, "single", "chain"}
        Write block 1 at the one-hop prompt, or at that of a chain whose second hop is the fact.

    Returns
    -------
    LanguageModel, (int, int)
        And the first hop of that chain.
    """
    entity, relation = fact
    chain = next(q for q, o in net.facts.items() if o == entity and q != fact)
    one, two = net.prompt(entity, relation), net.prompt(*chain, relation)
    old = net.facts[fact]
    d_mlp = net.network.anatomy.d_mlp
    covariance = {layer: torch.eye(d_mlp, dtype=torch.float64) for layer in (0, 1)}
    changed = net.network
    for layer, ids, wanted in ((0, one, early), (1, one if late == "single" else two, late is not None)):
        if not wanted:
            continue
        site = net.network.anatomy.site("mlp_out", layer)
        base = (1 if layer == 0 else 2) * N_ENTITIES  # intermediate results, answers
        target = _now(changed, ids, site)
        target[base + new] += 1
        target[base + old] -= 1
        where = Place([ids], (len(ids) - 1,), (new,))

        def write(
            now: Any = changed, layer: int = layer, where: Any = where, target: Any = target, site: str = site
        ) -> Any:
            return rewrite(now, [layer], [where], target[None], site, covariance, preserve=1e-6, ridge=0.0)

        ((_, changed),) = Runner(progress=False).drive([Job("write", 0, changed, write)])
    return changed, chain


def _now(network: LanguageModel, ids: list[int], site: str) -> Tensor:
    return network.run(Pass(network.encode([ids]), read=[site])).reads[site][0, -1].clone()


@dataclass(frozen=True)
class Outcome:
    """What an edit of one fact changed: right answers under the new fact, by kind of question."""

    single: bool
    first: bool
    second: bool
    others: float
    same_answer: float


def outcome(net: Planted, changed: LanguageModel, fact: tuple[int, int], new: int) -> Outcome:
    """Whether the new fact is answered alone, as first hop and as second hop, and how many others stay.

    ``same_answer`` is the share kept of other one-hop questions that had the old object as answer.
    """
    facts = {**net.facts, fact: new}
    now = net.answers(changed)
    right = {q: now[q] == net.answer(*q, facts=facts) for q in now}
    entity, relation = fact
    first = [right[q] for q in now if q[:2] == fact and q[2] is not None]
    second = [right[q] for q in now if q[2] == relation and q[:2] != fact and net.facts[q[:2]] == entity]
    touched = {q for q in now if q[:2] == fact or (q[2] == relation and net.facts[q[:2]] == entity)}
    others = [right[q] for q in now if q not in touched]
    old = net.facts[fact]
    same = [right[q] for q in now if q[2] is None and q[:2] != fact and net.facts[q[:2]] == old]
    return Outcome(
        right[(*fact, None)], all(first), all(second), float(np.mean(others)), float(np.mean(same or [True]))
    )
