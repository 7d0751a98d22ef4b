"""Where the passes of a trained drafter lie: by hand, and the kernel against the reference."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from paceline.ops import candidates, chain_layout
from paceline.ops.state import SlotState

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
PAGE = 4


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


@pytest.mark.parametrize("count", [1, 7])
def test_the_kernel_equals_the_reference(count: int) -> None:
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from paceline.ops.triton import chain_layout as kernels

    state = state_of([0, 5, 0], [20, 3, 1])
    table = torch.randperm(4 * 16, device=DEVICE).int().view(4, 16)
    slots = torch.tensor([2, 0, 1, 3], device=DEVICE)
    expected = chain_layout.reference(state, slots, table, count, PAGE)
    found = kernels.chain_layout(state, slots, table, count, PAGE)
    for each in dataclasses.fields(expected):
        mine, theirs = getattr(found, each.name), getattr(expected, each.name)
        if each.name == "page_table":
            for row, end in enumerate((expected.positions[-1] // PAGE + 1).tolist()):
                assert torch.equal(mine[row, :end], theirs[row, :end])
        else:
            assert torch.equal(mine, theirs), each.name


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_drawn_token_comes_first_and_the_others_keep_their_order(width: int) -> None:
    found = torch.tensor([[4, 7, 2, 9], [1, 2, 3, 4], [8, 6, 5, 0]], device=DEVICE)[:, :width].contiguous()
    drawn = torch.tensor([2, 1, 9], device=DEVICE)
    ids = torch.arange(10, device=DEVICE) * 10
    for tokens in (None, ids):
        result = candidates.put_first_reference(found, drawn, tokens)
        for row in range(3):
            others = [each for each in found[row].tolist() if each != int(drawn[row])]
            expected = [int(drawn[row]), *others][:width]
            assert result[row].tolist() == [each * (1 if tokens is None else 10) for each in expected]
        if torch.cuda.is_available() or INTERPRETED:
            from paceline.ops.triton import candidates as kernels

            assert torch.equal(kernels.put_first(found, drawn, tokens), result)
