"""Is the host ever in the way? Traces decode steps and reports the share of time in which the GPU is at work.

    python benchmarks/trace.py --model qwen2.5-coder-1.5b --steps 40 [--out trace.json]

One copying request decodes, timed first (`step_ms`) and then under torch's profiler; busy time is the union of all kernels
and copies between the first kernel and the last of the traced steps. The ten kernels with the most time are listed.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from common import finish
from torch.profiler import ProfilerActivity, profile

from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--drafts", default="0,64,256")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    engine = Engine.load(arguments.model, EngineConfig(max_context=32768))
    text = engine.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    rows = []
    for length in map(int, arguments.drafts.split(",")):
        runner = engine.sibling(engine.config.__class__(**{**vars(engine.config), "fixed_draft": length}))
        runner.warm_up(1)
        tokens = (length + 1) * (2 * arguments.steps + 8)
        request = Request(text, Sampling(max_tokens=min(tokens, 28000), ignore_eos=True), sources=(text,))
        name = runner.submit(request)
        for _ in range(6):
            runner.step()
        seconds = timed(runner, arguments.steps)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(arguments.steps):
                runner.step()
            torch.cuda.synchronize()
        runner.cancel(name)
        if arguments.out:
            profiler.export_chrome_trace(str(arguments.out))
        rows.append({"draft": length, "step_ms": round(1000 * seconds / arguments.steps, 3), **busy(profiler)})
        print(rows[-1])
    finish({"benchmark": "trace", "model": arguments.model, "rows": rows})


def timed(engine: Engine, steps: int) -> float:
    """Seconds of `steps` steps without the profiler, which costs some itself."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def busy(profiler: profile) -> dict[str, object]:
    """Busy share, milliseconds in all, and the kernels with the most time."""
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    covered, reached = 0.0, spans[0][0]
    for start, end in spans:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    times: Counter[str] = Counter()
    for event in events:
        times[event.name[:60]] += event.time_range.end - event.time_range.start
    whole = reached - spans[0][0]
    top = {name: round(spent / whole, 3) for name, spent in times.most_common(10)}
    return {
        "busy": round(covered / whole, 4),
        "milliseconds": round(whole / 1000, 2),
        "kernels": len(events),
        "top": top,
    }


if __name__ == "__main__":
    main()
