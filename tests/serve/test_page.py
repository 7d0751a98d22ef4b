"""The status page without a browser: its statistics, and which clients receive output text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request as HttpRequest

from paceline.serve.live_stats import MAX_CHARACTERS, MAX_LISTENERS, MAX_SHOWN, LiveStats, drafted_parts
from paceline.serve.page import is_local
from paceline.serve.wire import event
from paceline.types import FinishReason, Request, StepOutput, Usage
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted, tiny_service, until

BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


class OneStream:
    """A stand-in for a stream, with the attributes that observers read."""

    def __init__(self, name: str, num_prompt: int = 10) -> None:
        self.name = name
        self.request = Request(list(range(num_prompt)))
        self.started = time.perf_counter()


def step(name: str, text: str, num_accepted: int = 0, cached: int = 0) -> StepOutput:
    tokens = list(text.encode())
    flags = [index < num_accepted for index in range(len(tokens))]
    return StepOutput(name, tokens, text, flags, usage=Usage(cached_tokens=cached))


def live_events(reply: httpx.Response) -> Iterator[tuple[str, Any]]:
    """The events of /live as (name, content)."""
    name = ""
    for line in reply.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def ask(url: str, headers: dict[str, str] | None = None, **change: Any) -> threading.Thread:
    """Sends a request and reads its reply to the end, in a thread."""
    body = {"model": "tiny", "prompt": "a secret prompt", "max_tokens": 2000, **change}
    thread = threading.Thread(
        target=lambda: httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=20).raise_for_status()
    )
    thread.start()
    return thread


def test_browsers_get_the_page_and_others_the_greeting() -> None:
    with running(scripted(ScriptedEngine("word"))) as url:
        page = httpx.get(url, headers=BROWSER)
        assert page.headers["content-type"] == "text/html; charset=utf-8" and "</html>" in page.text
        for headers in ({}, {"accept": "application/json"}, {"accept": "*/*"}):
            assert httpx.get(url, headers=headers).json() == {"name": "paceline", "model": "tiny"}
        assert httpx.head(url).status_code == httpx.head(url, headers=BROWSER).status_code == 200
        assert page.headers["vary"] == httpx.get(url).headers["vary"] == "accept"
    policy = dict(each.split(" ", 1) for each in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == "'none'" and policy["connect-src"] == "'self'"
    for tag in ("script", "style"):
        inline = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
        assert len(inline) == 1 and policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not re.search(r"(?:src|href|action)=\"(?!data:)|url\(|@import|innerHTML| style=\"| on\w+=\"", page.text)


def test_live_tells_what_a_request_writes_and_never_its_prompt() -> None:
    text = "wörter, viele wörter. " * 20
    with (
        running(scripted(ScriptedEngine(text, size=6, drafted=True, seconds=0.01))) as url,
        httpx.Client() as client,
        client.stream("GET", f"{url}/live") as reply,
    ):
        events = live_events(reply)
        name, first = next(events)
        assert name == "state" and first["model"] == "tiny" and first["status"] == "ready" and first["requests"] == []
        assert first["first_token"]["p50"] is first["hit_rate"] is first["drafted_share"] is first["pages"] is None
        thread = ask(url)
        parts: list[Any] = []
        rows = []
        for name, data in events:
            assert "secret" not in json.dumps(data)
            if name == "text":
                parts += data["request-1"]
            elif data["requests"]:
                rows += data["requests"]
            elif parts:
                break
        thread.join()
    assert "".join(part for part, _ in parts) == text
    assert rows[-1]["prompt"] == 15 and rows[0]["output"] < rows[-1]["output"] <= len(text.encode())
    share = sum(len(part.encode()) for part, drafted in parts if drafted) / len(text.encode())
    assert abs(share - 5 / 6) < 0.05
    assert data["running"] == data["waiting"] == 0 and abs(data["drafted_share"] - 5 / 6) < 0.05
    assert 5.5 < data["tokens_a_step"] <= 6 and 0 < data["first_token"]["p50"] <= data["first_token"]["p99"]
    assert sum(data["series"]["generated"]) > 100 and sum(data["series"]["prefill"]) == 15


def test_a_real_engine_tells_its_cache() -> None:
    with running(tiny_service()) as url:
        for _ in range(2):
            ask(url, prompt="x" * 400, max_tokens=3).join()
        with httpx.stream("GET", f"{url}/live") as reply:
            data = next(live_events(reply))[1]
    assert 0.3 < data["hit_rate"] < 0.5, "half of the prompts' tokens, less the last page"
    pages = data["pages"]
    assert pages["used"] == 0 < pages["cached"] < pages["total"]


def test_live_needs_a_key_where_there_are_keys() -> None:
    service = tiny_service(keys=("first",))
    with running(service) as url:
        assert httpx.get(url, headers=BROWSER).status_code == 200
        assert httpx.get(f"{url}/live").status_code == 401
        with httpx.stream("GET", f"{url}/live", headers={"authorization": "Bearer first"}) as reply:
            assert next(live_events(reply))[1]["tells_text"] is True
        until(lambda: not service.live_stats.listeners)


def test_without_a_key_text_is_sent_only_to_this_machine_by_its_own_name() -> None:
    def local(client: str, host: str) -> bool:
        headers = [(b"host", host.encode())]
        scope = {"type": "http", "client": (client, 1), "headers": headers, "path": "/live", "scheme": "http"}
        return is_local(HttpRequest({**scope, "server": (host, 8000), "query_string": b""}))

    assert local("127.0.0.1", "localhost:8000") and local("127.0.0.1", "127.0.0.1") and local("::1", "[::1]:8000")
    assert not local("192.168.1.5", "192.168.1.2:8000") and not local("192.168.1.5", "localhost")
    assert not local("127.0.0.1", "rebound.example:8000")
    with running(scripted(ScriptedEngine("word " * 200, seconds=0.003))) as url:
        thread = ask(url)
        with httpx.stream("GET", f"{url}/live", headers={"host": "rebound.example"}) as reply:
            for name, data in live_events(reply):
                assert name == "state" and data["tells_text"] is False
                if data["first_token"]["requests"] and not data["requests"]:
                    break
        thread.join()


def test_listeners_are_few_and_do_not_hold_up_the_end() -> None:
    service = scripted(ScriptedEngine("word"))
    with httpx.Client() as client:
        with running(service) as url:
            replies = [client.stream("GET", f"{url}/live") for _ in range(MAX_LISTENERS)]
            events = [live_events(each.__enter__()) for each in replies]  # kept alive: httpx closes the reply with them
            for one in events:
                next(one)
            refused = client.get(f"{url}/live")
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            started = time.monotonic()
        assert time.monotonic() - started < 5
        for each in replies:
            each.__exit__(None, None, None)
    assert not service.live_stats.listeners


def test_what_is_kept_for_a_listener_is_bounded() -> None:
    live_stats = LiveStats()
    listener = live_stats.listen(byte_tokenizer().token_bytes)
    streams = [OneStream(f"request-{number}") for number in range(3 * MAX_SHOWN)]
    for stream in streams:
        live_stats.opened(stream)  # type: ignore[arg-type]
        for _ in range(100):
            live_stats.output(stream, step(stream.name, "x" * 99 + "y", 99))  # type: ignore[arg-type]
    text = listener.read()
    assert list(text) == [stream.name for stream in streams[:MAX_SHOWN]]
    assert all(sum(len(part) for part, _ in parts) == MAX_CHARACTERS for parts in text.values())
    assert listener.read() == {}
    live_stats.closed(streams[0], True)  # type: ignore[arg-type]
    live_stats.output(streams[MAX_SHOWN], step(streams[MAX_SHOWN].name, "next"))  # type: ignore[arg-type]
    assert listener.read() == {streams[MAX_SHOWN].name: [("next", False)]}
    assert len(live_stats.state()["requests"]) == MAX_SHOWN and live_stats.state()["running"] == len(streams) - 1
    listener.close()
    listener.close()
    live_stats.output(streams[1], step(streams[1].name, "unheard"))  # type: ignore[arg-type]
    assert listener.read() == {}


def test_listening_to_a_busy_server_costs_little() -> None:
    """One second of 64 streams at 5,000 tokens a second, one token a step, with a listener: a few hundredths of a core."""
    live_stats = LiveStats()
    listener = live_stats.listen(byte_tokenizer().token_bytes)
    streams = [OneStream(f"request-{number}") for number in range(64)]
    outputs = [step(stream.name, "a") for stream in streams]
    for stream in streams:
        live_stats.opened(stream)  # type: ignore[arg-type]
    began = time.process_time()
    for number in range(5000):
        live_stats.output(streams[number % 64], outputs[number % 64])  # type: ignore[arg-type]
        if number % 625 == 0:
            event(listener.read(), "text")
            event(live_stats.state(), "state")
    assert time.process_time() - began < 0.25


@pytest.mark.parametrize(
    ("tokens", "text", "num_accepted", "parts"),
    [
        (b"abcd", "abcd", 3, [("abc", True), ("d", False)]),
        (b"abcd", "abcd", 0, [("abcd", False)]),
        (b"abcd", "abcd", 4, [("abcd", True)]),
        (b"ab\xc3", "ab", 2, [("ab", True)]),  # half a character, buffered
        ("abö".encode(), "abö", 3, [("abö", True)]),  # its second half was not drafted
        (b"ab\n", "ab", 2, [("ab", True)]),  # a possible beginning of a stop string, buffered
        (b"b\nc", "a\nb\nc", 2, [("a\nb\n", True), ("c", False)]),  # the buffered text is released
    ],
)
def test_parts_are_cut_where_the_draft_ends(
    tokens: bytes, text: str, num_accepted: int, parts: list[tuple[str, bool]]
) -> None:
    flags = [index < num_accepted for index in range(len(tokens))]
    output = StepOutput("request-1", list(tokens), text, flags)
    assert drafted_parts(output, byte_tokenizer().token_bytes) == parts


def test_the_token_that_ends_an_output_is_not_sent() -> None:
    tokenizer = byte_tokenizer()
    tokens = [*b"abc", tokenizer.eos_tokens[0]]
    output = StepOutput("request-1", tokens, "abc", [True] * 3 + [False], finish=FinishReason.STOP)
    assert drafted_parts(output, tokenizer.token_bytes) == [("abc", True)]
