"""KVMemLLM: a local LLM for LlamaIndex that does not compute the same text twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import (
    achat_to_completion_decorator,
    astream_chat_to_completion_decorator,
    chat_to_completion_decorator,
    stream_chat_to_completion_decorator,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.types import TokenAsyncGen
from pydantic_core import from_json

from kvmem import AnswerStream, KVMem
from kvmem.options import OPTION_NAMES
from llama_index_kvmem.base import BaseKVMemLLM
from llama_index_kvmem.convert import to_message, to_plain, without_memories
from llama_index_kvmem.prepared import PREPARED
from llama_index_kvmem.responses import Growing, to_completion, to_last, to_response

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool


class KVMemLLM(BaseKVMemLLM):
    """An LLM over `KVMem`: text it has seen, in any prompt and at any position, is not computed again.

    LLMs that name the same model, store and settings share one engine in a process; so do copies. Close it with
    `close()` or `with`. `raw` of a response has `usage`, `plan` and `timings`.

    Args:
        mem: an open engine to use instead of `model_name` and `store`; closing it is up to you.
        model: a loaded transformers model, then with `tokenizer`.
        tokenizer: of `model`.
        messages_to_prompt: renders messages as a prompt, instead of the model's chat template.
        completion_to_prompt: renders the prompt of a completion, instead of one message in the chat template.
        query_wrapper_prompt: a template with `{query_str}`, used like `completion_to_prompt`.
        is_chat_model: False for a base model: completions continue the prompt as it is.
        fields: see below. Arguments of a call (`max_tokens` or `max_new_tokens`, `temperature`, `top_p`, `stop`,
            `seed`, `context`, `schema` and other options of `KVMem.chat`) override them.

    Raises:
        InputError: for an argument that does not exist.

    Example:
        ```python
        from llama_index_kvmem import KVMemLLM

        llm = KVMemLLM(model_name="smollm2", store="./kv", max_new_tokens=32)
        print(llm.complete("What is the capital of France?"))
        ```
    """

    # Typed here, because pydantic derives a signature from the fields otherwise.
    def __init__(
        self,
        mem: KVMem | None = None,
        model: Any = None,
        tokenizer: Any = None,
        *,
        messages_to_prompt: Callable[[Sequence[ChatMessage]], str] | None = None,
        completion_to_prompt: Callable[[str], str] | None = None,
        query_wrapper_prompt: Any = None,
        **fields: Any,
    ) -> None:
        super().__init__(
            mem,
            model,
            tokenizer,
            messages_to_prompt=messages_to_prompt,
            completion_to_prompt=completion_to_prompt,
            query_wrapper_prompt=query_wrapper_prompt,
            **fields,
        )

    # LlamaIndex asks for the metadata before it awaits anything, and they need the engine.

    async def apredict(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        await self._ready()
        answer: str = await super().apredict(prompt, **prompt_args)
        return answer

    async def astream(self, prompt: BasePromptTemplate, **prompt_args: Any) -> TokenAsyncGen:
        await self._ready()
        return await super().astream(prompt, **prompt_args)

    # Chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._chat(messages, **kwargs)

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return to_response(self._open(messages, kwargs).answer)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await self._achat(messages, **kwargs)

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await self._ready()
        return to_response(await self._open(messages, kwargs).wait())

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._stream_chat(messages, **kwargs)

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        stream = self._open(messages, kwargs)

        def pieces() -> ChatResponseGen:
            growing = Growing()
            with stream:
                for part in stream.parts:
                    yield growing.add(part)
                yield to_last(stream.answer)

        return pieces()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return await self._astream_chat(messages, **kwargs)

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        await self._ready()
        stream = self._open(messages, kwargs)

        async def pieces() -> ChatResponseAsyncGen:
            growing = Growing()
            with stream:
                async for part in stream.parts:
                    yield growing.add(part)
                yield to_last(await stream.wait())

        return pieces()

    # Completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        if (raw := self._raw_prompt(prompt, formatted)) is not None:
            return to_completion(to_response(self._complete(raw, kwargs).answer))
        return chat_to_completion_decorator(self._chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        await self._ready()
        if (raw := self._raw_prompt(prompt, formatted)) is not None:
            return to_completion(to_response(await self._complete(raw, kwargs).wait()))
        return await achat_to_completion_decorator(self._achat)(prompt, **kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        if (raw := self._raw_prompt(prompt, formatted)) is None:
            return stream_chat_to_completion_decorator(self._stream_chat)(prompt, **kwargs)
        stream = self._complete(raw, kwargs)

        def pieces() -> CompletionResponseGen:
            text = ""
            with stream:
                for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield to_completion(to_last(stream.answer))

        return pieces()

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        await self._ready()
        if (raw := self._raw_prompt(prompt, formatted)) is None:
            return await astream_chat_to_completion_decorator(self._astream_chat)(prompt, **kwargs)
        stream = self._complete(raw, kwargs)

        async def pieces() -> CompletionResponseAsyncGen:
            text = ""
            with stream:
                async for piece in stream:
                    text += piece
                    yield CompletionResponse(text=text, delta=piece)
                yield to_completion(to_last(await stream.wait()))

        return pieces()

    def _raw_prompt(self, prompt: str, formatted: bool) -> str | None:
        """What is continued as it is; None where a completion is a message of a chat."""
        if formatted and not self.is_chat_model:
            return prompt
        if self._wrap is not None:
            return prompt if formatted else self._wrap(prompt)
        return None if self.is_chat_model else prompt

    def _complete(self, prompt: str, kwargs: dict[str, Any]) -> AnswerStream:
        options = {name: value for name, value in self._options(kwargs).items() if name in OPTION_NAMES}
        return self.engine.stream_complete(prompt, **options)

    def _open(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> AnswerStream:
        """Begin an answer; arguments of the call override those of the LLM."""
        given = self._options(kwargs)
        prepared = PREPARED.get()
        if prepared is not None and prepared.is_for(self, messages):
            options = {name: value for name, value in given.items() if name in OPTION_NAMES}
            prepared.stream = self.engine.stream_prompt(prepared.request, **options)
            return prepared.stream
        if self._render is not None or not self.is_chat_model:
            rendered = to_plain(messages) if self._render is None else self._render(messages)
            options = {name: value for name, value in given.items() if name in OPTION_NAMES}
            return self.engine.stream_complete(rendered, **options)
        spoken, remembered = without_memories(messages)
        if remembered:
            given["context"] = [*remembered, *(given.get("context") or ())]
        return self.engine.stream_chat([to_message(message) for message in spoken], **given)

    # Function calling

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(
                ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
            )
        functions = [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools]
        choice = kwargs.pop("tool_choice", None) or ("required" if tool_required else "auto")
        return {"messages": messages, "tools": functions, "tool_choice": choice, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        calls = response.message.additional_kwargs.get("tool_calls", [])
        if not calls and error_on_no_tool_call:
            cut_off = (response.raw or {}).get("finish_reason") == "length"
            hint = " The answer was cut off: raise max_tokens." if cut_off else ""
            raise ValueError(f"The model called no tool; it answered {response.message.content!r}.{hint}")
        return [
            ToolSelection(
                tool_id=call["id"],
                tool_name=call["function"]["name"],
                tool_kwargs=_arguments(call["function"]["arguments"]),
            )
            for call in calls
        ]


def _arguments(text: str) -> dict[str, Any]:
    """Arguments of a call; while they are written, as far as they are known. Agents look at every response."""
    try:
        found: dict[str, Any] = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return found
