"""GET / for browsers, a single page without other assets, and GET /live, the events that it shows."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import importlib.resources
import itertools
import re
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from paceline.serve.host import Host
from paceline.serve.live_stats import PageListener
from paceline.serve.service import Service
from paceline.serve.wire import OPENAI, EventStream, event, is_loopback

_TICK = 0.125  # seconds between two text events; every second tick sends the statistics too


def page() -> Response:
    content, policy = _page()
    headers = {
        "content-security-policy": policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Response(content, headers=headers, media_type="text/html; charset=utf-8")


@functools.cache
def _page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy: only its own style and script, and connections to this server."""
    content = importlib.resources.files("paceline.serve").joinpath("page.html").read_bytes()
    rules = {
        "default-src": "'none'",
        "script-src": _hash_of(content, b"script"),
        "style-src": _hash_of(content, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return content, "; ".join(f"{name} {value}" for name, value in rules.items())


def _hash_of(content: bytes, tag: bytes) -> str:
    """The policy's source expression (hash) for the page's only inline element of that tag."""
    found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), content, re.DOTALL)
    assert len(found) == 1
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0]).digest()).decode()}'"


async def live_events(service: Service, http: Request) -> Response:
    """GET /live: an endless stream of `state` events (statistics) and `text` events (output since the last one).

    Prompts are never sent. Without API keys, text is sent only to this machine, so that a server opened to others
    (--allow-open) does not show one client's output to another. Raises Overloaded if too many pages listen.
    """
    sends_text = bool(service.keys) or is_local(http)
    listener = service.live_stats.listen(service.host.tokenizer.token_bytes if sends_text else None)
    return EventStream(_events(service, listener, sends_text), OPENAI, listener.close)


def is_local(http: Request) -> bool:
    """Whether the request is from this machine and to a name of this machine.

    The name is checked because a page of another host may resolve its own name to this machine (DNS rebinding).
    """
    client, name = http.client, http.url.hostname
    return client is not None and is_loopback(client.host) and name is not None and is_loopback(name)


async def _events(service: Service, listener: PageListener, sends_text: bool) -> AsyncGenerator[bytes, None]:
    host = service.host
    head = {"model": service.names[0], "tells_text": sends_text}
    for tick in itertools.count():
        text = listener.read()
        if text:
            yield event(text, "text")
        ended = host.state not in ("starting", "ready")  # an open listener must not delay the drain
        if tick % 2 == 0 or ended:
            yield event({**head, "status": host.state, "pages": _pages(host), **service.live_stats.state()}, "state")
        if ended:
            return
        await asyncio.sleep(_TICK)


def _pages(host: Host) -> dict[str, Any] | None:
    """KV pages: used by requests, cached for later prefixes, in all. Approximate, as the engine's thread changes them.

    None for an engine without pages.
    """
    stats = host.engine.stats()
    if not stats.pages_total:
        return None
    return {"used": max(0, stats.pages_held), "cached": stats.pages_cached, "total": stats.pages_total}
