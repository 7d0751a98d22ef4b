"""Where the passes of a trained drafter lie: by hand, and the kernels against the references."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.ops import chain_layout
from paceline.ops.chain_layout import BlockLayout
from paceline.ops.draft import Draft
from paceline.ops.layout import owners
from paceline.ops.layout import reference as decode_layout
from paceline.ops.state import SlotState

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
PAGE, MASK_TOKEN = 4, 77


def kernels() -> Any:
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from paceline.ops.triton import chain_layout as found

    return found


def state_of(sources: list[int], lengths: list[int]) -> SlotState:
    """Slots whose texts are 100 * slot + index, with that many source tokens before their own."""
    state = SlotState.empty(len(lengths) + 1, 64, DEVICE)
    for slot, (source, length) in enumerate(zip(sources, lengths, strict=True)):
        state.text[slot, : source + length] = torch.arange(source + length, dtype=torch.int32) + 100 * slot
        state.history_start[slot], state.end[slot] = source, source + length
    return state


def test_each_pass_is_one_place_on() -> None:
    state = state_of([0, 7], [6, 1])
    table = torch.arange(3 * 16, dtype=torch.int32, device=DEVICE).view(3, 16)
    layout = chain_layout.reference(state, torch.tensor([1, 0], device=DEVICE), table, 3, PAGE)
    assert layout.roots.tolist() == [107, 5]
    assert layout.positions.tolist() == [[0, 5], [1, 6], [2, 7], [3, 8]]
    assert layout.locations.tolist() == [[64, 5], [65, 6], [66, 7]]
    batch = layout.batch(2, PAGE)
    assert batch.context_lens.tolist() == [2, 7] and batch.query_starts.tolist() == [0, 1, 2]


def many() -> tuple[SlotState, Tensor, Tensor]:
    """A state, slots, the last of which is a spare one, and a page table."""
    state = state_of([0, 5, 0], [20, 3, 1])
    state.end[3] = 1
    return state, torch.tensor([2, 0, 1, 3], device=DEVICE), torch.randperm(4 * 16, device=DEVICE).int().view(4, 16)


@pytest.mark.parametrize("count", [1, 7])
def test_the_kernel_of_chains_equals_the_reference(count: int) -> None:
    state, slots, table = many()
    expected = chain_layout.reference(state, slots, table, count, PAGE)
    found = kernels().chain_layout(state, slots, table, count, PAGE)
    assert_same(found, expected, expected.positions[-1])


@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [1, 1, 1, 1], [40, 40, 40, 40], [2, 0, 5, 1]])
def test_a_block_is_a_step_of_roots_and_mask_tokens(counts: list[int]) -> None:
    state, slots, table = many()
    starts = torch.tensor([0, *counts], device=DEVICE).cumsum(0, dtype=torch.int32)
    uniform, most = len(set(counts)) == 1, max(counts)
    given = None if uniform else starts
    found = chain_layout.block_reference(state, slots, table, most, MASK_TOKEN, PAGE, given)
    owner = owners(starts, sum(counts))
    depths = torch.arange(sum(counts), dtype=torch.int32, device=DEVICE) - starts[owner]
    roots = state.text[slots, state.end[slots].long() - 1].long()
    tokens = torch.where(depths == 0, roots[owner], MASK_TOKEN)
    zeros = torch.zeros_like(depths)
    batch = decode_layout(state, slots, starts, Draft(tokens, depths, zeros, branch_starts=zeros), table, PAGE, most)
    if most > 1:
        batch.tree_mask = torch.full((sum(counts), -(-most // 32)), -1, dtype=torch.int32, device=DEVICE)
        for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
            assert batch.visible(first, last).all()
    positions = torch.stack([batch.context_lens + 1 + step for step in range(most)]).long()
    assert_same(found, BlockLayout(roots, tokens, positions, batch), positions[-1])
    if uniform:
        mine = kernels().block_layout(state, slots, table, most, MASK_TOKEN, PAGE)
        assert_same(mine, found, positions[-1])


def assert_same(found: Any, expected: Any, ends: Tensor) -> None:
    """Equal in all fields but those that are not read: pages of places from `ends` [B] on, and branches beside a tree."""
    for each in dataclasses.fields(expected):
        mine, theirs = getattr(found, each.name), getattr(expected, each.name)
        if each.name == "page_table":
            for row, end in enumerate(((ends - 1) // PAGE + 1).tolist()):
                assert torch.equal(mine[row, :end], theirs[row, :end])
        elif dataclasses.is_dataclass(theirs):
            assert_same(mine, theirs, ends)
        elif not isinstance(theirs, Tensor):
            assert mine == theirs, each.name
        elif each.name != "branch_starts":
            assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), each.name
