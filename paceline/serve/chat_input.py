"""What a body of the chat API asks for: its messages as templates take them, its tools as functions the model can call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from msgspec import Struct

from paceline.errors import BadField, RequestError
from paceline.models.tokenizer import Tokenizer
from paceline.serve import custom_tools, morph
from paceline.serve.constrain import Calls, openai_calls
from paceline.serve.conversation import (
    Message,
    call,
    checked_variables,
    fold_systems,
    numbered,
    thinking,
    tool,
    unseen,
)
from paceline.serve.sampling import SamplingBody, checked_limit

_ROLES = {each: each for each in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
_TEXTS = ("text", "input_text", "output_text")
_DROPPED = ("thinking", "redacted_thinking", "reasoning")  # of an assistant: templates have their own place for it


class Part(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class CustomCall(Struct):
    name: str
    input: str = ""


class ToolCall(Struct):
    function: FunctionCall | None = None
    custom: CustomCall | None = None
    id: str = ""


class ChatMessage(Struct):
    """`function_call` and the role `function`, with `name`, are those of before there were tools.

    `prefix` (DeepSeek's and Mistral's) asks for the last message to be continued.
    """

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str = ""
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: FunctionCall | None = None
    name: str | None = None
    prefix: bool | None = None


class Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Custom(Struct):
    name: str
    description: str | None = None
    format: custom_tools.InputFormat | None = None


class Tool(Struct):
    function: Function | None = None
    custom: Custom | None = None
    type: str = "function"


class Prediction(Struct):
    content: str | list[Part]
    type: str = "content"


class Conversation(Protocol):
    """The fields of a body of which, besides its messages, a prompt is made. (A struct has one base with fields.)"""

    tools: list[Tool] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None
    documents: list[dict[str, Any]] | None
    reasoning_effort: str | None


class ChatBody(SamplingBody, kw_only=True):
    most_choices: ClassVar[int] = 8

    messages: list[ChatMessage]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Function] | None = None
    function_call: str | dict[str, Any] | None = None
    prediction: Prediction | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None
    paceline: morph.Options | None = None

    @property
    def limit(self) -> int | None:
        if self.max_completion_tokens is not None:
            return checked_limit(self.max_completion_tokens, "max_completion_tokens")
        return checked_limit(self.max_tokens, "max_tokens")

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise BadField("top_logprobs needs logprobs to be true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True)
class Toolbox:
    """The tools of a body: as the template shows them, and what of them may be called.

    `custom` are the names of those that take a text. With `legacy` the body has `functions`, and so has its reply.
    """

    shown: list[Message]
    calls: Calls
    custom: frozenset[str] = frozenset()
    legacy: bool = False


def toolbox(body: ChatBody) -> Toolbox:
    """Raises BadField for a tool or a choice there is not."""
    if body.functions is None:
        if body.function_call not in (None, "auto", "none"):
            raise BadField("function_call needs functions", "function_call")
        return _toolbox(body.tools or [], body.tool_choice, body.parallel_tool_calls)
    if body.tools is not None:
        raise BadField("functions and tools cannot be used together", "functions")
    choice = body.function_call
    names = [each.name for each in body.functions]
    if isinstance(choice, dict):
        if choice.get("name") not in names:
            raise BadField(f"function_call names {choice.get('name')!r}, none of the functions", "function_call")
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "auto", "none"):
        raise BadField("function_call can be auto, none, or name a function", "function_call")
    box = _toolbox([Tool(each) for each in body.functions], choice, False)
    return Toolbox(box.shown, box.calls, legacy=True)


def _toolbox(tools: list[Tool], choice: str | dict[str, Any] | None, parallel: bool | None) -> Toolbox:
    shown, schemas = _described(tools)
    strict = [each.function.name for each in tools if each.function is not None and each.function.strict]
    custom = {each.custom.name: each.custom.format for each in tools if each.custom is not None}
    strict += [name for name, form in custom.items() if custom_tools.is_held(form)]
    calls = openai_calls(choice, 1 if parallel is False else None, schemas, strict)
    return Toolbox(shown if calls.schemas else [], calls, frozenset(custom))


def _described(tools: Sequence[Tool]) -> tuple[list[Message], dict[str, Any]]:
    """The tools as the template shows them, and the schemas of their parameters by name."""
    shown: list[Message] = []
    schemas: dict[str, Any] = {}
    for index, each in enumerate(tools):
        if each.type == "custom" and each.custom is not None:
            words = custom_tools.description(each.custom.description, each.custom.format)
            shown.append(tool(each.custom.name, words, custom_tools.PARAMETERS))
            schemas[each.custom.name] = custom_tools.parameters(each.custom.format, f"tools[{index}]")
        elif each.type == "function" and each.function is not None:
            own = each.function
            shown.append(tool(own.name, own.description or "", own.parameters or {}))
            schemas[own.name] = own.parameters
        else:
            raise BadField("a tool has the type function or custom, and a field of that name", f"tools[{index}]")
    return shown, schemas


def encode(
    tokenizer: Tokenizer, messages: list[ChatMessage], conversation: Conversation, tools: list[Message]
) -> list[int]:
    """The prompt's tokens. Those of a conversation's next turn begin with them."""
    variables = _variables(conversation)
    plain = template_messages(messages)
    opens, goes_on = conversation.add_generation_prompt is not False, continues(messages, conversation)
    if goes_on and not (plain[-1]["content"] or plain[-1].get("reasoning_content")):
        del plain[-1]  # its beginning is what a new turn begins with
        opens, goes_on = True, False
    try:
        return tokenizer.encode_chat(plain, tools or None, opens, variables, continue_final=goes_on)
    except RequestError as error:
        if not goes_on:
            raise
        raise BadField(f"{error} (add_generation_prompt: true opens a new turn)", "messages") from error


def _variables(conversation: Conversation) -> dict[str, Any]:
    """What the chat template is told besides messages and tools. Raises BadField for what it cannot be."""
    effort = conversation.reasoning_effort
    asked = {} if effort is None else {**thinking(effort != "none"), "reasoning_effort": effort}
    given = {} if conversation.documents is None else {"documents": conversation.documents}
    return asked | given | checked_variables(conversation.chat_template_kwargs)


def encode_tokenize(tokenizer: Tokenizer, messages: list[ChatMessage], conversation: Conversation) -> list[int]:
    """As `encode`, of all the tools that the conversation has."""
    return encode(tokenizer, messages, conversation, _described(conversation.tools or ())[0])


def begun(messages: list[ChatMessage], conversation: Conversation) -> str:
    """The text that the reply goes on with, empty where it opens a new turn."""
    return _read(messages[-1], "messages", False) if continues(messages, conversation) else ""


def continues(messages: list[ChatMessage], conversation: Conversation) -> bool:
    """Whether the reply goes on with the last message: where that is an assistant's, unless a new turn is asked for.

    Raises BadField where it is asked for and cannot be.
    """
    last = messages[-1]
    field = "continue_final_message" if conversation.continue_final_message else f"messages[{len(messages) - 1}].prefix"
    asked = bool(conversation.continue_final_message or last.prefix)
    able = last.role == "assistant" and not last.tool_calls and not last.function_call
    if asked and conversation.add_generation_prompt:
        raise BadField("the last message is either continued or closed: not with add_generation_prompt", field)
    if asked and not able:
        raise BadField("only a last message of role assistant, without calls, can be continued", field)
    if conversation.continue_final_message is False or conversation.add_generation_prompt:
        return asked
    return able


def template_messages(messages: list[ChatMessage]) -> list[Message]:
    """As chat templates take them. Raises BadField for a role there is not, and for a new message that says nothing."""
    plain: list[Message] = []
    for index, message in enumerate(messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise BadField(f"there is no role {message.role!r}", f"messages[{index}].role")
        text = _read(message, f"messages[{index}].content", index == len(messages) - 1)
        one: Message = {"role": role, "content": text}
        if role == "assistant":
            one |= _said(message, f"messages[{index}]")
        if role == "tool":
            one["tool_call_id"] = _legacy_id(message.name) if message.role == "function" else message.tool_call_id
        plain.append(one)
    return numbered(fold_systems(plain))


def _said(message: ChatMessage, field: str) -> Message:
    """What an assistant's message has besides its text."""
    calls = []
    for index, each in enumerate(message.tool_calls or ()):
        if each.custom is not None:
            calls.append(call(each.custom.name, {"input": each.custom.input}, each.id))
        elif each.function is not None:
            calls.append(call(each.function.name, each.function.arguments, each.id))
        else:
            raise BadField("a tool call has a function, or is custom", f"{field}.tool_calls[{index}]")
    if made := message.function_call:
        calls.append(call(made.name, made.arguments, _legacy_id(made.name)))
    one: Message = {"tool_calls": calls} if calls else {}
    if message.reasoning_content:
        one["reasoning_content"] = message.reasoning_content  # templates that know none ignore it
    return one


def _legacy_id(name: str | None) -> str:
    """What joins a function's call and its result, which have its name alone."""
    return f"function {name}"


def _read(message: ChatMessage, field: str, new: bool) -> str:
    """A message's text. What the model cannot take becomes a few words; BadField where a new message is nothing else."""
    content = message.content
    if not isinstance(content, list):
        return content or message.refusal or ""
    texts = []
    seen = False
    for index, part in enumerate(content):
        if part.type in _TEXTS or part.type == "refusal":
            text = part.refusal if part.type == "refusal" else part.text
            if text is None:
                raise BadField(f"a part of type {part.type} needs a text", f"{field}[{index}]")
            seen |= bool(text)
            texts.append(text)
        elif message.role != "assistant" or part.type not in _DROPPED:
            texts.append(unseen(part.type))
    if texts and not seen and new and message.role == "user":
        raise BadField(f"this model takes text only: {texts[0].strip('()')}", f"{field}[0]")
    return "\n".join(texts)


def text_of(content: str | list[Part] | None, field: str, separator: str = "\n") -> str:
    """Content as one text. Raises BadField for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise BadField(f"content of type {part.type!r} is not supported: text only", f"{field}[{index}]")
    return separator.join(part.text or "" for part in content)
