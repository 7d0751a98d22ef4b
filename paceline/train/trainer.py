"""The training loop: batches, optimizer, schedule, checkpoints, evaluation. It knows no drafter's architecture."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from paceline.drafters.config import DraftConfig
from paceline.errors import ConfigError, PacelineError
from paceline.train.capture import Capture, Captured
from paceline.train.losses import Acceptance, Objective, summaries, summary
from paceline.train.optimizer import OPTIMIZERS, Optimizer
from paceline.train.packing import Packing
from paceline.train.parallel import Group
from paceline.train.report import RunLog
from paceline.train.samples import Samples
from paceline.train.state import TrainState

_FIRST_EVALUATION = 1 << 14  # tokens
_BETWEEN_EVALUATIONS = 1.4  # ratio of tokens: about two a doubling
_LAG = 2  # steps that the host may be ahead of the device


class Trainee(Protocol):
    """What a drafter's architecture gives the trainer."""

    config: DraftConfig
    num_steps: int

    def initial(self, seed: int, captured: Callable[[], Captured] | None = None) -> dict[str, Tensor]:
        """The weights to begin with, float32 on the CPU; `captured` gives texts to train on, should they depend on any."""

    def loss(self, tensors: Mapping[str, Tensor], batch: Captured, acceptance: Acceptance) -> Tensor:
        """The loss summed over supervised rows; adds what would be accepted at each drafted position."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    tokens, minutes   where to stop: tokens over all runs, minutes of this one; the learning rate falls to 0 by then
    batch_rows        rows of `row_length` tokens in a step of the optimizer, over all processes
    micro_rows        rows that are on one device at a time; sets the memory, not the result (but for the lk loss and a block
                      drafter's, whose share of KL is of the rows at hand)
    optimizer         one of OPTIMIZERS (train/optimizer.py)
    seed              of the first weights, the order of samples and a block drafter's anchors
    warmup            share of the run in which the learning rate rises
    """

    tokens: int | None = None
    minutes: float | None = None
    batch_rows: int = 4
    micro_rows: int = 4
    row_length: int = 2048
    learning_rate: float = OPTIMIZERS["muon"]
    optimizer: str = "muon"
    warmup: float = 0.03
    clip: float = 1.0
    seed: int = 0
    save_minutes: float = 2.0
    log_seconds: float = 10.0
    evaluation_rows: int = 32
    objective: Objective = field(default_factory=Objective)

    def __post_init__(self) -> None:
        """Raises ConfigError for values that cannot be trained with."""
        if self.tokens is None and self.minutes is None:
            raise ConfigError("training needs an end: give tokens, minutes or both")
        if min(self.batch_rows, self.micro_rows, self.row_length) < 1:
            raise ConfigError("batch_rows, micro_rows and row_length must be 1 or more")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"there is no optimizer {self.optimizer!r}; known: {', '.join(OPTIMIZERS)}")

    def check_shared(self, num_processes: int) -> None:
        """Raises ConfigError for a batch that the processes cannot share evenly."""
        if self.batch_rows % num_processes:
            raise ConfigError(f"{num_processes} processes cannot share {self.batch_rows} rows evenly")

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run: linear warm-up, then a cosine to 0."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Trainer:
    """Trains one drafter from a state on. Nothing waits for the device but logs, evaluations and saves."""

    def __init__(
        self,
        trainee: Trainee,
        capture: Capture,
        samples: Samples,
        settings: TrainSettings,
        state: TrainState,
        run: Path,
        group: Group,
    ) -> None:
        """`state` is updated in place; `run` is the folder of the state and the log. Raises ConfigError for a batch that
        the processes cannot share.
        """
        settings.check_shared(group.size)
        self._trainee, self._capture, self._settings, self._group = trainee, capture, settings, group
        self.state, self._path = state, run / "state.pt"
        self._device = capture.model.device
        self._dtype = capture.model.dtype
        self._tasks = sorted({each.task for each in [*samples.train, *samples.held_out]})
        self._training = Packing(samples.train, settings.row_length, settings.seed, self._tasks)
        self._held_out = Packing(samples.held_out, settings.row_length, settings.seed, self._tasks)
        self.parameters = {
            name: tensor.to(self._device, torch.float32, copy=True).requires_grad_()
            for name, tensor in state.tensors.items()
        }
        self._optimizer = Optimizer(settings.optimizer, self.parameters, state.optimizer)
        if state.random is None:
            torch.manual_seed(settings.seed + group.rank)
        else:
            torch.set_rng_state(state.random)
        self._log = RunLog(run / "log.jsonl", state.tokens, group.rank == 0)
        self._running = self._new_counts()
        self._flying: deque[torch.cuda.Event] = deque()
        self._started = self._logged = self._saved = time.monotonic()
        self._before, self._logged_tokens = state.seconds, state.tokens
        self._norm = torch.zeros(())

    def train(self, stop_after: int | None = None) -> None:
        """Trains to the end of the settings, until SIGTERM, or for `stop_after` steps. Saves the state at the end."""
        settings, state = self._settings, self.state
        last = None if stop_after is None else state.steps + stop_after
        with _terminations() as terminated:
            while True:
                now = time.monotonic()
                ending = bool(terminated) or (last is not None and state.steps >= last)
                logging = now - self._logged >= settings.log_seconds
                ending_, progress, logging_ = self._group.agree([ending, self._progress(now), logging])
                if ending_ or progress >= 1:
                    break
                self._step(progress)
                if logging_:
                    self._write_log(progress)
                if state.tokens >= max(_FIRST_EVALUATION, _BETWEEN_EVALUATIONS * state.evaluated):
                    self.evaluate()
                if time.monotonic() - self._saved >= 60 * settings.save_minutes:
                    self.save()
        self.save()

    def evaluate(self) -> dict[str, Any] | None:
        """Acceptance on held-out samples, in all and by task, which is logged too; None where none are held out."""
        self.state.evaluated = self.state.tokens
        if not self._held_out.samples:
            return None
        rows = self._held_out.epoch(0)[: self._settings.evaluation_rows][self._group.rank :: self._group.size]
        counts = self._new_counts()
        measure(self._trainee, self._cast(), self._capture, self._held_out, rows, self._settings.micro_rows, counts)
        found = self._group.sum(counts.counts).cpu()
        result = {**summary(found.sum(0)), "by_task": summaries(found, self._tasks)}
        self._log.write("evaluation", self._position(), result)
        return result

    def save(self) -> None:
        """Writes the state, by the first process. Raises PacelineError where training diverged, and writes nothing."""
        state = self.state
        tensors = {name: each.detach().cpu().clone() for name, each in self.parameters.items()}
        if not all(bool(each.isfinite().all()) for each in tensors.values()):
            raise PacelineError(self._diverged("a weight"))
        self._saved = time.monotonic()
        state.seconds = self._before + self._saved - self._started
        state.tensors = tensors
        state.optimizer, state.random = self._optimizer.state(), torch.get_rng_state()
        if self._group.rank == 0:
            state.save(self._path)

    def _step(self, progress: float) -> None:
        """One step of the optimizer."""
        settings, state, group = self._settings, self.state, self._group
        rows, state.place = self._training.take(state.place, settings.batch_rows)
        supervised = self._training.supervised(rows)
        for micro in _parts(rows[group.rank :: group.size], settings.micro_rows):
            packed = self._training.pack(micro)
            loss = self._trainee.loss(self._cast(), self._capture(packed), self._running) / supervised
            loss.backward()
        parameters = list(self.parameters.values())
        group.sum_gradients(parameters)
        self._norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        self._optimizer.step(settings.rate(progress))
        state.steps += 1
        state.supervised += supervised
        state.tokens += self._training.size(rows)
        if self._device.type == "cuda":
            self._flying.append(torch.cuda.Event())
            self._flying[-1].record()
            if len(self._flying) > _LAG:
                self._flying.popleft().synchronize()

    def _cast(self) -> dict[str, Tensor]:
        return {name: each.to(self._dtype) for name, each in self.parameters.items()}

    def _progress(self, now: float) -> float:
        settings = self._settings
        by_tokens = 0.0
        if settings.tokens is not None:  # the schedule begins with the optimizer
            before = self.state.tokens_before
            by_tokens = (self.state.tokens - before) / (settings.tokens - before) if settings.tokens > before else 1.0
        by_time = (now - self._started) / (60 * settings.minutes) if settings.minutes is not None else 0.0
        return max(by_tokens, by_time)

    def _new_counts(self) -> Acceptance:
        return Acceptance(max(1, len(self._tasks)), self._trainee.num_steps, self._device)

    def _position(self) -> dict[str, Any]:
        state = self.state
        return {"step": state.steps, "tokens": state.tokens, "supervised": state.supervised, "epoch": state.place[0]}

    def _write_log(self, progress: float) -> None:
        """Reads the counts since the last log, which waits for the device. Raises PacelineError where training diverged."""
        found = self._group.sum(self._running.counts).cpu().sum(0)
        self._running = self._new_counts()
        now = time.monotonic()
        speed = (self.state.tokens - self._logged_tokens) / (now - self._logged)
        self._logged, self._logged_tokens = now, self.state.tokens
        values = {
            **summary(found),
            "learning_rate": self._settings.rate(progress),
            "gradient_norm": round(float(self._norm), 4),
            "tokens_per_second": round(speed),
            "seconds": round(self._before + now - self._started, 1),
        }
        self._log.write("train", self._position(), values, progress)
        if not math.isfinite(float(found[..., -1].sum())):
            raise PacelineError(self._diverged("the loss"))

    def _diverged(self, what: str) -> str:
        return (
            f"training diverged: {what} is not finite; go on with a lower learning rate from the last state, {self._path}, "
            "or delete it to begin again"
        )


@torch.no_grad()
def measure(
    trainee: Trainee,
    tensors: Mapping[str, Tensor],
    capture: Capture,
    packing: Packing,
    rows: Sequence[list[int]],
    micro_rows: int,
    acceptance: Acceptance,
) -> None:
    """Adds to `acceptance` what would be accepted on rows of samples, `micro_rows` at a time. Trains nothing."""
    for micro in _parts(rows, micro_rows):
        trainee.loss(tensors, capture(packing.pack(micro)), acceptance)


def _parts(rows: Sequence[list[int]], count: int) -> Iterator[Sequence[list[int]]]:
    for first in range(0, len(rows), count):
        yield rows[first : first + count]


@contextlib.contextmanager
def _terminations() -> Iterator[list[int]]:
    """Collects SIGTERM instead of dying of it, within a `with` block of the main thread."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    try:
        before = signal.signal(signal.SIGTERM, receive)
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
