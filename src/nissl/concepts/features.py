"""Features of a language model's layer: what activates them, what they write, what adding them does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nissl.arguments import as_path, at_least, flag, instance, is_whole, items
from nissl.errors import InputError, SiteError
from nissl.intervention.calibration import Calibrated, calibrate
from nissl.network import Add, Edit, LanguageModel, Pass, Set
from nissl.runner import Asking, Job, Runner

ROLES = ("neurons", "mlp_out", "resid_pre", "resid_post")


@dataclass(frozen=True)
class Context:
    """A token that uses a feature, and the text around it.

    Attributes
    ----------
    weight : float
    text, position : int
        Which text, and which of its tokens.
    before, token, after : str
    """

    weight: float
    text: int
    position: int
    before: str
    token: str
    after: str

    def __str__(self) -> str:
        return f"{self.weight:.3g}  {self.before}[{self.token}]{self.after}"


@dataclass(frozen=True, eq=False)
class TokenActivations:
    """Activations of one site at the tokens of texts; made by `token_activations`.

    Attributes
    ----------
    values : ndarray (n_tokens, d), float32
        One row a token, texts one after the other; a ``numpy.memmap`` if a file was named.
    text, position : ndarray (n_tokens,) of int
        Where each row comes from.
    ids : tuple of tuple of int
        All tokens of each text.
    site : str
    network : LanguageModel
    """

    values: np.ndarray
    text: np.ndarray
    position: np.ndarray
    ids: tuple[tuple[int, ...], ...]
    site: str
    network: LanguageModel

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.values)

    def of(self, texts: Any) -> TokenActivations:
        """Those of some of the texts, by number."""
        chosen = [int(i) for i in items("texts", texts)]
        if not chosen or not all(0 <= i < len(self.ids) for i in chosen):
            raise InputError(f"texts are numbered 0 to {len(self.ids) - 1}; got {chosen[:10]}")
        rows = np.concatenate([np.flatnonzero(self.text == i) for i in chosen])
        number = np.repeat(np.arange(len(chosen)), [int((self.text == i).sum()) for i in chosen])
        ids = tuple(self.ids[i] for i in chosen)
        return TokenActivations(self.values[rows], number, self.position[rows], ids, self.site, self.network)

    def contexts(self, weights: Any, n: int = 25, window: int = 15) -> list[Context]:
        """The tokens with the largest weights, each with the text around it.

        Parameters
        ----------
        weights : Tensor or ndarray (n_tokens,)
            How strongly each token uses a feature: a column of `SemiNMF.weights_`, of what an SAE encodes.
        n : int, default 25
            Tokens with a weight of 0 or less are left out.
        window : int, default 15
            Tokens of context on each side.
        """
        w = np.asarray(weights.detach().cpu() if isinstance(weights, Tensor) else weights, dtype=np.float64)
        if w.shape != (len(self),):
            raise InputError(f"there are {len(self)} tokens, weights of shape {w.shape} were given")
        at_least("n", n, 1)
        at_least("window", window, 0)
        found = []
        for row in np.argsort(-w, kind="stable")[:n]:
            if not w[row] > 0:
                break
            text, at = int(self.text[row]), int(self.position[row])
            strings = self.network.strings(list(self.ids[text][max(0, at - window) : at + window + 1]))
            here = min(at, window)
            before, after = "".join(strings[:here]), "".join(strings[here + 1 :])
            found.append(Context(float(w[row]), text, at, before, strings[here], after))
        return found

    def by_text(self, weights: Float[Tensor, "n k"], how: str = "mean") -> Float[Tensor, "texts k"]:
        """Mean or largest value over the tokens of each text."""
        if how not in ("mean", "max"):
            raise InputError(f"how must be 'mean' or 'max', got {how!r}")
        index = torch.from_numpy(self.text).to(weights.device)[:, None].expand_as(weights)
        start = weights.new_zeros(len(self.ids), weights.shape[1])
        reduce = "amax" if how == "max" else "mean"
        return start.scatter_reduce(0, index, weights, reduce, include_self=False)


def token_activations(
    network: LanguageModel,
    texts: Sequence[Any],
    site: str,
    *,
    skip_first: bool = True,
    file: str | Path | None = None,
    runner: Runner | None = None,
) -> TokenActivations:
    """Read a site at the tokens of texts, each text by itself.

    Parameters
    ----------
    network : LanguageModel
    texts : sequence of str, or of lists of token ids
    site : str
        Such as ``network.anatomy.site("neurons", 15)``.
    skip_first : bool, default True
        Leave out the first token of each text. It holds nothing but the beginning, and its activations are often larger than
        all others by orders of magnitude.
    file : path, optional
        Write the activations to this file, in float32 and row after row, and give a ``numpy.memmap``: for more activations
        than memory holds.
    runner : Runner, optional

    Returns
    -------
    TokenActivations
        Special tokens are left out.

    Raises
    ------
    InputError
        No text, or one without a token that counts; as `LanguageModel.encode` does.
    """
    instance("network", network, LanguageModel)
    network.locate(site)
    flag("skip_first", skip_first)
    given = items("texts", texts)
    if not given:
        raise InputError("no text was given")
    special = set(getattr(network.tokenizer, "all_special_ids", None) or ())
    encoded = [network.encode([t]) for t in given]
    ids = [[int(i) for i in e["input_ids"][0]] for e in encoded]
    kept = [[p for p, i in enumerate(row) if i not in special and (p or not skip_first)] for row in ids]
    if empty := [i for i, k in enumerate(kept) if not k]:
        raise InputError(f"texts {empty[:5]} have no token that counts; skip_first=False keeps the first one of each")
    starts = np.cumsum([0, *(len(k) for k in kept)])
    values: np.ndarray | None = None

    def ask(i: int) -> Asking[np.ndarray]:
        answer = yield Pass(encoded[i], read=[site], output=False)
        read = answer.reads[site][0]
        if read.ndim != 2:
            raise SiteError(f"{site} has no activation vector for each token, but {tuple(read.shape)} for a text")
        return read[kept[i]].float().cpu().numpy()

    # answers are taken up at once: nothing is gained by keeping them
    runner = runner or Runner(memory=0)
    jobs = (Job("activations", i, network, lambda i=i: ask(i)) for i in range(len(given)))
    for job, read in runner.drive(jobs, len(given), "reading activations"):
        if values is None:
            shape = int(starts[-1]), read.shape[1]
            values = (
                np.empty(shape, np.float32)
                if file is None
                else np.memmap(as_path("file", file), np.float32, "w+", shape=shape)
            )
        values[starts[job.key] : starts[job.key + 1]] = read
    assert values is not None
    return TokenActivations(
        values,
        np.repeat(np.arange(len(given)), [len(k) for k in kept]),
        np.concatenate([np.asarray(k, dtype=np.int64) for k in kept]),
        tuple(tuple(row) for row in ids),
        site,
        network,
    )


def difference_in_means(positive: Any, negative: Any) -> Float[Tensor, " d"]:
    """Direction from the mean of one set of activations (n, d) to that of another, of length 1."""
    means = []
    for name, given in (("positive", positive), ("negative", negative)):
        a = given.values if isinstance(given, TokenActivations) else given
        a = torch.as_tensor(np.asarray(a) if not isinstance(a, Tensor) else a).float()
        if a.ndim != 2 or not len(a):
            raise InputError(f"{name} activations must be a matrix (n, d), got shape {tuple(a.shape)}")
        means.append(a.mean(0))
    if means[0].shape != means[1].shape:
        raise InputError(f"the activations have {len(means[0])} and {len(means[1])} units")
    difference = means[0] - means[1]
    if not float(difference.norm()) > 0:
        raise InputError("both sets of activations have the same mean: there is no direction between them")
    return difference / difference.norm()


@dataclass(frozen=True, eq=False)
class Detection:
    """How well features tell texts with a concept from texts without.

    Attributes
    ----------
    score : Tensor (k,)
        log(mean over texts with the concept / mean over the others) of the largest cosine in a text. Positive: detects. NaN
        where one of the means is not positive.
    positive, negative : Tensor (k,)
        The means. A direction that all activations share inflates both: look at `negative`.
    auc : Tensor (k,)
        Probability that a text with the concept has the larger cosine; ties count half.
    """

    score: Tensor
    positive: Tensor
    negative: Tensor
    auc: Tensor


class Features:
    """Directions at a site of a language model: the features of `SemiNMF`, of an `SAE`, or a difference in means.

    Parameters
    ----------
    network : LanguageModel
    layer : int
    directions : Tensor or ndarray (k, d) or (d,), or an object with such `directions`
    role : {"neurons", "mlp_out", "resid_pre", "resid_post"}, default "neurons"
        Where the activations were read: neurons are what the down projection takes.

    Attributes
    ----------
    directions : Tensor (k, d), float32
        Each of length 1.
    site : str

    Raises
    ------
    InputError
        Directions of another width than the site, zero or not finite.

    References
    ----------
    Shafran, Ronen, Fahn, Ravfogel, Geiger & Geva (2025). Decomposing MLP activations into interpretable features via
    semi-nonnegative matrix factorization.
    """

    def __init__(self, network: LanguageModel, layer: int, directions: Any, *, role: str = "neurons") -> None:
        instance("network", network, LanguageModel)
        if role not in ROLES:
            raise InputError(f"role must be one of {', '.join(ROLES)}; got {role!r}")
        self.site = network.anatomy.site(role, layer)
        given = getattr(directions, "directions", directions)
        with torch.no_grad():
            d = torch.as_tensor(np.asarray(given) if not isinstance(given, Tensor) else given).detach().float()
        d = d[None] if d.ndim == 1 else d
        width = network.anatomy.d_mlp if role == "neurons" else network.anatomy.d_model
        if d.ndim != 2 or not len(d) or d.shape[1] != width:
            raise InputError(
                f"{self.site} has {width} units, directions of shape {tuple(d.shape)} do not fit; (k, {width}) is needed"
            )
        norm = d.norm(dim=1, keepdim=True)
        if not bool(torch.isfinite(norm).all()) or bool((norm == 0).any()):
            bad = (~torch.isfinite(norm) | (norm == 0))[:, 0].nonzero()[:, 0].tolist()
            raise InputError(f"directions {bad[:10]} are zero or not finite; leave dead features out")
        self.network, self.layer, self.role = network, layer, role
        self.directions = d / norm
        self._written: Tensor | None = None

    def __len__(self) -> int:
        """Number of features."""
        return len(self.directions)

    # ---------------------------------------------------------------- what activates them

    def cosines(self, activations: TokenActivations) -> Float[Tensor, "n k"]:
        """Cosine of each token's activation with each feature."""
        if activations.site != self.site:
            raise InputError(f"these are activations of {activations.site}, the features are directions at {self.site}")
        parts = []
        for rows in np.array_split(np.arange(len(activations)), max(1, len(activations) // 4096)):
            a = torch.from_numpy(np.array(activations.values[rows[0] : rows[-1] + 1]))
            parts.append(a @ self.directions.T / a.norm(dim=1, keepdim=True).clamp(min=1e-12))
        return torch.cat(parts)

    def detection(self, positive: Any, negative: Any, runner: Runner | None = None) -> Detection:
        """How well each feature detects a concept.

        Parameters
        ----------
        positive, negative : sequence of str, or TokenActivations
            Texts with the concept and without.
        """
        scores = []
        for name, given in (("positive", positive), ("negative", negative)):
            if not isinstance(given, TokenActivations):
                given = token_activations(self.network, items(name, given), self.site, runner=runner)
            scores.append(given.by_text(self.cosines(given), "max").double())
        p, n = scores
        means = p.mean(0), n.mean(0)
        both = (means[0] > 0) & (means[1] > 0)
        score = torch.where(both, (means[0] / means[1].where(both, 1.0)).log(), math.nan)
        difference = p[:, None] - n[None]
        auc = ((difference > 0).double() + (difference == 0).double() / 2).mean((0, 1))
        return Detection(score, *means, auc)

    # ---------------------------------------------------------------- what they write

    def written(self) -> Float[Tensor, "k d_model"]:
        """What one unit of each feature adds to the residual stream.

        For neurons it is the down projection of the direction, behind the block's own norm where it has one (Gemma): read
        from the network with the direction as its neurons, less what no neuron gives. Elsewhere it is the direction itself.
        """
        if self.role != "neurons":
            return self.directions
        if self._written is None:
            a, out = self.network.anatomy, self.network.anatomy.site("mlp_out", self.layer)
            values = torch.cat([torch.zeros_like(self.directions[:1]), self.directions])
            inputs = self.network.encode([[0]] * len(values))
            question = Pass(inputs, [Set(a.site("neurons", self.layer), values[:, None])], read=[out], output=False)
            read = torch.cat([self.network.run(q).reads[out][:, 0].float().cpu() for q in _split(question)])
            self._written = read[1:] - read[:1]
        return self._written

    def vocabulary(self, feature: int, sign: int = 1, n: int = 50) -> list[tuple[str, float]]:
        """The tokens that a feature promotes: logits of what it writes, taken through the final norm.

        Parameters
        ----------
        feature : int
        sign : {1, -1}, default 1
            Features are signed: look at both ends.
        n : int, default 50

        Returns
        -------
        list of (token, logit)
            Largest first.
        """
        self._require(feature, sign)
        at_least("n", n, 1)
        v = sign * self.written()[feature]
        final = self.network.anatomy.site("final")
        question = Pass(self.network.encode([[0]]), [Set(final, (v / v.norm().clamp(min=1e-12))[None, None])])
        output = self.network.run(question).output
        assert output is not None
        logits, ids = output[0, -1].float().topk(min(n, output.shape[-1]))
        return list(zip(self.network.strings(ids), logits.tolist(), strict=True))

    # ---------------------------------------------------------------- what adding them does

    def edit(self, feature: int, alpha: float, sign: int = 1) -> Edit:
        """Add alpha times a feature at every position, prompts and new tokens alike.

        It is made where the MLP adds to the residual stream. That is the same as adding the direction to the neurons, except
        where a norm of its own stands behind the down projection (Gemma).
        """
        self._require(feature, sign)
        where = "mlp_out" if self.role == "neurons" else self.role
        site = self.network.anatomy.site(where, self.layer)
        return Add(site, (alpha * sign) * self.written()[feature])

    def steer(
        self, feature: int, kl: float = 0.1, sign: int = 1, prompts: Any = "I think that", **settings: Any
    ) -> tuple[Edit, Calibrated]:
        """The edit of a feature whose strength changes the next token by a given amount.

        Parameters
        ----------
        feature : int
        kl : float, default 0.1
            Wanted divergence of the next token's distribution after `prompts`, in nats.
        sign : {1, -1}, default 1
        prompts : str or sequence, default "I think that"
        **settings
            Of `nissl.intervention.calibrate`.

        Returns
        -------
        Edit, Calibrated
            Look at ``reachable``: where it is False no strength gives the divergence, and the edit is that of the nearest.
        """
        found = calibrate(self.network, prompts, lambda a: self.edit(feature, a, sign), kl, **settings)
        return self.edit(feature, found.alpha, sign), found

    def _require(self, feature: int, sign: int) -> None:
        if not (is_whole(feature) and 0 <= feature < len(self)):
            raise InputError(f"the features are 0 to {len(self) - 1}, got {feature!r}")
        if sign not in (1, -1):
            raise InputError(f"sign must be 1 or -1, got {sign!r}")


def _split(question: Pass, rows: int = 256) -> Iterator[Pass]:
    return (question[slice(i, min(i + rows, question.n))] for i in range(0, question.n, rows))


def plot_features(
    weights: Any, groups: Sequence[str], labels: Sequence[str] | None = None, title: str = "", ax: Any = None
) -> Any:
    """Picture of how strongly features are used by texts, grouped.

    Parameters
    ----------
    weights : array_like (n_texts, k)
        For instance `TokenActivations.by_text` of `SemiNMF.weights_`; each feature is shown relative to its largest value.
    groups : sequence of str
        The group of each text; texts are ordered by it.
    labels : sequence of str, optional
        Names of the features.
    title : str
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes
    """
    import matplotlib.pyplot as plt

    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 2 or len(groups) != len(w):
        raise InputError(f"a group for each of the {len(w)} texts is needed, got {len(groups)}")
    names = list(dict.fromkeys(groups))
    order = np.argsort([names.index(g) for g in groups], kind="stable")
    w = w[order] / np.maximum(np.abs(w).max(0), 1e-12)
    # features that belong to a group stand together
    means = np.stack([w[[groups[i] == g for i in order]].mean(0) for g in names])
    columns = np.lexsort((-means.max(0), means.argmax(0)))
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 0.28 * w.shape[1] + 1.4), layout="constrained")
    low = -1 if w.min() < 0 else 0
    image = ax.imshow(
        w[:, columns].T, aspect="auto", cmap="PuOr_r" if low else "cividis", vmin=low, vmax=1, interpolation="nearest"
    )
    edges = np.cumsum([0, *(sum(g == name for g in groups) for name in names)])
    for edge in edges[1:-1]:
        ax.axvline(edge - 0.5, color="white", linewidth=1.5)
    ax.set_xticks((edges[1:] + edges[:-1] - 1) / 2, names)
    ax.set_yticks(range(w.shape[1]), [labels[c] if labels is not None else str(c) for c in columns])
    ax.tick_params(length=0)
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax, label="use, relative to the feature's largest")
    return ax
