"""Full prefill, for comparison: the model by itself, with transformers' own cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvmem.decode.generate import call_generate
from kvmem.measure import Clock
from kvmem.model.local import LanguageModel
from kvmem.options import Sampling


def generate_fully(model: LanguageModel, ids: Tensor, max_tokens: int) -> dict[str, Any]:
    """Generate a greedy answer with transformers' own cache, using kvmem's decoding rules.

    `log_probs` has the shape [answer, vocab].
    """
    clock = Clock()
    began = time.perf_counter()
    output: Any = call_generate(
        model,
        Sampling(max_tokens),
        [],
        input_ids=ids[None].to(model.device),
        attention_mask=torch.ones_like(ids)[None].to(model.device),
        past_key_values=DynamicCache(config=model.hf.config.get_text_config()),
        streamer=clock,
        output_logits=True,
        return_dict_in_generate=True,
    )
    done = time.perf_counter()
    tokens = output.sequences[0, len(ids) :].tolist()
    return {
        "text": str(model.tokenizer.decode(tokens, skip_special_tokens=True)),
        "token_ids": tokens,
        "log_probs": torch.stack(output.logits)[:, 0].float().log_softmax(-1),
        "first_token": clock.stamps[1] - began,
        "total": done - began,
        "generated": len(tokens),
    }


@torch.no_grad()
def logits_along(model: LanguageModel, ids: Tensor, answer: Sequence[int]) -> Tensor:
    """Log-probabilities [answer, vocab] along `answer`, from one forward pass over `ids` and `answer`."""
    whole = torch.cat([ids, torch.tensor(answer[:-1], dtype=ids.dtype)]).to(model.device)
    logits: Tensor = model.hf(whole[None], use_cache=False, logits_to_keep=len(answer)).logits[0].float()
    return logits.log_softmax(-1)
