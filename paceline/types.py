"""The data types that all parts of Paceline share. Of the sibling modules this one imports only `errors`."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass, field
from typing import Any

from paceline.errors import PacelineError, RequestError

TokenIds = list[int]
MOST_STOPS, LONGEST_STOPS = 64, 16 << 10  # bounds of a request's stop strings: their number and total characters
MOST_BIASES = 1024  # bound of a request's biased tokens, and of its stop tokens


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a request.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off. The penalties are OpenAI's
    (`presence`, `frequency`: subtracted from the logits of tokens already in the output) and CTRL's (`repetition`: divides
    positive and multiplies negative logits of tokens in prompt or output). `logit_bias` maps a token to the value that is
    added to its logit. With a `seed`, the same request gives the same tokens, independent of its batch and of drafts;
    without one, a seed is drawn. `stop` is one string or several: the text ends before the first complete one. A stop
    string that ends within the first `min_tokens` tokens is ignored. `ignore_eos` continues after an end-of-sequence
    token, but not after the end of a grammar. `logprobs` is the number of alternatives to report (None: no
    log-probabilities), `prompt_logprobs` the same for the prompt's tokens. `grammar` constrains the output (see
    engine/grammar.py); log-probabilities are then those over allowed tokens.
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
        """Raises RequestError for a value out of range. The ranges keep all numbers finite in float32."""
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
            (not (self.grammar and self.min_tokens), "min_tokens is not supported together with a grammar"),
        )
        for holds, message in checks:
            if not holds:
                raise RequestError(message)

    @functools.cached_property
    def plain(self) -> bool:
        """Whether tokens are sampled from the unmodified logits, without a grammar, and no log-probabilities are reported."""
        return not self.adjusts_logits and self.grammar is None and self.logprobs is None

    @functools.cached_property
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

    `sources` are token lists that the drafter may copy from, best first, for example a predicted output or a candidate
    merge. The prompt itself is always a source. They change the speed, never the tokens.
    `margin` is an explicitly lossy policy (see docs/apply.md): if the first source's next token is within `margin` nats of
    the model's first choice, it is accepted instead. 0 is lossless.
    `namespace` is the tenant: requests share cached prefixes only with requests of the same namespace.
    Without `text` its outputs have tokens alone, which takes the host less time; it must have no stop strings then.
    """

    prompt: TokenIds
    sampling: Sampling = field(default_factory=Sampling)
    sources: tuple[TokenIds, ...] = ()
    margin: float = 0.0
    id: str = ""
    namespace: str = ""
    text: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1e9:
            raise RequestError("margin must be between 0 (lossless) and 1e9 nats")
        if self.sampling.stop and not self.text:
            raise RequestError("a request without text must have no stop strings")


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass
class Usage:
    """The counts of one request. `accepted` and `rejected` count draft tokens; `steps` counts target passes after prefill.

    `source_…` count the draft tokens that were copied from the request's explicit sources, `margin_tokens` the tokens that
    only the margin accepted. `prefill_seconds` is the time to the first token, of which the request waited `queue_seconds`
    for pages and a place in the batch.
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
    """The output of one step for one request. `accepted` has a flag for each of `tokens`: whether it was an accepted draft.

    `drafted` is the number of draft tokens of the step. `prompt_logprobs`, of the prompt's tokens from the second on, come
    with the first output if they were requested. `usage` comes with the first output (the prompt's counts) and with the
    last one (complete). `finish` comes with the last output; if it is FAILED, `error` has the reason.
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
    """A finished request. `text` ends before a stop string; `tokens` are all that the model generated.

    If `finish` is FAILED, `error` has the reason, and tokens and text are those generated before it.
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
        """Returns self. Raises `error` if the request failed."""
        if self.error is not None:
            raise self.error
        return self
