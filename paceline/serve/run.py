"""A server process: checks of the address and keys, then uvicorn until SIGTERM or SIGINT, then the drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from paceline.engine.engine import Engine
from paceline.env import api_key
from paceline.errors import ConfigError, RequestError
from paceline.serve.app import hash_key, make_app
from paceline.serve.connection import Connection
from paceline.serve.cors import check_origin
from paceline.serve.host import Host
from paceline.serve.journal import JsonFormatter, TextFormatter
from paceline.serve.metrics import Metrics
from paceline.serve.responses import RefusedUpgrade
from paceline.serve.service import MORPH_MODELS, Service
from paceline.serve.store import Store
from paceline.serve.wire import is_loopback
from paceline.types import Request, Sampling

SWITCH_SECONDS = 0.0005  # the event loop waits so long for the engine's thread where both have Python to run
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Limits:
    """What a server takes on: requests waiting besides those decoded together, seconds a request, bytes a body.

    With `share_cache` clients with different keys find each other's cached prefixes. Web pages of `origins` may use it.
    Responses are stored in `store_bytes` of memory (0 for none), for `store_seconds` after their last use.
    """

    queue: int | None = None
    request_seconds: float | None = None
    body_bytes: int = 32 << 20
    share_cache: bool = False
    origins: tuple[str, ...] = ()
    store_bytes: int = 256 << 20
    store_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if self.queue is not None and self.queue < 0:
            raise ConfigError(f"the queue must have room for 0 requests or more, not {self.queue}")
        if self.request_seconds is not None and not self.request_seconds > 0:
            raise ConfigError(f"a request's time must be above 0 seconds, not {self.request_seconds:g}")
        for origin in self.origins:
            check_origin(origin)
        if self.store_bytes < 0 or not 0 <= self.store_seconds < math.inf:
            raise ConfigError("the megabytes and minutes of the store must be 0 (no store) or more")
        if self.body_bytes < 1:
            raise ConfigError(f"a body's limit must be 1 byte or more, not {self.body_bytes}")


def make_service(
    engine: Engine,
    names: Sequence[str],
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    warm_up: bool | None = None,
    apply_names: Sequence[str] = (),
    greedy: bool = False,
) -> Service:
    """A service over a loaded engine, not started yet. It warms up on CUDA, or as `warm_up` says.

    `apply_names` are names for Morph's apply besides Morph's own. With `greedy` requests that do not say are not sampled
    as the model's makers do, but greedy.
    """
    limits = limits or Limits()
    metrics = Metrics(names[0])
    metrics.watch(engine)
    in_cache = (engine.pool.num_pages - 1) * engine.config.page_size - 1
    warms = engine.config.device != "cpu" if warm_up is None else warm_up
    batch = engine.config.max_batch
    host = Host(
        engine,
        capacity=min(engine.config.max_context or in_cache, in_cache),
        max_open=None if limits.queue is None else batch + limits.queue,
        time_limit=limits.request_seconds,
        observer=metrics,
        warm_up=(lambda: _warm_up(engine)) if warms else None,
    )
    with contextlib.suppress(RequestError):  # compiles the chat template, which no request should wait for
        engine.tokenizer.encode_chat([{"role": "user", "content": "."}])
    hashes = tuple(stored_hash(key) for key in keys)
    served = tuple(dict.fromkeys(names))
    return Service(
        host,
        metrics,
        served,
        (*MORPH_MODELS, *apply_names),
        hashes,
        limits.body_bytes,
        created=int(time.time()),
        share_cache=limits.share_cache,
        defaults=Sampling() if greedy else engine.defaults,
        origins=limits.origins,
        store=Store(limits.store_bytes, limits.store_seconds),
    )


def _warm_up(engine: Engine) -> None:
    """Makes graphs and kernels for the whole batch, then answers a short prompt, which loads what else there is."""
    began = time.perf_counter()
    engine.warm_up(engine.config.max_batch)
    _ = engine.grammars
    engine.generate([Request([0] * 8, Sampling(max_tokens=4, ignore_eos=True))])[0].checked()
    logging.getLogger(__name__).info("warmed up in %.1f s", time.perf_counter() - began)


def check_address(host: str, keys: Sequence[str], allow_open: bool) -> None:
    """Raises ConfigError for an address that others can reach, without a key and without `allow_open`."""
    if not keys and not allow_open and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and no key is set: give --api-key (or PACELINE_API_KEY), "
            "or --allow-open to serve everyone"
        )


class Server(uvicorn.Server):
    """uvicorn, telling the host at once when it is asked to end: no more requests are taken, those under way finish.

    What is not finished after `drain_seconds` ends by an error; clients that do not read it have `last_seconds` more.
    """

    drain_seconds = 30.0
    last_seconds = 3

    def __init__(self, service: Service, host: str, port: int) -> None:
        self._service = service
        self._signal: int | None = None
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host,
                port,
                http=Connection,
                log_level="error",
                ws=RefusedUpgrade,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(self.drain_seconds) + self.last_seconds,
                timeout_keep_alive=75,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # what is there now stays: collecting garbage must not walk through modules and weights again, all threads stopped
        gc.collect()
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        host = self._service.host
        host.drain()
        cut = asyncio.get_running_loop().call_later(self.drain_seconds, host.cut)
        await super().shutdown(sockets)
        cut.cancel()
        if self._signal is not None and host.computing:
            _end_by(self._signal)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, a second ends the process, whatever its threads do."""
        if self.should_exit:
            _end_by(sig)
        self._signal = sig
        super().handle_exit(sig, frame)


def _end_by(number: int) -> None:
    """Ends the process now. The interpreter's own way aborts where a thread of it computes."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def keys_of(given: Sequence[str], file: Path | None = None) -> list[str]:
    """The keys given, the file's and the environment's. Raises ConfigError for one that is empty or no sha256."""
    fallback = api_key()
    keys = [*given, *(_lines(file) if file is not None else []), *([fallback] if fallback else [])]
    for key in keys:
        stored_hash(key)
    return keys


def _lines(file: Path) -> list[str]:
    """A key a line; empty lines and those that begin with # are none."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the keys' file {file} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"the keys' file {file} holds no key")
    return keys


def stored_hash(key: str) -> bytes:
    """The hash of a key that is given plain or as sha256:HEX."""
    if not key:
        raise ConfigError("an API key must not be empty")
    hashed = _HASHED.fullmatch(key)
    if hashed is None and key.startswith("sha256:"):
        raise ConfigError("an API key that begins with sha256: must go on with 64 hexadecimal digits")
    return bytes.fromhex(hashed[1]) if hashed else hash_key(key)


def set_up_log(form: str) -> None:
    """Lines on standard error, as text or as JSON."""
    if form not in ("text", "json"):
        raise ConfigError(f"the log's format must be text or json, not {form!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(service: Service, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT."""
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.getLogger(__name__).info("serving %s at http://%s:%d", service.names[0], host, port)
    Server(service, host, port).run()
