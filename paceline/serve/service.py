"""The service that all handlers share, and the processing of one request's output into text, reasoning and tool calls."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from paceline.errors import BadField, ContextExceeded, UnknownModel
from paceline.models.tokenizer import Tokenizer
from paceline.serve.constrain import AllowedCalls, check_schemas, output_grammar
from paceline.serve.host import Host, Stream
from paceline.serve.live_stats import LiveStats
from paceline.serve.metrics import Metrics
from paceline.serve.request_log import attach_stream
from paceline.serve.store import Store
from paceline.serve.tools import (
    Call,
    Event,
    Parser,
    PlainParser,
    ReasoningParser,
    ReasoningText,
    Text,
    has_reasoning,
    parser_for,
)
from paceline.serve.tools.reasoning import BEGIN, END
from paceline.types import FinishReason, Request, Sampling, TokenLogprob, Usage

Returned = TypeVar("Returned")
_workers = ThreadPoolExecutor(2, "paceline-worker")
MORPH_MODELS = ("morph-v3-fast", "morph-v3-large", "auto")
LEAST_LOGPROB = -9999.0  # replaces minus infinity, which JSON does not have; vLLM's value
TENANT_KEY = "paceline.tenant"  # key in an ASGI scope: the digest of the client's API key
# A body up to this size is encoded on the event loop. The bound keeps others' delay small; its effect on the time to first
# token is measured by `python -m benchmarks.serve`.
_SMALL_BODY_BYTES = 2048
_REASONING_WINDOW = 32  # tokens at a prompt's end that are searched for a reasoning marker


@dataclass(frozen=True)
class PreparedRequest:
    """A request for the engine, with the parser of its output and the tool calls that the output may have.

    The log-probability of the token that ended the output is left out, as its text is, unless `include_end_logprob`.
    """

    request: Request
    parser: Callable[[], Parser] = PlainParser
    calls: AllowedCalls = field(default_factory=lambda: AllowedCalls({}))
    include_end_logprob: bool = False


@dataclass(frozen=True)
class Service:
    """The engine's host with the server's settings and shared state.

    `names` are the served model names, the model's own first. `apply_names` are the model names of Morph's apply. With
    `share_cache`, clients with different keys share cached prefixes. `defaults` is the sampling of requests that do not
    set it. `created` is in seconds since 1970. A request's body has at most `body_limit` bytes and must arrive within
    `body_seconds`. Web pages of `origins` may use the server.
    """

    host: Host
    metrics: Metrics
    names: tuple[str, ...]
    apply_names: tuple[str, ...] = MORPH_MODELS
    keys: tuple[bytes, ...] = ()
    body_limit: int = 32 << 20
    body_seconds: float = 60.0
    created: int = 0
    share_cache: bool = False
    defaults: Sampling = field(default_factory=Sampling)
    origins: tuple[str, ...] = ()
    live_stats: LiveStats = field(default_factory=LiveStats)
    store: Store = field(default_factory=Store)

    def check_model(self, name: str, *prefixes: str) -> str:
        """The model name for the reply: the requested one, or the model's own if the request names none.

        Raises UnknownModel for a name that is not served and does not begin with one of `prefixes`.
        """
        if name and name not in self.names and not name.startswith(prefixes):
            served = ", ".join(self.names)
            raise UnknownModel(f"the model {name[:100]!r} is not served here; served: {served} (see --alias)")
        return name or self.names[0]

    def namespace(self, http: HttpRequest, cache_salt: str | None = None) -> str:
        """The prefix cache namespace of a request: its API key (unless `share_cache`) and its `cache_salt`."""
        key = "" if self.share_cache else str(http.scope.get(TENANT_KEY, ""))
        return f"{key}:{cache_salt or ''}" if key or cache_salt else ""

    def fit(self, prompt: list[int], sampling: Sampling, max_tokens: int | None) -> Sampling:
        """`sampling` with `max_tokens`, limited to the room in the context. Raises ContextExceeded if there is none."""
        room = self.host.capacity - len(prompt)
        if room < 1:
            capacity = self.host.capacity  # Anthropic's wording, then OpenAI's: clients detect the error by either
            raise ContextExceeded(
                f"prompt is too long: {len(prompt)} tokens > {capacity - 1} maximum; "
                f"this model's maximum context length is {capacity} tokens"
            )
        return dataclasses.replace(sampling, max_tokens=room if max_tokens is None else min(max_tokens, room))

    def prepare_request(
        self,
        prompt: list[int],
        sampling: Sampling,
        calls: AllowedCalls,
        max_tokens: int | None,
        sources: tuple[list[int], ...] = (),
        namespace: str = "",
        continued: str = "",
    ) -> PreparedRequest:
        """Builds the engine request, output parser and grammar of an output that may have tool calls, or must.

        `sampling.grammar` constrains the output's text, `sources` are drafted from, `continued` is the text of the message
        that the output continues. May be slow for large schemas. Raises BadField for tools if the model's chat template has
        no call format that is supported.
        """
        check_schemas(calls.schemas)
        tokenizer = self.host.tokenizer
        kind = parser_for(tokenizer.chat_template) if calls.schemas else None
        if calls.schemas and kind is None:
            raise BadField(
                "tools are not supported: this model's chat template has no known format of tool calls", "tools"
            )
        thinking = self._thinking(prompt, continued)
        formatted = sampling.grammar is not None

        def parser() -> Parser:
            answer: Parser = kind(calls.schemas, only_template_format=formatted) if kind else PlainParser()
            if thinking is None:
                return answer
            return ReasoningParser(answer, thinking, continued=thinking and bool(continued))

        grammar = output_grammar(sampling.grammar, calls, kind, tokenizer.special_tokens, thinking)
        if grammar != sampling.grammar:
            sampling = dataclasses.replace(sampling, grammar=grammar)
        request = Request(prompt, self.fit(prompt, sampling, max_tokens), sources, namespace=namespace)
        return PreparedRequest(request, parser, calls)

    def _thinking(self, prompt: Sequence[int], continued: str) -> bool | None:
        """Whether the output begins within reasoning, which the prompt has opened; None for a model without reasoning."""
        tokenizer = self.host.tokenizer
        if not has_reasoning(tokenizer.chat_template):
            return None
        if BEGIN in continued or END in continued:
            return continued.rfind(BEGIN) > continued.rfind(END)
        return tokenizer.decode(prompt[-_REASONING_WINDOW:], skip_special=False).rstrip().endswith(BEGIN)

    async def start(self, prepared: PreparedRequest) -> Answer:
        """Submits a request; returns when the engine has accepted it. The caller closes the answer."""
        stream = await self.host.submit(prepared.request)
        attach_stream(stream)
        return Answer(stream, prepared, self.host.tokenizer)


async def run_in_worker_thread_if_large(
    http: HttpRequest, function: Callable[..., Returned], *arguments: object
) -> Returned:
    """Runs `function` directly if the request's body is small, else in a worker thread.

    A small body delays other requests little, and the thread hand-over would add notably to its time to first token.
    """
    size = http.headers.get("content-length", "")
    if size.isdecimal() and int(size) <= _SMALL_BODY_BYTES:
        return function(*arguments)
    return await run_in_worker_thread(function, *arguments)


async def run_in_worker_thread(function: Callable[..., Returned], *arguments: object) -> Returned:
    """Runs a slow function (chat template, tokenization) in a worker thread, off the event loop.

    There are two workers, first come, first served: each further thread that competes for the interpreter lock delays the
    engine's thread.
    """
    return await asyncio.get_running_loop().run_in_executor(_workers, function, *arguments)


class Answer:
    """One request's output, parsed into events.

    After the first piece, `usage` has the prompt's counts, and `prompt_logprobs` are set if requested. After the last
    piece, `usage` is complete and `finish` and `ended_by_token` are known.

    The output ends with the last call that is allowed. If calls are forced, a repetition of an earlier call also ends it
    and is dropped: a model that is forced to call without anything left to call repeats itself up to the limit.
    """

    def __init__(self, stream: Stream, prepared: PreparedRequest, tokenizer: Tokenizer) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.finish = FinishReason.STOP
        self.usage = Usage()
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._parser = prepared.parser()
        self._include_end_logprob = prepared.include_end_logprob
        self._tokenizer = tokenizer
        self._has_reasoning = False
        self._calls = prepared.calls
        self._num_calls = 0
        self._calls_made: set[tuple[str, str]] = set()
        self._calls_complete = False
        self._num_drafted = self._num_accepted = 0
        self._eos_tokens = frozenset(tokenizer.eos_tokens) | frozenset(stream.request.sampling.stop_tokens)

    async def pieces(self) -> AsyncGenerator[tuple[list[Event], tuple[TokenLogprob, ...]], None]:
        """Yields (events, log-probabilities) of each output that has any."""
        async for output in self.stream:
            self.tokens += output.tokens
            self.usage = output.usage or self.usage
            self.prompt_logprobs = output.prompt_logprobs or self.prompt_logprobs
            self._num_drafted += output.drafted
            self._num_accepted += sum(output.accepted)
            events = self._parser.feed(output.text)
            logprobs = output.logprobs
            if output.finish is not None:
                events += self._parser.finish()
                self.finish = output.finish
                if self.ended_by_token and not self._include_end_logprob:
                    logprobs = logprobs[: len(output.tokens) - 1]
            events = self._until_last_call(events)
            if self._calls_complete:
                self._end(output.finish is not None)
            self._has_reasoning |= any(isinstance(each, ReasoningText) for each in events)
            if events or logprobs:
                yield events, logprobs

    def _until_last_call(self, events: list[Event]) -> list[Event]:
        """The events up to the call that ends the output, all if none does."""
        for place, each in enumerate(events):
            if not isinstance(each, Call):
                continue
            if self._calls.forced:
                key = (each.name, json.dumps(json.loads(each.arguments), sort_keys=True))
                if key in self._calls_made:
                    self._calls_complete = True
                    return events[:place]
                self._calls_made.add(key)
            self._num_calls += 1
            if self._num_calls == self._calls.max_calls:
                self._calls_complete = True
                return events[: place + 1]
        return events

    def _end(self, whole: bool) -> None:
        """Ends the output here. `whole`: the engine has finished already, so that `usage` is complete."""
        self.finish = FinishReason.STOP
        if not whole:
            self.usage = dataclasses.replace(
                self.usage,
                output_tokens=len(self.tokens),
                drafted_tokens=self._num_drafted,
                accepted_tokens=self._num_accepted,
            )
            self.stream.end(self.usage)

    @property
    def ended_by_token(self) -> bool:
        """True if the model ended the output by a token or by a call, False if a stop string or the limit did."""
        ends = self._calls_complete or (bool(self.tokens) and self.tokens[-1] in self._eos_tokens)
        return self.finish is FinishReason.STOP and ends

    @property
    def reasoning_tokens(self) -> int:
        """The number of reasoning tokens, markers included; all tokens if the reasoning did not end."""
        if not self._has_reasoning:
            return 0
        end, text = END.encode(), b""
        for count, token in enumerate(self.tokens, 1):
            text = text[-len(end) :] + self._tokenizer.token_bytes(token)
            if end in text:
                return count
        return len(self.tokens)

    def close(self) -> None:
        self.stream.close()


def merge_adjacent(events: list[Event]) -> list[Event]:
    """The events with adjacent text merged, and adjacent reasoning merged."""
    result: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if kind is Call:
            result += group
        else:
            text = "".join(each.text for each in group if not isinstance(each, Call))
            result.append(ReasoningText(text) if kind is ReasoningText else Text(text))
    return result


def openai_logprob(tokenizer: Tokenizer, value: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability in the format of OpenAI's chat and Responses APIs."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    return {**entry(value.token, value.logprob), "top_logprobs": [entry(*each) for each in value.top]}


def openai_usage(usage: Usage, predicted: bool = False, reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage. With `predicted`, tokens drafted from the request's sources are reported as prediction tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.source_accepted_tokens if predicted else 0,
            "rejected_prediction_tokens": usage.source_rejected_tokens if predicted else 0,
            "reasoning_tokens": reasoning_tokens,
        },
    }
