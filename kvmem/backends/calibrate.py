"""The model check: measures what works for a model by running it, not by looking up its name.

It checks that (a) keys moved to another position equal keys computed there; (b) a composed buffer that is recomputed
completely equals full prefill; (c) exact reuse equals full prefill. It also measures (d) how close the default blend
comes to full prefill on a built-in text, and which budget is enough.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import DynamicCache

from kvmem.backends.local import LocalBackend
from kvmem.blend.compose import Composer
from kvmem.cancellation import NEVER
from kvmem.kv.buffer import BlendedCache
from kvmem.kv.entry import EntryKey
from kvmem.library.corpus import Chunker, Corpora
from kvmem.library.request import RequestBuilder, prefix_of
from kvmem.library.scope import Scope
from kvmem.model.local import LanguageModel
from kvmem.options import Blend
from kvmem.prompt.layout import DEFAULT_SYSTEM, Typesetter
from kvmem.prompt.span import Span
from kvmem.results import Prefill
from kvmem.settings import BlendSettings, Settings, default_cache_dir
from kvmem.store.memory import MemoryStore
from kvmem.text.retrieval import BM25Retriever

logger = logging.getLogger("kvmem")
# Reports that could not be written to the user's cache directory.
_unwritten: dict[str, CheckReport] = {}

TEXTS = (
    "The night ferry leaves Port Ellery at ten past nine and reaches Saint Orrin at dawn. It carries ninety cars and "
    "four hundred passengers. Cabins must be booked; deck seats are free. Dogs travel on the upper deck only, on a "
    "lead. In a storm of more than nine on the Beaufort scale the ferry waits in harbour, and tickets stay valid.",
    "The harbour library keeps the logbooks of every ship that was built in Ellery since 1874. They may be read on "
    "Tuesdays and Thursdays, with clean hands and a pencil. The oldest belongs to the Marigold, a brig of two hundred "
    "tons, whose captain, Ada Thorne, drew the coast on its margins. Copies are made for two crowns a page.",
    "Saint Orrin's market opens on the first Saturday of each month. Its baker, Lewis Pell, sells rye bread and a cake "
    "of figs. The fishmonger next to him closes at noon. There is a fountain in the middle of the square, given by the "
    "captain of the Marigold; whoever drinks from it, they say, returns within the year.",
    "The lighthouse on Gull Point flashes twice every fifteen seconds. It was automated in 1981, and its last keeper, "
    "Tom Averill, still lives beside it. He measures the rain each morning at seven and sends the figure to the "
    "institute in the capital. In the wettest year, 2012, it was two thousand and forty millimetres.",
)
QUESTIONS = (
    "Who drew the coast in a logbook?",
    "Where do dogs travel on the ferry?",
    "Who gave the fountain in the market?",
    "How often does the lighthouse flash?",
)
BUDGETS = (0.02, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
# A budget is enough if its divergence is at most this share of plain reuse's divergence, or at most this many nats.
ENOUGH_SHARE, ENOUGH_NATS = 0.2, 0.005
# bfloat16 rounding alone changes the next token's distribution by about a thousandth of a nat.
_TOLERANCE = 0.01


@dataclass(frozen=True)
class CheckReport:
    """The result of the check. Divergences are mean KL of the next token against full prefill, in nats.

    Attributes:
        model: Name of the model.
        fingerprint: Fingerprint of the model.
        blendable: Whether (a) and (b) hold. If not, only exact reuse is possible.
        reason: If not `blendable`, what failed.
        rotation_error: (a), the largest difference relative to the largest key; None if not measured.
        all_divergence: (b), the divergence after recomputing everything; None if not measured.
        exact_divergence: (c), the divergence of exact reuse.
        divergence: (d), by budget of the default blend; "0" is plain reuse.
        recompute: The smallest budget that is enough, for `recompute="auto"`; None if the model is not blendable.
    """

    model: str
    fingerprint: str
    blendable: bool
    reason: str
    rotation_error: float | None
    all_divergence: float | None
    exact_divergence: float
    divergence: dict[str, float]
    recompute: float | None

    @property
    def exact(self) -> bool:
        return self.exact_divergence <= _TOLERANCE


def check(model: LanguageModel) -> CheckReport:
    """Run the check, and save the report under the model's fingerprint in the user's cache directory."""
    report = _check(model)
    path = _remembered(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(report), indent=1))
    except OSError as error:
        logger.warning("kvmem: the report of the model check cannot be kept (%s); the next process checks again", error)
        _unwritten[model.fingerprint] = report
    return report


def recall(model: LanguageModel) -> CheckReport | None:
    """The saved report of an earlier check of the same model, if there is one."""
    if model.fingerprint in _unwritten:
        return _unwritten[model.fingerprint]
    try:
        return CheckReport(**json.loads(_remembered(model).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _remembered(model: LanguageModel) -> Path:
    return default_cache_dir() / "checks" / f"{model.fingerprint}.json"


def _check(model: LanguageModel) -> CheckReport:
    blendable, reason = model.blendable, model.anatomy.reason
    rotation = _rotation_error(model) if blendable else None
    limit = 0.03 if model.dtype != torch.float32 else 1e-3
    if rotation is not None and rotation > limit:
        blendable, reason = False, f"moved keys differ from computed keys by {rotation:.2g} of the largest key"
    bench = _Bench(model)
    for text in TEXTS:
        bench.prefill(QUESTIONS[0], [text], "none")
    divergence = {"0": bench.divergence("none")} if blendable else {}
    for budget in BUDGETS if blendable else ():
        divergence[str(budget)] = bench.divergence({"selector": "query", "recompute": budget})
    # Last, because from then on all of it is exact.
    every = bench.divergence("all") if blendable else None
    if every is not None and every > _TOLERANCE:
        blendable, reason = False, f"recomputing everything is {every:.2g} nats away from full prefill"
    fresh = _Bench(model)
    fresh.prefill(QUESTIONS[0], TEXTS, "none")
    exact = fresh.divergence("none")
    enough = [b for b in BUDGETS if divergence and divergence[str(b)] <= _enough(divergence["0"])]
    return CheckReport(
        model=model.name,
        fingerprint=model.fingerprint,
        blendable=blendable,
        reason=reason,
        rotation_error=rotation,
        all_divergence=every,
        exact_divergence=exact,
        divergence=divergence,
        recompute=(enough[0] if enough else 1.0) if blendable else None,
    )


def _enough(plain: float) -> float:
    return max(ENOUGH_SHARE * plain, ENOUGH_NATS)


class _Bench:
    """A backend with an empty store in memory."""

    def __init__(self, model: LanguageModel) -> None:
        settings, store, typesetter = Settings(max_tokens=1), MemoryStore(), Typesetter(model)
        preamble = prefix_of(typesetter, DEFAULT_SYSTEM)
        span = Span(tuple(token for part in preamble for token in part.token_ids))
        composer = Composer(model, store, settings.namespace, span)
        self._model, self._store = model, store
        self._backend = LocalBackend(model, store, composer, settings.blend, lambda: 0.0)
        chunker = Chunker(model, typesetter, settings.split)
        self._corpus = Corpora(store.database, settings.namespace, chunker).open("")
        self._requests = RequestBuilder(model, chunker, typesetter, BM25Retriever(), self._backend, settings)

    def prefill(self, question: str, texts: Sequence[str], blend: Blend) -> Prefill:
        request = self._requests.for_question(0.0, question, Scope(self._corpus, context=texts), None, 1)
        return self._backend.prefill(request, BlendSettings.parse(blend), NEVER)

    def divergence(self, blend: Blend) -> float:
        """Mean KL of the next token against full prefill over all questions, with the texts in their original order."""
        total = 0.0
        for question in QUESTIONS:
            prefill = self.prefill(question, TEXTS, blend)
            truth = _full(self._model, prefill).log_softmax(-1)
            total += float((truth.exp() * (truth - prefill.logits.cpu().log_softmax(-1))).sum())
        return total / len(QUESTIONS)


@torch.no_grad()
def _full(model: LanguageModel, prefill: Prefill) -> torch.Tensor:
    logits: torch.Tensor = model.hf(prefill.token_ids[None].to(model.device)).logits[0, -1]
    return logits.float().cpu()


@torch.no_grad()
def _rotation_error(model: LanguageModel, distance: int = 300) -> float:
    """Compare keys computed at position 0 and moved by `distance` with keys that the model computed there."""
    ids = model.tokenize(TEXTS[0], markup=False)
    here = model.new_cache(len(ids))
    model.append(ids, here)
    entry = here.entry(EntryKey("", "", "", ""), ids, 0, ())
    moved = BlendedCache(model.anatomy.groups, distance + len(ids), model.dtype, model.device)
    moved.load(entry, distance)
    there = DynamicCache()
    positions = torch.arange(distance, distance + len(ids), device=model.device)[None]
    inputs = torch.tensor([ids], device=model.device)
    model.hf.base_model(input_ids=inputs, position_ids=positions, past_key_values=there, use_cache=True)
    worst = 0.0
    for layer, expected in zip(moved.blended, there.layers, strict=True):
        keys: torch.Tensor = expected.keys  # type: ignore[assignment,union-attr]
        worst = max(worst, float((layer.keys[0, :, distance:] - keys[0]).abs().max() / keys.abs().max()))
    return worst
