"""A drafter's likeliest tokens and their probabilities, and the one that it has drawn before them."""

from __future__ import annotations

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation

MAX_CANDIDATES = 4


def candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens of logits [T, V], likeliest first, [T, count] int64, and their log-probabilities.

    Of equal logits the lowest token comes first. `count` is at most MAX_CANDIDATES; log-probabilities are float32.
    """
    assert 1 <= count <= MAX_CANDIDATES
    return implementation("candidates", logits)(logits, count)


def put_first(found: Tensor, drawn: Tensor, tokens: Tensor | None) -> Tensor:
    """found [T, C] int64 with drawn [T] in front, and the others after it in their order, as tokens of the target [T, C].

    tokens [V] int64 are the target's tokens for those of a reduced vocabulary, None where they are the same.
    """
    return implementation("put_first", found)(found, drawn, tokens)


def put_first_reference(found: Tensor, drawn: Tensor, tokens: Tensor | None) -> Tensor:
    same = found == drawn[:, None]
    place = torch.where(same.any(1), same.int().argmax(1), found.shape[1] - 1)
    column = torch.arange(found.shape[1], device=found.device)
    moved = torch.where(column <= place[:, None], found.roll(1, 1), found)
    moved[:, 0] = drawn
    return moved if tokens is None else tokens[moved]


def reference(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    # topk promises no order among equals
    values, tokens = wide.sort(dim=-1, descending=True, stable=True)
    normaliser = wide.logsumexp(dim=-1, keepdim=True)
    return tokens[:, :count].contiguous(), values[:, :count] - normaliser


def on_cpu(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` passes, each for the largest that is left: far faster than a sort."""
    wide = logits.float()
    normaliser = wide.logsumexp(dim=-1, keepdim=True)
    tokens, values = [], []
    left = wide if count == 1 or wide is not logits else wide.clone()
    for index in range(count):
        token = left.argmax(dim=-1, keepdim=True)
        tokens.append(token)
        values.append(left.gather(1, token))
        if index + 1 < count:
            left.scatter_(1, token, -torch.inf)
    return torch.cat(tokens, dim=1), torch.cat(values, dim=1) - normaliser
