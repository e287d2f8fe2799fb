"""Numbers for Prometheus, with the names and meanings of vLLM's: `vllm:num_requests_running` is
`edifice_num_requests_running` here.

What belongs to a model's engine comes from its backend when somebody asks; what belongs to requests, times above all,
is counted here, where clients feel it. Each gateway has numbers of its own, and a scrape through Ray Serve reaches any
one of them. So every series carries the gateway's name: `sum(rate(edifice_generation_tokens_total[10m]))` is right for
any number of gateways as long as each is met a few times within the range.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from serve import timing
from serve.request import Event, Request

_LATENCY = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
FINISHED = ("stop", "length", "cancelled", "deadline", "failed")
REFUSED = ("invalid", "overloaded", "failed")

# Of an engine, or the sum over a model's replicas: name, number of `stats` and what it is; counters are marked.
_GAUGES = [
    ("num_requests_running", "running", "Completions that have a row"),
    ("num_requests_waiting", "waiting", "Completions that wait for a row"),
    ("num_rows", "rows", "Rows there are"),
]
_COUNTERS = [
    ("prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache"),
    ("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache"),
    ("prefix_cache_evictions", "evictions", "Blocks that the prefix cache gave up"),
    ("num_preemptions", "preemptions", "Times a completion gave its memory back to go on later"),
    ("spec_decode_num_drafts", "drafts", "Times that tokens were guessed"),
    ("spec_decode_num_draft_tokens", "drafted", "Tokens that were guessed"),
    ("spec_decode_num_accepted_tokens", "accepted", "Guessed tokens that were right"),
    ("num_steps", "steps", "Steps of the engine"),
    ("num_generated_tokens", "generated", "Tokens that the engine generated, also for clients that had gone"),
    ("num_requests_moved", "moved", "Completions that went on in another replica"),
]
_HISTOGRAMS = [  # and the kind of `serve.timing`
    ("request_queue_time_seconds", "queue", "From the engine's door to a row"),
    ("request_prefill_time_seconds", "prefill", "From a row to the first token"),
    ("request_decode_time_seconds", "decode", "From the first token to the end"),
    ("request_inference_time_seconds", "inference", "From a row to the end"),
    ("iteration_tokens_total", "step", "Tokens that a step of the engine computed"),
]


class Source(Protocol):
    def stats(self) -> Mapping[str, float]: ...


class Metrics:
    """What is told about one model, labelled with its name and the gateway's."""

    def __init__(self, backend: Source, model: str, replica: str = "") -> None:
        self.registry = CollectorRegistry()
        self._backend, self._own = backend, {"model_name": model, "replica": replica}
        self.registry.register(self)

        def make(kind: type, name: str, text: str, **options):
            metric = kind(f"edifice_{name}", text, [*self._own], registry=self.registry, **options)
            return metric.labels(**self._own)

        def by(label: str, values: Sequence[str], name: str, text: str) -> dict[str, Counter]:
            """Series that are there from the beginning can be summed."""
            metric = Counter(f"edifice_{name}", text, [*self._own, label], registry=self.registry)
            return {value: metric.labels(**self._own, **{label: value}) for value in values}

        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of accepted prompts")
        self.generation_tokens = make(Counter, "generation_tokens", "Tokens generated")
        self.first_token = make(
            Histogram, "time_to_first_token_seconds", "From acceptance to the first token", buckets=_LATENCY
        )
        self.between_tokens = make(
            Histogram, "inter_token_latency_seconds", "Between two tokens of a completion", buckets=_BETWEEN
        )
        self.per_token = make(
            Histogram, "request_time_per_output_token_seconds", "Its average over a completion", buckets=_BETWEEN
        )
        self.whole = make(Histogram, "e2e_request_latency_seconds", "From acceptance to the end", buckets=_WHOLE)
        self.prompt_size = make(Histogram, "request_prompt_tokens", "Tokens of a prompt", buckets=_TOKENS)
        self.size = make(Histogram, "request_generation_tokens", "Tokens of a completion", buckets=_TOKENS)
        self.most = make(Histogram, "request_params_max_tokens", "max_tokens of a completion", buckets=_TOKENS)
        self.finished = by(
            "finished_reason", FINISHED, "request_success", "Completions by how they ended, also those that did not"
        )
        self._refused = by("reason", REFUSED, "request_refused", "Calls that were not taken in")

    def refuse(self, reason: str) -> None:
        self._refused[reason].inc()

    def collect(self) -> Iterator[Metric]:
        """What the backend tells now."""
        stats = self._backend.stats()
        labels, values = [*self._own], [*self._own.values()]
        pages = stats.get("pages_used", 0) / max(stats.get("pages_total", 0), 1)
        told = [(name, text, stats[key]) for name, key, text in _GAUGES if key in stats]
        for name, text, value in [*told, ("kv_cache_usage_perc", "Part of the pages that is in use, 1 is all", pages)]:
            family = GaugeMetricFamily(f"edifice_{name}", text, labels=labels)
            family.add_metric(values, value)
            yield family
        for name, key, text in _COUNTERS:
            if key in stats:
                family = CounterMetricFamily(f"edifice_{name}", text, labels=labels)
                family.add_metric(values, stats[key])
                yield family
        for name, kind, text in _HISTOGRAMS:
            found = timing.read(stats, kind)
            if found is not None:
                family = HistogramMetricFamily(f"edifice_{name}", text, labels=labels)
                family.add_metric(values, *found)
                yield family


def exposition(models: Iterable[Metrics]) -> bytes:
    """Of all models together, in Prometheus' text format."""

    class Together:
        def collect(self) -> Iterable[Metric]:
            families: dict[str, Metric] = {}
            for metrics in models:
                for family in metrics.registry.collect():
                    families.setdefault(family.name, family)
                    if families[family.name] is not family:
                        families[family.name].samples += family.samples
            return families.values()

    return generate_latest(Together())


class Watch:
    """The numbers of one call with some requests, from its acceptance on. prompt_tokens: that it is charged for."""

    def __init__(self, metrics: Metrics, requests: Sequence[Request], prompt_tokens: int) -> None:
        self._metrics, self._begun = metrics, time.perf_counter()
        self._first: dict[int, float] = {}  # when each had its first token
        self._last: dict[int, float] = {}
        self._tokens = [0] * len(requests)
        self._open = len(requests)
        metrics.prompt_tokens.inc(prompt_tokens)
        for request in requests:
            metrics.prompt_size.observe(len(request.prompt))
            metrics.most.observe(request.sampling.max_tokens)

    def see(self, rows: Mapping[int, Sequence[Event]]) -> None:
        """Events that came at once."""
        metrics, now, total = self._metrics, time.perf_counter(), 0
        for index, events in rows.items():
            tokens = sum(event.token is not None for event in events)
            total += tokens
            self._tokens[index] += tokens
            if tokens:
                if index not in self._first:
                    self._first[index] = self._last[index] = now
                    metrics.first_token.observe(now - self._begun)
                    tokens -= 1
                for _ in range(tokens):
                    metrics.between_tokens.observe((now - self._last[index]) / tokens)
                self._last[index] = now
            if events[-1].reason is not None:
                self._end(index, events[-1].reason, now)
        metrics.generation_tokens.inc(total)

    def _end(self, index: int, reason: str, now: float) -> None:
        metrics, tokens = self._metrics, self._tokens[index]
        self._open -= 1
        metrics.finished[reason].inc()
        metrics.size.observe(tokens)
        metrics.whole.observe(now - self._begun)
        if tokens > 1:
            metrics.per_token.observe((now - self._first[index]) / (tokens - 1))

    def close(self, reason: str) -> None:
        """Of what has not ended by itself; the first call counts."""
        self._metrics.finished[reason].inc(self._open)
        self._open = 0
