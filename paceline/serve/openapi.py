"""GET /openapi.json: the endpoints, their bodies (from the structs that parse them), and both formats of an error."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import Struct

import paceline
from paceline.serve.chat_input import ChatBody
from paceline.serve.compact import CompactBody
from paceline.serve.completions import CompletionBody
from paceline.serve.messages_input import CountBody, MessagesBody
from paceline.serve.responses_input import ResponsesBody
from paceline.serve.tokenize import DetokenizeBody, TokenizeBody
from paceline.serve.wire import ANTHROPIC, error_format_for

_ERRORS = {
    400: "the request is invalid",
    401: "the API key is missing or wrong",
    404: "the model or response is unknown",
    408: "the body did not arrive in time",
    413: "the body exceeds the limit",
    500: "the server failed",
    504: "the request exceeded its time limit",
}
_OVERLOADED = "the queue is full, or the server is shutting down: try again after Retry-After seconds"


class OpenAIProblem(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Struct):
    error: OpenAIProblem


class AnthropicProblem(Struct):
    type: str
    message: str


class AnthropicError(Struct):
    type: str
    error: AnthropicProblem


@dataclass(frozen=True)
class Operation:
    """An endpoint. `reply` are the fields that its JSON reply always has; empty for a reply that is not JSON."""

    method: str
    path: str
    summary: str
    body: type[Struct] | None
    reply: tuple[str, ...]
    streams: bool = False


_CHOICES = ("id", "object", "created", "model", "choices", "usage")
_MESSAGE = ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage")
_RESPONSE = ("id", "object", "created_at", "status", "model", "output", "usage")
OPERATIONS = (
    Operation("POST", "/v1/chat/completions", "OpenAI's chat, and Morph's apply", ChatBody, _CHOICES, True),
    Operation("POST", "/v1/completions", "continues text, or fills in the middle", CompletionBody, _CHOICES, True),
    Operation("POST", "/v1/responses", "OpenAI's responses", ResponsesBody, _RESPONSE, True),
    Operation("POST", "/v1/responses/input_tokens", "tokens of a prompt", ResponsesBody, ("object", "input_tokens")),
    Operation("POST", "/v1/responses/compact", "compacts a conversation", ResponsesBody, ("id", "object", "output")),
    Operation("GET", "/v1/responses/{response}", "a stored response", None, _RESPONSE),
    Operation("DELETE", "/v1/responses/{response}", "deletes a stored response", None, ("id", "object", "deleted")),
    Operation("GET", "/v1/responses/{response}/input_items", "a response's input items", None, ("object", "data")),
    Operation("POST", "/v1/messages", "Anthropic's messages", MessagesBody, _MESSAGE, True),
    Operation("POST", "/v1/messages/count_tokens", "tokens a message would have", CountBody, ("input_tokens",)),
    Operation("POST", "/v1/compact", "Morph's compact", CompactBody, ("id", "output", "messages", "usage", "model")),
    Operation("GET", "/v1/models", "the names served", None, ("object", "data", "has_more", "first_id", "last_id")),
    Operation("GET", "/v1/models/{model}", "one of the names served", None, ("id", "object", "type", "created_at")),
    Operation("POST", "/tokenize", "a text's tokens, or a conversation's", TokenizeBody, ("count", "tokens")),
    Operation("POST", "/detokenize", "the text of tokens", DetokenizeBody, ("prompt", "content")),
    Operation("GET", "/tokenizer_info", "the tokenizer's markers and template", None, ("eos_token", "chat_template")),
    Operation("GET", "/health", "200 while requests are accepted", None, ("status",)),
    Operation("GET", "/metrics", "metrics in Prometheus' format", None, ()),
    Operation("GET", "/openapi.json", "this document", None, ("openapi", "paths")),
    Operation("GET", "/", "the server's name and model; the status page for browsers", None, ("name", "model")),
    Operation("GET", "/live", "events for the status page", None, (), True),
    Operation("GET", "/api/hello", "the server's name and model", None, ("name", "model")),
)


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    bodies = [each.body for each in OPERATIONS if each.body is not None]
    structs: list[type[Struct]] = [*bodies, OpenAIError, AnthropicError]
    references, schemas = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    known = dict(zip(structs, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for each in OPERATIONS:
        paths.setdefault(each.path, {})[each.method.lower()] = _described(each, known)
    schemes = {"bearer": {"type": "http", "scheme": "bearer"}, "key": {"type": "apiKey", "in": "header"}}
    schemes["key"]["name"] = "x-api-key"
    return {
        "openapi": "3.1.0",
        "info": {"title": "Paceline", "version": paceline.__version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": schemes},
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _described(operation: Operation, known: dict[type[Struct], dict[str, Any]]) -> dict[str, Any]:
    described: dict[str, Any] = {"summary": operation.summary, "responses": _responses(operation, known)}
    if names := re.findall(r"{(\w+)}", operation.path):
        given = {"in": "path", "required": True, "schema": {"type": "string"}}
        described["parameters"] = [{"name": each, **given} for each in names]
    if operation.body is not None:
        content = {"application/json": {"schema": known[operation.body]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _responses(operation: Operation, known: dict[type[Struct], dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if operation.reply:
        fields = {"type": "object", "required": list(operation.reply)}
        content = {"application/json": {"schema": fields}}
    if operation.streams:
        content["text/event-stream"] = {}
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": content}}
    if operation.path == "/health":
        responses["503"] = {"description": "starting, draining, stopped or crashed", "content": content}
    if operation.body is not None or "{" in operation.path:
        anthropic = error_format_for(operation.path) is ANTHROPIC
        error = {"application/json": {"schema": known[AnthropicError if anthropic else OpenAIError]}}
        for status, words in {**_ERRORS, (529 if anthropic else 429): _OVERLOADED}.items():
            responses[str(status)] = {"description": words, "content": error}
    return responses
