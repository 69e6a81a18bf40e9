from __future__ import annotations

from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from helpers import agent_model, open_mem, says
from rich.console import Console
from typer.testing import CliRunner

from kvmem import KVMem, LanguageModel, Memory
from kvmem.cli import main as cli
from kvmem.cli.chat import Chat
from kvmem.testing import tiny_model


def talk(mem: KVMem, *lines: str, thread: str = "t") -> str:
    """What is shown when these lines are typed."""
    shown = StringIO()
    typed: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    Chat(mem, thread, Console(file=shown, width=200), read).run()
    return shown.getvalue()


def test_a_conversation_goes_on_where_it_was_left(model: LanguageModel, tmp_path: Path) -> None:
    """With a status line for every answer; `/new` begins anew."""
    with open_mem(model, tmp_path / "kv") as mem:
        shown = talk(mem, "Hello, who leaves at nine?", "", "And then?")
        assert shown.count("prompt tokens reused") == 2
        assert "0 turns so far" in shown
    with open_mem(model, tmp_path / "kv") as mem:
        shown = talk(mem, "Why?", "/new", "/quit", "never read")
        assert "2 turns so far" in shown
        assert "A new conversation." in shown
        assert mem.threads() == []
        assert "0 turns so far" in talk(mem, "/new")


def test_a_new_conversation_forgets_a_first_turn_that_was_stopped(mem: KVMem) -> None:
    """It has no answer, so it is not among the conversations; what was read of it is there."""
    paragraph = "My card number is zanzibar, said the doctor at the harbour. " * 4
    asked = [{"role": "user", "content": f"{paragraph}\n\nWhat?"}]
    stream = mem.stream_chat(asked, thread="t", max_tokens=3000)
    next(stream)
    stream.close()
    mem.plan("?", context=["."])  # waits for its turn
    before = mem.stats().store.entries
    talk(mem, "/new")
    assert mem.stats().store.entries < before


def test_memories_are_kept_and_used(mem: KVMem) -> None:
    """Commands keep, show and forget them; an answer has them in its prompt."""
    shown = talk(mem, "/remember The ferry leaves at nine.", "When does the ferry leave?", "/memories", "/forget zzz")
    (item,) = Memory(mem).list()
    assert f"{item.id[:8]}  The ferry leaves at nine." in shown
    assert "0 memories" in shown
    assert "Forgotten." in talk(mem, f"/forget {item.id[:8]}")
    assert Memory(mem).list() == []


def test_help_and_errors_do_not_end_the_conversation(mem: KVMem) -> None:
    """What is not a command shows the commands; a message that does not fit is an error in a line."""
    shown = talk(mem, "/what", "/remember", "word " * 2000, "Hello")
    assert shown.count("/remember TEXT") == 2
    assert "Error: " in shown
    assert "prompt tokens reused" in shown


def test_the_command_opens_and_closes(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """`kvmem chat` reads lines from standard input."""
    monkeypatch.setattr("kvmem.model.local.LanguageModel.load", lambda *_: tiny_model())
    arguments = ["chat", "--store", str(tmp_path / "kv"), "--max-tokens", "4"]
    result = CliRunner().invoke(cli.app, arguments, input="Hello\n/quit\n")
    assert result.exit_code == 0, result.output
    assert "prompt tokens reused" in result.output


def test_thoughts_are_shown_and_kept() -> None:
    """Before the answer; the conversation has them beside its text."""
    with KVMem(says(agent_model(), "<think>Hm.</think>Yes."), max_tokens=40) as mem:
        assert "Hm.Yes." in talk(mem, "Is it?")
        assert mem.history("t")[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
