"""Compaction for the Responses API: keeps user messages unchanged, and the highest-scoring lines of everything else."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from paceline.models.tokenizer import Tokenizer
from paceline.serve.conversation import TemplateMessage
from paceline.serve.responses_items import ResponseItem, converted, encrypted, kind_of, template_messages
from paceline.serve.responses_writer import new_id, responses_usage
from paceline.serve.store import Item
from paceline.tasks.compact import LEAST_RATIO, compact
from paceline.tasks.scoring import ConversationMessage

_KEPT_ROLES = ("user", "system", "developer")
_REMINDER = 200  # characters of a user message that mark its position in the compacted text
_SHARE = 4  # the compacted conversation is to fit 1 / _SHARE of the context
_RECENT = 2  # last messages that stay unchanged if they fit half of that


class Compaction:
    """A conversation compacted to at most half its size, or to a quarter of `capacity` if that is less.

    `kept` are the messages of users, systems and developers. `item` is the compaction of the other items, which
    `responses_items` reads as user text. The first `num_earlier` of `items` are from stored turns.
    """

    def __init__(self, tokenizer: Tokenizer, items: Sequence[Item], num_earlier: int, capacity: int) -> None:
        read = [converted(each, ResponseItem, f"input[{index - num_earlier}]") for index, each in enumerate(items)]
        kept = [kind_of(raw) == "message" and each.role in _KEPT_ROLES for raw, each in zip(items, read, strict=True)]
        self.kept = [raw for raw, stays in zip(items, kept, strict=True) if stays]
        reminders = [_reminder(raw) if stays else raw for raw, stays in zip(items, kept, strict=True)]
        shown = [
            each for each in template_messages(reminders, _model_name, "", num_earlier) if each["role"] != "system"
        ]
        messages = [ConversationMessage(each["role"], _message_text(each)) for each in shown]
        whole = [_content_text(each) for each in self.kept]
        sizes = [sum(tokenizer.lengths([each.content for each in messages])), sum(tokenizer.lengths(whole))]
        target = max(capacity // _SHARE - sizes[1], 1)
        ratio = min(0.5, max(LEAST_RATIO, target / max(sizes[0], 1)))
        recent = sum(tokenizer.lengths([each.content for each in messages[-_RECENT:]]))
        done = compact(
            messages,
            whole[-1] if whole else None,
            ratio=ratio,
            preserve_recent=_RECENT if recent <= target // 2 else 0,
            count=tokenizer.lengths,
        )
        text = "\n".join(each.content for each in done.messages)
        if text:
            text = f"The conversation so far, shortened:\n{text}"
        self.item = {"id": new_id("cmp"), "type": "compaction", "encrypted_content": encrypted(text)}
        self.usage = responses_usage(sum(sizes), done.output_size)

    def reply(self, kept: list[Item]) -> dict[str, Any]:
        """The reply of POST /v1/responses/compact. `kept` are the kept messages as `listed_item` formats them."""
        return {
            "id": new_id("resp"),
            "object": "response.compaction",
            "created_at": int(time.time()),
            "output": [*kept, self.item],
            "usage": self.usage,
        }


def _model_name(name: str, namespace: str, custom: bool) -> str:
    return f"{namespace}__{name}" if namespace else name


def _content_text(raw: Item) -> str:
    """The text of a message's parts. Parts without text are left out."""
    content = raw.get("content")
    if isinstance(content, str):
        return content
    return "\n".join(each.get("text") or "" for each in content or ())


def _reminder(raw: Item) -> Item:
    """A short message that marks the position of a kept message: its first characters."""
    text = " ".join(_content_text(raw)[: 2 * _REMINDER].split())
    short = text if len(text) <= _REMINDER else f"{text[:_REMINDER]}…"
    return {"type": "message", "role": raw["role"], "content": short}


def _message_text(message: TemplateMessage) -> str:
    """A message with its calls as text, below a line with its role."""
    lines = [f"[{message['role']}]"]
    if message["content"]:
        lines.append(message["content"])
    for each in message.get("tool_calls", ()):
        made = each["function"]
        lines.append(f"(called {made['name']}: {json.dumps(made['arguments'], ensure_ascii=False)})")
    return "\n".join([*lines, ""])
