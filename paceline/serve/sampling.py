"""The sampling fields that OpenAI's endpoints share, with vLLM's additions."""

from __future__ import annotations

from msgspec import Struct

from paceline.errors import BadField
from paceline.serve.constrain import StructuredOutputs, of_structure
from paceline.types import Sampling


class StreamOptions(Struct):
    include_usage: bool = False


class SamplingBody(Struct, kw_only=True):
    """Fields that are not sent, or null, are the engine's own: greedy, every filter off."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    cache_salt: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, logprobs: int | None, vocab_size: int, stop_tokens: tuple[int, ...] = ()) -> Sampling:
        """Raises RequestError for a value out of range; `max_tokens` is still to be set."""
        if self.n is not None and self.n != 1:
            raise BadField("n must be 1: one choice a request", "n")
        return Sampling(
            temperature=self.temperature or 0.0,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=_bias(self.logit_bias or {}, vocab_size),
            seed=None if self.seed is None else self.seed & (1 << 63) - 1,
            stop=self.stops,
            stop_tokens=(*stop_tokens, *(self.stop_token_ids or ())),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            grammar=of_structure(self.structured_outputs),
        )


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
