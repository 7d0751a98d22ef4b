"""Reads a body of the Responses API: its items as a prompt, its tools as functions for the model."""

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
from paceline.serve.constrain import AllowedCalls, ResponseFormat, Schema, openai_calls
from paceline.serve.conversation import TemplateMessage, reasoning_variables, tool_definition
from paceline.serve.responses_items import converted, template_messages
from paceline.serve.sampling import SamplingBody, checked_limit

LOGPROBS = "message.output_text.logprobs"
_MOST_LOGPROBS = 20  # OpenAI's limit
_NO_CONVERSATIONS = "send the conversation as input, or previous_response_id"
_CHAT_FIELDS = {
    "functions": "tools",
    "function_call": "tool_choice",
}  # deprecated chat fields and their Responses fields


class Format(Struct):
    """The format of the output's text."""

    type: str
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def shown(self) -> dict[str, Any]:
        """The format as the response repeats it."""
        if self.type == "json_schema":
            more = {"description": self.description, "schema": self.schema, "strict": bool(self.strict)}
            return {"type": self.type, "name": self.name or "response", **more}
        return {"type": self.type, "schema": self.schema} if self.schema else {"type": self.type}


class Tool(Struct):
    """A tool of any type, with the fields of all supported types."""

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
    """A body of POST /v1/responses. `input` and `tools` are kept in the client's form: the store and the reply repeat them."""

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
        """The limit of output tokens, from `max_output_tokens` or the chat API's names for it."""
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
    def max_calls(self) -> int | None:
        """The limit of calls in an output; None for no limit."""
        most = checked_limit(self.max_tool_calls, "max_tool_calls")
        return 1 if self.parallel_tool_calls is False else most

    @property
    def num_logprobs(self) -> int | None:
        """The number of alternatives to report with each token; None if log-probabilities are not requested."""
        if not 0 <= (self.top_logprobs or 0) <= _MOST_LOGPROBS:
            raise BadField(f"top_logprobs must be between 0 and {_MOST_LOGPROBS}", "top_logprobs")
        if self.top_logprobs or self.logprobs or LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return None

    @property
    def formats(self) -> dict[str, ResponseFormat | None]:
        """The formats that constrain the text, by field name."""
        form, requested = self.text.format if self.text is not None else None, None
        if form is not None and form.type == "json_schema":
            schema = None if form.schema is None else Schema("", form.schema, form.strict)
            requested = ResponseFormat(form.type, schema)
        elif form is not None:
            requested = ResponseFormat(form.type, schema=form.schema)
        return {"response_format": self.response_format, "text.format": requested}

    @property
    def items(self) -> list[dict[str, Any]]:
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}] if self.input else []
        return self.input or []

    def check(self) -> None:
        """Raises BadField for fields and values that are not supported."""
        if self.conversation is not None:
            raise BadField(f"conversation is not supported: {_NO_CONVERSATIONS}", "conversation")
        if self.prompt is not None:
            raise BadField("stored prompts are not supported: send instructions and input", "prompt")
        if self.background:
            raise BadField("background is not supported: a response is generated while its request waits", "background")
        if self.truncation not in (None, "auto", "disabled"):
            raise BadField("truncation must be auto or disabled", "truncation")
        for name, place in _CHAT_FIELDS.items():
            if getattr(self, name):
                raise BadField(f"{name} is a field of the chat API; the Responses API has {place}", name)
        if not self.input:
            raise BadField("input must not be empty", "input")


@dataclass(frozen=True)
class ClientTool:
    """A tool as its client names it. A custom tool takes text as its input instead of arguments."""

    name: str
    namespace: str = ""
    custom: bool = False


class ResponsesTools:
    """The tools of a body, and the mapping between the client's and the model's names of them.

    The model sees functions only. A tool in a namespace is named `namespace__name`; a custom tool is a function with a
    string parameter `input`. Tools that a server would run itself (web search and the like) are left out. If a tool is
    given twice, the later definition replaces the first, at the first one's position.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.functions: list[TemplateMessage] = []
        self.strict: set[str] = set()
        self._custom_parameters: dict[str, dict[str, Any]] = {}
        self._client_tools: dict[str, ClientTool] = {}
        self._names: dict[ClientTool, str] = {}
        for tool, each in {tool: each for tool, each in _flat(tools)}.items():
            name = _unused(_joined_name(tool), self._client_tools)
            self._client_tools[name] = tool
            self._names[tool] = name
            if tool.custom:
                definition = tool_definition(
                    name, custom_tools.description(each.description, each.format), custom_tools.PARAMETERS
                )
                self._custom_parameters[name] = custom_tools.parameters(each.format)
            else:
                definition = tool_definition(name, each.description or "", each.parameters or {})
            self.functions.append(definition)
            if each.strict or (tool.custom and custom_tools.has_grammar(each.format)):
                self.strict.add(name)

    def client_tool(self, name: str) -> ClientTool:
        """The client's tool of a model's name. An unknown name is passed on, for the client to refuse."""
        return self._client_tools.get(name) or ClientTool(name)

    def calls(self, body: ResponsesBody) -> AllowedCalls:
        """The allowed calls, by the model's names."""
        schemas = {
            each["function"]["name"]: each["function"]["parameters"] for each in self.functions
        } | self._custom_parameters
        choice = body.tool_choice
        if isinstance(choice, dict) and "name" in choice:
            custom = choice.get("type") == "custom"
            named = ClientTool(str(choice["name"]), str(choice.get("namespace") or ""), custom)
            choice = {**choice, "name": self.model_name(named)}
        return openai_calls(choice, body.max_calls, schemas, self.strict)

    def model_name(self, tool: ClientTool) -> str:
        """The model's name of a tool, also of one from an earlier turn that is not defined any more."""
        return self._names.get(tool) or _joined_name(tool)


def _flat(tools: Iterable[Tool], namespace: str = "") -> Iterator[tuple[ClientTool, Tool]]:
    for each in tools:
        if each.type == "namespace" and not namespace:
            yield from _flat(each.tools or (), each.name)
        elif each.type in ("function", "custom"):
            if not each.name:
                raise BadField(f"a tool of type {each.type} needs a name", "tools")
            yield ClientTool(each.name, namespace, each.type == "custom"), each


def _joined_name(tool: ClientTool) -> str:
    return f"{tool.namespace}__{tool.name}" if tool.namespace else tool.name


def _unused(name: str, used: Iterable[str]) -> str:
    """The name, with a number appended if it is already in `used`."""
    number, unused = 1, name
    while unused in used:
        number += 1
        unused = f"{name}_{number}"
    return unused


def responses_tools(body: ResponsesBody, earlier: Sequence[dict[str, Any]] = ()) -> ResponsesTools:
    """The tools of the body and of its `additional_tools` items. Raises BadField if `tools` is not a list of tools."""
    try:
        tools = msgspec.json.decode(body.tools, type=list[Tool])
        shown = [_complete_function(each) for each in msgspec.json.decode(body.tools)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = re.search(r" - at `\$(.*)`$", str(error))
        raise BadField(f"tools: {error}", f"tools{found[1] if found else ''}") from error
    body.tools = msgspec.Raw(msgspec.json.encode(shown))
    for index, item in enumerate([*earlier, *body.items], -len(earlier)):
        if item.get("type") == "additional_tools":
            tools += converted(item.get("tools") or [], list[Tool], f"input[{index}].tools")
    return ResponsesTools(tools)


def _complete_function(given: dict[str, Any]) -> dict[str, Any]:
    """A tool as the response repeats it: a function with all its fields."""
    if given["type"] != "function":
        return given
    return {"description": None, "parameters": None, "strict": None, **given}


def encode(
    tokenizer: Tokenizer,
    body: ResponsesBody,
    tools: ResponsesTools,
    earlier: Sequence[dict[str, Any]] = (),
    capacity: int | None = None,
) -> list[int]:
    """The prompt's tokens. They are a prefix of the prompt of the conversation's next turn, if that has the same tools.

    `earlier` are the items of stored turns, before the body's own. If truncation is `auto` and the prompt exceeds
    `capacity`, the oldest turns are left out until the rest fits with room for an output. Raises ContextExceeded if the
    last turn alone does not fit.
    """
    effort = body.reasoning.effort if body.reasoning is not None else None
    requested = {} if effort is None else {**reasoning_variables(effort != "none"), "reasoning_effort": effort}
    items = [*earlier, *body.items]
    messages = template_messages(
        items,
        lambda name, namespace, custom: tools.model_name(ClientTool(name, namespace, custom)),
        body.instructions or "",
        len(earlier),
    )
    definitions = (body.may_call and tools.functions) or None

    def written(messages: Sequence[TemplateMessage]) -> list[int]:
        return tokenizer.encode_chat(messages, definitions, variables=requested)

    prompt = written(messages)
    if body.truncation != "auto" or capacity is None:
        return prompt
    if len(prompt) < capacity:
        return prompt
    room = min(body.limit or capacity // 8, capacity // 2)
    head = 1 if messages[0]["role"] == "system" else 0
    starts = [index for index, each in enumerate(messages) if index > head and each["role"] == "user"]
    low, high = 0, len(starts)  # binary search for the first start from which the rest fits
    while low < high:
        middle = (low + high) // 2
        prompt = written([*messages[:head], *messages[starts[middle] :]])
        low, high = (low, middle) if len(prompt) + room <= capacity else (middle + 1, high)
    if low == len(starts):
        raise ContextExceeded(
            f"prompt is too long: its last turn does not fit together with {room} tokens of output; "
            f"this model's maximum context length is {capacity} tokens"
        )
    return written([*messages[:head], *messages[starts[low] :]])
