"""Argmax over the vocabulary in two launches: the best of each chunk of a row, then the best of the chunks."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.triton import launch_options

_BLOCK = 2048
_PROGRAMS = 4096  # what the first launch aims for: enough loads in flight to read at full bandwidth


def argmax(logits: Tensor) -> Tensor:
    """logits [T, V] without NaN -> the lowest index of each row's largest value, [T] int64."""
    return argmax_with_value(logits)[1]


def argmax_with_value(logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [T, V] without NaN -> (each row's largest value in float32, its lowest index in int64), both [T]."""
    rows, columns = logits.shape
    logits = logits.contiguous()
    blocks = triton.cdiv(columns, _BLOCK)
    blocks_a_chunk = triton.cdiv(blocks, max(1, min(256, _PROGRAMS // rows)))
    chunks = triton.cdiv(blocks, blocks_a_chunk)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    where = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    values = torch.empty(rows, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, dtype=torch.int64, device=logits.device)
    options = launch_options(logits.device)
    _chunks[(rows, chunks)](logits, best, where, columns, blocks_a_chunk * _BLOCK, BLOCK=_BLOCK, num_warps=4, **options)
    _combine[(rows,)](
        best, where, values, indices, chunks, BLOCK=max(32, triton.next_power_of_2(chunks)), num_warps=1, **options
    )
    return values, indices


@triton.jit(do_not_specialize=["columns", "width"])
def _chunks(logits, best, where, columns, width, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """The largest of one chunk of one row. Each lane keeps the first place where it saw its largest."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    place = tl.full([BLOCK], 2147483647, tl.int32)
    for start in range(chunk * width, tl.minimum(chunk * width + width, columns), BLOCK):
        column = start + lane
        value = tl.load(logits + row * columns + column, column < columns, other=-float("inf")).to(tl.float32)
        better = (value > top) | ((place == 2147483647) & (column < columns))
        top = tl.where(better, value, top)
        place = tl.where(better, column, place)
    largest = tl.max(top, axis=0)
    tl.store(best + row * tl.num_programs(1) + chunk, largest)
    tl.store(where + row * tl.num_programs(1) + chunk, tl.min(tl.where(top == largest, place, 2147483647), axis=0))


@triton.jit(do_not_specialize=["chunks"])
def _combine(best, where, values, indices, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    value = tl.load(best + row * chunks + lane, lane < chunks, other=-float("inf"))
    place = tl.load(where + row * chunks + lane, lane < chunks, other=2147483647)
    largest = tl.max(value, axis=0)
    tl.store(values + row, largest)
    tl.store(indices + row, tl.min(tl.where(value == largest, place, 2147483647), axis=0).to(tl.int64))
