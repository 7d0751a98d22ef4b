"""The graph runner without a GPU: CUDA's captures stood in for by functions that run again.

As with a real capture, what one gives is unwritten until it is replayed, and a replay writes to the same tensors. So the
order of captures and replays, padded shapes and the choice of graphs are tested everywhere; the kernels and CUDA itself
are left to test_cuda.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.engine import engine as engines
from paceline.engine import graphs
from paceline.engine.engine import Engine
from paceline.engine.graphs import GraphRunner
from paceline.engine.scheduler import Chunk
from paceline.engine.sequence import Sequence
from paceline.types import Request, Sampling
from tests.engine.test_engine import copying_request, everything_is_back, mutated, plain
from tests.tiny import tiny_engine

_UNWRITTEN = 10**9


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


class Capture:
    """`run` again, into the tensors that it gave first; those that it read are left alone."""

    def __init__(self, run: Callable[[], Any], result: Any) -> None:
        self._run, self._result = run, result

    def replay(self) -> None:
        for old, new in zip(tensors(self._result), tensors(self._run()), strict=True):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Anything:
    """An event or a stream, of which there is only one."""

    def __init__(self, enable_timing: bool = False) -> None: ...

    def elapsed_time(self, other: Anything) -> float:
        return 1.0

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Anything) -> None: ...


def captured(runner: GraphRunner, run: Callable[[], Any]) -> tuple[Capture, Any]:
    read = [cell.cell_contents for cell in run.__closure__ or ()]
    known = [
        runner.page_table,
        runner.margins,
        *tensors([runner.draws, runner.state, getattr(runner.drafter, "copy", None)]),
        runner.cache.plane("keys", 0),
        runner.cache.plane("values", 0),
        *tensors(read),
    ]
    places = {each.untyped_storage().data_ptr() for each in known}
    result = run()
    for each in tensors(result):
        if each.untyped_storage().data_ptr() not in places and each.dtype != torch.bool:
            each.fill_(float("nan") if each.is_floating_point() else _UNWRITTEN)
    return Capture(run, result), result


@pytest.fixture
def on_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Makes a tiny engine on such graphs."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    for name in ("Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Anything)
    for name in ("synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(GraphRunner, "_capture_of", captured)
    monkeypatch.setattr(graphs, "_time", lambda graph: 0.001)

    def make(family: str = "qwen2", **settings: Any) -> Engine:
        with monkeypatch.context() as patch:
            patch.setattr(engines, "_make_runner", GraphRunner)
            return tiny_engine(family, **settings)

    return make


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_tokens_are_those_of_plain_steps(on_graphs: Callable[..., Engine], temperature: float) -> None:
    draw = random.Random(11)
    requests = [copying_request(draw, temperature=temperature, seed=index) for index in range(12)]
    expected = plain(tiny_engine(drafter="none", prefix_cache=False), requests)
    requests = [
        replace(each, sources=(mutated(draw, tokens),)) if index % 2 else each
        for index, (each, tokens) in enumerate(zip(requests, expected, strict=True))
    ]
    for settings in ({}, {"fixed_draft": 64}, {"drafter": "none"}):
        served = on_graphs(max_batch=6, **settings)
        for _ in range(2):
            assert [each.tokens for each in served.generate(requests)] == expected, settings
        everything_is_back(served)


def test_the_tokens_are_those_of_plain_steps_also_when_pages_run_short(on_graphs: Callable[..., Engine]) -> None:
    draw = random.Random(4)
    requests = [copying_request(draw) for _ in range(48)]
    expected = plain(tiny_engine(drafter="none", prefix_cache=False), requests)
    for settings in ({}, {"fixed_draft": 64}):
        served = on_graphs(max_batch=8, cache_tokens=320, **settings)
        assert [each.tokens for each in served.generate(requests)] == expected, settings
        everything_is_back(served)


@pytest.mark.parametrize("drafter", ["none", "copy"])
def test_cancels_with_a_step_in_flight_change_no_other_request(on_graphs: Callable[..., Engine], drafter: str) -> None:
    """A slot's next owner must not read what the last one's step gives."""
    draw = random.Random(6)
    requests = [copying_request(draw, temperature=0.8 * (index % 2), seed=index) for index in range(60)]
    expected = plain(tiny_engine(drafter="none", prefix_cache=False), requests)
    served = on_graphs(max_batch=6, cache_tokens=640, drafter=drafter)
    waiting, running = list(range(len(requests))), {}
    tokens: dict[int, list[int]] = {index: [] for index in waiting}
    while waiting or served.busy:
        if waiting and draw.random() < 0.5:
            index = waiting.pop()
            running[served.submit(requests[index])] = index
        if running and draw.random() < 0.1:
            name = draw.choice(list(running))
            served.cancel(name)
            del tokens[running.pop(name)]
        for output in served.step():
            tokens[running[output.request_id]] += output.tokens
            if output.finish:
                del running[output.request_id]
    assert 20 < len(tokens) < 55
    assert all(found == expected[index] for index, found in tokens.items())
    everything_is_back(served)


def test_margins_are_those_of_plain_steps(on_graphs: Callable[..., Engine]) -> None:
    draw = random.Random(3)
    requests = [copying_request(draw) for _ in range(8)]
    written = plain(tiny_engine(drafter="none"), requests)
    requests = [
        replace(each, sources=(mutated(draw, tokens),), margin=4.0 * (index % 2))
        for index, (each, tokens) in enumerate(zip(requests, written, strict=True))
    ]
    expected = [each.tokens for each in tiny_engine(fixed_draft=16).generate(requests)]
    assert expected != written, "no margin took a token"
    assert [each.tokens for each in on_graphs(fixed_draft=16).generate(requests)] == expected


def test_drawn_and_margin_requests_share_a_step(on_graphs: Callable[..., Engine]) -> None:
    """Where one request has a margin, one that draws takes nothing but what is drawn, likelier though the source's is."""
    draw = random.Random(3)
    requests = [copying_request(draw, temperature=1.2 * (index % 2), seed=index) for index in range(16)]
    written = plain(tiny_engine(drafter="none", prefix_cache=False), requests)
    requests = [
        replace(each, sources=(mutated(draw, tokens),), margin=0.0 if index % 2 else 4.0)
        for index, (each, tokens) in enumerate(zip(requests, written, strict=True))
    ]
    found = [each.tokens for each in on_graphs(fixed_draft=16).generate(requests)]
    assert found[1::2] == written[1::2] and found[::2] != written[::2]
    assert found == [each.tokens for each in tiny_engine(fixed_draft=16).generate(requests)]


def test_long_prompts_go_on_in_pieces(on_graphs: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of which a part is cached: whole, in pieces, in two past the limit, and launched past it."""
    draw = random.Random(9)
    monkeypatch.setattr(graphs, "_PROMPT_SIZES", (64, 128))
    monkeypatch.setattr(graphs, "_PIECES_UP_TO", 600)
    long = [draw.randrange(256) for _ in range(1200)]
    ends = [48, 170, 560, 700, 1200]
    requests = [Request(long[:end], Sampling(max_tokens=4, ignore_eos=True)) for end in ends]
    settings: dict[str, Any] = {"max_context": 1300, "cache_tokens": 12800, "prefill_chunk": 2048}
    expected = plain(tiny_engine(drafter="none", prefix_cache=False, **settings), requests)
    served = on_graphs(max_batch=4, **settings)
    assert isinstance(served.runner, GraphRunner)
    served.runner._prompts = {size: served.runner._capture_prompt(size) for size in (64, 128)}
    sizes: list[int] = []
    replayed = graphs.PromptGraph.replay

    def replay(graph: graphs.PromptGraph, chunk: Chunk) -> torch.Tensor:
        sizes.append(chunk.end - chunk.start)
        return replayed(graph, chunk)

    monkeypatch.setattr(graphs.PromptGraph, "replay", replay)
    found = []
    for request, tokens in zip(requests, expected, strict=True):
        sizes.clear()
        assert served.generate([request])[0].tokens == tokens
        found.append(sizes[:])
    assert found == [[48], [122], [128, 128, 128, 16], [128, 12], []]
    everything_is_back(served)


def test_prompts_are_replays_alone_and_together(on_graphs: Callable[..., Engine]) -> None:
    draw = random.Random(7)
    long = [draw.randrange(256) for _ in range(1350)]
    prompts = [long[:63], long[:64], long[:900], long[:1281], [*long[:1300], 5, 6], long[150:700]]
    prompts += [long[start : start + 20] for start in range(12)]  # more than are replayed one by one
    requests = [Request(prompt, Sampling(max_tokens=6, ignore_eos=True)) for prompt in prompts]
    settings: dict[str, Any] = {"max_context": 1400, "cache_tokens": 12800, "prefill_chunk": 2048}
    expected = plain(tiny_engine(drafter="none", prefix_cache=False, **settings), requests)
    served = on_graphs(max_batch=16, **settings)
    assert isinstance(served.runner, GraphRunner)
    served.runner._prompts = {size: served.runner._capture_prompt(size) for size in (64, 256, 1024, 1280)}
    for _ in range(2):
        assert [served.generate([each])[0].tokens for each in requests] == expected
        assert [each.tokens for each in served.generate(requests)] == expected
    everything_is_back(served)


def test_a_request_whose_start_fails_touches_no_others_pages(
    on_graphs: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is launched before its failure lands; its slot is still its last owner's."""
    draw = random.Random(2)
    requests = [copying_request(draw) for _ in range(40)]
    expected = plain(tiny_engine(drafter="none", prefix_cache=False), requests)
    start = GraphRunner.start

    def failing(runner: GraphRunner, sequence: Sequence) -> int:
        if draw.random() < 0.25:
            raise ArithmeticError("a bug")
        return start(runner, sequence)

    monkeypatch.setattr(GraphRunner, "start", failing)
    served = on_graphs(max_batch=6, cache_tokens=320, page_size=4, max_draft=16)
    completions = served.generate(requests)
    assert 3 < sum(each.error is not None for each in completions) < 25
    for each, tokens in zip(completions, expected, strict=True):
        assert each.tokens == (tokens if each.error is None else tokens[: len(each.tokens)])
    everything_is_back(served)
