"""A server for the benchmarks, in a process of its own, over an engine that needs no pulled model.

    python -m benchmarks.tools.served --engine tiny|paced --rate 80

Prints one line of JSON, {"port": ...}, once it is ready, and serves until SIGTERM. `GET /inside` returns the resources that
the process holds and has used (`Inside`). The engines:

tiny    Paceline's engine over a random model of two small layers
paced   no model: the first token at once, then `rate` tokens a second for every request, one a step
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from benchmarks.common import ROOT, argument_parser
from paceline.config import EngineConfig, Hardware, resolve
from paceline.engine.client import EngineClient, EngineStats
from paceline.serve.connection import Connection
from paceline.serve.host import Host
from paceline.serve.metrics import Metrics
from paceline.serve.run import SWITCH_SECONDS, Limits, Server, make_service
from paceline.serve.service import Service
from paceline.types import FinishReason, Request, Sampling, StepOutput, Usage

_PACED_CONTEXT = 1 << 17
TEXT = b"def area(width, height):\n    return width * height\n"


@dataclass
class Inside:
    """What a server process holds, and the CPU seconds that its event loop's thread and the whole process have used.

    `open`: requests open in the server; `requests`: requests in the engine; `pages_held`: KV pages that belong to requests;
    `resident`: bytes of memory; `files`: file descriptors. `firsts` are the seconds from the engine's submit to its first
    output, by request in order of arrival.
    """

    open: int
    tasks: int
    threads: int
    files: int
    resident: int
    requests: int
    pages_held: int
    loop_seconds: float
    process_seconds: float
    firsts: list[float]


class Paced:
    """An engine that writes TEXT over and over: a token a step and request, `rate` steps a second."""

    def __init__(self, rate: float) -> None:
        from tests.serve.service import byte_tokenizer

        self.tokenizer = byte_tokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.config = resolve(EngineConfig(device="cpu"), Hardware(False, 1, 1 << 30), _PACED_CONTEXT)
        self.defaults = Sampling()
        self.capacity = _PACED_CONTEXT
        self._period = 1 / rate
        self._next = 0.0
        self._written: dict[str, int] = {}
        self._requests: dict[str, Request] = {}

    @property
    def busy(self) -> bool:
        return bool(self._written)

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._written))

    def submit(self, request: Request) -> str:
        self._requests[request.id] = request
        self._written[request.id] = 0
        return request.id

    def cancel(self, name: str) -> None:
        self._requests.pop(name, None)
        self._written.pop(name, None)

    def step(self) -> list[StepOutput]:
        fresh = [name for name, count in self._written.items() if count == 0]
        if not fresh:
            time.sleep(max(0.0, self._next - time.perf_counter()))
            self._next = max(self._next, time.perf_counter() - self._period) + self._period
        return [self._one(name) for name in fresh or list(self._written)]

    def _one(self, name: str) -> StepOutput:
        count, request = self._written[name], self._requests[name]
        token = TEXT[count % len(TEXT)]
        self._written[name] = count + 1
        if count + 1 < request.sampling.max_tokens:
            return StepOutput(name, [token], chr(token), [False])
        self.cancel(name)
        usage = Usage(prompt_tokens=len(request.prompt), output_tokens=count + 1)
        return StepOutput(name, [token], chr(token), [False], (), FinishReason.LENGTH, usage)


class Timed:
    """Any engine, with the time to each request's first output noted."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._started: dict[str, float] = {}
        self.firsts: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request) -> str:
        self._started[request.id] = time.perf_counter()
        return self._engine.submit(request)

    def step(self) -> list[StepOutput]:
        outputs = self._engine.step()
        now = time.perf_counter()
        for output in outputs:
            started = self._started.pop(output.request_id, None)
            if started is not None:
                self.firsts.append(now - started)
        return outputs


class Window:
    """The application, with `GET /inside` beside it. Runs on the event loop's thread."""

    def __init__(self, app: Any, service: Service, timed: Timed) -> None:
        self._app, self._service, self._timed = app, service, timed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/inside":
            await self._app(scope, receive, send)
            return
        body = msgspec.json.encode(self._inside())
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _inside(self) -> Inside:
        stats = self._timed.stats()
        ident = threading.get_ident()
        return Inside(
            self._service.host.num_open,
            len(asyncio.all_tasks()),
            threading.active_count(),
            len(os.listdir("/proc/self/fd")),
            resident("self"),
            stats.num_requests,
            stats.pages_held,
            time.clock_gettime(time.pthread_getcpuclockid(ident)),
            time.process_time(),
            self._timed.firsts,
        )


def resident(process: str | int) -> int:
    """Bytes of memory that a process uses."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--engine", choices=("tiny", "paced"), default="tiny")
    parser.add_argument("--rate", type=float, default=80.0, help="tokens a second of each request (paced)")
    parser.add_argument("--request-seconds", type=float)
    parser.add_argument("--head-seconds", type=float, default=Connection.head_seconds)
    parser.add_argument("--body-seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    sys.setswitchinterval(SWITCH_SECONDS)
    Connection.head_seconds = arguments.head_seconds
    limits = Limits(request_seconds=arguments.request_seconds)
    if arguments.engine == "tiny":
        from tests.serve.service import tiny

        timed = Timed(tiny())
        service = make_service(timed, ["tiny"], (), limits)  # type: ignore[arg-type]
    else:
        timed = Timed(Paced(arguments.rate))
        metrics = Metrics("tiny")
        service = Service(Host(timed, observer=metrics), metrics, ("tiny",))
    service = dataclasses.replace(service, body_seconds=arguments.body_seconds)
    server = Server(service, "127.0.0.1", 0)
    server.config.app = Window(server.config.app, service, timed)

    async def announce() -> None:
        while not server.started or service.host.state == "starting":
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        print(json.dumps({"port": port}), flush=True)

    async def run() -> None:
        task = asyncio.ensure_future(announce())
        await server.serve()
        task.cancel()

    with (
        contextlib.suppress(KeyboardInterrupt),
        asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner,
    ):
        runner.run(run())


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str

    def inside(self) -> Inside:
        return msgspec.convert(httpx.get(f"{self.url}/inside", timeout=30).json(), Inside)


@contextlib.contextmanager
def served(*options: str) -> Iterator[Served]:
    """Runs this program in a process of its own during the block."""
    command = [sys.executable, "-m", "benchmarks.tools.served", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            sys.exit("the server did not start; its output is above")
        try:
            yield Served(process, f"http://127.0.0.1:{json.loads(line)['port']}")
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    main()
