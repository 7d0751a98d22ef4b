"""Which web pages of other origins may use the server: CORS, before keys are looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from paceline.errors import ConfigError

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+")
_TOLD = ("x-request-id", "request-id", "retry-after")


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app`, which browsers let pages of `origins` ask and read; `*` is every page, none leaves `app` as it is.

    A browser asks beforehand, by OPTIONS and without a key: that is answered here. Keys go in headers, never in cookies.
    """
    if not origins:
        return app
    methods = ("GET", "HEAD", "POST", "DELETE")
    wrapped = CORSMiddleware(app, origins, methods, allow_headers=["*"], expose_headers=_TOLD, max_age=7200)
    # Chromium asks whether a page may use its user's network, which newer Starlette refuses; older has no argument for it
    wrapped.allow_private_network = True
    return wrapped


def check_origin(origin: str) -> None:
    """Raises ConfigError for an origin that no browser sends."""
    if not _ORIGIN.fullmatch(origin):
        raise ConfigError(f"an origin is * or scheme://host:port in lower case, without a path, not {origin!r}")
