"""All settings, as frozen pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from kvmem.errors import InputError

SelectorName = Literal["query", "deviation", "first_k", "none", "all"]
AttentionName = Literal["sdpa", "eager"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlendSettings(_Frozen):
    """How composed prompts are blended.

    Attributes:
        selector: Which tokens are recomputed: "query" (those the question attends to most), "deviation" (CacheBlend),
            "first_k" (EPIC), "none" or "all". See `kvmem.blend.select`.
        recompute: Fraction of the approximate tokens to recompute, in [0, 1], or "auto": the smallest fraction that the
            model check found to be enough (see `kvmem.backends.calibrate`).
        correction: Whether to correct the neighbours of recomputed tokens. None: on for "query", off for the other
            selectors, which are published baselines.
        reach: Distance, in tokens, over which the change of a recomputed token is carried to its neighbours.
        shrinkage: Weight of "no change" in the correction; larger is more cautious.

    Example:
        ```python
        from kvmem import BlendSettings, KVMem

        mem = KVMem("smollm2", store="./kv", blend=BlendSettings(recompute=0.1))
        answer = mem.ask("When does the lease begin?", blend="all")  # recomputes everything, for this answer
        ```
    """

    selector: SelectorName = "query"
    recompute: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = 0.07
    correction: bool | None = None
    reach: float = Field(default=48.0, gt=0)
    shrinkage: float = Field(default=0.3, gt=0)

    @property
    def share(self) -> float:
        """`recompute` as a number. Raises InputError if it is "auto"."""
        if self.recompute == "auto":
            raise InputError('recompute="auto" only works in KVMem, which replaces it by a number. Give a number here.')
        return self.recompute

    @property
    def corrects(self) -> bool:
        """Whether the correction is on."""
        if self.selector in ("none", "all"):
            return False
        return self.selector == "query" if self.correction is None else self.correction

    @classmethod
    def parse(cls, value: BlendSettings | str | Mapping[str, Any] | None) -> BlendSettings:
        """Make settings from a selector name, a mapping, settings, or None.

        Args:
            value: A selector name, a mapping of fields, `BlendSettings`, or None for the defaults.

        Returns:
            The settings.

        Raises:
            InputError: `value` is not valid.
        """
        if isinstance(value, BlendSettings):
            return value
        if value is None:
            return cls()
        fields: Any = {"selector": value} if isinstance(value, str) else value
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(
                f"blend={value!r} is not valid: {_reasons(error)}. Give a selector name "
                "('query', 'deviation', 'first_k', 'none', 'all') or a mapping such as "
                '{"selector": "query", "recompute": 0.1}.'
            ) from None


class SplitSettings(_Frozen):
    """How documents are cut into chunks.

    Attributes:
        minimum: Minimum size of a chunk, in tokens. A whole document may be smaller.
        target: Chunks longer than this, in tokens, are cut at headings and blank lines.
        maximum: Maximum size of a chunk, in tokens. Longer chunks are cut at ends of lines and sentences, too.
        headings: Whether a chunk begins with its document's title (from the metadata) and the Markdown headings that it
            is under.

    Example:
        ```python
        from kvmem import KVMem, SplitSettings

        mem = KVMem("smollm2", store="./kv", split=SplitSettings(target=256, headings=False))
        ```
    """

    minimum: int = Field(default=128, ge=1)
    target: int = Field(default=320, ge=1)
    maximum: int = Field(default=512, ge=1)
    headings: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> SplitSettings:
        if self.minimum > self.maximum:
            raise ValueError("minimum must not be greater than maximum")
        return self


class ModelSettings(_Frozen):
    """How a model is loaded.

    Attributes:
        dtype: "auto", "bfloat16", "float16" or "float32". "auto" is the checkpoint's dtype, but float32 for a 16-bit
            checkpoint on a CPU without instructions for that dtype, where it would be several times slower. Caches
            depend on the dtype: machines that share a store should set the same one.
        device: "auto" (CUDA if available, otherwise the CPU), or a torch device.
        device_map: Passed to transformers unchanged.
        threads: CPU threads for torch; None keeps torch's default.
        packed: Keep bfloat16 weights on a CPU in the layout of its matrix kernels. Results are the same, but faster.
            `LanguageModel.hf` can then only be run, not copied, saved or converted, and processes that load the same
            model do not share its file's memory pages.
        attention: Attention implementation for blended buffers: "sdpa", or "eager", the slow reference.
        revision: Revision of the model on the hub; None is the default branch.
        trust_remote_code: Whether to run code that comes with the model.

    Example:
        ```python
        from kvmem import LanguageModel, ModelSettings

        model = LanguageModel.load("smollm2", ModelSettings(dtype="float32", threads=4))
        ```
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: str | dict[str, Any] | None = None
    threads: int | None = Field(default=None, ge=1)
    packed: bool = True
    attention: AttentionName = "sdpa"
    revision: str | None = None
    trust_remote_code: bool = False


class RemoteSettings(_Frozen):
    """How a vLLM server is used. The model is then its address: `vllm://host:port/model`, or `vllm+https://...`.

    Attributes:
        api_key: API key of the server, if it requires one.
        tokenizer: Directory or hub id of the tokenizer; None uses the one that the server reports for the model.
        retries: How often to retry a call that failed before its first token, with increasing delays.
        read_timeout: Maximum time between two pieces of an answer, in seconds.
        parallel: Maximum number of concurrent calls.
        separator: Text between chunks, for a server with LMCache's blending: its `blend_special_str`.

    Example:
        ```python
        from kvmem import KVMem, RemoteSettings, Settings

        settings = Settings(remote=RemoteSettings(retries=5, parallel=8))
        mem = KVMem("vllm://localhost:8000/Qwen/Qwen2.5-7B-Instruct", settings=settings)
        ```
    """

    api_key: SecretStr | None = None
    tokenizer: str | None = None
    retries: int = Field(default=3, ge=0)
    read_timeout: float = Field(default=120.0, gt=0)
    parallel: int = Field(default=32, ge=1)
    separator: str | None = None


class StoreSettings(_Frozen):
    """Limits and format of a store that `KVMem` opens itself: a directory, or memory only if no store is given.

    Attributes:
        memory_bytes: Maximum size of entries kept in memory, in bytes, in addition to the working buffer.
        disk_bytes: Maximum size of entry files on disk, in bytes; None for no limit.
        namespace_bytes: Maximum size of the entries of one namespace, in bytes; None for no limit.
        eviction: Which entries are evicted first: "lru" or "lfu".
        ttl: Lifetime of an entry, in seconds; None for no limit. See `kvmem.store.limits.Limits`.
        kv_dtype: How KV is stored on disk: "native" (exact), "int8" or "fp8". See `kvmem.store.DiskStore`.
        verify: When checksums are verified: "first" (when this process first loads an entry), "always" or "never".

    Example:
        ```python
        from kvmem import KVMem, Settings, StoreSettings

        mem = KVMem("smollm2", "./kv", settings=Settings(storage=StoreSettings(disk_bytes=10**10, kv_dtype="int8")))
        mem = KVMem("smollm2", "./kv", disk_bytes=10**10, kv_dtype="int8")  # the same
        ```
    """

    memory_bytes: int = Field(default=1 << 30, ge=0)
    disk_bytes: int | None = Field(default=None, ge=0)
    namespace_bytes: int | None = Field(default=None, ge=0)
    eviction: Literal["lru", "lfu"] = "lru"
    ttl: float | None = Field(default=None, gt=0)
    kv_dtype: Literal["native", "int8", "fp8"] = "native"
    verify: Literal["first", "always", "never"] = "first"


class Settings(_Frozen):
    """All settings of a `KVMem`.

    Attributes:
        model: How the model is loaded.
        blend: How composed prompts are blended.
        split: How documents are cut into chunks.
        storage: Limits and format of the store.
        remote: How a vLLM server is used.
        system: The system prompt; None uses `kvmem.prompt.DEFAULT_SYSTEM`.
        max_tokens: Maximum length of an answer, in tokens. This room is kept free in the window.
        namespace: The namespace (tenant). Documents, memories, threads and entries of other namespaces are invisible.
        context_tokens: Maximum number of document tokens in a prompt; None fills the window.
        max_document_chars: Longer documents, in characters, are rejected.
        buffer_bytes: Memory for composed caches that the next prompt may continue, in bytes.
        chat_template_kwargs: Variables for the model's chat template, such as `{"enable_thinking": False}`.

    Example:
        ```python
        from kvmem import KVMem, ModelSettings, Settings

        settings = Settings(model=ModelSettings(threads=4), max_tokens=64, namespace="alice")
        mem = KVMem("smollm2", store="./kv", settings=settings)
        mem = KVMem("smollm2", store="./kv", threads=4, max_tokens=64, namespace="alice")  # the same
        ```
    """

    model: ModelSettings = ModelSettings()
    blend: BlendSettings = BlendSettings()
    split: SplitSettings = SplitSettings()
    storage: StoreSettings = StoreSettings()
    remote: RemoteSettings = RemoteSettings()
    system: str | None = None
    max_tokens: int = Field(default=256, ge=1)
    namespace: str = Field(default="default", min_length=1)
    context_tokens: int | None = Field(default=None, ge=1)
    max_document_chars: int = Field(default=10_000_000, ge=1)
    buffer_bytes: int = Field(default=1 << 28, ge=0)
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def parse(cls, base: Settings | None, overrides: Mapping[str, object]) -> Settings:
        """Apply `overrides` to `base`.

        Args:
            base: The settings to start from; None for the defaults.
            overrides: Fields of `Settings`. Fields of `ModelSettings`, `StoreSettings` and `RemoteSettings` may be
                given directly, without nesting.

        Raises:
            InputError: A name or a value is not valid.
        """
        base = base or cls()
        fields = base.model_dump()
        for name, value in overrides.items():
            if name in ModelSettings.model_fields:
                fields["model"][name] = value
            elif name in StoreSettings.model_fields:
                fields["storage"][name] = value
            elif name in RemoteSettings.model_fields:
                fields["remote"][name] = value
            elif name == "blend":
                fields["blend"] = BlendSettings.parse(cast(Any, value)).model_dump()
            else:
                fields[name] = value.model_dump() if isinstance(value, BaseModel) else value
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(
                f"The settings are not valid: {_reasons(error)}. See kvmem.settings for all settings."
            ) from None


def _reasons(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        parts.append(f"{where}: {item['msg']}" if where else item["msg"])
    return "; ".join(parts)


def default_cache_dir() -> Path:
    """The user's cache directory for kvmem, for example ~/.cache/kvmem."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("kvmem"))
