"""Narrow JSON schemas, so that a small model can complete the JSON they describe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from kvmem.errors import InputError, first_line
from kvmem.model.base import AnyModel

Schema = Mapping[str, Any]

_SAMPLE = "The night ferry leaves Port Ellery at ten past nine and reaches Saint Orrin at dawn, in any weather."
_LARGEST_INTEGER = 2**53
# Assumed length of a list without maxItems.
_LIKELY_ITEMS = 4
# Keywords that hold user data.
DATA = {"const", "enum", "default", "examples"}
# Keywords that hold schemas under user-chosen names. Definitions count only where something refers to them.
_DEFINITIONS = {"$defs", "definitions"}
_BY_NAME = _DEFINITIONS | {"properties", "patternProperties", "dependentSchemas"}
# Keywords whose schemas apply to the same value as the surrounding schema.
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "then", "else", "dependentSchemas"}
# Keywords whose schemas must not be narrowed: that would widen the whole.
_NEGATED = {"not", "if"}
# Keywords that constrain an object's properties.
_OF_OBJECTS = {
    "properties",
    "patternProperties",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "required",
    "dependentRequired",
    "minProperties",
}


def narrow_for(model: AnyModel, schema: Schema, max_tokens: int) -> dict[str, Any]:
    """Narrow `schema` so that its JSON is likely to be complete within `max_tokens`. Raises InputError."""
    if not isinstance(schema, Mapping):
        raise InputError(f"The schema is a {type(schema).__name__}. Give a JSON schema as a mapping.")
    try:
        names = json.dumps(dict.fromkeys(property_names(schema), ""))
        # Rambling consists of short words, so it has fewer characters per token than ordinary text.
        characters = 0.6 * len(_SAMPLE) / model.count_tokens(_SAMPLE)
        return narrow(schema, int(characters * max(0, max_tokens - model.count_tokens(names))))
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"The schema is not valid: {first_line(error)}. Give a JSON schema.") from error
    except RecursionError:
        raise InputError("The schema is nested too deeply. Give a flatter one.") from None


def narrow(schema: Schema, characters: int) -> dict[str, Any]:
    """A schema that accepts a subset of what `schema` accepts, and that a small model can complete.

    Objects allow only the properties they list, strings without a length limit share `characters`, and integers are
    limited to what all JSON parsers represent exactly. Without this, a small model fills any of them until the answer
    is cut off. Values that several schemas apply to are left unchanged.
    """
    longest = max(16, characters // max(1, _count_strings(schema)))
    combined = _combined(schema)

    def visit(node: Any) -> Any:
        if isinstance(node, list):
            return [visit(item) for item in node]
        if not isinstance(node, Mapping):
            return node
        found = {name: visit_part(name, value) for name, value in node.items()}
        if id(node) in combined or found.keys() & _COMBINING:
            return found
        if isinstance(found.get("properties"), dict) and _may_close(found):
            found.setdefault("additionalProperties", False)
        if _is_open_string(found):
            found["maxLength"] = max(longest, found.get("minLength", 0))
        # JSON's readers make infinity of a number with a large exponent.
        if found.get("type") in ("integer", "number") and not found.keys() & {"enum", "const"}:
            low, high = (found.get(n, found.get(f"exclusive{n.capitalize()}")) for n in ("minimum", "maximum"))
            if low is None and (high is None or high > -_LARGEST_INTEGER):
                found["minimum"] = -_LARGEST_INTEGER
            if high is None and (low is None or low < _LARGEST_INTEGER):
                found["maximum"] = _LARGEST_INTEGER
        return found

    def visit_part(name: str, value: Any) -> Any:
        if name in DATA | _NEGATED:
            return value
        if name in _BY_NAME and isinstance(value, Mapping):
            return {key: visit(part) for key, part in value.items()}
        return visit(value)

    narrowed: dict[str, Any] = visit(schema)
    return narrowed


def _may_close(node: Schema) -> bool:
    """Whether an object with only the listed properties can satisfy the schema."""
    required = node.get("required", [])
    return not node.keys() & {"minProperties", "enum", "const"} and set(required) <= set(node["properties"])


def _combined(schema: Schema) -> set[int]:
    """Ids (`id()`) of the schemas that may apply to a value together with other schemas."""
    found: set[int] = set()
    seen: set[tuple[int, bool]] = set()

    def visit(node: Any, alone: bool) -> None:
        if not isinstance(node, Mapping) or (id(node), alone) in seen:
            return
        seen.add((id(node), alone))
        if not alone:
            found.add(id(node))
        joined = [name for name in node if name in _COMBINING]
        branches = sum(len(node[name]) if name == "allOf" else 1 for name in joined)
        only = alone and branches == 1 and not node.keys() & _OF_OBJECTS and "dependentSchemas" not in joined
        for name, part in _parts(node):
            if name not in _DEFINITIONS:
                visit(part, only if name in _COMBINING else alone and not joined)
        if "$ref" in node:
            visit(_resolve(schema, node["$ref"]), only)

    visit(schema, alone=True)
    return found


def _parts(node: Schema) -> Iterator[tuple[str, Any]]:
    """The direct subschemas of a schema, each with its keyword."""
    for name, value in node.items():
        if name in DATA:
            continue
        if name in _BY_NAME and isinstance(value, Mapping):
            parts = list(value.values())
        else:
            parts = value if isinstance(value, list) else [value]
        yield from ((name, part) for part in parts)


def _resolve(schema: Schema, reference: Any) -> Any:
    """The target of a reference within the schema; None for any other reference."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = schema
    for step in unquote(reference[1:]).split("/")[1:]:
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and step.isdigit() and int(step) < len(found):
            found = found[int(step)]
        else:
            found = found.get(step) if isinstance(found, Mapping) else None
    return found


def property_names(node: Any) -> list[str]:
    """The names of all properties listed in a schema, at any depth."""
    if not isinstance(node, Mapping):
        return []
    own = list(node["properties"]) if isinstance(node.get("properties"), Mapping) else []
    return own + [name for _, part in _parts(node) for name in property_names(part)]


def _is_open_string(node: Schema) -> bool:
    return node.get("type") == "string" and not node.keys() & {"maxLength", "enum", "const", "pattern", "format"}


def _count_strings(node: Any) -> int:
    if not isinstance(node, Mapping):
        return 0
    items = int(node.get("maxItems", _LIKELY_ITEMS)) if "items" in node else 1
    return int(_is_open_string(node)) + items * sum(_count_strings(part) for _, part in _parts(node))
