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
from kvmem.parsing.marks import THOUGHTS
from kvmem.parsing.reader import open_thought
from kvmem.prompt.json_schema import Schema, narrow_for, property_names

# Tokens that close something, outermost first.
_CLOSING = ("}", "]", '"')


class JsonConstraint(LogitsProcessor):
    """Masks, for one answer, all tokens that do not continue valid JSON under `schema`.

    Thoughts are free: JSON begins behind them. Half of the tokens are kept for it.

    Args:
        model: The model.
        schema: The JSON schema.
        max_tokens: Maximum length of the answer, with thoughts.
        opening: The end of the prompt, which may have begun a thought.

    Raises InputError if llguidance is not installed, does not support this tokenizer type, or rejects the schema.
    """

    def __init__(self, model: LanguageModel, schema: Schema, max_tokens: int, opening: str = "") -> None:
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
        self._thoughts = _Thoughts(model, opening, max_tokens // 2)
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
        read = input_ids[0, self._read :].tolist()
        self._read += len(read)
        new = self._thoughts.answer_of(read)
        if new is None:
            return self._thoughts.restrict(scores)
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
        if not self._written and self._thoughts.may_begin:
            allowed[self._thoughts.begin] = True
        return scores.masked_fill(~allowed.to(scores.device), float("-inf"))

    def _is_time_to_close(self) -> bool:
        """Whether the remaining tokens are just enough for the missing property names and the closing marks."""
        left = self._max_tokens - len(self._written) - self._thoughts.length
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


class _Thoughts:
    """The thoughts in front of an answer.

    Attributes:
        length: Their tokens so far.
        begin: The token that begins one, or -1.
        may_begin: Whether the model may begin one now.
    """

    def __init__(self, model: LanguageModel, opening: str, limit: int) -> None:
        self._model, self._limit = model, limit
        self._ids: list[int] = []
        self._end = open_thought(opening)
        self.begin = -1
        vocabulary = model.tokenizer.get_vocab()
        self._ends = {end: vocabulary.get(end, -1) for end in THOUGHTS.values()}
        for begin in THOUGHTS:
            if begin in vocabulary and begin in (model.template.source or "") and THOUGHTS[begin] not in opening:
                self.begin, self._begun_end = vocabulary[begin], THOUGHTS[begin]
        self.may_begin = self._end is None and self.begin >= 0

    @property
    def length(self) -> int:
        return len(self._ids)

    def answer_of(self, new: list[int]) -> list[int] | None:
        """Take the next tokens. Returns those that belong to the answer; None if the next one is still a thought."""
        if self.may_begin and new:
            self.may_begin = False
            if new[0] == self.begin:
                self._end = self._begun_end
        if self._end is None:
            return new
        self._ids += new
        if self._end not in self._model.decode(self._ids, marks=True):
            return None
        self._end = None
        return []

    def restrict(self, scores: Tensor) -> Tensor:
        """The answer must not end in a thought, and a thought must end when half of the tokens are used up."""
        restricted = scores.clone()
        end = self._ends.get(self._end or "", -1)
        if self.length >= self._limit and end >= 0:
            restricted.fill_(float("-inf"))
            restricted[..., end] = 0.0
        restricted[..., self._model.tokenizer.eos_token_id] = float("-inf")
        return restricted
