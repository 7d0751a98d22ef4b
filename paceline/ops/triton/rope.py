"""Rotary embedding, optional head norms and the cache write, in one launch."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.triton import launch_options
from paceline.ops.triton.norm import normalise

# Tokens from which a program takes two tokens and up to 16 heads instead of one and 4: one H100,
# `python -m benchmarks.tools.step`
_MANY = 256


def rope_and_cache(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    locations: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_heads: int,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The kernel of `ops.rope.rope_and_cache`; the same contract."""
    num_kv_heads, dim = key_cache.shape[1:]
    tokens = qkv.shape[0]
    query = qkv.new_empty(tokens, num_heads, dim)
    query_norm, key_norm, eps = norms if norms is not None else (qkv, qkv, 0.0)
    all_heads = num_heads + 2 * num_kv_heads
    heads = min(16 if tokens >= _MANY else 4, triton.next_power_of_2(all_heads))
    each = 2 if tokens >= _MANY else 1
    _rope_and_cache[(triton.cdiv(tokens, each), triton.cdiv(all_heads, heads))](
        qkv.contiguous(), table, positions, locations, key_cache, value_cache, query, query_norm, key_norm, eps, tokens,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2),
        TOKENS=each, HEAD_BLOCK=heads, NORM=norms is not None, num_warps=4 if heads > 4 else 2, **launch_options(qkv.device),
    )  # fmt: skip
    return query


@triton.jit(do_not_specialize=["tokens"])
def _rope_and_cache(
    qkv, table, positions, locations, key_cache, value_cache, query, query_norm, key_norm, eps, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens and HEAD_BLOCK of their heads: queries first, then keys, then values."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    place = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None, None]
    token = tl.minimum(place, tokens - 1).to(tl.int64)
    head = (tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK))[None, :, None]
    column = tl.arange(0, BLOCK)[None, None, :]
    inside = (column < HALF) & (head < ALL) & (place < tokens)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    source = qkv + token * ALL * 2 * HALF + head * 2 * HALF + column
    first = tl.load(source, inside, other=0.0)
    second = tl.load(source + HALF, inside, other=0.0)
    angles = table + tl.load(positions + token) * 2 * HALF + column
    cosines = tl.load(angles, column < HALF, other=0.0)
    sines = tl.load(angles + HALF, column < HALF, other=0.0)
    location = tl.load(locations + token)

    x = first.to(tl.float32)
    y = second.to(tl.float32)
    if NORM:
        squares = tl.sum(x * x + y * y, axis=2)[:, :, None]
        scale = tl.rsqrt(squares / (2 * HALF) + eps)
        weights = tl.where(is_query, query_norm + column, key_norm + column)
        x = normalise(x, scale, tl.load(weights, inside, other=0.0))
        y = normalise(y, scale, tl.load(weights + HALF, inside, other=0.0))
    rotated_first = (x * cosines - y * sines).to(first.dtype)
    rotated_second = (y * cosines + x * sines).to(first.dtype)

    to_query = query + token * HEADS * 2 * HALF + head * 2 * HALF + column
    tl.store(to_query, rotated_first, inside & is_query)
    tl.store(to_query + HALF, rotated_second, inside & is_query)
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    to_key = key_cache + location * KV_HEADS * 2 * HALF + (head - HEADS) * 2 * HALF + column
    tl.store(to_key, rotated_first, inside & is_key)
    tl.store(to_key + HALF, rotated_second, inside & is_key)
    to_value = value_cache + location * KV_HEADS * 2 * HALF + (head - HEADS - KV_HEADS) * 2 * HALF + column
    tl.store(to_value, first, inside & is_value)
    tl.store(to_value + HALF, second, inside & is_value)
