"""Cut texts at natural boundaries chosen by their content, and find the headings each piece is under."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from threading import Lock

from cachetools import LRUCache

from kvmem.cancellation import NEVER, Cancellation
from kvmem.settings import SplitSettings

# Possible boundaries, strongest first: before a heading, after a blank line, after a line, after a sentence.
_CUTS = (
    re.compile(r"(?<=\n)(?=#{1,6} )"),
    re.compile(r"(?<=\n)(?:[ \t]*\r?\n)+"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?;])[ \t]+|(?<=[。！？；])"),
)
_WORDS = re.compile(r"\s+")
_BLANK_LINE = 2
_LONG_PIECE, _LONGEST_PIECE = 192, 512


CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Returns the number of tokens of each text."""


class KnownTexts:
    """Caches how recent texts were cut, so that their tokens are not counted again. Long texts are not cached.

    Args:
        cut: Cuts a text, given a function that counts tokens.
        count: Counts the tokens of several texts; stops when it is cancelled.
    """

    def __init__(
        self,
        cut: Callable[[str, CountTokens], tuple[str, ...]],
        count: Callable[[Sequence[str], Cancellation], Sequence[int]],
        texts: int = 256,
        characters: int = 1 << 16,
    ) -> None:
        self._cut, self._count, self._characters = cut, count, characters
        self._known: LRUCache[str, tuple[str, ...]] = LRUCache(texts)
        self._lock = Lock()

    def __call__(self, text: str, cancellation: Cancellation = NEVER) -> tuple[str, ...]:
        with self._lock:
            found = self._known.get(text)
        if found is None:
            found = self._cut(text, lambda texts: self._count(texts, cancellation))
            if len(text) <= self._characters:
                with self._lock:
                    self._known[text] = found
        return found

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


def split(text: str, count_tokens: CountTokens, settings: SplitSettings) -> tuple[str, ...]:
    """Cut `text` into chunks of at most `settings.maximum` tokens, which concatenate to it.

    A part longer than the target is cut in two at a heading or a blank line; a part longer than the maximum is cut at
    any boundary. Both sides keep the minimum if possible. The strongest boundary wins; among equals, the one before the
    text with the largest digest. Because each boundary is chosen from the whole part, an edit only moves boundaries
    near it (content-defined chunking as in LBFS, SOSP'01, without its sliding window).
    """
    atoms = _atoms(text, count_tokens, settings.maximum)
    ends = [0, *accumulate(atom.tokens for atom in atoms)]
    ranks = [(atom.strength, _digest(after.text)) for atom, after in pairwise(atoms)]
    chunks: list[str] = []
    parts = [(0, len(atoms))]
    while parts:
        first, last = parts.pop()
        cut = _cut(ends, ranks, first, last, settings)
        if cut is not None:
            parts += [(cut, last), (first, cut)]
        elif first < last:
            chunks.append("".join(atom.text for atom in atoms[first:last]))
    return tuple(chunks)


def _cut(
    ends: Sequence[int], ranks: Sequence[tuple[int, str]], first: int, last: int, settings: SplitSettings
) -> int | None:
    """The index at which to cut the atoms [first, last) in two; None if they stay one chunk."""
    size = ends[last] - ends[first]
    if size <= min(settings.target, settings.maximum) or last - first < 2:
        return None
    low = max(first + 1, bisect_left(ends, ends[first] + settings.minimum))
    high = min(last - 1, bisect_right(ends, ends[last] - settings.minimum) - 1)
    if low > high:
        if size <= settings.maximum:
            return None
        # No cut leaves the minimum on both sides, so take the one closest to the middle.
        return min(range(first + 1, last), key=lambda i: abs(2 * ends[i] - ends[first] - ends[last]))
    middle = (ends[first] + ends[last]) / 2
    best = max(range(low, high + 1), key=lambda i: (ranks[i - 1], -abs(ends[i] - middle)))
    return best if size > settings.maximum or ranks[best - 1][0] >= _BLANK_LINE else None


def segment(text: str, count_tokens: CountTokens, minimum: int) -> tuple[str, ...]:
    """Cut `text` so that a text contained in it is cut in the same places wherever it stands; pieces concatenate to it.

    Every paragraph of at least `minimum` tokens is a piece of its own; shorter ones are joined with each other. Long
    paragraphs are cut at ends of lines and sentences chosen by the surrounding text alone, or at the latest at
    `_LONGEST_PIECE` tokens.
    """
    pieces: list[str] = []
    small, size = "", 0
    for part, tokens in _paragraphs(_atoms(text, count_tokens, _LONGEST_PIECE)):
        if tokens >= minimum and small:
            pieces.append(small)
            small, size = "", 0
        small, size = small + part, size + tokens
        if size >= minimum:
            pieces.append(small)
            small, size = "", 0
    return _with_spaces_in_front([*pieces, small] if small else pieces)


def _with_spaces_in_front(pieces: Sequence[str]) -> tuple[str, ...]:
    """Pieces with the space between two sentences at the head of the second, where tokens have it."""
    moved: list[str] = []
    space = ""
    for number, piece in enumerate(pieces):
        last = number + 1 == len(pieces)
        kept = piece if last else piece.rstrip(" ") or piece
        moved.append(space + kept)
        space = piece[len(kept) :]
    return tuple(moved)


def _paragraphs(atoms: Sequence[_Atom]) -> Iterator[tuple[str, int]]:
    """Paragraphs, or pieces of long paragraphs, each with its number of tokens."""
    part, size = "", 0
    for index, atom in enumerate(atoms):
        part, size = part + atom.text, size + atom.tokens
        following = atoms[index + 1] if index + 1 < len(atoms) else None
        chosen = following is not None and size >= _LONG_PIECE and _digest(atom.text + following.text)[0] in "0123"
        full = following is not None and size + following.tokens > _LONGEST_PIECE
        if following is None or atom.strength >= _BLANK_LINE or chosen or full:
            yield part, size
            part, size = "", 0


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class _Atom:
    """A piece that is never cut. strength: rank of the boundary after it; higher is a better place to cut."""

    text: str
    tokens: int
    strength: int


def _atoms(text: str, count_tokens: CountTokens, maximum: int) -> list[_Atom]:
    ends: dict[int, int] = {}
    for strength, pattern in enumerate(reversed(_CUTS)):
        for match in pattern.finditer(text):
            ends[match.end()] = strength
    edges = sorted({0, *ends, len(text)})
    parts = [text[start:end] for start, end in pairwise(edges)]
    strengths = [ends.get(end, 0) for end in edges[1:]]
    sized = zip(parts, count_tokens(parts), strengths, strict=True)
    return [atom for part, size, strength in sized for atom in _fit(part, size, strength, count_tokens, maximum)]


def _fit(text: str, size: int, strength: int, count_tokens: CountTokens, maximum: int) -> list[_Atom]:
    """`text` (`size` tokens) as one atom, or as several if it is longer than `maximum` tokens."""
    if size <= maximum or len(text) == 1:
        return [_Atom(text, size, strength)]
    middle = len(text) // 2
    spaces = [m.end() for m in _WORDS.finditer(text) if 0 < m.end() < len(text)]
    cut = min(spaces, key=lambda s: abs(s - middle)) if spaces else middle
    halves = text[:cut], text[cut:]
    sizes = count_tokens(halves)
    left = _fit(halves[0], sizes[0], 0, count_tokens, maximum)
    return left + _fit(halves[1], sizes[1], strength, count_tokens, maximum)


_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t#]*$")
_FENCE = re.compile(r"^[ \t]*(```|~~~)")


def headings(chunks: Sequence[str], title: str | None) -> list[str]:
    """For each chunk of a Markdown text, a line with the title and the headings that the chunk is under, or "".

    Leaves out a heading that the chunk itself starts with, and a title that is in the first line of the text. Lines in
    code blocks do not count as headings.
    """
    lines = []
    open_ones: dict[int, str] = {}
    fenced = False
    for number, chunk in enumerate(chunks):
        rows = chunk.strip("\n").splitlines() or [""]
        own = None if fenced else _HEADING.match(rows[0])
        level = len(own.group(1)) if own else 7
        path = [text for depth, text in sorted(open_ones.items()) if depth < level]
        if title and title not in path and not (number == 0 and title in rows[0]):
            path.insert(0, title)
        lines.append(" > ".join(path) + "\n\n" if path and not (own and own.group(2) in path) else "")
        for row in rows:
            if _FENCE.match(row):
                fenced = not fenced
            elif not fenced and (found := _HEADING.match(row)):
                depth = len(found.group(1))
                open_ones = {d: text for d, text in open_ones.items() if d < depth} | {depth: found.group(2)}
    return lines
