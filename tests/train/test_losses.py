"""Losses against their definitions, and the counts of acceptance."""

from __future__ import annotations

import pytest
import torch

from paceline.errors import ConfigError
from paceline.train.losses import Acceptance, Objective, RowResults, compare, mixed, summary

VOCABULARY, DRAFTED = 30, torch.arange(0, 30, 2)


def rows(count: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    target = 2 * torch.randn(count, VOCABULARY, generator=draw)
    drafted = 2 * torch.randn(count, len(DRAFTED), generator=draw)
    return drafted, target, target.logsumexp(-1), target.argmax(-1)


def test_losses_are_their_definitions() -> None:
    drafted, target, normaliser, first = rows()
    choice = torch.where(first % 2 == 0, first // 2, -1)
    found = compare(drafted, target[:, DRAFTED], normaliser, choice)
    p, q = target.softmax(-1), torch.zeros(50, VOCABULARY)
    q[:, DRAFTED] = drafted.softmax(-1)
    torch.testing.assert_close(found.refused, 0.5 * (p - q).abs().sum(-1), atol=1e-5, rtol=1e-5)
    restricted = target[:, DRAFTED].softmax(-1)
    soft = -(restricted * drafted.log_softmax(-1)).sum(-1)
    inside = choice >= 0
    assert 5 < inside.sum() < 45
    torch.testing.assert_close(found.kl[inside], soft[inside], atol=1e-5, rtol=1e-5)
    assert not found.kl[~inside].any() and not found.cross_entropy[~inside].any()
    hard = torch.nn.functional.cross_entropy(drafted[inside], choice[inside], reduction="none")
    torch.testing.assert_close(found.cross_entropy[inside], hard)
    assert torch.equal(found.matches.bool(), drafted.argmax(-1) == choice)


def test_objectives_weigh_rows_and_mix() -> None:
    drafted, target, normaliser, first = rows()
    found = compare(drafted, target[:, DRAFTED], normaliser, torch.where(first % 2 == 0, first // 2, -1))
    weights = (torch.arange(50) % 3 > 0).float()
    kl, refused = (found.kl * weights).sum(), (found.refused * weights).sum()
    assert mixed(Objective("kl"), found, weights) == kl and mixed(Objective("tv"), found, weights) == refused
    share = torch.exp(-3 * (1 - refused / weights.sum()))
    torch.testing.assert_close(mixed(Objective("lk"), found, weights), share * kl + (1 - share) * refused)
    assert Objective(decay=0.5).weights(3) == [4 / 7, 2 / 7, 1 / 7]
    with pytest.raises(ConfigError, match="must be one of"):
        Objective("mse")


def test_minimising_each_loss_raises_acceptance() -> None:
    for kind in ("kl", "tv", "lk", "ce"):
        _, target, normaliser, first = rows()
        choice = torch.where(first % 2 == 0, first // 2, -1)
        logits = torch.zeros(50, len(DRAFTED), requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        refused = []
        for _ in range(50):
            found = compare(logits, target[:, DRAFTED], normaliser, choice)
            refused.append(float(found.refused.mean().detach()))
            mixed(Objective(kind), found, torch.ones(50)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert refused[-1] < refused[0] - 0.05, kind


def test_acceptance_follows_drafts_along_the_text() -> None:
    """Two documents of 4 and 3 supervised places; whether each position's draft is right there is given."""
    continues = torch.tensor([False, True, True, True, False, True, True])
    depths = torch.tensor([0, 1, 2, 3, 5, 6, 7])
    right = torch.tensor([[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0, 1]]).float()
    acceptance = Acceptance(1, 3, torch.device("cpu"))
    zeros = torch.zeros(7)
    for k in range(3):
        weights = (depths >= k).float()
        acceptance.add(
            k, RowResults(zeros, zeros, zeros, right[k]), weights, continues, torch.zeros(7, dtype=torch.long)
        )
    counts = acceptance.counts[0]
    # second position: drafts that began one place before and were right there: places 1, 2 and 5, 6; right at 1, 2, 6
    # third: of those the ones that go on: places 2 and 3; right at 2
    assert counts[:, 3].tolist() == [7, 4, 2] and counts[:, 4].tolist() == [6, 3, 1]
    found = summary(counts)
    assert found["acceptance"] == [round(6 / 7, 4), 0.75, 0.5]
    assert found["length"] == round(1 + 6 / 7 * (1 + 0.75 * (1 + 0.5)), 4)


def test_a_draft_ends_where_the_text_leaves_the_targets_choice() -> None:
    """Four places of one document, all drafts right; the token after place 1 is not the target's choice there."""
    continues = torch.tensor([False, True, False, True])
    ones, zeros, tasks = torch.ones(4), torch.zeros(4), torch.zeros(4, dtype=torch.long)
    one_by_one, whole = (Acceptance(1, 3, torch.device("cpu")) for _ in range(2))
    for k in range(3):
        one_by_one.add(k, RowResults(zeros, zeros, zeros, ones), (torch.arange(4) >= k).float(), continues, tasks)
    entries = torch.arange(4)[:, None] + torch.arange(3)
    inside, entries = (entries < 4).float(), entries.clamp(max=3)
    rows = RowResults(*(torch.zeros(4, 3) for _ in range(3)), torch.ones(4, 3))
    whole.add_drafts(rows, inside, continues[entries], tasks)
    for found in (one_by_one.counts[0], whole.counts[0]):
        assert found[:, 0].tolist() == [4, 3, 2]
        assert found[:, 3].tolist() == found[:, 4].tolist() == [4, 2, 0]
