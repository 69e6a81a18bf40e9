"""VLLMModel: a model on a vLLM server, with a local tokenizer."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kvmem.backends.vllm.server import VLLMServer
from kvmem.cancellation import NEVER
from kvmem.errors import ModelError, ModelNotFoundError, RemoteError, first_line
from kvmem.model.base import AnyModel
from kvmem.settings import RemoteSettings

# The first version with `structured_outputs` and `return_token_ids`. `cache_salt`, which keeps the caches of namespaces
# apart, is older.
_OLDEST = (0, 11)
_PROBE = "One text, <|im_start|>user\n1 234 <s></s> Größe\n\n"


class VLLMModel(AnyModel):
    """A model on a vLLM server. Prompts are tokenized locally; KV stays on the server.

    Attributes:
        server: The connection.
        block_size: Tokens per block of the server's prefix cache; only whole blocks are reused.
        parallel: Maximum number of concurrent requests.
    """

    def __init__(
        self, server: VLLMServer, tokenizer: PreTrainedTokenizerBase, window: int, settings: RemoteSettings
    ) -> None:
        scheme, _, host = server.address.partition("://")
        super().__init__(tokenizer, f"{'vllm' if scheme == 'http' else 'vllm+https'}://{host}/{server.model}")
        self.server, self._window = server, window
        self.block_size = 1
        self.parallel = settings.parallel
        if settings.separator is not None:
            self.separator = self.tokenize(settings.separator, markup=False)

    @classmethod
    def connect(cls, url: str, settings: RemoteSettings, tokenizer: PreTrainedTokenizerBase | None = None) -> VLLMModel:
        """Connect to a model and check that the server supports what kvmem needs.

        Args:
            url: `vllm://host:port/model` or `vllm+https://host:port/model`. The model may be omitted if the server has
                only one.
            settings: How the server is used.
            tokenizer: The model's tokenizer; None loads the one that the settings or the server name.

        Returns:
            The connected model. Close it after use.

        Raises:
            InputError: The address is invalid.
            RemoteError: The server cannot be reached or lacks a feature.
            ModelNotFoundError: The server does not serve the model, or its tokenizer cannot be loaded.
            ModelError: The local tokenizer differs from the server's.
        """
        server = VLLMServer(url, settings)
        try:
            version = _version(server)
            card = _find(server, server.run(server.get("/v1/models")))
            server.model = card["id"]
            own = settings.tokenizer or card.get("root") or card["id"]
            model = cls(server, tokenizer or _load_tokenizer(own), int(card.get("max_model_len") or 0), settings)
            model._check(version)
        except BaseException:
            server.close()
            raise
        return model

    @property
    def window(self) -> int:
        return self._window

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model and its tokenizer. Unlike a local model's, it does not cover weights and dtype."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        parts = [self.server.model, vocabulary, str(self.tokenizer.chat_template)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def close(self) -> None:
        self.server.close()

    def _check(self, version: str) -> None:
        server = self.server
        if not self._window:
            raise RemoteError(
                f"{server.address} does not report its maximum prompt length. Check that it is a vLLM server."
            )
        there, here = server.run(server.tokenize(_PROBE)), self.tokenize(_PROBE, markup=True)
        if tuple(there) != here:
            raise ModelError(
                f"The local tokenizer does not match that of {server.model!r} at {server.address}. "
                "Give the model's own as tokenizer='directory or hub id'."
            )
        self.block_size = server.run(server.block_size())
        if not self._reports_reuse():
            raise RemoteError(
                f"{server.address} (vLLM {version}) does not report cached tokens. Start it with "
                "--enable-prompt-tokens-details and without --no-enable-prefix-caching."
            )

    def _reports_reuse(self) -> bool:
        """Whether the server reports cached tokens for a repeated prompt, and the token ids of answers."""
        count = min(2 * self.block_size + 1, self._window - 1)
        ids = self.tokenize(_PROBE * (1 + count // 8), markup=False)[:count]
        options, extra = {"max_tokens": 1, "temperature": 0.0}, {"cache_salt": uuid.uuid4().hex}

        async def twice() -> Sequence[Any]:
            return [await self.server.complete(ids, options, extra, lambda _: None, NEVER) for _ in range(2)]

        again = self.server.run(twice())[-1]
        return bool(again.cached and again.token_ids)


def _version(server: VLLMServer) -> str:
    """The server's version. Raises RemoteError if it is too old or not vLLM."""
    try:
        found = str(server.run(server.get("/version"))["version"])
    except (ModelNotFoundError, TypeError, KeyError):
        raise RemoteError(
            f"{server.address} is not a vLLM server: it does not report a version. Only vLLM servers are supported."
        ) from None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST and "dev" not in found:
        raise RemoteError(
            f"{server.address} runs vLLM {found}, without required features (return_token_ids, structured_outputs). "
            f"Upgrade it to {'.'.join(map(str, _OLDEST))} or later."
        )
    return found


def _find(server: VLLMServer, models: Any) -> dict[str, Any]:
    cards: list[dict[str, Any]] = models.get("data", []) if isinstance(models, dict) else []
    names = [card["id"] for card in cards]
    if not server.model and len(cards) == 1:
        return cards[0]
    for card in cards:
        if card["id"] == server.model:
            return card
    raise ModelNotFoundError(
        f"{server.address} serves {', '.join(map(repr, names)) or 'nothing'}, not {server.model!r}. "
        f"Use vllm://host:port/{names[0] if names else 'model'}."
    )


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"The tokenizer {name!r} could not be loaded: {first_line(error)}. "
            "Give the tokenizer of the served model as tokenizer='directory or hub id'."
        ) from error
