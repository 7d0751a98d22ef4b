"""Sampling in one launch: one program per row, which reads its row of logits a few times, mostly from the L2 cache.

Rows are not sorted. The least logit that top-k or top-p keeps is found by its order-preserving integer key, two bits a
pass: a pass counts (or sums the weights of) the tokens above three candidate keys. That takes 8 passes per filter in
bfloat16, 16 in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.draw import MIXING, Draws
from paceline.ops.triton import launch_options

_BLOCK = 4096
_FIRST, _SECOND, _THIRD = (tl.constexpr(each) for each in MIXING)


def draw(logits: Tensor, best: Tensor, slots: Tensor, positions: Tensor, draws: Draws) -> Tensor:
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
    """Weights in float64 of one block; 0 for filtered tokens."""
    value = tl.load(base + column, column < columns, other=-float("inf")).to(tl.float32)
    weight = _weight(value, largest, temperature)
    return tl.where((_key(value, BITS) >= floor) & (weight >= min_p), weight, 0.0).to(tl.float64)


@triton.jit
def _uniform(seed, position):
    mixed = position.to(tl.uint64) * _FIRST + seed.to(tl.uint64)
    mixed = (mixed ^ (mixed >> 30)) * _SECOND
    mixed = (mixed ^ (mixed >> 27)) * _THIRD
    mixed = mixed ^ (mixed >> 31)
    return (mixed >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2 to the -53


@triton.jit
def _drawn(base, columns, largest, temperature, top_k, top_p, min_p, number, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The token at which the cumulative weight of the kept tokens reaches `number` times their total."""
    lane = tl.arange(0, BLOCK)
    floor = tl.full((), 0, tl.uint32)
    if (top_k > 0) & (top_k < columns):
        floor = _least_key(base, columns, largest, temperature, floor, top_k.to(tl.float64), True, BITS, BLOCK)
    if top_p < 1:
        total = tl.zeros([BLOCK], tl.float64)
        for start in range(0, columns, BLOCK):
            total += _kept(base, start + lane, columns, largest, temperature, floor, 0.0, BITS)
        wanted = top_p.to(tl.float64) * tl.sum(total)
        floor = _least_key(base, columns, largest, temperature, floor, wanted, False, BITS, BLOCK)
    whole = tl.full((), 0.0, tl.float64)
    for start in range(0, columns, BLOCK):
        whole += tl.sum(_kept(base, start + lane, columns, largest, temperature, floor, min_p, BITS))
    target = number * whole
    # the last block that adds to the sum and begins at the target or before it
    before = tl.full((), 0.0, tl.float64)
    under = tl.full((), 0.0, tl.float64)
    found = tl.full((), 0, tl.int32)
    for start in range(0, columns, BLOCK):
        size = tl.sum(_kept(base, start + lane, columns, largest, temperature, floor, min_p, BITS))
        here = (before <= target) & (size > 0)
        found = tl.where(here, start, found)
        under = tl.where(here, before, under)
        before += size
    kept = _kept(base, found + lane, columns, largest, temperature, floor, min_p, BITS)
    place = tl.sum((tl.cumsum(kept, 0) <= target - under).to(tl.int32))
    place = tl.minimum(place, tl.max(tl.where(kept > 0, lane, 0)))
    return (found + place).to(tl.int64)


@triton.jit(do_not_specialize=["columns"])
def _draw(
    logits,
    best,
    slots,
    positions,
    seeds,
    filters,
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
    slot = tl.load(slots + row)
    token = tl.load(best + row)
    temperature = tl.load(filters + 4 * slot)
    if temperature > 0:
        base = logits + row * columns
        largest = tl.load(base + token).to(tl.float32)
        top_k = tl.load(filters + 4 * slot + 1)
        top_p = tl.load(filters + 4 * slot + 2)
        min_p = tl.load(filters + 4 * slot + 3)
        number = _uniform(tl.load(seeds + slot), tl.load(positions + row))
        token = _drawn(base, columns, largest, temperature, top_k, top_p, min_p, number, BITS, BLOCK)
    tl.store(drawn + row, token)
