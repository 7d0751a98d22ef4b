"""The kernel of `ops.join_drafts`, one program a request: what that defines in torch.

Candidates are lanes: first the guesses in the order of depth and rank, then the copied rows. A lane's place in the tree is
the number of lanes with a better score, so nothing is sorted.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.ops.copy_draft import CopyDraft, CopyState
from paceline.ops.draft import DRAFTED, FROM_MODEL
from paceline.ops.join_drafts import NEXT_BRANCH, STREAKS, SURVIVAL, Guesses

_LOG = [[math.log(each) for each in pair] for pair in SURVIVAL]


def join_drafts(
    copied: CopyDraft, copy: CopyState, slots: Tensor, guesses: Guesses, query_starts: Tensor, max_query: int
) -> CopyDraft:
    """See paceline.ops.join_drafts."""
    queries, device = len(copied.tokens), slots.device
    count, depth, width = guesses.tokens.shape

    def int32() -> Tensor:
        return torch.empty(queries, dtype=torch.int32, device=device)

    joined = CopyDraft(
        torch.empty(queries, dtype=torch.int64, device=device),
        int32(),
        int32(),
        parents=int32(),
        origins=int32(),
        guesses=copied.guesses,
    )
    _join[(count,)](
        copied.tokens, copied.depths, copied.marks, copied.branch_starts, copied.origins, copy.streak, slots,
        guesses.tokens.contiguous(), guesses.logprobs.contiguous(), query_starts,
        joined.tokens, joined.depths, joined.marks, joined.parents, joined.origins,
        DEPTH=depth, WIDTH=width, LANES=triton.next_power_of_2(depth * width + max_query - 1),
        SECOND=STREAKS[0], THIRD=STREAKS[1], FOURTH=STREAKS[2], NEXT=math.log(NEXT_BRANCH),
        ONCE_0=_LOG[0][0], MORE_0=_LOG[0][1], ONCE_1=_LOG[1][0], MORE_1=_LOG[1][1],
        ONCE_2=_LOG[2][0], MORE_2=_LOG[2][1], ONCE_3=_LOG[3][0], MORE_3=_LOG[3][1],
        DRAFTED=DRAFTED, FROM_MODEL=FROM_MODEL, num_warps=4,
    )  # fmt: skip
    return joined


@triton.jit
def _both(left_starts, left, right_starts, right):
    """Joins runs of a segmented AND."""
    return left_starts | right_starts, tl.where(right_starts > 0, right, left & right)


@triton.jit
def _least(left, right):
    return tl.minimum(left, right)


@triton.jit
def _join(
    tokens_ptr, depths_ptr, marks_ptr, starts_ptr, origins_ptr, streak_ptr, slots_ptr, guess_ptr, logprob_ptr, bounds_ptr,
    to_tokens, to_depths, to_marks, to_parents, to_origins,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, FOURTH: tl.constexpr, NEXT: tl.constexpr,
    ONCE_0: tl.constexpr, MORE_0: tl.constexpr, ONCE_1: tl.constexpr, MORE_1: tl.constexpr,
    ONCE_2: tl.constexpr, MORE_2: tl.constexpr, ONCE_3: tl.constexpr, MORE_3: tl.constexpr,
    DRAFTED: tl.constexpr, FROM_MODEL: tl.constexpr,
):  # fmt: skip
    GUESSED: tl.constexpr = DEPTH * WIDTH
    request = tl.program_id(0)
    base = tl.load(bounds_ptr + request)
    room = tl.load(bounds_ptr + request + 1) - base - 1
    streak = tl.load(streak_ptr + tl.load(slots_ptr + request))
    lane = tl.arange(0, LANES)
    logprob = tl.load(logprob_ptr + request * GUESSED + lane, lane < GUESSED, other=-float("inf"))
    is_guess = logprob > -float("inf")
    row = lane - GUESSED + 1  # of a copied lane
    copied = (lane >= GUESSED) & (row <= room)
    marks = tl.load(marks_ptr + base + row, copied, other=0)
    copied = copied & ((marks & DRAFTED) != 0)
    guess = guess_ptr + request * GUESSED
    token = tl.load(guess + lane, is_guess, other=-1)
    token = tl.where(copied, tl.load(tokens_ptr + base + row, copied, other=-1), token)
    depth = tl.where(lane < GUESSED, lane // WIDTH + 1, tl.load(depths_ptr + base + row, copied, other=1))
    origin = tl.load(origins_ptr + base + row, copied, other=-1)
    start = tl.load(starts_ptr + base + row, copied, other=0)
    opens = copied & (start == row)
    branch = tl.cumsum(opens.to(tl.int32), axis=0) - 1

    # the log-probabilities of the chain up to each depth
    logprob = tl.where(is_guess, tl.minimum(logprob, 0.0), 0.0)
    on_chain = is_guess & (lane % WIDTH == 0)
    above = tl.cumsum(tl.where(on_chain, logprob, 0.0), axis=0)
    # a parallel sum rounds differently at each lane; no child may score above its parent
    above = tl.associative_scan(above, 0, _least)
    chain = lane // WIDTH * WIDTH
    parent_score = tl.where(chain > 0, tl.gather(above, tl.maximum(chain - WIDTH, 0), 0), 0.0)
    guess_score = tl.where(on_chain, above, parent_score + logprob)
    once = tl.where(
        streak >= FOURTH, ONCE_3, tl.where(streak >= THIRD, ONCE_2, tl.where(streak >= SECOND, ONCE_1, ONCE_0))
    )
    more = tl.where(
        streak >= FOURTH, MORE_3, tl.where(streak >= THIRD, MORE_2, tl.where(streak >= SECOND, MORE_1, MORE_0))
    )
    copy_score = once + branch * NEXT + (depth - 1) * more
    score = tl.where(is_guess, guess_score, copy_score)

    # a copied lane is the same node as a guess if the tokens before it are the chain's, and its own is a candidate
    level = tl.minimum(depth - 1, DEPTH - 1) * WIDTH
    reached = copied & (depth <= tl.sum(on_chain.to(tl.int32), axis=0))
    equal = reached & (tl.load(guess + level, reached, other=-2) == token)
    _, so_far = tl.associative_scan((opens.to(tl.int32), equal.to(tl.int32)), 0, _both)
    before = tl.where(opens, 1, tl.gather(so_far, tl.maximum(lane - 1, 0), 0))
    same = tl.full([LANES], -1, tl.int32)
    for number in tl.static_range(WIDTH):
        there = reached & (
            tl.load(logprob_ptr + request * GUESSED + level + number, reached, other=0.0) > -float("inf")
        )
        candidate = tl.load(guess + level + number, there, other=-2)
        same = tl.where((same < 0) & reached & (before > 0) & (candidate == token), level + number, same)
    merged = copied & (same >= 0)
    hit = (same[None, :] == lane[:, None]) & merged[None, :]  # [guess, copied]
    score = tl.maximum(score, tl.max(tl.where(hit, copy_score[None, :], -float("inf")), axis=1))
    extra_marks = tl.max(tl.where(hit, marks[None, :], 0), axis=1)
    origin = tl.where(is_guess, tl.max(tl.where(hit, origin[None, :], -1), axis=1), origin)
    marks = tl.where(is_guess, extra_marks | DRAFTED | tl.where(on_chain, FROM_MODEL, 0), marks)

    own = (is_guess | copied) & (~merged)
    score = tl.where(own, score, -float("inf"))
    previous = tl.where(merged, same, lane)  # the lane that stands for a copied one
    parent = tl.where(opens, -1, tl.gather(previous, tl.maximum(lane - 1, 0), 0))
    parent = tl.where(is_guess, tl.where(depth > 1, (depth - 2) * WIDTH, -1), parent)
    better = (score[None, :] > score[:, None]) | ((score[None, :] == score[:, None]) & (lane[None, :] < lane[:, None]))
    rank = tl.sum((better & own[None, :]).to(tl.int32), axis=1)
    kept = own & (rank < room)
    place = tl.where(parent < 0, 0, tl.gather(rank, tl.maximum(parent, 0), 0) + 1)
    to = base + 1 + rank
    tl.store(to_tokens + to, token.to(tl.int64), kept)
    tl.store(to_depths + to, depth, kept)
    tl.store(to_marks + to, marks, kept)
    tl.store(to_parents + to, place, kept)
    tl.store(to_origins + to, origin, kept)
    count = tl.sum(own.to(tl.int32), axis=0)
    padding = (lane >= count) & (lane < room)
    to = base + 1 + lane
    tl.store(to_tokens + to, tl.zeros([LANES], tl.int64), padding)
    tl.store(to_depths + to, tl.full([LANES], 1, tl.int32), padding)
    tl.store(to_marks + to, tl.zeros([LANES], tl.int32), padding)
    tl.store(to_parents + to, tl.zeros([LANES], tl.int32), padding)
    tl.store(to_origins + to, tl.full([LANES], -1, tl.int32), padding)
    tl.store(to_tokens + base, tl.load(tokens_ptr + base))
    tl.store(to_depths + base, 0)
    tl.store(to_marks + base, 0)
    tl.store(to_parents + base, 0)
    tl.store(to_origins + base, -1)
