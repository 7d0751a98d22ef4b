"""POST /v1/responses, OpenAI's Responses API, and the endpoints of stored responses."""

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
from paceline.serve.responses_input import ResponsesBody, ResponsesTools, encode, responses_tools
from paceline.serve.responses_items import converted, kind_of
from paceline.serve.responses_writer import GeneratedResponseWriter, ReadyResponseWriter, StoreResponse, new_id
from paceline.serve.service import (
    TENANT_KEY,
    PreparedRequest,
    Service,
    run_in_worker_thread,
    run_in_worker_thread_if_large,
)
from paceline.serve.store import Item, Turn, decode_items, history
from paceline.serve.wire import OPENAI, answer_response, read_body, reply

_MOST_LISTED = 100  # items on a page; OpenAI's limit


async def responses(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, ResponsesBody, service.body_limit)
    model = service.check_model(body.model)
    body.check()
    context = _StoredContext(service, http, body)
    if kind_of(body.items[-1]) == "compaction_trigger":  # Codex requests a compaction in a turn of its own
        ready = await run_in_worker_thread(_compaction_turn, service, body, model, context)
        return await answer_response(http, ready, bool(body.stream), OPENAI, lambda: None)
    # a stored conversation may be long even if the body is small
    run = run_in_worker_thread if context.before else functools.partial(run_in_worker_thread_if_large, http)
    prepared, tools, store_function = await run(
        _prepare_request, service, body, context, service.namespace(http, body.cache_salt)
    )
    answer = await service.start(prepared)
    writer = GeneratedResponseWriter(body, tools, answer, service.host.tokenizer, model, store_function)
    return await answer_response(http, writer, bool(body.stream), OPENAI, answer.close)


def _prepare_request(
    service: Service, body: ResponsesBody, context: _StoredContext, namespace: str
) -> tuple[PreparedRequest, ResponsesTools, StoreResponse | None]:
    sampling, earlier = body.sampling(service, body.num_logprobs), history(context.before)
    tools = responses_tools(body, earlier)
    prompt = encode(service.host.tokenizer, body, tools, earlier, service.host.capacity)
    store_function = context.store_function(body.items, context.before)
    return (
        service.prepare_request(prompt, sampling, tools.calls(body), body.limit, namespace=namespace),
        tools,
        store_function,
    )


def _compaction_turn(service: Service, body: ResponsesBody, model: str, context: _StoredContext) -> ReadyResponseWriter:
    """A response whose output is the compaction. A later response continues from the compacted conversation."""
    sampling = body.sampling(service, body.num_logprobs)
    responses_tools(body)  # validates and completes the tools, which the reply repeats
    done = _compacted(service, body, context)
    return ReadyResponseWriter(body, sampling, model, context.store_function(done.kept, None), [done.item], done.usage)


def _compacted(service: Service, body: ResponsesBody, context: _StoredContext) -> Compaction:
    earlier = history(context.before)
    return Compaction(service.host.tokenizer, [*earlier, *body.items], len(earlier), service.host.capacity)


async def input_tokens(service: Service, http: HttpRequest) -> Response:
    """POST /v1/responses/input_tokens: the number of tokens that a response's prompt would have."""
    body = await read_body(http, ResponsesBody, service.body_limit)
    service.check_model(body.model)
    body.check()
    count = await run_in_worker_thread(_count, service.host.tokenizer, body, _StoredContext(service, http, body))
    return reply({"object": "response.input_tokens", "input_tokens": count})


def _count(tokenizer: Tokenizer, body: ResponsesBody, context: _StoredContext) -> int:
    earlier = history(context.before)
    return len(encode(tokenizer, body, responses_tools(body, earlier), earlier))


async def compact_response(service: Service, http: HttpRequest) -> Response:
    """POST /v1/responses/compact: the items to continue with, of which the last is a compaction. No model runs."""
    body = await read_body(http, ResponsesBody, service.body_limit)
    service.check_model(body.model)
    context = _StoredContext(service, http, body)
    if not body.items and context.before is None:
        raise BadField("input or previous_response_id must be given", "input")
    done = await run_in_worker_thread(_compacted, service, body, context)
    return reply(done.reply([listed_item(each) for each in done.kept]))


async def get_response(service: Service, http: HttpRequest) -> Response:
    """GET /v1/responses/{response}"""
    if http.query_params.get("stream", "false").lower() == "true":
        raise BadField("streaming a stored response is not supported", "stream")
    entry = service.store.get(tenant_of(http), http.path_params["response"])
    return Response(entry.response, media_type="application/json")


async def delete_response(service: Service, http: HttpRequest) -> Response:
    """DELETE /v1/responses/{response}"""
    name = http.path_params["response"]
    service.store.delete(tenant_of(http), name)
    return reply({"id": name, "object": "response", "deleted": True})


async def input_items(service: Service, http: HttpRequest) -> Response:
    """GET /v1/responses/{response}/input_items: all input items of a response, earlier turns included, newest first."""
    query = http.query_params
    limit, order, after = query.get("limit", "20"), query.get("order", "desc"), query.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= _MOST_LISTED):
        raise BadField(f"limit must be between 1 and {_MOST_LISTED}", "limit")
    if order not in ("asc", "desc"):
        raise BadField("order must be asc or desc", "order")
    items = await run_in_worker_thread(
        _input_items, service.store.get(tenant_of(http), http.path_params["response"]).turn
    )
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [index for index, each in enumerate(items) if each.get("id") == after]
        if not places:
            raise BadField("after is not the id of an item", "after")
        items = items[places[0] + 1 :]
    shown = items[: int(limit)]
    names = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return reply({"object": "list", "data": shown, "has_more": len(items) > len(shown), **names})


def _input_items(turn: Turn) -> list[Item]:
    return [*history(turn.before), *decode_items(turn.given)]


def tenant_of(http: HttpRequest) -> str:
    """The owner of the responses that a request may use: the digest of its API key, "" without keys."""
    return str(http.scope.get(TENANT_KEY, ""))


class _StoredContext:
    """The stored conversation that a request continues: `before` is the turn of `previous_response_id`, if given."""

    def __init__(self, service: Service, http: HttpRequest, body: ResponsesBody) -> None:
        """Replaces item references in the body by their items. Raises NotFound for an item or response that is not stored."""
        self._store, self._tenant, self._body = service.store, tenant_of(http), body
        self.before: Turn | None = None
        if body.previous_response_id is not None:
            self.before = self._store.get(self._tenant, body.previous_response_id).turn
        if any(kind_of(each) == "item_reference" for each in body.items):
            body.input = [self._resolve_reference(index, each) for index, each in enumerate(body.items)]

    def store_function(self, items: Sequence[Item], before: Turn | None) -> StoreResponse | None:
        """The function that stores a response to `items` after the turn `before`; None if it is not to be stored."""
        if self._body.store is False or not self._store.enabled:
            return None
        given = [listed_item(each) for each in items]
        # encoded before generating, so that items that cannot be stored are refused early
        encoded = msgspec.json.encode(given)

        def store(response: dict[str, Any]) -> None:
            names = tuple(str(each["id"]) for each in (*given, *response["output"]))
            output = msgspec.json.encode(response["output"])
            self._store.add(response, Turn(self._tenant, before, encoded, output, names))

        return store

    def _resolve_reference(self, index: int, item: Item) -> Item:
        if kind_of(item) != "item_reference":
            return item
        return self._store.item(self._tenant, converted(item.get("id"), str, f"input[{index}].id"))


def listed_item(item: Item) -> Item:
    """A request's item in the format of `input_items`: with an id, and a message's content as parts."""
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
    """A WebSocket protocol for uvicorn that refuses every upgrade with status 426, on which Codex falls back to HTTP.

    Codex 0.169 (`supports_websockets = true`) sends a POST within 0.1 s of a 426. After a 403, 404, 405 or 501 it retries
    six times, over six seconds, and a 400 ends its turn. uvicorn's own protocol answers 403, or treats the upgrade as a
    GET if the `websockets` package is missing; this protocol behaves the same in both cases.
    """

    def __init__(self, **settings: object) -> None:
        """Ignores uvicorn's configuration and state."""

    def connection_made(self, given: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.WriteTransport, given)  # uvloop's transport is not a subclass
        error = RequestError("WebSockets are not served: POST /v1/responses")
        body = msgspec.json.encode(OPENAI.body(error))
        head = (
            "HTTP/1.1 426 Upgrade Required\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()
