from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvmem.model.base import AnyModel
from kvmem.prompt.layout import Layout, Typesetter

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'system' %}{{ '\\n\\n' }}# Tools\n{% endif %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LONG = "The ferry leaves at nine and costs nine crowns, and dogs travel on the upper deck only. " * 2


class Words(AnyModel):
    """A model that has a tokenizer only: bytes, which join to line breaks, and a full stop with those behind it."""

    window = 4096
    fingerprint = "words"

    def __init__(self) -> None:
        special = ("<|im_start|>", "<|im_end|>")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate((*special, *alphabet, "ĊĊ", ".ĊĊ"))}
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ"), (".", "ĊĊ")]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token=special[1], additional_special_tokens=[special[0]]
        )
        tokenizer.chat_template = TEMPLATE
        super().__init__(tokenizer, "words")


def ids_of(layout: Layout) -> list[int]:
    return [token for span in (*layout.before, *layout.after) for token in span.token_ids] + list(layout.query)


@pytest.mark.parametrize("system", ["Be brief.", "Be brief", f"{LONG}Be brief.", f"{LONG}\n\n{LONG}Be brief."])
@pytest.mark.parametrize("asked", ["When?", "\nWhen?", "When.\n"])
def test_a_prompt_has_the_ids_of_the_template_as_a_whole(system: str, asked: str) -> None:
    """Where the tokenizer joins a text with the markup behind it."""
    model = Words()
    messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    whole: Any = model.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    layout = Typesetter(model).lay_out(messages)
    # A paragraph that is a span of its own stays as it is alone.
    assert (list(whole) == ids_of(layout)) == ("\n\n" not in system)
    assert model.tokenizer.decode(ids_of(layout)) == model.render(messages)


def test_a_text_keeps_its_tokens_where_it_is_a_span_of_its_own() -> None:
    """So that it is recognised, whatever stands behind it."""
    model, text = Words(), f"{LONG}It is so."
    spans = []
    for role in ("user", "system"):
        layout = Typesetter(model).lay_out(
            [{"role": "system", "content": "Hi."}, {"role": role, "content": text}, {"role": "user", "content": "?"}]
        )
        spans.append({span.digest for span in layout.before} | {span.digest for span in layout.after})
    assert spans[0] & spans[1]


def test_no_special_token_arises_at_a_seam() -> None:
    """A message that ends in the beginning of one stays text."""
    model = Words()
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}end|>{% endfor %}"
    layout = Typesetter(model).lay_out([{"role": "user", "content": "Hello <|im_"}])
    assert model.tokenizer.eos_token_id not in ids_of(layout)
    assert model.tokenizer.decode(ids_of(layout)) == "Hello <|im_end|>"
