"""Fast Apply's policies side by side: exact, flagged and silently wrong results and latency, by set of edits and snippet style.

    python -m benchmarks.policies --policies rule,review-margin,auto --sets dev,train,aider

`rule` is the candidate merge with its checks, without an engine; the others are policies of paceline.tasks.prompts. Edits
of dev and train are written in each of --styles (benchmarks/data/snippets.py; the beginning of a name is enough); those of
aider are models' SEARCH/REPLACE blocks, and their REPLACE parts alone with and without markers. "exact" is equal to the commit
in syntax tree, flagged or not; "flagged" counts refusals too; "wrong" is neither. "settled" counts answers by rule without
the model. Milliseconds are those of one request at a time: of all requests for `rule`, of --latency requests drawn by a fixed
seed for a policy. With --latency 0 they are the batch's time divided by its requests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import apply
from benchmarks.common import MODEL, argument_parser, finish, milliseconds, names
from benchmarks.data import edits
from benchmarks.data.edits import Case
from benchmarks.data.snippets import STYLES
from benchmarks.tools.rule import by_rule
from paceline.config import EngineConfig
from paceline.engine.engine import Engine
from paceline.errors import PacelineError
from paceline.tasks.apply import Applied, Prepared, prepare
from paceline.tasks.checks import same_syntax_tree
from paceline.types import Completion, FinishReason

_RULE = "rule"
_CHARACTERS = 4  # of a token, where a record does not count its tokens
_COLUMNS = ("cases", "exact", "identical", "flagged", "refused", "wrong", "settled", "median_ms", "p90_ms")


@dataclass(frozen=True)
class Outcome:
    """A policy's result of a case. `text` is None where it refused; `settled`: no model was asked."""

    case: Case
    text: str | None
    reasons: tuple[str, ...]
    settled: bool
    seconds: float = 0.0

    @cached_property
    def exact(self) -> bool:
        return self.text is not None and same_syntax_tree(self.text, self.case.after, self.case.path)


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--policies", type=names, default=[_RULE, "review-margin", "auto"])
    parser.add_argument("--sets", type=names, default=["dev", "train", "aider"])
    parser.add_argument("--styles", type=names, default=["3 lines", "1 line", "whole functions", "no markers"])
    parser.add_argument("--limit", type=int, help="edits of a set")
    parser.add_argument("--longest", type=int, default=2500, help="tokens that a file may have before and after")
    parser.add_argument("--together", type=int, default=64, help="requests at once")
    parser.add_argument("--latency", type=int, default=16, help="requests of a row that are timed one at a time")
    parser.add_argument("--max-context", type=int, default=8192)
    parser.add_argument("--data", type=Path, metavar="DIR", help="the data set's folder (default: PACELINE_DATA)")
    parser.add_argument("--show", action="store_true", help="print what is wrong and not flagged")
    parser.add_argument("--dump", type=Path, metavar="FILE", help="write the rows that are done, as JSON lines")
    arguments = parser.parse_args()

    if arguments.data:
        os.environ["PACELINE_DATA"] = str(arguments.data)
    policies = arguments.policies
    styles = [style_named(name) for name in arguments.styles]
    engine = None
    if policies != [_RULE]:
        engine = Engine.load(arguments.model, EngineConfig(max_context=arguments.max_context))
        engine.warm_up(arguments.together)
    print(f"{'set, style':38}{'policy':15}" + "".join(f"  {column}" for column in _COLUMNS))
    rows = []
    for name in arguments.sets:
        for style, cases in styled(name, styles, arguments.longest, arguments.limit).items():
            for policy in policies:
                rows.append(row(engine, name, style, policy, cases, arguments))
                if arguments.dump:
                    arguments.dump.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    finish({"benchmark": "policies", "model": arguments.model if engine else None, "rows": rows})


def style_named(name: str) -> str:
    """The first style whose name begins with `name`; a plural s at its end is ignored."""
    found = next((style for style in STYLES if style.startswith(name.removesuffix("s"))), None)
    if found is None:
        raise SystemExit(f"there is no style {name!r}; there are: {', '.join(STYLES)}")
    return found


def styled(name: str, styles: list[str], longest: int, limit: int | None) -> dict[str, list[Case]]:
    """A set's cases by style."""
    if name == "aider":
        ways = {
            "blocks": edits.block_cases(),
            "replies": edits.replies(True),
            "replies, no marker": edits.replies(False),
        }
        most = longest * _CHARACTERS
        return {
            way: [case for case in cases if max(len(case.before), len(case.after)) <= most][:limit]
            for way, cases in ways.items()
        }
    cases = edits.git_cases(None, name, limit, longest)
    return {
        style: [replace(case, update=update) for case in cases if (update := STYLES[style](case))] for style in styles
    }


def row(
    engine: Engine | None, name: str, style: str, policy: str, cases: list[Case], arguments: argparse.Namespace
) -> dict[str, Any]:
    """One policy over the cases of a set in a style: counts, and the latency of a request."""
    if engine is None or policy == _RULE:
        outcomes = [ruled(case) for case in cases]
        seconds = [outcome.seconds for outcome in outcomes]
    else:
        outcomes = [
            outcome
            for start in range(0, len(cases), arguments.together)
            for outcome in modelled(engine, cases[start : start + arguments.together], policy)
        ]
        sample = random.Random(0).sample(cases, min(arguments.latency, len(cases)))
        seconds = [modelled(engine, [case], policy)[0].seconds for case in sample]
        seconds = seconds or [outcome.seconds for outcome in outcomes]
    wrong = [outcome for outcome in outcomes if not outcome.reasons and not outcome.exact]
    result = {
        "set": name,
        "style": style,
        "policy": policy,
        "cases": len(cases),
        "exact": sum(outcome.exact for outcome in outcomes),
        "identical": sum(outcome.text == outcome.case.after for outcome in outcomes),
        "flagged": sum(bool(outcome.reasons) for outcome in outcomes),
        "refused": sum(outcome.text is None for outcome in outcomes),
        "wrong": len(wrong),
        "settled": sum(outcome.settled for outcome in outcomes),
        "median_ms": milliseconds(seconds, 0.5),
        "p90_ms": milliseconds(seconds, 0.9),
        "timed": len(seconds),
    }
    print(f"{name + ', ' + style:38}{policy:15}" + "".join(f"{result[each]:>{len(each) + 2}}" for each in _COLUMNS))
    if arguments.show:
        for outcome in wrong:
            print(f"  wrong: {outcome.case.path}: {outcome.case.instruction.splitlines()[:1]}")
    return result


def ruled(case: Case) -> Outcome:
    answer = by_rule(case.before, case.update, case.path, case.instruction)
    if answer.crashed:
        print(f"  crashed: {case.path}: {answer.reasons[0]}")
    return Outcome(case, answer.text, answer.reasons, True, answer.seconds)


def modelled(engine: Engine, cases: list[Case], policy: str) -> list[Outcome]:
    """Runs the cases as one batch. `seconds` of each is the batch's time divided by the number of cases."""
    began = time.perf_counter()
    ready = [_prepared(engine, case, policy) for case in cases]
    asked = [each for each in ready if isinstance(each, Prepared)]
    completions = iter(apply.generate(engine, asked, max(1, len(asked))))
    answers = [_concluded(each, next(completions)) if isinstance(each, Prepared) else each for each in ready]
    seconds = (time.perf_counter() - began) / max(1, len(cases))
    return [_outcome(case, answer, seconds) for case, answer in zip(cases, answers, strict=True)]


def _prepared(engine: Engine, case: Case, policy: str) -> Prepared | Applied | PacelineError:
    """The request for the engine; the answer if the rule settled the edit; the error if it was refused."""
    try:
        return prepare(engine, case.before, case.update, case.instruction, path=case.path, policy=policy)
    except PacelineError as error:
        return error


def _concluded(ready: Prepared, completion: Completion) -> Applied:
    return ready.conclude(completion.text, completion.usage, completion.finish is FinishReason.LENGTH)


def _outcome(case: Case, answer: Applied | PacelineError, seconds: float) -> Outcome:
    if isinstance(answer, PacelineError):
        return Outcome(case, None, (str(answer),), False, seconds)
    return Outcome(case, answer.text, answer.reasons, answer.source == _RULE, seconds)


if __name__ == "__main__":
    main()
