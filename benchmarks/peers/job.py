"""The protocol of a peer: a job as JSON on standard input, a result as JSON on the last line of standard output.

Every peer's program imports this in its own environment, so it imports the standard library alone. Programs run from the
repository's root: `python -m benchmarks.peers.NAME < job.json`.

    job     {"model": path, "dtype": name, "threads": n, "mode": "prefill" | "plain" | "lookup",
             "prompts": [[token ids]], "max_tokens": n, "stop_tokens": [token ids], "settings": {}}
    result  {"peer", "version", "mode", "prefill_tok_s", "decode_tok_s", "tokens", "seconds", "outputs", "settings",
             "prefill_rates", "decode_rates"}
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WARM_UP_PROMPT, WARM_UP_TOKENS = 256, 16


@dataclass(frozen=True)
class Timed:
    """One completion. Prefill ends when the first tokens arrive; `decoded` tokens came after them, in `seconds`."""

    output: list[int]
    prefill_seconds: float
    decoded: int
    seconds: float

    @classmethod
    def from_marks(cls, output: list[int], start: float, marks: list[tuple[float, int]]) -> Timed:
        """From (time, tokens so far) at each step's end."""
        (first, early), (last, _) = marks[0], marks[-1]
        return cls(output, first - start, len(output) - early, last - first)


Complete = Callable[[list[int], int], Timed]


def read_job() -> dict[str, Any]:
    job: dict[str, Any] = json.load(sys.stdin)
    return job


def context_needed(job: dict[str, Any], draft: int = 0) -> int:
    """Tokens of context the longest prompt needs, in whole 256s."""
    longest = max(len(prompt) for prompt in job["prompts"])
    return (longest + job["max_tokens"] + draft + 16 + 255) // 256 * 256


def run_job(job: dict[str, Any], peer: str, version: str, settings: dict[str, Any], complete: Complete) -> None:
    """Warms up, completes every prompt, prints the result: medians over prompts of the rates."""
    first = job["prompts"][0]
    if job["mode"] == "prefill":
        complete(first[::-1], 1)
    else:
        complete(first[-WARM_UP_PROMPT:], min(WARM_UP_TOKENS, job["max_tokens"]))
    runs = [complete(prompt, job["max_tokens"]) for prompt in job["prompts"]]
    prefill = [len(prompt) / run.prefill_seconds for prompt, run in zip(job["prompts"], runs, strict=True)]
    decode = [run.decoded / run.seconds for run in runs if run.decoded > 0]
    result = {
        "peer": peer,
        "version": version,
        "mode": job["mode"],
        "prefill_tok_s": round(statistics.median(prefill), 2),
        "decode_tok_s": round(statistics.median(decode), 2) if decode else None,
        "tokens": sum(len(run.output) for run in runs),
        "seconds": round(sum(run.prefill_seconds + run.seconds for run in runs), 3),
        "outputs": [run.output for run in runs],
        "settings": settings,
        "prefill_rates": [round(rate, 2) for rate in prefill],
        "decode_rates": [round(rate, 2) for rate in decode],
    }
    print("\n" + json.dumps(result), flush=True)
