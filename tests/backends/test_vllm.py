from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_vllm import FakeVLLM
from langchain_core.documents import Document as LangChainDocument
from llama_index.core import Document as LlamaIndexDocument
from serving import running
from typer.testing import CliRunner

from kvmem import (
    GenerateOptions,
    InputError,
    KVMem,
    LanguageModel,
    Memory,
    ModelError,
    ModelNotFoundError,
    PromptTooLongError,
    RemoteError,
    RemoteSettings,
)
from kvmem.backends.vllm import VLLMModel
from kvmem.backends.vllm.server import _Watched
from kvmem.cancellation import Cancellation
from kvmem.cli.main import app
from kvmem.serve.app import create_app
from kvmem.store import MemoryStore
from langchain_kvmem import CachedContextChain, ChatKVMem
from llama_index_kvmem import KVMemLLM, KVMemQueryEngine

pytestmark = [pytest.mark.enable_socket]

FERRY = "The night ferry leaves Port Ellery at ten past nine and reaches Saint Orrin at dawn, in any weather. "
SPLIT = {"minimum": 20, "maximum": 80}


@pytest.fixture
def server(saved_model: str) -> FakeVLLM:
    return FakeVLLM(saved_model)


@pytest.fixture
def url(server: FakeVLLM) -> Iterator[str]:
    with running(server.app()) as address:
        yield address.replace("http", "vllm") + "/m"


@pytest.fixture
def mem(url: str, tmp_path: Path) -> Iterator[KVMem]:
    with KVMem(url, tmp_path / "kv", split=SPLIT, max_tokens=6) as opened:
        yield opened


def test_a_question_is_answered_from_documents_by_the_server(mem: KVMem, server: FakeVLLM) -> None:
    """The prompt goes out as the token ids that a model in this process would get; what is cached there is told."""
    mem.add(FERRY * 3, id="ferry")
    first = mem.ask("When does it leave?")
    again = mem.ask("When does it leave, then?")
    assert (first.text, first.finish_reason) == ("abcdef", "length")
    sent = server.prompts[-1]
    text = mem.model.tokenizer.decode(sent["prompt"])
    assert "The night ferry leaves Port Ellery at ten past nine" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert sent["cache_salt"] == "default"
    assert (sent["temperature"], sent["top_k"], sent["repetition_penalty"]) == (0.0, 0, 1.0)
    assert again.usage.prompt == len(sent["prompt"])
    assert again.usage.exact % server.block == 0
    assert again.usage.exact > 0.5 * again.usage.prompt
    assert (again.usage.reused, again.usage.recomputed, again.usage.generated) == (0, 0, 6)
    assert 0 < again.timings.first_token <= again.timings.total


def test_namespaces_share_nothing(url: str, server: FakeVLLM) -> None:
    """The salt is the namespace, so that nobody can tell by the time what others asked."""
    with KVMem(url, namespace="a", max_tokens=2) as a, KVMem(url, namespace="b", max_tokens=2) as b:
        prompt = [{"role": "user", "content": FERRY * 5}]
        a.chat(prompt)
        assert a.chat(prompt).usage.exact > 100
        assert b.chat(prompt).usage.exact == 0
    assert {p["cache_salt"] for p in server.prompts[-3:]} == {"a", "b"}


def test_documents_conversations_and_memories_survive_here(url: str, tmp_path: Path, server: FakeVLLM) -> None:
    """They are kept in the store, whatever the server forgets; a thread goes on from the tokens that were said."""
    with KVMem(url, tmp_path / "kv", max_tokens=30) as mem:
        mem.add(FERRY, id="ferry")
        Memory(mem).remember("Anna drinks tea.", id="tea")
        mem.chat([{"role": "user", "content": "Hello"}], thread="t")
        before = server.prompts[-1]["prompt"]
    with KVMem(url, tmp_path / "kv", max_tokens=30) as mem:
        assert [document.id for document in mem.list()] == ["ferry"]
        assert Memory(mem).get("tea").text == "Anna drinks tea."
        mem.chat([*mem.history("t"), {"role": "user", "content": "Go on"}], thread="t")
        assert server.prompts[-1]["prompt"][: len(before)] == before
        mem.remove("ferry")
        mem.forget_thread("t")
        assert mem.forget_user() == 0
        assert mem.store.database.kinds("default") == []


def test_chunks_stand_as_they_stood_before(url: str, server: FakeVLLM) -> None:
    """When not all fits, the prompt begins like an earlier one for as many blocks as it can."""
    with KVMem(url, context_tokens=300, max_tokens=2, split=SPLIT) as mem:
        names = ["alder", "birch", "cedar", "elm"]
        for name in names:
            mem.add(f"The {name} is a tree. " + f"{name} " * 12, id=name)
        first = mem.ask("Tell me about cedar and birch and elm")
        again = mem.ask("And about birch or elm, alder?")
        shared = mem.ask("Elm birch cedar")
        assert first.plan.mode != "whole"
        assert [s.document_id for s in shared.sources] == [s.document_id for s in first.sources]
        assert shared.usage.exact > 100
        assert again.usage.exact >= server.block


def test_streams_come_as_the_server_sends_them(mem: KVMem, server: FakeVLLM) -> None:
    """Piece by piece; stop strings, sampling and more arguments are the server's to follow."""
    server.pause = 0.01
    options: GenerateOptions = {"stop": "d", "temperature": 0.5, "top_p": 0.9, "seed": 3}
    pieces = list(mem.stream("x", context=["y"], generate_kwargs={"min_tokens": 2}, **options))
    assert pieces == ["a", "b", "c"]
    sent = server.prompts[-1]
    assert [sent[name] for name in ("temperature", "top_p", "seed", "stop", "min_tokens")] == [0.5, 0.9, 3, ["d"], 2]


async def test_answers_are_made_at_the_same_time(mem: KVMem, server: FakeVLLM) -> None:
    """A server takes many prompts at once, from threads, event loops and batches."""
    server.pause = 0.05
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: mem.ask(f"Question {n}", context=["y"]), range(8)))
    assert server.most >= 4
    server.most = 0
    answers = mem.batch([f"Question {n}" for n in range(5)], context=["y"])
    assert [answer.text for answer in answers] == ["abcdef"] * 5
    assert server.most == 4


def test_who_leaves_ends_the_work_there(mem: KVMem, server: FakeVLLM) -> None:
    """Closing a stream closes its connection, before the first token too, and time-outs do the same."""
    server.pause = 0.05
    with mem.stream("x", context=["y"], max_tokens=200) as stream:
        next(stream)
    assert stream.answer.finish_reason == "cancelled"
    server.pause = 30
    waiting = mem.stream("x", context=["y"])
    time.sleep(0.2)
    waiting.close()
    with pytest.raises(TimeoutError):
        mem.ask("x", context=["y"], timeout=0.3)
    deadline = time.monotonic() + 5
    while server.aborted < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (server.aborted, server.running) == (3, 0)


def test_a_broken_answer_is_told_and_the_next_one_comes(mem: KVMem, server: FakeVLLM) -> None:
    """Nothing is repeated once a token was shown; before that it is, with pauses."""
    server.breaks_after = 2
    with pytest.raises(RemoteError, match="broke off"):
        mem.ask("x", context=["y"])
    server.breaks_after = None
    assert mem.ask("x", context=["y"]).text == "abcdef"
    server.fails = [503, 429]
    assert mem.ask("x", context=["y"]).text == "abcdef"
    server.fails = [500] * 9
    with pytest.raises(RemoteError, match="failed"):
        mem.ask("x", context=["y"])


def test_what_a_server_cannot_do_is_said(mem: KVMem) -> None:
    """Repair, tensors, and benchmarks that need the model here."""
    with pytest.raises(InputError, match="does not blend"):
        mem.ask("x", context=["y"], blend="query")
    with pytest.raises(InputError, match="does not return KV tensors"):
        mem.prefill("x", context=["y"])
    with pytest.raises(InputError, match="runs on a server"):
        _ = mem.local_model
    with pytest.raises(InputError, match="runs on a server"):
        LanguageModel.load("vllm://host:1/m")
    with pytest.raises(PromptTooLongError):
        mem.ask("word " * 5000, context=["y"])


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"version": "0.10.1"}, RemoteError, "structured_outputs"),
        ({"reports": False}, RemoteError, "--enable-prompt-tokens-details"),
        ({"tells_ids": False}, RemoteError, "does not report cached tokens"),
        ({"window": 0}, RemoteError, "maximum prompt length"),
        ({"shift": 1}, ModelError, "local tokenizer does not match"),
        ({"root": "/no/where"}, ModelNotFoundError, "tokenizer '/no/where'"),
        ({"key": "k"}, RemoteError, "API key"),
    ],
)
def test_a_server_that_lacks_something_is_refused(
    saved_model: str, wrong: dict[str, Any], error: Any, said: str
) -> None:
    """At the opening, with what to do about it."""
    server = FakeVLLM(**{"root": saved_model, **wrong})
    with running(server.app()) as address, pytest.raises(error, match=said):
        KVMem(address.replace("http", "vllm") + "/m")


def test_addresses_keys_and_names(saved_model: str) -> None:
    """The only model needs no name; a key is sent; what is not there is told."""
    server = FakeVLLM("/no/where", key="secret-key")
    with running(server.app()) as address:
        url = address.replace("http", "vllm")
        with KVMem(url, api_key="secret-key", max_tokens=2, tokenizer=saved_model) as mem:
            assert mem.ask("x", context=["y"]).text == "ab"
            assert "secret-key" not in repr(mem.settings)
        with pytest.raises(ModelNotFoundError, match="serves 'm', not 'other'"):
            KVMem(f"{url}/other", api_key="secret-key")
    with pytest.raises(RemoteError, match="cannot be reached"):
        KVMem(f"{url}/m", retries=0)
    with pytest.raises(InputError, match="not a server address"):
        KVMem("vllm://host/m")


def test_what_helps_only_may_be_missing(saved_model: str) -> None:
    """Without /metrics, blocks are taken to be vLLM's usual ones; a password in an address is shown nowhere."""
    server = FakeVLLM(saved_model, tells_blocks=False)
    with running(server.app()) as address:
        url = address.replace("http://", "vllm://user:hunter2@")
        with KVMem(url) as mem:
            assert mem.model.block_size == 16  # type: ignore[attr-defined]
            assert "hunter2" not in mem.model.name


def test_texts_in_another_order_stand_as_they_stood(url: str, server: FakeVLLM) -> None:
    """All of them fit, and nothing is moved there: so the prompt begins like the one before."""
    texts = [f"Report {n}. " + FERRY * 2 for n in range(3)]
    with KVMem(url, max_tokens=2) as mem:
        mem.ask("When?", context=texts)
        again = mem.ask("When, then?", context=texts[::-1])
    assert again.usage.exact > 0.7 * again.usage.prompt
    assert [source.text for source in again.sources] == texts


def test_one_namespace_reads_while_another_asks(url: str, server: FakeVLLM) -> None:
    """A long reading of one keeps nobody else waiting."""
    with KVMem(url, namespace="a", max_tokens=2) as a, KVMem(url, namespace="b", max_tokens=2) as b:
        server.pause = 1.0
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(a.add, FERRY)
            while not server.running:
                time.sleep(0.01)
            server.pause = 0.0
            b.ask("When?", context=["x"])
            assert not reading.done()
            reading.result()


def test_a_conversation_that_is_forgotten_meanwhile_stays_so(mem: KVMem, server: FakeVLLM) -> None:
    """An answer that was under way brings nothing of it back, however it ends; the next one begins anew."""
    hello = [{"role": "user", "content": "Hello"}]
    for forget, ended in product((lambda: mem.forget_thread("t"), mem.forget_user), (True, False)):
        server.pause = 0.0
        mem.chat(hello, thread="t")
        server.pause = 0.05
        stream = mem.stream_chat(hello, thread="t", max_tokens=20)
        next(stream)
        forget()
        if not ended:
            stream.close()
        assert stream.answer.finish_reason == ("length" if ended else "cancelled")
        assert (mem.threads(), mem.store.database.kinds("default")) == ([], [])
    server.pause = 0.0
    mem.chat(hello, thread="t")
    assert mem.threads() == ["t"]


def test_changes_of_documents_wait_for_each_other(mem: KVMem, server: FakeVLLM) -> None:
    """What is removed while a new text of it is read does not come back when that fails."""
    mem.add(FERRY, id="ferry")
    server.pause, server.breaks_after = 0.3, 0
    with ThreadPoolExecutor(1) as pool:
        updating = pool.submit(mem.update, "ferry", "The tram leaves at noon.")
        while not server.running:
            time.sleep(0.01)
        mem.remove("ferry")
        with pytest.raises(RemoteError):
            updating.result()
    assert mem.list() == ()


def test_a_server_over_a_server_keeps_its_address_to_itself(saved_model: str) -> None:
    """What goes wrong behind it is told without saying where; the log says it."""
    behind = FakeVLLM(saved_model)
    with running(behind.app()) as address:
        model = VLLMModel.connect(address.replace("http", "vllm"), RemoteSettings(retries=0))
        model.name = "m"
        request = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        with running(create_app(model, MemoryStore())) as front:
            whole = httpx.post(f"{front}/v1/chat/completions", json=request, trust_env=False)
            assert whole.json()["choices"][0]["message"]["content"] == "abc"
            told = []
            for status in (400, 404, 500):
                behind.fails = [status]
                told.append(httpx.post(f"{front}/v1/chat/completions", json=request, trust_env=False))
            behind.breaks_after = 1
            told.append(httpx.post(f"{front}/v1/chat/completions", json={**request, "stream": True}, trust_env=False))
        model.close()
    assert [r.status_code for r in told] == [400, 502, 502, 200]
    assert '"error"' in told[-1].text
    assert not any("127.0.0.1" in r.text for r in told)


def test_a_separator_stands_around_every_chunk(url: str, server: FakeVLLM) -> None:
    """As LMCache's blending wants it."""
    with KVMem(url, separator=" # # ", max_tokens=2, split=SPLIT) as mem:
        mem.ask("x", context=["First text.", "Second text."])
        sent = mem.model.tokenizer.decode(server.prompts[-1]["prompt"])
    assert " # # First text.\n\n # # Second text.\n\n # # " in sent


def test_json_and_tools_are_asked_for(mem: KVMem, server: FakeVLLM) -> None:
    """The schema goes out as vLLM's structured output, narrowed as it is here."""
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    mem.chat([{"role": "user", "content": "Who?"}], schema=schema)
    assert server.prompts[-1]["structured_outputs"]["json"]["properties"]["age"]["type"] == "integer"
    assert server.prompts[-1]["structured_outputs"]["json"]["additionalProperties"] is False


def test_one_answer_that_fails_ends_the_others_of_its_batch(mem: KVMem, server: FakeVLLM) -> None:
    """The caller gets the error, and the server stops writing the other answers."""
    mem.add(FERRY * 3)
    server.hangs_after = server.finished + 1  # the first question is asked alone
    server.fails = [None, None, None, 400]
    with pytest.raises(RemoteError, match="not now"):
        mem.batch([f"When does number {n} leave?" for n in range(8)])
    for _ in range(2000):
        if not server.running:
            break
        time.sleep(0.01)
    assert server.running == 0
    assert server.finished == server.hangs_after


def test_a_stream_that_opens_while_its_answer_is_cancelled_is_closed() -> None:
    """Otherwise the server would keep generating an answer that no one reads."""

    class Opened:
        closed = False

        async def close(self) -> None:
            self.closed = True

    async def cancelled_at_the_last_moment() -> bool:
        opening = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(_Watched(Cancellation()).wait(opening))
        await asyncio.sleep(0)
        opened = Opened()
        opening.set_result(opened)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        return opened.closed

    assert asyncio.run(cancelled_at_the_last_moment())


def test_the_command_line_asks_a_server_too(url: str, tmp_path: Path) -> None:
    """As it asks a model of its own: no option has to be left out."""
    (tmp_path / "ferry.md").write_text(FERRY * 3)
    where = ["--model", url, "--store", str(tmp_path / "kv")]
    for command in (["add", str(tmp_path / "ferry.md")], ["ask", "When?", "--max-tokens", "3"]):
        result = CliRunner().invoke(app, [*command, *where])
        assert result.exit_code == 0, result.output
    assert "abc" in result.output


def test_chains_and_engines_need_another_model_string_only(url: str, tmp_path: Path) -> None:
    """LangChain's chain and chat model, LlamaIndex's query engine."""
    chain = CachedContextChain.from_documents([LangChainDocument(FERRY * 3, id="f")], model=url, store=str(tmp_path))
    try:
        assert chain.invoke({"input": "When?"})["answer"].startswith("abc")
        assert chain.mem.ask("When, then?", collection=chain.collection, max_tokens=1).usage.exact > 0
    finally:
        chain.mem.close()
    llm = ChatKVMem(model=url, max_tokens=3)
    assert llm.invoke("Hello").content == "abc"
    llm.engine.close()
    other = KVMemLLM(model_name=url, max_new_tokens=3)
    assert str(other.complete("Hello")) == "abc"
    other.engine.close()
    engine = KVMemQueryEngine.from_documents([LlamaIndexDocument(text=FERRY * 3)], model=url)
    assert str(engine.query("When?")).startswith("abc")
    engine.mem.close()
