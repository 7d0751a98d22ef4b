"""POST /v1/chat/completions, OpenAI's chat API."""

from __future__ import annotations

import contextlib
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve import morph
from paceline.serve.chat_input import ChatBody, ChatTools, chat_tools, continued_text, encode, text_of
from paceline.serve.choices import Choices
from paceline.serve.custom_tools import input_of
from paceline.serve.sampling import choice_requests
from paceline.serve.service import (
    PreparedRequest,
    Service,
    merge_adjacent,
    openai_logprob,
    openai_usage,
    run_in_worker_thread_if_large,
)
from paceline.serve.tools import Call, Event, ReasoningText, Text
from paceline.serve.wire import OPENAI, answer_response, event, read_body
from paceline.types import FinishReason, TokenLogprob


async def chat(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, ChatBody, service.body_limit)
    if not body.messages:
        raise BadField("messages must not be empty", "messages")
    namespace = service.namespace(http, body.cache_salt)
    if body.model in service.apply_names and body.model not in service.names:
        edit = text_of(body.messages[-1].content, "messages")
        stream, options = bool(body.stream), body.paceline or morph.Options()
        return await morph.apply(service, http, body.model, edit, stream, body.wants_usage, options, namespace)
    body.model = service.check_model(body.model)
    if body.echo:
        raise BadField("echo is supported in /v1/completions only", "echo")
    tools, prepared = await run_in_worker_thread_if_large(http, _prepare_request, service, body, namespace)
    each = [functools.partial(service.start, one) for one in choice_requests(prepared, body.num_choices)]
    choices = await Choices.begin(each, len(each), len(each))
    writer = _Writer(body, tools, choices, service.host.tokenizer)
    return await answer_response(http, writer, bool(body.stream), OPENAI, choices.close)


def _prepare_request(service: Service, body: ChatBody, namespace: str) -> tuple[ChatTools, PreparedRequest]:
    sampling = body.sampling(service, body.num_logprobs)
    tools = chat_tools(body)
    prompt = encode(service.host.tokenizer, body.messages, body, tools.definitions)
    sources, continued = _prediction_tokens(service.host.tokenizer, body), continued_text(body.messages, body)
    return tools, service.prepare_request(prompt, sampling, tools.calls, body.limit, sources, namespace, continued)


def _prediction_tokens(tokenizer: Tokenizer, body: ChatBody) -> tuple[list[int], ...]:
    """The tokens of the request's `prediction` as a draft source: one list, or none without a prediction."""
    if body.prediction is None:
        return ()
    predicted = tokenizer.encode(text_of(body.prediction.content, "prediction.content", ""))
    return (predicted + list(tokenizer.eos_tokens[:1]),) if predicted else ()


class _Writer:
    """Writes answers as one chat completion or as its streaming chunks."""

    def __init__(self, body: ChatBody, tools: ChatTools, choices: Choices, tokenizer: Tokenizer) -> None:
        self._body = body
        self._tools = tools
        self._choices = choices
        self._tokenizer = tokenizer
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
        self._num_calls = [0] * len(choices)

    async def whole(self) -> dict[str, Any]:
        events: list[list[Event]] = [[] for _ in range(len(self._choices))]
        logprobs: list[list[TokenLogprob]] = [[] for _ in events]
        async with contextlib.aclosing(self._choices.pieces()) as pieces:
            async for index, more, values in pieces:
                events[index] += more
                logprobs[index] += values
        choices = [
            {
                "index": index,
                "message": self._message(index, each),
                "logprobs": self._logprobs(logprobs[index]),
                "finish_reason": self._reason(index),
            }
            for index, each in enumerate(events)
        ]
        return {"object": "chat.completion", **self._head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async with contextlib.aclosing(self._choices.pieces()) as pieces:
            async for index, events, logprobs in pieces:
                for each in merge_adjacent(events) or [Text("")]:
                    if (delta := self._delta(index, each)) is not None or logprobs:
                        yield self._chunk(index, delta or {"content": ""}, logprobs)
                    logprobs = ()
        for index in range(len(self._choices)):
            yield self._chunk(index, {}, reason=self._reason(index))
        if self._body.wants_usage:
            yield event({"object": "chat.completion.chunk", **self._head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _message(self, index: int, events: list[Event]) -> dict[str, Any]:
        text = "".join(each.text for each in events if isinstance(each, Text))
        reasoning = "".join(each.text for each in events if isinstance(each, ReasoningText))
        calls = [self._call(index, each) for each in events if isinstance(each, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if reasoning and self._body.include_reasoning is not False:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"function_call": calls[0]["function"]} if self._tools.legacy else {"tool_calls": calls}
        return message

    def _delta(self, index: int, each: Event) -> dict[str, Any] | None:
        """An event as a chunk's delta; None for reasoning that the client does not want to receive."""
        if isinstance(each, Text):
            return {"content": each.text}
        if isinstance(each, ReasoningText):
            return {"reasoning_content": each.text} if self._body.include_reasoning is not False else None
        number = self._num_calls[index]
        made = self._call(index, each)
        if self._tools.legacy:
            return {"function_call": made["function"]}
        return {"tool_calls": [{"index": number, **made}]}

    def _chunk(
        self, index: int, delta: dict[str, Any], logprobs: Iterable[TokenLogprob] = (), reason: str | None = None
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": self._logprobs(logprobs) if logprobs else None}
        return event(
            {"object": "chat.completion.chunk", **self._head, "choices": [{**choice, "finish_reason": reason}]}
        )

    def _call(self, index: int, each: Call) -> dict[str, Any]:
        self._num_calls[index] += 1
        identity = f"call_{secrets.token_hex(12)}"
        if each.name in self._tools.custom:
            return {
                "id": identity,
                "type": "custom",
                "custom": {"name": each.name, "input": input_of(each.arguments)},
            }
        return {"id": identity, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}

    def _usage(self) -> dict[str, Any]:
        return openai_usage(self._choices.usage, self._body.prediction is not None, self._choices.reasoning_tokens)

    def _reason(self, index: int) -> str:
        if self._choices[index].finish is FinishReason.LENGTH:
            return "length"
        if not self._num_calls[index]:
            return "stop"
        return "function_call" if self._tools.legacy else "tool_calls"

    def _logprobs(self, values: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": [openai_logprob(self._tokenizer, each) for each in values], "refusal": None}
