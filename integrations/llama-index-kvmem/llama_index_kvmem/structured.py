"""Objects from JSON that grows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

from llama_index.core.bridge.pydantic import BaseModel, ValidationError
from llama_index.core.llms.function_calling import FunctionCallingLLM
from pydantic_core import from_json


class StructuredStreams(FunctionCallingLLM):
    """Streams objects while their JSON is written."""

    def _structured_stream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        """Objects as they grow, each of them valid; the answer follows the schema token by token."""
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        seen: Any = None
        text = ""
        schema = output_cls.model_json_schema()
        for response in self.stream_chat(messages, schema=schema, **(llm_kwargs or {})):
            text = response.message.content or ""
            found = partial_object(output_cls, text)
            if found is not None and found != seen:
                seen = found
                yield found
        last = whole_object(output_cls, text)
        if last != seen:
            yield last

    async def _structured_astream_call(
        self, output_cls: type[Any], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        """Like `_structured_stream_call`."""
        messages = self._extend_messages(prompt.format_messages(llm=self, **prompt_args))
        schema = output_cls.model_json_schema()
        stream = await self.astream_chat(messages, schema=schema, **(llm_kwargs or {}))

        async def objects() -> AsyncGenerator[Any, None]:
            seen: Any = None
            text = ""
            async for response in stream:
                text = response.message.content or ""
                found = partial_object(output_cls, text)
                if found is not None and found != seen:
                    seen = found
                    yield found
            last = whole_object(output_cls, text)
            if last != seen:
                yield last

        return objects()


def partial_object(output_cls: type[BaseModel], text: str) -> BaseModel | None:
    """What JSON that is not complete yet says already, if that is a valid object."""
    try:
        return output_cls.model_validate(from_json(text, allow_partial="trailing-strings"))
    except (ValueError, ValidationError):
        return None


def whole_object(output_cls: type[BaseModel], text: str) -> BaseModel:
    try:
        return output_cls.model_validate_json(text)
    except ValueError as error:
        raise ValueError(
            f"The answer ends before its JSON is complete: {text[-200:]!r}. Raise max_new_tokens."
        ) from error
