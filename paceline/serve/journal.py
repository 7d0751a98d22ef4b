"""One line a request in the log, and a span where traces are asked for. Never what was asked or answered."""

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
ROUTE = "paceline.route"  # in an ASGI scope: the route of its path, which has {names} where paths differ
_QUIET = ("/", "/health", "/metrics", "/api/hello")  # what watches a server asks for
_current: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar("exchange", default=None)


@dataclass
class Exchange:
    """A request and what became of it. `started` and `ended` are by `time.perf_counter`, `arrived` is since 1970.

    Where the client went before the reply was whole, `gone` is true and `status` what had been sent, or 499.
    """

    id: str
    method: str
    path: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    arrived: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    status: int = 499
    gone: bool = True
    streams: list[Stream] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """What the log tells: times in milliseconds, counts of tokens."""
        told: dict[str, Any] = {
            "id": self.id,
            "endpoint": f"{self.method} {self.path}",
            "status": self.status,
            "gone": self.gone,
            "total_ms": round(1000 * (self.ended - self.started), 1),
        }
        for stream in self.streams:
            usage = stream.usage
            told["prompt_tokens"] = told.get("prompt_tokens", 0) + len(stream.request.prompt)
            told["output_tokens"] = told.get("output_tokens", 0) + stream.num_tokens
            if stream.first:
                told.setdefault("first_ms", round(1000 * (stream.first - self.started), 1))
            if usage is not None:
                told.setdefault("queue_ms", round(1000 * usage.queue_seconds, 1))
                for name in ("cached_tokens", "drafted_tokens", "accepted_tokens"):
                    told[name] = told.get(name, 0) + getattr(usage, name)
        return told


def note(stream: Stream) -> None:
    """Counts a stream to the request that is being answered, if one is."""
    exchange = _current.get()
    if exchange is not None:
        exchange.streams.append(stream)


class Journal:
    """Logs each request when it ends and gives it to `trace`. Replies carry its id as x-request-id and request-id."""

    def __init__(self, app: ASGIApp, trace: Callable[[Exchange], None] | None = None) -> None:
        self._app = app
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope.get(ROUTE, scope["path"][:100])  # an id in a path would make an endpoint of every request
        exchange = Exchange(f"req_{secrets.token_hex(12)}", scope["method"], path, scope["headers"])
        _current.set(exchange)  # the request's task has a context of its own
        name = exchange.id.encode()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name), (b"request-id", name)]
            elif not message.get("more_body") and exchange.status != 499:
                exchange.gone = False
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            exchange.ended = time.perf_counter()
            if exchange.path not in _QUIET:
                self._write(exchange)

    def _write(self, exchange: Exchange) -> None:
        if _log.isEnabledFor(logging.INFO):
            _log.info("request", extra={"fields": exchange.fields()})
        if self._trace is not None:
            self._trace(exchange)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"), "level": record.levelname}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """A record as a line to read, a request's fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        told = (f"{name}={json.dumps(value)}" for name, value in fields.items())
        return " ".join([super().formatMessage(record), *told])
