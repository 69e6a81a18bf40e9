"""LlamaIndex's Memory with a block that survives restarts: python examples/llama_index_memory.py

The second half runs in a new process that shares only the store directory.
"""

import asyncio
import subprocess
import sys
import tempfile

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.memory import Memory as LlamaMemory

from kvmem import KVMem, Memory
from llama_index_kvmem import KVMemLLM, KVMemMemoryBlock


async def run(store: str, texts: list[str]) -> None:
    with KVMem("smollm2", store, system="You are a helpful assistant.") as mem:
        llm = KVMemLLM(mem=mem, max_new_tokens=32)
        kept = Memory(mem)
        block = KVMemMemoryBlock(kept, k=3)
        memory = LlamaMemory.from_defaults(
            token_limit=2000,
            memory_blocks=[block],
            tokenizer_fn=lambda text: list(mem.model.tokenize(text, markup=False)),
        )
        for text in texts:
            await memory.aput(ChatMessage(role="user", content=text))
            response = await llm.achat(await memory.aget())
            await memory.aput(response.message)
            usage = response.raw["usage"]
            print(f"> {text}\n{response.message.content}")
            print(f"  {usage['computed'] + usage['recomputed']} tokens computed\n")
        await block.aput(await memory.aget_all())
        print("Remembered:", [item.text for item in kept.list()])


if len(sys.argv) > 1:
    asyncio.run(run(sys.argv[1], ["What should I not put into my bread?"]))
else:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(directory, ["My name is Anna and I bake bread.", "I am allergic to walnuts."]))
        subprocess.run([sys.executable, __file__, directory], check=True)  # noqa: S603
