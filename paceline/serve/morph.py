"""Morph's apply over chat completions: one user message with the file and the edit, the merged file as the answer."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.engine.engine import Engine
from paceline.errors import BadField, ConfigError
from paceline.serve.service import Answer, Asked, Service, aside, usage_of
from paceline.serve.tools import Text
from paceline.serve.wire import OPENAI, event, written
from paceline.tasks.apply import Applied, Prepared, prepare
from paceline.tasks.lines import Lines
from paceline.tasks.prompts import DEFAULT_POLICY, parse_morph, policy_named
from paceline.types import FinishReason


class Options(Struct):
    """What Morph's own API does not have: the file's name, which tells its language, and how the model is asked."""

    path: str | None = None
    policy: str | None = None


async def apply(
    service: Service,
    http: HttpRequest,
    model: str,
    asked: str,
    stream: bool,
    wants_usage: bool,
    options: Options,
    namespace: str,
) -> Response:
    """Raises InputError for a message that is not in Morph's form, and what `tasks.apply.prepare` raises."""
    try:
        policy_named(options.policy or DEFAULT_POLICY)
    except ConfigError as error:
        raise BadField(str(error), "paceline.policy") from error
    form = _Form(model, wants_usage)
    prepared = await aside(_prepare, service, asked, options)
    if isinstance(prepared, Applied):
        return await written(http, _Settled(form, prepared), stream, OPENAI, _nothing)
    answer = await service.start(Asked(dataclasses.replace(prepared.request, namespace=namespace)))
    return await written(http, _Writer(form, prepared, answer), stream, OPENAI, answer.close)


def _nothing() -> None:
    """What is to be closed of an answer that needs no engine."""


def _prepare(service: Service, asked: str, options: Options) -> Prepared | Applied:
    instruction, code, update = parse_morph(asked)
    # only its tokenizer and settings are read, so a thread beside the engine's may do it
    engine = cast(Engine, service.host.engine)
    return prepare(lambda: engine, code, update, instruction, path=options.path, policy=options.policy)


class _Form:
    """A merge in the form of a chat completion. `flags` go beside it where the merge says more than its text."""

    def __init__(self, model: str, wants_usage: bool) -> None:
        self._wants_usage = wants_usage
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def body(self, applied: Applied, reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": applied.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {"object": "chat.completion", **self._head, "choices": [choice], "usage": usage} | _flags(applied)

    def chunk(self, delta: dict[str, Any], reason: str | None = None, extra: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({"object": "chat.completion.chunk", **self._head, "choices": [choice], **(extra or {})})

    def ending(self, applied: Applied, reason: str, usage: dict[str, Any]) -> bytes:
        last = self.chunk({}, reason, _flags(applied))
        if self._wants_usage:
            last += event({"object": "chat.completion.chunk", **self._head, "choices": [], "usage": usage})
        return last + b"data: [DONE]\n\n"


class _Settled:
    """Writes a merge that needed no model."""

    def __init__(self, form: _Form, applied: Applied) -> None:
        self._form = form
        self._applied = applied

    async def whole(self) -> dict[str, Any]:
        return self._form.body(self._applied, "stop", usage_of(self._applied.usage, predicted=True))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        yield self._form.chunk({"role": "assistant", "content": ""})
        yield self._form.chunk({"content": self._applied.text})
        yield self._form.ending(self._applied, "stop", usage_of(self._applied.usage, predicted=True))


class _Writer:
    """Writes what the model makes of a merge."""

    def __init__(self, form: _Form, prepared: Prepared, answer: Answer) -> None:
        self._form = form
        self._prepared = prepared
        self._answer = answer

    async def whole(self) -> dict[str, Any]:
        applied = await self._conclude("".join([text async for text in self._texts()]))
        return self._form.body(applied, self._reason(), usage_of(self._answer.usage, predicted=True))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """What is certain of the file goes out as it is written; what the conclusion may change is held back."""
        yield self._form.chunk({"role": "assistant", "content": ""})
        release = _Release(self._prepared)
        parts = []
        async for text in self._texts():
            parts.append(text)
            certain = release.feed(text)
            if certain:
                yield self._form.chunk({"content": certain})
        applied = await self._conclude("".join(parts))
        rest = release.rest(applied.text)
        if rest:
            yield self._form.chunk({"content": rest})
        yield self._form.ending(applied, self._reason(), usage_of(self._answer.usage, predicted=True))

    async def _texts(self) -> AsyncGenerator[str, None]:
        async for events, _ in self._answer.pieces():
            for each in events:
                assert isinstance(each, Text)
                yield each.text

    async def _conclude(self, output: str) -> Applied:
        cut_off = self._answer.finish is FinishReason.LENGTH
        return await aside(self._prepared.conclude, output, self._answer.usage, cut_off)

    def _reason(self) -> str:
        return "length" if self._answer.finish is FinishReason.LENGTH else "stop"


class _Release:
    """Gives out the beginning of the merged file that no later output changes.

    Where the policy has a rule that is what all readings of the edit begin with. Else it is what the model has written up
    to its last row with text, as long as that is the candidate's, whose bytes count; beyond that only where the candidate
    has no white space at ends of rows and one kind of line end. Only for policies whose answer is the file itself.
    """

    def __init__(self, prepared: Prepared) -> None:
        merge, policy = prepared.merge, prepared.policy
        self._streams = policy.opened and not policy.blocks and not policy.rule
        self._candidate = Lines.of(merge.text)
        self._plain = len({*self._candidate.ends} - {""}) < 2 and all(
            row == row.rstrip() for row in self._candidate.rows
        )
        self._certain = self._candidate.bom if self._streams else ""
        if policy.rule:
            other = merge.text if merge.other is None else merge.other.text
            shared = (place for place, (one, two) in enumerate(zip(merge.text, other, strict=False)) if one != two)
            self._certain = merge.text[: next(shared, min(len(merge.text), len(other)))]
        self._held = ""
        self._waiting = ""  # rows that may be the end of the file, or a fence behind it
        self._row = 0
        self._num_given = 0

    def feed(self, text: str) -> str:
        *rows, self._held = (self._held + text).split("\n") if self._streams else [""]
        for row in rows:
            self._take(row)
        certain, self._certain = self._certain, ""
        self._num_given += len(certain)
        return certain

    def _take(self, row: str) -> None:
        own = self._candidate.rows
        inside = self._row < len(own) - 1 and row.rstrip() == own[self._row].rstrip()
        if inside:
            self._waiting += own[self._row] + self._candidate.ends[self._row]
        elif self._plain:
            self._row = len(own)  # from here on the candidate's rows are not the model's by number
            self._waiting += row.rstrip("\r") + self._candidate.newline
        else:
            self._streams = False
            return
        self._row += 1
        if row.strip() and not row.startswith("```"):
            # the end of this row waits too: the file may end with it, and then as the candidate does
            self._certain += self._waiting[: len(self._waiting.rstrip("\r\n"))]
            self._waiting = self._waiting[len(self._waiting.rstrip("\r\n")) :]

    def rest(self, whole: str) -> str:
        return whole[self._num_given :]


def _flags(applied: Applied) -> dict[str, Any]:
    flagged = {"flagged": list(applied.reasons)} if applied.reasons else {}
    return {"paceline": {"source": applied.source, **flagged}}
