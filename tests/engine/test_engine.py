"""What may never change a greedy or seeded output: batch, cache state, chunk size, drafter, preemption, cancellation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from paceline.engine.engine import Engine
from paceline.errors import Cancelled, ContextExceeded, EmptyPrompt, RequestError
from paceline.types import Completion, FinishReason, Request, Sampling, StepOutput
from tests.tiny import EOS, VOCABULARY, tiny_engine


def copying_request(draw: random.Random, **sampling: object) -> Request:
    """A prompt with repeats, and sources that hold what a tiny model may well write."""
    piece = [draw.randrange(6) for _ in range(draw.randrange(2, 30))]
    prompt = (piece * 3)[: draw.randrange(1, 90)]
    sources = tuple([draw.randrange(6) for _ in range(40)] for _ in range(draw.randrange(3)))
    values = {"max_tokens": draw.randrange(1, 60), "ignore_eos": True, **sampling}
    return Request(prompt, Sampling(**values), sources=sources)  # type: ignore[arg-type]


def mutated(draw: random.Random, tokens: list[int]) -> list[int]:
    """An output with a token replaced, a run dropped or a run put in, here and there."""
    changed = tokens[:]
    for _ in range(draw.randrange(3)):
        place = draw.randrange(len(changed) + 1)
        changed[place : place + draw.randrange(3)] = [draw.randrange(VOCABULARY) for _ in range(draw.randrange(3))]
    return changed


def plain(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [engine.generate([request])[0].tokens for request in requests]


def everything_is_back(engine: Engine) -> None:
    assert not engine.busy
    assert engine.tree is not None and engine.tree.num_locked == 0
    assert engine.pool.num_free + engine.tree.num_pages == engine.pool.num_pages - 1
    assert sorted(engine.scheduler._free_slots) == list(range(engine.config.max_batch))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nothing_changes_the_tokens(family: str, temperature: float) -> None:
    draw = random.Random(7)
    requests = [copying_request(draw, temperature=temperature, seed=index) for index in range(24)]
    expected = plain(tiny_engine(family, drafter="none", prefix_cache=False, max_batch=1), requests)
    requests = [
        replace(each, sources=(mutated(draw, tokens),)) if index % 2 else each
        for index, (each, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    settings = [
        {"prefill_chunk": 7, "max_batch": 5},
        {"fixed_draft": 64, "max_batch": 3},
        {"fixed_draft": 17},
        {"cache_tokens": 256, "max_batch": 8},
        {"cache_tokens": 256, "max_batch": 8, "drafter": "none", "prefill_chunk": 16},
        {"page_size": 4, "fixed_draft": 40},
        {"prefix_cache": False},
    ]
    preempted = accepted = 0
    for values in settings:
        engine = tiny_engine(family, **values)
        for _ in range(2):  # the second time from the prefix cache
            completions = engine.generate(requests)
            assert [each.tokens for each in completions] == expected, values
            accepted += sum(each.usage.accepted_tokens for each in completions)
        preempted += engine.scheduler.num_preempted
        if engine.tree is not None:
            everything_is_back(engine)
    assert preempted > 0, "no setting preempted anything"
    assert accepted > 100, "no draft was ever accepted"


def test_a_source_that_is_right_is_followed() -> None:
    reference = tiny_engine(drafter="none")
    request = Request([3, 1, 4], Sampling(max_tokens=300, ignore_eos=True))
    wanted = reference.generate([request])[0].tokens
    engine = tiny_engine()
    found = engine.generate([Request(request.prompt, request.sampling, sources=(wanted,))])[0]
    assert found.tokens == wanted
    assert found.usage.steps < 20 and found.usage.accepted_tokens > 250


def test_after_a_miss_it_is_in_step_again_within_two_steps() -> None:
    reference = tiny_engine(drafter="none", max_context=1024)
    request = Request([9, 9, 8], Sampling(max_tokens=400, ignore_eos=True))
    wanted = reference.generate([request])[0].tokens
    for name, source in {
        "a replaced token": [*wanted[:100], 255, *wanted[101:]],
        "an inserted token": [*wanted[:100], *wanted[101:]],
        "skipped tokens": [*wanted[:100], *([254, 253] * 20), *wanted[100:]],
        "a dropped run": [*wanted[:100], *wanted[130:]],
    }.items():
        engine = tiny_engine(fixed_draft=64, max_context=1024)
        found = engine.generate([Request(request.prompt, request.sampling, sources=(source,))])[0]
        assert found.tokens == wanted
        if name != "a dropped run":
            assert found.usage.steps <= -(-400 // 64) + 4, (name, found.usage.steps)


def test_sampling_keeps_the_distribution_under_drafts() -> None:
    """Chi-square of 4,000 two-token samples, drafted from a source, against the exact distribution."""
    engine = tiny_engine(fixed_draft=8, max_batch=64, cache_tokens=16384)
    sampling = {"temperature": 1.5, "top_k": 4, "max_tokens": 2, "ignore_eos": True}
    exact = exact_pairs(engine, [1, 2, 3], 1.5, 4)
    likely = max(exact, key=lambda pair: exact[pair])
    requests = [
        Request([1, 2, 3], Sampling(seed=seed, **sampling), sources=([*likely, 5],))  # type: ignore[arg-type]
        for seed in range(4000)
    ]
    completions = engine.generate(requests)
    assert sum(each.usage.accepted_tokens for each in completions) > 200
    seen = Counter(tuple(each.tokens) for each in completions)
    assert set(seen) <= set(exact)
    statistic = sum((seen[pair] - 4000 * share) ** 2 / (4000 * share) for pair, share in exact.items())
    assert statistic < 45, f"chi-square {statistic:.1f} of 15 degrees of freedom"  # p = 1e-4 is 44.3


def exact_pairs(engine: Engine, prompt: list[int], temperature: float, top_k: int) -> dict[tuple[int, int], float]:
    def after(tokens: list[int]) -> dict[int, float]:
        sampling = Sampling(max_tokens=1, logprobs=20, ignore_eos=True)
        top = engine.generate([Request(tokens, sampling)])[0].logprobs[0].top[:top_k]
        weights = torch.softmax(torch.tensor([value for _, value in top]) / temperature, 0).tolist()
        return {token: weight for (token, _), weight in zip(top, weights, strict=True)}

    return {
        (first, second): one * two
        for first, one in after(prompt).items()
        for second, two in after([*prompt, first]).items()
    }


def test_seeds_differ_and_repeat() -> None:
    engine = tiny_engine()
    run = lambda seed: engine.generate([Request([5], Sampling(temperature=2.0, seed=seed))])[0].tokens  # noqa: E731
    assert run(1) == run(1) != run(2)


def test_random_cancellation_leaks_nothing() -> None:
    draw = random.Random(3)
    engine = tiny_engine(cache_tokens=512, max_batch=6)
    alive: list[str] = []
    for _ in range(400):
        if draw.random() < 0.3:
            alive.append(engine.submit(copying_request(draw)))
        if alive and draw.random() < 0.25:
            engine.cancel(alive.pop(draw.randrange(len(alive))))
        engine.step()
    while engine.busy:
        engine.step()
    everything_is_back(engine)


def test_a_closed_stream_cancels_its_request() -> None:
    engine = tiny_engine()
    stream = engine.stream(Request([1], Sampling(max_tokens=100, ignore_eos=True)))
    next(stream)
    stream.close()
    everything_is_back(engine)


def test_out_of_pages_queues() -> None:
    engine = tiny_engine(cache_tokens=128, max_batch=16)
    requests = [Request([index, 1], Sampling(max_tokens=100, ignore_eos=True)) for index in range(8)]
    assert all(len(each.tokens) == 100 for each in engine.generate(requests))
    everything_is_back(engine)


def test_penalties_bias_and_min_tokens_are_the_same_drafted_or_not() -> None:
    draw = random.Random(5)
    requests = [
        copying_request(draw, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.2),
        copying_request(draw, logit_bias={4: 50.0}),
        copying_request(draw, temperature=0.7, seed=2, top_p=0.9, min_p=0.02, frequency_penalty=0.5),
    ]
    expected = plain(tiny_engine(drafter="none"), requests)
    assert plain(tiny_engine(fixed_draft=32), requests) == expected
    assert set(expected[1]) == {4}
    held = Request([1], Sampling(max_tokens=12, min_tokens=9, logit_bias={EOS: 100.0}))
    for settings in ({"drafter": "none"}, {"fixed_draft": 8}):
        assert len(tiny_engine(**settings).generate([held])[0].tokens) == 10  # type: ignore[arg-type]


def test_stop_strings_end_the_text_before_them_wherever_they_are_split() -> None:
    engine = tiny_engine(drafter="none")
    whole = engine.generate([Request([70, 71], Sampling(max_tokens=40, ignore_eos=True))])[0]
    text = whole.text
    stop = text[10:13]
    cut = engine.generate([Request([70, 71], Sampling(max_tokens=40, ignore_eos=True, stop=(stop,)))])[0]
    assert cut.finish is FinishReason.STOP and cut.text == text[: text.index(stop)]


def test_logprobs_are_of_the_tokens_and_the_same_when_drafted() -> None:
    request = Request([1, 2, 1, 2, 1], Sampling(max_tokens=20, logprobs=3, ignore_eos=True))
    one, other = (tiny_engine(**each).generate([request])[0] for each in ({"drafter": "none"}, {"fixed_draft": 16}))
    for left, right, token in zip(one.logprobs, other.logprobs, one.tokens, strict=True):
        assert left.token == right.token == token == left.top[0][0]
        assert abs(left.logprob - right.logprob) < 1e-4 and len(left.top) == 3


def test_two_engines_in_one_process() -> None:
    one, other = tiny_engine(seed=1), tiny_engine("qwen3", seed=2)
    request = Request([1, 2, 3], Sampling(max_tokens=30, ignore_eos=True))
    alone = [engine.generate([request])[0].tokens for engine in (tiny_engine(seed=1), tiny_engine("qwen3", seed=2))]
    names = [one.submit(request), other.submit(request)]
    found: dict[int, list[int]] = {0: [], 1: []}
    while one.busy or other.busy:
        for index, engine in enumerate((one, other)):
            for output in engine.step():
                assert output.request_id == names[index]
                found[index] += output.tokens
    assert [found[0], found[1]] == alone


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request([]), EmptyPrompt),
        (Request([1] * 500, Sampling(max_tokens=100)), ContextExceeded),
        (Request([100000]), RequestError),
        (Request([1], Sampling(logprobs=1), margin=0.5), RequestError),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(request_: Request, error: type[Exception]) -> None:
    engine = tiny_engine()
    with pytest.raises(error):
        engine.submit(request_)
    everything_is_back(engine)


def test_a_request_the_cache_could_never_hold_is_refused() -> None:
    with pytest.raises(ContextExceeded, match="KV pages"):
        tiny_engine(cache_tokens=64).submit(Request([1], Sampling(max_tokens=200)))


def test_a_cancelled_request_has_no_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    step = engine._step

    def cancelling() -> list[StepOutput]:
        engine.cancel("second")
        return step()

    monkeypatch.setattr(engine, "_step", cancelling)
    with pytest.raises(Cancelled, match="second"):
        engine.generate([Request([1]), Request([2], id="second")])
    everything_is_back(engine)


def test_usage_counts_are_true() -> None:
    engine = tiny_engine(fixed_draft=8)
    completion: Completion = engine.generate([Request([1] * 40, Sampling(max_tokens=50, ignore_eos=True))])[0]
    usage = completion.usage
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens) == (40, 50, 0)
    assert usage.accepted_tokens + usage.rejected_tokens == usage.drafted_tokens
    again = engine.generate([Request([1] * 40, Sampling(max_tokens=5, ignore_eos=True))])[0]
    assert again.usage.cached_tokens == 32


def test_each_step_without_drafts_counts() -> None:
    engine = tiny_engine(drafter="none")
    requests = [
        Request([index], Sampling(temperature=2.0, seed=index, max_tokens=1 + 3 * index, stop_tokens=(7, 70, 200)))
        for index in range(12)
    ]
    completions = engine.generate(requests)
    assert {each.finish for each in completions} == {FinishReason.STOP, FinishReason.LENGTH}
    for each in completions:
        assert (each.usage.output_tokens, each.usage.steps) == (len(each.tokens), len(each.tokens) - 1)


@pytest.mark.parametrize("settings", [{"drafter": "none"}, {"fixed_draft": 4}])
def test_the_text_is_that_of_the_tokens_wherever_characters_are_split(settings: dict[str, Any]) -> None:
    accented, bias = "aé€".encode(), dict.fromkeys([*"aé€".encode(), EOS], 100.0)
    sampling = Sampling(temperature=5.0, max_tokens=60, ignore_eos=True, logit_bias=bias)
    requests = [Request([index, 5], replace(sampling, seed=index)) for index in range(20)]
    completions = tiny_engine(**settings).generate(requests)
    assert any(character in each.text for each in completions for character in "é€")
    for each in completions:
        assert set(each.tokens) <= {*accented, EOS}
        assert each.text == bytes(token for token in each.tokens if token != EOS).decode("utf-8", "replace")


def test_a_request_without_text_has_the_same_tokens() -> None:
    draw = random.Random(9)
    requests = [copying_request(draw, temperature=0.8 * (index % 2), seed=index) for index in range(8)]
    expected = tiny_engine().generate(requests)
    silent = tiny_engine().generate([replace(each, text=False) for each in requests])
    assert [each.tokens for each in silent] == [each.tokens for each in expected]
    assert not any(each.text for each in silent) and any(each.text for each in expected)
    with pytest.raises(RequestError, match="stop strings"):
        Request([1], Sampling(stop=("a",)), text=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_is_bit_by_bit(dtype: str) -> None:
    """In bf16 tiny models tie all the time; deterministic steps choose alike all the same, logits included."""
    draw = random.Random(2)
    requests = [copying_request(draw, logprobs=1) for _ in range(10)]
    settings = {"dtype": dtype, "deterministic": True, "shape": {"hidden_size": 64, "head_dim": 16}}
    expected = tiny_engine(**settings, drafter="none", prefix_cache=False, max_batch=1).generate(requests)
    for changes in ({"fixed_draft": 40}, {"fixed_draft": 7, "prefill_chunk": 11}, {"cache_tokens": 256}):
        found = tiny_engine(**settings, **changes).generate(requests)
        assert [each.tokens for each in found] == [each.tokens for each in expected]
        assert [each.logprobs for each in found] == [each.logprobs for each in expected]
