"""Answers that are JSON of a given schema: tokens that would leave it are never drawn (by llguidance)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvmem.errors import InputError
from kvmem.model import LanguageModel
from kvmem.narrow import Schema, narrow_for, property_names

# What ends something outside of strings, outermost first.
_CLOSING = ("}", "]", '"')


class JsonConstraint(LogitsProcessor):
    """For one answer: leaves only tokens that continue JSON of `schema`, and its end once the JSON is complete.

    Raises InputError when llguidance is not installed, knows the tokenizer's kind not, or rejects the schema.
    """

    def __init__(self, model: LanguageModel, schema: Schema, max_tokens: int) -> None:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise InputError("Answers in JSON need llguidance: pip install 'kvmem[structured]'.") from error
        # One space after a colon is how models were trained to write JSON; free white space lets small ones ramble.
        options: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            narrowed = json.dumps(narrow_for(model, schema, max_tokens))
            grammar = LLMatcher.grammar_from_json_schema(narrowed, overrides=options)
        except (TypeError, ValueError) as error:
            raise InputError(f"The schema is not one: {error}. Give a JSON schema.") from error
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
            raise InputError(f"The schema cannot be followed: {self._matcher.get_error()}. Give a JSON schema.")

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
        """Whether what is left of the answer is just enough for the names not written yet, and marks around them."""
        left = self._max_tokens - len(self._written)
        text = str(self._model.tokenizer.decode(self._written))
        missing = [name for name in dict.fromkeys(self._names) if f'"{name}"' not in text]
        skeleton = self._model.count_tokens(json.dumps(dict.fromkeys(missing, ""))) if missing else 0
        opened = text.count("{") + text.count("[") - text.count("}") - text.count("]")
        return left <= skeleton + 3 * len(missing) + max(0, opened) + 4

    def _closing(self, allowed: Tensor) -> Tensor:
        """Of the tokens allowed, the one that closes what is open; all of them where there is none."""
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
