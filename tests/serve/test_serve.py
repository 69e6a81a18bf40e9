from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers import agent_model, prompts, says
from pydantic import ValidationError
from serving import running, serving, until_idle
from typer.testing import CliRunner

from kvmem import InputError, KVMem, LanguageModel
from kvmem.cli.main import app as cli
from kvmem.runtime.worker import turns_of
from kvmem.serve.app import create_app
from kvmem.serve.gate import Gate, QueueFullError
from kvmem.serve.job import Events
from kvmem.serve.settings import ServeSettings, check_address, digest, read_keys
from kvmem.serve.tenants import Tenants
from kvmem.serve.wire import ChatRequest
from kvmem.store import DiskStore, MemoryStore
from kvmem.testing import tiny_model

pytestmark = [pytest.mark.enable_socket]

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Say hello."}]
FERRY = "The night ferry leaves Port Ellery at ten past nine and reaches Saint Orrin at dawn, in any weather."
ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789abc"
KEYS = {digest(ALICE): "alice", digest(BOB): "bob"}


@pytest.fixture(scope="module")
def client(model: LanguageModel) -> Iterator[httpx.Client]:
    with serving(model) as opened:
        yield opened


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HELLO, "max_tokens": 4, **fields}


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_chat_has_the_shape_of_openai(client: httpx.Client) -> None:
    """One choice, usage with cached tokens, and kvmem's own account beside it."""
    first, again = (client.post(CHAT, json=body()).json() for _ in range(2))
    choice = first["choices"][0]
    assert (first["object"], choice["message"]["role"]) == ("chat.completion", "assistant")
    assert choice["finish_reason"] in ("stop", "length")
    assert first["usage"]["total_tokens"] == first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    assert again["choices"][0]["message"] == choice["message"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert (
        sum(first["kvmem"]["usage"][k] for k in ("exact", "reused", "recomputed", "computed"))
        == (first["usage"]["prompt_tokens"])
    )


def test_events_join_to_the_whole_answer(client: httpx.Client) -> None:
    """The stream says what the answer in one piece says, its reason and its usage."""
    whole = client.post(CHAT, json=body()).json()
    found = events(client.post(CHAT, json=body(stream=True, stream_options={"include_usage": True})))
    text = "".join(c["delta"].get("content", "") for e in found for c in e["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert [c["finish_reason"] for e in found for c in e["choices"] if c["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


@pytest.mark.parametrize("prompt", ["Once upon a time", [40, 41, 42, 43], ["Once upon a time"], [[40, 41]]])
def test_completions_continue_texts_and_token_ids(client: httpx.Client, prompt: Any) -> None:
    """A raw prompt is the model's whole prompt, in all shapes that OpenAI's API has for one."""
    request = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
    whole = client.post("/v1/completions", json=request).json()
    assert whole["object"] == "text_completion"
    streamed = events(client.post("/v1/completions", json={**request, "stream": True}))
    assert "".join(c["text"] for e in streamed for c in e["choices"]) == whole["choices"][0]["text"]


def test_a_long_raw_prompt_is_not_read_twice(client: httpx.Client) -> None:
    """What two prompts begin with is reused, for texts and for token ids."""
    for prompt, end in ((FERRY * 5, " And now?"), (list(range(5, 250)) * 2, [7])):
        client.post("/v1/completions", json={"model": "tiny", "prompt": prompt, "max_tokens": 1})
        again = client.post("/v1/completions", json={"model": "tiny", "prompt": prompt + end, "max_tokens": 1}).json()
        usage = again["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > 0.5 * usage["prompt_tokens"]


def test_documents_are_added_found_and_removed(client: httpx.Client) -> None:
    """A document, whatever its id, can be asked about until it is removed."""
    made = client.post("/v1/documents", json={"id": "travel/ferry?.md", "text": FERRY, "metadata": {"year": 2026}})
    assert made.status_code == 201
    assert client.get("/v1/documents").json()["data"] == [made.json()]
    path = "/v1/documents/travel%2Fferry%3F.md"
    assert client.get(path).json()["text"] == FERRY
    asked = client.post(CHAT, json=body(kvmem={"context": "documents"})).json()
    assert {source["document"] for source in asked["kvmem"]["sources"]} == {"travel/ferry?.md"}
    one = client.post(CHAT, json=body(kvmem={"context": ["A text.", {"id": "travel/ferry?.md"}]})).json()
    assert one["kvmem"]["sources"][-1]["document"] == "travel/ferry?.md"
    assert client.delete(path).json()["deleted"] is True
    gone = client.get(path)
    assert (gone.status_code, gone.json()["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize(
    ("request_", "status", "said"),
    [
        (body(messages=[]), 400, "messages"),
        (body(messages=[{"role": "user", "content": ""}]), 400, "no text"),
        (body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400, "content"),
        (body(model="other"), 404, "no model 'other'"),
        (body(n=2), 400, "n must be 1"),
        (body(logprobs=True), 400, "logprobs"),
        (body(presence_penalty=1.0), 400, "presence_penalty"),
        (body(max_tokens=10**6), 400, "Give 4096 or less"),
        (body(max_tokens=0), 400, "max_tokens"),
        (body(temperature=-1), 400, "temperature"),
        (body(stop=[""]), 400, "stop string is empty"),
        (body(messages=[{"role": "user", "content": "word " * 5000}]), 400, "more than the model's window"),
        (body(kvmem={"context": ["   "]}), 400, "no text"),
        (body(kvmem={"context": [{"id": "nope"}]}), 404, "no document 'nope'"),
        (body(kvmem={"blend": "magic"}), 400, "blend"),
        (body(kvmem={"nonsense": 1}), 400, "nonsense"),
        (body(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}), 400, "schema"),
        (body(tools=[{"type": "function", "function": {"name": ""}}]), 400, "name"),
        (body(tool_choice={"type": "function", "function": {"name": "f"}}), 400, "needs tools"),
        (body(messages=[{"role": "user", "content": "\ud800"}]), 400, "Unicode"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_told_in_openais_shape(
    client: httpx.Client, request_: dict[str, Any], status: int, said: str, stream: bool
) -> None:
    """Whether events are wanted or not: a status, and a message that says what was wrong."""
    response = client.post(
        CHAT, content=json.dumps({**request_, "stream": stream}), headers={"content-type": "application/json"}
    )
    error = response.json()["error"]
    assert response.status_code == status, error
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert until_idle(client) < 1


def test_what_is_no_json_and_no_route_is_told_too(client: httpx.Client) -> None:
    """Bodies that are not JSON, other methods and other paths have errors of the same shape."""
    found = [
        client.post(CHAT, content=b"{", headers={"content-type": "application/json"}),
        client.post(CHAT, content=json.dumps(body()), headers={"content-type": "text/plain"}),
        client.get(CHAT),
        client.get("/v2"),
    ]
    assert [r.status_code for r in found] == [400, 400, 405, 404]
    assert all(r.json()["error"]["message"] for r in found)


def test_context_length_has_openais_code(client: httpx.Client) -> None:
    """Clients that cut their history look at this code."""
    long = client.post(CHAT, json=body(messages=[{"role": "user", "content": "word " * 5000}]))
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_keeps_to_a_json_schema(client: httpx.Client) -> None:
    """`response_format` is OpenAI's."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    answer = client.post(CHAT, json=body(response_format=wanted, max_tokens=40)).json()
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["age"], int)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        },
    }
]


def test_a_forced_tool_is_called_and_its_result_taken(client: httpx.Client) -> None:
    """A call comes whole and as events, and goes back as OpenAI's clients send it."""
    wanted = body(tools=TOOLS, tool_choice="required", max_tokens=60)
    choice = client.post(CHAT, json=wanted).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["finish_reason"], call["function"]["name"]) == ("tool_calls", "look_up")
    assert isinstance(json.loads(call["function"]["arguments"])["n"], int)
    streamed = events(client.post(CHAT, json={**wanted, "stream": True}))
    calls = [c for e in streamed for ch in e["choices"] for c in ch["delta"].get("tool_calls", ())]
    assert [c["function"].get("name") for c in calls] == ["look_up", *[None] * (len(calls) - 1)]
    assert len(calls) > 2
    arguments = "".join(c["function"]["arguments"] for c in calls)
    assert json.loads(arguments) == json.loads(call["function"]["arguments"])
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"
    history = [*HELLO, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "42"}]
    assert client.post(CHAT, json=body(messages=history, tools=TOOLS)).status_code == 200
    broken = {"role": "assistant", "tool_calls": [{"function": {"name": "look_up", "arguments": "{"}}]}
    assert client.post(CHAT, json=body(messages=[*HELLO, broken])).status_code == 400


def test_keys_open_their_own_namespace_only(model: LanguageModel) -> None:
    """Without a known key nothing is told; with one, nothing of another's documents, caches or errors."""
    with serving(model, limits=ServeSettings(keys=KEYS)) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, bearer("nobody-key-0123456789"), {"Authorization": f"Basic {ALICE}"}):
            for path in ("/v1/models", "/v1/documents", "/metrics", "/docs", "/openapi.json"):
                refused = client.get(path, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        secret = "The launch code is 7719. " * 6
        client.post("/v1/documents", json={"id": "secret-plan", "text": secret}, headers=bearer(ALICE))
        long = body(messages=[{"role": "user", "content": secret * 3}])
        first, again = (client.post(CHAT, json=long, headers=bearer(ALICE)).json() for _ in range(2))
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
        # Only the markup before the text is shared with what was read as a document.
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] < 5
        other = client.post(CHAT, json=long, headers=bearer(BOB)).json()
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert client.get("/v1/documents", headers=bearer(BOB)).json()["data"] == []
        assert len(client.get("/v1/documents", headers=bearer(ALICE)).json()["data"]) == 1
        stranger = [
            client.get("/v1/documents/secret-plan", headers=bearer(BOB)),
            client.get("/v1/documents", params={"namespace": "alice"}, headers=bearer(BOB)),
            client.post(CHAT, json=body(kvmem={"namespace": "alice"}), headers=bearer(BOB)),
            client.post("/v1/documents", json={"text": "x", "namespace": "alice"}, headers=bearer(BOB)),
        ]
        assert [r.status_code for r in stranger] == [404, 403, 403, 403]
        shown = client.get("/metrics", headers=bearer(BOB)).text + "".join(r.text for r in stranger[1:])
        assert not any(word in shown for word in ("alice", "secret-plan", "7719"))


def test_without_keys_only_this_machine_is_served(client: httpx.Client) -> None:
    """A page that let its own name point here gets nothing."""
    assert client.get("/v1/models", headers={"host": "evil.example:8080"}).status_code == 403
    assert client.get("/v1/models", headers={"host": "localhost:1"}).status_code == 200
    assert client.get("/v1/models", headers={"host": "[::1]:1"}).status_code == 200
    with pytest.raises(InputError, match="--keys"):
        check_address("192.0.2.1", ServeSettings())
    check_address("192.0.2.1", ServeSettings(keys=KEYS))


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    """Comments and empty lines are left out; whatever is no key is told with its line."""
    file = tmp_path / "keys"
    file.write_text(f"# who\n\nalice {ALICE}\nbob   {BOB}\n")
    settings = ServeSettings(keys=read_keys(file), queue=10)
    assert settings.namespace_of(ALICE) == "alice"
    assert settings.namespace_of("nobody") is None
    assert settings.share == 5
    for text, said in [
        ("alice", "Line 1"),
        ("alice short", "shorter than 16"),
        (f"a {ALICE}\nb {ALICE}", "line 2.*two namespaces"),
        ("# nobody", "no key"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            read_keys(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "none")


def test_serve_refuses_an_open_address(saved_model: str, tmp_path: Path) -> None:
    """The command ends before the model is loaded."""
    refused = CliRunner().invoke(cli, ["serve", "--model", saved_model, "--host", "192.0.2.1"])
    assert refused.exit_code == 1
    assert "--keys" in refused.output


def test_large_and_slow_bodies_are_given_up(model: LanguageModel) -> None:
    """By their announced size, by what comes, and by how long it takes."""
    with serving(model, limits=ServeSettings(body_bytes=2000, body_timeout=0.3)) as client:
        large = json.dumps(body(messages=[{"role": "user", "content": "x" * 3000}])).encode()
        header = {"content-type": "application/json"}
        announced = client.post(CHAT, content=large, headers=header)
        streamed = client.post(CHAT, content=iter([large[:1500], large[1500:]]), headers=header)

        def trickle() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)
            yield b"}"

        slow = client.post(CHAT, content=trickle(), headers=header)
        assert [r.status_code for r in (announced, streamed, slow)] == [413, 413, 408]
        assert all(r.json()["error"]["message"] for r in (announced, streamed, slow))


def test_a_full_queue_is_told_at_once(model: LanguageModel) -> None:
    """What does not fit into the queue gets 429 without waiting; what does is answered."""
    with serving(model, limits=ServeSettings(queue=2), max_tokens=64) as client, ThreadPoolExecutor(8) as pool:
        with turns_of(model).lock:
            asked = [pool.submit(client.post, CHAT, json=body()) for _ in range(8)]
            while sum(f.done() for f in asked) < 5:
                time.sleep(0.01)
            refused = [f.result() for f in asked if f.done()]
            health = client.get("/health").json()
        assert [r.status_code for r in refused] == [429] * 5
        assert refused[0].headers["retry-after"] == "1"
        assert (health["running"], health["waiting"]) == (1, 2)
        assert sorted(f.result().status_code for f in asked) == [200] * 3 + [429] * 5


def test_an_answer_that_takes_too_long_is_ended(model: LanguageModel) -> None:
    """In the queue, and while it is worked on, and as an event once others were sent."""
    with serving(model, limits=ServeSettings(timeout=0.4)) as client:
        with turns_of(model).lock:
            waiting = client.post(CHAT, json=body())
        assert waiting.status_code == 504
        assert waiting.json()["error"]["code"] == "timeout"
        streamed = client.post(CHAT, json=body(stream=True, max_tokens=3000))
        last = [line for line in streamed.text.split("\n\n") if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert until_idle(client) < 1
        assert client.post(CHAT, json=body()).status_code == 200


def leave_early(client: httpx.Client, read: int, after: float = 0.3, **fields: Any) -> None:
    """Ask, read so many pieces, and go; without any, after so many seconds."""
    try:
        with client.stream("POST", CHAT, json=body(**fields), timeout=after if not read else 60) as response:
            for _, _ in zip(range(read), response.iter_raw(), strict=False):
                pass
    except httpx.TimeoutException:
        assert not read


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_worked_for(model: LanguageModel, stream: bool) -> None:
    """A client that leaves, while it waits or while it is answered, leaves nothing running."""
    with serving(model) as client:
        # The server has time to begin, beside other tests too.
        leave_early(client, read=2 if stream else 0, after=0.6, stream=stream, max_tokens=3500)
        assert until_idle(client) < 1
        with turns_of(model).lock:
            leave_early(client, read=0, after=1, stream=stream)
        assert until_idle(client) < 1
        shown = client.get("/metrics").text
        assert "kvmem_cancelled_total 2.0" in shown
        if not stream:
            assert f'kvmem_requests_total{{route="{CHAT}",status="499"}} 2.0' in shown
        assert client.post(CHAT, json=body()).status_code == 200


def test_who_leaves_while_the_prompt_is_read_is_not_worked_for() -> None:
    """A forward ends between two layers."""
    model = slow_model()
    text = {"role": "user", "content": "Every word of it counts. " * 240}
    with serving(model) as client:
        began = time.perf_counter()
        client.post(CHAT, json=body(messages=[{**text, "content": "A" + text["content"]}], max_tokens=1))
        whole = time.perf_counter() - began
        assert whole > 1, "the prompt is too short to leave in the middle of it"
        leave_early(client, read=0, messages=[text])
        assert until_idle(client) < whole / 2


def test_an_answer_may_be_long_when_nobody_says_how_long(model: LanguageModel) -> None:
    """Clients that say nothing expect a whole answer: a quarter of the window, or what is allowed."""
    model.name = "tiny"
    for limits, expected in ((ServeSettings(), 1024), (ServeSettings(max_tokens=100), 100)):
        app = create_app(model, MemoryStore(), None, limits)
        with running(app) as address:
            request = {"model": "tiny", "messages": HELLO}
            answer = httpx.post(f"{address}{CHAT}", json=request, timeout=60, trust_env=False).json()
        assert f"{expected} of them for the answer" in answer["kvmem"]["plan"]["reason"]


def slow_model() -> LanguageModel:
    """One that takes seconds for a few thousand tokens."""
    return tiny_model(num_hidden_layers=40, hidden_size=256, intermediate_size=512, max_position_embeddings=32768)


def test_reading_a_document_ends_when_nobody_waits() -> None:
    """A client that leaves, the time limit, and the server's end; the document is not there then."""
    document = {"id": "long", "text": "Every word of it counts. " * 2000}
    model = slow_model()
    with serving(model, limits=ServeSettings(timeout=1.0)) as client:
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/documents", json=document, timeout=0.3)
        assert until_idle(client) < 1
        late = client.post("/v1/documents", json=document)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        assert until_idle(client) < 1
        assert client.get("/v1/documents").json()["data"] == []
    began = time.perf_counter()
    with serving(model) as client, pytest.raises(httpx.TimeoutException):
        client.post("/v1/documents", json=document, timeout=0.3)
    assert time.perf_counter() - began < 5


def test_a_document_of_who_left_does_not_wait_any_more(model: LanguageModel) -> None:
    """Its place in the queue is free, although the one before it is still answered."""
    with serving(model) as client, turns_of(model).lock, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, CHAT, json=body())
        while client.get("/health").json()["running"] == 0:
            time.sleep(0.01)
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/documents", json={"text": "Every word of it counts."}, timeout=0.3)
        began = time.perf_counter()
        while (health := client.get("/health").json())["waiting"]:
            assert time.perf_counter() - began < 2, health
            time.sleep(0.01)
        assert health["running"] == 1
        turns_of(model).lock.release()
        try:
            assert first.result(20).status_code == 200
        finally:
            turns_of(model).lock.acquire()
        assert client.get("/v1/documents").json()["data"] == []


def test_who_does_not_read_an_answer_keeps_nobody_waiting(model: LanguageModel) -> None:
    """A turn ends when the work is done, whether or not the reply was taken."""
    with serving(model, max_tokens=2000) as client:
        request = json.dumps(body(stream=True, max_tokens=2000, messages=[{"role": "user", "content": "x" * 500}]))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port)) as idle:
            idle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            idle.sendall(f"{head}Content-Length: {len(request)}\r\n\r\n{request}".encode())
            time.sleep(0.2)
            assert client.post(CHAT, json=body()).status_code == 200
            assert until_idle(client, 20) < 20


def test_who_leaves_while_an_engine_opens_leaves_it_unused(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of clients that left can be closed for others."""
    take = Tenants.take

    def slowly(self: Tenants, namespace: str) -> KVMem:
        time.sleep(0.5)
        return take(self, namespace)

    with serving(model, limits=ServeSettings(engines=1)) as client:
        monkeypatch.setattr(Tenants, "take", slowly)
        for n in range(3):
            leave_early(client, read=0, kvmem={"namespace": f"n{n}"})
        monkeypatch.undo()
        assert until_idle(client, 10) < 10
        assert client.post(CHAT, json=body()).status_code == 200
        assert until_idle(client) < 1
        threads = [t for t in threading.enumerate() if t.name.startswith("kvmem_")]
    assert len(threads) <= 2


DEEP = {"function": {"name": "f", "arguments": "[" * 10**5}}


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/v1/documents", {"text": "x", "metadata": {"a": ["\ud800"]}}),
        ("/v1/documents", {"text": "x", "id": "\ud800"}),
        (CHAT, body(kvmem={"thread": "\ud800"})),
        (CHAT, body(kvmem={"blend": {"recompute": "auto"}})),
        (CHAT, body(messages=[{"role": "assistant", "tool_calls": [DEEP]}])),
        ("/v1/completions", {"model": "tiny", "prompt": [None] * 1000}),
        ("/v1/completions", {"model": "tiny", "prompt": [1, 10**9]}),
        ("/v1/completions", {"model": "tiny", "prompt": "x" * 10**6}),
        (CHAT, body(messages=[{"role": "user", "content": "x" * 10**6}])),
    ],
)  # fmt: skip
def test_what_could_break_a_server_is_refused(client: httpx.Client, path: str, request_: dict[str, Any]) -> None:
    """Texts that are none, depths without end, sizes beyond all use: 400, and the server goes on."""
    refused = client.post(path, content=json.dumps(request_), headers={"content-type": "application/json"})
    assert refused.status_code == 400, refused.text
    assert client.get("/v1/documents").status_code == 200


@pytest.mark.parametrize("odd", ['{"type": "array", "maxItems": 1e999}', '{"items":' * 300 + "{}" + "}" * 300])
def test_odd_schemas_are_refused(client: httpx.Client, odd: str) -> None:
    """Numbers beyond all numbers, and schemas deeper than anything reads."""
    plain = json.dumps(body(response_format={"type": "json_schema", "json_schema": {"schema": {"x": "HERE"}}}))
    request_ = plain.replace('{"x": "HERE"}', odd)
    refused = client.post(CHAT, content=request_, headers={"content-type": "application/json"})
    assert refused.status_code == 400, refused.text


def test_the_first_mistake_in_a_list_is_enough() -> None:
    """A list of a million mistakes takes no more memory than one."""
    for fields in ({"messages": [1] * 1000}, body(tools=[1] * 1000), body(kvmem={"context": [1] * 1000})):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"model": "tiny", **fields})
        assert caught.value.error_count() <= 4


def test_pages_of_other_hosts_get_nothing(client: httpx.Client) -> None:
    """A browser says where a page is from."""
    assert client.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"origin": "http://localhost:3000"}).status_code == 200


def test_conversations_can_be_looked_at_and_removed(client: httpx.Client) -> None:
    """By those who had them."""
    client.post(CHAT, json=body(kvmem={"thread": "a/b"}))
    assert {"object": "thread", "id": "a/b"} in client.get("/v1/threads").json()["data"]
    assert client.get("/v1/threads/a%2Fb").json()["messages"][0] == HELLO[0]
    assert client.delete("/v1/threads/a%2Fb").json()["deleted"] is True
    assert client.get("/v1/threads/a%2Fb").status_code == 404


def test_the_log_names_routes_and_nothing_of_tenants(model: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    """Neither documents nor texts, namespaces or keys, whatever goes wrong."""
    caplog.set_level(logging.DEBUG)
    with serving(model, limits=ServeSettings(keys=KEYS)) as client:
        client.post("/v1/documents", json={"id": "secret-plan", "text": "The code is 7719."}, headers=bearer(ALICE))
        client.get("/v1/documents/secret-plan", headers=bearer(ALICE))
        client.get("/v1/documents/secret-plan", headers=bearer(BOB))
        client.post(CHAT, json=body(messages=[{"role": "user", "content": "7719 " * 9000}]), headers=bearer(ALICE))
        client.post(CHAT, json=body(kvmem={"context": "documents"}), headers=bearer(ALICE))
    said = [record.getMessage() for record in caplog.records if record.name.startswith("kvmem")]
    assert any("POST /v1/chat/completions 200" in line for line in said)
    assert not any(word in line for line in said for word in ("secret-plan", "7719", "alice", "bob", ALICE))


def test_metrics_count_what_was_done(model: LanguageModel) -> None:
    """Requests by route and status, tokens by class, first tokens, the store, and fallbacks by reason."""
    with serving(model, store=MemoryStore(max_bytes=300_000)) as client:
        usage = client.post(CHAT, json=body()).json()["kvmem"]["usage"]
        client.get("/v1/documents/none")
        client.post(CHAT, json=body(messages=[{"role": "user", "content": "word " * 5000}]))
        for n in range(30):
            client.post("/v1/documents", json={"id": str(n), "text": f"Number {n}. " + FERRY * 3})
        fallback = client.post(CHAT, json=body(kvmem={"context": "documents"})).json()
        assert fallback["kvmem"]["plan"]["mode"] == "retrieve"
        shown = client.get("/metrics").text
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in shown.splitlines() if line[0] != "#"}
    assert values['kvmem_requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert values['kvmem_requests_total{route="/v1/documents/{id:path}",status="404"}'] == 1
    assert values['kvmem_tokens_total{kind="computed"}'] >= usage["computed"] > 0
    assert values["kvmem_first_token_seconds_count"] == 2
    assert values["kvmem_cancelled_total"] == 0
    assert values['kvmem_fallbacks_total{reason="retrieval"}'] == 1
    assert values["kvmem_store_evictions_total"] > 0
    assert values["kvmem_store_misses_total"] > 0


def test_threads_continue_over_requests(client: httpx.Client) -> None:
    """A conversation kept by name is exact up to its new message."""
    client.post(CHAT, json=body(kvmem={"thread": "t"}))
    said = client.post(CHAT, json=body(kvmem={"thread": "t"})).json()
    history = [*HELLO, said["choices"][0]["message"], {"role": "user", "content": "Go on."}]
    more = client.post(CHAT, json=body(messages=history, kvmem={"thread": "t"})).json()
    assert more["kvmem"]["usage"]["exact"] > said["usage"]["prompt_tokens"] / 2


def test_namespaces_take_turns() -> None:
    """One that asks for much does not keep another waiting behind all of it."""

    async def main() -> list[str]:
        gate, order = Gate(1, queue=100, share=50), []
        await gate.enter("busy")

        async def ask(namespace: str) -> None:
            await gate.enter(namespace)
            order.append(namespace)
            gate.leave()

        waiting = [asyncio.create_task(ask(name)) for name in ["busy"] * 5 + ["calm"] * 2]
        await asyncio.sleep(0)
        gate.leave()
        await asyncio.gather(*waiting)
        assert (gate.running, gate.waiting) == (0, 0)
        return order

    assert asyncio.run(main()) == ["busy", "calm", "busy", "calm", "busy", "busy", "busy"]


def test_who_gives_up_waiting_takes_no_turn() -> None:
    """Also when the turn came just before; and the queue has limits, in all and for one namespace."""

    async def main() -> None:
        gate = Gate(1, queue=3, share=2)
        await gate.enter("a")
        first, second = (asyncio.create_task(gate.enter("a")) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await gate.enter("a")
        third = asyncio.create_task(gate.enter("b"))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await gate.enter("c")
        first.cancel()
        await asyncio.sleep(0)
        gate.leave()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await third
        assert (gate.running, gate.waiting) == (1, 0)
        gate.leave()
        assert gate.running == 0

    asyncio.run(main())


def test_engines_of_idle_namespaces_are_closed(model: LanguageModel) -> None:
    """Many namespaces do not pile up; their documents stay."""
    with serving(model, limits=ServeSettings(engines=2)) as client:
        for n in range(5):
            made = client.post("/v1/documents", json={"id": "d", "text": f"Text {n}.", "namespace": f"n{n}"})
            assert made.status_code == 201
        threads = [t for t in threading.enumerate() if t.name.startswith("kvmem_")]
        texts = [client.get("/v1/documents/d", params={"namespace": f"n{n}"}).json()["text"] for n in range(5)]
    assert texts == [f"Text {n}." for n in range(5)]
    assert len(threads) <= 3


async def test_a_reply_that_was_never_begun_is_closed_too() -> None:
    """A client may leave between the first token and the first event."""

    class Closing:
        deadline = time.monotonic() + 5
        closed = False

        def close(self) -> None:
            self.closed = True

    async def never() -> Any:
        raise AssertionError("nobody reads this")
        yield

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.sleep(1)

    job: Any = Closing()
    await Events(job, never())({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send)
    assert job.closed


def test_a_server_that_is_told_to_end_tells_its_clients(saved_model: str, tmp_path: Path) -> None:
    """The command, in a process of its own: what is under way ends with an error, documents stay, the code is 0."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kvmem.cli.main", "serve", "--model", saved_model, "--name", "tiny"]
    command += ["--store", str(tmp_path / "kv"), "--port", str(port), "--max-tokens", "4000"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.HTTPError):
                    client.get("/health")
                    break
                time.sleep(0.1)
            assert client.post("/v1/documents", json={"id": "ferry", "text": FERRY}).status_code == 201
            with client.stream("POST", CHAT, json=body(stream=True, max_tokens=3500)) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert json.loads(rest[-1].removeprefix("data: "))["error"]["type"] == "server_error"
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert DiskStore(tmp_path / "kv").database.records("default", "document").keys() == ["ferry"]


def test_thoughts_and_growing_calls_are_events() -> None:
    """As vLLM sends them: thoughts as reasoning_content, a call's name first, then its arguments as they grow."""
    said = '<think>Hm.</think>I look.\n<tool_call>\n{"name": "look_up", "arguments": {"n": 4}}\n</tool_call>'
    wanted = body(tools=TOOLS, max_tokens=200)
    with serving(says(agent_model(), said, said, said)) as client:
        message = client.post(CHAT, json=wanted).json()["choices"][0]["message"]
        deltas = [e["choices"][0]["delta"] for e in events(client.post(CHAT, json={**wanted, "stream": True}))]
        cut = client.post(CHAT, json={**wanted, "max_tokens": 60}).json()["choices"][0]
    assert (message["content"], message["reasoning_content"]) == ("I look.", "Hm.")
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look."
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"].get("name") for call in calls] == ["look_up", *[None] * (len(calls) - 1)]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"n": 4}
    assert "tool_calls" not in cut["message"]
    assert cut["message"]["content"].startswith('I look.\n<tool_call>\n{"name')
    assert cut["finish_reason"] == "length"


def test_variables_of_the_template_are_a_field_of_a_request() -> None:
    """By the name that vLLM's server has for them; earlier thoughts come back as reasoning_content."""
    with prompts() as seen, serving(says(agent_model(), "A.", "B.")) as client:
        client.post(CHAT, json=body(chat_template_kwargs={"enable_thinking": True}))
        answered = {"role": "assistant", "content": "A.", "reasoning_content": "Hm."}
        assert client.post(CHAT, json=body(messages=[*HELLO, answered, *HELLO])).status_code == 200
    assert [text.endswith("<think>\n") for text in seen] == [True, False]
