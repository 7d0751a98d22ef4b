"""Where a trained drafter's own passes lie: one query of each request a pass, at the places after its committed tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import implementation
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


def chain_layout(state: SlotState, slots: Tensor, page_table: Tensor, count: int, page_size: int) -> ChainLayout:
    """The layout of `count` passes. slots [B] int64; page_table [S, P] int32 by slot."""
    return implementation("chain_layout", state.end)(state, slots, page_table, count, page_size)


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
