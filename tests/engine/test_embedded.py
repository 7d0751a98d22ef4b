"""The engine as a library: streams side by side, requests that fail, values out of range, and what stays usable."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from paceline.engine.detokenize import Detokenizer
from paceline.engine.engine import Engine
from paceline.engine.grammar import GrammarMatcher
from paceline.engine.runner import Runner
from paceline.engine.sequence import Sequence
from paceline.errors import BadGrammar, ContextExceeded, EngineFailed, RequestError
from paceline.tasks.apply import apply
from paceline.types import FinishReason, Request, Sampling
from tests.engine.test_engine import copying_request, everything_is_back
from tests.tiny import tiny_engine

LONG = Sampling(max_tokens=30, ignore_eos=True)


def alone(prompt: list[int], sampling: Sampling = LONG) -> list[int]:
    return tiny_engine().generate([Request(prompt, sampling)])[0].tokens


def test_streams_side_by_side_lose_nothing() -> None:
    engine = tiny_engine()
    prompts = [[1, 2], [3], [4, 5, 6]]
    streams = [engine.stream(Request(prompt, LONG)) for prompt in prompts]
    found: list[list[int]] = [[], [], []]
    open_ = {0, 1, 2}
    while open_:
        for index in sorted(open_):
            output = next(streams[index], None)
            if output is None:
                open_.remove(index)
            else:
                found[index] += output.tokens
    assert found == [alone(prompt) for prompt in prompts]
    everything_is_back(engine)


def test_what_a_stream_or_generate_passes_by_is_read_by_step() -> None:
    engine = tiny_engine()
    name = engine.submit(Request([1, 2], LONG))
    list(engine.stream(Request([3], LONG)))
    engine.generate([Request([4], LONG)])
    found: list[int] = []
    while engine.busy:
        for output in engine.step():
            assert output.request_id == name
            found += output.tokens
    assert found == alone([1, 2])


def test_a_request_that_cannot_be_served_leaves_none_running() -> None:
    engine = tiny_engine()
    with pytest.raises(ContextExceeded):
        engine.generate([Request([1], LONG), Request([1] * 600)])
    everything_is_back(engine)
    assert engine.generate([Request([1], LONG)])[0].tokens == alone([1])


def test_an_automatic_id_is_one_that_no_caller_has() -> None:
    engine = tiny_engine()
    own = [engine.submit(Request([1], LONG, id=f"request-{number}")) for number in (1, 2)]
    others = [engine.submit(Request([1], LONG)) for _ in range(3)]
    assert len({*own, *others}) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": value} for value in (1e39, math.inf, math.nan, -0.1)]
    + [{name: value} for name in ("presence_penalty", "frequency_penalty") for value in (1e39, math.nan, 2.1)]
    + [{"repetition_penalty": value} for value in (0.0, 1e39, math.nan)]
    + [{"top_p": math.nan}, {"min_p": math.nan}, {"top_k": -1}, {"seed": 1 << 63}, {"logit_bias": {1: 1e39}}]
    + [{"logit_bias": {1: math.nan}}, {"logit_bias": dict.fromkeys(range(2000), 1.0)}, {"prompt_logprobs": 21}],
)
def test_a_number_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("margin", [1e39, math.nan, -1.0])
def test_a_margin_out_of_range_is_refused(margin: float) -> None:
    with pytest.raises(RequestError, match="margin"):
        Request([1], margin=margin)


@pytest.mark.parametrize(
    "wrong",
    [
        Request([1], Sampling(logit_bias={258: 1.0})),
        Request([1], Sampling(stop_tokens=(10**6,), min_tokens=1)),
        Request([1], sources=([1, 258],)),
        Request([1], sources=([1 << 40],)),
        Request([1], sources=([1 << 70],)),
        Request([1.5]),  # type: ignore[list-item]
        Request(["12"]),  # type: ignore[list-item]
        Request([1], sources=([[1], [2, 3]],)),  # type: ignore[list-item]
        Request("text"),  # type: ignore[arg-type]
        Request([[1], [2]]),  # type: ignore[list-item]
    ],
)
def test_a_token_that_the_model_has_not_is_refused(wrong: Request) -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match="vocabulary of 258"):
        engine.submit(wrong)
    everything_is_back(engine)


def test_end_tokens_beyond_the_models_vocabulary_are_none() -> None:
    engine = tiny_engine()
    engine.tokenizer.eos_tokens = (257, 300)
    held = Sampling(max_tokens=12, min_tokens=9)
    assert len(engine.generate([Request([1], held)])[0].tokens) >= 9


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, when: Callable[..., bool]) -> None:
    """Lets a method raise where `when` says."""
    own = getattr(owner, method)

    def wrapped(*arguments: Any) -> Any:
        if when(*arguments):
            raise ArithmeticError("a bug")
        return own(*arguments)

    monkeypatch.setattr(owner, method, wrapped)


def survivors(engine: Engine, failed: int) -> None:
    """Three requests together of which `failed` end by an error; the others, and later ones, are as ever."""
    prompts = [[1, 2], [66], [4, 5, 6]]
    completions = engine.generate([Request(prompt, LONG) for prompt in prompts])
    lost = [each for each in completions if each.finish is FinishReason.FAILED]
    assert len(lost) == failed and all(isinstance(each.error, EngineFailed) for each in lost)
    for prompt, each in zip(prompts, completions, strict=True):
        assert each.error is not None or each.tokens == alone(prompt)
    everything_is_back(engine)


@pytest.mark.parametrize(("owner", "method"), [(Runner, "start"), (Sequence, "append")])
def test_an_error_that_concerns_one_request_ends_that_one(
    monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    engine = tiny_engine()

    def is_it(*arguments: Any) -> bool:
        sequence = next(each for each in arguments if isinstance(each, Sequence))
        return sequence.prompt_length == 1 and engine._sequences.get(sequence.name) is sequence

    failing(monkeypatch, owner, method, is_it)
    survivors(engine, failed=1)


@pytest.mark.parametrize("method", ["launch", "prompt_logits", "decode", "verify"])
def test_an_error_of_a_whole_step_ends_its_requests_alone(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    engine = tiny_engine()
    again = engine.generate([Request([9] * 40, LONG)])[0].tokens
    times = iter([True])
    failing(monkeypatch, Runner, method, lambda runner, *rest: runner is engine.runner and next(times, False))
    survivors(engine, failed=3)
    survivors(engine, failed=0)
    assert engine.generate([Request([9] * 40, LONG)])[0].tokens == again


def test_what_a_failed_chunk_should_have_computed_is_in_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(prefill_chunk=32)
    prompt = list(range(100))
    times = iter([False, True])
    failing(monkeypatch, Runner, "prompt_logits", lambda runner, *rest: runner is engine.runner and next(times, False))
    assert engine.generate([Request(prompt, LONG)])[0].error is not None
    everything_is_back(engine)
    completion = engine.generate([Request(prompt, LONG)])[0]
    assert completion.usage.cached_tokens == 0 and completion.tokens == alone(prompt)


def test_an_error_at_a_requests_end_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `finish` is set by then."""
    engine = tiny_engine()
    failing(monkeypatch, Detokenizer, "finish", lambda words: True)
    engine.submit(Request([1], Sampling(max_tokens=3, ignore_eos=True)))
    outputs = [output for _ in range(20) if engine.busy for output in engine.step()]
    assert outputs[-1].finish is FinishReason.FAILED
    everything_is_back(engine)


def any_request(draw: random.Random, index: int) -> Request:
    values: dict[str, Any] = {
        "temperature": draw.choice((0.0, 0.9)),
        "seed": index,
        "max_tokens": draw.randrange(3, 40),
    }
    some: list[dict[str, Any]] = [
        {},
        {"grammar": "start: /[a-f]{1,30}/\n"},
        {"stop": ("a", "qu", "z"), "min_tokens": 2},
    ]
    values |= draw.choice([*some, {"prompt_logprobs": 1}, {"frequency_penalty": 0.5, "logprobs": 1}])
    made = copying_request(draw, **values)
    begin = [1, 2, 3, 4, 5, 0] * 8 if draw.random() < 0.3 else []
    return replace(made, prompt=begin + made.prompt, namespace=draw.choice(("", "a")))


def test_errors_and_cancels_at_random_change_no_other_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.service import tiny

    draw = random.Random(4)
    armed = False
    points: list[tuple[type, str]] = [
        (Runner, name) for name in ("prompt_logits", "start", "target_pass", "verify", "_constrain")
    ]
    points += [
        (Sequence, "append"),
        (Sequence, "append_token"),
        (GrammarMatcher, "advance"),
        (GrammarMatcher, "masks"),
        (Detokenizer, "feed"),
    ]
    for point in points:
        failing(monkeypatch, *point, lambda *_: armed and draw.random() < 0.004)
    requests = [any_request(draw, index) for index in range(24)]
    alone = tiny(drafter="none", prefix_cache=False)
    expected = [alone.generate([each])[0] for each in requests]
    ends: dict[FinishReason, int] = defaultdict(int)
    settings: dict[str, Any]
    for settings in ({"max_batch": 8, "prefill_chunk": 20}, {"max_batch": 4, "fixed_draft": 12}):
        engine = tiny(max_context=256, cache_tokens=256, **settings)
        waiting, running = list(range(len(requests))), {}
        tokens: dict[int, list[int]] = defaultdict(list)
        armed = True
        for _ in range(3000):
            if waiting and draw.random() < 0.4:
                index = waiting.pop(0)
                running[engine.submit(requests[index])] = index
            if running and draw.random() < 0.01:
                name = draw.choice(list(running))
                engine.cancel(name)
                del running[name]
            for output in engine.step():
                index = running[output.request_id]
                tokens[index] += output.tokens
                if output.finish:
                    ends[output.finish] += 1
                    del running[output.request_id]
                    whole = expected[index].tokens
                    assert tokens[index] == (whole if output.error is None else whole[: len(tokens[index])])
        armed = False
        assert not waiting and not running
        everything_is_back(engine)
        assert [each.tokens for each in engine.generate(requests)] == [each.tokens for each in expected]
    assert ends[FinishReason.FAILED] > 10 and ends[FinishReason.LENGTH] > 10, ends


def test_an_interrupt_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    launch = engine.runner.launch
    steps = iter(range(100))

    def interrupted(work: Any) -> Any:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return launch(work)

    monkeypatch.setattr(engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request([1], LONG), Request([2], LONG)])
    everything_is_back(engine)
    survivors(engine, failed=0)


def test_one_grammar_that_fails_loses_no_other_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.serve.service import tiny

    engine = tiny()
    calls = iter(range(100))
    advance = GrammarMatcher.advance
    monkeypatch.setattr(
        GrammarMatcher, "advance", lambda self, tokens: "too much" if next(calls) == 3 else advance(self, tokens)
    )
    sampling = Sampling(max_tokens=20, grammar="start: /[a-z]{30}/\n")
    held, free = engine.generate([Request([5, 6], sampling), Request([7], LONG)])
    assert held.finish is FinishReason.FAILED and isinstance(held.error, BadGrammar)
    assert len(free.tokens) == 30 and free.error is None


def test_a_grammars_end_is_the_outputs_whatever_ignore_eos_says() -> None:
    from tests.serve.service import tiny

    sampling = Sampling(max_tokens=20, ignore_eos=True, grammar='start: "ab" | "abab"\n')
    found = [
        tiny(**settings).generate([Request([97, 98] * 8, sampling, sources=([97, 98, 97, 98, 97, 98],))])[0]
        for settings in ({"drafter": "none"}, {"fixed_draft": 8})
    ]
    assert found[0].tokens == found[1].tokens
    assert {each.finish for each in found} == {FinishReason.STOP} and found[0].text in ("ab", "abab")


def test_prompt_logprobs_are_those_of_the_prompt() -> None:
    prompt = [5, 9, 200, 7, 7, 31] * 9
    for settings in ({"prefill_chunk": 16}, {}, {"fixed_draft": 8}):
        engine = tiny_engine(**settings)  # type: ignore[arg-type]
        engine.generate([Request(prompt, LONG)])  # what is cached is computed again
        sampling = Sampling(max_tokens=3, prompt_logprobs=2, logprobs=1, ignore_eos=True)
        asked, other = engine.generate([Request(prompt, sampling), Request([1, 2, 3], LONG)])
        assert other.tokens == alone([1, 2, 3]) and other.prompt_logprobs == ()
        assert [each.token for each in asked.prompt_logprobs] == prompt[1:]
        for place in (1, 15, 16, 17, len(prompt) - 1):
            step = Sampling(max_tokens=1, logprobs=20, ignore_eos=True)
            before = engine.generate([Request(prompt[:place], step)])[0].logprobs[0].top
            reported = asked.prompt_logprobs[place - 1]
            assert [token for token, _ in reported.top] == [token for token, _ in before[:2]]
            torch.testing.assert_close(reported.top[0][1], before[0][1], atol=1e-4, rtol=0)
            if reported.token in dict(before):
                assert abs(dict(before)[reported.token] - reported.logprob) < 1e-4
        outputs = list(engine.stream(Request(prompt, sampling)))
        assert [len(each.prompt_logprobs) for each in outputs][:2] == [len(prompt) - 1, 0]


def test_a_failed_request_is_an_error_to_fast_apply_and_to_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the error is no result: a part of a merged file would be written as the file."""
    from tests.serve.service import byte_tokenizer, tiny

    tokenizer = byte_tokenizer()
    engine = tiny(tokenizer, max_context=4096)
    steps = iter(range(10**6))
    launch = engine.runner.launch
    monkeypatch.setattr(engine.runner, "launch", lambda work: launch(work) if next(steps) < 2 else 1 // 0)
    with pytest.raises(EngineFailed):
        apply(engine, "a = 1\nb = 2\n", "a = 2\n", policy="review-margin")
    everything_is_back(engine)
    with pytest.raises(EngineFailed):
        engine.generate([Request([1], LONG)])[0].checked()
