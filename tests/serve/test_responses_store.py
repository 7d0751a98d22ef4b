"""Stored responses: conversations continue by an id, for the key that began them, within the store's limits."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from paceline.errors import ConfigError, NotFound
from paceline.serve.run import Limits, make_service
from paceline.serve.store import Store, Turn, history
from tests.serve.service import TEMPLATE, ScriptedEngine, byte_tokenizer, running, scripted, tiny
from tests.serve.test_responses import PATCH, TOOLS, spoken


def item(name: str, text: str = "x") -> dict[str, Any]:
    return {"id": name, "type": "message", "role": "user", "content": text}


def made(name: str, before: Turn | None, tenant: str = "", size: int = 1) -> Turn:
    given, output = item(f"in_{name}", "x" * size), item(f"out_{name}")
    return Turn(
        tenant, before, json.dumps([given]).encode(), json.dumps([output]).encode(), (given["id"], output["id"])
    )


def kept(store: Store, name: str, before: str | None = None, tenant: str = "", size: int = 1) -> None:
    turn = None if before is None else store.get(tenant, before).turn
    store.add({"id": name}, made(name, turn, tenant, size))


def names(store: Store, name: str, tenant: str = "") -> list[str]:
    return [each["id"] for each in history(store.get(tenant, name).turn)]


def test_a_chain_is_kept_once_and_as_long_as_one_needs_it() -> None:
    store = Store()
    kept(store, "a", size=10_000)
    one = store.size
    kept(store, "b", "a")
    kept(store, "c", "a")  # two turns that follow the same one
    assert store.size < one + 10_000
    store.delete("", "a")
    with pytest.raises(NotFound, match="'a' is unknown or has expired"):
        store.get("", "a")
    assert names(store, "b") == ["in_a", "out_a", "in_b", "out_b"] and store.item("", "in_a")["content"] == "x" * 10_000
    store.delete("", "b")
    assert names(store, "c") == ["in_a", "out_a", "in_c", "out_c"]
    with pytest.raises(NotFound):
        store.item("", "in_b")
    store.delete("", "c")
    assert store.size == 0
    with pytest.raises(NotFound):
        store.item("", "in_a")


def test_a_turn_that_went_while_its_successor_was_written_comes_back_with_it() -> None:
    store = Store()
    kept(store, "a")
    turn = store.get("", "a").turn
    store.delete("", "a")
    store.add({"id": "b"}, made("b", turn))
    assert names(store, "b") == ["in_a", "out_a", "in_b", "out_b"] and store.item("", "in_a") == item("in_a")
    store.delete("", "b")
    assert store.size == 0


def test_the_least_recently_used_go_first_and_the_bound_holds() -> None:
    store = Store(max_bytes=100_000)
    for name in "abc":
        kept(store, name, size=20_000)
    store.get("", "a")
    for index in range(50):
        kept(store, f"d{index}", size=20_000)
        store.get("", "a")
        assert store.size <= 100_000
    assert names(store, "a") and names(store, "d49")
    with pytest.raises(NotFound):
        store.get("", "b")
    kept(store, "huge", size=200_000)  # a response that does not fit is not stored, and evicts all others
    assert store.size == 0


def test_age_counts_from_the_last_use() -> None:
    now = 0.0
    store = Store(seconds=60, clock=lambda: now)
    kept(store, "a")
    kept(store, "b")
    now = 50
    store.get("", "a")
    now = 61
    assert names(store, "a")
    with pytest.raises(NotFound, match="1 minutes"):
        store.get("", "b")
    with pytest.raises(NotFound):
        store.item("", "in_b")


def test_a_key_sees_its_own_alone() -> None:
    store = Store()
    kept(store, "a", tenant="one")
    with pytest.raises(NotFound):
        store.get("two", "a")
    with pytest.raises(NotFound):
        store.item("two", "in_a")
    with pytest.raises(NotFound):
        store.delete("two", "a")
    assert names(store, "a", "one")


def test_the_limits_of_the_store_are_checked() -> None:
    for wrong in ({"store_bytes": -1}, {"store_seconds": -1.0}, {"store_seconds": float("nan")}):
        with pytest.raises(ConfigError, match="store"):
            Limits(**wrong)  # type: ignore[arg-type]
    assert not make_service(tiny(), ["tiny"], limits=Limits(store_bytes=0)).store.enabled


def test_a_response_is_found_listed_and_forgotten(client: openai.OpenAI) -> None:
    asked: Any = [
        {"role": "user", "content": "One"},
        {"role": "user", "content": [{"type": "input_text", "text": "Two"}]},
    ]
    made = client.responses.create(model="tiny", input=asked, max_output_tokens=8)
    assert client.responses.retrieve(made.id).to_dict() == {**made.to_dict()}
    then = client.responses.create(model="tiny", input="Three", previous_response_id=made.id, max_output_tokens=8)
    assert then.previous_response_id == made.id
    listed = client.responses.input_items.list(then.id, order="asc", limit=2)
    assert listed.has_more  # type: ignore[attr-defined]
    texts = [each.content[0].text for each in listed]  # type: ignore[union-attr]  # the client pages by itself
    assert texts == ["One", "Two", made.output_text, "Three"]
    newest = client.responses.input_items.list(then.id).data
    assert [each.content[0].text for each in newest] == texts[::-1]  # type: ignore[union-attr]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="expired"):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError, match=made.id):
        client.responses.create(model="tiny", input="x", previous_response_id=made.id)
    assert client.responses.input_items.list(then.id).data  # it still has the whole conversation
    unkept = client.responses.create(model="tiny", input="x", store=False, max_output_tokens=2)
    assert unkept.store is False  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_streamed_response_is_kept_too(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=5, stream=True))
    last: Any = events[-1]
    assert client.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()


def test_paths_and_queries_that_cannot_be_are_refused(address: str, client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="x", max_output_tokens=2)
    at = f"{address}/v1/responses/{made.id}"
    for query, field in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"), ("after=none", "after")):
        reply = httpx.get(f"{at}/input_items?{query}")
        assert reply.status_code == 400 and reply.json()["error"]["param"] == field, query
    assert httpx.get(f"{at}?stream=true").json()["error"]["param"] == "stream"
    assert httpx.post(at, json={}).status_code == 405
    assert httpx.post(at, json={}).headers["allow"] == "GET, HEAD, DELETE"
    assert httpx.get(f"{address}/v1/responses/compact").status_code == 405
    assert httpx.get(f"{at}/nothing").status_code == 404


@pytest.mark.parametrize("streamed", [False, True])
def test_a_next_turn_begins_with_the_prompt_and_output_of_the_last_and_finds_it_cached(streamed: bool) -> None:
    """Calls, custom calls and reasoning are stored; instructions are not carried over."""
    said = "<think>\nhm\n</think>\n\nI run.\n" + "\n".join(
        (spoken("exec_command", cmd="ls"), spoken("apply_patch", input=PATCH), spoken("agents__close", target="x"))
    )
    template = TEMPLATE.replace(
        "message.role + '\\n' + message.content",
        "message.role + '\\n' + ('<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' "
        "if message.reasoning_content else '') + message.content",
    )
    script = ScriptedEngine(said, "Done.")
    script.tokenizer = byte_tokenizer(template=template + "{#- </think> #}")
    with running(scripted(script)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        options: Any = {"model": "tiny", "tools": TOOLS, "instructions": "Be brief."}
        if streamed:
            last: Any = list(client.responses.create(input="Go on.", stream=True, **options))[-1]
            first: Any = last.response
        else:
            first = client.responses.create(input="Go on.", **options)
        kinds = [each.type for each in first.output]
        assert kinds == ["reasoning", "message", "function_call", "custom_tool_call", "function_call"]
        outputs: Any = [
            {"type": "function_call_output", "call_id": first.output[2].call_id, "output": "a.py"},
            {"type": "custom_tool_call_output", "call_id": first.output[3].call_id, "output": "patched"},
            {"type": "function_call_output", "call_id": first.output[4].call_id, "output": "closed"},
        ]
        client.responses.create(input=outputs, previous_response_id=first.id, **options)
        whole = [{"role": "user", "content": "Go on."}, *[each.to_dict() for each in first.output], *outputs]
        client.responses.create(input=whole, store=False, **options)
        referenced: Any = [{"type": "item_reference", "id": each.id} for each in first.output]
        client.responses.create(input=[whole[0], *referenced, *outputs], **options)
        client.responses.create(input=outputs, previous_response_id=first.id, **options | {"instructions": "Be long."})
        client.responses.create(input=outputs, previous_response_id=first.id, **options | {"instructions": None})
        counted = client.responses.input_tokens.count(input=outputs, previous_response_id=first.id, **options)
    begun, chained, sent, by_reference, other, without = [each.prompt for each in script.requests]
    assert chained[: len(begun)] == begun and chained == sent == by_reference and counted.input_tokens == len(chained)
    text = script.tokenizer.decode(chained, skip_special=False)
    assert text.startswith("<|im_start|>system\nBe brief.") and f"<|im_start|>assistant\n{said}<|im_end|>" in text
    assert "Be long." in script.tokenizer.decode(other) and "Be brief." not in script.tokenizer.decode(other)
    assert "Be brief." not in script.tokenizer.decode(without)


def test_a_next_turn_finds_the_last_one_in_the_cache(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="Tell me of rivers. " * 12, max_output_tokens=40)
    then = client.responses.create(model="tiny", input="More.", previous_response_id=first.id, max_output_tokens=4)
    assert first.usage is not None and then.usage is not None
    # all of the prompt's pages of 16 tokens; the output's bytes may tokenize differently in the next prompt
    assert then.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens // 16 * 16


def test_ids_are_a_keys_own_and_a_store_can_be_off() -> None:
    with running(make_service(tiny(), ["tiny"], ("one", "two"))) as url:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) for key in ("one", "two")]
        made = clients[0].responses.create(model="tiny", input="x", max_output_tokens=2)
        assert clients[0].responses.retrieve(made.id).id == made.id
        for call in (
            lambda: clients[1].responses.retrieve(made.id),
            lambda: clients[1].responses.delete(made.id),
            lambda: clients[1].responses.input_items.list(made.id),
            lambda: clients[1].responses.create(model="tiny", input="x", previous_response_id=made.id),
            lambda: clients[1].responses.create(
                model="tiny", input=[{"type": "item_reference", "id": made.output[0].id}]
            ),  # type: ignore[list-item,typeddict-item]
        ):
            with pytest.raises(openai.NotFoundError):
                call()
    with running(make_service(tiny(), ["tiny"], limits=Limits(store_bytes=0))) as url:
        body = {"model": "tiny", "input": "x", "max_output_tokens": 2, "store": True}
        made = httpx.post(f"{url}/v1/responses", json=body, timeout=30).json()
        assert made["store"] is False
        reply = httpx.post(f"{url}/v1/responses", json={**body, "previous_response_id": made["id"]})
        assert reply.status_code == 404 and "--store-mb 0" in reply.json()["error"]["message"]
