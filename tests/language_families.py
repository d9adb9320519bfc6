"""Tiny language models of every family that nissl knows, with random weights."""

import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from nissl.network import LanguageModel

WORDS = [f"w{i}" for i in range(46)]
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}

FAMILIES = {
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=48, n_positions=64, vocab_size=50)
    ),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, intermediate_size=48)),
    "gpt_neox, sequential": lambda: t.GPTNeoXForCausalLM(
        t.GPTNeoXConfig(**SIZES, intermediate_size=48, use_parallel_residual=False)
    ),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=8)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED, head_dim=8)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, head_dim=8)),
    "gemma3_text": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, head_dim=8)),
    "opt": lambda: t.OPTForCausalLM(
        t.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)
    ),
}


def word_tokenizer(words: list[str] = WORDS, **more) -> t.PreTrainedTokenizerFast:
    """A tokenizer of whole words, made in memory."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<end>", "<unk>", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", **more
    )


def tiny(family: str, seed: int = 0, dtype: torch.dtype | None = None) -> LanguageModel:
    """A tiny model in evaluation mode, with weights large enough for every part to matter."""
    # the plain attention of transformers, which Gemma 2 keeps, cannot mask whole rows in float64
    dtype = dtype or (torch.float32 if family == "gemma2" else torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]().to(dtype).eval()
        for p in model.parameters():
            p.data = torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + (1.0 if p.ndim == 1 else 0.0)
    return LanguageModel(model, word_tokenizer())
