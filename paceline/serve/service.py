"""What every handler works with, and one request's way from tokens to text and tool calls."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
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
TENANT = "paceline.tenant"  # in an ASGI scope: the key that the client sent, as a digest
_SHORT = 2048  # bytes of a body
_LOOK_BACK = 32  # tokens of a prompt's end in which to see whether it opens reasoning


@dataclass(frozen=True)
class Service:
    """`names` are what the model is called, its own name first, `apply_names` what merges are asked of in Morph's form.

    With `share_cache` clients with different keys find each other's cached prefixes. `defaults` is how the model's makers
    sample from it, for requests that do not say. `created` is in seconds since 1970. A request's body has at most `body_limit` bytes and comes within `body_seconds`.
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
    defaults: Sampling = Sampling()
    live: Live = field(default_factory=Live)

    def check_model(self, name: str, *prefixes: str) -> None:
        """Raises UnknownModel for a name that is neither the model's, nor begins with one of `prefixes`."""
        if name not in self.names and not name.startswith(prefixes):
            raise UnknownModel(f"the model {name!r} is not served here; served: {', '.join(self.names)} (see --alias)")

    def namespace(self, http: HttpRequest, cache_salt: str | None = None) -> str:
        """Whose cached prefixes a request may use: those of its key, where keys are not shared, and of its salt."""
        key = "" if self.share_cache else str(http.scope.get(TENANT, ""))
        return f"{key}:{cache_salt or ''}" if key or cache_salt else ""

    def fit(self, prompt: list[int], sampling: Sampling, max_tokens: int | None) -> Sampling:
        """`sampling` with `max_tokens`, or the room there is where that is less. Raises ContextExceeded without any."""
        room = self.host.capacity - len(prompt)
        if room < 1:
            raise ContextExceeded(f"prompt is too long: {len(prompt)} tokens > {self.host.capacity - 1} maximum")
        return dataclasses.replace(sampling, max_tokens=room if max_tokens is None else min(max_tokens, room))

    async def ask(
        self,
        prompt: list[int],
        sampling: Sampling,
        calls: Calls,
        max_tokens: int | None,
        sources: tuple[list[int], ...] = (),
        namespace: str = "",
    ) -> Answer:
        """Asks for an output that may call tools, or must; `sampling.grammar` is that of its text, `namespace` the
        client's. The caller closes the answer. Raises BadField for tools in a model whose template teaches no form of call that is known.
        """
        check_schemas(calls.schemas)
        tokenizer = self.host.tokenizer
        kind = parser_for(tokenizer.chat_template) if calls.schemas else None
        if calls.schemas and kind is None:
            raise BadField("this model's chat template teaches no form of tool call that Paceline knows", "tools")
        parser = kind(calls.schemas, only_taught=sampling.grammar is not None) if kind else PlainParser()
        thinking = self._thinking(prompt)
        grammar = held(sampling.grammar, calls, kind, tokenizer.special_tokens, thinking)
        if grammar != sampling.grammar:
            sampling = dataclasses.replace(sampling, grammar=grammar)
        request = Request(prompt, self.fit(prompt, sampling, max_tokens), sources, namespace=namespace)
        return await self.start(request, parser if thinking is None else ThoughtParser(parser, thinking))

    def _thinking(self, prompt: Sequence[int]) -> bool | None:
        """Whether the prompt's end opens reasoning; None for a model that knows none."""
        tokenizer = self.host.tokenizer
        if not thinks(tokenizer.chat_template):
            return None
        return tokenizer.decode(prompt[-_LOOK_BACK:], skip_special=False).rstrip().endswith(BEGIN)

    async def start(self, request: Request, parser: Parser) -> Answer:
        """Submits; returns once the engine has accepted. The caller closes the answer."""
        stream = await self.host.submit(request)
        note(stream)
        return Answer(stream, parser, self.host.tokenizer)


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

    After the first piece `usage` tells what the prompt took; after the last one it is whole, and `finish` and
    `ended_by_token` are known.
    """

    def __init__(self, stream: Stream, parser: Parser, tokenizer: Tokenizer) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.finish = FinishReason.STOP
        self.usage = Usage()
        self._parser = parser
        self._tokenizer = tokenizer
        self._thought = False
        self._eos_tokens = frozenset(tokenizer.eos_tokens) | frozenset(stream.request.sampling.stop_tokens)

    async def pieces(self) -> AsyncGenerator[tuple[list[Event], tuple[TokenLogprob, ...]], None]:
        """What each step brought. The logprob of a token that ended the output is left out, as its text is."""
        async for output in self.stream:
            self.tokens += output.tokens
            self.usage = output.usage or self.usage
            events = self._parser.feed(output.text)
            logprobs = output.logprobs
            if output.finish is not None:
                events += self._parser.finish()
                self.finish = output.finish
                if self.ended_by_token:
                    logprobs = logprobs[: len(output.tokens) - 1]
            self._thought |= any(isinstance(each, Thought) for each in events)
            if events or logprobs:
                yield events, logprobs

    @property
    def ended_by_token(self) -> bool:
        """True where the model ended the output itself, False where a stop string or the limit did."""
        return self.finish is FinishReason.STOP and bool(self.tokens) and self.tokens[-1] in self._eos_tokens

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
