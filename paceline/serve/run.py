"""A server process: checks of the address and keys, then uvicorn until SIGTERM or SIGINT, then the drain."""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from paceline.engine.engine import Engine
from paceline.env import api_key
from paceline.errors import ConfigError
from paceline.serve.app import hash_key, make_app
from paceline.serve.host import Host
from paceline.serve.metrics import Metrics
from paceline.serve.service import Service

_DRAIN_SECONDS = 30


def make_service(engine: Engine, names: Sequence[str], keys: Sequence[str] = ()) -> Service:
    """A service over a loaded engine, not started yet."""
    metrics = Metrics(names[0])
    in_cache = (engine.pool.num_pages - 1) * engine.config.page_size - 1
    capacity = min(engine.config.max_context or in_cache, in_cache)
    host = Host(engine, capacity=capacity, observer=metrics, warm_up=lambda: engine.warm_up(engine.config.max_batch))
    hashes = tuple(hash_key(key) for key in keys)
    return Service(host, metrics, tuple(dict.fromkeys(names)), hashes, created=int(time.time()))


def check_address(host: str, keys: Sequence[str], allow_open: bool) -> None:
    """Raises ConfigError for an address that others can reach, without a key and without `allow_open`."""
    if not keys and not allow_open and not _is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and no key is set: give --api-key (or PACELINE_API_KEY), "
            "or --allow-open to serve everyone"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """uvicorn, telling the host at once when it is asked to end: no more requests are taken, those under way finish."""

    def __init__(self, service: Service, host: str, port: int) -> None:
        self._service = service
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host,
                port,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
                timeout_keep_alive=75,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.host.drain()
        await super().shutdown(sockets)


def keys_of(given: Sequence[str]) -> list[str]:
    """The keys given and the environment's; an empty one is refused."""
    if not all(given):
        raise ConfigError("an API key must not be empty")
    fallback = api_key()
    return [*given, *([fallback] if fallback else [])]


def serve(engine: Engine, model: str, *, host: str, port: int, keys: Sequence[str], aliases: Sequence[str]) -> None:
    """Serves until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    name = Path(model).name if Path(model).exists() else model
    logging.getLogger(__name__).info("serving %s at http://%s:%d", name, host, port)
    Server(make_service(engine, [name, *aliases], keys), host, port).run()
