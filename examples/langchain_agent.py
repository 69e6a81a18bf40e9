"""A LangChain agent that remembers its user across restarts: python examples/langchain_agent.py

The second half runs in a new process that shares only the store directory.
"""

import subprocess
import sys
import tempfile

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage

from kvmem import KVMem, Memory
from langchain_kvmem import ChatKVMem, KVMemMiddleware

SAYINGS = ["My name is Anna and I am a baker in Port Ellery.", "I am allergic to walnuts."]


def run(store: str, texts: list[str]) -> None:
    with KVMem("smollm2", store, system="You are a helpful assistant.") as mem:
        memory = Memory(mem)
        agent = create_agent(ChatKVMem(mem=mem, max_tokens=32), middleware=[KVMemMiddleware(memory, k=3)])
        for text in texts:
            message = agent.invoke({"messages": [HumanMessage(text)]})["messages"][-1]
            usage = message.response_metadata["usage"]
            print(f"> {text}\n{message.content}\n  {usage['computed'] + usage['recomputed']} tokens computed\n")
        print("Remembered:", [item.text for item in memory.list()])


if len(sys.argv) > 1:
    run(sys.argv[1], ["What should I not put into my bread?"])
else:
    with tempfile.TemporaryDirectory() as directory:
        run(directory, SAYINGS)
        subprocess.run([sys.executable, __file__, directory], check=True)  # noqa: S603
