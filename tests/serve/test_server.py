"""Apply, disconnecting clients, the queue, API keys, the drain, a crash, and the small endpoints."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from paceline.engine.engine import Engine
from paceline.errors import ConfigError
from paceline.serve.morph import StablePrefix
from paceline.serve.run import check_address
from paceline.serve.service import Service
from paceline.tasks.apply import Prepared, apply, prepare
from paceline.tasks.prompts import morph_form
from paceline.types import Usage
from tests.serve.service import ScriptedEngine, running, scripted, tiny, tiny_service, until

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CODE = "def one():\n    return 1\n\n\ndef two():\n    return 2\n"
UPDATE = "# ... existing code ...\ndef two():\n    return 22\n"
SURE = "def one():\n    return 11\n"
DOUBTFUL = "class Elephant:\n    trunk = 1\n"
TABLES = "\n".join(f"CREATE TABLE {name} (\n  id INT,\n  name TEXT,\n  size INT\n);\n" for name in "ab")
COLUMN = "-- ...\n  name TEXT NOT NULL,\n  size INT\n-- ...\n"  # which fits the one table as well as the other
LONG = {"model": "tiny", "messages": HELLO, "max_tokens": 1500, "stream": True, "logit_bias": {"65": 100}}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny()


@pytest.fixture(scope="module")
def service(engine: Engine) -> Service:
    return tiny_service(engine)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with running(service) as url:
        yield url


def chat(url: str, **change: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 5, **change}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=20)


def merge(url: str, code: str, update: str, **change: Any) -> tuple[dict[str, Any], list[Any]]:
    """Morph's apply, whole and streamed."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": morph_form("Do it.", code, update)}]
        asked: dict[str, Any] = {"messages": messages, "extra_body": change}
        whole = client.chat.completions.create(model="morph-v3-fast", **asked)
        options = {"include_usage": True}
        chunks = list(
            client.chat.completions.create(model="morph-v3-large", stream=True, stream_options=options, **asked)
        )
    return whole.model_dump(), [each.model_dump() for each in chunks]


def streamed(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for each in chunks for choice in each["choices"])


def test_an_edit_without_a_doubt_is_answered_by_rule_without_a_token(address: str, service: Service) -> None:
    whole, chunks = merge(address, CODE, SURE, paceline={"path": "numbers.py"})
    assert whole["choices"][0]["message"]["content"] == streamed(chunks) == CODE.replace("return 1", "return 11")
    assert whole["choices"][0]["finish_reason"] == chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert whole["paceline"] == chunks[-2]["paceline"] == {"source": "rule"}
    for usage in (whole["usage"], chunks[-1]["usage"]):
        assert usage["completion_tokens"] == usage["total_tokens"] == 0
    assert service.host.num_open == 0


def test_an_edit_without_a_doubt_does_not_reach_the_engine() -> None:
    script = ScriptedEngine("never said")
    with running(scripted(script)) as url:
        assert merge(url, CODE, SURE)[0]["choices"][0]["message"]["content"] == CODE.replace("return 1", "return 11")
    assert script.requests == []


def test_a_doubtful_edit_is_flagged_as_the_task_flags_it(address: str) -> None:
    wanted = apply(tiny(), CODE, DOUBTFUL, path="numbers.py")
    assert wanted.reasons and wanted.source == "rule"
    whole, chunks = merge(address, CODE, DOUBTFUL, paceline={"path": "numbers.py"})
    assert whole["choices"][0]["message"]["content"] == streamed(chunks) == wanted.text
    assert whole["paceline"] == chunks[-2]["paceline"] == {"source": "rule", "flagged": list(wanted.reasons)}
    assert whole["usage"]["completion_tokens"] == 0


def test_of_two_interpretations_the_model_is_asked_and_the_candidate_stays_if_it_gives_neither(address: str) -> None:
    """A random model's output is none of the edit's interpretations."""
    whole, chunks = merge(address, TABLES, COLUMN, paceline={"path": "a.sql"})
    text = TABLES.replace("  name TEXT,", "  name TEXT NOT NULL,", 1)
    assert whole["choices"][0]["message"]["content"] == streamed(chunks) == text
    assert whole["paceline"]["source"] == "rule" and "line 3 and line 9" in whole["paceline"]["flagged"][0]
    assert whole["usage"]["completion_tokens"] > 0 and chunks[-1]["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("number", [1, 2])
def test_an_interpretation_that_the_model_writes_is_the_answer(number: int) -> None:
    head, middle, tail = TABLES.split("  name TEXT,")
    columns = ["  name TEXT,"] * 2
    columns[number - 1] = "  name TEXT NOT NULL,"
    reading = f"{head}{columns[0]}{middle}{columns[1]}{tail}"
    with running(scripted(ScriptedEngine(reading))) as url:
        whole, chunks = merge(url, TABLES, COLUMN, paceline={"path": "a.sql"})
    assert whole["choices"][0]["message"]["content"] == streamed(chunks) == reading
    assert whole["paceline"]["source"] == "model" and whole["paceline"]["flagged"]


def test_the_policy_review_margin_gives_the_models_own_text(address: str) -> None:
    options = {"path": "numbers.py", "policy": "review-margin"}
    wanted = apply(tiny(), CODE, SURE, "Do it.", path="numbers.py", policy="review-margin")
    whole, chunks = merge(address, CODE, SURE, paceline=options)
    assert whole["choices"][0]["message"]["content"] == streamed(chunks) == wanted.text
    assert wanted.reasons and wanted.source == "model", "a random model does not merge"
    assert whole["paceline"] == chunks[-2]["paceline"] == {"source": "model", "flagged": list(wanted.reasons)}
    assert whole["usage"]["completion_tokens"] > 0


def test_an_own_name_for_apply_is_answered_alike(address: str) -> None:
    content = morph_form("", CODE, SURE)
    reply = chat(address, model="own-apply", messages=[{"role": "user", "content": content}]).json()
    assert reply["choices"][0]["message"]["content"] == CODE.replace("return 1", "return 11")


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("Hello", None, "<update>"),
        (morph_form("", CODE, " "), None, "the edit is empty"),
        (morph_form("", CODE, "trunk = elephant(1)\n"), None, "no line of the edit is found"),
        (morph_form("", CODE, SURE), {"policy": 7}, "policy"),
        (morph_form("", CODE, SURE), {"path": ["a.py"]}, "path"),
        (morph_form("", CODE, SURE), {"policy": "review_margin"}, "did you mean 'review-margin'"),
    ],
    ids=["form", "empty", "nowhere", "policy type", "path type", "policy"],
)
def test_what_is_no_apply_is_a_400(address: str, content: str, options: dict[str, Any] | None, words: str) -> None:
    extra = {} if options is None else {"paceline": options}
    reply = chat(address, model="morph-v3-fast", messages=[{"role": "user", "content": content}], **extra)
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]


@pytest.mark.parametrize("code", [CODE, CODE.replace("\n", "\r\n"), CODE.rstrip(), CODE + "\n\n"])
def test_what_is_streamed_of_a_merge_is_the_concluded_file(engine: Engine, code: str) -> None:
    prepared = prepare(engine, code, UPDATE, policy="review-margin")
    assert isinstance(prepared, Prepared)
    output = "def one():\r\n    return `1`\n\n\n\ndef two():\n    return 22\n\n"
    whole = prepared.conclude(output, Usage(), False).text
    for size in range(1, 9):
        release = StablePrefix(prepared)
        streamed = "".join(release.feed(output[start : start + size]) for start in range(0, len(output), size))
        assert streamed and streamed + release.rest(whole) == whole


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_pages(stream: bool) -> None:
    engine = tiny(drafter="none")
    service = tiny_service(engine)
    assert engine.tree is not None
    with running(service) as address, httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{address}/v1/chat/completions", json=LONG) as reply:
                lines = reply.iter_lines()  # kept: httpx closes the reply with it
                next(lines)
                assert service.host.num_open == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{address}/v1/chat/completions", json={**LONG, "stream": False}, timeout=0.3)
        until(lambda: service.host.num_open == 0 and not engine.busy)
        assert engine.pool.num_free + engine.tree.num_evictable == engine.pool.num_pages - 1
        assert 'request_cancelled_total{model_name="tiny"} 1.0' in httpx.get(f"{address}/metrics").text


def test_requests_beside_each_other_are_answered_as_alone(address: str) -> None:
    alone = [chat(address, max_tokens=50, messages=[{"role": "user", "content": f"say {n}"}]).json() for n in range(4)]
    replies: dict[int, Any] = {}

    def ask(number: int) -> None:
        message = {"role": "user", "content": f"say {number}"}
        replies[number] = chat(address, max_tokens=50, messages=[message]).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(alone):
        assert replies[number]["choices"][0]["message"] == one["choices"][0]["message"]


def test_a_full_queue_is_an_error_in_each_apis_format() -> None:
    service = scripted(ScriptedEngine("word " * 20_000, size=1), max_open=1)
    with running(service) as url, httpx.Client() as client:
        with client.stream("POST", f"{url}/v1/chat/completions", json=LONG) as reply:
            lines = reply.iter_lines()  # kept: httpx closes the reply with it
            next(lines)
            refused = chat(url)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 5}
            other = httpx.post(f"{url}/v1/messages", json=body)
            assert other.status_code == 529 and other.json()["error"]["type"] == "overloaded_error"
            assert int(other.headers["retry-after"]) >= 1
        until(lambda: service.host.num_open == 0)


def test_keys_are_accepted_in_both_headers() -> None:
    with running(tiny_service(keys=("first", "second"))) as url:
        for key in ("wrong", ""):
            refused = httpx.post(f"{url}/v1/messages", json={}, headers={"x-api-key": key})
            assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="second") as client:
            assert [each.id for each in client.models.list()] == ["tiny", "other-name"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="third") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with anthropic.Anthropic(base_url=url, api_key="first") as other:
            assert other.messages.count_tokens(model="tiny", messages=HELLO).input_tokens > 0


def test_an_open_address_needs_a_key_or_consent() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_address(host, [], False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="--allow-open"):
            check_address(host, [], False)
        check_address(host, ["key"], False)
        check_address(host, [], True)


def test_the_drain_finishes_what_is_under_way() -> None:
    service = scripted(ScriptedEngine("word " * 500, size=1))
    with httpx.Client(timeout=20) as client:
        with running(service) as url:
            stream = client.stream("POST", f"{url}/v1/chat/completions", json=LONG)
            reply = stream.__enter__()
            lines = reply.iter_lines()
            next(lines)
            rest: list[str] = []
            reader = threading.Thread(target=lambda: rest.extend(lines))
            reader.start()
        reader.join(20)
        stream.__exit__(None, None, None)
    assert rest[-2:] == ["data: [DONE]", ""] and service.host.state == "stopped"


def test_a_crash_of_the_thread_fails_everything_loudly(caplog: pytest.LogCaptureFixture) -> None:
    service = scripted(ScriptedEngine("word", fails=True))
    with running(service) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        assert chat(url).status_code == 500 and chat(url).status_code == 500
        assert httpx.get(f"{url}/health").status_code == 503
    assert any(each.levelname == "CRITICAL" for each in caplog.records)


def test_one_requests_bug_leaves_the_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    with running(scripted(ScriptedEngine("word"))) as url:
        body = {"model": "tiny", "prompt": "secret BUG!", "max_tokens": 5}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 500
        assert chat(url).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
    assert "secret" not in caplog.text


def test_the_small_endpoints(address: str) -> None:
    assert httpx.head(f"{address}/").status_code == httpx.head(f"{address}/api/hello").status_code == 200
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": "ab"}).json()
    assert tokens["tokens"] == [97, 98] and tokens["max_model_len"] == 2048
    assert httpx.post(f"{address}/tokenize", json={"messages": HELLO}).json()["count"] > 5
    assert httpx.post(f"{address}/tokenize", json={}).status_code == 400
    assert httpx.post(f"{address}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{address}/v1/messages").json()["type"] == "error"
    text = httpx.get(f"{address}/metrics").text
    for name in ("time_to_first_token_seconds_bucket", "generation_tokens_total", "prefix_cache_hits_total"):
        assert f"paceline:{name}{{" in text
    assert 'paceline:num_requests_running{model_name="tiny"} 0.0' in text
    assert 'paceline:num_requests_waiting{model_name="tiny"} 0.0' in text


def test_a_body_over_the_limit_is_a_413(address: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(33):
            yield b" " * (1 << 20)

    for content in (b" " * (33 << 20), pieces()):
        try:
            reply = httpx.post(f"{address}/v1/messages", content=content, timeout=20)
        except httpx.WriteError:
            continue  # the server answered and closed before the body was sent
        assert reply.status_code == 413 and reply.json()["error"]["type"] == "request_too_large"
