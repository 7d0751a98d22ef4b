"""Fast Apply on real edits: drafted decode over plain decode, and how right the results are.

    python -m benchmarks.apply --policy review-margin
    python -m benchmarks.apply --policy opened
    python -m benchmarks.apply --limit 64 --plain 64 --together 64
    python -m benchmarks.apply --limit 64 --plain 64 --against copy

The edit snippets are made by rule from each commit's difference (paceline.tasks.snippet). "exact" means equal to the commit
in syntax tree; "wrong" is neither exact nor flagged. --plain N also decodes the first policy's first N requests without
drafts, in the same run and with the same prompts: it gives the ratio and counts outputs that differ. With --against copy the
ratio is that of the trained drafter, where the model has one, over copies alone.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from benchmarks.common import MODEL, argument_parser, finish, names, quantiles
from benchmarks.data.files import load_edits
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.errors import PacelineError
from paceline.tasks.apply import Applied, Prepared, prepare
from paceline.tasks.checks import same_syntax_tree
from paceline.tasks.snippet import snippet_of
from paceline.types import Completion, FinishReason, Usage


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--edits", type=Path, help="a file in the form of git_edits.jsonl.gz")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--limit", type=int, help="most edits")
    parser.add_argument("--longest", type=int, default=2500, help="most tokens of a file")
    parser.add_argument("--policy", type=names, default=["review-margin"], help="policies that ask the model")
    parser.add_argument("--plain", type=int, default=0, help="also decode the first N requests without drafts")
    parser.add_argument(
        "--against", default="none", help="what --plain drafts with: none, or copy beside a joint drafter"
    )
    parser.add_argument("--together", type=int, default=1, help="requests at once")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--shortest", action="store_true", help="shortest results first")
    parser.add_argument("--show", action="store_true", help="print what is wrong or flagged")
    arguments = parser.parse_args()

    edits = load_edits(arguments.edits, arguments.split, None, arguments.longest)
    if arguments.shortest:
        edits.sort(key=lambda edit: int(edit.get("after_tok", 0)))
    edits = edits[: arguments.limit]
    config = EngineConfig(max_context=arguments.max_context)
    engine = Engine.load(arguments.model, config)
    engine.warm_up(arguments.together)
    plain = None
    if arguments.plain:
        plain = engine.sibling(dataclasses.replace(engine.config, drafter=arguments.against))
        plain.warm_up(arguments.together)
    results = []
    for policy in arguments.policy:
        compared = plain if policy == arguments.policy[0] else None
        results.append(run(engine, compared, edits, policy, arguments))
    finish({"benchmark": "apply", "model": arguments.model, **results[-1], "policies": results})


def run(
    engine: Engine, plain: Engine | None, edits: list[dict[str, Any]], policy: str, arguments: Any
) -> dict[str, Any]:
    """One policy over all edits."""
    prepared: list[tuple[dict[str, Any], Prepared]] = []
    refused = 0
    for edit in edits:
        snippet = snippet_of(edit["before"], edit["after"], edit["path"])
        try:
            ready = prepare(engine, edit["before"], snippet, edit.get("subject", ""), path=edit["path"], policy=policy)
        except PacelineError as error:
            print(f"refused: {edit['path']}: {error}")
            refused += 1
            continue
        assert isinstance(ready, Prepared), "this policy does not ask the model for every edit; use benchmarks.policies"
        prepared.append((edit, ready))
    began = time.perf_counter()
    completions = generate(engine, [ready for _, ready in prepared], arguments.together)
    seconds = time.perf_counter() - began
    outcomes = []
    for (edit, ready), completion in zip(prepared, completions, strict=True):
        outcome = judge(edit, ready, completion)
        outcomes.append(outcome)
        if arguments.show and outcome["verdict"] != "exact":
            print(outcome["verdict"], edit["path"], outcome["reasons"][:3])
    summary = summarise(policy, outcomes, refused, seconds)
    if plain is not None:
        summary |= compare(plain, prepared[: arguments.plain], completions[: arguments.plain], arguments.together)
    print(summary)
    return summary


def generate(engine: Engine, ready: list[Prepared], together: int) -> list[Completion]:
    completions: list[Completion] = []
    for start in range(0, len(ready), together):
        done = engine.generate([each.request for each in ready[start : start + together]])
        completions += [each.checked() for each in done]
    return completions


def judge(edit: dict[str, Any], ready: Prepared, completion: Completion) -> dict[str, Any]:
    applied: Applied = ready.conclude(completion.text, completion.usage, completion.finish is FinishReason.LENGTH)
    exact = same_syntax_tree(applied.text, edit["after"], edit["path"])
    verdict = "flagged" if applied.reasons else "exact" if exact else "wrong"
    usage = completion.usage
    return {
        "verdict": verdict,
        "exact": exact,
        "identical": applied.text == edit["after"],
        "reasons": applied.reasons,
        "usage": usage,
        "tokens": usage.output_tokens,
        "rate": decode_rate(usage),
    }


def decode_rate(usage: Usage) -> float:
    """Tokens a second from the first token to the last."""
    return (usage.output_tokens - 1) / usage.decode_seconds if usage.decode_seconds else 0.0


def summarise(policy: str, outcomes: list[dict[str, Any]], refused: int, seconds: float) -> dict[str, Any]:
    usages = [outcome["usage"] for outcome in outcomes]
    tokens, steps = sum(each.output_tokens for each in usages), sum(each.steps for each in usages)
    long = [outcome["rate"] for outcome in outcomes if outcome["tokens"] >= 1000]
    return {
        "policy": policy,
        "requests": len(outcomes),
        "refused": refused,
        "exact": sum(outcome["exact"] for outcome in outcomes),
        "identical": sum(outcome["identical"] for outcome in outcomes),
        "flagged": sum(outcome["verdict"] == "flagged" for outcome in outcomes),
        "wrong": sum(outcome["verdict"] == "wrong" for outcome in outcomes),
        "by_length": by_length(outcomes),
        "output_tokens": tokens,
        "tokens_per_step": round(tokens / max(1, steps), 1),
        "accepted_share": round(sum(each.accepted_tokens for each in usages) / max(1, tokens), 4),
        "margin_tokens": sum(each.margin_tokens for each in usages),
        "decode_tokens_per_second": quantiles([outcome["rate"] for outcome in outcomes]),
        "decode_tokens_per_second_long": quantiles(long),
        "prefill_seconds": quantiles([each.prefill_seconds for each in usages]),
        "tokens_per_second_overall": round(tokens / seconds, 1),
    }


def by_length(outcomes: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Exact, flagged and wrong, by output tokens."""
    table: dict[str, dict[str, int]] = {}
    for low, high in ((0, 500), (500, 1000), (1000, 1500), (1500, 2500)):
        part = [outcome for outcome in outcomes if low <= outcome["tokens"] < high]
        verdicts = [outcome["verdict"] for outcome in part]
        counts = {name: verdicts.count(name) for name in ("flagged", "wrong")}
        table[f"{low}-{high}"] = {"requests": len(part), "exact": sum(outcome["exact"] for outcome in part), **counts}
    return table


def compare(
    plain: Engine, prepared: list[tuple[dict[str, Any], Prepared]], drafted: list[Completion], together: int
) -> dict[str, Any]:
    """Decodes the same requests without drafts: the ratio of the decode rates, and how many outputs differ."""
    began = time.perf_counter()
    undrafted = generate(plain, [ready for _, ready in prepared], together)
    wall = time.perf_counter() - began
    seconds = sum(each.usage.decode_seconds for each in drafted)
    plain_seconds = sum(each.usage.decode_seconds for each in undrafted)
    mismatches = sum(one.tokens != other.tokens for one, other in zip(drafted, undrafted, strict=True))
    tokens = sum(each.usage.output_tokens for each in undrafted)
    drafted_tokens = sum(each.usage.output_tokens for each in drafted)
    return {
        "ratio": round((drafted_tokens / seconds) / (tokens / plain_seconds), 2),
        "plain_requests": len(undrafted),
        "plain_tokens_per_second": round(tokens / plain_seconds, 1),
        "plain_tokens_per_second_overall": round(tokens / wall, 1),
        "different_outputs": mismatches,
    }


if __name__ == "__main__":
    main()
