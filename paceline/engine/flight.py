"""A launched step and what it gave, as the host reads it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from paceline.engine.sequence import Sequence
from paceline.ops.accept import HEADER
from paceline.types import TokenLogprob


@dataclass(slots=True)
class Landed:
    """What one step gave one sequence. The first `accepted` of `tokens` were drafted, the last never is.

    Of its `drafted` tokens `told` came from explicit sources, and of those `taken` were accepted.
    """

    sequence: Sequence
    tokens: list[int]
    accepted: int
    drafted: int
    length: int
    hit: bool
    streak: int
    near: int
    told: int
    taken: int
    logprobs: list[TokenLogprob]
    decode: bool


@dataclass
class PromptLogprobs:
    """Log-probabilities of a prompt's tokens from index `start` + 1 on, as `sampler.logprobs` gives them."""

    sequence: Sequence
    epoch: int
    start: int
    tokens: list[int]
    values: tuple[Tensor, Tensor, Tensor]

    def land(self) -> None:
        """Hands them to the sequence, unless it was preempted meanwhile."""
        if self.sequence.epoch != self.epoch:
            return
        del self.sequence.prompt_logprobs[self.start :]
        own, values, tokens = (each.tolist() for each in self.values)
        for token, logprob, *top in zip(self.tokens, own, tokens, values, strict=True):
            alternatives = tuple(zip(*top, strict=True))
            self.sequence.prompt_logprobs.append(TokenLogprob(token, logprob, alternatives))


@dataclass
class Flight:
    """A launched step. `entries` are (sequence, its epoch at launch, drafted length); `result` is accept's.

    `chunks` are the token ranges of the prompts it computes; `begun` and `event` are CUDA events at its
    begin and end.
    """

    entries: list[tuple[Sequence, int, int]]
    result: Tensor
    decode: bool
    queries: int
    launched: float
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    starts: list[int] | None = None
    begun: torch.cuda.Event | None = None
    event: torch.cuda.Event | None = None
    chunks: list[tuple[int, int]] = field(default_factory=list)
    of_prompts: list[PromptLogprobs] = field(default_factory=list)

    def seconds(self, landed: float) -> float:
        """Seconds that the step took, by CUDA events where there are any. The host's clock would count time in the queue."""
        if self.begun is not None and self.event is not None:
            return self.begun.elapsed_time(self.event) / 1000
        return landed - self.launched

    def land(self) -> list[Landed]:
        """Waits for the step, then reads it. Sequences that finished or were preempted meanwhile are left out."""
        if self.event is not None:
            self.event.synchronize()
        for each in self.of_prompts:
            each.land()
        landed = []
        rows = self.result.tolist()
        for index, (sequence, epoch, length) in enumerate(self.entries):
            if sequence.finish is not None or sequence.epoch != epoch:
                continue
            new, drafted, first, streak, hit, near, told, taken = rows[index][:HEADER]
            tokens = rows[index][HEADER : HEADER + new]
            found = self._logprobs(index, sequence, tokens, first)
            landed.append(
                Landed(
                    sequence, tokens, new - 1, drafted, length, bool(hit), streak, near, told, taken, found, self.decode
                )
            )
        return landed

    def _logprobs(self, index: int, sequence: Sequence, tokens: list[int], first: int) -> list[TokenLogprob]:
        count = sequence.request.sampling.logprobs
        if count is None or self.logprobs is None or self.starts is None:
            return []
        base = self.starts[index]
        found = []
        for place, token in enumerate(tokens):
            row = base if place == 0 else base + first + place - 1
            values, alternatives = (each[row, :count].tolist() for each in self.logprobs[1:])
            top = tuple(zip(alternatives, values, strict=True))
            found.append(TokenLogprob(token, float(self.logprobs[0][row]), top))
        return found
