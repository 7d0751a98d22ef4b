"""Attention of a pass over a tree whose earlier passes lie before it: each row is one query on its own path.

On the CPU the references and what serves it; the Triton kernel on a GPU, or under its interpreter.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from paceline.ops import attention
from paceline.ops.attention import AttentionBatch
from paceline.ops.dispatch import deterministic
from paceline.ops.draft import packed
from paceline.ops.native import attention as native_attention
from tests.ops.test_reference import one_by_one

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
PAGE, SCALE, CONTEXTS = 16, 0.2, [0, 1, 15, 16, 200]
HEADS, KV_HEADS, DIM = 4, 2, 32
DTYPES = [torch.float32, torch.bfloat16]
PASSES = [(3, 1), (3, 4), (1, 5), (8, 6), (8, 9)]  # rows a request, the pass; the last have two and three mask words


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def paths_of(width: int, last: int) -> list[list[int]]:
    """Of a random tree with `width` nodes at each depth up to `last`: the own places on the path of each node at `last`."""
    paths = [[0]]
    for depth in range(1, last + 1):
        parents = torch.randint(0, len(paths), (width,)).tolist()
        paths = [[*paths[parent], 1 + (depth - 1) * width + row] for row, parent in enumerate(parents)]
    return paths


def pass_of(width: int, last: int, hides: bool, dtype: torch.dtype) -> tuple[AttentionBatch, list[Tensor], Tensor]:
    """Pass `last` of a request for each of CONTEXTS on shuffled pages: the batch; query, keys and values; the outputs.

    What no query may read, beyond a request's last token, is not-a-number.
    """
    before = 1 + (last - 1) * width
    num_places = [context + before + width for context in CONTEXTS]
    num_pages = [-(-count // PAGE) for count in num_places]
    order = torch.randperm(sum(num_pages) + 3)
    table = torch.full((len(CONTEXTS), max(num_pages) + 2), int(order[-1]), dtype=torch.int32)
    keys, values = torch.full((2, len(order) * PAGE, KV_HEADS, DIM), float("nan"), dtype=dtype)
    query = torch.randn(len(CONTEXTS) * width, HEADS, DIM).to(dtype)
    locations, seen, expected = [], [], []
    for index, (context, count) in enumerate(zip(CONTEXTS, num_places, strict=True)):
        pages = order[sum(num_pages[:index]) :][: num_pages[index]]
        table[index, : len(pages)] = pages.int()
        own = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()[:count]
        keys[own], values[own] = torch.randn(2, count, KV_HEADS, DIM).to(dtype)
        locations.append(own[-width:])
        for row, path in enumerate(paths_of(width, last)):
            seen.append(torch.zeros(before + width, dtype=torch.bool).index_fill(0, torch.tensor(path), True))
            rows = torch.cat([own[:context], own[context:][path]])[int(hides) :]
            each = query[index * width + row].float()
            expected.append(one_by_one(each, keys[rows].float(), values[rows].float(), SCALE))
    lengths = torch.tensor(CONTEXTS, dtype=torch.int32)
    batch = AttentionBatch(
        positions=(lengths.long() + last).repeat_interleave(width),
        locations=torch.cat(locations),
        page_table=table,
        context_lens=lengths,
        query_starts=torch.arange(len(CONTEXTS) + 1, dtype=torch.int32) * width,
        branch_starts=torch.zeros(len(seen), dtype=torch.int32),
        max_query=width,
        max_context=max(CONTEXTS),
        branching=True,
        hides_first=hides,
        tree_mask=packed(torch.stack(seen)),
        num_before=before,
    )
    return batch, [query, keys, values], torch.stack(expected)


def close(result: Tensor, expected: Tensor) -> None:
    limit = 1e-5 if result.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.float().cpu(), expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize(("width", "last"), PASSES)
def test_a_row_sees_its_own_path(width: int, last: int, hides: bool, dtype: torch.dtype) -> None:
    batch, inputs, expected = pass_of(width, last, hides, dtype)
    close(attention.reference(*inputs, batch, PAGE, SCALE), expected)
    close(attention.reference_deterministic(*inputs, batch, PAGE, SCALE), expected)
    for same_bits in (False, True):
        batch.plan = None
        with deterministic(same_bits):
            close(attention.paged_attention(*inputs, batch, PAGE, SCALE), expected)


@pytest.mark.parametrize("hides", [True, False])
def test_without_native_kernels(hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_attention, "library", lambda: None)
    batch, inputs, expected = pass_of(3, 4, hides, torch.bfloat16)
    for same_bits in (False, True):
        with deterministic(same_bits):
            close(attention.paged_attention(*inputs, batch, PAGE, SCALE), expected)


@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("hides", [True, False])
@pytest.mark.parametrize(("width", "last"), PASSES)
def test_the_kernel(width: int, last: int, hides: bool, dtype: torch.dtype) -> None:
    """Its keys in several parts, in one, of fixed sizes, and its rows in several programs."""
    batch, inputs, expected = pass_of(width, last, hides, dtype)
    found: Any = kernel()
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.to(DEVICE))
    inputs = [each.to(DEVICE) for each in inputs]
    close(found.paged_attention(*inputs, batch, PAGE, SCALE), expected)
    close(found.paged_attention_deterministic(*inputs, batch, PAGE, SCALE), expected)
    close(found.attend(*inputs, batch, PAGE, SCALE, programs=1), expected)
    close(found.attend(*inputs, batch, PAGE, SCALE, tile=(16, 32, 4, 2)), expected)


def kernel() -> Any:
    if not (torch.cuda.is_available() or INTERPRETED):
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from paceline.ops.triton import attention as found

    return found
