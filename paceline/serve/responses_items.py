"""Items of the Responses API in the chat template's format. Content that is not text becomes a placeholder.

Such content is not refused: an item is sent again in every later turn, so that a refusal would end the conversation.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from paceline.errors import BadField
from paceline.serve.conversation import TemplateMessage, fold_system_messages, number_tool_calls, tool_call

Converted = TypeVar("Converted")
# (a tool's name, its namespace, whether it is custom) -> the model's name of the tool
ModelName = Callable[[str, str, bool], str]

IMAGE = "(an image, which this model cannot see)"
_PLACEHOLDERS = {
    "input_image": IMAGE,
    "output_image": IMAGE,
    "image": IMAGE,
    "computer_screenshot": IMAGE,
    "input_video": "(a video, which this model cannot see)",
    "input_audio": "(audio, which this model cannot hear)",
    "input_file": "(a file, which this model cannot read)",
}
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_IGNORED = (
    "additional_tools",
    "compaction_trigger",
    "mcp_list_tools",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
)
# calls that a server executed itself, and the field with their result; calls without a result are ignored
_HOSTED = {
    "code_interpreter_call": "outputs",
    "file_search_call": "results",
    "image_generation_call": "result",
    "mcp_call": "output",
}
_COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
_ARGUMENTS = ("arguments", "action", "operation")
_MORE_ARGUMENTS = ("actions", "input", "code", "queries")
_REASONING_ONLY_KEYS = {"role", "reasoning_content"}  # keys of a message that has only reasoning so far
_TEXT_FILE = re.compile(r"data:(?:text/|application/json)[^,]*;base64,(.*)", re.DOTALL)
_COMPACTED = b"paceline:"


class ItemPart(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None
    encrypted_content: str | None = None
    filename: str | None = None
    file_data: str | None = None


class ResponseItem(Struct):
    """An item of any type, with the fields that several types share."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[ItemPart] | None = None
    name: str | None = None
    namespace: str | None = None
    call_id: str | None = None
    encrypted_content: str | None = None

    @property
    def call_name(self) -> str:
        """The id that a call and its output share."""
        return self.call_id or self.id or ""


def kind_of(item: dict[str, Any]) -> Any:
    """An item's type. An item without one is a message, or a reference if it has an id and no role."""
    return item.get("type") or ("item_reference" if item.get("role") is None and item.get("id") else "message")


def converted(value: Any, kind: type[Converted], field: str) -> Converted:
    """A decoded JSON value converted to `kind`. Raises BadField with the path within `field` if it does not match."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found = re.search(r" - at `\$(.*)`$", str(error))
        raise BadField(f"{field}: {error}", f"{field}{found[1] if found else ''}") from error


def template_messages(
    items: Sequence[Any], name: ModelName, instructions: str = "", num_earlier: int = 0
) -> list[TemplateMessage]:
    """Items as messages in the template's format. Calls are merged into the assistant message before them, reasoning into
    the one after it.

    The first `num_earlier` items are from stored turns; errors count the request's own items from 0. Raises BadField for
    a malformed item, an unknown role, and if the last item is a user message without content that the model can read.
    """
    plain: list[TemplateMessage] = [{"role": "system", "content": instructions}] if instructions else []
    for index, raw in enumerate(items):
        field = f"input[{index - num_earlier}]"
        item, kind = converted(raw, ResponseItem, field), kind_of(raw)
        if kind == "message":
            _add_message(plain, item, field, asked=index == len(items) - 1)
        elif kind == "agent_message":  # a message from one of Codex's agents to another
            plain.append({"role": "user", "content": _text(item.content)[0]})
        elif kind == "reasoning":  # other servers' reasoning is encrypted or a summary, and is ignored
            parts = item.content if isinstance(item.content, list) else []
            if reasoning := "".join(part.text or "" for part in parts if part.type in ("reasoning_text", "text")):
                plain.append({"role": "assistant", "reasoning_content": reasoning})
        elif kind in _COMPACTIONS:
            if text := compacted_text(item.encrypted_content or ""):
                plain.append({"role": "user", "content": text})
        elif kind not in _IGNORED:
            _add_tool(plain, item, raw, name, field)
    if len(plain) <= bool(instructions):
        raise BadField("input has nothing that the model can read", "input")
    return number_tool_calls(fold_system_messages([{"content": "", **each} for each in plain]))


def encrypted(text: str) -> str:
    """The `encrypted_content` of a compaction item: not encrypted, but base64 text that `compacted_text` decodes."""
    return base64.b64encode(_COMPACTED + text.encode()).decode()


def compacted_text(content: str) -> str:
    """The text of a compaction item. An item of another server is encrypted and becomes a placeholder."""
    try:
        data = base64.b64decode(content, validate=True)
        text = data.removeprefix(_COMPACTED).decode() if data.startswith(_COMPACTED) else None
    except ValueError:
        text = None
    return "(an earlier part of the conversation, which this model cannot read)" if text is None else text


def _add_message(plain: list[TemplateMessage], item: ResponseItem, field: str, asked: bool) -> None:
    if item.role not in _ROLES:
        raise BadField(f"the role {item.role or ''!r} is not supported", f"{field}.role")
    text, unreadable = _text(item.content)
    one = {"role": _ROLES[item.role], "content": text}
    if asked and unreadable and one["role"] == "user":
        raise BadField(f"a message with nothing but {unreadable} is not supported: text only", f"{field}.content[0]")
    if one["role"] == "assistant" and plain and plain[-1].keys() == _REASONING_ONLY_KEYS:
        one = {**plain.pop(), **one}
    plain.append(one)


def _add_tool(
    plain: list[TemplateMessage], item: ResponseItem, raw: dict[str, Any], name: ModelName, field: str
) -> None:
    """Adds a call of any type, or the output of one."""
    kind = kind_of(raw)
    result = raw.get(_HOSTED[kind]) or raw.get("error") if kind in _HOSTED else None
    if kind in _HOSTED and not result:
        return
    if kind == "mcp_approval_response":
        answer = "approved" if raw.get("approve") else f"refused: {raw.get('reason') or ''}".rstrip(": ")
        plain.append({"role": "tool", "content": answer, "tool_call_id": str(raw.get("approval_request_id") or "")})
    elif kind.endswith("_output"):
        output = raw.get("output", raw.get("result"))
        plain.append({"role": "tool", "content": _output(output, f"{field}.output"), "tool_call_id": item.call_name})
    elif kind.endswith("_call") or kind in ("mcp_approval_request", "program"):
        custom = kind == "custom_tool_call"
        named = name(item.name or kind.removesuffix("_call"), item.namespace or "", custom)
        if not plain or plain[-1]["role"] != "assistant":
            plain.append({"role": "assistant", "content": ""})
        made = tool_call(named, _arguments(raw, custom, field), item.call_name)
        plain[-1].setdefault("tool_calls", []).append(made)
        if result:
            text = IMAGE if kind == "image_generation_call" else _output(result, field)
            plain.append({"role": "tool", "content": text, "tool_call_id": item.call_name})
    else:
        plain.append({"role": "user", "content": f"(an item of type {kind[:100]}, which this model cannot see)"})


def _arguments(raw: dict[str, Any], custom: bool, field: str) -> str | dict[str, Any]:
    """A call's arguments, as JSON text or as an object, from whichever field the item type has them in."""
    if custom:
        return {"input": converted(raw.get("input", ""), str, f"{field}.input")}
    for each in _ARGUMENTS:
        value = raw.get(each)
        if isinstance(value, dict):
            return value if each == "arguments" else {key: inner for key, inner in value.items() if inner is not None}
        if value is not None:
            return converted(value, str, f"{field}.{each}")
    return {each: raw[each] for each in _MORE_ARGUMENTS if raw.get(each) is not None}


def _output(value: Any, field: str) -> str:
    """A call's output as one text. Raises BadField if it is neither text nor a list or object."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | dict):
        raise BadField(f"{field}: a call's output must be text, or a list of parts", field)
    return "\n".join(filter(None, map(_output_part, value if isinstance(value, list) else [value])))


def _output_part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] in (*_PLACEHOLDERS, "refusal"):
        return _part(converted(part, ItemPart, "input"))[0]
    if not isinstance(part, dict):
        return part if isinstance(part, str) else json.dumps(part, ensure_ascii=False)
    texts = [part[each] for each in ("text", "logs", "stdout", "stderr") if isinstance(part.get(each), str)]
    if not texts:
        return json.dumps(part, ensure_ascii=False)
    outcome = part.get("outcome")
    if isinstance(outcome, dict):
        code = outcome.get("exit_code")
        texts.append("(timed out)" if outcome.get("type") == "timeout" else f"(exit code {code})")
    return "\n".join(filter(None, texts))


def _text(content: str | list[ItemPart] | None) -> tuple[str, str]:
    """(content as one text, the placeholder of the first part if no part can be read, else "")."""
    if content is None or isinstance(content, str):
        return content or "", ""
    parts = [_part(each) for each in content]
    unreadable = bool(parts) and not any(read for _, read in parts)
    return "\n".join(text for text, _ in parts), parts[0][0] if unreadable else ""


def _part(part: ItemPart) -> tuple[str, bool]:
    """(a part's text or its placeholder, whether the model can read the part)."""
    for text in (part.text, part.refusal, part.encrypted_content):  # this server's content is not encrypted
        if text is not None:
            return text, True
    if part.type == "input_file" and (written := _file_text(part.file_data or "")) is not None:
        return f"{part.filename}:\n{written}" if part.filename else written, True
    if part.type == "input_file" and part.filename:
        return f"(the file {part.filename[:200]}, which this model cannot read)", False
    return _PLACEHOLDERS.get(part.type, f"(content of type {part.type[:100]}, which this model cannot see)"), False


def _file_text(data: str) -> str | None:
    """The text of a text file that was sent as a data URL; None for anything else."""
    found = _TEXT_FILE.fullmatch(data)
    try:
        return base64.b64decode(found[1], validate=True).decode() if found else None
    except ValueError:
        return None
