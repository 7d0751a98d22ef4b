"""The target's choice after every query of a step.

Sampling inverts the distribution's cumulative sum at one uniform number per (seed, position). The choice is thus a
function of seed, position and logits alone: a request draws the same tokens whatever is drafted, batched or preempted,
and a draft is accepted exactly when the target would have drawn it, which keeps the target's distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paceline.engine.transfer import to_device
from paceline.ops.argmax import argmax
from paceline.ops.copy_draft import CopyState, StepTokens
from paceline.types import Sampling

_TOGETHER = 256  # queries whose distributions are worked out at once


@dataclass(frozen=True)
class Row:
    """One request of a step, as the sampler sees it: its queries are `first:last`, its state is at `slot`.

    `prompt_length` is where its output starts; `stops` are the tokens that end it, which `min_tokens` holds back.
    """

    sampling: Sampling
    slot: int
    first: int
    last: int
    prompt_length: int
    seed: int
    stops: tuple[int, ...]


def choose(logits: Tensor, rows: list[Row], step: StepTokens, state: CopyState) -> Tensor:
    """logits [T, V] -> the choices [T] int64. Rows cover all T queries. Works on a copy where it must change logits."""
    if any(row.sampling.adjusts_logits for row in rows):
        logits = logits.to(torch.float32, copy=True)
        for row in rows:
            if row.sampling.adjusts_logits:
                _adjust(logits[row.first : row.last], row, step, state)
    choices = argmax(logits)
    sampled = [row for row in rows if row.sampling.temperature > 0]
    for filters in dict.fromkeys(row.sampling.filters for row in sampled):
        alike = [row for row in sampled if row.sampling.filters == filters]
        queries = np.concatenate([np.arange(row.first, row.last) for row in alike])
        counts = [row.last - row.first for row in alike]
        numbers = np.repeat([(row.slot, _signed(row.seed)) for row in alike], counts, axis=0).T
        places, slots, seeds = to_device([queries, *numbers], torch.int64, logits.device)
        temperatures = to_device(
            np.repeat([row.sampling.temperature for row in alike], counts), torch.float32, logits.device
        )
        positions = (state.end[slots] - state.history_start[slots]).long() + step.depths[places].long()
        for begin in range(0, len(queries), _TOGETHER):
            part = slice(begin, begin + _TOGETHER)
            scaled = logits[places[part]].float() / temperatures[part, None]
            choices[places[part]] = _draw(filtered(scaled, filters), seeds[part], positions[part])
    return choices


def logprobs(logits: Tensor, choices: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of raw logits [T, V]: the choices' log-probabilities [T], and the `count` likeliest, values and tokens [T, count].

    What a grammar forbids has -9999, OpenAI's word for never.
    """
    every = torch.log_softmax(logits.float(), dim=-1).clamp(min=-9999.0)
    top = every.topk(max(count, 1), dim=-1)
    return every.gather(1, choices[:, None])[:, 0], top.values[:, :count], top.indices[:, :count]


def within_margin(logits: Tensor, step: StepTokens, choices: Tensor, first: Tensor, margins: Tensor) -> Tensor:
    """[T] bool: drafted tokens whose logit is at most their request's margin below the choice's.

    first [T] is the index of each query's root, margins [T] its request's margin in nats.
    """
    query = torch.arange(len(first), device=logits.device)
    opens = query - first == step.branch_starts
    parent = torch.where(opens, first, (query - 1).clamp(min=0)).long()
    best = logits.gather(1, choices[:, None])[parent, 0].float()
    drafted = logits[parent, step.tokens].float()
    return best - drafted <= margins


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


def _draw(probabilities: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A token from each row of probabilities [T, V], by its seed [T] and position [T]."""
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform(seeds, positions)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return drawn.clamp(max=probabilities.shape[1] - 1)


def filtered(scaled: Tensor, filters: tuple[int, float, float]) -> Tensor:
    """Probabilities [T, V] of scaled logits after top-k, then top-p, then min-p; filtered tokens get 0."""
    top_k, top_p, min_p = filters
    if top_k and top_k < scaled.shape[-1]:
        least = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = torch.where(scaled < least, float("-inf"), scaled)
    probabilities = torch.softmax(scaled, dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        kept = torch.where(before < top_p, ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, index, kept)
    if min_p > 0:
        least = min_p * probabilities.max(dim=-1, keepdim=True).values
        probabilities = torch.where(probabilities < least, 0.0, probabilities)
    return probabilities


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """[T] float64 in [0, 1): a number for each seed and position, both [T] int64, by the splitmix64 finaliser (Steele, Lea,
    Flood 2014).
    """
    mixed = position * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shift(mixed, shift)) * _signed(factor)
    mixed = mixed ^ _shift(mixed, 31)
    return _shift(mixed, 11).double() * 2.0**-53


def _shift(value: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
