"""OpenTelemetry: one span a request, with the attributes of its conventions for generative AI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from paceline.env import trace_endpoint
from paceline.serve.journal import Exchange

_log = logging.getLogger(__name__)


def tracer(model: str) -> Callable[[Exchange], None] | None:
    """Makes spans of requests, or None where OTEL_EXPORTER_OTLP_ENDPOINT is not set or the packages are absent."""
    if not trace_endpoint():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("traces are asked for, but the packages are not there: pip install 'paceline[otel]'")
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": "paceline"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return spans(provider.get_tracer("paceline"), model)


def spans(source: Any, model: str) -> Callable[[Exchange], None]:
    """Makes a span of each request, under its caller's where it names one, with an OpenTelemetry tracer."""
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind, Status, StatusCode

    def trace(exchange: Exchange) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers}
        began = int(exchange.arrived * 1e9)
        span = source.start_span(
            f"{exchange.method} {exchange.path}", propagate.extract(headers), SpanKind.SERVER, start_time=began
        )
        span.set_attributes(attributes(exchange, model))
        if exchange.status >= 500 or exchange.gone:
            span.set_status(Status(StatusCode.ERROR, "the client went" if exchange.gone else None))
        span.end(began + int((exchange.ended - exchange.started) * 1e9))

    return trace


def attributes(exchange: Exchange, model: str) -> dict[str, Any]:
    fields = exchange.fields()
    found: dict[str, Any] = {
        "http.request.method": exchange.method,
        "url.path": exchange.path,
        "http.response.status_code": exchange.status,
        "gen_ai.response.id": exchange.id,
    }
    if exchange.streams:
        found |= {
            "gen_ai.operation.name": "text_completion" if exchange.path == "/v1/completions" else "chat",
            "gen_ai.provider.name": "paceline",
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": fields["prompt_tokens"],
            "gen_ai.usage.output_tokens": fields["output_tokens"],
            "gen_ai.usage.cache_read.input_tokens": fields.get("cached_tokens", 0),
        }
    if "first_ms" in fields:
        found["gen_ai.server.time_to_first_token"] = fields["first_ms"] / 1000
    return found
