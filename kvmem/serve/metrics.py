"""Metrics for Prometheus. No label contains a namespace, document or text."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from kvmem.errors import ClosedError
from kvmem.prompt.plan import Plan
from kvmem.runtime.stream import AnswerStream
from kvmem.serve.gate import Gate
from kvmem.store.base import Store

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class Metrics:
    """The metrics of one server."""

    def __init__(self, store: Store, gate: Gate) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "kvmem_requests", "Requests, by route and HTTP status.", ["route", "status"], registry=registry
        )
        self._tokens = Counter(
            "kvmem_tokens", "Prompt tokens by class, and generated tokens.", ["kind"], registry=registry
        )
        self._fallbacks = Counter(
            "kvmem_fallbacks", "Prompts built with a fallback, by reason.", ["reason"], registry=registry
        )
        self._cancelled = Counter("kvmem_cancelled", "Cancelled answers.", registry=registry)
        self._first_token = Histogram(
            "kvmem_first_token_seconds",
            "Time from admission to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._queue_seconds = Histogram(
            "kvmem_queue_seconds", "Time from arrival to admission.", buckets=_SECONDS, registry=registry
        )
        Gauge("kvmem_queue_length", "Waiting requests.", registry=registry).set_function(lambda: gate.waiting)
        Gauge("kvmem_running", "Running requests.", registry=registry).set_function(lambda: gate.running)
        registry.register(_StoreCollector(store))

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def waited(self, seconds: float) -> None:
        self._queue_seconds.observe(seconds)

    def ended(self, stream: AnswerStream, blendable: bool) -> None:
        """Count an answer that has ended, successfully or not."""
        try:
            answer = stream.answer
        except ClosedError:
            self._cancelled.inc()
            return
        except Exception:  # already reported to the client
            return
        if answer.finish_reason == "cancelled":
            self._cancelled.inc()
        usage = answer.usage
        for kind in ("exact", "reused", "recomputed", "computed", "generated"):
            self._tokens.labels(kind).inc(getattr(usage, kind))
        self._first_token.observe(answer.timings.first_token)
        for reason in _fallbacks(answer.plan, blendable):
            self._fallbacks.labels(reason).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def _fallbacks(plan: Plan, blendable: bool) -> Iterator[str]:
    if plan.mode != "whole":
        yield "retrieval"
    if plan.dropped:
        yield "history_dropped"
    if not blendable:
        yield "prefix_only"


class _StoreCollector:
    """Reads the store's statistics when metrics are scraped."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        stats = self._store.stats()
        yield GaugeMetricFamily("kvmem_store_entries", "Entries in the store.", value=stats.entries)
        yield GaugeMetricFamily("kvmem_store_bytes", "Bytes of KV in the store.", value=stats.bytes)
        yield CounterMetricFamily("kvmem_store_hits", "Lookups that found an entry.", value=stats.hits)
        yield CounterMetricFamily("kvmem_store_misses", "Lookups that found no entry.", value=stats.misses)
        yield CounterMetricFamily("kvmem_store_evictions", "Entries evicted by this process.", value=stats.evicted)
