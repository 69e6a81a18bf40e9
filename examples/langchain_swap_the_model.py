"""One RAG chain with two chat models: ChatHuggingFace and ChatKVMem, using the same weights.

python examples/langchain_swap_the_model.py [OUTPUT.json]    (the comparison needs langchain-huggingface)
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from kvmem import KVMem
from langchain_kvmem import ChatKVMem, KVMemRetriever

QUESTIONS = [
    "What is the Base Rent a year?",
    "How long does the lease run?",
    "How often is the machine descaled?",
    "Who acknowledges a page, and how fast?",
    "May the tenant sublet the premises?",
    "What does the steam boiler do?",
]
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer briefly from the context."), ("human", "{context}\n\nQuestion: {question}")]
)


def plain(model: object) -> BaseChatModel | None:
    """LangChain's own chat model over the same weights, if it is installed."""
    try:
        from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
        from transformers import pipeline
    except ImportError:
        return None
    generator = pipeline(
        "text-generation", model=model.hf, tokenizer=model.tokenizer, max_new_tokens=24, do_sample=False
    )
    return ChatHuggingFace(llm=HuggingFacePipeline(pipeline=generator), tokenizer=model.tokenizer, model_id=model.name)


with KVMem("smollm2") as corpus, KVMem(corpus.model) as mem:
    retriever = KVMemRetriever(mem=corpus, k=6)
    for path in sorted((Path(__file__).parent / "documents").glob("*.md")):
        corpus.add(Document(page_content=path.read_text(), metadata={"source": path.name}))

    def context(question: str) -> str:
        return "\n\n".join(document.page_content for document in retriever.invoke(question))

    rows = []
    for name, model in (("ChatHuggingFace", plain(corpus.model)), ("ChatKVMem", ChatKVMem(mem=mem, max_tokens=24))):
        if model is None:
            continue
        chain = {"context": context, "question": RunnablePassthrough()} | PROMPT | model | StrOutputParser()
        for turn in range(2):
            for question in QUESTIONS:
                began = time.perf_counter()
                pieces, first = [], 0.0
                for piece in chain.stream(question):
                    first = first or (time.perf_counter() - began if piece else 0.0)
                    pieces.append(piece)
                seconds = time.perf_counter() - began
                rows.append({"model": name, "pass": turn + 1, "question": question, "first": first, "answer": seconds})
        for turn in (1, 2):
            times = [row for row in rows if row["model"] == name and row["pass"] == turn]
            typical = {key: median(row[key] for row in times) for key in ("first", "answer")}
            first, answer = f"{typical['first']:.2f} s", f"{typical['answer']:.2f} s"
            print(f"{name:16} pass {turn}: median {first} to the first token, {answer} in total")

if len(sys.argv) > 1:
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n")
