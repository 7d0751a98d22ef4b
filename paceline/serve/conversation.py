"""Messages as chat templates take them, of whichever API they came by. Turn by turn the same beginning stays the same."""

from __future__ import annotations

import json
from typing import Any

from paceline.errors import BadField

Message = dict[str, Any]
_SWITCHES = ("enable_thinking", "thinking")  # Qwen 3 and GLM; DeepSeek
_OWN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "chat_template")


def fold_systems(messages: list[Message]) -> list[Message]:
    """The messages with a system message nowhere but at the start, where most templates alone allow one.

    Those at the start become one. A later one becomes user text in its place, joined to user messages beside it, so
    that what comes after never changes what came before.
    """
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    head = "\n\n".join(each["content"] for each in messages[:leading] if each["content"])
    folded: list[Message] = [{"role": "system", "content": head}] if head else []
    texts: list[str] = []  # of the last message of `folded`, where that is a user's
    joins = False
    for message in messages[leading:]:
        late = message["role"] == "system"
        if late:
            message = {"role": "user", "content": f"<system-reminder>\n{message['content']}\n</system-reminder>"}
        if texts and message["role"] == "user" and (late or joins):
            texts.append(message["content"])
        else:
            _settle(folded, texts)
            texts = [message["content"]] if message["role"] == "user" else []
            folded.append(message)
        joins = late
    _settle(folded, texts)
    return folded


def _settle(folded: list[Message], texts: list[str]) -> None:
    """Joins the texts that have come together in the last message: once, for there may be very many."""
    if len(texts) > 1:
        folded[-1] = {"role": "user", "content": "\n\n".join(texts)}


def numbered(messages: list[Message]) -> list[Message]:
    """The messages with calls and their results named by tool and number, `functions.read:0`, whatever ids they came with.

    Kimi K2's template writes nothing else of a call's name; other templates write no ids.
    """
    names: dict[str, str] = {}
    count = 0
    result: list[Message] = []
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


def call(name: str, arguments: Any, identity: str) -> Message:
    """An earlier tool call. Arguments that are a JSON object, as text or not, are given as an object: templates write it."""
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments or "{}", strict=False)
        except (ValueError, RecursionError):
            value = None
        arguments = value if isinstance(value, dict) else arguments
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, description: str, parameters: dict[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def thinking(wanted: bool | None) -> dict[str, Any]:
    """The template variables that turn reasoning on or off, by every name that a template may know; none where unsaid."""
    return {} if wanted is None else dict.fromkeys(_SWITCHES, wanted)


def checked_variables(given: dict[str, Any] | None) -> dict[str, Any]:
    """A client's own template variables. Raises BadField for the server's, and for a switch that is no boolean."""
    for name, value in (given or {}).items():
        if name in _OWN:
            raise BadField(f"chat_template_kwargs cannot set {name!r}", "chat_template_kwargs")
        if name in _SWITCHES and not isinstance(value, bool):  # a template would take "false" for true
            raise BadField(f"chat_template_kwargs.{name} must be true or false", "chat_template_kwargs")
    return given or {}


_UNSEEN = {
    "image": "an image, which this model cannot see",
    "audio": "audio, which this model cannot hear",
    "video": "a video, which this model cannot see",
    "file": "a file, which this model cannot read",
    "document": "a document, which this model cannot read",
}


def unseen(kind: str) -> str:
    """What stands in a conversation for content of a type that the model cannot take, such as `image_url`.

    Refusing it where it comes again with every later turn would end the conversation for good.
    """
    words = next((words for name, words in _UNSEEN.items() if name in kind), None)
    return f"({words or f'content of type {kind}, which this model cannot read'})"
