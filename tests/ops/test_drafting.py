"""The copy drafter and acceptance: their torch definitions by example, the kernels against them where there is a GPU.

With TRITON_INTERPRET=1 the kernels run on a CPU too (`pip install triton`), which is how they can be checked without one.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from paceline.ops import layout
from paceline.ops.accept import HEADER, accept_reference, compact_reference
from paceline.ops.copy_draft import CopyState, StepTokens, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="no GPU, and TRITON_INTERPRET is not set"
)


def state_of(sources: list[list[int]], history: list[int], pointer: int = -1, anchor: int = -1) -> CopyState:
    state = CopyState.empty(2, 512, torch.device("cpu"))
    text = [token for source in sources for token in [*source, -1]]
    start = len(text)
    text += history
    state.text[0, : len(text)] = torch.tensor(text, dtype=torch.int32)
    state.history_start[0], state.end[0] = start, len(text)
    state.pointer[0], state.anchor[0] = pointer, anchor
    return state


def draft(state: CopyState, room: int) -> StepTokens:
    return reference(state, torch.tensor([0]), torch.tensor([0, room + 1], dtype=torch.int32), room + 1)


def test_in_step_the_draft_is_the_source() -> None:
    step = draft(state_of([[10, 11, 12, 13]], [1, 2], pointer=1), 3)
    assert step.tokens.tolist() == [2, 11, 12, 13]
    assert step.depths.tolist() == [0, 1, 2, 3] and step.branch_starts.tolist() == [0, 1, 1, 1]


def test_a_draft_stops_at_the_end_of_its_source() -> None:
    step = draft(state_of([[10, 11, 12]], [1, 2], pointer=1), 5)
    assert step.origins.tolist() == [-1, 1, 2, -1, -1, -1]
    assert step.branch_starts.tolist() == [0, 1, 1, 3, 4, 5], "padding must see no drafted token"


def test_after_a_miss_it_tries_skipped_and_repeated_lines_as_branches() -> None:
    source = list(range(100, 160))
    history = [1, 2, *source[:10], source[30]]
    step = draft(state_of([source], history, anchor=10), 64)
    firsts = [step.tokens[i].item() for i in range(1, 65) if step.branch_starts[i] == i and step.origins[i] >= 0]
    assert firsts[0] == source[31], "the skipped-to line comes first"
    assert source[11] in firsts and source[10] in firsts, "then a replaced and an inserted token"
    assert len(set(firsts)) == len(firsts)


def test_longer_agreement_wins() -> None:
    history = [5, 6, 7, 50, 8, 9, 7, 60, 5, 6, 7]
    step = draft(state_of([], history), 1)
    assert step.tokens.tolist() == [7, 50]


def test_accept_takes_the_longest_branch_and_the_choice_after_it() -> None:
    state = state_of([list(range(100, 160))], [1, 2, 3], anchor=0)
    step = StepTokens(
        torch.tensor([3, 7, 8, 100, 101, 102]),
        torch.tensor([0, 1, 2, 1, 2, 3], dtype=torch.int32),
        torch.tensor([0, 1, 1, 3, 3, 3], dtype=torch.int32),
        torch.tensor([-1, 62, 63, 0, 1, 2], dtype=torch.int32),
        torch.tensor([62], dtype=torch.int32),
    )
    choices = torch.tensor([100, 9, 9, 101, 102, 103])
    result = accept_reference(state, torch.tensor([0]), torch.tensor([0, 6], dtype=torch.int32), step, choices, None, 6)
    new, drafted, first, streak, hit, near, told, taken = result[0, :HEADER].tolist()
    assert result[0, HEADER : HEADER + new].tolist() == [100, 101, 102, 103]
    assert (drafted, first, hit, near) == (5, 3, 0, 0) and streak == 4
    assert (told, taken) == (3, 3)
    assert state.pointer[0] == 4 and state.end[0] == 61 + 3 + 4


def test_a_margin_counts_only_on_an_explicit_source() -> None:
    for pointer, expected in ((0, [100, 101, 55]), (-1, [44])):
        state = state_of([list(range(100, 110))], [1, 2, 3], pointer=pointer, anchor=0)
        step = draft(state, 2)
        if pointer < 0:
            step.tokens[1:], step.origins[1:] = torch.tensor([100, 101]), torch.tensor([0, 1], dtype=torch.int32)
        near = torch.tensor([False, True, True])
        starts = torch.tensor([0, 3], dtype=torch.int32)
        choices = torch.tensor([44, 101, 55])
        result = accept_reference(state, torch.tensor([0]), starts, step, choices, near, 3)
        assert result[0, HEADER : HEADER + result[0, 0]].tolist() == expected


def test_compact_puts_the_branch_where_plain_decoding_would() -> None:
    data = torch.arange(2 * 2 * 32 * 1 * 2, dtype=torch.float32).view(2, 2, 32, 1, 2)
    before = data.clone()
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    accepted = torch.tensor([[4, 6, 3, 0, 0, 0, 0, 0]], dtype=torch.int32)
    compact_reference(data, table, torch.tensor([5], dtype=torch.int32), accepted, 8)
    slot = lambda place: int(table[0, place // 8]) * 8 + place % 8  # noqa: E731
    for offset in range(3):
        assert torch.equal(data[:, :, slot(6 + offset)], before[:, :, slot(8 + offset)])


def random_state(draw: random.Random, requests: int, device: str) -> CopyState:
    state = CopyState.empty(requests + 1, 9000, torch.device("cpu"))
    for slot in range(requests):
        vocabulary = draw.choice([3, 8, 200])
        size = draw.choice([3, 40, 700, 4090, 6000])
        sources = [draw.randrange(vocabulary) for _ in range(size)]
        sources[draw.randrange(size)] = -1
        sources[-1] = -1
        history = [draw.randrange(vocabulary) for _ in range(draw.choice([1, 2, 30, 300]))]
        if draw.random() < 0.5 and size > 40:
            history += sources[5:25]
            history = [max(token, 0) for token in history]
        text = sources + history
        state.text[slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
        state.history_start[slot], state.end[slot] = size, len(text)
        state.pointer[slot] = draw.choice([-1, -1, draw.randrange(len(text))])
        state.anchor[slot] = draw.choice([-1, draw.randrange(len(text))])
        state.streak[slot] = draw.randrange(40) * (state.pointer[slot] >= 0)
    for name in ("text", "history_start", "end", "pointer", "anchor", "streak"):
        setattr(state, name, getattr(state, name).to(device))
    return state


def copied(state: CopyState, device: str) -> CopyState:
    names = ("text", "history_start", "end", "pointer", "anchor", "streak")
    return CopyState(*(getattr(state, name).clone().to(device) for name in names))


@needs_kernels
@pytest.mark.parametrize("room", [0, 1, 8, 16, 32, 64, 128, 256])
def test_kernels_equal_the_reference(room: int) -> None:
    from paceline.ops.triton import drafting as kernels

    draw = random.Random(room)
    for _ in range(4 if INTERPRETED else 40):
        requests = draw.choice([1, 3])
        state = random_state(draw, requests, DEVICE)
        slots = torch.tensor(draw.sample(range(requests + 1), requests), device=DEVICE)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * (room + 1)
        total = requests * (room + 1)
        plain = copied(state, "cpu")
        wanted = reference(plain, slots.cpu(), starts.cpu(), total)
        found = kernels.copy_draft(state, slots, starts, total)
        for name in ("tokens", "depths", "branch_starts", "origins", "guesses"):
            assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name
        pages = torch.randint(1, 900, (requests + 1, 640), dtype=torch.int32)
        laid = layout.reference(plain, slots.cpu(), starts.cpu(), wanted, pages, 16, room + 1)
        mine = kernels.decode_layout(state, slots, starts, found, pages.to(DEVICE), 16, room + 1)
        for name in ("positions", "slots", "context_lens"):
            assert torch.equal(getattr(mine, name).cpu(), getattr(laid, name)), name
        choices = torch.where(torch.rand(total) < 0.9, wanted.tokens.roll(-1), torch.randint(0, 5, (total,))).clamp(
            min=0
        )
        for request in range(requests):  # let some branch be right from its first token
            base = request * (room + 1)
            opens = [i for i in range(1, room + 1) if wanted.branch_starts[base + i] == i]
            if opens:
                choices[base] = wanted.tokens[base + draw.choice(opens)]
        near = (torch.rand(total) < 0.2) if draw.random() < 0.5 else None
        expected = accept_reference(plain, slots.cpu(), starts.cpu(), wanted, choices, near, room + 1)
        moved = None if near is None else near.to(DEVICE)
        result = kernels.accept(state, slots, starts, found, choices.to(DEVICE), moved, room + 1).cpu()
        for row in range(requests):
            used = HEADER + int(expected[row, 0])
            assert torch.equal(result[row, :used], expected[row, :used])
        for name in ("text", "end", "pointer", "anchor", "streak"):
            assert torch.equal(getattr(state, name).cpu(), getattr(plain, name)), name


@needs_kernels
def test_compact_kernel_equals_the_reference() -> None:
    from paceline.ops.triton import drafting as kernels

    draw = random.Random(0)
    for _ in range(5):
        data = torch.randn(3, 2, 64 * 16, 2, 24)
        table = torch.stack([torch.randperm(63)[:30] + 1 for _ in range(1)]).int()
        first, new = draw.randrange(0, 100), draw.randrange(1, 120)
        accepted = torch.tensor([[new, 0, first, 0, 0, 0, 0]], dtype=torch.int32)
        context = torch.tensor([draw.randrange(0, 200)], dtype=torch.int32)
        mine = data.clone().to(DEVICE)
        kernels.compact(mine, table.to(DEVICE), context.to(DEVICE), accepted.to(DEVICE), 16)
        compact_reference(data, table, context, accepted, 16)
        assert torch.equal(mine.cpu(), data)
