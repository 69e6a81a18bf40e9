"""KVMemMiddleware: an agent of `create_agent` that remembers."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain_core.messages import AnyMessage, HumanMessage, SystemMessage
from langgraph.runtime import Runtime

from kvmem import Document, Memory
from langchain_kvmem.chat_model import ChatKVMem

Extract = Callable[[Sequence[AnyMessage]], Sequence[str]]


def said_by_the_user(messages: Sequence[AnyMessage]) -> list[str]:
    """What is remembered unless something else is given: every message of the user, as it is."""
    return [str(message.text) for message in messages if isinstance(message, HumanMessage) and message.text.strip()]


class KVMemMiddleware(AgentMiddleware[AgentState[Any], Any, Any]):
    """Recalls before every call of the model, and remembers when the agent is done.

    Memories are context of a `ChatKVMem`, cached one by one; another model gets them at the end of its system message.

    memory: of the user, or a function from the agent's runtime to it (several users, one agent). k: how many are
        recalled beside the pinned ones. extract: from the messages of a run to the texts to remember; None remembers
        nothing.
    """

    def __init__(
        self,
        memory: Memory | Callable[[Runtime[Any]], Memory],
        *,
        k: int = 5,
        extract: Extract | None = said_by_the_user,
    ) -> None:
        super().__init__()
        self._memory, self._k, self._extract = memory, k, extract

    def _of(self, runtime: Runtime[Any]) -> Memory:
        return self._memory if isinstance(self._memory, Memory) else self._memory(runtime)

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        return handler(self._recalled(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        return await handler(await asyncio.to_thread(self._recalled, request))

    def _recalled(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        texts = [m.text for m in request.messages if isinstance(m, HumanMessage)]
        if not texts:
            return request
        # What is asked stays out: it stands at the end of the prompt as it is.
        asked = {_identity(text) for text in texts}
        memory = self._of(request.runtime)
        found = [
            d for d in memory.context(texts[-1], self._k + len(asked)) if d.id.removeprefix("memory/") not in asked
        ]
        return _with(request, found[: self._k + sum(item.pinned for item in memory.list())]) if found else request

    def after_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:
        if self._extract is not None:
            memory = self._of(runtime)
            for text in self._extract(state["messages"]):
                if all(item.id != _identity(text) for item in memory.list()):
                    memory.remember(text, id=_identity(text))
        return None

    async def aafter_agent(self, state: AgentState[Any], runtime: Runtime[Any]) -> dict[str, Any] | None:
        return await asyncio.to_thread(self.after_agent, state, runtime)


def _identity(text: str) -> str:
    """The same text is remembered once."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _with(request: ModelRequest[Any], documents: Sequence[Document]) -> ModelRequest[Any]:
    if isinstance(request.model, ChatKVMem):
        before = request.model_settings.get("context") or []
        return request.override(model_settings={**request.model_settings, "context": [*documents, *before]})
    remembered = "\n\n".join(document.text for document in documents)
    system = request.system_message.text + "\n\n" if request.system_message is not None else ""
    return request.override(system_message=SystemMessage(f"{system}What you remember:\n\n{remembered}"))
