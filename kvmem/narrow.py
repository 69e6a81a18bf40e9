"""JSON schemas made narrower, so that a small model can finish what they ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from kvmem.any_model import AnyModel
from kvmem.errors import InputError, first_line

Schema = Mapping[str, Any]

_SAMPLE = "The night ferry leaves Port Ellery at ten past nine and reaches Saint Orrin at dawn, in any weather."
_LARGEST_INTEGER = 2**53
# How many elements a list of no given length may well get.
_LIKELY_ITEMS = 4
# What holds data of the user's.
DATA = {"const", "enum", "default", "examples"}
# What holds schemas by names of the user's; of definitions only those count that something refers to.
_DEFINITIONS = {"$defs", "definitions"}
_BY_NAME = _DEFINITIONS | {"properties", "patternProperties", "dependentSchemas"}
# What applies to the same value as the schema around it.
_COMBINING = {"allOf", "anyOf", "oneOf", "$ref", "then", "else", "dependentSchemas"}
# A narrower one here would make the whole wider.
_NEGATED = {"not", "if"}
# What says something of an object's properties.
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
    """`schema`, narrowed so that its JSON has a good chance to be complete after `max_tokens`. Raises InputError."""
    if not isinstance(schema, Mapping):
        raise InputError(f"The schema is a {type(schema).__name__}. Give a JSON schema, as a mapping.")
    try:
        names = json.dumps(dict.fromkeys(property_names(schema), ""))
        # Rambling is made of short words: fewer characters by token than a text has.
        characters = 0.6 * len(_SAMPLE) / model.count_tokens(_SAMPLE)
        return narrow(schema, int(characters * max(0, max_tokens - model.count_tokens(names))))
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise InputError(f"The schema is not one: {first_line(error)}. Give a JSON schema.") from error
    except RecursionError:
        raise InputError("The schema is too deep. Give a flatter one.") from None


def narrow(schema: Schema, characters: int) -> dict[str, Any]:
    """A schema whose JSON is valid under `schema` too, and that a small model can finish.

    Objects that list their properties get no more, strings of no given length share `characters`, and integers are
    those that JSON's readers agree on: a small model would fill any of them until the answer is cut off in the middle.
    What another schema says something of too is left as it is.
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
        if found.get("type") == "integer" and not found.keys() & {"enum", "const"}:
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
    """Whether an object of the properties that are listed, and no others, can be all that is asked for."""
    required = node.get("required", [])
    return not node.keys() & {"minProperties", "enum", "const"} and set(required) <= set(node["properties"])


def _combined(schema: Schema) -> set[int]:
    """Identities of the schemas that may apply to a value beside others that say something of it."""
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
    """The schemas in a schema, each with the keyword that it stands under."""
    for name, value in node.items():
        if name in DATA:
            continue
        if name in _BY_NAME and isinstance(value, Mapping):
            parts = list(value.values())
        else:
            parts = value if isinstance(value, list) else [value]
        yield from ((name, part) for part in parts)


def _resolve(schema: Schema, reference: Any) -> Any:
    """What a reference within the schema stands for; None for any other."""
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
    """The names of all properties that a schema lists, at any depth."""
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
