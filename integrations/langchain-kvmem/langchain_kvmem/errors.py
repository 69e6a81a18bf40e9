"""Errors that LangChain's components know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core.exceptions import ContextOverflowError

from kvmem import PromptTooLongError


class ContextTooLongError(PromptTooLongError, ContextOverflowError):
    """The prompt does not fit the model's window: kvmem's error, and the one that LangChain's middleware catches."""


@contextmanager
def as_langchain() -> Iterator[None]:
    """Raises ContextTooLongError for PromptTooLongError."""
    try:
        yield
    except ContextTooLongError:
        raise
    except PromptTooLongError as error:
        raise ContextTooLongError(str(error)) from error
