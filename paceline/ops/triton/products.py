"""The kernels of `ops.triton.linear`: a product of one token, a product of few tokens, and the sum of a product's parts.

With SCALED the weight is in float8 (`ops.weight.Float8`): its blocks are widened in registers, which is exact, and a row's sum
is multiplied by the row's scale before anything else is added.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated, misc"
# ruff: noqa: RUF005 (Triton tuples grow by +)

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.triton.norm import gated, normalise


@triton.jit
def rows_kernel(
    x, norm, weight, scales, bias, residual, out, eps, columns,
    K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
    AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of each of TOKENS tokens. The loads of the weight's first blocks start before x may be read.

    One token's x stays in registers. Several tokens' would not fit there, so it is read from the cache again at each step.
    """
    first = tl.program_id(0) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    row = tl.minimum(lane, columns - 1 - first)  # rows past the end repeat the last one and are not stored
    column = tl.arange(0, BLOCK_K)
    base = weight + first.to(tl.int64) * K
    tile = row[:, None] * K + column[None, :]
    second = base + columns.to(tl.int64) * K  # the up rows of a gated weight
    weights = ()
    ups = ()
    for step in tl.static_range(min(AHEAD, STEPS)):
        weights = weights + (_block(base + tile, column, step, K, BLOCK_K, SCALED),)
        if GATED:
            ups = ups + (_block(second + tile, column, step, K, BLOCK_K, SCALED),)
    if SCALED:
        row_scale = tl.load(scales + first + row)
        if GATED:
            up_scale = tl.load(scales + columns + first + row)
    factors = ()
    if NORM:
        for step in tl.static_range(STEPS):
            factors = factors + (tl.load(norm + step * BLOCK_K + column, step * BLOCK_K + column < K, other=0.0),)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    inputs = ()
    if TOKENS == 1:
        for step in tl.static_range(STEPS):
            inputs = inputs + (_part(x, column, step, K, BLOCK_K),)
    token_scales = ()
    if NORM:
        for token in tl.static_range(TOKENS):
            squares = tl.zeros([BLOCK_K], tl.float32)
            for step in tl.static_range(STEPS):
                part = inputs[step] if TOKENS == 1 else _part(x + token * K, column, step, K, BLOCK_K)
                squares += part * part
            token_scales = token_scales + (tl.rsqrt(tl.sum(squares, axis=0) / K + eps),)
    totals = ()
    up_totals = ()
    for _ in tl.static_range(TOKENS):
        totals = totals + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        up_totals = up_totals + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            weights = weights + (_block(base + tile, column, step + AHEAD, K, BLOCK_K, SCALED),)
            if GATED:
                ups = ups + (_block(second + tile, column, step + AHEAD, K, BLOCK_K, SCALED),)
        sums = ()
        up_sums = ()
        for token in tl.static_range(TOKENS):
            value = inputs[step] if TOKENS == 1 else _part(x + token * K, column, step, K, BLOCK_K)
            if NORM:
                value = normalise(value, token_scales[token], factors[step])
            sums = sums + (totals[token] + weights[step].to(tl.float32) * value[None, :],)
            if GATED:
                up_sums = up_sums + (up_totals[token] + ups[step].to(tl.float32) * value[None, :],)
        totals = sums
        if GATED:
            up_totals = up_sums
    DTYPE: tl.constexpr = out.dtype.element_ty
    for token in tl.static_range(TOKENS):
        result = tl.sum(totals[token], axis=1)
        if SCALED:
            result *= row_scale
        if BIAS:
            result += tl.load(bias + first + row).to(tl.float32)
        if GATED:
            up = tl.sum(up_totals[token], axis=1)
            if SCALED:
                up *= up_scale
            if BIAS:
                up += tl.load(bias + columns + first + row).to(tl.float32)
            result = gated(result, up, DTYPE)
        to = token * columns + first
        if RESIDUAL:
            result = result.to(DTYPE).to(tl.float32) + tl.load(residual + to + row).to(tl.float32)
        tl.store(out + to + lane, result.to(DTYPE), lane < columns - first)


@triton.jit
def _part(x, column, step: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K values of a token, in float32."""
    return tl.load(x + step * BLOCK_K + column, step * BLOCK_K + column < K, other=0.0).to(tl.float32)


@triton.jit
def _block(pointers, column, step: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr):
    """One [BLOCK_N, BLOCK_K] block of the weight.

    A dense one is read once a step and so marked to leave the cache first; a drafter's, in float8, by each of its passes.
    """
    POLICY: tl.constexpr = "" if SCALED else "evict_first"
    if (step + 1) * BLOCK_K <= K:
        block = tl.load(pointers + step * BLOCK_K, eviction_policy=POLICY)
    else:
        inside = (step * BLOCK_K + column < K)[None, :]
        block = tl.load(pointers + step * BLOCK_K, inside, other=0.0, eviction_policy=POLICY)
    return block


@triton.jit(do_not_specialize=["tokens"])
def tiles_kernel(
    x, weight, scales, bias, residual, out, partial, tokens,
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr, PART: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_T + TAIL] of the transposed output over one part of K; tiles of the same rows are neighbours.

    With GATED the first half of a tile's rows are gate rows, the second half the up rows that go with them.
    """
    tiles_t = tl.cdiv(tokens, BLOCK_T + TAIL)
    tile_n = tl.program_id(0) // tiles_t
    first_token = tl.program_id(0) % tiles_t * (BLOCK_T + TAIL)
    split = tl.program_id(1)
    lane = tl.arange(0, BLOCK_N)
    if GATED:
        row = tl.minimum(tile_n * (BLOCK_N // 2) + lane % (BLOCK_N // 2), N // 2 - 1)
        row += (lane // (BLOCK_N // 2)) * (N // 2)
    else:
        row = tl.minimum(tile_n * BLOCK_N + lane, N - 1)
    begin = split * PART
    column = tl.arange(0, BLOCK_K)
    weight_rows = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    if SCALED:
        row_scale = tl.load(scales + row)
    if OVERLAP:
        gdc_launch_dependents()
        if AHEAD > 0:
            LINE: tl.constexpr = 128 // (weight.dtype.element_ty.primitive_bitwidth // 8)
            far = tl.minimum(begin + tl.arange(0, AHEAD // LINE) * LINE, K - 1)
            far = weight + row.to(tl.int64)[:, None] * K + far[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [far.to(tl.int64)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        gdc_wait()
    token = first_token + tl.arange(0, BLOCK_T)
    x_rows = x + token.to(tl.int64)[None, :] * K + column[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if TAIL > 0:
        tail = first_token + BLOCK_T + tl.arange(0, TAIL)
        x_tail = x + tail.to(tl.int64)[None, :] * K + column[:, None]
        total_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    for k in tl.range(begin, min(begin + PART, K), BLOCK_K):
        if K % BLOCK_K == 0:
            left = tl.load(weight_rows + k)
            right = tl.load(x_rows + k, (token < tokens)[None, :], other=0.0)
            if TAIL > 0:
                right_tail = tl.load(x_tail + k, (tail < tokens)[None, :], other=0.0)
        else:
            inside = k + column < K
            left = tl.load(weight_rows + k, inside[None, :], other=0.0)
            right = tl.load(x_rows + k, inside[:, None] & (token < tokens)[None, :], other=0.0)
            if TAIL > 0:
                right_tail = tl.load(x_tail + k, inside[:, None] & (tail < tokens)[None, :], other=0.0)
        if SCALED:  # by way of float32: straight to bfloat16 is an instruction of an eighth of the rate
            left = left.to(tl.float32).to(x.dtype.element_ty)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        if TAIL > 0:
            total_tail = tl.dot(left, right_tail, total_tail, input_precision=PRECISION)
    if SCALED:
        total *= row_scale[:, None]
    _finish(total, token, tile_n, split, bias, residual, out, partial, tokens, N, GATED, BIAS, RESIDUAL, SPLIT)
    if TAIL > 0:
        if SCALED:
            total_tail *= row_scale[:, None]
        _finish(total_tail, tail, tile_n, split, bias, residual, out, partial, tokens, N, GATED, BIAS, RESIDUAL, SPLIT)


@triton.jit
def _finish(
    total, token, tile_n, split, bias, residual, out, partial, tokens,
    N: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores one tile: a part of K as it is, else with bias, gate and residual."""
    BLOCK_N: tl.constexpr = total.shape[0]
    BLOCK_T: tl.constexpr = total.shape[1]
    lane = tl.arange(0, BLOCK_N)
    inside_t = (token < tokens)[None, :]
    if GATED:
        place = tile_n * (BLOCK_N // 2) + lane % (BLOCK_N // 2)
        row = tl.minimum(place, N // 2 - 1) + (lane // (BLOCK_N // 2)) * (N // 2)
        inside = (place < N // 2)[:, None] & inside_t
    else:
        row = tile_n * BLOCK_N + lane
        inside = (row < N)[:, None] & inside_t
    if SPLIT > 1:
        tl.store(partial + (split * tokens + token).to(tl.int64)[None, :] * N + row[:, None], total, inside)
    else:
        if BIAS:
            total += tl.load(bias + row, row < N, other=0.0).to(tl.float32)[:, None]
        DTYPE: tl.constexpr = out.dtype.element_ty
        if GATED:
            gate, up = tl.split(total.reshape(2, BLOCK_N // 2, BLOCK_T).permute(1, 2, 0))
            result = gated(gate, up, DTYPE)
            half_row = tile_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            target = out + token.to(tl.int64)[None, :] * (N // 2) + half_row[:, None]
            tl.store(target, result.to(DTYPE), (half_row < N // 2)[:, None] & inside_t)
        else:
            offset = token.to(tl.int64)[None, :] * N + row[:, None]
            if RESIDUAL:
                total = total.to(DTYPE).to(tl.float32) + tl.load(residual + offset, inside, other=0.0).to(tl.float32)
            tl.store(out + offset, total.to(DTYPE), inside)


@triton.jit(do_not_specialize=["tokens"])
def join_kernel(
    partial, bias, residual, out, norm, normed, eps, tokens,
    N: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums the parts of K in order, then does the end of `tiles_kernel`; with NORM a program has a whole row."""
    if NORM:
        factors = tl.load(norm + tl.arange(0, BLOCK), tl.arange(0, BLOCK) < N, other=0.0)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    COLUMNS: tl.constexpr = N // 2 if GATED else N
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < COLUMNS
    total = tl.zeros([BLOCK], tl.float32)
    total_up = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLIT):
        part = partial + (split * tokens + token) * N + column
        total += tl.load(part, inside, other=0.0)
        if GATED:
            total_up += tl.load(part + COLUMNS, inside, other=0.0)
    if BIAS:
        total += tl.load(bias + column, inside, other=0.0).to(tl.float32)
        if GATED:
            total_up += tl.load(bias + COLUMNS + column, inside, other=0.0).to(tl.float32)
    DTYPE: tl.constexpr = out.dtype.element_ty
    if GATED:
        total = gated(total, total_up, DTYPE)
    if RESIDUAL:
        total = total.to(DTYPE).to(tl.float32)
        total += tl.load(residual + token * N + column, inside, other=0.0).to(tl.float32)
    total = total.to(DTYPE)
    tl.store(out + token * COLUMNS + column, total, inside)
    if NORM:
        wide = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / N + eps)
        tl.store(normed + token * N + column, normalise(wide, scale, factors).to(DTYPE), inside)
