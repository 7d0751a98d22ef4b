"""Paceline as a peer: plain, and with its copy drafter. Protocol: job.py.

Settings: any of EngineConfig. A job may carry `sources`: for each prompt, the token lists its output may copy from.
"""

from __future__ import annotations

import time

import torch

from benchmarks.peers.job import Timed, context_needed, read_job, run_job
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling


def main() -> None:
    job = read_job()
    settings = {"drafter": "copy" if job["mode"] == "lookup" else "none"} | job["settings"]
    fixed = {
        "device": "cpu",
        "dtype": job["dtype"],
        "threads": job["threads"],
        "max_context": context_needed(job),
        "prefix_cache": False,
    }
    engine = Engine.load(job["model"], EngineConfig.from_dict(fixed | settings))
    sources = {
        tuple(prompt): tuple(each) for prompt, each in zip(job["prompts"], job.get("sources") or [], strict=False)
    }

    def complete(prompt: list[int], max_tokens: int) -> Timed:
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, stop_tokens=tuple(job["stop_tokens"]))
        output: list[int] = []
        marks: list[tuple[float, int]] = []
        start = time.perf_counter()
        for step in engine.stream(Request(prompt, sampling, sources=sources.get(tuple(prompt), ()))):
            output += step.tokens
            if step.tokens:
                marks.append((time.perf_counter(), len(output)))
        return Timed.from_marks(output, start, marks)

    run_job(job, "paceline", f"paceline, torch {torch.__version__}", settings, complete)


if __name__ == "__main__":
    main()
