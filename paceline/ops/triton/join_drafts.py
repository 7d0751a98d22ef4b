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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paceline.ops.copy_draft import CopyDraft, CopyState
from paceline.ops.draft import DRAFTED, FROM_MODEL
from paceline.ops.join_drafts import NEXT_BRANCH, STREAKS, SURVIVAL, Guesses
from paceline.ops.triton import launch_options

_LOG = [[math.log(each) for each in pair] for pair in SURVIVAL]


def join_drafts(
    copied: CopyDraft, copy: CopyState, slots: Tensor, guesses: Guesses, query_starts: Tensor, max_query: int
) -> CopyDraft:
    """See paceline.ops.join_drafts."""
    queries, device = len(copied.tokens), slots.device
    count, depth, width = guesses.tokens.shape
    lanes = triton.next_power_of_2(depth * width + max_query - 1)
    parents = None if guesses.parents is None else guesses.parents.contiguous()
    chain = None if guesses.chain is None else guesses.chain.contiguous()

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
        guesses.tokens.contiguous(), guesses.logprobs.contiguous(), parents, chain, query_starts,
        joined.tokens, joined.depths, joined.marks, joined.parents, joined.origins,
        DEPTH=depth, WIDTH=width, LANES=lanes, NUMBERS=triton.next_power_of_2(width),
        SECOND=STREAKS[0], THIRD=STREAKS[1], FOURTH=STREAKS[2], NEXT=math.log(NEXT_BRANCH),
        ONCE_0=_LOG[0][0], MORE_0=_LOG[0][1], ONCE_1=_LOG[1][0], MORE_1=_LOG[1][1],
        ONCE_2=_LOG[2][0], MORE_2=_LOG[2][1], ONCE_3=_LOG[3][0], MORE_3=_LOG[3][1],
        DRAFTED=DRAFTED, FROM_MODEL=FROM_MODEL, num_warps=8 if lanes > 64 else 4, **launch_options(device),
    )  # fmt: skip
    return joined


@triton.jit
def _followed(parents, guess, there, WIDTH: tl.constexpr):
    """The lanes of the guesses that a request's guesses follow, -1 for the root's."""
    level = guess // WIDTH
    number = tl.zeros_like(guess)
    if parents is not None:
        number = tl.load(parents + guess, there & (level > 0), other=0)
    return tl.where(level > 0, (level - 1) * WIDTH + number, -1)


@triton.jit
def _scores(logprob, parent, DEPTH: tl.constexpr):
    """The sum of the log-probabilities along each guess's path. Each turn gives those of one more depth.

    Each is its parent's score and its own log-probability, so rounding cannot put a child above its parent.
    """
    score = logprob
    for _ in range(1, DEPTH):
        score = tl.where(parent < 0, logprob, tl.gather(score, tl.maximum(parent, 0), 0) + logprob)
    return score


@triton.jit
def _stand_ins(
    guesses, logprobs, parents, token, depth, copied, opens, lane,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """The lanes that stand for each: of a copied token the guess that is the same node, or else its own.

    A guess is the same node if its token is, and what it follows is what stands for the copied token before. Each turn
    finds those of one more depth.
    """
    number = tl.arange(0, NUMBERS)[None, :]
    guess = (depth[:, None] - 1) * WIDTH + number
    there = copied[:, None] & (depth[:, None] <= DEPTH) & (number < WIDTH)
    there = there & (tl.load(logprobs + guess, there, other=-float("inf")) > -float("inf"))
    there = there & (tl.load(guesses + guess, there, other=-1) == token[:, None])
    followed = _followed(parents, guess, there, WIDTH)
    stands = lane
    for _ in range(DEPTH):
        before = tl.where(opens, -1, tl.gather(stands, tl.maximum(lane - 1, 0), 0))
        same = tl.min(tl.where(there & (followed == before[:, None]), guess, LANES), axis=1)
        stands = tl.where(same < LANES, same, lane)
    return stands


@triton.jit
def _join(
    tokens_ptr, depths_ptr, marks_ptr, starts_ptr, origins_ptr, streak_ptr, slots_ptr, guess_ptr, logprob_ptr,
    parents_ptr, chain_ptr, bounds_ptr, to_tokens, to_depths, to_marks, to_parents, to_origins,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, NUMBERS: tl.constexpr,
    SECOND: tl.constexpr, THIRD: tl.constexpr, FOURTH: tl.constexpr, NEXT: tl.constexpr,
    ONCE_0: tl.constexpr, MORE_0: tl.constexpr, ONCE_1: tl.constexpr, MORE_1: tl.constexpr,
    ONCE_2: tl.constexpr, MORE_2: tl.constexpr, ONCE_3: tl.constexpr, MORE_3: tl.constexpr,
    DRAFTED: tl.constexpr, FROM_MODEL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    GUESSED: tl.constexpr = DEPTH * WIDTH
    request = tl.program_id(0)
    base = tl.load(bounds_ptr + request)
    room = tl.load(bounds_ptr + request + 1) - base - 1
    streak = tl.load(streak_ptr + tl.load(slots_ptr + request))
    lane = tl.arange(0, LANES)
    guesses, logprobs, parents = guess_ptr + request * GUESSED, logprob_ptr + request * GUESSED, None
    if parents_ptr is not None:
        parents = parents_ptr + request * GUESSED
    logprob = tl.load(logprobs + lane, lane < GUESSED, other=-float("inf"))
    followed = _followed(parents, lane, logprob > -float("inf"), WIDTH)
    guess_score = _scores(tl.minimum(logprob, 0.0), tl.where(lane < GUESSED, followed, -1), DEPTH)
    is_guess = guess_score > -float("inf")
    on_chain = is_guess & (lane % WIDTH == 0)
    if chain_ptr is not None:
        on_chain = is_guess & (lane % WIDTH == tl.load(chain_ptr + request * DEPTH + lane // WIDTH, is_guess, other=-1))
    row = lane - GUESSED + 1  # of a copied lane
    copied = (lane >= GUESSED) & (row <= room)
    marks = tl.load(marks_ptr + base + row, copied, other=0)
    copied = copied & ((marks & DRAFTED) != 0)
    token = tl.load(guesses + lane, is_guess, other=-1)
    token = tl.where(copied, tl.load(tokens_ptr + base + row, copied, other=-1), token)
    depth = tl.where(lane < GUESSED, lane // WIDTH + 1, tl.load(depths_ptr + base + row, copied, other=1))
    origin = tl.load(origins_ptr + base + row, copied, other=-1)
    start = tl.load(starts_ptr + base + row, copied, other=0)
    opens = copied & (start == row)
    branch = tl.cumsum(opens.to(tl.int32), axis=0) - 1

    once = tl.where(
        streak >= FOURTH, ONCE_3, tl.where(streak >= THIRD, ONCE_2, tl.where(streak >= SECOND, ONCE_1, ONCE_0))
    )
    more = tl.where(
        streak >= FOURTH, MORE_3, tl.where(streak >= THIRD, MORE_2, tl.where(streak >= SECOND, MORE_1, MORE_0))
    )
    copy_score = once + branch * NEXT + (depth - 1) * more
    score = tl.where(is_guess, guess_score, copy_score)

    stands = _stand_ins(guesses, logprobs, parents, token, depth, copied, opens, lane, DEPTH, WIDTH, LANES, NUMBERS)
    merged = copied & (stands != lane)
    hit = (stands[None, :] == lane[:, None]) & merged[None, :]  # [guess, copied]
    score = tl.maximum(score, tl.max(tl.where(hit, copy_score[None, :], -float("inf")), axis=1))
    extra_marks = tl.max(tl.where(hit, marks[None, :], 0), axis=1)
    origin = tl.where(is_guess, tl.max(tl.where(hit, origin[None, :], -1), axis=1), origin)
    marks = tl.where(is_guess, extra_marks | DRAFTED | tl.where(on_chain, FROM_MODEL, 0), marks)

    own = (is_guess | copied) & (~merged)
    score = tl.where(own, score, -float("inf"))
    parent = tl.where(opens, -1, tl.gather(stands, tl.maximum(lane - 1, 0), 0))
    parent = tl.where(is_guess, followed, parent)
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
