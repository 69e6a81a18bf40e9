"""Removing every byte of a namespace."""

from __future__ import annotations

import json

from kvmem.store.base import Store


def namespace_of(name: str) -> str | None:
    """Whose a row is: names are a JSON list that begins with the namespace, behind a word and a colon or not."""
    try:
        fields = json.loads(name[name.index("[") :])
    except ValueError:
        return None
    return str(fields[0]) if isinstance(fields, list) and fields else None


def forget_namespace(store: Store, namespace: str) -> int:
    """Remove texts, entries and what is left of them in files; the number of entries. Raises StoreError."""
    documents = store.documents
    for name in [name for name in documents if namespace_of(name) == namespace]:
        documents.pop(name, None)
    removed = store.clear(namespace)
    store.scrub(namespace)
    return removed
