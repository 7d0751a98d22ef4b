"""The copy drafter on the GPU, one program a request: what `ops.copy_draft` defines in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.ops.copy_draft import (
    INSERTED,
    MATCH,
    MATCH_LIMIT,
    MAX_BRANCHES,
    NEARBY,
    REPLACED,
    SOURCE,
    CopyDraft,
    CopyState,
    num_branches,
)
from paceline.ops.draft import DRAFTED, FROM_SOURCE, LENIENT
from paceline.ops.state import SlotState
from paceline.ops.verify import GUESS_CORRECT, HEADER, NUM_TOKENS, STREAK, Verified

_BLOCK = 4096


@triton.jit
def _score(
    text, index, end, history, anchor,
    MATCH: tl.constexpr, LIMIT: tl.constexpr, SOURCE: tl.constexpr, NEARBY: tl.constexpr,
    REPLACED: tl.constexpr, INSERTED: tl.constexpr,
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
    ahead = tl.maximum(NEARBY - distance // 16, 0)
    behind = tl.maximum(NEARBY // 2 - (-distance + 7) // 8, 0)
    nearby = tl.where(anchor >= 0, tl.where(distance >= 0, ahead, behind), index * (NEARBY // 2) // end)
    score = tl.where(agreement > 0, agreement * MATCH + nearby + tl.where(index < history, SOURCE, 0), 0)
    follows = (anchor >= 0) & (anchor < history)
    score = tl.where(follows & (index == anchor + 1) & inside, tl.maximum(score, REPLACED), score)
    score = tl.where(follows & (index == anchor) & inside, tl.maximum(score, INSERTED), score)
    following = tl.load(text + index, mask=inside, other=-1)
    return tl.where(following >= 0, score, 0), following


@triton.jit
def _copy_draft_kernel(
    text_base, history_ptr, end_ptr, pointer_ptr, anchor_ptr, scratch_base, slots_ptr, starts_ptr,
    tokens_ptr, depths_ptr, marks_ptr, branch_ptr, origins_ptr, guesses_ptr,
    width, BRANCHES: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr,
    MATCH: tl.constexpr, LIMIT: tl.constexpr, SOURCE: tl.constexpr, NEARBY: tl.constexpr,
    REPLACED: tl.constexpr, INSERTED: tl.constexpr,
    DRAFTED: tl.constexpr, FROM_SOURCE: tl.constexpr, LENIENT: tl.constexpr,
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
    tl.store(marks_ptr + base, 0)
    flags = tl.where((pointer >= 0) & (pointer < history), DRAFTED | LENIENT, DRAFTED)

    in_step = (pointer >= 0) & (pointer < end)
    wanted = tl.where(in_step | (pointer >= 0), 1, BRANCHES)
    share = room // tl.maximum(wanted, 1)
    written = 0
    chosen = -1
    turn = 0
    place = tl.where(in_step, pointer, -1)
    searching = (pointer < 0) | (pointer >= end)
    if end < 2:
        searching = pointer < -1
    if wanted == 0:
        tl.store(guesses_ptr + request, -1)
    while turn < wanted:
        if searching:
            best = tl.zeros((), dtype=tl.int64)
            for offset in range(0, end, BLOCK):
                index = offset + tl.arange(0, BLOCK)
                inside = index < end
                if turn == 0:
                    score, following = _score(
                        text, index, end, history, anchor, MATCH, LIMIT, SOURCE, NEARBY, REPLACED, INSERTED
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
            tl.store(marks_ptr + target, flags + tl.where(source < history, FROM_SOURCE, 0), mask=keep)
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
    tl.store(marks_ptr + base + padding, tl.zeros_like(lane), mask=rest)


def copy_draft(
    state: SlotState,
    copy: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    num_queries: int,
    max_branches: int = MAX_BRANCHES,
) -> CopyDraft:
    """See paceline.ops.copy_draft. All requests must have the same number of queries; ValueError where they cannot."""
    device, count = slots.device, len(slots)
    if num_queries % count:
        raise ValueError(f"{num_queries} queries of {count} requests: on CUDA all requests draft the same length")
    room = num_queries // count - 1
    branches = num_branches(room, max_branches)
    width = state.text.shape[1]

    def int32(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    draft = CopyDraft(
        torch.empty(num_queries, dtype=torch.int64, device=device),
        int32(num_queries),
        int32(num_queries),
        branch_starts=int32(num_queries),
        origins=int32(num_queries),
        guesses=int32(count),
    )
    scratch = int32(count * width if branches > 1 else 1)
    _copy_draft_kernel[(count,)](
        state.text, state.history_start, state.end, copy.pointer, copy.anchor, scratch, slots, query_starts,
        draft.tokens, draft.depths, draft.marks, draft.branch_starts, draft.origins, draft.guesses,
        width, BRANCHES=branches, ROOM=triton.next_power_of_2(max(room + 1, 2)), BLOCK=_BLOCK,
        MATCH=MATCH, LIMIT=MATCH_LIMIT, SOURCE=SOURCE, NEARBY=NEARBY, REPLACED=REPLACED, INSERTED=INSERTED,
        DRAFTED=DRAFTED, FROM_SOURCE=FROM_SOURCE, LENIENT=LENIENT, num_warps=8,
    )  # fmt: skip
    return draft


@triton.jit
def _copy_observe_kernel(
    text_base, end_ptr, pointer_ptr, anchor_ptr, streak_ptr, slots_ptr, starts_ptr,
    origins_ptr, guesses_ptr, result_ptr, path_ptr, width, result_width, path_width, spare,
    LIMIT: tl.constexpr, HEAD: tl.constexpr, NUM_TOKENS: tl.constexpr, STREAK: tl.constexpr, GUESS: tl.constexpr,
    PATH: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    base = tl.load(starts_ptr + request)
    row = result_ptr + request * result_width
    count = tl.load(row + NUM_TOKENS)
    accepted = count - 1
    text = text_base + slot * width
    end = tl.load(end_ptr + slot) - tl.where(slot < spare, count, 0)  # before the step
    pointer = tl.load(pointer_ptr + slot)
    guess = tl.load(guesses_ptr + request)
    first = tl.load(row + HEAD)
    last = tl.load(row + HEAD + accepted)
    lane = tl.arange(0, PATH)
    path = tl.load(path_ptr + request * path_width + lane, mask=lane < accepted, other=0)
    origin = tl.load(origins_ptr + base + path, mask=lane < accepted, other=-1)
    copied = tl.sum((origin >= 0).to(tl.int32), axis=0)  # they come first on a path
    final = tl.max(tl.where(lane == copied - 1, origin, -1), axis=0)
    left = tl.where(copied > 0, final + 1, guess)
    expected = tl.where(copied == accepted, left, -1)
    inside = (expected >= 0) & (expected < end)
    in_step = inside & (tl.load(text + tl.maximum(expected, 0), mask=inside, other=-1) == last)
    place = expected - accepted
    back = tl.arange(0, LIMIT)
    reach = (back < place) & (back < end)
    here = tl.load(text + place - 1 - back, mask=reach, other=-1)
    there = tl.load(text + end - 1 - back, mask=reach, other=-2)
    agreement = tl.min(tl.where((here == there) & (here >= 0), LIMIT, back), axis=0)
    before = tl.where(pointer >= 0, tl.load(streak_ptr + slot), agreement)
    streak = tl.where(in_step, before + count, 0)
    correct = (guess >= 0) & (tl.load(text + tl.maximum(guess, 0)) == first)
    tl.store(row + STREAK, streak)
    tl.store(row + GUESS, correct.to(tl.int32))
    if slot < spare:
        tl.store(pointer_ptr + slot, tl.where(in_step, expected + 1, -1))
        if (in_step == 0) & ((copied > 0) | (pointer >= 0)):
            tl.store(anchor_ptr + slot, left)
        tl.store(streak_ptr + slot, streak)


def copy_observe(
    state: SlotState, copy: CopyState, slots: Tensor, query_starts: Tensor, draft: CopyDraft, verified: Verified
) -> None:
    """See paceline.ops.copy_draft."""
    result, path = verified.result, verified.path
    _copy_observe_kernel[(len(slots),)](
        state.text, state.end, copy.pointer, copy.anchor, copy.streak, slots, query_starts,
        draft.origins, draft.guesses, result, path, state.text.shape[1], result.shape[1], path.shape[1], state.spare,
        LIMIT=MATCH_LIMIT, HEAD=HEADER, NUM_TOKENS=NUM_TOKENS, STREAK=STREAK, GUESS=GUESS_CORRECT,
        PATH=triton.next_power_of_2(path.shape[1]), num_warps=1,
    )  # fmt: skip
