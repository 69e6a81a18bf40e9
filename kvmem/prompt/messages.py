"""Check the messages of a conversation, and find its turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kvmem.errors import EmptyInputError, InputError
from kvmem.prompt.layout import Message, as_pieces
from kvmem.text.document import check_text


def check_question(question: str) -> None:
    """Raises InputError, EmptyInputError."""
    if not isinstance(question, str):
        raise InputError(f"The question is of type {type(question).__name__}. Give a str.")
    check_text(question, "The question")
    if not question.strip():
        raise EmptyInputError("The question is empty. Ask something.")


def check_messages(messages: Sequence[Message]) -> list[Message]:
    """The messages as a list, if they are valid. Raises InputError, EmptyInputError."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InputError('messages is not a list. Give [{"role": "user", "content": "..."}].')
    checked = list(messages)
    if not checked:
        raise EmptyInputError('The list of messages is empty. Give [{"role": "user", "content": "..."}].')
    for message in checked:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f'{message!r} is not a message. Give {{"role": "user", "content": "..."}}.')
        check_text(text_of(message), "A message")
    return checked


def text_of(message: Message) -> str:
    return "".join(piece.text for piece in as_pieces(message.get("content")))


def characters_of(messages: Sequence[Message]) -> int:
    return sum(len(text_of(message)) for message in messages)


def turns_of(messages: Sequence[Message]) -> list[int]:
    """Where turns begin: behind the system messages at the head, and at every later message of the user."""
    head = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    return [head, *(i for i in range(head + 1, len(messages)) if messages[i]["role"] == "user")]


def check_raw(prompt: str | Sequence[int], vocabulary: int) -> None:
    """Raises InputError, EmptyInputError."""
    if isinstance(prompt, str):
        check_text(prompt, "The prompt")
    elif not isinstance(prompt, Sequence):
        raise InputError(f"The prompt is of type {type(prompt).__name__}. Give a str, or a list of token ids.")
    elif not all(isinstance(token, int) and 0 <= token < vocabulary for token in prompt):
        raise InputError(f"The prompt is not a list of token ids in [0, {vocabulary}). Use this model's tokenizer.")
    if not prompt:
        raise EmptyInputError("The prompt is empty. Give a text or token ids.")
