"""The target's choice after every query of a step.

The choice is a function of seed, position and logits alone: a request draws the same tokens whatever is drafted, batched
or preempted. A drafted token is accepted when it equals the target's choice, which keeps the target's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.engine.transfer import to_device
from paceline.ops.draft import Draft
from paceline.ops.draw import Draws, draw
from paceline.ops.layout import owners
from paceline.ops.state import SlotState
from paceline.types import Sampling


@dataclass(frozen=True)
class LogitRows:
    """A request whose logits are adjusted: its queries are `first:last` of the step, its state is at `slot`.

    `prompt_length` is where its output starts; `stops` are the tokens that end it, which `min_tokens` forbids at first.
    """

    sampling: Sampling
    slot: int
    first: int
    last: int
    prompt_length: int
    stops: tuple[int, ...]


def adjusted(logits: Tensor, rows: list[LogitRows], draft: Draft, state: SlotState) -> Tensor:
    """logits [T, V] after the adjustments of the requests in `rows`: a float32 copy where there are any, else themselves."""
    if rows:
        logits = logits.to(torch.float32, copy=True)
        for row in rows:
            _adjust(logits[row.first : row.last], row, draft, state)
    return logits


def drawn(
    logits: Tensor, choices: Tensor, draft: Draft, state: SlotState, slots: Tensor, starts: Tensor, draws: Draws
) -> Tensor:
    """The choices [T]: drawn from logits [T, V] for requests with a temperature, the greedy `choices` [T] for others.

    slots [B] int64 and starts [B + 1] int32 are the requests' slots and where their queries start.
    """
    owner = slots[owners(starts, len(choices))]
    positions = (state.end[owner] - state.history_start[owner]).long() + draft.depths.long()
    return draw(logits, choices, owner, positions, draws)


def logprobs(logits: Tensor, choices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of raw logits [T, V]: the choices' log-probabilities [T], and the `count` likeliest, values and tokens [T, count].

    A token that a grammar forbids has -9999, as in OpenAI's API.
    """
    every = torch.log_softmax(logits.float(), dim=-1).clamp(min=-9999.0)
    top = every.topk(max(count, 1), dim=-1)
    return every.gather(1, choices[:, None])[:, 0], top.values[:, :count], top.indices[:, :count]


def within_margin(logits: Tensor, draft: Draft, choices: Tensor, first: Tensor, margins: Tensor) -> Tensor:
    """[T] bool: drafted tokens whose logit is at most their request's margin below the choice's.

    first [T] is the row of each query's root, margins [T] its request's margin in nats. With margin 0 only the choice is
    accepted, even if another token is as likely or, where the choice is drawn, likelier.
    """
    parent = draft.parent_rows(first)
    best = logits.gather(1, choices[:, None])[parent, 0].float()
    drafted = logits[parent, draft.tokens].float()
    return (margins > 0) & (best - drafted <= margins)


def first_within_margin(logits: Tensor, choices: Tensor, expected: Tensor, margins: Tensor) -> Tensor:
    """The choices [B] of requests' first tokens: `expected` [B] instead where its logit is within the margin [B].

    `expected` is the first token of a request's best source. A first token is not drafted; this gives it the policy that
    `within_margin` gives drafted ones.
    """
    gap = logits.gather(1, choices[:, None])[:, 0].float() - logits.gather(1, expected[:, None])[:, 0].float()
    return torch.where((margins > 0) & (gap <= margins), expected, choices)


def _adjust(logits: Tensor, row: LogitRows, draft: Draft, state: SlotState) -> None:
    """Penalties, bias and forbidden stops, in place. A drafted token counts for the queries that see it."""
    sampling = row.sampling
    if sampling.logit_bias:
        tokens = to_device(list(sampling.logit_bias), torch.int64, logits.device)
        logits[:, tokens] += to_device(list(sampling.logit_bias.values()), torch.float32, logits.device)
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
        output, whole = _counts(logits, row, draft, state)
        logits -= sampling.frequency_penalty * output + sampling.presence_penalty * (output > 0)
        penalty = sampling.repetition_penalty
        logits.copy_(torch.where(whole > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
    if sampling.min_tokens and row.stops:
        written = state.end[row.slot] - state.history_start[row.slot] - row.prompt_length
        early = written + draft.depths[row.first : row.last] < sampling.min_tokens
        stops = to_device(row.stops, torch.int64, logits.device)
        logits[:, stops] = torch.where(early[:, None], float("-inf"), logits[:, stops])


def _counts(logits: Tensor, row: LogitRows, draft: Draft, state: SlotState) -> tuple[Tensor, Tensor]:
    """How often each token occurs before each query: in the output [Q, V], and in prompt and output [Q, V]."""
    text = state.text[row.slot]
    index = torch.arange(text.shape[0], device=text.device)
    history = (index >= state.history_start[row.slot]) & (index < state.end[row.slot])
    output = history & (index >= state.history_start[row.slot] + row.prompt_length)
    tokens = text.clamp(min=0).long()
    whole = logits.new_zeros(logits.shape[1]).scatter_add_(0, tokens, history.to(logits.dtype))
    written = logits.new_zeros(logits.shape[1]).scatter_add_(0, tokens, output.to(logits.dtype))
    before = draft.visible(row.first, row.last)
    before[:, 0] = False  # the root is in the text already
    drafted = draft.tokens[row.first : row.last][None, :].expand_as(before)
    added = torch.zeros_like(logits).scatter_add_(1, drafted, before.to(logits.dtype))
    return written + added, whole + added
