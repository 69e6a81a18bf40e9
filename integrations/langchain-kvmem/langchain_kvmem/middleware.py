"""KVMemMiddleware: an agent of `create_agent` that remembers."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NotRequired

from langchain.agents.middleware import AgentMiddleware, AgentState, ModelRequest, ModelResponse
from langchain.agents.middleware.types import PrivateStateAttr
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage
from langgraph.runtime import Runtime

from kvmem import Document, KVMemError, Memory
from langchain_kvmem.chat_model import ChatKVMem

logger = logging.getLogger("kvmem")
Extract = Callable[[Sequence[AnyMessage]], Sequence[str]]


def said_by_the_user(messages: Sequence[AnyMessage]) -> list[str]:
    """What is remembered unless something else is given: every message of the user, as it is."""
    return [str(message.text) for message in messages if isinstance(message, HumanMessage) and message.text.strip()]


def _is_summary(message: AnyMessage) -> bool:
    """Whether LangChain's SummarizationMiddleware wrote it, in the name of the user."""
    return message.additional_kwargs.get("lc_source") == "summarization"


class _State(AgentState[Any]):
    kvmem_earlier: NotRequired[Annotated[list[str | None], PrivateStateAttr]]


class KVMemMiddleware(AgentMiddleware[_State, Any, Any]):
    """Recalls before every call of the model, and remembers when the agent is done.

    Memories are context of a `ChatKVMem`, cached one by one; another model gets them at the end of its system message.

    memory: of the user, or a function from the agent's runtime to it (several users, one agent). k: how many are
        recalled beside the pinned ones. extract: from the messages of a run, those that are left when it ends, to the
        texts to remember; None remembers nothing. A text that cannot be remembered is logged; the agent's answer is
        not lost for it.
    """

    state_schema = _State

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

    def before_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        """Note which messages are of earlier runs of the thread: those up to the last answer."""
        messages = state["messages"]
        answered = [number for number, message in enumerate(messages, 1) if isinstance(message, AIMessage)]
        return {"kvmem_earlier": [message.id for message in messages[: answered[-1] if answered else 0]]}

    async def abefore_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return self.before_agent(state, runtime)

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
        # What the user says in this conversation is in the prompt as it is.
        found = self._of(request.runtime).context(texts[-1], self._k, without={_identity(text) for text in texts})
        return _with(request, found) if found else request

    def after_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        if self._extract is None:
            return None
        memory = self._of(runtime)
        # Another middleware may have removed messages, or put others before them.
        earlier = set(state.get("kvmem_earlier", ()))
        said = [message for message in state["messages"] if message.id not in earlier and not _is_summary(message)]
        for text in self._extract(said):
            try:
                if memory.find(_identity(text)) is None:
                    memory.remember(text, id=_identity(text))
            except KVMemError as error:
                logger.warning("kvmem: a text of %d characters is not remembered: %s", len(text), error)
        return None

    async def aafter_agent(self, state: _State, runtime: Runtime[Any]) -> dict[str, Any] | None:
        return await asyncio.to_thread(self.after_agent, state, runtime)


def _identity(text: str) -> str:
    """The same text is remembered once."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


def _with(request: ModelRequest[Any], documents: Sequence[Document]) -> ModelRequest[Any]:
    if isinstance(request.model, ChatKVMem):
        before = request.model_settings.get("context") or []
        return request.override(model_settings={**request.model_settings, "context": [*documents, *before]})
    remembered = "What you remember:\n\n" + "\n\n".join(document.text for document in documents)
    system = request.system_message
    if system is None:
        return request.override(system_message=SystemMessage(remembered))
    if isinstance(system.content, str):
        return request.override(system_message=SystemMessage(f"{system.content}\n\n{remembered}"))
    return request.override(system_message=SystemMessage([*system.content, {"type": "text", "text": remembered}]))
