"""Writes training samples: the target's own outputs to prompts, or given texts."""

from __future__ import annotations

import gc
import gzip
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from paceline.errors import InputError, RequestError
from paceline.train.samples import LEAST_OUTPUT, Sample, SampleWriter, digest, prompt_key
from paceline.types import FinishReason, Request, Sampling, StepOutput

_FLUSH_SECONDS = 5.0
_GROUPS = 16  # of the prompts in flight: a pass over a group of new ones takes less time than one over each


class GeneratingEngine(Protocol):
    """What generation needs of an engine."""

    @property
    def capacity(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    def submit(self, request: Request) -> str: ...
    def step(self) -> list[StepOutput]: ...
    def cancel(self, name: str) -> None: ...


class PromptTokenizer(Protocol):
    """What prompts need of a tokenizer."""

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def encode_chat(self, messages: Any, tools: Any = None) -> list[int]: ...


@dataclass(frozen=True)
class GenerateSettings:
    """`temperatures` are given to prompts in turn. Generation ends at `minutes` or `tokens` of output, if given."""

    max_tokens: int = 1024
    temperatures: tuple[float, ...] = (0.0, 0.7)
    in_flight: int = 256
    minutes: float | None = None
    tokens: int | None = None


@dataclass
class Generated:
    """What a run of generation did. `listed` has the first prompts of each kind of bad one, by line."""

    prompts: int = 0
    tokens: int = 0
    skipped: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    listed: dict[str, list[int]] = field(default_factory=dict)

    def refuse(self, line: int, reason: str) -> None:
        self.bad[reason] += 1
        lines = self.listed.setdefault(reason, [])
        if len(lines) < 10:
            lines.append(line)


Report = Callable[[str], None]
T = TypeVar("T")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file, which may be gzipped. Raises InputError for a line that is no object."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    prompts = []
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise InputError(f"line {number} of {path} is no JSON object")
                    prompts.append(value)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the prompts in {path} cannot be read: {error}") from error
    return prompts


def generate(
    engine: GeneratingEngine,
    tokenizer: PromptTokenizer,
    prompts: Sequence[Mapping[str, Any]],
    writer: SampleWriter,
    done: set[bytes],
    settings: GenerateSettings,
    report: Report,
) -> Generated:
    """Runs the prompts that are not in `done` (keys of samples) and appends their samples.

    A prompt has "messages" (with "tools", if any) or "prompt", and perhaps "task". They run in an order of their own, so
    that a run that ends early has some of every kind. Killed, it loses the last seconds. At the end of its time it keeps
    what running requests have written so far.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # the prompts and the engine: each collection that visits them stops the device for a tenth of a second
    try:
        gc.disable()  # what the engine makes is in no cycle; `_show` collects
        return _Generation(engine, tokenizer, writer, settings, report).run(prompts, done)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@dataclass(slots=True)
class _Running:
    key: bytes
    task: str
    line: int
    temperature: float
    prompt: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def variant(self) -> str:
        return f"t={self.temperature:g}"


class _Generation:
    def __init__(
        self,
        engine: GeneratingEngine,
        tokenizer: PromptTokenizer,
        writer: SampleWriter,
        settings: GenerateSettings,
        report: Report,
    ) -> None:
        self._engine, self._tokenizer, self._writer = engine, tokenizer, writer
        self._settings, self._report = settings, report
        self._running: dict[str, _Running] = {}
        self._result = Generated()
        self._started = self._reported = time.monotonic()

    def run(self, prompts: Sequence[Mapping[str, Any]], done: set[bytes]) -> Generated:
        more = True
        most = self._settings.in_flight
        group = max(1, most // _GROUPS)
        with ThreadPoolExecutor(1) as pool:
            waiting = self._waiting(prompts, done, pool, group)
            while (more or self._running) and not self._over():
                if len(self._running) <= most - group:
                    while more and len(self._running) < most:
                        more = self._submit_next(waiting)
                if self._running:
                    for output in self._engine.step():
                        self._take(output)
                self._show(len(prompts))
        for name, each in list(self._running.items()):
            self._engine.cancel(name)
            if len(each.tokens) >= LEAST_OUTPUT:
                self._keep(each)
        self._running.clear()
        self._writer.flush()
        self._show(len(prompts), last=True)
        return self._result

    def _waiting(
        self, prompts: Sequence[Mapping[str, Any]], done: set[bytes], pool: Executor, ahead: int
    ) -> Iterator[tuple[_Running, Request]]:
        """Prompts to run. The pool encodes them, up to `ahead` of them early: the engine does not wait for it."""

        def begun(running: _Running) -> tuple[_Running, Future[list[int]]]:
            return running, pool.submit(encoded, prompts[running.line - 1], self._tokenizer)

        for running, encoding in _taken_early(map(begun, self._planned(prompts, done)), ahead):
            try:
                running.prompt = tokens = encoding.result()
            except RequestError as error:
                self._result.refuse(running.line, str(error))
                continue
            room = min(self._settings.max_tokens, self._engine.capacity - len(tokens))
            if room < LEAST_OUTPUT:
                self._result.refuse(running.line, "is longer than the context")
                continue
            seed = int.from_bytes(running.key[:7], "little")
            sampling = Sampling(running.temperature, seed=seed, max_tokens=room)
            yield running, Request(tokens, sampling, text=False)

    def _planned(self, prompts: Sequence[Mapping[str, Any]], done: set[bytes]) -> Iterator[_Running]:
        """What is not done, in the order of the prompts' keys, which is as good as random."""
        temperatures = self._settings.temperatures
        for key, line in sorted((prompt_key(_identity(prompt)), line) for line, prompt in enumerate(prompts)):
            running = _Running(
                key, str(prompts[line].get("task") or ""), line + 1, temperatures[key[-1] % len(temperatures)]
            )
            if digest(key, running.variant.encode()) in done:
                self._result.skipped += 1
            else:
                yield running

    def _submit_next(self, waiting: Iterator[tuple[_Running, Request]]) -> bool:
        """Submits the next prompt that can be served; False where there is none left."""
        for running, request in waiting:
            try:
                self._running[self._engine.submit(request)] = running
            except RequestError as error:
                self._result.refuse(running.line, str(error))
                continue
            return True
        return False

    def _over(self) -> bool:
        settings = self._settings
        late = settings.minutes is not None and time.monotonic() - self._started >= 60 * settings.minutes
        return late or (settings.tokens is not None and self._result.tokens >= settings.tokens)

    def _take(self, output: StepOutput) -> None:
        each = self._running.get(output.request_id)
        if each is None:
            return
        each.tokens += output.tokens
        if output.finish is None:
            return
        del self._running[output.request_id]
        if output.finish is FinishReason.FAILED:
            self._result.refuse(each.line, f"failed: {output.error}")
        elif not each.tokens:
            self._result.refuse(each.line, "gave no output")
        else:
            self._keep(each)

    def _keep(self, each: _Running) -> None:
        tokens = np.array(each.prompt + each.tokens, dtype=np.uint32)
        spans = ((len(each.prompt), len(tokens)),)
        self._writer.add(Sample(each.key, each.task, tokens, spans, each.variant))
        self._result.prompts += 1
        self._result.tokens += len(each.tokens)

    def _show(self, total: int, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._reported < _FLUSH_SECONDS and not last:
            return
        self._reported = now
        gc.collect()
        self._writer.flush()
        result = self._result
        finished = result.prompts + result.skipped + sum(result.bad.values())
        written = result.tokens + sum(len(each.tokens) for each in self._running.values())
        self._report(
            f"generation: {finished:,} of {total:,} prompts, {written:,} tokens, "
            f"{written / max(1e-9, now - self._started):,.0f} tokens/s"
        )


def _taken_early(values: Iterator[T], count: int) -> Iterator[T]:
    """The values, each taken from its iterator `count` values before it is needed."""
    taken = deque(itertools.islice(values, count))
    while taken:
        taken.extend(itertools.islice(values, 1))
        yield taken.popleft()


def _identity(prompt: Mapping[str, Any]) -> dict[str, Any]:
    return {name: prompt[name] for name in ("messages", "prompt", "tools", "text", "output") if prompt.get(name)}


def encoded(prompt: Mapping[str, Any], tokenizer: PromptTokenizer) -> list[int]:
    """A prompt's tokens. Raises RequestError for one that the template refuses, or that has no user's turn to answer."""
    messages = prompt.get("messages")
    if messages is None:
        if not isinstance(prompt.get("prompt"), str):
            raise RequestError("has neither messages nor a prompt")
        return tokenizer.encode_prompt(prompt["prompt"])
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise RequestError("has no messages")
    if messages[-1].get("role") == "assistant":
        raise RequestError("ends with an assistant's turn")
    return tokenizer.encode_chat(messages, prompt.get("tools"))


def write_given(
    tokenizer: PromptTokenizer,
    texts: Sequence[Mapping[str, Any]],
    writer: SampleWriter,
    done: set[bytes],
    longest: int,
    end: Sequence[int] = (),
) -> Generated:
    """Samples of texts that exist: the whole "text" is supervised, or of a prompt with an "output", the output.

    Texts are cut into parts of `longest` tokens, of which a short last one is left out; an output is cut off there. `end`
    (the end-of-turn token) follows an output. Texts and outputs with too few tokens are listed as bad.
    """
    result = Generated()
    for line, value in enumerate(texts, 1):
        key = prompt_key(_identity(value))
        try:
            if isinstance(value.get("output"), str):
                prompt = encoded(value, tokenizer)
                tokens = [*prompt, *tokenizer.encode(value["output"]), *end[:1]]
                if longest - len(prompt) < LEAST_OUTPUT:
                    raise RequestError(
                        f"has a prompt that leaves fewer than {LEAST_OUTPUT} tokens of {longest} for its output"
                    )
                parts = [(tokens[:longest], len(prompt))]
            elif isinstance(value.get("text"), str):
                tokens = tokenizer.encode(value["text"])
                parts = [(tokens[first : first + longest], 0) for first in range(0, len(tokens), longest)]
            else:
                raise RequestError("has neither a text nor an output")
            if not parts or len(parts[0][0]) - parts[0][1] < LEAST_OUTPUT:
                raise RequestError(f"has fewer than {LEAST_OUTPUT} tokens to predict")
        except RequestError as error:
            result.refuse(line, str(error))
            continue
        for number, (part, first) in enumerate(parts):
            sample = Sample(
                key, str(value.get("task") or ""), np.array(part, np.uint32), ((first, len(part)),), f"given {number}"
            )
            if len(part) - first < LEAST_OUTPUT:
                continue
            if sample.key in done:
                result.skipped += 1
                continue
            writer.add(sample)
            result.tokens += len(part) - first
        result.prompts += 1
    writer.flush()
    return result
