"""POST /v1/chat/completions, in OpenAI's form."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve import morph
from paceline.serve.constrain import Calls, ResponseFormat, of_format, openai_calls
from paceline.serve.conversation import Message, call, checked_variables, fold_systems, numbered, thinking, tool
from paceline.serve.sampling import SamplingBody, checked_limit
from paceline.serve.service import Answer, Service, aside_if_long, joined, usage_of
from paceline.serve.tools import Call, Event, Text, Thought
from paceline.serve.wire import OPENAI, event, read_body, reply, written
from paceline.types import FinishReason, TokenLogprob


class Part(Struct):
    type: str
    text: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str = ""


class ToolCall(Struct):
    function: FunctionCall
    id: str = ""


class ChatMessage(Struct):
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str = ""
    reasoning_content: str | None = None


class Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    function: Function
    type: str = "function"


class Prediction(Struct):
    content: str | list[Part]
    type: str = "content"


class ChatBody(SamplingBody, kw_only=True):
    messages: list[ChatMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    paceline: morph.Options | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template is told besides messages and tools. Raises BadField for what it cannot be."""
        effort = self.reasoning_effort
        asked = {} if effort is None else {**thinking(effort != "none"), "reasoning_effort": effort}
        return asked | checked_variables(self.chat_template_kwargs)

    @property
    def limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return checked_limit(self.max_completion_tokens, "max_completion_tokens")
        return checked_limit(self.max_tokens, "max_tokens")

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadField("top_logprobs needs logprobs to be true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def calls(self) -> Calls:
        schemas = {each.function.name: each.function.parameters for each in self.tools or ()}
        strict = [each.function.name for each in self.tools or () if each.function.strict]
        return openai_calls(self.tool_choice, self.parallel_tool_calls, schemas, strict)


def text_of(content: str | list[Part] | None, field: str, separator: str = "\n") -> str:
    """Content as one text. Raises BadField for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise BadField(f"content of type {part.type!r} is not supported: text only", f"{field}[{index}]")
    return separator.join(part.text or "" for part in content)


def template_messages(messages: list[ChatMessage]) -> list[Message]:
    """As chat templates take them. Raises BadField for a role there is not."""
    plain: list[Message] = []
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant", "tool"):
            raise BadField(f"there is no role {message.role!r}", f"messages[{index}].role")
        one: Message = {"role": role, "content": text_of(message.content, f"messages[{index}].content")}
        if message.tool_calls:
            one["tool_calls"] = [
                call(each.function.name, each.function.arguments, each.id) for each in message.tool_calls
            ]
        if role == "assistant" and message.reasoning_content:
            one["reasoning_content"] = message.reasoning_content  # templates that know none ignore it
        if role == "tool":
            one["tool_call_id"] = message.tool_call_id
        plain.append(one)
    return numbered(fold_systems(plain))


async def chat(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, ChatBody, service.body_limit)
    if not body.messages:
        raise BadField("messages must not be empty", "messages")
    if body.model in service.apply_names and body.model not in service.names:
        asked = text_of(body.messages[-1].content, "messages")
        options = body.paceline or morph.Options()
        return await morph.apply(service, http, body.model, asked, bool(body.stream), body.wants_usage, options)
    service.check_model(body.model)
    tokenizer = service.host.tokenizer
    sampling = body.sampling(body.num_logprobs, tokenizer.vocab_size)
    if grammar := of_format(body.response_format):
        sampling = dataclasses.replace(sampling, grammar=grammar)
    calls = body.calls
    prompt, sources = await aside_if_long(http, _prompt, tokenizer, body, calls)
    answer = await service.ask(prompt, sampling, calls, body.limit, sources, service.namespace(http, body.cache_salt))
    return await written(http, Writer(body, answer, tokenizer), bool(body.stream), OPENAI, answer.close)


def _prompt(tokenizer: Tokenizer, body: ChatBody, calls: Calls) -> tuple[list[int], tuple[list[int], ...]]:
    """The prompt's tokens, and those of what is predicted."""
    tools = [
        tool(each.function.name, each.function.description or "", each.function.parameters or {})
        for each in body.tools or ()
        if calls.schemas
    ]
    prompt = tokenizer.encode_chat(template_messages(body.messages), tools or None, variables=body.variables)
    if body.prediction is None:
        return prompt, ()
    predicted = tokenizer.encode(text_of(body.prediction.content, "prediction.content", ""))
    return prompt, ((predicted + list(tokenizer.eos_tokens[:1]),) if predicted else ())


class Writer:
    """Writes an answer as a completion or as its chunks."""

    def __init__(self, body: ChatBody, answer: Answer, tokenizer: Tokenizer) -> None:
        self._body = body
        self._answer = answer
        self._tokenizer = tokenizer
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
        self._num_calls = 0

    async def whole(self) -> dict[str, Any]:
        events: list[Event] = []
        logprobs: list[TokenLogprob] = []
        async for more, values in self._answer.pieces():
            events += more
            logprobs += values
        text = "".join(each.text for each in events if isinstance(each, Text))
        thought = "".join(each.text for each in events if isinstance(each, Thought))
        calls = [self._call(each) for each in events if isinstance(each, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "logprobs": self._logprobs(logprobs), "finish_reason": self._reason()}
        head = {"object": "chat.completion", **self._head}
        return {**head, "choices": [choice], "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        yield self._chunk({"role": "assistant", "content": ""})
        async for events, logprobs in self._answer.pieces():
            for each in joined(events) or [Text("")]:
                if isinstance(each, Text):
                    yield self._chunk({"content": each.text}, logprobs)
                elif isinstance(each, Thought):
                    yield self._chunk({"reasoning_content": each.text}, logprobs)
                else:
                    index = self._num_calls
                    yield self._chunk({"tool_calls": [{"index": index, **self._call(each)}]}, logprobs)
                logprobs = ()
        yield self._chunk({}, reason=self._reason())
        if self._body.wants_usage:
            yield event({"object": "chat.completion.chunk", **self._head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self, delta: dict[str, Any], logprobs: tuple[TokenLogprob, ...] = (), reason: str | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": self._logprobs(logprobs) if logprobs else None}
        return event(
            {"object": "chat.completion.chunk", **self._head, "choices": [{**choice, "finish_reason": reason}]}
        )

    def _call(self, each: Call) -> dict[str, Any]:
        self._num_calls += 1
        function = {"name": each.name, "arguments": each.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

    def _usage(self) -> dict[str, Any]:
        return usage_of(self._answer.usage, self._body.prediction is not None, self._answer.reasoning_tokens)

    def _reason(self) -> str:
        if self._answer.finish is FinishReason.LENGTH:
            return "length"
        return "tool_calls" if self._num_calls else "stop"

    def _logprobs(self, values: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [
            {
                **self._token(each.token, each.logprob),
                "top_logprobs": [self._token(token, value) for token, value in each.top],
            }
            for each in values
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


class TokenizeBody(Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


async def tokenize(service: Service, http: HttpRequest) -> Response:
    """POST /tokenize: the tokens of a text, or of messages as the chat template writes them."""
    body = await read_body(http, TokenizeBody, service.body_limit)
    tokenizer = service.host.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise BadField("give either prompt or messages", "prompt")
    if body.prompt is not None:
        tokens = await aside_if_long(http, tokenizer.encode, body.prompt)
    else:
        tools = [msgspec.to_builtins(each) for each in body.tools or ()]
        messages, variables = template_messages(body.messages or []), checked_variables(body.chat_template_kwargs)
        tokens = await aside_if_long(http, tokenizer.encode_chat, messages, tools or None, True, variables)
    return reply({"count": len(tokens), "max_model_len": service.host.capacity, "tokens": tokens})
