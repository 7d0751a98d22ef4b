"""Time to first token of a long prompt, cold and as a conversation's second turn with the first turn cached.

python benchmarks/prefill.py --model qwen2.5-coder-1.5b --tokens 8192 --turn 256
"""

from __future__ import annotations

import argparse
import random

from common import finish, quantiles

from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.types import Request, Sampling


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the first turn's prompt")
    parser.add_argument("--turn", type=int, default=256, help="tokens that the second turn adds")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    engine = Engine.load(arguments.model, EngineConfig(max_context=arguments.tokens + arguments.turn + 64))
    engine.warm_up(1)
    draw = random.Random(0)
    limit = min(engine.model.config.vocab_size, 50_000)
    cold, warm = [], []
    for _ in range(arguments.repeats + 1):
        prompt = [draw.randrange(limit) for _ in range(arguments.tokens)]
        first = engine.generate([Request(prompt, Sampling(max_tokens=2, ignore_eos=True))])[0]
        turn = [*prompt, *first.tokens, *(draw.randrange(limit) for _ in range(arguments.turn))]
        second = engine.generate([Request(turn, Sampling(max_tokens=2, ignore_eos=True))])[0]
        cold.append(1000 * first.usage.prefill_seconds)
        warm.append(1000 * second.usage.prefill_seconds)
    result = {
        "tokens": arguments.tokens,
        "turn": arguments.turn,
        "cold_ms": quantiles(cold[1:]),
        "second_turn_ms": quantiles(warm[1:]),
        "cached_tokens": second.usage.cached_tokens,
        "tokens_per_second": round(1000 * arguments.tokens / quantiles(cold[1:])["median"], 1),
    }
    print(result)
    finish({"benchmark": "prefill", "model": arguments.model, **result})


if __name__ == "__main__":
    main()
