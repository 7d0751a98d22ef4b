"""Paged attention for CUDA: queries packed by group, keys split over programs, branch masks by arithmetic.

Up to MAX_QUERY queries a request the kernel reads the pages in place and its launch depends on host bounds alone, so a
CUDA graph that holds it serves any context the page table can name. Longer ones (prefill) are prefill_attention.py's.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.config import MAX_DRAFT
from paceline.ops.attention import AttentionBatch
from paceline.ops.triton import launch_options
from paceline.ops.triton.prefill_attention import prefill

MAX_QUERY = MAX_DRAFT + 1
DETERMINISTIC_SPLIT = 256  # keys a part, by place: the same parts whatever the step's number of queries
_PROGRAMS = 264  # programs a launch aims for: two on each of 132 multiprocessors
_ENOUGH = 128  # programs that are not worth a split of the keys, except for single queries
_MAX_SPLITS = 64
_JOINED = 16  # parts the combining kernel reads at a time


def paged_attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """The kernel of `ops.attention.paged_attention`; the same contract. Reads lengths on the host above MAX_QUERY."""
    plain = not (batch.branching or batch.hides_first)
    if batch.max_query > MAX_QUERY and plain and query.dtype != torch.float32:
        return prefill(query, key_cache, value_cache, batch, page_size, scale)
    return attend(query, key_cache, value_cache, batch, page_size, scale)


def paged_attention_deterministic(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, page_size: int, scale: float
) -> Tensor:
    """`paged_attention`, a query's bits independent of the other queries and requests of the step."""
    return attend(query, key_cache, value_cache, batch, page_size, scale, deterministic=True)


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    page_size: int,
    scale: float,
    *,
    deterministic: bool = False,
    tile: tuple[int, int, int, int] | None = None,
    programs: int = _PROGRAMS,
) -> Tensor:
    """The kernel on any workload. `tile` is (rows, keys, warps, stages); by default chosen by the number of rows."""
    _, heads, dim = query.shape
    kv_heads = key_cache.shape[1]
    group = heads // kv_heads
    requests, width = batch.page_table.shape
    rows = batch.max_query * group
    if tile is None:
        tile = _tile(64, 40, query.dtype) if deterministic else _tile(rows, kv_heads * requests, query.dtype)
    block_m, block_n, warps, stages = tile
    tiles = triton.cdiv(rows, block_m)
    if deterministic:
        splits = max(1, triton.cdiv(width * page_size, DETERMINISTIC_SPLIT))
    else:
        whole = tiles * kv_heads * requests  # programs without a split
        most = 1 if rows > 16 and whole >= _ENOUGH else min(_MAX_SPLITS, triton.cdiv(width * page_size, block_n))
        splits = max(1, min(most, programs // whole))
    query = query.contiguous()
    out = torch.empty_like(query)
    parts = torch.empty(splits, *query.shape, dtype=torch.float32, device=query.device) if splits > 1 else None
    sums = torch.empty(splits, *query.shape[:2], 2, dtype=torch.float32, device=query.device) if splits > 1 else None
    options = launch_options(query.device)
    size = DETERMINISTIC_SPLIT if deterministic else 0
    own = batch.branch_starts if batch.tree_mask is None else batch.tree_mask
    num_words = 0 if batch.tree_mask is None else batch.tree_mask.shape[1]
    block_d = triton.next_power_of_2(dim)
    _attend[(tiles, kv_heads * requests, splits)](
        query, key_cache, value_cache, batch.page_table, batch.context_lens, batch.query_starts, own,
        out, parts, sums, scale * 1.4426950408889634, query.shape[0], width, splits, batch.num_before,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_D=block_d, PAGE=page_size, BLOCK_M=block_m, BLOCK_N=block_n,
        PARTS=splits > 1, SIZE=size, BRANCHING=batch.branching, WORDS=num_words,
        HIDES_FIRST=batch.hides_first, ONE_LOOP=deterministic,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=stages, **options,
    )  # fmt: skip
    if splits > 1:
        _combine[(batch.max_query, heads, requests)](
            parts, sums, batch.context_lens, batch.query_starts, out, query.shape[0], splits, batch.num_before,
            HEADS=heads, DIM=dim, BLOCK_D=block_d, SIZE=size, BLOCK_N=block_n, JOINED=_JOINED, TREE=num_words > 0,
            num_warps=2, **options,
        )  # fmt: skip
    return out


def _tile(rows: int, sets: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(rows, keys, warps, stages) of a program for that many query rows in each of `sets` (request, key head) pairs.

    Some rows take long blocks of keys (each part is one or two blocks); many take small ones that overlap better.
    Measured by `python -m benchmarks.tools.step` on one H100, up to 192 rows by its `--polish 24` on one H200.
    """
    if dtype == torch.float32:
        return (16, 32, 4, 2) if rows <= 16 else (64, 32, 4, 2)
    if rows <= 16:
        return (16, 64, 4, 3)  # (16, 128) is 0.5 µs faster alone, but its shared memory keeps the next kernel waiting
    if triton.cdiv(rows, 64) * sets >= 24:
        return (64, 64, 4, 3)
    return (64, 128, 4, 2) if rows <= 192 else (128, 128, 8, 2)


@triton.jit
def _part_size(length, splits, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys a part: SIZE where it is fixed, else the length shared out over all parts in whole blocks."""
    if SIZE > 0:
        return SIZE
    else:
        return tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N


@triton.jit(do_not_specialize=["tokens", "width", "splits", "before"])
def _attend(
    query, key_cache, value_cache, page_table, context_lens, query_starts, own_mask, out, parts, sums, scale,
    tokens, width, splits, before,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, BRANCHING: tl.constexpr,
    WORDS: tl.constexpr, HIDES_FIRST: tl.constexpr, ONE_LOOP: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (query, head of the group) of one request and key head over one part of its keys.

    `own_mask` is the batch's branch_starts or, where there are WORDS, its tree_mask. `scale` includes log2(e). `before` is
    num_before, for trees. Parts hold unnormalised sums; `sums` holds each row's running maximum and denominator.
    """
    request = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    split = tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.load(query_starts + request)
    queries = tl.load(query_starts + request + 1) - first
    context = tl.load(context_lens + request)
    first_row = tl.program_id(0) * BLOCK_M
    last_query = tl.minimum((first_row + BLOCK_M - 1) // GROUP, queries - 1)
    row = first_row + tl.arange(0, BLOCK_M)
    index = row // GROUP
    own_index = index + (before if WORDS > 0 else 0)  # among the request's own tokens
    first_place = context + (before if WORDS > 0 else 0)  # query 0's
    size = _part_size(first_place + queries, splits, SIZE, BLOCK_N)
    begin = split * size
    last_key = first_place + (queries - 1 if WORDS > 0 else last_query)
    end = tl.minimum(begin + size, last_key + 1)
    if (first_row >= queries * GROUP) | (begin >= end):
        return
    if HIDES_FIRST:
        begin = tl.maximum(begin, tl.minimum(first_place, 1))  # key 0 is read by no query after it
    inside = index < queries
    dimension = tl.arange(0, BLOCK_D)
    wide = dimension < DIM
    place = ((first + index).to(tl.int64) * KV_HEADS + kv_head) * GROUP + row % GROUP  # of [tokens, heads]
    q = tl.load(query + place[:, None] * DIM + dimension[None, :], inside[:, None] & wide[None, :], other=0.0)
    branch = tl.zeros([BLOCK_M], tl.int32)
    if BRANCHING and WORDS == 0:
        branch = tl.load(own_mask + first + index, inside, other=0)
    rows_of_mask = own_mask + (first + tl.minimum(index, queries - 1)) * WORDS
    low, high = index, index
    if WORDS > 0 and WORDS <= 2:  # a row's whole mask; more words are read where they are needed, which takes longer
        low = tl.load(rows_of_mask)
        high = tl.load(rows_of_mask + WORDS - 1)

    maximum = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    keys = key_cache + kv_head * DIM
    values = value_cache + kv_head * DIM
    pages = page_table + request.to(tl.int64) * width
    whole = begin  # up to here blocks hold committed keys alone, which every row sees
    if not ONE_LOOP:
        whole = begin + tl.maximum(tl.minimum(end, context) - begin, 0) // BLOCK_N * BLOCK_N
        for start in tl.range(begin, whole, BLOCK_N):
            acc, maximum, total = _step(
                acc, maximum, total, q, keys, values, pages, start, end, context, own_index, branch, rows_of_mask, low, high,
                scale, KV_HEADS, DIM, BLOCK_D, PAGE, BLOCK_N, False, BRANCHING, WORDS, HIDES_FIRST, PRECISION,
            )  # fmt: skip
    for start in tl.range(whole, end, BLOCK_N):
        acc, maximum, total = _step(
            acc, maximum, total, q, keys, values, pages, start, end, context, own_index, branch, rows_of_mask, low, high, scale,
            KV_HEADS, DIM, BLOCK_D, PAGE, BLOCK_N, True, BRANCHING, WORDS, HIDES_FIRST, PRECISION,
        )  # fmt: skip

    stored = inside[:, None] & wide[None, :]
    if not PARTS:
        acc = acc / total[:, None]
        tl.store(out + place[:, None] * DIM + dimension[None, :], acc.to(out.dtype.element_ty), stored)
    else:
        place += split.to(tl.int64) * tokens * KV_HEADS * GROUP
        tl.store(parts + place[:, None] * DIM + dimension[None, :], acc, stored)
        tl.store(sums + place * 2, maximum, inside)
        tl.store(sums + place * 2 + 1, total, inside)


@triton.jit
def _step(
    acc, maximum, total, q, keys, values, pages, start, end, context, own_index, branch, rows_of_mask, low, high, scale,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, BRANCHING: tl.constexpr, WORDS: tl.constexpr, HIDES_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the online softmax's update of (acc, maximum, total)."""
    position = start + tl.arange(0, BLOCK_N)
    dimension = tl.arange(0, BLOCK_D)
    if MASKED:
        there = position < end
        page = tl.load(pages + position // PAGE, there, other=0)
    else:
        page = tl.load(pages + position // PAGE)
    row = (page.to(tl.int64) * PAGE + position % PAGE) * (KV_HEADS * DIM)
    if MASKED or DIM != BLOCK_D:
        fits = (dimension < DIM)[None, :] & (position < end)[:, None]
        k = tl.load(keys + row[:, None] + dimension[None, :], fits, other=0.0)
        v = tl.load(values + row[:, None] + dimension[None, :], fits, other=0.0)
    else:
        k = tl.load(keys + row[:, None] + dimension[None, :])
        v = tl.load(values + row[:, None] + dimension[None, :])
    scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
    if MASKED:
        own = position - context  # index among the request's own tokens; negative where committed
        if WORDS > 0:
            if WORDS <= 2:
                word = tl.where((own < 32)[None, :], low[:, None], high[:, None])
            else:
                drafted = ((own >= 0) & there)[None, :]
                word = tl.load(rows_of_mask[:, None] + own[None, :] // 32, drafted, other=0)
            seen = ((own < 0)[None, :] | ((word >> (own & 31)[None, :]) & 1 != 0)) & there[None, :]
        else:
            seen = (own[None, :] <= own_index[:, None]) & there[None, :]
            if BRANCHING:
                seen = seen & ((own <= 0)[None, :] | (own[None, :] >= branch[:, None]))
        if HIDES_FIRST:
            seen = seen & ((position > 0)[None, :] | (context + own_index == 0)[:, None])
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(maximum, tl.max(scores, axis=1))
    finite = higher
    if MASKED:
        finite = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(scores - finite[:, None])
    rescale = tl.exp2(maximum - finite)
    total = total * rescale + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=["tokens", "splits", "before"])
def _combine(
    parts, sums, context_lens, query_starts, out, tokens, splits, before,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, JOINED: tl.constexpr, TREE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query and head: joins the parts that hold keys it may see, JOINED at a time, in order.

    Those are at or before the query, with a TREE anywhere.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.load(query_starts + request)
    queries = tl.load(query_starts + request + 1) - first
    if index >= queries:
        return
    first_place = tl.load(context_lens + request) + (before if TREE else 0)
    last_key = first_place + (queries - 1 if TREE else index)
    count = tl.cdiv(last_key + 1, _part_size(first_place + queries, splits, SIZE, BLOCK_N))
    place = (first + index).to(tl.int64) * HEADS + head
    dimension = tl.arange(0, BLOCK_D)
    maximum = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, JOINED):
        split = start + tl.arange(0, JOINED)
        there = split < count
        source = place + split.to(tl.int64) * tokens * HEADS
        part_max = tl.load(sums + source * 2, there, other=-float("inf"))
        part_total = tl.load(sums + source * 2 + 1, there, other=0.0)
        mask = there[:, None] & (dimension < DIM)[None, :]
        part = tl.load(parts + source[:, None] * DIM + dimension[None, :], mask, other=0.0)
        higher = tl.maximum(maximum, tl.max(part_max, axis=0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        factor = tl.exp2(part_max - finite)
        rescale = tl.exp2(maximum - finite)
        acc = acc * rescale + tl.sum(part * factor[:, None], axis=0)
        total = total * rescale + tl.sum(part_total * factor, axis=0)
        maximum = higher
    tl.store(out + place * DIM + dimension, (acc / total).to(out.dtype.element_ty), dimension < DIM)
