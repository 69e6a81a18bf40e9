"""Threads: what is known of conversations, so that the next turn of one is exact up to its new message."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any
from uuid import uuid4

from cachetools import LRUCache

from kvmem.errors import InputError, UnknownThreadError
from kvmem.library.tombstones import THREAD_SPAN
from kvmem.prompt.layout import Message, Prompt, as_pieces
from kvmem.prompt.span import Span
from kvmem.store.records import Database, Record, list_key, list_prefix
from kvmem.text.document import check_text

# Branches of a conversation (a retry, an edited message) that are known at a time.
_BRANCHES = 4
# Threads whose messages this process remembers to have seen.
_SEEN = 1024
# Conversations that an error names.
_NAMED = 20


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


@dataclass(frozen=True)
class Begun:
    """A thread as it was when a turn of it began.

    Attributes:
        generation: of the thread; a thread that was removed and created again has another.
        seen: the messages that the caller knew of: what this process last read or wrote of the thread.
        branches: what was computed of it with the model, newest first.
    """

    thread: str
    generation: str
    seen: Seen
    branches: list[Branch]


@dataclass(frozen=True)
class Seen:
    """The first messages of a thread: how many, and a digest of them."""

    count: int
    digest: str

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]]) -> Seen:
        text = json.dumps([dict(message) for message in messages], sort_keys=True)
        return cls(len(messages), hashlib.sha256(text.encode()).hexdigest())

    def begins(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        return len(messages) >= self.count and Seen.of(messages[: self.count]) == self


class Threads:
    """The conversations of one namespace, by name, as records of a store.

    A thread has a record with its generation, and records of its messages, of its branches (in segments: a turn that
    continues a branch appends one), and of the spans that are to be forgotten with it. So what a turn writes does not
    grow with the conversation, and processes that continue one thread add to it.
    """

    def __init__(self, database: Database, namespace: str) -> None:
        self._database = database
        self._threads = database.records(namespace, "thread")
        self._messages = database.records(namespace, "message")
        self._branches = database.records(namespace, "branch")
        self._spans = database.records(namespace, THREAD_SPAN)
        self._seen: LRUCache[str, Seen] = LRUCache(_SEEN)
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Those with messages, in alphabetical order."""
        spoken = {json.loads(key)[0] for key in self._messages.keys()}  # noqa: SIM118
        return sorted(spoken)

    def messages(self, thread: str) -> list[dict[str, Any]]:
        """The conversation so far, the last answer included. Raises UnknownThreadError."""
        found = [dict(record.value) for record in self._messages.scan(list_prefix(check_name(thread)))]
        if not found:
            raise self._unknown(thread)
        self._note_seen(thread, found)
        return found

    def _note_seen(self, thread: str, messages: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._seen[thread] = Seen.of(messages)

    def begin(self, thread: str, fingerprint: str) -> Begun:
        """Note that a turn begins, creating the thread if there is none."""
        with self._database.transaction():
            record = self._threads.get(thread)
            generation = uuid4().hex if record is None else str(record.value["generation"])
            if record is None:
                self._threads.put(thread, {"generation": generation})
            with self._lock:
                seen = self._seen.get(thread)
            if seen is None:
                seen = Seen.of([record.value for record in self._messages.scan(list_prefix(thread))])
            return Begun(thread, generation, seen, list(self._known(thread, fingerprint).values()))

    def _known(self, thread: str, fingerprint: str) -> dict[str, Branch]:
        """Branches by their ids, newest first."""
        segments: dict[str, list[Record]] = {}
        for record in self._branches.scan(list_prefix(thread, fingerprint)):
            segments.setdefault(json.loads(record.key)[2], []).append(record)
        newest = sorted(segments, key=lambda name: -max(record.revision for record in segments[name]))
        return {name: _joined(segments[name]) for name in newest}

    def keep(self, begun: Begun, fingerprint: str, turn: Turn, messages: Sequence[Message] | None = None) -> bool:
        """Write down what a turn left behind; False, and nothing is written, if the thread was removed meanwhile.

        messages: all of the conversation, the answer included; None when there was no answer. They replace what is
            there from the first difference on (a retry, an edited message), unless another process has continued the
            thread unseen: then the turn's own messages are appended.
        """
        thread = begun.thread
        with self._database.transaction():
            record = self._threads.get(thread)
            if record is None or record.value["generation"] != begun.generation:
                return False
            known = set(self._spans.keys(list_prefix(thread, fingerprint)))
            for digest in sorted(turn.spans):
                if (key := list_key(thread, fingerprint, digest)) not in known:
                    self._spans.put(key, {})
            if turn.branch is not None:
                self._keep_branch(thread, fingerprint, turn.branch)
            if messages is not None:
                self._keep_messages(begun, [plain_message(message) for message in messages])
        return True

    def _keep_branch(self, thread: str, fingerprint: str, branch: Branch) -> None:
        known = self._known(thread, fingerprint)
        for name, old in known.items():
            length = len(old.token_ids)
            if branch.token_ids[:length] == old.token_ids:
                rest = Branch(branch.token_ids[length:], tuple(edge for edge in branch.edges if edge > length))
                if rest.token_ids:
                    number = len(self._branches.keys(list_prefix(thread, fingerprint, name)))
                    self._branches.put(list_key(thread, fingerprint, name, number), _segment(rest))
                return
        self._branches.put(list_key(thread, fingerprint, uuid4().hex, 0), _segment(branch))
        for name in [*known][_BRANCHES - 1 :]:
            self._branches.clear(list_prefix(thread, fingerprint, name))

    def _keep_messages(self, begun: Begun, messages: list[dict[str, Any]]) -> None:
        thread, seen = begun.thread, begun.seen
        records = self._messages.scan(list_prefix(thread))
        there = [record.value for record in records]
        if len(there) > seen.count and seen.begins(there) and seen.begins(messages):
            kept, added = len(there), messages[seen.count :]
        else:
            pairs = zip(there, messages, strict=False)
            kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            added = messages[kept:]
        for record in records[kept:]:
            self._messages.delete(record.key)
        # One that is damaged is not among the records, and keeps its number.
        last = max((json.loads(key)[1] for key in self._messages.keys(list_prefix(thread))), default=-1)
        for number, message in enumerate(added, last + 1):
            self._messages.put(list_key(thread, number), message)
        self._note_seen(thread, [*there[:kept], *added])

    def remove(self, thread: str) -> dict[str, list[str]]:
        """Remove a thread; the digests of its spans, by fingerprint of the model. Raises UnknownThreadError."""
        with self._database.transaction():
            if not self._threads.delete(check_name(thread)):
                raise self._unknown(thread)
            found: dict[str, list[str]] = {}
            for key in self._spans.keys(list_prefix(thread)):
                _, fingerprint, digest = json.loads(key)
                found.setdefault(fingerprint, []).append(digest)
            for records in (self._messages, self._branches, self._spans):
                records.clear(list_prefix(thread))
        with self._lock:
            self._seen.pop(thread, None)
        return found

    def _unknown(self, thread: str) -> UnknownThreadError:
        names = self.names()
        known = ", ".join(map(repr, names[:_NAMED])) + (f" and {len(names) - _NAMED} more" if names[_NAMED:] else "")
        return UnknownThreadError(f"There is no conversation {thread!r}. Known are: {known or 'none'}.")


def check_name(thread: str) -> str:
    """Raises InputError for what cannot name a thread."""
    if not isinstance(thread, str) or not thread:
        raise InputError(f"thread={thread!r} cannot name a conversation. Give a text that is not empty.")
    check_text(thread, "thread")
    return thread


def _segment(branch: Branch) -> dict[str, Any]:
    return {"token_ids": list(branch.token_ids), "edges": list(branch.edges)}


def _joined(segments: Sequence[Record]) -> Branch:
    ordered = sorted(segments, key=lambda record: int(json.loads(record.key)[3]))
    ids = [token for record in ordered for token in record.value["token_ids"]]
    return Branch(tuple(ids), tuple(edge for record in ordered for edge in record.value["edges"]))


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
    return Prompt(tuple(spans), tuple(ids[begin:]), prompt.opening)


def plain_message(message: Message) -> dict[str, Any]:
    """A message as JSON: its texts joined, everything else as it is. Raises InputError."""

    plain = {**message, "content": "".join(piece.text for piece in as_pieces(message.get("content")))}
    try:
        restored: Mapping[str, Any] = json.loads(json.dumps(plain))
    except (TypeError, ValueError) as error:
        raise InputError(f"A message cannot be kept: {error}. Use text, numbers, lists and mappings.") from None
    return dict(restored)
