"""Options of an answer, by the same names everywhere: in the engine, its adapters and the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

from pydantic import SecretStr

from kvmem.errors import InputError
from kvmem.prompt.json_schema import Schema
from kvmem.prompt.layout import TemplateOptions
from kvmem.settings import AttentionName, BlendSettings, RemoteSettings, SplitSettings, StoreSettings

if TYPE_CHECKING:
    from kvmem.collection import Collection
    from kvmem.library.corpus import DocumentFilter
    from kvmem.library.scope import ContextTexts
    from kvmem.text.retrieval import Retriever

Blend = BlendSettings | str | Mapping[str, Any] | None


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `ask`, `chat`, `complete`, `batch` and their streams. None is the same as leaving one out.

    Attributes:
        max_tokens: the longest answer, in tokens; the engine's setting by default.
        temperature: 0 (the default) is greedy.
        top_p: nucleus sampling, in (0, 1].
        top_k: sample among this many tokens only.
        min_p: leave out tokens less likely than this share of the likeliest one, in [0, 1].
        repetition_penalty: above 1 makes tokens that were used less likely (Keskar et al., arXiv 1909.05858).
        stop: the answer ends before any of these strings.
        seed: makes sampled answers repeatable.
        schema: a JSON schema that the answer follows.
        timeout: seconds from the call to the end of the answer.
        blend: how composed caches are blended; see `BlendSettings`.
        generate_kwargs: more arguments of transformers' `generate`.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    seed: int | None
    schema: Schema | None
    timeout: float | None
    blend: Blend
    generate_kwargs: Mapping[str, Any] | None


class ScopeOptions(TypedDict, total=False):
    """Keyword arguments that say what a prompt is made of. None is the same as leaving one out.

    Attributes:
        context: Texts or documents, as in `KVMem.add`, to answer from instead of the engine's documents; they are
            cached, and not added. Or sources, as `KVMem.retrieve` and `Answer.sources` have them.
        collection: Answer from this collection instead of the engine's own documents; an object or a name.
        documents: Answer from these documents only: their ids, or a filter over their metadata such as
            `{"tenant": "a", "year": {"$gte": 2024}}`.
        retriever: Chooses chunks if they do not all fit, instead of the engine's retriever.
        chat_template_kwargs: Variables for the model's chat template, such as `{"enable_thinking": False}`; they
            override those of the engine's settings.
    """

    context: ContextTexts
    collection: Collection | str | None
    documents: DocumentFilter | None
    retriever: Retriever | None
    chat_template_kwargs: Mapping[str, Any] | None


class AskOptions(GenerateOptions, ScopeOptions, total=False):
    """Keyword arguments of a question: `GenerateOptions` and `ScopeOptions`."""


SCOPE_NAMES = frozenset(ScopeOptions.__annotations__)
OPTION_NAMES = frozenset(GenerateOptions.__annotations__)

_RESERVED = {
    "max_new_tokens": "Use max_tokens.",
    "max_length": "Use max_tokens.",
    "stop_strings": "Use stop.",
    "do_sample": "Use a temperature above 0.",
    "streamer": "Use stream().",
    "num_beams": "Beam search is not supported.",
    "num_return_sequences": "Ask again with another seed.",
    "input_ids": "The prompt is made from the question.",
    "attention_mask": "The prompt is made from the question.",
    "past_key_values": "The cache is kvmem's own.",
    "prefill_chunk_size": "kvmem runs the prompt.",
    "prompt_lookup_num_tokens": "Speculative decoding is not supported.",
    "assistant_model": "Speculative decoding is not supported.",
    "assistant_early_exit": "Speculative decoding is not supported.",
    "use_cache": "The cache is kvmem's own.",
    "cache_implementation": "The cache is kvmem's own.",
    "generation_config": "Give its fields by name.",
    "stopping_criteria": "Use stop, or close the stream.",
}


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn; see `GenerateOptions`.

    extra: more arguments of `generate`. marks: whether special tokens that mark thoughts or tool calls stay in the
        text. opening: the end of the prompt, which may have begun a thought.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    schema: Schema | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    marks: bool = False
    opening: str = ""

    def __post_init__(self) -> None:
        self._check_whole("max_tokens", 1)
        self._check_whole("top_k", 1)
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise InputError(f"seed must be an integer, not {self.seed!r}.")
        self._check_number("temperature", 0.0, None)
        self._check_number("top_p", 0.0, 1.0, open_low=True)
        self._check_number("min_p", 0.0, 1.0)
        self._check_number("repetition_penalty", 0.0, None, open_low=True)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise InputError("A stop string is empty or not a string. Leave it out, or give text.")
        if reserved := _RESERVED.keys() & self.extra.keys():
            name = min(reserved)
            raise InputError(f"{name} cannot be given in generate_kwargs. {_RESERVED[name]}")
        if doubled := OPTION_NAMES & self.extra.keys():
            raise InputError(f"{min(doubled)} is an option of its own. Give it by name, not in generate_kwargs.")

    def _check_whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise InputError(f"{name} must be an integer of at least {low}, not {value!r}.")

    def _check_number(self, name: str, low: float, high: float | None, open_low: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise InputError(f"{name} must be a number, not {value!r}.")
        if value < low or (open_low and value == low) or (high is not None and value > high):
            span = f"{'above' if open_low else 'at least'} {low:g}" + ("" if high is None else f" and at most {high:g}")
            raise InputError(f"{name} must be {span}, not {value!r}.")

    def for_generate(self) -> dict[str, Any]:
        """As arguments of transformers' `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
            options |= {name: value for name, value in drawn.items() if value is not None}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = float(self.repetition_penalty)
        return options | dict(self.extra)


def check_names(options: Mapping[str, Any], known: frozenset[str] = OPTION_NAMES) -> None:
    """Raise InputError for an option that does not exist."""
    if unknown := options.keys() - known:
        hint = " Other arguments of transformers' generate go into generate_kwargs." if known >= OPTION_NAMES else ""
        raise InputError(f"{min(unknown)!r} is not an option. Options are: {', '.join(sorted(known))}.{hint}")


def split_options(options: AskOptions) -> tuple[ScopeOptions, GenerateOptions]:
    """The two kinds of options apart. Raises InputError for an option that does not exist."""
    check_names(options, OPTION_NAMES | SCOPE_NAMES)
    scope = {name: value for name, value in options.items() if name in SCOPE_NAMES}
    rest = {name: value for name, value in options.items() if name not in SCOPE_NAMES}
    return cast(ScopeOptions, scope), cast(GenerateOptions, rest)


def as_sampling(options: GenerateOptions, max_tokens: int) -> Sampling:
    """Options as `Sampling`; `max_tokens` is the default. Raises InputError."""
    check_names(options)
    stop, extra = options.get("stop"), options.get("generate_kwargs")
    if extra is not None and not isinstance(extra, Mapping):
        raise InputError(f"generate_kwargs must be a mapping, not a {type(extra).__name__}.")
    names = ("top_p", "top_k", "min_p", "repetition_penalty", "seed", "schema")
    given: dict[str, Any] = {name: options.get(name) for name in names}
    wanted, temperature = options.get("max_tokens"), options.get("temperature")
    return Sampling(
        max_tokens=max_tokens if wanted is None else wanted,
        temperature=0.0 if temperature is None else temperature,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        extra=dict(extra or {}),
        **given,
    )


_TEMPLATE_NAMES = frozenset(
    ("messages", "conversation", "tools", "documents", "tokenize", "add_generation_prompt", "continue_final_message")
)


def as_template(options: ScopeOptions, tools: Sequence[Mapping[str, Any]] | None = None) -> TemplateOptions:
    """What the chat template is given. Raises InputError."""
    extra = options.get("chat_template_kwargs")
    if extra is None:
        extra = {}
    if not isinstance(extra, Mapping):
        raise InputError(f"chat_template_kwargs must be a mapping, not a {type(extra).__name__}.")
    if reserved := _TEMPLATE_NAMES & extra.keys():
        raise InputError(f"{min(reserved)} cannot be given in chat_template_kwargs, because kvmem sets it.")
    return TemplateOptions(None if tools is None else tuple(tools), dict(extra))


class EngineOptions(TypedDict, total=False):
    """Settings of `KVMem` by name: the fields of `Settings`, and of its parts."""

    blend: BlendSettings | str | Mapping[str, Any]
    split: SplitSettings | Mapping[str, Any]
    storage: StoreSettings | Mapping[str, Any]
    remote: RemoteSettings | Mapping[str, Any]
    system: str | None
    max_tokens: int
    namespace: str
    context_tokens: int | None
    max_document_chars: int
    buffer_bytes: int
    chat_template_kwargs: Mapping[str, Any]
    dtype: str
    device: str
    device_map: str | dict[str, Any] | None
    threads: int | None
    packed: bool
    attention: AttentionName
    revision: str | None
    trust_remote_code: bool
    memory_bytes: int
    disk_bytes: int | None
    namespace_bytes: int | None
    eviction: Literal["lru", "lfu"]
    ttl: float | None
    kv_dtype: Literal["native", "int8", "fp8"]
    verify: Literal["first", "always", "never"]
    api_key: SecretStr | str | None
    retries: int
    read_timeout: float
    parallel: int
    separator: str | None
