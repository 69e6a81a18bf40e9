"""A LlamaIndex query engine over your own text files: python examples/llama_index_engine.py [FILE ...]"""

import sys
import tempfile
from pathlib import Path

from llama_index.core import Document

from llama_index_kvmem import KVMemQueryEngine

default = [Path(__file__).parent / "documents" / "oncall-runbook.md"]
paths = [Path(name) for name in sys.argv[1:]] or default
documents = [Document(text=path.read_text(), metadata={"source": path.name}, id_=path.name) for path in paths]

with tempfile.TemporaryDirectory() as store:
    engine = KVMemQueryEngine.from_documents(documents, "smollm2", store=store, max_tokens=48)
    for question in ("Who last reviewed the runbook?", "Who is the head of platform?"):
        response = engine.query(question)
        print(f"\n{question}\n{response}")
        usage = response.metadata["usage"]
        print(f"{usage['exact']} of {usage['prompt']} prompt tokens were exact cache hits")
    engine.mem.close()
