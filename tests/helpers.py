from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from kvmem import KVMem, LanguageModel


def open_mem(model: LanguageModel, store: Any, **settings: Any) -> KVMem:
    """A KVMem with small chunks and short answers."""
    return KVMem(model, store, **{"max_tokens": 8, "split": {"minimum": 20, "maximum": 80}, **settings})


def gaps_while_busy(model: LanguageModel, calls: list[Callable[[], Coroutine[Any, Any, Any]]]) -> list[float]:
    """Seconds between the turns of an event loop in which `calls` wait for a model that another thread holds for half
    a second. The calls then finish."""
    taken = threading.Event()

    def hold() -> None:
        with model.lock:
            taken.set()
            time.sleep(0.5)

    async def main() -> list[float]:
        gaps: list[float] = []
        holder = threading.Thread(target=hold)

        async def tick() -> None:
            while holder.is_alive():
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                gaps.append(time.perf_counter() - began)

        holder.start()
        taken.wait()
        await asyncio.gather(tick(), *(call() for call in calls))
        return gaps

    return asyncio.run(main())
