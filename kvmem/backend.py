"""What runs the prompts of an engine: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvmem.answer import Answer, Prefill
from kvmem.entry import EntryInfo
from kvmem.generate import Sampling
from kvmem.prompt import Span
from kvmem.request import Request
from kvmem.settings import BlendSettings
from kvmem.stream import Deadline, Listener
from kvmem.thread import Turn


class Backend(Protocol):
    """Reads spans and answers requests for one namespace. `Runner` is the one for a model in this process."""

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """An order of `groups` behind `before` of which less has to be read; as given where it does not matter."""

    def has_read(self, span: Span) -> bool:
        """Whether the tokens were read, so that reading them again may be left out."""

    def known(self, span: Span) -> list[EntryInfo]:
        """Every entry of the store of these tokens."""

    def forget(self, span: Span) -> None:
        """Delete every entry of these tokens."""

    def read(self, spans: Sequence[Span], in_place: str | None = None) -> None:
        """Read `spans`, the prefix first, so that a later prompt finds them read."""

    def answer(
        self,
        request: Request,
        blend: BlendSettings,
        sampling: Sampling,
        listener: Listener,
        conversation: bool = False,
    ) -> tuple[Answer, Turn | None]:
        """Answer; in a `conversation`, also what the turn left behind, unless it was cancelled."""

    def answer_all(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, deadline: Deadline
    ) -> list[Answer]:
        """Answer all, in their order."""

    def prefill(self, request: Request, blend: BlendSettings) -> Prefill:
        """The state after reading a prompt. Raises InputError where there is none to be had."""

    def release(self) -> None:
        """Let go of what is kept from one prompt to the next."""

    def close(self) -> None:
        """Let go of everything."""
