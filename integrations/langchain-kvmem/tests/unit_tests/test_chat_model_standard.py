"""LangChain's own unit suite for chat models, inherited."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_kvmem import ChatKVMem


class TestChatKVMemUnit(ChatModelUnitTests):
    """Nothing is loaded: the engine opens with the first call."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatKVMem

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2"}
