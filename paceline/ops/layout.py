"""Positions, cache locations, page tables and tree masks of a decode step, computed from the state on the device."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import implementation
from paceline.ops.draft import Draft, ancestors, packed
from paceline.ops.state import SlotState


def decode_layout(
    state: SlotState,
    slots: Tensor,
    query_starts: Tensor,
    draft: Draft,
    page_table: Tensor,
    page_size: int,
    max_query: int,
) -> AttentionBatch:
    """The AttentionBatch of a decode step.

    slots [B] int64, query_starts [B + 1] int32; page_table [S, P] int32 by slot. A request's committed tokens are all but
    its last; query i's keys and values go i places after them, at RoPE position committed + depth. `max_query` is the most
    queries that a request has.
    """
    return implementation("decode_layout", state.end)(
        state, slots, query_starts, draft, page_table, page_size, max_query
    )


def owners(query_starts: Tensor, num_queries: int) -> Tensor:
    """The request of each query, [T] int64."""
    query = torch.arange(num_queries, dtype=torch.int32, device=query_starts.device)
    return torch.searchsorted(query_starts, query, right=True) - 1


def reference(
    state: SlotState,
    slots: Tensor,
    query_starts: Tensor,
    draft: Draft,
    page_table: Tensor,
    page_size: int,
    max_query: int,
) -> AttentionBatch:
    owner = owners(query_starts, len(draft.tokens))
    context = state.end[slots] - state.history_start[slots] - 1
    table = page_table[slots]
    base = context[owner]
    query = torch.arange(len(draft.tokens), dtype=torch.int32, device=table.device)
    place = base + query - query_starts[owner]
    page = table[owner, place // page_size]
    return AttentionBatch(
        positions=(base + draft.depths).long(),
        locations=page.long() * page_size + place % page_size,
        page_table=table,
        context_lens=context,
        query_starts=query_starts,
        branch_starts=draft.branch_starts if draft.branch_starts is not None else torch.zeros_like(draft.depths),
        max_query=max_query,
        max_context=page_table.shape[1] * page_size,
        branching=max_query > 1,
        tree_mask=None
        if draft.parents is None or max_query == 1
        else tree_mask(draft.parents, query_starts, max_query),
    )


def tree_mask(parents: Tensor, query_starts: Tensor, max_query: int) -> Tensor:
    """[T, W] int32: which of its request's queries each query sees, a bit each; see AttentionBatch."""
    bounds = query_starts.tolist()
    mask = parents.new_zeros(len(parents), -(-max_query // 32))
    for first, last in itertools.pairwise(bounds):
        words = packed(ancestors(parents[first:last]))
        mask[first:last, : words.shape[1]] = words
    return mask
