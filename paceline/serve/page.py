"""GET / for browsers, one page that needs nothing else, and GET /live, the events it shows."""

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

from paceline.engine.engine import Engine
from paceline.serve.host import Host
from paceline.serve.live import Listener
from paceline.serve.service import Service
from paceline.serve.wire import OPENAI, EventStream, event, is_loopback

_TICK = 0.125  # seconds between two readings of the text; every second one brings the numbers too


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
    """The page, and the policy that lets a browser run its own style and script and talk to this server, no more."""
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
    """What a policy calls the one inline element of that tag."""
    found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), content, re.DOTALL)
    assert len(found) == 1
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0]).digest()).decode()}'"


async def live(service: Service, http: Request) -> Response:
    """Events without end: `state` with the numbers, `text` with what requests wrote since the last one.

    Prompts are never told. Where no key is set, text is told only to this machine, so that a server opened to others
    (--allow-open) does not show one client's output to the next. Raises Overloaded beside too many listeners.
    """
    tells_text = bool(service.keys) or _is_local(http)
    listener = service.live.listen(service.host.tokenizer.token_bytes if tells_text else None)
    return EventStream(_events(service, listener, tells_text), OPENAI, listener.close)


def _is_local(http: Request) -> bool:
    """Whether this machine asks, by a name of this machine: another's name may lead here from a page of that other."""
    client, name = http.client, http.url.hostname
    return client is not None and is_loopback(client.host) and name is not None and is_loopback(name)


async def _events(service: Service, listener: Listener, tells_text: bool) -> AsyncGenerator[bytes, None]:
    host = service.host
    head = {"model": service.names[0], "tells_text": tells_text}
    for tick in itertools.count():
        text = listener.read()
        if text:
            yield event(text, "text")
        ended = host.state not in ("starting", "ready")  # a listener must not hold up the drain
        if tick % 2 == 0 or ended:
            yield event({**head, "status": host.state, "pages": _pages(host), **service.live.state()}, "state")
        if ended:
            return
        await asyncio.sleep(_TICK)


def _pages(host: Host) -> dict[str, Any] | None:
    """KV pages: in use by requests, kept for later prefixes, all. Read beside the engine's thread, so nearly right."""
    engine = host.engine
    if not isinstance(engine, Engine):
        return None
    used, cached, total = engine.scheduler.page_counts
    return {"used": max(0, used), "cached": cached, "total": total}
