"""Items of the Responses API as chat templates take them: what is text stays text, for the rest stands what it was.

An item comes again with every later turn, so that refusing one would end its conversation for good.
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
from paceline.serve.conversation import Message, call, fold_systems, numbered

Kind = TypeVar("Kind")
Name = Callable[
    [str, str, bool], str
]  # how the model calls a tool, by its name, its namespace, and whether it is custom

IMAGE = "(an image, which this model cannot see)"
_UNSEEN = {
    "input_image": IMAGE,
    "output_image": IMAGE,
    "image": IMAGE,
    "computer_screenshot": IMAGE,
    "input_video": "(a video, which this model cannot see)",
    "input_audio": "(audio, which this model cannot hear)",
    "input_file": "(a file, which this model cannot read)",
}
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_PASSED_OVER = (
    "additional_tools",
    "compaction_trigger",
    "mcp_list_tools",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
)
# calls that a server made itself, and the field with what came of it; without that they are passed over
_HOSTED = {
    "code_interpreter_call": "outputs",
    "file_search_call": "results",
    "image_generation_call": "result",
    "mcp_call": "output",
}
_COMPACTIONS = ("compaction", "compaction_summary", "context_compaction")
_ARGUMENTS = ("arguments", "action", "operation")
_MORE_ARGUMENTS = ("actions", "input", "code", "queries")
_THOUGHT = {"role", "reasoning_content"}  # of a message of which only its reasoning is known yet
_TEXT_FILE = re.compile(r"data:(?:text/|application/json)[^,]*;base64,(.*)", re.DOTALL)
_COMPACTED = b"paceline:"


class Part(Struct):
    type: str
    text: str | None = None
    refusal: str | None = None
    encrypted_content: str | None = None
    filename: str | None = None
    file_data: str | None = None


class Item(Struct):
    """An item of any type: the fields that are read of more than one."""

    type: str | None = None
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    name: str | None = None
    namespace: str | None = None
    call_id: str | None = None
    encrypted_content: str | None = None

    @property
    def call_name(self) -> str:
        """What ties a call and its output."""
        return self.call_id or self.id or ""


def kind_of(item: dict[str, Any]) -> Any:
    """An item's type. Without one it is a message, or a reference to an item by its id."""
    return item.get("type") or ("item_reference" if item.get("role") is None and item.get("id") else "message")


def converted(value: Any, kind: type[Kind], field: str) -> Kind:
    """A decoded JSON value as `kind`. Raises BadField, naming the place within `field`, where it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found = re.search(r" - at `\$(.*)`$", str(error))
        raise BadField(f"{field}: {error}", f"{field}{found[1] if found else ''}") from error


def template_messages(items: Sequence[Any], name: Name, instructions: str = "", num_earlier: int = 0) -> list[Message]:
    """Calls are part of the assistant's message before them, reasoning of the one after it.

    The first `num_earlier` items are not of this request, whose own are counted from 0 in errors. Raises BadField for what
    is no item, for a role there is not, and where the last item is a user's message without anything that can be read.
    """
    plain: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    for index, raw in enumerate(items):
        field = f"input[{index - num_earlier}]"
        item, kind = converted(raw, Item, field), kind_of(raw)
        if kind == "message":
            _add_message(plain, item, field, asked=index == len(items) - 1)
        elif kind == "agent_message":  # what one of Codex's agents tells another, names and all
            plain.append({"role": "user", "content": _text(item.content)[0]})
        elif kind == "reasoning":  # this server's; what others send is encrypted, or a summary
            parts = item.content if isinstance(item.content, list) else []
            if thought := "".join(part.text or "" for part in parts if part.type in ("reasoning_text", "text")):
                plain.append({"role": "assistant", "reasoning_content": thought})
        elif kind in _COMPACTIONS:
            if text := compacted_text(item.encrypted_content or ""):
                plain.append({"role": "user", "content": text})
        elif kind not in _PASSED_OVER:
            _add_tool(plain, item, raw, name, field)
    if len(plain) <= bool(instructions):
        raise BadField("input holds nothing for the model to read", "input")
    return numbered(fold_systems([{"content": "", **each} for each in plain]))


def encrypted(text: str) -> str:
    """The content of a compaction item: not encrypted, but text in base64 that `compacted_text` reads again."""
    return base64.b64encode(_COMPACTED + text.encode()).decode()


def compacted_text(content: str) -> str:
    """What a compaction item tells the model. That of another server is encrypted, and said to be missing."""
    try:
        data = base64.b64decode(content, validate=True)
        text = data.removeprefix(_COMPACTED).decode() if data.startswith(_COMPACTED) else None
    except ValueError:
        text = None
    return "(an earlier part of the conversation, which this model cannot read)" if text is None else text


def _add_message(plain: list[Message], item: Item, field: str, asked: bool) -> None:
    if item.role not in _ROLES:
        raise BadField(f"there is no role {item.role or ''!r}", f"{field}.role")
    text, unseen = _text(item.content)
    one = {"role": _ROLES[item.role], "content": text}
    if asked and unseen and one["role"] == "user":
        raise BadField(f"a message that is nothing but {unseen} is not supported: text only", f"{field}.content[0]")
    if one["role"] == "assistant" and plain and plain[-1].keys() == _THOUGHT:
        one = {**plain.pop(), **one}
    plain.append(one)


def _add_tool(plain: list[Message], item: Item, raw: dict[str, Any], name: Name, field: str) -> None:
    """A call, or the output of one, of any type."""
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
        made = call(named, _arguments(raw, custom, field), item.call_name)
        plain[-1].setdefault("tool_calls", []).append(made)
        if result:
            text = IMAGE if kind == "image_generation_call" else _output(result, field)
            plain.append({"role": "tool", "content": text, "tool_call_id": item.call_name})
    else:
        plain.append({"role": "user", "content": f"(an item of type {kind[:100]}, which this model cannot see)"})


def _arguments(raw: dict[str, Any], custom: bool, field: str) -> str | dict[str, Any]:
    """A call's arguments, as JSON or as the object, whatever its type calls them."""
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
    """What a call gave, as one text. Raises BadField for what is neither text nor a list or object."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list | dict):
        raise BadField(f"{field}: a call's output is text, or a list of parts", field)
    return "\n".join(filter(None, map(_output_part, value if isinstance(value, list) else [value])))


def _output_part(part: Any) -> str:
    if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] in (*_UNSEEN, "refusal"):
        return _part(converted(part, Part, "input"))[0]
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


def _text(content: str | list[Part] | None) -> tuple[str, str]:
    """Content as one text; where nothing in it can be read, also what the first part is."""
    if content is None or isinstance(content, str):
        return content or "", ""
    parts = [_part(each) for each in content]
    unseen = bool(parts) and not any(read for _, read in parts)
    return "\n".join(text for text, _ in parts), parts[0][0] if unseen else ""


def _part(part: Part) -> tuple[str, bool]:
    """A part's text, or what stands for it, and whether it can be read."""
    for text in (part.text, part.refusal, part.encrypted_content):  # what this model wrote is not encrypted
        if text is not None:
            return text, True
    if part.type == "input_file" and (written := _file_text(part.file_data or "")) is not None:
        return f"{part.filename}:\n{written}" if part.filename else written, True
    if part.type == "input_file" and part.filename:
        return f"(the file {part.filename[:200]}, which this model cannot read)", False
    return _UNSEEN.get(part.type, f"(content of type {part.type[:100]}, which this model cannot see)"), False


def _file_text(data: str) -> str | None:
    """The text of a text file that came as a data URL."""
    found = _TEXT_FILE.fullmatch(data)
    try:
        return base64.b64decode(found[1], validate=True).decode() if found else None
    except ValueError:
        return None
