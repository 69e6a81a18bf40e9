"""Server limits and API keys."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from kvmem.errors import InputError

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_SHORTEST_KEY = 16


class ServeSettings(BaseModel):
    """Limits and API keys of a server.

    Attributes:
        keys: Namespaces by the SHA-256 of their API key; see `read_keys`. Without keys, every client may use every
            namespace.
        body_bytes: Maximum size of a request body, in bytes.
        max_tokens: Maximum answer length that a request may ask for, in tokens.
        queue: Maximum number of waiting requests. With keys, it is divided equally among the namespaces.
        timeout: Maximum seconds from the arrival of a request to the end of its answer.
        body_timeout: Maximum seconds for a request body to arrive.
        engines: Number of namespaces kept open. Each holds the KV of its last prompt.

    Example:
        ```python
        limits = ServeSettings(keys=read_keys(Path("keys.txt")), queue=32, timeout=120.0)
        app = create_app(LanguageModel.load("smollm2"), DiskStore("./kv"), limits=limits)
        ```
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
        """The maximum number of waiting requests per namespace."""
        return max(1, self.queue // max(1, len(set(self.keys.values()))))

    def namespace_of(self, key: str) -> str | None:
        """The namespace of an API key; None for an unknown key."""
        return self.keys.get(digest(key))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> dict[str, str]:
    """Read API keys from a file.

    Args:
        path: A file with one `namespace key` pair per line. Empty lines and lines that start with # are ignored.

    Returns:
        Namespaces by the SHA-256 of their key.

    Raises:
        InputError: The file cannot be read, holds no key, or has an invalid line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The keys in {str(path)!r} cannot be read: {error}. Check the path and its permissions."
        ) from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        if len(fields) != 2:
            raise InputError(
                f"Line {number} of {str(path)!r} is not a namespace and a key. Separate them with a space."
            )
        namespace, key = fields
        if len(key) < _SHORTEST_KEY:
            raise InputError(
                f"The key in line {number} of {str(path)!r} is shorter than {_SHORTEST_KEY} characters. "
                "Generate one with: openssl rand -hex 24"
            )
        if keys.setdefault(digest(key), namespace) != namespace:
            raise InputError(
                f"The key in line {number} of {str(path)!r} belongs to two namespaces. Use a separate key for each."
            )
    if not keys:
        raise InputError(f"There is no key in {str(path)!r}. Write one 'namespace key' pair per line.")
    return keys


def check_address(host: str, settings: ServeSettings) -> None:
    """Raise InputError if the address is reachable from other machines and no keys are set."""
    if host not in LOOPBACK and not settings.keys:
        raise InputError(
            f"{host!r} is reachable from other machines and no API keys are set. Give --keys FILE with one "
            "'namespace key' pair per line, or listen on 127.0.0.1."
        )
