"""Verification: compares a step's drafts with the target's choices and advances every request, without the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.draft import DRAFTED, FROM_MODEL, FROM_SOURCE, LENIENT, Draft
from paceline.ops.state import SlotState

# columns of a result before its tokens
NUM_TOKENS, NUM_DRAFTED, SOURCE_DRAFTED, SOURCE_ACCEPTED, MARGIN_ACCEPTED, STREAK, GUESS_CORRECT = range(7)
MODEL_DRAFTED, MODEL_ACCEPTED, HEADER = range(7, 10)


@dataclass
class Verified:
    """What a step gave each request.

    result [B, HEADER + width] int32: tokens written (accepted ones and one of the target's), tokens drafted, those
    drafted from explicit sources and how many of them were accepted, tokens accepted by a margin alone, two columns for
    the drafter's record of acceptance (see `Drafter.observe`), tokens marked FROM_MODEL and how many of them were accepted,
    then the tokens.
    path [B, width] int32: the query index of each accepted token, ascending; undefined beyond them.
    """

    result: Tensor
    path: Tensor

    @property
    def counts(self) -> Tensor:
        """[B] int32: tokens written."""
        return self.result[:, NUM_TOKENS]


def verify(
    state: SlotState,
    slots: Tensor,
    query_starts: Tensor,
    draft: Draft,
    choices: Tensor,
    within_margin: Tensor | None,
    width: int,
) -> Verified:
    """Accepts, per request, the longest path from the root that the target would have chosen, and the choice after it.

    slots [B] int64, query_starts [B + 1] int32; choices [T] int64: the target's token after each query.
    within_margin [T] bool, or None: tokens marked LENIENT to accept though they are not the choice (a declared margin).
    Of paths of one length the first wins. Appends the new tokens to the text and moves `end`. `width` is the most queries
    that a request has. The spare slot never moves. STREAK starts as the number of accepted tokens, GUESS_CORRECT as
    whether there are any.
    """
    return implementation("verify", state.text)(state, slots, query_starts, draft, choices, within_margin, width)


def reference(
    state: SlotState,
    slots: Tensor,
    query_starts: Tensor,
    draft: Draft,
    choices: Tensor,
    within_margin: Tensor | None,
    width: int,
) -> Verified:
    bounds = query_starts.tolist()
    result = torch.zeros(len(slots), HEADER + width, dtype=torch.int32)
    path = torch.zeros(len(slots), width, dtype=torch.int32)
    first_rows = query_starts[:-1].repeat_interleave(query_starts.diff())
    parents = draft.parent_rows(first_rows).tolist()
    chosen, tokens, marks, depths = (each.tolist() for each in (choices, draft.tokens, draft.marks, draft.depths))
    lenient = within_margin.tolist() if within_margin is not None else [False] * len(tokens)
    for index, slot in enumerate(slots.tolist()):
        first, last = bounds[index], bounds[index + 1]
        accepted, final = {first}, first
        for row in range(first + 1, last):
            equal = chosen[parents[row]] == tokens[row]
            allowed = equal or (marks[row] & LENIENT and lenient[row])
            if marks[row] & DRAFTED and allowed and parents[row] in accepted:
                accepted.add(row)
                if depths[row] > depths[final]:
                    final = row
        rows: list[int] = []
        row = final
        while row != first:
            rows.insert(0, row)
            row = parents[row]
        new = [*(tokens[row] for row in rows), chosen[final]]
        header = [
            len(new),
            sum(each & DRAFTED != 0 for each in marks[first:last]),
            sum(each & FROM_SOURCE != 0 for each in marks[first:last]),
            sum(marks[row] & FROM_SOURCE != 0 for row in rows),
            sum(chosen[parents[row]] != tokens[row] for row in rows),
            len(rows),
            int(bool(rows)),
            sum(each & FROM_MODEL != 0 for each in marks[first:last]),
            sum(marks[row] & FROM_MODEL != 0 for row in rows),
        ]
        result[index, : HEADER + len(new)] = torch.tensor(header + new, dtype=torch.int32)
        path[index, : len(rows)] = torch.tensor(rows, dtype=torch.int32) - first
        if slot != state.spare:
            end = int(state.end[slot])
            state.text[slot, end : end + len(new)] = torch.tensor(new, dtype=torch.int32)
            state.end[slot] = end + len(new)
    return Verified(result, path)
