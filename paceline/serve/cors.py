"""CORS: the web pages of other origins that may use the server. Runs before the API keys are checked."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from paceline.errors import ConfigError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+")
_EXPOSED_HEADERS = ("x-request-id", "request-id", "retry-after")


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app` with CORS headers for pages of `origins`. `*` allows every origin; without any, `app` is returned as it is.

    Answers a browser's preflight request (OPTIONS), which has no key. Keys are sent in headers, never in cookies.
    """
    if not origins:
        return app
    methods = ("GET", "HEAD", "POST", "DELETE")
    wrapped = CORSMiddleware(app, origins, methods, allow_headers=["*"], expose_headers=_EXPOSED_HEADERS, max_age=7200)
    # Chromium's preflight asks for access to the private network. Newer Starlette refuses that by default; an older one
    # has no such argument, so the attribute is set instead.
    wrapped.allow_private_network = True
    return wrapped


def check_origin(origin: str) -> None:
    """Raises ConfigError for an origin of a form that no browser sends."""
    if not _ORIGIN.fullmatch(origin):
        raise ConfigError(f"an origin must be * or scheme://host:port in lower case, without a path, not {origin!r}")
