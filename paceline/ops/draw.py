"""Sampling: a token of each row's distribution, by inverting its cumulative sum at one uniform number.

The number is a function of seed and position alone, so a request draws the same tokens whatever is drafted, batched or
preempted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation

MIXING = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_BLOCK = 128  # tokens of the vocabulary summed together, before the search within one block
_TOGETHER = 256  # rows whose distributions are computed at once: bounds the memory


@dataclass(frozen=True)
class Draws:
    """How each slot draws: seeds [S] int64; filters [S, 4] float32: temperature (0: the slot takes the largest logit),
    top-k (0: off), top-p (1: off), min-p (0: off).
    """

    seeds: Tensor
    filters: Tensor

    @classmethod
    def empty(cls, num_slots: int, device: torch.device) -> Draws:
        filters = torch.zeros(num_slots, 4, device=device)
        return cls(torch.zeros(num_slots, dtype=torch.int64, device=device), filters)


def draw(logits: Tensor, best: Tensor, slots: Tensor, positions: Tensor, draws: Draws) -> Tensor:
    """The tokens [T] int64: drawn from logits [T, V] at positions [T], or `best` [T], the index of each row's largest.

    slots [T] int64 are the rows' slots. Top-k comes first, then top-p of what it leaves, then min-p; tokens exactly as
    likely as the last that a filter keeps are kept, too.
    """
    return implementation("draw", logits)(logits, best, slots, positions, draws)


def reference(logits: Tensor, best: Tensor, slots: Tensor, positions: Tensor, draws: Draws) -> Tensor:
    drawn = best.clone()
    drawing = (draws.filters[slots, 0] > 0).nonzero()[:, 0]
    for begin in range(0, len(drawing), _TOGETHER):
        rows = drawing[begin : begin + _TOGETHER]
        kept = weights(logits[rows], best[rows], draws.filters[slots[rows]])
        drawn[rows] = _inverted(kept, uniform(draws.seeds[slots[rows]], positions[rows]))
    return drawn


def weights(logits: Tensor, best: Tensor, filters: Tensor) -> Tensor:
    """Each token's weight after filters [R, 4], [R, V] float32: 1 for the likeliest, 0 for filtered ones."""
    temperature, top_k, top_p, min_p = filters.T
    logits = logits.float()
    every = torch.exp((logits - logits.gather(1, best[:, None])) / temperature[:, None])
    least = torch.maximum(_least(every, top_k.long(), top_p), min_p)
    return torch.where(every < least[:, None], 0.0, every)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """[R] float64 in [0, 1): a number for each seed and position, both [R] int64.

    By the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    mixed = positions * signed(MIXING[0]) + seeds
    for shift, factor in ((30, MIXING[1]), (27, MIXING[2])):
        mixed = (mixed ^ _shift(mixed, shift)) * signed(factor)
    mixed = mixed ^ _shift(mixed, 31)
    return _shift(mixed, 11).double() * 2.0**-53


def signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _least(every: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The least weight [R] that top-k and top-p keep, of weights [R, V]."""
    vocab = every.shape[1]
    limits, nucleus = (top_k > 0) & (top_k < vocab), top_p < 1
    least = every.new_zeros(len(every))
    if not bool((limits | nucleus).any()):
        return least
    most = vocab if bool((nucleus & ~limits).any()) else int(top_k[limits].max())
    ordered = every.topk(most, dim=-1).values
    last = torch.where(limits, top_k, 1) - 1
    least = torch.where(limits, ordered.gather(1, last[:, None])[:, 0], least)
    if bool(nucleus.any()):
        sums = torch.where(every < least[:, None], 0.0, every).sum(dim=-1, dtype=torch.float64)
        before = ordered.double().cumsum(dim=-1) - ordered
        last = (before < (top_p.double() * sums)[:, None]).sum(dim=-1).clamp(min=1) - 1
        least = torch.where(nucleus, torch.maximum(least, ordered.gather(1, last[:, None])[:, 0]), least)
    return least


def _inverted(kept: Tensor, numbers: Tensor) -> Tensor:
    """The token [R] at which the cumulative sum of weights [R, V] first exceeds `numbers` [R] times their total.

    Finds the block of the vocabulary first, then the token within it.
    """
    count, vocab = kept.shape
    blocks = torch.nn.functional.pad(kept, (0, -vocab % _BLOCK)).view(count, -1, _BLOCK)
    ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = numbers[:, None] * ends[:, -1:]
    block = _first_above(ends, target)
    rest = target - ends.gather(1, (block - 1).clamp(min=0)) * (block > 0)
    inside = blocks[torch.arange(count, device=blocks.device), block[:, 0]].double().cumsum(dim=-1)
    return (block * _BLOCK + _first_above(inside, rest))[:, 0].clamp(max=vocab - 1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """The first index [R, 1] at which non-decreasing sums [R, N] exceed target [R, 1], or else reach their last value."""
    under_all = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(sums, torch.minimum(target, under_all), right=True).clamp(max=sums.shape[1] - 1)


def _shift(value: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
