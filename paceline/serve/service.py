"""What every handler works with, and one request's way from tokens to text and tool calls."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from paceline.errors import BadField, ContextExceeded, UnknownModel
from paceline.serve.host import Host, Stream
from paceline.serve.metrics import Metrics
from paceline.serve.tools import Event, Parser, PlainParser, Text, parser_for
from paceline.types import FinishReason, Request, Sampling, StepOutput, TokenLogprob, Usage

Result = TypeVar("Result")
MORPH_MODELS = ("morph-v3-fast", "morph-v3-large", "auto")


@dataclass(frozen=True)
class Service:
    """`names` are what the model is called, its own name first; `created` is in seconds since 1970."""

    host: Host
    metrics: Metrics
    names: tuple[str, ...]
    keys: tuple[bytes, ...] = ()
    body_limit: int = 32 << 20
    created: int = 0

    def check_model(self, name: str, *prefixes: str) -> None:
        """Raises UnknownModel for a name that is neither the model's, nor begins with one of `prefixes`."""
        if name not in self.names and not name.startswith(prefixes):
            raise UnknownModel(f"the model {name!r} is not served here; served: {', '.join(self.names)} (see --alias)")

    def fit(self, prompt: list[int], sampling: Sampling, max_tokens: int | None) -> Sampling:
        """`sampling` with `max_tokens`, or the room there is where that is less. Raises ContextExceeded without any."""
        room = self.host.capacity - len(prompt)
        if room < 1:
            raise ContextExceeded(f"prompt is too long: {len(prompt)} tokens > {self.host.capacity - 1} maximum")
        return dataclasses.replace(sampling, max_tokens=room if max_tokens is None else min(max_tokens, room))

    def parser(self, tools: Sequence[object]) -> Parser:
        """A parser for what the model writes. Raises BadField where tools are given and no format of calls is known."""
        if not tools:
            return PlainParser()
        kind = parser_for(self.host.tokenizer.chat_template)
        if kind is None:
            raise BadField("this model's chat template teaches no form of tool call that Paceline knows", "tools")
        return kind()

    async def start(self, request: Request, parser: Parser) -> Answer:
        """Submits; returns once the engine has accepted. The caller closes the answer."""
        return Answer(await self.host.submit(request), parser, self.host.tokenizer.eos_tokens)


async def aside(function: Callable[..., Result], *arguments: object) -> Result:
    """Runs what takes long (templates, encoding) beside the event loop."""
    return await asyncio.to_thread(function, *arguments)


class Answer:
    """One request's output. After the last piece `finish`, `usage` and `ended_by_token` are known."""

    def __init__(self, stream: Stream, parser: Parser, eos_tokens: Sequence[int]) -> None:
        self.stream = stream
        self.tokens: list[int] = []
        self.finish = FinishReason.STOP
        self.usage = Usage()
        self._parser = parser
        self._eos_tokens = frozenset(eos_tokens) | frozenset(stream.request.sampling.stop_tokens)

    async def pieces(self) -> AsyncGenerator[tuple[list[Event], tuple[TokenLogprob, ...]], None]:
        """What each step brought. The logprob of a token that ended the output is left out, as its text is."""
        async for output in self.stream:
            self.tokens += output.tokens
            events = self._parser.feed(output.text)
            logprobs = output.logprobs
            if output.finish is not None:
                events += self._parser.finish()
                self._take_end(output)
                if self.ended_by_token:
                    logprobs = logprobs[: len(output.tokens) - 1]
            if events or logprobs:
                yield events, logprobs

    @property
    def ended_by_token(self) -> bool:
        """True where the model ended the output itself, False where a stop string or the limit did."""
        return self.finish is FinishReason.STOP and bool(self.tokens) and self.tokens[-1] in self._eos_tokens

    def close(self) -> None:
        self.stream.close()

    def _take_end(self, output: StepOutput) -> None:
        assert output.finish is not None and output.usage is not None
        self.finish, self.usage = output.finish, output.usage


def joined(events: list[Event]) -> list[Event]:
    """The events with neighbouring texts made one."""
    result: list[Event] = []
    for each in events:
        if isinstance(each, Text) and result and isinstance(result[-1], Text):
            result[-1] = Text(result[-1].text + each.text)
        else:
            result.append(each)
    return result


def usage_of(usage: Usage, predicted: bool = False) -> dict[str, Any]:
    """OpenAI's usage. Drafted tokens are told as prediction tokens where the request came with a prediction."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted_tokens if predicted else 0,
            "rejected_prediction_tokens": usage.rejected_tokens if predicted else 0,
            "reasoning_tokens": 0,
        },
    }
