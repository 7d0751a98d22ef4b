"""The ASGI application: routes, API keys, and starting and stopping the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.errors import BadField, NotFound, PacelineError, SlowBody, Unauthorized
from paceline.serve.chat import chat
from paceline.serve.compact import compact_conversation
from paceline.serve.completions import completions
from paceline.serve.cors import allow_origins
from paceline.serve.messages import count_tokens, messages
from paceline.serve.models import model, models
from paceline.serve.openapi import document
from paceline.serve.page import live_events, page
from paceline.serve.request_log import ROUTE_KEY, RequestLog
from paceline.serve.responses import (
    compact_response,
    delete_response,
    get_response,
    input_items,
    input_tokens,
    responses,
)
from paceline.serve.service import TENANT_KEY, Service
from paceline.serve.tokenize import detokenize, tokenize, tokenizer_info
from paceline.serve.trace import tracer
from paceline.serve.wire import ANTHROPIC, OpenAIErrorFormat, error_format_for, reply

_log = logging.getLogger(__name__)
_MODELS, _MODEL = "/v1/models", "/v1/models/{model}"
_OPEN_PATHS = ("/", "/health", "/api/hello")
Handler = Callable[[Service, Request], Awaitable[Response]]


def make_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application. Its lifespan starts and stops the service's host."""
    service.host.add_observer(service.live_stats)

    @contextlib.asynccontextmanager
    async def lifespan(app: object) -> AsyncIterator[None]:
        service.host.start()
        try:
            yield
        finally:
            await service.host.stop()

    endpoints = _Endpoints(service)
    app = RequestLog(_ApiKeys(Router(default=endpoints, lifespan=lifespan), service.keys), tracer(service.names[0]))

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            _find_route(scope)
        await app(scope, receive, send)

    return allow_origins(routed, service.origins)


def _find_route(scope: Scope) -> None:
    """Writes the matching route of ROUTES into the scope, and the values of its {name} parts into `path_params`.

    Most paths are fixed, so a dictionary lookup finds them; Starlette's route matching would add to every time to first
    token. A path also matches without its /v1 and with /v1 twice: clients differ in whether their base URL has it.
    """
    path = scope["path"].rstrip("/") or "/"
    for each in (path, f"/v1{path}", path.removeprefix("/v1")):
        if each in ROUTES:
            scope["path"] = scope[ROUTE_KEY] = each
            return
        for route, pattern in _PATTERNS:
            if match := pattern.fullmatch(each):
                scope["path"], scope[ROUTE_KEY], scope["path_params"] = each, route, match.groupdict()
                return


def _pattern(route: str) -> re.Pattern[str]:
    """The pattern of a route. {name} is one path segment, {model} one or more: names of models contain slashes."""
    return re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", route.replace("{model}", "(?P<model>.+)")))


class _Endpoints:
    """Calls the handler of a request's route and method. Errors become replies in the format of the route's API."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, _with_deadline(receive, self._service.body_seconds))
        response = await self._response(request)
        await response(scope, receive, send)

    async def _response(self, request: Request) -> Response:
        method, path = request.method, request.scope["path"]
        error_format = _error_format(request.scope)
        handlers = ROUTES.get(request.scope.get(ROUTE_KEY, ""), {})
        handler = handlers.get("GET" if method == "HEAD" else method)
        if handler is None:
            error = NotFound(f"{method} {path} is not served")
            allow = ", ".join(each.replace("GET", "GET, HEAD") for each in handlers)
            return reply(error_format.body(error), 405, {"allow": allow}) if handlers else error_format.response(error)
        try:
            return await handler(self._service, request)
        except ClientDisconnect:
            return Response(status_code=499)
        except PacelineError as error:
            return error_format.response(error)
        except RecursionError:  # for example JSON that parses but is nested too deeply for the chat template
            return error_format.response(BadField("the body is nested too deeply"))
        except Exception:
            _log.exception("a request to %s failed", path)
            return error_format.response(PacelineError("the server failed; its log says why"))


def _error_format(scope: Scope) -> OpenAIErrorFormat:
    """The error format of a request: that of its path's API. On paths of both APIs or of none, that of its client's API."""
    either = scope.get(ROUTE_KEY, _MODEL).startswith(_MODELS)
    asks = either and any(name == b"anthropic-version" for name, _ in scope["headers"])
    return ANTHROPIC if asks else error_format_for(scope["path"])


def _with_deadline(receive: Receive, seconds: float) -> Receive:
    """Wraps `receive` so that it raises SlowBody if the body is not complete after `seconds`."""
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
            raise SlowBody(f"the body was not complete after {seconds:g} seconds") from None
        whole = not message.get("more_body")
        return message

    return timed


class _ApiKeys:
    """Refuses requests without a valid API key, if keys are configured. Keys are stored and compared as hashes."""

    def __init__(self, app: ASGIApp, keys: Iterable[bytes]) -> None:
        self._app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = self._matching_key(scope) if scope["type"] == "http" and self._keys else None
        if key is not None:
            scope[TENANT_KEY] = key.hex()
        if key is not None or scope["type"] != "http" or not self._keys or scope["path"] in _OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        error = Unauthorized("the API key is missing or wrong: send it as a bearer token or as x-api-key")
        await _error_format(scope).response(error)(scope, receive, send)

    def _matching_key(self, scope: Scope) -> bytes | None:
        """The hash of the key that the request sent, None if that is none of the configured ones."""
        headers = Request(scope).headers
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        hashes = [_hash(each.encode("latin-1")) for each in given if each]  # headers are Latin-1
        matches = [key for each in hashes for key in self._keys if hmac.compare_digest(each, key)]
        return matches[0] if matches else None


def hash_key(key: str) -> bytes:
    return _hash(key.encode("utf-8", "surrogateescape"))


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def health(service: Service, request: Request) -> Response:
    """200 while the server accepts requests, 503 otherwise."""
    state = service.host.state
    return reply({"status": state}, 200 if state == "ready" else 503)


async def metrics(service: Service, request: Request) -> Response:
    return Response(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(service: Service, request: Request) -> Response:
    return reply(document())


async def home(service: Service, request: Request) -> Response:
    """The status page for browsers, the greeting for all other clients."""
    wants_page = "text/html" in request.headers.get("accept", "")
    response = page() if wants_page else await hello(service, request)
    response.headers["vary"] = "accept"
    return response


async def hello(service: Service, request: Request) -> Response:
    return reply({"name": "paceline", "model": service.names[0]})


ROUTES: dict[str, dict[str, Handler]] = {
    "/v1/chat/completions": {"POST": chat},
    "/v1/completions": {"POST": completions},
    "/v1/responses": {"POST": responses},
    "/v1/responses/input_tokens": {"POST": input_tokens},
    "/v1/responses/compact": {"POST": compact_response},
    "/v1/responses/{response}": {"GET": get_response, "DELETE": delete_response},
    "/v1/responses/{response}/input_items": {"GET": input_items},
    "/v1/messages": {"POST": messages},
    "/v1/messages/count_tokens": {"POST": count_tokens},
    "/v1/compact": {"POST": compact_conversation},
    _MODELS: {"GET": models},
    _MODEL: {"GET": model},
    "/tokenize": {"POST": tokenize},
    "/detokenize": {"POST": detokenize},
    "/tokenizer_info": {"GET": tokenizer_info},
    "/health": {"GET": health},
    "/metrics": {"GET": metrics},
    "/openapi.json": {"GET": openapi},
    "/": {"GET": home},
    "/live": {"GET": live_events},
    "/api/hello": {"GET": hello},
}
_PATTERNS = [(route, _pattern(route)) for route in ROUTES if "{" in route]
