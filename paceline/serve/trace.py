"""OpenTelemetry: one span for each request, with the attributes of its conventions for generative AI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from paceline.env import trace_endpoint
from paceline.serve.request_log import RequestRecord

_log = logging.getLogger(__name__)


def tracer(model: str) -> Callable[[RequestRecord], None] | None:
    """A function that exports a span for each request; None if OTEL_EXPORTER_OTLP_ENDPOINT is not set or the packages are
    not installed.
    """
    if not trace_endpoint():
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        _log.warning("tracing is requested, but its packages are not installed: pip install 'paceline[otel]'")
        return None
    provider = TracerProvider(resource=Resource.create({"service.name": "paceline"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return spans(provider.get_tracer("paceline"), model)


def spans(source: Any, model: str) -> Callable[[RequestRecord], None]:
    """A function that creates a request's span with the tracer `source`, as a child of the caller's span if it sent one."""
    from opentelemetry import propagate
    from opentelemetry.trace import SpanKind, Status, StatusCode

    def trace(record: RequestRecord) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in record.headers}
        began = int(record.arrived * 1e9)
        span = source.start_span(
            f"{record.method} {record.path}", propagate.extract(headers), SpanKind.SERVER, start_time=began
        )
        span.set_attributes(attributes(record, model))
        if record.status >= 500 or record.client_gone:
            span.set_status(Status(StatusCode.ERROR, "the client disconnected" if record.client_gone else None))
        span.end(began + int((record.ended - record.started) * 1e9))

    return trace


def attributes(record: RequestRecord, model: str) -> dict[str, Any]:
    fields = record.fields()
    found: dict[str, Any] = {
        "http.request.method": record.method,
        "url.path": record.path,
        "http.response.status_code": record.status,
        "gen_ai.response.id": record.id,
    }
    if record.streams:
        found |= {
            "gen_ai.operation.name": "text_completion" if record.path == "/v1/completions" else "chat",
            "gen_ai.provider.name": "paceline",
            "gen_ai.request.model": model,
            "gen_ai.usage.input_tokens": fields["prompt_tokens"],
            "gen_ai.usage.output_tokens": fields["output_tokens"],
            "gen_ai.usage.cache_read.input_tokens": fields.get("cached_tokens", 0),
        }
    if "first_ms" in fields:
        found["gen_ai.server.time_to_first_token"] = fields["first_ms"] / 1000
    return found
