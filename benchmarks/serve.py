"""Tests `kvmem serve` from the client's side: a coding agent, concurrent clients, disconnects, and a full queue.

The server runs in a separate process, and OpenAI's client talks to it over the loopback interface.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import openai
from rich.table import Table

import kvmem
from kvmem.errors import KVMemError
from kvmem.measure import describe
from kvmem.model.local import LanguageModel

_SYSTEM = (
    "You are a coding assistant. You get the files of a project and a request. Answer with the smallest change that "
    "does what is asked, as a diff, and name the file. Do not repeat files that stay as they are. Keep to the style of "
    "the code around, keep names, and add no comment that says what the code says already."
)
_REQUESTS = (
    "Add a parameter for the time-out.",
    "Rename the helper to something clearer.",
    "Handle the case of an empty list.",
    "Write the missing docstring.",
    "Raise an error when the path is a directory.",
)


def run(
    model: LanguageModel, source: str, *, seconds: float = 60.0, clients: int = 16, leaving: int = 50, turns: int = 6
) -> dict[str, Any]:
    """Run all tests: one server for the agent, one for the rest. source: the value for `kvmem serve --model`."""
    with _server(source) as (address, _):
        agent = agent_session(f"{address}/v1", source, turns=turns)
    with _server(source) as (address, process):
        crowd = asyncio.run(_crowd(f"{address}/v1", source, seconds, clients, process.pid))
        left = asyncio.run(_leave(address, source, leaving))
        full = asyncio.run(_overfill(f"{address}/v1", source))
    settings = {"seconds": seconds, "clients": clients, "leaving": leaving, "turns": turns, "queue": _QUEUE}
    return {
        "benchmark": "serve",
        **describe(model, **settings),
        "agent": agent,
        "crowd": crowd,
        "leaving": left,
        "full": full,
    }


_QUEUE = 64


@contextmanager
def _server(source: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server with an empty store; yields its address and process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "kvmem.cli.main", "serve", "--model", source, "--port", str(port)]
        command += ["--store", str(Path(scratch) / "kv"), "--queue", str(_QUEUE)]
        with (Path(scratch) / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ})  # noqa: S603
            address = f"http://127.0.0.1:{port}"
            try:
                _until_up(address, process, Path(scratch) / "log")
                yield address, process
            finally:
                process.terminate()
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()


def _until_up(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                return
        if process.poll() is not None:
            raise KVMemError(f"The server did not start. Its log ends with: {log.read_text()[-500:]}")
        time.sleep(0.1)
    raise KVMemError("The server did not start within two minutes. Run `kvmem serve` manually to see why.")


# A coding agent


def agent_session(base_url: str, model: str, turns: int) -> list[dict[str, Any]]:
    """Measure token classes by turn. Each prompt has five files, the conversation so far, and a request.

    One line of one file is edited after each turn. reused: exact and reused tokens.
    """
    client = openai.OpenAI(base_url=base_url, api_key="none", timeout=300)
    files = _files()
    history: list[Any] = []
    rows = []
    for turn in range(turns):
        shown = "\n\n".join(f"### {name}\n```python\n{text}\n```" for name, text in files.items())
        request = _REQUESTS[turn % len(_REQUESTS)]
        messages = [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": f"These are the files:\n\n{shown}"},
            {"role": "assistant", "content": "I have read them."},
            *history,
            {"role": "user", "content": request},
        ]
        answer = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
        usage = (answer.model_extra or {})["kvmem"]["usage"]
        seconds = (answer.model_extra or {})["kvmem"]["seconds"]["first_token"]
        prompt = sum(usage[name] for name in ("exact", "reused", "recomputed", "computed"))
        reused = usage["exact"] + usage["reused"]
        rows.append({"turn": turn + 1, "prompt": prompt, "reused": reused, "first_token": seconds, "usage": usage})
        history += [
            {"role": "user", "content": request},
            {"role": "assistant", "content": answer.choices[0].message.content},
        ]
        name = list(files)[turn % len(files)]
        lines = files[name].split("\n")
        lines.insert(len(lines) // 2, f"        # turn {turn + 1}: checked again")
        files[name] = "\n".join(lines)
    return rows


def _files() -> dict[str, str]:
    """The first 3,000 characters of five files of the package."""
    root = Path(kvmem.__file__).parent
    names = ("text/retrieval.py", "text/chunking.py", "runtime/worker.py", "library/corpus.py", "library/threads.py")
    return {name: (root / name).read_text(encoding="utf-8")[:3000] for name in names}


# Concurrent clients


async def _crowd(base_url: str, model: str, seconds: float, clients: int, pid: int) -> dict[str, Any]:
    """All clients repeatedly ask about one of eight texts and read the streamed answer."""
    texts = [(f"Report {n}. " + text)[:1200] for n, text in enumerate([*_files().values()] * 2)][:8]
    until = time.perf_counter() + seconds
    answered, errors, firsts = [0] * clients, [0], list[float]()
    memory: list[int] = []

    async def client(number: int) -> None:
        api = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=300)
        while time.perf_counter() < until:
            text = texts[(number + answered[number]) % len(texts)]
            content = f"{text}\n\nQuestion {number}.{answered[number]}: what is this about?"
            began, first = time.perf_counter(), 0.0
            try:
                stream = await api.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": content}], max_tokens=8, stream=True
                )
                async for chunk in stream:
                    if chunk.choices and chunk.choices[0].delta.content and not first:
                        first = time.perf_counter() - began
                if first:
                    firsts.append(first)
                answered[number] += 1
            except openai.OpenAIError:
                errors[0] += 1

    async def watch() -> None:
        while time.perf_counter() < until:
            memory.append(_private(pid))
            await asyncio.sleep(seconds / 60)

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    return {
        "answers": sum(answered),
        "fewest": min(answered),
        "most": max(answered),
        "errors": errors[0],
        "first_token_median": float(np.median(firsts)),
        "first_token_p95": float(np.percentile(firsts, 95)),
        **_growth(memory[len(memory) // 3 :]),
    }


def _growth(warm: list[int]) -> dict[str, int]:
    """Memory in bytes, after the first third of the run."""
    return {"memory_after_a_third": warm[0], "memory_at_the_end": warm[-1], "memory_highest": max(warm)}


def _private(pid: int) -> int:
    """A process's private memory in bytes, without file pages; 0 if it cannot be read."""
    with suppress(OSError):
        _, _, rest = Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")
        return int(rest.split()[0]) * 1024 if rest else 0
    return 0


# Clients that disconnect


async def _leave(address: str, model: str, count: int) -> dict[str, Any]:
    """Clients ask and disconnect, one after the other; measures how long the server takes to become idle again.

    Every other client disconnects during prefill, the others after the first pieces of a long answer.
    """
    seconds: list[float] = []
    async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:
        for number in range(count):
            reading = number % 2 == 0
            files = "\n\n".join(_files().values()) if reading else "Tell a long story."
            body = {
                "model": model,
                "messages": [{"role": "user", "content": f"{number}. {files}"}],
                "max_tokens": 2000,
                "stream": True,
            }
            with suppress(httpx.TimeoutException):
                timeout = httpx.Timeout(60, read=0.3 if reading else 60)
                async with client.stream("POST", "/v1/chat/completions", json=body, timeout=timeout) as response:
                    pieces = response.aiter_raw()
                    for _ in range(3):
                        await anext(pieces)
            began = time.perf_counter()
            while True:
                health = (await client.get("/health")).json()
                if health["running"] == health["waiting"] == 0:
                    break
                await asyncio.sleep(0.005)
            seconds.append(time.perf_counter() - began)
    return {"clients": count, "free_median": float(np.median(seconds)), "free_highest": max(seconds)}


async def _overfill(base_url: str, model: str) -> dict[str, Any]:
    """Send more concurrent requests than the server can run and queue."""
    api = openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=300)
    count = _QUEUE + 36

    async def ask(number: int) -> tuple[bool, float]:
        began = time.perf_counter()
        try:
            content = f"{number}: hello"
            await api.chat.completions.create(
                model=model, messages=[{"role": "user", "content": content}], max_tokens=2
            )
        except openai.RateLimitError:
            return True, time.perf_counter() - began
        return False, time.perf_counter() - began

    found = await asyncio.gather(*(ask(number) for number in range(count)))
    refused = [seconds for was, seconds in found if was]
    return {"requests": count, "refused": len(refused), "refused_after_highest": max(refused, default=0.0)}


def table(result: dict[str, Any]) -> Table:
    """All results as a terminal table."""
    shown = Table("test", "result", title=f"kvmem serve: {result['model']}")
    for row in result["agent"]:
        share = row["reused"] / row["prompt"]
        shown.add_row(f"agent, turn {row['turn']}", f"{share:.0%} of {row['prompt']} tokens reused")
    for what, found in rows(result):
        shown.add_row(what, found)
    return shown


def rows(result: dict[str, Any]) -> Sequence[tuple[str, str]]:
    """The results as pairs of label and value."""
    settings, crowd, left, full = result["settings"], result["crowd"], result["leaving"], result["full"]
    grown = crowd["memory_at_the_end"] / crowd["memory_after_a_third"] - 1 if crowd["memory_after_a_third"] else 0.0
    return [
        (
            f"{settings['clients']} clients, {settings['seconds']:.0f} s",
            f"{crowd['answers']} answers, {crowd['errors']} errors",
        ),
        ("answers per client", f"{crowd['fewest']} to {crowd['most']}"),
        ("first token", f"median {crowd['first_token_median']:.2f} s, p95 {crowd['first_token_p95']:.2f} s"),
        ("memory growth, first third to end", f"{grown:+.1%}"),
        (f"{left['clients']} clients disconnected", f"server idle after at most {left['free_highest']:.2f} s"),
        (
            f"{full['requests']} concurrent requests, queue of {settings['queue']}",
            f"{full['refused']} refused, after at most {full['refused_after_highest']:.2f} s",
        ),
    ]
