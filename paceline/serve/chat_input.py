"""Reads a body of the chat API: its messages in the chat template's format, its tools as functions for the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from msgspec import Struct

from paceline.errors import BadField, RequestError
from paceline.models.tokenizer import Tokenizer
from paceline.serve import custom_tools, morph
from paceline.serve.constrain import AllowedCalls, openai_calls
from paceline.serve.conversation import (
    TemplateMessage,
    checked_template_variables,
    fold_system_messages,
    number_tool_calls,
    placeholder,
    reasoning_variables,
    tool_call,
    tool_definition,
)
from paceline.serve.sampling import SamplingBody, checked_limit

_ROLES = {each: each for each in ("system", "user", "assistant", "tool")} | {"developer": "system", "function": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text")
# left out of assistant messages: templates have a field of its own for reasoning
_REASONING_PARTS = ("thinking", "redacted_thinking", "reasoning")


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
    """A message. `function_call`, and the role `function` with `name`, are OpenAI's deprecated form of tool calls.

    `prefix` (DeepSeek's and Mistral's) asks to continue the last message.
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
    """The body fields besides the messages that go into a prompt. A Protocol, as a Struct can have one base with fields."""

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
class ChatTools:
    """The tools of a body: their definitions for the chat template, and the calls that are allowed.

    `custom` are the names of the custom tools, which take text. With `legacy` the body has `functions` instead of `tools`,
    and the reply has `function_call`.
    """

    definitions: list[TemplateMessage]
    calls: AllowedCalls
    custom: frozenset[str] = frozenset()
    legacy: bool = False


def chat_tools(body: ChatBody) -> ChatTools:
    """The tools of the body. Raises BadField for an unknown tool type, and for a choice of a tool that is not defined."""
    if body.functions is None:
        if body.function_call not in (None, "auto", "none"):
            raise BadField("function_call needs functions", "function_call")
        return _chat_tools(body.tools or [], body.tool_choice, body.parallel_tool_calls)
    if body.tools is not None:
        raise BadField("functions and tools cannot be used together", "functions")
    choice = body.function_call
    names = [each.name for each in body.functions]
    if isinstance(choice, dict):
        if choice.get("name") not in names:
            raise BadField(
                f"function_call names {choice.get('name')!r}, which is none of the functions", "function_call"
            )
        choice = {"type": "function", "function": choice}
    elif choice not in (None, "auto", "none"):
        raise BadField("function_call must be auto, none, or name a function", "function_call")
    box = _chat_tools([Tool(each) for each in body.functions], choice, False)
    return ChatTools(box.definitions, box.calls, legacy=True)


def _chat_tools(tools: list[Tool], choice: str | dict[str, Any] | None, parallel: bool | None) -> ChatTools:
    definitions, schemas = _definitions_and_schemas(tools)
    strict = [each.function.name for each in tools if each.function is not None and each.function.strict]
    custom = {each.custom.name: each.custom.format for each in tools if each.custom is not None}
    strict += [name for name, form in custom.items() if custom_tools.has_grammar(form)]
    calls = openai_calls(choice, 1 if parallel is False else None, schemas, strict)
    return ChatTools(definitions if calls.schemas else [], calls, frozenset(custom))


def _definitions_and_schemas(tools: Sequence[Tool]) -> tuple[list[TemplateMessage], dict[str, Any]]:
    """The tools' definitions for the chat template, and the schemas of their parameters by tool name."""
    definitions: list[TemplateMessage] = []
    schemas: dict[str, Any] = {}
    for index, each in enumerate(tools):
        if each.type == "custom" and each.custom is not None:
            words = custom_tools.description(each.custom.description, each.custom.format)
            definitions.append(tool_definition(each.custom.name, words, custom_tools.PARAMETERS))
            schemas[each.custom.name] = custom_tools.parameters(each.custom.format, f"tools[{index}]")
        elif each.type == "function" and each.function is not None:
            own = each.function
            definitions.append(tool_definition(own.name, own.description or "", own.parameters or {}))
            schemas[own.name] = own.parameters
        else:
            raise BadField("a tool needs the type function or custom, and a field of that name", f"tools[{index}]")
    return definitions, schemas


def encode(
    tokenizer: Tokenizer, messages: list[ChatMessage], conversation: Conversation, tools: list[TemplateMessage]
) -> list[int]:
    """The prompt's tokens. They are a prefix of the prompt of the conversation's next turn."""
    variables = _variables(conversation)
    plain = template_messages(messages)
    opens_turn, continued = conversation.add_generation_prompt is not False, is_continued(messages, conversation)
    if continued and not (plain[-1]["content"] or plain[-1].get("reasoning_content")):
        del plain[-1]  # continuing an empty message is opening a new turn
        opens_turn, continued = True, False
    try:
        return tokenizer.encode_chat(plain, tools or None, opens_turn, variables, continue_final=continued)
    except RequestError as error:
        if not continued:
            raise
        raise BadField(f"{error} (add_generation_prompt: true opens a new turn)", "messages") from error


def _variables(conversation: Conversation) -> dict[str, Any]:
    """The chat template's variables besides messages and tools. Raises BadField for those that a client cannot set."""
    effort = conversation.reasoning_effort
    requested = {} if effort is None else {**reasoning_variables(effort != "none"), "reasoning_effort": effort}
    given = {} if conversation.documents is None else {"documents": conversation.documents}
    return requested | given | checked_template_variables(conversation.chat_template_kwargs)


def encode_tokenize(tokenizer: Tokenizer, messages: list[ChatMessage], conversation: Conversation) -> list[int]:
    """As `encode`, with all tools of the conversation."""
    return encode(tokenizer, messages, conversation, _definitions_and_schemas(conversation.tools or ())[0])


def continued_text(messages: list[ChatMessage], conversation: Conversation) -> str:
    """The text of the message that the reply continues; empty if the reply opens a new turn."""
    return _message_text(messages[-1], "messages", False) if is_continued(messages, conversation) else ""


def is_continued(messages: list[ChatMessage], conversation: Conversation) -> bool:
    """Whether the reply continues the last message: if that is an assistant's, unless the body requests a new turn.

    Raises BadField if the body requests continuation of a message that cannot be continued.
    """
    last = messages[-1]
    field = "continue_final_message" if conversation.continue_final_message else f"messages[{len(messages) - 1}].prefix"
    requested = bool(conversation.continue_final_message or last.prefix)
    able = last.role == "assistant" and not last.tool_calls and not last.function_call
    if requested and conversation.add_generation_prompt:
        raise BadField("the last message cannot be continued together with add_generation_prompt", field)
    if requested and not able:
        raise BadField("only a last message of role assistant, without calls, can be continued", field)
    if conversation.continue_final_message is False or conversation.add_generation_prompt:
        return requested
    return able


def template_messages(messages: list[ChatMessage]) -> list[TemplateMessage]:
    """The messages in the chat template's format.

    Raises BadField for an unknown role, and for a new message without text that the model can read.
    """
    plain: list[TemplateMessage] = []
    for index, message in enumerate(messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise BadField(f"the role {message.role!r} is not supported", f"messages[{index}].role")
        text = _message_text(message, f"messages[{index}].content", index == len(messages) - 1)
        one: TemplateMessage = {"role": role, "content": text}
        if role == "assistant":
            one |= _assistant_fields(message, f"messages[{index}]")
        if role == "tool":
            one["tool_call_id"] = _legacy_id(message.name) if message.role == "function" else message.tool_call_id
        plain.append(one)
    return number_tool_calls(fold_system_messages(plain))


def _assistant_fields(message: ChatMessage, field: str) -> TemplateMessage:
    """The fields of an assistant's message besides its text: calls and reasoning."""
    calls = []
    for index, each in enumerate(message.tool_calls or ()):
        if each.custom is not None:
            calls.append(tool_call(each.custom.name, {"input": each.custom.input}, each.id))
        elif each.function is not None:
            calls.append(tool_call(each.function.name, each.function.arguments, each.id))
        else:
            raise BadField("a tool call needs the field function or custom", f"{field}.tool_calls[{index}]")
    if made := message.function_call:
        calls.append(tool_call(made.name, made.arguments, _legacy_id(made.name)))
    one: TemplateMessage = {"tool_calls": calls} if calls else {}
    if message.reasoning_content:
        one["reasoning_content"] = message.reasoning_content  # ignored by templates without reasoning
    return one


def _legacy_id(name: str | None) -> str:
    """A call id made from the function's name: deprecated function calls and their results have no id."""
    return f"function {name}"


def _message_text(message: ChatMessage, field: str, new: bool) -> str:
    """A message's text. Content that the model cannot read becomes a placeholder.

    Raises BadField if a `new` user message has nothing else.
    """
    content = message.content
    if not isinstance(content, list):
        return content or message.refusal or ""
    texts = []
    seen = False
    for index, part in enumerate(content):
        if part.type in _TEXT_PARTS or part.type == "refusal":
            text = part.refusal if part.type == "refusal" else part.text
            if text is None:
                raise BadField(f"a part of type {part.type} needs text", f"{field}[{index}]")
            seen |= bool(text)
            texts.append(text)
        elif message.role != "assistant" or part.type not in _REASONING_PARTS:
            texts.append(placeholder(part.type))
    if texts and not seen and new and message.role == "user":
        raise BadField(f"this model reads text only: {texts[0].strip('()')}", f"{field}[0]")
    return "\n".join(texts)


def text_of(content: str | list[Part] | None, field: str, separator: str = "\n") -> str:
    """Content as one text. Raises BadField for a part that is not text."""
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise BadField(f"content of type {part.type!r} is not supported: text only", f"{field}[{index}]")
    return separator.join(part.text or "" for part in content)
