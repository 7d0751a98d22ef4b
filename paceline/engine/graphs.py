"""The runner for CUDA: decode steps are graphs over fixed shapes, and the host reads results one step behind."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from paceline.config import EngineConfig
from paceline.drafters.chooser import LENGTHS
from paceline.engine.flight import Flight
from paceline.engine.runner import Runner, _entries
from paceline.engine.sampler import drawn
from paceline.engine.scheduler import Chunk, Decode, Prefill
from paceline.engine.sequence import Sequence
from paceline.engine.transfer import to_device
from paceline.kv.cache import KVCache
from paceline.models.decoder import Decoder
from paceline.ops.argmax import argmax
from paceline.ops.attention import AttentionBatch, HostLengths
from paceline.ops.copy_draft import StepTokens

# The most queries of a step: a query of 2,100 costs a tenth less than one of 1,100. The graphs' logits then take 2.5 GB more.
_MAX_QUERIES, _MAX_QUERIES_SMALL = 2200, 1100
_SMALL_BYTES = 40 << 30  # of a GPU's memory

_PROMPT_SIZES = (64, 128, 256, 512, 1024)
# a prompt of which nothing is cached, made up to one of these: at 2,048 tokens launching takes longer than computing
_FRESH_SIZES = (*range(1280, 4096, 256), *range(4096, 8193, 512))
# as many chunks are replays one by one, or more where they have so many tokens on average; else one pass is launched
_FEW, _LONG = 8, 512
# context up to which pieces of 1,024 tokens are no slower than one pass; two are not at any
_PIECES_UP_TO = 8192

T = TypeVar("T")


@dataclass
class End:
    """The end of a step whose requests are all plain: from logits to accept's `result`."""

    graph: torch.cuda.CUDAGraph
    result: Tensor


@dataclass
class StepGraph:
    """One captured shape, up to the logits. `margin` is the end for steps in which a request has one, `drawing` for those
    in which one has a temperature, or both; `seconds` takes in `greedy`.
    """

    graph: torch.cuda.CUDAGraph
    slots: Tensor
    starts: Tensor
    step: StepTokens
    batch: AttentionBatch
    logits: Tensor
    greedy: End
    margin: End
    drawing: End
    seconds: float


@dataclass
class PromptGraph:
    """A captured pass over one chunk of at most T prompt tokens; above 1,024 over a prompt's first ones.

    inputs [2 + W + T] int64: committed and query counts, the page table's row, the tokens. `constants` are what else the
    graph reads; they must live as long as it does.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    constants: tuple[Tensor, ...]
    logits: Tensor

    def replay(self, chunk: Chunk, width: int) -> Tensor:
        """Runs the pass for `chunk` with `width` places in its page table; logits [1, V] after its last token.

        The logits stand until the next replay.
        """
        begin = 2 + width
        end = begin + chunk.end - chunk.start
        staged = torch.empty(end, dtype=torch.int64, pin_memory=True)  # not given out again before its copy has ended
        host, pages = staged.numpy(), chunk.sequence.pages[:width]
        host[:2] = chunk.start, chunk.end - chunk.start
        host[2 : 2 + len(pages)] = pages
        host[2 + len(pages) : begin] = 0
        host[begin:end] = chunk.sequence.array(chunk.start, chunk.end)
        self.inputs[:end].copy_(staged, non_blocking=True)
        self.graph.replay()
        return self.logits


class GraphRunner(Runner):
    """Decode steps as replays. A step of B requests with Q queries each runs in the graph of the next larger B."""

    lag = 1

    def __init__(self, model: Decoder, cache: KVCache, config: EngineConfig) -> None:
        super().__init__(model, cache, config)
        self.uniform = True
        self.spare = config.max_batch
        self._graphs: dict[tuple[int, int], StepGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._prompts: dict[int, PromptGraph] = {}
        self._loaded: dict[int, list[int]] = {}
        small = torch.cuda.get_device_properties(self.device).total_memory < _SMALL_BYTES
        self._max_queries = _MAX_QUERIES_SMALL if small else _MAX_QUERIES

    @torch.inference_mode()
    def warm_up(self, batch: int) -> None:
        """Captures the graphs of up to `batch` requests and those of prompts, and runs once what is not captured."""
        for tokens in _PROMPT_SIZES + _FRESH_SIZES:
            if tokens <= self.config.max_context:
                self._prompts[tokens] = self._capture_prompt(tokens)
        for count, tokens in ((1, 2 * _PROMPT_SIZES[-1]), (1, self.config.prefill_chunk or 0), (16, 16), (64, 64)):
            self._run_prompts(count, tokens)
        size = 1
        while True:
            for length in self._lengths(size):
                self._graph(size, length)
            if size >= batch:
                break
            size *= 2

    def step_cost(self, num_requests: int, length: int) -> float:
        size = _bucket(num_requests)
        if length not in self._lengths(size):
            return float("inf")
        return self._graph(size, length).seconds

    def learn(self, flight: Flight, landed: float) -> None:
        """Costs were measured at capture."""

    def prefill(self, work: Prefill) -> Flight:
        begun = torch.cuda.Event(enable_timing=True)
        begun.record()
        flight = self._to_host(super().prefill(work))
        flight.begun = begun
        return flight

    def prompt_logits(self, chunks: list[Chunk]) -> Tensor:
        """Each chunk is a replay or a few, since launching takes longer than computing it; many short ones are launched
        together, and one by one those for which there is no graph.

        Graphs of prompts above 1,024 tokens are made by `warm_up` alone: making one takes three passes.
        """
        num_tokens = sum(chunk.end - chunk.start for chunk in chunks)
        if len(chunks) > _FEW and num_tokens < _LONG * len(chunks):
            return super().prompt_logits(chunks)
        return torch.cat([self._chunk_logits(piece) for chunk in chunks for piece in _pieces(chunk)])

    def _chunk_logits(self, chunk: Chunk) -> Tensor:
        """logits [1, V] where the chunk is a prompt's last, else [0, V]."""
        graph = self._prompt_graph(chunk)
        if graph is None:
            return super().prompt_logits([chunk])
        return graph.replay(chunk, self.page_table.shape[1])[: chunk.last].clone()

    def _prompt_graph(self, chunk: Chunk) -> PromptGraph | None:
        count = chunk.end - chunk.start
        fits = [size for size in self._prompts if size >= count and (size <= _PROMPT_SIZES[-1] or chunk.start == 0)]
        return self._prompts[min(fits)] if fits else None

    def decode(self, work: Decode) -> Flight:
        started = time.perf_counter()
        sequences, [length] = work.sequences, set(work.lengths)
        self.update_pages(sequences)
        captured = self._graph(_bucket(len(sequences)), length)
        self._set_slots(captured, sequences)
        captured.graph.replay()
        if all(each.request.sampling.plain for each in sequences):
            drawing = any(each.request.sampling.temperature for each in sequences)
            margin = any(each.request.margin for each in sequences)
            end = captured.drawing if drawing else captured.margin if margin else captured.greedy
            end.graph.replay()
            queries = len(sequences) * (length + 1)
            flight = Flight(_entries(sequences, work.lengths), end.result, True, queries, started)
        else:
            count = len(sequences)
            queries = count * (length + 1)
            flight = self._conclude(
                sequences,
                work.lengths,
                captured.logits[:queries],
                captured.slots[:count],
                captured.starts[: count + 1],
                _first(captured.step, queries, count),
                captured.batch,
            )
            flight.launched = started
        return self._to_host(flight)

    def _to_host(self, flight: Flight) -> Flight:
        """Starts the copy of a step's results; `land` waits for it."""
        flight.result = _pinned(flight.result)
        if flight.logprobs is not None:
            flight.logprobs = _all_pinned(flight.logprobs)
        for each in flight.of_prompts:
            each.values = _all_pinned(each.values)
        flight.event = torch.cuda.Event(enable_timing=True)
        flight.event.record()
        return flight

    def _set_slots(self, captured: StepGraph, sequences: list[Sequence]) -> None:
        slots = [each.slot for each in sequences]
        slots += [self.spare] * (len(captured.slots) - len(slots))
        key = id(captured)
        if self._loaded.get(key) != slots:
            captured.slots.copy_(to_device(slots, torch.int64, self.device))
            self._loaded[key] = slots

    @torch.inference_mode()
    def _capture_prompt(self, size: int) -> PromptGraph:
        width, page = self.page_table.shape[1], self.cache.page_size
        inputs = torch.zeros(2 + width + size, dtype=torch.int64, device=self.device)
        inputs[1] = size
        places = torch.arange(size, device=self.device)
        bounds = torch.tensor([0, size], dtype=torch.int32, device=self.device)
        branch_starts = torch.zeros(size, dtype=torch.int32, device=self.device)
        fresh = size > _PROMPT_SIZES[-1]
        host = HostLengths([0, size], [0], [None])

        def run() -> Tensor:
            # what is past the prompt's end goes to the waste page
            start, count, table, tokens = inputs.split([1, 1, width, size])
            inside = places < count
            positions = torch.where(inside, places + start, 0)
            pages = table[positions // page]
            batch = AttentionBatch(
                positions=positions,
                slots=torch.where(inside, pages * page + positions % page, 0),
                page_table=table.int().view(1, -1),
                context_lens=start.int(),
                query_starts=bounds if fresh else torch.cat([bounds[:1], count.int()]),
                branch_starts=branch_starts,
                max_query=size,
                max_context=0 if fresh else width * page,
                branching=not fresh,  # the kernel for branches reads lengths on the device, as a graph must
                host=host if fresh else None,
            )
            return self.model.forward(tokens, self.cache, batch, count - 1)

        graph, logits = self._captured(run)
        return PromptGraph(graph, inputs, (places, bounds, branch_starts), logits)

    @torch.inference_mode()
    def _run_prompts(self, count: int, tokens: int) -> None:
        """An eager pass over prompts that are written to the waste page: compiles and loads what such passes need."""
        zeros = torch.zeros(count * tokens, dtype=torch.int64, device=self.device)
        bounds = [tokens * index for index in range(count + 1)]
        width = -(-tokens // self.cache.page_size)
        batch = AttentionBatch(
            positions=zeros,
            slots=zeros,
            page_table=torch.zeros(count, width, dtype=torch.int32, device=self.device),
            context_lens=zeros[:count].int(),
            query_starts=torch.tensor(bounds, dtype=torch.int32, device=self.device),
            branch_starts=zeros.int(),
            max_query=tokens,
            max_context=0,
            host=HostLengths(bounds, [0] * count, [None] * count),
        )
        self.model.forward(zeros, self.cache, batch, zeros[:count])

    def _captured(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Runs twice to compile and to settle the allocator, then captures; returns the graph and what `run` gave in it.

        It is replayed once: a capture alone leaves what it gives unwritten, and the first replay takes longest.
        """
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, result = self._capture_of(run)
        graph.replay()
        return graph, result

    def _capture_of(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph, result

    def _lengths(self, size: int) -> list[int]:
        limit = self.config.max_draft or 0
        if self.config.fixed_draft is not None:
            return [self.config.fixed_draft]
        return [each for each in LENGTHS if each <= limit and (each == 0 or size * (each + 1) <= self._max_queries)]

    def _graph(self, size: int, length: int) -> StepGraph:
        key = (size, length)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size, length)
        return self._graphs[key]

    @torch.inference_mode()
    def _capture(self, size: int, length: int) -> StepGraph:
        queries = length + 1
        slots = torch.full((size,), self.spare, dtype=torch.int64, device=self.device)
        starts = torch.arange(0, size * queries + 1, queries, dtype=torch.int32, device=self.device)
        graph, (step, batch, logits) = self._captured(lambda: self.forward(slots, starts, size * queries, queries))

        def end(margin: bool, drawing: bool) -> End:
            def run() -> Tensor:
                choices = argmax(logits)
                if drawing:
                    choices = drawn(logits, choices, step, self.state, slots, starts, self.draws)
                return self.verify(slots, starts, step, batch, logits, choices, queries, margin)

            return End(*self._captured(run))

        greedy = end(False, False)
        margin = end(True, False) if length else greedy  # a margin is for drafts
        drawing = end(bool(length), True)
        seconds = _time(graph) + _time(greedy.graph)
        return StepGraph(graph, slots, starts, step, batch, logits, greedy, margin, drawing, seconds)


def _pieces(chunk: Chunk) -> list[Chunk]:
    """A chunk that goes on with a prompt and is too long for a graph, cut up where that takes no longer than launching it."""
    size = _PROMPT_SIZES[-1]
    if chunk.start == 0 or (chunk.end > _PIECES_UP_TO and chunk.end - chunk.start > 2 * size):
        return [chunk]
    starts = range(chunk.start, chunk.end, size)
    ends = [*starts[1:], chunk.end]
    return [
        replace(chunk, start=a, end=b, last=chunk.last and b == chunk.end) for a, b in zip(starts, ends, strict=True)
    ]


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _first(step: StepTokens, queries: int, count: int) -> StepTokens:
    """The part of a padded step that belongs to its first `count` requests."""
    return StepTokens(
        step.tokens[:queries],
        step.depths[:queries],
        step.branch_starts[:queries],
        step.origins[:queries],
        step.guesses[:count],
    )


def _all_pinned(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (_pinned(each) for each in tensors)
    return first, second, third


def _pinned(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    return host


def _time(graph: torch.cuda.CUDAGraph, repeats: int = 5) -> float:
    """Seconds of a replay, the least of a few; the spare slot keeps it from touching any request."""
    least = float("inf")
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        least = min(least, begin.elapsed_time(end) / 1000)
    return least
