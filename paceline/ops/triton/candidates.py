"""The likeliest tokens of each row in two launches: those of each chunk of a row, then those of the chunks."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.triton import launch_options

_BLOCK = 1024
_NONE = tl.constexpr(2147483647)


def candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kernel of `ops.candidates.candidates`."""
    rows, columns = logits.shape
    logits = logits.contiguous()
    chunks = triton.cdiv(columns, _BLOCK)
    values = torch.empty(rows, chunks, count, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, chunks, count, dtype=torch.int32, device=logits.device)
    sums = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    found = torch.empty(rows, count, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, count, dtype=torch.float32, device=logits.device)
    options = launch_options(logits.device)
    _chunks[(rows, chunks)](logits, values, tokens, sums, columns, COUNT=count, BLOCK=_BLOCK, num_warps=4, **options)
    _join[(rows,)](
        values, tokens, sums, found, logprobs, chunks, COUNT=count,
        BLOCK=triton.next_power_of_2(chunks * count), num_warps=4, **options,
    )  # fmt: skip
    return found, logprobs


def put_first(found: Tensor, drawn: Tensor, tokens: Tensor | None) -> Tensor:
    """The kernel of `ops.candidates.put_first`."""
    rows, count = found.shape
    out = torch.empty_like(found)
    _put_first[(rows,)](
        found,
        drawn,
        tokens,
        out,
        COUNT=count,
        BLOCK=triton.next_power_of_2(count),
        num_warps=1,
        **launch_options(found.device),
    )
    return out


@triton.jit
def _put_first(found, drawn, tokens, out, COUNT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < COUNT
    own = tl.load(found + row * COUNT + lane, inside, other=-1)
    first = tl.load(drawn + row)
    place = tl.min(tl.where((own == first) & inside, lane, COUNT - 1), axis=0)
    before = tl.load(found + row * COUNT + lane - 1, inside & (lane > 0), other=-1)
    moved = tl.where(lane == 0, first, tl.where(lane <= place, before, own))
    if tokens is not None:
        moved = tl.load(tokens + moved, inside, other=0)
    tl.store(out + row * COUNT + lane, moved, inside)


@triton.jit(do_not_specialize=["columns"])
def _chunks(logits, values, tokens, sums, columns, COUNT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One chunk of one row: its COUNT largest, and the sum of exponentials relative to the largest."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(logits + row * columns + column, column < columns, other=-float("inf")).to(tl.float32)
    place = row * tl.num_programs(1) + chunk
    best = tl.max(left, axis=0)
    tl.store(sums + place, tl.sum(tl.exp(left - best), axis=0))
    for index in tl.static_range(COUNT):
        best = tl.max(left, axis=0)
        token = tl.min(tl.where(left == best, column, _NONE), axis=0)
        tl.store(values + place * COUNT + index, best)
        tl.store(tokens + place * COUNT + index, token)
        left = tl.where(column == token, -float("inf"), left)


@triton.jit(do_not_specialize=["chunks"])
def _join(
    values, tokens, sums, found, logprobs, chunks, COUNT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One row: the COUNT largest of its chunks' largest. A chunk's first value is the one that its sum is relative to."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < chunks * COUNT
    left = tl.load(values + row * chunks * COUNT + lane, inside, other=-float("inf"))
    token = tl.load(tokens + row * chunks * COUNT + lane, inside, other=_NONE)
    largest = tl.max(left, axis=0)
    first = inside & (lane % COUNT == 0)
    share = tl.load(sums + row * chunks + lane // COUNT, first, other=0.0)
    normaliser = largest + tl.log(tl.sum(tl.where(first, share * tl.exp(left - largest), 0.0), axis=0))
    for index in tl.static_range(COUNT):
        best = tl.max(left, axis=0)
        chosen = tl.min(tl.where(left == best, token, _NONE), axis=0)
        tl.store(found + row * COUNT + index, chosen.to(tl.int64))
        tl.store(logprobs + row * COUNT + index, best - normaliser)
        left = tl.where(token == chosen, -float("inf"), left)
