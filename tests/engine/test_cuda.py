"""The engine on a GPU: graphs, kernels and the host one step behind give the tokens that plain steps on CPU give."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from paceline.errors import EngineFailed
from paceline.types import Request, Sampling
from tests.engine.test_engine import copying_request, everything_is_back, mutated, plain
from tests.tiny import tiny_engine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPE = {"head_dim": 64, "hidden_size": 256, "intermediate_size": 512}


def engine(family: str, **settings: Any) -> Any:
    return tiny_engine(family, shape=SHAPE, **settings)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_are_the_cpu_s(family: str, temperature: float) -> None:
    draw = random.Random(11)
    requests = [copying_request(draw, temperature=temperature, seed=index) for index in range(12)]
    expected = plain(engine(family, drafter="none", prefix_cache=False), requests)
    requests = [
        replace(each, sources=(mutated(draw, tokens),)) if index % 2 else each
        for index, (each, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    eager = {"cuda_graphs": False}
    short = {"cache_tokens": 320, "fixed_draft": 64}
    for settings in (
        {},
        {"fixed_draft": 64},
        {"drafter": "none"},
        eager,
        eager | {"fixed_draft": 16},
        short,
        eager | short,
    ):
        served = engine(family, device="cuda", max_batch=6, **settings)
        for _ in range(2):
            completions = served.generate(requests)
            assert [each.tokens for each in completions] == expected, settings
        everything_is_back(served)


def test_cancelling_with_a_step_in_flight() -> None:
    draw = random.Random(5)
    served = engine("qwen2", device="cuda", max_batch=4, cache_tokens=1024)
    alive: list[str] = []
    for _ in range(200):
        if draw.random() < 0.3:
            alive.append(served.submit(copying_request(draw)))
        if alive and draw.random() < 0.25:
            served.cancel(alive.pop(draw.randrange(len(alive))))
        served.step()
    while served.busy:
        served.step()
    everything_is_back(served)


def test_penalties_and_logprobs() -> None:
    request = Request([1, 2, 1, 2], Sampling(max_tokens=30, ignore_eos=True, frequency_penalty=0.4, logprobs=2))
    one, other = engine("qwen2"), engine("qwen2", device="cuda", fixed_draft=16)
    left, right = one.generate([request])[0], other.generate([request])[0]
    assert left.tokens == right.tokens
    assert all(abs(a.logprob - b.logprob) < 1e-3 for a, b in zip(left.logprobs, right.logprobs, strict=True))


def test_prompt_logprobs() -> None:
    sampling = Sampling(max_tokens=3, ignore_eos=True, prompt_logprobs=2)
    prompt = [1, 2, 7, 200, 5] * 30
    one, other = engine("qwen2"), engine("qwen2", device="cuda", prefill_chunk=64)
    left, right = (each.generate([Request(prompt, sampling), Request([9], Sampling())])[0] for each in (one, other))
    assert left.tokens == right.tokens and len(right.prompt_logprobs) == len(prompt) - 1
    for a, b in zip(left.prompt_logprobs, right.prompt_logprobs, strict=True):
        assert a.token == b.token and abs(a.logprob - b.logprob) < 1e-2


def test_a_full_memory_ends_its_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request([1, 2, 3], Sampling(max_tokens=30, ignore_eos=True))
    served = engine("qwen2", device="cuda", max_batch=4)
    expected = served.generate([request])[0].tokens
    launch = served.runner.launch
    times = iter([1, 1, 1 << 50])

    def launched(work: Any) -> Any:
        torch.empty(next(times, 1), dtype=torch.uint8, device="cuda")
        return launch(work)

    monkeypatch.setattr(served.runner, "launch", launched)
    assert isinstance(served.generate([request])[0].error, EngineFailed)
    everything_is_back(served)
    assert served.generate([request])[0].tokens == expected


def test_prompts_in_graphs() -> None:
    """Prompts of graph sizes and beside them, fresh, cached in part, in chunks and several at once."""
    draw = random.Random(7)
    settings: dict[str, Any] = {"max_context": 3200, "cache_tokens": 12800, "prefill_chunk": 2048}
    long = [draw.randrange(256) for _ in range(3100)]
    prompts = [long[:63], long[:64], long[:900], long[:1281], long[:2048], long, [*long[:1300], 5, 6], long[1500:3050]]
    requests = [Request(prompt, Sampling(max_tokens=12, ignore_eos=True)) for prompt in prompts]
    expected = plain(engine("qwen2", drafter="none", prefix_cache=False, **settings), requests)
    served = engine("qwen2", device="cuda", max_batch=4, **settings)
    served.warm_up(4)
    for _ in range(2):
        assert [served.generate([each])[0].tokens for each in requests] == expected
        assert [each.tokens for each in served.generate(requests)] == expected
    everything_is_back(served)


def test_grammars_hold_drafted_or_not() -> None:
    pytest.importorskip("llguidance")
    pytest.importorskip("starlette")
    from tests.engine.test_grammar import TOKENIZER, requests

    def made(**settings: Any) -> Any:
        vocabulary = {**SHAPE, "vocab_size": TOKENIZER.vocab_size, "eos_tokens": TOKENIZER.eos_tokens}
        served = tiny_engine("qwen2", shape=vocabulary, **settings)
        served.tokenizer = TOKENIZER
        return served

    expected = [made(drafter="none").generate([each])[0].tokens for each in requests(False)]
    for settings in ({}, {"fixed_draft": 16}):
        served = made(device="cuda", **settings)
        assert [each.tokens for each in served.generate(requests(True))] == expected, settings
        everything_is_back(served)
