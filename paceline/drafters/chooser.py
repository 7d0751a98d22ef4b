"""Draft lengths by expected tokens per second, from measured step costs and recent acceptance.

A request is in one of five states of agreement with its text. For each state, decayed counts give the rate f at which the
first drafted token is accepted, and the rate p at which each one after an accepted one is. A draft of L tokens then has
1 + f (1 - p^L) / (1 - p) expected tokens (Leviathan, Kalman, Matias 2023, with the first token apart). The length with the
most tokens per second wins. Where no length beats plain decoding, nothing is drafted; the drafter's best guess is still
compared with the target's choice at no cost, which restores drafting when the output starts to copy.

A trained drafter's tokens have a sixth pair of rates. Of a draft with tokens of both drafters, the better one's count.

The priors and decays of copying and the least gain were set with `python -m benchmarks.apply` and `python -m
benchmarks.decode`; those of trained drafters are not tuned yet (`python -m benchmarks.speculate` shows their effect).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from paceline.ops.join_drafts import SURVIVAL

LOST_LONG, LOST, SHORT, STEADY, LONG, MODEL = range(6)  # MODEL: the rates of a trained drafter's tokens, in any state
Priors = tuple[tuple[float, float], ...]
# By state, before any observation: the rates at which a draft's first token and each one after an accepted one are
# accepted. Of the copy drafter, whose states these are:
COPY_PRIORS: Priors = ((0.1, 0.6), *SURVIVAL)
NOTHING_COPIED: Priors = ((0.0, 0.0),) * 5  # of a drafter that never copies
_DECAY, _MODEL_DECAY, _GLOBAL_DECAY = 0.8, 0.95, 0.98
_PRIOR_WEIGHT, _PRIOR_WEIGHT_MORE = 2.0, 16.0  # trials that the rates of all requests count for
# The same of a trained drafter's rates: its tokens are about as often right in one step as in the next.
_MODEL_WEIGHT = 16.0
_LEAST_GAIN = 1.07
_MAX_RATE = 0.998
_PATIENCE, _MOST_PATIENCE = 16, 256  # steps without drafts before one is tried


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


class Observation(NamedTuple):
    """What a step says of the drafter: `accepted` of `drafted`, and whether the best guess was correct.

    `state` is the state in which the draft's length was chosen. On CUDA that is one step earlier than the state in which it
    was drafted, and rates recorded by it predict what the chooser needs to know. Of a joint draft `model_accepted` of
    `model_drafted` tokens are the trained drafter's; `accepted` is of both drafters, so of copying only the guess counts.
    """

    state: int
    drafted: int
    accepted: int
    guess_correct: bool
    model_drafted: int = 0
    model_accepted: int = 0


def _observe(rates: Sequence[tuple[_Rate, _Rate]], step: Observation, decay: float) -> None:
    if step.model_drafted:
        _learn(rates, step.state, 0, 0, step.guess_correct, decay)
        _learn(rates, MODEL, step.model_drafted, step.model_accepted, False, max(decay, _MODEL_DECAY))
    else:
        _learn(rates, step.state, step.drafted, step.accepted, step.guess_correct, decay)


class Guessed(NamedTuple):
    """What a trained drafter gives for a draft: a chain of `depth` tokens, and others beside it.

    `beside` is the chance that one of the others is right where the chain is wrong; `continues` whether more follow it.
    """

    depth: int
    beside: float = 0.0
    continues: bool = False


NOT_GUESSED = Guessed(0)
OfLength = Callable[[int], Guessed]


def _not_guessed(length: int) -> Guessed:
    return NOT_GUESSED


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

    def expected(self, length: int, guessed: Guessed = NOT_GUESSED) -> float:
        """Expected tokens of a step with a draft of `length`; of a joint one what the better of the two drafters gives."""
        first, more = (rate.value for rate in self.rates[self.state])
        gain = float(_gain(first, more, length))
        if guessed.depth:
            first, more = (rate.value for rate in self.rates[MODEL])
            gain = max(gain, float(_gain_guessed(first, more, *guessed)))
        return 1.0 + gain

    def observe(self, step: Observation, streak: int) -> None:
        """Learns from a step, after which the streak is `streak`."""
        _observe(self.rates, step, _DECAY)
        self.set_streak(streak, 0 if streak else self.lost + 1)


class GlobalAcceptance:
    """Acceptance rates over all requests, slowly decayed: the prior of a new request."""

    def __init__(self, priors: Priors = COPY_PRIORS, model: tuple[float, float] = (0.0, 0.0)) -> None:
        """`model` are the priors of a joint draft's tokens of a trained drafter."""
        self._rates = [(_Rate(8 * f, 8.0), _Rate(32 * p, 32.0)) for f, p in (*priors, model)]

    def new_request(self) -> Acceptance:
        """A record that uses these rates, also as they change, until the request has enough observations of its own."""
        weights = [(_PRIOR_WEIGHT, _PRIOR_WEIGHT_MORE)] * MODEL + [(_MODEL_WEIGHT, _MODEL_WEIGHT)]
        rates = [
            (_RequestRate(0.0, 0.0, first, weight), _RequestRate(0.0, 0.0, more, weight_more))
            for (first, more), (weight, weight_more) in zip(self._rates, weights, strict=True)
        ]
        return Acceptance(rates)

    def observe(self, step: Observation) -> None:
        _observe(self._rates, step, _GLOBAL_DECAY)


class Probes:
    """When to draft though it does not seem to pay, for a drafter that learns from its drafts alone.

    After 16 steps without any draft, then 32, and so on up to 256 while the drafts that are tried do not pay either.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._patience = _PATIENCE

    def due(self, drafted: bool) -> bool:
        """Counts a step, in which something is drafted or not; whether it shall draft in the second case."""
        if drafted:
            self._steps, self._patience = 0, _PATIENCE
            return False
        self._steps += 1
        if self._steps < self._patience:
            return False
        self._steps, self._patience = 0, min(2 * self._patience, _MOST_PATIENCE)
        return True


def choose_uniform(
    records: list[Acceptance], lengths: Sequence[int], cost: Callable[[int], float], guessed: OfLength = _not_guessed
) -> int:
    """One draft length for all requests, of `lengths`; 0 where none of them is possible.

    `cost(length)` is the seconds of a step in which every request has length + 1 queries; `guessed(length)` what a trained
    drafter gives. A draft must gain more than the noise of the estimate over plain decoding.
    """
    first, more = _values([record.rates[record.state] for record in records])
    costs = {length: cost(length) for length in lengths}
    possible = np.array([length for length, seconds in costs.items() if seconds < math.inf])
    if not len(possible):
        return 0
    gain = _gain(first, more, possible[:, None])
    columns = [np.array(column)[:, None] for column in zip(*map(guessed, possible.tolist()), strict=True)]
    if columns[0].any():
        first, more = _values([record.rates[MODEL] for record in records])
        gain = np.maximum(gain, np.where(columns[0] > 0, _gain_guessed(first, more, *columns), 0.0))
    tokens = len(records) + gain.sum(axis=1)
    gains = tokens / np.array([costs[length] for length in possible])
    gains[possible == 0] *= _LEAST_GAIN
    return int(possible[gains.argmax()])


def _values(rates: Sequence[tuple[_RequestRate, _RequestRate]]) -> Any:
    """The first and second values of pairs of rates, [2, B]."""
    return np.array([[first.value, more.value] for first, more in rates]).T


def _gain_guessed(first: Any, more: Any, depth: Any, beside: Any, continues: Any) -> Any:
    """`_gain` of a chain of guesses, with that of the tokens beside it where it is wrong."""
    ended = _gain(first, more, depth) + beside * (1 - first * more ** np.maximum(depth - 1, 0))
    first, more = (rate + (1 - rate) * beside for rate in (first, more))
    return np.where(continues, _gain(first, np.minimum(more, _MAX_RATE), depth), ended)


def _gain(first: Any, more: Any, length: Any) -> Any:
    """Expected tokens of a draft of `length` beyond the one of plain decoding; numbers or arrays."""
    return first * (1 - more**length) / (1 - more)


def choose_each(
    records: list[Acceptance],
    lengths: Sequence[int],
    cost: Callable[[int, int], float],
    guessed: OfLength = _not_guessed,
) -> list[int]:
    """A draft length for each request, of `lengths`.

    `cost(queries, depth)` is the seconds of a step of that many queries in all, with so many guesses of a trained drafter.
    The passes of a trained drafter serve all requests at once, so the best choice is found for each depth that they may
    have, and the one with the most tokens per second wins.
    """
    best, best_rate = [0] * len(records), 0.0
    for depth in sorted({guessed(length).depth for length in lengths}):
        allowed = [length for length in lengths if guessed(length).depth <= depth]
        chosen = _choose_at(records, allowed, functools.partial(_at_depth, cost, depth), guessed)
        deepest = max(guessed(length).depth for length in chosen)
        rate = _tokens(records, chosen, guessed) / cost(len(records) + sum(chosen), deepest)
        if rate > best_rate:
            best, best_rate = chosen, rate
    return best


def _choose_at(
    records: list[Acceptance], lengths: Sequence[int], cost: Callable[[int], float], guessed: OfLength
) -> list[int]:
    """`choose_each` where a step's cost depends on its queries alone.

    By Dinkelbach's iteration: at a given rate, each request takes the length with the largest difference of its expected
    tokens and rate times its seconds.
    """
    count = len(records)
    chosen = [lengths[0]] * count
    for _ in range(4):
        queries = count + sum(chosen)
        rate = _tokens(records, chosen, guessed) / cost(queries)
        update = []
        for index, record in enumerate(records):
            others = queries - chosen[index]

            def value(length: int, record: Acceptance = record, others: int = others, rate: float = rate) -> float:
                return record.expected(length, guessed(length)) - rate * (cost(others + length) - cost(others))

            update.append(max(lengths, key=value))
        if update == chosen:
            break
        chosen = update
    return chosen


def _at_depth(cost: Callable[[int, int], float], depth: int, queries: int) -> float:
    return cost(queries, depth)


def _tokens(records: list[Acceptance], chosen: list[int], guessed: OfLength) -> float:
    return sum(record.expected(length, guessed(length)) for record, length in zip(records, chosen, strict=True))
