"""Milliseconds of a decode step, and the share of that time in which the GPU is busy.

    python -m benchmarks.trace --steps 40 [--out trace.json]

One request decodes a copy of its prompt with a fixed draft length. Its steps are timed by the host's clock (`step_ms`), then
traced by torch's profiler. Busy time is the union of all kernels and copies between the first and the last of the traced steps.
The ten kernels with the most time are listed. Needs CUDA.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import MODEL, argument_parser, finish, numbers
from benchmarks.tools.profiling import busy
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--drafts", type=numbers, default=[0, 64, 256], help="draft lengths")
    parser.add_argument("--out", type=Path, help="write the last trace for chrome://tracing")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("trace needs CUDA")
    engine = Engine.load(arguments.model, EngineConfig(max_context=32768))
    text = engine.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    rows = []
    for length in arguments.drafts:
        runner = engine.sibling(dataclasses.replace(engine.config, fixed_draft=length))
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
    """Seconds of `steps` steps without the profiler, which slows them."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
