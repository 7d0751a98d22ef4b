"""Reads the traces of torch's profiler."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import profile


def kernels(profiler: profile) -> list[FunctionEvent]:
    """The kernels and copies on the GPU, in the order of their start."""
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(events, key=lambda event: event.time_range.start)


def busy(profiler: profile) -> dict[str, Any]:
    """The share of time in which the GPU is busy, milliseconds in all, and the share of the ten longest-running kernels."""
    events = kernels(profiler)
    covered, reached = 0.0, events[0].time_range.start
    times: Counter[str] = Counter()
    for event in events:
        start, end = event.time_range.start, event.time_range.end
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        times[event.name[:60]] += end - start
    whole = reached - events[0].time_range.start
    return {
        "busy": round(covered / whole, 4),
        "milliseconds": round(whole / 1000, 2),
        "kernels": len(events),
        "top": {name: round(spent / whole, 3) for name, spent in times.most_common(10)},
    }
