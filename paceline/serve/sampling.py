"""The sampling fields that OpenAI's endpoints share, with those of other servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from msgspec import Struct

from paceline.errors import BadField, RequestError
from paceline.serve.service import Asked, Service
from paceline.serve.unserved import Unserved
from paceline.types import Sampling

_DEFAULTED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_NAMES = {"stop_tokens": "stop_token_ids"}
_SEEDS = 1 << 63


class StreamOptions(Struct):
    include_usage: bool = False


class SamplingBody(Unserved, kw_only=True):
    """Fields that are not sent, or null, are the service's defaults: how the model's makers sample from it, or greedy."""

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
        """Raises BadField for more than there can be, and for more that are looked at than are given."""
        count = 1 if self.n is None else self.n
        if not 1 <= count <= self.most_choices:
            most = "1 here" if self.most_choices == 1 else f"between 1 and {self.most_choices}"
            raise BadField(f"n must be {most}", "n")
        if self.best_of not in (None, count):
            raise BadField("best_of must be n: all choices are given", "best_of")
        return count

    def sampling(self, service: Service, logprobs: int | None = None, stop_tokens: tuple[int, ...] = ()) -> Sampling:
        """Raises RequestError for a value out of range or not supported; `max_tokens` is still to be set."""
        self.refuse_unserved()
        _ = self.num_choices  # which may be too many
        if self.stream_options is not None and not self.stream:
            raise BadField("stream_options needs stream to be true", "stream_options")
        repeats = [each for each in (self.repetition_penalty, self.repeat_penalty) if each is not None]
        if len(set(repeats)) > 1:
            raise BadField(
                "repeat_penalty is llama.cpp's name of repetition_penalty: send one of them", "repeat_penalty"
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or ()
        vocab_size = service.host.vocab_size
        return defaulted(
            service,
            {"repetition_penalty": "repeat_penalty"} if self.repetition_penalty is None else {},
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=repeats[0] if repeats else None,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=_bias(self.logit_bias or {}, vocab_size),
            seed=self.seed,
            max_tokens=max(self.min_tokens or 0, 1),
            min_tokens=self.min_tokens,
            stop=tuple(stops),
            stop_tokens=(*stop_tokens, *_stop_tokens(self.stop_token_ids or (), vocab_size)),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            grammar=self.constraint,
        )


def defaulted(service: Service, names: Mapping[str, str], /, **given: Any) -> Sampling:
    """Sampling as a request gives it, null being what it does not say; what it leaves to the model is `service.defaults`.

    Temperature 0 is greedy: no default changes it. Raises BadField for a value out of range, by the field that the client
    knows: `names` are those that are not called as in Sampling.
    """
    said = {name: value for name, value in given.items() if value is not None}
    if said.get("temperature") != 0:
        said = {name: getattr(service.defaults, name) for name in _DEFAULTED} | said
    # vLLM and llama.cpp have -1 for off
    said["top_k"] = min(max(said.get("top_k", 0), 0), service.host.vocab_size)
    try:
        return Sampling(**said)
    except RequestError as error:
        field, _, reason = str(error).partition(" ")
        name = {**_NAMES, **names}.get(field, field)
        raise BadField(f"{name} {reason}", name) from error


def numbered_choices(asked: Asked, count: int) -> list[Asked]:
    """Each of several choices. With a seed each has its own, so that they differ and can be reproduced.

    The prompt's log-probabilities are told once.
    """
    choices, first = [asked], asked.request.sampling
    for index in range(1, count):
        seed = None if first.seed is None else (first.seed + _SEEDS + index) % (2 * _SEEDS) - _SEEDS
        sampling = dataclasses.replace(first, prompt_logprobs=None, seed=seed)
        choices.append(dataclasses.replace(asked, request=dataclasses.replace(asked.request, sampling=sampling)))
    return choices


def checked_limit(value: int | None, field: str) -> int | None:
    if value is not None and value < 1:
        raise BadField(f"{field} must be 1 or more", field)
    return value


def _bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    tokens: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise BadField(f"logit_bias: {key[:20]!r} is no token of the vocabulary of {vocab_size}", "logit_bias")
        tokens[int(key)] = value
    return tokens


def _stop_tokens(tokens: list[int] | tuple[int, ...], vocab_size: int) -> list[int]:
    for index, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise BadField(
                f"stop_token_ids: {str(token)[:20]} is no token of the vocabulary of {vocab_size}",
                f"stop_token_ids[{index}]",
            )
    return list(tokens)
