"""AnyModel: what an engine needs to know of a model, wherever that runs."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from kvmem.cancellation import NEVER, Cancellation
from kvmem.model.chat_template import ChatTemplate
from kvmem.parsing.marks import is_mark


def _batches(texts: Sequence[str], size: int = 512) -> Iterator[list[str]]:
    return (list(texts[first : first + size]) for first in range(0, len(texts), size))


class AnyModel(ABC):
    """A tokenizer with its chat template, and the limits of a model. Text may be given from any thread.

    Attributes:
        tokenizer: one of transformers.
        name: what the model was loaded as.
        parallel: how many prompts it runs at a time.
        separator: token ids between chunks.
    """

    parallel = 1
    separator: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer: Any = tokenizer
        self.name = name
        self._tokenizing = threading.Lock()
        self._template: ChatTemplate | None = None

    @property
    @abstractmethod
    def window(self) -> int:
        """The most tokens a prompt and its answer may have together."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies everything that what is kept of it depends on."""

    def refresh(self) -> None:  # noqa: B027
        """Notice what has changed of the model since the last call; nothing for a model on a server."""

    def close(self) -> None:  # noqa: B027
        """Let go of what it holds; nothing for a model in this process."""

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text that is all of a prompt: the token that begins one, or nothing."""
        with self._tokenizing:
            ids = tuple(self.tokenizer("")["input_ids"][:1])
        return ids if ids and ids[0] == self.tokenizer.bos_token_id else ()

    def is_beyond_window(self, characters: int) -> bool:
        """Whether no text of so many characters fits the window, whatever it says."""
        return characters > self.window and characters > self.window * self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        """In characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    @property
    def template(self) -> ChatTemplate:
        """The chat template; another one if the tokenizer has been given another one."""
        if self._template is None or self._template.source != self.tokenizer.chat_template:
            self._template = ChatTemplate(self.tokenizer, self.name)
        return self._template

    @property
    def knows_tools(self) -> bool:
        """Whether the chat template tells the model about tools, in a format whose calls can be read."""
        return self.template.calls is not None

    @cached_property
    def mark_ids(self) -> frozenset[int]:
        """Special tokens that mark thoughts or tool calls."""
        special = self.special_ids
        marks = {identity for identity, token in special.items() if is_mark(token)}
        return frozenset(marks - {self.tokenizer.eos_token_id})

    @cached_property
    def special_ids(self) -> dict[int, str]:
        """Special tokens by id."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {identity: str(token) for identity, token in added.items() if token.special}

    def decode(self, token_ids: Sequence[int], *, marks: bool = False) -> str:
        """Token ids as text without special tokens; with `marks`, those that mark thoughts or tool calls stay."""
        if not marks or not self.mark_ids:
            return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))
        kept = [token for token in token_ids if token in self.mark_ids or token not in self.special_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def tokenize(self, text: str, *, markup: bool) -> tuple[int, ...]:
        """Token ids of `text` alone. Without `markup`, special tokens written in the text are plain text."""
        return self.tokenize_all([text], markup=markup)[0]

    def tokenize_all(self, texts: Sequence[str], *, markup: bool) -> list[tuple[int, ...]]:
        """Token ids of each text alone, as `tokenize`; many short texts take much less time so than one by one."""
        found: list[tuple[int, ...]] = []
        for some in _batches(texts):
            # Fast tokenizers keep `split_special_tokens` as state between calls.
            with self._tokenizing:
                encoded = self.tokenizer(some, add_special_tokens=False, split_special_tokens=not markup)
            found += map(tuple, encoded["input_ids"])
        return found

    @cached_property
    def tokenizer_digest(self) -> str:
        """Identifies how texts become tokens: the tokenizer, and the separator of chunks."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return hashlib.sha256(f"{rules}{self.separator}".encode()).hexdigest()[:32]

    @cached_property
    def vocabulary(self) -> int:
        """Token ids are smaller than this."""
        return len(self.tokenizer)

    def count_markup(self) -> int:
        """Tokens of the chat template around a system and a user message, and in front of the answer."""
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": "?"}]
        return len(self.tokenize(self.render(messages), markup=True))

    def count_tokens(self, text: str) -> int:
        return len(self.tokenize(text, markup=False))

    def count_all(self, texts: Sequence[str], cancellation: Cancellation = NEVER) -> list[int]:
        """Tokens of each text alone. Raises ClosedError or AnswerTimeoutError when cancelled."""
        counts: list[int] = []
        for some in _batches(texts):
            cancellation.check()
            counts += map(len, self.tokenize_all(some, markup=False))
        return counts

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The chat template applied to `messages`, up to where the answer begins; see `ChatTemplate.render`."""
        return self.template.render(messages, tools, options)
