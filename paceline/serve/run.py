"""The server process: checks of the address and keys, uvicorn until SIGTERM or SIGINT, then the drain."""

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
from paceline.serve.metrics import Metrics
from paceline.serve.request_log import JsonFormatter, TextFormatter
from paceline.serve.responses import RefusedUpgrade
from paceline.serve.service import MORPH_MODELS, Service
from paceline.serve.store import Store
from paceline.serve.wire import is_loopback
from paceline.types import Request, Sampling

# Python's thread switch interval (its default is 0.005): how long the event loop waits for the engine's thread while both
# run Python. Tuned by `python -m benchmarks.serve`.
SWITCH_SECONDS = 0.0005
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Limits:
    """A server's limits: requests waiting besides the batch, seconds for each request, bytes of a body.

    With `share_cache`, clients with different keys share cached prefixes. Web pages of `origins` may use the server.
    Responses are stored in `store_bytes` of memory (0 stores none), for `store_seconds` after their last use.
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
            raise ConfigError(f"the queue's size must be 0 requests or more, not {self.queue}")
        if self.request_seconds is not None and not self.request_seconds > 0:
            raise ConfigError(f"a request's time limit must be above 0 seconds, not {self.request_seconds:g}")
        for origin in self.origins:
            check_origin(origin)
        if self.store_bytes < 0 or not 0 <= self.store_seconds < math.inf:
            raise ConfigError("the store's megabytes and minutes must be 0 (no store) or more")
        if self.body_bytes < 1:
            raise ConfigError(f"the limit of a body must be 1 byte or more, not {self.body_bytes}")


def make_service(
    engine: Engine,
    names: Sequence[str],
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    warm_up: bool | None = None,
    apply_names: Sequence[str] = (),
    greedy: bool = False,
) -> Service:
    """A service over a loaded engine, not started yet. It warms up on CUDA by default, or as `warm_up` says.

    `apply_names` are names for Morph's apply besides Morph's own. With `greedy`, the default of sampling is greedy instead
    of the model's generation config.
    """
    limits = limits or Limits()
    metrics = Metrics(names[0])
    metrics.watch_engine(engine)
    warms = engine.config.device != "cpu" if warm_up is None else warm_up
    batch = engine.config.max_batch
    host = Host(
        engine,
        max_open=None if limits.queue is None else batch + limits.queue,
        time_limit=limits.request_seconds,
        observer=metrics,
        warm_up=(lambda: _warm_up(engine)) if warms else None,
    )
    with contextlib.suppress(RequestError):  # compiles the chat template before the first request needs it
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
    """Compiles kernels, captures CUDA graphs for the whole batch, loads grammars, and runs one short request."""
    began = time.perf_counter()
    engine.warm_up(engine.config.max_batch, grammars=True)
    engine.generate([Request([0] * 8, Sampling(max_tokens=4, ignore_eos=True))])[0].checked()
    logging.getLogger(__name__).info("warmed up in %.1f s", time.perf_counter() - began)


def check_address(host: str, keys: Sequence[str], allow_open: bool) -> None:
    """Raises ConfigError for an address that other machines can reach, if there is no key and `allow_open` is false."""
    if not keys and not allow_open and not is_loopback(host):
        raise ConfigError(
            f"{host} can be reached from other machines and no key is set: give --api-key (or PACELINE_API_KEY), "
            "or --allow-open to serve everyone"
        )


class Server(uvicorn.Server):
    """uvicorn's server with a drain: at shutdown the host stops accepting requests, and open ones may finish.

    Requests that have not finished after `drain_seconds` end with an error. uvicorn waits `last_seconds` more for clients
    to read it.
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
        # Objects that exist now live as long as the process. Without freeze, each full garbage collection would traverse
        # them (modules, weights) and stop all threads meanwhile.
        gc.collect()
        gc.freeze()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        host = self._service.host
        host.drain()
        timer = asyncio.get_running_loop().call_later(self.drain_seconds, host.fail_open)
        await super().shutdown(sockets)
        timer.cancel()
        if self._signal is not None and host.thread_alive:
            _end_by_signal(self._signal)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts the drain; a second one ends the process at once."""
        if self.should_exit:
            _end_by_signal(sig)
        self._signal = sig
        super().handle_exit(sig, frame)


def _end_by_signal(number: int) -> None:
    """Ends the process at once by a signal. A normal interpreter exit would abort while the engine's thread computes."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def keys_of(given: Sequence[str], file: Path | None = None) -> list[str]:
    """The given keys, the file's and the environment's. Raises ConfigError for an empty key or a malformed sha256."""
    fallback = api_key()
    keys = [*given, *(_lines(file) if file is not None else []), *([fallback] if fallback else [])]
    for key in keys:
        stored_hash(key)
    return keys


def _lines(file: Path) -> list[str]:
    """The keys of a file, one on each line. Empty lines and lines that begin with # are ignored."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {file} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"the key file {file} has no key")
    return keys


def stored_hash(key: str) -> bytes:
    """The hash of a key, which is given as plain text or as sha256:HEX."""
    if not key:
        raise ConfigError("an API key must not be empty")
    hashed = _HASHED.fullmatch(key)
    if hashed is None and key.startswith("sha256:"):
        raise ConfigError("an API key that begins with sha256: must continue with 64 hexadecimal digits")
    return bytes.fromhex(hashed[1]) if hashed else hash_key(key)


def set_up_log(form: str) -> None:
    """Logs to standard error, as text or as JSON."""
    if form not in ("text", "json"):
        raise ConfigError(f"the log format must be text or json, not {form!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def serve(service: Service, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT."""
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.getLogger(__name__).info("serving %s at http://%s:%d", service.names[0], host, port)
    Server(service, host, port).run()
