"""Tensors as a checkpoint stores them, decoded when they are needed: whole, or the rows and columns of a shard."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from paceline.errors import BadWeights
from paceline.ops.quantised import FORMATS, decode
from paceline.ops.weight import Quantised

Job = Callable[[], None]
T = TypeVar("T")
# Weights decoded by one job: few enough for the processor's caches, and threads share large tensors. Measured by loading
# qwen2.5-coder-1.5b on two cores of an AMD EPYC: `python -m paceline bench --model qwen2.5-coder-1.5b`.
_SLICE = 1_000_000
_AHEAD = 16  # tensors in work before the caller has taken them


class StoredTensor(ABC):
    """A tensor in a checkpoint. `shape` is that of torch; `kind` a key of `ops.quantised.FORMATS`.

    Rows and columns are slices with a start and an end: of the first and second axis, of all values of a vector as rows.
    """

    shape: tuple[int, ...]
    kind: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every value exactly."""
        return FORMATS[self.kind].dtype

    @abstractmethod
    def jobs(self, target: Tensor, rows: slice, columns: slice) -> list[Job]:
        """The calls that fill `target`, rounded to its dtype, with those rows and columns. Any thread may run each."""

    def decode(
        self, dtype: torch.dtype | None = None, rows: slice | None = None, columns: slice | None = None
    ) -> Tensor:
        """The tensor, or those rows and columns of it, in `dtype` (None: its own), in memory of its own."""
        across = slice(0, self.shape[0]) if rows is None else rows
        down = (slice(0, self.shape[1]) if columns is None else columns) if len(self.shape) > 1 else slice(0, 1)
        sizes = (across.stop - across.start, down.stop - down.start)[: len(self.shape)]
        target = torch.empty(sizes, dtype=dtype or self.dtype)
        for job in self.jobs(target, across, down):
            job()
        return target


class PlainTensor(StoredTensor):
    """A tensor that is in memory already, on any device."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)
        self.kind = _KINDS.get(tensor.dtype, "F32")

    def jobs(self, target: Tensor, rows: slice, columns: slice) -> list[Job]:
        part = self._tensor[rows] if self._tensor.dim() == 1 else self._tensor[rows, columns]
        return [lambda: _copy(part, target)]


class SafeTensor(StoredTensor):
    """A tensor in an open safetensors file; only the rows and columns that are asked for are read."""

    def __init__(self, path: Path, opened: Any, name: str) -> None:
        self._path, self._opened, self._name = path, opened, name
        part = opened.get_slice(name)
        self.shape = tuple(part.get_shape())
        self.kind = part.get_dtype()

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[self.kind].dtype if self.kind in FORMATS else torch.float32

    def jobs(self, target: Tensor, rows: slice, columns: slice) -> list[Job]:
        return [lambda: self._read(target, rows, columns)]

    def _read(self, target: Tensor, rows: slice, columns: slice) -> None:
        try:
            if target.shape == self.shape:
                part = self._opened.get_tensor(self._name)
            else:
                part = self._opened.get_slice(self._name)
                part = part[rows] if len(self.shape) == 1 else part[rows, columns]
            target.copy_(part)
        except SafetensorError as error:
            raise BadWeights(f"{self._path} is cut short or damaged: {error}") from error


class BlockTensor(StoredTensor):
    """A matrix or vector in blocks: `data` is [rows, bytes of a row] uint8, of a vector [values, bytes of a value].

    permuted_rows  0, or the number of rows of an attention head whose halves the file interleaves: rows 0, n / 2, 1, n / 2 + 1
                   and so on, which `decode` puts back in order
    """

    def __init__(self, data: Tensor, kind: str, shape: tuple[int, ...], permuted_rows: int = 0) -> None:
        self._data, self._permuted_rows = data, permuted_rows
        self.kind, self.shape = kind, shape

    def jobs(self, target: Tensor, rows: slice, columns: slice) -> list[Job]:
        width = columns.stop - columns.start
        step = max(1, _SLICE // width)
        if self._permuted_rows:
            assert rows.start % self._permuted_rows == 0 and rows.stop % self._permuted_rows == 0
            step = -(-step // self._permuted_rows) * self._permuted_rows
        flat = target.view(len(target), -1)

        def job(first: int, last: int) -> Job:
            into = flat[first - rows.start : last - rows.start]
            return lambda: self._fill(into, slice(first, last), columns)

        return [job(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step)]

    def quantised(self, rows: slice | None = None) -> Quantised:
        """The rows as they are stored, a copy on the CPU."""
        data = self._data if rows is None else self._data[rows]
        return Quantised(self.kind, self._in_order(data).clone())

    def _fill(self, target: Tensor, rows: slice, columns: slice) -> None:
        form, data = FORMATS[self.kind], self._data[rows]
        first, last = columns.start, columns.stop
        if first % form.per_block == 0 and last % form.per_block == 0:  # whole blocks: the others are not decoded
            size = form.block_bytes
            values = decode(data[:, first // form.per_block * size : last // form.per_block * size], self.kind)
        else:
            values = decode(data, self.kind)[:, first:last]
        target.copy_(self._in_order(values))

    def _in_order(self, rows: Tensor) -> Tensor:
        if not self._permuted_rows:
            return rows
        return rows.view(-1, self._permuted_rows // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def as_stored(tensor: StoredTensor | Tensor) -> StoredTensor:
    return PlainTensor(tensor) if isinstance(tensor, Tensor) else tensor


def decoded(stored: Iterable[tuple[str, StoredTensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor of `dtype`) in the same order, a few tensors ahead of the caller on every core."""

    def work() -> Iterator[tuple[tuple[str, Tensor], list[Job], int]]:
        for name, each in stored:
            target = torch.empty(each.shape, dtype=dtype)
            whole = slice(0, each.shape[0]), slice(0, each.shape[1] if len(each.shape) > 1 else 1)
            yield (name, target), each.jobs(target, *whole), 1

    yield from run_ahead(work())


def run_ahead(work: Iterable[tuple[T, list[Job], int]]) -> Iterator[T]:
    """Yields each item of (item, its jobs, how many tensors it counts as) in order once its jobs are done.

    Jobs run on every core, those of the next items up to 16 tensors ahead of the caller. While this runs, threads that use
    torch for the first time start with one intra-operation thread.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(os.cpu_count() or 1, initializer=torch.set_num_threads, initargs=(1,))
    try:
        pending: deque[tuple[T, list[Future[None]], int]] = deque()
        ahead = 0
        for item, jobs, count in work:
            pending.append((item, [pool.submit(_run, job) for job in jobs], count))
            ahead += count
            while ahead > _AHEAD:
                done, futures, count = pending.popleft()
                _wait(futures)
                ahead -= count
                yield done
        for done, futures, _ in pending:
            _wait(futures)
            yield done
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def _run(job: Job) -> None:
    # the caller may have made the target in this mode, which each thread enters for itself
    with torch.inference_mode():
        job()


def _wait(futures: list[Future[None]]) -> None:
    for each in futures:
        each.result()
