"""System prompts as templates of a chain's input."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any

from kvmem import InputError
from kvmem.prompt.layout import CONTEXT, DEFAULT_SYSTEM


@dataclass(frozen=True)
class SystemPrompt:
    """A system prompt, before and behind the documents."""

    before: str
    after: str

    @property
    def pieces(self) -> list[Any]:
        return [self.before, CONTEXT, *([self.after] if self.after else [])]

    def text(self, context: str) -> str:
        return f"{self.before}{context}{self.after}".strip("\n")


def variables(system: str | None) -> list[str]:
    """Names in a template. Raises InputError for one that is not well-formed."""
    try:
        return [name for _, name, _, _ in Formatter().parse(system or "") if name is not None]
    except ValueError as error:
        raise InputError(
            f"The system prompt is not a valid template: {error}. Double the braces that are text: {{{{ and }}}}."
        ) from None


def fill(system: str | None, inputs: dict[str, Any], default: str | None) -> SystemPrompt:
    """A system prompt with the input's variables in place. Raises InputError for one that is missing."""
    if system is None:
        return SystemPrompt((default if default is not None else DEFAULT_SYSTEM) + "\n\n", "")
    names = [name for name in variables(system) if name != "context"]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise InputError(
            f"The system prompt needs {missing[0]!r}, which the input does not have. Give "
            f"{{'input': ..., {missing[0]!r}: ...}}, or double the braces if they are text."
        )
    mark = "\u241f"
    filled = system.format(**{**inputs, "context": mark})
    before, found, after = filled.partition(mark)
    return SystemPrompt(before if found else before + "\n\n", after)
