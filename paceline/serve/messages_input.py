"""The bodies of Anthropic's messages API, and their prompt. Content that the model cannot read becomes a placeholder."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve.constrain import AllowedCalls, ResponseFormat, Schema, forced_calls, response_format_grammar
from paceline.serve.conversation import (
    TemplateMessage,
    fold_system_messages,
    number_tool_calls,
    placeholder,
    reasoning_variables,
    tool_call,
    tool_definition,
)

BlockType = TypeVar("BlockType")
_TYPED = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
# a JSON object with a `type`, which its other fields depend on; unknown types are allowed
Block = Annotated[dict[str, Any], Meta(description="a content block", extra_json_schema=_TYPED)]

_BILLING = "x-anthropic-billing-header"  # differs between sessions, so that their prompts would share no cached prefix
_THINKING_TYPES = ("thinking", "redacted_thinking")
_CALL_TYPES = ("server_tool_use", "mcp_tool_use", "tool_use")
_TEXT_FIELDS = ("title", "context", "url", "source", "text", "stdout", "stderr", "lines", "tool_references", "content")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


class ToolUseBlock(Struct):
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None


class ToolResultBlock(Struct):
    tool_use_id: str = ""
    content: str | list[Block] | None = None
    is_error: bool | None = None


class TextBlock(Struct):
    text: str | None = None


class ThinkingBlock(Struct):
    thinking: str | None = None


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


class OutputFormat(Struct):
    type: str
    schema: dict[str, Any] | None = None


class OutputConfig(Struct):
    format: OutputFormat | None = None
    effort: str | None = None


class CountBody(Struct, kw_only=True):
    model: str = ""
    messages: list[InputMessage]
    system: str | list[Block] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """The chat template's variables for reasoning: none if the body leaves reasoning to the model."""
        kind = self.thinking.type if self.thinking else "adaptive"
        if kind not in ("enabled", "disabled", "adaptive"):
            raise BadField("thinking.type must be enabled, disabled or adaptive", "thinking.type")
        effort = self.output_config.effort if self.output_config else None
        if effort is not None and effort not in _EFFORTS:
            raise BadField(f"output_config.effort must be one of {', '.join(_EFFORTS)}", "output_config.effort")
        effort_variable = {} if effort is None else {"reasoning_effort": effort}
        return reasoning_variables(None if kind == "adaptive" else kind == "enabled") | effort_variable

    @property
    def active_tools(self) -> list[InputTool]:
        """The tools that the model may call. Server tools are left out."""
        none = self.tool_choice is not None and self.tool_choice.type == "none"
        return [] if none else [each for each in self.tools or () if each.input_schema is not None]

    @property
    def calls(self) -> AllowedCalls:
        """The calls that tool_choice allows. Raises BadField for an unknown choice, or one of a tool that is not defined."""
        schemas = {each.name: each.input_schema for each in self.active_tools}
        choice = self.tool_choice or ToolChoice("auto")
        max_calls = 1 if choice.disable_parallel_tool_use else None
        strict = [each.name for each in self.active_tools if each.strict]
        if choice.type in ("auto", "none"):
            return AllowedCalls(schemas, max_calls=max_calls, strict=strict)
        if choice.type not in ("any", "tool"):
            raise BadField("tool_choice must be auto, any, tool or none", "tool_choice")
        if choice.type == "tool":
            return forced_calls([choice.name], schemas, 1, strict)
        return forced_calls(schemas, schemas, max_calls, strict)

    @property
    def grammar(self) -> str | None:
        """The grammar of the text, from `output_config.format` or its older name `output_format`.

        Raises BadField for a format that cannot be enforced.
        """
        newer = self.output_config.format if self.output_config else None
        if newer is not None and self.output_format is not None:
            raise BadField("output_format is the older name of output_config.format: send one of them", "output_format")
        field = "output_format" if newer is None else "output_config.format"
        form = newer or self.output_format
        if form is None:
            return None
        if form.type != "json_schema" or form.schema is None:
            raise BadField(f"{field} must have the type json_schema and a schema", field)
        return response_format_grammar(ResponseFormat("json_schema", Schema(schema=form.schema, strict=True)), field)

    @property
    def continued_text(self) -> str:
        """The text of a last assistant message, which the answer continues; else empty.

        Raises BadField in the cases in which Anthropic's API refuses to continue.
        """
        if not self.messages or self.messages[-1].role != "assistant":
            return ""
        field = f"messages.{len(self.messages) - 1}.content"
        last = _assistant_message(self.messages[-1].content, field)
        text: str = last["content"]
        if text != text.rstrip():
            raise BadField(f"{field}: final assistant content cannot end with trailing whitespace", field)
        if "tool_calls" in last:
            raise BadField(f"{field}: a tool_use must be followed by its tool_result", field)
        if not text and "reasoning_content" in last:
            raise BadField(f"{field}: the final assistant content cannot be thinking alone", field)
        if text and self.thinking is not None and self.thinking.type == "enabled":
            raise BadField(f"{field}: the final message cannot be the assistant's while thinking is enabled", field)
        if text and (self.calls.forced or self.grammar is not None):
            reason = "tool_choice forces a call" if self.calls.forced else "an output format is requested"
            raise BadField(f"{field}: the final message cannot be the assistant's when {reason}", field)
        return text


class MessagesBody(CountBody, kw_only=True):
    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    cache_salt: str | None = None


def encode(tokenizer: Tokenizer, body: CountBody) -> list[int]:
    """The prompt's tokens. They are a prefix of the prompt of the conversation's next turn."""
    tools = [tool_definition(each.name, each.description or "", each.input_schema or {}) for each in body.active_tools]
    plain, continues = template_messages(body), bool(body.continued_text)
    return tokenizer.encode_chat(plain, tools or None, variables=body.variables, continue_final=continues)


def template_messages(body: CountBody) -> list[TemplateMessage]:
    """The messages in the chat template's format. A string equals one text block; `cache_control` has no effect."""
    if not body.messages:
        raise BadField("messages: at least one message is required", "messages")
    _check_last_message(body.messages)
    system = body.system if body.system is not None else []
    plain: list[TemplateMessage] = [
        {"role": "system", "content": text} for text in _system_texts(system) if text and not text.startswith(_BILLING)
    ]
    for index, message in enumerate(body.messages):
        field = f"messages.{index}.content"
        if message.role == "assistant":
            plain.append(_assistant_message(message.content, field))
        elif message.role == "user":
            plain += _user_messages(message.content, field)
        elif message.role == "system":
            plain.append({"role": "system", "content": "\n\n".join(_texts(message.content, field))})
        else:
            field = f"messages.{index}.role"
            raise BadField(f"{field}: the role {message.role!r} is not supported", field)
    if len(plain) > 1 and body.messages[-1].role == "assistant" and plain[-1] == {"role": "assistant", "content": ""}:
        plain.pop()  # continuing an empty message is opening a new turn
    return number_tool_calls(fold_system_messages(plain))


def _check_last_message(messages: list[InputMessage]) -> None:
    """Raises BadField if the newest user message has nothing that the model can read.

    In earlier messages such content becomes a placeholder: it is sent again in every later turn, so that a refusal would
    end the conversation.
    """
    asked = [index for index, each in enumerate(messages) if each.role != "system"]
    content = messages[asked[-1]].content if asked else ""
    if not asked or messages[asked[-1]].role != "user" or isinstance(content, str):
        return
    field = f"messages.{asked[-1]}.content"
    kinds = set()
    for where, block in _blocks(content, field, _THINKING_TYPES):
        kind = block["type"]
        if kind == "tool_result" or (_text(block, where).strip() if kind == "text" else _readable_text(block)):
            return
        if kind != "text":
            kinds.add(kind)
    if kinds:
        names = ", ".join(sorted(kinds))
        raise BadField(
            f"{field}: this model cannot read blocks of type {names}, and the message has nothing else", field
        )


def _blocks(content: list[Block], field: str, besides: Collection[str] = ()) -> Iterator[tuple[str, Block]]:
    """Yields (field, block), without blocks of the types `besides`. Raises BadField for a block without a type."""
    for index, block in enumerate(content):
        kind = block.get("type")
        if not isinstance(kind, str):
            raise BadField(f"{field}.{index}.type: a content block needs a type, a string", f"{field}.{index}")
        if kind not in besides:
            yield f"{field}.{index}", block


def _as_block(kind: type[BlockType], block: Block, field: str) -> BlockType:
    try:
        return msgspec.convert(block, kind)
    except msgspec.ValidationError as error:
        raise BadField(f"{field}: {error}", field) from error


def _system_texts(system: str | list[Block]) -> list[str]:
    """The texts of the system prompt. Raises BadField for a block that is not text."""
    if not isinstance(system, str):
        for field, block in _blocks(system, "system"):
            if block["type"] != "text":
                raise BadField(f"{field}: a system prompt can have blocks of type text only", field)
    return _texts(system, "system")


def _texts(content: str | list[Block], field: str, besides: Collection[str] = _THINKING_TYPES) -> list[str]:
    """The text of each block, without blocks of the types `besides`."""
    if isinstance(content, str):
        return [content]
    return [
        _text(block, where) if block["type"] == "text" else _block_text(block)
        for where, block in _blocks(content, field, besides)
    ]


def _text(block: Block, field: str) -> str:
    return _as_block(TextBlock, block, field).text or ""


def _assistant_message(content: str | list[Block], field: str) -> TemplateMessage:
    message: TemplateMessage = {"role": "assistant"}
    message["content"] = "\n\n".join(_texts(content, field, (*_THINKING_TYPES, "tool_use")))
    if isinstance(content, str):
        return message
    blocks = list(_blocks(content, field))
    thoughts = [_as_block(ThinkingBlock, each, where).thinking for where, each in blocks if each["type"] == "thinking"]
    if any(thoughts):
        message["reasoning_content"] = "\n\n".join(filter(None, thoughts))  # ignored by templates without reasoning
    uses = [_as_block(ToolUseBlock, each, where) for where, each in blocks if each["type"] == "tool_use"]
    if uses:
        message["tool_calls"] = [tool_call(each.name, each.input or {}, each.id) for each in uses]
    return message


def _user_messages(content: str | list[Block], field: str) -> list[TemplateMessage]:
    """A user message in the template's format: one message for each tool result, then one for the text."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[TemplateMessage] = []
    for where, block in _blocks(content, field):
        if block["type"] == "tool_result":
            result = _as_block(ToolResultBlock, block, where)
            text = "\n\n".join(_texts(result.content or "", f"{where}.content"))
            text = f"Error: {text}" if result.is_error else text
            results.append({"role": "tool", "content": text, "tool_call_id": result.tool_use_id})
    texts = _texts(content, field, (*_THINKING_TYPES, "tool_result"))
    return results + ([{"role": "user", "content": "\n\n".join(texts)}] if texts or not results else [])


def _block_text(block: Block) -> str:
    """The text of a block that is not a text block: its readable text, or a placeholder that names its type."""
    kind = block.get("type")
    if kind == "text":
        return _readable_text(block.get("text"))
    if shown := _readable_text(block):
        return shown
    title = block.get("title")
    return (f"{title}\n" if isinstance(title, str) and title else "") + placeholder(str(kind))


def _readable_text(value: Any) -> str:
    """The readable text in a block of any type or in a part of one; "" if there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        lines = all(isinstance(each, str) for each in value)
        parts = [_block_text(each) if isinstance(each, dict) else _readable_text(each) for each in value]
        return ("\n" if lines else "\n\n").join(parts)
    if not isinstance(value, dict):
        return ""
    kind = value.get("type")
    if kind in ("base64", "url", "file", *_THINKING_TYPES):  # sources of content that is not text
        return ""
    if kind in _CALL_TYPES:
        return f"(called {value.get('name')} with {json.dumps(value.get('input'), ensure_ascii=False)})"
    if kind == "tool_reference":
        return f"(the tool {value.get('tool_name')})"
    # a plain text source has its text in `data`
    fields = (*_TEXT_FIELDS, "data") if kind == "text" else _TEXT_FIELDS
    shown = {name: _readable_text(value.get(name)) for name in fields}
    if kind == "document" and not shown["source"]:
        return ""
    parts = list(shown.values())
    if value.get("return_code") is not None:
        parts.append(f"exit status {value['return_code']}")
    if error := value.get("error_code"):
        parts.append(f"error: {error}")
    failed = "Error: " if value.get("is_error") is True else ""
    return failed + "\n".join(filter(None, parts)) if any(parts) else ""
