"""Draft lengths by expected tokens per second, from measured step costs and recent acceptance.

A request is in one of five states of agreement with its text. For each state, decayed counts give the rate f at which the
first drafted token is accepted, and the rate p at which each one after an accepted one is. A draft of L tokens then has
1 + f (1 - p^L) / (1 - p) expected tokens (Leviathan, Kalman, Matias 2023, with the first token apart). The length with the
most tokens per second wins. Where no length beats plain decoding, nothing is drafted; the drafter's best guess is still
compared with the target's choice at no cost, which restores drafting when the output starts to copy.

A trained drafter's tokens have a sixth pair of rates. Of a draft with tokens of both drafters, the better one's count.

What drafts gained over what they were expected to gain is counted too, and scales later expectations down. It takes in what
the rates cannot say, and that the best of many uncertain estimates is too high.

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
# Of accepted over expected tokens: the expected tokens that all requests' share counts for, the decay of a request's own
# counts, and the least share, with which a draft that is nearly certain is still tried.
_TRUST_WEIGHT, _TRUST_DECAY, _LEAST_TRUST = 8.0, 0.95, 0.3
_LEAST_GAIN = 1.07
_MAX_RATE = 0.998
_PATIENCE, _MOST_PATIENCE = 16, 256  # steps before another choice is tried


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
    `expected` is how many tokens of the draft should be accepted by the rates; 0 where that is not known.
    """

    state: int
    drafted: int
    accepted: int
    guess_correct: bool
    model_drafted: int = 0
    model_accepted: int = 0
    expected: float = 0.0


def _observe(rates: Sequence[tuple[_Rate, _Rate]], step: Observation, decay: float) -> None:
    if step.model_drafted:
        _learn(rates, step.state, 0, 0, step.guess_correct, decay)
        _learn(rates, MODEL, step.model_drafted, step.model_accepted, False, max(decay, _MODEL_DECAY))
    else:
        _learn(rates, step.state, step.drafted, step.accepted, step.guess_correct, decay)


class Guessed(NamedTuple):
    """What a trained drafter gives for a draft: a chain of `depth` tokens, and others beside it.

    `beside` is the chance that one of the others is right where the chain is wrong, as a share of the chance of a token of
    the chain; `continues` whether more follow it. Where a drafter is often wrong, its other candidates are too.
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

    `set_streak` sets both and `state`, which follows from them. `trust` is the share of expected tokens that are accepted, and
    `expected` what the last draft was expected to have accepted by the rates alone.
    """

    rates: Sequence[tuple[_RequestRate, _RequestRate]]
    trust: _RequestRate
    expected: float = 0.0
    streak: int = 0
    lost: int = 0
    state: int = LOST

    def set_streak(self, streak: int, lost: int = 0) -> None:
        self.streak, self.lost = streak, lost
        if streak == 0:
            self.state = LOST if lost <= 2 else LOST_LONG
        else:
            self.state = SHORT if streak < 8 else STEADY if streak < 32 else LONG

    def observe(self, step: Observation, streak: int) -> None:
        """Learns from a step, after which the streak is `streak`."""
        _observe(self.rates, step, _DECAY)
        if step.expected:
            self.trust.add(step.accepted, step.expected, _TRUST_DECAY)
        self.set_streak(streak, 0 if streak else self.lost + 1)


class GlobalAcceptance:
    """Acceptance rates over all requests, slowly decayed: the prior of a new request."""

    def __init__(self, priors: Priors = COPY_PRIORS, model: tuple[float, float] = (0.0, 0.0)) -> None:
        """`model` are the priors of a joint draft's tokens of a trained drafter."""
        self._rates = [(_Rate(8 * f, 8.0), _Rate(32 * p, 32.0)) for f, p in (*priors, model)]
        self._trust = _Rate(_TRUST_WEIGHT, _TRUST_WEIGHT)

    def new_request(self) -> Acceptance:
        """A record that uses these rates, also as they change, until the request has enough observations of its own."""
        weights = [(_PRIOR_WEIGHT, _PRIOR_WEIGHT_MORE)] * MODEL + [(_MODEL_WEIGHT, _MODEL_WEIGHT)]
        rates = [
            (_RequestRate(0.0, 0.0, first, weight), _RequestRate(0.0, 0.0, more, weight_more))
            for (first, more), (weight, weight_more) in zip(self._rates, weights, strict=True)
        ]
        return Acceptance(rates, _RequestRate(0.0, 0.0, self._trust, _TRUST_WEIGHT))

    def observe(self, step: Observation) -> None:
        _observe(self._rates, step, _GLOBAL_DECAY)
        if step.expected:
            self._trust.add(step.accepted, step.expected, _GLOBAL_DECAY)


class Probes:
    """When to try what does not seem to pay and is known from trying alone, such as a drafter that learns from its drafts.

    After 16 steps without it, then 32, and so on up to 256 while it does not pay either.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._patience = _PATIENCE

    def due(self, chosen: bool) -> bool:
        """Counts a step, for which it was chosen or not; whether to try it in the second case."""
        if chosen:
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
    costs = {length: cost(length) for length in lengths}
    possible = [length for length, seconds in costs.items() if seconds < math.inf]
    if not possible:
        return 0
    rates = _expected(records, possible, guessed).sum(axis=1) / np.array([costs[length] for length in possible])
    rates[np.array(possible) == 0] *= _LEAST_GAIN
    return possible[rates.argmax()]


def _expected(records: list[Acceptance], lengths: Sequence[int], guessed: OfLength) -> Any:
    """Expected tokens [L, B] of a step with a draft of each length."""
    trust = np.array([max(record.trust.value, _LEAST_TRUST) for record in records])
    return 1.0 + trust * _gains(records, lengths, guessed)


def _gains(records: list[Acceptance], lengths: Sequence[int], guessed: OfLength) -> Any:
    """Tokens [L, B] beyond plain decoding by the rates alone; of a joint draft what the better of the two drafters gives."""
    first, more = _values([record.rates[record.state] for record in records])
    gain = _gain(first, more, np.array(lengths)[:, None])
    columns = [np.array(column)[:, None] for column in zip(*map(guessed, lengths), strict=True)]
    if columns[0].any():
        first, more = _values([record.rates[MODEL] for record in records])
        gain = np.maximum(gain, np.where(columns[0] > 0, _gain_guessed(first, more, *columns), 0.0))
    return gain


def keep_expected(records: list[Acceptance], chosen: Sequence[int], guessed: OfLength = _not_guessed) -> None:
    """Sets `expected` of each request's record for the draft length that was chosen for it."""
    lengths = sorted(set(chosen))
    gains = _gains(records, lengths, guessed) if any(chosen) else np.zeros((len(lengths), len(records)))
    for index, (record, length) in enumerate(zip(records, chosen, strict=True)):
        record.expected = float(gains[lengths.index(length), index])


def _values(rates: Sequence[tuple[_RequestRate, _RequestRate]]) -> Any:
    """The first and second values of pairs of rates, [2, B]."""
    return np.array([[first.value, more.value] for first, more in rates]).T


def _gain_guessed(first: Any, more: Any, depth: Any, beside: Any, continues: Any) -> Any:
    """`_gain` of a chain of guesses, with that of the tokens beside it where it is wrong."""
    ended = _gain(first, more, depth) + beside * first * (1 - first * more ** np.maximum(depth - 1, 0))
    first, more = (rate + (1 - rate) * rate * beside for rate in (first, more))
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
    have, and the one with the most tokens per second wins. Guesses must gain more than the noise of the estimate.
    """
    lengths = sorted(lengths)
    expected = _expected(records, lengths, guessed).T.tolist()
    depths = [guessed(length).depth for length in lengths]
    cost = functools.cache(cost)
    best, best_rate = [0] * len(records), 0.0
    for depth in sorted(set(depths)):
        allowed = [index for index, each in enumerate(depths) if each <= depth]
        chosen = _choose_at(expected, lengths, allowed, functools.partial(_at_depth, cost, depth))
        queries = len(records) + sum(lengths[index] for index in chosen)
        deepest = max(depths[index] for index in chosen)
        rate = _tokens(expected, chosen) / cost(queries, deepest) * (1 if deepest else _LEAST_GAIN)
        if rate > best_rate:
            best, best_rate = [lengths[index] for index in chosen], rate
    return best


def _choose_at(
    expected: list[list[float]], lengths: Sequence[int], allowed: list[int], cost: Callable[[int], float]
) -> list[int]:
    """`choose_each` where a step's cost depends on its queries alone, of the lengths at the places `allowed`; the places.

    `expected` are each request's tokens by length. By Dinkelbach's iteration: at a given rate, each request takes the length
    with the largest difference of its expected tokens and rate times its seconds.
    """
    count = len(expected)
    chosen = [allowed[0]] * count
    for _ in range(4):
        queries = count + sum(lengths[index] for index in chosen)
        rate = _tokens(expected, chosen) / cost(queries)
        update = []
        for tokens, before in zip(expected, chosen, strict=True):
            others = queries - lengths[before]
            values = [(tokens[index] - rate * cost(others + lengths[index]), -index) for index in allowed]
            update.append(-max(values)[1])
        if update == chosen:
            break
        chosen = update
    return chosen


def _at_depth(cost: Callable[[int, int], float], depth: int, queries: int) -> float:
    return cost(queries, depth)


def _tokens(expected: list[list[float]], chosen: list[int]) -> float:
    return sum(tokens[index] for tokens, index in zip(expected, chosen, strict=True))
