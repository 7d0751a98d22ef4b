"""POST /v1/responses, in OpenAI's form: items in, items out; and what is kept of them."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, cast

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField, RequestError
from paceline.models.tokenizer import Tokenizer
from paceline.serve.responses_compact import Compaction
from paceline.serve.responses_input import ResponsesBody, Toolbox, encode, toolbox
from paceline.serve.responses_items import converted, kind_of
from paceline.serve.responses_writer import Keep, Ready, Writer, new_id
from paceline.serve.service import TENANT, Asked, Service, aside, aside_if_long
from paceline.serve.store import Item, Turn, history, read
from paceline.serve.wire import OPENAI, read_body, reply, written

_MOST_LISTED = 100


async def responses(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, ResponsesBody, service.body_limit)
    model = service.check_model(body.model)
    body.check()
    context = _Context(service, http, body)
    if kind_of(body.items[-1]) == "compaction_trigger":  # how Codex asks for a compaction in a turn of its own
        ready = await aside(_compaction_turn, service, body, model, context)
        return await written(http, ready, bool(body.stream), OPENAI, lambda: None)
    run = aside if context.before else functools.partial(aside_if_long, http)  # a body does not tell how long that is
    asked, box, keep = await run(_asked, service, body, context, service.namespace(http, body.cache_salt))
    answer = await service.start(asked)
    writer = Writer(body, box, answer, service.host.tokenizer, model, keep)
    return await written(http, writer, bool(body.stream), OPENAI, answer.close)


def _asked(
    service: Service, body: ResponsesBody, context: _Context, namespace: str
) -> tuple[Asked, Toolbox, Keep | None]:
    sampling, earlier = body.sampling(service, body.num_logprobs), history(context.before)
    box = toolbox(body, earlier)
    prompt = encode(service.host.tokenizer, body, box, earlier, service.host.capacity)
    keep = context.keep(body.items, context.before)
    return service.asked(prompt, sampling, box.calls(body), body.limit, namespace=namespace), box, keep


def _compaction_turn(service: Service, body: ResponsesBody, model: str, context: _Context) -> Ready:
    """A response that is the compaction. A response after it goes on from what a compaction leaves."""
    sampling = body.sampling(service, body.num_logprobs)
    toolbox(body)  # checks and completes them, for the reply repeats them
    done = _compacted(service, body, context)
    return Ready(body, sampling, model, context.keep(done.kept, None), [done.item], done.usage)


def _compacted(service: Service, body: ResponsesBody, context: _Context) -> Compaction:
    earlier = history(context.before)
    return Compaction(service.host.tokenizer, [*earlier, *body.items], len(earlier), service.host.capacity)


async def input_tokens(service: Service, http: HttpRequest) -> Response:
    """POST /v1/responses/input_tokens: how many tokens a response's prompt would have."""
    body = await read_body(http, ResponsesBody, service.body_limit)
    service.check_model(body.model)
    body.check()
    count = await aside(_count, service.host.tokenizer, body, _Context(service, http, body))
    return reply({"object": "response.input_tokens", "input_tokens": count})


def _count(tokenizer: Tokenizer, body: ResponsesBody, context: _Context) -> int:
    earlier = history(context.before)
    return len(encode(tokenizer, body, toolbox(body, earlier), earlier))


async def compacted_response(service: Service, http: HttpRequest) -> Response:
    """POST /v1/responses/compact: the items to go on with, of which the last is a compaction. No model runs."""
    body = await read_body(http, ResponsesBody, service.body_limit)
    service.check_model(body.model)
    context = _Context(service, http, body)
    if not body.items and context.before is None:
        raise BadField("input or previous_response_id must be given", "input")
    done = await aside(_compacted, service, body, context)
    return reply(done.reply([resource(each) for each in done.kept]))


async def stored(service: Service, http: HttpRequest) -> Response:
    """GET /v1/responses/{response}"""
    if http.query_params.get("stream", "false").lower() == "true":
        raise BadField("a response that is stored is not streamed again", "stream")
    entry = service.store.get(tenant_of(http), http.path_params["response"])
    return Response(entry.response, media_type="application/json")


async def forgotten(service: Service, http: HttpRequest) -> Response:
    """DELETE /v1/responses/{response}"""
    name = http.path_params["response"]
    service.store.delete(tenant_of(http), name)
    return reply({"id": name, "object": "response", "deleted": True})


async def input_items(service: Service, http: HttpRequest) -> Response:
    """GET /v1/responses/{response}/input_items: all that the response was written from, the newest first."""
    query = http.query_params
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= _MOST_LISTED):
        raise BadField(f"limit must be between 1 and {_MOST_LISTED}", "limit")
    if order not in ("asc", "desc"):
        raise BadField("order can be asc or desc", "order")
    items = await aside(_given, service.store.get(tenant_of(http), http.path_params["response"]).turn)
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [index for index, each in enumerate(items) if each.get("id") == after]
        if not places:
            raise BadField("after is none of the items' ids", "after")
        items = items[places[0] + 1 :]
    shown = items[: int(limit)]
    names = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return reply({"object": "list", "data": shown, "has_more": len(items) > len(shown), **names})


def _given(turn: Turn) -> list[Item]:
    return [*history(turn.before), *read(turn.given)]


def tenant_of(http: HttpRequest) -> str:
    """Whose responses a request may see: its key's, as a digest; without keys there is one client."""
    return str(http.scope.get(TENANT, ""))


class _Context:
    """What a request's items go on from: `before`, the turn of the response before, and how the new one is kept after it."""

    def __init__(self, service: Service, http: HttpRequest, body: ResponsesBody) -> None:
        """References in the body become the items that they name. Raises NotFound for what is not kept (any more)."""
        self._store, self._tenant, self._body = service.store, tenant_of(http), body
        self.before: Turn | None = None
        if body.previous_response_id is not None:
            self.before = self._store.get(self._tenant, body.previous_response_id).turn
        if any(kind_of(each) == "item_reference" for each in body.items):
            body.input = [self._referenced(index, each) for index, each in enumerate(body.items)]

    def keep(self, items: Sequence[Item], before: Turn | None) -> Keep | None:
        """What keeps a response that was written from `items` after the turn `before`; None where it is not to be kept."""
        if self._body.store is False or not self._store.enabled:
            return None
        given = [resource(each) for each in items]
        written = msgspec.json.encode(given)  # before there is an answer: what cannot be written is not asked

        def kept(response: dict[str, Any]) -> None:
            names = tuple(str(each["id"]) for each in (*given, *response["output"]))
            output = msgspec.json.encode(response["output"])
            self._store.keep(response, Turn(self._tenant, before, written, output, names))

        return kept

    def _referenced(self, index: int, item: Item) -> Item:
        if kind_of(item) != "item_reference":
            return item
        return self._store.item(self._tenant, converted(item.get("id"), str, f"input[{index}].id"))


def resource(item: Item) -> Item:
    """An item of a request as it is listed: with an id, and a message's content as parts."""
    kind = kind_of(item)
    prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs", "custom_tool_call": "ctc"}.get(kind, "item")
    shown = {**item, "type": kind, "id": item.get("id") or new_id(prefix)}
    if kind == "message":
        text = shown.get("content")
        if text is None or isinstance(text, str):
            said = shown["role"] == "assistant"
            more: dict[str, Any] = {"annotations": [], "logprobs": []} if said else {}
            shown["content"] = [{"type": "output_text" if said else "input_text", "text": text or "", **more}]
    if kind == "message" or kind.endswith(("_call", "_output")):
        shown["status"] = shown.get("status") or "completed"
    return shown


class RefusedUpgrade(asyncio.Protocol):
    """uvicorn's WebSocket protocol, which refuses every upgrade with 426: the one status that Codex takes for an answer.

    Codex 0.169 (`supports_websockets = true`) posts within 0.1 s of a 426. After a 403, 404, 405 or 501 it tries six
    times more, over six seconds, and a 400 ends its turn. uvicorn's own protocol answers 403, or, where the
    `websockets` package is missing, takes the upgrade for a GET; with this one there is no difference.
    """

    def __init__(self, **settings: object) -> None:
        """uvicorn gives its configuration and state, which take no part."""

    def connection_made(self, given: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.WriteTransport, given)  # uvloop's is no subclass
        error = RequestError("WebSockets are not served: POST /v1/responses")
        body = msgspec.json.encode(OPENAI.body(error))
        head = (
            "HTTP/1.1 426 Upgrade Required\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()
