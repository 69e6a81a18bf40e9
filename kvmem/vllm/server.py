"""VLLMServer: what is said to a vLLM server, by OpenAI's client, and what its errors mean."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kvmem.answer import FinishReason
from kvmem.errors import ClosedError, InputError, KVMemError, ModelNotFoundError, RefusedError, RemoteError, first_line
from kvmem.settings import RemoteSettings

try:
    import openai
except ImportError as error:
    raise InputError("A vLLM server is spoken to with OpenAI's client: pip install 'kvmem[vllm]'.") from error

T = TypeVar("T")
# Seconds between two looks at whether anybody still waits.
_GLANCE = 0.05


@dataclass(frozen=True)
class Completion:
    """What a server made of a prompt.

    token_ids, generated: of the answer. cached: tokens of the prompt that were in the prefix cache; 0 for an answer
        that was cancelled, since that is told at the end. first_token: perf_counter seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    generated: int
    prompt: int
    cached: int
    first_token: float


class VLLMServer:
    """One model of one server. Its calls run in an event loop of their own, so that any can be given up."""

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if not parts.hostname or port is None:
            raise InputError(f"{url!r} is no address of a server. Give vllm://host:port/model.")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        self.address = f"{'https' if parts.scheme == 'vllm+https' else 'http'}://{host}:{port}"
        self.model = parts.path.strip("/")
        key = settings.api_key.get_secret_value() if settings.api_key is not None else "none"
        limits = openai.Timeout(10.0, read=settings.read_timeout, pool=None)
        self._client = openai.AsyncOpenAI(
            base_url=f"{self.address}/v1", api_key=key, max_retries=settings.retries, timeout=limits
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvmem-vllm", daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """Wait for `call`, from any other thread."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def close(self) -> None:
        """Calling it again does nothing."""
        if not self._loop.is_running():
            return
        with suppress(Exception):
            self.run(self._client.close())
            self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def get(self, path: str) -> Any:
        """What stands at a path: JSON, or text. Raises RemoteError."""
        async with self._told():
            return await self._client.with_options(base_url=self.address).get(path, cast_to=object)

    async def tokenize(self, text: str) -> list[int]:
        """As the server does it, without special tokens of its own. Raises RemoteError."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        async with self._told():
            client = self._client.with_options(base_url=self.address)
            response: Any = await client.post("/tokenize", body=body, cast_to=object)
        tokens: list[int] = response["tokens"]
        return tokens

    async def block_size(self) -> int:
        """In how many tokens at a time the server reuses; 16, which is vLLM's default, when it does not say."""
        try:
            found = re.search(r'cache_config_info\{[^}]*\bblock_size="(\d+)"', str(await self.get("/metrics")))
        except KVMemError:
            found = None
        return int(found.group(1)) if found is not None else 16

    async def complete(
        self,
        token_ids: Sequence[int],
        options: dict[str, Any],
        extra: dict[str, Any],
        emit: Callable[[str], None],
        cancelled: Callable[[], bool],
    ) -> Completion:
        """Continue `token_ids`, until nobody waits any more. options: of OpenAI's API; extra: vLLM's own.

        Raises RemoteError, InputError, and ClosedError when it was cancelled before its first token.
        """
        text, reason, usage, first = "", None, None, 0.0
        said: list[int] = []
        watched = _Watched(cancelled)
        async with self._told():
            stream = await watched.wait(
                self._client.completions.create(
                    model=self.model,
                    prompt=list(token_ids),
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body={"return_token_ids": True, **extra},
                    **options,
                )
            )
            if stream is None:
                raise ClosedError("The question was cancelled before its first token. Ask again.")
            async with stream:
                pieces = aiter(stream)
                while (chunk := await watched.wait(anext(pieces, _END))) is not _END and chunk is not None:
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        first = first or time.perf_counter()
                        said += (choice.model_extra or {}).get("token_ids") or []
                        reason = choice.finish_reason or reason
                        text += choice.text
                        if choice.text:
                            emit(choice.text)
        if watched.over:
            if not first:
                raise ClosedError("The question was cancelled before its first token. Ask again.")
            return Completion(text, tuple(said), "cancelled", len(said), len(token_ids), 0, first)
        if reason not in ("stop", "length") or usage is None:
            raise RemoteError(f"{self.address} ended an answer for no known reason ({reason}). See its log; ask again.")
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else 0
        ended: FinishReason = "stop" if reason == "stop" else "length"
        count = usage.completion_tokens
        return Completion(text, tuple(said), ended, count, usage.prompt_tokens, cached or 0, first)

    @asynccontextmanager
    async def _told(self) -> AsyncIterator[None]:
        """The errors of the client, as ours."""
        try:
            yield
        except openai.AuthenticationError as error:
            raise RemoteError(f"{self.address} does not accept the API key. Give the server's as api_key=.") from error
        except openai.NotFoundError as error:
            raise ModelNotFoundError(f"{self.address} has no such model or path: {first_line(error)}.") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(f"{self.address} does not take the request: {first_line(error)}. Change it.") from error
        except openai.APIStatusError as error:
            raise RemoteError(f"{self.address} failed: {first_line(error)}. Look at its log; ask again.") from error
        except KVMemError:
            raise
        except Exception as error:  # what breaks off in the middle of a stream is of the library below the client
            if "Timeout" in type(error).__name__:
                what = "did not answer in time. Raise read_timeout"
            else:
                what = f"cannot be reached, or broke off: {first_line(error.__cause__ or error)}. Check that it runs"
            raise RemoteError(f"{self.address} {what}, and ask again.") from error


_END: Any = object()


class _Watched:
    """Waits for one thing after the other, until somebody gives up."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        self._cancelled = cancelled
        self.over = False

    async def wait(self, call: Any) -> Any:
        """What `call` gives, or None when it was given up."""
        task = asyncio.ensure_future(call)
        while not task.done():
            try:
                await asyncio.wait([task], timeout=_GLANCE)
            except asyncio.CancelledError:
                task.cancel()
                raise
            if self._cancelled():
                self.over = True
                task.cancel()
                await asyncio.wait([task])
                # It may have come about just now; the server would go on writing.
                if not task.cancelled() and task.exception() is None and hasattr(task.result(), "close"):
                    await task.result().close()
                return None
        return task.result()
