"""Agents of LangChain and LlamaIndex on tasks of several steps, beside transformers' own `generate`."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.tools import FunctionTool
from rich.table import Table

from kvmem import KVMem, LanguageModel, TextPart
from kvmem.backends.local import LocalBackend
from kvmem.measure import describe
from kvmem.parsing import AnswerReader
from kvmem.parsing.tools import ToolIndex
from langchain_kvmem import ChatKVMem
from llama_index_kvmem import KVMemLLM

PRICES = {
    "lamp": 12,
    "chair": 45,
    "table": 130,
    "rug": 80,
    "clock": 27,
    "mirror": 64,
    "vase": 19,
    "shelf": 55,
    "desk": 210,
    "stool": 33,
}
COUNTS = (3, 4, 2, 5, 6, 2, 7, 3, 2, 8)
SYSTEM = "You answer with the help of tools. Call one tool at a time and use its result."


def get_price(item: str) -> float:
    """Get the price of one item in euros."""
    return PRICES.get(item.lower().removesuffix("s"), 0)


def multiply(a: float, b: float) -> float:
    """Multiply two numbers."""
    return a * b


TOOLS = ToolIndex.of([convert_to_openai_tool(tool(function)) for function in (get_price, multiply)])


@dataclass(frozen=True)
class Task:
    """A question that takes two calls, one after the other."""

    item: str
    count: int

    @property
    def question(self) -> str:
        return f"How much do {self.count} pieces of the item {self.item!r} cost together?"

    @property
    def total(self) -> int:
        return PRICES[self.item] * self.count


@dataclass(frozen=True)
class Turn:
    """A prompt that an agent ran, and what the model wrote, with its markup."""

    token_ids: list[int]
    written: str
    opening: str


@contextmanager
def watched() -> Iterator[list[Turn]]:
    """The prompts that engines run while this is open."""
    turns: list[Turn] = []
    real = LocalBackend.answer

    def answer(self: LocalBackend, request: Any, *args: Any, **options: Any) -> Any:
        found = real(self, request, *args, **options)
        turns.append(Turn(request.prompt.token_ids, found[0].text, request.prompt.opening))
        return found

    with patch.object(LocalBackend, "answer", answer):
        yield turns


def run(model: LanguageModel, tasks: int = 10, max_tokens: int = 96, repeats: int = 3) -> dict[str, Any]:
    """Run every task with each framework, and every prompt with transformers' `generate`.

    Args:
        model: A model that calls tools.
        tasks: Number of tasks, at most 10.
        max_tokens: Longest answer of a turn.
        repeats: Measurements of the first text with and without tools.

    Returns:
        The result as JSON values. "equal" tells whether `generate` makes the same calls on the same prompt, in every
        turn. "first_text_ratio" is the time to the first text with tools bound over that without.
    """
    frameworks: dict[str, Callable[[KVMem, str, int], str]] = {"LangChain": _langchain, "LlamaIndex": _llama_index}
    rows = []
    with KVMem(model, None) as mem:
        for name, ask in frameworks.items():
            for task in [Task(item, count) for item, count in zip(PRICES, COUNTS, strict=True)][:tasks]:
                with watched() as turns:
                    answer = ask(mem, task.question, max_tokens)
                rows.append({"framework": name, **_row(model, task, answer, turns, max_tokens)})
        ratio = _first_text_ratio(mem, repeats)
    settings = {"tasks": tasks, "max_tokens": max_tokens, "repeats": repeats}
    return {**describe(model, **settings), "rows": rows, "first_text_ratio": ratio}


def _row(model: LanguageModel, task: Task, answer: str, turns: list[Turn], max_tokens: int) -> dict[str, Any]:
    made = [_calls(turn.written, turn.opening) for turn in turns]
    expected = [_calls(_generated(model, turn.token_ids, max_tokens), turn.opening) for turn in turns]
    return {
        "item": task.item,
        "calls": [call for calls in made for call in calls],
        "turns": len(turns),
        "answer": answer,
        "finished": not made[-1],
        "correct": str(task.total) in answer.replace(",", ""),
        "equal": made == expected,
    }


def _calls(written: str, opening: str) -> list[dict[str, Any]]:
    reader = AnswerReader(TOOLS, opening)
    reader.feed(written)
    return [{"name": call.name, "arguments": dict(call.arguments)} for call in reader.finish().tool_calls]


@torch.no_grad()
def _generated(model: LanguageModel, token_ids: list[int], max_tokens: int) -> str:
    """What transformers' `generate` writes, greedily, without the checkpoint's own penalties."""
    ids = torch.tensor([token_ids], device=model.device)
    output = model.hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, repetition_penalty=1.0
    )
    return model.decode(output[0, ids.shape[1] :].tolist(), marks=True)


def _langchain(mem: KVMem, question: str, max_tokens: int) -> str:
    agent: Any = create_agent(
        ChatKVMem(mem=mem, max_tokens=max_tokens), [tool(get_price), tool(multiply)], system_prompt=SYSTEM
    )
    result = agent.invoke({"messages": [("human", question)]}, {"recursion_limit": 16})
    return str(result["messages"][-1].content)


def _llama_index(mem: KVMem, question: str, max_tokens: int) -> str:
    async def main() -> str:
        tools: Any = [FunctionTool.from_defaults(get_price), FunctionTool.from_defaults(multiply)]
        agent = FunctionAgent(
            tools=tools, llm=KVMemLLM(mem, max_new_tokens=max_tokens), system_prompt=SYSTEM, streaming=False
        )
        return str(await agent.run(user_msg=question))

    return asyncio.run(main())


def _first_text_ratio(mem: KVMem, repeats: int) -> float:
    """Median time to the first piece of text with tools bound, over that without; prompts have been read before."""
    messages = [{"role": "user", "content": "Say hello in one short sentence."}]
    tools = [convert_to_openai_tool(tool(function)) for function in (get_price, multiply)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(repeats + 1):
        for bound, found in seconds.items():
            began = time.perf_counter()
            with mem.stream_chat(messages, tools=tools if bound else None, max_tokens=12) as stream:
                next(part for part in stream.parts if isinstance(part, TextPart))
                if number:  # the first time reads the prompt
                    found.append(time.perf_counter() - began)
    return statistics.median(seconds[True]) / statistics.median(seconds[False])


def table(result: dict[str, Any]) -> Table:
    """A table of the tasks."""
    shown = Table("framework", "item", "calls", "finished", "correct", "as generate", title=result["model"])
    for row in result["rows"]:
        made = ", ".join(call["name"] for call in row["calls"])
        shown.add_row(row["framework"], row["item"], made, *(str(row[n]) for n in ("finished", "correct", "equal")))
    shown.caption = f"first text with tools ÷ without: {result['first_text_ratio']:.2f}"
    return shown
