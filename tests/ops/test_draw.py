"""The draw's reference: what the filters keep, and that tokens come as often as they should."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paceline.ops.draw import Draws, draw, row_keys, weights


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


def test_keys_are_those_of_splitmix64() -> None:
    seeds, positions = torch.tensor([0, 3, -1, 1 << 61]), torch.tensor([0, 1, 2, 1 << 33])
    exact = []
    for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True):
        mixed = ((position + 1) * 0x9E3779B97F4A7C15 + seed) % (1 << 64)
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % (1 << 64)
        exact.append(mixed ^ (mixed >> 31))
    assert [key % (1 << 64) for key in row_keys(seeds, positions).tolist()] == exact
    assert exact[0] == 0xE220A8397B1DCDAF  # the generator's well-known first number


def test_rows_without_any_chance_give_a_token_all_the_same() -> None:
    nothing = torch.full((1, 300), -float("inf"))
    draws = Draws(torch.tensor([7]), torch.tensor([[1.0, 0, 1, 0]]))
    assert 0 <= drawn(nothing, [0], draws, [0], [0])[0] < 300


# ------------------------------------------------------------------------------------- exact in distribution

SAMPLES = 100_000
LIKELIHOODS = [0.3, 0.2, 0.12, 0.1, 0.09, 0.07, 0.05, 0.04, 0.02, 0.008, 0.0015, 0.0005]


def samples(logits: Tensor, seeds: Tensor, positions: Tensor, filters: tuple[float, ...] = (1, 0, 1, 0)) -> Tensor:
    """[N]: tokens of one distribution [V], drawn with each seed at each position, both [N]."""
    rows = logits[None].expand(len(seeds), -1)
    draws = Draws(seeds, torch.tensor([filters]).expand(len(seeds), -1))
    return draw(rows, rows.argmax(dim=-1), torch.arange(len(seeds)), positions, draws)


def chance(found: Tensor, expected: Tensor, freedom: int) -> float:
    """The chi-square test's p-value of counts `found`, where `expected` is positive."""
    likely = expected > 0
    distance = ((found - expected)[likely] ** 2 / expected[likely]).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), distance.double() / 2))


@pytest.mark.parametrize("along", ["positions", "seeds", "both"])
@pytest.mark.parametrize(
    "filters",
    [
        (1, 0, 1, 0),
        (0.6, 0, 1, 0),
        (1.7, 0, 1, 0),
        (1, 5, 1, 0),
        (0.7, 0, 0.8, 0),
        (1.2, 0, 1, 0.1),
        (0.8, 9, 0.95, 0.02),
    ],
)
def test_the_distribution_is_exact(filters: tuple[float, ...], along: str) -> None:
    """Over positions of one seed, over seeds at one position, and over both at random; filtered tokens never come."""
    logits = torch.tensor(LIKELIHOODS).log()
    count, random = torch.arange(SAMPLES), torch.Generator().manual_seed(4)
    seeds = {
        "positions": torch.full_like(count, 3),
        "seeds": count,
        "both": torch.randint(-(1 << 62), 1 << 62, (SAMPLES,), generator=random),
    }[along]
    positions = torch.full_like(count, 1000) if along == "seeds" else count
    found = torch.bincount(samples(logits, seeds, positions, filters), minlength=len(logits))
    kept = weights(logits[None], logits.argmax(dim=-1, keepdim=True), torch.tensor([filters]))[0].double()
    assert not found[kept == 0].any()
    assert chance(found, kept / kept.sum() * SAMPLES, int((kept > 0).sum()) - 1) > 1e-3


@pytest.mark.parametrize("step", [(0, 1), (0, 2), (0, 7), (1, 0), (2, 0), (1, 1), (1, -1)])
def test_neighbouring_draws_are_independent(step: tuple[int, int]) -> None:
    """Pairs of draws that are `step` apart in seed and position come as often as the product of their chances."""
    logits = torch.tensor(LIKELIHOODS[:8]).log()
    seeds, positions = torch.arange(250).repeat_interleave(SAMPLES // 250), torch.arange(SAMPLES) % (SAMPLES // 250) + 1
    pairs = samples(logits, seeds, positions) * 8 + samples(logits, seeds + step[0], positions + step[1])
    share = torch.softmax(logits.double(), dim=-1)
    expected = (share[:, None] * share).flatten() * SAMPLES
    assert chance(torch.bincount(pairs, minlength=64), expected, 63) > 1e-3


# ----------------------------------------------------------------------------- a drafter that shares the times


def together(target: Tensor, drafter: Tensor) -> float:
    """The chance that both draw the same token, of log-probabilities [V]: for each token, that it is first in both."""
    behind = torch.maximum((target - target[:, None]).exp(), (drafter - drafter[:, None]).exp()).nan_to_num(torch.inf)
    return float((1 / behind.sum(dim=-1)).sum())


def test_a_drafter_with_the_same_times_agrees_as_often_as_it_should() -> None:
    """Always with the target's distribution; else with the coupling's exact chance, which is at least its bound."""
    torch.manual_seed(5)
    count = 20_000
    seeds, positions = torch.full((count,), 11), torch.arange(count)
    for spread, noise in ((1.0, 0.0), (1.0, 0.3), (2.0, 1.0), (3.0, 0.5), (3.0, 2.0), (4.0, 4.0)):
        logits = torch.randn(50) * spread
        drafted = logits + torch.randn(50) * noise
        chosen, proposed = samples(logits, seeds, positions), samples(drafted, seeds, positions)
        agreed = float((chosen == proposed).float().mean())
        target, drafter = logits.double().log_softmax(dim=-1), drafted.double().log_softmax(dim=-1)
        distance = float((target.exp() - drafter.exp()).abs().sum()) / 2
        expected = together(target, drafter)
        assert (1 - distance) / (1 + distance) <= expected + 1e-9 <= 1 - distance + 2e-9
        assert abs(agreed - expected) <= 4 * (expected * (1 - expected) / count) ** 0.5
        assert agreed == 1 or noise


def test_a_reduced_vocabulary_draws_the_same_tokens() -> None:
    """Where the tokens that it lacks have no chance; the times belong to token ids, not to columns."""
    torch.manual_seed(6)
    tokens = torch.randperm(3_000)[:500]
    logits, seeds = torch.full((200, 3_000), -torch.inf), torch.randint(-(1 << 62), 1 << 62, (200,))
    logits[:, tokens] = torch.randn(200, 500) * 3
    filters = torch.tensor([[1, 0, 1, 0], [0.8, 20, 1, 0], [0.9, 0, 0.9, 0.05], [0, 0, 1, 0]]).repeat(50, 1)
    rows, draws = torch.arange(200), Draws(seeds, filters)
    whole = draw(logits, logits.argmax(dim=-1), rows, rows, draws)
    reduced = logits[:, tokens]
    columns = draw(reduced, reduced.argmax(dim=-1), rows, rows, draws, tokens)
    assert torch.equal(tokens[columns], whole)
    assert not torch.equal(tokens[draw(reduced, reduced.argmax(dim=-1), rows, rows, draws)], whole)
