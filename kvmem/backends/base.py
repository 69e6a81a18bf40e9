"""Backend: what runs the prompts of an engine, a model in this process or a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvmem.cancellation import Cancellation
from kvmem.kv.entry import EntryInfo
from kvmem.library.request import Request
from kvmem.library.threads import Turn
from kvmem.model.local import LanguageModel
from kvmem.options import Blend, Sampling
from kvmem.prompt.span import Span
from kvmem.results import Answer, Prefill
from kvmem.runtime.channel import Listener
from kvmem.settings import BlendSettings


class Backend(Protocol):
    """Computes spans and answers requests for one namespace."""

    @property
    def local_model(self) -> LanguageModel:
        """The model, if it runs in this process. Raises InputError."""

    @property
    def limitation(self) -> str | None:
        """Why caches are reused as exact prefixes only; None if they can be blended."""

    @property
    def reorders(self) -> bool:
        """Whether chunks are arranged even if all of them fit, since moved text would be computed again."""

    def parse_blend(self, blend: Blend) -> BlendSettings:
        """The settings that an option stands for; None is the engine's own. Raises InputError."""

    def resolve(self, blend: BlendSettings) -> BlendSettings:
        """With a number for `recompute="auto"`, which may have to be measured first."""

    def arrange(self, before: Sequence[Span], groups: Sequence[Sequence[Span]]) -> list[int]:
        """An order of `groups` behind `before` of which less has to be computed; as given where it does not matter."""

    def has_read(self, span: Span) -> bool:
        """Whether the tokens were computed, so that computing them again may be left out."""

    def known(self, span: Span) -> list[EntryInfo]:
        """Every entry of the store of these tokens."""

    def forget(self, span: Span) -> None:
        """Delete every entry of these tokens."""

    def read(self, spans: Sequence[Span], cancellation: Cancellation, in_place: frozenset[str] = frozenset()) -> None:
        """Compute `spans`, the prefix first, so that a later prompt finds them in the store."""

    def answer(
        self,
        request: Request,
        blend: BlendSettings,
        sampling: Sampling,
        listener: Listener,
        cancellation: Cancellation,
        conversation: bool = False,
    ) -> tuple[Answer, Turn | None]:
        """Answer; in a `conversation`, also what the turn left behind, unless it was cancelled."""

    def answer_all(
        self, requests: Sequence[Request], blend: BlendSettings, sampling: Sampling, cancellation: Cancellation
    ) -> list[Answer]:
        """Answer all, in their order."""

    def prefill(self, request: Request, blend: BlendSettings, cancellation: Cancellation) -> Prefill:
        """The state after a prompt. Raises InputError where it is not available."""

    def release(self) -> None:
        """Free what is kept from one prompt to the next."""

    def close(self) -> None:
        """Free everything."""
