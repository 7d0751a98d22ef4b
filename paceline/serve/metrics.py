"""Prometheus metrics, with one registry for each server. Names and meanings are vLLM's."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from paceline.engine.client import EngineClient
from paceline.serve.host import Stream
from paceline.types import StepOutput, Usage

# bounds of the histogram buckets, in seconds
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """An Observer of a host's streams that counts metrics.

    A request counts as waiting until its first output and as running from then on. After `watch_engine` these numbers come
    from the engine instead.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help: str) -> Total:
            return Total(f"paceline:{name}", help, ["model_name"], registry=self.registry).labels(model)

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(f"paceline:{name}", help, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, help: str) -> Histogram:
            full = f"paceline:{name}"
            return Histogram(full, help, ["model_name"], buckets=_SECONDS, registry=self.registry).labels(model)

        self.running = gauge("num_requests_running", "requests in the batch")
        self.waiting = gauge("num_requests_waiting", "requests that wait for a place in the batch")
        self.cache_use = gauge("kv_cache_usage_perc", "share of the KV cache that requests hold, from 0 to 1")
        self.time_to_first_token = histogram("time_to_first_token_seconds", "from arrival to the first output")
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "a step's time divided by its tokens, one value for each step"
        )
        self.request_latency = histogram("e2e_request_latency_seconds", "from arrival to the last output")
        self.queue_time = histogram("request_queue_time_seconds", "from arrival to a place in the batch")
        self.prompt = counter("prompt_tokens", "prompt tokens of finished requests")
        self.generated = counter("generation_tokens", "tokens generated")
        self.prefix_queries = counter("prefix_cache_queries", "prompt tokens looked up in the prefix cache")
        self.prefix_hits = counter("prefix_cache_hits", "prompt tokens found in the prefix cache")
        self.succeeded = counter("request_success", "requests that finished")
        self.cancelled = counter("request_cancelled", "requests that were cancelled or failed")
        self.drafts = DraftMetrics(model)
        self.registry.register(self.drafts)

    def watch_engine(self, engine: EngineClient) -> None:
        """Reads running and waiting requests and the use of the KV cache from `engine`, each time metrics are rendered."""

        def running() -> int:
            stats = engine.stats()
            return stats.num_running + stats.num_prefilling

        def used() -> float:
            stats = engine.stats()
            return stats.pages_held / stats.pages_total

        self.running.set_function(running)
        self.waiting.set_function(lambda: engine.stats().num_waiting)
        self.cache_use.set_function(used)

    def opened(self, stream: Stream) -> None:
        self.waiting.inc()

    def output(self, stream: Stream, output: StepOutput) -> None:
        now = time.perf_counter()
        if stream.num_outputs == 0:
            self.waiting.dec()
            self.running.inc()
            self.time_to_first_token.observe(now - stream.started)
        elif output.tokens:
            self.inter_token_latency.observe((now - stream.latest) / len(output.tokens))
        self.generated.inc(len(output.tokens))
        if output.drafted:
            self.drafts.add(bool(stream.request.sources), output.drafted, sum(output.accepted))
        if output.finish is not None and output.usage is not None:
            self._finished(output.usage)
            self.request_latency.observe(now - stream.started)

    def closed(self, stream: Stream, finished: bool) -> None:
        (self.running if stream.num_outputs else self.waiting).dec()
        (self.succeeded if finished else self.cancelled).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _finished(self, usage: Usage) -> None:
        self.prompt.inc(usage.prompt_tokens)
        self.prefix_queries.inc(usage.prompt_tokens)
        self.prefix_hits.inc(usage.cached_tokens)
        self.queue_time.observe(usage.queue_seconds)


class _DrafterCounts:
    def __init__(self) -> None:
        self.drafts = self.drafted = 0
        self.accepted: Counter[int] = Counter()  # number of drafts by accepted tokens


class DraftMetrics(Collector):
    """Counts of speculative decoding by drafter, collected by Prometheus' registry.

    `copy` drafts from the prompt only, `prediction` also from the request's sources. Position 0 is a draft's first token.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._by_name = {"copy": _DrafterCounts(), "prediction": _DrafterCounts()}

    def add(self, predicted: bool, drafted: int, accepted: int) -> None:
        """Counts one draft of `drafted` tokens, of which the first `accepted` were accepted."""
        drafter = self._by_name["prediction" if predicted else "copy"]
        drafter.drafts += 1
        drafter.drafted += drafted
        drafter.accepted[accepted] += 1

    def collect(self) -> Iterable[Metric]:
        labels = ["model_name", "drafter"]

        def family(name: str, help: str, *more: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"paceline:spec_decode_num_{name}", help, labels=[*labels, *more])

        drafts = family("drafts", "drafts made")
        drafted = family("draft_tokens", "tokens drafted")
        accepted = family("accepted_tokens", "drafted tokens accepted")
        positions = family(
            "accepted_tokens_per_pos", "drafted tokens accepted, by their place in the draft", "position"
        )
        for name, drafter in self._by_name.items():
            own = [self._model, name]
            drafts.add_metric(own, drafter.drafts)
            drafted.add_metric(own, drafter.drafted)
            accepted.add_metric(own, sum(length * count for length, count in drafter.accepted.items()))
            reached = drafter.drafts - drafter.accepted[0]
            for position in range(max(drafter.accepted, default=0)):
                positions.add_metric([*own, str(position)], reached)
                reached -= drafter.accepted[position + 1]
        return [drafts, drafted, accepted, positions]
