"""How many tokens each request of a decode step drafts."""

from __future__ import annotations

import functools

from paceline.drafters.base import Drafter
from paceline.drafters.chooser import (
    Acceptance,
    GlobalAcceptance,
    Observation,
    Probes,
    choose_each,
    choose_uniform,
    keep_expected,
)
from paceline.engine.in_flight import InFlightStep, StepResult
from paceline.engine.runner import Runner
from paceline.engine.sequence import Sequence
from paceline.ops import verify


class DraftLengths:
    """Chooses by the requests' acceptance, which it records, and the runner's measured costs (drafters/chooser.py)."""

    def __init__(self, runner: Runner, drafter: Drafter, global_acceptance: dict[bool, GlobalAcceptance]) -> None:
        """`global_acceptance` are the records over all requests, by whether these have sources."""
        self._runner, self._drafter, self._global_acceptance = runner, drafter, global_acceptance
        self._probes = Probes() if drafter.probes else None
        self._plain_probes = None if runner.uniform else Probes()  # graphs are timed beforehand

    def observe(self, sequence: Sequence, result: StepResult) -> None:
        """Learns from what a step gave a sequence."""
        records_guesses, row = self._drafter.records_guesses, result.row
        if result.length or records_guesses:
            guess_correct = records_guesses and bool(row[verify.GUESS_CORRECT])
            of_model = row[verify.MODEL_DRAFTED], row[verify.MODEL_ACCEPTED]
            observed = Observation(
                result.state,
                row[verify.NUM_DRAFTED],
                len(result.tokens) - 1,
                guess_correct,
                *of_model,
                expected=result.expected if result.length else 0.0,
            )
            self._add(sequence, observed, row[verify.STREAK])

    def observe_plain(self, step: InFlightStep) -> None:
        """Learns from a plain step: whether the drafter's first guesses were right."""
        if self._drafter.records_guesses:
            correct, streaks = step.column(verify.GUESS_CORRECT), step.column(verify.STREAK)
            entries = zip(step.sequences, step.epochs, step.states, correct, streaks, strict=False)
            for sequence, epoch, state, is_correct, streak in entries:
                if sequence.epoch == epoch:
                    self._add(sequence, Observation(state, 0, 0, bool(is_correct)), streak)

    def _add(self, sequence: Sequence, observed: Observation, streak: int) -> None:
        self._global_acceptance[bool(sequence.request.sources)].observe(observed)
        sequence.acceptance.observe(observed, streak)

    def choose(self, sequences: list[Sequence]) -> list[int]:
        """Draft lengths for a decode step, within the output that each request may still write."""
        lengths = self._runner.draft_lengths
        if len(lengths) == 1:
            return list(lengths) * len(sequences)
        records = [sequence.acceptance for sequence in sequences]
        guessed = self._drafter.guessed
        chosen = self._by_cost(records, lengths)
        trained = tuple(each for each in lengths if guessed(each).depth)
        if self._probes is not None and trained and self._probes.due(any(each in trained for each in chosen)):
            chosen = self._by_cost(records, trained)
        if self._plain_probes is not None and self._plain_probes.due(not any(chosen)):
            chosen = [0] * len(chosen)  # else the cost of a plain step would stay what it was when one last ran
        if not self._runner.uniform:
            chosen = [max(0, min(length, each.room - 1)) for length, each in zip(chosen, sequences, strict=True)]
        keep_expected(records, chosen, guessed)
        return chosen

    def _by_cost(self, records: list[Acceptance], lengths: tuple[int, ...]) -> list[int]:
        """The draft length of each request with the most expected tokens per second."""
        if self._runner.uniform or len(records) == 1:
            cost = functools.partial(self._runner.step_cost, len(records))
            return [choose_uniform(records, lengths, cost, self._drafter.guessed)] * len(records)
        return choose_each(records, lengths, self._runner.cost, self._drafter.guessed)
