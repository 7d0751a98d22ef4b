"""Runs steps on the device: prefill chunks, and decode steps from draft to next inputs."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paceline.config import EngineConfig
from paceline.engine.cost import StepCost
from paceline.engine.flight import Flight, PromptLogprobs
from paceline.engine.grammar import forbid
from paceline.engine.sampler import Row, adjusted, drawn, first_within_margin, logprobs, within_margin
from paceline.engine.scheduler import Chunk, Decode, Prefill
from paceline.engine.sequence import Sequence
from paceline.engine.transfer import to_device, together
from paceline.errors import EngineFailed, PacelineError
from paceline.kv.cache import KVCache
from paceline.models.decoder import Decoder
from paceline.ops.accept import HEADER, accept, compact
from paceline.ops.argmax import argmax
from paceline.ops.attention import AttentionBatch, HostLengths
from paceline.ops.copy_draft import MAX_BRANCHES, CopyState, StepTokens, copy_draft
from paceline.ops.draw import Draws, signed
from paceline.ops.layout import decode_layout, owners

_log = logging.getLogger(__name__)
_COLDEST = 1e-30  # a temperature that float32 still tells from 0


class Runner:
    """One model, its cache and the state of every slot. Nothing here waits for the device but `Flight.land`.

    `lag` is how many launched steps the host may leave unread; `uniform` whether all requests of a step must draft alike,
    as the CUDA kernels take it.
    """

    lag = 0

    def __init__(self, model: Decoder, cache: KVCache, config: EngineConfig) -> None:
        assert config.max_context is not None and config.max_draft is not None
        self.model, self.cache, self.config = model, cache, config
        self.device = model.device
        self.uniform = self.device.type == "cuda"
        slack = 2 * (config.max_draft + 1)
        self.max_context = config.max_context
        self.state = CopyState.empty(config.max_batch + 1, 2 * config.max_context + slack + 2, self.device)
        width = -(-(config.max_context + slack) // cache.page_size)
        self.page_table = torch.zeros(config.max_batch + 1, width, dtype=torch.int32, device=self.device)
        self.margins = torch.zeros(config.max_batch + 1, device=self.device)
        self.draws = Draws.empty(config.max_batch + 1, self.device)
        # a branch's keys lie elsewhere in the cache than plain decoding would put them, so kernels sum them in another order
        self._most_branches = 1 if config.deterministic else MAX_BRANCHES
        self._written = [0] * (config.max_batch + 1)
        self.cost = StepCost()
        model.prepare(config.max_context + slack)

    def warm_up(self, batch: int) -> None:
        """Makes what steps of up to `batch` requests need; nothing on CPU."""

    def step_cost(self, num_requests: int, length: int) -> float:
        """Seconds of a decode step in which `num_requests` each draft `length`."""
        return self.cost(num_requests * (length + 1))

    def learn(self, flight: Flight, landed: float) -> None:
        """Takes a landed step's time into account."""
        if flight.queries:
            self.cost.add(flight.queries, landed - flight.launched)

    # ---- what the host tells the device

    def start(self, sequence: Sequence) -> None:
        """Writes a sequence's slot: its sources and tokens, and where to copy from first."""
        parts: list[Any] = []
        room = self.max_context
        for source in sequence.sources if self.config.drafter == "copy" else ():
            part = source[: max(0, room - sum(map(len, parts)) - 1)]
            if len(part):
                parts += [part, np.array([-1])]
        history = sum(map(len, parts))
        begins = bool(parts) and sequence.prompt_length == len(sequence.tokens)
        text = np.concatenate([*parts, sequence.array(0, len(sequence.tokens))])
        slot, state = sequence.slot, self.state
        sampling = sequence.request.sampling
        self._written[slot] = 0
        self.page_table[slot].zero_()  # the last owner's pages are others' by now
        state.text[slot, : len(text)] = to_device(text, torch.int32, self.device)
        sequence.acceptance.stand(32 if begins else 0)
        for row, value in (
            (state.history_start, history),
            (state.end, len(text)),
            (state.pointer, 0 if begins else -1),
            (state.anchor, 0 if history else -1),
            (state.streak, sequence.acceptance.streak),
            (self.margins, sequence.request.margin),
            (self.draws.seeds, signed(sequence.seed)),
            (self.draws.filters[:, 0], max(sampling.temperature, _COLDEST) if sampling.temperature else 0.0),
        ):
            # `row[slot] = value` would copy from the host and wait for the device
            row[slot : slot + 1].fill_(value)
        if sampling.temperature:
            top_k = min(sampling.top_k, self.model.config.vocab_size)
            filters = to_device([top_k, sampling.top_p, sampling.min_p], torch.float32, self.device)
            self.draws.filters[slot, 1:].copy_(filters)

    def update_pages(self, sequences: list[Sequence]) -> None:
        """Writes to the sequences' rows of the page table what was added since they last ran, for new ones all."""
        rows: list[int] = []
        columns: list[int] = []
        pages: list[int] = []
        for sequence in sequences:
            begin, count = self._written[sequence.slot], len(sequence.pages)
            if begin < count:
                new = sequence.pages[begin : self.page_table.shape[1]]
                rows += [sequence.slot] * len(new)
                columns += range(begin, begin + len(new))
                pages += new
                self._written[sequence.slot] = count
        if pages:
            rows_, columns_, pages_ = to_device([rows, columns, pages], torch.int32, self.device)
            self.page_table[rows_, columns_] = pages_

    # ---- steps

    def launch(self, work: Prefill | Decode) -> Flight:
        """Starts a step; its results are read from the flight later."""
        return self.prefill(work) if isinstance(work, Prefill) else self.decode(work)

    def prefill(self, work: Prefill) -> Flight:
        """Computes prompt chunks; sequences whose last chunk this is get their first token."""
        started = time.perf_counter()
        plain = [chunk for chunk in work.chunks if not _wants_all(chunk.sequence)]
        told = [chunk for chunk in work.chunks if _wants_all(chunk.sequence)]
        parts = [self.prompt_logits(plain)] if plain else []
        of_prompts = []
        for chunk in told:
            logits, found = self._every_logit(chunk)
            parts.append(logits)
            of_prompts.append(found)
        ready = [chunk.sequence for chunk in plain + told if chunk.last]
        for sequence in ready:
            try:
                self.start(sequence)
            except Exception as error:  # what is wrong with one request ends that one
                self._failed(sequence, error)
        flight = Flight([], torch.empty(0, HEADER), False, 0, started)
        if ready:
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            slots = to_device([each.slot for each in ready], torch.int64, self.device)
            starts = torch.arange(len(ready) + 1, dtype=torch.int32, device=self.device)
            step = copy_draft(self.state, slots, starts, len(ready))
            flight = self._conclude(ready, [0] * len(ready), logits, slots, starts, step, None)
        flight.decode, flight.launched, flight.of_prompts = False, started, of_prompts
        flight.chunks = [(chunk.start, chunk.end) for chunk in work.chunks]
        flight.queries = sum(end - start for start, end in flight.chunks)
        return flight

    def _every_logit(self, chunk: Chunk) -> tuple[Tensor, PromptLogprobs]:
        """Computes one chunk with the logits of all its tokens; those after its last token, [1, V] or, where the prompt goes
        on, [0, V], and what they say of the tokens after them.
        """
        batch, tokens, _ = self._prefill_batch([chunk])
        logits = self.model.forward(tokens, self.cache, batch)
        following = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
        choices = to_device(following, torch.int64, self.device)
        values = logprobs(logits[: len(following)], choices, chunk.sequence.request.sampling.prompt_logprobs or 0)
        found = PromptLogprobs(chunk.sequence, chunk.sequence.epoch, chunk.start, following, values)
        return logits[len(logits) - chunk.last :].clone(), found  # the rest is large

    @staticmethod
    def _failed(sequence: Sequence, error: Exception) -> None:
        _log.exception("request %s failed within a step; the others go on", sequence.name)
        sequence.failure = (
            error if isinstance(error, PacelineError) else EngineFailed("the engine failed on this request")
        )

    def prompt_logits(self, chunks: list[Chunk]) -> Tensor:
        """Computes the chunks' keys and values; logits [N, V] after the last token of the N chunks that are last."""
        batch, tokens, rows = self._prefill_batch(chunks)
        return self.model.forward(tokens, self.cache, batch, rows)

    def decode(self, work: Decode) -> Flight:
        """One step of every sequence: draft, one pass of the target over all drafts, accept, move on."""
        started = time.perf_counter()
        self.update_pages(work.sequences)
        bounds = _bounds(work.lengths)
        starts = to_device(bounds, torch.int32, self.device)
        slots = to_device([each.slot for each in work.sequences], torch.int64, self.device)
        step, batch, logits = self.forward(slots, starts, bounds[-1], max(work.lengths) + 1)
        flight = self._conclude(work.sequences, work.lengths, logits, slots, starts, step, batch)
        flight.launched = started
        return flight

    def forward(
        self, slots: Tensor, starts: Tensor, num_queries: int, max_query: int
    ) -> tuple[StepTokens, AttentionBatch, Tensor]:
        """Drafts, and the target's logits over root and drafts, [num_queries, V]."""
        step = copy_draft(self.state, slots, starts, num_queries, self._most_branches)
        batch = decode_layout(self.state, slots, starts, step, self.page_table, self.cache.page_size, max_query)
        return step, batch, self.model.forward(step.tokens, self.cache, batch)

    def verify(
        self,
        slots: Tensor,
        starts: Tensor,
        step: StepTokens,
        batch: AttentionBatch | None,
        logits: Tensor,
        choices: Tensor,
        width: int,
        margin: bool,
    ) -> Tensor:
        """Accepts drafts against the target's choices and moves keys and values of the accepted branches in place."""
        near = None
        if margin and width > 1:
            owner = owners(starts, len(choices))
            near = within_margin(logits, step, choices, starts[owner], self.margins[slots][owner])
        result = accept(self.state, slots, starts, step, choices, near, width)
        if batch is not None and width > 1:
            compact(self.cache.data, batch.page_table, batch.context_lens, result, self.cache.page_size)
        return result

    def _conclude(
        self,
        sequences: list[Sequence],
        lengths: list[int],
        logits: Tensor,
        slots: Tensor,
        starts: Tensor,
        step: StepTokens,
        batch: AttentionBatch | None,
    ) -> Flight:
        """The end of a step whose sequences may sample, adjust logits or want log-probabilities."""
        bounds = _bounds(lengths)
        rows = [
            Row(each.request.sampling, each.slot, first, last, each.prompt_length, tuple(each.stops))
            for each, first, last in zip(sequences, bounds, bounds[1:], strict=False)
            if each.request.sampling.adjusts_logits
        ]
        self._hold(sequences, bounds, logits, step)
        wanted_logits = adjusted(logits, rows, step, self.state)
        choices = argmax(wanted_logits)
        if any(each.request.sampling.temperature for each in sequences):
            choices = drawn(wanted_logits, choices, step, self.state, slots, starts, self.draws)
        margin = any(each.request.margin for each in sequences)
        if margin and batch is None:
            choices = first_within_margin(logits, choices, self.state, slots, self.margins[slots])
        result = self.verify(slots, starts, step, batch, logits, choices, max(lengths) + 1, margin)
        wanted = [each.request.sampling.logprobs for each in sequences]
        found = None
        if any(count is not None for count in wanted):
            found = logprobs(logits, choices, max(count or 0 for count in wanted))
        return Flight(_entries(sequences, lengths), result, True, bounds[-1], 0.0, found, bounds)

    def _hold(self, sequences: list[Sequence], bounds: list[int], logits: Tensor, step: StepTokens) -> None:
        """Masks the logits of sequences with a grammar, in place. Waits for the step's drafts."""
        for sequence, first, last in zip(sequences, bounds, bounds[1:], strict=False):
            if sequence.follower is not None:
                last = first + 1 + int((step.origins[first:last] >= 0).sum())  # padding comes last
                tokens, starts = (each[first:last].tolist() for each in (step.tokens, step.branch_starts))
                try:
                    masks = sequence.follower.masks(tokens, starts)
                except Exception as error:  # what is wrong with one request's grammar ends that one
                    self._failed(sequence, error)
                else:
                    forbid(logits[first:last], masks)

    def _prefill_batch(self, chunks: list[Chunk]) -> tuple[AttentionBatch, Tensor, Tensor]:
        size = self.cache.page_size
        bounds = [0]
        for chunk in chunks:
            bounds.append(bounds[-1] + chunk.end - chunk.start)
        starts = [chunk.start for chunk in chunks]
        rows = [bounds[index + 1] - 1 for index, chunk in enumerate(chunks) if chunk.last]
        count, width = len(chunks), max(-(-chunk.end // size) for chunk in chunks)
        table = [page for chunk in chunks for page in (chunk.sequence.pages + [0] * width)[:width]]
        data = np.concatenate([_prompt_data(chunk, size) for chunk in chunks], axis=1)
        tokens, positions, slots = together(list(data), torch.int64, self.device)
        table_, starts_, bounds_, rows_ = together([table, starts, bounds, rows], torch.int32, self.device)
        batch = AttentionBatch(
            positions=positions,
            slots=slots,
            page_table=table_.view(count, width),
            context_lens=starts_,
            query_starts=bounds_,
            branch_starts=torch.zeros(bounds[-1], dtype=torch.int32, device=self.device),
            max_query=max(chunk.end - chunk.start for chunk in chunks),
            max_context=max(starts),
            host=HostLengths(bounds, starts, [_run(chunk.sequence.pages, -(-chunk.end // size)) for chunk in chunks]),
        )
        return batch, tokens, rows_


def _wants_all(sequence: Sequence) -> bool:
    """Whether the logits after each of the prompt's tokens are wanted; a preempted request has had them."""
    return sequence.request.sampling.prompt_logprobs is not None and not sequence.first_token


def _prompt_data(chunk: Chunk, page_size: int) -> Any:
    """[3, T] int64 on the host: the chunk's tokens, their positions and their cache slots."""
    places = np.arange(chunk.start, chunk.end)
    pages = np.array(chunk.sequence.pages)
    slots = pages[places // page_size] * page_size + places % page_size
    return np.stack([chunk.sequence.array(chunk.start, chunk.end), places, slots])


def _run(pages: list[int], count: int) -> int | None:
    """The first of `count` pages where they lie in a row."""
    first = pages[0]
    return first if pages[:count] == list(range(first, first + count)) else None


def _bounds(lengths: list[int]) -> list[int]:
    """Where each request's queries start, and where the last one's end."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length + 1)
    return bounds


def _entries(sequences: list[Sequence], lengths: list[int]) -> list[tuple[Sequence, int, int]]:
    return [(each, each.epoch, length) for each, length in zip(sequences, lengths, strict=True)]
