from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers import open_mem

from kvmem import ClosedError, KVMem
from kvmem.cancellation import Cancellation
from kvmem.library.trimming import Trimmer
from kvmem.prompt.layout import PLAIN, Typesetter
from kvmem.testing import tiny_model

SYSTEM = {"role": "system", "content": "Be brief."}


def conversation(turns: int, words: int = 12) -> list[Any]:
    """Turns that differ, and a question."""
    said = [
        {"role": role, "content": f"{role} {number} says: " + f"word{number} " * words}
        for number in range(turns)
        for role in ("user", "assistant")
    ]
    return [SYSTEM, *said, {"role": "user", "content": f"What is said in {turns}?"}]


class Counting(Typesetter):
    """Counts layouts, and the messages in them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sizes: list[int] = []

    def lay_out(self, messages: Any, *args: Any, **options: Any) -> Any:
        self.sizes.append(len(messages))
        return super().lay_out(messages, *args, **options)


def test_a_long_conversation_is_laid_out_a_few_times_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for every turn that is left out, and no message again at the next turn."""
    model = tiny_model(max_position_embeddings=2048)
    typesetter = Counting(model)
    trimmer = Trimmer(model, typesetter)
    counted: list[str] = []
    real = type(model).count_all
    monkeypatch.setattr(
        type(model), "count_all", lambda self, texts, *rest: counted.extend(texts) or real(self, texts, *rest)
    )
    layout, dropped = trimmer.lay_out(conversation(500), 0, 64, PLAIN, Cancellation())
    assert layout.tokens <= 2048 - 64
    assert dropped > 900
    assert len(typesetter.sizes) <= 3
    assert max(typesetter.sizes) < 40
    typesetter.sizes.clear()
    shorter = conversation(60)
    assert not model.is_beyond_window(sum(len(message["content"]) for message in shorter))
    assert trimmer.lay_out(shorter, 0, 64, PLAIN, Cancellation())[1] > 0
    assert max(typesetter.sizes) < 40
    before = len([text for text in counted if text.startswith(("user", "assistant"))])
    trimmer.lay_out(conversation(501), 0, 64, PLAIN, Cancellation())
    again = len([text for text in counted if text.startswith(("user", "assistant"))]) - before
    assert again <= 30  # what is laid out, and the new turn


def test_what_is_left_out_stays_until_the_window_is_full_again() -> None:
    """A quarter of the window is made free at once, so that the next turns begin alike."""
    model = tiny_model(max_position_embeddings=2048)
    trimmer = Trimmer(model, Typesetter(model))
    found = [trimmer.lay_out(conversation(n), 0, 64, PLAIN, Cancellation()) for n in range(5, 60)]
    dropped = [count for _, count in found]
    assert dropped == sorted(dropped)
    assert all(layout.tokens <= 2048 - 64 for layout, _ in found)
    changes = sum(a != b for a, b in pairwise(dropped))
    assert 4 < changes <= 55 / 2


def test_the_last_turn_is_kept_and_cancelling_ends_the_work() -> None:
    """Whatever its size, if it fits; counting stops when nobody waits for it."""
    model = tiny_model(max_position_embeddings=600)
    trimmer = Trimmer(model, Typesetter(model))
    long = [*conversation(20)[:-1], {"role": "user", "content": "word " * 90}]
    layout, dropped = trimmer.lay_out(long, 0, 20, PLAIN, Cancellation())
    assert dropped == 40
    assert layout.tokens <= 580
    cancelled = Cancellation()
    cancelled.cancel()
    with pytest.raises(ClosedError):
        Trimmer(model, Typesetter(model)).lay_out(conversation(30), 0, 20, PLAIN, cancelled)


def test_most_turns_of_a_long_conversation_are_exact_for_the_greater_part(tmp_path: Path) -> None:
    """When turns are left out, the rest is read once as it stands, and the turns after it continue that."""
    model = tiny_model(max_position_embeddings=4000)
    shares = []
    with open_mem(model, tmp_path / "kv") as mem:
        messages = conversation(16)[:-1]
        for number in range(40):
            messages = [*messages, {"role": "user", "content": f"What about {number}? " + "Say more. " * 3}]
            answer = mem.chat(messages, thread="t", max_tokens=8)
            messages = [*messages, answer.message]
            shares.append(answer.usage.exact / answer.usage.prompt)
            assert answer.usage.reused == 0
    assert answer.plan.dropped > 0
    assert sum(share >= 0.5 for share in shares[1:]) >= 0.9 * len(shares[1:])


def test_a_conversation_that_was_cut_equals_full_prefill(tmp_path: Path) -> None:
    """What the turn after the cut continues is what transformers computes from the same tokens."""
    model = tiny_model(max_position_embeddings=700)
    with KVMem(model, tmp_path / "kv", max_tokens=8) as mem:
        messages = conversation(8)
        first = mem.chat(messages, thread="t")
        assert first.plan.dropped > 0
        again = mem.chat([*messages, first.message, {"role": "user", "content": "And?"}], thread="t")
        plain = KVMem(model, None, max_tokens=8)
        assert again.text == plain.chat([*messages, first.message, {"role": "user", "content": "And?"}]).text
