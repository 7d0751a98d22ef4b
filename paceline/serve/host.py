"""Runs the engine in its own thread and hands its outputs to the event loop.

handlers (event loop)                        engine thread
submit  -- _Submit --------> inbox --------> engine.submit
        <------------------- accepted or an error
__anext__ <----------------- all outputs of a step in one call
close   -- _Cancel --------> inbox --------> engine.cancel
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from paceline.engine.client import EngineClient
from paceline.errors import EngineFailed, EngineStopped, Overloaded, PacelineError, TimedOut
from paceline.types import FinishReason, Request, StepOutput, Usage

_log = logging.getLogger(__name__)
# Time between two deliveries of outputs, for each open request: it bounds the share of a core that writing streams takes
# from the engine's thread. Tuned by `python -m benchmarks.serve` (64 streams).
_DELIVERY_SECONDS_PER_REQUEST = 0.00025


class Observer(Protocol):
    """Is notified of the streams' events, on the event loop's thread."""

    def opened(self, stream: Stream) -> None: ...

    def output(self, stream: Stream, output: StepOutput) -> None: ...

    def closed(self, stream: Stream, finished: bool) -> None: ...


@dataclass(frozen=True)
class _ObserverPair:
    first: Observer
    second: Observer

    def opened(self, stream: Stream) -> None:
        self.first.opened(stream)
        self.second.opened(stream)

    def output(self, stream: Stream, output: StepOutput) -> None:
        self.first.output(stream, output)
        self.second.output(stream, output)

    def closed(self, stream: Stream, finished: bool) -> None:
        self.first.closed(stream, finished)
        self.second.closed(stream, finished)


class Stream(AsyncIterator[StepOutput]):
    """The outputs of one request. Outputs that have queued up are merged into one.

    `close` cancels a request that has not finished; it may be called at any time and more than once. `started`, `first`
    and `latest` are the times of submission and of the first and latest output, by `time.perf_counter`. `first` is 0
    before the first output, `usage` is None before the end.
    """

    def __init__(self, host: Host, request: Request, name: str) -> None:
        self.request = request
        self.name = name
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = self.latest = time.perf_counter()
        self.first = 0.0
        self.num_outputs = self.num_tokens = 0
        self.usage: Usage | None = None
        self.timer: asyncio.TimerHandle | None = None
        self._host = host
        self._pending: list[StepOutput] = []
        self._error: PacelineError | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, output: StepOutput) -> None:
        self.latest = time.perf_counter()
        self.first = self.first or self.latest
        self.num_outputs += 1
        self.num_tokens += len(output.tokens)
        if output.finish is not None:
            self.usage = output.usage
        self._pending.append(output)
        self._wake()

    def fail(self, error: PacelineError) -> None:
        """Ends the stream by `error`: the consumer receives the outputs so far, then the error is raised."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._error = error
        self._wake()

    async def __anext__(self) -> StepOutput:
        if self._ended:
            raise StopAsyncIteration
        if not self._pending and self._error is None:
            self._wakeup = asyncio.get_running_loop().create_future()
            await self._wakeup
        if not self._pending:
            assert self._error is not None
            self._ended = True
            raise self._error
        output = _merge_outputs(self._pending)
        self._pending = []
        self._ended = output.finish is not None
        return output

    def close(self) -> None:
        self._ended = True
        self._host.cancel(self)

    def end(self, usage: Usage) -> None:
        """Ends a request early as if it had finished: the consumer needs no more output. `usage` is the usage to report."""
        self._ended = True
        self._host.finish(self, usage)

    def _wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)


def _merge_outputs(outputs: list[StepOutput]) -> StepOutput:
    """Consecutive outputs of one request as one, so that queued outputs are parsed, encoded and sent once."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    return StepOutput(
        last.request_id,
        [token for each in outputs for token in each.tokens],
        "".join(each.text for each in outputs),
        [flag for each in outputs for flag in each.accepted],
        tuple(one for each in outputs for one in each.logprobs),
        last.finish,
        last.usage or outputs[0].usage,
        sum(each.drafted for each in outputs),
        prompt_logprobs=outputs[0].prompt_logprobs,
    )


@dataclass(frozen=True)
class _Submit:
    name: str
    request: Request


@dataclass(frozen=True)
class _Cancel:
    name: str


class _Stop:
    pass


class Host:
    """Runs an engine for an event loop. All calls of the engine happen on its thread, everything else on the loop's thread.

    At most `max_open` requests are open, waiting ones included; a further one raises Overloaded. A request that takes
    longer than `time_limit` seconds from submission raises TimedOut. `capacity` is the most tokens that a prompt and its
    output may have together, by default the engine's.
    """

    stop_seconds = 5.0

    def __init__(
        self,
        engine: EngineClient,
        *,
        capacity: int | None = None,
        max_open: int | None = None,
        time_limit: float | None = None,
        observer: Observer | None = None,
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.capacity = capacity or engine.capacity
        self.max_open = max_open or 4 * engine.config.max_batch
        self.state = "starting"  # then ready, draining, stopped or crashed
        self._time_limit = time_limit
        self._observer = observer
        self._warm_up = warm_up
        self._inbox: queue.SimpleQueue[_Submit | _Cancel | _Stop] = queue.SimpleQueue()
        self._open: dict[str, Stream] = {}
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="paceline-engine", daemon=True)

    @property
    def vocab_size(self) -> int:
        """The number of tokens that a request may use: the model's, or the tokenizer's if that has fewer."""
        return min(self.engine.vocab_size, self.tokenizer.vocab_size)

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def thread_alive(self) -> bool:
        """Whether the engine's thread has not ended."""
        return self._thread.is_alive()

    def add_observer(self, observer: Observer) -> None:
        """Adds an observer, which is notified after the existing ones. Must be called before `start`."""
        self._observer = observer if self._observer is None else _ObserverPair(self._observer, observer)

    def start(self) -> None:
        """Starts the engine's thread for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, request: Request) -> Stream:
        """Submits a request to the engine and waits until it is accepted. The caller closes the stream.

        Raises the engine's RequestError for a request that cannot be served, Overloaded, EngineStopped or TimedOut.
        """
        if self.state in ("crashed", "stopped"):
            raise EngineStopped("the engine has stopped; see the server's log")
        if self.state == "draining":
            raise self._shutdown_error()
        if len(self._open) >= self.max_open:
            raise Overloaded(f"{len(self._open)} requests are running or waiting; try again shortly")
        name = f"request-{next(self._numbers)}"
        stream = Stream(self, request, name)
        self._open[name] = stream
        if self._time_limit is not None:
            stream.timer = asyncio.get_running_loop().call_later(self._time_limit, self._expire, stream)
        if self._observer is not None:
            self._observer.opened(stream)
        self._inbox.put(_Submit(name, request))
        try:
            await stream.accepted
        except BaseException:
            stream.close()
            raise
        return stream

    def cancel(self, stream: Stream) -> None:
        """Cancels a request: the engine drops it before its next step. Called by `Stream.close`."""
        if stream.name in self._open:
            self._inbox.put(_Cancel(stream.name))
            self._close(stream, False)

    def finish(self, stream: Stream, usage: Usage) -> None:
        """Cancels a request in the engine, and ends its stream as finished. Called by `Stream.end`."""
        if stream.name in self._open:
            self._inbox.put(_Cancel(stream.name))
            self._deliver([StepOutput(stream.name, [], "", [], finish=FinishReason.STOP, usage=usage)])

    def drain(self) -> None:
        """Stops accepting requests; open requests continue."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    def fail_open(self) -> None:
        """Ends the drain: requests that are still open raise Overloaded."""
        self._fail(self._shutdown_error())

    async def stop(self) -> None:
        """Ends the engine's thread; requests that are still open raise EngineStopped.

        Waits `stop_seconds` for a running step or warm-up; a longer one ends with the process.
        """
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join, self.stop_seconds)
        if self.state != "crashed":
            self._end("stopped")

    def _run(self) -> None:
        pending: list[StepOutput] = []
        delivered = 0.0
        try:
            if self._warm_up is not None:
                self._warm_up()
            self._call(self._ready)
            while self._read_inbox():
                if self.engine.busy:
                    pending += self.engine.step()
                    now = time.perf_counter()
                    # a request's first and last output, which have `usage`, are delivered without delay
                    at_once = any(output.usage is not None for output in pending)
                    if pending and (at_once or now - delivered >= _DELIVERY_SECONDS_PER_REQUEST * len(self._open)):
                        self._call(self._deliver, pending)
                        pending, delivered = [], now
        except BaseException:
            self._call(self._deliver, pending)
            _log.critical("the engine's thread ended with an error; all requests will fail", exc_info=True)
            self._call(self._end, "crashed")

    def _read_inbox(self) -> bool:
        """Executes the commands in the inbox, and waits for one while the engine is idle. False for a stop command."""
        while not self.engine.busy or not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, _Stop):
                return False
            if isinstance(command, _Cancel):
                self.engine.cancel(command.name)
            else:
                self._submit(command)
        return True

    def _submit(self, command: _Submit) -> None:
        try:
            self.engine.submit(replace(command.request, id=command.name))
        except PacelineError as error:
            self._call(self._accept, command.name, error)
        except Exception:  # a bug on this request: the engine has not accepted it, other requests continue
            _log.exception("request %s could not be submitted", command.name)
            self._call(self._accept, command.name, EngineFailed("the engine failed on this request"))
        else:
            self._call(self._accept, command.name, None)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Runs `function` on the loop's thread; does nothing if the loop is already closed."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _ready(self) -> None:
        if self.state == "starting":
            self.state = "ready"

    def _accept(self, name: str, error: PacelineError | None) -> None:
        stream = self._open.get(name)
        if stream is None or stream.accepted.done():
            return
        if error is None:
            stream.accepted.set_result(None)
        else:
            stream.accepted.set_exception(error)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            stream = self._open.get(output.request_id)
            if stream is None:
                continue
            if output.error is not None:
                stream.fail(output.error)
                self._close(stream, False)
                continue
            if self._observer is not None:
                self._observer.output(stream, output)
            stream.put(output)
            if output.finish is not None:
                self._close(stream, True)

    def _close(self, stream: Stream, finished: bool) -> None:
        del self._open[stream.name]
        if stream.timer is not None:
            stream.timer.cancel()
        if self._observer is not None:
            self._observer.closed(stream, finished)

    def _expire(self, stream: Stream) -> None:
        stream.fail(TimedOut(f"the request took longer than the {self._time_limit:g} seconds that this server allows"))
        self.cancel(stream)

    def _end(self, state: str) -> None:
        self.state = state
        self._fail(EngineStopped("the engine has stopped; see the server's log"))

    def _shutdown_error(self) -> Overloaded:
        return Overloaded("the server is shutting down; try again shortly", retry_after=10)

    def _fail(self, error: PacelineError) -> None:
        for stream in list(self._open.values()):
            stream.fail(error)
            self.cancel(stream)
