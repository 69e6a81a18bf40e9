"""SpanCutter: puts texts together to spans, with the token ids that the whole has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvmem.model.base import AnyModel
from kvmem.prompt.span import Span

# Characters on each side of a seam that are tokenized again; what a tokenizer joins there is shorter.
_AROUND = 32


@dataclass(frozen=True)
class Seam:
    """What a tokenizer makes of two texts together: `before` and `after` become `joined`."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    joined: tuple[int, ...]


class Seams:
    """Finds where a tokenizer joins the ends of two texts."""

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self.between = lru_cache(4096)(self._between)

    def _between(self, text: str, following: str) -> Seam | None:
        """The seam between the end of a text and the beginning of another; None if nothing is joined there."""
        before, after, both = self._model.tokenize_all([text, following, text + following], markup=True)
        if both == before + after or self._special(both) != self._special(before + after):
            return None
        first = _common(before, both)
        last = _common(after[::-1], both[first:][::-1])
        return Seam(before[first:], after[: len(after) - last], both[first : len(both) - last])

    def _special(self, ids: tuple[int, ...]) -> list[int]:
        return [token for token in ids if token in self._model.special_ids]

    def is_plain(self, text: str) -> bool:
        """Whether a text has no special token in it, which would be interpreted."""
        return not any(token in text for token in self._model.special_ids.values())


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many items are the same from the start."""
    pairs = zip(one, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class SpanCutter:
    """Spans, and the tokens that are not in one yet.

    Spans that begin with a text stay as the text alone is, so that it is recognised elsewhere.
    """

    def __init__(self, seams: Seams) -> None:
        self._seams = seams
        self.spans: list[Span] = []
        self.current: list[int] = []
        self._tail = ""
        self._is_text = False

    def close(self) -> None:
        """Make a span of the current tokens."""
        if self.current:
            self.spans.append(Span(tuple(self.current)))
            self.current = []
            self._tail = "" if self._is_text else self._tail

    def put(self, span: Span) -> None:
        """A span that stays as it is."""
        self.close()
        self.spans.append(span)
        self._tail = ""

    def break_off(self) -> None:
        """Nothing is joined with what follows."""
        self.close()
        self._tail = ""

    def add(self, text: str, ids: tuple[int, ...], *, markup: bool) -> None:
        """Add a text to the current tokens."""
        begins = text[:_AROUND]
        if not self.current:
            self._is_text = not markup
            self._tail = self._tail if markup else ""
        if self._tail and (markup or self._seams.is_plain(begins)):
            seam = self._seams.between(self._tail, begins)
            if seam is not None and ids[: len(seam.after)] == seam.after and self._take_back(seam.before):
                self.current += seam.joined
                ids = ids[len(seam.after) :]
        self.current += ids
        ends = text[-_AROUND:]
        plain = markup or self._seams.is_plain(ends)
        self._tail = (self._tail + text if len(text) < _AROUND else text)[-_AROUND:] if plain else ""

    def _take_back(self, ids: tuple[int, ...]) -> bool:
        """Remove the last tokens, if they are these. Returns whether they were."""
        held = self.current or (list(self.spans[-1].token_ids) if self.spans else [])
        kept = len(held) - len(ids)
        if kept < 0 or tuple(held[kept:]) != ids:
            return False
        if self.current:
            self.current = held[:kept]
        elif ids:
            self.spans.pop()
            if kept:
                self.spans.append(Span(tuple(held[:kept])))
        return True
