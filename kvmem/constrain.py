"""Answers that are JSON of a given schema: tokens that would leave it are never drawn (by llguidance)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from kvmem.any_model import AnyModel
from kvmem.errors import InputError, first_line
from kvmem.model import LanguageModel

Schema = Mapping[str, Any]


_SAMPLE = "The night ferry leaves Port Ellery at ten past nine and reaches Saint Orrin at dawn, in any weather."
_LARGEST_INTEGER = 2**53
# How many elements a list of no given length may well get.
_LIKELY_ITEMS = 4
# What ends something outside of strings, outermost first.
_CLOSING = ("}", "]", '"')
# What holds data of the user's, and what joins a schema with others.
_DATA = {"const", "enum", "default", "examples"}
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref"}


def narrow(schema: Schema, characters: int) -> dict[str, Any]:
    """A schema whose JSON is valid under `schema` too, and that a small model can finish.

    Objects that list their properties (and are not combined with others) get no more, strings of no given length share
    `characters`, and integers are those that JSON's readers agree on: a small model would fill any of them until the
    answer is cut off in the middle.
    """
    longest = max(16, characters // max(1, _count_strings(schema)))

    def visit(node: Any, combined: bool = False) -> Any:
        if isinstance(node, list):
            return [visit(item, combined) for item in node]
        if not isinstance(node, Mapping):
            return node
        found = {
            name: value if name in _DATA else visit(value, combined=name == "allOf") for name, value in node.items()
        }
        if isinstance(found.get("properties"), dict) and not combined and not found.keys() & _COMBINING:
            found.setdefault("additionalProperties", False)
        if _is_open_string(found):
            found["maxLength"] = max(longest, found.get("minLength", 0))
        if found.get("type") == "integer" and not found.keys() & {"enum", "const"}:
            if not found.keys() & {"minimum", "exclusiveMinimum"}:
                found["minimum"] = -_LARGEST_INTEGER
            if not found.keys() & {"maximum", "exclusiveMaximum"}:
                found["maximum"] = _LARGEST_INTEGER
        return found

    narrowed: dict[str, Any] = visit(schema)
    return narrowed


def narrow_for(model: AnyModel, schema: Schema, max_tokens: int) -> dict[str, Any]:
    """`schema`, narrowed so that its JSON has a good chance to be complete after `max_tokens`. Raises InputError."""
    if not isinstance(schema, Mapping):
        raise InputError(f"The schema is a {type(schema).__name__}. Give a JSON schema, as a mapping.")
    try:
        return _narrow_for(model, schema, max_tokens)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"The schema is not one: {first_line(error)}. Give a JSON schema.") from error
    except RecursionError:
        raise InputError("The schema is too deep. Give a flatter one.") from None


def _narrow_for(model: AnyModel, schema: Schema, max_tokens: int) -> dict[str, Any]:
    names = json.dumps(dict.fromkeys(_property_names(schema), ""))
    # Rambling is made of short words: fewer characters by token than a text has.
    characters = 0.6 * len(_SAMPLE) / model.count_tokens(_SAMPLE)
    return narrow(schema, int(characters * max(0, max_tokens - model.count_tokens(names))))


def _property_names(node: Any) -> list[str]:
    if isinstance(node, list):
        return [name for item in node for name in _property_names(item)]
    if not isinstance(node, Mapping):
        return []
    own = list(node["properties"]) if isinstance(node.get("properties"), Mapping) else []
    return own + [name for key, value in node.items() if key not in _DATA for name in _property_names(value)]


def _is_open_string(node: Mapping[str, Any]) -> bool:
    return node.get("type") == "string" and not node.keys() & {"maxLength", "enum", "const", "pattern", "format"}


def _count_strings(node: Any) -> int:
    if isinstance(node, list):
        return sum(map(_count_strings, node))
    if not isinstance(node, Mapping):
        return 0
    items = int(node.get("maxItems", _LIKELY_ITEMS)) if "items" in node else 1
    inner = sum(_count_strings(value) for name, value in node.items() if name not in _DATA)
    return int(_is_open_string(node)) + items * inner


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
        self._names = _property_names(schema)
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
