"""The embedded engine: requests in, steps out. `step` is the whole loop."""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.config import EngineConfig, Hardware, ResolvedConfig, resolve
from paceline.drafters.base import Drafter, make_drafter, with_drafter
from paceline.drafters.checkpoint import vocabulary_digest
from paceline.drafters.chooser import GlobalAcceptance
from paceline.engine.client import EngineStats
from paceline.engine.cost import ChunkCost
from paceline.engine.detokenize import Detokenizer, whole_text
from paceline.engine.grammar import Grammars
from paceline.engine.in_flight import InFlightStep, StepResult
from paceline.engine.lengths import DraftLengths
from paceline.engine.runner import Runner
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.errors import Cancelled, ContextExceeded, EmptyPrompt, EngineFailed, PacelineError, RequestError
from paceline.kv.cache import KVCache
from paceline.kv.layout import CacheLayout
from paceline.kv.pages import PagePool
from paceline.kv.radix import RadixTree
from paceline.models.base import Model
from paceline.models.checkpoint import Checkpoint, open_checkpoint
from paceline.models.decoder import Decoder
from paceline.models.pull import pull
from paceline.models.tokenizer import Tokenizer
from paceline.ops import verify
from paceline.ops.dispatch import deterministic
from paceline.types import Completion, FinishReason, Request, Sampling, StepOutput, TokenIds

_log = logging.getLogger(__name__)
# Raised to the caller. Any other BaseException (a panic of a library in Rust is one) is a bug that ends a request.
_INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)
_MAX_CACHED_TOKENS = 400_000  # default size of the KV cache on a GPU at most
_MAX_CACHED_BYTES_ON_CPU = 4 << 30


class Engine:
    """One model on one device. Not thread-safe: one thread submits and steps. Several engines may live side by side."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, config: ResolvedConfig, defaults: Sampling | None = None
    ) -> None:
        """`Engine.load` prepares all arguments. `defaults` is the sampling that the model's makers recommend: a server
        applies it, the engine does not.
        """
        self.config = config = with_drafter(config, model)
        self.defaults = defaults or Sampling()
        self.tokenizer = tokenizer
        # both are called for every token of an output
        self._text_bytes = functools.cache(tokenizer.text_bytes)
        self._whole_text = functools.cache(lambda token: whole_text(self._text_bytes(token)))
        self.model = model
        self.drafter: Drafter = make_drafter(config, model)
        layout = model.layout(config.page_size).join(self.drafter.layout(config.page_size))
        num_pages = _num_pages(layout, model.device, config)
        self.cache = KVCache(layout, num_pages, config.max_batch + 1, model.device)
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(self.pool, config.page_size) if config.prefix_cache else None
        self.runner = _make_runner(model, self.cache, config, self.drafter)
        priors = (self.drafter.priors, self.drafter.model_priors or (0.0, 0.0))
        # by whether there are sources
        self._global_acceptance = {each: GlobalAcceptance(*priors) for each in (False, True)}
        self.lengths = DraftLengths(self.runner, self.drafter, self._global_acceptance)
        self.scheduler = Scheduler(
            self.pool,
            self.tree,
            config,
            self.lengths.choose,
            self.drafter.lengths,
            ChunkCost(model.config.even_context),
            self.runner.uniform,
        )
        self._in_flight: deque[InFlightStep] = deque()
        self._sequences: dict[str, Sequence] = {}
        self._unread: dict[str | None, deque[StepOutput]] = {None: deque()}
        self._numbers = itertools.count(1)

    @classmethod
    def load(cls, model: str | Path, config: EngineConfig | None = None) -> Engine:
        """Opens a model by path or by a name that `pull` knows, pulling it if it is not cached yet."""
        checkpoint = open_checkpoint(pull(str(model)))
        return cls.from_checkpoint(checkpoint, config)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, config: EngineConfig | None = None) -> Engine:
        """An engine over a checkpoint's weights, configured for this machine."""
        resolved = resolve(config or EngineConfig(), Hardware.detect(), checkpoint.config.max_positions)
        if resolved.device == "cpu":
            torch.set_num_threads(resolved.threads)
        device = torch.device(resolved.device)
        dtype: torch.dtype = getattr(torch, resolved.dtype)
        model = Decoder(checkpoint.config, checkpoint.stored(), device, dtype)
        tokenizer = checkpoint.tokenizer()
        model.identity = checkpoint.identity
        if resolved.draft_model is not None:  # one that comes with Paceline is found by the identity
            model.vocabulary = vocabulary_digest(tokenizer)
        return cls(model, tokenizer, resolved, checkpoint.sampling)

    def sibling(self, config: ResolvedConfig) -> Engine:
        """Another engine over the same weights, with a cache and state of its own."""
        return Engine(self.model, self.tokenizer, config, self.defaults)

    def warm_up(self, batch: int = 1, grammars: bool = False) -> None:
        """Compiles kernels and captures graphs of steps of up to `batch` requests, so that no request waits for them.

        With `grammars` also prepares the vocabulary for them, which takes a second for a large one.
        """
        if grammars:
            _ = self._grammars
        with deterministic(self.config.deterministic):
            self.runner.warm_up(batch)

    def submit(self, request: Request) -> str:
        """Queues a request; returns its id. Raises a RequestError for one that can never be served."""
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
            raise RequestError("logprobs together with a margin are not supported")
        numbered = (f"request-{number}" for number in self._numbers)
        name = request.id or next(each for each in numbered if each not in self._sequences)
        if name in self._sequences or name in self._unread:
            raise RequestError(f"a request {name!r} is running already")
        sequence = self._sequence(request, name, prompt, sources)
        self.scheduler.add(sequence)
        self._sequences[name] = sequence
        return name

    def cancel(self, name: str) -> None:
        """Ends a request now; its pages are free when the call returns. Unknown and finished names are ignored."""
        sequence = self._sequences.pop(name, None)
        if sequence is not None:
            self.scheduler.cancel(sequence)

    @property
    def vocab_size(self) -> int:
        """Tokens that the model has."""
        return self.model.config.vocab_size

    @property
    def capacity(self) -> int:
        """The most tokens that a prompt and its output may have together."""
        return min(self.config.max_context, (self.pool.num_pages - 1) * self.config.page_size - 1)

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or bool(self._in_flight) or bool(self._unread[None])

    def stats(self) -> EngineStats:
        """Requests by status, and KV pages."""
        return self.scheduler.stats()

    def step(self) -> list[StepOutput]:
        """Launches the next step, then reads the oldest in-flight one; on CUDA the host reads one step behind.

        An error within the step ends the requests that it concerns; the engine continues with the others.
        """
        unread = list(self._unread[None])
        self._unread[None].clear()
        return unread + (self._step() if self.busy else [])

    def stream(self, request: Request) -> Iterator[StepOutput]:
        """Runs one request, step by step. Closing the iterator cancels it. The last output has an `error` if it failed.

        Other requests submitted before advance too; their outputs are kept for their streams, or for `step`.
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
        """Runs requests together to their ends; completions in their order, those that failed with their `error`.

        Raises RequestError, and runs none, if one of them cannot be served.
        """
        sequences: list[Sequence] = []
        try:
            for request in requests:
                sequences.append(self._sequences[self.submit(request)])
            texts: dict[str, list[str]] = {each.name: [] for each in sequences}
            while any(sequence.finish is None for sequence in sequences):
                for output in self._step():
                    if output.request_id in texts:
                        texts[output.request_id].append(output.text)
                    else:
                        self._sort([output])
        finally:
            for sequence in sequences:
                if sequence.finish is None:
                    self.cancel(sequence.name)
        return [_completion(sequence, "".join(texts[sequence.name])) for sequence in sequences]

    def _sort(self, outputs: Iterable[StepOutput]) -> None:
        """Keeps outputs for the streams that they belong to, others for the next `step`."""
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
                    self._in_flight.append(self.runner.launch(work))
                    self.scheduler.launched(work)
        except BaseException as error:
            # if scheduling failed, it is unknown whose state is affected: all requests end
            concerned = list(self._sequences.values()) if work is None else work.sequences
            outputs += self._fail(concerned, error)
        lag = 0 if work is not None and work.synchronous else self.runner.lag
        while self._in_flight and (work is None or len(self._in_flight) > lag):
            outputs += self._read(self._in_flight.popleft())
        if not self.scheduler.busy:
            self._in_flight.clear()  # the rest was launched for requests that have ended
        return outputs

    def _array(self, tokens: TokenIds, what: str) -> Any:
        """Tokens as an array, [T] int64. Raises RequestError for a value that is not a token of the model."""
        vocabulary = self.vocab_size
        try:
            array = np.asarray(tokens)  # checking its bounds is ten times as fast as checking a list's
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
            detokenizer=Detokenizer(
                self._text_bytes if request.text else _no_bytes, sampling.stop, sampling.min_tokens
            ),
            whole_text=self._whole_text if request.text else _no_text,
            stops=frozenset(stops),
            acceptance=self._global_acceptance[bool(request.sources)].new_request(),
            tokens=list(request.prompt),
            prompt=prompt,
            prompt_length=len(prompt),
            sources=sources,
            matcher=None if sampling.grammar is None else self._grammars.matcher(sampling.grammar),
        )
        sequence.usage.prompt_tokens = len(request.prompt)
        return sequence

    @functools.cached_property
    def _grammars(self) -> Grammars:
        """Made for the first request with a grammar, or by `warm_up`."""
        return Grammars(self.tokenizer, self.model.config.vocab_size)

    def _read(self, step: InFlightStep) -> list[StepOutput]:
        """Reads an in-flight step; returns its outputs.

        If the step cannot be read, all its requests fail; if a request's tokens cannot be processed, that request fails.
        """
        results: Any  # pairs of a sequence and what `apply` takes
        apply: Callable[[Sequence, Any], StepOutput]
        try:
            step.wait()
            now = time.perf_counter()
            self.runner.learn(step, now)
            if step.chunks:
                self.scheduler.chunk_cost.add(step.chunks, step.seconds(now))
            if step.is_plain:
                results, apply = step.read_tokens(), Sequence.append_token
                self.lengths.observe_plain(step)
            else:
                results, apply = step.read(), self._apply
        except BaseException as error:
            return self._fail(step.current, error)
        outputs = []
        for sequence, result in results:
            try:
                output = apply(sequence, result)
                if sequence.finish is not None:
                    self._retire(sequence)
                outputs.append(output)
            except BaseException as error:
                interrupted = isinstance(error, _INTERRUPTS)
                outputs += self._fail([each for each, _ in results] if interrupted else [sequence], error)
        return outputs

    def _fail(self, sequences: list[Sequence], error: BaseException) -> list[StepOutput]:
        """Ends `sequences` by `error`; returns their last outputs.

        Raises `error` if it is an interrupt, and the device's own error if the device has failed.
        """
        outputs = []
        failed = EngineFailed("the engine failed on this request; see its log")
        reason = error if isinstance(error, PacelineError) else failed
        for sequence in sequences:
            if self._sequences.get(sequence.name) is sequence:  # `finish` may be set already, if retiring it has failed
                outputs.append(sequence.fail(reason))
                self._retire(sequence)
        if isinstance(error, _INTERRUPTS):
            raise error
        _log.error("a step failed; it ends %d requests", len(outputs), exc_info=error)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # raises where the device has failed
        return outputs

    def _retire(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended. If by an error, nothing that its last step computed is cached."""
        if sequence.failure is None:
            self.scheduler.finish(sequence)
        else:
            self.scheduler.drop(sequence)
        self._sequences.pop(sequence.name, None)

    def _apply(self, sequence: Sequence, result: StepResult) -> StepOutput:
        """Adds a step's result to its sequence, to the acceptance records and to the usage."""
        if sequence.failure is not None:  # it failed within the step, whose tokens are not its output
            return sequence.fail(sequence.failure)
        sequence.end -= result.length + 1 - len(result.tokens)
        usage, row = sequence.usage, result.row
        usage.steps += result.decode
        drafted = source_accepted = 0
        if result.length:
            drafted, source_accepted = row[verify.NUM_DRAFTED], row[verify.SOURCE_ACCEPTED]
            usage.drafted_tokens += drafted
            usage.margin_tokens += row[verify.MARGIN_ACCEPTED]
            usage.source_drafted_tokens += row[verify.SOURCE_DRAFTED]
        self.lengths.observe(sequence, result)
        return sequence.append(result.tokens, result.logprobs, drafted, source_accepted)


def _no_bytes(token: int) -> bytes:
    return b""


def _no_text(token: int) -> str:
    return ""


def _completion(sequence: Sequence, text: str) -> Completion:
    """A finished sequence as its caller sees it; `text` is that of its outputs. Raises Cancelled for a cancelled one."""
    if sequence.finish is None or sequence.finish is FinishReason.CANCELLED:
        raise Cancelled(f"request {sequence.name!r} was cancelled")
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


def _make_runner(model: Model, cache: KVCache, config: ResolvedConfig, drafter: Drafter) -> Runner:
    if model.device.type == "cuda" and config.cuda_graphs:
        from paceline.engine.graphs import GraphRunner

        return GraphRunner(model, cache, config, drafter)
    return Runner(model, cache, config, drafter)


def _num_pages(layout: CacheLayout, device: torch.device, config: ResolvedConfig) -> int:
    """Pages of the cache: `cache_tokens`, or by free memory.

    On CUDA that is most of it, up to a limit. On CPU it is a quarter, and at most 4 GiB or two full contexts, whichever is
    more; the system provides that memory only as it is written to.
    """
    size = config.page_size
    if config.cache_tokens is not None:
        return config.cache_tokens // size + 1
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading needed for a while counts as free
        budget = int(torch.cuda.mem_get_info(device)[0] * 0.8)
        return max(2, min(budget // layout.page_bytes, _MAX_CACHED_TOKENS // size))
    most = max(_MAX_CACHED_BYTES_ON_CPU, 2 * config.max_context // size * layout.page_bytes)
    budget = min(Hardware.detect().free_bytes // 4, most)
    return max(2, budget // layout.page_bytes)
