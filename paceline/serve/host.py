"""The engine in a thread of its own, and its outputs on an event loop.

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

from paceline.config import EngineConfig
from paceline.errors import EngineFailed, EngineStopped, Overloaded, PacelineError, TimedOut
from paceline.models.tokenizer import Tokenizer
from paceline.types import FinishReason, Request, StepOutput, Usage

_log = logging.getLogger(__name__)
_EACH_SECONDS = 0.00025  # between two deliveries for each open request, so that writing them leaves the engine its time


class Steps(Protocol):
    """What the host needs of an engine."""

    tokenizer: Tokenizer
    config: EngineConfig

    @property
    def busy(self) -> bool: ...

    @property
    def vocab_size(self) -> int: ...

    def submit(self, request: Request) -> str: ...

    def cancel(self, name: str) -> None: ...

    def step(self) -> list[StepOutput]: ...


class Observer(Protocol):
    """Sees what passes, on the event loop's thread."""

    def opened(self, stream: Stream) -> None: ...

    def output(self, stream: Stream, output: StepOutput) -> None: ...

    def closed(self, stream: Stream, finished: bool) -> None: ...


@dataclass(frozen=True)
class _Both:
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
    """One request's outputs; those that wait come as one. `close` cancels what has not finished; at any time, twice too.

    started, first and latest are when it was submitted and when the first and last output came, by `time.perf_counter`;
    first is 0 before there is one, usage None before the end.
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
        self._waiting: list[StepOutput] = []
        self._error: PacelineError | None = None
        self._news: asyncio.Future[None] | None = None
        self._ended = False

    def put(self, output: StepOutput) -> None:
        self.latest = time.perf_counter()
        self.first = self.first or self.latest
        self.num_outputs += 1
        self.num_tokens += len(output.tokens)
        if output.finish is not None:
            self.usage = output.usage
        self._waiting.append(output)
        self._wake()

    def fail(self, error: PacelineError) -> None:
        """Raises `error` in who waits for the stream, after the outputs that have come."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._error = error
        self._wake()

    async def __anext__(self) -> StepOutput:
        if self._ended:
            raise StopAsyncIteration
        if not self._waiting and self._error is None:
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if not self._waiting:
            assert self._error is not None
            self._ended = True
            raise self._error
        output = _joined(self._waiting)
        self._waiting = []
        self._ended = output.finish is not None
        return output

    def close(self) -> None:
        self._ended = True
        self._host.forget(self)

    def end(self, usage: Usage) -> None:
        """Ends a request whose output is whole as far as it is wanted, and has used that much."""
        self._ended = True
        self._host.finish(self, usage)

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


def _joined(outputs: list[StepOutput]) -> StepOutput:
    """Outputs of one request in a row, as one: what has queued up is parsed, encoded and sent once."""
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
    """Runs an engine for an event loop. Everything but the engine's own calls happens on the loop's thread.

    At most `max_open` requests are under way, waiting ones included; one more raises Overloaded. One that takes longer
    than `time_limit` seconds from submission raises TimedOut. `capacity` is the most tokens a prompt and its output may
    have together.
    """

    stop_seconds = 5.0

    def __init__(
        self,
        engine: Steps,
        *,
        capacity: int | None = None,
        max_open: int | None = None,
        time_limit: float | None = None,
        observer: Observer | None = None,
        warm_up: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.capacity = capacity or engine.config.max_context or 0
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
        """Tokens that a request may name: the model's, or the tokenizer's where that has fewer."""
        return min(self.engine.vocab_size, self.tokenizer.vocab_size)

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def computing(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def watch(self, observer: Observer) -> None:
        """Lets one more observer see what passes, after those there are. To be called before `start`."""
        self._observer = observer if self._observer is None else _Both(self._observer, observer)

    def start(self) -> None:
        """Starts the engine's thread for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, request: Request) -> Stream:
        """Hands a request to the engine and waits until it is accepted. The caller closes the stream.

        Raises the engine's RequestError for one that cannot be served, Overloaded, EngineStopped or TimedOut.
        """
        if self.state in ("crashed", "stopped"):
            raise EngineStopped("the engine has stopped; see the server's log")
        if self.state == "draining":
            raise self._going()
        if len(self._open) >= self.max_open:
            raise Overloaded(f"{len(self._open)} requests are under way or waiting; try again shortly")
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

    def forget(self, stream: Stream) -> None:
        """Ends a stream: the engine drops the request before its next step. Called by `Stream.close`."""
        if stream.name in self._open:
            self._inbox.put(_Cancel(stream.name))
            self._close(stream, False)

    def finish(self, stream: Stream, usage: Usage) -> None:
        """Ends a stream as if its output had ended. Called by `Stream.end`."""
        if stream.name in self._open:
            self._inbox.put(_Cancel(stream.name))
            self._deliver([StepOutput(stream.name, [], "", [], finish=FinishReason.STOP, usage=usage)])

    def drain(self) -> None:
        """Takes no more requests; those under way go on."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    def cut(self) -> None:
        """Ends the drain: requests still under way raise Overloaded."""
        self._fail(self._going())

    async def stop(self) -> None:
        """Ends the thread; requests still under way raise EngineStopped.

        A step or a warm-up that goes on for `stop_seconds` is left to end with the process.
        """
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join, self.stop_seconds)
        if self.state != "crashed":
            self._end("stopped")

    def _run(self) -> None:
        waiting: list[StepOutput] = []
        delivered = 0.0
        try:
            if self._warm_up is not None:
                self._warm_up()
            self._call(self._ready)
            while self._read_inbox():
                if self.engine.busy:
                    waiting += self.engine.step()
                    now = time.perf_counter()
                    # a request's first output and its last, which have usage, do not wait
                    at_once = any(output.usage is not None for output in waiting)
                    if waiting and (at_once or now - delivered >= _EACH_SECONDS * len(self._open)):
                        self._call(self._deliver, waiting)
                        waiting, delivered = [], now
        except BaseException:
            self._call(self._deliver, waiting)
            _log.critical("the engine's thread ended by an error; every request will fail", exc_info=True)
            self._call(self._end, "crashed")

    def _read_inbox(self) -> bool:
        """Does what the handlers ask for, waiting for it while there is nothing to compute; False to stop."""
        while not self.engine.busy or not self._inbox.empty():
            order = self._inbox.get()
            if isinstance(order, _Stop):
                return False
            if isinstance(order, _Cancel):
                self.engine.cancel(order.name)
            else:
                self._submit(order)
        return True

    def _submit(self, order: _Submit) -> None:
        try:
            self.engine.submit(replace(order.request, id=order.name))
        except PacelineError as error:
            self._call(self._accept, order.name, error)
        except Exception:  # a bug that one request met; the engine has not taken it, the others go on
            _log.exception("request %s could not be submitted", order.name)
            self._call(self._accept, order.name, EngineFailed("the engine failed on this request"))
        else:
            self._call(self._accept, order.name, None)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Runs `function` on the loop's thread; nothing where the loop is gone already."""
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
        self.forget(stream)

    def _end(self, state: str) -> None:
        self.state = state
        self._fail(EngineStopped("the engine has stopped; see the server's log"))

    def _going(self) -> Overloaded:
        return Overloaded("the server is shutting down; try again shortly", retry_after=10)

    def _fail(self, error: PacelineError) -> None:
        for stream in list(self._open.values()):
            stream.fail(error)
            self.forget(stream)
