"""LangChain components over kvmem."""

from langchain_kvmem.chain import CachedContextChain
from langchain_kvmem.chat_model import ChatKVMem
from langchain_kvmem.convert import to_documents
from langchain_kvmem.retriever import KVMemRetriever

__all__ = ["CachedContextChain", "ChatKVMem", "KVMemRetriever", "to_documents"]
