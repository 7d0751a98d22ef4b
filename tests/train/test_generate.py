"""Samples by generation, with a real engine over a tiny model."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import InputError
from paceline.train.generate import Generated, GenerateSettings, generate, read_prompts, write_given
from paceline.train.samples import SampleWriter, keys_in, read_samples
from paceline.types import Request, Sampling, StepOutput
from tests.tiny import ByteTokenizer, tiny_engine
from tests.train.data import ABOUT


class Chat(ByteTokenizer):
    """Bytes, and chats as their contents."""

    encode_prompt = ByteTokenizer.encode

    def encode_chat(self, messages: Any, tools: Any = None) -> list[int]:
        return self.encode("".join(f"<{each['role']}>{each['content']}" for each in messages) + "<assistant>")


PROMPTS = [
    *({"messages": [{"role": "user", "content": f"write {number}"}], "task": "function"} for number in range(12)),
    {"prompt": "def f(", "task": "continue"},
]
BAD = [
    {"task": "nothing"},
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"prompt": "x" * 1000},
    {"messages": []},
]


def run(path: Path, prompts: list[dict[str, Any]], **settings: Any) -> Generated:
    engine = tiny_engine()
    done = keys_in(path)
    lines: list[str] = []
    with SampleWriter(path, ABOUT) as writer:
        values = GenerateSettings(**{"max_tokens": 20, "in_flight": 4, **settings})
        result = generate(engine, Chat(), prompts, writer, done, values, lines.append)
    assert not engine.busy and lines[-1].startswith("generation: ")
    return result


def test_outputs_are_the_engines_and_bad_prompts_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "samples.bin"
    result = run(path, PROMPTS + BAD)
    assert result.prompts == len(PROMPTS) and sum(result.bad.values()) == len(BAD)
    assert sorted(line for lines in result.listed.values() for line in lines) == [14, 15, 16, 17]
    samples = read_samples(path)
    assert {each.task for each in samples} == {"function", "continue"}
    assert {each.variant for each in samples} == {"t=0", "t=0.7"}
    engine = tiny_engine()
    for sample in samples:
        ((first, last),) = sample.spans
        assert last == len(sample.tokens)
        if sample.variant == "t=0":
            request = Request(sample.tokens[:first].tolist(), Sampling(max_tokens=20))
            assert engine.generate([request])[0].tokens == sample.tokens[first:].tolist()


def test_prompts_are_submitted_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(max_batch=48)
    submit, step = engine.submit, engine.step
    counts = [0]

    def counting(request: Request) -> str:
        counts[-1] += 1
        return submit(request)

    def stepping() -> list[StepOutput]:
        counts.append(0)
        return step()

    monkeypatch.setattr(engine, "submit", counting)
    monkeypatch.setattr(engine, "step", stepping)
    prompts = [{"prompt": f"{number} is", "task": "count"} for number in range(200)]
    with SampleWriter(tmp_path / "samples.bin", ABOUT) as writer:
        settings = GenerateSettings(max_tokens=60, in_flight=48, temperatures=(2.0,))
        result = generate(engine, Chat(), prompts, writer, set(), settings, lambda line: None)
    submitted = [each for each in counts if each]
    assert result.prompts + sum(result.bad.values()) == len(prompts) == sum(submitted)
    assert submitted[0] == 48 and len(submitted) > 3 and min(submitted[:-1]) >= 3


def test_few_prompts_are_encoded_before_they_are_needed(tmp_path: Path) -> None:
    engine, chat = tiny_engine(max_batch=32), Chat()
    threads = []

    def encode_prompt(text: str, allow_special: bool = False) -> list[int]:
        threads.append(threading.get_ident())
        return chat.encode(text)

    chat.encode_prompt = encode_prompt  # type: ignore[method-assign]
    prompts = [{"prompt": f"{number} is"} for number in range(200)]
    with SampleWriter(tmp_path / "samples.bin", ABOUT) as writer:
        settings = GenerateSettings(max_tokens=20, in_flight=32, tokens=100)
        result = generate(engine, chat, prompts, writer, set(), settings, lambda line: None)
    assert 100 <= result.tokens < 2000 and 32 <= len(threads) < 100
    assert threading.get_ident() not in threads, "the engine waits for the tokenizer"
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_generated_prompts_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "samples.bin"
    run(path, PROMPTS[:5])
    result = run(path, PROMPTS)
    assert (result.skipped, result.prompts) == (5, len(PROMPTS) - 5)
    assert len(keys_in(path)) == len(read_samples(path)) == len(PROMPTS)


def test_a_limit_of_tokens_or_time_ends_generation(tmp_path: Path) -> None:
    result = run(tmp_path / "tokens.bin", PROMPTS, tokens=30)
    assert 30 <= result.tokens < 200 and result.prompts < len(PROMPTS)
    assert run(tmp_path / "time.bin", PROMPTS, minutes=0.0).prompts == 0


def test_given_texts_are_supervised_whole_and_given_outputs_alone(tmp_path: Path) -> None:
    path = tmp_path / "given.bin"
    texts = [
        {"text": "x" * 250, "task": "prose"},
        {"messages": [{"role": "user", "content": "say hello"}], "output": "hello hello"},
        {"task": "neither"},
        {"prompt": "x" * 95, "output": "y" * 50},
        {"prompt": "x", "output": "y"},
        {"text": ""},
    ]
    with SampleWriter(path, ABOUT) as writer:
        result = write_given(Chat(), texts, writer, set(), 100, (257,))
    assert result.prompts == 2 and result.bad == {
        "has neither a text nor an output": 1,
        "has a prompt that leaves fewer than 8 tokens of 100 for its output": 1,
        "has fewer than 8 tokens to predict": 2,
    }
    samples = read_samples(path)
    assert [(len(each.tokens), each.spans) for each in samples[:3]] == [
        (100, ((0, 100),)),
        (100, ((0, 100),)),
        (50, ((0, 50),)),
    ]
    assert bytes(samples[3].tokens[:-1].tolist()) == b"<user>say hello<assistant>hello hello"
    assert samples[3].tokens[-1] == 257 and samples[3].num_supervised == 12
    with SampleWriter(path, ABOUT) as writer:
        assert write_given(Chat(), texts, writer, keys_in(path), 100, (257,)).skipped == 4


def test_prompts_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(each) + "\n\n" for each in PROMPTS))
    assert read_prompts(path) == PROMPTS
    for text, message in (("[1]\n", "line 1 .* no JSON object"), ("{\n", "cannot be read")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_prompts(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")
