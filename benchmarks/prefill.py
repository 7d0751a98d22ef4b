"""Time to first token of a long prompt: cold, and as a conversation's second turn with the first turn cached.

    python -m benchmarks.prefill --tokens 8192 --turn 256 [--profile]

--profile, on CUDA: the share of each kernel in a cold prompt's time, and the milliseconds to first token of eight cold prompts
computed one after another without a pause. A card at its power limit computes the later ones more slowly.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import MODEL, argument_parser, finish, quantiles
from benchmarks.tools.profiling import busy
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling, Usage

_COMMON_TOKENS = 50_000  # prompts are drawn from the tokens below this


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the first turn's prompt")
    parser.add_argument("--turn", type=int, default=256, help="tokens that the second turn adds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    if arguments.profile and not torch.cuda.is_available():
        sys.exit("--profile needs CUDA")

    engine = Engine.load(arguments.model, EngineConfig(max_context=arguments.tokens + arguments.turn + 64))
    engine.warm_up(1)
    draw = random.Random(0)
    cold, warm = [], []
    for _ in range(arguments.repeats + 1):
        prompt = random_tokens(engine, draw, arguments.tokens)
        first = engine.generate([Request(prompt, Sampling(max_tokens=2, ignore_eos=True))])[0].checked()
        turn = [*prompt, *first.tokens, *random_tokens(engine, draw, arguments.turn)]
        second = usage_of(engine, turn, 2)
        cold.append(1000 * first.usage.prefill_seconds)
        warm.append(1000 * second.prefill_seconds)
    result = {
        "tokens": arguments.tokens,
        "turn": arguments.turn,
        "cold_ms": quantiles(cold[1:]),
        "second_turn_ms": quantiles(warm[1:]),
        "cached_tokens": second.cached_tokens,
        "tokens_per_second": round(1000 * arguments.tokens / quantiles(cold[1:])["median"], 1),
    }
    if arguments.profile:
        result |= profiled(engine, [random_tokens(engine, draw, arguments.tokens) for _ in range(9)])
    print(result)
    finish({"benchmark": "prefill", "model": arguments.model, **result})


def random_tokens(engine: Engine, draw: random.Random, count: int) -> list[int]:
    limit = min(engine.vocab_size, _COMMON_TOKENS)
    return [draw.randrange(limit) for _ in range(count)]


def usage_of(engine: Engine, prompt: list[int], max_tokens: int) -> Usage:
    return engine.generate([Request(prompt, Sampling(max_tokens=max_tokens, ignore_eos=True))])[0].checked().usage


def profiled(engine: Engine, prompts: list[list[int]]) -> dict[str, Any]:
    """The profile of the first prompt, and the times of the others one after another."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        usage_of(engine, prompts[0], 1)
        torch.cuda.synchronize()
    times = [round(1000 * usage_of(engine, prompt, 1).prefill_seconds, 2) for prompt in prompts[1:]]
    return {"profile": busy(profiler), "one_after_another_ms": times}


if __name__ == "__main__":
    main()
