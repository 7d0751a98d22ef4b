"""POST /v1/completions, OpenAI's completions API: continues texts, or fills in the middle."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar, NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from paceline.errors import BadField, EmptyPrompt
from paceline.models.tokenizer import Tokenizer
from paceline.serve.choices import Choices
from paceline.serve.sampling import SamplingBody, checked_limit, choice_requests
from paceline.serve.service import LEAST_LOGPROB, PreparedRequest, Service, openai_usage, run_in_worker_thread_if_large
from paceline.serve.tools import Text
from paceline.serve.wire import OPENAI, answer_response, event, read_body
from paceline.types import FinishReason, Request, TokenLogprob

_FIM_MARKERS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
_FIM_END_MARKERS = (*_FIM_MARKERS, "<|fim_pad|>", "<|endoftext|>", "<|repo_name|>", "<|file_sep|>")
_DEFAULT_LIMIT = 16  # OpenAI's
_MOST_PROMPTS = 128  # bounds the prompts of one request
_LogprobRow = tuple[
    str, float | None, dict[str, float] | None, int
]  # token text, log-probability, alternatives, text offset


class CompletionBody(SamplingBody, kw_only=True):
    most_choices: ClassVar[int] = 8

    prompt: str | list[int | str | list[int]] = ""
    suffix: str | None = None
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def generates(self) -> bool:
        """False if only the prompt is requested back (`echo` with `max_tokens` 0), for its log-probabilities."""
        return not (self.echo and self.max_tokens == 0)

    @property
    def limit(self) -> int:
        # the engine runs at least one step
        limit = checked_limit(self.max_tokens, "max_tokens") if self.generates else 1
        return _DEFAULT_LIMIT if limit is None else limit


async def completions(service: Service, http: HttpRequest) -> Response:
    body = await read_body(http, CompletionBody, service.body_limit)
    body.model = service.check_model(body.model)
    prompts, prepared = await run_in_worker_thread_if_large(
        http, _prepare_requests, service, body, service.namespace(http, body.cache_salt)
    )
    starts = [functools.partial(service.start, each) for each in prepared]
    choices = await Choices.begin(starts, body.num_choices, service.host.engine.config.max_batch)
    writer = _Writer(body, prompts, choices, service.host.tokenizer)
    return await answer_response(http, writer, bool(body.stream), OPENAI, choices.close)


class _Prompt(NamedTuple):
    """A prompt's tokens and its text. The first `num_added` tokens were added by the tokenizer and are not in the text."""

    tokens: list[int]
    text: str
    num_added: int = 0


def _prepare_requests(
    service: Service, body: CompletionBody, namespace: str
) -> tuple[list[_Prompt], list[PreparedRequest]]:
    """The prompts and the engine requests: the choices of one prompt are consecutive."""
    specials = service.host.tokenizer.special_tokens
    ends = tuple(specials[each] for each in _FIM_END_MARKERS if each in specials) if body.suffix is not None else ()
    sampling = body.sampling(service, body.logprobs, ends)
    if body.echo:
        sampling = dataclasses.replace(sampling, prompt_logprobs=body.logprobs)
    prompts = _prompts(service, body)
    requests = [
        Request(each.tokens, service.fit(each.tokens, sampling, body.limit), namespace=namespace) for each in prompts
    ]
    count = body.num_choices
    return prompts, [
        one for each in requests for one in choice_requests(PreparedRequest(each, include_end_logprob=True), count)
    ]


def _prompts(service: Service, body: CompletionBody) -> list[_Prompt]:
    """The prompts of the body. Raises BadField for a malformed prompt, EmptyPrompt for one without tokens."""
    given: Any = body.prompt
    one = isinstance(given, str) or not given or all(isinstance(each, int) for each in given)
    prompts = [given] if one else given
    if len(prompts) > _MOST_PROMPTS:
        raise BadField(f"a request can have at most {_MOST_PROMPTS} prompts", "prompt")
    vocab_size = service.host.vocab_size
    found = []
    for index, prompt in enumerate(prompts):
        field = "prompt" if one else f"prompt[{index}]"
        if isinstance(prompt, int):
            raise BadField("a prompt must be a text or a list of tokens; several prompts a list of these", field)
        read = _prompt(service.host.tokenizer, prompt, body)
        if not read.tokens:
            raise EmptyPrompt(f"{field} has no tokens")
        if not 0 <= min(read.tokens) <= max(read.tokens) < vocab_size:
            raise BadField(f"{field} has a token outside the vocabulary of {vocab_size}", field)
        found.append(read)
    return found


def _prompt(tokenizer: Tokenizer, prompt: str | list[int], body: CompletionBody) -> _Prompt:
    """Encodes a prompt. With a suffix, prefix and suffix are put between the model's fill-in-the-middle tokens."""
    if body.suffix is not None and (body.echo or not isinstance(prompt, str)):
        raise BadField("suffix needs a prompt that is text, and is not supported with echo", "suffix")
    if not isinstance(prompt, str):
        return _Prompt(prompt, tokenizer.decode(prompt, skip_special=False) if body.echo else "")
    if body.suffix is None:
        plain = functools.partial(tokenizer.encode, prompt, allow_special=True)
        if body.add_special_tokens is False or not tokenizer.bos_tokens:
            return _Prompt(plain(), prompt)
        tokens = tokenizer.encode_prompt(prompt)
        return _Prompt(tokens, prompt, len(tokens) - len(plain()))
    if any(each not in tokenizer.special_tokens for each in _FIM_MARKERS):
        raise BadField("this model has no fill-in-the-middle tokens, so suffix is not supported", "suffix")
    before, between, after = (tokenizer.special_tokens[each] for each in _FIM_MARKERS)
    return _Prompt([before, *tokenizer.encode(prompt), between, *tokenizer.encode(body.suffix), after], "")


class _Writer:
    """Writes answers as one completion or as its streaming chunks. With `echo` each answer begins with its prompt."""

    def __init__(
        self, body: CompletionBody, prompts: Sequence[_Prompt], choices: Choices, tokenizer: Tokenizer
    ) -> None:
        self._body = body
        self._prompts = prompts
        self._choices = choices
        self._size = body.num_choices
        self._tables = [_LogprobTable(tokenizer) for _ in range(len(choices))]
        self._echoed = [not body.echo] * len(choices)
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    async def whole(self) -> dict[str, Any]:
        texts: list[list[str]] = [[] for _ in range(len(self._choices))]
        rows: list[list[_LogprobRow]] = [[] for _ in texts]
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, text, more in pieces:
                texts[index].append(text)
                rows[index] += more
        choices = [
            self._choice(index, "".join(each), rows[index], self._reason(index)) for index, each in enumerate(texts)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(self._pieces()) as pieces:
            async for index, text, rows in pieces:
                yield event({**self._head, "choices": [self._choice(index, text, rows, None)]})
        for index in range(len(self._choices)):
            yield event({**self._head, "choices": [self._choice(index, "", [], self._reason(index))]})
        if self._body.wants_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[tuple[int, str, list[_LogprobRow]], None]:
        """Yields (choice, text, its tokens' log-probabilities); the echoed prompt of a choice comes before its output."""
        async with contextlib.aclosing(self._choices.pieces()) as pieces:
            async for index, events, values in pieces:
                if not self._echoed[index]:
                    yield self._echo(index)
                if self._body.generates:
                    text = "".join(each.text for each in events if isinstance(each, Text))
                    yield index, text, [self._tables[index].row(each) for each in values]
        for index, echoed in enumerate(self._echoed):
            if not echoed:  # the output had no text
                yield self._echo(index)

    def _echo(self, index: int) -> tuple[int, str, list[_LogprobRow]]:
        self._echoed[index] = True
        prompt, table = self._prompts[index // self._size], self._tables[index]
        if self._body.logprobs is None:
            return index, prompt.text, []
        values = self._choices[index - index % self._size].prompt_logprobs
        rows = [table.prompt_row(prompt.tokens[0], None, not prompt.num_added)]
        rows += [table.prompt_row(each.token, each, place >= prompt.num_added) for place, each in enumerate(values, 1)]
        return index, prompt.text, rows

    def _reason(self, index: int) -> str:
        ended = self._body.generates and self._choices[index].finish is not FinishReason.LENGTH
        return "stop" if ended else "length"

    def _usage(self) -> dict[str, Any]:
        usage = self._choices.usage
        return openai_usage(usage if self._body.generates else dataclasses.replace(usage, output_tokens=0))

    def _choice(self, index: int, text: str, rows: list[_LogprobRow], reason: str | None) -> dict[str, Any]:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        shown = {name: [row[column] for row in rows] for column, name in enumerate(names)}
        logprobs = None if self._body.logprobs is None else shown
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class _LogprobTable:
    """Writes the log-probabilities of a text's tokens in OpenAI's completions format.

    The alternatives of a token include the token itself, as OpenAI's do: one more than requested if it is not among the
    best. Offsets are in characters; a token that begins within a character has the offset of the next one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def row(self, value: TokenLogprob) -> _LogprobRow:
        """The row of an output token. Control tokens are not part of the output's text."""
        return self._row(value.token, value, self._tokenizer.text_bytes(value.token))

    def prompt_row(self, token: int, value: TokenLogprob | None, in_text: bool) -> _LogprobRow:
        """The row of a prompt token. The first token has no probability; added tokens (not `in_text`) have no text."""
        return self._row(token, value, self._tokenizer.token_bytes(token) if in_text else b"")

    def _row(self, token: int, value: TokenLogprob | None, data: bytes) -> _LogprobRow:
        offset = self._offset
        self._offset += len(self._decoder.decode(data))
        if value is None:
            return self._text(token), None, None, offset
        top: dict[str, float] = {}
        for each, logprob in (*value.top, (token, value.logprob)):  # of two tokens with the same text, the better one
            top.setdefault(self._text(each), max(logprob, LEAST_LOGPROB))
        return self._text(token), max(value.logprob, LEAST_LOGPROB), top, offset

    def _text(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")
