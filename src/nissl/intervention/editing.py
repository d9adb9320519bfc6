"""Editing facts in a language model: ROME, MEMIT, PMET and ACE are one closed-form update of MLP output matrices."""

from __future__ import annotations

import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nissl.arguments import as_path, at_least, instance, is_number, items
from nissl.attribution.query_value import QueryValueAttribution, checked_layers, top_layers
from nissl.errors import InputError, blame
from nissl.network import Add, LanguageModel, Pass, Rollout, Set, target
from nissl.network.passes import Inputs, rows_of
from nissl.runner import Asking, Job, Runner

OPENINGS = ("The", "Therefore", "Because", "I", "You")
"""What the model continues to make texts that stand before a prompt."""

UNRELATED = (
    "Water freezes at zero degrees", "The opposite of hot is", "She opened the door and walked into the",
    "The first month of the year is", "Two plus two equals", "The sun rises in the", "A triangle has three",
    "The heart pumps blood through the", "He picked up the phone and", "Bees make",
    "The largest planet in the solar system is", "Shakespeare wrote the play", "The cat sat on the",
    "A week has seven", "The colour of grass is", "In the morning she drinks a cup of", "The speed of light is",
    "To bake bread you need flour, water and", "The train was late because of the", "Once upon a",
)  # fmt: skip
"""Prompts about other things, by which locality is measured where none are given."""

_FORMAT = "nissl.edit/1"
_PAPER_SHARE = 6000 / 16384
_TEXT_ROWS = 8


# ---------------------------------------------------------------- the update


def solve(
    keys: Float[Tensor, "d_in k"],
    residuals: Float[Tensor, "d_out k"],
    covariance: Float[Tensor, "d_in d_in"],
    preserve: float,
    ridge: float = 0.0,
) -> Float[Tensor, "d_out d_in"]:
    r"""The change of a matrix that adds residuals at keys and little elsewhere.

    Minimises :math:`\|\Delta K - R\|^2 + \lambda\, E\|\Delta k\|^2` over ordinary keys k with second moment C:
    :math:`\Delta = R K^T (K K^T + \lambda C)^{-1} = R (\lambda I + K^T C^{-1} K)^{-1} K^T C^{-1}`, in float64.

    Parameters
    ----------
    keys : Tensor (d_in, k)
        Inputs of the matrix, one column for each fact.
    residuals : Tensor (d_out, k)
        What its output should gain there.
    covariance : Tensor (d_in, d_in)
        C = E[k k^T] over ordinary text; see `key_covariances`.
    preserve : float
        Lambda. 0 inserts the residuals exactly (ROME).
    ridge : float, default 0
        Added to C as a share of its mean diagonal entry. C of fewer texts than d_in is singular without.

    Raises
    ------
    InputError
        Shapes that do not fit, NaN, a singular C, or linearly dependent keys with `preserve` = 0.

    References
    ----------
    Meng et al.: Mass-editing memory in a transformer (2023).
    """
    d, k = keys.shape
    if residuals.shape[1] != k or covariance.shape != (d, d):
        raise InputError(
            f"{k} keys of size {d} need residuals (d_out, {k}) and a covariance ({d}, {d}); "
            f"got {tuple(residuals.shape)} and {tuple(covariance.shape)}"
        )
    if not (is_number(preserve) and preserve >= 0 and is_number(ridge) and ridge >= 0):
        raise InputError(f"preserve and ridge must be numbers, at least 0; got {preserve!r}, {ridge!r}")
    K, R, C = keys.double(), residuals.double(), covariance.double()
    if not all(bool(torch.isfinite(t).all()) for t in (K, R, C)):
        raise InputError("keys, residuals or covariance hold NaN or infinity")
    C = C + ridge * C.diagonal().mean() * torch.eye(d, dtype=C.dtype, device=C.device)
    factor, failed = torch.linalg.cholesky_ex(C)
    if int(failed):
        raise InputError(
            "the covariance of the keys is singular: give more text, or a ridge above 0 (such as ridge=1e-4)"
        )
    X = torch.cholesky_solve(K, factor)
    with blame(InputError, "the keys of the facts are linearly dependent; give preserve a value above 0"):
        inner = preserve * torch.eye(k, dtype=C.dtype, device=C.device) + K.T @ X
        return R @ torch.linalg.solve(inner, X.T)


def key_covariances(
    network: LanguageModel,
    layers: Iterable[int],
    texts: Sequence[str] | None = None,
    *,
    tokens: int = 8192,
    length: int = 128,
    runner: Runner | None = None,
) -> dict[int, Float[Tensor, "d d"]]:
    """Second moment of the keys of MLP output matrices over ordinary text: C = E[k k^T].

    Parameters
    ----------
    network : LanguageModel
    layers : iterable of int
    texts : sequence of str, optional
        Ordinary text of the kind that must not change; by default the topics of Python's own documentation, English
        prose about programming that comes with every Python.
    tokens : int, default 8192
        How many tokens are read at most. The papers used 100,000 samples of Wikipedia; C needs several times the width
        of the MLP.
    length : int, default 128
        Tokens in one row.
    runner : Runner, optional

    Returns
    -------
    dict of layer to Tensor (d_mlp, d_mlp)
        Float64. Text is read in rows of equal length; nothing but the sums is kept.

    Raises
    ------
    InputError
        Text that is shorter than one row.
    """
    at_least("tokens", tokens, 1)
    at_least("length", length, 1)
    chosen = checked_layers(list(layers), network.anatomy.n_layers)
    rows = _rows_of_text(network, _documentation() if texts is None else texts, tokens, length)
    runner = Runner() if runner is None else runner
    sites = {i: network.anatomy.site("neurons", i) for i in chosen}

    def ask() -> Asking[dict[int, Tensor]]:
        sums: dict[int, Tensor] = {}
        for start in range(0, len(rows), _TEXT_ROWS):
            answer = yield Pass(
                network.encode(rows[start : start + _TEXT_ROWS]), read=list(sites.values()), output=False
            )
            for i, site in sites.items():
                k = answer.reads[site].flatten(0, 1)
                product = (k.T @ k).double()
                sums[i] = sums[i].add_(product) if i in sums else product
        return {i: s / (len(rows) * length) for i, s in sums.items()}

    return _driven(runner, network, ask, "covariance of keys")


def _documentation() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[k] for k in sorted(topics)]


def _rows_of_text(network: LanguageModel, texts: Sequence[str], tokens: int, length: int) -> list[list[int]]:
    """Token ids of texts, one after the other, in rows of equal length."""
    held: list[int] = []
    tokenizer: Any = network.tokenizer
    if tokenizer is None:
        raise InputError(f"{network.name} has no tokenizer to read texts with: LanguageModel(model, tokenizer)")
    for text in items("texts", texts):
        if not isinstance(text, str):
            raise InputError(f"texts must be strings, got {text!r:.60}")
        # a whole document may be longer than the context: only rows of it are run
        held += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        if len(held) >= tokens:
            break
    rows = [held[i : i + length] for i in range(0, min(len(held), max(tokens, length)) - length + 1, length)]
    if not rows:
        raise InputError(f"the texts have {len(held)} tokens; at least {length} are needed (length=)")
    return rows


def _driven(runner: Runner, network: LanguageModel, start: Any, what: str) -> Any:
    ((_, result),) = runner.drive([Job(what, 0, network, start)], 1, what)
    return result


# ---------------------------------------------------------------- requests


@dataclass(frozen=True)
class Request:
    """One fact to be changed.

    Attributes
    ----------
    prompt : str
        Text up to the answer, with ``{}`` where the subject stands: ``"The capital of {} is"``.
    subject : str
    target : str
        The new answer. A space is put before it where neither it nor the prompt has one.
    chains : tuple of str
        Prompts over several hops whose last hop is this fact (``"The capital of the country of the Alps' Matterhorn
        is"``): ACE writes its value layers at their last tokens too.

    Raises
    ------
    InputError
        No ``{}`` or several, an empty subject or target.
    """

    prompt: str
    subject: str
    target: str
    chains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name} must be a text, got {value!r}")
        if self.prompt.count("{}") != 1:
            raise InputError(f"the prompt must hold {{}} once, where the subject stands; got {self.prompt!r}")
        chains = (self.chains,) if isinstance(self.chains, str) else items("chains", self.chains)
        if not all(isinstance(c, str) and c.strip() for c in chains):
            raise InputError(f"chains must be prompts, got {self.chains!r:.80}")
        object.__setattr__(self, "chains", chains)
        if not self.target.startswith(" ") and not self.prompt.endswith(" "):
            object.__setattr__(self, "target", f" {self.target}")

    @classmethod
    def of(cls, prompt: str, subject: str, new_target: str, chains: Sequence[str] = ()) -> Request:
        """From a prompt that names the subject itself; its last occurrence is taken.

        Raises
        ------
        InputError
            The subject does not occur in the prompt.
        """
        if "{}" not in prompt:
            before, found, after = prompt.rpartition(subject) if subject else ("", "", prompt)
            if not found:
                raise InputError(f"the subject {subject!r} does not occur in the prompt {prompt!r}")
            prompt = f"{before}{{}}{after}"
        return cls(prompt, subject, new_target, tuple(chains))

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)


@dataclass(frozen=True, eq=False)
class Place:
    """Where a fact is read and written: prompts that differ in what stands before them, and one position in each.

    Attributes
    ----------
    rows : list of list of int
        Token ids; the first row is the prompt by itself.
    at : tuple of int
        Position in each row: the last token of the subject, or the last token of the prompt.
    target : tuple of int
        Token ids of the new answer.
    essence : list of int or None
        Ids of "{subject} is a" up to the subject's last token: what is said about the subject there should not change.
    """

    rows: list[list[int]]
    at: tuple[int, ...]
    target: tuple[int, ...]
    essence: list[int] | None = None

    def encoded(self, network: LanguageModel, answer: bool = False) -> tuple[Inputs, Int[Tensor, " n"]]:
        """The rows as inputs, with the answer's tokens but the last one behind if wanted; positions in them."""
        more = list(self.target[:-1]) if answer else []
        rows = [row + more for row in self.rows]
        inputs = network.encode(rows, keep=len(self.target) if answer else 1)
        shift = max(map(len, rows))
        return inputs, torch.tensor([shift - len(row) + at for row, at in zip(rows, self.at, strict=True)])

    @property
    def weights(self) -> Float[Tensor, " n"]:
        """How much each row counts in the key: the prompt itself half, those with something before it the other half."""
        n = len(self.rows)
        w = torch.full((n,), 0.5 / max(n - 1, 1))
        w[0] = 0.5 if n > 1 else 1.0
        return w


def place(network: LanguageModel, request: Request, contexts: Sequence[str] = ()) -> Place:
    """Where a request is written: at the last token of its subject.

    Parameters
    ----------
    network : LanguageModel
    request : Request
    contexts : sequence of str
        Texts that stand before the prompt in further rows.

    Raises
    ------
    InputError
        The tokenizer joins the subject's end with what follows, so that it has no last token of its own.
    """
    before, _, _ = request.prompt.partition("{}")
    rows, at = [], []
    for context in ("", *contexts):
        ids, end = _ids(network, context + request.text), _ids(network, f"{context}{before}{request.subject}")
        if ids[: len(end)] != end:
            raise InputError(
                f"the tokenizer joins the end of the subject {request.subject!r} with what follows in {request.text!r}; "
                "put a space or another word behind it"
            )
        rows.append(ids)
        at.append(len(end) - 1)
    return Place(rows, tuple(at), _target_ids(network, request), _ids(network, request.subject))


def chain_places(network: LanguageModel, request: Request, contexts: Sequence[str] = ()) -> list[Place]:
    """Where the chains of a request are written: at their last tokens."""
    found = []
    for chain in request.chains:
        rows = [_ids(network, context + chain) for context in ("", *contexts)]
        found.append(Place(rows, tuple(len(r) - 1 for r in rows), _target_ids(network, request)))
    return found


def _ids(network: LanguageModel, text: str, special: bool = True) -> list[int]:
    inputs = network.encode(text, special=special)
    return inputs["input_ids"][0].tolist()


def _target_ids(network: LanguageModel, request: Request) -> tuple[int, ...]:
    return tuple(_ids(network, request.target, special=False))


def prefixes(network: LanguageModel, n: int = 5, tokens: int = 10, seed: int = 0) -> list[str]:
    """Texts of the model's own to stand before prompts, each ``opening … . ``.

    Parameters
    ----------
    network : LanguageModel
    n : int, default 5
        How many, from the openings "The", "Therefore", "Because", "I", "You".
    tokens : int, default 10
    seed : int, default 0
    """
    at_least("n", n, 0)
    if n > len(OPENINGS):
        raise InputError(f"there are {len(OPENINGS)} openings, {n} contexts were asked for")
    if n == 0:
        return []
    found = network.generate(list(OPENINGS[:n]), max_tokens=tokens, temperature=1.0, top_k=5, seed=seed)
    return [f"{opening}{' '.join(new[0].split(chr(10)))}. " for opening, new in zip(OPENINGS, found, strict=False)]


# ---------------------------------------------------------------- what should be written


@dataclass(frozen=True, eq=False)
class Wanted:
    """What the search for one place found.

    Attributes
    ----------
    value : Tensor (d,)
        What the site should give at the place: the start plus the best change.
    start : Tensor (d,)
    losses : list of float
        One a step.
    reached : bool
        Whether the new answer was the most probable one in every row at the end.
    """

    value: Tensor
    start: Tensor
    losses: list[float]
    reached: bool


def search(
    network: LanguageModel,
    where: Place,
    sites: Sequence[str],
    above: str | None = None,
    *,
    steps: int = 30,
    rate: float = 0.2,
    clamp: float = 0.75,
    decay: float = 0.5,
    kl: float = 1.0,
) -> Asking[Wanted]:
    """The activation that makes the model give the new answer, by gradient descent on what is added at sites.

    A generator of Passes, one or two a step. The loss is the mean negative log-likelihood of the answer over the rows,
    plus `kl` times the divergence of what follows "{subject} is a" at the subject, plus `decay` times Σ |δ| / |start|².

    Parameters
    ----------
    network : LanguageModel
    where : Place
    sites : sequence of str
        Where something is added; the value of the last one is returned.
    above : str, optional
        A site that all of `sites` lie behind. What lies before it does not change with δ: it is run once.
    steps, rate : int, float, default 30, 0.2
        Of Adam.
    clamp : float, default 0.75
        Largest |δ| as a share of |start|.
    decay, kl : float, default 0.5, 1.0
    """
    inputs, at = where.encoded(network, answer=True)
    rows = torch.arange(len(at))
    prompts = [(inputs, at)]
    if where.essence is not None:
        essence = network.encode([where.essence])
        prompts.append((essence, torch.tensor([len(where.essence) - 1])))
    read = [*sites, *([above] if above else [])]
    first = yield [Pass(i, read=read) for i, _ in prompts]
    start = {s: first[0].reads[s][0, at[0]].clone() for s in sites}
    size = {s: start[s].norm().clamp_min(1e-12) for s in sites}
    fixed = [[Set(above, a.reads[above])] if above else [] for a in first]
    labels = torch.tensor([where.target]).expand(len(rows), -1)
    targets = [target.loss(answer_loss, labels)]
    if len(prompts) > 1:
        targets.append(target.loss(divergence, first[1].output[:, -1].log_softmax(-1)))
    masks = [_at(i["input_ids"].shape, p) for i, p in prompts]
    delta = {s: torch.zeros_like(start[s], requires_grad=True) for s in sites}
    optimizer = torch.optim.Adam(list(delta.values()), lr=rate)
    losses: list[float] = []
    reached = False
    for step in range(steps + 1):
        found = {s: d.detach().clone() for s, d in delta.items()}
        answers = yield [
            Pass(i, [*before, *(Add(s, found[s].expand(1, 1, -1), where=mask) for s in sites)], of=of, wrt=list(sites))
            for (i, _), before, of, mask in zip(prompts, fixed, targets, masks, strict=True)
        ]
        nll = float(answers[0].scalar.mean())
        drift = float(answers[1].scalar.mean()) if len(answers) > 1 else 0.0
        reached = bool((answers[0].output.argmax(-1) == labels.to(answers[0].output.device)).all())
        weight = 0.1 if reached else 1.0
        penalty = sum(float(decay * found[s].norm() / size[s] ** 2) for s in sites)
        losses.append(weight * nll + kl * drift + penalty)
        if losses[-1] < 0.05 or (reached and drift <= 0.01) or step == steps:
            break
        optimizer.zero_grad()
        for s, d in delta.items():
            gradient = weight * answers[0].gradients[s][rows, at].mean(0)
            if len(answers) > 1:
                gradient = gradient + kl * answers[1].gradients[s][0, prompts[1][1][0]]
            norm = found[s].norm()
            # |δ| has no gradient at 0, where its subgradient 0 is taken
            d.grad = gradient + (decay * found[s] / norm / size[s] ** 2 if norm > 0 else 0.0)
        optimizer.step()
        with torch.no_grad():
            for s, d in delta.items():
                d.mul_((clamp * size[s] / d.norm().clamp_min(1e-12)).clamp(max=1.0))
    last = sites[-1]
    return Wanted(start[last] + found[last], start[last], losses, reached)


def _at(shape: torch.Size | tuple[int, ...], at: Tensor) -> Tensor:
    """Bool (n, n_tokens, 1): one position a row."""
    mask = torch.zeros(shape[0], shape[1], 1, dtype=torch.bool)
    mask[torch.arange(len(at)), at] = True
    return mask


def answer_loss(output: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the last positions' labels, (n,); `output` is (n, k, v), `labels` (n, k)."""
    return -output[:, -labels.shape[1] :].log_softmax(-1).gather(2, labels[..., None])[..., 0].mean(1)


def divergence(output: Tensor, reference: Tensor) -> Tensor:
    """KL divergence of the last position from reference log-probabilities, (n,)."""
    return (reference.exp() * (reference - output[:, -1].log_softmax(-1))).sum(-1)


# ---------------------------------------------------------------- writing


def rewrite(
    network: LanguageModel,
    layers: Sequence[int],
    places: Sequence[Place],
    wanted: Float[Tensor, "k d"],
    site: str,
    covariances: Mapping[int, Tensor],
    *,
    preserve: float | None = None,
    divisor: str = "root",
    ridge: float = 1e-4,
    log: list[dict[str, Any]] | None = None,
    group: str = "",
) -> Generator[Any, Any, LanguageModel]:
    """Write values into the MLP output matrices of a group of layers, one after the other, ascending.

    A generator of Passes. At each layer, with those before it already changed: K the keys at the places, R the wanted minus
    the current activation at `site`, and the update of `solve` with R / n (MEMIT) or R / √n (PMET), n the layers of
    the group that are left, this one included.

    Parameters
    ----------
    network : LanguageModel
    layers : sequence of int
    places : sequence of Place
    wanted : Tensor (k, d)
        What `site` should give at each place, in the place's first row.
    site : str
        Where the residual is measured.
    covariances : mapping of layer to Tensor (d_mlp, d_mlp)
    preserve : float, optional
        Lambda; by default 6000 for a width of 16,384 (the papers' at GPT-J) and in proportion for others: what counts is
        lambda against k^T C^-1 k, whose mean over ordinary keys is the width.
    divisor : {"root", "share", "none"}, default "root"
        R / √n, R / n or R.
    ridge : float, default 1e-4
    log : list, optional
        Gets a dict for each layer: ``group``, ``layer``, ``residual`` (its mean norm before the write), ``change`` (norm
        of the update), ``share`` (of the matrix's norm).
    group : str
        Name in the log.
    """
    if divisor not in ("root", "share", "none"):
        raise InputError(f"divisor={divisor!r}: choose 'root', 'share' or 'none'")
    encoded = [p.encoded(network) for p in places]
    order = sorted(layers)
    for done, layer in enumerate(order):
        neurons = network.anatomy.site("neurons", layer)
        answers = yield [(network, Pass(i, read=[neurons, site], output=False)) for i, _ in encoded]
        columns, current = [], []
        for p, (_, at), a in zip(places, encoded, answers, strict=True):
            k = a.reads[neurons][torch.arange(len(at)), at]
            columns.append(p.weights.to(k) @ k)
            current.append(a.reads[site][0, at[0]])
        K, R = torch.stack(columns, 1), (wanted.to(current[0]) - torch.stack(current)).T
        left = len(order) - done
        share = {"root": left**0.5, "share": left, "none": 1}[divisor]
        strength = _PAPER_SHARE * len(K) if preserve is None else preserve
        old = network.weight("down", layer).detach()
        update = solve(K, R / share, covariances[layer].to(K.device), strength, ridge)
        network = network.rewritten({("down", layer): (old.double() + update).to(old.dtype)})
        if log is not None:
            log.append({
                "group": group, "layer": layer, "residual": float(R.norm(dim=0).mean()), "change": float(update.norm()),
                "share": float(update.norm() / old.double().norm()),
            })  # fmt: skip
    return network


# ---------------------------------------------------------------- results


@dataclass(frozen=True, eq=False)
class Edited:
    """A language model with changed facts, and what it took.

    Attributes
    ----------
    network : LanguageModel
        The changed model. It shares everything but the changed matrices with the original.
    original : LanguageModel
        Untouched: dropping `network` is a rollback.
    requests : tuple of Request
    method : str
    before, after : dict of weight name to Tensor
        The matrices that differ, as the model keeps them.
    probabilities : Tensor (n_requests, 2)
        Of the new answer, before and after (product over its tokens).
    success : tuple of bool
        Whether every token of the new answer is now the most probable one.
    locality : dict
        ``kept`` (share of unrelated prompts whose most probable token stays), ``divergence`` (mean KL divergence of what
        follows them) and ``n``.
    log : list of dict
        Each write; see `rewrite`.
    layers : dict of group to tuple of int
    """

    network: LanguageModel
    original: LanguageModel
    requests: tuple[Request, ...]
    method: str
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    probabilities: Float[Tensor, "n 2"]
    success: tuple[bool, ...]
    locality: dict[str, float]
    log: list[dict[str, Any]] = field(default_factory=list)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def deltas(self) -> dict[str, Tensor]:
        """What was added to each changed weight."""
        return {name: self.after[name] - self.before[name] for name in self.after}

    def save(self, path: str | Path) -> Path:
        """Write the edit as safetensors: every changed matrix before and after, so that it can be undone bit for bit.

        The file appears whole or not at all.

        Raises
        ------
        InputError
            The file cannot be written.
        """
        from safetensors.torch import save_file

        file = as_path("path", path)
        tensors = {f"before/{k}": v for k, v in self.before.items()} | {f"after/{k}": v for k, v in self.after.items()}
        about = {
            "format": _FORMAT, "method": self.method, "network": self.original.name,
            "requests": json.dumps([{"prompt": r.prompt, "subject": r.subject, "target": r.target,
                                     "chains": list(r.chains)} for r in self.requests]),
        }  # fmt: skip
        part = None
        try:
            handle, part = tempfile.mkstemp(prefix=".part-", suffix=".safetensors", dir=file.parent)
            os.close(handle)
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, about)
            os.replace(part, file)
        except OSError as error:
            raise InputError(f"the edit cannot be written to {file}: {error}") from error
        finally:
            if part is not None and os.path.exists(part):
                os.unlink(part)
        return file


def apply_delta(network: LanguageModel, path: str | Path, undo: bool = False) -> LanguageModel:
    """The model with a saved edit, or without it.

    Parameters
    ----------
    network : LanguageModel
        Stays as it is.
    path : path
        What `Edited.save` wrote.
    undo : bool, default False
        Take the edit back; the weights are then those of before, bit for bit.

    Raises
    ------
    InputError
        No such file, not an edit, or of another model: its matrices must be exactly those that the edit began with (or,
        to undo it, ended with).
    """
    instance("network", network, LanguageModel)
    before, after, _ = read_delta(path)
    old, new = (after, before) if undo else (before, after)
    own = network.weights()
    for name, value in old.items():
        here = own.get(name)
        if here is None or here.shape != value.shape or here.dtype != value.dtype:
            found = "no such weight" if here is None else f"{tuple(here.shape)} {here.dtype}"
            raise InputError(
                f"the edit in {path} changes {name} {tuple(value.shape)} {value.dtype}; {network.name} has {found}"
            )
        if not torch.equal(here, value.to(here.device)):
            other = new[name].to(here.device)
            state = (
                ("carries it already", "does not carry it")[undo] if torch.equal(here, other) else "has other weights"
            )
            raise InputError(
                f"the edit in {path} cannot be {('applied', 'undone')[undo]}: {network.name} {state} ({name})"
            )
    return network.changed(new)


def read_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """What an edit's file holds: matrices before, matrices after, and what is known about it (method, requests, network)."""
    from safetensors import SafetensorError, safe_open

    file = as_path("path", path)
    try:
        with safe_open(file, "pt") as opened:
            about: dict[str, Any] = dict(opened.metadata() or {})
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"the edit {file} cannot be read: {error}") from error
    before = {k.removeprefix("before/"): v for k, v in tensors.items() if k.startswith("before/")}
    after = {k.removeprefix("after/"): v for k, v in tensors.items() if k.startswith("after/")}
    if about.get("format") != _FORMAT or not before or set(before) != set(after):
        raise InputError(f"{file} is no edit written by nissl")
    about["requests"] = json.loads(about["requests"])
    return before, after, about


def probabilities(
    network: LanguageModel, prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Float[Tensor, " n"], list[bool]]:
    """Probability of each answer after its prompt (product over its tokens), and whether it is the most probable one."""
    found, top = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = _ids(network, answer, special=False)
        inputs = network.encode([_ids(network, prompt) + ids[:-1]], keep=len(ids))
        output = network.run(Pass(inputs)).output
        assert output is not None
        labels = torch.tensor([ids], device=output.device)
        found.append(torch.exp(-answer_loss(output, labels)[0] * len(ids)))
        top.append(bool((output[:, -len(ids) :].argmax(-1) == labels).all()))
    return torch.stack(found), top


def locality(original: LanguageModel, changed: LanguageModel, prompts: Sequence[str] = UNRELATED) -> dict[str, float]:
    """How far a changed model differs where it should not.

    Parameters
    ----------
    original, changed : LanguageModel
    prompts : sequence of str
        About other things; by default 20 everyday sentences.

    Returns
    -------
    dict
        ``kept``, ``divergence`` (nats), ``n``.
    """
    texts = items("prompts", prompts)
    if not texts:
        raise InputError("locality needs prompts, none were given")
    log_p = []
    for network in (original, changed):
        inputs = network.encode(list(texts))
        parts = [network.run(Pass(rows_of(inputs, slice(i, i + 16)))).output[:, -1] for i in range(0, len(texts), 16)]  # pyright: ignore
        log_p.append(torch.cat(parts).double().log_softmax(-1))
    kept = (log_p[0].argmax(-1) == log_p[1].argmax(-1)).double().mean()
    kl = (log_p[0].exp() * (log_p[0] - log_p[1])).sum(-1).mean()
    return {"kept": float(kept), "divergence": float(kl), "n": len(texts)}


@dataclass(frozen=True)
class Chain:
    """A question over several facts, in several wordings.

    Attributes
    ----------
    questions : tuple of str
        Prompts whose continuation is the answer.
    answers : tuple of str
        The answer and its aliases.
    """

    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.questions or not self.answers or isinstance(self.questions, str) or isinstance(self.answers, str):
            raise InputError(f"a chain needs a tuple of questions and one of answers, got {self!r:.120}")


def multi_hop(
    network: LanguageModel,
    chains: Sequence[Chain],
    *,
    shots: str = "",
    max_tokens: int = 8,
    runner: Runner | None = None,
) -> list[bool]:
    """Which chains are answered: any of a chain's questions must be continued by one of its answers.

    Parameters
    ----------
    network : LanguageModel
    chains : sequence of Chain
    shots : str
        Text before every question, such as worked examples. With it, an answer may stand anywhere in the continuation's
        first paragraph; without, it must begin it.
    max_tokens : int, default 8
        Greedy.
    runner : Runner, optional

    Notes
    -----
    That any wording of three counts is the convention of MQuAKE. Compare with the same numbers of the unchanged model, and
    say how many chains it did not know: leaving them out makes every number larger.
    """
    runner = Runner() if runner is None else runner
    flat = [(i, shots + q) for i, c in enumerate(chains) for q in c.questions]
    if not flat:
        raise InputError("no chain was given")

    def ask(text: str) -> Generator[Any, Any, str]:
        answer = yield Rollout(network.encode(text), max_tokens=max_tokens)
        return network.continuation(answer.tokens[0, 0])

    said: dict[int, str] = {}
    jobs = (Job("multi-hop", j, network, lambda text=text: ask(text)) for j, (_, text) in enumerate(flat))
    for job, text in runner.drive(jobs, len(flat), "multi-hop questions"):
        said[job.key] = text.strip().split("\n\n")[0].lower()

    def right(text: str, chain: Chain) -> bool:
        wanted = [a.strip().lower() for a in chain.answers]
        if shots:
            return any(a in text for a in wanted)
        return any(text.startswith(a) and not text[len(a) : len(a) + 1].isalnum() for a in wanted)

    return [any(right(said[j], c) for j, (k, _) in enumerate(flat) if k == i) for i, c in enumerate(chains)]


# ---------------------------------------------------------------- editors


@dataclass(frozen=True, eq=False, kw_only=True)
class Editor(ABC):
    """What every way to edit facts is: parameters, and `fit`.

    Parameters
    ----------
    contexts : int, default 5
        Texts of the model's own that stand before the prompt in further rows, so that the edit holds in other contexts.
    unrelated : sequence of str
        Prompts by which locality is measured.
    seed : int, default 0
        Of the contexts.
    """

    contexts: int = 5
    unrelated: tuple[str, ...] = UNRELATED
    seed: int = 0

    name: ClassVar[str]
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        at_least("contexts", self.contexts, 0)
        at_least("seed", self.seed, 0)
        object.__setattr__(self, "unrelated", items("unrelated", self.unrelated))

    @abstractmethod
    def groups(self, network: LanguageModel, requests: Sequence[Request], runner: Runner) -> dict[str, tuple[int, ...]]:
        """Layers that are changed, by name of their group."""

    @abstractmethod
    def _changed(
        self, network: LanguageModel, requests: tuple[Request, ...], groups: dict[str, tuple[int, ...]],
        runner: Runner, log: list[dict[str, Any]], **given: Any,
    ) -> LanguageModel:  # fmt: skip
        """The changed model."""

    def fit(
        self,
        network: LanguageModel,
        requests: Request | Sequence[Request],
        *,
        runner: Runner | None = None,
        **given: Any,
    ) -> Edited:
        """Change facts.

        Parameters
        ----------
        network : LanguageModel
            Never touched.
        requests : Request or sequence of Request
            Written together.
        runner : Runner, optional
        **given
            For closed-form editors: ``covariances`` (from `key_covariances`; otherwise made here) and ``texts`` (for
            them).

        Raises
        ------
        InputError
            A request that does not fit the tokenizer; matrices that are tied to others or quantised.
        SiteError
            The model lacks a part, or keeps the matrix fused with others; says which.
        """
        instance("network", network, LanguageModel)
        many = (requests,) if isinstance(requests, Request) else items("requests", requests)
        if not many or not all(isinstance(r, Request) for r in many):
            raise InputError(f"requests must be made by Request(...), at least one; got {requests!r:.80}")
        runner = Runner() if runner is None else runner
        instance("runner", runner, Runner)
        for r in many:
            place(network, r)
        for i in range(network.anatomy.n_layers):
            require_writable(network, i)
        groups = self.groups(network, many, runner)
        log: list[dict[str, Any]] = []
        changed = self._changed(network, many, groups, runner, log, **given)
        texts, answers = [r.text for r in many], [r.target for r in many]
        p, _ = probabilities(network, texts, answers)
        q, success = probabilities(changed, texts, answers)
        own = network.weights()
        after = {k: v for k, v in changed.overrides.items() if v is not network.overrides.get(k)}
        return Edited(
            changed, network, many, self.name, {k: own[k] for k in after}, after, torch.stack([p, q], 1).cpu(), tuple(success),
            locality(network, changed, self.unrelated), log, groups,
        )  # fmt: skip

    def _contexts(self, network: LanguageModel) -> list[str]:
        return prefixes(network, self.contexts, seed=self.seed)


def require_writable(network: LanguageModel, layer: int) -> None:
    """Raise unless the MLP's output matrix of a layer is a matrix of its own, in floating point."""
    network.weight("down", layer)
    name, _ = network.anatomy.matrix("down", layer)
    named = dict(network.module.named_parameters(remove_duplicate=False))
    if name not in named:
        raise InputError(
            f"{name} is not a parameter that can be changed: it is made from others (quantised or reparametrised)"
        )
    at = named[name].data_ptr()
    if shared := [k for k, p in named.items() if k != name and p.data_ptr() == at and p.numel()]:
        raise InputError(f"{name} is tied to {shared[0]}: an edit would change both; untie them first")


@dataclass(frozen=True, eq=False, kw_only=True)
class ClosedForm(Editor):
    """What ROME, MEMIT, PMET and ACE share: a search for the value, and a closed-form write into groups of layers.

    Parameters
    ----------
    steps, rate, clamp, decay, kl
        Of the search; see `search`.
    preserve : float, optional
        Lambda; see `rewrite`.
    ridge : float, default 1e-4
    tokens : int, default 8192
        Of text from which covariances are made where none are given.
    contexts, unrelated, seed
        See `Editor`.
    """

    steps: int = 30
    rate: float = 0.2
    clamp: float = 0.75
    decay: float = 0.5
    kl: float = 1.0
    preserve: float | None = None
    ridge: float = 1e-4
    tokens: int = 8192

    divisor: ClassVar[str]
    added: ClassVar[tuple[str, ...]]
    """Roles at which the search adds; the last one's value is written."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)
        at_least("tokens", self.tokens, 1)
        for name in ("rate", "clamp"):
            if not (is_number(v := getattr(self, name)) and v > 0):
                raise InputError(f"{name} must be a number above 0, got {v!r}")
        for name in ("decay", "kl", "preserve", "ridge"):
            v = getattr(self, name)
            if not (is_number(v) and v >= 0) and not (name == "preserve" and v is None):
                raise InputError(f"{name} must be a number, at least 0; got {v!r}")

    def search(
        self, network: LanguageModel, places: Sequence[Place], layer: int, runner: Runner | None = None
    ) -> list[Wanted]:
        """What should be written at each place, searched at a layer; all places at once."""
        runner = Runner() if runner is None else runner
        sites = [network.anatomy.site(role, layer) for role in self.added]
        above = network.anatomy.site("resid_pre", layer)
        options = {k: getattr(self, k) for k in ("steps", "rate", "clamp", "decay", "kl")}
        starts = [partial(search, network, p, sites, above, **options) for p in places]
        return runner.collect(network, starts, "searching values", "value search")

    def _changed(
        self,
        network: LanguageModel,
        requests: tuple[Request, ...],
        groups: dict[str, tuple[int, ...]],
        runner: Runner,
        log: list[dict[str, Any]],
        *,
        covariances: Mapping[int, Tensor] | None = None,
        texts: Sequence[str] | None = None,
        wanted: Sequence[Wanted] | None = None,
    ) -> LanguageModel:
        layers = sorted({i for g in groups.values() for i in g})
        last = max(layers)
        contexts = self._contexts(network)
        direct = [place(network, r, contexts) for r in requests]
        # chains are keyed where they end, which only the layers that write the answer can use
        chained = [p for r in requests for p in chain_places(network, r, contexts)] if "value" in groups else []
        if covariances is None:
            covariances = key_covariances(network, layers, texts, tokens=self.tokens, runner=runner)
        elif missing := [i for i in layers if i not in covariances]:
            raise InputError(f"covariances= has no layers {missing}; it has {sorted(covariances)}")
        if wanted is None:
            wanted = self.search(network, [*direct, *chained], last, runner)
        elif len(wanted) != len(direct) + len(chained):
            raise InputError(f"wanted= has {len(wanted)} values for {len(direct) + len(chained)} places")
        values = torch.stack([w.value for w in wanted])
        site = network.anatomy.site(self.added[-1], last)
        changed = network
        for name, group in groups.items():
            places = [*direct, *chained] if name == "value" else direct

            def write(now: LanguageModel = changed, name: str = name, group: Any = group, places: Any = places) -> Any:
                return rewrite(
                    now, group, places, values[: len(places)], site, covariances, preserve=self.preserve,
                    divisor=self.divisor, ridge=self.ridge, log=log, group=name,
                )  # fmt: skip

            changed = _driven(runner, network, write, f"writing {name} layers")
        return changed


def _depth(network: LanguageModel, *shares: float) -> tuple[int, ...]:
    """Layers at shares of the depth."""
    n = network.anatomy.n_layers
    return tuple(dict.fromkeys(min(int(s * n), n - 1) for s in shares))


@dataclass(frozen=True, eq=False, kw_only=True)
class ROME(ClosedForm):
    """One matrix, one fact, inserted exactly.

    Parameters
    ----------
    layer : int, optional
        By default at 5/28 of the depth, as in GPT-J.
    **others
        See `ClosedForm`.

    References
    ----------
    Meng et al.: Locating and editing factual associations in GPT (2022).
    """

    layer: int | None = None
    preserve: float | None = 0.0
    kl: float = 0.0625

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "Meng et al. 2022"
    divisor: ClassVar[str] = "none"
    added: ClassVar[tuple[str, ...]] = ("mlp_out",)

    def groups(self, network: LanguageModel, requests: Sequence[Request], runner: Runner) -> dict[str, tuple[int, ...]]:
        """See `Editor.groups`."""
        given = (
            _depth(network, 5 / 28) if self.layer is None else checked_layers([self.layer], network.anatomy.n_layers)
        )
        return {"all": tuple(given)}


@dataclass(frozen=True, eq=False, kw_only=True)
class MEMIT(ClosedForm):
    """Many facts, spread over neighbouring layers; the value is searched in the residual stream.

    Parameters
    ----------
    layers : sequence of int, optional
        By default 3/28 to 8/28 of the depth, as in GPT-J.
    **others
        See `ClosedForm`.

    References
    ----------
    Meng et al.: Mass-editing memory in a transformer (2023).
    """

    layers: tuple[int, ...] | None = None
    kl: float = 0.0625

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023"
    divisor: ClassVar[str] = "share"
    added: ClassVar[tuple[str, ...]] = ("resid_post",)

    def groups(self, network: LanguageModel, requests: Sequence[Request], runner: Runner) -> dict[str, tuple[int, ...]]:
        """See `Editor.groups`."""
        n = network.anatomy.n_layers
        default = _depth(network, *(i / 28 for i in range(3, 9)))
        return {"all": default if self.layers is None else tuple(checked_layers(self.layers, n))}


@dataclass(frozen=True, eq=False, kw_only=True)
class PMET(MEMIT):
    """As MEMIT, but attention and MLP outputs are searched apart, only the MLP's is written, and R is divided by √n.

    Parameters
    ----------
    layers : sequence of int, optional
    **others
        See `ClosedForm`.

    References
    ----------
    Li et al.: PMET: Precise model editing in a transformer (2024).
    """

    kl: float = 1.0

    name: ClassVar[str] = "pmet"
    paper: ClassVar[str] = "Li et al. 2024"
    divisor: ClassVar[str] = "root"
    added: ClassVar[tuple[str, ...]] = ("attn_out", "mlp_out")


@dataclass(frozen=True, eq=False, kw_only=True)
class ACE(ClosedForm):
    """Attribution-controlled editing: PMET's update in the query layers first, then in the value layers.

    Parameters
    ----------
    query_layers, value_layers : sequence of int, optional
        Where facts are asked for and where answers are written. Where one is not given, both are found by
        `QueryValueAttribution` on the requests' prompts and chains: `n_query` and `n_value` of them, the value layers not
        among the last fourteenth of the depth (at least one layer): attention behind them must carry what is written at
        the subject to the last position.
    n_query, n_value : int, default 6, 3
        As for GPT-J. Fewer in models of few layers.
    **others
        See `ClosedForm`.

    Notes
    -----
    The value is searched at the last value layer, and both groups write the difference that is left there; the log tells
    how much was left for the second group. Value layers are also keyed at the ends of the requests' `chains`.

    References
    ----------
    Yang et al.: ACE: Attribution-controlled knowledge editing for multi-hop factual recall (2025).

    Examples
    --------
    >>> edited = ACE(query_layers=(3, 4, 5), value_layers=(20, 21)).fit(
    ...     net, Request("The capital of {} is", "France", " Rome"))  # doctest: +SKIP
    >>> edited.probabilities, edited.locality  # doctest: +SKIP
    """

    query_layers: tuple[int, ...] | None = None
    value_layers: tuple[int, ...] | None = None
    n_query: int = 6
    n_value: int = 3

    name: ClassVar[str] = "ace"
    paper: ClassVar[str] = "Yang et al. 2025"
    divisor: ClassVar[str] = "root"
    added: ClassVar[tuple[str, ...]] = ("attn_out", "mlp_out")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("n_query", self.n_query, 1)
        at_least("n_value", self.n_value, 1)

    def groups(self, network: LanguageModel, requests: Sequence[Request], runner: Runner) -> dict[str, tuple[int, ...]]:
        """See `Editor.groups`."""
        n = network.anatomy.n_layers
        query, value = self.query_layers, self.value_layers
        if query is None or value is None:
            margin = max(n // 14, 1)  # as in the paper's layers for GPT-J, whose last two are not written
            n_value = min(self.n_value, max(n // 4, 1))
            n_query = min(self.n_query, n - n_value - margin)
            prompts = [p for r in requests for p in (r.text, *r.chains)]
            scores = QueryValueAttribution(layers=2 * n_value + margin).attribute(network, prompts, runner=runner)
            found = top_layers(scores, n_query, n_value, margin)
            query, value = found[0] if query is None else query, found[1] if value is None else value
        query, value = tuple(checked_layers(query, n)), tuple(checked_layers(value, n))
        if set(query) & set(value):
            raise InputError(f"query layers {query} and value layers {value} must not overlap")
        if max(query) > max(value):
            raise InputError(f"the last value layer must come last; query layers {query}, value layers {value}")
        return {"query": query, "value": value}


@dataclass(frozen=True, eq=False, kw_only=True)
class FineTune(Editor):
    """The plain baseline: gradient descent (Adam) on one MLP output matrix until the new answer is given.

    The gradient of the matrix is the sum over positions of (gradient at its output) x (its input), so it takes one Pass a
    step.

    Parameters
    ----------
    layer : int, optional
        By default at 5/28 of the depth, where ROME writes.
    steps : int, default 25
    rate : float, default 1e-3
    threshold : float, default 0.05
        Stops below this mean negative log-likelihood.
    contexts, unrelated, seed
        See `Editor`.

    References
    ----------
    Zhu et al.: Modifying memories in transformer models (2020).
    """

    layer: int | None = None
    steps: int = 25
    rate: float = 1e-3
    threshold: float = 0.05

    name: ClassVar[str] = "fine-tune"
    paper: ClassVar[str] = "Zhu et al. 2020"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)

    def groups(self, network: LanguageModel, requests: Sequence[Request], runner: Runner) -> dict[str, tuple[int, ...]]:
        """See `Editor.groups`."""
        given = (
            _depth(network, 5 / 28) if self.layer is None else checked_layers([self.layer], network.anatomy.n_layers)
        )
        return {"all": tuple(given)}

    def _changed(
        self, network: LanguageModel, requests: tuple[Request, ...], groups: dict[str, tuple[int, ...]],
        runner: Runner, log: list[dict[str, Any]], **given: Any,
    ) -> LanguageModel:  # fmt: skip
        if given:
            raise InputError(f"fine-tuning takes no {', '.join(given)}")
        (layer,) = groups["all"]
        contexts = self._contexts(network)
        encoded = [place(network, r, contexts).encoded(network, answer=True)[0] for r in requests]
        labels = [torch.tensor([_target_ids(network, r)]) for r in requests]
        down = network.anatomy.site("neurons", layer).removesuffix(":in")
        neurons, above = f"{down}:in", network.anatomy.site("resid_pre", layer)

        def descend() -> Generator[Any, Any, LanguageModel]:
            weight = network.weight("down", layer).detach().clone().requires_grad_(True)
            optimizer = torch.optim.Adam([weight], lr=self.rate)
            first = yield [Pass(i, read=[above], output=False) for i in encoded]
            now = network
            for _ in range(self.steps):
                answers = yield [
                    (
                        now,
                        Pass(
                            i, [Set(above, a.reads[above])], read=[neurons], of=target.loss(answer_loss, y), wrt=[down]
                        ),
                    )
                    for i, a, y in zip(encoded, first, labels, strict=True)
                ]
                loss = float(torch.stack([a.scalar.mean() for a in answers]).mean())
                log.append({"group": "all", "layer": layer, "loss": loss})
                if loss < self.threshold:
                    break
                parts = [
                    torch.einsum("nto,nti->oi", a.gradients[down], a.reads[neurons]) / len(a.scalar) for a in answers
                ]
                weight.grad = torch.stack(parts).mean(0)
                optimizer.step()
                now = network.rewritten({("down", layer): weight.detach().clone()})
            return now

        return _driven(runner, network, descend, "fine-tuning")


EDITORS: dict[str, type[Editor]] = {cls.name: cls for cls in (ACE, PMET, MEMIT, ROME, FineTune)}
"""Every way to edit by its key."""


def edit(
    network: LanguageModel,
    prompt: str,
    subject: str,
    new_target: str,
    method: str | Editor = "ace",
    *,
    chains: Sequence[str] = (),
    runner: Runner | None = None,
    covariances: Mapping[int, Tensor] | None = None,
    texts: Sequence[str] | None = None,
    **parameters: Any,
) -> Edited:
    """Change one fact.

    Parameters
    ----------
    network : LanguageModel
        Never touched; the changed model is `Edited.network`.
    prompt : str
        Text up to the answer, naming the subject (``"The capital of France is"``) or with ``{}`` in its place.
    subject : str
    new_target : str
        The new answer.
    method : {"ace", "pmet", "memit", "rome", "fine-tune"} or Editor, default "ace"
    chains : sequence of str
        Prompts over several hops whose last hop is this fact.
    runner : Runner, optional
    covariances, texts
        See `key_covariances`; not for fine-tuning.
    **parameters
        Of the method.

    Returns
    -------
    Edited
        With probabilities of the new answer before and after, and locality.

    Raises
    ------
    InputError
        The subject does not occur in the prompt, no such method or parameter.
    """
    request = Request.of(prompt, subject, new_target, chains)
    if isinstance(method, str):
        if method not in EDITORS:
            raise InputError(f"method={method!r}: choose {', '.join(EDITORS)}")
        try:
            method = EDITORS[method](**parameters)
        except TypeError as error:
            raise InputError(f"{method}: {error}") from error
    elif parameters:
        method = replace(method, **parameters)
    given = {k: v for k, v in (("covariances", covariances), ("texts", texts)) if v is not None}
    return method.fit(network, request, runner=runner, **given)
