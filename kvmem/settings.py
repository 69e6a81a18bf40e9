"""Every knob, as frozen pydantic models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from kvmem.errors import InputError

SelectorName = Literal["query", "deviation", "first_k", "none", "all"]
AttentionName = Literal["sdpa", "eager"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BlendSettings(_Frozen):
    """How a stitched cache is repaired.

    selector: which tokens are recomputed, see `kvmem.select`.
    recompute: the fraction of the approximate tokens to recompute, in [0, 1], or "auto": the smallest that the
        model's own check shows to be enough (see `kvmem.check`).
    correction: move the tokens that are not recomputed along with those that are; None means on for
        `query`, off for the other selectors (which are published baselines and stay plain).
    reach: how far, in tokens, a recomputed token's change is carried to its neighbours.
    shrinkage: weight of "no change" in the correction; larger is more careful.
    """

    selector: SelectorName = "query"
    recompute: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["auto"] = 0.07
    correction: bool | None = None
    reach: float = Field(default=48.0, gt=0)
    shrinkage: float = Field(default=0.3, gt=0)

    @property
    def share(self) -> float:
        """`recompute` as a number. Raises InputError while it is "auto"."""
        if self.recompute == "auto":
            raise InputError('recompute="auto" stands for a number that KVMem finds. Give a number here.')
        return self.recompute

    @property
    def corrects(self) -> bool:
        if self.selector in ("none", "all"):
            return False
        return self.selector == "query" if self.correction is None else self.correction

    @classmethod
    def parse(cls, value: BlendSettings | str | Mapping[str, Any] | None) -> BlendSettings:
        """Settings from a selector's name, a mapping, settings, or None (the defaults)."""
        if isinstance(value, BlendSettings):
            return value
        if value is None:
            return cls()
        fields: Any = {"selector": value} if isinstance(value, str) else value
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(
                f"blend={value!r} cannot be used: {_reasons(error)}. Give a selector's name "
                "('query', 'deviation', 'first_k', 'none', 'all') or a mapping such as "
                '{"selector": "query", "recompute": 0.1}.'
            ) from None


class SplitSettings(_Frozen):
    """Sizes of chunks, in tokens; a whole document may be smaller than `minimum`.

    target: longer chunks are cut at headings and blank lines; at weaker ends only those longer than `maximum`.
    headings: a chunk begins with its document's title (of the metadata) and the Markdown headings it is under.
    """

    minimum: int = Field(default=128, ge=1)
    target: int = Field(default=320, ge=1)
    maximum: int = Field(default=512, ge=1)
    headings: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> SplitSettings:
        if self.minimum > self.maximum:
            raise ValueError("minimum is greater than maximum")
        return self


class ModelSettings(_Frozen):
    """How the model is loaded.

    dtype: "auto" keeps the checkpoint's own; else "bfloat16", "float16" or "float32".
    device: "auto" is CUDA when there is one, else the CPU. device_map is handed to transformers as it is.
    threads: CPU threads for torch; None leaves torch's own choice.
    packed: bfloat16 weights on a CPU are kept in the layout that its matrix kernels read, in memory of this process.
        The model says the same, sooner. But `LanguageModel.hf` can then be run only, and not be copied, saved or
        converted; and processes that run one model do not share the pages of its file.
    attention: the arithmetic of attention over a blended cache; "eager" is the slow reference.
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
    """How a vLLM server is used, when the model is its address: `vllm://host:port/model`, or `vllm+https://`.

    api_key: the server's, if it wants one. tokenizer: a directory or hub id; None is what the server names as the
        model's own. retries: how often a call that failed before its first token is repeated, with growing pauses.
    read_timeout: seconds between two pieces of an answer. parallel: calls under way at a time.
    separator: a text between chunks, for a server that runs LMCache's blending: its `blend_special_str`.
    """

    api_key: SecretStr | None = None
    tokenizer: str | None = None
    retries: int = Field(default=3, ge=0)
    read_timeout: float = Field(default=120.0, gt=0)
    parallel: int = Field(default=32, ge=1)
    separator: str | None = None


class StoreSettings(_Frozen):
    """How much is kept, when the store is given as a directory (or not at all: then in memory only).

    memory_bytes: KV kept in memory beside the working buffer. disk_bytes: entry files on disk, None for no limit.
    namespace_bytes, eviction, ttl: see `kvmem.store.limits.Limits`. kv_dtype, verify: see `kvmem.store.DiskStore`.
    """

    memory_bytes: int = Field(default=1 << 30, ge=0)
    disk_bytes: int | None = Field(default=None, ge=0)
    namespace_bytes: int | None = Field(default=None, ge=0)
    eviction: Literal["lru", "lfu"] = "lru"
    ttl: float | None = Field(default=None, gt=0)
    kv_dtype: Literal["native", "int8", "fp8"] = "native"
    verify: Literal["first", "always", "never"] = "first"


class Settings(_Frozen):
    """Everything a `KVMem` can be told beside its model and its store.

    system: the system prompt; None is `kvmem.prompt.DEFAULT_SYSTEM`.
    max_tokens: the longest answer, in tokens; room for it is kept free in the window.
    namespace: entries and documents of other namespaces are invisible.
    context_tokens: at most so many tokens of documents in a prompt; None is all that the window holds.
    max_document_chars: longer documents are refused.
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

    @classmethod
    def parse(cls, base: Settings | None, overrides: Mapping[str, Any]) -> Settings:
        """`base` with `overrides` applied; names of `ModelSettings`, `StoreSettings` and `RemoteSettings` may be given
        flat."""
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
                fields["blend"] = BlendSettings.parse(value).model_dump()
            else:
                fields[name] = value.model_dump() if isinstance(value, BaseModel) else value
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise InputError(
                f"These settings cannot be used: {_reasons(error)}. See kvmem.settings for all of them."
            ) from None


def _reasons(error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        parts.append(f"{where}: {item['msg']}" if where else item["msg"])
    return "; ".join(parts)


def default_cache_dir() -> Path:
    """Where converted models are kept, for example ~/.cache/kvmem."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("kvmem"))
