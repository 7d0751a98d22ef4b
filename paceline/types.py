"""The nouns every part of Paceline shares. Nothing here imports a sibling module but `errors`."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import PacelineError, RequestError

TokenIds = list[int]
MOST_STOPS, LONGEST_STOPS = 64, 16 << 10  # stop strings of a request, and their characters in all
MOST_BIASES = 1024


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 and `min_p` 0 switch those filters off. The penalties are
    OpenAI's (`presence`, `frequency`: subtracted from the logits of tokens already in the output) and CTRL's
    (`repetition`: divides positive, multiplies negative logits of tokens in prompt or output). `logit_bias` maps a token
    to what is added to its logit. With `seed` the same request gives the same tokens whatever shares its batch and
    whatever is drafted; without one a seed is drawn. `stop` is one string or several; the text ends before the first that
    is whole, none of which ends in the first `min_tokens` tokens. `ignore_eos` goes on after the end of a turn, but never
    after that of a grammar. `logprobs` is the number of alternatives to report (None: none).
    `prompt_logprobs` asks for those of the prompt's tokens too. `grammar` holds the output to a grammar (see
    engine/grammar.py); log-probabilities are then those of allowed tokens.
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
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        """Raises RequestError for a value that is out of range. Every number is one that float32 holds."""
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        checks = (
            (0 <= self.temperature <= 100, "temperature must be between 0 and 100"),
            (self.top_k >= 0, "top_k must be 0 (off) or more"),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1"),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1"),
            (-2 <= self.presence_penalty <= 2, "presence_penalty must be between -2 and 2"),
            (-2 <= self.frequency_penalty <= 2, "frequency_penalty must be between -2 and 2"),
            (0.01 <= self.repetition_penalty <= 100, "repetition_penalty must be between 0.01 and 100"),
            (len(self.logit_bias) <= MOST_BIASES, f"logit_bias must have at most {MOST_BIASES} tokens"),
            (all(-100 <= each <= 100 for each in self.logit_bias.values()), "logit_bias must be between -100 and 100"),
            (self.seed is None or -(1 << 63) <= self.seed < 1 << 63, "seed must be an integer of 64 bits"),
            (self.max_tokens >= 1, "max_tokens must be 1 or more"),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens must be between 0 and max_tokens"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs must be between 0 and 20"),
            (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
                "prompt_logprobs must be between 0 and 20",
            ),
            (len(self.stop) <= MOST_STOPS, f"stop must have at most {MOST_STOPS} strings"),
            (sum(map(len, self.stop)) <= LONGEST_STOPS, f"stop must have at most {LONGEST_STOPS} characters in all"),
            (all(self.stop), "stop must not have an empty string"),
            (len(self.stop_tokens) <= MOST_BIASES, f"stop_tokens must be at most {MOST_BIASES}"),
            (not (self.grammar and self.min_tokens), "min_tokens is not to be had together with a grammar"),
        )
        for holds, message in checks:
            if not holds:
                raise RequestError(message)

    @property
    def plain(self) -> bool:
        """True when tokens are chosen by the raw logits and nothing is told but the tokens."""
        return not self.adjusts_logits and self.grammar is None and self.logprobs is None

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
    `namespace` is the tenant: requests share cached prefixes with those of the same namespace alone.
    """

    prompt: TokenIds
    sampling: Sampling = field(default_factory=Sampling)
    sources: tuple[TokenIds, ...] = ()
    margin: float = 0.0
    id: str = ""
    namespace: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1e9:
            raise RequestError("margin must be between 0 (lossless) and 1e9 nats")


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass
class Usage:
    """True counts of one request. `accepted` and `rejected` are drafted tokens; `steps` are target passes after prefill.

    `source_…` are those of the drafted tokens that were copied from the request's explicit sources.
    `queue_seconds` of the `prefill_seconds` to the first token it waited for pages and a place in the batch.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    margin_tokens: int = 0
    source_drafted_tokens: int = 0
    source_accepted_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def rejected_tokens(self) -> int:
        return self.drafted_tokens - self.accepted_tokens

    @property
    def source_rejected_tokens(self) -> int:
        return self.source_drafted_tokens - self.source_accepted_tokens


@dataclass(frozen=True)
class TokenLogprob:
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class StepOutput:
    """What one step gave one request. `accepted` says, token by token, which of `tokens` were drafted.

    `prompt_logprobs`, of the prompt's tokens from the second on, come with the first output where they were asked for.
    `drafted` is how many tokens the step had drafted. `usage` comes with the first output, for what the prompt took, and
    with the last one, whole; `finish` with the last one. Where it is FAILED, `error` says why.
    """

    request_id: str
    tokens: TokenIds
    text: str
    accepted: list[bool]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    usage: Usage | None = None
    drafted: int = 0
    error: PacelineError | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass
class Completion:
    """A finished request. `text` is cut before a stop string; `tokens` are what the model produced.

    Where `finish` is FAILED, `error` says why, and tokens and text are what came before.
    """

    request_id: str
    tokens: TokenIds
    text: str
    finish: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error: PacelineError | None = None

    def checked(self) -> Completion:
        """Itself. Raises `error` if the request failed."""
        if self.error is not None:
            raise self.error
        return self
