"""Numbers for Prometheus, of one replica.

Each replica has a registry of its own, and a scrape through Ray Serve reaches any one of them. So every series carries
the replica's name: `sum(rate(edifice_generation_tokens_total[10m]))` is right for any number of replicas as long as
each is met a few times within the range.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.engine import Event
from serve.worker import Worker

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """What is exported about `worker`, labelled with the model and the replica."""

    def __init__(self, worker: Worker, model: str, replica: str = "") -> None:
        self.registry = CollectorRegistry()
        own = {"model": model, "replica": replica}

        def make(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options):
            metric = kind(f"edifice_{name}", text, (*own, *labels), registry=self.registry, **options)
            return metric.labels(**own) if not labels else lambda **more: metric.labels(**own, **more)

        scheduler = worker.engine.scheduler
        make(Gauge, "requests_running", "Completions that have a row").set_function(lambda: len(scheduler.running))
        make(Gauge, "requests_waiting", "Completions that wait for a row").set_function(lambda: len(scheduler.waiting))
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of accepted prompts")
        self.generation_tokens = make(Counter, "generation_tokens", "Tokens generated")
        self.first_token = make(
            Histogram, "time_to_first_token_seconds", "From acceptance to the first token", buckets=_SECONDS
        )
        self.between_tokens = make(
            Histogram, "inter_token_seconds", "Between two tokens of a completion", buckets=_SECONDS
        )
        self._outcomes = make(
            Counter,
            "requests",
            "Completions by outcome: stop, length, cancelled, failed; and calls refused: invalid, overloaded, failed",
            ("outcome",),
        )
        for outcome in ("stop", "length", "cancelled", "failed", "invalid", "overloaded"):
            self._outcomes(outcome=outcome)  # series that are there from the beginning can be summed

    def count(self, outcome: str, times: int = 1) -> None:
        self._outcomes(outcome=outcome).inc(times)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class Watch:
    """The numbers of one call with `rows` completions, from its acceptance on."""

    def __init__(self, metrics: Metrics, rows: int, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._last: list[float | None] = [None] * rows  # when each had its last token
        self._open = rows
        metrics.prompt_tokens.inc(prompt_tokens)

    def see(self, index: int, event: Event) -> None:
        metrics = self._metrics
        if event.token is not None:
            now, last = time.perf_counter(), self._last[index]
            if last is None:
                metrics.first_token.observe(now - self._started)
            else:
                metrics.between_tokens.observe(now - last)
            self._last[index] = now
            metrics.generation_tokens.inc()
        if event.reason is not None:
            self._open -= 1
            metrics.count(event.reason)

    def close(self, outcome: str) -> None:
        """Of what has not ended by itself; the first call counts."""
        if self._open:
            self._metrics.count(outcome, self._open)
        self._open = 0
