"""The copy drafter and acceptance on the GPU, one program a request: what `copy_draft` and `accept` define in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.ops.accept import HEADER
from paceline.ops.attention import AttentionBatch
from paceline.ops.copy_draft import (
    _INSERTED,
    _MATCH,
    _NEAR,
    _SKIPPED,
    _SOURCE,
    MATCH_LIMIT,
    MAX_BRANCHES,
    CopyState,
    StepTokens,
    num_branches,
)

_BLOCK = 4096


@triton.jit
def _score(
    text, index, end, history, anchor,
    MATCH: tl.constexpr, LIMIT: tl.constexpr, SOURCE: tl.constexpr, NEAR: tl.constexpr,
    SKIPPED: tl.constexpr, INSERTED: tl.constexpr,
):  # fmt: skip
    """The score of continuing at each text index: see paceline.ops.copy_draft."""
    inside = (index >= 1) & (index < end)
    agreement = tl.zeros_like(index)
    running = inside
    back = 0
    going = 1
    while (back < LIMIT) & (going > 0):
        wanted = tl.load(text + end - 1 - back, mask=end - 1 - back >= 0, other=-2)
        found = tl.load(text + index - 1 - back, mask=running & (index - 1 - back >= 0), other=-1)
        running = running & (found == wanted) & (wanted >= 0)
        agreement += running.to(tl.int32)
        going = tl.max(running.to(tl.int32), axis=0)
        back += 1
    distance = index - anchor
    ahead = tl.maximum(NEAR - distance // 16, 0)
    behind = tl.maximum(NEAR // 2 - (-distance + 7) // 8, 0)
    near = tl.where(anchor >= 0, tl.where(distance >= 0, ahead, behind), index * (NEAR // 2) // end)
    score = tl.where(agreement > 0, agreement * MATCH + near + tl.where(index < history, SOURCE, 0), 0)
    follows = (anchor >= 0) & (anchor < history)
    score = tl.where(follows & (index == anchor + 1) & inside, tl.maximum(score, SKIPPED), score)
    score = tl.where(follows & (index == anchor) & inside, tl.maximum(score, INSERTED), score)
    following = tl.load(text + index, mask=inside, other=-1)
    return tl.where(following >= 0, score, 0), following


@triton.jit
def _copy_draft_kernel(
    text_base, history_ptr, end_ptr, pointer_ptr, anchor_ptr, scratch_base, slots_ptr, starts_ptr,
    tokens_ptr, depths_ptr, branch_ptr, origins_ptr, guesses_ptr,
    width, BRANCHES: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    MATCH: tl.constexpr, LIMIT: tl.constexpr, SOURCE: tl.constexpr, NEAR: tl.constexpr,
    SKIPPED: tl.constexpr, INSERTED: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    base = tl.load(starts_ptr + request)
    room = tl.load(starts_ptr + request + 1) - base - 1
    end = tl.load(end_ptr + slot)
    history = tl.load(history_ptr + slot)
    pointer = tl.load(pointer_ptr + slot)
    anchor = tl.load(anchor_ptr + slot)
    text = text_base + slot * width
    scratch = scratch_base + request * width
    lane = tl.arange(0, ROOM)
    tl.store(tokens_ptr + base, tl.load(text + end - 1).to(tl.int64))
    tl.store(depths_ptr + base, 0)
    tl.store(branch_ptr + base, 0)
    tl.store(origins_ptr + base, -1)

    in_step = (pointer >= 0) & (pointer < end)
    wanted = tl.where(in_step | (pointer >= 0), 1, BRANCHES)
    share = room // wanted
    written = 0
    chosen = -1
    turn = 0
    place = tl.where(in_step, pointer, -1)
    searching = (pointer < 0) | (pointer >= end)
    if end < 2:
        searching = pointer < -1
    while turn < wanted:
        if searching:
            best = tl.zeros((), dtype=tl.int64)
            for offset in range(0, end, BLOCK):
                index = offset + tl.arange(0, BLOCK)
                inside = index < end
                if turn == 0:
                    score, following = _score(
                        text, index, end, history, anchor, MATCH, LIMIT, SOURCE, NEAR, SKIPPED, INSERTED
                    )
                else:
                    score = tl.load(scratch + index, mask=inside, other=0)
                    following = tl.load(text + index, mask=inside, other=-1)
                    score = tl.where(following == chosen, 0, score)
                if wanted > 1:
                    tl.store(scratch + index, score, mask=inside)
                key = score.to(tl.int64) * 16777216 + (16777215 - index).to(tl.int64)  # of equals, the lowest index
                best = tl.maximum(best, tl.max(tl.where(score > 0, key, 0), axis=0))
            place = tl.where(best > 0, 16777215 - (best % 16777216).to(tl.int32), -1)
        if turn == 0:
            tl.store(guesses_ptr + request, place)
        if place >= 0:
            chosen = tl.load(text + place)
            source = place + lane
            copied = tl.load(text + source, mask=(lane < share) & (source < end), other=-1)
            length = tl.min(tl.where((copied < 0) | (lane >= share), lane, ROOM), axis=0)
            length = tl.minimum(length, share)
            first = written + 1
            target = base + first + lane
            keep = lane < length
            tl.store(tokens_ptr + target, copied.to(tl.int64), mask=keep)
            tl.store(depths_ptr + target, lane + 1, mask=keep)
            tl.store(branch_ptr + target, tl.zeros_like(lane) + first, mask=keep)
            tl.store(origins_ptr + target, source, mask=keep)
            written += length
        else:
            turn = wanted
        turn += 1
    padding = written + 1 + lane
    rest = padding <= room
    tl.store(tokens_ptr + base + padding, tl.zeros_like(lane).to(tl.int64), mask=rest)
    tl.store(depths_ptr + base + padding, tl.zeros_like(lane) + 1, mask=rest)
    tl.store(branch_ptr + base + padding, padding, mask=rest)
    tl.store(origins_ptr + base + padding, tl.zeros_like(lane) - 1, mask=rest)


def copy_draft(
    state: CopyState, slots: Tensor, query_starts: Tensor, num_queries: int, most: int = MAX_BRANCHES
) -> StepTokens:
    """See paceline.ops.copy_draft. All requests must have the same number of queries; ValueError where they cannot."""
    device, count = slots.device, len(slots)
    if num_queries % count:
        raise ValueError(f"{num_queries} queries of {count} requests: on CUDA all of them draft alike")
    room = num_queries // count - 1
    branches = num_branches(room, most)
    width = state.text.shape[1]

    def int32(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    step = StepTokens(
        torch.empty(num_queries, dtype=torch.int64, device=device),
        int32(num_queries),
        int32(num_queries),
        int32(num_queries),
        int32(count),
    )
    scratch = int32(count * width if branches > 1 else 1)
    _copy_draft_kernel[(count,)](
        state.text, state.history_start, state.end, state.pointer, state.anchor, scratch, slots, query_starts,
        step.tokens, step.depths, step.branch_starts, step.origins, step.guesses,
        width, BRANCHES=branches, ROOM=triton.next_power_of_2(max(room + 1, 2)), BLOCK=_BLOCK,
        MATCH=_MATCH, LIMIT=MATCH_LIMIT, SOURCE=_SOURCE, NEAR=_NEAR, SKIPPED=_SKIPPED, INSERTED=_INSERTED,
        num_warps=8,
    )  # fmt: skip
    return step


@triton.jit
def _layout_kernel(
    history_ptr, end_ptr, slots_ptr, starts_ptr, depths_ptr, table_ptr,
    positions_ptr, places_ptr, rows_ptr, contexts_ptr,
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
    tl.store(places_ptr + base + lane, page * page_size + place % page_size, mask=inside)
    depth = tl.load(depths_ptr + base + lane, mask=inside, other=0)
    tl.store(positions_ptr + base + lane, (context + depth).to(tl.int64), mask=inside)
    for offset in range(0, (context + count) // page_size + 1, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        row = tl.load(table + column, mask=column < width, other=0)
        tl.store(rows_ptr + request * width + column, row, mask=column < width)


def decode_layout(
    state: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    step: StepTokens,
    page_table: Tensor,
    page_size: int,
    max_query: int,
) -> AttentionBatch:
    """See paceline.ops.layout. Columns of the returned page table past a request's last query are not written."""
    device, count, queries = slots.device, len(slots), len(step.tokens)
    width = page_table.shape[1]
    positions = torch.empty(queries, dtype=torch.int64, device=device)
    places = torch.empty_like(positions)
    rows = torch.empty(count, width, dtype=torch.int32, device=device)
    contexts = torch.empty(count, dtype=torch.int32, device=device)
    _layout_kernel[(count,)](
        state.history_start, state.end, slots, query_starts, step.depths, page_table,
        positions, places, rows, contexts,
        width, page_size, ROOM=triton.next_power_of_2(max(max_query, 2)), BLOCK=512, num_warps=4,
    )  # fmt: skip
    return AttentionBatch(
        positions=positions,
        slots=places,
        page_table=rows,
        context_lens=contexts,
        query_starts=query_starts,
        branch_starts=step.branch_starts,
        max_query=max_query,
        max_context=width * page_size,
        branching=max_query > 1,
    )


@triton.jit
def _segment(left_starts, left_ok, right_starts, right_ok):
    """Joins runs of a segmented AND: a run that starts a branch forgets what came before it."""
    return left_starts | right_starts, tl.where(right_starts > 0, right_ok, left_ok & right_ok)


@triton.jit
def _accept_kernel(
    text_base, history_ptr, end_ptr, pointer_ptr, anchor_ptr, streak_ptr, slots_ptr, starts_ptr,
    tokens_ptr, branch_ptr, origins_ptr, guesses_ptr, choices_ptr, near_ptr, result_ptr,
    width, result_width, spare, HAS_NEAR: tl.constexpr, QUERIES: tl.constexpr, LIMIT: tl.constexpr,
    HEAD: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    base = tl.load(starts_ptr + request)
    count = tl.load(starts_ptr + request + 1) - base
    text = text_base + slot * width
    end = tl.load(end_ptr + slot)
    history = tl.load(history_ptr + slot)
    pointer = tl.load(pointer_ptr + slot)
    lane = tl.arange(0, QUERIES)
    drafted = (lane >= 1) & (lane < count)
    token = tl.load(tokens_ptr + base + lane, mask=drafted, other=-1).to(tl.int32)
    start = tl.load(branch_ptr + base + lane, mask=drafted, other=0)
    origin = tl.load(origins_ptr + base + lane, mask=drafted, other=-1)
    opens = (lane == start) | (lane == 0)
    parent = tl.where(opens, 0, lane - 1)
    chosen = tl.load(choices_ptr + base + parent, mask=drafted, other=-2).to(tl.int32)
    equal = chosen == token
    fits = equal
    if HAS_NEAR:
        follows = (pointer >= 0) & (pointer < history)
        near = tl.load(near_ptr + base + lane, mask=drafted, other=0) != 0
        fits = equal | (near & follows)
    fits = fits & (origin >= 0) & drafted
    _, alive = tl.associative_scan((opens.to(tl.int32), fits.to(tl.int32)), 0, _segment)
    key = tl.max(tl.where(alive > 0, (lane - start + 1) * 1024 + (1023 - start), 0), axis=0)
    length = key // 1024
    first = tl.where(length > 0, 1023 - key % 1024, 0)
    final = tl.where(length > 0, first + length - 1, 0)
    nears = tl.sum(((lane >= first) & (lane <= final) & (lane > 0) & (length > 0) & (~equal)).to(tl.int32), axis=0)
    bonus = tl.load(choices_ptr + base + final).to(tl.int32)
    guess = tl.load(guesses_ptr + request)
    leading = tl.where(length > 0, tl.load(tokens_ptr + base + first).to(tl.int32), bonus)
    hit = (guess >= 0) & (tl.load(text + tl.maximum(guess, 0)) == leading)
    expected = tl.where(length > 0, tl.load(origins_ptr + base + final) + 1, guess)
    inside = (expected >= 0) & (expected < end)
    in_step = inside & (tl.load(text + tl.maximum(expected, 0), mask=inside, other=-1) == bonus)
    place = expected - length
    back = tl.arange(0, LIMIT)
    reach = (back < place) & (back < end)
    here = tl.load(text + place - 1 - back, mask=reach, other=-1)
    there = tl.load(text + end - 1 - back, mask=reach, other=-2)
    agreement = tl.min(tl.where((here == there) & (here >= 0), LIMIT, back), axis=0)
    before = tl.where(pointer >= 0, tl.load(streak_ptr + slot), agreement)
    streak = tl.where(in_step, before + length + 1, 0)

    row = result_ptr + request * result_width
    tl.store(row, length + 1)
    tl.store(row + 1, tl.sum((origin >= 0).to(tl.int32), axis=0))
    tl.store(row + 2, first)
    tl.store(row + 3, streak)
    tl.store(row + 4, hit.to(tl.int32))
    tl.store(row + 5, nears)
    taken = (lane >= first) & (lane <= final) & (length > 0)
    told = (origin >= 0) & (origin < history)
    tl.store(row + 6, tl.sum(told.to(tl.int32), axis=0))
    tl.store(row + 7, tl.sum((told & taken).to(tl.int32), axis=0))
    tl.store(row + HEAD + lane - first, token, mask=taken)
    tl.store(row + HEAD + length, bonus)
    if slot < spare:
        tl.store(text + end + lane - first, token, mask=taken)
        tl.store(text + end + length, bonus)
        tl.store(end_ptr + slot, end + length + 1)
        tl.store(pointer_ptr + slot, tl.where(in_step, expected + 1, -1))
        if (in_step == 0) & ((length > 0) | (pointer >= 0)):
            tl.store(anchor_ptr + slot, expected)
        tl.store(streak_ptr + slot, streak)


def accept(
    state: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    step: StepTokens,
    choices: Tensor,
    near: Tensor | None,
    width: int,
) -> Tensor:
    """See paceline.ops.accept."""
    count = len(slots)
    result = torch.empty(count, HEADER + width, dtype=torch.int32, device=slots.device)
    _accept_kernel[(count,)](
        state.text, state.history_start, state.end, state.pointer, state.anchor, state.streak, slots, query_starts,
        step.tokens, step.branch_starts, step.origins, step.guesses, choices,
        choices if near is None else near, result,
        state.text.shape[1], HEADER + width, len(state.end) - 1,
        HAS_NEAR=near is not None, QUERIES=triton.next_power_of_2(max(width, 2)), LIMIT=MATCH_LIMIT, HEAD=HEADER,
        num_warps=4,
    )  # fmt: skip
    return result


@triton.jit
def _compact_kernel(
    data_ptr, table_ptr, contexts_ptr, accepted_ptr, plane_size, table_width, accepted_width, page_size,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    new = tl.load(accepted_ptr + request * accepted_width)
    first = tl.load(accepted_ptr + request * accepted_width + 2)
    if (first > 1) & (new > 1):
        plane = data_ptr + tl.program_id(1).to(tl.int64) * plane_size
        context = tl.load(contexts_ptr + request)
        table = table_ptr + request * table_width
        column = tl.arange(0, PADDED)
        for offset in range(0, new - 1, ROWS):
            row = offset + tl.arange(0, ROWS)
            inside = row < new - 1
            source = context + first + row
            target = context + 1 + row
            source_slot = tl.load(table + source // page_size, mask=inside, other=0) * page_size + source % page_size
            target_slot = tl.load(table + target // page_size, mask=inside, other=0) * page_size + target % page_size
            mask = inside[:, None] & (column < SIZE)[None, :]
            values = tl.load(plane + source_slot.to(tl.int64)[:, None] * SIZE + column[None, :], mask=mask)
            # a later row's source may be an earlier row's target: all are read before any is written
            tl.debug_barrier()
            tl.store(plane + target_slot.to(tl.int64)[:, None] * SIZE + column[None, :], values, mask=mask)
            tl.debug_barrier()


def compact(data: Tensor, page_table: Tensor, context_lens: Tensor, accepted: Tensor, page_size: int) -> None:
    """See paceline.ops.accept."""
    layers, two, slots, heads, dim = data.shape
    size = heads * dim
    _compact_kernel[(len(accepted), layers * two)](
        data, page_table, context_lens, accepted, slots * size, page_table.stride(0), accepted.shape[1], page_size,
        SIZE=size, PADDED=triton.next_power_of_2(size), ROWS=16, num_warps=4,
    )  # fmt: skip
