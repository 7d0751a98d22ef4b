"""An in-flight step: launched on the device, its results not read yet."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.drafters.chooser import Observation
from paceline.engine.sequence import Sequence
from paceline.ops import verify
from paceline.types import TokenLogprob


@dataclass(slots=True)
class StepResult:
    """What one step gave one sequence.

    tokens    those that it wrote: accepted drafts, then one of the target's
    row       its row of verification's result (`Verified`), on the host
    length    the tokens that it was asked to draft; `state` is the acceptance state in which that was chosen
    decode    False at the end of a prompt
    """

    sequence: Sequence
    tokens: list[int]
    row: list[int]
    length: int
    state: int
    logprobs: tuple[TokenLogprob, ...]
    decode: bool

    def observation(self, records_guesses: bool) -> Observation:
        """What it says of the drafter, which records whether its first guess was right, or does not."""
        row, accepted = self.row, len(self.tokens) - 1
        guess_correct = records_guesses and bool(row[verify.GUESS_CORRECT])
        counts = row[verify.MODEL_DRAFTED], row[verify.MODEL_ACCEPTED]
        return Observation(self.state, row[verify.NUM_DRAFTED], accepted, guess_correct, *counts)


@dataclass
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens from index `start` + 1 on, as `sampler.logprobs` gives them."""

    sequence: Sequence
    epoch: int
    start: int
    tokens: list[int]
    values: tuple[Tensor, Tensor, Tensor]

    def store(self) -> None:
        """Adds them to the sequence, unless it was preempted since."""
        if self.sequence.epoch != self.epoch:
            return
        del self.sequence.prompt_logprobs[self.start :]
        own, values, tokens = (each.tolist() for each in self.values)
        for token, logprob, *top in zip(self.tokens, own, tokens, values, strict=True):
            alternatives = tuple(zip(*top, strict=True))
            self.sequence.prompt_logprobs.append(TokenLogprob(token, logprob, alternatives))


@dataclass
class InFlightStep:
    """A launched step.

    `entries` are (sequence, its epoch at launch, draft length, the acceptance state in which that was chosen). `result` and
    `path` are verification's; further rows are padding. `bounds` are where each sequence's queries start. `chunks` are the
    token ranges of the prompts that the step computes; `begin_event` and `end_event` are CUDA events at its begin and end.
    """

    entries: list[tuple[Sequence, int, int, int]]
    result: Tensor
    path: Tensor
    decode: bool
    queries: int
    launched: float
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    bounds: list[int] | None = None
    begin_event: torch.cuda.Event | None = None
    end_event: torch.cuda.Event | None = None
    chunks: list[tuple[int, int]] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)

    def seconds(self, read_at: float) -> float:
        """Seconds that the step took, by CUDA events where there are any: the host's clock would count time in the queue."""
        if self.begin_event is not None and self.end_event is not None:
            return self.begin_event.elapsed_time(self.end_event) / 1000
        return read_at - self.launched

    def read(self) -> list[StepResult]:
        """Waits for the step, then reads it. Sequences that finished or were preempted since are left out."""
        if self.end_event is not None:
            self.end_event.synchronize()
        for each in self.prompt_logprobs:
            each.store()
        results = []
        for index, (entry, row) in enumerate(zip(self.entries, self.result.numpy().tolist(), strict=False)):
            sequence, epoch, length, state = entry
            if sequence.finish is None and sequence.epoch == epoch:
                tokens = row[verify.HEADER : verify.HEADER + row[verify.NUM_TOKENS]]
                found = self._logprobs(index, sequence, tokens) if self.logprobs is not None else ()
                results.append(StepResult(sequence, tokens, row, length, state, found, self.decode))
        return results

    def _logprobs(self, index: int, sequence: Sequence, tokens: list[int]) -> tuple[TokenLogprob, ...]:
        count = sequence.request.sampling.logprobs
        if count is None or self.logprobs is None or self.bounds is None:
            return ()
        queries = [0, *self.path[index, : len(tokens) - 1].tolist()]  # the query that each token follows
        found = []
        for query, token in zip(queries, tokens, strict=True):
            row = self.bounds[index] + query
            values, alternatives = (each[row, :count].tolist() for each in self.logprobs[1:])
            top = tuple(zip(alternatives, values, strict=True))
            found.append(TokenLogprob(token, float(self.logprobs[0][row]), top))
        return tuple(found)
