"""Sampling: a token of each row's distribution, as the first arrival of an exponential race.

Each token arrives after an exponential time divided by its weight; a token is the first with its probability (the
Gumbel-max trick). The times are functions of seed, position and token id alone, so a request draws the same tokens
whatever is drafted, batched or preempted. A drafter that draws from its own logits with the same times proposes the
target's choice with probability at least (1 - D) / (1 + D), where D is the total variation distance of the two
distributions ("Coupling without communication and drafter-invariant speculative decoding", Daliri, Musco, Suresh 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.ops.dispatch import implementation

MIXING = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
TOKEN_MIXING = (0x9E3779B1, 0x7FEB352D, 0x846CA68B)  # multipliers of `_hashed`
SLACK = 1 + 2.0**-20  # on limits compared in float32: more than its rounding
_UNIT = 2.0**-31
_BLOCK = 128  # tokens of the vocabulary whose least is found first
_TOGETHER = 1 << 19  # weights computed at once, but at least one row's: bounds the memory


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


def draw(
    logits: Tensor, best: Tensor, slots: Tensor, positions: Tensor, draws: Draws, tokens: Tensor | None = None
) -> Tensor:
    """The columns [T] int64: drawn from logits [T, V] at positions [T], or `best` [T], the index of each row's largest.

    slots [T] int64 are the rows' slots. Top-k comes first, then top-p of what it leaves, then min-p; tokens exactly as
    likely as the last that a filter keeps are kept, too. tokens [V] int64 are the token ids of the columns, for logits of
    a reduced vocabulary; None: column i is token i.
    """
    return implementation("draw", logits)(logits, best, slots, positions, draws, tokens)


def reference(
    logits: Tensor, best: Tensor, slots: Tensor, positions: Tensor, draws: Draws, tokens: Tensor | None = None
) -> Tensor:
    drawn = best.clone()
    if tokens is None:
        tokens = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    drawing = (draws.filters[slots, 0] > 0).nonzero()[:, 0]
    count = max(1, _TOGETHER // logits.shape[1])
    for begin in range(0, len(drawing), count):
        rows = drawing[begin : begin + count]
        kept = weights(logits[rows], best[rows], draws.filters[slots[rows]])
        keys = row_keys(draws.seeds[slots[rows]], positions[rows])
        drawn[rows] = _first(kept, best[rows], tokens.int(), keys)
    return drawn


def weights(logits: Tensor, best: Tensor, filters: Tensor) -> Tensor:
    """Each token's weight after filters [R, 4], [R, V] float32: 1 for the likeliest, 0 for filtered ones."""
    temperature, top_k, top_p, min_p = filters.T
    logits = logits.float()
    every = torch.exp((logits - logits.gather(1, best[:, None])) / temperature[:, None])
    least = torch.maximum(_least(every, top_k.long(), top_p), min_p)
    return torch.where(every < least[:, None], 0.0, every)


def row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """[R] int64: 64 random bits for each seed and position, both [R] int64.

    They are number `position` of splitmix64 (Steele, Lea, Flood 2014) from that seed.
    """
    mixed = (positions + 1) * signed(MIXING[0]) + seeds
    for shift, factor in ((30, MIXING[1]), (27, MIXING[2])):
        mixed = (mixed ^ _shift(mixed, shift)) * signed(factor)
    return mixed ^ _shift(mixed, 31)


def signed(value: int, bits: int = 64) -> int:
    """The signed integer of the same 64 or 32 bits."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


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


def _first(kept: Tensor, best: Tensor, tokens: Tensor, keys: Tensor) -> Tensor:
    """The columns [R] of the first arrivals, of weights [R, V] that are largest, 1, at `best` [R]; tokens [V] int32.

    A time is the inverse of the exponential distribution at a number of 62 random bits, so no chance is off by more than
    2**-62 and float64's rounding. The first 31 bits are a lower bound of the time. It suffices to drop, in float32, the
    columns that cannot come before `best`.
    """
    count, vocab = kept.shape
    first, second = keys.int()[:, None], (keys >> 32).int()[:, None]
    coarse = _hashed(tokens, first, second)
    limit = -torch.log1p(-_UNIT * (coarse.gather(1, best[:, None]).double() + 1)).clamp(min=-64)
    late = coarse.float().addcmul_(kept, (limit * (SLACK / _UNIT)).float(), value=-1)
    blocks = torch.nn.functional.pad(late, (0, -vocab % _BLOCK)).view(count, -1, _BLOCK)
    row, block = (blocks.amin(dim=-1) < 0).nonzero(as_tuple=True)
    found, inside = (blocks[row, block] < 0).nonzero(as_tuple=True)
    row, column = row[found], block[found] * _BLOCK + inside
    fine = _hashed(tokens[column], second[row, 0], first[row, 0])
    number = (coarse[row, column].double() + (fine.double() + 0.5) * _UNIT) * _UNIT
    arrivals = -torch.log1p(-number) / kept[row, column].double()
    earliest = torch.full_like(limit[:, 0], float("inf")).scatter_reduce(0, row, arrivals, "amin")
    winning = arrivals <= earliest[row]
    return best.scatter(0, row[winning], column[winning])


def _hashed(tokens: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """31 random bits as int32, for token ids and the halves of their rows' keys, all int32 of shapes that broadcast.

    The multipliers and shifts are those of lowbias32 (Wellons, hash-prospector, 2018); the keys are added.
    """
    weyl, *factors = (signed(factor, 32) for factor in TOKEN_MIXING)
    mixed = tokens * weyl + first
    mixed ^= (mixed >> 16).bitwise_and_(0xFFFF)
    mixed *= factors[0]
    mixed += second
    mixed ^= (mixed >> 15).bitwise_and_(0x1FFFF)
    mixed *= factors[1]
    mixed ^= mixed >> 16  # the sign alters bits that are random without it
    mixed &= 0x7FFFFFFF
    return mixed


def _shift(value: Tensor, bits: int) -> Tensor:
    """A logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
