"""Speculative decoding against plain decoding: speed-up, acceptance length and acceptance by position of each drafter.

    python -m benchmarks.speculate --model smollm2-135m --prompts FILE --batch 1 --drafter copy --drafter PATH
    python -m benchmarks.speculate --prompts FILE --batch 1,32 --drafter joint:PATH --temperature 0 0.7 --tasks

Prompts are JSON lines of {"messages": [...]} with optional "tools" and "task", rendered as the server renders a chat. A drafter
is a name of the setting `drafter`, the path of a trained drafter, or NAME:PATH (the setting and the trained drafter).

`--batch N` keeps N requests running: the next prompt starts when one ends. After the last prompt the first ones run again,
unmeasured but for the rates, until all have ended; so every step is of a batch of N. Plain decoding ("none") and the drafters
run in turns, in one process and over the same weights.

- tokens_per_second: output tokens of decode steps over the time of decode steps, the drafter's included, prefill left out.
- step_ms: the time of decode steps over their number.
- speedup: that rate over plain decoding's of the same turn, the median over the turns; speedup_overall the same of
  overall_tokens_per_second, output tokens over the whole run's time.
- acceptance_length: output tokens of decode steps a step, the target's own token included; of measured requests alone.
- acceptance: the share of steps whose draft's k-th token was accepted, k = 1 ...: 1 + the sum over all k is the acceptance
  length, but for a last step that ends within its draft. Steps without a draft count.
- conditional: that share among the steps that drafted at least k tokens and had the first k - 1 accepted. Where a step's draft
  is a tree, k tokens need not be k deep, so this is a lower bound.

Each prompt has a seed, so with any drafter it has the tokens of plain decoding, greedy or drawn; `different` counts outputs
that do not. In float32 one such output makes the exit status 1. In bf16 greedy ones are ties or mismatches, as in
benchmarks/lossless.py.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.common import MODEL, argument_parser, finish, numbers
from benchmarks.data.files import read_records
from benchmarks.lossless import tie
from paceline.config import EngineConfig, ResolvedConfig
from paceline.drafters.checkpoint import read_checkpoint
from paceline.engine.engine import Engine
from paceline.errors import BadField, PacelineError
from paceline.models.tokenizer import Tokenizer
from paceline.serve.chat_input import ChatBody, chat_tools, encode
from paceline.types import Request, Sampling, StepOutput

PLAIN = "none"
NUM_POSITIONS = 16  # of a draft that are printed


@dataclass(frozen=True)
class Prompt:
    tokens: list[int]
    task: str


@dataclass
class Answer:
    """One request's output, and (drafted, accepted) tokens of each of its decode steps.

    A draft within which the output ended counts as long as what was accepted of it.
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    cached_tokens: int = 0

    def add(self, output: StepOutput) -> bool:
        """Adds a step's output; returns whether it was a decode step, which the first one, the prompt's, is not."""
        decoded = bool(self.tokens)
        if decoded:
            accepted = sum(output.accepted)
            self.steps.append((accepted if all(output.accepted) else output.drafted, accepted))
        elif output.usage is not None:
            self.cached_tokens = output.usage.cached_tokens
        self.tokens += output.tokens
        return decoded


@dataclass
class Run:
    """One closed loop: the measured requests' answers, and counts of all steps, those of requests to fill up included."""

    answers: list[Answer]
    num_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def overall_rate(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    parser = argument_parser(__doc__, MODEL)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines of {messages, tools, task}")
    parser.add_argument("--num-prompts", type=int, help="the first N prompts alone")
    parser.add_argument("--batch", type=numbers, default=[1], help="requests kept running; several by commas")
    parser.add_argument("--drafter", action="append", help="may be repeated (default: the engine's)")
    parser.add_argument("--draft", type=int, help="draft exactly this many tokens instead of choosing by cost")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0])
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--turns", type=int, default=2, help="of plain and drafted decoding, whose median is printed")
    parser.add_argument("--warm", action="store_true", help="prompts come from the prefix cache: they ran before")
    parser.add_argument("--tasks", action="store_true", help="also the acceptance length of each task")
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()

    config = EngineConfig(
        device=arguments.device,
        dtype=arguments.dtype,
        max_context=arguments.max_context,
        max_batch=max(arguments.batch),
        prefix_cache=arguments.warm,
        drafter=PLAIN,
    )
    plain = Engine.load(arguments.model, config)
    engines = {PLAIN: plain}
    for name in arguments.drafter or [EngineConfig().drafter]:
        engines[name] = plain.sibling(drafting(plain.config, name, arguments.draft))
    room = plain.capacity - arguments.max_tokens
    prompts = load_prompts(arguments.prompts, arguments.num_prompts, plain.tokenizer, room)
    rows = []
    for batch in arguments.batch:
        for engine in engines.values():
            engine.warm_up(batch)
        for temperature in arguments.temperature:
            for row in compare(engines, prompts, batch, temperature, arguments):
                print(row, flush=True)
                rows.append(row)
    finish(
        {
            "benchmark": "speculate",
            "model": arguments.model,
            "dtype": plain.config.dtype,
            "prompts": len(prompts),
            "max_tokens": arguments.max_tokens,
            "turns": arguments.turns,
            "draft": arguments.draft,
            "warm": arguments.warm,
            "rows": rows,
        }
    )
    if plain.config.dtype == "float32" and any(row.get("different") for row in rows):
        sys.exit("drafted output is not that of plain decoding")


def drafting(config: ResolvedConfig, name: str, length: int | None) -> ResolvedConfig:
    """`config` with the drafter that `name` means, and drafts of `length` tokens where that is given."""
    return dataclasses.replace(config, **drafter_settings(name), fixed_draft=length)


def drafter_settings(name: str) -> dict[str, Any]:
    """The settings that a --drafter stands for: a name, the path of a trained drafter, or NAME:PATH."""
    if Path(name).exists():
        return {"drafter": read_checkpoint(Path(name)).config.kind, "draft_model": name}
    drafter, _, path = name.partition(":")
    return {"drafter": drafter, **({"draft_model": path} if path else {})}


def load_prompts(path: Path, count: int | None, tokenizer: Tokenizer, room: int) -> list[Prompt]:
    """The first `count` prompts of a file. Those of more than `room` tokens are left out and counted.

    Exits with one sentence that names the line if a line is not a chat, or if no prompt is left.
    """
    prompts = []
    records = read_records(path)[:count]
    for number, record in enumerate(records, 1):
        try:
            body = msgspec.convert(record, ChatBody)
            if not body.messages:
                raise BadField("messages must not be empty", "messages")
            tokens = encode(tokenizer, body.messages, body, chat_tools(body).definitions)
        except (msgspec.ValidationError, PacelineError) as error:
            sys.exit(f"{path}, prompt {number}: {error}")
        if len(tokens) <= room:
            prompts.append(Prompt(tokens, str(record.get("task", ""))))
    if len(prompts) < len(records):
        print(f"{len(records) - len(prompts)} prompts of more than {room} tokens are left out; see --max-context")
    if not prompts:
        sys.exit(f"{path} has no prompt of at most {room} tokens")
    return prompts


def compare(
    engines: dict[str, Engine], prompts: list[Prompt], batch: int, temperature: float, arguments: Any
) -> list[dict[str, Any]]:
    """A row for each engine at one batch size and temperature, plain decoding first."""
    requests = [
        Request(prompt.tokens, Sampling(temperature, max_tokens=arguments.max_tokens, seed=index))
        for index, prompt in enumerate(prompts)
    ]
    for engine in engines.values():  # the chooser learns the costs of steps
        run(engine, requests if arguments.warm else requests[:batch], batch)
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for _ in range(arguments.turns):
        for name, engine in engines.items():
            runs[name].append(run(engine, requests, batch))
    rows = []
    for name, own in runs.items():
        row: dict[str, Any] = {"drafter": name, "batch": batch, "temperature": temperature}
        row |= speeds(own, runs[PLAIN]) | acceptance(own)
        if name != PLAIN:
            row |= differences(engines[PLAIN], requests, runs[PLAIN][0], own[0])
        if arguments.warm:
            row["cached_tokens"] = sum(each.cached_tokens for each in own[0].answers)
        if arguments.tasks:
            row["tasks"] = acceptance_by_task(prompts, own)
        rows.append(row)
    return rows


def run(engine: Engine, requests: list[Request], batch: int) -> Run:
    """Runs `requests`, `batch` at a time, until all have ended; the first ones again to fill up the batch at the end."""
    answers: dict[str, Answer] = {}
    running: set[str] = set()
    ended = 0
    result = Run([])
    before = began = time.perf_counter()
    while ended < len(requests):
        while len(running) < batch:
            name = engine.submit(requests[len(answers) % len(requests)])
            answers[name] = Answer()
            running.add(name)
            if len(answers) <= len(requests):
                result.answers.append(answers[name])
        decoded = 0
        for output in engine.step():
            if output.error is not None:
                raise output.error
            answer = answers[output.request_id]
            decoded += len(output.tokens) if answer.add(output) else 0
            result.tokens += len(output.tokens)
            if output.finish is not None:
                running.remove(output.request_id)
                ended += any(answer is each for each in result.answers)
        now = time.perf_counter()
        if decoded:  # a step that only computes prompts, or is not read yet, has no output of a decode step
            result.num_steps += 1
            result.decode_tokens += decoded
            result.decode_seconds += now - before
        before = now
    result.seconds = before - began
    for name in running:
        engine.cancel(name)
    while engine.busy:
        engine.step()
    return result


def speeds(own: list[Run], plain: list[Run]) -> dict[str, float]:
    """Medians over the turns; ratios are of runs of the same turn."""
    pairs = list(zip(own, plain, strict=True))
    return {
        "speedup": round(statistics.median(one.rate / other.rate for one, other in pairs), 3),
        "speedup_overall": round(statistics.median(one.overall_rate / other.overall_rate for one, other in pairs), 3),
        "tokens_per_second": round(statistics.median(each.rate for each in own), 1),
        "overall_tokens_per_second": round(statistics.median(each.overall_rate for each in own), 1),
        "step_ms": round(statistics.median(1000 * each.decode_seconds / each.num_steps for each in own), 3),
    }


def acceptance(own: list[Run]) -> dict[str, Any]:
    """What was accepted of the measured requests' drafts, over all turns."""
    answers = [answer for each in own for answer in each.answers]
    steps = [step for answer in answers for step in answer.steps]
    shares, conditional = by_position(steps)
    return {
        "acceptance_length": acceptance_length(answers),
        "acceptance": shares,
        "conditional": conditional,
        "steps": len(steps),
        "drafted_tokens": sum(drafted for drafted, _ in steps),
        "accepted_tokens": sum(accepted for _, accepted in steps),
        "output_tokens": sum(len(answer.tokens) for answer in answers),
    }


def acceptance_length(answers: list[Answer]) -> float:
    """Output tokens of decode steps a step: each answer's first token is the prompt's."""
    num_steps = sum(len(answer.steps) for answer in answers)
    return round(sum(len(answer.tokens) - 1 for answer in answers) / max(1, num_steps), 3)


def by_position(steps: list[tuple[int, int]]) -> tuple[list[float], list[float]]:
    """(share of steps whose k-th drafted token was accepted; that share where k were drafted and k - 1 accepted), from k = 1.

    Both end with the last position at which a token was accepted, or with NUM_POSITIONS.
    """
    shares, conditional = [], []
    for position in range(1, NUM_POSITIONS + 1):
        right = sum(accepted >= position for _, accepted in steps)
        if not right:
            break
        reached = sum(drafted >= position and accepted >= position - 1 for drafted, accepted in steps)
        shares.append(round(right / len(steps), 4))
        conditional.append(round(right / reached, 4))
    return shares, conditional


def acceptance_by_task(prompts: list[Prompt], own: list[Run]) -> dict[str, float]:
    """The acceptance length of each task's prompts."""
    by_task: defaultdict[str, list[Answer]] = defaultdict(list)
    for each in own:
        for prompt, answer in zip(prompts, each.answers, strict=True):
            by_task[prompt.task or "(none)"].append(answer)
    return {task: acceptance_length(answers) for task, answers in sorted(by_task.items())}


def differences(plain: Engine, requests: list[Request], expected: Run, found: Run) -> dict[str, int]:
    """How many outputs are not plain decoding's; of greedy ones in bf16, how many first differ at a tie."""
    count: Counter[str] = Counter(different=0)
    for request, one, other in zip(requests, found.answers, expected.answers, strict=True):
        if one.tokens == other.tokens:
            continue
        count["different"] += 1
        if plain.config.dtype == "float32" or request.sampling.temperature:
            continue
        place = next(i for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)) if a != b)
        gap, rounding = tie(plain, request, other.tokens[:place], one.tokens[place], other.tokens[place])
        count["ties" if gap <= rounding else "mismatches"] += 1
        print(f"{request.sampling.seed}: differs at token {place}: gap {gap:.4f}, rounding {rounding:.4f}")
    return dict(count)


if __name__ == "__main__":
    main()
