from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
from helpers import gaps_while_busy, open_mem
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField, RunnablePassthrough
from pydantic import BaseModel, Field

from kvmem import ClosedError, InputError, KVMem, LanguageModel
from kvmem.testing import tiny_model
from langchain_kvmem import ChatKVMem
from langchain_kvmem.convert import to_messages

TEXTS = [
    f"The {name} leaves at {hour} and costs {hour * 3} crowns. Dogs pay half, and so do children under twelve. "
    f"Luggage of more than {hour * 4} kilos is weighed at the gate."
    for name, hour in (("ferry", 9), ("night train", 11), ("tram", 6), ("bus", 7), ("cable car", 8), ("airship", 5))
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"]},
    },
}


@pytest.fixture
def chat(mem: KVMem) -> ChatKVMem:
    return ChatKVMem(mem=mem, max_tokens=8)


def test_arguments_of_a_call_win_over_the_models(chat: ChatKVMem) -> None:
    """max_tokens, stop, temperature and seed take effect, each by its name in LangChain."""
    short = chat.invoke("Hello", max_tokens=3)
    assert short.usage_metadata is not None
    assert short.usage_metadata["output_tokens"] == 3
    assert short.response_metadata["finish_reason"] == "length"
    text = str(chat.invoke("Hello").content)
    assert str(chat.invoke("Hello", stop=[text[2]]).content) == text[: text.index(text[2])]
    drawn = {str(chat.invoke("Hello", temperature=2.0, seed=seed).content) for seed in range(4)}
    assert len(drawn) > 1
    assert chat.invoke("Hello", temperature=2.0, seed=1) != chat.invoke("Hello", temperature=2.0, seed=2)
    with pytest.raises(InputError, match="Create another"):
        chat.invoke("Hello", model="gpt-4")


def test_streams_add_up_to_the_answer(chat: ChatKVMem) -> None:
    """Sync and async, with usage and metadata once, at the end."""

    async def collect() -> Any:
        total: Any = None
        async for chunk in chat.astream("Hello"):
            total = chunk if total is None else total + chunk
        return total

    total: Any = None
    for chunk in chat.stream("Hello"):
        total = chunk if total is None else total + chunk
    whole = chat.invoke("Hello")
    for found in (total, asyncio.run(collect())):
        assert found.content == whole.content
        assert found.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]  # type: ignore[index]
        assert found.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]


def test_the_loop_runs_while_the_engine_is_busy(chat: ChatKVMem, model: LanguageModel) -> None:
    """While calls wait for the model, which another thread holds, no call holds up the event loop."""

    async def stream() -> None:
        async for _ in chat.astream("Hello"):
            pass

    gaps = gaps_while_busy(model, [lambda: chat.ainvoke("Hello"), stream])
    assert len(gaps) > 50
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.05


def test_forty_streams_with_early_leavers_leave_nothing_behind(chat: ChatKVMem) -> None:
    """Every second one is left after its first piece; the others finish, and no thread stays."""
    chat.invoke("warm up")
    threads = threading.active_count()
    expected = str(chat.invoke("Hello", max_tokens=6).content)

    async def main() -> list[str]:
        async def one(number: int) -> str:
            text = ""
            async for chunk in chat.astream("Hello", max_tokens=6 if number % 2 else 3000):
                text += str(chunk.content)
                if number % 2 == 0:
                    break
            return text

        return list(await asyncio.wait_for(asyncio.gather(*(one(n) for n in range(40))), timeout=120))

    found = asyncio.run(main())
    assert all(text == expected for text in found[1::2])
    assert all(found)
    assert threading.active_count() <= threads + 1


def test_leaving_an_async_stream_frees_the_engine(chat: ChatKVMem) -> None:
    """A cancelled task stops generating: the next call does not wait for 3,000 tokens."""

    async def main() -> None:
        async def endless() -> None:
            async for _ in chat.astream("Hello", max_tokens=3000):
                pass

        task = asyncio.create_task(endless())
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        answer = await asyncio.wait_for(chat.ainvoke("Hi", max_tokens=2), timeout=20)
        assert answer.usage_metadata is not None

    asyncio.run(main())


def test_concurrent_streams_each_get_their_own_answer(chat: ChatKVMem) -> None:
    """Sixteen at once, none mixed up, none stuck."""
    questions = [f"Question {n}?" for n in range(16)]
    expected = [chat.invoke(q).content for q in questions]

    async def main() -> list[str]:
        async def one(question: str) -> str:
            return "".join([str(chunk.content) async for chunk in chat.astream(question)])

        return list(await asyncio.gather(*(one(q) for q in questions)))

    assert asyncio.run(main()) == expected


def test_a_rag_chain_that_only_swaps_its_model_reuses_its_documents(mem: KVMem) -> None:
    """Twenty questions over top-4 passages in varying orders: from the second on, most of the context is reused."""
    prompt = ChatPromptTemplate.from_messages(
        [("system", "Answer from the context."), ("human", "{context}\n\nQuestion: {question}")]
    )
    answers: list[AIMessage] = []
    model = ChatKVMem(mem=mem, max_tokens=2)
    passages: dict[str, str] = {}
    chain = (
        {"context": lambda q: passages[q], "question": RunnablePassthrough()}
        | prompt
        | model
        | (lambda message: answers.append(message) or message)
        | StrOutputParser()
    )
    for n in range(20):
        order = [(n * 5 + k * (1 + n % 5)) % len(TEXTS) for k in range(4)]
        question = f"When does number {n} leave?"
        passages[question] = "\n\n".join(dict.fromkeys(TEXTS[i] for i in order))
        chain.invoke(question)
    for question, answer in list(zip(passages, answers, strict=True))[10:]:
        usage = answer.response_metadata["usage"]
        context = len(passages[question])
        assert usage["exact"] + usage["reused"] + usage["recomputed"] >= 0.8 * context


def test_bound_documents_are_cached_one_by_one(chat: ChatKVMem) -> None:
    """.bind(context=...) takes texts and documents, in any order."""
    documents = [Document(page_content=text, metadata={"n": n}) for n, text in enumerate(TEXTS[:3])]
    chat.bind(context=documents).invoke("When?")
    again = chat.bind(context=documents[::-1]).invoke("When?")
    usage = again.response_metadata["usage"]
    assert usage["reused"] > 0.7 * sum(map(len, TEXTS[:3]))


class KeysOfCache(InMemoryCache):
    """A cache that is always empty, and the keys it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def lookup(self, prompt: str, llm_string: str) -> None:
        self.keys.add(llm_string)


def test_answers_of_langchains_cache_are_of_the_same_model(tmp_path: Path) -> None:
    """Its key names the weights, the namespace and the settings of blending."""
    cache = InMemoryCache()
    with KVMem(tiny_model(seed=1), None, max_tokens=6) as one, KVMem(tiny_model(seed=2), None, max_tokens=6) as other:
        first, second = ChatKVMem(mem=one, cache=cache), ChatKVMem(mem=other, cache=cache)
        assert first.invoke("Hello").content == first.invoke("Hello").content
        assert second.invoke("Hello").content == ChatKVMem(mem=other).invoke("Hello").content
        seen = KeysOfCache()
        for chat in (first, second, ChatKVMem(mem=one, blend="none")):
            chat.model_copy(update={"cache": seen}).invoke("Hello")
        assert len(seen.keys) == 3


def test_callbacks_see_every_token_once(chat: ChatKVMem) -> None:
    """on_llm_new_token gets the pieces in order, on_llm_end comes once."""
    seen: list[str] = []
    ends: list[Any] = []

    class Handler(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **_: Any) -> None:
            seen.append(token)

        def on_llm_end(self, response: Any, **_: Any) -> None:
            ends.append(response)

    text = "".join(str(chunk.content) for chunk in chat.stream("Hello", config={"callbacks": [Handler()]}))
    assert "".join(seen) == text
    assert len(ends) == 1


class Trip(BaseModel):
    """Where to."""

    goal: Literal["Ellery", "Orrin"]
    days: int = Field(ge=0, le=99)
    return_ticket: bool


def test_structured_output_is_of_the_schema_even_from_random_weights(chat: ChatKVMem) -> None:
    """A model of random weights that may not leave the schema answers with an instance of it, in every form."""
    chat = chat.model_copy(update={"max_tokens": 80})
    for method in ("json_schema", "function_calling", "json_mode"):
        assert isinstance(chat.with_structured_output(Trip, method=method).invoke("Plan"), Trip)
    found = chat.with_structured_output(Trip.model_json_schema()).invoke("Plan")
    assert set(found) == {"goal", "days", "return_ticket"}
    raw = chat.with_structured_output(Trip, include_raw=True).invoke("Plan")
    assert isinstance(raw["parsed"], Trip)
    assert raw["parsing_error"] is None
    assert json.loads(raw["raw"].content)["goal"] == raw["parsed"].goal


def test_json_that_was_cut_off_is_an_error_not_a_shorter_answer(chat: ChatKVMem) -> None:
    """LangChain's parsers would close it and return a part."""
    schema = {"title": "A", "description": "", "type": "array", "items": {"enum": ["one", "two"]}, "minItems": 90}
    model = chat.model_copy(update={"max_tokens": 20})
    with pytest.raises(OutputParserException, match="Raise max_tokens"):
        model.with_structured_output(schema).invoke("Count")
    raw = model.with_structured_output(schema, include_raw=True).invoke("Count")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


def test_an_answer_whose_engine_closes_is_an_error_not_a_cancelled_task(model: LanguageModel) -> None:
    """Tasks are cancelled by their own callers only."""

    async def main() -> None:
        mem = KVMem(model, None)
        running = mem.stream_chat([{"role": "user", "content": "Hi"}], max_tokens=3000)
        waiting = asyncio.create_task(mem.stream_chat([{"role": "user", "content": "Hi"}]).wait())
        await running.__anext__()
        await asyncio.to_thread(mem.close)
        with pytest.raises(ClosedError):
            await waiting

    asyncio.run(main())


@pytest.mark.parametrize("way", ["ainvoke", "astream", "agenerate"])
def test_the_first_call_opens_its_engine_off_the_event_loop(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Loading a model takes seconds, in which others are served."""
    opened: list[threading.Thread] = []

    def opening(*_: Any, **__: Any) -> KVMem:
        opened.append(threading.current_thread())
        return open_mem(model, None)

    monkeypatch.setattr("kvmem.sharing.open_engine", opening)
    chat = ChatKVMem(model="tiny", max_tokens=2)

    async def main() -> None:
        if way == "ainvoke":
            await chat.ainvoke("Hi")
        elif way == "astream":
            assert [chunk async for chunk in chat.astream("Hi")]
        else:
            await chat.agenerate([[HumanMessage("Hi")]])

    asyncio.run(main())
    assert len(opened) == 1
    assert opened[0] is not threading.main_thread()
    chat.engine.close()


def test_a_forced_tool_is_called_with_its_arguments(chat: ChatKVMem) -> None:
    """By name, by "any", and streamed; the answer is the call and nothing else."""
    chat = chat.model_copy(update={"max_tokens": 80})
    for choice in ("weather", "any", "required", True, {"function": {"name": "weather"}}):
        message = chat.bind_tools([WEATHER], tool_choice=choice).invoke("How is it?")  # type: ignore[arg-type]
        (call,) = message.tool_calls
        assert call["name"] == "weather"
        assert isinstance(call["args"]["days"], int)
        assert message.content == ""
    total: Any = None
    for chunk in chat.bind_tools([WEATHER], tool_choice="any").stream("How is it?"):
        total = chunk if total is None else total + chunk
    assert [c["name"] for c in total.tool_calls] == ["weather"]
    with pytest.raises(InputError, match="Known are: weather"):
        chat.bind_tools([WEATHER], tool_choice="wether")


def test_messages_of_every_kind_are_converted() -> None:
    """Roles, tool calls and results, and blocks; what a text model cannot read is an error."""
    call = {"name": "weather", "args": {"days": 1}, "id": "1", "type": "tool_call"}
    converted = to_messages(
        [
            SystemMessage("s"),
            HumanMessage(
                [{"type": "text", "text": "a"}, {"type": "text-plain", "text": "b", "mime_type": "text/plain"}]
            ),
            AIMessage("", tool_calls=[call]),
            ToolMessage("4", tool_call_id="1", name="weather"),
        ]
    )
    assert [m["role"] for m in converted] == ["system", "user", "assistant", "tool"]
    assert converted[1]["content"] == ["a", "\n\nb\n\n"]
    assert converted[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"days": 1}}
    with pytest.raises(InputError, match="reads text"):
        to_messages([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])


def test_an_engine_opens_once_and_only_when_needed(model: LanguageModel, tmp_path: Path, monkeypatch: Any) -> None:
    """Making a ChatKVMem loads nothing; threads that call it first share one engine."""
    opened: list[int] = []

    def slow(*_: Any, **__: Any) -> KVMem:
        opened.append(1)
        time.sleep(0.2)
        return KVMem(model, tmp_path / "kv", max_tokens=2)

    monkeypatch.setattr("kvmem.sharing.open_engine", slow)
    chat = ChatKVMem(model="anything")
    assert opened == []
    threads = [threading.Thread(target=chat.invoke, args=("Hello",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [1]
    # LangChain makes a new one of a configurable model in every call.
    configurable = chat.configurable_fields(
        temperature=ConfigurableField(id="t"), namespace=ConfigurableField(id="user")
    )
    for user in ("default", "default", "anna", "anna"):
        configurable.invoke("Hello", config={"configurable": {"t": 0.0, "user": user}})
    assert opened == [1, 1]
    chat.engine.close()
