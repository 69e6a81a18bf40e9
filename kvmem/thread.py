"""Threads: what is known of conversations, so that the next turn of one is exact up to its new message."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from kvmem.errors import InputError, UnknownThreadError
from kvmem.prompt import Message, Prompt, Span, as_pieces

# Branches of a conversation (a retry, an edited message) that are known at a time.
_BRANCHES = 4


@dataclass(frozen=True)
class Turn:
    """What a turn left behind. branch: the conversation, if all of it is exact. spans: digests of the tokens of every
    span that was read or said in it, but for those of documents."""

    branch: Branch | None
    spans: frozenset[str]


@dataclass(frozen=True)
class Branch:
    """Tokens that were read one after the other, exactly. edges: where entries of them end, ascending."""

    token_ids: tuple[int, ...]
    edges: tuple[int, ...]

    def shared(self, token_ids: Sequence[int]) -> int:
        """The last edge up to which `token_ids` are the same."""
        pairs = zip(self.token_ids, token_ids, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return max((edge for edge in self.edges if edge <= same), default=0)


class Threads:
    """The conversations of one namespace, by name, kept among a store's documents."""

    def __init__(self, rows: MutableMapping[str, str], namespace: str) -> None:
        self._rows, self._namespace = rows, namespace
        self._lock = threading.Lock()
        self._removed: Counter[str] = Counter()

    def _name(self, thread: str) -> str:
        if not isinstance(thread, str) or not thread:
            raise InputError(f"thread={thread!r} names no conversation. Give a text that is not empty.")
        return "thread:" + json.dumps([self._namespace, thread])

    def names(self) -> list[str]:
        """Those with an answer, in alphabetical order."""
        start = "thread:" + json.dumps([self._namespace])[:-1] + ","
        rows = ((name, raw) for name, raw in self._rows.items() if name.startswith(start))
        return sorted(json.loads(name.removeprefix("thread:"))[1] for name, raw in rows if json.loads(raw)["messages"])

    def messages(self, thread: str) -> list[dict[str, Any]]:
        """The conversation so far, the last answer included. Raises UnknownThreadError."""
        raw = self._rows.get(self._name(thread))
        found: list[dict[str, Any]] = json.loads(raw)["messages"] if raw is not None else []
        if not found:
            raise UnknownThreadError(f"There is no conversation {thread!r}. Known are: {self.names()!r}.")
        return found

    def branches(self, thread: str, fingerprint: str) -> list[Branch]:
        """What is known of it with that model, newest first."""
        raw = self._rows.get(self._name(thread))
        found = json.loads(raw)["branches"].get(fingerprint, []) if raw is not None else []
        return [Branch(tuple(row["token_ids"]), tuple(row["edges"])) for row in found]

    def removals(self, thread: str) -> int:
        """How often it was removed, for `keep`."""
        return self._removed[self._name(thread)] + self._removed[""]

    def keep(
        self,
        thread: str,
        fingerprint: str,
        turn: Turn,
        removals: int,
        messages: Sequence[Message] | None = None,
    ) -> None:
        """Note the conversation as it is now, and what is to be removed with it.

        removals: as they were when the turn began; one that was removed since stays so. messages: None, as they were.
        """
        branch = turn.branch
        with self._lock:
            if self.removals(thread) != removals:
                return
            raw = self._rows.get(self._name(thread))
            row = json.loads(raw) if raw is not None else {"messages": [], "branches": {}, "spans": {}}
            branches, spans = row["branches"], row["spans"]
            spans[fingerprint] = sorted({*spans.get(fingerprint, ()), *turn.spans})
            if branch is not None:
                new = {"token_ids": list(branch.token_ids), "edges": list(branch.edges)}
                # An older branch that this one is, or continues, adds nothing.
                known = branches.get(fingerprint, [])
                older = [old for old in known if new["token_ids"][: len(old["token_ids"])] != old["token_ids"]]
                branches[fingerprint] = [new, *older][:_BRANCHES]
            if messages is not None:
                row["messages"] = [plain_message(message) for message in messages]
            self._rows[self._name(thread)] = json.dumps(row)

    def remove(self, thread: str) -> dict[str, list[str]]:
        """Forget it; the digests of its spans, by fingerprint of the model. Raises UnknownThreadError."""
        with self._lock:
            raw = self._rows.get(self._name(thread))
            if raw is None:
                raise UnknownThreadError(f"There is no conversation {thread!r}. Known are: {self.names()!r}.")
            del self._rows[self._name(thread)]
            self._removed[self._name(thread)] += 1
        found: dict[str, list[str]] = json.loads(raw)["spans"]
        return found

    def end_all(self) -> None:
        """Keep no turn that has begun; for when every conversation is about to be removed."""
        with self._lock:
            self._removed[""] += 1


def recut(prompt: Prompt, branches: Sequence[Branch]) -> Prompt:
    """`prompt`, cut as the branch that shares most with it, as far as they are the same; the tokens stay what they are.

    At least the last token stays in the query.
    """
    ids = prompt.token_ids
    found = [(branch.shared(ids[:-1]), branch) for branch in branches]
    edge, branch = max(found, key=lambda pair: pair[0], default=(0, None))
    if branch is None or edge == 0:
        return prompt
    starts: dict[tuple[int, int], Span] = {}
    own: list[int] = []
    for span in prompt.spans:
        start = own[-1] if own else 0
        own.append(start + len(span))
        starts[start, own[-1]] = span
    cuts = [e for e in branch.edges if e <= edge] + [e for e in own if e > edge]
    begin = 0
    spans = []
    for cut in cuts:
        spans.append(starts.get((begin, cut), Span(tuple(ids[begin:cut]))))
        begin = cut
    return Prompt(tuple(spans), tuple(ids[begin:]))


def plain_message(message: Message) -> dict[str, Any]:
    """A message as JSON: its texts joined, everything else as it is. Raises InputError."""

    plain = {**message, "content": "".join(piece.text for piece in as_pieces(message.get("content")))}
    try:
        restored: Mapping[str, Any] = json.loads(json.dumps(plain))
    except (TypeError, ValueError) as error:
        raise InputError(f"A message cannot be kept: {error}. Use text, numbers, lists and mappings.") from None
    return dict(restored)
