"""Which clients share cached prefixes, and which requests an error within a step ends."""

from __future__ import annotations

import dataclasses
from typing import Any

import httpx
import pytest

from paceline.serve.app import hash_key
from tests.serve.service import ScriptedEngine, running, scripted, tiny, tiny_service
from tests.serve.test_server import COLUMN, TABLES

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
SQL = {"path": "a.sql"}
QUESTION = [{"role": "user", "content": "a long question, " * 20}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": QUESTION, "max_tokens": 2},
    TEXT: {"prompt": "a long text, " * 20, "max_tokens": 2},
    MESSAGES: {"messages": QUESTION, "max_tokens": 2},
    RESPONSES: {"input": "a long question, " * 20, "max_output_tokens": 2, "store": False},
}


def cached(reply: httpx.Response) -> int:
    usage = reply.json()["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return int(details.get("cached_tokens", usage.get("cache_read_input_tokens")))


@pytest.mark.parametrize("path", BODIES)
def test_keys_share_no_cached_prefix_unless_configured(path: str) -> None:
    keys = (hash_key("one"), hash_key("other"))
    for share in (False, True):
        service = dataclasses.replace(tiny_service(tiny()), keys=keys, share_cache=share)
        with running(service) as url, httpx.Client(base_url=url, timeout=60) as client:
            found = [
                cached(client.post(path, json=BODIES[path], headers={"x-api-key": key}))
                for key in ("one", "other", "one", "other")
            ]
        assert [each > 0 for each in found] == [False, share, True, True]


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_a_salt_keeps_apart_what_one_key_asks(path: str) -> None:
    with running(tiny_service(tiny())) as url, httpx.Client(base_url=url, timeout=60) as client:
        found = [
            cached(client.post(path, json=BODIES[path] | {"cache_salt": salt})) > 0 for salt in ("a", "b", "a", None)
        ]
    assert found == [False, False, True, False]


def test_merges_and_messages_have_the_salt_too() -> None:
    merge = f"<code>{TABLES}</code>\n<update>{COLUMN}</update>"
    script = ScriptedEngine("1")
    with running(scripted(script)) as url, httpx.Client(base_url=url) as client:
        for path, body in (
            (CHAT, {"model": "morph-v3-fast", "messages": [{"role": "user", "content": merge}], "paceline": SQL}),
            (MESSAGES, BODIES[MESSAGES]),
        ):
            assert client.post(path, json={**body, "cache_salt": "a"}).status_code == 200
    assert [each.namespace for each in script.requests] == [":a", ":a"]


def test_an_error_within_a_step_is_a_500_and_the_server_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny()
    launch = engine.runner.launch
    fails = iter((True, False, False, True))

    def launched(work: Any) -> Any:
        if next(fails, False):
            raise ArithmeticError("a bug")
        return launch(work)

    monkeypatch.setattr(engine.runner, "launch", launched)
    with running(tiny_service(engine)) as url, httpx.Client(base_url=url, timeout=60) as client:
        whole = client.post(CHAT, json=BODIES[CHAT] | {"max_tokens": 20})
        assert whole.status_code == 500 and whole.json()["error"]["type"] == "server_error"
        events = client.post(MESSAGES, json=BODIES[MESSAGES] | {"max_tokens": 20, "stream": True}).text
        assert events.rstrip().split("\n\n")[-1].startswith("event: error") and "api_error" in events
        assert client.get("/health").json() == {"status": "ready"}
        for path, body in BODIES.items():
            assert client.post(path, json=body).status_code == 200
    assert engine.tree is not None and engine.tree.num_locked == 0
