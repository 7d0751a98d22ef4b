"""POST /v1/compact, Morph's compact API: keeps a conversation's highest-scoring lines. No model runs; its tokenizer counts."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from msgspec import Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField
from paceline.serve.chat_input import Part, text_of
from paceline.serve.service import Service, run_in_worker_thread
from paceline.serve.wire import read_body, reply
from paceline.tasks.compact import LEAST_RATIO, Compacted, Range, compact
from paceline.tasks.scoring import ConversationMessage

MORPH_COMPACTOR = "morph-compactor"


class CompactMessage(Struct):
    role: str
    content: str | list[Part] | None = None
    name: str | None = None


class CompactBody(Struct):
    """`messages` take precedence over `input`. A field that is null counts as not sent."""

    input: str | list[CompactMessage] | None = None
    messages: list[CompactMessage] | None = None
    model: str = MORPH_COMPACTOR
    query: str | None = None
    compression_ratio: float | None = None
    preserve_recent: int | None = None
    compress_system_messages: bool | None = None
    include_line_ranges: bool | None = None
    include_markers: bool | None = None

    @property
    def conversation(self) -> str | list[ConversationMessage]:
        """The text or messages to compact. Raises BadField if there are none, and for content that is not text."""
        field = "input" if self.messages is None else "messages"
        given = self.input if self.messages is None else self.messages
        if isinstance(given, str):
            return given
        if not given:
            raise BadField("input or messages must be given, and not be empty", field)
        return [
            ConversationMessage(each.role, text_of(each.content, f"{field}[{index}].content"), each.name)
            for index, each in enumerate(given)
        ]

    @property
    def ratio(self) -> float:
        ratio = 0.5 if self.compression_ratio is None else self.compression_ratio
        if not LEAST_RATIO <= ratio <= 1:
            raise BadField(
                f"compression_ratio must be between {LEAST_RATIO} and 1: the share to keep", "compression_ratio"
            )
        return ratio

    @property
    def num_preserved(self) -> int:
        number = 2 if self.preserve_recent is None else self.preserve_recent
        if number < 0:
            raise BadField("preserve_recent must be 0 or more", "preserve_recent")
        return number


async def compact_conversation(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, CompactBody, service.body_limit)
    if body.model != MORPH_COMPACTOR:
        service.check_model(body.model)
    began = time.perf_counter()
    done = await run_in_worker_thread(_compact, service, body)
    return reply(_reply(body, done, round(1000 * (time.perf_counter() - began))))


def _compact(service: Service, body: CompactBody) -> Compacted:
    return compact(
        body.conversation,
        body.query or None,
        ratio=body.ratio,
        preserve_recent=body.num_preserved,
        compress_system=bool(body.compress_system_messages),
        markers=body.include_markers is not False,
        count=service.host.tokenizer.lengths,
    )


def _reply(body: CompactBody, done: Compacted, milliseconds: int) -> dict[str, Any]:
    shown = body.include_line_ranges is not False
    messages = [
        {
            "role": each.role,
            "content": each.content,
            "name": each.name,
            "compacted_line_ranges": _ranges(each.dropped) if shown else [],
            "kept_line_ranges": _ranges(each.kept) if shown else [],
        }
        for each in done.messages
    ]
    usage = {
        "input_tokens": done.input_size,
        "output_tokens": done.output_size,
        "compression_ratio": round(done.output_size / done.input_size, 4) if done.input_size else 1.0,
        "processing_time_ms": milliseconds,
    }
    return {
        "id": f"cmpr-{secrets.token_hex(12)}",
        "object": "compact",
        "created": int(time.time()),
        "model": body.model,
        "output": done.text,
        "messages": messages,
        "usage": usage,
        "paceline": {"budget_tokens": done.budget, "spent_tokens": done.spent, "over_budget": done.spent > done.budget},
    }


def _ranges(ranges: Sequence[Range]) -> list[dict[str, int]]:
    return [{"start": each.start, "end": each.end} for each in ranges]
