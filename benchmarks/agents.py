"""Agents of LangChain and LlamaIndex on tasks of two steps, beside transformers' own `generate`."""

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

NAMES = ("Alice", "Bob", "Carol", "David", "Erin", "Frank", "Grace", "Henry", "Irene", "Jack")
IDS = {name: 17 + 13 * number for number, name in enumerate(NAMES)}
SYSTEM = "You look things up with tools, one call at a time, and answer in one sentence when you have the result."


def find_user(name: str) -> int:
    """Find the id of a user by name."""
    return IDS.get(name, 0)


def get_email(user_id: int) -> str:
    """Get the email address of a user by id."""
    found = next((name for name, identity in IDS.items() if identity == user_id), None)
    return "There is no such id." if found is None else f"The email address of {found} is {_address(found)}."


def _address(name: str) -> str:
    return f"{name.lower()}{IDS[name] % 10}@corp.example"


TOOLS = ToolIndex.of([convert_to_openai_tool(tool(function)) for function in (find_user, get_email)])


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
            for user in NAMES[:tasks]:
                with watched() as turns:
                    answer = ask(
                        mem, f"First find the user {user}, then get the email address of that user id.", max_tokens
                    )
                rows.append({"framework": name, **_row(model, user, answer, turns, max_tokens)})
        ratio = _first_text_ratio(mem, repeats)
    settings = {"tasks": tasks, "max_tokens": max_tokens, "repeats": repeats}
    return {"benchmark": "agents", **describe(model, **settings), "rows": rows, "first_text_ratio": ratio}


def _row(model: LanguageModel, user: str, answer: str, turns: list[Turn], max_tokens: int) -> dict[str, Any]:
    made = [_calls(turn.written, turn.opening) for turn in turns]
    expected = [_calls(_generated(model, turn.token_ids, max_tokens), turn.opening) for turn in turns]
    return {
        "user": user,
        "calls": [call for calls in made for call in calls],
        "turns": len(turns),
        "answer": answer,
        "finished": not made[-1],
        "correct": _address(user) in answer,
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
        ChatKVMem(mem=mem, max_tokens=max_tokens), [tool(find_user), tool(get_email)], system_prompt=SYSTEM
    )
    result = agent.invoke({"messages": [("human", question)]}, {"recursion_limit": 16})
    return str(result["messages"][-1].content)


def _llama_index(mem: KVMem, question: str, max_tokens: int) -> str:
    async def main() -> str:
        tools: Any = [FunctionTool.from_defaults(find_user), FunctionTool.from_defaults(get_email)]
        agent = FunctionAgent(
            tools=tools, llm=KVMemLLM(mem, max_new_tokens=max_tokens), system_prompt=SYSTEM, streaming=False
        )
        return str(await agent.run(user_msg=question))

    return asyncio.run(main())


def _first_text_ratio(mem: KVMem, repeats: int) -> float:
    """Median time to the first piece of text with tools bound, over that without; prompts have been read before."""
    messages = [{"role": "user", "content": "Say hello in one short sentence."}]
    tools = [convert_to_openai_tool(tool(function)) for function in (find_user, get_email)]
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
    shown = Table("framework", "user", "calls", "finished", "correct", "as generate", title=result["model"])
    for row in result["rows"]:
        made = ", ".join(call["name"] for call in row["calls"])
        shown.add_row(row["framework"], row["user"], made, *(str(row[n]) for n in ("finished", "correct", "equal")))
    shown.caption = f"first text with tools ÷ without: {result['first_text_ratio']:.2f}"
    return shown
