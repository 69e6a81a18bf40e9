"""A LangChain chain over your own text files: python examples/langchain_chain.py [FILE ...]"""

import sys
import tempfile
from pathlib import Path

from langchain_core.documents import Document

from langchain_kvmem import CachedContextChain

default = [Path(__file__).parent / "documents" / "lease.md"]
paths = [Path(name) for name in sys.argv[1:]] or default
documents = [Document(page_content=path.read_text(), metadata={"source": path.name}) for path in paths]

with tempfile.TemporaryDirectory() as store:
    chain = CachedContextChain.from_documents(documents, "smollm2", store=store, max_tokens=48)
    for question in ("What is the Base Rent a year?", "How long does the lease run?"):
        print(f"\n{question}")
        for chunk in chain.stream({"input": question}):
            print(chunk.get("answer", ""), end="", flush=True)
    result = chain.invoke({"input": "Who is the Tenant?"})
    print("\n\nWho is the Tenant?\n" + result["answer"])
    print("Sources:", sorted({document.metadata["source"] for document in result["context"]}))
    chain.mem.close()
