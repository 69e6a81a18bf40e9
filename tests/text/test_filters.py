"""Filters over metadata."""

from __future__ import annotations

from typing import Any

import pytest

from kvmem import InputError
from kvmem.text.filters import check_filter, matches

METADATA = {"team": "a", "year": 2024, "user": {"role": "admin", "access-level": 3}, "a.b": 1, "tags": ["x", "y"]}


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        ({"team": "a"}, True),
        ({"team": "b"}, False),
        ({"none": "a"}, False),
        ({"year": {"$gte": 2024, "$lt": 2025}}, True),
        ({"year": {"$gt": 2024}}, False),
        ({"year": {"$gt": "text"}}, False),
        ({"team": {"$in": ["a", "c"]}}, True),
        ({"team": {"$nin": ["a", "c"]}}, False),
        ({"team": {"$ne": "b"}}, True),
        ({"tags": {"$contains": "x"}}, True),
        ({"user": {"role": "admin"}}, True),
        ({"user": {"role": {"$ne": "admin"}}}, False),
        ({"user.role": "admin"}, True),
        ({"user.access-level": {"$gte": 3}}, True),
        ({"user.role": "guest"}, False),
        ({"user.role.more": "admin"}, False),
        ({"a.b": 1}, True),
        ({}, True),
    ],
)
def test_a_filter_passes_what_it_says(wanted: dict[str, Any], passes: bool) -> None:
    """By value, operator, mapping and path; a name with a dot in it is a name first."""
    check_filter(wanted)
    assert matches(METADATA, wanted) is passes


@pytest.mark.parametrize(
    "wanted", [{"year": {"$near": 3}}, {"team": {"$in": "a"}}, ["team"], {"user": {"x": {"$y": 1}}}]
)
def test_a_filter_that_cannot_be_applied_is_an_error(wanted: Any) -> None:
    """It names what is wrong, before anything is compared."""
    with pytest.raises(InputError):
        check_filter(wanted)
