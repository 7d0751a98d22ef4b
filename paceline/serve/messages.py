"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's messages API."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.models.tokenizer import Tokenizer
from paceline.serve.messages_input import CountBody, MessagesBody, encode
from paceline.serve.sampling import checked_limit, with_defaults
from paceline.serve.service import Answer, PreparedRequest, Service, merge_adjacent, run_in_worker_thread_if_large
from paceline.serve.tools import Call, Event, ReasoningText, Text
from paceline.serve.wire import ANTHROPIC, answer_response, event, read_body, reply
from paceline.types import FinishReason


async def messages(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, MessagesBody, service.body_limit)
    name = service.check_model(body.model, "claude")
    checked_limit(body.max_tokens, "max_tokens")
    prepared = await run_in_worker_thread_if_large(
        http, _prepare_request, service, body, service.namespace(http, body.cache_salt)
    )
    answer = await service.start(prepared)
    writer = _Writer(name, body, answer, service.host.tokenizer)
    return await answer_response(http, writer, bool(body.stream), ANTHROPIC, answer.close)


def _prepare_request(service: Service, body: MessagesBody, namespace: str) -> PreparedRequest:
    sampling = with_defaults(
        service,
        {"stop": "stop_sequences"},
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences or ()),
        grammar=body.grammar,
    )
    prompt = encode(service.host.tokenizer, body)
    return service.prepare_request(
        prompt, sampling, body.calls, body.max_tokens, namespace=namespace, continued=body.continued_text
    )


async def count_tokens(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, CountBody, service.body_limit)
    service.check_model(body.model, "claude")
    return reply({"input_tokens": await run_in_worker_thread_if_large(http, _count, service.host.tokenizer, body)})


def _count(tokenizer: Tokenizer, body: CountBody) -> int:
    _ = body.grammar  # raises for an output format that /v1/messages would refuse
    return len(encode(tokenizer, body))


class _Writer:
    """Writes an answer as one message or as its events: each content block is started, filled and stopped in turn."""

    def __init__(self, model: str, body: MessagesBody, answer: Answer, tokenizer: Tokenizer) -> None:
        self._model = model
        self._body = body
        self._answer = answer
        self._tokenizer = tokenizer
        self._id = f"msg_{secrets.token_hex(12)}"
        self._has_calls = False

    async def whole(self) -> dict[str, Any]:
        events: list[Event] = []
        async for more, _ in self._answer.pieces():
            events += more
        content = [self._block(each, whole=True) for each in merge_adjacent(events)]
        reason, stop = self._end()
        return self._message(content, self._usage()) | {"stop_reason": reason, "stop_sequence": stop}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        index, opened, started = 0, None, False
        async for events, _ in self._answer.pieces():
            if not started:  # the cached tokens in its usage are known only with the first output
                yield self._start()
                started = True
            for each in merge_adjacent(events):
                if opened and not isinstance(each, opened):
                    yield _closing(index, opened)
                    index, opened = index + 1, None
                if not opened:
                    yield _event("content_block_start", index=index, content_block=self._block(each, whole=False))
                yield _event("content_block_delta", index=index, delta=_delta(each))
                opened = type(each)
                if opened is Call:
                    yield _closing(index, opened)
                    index, opened = index + 1, None
        if not started:
            yield self._start()
        if opened:
            yield _closing(index, opened)
        reason, stop = self._end()
        yield _event("message_delta", delta={"stop_reason": reason, "stop_sequence": stop}, usage=self._usage())
        yield _event("message_stop")

    def _start(self) -> bytes:
        return _event("message_start", message=self._message([], self._usage())) + _event("ping")

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "stop_details": None,
            "container": None,
            "usage": usage,
        }

    def _block(self, each: Event, whole: bool) -> dict[str, Any]:
        if isinstance(each, Text):
            return {"type": "text", "text": each.text if whole else ""}  # without `citations`: the AI SDK refuses null
        if isinstance(each, ReasoningText):
            return {"type": "thinking", "thinking": each.text if whole else "", "signature": ""}
        self._has_calls = True
        arguments = msgspec.Raw(each.arguments.encode()) if whole else {}
        return {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": each.name, "input": arguments}

    def _usage(self) -> dict[str, Any]:
        usage = self._answer.usage
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"thinking_tokens": self._answer.reasoning_tokens},
        }

    def _end(self) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence)."""
        answer = self._answer
        if answer.finish is FinishReason.LENGTH:
            whole = answer.stream.request.sampling.max_tokens == self._body.max_tokens
            return ("max_tokens" if whole else "model_context_window_exceeded"), None
        if not answer.ended_by_token:
            return "stop_sequence", self._stop_sequence()
        return ("tool_use" if self._has_calls else "end_turn"), None

    def _stop_sequence(self) -> str | None:
        """The stop sequence that ended the output: the one that is complete first."""
        stops = self._body.stop_sequences or []
        text = b"".join(self._tokenizer.token_bytes(each) for each in self._answer.tokens).decode("utf-8", "replace")
        found = [(place + len(stop), place, stop) for stop in stops if (place := text.find(stop)) >= 0]
        return min(found)[2] if found else None


def _delta(each: Event) -> dict[str, Any]:
    if isinstance(each, Text):
        return {"type": "text_delta", "text": each.text}
    if isinstance(each, ReasoningText):
        return {"type": "thinking_delta", "thinking": each.text}
    return {"type": "input_json_delta", "partial_json": each.arguments}


def _closing(index: int, kind: type[Event]) -> bytes:
    """The events that end a block. A reasoning block ends with an empty signature, as its text is not encrypted."""
    signed = b""
    if kind is ReasoningText:
        signed = _event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
    return signed + _event("content_block_stop", index=index)


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
