"""Messages as chat templates take them, of whichever API they came by. Turn by turn the same beginning stays the same."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


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
    joins = False
    for message in messages[leading:]:
        late = message["role"] == "system"
        if late:
            message = {"role": "user", "content": f"<system-reminder>\n{message['content']}\n</system-reminder>"}
        last = folded[-1] if folded else None
        if last and last["role"] == message["role"] == "user" and (late or joins):
            folded[-1] = {"role": "user", "content": f"{last['content']}\n\n{message['content']}"}
        else:
            folded.append(message)
        joins = late
    return folded


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
