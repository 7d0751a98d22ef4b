"""Runs steps on the device: prefill chunks, and decode steps from draft to next inputs."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import DraftBatch, Drafter
from paceline.engine.cost import StepCost
from paceline.engine.grammar import forbid
from paceline.engine.in_flight import InFlightStep, PromptLogprobs
from paceline.engine.sampler import LogitRows, adjusted, drawn, first_within_margin, logprobs, within_margin
from paceline.engine.scheduler import Chunk, Decode, Prefill
from paceline.engine.sequence import Sequence
from paceline.engine.transfer import to_device, together
from paceline.errors import EngineFailed, PacelineError
from paceline.kv.cache import KVCache
from paceline.models.base import Model
from paceline.ops.argmax import argmax
from paceline.ops.attention import AttentionBatch, HostLengths
from paceline.ops.draft import DRAFTED, Draft
from paceline.ops.draw import Draws, signed
from paceline.ops.layout import decode_layout, owners
from paceline.ops.state import SlotState
from paceline.ops.verify import HEADER, Verified, verify

_log = logging.getLogger(__name__)
_MIN_TEMPERATURE = 1e-30  # the least that float32 still tells from 0
# Of a step: what a guess of a trained drafter is taken to cost on a CPU until one is measured. About what
# `python -m benchmarks.speculate` shows for the 1.5B on two cores.
_GUESS = 0.1


@dataclass
class TargetPass:
    """One pass of the target over drafts: logits [T, V] after each query.

    `attention` is None at the end of a prompt, where nothing is drafted.
    """

    batch: DraftBatch
    draft: Draft
    attention: AttentionBatch | None
    logits: Tensor


class Runner:
    """One model, its cache and the state of every slot. Nothing here waits for the device but `InFlightStep.read`.

    `lag` is how many launched steps the host may leave unread; `uniform` whether all requests of a step must draft the same
    length, as the CUDA kernels need it.
    """

    lag = 0

    def __init__(self, model: Model, cache: KVCache, config: ResolvedConfig, drafter: Drafter) -> None:
        self.model, self.cache, self.config, self.drafter = model, cache, config, drafter
        self.device = model.device
        self.uniform = self.device.type == "cuda"
        self.draft_lengths = _draft_lengths(drafter, config)
        self._keeps_records = self.draft_lengths != (0,) or drafter.records_guesses
        slack = 2 * (config.max_draft + 1)  # two steps in flight may write this far beyond what the host has seen
        self.max_context = config.max_context
        num_slots = config.max_batch + 1
        self.state = SlotState.empty(num_slots, 2 * config.max_context + slack + 2, self.device)
        width = -(-(config.max_context + slack) // cache.page_size)
        self.page_table = torch.zeros(num_slots, width, dtype=torch.int32, device=self.device)
        self.margins = torch.zeros(num_slots, device=self.device)
        self.draws = Draws.empty(num_slots, self.device)
        self._costs: dict[int, StepCost] = {}  # by the trained drafter's guesses, which take passes of their own
        model.prepare(config.max_context + slack)

    def warm_up(self, batch: int) -> None:
        """Prepares steps of up to `batch` requests; nothing to do on CPU."""

    def step_cost(self, num_requests: int, length: int) -> float:
        """Seconds of a decode step in which `num_requests` each draft `length`."""
        return self.cost(num_requests * (length + 1), self.drafter.guessed(length).depth)

    def cost(self, queries: int, depth: int) -> float:
        """Seconds of a decode step of `queries` in all, with `depth` guesses of a trained drafter."""
        measured = self._costs.get(depth)
        if measured is not None or not depth:
            return (measured or StepCost())(queries)
        plain = self.cost(queries, 0)
        near = min((each for each in self._costs if each), key=lambda each: abs(each - depth), default=None)
        if near is None:
            return plain * (1 + _GUESS * depth)
        return plain + max(0.0, self._costs[near](queries) - plain) / near * depth

    def learn(self, step: InFlightStep, read_at: float) -> None:
        """Adds a step's time, once it is read, to the measured costs."""
        if step.queries:
            depth = max((self.drafter.guessed(each).depth for each in set(step.lengths) if step.decode), default=0)
            self._costs.setdefault(depth, StepCost()).add(step.queries, read_at - step.launched)

    # ---- host to device

    def start(self, sequence: Sequence) -> int:
        """Writes a sequence's slot: its sources and tokens, sampling and drafter state.

        Returns the first token of its best source where its output is expected to begin with it, else -1.
        """
        parts: list[Any] = []
        room = self.max_context
        for source in sequence.sources if self.drafter.uses_sources else ():
            part = source[: max(0, room - sum(map(len, parts)) - 1)]
            if len(part):
                parts += [part, np.array([-1])]
        history = sum(map(len, parts))
        is_new = sequence.prompt_length == len(sequence.tokens)
        text = np.concatenate([*parts, sequence.array(0, len(sequence.tokens))])
        slot, state = sequence.slot, self.state
        sampling = sequence.request.sampling
        state.text[slot, : len(text)] = to_device(text, torch.int32, self.device)
        sequence.acceptance.set_streak(self.drafter.start(slot, history, is_new))
        for row, value in (
            (state.history_start, history),
            (state.end, len(text)),
            (self.margins, sequence.request.margin),
            (self.draws.seeds, signed(sequence.seed)),
            (self.draws.filters[:, 0], max(sampling.temperature, _MIN_TEMPERATURE) if sampling.temperature else 0.0),
        ):
            # `row[slot] = value` would copy from the host and wait for the device
            row[slot : slot + 1].fill_(value)
        if sampling.temperature:
            top_k = min(sampling.top_k, self.model.config.vocab_size)
            filters = to_device([top_k, sampling.top_p, sampling.min_p], torch.float32, self.device)
            self.draws.filters[slot, 1:].copy_(filters)
        return int(parts[0][0]) if parts and is_new else -1

    def update_pages(self, sequences: list[Sequence]) -> None:
        """Writes pages that sequences received since they last ran to the page table; a whole row where `num_written` is 0.

        This is the only way in which page numbers reach the device.
        """
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        width = self.page_table.shape[1]
        for sequence in [each for each in sequences if each.num_written != len(each.pages)]:
            slot, begin, count = sequence.slot, sequence.num_written, len(sequence.pages)
            if begin == 0:  # the whole row: it names the pages of the slot's last owner, or ones that were replaced
                row = np.zeros(width, dtype=np.int32)
                row[:count] = sequence.pages[:width]
                self.page_table[slot].copy_(to_device(row, torch.int32, self.device))
            else:
                new = sequence.pages[begin:width]
                rows += [slot] * len(new)
                columns += range(begin, begin + len(new))
                pages += new
            sequence.num_written = count
        if pages:
            rows_, columns_, pages_ = to_device([rows, columns, pages], torch.int32, self.device)
            self.page_table[rows_, columns_] = pages_

    # ---- steps

    def launch(self, work: Prefill | Decode) -> InFlightStep:
        """Starts a step; `InFlightStep.read` gives its results later."""
        return self.prefill(work) if isinstance(work, Prefill) else self.decode(work)

    def prefill(self, work: Prefill) -> InFlightStep:
        """Computes prompt chunks; sequences whose last chunk this is get their first token."""
        started = time.perf_counter()
        self.update_pages(work.sequences)
        plain = [chunk for chunk in work.chunks if not _needs_all_logits(chunk.sequence)]
        reporting = [chunk for chunk in work.chunks if _needs_all_logits(chunk.sequence)]
        parts = [self.prompt_logits(plain)] if plain else []
        of_prompts = []
        for chunk in reporting:
            logits, found = self._all_logits(chunk)
            parts.append(logits)
            of_prompts.append(found)
        ready = [chunk.sequence for chunk in plain + reporting if chunk.last]
        expected = []
        for sequence in ready:
            try:
                expected.append(self.start(sequence))
            except Exception as error:  # an error of one request ends that one
                expected.append(-1)
                self._failed(sequence, error)
        step = self._in_flight([], [], torch.empty(0, HEADER), torch.empty(0, 0))
        if ready:
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            slots = to_device([each.slot for each in ready], torch.int64, self.device)
            starts = torch.arange(len(ready) + 1, dtype=torch.int32, device=self.device)
            batch = self.draft_batch(slots, starts, len(ready), 1)
            target = TargetPass(batch, self.drafter.propose(batch), None, logits)
            step = self._conclude(ready, [0] * len(ready), target, expected)
        step.decode, step.launched, step.prompt_logprobs = False, started, of_prompts
        step.chunks = [(chunk.start, chunk.end) for chunk in work.chunks]
        step.queries = sum(end - start for start, end in step.chunks)
        return step

    def _all_logits(self, chunk: Chunk) -> tuple[Tensor, PromptLogprobs]:
        """Computes one chunk with the logits of all its tokens.

        Returns those after its last token, [1, V] or, where the prompt continues, [0, V], and the log-probabilities.
        """
        batch, tokens, _ = self._prefill_batch([chunk])
        logits = self.forward(tokens, batch)
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
        choices = to_device(following, torch.int64, self.device)
        values = logprobs(logits[: len(following)], choices, chunk.sequence.request.sampling.prompt_logprobs or 0)
        found = PromptLogprobs(chunk.sequence, chunk.sequence.epoch, chunk.start, following, values)
        return logits[len(logits) - chunk.last :].clone(), found  # the rest is large

    @staticmethod
    def _failed(sequence: Sequence, error: Exception) -> None:
        _log.exception("request %s failed within a step; the others continue", sequence.name)
        sequence.failure = (
            error if isinstance(error, PacelineError) else EngineFailed("the engine failed on this request")
        )

    def prompt_logits(self, chunks: list[Chunk]) -> Tensor:
        """Computes the chunks' keys and values; logits [N, V] after the last token of the N chunks that are last."""
        batch, tokens, rows = self._prefill_batch(chunks)
        return self.forward(tokens, batch, rows)

    def forward(
        self, tokens: Tensor, batch: AttentionBatch, rows: Tensor | None = None, draft: Draft | None = None
    ) -> Tensor:
        """A pass of the target, which the drafter remembers; logits of all tokens or of `rows`. See `Drafter.remember`."""
        output = self.model.forward(tokens, self.cache, batch, rows, self.drafter.features)
        if output.features is not None:
            self.drafter.remember(tokens, output.features, draft, batch, self.cache)
        return output.logits

    def decode(self, work: Decode) -> InFlightStep:
        """One step of every sequence: draft, one pass of the target over all drafts, verification."""
        started = time.perf_counter()
        self.update_pages(work.sequences)
        bounds = _bounds(work.lengths)
        starts = to_device(bounds, torch.int32, self.device)
        slots = to_device([each.slot for each in work.sequences], torch.int64, self.device)
        target = self.target_pass(self.draft_batch(slots, starts, bounds[-1], max(work.lengths) + 1))
        step = self._conclude(work.sequences, work.lengths, target)
        step.launched = started
        return step

    def target_pass(self, batch: DraftBatch) -> TargetPass:
        """Drafts, then runs the target over roots and drafts."""
        draft = self.drafter.propose(batch)
        attention = decode_layout(
            batch.state, batch.slots, batch.query_starts, draft, batch.page_table, self.cache.page_size, batch.max_query
        )
        logits = self.forward(draft.tokens, attention, None, draft)
        return TargetPass(batch, draft, attention, logits)

    def verify(self, target: TargetPass, choices: Tensor, margin: bool) -> Verified:
        """Verifies drafts against the target's choices [T]; moves the cached state of accepted tokens into place.

        `margin` says that a request may have one.
        """
        batch, draft, width = target.batch, target.draft, target.batch.max_query
        lenient = None
        if margin and width > 1:
            owner = owners(batch.query_starts, len(choices))
            margins = self.margins[batch.slots][owner]
            lenient = within_margin(target.logits, draft, choices, batch.query_starts[owner], margins)
        verified = verify(batch.state, batch.slots, batch.query_starts, draft, choices, lenient, width)
        self.drafter.observe(batch, draft, verified)
        if target.attention is not None and width > 1:
            attention = target.attention
            self.cache.move(attention.page_table, attention.context_lens, verified.counts, verified.path)
        return verified

    def draft_batch(self, slots: Tensor, starts: Tensor, num_queries: int, max_query: int) -> DraftBatch:
        """The requests in `slots`, whose queries begin at `starts`."""
        return DraftBatch(self.state, slots, starts, num_queries, max_query, self.page_table, self.cache, self.draws)

    def _conclude(
        self, sequences: list[Sequence], lengths: list[int], target: TargetPass, expected: list[int] | None = None
    ) -> InFlightStep:
        """The end of a step whose sequences may sample, adjust logits or need log-probabilities.

        At the end of prompts `expected` are the first tokens of the sequences' sources, -1 for none.
        """
        bounds = _bounds(lengths)
        rows = [
            LogitRows(each.request.sampling, each.slot, first, last, each.prompt_length, tuple(each.stops))
            for each, first, last in zip(sequences, bounds, bounds[1:], strict=False)
            if each.request.sampling.adjusts_logits
        ]
        batch, draft, logits = target.batch, target.draft, target.logits
        self._constrain(sequences, bounds, logits, draft)
        final_logits = adjusted(logits, rows, draft, self.state)
        choices = argmax(final_logits)
        if any(each.request.sampling.temperature for each in sequences):
            choices = drawn(final_logits, choices, draft, self.state, batch.slots, batch.query_starts, self.draws)
        margin = any(each.request.margin for each in sequences)
        if margin and expected is not None:
            follows = to_device(expected, torch.int64, self.device)
            margins = torch.where(follows >= 0, self.margins[batch.slots], 0.0)
            choices = first_within_margin(logits, choices, follows.clamp(min=0), margins)
        verified = self.verify(target, choices, margin)
        counts = [each.request.sampling.logprobs for each in sequences]
        found = None
        if any(count is not None for count in counts):
            found = logprobs(logits, choices, max(count or 0 for count in counts))
        step = self._in_flight(sequences, lengths, verified.result, verified.path)
        step.logprobs, step.bounds = found, bounds
        return step

    def _in_flight(
        self, sequences: list[Sequence], lengths: list[int], result: Tensor, path: Tensor, started: float = 0.0
    ) -> InFlightStep:
        """A decode step that has been launched; `result` and `path` are verification's."""
        epochs = [each.epoch for each in sequences]
        states = [each.acceptance.state for each in sequences] if self._keeps_records else []
        queries = len(sequences) + sum(lengths)
        expected = [each.acceptance.expected for each in sequences] if self._keeps_records else []
        return InFlightStep(sequences, epochs, lengths, states, expected, result, path, True, queries, started)

    def _constrain(self, sequences: list[Sequence], bounds: list[int], logits: Tensor, draft: Draft) -> None:
        """Masks the logits of sequences with a grammar, in place. Waits for the step's drafts."""
        for sequence, first, last in zip(sequences, bounds, bounds[1:], strict=False):
            if sequence.matcher is not None:
                last = first + 1 + int((draft.marks[first:last] & DRAFTED != 0).sum())  # padding comes last
                tokens, parents = draft.tokens[first:last].tolist(), draft.parents_of(first, last).tolist()
                try:
                    masks = sequence.matcher.masks(tokens, parents)
                except Exception as error:  # an error of one request's grammar ends that one
                    self._failed(sequence, error)
                else:
                    forbid(logits[first:last], masks)

    def _prefill_batch(self, chunks: list[Chunk]) -> tuple[AttentionBatch, Tensor, Tensor]:
        """The batch of prompt chunks, their tokens [T], and the rows of those that are a prompt's last."""
        size = self.cache.page_size
        bounds = [0]
        for chunk in chunks:
            bounds.append(bounds[-1] + chunk.end - chunk.start)
        starts = [chunk.start for chunk in chunks]
        rows = [bounds[index + 1] - 1 for index, chunk in enumerate(chunks) if chunk.last]
        width = max(-(-chunk.end // size) for chunk in chunks)
        slots = [chunk.sequence.slot for chunk in chunks]
        data = np.concatenate([_prompt_data(chunk) for chunk in chunks], axis=1)
        tokens, positions, owner = together(list(data), torch.int64, self.device)
        slots_, starts_, bounds_, rows_ = together([slots, starts, bounds, rows], torch.int32, self.device)
        pages = self.page_table[owner, positions // size].long()
        batch = AttentionBatch(
            positions=positions,
            locations=pages * size + positions % size,
            page_table=self.page_table[:, :width][slots_],
            context_lens=starts_,
            query_starts=bounds_,
            branch_starts=torch.zeros(bounds[-1], dtype=torch.int32, device=self.device),
            max_query=max(chunk.end - chunk.start for chunk in chunks),
            max_context=max(starts),
            host=HostLengths(bounds, starts, [_run(chunk.sequence.pages, -(-chunk.end // size)) for chunk in chunks]),
        )
        return batch, tokens, rows_


def _draft_lengths(drafter: Drafter, config: ResolvedConfig) -> tuple[int, ...]:
    """The draft lengths that steps may have, ascending."""
    if config.fixed_draft is not None and drafter.lengths != (0,):
        return (config.fixed_draft,)
    lengths = tuple(each for each in drafter.lengths if each <= config.max_draft)
    shorter_than_all = lengths == (0,) and drafter.lengths != (0,) and config.max_draft > 0
    return (0, config.max_draft) if shorter_than_all else lengths


def _needs_all_logits(sequence: Sequence) -> bool:
    """Whether the logits after each of the prompt's tokens are needed; a preempted request has reported them."""
    return sequence.request.sampling.prompt_logprobs is not None and not sequence.first_token


def _prompt_data(chunk: Chunk) -> Any:
    """[3, T] int64 on the host: the chunk's tokens, their positions and their slot."""
    positions = np.arange(chunk.start, chunk.end)
    tokens = chunk.sequence.array(chunk.start, chunk.end)
    return np.stack([tokens, positions, np.full_like(positions, chunk.sequence.slot)])


def _run(pages: list[int], count: int) -> int | None:
    """The first of `count` pages where they are consecutive."""
    first = pages[0]
    return first if pages[:count] == list(range(first, first + count)) else None


def _bounds(lengths: list[int]) -> list[int]:
    """Where each request's queries start, and where the last one's end."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length + 1)
    return bounds
