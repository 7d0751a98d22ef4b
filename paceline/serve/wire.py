"""Bodies in, replies and errors out: what is the same for every endpoint, and the two APIs' forms of an error."""

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
Result = TypeVar("Result")


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, which others cannot reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's JSON body. Raises BodyTooLarge, or BadField for what is no JSON or does not fit `kind`."""
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
        raise BadField(f"the body is no JSON: {error}") from error


def reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def event(content: Any, name: str = "") -> bytes:
    """One server-sent event."""
    head = b"event: " + name.encode() + b"\n" if name else b""
    return head + b"data: " + msgspec.json.encode(content) + b"\n\n"


@dataclass(frozen=True)
class _Kind:
    status: int
    openai: str
    anthropic: str
    code: str | None = None


_INTERNAL = _Kind(500, "server_error", "api_error")
_KINDS: tuple[tuple[type[PacelineError], _Kind], ...] = (
    (ContextExceeded, _Kind(400, "invalid_request_error", "invalid_request_error", "context_length_exceeded")),
    (RequestError, _Kind(400, "invalid_request_error", "invalid_request_error")),
    (InputError, _Kind(400, "invalid_request_error", "invalid_request_error")),
    (Unauthorized, _Kind(401, "authentication_error", "authentication_error", "invalid_api_key")),
    (NotFound, _Kind(404, "not_found_error", "not_found_error")),
    (UnknownModel, _Kind(404, "not_found_error", "not_found_error", "model_not_found")),
    (SlowBody, _Kind(408, "invalid_request_error", "timeout_error")),
    (BodyTooLarge, _Kind(413, "invalid_request_error", "request_too_large")),
    (Overloaded, _Kind(429, "rate_limit_error", "overloaded_error", "overloaded")),
    (TimedOut, _Kind(504, "server_error", "timeout_error", "timeout")),
)


def _kind(error: PacelineError) -> _Kind:
    return next((kind for each, kind in _KINDS if isinstance(error, each)), _INTERNAL)


class OpenAIForm:
    """Errors as OpenAI's API words them."""

    def status(self, error: PacelineError) -> int:
        return _kind(error).status

    def body(self, error: PacelineError) -> dict[str, Any]:
        kind = _kind(error)
        field = error.field or None if isinstance(error, BadField) else None
        return {"error": {"message": str(error), "type": kind.openai, "param": field, "code": kind.code}}

    def event(self, error: PacelineError) -> bytes:
        return event(self.body(error))

    def idle(self) -> bytes:
        """What a stream with nothing to say sends, so that nobody on the way takes it for dead: a comment."""
        return b": waiting\n\n"

    def response(self, error: PacelineError) -> Response:
        headers = {"retry-after": str(error.retry_after)} if isinstance(error, Overloaded) else {}
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        return reply(self.body(error), self.status(error), headers)


class AnthropicForm(OpenAIForm):
    """Errors as Anthropic's API words them; an overload is its own 529."""

    def status(self, error: PacelineError) -> int:
        return 529 if isinstance(error, Overloaded) else _kind(error).status

    def body(self, error: PacelineError) -> dict[str, Any]:
        return {"type": "error", "error": {"type": _kind(error).anthropic, "message": str(error)}}

    def event(self, error: PacelineError) -> bytes:
        return event(self.body(error), "error")

    def idle(self) -> bytes:
        return event({"type": "ping"}, "ping")


OPENAI, ANTHROPIC = OpenAIForm(), AnthropicForm()


def form_for(path: str) -> OpenAIForm:
    return ANTHROPIC if path.startswith("/v1/messages") else OPENAI


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def while_there(receive: Receive) -> AsyncIterator[None]:
    """Cancels what the block waits for when the client goes, and raises ClientDisconnect.

    The request's body must have been read.
    """
    task = asyncio.current_task()
    assert task is not None
    watch = asyncio.ensure_future(_gone(receive))
    cut = False

    def end(watch: asyncio.Future[None]) -> None:
        nonlocal cut
        if not watch.cancelled():
            cut = True
            task.cancel()

    watch.add_done_callback(end)
    try:
        yield
    except asyncio.CancelledError:
        if cut and task.uncancel() == 0:  # else somebody cancels the whole task
            raise ClientDisconnect from None
        raise
    finally:
        watch.remove_done_callback(end)
        watch.cancel()


class EventStream(Response):
    """Server-sent events. However it ends, `close` is called; a client that goes ends it at once.

    One in which nothing is sent for `idle_seconds` says so, in its API's form.
    """

    idle_seconds = 10.0
    head = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    )

    def __init__(self, events: AsyncGenerator[bytes, None], form: OpenAIForm, close: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None  # what Response would set; its own way makes headers of a mapping
        self.raw_headers = list(self.head)
        self._events = events
        self._form = form
        self._close = close
        self._sent = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._idle: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(ClientDisconnect):
                async with while_there(receive):
                    await self._run(send)
        finally:
            self._end_beat()
            self._close()

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._sent = asyncio.get_running_loop().time()
        self._beat(send)
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
        self._end_beat()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._sent = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _beat(self, send: Send) -> None:
        """Says that nothing is to be said where that is so, and comes again when it may be so."""
        loop = asyncio.get_running_loop()
        left = self._sent + self.idle_seconds - loop.time()
        if left <= 0:
            self._idle = loop.create_task(self._send(send, self._form.idle()))
            left = self.idle_seconds
        self._timer = loop.call_later(left, self._beat, send)

    def _end_beat(self) -> None:
        for each in (self._timer, self._idle):
            if each is not None:
                each.cancel()


class Writes(Protocol):
    """Writes one answer, whole or as its events."""

    async def whole(self) -> Any: ...

    def stream(self) -> AsyncGenerator[bytes, None]: ...


async def written(
    http: Request, writer: Writes, streamed: bool, form: OpenAIForm, close: Callable[[], None]
) -> Response:
    """The reply that `writer` writes. However it ends, `close` is called; a client that goes ends it at once."""
    if streamed:
        return EventStream(writer.stream(), form, close)
    try:
        async with while_there(http.receive):
            return reply(await writer.whole())
    finally:
        close()
