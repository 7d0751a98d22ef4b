"""The routes, the keys in front of them, and the engine's life around them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.errors import BadField, NotFound, PacelineError, SlowBody, Unauthorized
from paceline.serve.chat import chat, tokenize
from paceline.serve.compact import compacted
from paceline.serve.completions import completions
from paceline.serve.journal import Journal
from paceline.serve.messages import count_tokens, messages
from paceline.serve.openapi import document
from paceline.serve.page import live, page
from paceline.serve.responses import responses
from paceline.serve.service import Service
from paceline.serve.trace import tracer
from paceline.serve.wire import form_for, reply

_log = logging.getLogger(__name__)
_OPEN_PATHS = ("/", "/health", "/api/hello")
Handler = Callable[[Service, Request], Awaitable[Response]]


def make_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application, which starts and stops the service's host with its lifespan."""
    service.host.watch(service.live)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.host.start()
        try:
            yield
        finally:
            await service.host.stop()

    table: tuple[tuple[str, str, Handler], ...] = (
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/responses", responses),
        ("POST", "/v1/messages", messages),
        ("POST", "/v1/messages/count_tokens", count_tokens),
        ("POST", "/v1/compact", compacted),
        ("GET", "/v1/models", models),
        ("POST", "/tokenize", tokenize),
        ("GET", "/health", health),
        ("GET", "/metrics", metrics),
        ("GET", "/openapi.json", openapi),
        ("GET", "/", home),
        ("GET", "/live", live),
        ("GET", "/api/hello", hello),
    )
    routes = [Route(path, _endpoint(service, handler), methods=[method]) for method, path, handler in table]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})
    return Journal(_Keys(app, service.keys), tracer(service.names[0]))


def _endpoint(service: Service, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """The handler with its errors as replies in the form of its API."""

    async def run(request: Request) -> Response:
        form = form_for(request.url.path)
        try:
            return await handler(service, Request(request.scope, _in_time(request.receive, service.body_seconds)))
        except ClientDisconnect:
            return Response(status_code=499)
        except PacelineError as error:
            return form.response(error)
        except RecursionError:  # JSON that can be read but is too deep for the template, say
            return form.response(BadField("the body is nested too deeply"))
        except Exception:
            _log.exception("a request to %s failed", request.url.path)
            return form.response(PacelineError("the server failed; its log says why"))

    return run


def _in_time(receive: Receive, seconds: float) -> Receive:
    """`receive` that raises SlowBody where the body is not whole after `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    whole = False

    async def timed() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise SlowBody(f"the body was not whole after {seconds:g} seconds") from None
        whole = not message.get("more_body")
        return message

    return timed


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    form = form_for(request.url.path)
    body = form.body(NotFound(f"{request.method} {request.url.path} is not served"))
    return reply(body, error.status_code, dict(error.headers or {}))


class _Keys:
    """Refuses requests without one of the keys, where there are any. Keys are kept and compared as hashes."""

    def __init__(self, app: ASGIApp, keys: Iterable[bytes]) -> None:
        self._app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["path"] in _OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthorized("no API key, or a wrong one: send it as a bearer token or as x-api-key")
        await form_for(scope["path"]).response(error)(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        headers = Request(scope).headers
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        hashes = [_hash(each.encode("latin-1")) for each in given if each]  # the bytes as they came
        matches = [hmac.compare_digest(each, key) for each in hashes for key in self._keys]
        return any(matches)


def hash_key(key: str) -> bytes:
    return _hash(key.encode("utf-8", "surrogateescape"))


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def models(service: Service, request: Request) -> Response:
    data = [
        {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "paceline",
            "max_model_len": service.host.capacity,
        }
        for name in service.names
    ]
    return reply({"object": "list", "data": data})


async def health(service: Service, request: Request) -> Response:
    """200 while requests are taken, 503 otherwise."""
    state = service.host.state
    return reply({"status": state}, 200 if state == "ready" else 503)


async def metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(service: Service, request: Request) -> Response:
    return reply(document())


async def home(service: Service, request: Request) -> Response:
    """The status page for browsers, the greeting for everyone else."""
    wants_page = "text/html" in request.headers.get("accept", "")
    response = page() if wants_page else await hello(service, request)
    response.headers["vary"] = "accept"
    return response


async def hello(service: Service, request: Request) -> Response:
    return reply({"name": "paceline", "model": service.names[0]})
