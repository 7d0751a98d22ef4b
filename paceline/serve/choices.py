"""Several answers to one request, under way together."""

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
    """The answers to `starts`, `size` in a row of each prompt, at most `width` of them under way.

    Those of one prompt begin when the first of them writes, so that they find the prompt in the cache.
    """

    def __init__(self, starts: Sequence[Start], size: int, width: int) -> None:
        self._starts = starts
        self._size = size
        self._places = asyncio.Semaphore(max(width, 1))
        self._found: dict[int, Answer] = {}
        self._num_running = 0
        self._writing = [asyncio.Event() for _ in starts[::size]]
        self._pieces: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(1)

    @classmethod
    async def begin(cls, starts: Sequence[Start], size: int = 1, width: int = 1) -> Choices:
        """With the first one begun, so that what is wrong with the request is raised here. The caller closes them."""
        choices = cls(starts, size, width)
        choices._found[0] = await starts[0]()
        choices._num_running = 1
        return choices

    def __getitem__(self, index: int) -> Answer:
        """One that has begun."""
        return self._found[index]

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def usage(self) -> Usage:
        """The sums of what has been, each prompt counted once."""
        total = Usage()
        for index, answer in self._found.items():
            for each in dataclasses.fields(Usage):
                prompts = each.name in ("prompt_tokens", "cached_tokens")
                if not prompts or index % self._size == 0:
                    setattr(total, each.name, getattr(total, each.name) + getattr(answer.usage, each.name))
        return total

    @property
    def reasoning_tokens(self) -> int:
        return sum(each.reasoning_tokens for each in self._found.values())

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces of all answers as they come, each with its answer's index. The first error of one ends them all."""
        if len(self) == 1:
            async for events, logprobs in self._found[0].pieces():
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
        """Puts the pieces of one answer into the queue, then None or the error that it ended by."""
        writing = self._writing[index // self._size]
        try:
            if index % self._size:
                await writing.wait()
            async with self._places:
                if index not in self._found:
                    self._found[index] = await self._start(index)
                async for events, logprobs in self._found[index].pieces():
                    writing.set()
                    await self._pieces.put((index, events, logprobs))
                self._num_running -= 1
            writing.set()
            await self._pieces.put(None)
        except Exception as error:  # raised again by `pieces`
            await self._pieces.put(error)

    async def _start(self, index: int) -> Answer:
        """Begins an answer. Where others have the places it waits as long as one of ours is to end, and tries once more."""
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
        for answer in self._found.values():
            answer.close()
