"""Packs samples into rows of one length: several documents side by side, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paceline.train.samples import Sample

_OPEN_ROWS = 32  # rows that a document may still go to; with more of them the order of an epoch is less random
_ROUND = 64  # supervised rows are padded to a multiple, so that few shapes of tensors occur


@dataclass(frozen=True)
class PackedRows:
    """A batch of B rows of S tokens, on the host. What is not used at a row's end is a document of its own.

    tokens, positions   [B, S] int64; positions count within a document
    documents           [B, S] int64, numbered over the batch
    bounds              where each document starts in the flat [B * S] order, and the end of the last
    places              [N] int64 flat places whose next token is supervised, padded with place 0
    weights             [N] float32, 1, and 0 for the padding
    follows             [N] bool, whether entry n - 1 is the place just before
    depths              [N] int64, tokens of the same document before the place
    tasks               [N] int64, index of the document's task
    num_tokens          tokens of documents
    """

    tokens: Any
    positions: Any
    documents: Any
    bounds: list[int]
    places: Any
    weights: Any
    follows: Any
    depths: Any
    tasks: Any
    num_tokens: int

    @property
    def num_supervised(self) -> int:
        return int(self.weights.sum())


class Packing:
    """The rows of every epoch over `samples`: all of them once, in another order each time."""

    def __init__(self, samples: Sequence[Sample], length: int, seed: int, tasks: Sequence[str]) -> None:
        """No sample may be longer than `length`. `tasks` gives tasks their index."""
        self.samples = samples
        self.length = length
        self._seed = seed
        self._tasks = {task: index for index, task in enumerate(tasks)}
        self._epoch = -1
        self._plan: list[list[int]] = []

    def epoch(self, number: int) -> list[list[int]]:
        """The rows of an epoch, each as the samples in it."""
        if number != self._epoch:
            order = np.random.default_rng((self._seed, number)).permutation(len(self.samples))
            self._epoch, self._plan = number, self._packed(order.tolist())
        return self._plan

    def take(self, place: tuple[int, int], count: int) -> tuple[list[list[int]], tuple[int, int]]:
        """The next `count` rows from `place` = (epoch, row) on, across epochs, and the place after them."""
        epoch, row = place
        taken: list[list[int]] = []
        while len(taken) < count:
            rows = self.epoch(epoch)[row : row + count - len(taken)]
            taken += rows
            row += len(rows)
            if row >= len(self.epoch(epoch)):
                epoch, row = epoch + 1, 0
        return taken, (epoch, row)

    def _packed(self, order: list[int]) -> list[list[int]]:
        """First fit over a few open rows; where a document fits none, the fullest row is closed."""
        finished: list[list[int]] = []
        open_rows: list[tuple[int, list[int]]] = []  # (tokens left, samples)
        for index in order:
            needed = len(self.samples[index].tokens)
            place = next((n for n, (left, _) in enumerate(open_rows) if left >= needed), None)
            if place is None:
                if len(open_rows) == _OPEN_ROWS:
                    fullest = min(range(_OPEN_ROWS), key=lambda n: open_rows[n][0])
                    finished.append(open_rows.pop(fullest)[1])
                open_rows.append((self.length, []))
                place = len(open_rows) - 1
            left, members = open_rows[place]
            open_rows[place] = (left - needed, [*members, index])
        return finished + [members for _, members in open_rows]

    def supervised(self, rows: Sequence[Sequence[int]]) -> int:
        """Supervised tokens of rows."""
        return sum(self.samples[index].num_supervised for row in rows for index in row)

    def size(self, rows: Sequence[Sequence[int]]) -> int:
        """Tokens of rows, without what is not used."""
        return sum(len(self.samples[index].tokens) for row in rows for index in row)

    def pack(self, rows: Sequence[Sequence[int]]) -> PackedRows:
        """Rows of samples as arrays."""
        count, length = len(rows), self.length
        tokens = np.zeros((count, length), np.int64)
        positions = np.zeros((count, length), np.int64)
        documents = np.zeros((count, length), np.int64)
        bounds = [0]
        places, tasks, depths = [], [], []
        num_tokens = 0
        for number, row in enumerate(rows):
            start = 0
            for index in [*row, None]:
                sample = None if index is None else self.samples[index]
                size = length - start if sample is None else len(sample.tokens)
                if size == 0:
                    continue
                part = slice(start, start + size)
                documents[number, part] = len(bounds) - 1
                positions[number, part] = np.arange(size)
                if sample is not None:
                    tokens[number, part] = sample.tokens
                    num_tokens += size
                    inside = _predicting(sample)
                    depths.append(inside)
                    places.append(number * length + start + inside)
                    tasks.append(np.full(len(inside), self._tasks[sample.task]))
                start += size
                bounds.append(number * length + start)
        return PackedRows(tokens, positions, documents, bounds, *_padded(places, depths, tasks), num_tokens)


def _predicting(sample: Sample) -> Any:
    """Places of a sample whose next token is supervised."""
    return np.concatenate([np.arange(max(first, 1) - 1, last - 1) for first, last in sample.spans if last > 1])


def _padded(places: list[Any], depths: list[Any], tasks: list[Any]) -> tuple[Any, Any, Any, Any, Any]:
    """places, weights, follows, depths and tasks of PackedRows."""
    place, depth, task = (
        np.concatenate([*each, np.zeros(0, np.int64)]).astype(np.int64) for each in (places, depths, tasks)
    )
    count = len(place)
    total = max(_ROUND, -(-count // _ROUND) * _ROUND)
    weights = np.zeros(total, np.float32)
    weights[:count] = 1
    place, depth, task = (np.pad(each, (0, total - count)) for each in (place, depth, task))
    follows = np.zeros(total, bool)
    follows[1:count] = (place[1:count] == place[: count - 1] + 1) & (depth[1:count] > 0)
    return place, weights, follows, depth, task
