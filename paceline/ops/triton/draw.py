"""Sampling in one launch: one program per row, which reads its row of logits a few times, mostly from the L2 cache.

Rows are not sorted. The least logit that top-k or top-p keeps is found by its order-preserving integer key, two bits a
pass: a pass counts (or sums the weights of) the tokens above three candidate keys. That takes 8 passes per filter in
bfloat16, 16 in float32. One more pass draws.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.draw import MIXING, SLACK, TOKEN_MIXING, Draws
from paceline.ops.triton import launch_options

_BLOCK = 4096
_FIRST, _SECOND, _THIRD = (tl.constexpr(each) for each in MIXING)
_WEYL, _FACTOR, _LAST_FACTOR = (tl.constexpr(each) for each in TOKEN_MIXING)
_SCALED_SLACK = tl.constexpr(SLACK * 2.0**31)
_UNIT = tl.constexpr(2.0**-31)


def draw(
    logits: Tensor, best: Tensor, slots: Tensor, positions: Tensor, draws: Draws, tokens: Tensor | None = None
) -> Tensor:
    """See `paceline.ops.draw.draw`."""
    rows, columns = logits.shape
    drawn = torch.empty_like(best)
    _draw[(rows,)](
        logits.contiguous(),
        best,
        slots.contiguous(),
        positions.contiguous(),
        draws.seeds,
        draws.filters,
        tokens,
        drawn,
        columns,
        BITS=16 if logits.dtype is torch.bfloat16 else 32,
        BLOCK=min(_BLOCK, triton.next_power_of_2(columns)),
        num_warps=16,
        **launch_options(logits.device),
    )
    return drawn


@triton.jit
def _key(value, BITS: tl.constexpr):
    """An integer of BITS bits that is larger for larger values; bfloat16 has only 16 that are not zero."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return ordered >> (32 - BITS)


@triton.jit
def _weight(value, largest, temperature):
    return tl.exp((value - largest) / temperature)


@triton.jit
def _least_key(
    base, columns, largest, temperature, floor, wanted, COUNTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key K such that the tokens with keys >= K reach `wanted`.

    COUNTS: by their number; else by the sum of the weights of those with keys >= `floor`.
    """
    lane = tl.arange(0, BLOCK)
    least = tl.full((), 0, tl.uint32)
    unit = tl.full((), 1 << (BITS - 2), tl.uint32)
    for _ in range(BITS // 2):
        one = tl.zeros([BLOCK], tl.float32)
        two = tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + lane
            value = tl.load(base + column, column < columns, other=-float("inf")).to(tl.float32)
            key = _key(value, BITS)
            if COUNTS:
                gives = tl.where(column < columns, 1.0, 0.0)
            else:
                gives = tl.where(key >= floor, _weight(value, largest, temperature), 0.0)
            one += tl.where(key >= least + unit, gives, 0.0)
            two += tl.where(key >= least + 2 * unit, gives, 0.0)
            three += tl.where(key >= least + 3 * unit, gives, 0.0)
        reached = (tl.sum(one.to(tl.float64)) >= wanted).to(tl.uint32)
        reached += (tl.sum(two.to(tl.float64)) >= wanted).to(tl.uint32)
        reached += (tl.sum(three.to(tl.float64)) >= wanted).to(tl.uint32)
        least += reached * unit
        unit = unit >> 2
    return least


@triton.jit
def _kept(base, column, columns, largest, temperature, floor, min_p, BITS: tl.constexpr):
    """Weights in float32 of one block; 0 for filtered tokens."""
    value = tl.load(base + column, column < columns, other=-float("inf")).to(tl.float32)
    weight = _weight(value, largest, temperature)
    return tl.where((_key(value, BITS) >= floor) & (weight >= min_p), weight, 0.0)


@triton.jit
def _row_key(seed, position):
    mixed = (position + 1).to(tl.uint64) * _FIRST + seed.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 30)) * _SECOND
    mixed = (mixed ^ (mixed >> 27)) * _THIRD
    return mixed ^ (mixed >> 31)


@triton.jit
def _hashed(token, first, second):
    """31 random bits as int32 for each token id, as in the reference: its last shift keeps the sign, too."""
    mixed = token.to(tl.uint32) * _WEYL + first
    mixed = (mixed ^ (mixed >> 16)) * _FACTOR + second
    mixed = (mixed ^ (mixed >> 15)) * _LAST_FACTOR
    signed = mixed.to(tl.int32, bitcast=True)
    return (signed ^ (signed >> 16)) & 0x7FFFFFFF


@triton.jit
def _time(coarse, fine):
    """The exponential time in float64: below 2**-20 by its series, where 1 - number is too coarse."""
    number = (coarse.to(tl.float64) + (fine.to(tl.float64) + 0.5) * _UNIT) * _UNIT
    return tl.where(number < 9.5367431640625e-7, number + number * number / 2, -tl.log(1 - number))


@triton.jit
def _token(tokens, column, columns):
    """The token ids of columns."""
    return column.to(tl.int64) if tokens is None else tl.load(tokens + column, column < columns, other=0)


@triton.jit
def _drawn(
    base, tokens, columns, largest, temperature, top_k, top_p, min_p, best, key, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The column that arrives first; float64 times only in blocks in which one may come before the best so far."""
    lane = tl.arange(0, BLOCK)
    floor = tl.full((), 0, tl.uint32)
    if (top_k > 0) & (top_k < columns):
        floor = _least_key(base, columns, largest, temperature, floor, top_k.to(tl.float64), True, BITS, BLOCK)
    if top_p < 1:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, columns, BLOCK):
            total += _kept(base, start + lane, columns, largest, temperature, floor, 0.0, BITS).to(tl.float64)
        wanted = top_p.to(tl.float64) * tl.sum(total)
        floor = _least_key(base, columns, largest, temperature, floor, wanted, False, BITS, BLOCK)
    first = key.to(tl.uint32)
    second = (key >> 32).to(tl.uint32)
    likeliest = _token(tokens, best, columns)
    earliest = _time(_hashed(likeliest, first, second), _hashed(likeliest, second, first))
    drawn = best
    for start in range(0, columns, BLOCK):
        column = start + lane
        token = _token(tokens, column, columns)
        weight = _kept(base, column, columns, largest, temperature, floor, min_p, BITS)
        coarse = _hashed(token, first, second)
        early = coarse.to(tl.float32) < weight * (earliest * _SCALED_SLACK).to(tl.float32)
        if tl.max(early.to(tl.int32)) > 0:
            time = _time(coarse, _hashed(token, second, first)) / weight.to(tl.float64)
            time = tl.where(early, time, float("inf"))
            least = tl.min(time)
            place = tl.min(tl.where(time == least, column, columns))
            drawn = tl.where(least < earliest, place.to(tl.int64), drawn)
            earliest = tl.minimum(least, earliest)
    return drawn


@triton.jit
def drawn_column(
    base, best, row, slots, positions, seeds, filters, tokens, columns, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The column that a row's slot draws from the logits at `base`, or `best`, that of the largest, without a temperature."""
    slot = tl.load(slots + row)
    column = best
    temperature = tl.load(filters + 4 * slot)
    if temperature > 0:
        largest = tl.load(base + best).to(tl.float32)
        top_k = tl.load(filters + 4 * slot + 1)
        top_p = tl.load(filters + 4 * slot + 2)
        min_p = tl.load(filters + 4 * slot + 3)
        key = _row_key(tl.load(seeds + slot), tl.load(positions + row))
        column = _drawn(base, tokens, columns, largest, temperature, top_k, top_p, min_p, best, key, BITS, BLOCK)
    return column


@triton.jit(do_not_specialize=["columns"])
def _draw(
    logits,
    best,
    slots,
    positions,
    seeds,
    filters,
    tokens,
    drawn,
    columns,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    likeliest = tl.load(best + row)
    base = logits + row * columns
    column = drawn_column(base, likeliest, row, slots, positions, seeds, filters, tokens, columns, BITS, BLOCK)
    tl.store(drawn + row, column)
