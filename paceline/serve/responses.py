"""POST /v1/responses, in OpenAI's form: items in, items out, and nothing kept in between."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import PacelineError, RequestError
from paceline.serve.responses_input import Reasoning, ResponsesBody, Toolbox, encode, toolbox
from paceline.serve.service import Answer, Service, aside_if_long, joined
from paceline.serve.tools import Call, Event, Text, Thought
from paceline.serve.wire import OPENAI, event, read_body, written
from paceline.types import FinishReason


async def responses(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, ResponsesBody, service.body_limit)
    service.check_model(body.model)
    body.check()
    box = toolbox(body)
    sampling = body.sampling(None, service.host.tokenizer.vocab_size)
    if grammar := body.text_grammar:
        sampling = dataclasses.replace(sampling, grammar=grammar)
    prompt = await aside_if_long(http, encode, service.host.tokenizer, body, box)
    namespace = service.namespace(http, body.cache_salt)
    answer = await service.ask(prompt, sampling, box.calls(body), body.limit, namespace=namespace)
    return await written(http, _Writer(body, box, answer), bool(body.stream), OPENAI, answer.close)


class RefusedUpgrade(asyncio.Protocol):
    """uvicorn's WebSocket protocol, which refuses every upgrade with 426: the one status that Codex takes for an answer.

    Codex 0.169 (`supports_websockets = true`) posts within 0.1 s of a 426. After a 403, 404, 405 or 501 it tries six
    times more, over six seconds, and a 400 ends its turn. uvicorn's own protocol answers 403, or, where the
    `websockets` package is missing, takes the upgrade for a GET; with this one there is no difference.
    """

    def __init__(self, **settings: object) -> None:
        """uvicorn gives its configuration and state, which take no part."""

    def connection_made(self, given: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.WriteTransport, given)  # uvloop's is no subclass
        error = RequestError("WebSockets are not served: POST /v1/responses")
        body = msgspec.json.encode(OPENAI.body(error))
        head = (
            "HTTP/1.1 426 Upgrade Required\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()


@dataclass(frozen=True)
class _Form:
    """How text of one kind is an item: the types of item and part, the stem of its events, and its id's beginning."""

    item: str
    part: str
    stem: str
    identity: str
    extras: dict[str, list[Any]]

    def content(self, text: str) -> dict[str, Any]:
        return {"type": self.part, "text": text, **self.extras}


_MESSAGE = _Form("message", "output_text", "response.output_text", "msg", {"annotations": [], "logprobs": []})
_REASONING = _Form("reasoning", "reasoning_text", "response.reasoning_text", "rs", {})
_FORMS: dict[type, _Form] = {Text: _MESSAGE, Thought: _REASONING}


@dataclass
class _Open:
    """An item that text is added to."""

    form: _Form
    identity: str
    texts: list[str]

    def item(self, status: str, *texts: str) -> dict[str, Any]:
        own: dict[str, Any] = {"role": "assistant"} if self.form is _MESSAGE else {"summary": []}
        content = [self.form.content(each) for each in texts]
        return {"id": self.identity, "type": self.form.item, "status": status, **own, "content": content}


class _Writer:
    """Writes an answer as a response or as its events. The whole response is the one that the last event holds."""

    def __init__(self, body: ResponsesBody, box: Toolbox, answer: Answer) -> None:
        self._body = body
        self._box = box
        self._answer = answer
        self._identity = f"resp_{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._open: _Open | None = None
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async with contextlib.aclosing(self._events()) as events:
            async for each in events:
                last = each
        return last["response"]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(self._events()) as events:
                async for each in events:
                    yield event(each, each["type"])
        except PacelineError as error:
            code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"  # clients retry the latter
            failed = self._response("failed", error={"code": code, "message": str(error)})
            yield event(self._event("response.failed", response=failed), "response.failed")

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        async for events, _ in self._answer.pieces():
            for each in joined(events):
                for one in self._call(each) if isinstance(each, Call) else self._add(each):
                    yield one
        status = "incomplete" if self._answer.finish is FinishReason.LENGTH else "completed"
        if not self._output and self._open is None:
            for one in self._begin(_MESSAGE):  # an empty reply is a message too: the next turn's prompt has its place
                yield one
        for one in self._end(status):
            yield one
        yield self._event(f"response.{status}", response=self._response(status))

    def _add(self, each: Event) -> Iterator[dict[str, Any]]:
        """Adds text to the open item, or to a new one where that is of another kind."""
        form = _FORMS[type(each)]
        if self._open is None or self._open.form is not form:
            yield from self._end()
            yield from self._begin(form)
        assert self._open is not None and not isinstance(each, Call)
        self._open.texts.append(each.text)
        yield self._text_event("delta", delta=each.text)

    def _begin(self, form: _Form) -> Iterator[dict[str, Any]]:
        self._open = _Open(form, f"{form.identity}_{secrets.token_hex(12)}", [])
        yield self._event(
            "response.output_item.added", output_index=len(self._output), item=self._open.item("in_progress")
        )
        yield self._part_event("added", "")

    def _end(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Closes the open item, where there is one."""
        if self._open is None:
            return
        text = "".join(self._open.texts)
        yield self._text_event("done", text=text)
        yield self._part_event("done", text)
        item, self._open = self._open.item(status, text), None
        yield self._done(item)

    def _call(self, each: Call) -> Iterator[dict[str, Any]]:
        """A call's item, begun and ended at once: calls come whole."""
        yield from self._end()
        called = self._box.called(each.name)
        kind, prefix, field, stem = (
            ("custom_tool_call", "ctc", "input", "response.custom_tool_call_input")
            if called.custom
            else ("function_call", "fc", "arguments", "response.function_call_arguments")
        )
        value = _input(each.arguments) if called.custom else each.arguments
        identity = f"{prefix}_{secrets.token_hex(12)}"
        head = {"id": identity, "type": kind, "call_id": f"call_{secrets.token_hex(12)}", "name": called.name}
        if called.namespace:
            head["namespace"] = called.namespace
        place: dict[str, Any] = {"item_id": identity, "output_index": len(self._output)}
        begun = {**head, field: "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=len(self._output), item=begun)
        yield self._event(f"{stem}.delta", **place, delta=value)
        yield self._event(f"{stem}.done", **place, **{field: value})
        yield self._done({**head, field: value, "status": "completed"})

    def _done(self, item: dict[str, Any]) -> dict[str, Any]:
        self._output.append(item)
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _part_event(self, name: str, text: str) -> dict[str, Any]:
        assert self._open is not None
        return self._event(
            f"response.content_part.{name}", **self._place(self._open), part=self._open.form.content(text)
        )

    def _text_event(self, name: str, **fields: str) -> dict[str, Any]:
        assert self._open is not None
        logprobs: dict[str, Any] = {"logprobs": []} if self._open.form is _MESSAGE else {}
        return self._event(f"{self._open.form.stem}.{name}", **self._place(self._open), **fields, **logprobs)

    def _place(self, item: _Open) -> dict[str, Any]:
        return {"item_id": item.identity, "output_index": len(self._output), "content_index": 0}

    def _event(self, name: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": name, "sequence_number": number, **fields}

    def _response(self, status: str, error: dict[str, str] | None = None) -> dict[str, Any]:
        """The response as it stands; its usage is known at the end."""
        body, sampling = self._body, self._answer.stream.request.sampling
        ended = status in ("completed", "incomplete")
        text = {"format": {"type": "text"}}
        verbosity = body.text.verbosity if body.text is not None else None
        return {
            "id": self._identity,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning or Reasoning(),
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {**text, "verbosity": verbosity} if verbosity else text,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._answer.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.output_tokens,
        }


def _input(arguments: str) -> str:
    """A custom tool's input from a call's arguments; where they are others than asked for, the client sees them all."""
    value = json.loads(arguments).get("input")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else arguments
