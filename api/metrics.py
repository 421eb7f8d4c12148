"""What Prometheus reads: requests counted here, jobs and workers read off the store when asked. Knows no routes."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.memory import MemoryReport
from jobs.reports import QueueReport, WorkerCard

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  #: seconds
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  #: sequences that drew a token in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the store answered for one scrape."""

    queue: QueueReport
    workers: Sequence[WorkerCard]
    memory: MemoryReport


class Metrics:
    """Counters of this process, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "headrace_http_requests",
            "Requests answered",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "headrace_http_request_seconds",
            "From the request's head to the answer's head",
            ("route",),
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """One answered request; ``route`` is the pattern, never the path a client wrote."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self, seen: Seen | None) -> bytes:
        """The text that Prometheus scrapes; None: the store did not answer."""
        fleet = CollectorRegistry()
        fleet.register(_Snapshot(seen))
        return bytes(generate_latest(self._registry) + generate_latest(fleet))


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot(Collector):
    seen: Seen | None

    def collect(self) -> Iterable[Metric]:
        answered = float(self.seen is not None)
        yield GaugeMetricFamily("headrace_store_up", "1 when Redis answered this scrape", value=answered)
        if self.seen is not None:
            yield from _of_queue(self.seen.queue)
            yield from _of_workers(self.seen.workers)
            yield from _of_memory(self.seen.memory)


def _of_queue(queue: QueueReport) -> Iterable[Metric]:
    jobs = GaugeMetricFamily("headrace_jobs", "Jobs that are remembered, by state", labels=("state",))
    for state, count in sorted(queue.states.items()):
        jobs.add_metric([str(state)], count)
    yield jobs
    yield GaugeMetricFamily("headrace_queue_depth", "Jobs that wait to be claimed", value=queue.queued)
    yield GaugeMetricFamily("headrace_dead_letters", "Jobs that killed their workers", value=queue.dead_letters)
    told = queue.callbacks
    yield GaugeMetricFamily("headrace_webhooks_pending", "Callbacks that wait to be delivered", value=told.waiting)
    yield CounterMetricFamily("headrace_webhooks_delivered", "Callbacks that were delivered", value=told.delivered)
    yield CounterMetricFamily("headrace_webhooks_failed", "Callbacks that were given up", value=told.failed)


def _of_memory(memory: MemoryReport) -> Iterable[Metric]:
    yield GaugeMetricFamily("headrace_store_memory_bytes", "Memory Redis counts as used", value=memory.used_bytes)
    limit = "Redis' maxmemory; 0: no limit. Submissions are refused above 80 % of it"
    yield GaugeMetricFamily("headrace_store_memory_limit_bytes", limit, value=memory.limit_bytes)


def _of_workers(workers: Sequence[WorkerCard]) -> Iterable[Metric]:
    states = GaugeMetricFamily("headrace_workers", "Live workers, by state", labels=("state",))
    for state, count in sorted(Counts(worker.state for worker in workers).items()):
        states.add_metric([state], count)
    yield states
    running = sum(worker.running for worker in workers)
    yield GaugeMetricFamily("headrace_running_jobs", "Jobs inside engines", value=running)
    for name, key, text in (
        ("headrace_steps", "steps", "Engine steps of live workers"),
        ("headrace_tokens_generated", "generated_tokens", "Tokens drawn by live workers"),
        ("headrace_prompt_tokens", "prompt_tokens", "Prompt tokens read by live workers"),
        ("headrace_cached_tokens", "cached_tokens", "Prompt tokens that live workers knew already"),
        ("headrace_preemptions", "preemptions", "Sequences that gave their memory back, to be read again"),
    ):
        yield CounterMetricFamily(name, text, value=sum(float(worker.stats.get(key, 0)) for worker in workers))
    yield _decode_rows(workers)


def _decode_rows(workers: Sequence[WorkerCard]) -> Metric:
    steps = Counts[int]()
    for worker in workers:
        steps.update({int(rows): int(count) for rows, count in worker.stats.get("decode_rows", {}).items()})
    buckets = [(f"{edge:.1f}", sum(count for rows, count in steps.items() if rows <= edge)) for edge in ROW_BUCKETS]
    return HistogramMetricFamily(
        "headrace_decode_rows",
        "Sequences that drew a token in one step, over live workers",
        buckets=[*buckets, ("+Inf", steps.total())],
        sum_value=sum(rows * count for rows, count in steps.items()),
    )
