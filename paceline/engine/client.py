"""What a server, a benchmark or a scripted test needs of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from paceline.config import ResolvedConfig
from paceline.models.tokenizer import Tokenizer
from paceline.types import Request, StepOutput


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of an engine's load.

    Requests: `num_waiting` have no pages yet, `num_prefilling` a part of their prompt computed, `num_running` decode;
    `num_preempted` counts preemptions since the start. KV pages: `pages_held` belong to requests, `pages_cached` hold
    prefixes that no request uses, of `pages_total`.
    """

    num_waiting: int = 0
    num_prefilling: int = 0
    num_running: int = 0
    num_preempted: int = 0
    pages_held: int = 0
    pages_cached: int = 0
    pages_total: int = 0

    @property
    def num_requests(self) -> int:
        """Requests submitted and not finished."""
        return self.num_waiting + self.num_prefilling + self.num_running

    @property
    def pages_free(self) -> int:
        return self.pages_total - self.pages_held - self.pages_cached


class EngineClient(Protocol):
    """An engine as its users see it. One thread makes all calls but `stats`, which any thread may call.

    `Engine` is one; a test's scripted engine or one in another process may be others.
    """

    config: ResolvedConfig
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has."""

    @property
    def capacity(self) -> int:
        """The most tokens that a prompt and its output may have together."""

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""

    def submit(self, request: Request) -> str:
        """Queues a request; returns its id. Raises RequestError for one that can never be served."""

    def cancel(self, name: str) -> None:
        """Ends a request now. Unknown and finished ids are ignored."""

    def step(self) -> list[StepOutput]:
        """Runs one step; returns what it gave, request by request."""

    def stats(self) -> EngineStats:
        """The load at this moment; approximate while a step runs on another thread."""
