"""Sampling fields of requests: ranges, the model's own defaults, and fields that are refused as not supported."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch

from paceline.config import EngineConfig, Hardware, resolve
from paceline.engine.engine import Engine
from paceline.models.decoder import Decoder
from paceline.serve.run import make_service
from paceline.serve.unsupported import UnsupportedFields
from paceline.types import Sampling
from tests.serve.service import MARKERS, ScriptedEngine, byte_tokenizer, running, scripted, tiny
from tests.serve.test_server import COLUMN, TABLES
from tests.tiny import random_tensors, tiny_config

MESSAGES = [{"role": "user", "content": "x"}]
PATHS = ("chat/completions", "completions", "responses")
OWN = Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, repetition_penalty=1.1)


def asked(path: str, **fields: Any) -> dict[str, Any]:
    """A valid body for the endpoint."""
    limit, said = {
        "completions": ("max_tokens", {"prompt": "x"}),
        "responses": ("max_output_tokens", {"input": "x"}),
    }.get(path, ("max_tokens", {"messages": MESSAGES}))
    return {"model": "tiny", limit: 3, **said, **fields}


def narrow() -> Engine:
    """An engine whose tokenizer has more tokens than its model."""
    tokenizer = byte_tokenizer((*MARKERS, "<|unused|>"))
    shape = tiny_config(vocab_size=tokenizer.vocab_size - 3, eos_tokens=tokenizer.eos_tokens, max_positions=4096)
    config = EngineConfig(device="cpu", dtype="float32", max_context=512, cache_tokens=1024, threads=1)
    resolved = resolve(config, Hardware(False, 1, 1 << 30), shape.max_positions)
    return Engine(Decoder(shape, random_tensors(shape), torch.device("cpu")), tokenizer, resolved)


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    with running(make_service(narrow(), ["tiny"])) as url:
        yield url


@pytest.mark.parametrize(
    ("written", "field"),
    [
        ('"temperature": 1e39', "temperature"),
        ('"temperature": -0.5', "temperature"),
        ('"temperature": 1e400', ""),
        ('"temperature": NaN', ""),
        ('"presence_penalty": 1e39', "presence_penalty"),
        ('"frequency_penalty": -3', "frequency_penalty"),
        ('"repetition_penalty": 0', "repetition_penalty"),
        ('"repetition_penalty": 1e39', "repetition_penalty"),
        ('"top_p": 0', "top_p"),
        ('"min_p": 2', "min_p"),
        ('"seed": 18446744073709551616', "seed"),
        ('"min_tokens": 4', ""),
        ('"min_tokens": -1', "min_tokens"),
        ('"logit_bias": {"261": 1}', "logit_bias"),
        ('"logit_bias": {"65": 1e39}', "logit_bias"),
        ('"logit_bias": {"65": 101}', "logit_bias"),
        ('"stop_token_ids": [65, 262]', "stop_token_ids[1]"),
        ('"stop_token_ids": [-1]', "stop_token_ids[0]"),
        ('"stop_token_ids": [1000000000000000000000000000000]', "stop_token_ids[0]"),
        ('"stop": [' + ",".join(f'"{index}"' for index in range(65)) + "]", "stop"),
        (f'"stop": "{"x" * 20000}"', "stop"),
        ('"stop": ""', ""),
        ('"n": 9', "n"),
        ('"n": 2, "best_of": 3', "best_of"),
        ('"stream_options": {"include_usage": true}', "stream_options"),
    ],
)
def test_a_number_out_of_range_is_a_400_that_names_its_field(small: str, written: str, field: str) -> None:
    for path in ("chat/completions", "completions"):
        body = httpx.Request("POST", "http://x", json=asked(path)).content.decode()
        reply = httpx.post(f"{small}/v1/{path}", content=f"{body[:-1]},{written}}}")
        assert reply.status_code == 400, reply.text
        assert not field or reply.json()["error"]["param"] == field, reply.text
    assert httpx.get(f"{small}/health").json() == {"status": "ready"}


@pytest.mark.parametrize("path", PATHS)
def test_the_ends_of_every_range_are_served(small: str, path: str) -> None:
    for fields in (
        {"temperature": 100.0, "top_k": 1 << 60, "seed": -(1 << 63)},
        {"temperature": 1e-30, "top_k": -1, "top_p": 1e-30, "min_p": 1.0},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 100.0},
        {"logit_bias": {"258": -100.0, "0": 100}},
        {"stop_token_ids": [258], "stop": ["x" * 250] * 64, "ignore_eos": True, "min_tokens": 3},
    ):
        reply = httpx.post(f"{small}/v1/{path}", json=asked(path, **fields))
        assert reply.status_code == 200, reply.text
    assert httpx.get(f"{small}/health").json() == {"status": "ready"}


def test_fewest_tokens_are_written(address: str) -> None:
    end = byte_tokenizer().eos_tokens[0]
    body = asked("completions", max_tokens=9, logit_bias={str(end): 100})
    assert httpx.post(f"{address}/v1/completions", json=body).json()["usage"]["completion_tokens"] == 1
    reply = httpx.post(f"{address}/v1/completions", json={**body, "min_tokens": 5}).json()
    assert reply["usage"]["completion_tokens"] == 6
    assert (
        httpx.post(f"{address}/v1/completions", json=asked("completions", max_tokens=400, min_tokens=300)).status_code
        == 200
    )


CHANGING: dict[str, Any] = {"prompt_logprobs": 0, "modalities": ["text", "audio"]}
NEUTRAL: dict[str, Any] = {
    "skip_special_tokens": False,
    "truncate_prompt_tokens": -1,
    "typical_p": 1.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    "samplers": [],
    "n_predict": -1,
    "modalities": ["text"],
    "use_beam_search": False,
    "chat_template": "",
    "web_search_options": None,
}


def test_unsupported_fields_are_refused_by_name(address: str) -> None:
    for name in UnsupportedFields.__annotations__:
        for path in PATHS:
            reply = httpx.post(f"{address}/v1/{path}", json=asked(path, **{name: CHANGING.get(name, 2)}))
            assert reply.status_code == 400 and reply.json()["error"]["param"] == name, reply.text
    for path in PATHS:
        assert httpx.post(f"{address}/v1/{path}", json=asked(path, **NEUTRAL)).status_code == 200


def test_a_model_that_is_left_out_is_the_one_served(address: str) -> None:
    for path in (*PATHS, "messages"):
        body = asked(path)
        del body["model"]
        for model in ({}, {"model": ""}):
            reply = httpx.post(f"{address}/v1/{path}", json=body | model)
            assert reply.status_code == 200 and reply.json()["model"] == "tiny", reply.text
    for path in ("tokenize", "detokenize"):
        assert httpx.post(f"{address}/{path}", json={"prompt": "a", "tokens": [1]}).status_code == 200


def seen(defaults: Sampling, path: str, **fields: Any) -> Sampling:
    """The sampling that the engine receives."""
    script = ScriptedEngine("Hello.")
    with running(dataclasses.replace(scripted(script), defaults=defaults)) as url:
        assert httpx.post(f"{url}/v1/{path}", json=asked(path, **fields)).status_code == 200
    return script.requests[0].sampling


@pytest.mark.parametrize("path", [*PATHS, "messages"])
def test_what_a_request_does_not_say_is_as_the_models_makers_have_it(path: str) -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

    def values(sampling: Sampling) -> tuple[float, ...]:
        return tuple(getattr(sampling, name) for name in names)

    assert values(seen(OWN, path)) == values(OWN)
    assert values(seen(OWN, path, temperature=0.2)) == (0.2, 20, 0.8, 0.1, 1.1)
    assert values(seen(OWN, path, top_k=0, top_p=1)) == (0.7, 0, 1, 0.1, 1.1)
    assert values(seen(OWN, path, temperature=0)) == values(Sampling())
    assert values(seen(Sampling(), path)) == values(Sampling())
    if path != "messages":  # the API has no such field
        assert values(seen(OWN, path, temperature=0, repetition_penalty=1.3)) == (0, 0, 1, 0, 1.3)


@pytest.mark.parametrize("path", PATHS)
def test_repeat_penalty_is_repetition_penalty(small: str, path: str) -> None:
    for given in ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2, "repeat_penalty": 1.2}):
        assert seen(OWN, path, **given).repetition_penalty == 1.2
    for given in ({"repeat_penalty": 1e39}, {"repetition_penalty": 1.2, "repeat_penalty": 1.1}):
        error = httpx.post(f"{small}/v1/{path}", json=asked(path, **given)).json()["error"]
        assert error["param"] == "repeat_penalty" and error["message"].startswith("repeat_penalty ")


def test_an_error_names_the_field_as_its_client_does(small: str) -> None:
    for path, field, value, words in (
        ("messages", "stop_sequences", ["x"] * 65, "stop_sequences must have at most 64 strings"),
        ("messages", "stop_sequences", [""], "stop_sequences must not have an empty string"),
        ("completions", "stop", [""], "stop must not have an empty string"),
        ("completions", "stop_token_ids", [1] * 1025, "stop_token_ids must be at most 1024"),
    ):
        error = httpx.post(f"{small}/v1/{path}", json=asked(path, **{field: value})).json()["error"]
        assert error["message"] == words and error.get("param", field) == field


def test_the_greedy_option_leaves_the_makers_values_out() -> None:
    engine = Engine(tiny().model, byte_tokenizer(), tiny().config, OWN)
    assert make_service(engine, ["tiny"]).defaults == OWN
    assert make_service(engine, ["tiny"], greedy=True).defaults == Sampling()


def test_merges_stay_greedy_whatever_the_makers_say() -> None:
    script = ScriptedEngine("1")
    asked_for = f"<code>{TABLES}</code>\n<update>{COLUMN}</update>"
    with running(dataclasses.replace(scripted(script), defaults=OWN)) as url:
        said, options = [{"role": "user", "content": asked_for}], {"path": "a.sql"}
        body = {"model": "morph-v3-fast", "messages": said, "paceline": options}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    assert [each.sampling.temperature for each in script.requests] == [0]
