"""Filters over metadata: values by name ("user.role" for a nested one), or operators such as {"$gt": 3}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvmem.errors import InputError

Filter = Mapping[str, Any]


def _among(value: Any, wanted: Any) -> bool:
    return any(_equal(value, one) for one in wanted)


def _contains(value: Any, wanted: Any) -> bool:
    return isinstance(value, (list, tuple, str)) and wanted in value


_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda value, wanted: _equal(value, wanted),
    "$ne": lambda value, wanted: not _equal(value, wanted),
    "$in": _among,
    "$nin": lambda value, wanted: not _among(value, wanted),
    "$gt": lambda value, wanted: value > wanted,
    "$gte": lambda value, wanted: value >= wanted,
    "$lt": lambda value, wanted: value < wanted,
    "$lte": lambda value, wanted: value <= wanted,
    "$contains": _contains,
}


def check_filter(wanted: Filter) -> None:
    """Raise InputError for a filter that cannot be applied."""
    if not isinstance(wanted, Mapping):
        raise InputError(f"The filter is a {type(wanted).__name__}. Give a mapping of metadata names to values.")
    for name, expected in wanted.items():
        if isinstance(name, str) and name.startswith("$") and name not in _OPERATORS:
            raise InputError(f"The filter operator {name!r} is not supported. Use one of {', '.join(_OPERATORS)}.")
        if name in ("$in", "$nin") and (isinstance(expected, str) or not hasattr(expected, "__iter__")):
            raise InputError(f"The filter operator {name!r} needs a list, not a {type(expected).__name__}.")
        if isinstance(expected, Mapping):
            check_filter(expected)


def matches(value: Mapping[str, Any], wanted: Filter | None) -> bool:
    """Whether a mapping passes a filter: every name has the wanted value, or one that its operators accept."""
    return all(_passes(_value(value, name), expected) for name, expected in (wanted or {}).items())


def _value(value: Mapping[str, Any], name: str) -> Any:
    """The value of a name, or of a path of names joined by dots; None if there is none."""
    if name in value or "." not in name:
        return value.get(name)
    first, _, rest = name.partition(".")
    below = value.get(first)
    return _value(below, rest) if isinstance(below, Mapping) else None


def _passes(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        if any(name.startswith("$") for name in wanted):
            return all(_compares(value, operator, operand) for operator, operand in wanted.items())
        return isinstance(value, Mapping) and matches(value, wanted)
    return _equal(value, wanted)


def _compares(value: Any, operator: str, operand: Any) -> bool:
    compare = _OPERATORS.get(operator)
    if compare is None:
        raise InputError(f"The filter operator {operator!r} is not supported. Use one of {', '.join(_OPERATORS)}.")
    try:
        return bool(compare(value, operand))
    except TypeError:  # values that cannot be ordered
        return False


def _equal(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(value) == len(wanted) and all(_equal(one, other) for one, other in zip(value, wanted, strict=True))
    return bool(value == wanted)
