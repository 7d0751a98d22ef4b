"""The copy drafter and verification: their torch definitions by example, the kernels against them where there is a GPU.

With TRITON_INTERPRET=1 the kernels run on a CPU too (`pip install triton`), which is how they can be checked without one.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from paceline.ops import copy_draft, layout, move, verify
from paceline.ops.copy_draft import CopyDraft, CopyState
from paceline.ops.draft import DRAFTED, FROM_SOURCE, LENIENT, Draft
from paceline.ops.state import SlotState
from paceline.ops.verify import HEADER, Verified

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="no GPU, and TRITON_INTERPRET is not set"
)


ONE = torch.tensor([0])
STATE = ("text", "history_start", "end")
COPY = ("pointer", "anchor", "streak")


def state_of(
    sources: list[list[int]], history: list[int], pointer: int = -1, anchor: int = -1
) -> tuple[SlotState, CopyState]:
    state, copy = SlotState.empty(2, 512, torch.device("cpu")), CopyState.empty(2, torch.device("cpu"))
    text = [token for source in sources for token in [*source, -1]]
    start = len(text)
    text += history
    state.text[0, : len(text)] = torch.tensor(text, dtype=torch.int32)
    state.history_start[0], state.end[0] = start, len(text)
    copy.pointer[0], copy.anchor[0] = pointer, anchor
    return state, copy


def draft(states: tuple[SlotState, CopyState], room: int) -> CopyDraft:
    return copy_draft.reference(*states, ONE, starts_of(room + 1), room + 1)


def starts_of(count: int) -> torch.Tensor:
    return torch.tensor([0, count], dtype=torch.int32)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def accepted(
    states: tuple[SlotState, CopyState], step: CopyDraft, choices: list[int], lenient: torch.Tensor | None = None
) -> Verified:
    """Verification, and what the copy drafter sees of it."""
    count, (state, copy) = len(step.tokens), states
    verified = verify.reference(state, ONE, starts_of(count), step, torch.tensor(choices), lenient, count)
    copy_draft.observe_reference(state, copy, ONE, starts_of(count), step, verified)
    return verified


def test_in_step_the_draft_is_the_source() -> None:
    step = draft(state_of([[10, 11, 12, 13]], [1, 2], pointer=1), 3)
    assert step.tokens.tolist() == [2, 11, 12, 13]
    assert step.depths.tolist() == [0, 1, 2, 3] and step.branch_starts.tolist() == [0, 1, 1, 1]


def test_a_draft_stops_at_the_end_of_its_source() -> None:
    step = draft(state_of([[10, 11, 12]], [1, 2], pointer=1), 5)
    assert step.origins.tolist() == [-1, 1, 2, -1, -1, -1]
    assert step.branch_starts is not None and step.branch_starts.tolist() == [0, 1, 1, 3, 4, 5], (
        "padding must see no drafted token"
    )


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


def test_the_longest_branch_is_accepted_and_the_choice_after_it() -> None:
    state, copy = state_of([list(range(100, 160))], [1, 2, 3], anchor=0)
    step = CopyDraft(
        torch.tensor([3, 7, 8, 100, 101, 102]),
        int32(0, 1, 2, 1, 2, 3),
        int32(0, *[DRAFTED] * 2, *[DRAFTED | FROM_SOURCE] * 3),
        branch_starts=int32(0, 1, 1, 3, 3, 3),
        origins=int32(-1, 62, 63, 0, 1, 2),
        guesses=int32(62),
    )
    verified = accepted((state, copy), step, [100, 9, 9, 101, 102, 103])
    new, drafted, source_drafted, source_accepted, margin, streak, guess, *_ = verified.result[0, :HEADER].tolist()
    assert verified.result[0, HEADER : HEADER + new].tolist() == [100, 101, 102, 103]
    assert verified.path[0, : new - 1].tolist() == [3, 4, 5]
    assert (drafted, guess, margin) == (5, 0, 0) and streak == 4
    assert (source_drafted, source_accepted) == (3, 3)
    assert copy.pointer[0] == 4 and state.end[0] == 61 + 3 + 4


def test_a_margin_counts_only_on_an_explicit_source() -> None:
    for pointer, expected in ((0, [100, 101, 55]), (-1, [44])):
        states = state_of([list(range(100, 110))], [1, 2, 3], pointer=pointer, anchor=0)
        step = draft(states, 2)
        if pointer < 0:
            step.tokens[1:], step.origins[1:] = torch.tensor([100, 101]), int32(0, 1)
            step.marks[1:] = DRAFTED | FROM_SOURCE
        verified = accepted(states, step, [44, 101, 55], torch.tensor([False, True, True]))
        assert verified.result[0, HEADER : HEADER + verified.result[0, 0]].tolist() == expected
        assert verified.result[0, verify.MARGIN_ACCEPTED] == len(expected) // 2


def test_the_deepest_path_of_a_tree_is_accepted() -> None:
    """Two tokens share a parent below the root; the choices lead down the second, past a node that is no draft."""
    state, _ = state_of([], [1, 2, 3])
    tree = Draft(
        torch.tensor([3, 10, 20, 30, 40, 50, 60, 0]),
        int32(0, 1, 2, 2, 1, 3, 4, 1),
        int32(0, *[DRAFTED] * 6, 0),
        parents=int32(0, 0, 1, 1, 0, 3, 5, 0),
    )
    choices = torch.tensor([10, 30, 99, 50, 99, 77, 99, 99])
    verified = verify.reference(state, ONE, starts_of(8), tree, choices, None, 8)
    assert verified.result[0, : HEADER + 4].tolist() == [4, 6, 0, 0, 0, 3, 1, 0, 0, 10, 30, 50, 77]
    assert verified.path[0, :3].tolist() == [1, 3, 5]
    assert state.text[0, 2:7].tolist() == [3, 10, 30, 50, 77] and state.end[0] == 7
    choices[0] = 0  # equals the padding's token
    again = verify.reference(state, ONE, starts_of(8), tree, choices, None, 8)
    assert again.result[0, :1].tolist() == [1] and again.result[0, HEADER] == 0


def test_accepted_rows_move_to_where_plain_decoding_would_put_them() -> None:
    data = torch.arange(2 * 2 * 32 * 1 * 2, dtype=torch.float32).view(4, 32, 2)
    before = data.clone()
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    move.reference(data, table, int32(5), int32(4), torch.tensor([[3, 4, 5, 0, 0, 0]], dtype=torch.int32), 8)
    location = lambda place: int(table[0, place // 8]) * 8 + place % 8  # noqa: E731
    for offset in range(3):
        assert torch.equal(data[:, location(6 + offset)], before[:, location(8 + offset)])


def random_state(draw: random.Random, requests: int) -> tuple[SlotState, CopyState]:
    state = SlotState.empty(requests + 1, 9000, torch.device("cpu"))
    copy = CopyState.empty(requests + 1, torch.device("cpu"))
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
        copy.pointer[slot] = draw.choice([-1, -1, draw.randrange(len(text))])
        copy.anchor[slot] = draw.choice([-1, draw.randrange(len(text))])
        copy.streak[slot] = draw.randrange(40) * (copy.pointer[slot] >= 0)
    return state, copy


def on_device(state: SlotState, copy: CopyState) -> tuple[SlotState, CopyState]:
    return (
        SlotState(*(getattr(state, name).clone().to(DEVICE) for name in STATE)),
        CopyState(*(getattr(copy, name).clone().to(DEVICE) for name in COPY)),
    )


def same(found: object, wanted: object, names: tuple[str, ...]) -> None:
    for name in names:
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


def same_result(found: Verified, wanted: Verified) -> None:
    for row, count in enumerate(wanted.counts.tolist()):
        assert torch.equal(found.result[row, : HEADER + count].cpu(), wanted.result[row, : HEADER + count])
        assert torch.equal(found.path[row, : count - 1].cpu(), wanted.path[row, : count - 1])


@needs_kernels
@pytest.mark.parametrize("room", [0, 1, 8, 16, 32, 64, 128, 256])
def test_kernels_equal_the_reference(room: int) -> None:
    from paceline.ops.triton import copy_draft as copy_kernels
    from paceline.ops.triton import layout as layout_kernels
    from paceline.ops.triton import verify as verify_kernels

    draw = random.Random(room)
    for _ in range(4 if INTERPRETED else 40):
        requests = draw.choice([1, 3])
        state, copy = random_state(draw, requests)
        mine, my_copy = on_device(state, copy)
        slots = torch.tensor(draw.sample(range(requests + 1), requests))
        starts = torch.arange(requests + 1, dtype=torch.int32) * (room + 1)
        my_slots, my_starts = slots.to(DEVICE), starts.to(DEVICE)
        total = requests * (room + 1)
        wanted = copy_draft.reference(state, copy, slots, starts, total)
        found = copy_kernels.copy_draft(mine, my_copy, my_slots, my_starts, total)
        same(found, wanted, ("tokens", "depths", "marks", "branch_starts", "origins", "guesses"))
        nothing = CopyState.empty(requests + 1, torch.device("cpu"))
        roots = copy_draft.reference(state, nothing, slots, starts, total, 0)
        assert roots.marks.max() == 0 and roots.guesses.max() == -1
        mine_alone = copy_kernels.copy_draft(mine, on_device(state, nothing)[1], my_slots, my_starts, total, 0)
        same(mine_alone, roots, ("tokens", "depths", "marks", "branch_starts", "origins", "guesses"))
        pages = torch.randint(1, 900, (requests + 1, 640), dtype=torch.int32)
        laid = layout.reference(state, slots, starts, wanted, pages, 16, room + 1)
        my_layout = layout_kernels.decode_layout(mine, my_slots, my_starts, found, pages.to(DEVICE), 16, room + 1)
        same(my_layout, laid, ("positions", "locations", "context_lens"))
        choices = torch.where(torch.rand(total) < 0.9, wanted.tokens.roll(-1), torch.randint(0, 5, (total,))).clamp(
            min=0
        )
        assert wanted.branch_starts is not None
        for request in range(requests):  # let some branch be right from its first token
            base = request * (room + 1)
            opens = [i for i in range(1, room + 1) if wanted.branch_starts[base + i] == i]
            if opens:
                choices[base] = wanted.tokens[base + draw.choice(opens)]
        lenient = (torch.rand(total) < 0.2) if draw.random() < 0.5 else None
        expected = verify.reference(state, slots, starts, wanted, choices, lenient, room + 1)
        my_lenient = None if lenient is None else lenient.to(DEVICE)
        result = verify_kernels.verify(mine, my_slots, my_starts, found, choices.to(DEVICE), my_lenient, room + 1)
        same_result(result, expected)
        copy_draft.observe_reference(state, copy, slots, starts, wanted, expected)
        copy_kernels.copy_observe(mine, my_copy, my_slots, my_starts, found, result)
        same_result(result, expected)
        same(mine, state, STATE)
        same(my_copy, copy, COPY)


@needs_kernels
@pytest.mark.parametrize("count", [2, 9, 33, 65, 257])
def test_the_verification_kernel_equals_the_reference_on_trees(count: int) -> None:
    from paceline.ops.triton import verify as kernels

    draw = random.Random(count)
    for _ in range(4 if INTERPRETED else 40):
        state, copy = random_state(draw, 2)
        mine, _ = on_device(state, copy)
        reach = draw.choice([1, 3, count])  # 1: a chain
        parents, depths = [], []
        for _ in range(2):
            own = [0, *(max(0, query - 1 - draw.randrange(reach)) for query in range(1, count))]
            depth = [0]
            for parent in own[1:]:
                depth.append(depth[parent] + 1)
            parents += own
            depths += depth
        tokens = torch.randint(0, 3, (2 * count,))
        marks = torch.tensor([draw.choice([0, DRAFTED, *[DRAFTED | FROM_SOURCE | LENIENT] * 20]) for _ in parents])
        marks[::count] = 0
        tree = Draft(tokens, int32(*depths), marks.int(), parents=int32(*parents))
        starts, slots = int32(0, count, 2 * count), torch.tensor([1, 2])
        choices = torch.randint(0, 3, (2 * count,))
        for row in range(2 * count):  # most choices lead to a child
            children = [each for each in range(1, count) if parents[row // count * count + each] == row % count]
            if children and draw.random() < 0.9:
                choices[row] = tokens[row // count * count + draw.choice(children)]
        lenient = torch.rand(2 * count) < 0.2
        expected = verify.reference(state, slots, starts, tree, choices, lenient, count)
        moved = Draft(
            tokens.to(DEVICE), tree.depths.to(DEVICE), tree.marks.to(DEVICE), parents=int32(*parents).to(DEVICE)
        )
        result = kernels.verify(
            mine, slots.to(DEVICE), starts.to(DEVICE), moved, choices.to(DEVICE), lenient.to(DEVICE), count
        )
        same_result(result, expected)
        same(mine, state, STATE)


@needs_kernels
def test_the_move_kernel_equals_the_reference() -> None:
    from paceline.ops.triton import move as kernels

    draw = random.Random(0)
    for _ in range(5):
        data = torch.randn(6, 64 * 16, 2 * 24)
        table = torch.stack([torch.randperm(63)[:30] + 1 for _ in range(1)]).int()
        new = draw.randrange(1, 120)
        path = torch.tensor([sorted(draw.sample(range(1, 200), new))], dtype=torch.int32)
        context = torch.tensor([draw.randrange(0, 200)], dtype=torch.int32)
        counts = torch.tensor([[new, 0]], dtype=torch.int32)[:, 0]
        mine = data.clone().to(DEVICE)
        kernels.move_rows(mine, table.to(DEVICE), context.to(DEVICE), counts.to(DEVICE), path.to(DEVICE), 16)
        move.reference(data, table, context, counts, path, 16)
        assert torch.equal(mine.cpu(), data)
