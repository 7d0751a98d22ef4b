"""The tokens that a trained drafter guesses at one depth: the likeliest of its logits, the one that it has drawn first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation
from paceline.ops.draw import Draws, draw
from paceline.ops.linear import linear
from paceline.ops.weight import Weight

MAX_CANDIDATES = 4


@dataclass(frozen=True)
class TokenBias:
    """What the tokens before add to logits [T, V]: linear(embedding[before], output), the Markov head of DSpark.

    before [T] int64 are tokens of the target, embedding [target vocabulary, R]; `output` is [V, R].
    """

    before: Tensor
    embedding: Tensor
    output: Weight

    def product(self) -> Tensor:
        """The bias [T, V]."""
        return linear(self.embedding[self.before], self.output)


def choose(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    draws: Draws,
    tokens: Tensor | None,
    found: Tensor,
    logprobs: Tensor,
    bias: TokenBias | None = None,
) -> Tensor:
    """Chooses C tokens for each row of logits [T, V], to which `bias` is added first. Returns each row's first, [T] int64.

    `found`, `logprobs`, the bias and the result may have W rows for each of the logits, side by side, which share also its slot
    and its position and so differ by their bias alone.
    logprobs [T, C] float32 gets the log-probabilities of the C likeliest columns, likeliest first; of equal ones the lowest
    comes first. found [T, C] int64 gets their tokens in that order, but the column that the row's slot draws (ops/draw.py;
    the likeliest where it has no temperature) in front of the others. C is at most MAX_CANDIDATES and V.
    `slots`, `positions`, `draws` and `tokens` are those of `draw`; `tokens` map columns to the target's tokens, too.
    `found` and `logprobs` may be views with the same stride of rows.
    """
    assert found.shape == logprobs.shape and 1 <= found.shape[1] <= min(MAX_CANDIDATES, logits.shape[1])
    assert len(found) % len(logits) == 0 and (bias is None or len(bias.before) == len(found))
    first: Tensor = implementation("choose", logits)(logits, slots, positions, draws, tokens, found, logprobs, bias)
    return first


def reference(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    draws: Draws,
    tokens: Tensor | None,
    found: Tensor,
    logprobs: Tensor,
    bias: TokenBias | None = None,
) -> Tensor:
    shared = len(found) // len(logits)
    if bias is not None:
        logits = add_bias(logits, bias)
        slots, positions, shared = slots.repeat_interleave(shared), positions.repeat_interleave(shared), 1
    likeliest, values = largest(logits, found.shape[1])
    logprobs.copy_(values.repeat_interleave(shared, 0))
    drawn = draw(logits, likeliest[:, 0].contiguous(), slots, positions, draws, tokens)
    ordered = put_first(likeliest, drawn).repeat_interleave(shared, 0)
    found.copy_(ordered if tokens is None else tokens[ordered])
    return found[:, 0].contiguous()


def add_bias(logits: Tensor, bias: TokenBias) -> Tensor:
    """logits [T, V] and the bias of W rows for each, [W * T, V]."""
    product = bias.product()
    return (logits[:, None] + product.view(len(logits), -1, logits.shape[1])).view(product.shape)


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest columns of logits [T, V], [T, count] int64, and their log-probabilities in float32.

    In `count` passes, each for the largest that is left: far faster than a sort, and topk promises no order among equals.
    """
    wide = logits.float()
    normaliser = wide.logsumexp(dim=-1, keepdim=True)
    columns, values = [], []
    left = wide if count == 1 or wide is not logits else wide.clone()
    for index in range(count):
        column = left.argmax(dim=-1, keepdim=True)
        columns.append(column)
        values.append(left.gather(1, column))
        if index + 1 < count:
            left.scatter_(1, column, -torch.inf)
    return torch.cat(columns, dim=1), torch.cat(values, dim=1) - normaliser


def put_first(found: Tensor, drawn: Tensor) -> Tensor:
    """found [T, C] with drawn [T] in front and the others after it in their order, [T, C]."""
    same = found == drawn[:, None]
    place = torch.where(same.any(1), same.int().argmax(1), found.shape[1] - 1)
    column = torch.arange(found.shape[1], device=found.device)
    moved = torch.where(column <= place[:, None], found.roll(1, 1), found)
    moved[:, 0] = drawn
    return moved
