"""Compares RAG pipelines in LangChain and LlamaIndex with their Hugging Face models and with kvmem."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table

from benchmarks.common import Question
from kvmem.engine import KVMem
from kvmem.errors import KVMemError
from kvmem.measure import describe, track
from kvmem.model.local import LanguageModel
from kvmem.text.document import Document

Ask = Callable[[str], Iterator[str]]
_SYSTEM = "Answer briefly from the context."


def run(
    model: LanguageModel, questions: Sequence[Question], *, k: int = 4, passes: int = 2, tokens: int = 24
) -> dict[str, Any]:
    """Ask every question with every pipeline, `passes` times. All retrieve the same `k` passages by BM25.

    The corpus is the passages of all questions. Each kvmem pipeline starts with its own empty store on disk.
    Requires langchain-huggingface and llama-index-llms-huggingface.
    """
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(TemporaryDirectory()))
        corpus = opened.enter_context(KVMem(model))
        mems = [opened.enter_context(KVMem(model, scratch / str(number))) for number in range(3)]
        texts = dict.fromkeys(text for question in questions for text in question.passages)
        corpus.add_all((Document(str(number), text, {}, (text,)) for number, text in enumerate(texts)), read=False)
        pipelines = {
            **_langchain(model, corpus, mems[0], k, tokens),
            **_llama_index(model, corpus, mems[1:], k, tokens),
        }
        rows = []
        jobs = [(number, question) for number in range(passes) for question in questions]
        for number, question in track(jobs, "frameworks"):
            for name, ask in pipelines.items():
                rows.append({"pipeline": name, "pass": number + 1, **_time(ask, question.question)})
    summary = [
        {
            "pipeline": name,
            "pass": number + 1,
            **{
                key: median(r[key] for r in rows if (r["pipeline"], r["pass"]) == (name, number + 1))
                for key in ("first", "answer")
            },
        }
        for name in pipelines
        for number in range(passes)
    ]
    settings = {"k": k, "passes": passes, "tokens": tokens, "questions": len(questions), "passages": len(texts)}
    return {"benchmark": "frameworks", **describe(model, **settings), "summary": summary, "rows": rows}


def _time(ask: Ask, question: str) -> dict[str, Any]:
    began = time.perf_counter()
    first, text = 0.0, ""
    for piece in ask(question):
        first = first or (time.perf_counter() - began if piece else 0.0)
        text += piece
    return {"first": first, "answer": time.perf_counter() - began, "text": text}


def _langchain(model: LanguageModel, corpus: KVMem, mem: KVMem, k: int, tokens: int) -> dict[str, Ask]:
    try:
        from langchain_core.output_parsers import StrOutputParser
        from langchain_core.prompts import ChatPromptTemplate
        from langchain_core.runnables import RunnablePassthrough
        from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
        from transformers import pipeline

        from langchain_kvmem import ChatKVMem, KVMemRetriever
    except ImportError as error:
        raise KVMemError(f"{error}. Run: pip install langchain-kvmem langchain-huggingface") from error
    generator = pipeline(
        "text-generation", model=model.hf, tokenizer=model.tokenizer, max_new_tokens=tokens, do_sample=False
    )
    theirs = ChatHuggingFace(
        llm=HuggingFacePipeline(pipeline=generator), tokenizer=model.tokenizer, model_id=model.name
    )
    retriever = KVMemRetriever(mem=corpus, k=k)
    prompt = ChatPromptTemplate.from_messages(
        [("system", _SYSTEM), ("human", "{context}\n\nQuestion: {question}")],
    )

    def context(question: str) -> str:
        return "\n\n".join(document.page_content for document in retriever.invoke(question))

    def chain(llm: Any) -> Ask:
        parts = {"context": context, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()
        return parts.stream  # type: ignore[no-any-return]

    return {
        "LangChain, ChatHuggingFace": chain(theirs),
        "LangChain, ChatKVMem": chain(ChatKVMem(mem=mem, max_tokens=tokens)),
    }


def _streamed(engine: Any) -> Ask:
    """A LlamaIndex query engine as a function that yields the pieces of its answer."""

    def ask(question: str) -> Iterator[str]:
        response = engine.query(question)
        if not hasattr(response, "response_gen"):
            raise KVMemError(f"The query engine did not stream its response: {response}. Check streaming=True.")
        yield from response.response_gen

    return ask


def _llama_index(model: LanguageModel, corpus: KVMem, mems: Sequence[KVMem], k: int, tokens: int) -> dict[str, Ask]:
    try:
        from llama_index.core.query_engine import RetrieverQueryEngine
        from llama_index.core.retrievers import BaseRetriever
        from llama_index.llms.huggingface import HuggingFaceLLM

        from llama_index_kvmem import KVMemLLM, KVMemQueryEngine, to_nodes
    except ImportError as error:
        raise KVMemError(f"{error}. Run: pip install llama-index-kvmem llama-index-llms-huggingface") from error

    class Retriever(BaseRetriever):
        def _retrieve(self, query_bundle: Any) -> Any:
            return to_nodes(corpus.retrieve(query_bundle.query_str, k))

    def to_prompt(messages: Any) -> str:
        return model.render([{"role": m.role.value, "content": m.content} for m in messages])

    theirs = HuggingFaceLLM(
        model=model.hf,
        tokenizer=model.tokenizer,
        max_new_tokens=tokens,
        context_window=model.window,
        is_chat_model=True,
        messages_to_prompt=to_prompt,
        tokenizer_kwargs={"add_special_tokens": False},
        generate_kwargs={"do_sample": False},
    )

    ours = KVMemLLM(mem=mems[0], max_new_tokens=tokens)
    retriever = Retriever()
    options: dict[str, Any] = {"streaming": True}
    return {
        "LlamaIndex, HuggingFaceLLM": _streamed(RetrieverQueryEngine.from_args(retriever, llm=theirs, **options)),
        "LlamaIndex, KVMemLLM": _streamed(RetrieverQueryEngine.from_args(retriever, llm=ours, **options)),
        "LlamaIndex, KVMemQueryEngine": _streamed(
            KVMemQueryEngine.from_args(retriever, mems[1], max_tokens=tokens, **options)
        ),
    }


def table(result: dict[str, Any]) -> Table:
    """The medians as a terminal table."""
    settings = result["settings"]
    title = (
        f"{result['model']}: {settings['questions']} questions, top {settings['k']} of {settings['passages']} passages"
    )
    shown = Table("", "pass", "first token", "answer", title=title)
    for row in result["summary"]:
        shown.add_row(row["pipeline"], str(row["pass"]), f"{row['first']:.2f} s", f"{row['answer']:.2f} s")
    return shown
