"""Which requests a step serves: pages that run short, prompts that share chunks, tenants that share nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from paceline.engine.cost import ChunkCost
from paceline.engine.engine import Engine
from paceline.engine.scheduler import Decode, Prefill
from paceline.types import Request, Sampling
from tests.engine.test_engine import copying_request, everything_is_back, plain
from tests.tiny import tiny_engine

Watched = Callable[[Engine], list[Prefill | Decode]]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Collects an engine's steps."""

    def watch(engine: Engine) -> list[Prefill | Decode]:
        steps: list[Prefill | Decode] = []
        launch = engine.runner.launch

        def noting(work: Prefill | Decode) -> Any:
            steps.append(work)
            return launch(work)

        monkeypatch.setattr(engine.runner, "launch", noting)
        return steps

    return watch


def test_a_uniform_step_has_one_draft_length_also_when_pages_run_short(watched: Watched) -> None:
    draw = random.Random(4)
    requests = [copying_request(draw) for _ in range(48)]
    expected = plain(tiny_engine(drafter="none", prefix_cache=False), requests)
    engine = tiny_engine(cache_tokens=320, max_batch=8, fixed_draft=64)
    engine.runner.uniform = engine.scheduler.uniform = True
    steps = watched(engine)
    assert [each.tokens for each in engine.generate(requests)] == expected
    lengths = [set(step.lengths) for step in steps if isinstance(step, Decode)]
    assert all(len(each) == 1 for each in lengths)
    assert {64, 0} < set().union(*lengths), "no step drafted less for want of pages"
    everything_is_back(engine)


def test_a_slot_begins_without_its_last_owners_pages() -> None:
    engine = tiny_engine(max_batch=1, prefix_cache=False)
    engine.generate([Request([1] * 200, Sampling(max_tokens=60, ignore_eos=True))])
    assert engine.runner.page_table[0].count_nonzero() > 12
    engine.generate([Request([2], Sampling(max_tokens=2, ignore_eos=True))])
    assert engine.runner.page_table[0].count_nonzero() <= 1


def test_a_short_prompt_does_not_wait_for_a_long_one(watched: Watched) -> None:
    engine = tiny_engine(prefill_chunk=64)
    steps = watched(engine)
    sampling = Sampling(max_tokens=2, ignore_eos=True)
    long, short = engine.submit(Request([1] * 500, sampling)), ""
    order = []
    while engine.busy:
        order += [each.request_id for each in engine.step() if each.finish]
        short = short or engine.submit(Request([2] * 20, sampling))
    assert order == [short, long]
    second = steps[1]
    assert isinstance(second, Prefill)
    assert [(each.sequence.name, each.end - each.start) for each in second.chunks] == [(long, 44), (short, 20)]


def test_a_long_prompt_goes_on_however_many_short_ones_come(watched: Watched) -> None:
    engine = tiny_engine(prefill_chunk=64, max_batch=32)
    steps = watched(engine)
    sampling = Sampling(max_tokens=1, ignore_eos=True)
    long = engine.submit(Request([1] * 480, sampling))
    seed = 0
    while long in engine._sequences:
        for _ in range(3):  # more than a chunk has room for
            seed += 1
            engine.submit(Request([2, seed % 250, *([3] * 30)], sampling))
        engine.step()
    own = [each for step in steps for each in step.chunks if each.sequence.name == long]  # type: ignore[union-attr]
    assert [each.end - each.start for each in own][1:-1] == [16] * (len(own) - 2)
    while engine.busy:
        engine.step()
    everything_is_back(engine)


def test_a_chunk_is_as_long_as_running_requests_may_wait(watched: Watched) -> None:
    engine = tiny_engine(prefill_chunk=512, max_stall_ms=50, max_context=2048)
    cost = ChunkCost(1e9)
    cost.add([(0, 512)], 0.512)
    cost.add([(0, 64)], 0.064)
    engine.scheduler.chunk_cost = cost
    cost.add = lambda ranges, seconds: None  # type: ignore[method-assign]  # a millisecond a token, whatever this machine takes
    steps = watched(engine)
    running = engine.submit(Request([1, 2], Sampling(max_tokens=100, ignore_eos=True)))
    while not engine._sequences[running].first_token:
        engine.step()
    waiting = engine.submit(Request([3] * 300, Sampling(max_tokens=1, ignore_eos=True)))
    while waiting in engine._sequences:
        engine.step()
    chunks = [[each.end - each.start for each in step.chunks] for step in steps[1:] if isinstance(step, Prefill)]
    assert chunks == [[32]] * 9 + [[12]], chunks
    while engine.busy:
        engine.step()
    steps.clear()
    engine.generate([Request([4] * 512, Sampling(max_tokens=1, ignore_eos=True))])
    assert isinstance(steps[0], Prefill) and steps[0].chunks[0].end == 512, "nobody waits for it"


def test_a_chunks_cost_grows_with_the_context_and_is_inverted() -> None:
    cost = ChunkCost(even=1000)
    for size in (32, 256, 2048):
        cost.add([(0, size)], 0.001 * cost.load(0, size))
    assert cost.affordable(2048, 0, 10.0) == 2048
    assert cost.affordable(2048, 0, 0.3) == 256
    assert cost.affordable(2048, 9000, 0.3) == 32
    assert ChunkCost(1000).affordable(2048, 0, 10.0) == 32, "nothing is known yet"
    assert ChunkCost(1000).affordable(20, 0, 10.0) == 20


def test_one_slow_chunk_makes_no_later_one_tiny() -> None:
    cost = ChunkCost(even=1e9)
    cost.add([(0, 512)], 3.4)
    assert cost.affordable(512, 0, 3.0) == 224
    cost.add([(0, 224)], 1.5)
    assert cost.affordable(512, 0, 3.0) == 416


def test_namespaces_share_no_cached_prefix() -> None:
    engine = tiny_engine()
    prompt, sampling = [7] * 64, Sampling(max_tokens=2, ignore_eos=True)
    cached = [
        engine.generate([Request(prompt, sampling, namespace=name)])[0].usage.cached_tokens
        for name in ("a", "b", "a", "b", "")
    ]
    assert cached == [0, 0, 48, 48, 0]
    everything_is_back(engine)


def test_namespaces_leave_nothing_when_their_pages_are_gone() -> None:
    engine = tiny_engine(cache_tokens=256)
    sampling = Sampling(max_tokens=2, ignore_eos=True)
    for number in range(100):
        engine.generate([Request([number] * 40, sampling, namespace=str(number))])
    assert engine.tree is not None
    assert len(engine.tree._roots) <= 9
    everything_is_back(engine)
