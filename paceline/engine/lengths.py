"""How many tokens each request of a decode step drafts."""

from __future__ import annotations

import functools

from paceline.drafters.base import Drafter
from paceline.drafters.chooser import Acceptance, Probes, choose_each, choose_uniform
from paceline.engine.runner import Runner
from paceline.engine.sequence import Sequence


class DraftLengths:
    """Chooses by the requests' acceptance and the runner's measured costs (drafters/chooser.py)."""

    def __init__(self, runner: Runner, drafter: Drafter) -> None:
        self._runner, self._drafter = runner, drafter
        self._probes = Probes() if drafter.probes else None

    def choose(self, sequences: list[Sequence]) -> list[int]:
        """Draft lengths for a decode step, within the output that each request may still write."""
        lengths = self._runner.draft_lengths
        if len(lengths) == 1:
            return list(lengths) * len(sequences)
        records = [sequence.acceptance for sequence in sequences]
        guessed = self._drafter.guessed
        chosen = self._by_cost(records, lengths)
        if self._probes is not None and self._probes.due(any(guessed(each).depth for each in chosen)):
            chosen = self._by_cost(records, tuple(each for each in lengths if guessed(each).depth))
        if self._runner.uniform:
            return chosen
        return [max(0, min(length, each.room - 1)) for length, each in zip(chosen, sequences, strict=True)]

    def _by_cost(self, records: list[Acceptance], lengths: tuple[int, ...]) -> list[int]:
        """The draft length of each request with the most expected tokens per second."""
        if self._runner.uniform:
            cost = functools.partial(self._runner.step_cost, len(records))
            return [choose_uniform(records, lengths, cost, self._drafter.guessed)] * len(records)
        return choose_each(records, lengths, self._runner.cost, self._drafter.guessed)
