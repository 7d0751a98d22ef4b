"""The sampling fields that OpenAI's endpoints share, including those of other servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from msgspec import Struct

from paceline.errors import BadField, RequestError
from paceline.serve.service import PreparedRequest, Service
from paceline.serve.unsupported import UnsupportedFields
from paceline.types import Sampling

_DEFAULTED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NAMES = {"stop_tokens": "stop_token_ids"}
_SEED_LIMIT = 1 << 63


class StreamOptions(Struct):
    include_usage: bool = False


class SamplingBody(UnsupportedFields, kw_only=True):
    """The sampling fields. A field that is null or not sent has the service's default: the generation config's, or greedy."""

    most_choices: ClassVar[int] = 1

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_choices(self) -> int:
        """The number of choices. Raises BadField for more than supported, and for a `best_of` that differs from `n`."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= self.most_choices:
            most = "1 here" if self.most_choices == 1 else f"between 1 and {self.most_choices}"
            raise BadField(f"n must be {most}", "n")
        if self.best_of not in (None, count):
            raise BadField("best_of must be n: all choices are returned", "best_of")
        return count

    def sampling(self, service: Service, logprobs: int | None = None, stop_tokens: tuple[int, ...] = ()) -> Sampling:
        """The body's sampling, whose `max_tokens` the caller still sets.

        Raises RequestError for a value that is out of range or not supported.
        """
        self.refuse_unsupported()
        _ = self.num_choices  # raises for too many
        if self.stream_options is not None and not self.stream:
            raise BadField("stream_options needs stream to be true", "stream_options")
        repeats = [each for each in (self.repetition_penalty, self.repeat_penalty) if each is not None]
        if len(set(repeats)) > 1:
            raise BadField(
                "repeat_penalty is llama.cpp's name for repetition_penalty: send one of them", "repeat_penalty"
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        vocab_size = service.host.vocab_size
        return with_defaults(
            service,
            {"repetition_penalty": "repeat_penalty"} if self.repetition_penalty is None else {},
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=repeats[0] if repeats else None,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_checked_bias(self.logit_bias or {}, vocab_size),
            seed=self.seed,
            max_tokens=max(self.min_tokens or 0, 1),
            min_tokens=self.min_tokens,
            stop=tuple(stops),
            stop_tokens=(*stop_tokens, *_stop_tokens(self.stop_token_ids or (), vocab_size)),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            grammar=self.constraint,
        )


def with_defaults(service: Service, names: Mapping[str, str], /, **given: Any) -> Sampling:
    """A request's sampling, with `service.defaults` for the values that are None.

    Temperature 0 is greedy, to which no default is added. Raises BadField for a value out of range, under the client's name
    of the field: `names` maps the fields of Sampling that the client names differently.
    """
    said = {name: value for name, value in given.items() if value is not None}
    if said.get("temperature") != 0:
        said = {name: getattr(service.defaults, name) for name in _DEFAULTED} | said
    # -1 is off in vLLM and llama.cpp
    said["top_k"] = min(max(said.get("top_k", 0), 0), service.host.vocab_size)
    try:
        return Sampling(**said)
    except RequestError as error:
        field, _, reason = str(error).partition(" ")
        name = {**_NAMES, **names}.get(field, field)
        raise BadField(f"{name} {reason}", name) from error


def choice_requests(prepared: PreparedRequest, count: int) -> list[PreparedRequest]:
    """The requests of `count` choices. With a seed, each choice has a seed of its own, so that they differ reproducibly.

    Only the first one has the prompt's log-probabilities.
    """
    choices, first = [prepared], prepared.request.sampling
    for index in range(1, count):
        seed = None if first.seed is None else (first.seed + _SEED_LIMIT + index) % (2 * _SEED_LIMIT) - _SEED_LIMIT
        sampling = dataclasses.replace(first, prompt_logprobs=None, seed=seed)
        choices.append(dataclasses.replace(prepared, request=dataclasses.replace(prepared.request, sampling=sampling)))
    return choices


def checked_limit(value: int | None, field: str) -> int | None:
    if value is not None and value < 1:
        raise BadField(f"{field} must be 1 or more", field)
    return value


def _checked_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    tokens: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise BadField(f"logit_bias: {key[:20]!r} is not a token of the vocabulary of {vocab_size}", "logit_bias")
        tokens[int(key)] = value
    return tokens


def _stop_tokens(tokens: list[int] | tuple[int, ...], vocab_size: int) -> list[int]:
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise BadField(
                f"stop_token_ids: {str(token)[:20]} is not a token of the vocabulary of {vocab_size}",
                f"stop_token_ids[{index}]",
            )
    return list(tokens)
