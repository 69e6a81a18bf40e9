from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import open_mem
from langchain.agents import create_agent
from langchain.agents.middleware import SummarizationMiddleware
from langchain.agents.structured_output import ToolStrategy
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

from kvmem import InputError, KVMem, LanguageModel, Memory
from langchain_kvmem import ChatKVMem, KVMemMiddleware


def agent(mem: KVMem, **options: Any) -> Any:
    return create_agent(ChatKVMem(mem=mem, max_tokens=4), middleware=[KVMemMiddleware(Memory(mem), **options)])


def ask(agent: Any, text: str, **config: Any) -> AIMessage:
    found = agent.invoke({"messages": [HumanMessage(text)]}, **config)["messages"][-1]
    assert isinstance(found, AIMessage)
    return found


def test_an_agent_remembers_across_restarts(model: LanguageModel, tmp_path: Path) -> None:
    """What the user said is context of later runs, read already; what is asked now is not recalled as a memory."""
    with open_mem(model, tmp_path / "kv") as mem:
        first = ask(agent(mem), "My name is Anna and I like night trains more than ferries.")
        assert first.response_metadata["usage"]["exact"] == 0
        assert [item.text[:10] for item in Memory(mem).list()] == ["My name is"]
    with open_mem(model, tmp_path / "kv") as mem:
        seen: list[Any] = []
        original = mem.stream_chat
        mem.stream_chat = lambda *a, **k: seen.append(k.get("context")) or original(*a, **k)  # type: ignore[method-assign]
        second = ask(agent(mem), "Which trains do I like?")
        assert [document.text for document in seen[0]] == ["My name is Anna and I like night trains more than ferries."]
        usage = second.response_metadata["usage"]
        assert usage["exact"] + usage["reused"] + usage["recomputed"] > 50
        ask(agent(mem), "Which trains do I like?")
        assert "Which trains do I like?" not in [document.text for document in seen[-1]]
        assert len(Memory(mem).list()) == 2


async def test_async_agents_and_several_users(mem: KVMem) -> None:
    """The memory may depend on who asks; nothing is remembered when that is off."""
    spaces = {"anna": Memory(mem, "anna"), "bob": Memory(mem, "bob")}
    middleware = KVMemMiddleware(lambda runtime: spaces[runtime.context["user"]])
    shared = create_agent(ChatKVMem(mem=mem, max_tokens=2), middleware=[middleware], context_schema=dict)
    await shared.ainvoke({"messages": [HumanMessage("I like tea.")]}, context={"user": "anna"})
    await shared.ainvoke({"messages": [HumanMessage("I like milk.")]}, context={"user": "bob"})
    assert [item.text for item in spaces["anna"].list()] == ["I like tea."]
    assert [item.text for item in spaces["bob"].list()] == ["I like milk."]
    ask(agent(mem, extract=None), "Nothing of this stays.")
    assert Memory(mem).list() == []


def test_it_works_with_checkpointers_and_pinned_profiles(mem: KVMem) -> None:
    """LangGraph keeps the thread; the profile is recalled whatever is asked, beside the k best."""
    memory = Memory(mem)
    memory.remember("The user is a baker.", pinned=True)
    for n in range(4):
        memory.remember(f"Fact {n} about ferries.")
    seen: list[Any] = []
    original = mem.stream_chat
    mem.stream_chat = lambda *a, **k: seen.append(k.get("context")) or original(*a, **k)  # type: ignore[method-assign]
    middleware = KVMemMiddleware(memory, k=2)
    made = create_agent(ChatKVMem(mem=mem, max_tokens=2), middleware=[middleware], checkpointer=InMemorySaver())
    config = {"config": {"configurable": {"thread_id": "1"}}}
    ask(made, "What of ferries?", **config)
    ask(made, "And bread?", **config)
    assert [len(documents) for documents in seen] == [3, 3]
    assert all(documents[0].text == "The user is a baker." for documents in seen)


def test_the_best_memories_are_recalled_not_the_oldest(mem: KVMem) -> None:
    """However many the conversation itself has left behind."""
    memory = Memory(mem)
    memory.remember("The grass is green.")
    memory.remember("The ferry to the island leaves at nine.")
    seen: list[Any] = []
    original = mem.stream_chat
    mem.stream_chat = lambda *a, **k: seen.append(k.get("context")) or original(*a, **k)  # type: ignore[method-assign]
    ask(agent(mem, k=1), "When does the ferry to the island leave?")
    assert [document.text for document in seen[0]] == ["The ferry to the island leaves at nine."]


def test_what_was_forgotten_stays_forgotten(mem: KVMem) -> None:
    """A run remembers what was said in it, not in earlier runs of its thread."""
    memory = Memory(mem)
    heard: list[int] = []

    def extract(messages: Any) -> list[str]:
        heard.append(len(messages))
        return [messages[0].text]

    made = create_agent(
        ChatKVMem(mem=mem, max_tokens=2),
        middleware=[KVMemMiddleware(memory, extract=extract)],
        checkpointer=InMemorySaver(),
    )
    config = {"config": {"configurable": {"thread_id": "1"}}}
    ask(made, "My number is 1234.", **config)
    memory.clear()
    ask(made, "Hello.", **config)
    assert [item.text for item in memory.list()] == ["Hello."]
    assert heard == [2, 2]


def test_messages_that_were_summed_up_change_nothing_of_what_is_remembered(mem: KVMem) -> None:
    """A run whose earlier messages give way to a summary remembers what the user said in it, and not the summary."""
    memory = Memory(mem)
    model = ChatKVMem(mem=mem, max_tokens=2)
    summing = SummarizationMiddleware(model, trigger=("messages", 4), keep=("messages", 1))
    made = create_agent(model, middleware=[KVMemMiddleware(memory), summing], checkpointer=InMemorySaver())
    config = {"config": {"configurable": {"thread_id": "1"}}}
    texts = [f"My number is {n}." for n in range(4)]
    for text in texts:
        ask(made, text, **config)
    assert [item.text for item in memory.list()] == texts


def test_a_text_that_cannot_be_remembered_costs_no_answer(model: LanguageModel, caplog: Any) -> None:
    """It is logged."""
    with open_mem(model, None, max_document_chars=20) as mem:
        answer = ask(agent(mem), "This is longer than twenty characters.")
        assert answer.response_metadata["usage"]["generated"] > 0
        assert Memory(mem).list() == []
    assert "not remembered" in caplog.text


def test_structured_answers_of_an_agent(mem: KVMem) -> None:
    """`response_format` of create_agent, and OpenAI's of a model."""

    class Mood(BaseModel):
        calm: bool

    made = create_agent(ChatKVMem(mem=mem, max_tokens=120), response_format=ToolStrategy(Mood))
    assert isinstance(made.invoke({"messages": [HumanMessage("How?")]})["structured_response"], Mood)
    plain = create_agent(ChatKVMem(mem=mem, max_tokens=120), response_format=Mood)
    assert isinstance(plain.invoke({"messages": [HumanMessage("How?")]})["structured_response"], Mood)
    wanted = {"type": "json_schema", "json_schema": {"name": "Mood", "schema": Mood.model_json_schema()}}
    model = ChatKVMem(mem=mem, max_tokens=60)
    Mood.model_validate_json(model.invoke("How?", response_format=wanted).text)
    with pytest.raises(InputError, match="response_format"):
        model.invoke("How?", response_format="json")


def test_another_model_is_told_in_its_system_message(mem: KVMem) -> None:
    """Memories are useful without our model, too."""
    told: list[Any] = []

    class Fake(GenericFakeChatModel):
        def _generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
            told.append(messages)
            return super()._generate(messages, *args, **kwargs)

    memory = Memory(mem)
    memory.remember("The user is a baker.")
    made = create_agent(
        Fake(messages=iter([AIMessage("Hello")])), system_prompt="Be kind.", middleware=[KVMemMiddleware(memory)]
    )
    ask(made, "Who am I?")
    assert told[0][0].content == "Be kind.\n\nWhat you remember:\n\nThe user is a baker."


def test_without_langgraph_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package names what is missing only when it is needed."""
    import langchain_kvmem

    monkeypatch.setattr("langchain_kvmem._HOME", {"KVMemStore": "langchain_kvmem.not_there"})
    with pytest.raises(ImportError, match=r"kvmem\[agents\]"):
        _ = langchain_kvmem.KVMemStore
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = langchain_kvmem.Nonsense
