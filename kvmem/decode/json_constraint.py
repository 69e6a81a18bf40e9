"""Constrain answers to a JSON schema, with llguidance: tokens that would violate the schema are never sampled."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvmem.errors import InputError
from kvmem.model.local import LanguageModel
from kvmem.prompt.json_schema import Schema, narrow_for, property_names

# Tokens that close something, outermost first.
_CLOSING = ("}", "]", '"')


class JsonConstraint(LogitsProcessor):
    """Masks, for one answer, all tokens that do not continue valid JSON under `schema`.

    Raises InputError if llguidance is not installed, does not support this tokenizer type, or rejects the schema.
    """

    def __init__(self, model: LanguageModel, schema: Schema, max_tokens: int) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise InputError("JSON answers need llguidance: pip install 'kvmem[structured]'.") from error
        # Models are trained on JSON with one space after a colon; with free whitespace, small models ramble.
        options: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            narrowed = json.dumps(narrow_for(model, schema, max_tokens))
            grammar = LLMatcher.grammar_from_json_schema(narrowed, overrides=options)
        except (TypeError, ValueError) as error:
            raise InputError(f"The schema is not valid: {error}. Give a JSON schema.") from error
        self._matcher = LLMatcher(model.grammar_tokenizer, grammar)
        self._check()
        self._read = -1
        self._model, self._max_tokens = model, max_tokens
        self._names = property_names(schema)
        self._written: list[int] = []
        vocabulary = model.tokenizer.get_vocab()
        self._marks = [vocabulary[mark] for mark in _CLOSING if mark in vocabulary]
        self._quote, self._letter = vocabulary.get('"'), vocabulary.get("z")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"The schema is not supported: {self._matcher.get_error()}. Give a valid JSON schema.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._read < 0:
            self._read = input_ids.shape[1]
        new = input_ids[0, self._read :].tolist()
        self._read += len(new)
        self._written += new
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
            self._check()
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = torch.zeros(scores.shape[-1], dtype=torch.bool)
        count = min(len(bits), len(allowed))
        allowed[:count] = torch.from_numpy(bits[:count].astype(bool))
        if self._is_time_to_close():
            allowed = self._closing(allowed)
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def _is_time_to_close(self) -> bool:
        """Whether the remaining tokens are just enough for the missing property names and the closing marks."""
        left = self._max_tokens - len(self._written)
        text = str(self._model.tokenizer.decode(self._written))
        missing = [name for name in dict.fromkeys(self._names) if f'"{name}"' not in text]
        skeleton = self._model.count_tokens(json.dumps(dict.fromkeys(missing, ""))) if missing else 0
        opened = text.count("{") + text.count("[") - text.count("}") - text.count("]")
        return left <= skeleton + 3 * len(missing) + max(0, opened) + 4

    def _closing(self, allowed: Tensor) -> Tensor:
        """Only the allowed token that closes what is open; all allowed tokens if none of them does."""
        if self._letter is not None and allowed[self._letter]:  # inside a string
            marks = [self._quote] if self._quote is not None else []
        else:
            marks = self._marks
        for mark in marks:
            if allowed[mark]:
                only = torch.zeros_like(allowed)
                only[mark] = True
                return only
        return allowed
