"""Compaction in the form of the Responses API: the users' messages as they were, of all else the lines worth most."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from paceline.models.tokenizer import Tokenizer
from paceline.serve.conversation import Message
from paceline.serve.responses_items import Item, converted, encrypted, kind_of, template_messages
from paceline.serve.responses_writer import new_id, usage_of
from paceline.serve.store import Item as RawItem
from paceline.tasks.compact import LEAST_RATIO, compact
from paceline.tasks.scoring import Message as Scored

_KEPT_ROLES = ("user", "system", "developer")
_REMINDER = 200  # characters of a user's message that mark its place
_SHARE = 4  # of the context, the part that a compacted conversation is to take
_RECENT = 2  # messages that stay whole where they are short enough


class Compaction:
    """A conversation compacted to at most half its size, and to a quarter of `capacity` where that is less.

    `kept` are the messages of users, systems and developers; `item` is the compaction of the rest, which
    `responses_items` reads again as a user's text.
    """

    def __init__(self, tokenizer: Tokenizer, items: Sequence[RawItem], num_earlier: int, capacity: int) -> None:
        read = [converted(each, Item, f"input[{index - num_earlier}]") for index, each in enumerate(items)]
        kept = [kind_of(raw) == "message" and each.role in _KEPT_ROLES for raw, each in zip(items, read, strict=True)]
        self.kept = [raw for raw, stays in zip(items, kept, strict=True) if stays]
        reminders = [_reminder(raw) if stays else raw for raw, stays in zip(items, kept, strict=True)]
        shown = [each for each in template_messages(reminders, _name, "", num_earlier) if each["role"] != "system"]
        told = [Scored(each["role"], _told(each)) for each in shown]
        whole = [_text(each) for each in self.kept]
        sizes = [sum(tokenizer.lengths([each.content for each in told])), sum(tokenizer.lengths(whole))]
        target = max(capacity // _SHARE - sizes[1], 1)
        ratio = min(0.5, max(LEAST_RATIO, target / max(sizes[0], 1)))
        recent = sum(tokenizer.lengths([each.content for each in told[-_RECENT:]]))
        done = compact(
            told,
            whole[-1] if whole else None,
            ratio=ratio,
            preserve_recent=_RECENT if recent <= target // 2 else 0,
            count=tokenizer.lengths,
        )
        text = "\n".join(each.content for each in done.messages)
        if text:
            text = f"The conversation so far, shortened:\n{text}"
        self.item = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": encrypted(text)}
        self.usage = usage_of(sum(sizes), done.output_size)

    def reply(self, kept: list[RawItem]) -> dict[str, Any]:
        """As POST /v1/responses/compact gives it; `kept` are the kept messages as resources."""
        return {
            "id": new_id("resp"),
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*kept, self.item],
            "usage": self.usage,
        }


def _name(name: str, namespace: str, custom: bool) -> str:
    return f"{namespace}__{name}" if namespace else name


def _text(raw: RawItem) -> str:
    """The text of a message's parts; what has none is not counted."""
    content = raw.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(each.get("text") or "" for each in content or ())


def _reminder(raw: RawItem) -> RawItem:
    """A message that marks where one that is kept stood: its beginning."""
    text = " ".join(_text(raw)[: 2 * _REMINDER].split())
    short = text if len(text) <= _REMINDER else f"{text[:_REMINDER]}…"
    return {"type": "message", "role": raw["role"], "content": short}


def _told(message: Message) -> str:
    """A message with its calls as text, under a line that says whose it is."""
    lines = [f"[{message['role']}]"]
    if message["content"]:
        lines.append(message["content"])
    for each in message.get("tool_calls", ()):
        made = each["function"]
        lines.append(f"(called {made['name']}: {json.dumps(made['arguments'], ensure_ascii=False)})")
    return "\n".join([*lines, ""])
