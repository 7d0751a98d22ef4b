"""The embedded engine: requests in, steps out. `step` is the whole loop."""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.config import EngineConfig, Hardware, resolve
from paceline.drafters.chooser import Habits, choose_each, choose_uniform
from paceline.engine.cost import ChunkCost
from paceline.engine.detokenize import Detokenizer
from paceline.engine.flight import Flight, Landed
from paceline.engine.grammar import Grammars
from paceline.engine.runner import Runner
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.errors import Cancelled, ContextExceeded, EmptyPrompt, EngineFailed, PacelineError, RequestError
from paceline.kv.cache import KVCache, page_bytes
from paceline.kv.pages import PagePool
from paceline.kv.radix import RadixTree
from paceline.models.checkpoint import Checkpoint, open_checkpoint
from paceline.models.config import ModelConfig
from paceline.models.decoder import Decoder
from paceline.models.pull import pull
from paceline.models.tokenizer import Tokenizer
from paceline.ops.dispatch import deterministic
from paceline.types import Completion, FinishReason, Request, Sampling, StepOutput, TokenIds

_log = logging.getLogger(__name__)
# These end the caller's work. Any other BaseException (a library in Rust panics with one) is a bug that ends a request.
_INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_MOST_CACHED = 400_000  # tokens of KV cache on a GPU that is not asked for more
_MOST_CACHED_ON_CPU = 4 << 30  # bytes of it on a CPU


class Engine:
    """One model on one device. Not thread-safe: one thread submits and steps. Several engines may live side by side."""

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, config: EngineConfig, defaults: Sampling | None = None
    ) -> None:
        """`config` must be resolved; `Engine.load` does it all. `defaults` is how the model's makers sample from it: a server
        takes it up, the engine does not.
        """
        assert config.max_context is not None and config.prefill_chunk is not None
        assert config.max_stall_ms is not None
        self.config = config
        self.defaults = defaults or Sampling()
        self.tokenizer = tokenizer
        self.model = model
        num_pages = _num_pages(model, config)
        self.cache = KVCache(
            model.config.num_layers,
            num_pages,
            config.page_size,
            model.config.num_kv_heads,
            model.config.head_dim,
            model.dtype,
            model.device,
        )
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(self.pool, config.page_size) if config.prefix_cache else None
        self.runner = _make_runner(model, self.cache, config)
        self.scheduler = Scheduler(
            self.pool,
            self.tree,
            config.page_size,
            config.max_batch,
            config.prefill_chunk,
            self._draft_lengths,
            ChunkCost(_even_context(model.config)),
            config.max_stall_ms / 1000,
            self.runner.uniform,
        )
        self._flights: deque[Flight] = deque()
        self._sequences: dict[str, Sequence] = {}
        self._unread: dict[str | None, deque[StepOutput]] = {None: deque()}
        self._numbers = itertools.count(1)
        self._habits = {False: Habits(), True: Habits()}

    @classmethod
    def load(cls, model: str | Path, config: EngineConfig | None = None) -> Engine:
        """Opens a model by path or by a name that `pull` knows (pulling it where it is not yet there)."""
        checkpoint = open_checkpoint(pull(str(model)))
        return cls.from_checkpoint(checkpoint, config)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, config: EngineConfig | None = None) -> Engine:
        resolved = resolve(config or EngineConfig(), Hardware.detect(), checkpoint.config.max_positions)
        assert resolved.threads is not None
        if resolved.device == "cpu":
            torch.set_num_threads(resolved.threads)
        device = torch.device(resolved.device)
        dtype: torch.dtype = getattr(torch, resolved.dtype)
        model = Decoder(checkpoint.config, checkpoint.tensors(dtype), device)
        return cls(model, checkpoint.tokenizer(), resolved, checkpoint.sampling)

    def sibling(self, config: EngineConfig) -> Engine:
        """Another engine over the same weights, with a cache and state of its own. `config` must be resolved."""
        return Engine(self.model, self.tokenizer, config, self.defaults)

    def warm_up(self, batch: int = 1) -> None:
        """Prepares steps of up to `batch` requests, so that no request waits for a kernel or graph to be made."""
        with deterministic(self.config.deterministic):
            self.runner.warm_up(batch)

    def submit(self, request: Request) -> str:
        """Queues a request; returns its id. Raises a RequestError for one that can never be served."""
        assert self.config.max_context is not None
        room = self.config.max_context - len(request.prompt)
        if not request.prompt:
            raise EmptyPrompt("the prompt has no tokens")
        prompt = self._array(request.prompt, "the prompt")
        sources = [self._array(source, "a source") for source in request.sources]
        sampling = request.sampling
        if sampling.logit_bias or sampling.stop_tokens:
            self._array([*sampling.logit_bias, *sampling.stop_tokens], "logit_bias or stop_tokens")
        if sampling.max_tokens > room:
            raise ContextExceeded(
                f"{len(request.prompt)} prompt and {sampling.max_tokens} output tokens are more than the context "
                f"of {self.config.max_context}"
            )
        if request.margin and sampling.logprobs is not None:
            raise RequestError("logprobs are not to be had together with a margin")
        numbered = (f"request-{number}" for number in self._numbers)
        name = request.id or next(each for each in numbered if each not in self._sequences)
        if name in self._sequences or name in self._unread:
            raise RequestError(f"a request {name!r} is running already")
        sequence = self._sequence(request, name, prompt, sources)
        self.scheduler.add(sequence)
        self._sequences[name] = sequence
        return name

    def cancel(self, name: str) -> None:
        """Ends a request now; its pages are free within the call. Unknown and finished names are ignored."""
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            self.scheduler.cancel(sequence)

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has."""
        return self.model.config.vocab_size

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or bool(self._flights) or bool(self._unread[None])

    def step(self) -> list[StepOutput]:
        """Launches the next step, then reads the oldest one launched; on CUDA that is one behind.

        A request that an error within the step concerns ends with it; the engine goes on with the others.
        """
        unread = list(self._unread[None])
        self._unread[None].clear()
        return unread + (self._step() if self.busy else [])

    def stream(self, request: Request) -> Iterator[StepOutput]:
        """Runs one request, step by step; others submitted before run along, and their outputs are kept for who reads them.
        Closing the iterator cancels it. The last output has an `error` where it failed.
        """
        name = self.submit(request)
        own = self._unread[name] = deque()
        try:
            while name in self._sequences or own:
                if not own:
                    self._sort(self._step())
                while own:
                    yield own.popleft()
        finally:
            del self._unread[name]
            self.cancel(name)

    def generate(self, requests: list[Request]) -> list[Completion]:
        """Runs requests to their ends, together; completions in their order, those that failed with their `error`.

        Where one cannot be served, RequestError is raised and none is run.
        """
        sequences: list[Sequence] = []
        try:
            for request in requests:
                sequences.append(self._sequences[self.submit(request)])
            own = {each.name for each in sequences}
            while any(sequence.finish is None for sequence in sequences):
                self._sort(each for each in self._step() if each.request_id not in own)
        finally:
            for sequence in sequences:
                if sequence.finish is None:
                    self.cancel(sequence.name)
        return [self.completion(sequence) for sequence in sequences]

    def _sort(self, outputs: Iterable[StepOutput]) -> None:
        """Keeps outputs for the streams they belong to, others for the next `step`."""
        for output in outputs:
            self._unread.get(output.request_id, self._unread[None]).append(output)

    @torch.inference_mode()
    def _step(self) -> list[StepOutput]:
        outputs: list[StepOutput] = []
        work = None
        try:
            work = self.scheduler.schedule()
            with deterministic(self.config.deterministic):
                if work is not None:
                    self._flights.append(self.runner.launch(work))
                    self.scheduler.launched(work)
        except BaseException as error:
            # where it is not known what was scheduled, nobody's state can be trusted
            concerned = list(self._sequences.values()) if work is None else work.sequences
            outputs += self._fail(concerned, error)
        lag = 0 if work is not None and work.held else self.runner.lag
        while self._flights and (work is None or len(self._flights) > lag):
            outputs += self._land(self._flights.popleft())
        if not self.scheduler.busy:
            self._flights.clear()  # what is left was launched for requests that have ended
        return outputs

    def completion(self, sequence: Sequence) -> Completion:
        """A finished sequence as its caller sees it. Raises Cancelled for one that was cancelled."""
        if sequence.finish is None or sequence.finish is FinishReason.CANCELLED:
            raise Cancelled(f"request {sequence.name!r} was cancelled")
        text = "".join(sequence.text)
        return Completion(
            sequence.name,
            sequence.output,
            text,
            sequence.finish,
            sequence.usage,
            tuple(sequence.logprobs),
            tuple(sequence.prompt_logprobs),
            sequence.failure,
        )

    def _array(self, tokens: TokenIds, what: str) -> Any:
        """Tokens as an array, [T] int64. Raises RequestError for what is no token of the model."""
        vocabulary = self.vocab_size
        try:
            array = np.asarray(tokens)  # its bounds are found ten times as fast as a list's
        except (OverflowError, TypeError, ValueError) as error:
            raise RequestError(f"{what} must be a list of tokens of the vocabulary of {vocabulary}") from error
        if array.ndim != 1 or (len(array) and array.dtype.kind not in "iu"):
            raise RequestError(f"{what} must be a list of tokens of the vocabulary of {vocabulary}")
        if len(array) and not 0 <= array.min() <= array.max() < vocabulary:
            raise RequestError(f"{what} holds a token outside the vocabulary of {vocabulary}")
        return array.astype(np.int64, copy=False)

    def _sequence(self, request: Request, name: str, prompt: Any, sources: list[Any]) -> Sequence:
        sampling = request.sampling
        stops = set(sampling.stop_tokens)
        if sampling.grammar is not None or not sampling.ignore_eos:
            stops.update(each for each in self.tokenizer.eos_tokens if each < self.vocab_size)
        sequence = Sequence(
            request=request,
            name=name,
            seed=secrets.randbits(63) if sampling.seed is None else sampling.seed,
            detokenizer=Detokenizer(self.tokenizer.text_bytes, sampling.stop, sampling.min_tokens),
            stops=frozenset(stops),
            acceptance=self._habits[bool(request.sources)].newcomer(),
            tokens=list(request.prompt),
            prompt=prompt,
            prompt_length=len(prompt),
            sources=sources,
            follower=None if sampling.grammar is None else self.grammars.follow(sampling.grammar),
        )
        sequence.usage.prompt_tokens = len(request.prompt)
        return sequence

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Made for the first request with a grammar, or when asked for: it takes a second for a large vocabulary."""
        return Grammars(self.tokenizer, self.model.config.vocab_size)

    def _draft_lengths(self, sequences: list[Sequence]) -> list[int]:
        """Draft lengths for a decode step, within what each request may still write."""
        config = self.config
        assert config.max_draft is not None
        if config.drafter == "none":
            return [0] * len(sequences)
        if config.fixed_draft is not None:
            return [config.fixed_draft] * len(sequences)
        records = [sequence.acceptance for sequence in sequences]
        if self.runner.uniform:
            length = choose_uniform(
                records, config.max_draft, lambda length: self.runner.step_cost(len(records), length)
            )
            return [length] * len(records)
        lengths = choose_each(records, config.max_draft, self.runner.cost)
        return [max(0, min(length, each.room - 1)) for length, each in zip(lengths, sequences, strict=True)]

    def _land(self, flight: Flight) -> list[StepOutput]:
        """Reads a launched step; returns its outputs. If the step cannot be read, all its requests fail; if a request's tokens
        cannot be processed, that request fails.
        """
        try:
            landed = flight.land()
            now = time.perf_counter()
            self.runner.learn(flight, now)
            if flight.chunks:
                self.scheduler.chunk_cost.add(flight.chunks, flight.seconds(now))
        except BaseException as error:
            return self._fail([sequence for sequence, epoch, _ in flight.entries if sequence.epoch == epoch], error)
        outputs = []
        for each in landed:
            try:
                outputs.append(self._take(each))
            except BaseException as error:
                lost = landed if isinstance(error, _INTERRUPTS) else [each]
                outputs += self._fail([one.sequence for one in lost], error)
        return outputs

    def _fail(self, sequences: list[Sequence], error: BaseException) -> list[StepOutput]:
        """Ends `sequences` by `error`; returns their last outputs.

        Raises `error` if it is an interrupt, and the device's own error if the device has failed.
        """
        outputs = []
        failed = EngineFailed("the engine failed on this request; see its log")
        reason = error if isinstance(error, PacelineError) else failed
        for sequence in sequences:
            if self._sequences.get(sequence.name) is sequence:  # its `finish` may be set where its end has failed
                outputs.append(self._lose(sequence, reason))
        if isinstance(error, _INTERRUPTS):
            raise error
        _log.error("a step failed; %d requests end by it", len(outputs), exc_info=error)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # raises where the device has failed
        return outputs

    def _lose(self, sequence: Sequence, error: PacelineError) -> StepOutput:
        """Ends a sequence by an error, without sharing what its last step computed; returns its last output."""
        output = sequence.fail(error)
        self.scheduler.drop(sequence)
        del self._sequences[sequence.name]
        return output

    def _take(self, landed: Landed) -> StepOutput:
        sequence = landed.sequence
        if sequence.failure is not None:  # it failed within the step, so the step's tokens are not its output
            return self._lose(sequence, sequence.failure)
        sequence.in_flight = max(0, sequence.in_flight - landed.length - 1)
        usage = sequence.usage
        if landed.decode:
            usage.steps += 1
            usage.drafted_tokens += landed.drafted
            usage.margin_tokens += landed.near
            usage.source_drafted_tokens += landed.told
        state = sequence.decided.popleft() if landed.decode else sequence.acceptance.state
        observed = (state, landed.drafted, landed.accepted, landed.hit)
        self._habits[bool(sequence.request.sources)].observe(*observed)
        sequence.acceptance.observe(*observed, landed.streak)
        drafted, taken = (landed.drafted, landed.taken) if landed.decode else (0, 0)
        output = sequence.take(landed.tokens, landed.accepted, landed.logprobs, drafted, taken)
        if sequence.finish is not None:
            if sequence.failure is None:
                self.scheduler.finish(sequence)
            else:
                self.scheduler.drop(sequence)
            self._sequences.pop(sequence.name, None)
        return output


def _even_context(config: ModelConfig) -> float:
    """The context at which attention takes as many operations a token as the weights do."""
    attention = 2 * config.num_layers * config.num_heads * config.head_dim
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    weights = config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)
    return weights / attention


def _make_runner(model: Decoder, cache: KVCache, config: EngineConfig) -> Runner:
    if model.device.type == "cuda" and config.cuda_graphs:
        from paceline.engine.graphs import GraphRunner

        return GraphRunner(model, cache, config)
    return Runner(model, cache, config)


def _num_pages(model: Decoder, config: EngineConfig) -> int:
    """Pages of the cache: `cache_tokens`, or on CUDA most of what is free, on CPU a quarter and no more than 4 GiB or two
    full contexts, whichever is more; there memory is taken as it is written to.
    """
    assert config.max_context is not None
    size = config.page_size
    if config.cache_tokens is not None:
        return config.cache_tokens // size + 1
    shape = model.config
    bytes_each = page_bytes(shape.num_layers, size, shape.num_kv_heads, shape.head_dim, model.dtype)
    if model.device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(model.device)[0] * 0.8)
        return max(2, min(budget // bytes_each, _MOST_CACHED // size))
    most = max(_MOST_CACHED_ON_CPU, 2 * config.max_context // size * bytes_each)
    budget = min(Hardware.detect().free_bytes // 4, most)
    return max(2, budget // bytes_each)
