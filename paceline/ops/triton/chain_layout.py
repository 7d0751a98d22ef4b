"""The kernel of `ops.chain_layout`, one program a request."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.ops.chain_layout import ChainLayout
from paceline.ops.state import SlotState


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
        state.text.shape[1], width, requests, count, PAGE=page_size, STEPS=triton.next_power_of_2(count + 1), BLOCK=512,
        num_warps=4,
    )  # fmt: skip
    return layout


@triton.jit
def _chain_layout(
    text, history_start, end_ptr, slots, page_table, roots, rows, positions, locations, contexts, starts,
    text_width, width, requests, count, PAGE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots + request)
    end = tl.load(end_ptr + slot)
    context = end - tl.load(history_start + slot) - 1
    table = page_table + slot * width
    tl.store(roots + request, tl.load(text + slot * text_width + end - 1).to(tl.int64))
    tl.store(starts + request, request)
    if request == requests - 1:
        tl.store(starts + requests, requests)
    step = tl.arange(0, STEPS)
    place = context + step
    to = step * requests + request
    tl.store(positions + to, place.to(tl.int64), step <= count)
    page = tl.load(table + place // PAGE, step < count, other=0).to(tl.int64)
    tl.store(locations + to, page * PAGE + place % PAGE, step < count)
    tl.store(contexts + to, place, step < count)
    for offset in range(0, (context + count) // PAGE + 1, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        row = tl.load(table + column, column < width, other=0)
        tl.store(rows + request * width + column, row, column < width)
