"""What a body of the Responses API asks for: its items as messages, its tools as functions the model can call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

from paceline.engine.grammar import regex
from paceline.engine.schemas import LARK
from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve.constrain import Calls, ResponseFormat, Schema, of_format, openai_calls
from paceline.serve.conversation import Message, call, fold_systems, numbered, thinking, tool
from paceline.serve.sampling import SamplingBody, checked_limit

_TEXTS = ("input_text", "output_text", "text")
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
# what other servers' tools looked up: nothing that this one can take up
_PASSED_OVER = (
    "web_search_call",
    "file_search_call",
    "image_generation_call",
    "tool_search_call",
    "tool_search_output",
)
# what the model is told that a custom tool takes
_INPUT = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
_THOUGHT = {"role", "reasoning_content"}  # of a message of which only its reasoning is known yet
_STATELESS = "nothing is stored here (store is always false), so send the whole conversation as input"


class Part(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None
    encrypted_content: str | None = None


class Format(Struct):
    """The form of a custom tool's input, or of the output's text."""

    type: str
    syntax: str = ""
    definition: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool of any type: the fields of all those that are read."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: Format | None = None
    tools: list[Tool] | None = None


class Item(Struct):
    """An item of any type: the fields of all those that are read. Ids and `status` are not: they change nothing."""

    type: str = "message"
    role: str = ""
    content: str | list[Part] | None = None
    name: str = ""
    namespace: str | None = None
    arguments: str | dict[str, Any] = ""
    input: str = ""
    call_id: str = ""
    output: str | list[Part] | None = None
    tools: list[Tool] | None = None


class TextOptions(Struct):
    format: Format | None = None
    verbosity: str | None = None


class Reasoning(Struct):
    effort: str | None = None
    summary: str | None = None


class ResponsesBody(SamplingBody, kw_only=True):
    """`tools` are kept as they were written, for the reply repeats them."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"[]"))
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, Any] | None = None
    top_logprobs: int | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None

    def __post_init__(self) -> None:
        if bytes(self.tools) == b"null":
            self.tools = msgspec.Raw(b"[]")

    @property
    def limit(self) -> int | None:
        return checked_limit(self.max_output_tokens, "max_output_tokens")

    @property
    def may_call(self) -> bool:
        """Whether the model may call tools."""
        return self.tool_choice != "none"

    @property
    def text_grammar(self) -> str | None:
        """What text.format holds the answer to. Raises BadField for a format there is not."""
        form = self.text.format if self.text is not None else None
        if form is None:
            return None
        return of_format(
            ResponseFormat(form.type, None if form.schema is None else Schema("", form.schema, form.strict)),
            "text.format",
        )

    @property
    def items(self) -> list[Item]:
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def check(self) -> None:
        """Raises BadField for what is asked of a server that keeps conversations, or cannot be done."""
        if self.previous_response_id is not None:
            raise BadField(f"previous_response_id is not supported: {_STATELESS}", "previous_response_id")
        if self.conversation is not None:
            raise BadField(f"conversation is not supported: {_STATELESS}", "conversation")
        if self.prompt is not None:
            raise BadField("stored prompts are not supported: send instructions and input", "prompt")
        if self.background:
            raise BadField(f"background is not supported: {_STATELESS}", "background")
        if self.top_logprobs:
            raise BadField("top_logprobs is not supported here; chat completions have them", "top_logprobs")
        if not self.input:
            raise BadField("input must not be empty", "input")


@dataclass(frozen=True)
class Called:
    """A tool as its client knows it. A custom tool takes text as its input instead of arguments."""

    name: str
    namespace: str = ""
    custom: bool = False


class Toolbox:
    """The tools of a body, and the names under which its client and the model know them.

    The model has functions only. One in a namespace is `namespace__name` to it; a custom tool is one with `input`, a
    string, as its parameter. Tools that a server would run itself (web search and the like) are left out. Where a
    tool is given twice the later one holds, in the place of the first.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.functions: list[Message] = []
        self.strict: set[str] = set()
        self._grammars: dict[str, str] = {}
        self._called: dict[str, Called] = {}
        self._names: dict[Called, str] = {}
        for called, each in {called: each for called, each in _flat(tools)}.items():
            name = _unused(_joined_name(called), self._called)
            self._called[name] = called
            self._names[called] = name
            self.functions.append(tool(name, _description(each), _INPUT if called.custom else each.parameters or {}))
            if called.custom and (grammar := _grammar(each.format)) is not None:
                self._grammars[name] = grammar
            if each.strict or name in self._grammars:
                self.strict.add(name)

    def called(self, name: str) -> Called:
        """What the model means by a name. One that is unknown is left to the client to refuse."""
        return self._called.get(name) or Called(name)

    def calls(self, body: ResponsesBody) -> Calls:
        """What the model may call, by the model's names."""
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in self.functions}
        for name, grammar in self._grammars.items():
            schemas[name] = {**_INPUT, "properties": {"input": {"type": "string", LARK: grammar}}}
        choice = body.tool_choice
        if isinstance(choice, dict) and "name" in choice:
            custom = choice.get("type") == "custom"
            named = Called(str(choice["name"]), str(choice.get("namespace") or ""), custom)
            choice = {**choice, "name": self.name(named)}
        return openai_calls(choice, body.parallel_tool_calls, schemas, self.strict)

    def name(self, called: Called) -> str:
        """How the model calls a tool, also one that is not there any more."""
        return self._names.get(called) or _joined_name(called)


def _flat(tools: Iterable[Tool], namespace: str = "") -> Iterator[tuple[Called, Tool]]:
    for each in tools:
        if each.type == "namespace" and not namespace:
            yield from _flat(each.tools or (), each.name)
        elif each.type in ("function", "custom"):
            if not each.name:
                raise BadField(f"a tool of type {each.type} needs a name", "tools")
            yield Called(each.name, namespace, each.type == "custom"), each


def _joined_name(called: Called) -> str:
    return f"{called.namespace}__{called.name}" if called.namespace else called.name


def _unused(name: str, used: Iterable[str]) -> str:
    """The name, with the first number behind it that makes it another than all those used."""
    number, unused = 1, name
    while unused in used:
        number += 1
        unused = f"{name}_{number}"
    return unused


def _description(each: Tool) -> str:
    text = each.description or ""
    if each.format is None or not each.format.definition:
        return text
    return f"{text}\n\n`input` follows this {each.format.syntax} grammar:\n{each.format.definition}".strip()


def _grammar(form: Format | None) -> str | None:
    """What a custom tool's input follows, as Lark; None where it is free."""
    if form is None or not form.definition:
        return None
    return regex(form.definition) if form.syntax == "regex" else form.definition


def toolbox(body: ResponsesBody) -> Toolbox:
    """The tools of the body and of its `additional_tools` items. Raises BadField for what is no list of tools."""
    try:
        tools = msgspec.json.decode(body.tools, type=list[Tool])
        body.tools = msgspec.Raw(msgspec.json.format(bytes(body.tools), indent=-1))  # an event has no line feeds
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = re.search(r" - at `\$(.*)`$", str(error))
        raise BadField(f"tools: {error}", f"tools{found[1] if found else ''}") from error
    for item in body.items:
        if item.type == "additional_tools":
            tools += item.tools or []
    return Toolbox(tools)


def encode(tokenizer: Tokenizer, body: ResponsesBody, box: Toolbox) -> list[int]:
    """The prompt's tokens. Those of a conversation's next turn begin with them, where it has the same tools."""
    effort = body.reasoning.effort if body.reasoning is not None else None
    asked = {} if effort is None else {**thinking(effort != "none"), "reasoning_effort": effort}
    messages = template_messages(body, box)
    return tokenizer.encode_chat(messages, (body.may_call and box.functions) or None, variables=asked)


def template_messages(body: ResponsesBody, box: Toolbox) -> list[Message]:
    """As chat templates take them: calls are part of the assistant's message before them, reasoning of the one after it.

    Raises BadField for an item, a role or a content that cannot be taken.
    """
    plain: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for index, item in enumerate(body.items):
        field = f"input[{index}]"
        if item.type == "message":
            if item.role not in _ROLES:
                raise BadField(f"there is no role {item.role!r}", f"{field}.role")
            one = {"role": _ROLES[item.role], "content": _text(item.content, f"{field}.content")}
            if one["role"] == "assistant" and plain and plain[-1].keys() == _THOUGHT:
                one = {**plain.pop(), **one}
            plain.append(one)
        elif item.type == "reasoning":  # this server's; what others send is encrypted, or a summary
            parts = item.content if isinstance(item.content, list) else []
            thought = "".join(part.text or "" for part in parts if part.type == "reasoning_text")
            if thought:
                plain.append({"role": "assistant", "reasoning_content": thought})
        elif item.type == "agent_message":  # what one of Codex's agents tells another, names and all
            plain.append({"role": "user", "content": _text(item.content, f"{field}.content")})
        elif item.type in ("function_call", "custom_tool_call"):
            _add_call(plain, item, box)
        elif item.type in ("function_call_output", "custom_tool_call_output"):
            text = _text(item.output, f"{field}.output", shown=True)
            plain.append({"role": "tool", "content": text, "tool_call_id": item.call_id})
        elif item.type == "item_reference":
            raise BadField(f"item_reference is not supported: {_STATELESS}", f"{field}.type")
        elif item.type not in _PASSED_OVER and item.type != "additional_tools":
            raise BadField(f"an item of type {item.type!r} is not supported", f"{field}.type")
    return numbered(fold_systems([{"content": "", **each} for each in plain]))


def _add_call(plain: list[Message], item: Item, box: Toolbox) -> None:
    custom = item.type == "custom_tool_call"
    name = box.name(Called(item.name, item.namespace or "", custom))
    if not plain or plain[-1]["role"] != "assistant":
        plain.append({"role": "assistant", "content": ""})
    made = call(name, {"input": item.input} if custom else item.arguments, item.call_id)
    plain[-1].setdefault("tool_calls", []).append(made)


def _text(content: str | list[Part] | None, field: str, shown: bool = False) -> str:
    """Content as one text. An image raises BadField, but where a tool has shown it, its place is told.

    A tool's output comes again with every later turn, so that refusing it would end the conversation for good.
    """
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type in _TEXTS and part.text is not None:
            texts.append(part.text)
        elif part.type == "refusal" and part.refusal is not None:
            texts.append(part.refusal)
        elif part.type == "encrypted_content" and part.encrypted_content is not None:
            texts.append(part.encrypted_content)  # a call's argument come back: what this model wrote is not encrypted
        elif shown and part.type == "input_image":
            texts.append("(an image, which this model cannot see)")
        else:
            raise BadField(f"content of type {part.type!r} is not supported: text only", f"{field}[{index}]")
    return "\n".join(texts)
