from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import open_mem

from kvmem import AnswerTimeoutError, Document, InputError, KVMem, LanguageModel
from kvmem.decode.shared import attend_shared
from kvmem.testing import tiny_model

TEXTS = [
    "The lease begins in April. The rent is due on the first day of each month, in advance.",
    "The machine has two boilers. One is for brewing and the other one is for steam.",
    "The pager rings at night. Acknowledge within five minutes, then look at the dashboard.",
]
QUESTIONS = ["When is the rent due?", "Why?", "What are the two boilers of the machine for, and who says so?"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_oss"])
def test_a_batch_gives_the_answers_of_single_questions(kind: str, tmp_path: Path) -> None:
    """Over an exact prefix, greedily: with windows, softcaps, sinks and grouped heads."""
    windows = {"sliding_window": 24} if kind in ("gemma2", "gemma3_text", "mistral", "gpt_oss") else {}
    try:
        model = tiny_model(kind, **windows)
    except (ValueError, KeyError) as error:
        pytest.skip(f"transformers cannot make a tiny {kind}: {error}")
    if not model.blendable:
        pytest.skip(f"{kind}: {model.anatomy.reason}")
    with open_mem(model, tmp_path / "kv") as mem:
        mem.add_all(TEXTS)
        single = [mem.ask(question) for question in QUESTIONS]
        batch = mem.batch(QUESTIONS)
    assert [answer.text for answer in batch] == [answer.text for answer in single]
    assert [answer.finish_reason for answer in batch] == [answer.finish_reason for answer in single]
    assert [answer.usage.generated for answer in batch] == [answer.usage.generated for answer in single]
    assert batch[1].usage.prompt == single[1].usage.prompt
    assert batch[1].usage.token_layers == batch[1].usage.computed * model.depth


def test_a_batch_over_a_stitched_cache_is_repaired_once_for_all(mem: KVMem, model: LanguageModel) -> None:
    """With everything recomputed it equals single questions; else it says what was recomputed."""
    mem.prefill("?", context=TEXTS)
    single = [mem.ask(question, context=TEXTS[::-1], blend="all") for question in QUESTIONS]
    mem.clear()
    mem.prefill("?", context=TEXTS)
    batch = mem.batch(QUESTIONS, context=TEXTS[::-1], blend="all")
    assert [answer.text for answer in batch] == [answer.text for answer in single]
    assert batch[0].usage.recomputed > 100
    mem.clear()
    mem.prefill("?", context=TEXTS)
    blended = mem.batch(QUESTIONS, context=iter(TEXTS[::-1]))
    assert 0 < blended[0].usage.recomputed < 0.2 * blended[0].usage.prompt
    assert blended[0].usage.recomputed == blended[1].usage.recomputed


def test_stop_strings_and_lengths_hold_for_every_row(mem: KVMem) -> None:
    """A row that stops early does not end the others."""
    mem.add_all(TEXTS)
    texts = [answer.text for answer in mem.batch(QUESTIONS, max_tokens=20)]
    stop = next(c for c in texts[0] if c.isprintable() and c.strip() and c != "\ufffd")
    stopped = mem.batch(QUESTIONS, max_tokens=20, stop=stop)
    assert stopped[0].text == texts[0][: texts[0].index(stop)]
    assert stopped[0].finish_reason == "stop"
    assert [answer.text for answer in stopped] == [text.split(stop)[0] for text in texts]
    assert all(answer.usage.generated == 1 for answer in mem.batch(QUESTIONS, max_tokens=1))


def test_padding_is_not_counted_as_generated(tmp_path: Path) -> None:
    """A row that ended at a stop string is filled by transformers, with a token that need not end anything."""
    model = tiny_model()
    model.hf.generation_config.pad_token_id = 65
    with open_mem(model, tmp_path / "kv", max_tokens=20) as mem:
        mem.add_all(TEXTS)
        text = mem.ask(QUESTIONS[2]).text
        stop = next(c for c in text if c.isprintable() and c.strip() and c != "\ufffd")
        single = [mem.ask(question, stop=stop) for question in QUESTIONS]
        batch = mem.batch(QUESTIONS, stop=stop)
    assert [answer.usage.generated for answer in batch] == [answer.usage.generated for answer in single]
    assert [answer.text for answer in batch] == [answer.text for answer in single]


def test_a_batch_has_a_time_out(mem: KVMem) -> None:
    """As a question has."""
    mem.add_all(TEXTS)
    with pytest.raises(AnswerTimeoutError, match="not done within"):
        mem.batch(QUESTIONS, timeout=0.05, max_tokens=3000)
    assert len(mem.batch(QUESTIONS, timeout=60)) == 3


@pytest.mark.parametrize("questions", [QUESTIONS[:1], QUESTIONS[:2]])
def test_the_time_of_a_batch_holds_for_its_reading_too(
    mem: KVMem, questions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question, or several together: the model is not run when the time is over."""
    monkeypatch.setattr(type(mem.model), "_run", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(AnswerTimeoutError, match="not done within"):
        mem.batch(questions, context=TEXTS, timeout=1e-6)


@pytest.mark.parametrize("context", ["A text.", b"A text.", Document("a", "A text.", {})])
def test_the_context_of_a_batch_is_checked_as_that_of_a_question(mem: KVMem, context: Any) -> None:
    """One text is no list of texts."""
    with pytest.raises(InputError, match="Give a list"):
        mem.batch(QUESTIONS, context=context)


def test_a_batch_leaves_the_engine_as_it_was(mem: KVMem) -> None:
    """The next question is answered as ever, and the model uses its own attention for others."""
    mem.add_all(TEXTS)
    before = mem.ask(QUESTIONS[0]).text
    mem.batch(QUESTIONS)
    assert mem.ask(QUESTIONS[0]).text == before
    ids = torch.tensor([[1, 2, 3]])
    assert mem.model.hf(ids).logits.shape[1] == 3


def test_odd_batches(mem: KVMem) -> None:
    """None, one, the same twice; bad ones are refused before any is answered."""
    mem.add_all(TEXTS)
    assert mem.batch([]) == []
    alone = mem.ask("Why?").text
    assert [answer.text for answer in mem.batch(["Why?"])] == [alone]
    assert [answer.text for answer in mem.batch(["Why?", "Why?"])] == [alone, alone]
    with pytest.raises(InputError, match="empty"):
        mem.batch(["Why?", " "])
    with pytest.raises(InputError, match="list of questions"):
        mem.batch("Why?")
    with pytest.raises(ValueError, match="shared cache"):
        attend_shared(torch.nn.Module(), *(torch.zeros(1, 1, 1, 2),) * 3, None)


def test_questions_that_need_other_chunks_are_answered_apart(tmp_path: Path) -> None:
    """On overflow each question has its own chunks; answers keep the order of the questions."""
    model = tiny_model(max_position_embeddings=512)
    with open_mem(model, tmp_path / "kv") as mem:
        mem.add_all([f"Word{n} is told about here, and it is {n}. " * 5 for n in range(8)])
        questions = ["What is Word3?", "What is Word5?", "What is Word3?"]
        single = [mem.ask(question) for question in questions]
        batch = mem.batch(questions)
    assert [a.sources for a in batch] == [a.sources for a in single]
    assert batch[0].sources != batch[1].sources
    assert [a.text for a in batch] == [a.text for a in single]
