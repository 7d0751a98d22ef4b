"""Several answers to one request (`n` choices, several prompts), generated concurrently."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from paceline.errors import Overloaded
from paceline.serve.service import Answer
from paceline.serve.tools import Event
from paceline.types import TokenLogprob, Usage

Start = Callable[[], Awaitable[Answer]]
Piece = tuple[int, list[Event], tuple[TokenLogprob, ...]]


class Choices:
    """The answers that `starts` submit: `size` consecutive ones for each prompt, at most `width` of them running.

    The later answers of a prompt start after its first one has produced output, so that they hit the prefix cache.
    """

    def __init__(self, starts: Sequence[Start], size: int, width: int) -> None:
        self._starts = starts
        self._size = size
        self._running_limit = asyncio.Semaphore(max(width, 1))
        self._answers: dict[int, Answer] = {}
        self._num_running = 0
        self._first_piece = [asyncio.Event() for _ in starts[::size]]
        self._pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(1)

    @classmethod
    async def begin(cls, starts: Sequence[Start], size: int = 1, width: int = 1) -> Choices:
        """Starts the first answer, so that an invalid request raises here. The caller calls `close`."""
        choices = cls(starts, size, width)
        choices._answers[0] = await starts[0]()
        choices._num_running = 1
        return choices

    def __getitem__(self, index: int) -> Answer:
        """The answer `index`, which must have started."""
        return self._answers[index]

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def usage(self) -> Usage:
        """The usage of all answers so far, with each prompt counted once."""
        total = Usage()
        for index, answer in self._answers.items():
            for each in dataclasses.fields(Usage):
                prompts = each.name in ("prompt_tokens", "cached_tokens")
                if not prompts or index % self._size == 0:
                    setattr(total, each.name, getattr(total, each.name) + getattr(answer.usage, each.name))
        return total

    @property
    def reasoning_tokens(self) -> int:
        return sum(each.reasoning_tokens for each in self._answers.values())

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields the pieces of all answers as they arrive, each with its answer's index. The first error ends all answers."""
        if len(self) == 1:
            async for events, logprobs in self._answers[0].pieces():
                yield 0, events, logprobs
            return
        tasks = [asyncio.ensure_future(self._run(index)) for index in range(len(self))]
        try:
            left = len(tasks)
            while left:
                piece = await self._pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                if piece is None:
                    left -= 1
                else:
                    yield piece
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    async def _run(self, index: int) -> None:
        """Puts the pieces of one answer into the queue, then None, or the error that ended it."""
        first_piece = self._first_piece[index // self._size]
        try:
            if index % self._size:
                await first_piece.wait()
            async with self._running_limit:
                if index not in self._answers:
                    self._answers[index] = await self._start(index)
                async for events, logprobs in self._answers[index].pieces():
                    first_piece.set()
                    await self._pieces.put((index, events, logprobs))
                self._num_running -= 1
            first_piece.set()
            await self._pieces.put(None)
        except Exception as error:  # `pieces` raises it again
            await self._pieces.put(error)

    async def _start(self, index: int) -> Answer:
        """Starts an answer. While the server is overloaded it retries until none of this request's answers runs, then once
        more.
        """
        waits = True
        while True:
            self._num_running += 1
            try:
                return await self._starts[index]()
            except Overloaded:
                self._num_running -= 1
                if not waits:
                    raise
                waits = self._num_running > 0
                await asyncio.sleep(0.05)

    def close(self) -> None:
        for answer in self._answers.values():
            answer.close()
