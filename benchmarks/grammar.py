"""The cost of constrained decoding of a draft: making the token masks of all its positions and applying them to the logits.

    python -m benchmarks.grammar --positions 20,64

The draft is a text that the grammar allows, cut to each number of positions. Times are the minimum over the repeats, in
milliseconds, on the CPU.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from benchmarks.common import MODEL, argument_parser, finish, numbers
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
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--positions", type=numbers, default=[20, 64], help="numbers of positions")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(pull(arguments.model))
    tokenizer, vocabulary = checkpoint.tokenizer(), checkpoint.config.vocab_size
    began = time.perf_counter()
    grammars = Grammars(tokenizer, vocabulary)
    result: dict[str, Any] = {"vocabulary": vocabulary, "tokenizer_seconds": round(time.perf_counter() - began, 2)}
    for name, (grammar, text) in DRAFTS.items():
        for number in arguments.positions:
            tokens = [0, *tokenizer.encode(text)][:number]
            assert len(tokens) == number, f"the {name} draft has only {len(tokens)} positions"
            masks, applied = least(grammars, grammar, tokens, arguments.repeats)
            result[f"{name} {number}"] = {"masks_ms": round(1000 * masks, 3), "apply_ms": round(1000 * applied, 3)}
            print(name, number, result[f"{name} {number}"], flush=True)
    finish({"benchmark": "grammar", "model": arguments.model, **result})


def least(grammars: Grammars, grammar: str, tokens: list[int], repeats: int) -> tuple[float, float]:
    """Seconds to make the masks of a step with the one chain `tokens`, and to apply them."""
    masks, applied = [], []
    parents = [0, *range(len(tokens) - 1)]
    for _ in range(repeats):
        matcher = grammars.matcher(grammar)
        logits = torch.zeros(len(tokens), grammars.vocab_size)
        began = time.perf_counter()
        bits = matcher.masks(tokens, parents)
        middle = time.perf_counter()
        forbid(logits, bits)
        masks.append(middle - began)
        applied.append(time.perf_counter() - middle)
    return min(masks), min(applied)


if __name__ == "__main__":
    main()
