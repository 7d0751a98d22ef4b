"""Where a decode step's queries stand: positions, cache slots and page tables, from the device's own state."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.copy_draft import CopyState, StepTokens
from paceline.ops.dispatch import implementation


def decode_layout(
    state: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    step: StepTokens,
    page_table: Tensor,
    page_size: int,
    max_query: int,
) -> AttentionBatch:
    """The AttentionBatch of a decode step.

    slots [B] int64, query_starts [B + 1] int32; page_table [S, P] int32 by slot. A request's committed slots are its
    tokens but the last; query i's keys and values go i slots after them, at RoPE position committed + depth.
    """
    return implementation("decode_layout", state.end)(
        state, slots, query_starts, step, page_table, page_size, max_query
    )


def owners(query_starts: Tensor, num_queries: int) -> Tensor:
    """The request of each query, [T] int64."""
    query = torch.arange(num_queries, dtype=torch.int32, device=query_starts.device)
    return torch.searchsorted(query_starts, query, right=True) - 1


def reference(
    state: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    step: StepTokens,
    page_table: Tensor,
    page_size: int,
    max_query: int,
) -> AttentionBatch:
    owner = owners(query_starts, len(step.tokens))
    context = state.end[slots] - state.history_start[slots] - 1
    table = page_table[slots]
    base = context[owner]
    query = torch.arange(len(step.tokens), dtype=torch.int32, device=table.device)
    place = base + query - query_starts[owner]
    page = table[owner, place // page_size]
    return AttentionBatch(
        positions=(base + step.depths).long(),
        slots=page.long() * page_size + place % page_size,
        page_table=table,
        context_lens=context,
        query_starts=query_starts,
        branch_starts=step.branch_starts,
        max_query=max_query,
        max_context=page_table.shape[1] * page_size,
        branching=max_query > 1,
    )
