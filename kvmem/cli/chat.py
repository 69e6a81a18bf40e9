"""`kvmem chat`: a conversation in the terminal, with memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.markup import escape

from kvmem.engine import KVMem
from kvmem.errors import KVMemError, UnknownThreadError
from kvmem.memory import Memory
from kvmem.parsing.parts import TextPart, ThoughtPart
from kvmem.results import Answer

_HELP = """\
/remember TEXT   save a memory for all conversations
/memories        list the memories
/forget ID       delete a memory
/new             clear this conversation and start over
/help            show this help
/quit            quit; the conversation continues next time"""


class Chat:
    """A conversation in the terminal. Its prompt includes the engine's documents and the memories.

    read: prompts the user for a line; raises EOFError at the end of input.
    """

    def __init__(self, mem: KVMem, thread: str, console: Console, read: Callable[[str], str], k: int = 5) -> None:
        self._mem, self._thread, self._console, self._read, self._k = mem, thread, console, read, k
        self._memory = Memory(mem)
        try:
            self._messages = list(mem.history(thread))
        except UnknownThreadError:
            self._messages = []

    def run(self) -> None:
        """Run until the user quits."""
        self._note(f"Conversation {self._thread!r}, {len(self._messages) // 2} turns so far. Type /help for commands.")
        while True:
            try:
                line = self._read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._say(line)
            except KVMemError as error:
                self._console.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        context = [*self._memory.context(text, self._k), *self._mem.list()]
        stream = self._mem.stream_chat(messages, context=context or None, thread=self._thread)
        try:
            for part in stream.parts:
                if isinstance(part, TextPart | ThoughtPart):
                    style = "dim" if isinstance(part, ThoughtPart) else None
                    self._console.print(part.text, end="", style=style, highlight=False, markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            stream.close()
            self._note("\nStopped. This turn is not part of the conversation.")
            return
        answer = stream.answer
        self._messages = [*messages, answer.message]
        self._console.print()
        self._note(status(answer))

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/remember" and rest.strip():
            item = self._memory.remember(rest.strip())
            self._note(f"Remembered as {item.id[:8]}.")
        elif name == "/memories":
            for item in self._memory.list():
                self._note(f"{item.id[:8]}  {item.text}")
        elif name == "/forget" and rest.strip():
            found = [item for item in self._memory.list() if item.id.startswith(rest.strip())]
            if len(found) != 1:
                self._note(f"{len(found)} memories have an id that starts with this. /memories lists them.")
            else:
                self._memory.forget(found[0].id)
                self._note("Forgotten.")
        elif name == "/new":
            with suppress(UnknownThreadError):
                self._mem.forget_thread(self._thread)
            self._messages = []
            self._note("A new conversation.")
        else:
            self._note(_HELP)

    def _note(self, text: str) -> None:
        self._console.print(escape(text), style="dim", highlight=False, soft_wrap=True)


def status(answer: Answer) -> str:
    """A status line: reused and computed tokens, and the time to the first token."""
    usage = answer.usage
    seen = usage.exact + usage.reused
    dropped = f" · oldest {answer.plan.dropped} messages left out" if answer.plan.dropped else ""
    return (
        f"{seen} of {usage.prompt} prompt tokens reused, {usage.recomputed + usage.computed} computed · "
        f"first token after {answer.timings.first_token:.2f} s{dropped}"
    )
