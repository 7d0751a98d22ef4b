"""How many tokens to draft: as many as pay, by what a step costs and by how drafts have fared lately.

A request is in one of five states of agreement with its text; for each a decayed count says how often the first drafted
token is accepted, and how often each one after an accepted one. With f and p these rates, a draft of L tokens is expected
to give 1 + f (1 - p^L) / (1 - p) tokens (Leviathan, Kalman, Matias 2023, with the first token apart). The length with the
most tokens a second wins; where no length beats plain decoding, nothing is drafted, and the free check of the best guess
against the plain choice brings drafting back when the output starts to copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTHS = (0, 8, 16, 32, 64, 128, 256)
LOST_LONG, LOST, SHORT, STEADY, LONG = range(5)
# before anything is seen: the chance that a draft's first token is accepted, and each one after an accepted one
_PRIORS = ((0.1, 0.6), (0.25, 0.8), (0.6, 0.9), (0.9, 0.97), (0.97, 0.995))
_DECAY, _SLOW_DECAY = 0.8, 0.98
_PRIOR_WEIGHT, _PRIOR_WEIGHT_MORE = 2.0, 16.0
_LEAST_GAIN = 1.07
_SUREST = 0.998  # nothing is certain


@dataclass
class _Rate:
    """A decayed count of hits over trials."""

    hits: float
    trials: float

    def __post_init__(self) -> None:
        self.share = self.hits / self.trials if self.trials else 0.0

    def add(self, hits: float, trials: float, decay: float) -> None:
        self.hits = self.hits * decay + hits
        self.trials = self.trials * decay + trials
        self.share = self.hits / self.trials if self.trials else 0.0


@dataclass
class _OwnRate(_Rate):
    """A request's decayed count, with `weight` trials besides at the rate of all requests, which its own soon outweigh."""

    habit: _Rate
    weight: float

    def add(self, hits: float, trials: float, decay: float) -> None:
        super().add(hits, trials, decay)
        self.weight *= decay

    @property
    def value(self) -> float:
        return min((self.hits + self.weight * self.habit.share) / (self.trials + self.weight), _SUREST)


def _learn(
    rates: Sequence[tuple[_Rate, _Rate]], state: int, drafted: int, accepted: int, hit: bool, decay: float
) -> None:
    first, more = rates[state]
    first.add(float(hit or accepted > 0), 1.0, decay)
    if accepted:
        more.add(accepted - 1.0, accepted - 1.0 + (accepted < drafted), decay)


@dataclass
class Acceptance:
    """One request's record. `streak` is the tokens of agreement so far, `lost` the steps since agreement ended; `stand` sets
    both, and the state that follows from them.
    """

    rates: Sequence[tuple[_OwnRate, _OwnRate]]
    streak: int = 0
    lost: int = 0
    state: int = LOST

    def stand(self, streak: int, lost: int = 0) -> None:
        self.streak, self.lost = streak, lost
        if streak == 0:
            self.state = LOST if lost <= 2 else LOST_LONG
        else:
            self.state = SHORT if streak < 8 else STEADY if streak < 32 else LONG

    def expected(self, length: int) -> float:
        """Tokens a step is expected to give with a draft of `length`."""
        first, more = (rate.value for rate in self.rates[self.state])
        return 1.0 + float(_gain(first, more, length))

    def observe(self, state: int, drafted: int, accepted: int, hit: bool, streak: int) -> None:
        """Learns from a step: `accepted` of `drafted`, whether the best guess was right, the streak after it.

        `state` is the one in which the step's draft was decided. On CUDA that is a step before the one it was made in, and
        counting it so keeps what is expected true to what is known when it is.
        """
        _learn(self.rates, state, drafted, accepted, hit, _DECAY)
        self.stand(streak, 0 if streak else self.lost + 1)


class Habits:
    """How drafts fare over many requests, slowly forgotten: what a new request is expected to be like."""

    def __init__(self) -> None:
        self._rates = [(_Rate(8 * f, 8.0), _Rate(32 * p, 32.0)) for f, p in _PRIORS]

    def newcomer(self) -> Acceptance:
        """A record that follows these habits, also as they change, until it knows its own request."""
        rates = [
            (_OwnRate(0.0, 0.0, first, _PRIOR_WEIGHT), _OwnRate(0.0, 0.0, more, _PRIOR_WEIGHT_MORE))
            for first, more in self._rates
        ]
        return Acceptance(rates)

    def observe(self, state: int, drafted: int, accepted: int, hit: bool) -> None:
        _learn(self._rates, state, drafted, accepted, hit, _SLOW_DECAY)


def choose_uniform(records: list[Acceptance], limit: int, cost: Callable[[int], float]) -> int:
    """The one draft length for all; `cost(length)` is the seconds of a step in which every request has length + 1 queries.

    A draft must promise a gain beyond the noise of the estimate: plain decoding wins what is close.
    """
    rates = [record.rates[record.state] for record in records]
    first, more = (np.array([each.value for each in column]) for column in zip(*rates, strict=True))
    costs = {length: cost(length) for length in LENGTHS if length <= limit}
    lengths = np.array([length for length, seconds in costs.items() if seconds < math.inf])
    tokens = len(records) + _gain(first, more, lengths[:, None]).sum(axis=1)
    gains = tokens / np.array([costs[length] for length in lengths])
    gains[0] *= _LEAST_GAIN
    return int(lengths[gains.argmax()])


def _gain(first: Any, more: Any, length: Any) -> Any:
    """Tokens beyond the one of plain decoding that a draft of `length` is expected to give; numbers or arrays."""
    return first * (1 - more**length) / (1 - more)


def choose_each(records: list[Acceptance], limit: int, cost: Callable[[int], float]) -> list[int]:
    """A draft length for each request; `cost(queries)` is the seconds of a step of that many queries in all.

    Maximises tokens over seconds by Dinkelbach's iteration: given a rate, each request takes the length whose tokens
    less rate times its seconds is most.
    """
    lengths = [length for length in LENGTHS if length <= limit]
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
