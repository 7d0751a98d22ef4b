"""Draft lengths by expected tokens per second, from measured step costs and recent acceptance.

A request is in one of five states of agreement with its text. For each state, decayed counts give the rate f at which the
first drafted token is accepted, and the rate p at which each one after an accepted one is. A draft of L tokens then has
1 + f (1 - p^L) / (1 - p) expected tokens (Leviathan, Kalman, Matias 2023, with the first token apart). The length with the
most tokens per second wins. Where no length beats plain decoding, nothing is drafted; the drafter's best guess is still
compared with the target's choice at no cost, which restores drafting when the output starts to copy.

The priors, decays and the least gain were set with `python -m benchmarks.apply` and `python -m benchmarks.decode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LOST_LONG, LOST, SHORT, STEADY, LONG = range(5)
# before any observation: the rates at which a draft's first token and each one after an accepted one are accepted
_PRIORS = ((0.1, 0.6), (0.25, 0.8), (0.6, 0.9), (0.9, 0.97), (0.97, 0.995))
_DECAY, _GLOBAL_DECAY = 0.8, 0.98
_PRIOR_WEIGHT, _PRIOR_WEIGHT_MORE = 2.0, 16.0  # trials that the rates of all requests count for
_LEAST_GAIN = 1.07
_MAX_RATE = 0.998


@dataclass
class _Rate:
    """A decayed count of accepted tokens over trials."""

    accepted: float
    trials: float

    def __post_init__(self) -> None:
        self.share = self.accepted / self.trials if self.trials else 0.0

    def add(self, accepted: float, trials: float, decay: float) -> None:
        self.accepted = self.accepted * decay + accepted
        self.trials = self.trials * decay + trials
        self.share = self.accepted / self.trials if self.trials else 0.0


@dataclass
class _RequestRate(_Rate):
    """A request's decayed count, with `weight` more trials at the rate of all requests; the weight decays as its own come."""

    global_rate: _Rate
    weight: float

    def add(self, accepted: float, trials: float, decay: float) -> None:
        super().add(accepted, trials, decay)
        self.weight *= decay

    @property
    def value(self) -> float:
        known = self.accepted + self.weight * self.global_rate.share
        return min(known / (self.trials + self.weight), _MAX_RATE)


def _learn(
    rates: Sequence[tuple[_Rate, _Rate]], state: int, drafted: int, accepted: int, guess_correct: bool, decay: float
) -> None:
    first, more = rates[state]
    first.add(float(guess_correct or accepted > 0), 1.0, decay)
    if accepted:
        more.add(accepted - 1.0, accepted - 1.0 + (accepted < drafted), decay)


@dataclass
class Acceptance:
    """One request's acceptance record. `streak` counts the tokens of agreement so far, `lost` the steps since agreement ended.

    `set_streak` sets both and `state`, which follows from them.
    """

    rates: Sequence[tuple[_RequestRate, _RequestRate]]
    streak: int = 0
    lost: int = 0
    state: int = LOST

    def set_streak(self, streak: int, lost: int = 0) -> None:
        self.streak, self.lost = streak, lost
        if streak == 0:
            self.state = LOST if lost <= 2 else LOST_LONG
        else:
            self.state = SHORT if streak < 8 else STEADY if streak < 32 else LONG

    def expected(self, length: int) -> float:
        """Expected tokens of a step with a draft of `length`."""
        first, more = (rate.value for rate in self.rates[self.state])
        return 1.0 + float(_gain(first, more, length))

    def observe(self, state: int, drafted: int, accepted: int, guess_correct: bool, streak: int) -> None:
        """Learns from a step: `accepted` of `drafted`, whether the best guess was correct, the streak after it.

        `state` is the state in which the draft's length was chosen. On CUDA that is one step earlier than the state in
        which it was drafted, and rates recorded by it predict what the chooser needs to know.
        """
        _learn(self.rates, state, drafted, accepted, guess_correct, _DECAY)
        self.set_streak(streak, 0 if streak else self.lost + 1)


class GlobalAcceptance:
    """Acceptance rates over all requests, slowly decayed: the prior of a new request."""

    def __init__(self) -> None:
        self._rates = [(_Rate(8 * f, 8.0), _Rate(32 * p, 32.0)) for f, p in _PRIORS]

    def new_request(self) -> Acceptance:
        """A record that uses these rates, also as they change, until the request has enough observations of its own."""
        rates = [
            (_RequestRate(0.0, 0.0, first, _PRIOR_WEIGHT), _RequestRate(0.0, 0.0, more, _PRIOR_WEIGHT_MORE))
            for first, more in self._rates
        ]
        return Acceptance(rates)

    def observe(self, state: int, drafted: int, accepted: int, guess_correct: bool) -> None:
        _learn(self._rates, state, drafted, accepted, guess_correct, _GLOBAL_DECAY)


def choose_uniform(records: list[Acceptance], lengths: Sequence[int], cost: Callable[[int], float]) -> int:
    """One draft length for all requests, of `lengths` (0 first).

    `cost(length)` is the seconds of a step in which every request has length + 1 queries. A draft must gain more than the
    noise of the estimate over plain decoding.
    """
    rates = [record.rates[record.state] for record in records]
    first, more = (np.array([each.value for each in column]) for column in zip(*rates, strict=True))
    costs = {length: cost(length) for length in lengths}
    possible = np.array([length for length, seconds in costs.items() if seconds < math.inf])
    tokens = len(records) + _gain(first, more, possible[:, None]).sum(axis=1)
    gains = tokens / np.array([costs[length] for length in possible])
    gains[0] *= _LEAST_GAIN
    return int(possible[gains.argmax()])


def _gain(first: Any, more: Any, length: Any) -> Any:
    """Expected tokens of a draft of `length` beyond the one of plain decoding; numbers or arrays."""
    return first * (1 - more**length) / (1 - more)


def choose_each(records: list[Acceptance], lengths: Sequence[int], cost: Callable[[int], float]) -> list[int]:
    """A draft length for each request, of `lengths`; `cost(queries)` is the seconds of a step of that many queries in all.

    Maximises tokens per second by Dinkelbach's iteration: at a given rate, each request takes the length with the largest
    difference of its expected tokens and rate times its seconds.
    """
    count = len(records)
    chosen = [0] * count
    for _ in range(4):
        queries = count + sum(chosen)
        rate = sum(record.expected(length) for record, length in zip(records, chosen, strict=True)) / cost(queries)
        update = []
        for index, record in enumerate(records):
            others = queries - chosen[index]
            update.append(
                max(lengths, key=lambda length: record.expected(length) - rate * (cost(others + length) - cost(others)))
            )
        if update == chosen:
            break
        chosen = update
    return chosen
