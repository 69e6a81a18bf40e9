"""What a server allows, and to whom."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from kvmem.errors import InputError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_SHORTEST_KEY = 16


class ServeSettings(BaseModel):
    """Limits of a server.

    keys: namespaces by the SHA-256 of the API key that opens them, see `read_keys`. Without any, whoever reaches the
        server may use every namespace.
    body_bytes: of a request. max_tokens: the longest answer that may be asked for. queue: requests that wait at a
        time; with keys, each namespace may have its share of them waiting. timeout: seconds from a request's arrival to
        the end of its answer. body_timeout: seconds for a request's body to arrive. engines: namespaces that are kept
        open, each with the KV of its last prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: Mapping[str, str] = Field(default_factory=dict)
    body_bytes: int = Field(default=16_000_000, ge=1)
    max_tokens: int = Field(default=4096, ge=1)
    queue: int = Field(default=64, ge=1)
    timeout: float = Field(default=300.0, gt=0)
    body_timeout: float = Field(default=30.0, gt=0)
    engines: int = Field(default=8, ge=1)

    @property
    def share(self) -> int:
        """How many requests of one namespace may wait."""
        return max(1, self.queue // max(1, len(set(self.keys.values()))))

    def namespace_of(self, key: str) -> str | None:
        """The namespace that an API key opens; None for one that is not known."""
        return self.keys.get(digest(key))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, str]:
    """Keys from a file with a line each, `namespace key`; empty lines and those that begin with # are left out.

    Raises InputError.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The keys in {str(path)!r} cannot be read: {error}. Check the path and its rights.") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) != 2:
            raise InputError(f"Line {number} of {str(path)!r} is not a namespace and a key. Part them by a space.")
        namespace, key = fields
        if len(key) < _SHORTEST_KEY:
            raise InputError(
                f"The key in line {number} of {str(path)!r} is shorter than {_SHORTEST_KEY} characters. "
                "Make one by: openssl rand -hex 24"
            )
        if keys.setdefault(digest(key), namespace) != namespace:
            raise InputError(f"The key in line {number} of {str(path)!r} opens two namespaces. Give each its own.")
    if not keys:
        raise InputError(f"There is no key in {str(path)!r}. Write lines of a namespace and a key.")
    return keys


def check_address(host: str, settings: ServeSettings) -> None:
    """Raise InputError if the server would be open to whoever reaches that address."""
    if host not in LOOPBACK and not settings.keys:
        raise InputError(
            f"{host!r} is reached by others, and nothing would keep them out. Give --keys FILE with a line "
            "'namespace key' for each of them, or listen at 127.0.0.1."
        )
