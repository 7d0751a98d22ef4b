"""The runner for CUDA: decode steps are graphs over fixed shapes, and the host reads results one step behind."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from paceline.config import ResolvedConfig
from paceline.drafters.base import Drafter
from paceline.engine.in_flight import InFlightStep
from paceline.engine.runner import Runner, TargetPass
from paceline.engine.sampler import drawn
from paceline.engine.scheduler import Chunk, Decode, Prefill
from paceline.engine.sequence import DRAWS, HAS_MARGIN, NOT_PLAIN, Sequence
from paceline.engine.transfer import to_device
from paceline.kv.cache import KVCache
from paceline.models.base import Model
from paceline.ops.argmax import argmax
from paceline.ops.attention import AttentionBatch, HostLengths

# The constants below were measured on one H100 with Qwen2.5-Coder-1.5B in bf16.
# The most queries of a step: with 2,100 a query takes a tenth less time than with 1,100, and the graphs' logits take 2.5 GB
# more (python -m benchmarks.apply --together 64).
_MAX_QUERIES, _MAX_QUERIES_SMALL = 2200, 1100
_SMALL_BYTES = 40 << 30  # of a GPU's memory

# Prompt graphs (python -m benchmarks.prefill). Those of _FRESH_SIZES serve prompts of which nothing is cached: up to 2,048
# tokens launching the kernels takes longer than computing them.
_PROMPT_SIZES = (64, 128, 256, 512, 1024)
_FRESH_SIZES = (*range(1280, 4096, 256), *range(4096, 8193, 512))
# Chunks are replayed one by one where there are at most _FEW of them, or they have _LONG tokens on average; otherwise they
# are one launched pass.
_FEW, _LONG = 8, 512
# A chunk that continues a prompt is replayed in pieces of 1,024 tokens where it ends below this position, or has at most
# two pieces; beyond, one launched pass is faster.
_PIECES_UP_TO = 8192

T = TypeVar("T")


@dataclass
class VerifyGraph:
    """The second part of a step, from logits to verification's result and path; for steps of plain requests alone."""

    graph: torch.cuda.CUDAGraph
    result: Tensor
    path: Tensor


@dataclass
class StepGraph:
    """One captured shape: the target pass, and its second part in three forms.

    `margin` serves steps in which a request has a margin, `drawing` those in which one has a temperature, or both;
    `seconds` is the time of a step with `greedy`.
    """

    graph: torch.cuda.CUDAGraph
    target: TargetPass
    greedy: VerifyGraph
    margin: VerifyGraph
    drawing: VerifyGraph
    seconds: float


@dataclass
class PromptGraph:
    """A captured pass over one chunk of at most T prompt tokens; above 1,024 over a prompt's first tokens.

    inputs [3 + T] int64: slot, committed and query counts, the tokens. `constants` are the other tensors that the graph
    reads; they must live as long as it does.
    """

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    constants: tuple[Tensor, ...]
    logits: Tensor

    def replay(self, chunk: Chunk) -> Tensor:
        """Runs the pass for `chunk`, whose pages are in the page table; logits [1, V] after its last token.

        The next replay overwrites them.
        """
        end = 3 + chunk.end - chunk.start
        staged = torch.empty(end, dtype=torch.int64, pin_memory=True)  # freed after its copy has ended
        host = staged.numpy()
        host[:3] = chunk.sequence.slot, chunk.start, chunk.end - chunk.start
        host[3:] = chunk.sequence.array(chunk.start, chunk.end)
        self.inputs[:end].copy_(staged, non_blocking=True)
        self.graph.replay()
        return self.logits


class GraphRunner(Runner):
    """Decode steps as replays. A step of B requests with Q queries each runs in the graph of the next larger B."""

    lag = 1

    def __init__(self, model: Model, cache: KVCache, config: ResolvedConfig, drafter: Drafter) -> None:
        super().__init__(model, cache, config, drafter)
        self.uniform = True
        self._graphs: dict[tuple[int, int], StepGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._prompts: dict[int, PromptGraph] = {}
        self._loaded: dict[int, list[int]] = {}
        small = torch.cuda.get_device_properties(self.device).total_memory < _SMALL_BYTES
        self._max_queries = _MAX_QUERIES_SMALL if small else _MAX_QUERIES

    @torch.inference_mode()
    def warm_up(self, batch: int) -> None:
        """Captures the graphs of steps of up to `batch` requests and of prompts; runs once the passes that are not captured."""
        for tokens in _PROMPT_SIZES + _FRESH_SIZES:
            if tokens <= self.config.max_context:
                self._prompts[tokens] = self._capture_prompt(tokens)
        for count, tokens in ((1, 2 * _PROMPT_SIZES[-1]), (1, self.config.prefill_chunk), (16, 16), (64, 64)):
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

    def learn(self, step: InFlightStep, read_at: float) -> None:
        """Costs were measured at capture."""

    def prefill(self, work: Prefill) -> InFlightStep:
        begin_event = torch.cuda.Event(enable_timing=True)
        begin_event.record()
        step = self._to_host(super().prefill(work))
        step.begin_event = begin_event
        return step

    def prompt_logits(self, chunks: list[Chunk]) -> Tensor:
        """Replays graphs, one chunk or piece of a chunk each: launching a chunk's kernels takes longer than computing it.

        Many short chunks are launched together; a chunk for which there is no graph is launched alone. Only `warm_up` makes
        graphs of prompts above 1,024 tokens, since making one takes three passes.
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
        return graph.replay(chunk)[: chunk.last].clone()

    def _prompt_graph(self, chunk: Chunk) -> PromptGraph | None:
        count = chunk.end - chunk.start
        fits = [size for size in self._prompts if size >= count and (size <= _PROMPT_SIZES[-1] or chunk.start == 0)]
        return self._prompts[min(fits)] if fits else None

    def decode(self, work: Decode) -> InFlightStep:
        started = time.perf_counter()
        sequences, [length] = work.sequences, set(work.lengths)
        self.update_pages(sequences)
        captured = self._graph(_bucket(len(sequences)), length)
        self._set_slots(captured, sequences)
        captured.graph.replay()
        if not work.traits & NOT_PLAIN:
            drawing, margin = work.traits & DRAWS, work.traits & HAS_MARGIN
            second = captured.drawing if drawing else captured.margin if margin else captured.greedy
            second.graph.replay()
            step = self._in_flight(sequences, work.lengths, second.result, second.path, started)
        else:
            step = self._conclude(sequences, work.lengths, _first(captured.target, len(sequences), length + 1))
            step.launched = started
        return self._to_host(step)

    def _to_host(self, step: InFlightStep) -> InFlightStep:
        """Starts the copy of a step's results; `read` waits for it."""
        step.result = _pinned(step.result)
        if step.logprobs is not None:
            step.path = _pinned(step.path)
            step.logprobs = _all_pinned(step.logprobs)
        for each in step.prompt_logprobs:
            each.values = _all_pinned(each.values)
        step.end_event = torch.cuda.Event(enable_timing=True)
        step.end_event.record()
        return step

    def _set_slots(self, captured: StepGraph, sequences: list[Sequence]) -> None:
        target = captured.target.batch.slots
        slots = [each.slot for each in sequences]
        slots += [self.state.spare] * (len(target) - len(slots))
        key = id(captured)
        if self._loaded.get(key) != slots:
            target.copy_(to_device(slots, torch.int64, self.device))
            self._loaded[key] = slots

    @torch.inference_mode()
    def _capture_prompt(self, size: int) -> PromptGraph:
        width, page = self.page_table.shape[1], self.cache.page_size
        inputs = torch.zeros(3 + size, dtype=torch.int64, device=self.device)
        inputs[0], inputs[2] = self.state.spare, size
        places = torch.arange(size, device=self.device)
        bounds = torch.tensor([0, size], dtype=torch.int32, device=self.device)
        branch_starts = torch.zeros(size, dtype=torch.int32, device=self.device)
        fresh = size > _PROMPT_SIZES[-1]
        host = HostLengths([0, size], [0], [None])

        def run() -> Tensor:
            # tokens past the prompt's end are written to the waste page
            slot, start, count, tokens = inputs.split([1, 1, 1, size])
            inside = places < count
            positions = torch.where(inside, places + start, 0)
            table = self.page_table[slot]
            pages = table[0, positions // page].long()
            batch = AttentionBatch(
                positions=positions,
                locations=torch.where(inside, pages * page + positions % page, 0),
                page_table=table,
                context_lens=start.int(),
                query_starts=bounds if fresh else torch.cat([bounds[:1], count.int()]),
                branch_starts=branch_starts,
                max_query=size,
                max_context=0 if fresh else width * page,
                branching=not fresh,  # the kernel for branches reads lengths on the device, which a graph needs
                host=host if fresh else None,
            )
            return self.forward(tokens, batch, count - 1)

        graph, logits = self._captured(run)
        return PromptGraph(graph, inputs, (places, bounds, branch_starts), logits)

    @torch.inference_mode()
    def _run_prompts(self, count: int, tokens: int) -> None:
        """An eager pass over prompts that are written to the waste page: compiles and loads the kernels of such passes."""
        zeros = torch.zeros(count * tokens, dtype=torch.int64, device=self.device)
        bounds = [tokens * index for index in range(count + 1)]
        width = -(-tokens // self.cache.page_size)
        batch = AttentionBatch(
            positions=zeros,
            locations=zeros,
            page_table=torch.zeros(count, width, dtype=torch.int32, device=self.device),
            context_lens=zeros[:count].int(),
            query_starts=torch.tensor(bounds, dtype=torch.int32, device=self.device),
            branch_starts=zeros.int(),
            max_query=tokens,
            max_context=0,
            host=HostLengths(bounds, [0] * count, [None] * count),
        )
        self.forward(zeros, batch, zeros[:count])

    def _captured(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """Runs twice to compile and to settle the allocator, then captures; returns the graph and its output tensors.

        Replays it once: a capture alone leaves the outputs unwritten, and the first replay takes longest.
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
        with _no_garbage_collection(), torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph, result

    def _lengths(self, size: int) -> list[int]:
        """The draft lengths for which a step of `size` requests has graphs."""
        lengths = self.draft_lengths
        return [each for each in lengths if len(lengths) == 1 or each == 0 or size * (each + 1) <= self._max_queries]

    def _graph(self, size: int, length: int) -> StepGraph:
        key = (size, length)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size, length)
        return self._graphs[key]

    @torch.inference_mode()
    def _capture(self, size: int, length: int) -> StepGraph:
        queries = length + 1
        slots = torch.full((size,), self.state.spare, dtype=torch.int64, device=self.device)
        starts = torch.arange(0, size * queries + 1, queries, dtype=torch.int32, device=self.device)
        batch = self.draft_batch(slots, starts, size * queries, queries)
        graph, target = self._captured(lambda: self.target_pass(batch))

        def second(margin: bool, drawing: bool) -> VerifyGraph:
            def run() -> tuple[Tensor, Tensor]:
                choices = argmax(target.logits)
                if drawing:
                    choices = drawn(target.logits, choices, target.draft, self.state, slots, starts, self.draws)
                verified = self.verify(target, choices, margin)
                return verified.result, verified.path

            captured, (result, path) = self._captured(run)
            return VerifyGraph(captured, result, path)

        greedy = second(False, False)
        margin = second(True, False) if length else greedy  # a margin is for drafts
        drawing = second(bool(length), True)
        seconds = _time(graph) + _time(greedy.graph)
        return StepGraph(graph, target, greedy, margin, drawing, seconds)


def _pieces(chunk: Chunk) -> list[Chunk]:
    """A chunk that continues a prompt and is too long for a graph, cut into pieces where replays are no slower (see above)."""
    size = _PROMPT_SIZES[-1]
    if chunk.start == 0 or (chunk.end > _PIECES_UP_TO and chunk.end - chunk.start > 2 * size):
        return [chunk]
    starts = range(chunk.start, chunk.end, size)
    ends = [*starts[1:], chunk.end]
    return [
        replace(chunk, start=a, end=b, last=chunk.last and b == chunk.end) for a, b in zip(starts, ends, strict=True)
    ]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within it no cycle is collected: another engine's graphs may be in one, and freeing a graph ends a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _bucket(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def _first(target: TargetPass, count: int, queries: int) -> TargetPass:
    """The part of a padded pass that belongs to its first `count` requests of `queries` queries each."""
    batch, total = target.batch, count * queries
    return replace(
        target,
        batch=replace(
            batch, slots=batch.slots[:count], query_starts=batch.query_starts[: count + 1], num_queries=total
        ),
        draft=target.draft.take(total, count),
        logits=target.logits[:total],
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
