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
from kvmem.errors import ModelError, first_line


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

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the chat template tells the model what tools there are."""
        return knows_tools(self.tokenizer)

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

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The chat template applied to `messages`, up to where the answer begins."""
        if not self.tokenizer.chat_template:
            lines = [m["content"] for m in messages]
            bos = self.tokenizer.bos_token or ""
            return bos + "\n\n".join(lines) + "\n\nAnswer:"
        options = {"tools": [dict(tool) for tool in tools]} if tools else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(m) for m in messages], tokenize=False, add_generation_prompt=True, **options
                )
            )
        except Exception as error:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise ModelError(
                    f"The chat template of {self.name!r} rejects these messages: {first_line(error)}. "
                    "Check their roles and order."
                ) from error
            # Templates without a system role (Gemma 2) take the system text at the head of the first turn.
            merged = messages[0]["content"] + "\n\n" + messages[1]["content"]
            return self.render([{**messages[1], "content": merged}, *messages[2:]], tools)


def knows_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template shows tools to the model."""
    if not tokenizer.chat_template:
        return False
    function = {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}
    message = [{"role": "user", "content": "?"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    try:
        with_tools = tokenizer.apply_chat_template(
            message, tools=[{"type": "function", "function": function}], **options
        )
    except Exception:  # a template raises whatever it likes; it does not take tools then
        return False
    return bool(with_tools != tokenizer.apply_chat_template(message, **options))
