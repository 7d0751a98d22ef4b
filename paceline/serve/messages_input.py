"""The bodies of Anthropic's messages, and a prompt of what they hold: text as it is, what cannot be shown as a placeholder."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve.constrain import Calls, ResponseFormat, Schema, force, of_format
from paceline.serve.conversation import Message, call, fold_systems, numbered, thinking, tool, unseen

Known = TypeVar("Known")
_TYPED = {"type": "object", "properties": {"type": {"type": "string"}}, "required": ["type"]}
# a JSON object with its type; the fields depend on it, and there are more types than are known here
Block = Annotated[dict[str, Any], Meta(description="a content block", extra_json_schema=_TYPED)]

_BILLING = "x-anthropic-billing-header"  # differs from session to session, which would spoil a shared prefix
_DROPPED = ("thinking", "redacted_thinking")
_CALLED = ("server_tool_use", "mcp_tool_use", "tool_use")
_TOLD = ("title", "context", "url", "source", "text", "stdout", "stderr", "lines", "tool_references", "content")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


class ToolUse(Struct):
    id: str = ""
    name: str = ""
    input: dict[str, Any] | None = None


class ToolResult(Struct):
    tool_use_id: str = ""
    content: str | list[Block] | None = None
    is_error: bool | None = None


class Text(Struct):
    text: str | None = None


class Thought(Struct):
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
        """What the chat template is told of reasoning: nothing where it is the model's choice."""
        kind = self.thinking.type if self.thinking else "adaptive"
        if kind not in ("enabled", "disabled", "adaptive"):
            raise BadField("thinking.type can be enabled, disabled or adaptive", "thinking.type")
        effort = self.output_config.effort if self.output_config else None
        if effort is not None and effort not in _EFFORTS:
            raise BadField(f"output_config.effort can be {', '.join(_EFFORTS)}", "output_config.effort")
        told = {} if effort is None else {"reasoning_effort": effort}
        return thinking(None if kind == "adaptive" else kind == "enabled") | told

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
        most = 1 if choice.disable_parallel_tool_use else None
        strict = [each.name for each in self.active_tools if each.strict]
        if choice.type in ("auto", "none"):
            return Calls(schemas, most=most, strict=strict)
        if choice.type not in ("any", "tool"):
            raise BadField("tool_choice can be auto, any, tool or none", "tool_choice")
        if choice.type == "tool":
            return force([choice.name], schemas, 1, strict)
        return force(schemas, schemas, most, strict)

    @property
    def grammar(self) -> str | None:
        """That of the text, by `output_config.format` or its older name. Raises BadField for what cannot be enforced."""
        newer = self.output_config.format if self.output_config else None
        if newer is not None and self.output_format is not None:
            raise BadField("output_format is output_config.format by its older name: send one of them", "output_format")
        field = "output_format" if newer is None else "output_config.format"
        form = newer or self.output_format
        if form is None:
            return None
        if form.type != "json_schema" or form.schema is None:
            raise BadField(f"{field} must be of type json_schema, and have a schema", field)
        return of_format(ResponseFormat("json_schema", Schema(schema=form.schema, strict=True)), field)

    @property
    def begun(self) -> str:
        """The beginning of the answer, which a last message of the assistant's gives. Raises BadField as Anthropic does."""
        if not self.messages or self.messages[-1].role != "assistant":
            return ""
        field = f"messages.{len(self.messages) - 1}.content"
        last = _assistant(self.messages[-1].content, field)
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
            reason = "tool_choice forces a call" if self.calls.forced else "an output format is asked for"
            raise BadField(f"{field}: the final message cannot be the assistant's where {reason}", field)
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
    """The prompt's tokens. Those of a conversation's next turn begin with them."""
    tools = [tool(each.name, each.description or "", each.input_schema or {}) for each in body.active_tools]
    plain, continues = template_messages(body), bool(body.begun)
    return tokenizer.encode_chat(plain, tools or None, variables=body.variables, continue_final=continues)


def template_messages(body: CountBody) -> list[Message]:
    """As chat templates take them; a string is one text block, and `cache_control` is nothing."""
    if not body.messages:
        raise BadField("messages: at least one message is required", "messages")
    _check_last(body.messages)
    system = body.system if body.system is not None else []
    plain: list[Message] = [
        {"role": "system", "content": text} for text in _system_texts(system) if text and not text.startswith(_BILLING)
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
    if len(plain) > 1 and body.messages[-1].role == "assistant" and plain[-1] == {"role": "assistant", "content": ""}:
        plain.pop()  # an answer that is begun with nothing
    return numbered(fold_systems(plain))


def _check_last(messages: list[InputMessage]) -> None:
    """Raises BadField where there is nothing in the newest user message that the model can be shown.

    In the history that is told by a placeholder: it comes again with every later turn, so that refusing it would end the
    conversation for good.
    """
    asked = [index for index, each in enumerate(messages) if each.role != "system"]
    content = messages[asked[-1]].content if asked else ""
    if not asked or messages[asked[-1]].role != "user" or isinstance(content, str):
        return
    field = f"messages.{asked[-1]}.content"
    kinds = set()
    for where, block in _blocks(content, field, _DROPPED):
        kind = block["type"]
        if kind == "tool_result" or (_text(block, where).strip() if kind == "text" else _shown(block)):
            return
        if kind != "text":
            kinds.add(kind)
    if kinds:
        names = ", ".join(sorted(kinds))
        raise BadField(f"{field}: this model sees no blocks of type {names}, and the message has nothing else", field)


def _blocks(content: list[Block], field: str, besides: Collection[str] = ()) -> Iterator[tuple[str, Block]]:
    """Each block with its field, those of the types `besides` left out. Raises BadField for one without a type."""
    for index, block in enumerate(content):
        kind = block.get("type")
        if not isinstance(kind, str):
            raise BadField(f"{field}.{index}.type: a content block needs a type, which is a string", f"{field}.{index}")
        if kind not in besides:
            yield f"{field}.{index}", block


def _read(kind: type[Known], block: Block, field: str) -> Known:
    try:
        return msgspec.convert(block, kind)
    except msgspec.ValidationError as error:
        raise BadField(f"{field}: {error}", field) from error


def _system_texts(system: str | list[Block]) -> list[str]:
    """Raises BadField for a block that is no text."""
    if not isinstance(system, str):
        for field, block in _blocks(system, "system"):
            if block["type"] != "text":
                raise BadField(f"{field}: a system prompt has blocks of type text alone", field)
    return _texts(system, "system")


def _texts(content: str | list[Block], field: str, besides: Collection[str] = _DROPPED) -> list[str]:
    """The text of each block but those of the types `besides`."""
    if isinstance(content, str):
        return [content]
    return [
        _text(block, where) if block["type"] == "text" else _told(block)
        for where, block in _blocks(content, field, besides)
    ]


def _text(block: Block, field: str) -> str:
    return _read(Text, block, field).text or ""


def _assistant(content: str | list[Block], field: str) -> Message:
    message: Message = {"role": "assistant"}
    message["content"] = "\n\n".join(_texts(content, field, (*_DROPPED, "tool_use")))
    if isinstance(content, str):
        return message
    blocks = list(_blocks(content, field))
    thoughts = [_read(Thought, each, where).thinking for where, each in blocks if each["type"] == "thinking"]
    if any(thoughts):
        message["reasoning_content"] = "\n\n".join(filter(None, thoughts))  # templates that know none ignore it
    uses = [_read(ToolUse, each, where) for where, each in blocks if each["type"] == "tool_use"]
    if uses:
        message["tool_calls"] = [call(each.name, each.input or {}, each.id) for each in uses]
    return message


def _user(content: str | list[Block], field: str) -> list[Message]:
    """Tool results as messages of their own, then the text."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    results: list[Message] = []
    for where, block in _blocks(content, field):
        if block["type"] == "tool_result":
            result = _read(ToolResult, block, where)
            text = "\n\n".join(_texts(result.content or "", f"{where}.content"))
            text = f"Error: {text}" if result.is_error else text
            results.append({"role": "tool", "content": text, "tool_call_id": result.tool_use_id})
    texts = _texts(content, field, (*_DROPPED, "tool_result"))
    return results + ([{"role": "user", "content": "\n\n".join(texts)}] if texts or not results else [])


def _told(block: Block) -> str:
    """A block of a type that is not text as text: what can be shown of it, or what it is."""
    kind = block.get("type")
    if kind == "text":
        return _shown(block.get("text"))
    if shown := _shown(block):
        return shown
    title = block.get("title")
    return (f"{title}\n" if isinstance(title, str) and title else "") + unseen(str(kind))


def _shown(value: Any) -> str:
    """The text in a block or in a part of one, whatever its type; "" where there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        lines = all(isinstance(each, str) for each in value)
        parts = [_told(each) if isinstance(each, dict) else _shown(each) for each in value]
        return ("\n" if lines else "\n\n").join(parts)
    if not isinstance(value, dict):
        return ""
    kind = value.get("type")
    if kind in ("base64", "url", "file", *_DROPPED):  # sources of what is no text
        return ""
    if kind in _CALLED:
        return f"(called {value.get('name')} with {json.dumps(value.get('input'), ensure_ascii=False)})"
    if kind == "tool_reference":
        return f"(the tool {value.get('tool_name')})"
    told = (*_TOLD, "data") if kind == "text" else _TOLD  # a plain text source has its text there
    shown = {name: _shown(value.get(name)) for name in told}
    if kind == "document" and not shown["source"]:
        return ""
    parts = list(shown.values())
    if value.get("return_code") is not None:
        parts.append(f"exit status {value['return_code']}")
    if error := value.get("error_code"):
        parts.append(f"error: {error}")
    failed = "Error: " if value.get("is_error") is True else ""
    return failed + "\n".join(filter(None, parts)) if any(parts) else ""
