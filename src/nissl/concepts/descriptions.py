"""Descriptions of units in words: MILAN, a captioner weighed against what is said anyway; and labels by mutual information."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nissl.arguments import at_least, flag, instance, is_number, items
from nissl.concepts.exemplars import Exemplars, ImageSource, unit_maps
from nissl.errors import InputError
from nissl.network import Ablate, Network, Pass
from nissl.network.site import parse
from nissl.runner import Asking, Job, Runner
from nissl.runner.runner import progress_bar
from nissl.seeds import seeded

PAD, START, STOP, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<start>", "<stop>", "<unknown>")
NOTHING = ""
"""What is said of a unit that never fires."""


def words_of(text: str) -> list[str]:
    """Words and punctuation of a text, in lower case; nothing is left out and nothing is stemmed."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@dataclass(frozen=True)
class Words:
    """The words that a captioner and its prior know, with the numbers they have.

    Attributes
    ----------
    words : tuple of str
        The first four are for padding, start, stop and unknown words.
    """

    words: tuple[str, ...]

    @staticmethod
    def of(texts: Sequence[str]) -> Words:
        """Every word of some texts, in the order of the alphabet."""
        return Words((*SPECIAL, *sorted({w for t in texts for w in words_of(t)})))

    def encode(self, texts: Sequence[str], length: int) -> Int[Tensor, "n length"]:
        """Numbers of the words and the stop behind them, padded; longer texts are cut, and have no stop then."""
        index = {w: i for i, w in enumerate(self.words)}
        rows = [[*(index.get(w, UNKNOWN) for w in words_of(t)), STOP][:length] for t in texts]
        return torch.tensor([row + [PAD] * (length - len(row)) for row in rows]).reshape(len(rows), length)

    def decode(self, tokens: Tensor) -> str:
        """The text up to the first stop."""
        found = tokens.tolist()
        found = found[: found.index(STOP)] if STOP in found else found
        return re.sub(r" ([,.;:!?)])", r"\1", " ".join(self.words[i] for i in found if i != PAD))


def _counted(tokens: Tensor) -> Bool[Tensor, "*n length"]:
    """Tokens up to and including the first stop: those behind it are no part of the text."""
    stops = (tokens == STOP).cumsum(-1) - (tokens == STOP).long()
    return (stops == 0) & (tokens != PAD)


class Prior(nn.Module):
    """Language model of descriptions: how probable a text is, whatever the unit.

    Parameters
    ----------
    words : Words
    embedding, hidden, layers, dropout : default 128, 512, 2, 0.5
    """

    def __init__(
        self, words: Words, embedding: int = 128, hidden: int = 512, layers: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.words = words
        self.embed = nn.Embedding(len(words.words), embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, len(words.words))

    def forward(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length"]:
        """Log-probability of each token given those before it; 0 behind the first stop."""
        before = F.pad(tokens[:, :-1], (1, 0), value=START)
        hidden, _ = self.lstm(self.embed(before))
        log_p = self.out(self.dropout(hidden)).log_softmax(-1)
        return log_p.gather(2, tokens[..., None])[..., 0] * _counted(tokens)

    @torch.no_grad()
    def log_p(self, tokens: Int[Tensor, "*n length"]) -> Float[Tensor, "*n"]:
        """Log-probability of whole texts, up to and including the first stop."""
        self.eval()
        flat = tokens.reshape(-1, tokens.shape[-1])
        return torch.cat([self(part).sum(1) for part in flat.split(1024)]).reshape(tokens.shape[:-1])


class Captioner(nn.Module):
    """Texts from the features of a unit's exemplars: an LSTM that looks at one exemplar more than at another with each word.

    Parameters
    ----------
    words : Words
    width : int
        Of the features of an exemplar.
    embedding, hidden : int, default 128, 512
    attention : int, optional
        min(hidden, width) by default.
    dropout : float, default 0.5

    Notes
    -----
    With features v_1 … v_k: h_0 = tanh(A mean v), c_0 = tanh(B mean v); in each step a = softmax_j(w · tanh(U h + V v_j)),
    z = sigmoid(G h) ⊙ Σ_j a_j v_j, (h, c) = LSTMCell([embed(token), z], (h, c)), log p = logsoftmax(W dropout(h)). Features
    are standardised with the means and deviations of the training set.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, words: Words, width: int, embedding: int = 128, hidden: int = 512, attention: int | None = None,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        attention = attention or min(hidden, width)
        self.words = words
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.embed = nn.Embedding(len(words.words), embedding, padding_idx=PAD)
        self.start_h, self.start_c = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.query, self.key, self.score = (
            nn.Linear(hidden, attention),
            nn.Linear(width, attention),
            nn.Linear(attention, 1),
        )
        self.gate = nn.Linear(hidden, width)
        self.cell = nn.LSTMCell(embedding + width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden, len(words.words))

    def begin(self, features: Float[Tensor, "n k d"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Standardised features, their keys, and the first state."""
        v = (features - self.mean) / self.scale
        mean = v.mean(1)
        return v, self.key(v), self.start_h(mean).tanh(), self.start_c(mean).tanh()

    def step(
        self, token: Tensor, v: Tensor, keys: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One word: log-probabilities of the next (n, words), attention (n, k), and the state after it."""
        a = self.score((self.query(h)[:, None] + keys).tanh())[..., 0].softmax(1)
        z = self.gate(h).sigmoid() * torch.einsum("nk,nkd->nd", a, v)
        h, c = self.cell(torch.cat([self.embed(token), z], 1), (h, c))
        return self.out(self.dropout(h)).log_softmax(1), a, h, c

    def forward(
        self, features: Float[Tensor, "n k d"], tokens: Int[Tensor, "n length"]
    ) -> tuple[Float[Tensor, "n length"], Float[Tensor, "n length k"]]:
        """Log-probability of each token of given texts, 0 behind the first stop; attention at each."""
        v, keys, h, c = self.begin(features)
        before = F.pad(tokens[:, :-1], (1, 0), value=START)
        found, attended = [], []
        for t in range(tokens.shape[1]):
            log_p, a, h, c = self.step(before[:, t], v, keys, h, c)
            found.append(log_p.gather(1, tokens[:, t : t + 1])[:, 0])
            attended.append(a)
        counted = _counted(tokens)
        return torch.stack(found, 1) * counted, torch.stack(attended, 1) * counted[..., None]

    @torch.no_grad()
    def log_p(self, features: Float[Tensor, "n k d"], tokens: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """Log-probability of whole texts, up to and including the first stop, each given its unit."""
        self.eval()
        return self(features, tokens)[0].sum(1)

    @torch.no_grad()
    def beam(
        self, features: Float[Tensor, "n k d"], size: int = 50, length: int = 15
    ) -> tuple[Int[Tensor, "n beam length"], Float[Tensor, "n beam"]]:
        """The most probable texts that a beam search finds, best first; finished ones are kept and no length is preferred.

        Parameters
        ----------
        size : int, default 50
        length : int, default 15
            Tokens at most, the stop among them; a text without a stop by then ends there.

        Returns
        -------
        tokens, log_p
            Minus infinity where there are fewer texts than `size`.
        """
        self.eval()
        n, n_words = len(features), len(self.words.words)
        v, keys, h, c = self.begin(features)
        v, keys, h, c = (t.repeat_interleave(size, 0) for t in (v, keys, h, c))
        tokens = torch.zeros(n, size, 0, dtype=torch.long)
        total = torch.full((n, size), -math.inf)
        total[:, 0] = 0.0
        last = torch.full((n, size), START)
        done = torch.zeros(n, size, dtype=torch.bool)
        only_pad = torch.full((n_words,), -math.inf)
        only_pad[PAD] = 0.0
        for _ in range(length):
            log_p, _, h, c = self.step(last.reshape(-1), v, keys, h, c)
            # a text has at least one word
            log_p[:, [PAD, START, UNKNOWN] if tokens.shape[2] else [PAD, START, UNKNOWN, STOP]] = -math.inf
            log_p = torch.where(done[..., None], only_pad, log_p.reshape(n, size, n_words))
            total, best = (total[..., None] + log_p).flatten(1).topk(size, dim=1)
            origin, last = best // n_words, best % n_words
            tokens = torch.cat([tokens.gather(1, origin[..., None].expand_as(tokens)), last[..., None]], 2)
            done = done.gather(1, origin) | (last == STOP)
            flat = (origin + size * torch.arange(n)[:, None]).reshape(-1)
            h, c = h[flat], c[flat]
            if bool(done.all()):
                break
        return F.pad(tokens, (0, length - tokens.shape[2]), value=PAD), total


def masked_features(
    exemplars: Exemplars, encoder: Network, sites: Sequence[str], masked: bool = True
) -> Float[Tensor, "units k d"]:
    """What an encoder sees where units fire: its maps of the whole image, averaged over the mask.

    Parameters
    ----------
    encoder : Network
        Frozen, and not the network that is explained; a classifier of images such as the demo's.
    sites : sequence of str
        Their units stand one after the other in the d features.
    masked : bool, default True
        False averages over all places.

    Notes
    -----
    The mask is brought to the size of each map bilinearly (with antialiasing, so that small masks do not vanish) and divided by
    its sum; features are 0 where it is empty.
    """
    instance("encoder", encoder, Network)
    names = items("sites", sites)
    if not names:
        raise InputError("the encoder needs a site that is read")
    names = [str(encoder.locate(s)) for s in names]
    parts = []
    for rows in torch.arange(len(exemplars)).split(64):
        some = exemplars[rows]
        masks = some.masks() if masked else None
        found: Tensor | None = None
        for ids, _, reads in some.reads(encoder, names):
            unit, slot = torch.nonzero(torch.isin(some.ids, ids), as_tuple=True)
            image = torch.searchsorted(ids, some.ids[unit, slot])
            pooled = []
            for maps in reads:
                if masks is None:
                    pooled.append(maps.float().mean((2, 3))[image])
                    continue
                weights = F.interpolate(
                    masks[unit, slot][:, None].float(), size=maps.shape[-2:], mode="bilinear", antialias=True
                )[:, 0]
                mass = weights.sum((1, 2), keepdim=True)
                weights = torch.where(mass > 0, weights / mass.where(mass > 0, 1.0), 0.0)
                pooled.append(torch.einsum("phw,pchw->pc", weights, maps[image].float()))
            together = torch.cat(pooled, 1)
            if found is None:
                found = torch.zeros(*some.ids.shape, together.shape[1])
            found[unit, slot] = together
        assert found is not None
        parts.append(found)
    return torch.cat(parts)


@runtime_checkable
class _Captions(Protocol):
    """What `Milan` needs of a captioner."""

    words: Words

    def beam(self, features: Tensor, size: int, length: int) -> tuple[Tensor, Tensor]: ...

    def log_p(self, features: Tensor, tokens: Tensor) -> Tensor: ...


@runtime_checkable
class _Speaks(Protocol):
    """What `Milan` needs of a prior."""

    words: Words

    def log_p(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Description:
    """What is said of a unit.

    Attributes
    ----------
    site : str
    unit : int
    text : str
        Empty for a unit that never fires, or of which nothing can be said.
    score : float
        By which the text was chosen.
    log_p_given, log_p : float
        Of the text given the exemplars, and as such; NaN where the describer has none.
    others : tuple of (str, float)
        The next best texts and their scores.
    """

    site: str
    unit: int
    text: str
    score: float
    log_p_given: float = math.nan
    log_p: float = math.nan
    others: tuple[tuple[str, float], ...] = ()


class Milan:
    """Describe units by the text d that maximises log p(d | exemplars) - lambda log p(d).

    Parameters
    ----------
    encoder : Network
        A frozen classifier of images whose features are averaged over the masks.
    sites : sequence of str
    weight : float, default 0.2
        The lambda above: 0 takes the most probable text, 1 the one with the largest pointwise mutual information. Scores are
        sums over words, so that it does not favour short or long ones.
    beam, length : int, default 50, 15
        Texts that are weighed, found by likelihood alone; tokens at most.
    hidden, embedding : int, default 512, 128
    dropout : float, default 0.5
    rate : float, default 1e-3
        Step size of AdamW.
    epochs, patience : int, default 100, 4
        Training ends when the score of the units held out has not risen for so many epochs; the best weights are kept.
    held_out : float, default 0.1
        Share of the units that are held out.
    masked : bool, default True
        Look only where units fire.
    captioner, prior : optional
        Trained ones, which need no `fit`. A captioner has ``words``, ``beam(features, size, length)`` and
        ``log_p(features, tokens)``; a prior ``words`` and ``log_p(tokens)``. They must know the same words.
    seed : int, default 0
    progress : bool, default True

    Attributes
    ----------
    captioner_, prior_ : the models
    history_ : DataFrame
        Epoch, training loss and BLEU of the captioner; loss of the prior.

    References
    ----------
    Hernandez, Schwettmann, Bau, Bagashvili, Torralba & Andreas (2022). Natural language descriptions of deep visual features.
    """

    def __init__(
        self, encoder: Network, sites: Sequence[str], *, weight: float = 0.2, beam: int = 50, length: int = 15,
        hidden: int = 512, embedding: int = 128, dropout: float = 0.5, rate: float = 1e-3, epochs: int = 100, patience: int = 4,
        held_out: float = 0.1, masked: bool = True, captioner: Any = None, prior: Any = None, seed: int = 0,
        progress: bool = True,
    ) -> None:  # fmt: skip
        instance("encoder", encoder, Network)
        for site in items("sites", sites):
            encoder.locate(site)
        for name, value in (("beam", beam), ("length", length), ("hidden", hidden), ("embedding", embedding),
                            ("epochs", epochs), ("patience", patience)):  # fmt: skip
            at_least(name, value, 1)
        at_least("seed", seed, 0)
        flag("masked", masked)
        if not (is_number(weight) and weight >= 0):
            raise InputError(f"weight must be a number of at least 0, got {weight!r}")
        for name, value in (("dropout", dropout), ("held_out", held_out)):
            if not (is_number(value) and 0 <= value < 1):
                raise InputError(f"{name} must lie between 0 and 1, got {value!r}")
        if not (is_number(rate) and rate > 0):
            raise InputError(f"rate must be a number above 0, got {rate!r}")
        if (captioner is None) != (prior is None):
            raise InputError("a trained captioner needs a prior that knows the same words, and a prior a captioner")
        if captioner is not None and captioner.words != prior.words:
            raise InputError("captioner and prior know different words, so that their probabilities cannot be compared")
        self.encoder, self.sites = encoder, tuple(items("sites", sites))
        self.weight, self.beam, self.length = float(weight), beam, length
        self.hidden, self.embedding, self.dropout, self.rate = hidden, embedding, dropout, rate
        self.epochs, self.patience, self.held_out = epochs, patience, held_out
        self.masked, self.seed, self.progress = masked, seed, progress
        self.captioner_: _Captions | None = captioner
        self.prior_: _Speaks | None = prior

    def fit(self, exemplars: Exemplars, texts: Sequence[Sequence[str]]) -> Milan:
        """Train captioner and prior on units that people described.

        Parameters
        ----------
        exemplars : Exemplars
        texts : sequence of sequence of str
            One or several for each unit; none for units that are left out, such as those that never fire.
        """
        instance("exemplars", exemplars, Exemplars)
        given = [items("texts of a unit", t) for t in items("texts", texts)]
        if len(given) != len(exemplars):
            raise InputError(f"there are {len(exemplars)} units, texts of {len(given)} were given")
        if not all(isinstance(t, str) and words_of(t) for unit in given for t in unit):
            raise InputError("texts must be strings with at least one word")
        units = [i for i, t in enumerate(given) if t]
        n_held = math.ceil(self.held_out * len(units))
        if len(units) - n_held < 1:
            raise InputError(f"{len(units)} units with texts are too few, {n_held} of them held out")
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held, seen = ([units[i] for i in part] for part in (order[:n_held], order[n_held:]))
        words = Words.of([t for u in seen for t in given[u]])
        features = masked_features(exemplars[units], self.encoder, self.sites, self.masked)
        at = {u: i for i, u in enumerate(units)}

        def samples(chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
            pairs = [(at[u], t) for u in chosen for t in given[u]]
            return torch.tensor([i for i, _ in pairs]), words.encode([t for _, t in pairs], self.length)

        train, test = samples(seen), samples(held) if held else None
        references = [[words_of(t) for t in given[u]] for u in held]
        with seeded(self.seed):
            captioner = Captioner(words, features.shape[2], self.embedding, self.hidden, dropout=self.dropout)
            prior = Prior(words, self.embedding, self.hidden, dropout=self.dropout)
            known = features[[at[u] for u in seen]].flatten(0, 1)
            captioner.mean.copy_(known.mean(0))
            captioner.scale.copy_(known.std(0, correction=0).clamp(min=1e-6))

            def caption_loss(rows: Tensor) -> Tensor:
                log_p, attended = captioner(features[train[0][rows]], train[1][rows])
                spread = (1 - attended.sum(1)).square().mean()
                return -log_p.sum() / _counted(train[1][rows]).sum() + spread

            def caption_score() -> float:
                if not references:
                    return math.nan
                tokens, _ = captioner.beam(features[[at[u] for u in held]], 1, self.length)
                return bleu([words_of(words.decode(t)) for t in tokens[:, 0]], references)

            def prior_loss(rows: Tensor) -> Tensor:
                return -prior(train[1][rows]).sum() / _counted(train[1][rows]).sum()

            def prior_score() -> float:
                if test is None:
                    return math.nan
                return float(prior.log_p(test[1]).sum() / _counted(test[1]).sum())

            n = len(train[0])
            curves = [
                self._train(captioner, caption_loss, caption_score, n, 64, "training the captioner"),
                self._train(prior, prior_loss, prior_score, n, 128, "training the prior"),
            ]
        self.captioner_, self.prior_ = captioner, prior
        self.history_ = pd.concat(curves, keys=["captioner", "prior"], names=["model", "epoch"])
        return self

    def _train(
        self, model: nn.Module, loss_of: Callable[[Tensor], Tensor], score_of: Callable[[], float], n: int, batch: int,
        what: str,
    ) -> pd.DataFrame:  # fmt: skip
        optimiser = torch.optim.AdamW(model.parameters(), lr=self.rate)
        best, since, weights, rows = -math.inf, 0, None, []
        with progress_bar(self.progress, self.epochs, what) as done:
            for _ in range(self.epochs):
                model.train()
                total = 0.0
                for part in torch.randperm(n).split(batch):
                    loss = loss_of(part)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    total += float(loss.detach()) * len(part) / n
                score = score_of()
                rows.append({"loss": total, "score": score})
                done()
                if math.isnan(score):
                    continue
                since = 0 if score > best else since + 1
                if score >= best:  # of equal scores the later weights, which have the lower loss
                    # a copy: the tensors of state_dict are the living ones
                    best, weights = score, copy.deepcopy(model.state_dict())
                if since >= self.patience:
                    break
        if weights is not None:
            model.load_state_dict(weights)
        model.eval()
        return pd.DataFrame(rows)

    def describe(self, exemplars: Exemplars) -> Descriptions:
        """The text of each unit; none for units that never fire.

        Raises
        ------
        InputError
            Nothing was fitted.
        """
        captioner, prior = self._models()
        instance("exemplars", exemplars, Exemplars)
        found: list[Description] = []
        for rows in torch.arange(len(exemplars)).split(64):
            some = exemplars[rows]
            live = [int(i) for i in torch.nonzero(some.fires)[:, 0]]
            said: dict[int, Description] = {}
            if live:
                features = masked_features(some[live], self.encoder, self.sites, self.masked)
                tokens, given = captioner.beam(features, self.beam, self.length)
                log_p = prior.log_p(tokens)
                score = torch.where(torch.isfinite(given), given - self.weight * log_p, -math.inf)
                order = score.argsort(dim=1, descending=True, stable=True)
                for j, i in enumerate(live):
                    ranked = [int(b) for b in order[j] if math.isfinite(float(score[j, b]))]
                    texts = [(captioner.words.decode(tokens[j, b]), float(score[j, b])) for b in ranked[:10]]
                    b = ranked[0]
                    said[i] = Description(some.sites[int(some.site[i])], int(some.unit[i]), texts[0][0], texts[0][1],
                                          float(given[j, b]), float(log_p[j, b]), tuple(texts[1:]))  # fmt: skip
            found += [
                said.get(i, Description(some.sites[int(some.site[i])], int(some.unit[i]), NOTHING, math.nan))
                for i in range(len(some))
            ]
        return Descriptions(tuple(found), exemplars.network)

    def score(self, texts: Sequence[str], exemplars: Exemplars) -> Float[Tensor, "units texts"]:
        """Log p(d | exemplars) - lambda log p(d) of given texts for each unit; NaN for units that never fire."""
        captioner, prior = self._models()
        given = items("texts", texts)
        tokens = captioner.words.encode(given, self.length)
        log_p = prior.log_p(tokens)
        features = masked_features(exemplars, self.encoder, self.sites, self.masked)
        n = len(tokens)
        given_units = torch.cat(
            [
                captioner.log_p(some.repeat_interleave(n, 0), tokens.repeat(len(some), 1)).reshape(-1, n)
                for some in features.split(max(1024 // n, 1))
            ]
        )
        return torch.where(exemplars.fires[:, None], given_units - self.weight * log_p, math.nan)

    def _models(self) -> tuple[_Captions, _Speaks]:
        if self.captioner_ is None or self.prior_ is None:
            raise InputError("nothing was fitted: call fit(exemplars, texts) first, or give captioner= and prior=")
        return self.captioner_, self.prior_


def bleu(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], order: int = 4) -> float:
    """BLEU of a set of texts, each against one or several references: clipped n-gram precisions, brevity penalty.

    References
    ----------
    Papineni, Roukos, Ward & Zhu (2002). BLEU: a method for automatic evaluation of machine translation.
    """
    matched, total = np.zeros(order), np.zeros(order)
    length = closest = 0
    for candidate, several in zip(candidates, references, strict=True):
        length += len(candidate)
        closest += min((abs(len(r) - len(candidate)), len(r)) for r in several)[1]
        for n in range(1, order + 1):
            counts = _ngrams(candidate, n)
            most: Counter[tuple[str, ...]] = Counter()
            for r in several:
                most |= _ngrams(r, n)
            matched[n - 1] += sum((counts & most).values())
            total[n - 1] += sum(counts.values())
    used = total > 0  # short texts have no long n-grams
    if not used.any() or not matched[used].all():
        # without smoothing one missing order would hide all progress: half a match, as small samples need
        matched = np.where(used & (matched == 0), 0.5, matched)
    if not used.any():
        return 0.0
    precision = float(np.exp(np.log(matched[used] / total[used]).mean()))
    return precision * math.exp(min(0.0, 1 - closest / length))


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


class LabelDescriber:
    """Describe units by candidate words, without a captioner: the word that holds where the unit fires.

    Parameters
    ----------
    score : {"mutual information", "iou"}, default "mutual information"
        Mutual information, in bits, between "the unit fires here" and "the word holds here" over all places of all images,
        counted 0 where they exclude each other; or intersection over union, as network dissection takes it.
    least : float, default 0.0
        Units whose best score is not above it get no description.

    Notes
    -----
    The joint counts come from one pass over the labelled images, in batches. A label of an image holds at all of its places.

    References
    ----------
    Bau, Zhou, Khosla, Oliva & Torralba (2017). Network dissection: quantifying interpretability of deep visual representations.
    Hernandez et al. (2022). Natural language descriptions of deep visual features.
    """

    def __init__(self, score: str = "mutual information", least: float = 0.0) -> None:
        if score not in ("mutual information", "iou"):
            raise InputError(f"score must be 'mutual information' or 'iou', got {score!r}")
        if not (is_number(least) and least >= 0):
            raise InputError(f"least must be a number of at least 0, got {least!r}")
        self.by, self.least = score, float(least)

    def counts(self, exemplars: Exemplars, images: Any, labels: Tensor) -> Float[Tensor, "four units words"]:
        """Places where (unit fires, word holds), (fires), (holds), and all, as `describe` counts them."""
        source = ImageSource(images)
        if not source.indexed:
            raise InputError("labels are counted over images that can be read by number: give a tensor or a Dataset")
        n = len(images)
        if labels.ndim not in (2, 4) or len(labels) != n or labels.dtype != torch.bool:
            raise InputError(
                f"labels must be bool, (n, words) or (n, words, height, width) with n = {n}; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        size = tuple(source.fetch([0]).shape[-2:])
        if labels.ndim == 4 and tuple(labels.shape[2:]) != size:
            raise InputError(f"images have {size} pixels, masks {tuple(labels.shape[2:])}")
        network, sites = exemplars.network, exemplars.sites
        modules = [network.get_module(parse(s).module) for s in sites]
        where = [torch.nonzero(exemplars.site == i)[:, 0] for i in range(len(sites))]

        def ask(rows: range) -> Asking[Tensor]:
            answer = yield Pass(source.fetch(rows).float(), read=sites, output=False)
            holds = labels[rows.start : rows.stop].float()
            n_places = size[0] * size[1]
            found = torch.zeros(3, len(exemplars), labels.shape[1])
            for site, module, at in zip(sites, modules, where, strict=True):
                if not len(at):
                    continue
                maps = unit_maps(answer.reads[site], module, exemplars.skip).cpu().float()[:, exemplars.unit[at]]
                large = F.interpolate(maps, size=size, mode="bilinear") if maps.shape[2:] != size else maps
                fires = ((large > exemplars.threshold[at, None, None]) & exemplars.fires[at, None, None]).float()
                if holds.ndim == 2:
                    found[0, at] = torch.einsum("nu,nk->uk", fires.sum((2, 3)), holds)
                else:
                    found[0, at] = torch.einsum("nuij,nkij->uk", fires, holds)
                found[1, at] = fires.sum((0, 2, 3))[:, None]
            found[2] = holds.sum((0, 2, 3)) if holds.ndim == 4 else holds.sum(0) * n_places
            return found

        step = exemplars.runner.batch_size or 8
        parts = [range(i, min(i + step, n)) for i in range(0, n, step)]
        jobs = (Job("labels", i, network, lambda p=p: ask(p)) for i, p in enumerate(parts))
        total = torch.zeros(3, len(exemplars), labels.shape[1], dtype=torch.float64)
        for _, found in exemplars.runner.drive(jobs, len(parts), "counting labels"):
            total += found
        return torch.cat([total, torch.full_like(total[:1], float(n * size[0] * size[1]))])

    def scores(self, exemplars: Exemplars, images: Any, labels: Tensor) -> Float[Tensor, "units words"]:
        """Score of each word for each unit."""
        both, fires, holds, n = self.counts(exemplars, images, labels)
        if self.by == "iou":
            return both / (fires + holds - both).clamp(min=1)
        return torch.where(both * n > fires * holds, mutual_information(both / n, fires / n, holds / n), 0.0)

    def describe(self, exemplars: Exemplars, images: Any, labels: Tensor, words: Sequence[str]) -> Descriptions:
        """The word that tells most of where each unit fires.

        Parameters
        ----------
        exemplars : Exemplars
        images : Tensor (n, channels, height, width) or Dataset
            Any images that are labelled; they need not be those of the exemplars.
        labels : Tensor of bool (n, words) or (n, words, height, width)
            Which images, or which of their places, the words hold for.
        words : sequence of str
        """
        instance("exemplars", exemplars, Exemplars)
        names = items("words", words)
        if not isinstance(labels, Tensor) or labels.ndim < 2 or labels.shape[1] != len(names):
            raise InputError(f"{len(names)} words need labels (n, {len(names)}) or (n, {len(names)}, height, width)")
        scores = self.scores(exemplars, images, labels)
        found = []
        for i, row in enumerate(scores):
            order = row.argsort(descending=True, stable=True).tolist()
            ranked = [(str(names[j]), float(row[j])) for j in order if float(row[j]) > self.least]
            text, score = ranked[0] if ranked else (NOTHING, math.nan)
            found.append(Description(exemplars.sites[int(exemplars.site[i])], int(exemplars.unit[i]), text, score,
                                     others=tuple(ranked[1:10])))  # fmt: skip
        return Descriptions(tuple(found), exemplars.network)


def mutual_information(both: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Mutual information in bits of two events, from the probability of both and of each."""

    def term(joint: Tensor, independent: Tensor) -> Tensor:
        possible = (joint > 0) & (independent > 0)
        return torch.where(
            possible, joint * (joint / independent.where(possible, 1.0)).where(possible, 1.0).log2(), 0.0
        )

    # differences of probabilities may come out as -1e-17
    return (
        term(both, a * b)
        + term((a - both).clamp(min=0), a * (1 - b))
        + term((b - both).clamp(min=0), (1 - a) * b)
        + term((1 - a - b + both).clamp(min=0), (1 - a) * (1 - b))
    ).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Descriptions:
    """Descriptions of units, to look through and to act on.

    Attributes
    ----------
    found : tuple of Description
    network : Network
    """

    found: tuple[Description, ...]
    network: Network
    runner: Runner = field(default_factory=lambda: Runner(memory=0))

    def __len__(self) -> int:
        """Number of units."""
        return len(self.found)

    def __iter__(self) -> Iterator[Description]:
        """Each unit's description."""
        return iter(self.found)

    def __getitem__(self, row: int) -> Description:
        """The description of one unit."""
        return self.found[row]

    def table(self) -> pd.DataFrame:
        """Site, unit, text and score, one row a unit."""
        return pd.DataFrame([{"site": d.site, "unit": d.unit, "text": d.text, "score": d.score} for d in self.found])

    def search(self, word: str | Sequence[str], whole: bool = True) -> list[int]:
        """Rows of the units whose description names a word: an audit for a feature that should not be there.

        Parameters
        ----------
        word : str or sequence of str
            Any of several; upper and lower case are one. A phrase is found where its words follow one another.
        whole : bool, default True
            Whole words only. Otherwise "text" is found in "texture", and "word" in "sword".
        """
        wanted = [word] if isinstance(word, str) else list(items("word", word))
        if not wanted or not all(isinstance(w, str) and w.strip() for w in wanted):
            raise InputError(f"a word to search for is needed, got {word!r}")
        form = r"(?<!\w){}(?!\w)" if whole else "{}"
        pattern = re.compile("|".join(form.format(re.escape(w.strip().lower())) for w in wanted))
        return [i for i, d in enumerate(self.found) if pattern.search(d.text.lower())]

    def edit(
        self,
        word: str | Sequence[str],
        validation: tuple[Tensor, Tensor],
        tests: Mapping[str, tuple[Tensor, Tensor]],
        *,
        most: int = 50,
        draws: int = 5,
        whole: bool = True,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Switch off the units whose description names a word, and measure what that does to accuracy.

        Parameters
        ----------
        word : str or sequence of str
            As `search` takes it.
        validation : (images, labels)
            Where units are put in order: each is switched off alone, and the one without which accuracy is highest goes first.
            Images in which the spurious feature misleads.
        tests : mapping of name to (images, labels)
            Where accuracy is reported, such as ``{"clean": …, "adversarial": …}``.
        most : int, default 50
            Units switched off at most.
        draws : int, default 5
            Sets of as many units drawn at random, in random order.
        seed : int, default 0

        Returns
        -------
        DataFrame
            ``method`` ("word", "all units" sorted the same way, "random"), ``draw``, ``n`` (units switched off), ``test``,
            ``accuracy``; and ``row``, the unit switched off last, -1 where none is.

        Raises
        ------
        InputError
            No description names the word; images and labels that do not fit.
        """
        rows = self.search(word, whole)
        if not rows:
            raise InputError(f"no description names {word!r}; there is nothing to switch off")
        at_least("most", most, 1)
        at_least("draws", draws, 1)
        at_least("seed", seed, 0)
        if not isinstance(tests, Mapping) or not tests:
            raise InputError("tests must map names to (images, labels)")
        sets = {"": validation, **tests}
        for name, pair in sets.items():
            if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and len(pair[0]) == len(pair[1]) > 0):
                raise InputError(f"{name or 'validation'}: images and as many labels are needed")
        alone = self._accuracy({(i,): [i] for i in range(len(self))}, sets[""])
        ranked = sorted(range(len(self)), key=lambda i: -alone[(i,)])
        named = [i for i in ranked if i in set(rows)][:most]
        rng = np.random.default_rng(seed)
        orders = {("word", 0): named, ("all units", 0): ranked[: len(named)]}
        orders |= {("random", d): rng.permutation(len(self))[: len(named)].tolist() for d in range(draws)}
        chosen = {(*key, n): order[:n] for key, order in orders.items() for n in range(len(order) + 1)}
        table = []
        for name, pair in tests.items():
            for (method, draw, n), accuracy in self._accuracy(chosen, pair).items():
                last = chosen[method, draw, n][-1] if n else -1
                table.append({"method": method, "draw": draw, "n": n, "test": name, "accuracy": accuracy, "row": last})
        return pd.DataFrame(table)

    def _accuracy(self, chosen: Mapping[Any, Sequence[int]], pair: tuple[Tensor, Tensor]) -> dict[Any, float]:
        """Accuracy without some units, for each key."""
        images, labels = pair

        def ask(rows: Sequence[int]) -> Asking[float]:
            at: dict[str, list[int]] = {}
            for i in rows:
                at.setdefault(self.found[i].site, []).append(self.found[i].unit)
            edits = [Ablate(site, units=units) for site, units in at.items()]
            answer = yield Pass(images, edits)
            if answer.output is None or answer.output.ndim != 2 or answer.output.shape[1] < 2:
                raise InputError("accuracy needs a network with at least two classes, with outputs (n, classes)")
            return float((answer.output.argmax(1).cpu() == labels.cpu()).float().mean())

        starts = [partial(ask, rows) for rows in chosen.values()]
        return dict(zip(chosen, self.runner.collect(self.network, starts, "switching units off", "edit"), strict=True))


def plot_edit(table: pd.DataFrame, test: str, ax: Any = None) -> Any:
    """Picture of an edit: accuracy on one test set over the number of units switched off, from `Descriptions.edit`."""
    import matplotlib.pyplot as plt

    if test not in set(table["test"]):
        raise InputError(f"there is no test {test!r}; there are {sorted(set(table['test']))}")
    if ax is None:
        _, ax = plt.subplots(figsize=(4.5, 2.8), layout="constrained")
    colours = {"random": "#7f7f7f", "all units": "#d55e00", "word": "#0072b2"}
    for method, colour in colours.items():
        some = table[(table["method"] == method) & (table["test"] == test)]
        for draw, line in some.groupby("draw"):
            label = {"word": "units that name the word", "random": "random units"}.get(method, method)
            ax.plot(line["n"], line["accuracy"], color=colour, label=label if draw == 0 else None,
                    linewidth=0.8 if method == "random" else 1.8)  # fmt: skip
    ax.set_xlabel("units switched off")
    ax.set_ylabel(f"accuracy, {test}")
    ax.legend(frameon=False, fontsize=8)
    return ax
