"""The nouns every part of Paceline shares. Nothing here imports a sibling module but `errors`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from paceline.errors import RequestError

TokenIds = list[int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch those filters off. The penalties are
    OpenAI's (`presence`, `frequency`: subtracted from the logits of tokens already in the output) and CTRL's
    (`repetition`: divides positive, multiplies negative logits of tokens in prompt or output). `logit_bias` maps a token
    to what is added to its logit. With `seed` the same request gives the same tokens whatever shares its batch and
    whatever is drafted; without one a seed is drawn. `logprobs` is the number of alternatives to report (None: none).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.temperature >= 0, "temperature must be 0 or more"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty must be above 0"),
            (self.max_tokens >= 1, "max_tokens must be 1 or more"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens must be between 0 and max_tokens"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must be between 0 and 20"),
            (all(self.stop), "a stop string must not be empty"),
        )
        for holds, message in checks:
            if not holds:
                raise RequestError(message)

    @property
    def greedy(self) -> bool:
        """True when the choice is the argmax of the raw logits, so nothing but the argmax is computed."""
        return self.temperature == 0 and not self.adjusts_logits

    @property
    def adjusts_logits(self) -> bool:
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.min_tokens
        )


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    `sources` are texts, as tokens, that the output may copy from, best first: a predicted output or a candidate merge
    before the prompt's own text, which is always a source. They change speed, never tokens.
    `margin` is a declared lossy policy (see docs/apply.md): where the best source's next token is within `margin` nats
    of the model's first choice, it is taken instead. 0 is lossless.
    """

    prompt: TokenIds
    sampling: Sampling = field(default_factory=Sampling)
    sources: tuple[TokenIds, ...] = ()
    margin: float = 0.0
    id: str = ""

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise RequestError("margin must be 0 (lossless) or more")


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass
class Usage:
    """True counts of one request. `accepted` and `rejected` are drafted tokens; `steps` are target passes after prefill."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    margin_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def rejected_tokens(self) -> int:
        return self.drafted_tokens - self.accepted_tokens


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StepOutput:
    """What one step gave one request. `accepted` says, token by token, which of `tokens` were drafted.

    `finish` and `usage` come with the last one.
    """

    request_id: str
    tokens: TokenIds
    text: str
    accepted: list[bool]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None


@dataclass
class Completion:
    """A finished request. `text` is cut before a stop string; `tokens` are what the model produced."""

    request_id: str
    tokens: TokenIds
    text: str
    finish: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
