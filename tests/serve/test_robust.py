"""Robustness: malformed input, slow and disconnecting clients, time limits, idle streams; and logs, metrics and traces."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.requests import Request as HttpRequest

from paceline.engine.grammar import json_schema
from paceline.errors import ConfigError
from paceline.serve import constrain
from paceline.serve.app import ROUTES, hash_key
from paceline.serve.connection import Connection
from paceline.serve.host import Host, Stream
from paceline.serve.openapi import OPERATIONS, document
from paceline.serve.request_log import JsonFormatter, RequestRecord, TextFormatter
from paceline.serve.run import Limits, Server, keys_of, make_service, stored_hash
from paceline.serve.service import Service, run_in_worker_thread_if_large
from paceline.serve.trace import spans
from paceline.serve.wire import EventStream
from paceline.types import FinishReason, Request, StepOutput, TokenLogprob, Usage
from tests.serve.malformed import bodies, streams, valid
from tests.serve.service import ScriptedEngine, running, scripted, tiny, tiny_service, until

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"


@pytest.fixture(scope="module")
def service() -> Service:
    return tiny_service()


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


class Slow(ScriptedEngine):
    """A scripted engine with slow steps."""

    def __init__(self, seconds: float, text: str = "word " * 40) -> None:
        super().__init__(text, size=1)
        self.seconds = seconds

    def step(self) -> list[StepOutput]:
        time.sleep(self.seconds)
        return super().step()


def exchange(url: str, data: bytes, seconds: float = 10.0) -> bytes:
    """The server's reply to these bytes, until it closes the connection or is silent for a while."""
    address = urlsplit(url)
    received = b""
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                received += part
                connection.settimeout(0.1)
        except (TimeoutError, ConnectionError):
            pass
    return received


def post(path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


def test_malformed_bodies_are_refused(address: str) -> None:
    with httpx.Client(base_url=address, timeout=20) as client:
        for kind, path, body in islice(bodies(seed=1), 200):
            reply = client.post(path, content=body)
            assert 400 <= reply.status_code < 500, (kind, path, body[:200], reply.text)
            assert len(reply.json()["error"]["message"]) > 5, (kind, path)
        assert client.post(CHAT, json=valid(CHAT)).status_code == 200


def test_byte_streams_are_refused_or_closed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.2)
    for kind, data in islice(streams(seed=1), 34):
        if kind in ("length too long", "half a body"):
            continue  # the body's time limit has its own test
        statuses = [line[9:12] for line in exchange(address, data).split(b"\r\n") if line.startswith(b"HTTP/1.1")]
        assert all(b"400" <= status < b"500" for status in statuses), (kind, statuses, data[:200])
    assert httpx.get(f"{address}/health").status_code == 200


def test_an_incomplete_head_closes_the_connection(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.3)
    for data in (b"", b"GET /hea", post(CHAT, valid(CHAT))[:30]):
        began = time.monotonic()
        assert exchange(address, data) == b"" and 0.2 < time.monotonic() - began < 3
    endless = b"GET / HTTP/1.1\r\n" + b"x-more: and more of it\r\n" * 8000
    assert b"HTTP/1.1 2" not in exchange(address, endless)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_an_incomplete_body_is_a_408(path: str) -> None:
    service = scripted(ScriptedEngine("word"), body_seconds=0.3)
    with running(service) as url:
        status, _, rest = exchange(url, post(path, valid(path))[:-5]).partition(b"\r\n")
        assert status.split()[1] == b"408" and b"not complete after 0.3 seconds" in rest
        assert httpx.post(url + path, json=valid(path)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_a_request_that_takes_too_long_ends_in_its_apis_error(path: str) -> None:
    service = scripted(Slow(0.02), time_limit=0.3)
    with running(service) as url:
        body = {**valid(path), "max_tokens": 1000}
        whole = httpx.post(url + path, json=body)
        assert whole.status_code == 504 and "0.3 seconds" in whole.json()["error"]["message"]
        streamed = httpx.post(url + path, json={**body, "stream": True})
        last = streamed.text.rstrip().split("\n\n")[-1]
        assert streamed.status_code == 200 and "0.3 seconds" in last and ("event: error" in last) == (path == MESSAGES)
        assert service.host.num_open == 0
        until(lambda: not service.host.engine.busy)


@pytest.mark.parametrize(("path", "idle"), [(CHAT, ": waiting"), (MESSAGES, 'event: ping\ndata: {"type":"ping"}')])
def test_an_idle_stream_sends_keep_alives(path: str, idle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "idle_seconds", 0.1)
    with running(scripted(Slow(0.5, "ab"))) as url:
        text = httpx.post(url + path, json={**valid(path), "stream": True}).text
    parts = text.split("\n\n")
    between = parts[parts.index(next(part for part in parts if '"a"' in part)) :]
    assert between.count(idle) >= 3 and between.count(idle) < 20
    assert parts[-2].endswith("[DONE]" if path == CHAT else '{"type":"message_stop"}')


def test_queued_outputs_are_merged() -> None:
    async def run() -> list[StepOutput]:
        service = scripted(ScriptedEngine("word"))
        stream = Stream(service.host, Request([1]), "one")
        logprob = TokenLogprob(5, -1.0)
        stream.put(StepOutput("one", [5], "a", [False], (logprob,)))
        stream.put(StepOutput("one", [6, 7], "bc", [True, False], (logprob, logprob), drafted=3))
        first = await anext(stream)
        stream.put(StepOutput("one", [8], "", [False], (), FinishReason.STOP, Usage(output_tokens=4)))
        return [first, *[output async for output in stream]]

    first, last = asyncio.run(run())
    assert (first.tokens, first.text, first.accepted, len(first.logprobs)) == (
        [5, 6, 7],
        "abc",
        [False, True, False],
        3,
    )
    assert first.drafted == 3 and first.finish is None
    assert last.finish is FinishReason.STOP and last.usage == Usage(output_tokens=4)


def test_the_queue_has_the_configured_length() -> None:
    assert make_service(tiny(), ["tiny"]).host.max_open == 4 * 64
    assert make_service(tiny(max_batch=2), ["tiny"], limits=Limits(queue=0)).host.max_open == 2
    for wrong in ({"queue": -1}, {"request_seconds": 0.0}, {"body_bytes": 0}):
        with pytest.raises(ConfigError):
            Limits(**wrong)  # type: ignore[arg-type]


def test_keys_come_from_a_file_plain_or_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PACELINE_API_KEY", raising=False)
    hashed = "sha256:" + hashlib.sha256(b"second").hexdigest()
    file = tmp_path / "keys"
    file.write_text(f"# ours\nfirst\n\n{hashed}\n")
    keys = keys_of(["third"], file)
    assert [stored_hash(key) for key in keys] == [hash_key(each) for each in ("third", "first", "second")]
    with running(tiny_service(keys=tuple(keys))) as url:
        for key, status in (("first", 200), ("second", 200), ("third", 200), (hashed, 401), ("# ours", 401)):
            assert httpx.get(f"{url}/v1/models", headers={"x-api-key": key}).status_code == status
    for text in ("", "# nothing\n", "sha256:12\n"):
        file.write_text(text)
        with pytest.raises(ConfigError):
            keys_of([], file)
    with pytest.raises(ConfigError, match="cannot be read"):
        keys_of([], tmp_path / "absent")


def test_the_log_has_one_line_a_request_and_none_of_its_text(address: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = [{"role": "user", "content": "a secret word"}]
    with caplog.at_level(logging.INFO, "paceline.requests"):
        reply = httpx.post(address + CHAT, json={"model": "tiny", "messages": secret, "max_tokens": 4, "seed": 1})
        httpx.post(address + MESSAGES, json={"model": "no-such-model", "messages": secret, "max_tokens": 4})
        httpx.get(f"{address}/health")
        with httpx.stream("POST", address + CHAT, json={**valid(CHAT), "max_tokens": 1500, "stream": True}) as gone:
            next(gone.iter_lines())
        until(lambda: len(caplog.records) == 3)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    first, second, third = lines
    usage = reply.json()["usage"]
    assert first["id"] == reply.headers["x-request-id"] == reply.headers["request-id"]
    assert first["endpoint"] == f"POST {CHAT}" and first["status"] == 200 and not first["gone"]
    assert (first["prompt_tokens"], first["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert 0 <= first["queue_ms"] <= first["first_ms"] <= first["total_ms"]
    assert second["status"] == 404 and not second["gone"] and "prompt_tokens" not in second
    assert third["gone"] and third["status"] == 200 and third["output_tokens"] < 1500
    assert "secret" not in json.dumps(lines) and "secret" not in TextFormatter().format(caplog.records[0])
    assert 'endpoint="POST /v1/chat/completions" status=200' in TextFormatter().format(caplog.records[0])


def test_other_methods_and_paths_are_refused_in_the_apis_form(address: str) -> None:
    with httpx.Client(base_url=address) as client:
        for path, allowed in ((CHAT, "POST"), ("/v1/models", "GET, HEAD")):
            reply = client.delete(path)
            assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
            assert reply.json()["error"]["message"] == f"DELETE {path} is not served"
        assert client.get("/v1/messages/none").json()["type"] == "error"
        assert client.get("/v1/models/").json() == client.get("/v1/models").json()
        assert client.head("/v1/models").status_code == 200


def test_only_short_bodies_are_encoded_on_the_event_loop() -> None:
    """A long body, or one without a content-length, must not delay other requests."""

    async def thread_for(headers: dict[str, str]) -> str:
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        http = HttpRequest({"type": "http", "headers": raw})
        return await run_in_worker_thread_if_large(http, lambda: threading.current_thread().name)

    here = threading.current_thread().name
    for headers, in_worker in (
        ({"content-length": "2048"}, False),
        ({"content-length": "2049"}, True),
        ({"content-length": "-1"}, True),
        ({}, True),
    ):
        assert asyncio.run(thread_for(headers)).startswith("paceline-worker" if in_worker else here)


def test_long_bodies_and_their_schemas_are_read_in_a_worker_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def seen(*arguments: Any, **options: Any) -> str:
        threads.append(threading.current_thread().name)
        return json_schema(*arguments, **options)

    monkeypatch.setattr(constrain, "json_schema", seen)
    form = {"type": "json_schema", "schema": {"type": "object", "description": "x" * 3000}}
    asked = {"/v1/completions": {"prompt": "x"}, "/v1/responses": {"input": "x", "text": {"format": form}}}
    with running(scripted(ScriptedEngine("{}"))) as url:
        for path in (CHAT, "/v1/completions", "/v1/responses", MESSAGES):
            body = asked.get(path, {"messages": HELLO, "max_tokens": 9})
            if path == MESSAGES:
                body = {**body, "output_config": {"format": form}}
            elif "text" not in body:
                body = {**body, "json_schema": form["schema"]}
            assert httpx.post(url + path, json=body).status_code == 200
    assert len(threads) == 4 and all(each.startswith("paceline-worker") for each in threads)


def test_every_route_is_described() -> None:
    routes = {(method, path) for path, handlers in ROUTES.items() for method in handlers}
    assert {(each.method, each.path) for each in OPERATIONS} == routes
    text = json.dumps(document())
    for name in document()["components"]["schemas"]:
        assert f'"#/components/schemas/{name}"' in text
    stream = document()["paths"][MESSAGES]["post"]["responses"]
    assert "text/event-stream" in stream["200"]["content"] and "529" in stream and "429" not in stream


def test_metrics_tell_drafts_by_drafter_and_position() -> None:
    service = scripted(ScriptedEngine("word"))
    metrics = service.metrics

    async def run() -> None:
        for sources in ((), ([1, 2],)):
            stream = Stream(service.host, Request([1], sources=sources), "one")
            metrics.opened(stream)
            metrics.output(stream, StepOutput("one", [1], "", [False]))
            metrics.output(stream, StepOutput("one", [1, 2, 3], "", [True, True, False], drafted=4))
            usage = Usage(prompt_tokens=9, cached_tokens=8, queue_seconds=0.2)
            metrics.output(stream, StepOutput("one", [1], "", [False], (), FinishReason.STOP, usage, drafted=4))

    asyncio.run(run())
    text = metrics.render().decode()
    for drafter in ("copy", "prediction"):
        labels = f'drafter="{drafter}",model_name="tiny"'
        assert f"paceline:spec_decode_num_drafts_total{{{labels}}} 2.0" in text
        assert f"paceline:spec_decode_num_draft_tokens_total{{{labels}}} 8.0" in text
        assert f"paceline:spec_decode_num_accepted_tokens_total{{{labels}}} 2.0" in text
        for position in "01":
            more = f'{labels},position="{position}"'
            assert f"paceline:spec_decode_num_accepted_tokens_per_pos_total{{{more}}} 1.0" in text
    assert 'paceline:prefix_cache_hits_total{model_name="tiny"} 16.0' in text
    assert 'paceline:request_queue_time_seconds_sum{model_name="tiny"} 0.4' in text
    assert 'paceline:kv_cache_usage_perc{model_name="tiny"} 0.0' in text


def test_metrics_tell_what_the_engine_holds(service: Service, address: str) -> None:
    def gauge(name: str) -> float:
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(f"paceline:{name}{{")))

    body = {**valid(CHAT), "max_tokens": 1500, "stream": True, "logit_bias": {"65": 100}}
    with httpx.stream("POST", address + CHAT, json=body) as reply:
        lines = reply.iter_lines()  # kept: httpx closes the reply with it
        next(lines)
        until(lambda: gauge("num_requests_running") == 1 and 0 < gauge("kv_cache_usage_perc") < 1)
        assert gauge("num_requests_waiting") == 0
    until(lambda: gauge("num_requests_running") == 0 and gauge("kv_cache_usage_perc") == 0)


def test_a_span_tells_of_a_request() -> None:
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    one = RequestRecord("req_1", "POST", CHAT, [(b"traceparent", parent)], status=200, client_gone=False)
    one.ended = one.started + 0.25
    spans(provider.get_tracer("paceline"), "tiny")(one)
    (span,) = memory.get_finished_spans()
    assert span.name == f"POST {CHAT}" and span.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert span.end_time - span.start_time == pytest.approx(0.25e9, rel=1e-3)
    assert span.attributes["http.response.status_code"] == 200 and span.status.is_unset


SERVED = """
import time, torch
from tests.serve.service import ScriptedEngine, scripted
from paceline.serve.run import Host, Server
matrix = torch.rand(3000, 3000)
def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        matrix @ matrix
Host.stop_seconds = 0.2
script = ScriptedEngine("word " * 100_000, size=1, seconds={step})
server = Server(scripted(script, warm_up=lambda: compute({warm_up})), "127.0.0.1", {port})
server.run()
"""


@contextlib.contextmanager
def served(step: float = 0.0003, warm_up: float = 0) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Starts a server in its own process; returns the process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVED.format(port=port, step=step, warm_up=warm_up)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: _health(url) == ("starting" if warm_up else "ready"), 30)
        try:
            yield process, url
        finally:
            process.kill()


def _health(url: str) -> str:
    try:
        return str(httpx.get(f"{url}/health").json()["status"])
    except httpx.TransportError:
        return ""


def test_a_second_signal_ends_the_drain_at_once() -> None:
    with (
        served() as (process, url),
        httpx.stream("POST", url + CHAT, json={**valid(CHAT), "stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None and next(line for line in lines if line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == -signal.SIGTERM


def test_a_second_signal_waits_for_no_step_and_no_warm_up() -> None:
    with served(warm_up=60) as (process, _):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(2) == -signal.SIGINT
    with served(step=60) as (process, url), httpx.Client() as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(url + CHAT, json=valid(CHAT), timeout=0.5)  # the client leaves, the step is still running
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == -signal.SIGTERM


def test_one_signal_ends_a_process_that_computes_and_does_not_abort_it() -> None:
    with served(warm_up=60) as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == -signal.SIGINT


def test_the_end_does_not_wait_for_a_long_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Host, "stop_seconds", 0.2)
    over = threading.Event()

    async def run() -> str:
        host = scripted(ScriptedEngine("word"), warm_up=lambda: over.wait(60)).host
        host.start()
        await host.stop()
        return host.state

    began = time.monotonic()
    assert asyncio.run(run()) == "stopped" and time.monotonic() - began < 5
    over.set()


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses", "/v1/completions"])
def test_what_the_drain_does_not_finish_ends_in_its_apis_error(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "drain_seconds", 0.3)
    service = scripted(ScriptedEngine("word " * 100_000, size=1))
    with ThreadPoolExecutor(2) as threads:
        with running(service) as url:
            bodies = [{**valid(path), "stream": stream} for stream in (False, True)]
            whole, streamed = [threads.submit(httpx.post, url + path, json=body, timeout=20) for body in bodies]
            until(lambda: service.host.num_open == 2)
        reply = whole.result()
        assert reply.status_code == (529 if path == MESSAGES else 429) and int(reply.headers["retry-after"]) > 1
        assert "shutting down" in reply.json()["error"]["message"]
        events = streamed.result().text.rstrip().split("\n\n")
        name = {MESSAGES: "event: error", "/v1/responses": "event: response.failed"}.get(path, 'data: {"error"')
        assert events[-1].startswith(name) and "shutting down" in events[-1] and len(events) > 2


def test_a_grammar_that_is_too_much_ends_its_request_by_an_error_and_no_other() -> None:
    words = " | ".join('"a" w ' * count for count in range(1, 70))
    grammar = f'start: "say: " w "."\nw: {words} | "a"\n'
    engine = tiny()
    service = tiny_service(engine)
    assert engine.tree is not None
    with running(service) as url, httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as threads:
        free = {**valid(CHAT), "max_tokens": 100, "seed": 1}
        alone = client.post(CHAT, json=free).json()["choices"]
        beside = threads.submit(httpx.post, url + CHAT, json=free, timeout=60)
        for path, last in ((CHAT, 'data: {"error"'), ("/v1/responses", "event: response.failed")):
            body = {**valid(path), "max_tokens": 60, "logit_bias": {"97": 100}}
            body["structured_outputs"] = {"grammar": grammar}
            whole = client.post(path, json=body)
            error = whole.json()["error"]
            assert whole.status_code == 400 and error["type"] == "invalid_request_error"
            assert "too complex to follow" in error["message"] and "\n" not in error["message"]
            events = client.post(path, json={**body, "stream": True}).text.rstrip().split("\n\n")
            assert events[-1].startswith(last) and "too complex to follow" in events[-1] and len(events) > 3
        assert beside.result().json()["choices"] == alone
        until(lambda: service.host.num_open == 0 and not engine.busy)
        assert engine.pool.num_free + engine.tree.num_evictable == engine.pool.num_pages - 1
        assert client.post(CHAT, json=free).json()["choices"] == alone
        body = {**valid(CHAT), "max_tokens": 60, "structured_outputs": {"grammar": grammar}, "logit_bias": {"46": 100}}
        prediction = {"type": "content", "content": f"say: {'a' * 40}."}
        reply = client.post(CHAT, json={**body, "prediction": prediction}).json()
        assert reply["choices"][0]["message"]["content"] == "say: a.", "only a draft that was not followed was too much"


def test_a_refusal_arrives_though_its_body_is_still_coming() -> None:
    service = dataclasses.replace(scripted(ScriptedEngine("Hello")), keys=(hash_key("right"),))
    with running(service) as url, socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        size = 300_000
        head = f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: wrong\r\ncontent-length: {size}\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(size // 30_000):
            connection.sendall(b"x" * 30_000)
            time.sleep(0.003)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401")
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_key_may_have_any_characters() -> None:
    with running(tiny_service(keys=("schlüssel",))) as url:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            assert httpx.get(f"{url}/v1/models", headers={"x-api-key": key.encode()}).status_code == status
