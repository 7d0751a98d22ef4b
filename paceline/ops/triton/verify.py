"""Verification on the GPU, one program a request: what `ops.verify` defines in torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from paceline.config import MAX_DRAFT
from paceline.ops.draft import DRAFTED, FROM_MODEL, FROM_SOURCE, LENIENT, Draft
from paceline.ops.state import SlotState
from paceline.ops.verify import (
    GUESS_CORRECT,
    HEADER,
    MARGIN_ACCEPTED,
    MODEL_ACCEPTED,
    MODEL_DRAFTED,
    NUM_DRAFTED,
    NUM_TOKENS,
    SOURCE_ACCEPTED,
    SOURCE_DRAFTED,
    STREAK,
    Verified,
)

_KEY = triton.next_power_of_2(MAX_DRAFT + 1)  # more than any query index: packs (depth, index) into one number


@triton.jit
def _segment(left_starts, left_ok, right_starts, right_ok):
    """Joins runs of a segmented AND: a run that starts a branch forgets what came before it."""
    return left_starts | right_starts, tl.where(right_starts > 0, right_ok, left_ok & right_ok)


@triton.jit
def _verify_kernel(
    text_base, end_ptr, slots_ptr, starts_ptr, tokens_ptr, depths_ptr, marks_ptr, tree_ptr, choices_ptr, margin_ptr,
    result_ptr, path_ptr, width, result_width, path_width, spare,
    TREE: tl.constexpr, HAS_MARGIN: tl.constexpr, QUERIES: tl.constexpr, ROUNDS: tl.constexpr, KEY: tl.constexpr,
    DRAFTED: tl.constexpr, FROM_SOURCE: tl.constexpr, LENIENT: tl.constexpr,
    HEAD: tl.constexpr, NUM_TOKENS: tl.constexpr, NUM_DRAFTED: tl.constexpr, SOURCE_DRAFTED: tl.constexpr,
    SOURCE_ACCEPTED: tl.constexpr, MARGIN_ACCEPTED: tl.constexpr, STREAK: tl.constexpr, GUESS: tl.constexpr,
    FROM_MODEL: tl.constexpr, MODEL_DRAFTED: tl.constexpr, MODEL_ACCEPTED: tl.constexpr,
):  # fmt: skip
    """Of chains (not TREE) `tree_ptr` holds branch starts and the path is a run of queries; of a tree it holds parents."""
    request = tl.program_id(0)
    slot = tl.load(slots_ptr + request)
    base = tl.load(starts_ptr + request)
    count = tl.load(starts_ptr + request + 1) - base
    lane = tl.arange(0, QUERIES)
    inside = (lane >= 1) & (lane < count)
    token = tl.load(tokens_ptr + base + lane, mask=inside, other=-1).to(tl.int32)
    marks = tl.load(marks_ptr + base + lane, mask=inside, other=0)
    depth = tl.load(depths_ptr + base + lane, mask=inside, other=0)
    tree = tl.load(tree_ptr + base + lane, mask=inside, other=0)
    opens = (lane == tree) | (lane == 0)
    parent = tree
    if not TREE:
        parent = tl.where(opens, 0, lane - 1)
    equal = tl.load(choices_ptr + base + parent, mask=inside, other=-2).to(tl.int32) == token
    fits = equal
    if HAS_MARGIN:
        lenient = tl.load(margin_ptr + base + lane, mask=inside, other=0) != 0
        fits = equal | (lenient & ((marks & LENIENT) != 0))
    fits = fits & ((marks & DRAFTED) != 0) & inside
    if TREE:
        alive = (fits | (lane == 0)).to(tl.int32)
        above = parent
        for _ in tl.static_range(ROUNDS):  # each round doubles the distance up to which ancestors are checked
            alive = alive & tl.gather(alive, above, 0)
            above = tl.gather(above, above, 0)
        alive = tl.where(inside, alive, 0)
    else:
        _, alive = tl.associative_scan((opens.to(tl.int32), fits.to(tl.int32)), 0, _segment)
    key = tl.max(tl.where(alive > 0, depth * KEY + (KEY - 1 - lane), 0), axis=0)
    length = key // KEY
    final = tl.where(length > 0, KEY - 1 - key % KEY, 0)
    row = result_ptr + request * result_width
    path = path_ptr + request * path_width
    text = text_base + slot * width
    end = tl.load(end_ptr + slot)
    if TREE:
        # the ancestor of `final` at depth lane + 1, by the binary digits of the distance to it
        distance = length - 1 - lane
        taken = distance >= 0
        node = tl.where(taken, final, 0)
        above = parent
        for bit in tl.static_range(ROUNDS):
            node = tl.where((distance >> bit) % 2 == 1, tl.gather(above, node, 0), node)
            above = tl.gather(above, above, 0)
        accepted = tl.load(tokens_ptr + base + node, mask=taken, other=0).to(tl.int32)
        accepted_marks = tl.load(marks_ptr + base + node, mask=taken, other=0)
        by_margin = taken & (tl.gather(equal.to(tl.int32), node, 0) == 0)
        place = lane
    else:
        first = final - length + 1
        taken = (lane >= first) & (lane <= final) & (length > 0)
        node = lane
        accepted = token
        accepted_marks = marks
        by_margin = taken & (~equal)
        place = lane - first
    bonus = tl.load(choices_ptr + base + final).to(tl.int32)
    from_source = taken & ((accepted_marks & FROM_SOURCE) != 0)
    tl.store(row + NUM_TOKENS, length + 1)
    tl.store(row + NUM_DRAFTED, tl.sum(((marks & DRAFTED) != 0).to(tl.int32), axis=0))
    tl.store(row + SOURCE_DRAFTED, tl.sum(((marks & FROM_SOURCE) != 0).to(tl.int32), axis=0))
    tl.store(row + SOURCE_ACCEPTED, tl.sum(from_source.to(tl.int32), axis=0))
    tl.store(row + MARGIN_ACCEPTED, tl.sum(by_margin.to(tl.int32), axis=0))
    tl.store(row + STREAK, length)
    tl.store(row + GUESS, (length > 0).to(tl.int32))
    from_model = taken & ((accepted_marks & FROM_MODEL) != 0)
    tl.store(row + MODEL_DRAFTED, tl.sum(((marks & FROM_MODEL) != 0).to(tl.int32), axis=0))
    tl.store(row + MODEL_ACCEPTED, tl.sum(from_model.to(tl.int32), axis=0))
    tl.store(row + HEAD + place, accepted, mask=taken)
    tl.store(row + HEAD + length, bonus)
    tl.store(path + place, node, mask=taken)
    if slot < spare:
        tl.store(text + end + place, accepted, mask=taken)
        tl.store(text + end + length, bonus)
        tl.store(end_ptr + slot, end + length + 1)


def verify(
    state: SlotState,
    slots: Tensor,
    query_starts: Tensor,
    draft: Draft,
    choices: Tensor,
    within_margin: Tensor | None,
    width: int,
) -> Verified:
    """See paceline.ops.verify."""
    count = len(slots)
    result = torch.empty(count, HEADER + width, dtype=torch.int32, device=slots.device)
    path = torch.empty(count, width, dtype=torch.int32, device=slots.device)
    tree = draft.branch_starts if draft.parents is None else draft.parents
    _verify_kernel[(count,)](
        state.text, state.end, slots, query_starts, draft.tokens, draft.depths, draft.marks, tree, choices,
        choices if within_margin is None else within_margin, result, path,
        state.text.shape[1], result.shape[1], path.shape[1], state.spare,
        TREE=draft.parents is not None, HAS_MARGIN=within_margin is not None,
        QUERIES=triton.next_power_of_2(max(width, 2)), ROUNDS=max(1, (width - 1).bit_length()), KEY=_KEY,
        DRAFTED=DRAFTED, FROM_SOURCE=FROM_SOURCE, LENIENT=LENIENT,
        HEAD=HEADER, NUM_TOKENS=NUM_TOKENS, NUM_DRAFTED=NUM_DRAFTED, SOURCE_DRAFTED=SOURCE_DRAFTED,
        SOURCE_ACCEPTED=SOURCE_ACCEPTED, MARGIN_ACCEPTED=MARGIN_ACCEPTED, STREAK=STREAK, GUESS=GUESS_CORRECT,
        FROM_MODEL=FROM_MODEL, MODEL_DRAFTED=MODEL_DRAFTED, MODEL_ACCEPTED=MODEL_ACCEPTED,
        num_warps=4,
    )  # fmt: skip
    return Verified(result, path)
