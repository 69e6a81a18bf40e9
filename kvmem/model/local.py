"""LanguageModel: a Hugging Face causal language model, the structure of its KV cache, and running it over a buffer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvmem.errors import InputError, ModelError, first_line
from kvmem.kv.attention import ATTENTION, DECODING, Step
from kvmem.kv.buffer import BlendedCache
from kvmem.kv.layer import Correction
from kvmem.model.anatomy import Anatomy, examine
from kvmem.model.base import AnyModel
from kvmem.model.fingerprint import Fingerprint
from kvmem.model.loading import load_parts, window_of
from kvmem.model.packing import can_pack, pack
from kvmem.settings import ModelSettings


class LanguageModel(AnyModel):
    """A causal language model and its tokenizer, loaded in this process.

    Args:
        hf: The transformers model, on a single device. It is switched to eval mode.
        tokenizer: The model's tokenizer.
        name: Name for messages and answers; default: the model's own name or path.
        settings: How the model runs; default: `ModelSettings()`.

    Attributes:
        hf: The transformers model. It is unmodified, except that `load` may pack its weights (see
            `kvmem.model.packing`).
        settings: The model settings.

    Raises:
        InputError: `hf` or `tokenizer` is not a transformers object.
        ModelError: The model is spread over several devices.

    Example:
        ```python
        from kvmem import KVMem, LanguageModel, ModelSettings

        model = LanguageModel.load("smollm2", ModelSettings(dtype="float32", threads=4))
        print(model.window, model.blendable, model.bytes_per_token)
        mem = KVMem(model, store="./kv")
        ```
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
                f"LanguageModel needs a transformers model and its tokenizer, not {type(hf).__name__} and "
                f"{type(tokenizer).__name__}. Load them with AutoModelForCausalLM and AutoTokenizer."
            )
        places = {parameter.device for parameter in hf.parameters()}
        if len(places) > 1 or torch.device("meta") in places:
            raise ModelError(
                f"The model must be on one real device, but its weights are on {', '.join(sorted(map(str, places)))}. "
                "Load it on a single device, for example with device_map={'': 0}."
            )
        self.settings = settings or ModelSettings()
        self.hf: Any = hf.eval()
        self._fingerprint = Fingerprint(self.hf, tokenizer)
        super().__init__(tokenizer, name or str(getattr(hf.config, "_name_or_path", "") or type(hf).__name__))
        configs: list[Any] = [m.config for m in hf.modules() if getattr(m, "config", None) is not None]
        self._configs: dict[int, Any] = {id(config): config for config in configs}
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    @classmethod
    def load(cls, source: str | os.PathLike[str], settings: ModelSettings | None = None) -> LanguageModel:
        """Load a model and its tokenizer.

        Args:
            source: An alias such as "smollm2", a hub id, a local directory, or a GGUF file.
            settings: How to load the model; default: `ModelSettings()`.

        Returns:
            The loaded model.

        Raises:
            InputError: `source` is a server address, or a setting is not valid.
            ModelNotFoundError: There is no model at `source`.
            ModelError: The model was found but cannot be loaded.
        """
        settings = settings or ModelSettings()
        name = os.fspath(source)
        hf, tokenizer = load_parts(name, settings)
        model = cls(hf, tokenizer, name, settings)
        if settings.packed:
            model.pack()
        return model

    def pack(self) -> None:
        """Pack the weights for the CPU's matrix kernels, if this CPU has them; see `kvmem.model.packing`."""
        if can_pack():
            _ = self.fingerprint  # needs the weights, which are not readable once packed
            pack(self.hf)
            self._fingerprint.pack()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return torch.device(self.hf.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and KV."""
        dtype: torch.dtype = self.hf.dtype
        return dtype

    @cached_property
    def window(self) -> int:
        """The maximum length of prompt and answer, in tokens."""
        return window_of(self.hf.config, self.name)

    @property
    def fingerprint(self) -> str:
        """A hash of everything KV depends on; see `kvmem.model.fingerprint.Fingerprint`."""
        return self._fingerprint.value

    def refresh(self) -> None:
        """Notice changed weights and adapters."""
        self._fingerprint.refresh()

    @cached_property
    def grammar_tokenizer(self) -> Any:
        """The tokenizer in llguidance's format. Raises InputError."""
        from llguidance.hf import from_tokenizer

        end = self.hf.generation_config.eos_token_id
        try:
            return from_tokenizer(
                self.tokenizer,
                n_vocab=int(self.hf.config.get_text_config().vocab_size),
                eos_token=end if end is not None else self.tokenizer.eos_token_id,
            )
        except Exception as error:  # llguidance passes on any error of its Rust code
            raise InputError(
                f"The tokenizer of {self.name!r} cannot be used for JSON answers: {first_line(error)}. "
                "Use a model with a fast tokenizer that llguidance supports."
            ) from error

    @cached_property
    def anatomy(self) -> Anatomy:
        """The shapes, windows and rotations of the layers, found by running single tokens at several positions."""
        return examine(self.hf, self.name, self.window, self.forward)

    @property
    def blendable(self) -> bool:
        """Whether entries can be moved and blended. If not, `anatomy.reason` says why, and only exact reuse works."""
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
        """An empty buffer with room for `capacity` tokens."""
        return BlendedCache(self.anatomy.groups, capacity, self.dtype, self.device, self.anatomy.recurrent)

    def step(self, positions: Tensor) -> Step:
        """A forward pass at `positions` (int64 [m], ascending). Only the last token's output of it is valid."""
        return Step(positions, self.settings.attention, final_layer=self.depth - 1)

    def forward(
        self, token_ids: Tensor, cache: BlendedCache, step: Step | None = None, correction: Correction | None = None
    ) -> None:
        """Run `token_ids` (int64 [m]) over `cache`, in place.

        With a step, the rows go to the step's positions; without one, they are appended with the model's own attention.
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
        """Prefill `token_ids` at the end of `cache`; the result is exact if the cache is."""
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
        """While the context is open, replace the next forward pass of `hf` by one that runs `token_ids` over `cache`.

        This turns the first pass of transformers' `generate` into the pass that blends and prefills the question.
        Afterwards `cache` ends after the step's last position.
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
        """While the context is open, use the faster CPU attention for single tokens, if the model uses `sdpa`."""
        own = {config._attn_implementation for config in self._configs.values()}
        with self.attention(DECODING) if own == {"sdpa"} and self.device.type == "cpu" else nullcontext():
            yield

    @contextmanager
    def attention(self, name: str) -> Iterator[None]:
        """While the context is open, the model uses the attention registered as `name`; restored on exit."""
        before = [(config, config._attn_implementation) for config in self._configs.values()]
        for config, _ in before:
            config._attn_implementation = name
        try:
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation
