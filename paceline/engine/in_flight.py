"""An in-flight step: launched on the device, its results not read yet."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.drafters.chooser import LOST
from paceline.engine.sequence import Sequence
from paceline.ops import verify
from paceline.types import TokenLogprob


@dataclass(slots=True)
class StepResult:
    """What one step gave one sequence.

    tokens    those that it wrote: accepted drafts, then one of the target's
    row       its row of verification's result (`Verified`), on the host
    length    the tokens that it was asked to draft; `state` is the acceptance state in which that was chosen, `expected` the
              tokens that were expected to be accepted of it (`drafters.chooser.Acceptance.expected`)
    decode    False at the end of a prompt
    """

    tokens: list[int]
    row: list[int]
    length: int
    state: int
    expected: float
    logprobs: tuple[TokenLogprob, ...]
    decode: bool


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

    Of each of `sequences`: its epoch at launch, its draft length, and the acceptance state in which that was chosen with what
    was expected of it (`states` and `expected` are empty where the drafter keeps no record). `result` and `path` are
    verification's; further rows are padding. `bounds` are where each sequence's queries start. `chunks` are the token ranges
    of the prompts that the step computes; `begin_event` and `end_event` are CUDA events at its begin and end.
    """

    sequences: list[Sequence]
    epochs: list[int]
    lengths: list[int]
    states: list[int]
    expected: list[float]
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

    @property
    def is_plain(self) -> bool:
        """Whether it gives each sequence one token, that of plain decoding, without log-probabilities."""
        return self.decode and self.logprobs is None and not any(self.lengths)

    @property
    def current(self) -> list[Sequence]:
        """The sequences that neither ended nor were preempted since the launch."""
        return [each for each, epoch in zip(self.sequences, self.epochs, strict=True) if each.epoch == epoch]

    def wait(self) -> None:
        """Waits for the step. It can be read then."""
        if self.end_event is not None:
            self.end_event.synchronize()
        for each in self.prompt_logprobs:
            each.store()

    def column(self, index: int) -> list[int]:
        """One of the columns of verification's result, padding included."""
        column: list[int] = self.result[:, index].cpu().numpy().tolist()
        return column

    def read_tokens(self) -> list[tuple[Sequence, int]]:
        """The tokens of a plain step, as `read`."""
        entries = zip(self.sequences, self.epochs, self.column(verify.HEADER), strict=False)
        return [(sequence, token) for sequence, epoch, token in entries if sequence.epoch == epoch]

    def read(self) -> list[tuple[Sequence, StepResult]]:
        """The results. Sequences that have ended or were preempted since the launch are left out."""
        results = []
        rows = self.result.cpu().numpy().tolist()
        states = self.states or [LOST] * len(self.sequences)
        expected = self.expected or [0.0] * len(self.sequences)
        entries = zip(self.sequences, self.epochs, self.lengths, states, expected, rows, strict=False)
        for index, (sequence, epoch, length, state, gain, row) in enumerate(entries):
            if sequence.epoch == epoch:
                tokens = row[verify.HEADER : verify.HEADER + row[verify.NUM_TOKENS]]
                found = self._logprobs(index, sequence, tokens) if self.logprobs is not None else ()
                results.append((sequence, StepResult(tokens, row, length, state, gain, found, self.decode)))
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
