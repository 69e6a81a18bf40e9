"""The part of vLLM's HTTP interface that kvmem uses, with a prefix cache, and without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from kvmem.testing import tiny_tokenizer


@dataclass
class FakeVLLM:
    """Says "abcdef...", a letter a token. prompts: bodies of the requests for completions, in order.

    fails: statuses to answer the next requests with; None answers one normally.
    hangs_after: replies to write; later ones write nothing until their client leaves.
    breaks_after: pieces after which a reply breaks off. pause: seconds before every piece.
    finished: replies written to their end. aborted: replies whose client left.
    """

    root: str
    version: str = "0.32.0"
    reports: bool = True
    block: int = 16
    window: int = 4096
    key: str | None = None
    fails: list[int | None] = field(default_factory=list)
    hangs_after: int | None = None
    breaks_after: int | None = None
    pause: float = 0.0
    prompts: list[dict[str, Any]] = field(default_factory=list)
    finished: int = 0
    aborted: int = 0
    running: int = 0
    most: int = 0
    shift: int = 0
    tells_ids: bool = True
    tells_blocks: bool = True

    def __post_init__(self) -> None:
        self._tokenizer = tiny_tokenizer()
        self._cached: set[tuple[str, tuple[int, ...]]] = set()

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/version")(lambda: {"version": self.version})
        if self.tells_blocks:
            line = f'vllm:cache_config_info{{block_size="{self.block}",engine="0"}} 1.0\n'
            app.get("/metrics")(lambda: PlainTextResponse(line))
        card = {"id": "m", "root": self.root, "max_model_len": self.window}
        app.get("/v1/models")(lambda: {"object": "list", "data": [card]})
        app.post("/tokenize")(self._tokenize)
        app.post("/v1/completions")(self._complete)
        return app

    async def _tokenize(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        ids = self._tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return {"tokens": [token + self.shift for token in ids]}

    async def _complete(self, request: Request) -> Any:
        body = await request.json()
        if self.key is not None and request.headers["authorization"] != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "Unauthorized"}}, 401)
        status = self.fails.pop(0) if self.fails else None
        if status is not None:
            return JSONResponse({"error": {"message": "not now"}}, status)
        self.prompts.append(body)
        ids, salt = body["prompt"], body["cache_salt"]
        blocks = [tuple(ids[:end]) for end in range(self.block, len(ids) + 1, self.block)]
        cached = 0
        for block in blocks[: (len(ids) - 1) // self.block]:
            if (salt, block) not in self._cached:
                break
            cached = len(block)
        self._cached |= {(salt, block) for block in blocks}
        return StreamingResponse(self._events(body, cached), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], cached: int) -> AsyncIterator[str]:
        count = body["max_tokens"]
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.finished == self.hangs_after:
                await asyncio.Event().wait()
            for number in range(count):
                await asyncio.sleep(self.pause)
                if number == self.breaks_after:
                    raise ConnectionResetError
                text = chr(ord("a") + number % 26)
                reason = "length" if number + 1 == count else None
                if text in (body.get("stop") or ()):
                    text, reason = "", "stop"
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
                choice = {"index": 0, "text": text, "finish_reason": reason}
                if body.get("return_token_ids") and self.tells_ids:
                    choice["token_ids"] = ids
                yield self._event([choice])
                if reason == "stop":
                    break
            details = {"cached_tokens": cached} if cached and self.reports else None
            size = len(body["prompt"])
            usage = {"prompt_tokens": size, "completion_tokens": count, "total_tokens": size + count}
            yield self._event([], {**usage, "prompt_tokens_details": details})
            yield "data: [DONE]\n\n"
            self.finished += 1
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    def _event(self, choices: list[Any], usage: dict[str, Any] | None = None) -> str:
        head = {"id": "x", "object": "text_completion", "created": 0, "model": "m"}
        return f"data: {json.dumps({**head, 'choices': choices, 'usage': usage})}\n\n"
