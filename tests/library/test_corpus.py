from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import FACTS, embed, facts_corpus, open_mem
from langchain_core.documents import Document as LangChainDocument

from kvmem import Document, EmptyInputError, HybridRetriever, InputError, KVMem, LanguageModel, UnknownDocumentError
from kvmem.kv.entry import digest_tokens
from kvmem.prompt.layout import standing
from kvmem.prompt.span import Span
from kvmem.testing import tiny_model
from kvmem.text.document import Chunk

LINES = [
    f"Line {n} of the log says that pump {n * 37 % 101} ran for {n * 13 % 59} minutes and stopped." for n in range(95)
]


@pytest.mark.parametrize("edit", ["insert", "delete", "change"])
@pytest.mark.parametrize("place", [0, len(LINES) // 2, len(LINES) - 1])
def test_an_edit_of_one_line_reads_two_chunks_at_most(tmp_path: Path, edit: str, place: int) -> None:
    """In a document of more than 6,000 tokens; superseded entries are gone from disk."""
    model = tiny_model(max_position_embeddings=8192)
    split = {"minimum": 128, "target": 320, "maximum": 512}
    with open_mem(model, tmp_path / "kv", split=split) as mem:
        before = mem.add("\n".join(LINES), id="log")
        assert mem.stats().tokens > 6000
        lines = list(LINES)
        if edit == "insert":
            lines.insert(place, "A new line says that pump 4711 never ran.")
        elif edit == "delete":
            del lines[place]
        else:
            lines[place] = lines[place].replace("stopped", "went on")
        after = mem.update("log", "\n".join(lines))
        changed = set(after.chunks) - set(before.chunks)
        assert 1 <= len(changed) <= 2
        asked = mem.ask("Which pump?", max_tokens=1)
        prompt = sum(model.count_tokens(chunk) + 2 for chunk in changed) + 400
        assert asked.usage.reused + asked.usage.exact + asked.usage.recomputed > asked.usage.prompt - prompt
        assert "\n".join(lines) == "".join(source.text for source in asked.sources)
        kept = {digest for key in mem.store.keys() for digest in [key.tokens]}  # noqa: SIM118
        gone = set(before.chunks) - set(after.chunks)
        assert gone
        for chunk in gone:
            assert digest_tokens(model.tokenize(standing(chunk), markup=False)) not in kept


def test_adding_again_what_is_there_runs_nothing(mem: KVMem, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one or all at once, also after a restart; a changed one is read."""
    added = mem.add_all(["The ferry leaves at nine.", "The tram leaves at ten."])
    monkeypatch.setattr(type(mem.model), "_run", lambda *_: pytest.fail("the model ran"))
    assert mem.add_all(document.text for document in added) == added
    assert mem.add("The tram leaves at ten.") == added[1]


def test_many_documents_are_looked_at_before_any_is_added(mem: KVMem) -> None:
    """A bad one, or two of one id, leave the corpus as it was; progress is told for each."""
    with pytest.raises(EmptyInputError):
        mem.add_all(["good", "  "])
    with pytest.raises(InputError, match="Two different documents have the id 'a'"):
        mem.add_all([Document("a", "one"), Document("a", "two")])
    with pytest.raises(InputError, match="Give a list"):
        mem.add_all("one text")
    assert mem.list() == ()
    told: list[tuple[str, int, int]] = []
    mem.add_all(
        [Document("a", "one"), Document("b", "two"), Document("a", "one")], lambda d, n, of: told.append((d.id, n, of))
    )
    assert told == [("a", 1, 2), ("b", 2, 2)]


def test_what_was_interrupted_goes_on_where_it_stopped(model: LanguageModel, tmp_path: Path) -> None:
    """A batch that dies in the middle keeps what was added, and the next run reads only the rest."""
    texts = [f"Document {n} is about the number {n}." for n in range(6)]

    def die(document: Document, number: int, total: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with open_mem(model, tmp_path / "kv") as mem, pytest.raises(KeyboardInterrupt):
        mem.add_all(texts, die)
    with open_mem(model, tmp_path / "kv") as mem:
        assert 3 <= len(mem.list()) <= 6
        mem.add_all(texts)
        assert [document.text for document in mem.list()] == texts


def test_only_what_is_there_is_updated(mem: KVMem) -> None:
    """An unknown id is an error that says so, and adds nothing; a new text keeps the metadata."""
    for document in ("text", Document("x", "text")):
        with pytest.raises(UnknownDocumentError):
            mem.update("x", document)
    assert mem.list() == ()
    mem.add("one", id="x", metadata={"title": "X"})
    assert mem.update("x", "two").metadata == {"title": "X"}
    assert mem.update("x", "two", metadata={}).metadata == {}


@pytest.mark.parametrize("name", ["a/b\\c", "été\n", "'; DROP TABLE documents; --", '["default", "x"]', "💾" * 50])
def test_any_text_may_be_an_id(mem: KVMem, name: str) -> None:
    """Slashes, quotes, line ends and emoji name a document as any other text."""
    mem.add("The ferry leaves at nine.", id=name)
    assert mem.get(name).text == "The ferry leaves at nine."
    mem.remove(name)
    assert mem.list() == ()


def test_a_text_beyond_all_measure_is_refused_at_once(mem: KVMem) -> None:
    """Fifty megabytes are an error before anything is cut or read."""
    with pytest.raises(InputError, match="max_document_chars"):
        mem.add("word " * 10_000_000)
    assert mem.list() == ()


class Words:
    """A retriever of a user: counts the question's words."""

    def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
        asked = set(question.strip("?").split())
        return [float(len(asked & set(chunk.text.replace(".", "").split())) > 4) for chunk in chunks]


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_retriever_must_return_one_score_per_chunk(mem: KVMem, difference: int) -> None:
    """Too few or too many would rank the wrong texts."""

    class Wrong:
        def score(self, question: str, chunks: Sequence[Chunk]) -> list[float]:
            return [1.0] * (len(chunks) + difference)

    mem.add_all(facts_corpus(), read=False)
    with pytest.raises(InputError, match=r"Wrong\.score\(\) returned"):
        mem.retrieve("Who?", 2, retriever=Wrong())
    with pytest.raises(InputError, match="one score per chunk"):
        mem.ask("Who?", retriever=Wrong())


@pytest.mark.parametrize("retriever", [None, Words(), HybridRetriever(embed)], ids=["default", "own", "hybrid"])
def test_a_corpus_of_ten_windows_is_routed_or_retrieved_from(tmp_path: Path, retriever: Any) -> None:
    """50 questions on 40 documents: never too long, and the right document is nearly always in the prompt."""
    model = tiny_model(max_position_embeddings=4096)
    with open_mem(model, None, retriever=retriever, split={"minimum": 128, "target": 320, "maximum": 512}) as mem:
        for document in facts_corpus():
            mem.add(document, read=False)  # nothing is asked of the model, so nothing has to be read
        sizes = sum(model.count_tokens(chunk.heading + chunk.text) for chunk in mem.chunks())
        assert sizes > 10 * model.window
        found = 0
        draw = random.Random(1)
        for _ in range(50):
            name, _n = draw.choice(FACTS)
            question = f"How many people does {name} employ and when was {name} founded?"
            plan = mem.plan(question)
            assert plan.mode in ("route", "retrieve")
            assert plan.over > 0
            assert plan.prompt_tokens + 8 <= model.window
            chunks = mem.chunks()
            assert {chunks[i].document_id for i in plan.chunks}
            found += any(chunks[i].document_id == name and "employs" in chunks[i].text for i in plan.chunks)
        assert found >= 45


def test_a_routed_document_is_exact_and_in_front(tmp_path: Path) -> None:
    """A document that was read behind the prefix is an exact prefix when it is all that is taken."""
    model = tiny_model(max_position_embeddings=2048)
    documents = [Document(f"d{n}", f"Document {n}. " + f"Word{n} stands here, number {n}. " * 20) for n in range(8)]
    with open_mem(model, tmp_path / "kv", split={"minimum": 20, "maximum": 200}) as mem:
        mem.add_all(documents)
        plan = mem.plan("Where does Word5 stand?")
        assert plan.mode == "route"
        asked = mem.ask("Where does Word5 stand?", max_tokens=1)
        assert {source.document_id for source in asked.sources} == {"d5"}
        assert asked.usage.reused == asked.usage.recomputed == 0
        both = mem.ask("Where do Word5 and Word6 stand?", max_tokens=1)
        assert both.usage.exact > 400


def test_hybrid_takes_embedding_models_and_refuses_what_is_none() -> None:
    """LangChain's and LlamaIndex's interfaces; vectors of the wrong shape are an error."""

    class OfLangChain:
        embed_documents = staticmethod(embed)

        def embed_query(self, text: str) -> list[float]:
            return embed([text])[0]

    class OfLlamaIndex:
        get_text_embedding_batch = staticmethod(embed)
        get_query_embedding = OfLangChain.embed_query

    chunks = [Chunk(text, text, 0, {}) for text in ("cats sleep all day", "rent is due in May", "dogs bark")]
    for model in (embed, OfLangChain(), OfLlamaIndex()):
        scores = HybridRetriever(model).score("When is rent due?", chunks)
        assert scores.index(max(scores)) == 1
    with pytest.raises(InputError, match="does not embed"):
        HybridRetriever(object())
    with pytest.raises(InputError, match="one vector per text"):
        HybridRetriever(lambda texts: [1.0]).score("?", chunks)
    with pytest.raises(InputError, match="vector"):
        HybridRetriever(lambda texts: [[float("nan")] for _ in texts]).score("?", chunks)


def chunk_spans(mem: KVMem) -> list[Span]:
    prompt = mem.build_prompt("When?").prompt
    return [span for span in prompt.spans if span.document is not None]


def test_titles_and_headings_stand_before_a_chunk_in_the_prompt(model: LanguageModel, tmp_path: Path) -> None:
    """The model reads them, sources show the chunk alone, and a setting turns them off."""
    text = "# Rent\n\n" + "It is due on the first day. " * 4 + "\n\n" + "It is paid in advance. " * 4
    spans = {}
    for on in (True, False):
        with open_mem(model, None, split={"minimum": 20, "maximum": 120, "headings": on}) as mem:
            mem.add(text, id="lease", metadata={"title": "Harbour Road"})
            chunks = mem.chunks()
            assert "".join(chunk.text for chunk in chunks) == text
            spans[on] = [model.tokenizer.decode(span.token_ids) for span in chunk_spans(mem)]
            assert "".join(source.text for source in mem.ask("When?", max_tokens=1).sources) == text
    assert spans[True][1].startswith("Harbour Road > Rent\n\n")
    assert not spans[False][1].startswith("Harbour")


def test_searches_at_the_same_time_share_vectors() -> None:
    """One that ends while another waits for the embedding model takes nothing from it; no text is embedded twice."""
    embedded: list[str] = []
    chunks = [[Chunk(text, "d", 0, {})] for text in ("tea", "milk")]

    def slow(texts: list[str]) -> Any:
        embedded.extend(texts)
        if "tea" in texts:
            retriever.score("?", chunks[1])
        return embed(texts)

    retriever = HybridRetriever(slow)
    for _ in range(2):
        for some in chunks:
            assert len(retriever.score("?", some)) == 1
    assert sorted(text for text in embedded if text != "?") == ["milk", "tea"]


def test_one_text_with_different_metadata_is_several_documents(mem: KVMem) -> None:
    """The footer of every page; the same again costs nothing, and ids that were given still have to differ."""
    pages = [LangChainDocument("Page of a lease.", metadata={"page": n}) for n in (1, 2, 2)]
    added = mem.add_all(pages)
    assert [document.metadata["page"] for document in mem.list()] == [1, 2]
    assert mem.add_all(pages) == added
    with pytest.raises(InputError, match="Two different"):
        mem.add_all([Document("x", "one"), Document("x", "two")])
