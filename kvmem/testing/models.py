"""Tiny random models, and random entries."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from kvmem.kv.entry import Context, EntryKey, KVEntry, digest_tokens
from kvmem.model.local import LanguageModel

_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|bos|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",  # noqa: S106
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="<|im_end|>",  # noqa: S106
        additional_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = _TEMPLATE
    return wrapped


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """A config of `model_type` with two heads' worth of everything; `overrides` win."""
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 2,
        # Random weights of the usual scale attend almost evenly, which would hide mistakes.
        "initializer_range": 0.15,
    }
    return AutoConfig.for_model(model_type, **{**fields, **overrides})


def tiny_model(model_type: str = "llama", seed: int = 0, **overrides: Any) -> LanguageModel:
    """A float32 model of that architecture with random weights, ready in well under a second."""
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32)
    return LanguageModel(hf, tiny_tokenizer(), name=f"tiny-{model_type}")


def make_entry(
    seed: int = 0,
    tokens: int = 5,
    namespace: str = "default",
    fingerprint: str = "model",
    context: tuple[int, ...] = (1, 2, 3),
    dtype: torch.dtype = torch.bfloat16,
) -> KVEntry:
    """A random entry; equal arguments give equal entries."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = tuple(torch.randint(0, 300, (tokens,), generator=generator).tolist())
    before = Context()
    before.extend(context, digest_tokens(context))
    key = EntryKey(namespace, fingerprint, before.digest, digest_tokens(token_ids))
    shape = (2, 2, tokens, 16)
    keys = torch.randn(shape, generator=generator).to(dtype)
    values = torch.randn(shape, generator=generator).to(dtype)
    return KVEntry(key, token_ids, before.length, before.spans, (keys,), (values,))


def same_entry(first: KVEntry, second: KVEntry) -> bool:
    """Whether two entries are equal, bit for bit."""
    one, other = ((*e.keys, *e.values, *e.states) for e in (first, second))
    if len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    return (
        first.key == second.key
        and first.token_ids == second.token_ids
        and (first.start, first.spans) == (second.start, second.spans)
        and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    )
