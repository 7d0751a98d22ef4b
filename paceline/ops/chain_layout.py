"""Where a trained drafter's own passes lie: at the places after each request's committed tokens, the root's first.

A chain is drafted in passes of one query a request, a block in one pass of several.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import implementation
from paceline.ops.layout import owners
from paceline.ops.state import SlotState


@dataclass(frozen=True)
class ChainLayout:
    """K passes over B requests. Pass k has each request's query at place `context + k`, the root's in pass 0.

    roots [B] int64, the last known tokens; page_table [B, P] int32, of which columns past the last pass may be undefined;
    positions [K + 1, B] int64 of the passes and of the token after them; locations [K, B] int64; context_lens [K, B] int32;
    query_starts [B + 1] int32.
    """

    roots: Tensor
    page_table: Tensor
    positions: Tensor
    locations: Tensor
    context_lens: Tensor
    query_starts: Tensor

    def batch(self, step: int, page_size: int, hides_first: bool = False) -> AttentionBatch:
        """The AttentionBatch of one pass."""
        return AttentionBatch(
            positions=self.positions[step],
            locations=self.locations[step],
            page_table=self.page_table,
            context_lens=self.context_lens[step],
            query_starts=self.query_starts,
            branch_starts=self.query_starts,  # not read: a single query has no branch
            max_query=1,
            max_context=self.page_table.shape[1] * page_size,
            hides_first=hides_first,
        )


@dataclass(frozen=True)
class BlockLayout:
    """One pass over a block of rows of each of B requests, T rows in all: the root and mask tokens after it.

    roots [B] int64, the last known tokens; tokens [T] int64; positions [K, B] int64 of the K tokens after each root. In
    `batch` every row sees all rows of its block; columns of its page table past the blocks may be undefined.
    """

    roots: Tensor
    tokens: Tensor
    positions: Tensor
    batch: AttentionBatch


def chain_layout(state: SlotState, slots: Tensor, page_table: Tensor, count: int, page_size: int) -> ChainLayout:
    """The layout of `count` passes. slots [B] int64; page_table [S, P] int32 by slot."""
    return implementation("chain_layout", state.end)(state, slots, page_table, count, page_size)


def block_layout(
    state: SlotState,
    slots: Tensor,
    page_table: Tensor,
    count: int,
    mask_token: int,
    page_size: int,
    starts: Tensor | None = None,
) -> BlockLayout:
    """The layout of blocks of `count` rows. slots and page_table as in `chain_layout`.

    starts [B + 1] int32 says where blocks of at most `count` rows begin; always None on CUDA, where all have `count`.
    """
    return implementation("block_layout", state.end)(state, slots, page_table, count, mask_token, page_size, starts)


def reference(state: SlotState, slots: Tensor, page_table: Tensor, count: int, page_size: int) -> ChainLayout:
    ends = state.end[slots]
    table = page_table[slots]
    context = ends - state.history_start[slots] - 1
    places = context + torch.arange(count + 1, dtype=torch.int32, device=context.device)[:, None]
    pages = table.gather(1, (places[:count] // page_size).long().T).T.long()
    return ChainLayout(
        roots=state.text[slots, ends.long() - 1].long(),
        page_table=table,
        positions=places.long(),
        locations=pages * page_size + places[:count] % page_size,
        context_lens=places[:count].contiguous(),
        query_starts=torch.arange(len(slots) + 1, dtype=torch.int32, device=context.device),
    )


def block_reference(
    state: SlotState,
    slots: Tensor,
    page_table: Tensor,
    count: int,
    mask_token: int,
    page_size: int,
    starts: Tensor | None = None,
) -> BlockLayout:
    device, table = slots.device, page_table[slots]
    if starts is None:
        starts = torch.arange(0, len(slots) * count + 1, count, dtype=torch.int32, device=device)
    num_rows = int(starts[-1])
    ends = state.end[slots]
    context = ends - state.history_start[slots] - 1
    roots = state.text[slots, ends.long() - 1].long()
    owner = owners(starts, num_rows)
    row = torch.arange(num_rows, dtype=torch.int32, device=device) - starts[owner]
    place = context[owner] + row
    shape = (num_rows, -(-count // 32))
    batch = AttentionBatch(
        positions=place.long(),
        locations=table[owner, place // page_size].long() * page_size + place % page_size,
        page_table=table,
        context_lens=context,
        query_starts=starts,
        branch_starts=torch.zeros_like(row),
        max_query=count,
        max_context=table.shape[1] * page_size,
        branching=count > 1,
        tree_mask=torch.full(shape, -1, dtype=torch.int32, device=device) if count > 1 else None,
    )
    after = context + torch.arange(1, count + 1, dtype=torch.int32, device=device)[:, None]
    return BlockLayout(roots, torch.where(row == 0, roots[owner], mask_token), after.long(), batch)
