"""What it costs to hold a draft to a grammar: the masks of all its positions, and their application to the logits.

    python benchmarks/grammar.py --model qwen2.5-coder-1.5b --positions 20,64

The draft is a text that the grammar allows, cut to each number of positions; times are the least of some repeats, in
milliseconds, on the CPU. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from common import finish

from paceline.engine.grammar import Grammars, forbid, json_schema
from paceline.models.checkpoint import open_checkpoint
from paceline.models.pull import pull

SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "lines": {"type": "array", "items": {"type": "integer"}}},
    "required": ["path", "lines"],
}
PATCH = 'start: "*** Begin Patch\\n" line+ "*** End Patch"\nline: /[+ -][^\\n]*/ "\\n"\n'
DRAFTS = {
    "json": (json_schema(SCHEMA), json.dumps({"path": "src/store/" * 9, "lines": list(range(90))})),
    "lark": (PATCH, "*** Begin Patch\n" + "+    return width * height\n" * 20 + "*** End Patch"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen2.5-coder-1.5b")
    parser.add_argument("--positions", default="20,64")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(pull(arguments.model))
    tokenizer, vocabulary = checkpoint.tokenizer(), checkpoint.config.vocab_size
    began = time.perf_counter()
    grammars = Grammars(tokenizer, vocabulary)
    result: dict[str, Any] = {"vocabulary": vocabulary, "tokenizer_seconds": round(time.perf_counter() - began, 2)}
    for name, (grammar, text) in DRAFTS.items():
        for number in map(int, arguments.positions.split(",")):
            tokens = [0, *tokenizer.encode(text)][:number]
            assert len(tokens) == number, f"the {name} draft has but {len(tokens)} positions"
            masks, applied = least(grammars, grammar, tokens, arguments.repeats)
            result[f"{name} {number}"] = {"masks_ms": round(1000 * masks, 3), "apply_ms": round(1000 * applied, 3)}
            print(name, number, result[f"{name} {number}"], flush=True)
    finish({"benchmark": "grammar", "model": arguments.model, **result})


def least(grammars: Grammars, grammar: str, tokens: list[int], repeats: int) -> tuple[float, float]:
    """Seconds of the masks of a step whose one branch is `tokens` after the first, and of applying them."""
    masks, applied = [], []
    starts = [0, *[1] * (len(tokens) - 1)]
    for _ in range(repeats):
        follower = grammars.follow(grammar)
        logits = torch.zeros(len(tokens), grammars.vocab_size)
        began = time.perf_counter()
        bits = follower.masks(tokens, starts)
        middle = time.perf_counter()
        forbid(logits, bits)
        masks.append(middle - began)
        applied.append(time.perf_counter() - middle)
    return min(masks), min(applied)


if __name__ == "__main__":
    main()
