"""A request on its way through the engine."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paceline.drafters.chooser import Acceptance
from paceline.engine.detokenize import Detokenizer
from paceline.engine.grammar import GrammarMatcher
from paceline.errors import BadGrammar, PacelineError
from paceline.kv.radix import Node
from paceline.types import FinishReason, Request, StepOutput, TokenLogprob, Usage

# What a step must do for a request beyond its largest logits: bits of `Sequence.traits`
DRAWS = 1  # it has a temperature
HAS_MARGIN = 2
NOT_PLAIN = 4  # see `Sampling.plain`
HAS_GRAMMAR = 8


class Status(enum.Enum):
    """The state of a sequence; the scheduler makes every change (see its drawing).

    WAITING     in the queue: no slot and no pages
    LOADING     has slot and pages, some of which are being filled from another tier of the cache; no tier does so yet
    PREFILLING  has slot and pages; a part of its tokens is computed
    RUNNING     all tokens but the last are computed or in flight: it decodes
    FINISHED    has ended, by itself, by its user or by an error; holds nothing
    """

    WAITING = enum.auto()
    LOADING = enum.auto()
    PREFILLING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """Everything the host knows of one request.

    status      waiting, loading, prefilling, running or finished
    tokens      prompt, then the output the host has seen
    prompt      the prompt's tokens as an array, [T] int64; `sources` those of its sources
    whole_text  gives the text of a token by itself, None where that is not whole characters
    pages       its pages in order, the first `num_shared` of them the radix tree's, locked through `node`
    num_written how many of its pages are in the device's page table
    slot        its row in the device state from admission on, -1 before
    reserved    tokens for which it has pages
    computed    tokens whose keys and values are in the cache, as far as the host knows
    end         the most tokens that it has once all in-flight steps are read
    epoch       counts how often it gave its slot back, preempted or ended: results of steps launched before are dropped
    traits      what steps must do for it
    plain_until the number of tokens up to which `append_token` does nothing but append
    matcher     the state of its grammar, if it has one
    failure     an error of its own within an in-flight step: the sequence ends when that step is read
    """

    request: Request
    name: str
    seed: int
    detokenizer: Detokenizer
    whole_text: Callable[[int], str | None]
    stops: frozenset[int]
    acceptance: Acceptance
    tokens: list[int]
    prompt: Any
    prompt_length: int
    sources: list[Any] = field(default_factory=list)
    matcher: GrammarMatcher | None = None
    pages: list[int] = field(default_factory=list)
    num_shared: int = 0
    num_written: int = 0
    node: Node | None = None
    status: Status = Status.WAITING
    slot: int = -1
    reserved: int = 0
    computed: int = 0
    end: int = 0
    epoch: int = 0
    traits: int = field(init=False)
    plain_until: int = 0
    failure: PacelineError | None = None
    finish: FinishReason | None = None
    usage: Usage = field(default_factory=Usage)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0

    def __post_init__(self) -> None:
        request, sampling = self.request, self.request.sampling
        parts = (
            (DRAWS, sampling.temperature),
            (HAS_MARGIN, request.margin),
            (NOT_PLAIN, not sampling.plain),
            (HAS_GRAMMAR, self.matcher is not None),
        )
        self.traits = sum(bit for bit, has in parts if has)

    def array(self, start: int, end: int) -> Any:
        """Tokens `start:end`, [T] int64."""
        if end <= self.prompt_length:
            return self.prompt[start:end]
        written = np.array(self.tokens[max(start, self.prompt_length) : end], dtype=np.int64)
        return np.concatenate([self.prompt[start:], written])

    @property
    def room(self) -> int:
        """Output tokens it may still write."""
        return self.request.sampling.max_tokens - (len(self.tokens) - self.prompt_length)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    def append_token(self, token: int) -> StepOutput:
        """`append` of one token that was not drafted, where its decode step reports no log-probabilities.

        In most steps nothing but the tokens changes; the usage is brought up to date by the next `append`.
        """
        text = self.whole_text(token)
        if text is None or len(self.tokens) >= self.plain_until or token in self.stops:
            if self.failure is not None:  # within the step, whose token is not its output
                return self.fail(self.failure)
            self.usage.steps += 1
            return self.append([token])
        self.tokens.append(token)
        return StepOutput(self.name, [token], text, [False])

    def append(
        self, new: list[int], logprobs: tuple[TokenLogprob, ...] = (), drafted: int = 0, source_accepted: int = 0
    ) -> StepOutput:
        """Adds a step's tokens up to the one that ends the output.

        All but the last of them are of `drafted` ones, `source_accepted` of those from explicit sources.
        """
        begins = not self.first_token
        if begins:
            self.first_token = time.perf_counter()
            self.usage.prefill_seconds = self.first_token - self.started
        sampling, usage = self.request.sampling, self.usage
        self._count_steps()
        written = usage.output_tokens
        kept = new[: sampling.max_tokens - written]
        end = count = len(kept)
        if not self.stops.isdisjoint(kept):
            ends = (i for i, token in enumerate(kept) if token in self.stops and written + i >= sampling.min_tokens)
            end = next(ends, end)
        text, used = self.detokenizer.feed(kept if end == count else kept[:end])
        if self.detokenizer.stopped or end < count:
            self.finish = FinishReason.STOP
            kept = kept[: used if self.detokenizer.stopped else end + 1]
        elif written + count >= sampling.max_tokens:
            self.finish = FinishReason.LENGTH
        if self.finish:
            text += self.detokenizer.finish()
            count = len(kept)
        self.tokens += kept
        if self.matcher is not None and (problem := self.matcher.advance(kept)):
            self.failure = BadGrammar(problem)
        if self.failure is not None:
            self.finish = FinishReason.FAILED
        usage.output_tokens += count
        is_plain = self.matcher is None and self.detokenizer.is_plain
        self.plain_until = self.prompt_length + sampling.max_tokens - 1 if is_plain else 0
        flags = [False] * count
        if accepted := min(len(new) - 1, count):
            usage.accepted_tokens += accepted
            usage.source_accepted_tokens += min(source_accepted, accepted)
            flags[:accepted] = [True] * accepted
        if logprobs:
            logprobs = logprobs[:count]
            self.logprobs += logprobs
        if self.finish:
            usage.decode_seconds = time.perf_counter() - self.first_token
        snapshot = replace(usage) if begins or self.finish else None
        of_prompt = tuple(self.prompt_logprobs) if begins else ()
        return StepOutput(
            self.name, kept, text, flags, logprobs, self.finish, snapshot, drafted, self.failure, of_prompt
        )

    def fail(self, error: PacelineError) -> StepOutput:
        """Ends it by an error; its output so far stays."""
        self._count_steps()
        self.failure, self.finish = error, FinishReason.FAILED
        return StepOutput(self.name, [], "", [], finish=self.finish, usage=replace(self.usage), error=error)

    def _count_steps(self) -> None:
        """Adds the tokens of `append_token` since the last `append` to the usage: each took a step."""
        added = len(self.tokens) - self.prompt_length - self.usage.output_tokens
        self.usage.steps += added
        self.usage.output_tokens += added
