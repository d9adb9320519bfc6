"""Small text classifiers whose attention can be read, and a loop that trains them.

Both are written in plain operations, the LSTM step by step, so that backward rules such as DeepLIFT's see every one of
them, and attention patterns are sites (``attention:pattern``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least, flag, is_number
from nissl.errors import InputError
from nissl.seeds import seeded


class BiLSTM(nn.Module):
    """One layer of long short-term memory in both directions, step by step.

    Parameters
    ----------
    width, hidden : int
        Units of the input, and of the state in each direction.

    References
    ----------
    Hochreiter, Schmidhuber: Long short-term memory (1997).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(width, 2 * 4 * hidden)
        self.state = nn.Parameter(torch.empty(2, hidden, 4 * hidden))
        self.hidden = hidden
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Float[Tensor, "n t width"], mask: Bool[Tensor, "n t"]) -> Float[Tensor, "n t states"]:
        """States after each token, forwards and backwards; where the mask is False a state stays as it was."""
        n, t, _ = x.shape
        ahead, back = self.input(x).reshape(n, t, 2, -1).unbind(2)
        h = c = x.new_zeros(n, 2, self.hidden)
        states: list[Tensor] = []
        for s in range(t):  # both directions at once: one at token s, the other at token t - 1 - s
            read = torch.cat([ahead[:, s, None], back[:, t - 1 - s, None]], 1)
            gates = read + torch.einsum("ndh,dhk->ndk", h, self.state)
            into, forget, out = torch.sigmoid(gates[..., self.hidden :]).chunk(3, -1)
            updated = forget * c + into * torch.tanh(gates[..., : self.hidden])
            keep = torch.stack([mask[:, s], mask[:, t - 1 - s]], 1)[..., None]
            h = torch.where(keep, out * torch.tanh(updated), h)
            c = torch.where(keep, updated, c)
            states.append(h[:, None])
        forwards, backwards = torch.cat(states, 1)[:, :, 0], torch.cat(states[::-1], 1)[:, :, 1]
        return torch.cat([forwards, backwards], -1)


class AdditiveAttention(nn.Module):
    """Mean of vectors with weights softmax(v · tanh(W h)): attention without a query.

    Parameters
    ----------
    width : int
    uniform : bool, default False
        All weights alike: a control that tells whether a task needs attention.

    References
    ----------
    Bahdanau, Cho, Bengio: Neural machine translation by jointly learning to align and translate (2015).
    """

    def __init__(self, width: int, uniform: bool = False) -> None:
        super().__init__()
        self.hidden, self.score = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        self.uniform = uniform

    def forward(self, h: Float[Tensor, "n t width"], mask: Bool[Tensor, "n t"]) -> Float[Tensor, "n width"]:
        """Weighted mean over the tokens that the mask keeps."""
        scores = self.score(torch.tanh(self.hidden(h))).transpose(1, 2)  # one query, as in other attention patterns
        if self.uniform:
            scores = torch.zeros_like(scores)
        return torch.matmul(scores.masked_fill(~mask[:, None], -math.inf).softmax(-1), h)[:, 0]


class AttentiveBiLSTM(nn.Module):
    """Token embedding, an LSTM in both directions, additive attention over their states, linear read-out.

    Parameters
    ----------
    vocabulary, n_classes : int
    width : int, default 32
        Units of the embedding.
    hidden : int, default 32
        Units of the state in each direction.
    padding : int, default 0
        Id of the token that fills texts up; it is neither read nor attended to.
    uniform : bool, default False
        See `AdditiveAttention`.

    Notes
    -----
    Called with ids (n, t) and optionally a mask, by default ``ids != padding``. Give the mask where tokens are replaced
    by the padding token on purpose, so that their places stay.
    """

    def __init__(
        self, vocabulary: int, n_classes: int = 2, width: int = 32, hidden: int = 32, padding: int = 0,
        uniform: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = BiLSTM(width, hidden)
        self.attention = AdditiveAttention(2 * hidden, uniform)
        self.head = nn.Linear(2 * hidden, n_classes)
        self.padding = padding

    def forward(self, ids: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, "n classes"]:
        """Logits."""
        keep = ids != self.padding if mask is None else mask
        return self.head(self.attention(self.lstm(self.embedding(ids), keep), keep))


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Float[Tensor, "n t width"], mask: Bool[Tensor, "n t"]) -> Float[Tensor, "n t width"]:
        """What each token gathers from the tokens that the mask keeps."""
        n, t, width = x.shape
        q, k, v = (
            layer(x).reshape(n, t, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        gathered = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.output(gathered.transpose(1, 2).reshape(n, t, width))


class Block(nn.Module):
    """Self-attention and an MLP, each added to the residual stream behind a layer norm of its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "n t width"], mask: Bool[Tensor, "n t"]) -> Float[Tensor, "n t width"]:
        """The residual stream behind the block."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))


class TextTransformer(nn.Module):
    """Token and position embeddings, blocks of self-attention, linear read-out of the first token.

    Parameters
    ----------
    vocabulary, n_classes : int
    width, layers, heads : int, default 32, 3, 4
    length : int, default 64
        Tokens in the longest text.
    padding : int, default 0
        As in `AttentiveBiLSTM`. The first token of every text should be one and the same, such as ``[CLS]``.

    References
    ----------
    Vaswani et al.: Attention is all you need (2017). Devlin, Chang, Lee, Toutanova: BERT (2019).
    """

    def __init__(
        self, vocabulary: int, n_classes: int = 2, width: int = 32, layers: int = 3, heads: int = 4, length: int = 64,
        padding: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise InputError(f"width must be a multiple of heads, got {width} and {heads}")
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_classes)
        self.padding = padding

    def forward(self, ids: Int[Tensor, "n t"], mask: Bool[Tensor, "n t"] | None = None) -> Float[Tensor, "n classes"]:
        """Logits."""
        if ids.shape[1] > len(self.positions):
            raise InputError(f"texts of {ids.shape[1]} tokens are longer than length={len(self.positions)}")
        keep = ids != self.padding if mask is None else mask
        x = self.embedding(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, keep)
        return self.head(self.norm(x[:, 0]))


def train_classifier(
    make: Callable[[], nn.Module],
    ids: Tensor,
    labels: Tensor,
    *,
    steps: int = 600,
    batch: int = 128,
    rate: float = 2e-3,
    decay: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> nn.Module:
    """Make a classifier and train it: cross-entropy, AdamW, one cycle of the learning rate.

    Parameters
    ----------
    make : callable
        Makes the module, with the random numbers of `seed`.
    ids : Tensor (n, t)
    labels : Tensor (n,)
        Examples; what the module is called with, and the classes.
    steps, batch : int, default 600, 128
        Batches drawn, each a part of a fresh order of all examples.
    rate : float, default 2e-3
        Largest learning rate.
    decay : float, default 0
        Weight decay.
    seed : int, default 0
        The caller's random numbers are not touched.
    progress : bool, default False

    Returns
    -------
    Module
        In evaluation mode.

    Raises
    ------
    InputError
        No examples, as many labels as examples missing, or a parameter out of range.
    """
    for name, value in (("steps", steps), ("batch", batch)):
        at_least(name, value, 1)
    at_least("seed", seed, 0)
    flag("progress", progress)
    if not (is_number(rate) and rate > 0 and is_number(decay) and decay >= 0):
        raise InputError(f"rate must be above 0 and decay at least 0, got {rate!r} and {decay!r}")
    if len(ids) == 0 or len(ids) != len(labels):
        raise InputError(f"each example needs a label: there are {len(ids)} examples and {len(labels)} labels")
    with seeded(seed):
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        rows = (r for _ in count() for r in torch.randperm(len(ids)).split(min(batch, len(ids))))
        bar = track(range(steps), "training", console=Console(stderr=True), transient=True, disable=not progress)
        for _, chosen in zip(bar, rows, strict=False):
            optimizer.zero_grad()
            F.cross_entropy(model(ids[chosen]), labels[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Vocabulary:
    """The words of a corpus, each with an id; 0 is padding, 1 the first token of every text, 2 any other word.

    Parameters
    ----------
    words : tuple of str
        The special words first.
    """

    words: tuple[str, ...]
    ids: dict[str, int] = field(init=False, repr=False)

    special = ("[PAD]", "[CLS]", "[UNK]")

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", {w: i for i, w in enumerate(self.words)})

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], least: int = 2) -> Vocabulary:
        """All words that occur at least `least` times, the most frequent first."""
        counts: dict[str, int] = {}
        for text in texts:
            for word in text:
                counts[word] = counts.get(word, 0) + 1
        kept = sorted((w for w, c in counts.items() if c >= least), key=lambda w: (-counts[w], w))
        return cls((*cls.special, *(w for w in kept if w not in cls.special)))

    def encode(self, texts: Sequence[Sequence[str]], length: int) -> Int[Tensor, "n length"]:
        """Ids of each text, cut or filled up to `length` tokens, the first token included."""
        at_least("length", length, 2)
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            known = [1, *(self.ids.get(word, 2) for word in text[: length - 1])]
            row[: len(known)] = torch.tensor(known)
        return rows

    def decode(self, ids: Any) -> list[str]:
        """The words behind ids."""
        return [self.words[int(i)] for i in ids]
