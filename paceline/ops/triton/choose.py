"""A drafter's choice of tokens in two launches: each chunk's likeliest, then each row's, its draw and their order."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.choose import TokenBias, add_bias
from paceline.ops.draw import Draws
from paceline.ops.triton import launch_options
from paceline.ops.triton.draw import drawn_column
from paceline.ops.weight import Dense

_CHUNK = 1024  # columns of a program without a bias
# Of the bias's matrix that a program holds in registers: 128 programs share one of [16384, 128] in bfloat16.
_TILE_BYTES = 1 << 15
# Every row reads the bias's matrix again, from the L2 cache: about 0.8 us on an H200 for 4 MB, by its bandwidth. In more
# rows than these that is no less than the lookup, product and addition that read it once, three launches of 2 to 4 us.
_MOST_BIASED = 8
_BLOCK = 4096  # of the draw


def choose(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    draws: Draws,
    tokens: Tensor | None,
    found: Tensor,
    logprobs: Tensor,
    bias: TokenBias | None = None,
    most_biased: int = _MOST_BIASED,
) -> Tensor:
    """The kernel of `ops.choose.choose`. Above `most_biased` rows the bias is computed by `ops.linear`."""
    (rows, count), columns, device = found.shape, logits.shape[1], logits.device
    shared = rows // len(logits)
    assert found.stride() == logprobs.stride() and found.stride(1) == 1
    if bias is not None and rows > most_biased:
        logits, bias = add_bias(logits, bias), None
    logits = logits.contiguous()
    chunk, rank, before, embedding, matrix = _CHUNK, 0, None, None, None
    if bias is not None:
        assert isinstance(bias.output, Dense) and bias.output.bias is None
        before, embedding, matrix, rank = bias.before, bias.embedding, bias.output.matrix, bias.output.columns
        chunk = min(_CHUNK, max(16, _TILE_BYTES // matrix.element_size() // triton.next_power_of_2(rank)))
    chunks = triton.cdiv(columns, chunk)
    values = torch.empty(rows, chunks, count, dtype=torch.float32, device=device)
    places = torch.empty(rows, chunks, count, dtype=torch.int32, device=device)
    sums = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    first = torch.empty(rows, dtype=torch.int64, device=device)
    options = launch_options(device)
    biased = logits if bias is None else logits.new_empty(rows, columns)
    _chunks[(rows, chunks)](
        logits, biased, before, embedding, matrix, values, places, sums, columns, COUNT=count, CHUNK=chunk, RANK=rank,
        RANKS=triton.next_power_of_2(max(1, rank)), SHARED=rows // len(logits), num_warps=4 if bias is None else 8,
        **options,
    )  # fmt: skip
    _join[(rows,)](
        values, places, sums, biased, slots.contiguous(), positions.contiguous(), draws.seeds, draws.filters, tokens,
        found, logprobs, first, columns, chunks, found.stride(0),
        COUNT=count, LANES=triton.next_power_of_2(chunks * count), BITS=16 if logits.dtype is torch.bfloat16 else 32,
        BLOCK=min(_BLOCK, triton.next_power_of_2(columns)), SHARED=shared, SHARED_LOGITS=rows // len(biased),
        num_warps=16, **options,
    )  # fmt: skip
    return first


# whose biases do not depend on the number of rows
choose_deterministic = functools.partial(choose, most_biased=0)


@triton.jit(do_not_specialize=["columns"])
def _chunks(
    logits, biased, before, embedding, matrix, values, places, sums, columns,
    COUNT: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SHARED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: its COUNT largest, and the sum of exponentials relative to the largest.

    SHARED rows side by side read the same logits. With a bias (RANK > 0) its rows of the matrix are read before the token
    before is known. The biased logits are stored.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    rank = tl.arange(0, RANKS)
    if RANK > 0:
        nearest = tl.minimum(column, columns - 1)  # rows past the end repeat the last one and are not stored
        tile = tl.load(matrix + nearest[:, None] * RANK + rank[None, :], (rank < RANK)[None, :], other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(logits + row // SHARED * columns + column, column < columns, other=-float("inf"))
    left = value.to(tl.float32)
    if RANK > 0:
        embedded = tl.load(embedding + tl.load(before + row) * RANK + rank, rank < RANK, other=0.0)
        bias = tl.sum(tile.to(tl.float32) * embedded.to(tl.float32)[None, :], axis=1)
        value = (left + bias.to(value.dtype).to(tl.float32)).to(value.dtype)
        tl.store(biased + row * columns + column, value, column < columns)
        left = value.to(tl.float32)
    place = row * tl.num_programs(1) + chunk
    best, lane = tl.max(left, axis=0, return_indices=True)  # of equal ones the first
    tl.store(sums + place, tl.sum(tl.exp(left - best), axis=0))
    for index in tl.static_range(COUNT):
        if index > 0:
            left = tl.where(column == chunk * CHUNK + lane, -float("inf"), left)
            best, lane = tl.max(left, axis=0, return_indices=True)
        tl.store(values + place * COUNT + index, best)
        tl.store(places + place * COUNT + index, chunk * CHUNK + lane)


@triton.jit(do_not_specialize=["columns", "chunks", "stride"])
def _join(
    values, places, sums, logits, slots, positions, seeds, filters, tokens, found, logprobs, first,
    columns, chunks, stride,
    COUNT: tl.constexpr, LANES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr,
    SHARED_LOGITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: the COUNT largest of its chunks' largest, of which equal ones are in the order of their columns.

    A chunk's first value is the one that its sum is relative to. SHARED rows side by side have the same slot and position.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    base = row * chunks * COUNT
    left = tl.load(values + base + lane, lane < chunks * COUNT, other=-float("inf"))
    leads = (lane < chunks * COUNT) & (lane % COUNT == 0)
    share = tl.load(sums + row * chunks + lane // COUNT, leads, other=0.0)
    best, at = tl.max(left, axis=0, return_indices=True)
    normaliser = best + tl.log(tl.sum(tl.where(leads, share * tl.exp(left - best), 0.0), axis=0))
    column = tl.load(places + base + at).to(tl.int64)
    row_logits, owner = logits + row // SHARED_LOGITS * columns, row // SHARED
    drawn = drawn_column(row_logits, column, owner, slots, positions, seeds, filters, tokens, columns, BITS, BLOCK)
    token = drawn if tokens is None else tl.load(tokens + drawn)
    tl.store(first + row, token)
    tl.store(found + row * stride, token)
    after = 1  # how far behind its own place a candidate goes: 0 after the drawn one
    for index in tl.static_range(COUNT):
        if index > 0:
            left = tl.where(lane == at, -float("inf"), left)
            best, at = tl.max(left, axis=0, return_indices=True)
            column = tl.load(places + base + at).to(tl.int64)
        tl.store(logprobs + row * stride + index, best - normaliser)
        token = column if tokens is None else tl.load(tokens + column)
        tl.store(found + row * stride + index + after, token, (index + after < COUNT) & (column != drawn))
        after -= (column == drawn).to(tl.int32)
