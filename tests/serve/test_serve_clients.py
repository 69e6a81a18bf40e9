"""The clients that people have, unchanged, against `kvmem serve`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import hypothesis
import openai
import pytest
import schemathesis
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving import running, serving

from kvmem import LanguageModel, Settings
from kvmem.serve.app import create_app
from kvmem.serve.settings import ServeSettings
from kvmem.store import MemoryStore

pytestmark = [pytest.mark.enable_socket]

HELLO: Any = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def address(model: LanguageModel) -> Iterator[str]:
    with serving(model, max_tokens=40) as client:
        yield str(client.base_url).rstrip("/")


class Person(BaseModel):
    age: int


@tool
def look_up(n: int) -> str:
    """Look up a number."""
    return str(n)


def test_openais_client_chats_streams_and_completes(address: str) -> None:
    """The official client, and what is kvmem's in `extra_body` and `model_extra`."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, temperature=0)
    usage = {"include_usage": True}
    streamed = list(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4, stream=True,
                                                   stream_options=usage))  # type: ignore[call-overload]  # fmt: skip
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert streamed[-1].usage.prompt_tokens == whole.usage.prompt_tokens  # type: ignore[union-attr]
    assert streamed[-1].usage.prompt_tokens_details.cached_tokens > 0
    told = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=4, extra_body={"kvmem": {"context": ["The sky is green."]}}
    )
    assert told.model_extra is not None
    assert len(told.model_extra["kvmem"]["sources"]) == 1
    completed = client.completions.create(model="tiny", prompt="Once", max_tokens=4)
    pieces = client.completions.create(model="tiny", prompt="Once", max_tokens=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == completed.choices[0].text


def test_openais_client_parses_and_calls(address: str) -> None:
    """Structured output by `parse`, and a tool that has to be called."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Person, max_tokens=40)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    function: Any = {"type": "function", "function": {"name": "f", "parameters": Person.model_json_schema()}}
    called = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[function], tool_choice="required", max_tokens=60
    )
    (call,) = called.choices[0].message.tool_calls or ()
    assert set(json.loads(call.function.arguments)) == {"age"}  # type: ignore[union-attr]


def test_openais_client_raises_its_own_errors(model: LanguageModel, address: str) -> None:
    """By status, so that what clients do about each works."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "word " * 5000}])
    assert long.value.code == "context_length_exceeded"
    with serving(model, limits=ServeSettings(keys={"0" * 64: "someone"})) as closed:
        stranger = openai.OpenAI(base_url=closed.base_url.join("/v1"), api_key="nobody", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


async def test_langchains_chatopenai_works_unchanged(address: str) -> None:
    """Chat, events, async, structured output and tools."""
    llm = ChatOpenAI(model="tiny", base_url=f"{address}/v1", api_key="none", max_completion_tokens=90, temperature=0)  # type: ignore[arg-type]
    whole = llm.invoke("Say hello.")
    assert "".join(str(chunk.content) for chunk in llm.stream("Say hello.")) == whole.content
    assert (await llm.ainvoke("Say hello.")).content == whole.content
    assert llm.invoke("Say hello.").usage_metadata["input_token_details"]["cache_read"] > 0  # type: ignore[index]
    assert isinstance(llm.with_structured_output(Person, method="json_schema").invoke("Who?"), Person)
    message = llm.bind_tools([look_up], tool_choice="look_up").invoke("Look up 7.")
    assert isinstance(message.tool_calls[0]["args"]["n"], int)  # type: ignore[union-attr]


@pytest.mark.parametrize("chat", [True, False])
async def test_llama_indexs_openailike_works_unchanged(address: str, chat: bool) -> None:
    """Completions and chats, events and async; tools where it is a chat model."""
    llm = OpenAILike(
        model="tiny", api_base=f"{address}/v1", api_key="none", is_chat_model=chat, is_function_calling_model=chat,
        max_tokens=90, temperature=0, context_window=4096,
    )  # fmt: skip
    whole = llm.complete("Say hello.")
    assert list(llm.stream_complete("Say hello."))[-1].text == whole.text
    assert (await llm.acomplete("Say hello.")).text == whole.text
    assert llm.chat([ChatMessage(content="Say hello.")]).message.content
    if chat:
        function = FunctionTool.from_defaults(lambda n: str(n), name="look_up", description="Look up a number.")
        answer = llm.chat_with_tools([function], "Look up 7.", tool_required=True)
        assert llm.get_tool_calls_from_response(answer)[0].tool_name == "look_up"


def test_five_files_of_which_one_is_edited_are_hardly_read_again(smollm2_default: LanguageModel) -> None:
    """A coding agent that sends the same five files every turn has most of its prompt reused from the second on."""
    from benchmarks.serve import agent_session

    app = create_app(smollm2_default, MemoryStore(), Settings(max_tokens=16))
    with running(app) as address:
        turns = agent_session(f"{address}/v1", smollm2_default.name, turns=4)
    assert turns[0]["prompt"] > 3000
    for turn in turns[1:]:
        assert turn["reused"] >= 0.85 * turn["prompt"], turns


test_five_files_of_which_one_is_edited_are_hardly_read_again = pytest.mark.model(
    test_five_files_of_which_one_is_edited_are_hardly_read_again
)


def meaningful(body: Any) -> Any:
    """A request that the schema allows, with what one field means for another put right, which is in no schema."""
    if not isinstance(body, dict) or "model" not in body:
        return body
    kept = ("stream", "stream_options", "temperature", "top_p", "seed", "user", "response_format")
    body = {name: value for name, value in body.items() if name in (*kept, "messages", "prompt")}
    if isinstance(body.get("messages"), list):
        body["messages"] = [{"role": "user", "content": f"{message}"[:200]} for message in body["messages"][:5]]
    if "prompt" in body and not isinstance(body["prompt"], str):
        body["prompt"] = "Once"
    return {**body, "model": "tiny"}


def test_whatever_the_schema_allows_is_answered(model: LanguageModel) -> None:
    """More than 500 requests that the schema allows, or nearly: no status of 500 or more, and every reply is of a shape
    and a status that the schema has."""
    limits = ServeSettings(max_tokens=16, queue=4, timeout=20)
    settings = Settings.parse(None, {"max_tokens": 4, "split": {"minimum": 20, "maximum": 80}})
    model.name = "tiny"
    app, host = create_app(model, MemoryStore(), settings, limits), {"host": "127.0.0.1"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=host)
    statuses: dict[str, list[int]] = {}
    for operation in schema.get_all_operations():
        run_cases(operation.ok(), statuses.setdefault(operation.ok().label, []))
    assert sum(map(len, statuses.values())) > 500
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert statuses[f"POST {path}"].count(200) >= 20
        assert statuses[f"POST {path}"].count(400) >= 20
    assert statuses["POST /v1/documents"].count(201) >= 20


def run_cases(operation: Any, statuses: list[int]) -> None:
    """Requests to one operation; many to those that take a body."""
    count = 150 if operation.body else 25

    @hypothesis.given(case=operation.as_strategy() | operation.as_strategy(GenerationMode.NEGATIVE))
    @hypothesis.settings(max_examples=count, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.seed(0)
    def ask(case: Case) -> None:
        if case.meta is not None and case.meta.generation.mode == GenerationMode.POSITIVE and len(statuses) % 2:
            case.body = meaningful(case.body)
        # What one field means for another is in no schema, so some that it allows are refused.
        checked = case.call_and_validate(base_url="http://127.0.0.1", excluded_checks=[positive_data_acceptance])
        statuses.append(checked.status_code)

    ask()
