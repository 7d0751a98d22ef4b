"""What every handler works with, and one request's way from tokens to text and tool calls."""

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
from paceline.serve.constrain import Calls, check_schemas, held
from paceline.serve.host import Host, Stream
from paceline.serve.journal import note
from paceline.serve.live import Live
from paceline.serve.metrics import Metrics
from paceline.serve.store import Store
from paceline.serve.tools import (
    Call,
    Event,
    Parser,
    PlainParser,
    Text,
    Thought,
    ThoughtParser,
    parser_for,
    thinks,
)
from paceline.serve.tools.thoughts import BEGIN, END
from paceline.types import FinishReason, Request, Sampling, TokenLogprob, Usage

Result = TypeVar("Result")
_aside = ThreadPoolExecutor(2, "aside")
MORPH_MODELS = ("morph-v3-fast", "morph-v3-large", "auto")
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity; vLLM's clients know this one
TENANT = "paceline.tenant"  # in an ASGI scope: the key that the client sent, as a digest
_SHORT = 2048  # bytes of a body
_LOOK_BACK = 32  # tokens of a prompt's end in which to see whether it opens reasoning


@dataclass(frozen=True)
class Asked:
    """What is asked of the engine, how its output is read, and what may be called in it.

    The logprob of a token that ended the output is left out, as its text is, but with `tells_end`.
    """

    request: Request
    parser: Callable[[], Parser] = PlainParser
    calls: Calls = field(default_factory=lambda: Calls({}))
    tells_end: bool = False


@dataclass(frozen=True)
class Service:
    """`names` are what the model is called, its own name first, `apply_names` what merges are asked of in Morph's form.

    With `share_cache` clients with different keys find each other's cached prefixes. `defaults` is how the model's makers
    sample from it, for requests that do not say. `created` is in seconds since 1970. A request's body has at most
    `body_limit` bytes and comes within `body_seconds`. Web pages of `origins` may use the server.
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
    live: Live = field(default_factory=Live)
    store: Store = field(default_factory=Store)

    def check_model(self, name: str, *prefixes: str) -> str:
        """The name that a reply has: the one asked for, or the model's own where none is.

        Raises UnknownModel for a name that is neither the model's, nor begins with one of `prefixes`.
        """
        if name and name not in self.names and not name.startswith(prefixes):
            served = ", ".join(self.names)
            raise UnknownModel(f"the model {name[:100]!r} is not served here; served: {served} (see --alias)")
        return name or self.names[0]

    def namespace(self, http: HttpRequest, cache_salt: str | None = None) -> str:
        """Whose cached prefixes a request may use: those of its key, where keys are not shared, and of its salt."""
        key = "" if self.share_cache else str(http.scope.get(TENANT, ""))
        return f"{key}:{cache_salt or ''}" if key or cache_salt else ""

    def fit(self, prompt: list[int], sampling: Sampling, max_tokens: int | None) -> Sampling:
        """`sampling` with `max_tokens`, or the room there is where that is less. Raises ContextExceeded without any."""
        room = self.host.capacity - len(prompt)
        if room < 1:
            capacity = self.host.capacity  # Anthropic's words, then OpenAI's: clients know what it is by either
            raise ContextExceeded(
                f"prompt is too long: {len(prompt)} tokens > {capacity - 1} maximum; "
                f"this model's maximum context length is {capacity} tokens"
            )
        return dataclasses.replace(sampling, max_tokens=room if max_tokens is None else min(max_tokens, room))

    def asked(
        self,
        prompt: list[int],
        sampling: Sampling,
        calls: Calls,
        max_tokens: int | None,
        sources: tuple[list[int], ...] = (),
        namespace: str = "",
        continued: str = "",
    ) -> Asked:
        """An output that may call tools, or must; `sampling.grammar` is that of its text, `namespace` the client's,
        `continued` the message that the output goes on with. Takes long where schemas are large. Raises BadField for tools
        in a model whose template teaches no form of call that is known.
        """
        check_schemas(calls.schemas)
        tokenizer = self.host.tokenizer
        kind = parser_for(tokenizer.chat_template) if calls.schemas else None
        if calls.schemas and kind is None:
            raise BadField("this model's chat template teaches no form of tool call that Paceline knows", "tools")
        thinking = self._thinking(prompt, continued)
        formatted = sampling.grammar is not None

        def parser() -> Parser:
            answer: Parser = kind(calls.schemas, only_taught=formatted) if kind else PlainParser()
            return answer if thinking is None else ThoughtParser(answer, thinking, begun=thinking and bool(continued))

        grammar = held(sampling.grammar, calls, kind, tokenizer.special_tokens, thinking)
        if grammar != sampling.grammar:
            sampling = dataclasses.replace(sampling, grammar=grammar)
        request = Request(prompt, self.fit(prompt, sampling, max_tokens), sources, namespace=namespace)
        return Asked(request, parser, calls)

    def _thinking(self, prompt: Sequence[int], continued: str) -> bool | None:
        """Whether the prompt's end opens reasoning, or is within it; None for a model that knows none."""
        tokenizer = self.host.tokenizer
        if not thinks(tokenizer.chat_template):
            return None
        if BEGIN in continued or END in continued:
            return continued.rfind(BEGIN) > continued.rfind(END)
        return tokenizer.decode(prompt[-_LOOK_BACK:], skip_special=False).rstrip().endswith(BEGIN)

    async def start(self, asked: Asked) -> Answer:
        """Submits; returns once the engine has accepted. The caller closes the answer."""
        stream = await self.host.submit(asked.request)
        note(stream)
        return Answer(stream, asked, self.host.tokenizer)


async def aside_if_long(http: HttpRequest, function: Callable[..., Result], *arguments: object) -> Result:
    """Runs what makes a prompt of a body: at once where the body is so short that others hardly wait for it, since the way
    aside and back takes a good part of the time to its first text.
    """
    size = http.headers.get("content-length", "")
    if size.isdecimal() and int(size) <= _SHORT:
        return function(*arguments)
    return await aside(function, *arguments)


async def aside(function: Callable[..., Result], *arguments: object) -> Result:
    """Runs what takes long (templates, encoding) beside the event loop.

    Two at a time, in order: each thread more that wants the interpreter makes the engine's wait for it longer.
    """
    return await asyncio.get_running_loop().run_in_executor(_aside, function, *arguments)


class Answer:
    """One request's output.

    After the first piece `usage` tells what the prompt took and `prompt_logprobs` are there, where they were asked for;
    after the last one `usage` is whole, and `finish` and `ended_by_token` are known.

    The last of the calls that it may have ends the output. Where they are forced a call made already ends it, too, and is
    not told: a model that must call, and has nothing more to call, repeats itself up to the limit.
    """

    def __init__(self, stream: Stream, asked: Asked, tokenizer: Tokenizer) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.finish = FinishReason.STOP
        self.usage = Usage()
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._parser = asked.parser()
        self._tells_end = asked.tells_end
        self._tokenizer = tokenizer
        self._thought = False
        self._calls = asked.calls
        self._num_calls = 0
        self._made: set[tuple[str, str]] = set()
        self._called_all = False
        self._num_drafted = self._num_accepted = 0
        self._eos_tokens = frozenset(tokenizer.eos_tokens) | frozenset(stream.request.sampling.stop_tokens)

    async def pieces(self) -> AsyncGenerator[tuple[list[Event], tuple[TokenLogprob, ...]], None]:
        """What each step brought."""
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
                if self.ended_by_token and not self._tells_end:
                    logprobs = logprobs[: len(output.tokens) - 1]
            events = self._wanted(events)
            if self._called_all:
                self._end(output.finish is not None)
            self._thought |= any(isinstance(each, Thought) for each in events)
            if events or logprobs:
                yield events, logprobs

    def _wanted(self, events: list[Event]) -> list[Event]:
        """The events up to the call that ends the output."""
        for place, each in enumerate(events):
            if not isinstance(each, Call):
                continue
            if self._calls.forced:
                key = (each.name, json.dumps(json.loads(each.arguments), sort_keys=True))
                if key in self._made:
                    self._called_all = True
                    return events[:place]
                self._made.add(key)
            self._num_calls += 1
            if self._num_calls == self._calls.most:
                self._called_all = True
                return events[: place + 1]
        return events

    def _end(self, whole: bool) -> None:
        """Stops here; `whole` tells that the engine has stopped already, and what was used."""
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
        """True where the model ended the output itself, or by a call, False where a stop string or the limit did."""
        ends = self._called_all or (bool(self.tokens) and self.tokens[-1] in self._eos_tokens)
        return self.finish is FinishReason.STOP and ends

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens were reasoning, its markers among them; all of them where it did not end."""
        if not self._thought:
            return 0
        end, text = END.encode(), b""
        for count, token in enumerate(self.tokens, 1):
            text = text[-len(end) :] + self._tokenizer.token_bytes(token)
            if end in text:
                return count
        return len(self.tokens)

    def close(self) -> None:
        self.stream.close()


def joined(events: list[Event]) -> list[Event]:
    """The events with neighbours made one where both are text or both are reasoning."""
    result: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        if kind is Call:
            result += group
        else:
            text = "".join(each.text for each in group if not isinstance(each, Call))
            result.append(Thought(text) if kind is Thought else Text(text))
    return result


def logprob_of(tokenizer: Tokenizer, value: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability in the form of OpenAI's chats and responses."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    return {**told(value.token, value.logprob), "top_logprobs": [told(*each) for each in value.top]}


def usage_of(usage: Usage, predicted: bool = False, reasoning_tokens: int = 0) -> dict[str, Any]:
    """OpenAI's usage. Tokens drafted from the request's source are told as prediction tokens where that is a prediction."""
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
