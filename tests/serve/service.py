"""A real server on a free port, over a tiny random model or a scripted engine, with a real tokenizer of 256 bytes and a few
markers.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from paceline.config import EngineConfig, Hardware, resolve
from paceline.engine.client import EngineStats
from paceline.engine.detokenize import Detokenizer
from paceline.engine.engine import Engine
from paceline.models.decoder import Decoder
from paceline.models.tokenizer import Tokenizer, byte_of_character
from paceline.serve.host import Host
from paceline.serve.metrics import Metrics
from paceline.serve.run import Server, make_service
from paceline.serve.service import Service
from paceline.types import FinishReason, Request, StepOutput, Usage
from tests.tiny import random_tensors, tiny_config

TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else 'Help.' %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}
    {{- '\\nTools, called as <tool_call>{"name": ..., "arguments": ...}</tool_call>:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}{{- raise_exception('system only at the start') }}{%- endif %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MARKERS = ("<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
SPOKEN = ("<tool_call>", "</tool_call>")  # markers that are not special tokens
SCRIPTED_CONTEXT = 8192


def byte_tokenizer(markers: tuple[str, ...] = MARKERS, template: str | None = TEMPLATE) -> Tokenizer:
    vocabulary = {character: byte for character, byte in byte_of_character().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(each, normalized=False, special=True) for each in markers])
    backend.add_tokens([AddedToken(each, normalized=False, special=False) for each in SPOKEN])
    specials = {each: backend.token_to_id(each) for each in (*markers, *SPOKEN)}
    return Tokenizer(backend, specials, (specials["<|im_end|>"],), template)


def tiny(tokenizer: Tokenizer | None = None, **settings: Any) -> Engine:
    tokenizer = tokenizer or byte_tokenizer()
    values = {"device": "cpu", "dtype": "float32", "max_context": 2048, "cache_tokens": 8192, "threads": 1, **settings}
    longest = max(4096, values["max_context"])
    shape = tiny_config(vocab_size=tokenizer.vocab_size, eos_tokens=tokenizer.eos_tokens, max_positions=longest)
    resolved = resolve(EngineConfig(**values), Hardware(False, 1, 1 << 30), shape.max_positions)
    return Engine(Decoder(shape, random_tensors(shape), torch.device("cpu")), tokenizer, resolved)


class ScriptedEngine:
    """An EngineClient that outputs given texts: one for each request, in order, then the last one again.

    A step has `size` tokens and takes `seconds`. With `drafted`, all tokens of a step except the last are marked as
    accepted draft tokens, from a request's second step on. With `fails`, `step` raises.
    """

    def __init__(
        self, *texts: str, size: int = 3, fails: bool = False, drafted: bool = False, seconds: float = 0.0003
    ) -> None:
        self.tokenizer = byte_tokenizer()
        self.config = resolve(EngineConfig(device="cpu"), Hardware(False, 1, 1 << 30), SCRIPTED_CONTEXT)
        self.texts = list(texts)
        self.size = size
        self.fails = fails
        self.drafted = drafted
        self.seconds = seconds
        self.requests: list[Request] = []
        self._left: dict[str, list[int]] = {}
        self._counts: dict[str, Usage] = {}
        self._words: dict[str, Detokenizer] = {}

    @property
    def busy(self) -> bool:
        return bool(self._left)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def capacity(self) -> int:
        return self.config.max_context

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._left))

    def submit(self, request: Request) -> str:
        if request.prompt[-4:] == list(b"BUG!"):
            raise ZeroDivisionError("a bug in submit")
        self.requests.append(request)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        self._left[request.id] = [*text.encode(), self.tokenizer.eos_tokens[0]]
        self._counts[request.id] = Usage(prompt_tokens=len(request.prompt))
        self._words[request.id] = Detokenizer(self.tokenizer.token_bytes, ())
        return request.id

    def cancel(self, name: str) -> None:
        self._left.pop(name, None)

    def step(self) -> list[StepOutput]:
        if self.fails:
            raise RuntimeError("the device is gone")
        time.sleep(self.seconds)  # simulates a device's step, during which other threads run
        outputs = []
        for name, left in list(self._left.items()):
            tokens, rest = left[: self.size], left[self.size :]
            self._left[name] = rest
            usage = self._counts[name]
            num_accepted = len(tokens) - 1 if self.drafted and usage.output_tokens else 0
            usage.output_tokens += len(tokens)
            usage.drafted_tokens += num_accepted
            usage.accepted_tokens += num_accepted
            finish = None if rest else FinishReason.STOP
            words = self._words[name]
            text = words.feed(tokens[:-1] if finish else tokens)[0] + (words.finish() if finish else "")
            if finish:
                del self._left[name]
            flags = [index < num_accepted for index in range(len(tokens))]
            outputs.append(StepOutput(name, tokens, text, flags, (), finish, usage if finish else None))
        return outputs


def scripted(script: ScriptedEngine, *, body_seconds: float = 60.0, **options: Any) -> Service:
    metrics = Metrics("tiny")
    return Service(Host(script, observer=metrics, **options), metrics, ("tiny",), body_seconds=body_seconds)


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """Runs the server; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(service, "127.0.0.1", port)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started and service.host.state != "starting")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(holds: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)


def tiny_service(engine: Engine | None = None, keys: tuple[str, ...] = ()) -> Service:
    return make_service(engine or tiny(), ["tiny", "other-name"], keys, apply_names=["own-apply"])
