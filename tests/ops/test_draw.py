"""The draw's reference: what the filters keep, and that tokens come as often as they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paceline.ops.draw import Draws, draw, uniform, weights


def drawn(logits: Tensor, rows: list[int], draws: Draws, slots: list[int], positions: list[int]) -> list[int]:
    """From the given rows of the logits."""
    logits = logits[rows]
    tokens: list[int] = draw(
        logits, logits.argmax(dim=-1), torch.tensor(slots), torch.tensor(positions), draws
    ).tolist()
    return tokens


def kept(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    found: Tensor = weights(logits, logits.argmax(dim=-1), torch.tensor([[temperature, top_k, top_p, min_p]]))
    return found[0].nonzero()[:, 0].tolist()


LOGITS = torch.tensor([[0.5, 0.1, 0.1, 0.2, 0.1]]).log()


@pytest.mark.parametrize(
    "filters, tokens",
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 3]),
        ({"top_k": 3}, [0, 1, 2, 3, 4]),  # the third is as likely as two others
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.6}, [0, 3]),
        ({"top_p": 0.75}, [0, 1, 2, 3, 4]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 2, "top_p": 0.7}, [0]),  # of what top-k leaves, 0.5 is more than 0.7
        ({"min_p": 0.3}, [0, 3]),
        ({"min_p": 1.0}, [0]),
        ({"top_p": 0.75, "min_p": 0.3}, [0, 3]),
        ({"min_p": 0.3, "temperature": 100.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 1e-30}, [0]),
    ],
)
def test_filters(filters: dict[str, float], tokens: list[int]) -> None:
    assert kept(LOGITS, **filters) == tokens  # type: ignore[arg-type]


def test_tokens_come_as_often_as_they_should() -> None:
    """Chi-square over a vocabulary of several blocks; what has no chance never comes."""
    torch.manual_seed(0)
    logits = torch.randn(1, 300) * 2
    logits[0, 100:160] = -float("inf")
    count = 40_000
    draws = Draws(torch.tensor([7]), torch.tensor([[1.5, 0, 1, 0]]))
    tokens = drawn(logits, [0] * count, draws, [0] * count, list(range(count)))
    found = torch.bincount(torch.tensor(tokens), minlength=300)
    expected = torch.softmax(logits[0] / 1.5, dim=-1) * count
    assert not found[100:160].any()
    likely = expected > 5
    distance = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert float(distance) < freedom + 4 * (2 * freedom) ** 0.5


def test_each_slot_has_its_own_filters() -> None:
    """Rows give what they give alone; a slot without a temperature takes the largest."""
    torch.manual_seed(1)
    logits = torch.randn(3, 200) * 3
    filters = torch.tensor([[0.5, 0, 1, 0], [0, 0, 1, 0], [1, 3, 1, 0], [2, 0, 0.7, 0], [1, 50, 0.9, 0.1]])
    draws = Draws(torch.tensor([5, 6, -(1 << 62), 9, 11]), filters)
    rows, slots, positions = [2, 1, 0, 1, 1], [4, 1, 0, 3, 2], [100, 3, 0, 1 << 40, 7]
    together = drawn(logits, rows, draws, slots, positions)
    alone = [
        drawn(logits, [row], draws, [slot], [position])[0]
        for row, slot, position in zip(rows, slots, positions, strict=True)
    ]
    assert together == alone and together[1] == int(logits[1].argmax())


def test_uniform_numbers_are_those_of_splitmix64() -> None:
    seeds, positions = torch.tensor([0, 3, -1, 1 << 61]), torch.tensor([0, 1, 2, 1 << 33])
    exact = []
    for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True):
        mixed = (position * 0x9E3779B97F4A7C15 + seed) % (1 << 64)
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % (1 << 64)
        exact.append(((mixed ^ (mixed >> 31)) >> 11) / (1 << 53))
    assert uniform(seeds, positions).tolist() == exact


def test_rows_without_any_chance_give_a_token_all_the_same() -> None:
    nothing = torch.full((1, 300), -float("inf"))
    draws = Draws(torch.tensor([7]), torch.tensor([[1.0, 0, 1, 0]]))
    assert 0 <= drawn(nothing, [0], draws, [0], [0])[0] < 300
