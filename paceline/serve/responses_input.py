"""What a body of the Responses API asks for: its items as a prompt, its tools as functions the model can call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from paceline.errors import BadField, ContextExceeded
from paceline.models.tokenizer import Tokenizer
from paceline.serve import custom_tools
from paceline.serve.constrain import Calls, ResponseFormat, Schema, openai_calls
from paceline.serve.conversation import Message, thinking, tool
from paceline.serve.responses_items import converted, template_messages
from paceline.serve.sampling import SamplingBody, checked_limit

LOGPROBS = "message.output_text.logprobs"
_MOST_LOGPROBS = 20
_NO_CONVERSATIONS = "send the conversation as input, or previous_response_id"
_ELSEWHERE = {"functions": "tools", "function_call": "tool_choice"}  # chats' older fields, by what responses have


class Format(Struct):
    """The form of the output's text."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """As a response repeats it."""
        if self.type == "json_schema":
            more = {"description": self.description, "schema": self.schema, "strict": bool(self.strict)}
            return {"type": self.type, "name": self.name or "response", **more}
        return {"type": self.type, "schema": self.schema} if self.schema else {"type": self.type}


class Tool(Struct):
    """A tool of any type: the fields of all those that are read."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: custom_tools.InputFormat | None = None
    tools: list[Tool] | None = None


class TextOptions(Struct):
    format: Format | None = None
    verbosity: str | None = None


class Reasoning(Struct):
    effort: str | None = None
    summary: str | None = None


Items = Annotated[list[dict[str, Any]], Meta(description="items of the Responses API, of any type")]


class ResponsesBody(SamplingBody, kw_only=True):
    """`input` and `tools` are kept as they were written, for the store and the reply repeat them."""

    input: str | Items | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    tools: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"[]"))
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    functions: Any = None
    function_call: Any = None

    def __post_init__(self) -> None:
        if bytes(self.tools) == b"null":
            self.tools = msgspec.Raw(b"[]")

    @property
    def limit(self) -> int | None:
        """The most tokens to write, also by chats' names for that."""
        limits = [
            checked_limit(getattr(self, name), name)
            for name in ("max_output_tokens", "max_completion_tokens", "max_tokens")
        ]
        return next((each for each in limits if each is not None), None)

    @property
    def may_call(self) -> bool:
        """Whether the model may call tools."""
        return self.tool_choice != "none"

    @property
    def most_calls(self) -> int | None:
        """How many calls an output may have; None for any number."""
        most = checked_limit(self.max_tool_calls, "max_tool_calls")
        return 1 if self.parallel_tool_calls is False else most

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives each token of the text is told with; None where log-probabilities are not asked for."""
        if not 0 <= (self.top_logprobs or 0) <= _MOST_LOGPROBS:
            raise BadField(f"top_logprobs must be between 0 and {_MOST_LOGPROBS}", "top_logprobs")
        if self.top_logprobs or self.logprobs or LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return None

    @property
    def formats(self) -> dict[str, ResponseFormat | None]:
        """What holds the text, by its field."""
        form, asked = self.text.format if self.text is not None else None, None
        if form is not None and form.type == "json_schema":
            schema = None if form.schema is None else Schema("", form.schema, form.strict)
            asked = ResponseFormat(form.type, schema)
        elif form is not None:
            asked = ResponseFormat(form.type, schema=form.schema)
        return {"response_format": self.response_format, "text.format": asked}

    @property
    def items(self) -> list[dict[str, Any]]:
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}] if self.input else []
        return self.input or []

    def check(self) -> None:
        """Raises BadField for what cannot be done."""
        if self.conversation is not None:
            raise BadField(f"conversation is not supported: {_NO_CONVERSATIONS}", "conversation")
        if self.prompt is not None:
            raise BadField("stored prompts are not supported: send instructions and input", "prompt")
        if self.background:
            raise BadField("background is not supported: a response is written while its request waits", "background")
        if self.truncation not in (None, "auto", "disabled"):
            raise BadField("truncation can be auto or disabled", "truncation")
        for name, place in _ELSEWHERE.items():
            if getattr(self, name):
                raise BadField(f"{name} is a field of chats; responses have {place}", name)
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
        self._held: dict[str, dict[str, Any]] = {}
        self._called: dict[str, Called] = {}
        self._names: dict[Called, str] = {}
        for called, each in {called: each for called, each in _flat(tools)}.items():
            name = _unused(_joined_name(called), self._called)
            self._called[name] = called
            self._names[called] = name
            if called.custom:
                told = tool(name, custom_tools.description(each.description, each.format), custom_tools.PARAMETERS)
                self._held[name] = custom_tools.parameters(each.format)
            else:
                told = tool(name, each.description or "", each.parameters or {})
            self.functions.append(told)
            if each.strict or (called.custom and custom_tools.is_held(each.format)):
                self.strict.add(name)

    def called(self, name: str) -> Called:
        """What the model means by a name. One that is unknown is left to the client to refuse."""
        return self._called.get(name) or Called(name)

    def calls(self, body: ResponsesBody) -> Calls:
        """What the model may call, by the model's names."""
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in self.functions} | self._held
        choice = body.tool_choice
        if isinstance(choice, dict) and "name" in choice:
            custom = choice.get("type") == "custom"
            named = Called(str(choice["name"]), str(choice.get("namespace") or ""), custom)
            choice = {**choice, "name": self.name(named)}
        return openai_calls(choice, body.most_calls, schemas, self.strict)

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


def toolbox(body: ResponsesBody, earlier: Sequence[dict[str, Any]] = ()) -> Toolbox:
    """The tools of the body and of the `additional_tools` items. Raises BadField for what is no list of tools."""
    try:
        tools = msgspec.json.decode(body.tools, type=list[Tool])
        shown = [_shown(each) for each in msgspec.json.decode(body.tools)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = re.search(r" - at `\$(.*)`$", str(error))
        raise BadField(f"tools: {error}", f"tools{found[1] if found else ''}") from error
    body.tools = msgspec.Raw(msgspec.json.encode(shown))
    for index, item in enumerate([*earlier, *body.items], -len(earlier)):
        if item.get("type") == "additional_tools":
            tools += converted(item.get("tools") or [], list[Tool], f"input[{index}].tools")
    return Toolbox(tools)


def _shown(given: dict[str, Any]) -> dict[str, Any]:
    """A tool as a response repeats it: a function has all its fields."""
    if given["type"] != "function":
        return given
    return {"description": None, "parameters": None, "strict": None, **given}


def encode(
    tokenizer: Tokenizer,
    body: ResponsesBody,
    box: Toolbox,
    earlier: Sequence[dict[str, Any]] = (),
    capacity: int | None = None,
) -> list[int]:
    """The prompt's tokens. Those of a conversation's next turn begin with them, where it has the same tools.

    `earlier` are the items before the body's own. Where truncation is `auto` and the prompt exceeds `capacity`, the oldest
    turns are left out until the rest fits with room for an output; raises ContextExceeded where the last does not.
    """
    effort = body.reasoning.effort if body.reasoning is not None else None
    asked = {} if effort is None else {**thinking(effort != "none"), "reasoning_effort": effort}
    items = [*earlier, *body.items]
    messages = template_messages(
        items,
        lambda name, namespace, custom: box.name(Called(name, namespace, custom)),
        body.instructions or "",
        len(earlier),
    )
    tools = (body.may_call and box.functions) or None

    def written(messages: Sequence[Message]) -> list[int]:
        return tokenizer.encode_chat(messages, tools, variables=asked)

    prompt = written(messages)
    if body.truncation != "auto" or capacity is None:
        return prompt
    if len(prompt) < capacity:
        return prompt
    room = min(body.limit or capacity // 8, capacity // 2)
    head = 1 if messages[0]["role"] == "system" else 0
    starts = [index for index, each in enumerate(messages) if index > head and each["role"] == "user"]
    low, high = 0, len(starts)  # the first start of which the rest fits
    while low < high:
        middle = (low + high) // 2
        prompt = written([*messages[:head], *messages[starts[middle] :]])
        low, high = (low, middle) if len(prompt) + room <= capacity else (middle + 1, high)
    if low == len(starts):
        raise ContextExceeded(
            f"prompt is too long: its last turn has no place beside {room} tokens of output; "
            f"this model's maximum context length is {capacity} tokens"
        )
    return written([*messages[:head], *messages[starts[low] :]])
