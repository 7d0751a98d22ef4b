"""Positions, cache locations, page tables and tree masks of a decode step, one program a request (or query)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.draft import Draft
from paceline.ops.state import SlotState


@triton.jit
def _layout_kernel(
    history_ptr, end_ptr, slots_ptr, starts_ptr, depths_ptr, table_ptr,
    positions_ptr, locations_ptr, rows_ptr, contexts_ptr,
    width, page_size, ROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    base = tl.load(starts_ptr + request)
    count = tl.load(starts_ptr + request + 1) - base
    context = tl.load(end_ptr + slot) - tl.load(history_ptr + slot) - 1
    tl.store(contexts_ptr + request, context)
    table = table_ptr + slot * width
    lane = tl.arange(0, ROOM)
    inside = lane < count
    place = context + lane
    page = tl.load(table + place // page_size, mask=inside, other=0).to(tl.int64)
    tl.store(locations_ptr + base + lane, page * page_size + place % page_size, mask=inside)
    depth = tl.load(depths_ptr + base + lane, mask=inside, other=0)
    tl.store(positions_ptr + base + lane, (context + depth).to(tl.int64), mask=inside)
    for offset in range(0, (context + count) // page_size + 1, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        row = tl.load(table + column, mask=column < width, other=0)
        tl.store(rows_ptr + request * width + column, row, mask=column < width)


def decode_layout(
    state: SlotState,
    slots: Tensor,
    query_starts: Tensor,
    draft: Draft,
    page_table: Tensor,
    page_size: int,
    max_query: int,
) -> AttentionBatch:
    """See paceline.ops.layout. Columns of the returned page table past a request's last query are not written."""
    device, count, queries = slots.device, len(slots), len(draft.tokens)
    width = page_table.shape[1]
    positions = torch.empty(queries, dtype=torch.int64, device=device)
    locations = torch.empty_like(positions)
    rows = torch.empty(count, width, dtype=torch.int32, device=device)
    contexts = torch.empty(count, dtype=torch.int32, device=device)
    _layout_kernel[(count,)](
        state.history_start, state.end, slots, query_starts, draft.depths, page_table,
        positions, locations, rows, contexts,
        width, page_size, ROOM=triton.next_power_of_2(max(max_query, 2)), BLOCK=512, num_warps=4,
    )  # fmt: skip
    return AttentionBatch(
        positions=positions,
        locations=locations,
        page_table=rows,
        context_lens=contexts,
        query_starts=query_starts,
        branch_starts=torch.zeros_like(draft.depths) if draft.branch_starts is None else draft.branch_starts,
        max_query=max_query,
        max_context=width * page_size,
        branching=max_query > 1,
        tree_mask=None
        if draft.parents is None or max_query == 1
        else tree_mask(draft.parents, query_starts, max_query),
    )


@triton.jit
def _tree_mask_kernel(parents_ptr, starts_ptr, mask_ptr, num_words, WORDS: tl.constexpr):
    """One query: sets the bits of itself and its ancestors, walking up to the root."""
    request = tl.program_id(0)
    base = tl.load(starts_ptr + request)
    query = tl.program_id(1)
    if query < tl.load(starts_ptr + request + 1) - base:
        word = tl.arange(0, WORDS)
        bits = tl.where(word == 0, 1, 0)  # the root
        node = query
        while node > 0:
            bits = bits | tl.where(word == node // 32, 1 << (node % 32), 0)
            node = tl.minimum(tl.load(parents_ptr + base + node), node - 1)  # ends for malformed parents, too
        tl.store(mask_ptr + (base + query) * num_words + word, bits, mask=word < num_words)


def tree_mask(parents: Tensor, query_starts: Tensor, max_query: int) -> Tensor:
    """See paceline.ops.layout."""
    num_words = triton.cdiv(max_query, 32)
    mask = torch.empty(len(parents), num_words, dtype=torch.int32, device=parents.device)
    _tree_mask_kernel[(len(query_starts) - 1, max_query)](
        parents, query_starts, mask, num_words, WORDS=triton.next_power_of_2(num_words), num_warps=1
    )
    return mask
