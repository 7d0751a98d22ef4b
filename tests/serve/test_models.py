"""The models API through both APIs' own clients in their strict modes, and the spellings of paths."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest

from paceline.cli import app
from paceline.errors import ConfigError
from paceline.serve.run import Limits, make_service
from tests.serve.service import ScriptedEngine, running, scripted, tiny

NAMES = ("tiny", "owner/name", "other-name")
ANTHROPICS = {"anthropic-version": "2023-06-01"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(make_service(tiny(), NAMES)) as address:
        yield address


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, _strict_response_validation=True) as made:
        yield made


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    options: Any = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
    with openai.OpenAI(**options, _strict_response_validation=True) as made:
        yield made


def test_both_clients_read_the_same_object_strictly(
    client: openai.OpenAI, claude: anthropic.Anthropic, url: str
) -> None:
    for name in NAMES:
        plain, theirs = client.models.retrieve(name), claude.models.retrieve(name)
        assert (plain.id, plain.object, plain.owned_by) == (name, "model", "paceline")
        assert (theirs.id, theirs.type, theirs.display_name, theirs.lifecycle) == (name, "model", name, "active")
        assert theirs.created_at.timestamp() == plain.created > 0 and theirs.created_at.tzinfo is not None
        assert theirs.max_input_tokens == theirs.max_tokens == 2048
        assert theirs.capabilities is not None and theirs.capabilities.structured_outputs.supported
        assert not theirs.capabilities.image_input.supported and not theirs.capabilities.thinking.supported
        assert claude.beta.models.retrieve(name).id == name
    fetched = httpx.get(f"{url}/v1/models/tiny").json()
    assert fetched == httpx.get(f"{url}/v1/models").json()["data"][0] and fetched["max_model_len"] == 2048


def test_lists_come_whole_or_by_pages(client: openai.OpenAI, claude: anthropic.Anthropic, url: str) -> None:
    listed = client.models.list()
    assert [each.id for each in listed] == list(NAMES) and listed.object == "list"
    assert [each.id for each in claude.models.list()] == list(NAMES)
    assert [each.id for each in claude.beta.models.list(limit=1)] == list(NAMES)
    page = claude.models.list(limit=2)
    assert ([each.id for each in page.data], page.has_more) == (list(NAMES[:2]), True)
    assert (page.first_id, page.last_id) == NAMES[:2]
    back = claude.models.list(limit=1, before_id=NAMES[2])
    assert ([each.id for each in back.data], back.has_more) == ([NAMES[1]], True)
    last = claude.models.list(after_id=NAMES[1])
    assert ([each.id for each in last.data], last.has_more) == ([NAMES[2]], False)
    none = httpx.get(f"{url}/v1/models", params={"after_id": NAMES[2]}).json()
    assert none == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    "asked",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "９"},
        {"after_id": "none"},
        {"before_id": ""},
        {"after_id": "tiny", "before_id": "other-name"},
    ],
)
def test_a_page_that_cannot_be_is_refused(url: str, asked: dict[str, str]) -> None:
    reply = httpx.get(f"{url}/v1/models", params=asked)
    assert reply.status_code == 400 and reply.json()["error"]["param"] in asked
    theirs = httpx.get(f"{url}/v1/models", params=asked, headers=ANTHROPICS)
    assert theirs.status_code == 400 and theirs.json()["type"] == "error"


def test_an_unknown_model_is_not_found_in_its_clients_form(
    client: openai.OpenAI, claude: anthropic.Anthropic, url: str
) -> None:
    with pytest.raises(openai.NotFoundError) as found:
        client.models.retrieve("owner/none")
    assert found.value.code == "model_not_found" and "'owner/none'" in str(found.value)
    with pytest.raises(anthropic.NotFoundError) as theirs:
        claude.models.retrieve("owner/none")
    body: Any = theirs.value.body
    assert body["type"] == "error" and body["error"]["type"] == "not_found_error"
    assert httpx.get(f"{url}/v1/files", headers=ANTHROPICS).json()["type"] == "error"
    assert "type" not in httpx.get(f"{url}/v1/files").json()
    assert claude.models.retrieve("claude-any").id == "claude-any"  # /v1/messages accepts it too


def test_a_name_in_a_path_is_read_as_it_is_sent(url: str) -> None:
    for path in ("/v1/models/owner/name", "/v1/models/owner%2Fname", "/v1/models/owner%2fname/"):
        assert httpx.get(url + path).json()["id"] == "owner/name"
    assert httpx.head(f"{url}/v1/models/tiny").status_code == 200
    reply = httpx.post(f"{url}/v1/models/tiny")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD")


def test_a_names_request_is_logged_by_its_route(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "paceline.requests"):
        assert httpx.get(f"{url}/v1/models/tiny").status_code == 200
        assert httpx.get(f"{url}/v1/models/a-secret").status_code == 404
    lines: list[Any] = [each.__dict__["fields"] for each in caplog.records if each.name == "paceline.requests"]
    assert [each["endpoint"] for each in lines] == ["GET /v1/models/{model}"] * 2


def test_a_missing_key_is_an_error_in_the_clients_format() -> None:
    with running(make_service(tiny(), NAMES, keys=["secret"])) as address:
        plain = httpx.get(f"{address}/v1/models/tiny")
        theirs = httpx.get(f"{address}/v1/models/tiny", headers=ANTHROPICS)
        assert plain.status_code == theirs.status_code == 401
        assert plain.json()["error"]["code"] == "invalid_api_key" and theirs.json()["type"] == "error"


def test_paths_are_found_without_v1_and_with_it_twice() -> None:
    hello = [{"role": "user", "content": "Hello"}]
    bodies: dict[str, Any] = {
        "/chat/completions": {"messages": hello},
        "/completions": {"prompt": "Hello"},
        "/responses": {"input": "Hello"},
        "/messages": {"messages": hello, "max_tokens": 9},
        "/messages/count_tokens": {"messages": hello},
    }
    with running(scripted(ScriptedEngine("Done."))) as address:
        for path, body in bodies.items():
            replies = [
                httpx.post(f"{address}{base}{path}", json={"model": "tiny", **body}) for base in ("/v1", "", "/v1/v1")
            ]
            assert [each.status_code for each in replies] == [200] * 3, path
            assert [set(each.json()) for each in replies] == [set(replies[0].json())] * 3
        assert httpx.post(f"{address}/messages", json={"model": "tiny"}).json()["type"] == "error"
        assert httpx.get(f"{address}/models/tiny").json() == httpx.get(f"{address}/v1/models/tiny").json()
        assert httpx.get(f"{address}/v1/health").json() == {"status": "ready"}
        for path in ("/embeddings", "/v2/chat/completions", "/v1/v1/v1/models", "/v1"):
            reply = httpx.post(address + path)
            assert reply.status_code == 404 and reply.json()["error"]["message"] == f"POST {path} is not served"


def test_no_path_but_the_open_ones_is_served_without_a_key() -> None:
    """Every spelling of a path needs a key exactly if its endpoint does."""
    with running(make_service(tiny(), NAMES, keys=["secret"])) as address:
        for path in ("/models", "/v1/v1/models", "/v1/models/", "/metrics", "/v1/metrics", "/v1/live"):
            assert httpx.get(address + path).status_code == 401, path


ORIGIN = "http://localhost:3000"
ASKS = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}


@pytest.mark.parametrize(("allowed", "origin"), [(ORIGIN, ORIGIN), ("*", "https://any.example")])
def test_pages_of_an_allowed_origin_may_ask_and_read(allowed: str, origin: str) -> None:
    shown = allowed if allowed == "*" else origin
    limits = Limits(origins=("vscode-webview://x", allowed))
    with running(make_service(tiny(), NAMES, ["secret"], limits)) as address, httpx.Client(base_url=address) as client:
        before = client.options("/v1/chat/completions", headers={"origin": origin, **ASKS})
        assert before.status_code == 200 and before.headers["access-control-allow-origin"] == shown
        assert "POST" in before.headers["access-control-allow-methods"]
        assert before.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "origin" in before.headers["vary"].lower()
        private = {"origin": origin, **ASKS, "access-control-request-private-network": "true"}
        assert client.options("/v1/messages", headers=private).status_code == 200

        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
        key = {"authorization": "Bearer secret"}
        for status, headers, more in (
            (200, key, {}),
            (200, key, {"stream": True}),
            (401, {}, {}),
            (400, key, {"n": 0}),
        ):
            sent = {"origin": origin, **headers}
            reply = client.post("/v1/chat/completions", json={**body, **more}, headers=sent)
            assert reply.status_code == status, reply.text
            assert reply.headers["access-control-allow-origin"] == shown
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
            assert allowed == "*" or "origin" in reply.headers["vary"].lower()
            assert "access-control-allow-credentials" not in reply.headers
        assert client.get("/none", headers={"origin": origin, **key}).headers["access-control-allow-origin"] == shown


def test_pages_of_other_origins_may_not() -> None:
    with running(make_service(tiny(), NAMES, limits=Limits(origins=(ORIGIN,)))) as address:
        other = {"origin": "http://localhost:3001"}
        before = httpx.options(f"{address}/v1/models", headers={**other, **ASKS})
        assert before.status_code == 400 and "access-control-allow-origin" not in before.headers
        reply = httpx.get(f"{address}/v1/models", headers=other)
        assert "access-control-allow-origin" not in reply.headers and "origin" in reply.headers["vary"].lower()


def test_without_the_option_no_page_may(url: str) -> None:
    before = httpx.options(f"{url}/v1/models", headers={"origin": ORIGIN, **ASKS})
    assert before.status_code == 405 and "access-control-allow-origin" not in before.headers
    assert "access-control-allow-origin" not in httpx.get(f"{url}/v1/models", headers={"origin": ORIGIN}).headers


@pytest.mark.parametrize(
    "origin", ["", "localhost:3000", f"{ORIGIN}/", "https://a.b/c", "HTTPS://a.b", "https://a.b *"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ConfigError, match="an origin must be"):
        Limits(origins=(origin,))
    with pytest.raises(ConfigError, match="an origin must be"):
        app(["serve", "--cors", "*", "--cors", origin], standalone_mode=False)
