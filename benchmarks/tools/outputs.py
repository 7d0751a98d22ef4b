"""Outputs of tiny random models in float32 on the CPU, to the last bit: record before a refactoring, compare after.

    python -m benchmarks.tools.outputs before.json                      # at the state before, if need be with this file copied
    python -m benchmarks.tools.outputs after.json --compare before.json

Three families under eight configurations (draft lengths, no drafts, deterministic mode, short chunks, a cache so small that
requests are preempted), each with greedy, drawn and penalised requests that report log-probabilities, and with margins. Set
OMP_NUM_THREADS=1: with other numbers of threads the bits may differ. Exit status 1 where an output differs.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import argument_parser
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling, TokenLogprob
from tests.tiny import tiny_engine

FAMILIES = ("llama", "qwen2", "qwen3")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "copy8": {"fixed_draft": 8},
    "copy32": {"fixed_draft": 32},
    "copy128": {"fixed_draft": 128},
    "none": {"drafter": "none"},
    "det": {"fixed_draft": 32, "deterministic": True},
    "detnone": {"drafter": "none", "deterministic": True},
    "chunk": {"fixed_draft": 16, "prefill_chunk": 16, "page_size": 4, "cache_tokens": 900},
    "small": {"fixed_draft": 32, "page_size": 4, "cache_tokens": 620, "max_batch": 4},
}
SAMPLINGS = (
    Sampling(max_tokens=60, ignore_eos=True, logprobs=20),
    Sampling(max_tokens=60, ignore_eos=True, temperature=0.8, top_p=0.9, seed=7, logprobs=5),
    Sampling(max_tokens=50, ignore_eos=True, prompt_logprobs=3, logprobs=1),
    Sampling(max_tokens=50, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.5, logprobs=2),
)
_COUNTS = ("drafted", "accepted", "steps", "source_drafted", "source_accepted", "margin", "cached")
_NO_STALL_MS = 10**6  # chunks do not depend on the time that steps take


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument("--compare", type=Path, help="a file written before")
    arguments = parser.parse_args()
    found = record()
    arguments.out.write_text(json.dumps(found))
    before = found if arguments.compare is None else json.loads(arguments.compare.read_text())
    # through JSON, as the file before came: its lists are no tuples
    now = json.loads(json.dumps(found))
    different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    print(json.dumps({"benchmark": "outputs", "groups": len(now), "different": different}))
    sys.exit(1 if different and arguments.compare is not None else 0)


def record() -> dict[str, list[Any]]:
    """The outputs of every group of requests, by family, configuration and kind of request."""
    draw = random.Random(1)
    text = [draw.randrange(256) for _ in range(150)]
    prompts = [[draw.randrange(256) for _ in range(size)] for size in (5, 40, 100, 33)]
    prompts += [text * 2, text[:70] + text[20:90]]
    sampled = [
        Request(prompt, SAMPLINGS[index % 4], sources=(text[10:100],) if index % 2 else ())
        for index, prompt in enumerate(prompts)
    ]
    greedy = Sampling(max_tokens=60, ignore_eos=True)
    sources = (text[10:100], text[50:])
    margins = [Request(each, greedy, sources, margin=2.5 * (index % 2)) for index, each in enumerate(prompts)]
    rows = {}
    for family in FAMILIES:
        for name, settings in CONFIGURATIONS.items():
            engine = tiny_engine(family, max_stall_ms=_NO_STALL_MS, **settings)
            rows[f"{family}/{name}/all"] = outputs(engine, sampled)
            rows[f"{family}/{name}/margin"] = outputs(engine, margins)
    return rows


def outputs(engine: Engine, requests: list[Request]) -> list[Any]:
    """Each request's tokens, text, end, log-probabilities and counts."""
    found = []
    for each in engine.generate(requests):
        counts = [getattr(each.usage, f"{name}_tokens" if name != "steps" else name) for name in _COUNTS]
        values = [exact(each.logprobs), exact(each.prompt_logprobs)]
        found.append([each.tokens, each.text, each.finish.value, *values, *counts])
    return found


def exact(logprobs: tuple[TokenLogprob, ...]) -> list[Any]:
    """Log-probabilities with every bit of their numbers."""
    return [
        (each.token, float(each.logprob).hex(), [(token, float(value).hex()) for token, value in each.top])
        for each in logprobs
    ]


if __name__ == "__main__":
    main()
