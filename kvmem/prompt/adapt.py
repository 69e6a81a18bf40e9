"""Messages in the forms that strict chat templates accept, the closest to the original first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kvmem.model.chat_template import CallStyle

Adapted = list[dict[str, Any]]
_IDENTITY = 9


def forms(messages: Sequence[Mapping[str, Any]], style: CallStyle | None) -> Iterator[Adapted]:
    """The messages as they are, then in other forms that say the same.

    Contents are lists of pieces, whose order stays. Templates differ in what they raise an error for: system messages
    anywhere but at the beginning, or at all; two messages of one role in a row; tool results; two calls at once; ids of
    calls that are not nine letters and digits long (Mistral).

    Args:
        messages: The messages.
        style: How the template shows calls; None if it does not, and then they become text.
    """
    has_calls = any(message.get("tool_calls") or message["role"] == "tool" for message in messages)
    if not has_calls or (style is not None and style.example):
        native = _styled(messages, style)
        yield native
        if has_calls:
            native = [_with_short_ids(message) for message in native]
            yield native
            native = one_at_a_time(native)
            yield native
        yield alternating(native)
        yield without_system(alternating(native))
    if has_calls:
        told = calls_as_text(messages, style)
        yield told
        yield alternating(told)
        yield without_system(alternating(told))


def _styled(messages: Sequence[Mapping[str, Any]], style: CallStyle | None) -> Adapted:
    """Messages with calls as a template wants them."""
    styled: Adapted = []
    ids: dict[Any, str] = {}
    for message in messages:
        adapted = dict(message)
        if style is not None and message.get("tool_calls"):
            calls = message["tool_calls"]
            if style.named_ids:
                ids |= {c.get("id"): f"functions.{c['function']['name']}:{len(ids) + n}" for n, c in enumerate(calls)}
            calls = [{**call, "id": ids.get(call.get("id"), call.get("id"))} for call in calls]
            adapted["tool_calls"] = [_with_text(call) for call in calls] if style.as_text else calls
        if "tool_call_id" in message:
            adapted["tool_call_id"] = ids.get(message["tool_call_id"], message["tool_call_id"])
        styled.append(adapted)
    return styled


def one_at_a_time(messages: Adapted) -> Adapted:
    """Calls that were made together, each with its result behind it (Llama 3.1)."""
    results = {message.get("tool_call_id"): message for message in messages if message["role"] == "tool"}
    spread: Adapted = []
    moved: set[int] = set()
    for message in messages:
        calls = message.get("tool_calls") or []
        if id(message) in moved:
            continue
        if len(calls) < 2 or any(call.get("id") not in results for call in calls):
            spread.append(message)
            continue
        for number, call in enumerate(calls):
            result = results[call["id"]]
            moved.add(id(result))
            content = message["content"] if number == 0 else []
            spread += [{**message, "content": content, "tool_calls": [call]}, result]
    return spread


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments") or {})
    return {**call, "function": function}


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    adapted = dict(message)
    if message.get("tool_calls"):
        adapted["tool_calls"] = [{**call, "id": _short(call.get("id"))} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        adapted["tool_call_id"] = _short(message["tool_call_id"])
    return adapted


def _short(identity: Any) -> str:
    text = str(identity or "")
    if len(text) == _IDENTITY and text.isalnum():
        return text
    return hashlib.sha256(text.encode()).hexdigest()[:_IDENTITY]


def calls_as_text(messages: Sequence[Mapping[str, Any]], style: CallStyle | None) -> Adapted:
    """Calls as text, as the model would write them, and results as messages of the user."""
    tagged = style is not None and "<tool_call>" in style.format
    begin, end = ("<tool_call>\n", "\n</tool_call>") if tagged else ("", "")
    names: dict[Any, str] = {}
    told: Adapted = []
    for message in messages:
        adapted = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
        lines = []
        for call in message.get("tool_calls") or ():
            function = call["function"]
            names[call.get("id")] = function["name"]
            arguments = function.get("arguments") or {}
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            lines.append(f'{begin}{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}{end}')
        if lines:
            before = [*message["content"], "\n"] if message["content"] else []
            adapted["content"] = [*before, "\n".join(lines)]
        if message["role"] == "tool":
            name = message.get("name") or names.get(message.get("tool_call_id")) or "the function"
            adapted = {"role": "user", "content": [f"The result of {name}:\n", *(message["content"] or ["(nothing)"])]}
        told.append(adapted)
    return told


def alternating(messages: Sequence[Mapping[str, Any]]) -> Adapted:
    """User and assistant in turn, behind at most one system message; neighbours of one role are joined."""
    joined: Adapted = []
    for message in messages:
        adapted = dict(message)
        is_first = all(earlier["role"] == "system" for earlier in joined)
        if adapted["role"] in ("system", "developer"):
            adapted["role"] = "system" if is_first else "user"
        if is_first and adapted["role"] == "assistant":
            joined.append({"role": "user", "content": []})
        last = joined[-1] if joined else None
        if last is not None and last["role"] == adapted["role"] != "tool" and not last.get("tool_calls"):
            between = ["\n\n"] if last["content"] and adapted["content"] else []
            joined[-1] = {**last, **adapted, "content": [*last["content"], *between, *adapted["content"]]}
        else:
            joined.append(adapted)
    return joined


def without_system(messages: Adapted) -> Adapted:
    """The system message at the head of the first message of the user."""
    if not messages or messages[0]["role"] != "system":
        return messages
    system, rest = messages[0], messages[1:]
    if not rest or rest[0]["role"] != "user":
        return [{**system, "role": "user"}, *rest]
    return [{**rest[0], "content": [*system["content"], "\n\n", *rest[0]["content"]]}, *rest[1:]]
