"""The passes of a drafted tree: references against a definition in plain Python, and the kernels against the references."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.ops import beams, dispatch
from paceline.ops.beams import BeamLayout, Beams
from paceline.ops.draft import unpacked
from paceline.ops.join_drafts import Guesses
from paceline.ops.state import SlotState

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
PAGE = 4
VALUES = [-0.5, -1.0, -1.5, -3.0, 0.25, -math.inf, math.nan]  # so few that sums are often equal, and exact


def kernels() -> Any:
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from paceline.ops.triton import beams as found

    return found


def assert_same(found: Any, expected: Any, *but: str) -> None:
    for each in dataclasses.fields(expected):
        mine, theirs = getattr(found, each.name), getattr(expected, each.name)
        if each.name not in but:
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), each.name


# ------------------------------------------------------------------------------------------------------ the layout


def layout_case() -> tuple[SlotState, Tensor, Tensor]:
    """A state, slots, the last of which is a spare one, and a page table. Texts are 100 * slot + index."""
    state = SlotState.empty(4, 64, DEVICE)
    for slot, (source, length) in enumerate([(0, 20), (5, 3), (0, 1)]):
        state.text[slot, : source + length] = torch.arange(source + length, dtype=torch.int32) + 100 * slot
        state.history_start[slot], state.end[slot] = source, source + length
    return state, torch.tensor([2, 0, 1, 3], device=DEVICE), torch.randperm(4 * 16, device=DEVICE).int().view(4, 16)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_passes_lie_one_after_another(depth: int, width: int) -> None:
    state, slots, table = layout_case()
    found = beams.layout_reference(state, slots, table, depth, width, PAGE)
    contexts = [0, 19, 2, 0]
    assert found.roots.tolist() == [200, 19, 107, 0] and found.context_lens.tolist() == contexts
    assert found.first_positions.tolist() == [contexts, [each + 1 for each in contexts]]
    assert found.query_starts.tolist() == [[0, 1, 2, 3, 4], [each * width for each in range(5)]]
    assert found.slots.tolist() == [slot for slot in slots.tolist() for _ in range(width)]
    assert found.locations.shape == (depth, 4 * width) and found.positions.shape == (depth + 1, 4 * width)

    def location(request: int, place: int) -> int:
        return int(table[slots[request], place // PAGE]) * PAGE + place % PAGE

    assert found.first_locations.tolist() == [location(request, place) for request, place in enumerate(contexts)]
    for step in range(depth + 1):
        for request, context in enumerate(contexts):
            for beam in range(width):
                row = request * width + beam
                assert found.positions[step, row] == context + step
                if 0 < step < depth:
                    assert found.locations[step, row] == location(request, context + 1 + (step - 1) * width + beam)
    if torch.cuda.is_available() or INTERPRETED:
        mine = kernels().beam_layout(state, slots, table, depth, width, PAGE)
        assert_same(mine, found, "page_table", "locations")
        assert torch.equal(mine.locations[1:], found.locations[1:])
        for row, context in enumerate(contexts):
            pages = (context + (depth - 1) * width) // PAGE + 1
            assert torch.equal(mine.page_table[row, :pages], table[slots[row], :pages])


def test_the_batch_of_a_pass() -> None:
    state, slots, table = layout_case()
    layout = beams.beam_layout(state, slots, table, 4, 3, PAGE)
    assert isinstance(layout, BeamLayout)
    first = layout.batch(0, None, PAGE)
    assert first.positions.tolist() == first.context_lens.tolist() == [0, 19, 2, 0]
    assert first.max_query == 1 and first.hides_first and not first.branching and first.query_starts.tolist()[-1] == 4
    mask = torch.ones(12, 1, dtype=torch.int32, device=DEVICE)
    third = layout.batch(2, mask, PAGE)
    assert third.tree_mask is mask and third.max_query == 3 and third.num_before == 4
    assert third.hides_first and third.branching and third.query_starts.tolist() == [0, 3, 6, 9, 12]
    assert third.context_lens.tolist() == [0, 19, 2, 0] and third.positions[:4].tolist() == [2, 2, 2, 21]
    assert torch.equal(third.locations, layout.locations[2])


# -------------------------------------------------------------------------------------------------- the candidates


def empty_tree(requests: int, depth: int, kept: int) -> Guesses:
    shape = (requests, depth, kept)
    return Guesses(
        torch.full(shape, -7, device=DEVICE),
        torch.full(shape, 7.0, device=DEVICE),
        torch.full(shape, -7, dtype=torch.int32, device=DEVICE),
        torch.full(shape[:2], -7, dtype=torch.int32, device=DEVICE),
    )


def copied(guesses: Guesses) -> Guesses:
    return dataclasses.replace(
        guesses, **{each.name: getattr(guesses, each.name).clone() for each in dataclasses.fields(guesses)}
    )


def outputs(rows: int, ranks: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What a pass finds; some rows have no candidate."""
    logprobs = torch.tensor(VALUES)[torch.randint(len(VALUES), (rows, ranks))]
    logprobs[torch.rand(rows) < 0.2] = -math.inf
    tokens = torch.randint(1, 1000, (rows, ranks))
    return tokens.to(DEVICE), logprobs.to(DEVICE), torch.randn(rows, hidden).to(DEVICE, dtype)


class PlainTree:
    """The tree of one request in plain Python: the rows of the next pass as (score, own places seen, on the chain)."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: list[tuple[float, set[int], bool]] = [(0.0, {0}, True)]

    def check(self, guesses: Guesses, request: int, depth: int, found: Tensor, logprobs: Tensor) -> list[int]:
        """Compares the guesses of that pass. Advances to the next pass; the rows whose states its rows have."""
        nodes = []
        for row, (above, _, on_chain) in enumerate(self.rows):
            for rank in range(found.shape[1]):
                own = float(logprobs[row, rank])
                if above > -math.inf and own > -math.inf:
                    nodes.append((above + min(own, 0.0), row, rank, own, on_chain and rank == 0))
        nodes.sort(key=lambda node: -node[0])  # stable
        kept = guesses.tokens.shape[2]
        nodes = nodes[:kept]
        spare = kept - len(nodes)
        assert guesses.parents is not None and guesses.chain is not None
        assert guesses.tokens[request, depth].tolist() == [int(found[n[1], n[2]]) for n in nodes] + [0] * spare
        assert guesses.logprobs[request, depth].tolist() == [n[3] for n in nodes] + [-math.inf] * spare
        assert guesses.parents[request, depth].tolist() == [n[1] for n in nodes] + [0] * spare
        chain = [index for index, node in enumerate(nodes) if node[4]]
        assert guesses.chain[request, depth] == (chain[0] if chain else -1)
        nodes += [(-math.inf, 0, 0, 0.0, False)] * spare
        first = 1 + depth * self.width
        before, chosen = self.rows, nodes[: self.width]
        self.rows = [(n[0], before[n[1]][1] | {first + index}, n[4]) for index, n in enumerate(chosen)]
        return [node[1] for node in chosen]


def check_rows(tree: PlainTree, request: int, depth: int, rows: Beams, guesses: Guesses) -> None:
    assert rows.mask is not None
    first, last = request * tree.width, (request + 1) * tree.width
    assert rows.tokens[first:last].tolist() == guesses.tokens[request, depth, : tree.width].tolist()
    assert rows.scores[request].tolist() == [row[0] for row in tree.rows]
    seen = unpacked(rows.mask[first:last], rows.mask.shape[1] * 32)
    assert [set(each.nonzero()[:, 0].tolist()) for each in seen] == [row[1] for row in tree.rows]
    assert rows.chain[request] == next((index for index, row in enumerate(tree.rows) if row[2]), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "ranks", "kept", "depth"),
    [(1, 1, 2, 3), (1, 3, 2, 1), (2, 1, 4, 4), (2, 4, 2, 5), (3, 2, 8, 3), (3, 3, 5, 12), (4, 4, 8, 10), (4, 1, 6, 17)],
)
def test_the_best_candidates_are_kept_and_expanded(
    width: int, ranks: int, kept: int, depth: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(width * ranks * kept)
    requests, hidden = 6, 40
    for _ in range(3):
        trees = [PlainTree(width) for _ in range(requests)]
        guesses = empty_tree(requests, depth, kept)
        rows: Beams | None = None
        for step in range(depth):
            count = 1 if step == 0 else width
            following = width if step < depth - 1 else 0
            found, logprobs, states = outputs(requests * count, ranks, hidden, dtype)
            theirs = copied(guesses)
            given, rows = rows, beams.reference(guesses, step, found, logprobs, states, rows, following)
            assert (rows is None) == (following == 0)
            for request, tree in enumerate(trees):
                own = slice(request * count, (request + 1) * count)
                sources = tree.check(guesses, request, step, found[own], logprobs[own])
                if rows is not None:
                    assert rows.states is not None
                    check_rows(tree, request, step, rows, guesses)
                    assert torch.equal(rows.states[request * width : (request + 1) * width], states[own][sources])
            if torch.cuda.is_available() or INTERPRETED:
                mine = kernels().extend_beams(theirs, step, found, logprobs, states, given, following)
                assert_same(theirs, guesses)
                assert (mine is None) == (rows is None)
                if rows is not None:
                    assert_same(mine, rows)


@pytest.mark.parametrize(
    ("width", "ranks", "kept", "depth"), [(1, 2, 2, 3), (2, 4, 4, 5), (3, 3, 6, 10), (4, 4, 8, 12)]
)
def test_the_tree_is_the_same_without_states(width: int, ranks: int, kept: int, depth: int) -> None:
    torch.manual_seed(width)
    implementations = [beams.reference]
    if torch.cuda.is_available() or INTERPRETED:
        implementations.append(kernels().extend_beams)
    for implementation in implementations:
        guesses, expected = empty_tree(5, depth, kept), empty_tree(5, depth, kept)
        rows: Beams | None = None
        theirs: Beams | None = None
        for step in range(depth):
            following = width if step < depth - 1 else 0
            found, logprobs, states = outputs(5 * (width if step else 1), ranks, 8, torch.float32)
            theirs = beams.reference(expected, step, found, logprobs, states, theirs, following)
            rows = implementation(guesses, step, found, logprobs, None, rows, following)
            if theirs is not None:
                assert rows is not None and rows.states is None and rows.mask is None
                assert_same(rows, theirs, "states", "mask")
        assert rows is None
        assert_same(guesses, expected)


@pytest.mark.parametrize("hidden", [1, 2048, 3000, 8192])
def test_states_of_any_size_are_copied(hidden: int) -> None:
    found, logprobs, states = outputs(2, 4, hidden, torch.bfloat16)
    expected = beams.reference(empty_tree(2, 3, 4), 0, found, logprobs, states, None, 3)
    assert expected is not None and expected.states is not None
    assert torch.equal(expected.states, states.repeat_interleave(3, 0))
    assert_same(kernels().extend_beams(empty_tree(2, 3, 4), 0, found, logprobs, states, None, 3), expected)


def test_the_operations_are_in_the_table() -> None:
    for op in ("beam_layout", "extend_beams"):
        assert dispatch.chosen(op, "cuda") == f"paceline.ops.triton.beams:{op}"
        assert dispatch.chosen(op, "cpu").startswith("paceline.ops.beams:")
    found, logprobs, states = outputs(1, 2, 8, torch.float32)
    guesses = empty_tree(1, 2, 2)
    assert beams.extend_beams(guesses, 0, found, logprobs, states, None, 2) is not None
