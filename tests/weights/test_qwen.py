"""Qwen2.5-Coder-1.5B-Instruct, which is good enough to call tools. `make models` fetches it."""

from __future__ import annotations

from benchmarks.agents import run
from kvmem import LanguageModel


def test_agents_finish_tasks_of_two_steps_as_generate_would(qwen: LanguageModel) -> None:
    """LangChain's and LlamaIndex's: the right address, by the calls that transformers' generate makes."""
    result = run(qwen, tasks=1, repeats=1)
    for row in result["rows"]:
        assert [call["name"] for call in row["calls"]] == ["find_user", "get_email"]
        assert (row["finished"], row["correct"], row["equal"]) == (True, True, True)


def test_the_model_is_told_to_write_calls_that_are_read(qwen: LanguageModel) -> None:
    """Its template shows a call in tags."""
    assert qwen.template.describe_calls()["read"] == 'probe_tool({"city": "Paris"})'
