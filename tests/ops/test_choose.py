"""A drafter's choice of tokens: its parts by hand, and its implementations against them."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paceline.ops import choose as ops
from paceline.ops.draw import Draws, draw
from paceline.ops.weight import Dense

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
# temperature, top-k, top-p and min-p of slots
FILTERS = [(0, 0, 1, 0), (1, 0, 1, 0), (0.8, 5, 1, 0), (1.5, 0, 0.8, 0), (2, 40, 0.9, 0.01)]


def implementations() -> list[Callable[..., Tensor]]:
    found: list[Callable[..., Tensor]] = [ops.reference]
    if torch.cuda.is_available() or INTERPRETED:
        from paceline.ops.triton import choose as kernels

        found += [kernels.choose, kernels.choose_deterministic]
    return found


def some_logits(rows: int, columns: int, dtype: torch.dtype, exact: bool) -> Tensor:
    """[rows, columns], many of the first row's equal; all are eighths where they must be `exact` under the interpreter."""
    logits = torch.randn(rows, columns, device=DEVICE).mul(2).to(dtype)
    if exact and INTERPRETED:
        logits = logits.mul(8).round().div(8)
    logits[0] = logits[0].round()
    return logits


def some_bias(rows: int, columns: int, rank: int, dtype: torch.dtype) -> ops.TokenBias:
    """By tokens of a vocabulary of 2 * columns; its sums are exact in float32."""

    def eighths(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, device=DEVICE).to(dtype) / 8

    embedding = eighths(2 * columns, rank)
    embedding = embedding.sign() if INTERPRETED else embedding * 4
    before = torch.randint(2 * columns, (rows,), device=DEVICE)
    return ops.TokenBias(before, embedding, Dense(eighths(columns, rank)))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (3, 1000), (5, 5000)])
def test_the_likeliest_tokens_come_first(rows: int, columns: int, count: int) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(rows, columns).mul(4).to(DEVICE)
    logits[-1] = logits[-1].round()  # many equals
    unchanged = logits.clone()
    found, logprobs = ops.largest(logits, count)
    for row in range(rows):
        order = sorted(range(columns), key=lambda column: (-float(logits[row, column]), column))
        assert found[row].tolist() == order[:count]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).gather(1, found))
    assert torch.equal(logits, unchanged)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_drawn_token_comes_first_and_the_others_keep_their_order(width: int) -> None:
    found = torch.tensor([[4, 7, 2, 9], [1, 2, 3, 4], [8, 6, 5, 0]], device=DEVICE)[:, :width]
    drawn = torch.tensor([2, 1, 9], device=DEVICE)
    for mine, first, row in zip(found.tolist(), drawn.tolist(), ops.put_first(found, drawn).tolist(), strict=True):
        assert row == [first, *(each for each in mine if each != first)][:width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8, 40])
@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 5, 2), (1, 1025, 3), (5, 2048, 4), (21, 777, 1)])
def test_the_guesses_are_those_of_the_parts(rows: int, columns: int, count: int, rank: int, dtype: torch.dtype) -> None:
    """The bias's sums are exact in float32, so all implementations round the same numbers. Under the interpreter, which cuts
    off where bfloat16 is to be rounded, nothing is left to round: all are eighths below 32.
    """
    torch.manual_seed(columns + rank)
    logits = some_logits(rows, columns, dtype, exact=rank > 0)
    tokens = torch.randperm(2 * columns, device=DEVICE)[:columns]
    filters = torch.tensor(FILTERS, dtype=torch.float32, device=DEVICE)
    draws = Draws(torch.arange(len(FILTERS), device=DEVICE) * 12345, filters)
    slots = torch.arange(rows, device=DEVICE) % len(FILTERS)
    if rows == 1:
        slots += 1
    positions = torch.arange(rows, device=DEVICE) + 7
    bias, biased = None, logits
    if rank:
        bias = some_bias(rows, columns, rank, dtype)
        assert isinstance(bias.output, Dense)
        product = bias.embedding[bias.before].double() @ bias.output.matrix.double().T
        biased = logits + product.to(dtype)
    for given in (tokens, None):
        ordered = biased.float().sort(dim=-1, descending=True, stable=True).indices
        drawn = draw(biased, ordered[:, 0].contiguous(), slots, positions, draws, given)
        expected = ops.put_first(ordered[:, :count], drawn)
        expected = expected if given is None else given[expected]
        values = biased.float().log_softmax(-1).gather(1, ordered[:, :count])
        for implementation in implementations():
            found = torch.full((rows, 3, count), -1, device=DEVICE)
            logprobs = torch.zeros(rows, 3, count, device=DEVICE)
            first = implementation(logits, slots, positions, draws, given, found[:, 1], logprobs[:, 1], bias)
            assert torch.equal(found[:, 1], expected) and torch.equal(first, expected[:, 0])
            torch.testing.assert_close(logprobs[:, 1], values, atol=1e-5, rtol=1e-5)
            assert (found[:, ::2] == -1).all() and (logprobs[:, ::2] == 0).all()
            assert first.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize(("requests", "shared", "columns", "count"), [(1, 4, 1025, 4), (2, 3, 777, 3), (5, 4, 300, 2)])
def test_rows_that_share_logits_are_those_of_copies(
    requests: int, shared: int, columns: int, count: int, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(columns + rank)
    rows = requests * shared
    logits = some_logits(requests, columns, dtype, exact=rank > 0)
    tokens = torch.randperm(2 * columns, device=DEVICE)[:columns]
    filters = torch.tensor(FILTERS, dtype=torch.float32, device=DEVICE)
    draws = Draws(torch.arange(len(FILTERS), device=DEVICE) * 12345, filters)
    slots = (torch.arange(requests, device=DEVICE) + 1) % len(FILTERS)
    positions = torch.arange(requests, device=DEVICE) + 7
    bias = some_bias(rows, columns, rank, dtype) if rank else None

    def empty() -> tuple[Tensor, Tensor]:
        return torch.full((rows, count), -1, device=DEVICE), torch.zeros(rows, count, device=DEVICE)

    expected, values = empty()
    every, own_slots, own_positions = (each.repeat_interleave(shared, 0) for each in (logits, slots, positions))
    ops.reference(every, own_slots, own_positions, draws, tokens, expected, values, bias)
    if rank:
        assert any(row.unique(dim=0).shape[0] > 1 for row in expected.view(requests, shared, count))
    for implementation in implementations():
        found, logprobs = empty()
        first = implementation(logits, slots, positions, draws, tokens, found, logprobs, bias)
        assert torch.equal(found, expected) and torch.equal(first, expected[:, 0])
        torch.testing.assert_close(logprobs, values, atol=1e-5, rtol=1e-5)
