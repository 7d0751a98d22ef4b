"""Times of functions on the GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def graph_time(function: Callable[[], Any], rounds: int = 5, replays: int = 8) -> float:
    """Milliseconds a call in a CUDA graph: the median over rounds of the mean over replays."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            held = function()
        finally:
            graph.capture_end()
        graph.replay()
        times = []
        for _ in range(rounds):
            start, end = event(), event()
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / replays)
    del held
    return float(statistics.median(times))


def eager_time(function: Callable[[], Any], rounds: int = 5) -> float:
    """Milliseconds a call launched from the host: the median over rounds."""
    times = []
    for _ in range(rounds + 1):
        start, end = event(), event()
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times[1:]))
