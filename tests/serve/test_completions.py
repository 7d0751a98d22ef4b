"""Completions: texts and tokens to continue, several prompts at once, echo and the prompt's log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from paceline.serve.run import Limits, make_service
from paceline.types import Request, Sampling
from tests.models.test_logits import run
from tests.serve.service import ScriptedEngine, byte_tokenizer, running, scripted, tiny, tiny_service, until
from tests.serve.test_chat import expected

PROMPTS = ["def add(", "caf\u00e9 = ", "class A", "x"]


def complete(address: str, **fields: Any) -> dict[str, Any]:
    reply = httpx.post(f"{address}/v1/completions", json={"model": "tiny", **fields}, timeout=60)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def chunks(address: str, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "tiny", "stream": True, **fields}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def of_choice(parts: list[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    return [choice for each in parts for choice in each["choices"] if choice["index"] == index]


def test_completions_continue_text_and_tokens(client: openai.OpenAI) -> None:
    words = expected("def add(", max_tokens=30)
    for prompt in ("def add(", list(b"def add(")):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=30)
        assert reply.choices[0].text == words
    chunks = list(client.completions.create(model="tiny", prompt="def add(", max_tokens=30, stream=True))
    assert "".join(each.choices[0].text for each in chunks) == words
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_suffix_is_put_behind_the_models_own_tokens(client: openai.OpenAI) -> None:
    engine = tiny()
    before, between, after = (
        engine.tokenizer.special_tokens[f"<|fim_{each}|>"] for each in ("prefix", "suffix", "middle")
    )
    prompt = [before, *b"def f(", between, *b"return x", after]
    reply = client.completions.create(model="tiny", prompt="def f(", suffix="return x", max_tokens=20)
    ends = tuple(engine.tokenizer.special_tokens[f"<|fim_{each}|>"] for each in ("prefix", "suffix", "middle"))
    same = engine.generate([Request(prompt, Sampling(max_tokens=20, stop_tokens=ends))])[0]
    assert reply.choices[0].text == same.text
    with (
        running(tiny_service(tiny(byte_tokenizer(("<|im_start|>", "<|im_end|>"))))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as other,
        pytest.raises(openai.BadRequestError, match="suffix"),
    ):
        other.completions.create(model="tiny", prompt="a", suffix="b")


def test_several_prompts_have_a_choice_each_in_their_order(address: str) -> None:
    words = [expected(each, max_tokens=12) for each in PROMPTS]
    for prompts in (PROMPTS, [list(each.encode()) for each in PROMPTS]):
        whole = complete(address, prompt=prompts, max_tokens=12)
        assert [each["index"] for each in whole["choices"]] == [0, 1, 2, 3]
        assert [each["text"] for each in whole["choices"]] == words
        assert whole["usage"]["prompt_tokens"] == sum(len(each.encode()) for each in PROMPTS)
        assert whole["usage"]["completion_tokens"] == 4 * 12
    parts = chunks(address, prompt=PROMPTS, max_tokens=12, stream_options={"include_usage": True})
    for index, text in enumerate(words):
        own = of_choice(parts, index)
        assert "".join(each["text"] for each in own) == text and own[-1]["finish_reason"] == "length"
    assert parts[-1]["choices"] == [] and parts[-1]["usage"]["completion_tokens"] == 4 * 12


def test_several_choices_have_seeds_of_their_own(address: str) -> None:
    drawn = {"temperature": 1.5, "max_tokens": 20}
    alone = [complete(address, prompt="ab", seed=5 + index, **drawn)["choices"][0]["text"] for index in range(3)]
    assert len(set(alone)) == 3
    whole = complete(address, prompt="ab", seed=5, n=3, **drawn)
    assert [each["text"] for each in whole["choices"]] == alone
    assert whole["usage"]["prompt_tokens"] == 2 and whole["usage"]["completion_tokens"] == 60
    parts = chunks(address, prompt=["ab", "cd"], seed=5, n=3, **drawn)
    assert ["".join(each["text"] for each in of_choice(parts, index)) for index in range(3)] == alone
    assert len(of_choice(parts, 5)) > 1 and not of_choice(parts, 6)
    complete(address, prompt="ab", seed=(1 << 63) - 1, n=2, max_tokens=1)  # the next seed is the least one
    assert complete(address, prompt="ab", n=3, best_of=3, max_tokens=1)["choices"][2]["index"] == 2


def test_more_choices_than_places_wait_for_them() -> None:
    service = make_service(tiny(max_batch=2), ["tiny"], limits=Limits(queue=0))
    with running(service) as url:
        whole = complete(url, prompt=[f"{index} = " for index in range(9)], max_tokens=4)
        assert [each["text"] for each in whole["choices"]] == [
            expected(f"{index} = ", max_tokens=4) for index in range(9)
        ]
        assert service.host.num_open == 0


def test_choices_wait_where_others_have_taken_the_places() -> None:
    with running(scripted(ScriptedEngine("word"), max_open=2)) as url:
        whole = complete(url, prompt=["a", "b", "c", "d", "e"])
        assert [each["text"] for each in whole["choices"]] == ["word"] * 5
    with running(scripted(ScriptedEngine("word"), max_open=1)) as url:
        assert len(complete(url, prompt=["a", "b"], n=2)["choices"]) == 4


def test_later_choices_find_their_prompt_in_the_cache() -> None:
    service = tiny_service()
    with running(service) as url:
        usage = complete(url, prompt=["ab" * 200], n=4, max_tokens=2)["usage"]
        assert usage["prompt_tokens"] == 400 and usage["prompt_tokens_details"]["cached_tokens"] == 0
        lines = httpx.get(f"{url}/metrics").text.splitlines()
    hits = next(line for line in lines if line.startswith("paceline:prefix_cache_hits_total{"))
    assert float(hits.rpartition(" ")[2]) >= 3 * 384


def test_a_client_that_goes_ends_all_its_choices() -> None:
    service = scripted(ScriptedEngine("word " * 2000, size=1))
    with running(service) as url:
        body = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as reply:
            lines = reply.iter_lines()
            assert "data" in next(lines)
            until(lambda: service.host.num_open == 4)
        until(lambda: service.host.num_open == 0)


def test_one_choices_error_ends_them_all() -> None:
    service = scripted(ScriptedEngine("word " * 200))
    with running(service) as url:
        for streams in (False, True):
            body = {"model": "tiny", "prompt": ["a", "BUG!", "c"], "stream": streams}
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=20)
            assert reply.status_code == (200 if streams else 500) and "the engine failed" in reply.text
            until(lambda: service.host.num_open == 0)


def test_log_probabilities_have_the_chosen_token_among_them(address: str) -> None:
    for count in (0, 1, 3):
        values = complete(address, prompt="ab", max_tokens=6, temperature=2, seed=3, logprobs=count)["choices"][0][
            "logprobs"
        ]
        for token, value, top in zip(values["tokens"], values["token_logprobs"], values["top_logprobs"], strict=True):
            assert top[token] == value or token == "\ufffd"  # half a character: another token may have the same text
            assert 1 <= len(top) <= count + 1 and max(top.values()) >= value
    assert complete(address, prompt="ab", max_tokens=2)["choices"][0]["logprobs"] is None


def test_the_token_that_ends_the_text_is_among_its_tokens(address: str) -> None:
    end = byte_tokenizer().eos_tokens[0]
    choice = complete(address, prompt="ab", max_tokens=9, logprobs=1, logit_bias={str(end): 100})["choices"][0]
    assert choice["text"] == "" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["<|im_end|>"] and choice["logprobs"]["text_offset"] == [0]


def wanted(prompt: bytes) -> list[float | None]:
    """The log-probabilities of a prompt's tokens, from one pass of the model."""
    tokens = list(prompt)
    values = torch.log_softmax(run(tiny().model, tokens), -1)
    return [None, *(float(values[place, token]) for place, token in enumerate(tokens[1:]))]


@pytest.fixture(scope="module")
def deterministic_address() -> Iterator[str]:
    """A server whose numbers do not depend on which requests share a step, and so not on the time that steps take."""
    with running(tiny_service(tiny(deterministic=True))) as url:
        yield url


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_an_echo_has_the_prompts_own_log_probabilities(deterministic_address: str, limit: int) -> None:
    address = deterministic_address
    for prompt in (PROMPTS, [list(each.encode()) for each in PROMPTS]):
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": limit, "echo": True, "logprobs": 2, "temperature": 0}
        whole = complete(address, **asked)
        parts = chunks(address, **asked)
        assert whole["usage"]["completion_tokens"] == limit * 4
        for index, text in enumerate(PROMPTS):
            choice = whole["choices"][index]
            more = expected(text, max_tokens=limit) if limit else ""
            assert choice["text"] == text + more and choice["finish_reason"] == "length"
            values, data = choice["logprobs"], text.encode()
            assert values["token_logprobs"][: len(data)] == pytest.approx(wanted(data), abs=1e-4)
            assert len(values["tokens"]) == len(data) + limit
            assert values["top_logprobs"][0] is None and all(values["top_logprobs"][1:])
            characters = [len(data[:place].decode(errors="ignore")) for place in range(len(data))]
            assert values["text_offset"][: len(data)] == characters
            own = of_choice(parts, index)
            assert "".join(each["text"] for each in own) == choice["text"]
            assert [one for each in own for one in each["logprobs"]["token_logprobs"]] == values["token_logprobs"]
            assert [one for each in own for one in each["logprobs"]["text_offset"]] == values["text_offset"]


def test_an_echo_without_log_probabilities_is_text(address: str) -> None:
    assert complete(address, prompt="ab", max_tokens=0, echo=True)["choices"] == [
        {"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}
    ]
    whole = complete(address, prompt="ab", max_tokens=5, echo=True, n=2)
    assert [each["text"] for each in whole["choices"]] == ["ab" + expected("ab", max_tokens=5)] * 2


def test_what_comes_before_a_prompt_is_no_part_of_its_echo() -> None:
    tokenizer = byte_tokenizer()
    start = tokenizer.special_tokens["<|im_start|>"]
    tokenizer.bos_tokens = (start,)
    with running(tiny_service(tiny(tokenizer))) as url:
        asked: dict[str, Any] = {"prompt": "ab", "max_tokens": 0, "echo": True, "logprobs": 0}
        choice = complete(url, **asked)["choices"][0]
        assert choice["text"] == "ab" and choice["logprobs"]["tokens"] == ["<|im_start|>", "a", "b"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1]
        assert complete(url, **asked, add_special_tokens=False)["choices"][0]["logprobs"]["tokens"] == ["a", "b"]


def test_what_evaluation_harnesses_ask(address: str) -> None:
    """lm-eval's local-completions: finds a continuation's tokens among the echoed ones, the last token being new."""
    context, text = list(b"The sky is"), list(b" blue")
    values = complete(
        address, prompt=[context + text, [256, *text]], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )["choices"][0]["logprobs"]
    reported = values["token_logprobs"][len(context) : -1]
    assert reported == pytest.approx(wanted(bytes(context + text))[len(context) :], abs=1e-4)
    tops = values["top_logprobs"][len(context) : -1]
    logits = run(tiny().model, context + text)
    greedy = [int(logits[place].argmax()) for place in range(len(context) - 1, len(context + text) - 1)]
    assert [value == max(top.values()) for value, top in zip(reported, tops, strict=True)] == [
        best == token for best, token in zip(greedy, text, strict=True)
    ]
    whole = complete(address, prompt=["a", "b"], max_tokens=9, temperature=0, stop=["\n", "a"], seed=1234)
    assert [each["text"] for each in whole["choices"]] == [
        expected(each, max_tokens=9, stop=("\n", "a")) for each in "ab"
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"prompt": ["a", ""]}, None),
        ({"prompt": []}, None),
        ({"prompt": ["a", 3]}, "prompt[1]"),
        ({"prompt": [3, "a"]}, "prompt[0]"),
        ({"prompt": ["a", [1, 100000]]}, "prompt[1]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": ["a", "x" * 3000]}, None),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "n": 9}, "n"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b", "echo": True}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": -1}, "logprobs"),
    ],
)
def test_a_prompt_that_is_none_is_a_400(address: str, fields: dict[str, Any], field: str | None) -> None:
    reply = httpx.post(f"{address}/v1/completions", json={"model": "tiny", **fields})
    assert reply.status_code == 400, reply.text
    assert field is None or reply.json()["error"]["param"] == field
