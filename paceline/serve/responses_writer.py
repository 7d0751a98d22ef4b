"""Answers in the format of the Responses API: a response as one object or as its streaming events."""

from __future__ import annotations

import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import PacelineError, RequestError
from paceline.models.tokenizer import Tokenizer
from paceline.serve.custom_tools import input_of
from paceline.serve.responses_input import Reasoning, ResponsesBody, ResponsesTools
from paceline.serve.service import Answer, merge_adjacent, openai_logprob
from paceline.serve.tools import Call, Event, ReasoningText, Text
from paceline.serve.wire import event
from paceline.types import FinishReason, Sampling, TokenLogprob

StoreResponse = Callable[[dict[str, Any]], None]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def responses_usage(num_input: int, num_output: int, num_cached: int = 0, num_reasoning: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": 0},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": num_reasoning},
        "total_tokens": num_input + num_output,
    }


class ResponseWriter(ABC):
    """Writes a response. The whole response is that of its last event; `store_response`, if given, stores it before it is
    sent.
    """

    def __init__(
        self, body: ResponsesBody, sampling: Sampling, model: str, store_response: StoreResponse | None
    ) -> None:
        self._body = body
        self._sampling = sampling
        self._model = model
        self._store_response = store_response
        self._identity = new_id("resp")
        self._created = int(time.time())
        self._output: list[dict[str, Any]] = []
        self._number = 0

    @abstractmethod
    def _events(self) -> AsyncGenerator[dict[str, Any], None]: ...

    async def whole(self) -> dict[str, Any]:
        last: dict[str, Any] = {}
        async with contextlib.aclosing(self._events()) as events:
            async for each in events:
                last = each
        return last["response"]

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(self._events()) as events:
                async for each in events:
                    yield event(each, each["type"])
        except PacelineError as error:
            # clients retry on server_error
            code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
            self._store_response = None
            failed = self._response("failed", error={"code": code, "message": str(error)})
            yield event(self._event("response.failed", response=failed), "response.failed")

    def _begin_all(self) -> Iterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def _end_all(self, status: str, usage: dict[str, Any]) -> dict[str, Any]:
        response = self._response(status, usage)
        if self._store_response is not None:
            self._store_response(response)
        return self._event(f"response.{status}", response=response)

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        return self._event("response.output_item.added", output_index=len(self._output), item=item)

    def _done(self, item: dict[str, Any]) -> dict[str, Any]:
        self._output.append(item)
        return self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)

    def _event(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _response(
        self, status: str, usage: dict[str, Any] | None = None, error: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """The response object with the output so far."""
        body, sampling = self._body, self._sampling
        text: dict[str, Any] = {"format": {"type": "text"}}
        if body.text is not None and body.text.format is not None:
            text["format"] = body.text.format.shown
        if body.text is not None and body.text.verbosity:
            text["verbosity"] = body.text.verbosity
        return {
            "id": self._identity,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.limit,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": body.reasoning or Reasoning(),
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self._store_response is not None,
            "temperature": sampling.temperature,
            "text": text,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools,
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "truncation": body.truncation or "disabled",
            "usage": usage,
        }


class ReadyResponseWriter(ResponseWriter):
    """Writes a response whose output items are already complete."""

    def __init__(
        self,
        body: ResponsesBody,
        sampling: Sampling,
        model: str,
        store_response: StoreResponse | None,
        items: Sequence[dict[str, Any]],
        usage: dict[str, Any],
    ) -> None:
        super().__init__(body, sampling, model, store_response)
        self._items = items
        self._usage = usage

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        for each in self._begin_all():
            yield each
        for item in self._items:
            yield self._added(item)
            yield self._done(item)
        yield self._end_all("completed", self._usage)


@dataclass(frozen=True)
class _ItemFormat:
    """How text of one kind is written: the types of its item and part, its events' prefix, and the prefix of its id."""

    item: str
    part: str
    stem: str
    identity: str

    def content(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        extras = {"annotations": [], "logprobs": logprobs} if self is _MESSAGE else {}
        return {"type": self.part, "text": text, **extras}


_MESSAGE = _ItemFormat("message", "output_text", "response.output_text", "msg")
_REASONING = _ItemFormat("reasoning", "reasoning_text", "response.reasoning_text", "rs")
_FORMATS: dict[type, _ItemFormat] = {Text: _MESSAGE, ReasoningText: _REASONING}


@dataclass
class _OpenItem:
    """An output item under construction, to which text is added."""

    form: _ItemFormat
    identity: str
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def content(self) -> dict[str, Any]:
        return self.form.content("".join(self.texts), self.logprobs)

    def item(self, status: str, *content: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {"role": "assistant"} if self.form is _MESSAGE else {"summary": []}
        return {"id": self.identity, "type": self.form.item, "status": status, **own, "content": list(content)}


class GeneratedResponseWriter(ResponseWriter):
    """Writes a response that the model generates."""

    def __init__(
        self,
        body: ResponsesBody,
        tools: ResponsesTools,
        answer: Answer,
        tokenizer: Tokenizer,
        model: str,
        store_response: StoreResponse | None,
    ) -> None:
        super().__init__(body, answer.stream.request.sampling, model, store_response)
        self._tools = tools
        self._answer = answer
        self._open_item: _OpenItem | None = None
        self._logprobs = TextLogprobs(tokenizer)

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        for each in self._begin_all():
            yield each
        async for events, logprobs in self._answer.pieces():
            split = self._logprobs.split(merge_adjacent(events), logprobs)
            for one, values in split:
                for each in self._call(one) if isinstance(one, Call) else self._add(one, values):
                    yield each
        status = "incomplete" if self._answer.finish is FinishReason.LENGTH else "completed"
        if not self._output and self._open_item is None:
            for each in self._begin(_MESSAGE):  # an empty reply is an empty message, which the next prompt contains
                yield each
        for each in self._end(status):
            yield each
        usage = self._answer.usage
        yield self._end_all(
            status,
            responses_usage(
                usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, self._answer.reasoning_tokens
            ),
        )

    def _add(self, each: Text | ReasoningText, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Adds text to the open item, or to a new one if the open item is of another kind."""
        form = _FORMATS[type(each)]
        if self._open_item is None or self._open_item.form is not form:
            yield from self._end()
            yield from self._begin(form)
        assert self._open_item is not None
        self._open_item.texts.append(each.text)
        self._open_item.logprobs += logprobs
        yield self._text_event("delta", logprobs, delta=each.text)

    def _begin(self, form: _ItemFormat) -> Iterator[dict[str, Any]]:
        self._open_item = _OpenItem(form, new_id(form.identity))
        yield self._added(self._open_item.item("in_progress"))
        yield self._part_event("added", self._open_item)

    def _end(self, status: str = "completed") -> Iterator[dict[str, Any]]:
        """Closes the open item, if there is one."""
        if self._open_item is None:
            return
        yield self._text_event("done", self._open_item.logprobs, text="".join(self._open_item.texts))
        yield self._part_event("done", self._open_item)
        item, self._open_item = self._open_item.item(status, self._open_item.content), None
        yield self._done(item)

    def _call(self, each: Call) -> Iterator[dict[str, Any]]:
        """A call's item, added and done at once, as the parser emits complete calls."""
        yield from self._end()
        tool = self._tools.client_tool(each.name)
        kind, prefix, name, stem = (
            ("custom_tool_call", "ctc", "input", "response.custom_tool_call_input")
            if tool.custom
            else ("function_call", "fc", "arguments", "response.function_call_arguments")
        )
        value = input_of(each.arguments) if tool.custom else each.arguments
        head = {"id": new_id(prefix), "type": kind, "call_id": new_id("call"), "name": tool.name}
        if tool.namespace:
            head["namespace"] = tool.namespace
        place: dict[str, Any] = {"item_id": head["id"], "output_index": len(self._output)}
        yield self._added({**head, name: "", "status": "in_progress"})
        yield self._event(f"{stem}.delta", **place, delta=value)
        more = {} if tool.custom else {"name": tool.name}
        yield self._event(f"{stem}.done", **place, **more, **{name: value})
        yield self._done({**head, name: value, "status": "completed"})

    def _part_event(self, name: str, item: _OpenItem) -> dict[str, Any]:
        return self._event(f"response.content_part.{name}", **self._place(item), part=item.content)

    def _text_event(self, name: str, logprobs: list[dict[str, Any]], **fields: str) -> dict[str, Any]:
        assert self._open_item is not None
        more: dict[str, Any] = {"logprobs": logprobs} if self._open_item.form is _MESSAGE else {}
        return self._event(f"{self._open_item.form.stem}.{name}", **self._place(self._open_item), **fields, **more)

    def _place(self, item: _OpenItem) -> dict[str, Any]:
        return {"item_id": item.identity, "output_index": len(self._output), "content_index": 0}


class TextLogprobs:
    """Assigns tokens' log-probabilities to an answer's text. Those of reasoning, calls and markers are dropped."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[TokenLogprob] = []

    def split(self, events: list[Event], logprobs: Sequence[TokenLogprob]) -> list[tuple[Event, list[dict[str, Any]]]]:
        """The events of a step, each with the log-probabilities of its text's tokens.

        Log-probabilities whose text has not been emitted yet are kept for a later call.
        """
        self._waiting += logprobs
        if not self._waiting:
            return [(each, []) for each in events]
        split = []
        for index, each in enumerate(events):
            matched: list[TokenLogprob] = []
            if isinstance(each, Text):
                matched, self._waiting = self._take(each.text.encode())
            elif index + 1 == len(events):
                self._waiting = []
            split.append((each, [openai_logprob(self._tokenizer, value) for value in matched]))
        return split

    def _take(self, text: bytes) -> tuple[list[TokenLogprob], list[TokenLogprob]]:
        """(the waiting tokens that form the text, the tokens after them).

        Text that is not found, because it replaces bytes that are not UTF-8, takes all waiting tokens.
        """
        parts = [self._tokenizer.token_bytes(each.token) for each in self._waiting]
        start = b"".join(parts).find(text)
        if start < 0:
            return self._waiting, []
        matched: list[TokenLogprob] = []
        end = 0
        for index, part in enumerate(parts):
            begin, end = end, end + len(part)
            if begin >= start + len(text):
                return matched, self._waiting[index:]
            if end > start:
                matched.append(self._waiting[index])
        return matched, []
