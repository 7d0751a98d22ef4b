"""GET /v1/models and /v1/models/{model}: the served names, each as an object with OpenAI's and Anthropic's fields."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from paceline.errors import BadField
from paceline.serve.service import Service
from paceline.serve.tools import has_reasoning
from paceline.serve.wire import reply

_MAX_LISTED = 1000  # names on a page; Anthropic's limit


async def models(service: Service, request: Request) -> Response:
    """All names, or the page of them that Anthropic's `limit`, `after_id` and `before_id` request."""
    names = list(service.names)
    after, before = (_index_of(request, field, names) for field in ("after_id", "before_id"))
    if after is not None and before is not None:
        raise BadField("after_id and before_id cannot be used together", "before_id")
    rest = names[:before] if after is None else names[after + 1 :]
    limit = _limit(request)
    page = rest[-limit:] if before is not None else rest[:limit]
    ends = {"first_id": page[0] if page else None, "last_id": page[-1] if page else None}
    data = [_described(service, name) for name in page]
    return reply({"object": "list", "data": data, "has_more": len(page) < len(rest), **ends})


async def model(service: Service, request: Request) -> Response:
    """The model of a name. Anthropic's clients may use any name that /v1/messages accepts."""
    name = request.path_params["model"]
    service.check_model(name, *(["claude"] if "anthropic-version" in request.headers else []))
    return reply(_described(service, name))


def _index_of(request: Request, field: str, names: list[str]) -> int | None:
    name = request.query_params.get(field)
    if name is not None and name not in names:
        raise BadField(f"{field}: {name[:100]!r} is none of the models", field)
    return None if name is None else names.index(name)


def _limit(request: Request) -> int:
    given = request.query_params.get("limit", str(_MAX_LISTED))
    limit = int(given) if given.isascii() and given.isdecimal() and len(given) < 5 else 0
    if not 1 <= limit <= _MAX_LISTED:
        raise BadField(f"limit must be between 1 and {_MAX_LISTED}", "limit")
    return limit


def _described(service: Service, name: str) -> dict[str, Any]:
    capacity = service.host.capacity
    created = datetime.fromtimestamp(service.created, UTC)
    return {
        "id": name,
        "object": "model",
        "type": "model",
        "created": service.created,
        "created_at": f"{created:%Y-%m-%dT%H:%M:%SZ}",
        "owned_by": "paceline",
        "display_name": name,
        "lifecycle": "active",
        "max_model_len": capacity,
        "max_input_tokens": capacity,
        "max_tokens": capacity,
        "capabilities": _capabilities(service.host.tokenizer.chat_template),
    }


def _capabilities(template: str | None) -> dict[str, Any]:
    """Anthropic's capabilities. Whether the model has reasoning is read from its chat template."""
    yes, no = {"supported": True}, {"supported": False}
    reasons = yes if has_reasoning(template) else no
    kinds = {"adaptive": yes, "between_tools": no, "disabled": yes, "enabled": reasons}
    return {
        "batch": no,
        "citations": no,
        "code_execution": no,
        "context_management": no,
        "effort": {**yes, **dict.fromkeys(("low", "medium", "high", "xhigh", "max"), yes)},
        "image_input": no,
        "pdf_input": no,
        "server_tools": {**no, "web_search": no, "code_execution": no},
        "structured_outputs": yes,
        "thinking": {**reasons, "types": kinds},
    }
