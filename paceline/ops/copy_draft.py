"""Drafting by copying: from a request's sources and its own history, by where the output last was in them.

Each request slot has a row of text: what it may copy from, then its own prompt and output so far.

    text[slot] = | source 0 | -1 | source 1 | -1 | prompt ............ | output ... root | (room) |
                                                 ^ history_start                        ^ end

`pointer` is the text index of the token expected next, or -1 when the output has left what it was copying; `anchor` is
then where it left. `streak` counts the tokens of agreement that led to `pointer`, which says how far to trust it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation

MATCH_LIMIT = 16  # tokens of agreement beyond which a match is as good as any
MAX_BRANCHES = 8
BRANCH_TOKENS = 16  # tokens a branch should have before another is opened

_MATCH, _SOURCE, _NEAR = 64, 48, 32  # the score of a token of agreement, of an explicit source, of being close by
_SKIPPED, _INSERTED = 96, 80  # guesses without agreement: one token was replaced, or inserted


@dataclass
class CopyState:
    """Per slot: text [S, W] int32, and [S] int32 history_start, end, pointer, anchor, streak."""

    text: Tensor
    history_start: Tensor
    end: Tensor
    pointer: Tensor
    anchor: Tensor
    streak: Tensor

    @classmethod
    def empty(cls, num_slots: int, width: int, device: torch.device) -> CopyState:
        def row(value: int) -> Tensor:
            return torch.full((num_slots,), value, dtype=torch.int32, device=device)

        text = torch.full((num_slots, width), -1, dtype=torch.int32, device=device)
        text[:, 0] = 0
        return cls(text, row(0), row(1), row(-1), row(-1), row(0))


@dataclass
class StepTokens:
    """What a step feeds the model, flat over requests (T queries, each request's root first).

    tokens [T] int64; depths [T] int32 (0 is the root); branch_starts [T] int32 as in AttentionBatch;
    origins [T] int32: text index a drafted token was copied from, -1 for roots and padding;
    guesses [B] int32: text index of the best guess for the token after the root, -1 without one.
    """

    tokens: Tensor
    depths: Tensor
    branch_starts: Tensor
    origins: Tensor
    guesses: Tensor


def copy_draft(
    state: CopyState, slots: Tensor, query_starts: Tensor, num_queries: int, most: int = MAX_BRANCHES
) -> StepTokens:
    """Fills each request's queries: its root, then branches copied from its text.

    slots [B] int64, query_starts [B + 1] int32 with query_starts[-1] = `num_queries`. One branch while in step with the
    text; after a miss up to `most`, best guesses first, no two with the same first token: places whose last
    tokens agree with the output's (longest agreement, explicit sources and nearness first), and the place itself, as if
    one token had been replaced or inserted.
    """
    return implementation("copy_draft", state.text)(state, slots, query_starts, num_queries, most)


def num_branches(room: int, most: int) -> int:
    """Branches that `room` drafted tokens are divided among after a miss: at most `most`."""
    return max(1, min(most, room // BRANCH_TOKENS))


def reference(
    state: CopyState, slots: Tensor, query_starts: Tensor, num_queries: int, most: int = MAX_BRANCHES
) -> StepTokens:
    device = state.text.device
    tokens, depths, starts, origins, guesses = [], [], [], [], []
    bounds = query_starts.tolist()
    for index, slot in enumerate(slots.tolist()):
        room = bounds[index + 1] - bounds[index] - 1
        end, pointer = int(state.end[slot]), int(state.pointer[slot])
        text = state.text[slot, :end]
        wanted = 1 if pointer >= 0 else num_branches(room, most)
        places = [pointer] if 0 <= pointer < end else _places(text, end, state, slot, wanted)
        guesses.append(places[0] if places else -1)
        tokens.append(int(text[end - 1]))
        depths.append(0)
        starts.append(0)
        origins.append(-1)
        share = room // wanted
        for place in places if room else []:
            copied = _until_separator(text[place : place + share].tolist())
            first = len(tokens) - bounds[index]
            tokens += copied
            depths += range(1, len(copied) + 1)
            starts += [first] * len(copied)
            origins += range(place, place + len(copied))
        for padding in range(len(tokens) - bounds[index], room + 1):
            tokens.append(0)
            depths.append(1)
            starts.append(padding)
            origins.append(-1)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    assert len(tokens) == num_queries
    return StepTokens(torch.tensor(tokens, device=device), int32(depths), int32(starts), int32(origins), int32(guesses))


def _until_separator(copied: list[int]) -> list[int]:
    return copied[: copied.index(-1)] if -1 in copied else copied


def _places(text: Tensor, end: int, state: CopyState, slot: int, count: int) -> list[int]:
    """The `count` best text indices to continue from, each with another first token."""
    if end < 2:
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
    anchor, history = int(state.anchor[slot]), int(state.history_start[slot])
    score = agreement * _MATCH
    if anchor >= 0:
        distance = candidates - anchor
        near = torch.where(distance >= 0, _NEAR - distance // 16, _NEAR // 2 + distance // 8).clamp(min=0)
    else:
        near = candidates * (_NEAR // 2) // end
    score = torch.where(agreement > 0, score + near + _SOURCE * (candidates < history), 0)
    if 0 <= anchor < history:
        for place, value in ((anchor + 1, _SKIPPED), (anchor, _INSERTED)):
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
