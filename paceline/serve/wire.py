"""What all endpoints share: reading bodies, writing replies and event streams, and the two APIs' error formats."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from paceline.errors import (
    BadField,
    BodyTooLarge,
    ContextExceeded,
    InputError,
    NotFound,
    Overloaded,
    PacelineError,
    RequestError,
    SlowBody,
    TimedOut,
    Unauthorized,
    UnknownModel,
)

_log = logging.getLogger(__name__)
Body = TypeVar("Body")


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's loopback, which other machines cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's JSON body. Raises BodyTooLarge, or BadField if it is not JSON or does not match `kind`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; the limit is {limit}")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge(f"the body has more than the limit of {limit} bytes")
        parts.append(part)
    try:
        return msgspec.json.decode(b"".join(parts), type=kind)
    except msgspec.ValidationError as error:
        found = re.search(r" - at `\$\.?(.*)`$", str(error))
        raise BadField(str(error), found[1] if found else "") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadField(f"the body is not valid JSON: {error}") from error


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def event(content: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(content) + b"\n\n"


@dataclass(frozen=True)
class _ErrorKind:
    status: int
    openai: str
    anthropic: str
    code: str | None = None


_INTERNAL = _ErrorKind(500, "server_error", "api_error")
_KINDS: tuple[tuple[type[PacelineError], _ErrorKind], ...] = (
    (ContextExceeded, _ErrorKind(400, "invalid_request_error", "invalid_request_error", "context_length_exceeded")),
    (RequestError, _ErrorKind(400, "invalid_request_error", "invalid_request_error")),
    (InputError, _ErrorKind(400, "invalid_request_error", "invalid_request_error")),
    (Unauthorized, _ErrorKind(401, "authentication_error", "authentication_error", "invalid_api_key")),
    (NotFound, _ErrorKind(404, "not_found_error", "not_found_error")),
    (UnknownModel, _ErrorKind(404, "not_found_error", "not_found_error", "model_not_found")),
    (SlowBody, _ErrorKind(408, "invalid_request_error", "timeout_error")),
    (BodyTooLarge, _ErrorKind(413, "invalid_request_error", "request_too_large")),
    (Overloaded, _ErrorKind(429, "rate_limit_error", "overloaded_error", "overloaded")),
    (TimedOut, _ErrorKind(504, "server_error", "timeout_error", "timeout")),
)


def _kind(error: PacelineError) -> _ErrorKind:
    return next((kind for each, kind in _KINDS if isinstance(error, each)), _INTERNAL)


class OpenAIErrorFormat:
    """Errors in the format of OpenAI's API."""

    def status(self, error: PacelineError) -> int:
        return _kind(error).status

    def body(self, error: PacelineError) -> dict[str, Any]:
        kind = _kind(error)
        field = error.field or None if isinstance(error, BadField) else None
        return {"error": {"message": str(error), "type": kind.openai, "param": field, "code": kind.code}}

    def event(self, error: PacelineError) -> bytes:
        return event(self.body(error))

    def keep_alive(self) -> bytes:
        """The keep-alive of an idle stream, an SSE comment: without it, clients or proxies may close the connection."""
        return b": waiting\n\n"

    def response(self, error: PacelineError) -> Response:
        headers = {"retry-after": str(error.retry_after)} if isinstance(error, Overloaded) else {}
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        return reply(self.body(error), self.status(error), headers)


class AnthropicErrorFormat(OpenAIErrorFormat):
    """Errors in the format of Anthropic's API. An overload has its own status, 529."""

    def status(self, error: PacelineError) -> int:
        return 529 if isinstance(error, Overloaded) else _kind(error).status

    def body(self, error: PacelineError) -> dict[str, Any]:
        return {"type": "error", "error": {"type": _kind(error).anthropic, "message": str(error)}}

    def event(self, error: PacelineError) -> bytes:
        return event(self.body(error), "error")

    def keep_alive(self) -> bytes:
        return event({"type": "ping"}, "ping")


OPENAI, ANTHROPIC = OpenAIErrorFormat(), AnthropicErrorFormat()


def error_format_for(path: str) -> OpenAIErrorFormat:
    return ANTHROPIC if path.startswith("/v1/messages") else OPENAI


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client disconnects, and raises ClientDisconnect.

    The request's body must have been read.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.ensure_future(_disconnected(receive))
    disconnected = False

    def end(watch: asyncio.Future[None]) -> None:
        nonlocal disconnected
        if not watch.cancelled():
            disconnected = True
            task.cancel()

    watch.add_done_callback(end)
    try:
        yield
    except asyncio.CancelledError:
        if disconnected and task.uncancel() == 0:  # otherwise the whole task is being cancelled
            raise ClientDisconnect from None
        raise
    finally:
        watch.remove_done_callback(end)
        watch.cancel()


class EventStream(Response):
    """A response of server-sent events. `close` is called however it ends; a disconnect of the client ends it at once.

    After `idle_seconds` without an event it sends a keep-alive in its API's format.
    """

    idle_seconds = 10.0
    head = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )

    def __init__(self, events: AsyncGenerator[bytes, None], form: OpenAIErrorFormat, close: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None  # set here, as Response's constructor would build its own headers
        self.raw_headers = list(self.head)
        self._events = events
        self._form = form
        self._close = close
        self._sent = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive_task: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                async with cancel_on_disconnect(receive):
                    await self._run(send)
        finally:
            self._stop_keep_alive()
            self._close()

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._sent = asyncio.get_running_loop().time()
        self._keep_alive(send)
        async with contextlib.aclosing(self._events) as events:
            try:
                async for each in events:
                    await self._send(send, each)
            except PacelineError as error:
                await self._send(send, self._form.event(error))
            except OSError:
                return
            except Exception:
                _log.exception("a stream failed")
                await self._send(send, self._form.event(PacelineError("the server failed; its log says why")))
        self._stop_keep_alive()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _keep_alive(self, send: Send) -> None:
        """Sends a keep-alive after `idle_seconds` of silence, then re-arms the timer."""
        loop = asyncio.get_running_loop()
        left = self._sent + self.idle_seconds - loop.time()
        if left <= 0:
            self._keep_alive_task = loop.create_task(self._send(send, self._form.keep_alive()))
            left = self.idle_seconds
        self._timer = loop.call_later(left, self._keep_alive, send)

    def _stop_keep_alive(self) -> None:
        for each in (self._timer, self._keep_alive_task):
            if each is not None:
                each.cancel()


class AnswerWriter(Protocol):
    """Writes one answer, as a whole object or as its events."""

    async def whole(self) -> Any: ...

    def stream(self) -> AsyncGenerator[bytes, None]: ...


async def answer_response(
    http: Request, writer: AnswerWriter, streamed: bool, form: OpenAIErrorFormat, close: Callable[[], None]
) -> Response:
    """The HTTP response with the output of `writer`. `close` is called however it ends; a disconnect ends it at once."""
    if streamed:
        return EventStream(writer.stream(), form, close)
    try:
        async with cancel_on_disconnect(http.receive):
            return reply(await writer.whole())
    finally:
        close()
