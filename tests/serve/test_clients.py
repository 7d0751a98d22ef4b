"""Recorded sessions of real agents (scripts/test-clients --record): all are answered, each prompt extends the last one's.

The bodies are as they were sent, with long texts replaced. An agent's prompt grows only at its end, so that a server computes
only the new tokens. aider is the exception: it repeats the files in every turn, after the history.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import httpx
import msgspec
import pytest

from paceline.serve.messages_input import MessagesBody, encode
from tests.clients.fixtures import read_fixture
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted, tiny, tiny_service

FIXTURES = Path(__file__).parent / "fixtures"


def prompts(client: str) -> list[list[int]]:
    """The tokens of each turn's prompt, as the engine received them."""
    path, bodies = read_fixture(FIXTURES / f"{client}.json")
    script = ScriptedEngine("Done.")
    with running(scripted(script, capacity=200_000)) as url:
        for body in bodies:
            reply = httpx.post(url + path, json=body, timeout=20)
            assert reply.status_code == 200, reply.text
    assert len(script.requests) == len(bodies) >= 2
    return [each.prompt for each in script.requests]


@pytest.mark.parametrize("client", ["claude", "codex", "opencode", "mini"])
def test_a_turns_prompt_is_the_beginning_of_the_next(client: str) -> None:
    for before, after in itertools.pairwise(prompts(client)):
        assert after[: len(before)] == before and len(after) > len(before)


def test_aiders_turns_share_all_before_its_files() -> None:
    first, second = (byte_tokenizer().decode(each, skip_special=False) for each in prompts("aider"))
    before_files = first[: first.rindex("<|im_start|>user", 0, first.rindex("<|im_start|>user"))]
    assert len(before_files) > len(first) // 3 and second.startswith(before_files)


def test_claude_codes_turns_compute_what_is_new_and_say_so() -> None:
    """Ten turns, then another first prompt: usage, streamed or not, reports the cached tokens exactly to the page."""
    path, bodies = read_fixture(FIXTURES / "claude.json")
    turns = [*bodies]
    while len(turns) < 10:
        identity = f"toolu_{len(turns)}"
        called = {"type": "tool_use", "id": identity, "name": "Read", "input": {"file_path": f"/tmp/{len(turns)}.py"}}
        result = {"type": "tool_result", "tool_use_id": identity, "content": f"line {len(turns)}\n" * 9}
        more = [{"role": "assistant", "content": [called]}, {"role": "user", "content": [result]}]
        turns.append({**turns[-1], "messages": [*turns[-1]["messages"], *more]})
    first = turns[0]["messages"][0]
    other = {**turns[0], "messages": [{"role": "user", "content": "Another task."}, *turns[0]["messages"][1:]]}
    assert isinstance(first["content"], list)

    engine = tiny(max_context=60_000, cache_tokens=120_000)
    prompts = [encode(engine.tokenizer, msgspec.convert(each, MessagesBody)) for each in [*turns, other]]
    size = engine.config.page_size
    with running(tiny_service(engine)) as url:
        seen: list[list[int]] = []
        for index, (body, prompt) in enumerate(zip([*turns, other], prompts, strict=True)):
            reply = httpx.post(url + path, json={**body, "max_tokens": 3, "stream": index % 2 == 0}, timeout=60)
            reported = usages(reply)
            shared = max((common(prompt[:-1], each) for each in seen), default=0) // size * size
            for usage in reported:
                assert usage["cache_read_input_tokens"] == shared
                assert usage["input_tokens"] == len(prompt) - shared
            seen.append(prompt)
    assert all(common(after, before) == len(before) for before, after in itertools.pairwise(prompts[:-1]))
    tools = engine.tokenizer.encode("Tools, called as")
    assert shared > 1000 and tools[0] in prompts[-1][:shared]  # tools and system come before the first prompt


def usages(reply: httpx.Response) -> list[dict[str, int]]:
    """The usage of a message, or of its stream's first and last event that has one."""
    if "event-stream" not in reply.headers["content-type"]:
        return [reply.json()["usage"]]
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return [events[0]["message"]["usage"], next(each["usage"] for each in events if each["type"] == "message_delta")]


def common(one: list[int], other: list[int]) -> int:
    """The length of the common prefix of both."""
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


def test_every_recorded_session_is_tested() -> None:
    assert {each.stem for each in FIXTURES.glob("*.json")} == {"claude", "codex", "opencode", "mini", "aider"}
