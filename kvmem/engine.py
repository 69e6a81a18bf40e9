"""KVMem, the engine: documents in, answers out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Unpack

from kvmem.errors import InputError
from kvmem.library.request import Request
from kvmem.library.scope import Scope, check_context
from kvmem.opened import OpenedEngine
from kvmem.options import (
    SCOPE_NAMES,
    AskOptions,
    Blend,
    GenerateOptions,
    ScopeOptions,
    as_template,
    check_names,
    split_options,
)
from kvmem.prompt.layout import Message
from kvmem.prompt.plan import Plan
from kvmem.prompt.tools import Tool
from kvmem.results import Answer, Prefill, Source
from kvmem.runtime.stream import AnswerStream


class KVMem(OpenedEngine):
    """A language model that has read your documents. May be used from any thread; close it, or use it in `with`.

    Args:
        model: A hub id, a local directory, a GGUF file, "smollm2", a `LanguageModel`, a transformers model (then with
            `tokenizer`), or the address of a vLLM server, `vllm://host:port/model`.
        store: A directory, a `Store`, or None to keep everything in memory only.
        tokenizer: Of a model object; of a model on a server, also its directory or hub id.
        settings: A `Settings`.
        retriever: Chooses chunks if they do not all fit; BM25 by default.
        options: Any field of `Settings`, `ModelSettings`, `StoreSettings` and `RemoteSettings` by name.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelError: The model cannot be used.
        RemoteError: The server cannot be reached or used.
        StoreError: The store cannot be used.
        InputError: An argument is not valid.

    Example:
        ```python
        with KVMem("smollm2", store="./kv") as mem:
            mem.add("The lease begins on 1 April 2025.", id="lease")
            print(mem.ask("When does the lease begin?", max_tokens=32).text)
        ```
    """

    def ask(self, question: str, *, system: str | None = None, **options: Unpack[AskOptions]) -> Answer:
        """Answer a question from the documents.

        Args:
            question: The question.
            system: The system prompt, instead of the engine's.
            options: Which texts to answer from, see `ScopeOptions`, and how to generate, see `GenerateOptions`.

        Raises:
            EmptyInputError: A text, the question or the documents are empty.
            InputError: An argument is not valid.
            PromptTooLongError: The prompt does not fit the window.
            UnknownDocumentError: There is no document with that id.
            AnswerTimeoutError: The timeout passed.
            ClosedError: The engine was closed or the work cancelled.
        """
        return self.stream(question, system=system, **options).answer

    def stream(self, question: str, *, system: str | None = None, **options: Unpack[AskOptions]) -> AnswerStream:
        """Like `ask`, as an iterator of text pieces; its `.answer` is the whole answer."""
        scope, generate = split_options(options)
        return self._answering.ask(question, self._scope(scope), system, as_template(scope), generate)

    def batch(
        self, questions: Sequence[str | Sequence[Message]], *, system: str | None = None, **options: Unpack[AskOptions]
    ) -> Sequence[Answer]:
        """Answer several questions, or continue several conversations (lists of messages).

        Prompts that differ only in their last part share one cache and are decoded together. The tokens to recompute
        are chosen for all of them, so sampled answers differ from those of `ask`. Answers are in the order of the
        questions. `timeout` is for all of them together. Arguments and errors are those of `ask`; invalid input raises
        before any answer begins.
        """
        scope, generate = split_options(options)
        context = scope.get("context")
        if context is not None:  # an iterator serves all questions
            scope["context"] = tuple(check_context(context))
        return self._answering.batch(
            questions, self._scope(scope), _names_texts(scope), system, as_template(scope), generate
        )

    def chat(
        self,
        messages: Sequence[Message],
        *,
        thread: str | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **options: Unpack[AskOptions],
    ) -> Answer:
        """Continue a conversation: `[{"role": "user", "content": "..."}]`, in the roles of the model's template.

        Long texts in messages are cut and cached, so they are never computed again, wherever they stand. If the
        messages have no system prompt, the engine's is used if it was set. When the window is full, the oldest turns
        are left out, and `plan` says so.

        Args:
            messages: The conversation, up to the message to answer.
            thread: A name under which the conversation is kept, also across restarts: see `history`. Its next turn, or
                another branch of it (a retry, an edited message), reuses everything that was read or said before.
            tools: Functions the model may call, by JSON schema as in OpenAI's API; calls are in `answer.tool_calls`.
            tool_choice: "auto", "none", "any" or a function's name. A forced call follows its schema token by token,
                and so does every answer of a model whose template does not know tools.
            options: As in `ask`; texts are put at the end of the system message. Without `context`, `collection` and
                `documents`, no documents are in the prompt. An answer follows `schema` unless it is a call.

        Raises:
            EmptyInputError: A text, the messages or the documents are empty.
            InputError: An argument is not valid.
            PromptTooLongError: The prompt does not fit the window.
            AnswerTimeoutError: The timeout passed.
            ClosedError: The engine was closed or the work cancelled.
        """
        return self.stream_chat(messages, thread=thread, tools=tools, tool_choice=tool_choice, **options).answer

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        thread: str | None = None,
        tools: Sequence[Tool] | None = None,
        tool_choice: str = "auto",
        **options: Unpack[AskOptions],
    ) -> AnswerStream:
        """Like `chat`, as an iterator of text pieces; its `parts` have thoughts and tool calls, too."""
        scope, generate = split_options(options)
        given = self._scope(scope) if _names_texts(scope) else None
        return self._answering.chat(messages, given, thread, tools, tool_choice, as_template(scope), generate)

    def complete(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> Answer:
        """Continue a raw prompt, without the chat template; special tokens in a text are interpreted.

        Args:
            prompt: A text or token ids. What was computed for an earlier prompt is reused.
            options: See `GenerateOptions`.

        Raises:
            The errors of `ask`.
        """
        return self.stream_complete(prompt, **options).answer

    def stream_complete(self, prompt: str | Sequence[int], **options: Unpack[GenerateOptions]) -> AnswerStream:
        """Like `complete`, as an iterator of text pieces; its `.answer` is the whole answer."""
        return self._answering.complete(prompt, options)

    def stream_prompt(self, prompt: Request, **options: Unpack[GenerateOptions]) -> AnswerStream:
        """Answer a prompt made by `build_prompt`; `max_tokens` must not be larger than it was there."""
        return self._answering.run(prompt, options)

    def retrieve(self, question: str, k: int, **scope: Unpack[ScopeOptions]) -> tuple[Source, ...]:
        """The `k` most relevant chunks, best first, as the retriever scores them; irrelevant ones are left out.

        The model is not run. Raises the errors of `ask`.
        """
        given = self._scope(scope)
        return self._worker.run(lambda: self._requests.retrieve(question, k, given))

    def plan(
        self, question: str, *, system: str | None = None, max_tokens: int | None = None, **scope: Unpack[ScopeOptions]
    ) -> Plan:
        """What `ask` would put into the prompt, and why. The model is not run. Raises the errors of `ask`."""
        return self.build_prompt(question, system=system, max_tokens=max_tokens, **scope).plan

    def build_prompt(
        self,
        question: str | Sequence[Message],
        *,
        system: str | None = None,
        search: str | None = None,
        max_tokens: int | None = None,
        **scope: Unpack[ScopeOptions],
    ) -> Request:
        """The prompt that `ask` (for a question) or `chat` (for messages) would run: its tokens, plan and sources.

        The model is not run.

        Args:
            question: A question, or messages. Documents go to the end of the system message, or where
                `kvmem.prompt.CONTEXT` stands in a message's content.
            system: The system prompt of a question, instead of the engine's.
            search: The text that chunks are scored for; default: the question, or the last message.
            max_tokens: Tokens to leave free for the answer.
            scope: See `ScopeOptions`.

        Raises:
            The errors of `ask`.
        """
        started = time.perf_counter()
        room = self.settings.max_tokens if max_tokens is None else max_tokens
        given, template = self._scope(scope), as_template(scope)
        if isinstance(question, str):
            return self._worker.run(
                lambda: self._requests.for_question(started, question, given, system, room, template)
            )
        texts = given if _names_texts(scope) else None
        return self._worker.run(
            lambda: self._requests.for_messages(started, question, texts, room, template, search=search)
        )

    def prefill(
        self, question: str, *, system: str | None = None, blend: Blend = None, **scope: Unpack[ScopeOptions]
    ) -> Prefill:
        """The composed and blended state for a question, without generating; compare it with `model(token_ids)`.

        Raises the errors of `ask`.
        """
        return self._answering.prefill(question, self._scope(scope), system, as_template(scope), blend)

    def _scope(self, options: ScopeOptions) -> Scope:
        check_names(options, SCOPE_NAMES)
        collection = options.get("collection")
        if isinstance(collection, str):
            collection = self.collection(collection)
        if collection is not None and collection.mem is not self:
            raise InputError("This collection belongs to another KVMem. Make one by this engine's collection().")
        corpus = (self._documents if collection is None else collection).corpus
        return Scope(corpus, options.get("documents"), options.get("context"), options.get("retriever"))


def _names_texts(scope: ScopeOptions) -> bool:
    """Whether texts to answer from were named."""
    return any(scope.get(name) is not None for name in ("context", "collection", "documents"))
