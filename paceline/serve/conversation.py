"""Messages in the chat template's format, the same for all APIs.

The messages of one turn become the same beginning of the prompt in every later turn, so that the prefix cache hits.
"""

from __future__ import annotations

import json
from typing import Any

from paceline.errors import BadField

TemplateMessage = dict[str, Any]
_SWITCHES = ("enable_thinking", "thinking")  # Qwen 3 and GLM; DeepSeek
_SERVER_VARIABLES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "chat_template")


def fold_system_messages(messages: list[TemplateMessage]) -> list[TemplateMessage]:
    """The messages with a system message only at the start, which is the only place where most templates allow one.

    System messages at the start are merged into one. A later one becomes user text at its position, merged with adjacent
    user messages. Messages that follow never change the ones before.
    """
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    head = "\n\n".join(each["content"] for each in messages[:leading] if each["content"])
    folded: list[TemplateMessage] = [{"role": "system", "content": head}] if head else []
    texts: list[str] = []  # the texts of the last message of `folded`, if that is a user message
    joins = False
    for message in messages[leading:]:
        late = message["role"] == "system"
        if late:
            message = {"role": "user", "content": f"<system-reminder>\n{message['content']}\n</system-reminder>"}
        if texts and message["role"] == "user" and (late or joins):
            texts.append(message["content"])
        else:
            _join_texts(folded, texts)
            texts = [message["content"]] if message["role"] == "user" else []
            folded.append(message)
        joins = late
    _join_texts(folded, texts)
    return folded


def _join_texts(folded: list[TemplateMessage], texts: list[str]) -> None:
    """Joins the collected texts of the last message, all at once: there may be very many, and joining one by one is O(n²)."""
    if len(texts) > 1:
        folded[-1] = {"role": "user", "content": "\n\n".join(texts)}


def number_tool_calls(messages: list[TemplateMessage]) -> list[TemplateMessage]:
    """The messages with new ids for calls and their results: `functions.NAME:NUMBER`, for example `functions.read:0`.

    Kimi K2's template writes a call's name only as part of this id; other templates write no ids.
    """
    names: dict[str, str] = {}
    count = 0
    result: list[TemplateMessage] = []
    for message in messages:
        calls = []
        for each in message.get("tool_calls", ()):
            names[each["id"]] = f"functions.{each['function']['name']}:{count}"
            calls.append({**each, "id": names[each["id"]]})
            count += 1
        if calls:
            message = {**message, "tool_calls": calls}
        elif "tool_call_id" in message:
            message = {**message, "tool_call_id": names.get(message["tool_call_id"], message["tool_call_id"])}
        result.append(message)
    return result


def tool_call(name: str, arguments: Any, identity: str) -> TemplateMessage:
    """An earlier tool call in the template's format. Arguments that are the text of a JSON object become that object."""
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments or "{}", strict=False)
        except (ValueError, RecursionError):
            value = None
        arguments = value if isinstance(value, dict) else arguments
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_definition(name: str, description: str, parameters: dict[str, Any]) -> TemplateMessage:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def reasoning_variables(wanted: bool | None) -> dict[str, Any]:
    """The template variables that switch reasoning on or off, under every name in use; none if `wanted` is None."""
    return {} if wanted is None else dict.fromkeys(_SWITCHES, wanted)


def checked_template_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """A client's template variables. Raises BadField for one that the server sets, and for a switch that is not a boolean."""
    for name, value in (given or {}).items():
        if name in _SERVER_VARIABLES:
            raise BadField(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
        if name in _SWITCHES and not isinstance(value, bool):  # a template treats "false" as true
            raise BadField(f"chat_template_kwargs.{name} must be true or false", "chat_template_kwargs")
    return given or {}


_PLACEHOLDERS = {
    "image": "an image, which this model cannot see",
    "audio": "audio, which this model cannot hear",
    "video": "a video, which this model cannot see",
    "file": "a file, which this model cannot read",
    "document": "a document, which this model cannot read",
}


def placeholder(kind: str) -> str:
    """The text that replaces content of a type that the model cannot read, such as `image_url`.

    It is not refused: the content is sent again in every later turn, so that a refusal would end the conversation.
    """
    words = next((words for name, words in _PLACEHOLDERS.items() if name in kind), None)
    return f"({words or f'content of type {kind}, which this model cannot read'})"
