"""The runner for CUDA: decode steps are graphs over fixed shapes, and the host reads results one step behind."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.config import EngineConfig
from paceline.drafters.chooser import LENGTHS
from paceline.engine.runner import Flight, Runner, _entries
from paceline.engine.scheduler import Decode, Prefill
from paceline.engine.sequence import Sequence
from paceline.kv.cache import KVCache
from paceline.models.decoder import Decoder
from paceline.ops.argmax import argmax
from paceline.ops.attention import AttentionBatch
from paceline.ops.copy_draft import StepTokens

_MAX_QUERIES = 1100  # a step of more queries than this costs as much as it gives

GREEDY, MARGIN, LOGITS = "greedy", "margin", "logits"


@dataclass
class StepGraph:
    """One captured shape. `result` is accept's, or None where the graph ends with the logits."""

    graph: torch.cuda.CUDAGraph
    slots: Tensor
    starts: Tensor
    step: StepTokens
    batch: AttentionBatch
    logits: Tensor
    result: Tensor | None
    seconds: float


class GraphRunner(Runner):
    """Decode steps as replays. A step of B requests with Q queries each runs in the graph of the next larger B."""

    lag = 1
    uniform = True

    def __init__(self, model: Decoder, cache: KVCache, config: EngineConfig) -> None:
        super().__init__(model, cache, config)
        self.spare = config.max_batch
        self._graphs: dict[tuple[int, int, str], StepGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._loaded: dict[int, list[int]] = {}

    @torch.inference_mode()
    def warm_up(self, batch: int) -> None:
        """Captures the greedy graphs of up to `batch` requests, so that no request waits for it."""
        size = 1
        while True:
            for length in self._lengths(size):
                self._graph(size, length, GREEDY)
            if size >= batch:
                break
            size *= 2

    def step_cost(self, num_requests: int, length: int) -> float:
        size = _bucket(num_requests)
        if length not in self._lengths(size):
            return float("inf")
        return self._graph(size, length, GREEDY).seconds

    def learn(self, flight: Flight, landed: float) -> None:
        """Costs were measured at capture."""

    def prefill(self, work: Prefill) -> Flight:
        return self._to_host(super().prefill(work))

    def decode(self, work: Decode) -> Flight:
        started = time.perf_counter()
        sequences, length = work.sequences, max(work.lengths)
        self.update_pages(sequences)
        plain = all(each.request.sampling.greedy and each.request.sampling.logprobs is None for each in sequences)
        margin = any(each.request.margin for each in sequences)
        captured = self._graph(_bucket(len(sequences)), length, (MARGIN if margin else GREEDY) if plain else LOGITS)
        self._set_slots(captured, sequences)
        captured.graph.replay()
        lengths = [length] * len(sequences)
        if captured.result is not None:
            queries = len(sequences) * (length + 1)
            flight = Flight(_entries(sequences, work.lengths), captured.result, True, queries, started)
        else:
            count = len(sequences)
            queries = count * (length + 1)
            flight = self._conclude(
                sequences,
                lengths,
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
            values, top, tokens = (_pinned(each) for each in flight.logprobs)
            flight.logprobs = values, top, tokens
        flight.event = torch.cuda.Event()
        flight.event.record()
        return flight

    def _set_slots(self, captured: StepGraph, sequences: list[Sequence]) -> None:
        slots = [each.slot for each in sequences]
        slots += [self.spare] * (len(captured.slots) - len(slots))
        key = id(captured)
        if self._loaded.get(key) != slots:
            captured.slots.copy_(self._to_device(slots, torch.int64))
            self._loaded[key] = slots

    def _lengths(self, size: int) -> list[int]:
        limit = self.config.max_draft or 0
        if self.config.fixed_draft is not None:
            return [self.config.fixed_draft]
        return [each for each in LENGTHS if each <= limit and (each == 0 or size * (each + 1) <= _MAX_QUERIES)]

    def _graph(self, size: int, length: int, mode: str) -> StepGraph:
        key = (size, length, mode)
        if key not in self._graphs:
            self._graphs[key] = self._capture(size, length, mode)
        return self._graphs[key]

    @torch.inference_mode()
    def _capture(self, size: int, length: int, mode: str) -> StepGraph:
        queries = length + 1
        slots = torch.full((size,), self.spare, dtype=torch.int64, device=self.device)
        starts = torch.arange(0, size * queries + 1, queries, dtype=torch.int32, device=self.device)

        def step() -> tuple[StepTokens, AttentionBatch, Tensor, Tensor | None]:
            tokens, batch, logits = self.forward(slots, starts, size * queries, queries)
            if mode == LOGITS:
                return tokens, batch, logits, None
            choices = argmax(logits)
            result = self.verify(slots, starts, tokens, batch, logits, choices, queries, mode == MARGIN)
            return tokens, batch, logits, result

        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            tokens, batch, logits, result = step()
        return StepGraph(graph, slots, starts, tokens, batch, logits, result, _time(graph))


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
