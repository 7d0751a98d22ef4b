"""The target's choice after every query of a step.

It is a function of seed, position and logits alone: a request draws the same tokens whatever is drafted, batched or
preempted, and a draft is accepted exactly when the target would have drawn it, which keeps the target's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.engine.transfer import to_device
from paceline.ops.copy_draft import CopyState, StepTokens
from paceline.ops.draw import Draws, draw
from paceline.ops.layout import owners
from paceline.types import Sampling


@dataclass(frozen=True)
class Row:
    """A request whose logits are to be changed: its queries are `first:last`, its state is at `slot`.

    `prompt_length` is where its output starts; `stops` are the tokens that end it, which `min_tokens` holds back.
    """

    sampling: Sampling
    slot: int
    first: int
    last: int
    prompt_length: int
    stops: tuple[int, ...]


def adjusted(logits: Tensor, rows: list[Row], step: StepTokens, state: CopyState) -> Tensor:
    """logits [T, V] with what the requests in `rows` want changed: a float32 copy where there are any, else themselves."""
    if rows:
        logits = logits.to(torch.float32, copy=True)
        for row in rows:
            _adjust(logits[row.first : row.last], row, step, state)
    return logits


def drawn(
    logits: Tensor, choices: Tensor, step: StepTokens, state: CopyState, slots: Tensor, starts: Tensor, draws: Draws
) -> Tensor:
    """The choices [T] after drawing from logits [T, V], where a request does; given the greedy `choices` [T].

    slots [B] int64 and starts [B + 1] int32 are the requests' slots and where their queries start.
    """
    owner = slots[owners(starts, len(choices))]
    positions = (state.end[owner] - state.history_start[owner]).long() + step.depths.long()
    return draw(logits, choices, owner, positions, draws)


def logprobs(logits: Tensor, choices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of raw logits [T, V]: the choices' log-probabilities [T], and the `count` likeliest, values and tokens [T, count].

    What a grammar forbids has -9999, OpenAI's word for never.
    """
    every = torch.log_softmax(logits.float(), dim=-1).clamp(min=-9999.0)
    top = every.topk(max(count, 1), dim=-1)
    return every.gather(1, choices[:, None])[:, 0], top.values[:, :count], top.indices[:, :count]


def within_margin(logits: Tensor, step: StepTokens, choices: Tensor, first: Tensor, margins: Tensor) -> Tensor:
    """[T] bool: drafted tokens whose logit is at most their request's margin below the choice's.

    first [T] is the index of each query's root, margins [T] its request's margin in nats; with 0 nothing but the choice
    is taken, be another token as likely or, where the choice is drawn, likelier.
    """
    query = torch.arange(len(first), device=logits.device)
    opens = query - first == step.branch_starts
    parent = torch.where(opens, first, (query - 1).clamp(min=0)).long()
    best = logits.gather(1, choices[:, None])[parent, 0].float()
    drafted = logits[parent, step.tokens].float()
    return (margins > 0) & (best - drafted <= margins)


def first_within_margin(logits: Tensor, choices: Tensor, state: CopyState, slots: Tensor, margins: Tensor) -> Tensor:
    """The choices [B] of requests' first tokens, where a source begins within the margin [B] of it the source's instead.

    A first token is not drafted; this gives it the same policy as `within_margin` gives those that are.
    """
    pointer = state.pointer[slots]
    follows = (pointer >= 0) & (pointer < state.history_start[slots]) & (margins > 0)
    token = state.text[slots, pointer.clamp(min=0).long()].clamp(min=0).long()
    gap = logits.gather(1, choices[:, None])[:, 0].float() - logits.gather(1, token[:, None])[:, 0].float()
    return torch.where(follows & (gap <= margins), token, choices)


def _adjust(logits: Tensor, row: Row, step: StepTokens, state: CopyState) -> None:
    """Penalties, bias and held-back stops, in place. Every drafted token counts for the queries after it."""
    sampling = row.sampling
    if sampling.logit_bias:
        tokens = to_device(list(sampling.logit_bias), torch.int64, logits.device)
        logits[:, tokens] += to_device(list(sampling.logit_bias.values()), torch.float32, logits.device)
    if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
        output, whole = _counts(logits, row, step, state)
        logits -= sampling.frequency_penalty * output + sampling.presence_penalty * (output > 0)
        penalty = sampling.repetition_penalty
        logits.copy_(torch.where(whole > 0, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
    if sampling.min_tokens and row.stops:
        written = state.end[row.slot] - state.history_start[row.slot] - row.prompt_length
        early = written + step.depths[row.first : row.last] < sampling.min_tokens
        stops = to_device(row.stops, torch.int64, logits.device)
        logits[:, stops] = torch.where(early[:, None], float("-inf"), logits[:, stops])


def _counts(logits: Tensor, row: Row, step: StepTokens, state: CopyState) -> tuple[Tensor, Tensor]:
    """How often each token stands before each query: in the output [Q, V], and in prompt and output [Q, V]."""
    text = state.text[row.slot]
    index = torch.arange(text.shape[0], device=text.device)
    history = (index >= state.history_start[row.slot]) & (index < state.end[row.slot])
    output = history & (index >= state.history_start[row.slot] + row.prompt_length)
    tokens = text.clamp(min=0).long()
    whole = logits.new_zeros(logits.shape[1]).scatter_add_(0, tokens, history.to(logits.dtype))
    written = logits.new_zeros(logits.shape[1]).scatter_add_(0, tokens, output.to(logits.dtype))
    starts = step.branch_starts[row.first : row.last]
    query = torch.arange(len(starts), device=starts.device)
    before = (query[None, :] <= query[:, None]) & (query[None, :] >= starts[:, None]) & (query[None, :] > 0)
    drafted = step.tokens[row.first : row.last][None, :].expand_as(before)
    added = torch.zeros_like(logits).scatter_add_(1, drafted, before.to(logits.dtype))
    return written + added, whole + added
