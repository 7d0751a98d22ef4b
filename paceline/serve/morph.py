"""Morph's apply API over chat completions: a user message with the file and the edit, answered by the merged file."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField, ConfigError
from paceline.serve.service import Answer, PreparedRequest, Service, openai_usage, run_in_worker_thread
from paceline.serve.tools import Text
from paceline.serve.wire import OPENAI, answer_response, event
from paceline.tasks.apply import Applied, Prepared, prepare
from paceline.tasks.lines import Lines
from paceline.tasks.prompts import DEFAULT_POLICY, parse_morph, policy_named
from paceline.types import FinishReason


class Options(Struct):
    """Fields that Morph's API does not have: the file's `path`, which implies its language, and the merge `policy`."""

    path: str | None = None
    policy: str | None = None


async def apply(
    service: Service,
    http: HttpRequest,
    model: str,
    message: str,
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
    form = _ChatFormat(model, wants_usage)
    prepared = await run_in_worker_thread(_prepare, service, message, options)
    if isinstance(prepared, Applied):
        return await answer_response(http, _RuleMergeWriter(form, prepared), stream, OPENAI, _no_close)
    answer = await service.start(PreparedRequest(dataclasses.replace(prepared.request, namespace=namespace)))
    return await answer_response(http, _Writer(form, prepared, answer), stream, OPENAI, answer.close)


def _no_close() -> None:
    """The `close` of an answer that has no engine request."""


def _prepare(service: Service, message: str, options: Options) -> Prepared | Applied:
    instruction, code, update = parse_morph(message)
    # `prepare` reads only the tokenizer and the config, so that a thread other than the engine's may call it
    engine = service.host.engine
    return prepare(lambda: engine, code, update, instruction, path=options.path, policy=options.policy)


class _ChatFormat:
    """Formats a merge as a chat completion, with the merge's source and flags in the field `paceline`."""

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


class _RuleMergeWriter:
    """Writes a merge that was made by rule, without the model."""

    def __init__(self, form: _ChatFormat, applied: Applied) -> None:
        self._form = form
        self._applied = applied

    async def whole(self) -> dict[str, Any]:
        return self._form.body(self._applied, "stop", openai_usage(self._applied.usage, predicted=True))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        yield self._form.chunk({"role": "assistant", "content": ""})
        yield self._form.chunk({"content": self._applied.text})
        yield self._form.ending(self._applied, "stop", openai_usage(self._applied.usage, predicted=True))


class _Writer:
    """Writes a merge that the model generates."""

    def __init__(self, form: _ChatFormat, prepared: Prepared, answer: Answer) -> None:
        self._form = form
        self._prepared = prepared
        self._answer = answer

    async def whole(self) -> dict[str, Any]:
        applied = await self._conclude("".join([text async for text in self._texts()]))
        return self._form.body(applied, self._reason(), openai_usage(self._answer.usage, predicted=True))

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Streams the stable prefix of the file as it is generated. What the final checks may change is buffered."""
        yield self._form.chunk({"role": "assistant", "content": ""})
        stable_prefix = StablePrefix(self._prepared)
        parts = []
        async for text in self._texts():
            parts.append(text)
            stable = stable_prefix.feed(text)
            if stable:
                yield self._form.chunk({"content": stable})
        applied = await self._conclude("".join(parts))
        rest = stable_prefix.rest(applied.text)
        if rest:
            yield self._form.chunk({"content": rest})
        yield self._form.ending(applied, self._reason(), openai_usage(self._answer.usage, predicted=True))

    async def _texts(self) -> AsyncGenerator[str, None]:
        async for events, _ in self._answer.pieces():
            for each in events:
                assert isinstance(each, Text)
                yield each.text

    async def _conclude(self, output: str) -> Applied:
        cut_off = self._answer.finish is FinishReason.LENGTH
        return await run_in_worker_thread(self._prepared.conclude, output, self._answer.usage, cut_off)

    def _reason(self) -> str:
        return "length" if self._answer.finish is FinishReason.LENGTH else "stop"


class StablePrefix:
    """Finds the prefix of the merged file that later output cannot change, so that it can be streamed.

    With a policy that has a rule it is the common prefix of all readings of the edit. Otherwise it is the model's output
    up to its last line with text, as long as it equals the candidate merge; the candidate's bytes are emitted. Output
    beyond the candidate is emitted only if the candidate has no trailing white space and a single kind of line end. Only
    for policies whose answer is the file itself.
    """

    def __init__(self, prepared: Prepared) -> None:
        merge, policy = prepared.merge, prepared.policy
        self._streams = policy.opened and not policy.blocks and not policy.rule
        self._candidate = Lines.of(merge.text)
        self._plain = len({*self._candidate.ends} - {""}) < 2 and all(
            row == row.rstrip() for row in self._candidate.rows
        )
        self._stable = self._candidate.bom if self._streams else ""
        if policy.rule:
            other = merge.text if merge.alternative is None else merge.alternative.text
            shared = (place for place, (one, two) in enumerate(zip(merge.text, other, strict=False)) if one != two)
            self._stable = merge.text[: next(shared, min(len(merge.text), len(other)))]
        self._partial_row = ""
        self._pending = ""  # lines that may be the end of the file, or a code fence after it
        self._row = 0
        self._num_given = 0

    def feed(self, text: str) -> str:
        *rows, self._partial_row = (self._partial_row + text).split("\n") if self._streams else [""]
        for row in rows:
            self._take(row)
        stable, self._stable = self._stable, ""
        self._num_given += len(stable)
        return stable

    def _take(self, row: str) -> None:
        own = self._candidate.rows
        inside = self._row < len(own) - 1 and row.rstrip() == own[self._row].rstrip()
        if inside:
            self._pending += own[self._row] + self._candidate.ends[self._row]
        elif self._plain:
            self._row = len(own)  # from here on line numbers of the output and of the candidate differ
            self._pending += row.rstrip("\r") + self._candidate.newline
        else:
            self._streams = False
            return
        self._row += 1
        if row.strip() and not row.startswith("```"):
            # this line's end stays pending too: if the file ends here, it ends as the candidate does
            self._stable += self._pending[: len(self._pending.rstrip("\r\n"))]
            self._pending = self._pending[len(self._pending.rstrip("\r\n")) :]

    def rest(self, whole: str) -> str:
        return whole[self._num_given :]


def _flags(applied: Applied) -> dict[str, Any]:
    flagged = {"flagged": list(applied.reasons)} if applied.reasons else {}
    return {"paceline": {"source": applied.source, **flagged}}
