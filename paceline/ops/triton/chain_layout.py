"""The kernels of `ops.chain_layout`, one program a request."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.attention import AttentionBatch
from paceline.ops.chain_layout import BlockLayout, ChainLayout
from paceline.ops.state import SlotState
from paceline.ops.triton import launch_options

COLUMNS = 512  # of the page table that are copied at a time


def chain_layout(state: SlotState, slots: Tensor, page_table: Tensor, count: int, page_size: int) -> ChainLayout:
    """See paceline.ops.chain_layout."""
    device, requests, width = slots.device, len(slots), page_table.shape[1]
    layout = ChainLayout(
        roots=torch.empty(requests, dtype=torch.int64, device=device),
        page_table=torch.empty(requests, width, dtype=torch.int32, device=device),
        positions=torch.empty(count + 1, requests, dtype=torch.int64, device=device),
        locations=torch.empty(count, requests, dtype=torch.int64, device=device),
        context_lens=torch.empty(count, requests, dtype=torch.int32, device=device),
        query_starts=torch.empty(requests + 1, dtype=torch.int32, device=device),
    )
    _chain_layout[(requests,)](
        state.text, state.history_start, state.end, slots, page_table,
        layout.roots, layout.page_table, layout.positions, layout.locations, layout.context_lens, layout.query_starts,
        state.text.shape[1], width, count, PAGE=page_size, STEPS=triton.next_power_of_2(count + 1), COLUMNS=COLUMNS,
        num_warps=4, **launch_options(device),
    )  # fmt: skip
    return layout


def block_layout(
    state: SlotState,
    slots: Tensor,
    page_table: Tensor,
    count: int,
    mask_token: int,
    page_size: int,
    starts: Tensor | None = None,
) -> BlockLayout:
    """See paceline.ops.chain_layout."""
    assert starts is None, "on CUDA all blocks have as many rows"
    device, requests, width = slots.device, len(slots), page_table.shape[1]
    words = triton.cdiv(count, 32)
    tokens, places, locations = torch.empty(3, requests * count, dtype=torch.int64, device=device)
    roots = torch.empty(requests, dtype=torch.int64, device=device)
    after = torch.empty(count, requests, dtype=torch.int64, device=device)
    table = torch.empty(requests, width, dtype=torch.int32, device=device)
    contexts = torch.empty(requests, dtype=torch.int32, device=device)
    bounds = torch.empty(requests + 1, dtype=torch.int32, device=device)
    mask = torch.empty(requests * count, words, dtype=torch.int32, device=device)
    _block_layout[(requests,)](
        state.text, state.history_start, state.end, slots, page_table,
        roots, table, tokens, places, after, locations, contexts, bounds, mask,
        state.text.shape[1], width, count, mask_token, PAGE=page_size, ROWS=triton.next_power_of_2(count), WORDS=words,
        BITS=triton.next_power_of_2(count * words), COLUMNS=COLUMNS, num_warps=4, **launch_options(device),
    )  # fmt: skip
    batch = AttentionBatch(
        positions=places,
        locations=locations,
        page_table=table,
        context_lens=contexts,
        query_starts=bounds,
        branch_starts=bounds,  # not read: there is a tree, or a single row
        max_query=count,
        max_context=width * page_size,
        branching=count > 1,
        tree_mask=mask if count > 1 else None,
    )
    return BlockLayout(roots, tokens, after, batch)


@triton.jit
def _begin(
    text, history_start, end_ptr, slots, page_table, roots, starts, text_width, width, queries, OVERLAP: tl.constexpr
):
    """Writes a request's root and where its queries start; the number of its committed tokens and its pages."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    request = tl.program_id(0)
    slot = tl.load(slots + request)
    end = tl.load(end_ptr + slot)
    root = tl.load(text + slot * text_width + end - 1).to(tl.int64)
    tl.store(roots + request, root)
    tl.store(starts + request, request * queries)
    if request == tl.num_programs(0) - 1:
        tl.store(starts + request + 1, (request + 1) * queries)
    return root, end - tl.load(history_start + slot) - 1, page_table + slot * width


@triton.jit
def location(table, place, inside, PAGE: tl.constexpr):
    """The cache locations of a request's places; `table` points to its pages."""
    page = tl.load(table + place // PAGE, inside, other=0).to(tl.int64)
    return page * PAGE + place % PAGE


@triton.jit
def copy_pages(table, rows, width, num_pages, COLUMNS: tl.constexpr):
    """Writes a request's first pages, a multiple of COLUMNS of them, to its row of a page table [B, width]."""
    for offset in range(0, num_pages, COLUMNS):
        column = offset + tl.arange(0, COLUMNS)
        row = tl.load(table + column, column < width, other=0)
        tl.store(rows + tl.program_id(0) * width + column, row, column < width)


@triton.jit(do_not_specialize=["count"])
def _chain_layout(
    text, history_start, end_ptr, slots, page_table, roots, rows, positions, locations, contexts, starts,
    text_width, width, count,
    PAGE: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    _, context, table = _begin(
        text, history_start, end_ptr, slots, page_table, roots, starts, text_width, width, 1, OVERLAP
    )
    step = tl.arange(0, STEPS)
    place = context + step
    to = step * tl.num_programs(0) + tl.program_id(0)
    tl.store(positions + to, place.to(tl.int64), step <= count)
    tl.store(locations + to, location(table, place, step < count, PAGE), step < count)
    tl.store(contexts + to, place, step < count)
    copy_pages(table, rows, width, (context + count) // PAGE + 1, COLUMNS)


@triton.jit(do_not_specialize=["count", "mask_token"])
def _block_layout(
    text, history_start, end_ptr, slots, page_table,
    roots, rows, tokens, places, after, locations, contexts, starts, mask,
    text_width, width, count, mask_token, PAGE: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    root, context, table = _begin(
        text, history_start, end_ptr, slots, page_table, roots, starts, text_width, width, count, OVERLAP
    )
    row = tl.arange(0, ROWS)
    inside = row < count
    place = context + row
    to = request * count + row
    tl.store(contexts + request, context)
    tl.store(tokens + to, tl.where(row == 0, root, mask_token), inside)
    tl.store(places + to, place.to(tl.int64), inside)
    tl.store(after + row * tl.num_programs(0) + request, (place + 1).to(tl.int64), inside)
    tl.store(locations + to, location(table, place, inside, PAGE), inside)
    word = tl.arange(0, BITS)
    tl.store(mask + request * count * WORDS + word, tl.full([BITS], -1, tl.int32), word < count * WORDS)
    copy_pages(table, rows, width, (context + count) // PAGE + 1, COLUMNS)
