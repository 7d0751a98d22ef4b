"""Drafting by copying: from a request's sources and its own history, by where the output last was in them.

`pointer` is the text index (see ops/state.py) of the token expected next, or -1 when the output has left what it was
copying; `anchor` is then where it left. `streak` counts the tokens of agreement that led to `pointer`, which says how far
to trust it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.draft import DRAFTED, FROM_SOURCE, LENIENT, PER_REQUEST, Draft
from paceline.ops.state import SlotState
from paceline.ops.verify import GUESS_CORRECT, HEADER, NUM_TOKENS, STREAK, Verified

MATCH_LIMIT = 16  # tokens of agreement beyond which a match is as good as any
MAX_BRANCHES = 8
BRANCH_TOKENS = 16  # tokens a branch should have before another is opened

MATCH, SOURCE, NEARBY = 64, 48, 32  # the score of a token of agreement, of an explicit source, of being close by
REPLACED, INSERTED = 96, 80  # scores without agreement: as if one token had been replaced, or inserted


@dataclass
class CopyState:
    """Per slot, [S] int32 each: pointer, anchor, streak."""

    pointer: Tensor
    anchor: Tensor
    streak: Tensor

    @classmethod
    def empty(cls, num_slots: int, device: torch.device) -> CopyState:
        def row(value: int) -> Tensor:
            return torch.full((num_slots,), value, dtype=torch.int32, device=device)

        return cls(row(-1), row(-1), row(0))


@dataclass(kw_only=True)
class CopyDraft(Draft):
    """A draft of chains, and where it comes from.

    origins [T] int32: text index that a drafted token was copied from, -1 for roots and padding;
    guesses [B] int32: text index of the best guess for the token after the root, drafted or not; -1 without one.
    """

    origins: Tensor
    guesses: Tensor = field(metadata=PER_REQUEST)


def copy_draft(
    state: SlotState,
    copy: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    num_queries: int,
    max_branches: int = MAX_BRANCHES,
) -> CopyDraft:
    """Fills each request's queries: its root, then chains copied from its text.

    slots [B] int64, query_starts [B + 1] int32 with query_starts[-1] = `num_queries`. One chain while in step with the
    text, lenient where that is an explicit source; after a miss up to `max_branches`, best guesses first, no two with the
    same first token: places whose last tokens agree with the output's (longest agreement, explicit sources and nearness
    first), and the place itself, as if one token had been replaced or inserted. With `max_branches` 0 and slots out of step
    nothing is copied.
    """
    return implementation("copy_draft", state.text)(state, copy, slots, query_starts, num_queries, max_branches)


def copy_observe(
    state: SlotState, copy: CopyState, slots: Tensor, query_starts: Tensor, draft: CopyDraft, verified: Verified
) -> None:
    """Moves pointer, anchor and streak on after verification, and writes the record of acceptance into the result.

    STREAK becomes the streak after the step (0: out of step with the text), GUESS_CORRECT whether the best guess was the
    target's choice, drafted or not.
    """
    implementation("copy_observe", state.text)(state, copy, slots, query_starts, draft, verified)


def num_branches(room: int, max_branches: int) -> int:
    """Branches that `room` drafted tokens are divided among after a miss."""
    return min(max_branches, max(1, room // BRANCH_TOKENS))


def reference(
    state: SlotState,
    copy: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    num_queries: int,
    max_branches: int = MAX_BRANCHES,
) -> CopyDraft:
    device = state.text.device
    tokens, depths, starts, origins, marks, guesses = [], [], [], [], [], []
    bounds = query_starts.tolist()
    for index, slot in enumerate(slots.tolist()):
        room = bounds[index + 1] - bounds[index] - 1
        end, pointer, history = int(state.end[slot]), int(copy.pointer[slot]), int(state.history_start[slot])
        text = state.text[slot, :end]
        wanted = 1 if pointer >= 0 else num_branches(room, max_branches)
        places = [pointer] if 0 <= pointer < end else _places(text, copy, slot, history, wanted)
        lenient = LENIENT if 0 <= pointer < history else 0
        guesses.append(places[0] if places else -1)
        tokens.append(int(text[end - 1]))
        depths.append(0)
        starts.append(0)
        origins.append(-1)
        marks.append(0)
        share = room // max(1, wanted)
        for place in places if room else []:
            copied = _until_separator(text[place : place + share].tolist())
            first = len(tokens) - bounds[index]
            tokens += copied
            depths += range(1, len(copied) + 1)
            starts += [first] * len(copied)
            origins += range(place, place + len(copied))
            marks += [DRAFTED | lenient | FROM_SOURCE * (place + each < history) for each in range(len(copied))]
        for padding in range(len(tokens) - bounds[index], room + 1):
            tokens.append(0)
            depths.append(1)
            starts.append(padding)
            origins.append(-1)
            marks.append(0)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    assert len(tokens) == num_queries
    return CopyDraft(
        torch.tensor(tokens, device=device),
        int32(depths),
        int32(marks),
        branch_starts=int32(starts),
        origins=int32(origins),
        guesses=int32(guesses),
    )


def observe_reference(
    state: SlotState, copy: CopyState, slots: Tensor, query_starts: Tensor, draft: CopyDraft, verified: Verified
) -> None:
    for index, (slot, first) in enumerate(zip(slots.tolist(), query_starts[:-1].tolist(), strict=True)):
        spare = slot == state.spare
        accepted = int(verified.result[index, NUM_TOKENS]) - 1
        new = verified.result[index, HEADER : HEADER + accepted + 1].tolist()
        end = int(state.end[slot]) - (0 if spare else accepted + 1)  # before the step
        pointer, guess = int(copy.pointer[slot]), int(draft.guesses[index])
        origins = [int(draft.origins[first + row]) for row in verified.path[index, :accepted].tolist()]
        copied = [each for each in origins if each >= 0]  # a joint draft's path may end in tokens that were not copied
        left = copied[-1] + 1 if copied else guess
        expected = left if len(copied) == accepted else -1
        in_step = 0 <= expected < end and int(state.text[slot, expected]) == new[-1]
        before = int(copy.streak[slot])
        if pointer < 0:
            before = _agreement(state.text[slot], end, expected - accepted)
        streak = before + len(new) if in_step else 0
        verified.result[index, STREAK] = streak
        verified.result[index, GUESS_CORRECT] = int(guess >= 0 and int(state.text[slot, guess]) == new[0])
        if spare:
            continue
        copy.pointer[slot] = expected + 1 if in_step else -1
        if not in_step and (copied or pointer >= 0):
            copy.anchor[slot] = left
        copy.streak[slot] = streak


def _agreement(text: Tensor, end: int, place: int) -> int:
    """How many tokens before `place` equal those before `end`, up to MATCH_LIMIT."""
    length = 0
    while length < MATCH_LIMIT and length < place and int(text[place - 1 - length]) == int(text[end - 1 - length]) >= 0:
        length += 1
    return length


def _until_separator(copied: list[int]) -> list[int]:
    return copied[: copied.index(-1)] if -1 in copied else copied


def _places(text: Tensor, copy: CopyState, slot: int, history: int, count: int) -> list[int]:
    """The `count` best text indices to continue from, each with another first token."""
    end = len(text)
    if end < 2 or count == 0:
        return []
    agreement = torch.zeros(end - 1, dtype=torch.int32)
    running = torch.ones(end - 1, dtype=torch.bool)
    for back in range(min(MATCH_LIMIT, end - 1)):
        running[:back] = False
        running[back:] &= text[: end - 1 - back] == text[end - 1 - back]
        if int(text[end - 1 - back]) < 0 or not running.any():
            break
        agreement += running
    candidates = torch.arange(1, end, dtype=torch.int32)
    anchor = int(copy.anchor[slot])
    score = agreement * MATCH
    if anchor >= 0:
        distance = candidates - anchor
        nearby = torch.where(distance >= 0, NEARBY - distance // 16, NEARBY // 2 + distance // 8).clamp(min=0)
    else:
        nearby = candidates * (NEARBY // 2) // end
    score = torch.where(agreement > 0, score + nearby + SOURCE * (candidates < history), 0)
    if 0 <= anchor < history:
        for place, value in ((anchor + 1, REPLACED), (anchor, INSERTED)):
            if 1 <= place < end:
                score[place - 1] = torch.maximum(score[place - 1], score.new_tensor(value))
    following = text[1:end]
    score = torch.where(following >= 0, score, 0)
    places: list[int] = []
    for _ in range(count):
        best = int(score.argmax())
        if int(score[best]) <= 0:
            break
        places.append(best + 1)
        score = torch.where(following == following[best], 0, score)
    return places
