"""POST /v1/completions, in OpenAI's form: text to continue, or a gap to fill."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField
from paceline.models.tokenizer import Tokenizer
from paceline.serve.sampling import SamplingBody, checked_limit
from paceline.serve.service import Answer, Service, aside_if_long, usage_of
from paceline.serve.tools import PlainParser, Text
from paceline.serve.wire import OPENAI, event, read_body, written
from paceline.types import FinishReason, Request, Sampling, TokenLogprob

_FILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_FILL_ENDS = (*_FILL, "<|fim_pad|>", "<|endoftext|>", "<|repo_name|>", "<|file_sep|>")
_DEFAULT_LIMIT = 16  # OpenAI's


class CompletionBody(SamplingBody, kw_only=True):
    prompt: str | list[int | str | list[int]] = ""
    suffix: str | None = None
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None


async def completions(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, CompletionBody, service.body_limit)
    service.check_model(body.model)
    if body.echo or (body.best_of or 1) != 1:
        raise BadField("echo and best_of are not supported", "echo" if body.echo else "best_of")
    tokenizer = service.host.tokenizer
    specials = tokenizer.special_tokens
    ends = tuple(specials[each] for each in _FILL_ENDS if each in specials) if body.suffix is not None else ()
    sampling = body.sampling(body.logprobs, tokenizer.vocab_size, ends)
    request = await aside_if_long(http, _request, service, body, sampling)
    request = dataclasses.replace(request, namespace=service.namespace(http, body.cache_salt))
    answer = await service.start(request, PlainParser())
    return await written(http, _Writer(body, answer, tokenizer), bool(body.stream), OPENAI, answer.close)


def _request(service: Service, body: CompletionBody, sampling: Sampling) -> Request:
    prompt = _prompt(service.host.tokenizer, body)
    limit = checked_limit(body.max_tokens, "max_tokens")
    return Request(prompt, service.fit(prompt, sampling, _DEFAULT_LIMIT if limit is None else limit))


def _prompt(tokenizer: Tokenizer, body: CompletionBody) -> list[int]:
    """The prompt's tokens; with a suffix, prefix and suffix between the model's fill-in-the-middle tokens."""
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) != 1:
            raise BadField("one prompt a request", "prompt")
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not all(isinstance(each, int) for each in prompt):
            raise BadField("a prompt is one text or one list of tokens", "prompt")
        if body.suffix is not None:
            raise BadField("a suffix needs a prompt that is text", "suffix")
        return prompt
    if body.suffix is None:
        return tokenizer.encode(prompt, allow_special=True)
    if any(each not in tokenizer.special_tokens for each in _FILL):
        raise BadField("this model has no fill-in-the-middle tokens, so suffix is not supported", "suffix")
    before, between, after = (tokenizer.special_tokens[each] for each in _FILL)
    return [before, *tokenizer.encode(prompt), between, *tokenizer.encode(body.suffix), after]


class _Writer:
    def __init__(self, body: CompletionBody, answer: Answer, tokenizer: Tokenizer) -> None:
        self._body = body
        self._answer = answer
        self._tokenizer = tokenizer
        self._offset = 0
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> dict[str, Any]:
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        async for events, values in self._answer.pieces():
            texts += [each.text for each in events if isinstance(each, Text)]
            logprobs += values
        choice = self._choice("".join(texts), logprobs, self._reason())
        return {**self._head, "choices": [choice], "usage": usage_of(self._answer.usage)}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async for events, values in self._answer.pieces():
            text = "".join(each.text for each in events if isinstance(each, Text))
            yield event({**self._head, "choices": [self._choice(text, values, None)]})
        yield event({**self._head, "choices": [self._choice("", (), self._reason())]})
        if self._body.wants_usage:
            yield event({**self._head, "choices": [], "usage": usage_of(self._answer.usage)})
        yield b"data: [DONE]\n\n"

    def _reason(self) -> str:
        return "length" if self._answer.finish is FinishReason.LENGTH else "stop"

    def _choice(
        self, text: str, logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...], reason: str | None
    ) -> dict[str, Any]:
        shown = self._logprobs(logprobs) if self._body.logprobs is not None else None
        return {"index": 0, "text": text, "logprobs": shown, "finish_reason": reason}

    def _logprobs(self, values: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any]:
        offsets = []
        for each in values:
            offsets.append(self._offset)
            self._offset += len(self._text(each.token))
        return {
            "tokens": [self._text(each.token) for each in values],
            "token_logprobs": [each.logprob for each in values],
            "top_logprobs": [{self._text(token): value for token, value in each.top} for each in values],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")
