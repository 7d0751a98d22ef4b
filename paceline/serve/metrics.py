"""Counters and histograms in Prometheus' form, one registry a server; names and meanings as vLLM has them."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from paceline.serve.host import Stream
from paceline.types import StepOutput, Usage

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Observes a host's streams. A request waits until its first output and runs from then on."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, help: str) -> Counter:
            return Counter(f"paceline:{name}", help, ["model_name"], registry=self.registry).labels(model)

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(f"paceline:{name}", help, ["model_name"], registry=self.registry).labels(model)

        def histogram(name: str, help: str) -> Histogram:
            full = f"paceline:{name}"
            return Histogram(full, help, ["model_name"], buckets=_SECONDS, registry=self.registry).labels(model)

        self.running = gauge("num_requests_running", "requests that have given output")
        self.waiting = gauge("num_requests_waiting", "requests without any output yet")
        self.first = histogram("time_to_first_token_seconds", "from arrival to the first output")
        self.between = histogram("inter_token_latency_seconds", "a step's time over its tokens, one value a step")
        self.whole = histogram("e2e_request_latency_seconds", "from arrival to the last output")
        self.prompt = counter("prompt_tokens", "prompt tokens of finished requests")
        self.generated = counter("generation_tokens", "tokens written")
        self.queried = counter("prefix_cache_queries", "prompt tokens looked up in the prefix cache")
        self.hits = counter("prefix_cache_hits", "prompt tokens found in the prefix cache")
        self.drafted = counter("spec_decode_num_draft_tokens", "tokens drafted")
        self.accepted = counter("spec_decode_num_accepted_tokens", "drafted tokens accepted")
        self.succeeded = counter("request_success", "requests that came to their end")
        self.cancelled = counter("request_cancelled", "requests that were given up or failed")

    def opened(self, stream: Stream) -> None:
        self.waiting.inc()

    def output(self, stream: Stream, output: StepOutput) -> None:
        now = time.perf_counter()
        if stream.num_outputs == 0:
            self.waiting.dec()
            self.running.inc()
            self.first.observe(now - stream.started)
        elif output.tokens:
            self.between.observe((now - stream.latest) / len(output.tokens))
        self.generated.inc(len(output.tokens))
        if output.usage is not None:
            self._finished(output.usage)
            self.whole.observe(now - stream.started)

    def closed(self, stream: Stream, finished: bool) -> None:
        (self.running if stream.num_outputs else self.waiting).dec()
        (self.succeeded if finished else self.cancelled).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def _finished(self, usage: Usage) -> None:
        self.prompt.inc(usage.prompt_tokens)
        self.queried.inc(usage.prompt_tokens)
        self.hits.inc(usage.cached_tokens)
        self.drafted.inc(usage.drafted_tokens)
        self.accepted.inc(usage.accepted_tokens)
