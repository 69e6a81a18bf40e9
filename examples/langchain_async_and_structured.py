"""Async streaming, and answers as objects: python examples/langchain_async_and_structured.py"""

import asyncio

from pydantic import BaseModel, Field

from kvmem import KVMem
from langchain_kvmem import ChatKVMem


class Trip(BaseModel):
    """A trip."""

    destination: str = Field(max_length=30)
    days: int = Field(ge=1, le=30)
    by_train: bool


async def main() -> None:
    with KVMem("smollm2") as mem:
        model = ChatKVMem(mem=mem, max_tokens=40)

        async def tell(question: str) -> str:
            pieces = [chunk.text async for chunk in model.astream(question)]
            return f"{question}\n{''.join(pieces)}\n"

        for told in await asyncio.gather(tell("Name a harbour town."), tell("What is bread made of?")):
            print(told)
        trip = await model.with_structured_output(Trip).ainvoke("Plan a trip of five days to Venice, by train.")
        print(repr(trip))


asyncio.run(main())
