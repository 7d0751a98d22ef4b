"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's form."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve.constrain import Calls, force
from paceline.serve.conversation import Message, call, fold_systems, numbered, thinking, tool
from paceline.serve.sampling import checked_limit
from paceline.serve.service import Answer, Service, aside_if_long, joined
from paceline.serve.tools import Call, Event, Text, Thought
from paceline.serve.wire import ANTHROPIC, event, read_body, reply, written
from paceline.types import FinishReason, Sampling

_BILLING = "x-anthropic-billing-header"  # differs from session to session, which would spoil a shared prefix
_DROPPED = ("thinking", "redacted_thinking")


class Block(Struct):
    """A content block of any type: the fields of all those that are read."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None
    tool_use_id: str = ""
    content: str | list[Block] | None = None
    is_error: bool | None = None


class InputMessage(Struct):
    role: str
    content: str | list[Block]


class InputTool(Struct):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    type: str | None = None


class ToolChoice(Struct):
    type: str
    name: str = ""
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct):
    type: str


class CountBody(Struct, kw_only=True):
    model: str
    messages: list[InputMessage]
    system: str | list[Block] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What the chat template is told of reasoning: nothing where it is the model's choice."""
        kind = self.thinking.type if self.thinking else "adaptive"
        if kind not in ("enabled", "disabled", "adaptive"):
            raise BadField("thinking.type can be enabled, disabled or adaptive", "thinking.type")
        return thinking(None if kind == "adaptive" else kind == "enabled")

    @property
    def active_tools(self) -> list[InputTool]:
        """The tools that may be called, server tools left out."""
        none = self.tool_choice is not None and self.tool_choice.type == "none"
        return [] if none else [each for each in self.tools or () if each.input_schema is not None]

    @property
    def calls(self) -> Calls:
        """Raises BadField for a choice there is not, or of a tool there is not."""
        schemas = {each.name: each.input_schema for each in self.active_tools}
        choice = self.tool_choice or ToolChoice("auto")
        several = not choice.disable_parallel_tool_use
        strict = [each.name for each in self.active_tools if each.strict]
        if choice.type in ("auto", "none"):
            return Calls(schemas, several=several, strict=strict)
        if choice.type not in ("any", "tool"):
            raise BadField("tool_choice can be auto, any, tool or none", "tool_choice")
        if choice.type == "tool":
            return force([choice.name], schemas, several=False, strict=strict)
        return force(schemas, schemas, several, strict)


class MessagesBody(CountBody, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None


def encode(tokenizer: Tokenizer, body: CountBody) -> list[int]:
    """The prompt's tokens. Those of a conversation's next turn begin with them."""
    tools = [tool(each.name, each.description or "", each.input_schema or {}) for each in body.active_tools]
    return tokenizer.encode_chat(template_messages(body), tools or None, variables=body.variables)


def template_messages(body: CountBody) -> list[Message]:
    """As chat templates take them; a string is one text block, and `cache_control` is nothing."""
    if not body.messages:
        raise BadField("messages: at least one message is required", "messages")
    system = body.system if body.system is not None else []
    plain: list[Message] = [
        {"role": "system", "content": text}
        for text in _texts(system, "system")
        if text and not text.startswith(_BILLING)
    ]
    for index, message in enumerate(body.messages):
        field = f"messages.{index}.content"
        if message.role == "assistant":
            plain.append(_assistant(message.content, field))
        elif message.role == "user":
            plain += _user(message.content, field)
        elif message.role == "system":
            plain.append({"role": "system", "content": "\n\n".join(_texts(message.content, field))})
        else:
            raise BadField(f"messages.{index}.role: there is no role {message.role!r}", f"messages.{index}.role")
    return numbered(fold_systems(plain))


def _texts(content: str | list[Block], field: str, shown: bool = False) -> list[str]:
    """The text of each block. Raises BadField for a block that is no text; of an image that a tool has shown its place is told.

    A tool's result comes again with every later turn, so that refusing it would end the conversation for good.
    """
    if isinstance(content, str):
        return [content]
    texts = []
    for index, block in enumerate(content):
        if block.type == "text":
            texts.append(block.text or "")
        elif shown and block.type == "image":
            texts.append("(an image, which this model cannot see)")
        elif block.type not in _DROPPED:
            raise BadField(f"{field}.{index}: blocks of type {block.type!r} are not supported here", field)
    return texts


def _assistant(content: str | list[Block], field: str) -> Message:
    blocks = [Block("text", content)] if isinstance(content, str) else content
    texts = _texts([each for each in blocks if each.type != "tool_use"], field)
    message: Message = {"role": "assistant", "content": "\n\n".join(texts)}
    if thoughts := [each.thinking for each in blocks if each.type == "thinking" and each.thinking]:
        message["reasoning_content"] = "\n\n".join(thoughts)  # templates that know none ignore it
    if calls := [call(each.name, each.input or {}, each.id) for each in blocks if each.type == "tool_use"]:
        message["tool_calls"] = calls
    return message


def _user(content: str | list[Block], field: str) -> list[Message]:
    """Tool results as messages of their own, then the text."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Message] = []
    for block in content:
        if block.type == "tool_result":
            text = "\n\n".join(_texts(block.content or "", f"{field}.tool_result", shown=True))
            text = f"Error: {text}" if block.is_error else text
            results.append({"role": "tool", "content": text, "tool_call_id": block.tool_use_id})
    texts = _texts([each for each in content if each.type != "tool_result"], field)
    return results + ([{"role": "user", "content": "\n\n".join(texts)}] if texts or not results else [])


async def messages(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, MessagesBody, service.body_limit)
    service.check_model(body.model, "claude")
    checked_limit(body.max_tokens, "max_tokens")
    sampling = Sampling(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        stop=tuple(body.stop_sequences or ()),
    )
    prompt = await aside_if_long(http, encode, service.host.tokenizer, body)
    answer = await service.ask(prompt, sampling, body.calls, body.max_tokens, namespace=service.namespace(http))
    return await written(
        http, _Writer(body, answer, service.host.tokenizer), bool(body.stream), ANTHROPIC, answer.close
    )


async def count_tokens(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, CountBody, service.body_limit)
    service.check_model(body.model, "claude")
    return reply({"input_tokens": len(await aside_if_long(http, encode, service.host.tokenizer, body))})


class _Writer:
    """Writes an answer as a message or as its events: blocks in turn, each opened, filled and closed."""

    def __init__(self, body: MessagesBody, answer: Answer, tokenizer: Tokenizer) -> None:
        self._body = body
        self._answer = answer
        self._tokenizer = tokenizer
        self._id = f"msg_{secrets.token_hex(12)}"
        self._called = False

    async def whole(self) -> dict[str, Any]:
        events: list[Event] = []
        async for more, _ in self._answer.pieces():
            events += more
        content = [self._block(each, whole=True) for each in joined(events)]
        reason, stop = self._end()
        return self._message(content, self._usage()) | {"stop_reason": reason, "stop_sequence": stop}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        index, opened, begun = 0, None, False
        async for events, _ in self._answer.pieces():
            if not begun:  # not before: what the cache had is known with the first output
                yield self._start()
                begun = True
            for each in joined(events):
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
        if not begun:
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
            "model": self._body.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _block(self, each: Event, whole: bool) -> dict[str, Any]:
        if isinstance(each, Text):
            return {"type": "text", "text": each.text if whole else ""}
        if isinstance(each, Thought):
            return {"type": "thinking", "thinking": each.text if whole else "", "signature": ""}
        self._called = True
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
        return ("tool_use" if self._called else "end_turn"), None

    def _stop_sequence(self) -> str | None:
        """The stop sequence that ended the output: the one that is whole first."""
        stops = self._body.stop_sequences or []
        text = b"".join(self._tokenizer.token_bytes(each) for each in self._answer.tokens).decode("utf-8", "replace")
        found = [(place + len(stop), place, stop) for stop in stops if (place := text.find(stop)) >= 0]
        return min(found)[2] if found else None


def _delta(each: Event) -> dict[str, Any]:
    if isinstance(each, Text):
        return {"type": "text_delta", "text": each.text}
    if isinstance(each, Thought):
        return {"type": "thinking_delta", "thinking": each.text}
    return {"type": "input_json_delta", "partial_json": each.arguments}


def _closing(index: int, kind: type[Event]) -> bytes:
    """The end of a block. That of reasoning brings its signature: none, as its text is sent whole."""
    signed = b""
    if kind is Thought:
        signed = _event("content_block_delta", index=index, delta={"type": "signature_delta", "signature": ""})
    return signed + _event("content_block_stop", index=index)


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)
