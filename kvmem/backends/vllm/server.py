"""VLLMServer: talks to a vLLM server through OpenAI's client and translates its errors."""

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

from kvmem.cancellation import Cancellation
from kvmem.errors import ClosedError, InputError, KVMemError, ModelNotFoundError, RefusedError, RemoteError, first_line
from kvmem.results import FinishReason
from kvmem.settings import RemoteSettings

try:
    import openai
except ImportError as error:
    raise InputError("A vLLM server requires OpenAI's client. Install it with: pip install 'kvmem[vllm]'") from error

T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """The result of one prompt.

    token_ids, generated: token ids and token count of the answer. prompt: token count of the prompt. cached: prompt
        tokens found in the prefix cache; 0 for a cancelled answer, because the server reports it at the end.
    first_token: when the first token arrived, in `time.perf_counter()` seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    generated: int
    prompt: int
    cached: int
    first_token: float


class VLLMServer:
    """One model on one server. Calls run in a separate event loop, so that they can be cancelled."""

    def __init__(self, url: str, settings: RemoteSettings) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = None
        if not parts.hostname or port is None:
            raise InputError(f"{url!r} is not a server address. Use vllm://host:port/model.")
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
        """Run `call` and wait for it. Call this from any other thread."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def close(self) -> None:
        """Close the connection. Calling it again does nothing."""
        if not self._loop.is_running():
            return
        with suppress(Exception):
            self.run(self._client.close())
            self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def get(self, path: str) -> Any:
        """GET a path and return its JSON or text. Raises RemoteError."""
        async with self._told():
            return await self._client.with_options(base_url=self.address).get(path, cast_to=object)

    async def tokenize(self, text: str) -> list[int]:
        """Tokenize on the server, without added special tokens. Raises RemoteError."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        async with self._told():
            client = self._client.with_options(base_url=self.address)
            response: Any = await client.post("/tokenize", body=body, cast_to=object)
        tokens: list[int] = response["tokens"]
        return tokens

    async def block_size(self) -> int:
        """Tokens per block of the prefix cache; vLLM's default of 16 if the server does not report it."""
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
        cancellation: Cancellation,
    ) -> Completion:
        """Continue `token_ids`, until cancelled. options: of OpenAI's API; extra: vLLM's own.

        Raises RemoteError, InputError, and ClosedError if cancelled before the first token.
        """
        text, reason, usage, first = "", None, None, 0.0
        said: list[int] = []
        watched = _Watched(cancellation)
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
                cancellation.check()
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
                cancellation.check()
                raise ClosedError("The question was cancelled before its first token. Ask again.")
            return Completion(text, tuple(said), "cancelled", len(said), len(token_ids), 0, first)
        if reason not in ("stop", "length") or usage is None:
            raise RemoteError(f"{self.address} ended an answer unexpectedly ({reason}). Check its log and try again.")
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else 0
        ended: FinishReason = "stop" if reason == "stop" else "length"
        count = usage.completion_tokens
        return Completion(text, tuple(said), ended, count, usage.prompt_tokens, cached or 0, first)

    @asynccontextmanager
    async def _told(self) -> AsyncIterator[None]:
        """Translate the client's errors to kvmem's."""
        try:
            yield
        except openai.AuthenticationError as error:
            raise RemoteError(f"{self.address} rejected the API key. Give the correct one as api_key=.") from error
        except openai.NotFoundError as error:
            raise ModelNotFoundError(
                f"{self.address} has no such model or path: {first_line(error)}. Check the address."
            ) from error
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise RefusedError(f"{self.address} rejected the request: {first_line(error)}. Change it.") from error
        except openai.APIStatusError as error:
            raise RemoteError(f"{self.address} failed: {first_line(error)}. Check its log and try again.") from error
        except KVMemError:
            raise
        except Exception as error:  # errors in the middle of a stream come from the client's HTTP library
            if "Timeout" in type(error).__name__:
                what = "did not answer in time. Raise read_timeout"
            else:
                what = (
                    f"cannot be reached or broke off the connection: {first_line(error.__cause__ or error)}. "
                    "Check that it runs"
                )
            raise RemoteError(f"{self.address} {what}, and try again.") from error


_END: Any = object()


class _Watched:
    """Waits for one thing after the other, until the work is cancelled."""

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation
        self.over = False

    async def wait(self, call: Any) -> Any:
        """The result of `call`, or None when it was cancelled."""
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(stop.set)

        task, stopping = asyncio.ensure_future(call), asyncio.ensure_future(stop.wait())
        try:
            with self._cancellation.calling(wake):
                timeout = self._cancellation.remaining
                await asyncio.wait([task, stopping], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _end(task)
            raise
        finally:
            stopping.cancel()
        if task.done() and not self._cancellation.stopped:
            return task.result()
        self.over = True
        await _end(task)
        return None


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a call. If it has just opened a stream, close it, because the server would go on generating."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled() and task.exception() is None and hasattr(task.result(), "close"):
        await task.result().close()
