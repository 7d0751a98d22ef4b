"""Acceptance: compares a step's drafts with the target's choices and moves every request on, without the host."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops.copy_draft import MATCH_LIMIT, CopyState, StepTokens
from paceline.ops.dispatch import implementation

HEADER = 8  # columns of the result before the tokens: new, drafted, first, in_step, hit, near, told, taken


def accept(
    state: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    step: StepTokens,
    choices: Tensor,
    near: Tensor | None,
    width: int,
) -> Tensor:
    """Takes, per request, the branch with the most tokens that the target would have chosen, and the choice after it.

    choices [T] int64: the target's token after each query. `near` [T] bool, or None: drafted tokens to take though they
    are not the choice (a declared margin); heeded only on the branch in step with an explicit source.
    Appends the new tokens to the text, moves end, pointer, anchor and streak, and returns [B, HEADER + width] int32:
    new tokens (accepted + 1), drafted tokens, query index of the first accepted (0: none), the streak after the step
    (0: out of step), 1 where the best guess was the choice (drafted or not), tokens taken by `near`, tokens drafted from
    explicit sources and how many of them were accepted; then the tokens.
    `width` is the most queries a request has. The last slot is spare: it pads a step's shape and never moves.
    """
    return implementation("accept", state.text)(state, slots, query_starts, step, choices, near, width)


def compact(data: Tensor, page_table: Tensor, context_lens: Tensor, accepted: Tensor, page_size: int) -> None:
    """Moves the accepted branch's keys and values to where plain decoding would have put them.

    data [layers, 2, slots, kv_heads, dim]; accepted [B, HEADER + width] from `accept`; context_lens [B] before the step.
    """
    implementation("compact", data)(data, page_table, context_lens, accepted, page_size)


def accept_reference(
    state: CopyState,
    slots: Tensor,
    query_starts: Tensor,
    step: StepTokens,
    choices: Tensor,
    near: Tensor | None,
    width: int,
) -> Tensor:
    bounds = query_starts.tolist()
    result = torch.zeros(len(slots), HEADER + width, dtype=torch.int32)
    chosen, tokens, starts, origins = (
        each.tolist() for each in (choices, step.tokens, step.branch_starts, step.origins)
    )
    taken_near = near.tolist() if near is not None else [False] * len(tokens)
    for index, slot in enumerate(slots.tolist()):
        first, last = bounds[index], bounds[index + 1]
        end, pointer = int(state.end[slot]), int(state.pointer[slot])
        follows = 0 <= pointer < int(state.history_start[slot])
        best_length, best_start, best_near = 0, 0, 0
        length = nears = 0
        alive = False
        for query in range(first + 1, last):
            opens = query - first == starts[query]
            parent = first if opens else query - 1
            if opens:
                length = nears = 0
                alive = True
            equal = chosen[parent] == tokens[query]
            alive = alive and origins[query] >= 0 and (equal or (follows and taken_near[query]))
            if alive:
                length, nears = length + 1, nears + (not equal)
            if length > best_length:
                best_length, best_start, best_near = length, starts[query], nears
        final = first + best_start + best_length - 1 if best_length else first
        new = [*tokens[first + best_start : final + 1], chosen[final]] if best_length else [chosen[first]]
        guess = int(step.guesses[index])
        expected = origins[final] + 1 if best_length else guess
        hit = guess >= 0 and int(state.text[slot, guess]) == new[0]
        in_step = 0 <= expected < end and int(state.text[slot, expected]) == new[-1]
        before = int(state.streak[slot]) if pointer >= 0 else _agreement(state.text[slot], end, expected - best_length)
        streak = before + len(new) if in_step else 0
        drafted = sum(origin >= 0 for origin in origins[first:last])
        told = [0 <= origin < int(state.history_start[slot]) for origin in origins[first:last]]
        taken = sum(told[best_start : best_start + best_length]) if best_length else 0
        header = [len(new), drafted, best_start, streak, int(hit), best_near, sum(told), taken]
        result[index, : HEADER + len(new)] = torch.tensor(header + new, dtype=torch.int32)
        if slot == len(state.end) - 1:
            continue
        state.text[slot, end : end + len(new)] = torch.tensor(new, dtype=torch.int32)
        state.end[slot] = end + len(new)
        state.pointer[slot] = expected + 1 if in_step else -1
        if not in_step and (best_length or pointer >= 0):
            state.anchor[slot] = expected
        state.streak[slot] = streak
    return result


def _agreement(text: Tensor, end: int, place: int) -> int:
    """How many tokens before `place` equal those before `end`, up to MATCH_LIMIT."""
    length = 0
    while length < MATCH_LIMIT and length < place and int(text[place - 1 - length]) == int(text[end - 1 - length]) >= 0:
        length += 1
    return length


def compact_reference(data: Tensor, page_table: Tensor, context_lens: Tensor, accepted: Tensor, page_size: int) -> None:
    for index, (new, _, first) in enumerate(accepted[:, :3].tolist()):
        if first <= 1 or new <= 1:
            continue
        offsets = torch.arange(new - 1, device=data.device)
        base = int(context_lens[index])
        source = _slot(page_table[index], base + first + offsets, page_size)
        target = _slot(page_table[index], base + 1 + offsets, page_size)
        data[:, :, target] = data[:, :, source]


def _slot(page_row: Tensor, positions: Tensor, page_size: int) -> Tensor:
    return page_row[positions // page_size].long() * page_size + positions % page_size
