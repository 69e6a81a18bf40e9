from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import entries_index, open_mem

from kvmem import (
    AnswerTimeoutError,
    Document,
    EmptyInputError,
    InputError,
    KVMem,
    LanguageModel,
    Memory,
    StoreError,
    UnknownMemoryError,
    UnknownThreadError,
)
from kvmem.backends import local
from kvmem.library.threads import Branch, recut
from kvmem.prompt.layout import Prompt
from kvmem.prompt.span import Span
from kvmem.store.view import RecordView
from kvmem.testing import tiny_model

HELLO = [{"role": "user", "content": "Hello, who leaves at nine in the evening?"}]


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def memory(mem: KVMem) -> Memory:
    return Memory(mem, clock=Clock())


def test_memories_are_kept_changed_and_forgotten(memory: Memory, model: LanguageModel, tmp_path: Path) -> None:
    """By id, with metadata, across a restart; what is not there is an error that says so."""
    item = memory.remember("Anna likes ferries.", metadata={"kind": "taste"}, importance=0.9)
    profile = memory.remember("The user is Anna, a baker.", id="profile", pinned=True)
    assert memory.list() == [item, profile]
    changed = memory.update(item.id, text="Anna likes night trains.", importance=0.2)
    assert (changed.created, changed.metadata, changed.importance) == (item.created, {"kind": "taste"}, 0.2)
    assert changed.updated > item.updated
    memory.mem.close()
    with open_mem(model, tmp_path / "kv") as mem:
        again = Memory(mem)
        assert again.get(item.id) == changed
        assert Memory(mem, "other").list() == []
        again.forget(item.id)
        with pytest.raises(UnknownMemoryError, match="list"):
            again.get(item.id)
        again.clear()
        assert again.list() == []


def test_what_matters_is_recalled(memory: Memory) -> None:
    """By words, importance and age; pinned ones always, and filters hold."""
    memory.remember("The user is Anna.", pinned=True)
    ferry = memory.remember("The ferry leaves at nine.", metadata={"kind": "fact"})
    bread = memory.remember("Bread is baked at four.", importance=1.0)
    tram = memory.remember("The tram is late.", metadata={"kind": "fact"})
    found = memory.recall("When does the ferry leave?", 2)
    assert [r.item.text for r in found] == ["The user is Anna.", ferry.text, bread.text]
    assert found[1].score > found[2].score
    assert [r.item.id for r in memory.recall("ferry", 3, where={"kind": "fact"})] == [ferry.id, tram.id]
    assert [r.item.id for r in memory.recall("ferry", 5, minimum=0.5)][1:] == [ferry.id]
    assert len(memory.recall("", 5)) == 4
    assert [d.text for d in memory.context("When does the ferry leave?", 2)] == [
        "The user is Anna.",
        ferry.text,
        bread.text,
    ]


def test_old_memories_fade(mem: KVMem) -> None:
    """Of two that are alike, the later one comes first; a change makes one young again."""
    clock = Clock()
    memory = Memory(mem, clock=clock)
    old = memory.remember("The ferry leaves at nine.")
    clock.now += 1000 * 3600
    young = memory.remember("The ferry leaves at ten.")
    assert [r.item.id for r in memory.recall("ferry leaves", 2)] == [young.id, old.id]
    clock.now += 1000 * 3600
    memory.update(old.id, importance=0.5)
    assert [r.item.id for r in memory.recall("ferry leaves", 1)] == [old.id]


def test_a_memory_is_read_when_it_is_made_and_not_again(memory: Memory, mem: KVMem) -> None:
    """A prompt with it computes the message only; forgetting frees its caches."""
    first = memory.remember("The ferry leaves at nine in the evening, from the long pier. " * 3)
    second = memory.remember("Bread is baked at four in the morning, in the old bakery. " * 3)
    answer = mem.chat(HELLO, context=memory.context("ferry, bread"), max_tokens=2)
    assert answer.usage.computed < 120
    assert answer.usage.exact + answer.usage.reused + answer.usage.recomputed > 300
    before = mem.stats().store.entries
    memory.forget(first.id)
    assert mem.stats().store.entries < before
    memory.update(second.id, text="Something else entirely.")
    assert mem.chat(HELLO, context=memory.context("?"), max_tokens=2).sources[0].text == "Something else entirely."


def test_bad_memories_are_errors(memory: Memory) -> None:
    """Empty, of the wrong type, out of bounds: nothing is kept."""
    with pytest.raises(EmptyInputError):
        memory.remember("  ")
    for importance in (2.0, -1, "much", True):
        with pytest.raises(InputError, match="importance"):
            memory.remember("text", importance=importance)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="JSON"):
        memory.remember("text", metadata={"a": object()})
    with pytest.raises(InputError, match="k=-1"):
        memory.recall("?", -1)
    with pytest.raises(InputError, match="space"):
        Memory(memory.mem, "")
    with pytest.raises(InputError, match="decay"):
        Memory(memory.mem, decay=0)
    assert memory.list() == []


# Conversations


def in_letters(model: LanguageModel) -> dict[str, Any]:
    """Options for answers that are the same tokens when they are read again, which random bytes are not."""
    letters = set(model.tokenize("abcdefghijklmnopqrstuvwxyz .,", markup=False))
    return {"generate_kwargs": {"suppress_tokens": [token for token in range(300) if token not in letters]}}


def test_a_conversation_goes_on_after_a_restart_as_if_there_had_been_none(model: LanguageModel, tmp_path: Path) -> None:
    """Its messages are there, at least 90% comes from disk exactly, and the answer is the same."""
    plain = in_letters(model)
    with open_mem(model, tmp_path / "kv", max_tokens=24) as mem:
        first = mem.chat(HELLO, thread="t", **plain)
        messages = [*HELLO, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And?"}]
        uninterrupted = mem.chat(messages, thread="t", **plain)
        assert uninterrupted.usage.computed < 30
        assert mem.history("t")[-1] == {"role": "assistant", "content": uninterrupted.text}
        mem.forget_thread("t")
        assert mem.chat(HELLO, thread="t", **plain).text == first.text
    with open_mem(model, tmp_path / "kv", max_tokens=24) as mem:
        assert mem.threads() == ["t"]
        assert mem.history("t") == messages[:2]
        resumed = mem.chat([*mem.history("t"), messages[2]], thread="t", **plain)
        assert resumed.text == uninterrupted.text
        known = len(model.tokenize(model.render(messages[:2]), markup=True)) - 30
        assert resumed.usage.exact >= 0.9 * known
        assert resumed.usage.reused == 0


def test_branches_of_a_conversation_find_what_they_share(model: LanguageModel, tmp_path: Path) -> None:
    """A retry and an edited message reuse the longest common beginning, from disk too."""
    plain = in_letters(model)
    long = {"role": "user", "content": "The harbour has a pier, and the pier has boats. " * 4}
    with open_mem(model, tmp_path / "kv") as mem:
        first = mem.chat([long], thread="t", **plain)
        told = [long, {"role": "assistant", "content": first.text}]
        for question in ("And the boats?", "And the pier?"):
            mem.chat([*told, {"role": "user", "content": question}], thread="t", **plain)
    for question in ("And the boats?", "And the pier?", "And the harbour?"):
        with open_mem(model, tmp_path / "kv") as mem:
            answer = mem.chat([*told, {"role": "user", "content": question}], thread="t", **plain)
            assert answer.usage.exact > 200
            assert answer.usage.computed < 40
            assert answer.usage.reused == 0


def test_threads_are_named_listed_and_forgotten(mem: KVMem) -> None:
    """An unknown one is an error; forgetting leaves documents and other threads."""
    mem.add("The ferry leaves at nine.", id="ferry")
    mem.chat(HELLO, thread="a")
    mem.chat(HELLO, thread="b")
    assert mem.threads() == ["a", "b"]
    mem.forget_thread("a")
    assert mem.threads() == ["b"]
    with pytest.raises(UnknownThreadError, match="'a'"):
        mem.history("a")
    with pytest.raises(UnknownThreadError):
        mem.forget_thread("a")
    with pytest.raises(InputError, match="thread="):
        mem.chat(HELLO, thread="")
    assert mem.ask("When?", max_tokens=1).usage.reused == 0


def test_a_prompt_is_cut_as_the_branch_that_shares_most() -> None:
    """Up to its last common edge; behind that as it was, and something is always left to read."""
    spans = (Span((1, 2, 3, 4)), Span((5, 6, 7)))
    prompt = Prompt(spans, (8, 9))
    cut = recut(prompt, [Branch((1, 2, 9), (2, 3)), Branch((1, 2, 3, 4, 5, 6), (2, 4, 6))])
    assert [span.token_ids for span in cut.spans] == [(1, 2), (3, 4), (5, 6), (7,)]
    assert cut.query == (8, 9)
    whole = recut(prompt, [Branch((1, 2, 3, 4, 5, 6, 7, 8, 9), (4, 8, 9))])
    assert [span.token_ids for span in whole.spans] == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert whole.query == (9,)
    assert whole.spans[0] is spans[0]
    assert recut(prompt, []) is prompt
    assert recut(prompt, [Branch((7, 7), (1, 2))]) is prompt


def test_a_turn_that_was_stopped_is_not_kept(mem: KVMem) -> None:
    """Closed early or out of time: the conversation is as it was."""
    stream = mem.stream_chat(HELLO, thread="t", max_tokens=2000)
    next(iter(stream))
    stream.close()
    with pytest.raises(AnswerTimeoutError):
        mem.chat(HELLO, thread="t", timeout=0.05, max_tokens=2000)
    assert mem.threads() == []


def decoded(mem: KVMem) -> list[str]:
    """What the entries of a store were read from."""
    entries = [mem.store.get(key) for key in mem.store.keys()]  # noqa: SIM118
    return [mem.model.tokenizer.decode(entry.token_ids) for entry in entries if entry is not None]


def test_a_forgotten_conversation_leaves_no_text(model: LanguageModel, tmp_path: Path) -> None:
    """Not of approximate turns, of old branches, or of other models; documents stay read."""
    told = "My card number is zanzibar, said the doctor at the harbour. "
    documents = [f"Document {n} tells of harbour {n * 7}. " * 3 for n in range(3)]
    other = tiny_model(seed=1)
    for used in (other, model):
        with open_mem(used, tmp_path / "kv") as mem:
            mem.read(documents)
            for n in range(6):
                mem.chat([{"role": "user", "content": f"{n} {told}" * 2}], thread="t", max_tokens=2)
            asked = [{"role": "user", "content": f"And here: {told}" * 2}]
            answer = mem.chat(asked, context=documents[::-1], thread="t", max_tokens=2)
            assert answer.usage.reused > 0
    with open_mem(model, tmp_path / "kv") as mem:
        assert any("zanzibar" in text for text in decoded(mem))
        mem.forget_thread("t")
        assert not any("zanzibar" in text for text in decoded(mem))
        assert sum("tells of harbour" in text for text in decoded(mem)) >= 6


@pytest.mark.parametrize("how", ["stopped", "late", "failed"])
def test_turns_without_an_answer_are_forgotten_with_their_conversation(
    model: LanguageModel, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, out of time, or failed after the reading: the first one, and a later one."""
    paragraph = "My card number is zanzibar, said the doctor at the harbour. " * 4
    told = [{"role": "user", "content": f"{paragraph}\n\n{paragraph}\n\nWhat is it?"}]
    options: dict[str, Any] = {"timeout": 0.5} if how == "late" else {}
    with open_mem(model, tmp_path / "kv") as mem:
        for earlier in ([], [*HELLO, {"role": "assistant", "content": "Yes."}]):
            if earlier:
                mem.chat(HELLO, thread="t")
            with monkeypatch.context() as patch:
                if how == "failed":
                    patch.setattr(local, "generate", lambda *_: 1 / 0)
                stream = mem.stream_chat([*earlier, *told], thread="t", max_tokens=3000, **options)
                if how == "stopped":
                    next(stream)
                    stream.close()
                with suppress(AnswerTimeoutError, ZeroDivisionError):
                    _ = stream.answer
                mem.plan("?", context=["."])  # waits for its turn
            assert any("zanzibar" in text for text in decoded(mem))
            assert mem.threads() == (["t"] if earlier else [])
            mem.forget_thread("t")
            assert not any("zanzibar" in text for text in decoded(mem))
            with pytest.raises(UnknownThreadError):
                mem.forget_thread("t")


def test_a_history_holds_what_was_said_and_nothing_of_ours(mem: KVMem) -> None:
    """Instructions for tools are in the prompt, not in the conversation; what is not JSON is refused at once."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "boolean"}}}}
    tools = [{"type": "function", "function": function}]
    for _ in range(2):
        before = mem.history("t") if "t" in mem.threads() else []
        mem.chat([*before, *HELLO], tools=tools, thread="t", max_tokens=60)
    assert "functions" not in str(
        [message["content"] for message in mem.history("t") if message["role"] != "assistant"]
    )
    assert [m["role"] for m in mem.history("t")][:1] == ["user"]
    with pytest.raises(InputError, match="cannot be kept"):
        mem.chat([{"role": "user", "content": "Hi", "extra": object()}], thread="u")


def test_memories_may_be_recalled_by_many_threads(mem: KVMem) -> None:
    """Each gets its own answer."""
    memory = Memory(mem)
    for n in range(12):
        memory.remember(f"fact{n} is known", metadata={"k": n})

    def find(n: int) -> str:
        return memory.recall(f"fact{n % 12}", 1, where={"k": n % 12})[0].item.text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(find, range(120))) == [f"fact{n % 12} is known" for n in range(120)]


def test_caches_that_other_memories_need_stay(mem: KVMem) -> None:
    """The same text twice is read once, and goes with the last of them; a title that changes leaves nothing behind."""
    one, two = Memory(mem), Memory(mem, "other")
    text = "The ferry leaves at nine in the evening. "
    first, second = one.remember(text), two.remember(text)
    one.forget(first.id)
    assert any("ferry" in t for t in decoded(mem))
    two.update(second.id, metadata={"title": "SECRET"})
    two.update(second.id, metadata={"title": "open"})
    assert not any("SECRET" in t for t in decoded(mem))
    two.forget(second.id)
    assert not any("ferry" in t for t in decoded(mem))


def test_forgetting_a_memory_does_not_read_the_others(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a text that another process remembered meanwhile keeps its caches."""
    memory, other = Memory(mem), Memory(mem, "other")
    first = memory.remember("The user likes tea.")
    for number in range(5):
        memory.remember(f"The user has seen {number} whales.")
    memory.forget(memory.remember("The user likes milk.").id)
    parsed: list[str] = []
    real = RecordView.refresh

    def refresh(view: RecordView[Any]) -> None:
        parse = view._parse  # noqa: SLF001
        view._parse = lambda record: parsed.append(record.key) or parse(record)  # noqa: SLF001
        try:
            real(view)
        finally:
            view._parse = parse  # noqa: SLF001

    monkeypatch.setattr(RecordView, "refresh", refresh)
    kept = other.remember("The user likes tea.")
    memory.forget(first.id)
    assert parsed == [kept.id]
    assert mem.ask("What is it?", context=[Document("m", first.text, {}, (first.text,))], max_tokens=1).usage.exact > 0


def test_what_a_caller_does_to_metadata_stays_with_the_caller(mem: KVMem) -> None:
    """Sources and documents are copies."""
    mem.add("The ferry leaves at nine.", id="f", metadata={"tags": ["a"]})
    for found in (mem.ask("When?", max_tokens=1).sources[0].metadata, mem.list()[0].metadata):
        found["tags"].append("b")
    assert mem.list()[0].metadata == mem.ask("When?", max_tokens=1).sources[0].metadata == {"tags": ["a"]}


# Tenants

MARKER = "zanzibar-4711-quokka"


def fill(mem: KVMem) -> None:
    mem.add(f"The secret is {MARKER}. " * 5, id=f"doc-{MARKER}", metadata={"title": MARKER})
    Memory(mem).remember(f"The user likes {MARKER}.", id=f"m-{MARKER}")
    mem.chat([{"role": "user", "content": f"Hello from {MARKER}. " * 5}], thread=f"t-{MARKER}", max_tokens=2)
    mem.ask("What is it?", context=[f"Pasted {MARKER} text. " * 5], max_tokens=1)


def contents(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_a_user_is_forgotten_to_the_last_byte(model: LanguageModel, tmp_path: Path) -> None:
    """No file holds the texts, the token ids or the keys of the user's caches; the others' are untouched."""
    with open_mem(model, tmp_path / "kv", namespace="user-eve@example.org") as eve:
        fill(eve)
        digests = {key.tokens for key in eve.store.keys("user-eve@example.org")}
    with open_mem(model, tmp_path / "kv", namespace="bob") as bob:
        bob.add("The ferry leaves at nine.", id="ferry")
        before = bob.ask("When?").text
        everything = contents(tmp_path / "kv")
        assert MARKER.encode() in everything
        assert digests
        assert all(digest.encode() in everything for digest in digests)
        bob.forget_user("user-eve@example.org")
        left = contents(tmp_path / "kv")
        assert MARKER.encode() not in left
        assert b"user-eve" not in left
        assert not any(digest.encode() in left for digest in digests - {k.tokens for k in bob.store.keys("bob")})
        assert bob.ask("When?").text == before
    assert MARKER.encode() not in contents(tmp_path / "kv")
    ids = model.tokenize(f"The secret is {MARKER}.", markup=False)[5:25]
    import numpy as np

    for dtype in ("<i4", "<i8"):
        assert np.array(ids, dtype=dtype).tobytes() not in contents(tmp_path / "kv")
    with open_mem(model, tmp_path / "kv", namespace="user-eve@example.org") as eve:
        assert eve.list() == ()
        assert eve.threads() == []
        assert Memory(eve).list() == []


def test_what_a_killed_process_left_is_forgotten_too(model: LanguageModel, tmp_path: Path) -> None:
    """Its files were noted before they were written."""
    with open_mem(model, tmp_path / "kv", namespace="eve") as mem:
        fill(mem)
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        with entries_index(tmp_path / "kv") as connection:
            connection.execute("INSERT INTO pending VALUES ('left', 'eve', 5, ?, ?)", (gone.pid, time.time()))
        (tmp_path / "kv" / "v1" / "tmp" / "left").write_text(MARKER)
        mem.forget_user()
    assert MARKER.encode() not in contents(tmp_path / "kv")


def test_files_that_cannot_be_removed_are_an_error(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are removed by the next attempt."""

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no")

    with open_mem(model, tmp_path / "kv", namespace="eve") as mem:
        fill(mem)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", refuse)
            with pytest.raises(StoreError, match="could not be removed"):
                mem.forget_user()
        mem.forget_user()
        assert not list((tmp_path / "kv").rglob("*.safetensors"))


def test_an_engine_that_forgets_its_own_user_goes_on(mem: KVMem) -> None:
    """Nothing is served from memory either."""
    fill(mem)
    assert mem.forget_user() > 0
    assert mem.list() == ()
    assert mem.stats().store.entries == 0
    answer = mem.ask("What is it?", context=[f"Pasted {MARKER} text. " * 5], max_tokens=1)
    assert answer.usage.exact == 0
    assert answer.usage.reused == 0


def test_nothing_of_another_tenant_is_reached(model: LanguageModel, tmp_path: Path) -> None:
    """Two hundred probes through every method, with names that try to break out: none is answered."""
    with open_mem(model, tmp_path / "kv", namespace="victim") as mem:
        fill(mem)
        victim = mem.stats().store.entries
    names = [f"probe{n}" for n in range(12)]
    names += ['victim", "x', "victim/..", "../victim", "vict%", "victim\0", "Victim", "", "*", "victim,"]
    names = [name for name in names if name]
    probes = 0
    for name in names:
        with open_mem(model, tmp_path / "kv", namespace=name) as mem:
            memory = Memory(mem)
            found: list[object] = [*mem.list(), *mem.threads(), *memory.list(), *memory.recall(MARKER)]
            found += mem.retrieve(MARKER, 3)
            for ask in (
                lambda: mem.get(f"doc-{MARKER}"),
                lambda: mem.history(f"t-{MARKER}"),
                lambda: memory.get(f"m-{MARKER}"),  # noqa: B023
                lambda: mem.remove(f"doc-{MARKER}"),
                lambda: memory.forget(f"m-{MARKER}"),  # noqa: B023
                lambda: mem.forget_thread(f"t-{MARKER}"),
            ):
                with pytest.raises(LookupError) as error:
                    ask()
                assert f"doc-{MARKER}'." not in str(error.value).replace(f"document 'doc-{MARKER}'", "")
                probes += 1
            answer = mem.ask("What is it?", context=[f"Pasted {MARKER} text. " * 5], max_tokens=1)
            assert answer.usage.exact == answer.usage.reused == 0
            mem.clear()
            probes += 7
            assert found == []
    assert probes >= 200
    with open_mem(model, tmp_path / "kv", namespace="victim") as mem:
        assert mem.stats().store.entries == victim
        assert mem.threads() == [f"t-{MARKER}"]
        assert len(Memory(mem).list()) == 1
