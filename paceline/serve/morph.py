"""Morph's apply over chat completions: one user message with the file and the edit, the merged file as the answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, cast

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.engine.engine import Engine
from paceline.serve.service import Answer, Service, aside, usage_of
from paceline.serve.tools import PlainParser, Text
from paceline.serve.wire import OPENAI, event, written
from paceline.tasks.apply import Applied, Prepared, prepare
from paceline.tasks.prompts import parse_morph
from paceline.types import FinishReason


async def apply(
    service: Service, http: HttpRequest, model: str, asked: str, stream: bool, wants_usage: bool
) -> Response:
    """Raises InputError for a message that is not in Morph's form, and what `tasks.apply.prepare` raises."""
    prepared = await aside(_prepare, service, asked)
    answer = await service.start(prepared.request, PlainParser())
    return await written(http, _Writer(model, prepared, answer, wants_usage), stream, OPENAI, answer.close)


def _prepare(service: Service, asked: str) -> Prepared:
    instruction, code, update = parse_morph(asked)
    # only its tokenizer and settings are read, so a thread beside the engine's may do it
    return prepare(cast(Engine, service.host.engine), code, update, instruction)


class _Writer:
    def __init__(self, model: str, prepared: Prepared, answer: Answer, wants_usage: bool) -> None:
        self._prepared = prepared
        self._wants_usage = wants_usage
        self._answer = answer
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._usage: dict[str, Any] = {}

    async def whole(self) -> dict[str, Any]:
        parts = [text async for text in self._texts()]
        applied = await self._conclude("".join(parts))
        message = {"role": "assistant", "content": applied.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._reason()}
        head = {"object": "chat.completion", **self._head, "choices": [choice], "usage": self._usage}
        return head | _flags(applied)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """What is certain of the file goes out as it is written; what the conclusion may change is held back."""
        yield self._chunk({"role": "assistant", "content": ""})
        release = _Release(self._prepared)
        parts = []
        async for text in self._texts():
            parts.append(text)
            certain = release.feed(text)
            if certain:
                yield self._chunk({"content": certain})
        applied = await self._conclude("".join(parts))
        rest = release.rest(applied.text)
        if rest:
            yield self._chunk({"content": rest})
        yield self._chunk({}, self._reason(), _flags(applied))
        if self._wants_usage:
            yield event({"object": "chat.completion.chunk", **self._head, "choices": [], "usage": self._usage})
        yield b"data: [DONE]\n\n"

    async def _texts(self) -> AsyncGenerator[str, None]:
        async for events, _ in self._answer.pieces():
            for each in events:
                assert isinstance(each, Text)
                yield each.text

    async def _conclude(self, output: str) -> Applied:
        usage = self._answer.usage
        self._usage = usage_of(usage, predicted=True)
        return await aside(self._prepared.conclude, output, usage, self._answer.finish is FinishReason.LENGTH)

    def _reason(self) -> str:
        return "length" if self._answer.finish is FinishReason.LENGTH else "stop"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, extra: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event({"object": "chat.completion.chunk", **self._head, "choices": [choice], **(extra or {})})


class _Release:
    """Gives out the beginning of the merged file that no later output changes: all but the end's newlines and fence.

    Only for policies whose answer is the file itself; for others nothing is certain before the end.
    """

    def __init__(self, prepared: Prepared) -> None:
        code = prepared.code
        self._streams = prepared.policy.opened and not prepared.policy.blocks
        self._windows = code.count("\r\n") * 2 > code.count("\n")
        self._held = ""
        self._num_given = 0

    def feed(self, text: str) -> str:
        if not self._streams:
            return ""
        held = self._held + text
        certain = held.rstrip("\r\n`")
        self._held = held[len(certain) :]
        certain = certain.replace("\r\n", "\n")
        certain = certain.replace("\n", "\r\n") if self._windows else certain
        self._num_given += len(certain)
        return certain

    def rest(self, whole: str) -> str:
        return whole[self._num_given :]


def _flags(applied: Applied) -> dict[str, Any]:
    return {"paceline": {"flagged": list(applied.reasons)}} if applied.reasons else {}
