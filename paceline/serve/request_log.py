"""The request log: one line for each request, and a span if tracing is on. Prompts and outputs are never logged."""

from __future__ import annotations

import contextvars
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.serve.host import Stream

_log = logging.getLogger("paceline.requests")
ROUTE_KEY = "paceline.route"  # key in an ASGI scope: the matched route, with its {name} parts
_UNLOGGED = ("/", "/health", "/metrics", "/api/hello")  # polled by monitoring
_current: contextvars.ContextVar[RequestRecord | None] = contextvars.ContextVar("exchange", default=None)


@dataclass
class RequestRecord:
    """One request and its outcome. `started` and `ended` are by `time.perf_counter`, `arrived` is in seconds since 1970.

    If the client disconnected before the reply was complete, `client_gone` is true, and `status` is the one that had been
    sent, or 499.
    """

    id: str
    method: str
    path: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    arrived: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    status: int = 499
    client_gone: bool = True
    streams: list[Stream] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """The fields of the log line: times in milliseconds, counts of tokens."""
        fields: dict[str, Any] = {
            "id": self.id,
            "endpoint": f"{self.method} {self.path}",
            "status": self.status,
            "gone": self.client_gone,
            "total_ms": round(1000 * (self.ended - self.started), 1),
        }
        for stream in self.streams:
            usage = stream.usage
            fields["prompt_tokens"] = fields.get("prompt_tokens", 0) + len(stream.request.prompt)
            fields["output_tokens"] = fields.get("output_tokens", 0) + stream.num_tokens
            if stream.first:
                fields.setdefault("first_ms", round(1000 * (stream.first - self.started), 1))
            if usage is not None:
                fields.setdefault("queue_ms", round(1000 * usage.queue_seconds, 1))
                for name in ("cached_tokens", "drafted_tokens", "accepted_tokens"):
                    fields[name] = fields.get(name, 0) + getattr(usage, name)
        return fields


def attach_stream(stream: Stream) -> None:
    """Attaches an engine request's stream to the HTTP request of the current task, if there is one."""
    record = _current.get()
    if record is not None:
        record.streams.append(stream)


class RequestLog:
    """ASGI middleware that logs each request when it ends and passes it to `trace`.

    Replies carry the request's id in the headers x-request-id and request-id.
    """

    def __init__(self, app: ASGIApp, trace: Callable[[RequestRecord], None] | None = None) -> None:
        self._app = app
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # the route, as ids in paths would make each request an endpoint of its own
        path = scope.get(ROUTE_KEY, scope["path"][:100])
        record = RequestRecord(f"req_{secrets.token_hex(12)}", scope["method"], path, scope["headers"])
        _current.set(record)  # each request's task has its own context
        name = record.id.encode()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name), (b"request-id", name)]
            elif not message.get("more_body") and record.status != 499:
                record.client_gone = False
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            record.ended = time.perf_counter()
            if record.path not in _UNLOGGED:
                self._write(record)

    def _write(self, record: RequestRecord) -> None:
        if _log.isEnabledFor(logging.INFO):
            _log.info("request", extra={"fields": record.fields()})
        if self._trace is not None:
            self._trace(record)


class JsonFormatter(logging.Formatter):
    """Formats a log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Formats a log record as a line of text, with a request's fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        written = (f"{name}={json.dumps(value)}" for name, value in fields.items())
        return " ".join([super().formatMessage(record), *written])
