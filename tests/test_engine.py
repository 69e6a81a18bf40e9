from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import open_mem

import kvmem
from kvmem import (
    AnswerTimeoutError,
    BlendSettings,
    Cancellation,
    ClosedError,
    InputError,
    KVMem,
    LanguageModel,
    ModelError,
    Prefill,
)
from kvmem.blend import select
from kvmem.kv.layer import BlendedLayer
from kvmem.runtime.worker import turns_of
from kvmem.store import MemoryStore
from kvmem.testing import same_entry, tiny_model

TEXTS = [
    "The lease begins in April. The rent is due on the first day of each month, in advance.",
    "The machine has two boilers. One is for brewing and the other one is for steam.",
    "The pager rings at night. Acknowledge within five minutes, then look at the dashboard.",
]


def full_logits(model: LanguageModel, prefill: Prefill) -> torch.Tensor:
    """The oracle: the model alone, reading the same tokens at once."""
    with torch.no_grad():
        logits: torch.Tensor = model.hf(prefill.token_ids[None]).logits[0, -1]
        return logits.float()


@contextmanager
def counting(model: LanguageModel) -> Iterator[dict[str, int]]:
    """Counts the tokens that enter the model, and tokens times layers, layer by layer."""
    counts = {"tokens": 0, "token_layers": 0}

    def embedded(_: Any, __: Any, output: torch.Tensor) -> None:
        counts["tokens"] += output.shape[1]

    def entered(_: Any, inputs: Any) -> None:
        counts["token_layers"] += inputs[0].shape[1]

    handles = [model.hf.get_input_embeddings().register_forward_hook(embedded)]
    handles += [layer.register_forward_pre_hook(entered) for layer in model.hf.base_model.layers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param)


def test_exact_hits_equal_full_prefill(any_model: LanguageModel, tmp_path: Path) -> None:
    """Read, asked again, and asked after a restart: always the logits of full prefill."""
    with open_mem(any_model, tmp_path / "kv") as mem:
        for text in TEXTS:
            mem.add(text)
        first = mem.prefill("What is due in advance?")
        assert first.usage.exact + first.usage.computed == first.usage.prompt
        assert torch.allclose(first.logits, full_logits(any_model, first), atol=1e-3)
    with open_mem(any_model, tmp_path / "kv") as mem:
        again = mem.prefill("What is due in advance?")
        assert again.usage == first.usage
        assert again.usage.exact == again.usage.prompt - again.usage.computed > 100
        assert torch.allclose(again.logits, full_logits(any_model, again), atol=1e-3)


def test_all_equals_full_prefill_in_any_order(any_model: LanguageModel, tmp_path: Path) -> None:
    """Stitched from other contexts and recomputed as a whole, the state is that of full prefill."""
    with open_mem(any_model, tmp_path / "kv") as mem:
        mem.prefill("Which?", context=TEXTS)
        moved = mem.prefill("Which one is for steam?", context=TEXTS[::-1], blend="all")
        assert moved.usage.recomputed > 100
        assert moved.usage.reused == 0
        assert torch.allclose(moved.logits, full_logits(any_model, moved), atol=1e-3)


def test_greedy_tokens_equal_those_of_generate(any_model: LanguageModel, tmp_path: Path) -> None:
    """32 greedy tokens after an exact hit are those of transformers' generate on the same ids."""
    with open_mem(any_model, tmp_path / "kv", max_tokens=32) as mem:
        for text in TEXTS:
            mem.add(text)
        prefill = mem.prefill("What is due?")
        expected = any_model.hf.generate(
            prefill.token_ids[None],
            attention_mask=torch.ones_like(prefill.token_ids)[None],
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=2,
        )[0, len(prefill.token_ids) :]
        answer = mem.ask("What is due?")
        assert answer.text == any_model.tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.usage.generated == len(expected)


def test_repair_moves_towards_full_prefill(tmp_path: Path) -> None:
    """On average over questions, the default is closer to full prefill than reuse without repair."""
    model = tiny_model("qwen3")
    divergence = {"none": 0.0, "query": 0.0}
    with open_mem(model, tmp_path / "kv") as mem:
        mem.prefill("?", context=TEXTS)
        for question in ("Which is for steam?", "What begins in April?", "When does it ring?"):
            for selector in divergence:
                blend = {"selector": selector, "recompute": 0.2}
                blended = mem.prefill(question, context=TEXTS[::-1], blend=blend)
                truth = full_logits(model, blended).log_softmax(-1)
                divergence[selector] += float((truth.exp() * (truth - blended.logits.log_softmax(-1))).sum())
    assert divergence["query"] < 0.7 * divergence["none"]


@pytest.mark.parametrize("selector", ["none", "query", "deviation", "first_k", "all"])
def test_usage_is_disjoint_and_counts_the_models_work(mem: KVMem, model: LanguageModel, selector: str) -> None:
    """The four classes add up to the prompt, and as many tokens as claimed enter the model's layers."""
    mem.prefill("Which?", context=TEXTS)
    with counting(model) as counts:
        prefill = mem.prefill("Which one is it?", context=TEXTS[::-1], blend=selector)
    usage = prefill.usage
    assert usage.prompt == len(prefill.token_ids)
    assert usage.token_layers == counts["token_layers"] > 0


def test_a_warm_ask_forwards_only_query_and_recomputed_tokens(mem: KVMem, model: LanguageModel) -> None:
    """Chunks reused elsewhere cost the recomputed tokens; the question is read once, and once more to score."""
    mem.prefill("Which?", context=TEXTS)
    with counting(model) as counts:
        answer = mem.ask("Which one is it?", context=TEXTS[::-1], max_tokens=1)
    usage = answer.usage
    assert usage.recomputed > 0
    assert counts["tokens"] == usage.computed + usage.recomputed + usage.computed
    assert usage.token_layers == counts["token_layers"] <= counts["tokens"] * model.depth
    with counting(model) as counts:
        answer = mem.ask("Which one is it?", context=TEXTS, max_tokens=1)
    assert counts["tokens"] == answer.usage.computed < 60


def test_stored_entries_stay_byte_identical(mem: KVMem, tmp_path: Path) -> None:
    """Asking twice, blended and exact, writes to no stored entry."""
    for text in TEXTS:
        mem.add(text)
    mem.ask("Which?", context=TEXTS[::-1])
    before = {p: p.read_bytes() for p in (tmp_path / "kv").rglob("*.safetensors")}
    assert len(before) >= 4
    entries = [entry for key in list(mem.store.keys()) if (entry := mem.store.get(key)) is not None]
    copies = [copy.deepcopy(entry) for entry in entries]
    for _ in range(2):
        mem.ask("Which one?", context=TEXTS[::-1])
        mem.ask("Which one?")
    assert {p: p.read_bytes() for p in before} == before
    # The entries in memory are those the engine loads from; a write to one would show here.
    for entry, copied in zip(entries, copies, strict=True):
        assert mem.store.get(entry.key) is entry
        assert same_entry(entry, copied)


def test_the_answer_to_a_question_does_not_depend_on_earlier_ones(mem: KVMem) -> None:
    """A blended answer is the same with a warm buffer, with a cold one, and after another question."""
    mem.prefill("?", context=TEXTS)
    first = mem.prefill("Which is for steam?", context=TEXTS[::-1])
    mem.ask("When does the pager ring?", context=TEXTS[::-1])
    second = mem.prefill("Which is for steam?", context=TEXTS[::-1])
    assert torch.equal(first.logits, second.logits)


def test_a_prefill_belongs_to_the_caller(mem: KVMem) -> None:
    """Later questions neither change nor use a prefill's cache, and the model can go on from it."""
    for text in TEXTS:
        mem.add(text)
    prefill = mem.prefill("Which?")
    kept = prefill.cache.blended[1].keys[:, :, : prefill.cache.length].clone()
    mem.ask("What else?")
    assert torch.equal(prefill.cache.blended[1].keys[:, :, : prefill.cache.length], kept)
    with torch.no_grad():
        out = mem.model.hf(torch.tensor([[5]]), past_key_values=prefill.cache, use_cache=True).logits[0, -1]
        ids = torch.cat([prefill.token_ids, torch.tensor([5])])
        assert torch.allclose(out, mem.model.hf(ids[None]).logits[0, -1], atol=1e-3)


def test_documents_survive_a_restart_and_can_be_replaced_and_removed(model: LanguageModel, tmp_path: Path) -> None:
    """add, get, list, remove; a replacement keeps its place and reads only what is new."""
    with open_mem(model, tmp_path / "kv") as mem:
        for number, text in enumerate(TEXTS):
            mem.add(text, id=f"d{number}", metadata={"n": number})
    with open_mem(model, tmp_path / "kv") as mem:
        assert [d.id for d in mem.list()] == ["d0", "d1", "d2"]
        assert mem.get("d1").text == TEXTS[1]
        assert mem.get("d1").metadata == {"n": 1}
        with counting(model) as counts:
            mem.add(TEXTS[1], id="d1")
        assert counts["tokens"] == 0
        with counting(model) as counts:
            mem.add(TEXTS[2] + " Then write it down.", id="d2")
        assert 0 < counts["tokens"] < 120
        entries = mem.stats().store.entries
        mem.remove("d0")
        assert [d.id for d in mem.list()] == ["d1", "d2"]
        assert mem.stats().store.entries < entries
        answer = mem.ask("What is it?")
        assert {source.document_id for source in answer.sources} == {"d1", "d2"}
        assert mem.store.check() == []


def test_removing_a_document_frees_every_cache_of_it(mem: KVMem) -> None:
    """When the last document is gone, only the prefix is kept."""
    for number, text in enumerate(TEXTS):
        mem.add(text, id=str(number))
    mem.ask("Which?", context=[mem.get("2"), mem.get("0")])
    for number in range(3):
        mem.remove(str(number))
    assert mem.stats().store.entries == 1
    assert mem.stats().documents == 0


def test_namespaces_do_not_see_each_other(model: LanguageModel, tmp_path: Path) -> None:
    """Neither documents nor entries of another namespace are found."""
    with open_mem(model, tmp_path / "kv", namespace="a") as mem:
        mem.add(TEXTS[0], id="secret")
    with open_mem(model, tmp_path / "kv", namespace="b") as mem:
        assert list(mem.list()) == []
        with pytest.raises(kvmem.UnknownDocumentError):
            mem.get("secret")
        mem.add(TEXTS[0], id="own")
        assert mem.ask("What?").usage.exact > 0


def test_overflow_falls_back_to_retrieval_and_says_so(tmp_path: Path) -> None:
    """A corpus beyond the window: chunks that fit are chosen by BM25, with the excess in the reason."""
    model = tiny_model(max_position_embeddings=700)
    with open_mem(model, tmp_path / "kv", max_tokens=20) as mem:
        for number in range(12):
            mem.add(f"Note {number}: the colour of room {number} is shade{number}, says the painter.", id=f"n{number}")
        answer = mem.ask("What is the colour shade7 in the notes?")
        assert answer.plan.mode == "route"
        assert mem.ask("What colours do the painter's rooms have?").plan.mode == "retrieve"
        assert str(answer.plan.over) in answer.plan.reason
        assert answer.plan.over > 0
        assert answer.plan.prompt_tokens + 20 <= 700
        assert answer.usage.prompt == answer.plan.prompt_tokens
        best = max(answer.sources, key=lambda s: s.score or 0.0)
        assert best.document_id == "n7"


def test_streaming_gives_the_answer_in_pieces(mem: KVMem) -> None:
    """Pieces concatenate to the answer; plan and sources are known before the end."""
    mem.add(TEXTS[0])
    stream = mem.stream("What is due?", max_tokens=20)
    assert stream.plan.mode == "whole"
    assert len(stream.sources) == 2
    text = "".join(stream)
    assert text == stream.answer.text == mem.ask("What is due?", max_tokens=20).text
    timings = stream.answer.timings
    assert 0 < timings.prepare + timings.stitch + timings.repair <= timings.first_token <= timings.total


def test_stop_strings_and_max_tokens_and_temperature_take_effect(mem: KVMem) -> None:
    """Text ends before the stop string; seeds repeat; a hot sample differs from greedy."""
    mem.add(TEXTS[0])
    greedy = mem.ask("What is due?", max_tokens=30)
    assert greedy.usage.generated <= 30
    stop = greedy.text[4:6]
    stopped = mem.ask("What is due?", max_tokens=30, stop=[stop])
    assert stop not in stopped.text
    assert greedy.text.startswith(stopped.text)
    assert stopped.finish_reason == "stop"
    assert mem.ask("What is due?", max_tokens=3).finish_reason == "length"
    hot = [mem.ask("What is due?", max_tokens=30, temperature=5.0, seed=seed).text for seed in (1, 1, 2)]
    assert hot[0] == hot[1]
    assert len({greedy.text, *hot}) == 3
    assert mem.ask("What is due?", max_tokens=30, temperature=1e-5, seed=1).text == greedy.text


def test_closing_a_stream_early_frees_the_engine(mem: KVMem) -> None:
    """The rest is not generated, and the next question is answered."""
    mem.add(TEXTS[0])
    with mem.stream("What is due?", max_tokens=3000) as stream:
        next(stream)
    assert stream.answer.finish_reason == "cancelled"
    assert stream.answer.usage.generated < 2000
    assert mem.ask("What is due?").usage.generated > 0


def test_many_threads_may_ask(mem: KVMem) -> None:
    """Concurrent questions are answered as one after the other would be."""
    mem.add(TEXTS[0])
    expected = [mem.ask(f"What is {n}?").text for n in range(4)]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.__setitem__(n, mem.ask(f"What is {n}?").text)) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(4)] == expected


def test_a_damaged_entry_is_read_again(model: LanguageModel, tmp_path: Path) -> None:
    """A corrupt file is never used: the answer is as before, and the store is whole afterwards."""
    with open_mem(model, tmp_path / "kv") as mem:
        for text in TEXTS:
            mem.add(text)
        before = mem.prefill("What is due?")
    files = sorted((tmp_path / "kv").rglob("*.safetensors"))
    assert len(files) >= 4
    for file in files[::2]:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
    with open_mem(model, tmp_path / "kv") as mem:
        after = mem.prefill("What is due?")
        assert after.usage.computed > before.usage.computed
        assert torch.allclose(after.logits, before.logits, atol=1e-3)
        assert mem.store.check() == []


ERRORS: list[tuple[type[kvmem.KVMemError], str, Any]] = [
    (kvmem.EmptyInputError, "add", lambda mem, tmp: mem.ask("What?")),
    (kvmem.EmptyInputError, "Ask", lambda mem, tmp: (mem.add("text"), mem.ask("  "))),
    (kvmem.InputError, "str", lambda mem, tmp: (mem.add("text"), mem.ask(3))),
    (kvmem.PromptTooLongError, "Shorten", lambda mem, tmp: (mem.add("text"), mem.ask("long " * 2000))),
    (kvmem.UnknownDocumentError, "Known ids: 'a'", lambda mem, tmp: (mem.add("text", id="a"), mem.remove("b"))),
    (kvmem.EmptyInputError, "Give a text", lambda mem, tmp: mem.add(" \n")),
    (kvmem.InputError, "LangChain", lambda mem, tmp: mem.add(7)),
    (kvmem.InputError, "JSON", lambda mem, tmp: mem.add("text", metadata={"a": object()})),
    (kvmem.InputError, "UTF-8", lambda mem, tmp: mem.add(tmp / "missing.txt")),
    (kvmem.InputError, "list of texts", lambda mem, tmp: mem.ask("What?", context="one text")),
    (kvmem.InputError, "selector", lambda mem, tmp: mem.ask("What?", blend="best")),
    (kvmem.InputError, "recompute", lambda mem, tmp: mem.ask("What?", blend={"recompute": 1.5})),
    (kvmem.InputError, "max_tokens", lambda mem, tmp: mem.ask("What?", max_tokens=0)),
    (kvmem.InputError, "temperature", lambda mem, tmp: mem.ask("What?", temperature=-1)),
    (kvmem.InputError, "namespace", lambda mem, tmp: KVMem(mem.model, None, namespace="")),
    (kvmem.InputError, "kvmem.settings", lambda mem, tmp: KVMem(mem.model, None, treads=2)),
    (kvmem.InputError, "tokenizer", lambda mem, tmp: KVMem(mem.model.hf, None)),
    (kvmem.ModelNotFoundError, "existing directory", lambda mem, tmp: KVMem(str(tmp / "nowhere"))),
    (kvmem.ModelNotFoundError, "hub id", lambda mem, tmp: KVMem("nobody/no-such-model")),
    (kvmem.ModelNotFoundError, "its directory", lambda mem, tmp: KVMem(str(Path(__file__)))),
    (kvmem.StoreError, "directory", lambda mem, tmp: KVMem(mem.model, Path(__file__))),
    (kvmem.ClosedError, "Open a new one", lambda mem, tmp: (mem.close(), mem.ask("What?"))),
]


@pytest.mark.parametrize(("kind", "advice", "act"), ERRORS, ids=[f"{e[0].__name__}-{e[1]}" for e in ERRORS])
def test_bad_input_gives_an_error_that_says_what_to_do(
    mem: KVMem, tmp_path: Path, kind: type[kvmem.KVMemError], advice: str, act: Any
) -> None:
    """Each mistake has its own error, and its message names the way out."""
    with pytest.raises(kind, match=advice):
        act(mem, tmp_path)


@pytest.mark.parametrize(
    "context",
    [["x"], ["x", "y", TEXTS[0]], [TEXTS[0], TEXTS[1], TEXTS[0]], [TEXTS[0], TEXTS[0]], [TEXTS[2], "z" * 900]],
    ids=["one character", "tiny chunks", "a chunk twice", "a chunk twice in a row", "one endless line"],
)
def test_odd_prompts_are_answered_right(mem: KVMem, model: LanguageModel, context: list[str]) -> None:
    """Tiny chunks, repeated chunks, a question of one character: exact where exact, full prefill where recomputed."""
    for piece in context:
        mem.prefill("?", context=[piece])
    for blend in ("query", "deviation", "first_k", "none"):
        usage = mem.prefill("?", context=context[::-1], blend={"selector": blend, "recompute": 0.01}).usage
        assert usage.prompt == usage.exact + usage.reused + usage.recomputed + usage.computed
    for order in (context, context[::-1]):
        whole = mem.prefill("?", context=order, blend="all")
        assert torch.allclose(whole.logits, full_logits(model, whole), atol=1e-3)
    assert mem.ask("?", context=context, max_tokens=2).text is not None


def test_a_chunk_longer_than_the_window_is_an_error_that_changes_nothing(mem: KVMem) -> None:
    """Chunks given ready-made are not cut; one that can never fit says so."""
    giant = kvmem.Document("giant", "x" * 9000, {}, ("x" * 9000,))
    with pytest.raises(kvmem.PromptTooLongError, match="smaller chunks"):
        mem.ask("?", context=[giant])
    with pytest.raises(kvmem.EmptyInputError, match="nothing to answer from"):
        mem.ask("?", context=[])
    assert mem.list() == ()
    assert mem.stats().store.entries == 0


def test_a_same_length_edit_is_never_served_from_the_warm_buffer(mem: KVMem, model: LanguageModel) -> None:
    """After replacing a document by one with as many tokens, everything behind it is approximate, and so stored."""
    mem.add("The deposit is 100 euros, paid once.", id="a")
    mem.add(TEXTS[1], id="b")
    mem.add("The deposit is 275 euros, paid once.", id="a")
    mem.add(TEXTS[2], id="c")
    state = mem.prefill("How much is the deposit?", blend="none")
    assert state.usage.exact < state.usage.prompt - state.usage.computed
    whole = mem.prefill("How much is the deposit?", blend="all")
    assert torch.allclose(whole.logits, full_logits(model, whole), atol=1e-3)


def test_every_entry_called_exact_is_what_the_model_computes(mem: KVMem, model: LanguageModel) -> None:
    """After edits, reorderings and repeats, an exact prompt over the store alone gives full prefill's logits."""
    mem.add(TEXTS[0], id="a")
    mem.ask("Which?", context=TEXTS[::-1])
    mem.add(TEXTS[1], id="b")
    mem.add(TEXTS[0], id="copy")
    mem.add(TEXTS[2], id="c")
    state = mem.prefill("Which is for steam?")
    assert state.usage.exact == state.usage.prompt - state.usage.computed
    assert torch.allclose(state.logits, full_logits(model, state), atol=1e-3)


def test_sampling_defaults_of_a_checkpoint_do_not_leak_in(mem: KVMem) -> None:
    """Greedy is greedy, whatever the model's generation_config says; afterwards it says it still."""
    mem.add(TEXTS[0])
    before = mem.ask("What is due?", max_tokens=20).text
    config = mem.model.hf.generation_config
    config.repetition_penalty, config.do_sample, config.top_k = 5.0, True, 3
    try:
        assert mem.ask("What is due?", max_tokens=20).text == before
        assert mem.model.hf.generation_config is config
        assert mem.ask("What is due?", max_tokens=20, repetition_penalty=5.0).text != before
    finally:
        config.repetition_penalty, config.do_sample, config.top_k = None, False, None


def test_new_entries_are_kept_when_generation_fails(mem: KVMem) -> None:
    """A typo in an argument of generate is an error, and what was read stays read."""
    with pytest.raises(kvmem.InputError, match="typo"):
        mem.ask("What?", context=TEXTS, generate_kwargs={"typo": 1})
    assert mem.ask("What?", context=TEXTS).usage.computed < 60


def test_what_failed_before_the_repair_is_never_called_exact(mem: KVMem, model: LanguageModel) -> None:
    """A refused argument leaves approximate rows approximate, in the store and in the warm buffer."""
    mem.prefill("Which?", context=TEXTS)
    with pytest.raises(kvmem.InputError):
        mem.ask("Which?", context=TEXTS[::-1], blend="all", generate_kwargs={"no_such_argument": 1})
    again = mem.prefill("Which?", context=TEXTS[::-1], blend="none")
    assert again.usage.reused > 100
    whole = mem.prefill("Which?", context=TEXTS[::-1], blend="all")
    assert torch.allclose(whole.logits, full_logits(model, whole), atol=1e-3)


def test_two_engines_of_one_model_never_wait_for_each_other(model: LanguageModel, tmp_path: Path) -> None:
    """A retriever that asks another engine of the same model gets an error instead of a deadlock."""
    with open_mem(model, tmp_path / "one") as inner:
        inner.add(TEXTS[0])

        class Asking:
            def score(self, question: str, chunks: Any) -> list[float]:
                return [float(len(inner.retrieve(question, 1)))] * len(chunks)

        outer = open_mem(model, tmp_path / "two", retriever=Asking())
        with outer, pytest.raises(kvmem.InputError, match="same model"):
            outer.ask("Which?", context=[TEXTS[1] * 60])


def test_calling_back_into_the_engine_is_an_error_not_a_deadlock(mem: KVMem) -> None:
    """A context generator that asks gets told."""

    def context() -> Iterator[str]:
        yield mem.ask("What?", context=["text"]).text

    with pytest.raises(kvmem.InputError, match="inside its own work"):
        mem.ask("What?", context=context())
    assert mem.ask("What?", context=TEXTS).usage.generated > 0


def test_a_document_that_cannot_be_read_leaves_the_corpus_as_it_was(mem: KVMem) -> None:
    """A chunk longer than the window is an error; neither a new document nor a replacement stays behind."""
    mem.add(TEXTS[0], id="a")
    huge = "word " * 3000
    for name in ("a", "b"):
        with pytest.raises(kvmem.PromptTooLongError, match="smaller chunks"):
            mem.add(kvmem.Document(name, huge, {}, (huge,)))
    assert [document.id for document in mem.list()] == ["a"]
    assert mem.get("a").text == TEXTS[0]


def test_closing_cancels_what_runs_and_what_waits(model: LanguageModel) -> None:
    """close() returns soon; a waiting answer raises ClosedError."""
    mem = open_mem(model, None)
    running = mem.stream("What?", context=TEXTS, max_tokens=3000)
    waiting = mem.stream("What?", context=TEXTS, max_tokens=3000)
    next(running)
    mem.close()
    assert running.answer.finish_reason == "cancelled"
    with pytest.raises(kvmem.ClosedError):
        _ = waiting.answer


def test_what_is_asked_while_closing_is_ended_too(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """close() waits for whatever is being submitted, and then cancels it."""
    mem = open_mem(model, None)
    submitting, real = threading.Event(), ThreadPoolExecutor.submit

    def slowly(*args: Any, **options: Any) -> Any:
        submitting.set()
        time.sleep(0.2)
        return real(*args, **options)

    ended: list[Any] = []

    def ask() -> None:
        try:
            ended.append(mem.ask("What?", context=TEXTS, max_tokens=3000).finish_reason)
        except kvmem.ClosedError as error:
            ended.append(error)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", slowly)
    asking = threading.Thread(target=ask)
    asking.start()
    assert submitting.wait(20)
    mem.close()
    asking.join(20)
    assert len(ended) == 1
    assert ended[0] == "cancelled" or isinstance(ended[0], kvmem.ClosedError)


LONG = "The boat goes to the island and comes back in the evening. " * 20
READING = {
    "add": lambda mem: mem.add(LONG, id="b", cancellation=Cancellation()),
    "add_all": lambda mem: mem.add_all([LONG]),
    "update": lambda mem: mem.update("a", LONG),
    "read": lambda mem: mem.read([LONG]),
    "prefill": lambda mem: mem.prefill("What?", context=[LONG]),
    "one question": lambda mem: mem.batch(["What?"], context=[LONG]),
    "two questions": lambda mem: mem.batch(["What?", "Why?"], context=[LONG]),
}


@pytest.mark.parametrize("name", READING)
def test_closing_ends_whatever_reads_and_tells_whoever_waits(
    name: str, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two layers, by a ClosedError; what was not begun ends by one too."""
    mem = open_mem(model, None)
    mem.add(TEXTS[0], id="a")
    reading, closing = threading.Event(), threading.Event()
    real = type(model.hf.base_model).forward
    submit, submitted = ThreadPoolExecutor.submit, threading.Semaphore(0)

    def held(self: Any, *args: Any, **options: Any) -> Any:
        reading.set()
        assert closing.wait(20)
        return real(self, *args, **options)

    def noted(*args: Any, **options: Any) -> Any:
        future = submit(*args, **options)
        submitted.release()
        return future

    monkeypatch.setattr(type(model.hf.base_model), "forward", held)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    errors: list[BaseException | None] = [None, None]

    def attempt(place: int, work: Any) -> None:
        try:
            work(mem)
        except BaseException as error:
            errors[place] = error

    first = threading.Thread(target=attempt, args=(0, READING[name]))
    first.start()
    assert reading.wait(20)
    second = threading.Thread(target=attempt, args=(1, lambda mem: mem.plan("What?")))
    second.start()
    assert all(submitted.acquire(timeout=20) for _ in range(2))
    closer = threading.Thread(target=mem.close)
    closer.start()
    while not mem.closed:
        time.sleep(0.001)
    closing.set()
    for thread in (first, second, closer):
        thread.join(20)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [kvmem.ClosedError, kvmem.ClosedError]


def test_a_store_that_was_handed_in_stays_open(model: LanguageModel) -> None:
    """Closing one user of a shared store does not empty it for the others."""
    store = MemoryStore()
    with open_mem(model, store, namespace="a") as mem:
        mem.add(TEXTS[0])
    assert store.stats().entries == 3


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}])
def test_a_model_that_cannot_be_blended_reuses_exactly_and_says_why(
    rope: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2 and dynamic NTK: same order, exact; another order, read anew. Always the logits of full prefill."""
    for model in (tiny_model("gpt2", n_positions=2048), tiny_model("llama", rope_parameters=rope)):
        assert not model.blendable
        caplog.clear()
        assert "position" in model.anatomy.reason
        with open_mem(model, tmp_path / model.name) as mem:
            assert model.anatomy.reason in caplog.text
            mem.prefill("Which?", context=TEXTS)
            again = mem.prefill("Which?", context=TEXTS)
            assert again.usage.exact > 200
            moved = mem.prefill("Which?", context=TEXTS[::-1])
            assert (moved.usage.reused, moved.usage.recomputed) == (0, 0)
            for state in (again, moved):
                assert torch.allclose(state.logits, full_logits(model, state), atol=1e-3)


def test_a_model_with_full_attention_in_its_first_layers_only_is_scored_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`query` finds layers to observe wherever the full-attention layers are."""
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=32, max_window_layers=2)
    assert {g.window for g in model.anatomy.groups} == {None, 32}
    seen: list[float] = []
    query = select.SELECTORS["query"]

    def observed(candidates: select.Candidates, budget: int, settings: BlendSettings) -> torch.Tensor:
        seen.append(float(candidates.attention().sum()))
        return query(candidates, budget, settings)

    monkeypatch.setitem(select.SELECTORS, "query", observed)
    with open_mem(model, None) as mem:
        mem.prefill("Which?", context=TEXTS)
        mem.prefill("Which?", context=TEXTS[::-1])
    # One full-attention layer is scored, and the attention of a layer adds up to one.
    assert seen == [pytest.approx(1.0, abs=1e-4)]


async def test_an_answer_that_takes_too_long_is_an_error_and_ends(mem: KVMem, model: LanguageModel) -> None:
    """In every way of waiting; afterwards the engine is free."""
    with turns_of(model).lock:
        with pytest.raises(AnswerTimeoutError, match=r"0\.05 seconds"):
            mem.ask("Why?", context=TEXTS, timeout=0.05)
        with pytest.raises(TimeoutError):
            list(mem.stream("Why?", context=TEXTS, timeout=0.05))
        with pytest.raises(AnswerTimeoutError):
            await mem.stream_chat([{"role": "user", "content": "Why?"}], timeout=0.05).wait()
        stream = mem.stream("Why?", context=TEXTS, timeout=0.05)
        with pytest.raises(AnswerTimeoutError):
            await stream.wait_for_sources()
        with pytest.raises(AnswerTimeoutError):
            async for _ in mem.stream("Why?", context=TEXTS, timeout=0.05):
                pass
    assert mem.ask("Why?", context=TEXTS, timeout=60).text
    with pytest.raises(InputError, match="positive number of seconds"):
        mem.ask("Why?", context=TEXTS, timeout=0)


def test_the_plan_of_a_question_is_told_without_running_the_model(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the plan that `ask` then follows."""
    mem.add_all(TEXTS)
    asked = mem.ask("Why?").plan
    monkeypatch.setattr(type(mem.model), "_run", lambda *_: pytest.fail("the model ran"))
    assert mem.plan("Why?") == asked
    with pytest.raises(InputError, match="empty"):
        mem.plan(" ")


def test_sources_that_were_retrieved_can_be_the_context(mem: KVMem) -> None:
    """They are the corpus's own chunks: nothing of them is read again, and one that is gone is an error."""
    mem.add("# Rent\n\nThe rent is due on Monday. It is paid by the tenant in advance.", id="rent")
    mem.add("# Pets\n\nPets are allowed if they are quiet and small.", id="pets")
    sources = mem.retrieve("Are pets allowed?", 1)
    assert [source.document_id for source in sources] == ["pets"]
    answer = mem.ask("Are pets allowed?", context=sources)
    assert [source.text for source in answer.sources] == [source.text for source in sources]
    assert answer.usage.reused + answer.usage.recomputed > 0
    question = len(mem.prefill("Are pets allowed?", context=sources).token_ids)
    assert answer.usage.prompt == question
    again = mem.ask("Are pets allowed?", context=answer.sources)
    assert again.usage.reused + again.usage.recomputed == answer.usage.reused + answer.usage.recomputed
    mem.update("pets", "Cats are not allowed.")
    with pytest.raises(InputError, match="no longer in the corpus"):
        mem.ask("Are pets allowed?", context=sources)


def test_a_named_model_takes_no_other_tokenizer(saved_model: str, model: LanguageModel) -> None:
    """It would be ignored otherwise."""
    for tokenizer in (model.tokenizer, saved_model):
        with pytest.raises(InputError, match="a tokenizer of its own"):
            KVMem(saved_model, tokenizer=tokenizer)


def test_caches_are_loaded_beside_the_model(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose caches are in the store has them copied by a thread that runs no model."""
    store, context = MemoryStore(), ["The rent is due on the first of the month. " * 4]
    with KVMem(model, store) as mem:
        cold = mem.prefill("When?", context=context)
    threads: set[str] = set()
    settle = BlendedLayer.settle

    def watched(layer: BlendedLayer) -> None:
        threads.add(threading.current_thread().name)
        settle(layer)

    monkeypatch.setattr(BlendedLayer, "settle", watched)
    with KVMem(model, store) as mem:
        warm = mem.prefill("When?", context=context)
    for thread in threading.enumerate():
        if thread.name == "kvmem-load":
            thread.join()
    assert "kvmem-load" in threads
    assert torch.allclose(warm.logits, cold.logits, atol=1e-4)


def test_a_forked_child_is_told_to_open_its_own(model: LanguageModel) -> None:
    """Instead of waiting forever for a thread that it does not have."""
    with KVMem(model, None, max_tokens=2) as mem:
        mem.add("The rent is due.")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            calls: list[Callable[[], Any]] = [
                lambda: mem.ask("When?"),
                lambda: next(mem.stream("When?")),
                lambda: mem.add("The rent is due."),
                mem.list,
            ]
            told = []
            for call in calls:
                try:
                    call()
                except ClosedError as error:
                    told.append("fork" in str(error))
            mem.close()
            os.write(writing, bytes(told))
            os._exit(0)
        os.close(writing)
        assert os.read(reading, 10) == bytes([1, 1, 1, 1])
        os.close(reading)
        assert os.waitpid(child, 0)[1] == 0
        assert mem.ask("When?").text is not None


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("bad shapes")])
def test_a_failure_of_the_model_is_not_blamed_on_the_question(mem: KVMem, error: Exception, monkeypatch: Any) -> None:
    """It is a ModelError that names it; an argument that generate refuses is an InputError."""
    mem.add("The rent is due.")
    with pytest.raises(InputError, match="generate rejected"):
        mem.ask("When?", generate_kwargs={"no_such_argument": 1})

    def fails(*_: Any, **__: Any) -> Any:
        raise error

    assert mem.local_model is not None
    monkeypatch.setattr(mem.local_model.hf, "generate", fails)
    with pytest.raises(ModelError, match=str(error)):
        mem.ask("When?")


def test_unknown_options_are_named_wherever_they_are_given(mem: KVMem) -> None:
    """Also where nothing is generated, and then the message does not advise generate_kwargs."""
    mem.add("The tenant pays the rent.", id="lease")
    for call in (mem.ask, mem.plan, mem.prefill, mem.build_prompt):
        with pytest.raises(InputError, match="'document' is not an option") as caught:
            call("Who pays?", document=["lease"])  # type: ignore[operator]
        assert ("generate_kwargs" in str(caught.value)) == (call == mem.ask)
    with pytest.raises(InputError, match="'context' is not an option"):
        mem.complete("Who", context=["The tenant."])  # type: ignore[call-arg]


def test_a_batch_refuses_a_single_text_as_context(mem: KVMem) -> None:
    """An empty one, too."""
    for text in ("The tenant pays.", ""):
        with pytest.raises(InputError, match="context is a single str"):
            mem.batch(["Who pays?"], context=text)


def test_exactness_comes_back_when_an_entry_is_lost(tmp_path: Path) -> None:
    """A chunk whose tokens are known from another context is read in place again, a chunk with each question."""
    model = tiny_model()
    texts = [f"Number {n} of the lease: the tenant of house {n} pays {n * 300} euros. " * 2 for n in range(4)]
    with open_mem(model, tmp_path / "kv", system="S.") as mem:
        mem.ask("Who?", context=texts[::-1])
        mem.add_all([kvmem.Document(str(n), text) for n, text in enumerate(texts)])
        exact = mem.prefill("Who?")
        known = list(mem.store.keys())
        lost = [key for key in known if (entry := mem.store.get(key)) is not None and entry.start > 150]
        for key in lost:
            mem.store.delete(key)
    with open_mem(model, tmp_path / "kv", system="S.") as mem:
        assert mem.prefill("Who?").usage.reused > 0
        asked = [mem.ask("Who?").usage for _ in range(5)]
        healed = mem.prefill("Who?")
        # A prompt that is asked once is not worth it: its answers do not depend on what was asked before.
        moved = [mem.ask("Who?", context=texts[::-1], blend={"recompute": 0.5}).usage.exact for _ in range(3)]
    assert healed.usage.reused == healed.usage.recomputed == 0
    assert (healed.logits - exact.logits).abs().max() < 1e-5
    assert [usage.exact for usage in asked] == sorted(usage.exact for usage in asked)
    assert len(set(moved)) == 1
