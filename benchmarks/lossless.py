"""Speculative decoding does not change the output: the same requests with and without drafts, compared token by token.

    python -m benchmarks.lossless --limit 16 --dtype float32
    python -m benchmarks.lossless --limit 16 --deterministic

In float32 a mismatch is a bug. In bf16 a step of many queries rounds differently from a step of one, as in every engine. There
the first difference of two outputs counts as a tie if the two tokens' logits differ by no more than the rounding of bf16 at
their size (see `tie`), otherwise as a mismatch. With --deterministic there must be neither ties nor mismatches.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, argument_parser, finish
from benchmarks.data.files import load_edits
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.tasks.apply import Prepared, prepare
from paceline.tasks.snippet import snippet_of
from paceline.types import Request, Sampling


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--edits", type=Path, help="a file in the form of git_edits.jsonl.gz")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--longest", type=int, default=2500)
    parser.add_argument("--max-tokens", type=int, help="cut outputs to this many tokens")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--policy", default="opened")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--together", type=int, default=1)
    arguments = parser.parse_args()

    config = EngineConfig(
        max_context=8192, dtype=arguments.dtype, deterministic=arguments.deterministic, device=arguments.device
    )
    drafted = Engine.load(arguments.model, config)
    plain = drafted.sibling(dataclasses.replace(drafted.config, drafter="none"))
    requests = [request(drafted, edit, arguments) for edit in load_edits(
        arguments.edits, arguments.split, arguments.limit, arguments.longest
    )]  # fmt: skip
    mismatches = ties = accepted = tokens = 0
    for start in range(0, len(requests), arguments.together):
        group = requests[start : start + arguments.together]
        for asked, one, other in zip(group, drafted.generate(group), plain.generate(group), strict=True):
            accepted += one.checked().usage.accepted_tokens
            tokens += other.checked().usage.output_tokens
            if one.tokens == other.tokens:
                continue
            place = next(i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b)
            gap, rounding = tie(plain, asked, other.tokens[:place], one.tokens[place], other.tokens[place])
            is_tie = drafted.config.dtype != "float32" and not arguments.deterministic and gap <= rounding
            ties, mismatches = ties + is_tie, mismatches + (not is_tie)
            print(
                f"differs at token {place}: gap {gap:.4f}, rounding {rounding:.4f}: {'tie' if is_tie else 'MISMATCH'}"
            )
    finish(
        {
            "benchmark": "lossless",
            "model": arguments.model,
            "dtype": drafted.config.dtype,
            "deterministic": arguments.deterministic,
            "requests": len(requests),
            "mismatches": mismatches,
            "ties": ties,
            "tokens": tokens,
            "accepted_tokens": accepted,
        }
    )


def request(engine: Engine, edit: dict[str, Any], arguments: Namespace) -> Request:
    snippet = snippet_of(edit["before"], edit["after"], edit["path"])
    ready = prepare(
        engine, edit["before"], snippet, edit.get("subject", ""), path=edit["path"], policy=arguments.policy
    )
    assert isinstance(ready, Prepared), "this policy does not ask the model for every edit; use another"
    sampling = ready.request.sampling
    if arguments.max_tokens:
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, arguments.max_tokens))
    return dataclasses.replace(ready.request, sampling=sampling, margin=0.0)


def tie(engine: Engine, asked: Request, prefix: list[int], one: int, other: int) -> tuple[float, float]:
    """The difference of two tokens' log-probabilities after a prefix, and the largest that bf16 can round away.

    A bf16 logit near 16 to 32 has steps of 1/8; two roundings, each off by up to a step, make 1/4.
    """
    sampling = Sampling(max_tokens=1, logprobs=20, ignore_eos=True)
    top = dict(engine.generate([Request(asked.prompt + prefix, sampling)])[0].checked().logprobs[0].top)
    floor = min(top.values())
    return abs(top.get(one, floor) - top.get(other, floor)), 0.25


if __name__ == "__main__":
    main()
