"""Trimmer: leaves out the oldest turns of conversations that do not fit the window."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from threading import Lock

from cachetools import LRUCache

from kvmem.cancellation import Cancellation
from kvmem.errors import PromptTooLongError
from kvmem.model.base import AnyModel
from kvmem.prompt.layout import Layout, Message, TemplateOptions, Typesetter
from kvmem.prompt.messages import characters_of, text_of, turns_of

# This share of the window is made free at once, so that the next turns begin like this one.
_FREED = 0.25
# Tokens of the markup around a message, at most, in the templates of today's models.
_MARKUP = 12


class Trimmer:
    """Lays out the part of a conversation that fits.

    What is left out depends on the beginning of the conversation alone: the next turn leaves out the same, until the
    window is full again. So nearly all prompts continue the one before.
    """

    def __init__(self, model: AnyModel, typesetter: Typesetter) -> None:
        self._model, self._typesetter = model, typesetter
        self._known: LRUCache[str, int] = LRUCache(1 << 14)
        self._lock = Lock()

    def lay_out(
        self,
        messages: list[Message],
        context: int,
        answer: int,
        options: TemplateOptions,
        cancellation: Cancellation,
    ) -> tuple[Layout, int]:
        """The layout of what fits next to the answer and at most a quarter window of context.

        Args:
            messages: The conversation; system messages at its beginning and its last turn are never left out.
            context: Tokens of documents.
            answer: Tokens of the answer.
            options: For the chat template.
            cancellation: Of the work.

        Returns:
            The layout, and the number of messages left out.

        Raises:
            PromptTooLongError: The last turn alone is too long.
        """
        room = self._model.window - answer - min(context, self._model.window // 4)
        starts = turns_of(messages)
        head, last = messages[: starts[0]], messages[starts[-1] :]
        check_size(self._model, characters_of([*head, *last]))
        if len(starts) == 1:
            return self._typesetter.lay_out(messages, options, cancellation), 0
        sizes = self._sizes(messages, cancellation)
        if sum(sizes) - _MARKUP * len(sizes) <= room:
            layout = self._typesetter.lay_out(messages, options, cancellation)
            if layout.tokens <= room:
                return layout, 0
        turns = [sum(sizes[start:end]) for start, end in pairwise([*starts, len(messages)])]
        fixed = self._typesetter.lay_out([*head, *last], options, cancellation).tokens - turns[-1]
        asked = [sizes[start] for start in starts] if last else turns
        first = _first_turn(turns, asked, room - fixed, int(_FREED * self._model.window))
        while True:
            cancellation.check()
            kept = [*head, *messages[starts[first] :]]
            layout = self._typesetter.lay_out(kept, options, cancellation)
            if layout.tokens <= room or first + 1 == len(starts):
                return layout, len(messages) - len(kept)
            first += 1

    def _sizes(self, messages: Sequence[Message], cancellation: Cancellation) -> list[int]:
        """Estimated tokens of each message. Every message is counted once."""
        texts = [_said(message) for message in messages]
        with self._lock:
            known = {text: self._known[text] for text in texts if text in self._known}
        missing = list({text for text in texts if text not in known})
        known |= zip(missing, self._model.count_all(missing, cancellation), strict=True)
        with self._lock:
            self._known.update(known)
        return [known[text] + _MARKUP for text in texts]


def check_size(model: AnyModel, characters: int) -> None:
    """Raise PromptTooLongError if a prompt is obviously too long, without tokenizing it."""
    if model.is_beyond_window(characters):
        raise PromptTooLongError(
            f"The prompt has {characters} characters, more than the model's window of {model.window} tokens "
            "can hold. Shorten it, pass long text as context, or add() it."
        )


def _said(message: Message) -> str:
    calls = message.get("tool_calls")
    return text_of(message) + (json.dumps(calls, default=str) if calls else "")


def _first_turn(turns: Sequence[int], asked: Sequence[int], room: int, freed: int) -> int:
    """The first turn that is kept, as it results from every turn since the beginning.

    turns: tokens of each turn. asked: of its first message, which is all there was of it when it was answered.
    """
    first = used = 0
    for number, (size, question) in enumerate(zip(turns, asked, strict=True)):
        if used + question > room:
            while used + question > room - freed and first < number:
                used -= turns[first]
                first += 1
        used += size
    return first
